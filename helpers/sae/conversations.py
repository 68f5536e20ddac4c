"""Conversations read token by token, with and without a vector: what happens where the answer starts.

Three runs of each question: the model's own reply, the steered model's reply read back without steering, and the first reply's
words put at the end of the user's own turn. Knows a model, an SAE and tokens; conversations are grouped by behaviour because
those of one behaviour share a vector.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers import stats, store
from helpers.lm import reading, replies, tokens
from helpers.lm.reading import LM
from helpers.sae import splice
from helpers.sae.decompose import Dictionary
from helpers.sae.splice import Errors, Spoken

LEAST = 6  # tokens on either side of the start: a change point wants twelve


class Talk(NamedTuple):
    """One question of a `behavior`, read after the steered layer: the `plain` reply, the `steered` one (its text, not its run),
    and the plain reply's words `inside` the user's own turn."""

    behavior: str
    question: str
    plain: Spoken
    steered: Spoken
    inside: Spoken
    reply: str  # the steered one, as text


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

    texts = [lm.tokenizer.decode(reply) for reply in steered]
    runs = zip(asked, read(plain), read(steered), read(plain, own_turn=False), texts, strict=True)
    found = [Talk(name, q, one, two, three, said) for (name, q), one, two, three, said in runs]
    return [
        t for t in found if all(min(x.answer.sum(), (~x.answer).sum()) >= LEAST for x in (t.plain, t.steered, t.inside))
    ]


def added(lm: LM, layer: int, talks: Sequence[tuple[str, Sequence[int]]], vector: Tensor) -> np.ndarray:
    """Cosine (tokens,) of (steered - unsteered) with the vector, read at the layer where it is added, over whole conversations
    (question, reply ids)."""
    whole = [tokens.conversation(lm.tokenizer, q, list(reply)) for q, reply in talks]
    with_v, without = (reading.residuals(lm, whole, layer, push) for push in (vector, None))
    gaps = [splice.spoken(t, a).rows - splice.spoken(t, b).rows for t, a, b in zip(whole, with_v, without, strict=True)]
    return stats.cosine(torch.cat(gaps).numpy(), vector.numpy())


def errors(sae: Dictionary, runs: Sequence[Spoken], *pushes: Sequence[Tensor]) -> list[list[Errors]]:
    """For each of `pushes`, one vector (d_model,) a run: the SAE's error with it added to every row, against its error without."""
    rows, lengths = torch.cat([x.rows for x in runs]), [len(x.rows) for x in runs]
    base = splice.errors(sae, rows).double()
    found = []
    for vectors in pushes:
        each = torch.stack([v.float() for v in vectors]).repeat_interleave(torch.tensor(lengths), 0)
        moved = splice.errors(sae, rows + each).double()
        ratio = (moved.norm(dim=1) / base.norm(dim=1)).split(lengths)
        cosine = torch.from_numpy(stats.cosine(base.numpy(), moved.numpy())).split(lengths)
        found.append([Errors(r.numpy(), c.numpy()) for r, c in zip(ratio, cosine, strict=True)])
    return found


def two_texts(sae: Dictionary, talk: Talk, v: Tensor) -> float:
    """The `drop` where each run writes its own reply: errors of the plain run against those of the steered reply's rows plus v."""
    n = min(len(talk.plain.rows), len(talk.steered.rows))
    cosine = splice.compare_errors(sae, talk.plain.rows[:n], talk.steered.rows[:n] + v).cosine
    return drop(cosine, np.arange(n) >= start(talk.plain))


def start(run: Spoken) -> int:
    """The place of the answer's first token."""
    return int(run.answer.argmax())


def drop(series: np.ndarray, answer: np.ndarray) -> float:
    """The mean of a series (tokens,) over the user's tokens less its mean over the answer's."""
    return float(series[~answer].mean() - series[answer].mean())


def dip(series: np.ndarray, at: int) -> float:
    """How far the two words at the seam, before `at` and at it, lie below the three on either side of them."""
    around = [*range(max(at - 4, 0), at - 1), *range(at + 1, min(at + 4, len(series)))]
    return float(series[around].mean() - series[[at - 1, at]].mean())


def by_behavior(talks: Sequence[Talk], values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The mean of a number a conversation (talks,) or of draws of it (draws, talks) for each behaviour: (..., behaviours)."""
    x, names = np.asarray(values, np.float64), np.array([t.behavior for t in talks])
    return np.stack([x[..., names == n].mean(-1) for n in dict.fromkeys(names)], axis=-1)


def shuffled_drops(talks: Sequence[Talk], cosines: Sequence[np.ndarray], draws: int, seed: int) -> np.ndarray:
    """The drops (draws, talks) with each conversation's tokens shuffled."""
    rng = np.random.default_rng(seed)
    pairs = [(c, t.plain.answer) for t, c in zip(talks, cosines, strict=True)]
    return np.array([[drop(rng.permutation(c), answer) for c, answer in pairs] for _ in range(draws)])


def rotated(
    talks: Sequence[Talk],
    cosines: Sequence[np.ndarray],
    measure: Callable[[np.ndarray, int], float],
    draws: int,
    seed: int,
) -> np.ndarray:
    """`measure`(series, start) (draws, talks) with each series rotated by a random offset, which keeps its wiggles."""
    rng = np.random.default_rng(seed)
    pairs = [(c, start(t.plain)) for t, c in zip(talks, cosines, strict=True)]
    return np.array([[measure(np.roll(c, rng.integers(len(c))), at) for c, at in pairs] for _ in range(draws)])


class Turning(NamedTuple):
    """Whether a series' most pronounced change of mean lies `within` so many tokens of a place."""

    within: int

    def __call__(self, series: np.ndarray, at: int) -> float:
        return float(abs(stats.change_point(series, draws=1).at - at) <= self.within)


def turned(run: Spoken, v: Tensor) -> np.ndarray:
    """The cosine of v with each row (tokens,), less its mean over the user's tokens."""
    cosine = stats.cosine(run.rows.numpy(), v.numpy())
    return cosine - cosine[~run.answer].mean()


def rise(run: Spoken, v: Tensor) -> float:
    """The answer's mean cosine with v less the user's."""
    return -drop(stats.cosine(run.rows.numpy(), v.numpy()), run.answer)


class Tracking(NamedTuple):
    """cos(a, r)|r| + cos(a, e)|e| against cos(a, v)|v| over rows a, for v = r + e with r what the SAE makes of v: `ratio` is 1
    plus their relative difference; the `correlation` of cos(a, r) - cos(a, -e) with cos(a, v); `opposed`, the cosine of r and e."""

    ratio: float
    correlation: float
    opposed: float


def tracking(sae: Dictionary, rows: Tensor, v: Tensor) -> Tracking:
    """Whether a vector's cosines with `rows` (tokens, d_model) are tracked by those of its reconstruction and its error."""
    a, whole = rows.double().numpy(), v.double().numpy()
    e = splice.errors(sae, v[None])[0].double().numpy()
    r = whole - e
    with_r, with_e, with_v = (stats.cosine(a, x) for x in (r, e, whole))
    one = with_r * np.linalg.norm(r) + with_e * np.linalg.norm(e)
    two = with_v * np.linalg.norm(whole)
    correlation = float(np.corrcoef(with_r + with_e, with_v)[0, 1])
    return Tracking(1 + float(np.linalg.norm(one - two) / np.linalg.norm(two)), correlation, float(stats.cosine(r, e)))
