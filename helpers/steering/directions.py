"""Pairs of activations in, one direction out: the aggregations that the steering literature uses, side by side.

Pure: tensors only. Every function takes `pos` and `neg` (pairs, d_model) and returns float64 (d_model,). Sums are in float64
because bf16 means over pairs lose the digits in which methods differ. Sign rule, the same for all: the direction points
the way the mean difference does, (pos - neg).mean(0) . direction >= 0. Methods other than the mean have no natural length:
they come back with the length of the mean difference, so that a multiplier means the same for each.
What the data leave undefined is a ValueError, never a number: activations that are not finite, a mean that cancels (no
sign), pairs that do not differ from one another where a method lives on that. A difference within the rounding of the
activations, judged dimension by dimension, counts as none.
Sources: mean, Rimsky et al. 2023 (arXiv:2312.06681); PCA of differences and LAT, Zou et al. 2023 (arXiv:2310.01405).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _finite(name: str, rows: Tensor) -> Tensor:
    """`rows` in float64 on the CPU; ValueError if anything in it is NaN or infinite."""
    rows = rows.detach().double().cpu()
    if bad := int((~rows.isfinite()).sum()):
        raise ValueError(
            f"{name} {tuple(rows.shape)} holds {bad} values that are NaN or infinite; finite activations are wanted "
            "(float16 overflows on some models: read them in bfloat16 or float32)"
        )
    return rows


def _float64(pos: Tensor, neg: Tensor) -> tuple[Tensor, Tensor]:
    if pos.shape != neg.shape or pos.ndim != 2 or not pos.numel():
        raise ValueError(
            f"pos {tuple(pos.shape)} and neg {tuple(neg.shape)} were given; two equal (pairs, d_model) with one pair or more"
        )
    return _finite("pos", pos), _finite("neg", neg)


def _rounding(*parts: Tensor) -> Tensor:
    """What rounding alone can make of a difference, (d_model,) float64, from the largest activation in each dimension.

    Parts (n, d_model) in float64 are taken at their word; all others were float32 at best when they were computed.
    """
    kind = torch.float64 if all(p.dtype == torch.float64 for p in parts) else torch.float32
    largest = torch.stack([p.detach().double().cpu().abs().amax(0) for p in parts]).amax(0)
    terms = sum(map(len, parts))
    return largest * (4 * torch.finfo(kind).eps + terms * torch.finfo(torch.float64).eps)


def _same(rows: Tensor, rounding: Tensor) -> bool:
    """Whether the rows (n, d_model) are one row, but for rounding."""
    return bool(((rows - rows[0]).abs() <= rounding).all())


def _mean(pos: Tensor, neg: Tensor) -> Tensor:
    """The mean difference, where a method takes its sign and length from it: ValueError if it is zero."""
    one, other = _float64(pos, neg)
    v = (one - other).mean(0)
    if bool((v.abs() <= _rounding(pos, neg)).all()) or not float(v.norm()) > 0:
        raise ValueError(
            f"the mean difference of {len(pos)} pairs is zero, so that a direction has neither sign nor length; "
            "give pairs whose halves differ the same way"
        )
    return v


def _oriented(direction: Tensor, mean: Tensor) -> Tensor:
    """`direction` with the mean difference's length, pointing its way."""
    length = direction.norm()
    if not (length.isfinite() and length > 0):
        raise ValueError("the fit gave no direction: the pairs do not determine one for this method")
    sign = 1.0 if float(direction @ mean) >= 0 else -1.0
    return sign * direction / length * mean.norm()


def first_component(rows: Tensor) -> Tensor:
    """The unit first right-singular vector of rows (n, d): the first principal component if the rows are centred.

    ValueError where there is none: rows that are all zero, or two components of equal size.
    """
    if rows.ndim != 2 or not rows.numel():
        raise ValueError(f"rows {tuple(rows.shape)} were given; (n, d) with one row or more is wanted")
    _, sizes, directions = torch.linalg.svd(_finite("rows", rows), full_matrices=False)
    if not sizes[0] > 0:
        raise ValueError(f"all {len(rows)} rows are zero: they have no first component")
    if len(sizes) > 1 and float(1 - sizes[1] / sizes[0]) <= max(rows.shape) * torch.finfo(torch.float64).eps:
        raise ValueError(
            "the two largest components are of equal size: which is the first is undefined; give more pairs"
        )
    return directions[0]


def mean(pos: Tensor, neg: Tensor) -> Tensor:
    """The mean of pos - neg over pairs; zero where the differences cancel."""
    pos, neg = _float64(pos, neg)
    return (pos - neg).mean(0)


def pc1_uncentred(pos: Tensor, neg: Tensor) -> Tensor:
    """First singular vector of the differences as they are (equal to PCA of the differences and their negatives)."""
    v = _mean(pos, neg)
    pos, neg = _float64(pos, neg)
    return _oriented(first_component(pos - neg), v)


def pc1_centred(pos: Tensor, neg: Tensor) -> Tensor:
    """First principal component of the differences with their mean taken out: the main way in which pairs *disagree*."""
    v, rounding = _mean(pos, neg), _rounding(pos, neg)
    pos, neg = _float64(pos, neg)
    diff = pos - neg
    if len(diff) < 2:
        raise ValueError("the centred component of one difference is undefined; give two pairs or more")
    if _same(diff, rounding):
        raise ValueError(
            f"the differences of all {len(diff)} pairs are the same: with their mean taken out nothing is left; "
            "give pairs that differ from one another, or take the mean"
        )
    return _oriented(first_component(diff - diff.mean(0)), v)


def pc1_pair_centred(pos: Tensor, neg: Tensor) -> Tensor:
    """First principal component of both halves of each pair about the pair's centre, the rows +d/2 and -d/2.

    Their overall mean is zero, so this *is* the uncentred component of the differences, whatever the data (algebra); kept
    because repeng offers it as a method of its own (`pca_center`).
    """
    v = _mean(pos, neg)
    pos, neg = _float64(pos, neg)
    centre = (pos + neg) / 2
    return _oriented(first_component(torch.cat([pos - centre, neg - centre])), v)


def logistic(pos: Tensor, neg: Tensor, penalty: float = 1.0) -> Tensor:
    """Weights of a logistic probe, positive against negative activations, features standardised, C = 1/penalty.

    A dimension in which nothing varies, but for rounding, has weight zero.
    """
    from sklearn.linear_model import LogisticRegression

    v, rounding = _mean(pos, neg), _rounding(pos, neg)
    pos, neg = _float64(pos, neg)
    x = torch.cat([pos, neg])
    varies = ((x - x[0]).abs() > rounding).any(0)
    x = x[:, varies]
    scale = x.std(0)
    weights = torch.zeros_like(v)
    if bool(varies.any()):
        probe = LogisticRegression(C=1 / penalty, max_iter=2000)
        probe.fit(((x - x.mean(0)) / scale).numpy(), [1] * len(pos) + [0] * len(neg))
        weights[varies] = torch.from_numpy(probe.coef_[0]) / scale
    return _oriented(weights, v)


def lda(pos: Tensor, neg: Tensor) -> Tensor:
    """Linear discriminant, S_w^-1 (mu+ - mu-), within-class covariance shrunk by Ledoit & Wolf, as sklearn's
    LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto") has it, which solves by a singular value decomposition."""
    v, rounding = _mean(pos, neg), _rounding(pos, neg)
    pos, neg = _float64(pos, neg)
    if len(pos) < 2:
        raise ValueError("a discriminant needs a within-class covariance: give two pairs or more")
    if _same(pos, rounding) and _same(neg, rounding):
        raise ValueError(
            f"all {len(pos)} positive activations are the same, and all negative ones: there is no within-class "
            "covariance; give pairs that differ from one another, or take the mean"
        )
    within = (_shrunk(pos) + _shrunk(neg)) / 2
    gap = (pos.mean(0) - neg.mean(0))[:, None]
    return _oriented(torch.linalg.lstsq(within, gap, driver="gelsy").solution[:, 0], v)


def _shrunk(rows: Tensor) -> Tensor:
    """Covariance (d, d) of rows (n, d), shrunk by Ledoit & Wolf (sklearn) after each column is brought to unit variance."""
    from sklearn.covariance import ledoit_wolf

    scale = rows.std(0, correction=0)
    scale[scale == 0] = 1.0
    shrunk, _ = ledoit_wolf(((rows - rows.mean(0)) / scale).numpy())
    return torch.from_numpy(shrunk) * torch.outer(scale, scale)


def lat(pos: Tensor, neg: Tensor, seed: int = 0) -> Tensor:
    """LAT-style: first component of differences between randomly matched activations of either class.

    Zou et al. draw pairs at random from the pool, so that a difference is +, - or within a class; sign as everywhere here.
    """
    v, rounding = _mean(pos, neg), _rounding(pos, neg)
    pos, neg = _float64(pos, neg)
    pool = torch.cat([pos, neg])
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    half = len(pool) // 2
    diff = pool[order[:half]] - pool[order[half : 2 * half]]
    if bool((diff.abs() <= rounding).all()):
        raise ValueError(f"with seed {seed} every activation is matched with its like; give more pairs or another seed")
    return _oriented(first_component(diff), v)


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
    """The shuffled-label null: exactly half of the pairs, drawn at random, have their sides swapped.

    Not each pair with probability one half: that leaves (sum of signs / pairs) of the mean difference behind, about
    1/sqrt(pairs) of it, and scaling to the vector's length blows the leftover up into +-v itself. For the same reason
    an odd pair, drawn at random, is left out: three pairs with one swapped would keep a third of the mean. One pair
    alone is a ValueError: there is nothing to shuffle.
    """
    _float64(pos, neg)
    if len(pos) < 2:
        raise ValueError(
            "one pair was given: swapped or not it is +-v itself, there is nothing to shuffle; give two or more"
        )
    order = torch.randperm(len(pos), generator=torch.Generator().manual_seed(seed))
    flip = torch.zeros(len(pos), dtype=torch.bool)
    flip[order[: len(pos) // 2]] = True
    flip = flip.to(pos.device)[:, None]
    one, other = torch.where(flip, neg, pos), torch.where(flip, pos, neg)
    if len(pos) % 2:
        kept = order[:-1].sort().values.to(pos.device)
        one, other = one[kept], other[kept]
    return one, other


def random_like(v: Tensor, seed: int, draws: int = 1, samples: Tensor | None = None) -> Tensor:
    """Random directions of the norm of `v` (d_model,), float64 (draws, d_model).

    Isotropic, or with the covariance of `samples` (n, d_model). ValueError if `v` is zero or all samples are the same.
    """
    if v.ndim != 1 or not len(v) or draws < 1:
        raise ValueError(f"v {tuple(v.shape)} and {draws} draws were given; (d_model,) and one draw or more are wanted")
    length = _finite("v", v).norm()
    if not length > 0:
        raise ValueError("v is zero: a random direction of its length is zero too, and no null")
    g = torch.Generator().manual_seed(seed)
    if samples is None:
        drawn = torch.randn(draws, v.shape[0], generator=g, dtype=torch.float64)
    else:
        if samples.ndim != 2 or samples.shape[1] != len(v) or len(samples) < 2:
            raise ValueError(f"samples {tuple(samples.shape)} were given; two rows or more of {len(v)} are wanted")
        rows = _finite("samples", samples)
        if _same(rows, _rounding(samples)):
            raise ValueError(f"all {len(rows)} samples are the same row: they have no covariance to draw from")
        drawn = torch.randn(draws, len(rows), generator=g, dtype=torch.float64) @ (rows - rows.mean(0))
    return drawn / drawn.norm(dim=1, keepdim=True) * length


def nulls(
    pos: Tensor, neg: Tensor, residuals: Tensor, others: Sequence[Tensor] = (), draws: int = 3, seed: int = 0
) -> dict[str, Tensor]:
    """The nulls every study draws from, each (draws, d_model) float64 of the norm of the mean difference (zero: zero).

    `residuals` (tokens, d_model): residual-stream rows for the covariance-matched null, special tokens out. `others`: vectors
    of other behaviours. Keys: zero, random, random (residual covariance), shuffled labels, other behaviour, minus v.
    ValueError where one is undefined: a mean difference of zero, one pair, pairs that all differ alike, a zero vector.
    """
    v = _mean(pos, neg)

    def to_norm(rows: Sequence[Tensor]) -> Tensor:
        stack = torch.stack([row.double().cpu() for row in rows])
        return stack / stack.norm(dim=1, keepdim=True) * v.norm()

    shuffled = [mean(*flipped(pos, neg, seed + i)) for i in range(draws)]
    if any(bool((row.abs() <= _rounding(pos, neg)).all()) for row in shuffled):
        raise ValueError(
            f"the {len(pos)} pairs all differ alike: with half of them swapped nothing is left, and shuffled labels "
            "are no null; give pairs that differ from one another"
        )
    for i, other in enumerate(others):
        if other.shape != v.shape or not _finite(f"others[{i}]", other).norm() > 0:
            raise ValueError(
                f"others[{i}] {tuple(other.shape)} was given; a vector ({len(v)},) that is not zero is wanted"
            )
    out = {
        "zero": torch.zeros(1, len(v), dtype=torch.float64),
        "random": random_like(v, seed, draws),
        "random (residual covariance)": random_like(v, seed, draws, residuals),
        "shuffled labels": to_norm(shuffled),
        "minus v": -v[None],
    }
    if len(others):
        out["another behaviour"] = to_norm(others)
    return out
