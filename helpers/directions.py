"""Pairs of activations in, one direction out: the aggregations that the steering literature uses, side by side.

Pure: tensors only. Every function takes `pos` and `neg` (pairs, d_model) and returns float64 (d_model,). Sums are in float64
because bf16 means over pairs lose the digits in which methods differ. Sign rule, the same for all: the direction points
the way the mean difference does, (pos - neg).mean(0) . direction >= 0. Methods other than the mean have no natural length:
they come back with the length of the mean difference, so that a multiplier means the same for each.
Sources: mean, Rimsky et al. 2023 (arXiv:2312.06681); PCA of differences and LAT, Zou et al. 2023 (arXiv:2310.01405).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _float64(pos: Tensor, neg: Tensor) -> tuple[Tensor, Tensor]:
    if pos.shape != neg.shape or pos.ndim != 2 or not len(pos):
        raise ValueError(
            f"pos {tuple(pos.shape)} and neg {tuple(neg.shape)} were given; two equal (pairs, d_model) with one pair or more"
        )
    return pos.detach().double().cpu(), neg.detach().double().cpu()


def _oriented(direction: Tensor, mean: Tensor) -> Tensor:
    """`direction` with the mean difference's length, pointing its way."""
    sign = 1.0 if float(direction @ mean) >= 0 else -1.0
    return sign * direction / direction.norm() * mean.norm()


def first_component(rows: Tensor) -> Tensor:
    """The unit first right-singular vector of rows (n, d): the first principal component if the rows are centred."""
    return torch.linalg.svd(rows.double(), full_matrices=False).Vh[0]


def mean(pos: Tensor, neg: Tensor) -> Tensor:
    """The mean of pos - neg over pairs."""
    pos, neg = _float64(pos, neg)
    return (pos - neg).mean(0)


def pc1_uncentred(pos: Tensor, neg: Tensor) -> Tensor:
    """First singular vector of the differences as they are (equal to PCA of the differences and their negatives)."""
    pos, neg = _float64(pos, neg)
    return _oriented(first_component(pos - neg), (pos - neg).mean(0))


def pc1_centred(pos: Tensor, neg: Tensor) -> Tensor:
    """First principal component of the differences with their mean taken out: the main way in which pairs *disagree*."""
    pos, neg = _float64(pos, neg)
    diff = pos - neg
    if len(diff) < 2:
        raise ValueError("the centred component of one difference is undefined; give two pairs or more")
    return _oriented(first_component(diff - diff.mean(0)), diff.mean(0))


def pc1_pair_centred(pos: Tensor, neg: Tensor) -> Tensor:
    """First principal component of both halves of each pair about the pair's centre, the rows +d/2 and -d/2.

    Their overall mean is zero, so this *is* the uncentred component of the differences, whatever the data (algebra); kept
    because repeng offers it as a method of its own (`pca_center`).
    """
    pos, neg = _float64(pos, neg)
    centre = (pos + neg) / 2
    return _oriented(first_component(torch.cat([pos - centre, neg - centre])), (pos - neg).mean(0))


def logistic(pos: Tensor, neg: Tensor, penalty: float = 1.0) -> Tensor:
    """Weights of a logistic probe, positive against negative activations, features standardised, inverse strength C = 1/penalty."""
    from sklearn.linear_model import LogisticRegression

    pos, neg = _float64(pos, neg)
    x = torch.cat([pos, neg])
    scale = x.std(0).clamp_min(1e-12)
    probe = LogisticRegression(C=1 / penalty, max_iter=2000)
    probe.fit(((x - x.mean(0)) / scale).numpy(), [1] * len(pos) + [0] * len(neg))
    return _oriented(torch.from_numpy(probe.coef_[0]) / scale, (pos - neg).mean(0))


def lda(pos: Tensor, neg: Tensor) -> Tensor:
    """Linear discriminant, S_w^-1 (mu+ - mu-), within-class covariance shrunk by Ledoit & Wolf (sklearn)."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    pos, neg = _float64(pos, neg)
    if len(pos) < 2:
        raise ValueError("a discriminant needs a within-class covariance: give two pairs or more")
    fit = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    fit.fit(torch.cat([pos, neg]).numpy(), [1] * len(pos) + [0] * len(neg))
    return _oriented(torch.from_numpy(fit.coef_[0]), (pos - neg).mean(0))


def lat(pos: Tensor, neg: Tensor, seed: int = 0) -> Tensor:
    """LAT-style: first component of differences between randomly matched activations of either class.

    Zou et al. draw pairs at random from the pool, so that a difference is +, - or within a class; sign as everywhere here.
    """
    pos, neg = _float64(pos, neg)
    pool = torch.cat([pos, neg])
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    half = len(pool) // 2
    return _oriented(first_component(pool[order[:half]] - pool[order[half : 2 * half]]), (pos - neg).mean(0))


METHODS: dict[str, Callable[..., Tensor]] = {
    "mean": mean,
    "PC1 uncentred": pc1_uncentred,
    "PC1 centred": pc1_centred,
    "PC1 pair-centred": pc1_pair_centred,
    "logistic probe": logistic,
    "LDA (shrinkage)": lda,
    "LAT (shuffled)": lat,
}


def flipped(pos: Tensor, neg: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The shuffled-label null: exactly half of the pairs (rounded down), drawn at random, have their sides swapped.

    Not each pair with probability one half: that leaves (sum of signs / pairs) of the mean difference behind, about
    1/sqrt(pairs) of it, and scaling to the vector's length blows the leftover up into +-v itself.
    """
    order = torch.randperm(len(pos), generator=torch.Generator().manual_seed(seed))
    flip = torch.zeros(len(pos), dtype=torch.bool)
    flip[order[: len(pos) // 2]] = True
    flip = flip.to(pos.device)[:, None]
    return torch.where(flip, neg, pos), torch.where(flip, pos, neg)


def random_like(v: Tensor, seed: int, draws: int = 1, samples: Tensor | None = None) -> Tensor:
    """Random directions of the norm of `v` (d_model,), float64 (draws, d_model).

    Isotropic, or with the covariance of `samples` (n, d_model).
    """
    g = torch.Generator().manual_seed(seed)
    if samples is None:
        drawn = torch.randn(draws, v.shape[0], generator=g, dtype=torch.float64)
    else:
        rows = samples.double().cpu()
        drawn = torch.randn(draws, len(rows), generator=g, dtype=torch.float64) @ (rows - rows.mean(0))
    return drawn / drawn.norm(dim=1, keepdim=True) * v.double().cpu().norm()


def nulls(
    pos: Tensor, neg: Tensor, residuals: Tensor, others: Sequence[Tensor] = (), draws: int = 3, seed: int = 0
) -> dict[str, Tensor]:
    """The nulls every study draws from, each (draws, d_model) float64 of the norm of the mean difference (zero: zero).

    `residuals` (tokens, d_model): residual-stream rows for the covariance-matched null, special tokens out. `others`: vectors
    of other behaviours. Keys: zero, random, random (residual covariance), shuffled labels, other behaviour, minus v.
    """
    v = mean(pos, neg)

    def to_norm(rows: Sequence[Tensor]) -> Tensor:
        stack = torch.stack([row.double().cpu() for row in rows])
        return stack / stack.norm(dim=1, keepdim=True) * v.norm()

    out = {
        "zero": torch.zeros(1, len(v), dtype=torch.float64),
        "random": random_like(v, seed, draws),
        "random (residual covariance)": random_like(v, seed, draws, residuals),
        "shuffled labels": to_norm([mean(*flipped(pos, neg, seed + i)) for i in range(draws)]),
        "minus v": -v[None],
    }
    if len(others):
        out["another behaviour"] = to_norm(others)
    return out
