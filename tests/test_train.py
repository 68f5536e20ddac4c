"""Training: the same curve as SAELens, exact resumption, NaN, planted dictionaries, BatchTopK, logs."""

import math
import sys
import types

import pytest
import torch
from conftest import HARVEST, a_profile
from safetensors.torch import load_file

from helpers import profiles
from helpers.sae import evaluation, saes, topk, train
from helpers.sae.activations import Array
from helpers.sae.topk import Weights


def planted(d=64, features=128, active=4, samples=20_000, seed=0):
    """Sparse sums of unit features, and the features."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(features, d, generator=g), dim=1)
    chosen = torch.rand(samples, features, generator=g).topk(active).indices
    weight = torch.rand(samples, active, generator=g) + 0.5
    return torch.nn.functional.embedding_bag(chosen, rows, per_sample_weights=weight, mode="sum"), rows


SMALL = train.Config(latents=96, k=4, samples=40 * 256, batch=256, lr=3e-3, low=False, log_every=5, checkpoint_every=10)


def test_the_loss_curve_is_saelens_own():
    """200 steps from the same start: SAELens's training SAE with its trainer's clipping and Adam, in float64."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    x, _ = planted(samples=8192)
    start = topk.initial(64, 96, x.mean(0))
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=64, d_sae=96, k=4, dtype="float64"))
    for name in ("W_dec", "b_dec"):
        getattr(sae, name).copy_(getattr(start, name))
    sae.W_enc.copy_(start.W_enc.T)
    optimiser, nobody = torch.optim.Adam(sae.parameters(), lr=3e-4), torch.zeros(96, dtype=torch.bool)
    state = train.State.new(Weights(*(t.double() for t in start)))
    config = train.Config(96, 4, 10**9, 256, 3e-4, warm_up=0.0, decay=0.0, low=False)
    for step in range(200):
        batch = x[(step * 256) % 8192 :][:256].double()
        ours = float(train.update(state, batch, config).loss)
        with torch.enable_grad():
            loss = sae.training_forward_pass(TrainStepInput(batch, {}, nobody, 0, False)).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        assert abs(ours - float(loss)) < 1e-6 * float(loss), step
    assert ours < 0.5 * float((x - x.mean(0)).square().sum(1).mean())  # and something was learnt


@pytest.mark.parametrize(
    "extra", [{}, {"batch_topk": True}, {"decoder": "unit", "low": True, "dead_after": 300, "k_aux": 4}]
)
def test_a_run_cut_anywhere_resumes_to_the_same_bits(tmp_path, extra, monkeypatch):
    x, _ = planted()
    config = SMALL._replace(**extra)
    whole = train.fit(Array(x), config)
    real, calls = train.update, []

    def cut(*arguments):
        calls.append(1)
        if len(calls) in (27, 34):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train, "update", cut)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train.fit(Array(x), config, checkpoints=tmp_path)
    resumed = train.fit(Array(x), config, checkpoints=tmp_path)
    assert len(calls) < 2 * 40
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, resumed.weights, strict=True))
    assert whole.log == resumed.log and torch.equal(whole.frequency, resumed.frequency)
    assert whole.threshold == resumed.threshold


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys):
    x, _ = planted()
    whole = train.fit(Array(x), SMALL, checkpoints=tmp_path)
    newest = sorted(tmp_path.glob("*/step-*"))[-1]
    (newest / "state.safetensors").write_bytes(b"cut short")
    again = train.fit(Array(x), SMALL, checkpoints=tmp_path)
    assert newest.name in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, again.weights, strict=True))


def test_a_checkpoint_of_another_configuration_is_not_taken(tmp_path):
    x, _ = planted()
    train.fit(Array(x), SMALL, checkpoints=tmp_path)
    other = train.fit(Array(x), SMALL._replace(lr=1e-3), checkpoints=tmp_path)
    assert other.log == train.fit(Array(x), SMALL._replace(lr=1e-3)).log
    assert len(list(tmp_path.iterdir())) == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    x, _ = planted()
    real = train.update

    def blown(state, *arguments):
        done = real(state, *arguments)
        if state.steps > 23:
            done = done._replace(loss=torch.tensor(math.nan))
        return done

    monkeypatch.setattr(train, "update", blown)
    with pytest.raises(train.TrainingError, match="step-0000020"):
        train.fit(Array(x), SMALL, checkpoints=tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*/step-*"))[-1] == "step-0000020"
    with pytest.raises(train.TrainingError, match="no checkpoint"):
        train.fit(Array(x), SMALL)


@pytest.mark.parametrize("name", Weights._fields)
def test_a_weight_that_is_not_finite_stops_the_run_though_the_loss_is(name, monkeypatch):
    real = train.update

    def spoiled(state, *arguments):
        done = real(state, *arguments)
        if state.steps == 40:  # the last
            getattr(state.weights, name)[3] = math.nan
        return done

    monkeypatch.setattr(train, "update", spoiled)
    with pytest.raises(train.TrainingError, match=f"not finite at step 40: {name};"):
        train.fit(Array(planted()[0]), SMALL)


def test_bad_rows_are_refused_with_their_place():
    x, _ = planted()
    with pytest.raises(ValueError, match="all the same"):
        train.fit(Array(torch.ones(1000, 8)), SMALL._replace(samples=512))
    x[7, 3] = math.inf
    with pytest.raises(ValueError, match=r"sample 7 \(row 7\) holds NaN or infinity"):
        train.fit(Array(x), SMALL._replace(samples=20_000))
    source = Array(x)
    with pytest.raises(ValueError, match=r"sample 7 \(row 7\)"):
        for _, batch in zip(range(100), source.batches(256), strict=False):
            assert torch.isfinite(batch).all()


@pytest.mark.parametrize(
    ("change", "word"),
    [({"k": 0}, "k"), ({"k": 97}, "exceed"), ({"latents": 2.5}, "latents"), ({"samples": 100}, "batch"), ({"lr": 0.0}, "lr"),
     ({"warm_up": 0.7, "decay": 0.7}, "warm_up"), ({"decoder": "none"}, "decoder"), ({"clip": 0.0}, "clip"), ({"k_aux": -3}, "k_aux"), ({"beta1": 1.5}, "beta1")],
)  # fmt: skip
def test_nonsense_configurations_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        train.fit(Array(planted(samples=1000)[0]), SMALL._replace(**change))


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    config = train.Config(96, 4, samples=1000, batch=10, lr=1.0, warm_up=0.1, decay=0.2)
    rates = [train.rate(config, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[50] == rates[79] == 1.0
    assert rates == sorted(rates[:50]) + sorted(rates[50:], reverse=True) and rates[-1] == pytest.approx(0.05)


def test_the_log_says_what_happened():
    x, _ = planted(samples=40_000)
    done = train.fit(Array(x), SMALL._replace(samples=200 * 256, dead_after=2000))
    last = done.log[-1]
    wanted = {"step", "samples", "loss", "mse", "auxiliary", "explained variance", "L0", "dead", "learning rate"}
    assert set(last) == wanted and last["samples"] == 200 * 256 and last["L0"] <= 4
    assert last["explained variance"] > 0.5 > abs(done.log[0]["explained variance"] - last["explained variance"])
    assert done.frequency.sum() == pytest.approx(last["L0"], rel=0.1)


def test_dead_latents_come_back_by_the_auxiliary_loss_and_not_without():
    x, _ = planted(samples=40_000)
    alive = {}
    for alpha in (0.0, 1.0):
        start = topk.initial(64, 128, x.mean(0))
        start.b_enc[:64] = -2.0  # half of them below what would be chosen
        config = SMALL._replace(latents=128, alpha=alpha, k_aux=8, dead_after=1000, warm_up=0.0, decay=0.0)
        state = train.State.new(start)
        for i in range(300):
            train.update(state, x[(i * 256) % 39_936 :][:256], config)
        alive[alpha] = int((state.since_fired[:64] < 1000).sum())
    assert alive[0.0] == 0 and alive[1.0] > 40, alive


@pytest.mark.parametrize("d", [8, 48, 512])
def test_the_limit_of_clipping_grows_with_the_width_and_touches_no_healthy_step(tmp_path, d):
    """Adam's first moment after one step is (1 - beta1) times the clipped gradient."""
    config = train.Config(2 * d, 4, 256, 256, low=False)
    source = Array(30 * torch.randn(256, d) + 7)
    centre, scale = train.measure(source.sample(256, 0))
    batch = next(source.batches(256, 0)) * scale
    raw = topk.step(batch, topk.initial(d, 2 * d, scale * centre), 4).gradients
    length = math.sqrt(sum(float(g.double().square().sum()) for g in raw))
    assert length > 1.5  # a limit of 1 would bind
    for clip in (1.0, 1e-3, math.inf):
        train.fit(source, config._replace(clip=clip), checkpoints=tmp_path / str(clip))
        state = load_file(next((tmp_path / str(clip)).glob("*/step-*/state.safetensors")))
        kept = (1 - config.beta1) * min(1, clip * d / length)
        for name, g in raw._asdict().items():
            torch.testing.assert_close(state[f"first.{name}"], g * kept, rtol=1e-4, atol=1e-7)


def test_decoder_rows_stay_unit_when_asked():
    x, _ = planted()
    state = train.State.new(topk.initial(64, 96, x.mean(0)))
    for i in range(5):
        train.update(state, x[i * 256 : (i + 1) * 256], SMALL._replace(decoder="unit"))
    torch.testing.assert_close(state.weights.W_dec.norm(dim=1), torch.ones(96))


def test_batch_topk_threshold_gives_back_the_training_l0(tmp_path):
    x, _ = planted()
    known = {"model_name": "planted", "hook_name": "blocks.0.hook_resid_post"}
    config = SMALL._replace(batch_topk=True, samples=100 * 256)
    done = train.fit(Array(x), config)
    sae = saes.load(saes.save(tmp_path / "sae", done.weights, 4, known, done.threshold)).sae
    assert sae.cfg.architecture() == "jumprelu"
    assert evaluation.evaluate(sae, Array(x)).l0 == pytest.approx(4, rel=0.05)


def test_training_is_cached_and_leaves_no_checkpoints(cache):
    x, _ = planted()
    source = Array(x, model_name="planted", hook_name="blocks.0.hook_resid_post")
    folder = train.sae(source, SMALL)
    before = (folder / "sae_weights.safetensors").stat().st_mtime_ns
    assert train.sae(source, SMALL) == folder and (folder / "sae_weights.safetensors").stat().st_mtime_ns == before
    assert train.sae(source, SMALL._replace(seed=1)) != folder
    assert not list((cache / "checkpoints").glob("*"))


def test_a_damaged_cached_sae_is_named_and_trained_again(cache, capsys):
    x, _ = planted()
    source = Array(x, model_name="planted", hook_name="blocks.0.hook_resid_post")
    folder = train.sae(source, SMALL)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"sae_weights.safetensors", "cfg.json", "training.json", "checksums.json"}
    weights, cfg = before["sae_weights.safetensors"], before["cfg.json"]
    for name, damaged in (
        ("sae_weights.safetensors", weights[:-100]),
        ("sae_weights.safetensors", weights[:-100] + bytes([weights[-100] ^ 1]) + weights[-99:]),
        ("cfg.json", cfg[: len(cfg) // 2]),
    ):
        (folder / name).write_bytes(damaged)
        assert train.sae(source, SMALL) == folder
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert f"{folder.name} is damaged" in capsys.readouterr().out


def test_a_checkpoint_made_by_other_code_is_not_taken(tmp_path, monkeypatch):
    x, _ = planted()
    train.fit(Array(x), SMALL, checkpoints=tmp_path)
    monkeypatch.setattr(train, "code_digest", lambda *_: "other")
    train.fit(Array(x), SMALL, checkpoints=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_profiles_section_is_checked():
    section = {"expansion": 8, "k": 32, "samples": 10_000}
    config = train.of_profile(a_profile(sae={"harvest": HARVEST, "train": section}), 576, seed=3)
    assert (config.latents, config.k, config.seed) == (4608, 32, 3)
    with pytest.raises(ValueError, match="no section sae: train"):
        train.of_profile(a_profile(sae={"harvest": HARVEST}), 576)
    settings = set(profiles.Training.model_fields) - {"expansion"}
    assert settings == set(train.Config._fields) - {"latents", "seed"}  # what a profile may say, and nothing else


def test_the_dictionaries_of_a_pair_share_a_seed_and_the_second_does_not(cache):
    base, chat = (
        Array(planted(samples=4000)[0] + i, model_name=f"m{i}", hook_name="blocks.0.hook_resid_post") for i in (0, 1)
    )
    section = {"expansion": 2, "k": 4, "samples": 8192, "batch": 512, "low": False}
    profile = a_profile(sae={"harvest": HARVEST, "train": section})
    made = train.dictionaries(profile, base, chat, seed=5)
    alone = [train.dictionary(profile, base, seed=s)[0] for s in (5, 6)]
    for one, other in ((made.base, alone[0]), (made.second, alone[1])):
        assert torch.equal(one.sae.W_dec, other.sae.W_dec)
    same, apart = (
        torch.cosine_similarity(made.base.sae.W_dec, x.sae.W_dec, dim=1).mean() for x in (made.chat, made.second)
    )
    assert same > 0.9 > 0.5 > apart  # one start, one order of rows
    with pytest.raises(saes.SaeError, match="names one SAE"):
        train.dictionaries(a_profile(sae={"harvest": HARVEST, "release": "r", "id": "i"}), base, chat)
    named = {"release": "r", "id": "i"}
    with pytest.raises(profiles.ProfileError, match="pair: sae: second is missing"):
        a_profile(pair={"base": "a", "chat": "b", "sae": {"base": named, "chat": named}})


def test_wandb_is_asked_for_by_name_and_missed_with_a_sentence(monkeypatch):
    lines = []
    run = types.SimpleNamespace(log=lines.append, finish=lambda: lines.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run, login=lambda **_: None))
    done = train.fit(Array(planted(samples=5000)[0]), SMALL, wandb_project="test")
    assert lines == [*done.log, "finished"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        train.fit(Array(planted(samples=5000)[0]), SMALL, wandb_project="test")


@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_dictionary_is_recovered_at_least_as_well_as_by_saelens(seed):
    """sae_lens.synthetic makes the data; both trainers get the same rows, start, budget and learning rate."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.synthetic import ActivationGenerator, FeatureDictionary, SyntheticActivationIterator
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    with torch.enable_grad():  # it makes its features nearly orthogonal by gradient descent
        features = FeatureDictionary(num_features=128, hidden_dim=48)
    firing = ActivationGenerator(num_features=128, firing_probabilities=torch.full((128,), 4 / 128))
    stream = SyntheticActivationIterator(features, firing, batch_size=512)
    x = torch.cat([next(stream) for _ in range(60)])
    truth = torch.nn.functional.normalize(features.feature_vectors.detach(), dim=1)
    steps, lr = 600, 1e-3
    config = train.Config(128, 4, steps * 512, 512, lr, warm_up=0.0, decay=0.0, low=False, dead_after=20_000, seed=seed)
    ours = train.fit(Array(x), config).weights
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=48, d_sae=128, k=4))
    start = topk.initial(48, 128, x.mean(0), seed)
    sae.W_enc.copy_(start.W_enc.T)
    sae.W_dec.copy_(start.W_dec)
    sae.b_dec.copy_(start.b_dec)
    trainer = SAETrainer(
        SAETrainerConfig(
            n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=steps * 512,
            device="cpu", autocast=False, lr=lr, lr_end=lr, lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9,
            adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=512, dead_feature_window=40,
            feature_sampling_window=10**6, logger=LoggingConfig(log_to_wandb=False), n_batches_for_norm_estimate=10,
        ),
        sae, Array(x).batches(512, seed),
    )  # fmt: skip
    with torch.enable_grad():
        trainer.fit()

    def recovered(W_dec):
        return float((truth @ torch.nn.functional.normalize(W_dec, dim=1).T).max(1).values.mean())

    assert recovered(ours.W_dec) > 0.9
    assert recovered(ours.W_dec) >= recovered(sae.W_dec.detach()) - 1e-3
    assert recovered(torch.randn(128, 48)) < 0.6  # the floor


def test_frozen_decoder_rows_stay_as_they_were_drawn():
    config = SMALL._replace(decoder="frozen")
    x, _ = planted(samples=2048)
    state = train.State.new(topk.initial(x.shape[1], config.latents, x.mean(0), 0))
    before = state.weights.W_dec.clone()
    first = train.update(state, x[:256], config).mse
    for i in range(1, 40):
        last = train.update(state, x[(i % 8) * 256 : (i % 8 + 1) * 256], config).mse
    assert torch.equal(state.weights.W_dec, before) and not torch.equal(state.weights.W_enc, before)
    assert last < first


def test_a_registrys_sae_has_no_frozen_one(cache):
    with pytest.raises(saes.SaeError, match="from a registry"):
        train.dictionary(
            a_profile(sae={"harvest": HARVEST, "release": "r", "id": "i"}), Array(torch.randn(8, 4)), frozen=True
        )
