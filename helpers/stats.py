"""Intervals, p-values and nulls: arrays in, numbers out, in float64, without a random draw unless a seed is given.

Knows nothing of models or text. The unit is what was sampled: a sentence about steering vectors is
about behaviours, so that behaviours, and not their items, are what an interval ranges over. Which
interval covers what it says at the sizes of this repository is measured in docs/verdicts.md.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special
from scipy.stats import rankdata

LEVEL = 0.95
SKEWED = 1.5  # of seven or twelve normal units, one sample in a hundred is more skewed than this
SHORTEST = 12  # a shorter series does not show its memory: its change points have a size above 0.06


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
    return float(special.stdtrit(df, (1 + level) / 2))


def _arms(units: np.ndarray) -> tuple[float, float]:
    """How far the 95 % interval of the mean of `units` (n,) reaches below it, and above it.

    Student's t, its skewness taken out by Hall's cubic (1992, J. R. Statist. Soc. B 54, 221): with u
    the error in standard deviations and g the skewness, u + g u^2/3 + g^2 u^3/27 + g/6n is t/sqrt(n).
    """
    n, spread = len(units), float(units.std(ddof=1))
    if not spread > 0:
        return 0.0, 0.0
    t, skew = _t(n - 1), float(((units - units.mean()) ** 3).mean() / units.std() ** 3)
    if abs(skew) > max(SKEWED, 0.4 * n**0.5):  # more units bear more of it
        warnings.warn(
            f"the {n} units are skewed ({skew:+.1f}), so that their interval ends too early on the "
            "side of the long tail: take logs of lengths, ratios and counts (docs/verdicts.md)",
            stacklevel=3,
        )
    if abs(skew) < 1e-6:
        return t * spread / n**0.5, t * spread / n**0.5
    ends = [np.cbrt(1 + skew * (y / n**0.5 - skew / (6 * n))) - 1 for y in (t, -t)]
    return float(spread * ends[0] * 3 / skew), float(-spread * ends[1] * 3 / skew)


def over(units: Sequence[Any] | np.ndarray, statistic: Callable[[Any], float | np.ndarray] | None = None) -> Interval:
    """The statistic of `units` (n, ...) with a 95 % interval over the units, by the delete-one
    jackknife (Efron & Tibshirani 1993, ch. 11): for a mean the t interval, corrected for skewness.

    A unit is what was sampled at the top: a behaviour, with all its items and pairs in it, whose
    noise the spread between behaviours holds already. `statistic` takes units as given, an array or
    a list; by default it is the mean of the units' own means. Where it gives several values, one for
    each seed of what was trained, the value is their mean, and what the seeds differ by, beyond what
    units and seeds do together, has a t interval of its own, added in quadrature (Graybill & Wang
    1980). With two seeds that is 12.7 standard errors: a third is worth training. Warns where the
    units are clearly skewed; seven seldom show it. Not for medians or other statistics with jumps.
    ValueError for fewer than three units.
    """
    x = units if isinstance(units, np.ndarray) else list(units)
    n = len(x)
    if n < 3:
        raise ValueError(f"an interval over {n} unit(s) was asked for; it needs three or more")
    if statistic is None:
        own = np.array([np.mean(u, dtype=np.float64) for u in x])
        whole, left_out = own.mean(keepdims=True), (own.sum() - own[:, None]) / (n - 1)
    else:
        without = [np.delete(x, i, 0) if isinstance(x, np.ndarray) else x[:i] + x[i + 1 :] for i in range(n)]
        whole = np.atleast_1d(np.asarray(statistic(x), np.float64))
        left_out = np.array([np.atleast_1d(statistic(part)) for part in without], np.float64)
    value, seeds = float(whole.mean()), len(whole)
    each = n * whole - (n - 1) * left_out  # (units, seeds)
    below, above = _arms(each.mean(1))
    if seeds > 1:
        together = each - each.mean(1, keepdims=True) - each.mean(0) + each.mean()
        both = (together**2).sum() / ((n - 1) * (seeds - 1) * n * seeds)
        arm = _t(seeds - 1) * max(float(whole.var(ddof=1) / seeds - both), 0.0) ** 0.5
        below, above = float(np.hypot(below, arm)), float(np.hypot(above, arm))
    return Interval(value, value - below, value + above)


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
    found = float(a / b)
    return Interval(found, min(float(low), found), max(float(high), found))  # rounding, where they meet


def ratio_if_clear(tops: Sequence[float] | np.ndarray, bottoms: Sequence[float] | np.ndarray) -> Interval | None:
    """`ratio`, or None where the sum below is not clear of zero: such a claim is not run."""
    try:
        return ratio(tops, bottoms)
    except NothingToDivideBy:
        return None


def share(hits: Sequence[bool] | np.ndarray) -> Interval:
    """The share of units (n,) that are true, with the exact interval of Clopper & Pearson (1934).

    The units must have been sampled one by one: for items within behaviours, take each behaviour's
    share and `over`. Wilson's shorter interval was tried: of seven units with a share of 0.02 it
    misses one in six.
    """
    x = np.asarray(hits, bool)
    true, n, tail = int(x.sum()), len(x), (1 - LEVEL) / 2
    low = special.betaincinv(true, n - true + 1, tail) if true else 0.0
    high = special.betaincinv(true + 1, n - true, 1 - tail) if true < n else 1.0
    return Interval(float(x.mean()), float(low), float(high))


def seen(found: Interval, power: float = 0.8) -> float:
    """How far from a threshold a value must lie for its interval to clear it in `power` of all repetitions, spread as here."""
    half = (found.high - found.low) / 2
    return half * (1 + float(special.ndtri(power) / special.ndtri((1 + LEVEL) / 2)))


def grouped(values: np.ndarray, groups: Sequence[str] | np.ndarray) -> np.ndarray:
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


def correlation(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Pearson's correlation of x with y over all values of all parts, a part (x, y) being two arrays of one shape."""
    x, y = (np.concatenate([np.asarray(part[i], np.float64).ravel() for part in parts]) for i in (0, 1))
    return float(np.corrcoef(x, y)[0, 1])


def dealt(table: Sequence[Sequence[float]] | np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
    """Means of table[i, order[i]] for random orders of the columns of a square table, (draws,): the null of its diagonal's mean
    where rows and columns have nothing to do with one another. ValueError for a table that is not square."""
    x = np.asarray(table, np.float64)
    if x.ndim != 2 or len(x) != x.shape[1]:
        raise ValueError(f"a table {x.shape} was given; a square one is wanted")
    rng = np.random.default_rng(seed)
    return np.array([x[np.arange(len(x)), rng.permutation(len(x))].mean() for _ in range(draws)])


def auroc(pos: np.ndarray, neg: np.ndarray) -> np.ndarray:
    """The share of (positive, negative) rows of which the positive is larger, ties counted a half, for each column:
    (...), from `pos` (n, ...) and `neg` (m, ...). The area under the ROC curve (Hanley & McNeil 1982), exactly, by
    ranks."""
    n, m = len(pos), len(neg)
    ranks = rankdata(np.concatenate([np.asarray(x, np.float64) for x in (pos, neg)]), axis=0)
    return np.asarray((ranks[:n].sum(0) - n * (n + 1) / 2) / (n * m))


def auroc_interval(value: float, n: int, m: int) -> Interval:
    """An `auroc` of n against m rows with a 95 % interval: all shares t with (value - t)^2 <= z^2 V(t), so that
    perfectly told sides have one too. V(t) = t (1 - t) (1 + N ((1 - t)/(2 - t) + t/(1 + t))) / nm, N = (n + m)/2 - 1:
    method 5 of Newcombe (2006, Stat. Med. 25, 559), for rows that have nothing to do with one another; of pairs it is
    on the safe side."""
    z2, more = float(special.ndtri((1 + LEVEL) / 2)) ** 2, (n + m) / 2 - 1

    def low(at: float) -> float:
        below, inside = 0.0, at
        for _ in range(60):
            t = (below + inside) / 2
            spread = t * (1 - t) * (1 + more * ((1 - t) / (2 - t) + t / (1 + t))) / (n * m)
            below, inside = (t, inside) if (at - t) ** 2 > z2 * spread else (below, t)
        return inside

    return Interval(float(value), low(float(value)), 1 - low(1 - float(value)))


def at_level(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, level: float) -> float:
    """y where the piecewise-linear curve through (x, y), x increasing from 0, reaches `level`; NaN if it never does."""
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    reached = np.flatnonzero(x >= level)
    if not len(reached):
        return float("nan")
    i = reached[0]
    if i == 0:
        return float(y[0])
    share = (level - x[i - 1]) / (x[i] - x[i - 1])
    return float(y[i - 1] + share * (y[i] - y[i - 1]))


class ChangePoint(NamedTuple):
    """Where a series changes its mean most: `at`, the index of the first value after; the
    `statistic`; the share `p` of series without a change, itself among them, that have as large a one."""

    at: int
    statistic: float
    p: float


def _lag(rows: np.ndarray, add: float = 0.0, lost: float = 0.0) -> np.ndarray:
    """The correlation of each centred row (rows, n) with itself one step on; see `change_point`."""
    own = (rows * rows).sum(1)
    rho = np.divide((rows[:, 1:] * rows[:, :-1]).sum(1), own, out=np.zeros(len(rows)), where=own > 0)
    return np.clip((rows.shape[1] * rho + add) / (rows.shape[1] - lost), -0.97, 0.97)


def _steepest(rows: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row (rows, n) the split with the largest statistic, and that: see `change_point`."""
    n, each = rows.shape[1], np.arange(len(rows))
    before = np.arange(least, n - least + 1)
    sums = rows.cumsum(1)
    first, last = sums[:, before - 1] / before, (sums[:, -1:] - sums[:, before - 1]) / (n - before)
    size = np.sqrt(before * (n - before) / n) * np.abs(first - last)
    best = size.argmax(1)
    late = np.arange(n) >= before[best][:, None]
    rest = rows - np.where(late, last[each, best][:, None], first[each, best][:, None])
    rho = _lag(rest)
    spread = rest.std(1) * np.sqrt((1 + rho) / (1 - rho))
    return before[best], size[each, best] / np.maximum(spread, 1e-300)


def ar1(series: Sequence[float] | np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
    """Series (draws, n) around zero that remember as this one (n,) does, and have no jump or trend: each value keeps a share
    rho of the last (AR(1)), with rho of the whole series, corrected for its bias, and steps drawn from the series' own with
    replacement."""
    x = np.asarray(series, np.float64)
    rng, rest = np.random.default_rng(seed), (x - x.mean())[None]
    rho = float(_lag(rest, 1, 4)[0])  # least squares leaves out (1 + 4 rho) / n
    steps = rest[0, 1:] - rho * rest[0, :-1]
    null = rng.choice(steps - steps.mean(), (len(x), draws))
    null[0] /= np.sqrt(1 - rho**2)
    for now in range(1, len(x)):
        null[now] += rho * null[now - 1]
    return null.T


def change_point(series: Sequence[float] | np.ndarray, least: int = 3, draws: int = 1000, seed: int = 0) -> ChangePoint:
    """The single change of mean of a series (n,) that is most pronounced, either way.

    Statistic of a split into m and n - m values: sqrt(m (n - m) / n) |mean before - mean after| (the
    CUSUM of Page 1955), largest over splits with `least` values on either side, in units of the
    long-run standard deviation of what is left, s sqrt((1 + rho) / (1 - rho)), rho its correlation
    one step on. Null: `ar1`. A small p says that the series has more than such a memory: a jump, or
    a trend. Values that wander slowly hide a jump; shuffled values, a null without memory, see one
    in two of three such series (docs/verdicts.md). ValueError for fewer than 12 values.
    """
    x = np.asarray(series, np.float64)
    n, wanted = len(x), max(2 * least, SHORTEST)
    if x.ndim != 1 or n < wanted or not np.isfinite(x).all():
        raise ValueError(f"a series of shape {x.shape} was given; {wanted} finite values or more are wanted")
    if np.ptp(x) == 0:
        return ChangePoint(least, 0.0, 1.0)
    (at,), (own,) = _steepest(x[None], least)
    return ChangePoint(int(at), float(own), p_value(own, _steepest(ar1(x, draws, seed), least)[1]))


def holm(p: Sequence[float]) -> np.ndarray:
    """p-values (n,) corrected for having asked n questions: Holm 1979. Never below the given ones, never above 1.

    ValueError for one outside 0 to 1.
    """
    given = np.asarray(p, np.float64)
    if given.ndim != 1 or not ((given >= 0) & (given <= 1)).all():
        raise ValueError(f"p-values {given.tolist()} were given; a list of numbers between 0 and 1 is wanted")
    order = np.argsort(given, kind="stable")
    raised = np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1))
    out = np.empty(len(given))
    out[order] = np.minimum(raised, 1.0)
    return out
