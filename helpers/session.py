"""Where a run finds its settings: `.env`, the profile, the device, the folders results go to.

The only module that reads the environment. Tokens pass through to the libraries that want them and are never returned,
printed or hashed.
"""

import hashlib
import io
import os
import platform
import re
import sys
import warnings
from dataclasses import dataclass
from functools import lru_cache
from html.entities import codepoint2name
from pathlib import Path
from typing import Any, TypeVar

import torch
from dotenv import dotenv_values

from helpers import profiles
from helpers.profiles import Profile

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ROOT / "notebooks" / "profiles"
DEFAULT_PROFILE = "smollm2"
SECRET_NAMES = ("HF_TOKEN", "NEURONPEDIA_API_KEY", "WANDB_API_KEY")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# What a template of .env or a tutorial leaves where a token belongs.
PLACEHOLDER = re.compile(
    r"none|null|nil|undefined|n/a|true|false|todo|tbd|empty|dummy|placeholder|"
    r"(my|some|test|example)?[-_ ]?(hf|api|access)?[-_ ]?(token|key|secret)([-_ ]?(goes)?[-_ ]?here)?|"
    r"(change|replace|fill)[-_ ]?(me|this|in|with).*|(hf[-_ ])?(your|insert|enter|paste|put)[-_ ].*|"
    r"(hf[-_ ])?your(hf|api|access)?(token|key).*|<.*>|\$\{?\w+\}?|(hf_)?[x*.…]+",
    re.IGNORECASE,
)
SHORTEST_SECRET = 8
T = TypeVar("T")


def print_anywhere() -> None:
    """Let a terminal or log that cannot show a character print its escape (`\\u2026`), so that no print fails."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", "") in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


print_anywhere()  # here, because everything that prints imports this module


def _dotenv() -> dict[str, str | None]:
    """What `.env` says; ValueError if it is not text in UTF-8 (a byte order mark is fine)."""
    file = ROOT / ".env"
    if not file.exists() or file.is_dir():
        return {}
    try:
        content = file.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f".env cannot be read ({error.strerror}): let this user read it, or remove it") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        found = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content else "another encoding"
        raise ValueError(f".env is written in {found}, which is not read: save it as UTF-8 in your editor")
    return dotenv_values(stream=io.StringIO(text))


def setting(name: str, default: str = "") -> str:
    """One setting: from the environment if it is there (even empty), else from `.env`; `default` where it is empty.

    A placeholder in a token's place ("null", "your_token_here", anything under eight characters) is no token.
    ValueError if `.env` is not UTF-8.
    """
    value = (os.environ[name] if name in os.environ else _dotenv().get(name)) or ""
    value = value.strip()
    if name in SECRET_NAMES and (len(value) < SHORTEST_SECRET or PLACEHOLDER.fullmatch(value)):
        if name in os.environ:
            os.environ[name] = ""  # the library that wants the token reads it there, and would send it
        value = ""
    return value or default


def _however_escaped(character: str) -> str:
    """A regular expression for a character as text, JSON, Python, HTML and URLs write it, escaped any number of times."""
    if character.isascii() and (character.isalnum() or character in "-_."):
        return re.escape(character)
    code, units = ord(character), character.encode("utf-16-be").hex()
    name = "apos" if character == "'" else codepoint2name.get(code, "#")
    forms = [
        "".join(rf"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)),
        rf"\\x{code:02x}",
        rf"\\U{code:08x}",
        rf"(?:&|\\u0026)(?:amp;)*(?:#0*{code}|#x0*{code:x}|{name});",
        "".join(f"%(?:25)*{byte:02x}" for byte in character.encode()),
        re.escape(character),
        *([r"\+"] if character == " " else []),
    ]
    return rf"(?i:(?:\\|%(?:25)*5c)*(?:{'|'.join(forms)}))"


@lru_cache
def _pattern(secret: str) -> re.Pattern[str]:
    """What finds a secret, however escaped."""
    return re.compile("".join(map(_however_escaped, secret)))


def redact(value: T) -> T:
    """`value` with every secret setting, however escaped, and every user:password@ of an address replaced by stars.

    Text, or lists and dicts of it (a notebook): what is no text stays as it is, so that JSON stays JSON.
    """
    secrets = [_pattern(secret) for name in SECRET_NAMES if (secret := setting(name))]

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {clean(key): clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        if not isinstance(value, str):
            return value
        for secret in secrets:
            value = secret.sub("***", value)
        return re.sub(r"(://)[^/@\s]+@", r"\1***@", re.sub(r"\bhf_[A-Za-z0-9]{20,}", "hf_***", value))

    return clean(value)


def path(text: str | os.PathLike[str]) -> Path:
    """`text` as a path that means the same in every folder a run is started in.

    `~` and `$VAR` (of the environment or `.env`) are expanded; a relative path starts at the repository's root.
    ValueError names a variable that is not set, or a home that is not known.
    """
    given = os.fspath(text)

    def value(variable: re.Match[str]) -> str:
        if found := setting(variable[1] or variable[2]):
            return found
        raise ValueError(f"the path {given!r} needs {variable[0]}, which is not set: set it, or write the path out")

    expanded = os.path.expanduser(re.sub(r"\$(?:([A-Za-z_]\w*)|\{(\w+)\})", value, given))
    if expanded.startswith("~"):
        raise ValueError(f"the path {given!r} begins with a home that is not known: write the path out")
    return ROOT / expanded


def why(error: BaseException, lines: int = 1) -> str:
    """What an exception says, secrets out: its first `lines` lines, shortened."""
    said = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return redact(" ".join(said[:lines]) or type(error).__name__)[:400]


def cache_dir() -> Path:
    """The folder of everything that can be made again: CACHE_DIR, or data/cache."""
    return path(setting("CACHE_DIR", "data/cache"))


def choose_device(wanted: str = "auto") -> str:
    """`wanted` (cpu, cuda, cuda:N or mps) if it is here, or for auto the best that is; ValueError otherwise."""
    name = str(wanted).strip().lower()
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    here = [*(["cuda"] if cuda else []), *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    if name == "auto":
        return here[0]
    if name not in [*here, *cuda]:
        raise ValueError(
            f"device {str(wanted)!r} given; DEVICE may be auto or what this machine and this build of torch have: "
            f"{', '.join([*here, *cuda])}"
        )
    return name


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    """`wanted` by name, or bfloat16 where the device multiplies it natively, else float32 (float16 overflows on Gemma)."""
    name = str(wanted).strip().lower()
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype {wanted!r} given; choose one of auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def split(model: str) -> tuple[str, str]:
    """A model's name and what its adapters' folders are called, "" where there are none: `NAME + FOLDER + FOLDER`, spaces included."""
    name, _, adapter = model.partition(" + ")
    return name.strip(), adapter.strip()


def located(model: str) -> str:
    """A model's name with its folder and its adapters' written out in full; names of the hub and packaged ones stay."""

    def full(name: str) -> str:
        is_path = name.startswith(("~", "$", "/", "./", "../"))
        return str(path(name)) if is_path or (name and path(name).is_dir()) else name

    return " + ".join(full(part.strip()) for part in model.split(" + "))


def load_profile(name: str = "") -> Profile:
    """A profile, with the overrides of `.env` (CHAT_MODEL, BASE_MODEL, LAYER) laid over it.

    A model that is a folder is named by its full path. An overridden profile gets a name of its own, so that its
    results never pass for the profile's. FileNotFoundError lists the profiles there are, ProfileError says what is wrong with one.
    """
    name = name or setting("PROFILE", DEFAULT_PROFILE)
    file = PROFILES / f"{name}.yaml"
    if not file.exists():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise FileNotFoundError(f"no profile {name!r}: {PROFILES.relative_to(ROOT)} has {known}")
    profile = profiles.of({"name": name, **profiles.read(file)}, file.name)
    changes: dict[str, Any] = {
        key: setting(env) for key, env in (("chat", "CHAT_MODEL"), ("base", "BASE_MODEL"), ("layer", "LAYER"))
    }
    changes = {key: value if key == "layer" else located(value) for key, value in changes.items() if value}
    if "layer" in changes:
        if not changes["layer"].isdigit():
            raise ValueError(f"LAYER={changes['layer']!r} given; it must be a layer number such as 14")
        changes["layer"] = int(changes["layer"])
    if changes:
        tag = hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:6]
        model = re.sub(r"[^A-Za-z0-9.-]+", "-", changes.get("chat", profile.chat).split("/")[-1])
        if changes.keys() & {"chat", "base"}:
            changes |= {"pair": None, "seconds": {}}  # these belong to the profile's own model
        if (sae := profile.sae) and not sae.release:  # it will be another SAE, whose latents nobody has named
            changes["sae"] = sae.model_copy(update={"labels": None, "neuronpedia": None})
        changes["name"] = f"{name}+{model}-{tag}"
    own = {"chat": located(profile.chat), "base": profile.base and located(profile.base)}
    return profile.model_copy(update=own | changes)


def device_and_dtype(profile: Profile | None = None) -> tuple[str, torch.dtype]:
    """Where a run computes and in what: DEVICE and DTYPE of the settings, else the profile's, else the best there is."""
    device = choose_device(setting("DEVICE", profile.device if profile else "auto"))
    return device, choose_dtype(setting("DTYPE", profile.dtype if profile else "auto"), device)


def shown(model: str) -> str:
    """A model's name as it may stand in a result: of a folder, and of an adapter's, only the last part."""
    name, *adapters = (part.strip() for part in model.split(" + "))
    name = f"folder:{Path(name).name}" if (ROOT / os.path.expanduser(name)).is_dir() else name
    return " + ".join([name, *(Path(adapter).name for adapter in adapters)])


@dataclass(frozen=True)
class Session:
    """What `start` settled: the profile, the device and dtype, the seed and where results and figures go."""

    notebook: str
    profile: Profile
    fast: bool
    device: str
    dtype: torch.dtype
    seed: int
    results: Path
    figures: Path
    parameters: dict[str, Any]

    @property
    def model(self) -> str:
        """The model's name as it may be shown: of a folder only its last part."""
        return shown(self.profile.chat)

    @property
    def key(self) -> dict[str, Any]:
        """What a number made under it depends on beside models, for the cache's fingerprint."""
        profile = repr(self.profile.model_copy(update={"seconds": {}}))
        return {"profile": profile, "fast": self.fast, "device": self.device, "dtype": str(self.dtype)}

    @property
    def name(self) -> str:
        """The profile's name; a fast run has one of its own."""
        return self.profile.name + ("-fast" if self.fast else "")


def check_checkout() -> None:
    """RuntimeError if the working folder lies in one checkout of this repository and `helpers` comes from another."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "helpers" / "session.py").is_file() and (folder / "notebooks").is_dir():
            if folder.resolve() != ROOT:
                raise RuntimeError(
                    f"this runs in {folder}, but `helpers`, the profiles and .env would be those of {ROOT}: start it "
                    f"with a .venv of its own (`make lab` or `make report` there), or put {folder} first on PYTHONPATH"
                )
            return


def checked_fast(fast: object) -> bool:
    """`fast` as a bool; ValueError for anything else, such as text, which is true to a notebook whatever it says."""
    if isinstance(fast, str) or fast not in (True, False):
        raise ValueError(
            f"fast={fast!r} given; it must be True or False (papermill reads only these words: -p fast False)"
        )
    return bool(fast)


def _without_place(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as one line; where it arose is a kernel's temporary file, another one in every run."""
    return f"{category.__name__}: {message}\n"


def start(notebook: str, profile: str = "", fast: bool = False, seed: int = 0, **parameters: object) -> Session:
    """Settle a notebook's session, seed torch, print one line that says what runs where.

    `parameters`: the notebook's other parameters, kept with its results.

    Results and figures go to reports/<profile>, where the report puts them too, unless it sets REPORT_DIR; the
    committed ones change only by `report --commit`. ValueError and RuntimeError say what is wrong with a setting,
    before any model is loaded.
    """
    print_anywhere()
    warnings.formatwarning = _without_place
    check_checkout()
    fast = checked_fast(fast)
    settings = load_profile(profile)
    device, dtype = device_and_dtype(settings)
    name = settings.name + ("-fast" if fast else "")
    out = ROOT / setting("REPORT_DIR", f"reports/{name}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.manual_seed(seed)
    torch.set_grad_enabled(False)
    session = Session(notebook, settings, fast, device, dtype, seed, out / "results", out / "figures", parameters)
    print(
        f"{notebook} · profile {name} · {session.model} · {device} {str(dtype).removeprefix('torch.')} · seed {seed} · "
        f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    )
    return session
