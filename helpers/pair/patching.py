"""Residuals of one model put into another, token by token, and what that does to the predictions: activation patching.

A conversation is run once up to a block and then, as often as wanted, from there on with something added to its residuals. What is
added at each token is a row: the difference that training made there, a part of it, or the like in other directions.
The share of the KL that is gone is `stats.ratio(nothing - patched, nothing)` over conversations: 1 is
all, negative is further away than before. Where some KL is left at best, the share of what can go is
`stats.ratio(nothing - patched, nothing - best)`.
Recovered KL of spliced-in differences: Minder et al. 2025 (arXiv:2504.02922), section 4, there for crosscoder latents.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from helpers import stats, store
from helpers.lm import reading, replies, scoring, tokens
from helpers.lm.reading import LM
from helpers.lm.scoring import Resumed
from helpers.lm.tokens import ANSWER, USER, Tokens
from helpers.steering.behaviors import Item


class Runs:
    """Conversations in one model, ready to be run again from after block `layer` on.

    `residuals`: one (tokens, d_model) float32 a conversation. Only the answer's tokens are predicted, each from the one before.
    ValueError for a conversation that does not end with its one answer, or begins with it.
    """

    def __init__(self, lm: LM, sequences: Sequence[Tokens], layer: int, batch_size: int = 16):
        for talk in sequences:
            if ANSWER not in talk.roles or talk.roles[0] == ANSWER:
                text = lm.tokenizer.decode(talk.ids)[:60]
                raise ValueError(f"{text!r} has no answer after a first token: there is nothing to predict")
            if ANSWER in talk.roles[: -talk.roles.count(ANSWER)]:
                raise ValueError(f"{lm.tokenizer.decode(talk.ids)[:60]!r} does not end with its one answer")
        self.lm, self.sequences, self.layer = lm, list(sequences), operator.index(layer)
        self.batch_size = batch_size
        reading.unhooked(lm)
        key = {
            **lm.key,
            "layer": self.layer,
            "batch": batch_size,
            "sequences": store.digest([[t.ids, t.roles] for t in self.sequences]),
        }

        def read() -> dict[str, Tensor]:
            return {"rows": torch.cat(reading.residuals(lm, self.sequences, layer, batch_size=batch_size))}

        rows = store.cached("residuals", key, read, __name__)["rows"]
        self.residuals = list(rows.split([len(t.ids) for t in self.sequences]))
        self._key = {**key, "residuals": store.digest(rows)}

    def _check(self, added: Sequence[Tensor] | None) -> None:
        shapes = [
            (tuple(a.shape), tuple(r.shape)) for a, r in zip(added or self.residuals, self.residuals, strict=True)
        ]
        if wrong := [i for i, (a, r) in enumerate(shapes) if a != r]:
            a, r = shapes[wrong[0]]
            raise ValueError(f"conversation {wrong[0]}: rows of shape {a} were given to add to residuals of shape {r}")

    def _predictions(self, added: Sequence[Tensor] | None = None, graph: bool = False) -> Iterator[Resumed]:
        """Batch by batch: which conversations, how many answer tokens each, and those tokens' predictions, one after another."""
        streams = self.residuals
        if added is not None:
            streams = [x + more.float() for x, more in zip(streams, added, strict=True)]
        return scoring.resumed(self.lm, self.sequences, self.layer, streams, self.batch_size, graph)

    def _targets(self, part: Resumed) -> Tensor:
        """The token ids that a batch's predictions are of."""
        said = [self.sequences[i].ids[-n:] for i, n in zip(part.rows, part.counts, strict=True)]
        return torch.tensor(sum(said, []), device=part.found.logits.device)

    def _kept(self, kind: str, added: Sequence[Tensor] | None, compute: Callable[[], Tensor], **more: Any) -> Tensor:
        """compute()'s numbers, kept on disk under all that they depend on."""
        reading.unhooked(self.lm)
        key = {
            "kind": kind,
            **self._key,
            "added": store.digest(torch.cat(list(added)).float()) if added is not None else "",
            **more,
        }
        return store.cached("patched", key, lambda: {"values": scoring.finite(compute(), self.lm)}, __name__)["values"]

    def _cached(
        self, kind: str, added: Sequence[Tensor] | None, compute: Callable[[], np.ndarray], **more: Any
    ) -> np.ndarray:
        """compute()'s numbers (conversations,), kept on disk."""
        return self._kept(kind, added, lambda: torch.from_numpy(compute()), **more).numpy()

    def log_probs(self, added: Sequence[Tensor] | None = None) -> np.ndarray:
        """log p of each conversation's answer given what stands before it, in nats: (conversations,) float64; cached on disk.

        `added`: what to add to each conversation's residuals, (tokens, d_model); None: nothing. ValueError for another shape.
        """
        self._check(added)

        def compute() -> np.ndarray:
            out = np.empty(len(self.sequences))
            for part in self._predictions(added):
                targets = self._targets(part)
                exact = scoring.exact_logits(self.lm, part.found, targets)
                each = scoring.token_log_probs(part.found.logits, targets, exact).double().cpu().split(part.counts)
                out[part.rows] = [float(p.sum()) for p in each]
            return out

        return self._cached("log p", added, compute)

    @cached_property
    def gradients(self) -> Tensor:
        """d log p of each conversation's answer / d residual of each token, (all tokens, d_model) float32, conversation after
        conversation; cached on disk. To first order the change of log p by rows added there is their product: see `first_order`."""

        def compute() -> Tensor:
            found: dict[int, Tensor] = {}
            for part in self._predictions(graph=True):
                with torch.enable_grad():
                    loss = cross_entropy(part.found.logits.float(), self._targets(part), reduction="sum")
                    (gradient,) = torch.autograd.grad(-loss, part.acts)
                for i, own in zip(part.rows, gradient.float().cpu(), strict=True):
                    found[i] = own[: len(self.residuals[i])]
            return torch.cat([found[i] for i in range(len(found))])

        return self._kept("gradients", None, compute)

    def first_order(self, added: Sequence[Tensor]) -> np.ndarray:
        """The change of `log_probs` (conversations,) by what is `added`, (tokens, d_model) each, to first order: gradient times rows.

        One backward pass serves any number of them; a few real runs say how far it holds.
        """
        self._check(added)
        products = (self.gradients.double() * torch.cat(list(added)).double()).sum(1)
        return np.array([float(p.sum()) for p in products.split([len(r) for r in self.residuals])])

    def kl(self, reference: "Runs", added: Sequence[Tensor] | None = None) -> np.ndarray:
        """KL(reference || this run) a token, mean over each answer's, in nats: (conversations,) float64; cached on disk.

        `reference`: the same conversations in another model, as that model predicts them; `added` as for `log_probs`.
        """
        self._check(added)
        _same(reference, self)
        reading.unhooked(reference.lm)
        words = [len(x.lm.unembedding.module.weight) for x in (self, reference)]
        if words[0] != words[1]:
            raise ValueError(f"models of {words[0]} and {words[1]} words were given: a KL wants one vocabulary")

        def compute() -> np.ndarray:
            out = np.empty(len(self.sequences))
            for rows, counts, given, _ in self._predictions(added):
                for i, own in zip(rows, given.logits.split(counts), strict=True):
                    out[i] = float(scoring.token_kl(reference.own[i].to(own.device), own).double().mean())
            return out

        return self._cached("KL", added, compute, reference=reference._key)

    @cached_property
    def own(self) -> list[Tensor]:
        """The log-probabilities (answer tokens, vocabulary) float32 of each conversation as the model gives them; kept in memory."""
        found: dict[int, Tensor] = {}
        for rows, counts, given, _ in self._predictions():
            found |= dict(zip(rows, (part.float().log_softmax(-1) for part in given.logits.split(counts)), strict=True))
        return [found[i] for i in range(len(found))]


def _same(one: Runs, other: Runs) -> None:
    """ValueError unless two models were given the same tokens."""
    if [t.ids for t in one.sequences] != [t.ids for t in other.sequences]:
        raise ValueError("the two models were given different tokens: make both from one tokenizer's conversations")


class Change(NamedTuple):
    """What a model's residuals differ by from another's: `rows` (changed tokens, d_model) float32 of all conversations, and where they
    belong, `there`, one (tokens,) bool a conversation."""

    rows: Tensor
    there: list[Tensor]

    def laid(self, rows: Tensor) -> list[Tensor]:
        """`rows` (changed tokens, d_model), these or what was made of them, as Runs want them: (tokens, d_model) a conversation, zero
        at tokens left alone. ValueError for another number of rows."""
        if len(rows) != len(self.rows):
            raise ValueError(f"{len(rows)} rows were given for {len(self.rows)} changed tokens: one each is wanted")
        parts = rows.float().cpu().split([int(t.sum()) for t in self.there])
        out = [torch.zeros(len(t), rows.shape[1]) for t in self.there]
        for whole, there, part in zip(out, self.there, parts, strict=True):
            whole[there] = part
        return out

    def at(self, roles: Sequence[int], sequences: Sequence[Tokens]) -> Tensor:
        """(changed tokens,) bool: the token's role is one of `roles`."""
        every = torch.cat([torch.tensor(t.roles) for t in sequences])[torch.cat(self.there)]
        return torch.isin(every, torch.tensor(list(roles)))


def difference(chat: Runs, base: Runs, limit: float = float("inf")) -> Change:
    """chat - base residuals at every token but the first and those longer than `limit` in either.

    ValueError if the two do not hold the same token ids.
    """
    _same(chat, base)
    there = []
    for a, b in zip(chat.residuals, base.residuals, strict=True):
        there.append(torch.maximum(a.norm(dim=1), b.norm(dim=1)) <= limit)
        there[-1][0] = False
    rows = torch.cat([(a - b)[t] for a, b, t in zip(chat.residuals, base.residuals, there, strict=True)])
    return Change(rows, there)


# --- two models on one set of conversations ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Both:
    """The same conversations in a model before training, `base`, and after it, `chat`, and their `change` token by token."""

    base: Runs
    chat: Runs
    change: Change

    @property
    def rows(self) -> Tensor:
        """The true differences (changed tokens, d_model)."""
        return self.change.rows

    @cached_property
    def spoken(self) -> Tensor:
        """(changed tokens, 1) bool: the token is the user's or the answer's, and none of the template's."""
        return self.change.at([USER, ANSWER], self.base.sequences)[:, None]

    def kl(self, rows: Tensor | None = None) -> np.ndarray:
        """KL(chat || base) in nats a token (conversations,), with `rows` (changed tokens, d_model) added to the base."""
        return self.base.kl(self.chat, None if rows is None else self.change.laid(rows))

    def recovered(self, rows: Tensor, groups: Sequence[str]) -> np.ndarray:
        """How much of that KL goes with `rows`, summed over each of the `groups` (conversations,)."""
        return stats.grouped(self.kl() - self.kl(rows), groups)

    @cached_property
    def shift(self) -> np.ndarray:
        """How far training moved the log-odds of each of `answers`' items, in nats (items,)."""
        return odds(self.chat.log_probs()) - odds(self.base.log_probs())

    def added(self, rows: Tensor) -> np.ndarray:
        """How far `rows`, added to the base, move the log-odds of `answers`' items, in nats (items,): real runs."""
        return odds(self.base.log_probs(self.change.laid(rows))) - odds(self.base.log_probs())

    def removed(self, rows: Tensor) -> np.ndarray:
        """How much of `shift` goes when `rows` are taken out of the chat model (items,): real runs."""
        return odds(self.chat.log_probs()) - odds(self.chat.log_probs(self.change.laid(-rows)))

    def first_order(self, rows: Tensor) -> np.ndarray:
        """`added` (items,) by the base model's gradient."""
        return odds(self.base.first_order(self.change.laid(rows)))

    def along(self, parts: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """`first_order` of the change's part along each direction alone: (n, items) for each of `parts` (n, d_model)."""
        every = torch.cat([q.double() for q in parts.values()])
        unit = every / every.norm(dim=1, keepdim=True).clamp_min(1e-300)
        gradient = self.base.gradients[torch.cat(self.change.there)].double()
        each = (self.rows.double() @ unit.T) * (gradient @ unit.T)
        of = torch.repeat_interleave(torch.tensor([int(t.sum()) for t in self.change.there]))
        sums = torch.zeros(len(self.change.there), len(every), dtype=torch.float64).index_add_(0, of, each)
        ends = np.cumsum([len(q) for q in parts.values()])[:-1]
        return dict(zip(parts, np.split(odds(sums.T.numpy()), ends), strict=True))


def both(base: LM, chat: LM, sequences: Sequence[Tokens], layer: int, limit: float = float("inf")) -> Both:
    """Both models' runs on conversations that either reads with the same tokens; rows longer than `limit` count as unchanged."""
    one, other = (Runs(model, sequences, layer) for model in (base, chat))
    return Both(one, other, difference(other, one, limit))


def said(base: LM, chat: LM, questions: Sequence[str], layer: int, max_new_tokens: int, limit: float) -> Both:
    """Both models on the chat model's own greedy replies to `questions`, one conversation each, in order."""
    answers = replies.generate_ids(chat, questions, max_new_tokens=max_new_tokens)
    asked = zip(questions, answers, strict=True)
    talks = [tokens.conversation(chat.tokenizer, q, a[a >= 0].tolist()) for q, a in asked]
    return both(base, chat, talks, layer, limit)


def answers(base: LM, chat: LM, items: Sequence[Item], layer: int, limit: float) -> Both:
    """Both models on items' matching and non-matching completions, in turn: what `odds` and the nats of `Both` are of."""
    lines = [tokens.chat(chat.tokenizer, i.question, answer=a) for i in items for a in (i.matching, i.non_matching)]
    return both(base, chat, lines, layer, limit)


def odds(log_probs: np.ndarray) -> np.ndarray:
    """Log-odds (..., items) from log-probabilities (..., 2 items) of matching and non-matching completions in turn."""
    return log_probs[..., 0::2] - log_probs[..., 1::2]


def of_whole(table: np.ndarray) -> np.ndarray:
    """Sums over units of a table (units, 1 + parts): each part's over that of the first column, the whole; (parts,)."""
    return table[:, 1:].sum(0) / table[:, 0].sum()


def moving(shifts: Mapping[str, np.ndarray]) -> list[str]:
    """The names whose mean shift over items (items,) is clear of zero, either way (95 %)."""
    found = {name: stats.over(x) for name, x in shifts.items()}
    return [name for name, x in found.items() if x.low > 0 or x.high < 0]
