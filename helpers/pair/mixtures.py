"""Changes of activations whose answer is known: a part along a steering vector, the rest at right angles and as effective.

    d' = d + a (rho v + sqrt(1 - rho^2) u)

d is what some unrelated training changed, token by token; v a behaviour's unit vector; u a unit vector at right angles to v with v's
own linear response, so that steering by u is as good and finds nothing of v; a makes the first-order shift of the behaviour's
log-odds come to a wanted number of nats. rho = 1 is the same feature, rho = 0 another one. No training is needed: a constant
push moves the mean and the second moments of d exactly.
A measure of overlap is put through these before it is asked of a real pair: one that does not order rho says nothing. What
changes by chance give without any push stands beside rho = 0, since training may move a behaviour by less than a push does.
Pure: vectors, gradients and moments; nothing of models or text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from helpers import stats, store
from helpers.pair import overlap
from helpers.stats import Interval
from helpers.steering import directions


class NoRuler(ValueError):
    """No ruler can be made for a behaviour at some size of shift; the message says why."""


class Steered(NamedTuple):
    """A behaviour as the ruler sees it: its `vector` (d_model,), the mean `gradient` (d_model,) of its log-odds, in nats a unit, and the
    differences of the `pairs` (n, d_model) that the vector is the mean of."""

    vector: Tensor
    gradient: Tensor
    pairs: Tensor

    @property
    def steers(self) -> bool:
        """Whether its linear response is positive: one that is not tells nothing apart."""
        return bool(self.gradient.double() @ self.vector.double() > 0)

    def resampled(self, draws: int, seed: int) -> Iterator["Steered"]:
        """The behaviour as other pairs would have shown it: resampled with replacement, so many times; those that do not steer are drawn
        again. NoRuler where most do not."""
        g, made = torch.Generator().manual_seed(seed), 0
        for _ in range(2 * draws + 10):
            some = self.pairs[torch.randint(len(self.pairs), (len(self.pairs),), generator=g)].double()
            if (one := Steered(some.mean(0), self.gradient, some)).steers and made < draws:
                made += 1
                yield one
        if made < draws:
            raise NoRuler(
                f"{made} of {2 * draws + 10} resamplings of the pairs give a vector that steers: it tells nothing apart"
            )


@dataclass(frozen=True, eq=False)
class Change:
    """What training changed, as far as measures of overlap ask: the `mean` (d_model,) of the differences and their second moments about
    zero, `moment` (d_model, d_model), float64; `latents` (latents, d_model), rows of a dictionary of them, the most used first."""

    mean: Tensor
    _moment: Callable[[], Tensor]
    latents: Tensor

    @classmethod
    def of(cls, rows: Tensor, latents: Tensor | None = None) -> "Change":
        """Of differences `rows` (tokens, d_model)."""
        x = rows.detach().double().cpu()
        return cls.by(x.mean(0), x.T @ x / len(x), latents)

    @classmethod
    def by(cls, mean: Tensor, moment: Tensor, latents: Tensor | None = None) -> "Change":
        """Of its moments."""
        atoms = torch.zeros(0, len(mean)) if latents is None else latents
        return cls(mean, lambda: moment, atoms.detach().double().cpu())

    def pushed(self, push: Tensor) -> "Change":
        """The same with `push` (d_model,) added at every token."""
        b = push.double()

        def moment() -> Tensor:
            cross = torch.outer(self.mean, b)
            return self.moment + cross + cross.T + torch.outer(b, b)

        return Change(self.mean + b, moment, self.latents)

    def with_latents(self, latents: Tensor) -> "Change":
        """The same with these rows (latents, d_model) for its dictionary."""
        return Change(self.mean, self._moment, latents.detach().double().cpu())

    def redrawn(self, draws: int, seed: int = 0) -> "Iterator[Change]":
        """Changes with the same spread about their mean and a mean as long, in a random direction of that spread: what stands for other
        training where there is too little of it."""
        spread = self.moment - torch.outer(self.mean, self.mean)
        values, axes = torch.linalg.eigh(spread)
        g = torch.Generator().manual_seed(seed)
        for _ in range(draws):
            drawn = axes @ (values.clamp_min(0).sqrt() * torch.randn(len(values), generator=g, dtype=torch.float64))
            mean = drawn / drawn.norm() * self.mean.norm()
            yield Change.by(mean, spread + torch.outer(mean, mean), self.latents)

    @cached_property
    def about(self) -> object:
        """What identifies it in the cache: its numbers."""
        return store.stated([self.mean, self.moment, self.latents])

    @cached_property
    def moment(self) -> Tensor:
        """(d_model, d_model); of a mixture computed when it is asked for."""
        return self._moment()

    def components(self, r: int) -> Tensor:
        """The r largest principal directions about zero (r, d_model), the largest first; all, where there are fewer."""
        d = len(self.mean)
        axes = scipy.linalg.eigh(self.moment.numpy(), subset_by_index=[max(d - r, 0), d - 1])[1]
        return torch.from_numpy(axes.T[::-1].copy())


def aside(steered: Steered, draws: int, seed: int = 0) -> Tensor:
    """Unit vectors at right angles to v whose linear response is v's own: (draws, d_model) float64.

    u = c h + sqrt(1 - c^2) z: h is the gradient's direction with v taken out, c what it takes of it, z random at right angles to
    both. NoRuler if v points so much along the gradient (a cosine above 0.71) that nothing beside it steers as well.
    """
    v, g = directions.finite("vector", steered.vector), directions.finite("gradient", steered.gradient)
    if not (v.norm() > 0 and g.norm() > 0):
        raise ValueError("the vector or the gradient is zero: nothing steers")
    v = v / v.norm()
    left = g - (g @ v) * v
    share = float(g @ v / left.norm().clamp_min(1e-300))
    if abs(share) > 1:
        raise NoRuler(
            f"v's cosine with the gradient is {float(g @ v / g.norm()):.2f}: nothing at right angles steers as well"
        )
    h = left / left.norm()
    z = torch.randn(draws, len(v), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z -= (z @ v)[:, None] * v + (z @ h)[:, None] * h
    return share * h + (1 - share**2) ** 0.5 * z / z.norm(dim=1, keepdim=True)


def push(steered: Steered, u: Tensor, rho: float, nats: float) -> Tensor:
    """a (rho v + sqrt(1 - rho^2) u), (d_model,) float64, of a first-order shift of `nats`.

    ValueError for a rho outside 0 to 1, NoRuler for a vector whose own linear response is not positive: it does not steer.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho = {rho} was given; 0 (another feature) to 1 (the same) is wanted")
    v, g = (x.double() for x in steered[:2])
    response = float(g @ v / v.norm())
    if not response > 0:
        raise NoRuler(
            f"the vector's linear response is {response:.3g} nats a unit: it does not steer, and tells nothing apart"
        )
    direction = rho * v / v.norm() + (1 - rho**2) ** 0.5 * u
    return nats / float(g @ direction) * direction


# --- measures ----------------------------------------------------------------------------------------------------------

MEAN, ENERGY, SPARSE, CAUSE, REMOVAL = (
    "cosine with the mean difference",
    "share in the principal components",
    "k-sparse sum",
    "share of the shift through v",
    "steering lost with the components",
)
MEASURES = (MEAN, ENERGY, SPARSE, CAUSE, REMOVAL)
QUICK = (MEAN, CAUSE)  # that need neither components nor a dictionary


class Sizes(NamedTuple):
    """How many principal components, `r`, and how many latents, `k`, the measures take."""

    r: int
    k: int


def measure(name: str, change: Change, steered: Steered, sizes: Sizes) -> float:
    """One of MEASURES for one behaviour: signed cosine of v with the mean difference; share of v's squared length in r principal
    components; cosine of v with its best signed sum of k of the mean and the latents; share of the first-order shift by the mean
    difference that goes along v; share of v's own response that is lost with those components.
    """
    v, g = (x.double() for x in steered[:2])
    v, mean = v / v.norm(), change.mean
    if name == MEAN:
        return float(v @ mean / mean.norm().clamp_min(1e-300))
    if name == SPARSE:
        return float(overlap.sparse(v[None], torch.cat([mean[None], change.latents]).float(), sizes.k)[0])
    if name == CAUSE:
        return float((g @ v) * (v @ mean) / (g @ mean))
    inside = overlap.project_onto(v[None], change.components(sizes.r))[0]
    return float(inside.square().sum() if name == ENERGY else g @ inside / (g @ v))


def level(name: str, chance: Sequence[Change], steered: Steered, sizes: Sizes) -> float:
    """The mean of what changes by `chance` have of a measure; 0 where there are none, and for the cause, which is a share already."""
    if name == CAUSE or not chance:
        return 0.0
    return float(np.mean([measure(name, x, steered, sizes) for x in chance]))


def beyond(name: str, change: Change, chance: Sequence[Change], steered: Steered, sizes: Sizes) -> float:
    """A measure of a change, less that level."""
    return measure(name, change, steered, sizes) - level(name, chance, steered, sizes)


# --- the ruler ---------------------------------------------------------------------------------------------------------

SAME, RELATED, NOT_SAME, UNDECIDED = "same", "related", "not the same", "undecided"
VERDICTS = (SAME, RELATED, NOT_SAME, UNDECIDED)
WRONG = 0.05  # how often a ruler may be wrong where the answer is known
TAIL = 0.01  # on either side of what mixtures of one rho give


class Rhos(NamedTuple):
    """The rhos that a value does not exclude, from `low` to `high`: 0 is another feature, 1 the same."""

    low: float
    high: float

    @property
    def verdict(self) -> str:
        """same: every rho up to 0.5 is excluded; related: 0 is; not the same: 0 is not, and every rho from 0.5 on is; else undecided."""
        if self.low > 0.5:
            return SAME
        if self.low > 0:
            return RELATED
        return NOT_SAME if self.high < 0.5 else UNDECIDED


def _one_more(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where one more change by chance with one more draw would lie, but for TAIL on either side: low and high (...,) of values (changes,
    draws, ...). A prediction interval by t over the changes, which are the unit; draws add their own spread."""
    n = len(values)
    within = values.var(1, ddof=1).mean(0) if values.shape[1] > 1 else 0.0
    wide = np.sqrt(values.mean(1).var(0, ddof=1) * (1 + 1 / n) + within)
    centre, t = values.mean((0, 1)), scipy.stats.t.ppf(1 - TAIL, n - 1)
    return centre - t * wide, centre + t * wide


@dataclass(frozen=True, eq=False)
class Ruler:
    """One measure of mixtures for one behaviour and one size of its shift: `values` (changes by chance, draws, rhos) at `rhos` from 0 to
    1, and of every change by chance as it is, `alone` (changes,)."""

    rhos: np.ndarray
    values: np.ndarray
    alone: np.ndarray

    @cached_property
    def band(self) -> tuple[np.ndarray, np.ndarray]:
        """What is not excluded at each rho, low and high (rhos,); at 0 also what a change by chance alone would give."""
        (low, high), (least, most) = _one_more(self.values), _one_more(self.alone[:, None])
        low[0], high[0] = min(low[0], least), max(high[0], most)
        return low, high

    def read(self, value: float) -> Rhos:
        """The rhos that a value does not exclude. What lies above all mixtures is read as 1, what lies below all as 0: no mixture is more
        than the same, or less than another."""
        fine = np.linspace(self.rhos[0], self.rhos[-1], 501)
        bottom, top = (np.interp(fine, self.rhos, q) for q in self.band)
        reached, not_yet = fine[top >= value], fine[bottom <= value]
        return Rhos(float(reached[0]) if len(reached) else 1.0, float(not_yet[-1]) if len(not_yet) else 0.0)

    def rho(self, value: float) -> float:
        """The rho whose mean mixture gives the value; beyond both ends the line goes on, so that a mean over behaviours is not biased."""
        x, y = self.values.mean((0, 1)), self.rhos
        i = int(np.clip(np.searchsorted(x, value) - 1, 0, len(x) - 2))
        return float(y[i] + (value - x[i]) * (y[i + 1] - y[i]) / (x[i + 1] - x[i]))

    @property
    def orders(self) -> float:
        """Share of neighbouring rhos, over draws, at which the measure grows: 1 for one that orders rho, 1/2 for one that knows nothing."""
        return float((np.diff(self.values, axis=-1) > 0).mean())

    def without(self, i: int) -> "Ruler":
        """The ruler that knows nothing of one change by chance."""
        return Ruler(self.rhos, np.delete(self.values, i, 0), np.delete(self.alone, i))

    def verdicts(self) -> np.ndarray:
        """Which of VERDICTS mixtures get on a ruler made without their change by chance, as shares (rhos, verdicts)."""
        said = [[[self.without(i).read(x).verdict for x in at] for at in own.T] for i, own in enumerate(self.values)]
        return np.array([[[np.mean([s == v for s in at]) for v in VERDICTS] for at in own] for own in said]).mean(0)

    def by_chance(self) -> float:
        """How often a change by chance as it is, on a ruler made without it, is called the same or related."""
        return float(np.mean([self.without(i).read(x).low > 0 for i, x in enumerate(self.alone)]))

    @cached_property
    def errors(self) -> tuple[float, float, float]:
        """How often the rule is wrong where the answer is known: rho = 1 not called the same; rho = 0 called the same or related; a change
        by chance as it is called so. Each on a ruler made without it."""
        said = self.verdicts()
        same, related = (said[:, VERDICTS.index(v)] for v in (SAME, RELATED))
        return float(1 - same[-1]), float(same[0] + related[0]), self.by_chance()

    @property
    def accepted(self) -> bool:
        """Whether none of the `errors` is more frequent than WRONG."""
        return max(self.errors) <= WRONG


RHOS = (0.0, 0.25, 0.5, 0.75, 1.0)
FEWEST = 4  # changes by chance that a ruler is made of


def mild(chance: Sequence[Change], steered: Steered, nats: float) -> list[Change]:
    """The changes by chance that move the behaviour by no more than half of so many nats themselves, either way."""
    return [x for x in chance if abs(float(steered.gradient.double() @ x.mean)) <= nats / 2]


def ruler(
    name: str,
    chance: Sequence[Change],
    steered: Steered,
    nats: float,
    sizes: Sizes,
    rhos: Sequence[float] = RHOS,
    draws: int = 6,
    seed: int = 0,
) -> Ruler:
    """The measure `name` of mixtures of a behaviour with each of the changes by `chance`, at shifts of `nats`: `draws` of v and u each.

    What is planted is the vector of other pairs (`Steered.resampled`), so that the ruler knows how badly v itself is known. The push
    makes up what the change by chance leaves of the nats; those that are not `mild` are left out.
    From each mixture what the other changes by chance give is taken off, as it is from a real one. NoRuler where fewer than FEWEST
    changes are left.
    """
    if not steered.steers:
        raise NoRuler("its vector does not steer")
    used = mild(chance, steered, nats)
    if len(used) < FEWEST:
        raise NoRuler(
            f"{len(used)} changes by chance move the behaviour by less than half of {nats:.3g} nats; {FEWEST} or more are wanted"
        )
    table: list[list[list[float]]] = []
    alone: list[float] = []
    for i, background in enumerate(used):
        less = level(name, [x for x in used if x is not background], steered, sizes)
        left = nats - float(steered.gradient.double() @ background.mean)
        alone.append(measure(name, background, steered, sizes) - less)
        table.append([])
        for j, planted in enumerate(steered.resampled(draws, seed + i)):
            u = aside(planted, 1, seed + i * draws + j)[0]
            mixed = [background.pushed(push(planted, u, rho, left)) for rho in rhos]
            table[-1].append([measure(name, x, steered, sizes) - less for x in mixed])
    return Ruler(np.asarray(rhos, float), np.asarray(table), np.asarray(alone))


def middle(rulers: Sequence[Ruler]) -> list[Interval] | list[float]:
    """The mean over behaviours of each one's mean mixture, at every rho; an interval over three behaviours or more."""
    if not rulers:
        return [float("nan")] * len(RHOS)
    each = np.stack([r.values.mean((0, 1)) for r in rulers]).T
    return [stats.over(x) for x in each] if len(rulers) > 2 else each.mean(1).tolist()


def ordered(rulers: Sequence[Ruler]) -> str:
    """The share of neighbouring rhos that a measure orders, mean of behaviours, as a table shows it."""
    return f"{np.mean([r.orders for r in rulers]):.0%}" if rulers else "-"


def spread(rulers: Sequence[Ruler]) -> list[str]:
    """The middle 95 % of all behaviours' mixtures at every rho, as a table shows them."""
    if not rulers:
        return ["-"] * len(RHOS)
    bands = (stats.band(x) for x in np.concatenate([r.values.reshape(-1, len(r.rhos)) for r in rulers]).T)
    return [f"{low:+.2f} to {high:+.2f}" for low, high in bands]


def verdict_shares(rulers: Sequence[Ruler]) -> dict[str, np.ndarray]:
    """How often each of VERDICTS is given at every rho, mean of behaviours: (rhos,)."""
    each = [r.verdicts() for r in rulers] or [np.full((len(RHOS), len(VERDICTS)), np.nan)]
    return dict(zip(VERDICTS, np.mean(each, axis=0).T, strict=True))


def faults(rulers: Sequence[Ruler]) -> list[str]:
    """The mean of each of `Ruler.errors` over behaviours, as a table shows them, and how many rulers are accepted."""
    if not rulers:
        return ["-"] * 4
    means = np.mean([r.errors for r in rulers], axis=0)
    return [*(f"{x:.1%}" for x in means), f"{sum(r.accepted for r in rulers)} of {len(rulers)}"]


def without(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Vectors (..., d_model) without what lies along `g` (..., d_model)."""
    unit = g / np.linalg.norm(g, axis=-1, keepdims=True)
    return x - (x * unit).sum(-1, keepdims=True) * unit
