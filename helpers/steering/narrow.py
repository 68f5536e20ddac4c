"""Refusing one subject and not its neighbours: directions of subjects, gates that open for some prompts, and what both cost.

    requests = narrow.load(); study = narrow.of(lab, requests, price=0.3)

A refusal is measured as the log-odds of a written refusal against a written answer, in nats, never by stock phrases, which miss many
refusals (`stock`). Directions, thresholds and latents come from dev requests, everything else from test requests, whose refusals are
worded otherwise. A gate decides once for a prompt, from the stream at the user's tokens (CAST, Lee et al. 2024,
arXiv:2409.05907): where it stays shut nothing is added, so that effect and price there are zero.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers import nulls, stats, store
from helpers.entries import DataError
from helpers.lm import reading, tokens
from helpers.lm.reading import LM
from helpers.lm.tokens import USER
from helpers.sae import decompose
from helpers.sae.topk import Dictionary
from helpers.session import ROOT
from helpers.steering import caa, directions, methods, propensity
from helpers.steering.behaviors import AnswerPair, Item, objects
from helpers.study import Single

SUBJECTS = ROOT / "data" / "subjects" / "requests.jsonl"
ABOUT, NEAR, UNRELATED = KINDS = ("about", "near", "unrelated")
DEV, TEST = "dev", "test"
STOCK = re.compile(
    r"\b(sorry|apologi[sz]e|can(no|')t (help|assist|answer|provide)|unable to|not able to|refuse|decline|as an ai)\b",
    re.I,
)
BLANKET = "the refusal behaviour's"  # the direction that knows no subject


# --- requests ------------------------------------------------------------------------------------------------------------


class Requests(NamedTuple):
    """Requests by subject, kind of KINDS and split: `items` ["chess", "about", "dev"]; matching is the refusal, non-matching the answer.
    Unrelated ones belong to every subject alike."""

    items: dict[tuple[str, str, str], list[Item]]
    subjects: list[str]

    def of(self, subject: str, kind: str, split: str) -> list[Item]:
        """Those of a subject, kind and split."""
        return self.items["" if kind == UNRELATED else subject, kind, split]

    def trimmed(self, subjects: int, requests: int) -> "Requests":
        """The first subjects, and of each kind and split the first requests: for a fast run."""
        kept = self.subjects[:subjects]
        return Requests({k: x[:requests] for k, x in self.items.items() if k[0] in ("", *kept)}, kept)


def load(path: Path = SUBJECTS) -> Requests:
    """The requests of a file: JSON lines of subject, kind, split, question, answer and refusal. DataError says which line is wrong, and
    which part of a subject is missing."""
    items: dict[tuple[str, str, str], list[Item]] = {}
    for place, row in objects(path):
        keys = ("subject", "kind", "split", "question", "answer", "refusal")
        subject, kind, split, question, answer, refusal = (row.get(k) for k in keys)
        texts = (subject, kind, split, question, answer, refusal)
        if not all(isinstance(x, str) for x in texts) or kind not in KINDS or split not in (DEV, TEST):
            raise DataError(f"{place}: {', '.join(keys)} are wanted, kind one of {', '.join(KINDS)}, split dev or test")
        key = (str(subject), str(kind), str(split))
        items.setdefault(key, []).append(Item(str(question), str(refusal), str(answer)))
    subjects = list(dict.fromkeys(s for s, kind, _ in items if kind != UNRELATED))
    found = Requests(items, subjects)
    for subject in subjects:
        for kind in KINDS:
            for split in (DEV, TEST):
                if ("" if kind == UNRELATED else subject, kind, split) not in items:
                    raise DataError(f"{path.name}: {subject} has no requests of kind {kind}, split {split}")
    return found


def stock(texts: Sequence[str]) -> np.ndarray:
    """Whether each text holds a stock phrase of refusals: what a keyword judge sees. (n,) bool."""
    return np.array([bool(STOCK.search(x)) for x in texts])


# --- gates ---------------------------------------------------------------------------------------------------------------


def threshold(opens: np.ndarray, shut: np.ndarray) -> float:
    """The threshold that best parts the scores at which a gate should open from those at which it should stay shut: midway between two
    scores, the largest share of the one above it less the share of the other (Youden); of several, the one in the widest gap."""
    both = np.sort(np.concatenate([opens, shut]))
    cuts = np.concatenate([[both[0] - 1], (both[1:] + both[:-1]) / 2])
    width = np.concatenate([[0.0], np.diff(both)])
    good = (opens > cuts[:, None]).mean(1) - (shut > cuts[:, None]).mean(1)
    best = np.flatnonzero(good >= good.max() - 1e-9)
    return float(cuts[best[width[best].argmax()]])


class Gate(NamedTuple):
    """Which prompts it opens for, by subject's number and kind: bool (subjects, requests)."""

    about: np.ndarray
    near: np.ndarray
    unrelated: np.ndarray

    def both(self, other: "Gate") -> "Gate":
        """Open where both are."""
        return Gate(*(a & b for a, b in zip(self, other, strict=True)))


def condition(
    dev: Mapping[str, Tensor], test: Mapping[str, Tensor], direction: Tensor | None = None
) -> list[np.ndarray]:
    """One subject's gate by a condition vector: for each kind whether it opens for test prompts, (requests,) bool. Prompts (requests,
    d_model) by kind. The vector is the mean of dev prompts about the subject less that of all others, unless a `direction` is given; a
    prompt's score is its cosine with it, all less the mean of dev prompts; the threshold is that of dev prompts."""
    others = torch.cat([dev[NEAR], dev[UNRELATED]]).double()
    about = dev[ABOUT].double()
    centre = torch.cat([about, others]).mean(0)
    v = (about.mean(0) - others.mean(0) if direction is None else direction).numpy()

    def score(x: Tensor) -> np.ndarray:
        return stats.cosine((x.double() - centre).numpy(), v)

    cut = threshold(score(about), score(others))
    return [score(test[kind]) > cut for kind in KINDS]


def latent(dev: Mapping[str, Tensor], test: Mapping[str, Tensor]) -> tuple[int, list[np.ndarray]]:
    """One subject's gate by a single latent, and which: the one that tells dev prompts apart best (Youden, then the distance of the means
    in spreads). Codes (requests, latents) by kind, the largest over a prompt's tokens."""
    about, others = dev[ABOUT].numpy(), torch.cat([dev[NEAR], dev[UNRELATED]]).numpy()
    cuts = (about.mean(0) + others.mean(0)) / 2
    good = (about > cuts).mean(0) - (others > cuts).mean(0)
    apart = (about.mean(0) - others.mean(0)) / (np.concatenate([about, others]).std(0) + 1e-6)
    best = int(np.lexsort((apart, good))[-1])
    cut = threshold(about[:, best], others[:, best])
    return best, [test[kind][:, best].numpy() > cut for kind in KINDS]


# --- the study -----------------------------------------------------------------------------------------------------------


def prompt_rows(lm: LM, questions: Sequence[str], layer: int) -> list[Tensor]:
    """The stream (tokens, d_model) float32 after a layer at the user's tokens of each prompt."""
    laid = [tokens.chat(lm.tokenizer, q) for q in questions]
    streams = reading.residuals(lm, laid, layer)
    return [x[torch.tensor(one.roles) == USER] for x, one in zip(streams, laid, strict=True)]


@dataclass(frozen=True, eq=False)
class Narrow:
    """Directions of subjects and what they do. `steps` (directions, d_model), the subjects' in order and BLANKET last where there is one:
    each at its strength, which on dev prompts has the `price` in nats per token. `about`, `near` (directions, subjects, requests) and
    `unrelated` (directions, requests): how far each moves the log-odds of a refusal, in nats; `plain`, the log-odds without, by kind,
    (subjects, requests) or (requests,). `cost`: KL on the model's own replies to test requests, by kind, of each subject's own direction
    (subjects, requests)."""

    lab: Single
    requests: Requests
    steps: Tensor
    price: float
    about: np.ndarray
    near: np.ndarray
    unrelated: np.ndarray
    plain: dict[str, np.ndarray]
    cost: dict[str, np.ndarray]
    split_halves: np.ndarray
    layer: int

    @property
    def own(self) -> dict[str, np.ndarray]:
        """What each subject's own direction moves, by kind (subjects, requests)."""
        each = np.arange(len(self.requests.subjects))
        return {ABOUT: self.about[each, each], NEAR: self.near[each, each], UNRELATED: self.unrelated[each]}

    @property
    def cosines(self) -> np.ndarray:
        """Cosines of the subjects' directions with one another, (subjects, subjects)."""
        v = self.steps[: len(self.requests.subjects)].double().numpy()
        return stats.cosine(v[:, None], v[None])

    def selectivity(self) -> np.ndarray:
        """How much further each direction (rows) moves a subject's (columns) requests than its neighbours', as a share of the former, mean
        of all directions' for that subject: (directions, subjects)."""
        about, near = self.about.mean(-1), self.near.mean(-1)
        return (about - near) / about.mean(0)

    @cached_property
    def prompts(self) -> dict[str, list[list[Tensor]]]:
        """The stream at the user's tokens, by split: for each kind in order, and unrelated once, a list of prompts a subject."""
        found = {}
        for split in (DEV, TEST):
            lists = [self.requests.of(s, kind, split) for kind in (ABOUT, NEAR) for s in self.requests.subjects]
            lists.append(self.requests.of("", UNRELATED, split))
            asked = [item.question for part in lists for item in part]
            rows = iter(store.kept(prompt_rows, self.lab.model, asked, self.layer))
            found[split] = [[next(rows) for _ in part] for part in lists]
        return found

    def _of(self, subject: int, split: str, pool: str, sae: Dictionary | None = None) -> dict[str, Tensor]:
        """One subject's prompts by kind, each a row: the mean of its tokens, or the largest code."""
        n, parts = len(self.requests.subjects), self.prompts[split]
        chosen = {ABOUT: parts[subject], NEAR: parts[n + subject], UNRELATED: parts[2 * n]}
        if sae is None:
            return {kind: torch.stack([x.mean(0) for x in part]) for kind, part in chosen.items()}
        return {
            kind: torch.stack([decompose.codes_of(sae, x).amax(0).cpu() for x in part]) for kind, part in chosen.items()
        }

    def by_condition(self) -> Gate:
        """The gate by a condition vector."""
        each = [
            condition(self._of(i, DEV, "mean"), self._of(i, TEST, "mean")) for i in range(len(self.requests.subjects))
        ]
        return Gate(*(np.stack(x) for x in zip(*each, strict=True)))

    def by_latent(self, sae: Dictionary) -> tuple[Gate, list[int]]:
        """The gate by one latent of an SAE, and which latent each subject has."""
        each = [
            latent(self._of(i, DEV, "max", sae), self._of(i, TEST, "max", sae))
            for i in range(len(self.requests.subjects))
        ]
        return Gate(*(np.stack(x) for x in zip(*(gate for _, gate in each), strict=True))), [i for i, _ in each]

    def at_random(self, draws: int, seed: int = 0) -> list[Gate]:
        """Gates by random directions with the stream's covariance, whose thresholds are chosen like the condition vector's."""
        parts = [(self._of(i, DEV, "mean"), self._of(i, TEST, "mean")) for i in range(len(self.requests.subjects))]
        some = [nulls.like_rows(self.steps[0], self.lab.residuals, draws, seed + 1000 * i) for i in range(len(parts))]
        found = []
        for d in range(draws):
            each = [condition(dev, test, v[d]) for (dev, test), v in zip(parts, some, strict=True)]
            found.append(Gate(*(np.stack(x) for x in zip(*each, strict=True))))
        return found

    def gated(self, gate: Gate | None) -> dict[str, np.ndarray]:
        """What each subject's own direction moves where the gate is open, by kind, mean of requests: (subjects,) nats."""
        return self._through(self.own, gate)

    def paid(self, gate: Gate | None) -> dict[str, np.ndarray]:
        """What that costs, by kind: KL in nats per token, mean of requests, (subjects,)."""
        return self._through(self.cost, gate)

    def _through(self, values: Mapping[str, np.ndarray], gate: Gate | None) -> dict[str, np.ndarray]:
        opened = [1.0, 1.0, 1.0] if gate is None else list(gate)
        return {kind: (values[kind] * o).mean(-1) for kind, o in zip(KINDS, opened, strict=True)}

    def refused(self, gate: Gate | None) -> dict[str, float]:
        """The share of test requests whose refusal is likelier than their answer, by kind."""
        opened = [1.0, 1.0, 1.0] if gate is None else list(gate)
        return {
            kind: float((self.plain[kind] + self.own[kind] * o > 0).mean())
            for kind, o in zip(KINDS, opened, strict=True)
        }

    def by_prompt(self) -> dict[str, np.ndarray]:
        """What a system prompt that forbids the subject moves, by kind, mean of requests: (subjects,) nats."""
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for s in self.requests.subjects:
            system = (
                f"Never talk about {s}. If you are asked about {s}, say that you cannot help. Answer everything else."
            )
            items = {kind: self.requests.of(s, kind, TEST) for kind in KINDS}
            moved = methods.under_prompt(self.lab.model, [x for of in items.values() for x in of], self.layer, system)
            for kind, part in zip(
                KINDS, np.split(moved, np.cumsum([len(x) for x in items.values()])[:-1]), strict=True
            ):
                found[kind].append(float(part.mean()))
        return {kind: np.array(x) for kind, x in found.items()}


def ratio_by_chance(found: Narrow, gates: Sequence[Gate]) -> np.ndarray:
    """How far a subject's refusal reaches its neighbours under each gate, as a share of the subject's own, all subjects together: (gates,).
    A gate that opens for nothing has 1: it spares nobody who is not spared anyway."""
    out = []
    for gate in gates:
        moved = found.gated(gate)
        bottom = moved[ABOUT].sum()
        out.append(moved[NEAR].sum() / bottom if abs(bottom) > 1e-9 else 1.0)
    return np.array(out)


def made_of(lm: LM, requests: Requests, layer: int) -> tuple[Tensor, np.ndarray]:
    """Each subject's refusal direction (subjects, d_model): refusals of dev requests about it less answers to dev requests about its
    neighbours, means over the answers. And the cosine of the two that halves of the requests give, (subjects,)."""
    whole, halves = [], []
    for s in requests.subjects:
        sides = []
        for kind in (ABOUT, NEAR):
            pairs = [AnswerPair(*item) for item in requests.of(s, kind, DEV)]
            sides.append(caa.extract_answers(lm, pairs, [layer])["answer"].at(layer))
        refusals, answers = sides[0][0], sides[1][1]
        whole.append(directions.mean(refusals, answers))
        one, other = (directions.mean(refusals[i::2], answers[i::2]).numpy() for i in (0, 1))
        halves.append(float(stats.cosine(one, other)))
    return torch.stack(whole), np.array(halves)


def of(lab: Single, requests: Requests, price: float, sizes: methods.Sizes | None = None) -> Narrow:
    """The study of a model: every subject's direction, and the refusal behaviour's, at a price set on dev requests."""
    lm, layer, sizes = lab.model, lab.layer, sizes or methods.Sizes()
    made, split_halves = made_of(lm, requests, layer)
    if "refusal" in lab.names:
        made = torch.cat([made, lab.vectors()["refusal"][None]])
    units = (made / made.norm(dim=1, keepdim=True) * lab.residual_norm).float()
    dev = [x.question for s in requests.subjects[:2] for kind in (ABOUT, NEAR) for x in requests.of(s, kind, DEV)[:1]]
    where = propensity.of_replies(lm, dev, layer, sizes.tokens)
    grid = store.kept(methods.prices, where, units, methods.STRENGTHS).numpy()
    raw = [methods.strength_at(g, methods.STRENGTHS, price) for g in grid]
    steps = torch.from_numpy(np.nan_to_num(raw, nan=methods.STRENGTHS[-1])).float()[:, None] * units
    lists = [requests.of(s, kind, TEST) for kind in (ABOUT, NEAR) for s in requests.subjects]
    lists.append(requests.of("", UNRELATED, TEST))
    asked = propensity.of_items(lm, [x for part in lists for x in part], layer)
    odds = store.kept(methods.log_odds, asked, torch.cat([torch.zeros(1, lm.d_model), steps])).numpy()
    n, size, few = len(requests.subjects), len(lists[0]), len(lists[-1])
    moved = odds[1:] - odds[0]

    def parted(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        about, near, unrelated = np.split(x, [n * size, 2 * n * size], axis=-1)
        lead = x.shape[:-1]
        return about.reshape(*lead, n, size), near.reshape(*lead, n, size), unrelated.reshape(*lead, few)

    cost: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for i, s in enumerate(requests.subjects):
        for kind in KINDS:
            questions = [x.question for x in requests.of(s, kind, TEST)]
            own = propensity.of_replies(lm, questions, layer, sizes.tokens)
            cost[kind].append(store.kept(costs, own, steps[i]))
    plain = dict(zip(KINDS, parted(odds[0]), strict=True))
    return Narrow(
        lab, requests, steps, price, *parted(moved), plain, {k: np.stack(x) for k, x in cost.items()}, split_halves, layer
    )  # fmt: skip


def costs(where: propensity.Continuations, vector: Tensor) -> np.ndarray:
    """KL(unsteered || steered) in nats per token of each reply under a vector (d_model,): (replies,)."""
    return where.kl(vector).mean(-1)
