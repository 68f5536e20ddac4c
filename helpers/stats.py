"""Intervals, slopes and nulls: arrays in, numbers out, in float64, with the seed in the signature.

Knows nothing of models or text. Percentile bootstrap over the units that were sampled (items, pairs, prompts):
Efron & Tibshirani 1993, ch. 13.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def _resamples(n: int, draws: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n, size=(draws, n))


def bootstrap(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], float] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """The statistic (mean by default) of `values` (n, ...) with a 95 % percentile interval over resampled rows.

    ValueError if there are fewer than two rows: one row has no spread to resample.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        raise ValueError(f"a bootstrap over {len(x)} value(s) was asked for; it needs two or more")
    rows = _resamples(len(x), draws, seed)
    if statistic is None:
        point, reps = x.mean(), x[rows].reshape(draws, -1).mean(axis=1)
    else:
        point, reps = statistic(x), np.array([statistic(x[r]) for r in rows])
    low, high = np.nanquantile(reps, [0.025, 0.975])
    return Interval(float(point), float(low), float(high))


def centred(point: float, draws: Sequence[float]) -> Interval:
    """The 95 % spread of `draws` about their mean, laid around `point`.

    For statistics that resampling with repeats shifts (a cosine between two estimates from the same resample). It holds
    `point` also where draws are so skewed that nearly all lie on one side of their mean.
    """
    low, high = np.quantile(draws, [0.025, 0.975]) - np.mean(draws)
    return Interval(float(point), float(point + min(low, 0.0)), float(point + max(high, 0.0)))


def mean_of(intervals: Sequence[Interval]) -> Interval:
    """The mean of independent estimates, their half-widths added in quadrature."""
    value, low, high = np.array(intervals, np.float64).T
    below, above = (np.sqrt((side**2).sum()) / len(value) for side in (value - low, high - value))
    return Interval(float(value.mean()), float(value.mean() - below), float(value.mean() + above))


def difference(one: Interval, other: Interval) -> Interval:
    """The difference of two independent estimates, their half-widths added in quadrature."""
    value = one.value - other.value
    below = np.hypot(one.value - one.low, other.high - other.value)
    above = np.hypot(one.high - one.value, other.value - other.low)
    return Interval(float(value), float(value - below), float(value + above))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine along the last axis, float64, 0 where either side is zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norm = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.divide((a * b).sum(-1), norm, out=np.zeros(np.shape(norm)), where=norm > 0)


def at_level(x: Sequence[float], y: Sequence[float], level: float) -> float:
    """y where the piecewise-linear curve through (x, y), x increasing from 0, reaches `level`; NaN if it never does."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    reached = np.flatnonzero(x >= level)
    if not len(reached):
        return float("nan")
    i = reached[0]
    if i == 0:
        return float(y[0])
    share = (level - x[i - 1]) / (x[i] - x[i - 1])
    return float(y[i - 1] + share * (y[i] - y[i - 1]))


class ChangePoint(NamedTuple):
    """Where a series changes its mean most: `at`, the index of the first value after; the `statistic`; the share `p` of series, its
    own among the shuffled ones, whose largest statistic is at least as large."""

    at: int
    statistic: float
    p: float


def change_point(series: Sequence[float] | np.ndarray, least: int = 3, draws: int = 1000, seed: int = 0) -> ChangePoint:
    """The single change of mean of a series (n,) that is most pronounced, either way, with its null of shuffled values.

    Statistic of a split into m and n - m values: sqrt(m (n - m) / n) |mean before - mean after| / standard deviation (the CUSUM of
    Page 1955, normalised), its largest over splits with `least` values on either side. Shuffling takes any trend or
    autocorrelation out of the null, so a small p says "not exchangeable", not "one jump". ValueError for a series too short.
    """
    x = np.asarray(series, np.float64)
    n = len(x)
    if x.ndim != 1 or n < 2 * least or not np.isfinite(x).all():
        raise ValueError(f"a series of shape {x.shape} was given; {2 * least} finite values or more are wanted")
    rng, before = np.random.default_rng(seed), np.arange(least, n - least + 1)

    def splits(rows: np.ndarray) -> np.ndarray:
        sums = rows.cumsum(1)
        gap = sums[:, before - 1] / before - (sums[:, -1:] - sums[:, before - 1]) / (n - before)
        return np.sqrt(before * (n - before) / n) * np.abs(gap) / max(x.std(), 1e-300)

    own = splits(x[None])[0]
    shuffled = splits(rng.permuted(np.tile(x, (draws, 1)), axis=1)).max(1)
    return ChangePoint(int(before[own.argmax()]), float(own.max()), p_value(own.max() - 1e-12, shuffled))


def p_value(value: float, null: Sequence[float] | np.ndarray) -> float:
    """The share of null draws, the value itself among them, that are at least as large: (1 + reached) / (1 + draws)."""
    null = np.asarray(null, np.float64)
    return float((1 + (null >= value).sum()) / (1 + len(null)))


def holm(p: Sequence[float]) -> np.ndarray:
    """p-values (n,) corrected for having asked n questions: Holm 1979. Never below the given ones, never above 1.

    ValueError for one outside 0 to 1.
    """
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values {p.tolist()} were given; a list of numbers between 0 and 1 is wanted")
    order = np.argsort(p, kind="stable")
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    out = np.empty(len(p))
    out[order] = np.minimum(raised, 1.0)
    return out
