"""The tokens a model sees: text in, token batches and position masks out.

Knows tokenizers, not models or files. Every token carries a role, so that positions can be chosen by meaning and shown.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.behaviors import DataError, SystemPair
from helpers.hooks import Positions

SPECIAL, TEMPLATE, SYSTEM, USER, ANSWER, FILLER, PAD = range(7)  # the role of a token


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


def special_ids(tokenizer: Any) -> set[int]:
    """Every special token, also those without a name of their own (Llama-3's headers)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def first_token(tokenizer: Any) -> list[int]:
    """The BOS that the tokenizer puts before a text, as a list of one id, or an empty list where it adds none."""
    return [i for i in tokenizer("", add_special_tokens=True)["input_ids"][:1] if i == tokenizer.bos_token_id]


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
    bos = first_token(tokenizer)
    if bos and ids[:1] != bos:
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


def conversation(tokenizer: Any, question: str, reply: Sequence[int], own_turn: bool = True) -> Tokens:
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
