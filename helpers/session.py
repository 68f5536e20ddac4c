"""Where a run finds its settings: `.env`, the profile, the device, the folders results go to.

The only module that reads the environment. Tokens pass through to the libraries that want them and are never returned,
printed or hashed.
"""

import hashlib
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from dotenv import dotenv_values

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ROOT / "notebooks" / "profiles"
DEFAULT_PROFILE = "smollm2"
SECRET_NAMES = ("HF_TOKEN", "NEURONPEDIA_API_KEY", "WANDB_API_KEY")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def setting(name: str, default: str = "") -> str:
    """One setting: from the environment if it is there (even empty), else from `.env`; `default` where it is empty."""
    value = os.environ[name] if name in os.environ else dotenv_values(ROOT / ".env").get(name)
    return (value or "").strip() or default


def redact(text: str) -> str:
    """`text` with every secret setting and every user:password@ of an address replaced by stars."""
    for name in SECRET_NAMES:
        if secret := setting(name):
            text = text.replace(secret, "***")
    return re.sub(r"(://)[^/@\s]+@", r"\1***@", re.sub(r"\bhf_[A-Za-z0-9]{20,}", "hf_***", text))


def why(error: BaseException, lines: int = 1) -> str:
    """What an exception says, secrets out: its first `lines` lines, shortened."""
    said = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return redact(" ".join(said[:lines]) or type(error).__name__)[:400]


def path(text: str | Path) -> Path:
    """A path as a setting or a profile may give it: `~` and `$NAME` expanded, relative to the project's root."""
    return ROOT / Path(os.path.expandvars(str(text))).expanduser()


def cache_dir() -> Path:
    """The folder of everything that can be made again: CACHE_DIR, or data/cache."""
    return Path(setting("CACHE_DIR", str(ROOT / "data" / "cache"))).expanduser()


def choose_device(wanted: str = "auto") -> str:
    """`wanted`, or the best of cuda, mps, cpu that is here."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    """`wanted` by name, or bfloat16 where the device multiplies it natively, else float32 (float16 overflows on Gemma)."""
    if wanted != "auto":
        if wanted not in DTYPES:
            raise ValueError(f"dtype {wanted!r} given; choose one of auto, {', '.join(DTYPES)}")
        return DTYPES[wanted]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def load_profile(name: str = "") -> dict[str, Any]:
    """The profile as a dict, with the overrides of `.env` (CHAT_MODEL, BASE_MODEL, LAYER) laid over it.

    An overridden profile gets a name of its own, so that its results never pass for the profile's. FileNotFoundError
    lists the profiles there are.
    """
    name = name or setting("PROFILE", DEFAULT_PROFILE)
    path = PROFILES / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise FileNotFoundError(f"no profile {name!r}: {PROFILES.relative_to(ROOT)} has {known}")
    profile = {"name": name, **yaml.safe_load(path.read_text(encoding="utf-8"))}
    overrides = {key: setting(env) for key, env in (("chat", "CHAT_MODEL"), ("base", "BASE_MODEL"), ("layer", "LAYER"))}
    overrides = {key: value for key, value in overrides.items() if value}
    if "layer" in overrides:
        if not overrides["layer"].isdigit():
            raise ValueError(f"LAYER={overrides['layer']!r} given; it must be a layer number such as 14")
        overrides["layer"] = int(overrides["layer"])
    if overrides:
        tag = hashlib.sha256(repr(sorted(overrides.items())).encode()).hexdigest()[:6]
        model = re.sub(r"[^A-Za-z0-9.-]+", "-", str(overrides.get("chat", profile["chat"])).split("/")[-1])
        profile.update(overrides, name=f"{name}+{model}-{tag}")
        if overrides.keys() & {"chat", "base"}:
            profile.pop("pair", None)  # it belongs to the profile's own model
    return profile


def device_and_dtype(profile: dict[str, Any] | None = None) -> tuple[str, torch.dtype]:
    """Where a run computes and in what: DEVICE and DTYPE of the settings, else the profile's, else the best there is."""
    profile = profile or {}
    device = choose_device(setting("DEVICE", profile.get("device", "auto")))
    return device, choose_dtype(setting("DTYPE", profile.get("dtype", "auto")), device)


def split(model: str) -> tuple[str, str]:
    """A model's name and its adapter's folder, "" where there is none: `NAME + FOLDER`, spaces included."""
    name, _, adapter = model.partition(" + ")
    return name.strip(), adapter.strip()


def shown(model: str) -> str:
    """A model's name as it may stand in a result: of a folder, and of an adapter's, only the last part."""
    name, adapter = split(model)
    name = f"folder:{Path(name).name}" if Path(name).expanduser().is_dir() else name
    return f"{name} + {Path(adapter).name}" if adapter else name


@dataclass(frozen=True)
class Session:
    """What `start` settled: the profile, the device and dtype, the seed and where results and figures go."""

    notebook: str
    profile: dict[str, Any]
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
        return shown(str(self.profile["chat"]))

    @property
    def name(self) -> str:
        """The profile's name; a fast run has one of its own."""
        return self.profile["name"] + ("-fast" if self.fast else "")


def start(notebook: str, profile: str = "", fast: bool = False, seed: int = 0, **parameters: Any) -> Session:
    """Settle a notebook's session, seed torch, print one line that says what runs where.

    `parameters`: the notebook's other parameters, kept with its results.

    Results go to data/results/<profile> and figures/<profile>; the report sets REPORT_DIR to collect them elsewhere.
    """
    settings = load_profile(profile)
    device, dtype = device_and_dtype(settings)
    name = settings["name"] + ("-fast" if fast else "")
    out = setting("REPORT_DIR")
    results = Path(out) / "results" if out else ROOT / "data" / "results" / name
    figures = Path(out) / "figures" if out else ROOT / "figures" / name
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.manual_seed(seed)
    torch.set_grad_enabled(False)
    session = Session(notebook, settings, fast, device, dtype, seed, results, figures, parameters)
    print(
        f"{notebook} · profile {name} · {session.model} · {device} {str(dtype).removeprefix('torch.')} · seed {seed} · "
        f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    )
    return session
