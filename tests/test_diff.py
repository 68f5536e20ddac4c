"""The diff-SAE: its section settled, its memory reckoned as it is, its hours from what was measured, its streamed training resumed."""

import copy
import dataclasses
import types

import pytest
import torch
from conftest import HARVEST, a_profile
from test_decompose import sae_of
from test_harvest import small

from helpers import session
from helpers.lm import files, models, reading
from helpers.pair import budget, diff
from helpers.profiles import ProfileError
from helpers.sae import activations, evaluation, harvest, saes, topk, train
from helpers.steering.caa import Halves

SECTION = {
    "expansion": 2,
    "k": 4,
    "samples": 40 * 64,
    "batch": 64,
    "lr": 3e-3,
    "low": False,
    "log_every": 5,
    "checkpoint_every": 10,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small gain nothing by more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair():
    """A random base model, and a chat model that differs from it a little."""
    base, chat = small(), dataclasses.replace(small(), identity="small-chat")
    torch.manual_seed(3)
    for parameter in chat.weights.parameters():
        parameter.data.mul_(1 + 0.05 * torch.randn_like(parameter))
    return base, chat


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words, random = (
        ["the", "river", "ran", "past", "seven", "grey", "stones", "a", "mill"],
        torch.Generator().manual_seed(0),
    )
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "\n\n".join(" ".join(words[i] for i in torch.randint(len(words), (60,), generator=random)) for _ in range(60))
    )
    return str(path)


@pytest.fixture
def profile(text, monkeypatch):
    """A settled profile whose diff-SAE is streamed in several small pools."""
    monkeypatch.setattr(diff, "POOL_TOKENS", 512)
    how = {
        "harvest": {"source": text, "tokens": 1500, "held_out": 300, "context": 32},
        "train": SECTION,
        "stream": text,
        "layer": 1,
    }
    return diff.settled(a_profile(layer=2, pair={"base": "a", "chat": "b", "diff": how}))


def changed(profile, **diff_section):
    """The profile with another `pair: diff:`."""
    pair = profile.pair.model_dump(exclude_none=True)
    return diff.settled(a_profile(layer=2, pair=pair | {"diff": pair["diff"] | diff_section}))


# --- the profile -------------------------------------------------------------------------------------------------------


def test_a_profile_is_settled_and_left_as_it_was(monkeypatch):
    gemma = session.load_profile("gemma-2-2b")
    before = copy.deepcopy(gemma)
    out = diff.settled(gemma)
    assert gemma == before and diff.settled(out) == out and out.pair == gemma.pair
    assert (out.chat, out.layer) == ("google/gemma-2-2b-it", 13)
    assert out.sae.release is None and out.sae.train.k == 64 and out.sae.harvest.chats == 48
    own = {"chat": gemma.chat, "layer": gemma.layer, "sae": gemma.sae}
    assert out.model_copy(update=own) == gemma
    config = diff.configured(out, 2304)
    assert (config.latents, config.k, config.samples) == (18_432, 64, 100_000_000)
    smol = session.load_profile()
    assert diff.settled(smol) == smol.model_copy(update={"chat": smol.pair.chat})
    monkeypatch.setenv("LAYER", "7")
    assert diff.settled(session.load_profile("gemma-2-2b")).layer == 7


def test_a_section_is_laid_over_the_profiles_own():
    own = {"harvest": HARVEST, "train": {"k": 8, "expansion": 4, "samples": 100}, "release": "r", "id": "i"}
    given = a_profile(layer=3, sae=own, pair={"base": "x", "chat": "y", "diff": {"train": {"k": 2}}})
    out = diff.settled(given)
    assert out.sae.train.settings() == {"k": 2, "expansion": 4, "samples": 100} and out.sae.release is None
    assert out.sae.harvest == given.sae.harvest and out.layer == 3 and out.chat == "y"


def test_a_section_that_lacks_something_is_refused():
    pair = {"base": "x", "chat": "y", "diff": {"train": {"k": 2}}}
    with pytest.raises(ProfileError, match="pair: diff: train: expansion is missing"):
        a_profile(sae={"harvest": HARVEST, "release": "r", "id": "i"}, pair=pair)
    given = a_profile(sae={"harvest": HARVEST}, pair={"base": "x", "chat": "y", "diff": {"layer": 2}})
    with pytest.raises(ProfileError, match="neither sae: train: nor pair: diff: train: is there"):
        diff.settled(given)


def test_a_profile_without_a_pair_is_refused():
    with pytest.raises(models.ModelError, match="names no base model"):
        diff.settled(a_profile())


# --- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "neox"])
def test_a_shape_by_name_counts_what_the_loaded_model_holds(kind, tmp_path):
    model = small(kind=kind)
    model.weights.save_pretrained(tmp_path / "m")
    found = budget.shape(str(tmp_path / "m"))
    assert found == budget.shape(model)
    stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.weights.parameters()}
    assert found.parameters * 4 == sum(stored.values())  # tied embeddings lie in one place
    assert bool(model.weights.config.tie_word_embeddings) == (kind in ("gemma2", "gpt2"))


@pytest.mark.parametrize("low", [False, True])
def test_the_budget_of_the_sae_is_its_bytes(low):
    config = train.Config(96, 4, 1024, 256, low=low)
    state = train.State.new(topk.initial(48, 96, torch.zeros(48)))
    done = train.update(state, torch.randn(256, 48), config)
    shape = budget.Shape(1000, 48, 96, 48, 4)
    need = budget.reckoned(shape, shape._replace(parameters=2000), torch.bfloat16, config, budget.Sizes(4, 32, 512))

    def held(*tensors):
        return sum(t.nbytes for t in tensors)

    parts = need.parts
    assert parts["weights of the SAE"] == held(*state.weights) and parts["Adam's two moments"] == held(
        *state.first, *state.second
    )
    assert parts["gradients"] == held(*done.gradients) and parts["counts of firing"] == held(
        state.fired, state.since_fired
    )
    assert parts["pre-codes"] == 256 * 96 * (2 if low else 4)
    assert (parts["weights of the base"], parts["weights of the chat model"]) == (2000, 4000)
    kept = held(*(t for t in state.tensors().values() if t.ndim))
    assert need.disk == {"checkpoints": 3 * kept, "the SAE": held(*state.weights)}
    assert need.total == sum(parts.values()) and f"| **in all** | device | **{need.total / 1e9:.2f}** |" in need.table()


def peak(call):
    """The most bytes that torch held at once during `call`, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(changes.cumsum(0).max())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.float32), ("gemma2", torch.bfloat16), ("gpt2", torch.float32), ("neox", torch.bfloat16)],
)
def test_the_estimate_of_a_forward_pass_is_above_what_it_takes_and_not_far(kind, dtype):
    model = small(kind=kind)
    model.weights.to(dtype)
    for rows, context in ((32, 32), (4, 200)):
        ids, kept = torch.randint(100, (rows, context)), torch.ones(rows, context, dtype=torch.bool)
        taken = peak(lambda i=ids, k=kept: reading.packed(model, i, [1])[1][k].float().norm(dim=1))
        assert 0.2 < taken / budget.forward_bytes(budget.shape(model), dtype, rows, context) < 1


@pytest.mark.parametrize("more", [{}, {"low": True}, {"batch_topk": True}, {"alpha": 0.0}])
@pytest.mark.parametrize(("d", "latents", "batch"), [(64, 512, 512), (64, 2048, 128)])
def test_the_estimate_of_a_training_step_is_above_what_it_takes_and_not_far(more, d, latents, batch):
    config = train.Config(latents, 8, 10**6, batch, dead_after=10, **{"low": False, **more})
    state, x = train.State.new(topk.initial(d, latents, torch.zeros(d))), torch.randn(batch, d)
    shape = budget.Shape(0, d, d, d, 1)
    parts = budget.reckoned(shape, shape, torch.float32, config, budget.Sizes(1, 2, 2)).parts
    room = sum(parts[name] for name in ("gradients", "pre-codes", "working memory of a training step"))
    for dead in (0, 64, latents):
        state.since_fired.fill_(0)[:dead] = 99
        taken = peak(lambda: train.update(state, x.clone().float() * 2, config))
        assert taken < room
    assert taken > 0.25 * room / (3 if config.batch_topk else 1)  # its look at all codes is rare


def test_a_whole_run_stays_within_its_budget(pair, profile, cache):
    stream, config = diff.streamed(profile, *pair), diff.configured(profile, 48)._replace(samples=640, dead_after=0)
    need = budget.reckoned(*map(budget.shape, pair), torch.float32, config, diff.sizes(profile))
    room = need.total - sum(need.parts[name] for name in budget.LOADED) + sum(need.host.values())
    assert 0.2 < peak(lambda: train.fit(stream, config)) / room < 1


def test_what_does_not_fit_is_refused_before_anything_is_loaded(profile, pair, cache, monkeypatch, tmp_path):
    for name, model in zip("ab", pair, strict=True):
        model.weights.save_pretrained(tmp_path / name)
    pair_section = profile.pair.model_copy(update={"base": str(tmp_path / "a"), "chat": str(tmp_path / "b")})
    profile = profile.model_copy(update={"pair": pair_section})
    monkeypatch.setattr(
        models.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    need = diff.planned(profile, torch.float32)
    assert need == budget.reckoned(
        *map(budget.shape, pair), torch.float32, diff.configured(profile, 48), diff.sizes(profile)
    )
    budget.check(need, "cpu")
    free = {"cpu": 10**12, "cuda": 10**12}
    monkeypatch.setattr(files, "free_memory", lambda device: free[device])
    for device, of, least in (
        ("cuda", "cuda", need.total),
        ("cuda", "cpu", sum(need.host.values())),
        ("cpu", "cpu", need.total + sum(need.host.values())),
    ):
        monkeypatch.setitem(free, of, int(1.1 * least) + 1)
        budget.check(need, device)
        monkeypatch.setitem(free, of, int(1.1 * least) - 1)
        with pytest.raises(budget.BudgetError, match=r"takes \d.* GB on .* are free there: (take|close)"):
            budget.check(need, device)
        if of == device:
            budget.check(need, device, budget.LOADED)  # what is loaded is no longer wanted
        free[of] = 10**12
    monkeypatch.setattr(budget.store, "free_bytes", lambda _: 1000)
    with pytest.raises(budget.BudgetError, match="GB on disk.*CACHE_DIR"):
        budget.check(need, "cpu")
    with pytest.raises(budget.BudgetError, match="on disk"):
        diff.dictionary(profile, None, *pair)
    assert not (cache / "saes").exists() and not (cache / "checkpoints").exists()


# --- time --------------------------------------------------------------------------------------------------------------


def test_hours_are_what_harvest_and_training_take_in_turn():
    found = budget.Probe(harvest=20_000.0, training=60_000.0, samples=108_000_000)
    assert found.hours == pytest.approx(1.5 + 0.5) and "about 20 minutes" in str(found._replace(samples=18_000_000))
    assert (
        str(found)
        == "harvest 20,000 tokens/s, training 60,000 tokens/s, in turn: 108,000,000 tokens in about 2.0 hours"
    )


def test_a_probe_measures_both_and_changes_nothing(pair, profile, cache, monkeypatch):
    stream, config = diff.streamed(profile, *pair), diff.configured(profile, 48)
    before = next(stream.batches(64))
    clock = types.SimpleNamespace(now=0.0)
    real_rows, real_update = harvest.Stream._rows, train.update

    def rows(self, chunk):
        clock.now += 2.0
        return real_rows(self, chunk)

    def update(*arguments):
        clock.now += 0.25
        return real_update(*arguments)

    monkeypatch.setattr(harvest.Stream, "_rows", rows)
    monkeypatch.setattr(train, "update", update)
    monkeypatch.setattr(budget.time, "perf_counter", lambda: clock.now)
    found = budget.probe(stream, config, seconds=20)
    kept = stream.batch_rows * 31  # of 32 tokens a row the first is left out; end-of-text tokens are too
    assert 0.9 * kept / 2 < found.harvest <= kept / 2 and found.training == 64 / 0.25
    assert found.samples == config.samples and found.hours == pytest.approx(
        config.samples * (1 / found.harvest + 1 / found.training) / 3600
    )
    monkeypatch.undo()
    assert torch.equal(before, next(stream.batches(64))) and not list(cache.glob("saes/*"))


def test_a_probe_takes_real_time_and_refuses_nonsense(pair, profile, cache):
    stream, config = diff.streamed(profile, *pair), diff.configured(profile, 48)
    found = budget.probe(stream, config, seconds=0.1)
    assert found.harvest > 0 and found.training > 0 and found.hours > 0
    with pytest.raises(ValueError, match="exceed"):
        budget.probe(stream, config._replace(k=97))


# --- the dictionary ----------------------------------------------------------------------------------------------------


def bits(folder):
    return (folder / "sae_weights.safetensors").read_bytes()


def test_a_streamed_dictionary_is_announced_trained_and_cached(pair, profile, cache, capsys, monkeypatch):
    loaded, folder = diff.dictionary(profile, None, *pair)
    said = capsys.readouterr().out
    assert (
        said.index("Adam's two moments")
        < said.index("in turn: 2,560 tokens in about")
        < said.index("at the end of training")
    )
    assert (loaded.latents, loaded.k, loaded.hook) == (
        96,
        4,
        "blocks.1.hook_resid_post",
    ) and loaded.model == "small-chat"
    cfg = loaded.sae.cfg.metadata
    assert cfg.difference == "small-chat - small-llama-1"
    last = diff.logged(folder)
    assert (last.l0, last.dead, last.explained_variance) == (cfg.L0, cfg.dead, cfg["explained variance"])
    assert 0 < last.l0 <= 4 and last.explained_variance > 0.2 and f"L0 {last.l0:.1f}" in said
    with monkeypatch.context() as patch:
        for name in ("probe", "reckoned"):
            patch.setattr(budget, name, lambda *_: pytest.fail("reckoned again"))
        patch.setattr(train, "fit", lambda *_: pytest.fail("trained again"))
        assert diff.dictionary(profile, None, *pair)[1] == folder
    assert diff.dictionary(profile, None, *pair, seed=1)[1] != folder
    both = harvest.pair_of_profile(
        *pair, profile
    )  # the same rows on disk: the scale is that of differences, not of residuals
    scales = [
        float(1 / (x - x.mean(0)).square().mean().sqrt())
        for x in (both.difference.sample(10**6), both.chat.sample(10**6))
    ]
    assert cfg.input_scale == pytest.approx(scales[0], rel=0.05) and cfg.input_scale > 1.2 * scales[1]


def test_a_streamed_run_cut_anywhere_resumes_to_the_same_bits_unprobed(pair, profile, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "whole"))
    whole = diff.dictionary(profile, None, *pair)[1]
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cut"))
    real, probes, calls = train.update, [], []

    def cut(*arguments):
        calls.append(1)
        if len(calls) in (27, 34):
            raise KeyboardInterrupt
        return real(*arguments)

    def probe(*_):
        probes.append(1)
        monkeypatch.setattr(train, "update", cut)
        return budget.Probe(1.0, 1.0, 1)

    monkeypatch.setattr(budget, "probe", probe)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            diff.dictionary(profile, None, *pair)
    capsys.readouterr()
    resumed = diff.dictionary(profile, None, *pair)[1]
    assert "goes on from its last checkpoint" in capsys.readouterr().out
    assert len(probes) == 1 and len(calls) < 2 * 40
    assert resumed.name == whole.name and bits(resumed) == bits(whole) and diff.logged(resumed) == diff.logged(whole)
    assert not list((tmp_path / "cut" / "checkpoints").glob("*"))


def test_a_fast_run_takes_few_tokens_of_the_harvests_text(pair, profile, cache, monkeypatch):
    profile = changed(profile, stream="hub:nobody/nothing", train=SECTION | {"k": 64})  # no stream is asked for
    seen, real = [], harvest.Stream._rows
    monkeypatch.setattr(
        harvest.Stream, "_rows", lambda self, chunk: seen.append(int(chunk.kept.sum())) or real(self, chunk)
    )
    loaded, folder = diff.dictionary(profile, None, *pair, fast=True)
    assert loaded.latents == 48 and loaded.k == 12 and sum(seen) < 20_000
    assert loaded.sae.cfg.metadata.training_samples == 40 * 128


def test_batch_topk_comes_through_the_profile(pair, profile, cache):
    profile = changed(profile, train=SECTION | {"batch_topk": True})
    assert diff.dictionary(profile, None, *pair)[0].architecture == "jumprelu"


def test_without_a_stream_the_rows_given_are_trained_on(pair, profile, cache):
    profile = changed(profile, stream=None)
    both = harvest.pair_of_profile(*pair, profile)
    loaded, folder = diff.dictionary(profile, both.difference, *pair, seed=5)
    assert folder == train.sae(both.difference, diff.configured(profile, 48, 5))
    assert loaded.sae.cfg.metadata.harvest == both.chat.folder.name and diff.logged(folder).l0 <= 4
    x = both.difference.sample(10**6).double()
    assert loaded.sae.cfg.metadata.input_scale == pytest.approx(
        1 / float((x - x.mean(0)).square().mean().sqrt()), rel=1e-5
    )
    with pytest.raises(diff.DiffError, match="no differences were given"):
        diff.dictionary(profile, None, *pair)


def test_what_is_no_diff_sae_is_refused(pair, cache):
    registered = {"harvest": HARVEST, "release": "r", "id": "i"}
    profile = a_profile(layer=1, sae=registered, pair={"base": "a", "chat": "b"})
    with pytest.raises(diff.DiffError, match="of one model's residuals, not of differences"):
        diff.dictionary(profile, activations.Array(torch.randn(10, 4)), *pair)
    folder = saes.save(
        cache / "saes" / "x", topk.initial(4, 8, torch.zeros(4)), 2, {"model_name": "m", "hook_name": "h"}
    )
    with pytest.raises(diff.DiffError, match="holds no training.json"):
        diff.logged(folder)


def test_what_a_dictionary_says_of_differences_is_its_reconstruction_and_less_with_fewer_latents():
    g = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(16, 16, generator=g)).Q
    sae = sae_of("topk", rows, k=1, b_dec=torch.ones(16), rescale_acts_by_decoder_norm=False)
    x = 1 + 3 * rows[torch.randint(12, (90,), generator=g)]  # one latent each
    order = evaluation.evaluate(sae, activations.Array(x)).order
    said = diff.written(sae, order, x)
    torch.testing.assert_close(said.read(len(order)), sae.decode(sae.encode(x)), rtol=1e-5, atol=1e-5)
    assert len(order) == 12 and torch.equal(said.read(0), torch.ones(90, 16))
    error = [float((said.read(n) - x).square().sum()) for n in (0, 6, 12)]
    dealt = said.read(6, deal=1)
    assert error[0] > 1.5 * error[1] > error[2] and float((dealt - x).square().sum()) > error[0]
    assert torch.equal(dealt, said.read(6, deal=1)) and not torch.equal(dealt, said.read(6, deal=2))


def test_the_change_at_pairs_is_split_into_what_both_sides_share_and_what_they_do_not():
    shared, apart = torch.tensor([1.0, 0, 0]), torch.tensor([0, 2.0, 0])
    pos, neg = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    before = Halves(pos, neg, [3, 7], 0, 0.0)
    after = Halves(pos + shared + apart / 2, neg + shared - apart / 2, [3, 7], 0, 0.0)
    found = diff.at_pairs(before, after, 7)
    torch.testing.assert_close(found.mean, shared.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.contrast, apart.double(), atol=1e-6, rtol=0)


def test_a_stream_that_does_not_fit_is_refused_before_anything_is_loaded(profile, monkeypatch):
    asked = []
    monkeypatch.setattr(diff, "planned", lambda *given: asked.append(given) or "need")
    monkeypatch.setattr(budget, "check", lambda need, device: asked.append((need, device)))
    assert diff.check(profile, torch.float32, "cpu") and asked[-1] == ("need", "cpu")
    asked.clear()
    assert not diff.check(changed(profile, stream=None), torch.float32, "cpu") and not asked
