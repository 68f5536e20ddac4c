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

from helpers import nulls, stats, store, study
from helpers.claims import table
from helpers.comparisons import estimated
from helpers.lm import reading, replies, scoring, text, tokens
from helpers.lm.reading import LM
from helpers.lm.scoring import Continuations
from helpers.lm.tokens import ANSWER, Tokens
from helpers.sae import decompose
from helpers.stats import Interval
from helpers.steering import caa, directions, propensity
from helpers.steering.behaviors import AnswerPair, Item, SystemPair
from helpers.study import Single

LATENTS = 16  # rows of a dictionary that stand for a vector
CANDIDATES = 3  # system prompts among which dev items choose
TRAINED = "own.0"  # of `bank.KINDS`: trained on the pairs that the mean difference is made of
RANDOM, OTHER, PROMPT, MEAN, PREFERENCE = (
    "random",
    "another behaviour's",
    "system prompt",
    "mean difference",
    "trained by preference",
)
CONTROLS = (RANDOM, OTHER)
STRENGTHS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # residual norms at which the price is measured, to be interpolated
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
    """What methods get of each behaviour. Without `sae:` or `pair:` in the profile what these give is missing."""
    profile = lab.session.profile
    sae = decompose.rows_of(lab.sae(seed).sae) if profile.sae else None
    diff, paths = None, dict[str, Tensor]()
    if profile.pair and profile.sae:
        two = study.pair(lab.session)
        diff = two.diff_latents(seed)
        same = two.before.model.identity == lab.model.identity
        paths = two.bank.paths if two.bank and same else {}
    halves, vectors = lab.halves(), lab.vectors()
    found = {}
    for i, (n, h) in enumerate(halves.items()):
        after = [*lab.names[i + 1 :], *lab.names[:i]]
        others = torch.stack([vectors[m] for m in after]) if after else vectors[n].new_zeros(0, lab.model.d_model)
        path = paths.get(f"{n}.{TRAINED}")
        found[n] = Given(
            n, *h.at(lab.layer), lab.data[n].system_pairs, others, sae, diff,
            None if path is None else path[-1], seed + i,
        )  # fmt: skip
    return found


# --- what is measured ----------------------------------------------------------------------------------------------------


def log_odds(where: Continuations, vectors: Tensor) -> Tensor:
    """log p(completion 0) - log p(completion 1) in nats under each of `vectors` (n, d_model): (n, prompts) float64."""
    logp = [torch.from_numpy(where.log_probs(v)) for v in vectors]
    return torch.stack([x[:, 0] - x[:, 1] for x in logp])


def losses(where: Continuations, vectors: Tensor) -> Tensor:
    """Cross-entropy of single completions in nats per token under each of `vectors` (n, d_model): (n, prompts) float64."""
    count = torch.from_numpy(where.lengths())
    return torch.stack([-(torch.from_numpy(where.log_probs(v)) / count).mean(1) for v in vectors])


def prices(where: Continuations, vectors: Tensor, strengths: Sequence[float]) -> Tensor:
    """KL(unsteered || steered) in nats per token, mean of replies, under `vectors` (n, d_model) at each strength: (n, strengths)."""
    return torch.tensor(
        [[where.kl(v, x).mean() if x else 0.0 for x in strengths] for v in vectors], dtype=torch.float64
    )


def strength_at(price: np.ndarray, strengths: Sequence[float], level: float) -> float:
    """The strength at which a price (strengths,) reaches `level`, interpolated in square roots, which grow in proportion; NaN where it
    does not."""
    return stats.at_level(np.sqrt(np.clip(price, 0, None)), strengths, level**0.5)


def _under(system: str | None, lm: LM, question: str, reply: Sequence[int]) -> Tokens:
    start = tokens.chat(lm.tokenizer, question, system)
    return Tokens([*start.ids, *reply], [*start.roles, *[ANSWER] * len(reply)])


def prompt_price(lm: LM, questions: Sequence[str], layer: int, system: str, length: int) -> float:
    """KL(without || with a system prompt) in nats per token of the model's own replies of `length` tokens without it, mean of replies.
    The blocks are run in two parts, cut at `layer`, which changes nothing."""
    own = [row[row >= 0].tolist() for row in replies.generate_ids(lm, questions, max_new_tokens=length)]
    found = []
    for said in (None, system):
        laid = [_under(said, lm, q, reply) for q, reply in zip(questions, own, strict=True)]
        logits: dict[int, Tensor] = {}
        for part in scoring.resumed(lm, laid, layer, reading.residuals(lm, laid, layer)):
            logits |= dict(zip(part.rows, part.found.logits.split(part.counts), strict=True))
        found.append(logits)
    plain, prompted = found
    return float(
        np.mean([float(scoring.token_kl(plain[i].float().log_softmax(-1), prompted[i]).mean()) for i in plain])
    )


def under_prompt(lm: LM, items: Sequence[Item], layer: int, system: str) -> np.ndarray:
    """The change of each item's log-odds, in nats, from no system prompt to this one: (items,)."""
    none, asked = torch.zeros(1, lm.d_model), [None] * len(items) + [system] * len(items)
    odds = store.kept(log_odds, propensity.of_items(lm, [*items, *items], layer, asked), none)[0].numpy()
    return odds[len(items) :] - odds[: len(items)]


def repeated(ids: Sequence[int]) -> float:
    """The share of the pairs of neighbouring tokens that stood in the text before; 0 of a text of fewer than two tokens."""
    pairs = list(zip(ids, ids[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def is_language(lm: LM, questions: Sequence[str], said: Tensor, limit: float) -> np.ndarray:
    """Whether replies (n, tokens), -1 after their end, stay language: to the unsteered model they are no less likely than `limit` nats
    per token, and less than REPEATED of their pairs of tokens are repeated. (n,) bool."""
    ids = [row[row >= 0].tolist() for row in said]
    where = Continuations(
        lm, [[tokens.conversation(lm.tokenizer, q, r)] for q, r in zip(questions, ids, strict=True)], 0
    )
    loss = store.kept(losses, where, torch.zeros(1, lm.d_model))[0].numpy()
    return (loss <= limit) & (np.array([repeated(r) for r in ids]) < REPEATED)


def written_limit(where: Mapping[str, Continuations], share: float = 0.95) -> float:
    """The loss in nats per token that so large a share of the behaviours' written completions stays below, unsteered."""
    each = []
    for one in where.values():
        logp = one.log_probs(torch.zeros(one.lm.d_model)) / one.lengths()
        each.append(-logp.ravel())
    return float(np.quantile(np.concatenate(each), share))


# --- the benchmark -------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """How much is measured of each behaviour: test `items` on which its own vectors are added, `dev` items, `others`, test items of
    every other behaviour, `refused`, harmless questions; `replies` to open prompts, as many on dev as on test, of so many `tokens`;
    and `pieces` of plain text."""

    items: int = 6
    dev: int = 4
    others: int = 2
    refused: int = 8
    replies: int = 2
    pieces: int = 2
    tokens: int = 24


class Prompted(NamedTuple):
    """The system prompt of each behaviour that dev items chose, `texts`; its `price` in KL on dev replies (behaviours,); how far it moves
    test items, `change` (behaviours, items) in nats; and the vectors at that price: their `strength` (methods, behaviours), their
    `vectors_change` (methods, behaviours, items)."""

    texts: list[str]
    price: np.ndarray
    change: np.ndarray
    strength: np.ndarray
    vectors_change: np.ndarray


@dataclass(frozen=True, eq=False)
class Board:
    """What a benchmark found. Arrays are (methods, behaviours, prices, ...) unless said.

    `steps` (methods, behaviours, d_model): each one residual norm long. `strength` in residual norms, `reached` whether the price was;
    `paid`, the KL on test prompts; `change` (..., items) in nats; `effect`, its mean over all test items, estimated with the gradient
    where no vector was added, in standard deviations; `dev` (methods, behaviours), the same on dev items at the judged price; `loss`,
    nats per token that plain text costs more; `crossed` (methods, behaviours, behaviours), the effect on every behaviour at the judged price;
    `refused` (methods, behaviours), the share of harmless questions whose written refusal is likelier than their answer, and
    `refused_plain` without a vector; `language` (methods, behaviours, prices) bool. `spread` (behaviours,): nats a standard deviation.
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
    refused: np.ndarray
    refused_plain: float
    language: np.ndarray
    spread: np.ndarray
    prompted: Prompted | None
    missing: dict[str, str]

    def row(self, method: str) -> int:
        """The number of a method's row."""
        return self.methods.index(method)

    @property
    def candidates(self) -> list[int]:
        """The rows of the methods that are no controls."""
        return [i for i, m in enumerate(self.methods) if m not in CONTROLS]

    def own(self, method: str, price: int | None = None) -> np.ndarray:
        """A method's effect on the behaviour it was made for, (behaviours,) in standard deviations."""
        return self.effect[self.row(method), :, self.at if price is None else price]

    def entangled(self, method: str) -> np.ndarray:
        """How far a method's vector moves the other behaviours, either way, mean of them: (behaviours,) in standard deviations."""
        table = np.abs(self.crossed[self.row(method)])
        return nulls.off_diagonal(table.T).mean(0)

    @property
    def chosen(self) -> np.ndarray:
        """For each behaviour the row of the method that is best on dev items at the judged price: (behaviours,)."""
        rows = np.array(self.candidates)
        return rows[self.dev[rows].argmax(0)]

    def by_chance(self, draws: int, seed: int = 0) -> np.ndarray:
        """The effect of random directions at the judged price by gradient, (draws, behaviours) in standard deviations: at the strength
        that the random method's own vector has."""
        strength = self.strength[self.row(RANDOM), :, self.at]
        return self._random(strength, draws, seed)

    def _random(self, strength: np.ndarray, draws: int, seed: int) -> np.ndarray:
        found = []
        for i, n in enumerate(self.names):
            some = nulls.random(self.steps[0, i].double(), draws, seed + 1000 * i)
            found.append(self.lab.response(n, some, 1.0).mean(1) * strength[i] / self.spread[i])
        return np.stack(found, axis=1)

    def best_over_prompt(self) -> tuple[np.ndarray, np.ndarray]:
        """At the price of each behaviour's system prompt: the effect of the vector that dev items choose, and that of the prompt, on the
        same test items, (behaviours,) each in standard deviations. ValueError without system prompts."""
        if self.prompted is None:
            raise ValueError("no method gave system prompts: nothing to compare a vector with")
        each = np.arange(len(self.names))
        best = self.prompted.vectors_change[self.chosen, each].mean(1)
        return best / self.spread, self.prompted.change.mean(1) / self.spread

    def prompt_by_chance(self, draws: int, seed: int = 0) -> np.ndarray:
        """What random directions do at the price of the system prompt, by gradient: (draws, behaviours) in standard deviations."""
        if self.prompted is None:
            raise ValueError("no method gave system prompts: nothing to compare a vector with")
        return self._random(self.prompted.strength[self.row(RANDOM)], draws, seed)

    def leaderboard(self, price: int | None = None) -> Markdown:
        """A table with a row for each method at one price, the best first: effect with its interval over behaviours, and side effects."""
        k = self.at if price is None else price
        rows: list[tuple[float, list[str]]] = []
        best = self.effect[self.candidates, :, k].argmax(0)
        for i, m in enumerate(self.methods):
            own, judged = stats.over(self.effect[i, :, k]), k == self.at
            first = sum(self.candidates[b] == i for b in best) if i in self.candidates else 0
            lost = stats.over(self.loss[i, :, k])
            cells = [
                m, f"{own:+.2f}", f"{np.mean(self.change[i, :, k] < 0):.0%}",
                f"{stats.over(self.entangled(m)):.2f}" if judged else "-", f"{np.exp(lost.value):.2f}",
                f"{self.refused[i].mean():.0%}" if judged else "-", f"{self.language[i, :, k].mean():.0%}",
                f"{self.paid[i, :, k].mean():.2f}", f"{first}", f"{self.reached[i, :, k].sum()}",
            ]  # fmt: skip
            rows.append((own.value, cells))
        return table(LEADERBOARD, [cells for _, cells in sorted(rows, reverse=True)])

    def takeaway(self) -> Markdown:
        """The table to take away: for each behaviour the method that dev items choose at the judged price, its layer and strength, and what
        that buys on test items."""
        rows = []
        for i, (n, m) in enumerate(zip(self.names, self.chosen, strict=True)):
            k, step = self.strength[m, i, self.at], self.lab.residual_norm
            wrong = np.mean(self.change[m, i, self.at] < 0)
            rows.append(
                [n, self.methods[m], self.lab.layer, f"{k:.2f} ({k * step:.0f})", f"{self.paid[m, i, self.at]:.2f}",
                 f"{self.effect[m, i, self.at]:+.2f}", f"{self.effect[m, i, self.at] * self.spread[i]:+.1f}", f"{wrong:.0%}",
                 f"{np.abs(np.delete(self.crossed[m, i], i)).mean():.2f}"]
            )  # fmt: skip
        return table(TAKEAWAY, rows)

    def side_effects(self, method: str) -> list[Interval]:
        """How far plain text costs more at each price, nats per token over behaviours."""
        return [stats.over(x) for x in self.loss[self.row(method)].T]


LEADERBOARD = [
    "method", "effect, sd [95 % over behaviours]", "test items that go the wrong way", "other behaviours move by, sd",
    "perplexity of plain text, times", "harmless questions refused", "replies that stay language", "KL on test prompts",
    "best for so many behaviours", "price reached for",
]  # fmt: skip
TAKEAWAY = [
    "behaviour", "method (chosen on dev)", "layer", "strength, residual norms (length)", "KL on test prompts", "effect, sd",
    "effect, nats", "items that go the wrong way", "other behaviours move by, sd",
]  # fmt: skip


def benchmark(
    lab: Single,
    methods: Mapping[str, Method],
    prices_at: Sequence[float],
    judged: float,
    sizes: Sizes | None = None,
    seed: int = 0,
) -> Board:
    """Every method on every behaviour at equal price: see `Board`. ValueError without a method that gives vectors for all behaviours."""
    sizes, names, lm, layer = sizes or Sizes(), lab.names, lab.model, lab.layer
    of = given(lab, seed)
    made = {m: {n: f(g) for n, g in of.items()} for m, f in methods.items()}
    missing = {m: "something that it needs is missing" for m, x in made.items() if any(v is None for v in x.values())}
    vectors = {
        m: torch.stack([torch.as_tensor(v).double() for v in x.values()])
        for m, x in made.items()
        if m not in missing and all(isinstance(v, Tensor) for v in x.values())
    }
    if not vectors:
        raise ValueError(f"none of {', '.join(methods)} gave a vector for every behaviour")
    steps = torch.stack([v / v.norm(dim=1, keepdim=True) for v in vectors.values()]).float() * lab.residual_norm
    dev_replies = {
        n: propensity.of_replies(lm, b.open[: sizes.replies], layer, sizes.tokens) for n, b in lab.data.items()
    }
    grid = np.stack(
        [store.kept(prices, dev_replies[n], steps[:, i], STRENGTHS).numpy() for i, n in enumerate(names)], 1
    )
    levels = sorted({*prices_at, judged})
    raw = np.array([[[strength_at(g, STRENGTHS, x) for x in levels] for g in of_method] for of_method in grid])
    strength, reached = np.nan_to_num(raw, nan=STRENGTHS[-1]), np.isfinite(raw)
    at = levels.index(judged)

    def added(i: int) -> Tensor:
        """Of one behaviour, every method's vector at every price: (methods * prices, d_model)."""
        return (torch.from_numpy(strength[:, i, :, None]) * steps[:, i, None]).flatten(0, 1).float()

    def shaped(x: Tensor) -> np.ndarray:
        return x.numpy().reshape(len(steps), len(levels), *x.shape[1:])

    none = torch.zeros(1, lm.d_model)
    plain_text = propensity.of_text(lm, text.excerpt("wiki", 40_000), layer, chunks=sizes.pieces)
    tested, few = lab.tested(sizes.items), lab.tested(sizes.others)
    spread = np.array([store.kept(log_odds, x, none)[0].numpy().std(ddof=1) for x in lab.tested().values()])
    unit = steps.double().numpy() / lab.residual_norm
    change, paid, loss, dev, language, effect = ([] for _ in range(6))
    limit = written_limit(tested)
    for i, n in enumerate(names):
        b, push = lab.data[n], added(i)
        own = shaped(store.kept(log_odds, tested[n], torch.cat([none, push]))[1:])
        own = own - store.kept(log_odds, tested[n], none)[0].numpy()
        change.append(own)
        slope = scoring.linear_response(lab.tested()[n]) @ unit[:, i].T * lab.residual_norm  # (items, methods)
        effect.append(estimated(own, slope.T[:, None] * strength[:, i, :, None]) / spread[i])
        test = b.open[sizes.replies : 2 * sizes.replies]
        where = propensity.of_replies(lm, test, layer, sizes.tokens)
        paid.append(shaped(store.kept(prices, where, push, [1.0])[:, 0]))
        nats = store.kept(losses, plain_text, torch.cat([none, push])).mean(1)
        loss.append(shaped(nats[1:] - nats[0]))
        asked = propensity.of_items(lm, b.dev[: sizes.dev], layer)
        odds = store.kept(log_odds, asked, torch.cat([none, push[at :: len(levels)]])).numpy()
        dev.append((odds[1:] - odds[0]).mean(1) / spread[i])
        questions = [test[0]] * len(push)
        said = replies.generate_ids(lm, questions, layer, push, max_new_tokens=sizes.tokens)
        language.append(is_language(lm, questions, said, limit).reshape(len(steps), len(levels)))
    pushes = (torch.from_numpy(strength[:, :, at, None]) * steps).flatten(0, 1).float()
    crossed = []
    for j, n in enumerate(names):
        odds = store.kept(log_odds, few[n], torch.cat([none, pushes])).numpy()
        slope = scoring.linear_response(lab.tested()[n]) @ pushes.double().numpy().T
        crossed.append(estimated(odds[1:] - odds[0], slope.T) / spread[j])
    harmless = lab.tested(sizes.refused)["refusal"] if "refusal" in names else None
    shares = np.full((len(steps), len(names)), np.nan)
    plain = float("nan")
    if harmless is not None:
        odds = store.kept(log_odds, harmless, torch.cat([none, pushes])).numpy() > 0
        plain, shares = float(odds[0].mean()), odds[1:].mean(1).reshape(len(steps), len(names))
    texts = {n: x for n, x in made.get(PROMPT, {}).items() if x is not None and not isinstance(x, Tensor)}
    prompted = None
    if len(texts) == len(names):
        prompted = _prompted(lab, texts, grid, steps, sizes)
    return Board(
        lab, names, list(vectors), levels, at, steps, strength, reached, np.stack(paid, 1), np.stack(change, 1),
        np.stack(effect, 1), np.stack(dev, 1), np.stack(loss, 1),
        np.stack(crossed, 1).reshape(len(steps), len(names), len(names)), shares, plain, np.stack(language, 1), spread,
        prompted, missing,
    )  # fmt: skip


def _prompted(
    lab: Single, texts: Mapping[str, Sequence[str]], grid: np.ndarray, steps: Tensor, sizes: Sizes
) -> Prompted:
    """The system prompts that dev items choose, and the vectors at their price; `grid` (methods, behaviours, strengths): KL on dev
    replies at STRENGTHS."""
    lm, layer, none = lab.model, lab.layer, torch.zeros(1, lab.model.d_model)
    chosen, price, change, strength, vectors_change = [], [], [], [], []
    for i, (n, some) in enumerate(texts.items()):
        b = lab.data[n]
        dev = [under_prompt(lm, b.dev[: sizes.dev], layer, x).mean() for x in some]
        best = some[int(np.argmax(dev))]
        chosen.append(best)
        price.append(store.kept(prompt_price, lm, b.open[: sizes.replies], layer, best, sizes.tokens))
        change.append(under_prompt(lm, b.test[: sizes.items], layer, best))
        raw = [strength_at(g, STRENGTHS, price[-1]) for g in grid[:, i]]
        strength.append(np.nan_to_num(raw, nan=STRENGTHS[-1]))
        push = (torch.from_numpy(strength[-1])[:, None] * steps[:, i]).float()
        odds = store.kept(log_odds, lab.tested(sizes.items)[n], torch.cat([none, push])).numpy()
        vectors_change.append(odds[1:] - odds[0])
    return Prompted(
        chosen, np.array(price), np.stack(change), np.stack(strength, 1), np.stack(vectors_change, 1)
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
    return tuple(f"{pair.question}\n\nSomebody answered: {a}" for a in (pair.positive, pair.negative))  # type: ignore[return-value]


def designs(lab: Single) -> dict[str, dict[str, Tensor]]:
    """By contrast design and behaviour a vector (d_model,), all of them from equally many texts: half of the pairs.

    Pairs: questions with both of their answers. Sets: positive answers to the one half of the questions, negative answers to the
    other. Last token or whole answer: where the same pairs are read. First person: the model answers; third: the user tells that somebody
    answered so. Nothing forced: system pairs at the last token of the prompt; a forced prefix: the same pairs, and PREFIX, over which
    is read, put into the model's mouth. Behaviours without answer pairs are left out.
    """
    found: dict[str, dict[str, Tensor]] = {d: {} for d in DESIGNS}
    whole, last, layer, lm = lab.halves(where="answer"), lab.halves(where="last"), lab.layer, lab.model
    for n, b in lab.data.items():
        answers = [p for p in b.answer_pairs if isinstance(p, AnswerPair)]
        half = min(len(answers), len(b.system_pairs)) // 2
        if not half:
            continue
        pos, neg = whole[n].at(layer)
        found[PAIRS][n] = found[WHOLE][n] = found[FIRST][n] = directions.mean(pos[:half], neg[:half])
        found[SETS][n] = directions.mean(pos[:half], neg[half : 2 * half])
        found[LAST][n] = directions.mean(*(x[:half] for x in last[n].at(layer)))
        told = [tokens.chat(lm.tokenizer, side) for p in answers[:half] for side in reported(p)]
        found[THIRD][n] = _contrast(lm, told, [_tail(lm, p, s) for p in answers[:half] for s in (0, 1)], layer)
        plain = caa.extract(lm, b.system_pairs[:half], [layer])
        found[FREE][n] = directions.mean(*plain.at(layer))
        laid = [
            tokens.chat(lm.tokenizer, p.question, x, PREFIX)
            for p in b.system_pairs[:half]
            for x in (p.positive, p.negative)
        ]
        acts, _ = reading.means(lm, laid, [layer], "answer")
        found[FORCED][n] = directions.mean(acts[0::2, 0, 0], acts[1::2, 0, 0])
    return found


def _tail(lm: LM, pair: AnswerPair, side: int) -> int:
    """How many tokens at the end of the user's turn are a reported answer."""
    own = (pair.positive, pair.negative)[side]
    return len(tokens.plain(lm.tokenizer, f" {own}").ids) - len(tokens.first_token(lm.tokenizer))


def _contrast(lm: LM, laid: Sequence[Tokens], lengths: Sequence[int], layer: int) -> Tensor:
    """The mean difference of texts, two by two, each read over the last `lengths` tokens of the user's turn."""
    masks = []
    for one, length in zip(laid, lengths, strict=True):
        at = [i for i, role in enumerate(one.roles) if role == tokens.USER][-length:]
        mask = torch.zeros(1, len(one.ids), dtype=torch.bool)
        mask[0, at] = True
        masks.append(mask)
    acts, _ = reading.means(lm, laid, [layer], "reported", masks)
    return directions.mean(acts[0::2, 0, 0], acts[1::2, 0, 0])


def at_small_price(
    lab: Single, vectors: Mapping[str, Tensor], price: float, sizes: Sizes, length: float = 0.1
) -> np.ndarray:
    """The effect by gradient, in standard deviations, of each behaviour's own vector at a small price: KL is measured at `length`
    residual norms and taken to grow with its square. (behaviours,)."""
    none, found = torch.zeros(1, lab.model.d_model), []
    for n, v in vectors.items():
        where = propensity.of_replies(lab.model, lab.data[n].open[: sizes.replies], lab.layer, sizes.tokens)
        step = (v / v.norm() * lab.residual_norm).float()[None]
        kl = float(store.kept(prices, where, step, [length])[0, 0])
        spread = store.kept(log_odds, lab.tested()[n], none)[0].numpy().std(ddof=1)
        found.append(lab.response(n, v[None], 1.0).mean() * length * (price / max(kl, 1e-12)) ** 0.5 / spread)
    return np.array(found)
