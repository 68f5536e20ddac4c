"""Ways of turning pairs into one direction, compared: how near each comes to the mean difference, how well each steers, and why.

Tensors and numbers, no model; what is slow is kept on disk. A case is one kind of pairs of one behaviour at one layer. Two nulls: a component's cosine with
the mean is that of pairs of which half have their sides swapped, so that what they share is gone from the mean; its effect is that
of directions that know nothing of the pairs. Swapped pairs are no null of the effect: their uncentred component is the same vector.
Source of the comparison: the study called source 001, which takes PCA and the mean for nearly one vector.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers import stats, store
from helpers.stats import Interval
from helpers.steering import directions

MEAN, UNCENTRED, CENTRED = "mean", "PC1 uncentred", "PC1 centred"
METHODS = [m for m in directions.METHODS if m != "PC1 pair-centred"]  # which is the uncentred one on any data
Case = tuple[str, str, int]  # kind of pairs, behaviour, layer
Pairs = Mapping[Case, tuple[Tensor, Tensor]]  # the two sides (pairs, d_model) of each case


def planted(length: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """400 pairs (400, 64) whose differences are one fixed direction of `length` plus noise with a spread of 1 along one axis at a
    right angle to it, and 0.1 along all others."""
    noise = torch.randn(400, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.1
    noise[:, 1] *= 10
    noise[:, 0] += length
    return noise, torch.zeros_like(noise)


def by_behavior(values: Mapping[Case, float | np.ndarray], kind: str = "", layer: int | None = None) -> np.ndarray:
    """The mean of each behaviour's cases, of one kind of pairs and one layer where they are given: (behaviours, ...)."""
    chosen = {case: x for case, x in values.items() if kind in ("", case[0]) and layer in (None, case[2])}
    names = dict.fromkeys(name for _, name, _ in chosen)
    return np.stack([np.stack([np.asarray(x) for case, x in chosen.items() if case[1] == n]).mean(0) for n in names])


def round_trip(pos: Tensor, neg: Tensor) -> tuple[float, float]:
    """What source 001 compares: the cosine of the mean difference with the mean of differences that a PCA of one component has
    taken apart and put together again; and the share of variance that the component explains.

    Putting together adds the mean back, and centred projections average to zero, so that the cosine is 1 for any data.
    """
    from sklearn.decomposition import PCA

    pos, neg = directions.float64(pos, neg)
    difference = (pos - neg).numpy()
    pca = PCA(n_components=1, svd_solver="full").fit(difference)
    back = pca.inverse_transform(pca.transform(difference)).mean(0)
    return float(stats.cosine(back, difference.mean(0))), float(pca.explained_variance_ratio_[0])


def agreement(method: str, pos: Tensor, neg: Tensor) -> float:
    """The cosine of the direction that a method of `directions.METHODS` finds in pairs (pairs, d_model) with their mean difference."""
    return float(stats.cosine(directions.METHODS[method](pos, neg).numpy(), directions.mean(pos, neg).numpy()))


# --- near the mean, and as good a vector -----------------------------------------------------------------------------------


class Way(NamedTuple):
    """A direction's `cosine` with the mean difference, and the `response` by gradient, in nats, to a step along it of length one."""

    cosine: float
    response: float


@dataclass(frozen=True)
class Comparison:
    """Every one of METHODS in every case; and draws (draws,) of the nulls: cosines of the two components of pairs with half of their
    sides `swapped`, and responses to directions that know nothing of the pairs, `unlike`."""

    found: dict[str, dict[Case, Way]]
    swapped: dict[str, dict[Case, np.ndarray]]
    unlike: dict[Case, np.ndarray]

    def cosine(self, method: str, kind: str = "", layer: int | None = None) -> np.ndarray:
        """How near a method comes to the mean, (behaviours,)."""
        return by_behavior({case: way.cosine for case, way in self.found[method].items()}, kind, layer)

    def response(self, method: str, kind: str = "", layer: int | None = None) -> np.ndarray:
        """How well it steers, (behaviours,) nats for a step of length one."""
        return by_behavior({case: way.response for case, way in self.found[method].items()}, kind, layer)

    def share(self, method: str, kind: str = "", layer: int | None = None) -> Interval | None:
        """How well it steers as a share of the mean, over behaviours; None where the mean's own effect is not clear of zero."""
        return stats.ratio_if_clear(self.response(method, kind, layer), self.response(MEAN, kind, layer))

    def cosine_by_chance(self, component: str, kind: str = "", layer: int | None = None) -> np.ndarray:
        """The null of the mean of `cosine` over behaviours: (draws,)."""
        return by_behavior(self.swapped[component], kind, layer).mean(0)

    def share_by_chance(self, kind: str = "", layer: int | None = None) -> np.ndarray:
        """The null of `share`, whatever the method: (draws,)."""
        return by_behavior(self.unlike, kind, layer).sum(0) / self.response(MEAN, kind, layer).sum()

    def backwards(self, layer: int) -> list[str]:
        """The cases that the mean itself moves the wrong way at a layer, named."""
        moved = self.found[MEAN].items()
        return [f"{name} by {kind}" for (kind, name, k), way in moved if k == layer and way.response < 0]

    def table(self, layer: int) -> list[list[str]]:
        """A row for each method at one layer, both kinds of pairs together: its name, its cosine with the mean, its share of the
        mean's effect, and how many cases it moves the wrong way."""
        rows = []
        for m, ways in self.found.items():
            moved = [way.response for case, way in ways.items() if case[2] == layer]
            share = self.share(m, layer=layer)
            wrong = f"{sum(x < 0 for x in moved)} of {len(moved)}"
            rows.append([m, f"{stats.over(self.cosine(m, layer=layer))}", f"{share}" if share else "not run", wrong])
        return rows

    def rows(self) -> list[dict[str, object]]:
        """A row for each component and case, for a figure to be looked at closely."""
        return [{"component": m, **row} for m in (UNCENTRED, CENTRED) for row in as_rows(self.found[m])]


def units(methods: Sequence[str], pos: Tensor, neg: Tensor) -> Tensor:
    """The directions (methods, d_model) float64 that methods of `directions.METHODS` find in pairs, each of length one."""
    found = torch.stack([directions.METHODS[m](pos, neg) for m in methods])
    return found / found.norm(dim=1, keepdim=True)


def compare(
    pairs: Pairs, slopes: Mapping[tuple[str, int], np.ndarray], unlike: Iterable[Tensor], draws: int, seed: int = 0
) -> Comparison:
    """Every method in every case, and their nulls. `slopes`: for each behaviour and layer the gradient (d_model,) of what is steered,
    in nats a unit. `unlike`: for each case unit directions (n, d_model) that know nothing of it, and take their sign from the mean,
    as methods do. `draws`: of swapped sides. ValueError where a method is undefined, and for a case of one pair."""
    found: dict[str, dict[Case, Way]] = {m: {} for m in METHODS}
    swapped: dict[str, dict[Case, np.ndarray]] = {m: {} for m in (UNCENTRED, CENTRED)}
    by_chance: dict[Case, np.ndarray] = {}
    for i, ((case, (pos, neg)), drawn) in enumerate(zip(pairs.items(), unlike, strict=True)):
        slope, mean = slopes[case[1:]], directions.mean(pos, neg).numpy()
        for m, unit in zip(found, store.kept(units, METHODS, pos, neg).numpy(), strict=True):
            found[m][case] = Way(float(stats.cosine(unit, mean)), float(unit @ slope))
        for m, cosine in store.kept(of_swapped, pos, neg, half_swapped(len(pos), draws, seed + i)).items():
            swapped[m][case] = cosine
        by_chance[case] = np.sign(drawn.numpy() @ mean) * (drawn.numpy() @ slope)
    return Comparison(found, swapped, by_chance)


def half_swapped(pairs: int, draws: int, seed: int = 0) -> np.ndarray:
    """Signs (draws, pairs), half of each row -1, drawn at random; the last of an odd number of pairs is left out.

    ValueError for a single pair: swapped or not, it is plus or minus itself.
    """
    if pairs < 2:
        raise ValueError("one pair was given: swapped or not it is +-v itself; give two or more")
    signs = np.tile(np.resize([1.0, -1.0], pairs - pairs % 2), (draws, 1))
    return np.random.default_rng(seed).permuted(signs, axis=1)


def of_swapped(pos: Tensor, neg: Tensor, signs: np.ndarray) -> dict[str, np.ndarray]:
    """|cosine| with their mean, (draws,), of both components of pairs whose differences are multiplied by `signs` (draws, pairs).

    In the differences' inner products K, so that a draw takes an eigenvector of (pairs, pairs). Without centring the component
    is the same whichever sides are swapped: signs drop out of the sum of d d^T, and only the mean moves.
    """
    n = signs.shape[1]
    one, other = directions.float64(pos[:n], neg[:n])
    difference = (one - other).numpy()
    inner, weight = difference @ difference.T, signs / n
    sizes, axes = np.linalg.eigh(inner)
    plain = np.broadcast_to(axes[:, -1] / sizes[-1] ** 0.5, signs.shape)
    centring = np.eye(n) * signs[:, None] - weight[:, None]  # (draws, n, n): signed rows less their mean
    sizes, axes = (x.numpy() for x in torch.linalg.eigh(torch.from_numpy(centring @ inner @ centring.swapaxes(1, 2))))
    centred = np.einsum("rij,ri->rj", centring, axes[:, :, -1]) / sizes[:, -1:] ** 0.5
    length = np.sqrt(np.einsum("ri,ij,rj->r", weight, inner, weight))
    both = ((UNCENTRED, plain), (CENTRED, centred))
    return {name: np.abs(((made_of @ inner) * weight).sum(1)) / length for name, made_of in both}


# --- why: a race -----------------------------------------------------------------------------------------------------------


class Race(NamedTuple):
    """What decides whether the uncentred component follows the mean m: the `ratio` |m|^2 / top eigenvalue of the scatter, the
    `cosine` of the component with m, and the `overlap` |cosine| of m with the scatter's own top axis."""

    ratio: float
    cosine: float
    overlap: float


def race(pos: Tensor, neg: Tensor) -> Race:
    """The race between the mean of differences (pairs, d_model) and their strongest axis of disagreement."""
    pos, neg = directions.float64(pos, neg)
    difference = (pos - neg).numpy()
    m = difference.mean(0)
    spread, axes = np.linalg.svd((difference - m) / len(difference) ** 0.5, full_matrices=False)[1:]
    component = directions.first_component(torch.from_numpy(difference)).numpy()
    return Race(float(m @ m / spread[0] ** 2), *(abs(float(stats.cosine(x, m))) for x in (component, axes[0])))


def two_axis(ratio: float | np.ndarray, overlap: float) -> np.ndarray:
    """The cosine that `race` would find if all scatter lay along one axis: that of the top eigenvector of e e^T + ratio m m^T with
    m, both unit, |e.m| = `overlap`. A step at ratio 1 where the overlap is 0 (the spiked-covariance threshold)."""
    m = np.array([overlap, (1 - min(overlap, 1 - 1e-9) ** 2) ** 0.5])
    planes = np.diag([1.0, 0.0]) + np.atleast_1d(ratio)[:, None, None] * np.outer(m, m)
    return np.abs(np.linalg.eigh(planes)[1][:, :, -1] @ m)


def theory(races: Mapping[Case, Race]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What `two_axis` says over the ratios of these races, at their median overlap and without any, and `least`: {label: (ratios,
    cosines)}."""
    ratios = [race.ratio for race in races.values()]
    grid = np.geomspace(min(ratios) / 1.5, max(ratios) * 1.5, 300)
    overlaps = (float(np.median([race.overlap for race in races.values()])), 0.0)
    said = {f"two axes, overlap {a:.2f}": (grid, two_axis(grid, a)) for a in overlaps}
    return said | {"least, by algebra": (grid, least(grid))}


def least(ratio: np.ndarray) -> np.ndarray:
    """The least that the cosine of a `race` can be, whatever the scatter C. The top eigenvector v of C + m m^T has
    v.(C + m m^T)v >= |m|^2, as the mean's own direction has, and v.C v <= |m|^2 / ratio: cos^2 >= 1 - 1 / ratio."""
    return (1 - 1 / np.maximum(ratio, 1)) ** 0.5


def theory_errors(races: Mapping[Case, Race]) -> np.ndarray:
    """How far `two_axis`, given each race's own overlap, is off its cosine: (cases,)."""
    return np.array([abs(two_axis(race.ratio, race.overlap)[0] - race.cosine) for race in races.values()])


def mean_where(
    races: Mapping[Case, Race], chosen: Mapping[Case, bool], draws: int, seed: int
) -> tuple[list[float], np.ndarray]:
    """For each behaviour with any chosen case, the mean cosine of those, (behaviours,); and the null's mean over behaviours,
    (draws,), in which as many of the behaviour's cases are chosen at random."""
    rng = np.random.default_rng(seed)
    found, drawn = [], []
    for name in dict.fromkeys(name for _, name, _ in races):
        cases = [case for case in races if case[1] == name]
        cosine, pick = np.array([races[c].cosine for c in cases]), np.array([chosen[c] for c in cases])
        if pick.any():
            found.append(float(cosine[pick].mean()))
            drawn.append([rng.permutation(cosine)[: pick.sum()].mean() for _ in range(draws)])
    return found, np.mean(drawn, axis=0) if drawn else np.empty(0)


def as_rows(cases: Mapping[Case, Way] | Mapping[Case, Race]) -> list[dict[str, object]]:
    """A row for each case: its kind of pairs, behaviour and layer, and the fields of its NamedTuple."""
    return [dict(zip(("kind", "behaviour", "layer"), case, strict=True)) | x._asdict() for case, x in cases.items()]
