"""Intervals, p-values and nulls: arrays in, numbers out, in float64, without a random draw unless a seed is given.

Knows nothing of models or text. The unit is what was sampled: a sentence about steering vectors is about behaviours, so that
behaviours, and not their items, are what an interval ranges over. Which interval covers what it says at the sizes of this
repository is measured in docs/verdicts.md.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats as scipy_stats

LEVEL = 0.95


class Interval(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def map(self, f: Callable[[float], float]) -> "Interval":
        """The interval of f(value), f rising: of a mean of logs, exp gives that of the geometric mean."""
        return Interval(*(float(f(x)) for x in self))

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def _t(df: float, level: float = LEVEL) -> float:
    return float(scipy_stats.t.ppf((1 + level) / 2, df))


def over(units: Sequence[Any] | np.ndarray, statistic: Callable[[Any], float | np.ndarray] | None = None) -> Interval:
    """The statistic of `units` (n, ...) with a 95 % t interval over the units: the delete-one jackknife (Efron & Tibshirani 1993,
    ch. 11), which for a mean is the plain t interval.

    A unit is what was sampled at the top: a behaviour, with all its items and pairs in it, whose noise the spread between
    behaviours holds already. `statistic` takes units as given, an array or a list, and is the mean by default. Where it gives
    several values, one for each seed of what was trained, the value is their mean, and their own spread is added (degrees of
    freedom by Satterthwaite 1946). Not for medians or other statistics with jumps. ValueError for fewer than three units.
    """
    x = units if isinstance(units, np.ndarray) else list(units)
    n = len(x)
    if n < 3:
        raise ValueError(f"an interval over {n} unit(s) was asked for; it needs three or more")
    find = statistic or (lambda part: np.mean(part, dtype=np.float64))
    without = [np.delete(x, i, 0) if isinstance(x, np.ndarray) else x[:i] + x[i + 1 :] for i in range(n)]
    whole = np.atleast_1d(np.asarray(find(x), np.float64))
    left_out = np.array([np.mean(find(part), dtype=np.float64) for part in without])
    value = float(whole.mean())
    variance, df = float((n - 1) * left_out.var()), float(n - 1)
    if (seeds := len(whole)) > 1:
        of_seeds = float(whole.var(ddof=1) / seeds)
        if variance + of_seeds > 0:
            df = (variance + of_seeds) ** 2 / (variance**2 / (n - 1) + of_seeds**2 / (seeds - 1))
        variance += of_seeds
    half = _t(df) * variance**0.5
    return Interval(value, value - half, value + half)


class NothingToDivideBy(ValueError):
    """The sum below a ratio is not clearly above or below zero."""


def over_both(table: Sequence[Sequence[float]] | np.ndarray) -> Interval:
    """The mean of a table (seeds, units) with a 95 % interval over both: `over`, with one value for each seed."""
    return over(np.asarray(table, np.float64).T, lambda part: part.mean(0))


def ratio(tops: Sequence[float] | np.ndarray, bottoms: Sequence[float] | np.ndarray) -> Interval:
    """Sum of `tops` over sum of `bottoms` (units,), with a 95 % interval over the units by Fieller's theorem (1954).

    NothingToDivideBy, a ValueError, where the sum below is not clearly above or below zero: the interval has no ends.
    """
    top, bottom = np.asarray(tops, np.float64), np.asarray(bottoms, np.float64)
    if top.ndim != 1 or top.shape != bottom.shape or len(top) < 3:
        raise ValueError(
            f"tops {top.shape} and bottoms {bottom.shape} were given; two rows of three or more are wanted"
        )
    n, (a, b), t = len(top), (top.mean(), bottom.mean()), _t(len(top) - 1)
    (aa, ab), (_, bb) = np.cov(top, bottom) / n
    lead = b * b - t * t * bb
    if lead <= 0:
        raise NothingToDivideBy(
            f"the sum below a ratio, {bottom.sum():.3g} over {n} units, is not clear of zero: report the top alone"
        )
    root = max((a * b - t * t * ab) ** 2 - lead * (a * a - t * t * aa), 0.0) ** 0.5
    low, high = ((a * b - t * t * ab - sign * root) / lead for sign in (1, -1))
    return Interval(float(a / b), float(low), float(high))


def ratio_if_clear(tops: Sequence[float] | np.ndarray, bottoms: Sequence[float] | np.ndarray) -> Interval | None:
    """`ratio`, or None where the sum below is not clear of zero: such a claim is not run."""
    try:
        return ratio(tops, bottoms)
    except NothingToDivideBy:
        return None


def share(hits: Sequence[bool] | np.ndarray) -> Interval:
    """The share of units that are true, with Wilson's interval (1927)."""
    x = np.asarray(hits, bool)
    found = scipy_stats.binomtest(int(x.sum()), len(x)).proportion_ci(LEVEL, method="wilson")
    return Interval(float(x.mean()), float(found.low), float(found.high))


def seen(found: Interval, power: float = 0.8) -> float:
    """How far from a threshold a value must lie for its interval to clear it in `power` of all repetitions, spread as here."""
    half = (found.high - found.low) / 2
    return half * (1 + float(scipy_stats.norm.ppf(power)) / float(scipy_stats.norm.ppf((1 + LEVEL) / 2)))


def grouped(values: np.ndarray, groups: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Sums (groups, ...) of `values` (units, ...) over units of one group, groups in the order in which they come."""
    names = np.asarray(groups)
    return np.stack([np.asarray(values, np.float64)[names == g].sum(0) for g in dict.fromkeys(names.tolist())])


def p_value(value: float, null: Sequence[float] | np.ndarray) -> float:
    """The share of null draws, the value itself among them, that are at least as large: (1 + reached) / (1 + draws)."""
    null = np.asarray(null, np.float64)
    return float((1 + (null >= value).sum()) / (1 + len(null)))


def reach(null: Sequence[float] | np.ndarray) -> float:
    """What one null draw in twenty exceeds: the 95 % quantile, as a p-value of 0.05 has it."""
    return float(np.quantile(np.asarray(null, np.float64), 0.95, method="higher"))


def band(null: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The central 95 % of null draws, for a figure."""
    low, high = np.quantile(np.asarray(null, np.float64), [0.025, 0.975])
    return float(low), float(high)


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
