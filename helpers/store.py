"""Entries on disk that are either whole or not there: cached tensors, models, results.

An entry lies in `<cache>/<kind>/<fingerprint>/` with `sidecar.json` beside its files. The fingerprint hashes the parameters
that matter, so a changed parameter makes a new entry and never a stale hit. Everything is written under a temporary
name and renamed.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.session import ROOT, cache_dir


class DataError(ValueError):
    """Bad input data; the message names file, line and field, or the text, and what is wanted."""


LIBRARIES = ("torch", "transformers", "transformer_lens", "scikit-learn", "numpy")


def digest(value: Any) -> str:
    """A sha256 (hex) of a tensor's bits, bytes, a string, or anything JSON can say (keys sorted)."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        head = f"{value.dtype}{tuple(value.shape)}".encode()
        return hashlib.sha256(head + value.view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, str):
        value = value.encode()
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
    return hashlib.sha256(value).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 (hex) of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# Read when the process starts: what runs is this source, even if a file is edited meanwhile.
_ROOM = ROOT / "helpers"
_SOURCE = {".".join(p.relative_to(_ROOM).with_suffix("").parts): file_digest(p) for p in _ROOM.rglob("*.py")}


def versions() -> dict[str, str]:
    """Installed versions of the libraries that numbers depend on."""
    return {name: metadata.version(name) for name in LIBRARIES}


def code_digest(*modules: str) -> str:
    """A hash of the named helpers' source, so that an edited computation does not meet its old results."""
    return digest([_SOURCE[m] for m in sorted(modules)])[:16]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sweep(folder: Path) -> None:
    """Remove temporaries in `folder` of processes that are gone."""
    for old in folder.glob(".tmp-*"):
        pid = old.name.split("-")[1]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`."""
    return shutil.disk_usage(folder).free


@contextmanager
def full_disk_said(folder: Path) -> Iterator[None]:
    """Context: a full disk raises OSError that says how much is free and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        free = free_bytes(folder) / 1e9
        raise OSError(
            errno.ENOSPC,
            f"the disk is full ({free:.1f} GB free): make room or set CACHE_DIR in .env to another disk; what was whole is kept",
        ) from error


@contextmanager
def writing(path: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error, and vanishes otherwise.

    If `path` exists by then it stays, or, with `replace`, is exchanged. A full disk raises OSError that says how much is free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    temporary = path.parent / f".tmp-{os.getpid()}-{time.monotonic_ns()}"
    temporary.mkdir()
    try:
        with full_disk_said(path.parent):
            yield temporary
            if replace and path.exists():
                path.rename(temporary.with_name(f"{temporary.name}-old"))
            try:
                temporary.rename(path)
            except OSError:
                if not path.exists():
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(temporary.with_name(f"{temporary.name}-old"), ignore_errors=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file of ours, or None if it is not there or was cut short."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def write_file(path: Path, data: str | bytes) -> Path:
    """Write a whole file or nothing: under a temporary name, then renamed over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{os.getpid()}-{path.name}"
    try:
        with full_disk_said(path.parent):
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def cached(
    kind: str, parameters: dict[str, Any], compute: Callable[[], dict[str, Tensor]], code: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The tensors `compute` returns, kept under the fingerprint of `parameters` and of the source of helpers `code`.

    An entry whose tensor file does not match the checksum in its sidecar is named, removed and made again.
    """
    parameters = {**parameters, "code": code_digest(*code), "libraries": versions()}
    path = cache_dir() / kind / digest(parameters)[:24]
    sidecar = path / "sidecar.json"
    if sidecar.exists():
        tensors = path / "tensors.safetensors"
        if tensors.exists() and file_digest(tensors) == json.loads(sidecar.read_text())["sha256"]:
            return load_file(tensors)
        print(f"cache entry {kind}/{path.name} is damaged; it is made again")
    if path.exists():
        shutil.rmtree(path)
    began = time.perf_counter()
    result = {key: value.contiguous() for key, value in compute().items()}
    with writing(path) as temporary:
        save_file(result, temporary / "tensors.safetensors")
        note = {
            "parameters": parameters,
            "sha256": file_digest(temporary / "tensors.safetensors"),
            "seconds": round(time.perf_counter() - began, 2),
        }
        (temporary / "sidecar.json").write_text(json.dumps(note, indent=1))
    return result
