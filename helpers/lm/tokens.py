"""The tokens a model sees: text in, token batches and position masks out.

Knows tokenizers, not models or files. Every token carries a role, so that positions can be chosen by meaning and shown. Roles
follow from how a prompt was put together; nothing is looked for in the text.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, tzinfo
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.utils import chat_template_utils

from helpers.entries import DataError
from helpers.lm.hooks import Positions
from helpers.session import setting
from helpers.store import digest

SYSTEM_MARK, USER_MARK, ANSWER_MARK = "\ue0f1system\ue0f1", "\ue0f2user\ue0f2", "\ue0f3answer\ue0f3"  # of private use
_SAID: set[str] = set()

SPECIAL, TEMPLATE, SYSTEM, USER, ANSWER, FILLER, PAD = range(7)  # the role of a token


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: str | None

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def pad_token_id(self) -> int | None: ...

    def __call__(self, text: str, *, add_special_tokens: bool = ..., return_offsets_mapping: bool = ...) -> Mapping: ...

    def decode(self, token_ids: Sequence[int] | Tensor, skip_special_tokens: bool = ...) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(self, conversation: list, **options: object) -> str: ...


class Tokens(NamedTuple):
    """One text as token ids with a role (SPECIAL, TEMPLATE, SYSTEM, ...) each."""

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


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Every special token, also those without a name of their own (Llama-3's headers)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def padding(tokenizer: Tokenizer, below: int | None = None) -> int:
    """An id to pad with: the tokenizer's own, or its end of text, or 0; `below` the embedding's rows where that is known."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None and (below is None or i < below))


def first_token(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text: a BOS as a rule, nothing, or more than one id (GLM)."""
    bare, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    return whole[: starts[0]] if starts else []


def _thinking() -> bool:
    """Whether answers stand where a thinking model still thinks: the setting THINKING, closed (the default) or open."""
    wanted = setting("THINKING", "closed").lower()
    if wanted not in ("closed", "open"):
        raise DataError(f"THINKING={wanted!r} given; it is closed (answers follow an empty thought) or open")
    return wanted == "open"


class _Clock(datetime):
    """A clock that stands still: what a template that prints a date prints, so that prompts do not depend on the day."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "_Clock":
        return cls(2024, 7, 26)


def _rendered(tokenizer: Tokenizer, turns: Sequence[Mapping[str, object]], speak: bool) -> str:
    """The turns in the chat template, on a fixed date; with `speak`, up to where the assistant is to speak."""
    clock = chat_template_utils.datetime  # templates may be given data, not functions
    chat_template_utils.datetime = _Clock  # type: ignore[misc]
    try:
        return tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=speak, enable_thinking=_thinking()
        )
    finally:
        chat_template_utils.datetime = clock  # type: ignore[misc]


def _system_in_front(tokenizer: Tokenizer) -> None:
    """Say, once for each template, that it has no place for a system prompt."""
    if (template := digest(tokenizer.chat_template)) not in _SAID:
        _SAID.add(template)
        name = Path(getattr(tokenizer, "name_or_path", "")).name or "this model"
        print(f"the chat template of {name} takes no system prompt: it is put in front of the user's first turn")


def _as_parts(text: str) -> list[dict[str, str]]:
    """A text as templates of models of text and images want it."""
    return [{"type": "text", "text": text}]


class _Layout(NamedTuple):
    """How a template is asked: whether the system prompt joins the user's turn, and the form of a turn's content."""

    joined: bool
    form: Callable[[str], object]

    def turns(self, system: str | None, question: str, answer: str | None = None) -> list[dict[str, object]]:
        texts = [("user", f"{system}\n\n{question}" if system and self.joined else question)]
        texts = [("system", system), *texts] if system and not self.joined else texts
        texts = [*texts, ("assistant", answer)] if answer else texts
        return [{"role": role, "content": self.form(content)} for role, content in texts]


def _layout(tokenizer: Tokenizer, system: str | None, question: str) -> tuple[_Layout, str]:
    """The first way of asking the template in which every text has its place, and the prompt rendered around marks."""
    marks, problem = (SYSTEM_MARK if system else None, USER_MARK), "it drops the text"
    for joined in (False, True) if system else (False,):
        for form in (str, _as_parts):
            layout = _Layout(joined, form)
            try:
                marked = _rendered(tokenizer, layout.turns(*marks), True)
            except Exception as error:  # jinja2 raises its own classes from inside the template
                problem = problem if form is _as_parts else f"it says: {error}"
                continue
            if all(mark in marked for mark in marks if mark):
                return layout, marked
    raise DataError(f"the chat template has no place for {question[:40]!r} as the user's turn ({problem})")


def _pieces(tokenizer: Tokenizer, question: str, system: str | None, answered: bool) -> list[tuple[str, int]]:
    """The prompt as (text, role) pieces, in order, up to where the assistant is to speak, or its answer to stand.

    The template is rendered around marks, which show where each text goes whatever the texts are; they are then exchanged
    for the texts. DataError if the template does anything else to them.
    """
    if tokenizer.chat_template is None:  # a base model: a plain transcript
        first = [("System: ", TEMPLATE), (system, SYSTEM), ("\n", TEMPLATE)] if system else []
        opening = "\nAssistant: " if answered else "\nAssistant:"  # a reply begins with its own space
        return [*first, ("User: ", TEMPLATE), (question, USER), (opening, TEMPLATE)]
    layout, marked = _layout(tokenizer, system, question)
    if layout.joined:
        _system_in_front(tokenizer)
    own = {SYSTEM_MARK: (system or "", SYSTEM), USER_MARK: (question, USER)}
    pieces = [own.get(part, (part, TEMPLATE)) for part in re.split(f"({SYSTEM_MARK}|{USER_MARK})", marked)]
    try:
        real = _rendered(tokenizer, layout.turns(system, question), True)
    except Exception as error:
        raise DataError(f"the chat template refuses {question[:40]!r} as the user's turn: {error}") from None
    if "".join(text for text, _ in pieces) != real:
        raise DataError(f"the chat template changed or dropped the text {question[:40]!r}; positions cannot be marked")
    turn = _answer_opening(tokenizer, layout.turns(SYSTEM_MARK if system else None, USER_MARK, ANSWER_MARK))
    pieces[-1] = ((_before_answer if answered else _before_reply)(pieces[-1][0], turn), TEMPLATE)
    return [piece for piece in pieces if piece[0]]


def _answer_opening(tokenizer: Tokenizer, turns: Sequence[Mapping[str, object]]) -> str | None:
    """What the template itself puts between the user's text and an assistant's; None if it has no assistant's turn."""
    with suppress(Exception):
        before, mark, _ = _rendered(tokenizer, turns, False).rpartition(USER_MARK)[2].partition(ANSWER_MARK)
        return before if mark else None
    return None


def _before_answer(prompt: str, turn: str | None) -> str:
    """What stands before an answer: the end of the prompt, or what the template's own assistant's turn has in its place.

    They differ where a template gives the assistant's turn more than it gives the prompt (a space, a channel), or opens a
    thought in the prompt that a finished answer does not have.
    """
    closed = prompt if _thinking() else _closed(prompt)
    if turn is None or turn == prompt or _thinking() or closed.rstrip().endswith("</think>"):
        return closed
    return turn


def _before_reply(prompt: str, turn: str | None) -> str:
    """What stands before a reply that the model is to write: the prompt, and where the template's own turn says more (whose turn it
    is, a channel), that too, without the space that a reply begins with."""
    if turn is not None and not _thinking() and turn.startswith(prompt) and turn[len(prompt) :].strip():
        return turn.rstrip(" ")
    return prompt if _thinking() else _closed(prompt)


def _closed(prompt: str) -> str:
    """A prompt in which a thought that has begun is left empty."""
    begun = prompt.rfind("<think>") > prompt.rfind("</think>")
    return prompt.rstrip() + "\n\n</think>\n\n" if begun else prompt


def _tokenize(tokenizer: Tokenizer, pieces: Sequence[tuple[str, int]], template: bool = False) -> Tokens:
    """The joined text of `pieces` as tokens; a token that any of a piece's text lies in has the piece's role.

    Where template and content share a token it is the content's. DataError for text that is not Unicode, and for a
    tokenizer that cannot say which characters a token stands for.
    """
    text = "".join(part for part, _ in pieces)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text {text[max(error.start - 20, 0) : error.start]!r} is followed by half a character (a lone surrogate): "
            "mend it where it was read"
        ) from None
    try:
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(coded["input_ids"]), coded["offset_mapping"]
    except (KeyError, NotImplementedError):
        raise DataError(
            f"{type(tokenizer).__name__} cannot say which characters its tokens stand for, so that no position has a meaning: "
            "take the model's fast tokenizer (tokenizer.json)"
        ) from None
    special, end, spans = special_ids(tokenizer), 0, []
    for part, role in pieces:
        start, end = end, end + len(part)
        if role != TEMPLATE:
            spans.append((start, end, role))
    roles = [SPECIAL if i in special else TEMPLATE for i in ids]
    for start, end, role in spans:
        for i, (a, b) in enumerate(offsets):
            if a < end and b > start and roles[i] == TEMPLATE:
                roles[i] = role
    # A template writes the BOS itself, or none; plain text gets the one the tokenizer would have added, never two.
    bos = [] if template else first_token(tokenizer)
    if bos and ids[: len(bos)] != bos:
        ids, roles = bos + ids, [SPECIAL] * len(bos) + roles
    return Tokens(ids, roles)


def chat(
    tokenizer: Tokenizer, question: str, system: str | None = None, answer: str | None = None, closed: bool = False
) -> Tokens:
    """A user turn, an optional system prompt and an optional answer, in the model's own chat template.

    Ends where the assistant is to speak, or after the answer's last token; `closed`, after the end-of-turn mark that follows
    it. The answer is what is appended, so its tokens are known. A template without a system role gets the system prompt in front of the
    question, one that prints a date always the same, one that lets the model think an empty thought (setting THINKING).
    DataError for an empty answer and for a template that changes the texts.
    """
    pieces = _pieces(tokenizer, question.strip(), system.strip() or None if system else None, answer is not None)
    if answer is not None:
        if not answer.strip():
            raise DataError(f"the answer to {question.strip()[:40]!r} is empty: there is nothing to read or to score")
        pieces.append((answer.strip(), ANSWER))
    told = _tokenize(tokenizer, pieces, tokenizer.chat_template is not None)
    if not closed or answer is None:
        return told
    mark = end_of_turn(tokenizer)
    return Tokens([*told.ids, mark], [*told.roles, SPECIAL if mark in special_ids(tokenizer) else TEMPLATE])


def end_of_turn(tokenizer: Tokenizer) -> int:
    """The token that ends an assistant's turn: the first special one that the template puts after an answer, else the first it puts
    there, else the end of text; of a base model, in a plain transcript, the line's end."""
    after = "\n"
    if tokenizer.chat_template is not None:
        layout, _ = _layout(tokenizer, None, USER_MARK)
        turns = layout.turns(None, USER_MARK, ANSWER_MARK)
        after = _rendered(tokenizer, turns, False).partition(ANSWER_MARK)[2]
    ids, special = tokenizer(after, add_special_tokens=False)["input_ids"], special_ids(tokenizer)
    ends = [i for i in ids if i in special] or list(ids) or [tokenizer.eos_token_id]
    if ends[0] is None:
        raise DataError("the template puts nothing after an answer, and the tokenizer has no end of text: no turn ends")
    return ends[0]


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of how a tokenizer splits text and lays out a conversation: its rules, its template as it comes out, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else tokenizer.get_vocab()
    shown = chat(tokenizer, "A question.", answer="An answer.")
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, sorted(special_ids(tokenizer))]
    return digest([rules, shown, tokenizer.chat_template, specials])[:16]


def conversation(tokenizer: Tokenizer, question: str, reply: Sequence[int], own_turn: bool = True) -> Tokens:
    """A user turn and the reply's token ids, which have the role `answer`.

    With `own_turn` false the same ids end the user's own turn, after a blank line, and no assistant turn is opened before
    them: the same words, and nobody starts to speak.
    """
    start, reply = chat(tokenizer, question), list(reply)
    if own_turn:
        return Tokens(start.ids + reply, start.roles + [ANSWER] * len(reply))
    end = max(i for i, role in enumerate(start.roles) if role == USER) + 1
    blank = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    return Tokens(
        start.ids[:end] + blank + reply + start.ids[end:],
        start.roles[:end] + [TEMPLATE] * len(blank) + [ANSWER] * len(reply) + start.roles[end:],
    )


def plain(tokenizer: Tokenizer, text: str) -> Tokens:
    """A plain text, with the tokenizer's own BOS if it has one; every other token has the role `user`."""
    return _tokenize(tokenizer, [(text, USER)])


def pad(batch: Sequence[Tokens], pad_id: int, side: str = "left") -> Batch:
    """The sequences padded to one length. Positions count real tokens, so either side gives the same activations."""
    if not batch or any(len(t.ids) != len(t.roles) for t in batch):
        raise ValueError(f"{len(batch)} sequences were given; one or more is wanted, each with a role for every id")
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


def provenance(tokenizer: Tokenizer, batch: Batch, chosen: Positions, row: int = 0, colour: bool = False) -> str:
    """One row of the batch as text with the chosen tokens in «guillemets» (and in reverse video with `colour`)."""
    out = []
    for i, on, real in zip(batch.ids[row].tolist(), chosen.prompt[row].tolist(), batch.mask[row].tolist(), strict=True):
        if real:
            piece = tokenizer.decode([i]).replace("\n", "⏎")
            marked = f"\x1b[30;46m«{piece}»\x1b[0m" if colour else f"«{piece}»"
            out.append(marked if on else piece)
    tail = " … and every generated token" if chosen.later else ""
    return "".join(out) + tail
