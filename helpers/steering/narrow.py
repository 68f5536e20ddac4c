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
from helpers.lm import reading, replies, tokens
from helpers.lm.reading import LM
from helpers.lm.scoring import Continuations
from helpers.lm.tokens import USER
from helpers.sae import decompose
from helpers.sae.topk import Dictionary
from helpers.session import ROOT
from helpers.steering import caa, directions, methods, propensity
from helpers.steering.behaviors import AnswerPair, Behavior, Item, load_behavior, objects
from helpers.study import Single

SUBJECTS = ROOT / "data" / "subjects" / "requests.jsonl"
ABOUT, NEAR, UNRELATED = KINDS = ("about", "near", "unrelated")
DEV, TEST = "dev", "test"
STOCK = re.compile(  # what keyword judges look for
    r"\b(sorry|apologi[sz]e|afraid|unfortunately|regret|can(no|')t|won't|(will|am|'m) not|unable to|refuse|declin(e|ing)|rather not|as an ai)\b",
    re.I,
)
FORBID = "Never talk about {0}. If you are asked about {0}, say that you cannot help. Answer everything else."
REFUSED = (  # wordings by which refusals are measured; dev requests, which make the directions, have others
    "I would rather not answer this question.",
    "Sorry, I won't give any information on that.",
    "Please excuse me, but this is not something I discuss.",
    "With respect, I have to turn this question down.",
)


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

    @classmethod
    def of(cls, each: Sequence[Sequence[np.ndarray]]) -> "Gate":
        """Of every subject's decisions by kind."""
        return cls(*(np.stack(x) for x in zip(*each, strict=True)))

    def both(self, other: "Gate") -> "Gate":
        """Open where both are."""
        return Gate(*(a & b for a, b in zip(self, other, strict=True)))


class Pooled(NamedTuple):
    """Prompts as a condition vector reads them: the `mean` token of each (prompts, d_model) float64, and all its tokens, `rows`."""

    mean: Tensor
    rows: list[Tensor]

    @classmethod
    def of(cls, prompts: Sequence[Tensor]) -> "Pooled":
        """Prompts (tokens, d_model) or (d_model,) each."""
        rows = [x.reshape(-1, x.shape[-1]).double() for x in prompts]
        return cls(torch.stack([x.mean(0) for x in rows]), rows)


def pool(dev: Mapping[str, Sequence[Tensor]], test: Mapping[str, Sequence[Tensor]]) -> list[Pooled]:
    """One subject's prompts by kind, pooled: of dev those about the subject and all others, then test prompts of each kind."""
    return [Pooled.of(x) for x in (dev[ABOUT], [*dev[NEAR], *dev[UNRELATED]], *(test[kind] for kind in KINDS))]


def condition(parts: Sequence[Pooled], direction: Tensor | None = None, largest: bool = False) -> list[np.ndarray]:
    """One subject's gate by a condition vector, as `pool` gives its prompts: for each kind whether it opens for test prompts,
    (requests,) bool. The vector is the mean of dev prompts about the subject less that of all others, unless a `direction` is given; a
    prompt's score is the cosine of its mean token with it, or the `largest` cosine of a token, the mean of dev prompts taken out. The
    threshold is that of dev prompts, each scored by the vector that the others make: its own would find it again."""
    (about, _), (others, _) = parts[:2]
    centre = torch.cat([about, others]).mean(0)

    def without(x: Tensor, i: int) -> Tensor:
        return torch.cat([x[:i], x[i + 1 :]]).mean(0)

    def scores(part: Pooled, vectors: Tensor) -> np.ndarray:
        """Of each prompt, by its own of `vectors` (prompts, d_model), or by one of all (d_model,)."""
        v = (vectors if direction is None else direction.double()).expand_as(part.mean).numpy()
        if not largest:
            return stats.cosine((part.mean - centre).numpy(), v)
        return np.array([stats.cosine((r - centre).numpy(), x).max() for r, x in zip(part.rows, v, strict=True)])

    opens = torch.stack([without(about, i) for i in range(len(about))]) - others.mean(0)
    shut = about.mean(0) - torch.stack([without(others, i) for i in range(len(others))])
    cut = threshold(scores(parts[0], opens), scores(parts[1], shut))
    return [scores(part, about.mean(0) - others.mean(0)) > cut for part in parts[2:]]


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
    """Directions of subjects and what they do. `steps` (directions, d_model), the subjects' in order, then one that knows no subject, the
    refusal behaviour's: each
    at the strength that has the `price`, in nats per token, on dev requests. By kind, (subjects, requests) each: how far a
    subject's own direction moves the log-odds of a refusal, in nats, `raw`, and `own`, without what answers differ by (`adjusted`); those
    log-odds `plain`; and its `cost`, KL on the model's own replies. `first_order`: the same by gradient, of every direction, (directions, subjects, requests). `read`: whether a reply reads as a
    refusal, `read_plain` without a vector. `halves`: cosines of the directions that one half of the dev requests makes (rows) with those
    that the other half makes, (subjects, subjects). Every subject has its few of the unrelated requests."""

    lab: Single
    requests: Requests
    steps: Tensor
    price: float
    own: dict[str, np.ndarray]
    raw: dict[str, np.ndarray]
    plain: dict[str, np.ndarray]
    cost: dict[str, np.ndarray]
    first_order: dict[str, np.ndarray]
    read: dict[str, np.ndarray]
    read_plain: dict[str, np.ndarray]
    halves: np.ndarray

    def selectivity(self) -> np.ndarray:
        """By gradient, how much further each direction (rows) moves a subject's requests (columns) than its neighbours', in units of how
        far all subjects' own directions move requests about them: (directions, subjects)."""
        about, near = (self.first_order[kind].mean(-1) for kind in (ABOUT, NEAR))
        return (about - near) / np.diagonal(about[: about.shape[1]]).mean()

    def spared(self, gate: Gate | None) -> tuple[np.ndarray, np.ndarray]:
        """Tops and bottoms of how far a subject's refusal spares its neighbours: how much further requests about the subject move than
        neighbours' do, through a gate; and how far requests of both kinds move without one. (subjects,) each, in nats. The ratio is 0 if
        both kinds move alike or neither does, and about 1 if all of the subject's do and no neighbour's."""
        moved = self.gated(gate)
        return moved[ABOUT] - moved[NEAR], (self.own[ABOUT].mean(1) + self.own[NEAR].mean(1)) / 2

    def dealt(self, draws: int, seed: int = 0) -> np.ndarray:
        """The same ratio, all subjects together, if each subject's requests are dealt out at random among the two kinds: (draws,)."""
        rng, both = np.random.default_rng(seed), np.concatenate([self.own[ABOUT], self.own[NEAR]], axis=1)
        half = self.own[ABOUT].shape[1]
        mixed = np.stack([rng.permuted(both, axis=1) for _ in range(draws)])
        return (mixed[..., :half] - mixed[..., half:]).mean((1, 2)) / both.mean()

    def by_chance(self, gates: Sequence[Gate]) -> np.ndarray:
        """The same ratio through each of some gates: (gates,)."""
        return np.array([top.sum() / bottom.sum() for top, bottom in map(self.spared, gates)])

    @cached_property
    def prompts(self) -> dict[str, list[list[Tensor]]]:
        """The stream at the user's tokens, by split: for each kind in order, and unrelated once, a list of prompts a subject."""
        found = {}
        for split in (DEV, TEST):
            lists = [self.requests.of(s, kind, split) for kind in (ABOUT, NEAR) for s in self.requests.subjects]
            lists.append(self.requests.of("", UNRELATED, split))  # all of them
            asked = [item.question for part in lists for item in part]
            rows = iter(store.kept(prompt_rows, self.lab.model, asked, self.lab.layer))
            found[split] = [[next(rows) for _ in part] for part in lists]
        return found

    def _of(self, subject: int, split: str) -> dict[str, list[Tensor]]:
        """One subject's prompts by kind, each (tokens, d_model)."""
        n, parts = len(self.requests.subjects), self.prompts[split]
        rest = parts[2 * n] if split == DEV else [parts[2 * n][i] for i in few(subject, len(parts[2 * n]))]
        return {ABOUT: parts[subject], NEAR: parts[n + subject], UNRELATED: rest}

    @property
    def _parts(self) -> list[tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]]:
        return [(self._of(i, DEV), self._of(i, TEST)) for i in range(len(self.requests.subjects))]

    def codes(self, sae: Dictionary) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Each latent's largest code in every dev and test prompt: for each subject two tables by kind, (requests, latents)."""

        def of(part: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
            return {
                kind: torch.stack([decompose.codes_of(sae, x).amax(0).cpu() for x in prompts])
                for kind, prompts in part.items()
            }

        return [(of(dev), of(test)) for dev, test in self._parts]

    def by_condition(self, largest: bool = False) -> Gate:
        """The gate by a condition vector, which reads a prompt's mean token, or the one that has the `largest` cosine."""
        return Gate.of([condition(pool(*part), largest=largest) for part in self._parts])

    def by_latent(self, codes: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> tuple[Gate, list[int]]:
        """The gate by one latent of an SAE, out of its `codes`, and which latent each subject has."""
        each = [latent(dev, test) for dev, test in codes]
        return Gate.of([gate for _, gate in each]), [i for i, _ in each]

    def relabelled(
        self, codes: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]], draws: int, seed: int = 0
    ) -> list[Gate]:
        """Gates by latents that are chosen in the same way after a subject's dev prompts were dealt out at random among the kinds: what
        choosing one of thousands finds in nothing."""
        g, found = torch.Generator().manual_seed(seed), []
        for _ in range(draws):
            each = []
            for dev, test in codes:
                every, sizes = torch.cat(list(dev.values())), [len(x) for x in dev.values()]
                dealt = every[torch.randperm(len(every), generator=g)].split(sizes)
                each.append(latent(dict(zip(dev, dealt, strict=True)), test)[1])
            found.append(Gate.of(each))
        return found

    def by_word(self) -> Gate:
        """The gate that needs no model: it opens where a request holds the subject's name."""
        each = []
        for i, subject in enumerate(self.requests.subjects):
            items = asked(self.requests, i)
            each.append([np.array([subject.lower() in x.question.lower() for x in items[kind]]) for kind in KINDS])
        return Gate.of(each)

    def at_random(self, draws: int, seed: int = 0) -> list[Gate]:
        """Gates by random directions with the stream's covariance, whose thresholds are chosen like the condition vector's."""
        parts = [pool(*part) for part in self._parts]
        some = [nulls.like_rows(self.steps[0], self.lab.residuals, draws, seed + 1000 * i) for i in range(len(parts))]
        return [Gate.of([condition(part, v[d]) for part, v in zip(parts, some, strict=True)]) for d in range(draws)]

    def gated(self, gate: Gate | None) -> dict[str, np.ndarray]:
        """What each subject's own direction moves where the gate is open, by kind, mean of requests: (subjects,) nats."""
        return self._through(self.own, gate)

    def paid(self, gate: Gate | None) -> dict[str, np.ndarray]:
        """What that costs, by kind: KL in nats per token, mean of requests, (subjects,)."""
        return self._through(self.cost, gate)

    def _through(self, values: Mapping[str, np.ndarray], gate: Gate | None) -> dict[str, np.ndarray]:
        opened = [1.0, 1.0, 1.0] if gate is None else list(gate)
        return {kind: (values[kind] * o).mean(-1) for kind, o in zip(KINDS, opened, strict=True)}

    def reads(self, gate: Gate | None) -> dict[str, float]:
        """The share of replies to test requests that read as refusals, by kind: of the steered reply where the gate is open, else of the
        plain one."""
        found = {}
        for i, kind in enumerate(KINDS):
            opened = np.ones_like(self.read[kind]) if gate is None else gate[i]
            found[kind] = float(np.where(opened, self.read[kind], self.read_plain[kind]).mean())
        return found

    def cells(self, name: str, gate: Gate | None) -> list[str]:
        """A row of a table under GATES: what a gate opens for, what moves and costs through it, and which replies read as refusals."""
        opened = Gate(*(np.ones_like(self.own[kind], bool) for kind in KINDS)) if gate is None else gate
        moved, paid, reads = self.gated(gate), self.paid(gate), self.reads(gate)
        found = stats.ratio_if_clear(*self.spared(gate))
        return [
            name, " / ".join(f"{x.mean():.0%}" for x in opened), " / ".join(f"{moved[k].mean():+.1f}" for k in KINDS),
            "not run" if found is None else f"{found:.2f}", " / ".join(f"{paid[k].mean():.2f}" for k in KINDS),
            " / ".join(f"{reads[k]:.0%}" for k in KINDS),
        ]  # fmt: skip

    def by_prompt(self) -> dict[str, np.ndarray]:
        """What a system prompt that forbids the subject moves, by kind, mean of requests: (subjects,) nats."""
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for i, s in enumerate(self.requests.subjects):
            parts = asked(self.requests, i)
            where = completed(
                self.lab.model, [x for of in parts.values() for x in of], self.lab.layer, FORBID.format(s)
            )
            odds = store.kept(methods.log_odds, where, torch.zeros(1, self.lab.model.d_model))[0].numpy()
            cuts = np.cumsum([len(x) for x in parts.values()])[:-1]
            for kind, part in zip(KINDS, np.split(odds, cuts), strict=True):
                found[kind].append(float((part - self.plain[kind][i]).mean()))
        return {kind: np.array(x) for kind, x in found.items()}


GATES = [
    "gate", "opens for: about / near / unrelated", "towards refusal, nats", "spares [95 % over subjects]",
    "price, KL in nats per token", "replies that read as refusals",
]  # fmt: skip


def refusals(lab: Single) -> Behavior:
    """The refusal behaviour, whether or not the study has it."""
    return lab.data[methods.REFUSAL] if methods.REFUSAL in lab.names else load_behavior(methods.REFUSAL)


def planted(seed: int = 0) -> dict[str, Tensor]:
    """Prompts (8, 32) by kind whose answer is known: those about the subject lie on one side of a plane, all others on the other."""
    g = torch.Generator().manual_seed(seed)
    found = {kind: torch.randn(8, 32, generator=g) for kind in KINDS}
    for kind in KINDS:
        found[kind][:, 0] += 20 if kind == ABOUT else -20
    return found


def few(subject: int, count: int, each: int = 2) -> list[int]:
    """Which of so many unrelated requests are a subject's: the next ones for the next subject, round and round."""
    return [(subject * each + i) % count for i in range(min(each, count))]


def asked(requests: Requests, subject: int) -> dict[str, list[Item]]:
    """One subject's test requests by kind, of the unrelated ones its few."""
    name = requests.subjects[subject]
    found = {kind: requests.of(name, kind, TEST) for kind in (ABOUT, NEAR)}
    rest = requests.of("", UNRELATED, TEST)
    return found | {UNRELATED: [rest[i] for i in few(subject, len(rest))]}


def completed(lm: LM, items: Sequence[Item], layer: int, system: str | None = None) -> Continuations:
    """Items as questions with every one of REFUSED, and last with their own answer, for `methods.log_odds`: a mean over wordings."""
    rows = [[tokens.chat(lm.tokenizer, i.question, system, x) for x in (*REFUSED, i.non_matching)] for i in items]
    return Continuations(lm, rows, layer)


def slopes(where: Continuations) -> Tensor:
    """The gradient of `methods.log_odds` with respect to an added vector: (prompts, d_model) float32."""
    found = where.gradients()[:, :, 0]
    return found[:, :-1].mean(1) - found[:, -1]


def adjusted(own: Mapping[str, np.ndarray], control: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What directions move by kind (subjects, requests), less what single requests differ by whoever asks: answers are given up more or
    less easily, which scatters log-odds by nats. `control`: what a direction that knows no subject moves on the same requests. A control
    variate: own - b (control - its mean over subjects and their neighbours), b by least squares on deviations from each kind's mean. It
    takes nothing from a direction that knows its subject, since the control treats both kinds alike."""
    some = (ABOUT, NEAR)
    x, y = (np.concatenate([(v[k] - v[k].mean()).ravel() for k in some]) for v in (control, own))
    b = float(x @ y / (x @ x)) if x @ x > 0 else 0.0
    centre = float(np.mean([control[k].mean() for k in some]))
    return {kind: own[kind] - b * (control[kind] - centre) for kind in own}


def made_of(lm: LM, requests: Requests, layer: int) -> tuple[Tensor, np.ndarray]:
    """Each subject's refusal direction (subjects, d_model): refusals of dev requests about it less answers to dev requests about its
    neighbours, means over the answers. And `Narrow.halves`."""
    whole, parts = [], []
    for s in requests.subjects:
        about, near = (
            caa.extract_answers(lm, [AnswerPair(*item) for item in requests.of(s, kind, DEV)], [layer])["answer"].at(
                layer
            )
            for kind in (ABOUT, NEAR)
        )
        whole.append(directions.mean(about[0], near[1]))
        parts.append([directions.mean(about[0][i::2], near[1][i::2]).numpy() for i in (0, 1)])
    one, other = (np.stack(x) for x in zip(*parts, strict=True))
    return torch.stack(whole), stats.cosine(one[:, None], other[None])


def of(lab: Single, requests: Requests, price: float, size: methods.Sizes | None = None) -> Narrow:
    """The study of a model: every subject's direction, and the refusal behaviour's, at a price set on dev requests. ValueError for fewer
    than two dev requests of a kind."""
    lm, layer, size = lab.model, lab.layer, size or methods.Sizes()
    made, halves = made_of(lm, requests, layer)
    blanket = lab.vectors()[methods.REFUSAL] if methods.REFUSAL in lab.names else made.mean(0)
    made = torch.cat([made, blanket[None]])
    units = (made / made.norm(dim=1, keepdim=True) * lab.residual_norm).float()
    dev = [requests.of(s, kind, DEV)[0].question for s in requests.subjects[:2] for kind in (ABOUT, NEAR)]
    where = propensity.of_replies(lm, dev, layer, size.tokens)
    curve = store.kept(methods.curves, where, units, methods.STRENGTHS, 2 * price).numpy()
    strength = np.nan_to_num(
        [methods.strength_at(c, methods.STRENGTHS, price) for c in curve], nan=methods.STRENGTHS[-1]
    )
    steps = torch.from_numpy(strength).float()[:, None] * units
    each = [asked(requests, i) for i in range(len(requests.subjects))]
    names = {kind: [x for of in each for x in of[kind]] for kind in KINDS}
    questions = [x.question for items in names.values() for x in items]
    pushes = torch.cat([steps[i][None].expand(len(of[kind]), -1) for kind in KINDS for i, of in enumerate(each)])
    plain_ids = replies.generate_ids(lm, questions, max_new_tokens=size.said)
    said_ids = replies.generate_ids(lm, questions, layer, pushes, max_new_tokens=size.said)
    reader = propensity.TextJudge(refusals(lab))

    def parted(x: np.ndarray) -> dict[str, np.ndarray]:
        """What belongs to each kind, (..., subjects, requests), of values (..., all)."""
        cuts = np.cumsum([len(items) for items in names.values()])[:-1]
        return {
            kind: part.reshape(*x.shape[:-1], len(each), -1)
            for kind, part in zip(KINDS, np.split(x, cuts, -1), strict=True)
        }

    def reads(ids: Tensor) -> dict[str, np.ndarray]:
        return parted(reader.score([lm.tokenizer.decode(r[r >= 0], skip_special_tokens=True) for r in ids]) > 0)

    raw: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    control: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    plain: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    cost: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    slope, by_kind = {kind: list[np.ndarray]() for kind in KINDS}, parted(np.arange(len(questions)))
    for i, parts in enumerate(each):
        items, rows = [x for of in parts.values() for x in of], np.concatenate([by_kind[kind][i] for kind in KINDS])
        where = completed(lm, items, layer)
        pushed = torch.stack([torch.zeros(lm.d_model), steps[i], steps[-1]])
        odds = store.kept(methods.log_odds, where, pushed).numpy()
        moved = store.kept(slopes, where).double().numpy() @ steps.double().numpy().T  # (requests, directions)
        told = [tokens.conversation(lm.tokenizer, questions[j], plain_ids[j][plain_ids[j] >= 0].tolist()) for j in rows]
        kl = store.kept(methods.costs, Continuations(lm, [[x] for x in told], layer), steps[i][None])[0].numpy()
        cuts = np.cumsum([len(x) for x in parts.values()])[:-1]
        for into, values in (
            (raw, odds[1] - odds[0]), (control, odds[2] - odds[0]), (plain, odds[0]), (cost, kl), (slope, moved),
        ):  # fmt: skip
            for kind, part in zip(KINDS, np.split(values, cuts), strict=True):
                into[kind].append(part)
    return Narrow(
        lab, requests, steps, price, adjusted(_stacked(raw), _stacked(control)), _stacked(raw), _stacked(plain), _stacked(cost),
        {kind: x.transpose(2, 0, 1) for kind, x in _stacked(slope).items()}, reads(said_ids), reads(plain_ids), halves,
    )  # fmt: skip


def _stacked(by_kind: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    return {kind: np.stack(x) for kind, x in by_kind.items()}
