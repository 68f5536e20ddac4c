"""Ways to make a steering vector, each a function of one signature, and a benchmark that sets them to equal price.

    board = methods.benchmark(lab, methods.METHODS, prices=(0.1, 0.3, 1.0), judged=0.3)

A method is a function of a `Given`, all that is known of one behaviour without its test items. It returns a vector, which is added
after the layer at every response token; or system prompts, of which dev items choose one; or None where something is missing. Your
own gets a row of every table: `benchmark(lab, METHODS | {"mine": mine})`.

The price is KL(unsteered || steered) in nats per token of the model's own replies: it is set on dev prompts by a vector's length,
and what is bought is measured on test items. The effect on a behaviour is the change of its log-odds over their standard deviation
over test items, since completions of any length compare in no other unit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from IPython.display import Markdown
from torch import Tensor

from helpers import nulls, session, stats, store, study
from helpers.claims import table
from helpers.comparisons import estimated
from helpers.lm import reading, replies, scoring, text, tokens
from helpers.lm.reading import LM
from helpers.lm.scoring import Continuations
from helpers.lm.tokens import ANSWER, Tokens
from helpers.pair import diff
from helpers.pair.bank import Bank
from helpers.sae import decompose
from helpers.stats import Interval
from helpers.steering import directions, propensity
from helpers.steering.behaviors import AnswerPair, Item, SystemPair, load_behavior
from helpers.study import Single

REFUSAL = "refusal"  # the behaviour by which refusals are known
LATENTS = 16  # rows of a dictionary that stand for a vector
CANDIDATES = 2  # system prompts among which dev items choose
TRAINED = "own.0"  # of `bank.KINDS`: trained on the pairs that the mean difference is made of
RANDOM, OTHER, PROMPT, MEAN, PREFERENCE = (
    "random",
    "another behaviour's",
    "system prompt",
    "mean difference",
    "trained by preference",
)
CONTROLS = (RANDOM, OTHER)
STRENGTHS = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)  # residual norms at which the price is measured, to be interpolated
REPEATED = 0.5  # share of a reply's pairs of tokens that stood in it before, from which on it is no language


# --- methods -------------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """What a method may use: both sides (pairs, d_model) of a behaviour's answer pairs, its system pairs, the mean differences
    (behaviours - 1, d_model) of other behaviours; rows (latents, d_model) of the SAE and of the diff-SAE, and a vector trained by
    preference (d_model,), each None where there is none."""

    name: str
    pos: Tensor
    neg: Tensor
    prompts: list[SystemPair]
    others: Tensor
    sae: Tensor | None
    diff: Tensor | None
    trained: Tensor | None
    seed: int


Made = Tensor | Sequence[str] | None
Method = Callable[[Given], Made]


def mean(given: Given) -> Made:
    """CAA: the mean difference of the pairs."""
    return directions.mean(given.pos, given.neg)


def component(given: Given) -> Made:
    """The first principal component of the differences, their mean taken out."""
    return directions.pc1_centred(given.pos, given.neg)


def probe(given: Given) -> Made:
    """The weights of a logistic probe."""
    return directions.logistic(given.pos, given.neg)


def preference(given: Given) -> Made:
    """A vector trained by preference on the same pairs."""
    return given.trained


def pursuit(given: Given) -> Made:
    """What LATENTS rows of the SAE, with signs, make of the mean difference."""
    return _rebuilt(given.sae, given)


def diff_latents(given: Given) -> Made:
    """What as many rows of the diff-SAE make of it."""
    return _rebuilt(given.diff, given)


def prompt(given: Given) -> Made:
    """System prompts that ask for the behaviour."""
    return [pair.positive for pair in given.prompts[:CANDIDATES]]


def random(given: Given) -> Made:
    """A random direction: the null."""
    return nulls.random(directions.mean(given.pos, given.neg), 1, given.seed)[0]


def other(given: Given) -> Made:
    """The mean difference of another behaviour: the other null."""
    return given.others[0] if len(given.others) else None


def _rebuilt(rows: Tensor | None, given: Given) -> Tensor | None:
    if rows is None:
        return None
    v = directions.mean(given.pos, given.neg)
    return decompose.pursuit(rows, v[None], min(LATENTS, len(rows))).reconstruction[0].double()


METHODS: dict[str, Method] = {
    MEAN: mean,
    "centred component": component,
    "logistic probe": probe,
    PREFERENCE: preference,
    "pursuit in the SAE": pursuit,
    "pursuit in the diff-SAE": diff_latents,
    PROMPT: prompt,
    RANDOM: random,
    OTHER: other,
}


def given(lab: Single, seed: int = 0) -> dict[str, Given]:
    """What methods get of each behaviour. What a profile's sections `sae:` and `pair:` give is missing without them, and where a diff-SAE
    is of another layer, or the bank of another model."""
    profile, section = lab.session.profile, lab.session.profile.pair
    sae = decompose.rows_of(lab.sae(seed).sae) if profile.sae else None
    settled = diff.settled(profile) if section and profile.sae else profile
    trained = bool(settled.sae and settled.sae.train and not (section and section.diff and section.diff.stream))
    here = bool(section and trained and settled.layer == lab.layer)
    rows = study.diff_latents(lab, seed) if here else None
    bank = Bank(session.path(section.bank), section.base) if section and section.bank else None
    paths = bank.paths if bank and bank.base == profile.chat else {}
    halves, vectors = lab.halves(), lab.vectors()
    found = {}
    for i, (n, h) in enumerate(halves.items()):
        after = [*lab.names[i + 1 :], *lab.names[:i]]
        others = torch.stack([vectors[m] for m in after]) if after else vectors[n].new_zeros(0, lab.model.d_model)
        path = paths.get(f"{n}.{TRAINED}")
        found[n] = Given(
            n, *h.at(lab.layer), lab.data[n].system_pairs, others, sae, rows,
            None if path is None else path[-1], seed + i,
        )  # fmt: skip
    return found


# --- what is measured ----------------------------------------------------------------------------------------------------


def log_odds(where: Continuations, vectors: Tensor) -> Tensor:
    """Mean log p of all completions but the last, less log p of the last, in nats, under each of `vectors` (n, d_model): (n, prompts)
    float64. Of two completions a prompt, the log-odds of the one against the other."""
    logp = torch.from_numpy(where.log_probs_under(vectors))
    return logp[..., :-1].mean(2) - logp[..., -1]


def losses(where: Continuations, vectors: Tensor) -> Tensor:
    """Cross-entropy of single completions in nats per token under each of `vectors` (n, d_model): (n, prompts) float64."""
    count = torch.from_numpy(where.lengths())
    return -(torch.from_numpy(where.log_probs_under(vectors)) / count).mean(2)


def costs(where: Continuations, vectors: Tensor) -> Tensor:
    """KL(unsteered || steered) in nats per token of each reply under `vectors` (n, d_model): (n, replies) float64."""
    return torch.from_numpy(where.kl_under(vectors)).mean(2)


def curves(where: Continuations, steps: Tensor, strengths: Sequence[float], enough: float) -> Tensor:
    """The same, mean of replies, at each of `strengths`, which rise from 0, along `steps` (n, d_model): (n, strengths) float64. Once it is
    `enough`, the rest is not run and stands as infinite."""
    found = torch.full((len(steps), len(strengths)), float("inf"), dtype=torch.float64)
    going = torch.arange(len(steps))
    for j, x in enumerate(strengths):
        found[going, j] = costs(where, x * steps[going]).mean(1) if x else 0.0
        going = going[found[going, j] < enough]
        if not len(going):
            break
    return found


def strength_at(curve: np.ndarray, strengths: Sequence[float], price: float) -> float:
    """The strength at which a `curve` (strengths,) reaches a price, interpolated in square roots, which grow in proportion; NaN where it
    does not."""
    there = np.isfinite(curve)
    return stats.at_level(np.sqrt(np.clip(curve[there], 0, None)), np.asarray(strengths)[there], price**0.5)


def prompt_price(lm: LM, questions: Sequence[str], layer: int, system: str, length: int) -> float:
    """KL(without || with a system prompt) in nats per token of the model's own replies of `length` tokens without it, mean of replies.
    The blocks are run in two parts, cut at `layer`, which changes nothing."""
    own = [row[row >= 0].tolist() for row in replies.generate_ids(lm, questions, max_new_tokens=length)]
    found = []
    for said in (None, system):
        starts = [tokens.chat(lm.tokenizer, q, said) for q in questions]
        laid = [
            Tokens([*start.ids, *reply], [*start.roles, *[ANSWER] * len(reply)])
            for start, reply in zip(starts, own, strict=True)
        ]
        logits: dict[int, Tensor] = {}
        for part in scoring.resumed(lm, laid, layer, reading.residuals(lm, laid, layer)):
            logits |= dict(zip(part.rows, part.found.logits.split(part.counts), strict=True))
        found.append(logits)
    plain, prompted = found
    return float(
        np.mean([float(scoring.token_kl(x.float().log_softmax(-1), prompted[i]).mean()) for i, x in plain.items()])
    )


def under_prompt(lm: LM, items: Sequence[Item], layer: int, system: str | Sequence[str]) -> np.ndarray:
    """The log-odds of items under a system prompt, or each under its own, in nats: (items,)."""
    where = propensity.of_items(lm, items, layer, [system] * len(items) if isinstance(system, str) else system)
    return store.kept(log_odds, where, torch.zeros(1, lm.d_model))[0].numpy()


def repeated(ids: Sequence[int]) -> float:
    """The share of the pairs of neighbouring tokens that stood in the text before; 0 of a text of fewer than two tokens."""
    pairs = list(zip(ids, ids[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def is_language(lm: LM, questions: Sequence[str], said: Tensor, limit: float) -> np.ndarray:
    """Whether replies (n, tokens), -1 after their end, stay language: to the unsteered model they are no less likely than `limit` nats
    per token, and less than REPEATED of their pairs of tokens are repeated. (n,) bool."""
    ids = [row[row >= 0].tolist() for row in said]
    laid = [[tokens.conversation(lm.tokenizer, q, reply)] for q, reply in zip(questions, ids, strict=True)]
    loss = store.kept(losses, Continuations(lm, laid, 0), torch.zeros(1, lm.d_model))[0].numpy()
    return (loss <= limit) & (np.array([repeated(reply) for reply in ids]) < REPEATED)


def written(where: Continuations) -> np.ndarray:
    """The loss of each completion unsteered, in nats per token: (prompts, completions)."""
    return -where.log_probs(torch.zeros(where.lm.d_model)) / where.lengths()


def written_limit(where: Mapping[str, Continuations], share: float = 0.95) -> float:
    """The loss in nats per token that so large a share of the behaviours' written completions stays below, unsteered: what counts as no
    less likely than what people write."""
    return float(np.quantile(np.concatenate([store.kept(written, one).ravel() for one in where.values()]), share))


# --- the benchmark -------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """How much is measured for each behaviour: test `items` on which its own vectors are added, and `dev` items; `others`, test items of
    every other behaviour for two of the methods; `replies` to open prompts, as many on dev as on test, of so many `tokens`; `pieces` of
    plain text; and the length of what is `said` freely."""

    items: int = 4
    dev: int = 4
    others: int = 2
    replies: int = 2
    tokens: int = 24
    pieces: int = 2
    said: int = 16


class Prompted(NamedTuple):
    """The system prompt of each behaviour that dev items choose, `texts`; its `price`, KL on dev replies (behaviours,); how far it moves
    test items, `change` (behaviours, items) in nats, and some of every behaviour, `crossed` (behaviours, behaviours) in standard
    deviations; and the vectors at that price: their `strength` (methods, behaviours), whether they `reached` it, and their
    `vectors_change` (methods, behaviours, items)."""

    texts: list[str]
    price: np.ndarray
    change: np.ndarray
    crossed: np.ndarray
    strength: np.ndarray
    reached: np.ndarray
    vectors_change: np.ndarray


@dataclass(frozen=True, eq=False)
class Board:
    """What a benchmark found. Arrays are (methods, behaviours, prices, ...) unless said, effects in standard deviations (`spread`, nats,
    (behaviours,)).

    `steps` (methods, behaviours, d_model): each one residual norm long. `strength` in residual norms, and whether it `reached` the
    price; `paid`, KL on test prompts; `change` (..., items) of test items in nats; `effect`, its mean over all test items, estimated by
    the gradient and what that misses where vectors were added. The rest is (methods, behaviours), at the judged price, number `at`: `dev`, the
    effect on dev items; `loss`, what plain text costs more in nats per token; `crossed` (..., behaviours), the effect on every
    behaviour by gradient, and `runs`, for two of the methods, with vectors added. At the highest price: `language`, whether a free reply is,
    and `refusing`, whether it reads as a refusal; `refusing_plain` (behaviours,) without a vector.
    """

    lab: Single
    names: list[str]
    methods: list[str]
    prices: list[float]
    at: int
    steps: Tensor
    strength: np.ndarray
    reached: np.ndarray
    paid: np.ndarray
    change: np.ndarray
    effect: np.ndarray
    dev: np.ndarray
    loss: np.ndarray
    crossed: np.ndarray
    runs: dict[str, np.ndarray]
    language: np.ndarray
    refusing: np.ndarray
    refusing_plain: np.ndarray
    spread: np.ndarray
    prompted: Prompted | None
    missing: list[str]

    def row(self, method: str) -> int:
        """The number of a method's row."""
        return self.methods.index(method)

    @property
    def candidates(self) -> list[int]:
        """The rows of the methods that are no controls."""
        return [i for i, m in enumerate(self.methods) if m not in CONTROLS]

    def own(self, method: str, price: int | None = None) -> np.ndarray:
        """A method's effect on the behaviour it was made for, (behaviours,); at the judged price by default."""
        return self.effect[self.row(method), :, self.at if price is None else price]

    def entangled(self, method: str, runs: bool = False) -> np.ndarray:
        """How far a method's vector moves the other behaviours, either way, mean of them: (behaviours,). Of system prompts, at their own
        price and by runs."""
        if method == PROMPT and self.prompted:
            return _others(self.prompted.crossed)
        return _others(self.runs[method] if runs else self.crossed[self.row(method)])

    @property
    def chosen(self) -> np.ndarray:
        """For each behaviour the row of the method that is best on dev items: (behaviours,)."""
        rows = np.array(self.candidates)
        return rows[self.dev[rows].argmax(0)]

    def by_chance(self, strength: np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
        """The effect by gradient of random directions at the random method's own `strength` (methods, behaviours): (draws, behaviours)."""
        found, at = [], strength[self.row(RANDOM)]
        for i, n in enumerate(self.names):
            some = nulls.random(self.steps[0, i].double(), draws, seed + 1000 * i)
            found.append(self.lab.response(n, some, 1.0).mean(1) * at[i] / self.spread[i])
        return np.stack(found, axis=1)

    def best_over_prompt(self) -> tuple[np.ndarray, np.ndarray]:
        """At the price of each behaviour's system prompt the effect of the vector that dev items choose, and that of the prompt, on the same
        test items: (behaviours,) each. ValueError without system prompts."""
        if self.prompted is None:
            raise ValueError("no method gave system prompts: nothing to compare a vector with")
        best = self.prompted.vectors_change[self.chosen, np.arange(len(self.names))].mean(1)
        return best / self.spread, self.prompted.change.mean(1) / self.spread

    def leaderboard(self) -> Markdown:
        """A table with a row for each method at the judged price, the best first: effect with its interval over behaviours, and what it
        costs elsewhere. A behaviour's own refusals are not counted as a cost."""
        other = [i for i, n in enumerate(self.names) if n != REFUSAL]
        towards = self.names.index(REFUSAL) if REFUSAL in self.names else None
        best, rows = self.effect[self.candidates, :, self.at].argmax(0), list[tuple[float, list[str]]]()
        for i, m in enumerate(self.methods):
            own = stats.over(self.effect[i, :, self.at])
            first = sum(self.candidates[b] == i for b in best) if i in self.candidates else 0
            refuses = "-" if towards is None else f"{self.crossed[i, other, towards].mean():+.2f}"
            cells = [
                m, f"{own:+.2f}", f"{first}", f"{np.mean(self.change[i, :, self.at] < 0):.0%}", f"{stats.over(self.entangled(m)):.2f}",
                f"{np.exp(self.loss[i].mean()):.2f}", refuses, f"{self.refusing[i, other].mean():.0%}",
                f"{self.language[i].mean():.0%}", f"{self.paid[i, :, self.at].mean():.2f}", f"{self.reached[i, :, self.at].sum()}",
            ]  # fmt: skip
            rows.append((own.value, cells))
        if self.prompted:
            own = stats.over(self.prompted.change.mean(1) / self.spread)
            wrong = f"{np.mean(self.prompted.change < 0):.0%}"
            moved = f"{stats.over(self.entangled(PROMPT)):.2f} (runs)"
            refuses = "-" if towards is None else f"{self.prompted.crossed[other, towards].mean():+.2f} (runs)"
            price = f"{self.prompted.price.mean():.2f} (its own price)"
            rows.append((own.value, [PROMPT, f"{own:+.2f}", "-", wrong, moved, "-", refuses, "-", "-", price, "-"]))
        return table(LEADERBOARD, [cells for _, cells in sorted(rows, reverse=True)])

    def takeaway(self, draws: int, seed: int = 0) -> Markdown:
        """The table to take away: for each behaviour the method that dev items choose at the judged price, its layer and strength, and what
        that buys on test items; none where one in forty of so many random directions (`by_chance`) does more, if these are among the
        methods."""
        rows, chance = [], np.full(len(self.names), -np.inf)
        if RANDOM in self.methods:
            chance = np.quantile(self.by_chance(self.strength[:, :, self.at], draws, seed), 0.975, axis=0)
        for i, (n, m) in enumerate(zip(self.names, self.chosen, strict=True)):
            strength, effect = self.strength[m, i, self.at], self.effect[m, i, self.at]
            method = self.methods[m] if effect > chance[i] else f"none ({self.methods[m]} does no more than chance)"
            rows.append(
                [n, method, self.lab.layer, f"{strength:.2f}", f"{strength * self.lab.residual_norm:.0f}",
                 f"{self.paid[m, i, self.at]:.2f}", f"{effect:+.2f}", f"{chance[i]:+.2f}" if np.isfinite(chance[i]) else "-", f"{effect * self.spread[i]:+.1f}",
                 f"{np.mean(self.change[m, i, self.at] < 0):.0%}", f"{np.abs(np.delete(self.crossed[m, i], i)).mean():.2f}"]
            )  # fmt: skip
        return table(TAKEAWAY, rows)

    def curves(self) -> tuple[list[float], dict[str, list[Interval | None]]]:
        """For a figure: prices, and each method's mean effect over behaviours at each. Among them the geometric mean of what system prompts
        cost, where vectors have their effect at every prompt's own price; prompts have none elsewhere."""
        found: dict[str, list[Interval | None]] = {
            m: [stats.over(x) for x in self.effect[i].T] for i, m in enumerate(self.methods)
        }
        if self.prompted is None:
            return self.prices, found
        x = [*self.prices, float(f"{np.exp(np.log(self.prompted.price).mean()):.2g}")]
        for i, m in enumerate(self.methods):
            found[m].append(stats.over(self.prompted.vectors_change[i].mean(1) / self.spread))
        found[PROMPT] = [*[None] * len(self.prices), stats.over(self.prompted.change.mean(1) / self.spread)]
        order = np.argsort(x)
        return [x[i] for i in order], {m: [values[i] for i in order] for m, values in found.items()}

    def trade_off(self) -> dict[str, tuple[list[float], list[float]]]:
        """For a figure: of each method, at every price, how far others move (by gradient) and how far the own behaviour does, mean of
        behaviours."""
        found = {}
        for i, m in enumerate(self.methods):
            others = self.entangled(m)[:, None] * self.strength[i] / self.strength[i][:, [self.at]]
            found[m] = others.mean(0).tolist(), self.effect[i].mean(0).tolist()
        return found


def _others(moved: np.ndarray) -> np.ndarray:
    """The size of what is moved (behaviours, behaviours), mean over behaviours that are not the row's own: (behaviours,)."""
    return nulls.off_diagonal(np.abs(moved).T).mean(0)


LEADERBOARD = [
    "method", "effect, sd [95 % over behaviours]", "best for so many behaviours", "test items that go the wrong way",
    "others move by, sd (gradient)", "perplexity of plain text, times", "harmless questions: towards refusal, sd",
    "free replies read as refusals", "free replies that are language", "KL on test prompts", "price reached for",
]  # fmt: skip
TAKEAWAY = [
    "behaviour", "method (chosen on dev)", "layer", "strength, residual norms", "length", "KL on test prompts", "effect, sd",
    "random directions reach (97.5 %), sd", "effect, nats", "items that go the wrong way", "others move by, sd",
]  # fmt: skip


def vectors_of(made: Mapping[str, Mapping[str, Made]]) -> dict[str, Tensor]:
    """By method its vectors (behaviours, d_model) float64, of those methods that gave one for every behaviour."""
    found = {}
    for m, each in made.items():
        given_ones = [v.double() for v in each.values() if isinstance(v, Tensor)]
        if each and len(given_ones) == len(each):
            found[m] = torch.stack(given_ones)
    return found


def benchmark(
    lab: Single,
    methods: Mapping[str, Method],
    prices: Sequence[float],
    judged: float,
    sizes: Sizes | None = None,
    seed: int = 0,
    known: Mapping[str, Given] | None = None,
) -> Board:
    """Every method on every behaviour at equal `prices`, in nats per token, of which one is `judged`: see `Board`. `known`: what methods
    get, `given(lab, seed)` by default. ValueError where none gives a vector for every behaviour."""
    of, size = known or given(lab, seed), sizes or Sizes()
    made = {m: {n: f(g) for n, g in of.items()} for m, f in methods.items()}
    vectors = vectors_of(made)
    if not vectors:
        raise ValueError(f"none of {', '.join(methods)} gave a vector for every behaviour")
    steps = torch.stack([v / v.norm(dim=1, keepdim=True) for v in vectors.values()]).float() * lab.residual_norm
    texts = {n: x for n, x in made.get(PROMPT, {}).items() if x is not None and not isinstance(x, Tensor)}
    levels = sorted({*prices, judged})
    at, none = levels.index(judged), torch.zeros(1, lab.model.d_model)
    curve = np.stack(
        [
            store.kept(curves, _replies(lab, n, size, "dev"), steps[:, i], STRENGTHS, 2 * levels[-1]).numpy()
            for i, n in enumerate(lab.names)
        ],
        axis=1,
    )
    raw = np.array([[[strength_at(c, STRENGTHS, x) for x in levels] for c in of_method] for of_method in curve])
    strength, reached = np.nan_to_num(raw, nan=STRENGTHS[-1]), np.isfinite(raw)
    added = (torch.from_numpy(strength)[..., None] * steps[:, :, None]).float()  # methods, behaviours, prices, d_model
    spread = np.array([scoring.log_odds(x, none, [0.0])[0, 0].std(ddof=1) for x in lab.tested().values()])
    each = [_bought(lab, n, added[:, i], at, size) for i, n in enumerate(lab.names)]
    change, paid, effect, dev = (np.stack(x, 1) for x in zip(*each, strict=True))
    language, refusing, refusing_plain = _said(lab, added[:, :, -1], size)
    runs = _runs(lab, dict(zip(vectors, added[:, :, at], strict=True)), size, spread)
    return Board(
        lab, lab.names, list(vectors), levels, at, steps, strength, reached, paid, change,
        effect / spread[:, None], dev / spread, _on_text(lab, added[:, :, at], size), _crossed(lab, added[:, :, at], spread),
        runs, language, refusing, refusing_plain, spread, _prompted(lab, texts, curve, steps, size, spread),
        [m for m in methods if m not in vectors and not (m == PROMPT and len(texts) == len(lab.names))],
    )  # fmt: skip


class _Bought(NamedTuple):
    """Of one behaviour, in nats: `change` (methods, prices, items), `paid` and `effect` (methods, prices), `dev` (methods,)."""

    change: np.ndarray
    paid: np.ndarray
    effect: np.ndarray
    dev: np.ndarray


def _bought(lab: Single, name: str, added: Tensor, at: int, size: Sizes) -> _Bought:
    """What a behaviour's own vectors `added` (methods, prices, d_model) buy on its test items and dev items, and cost on test prompts."""
    shape, flat = added.shape[:2], added.flatten(0, 1)
    none = torch.zeros(1, added.shape[-1])
    odds = store.kept(log_odds, lab.tested(size.items)[name], torch.cat([none, flat])).numpy()
    change = (odds[1:] - odds[0]).reshape(*shape, -1)
    slopes = scoring.linear_response(lab.tested()[name])  # of all items
    predicted = (flat.double().numpy() @ slopes.T).reshape(*shape, -1)
    paid = store.kept(costs, _replies(lab, name, size, "test"), flat).mean(1).numpy().reshape(shape)
    asked = propensity.of_items(lab.model, lab.data[name].dev[: size.dev], lab.layer)
    dev = store.kept(log_odds, asked, torch.cat([none, added[:, at]])).numpy()
    return _Bought(change, paid, estimated(change, predicted), (dev[1:] - dev[0]).mean(1))


def _on_text(lab: Single, pushes: Tensor, size: Sizes) -> np.ndarray:
    """What plain text costs more under `pushes` (methods, behaviours, d_model), nats per token: (methods, behaviours)."""
    where = propensity.of_text(lab.model, text.excerpt("wiki", 40_000), lab.layer, chunks=size.pieces)
    every = torch.cat([torch.zeros(1, pushes.shape[-1]), pushes.flatten(0, 1)])
    nats = store.kept(losses, where, every).mean(1).numpy()
    return (nats[1:] - nats[0]).reshape(pushes.shape[:2])


def _replies(lab: Single, name: str, size: Sizes, part: str) -> Continuations:
    """The model's own replies to a behaviour's first open prompts (dev), or to the next (test)."""
    first = 0 if part == "dev" else size.replies
    return propensity.of_replies(lab.model, lab.data[name].open[first : first + size.replies], lab.layer, size.tokens)


def _crossed(lab: Single, pushes: Tensor, spread: np.ndarray) -> np.ndarray:
    """By gradient the effect of `pushes` (methods, behaviours, d_model) on every behaviour: (methods, behaviours, behaviours)."""
    slopes = np.stack([g.mean(0) for g in lab.gradients().values()]) / spread[:, None]
    return pushes.double().numpy() @ slopes.T


def _runs(lab: Single, pushes: Mapping[str, Tensor], size: Sizes, spread: np.ndarray) -> dict[str, np.ndarray]:
    """The same with vectors added to some test items, of the mean difference and a random direction: by method (behaviours,
    behaviours)."""
    found = {}
    for m in (MEAN, RANDOM):
        if m in pushes:
            columns = []
            for x in lab.tested(size.others).values():
                odds = store.kept(log_odds, x, torch.cat([torch.zeros(1, lab.model.d_model), pushes[m]])).numpy()
                columns.append((odds[1:] - odds[0]).mean(1))
            found[m] = np.stack(columns, 1) / spread
    return found


def _said(lab: Single, pushes: Tensor, size: Sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Free replies to one open test prompt under `pushes` (methods, behaviours, d_model): whether each is language, whether it reads as a
    refusal (methods, behaviours), and whether the unsteered one does (behaviours,)."""
    lm = lab.model
    questions = [b.open[size.replies] if len(b.open) > size.replies else b.open[-1] for b in lab.data.values()]
    every = torch.cat([torch.zeros(1, *pushes.shape[1:]), pushes])
    asked = questions * len(every)
    said = replies.generate_ids(lm, asked, lab.layer, every.flatten(0, 1), max_new_tokens=size.said)
    fine = is_language(lm, asked, said, written_limit(lab.tested(size.items))).reshape(len(every), -1)
    reader = propensity.TextJudge(lab.data[REFUSAL] if REFUSAL in lab.names else load_behavior(REFUSAL))
    words = [lm.tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in said]
    refuses = (reader.score(words) > 0).reshape(len(every), -1)
    return fine[1:], refuses[1:], refuses[0]


def _prompted(
    lab: Single, texts: Mapping[str, Sequence[str]], curve: np.ndarray, steps: Tensor, size: Sizes, spread: np.ndarray
) -> Prompted | None:
    """The system prompts that dev items choose, and vectors at their price; `curve` (methods, behaviours, strengths): KL on dev replies.
    None where not every behaviour has some."""
    if len(texts) < len(lab.names):
        return None
    lm, layer, none = lab.model, lab.layer, torch.zeros(1, lab.model.d_model)
    chosen, price, change, strength, vectors_change = [], [], [], [], []
    for i, (n, some) in enumerate(texts.items()):
        b = lab.data[n]
        best = some[int(np.argmax([under_prompt(lm, b.dev[: size.dev], layer, x).mean() for x in some]))]
        chosen.append(best)
        price.append(store.kept(prompt_price, lm, b.open[: size.replies], layer, best, size.tokens))
        strength.append([strength_at(c, STRENGTHS, price[-1]) for c in curve[:, i]])
        push = (torch.tensor(np.nan_to_num(strength[-1], nan=STRENGTHS[-1]))[:, None] * steps[:, i]).float()
        odds = store.kept(log_odds, lab.tested(size.items)[n], torch.cat([none, push])).numpy()
        vectors_change.append(odds[1:] - odds[0])
        change.append(under_prompt(lm, b.test[: size.items], layer, best) - odds[0])
    crossed = []
    for n, where in lab.tested(size.others).items():
        items = lab.data[n].test[: size.others]
        every = under_prompt(lm, items * len(chosen), layer, [x for x in chosen for _ in items])
        plain = store.kept(log_odds, where, none)[0].numpy()
        crossed.append((every.reshape(len(chosen), -1) - plain).mean(1))
    raw = np.array(strength).T
    return Prompted(
        chosen, np.array(price), np.stack(change), np.stack(crossed, 1) / spread,
        np.nan_to_num(raw, nan=STRENGTHS[-1]), np.isfinite(raw), np.stack(vectors_change, 1),
    )  # fmt: skip


# --- contrast designs at equal budget ------------------------------------------------------------------------------------

PREFIX = "Well, I would say that"  # the same words on both sides, forced upon the model
PAIRS, SETS, LAST, WHOLE, FIRST, THIRD, FREE, FORCED = DESIGNS = (
    "pairs",
    "sets",
    "last token",
    "whole answer",
    "first person",
    "third person",
    "nothing forced",
    "a forced prefix",
)


def reported(pair: AnswerPair) -> tuple[str, str]:
    """Both sides of a pair as the user tells them of somebody else."""
    one, other = (f"{pair.question}\n\nSomebody answered: {answer}" for answer in (pair.positive, pair.negative))
    return one, other


def designs(lab: Single, pairs: int) -> dict[str, dict[str, Tensor]]:
    """By contrast design and behaviour a vector (d_model,), all of them from equally many texts, two for each of so many `pairs`.

    Pairs: questions with both of their answers. Sets: positive answers to some questions, negative answers to as many others. Last token
    or whole answer: where the same pairs are read. First person: the model answers; third: the user tells that somebody answered so. Nothing
    forced: system pairs at the last token of the prompt; a forced prefix: the same pairs, and PREFIX, over which is read, put into the
    model's mouth. Behaviours with fewer than two pairs of either kind are left out.
    """
    found: dict[str, dict[str, Tensor]] = {d: {} for d in DESIGNS}
    layer, lm = lab.layer, lab.model
    whole, last, system = lab.halves(where="answer"), lab.halves(where="last"), lab.halves(study.SYSTEM)
    for n, b in lab.data.items():
        answers = [p for p in b.answer_pairs if isinstance(p, AnswerPair)]
        half = min(pairs, len(answers) // 2, len(b.system_pairs))
        if not half:
            continue
        pos, neg = whole[n].at(layer)
        found[PAIRS][n] = found[WHOLE][n] = found[FIRST][n] = directions.mean(pos[:half], neg[:half])
        found[SETS][n] = directions.mean(pos[:half], neg[half : 2 * half])
        found[LAST][n] = directions.mean(*(x[:half] for x in last[n].at(layer)))
        found[FREE][n] = directions.mean(*(x[:half] for x in system[n].at(layer)))
        told = [tokens.chat(lm.tokenizer, side) for p in answers[:half] for side in reported(p)]
        ends = [_tail(lm, answer) for p in answers[:half] for answer in (p.positive, p.negative)]
        masks = [_last_of_user(one, end) for one, end in zip(told, ends, strict=True)]
        acts, _ = reading.means(lm, told, [layer], "reported", masks)
        found[THIRD][n] = directions.mean(acts[0::2, 0, 0], acts[1::2, 0, 0])
        forced = [
            tokens.chat(lm.tokenizer, p.question, x, PREFIX)
            for p in b.system_pairs[:half]
            for x in (p.positive, p.negative)
        ]
        acts, _ = reading.means(lm, forced, [layer], "answer")
        found[FORCED][n] = directions.mean(acts[0::2, 0, 0], acts[1::2, 0, 0])
    return found


def _tail(lm: LM, answer: str) -> int:
    """How many tokens a reported answer has."""
    return len(tokens.plain(lm.tokenizer, f" {answer}").ids) - len(tokens.first_token(lm.tokenizer))


def _last_of_user(one: Tokens, length: int) -> Tensor:
    """The last tokens of the user's turn, (1, tokens) bool."""
    mask = torch.zeros(1, len(one.ids), dtype=torch.bool)
    mask[0, [i for i, role in enumerate(one.roles) if role == tokens.USER][-length:]] = True
    return mask


def at_small_price(
    lab: Single, vectors: Mapping[str, Tensor], price: float, size: Sizes, length: float = 0.1
) -> np.ndarray:
    """The effect by gradient, in standard deviations, of each behaviour's own vector at a small price: KL is measured at `length`
    residual norms and taken to grow with its square. (behaviours,)."""
    none, found = torch.zeros(1, lab.model.d_model), []
    for n, v in vectors.items():
        step = (v / v.norm() * length * lab.residual_norm).float()[None]
        kl = float(store.kept(costs, _replies(lab, n, size, "dev"), step).mean())
        spread = scoring.log_odds(lab.tested()[n], none, [0.0])[0, 0].std(ddof=1)
        found.append(lab.response(n, v[None], length).mean() * (price / max(kl, 1e-12)) ** 0.5 / spread)
    return np.array(found)
