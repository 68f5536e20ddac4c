"""The hub profiles run every notebook unchanged, on tiny stand-ins: no network, no GPU.

A stand-in is a random model of the same architecture and depth and a random SAE with as many latents, in the hub's own cache
layout and in the files that sae_lens's own loaders read. Replaced are the hub (a folder, offline), as an override in the
registry's entry the width d_in, and the notebook's display; the run is at the fast setting, in float32 on one CPU thread. The
numbers mean nothing; that every cell runs, every claim gets a verdict and every published value meets ours does.
"""

import copy
import json
import math
import warnings
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest
import torch
from conftest import small_tokenizer
from huggingface_hub import constants
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading import pretrained_saes_directory as registry
from safetensors.torch import load_file, save_file

from helpers import claims, figures, report, session
from helpers.lm import text
from helpers.profiles import Profile
from helpers.session import ROOT
from helpers.steering import concepts

WIDTH, COMMIT = 32, "0123456789" * 4
PROFILES = ("gemma-2-2b", "llama-3.1-8b")
ZERO = (4888, 15603, 7589, 15471, 2350)
KNOWN = {  # the latents a profile names, and the claims in which notebook 03 puts published values beside ours
    "gemma-2-2b": ([*ZERO, 14004, 3517], {*(f"03.zero.{i}" for i in ZERO), "03.rows", "03.negative"}),
    "llama-3.1-8b": ([58644], {"03.concept.last", "03.concept.all"}),
}
PAIRS = {"gemma-2b": 18, "gemma-3-1b": 26}  # profiles of two models, and their depth
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def listed(name):
    """The notebooks that a profile runs."""
    return report.fitting(NOTEBOOKS, session.load_profile(name))


def snapshot(hub: Path, name: str) -> Path:
    """The folder of a repository's one snapshot in the hub's cache."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    return repository / "snapshots" / COMMIT


def write_model(folder: Path, profile: str, layer: int) -> float:
    """A random model as deep as the profile's, with a small tokenizer; Gemma, a base model, has no chat template.

    Returns the root mean square of its residual stream after block `layer`.
    """
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

    tokenizer = copy.deepcopy(small_tokenizer())
    shared = dict(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=4,
        num_key_value_heads=2, head_dim=WIDTH // 4, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    if profile == "gemma-2-2b":
        tokenizer.chat_template = None
        config = Gemma2Config(**shared, num_hidden_layers=26, query_pre_attn_scalar=WIDTH // 4)
        assert config.final_logit_softcapping and config.attn_logit_softcapping
    else:
        scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                       original_max_position_embeddings=8192, rope_theta=500_000.0)  # fmt: skip
        config = LlamaConfig(**shared, num_hidden_layers=32, max_position_embeddings=131_072, rope_parameters=scaling)
    torch.manual_seed(1)
    weights = AutoModelForCausalLM.from_config(config)
    for parameter in weights.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stream = weights.eval()(torch.randint(len(tokenizer), (8, 32)), output_hidden_states=True).hidden_states[layer + 1]
    return float(stream.detach().square().mean(-1).sqrt().median())


def write_chat(folder: Path, base: Path) -> None:
    """A chat model for a base: its weights a little changed, and a chat template."""
    from transformers import AutoModelForCausalLM

    weights = AutoModelForCausalLM.from_pretrained(base)
    for parameter in weights.parameters():
        parameter.data.mul_(1 + 0.02 * torch.randn_like(parameter))
    weights.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)


def write_sae(folder: Path, path: str, latents: int, scale: float, named: list[int]) -> None:
    """A random SAE in Gemma Scope's file format or in Goodfire's.

    As many latents as the real one has, because profiles name some by number; in so narrow a stream most would be alike, so only
    32, nearly orthogonal, are alive, those `named` among them, and the others' rows are zero. Codes are of the size of `scale`,
    the stream's root mean square; four latents fire on the zero vector too.
    """
    random = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=random)).Q
    W_dec = torch.zeros(latents, WIDTH)
    alive = list(dict.fromkeys([*named, *range(0, latents, latents // WIDTH)]))[:WIDTH]
    W_dec[alive] = torch.nn.functional.normalize(basis + 0.05 * torch.randn(WIDTH, WIDTH, generator=random))
    b_enc, b_dec = torch.full((latents,), -100 * scale), 0.1 * scale * torch.randn(WIDTH, generator=random)
    b_enc[alive] = -1.5 * scale
    b_enc[alive[:4]] = scale
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    if path.endswith(".pth"):
        weights = {"encoder_linear.weight": W_dec, "encoder_linear.bias": b_enc}
        torch.save(weights | {"decoder_linear.weight": W_dec.T, "decoder_linear.bias": b_dec}, folder / path)
        return
    (folder / path).mkdir()
    arrays = dict(W_enc=W_dec.T, W_dec=W_dec, b_enc=b_enc, b_dec=b_dec, threshold=torch.full((latents,), 0.1 * scale))
    np.savez(folder / path / "params.npz", **{name: t.numpy() for name, t in arrays.items()})


@pytest.fixture(scope="module", params=PROFILES)
def profile(request, packaged, tmp_path_factory):
    """A profile's name, with stand-ins for its model and its SAE in the hub's cache, and a cache of our own beside it."""
    settings, folder = session.load_profile(request.param), tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHE_DIR", str(packaged))
        real = [text.fetch(name) for name in ("text", "pairs")]
        base = snapshot(folder / "hub", settings.chat)
        scale = write_model(base, request.param, settings.layer)
        if settings.pair:
            assert settings.pair.base == settings.chat
            write_chat(snapshot(folder / "hub", settings.pair.chat), base)
        repository, path = registry.get_repo_id_and_folder_name(settings.sae.release, settings.sae.id)
        latents = {"gemma-2-2b": 16_384, "llama-3.1-8b": 65_536}[request.param]
        write_sae(snapshot(folder / "hub", repository), path, latents, scale, KNOWN[request.param][0])
        entry = registry.get_pretrained_saes_directory()[settings.sae.release]
        patch.setattr(entry, "config_overrides", {"d_in": WIDTH})
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        (folder / "cache" / "assets").mkdir(parents=True)
        for asset in real:
            (folder / "cache" / "assets" / asset.name).symlink_to(asset.resolve())
        patch.setenv("CACHE_DIR", str(folder / "cache"))
        patch.setenv("DEVICE", "cpu")
        patch.setenv("DTYPE", "float32")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # matrices this small gain nothing by more, and lose much on a busy machine
        yield request.param
        torch.set_num_threads(threads)


def run(notebook: Path, **parameters) -> None:
    """Every code cell in one namespace, `parameters` laid over those of the notebook."""
    space = {"__name__": "__main__"}
    for i, cell in enumerate(nbformat.read(notebook, 4).cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{notebook.stem}, cell {i}", "exec"), space)
        if "parameters" in cell.metadata.get("tags", []):
            assert set(parameters) <= set(space)
            space |= parameters


@pytest.mark.notebooks
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_unchanged_on_a_hub_profile(profile, notebook, tmp_path, monkeypatch):
    if notebook not in listed(profile):
        pytest.skip("not listed by this profile")
    monkeypatch.setenv("REPORT_DIR", str(tmp_path))
    monkeypatch.setattr(figures, "display", lambda *_, **__: None)
    matplotlib.use("Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a division by zero, a mean of nothing
        run(notebook, profile=profile, fast=True)
    matplotlib.pyplot.close("all")
    result = json.loads((tmp_path / "results" / f"{notebook.stem}.json").read_text())
    assert result["profile"] == f"{profile}-fast" and result["claims"]
    for claim in result["claims"]:
        assert claim["verdict"] in claims.VERDICTS
        found = [claim[x] for x in ("value", "low", "high", "null_value")]
        assert all(x is None for x in found) if claim["value"] is None else all(map(math.isfinite, found))
        assert claim["value"] is not None or claim["verdict"] == "not run" and claim["reason"]
    if notebook.stem.startswith("03"):
        beside = {c["id"]: c for c in result["claims"] if not isinstance(c["published"], str)}
        assert set(beside) == KNOWN[profile][1]
        assert all("gap" in claims.published(c) for c in beside.values())
        assert all(c["verdict"] == "not run" for i, c in beside.items() if i in ("03.negative", "03.concept.last"))
        assert len({c["value"] for c in beside.values()}) > 1  # of latents that are alive
    if notebook.stem.startswith("06"):
        assert result["layer"] == session.load_profile(profile).pair.diff.layer != 14
        assert {c["id"] for c in result["claims"]} == {f"06.{i}" for i in (1, 2, 3, 8, 15)}
    if notebook.stem.startswith("07"):
        assert result["layer"] == session.load_profile(profile).pair.diff.layer != 14
        by_id = {c["id"]: c for c in result["claims"]}
        assert {by_id[f"07.{i}"]["verdict"] for i in (3, 4, 5, 6)} == {"not run"}  # there is no bank
        assert (
            len(json.loads((tmp_path / "figures" / "07_rule.json").read_text())["series"]) == 4
        )  # the ruler needs none


# --- two models --------------------------------------------------------------------------------------------------------


def write_pair(hub: Path, name: str, settings: Profile) -> float:
    """A random base model of the profile's architecture and depth, and a chat model that differs from it a little; returns the root
    mean square of the base's residual stream."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, GemmaConfig

    tokenizer = copy.deepcopy(small_tokenizer())
    shared = dict(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=4,
        num_key_value_heads=1, head_dim=WIDTH // 4, pad_token_id=tokenizer.pad_token_id, num_hidden_layers=PAIRS[name],
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = (
        GemmaConfig(**shared) if name == "gemma-2b" else Gemma3TextConfig(**shared, query_pre_attn_scalar=WIDTH // 4)
    )
    torch.manual_seed(1)
    weights = AutoModelForCausalLM.from_config(config)
    for parameter in weights.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    for side in ("base", "chat"):
        folder = snapshot(hub, getattr(settings.pair, side))
        weights.save_pretrained(folder)
        tokenizer.chat_template = None if side == "base" else small_tokenizer().chat_template
        tokenizer.save_pretrained(folder)
        if side == "base":
            ids = torch.randint(len(tokenizer), (8, 32))
            stream = weights.eval()(ids, output_hidden_states=True).hidden_states[settings.layer + 1]
        for parameter in weights.parameters():
            parameter.data.mul_(1 + 0.02 * torch.randn_like(parameter))
    return float(stream.detach().square().mean(-1).sqrt().median())


def write_pair_sae(folder: Path, path: str, scale: float, seed: int, layer: int, gemma_3: bool) -> None:
    """A random SAE of 96 latents, three orthonormal sets of rows, in SAELens's own format or in Gemma Scope 2's."""
    random = torch.Generator().manual_seed(seed)
    W_dec = torch.cat([torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=random)).Q for _ in range(3)])
    tensors = {
        "W_enc": W_dec.T.contiguous(),
        "W_dec": W_dec,
        "b_enc": torch.full((96,), -0.5 * scale),
        "b_dec": torch.zeros(WIDTH),
    }
    (folder / path).mkdir(parents=True)
    if gemma_3:
        tensors = {k.lower(): v for k, v in tensors.items()} | {"threshold": torch.full((96,), 0.2 * scale)}
        save_file(tensors, folder / path / "params.safetensors")
        (folder / path / "config.json").write_text(
            json.dumps({"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt"})
        )
        return
    save_file(tensors, folder / path / "sae_weights.safetensors")
    cfg = {"architecture": "standard", "d_in": WIDTH, "d_sae": 96, "dtype": "torch.float32", "device": "cpu", "model_name": "gemma-2b",
           "hook_point": f"blocks.{layer}.hook_resid_post", "hook_point_layer": layer, "normalize_activations": "none",
           "apply_b_dec_to_input": True, "context_size": 128, "prepend_bos": True, "activation_fn_str": "relu"}  # fmt: skip
    (folder / path / "cfg.json").write_text(json.dumps(cfg))


def offline(monkeypatch, tmp_path, hub, folders, assets):
    """A run finds its models and SAEs (repository: folder) in `hub`, the packaged assets in a cache of its own, and asks nobody."""

    def shapes(repo_id, filename, **_):
        return {k: list(v.shape) for k, v in load_file(folders[repo_id] / filename).items()}

    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)  # it asks the hub for a range of bytes
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "cache" / "assets").mkdir(parents=True)
    for asset in assets:
        (tmp_path / "cache" / "assets" / asset.name).symlink_to(asset.resolve())
    for key, value in (
        ("CACHE_DIR", str(tmp_path / "cache")),
        ("DEVICE", "cpu"),
        ("DTYPE", "float32"),
        ("REPORT_DIR", str(tmp_path / "out")),
    ):
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(figures, "display", lambda *_, **__: None)
    matplotlib.use("Agg")


@pytest.mark.notebooks
@pytest.mark.parametrize("name", PAIRS)
def test_notebook_05_runs_unchanged_on_a_profile_of_two_models(name, packaged, tmp_path, monkeypatch):
    settings, hub = session.load_profile(name), tmp_path / "hub"
    assert [path.stem[:2] for path in listed(name)] == ["05"]
    monkeypatch.setenv("CACHE_DIR", str(packaged))
    real = text.fetch("text")
    scale = write_pair(hub, name, settings)
    wanted = {(x.release, x.id) for x in (settings.pair.sae.base, settings.pair.sae.chat, settings.pair.sae.second)}
    repositories = {}
    for seed, (release, sae_id) in enumerate(sorted(wanted)):
        repository, path = registry.get_repo_id_and_folder_name(release, sae_id)
        folder = repositories.get(repository) or repositories.setdefault(repository, snapshot(hub, repository))
        write_pair_sae(folder, path, scale, seed, settings.layer, name == "gemma-3-1b")
        if name == "gemma-2b":
            monkeypatch.setattr(registry.get_pretrained_saes_directory()[release], "config_overrides", {"d_in": WIDTH})

    offline(monkeypatch, tmp_path, hub, repositories, [real])
    notebook = listed(name)[0]
    run(notebook, profile=name, fast=True)
    matplotlib.pyplot.close("all")
    result = json.loads((tmp_path / "out" / "results" / f"{notebook.stem}.json").read_text())
    by_id = {c["id"]: c for c in result["claims"]}
    assert {f"05.{i}" for i in range(1, 22)} == set(by_id)
    missing = (1, 16, 17, 18, 19, 20, 21)  # nobody says what was trained, or how an SAE is; no unrelated fine-tune
    assert {by_id[f"05.{i}"]["verdict"] for i in missing} == {"not run"}
    assert all(c["verdict"] in claims.VERDICTS for c in by_id.values())
    passed = result["numbers"]["gate"] == "passed"
    asked = [f"05.{i}" for i in range(3, 14) if i not in (6, 7, 8)]  # 05.6 wants a ceiling above the floor
    assert [i for i in asked if by_id[i]["verdict"] == "not run"] == ([] if passed else asked)
    assert by_id["05.8"]["verdict"] == "not run" or (passed and name != "gemma-2b")  # which has no second seed
    assert by_id["05.7"]["verdict"] == "not run"  # nothing says that registry SAEs share a seed


# --- an SAE at every layer -----------------------------------------------------------------------------------------------


def with_words():
    """The small tokenizer, for which every word of data/concepts is one token after a space."""
    tokenizer = copy.deepcopy(small_tokenizer())
    branches = [b for tree in concepts.load() for b in tree.branches]
    tokenizer.add_tokens([f" {w}" for b in branches for w in (*b.words, *b.held_out)])
    return tokenizer


@pytest.mark.notebooks
@pytest.mark.parametrize("at", [0, 1], ids=["08", "09"])
def test_a_notebook_runs_unchanged_on_a_profile_of_saes_at_every_layer(at, packaged, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    settings, hub = session.load_profile("gemma-3-270m"), tmp_path / "hub"
    assert [path.stem[:2] for path in listed("gemma-3-270m")] == ["08", "09"]
    monkeypatch.setenv("CACHE_DIR", str(packaged))
    real = [text.fetch(name) for name in ("text", "pairs")]
    tokenizer = with_words()
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=4,
        num_key_value_heads=1, head_dim=WIDTH // 4, query_pre_attn_scalar=WIDTH // 4, num_hidden_layers=18,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(1)
    weights = AutoModelForCausalLM.from_config(config)
    for parameter in weights.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model = snapshot(hub, settings.chat)
    weights.save_pretrained(model), tokenizer.save_pretrained(model)
    streams = weights.eval()(torch.randint(len(tokenizer), (8, 32)), output_hidden_states=True).hidden_states
    release, folders = settings.sae.release, {}
    for layer, sae_id in {settings.layer: settings.sae.id, **settings.sae.ids_above}.items():
        repository, path = registry.get_repo_id_and_folder_name(release, sae_id)
        folder = folders.get(repository) or folders.setdefault(repository, snapshot(hub, repository))
        scale = float(streams[layer + 1].square().mean(-1).sqrt().median())
        write_pair_sae(folder, path, scale, layer, layer, True)

    offline(monkeypatch, tmp_path, hub, folders, real)
    notebook = listed("gemma-3-270m")[at]
    run(notebook, profile="gemma-3-270m", fast=True)
    matplotlib.pyplot.close("all")
    result = json.loads((tmp_path / "out" / "results" / f"{notebook.stem}.json").read_text())
    by_id = {c["id"]: c for c in result["claims"]}
    assert all(c["verdict"] in claims.VERDICTS for c in by_id.values())
    judged = {"holds", "fails", "undecided", "algebra"}
    if notebook.stem[:2] == "08":
        assert by_id["08.9"]["verdict"] == "not run"  # a registry has no SAE of random rows
        assert {by_id[f"08.{i}"]["verdict"] for i in (1, 2, 3)} <= judged
    else:
        assert {by_id[f"09.{i}"]["verdict"] for i in (4, 5, 13, 14)} == {"not run"}  # nor SAEs of other seeds or widths
        assert {by_id[f"09.{i}"]["verdict"] for i in (1, 2, 3, 12)} <= judged
        assert (tmp_path / "out" / "features.html").exists()
