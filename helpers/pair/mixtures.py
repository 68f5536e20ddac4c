"""Changes of activations whose answer is known: a part along a steering vector, the rest at right angles and as effective.

    d' = d + a (rho v + sqrt(1 - rho^2) u)

d is what some unrelated training changed, token by token; v a behaviour's unit vector; u a unit vector at right angles to v with v's
own linear response, so that steering by u is as good and finds nothing of v; a makes the first-order shift of the behaviour's
log-odds come to a wanted number of nats. rho = 1 is the same feature, rho = 0 another one. No training is needed: a constant
push moves the mean and the second moments of d exactly, and a TopK SAE of d becomes one of d' when the push is added to its bias.
A measure of overlap is put through these before it is asked of a real pair: one that does not order rho says nothing.
Pure: vectors, gradients and moments; nothing of models or text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers.pair import overlap
from helpers.steering import directions


class Steered(NamedTuple):
    """A behaviour as the ruler sees it: its `vector` (d_model,) and the mean `gradient` (d_model,) of its log-odds, in nats a unit."""

    vector: Tensor
    gradient: Tensor


@dataclass(frozen=True, eq=False)
class Change:
    """What training changed, as far as measures of overlap ask: the `mean` (d_model,) of the differences and their second moments about
    zero, `moment` (d_model, d_model), float64; `latents` (latents, d_model), rows of a dictionary of them, the most used first."""

    mean: Tensor
    moment: Tensor
    latents: Tensor

    @classmethod
    def of(cls, rows: Tensor, latents: Tensor | None = None) -> "Change":
        """Of differences `rows` (tokens, d_model)."""
        x = rows.detach().double().cpu()
        atoms = torch.zeros(0, x.shape[1]) if latents is None else latents
        return cls(x.mean(0), x.T @ x / len(x), atoms.detach().double().cpu())

    def pushed(self, push: Tensor) -> "Change":
        """The same with `push` (d_model,) added at every token."""
        b = push.double()
        cross = torch.outer(self.mean, b)
        return Change(self.mean + b, self.moment + cross + cross.T + torch.outer(b, b), self.latents)

    @cached_property
    def components(self) -> Tensor:
        """All principal directions about zero (d_model, d_model), the largest first."""
        return torch.linalg.eigh(self.moment).eigenvectors.flip(1).T.contiguous()


def aside(steered: Steered, draws: int, seed: int = 0) -> Tensor:
    """Unit vectors at right angles to v whose linear response is v's own: (draws, d_model) float64.

    u = c h + sqrt(1 - c^2) z: h is the gradient's direction with v taken out, c what it takes of it, z random at right angles to
    both. ValueError if v points so much along the gradient (a cosine above 0.71) that nothing beside it steers as well.
    """
    v, g = (directions.finite(name, x) for name, x in zip(Steered._fields, steered, strict=True))
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
    v, g = (x.double() for x in steered)
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


def measures(change: Change, steered: Steered, r: int, k: int, before: Change | None = None) -> dict[str, float]:
    """Each of MEASURES for one behaviour: signed cosine of v with the mean difference; share of v's squared length in `r` principal
    components; cosine of v with its best signed sum of `k` of the mean and the latents; share of the first-order shift by the mean
    difference that goes along v; share of v's own response that is lost with those components.

    `before`: another change, whose numbers are taken off those that a change by chance has too (all but the cause).
    """
    v, g = (x.double() for x in steered)
    v, mean = v / v.norm(), change.mean
    inside = overlap.project_onto(v[None], change.components[:r])[0]
    atoms = torch.cat([mean[None], change.latents])
    found = {
        MEAN: float(v @ mean / mean.norm().clamp_min(1e-300)),
        ENERGY: float(inside.square().sum()),
        SPARSE: float(overlap.sparse(v[None], atoms.float(), k)[0]),
        REMOVAL: float(g @ inside / (g @ v)),
    }
    if before is not None:
        taken = measures(before, steered, r, k)
        found = {name: x - taken[name] for name, x in found.items()}
    cause = float((g @ v) * (v @ mean) / (g @ mean))
    return {name: found.get(name, cause) for name in MEASURES}


class Curve(NamedTuple):
    """What the measures say of mixtures: `rhos` (rhos,), `values` {measure: (behaviours, draws, rhos)} at one size of the shift."""

    rhos: np.ndarray
    values: dict[str, np.ndarray]

    def orders(self, measure: str) -> float:
        """Share of neighbouring rhos, over behaviours and draws, at which the measure grows: 1 for one that orders rho, 1/2 for one
        that knows nothing of it."""
        return float((np.diff(self.values[measure], axis=-1) > 0).mean())

    def rho(self, measure: str, value: float, level: float = 0.95) -> tuple[float, float]:
        """The rhos (lowest, highest) that `value` does not exclude: those at which it lies within the middle `level` of what mixtures
        of that rho give, interpolated. (nan, nan) if it excludes all."""
        tails = (1 - level) / 2
        fine = np.linspace(self.rhos[0], self.rhos[-1], 501)
        flat = self.values[measure].reshape(-1, len(self.rhos))
        low, high = (np.interp(fine, self.rhos, q) for q in np.quantile(flat, [tails, 1 - tails], axis=0))
        inside = fine[(low <= value) & (value <= high)]
        return (float(inside[0]), float(inside[-1])) if len(inside) else (np.nan, np.nan)


def curve(
    unrelated: Change,
    behaviors: Mapping[str, Steered],
    rhos: Sequence[float],
    nats: float,
    r: int,
    k: int,
    draws: int = 5,
    seed: int = 0,
) -> Curve:
    """The measures of mixtures of each rho with the `unrelated` change, for every behaviour and several u: one shift, `nats`.

    The sign of the shift is the vector's: a behaviour that its vector lowers is refused by `push`.
    """
    rows: dict[str, list[list[list[float]]]] = {name: [] for name in MEASURES}
    for steered in behaviors.values():
        by_draw = [
            [measures(unrelated.pushed(push(steered, u, rho, nats)), steered, r, k, unrelated) for rho in rhos]
            for u in aside(steered, draws, seed)
        ]
        for name, into in rows.items():
            into.append([[found[name] for found in by_rho] for by_rho in by_draw])
    return Curve(np.asarray(rhos, float), {name: np.asarray(x) for name, x in rows.items()})
