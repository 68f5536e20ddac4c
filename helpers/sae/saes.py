"""Sparse autoencoders by registry name or folder, through sae_lens; saved in its layout.

What a loader does silently is said aloud: where b_dec goes, which scale was folded into the weights, which hook and width the SAE
belongs to. Knows SAEs and models, not how activations were harvested.
"""

import json
import math
import re
import warnings
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers import session, store
from helpers.lm.hooks import resid_post
from helpers.sae import topk
from helpers.sae.topk import Dictionary, Weights


class SaeError(RuntimeError):
    """An SAE cannot be had, or does not fit what it is to be used on; the message says which and why."""


# --- save and load -----------------------------------------------------------------------------------------------------


def save(
    folder: Path, w: Weights, k: int, metadata: dict[str, Any], threshold: float | None = None, notes: object = None
) -> Path:
    """An SAE in SAELens's own layout, whole or not there; `sae_lens.SAE.load_from_disk` reads it.

    A BatchTopK SAE is given by its `threshold` and saved as a JumpReLU one, as SAELens does. `metadata`: model_name,
    hook_name, context_size and what else is known; `notes` (JSON) go beside it as training.json, and each file's sha256
    in checksums.json. An SAE that is already there is exchanged; a folder of anything else is refused.
    """
    topk.check_sizes(w.W_enc.shape[1], len(w.b_enc), k)
    if missing := {"model_name", "hook_name"} - set(metadata):
        raise SaeError(
            f"an SAE cannot be saved without {' and '.join(sorted(missing))} in its metadata: nobody could use it"
        )
    if folder.exists() and not (folder / "cfg.json").exists() and any(folder.iterdir()):
        raise SaeError(f"the folder {folder.name} holds something that is not an SAE: choose another")
    w = topk.unit_decoder(Weights(*(t.detach().float().cpu() for t in w)))
    if not all(bool(torch.isfinite(t).all()) for t in w) or not 0.0 <= (threshold or 0.0) < math.inf:
        raise SaeError("the SAE holds NaN or infinity, or a threshold below zero, and is not saved")
    state = {"W_enc": w.W_enc.T.contiguous(), "b_enc": w.b_enc, "W_dec": w.W_dec.contiguous(), "b_dec": w.b_dec}
    cfg: dict[str, Any] = {
        "architecture": "topk",
        "d_in": w.W_enc.shape[1],
        "d_sae": len(w.b_enc),
        "k": k,
        "rescale_acts_by_decoder_norm": False,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": version("sae_lens"), **metadata},
    }
    if threshold is not None:
        cfg["architecture"], state["threshold"] = "jumprelu", torch.full_like(w.b_enc, threshold)
        cfg["metadata"]["average_k"] = cfg.pop("k")
        del cfg["rescale_acts_by_decoder_norm"]
    with store.writing(folder, replace=True) as temporary:
        save_file({name: t.clone() for name, t in state.items()}, temporary / "sae_weights.safetensors")
        (temporary / "cfg.json").write_text(json.dumps(cfg, indent=1))
        if notes is not None:
            (temporary / "training.json").write_text(json.dumps(notes, indent=1))
        sums = {path.name: store.file_digest(path) for path in sorted(temporary.iterdir())}
        (temporary / "checksums.json").write_text(json.dumps(sums, indent=1))
    return folder


def _checksums(folder: Path) -> dict[str, str]:
    """The sha256 of each file that `save` wrote into a folder, by name; empty if it was saved by something else."""
    path = folder / "checksums.json"
    sums = store.read_json(path) if path.is_file() else None
    return sums if isinstance(sums, dict) else {}


def _as_saved(path: Path, sha256: str | None) -> bool:
    return path.is_file() and store.file_digest(path) == sha256


def whole(folder: Path) -> bool:
    """Whether a folder holds an SAE as `save` wrote it: every file there, and none changed since by a bit."""
    sums = _checksums(folder)
    names = {"sae_weights.safetensors", "cfg.json", *sums}
    return all(_as_saved(folder / name, sums.get(name)) for name in names)


class Saved(Dictionary, Protocol):
    """An SAE as sae_lens loads one: with all its settings and weights by name."""

    cfg: Any

    def state_dict(self) -> dict[str, Tensor]: ...


class Loaded(NamedTuple):
    """An SAE as sae_lens holds it, and what is to be known of it before it is used."""

    sae: Dictionary
    name: str
    architecture: str
    d_model: int
    latents: int
    k: int | None
    hook: str | None
    model: str | None
    context: int | None
    b_dec_on_input: bool
    normalisation: str

    def __str__(self) -> str:
        k = f", k = {self.k}" if self.k else ""
        return (
            f"{self.name}: {self.architecture}, {self.d_model} -> {self.latents} latents{k}, {self.hook} of {self.model}, "
            f"b_dec {'is' if self.b_dec_on_input else 'is not'} subtracted from the input, normalisation: {self.normalisation}"
        )


def load(
    release: str | Path, sae_id: str = "", device: str = "cpu", d_model: int = 0, layer: int | None = None,
    norm_factor: float = 0.0,
) -> Loaded:  # fmt: skip
    """An SAE of sae_lens's registry (`release`, `sae_id`) or of a folder in its layout, float32, with what to know of it.

    `d_model` and `layer`, where given, must be its own. What sae_lens warns about is printed. A transcoder, or an SAE whose
    inputs must be whitened, is refused. An SAE that wants its inputs scaled and whose scale is not known is
    refused (sae_lens only warns, and every code is then wrong); `norm_factor` supplies it: mean norm of the scaled
    inputs over that of the raw ones. An SAE that holds NaN, or whose files contradict each other, is refused, and so is
    one that `save` wrote and whose weights have changed since. SaeError says what is wrong.
    """
    from sae_lens import SAE

    if norm_factor and not 0 < norm_factor < math.inf:
        raise SaeError(f"norm_factor = {norm_factor} was given; it must be a positive number, or 0 for none")
    folder = session.path(release)
    name = f"{release}/{sae_id}" if sae_id else folder.name
    normalisation = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            if sae_id:
                sae, cfg, _ = SAE.from_pretrained_with_cfg_and_sparsity(
                    str(release), sae_id, device=device, dtype="float32"
                )
                normalisation = _folded(str(release), sae_id, sae, cfg)
            elif not (folder / "cfg.json").exists():
                raise SaeError(
                    f"no SAE in {folder.name!r}: give a folder that holds cfg.json and sae_weights.safetensors, or a release and "
                    "an id of sae_lens's registry"
                )
            else:
                _check_files(folder, name)
                sae = SAE.load_from_disk(folder, device=device, dtype="float32")
        except SaeError:
            raise
        except Exception as error:
            raise SaeError(f"{name} cannot be loaded: {_reason(error)}") from None
    _check_sound(sae, name)
    normalisation = normalisation or sae.cfg.normalize_activations
    if sae.cfg.normalize_activations == "expected_average_only_in":
        if not norm_factor:
            said_so = next(
                (f" (sae_lens: {str(w.message)[:100]})" for w in said if "norm_scaling" in str(w.message)), ""
            )
            raise SaeError(
                f"{name} was trained on inputs scaled to an average norm, and the factor is missing{said_so}: without it every "
                "code is wrong. Give norm_factor (sqrt(d_model) over the mean norm of the inputs it was trained on)"
            )
        sae.fold_activation_norm_scaling_factor(norm_factor)
        normalisation = f"expected average, factor {norm_factor:g} given and folded"
    elif norm_factor:
        raise SaeError(
            f"norm_factor = {norm_factor:g} was given, but {name} wants none (normalisation: {normalisation}): leave it out"
        )
    if (
        sae.cfg.normalize_activations == "covariance_whitening"
        or getattr(sae.cfg, "d_out", sae.cfg.d_in) != sae.cfg.d_in
    ):
        raise SaeError(
            f"{name} whitens its inputs when trained and its folding is missing, or writes to another width: not used here"
        )
    if "transcoder" in sae.cfg.architecture():
        raise SaeError(
            f"{name} is a transcoder: it predicts another place in the model and does not reconstruct its input"
        )
    for warning in said:
        if issubclass(warning.category, UserWarning):
            print(f"sae_lens warns of {name}: {' '.join(str(warning.message).split())[:300]}")
    meta = sae.cfg.metadata
    out = Loaded(
        sae.eval(), name, sae.cfg.architecture(), sae.cfg.d_in, sae.cfg.d_sae, getattr(sae.cfg, "k", None), meta.hook_name,
        meta.model_name, meta.context_size, bool(sae.cfg.apply_b_dec_to_input), normalisation,
    )  # fmt: skip
    check(out, d_model, layer)
    if not sae_id:
        _check_saved(folder, name)
    for parameter in sae.parameters():
        parameter.requires_grad_(False)
    _say(str(out))
    return out


@lru_cache
def _say(line: str) -> None:
    """Print a line, the same one once."""
    print(line)


def _reason(error: Exception) -> str:
    """What sae_lens found wrong, on one line."""
    said = " ".join(session.redact(str(error)).split())[:300]
    if isinstance(error, KeyError):
        return f"{said} is missing from its cfg.json or not known to sae_lens"
    if "state_dict" in said:
        return f"its weights are not those of its architecture ({said}): copy or train it again"
    return said


def _check_saved(folder: Path, name: str) -> None:
    """SaeError if the weights of a folder that `save` wrote have changed since."""
    weights = "sae_weights.safetensors"
    saved = _checksums(folder).get(weights)
    if saved and not _as_saved(folder / weights, saved):
        raise SaeError(
            f"{name} cannot be loaded: its weights are not those that were saved: copy or train it again, or, if they "
            "were changed on purpose, remove checksums.json"
        )


def _check_shape(reshape: object, name: str) -> None:
    if reshape not in ("none", None):
        raise SaeError(
            f"{name} reshapes its inputs ({reshape}): it was trained on attention heads, not on a residual stream"
        )


def _check_files(folder: Path, name: str) -> None:
    """SaeError unless cfg.json of a folder is complete and has the sizes of the weights beside it."""
    try:
        cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise SaeError(f"{name}: cfg.json cannot be read as JSON, it may be cut short: copy the SAE again") from None
    if not isinstance(cfg, dict) or not isinstance(cfg.get("metadata", {}), dict):
        raise SaeError(f"{name}: cfg.json, and metadata in it, must be JSON objects: copy the SAE again")
    _check_shape(cfg.get("reshape_activations", "none"), name)
    for size in ("d_in", "d_sae"):
        if type(cfg.get(size)) is not int or cfg[size] < 1:
            raise SaeError(f"{name}: cfg.json says {size} = {cfg.get(size)!r}; a whole number of at least 1 is wanted")
    if type(cfg.get("architecture", "standard")) is not str:
        raise SaeError(f"{name}: cfg.json says architecture = {cfg['architecture']!r}; a name is wanted, such as topk")
    kinds = {str(cfg.get(key)) for key in ("architecture", "activation_fn", "activation_fn_str")}
    if kinds & {"topk", "abstopk"} and "k" not in {**(cfg.get("activation_fn_kwargs") or {}), **cfg}:
        raise SaeError(
            f"{name}: cfg.json does not say k, and sae_lens would take 100: write the number of codes a token"
        )
    try:
        with safe_open(folder / "sae_weights.safetensors", "pt") as weights:
            slices = {key: weights.get_slice(key) for key in weights.keys()}  # noqa: SIM118
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            whole_numbers = [key for key, part in slices.items() if "F" not in part.get_dtype()]
    except (OSError, SafetensorError) as error:
        reason = str(error).replace(str(folder), folder.name)
        raise SaeError(f"{name} cannot be loaded: sae_weights.safetensors is damaged or not there ({reason})") from None
    if whole_numbers:
        raise SaeError(
            f"{name} holds whole numbers in {whole_numbers[0]}: it is quantised, and its scale is not known here"
        )
    wanted = (cfg["d_sae"], cfg.get("d_out") or cfg["d_in"])
    if shapes.get("W_dec", wanted) != wanted:
        raise SaeError(
            f"{name}: cfg.json says d_sae = {cfg['d_sae']} and d_in = {cfg['d_in']}, but W_dec is {shapes['W_dec']}: "
            "they are of two SAEs"
        )


def _check_sound(sae: Saved, name: str) -> None:
    """SaeError if what sae_lens holds cannot encode rows of the residual stream: its settings, then its weights."""
    cfg = sae.cfg
    _check_shape(cfg.reshape_activations, name)
    k = getattr(cfg, "k", 1)
    if type(k) is not int or not 1 <= k <= cfg.d_sae:
        raise SaeError(f"{name} says k = {k!r}; a whole number from 1 to its {cfg.d_sae} latents is wanted")
    for setting in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if type(getattr(cfg, setting, True)) is not bool:
            raise SaeError(f"{name} says {setting} = {getattr(cfg, setting)!r}; true or false is wanted")
    if bad := [key for key, t in sae.state_dict().items() if not bool(torch.isfinite(t).all())]:
        raise SaeError(f"{name} holds NaN or infinity in {', '.join(bad)}: train it again, or download it again")
    if getattr(cfg, "rescale_acts_by_decoder_norm", False) and not bool(sae.W_dec.any(1).all()):
        raise SaeError(
            f"{name} divides by the lengths of its decoder rows, and some are zero: every output would be NaN"
        )


def _folded(release: str, sae_id: str, sae: Saved, cfg: dict[str, Any]) -> str | None:
    """What sae_lens folded into a registry SAE on the way, in words; None if nothing."""
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor

    factor = get_norm_scaling_factor(release, sae_id)
    if factor is not None and sae.cfg.normalize_activations == "none" and cfg.get("normalize_activations") == "none":
        return f"expected average, factor {factor:g} of the registry folded"
    return None


def check(loaded: Loaded, d_model: int = 0, layer: int | None = None) -> None:
    """SaeError if an SAE is for another width, or for another hook than the residual stream after `layer`."""
    if d_model and loaded.d_model != d_model:
        raise SaeError(
            f"{loaded.name} is for activations of width {loaded.d_model}, but these have {d_model}: another model's SAE"
        )
    if layer is None:
        return
    if not loaded.hook or not isinstance(loaded.hook, str):
        raise SaeError(f"{loaded.name} does not say which hook it belongs to: leave layer out if you know that it fits")
    if hook_layer(loaded.hook) != layer:
        raise SaeError(f"{loaded.name} belongs to {loaded.hook}, but {resid_post(layer)} was asked for")


def hook_layer(hook: str) -> int | None:
    """The layer L whose residual stream after block L a hook name means (`hook_resid_pre` of L + 1 is the same); else None."""
    found = re.fullmatch(r"blocks\.([0-9]{1,6})\.hook_resid_(post|pre)", hook)
    layer = int(found[1]) - (found[2] == "pre") if found else -1
    return layer if layer >= 0 else None  # before block 0 there is none
