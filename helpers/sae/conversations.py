"""Conversations read token by token, with and without a vector: what an SAE makes of it, and what happens where the answer starts.

Three runs of each question: the model's own reply, the steered model's reply read back without steering, and the first reply's
words put at the end of the user's own turn. Knows a model, SAEs and tokens. Numbers are one for each SAE (the seeds of one
training) and behaviour: conversations of a behaviour share a vector, so they are averaged.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers import stats, store
from helpers.lm import hooks, reading, replies, tokens
from helpers.lm.reading import LM
from helpers.lm.tokens import Tokens
from helpers.sae import decompose, splice
from helpers.sae.splice import Errors, Spoken
from helpers.sae.topk import Dictionary
from helpers.stats import Interval

LEAST = 6  # tokens on either side of the start: a change point wants twelve
IN_PLACE, ALONE, PAIRS = "steered - unsteered", "encode(v)", "the vector's own pairs, encoded"
SWAPPED = "the same, every other pair swapped"
Sides = tuple[Tensor, Tensor]  # activations of pairs: positive, negative, each (pairs, d_model)


class Talk(NamedTuple):
    """One question of a `behavior`, read after the steered layer: the `plain` reply, the `steered` one (its text, not its run),
    and the plain reply's words `inside` the user's own turn."""

    behavior: str
    question: str
    plain: Spoken
    steered: Spoken
    inside: Spoken
    said: str  # the plain reply, as text
    reply: str  # the steered one


def held(lm: LM, layer: int, asked: Sequence[tuple[str, str]], pushes: Tensor, limit: float, length: int) -> list[Talk]:
    """The conversations about `asked` (behaviour, question), steered by `pushes` (questions, d_model), greedy, `length` tokens long.

    Rows longer than `limit` are left out, and conversations with fewer than six tokens on either side of the start.
    """
    questions = [q for _, q in asked]
    plain, steered = (
        [
            row[row >= 0].tolist()
            for row in replies.generate_ids(lm, questions, layer, x * pushes, max_new_tokens=length)
        ]
        for x in (0.0, 1.0)
    )

    def read(said: Sequence[list[int]], own_turn: bool = True) -> list[Spoken]:
        whole = [tokens.conversation(lm.tokenizer, q, r, own_turn) for q, r in zip(questions, said, strict=True)]
        rows = store.kept(reading.residuals, lm, whole, layer)
        return [splice.spoken(t, x, limit) for t, x in zip(whole, rows, strict=True)]

    texts = [[lm.tokenizer.decode(reply) for reply in said] for said in (plain, steered)]
    runs = zip(asked, read(plain), read(steered), read(plain, own_turn=False), *texts, strict=True)
    found = [Talk(name, q, *rest) for (name, q), *rest in runs]
    return [
        t for t in found if all(min(x.answer.sum(), (~x.answer).sum()) >= LEAST for x in (t.plain, t.steered, t.inside))
    ]


def start(run: Spoken) -> int:
    """The place of the answer's first token."""
    return int(run.answer.argmax())


def by_behavior(
    talks: Sequence[Talk], values: Sequence[float | np.ndarray] | Sequence[np.ndarray] | np.ndarray
) -> np.ndarray:
    """The mean for each behaviour of a number a conversation, or of several, one for each SAE or draw: (..., behaviours)."""
    x, names = np.stack([np.asarray(v, np.float64) for v in values]), np.array([t.behavior for t in talks])
    return np.stack([x[names == n].mean(0) for n in dict.fromkeys(names)], axis=-1)


# --- latents ---------------------------------------------------------------------------------------------------------------


def changed(sae: Dictionary, row: Tensor, v: Tensor, n: int) -> list[tuple[int, float, float]]:
    """The n latents whose code changes most if `v` is added to one activation (d_model,): number, code before, code after."""
    before, after = decompose.codes_of(sae, torch.stack([row, row + v.to(row.dtype)]))
    top = (after - before).abs().topk(n).indices.tolist()
    return [(i, float(before[i]), float(after[i])) for i in top]


def some_rows(talks: Sequence[Talk], n: int) -> Tensor:
    """About n activations (n, d_model) of unsteered answers, evenly over all conversations."""
    rows = torch.cat([t.plain.rows[t.plain.answer] for t in talks])
    return rows[:: max(len(rows) // n, 1)][:n]


def reference(sae: Dictionary, sides: Sides) -> Tensor:
    """How much more each latent fires on the positive side of pairs, on average, 0 where it fires less: (latents,)."""
    return _raised(sae, *sides).mean(0).clamp_min(0)


def scores(
    saes: Sequence[Dictionary],
    vectors: Tensor,
    acts: Tensor,
    made: Sequence[Sides],
    held_out: Sequence[Sides],
    n: int,
) -> dict[str, np.ndarray]:
    """For every way to read a vector: the share of its n largest positive latents that are among the n that pairs not used for the
    vector raise most, (SAEs, behaviours, behaviours): the vector of the one behaviour, the pairs of the other.

    `vectors` (behaviours, d_model); `acts` (m, d_model) to which they are added; the pairs that `made` each vector and those
    `held_out`. PAIRS, the codes of the pairs that made the vector, is the ceiling; SWAPPED has every other of them swapped.
    """
    found: dict[str, list[np.ndarray]] = {}
    for sae in saes:
        ways = decompose.readings(sae, vectors.float(), acts)
        differences = [_raised(sae, *sides) for sides in made]
        ways[PAIRS] = torch.stack([d.mean(0) for d in differences])
        ways[SWAPPED] = torch.stack([(d[: len(d) // 2 * 2 : 2] - d[1::2]).mean(0) for d in differences])
        references = [reference(sae, sides) for sides in held_out]
        for m, codes in ways.items():
            hits = [decompose.overlap(codes.clamp_min(0), r, n) for r in references]
            found.setdefault(m, []).append(np.stack(hits, axis=1))
    return {m: np.stack(each) for m, each in found.items()}


class Beyond(NamedTuple):
    """How much more a reading says than ALONE, of the behaviours' `own` latents (SAEs, behaviours), and the `null`, where other
    behaviours' pairs say which those are (draws,)."""

    own: np.ndarray
    null: np.ndarray


def beyond(found: Mapping[str, np.ndarray], draws: int, seed: int) -> dict[str, Beyond]:
    """Each reading of `scores` against ALONE, the same vectors and latents in both."""
    more = {m: x - found[ALONE] for m, x in found.items() if m != ALONE}
    return {m: Beyond(np.diagonal(x, axis1=1, axis2=2), stats.dealt(x.mean(0), draws, seed)) for m, x in more.items()}


def _raised(sae: Dictionary, pos: Tensor, neg: Tensor) -> Tensor:
    """How much more each latent fires on the positive side of each pair: (pairs, latents)."""
    return (decompose.codes_of(sae, pos) - decompose.codes_of(sae, neg)).cpu()


# --- above the steered layer -----------------------------------------------------------------------------------------------


def carried(
    lm: LM, layer: int, talks: Sequence[Talk], pushes: Sequence[Tensor], at: Sequence[int], batch: int = 32
) -> dict[int, list[Tensor]]:
    """What a run in which `pushes`, a vector (d_model,) a conversation, is added to every token after block `layer` has more than one
    without, after each of the blocks `at`: for each conversation (spoken tokens, d_model) float32."""
    whole = [tokens.conversation(lm.tokenizer, t.question, t.plain.ids[t.plain.answer].tolist()) for t in talks]
    found: dict[int, list[Tensor]] = {k: [] for k in at}

    def run(part: Sequence[Tokens], push: Tensor) -> dict[int, Tensor]:
        with hooks.edit(lm, layer, lambda acts: hooks.shifted(acts, push[:, None])):
            ((_, _, acts),) = reading.batches(lm, part, at, len(part), by_length=False)
        return {k: x.float().cpu() for k, x in acts.items()}

    for first in range(0, len(whole), batch):
        part, push = whole[first : first + batch], torch.stack(list(pushes[first : first + batch]))
        steered, plain = run(part, push), run(part, 0 * push)
        for k in at:
            for one, other, text in zip(steered[k], plain[k], part, strict=True):
                found[k].append(splice.spoken(text, (one - other)[: len(text.ids)]).rows)
    return found


class Arrived(NamedTuple):
    """At one layer, cosines of what arrives of the vectors (rows, a behaviour each): with the behaviours' own directions there,
    `own` (behaviours, behaviours); of the vectors themselves with those, `vector`; of other pairs' directions there, `ceiling`
    (behaviours,); and of what arrives with the vector, `kept`."""

    own: np.ndarray
    vector: np.ndarray
    ceiling: np.ndarray
    kept: np.ndarray


def arrived(
    talks: Sequence[Talk],
    gaps: Sequence[Tensor],
    vectors: Mapping[str, Tensor],
    halves: Mapping[str, Sequence[Tensor]],
) -> Arrived:
    """Where a vector's shift points at a layer: `gaps` (spoken tokens, d_model) a conversation, of `carried`; `halves`: each
    behaviour's direction there, of the pairs that made the vector and of those kept, its own."""
    shift = by_behavior(talks, [g.double().mean(0).numpy() for g in gaps]).T
    v = np.stack([x.double().numpy() for x in vectors.values()])
    made, there = (np.stack([halves[n][i].double().numpy() for n in vectors]) for i in (0, 1))
    with_own, alone = (stats.cosine(x[:, None], there[None]) for x in (shift, v))
    return Arrived(with_own, alone, stats.cosine(made, there), stats.cosine(shift, v))


# --- the SAE's error -------------------------------------------------------------------------------------------------------


def errors(saes: Sequence[Dictionary], runs: Sequence[Spoken], *pushes: Sequence[Tensor]) -> list[list[Errors]]:
    """For each of `pushes`, one vector (d_model,) a run: every SAE's error with it added to every row, against its error without;
    for each run `ratio` and `cosine` (SAEs, tokens)."""
    rows, lengths = torch.cat([x.rows for x in runs]), [len(x.rows) for x in runs]
    base = [splice.errors(sae, rows).double() for sae in saes]
    found = []
    for vectors in pushes:
        each = torch.stack([v.float() for v in vectors]).repeat_interleave(torch.tensor(lengths), 0)
        moved = [splice.errors(sae, rows + each).double() for sae in saes]
        ratio = torch.stack([m.norm(dim=1) / b.norm(dim=1) for m, b in zip(moved, base, strict=True)])
        cosine = [stats.cosine(b.numpy(), m.numpy()) for m, b in zip(moved, base, strict=True)]
        parts = zip(ratio.split(lengths, 1), torch.from_numpy(np.stack(cosine)).split(lengths, 1), strict=True)
        found.append([Errors(r.numpy(), c.numpy()) for r, c in parts])
    return found


def ratios(talks: Sequence[Talk], found: Sequence[Errors]) -> np.ndarray:
    """How long the errors are, of the unsteered ones: (SAEs, behaviours)."""
    return by_behavior(talks, [x.ratio.mean(-1) for x in found])


def by_strength(
    saes: Sequence[Dictionary], talks: Sequence[Talk], vectors: Sequence[Tensor], lengths: Sequence[float], unit: float
) -> list[Interval]:
    """`ratios` over behaviours and SAEs with a vector (d_model,) a conversation brought to each of `lengths`, in units of `unit`."""
    pushes = [[v / v.norm() * x * unit for v in vectors] for x in lengths]
    return [stats.over_both(ratios(talks, found)) for found in errors(saes, [t.plain for t in talks], *pushes)]


def settled(talks: Sequence[Talk], found: Sequence[Errors], early: int) -> tuple[list[Talk], list[Errors]]:
    """The conversations, and their errors, without the first `early` words and the two at the boundary between question and answer."""
    shorter, kept = [], []
    for t, x in zip(talks, found, strict=True):
        here = np.arange(len(t.plain.answer)) >= early
        here[start(t.plain) - 1 : start(t.plain) + 1] = False
        rows = torch.from_numpy(here)
        shorter.append(t._replace(plain=Spoken(t.plain.rows[rows], t.plain.ids[rows], t.plain.answer[here])))
        kept.append(Errors(x.ratio[:, here], x.cosine[:, here]))
    return shorter, kept


def drop(series: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """The mean of a series (..., tokens) over the user's tokens less its mean over the answer's: (...)."""
    return series[..., ~answer].mean(-1) - series[..., answer].mean(-1)


def drops(talks: Sequence[Talk], found: Sequence[Errors], where: str = "plain") -> np.ndarray:
    """The `drop` of the errors' cosine from the user's turn to the answer: (SAEs, behaviours)."""
    runs: list[Spoken] = [getattr(t, where) for t in talks]
    return by_behavior(talks, [drop(x.cosine, run.answer) for x, run in zip(found, runs, strict=True)])


def sluggish_drops(talks: Sequence[Talk], cosines: Sequence[np.ndarray], draws: int, seed: int) -> np.ndarray:
    """The null of a mean drop, (draws,): series that remember as much as these (tokens,) and know nothing of an answer; `stats.ar1`."""
    pairs = enumerate(zip(talks, cosines, strict=True))
    each = [drop(stats.ar1(c, draws, seed + i), t.plain.answer) for i, (t, c) in pairs]
    return by_behavior(talks, each).mean(1)


def dip(series: np.ndarray, at: int) -> np.ndarray:
    """How far the two words at the boundary, before `at` and at it, lie below the three on either side of them: (...)."""
    around = [*range(max(at - 4, 0), at - 1), *range(at + 1, min(at + 4, series.shape[-1]))]
    return series[..., around].mean(-1) - series[..., [at - 1, at]].mean(-1)


def dips(talks: Sequence[Talk], found: Sequence[Errors], at: Sequence[int]) -> np.ndarray:
    """The `dip` of the errors' cosine at a place of each conversation: (SAEs, behaviours)."""
    return by_behavior(talks, [dip(x.cosine, i) for x, i in zip(found, at, strict=True)])


def rotated(
    talks: Sequence[Talk],
    cosines: Sequence[np.ndarray],
    measure: Callable[[np.ndarray, int], float | np.ndarray],
    draws: int,
    seed: int,
) -> np.ndarray:
    """The null of the mean of `measure`(series, start) over behaviours, (draws,): each series (..., tokens) rotated by a random
    offset, which keeps its wiggles."""
    rng = np.random.default_rng(seed)
    pairs = [(c, start(t.plain)) for t, c in zip(talks, cosines, strict=True)]
    return np.array(
        [
            by_behavior(talks, [measure(np.roll(c, rng.integers(c.shape[-1]), -1), at) for c, at in pairs]).mean()
            for _ in range(draws)
        ]
    )


class Turning(NamedTuple):
    """Whether a series' most pronounced change of mean lies `within` so many tokens of a place."""

    within: int

    def __call__(self, series: np.ndarray, at: int) -> float:
        return float(abs(stats.change_point(series, draws=1).at - at) <= self.within)


def two_texts(saes: Sequence[Dictionary], runs: Sequence[Spoken], others: Sequence[Spoken]) -> list[np.ndarray]:
    """For each pair of runs that wrote their own replies: 1 less the cosine of the SAE's errors on the answers' tokens, n-th with
    n-th, (SAEs,). Two runs of one question are the same on the user's tokens: the cosine is 1 there."""
    found = []
    for run, other in zip(runs, others, strict=True):
        one, two = (x.rows[x.answer] for x in (run, other))
        n = min(len(one), len(two))
        found.append(np.array([1 - splice.compare_errors(sae, one[:n], two[:n]).cosine.mean() for sae in saes]))
    return found


# --- the stream against v --------------------------------------------------------------------------------------------------


def turned(run: Spoken, v: Tensor) -> np.ndarray:
    """The cosine of v with each row (tokens,), less its mean over the user's tokens."""
    cosine = stats.cosine(run.rows.numpy(), v.numpy())
    return cosine - cosine[~run.answer].mean()


def rise(run: Spoken, v: Tensor) -> float:
    """The answer's mean cosine with v less the user's."""
    return -float(drop(stats.cosine(run.rows.numpy(), v.numpy()), run.answer))


def beyond_plain(talk: Talk, v: Tensor) -> np.ndarray:
    """How far each word of the steered conversation has `turned` towards v, beyond the same place of the unsteered one: (tokens,)."""
    one, other = turned(talk.steered, v), turned(talk.plain, v)
    n = min(len(one), len(other))
    return one[:n] - other[:n]


def still_steered(run: Spoken, v: Tensor) -> Spoken:
    """The run with v added to the answer's rows, as it was when the answer was written."""
    return run._replace(rows=run.rows + torch.from_numpy(run.answer)[:, None] * v.to(run.rows.dtype))


def rises_beyond(talks: Sequence[Talk], vectors: Sequence[Tensor]) -> np.ndarray:
    """How far steered answers rise towards a vector (d_model,) a conversation, beyond unsteered ones: (behaviours,)."""
    return by_behavior(talks, [rise(t.steered, v) - rise(t.plain, v) for t, v in zip(talks, vectors, strict=True)])


def rises_still_steered(talks: Sequence[Talk], vectors: Sequence[Tensor]) -> np.ndarray:
    """How far steered answers rise towards a vector that is still added to them: (behaviours,)."""
    return by_behavior(talks, [rise(still_steered(t.steered, v), v) for t, v in zip(talks, vectors, strict=True)])


class Tracking(NamedTuple):
    """cos(a, r)|r| + cos(a, e)|e| against cos(a, v)|v| over rows a, for v = r + e with r what the SAE makes of v: `ratio` is 1
    plus their relative difference; the `correlation` of cos(a, r) - cos(a, -e) with cos(a, v); `opposed`, the cosine of r and e."""

    ratio: float
    correlation: float
    opposed: float


def tracking(sae: Dictionary, rows: Tensor, v: Tensor) -> Tracking:
    """Whether a vector's cosines with `rows` (tokens, d_model) are tracked by those of its reconstruction and its error."""
    a, whole = rows.double().numpy(), v.double().numpy()
    e = splice.errors(sae, v[None].float())[0].double().numpy()
    r = whole - e
    with_r, with_e, with_v = (stats.cosine(a, x) for x in (r, e, whole))
    one = with_r * np.linalg.norm(r) + with_e * np.linalg.norm(e)
    two = with_v * np.linalg.norm(whole)
    correlation = float(np.corrcoef(with_r + with_e, with_v)[0, 1])
    return Tracking(1 + float(np.linalg.norm(one - two) / np.linalg.norm(two)), correlation, float(stats.cosine(r, e)))
