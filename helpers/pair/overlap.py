"""How much of a vector lies in what a dictionary, or a subspace, can express: five measures, and their permutation null.

Pure: vectors (n, d_model) and the rows of a dictionary, or samples; nothing of models, text or files. Every measure is between 0 and
1, and none is 0 for an unrelated vector: a random direction has r / d_model of its energy in any r dimensions, the residual
stream's own directions far more. A number from here means something only beside that of random vectors and of what
certainly lies inside. Principal angles: Bjorck & Golub 1973. Description length of sparse codes: Ayonrinde et al. 2024
(arXiv:2410.11179).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers.sae import decompose


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


# --- between behaviours ------------------------------------------------------------------------------------------------


def top(differences: Tensor, rows: Tensor, k: int) -> Tensor:
    """The k unit rows (latents, d_model) most aligned, either way, with the mean of `differences` (pairs, d_model): (k,) indices."""
    return (_unit(differences.double().mean(0)[None]) @ _unit(rows).T)[0].abs().topk(k).indices


def jaccard(one: Tensor, other: Tensor) -> float:
    """Size of the intersection of two sets of indices over that of their union; 0 for two empty ones."""
    a, b = set(one.tolist()), set(other.tolist())
    return len(a & b) / len(a | b) if a | b else 0.0


class Shared(NamedTuple):
    """Jaccard index of two behaviours' top latents: `value`, and of as many pairs dealt out at random between the two, `permuted` (draws,)."""

    value: float
    permuted: np.ndarray


def shared(one: Tensor, other: Tensor, rows: Tensor, k: int, draws: int = 200, seed: int = 0) -> Shared:
    """Whether two behaviours have the same top latents, by the differences (pairs, d_model) of their contrast pairs.

    The permutation deals all pairs out anew: were the two one behaviour, the value would look like one of those draws. Differences
    are scaled to a mean length of 1 a behaviour first, so that the longer one does not rule both halves.
    """
    one, other = (x.double() / x.double().norm(dim=1).mean().clamp_min(1e-300) for x in (one, other))
    unit, pool, n = _unit(rows), torch.cat([one, other]), len(one)
    g = torch.Generator().manual_seed(seed)
    orders = [torch.arange(len(pool)), *(torch.randperm(len(pool), generator=g) for _ in range(draws))]
    halves = torch.stack([pool[part].mean(0) for order in orders for part in (order[:n], order[n:])])
    chosen = (halves @ unit.T).abs().topk(min(k, len(unit)), dim=1).indices
    values = np.array([jaccard(chosen[i], chosen[i + 1]) for i in range(0, len(chosen), 2)])
    return Shared(float(values[0]), values[1:])
