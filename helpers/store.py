"""Entries on disk that are either whole or not there: cached tensors, models, results.

An entry lies in `<cache>/<kind>/<fingerprint>/` with `sidecar.json` beside its files. The fingerprint hashes the parameters
that matter, so a changed parameter makes a new entry and never a stale hit. Everything is written under a temporary
name and renamed.
"""

import ast
import errno
import hashlib
import inspect
import json
import os
import re
import shutil
import socket
import time
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.session import ROOT, cache_dir, setting

FOREIGN_AGE = 24 * 3600.0  # seconds without a change after which another host's temporary is rubbish
DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
    errno.ENOTDIR: "a file stands where a folder is wanted",
}
LIBRARIES = ("torch", "transformers", "transformer_lens", "scikit-learn", "numpy")


def digest(value: object) -> str:
    """A sha256 (hex) of a tensor's bits, bytes, a string, or anything JSON can say (keys sorted)."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        hashed = hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode())
        hashed.update(value.reshape(-1).view(torch.uint8).numpy().data)
        return hashed.hexdigest()
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
_SOURCE = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in (ROOT / "helpers").rglob("*.py")
}
PLUMBING = (
    "store",
    "session",
    "profiles",
    "pages",
    "progress",
)  # where things lie and what is shown: no number depends on them


@lru_cache
def versions() -> dict[str, str]:
    """Installed versions of the libraries that numbers depend on."""
    return {name: metadata.version(name) for name in LIBRARIES}


@lru_cache
def _parsed(source: str) -> tuple[str, frozenset[str]]:
    """A hash of what a module of helpers does, wherever it lies and however it is commented, and the helpers it imports."""
    tree, imported = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (module := node.module or "").split(".")[0] == "helpers":
            names = {module, *(f"{module}.{name.name}" for name in node.names)}
            imported |= names & set(_SOURCE)
            node.names, node.module = [], ""
        if isinstance(body := getattr(node, "body", None), list):  # without docstrings
            node.body = [x for x in body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]  # type: ignore[attr-defined]
    return digest(ast.dump(tree)), frozenset(imported)


def code_digest(module: str) -> str:
    """A hash of what a module (its `__name__`) and all the helpers that it can reach by imports do: an edited computation does
    not meet its old results; a file that is moved, or commented anew, does."""
    found, left = {}, [module]
    while left:
        name = left.pop()
        if name not in found and name.removeprefix("helpers.") not in PLUMBING:
            found[name], reached = _parsed(_SOURCE[name])
            left += reached
    return digest(sorted(found.values()))[:16]


def _host() -> str:
    """Eight hex digits for this machine since it started and, in a container, for its own numbering of processes."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return digest(parts)[:8]


def _began(pid: int) -> str:
    """When process `pid` of this host began (clock ticks since the machine did); "" where that is not told."""
    with suppress(OSError, IndexError):
        if int(Path("/proc/self/stat").read_bytes().split()[0]) == os.getpid():  # else it is another container's /proc
            return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    return ""


def _alive(pid: int, began: str) -> bool:
    """Does the process `pid` of this host that began at `began` still run? Yes, where it cannot be told."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _began(pid)
    return not began or not now or now == began


def temporary_name() -> str:
    """A name for a temporary that says whose it is: host, process, when that began, a number."""
    return f".tmp-{_host()}-{os.getpid()}-{_began(os.getpid())}-{time.monotonic_ns()}"


def _abandoned(temporary: Path) -> bool:
    """Is the writer of a temporary gone? Where it wrote on another host: has nothing in it changed for a day?"""
    named = re.match(r"\.tmp-([0-9a-f]{8})-(\d{1,9})-(\d*)-\d", temporary.name)
    if named and named[1] == _host():
        return not _alive(int(named[2]), named[3])
    with suppress(OSError):
        newest = max(p.lstat().st_mtime for p in (temporary, *temporary.rglob("*")))
        return time.time() - newest > FOREIGN_AGE
    return False


def sweep(folder: Path) -> None:
    """Remove temporaries in `folder` of processes that are gone; those of other hosts and containers when a day old."""
    for old in folder.glob(".tmp-*"):
        if _abandoned(old):
            with suppress(OSError):
                shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not be there yet."""
    return shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free


def disk_reason(said: str) -> str:
    """What another program says is wrong with the disk, in the system's words ("No space left on device"), or ""."""
    return next((os.strerror(n) for n in DISK_ERRORS if os.strerror(n) in said or f"[Errno {n}]" in said), "")


def _disk_error(error: Exception, folder: Path) -> int:
    """The number of the error if it is one of `DISK_ERRORS` about `folder` (or about no file that is named), else 0."""
    if isinstance(error, SafetensorError):  # it tells the system's error only in words
        found = re.search(r"os error (\d+)", str(error))
        number, named = int(found[1]) if found else 0, None
    elif isinstance(error, OSError):
        number, named = error.errno or 0, error.filename
    else:
        return 0
    about = named is None or folder.is_relative_to(str(named)) or Path(str(named)).is_relative_to(folder)
    return number if number in DISK_ERRORS and about else 0


@contextmanager
def full_disk_said(folder: Path) -> Iterator[None]:
    """Context: a disk that is full, or a folder that cannot be written, raises OSError that says so and what to do."""
    try:
        yield
    except Exception as error:
        if not (number := _disk_error(error, folder)):
            raise
        if number in (errno.ENOSPC, errno.EDQUOT):
            free = free_bytes(folder) / 1e9
            said = (
                f"{DISK_ERRORS[number]} ({free:.1f} GB free): make room or set CACHE_DIR in .env to another disk; "
                "what was whole is kept"
            )
        else:
            said = (
                f"{folder} cannot be written: {DISK_ERRORS[number]}. Make it writable, or set CACHE_DIR in .env to a "
                "folder that is (for a report, --out)"
            )
        raise OSError(number, said) from error


@contextmanager
def writing(path: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error, and vanishes otherwise.

    If `path` exists by then it stays, or, with `replace`, is exchanged. OSError as for `full_disk_said`.
    """
    temporary = path.parent / f"{temporary_name()}-{path.name}"
    try:
        with full_disk_said(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
            temporary.mkdir()
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
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_file(path: Path, data: str | bytes) -> Path:
    """Write a whole file or nothing: under a temporary name, then renamed over `path`."""
    temporary = path.parent / f"{temporary_name()}-{path.name}"
    try:
        with full_disk_said(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    return path


_step: ContextVar[dict[str, Any] | None] = ContextVar("step", default=None)  # the innermost long step under way


@contextmanager
def spent(kind: str) -> Iterator[None]:
    """Context, or decorator of a function: a long step of that kind, whose own seconds the report is told.

    One JSON line (kind, seconds, cached) is appended to the file that SPENT_FILE names; where that is not set, nothing is.
    The seconds of steps inside this one are theirs, so that the lines add up; `from_cache` marks it.
    """
    outer, began = _step.get(), time.perf_counter()
    step: dict[str, Any] = {"kind": kind, "cached": False, "inside": 0.0}
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)
        seconds = time.perf_counter() - began
        if outer:
            outer["inside"] += seconds
        if file := setting("SPENT_FILE"):
            line = {"kind": kind, "seconds": round(seconds - step["inside"], 4), "cached": step["cached"]}
            with suppress(OSError), open(file, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")


def from_cache() -> None:
    """Say that the innermost step under way is answered from the cache."""
    if step := _step.get():
        step["cached"] = True


def cached(
    kind: str, parameters: dict[str, Any], compute: Callable[[], dict[str, Tensor]], code: str = ""
) -> dict[str, Tensor]:
    """The tensors `compute` returns, kept under the fingerprint of `parameters` and of what the module `code` does.

    An entry whose tensor file does not match the checksum in its sidecar is named, removed and made again.
    """
    with spent(kind):
        return _cached(kind, parameters, compute, code)


def there(kind: str, parameters: dict[str, Any], code: str = "") -> bool:
    """Whether `cached` has such an entry, whole or not."""
    return (_entry(kind, parameters, code)[1] / "sidecar.json").exists()


def _entry(kind: str, parameters: dict[str, Any], code: str) -> tuple[dict[str, Any], Path]:
    """All that an entry depends on, and its folder."""
    parameters = {**parameters, "code": code_digest(code) if code else "", "libraries": versions()}
    return parameters, cache_dir() / kind / digest(parameters)[:24]


def _cached(
    kind: str, parameters: dict[str, Any], compute: Callable[[], dict[str, Tensor]], code: str
) -> dict[str, Tensor]:
    parameters, path = _entry(kind, parameters, code)
    sidecar = path / "sidecar.json"
    if sidecar.exists():
        tensors = path / "tensors.safetensors"
        if tensors.exists() and file_digest(tensors) == (read_json(sidecar) or {}).get("sha256"):
            from_cache()
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


# --- any function's result -----------------------------------------------------------------------------------------------


P = typing.ParamSpec("P")
T = typing.TypeVar("T")


def kept(f: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """f(*given, **named), kept on disk for the next time: for a slow, deterministic function of helpers, asked again in a warm run.

    Its annotation says what it returns: a Tensor, an array, plain values, or NamedTuples, dataclasses, lists, tuples and dicts of these. The
    entry depends on every argument, tensors and SAEs by their bits, models and harvests by what identifies them, and on the source of all helpers that `f` can reach.
    TypeError for an argument of another kind, ValueError for a function from elsewhere.
    """
    if f.__module__ not in _SOURCE:
        raise ValueError(
            f"{f.__module__}.{f.__qualname__} was given; only functions of helpers are kept: no other's source is known"
        )
    bound = inspect.signature(f).bind(*given, **named)
    bound.apply_defaults()
    key = {"function": f"{f.__module__}.{f.__qualname__}", "given": stated(bound.arguments)}

    def compute() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        plan = json.dumps(_apart(f(*given, **named), tensors)).encode()
        return tensors | {"plan": torch.frombuffer(bytearray(plan), dtype=torch.uint8)}

    found = cached(f.__name__.strip("_"), key, compute, f.__module__)
    plan = json.loads(found["plan"].numpy().tobytes())
    return typing.cast(T, _together(typing.get_type_hints(f)["return"], plan, found))


def stated(value: object) -> object:
    """What JSON can say of an argument: the same for equal ones alone."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        return {"tensor": digest(value)}
    for name in ("key", "about"):  # a language model; rows that were read from one
        if (said := getattr(value, name, None)) is not None:
            return said() if callable(said) else said
    if hasattr(value, "state_dict") and hasattr(value, "cfg"):
        settings = value.cfg.to_dict() if hasattr(value.cfg, "to_dict") else vars(value.cfg)
        return [type(value).__name__, repr(sorted(settings.items())), stated(dict(value.state_dict()))]
    if isinstance(value, dict):
        return {str(name): stated(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [stated(part) for part in value]
    if is_dataclass(value):
        return [type(value).__name__, *(stated(getattr(value, f.name)) for f in fields(value))]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(
        f"a {type(value).__name__} was given; a kept function takes tensors, arrays, models, harvests, SAEs and plain values"
    )


def _apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A result as JSON, its tensors and arrays put aside in `tensors`."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        tensors[name := f"part {len(tensors)}"] = value.detach().cpu().clone()
        return name
    if isinstance(value, dict):
        return {name: _apart(part, tensors) for name, part in value.items()}
    if is_dataclass(value):
        value = [getattr(value, f.name) for f in fields(value)]
    if isinstance(value, (tuple, list)):
        return [_apart(part, tensors) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def _together(hint: Any, part: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_apart` took apart, as the annotation `hint` says it is."""
    inner = typing.get_args(hint)
    if hint is Tensor:
        return tensors[part]
    if typing.get_origin(hint) is np.ndarray or hint is np.ndarray:
        return tensors[part].numpy()
    if isinstance(part, dict):
        return {inner[0](name): _together(inner[1], value, tensors) for name, value in part.items()}
    if named := getattr(hint, "_fields", None) or tuple(getattr(hint, "__dataclass_fields__", ())):
        hints = typing.get_type_hints(hint)
        return hint(*(_together(hints[name], value, tensors) for name, value in zip(named, part, strict=True)))
    if isinstance(part, list):
        each = inner if len(inner) == len(part) and inner[-1] is not Ellipsis else inner[:1] * len(part)
        return (typing.get_origin(hint) or list)(
            _together(h, value, tensors) for h, value in zip(each, part, strict=True)
        )
    return part
