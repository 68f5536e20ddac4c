"""How much of a vector lies in what a dictionary, or a subspace, can express, with intervals and nulls.

Pure: vectors (n, d_model) and the rows of a dictionary, or samples; nothing of models, text or files. Every measure is between 0 and
1, and none is 0 for an unrelated vector: a random direction has r / d_model of its energy in any r dimensions, the residual
stream's own directions far more. A number from here means something only beside that of random vectors and of what
certainly lies inside. Principal angles: Bjorck & Golub 1973. Description length of sparse codes: Ayonrinde et al. 2024
(arXiv:2410.11179).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers import stats
from helpers.sae import decompose
from helpers.stats import Interval


def _unit(rows: Tensor) -> Tensor:
    """Rows (n, d_model) in float64 on the CPU with length 1; a row of zeros stays one."""
    rows = rows.detach().double().cpu()
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("a vector or a direction holds NaN or infinity: look at what it was made from")
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)


# --- subspaces ---------------------------------------------------------------------------------------------------------


def basis(directions: Tensor, tolerance: float = 1e-9) -> Tensor:
    """Orthonormal rows (directions, d_model) float64: the first r of them span the first r `directions` (directions, d_model).

    A direction that lies in the span of those before it (but for `tolerance` of its length) adds nothing and has a row of zeros.
    Gram-Schmidt, twice.
    """
    out = torch.zeros(directions.shape, dtype=torch.float64)
    for i, row in enumerate(_unit(directions)):
        for _ in range(2):
            row = row - (row @ out[:i].T) @ out[:i]
        if (length := row.norm()) > tolerance:
            out[i] = row / length
    return out


def principal(rows: Tensor, r: int) -> Tensor:
    """The r directions (r, d_model) float64 that hold most of the rows (n, d_model): principal components about zero, the mean included.

    About zero, because what training adds to every token alike is a part of what it did.
    """
    rows = rows.detach().double().cpu()
    return torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :r].T.contiguous()


def energy(vectors: Tensor, directions: Tensor, ranks: Sequence[int] | None = None) -> np.ndarray:
    """Share of the squared length of `vectors` (n, d_model) in the span of the first r `directions` (m, d_model), for r in `ranks`.

    (ranks, n) float64; without `ranks` (n,), of all of them. 0 for a vector of zeros. ValueError for an r that is not there.
    """
    if ranks is not None and not all(0 <= r <= len(directions) for r in ranks):
        raise ValueError(f"ranks {list(ranks)} were asked for; there are 0 to {len(directions)} directions")
    shares = ((_unit(vectors) @ basis(directions).T) ** 2).cumsum(1)
    shares = torch.cat([torch.zeros(len(shares), 1, dtype=torch.float64), shares], 1)
    return shares[:, -1].numpy() if ranks is None else shares[:, list(ranks)].T.numpy()


def project_out(vectors: Tensor, directions: Tensor) -> Tensor:
    """`vectors` (n, d_model) without what lies in the span of `directions` (m, d_model): float64."""
    q = basis(directions)
    v = vectors.detach().double().cpu()
    return v - (v @ q.T) @ q


def project_onto(vectors: Tensor, directions: Tensor) -> Tensor:
    """What of `vectors` (n, d_model) lies in the span of `directions` (m, d_model): float64."""
    return vectors.detach().double().cpu() - project_out(vectors, directions)


def principal_cosines(A: Tensor, B: Tensor) -> np.ndarray:
    """Cosines (min(rank A, rank B),) of the principal angles between the spans of the rows A (m, d_model) and B (n, d_model), largest first."""
    a, b = (q[q.any(1)] for q in (basis(A), basis(B)))
    return torch.linalg.svdvals(a @ b.T).clamp(0, 1).numpy()


# --- dictionaries ------------------------------------------------------------------------------------------------------


def sparse(vectors: Tensor, rows: Tensor, k: int) -> np.ndarray:
    """Cosine (n,) of `vectors` (n, d_model) with their best sum of k `rows` (latents, d_model), signs free: orthogonal pursuit."""
    return decompose.pursuit(rows, vectors.double(), min(k, len(rows))).cosine


def best(vectors: Tensor, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The row (latents, d_model) most aligned with each of `vectors` (n, d_model), either way: its index and the size of the cosine."""
    found = (_unit(vectors) @ _unit(rows).T).abs().max(dim=1)
    return found.indices.numpy(), found.values.numpy()


def matched_rank(latents: int, k: int, bits: int = 16) -> int:
    """The number of dense coordinates that take as many bits a token as k codes out of `latents` do.

    k codes: their values, `bits` each, and which they are, log2 of (latents choose k). The dictionary and the components
    themselves, sent once, are left out; they favour neither over many tokens.
    """
    if not 1 <= k <= latents:
        raise ValueError(f"k = {k} given; it must lie between 1 and the {latents} latents")
    choose = (math.lgamma(latents + 1) - math.lgamma(k + 1) - math.lgamma(latents - k + 1)) / math.log(2)
    return round(k + choose / bits)


# --- over contrast pairs, and against chance ---------------------------------------------------------------------------


def left_out(pairs: Tensor) -> Tensor:
    """The mean of the differences `pairs` (n, d_model), then the mean without each of them: (1 + n, d_model) float64."""
    x = pairs.double()
    return torch.cat([x.mean(0, keepdim=True), (x.sum(0) - x) / (len(x) - 1)])


def over_pairs(found: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> Interval:
    """The weighted sum over behaviours (default: their mean) of a number of each one's vector, with its 95 % interval over pairs.

    `found`: for each behaviour (seeds, 1 + pairs), the number of the whole vector and of those that `left_out` gives, by one
    dictionary a seed. The behaviours are taken as given: what is sampled is each one's pairs, and the dictionary's seed.
    """
    part = np.full(len(found), 1 / len(found)) if weights is None else np.asarray(weights, np.float64)
    whole = np.sum([w * x[:, 0] for w, x in zip(part, found, strict=True)], axis=0)
    without = [whole + w * (x[:, i] - x[:, 0]) for w, x in zip(part, found, strict=True) for i in range(1, x.shape[1])]
    every = set(range(len(without)))

    def of(index: np.ndarray) -> np.ndarray:
        missing = every - set(index.tolist())
        return without[missing.pop()] if missing else whole

    return stats.over(np.arange(len(without)), of)


def means(null: np.ndarray, size: int, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Means (draws,) of `size` different entries of `null` (n,), drawn at random: what as many behaviours would give by chance."""
    return _groups(null, size, draws, seed).mean(1)


def largest(null: np.ndarray, size: int, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """The same with the largest of each draw: what the best of as many behaviours would give."""
    return _groups(null, size, draws, seed).max(1)


def _groups(null: np.ndarray, size: int, draws: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([null[rng.choice(len(null), size, replace=False)] for _ in range(draws)])


class Scale(NamedTuple):
    """A scale on which random vectors are 0 in the mean, and what certainly lies inside is 1: `of(x)`. `able`: the behaviours whose
    own ceiling is told from random vectors; of the others no overlap could be seen."""

    floor: float
    span: float
    able: list[str]

    def of(self, x: np.ndarray | Interval) -> np.ndarray:
        """Numbers on this scale."""
        return (np.asarray(x) - self.floor) / self.span


def scale_of(null: np.ndarray, ceilings: Mapping[str, float], group: Sequence[str], p: float = 0.05) -> Scale | None:
    """The scale of a group of behaviours from the null's draws (n,) and the `ceilings`; None where none is told from the null."""
    able = [name for name in group if stats.p_value(ceilings[name], null) < p]
    floor = float(np.mean(null))
    return Scale(floor, float(np.mean([ceilings[n] for n in able])) - floor, able) if able else None


class Reading(NamedTuple):
    """What a scale reads: `found`, and the null's draws. None, and no draws, where there is no scale."""

    found: Interval | None
    null: np.ndarray


NOTHING = Reading(None, np.zeros(0))


def read(scale: Scale | None, found: Mapping[str, np.ndarray], null: np.ndarray, seed: int = 0) -> Reading:
    """The mean over a scale's behaviours, with its interval over their pairs, and means of as many of the null's draws (n,).

    `found`: (seeds, 1 + pairs) a behaviour, as `over_pairs` wants it; the behaviours are taken as given.
    """
    if scale is None:
        return NOTHING
    each = [scale.of(found[n]) for n in scale.able]
    return Reading(over_pairs(each), means(scale.of(null), len(each), seed=seed))
