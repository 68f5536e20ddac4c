"""Changes of activations whose answer is known: a part along a steering vector, the rest at right angles and as effective.

    d' = d + a (rho v + sqrt(1 - rho^2) u)

d is what some unrelated training changed, token by token; v a behaviour's unit vector; u a unit vector at right angles to v with v's
own linear response, so that steering by u is as good and finds nothing of v; a makes the first-order shift of the behaviour's
log-odds come to a wanted number of nats. rho = 1 is the same feature, rho = 0 another one. No training is needed: a constant
push moves the mean and the second moments of d exactly, and a TopK SAE of d becomes one of d' when the push is added to its bias.
A measure of overlap is put through these before it is asked of a real pair: one that does not order rho says nothing.
Pure: vectors, gradients and moments; nothing of models or text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers import stats
from helpers.pair import overlap
from helpers.stats import Interval
from helpers.steering import directions


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

    def again(self, draws: int, seed: int) -> Iterator["Steered"]:
        """The behaviour as other pairs would have shown it: resampled with replacement, so many times; those that do not steer are drawn
        again. ValueError where most do not."""
        g, made = torch.Generator().manual_seed(seed), 0
        for _ in range(2 * draws + 10):
            some = self.pairs[torch.randint(len(self.pairs), (len(self.pairs),), generator=g)].double()
            if (one := Steered(some.mean(0), self.gradient, some)).steers and made < draws:
                made += 1
                yield one
        if made < draws:
            raise ValueError(
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

    def told(self, latents: Tensor) -> "Change":
        """The same with these rows (latents, d_model) for its dictionary."""
        return Change(self.mean, self._moment, latents.detach().double().cpu())

    def alone(self) -> "Change":
        """The same spread without a mean: the pair's own differences with their signs shuffled, where there is no other fine-tune."""
        return Change(torch.zeros_like(self.mean), self._moment, self.latents)

    @cached_property
    def moment(self) -> Tensor:
        """(d_model, d_model); of a mixture computed when it is asked for."""
        return self._moment()

    @cached_property
    def components(self) -> Tensor:
        """All principal directions about zero (d_model, d_model), the largest first."""
        return torch.linalg.eigh(self.moment).eigenvectors.flip(1).T.contiguous()


def aside(steered: Steered, draws: int, seed: int = 0) -> Tensor:
    """Unit vectors at right angles to v whose linear response is v's own: (draws, d_model) float64.

    u = c h + sqrt(1 - c^2) z: h is the gradient's direction with v taken out, c what it takes of it, z random at right angles to
    both. ValueError if v points so much along the gradient (a cosine above 0.71) that nothing beside it steers as well.
    """
    v, g = directions.finite("vector", steered.vector), directions.finite("gradient", steered.gradient)
    if not (v.norm() > 0 and g.norm() > 0):
        raise ValueError("the vector or the gradient is zero: nothing steers")
    v = v / v.norm()
    left = g - (g @ v) * v
    share = float(g @ v / left.norm().clamp_min(1e-300))
    if abs(share) > 1:
        raise ValueError(
            f"v's cosine with the gradient is {float(g @ v / g.norm()):.2f}: nothing at right angles steers as well"
        )
    h = left / left.norm()
    z = torch.randn(draws, len(v), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z -= (z @ v)[:, None] * v + (z @ h)[:, None] * h
    return share * h + (1 - share**2) ** 0.5 * z / z.norm(dim=1, keepdim=True)


def push(steered: Steered, u: Tensor, rho: float, nats: float) -> Tensor:
    """a (rho v + sqrt(1 - rho^2) u), (d_model,) float64, of a first-order shift of `nats`.

    ValueError for a rho outside 0 to 1, and for a vector whose own linear response is not positive: it does not steer.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho = {rho} was given; 0 (another feature) to 1 (the same) is wanted")
    v, g = (x.double() for x in steered[:2])
    response = float(g @ v / v.norm())
    if not response > 0:
        raise ValueError(
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
    inside = overlap.project_onto(v[None], change.components[: sizes.r])[0]
    return float(inside.square().sum() if name == ENERGY else g @ inside / (g @ v))


def beyond(name: str, change: Change, chance: Sequence[Change], steered: Steered, sizes: Sizes) -> float:
    """The same, less the mean of what changes by `chance` have of it too. The cause is a share already: nothing is taken off."""
    found = measure(name, change, steered, sizes)
    if name == CAUSE or not chance:
        return found
    return found - float(np.mean([measure(name, x, steered, sizes) for x in chance]))


# --- the ruler ---------------------------------------------------------------------------------------------------------

SAME, RELATED, DIFFERENT, UNDECIDED = "same", "related", "different", "undecided"
VERDICTS = (SAME, RELATED, DIFFERENT, UNDECIDED)
RULE = (
    "same: every rho up to a half is excluded; related: 0 is; different: 0 is not, and every rho from a half on is; else undecided. "
    "A rho is excluded if the value lies outside the middle 95 % of what mixtures of that rho give"
)


class Rhos(NamedTuple):
    """The rhos that a value does not exclude, from `low` to `high`: 0 is another feature, 1 the same."""

    low: float
    high: float

    @property
    def verdict(self) -> str:
        """By RULE."""
        if self.low > 0.5:
            return SAME
        if self.low > 0:
            return RELATED
        return DIFFERENT if self.high < 0.5 else UNDECIDED


@dataclass(frozen=True, eq=False)
class Ruler:
    """One measure of mixtures for one behaviour and one size of its shift: `values` (draws, rhos) at `rhos` from 0 to 1, and to `which`
    change by chance each draw was added (draws,)."""

    rhos: np.ndarray
    values: np.ndarray
    which: np.ndarray

    def read(self, low: float, high: float | None = None) -> Rhos:
        """The rhos that a value from `low` to `high` (default: the same) does not exclude. What lies above all mixtures is read as 1,
        what lies below all as 0: no mixture is more than the same, or less than another."""
        fine = np.linspace(self.rhos[0], self.rhos[-1], 501)
        tails = np.quantile(self.values, [0.025, 0.975], axis=0)
        bottom, top = (np.interp(fine, self.rhos, q) for q in tails)
        reached, not_yet = fine[top >= low], fine[bottom <= (low if high is None else high)]
        return Rhos(float(reached[0]) if len(reached) else 1.0, float(not_yet[-1]) if len(not_yet) else 0.0)

    def share(self, value: float) -> float:
        """A value on the scale from the median mixture of rho = 0 to that of rho = 1, which are 0 and 1."""
        other, same = np.median(self.values[:, [0, -1]], axis=0)
        return float((value - other) / (same - other))

    @property
    def orders(self) -> float:
        """Share of neighbouring rhos, over draws, at which the measure grows: 1 for one that orders rho, 1/2 for one that knows nothing."""
        return float((np.diff(self.values, axis=-1) > 0).mean())

    def parts(self) -> list[tuple["Ruler", "Ruler"]]:
        """Pairs of a ruler and mixtures to put through it: of all changes by chance but one, and of that one, where there are three or
        more; else of every other draw, and of the rest."""
        groups = self.which if len(set(self.which)) > 2 else np.arange(len(self.which)) % 2
        return [(self._of(groups != i), self._of(groups == i)) for i in np.unique(groups)]

    def _of(self, chosen: np.ndarray) -> "Ruler":
        return Ruler(self.rhos, self.values[chosen], self.which[chosen])

    def verdicts(self, given: "Ruler") -> np.ndarray:
        """Which of VERDICTS each of the `given` mixtures gets, as a share of its draws: (rhos, verdicts)."""
        said = [[self.read(x).verdict for x in at] for at in given.values.T]
        return np.array([[np.mean([s == v for s in row]) for v in VERDICTS] for row in said])


def ruler(
    name: str,
    chance: Sequence[Change],
    steered: Steered,
    nats: float,
    sizes: Sizes,
    rhos: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    draws: int = 20,
    seed: int = 0,
) -> Ruler:
    """The measure `name` of mixtures of a behaviour with each of the changes by `chance`, at shifts of `nats`: `draws` of v and u.

    What is planted is the vector of other pairs (`Steered.again`), so that the ruler knows how badly v itself is known. From each
    mixture what the other changes by chance give is taken off, as it is from a real one; where there is only one, its own.
    """
    rows, which = [], []
    for i, background in enumerate(chance):
        others = [x for j, x in enumerate(chance) if j != i] or [background]
        for j, planted in enumerate(steered.again(draws, seed + i)):
            u = aside(planted, 1, seed + i * draws + j)[0]
            mixed = [background.pushed(push(planted, u, rho, nats)) for rho in rhos]
            rows.append([beyond(name, x, others, steered, sizes) for x in mixed])
            which.append(i)
    return Ruler(np.asarray(rhos, float), np.asarray(rows), np.asarray(which))


def middle(rulers: Sequence[Ruler]) -> list[Interval]:
    """The mean over behaviours of each one's mean mixture, at every rho."""
    return [stats.over(x) for x in np.stack([r.values.mean(0) for r in rulers]).T]


def spread(rulers: Sequence[Ruler]) -> list[str]:
    """The middle 95 % of all behaviours' mixtures at every rho, as a table shows them."""
    bands = (stats.band(x) for x in np.concatenate([r.values for r in rulers]).T)
    return [f"{low:+.2f} to {high:+.2f}" for low, high in bands]


def sayings(rulers: Sequence[Ruler]) -> dict[str, np.ndarray]:
    """How often each of VERDICTS is given at every rho, mean of behaviours: (rhos,). Of mixtures that the ruler was not made of."""
    return dict(zip(VERDICTS, np.mean([_said(r) for r in rulers], axis=0).T, strict=True))


def _said(ruler: Ruler) -> np.ndarray:
    return np.mean([a.verdicts(b) for a, b in ruler.parts()], axis=0)


def without(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Vectors (..., d_model) without what lies along `g` (..., d_model)."""
    unit = g / np.linalg.norm(g, axis=-1, keepdims=True)
    return x - (x * unit).sum(-1, keepdims=True) * unit


def faults(rulers: Sequence[Ruler]) -> tuple[np.ndarray, np.ndarray]:
    """How often the rule is wrong of each behaviour (behaviours,), of mixtures that its ruler was not made of: rho = 1 not called the
    same, and rho = 0 called the same or related."""
    said = np.stack([_said(r) for r in rulers])
    same, related = (said[:, :, VERDICTS.index(v)] for v in (SAME, RELATED))
    return 1 - same[:, -1], same[:, 0] + related[:, 0]
