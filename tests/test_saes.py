"""SAEs: SAELens's layout read back by SAELens, what loaders do made visible, evaluation with known answers, tables of latents."""

import json
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_tokenizer
from safetensors.torch import load_file, save_file
from test_harvest import HOW, small, source  # noqa: F401

from helpers.lm import hooks, scoring
from helpers.lm.reading import LM
from helpers.sae import evaluation, harvest, latents, saes, topk
from helpers.sae.activations import Array
from helpers.sae.saes import SaeError
from helpers.sae.topk import Weights

KNOWN = {"model_name": "small", "hook_name": "blocks.1.hook_resid_post", "context_size": 32}


def some_weights(d=48, n=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = topk.initial(d, n, torch.randn(d, generator=g), seed)
    return Weights(
        w.W_enc + 0.1 * torch.randn(n, d, generator=g), 0.1 * torch.randn(n, generator=g), 2.5 * w.W_dec, w.b_dec
    )


def test_sae_lens_reads_the_same_codes_from_disk(tmp_path):
    from sae_lens import SAE

    w, x = some_weights(), torch.randn(300, 48)
    folder = saes.save(tmp_path / "sae", w, 8, KNOWN, notes={"log": [1]})
    theirs = SAE.load_from_disk(folder)
    ours = topk.encode(x, topk.unit_decoder(w), 8)
    torch.testing.assert_close(theirs.encode(x), ours.dense(96), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(theirs(x), topk.decode(topk.encode(x, w, 8), w), rtol=1e-5, atol=1e-5)
    assert (
        theirs.cfg.architecture() == "topk"
        and theirs.cfg.k == 8
        and theirs.cfg.metadata.hook_name == KNOWN["hook_name"]
    )
    assert json.loads((folder / "training.json").read_text()) == {"log": [1]}
    loaded = saes.load(folder, d_model=48, layer=1)
    assert (loaded.k, loaded.b_dec_on_input, loaded.normalisation, loaded.context) == (8, True, "none", 32)
    assert torch.equal(loaded.sae.W_enc, theirs.W_enc)


def test_saving_is_whole_and_refuses_what_nobody_could_use(tmp_path):
    w = some_weights()
    saes.save(tmp_path / "sae", w, 8, KNOWN)
    saes.save(tmp_path / "sae", some_weights(seed=1), 8, KNOWN)  # replaces
    with pytest.raises(SaeError, match="hook_name"):
        saes.save(tmp_path / "other", w, 8, {"model_name": "x"})
    with pytest.raises(SaeError, match="NaN"):
        saes.save(tmp_path / "other", w._replace(b_enc=w.b_enc * float("nan")), 8, KNOWN)
    with pytest.raises(ValueError, match="exceed"):
        saes.save(tmp_path / "other", w, 97, KNOWN)
    with pytest.raises(TypeError):
        saes.save(tmp_path / "sae", w, 8, KNOWN | {"odd": object()})
    assert torch.equal(
        saes.load(tmp_path / "sae").sae.W_dec, topk.unit_decoder(some_weights(seed=1)).W_dec
    )  # the old one stays
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(SaeError, match="not an SAE"):
        saes.save(tmp_path / "mine", w, 8, KNOWN)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert saes.whole(tmp_path / "sae") and not saes.whole(tmp_path / "mine")


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_a_threshold_makes_a_jumprelu_even_if_it_is_zero(tmp_path, threshold):
    w, x = some_weights(), torch.randn(50, 48)
    sae = saes.load(saes.save(tmp_path / "sae", w, 8, KNOWN, threshold)).sae
    assert sae.cfg.architecture() == "jumprelu"
    ranked = topk.pre_codes(x, w)
    torch.testing.assert_close(sae.encode(x), ranked * (ranked > threshold), rtol=1e-4, atol=1e-4)
    with pytest.raises(SaeError, match="NaN"):
        saes.save(tmp_path / "sae", w, 8, KNOWN, float("nan"))


def test_an_sae_for_something_else_is_refused(tmp_path):
    folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN)
    with pytest.raises(SaeError, match="width 48, but these have 64"):
        saes.load(folder, d_model=64)
    with pytest.raises(SaeError, match=r"belongs to blocks.1.hook_resid_post, but blocks.2.hook_resid_post"):
        saes.load(folder, layer=2)
    with pytest.raises(SaeError, match="no SAE in"):
        saes.load(tmp_path)
    with pytest.raises(SaeError, match="wants none"):
        saes.load(folder, norm_factor=0.5)
    for change, word in (
        ({"normalize_activations": "covariance_whitening"}, "whitens"),
        ({"metadata": {"sae_lens_version": "6.54.12"}}, "does not say which hook"),
    ):
        other = saes.save(tmp_path / "other", some_weights(), 8, KNOWN)
        rewrite(other, **change)
        with pytest.raises(SaeError, match=word):
            saes.load(other, layer=1)
    cross = saes.save(tmp_path / "cross", some_weights(), 8, KNOWN)
    rewrite(cross, architecture="transcoder", d_out=48)
    weights = load_file(cross / "sae_weights.safetensors")
    save_file(weights | {"b_dec": weights["b_dec"]}, cross / "sae_weights.safetensors")
    with pytest.raises(SaeError, match="transcoder"):
        saes.load(cross)
    with pytest.raises(SaeError, match="width"):
        evaluation.evaluate(saes.load(folder).sae, Array(torch.randn(10, 40)))
    (folder / "sae_weights.safetensors").write_bytes(b"broken")
    with pytest.raises(SaeError, match="cannot be loaded"):
        saes.load(folder)
    assert saes.hook_layer("blocks.3.hook_resid_pre") == 2 and saes.hook_layer("blocks.3.hook_mlp_out") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, monkeypatch, key, value):
    folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN, 0.5 if key == "threshold" else None)
    changed(folder, lambda t: t[key].view(-1)[7:8].fill_(value))
    with pytest.raises(SaeError, match=rf"NaN or infinity in {key}\b"):
        saes.load(folder)
    registry(monkeypatch, folder, None)
    with pytest.raises(SaeError, match=rf"rel/id holds NaN or infinity in {key}\b"):
        saes.load("rel", "id")


@pytest.mark.parametrize("k", [5000, 97, 0, -1, 2.5, 8.0, "8", True, None, [8], float("nan")])
def test_a_k_that_is_no_number_of_codes_is_refused(tmp_path, monkeypatch, k):
    folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN)
    rewrite(folder, k=k)
    with pytest.raises(SaeError, match=r"k = .*from 1 to its 96 latents"):
        saes.load(folder)
    registry(monkeypatch, folder, None)
    with pytest.raises(SaeError, match=r"k = .*from 1 to its 96 latents"):
        saes.load("rel", "id")


@pytest.mark.parametrize("k", [1, 96])
def test_a_k_of_one_and_of_all_latents_load(tmp_path, k):
    assert saes.load(saes.save(tmp_path / "sae", some_weights(), k, KNOWN)).k == k


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reshape_activations": "hook_z"}, "reshapes its inputs"),
        ({"reshape_activations": "hook_z", "metadata": {**KNOWN, "hook_name": "blocks.1.attn.hook_z"}}, "reshapes"),
        ({"d_in": 49}, r"d_in = 49, but W_dec is \(96, 48\)"),
        ({"d_sae": 4}, r"d_sae = 4 .*but W_dec is \(96, 48\)"),
        ({"d_in": "48"}, "d_in = '48'"),
        ({"d_sae": -96}, "d_sae = -96"),
        ({"d_in": True}, "d_in = True"),
        ({"architecture": "wild"}, "'wild' is missing from its cfg.json or not known"),
        ({"architecture": None}, "architecture = None"),
        ({"architecture": "jumprelu"}, "not those of its architecture .*threshold"),
        ({"metadata": None}, "metadata"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input = 'no'"),
        ({"rescale_acts_by_decoder_norm": "no"}, "rescale_acts_by_decoder_norm = 'no'"),
        ({"normalize_activations": "odd"}, "Got odd"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(tmp_path, change, words):
    folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN)
    rewrite(folder, **change)
    with pytest.raises(SaeError, match=words) as said:
        saes.load(folder)
    assert "\n" not in str(said.value) and str(tmp_path) not in str(said.value)


@pytest.mark.parametrize("key", ["architecture", "d_in", "d_sae", "k"])
def test_a_configuration_that_lacks_something_is_refused(tmp_path, key):
    folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN)
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in cfg.items() if name != key}))
    with pytest.raises(SaeError, match=rf"\b{key}\b"):
        saes.load(folder)


@pytest.mark.parametrize("given", ["", '{"d_in": 48', "null", "[1]", "48", "[" * 100_000, "\udcff"])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path, given):
    folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN)
    (folder / "cfg.json").write_bytes(given.encode(errors="surrogateescape"))
    with pytest.raises(SaeError, match=r"cfg.json.*JSON"):
        saes.load(folder)


@pytest.mark.parametrize("key", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_a_missing_tensor_is_named(tmp_path, key):
    folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN, 0.5 if key == "threshold" else None)
    changed(folder, lambda t: t.pop(key))
    with pytest.raises(SaeError, match=rf'not those of its architecture .*"{key}"'):
        saes.load(folder)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(SaeError, match="damaged or not there"):
        saes.load(folder)


def test_rescaling_by_a_decoder_row_of_zeros_is_refused(tmp_path):
    folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN)
    changed(folder, lambda t: t["W_dec"][3].zero_())
    rewrite(folder, rescale_acts_by_decoder_norm=True)
    with pytest.raises(SaeError, match="every output would be NaN"):
        saes.load(folder)


def test_a_saved_decoder_row_of_zeros_takes_no_other_latents_place(tmp_path):
    w, x = some_weights(), torch.randn(50, 48)
    w.W_dec[::2] = 0
    for threshold in (None, 0.0):
        sae = saes.load(saes.save(tmp_path / "sae", w, 8, KNOWN, threshold)).sae
        codes = sae.encode(x)
        assert not codes[:, ::2].any() and codes.any(0)[1::2].sum() > 20
        if threshold is None:
            torch.testing.assert_close(sae(x), topk.decode(topk.encode(x, w, 8), w), rtol=1e-4, atol=1e-4)


def test_an_sae_of_sae_lens_itself_loads_without_checksums(tmp_path):
    from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

    for kind, config in ((StandardSAE, StandardSAEConfig(48, 96)), (TopKSAE, TopKSAEConfig(48, 96, k=5))):
        kind(config).save_model(tmp_path / kind.__name__)
        assert saes.load(tmp_path / kind.__name__).latents == 96 and not saes.whole(tmp_path / kind.__name__)


def test_one_changed_bit_anywhere_is_not_whole(tmp_path):
    for name in ("sae_weights.safetensors", "cfg.json", "training.json", "checksums.json"):
        folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN, notes={"log": []})
        assert saes.whole(folder)
        good = (folder / name).read_bytes()
        for damaged in (good[:-9], good[:-9] + bytes([good[-9] ^ 1]) + good[-8:], b"", None):
            (folder / name).unlink() if damaged is None else (folder / name).write_bytes(damaged)
            assert not saes.whole(folder), (name, damaged is None)
        (folder / name).write_bytes(good)
        (folder / "latents.json").write_text("a table beside it")
        assert saes.whole(folder)
    assert not saes.whole(tmp_path / "nowhere") and not saes.whole(folder / "cfg.json")


def test_weights_that_changed_since_they_were_saved_are_not_loaded(tmp_path):
    folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN)
    changed(folder, lambda t: t["b_dec"].add_(1e-3))
    with pytest.raises(SaeError, match="not those that were saved"):
        saes.load(folder)
    (folder / "checksums.json").unlink()
    assert saes.load(folder).latents == 96


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -0.5])
def test_a_norm_factor_that_is_no_positive_number_is_refused(tmp_path, factor):
    folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN)
    rewrite(folder, normalize_activations="expected_average_only_in")
    with pytest.raises(SaeError, match="norm_factor = .*positive"):
        saes.load(folder, norm_factor=factor)


def test_a_hook_that_is_not_after_a_block_has_no_layer(tmp_path):
    for hook in ("blocks.0.hook_resid_pre", "blocks.\u0663.hook_resid_post", f"blocks.{'9' * 5000}.hook_resid_post"):
        assert saes.hook_layer(hook) is None
    assert saes.hook_layer("blocks.0.hook_resid_post") == 0 == saes.hook_layer("blocks.1.hook_resid_pre")
    folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN | {"hook_name": 5})
    with pytest.raises(SaeError, match="does not say which hook"):
        saes.load(folder, layer=1)


def changed(folder, change):
    """Change a folder's tensors in place."""
    tensors = load_file(folder / "sae_weights.safetensors")
    change(tensors)
    save_file(tensors, folder / "sae_weights.safetensors")


def rewrite(folder, **change):
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | change))


def test_what_sae_lens_warns_of_is_said_and_weights_come_in_float32(tmp_path, capsys):
    folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN)
    rewrite(
        folder,
        dtype="bfloat16",
        metadata=KNOWN
        | {"sae_lens_version": "6.54.12", "model_from_pretrained_kwargs": {"center_writing_weights": True}},
    )
    loaded = saes.load(folder)
    assert "sae_lens warns" in capsys.readouterr().out and loaded.sae.W_dec.dtype == torch.float32


@pytest.mark.parametrize("on_input", [True, False])
def test_where_b_dec_goes_is_respected_and_reported(tmp_path, capsys, on_input):
    folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN)
    rewrite(folder, apply_b_dec_to_input=on_input)
    saes._say.cache_clear()
    loaded = saes.load(folder)
    assert ("is subtracted" if on_input else "is not subtracted") in capsys.readouterr().out
    saes.load(folder)
    assert not capsys.readouterr().out  # the same line once
    x, sae = torch.randn(20, 48), loaded.sae
    ranked = (x - sae.b_dec * on_input) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(sae.encode(x).sum(), ranked.topk(8).values.relu().sum())


def test_a_missing_norm_factor_is_an_error_and_a_given_one_is_folded(tmp_path, capsys):
    w = some_weights()
    folder = saes.save(tmp_path / "sae", w, 8, KNOWN)
    rewrite(folder, normalize_activations="expected_average_only_in")
    with pytest.raises(SaeError, match="factor is missing"):
        saes.load(folder)
    loaded = saes.load(folder, norm_factor=0.25)
    assert "0.25" in loaded.normalisation and "0.25" in capsys.readouterr().out
    x, unit = torch.randn(30, 48), topk.unit_decoder(w)
    torch.testing.assert_close(loaded.sae.encode(4 * x), topk.encode(x, unit, 8).dense(96), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded.sae(4 * x), 4 * topk.decode(topk.encode(x, unit, 8), unit), rtol=1e-4, atol=1e-4)


def registry(monkeypatch, folder, factor):
    """sae_lens's registry with one release, served from a folder: its own from_pretrained runs, only the download is replaced."""
    from sae_lens.loading import pretrained_saes_directory as directory
    from sae_lens.saes import sae as module

    entry = directory.PretrainedSAELookup(
        "rel", "owner/repo", "m", None, {"id": "path"}, {"id": 1.0}, {"id": 1.0}, {"id": None}, {"id": factor} if factor else {}, None
    )  # fmt: skip
    for where in (directory, module):
        monkeypatch.setattr(where, "get_pretrained_saes_directory", lambda: {"rel": entry})

    def loader(repo_id, folder_name, device, force_download, cfg_overrides):
        cfg, state = module.sae_lens_disk_loader(folder, device, cfg_overrides)
        return cfg, state, None

    monkeypatch.setitem(module.NAMED_PRETRAINED_SAE_LOADERS, "sae_lens", loader)
    monkeypatch.setattr(module, "get_conversion_loader_name", lambda *_: "sae_lens")


def test_a_registry_sae_says_which_factor_was_folded_and_one_without_is_refused(tmp_path, monkeypatch):
    folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN)
    rewrite(folder, normalize_activations="expected_average_only_in")
    registry(monkeypatch, folder, 0.2138)
    loaded = saes.load("rel", "id", d_model=48, layer=1)
    assert "0.2138" in loaded.normalisation and "registry" in loaded.normalisation and loaded.name == "rel/id"
    registry(monkeypatch, folder, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is merely warned about
        with pytest.raises(SaeError, match="factor is missing"):
            saes.load("rel", "id")
    with pytest.raises(SaeError, match="rel/nowhere"):
        saes.load("rel", "nowhere")


def test_the_registry_entry_of_the_warning_example_is_what_the_pitfalls_say():
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor

    assert get_norm_scaling_factor("gemma-2b-res-jb", "blocks.12.hook_resid_post") == pytest.approx(0.2138, abs=1e-4)


# --- evaluation --------------------------------------------------------------------------------------------------------


def explained(x, x_hat):
    """The definition, in one line."""
    x, x_hat = x.double(), x_hat.double()
    return 1 - float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


class Known:
    """An SAE whose codes are the positive part of x's first two numbers and whose output is x_hat of the test above."""

    class cfg:
        d_in, d_sae = 2, 3

    device, W_dec = "cpu", torch.ones(3, 1)

    def encode(self, x):
        return torch.stack([x[:, 0].relu(), x[:, 1].relu(), torch.zeros(len(x))], 1)

    def decode(self, codes):
        return torch.where(codes[:, :1] > 0, torch.tensor([2.0, 1]), torch.tensor([0.0, 3]))


def test_evaluation_in_parts_is_the_definition():
    got = evaluation.evaluate(Known(), Array(torch.tensor([[2.0, 0], [0, 4]])), batch=1)
    assert got.explained_variance == pytest.approx(0.8) and got.l0 == 1 and got.dead == pytest.approx(1 / 3)
    assert got.frequency.tolist() == [0.5, 0.5, 0]
    w = some_weights()
    x = torch.randn(500, 48) + 1000  # where sums in float32 would fail
    codes = topk.encode(x, w, 8)
    expected = explained(x, topk.decode(codes, w))

    class Ours(Known):
        class cfg:
            d_in, d_sae = 48, 96

        W_dec = w.W_dec
        encode = staticmethod(lambda x: topk.encode(x, w, 8).dense(96))
        decode = staticmethod(lambda z: z @ w.W_dec + w.b_dec)

    assert evaluation.evaluate(Ours(), Array(x), batch=77).explained_variance == pytest.approx(expected, rel=1e-3)
    assert evaluation.evaluate(Ours(), Array(x), limit=100).error.shape == (100,)


def test_latents_are_ordered_by_what_they_contribute_and_the_dead_left_out():
    class Sae:
        cfg, device = SimpleNamespace(d_in=4, d_sae=4), "cpu"
        W_dec = torch.diag(torch.tensor([1.0, 1.0, 10.0, 1.0]))
        encode = staticmethod(torch.relu)
        decode = staticmethod(lambda z: z)

    found = evaluation.evaluate(
        Sae(), Array(torch.tensor([[1.0, 0, 0, 0], [1.0, 2.0, 0, 0], [1.0, 0, 0.5, 0]])), batch=2
    )
    torch.testing.assert_close(found.frequency, torch.tensor([1, 1 / 3, 1 / 3, 0], dtype=torch.float64))
    torch.testing.assert_close(found.energy, torch.tensor([1, 4 / 3, 25 / 3, 0], dtype=torch.float64))
    assert found.order.tolist() == [2, 1, 0]


def test_a_fit_is_kept_with_its_sae_and_its_samples(cache, monkeypatch):
    x = torch.randn(400, 10)
    one, other = evaluation.Principal(x, 3), evaluation.Principal(x, 4)
    found = evaluation.evaluate(one, Array(x))
    assert evaluation.fingerprint(one) != evaluation.fingerprint(other) and not evaluation.fingerprint(Copy())
    monkeypatch.setattr(evaluation, "_fit", lambda *_: pytest.fail("computed again"))
    assert torch.equal(evaluation.evaluate(evaluation.Principal(x, 3), Array(x)).error, found.error)
    for sae, rows, limit in ((other, x, 0), (one, x + 1, 0), (one, x, 100)):
        with pytest.raises(pytest.fail.Exception):
            evaluation.evaluate(sae, Array(rows), limit)


def test_principal_components_explain_their_eigenvalues():
    x = torch.randn(400, 10) @ torch.randn(10, 10) + 5
    values = torch.linalg.eigvalsh(torch.cov(x.double().T)).flip(0)
    got = evaluation.evaluate(evaluation.Principal(x, 3), Array(x))
    assert got.explained_variance == pytest.approx(float(values[:3].sum() / values.sum()), rel=1e-4) and got.l0 == 3


class Copy:
    """An SAE that loses nothing."""

    device = "cpu"
    encode = staticmethod(lambda x: x)
    decode = staticmethod(lambda x: x)


class Constant(Copy):
    """One that gives the same answer always."""

    def __init__(self, answer):
        self.decode = lambda x: answer.expand(len(x), -1)


def test_loss_recovered_is_one_for_a_copy_and_zero_for_the_mean():
    model = small()
    ids = torch.randint(100, 4000, (6, 20))
    kept = torch.rand(6, 20) > 0.2
    kept[:, 0] = False
    mean = torch.randn(48)
    copied, constant = evaluation.loss_recovered(model, [Copy(), Constant(mean)], 1, ids, kept, mean, batch=4)
    assert copied.recovered == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(copied.sae, copied.model)
    assert constant.recovered == pytest.approx(0, abs=1e-6)
    logits = model.weights(ids[:1]).logits[0, :-1].log_softmax(-1)
    where = kept[0, :-1] & kept[0, 1:]
    by_hand = -logits.gather(1, ids[0, 1:, None])[where].mean()
    assert float(copied.model[0]) == pytest.approx(float(by_hand), rel=1e-5)
    assert not any(len(b._forward_hooks) for b in model.blocks)


def test_what_is_not_kept_and_outliers_pass_through_the_splice():
    model = small()
    ids = torch.randint(100, 4000, (2, 20))
    kept = torch.zeros(2, 20, dtype=torch.bool)
    kept[:, 5:15] = True
    seen = []

    class Watch(Copy):
        def encode(self, x):
            seen.append(x)
            return x

    handle = model.blocks[1].register_forward_hook(lambda m, i, out: out.index_fill(1, torch.tensor([7]), 500.0))
    evaluation.loss_recovered(model, [Watch()], 1, ids, kept, torch.zeros(48), limit=500.0)
    handle.remove()
    assert len(seen[0]) == 2 * 9 and float(seen[0].norm(dim=1).max()) < 500
    kept[1, ::2] = False
    with pytest.raises(SaeError, match="row 1"):
        evaluation.loss_recovered(model, [Watch()], 1, ids, kept, torch.zeros(48))


# --- tables of latents -------------------------------------------------------------------------------------------------


def test_the_table_finds_a_latent_that_stands_for_one_word(source, cache):  # noqa: F811
    model = small()
    samples = harvest.run(model, source, [1], 1500, **HOW)
    ids, row = samples.token_rows()
    position = samples.named("position").long()
    token = model.tokenizer(" river")["input_ids"][0]
    is_river = ids[row.long(), position] == token
    assert 5 < int(is_river.sum()) < len(samples) // 4
    values = torch.where(is_river, torch.arange(1.0, len(samples) + 1), torch.zeros(len(samples)))
    lookup = {
        tuple(r): v for r, v in zip(samples.rows(torch.arange(len(samples))).tolist(), values.tolist(), strict=True)
    }

    class Planted:
        class cfg:
            d_in, d_sae = 48, 2

        device = "cpu"
        W_dec = torch.eye(48)[:2]
        encode = staticmethod(lambda x: torch.tensor([[lookup[tuple(r)], 0.0] for r in x.tolist()]))

    top = latents.top_tokens(Planted(), samples, n=4, batch=5)
    expected = sorted((float(values[row == r].max()) for r in row.unique()), reverse=True)[:4]
    assert top.values[0].tolist() == expected and top.values[1].tolist() == [0.0] * 4
    assert all(int(ids[r, p]) == token for r, p in zip(top.rows[0], top.positions[0], strict=True))
    assert len(set(top.rows[0].tolist())) == 4  # one context a token row
    assert float(top.frequency[0]) == pytest.approx(float(is_river.double().mean()))
    river, dead = latents.table(model, Planted(), samples, n=4)
    assert {c.token for c in river.contexts} == {" river"} and dead.contexts == []
    assert model.tokenizer.decode(ids[top.rows[0, 0]]).find(river.contexts[0].before) >= 0


def normed(kind):
    """A tiny model of a kind of final norm: with a gain, a gain of one more, centring, centring alone."""
    import transformers as hf

    size = dict(
        vocab_size=len(small_tokenizer()), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    torch.manual_seed(1)
    weights = hf.AutoModelForCausalLM.from_config(
        getattr(hf, f"{kind}Config")(**size, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )
    for parameter in weights.parameters():
        parameter.copy_(0.2 * torch.randn_like(parameter) if parameter.ndim > 1 else torch.rand_like(parameter) + 0.2)
    return LM.of(weights, small_tokenizer(), kind)


@pytest.mark.parametrize(
    "kind", ["Llama", "Gemma2", "GPTNeoX", "StableLm", "Cohere", "Olmo", "Nemotron", "Granite", "Phi"]
)
def test_the_logit_lens_is_the_linear_part_of_norm_and_unembedding(kind):
    """Against the model's own head: what its logits gain when the last block's output is a very long row, and lose when it is minus that."""
    model, directions = normed(kind), torch.randn(3, 64) + 0.7
    promotes, suppresses = latents.logit_lens(model, directions, n=5)
    head, linear, ids = model.unembedding, [], torch.tensor([[5]])
    for v in directions:
        sides = []
        for stream in (1e3 * v, -1e3 * v):
            with (
                hooks.resume_at(model, 1, stream[None, None]),
                scoring.unembedding(model, torch.tensor([[True]])) as kept,
            ):
                model.weights(ids, use_cache=False)
            sides.append(kept["hidden"][0] @ head.module.weight.T)
        linear.append(sides[0] - sides[1])
    linear = torch.stack(linear)
    assert promotes == [[model.tokenizer.decode([i]) for i in r] for r in linear.topk(5).indices.tolist()]
    assert suppresses == [[model.tokenizer.decode([i]) for i in r] for r in (-linear).topk(5).indices.tolist()]


def test_a_model_that_does_more_than_norm_is_refused():
    with pytest.raises(ValueError, match="its logit lens is not known"):
        latents.logit_lens(normed("ModernBertDecoder"), torch.randn(2, 64))


def test_a_table_is_kept_beside_the_sae_and_shown_on_a_page(tmp_path):
    rows = [
        latents.Latent(
            0,
            0.25,
            [latents.Context("a <b>\u2028\x85", " tok\n", "</script> <!-- <script end", 3.5)],
            [" yes"],
            [" no"],
        ),
        latents.Latent(1, 0.0, [], [" up"], [" down"]),
    ]
    latents.save(tmp_path, rows, "An SAE & its latents")
    assert latents.load(tmp_path) == rows
    html = (tmp_path / "latents.html").read_text()
    assert "An SAE &amp; its latents" in html and html.count("</script>") == 2 and "http" not in html
    data = re.search(r'type="application/json">(.*?)</script>', html, re.S)[1]
    assert "<" not in data and json.loads(data)[0][2] == [
        ["a <b>\u2028\x85", " tok\n", "</script> <!-- <script end", 3.5]
    ]
    with pytest.raises(FileNotFoundError, match="latents.table"):
        latents.load(tmp_path / "nowhere")


def test_a_table_is_made_once_and_again_when_its_making_changes(source, cache, tmp_path, monkeypatch):  # noqa: F811
    model = small()
    samples = harvest.run(model, source, [1], 800, **HOW)
    folder = saes.save(tmp_path / "sae", some_weights(), 8, KNOWN)
    sae = saes.load(folder).sae
    made, real = [], latents.table
    monkeypatch.setattr(latents, "table", lambda *a, **k: made.append(1) or real(*a, **k))
    first = latents.of(folder, model, sae, samples)
    assert latents.of(folder, model, sae, samples) == first and len(made) == 1 and (folder / "latents.html").exists()
    latents.of(folder, model, sae, samples, limit=4)
    assert len(made) == 2


def test_quantised_weights_and_a_threshold_below_zero_are_refused(tmp_path):
    w = topk.initial(6, 12, torch.zeros(6))
    about = {"model_name": "m", "hook_name": "blocks.1.hook_resid_post"}
    with pytest.raises(SaeError, match="threshold below zero"):
        saes.save(tmp_path / "b", w, 2, about, threshold=-0.5)
    folder = saes.save(tmp_path / "a", w, 2, about)
    state = load_file(folder / "sae_weights.safetensors")
    save_file(state | {"W_dec": (100 * state["W_dec"]).to(torch.int8)}, folder / "sae_weights.safetensors")
    with pytest.raises(SaeError, match="whole numbers in W_dec"):
        saes.load(folder)


def test_explained_variance_over_documents_and_seeds():
    rng, documents = np.random.default_rng(0), torch.arange(40).repeat_interleave(5)

    def fit(left):
        total = torch.from_numpy(rng.uniform(1, 2, 200))
        return evaluation.Evaluation(1.0, 0.0, torch.ones(3), torch.ones(3), left * total, total)

    one = fit(0.4)
    found = evaluation.explained([one], documents)
    assert found.value == pytest.approx(one.explained_variance) == pytest.approx(0.6)
    assert found.high - found.low < 1e-9  # each document alike
    poor = one._replace(error=0.7 * one.total)
    assert evaluation.explained([one], documents, less=poor).value == pytest.approx(0.3)
    seeds = [one._replace(error=x * one.total) for x in (0.3, 0.4, 0.5)]
    spread = evaluation.explained(seeds, documents)
    assert spread.value == pytest.approx(0.6) and spread.high - spread.low > 0.1  # the seeds differ
    noisy = one._replace(error=one.error + torch.from_numpy(rng.uniform(0, 0.3, 40)).repeat_interleave(5))
    wider = evaluation.explained([noisy], documents)
    assert wider.low < noisy.explained_variance < wider.high and wider.high - wider.low > 0.01


def test_the_largest_latents_are_by_size_with_their_sign_and_their_mark():
    rows = [
        latents.Latent(i, 0.1, [latents.Context("so far", " it", " fires", 1.0)] * (i > 0), [], []) for i in range(4)
    ]
    found = latents.largest(rows, torch.tensor([-1.0, 0.5, -3.0, 0.0]), 2, torch.tensor([True, False, False, False]))
    assert [(code, marked) for _, code, marked in found] == [(-3.0, False), (-1.0, True)]
    assert found[0][0] == "2   …so far« it» fires" and found[1][0].endswith("(never fired)")
