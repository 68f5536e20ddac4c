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

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from helpers import stats


def finite(name: str, rows: Tensor) -> Tensor:
    """`rows` in float64 on the CPU; ValueError if anything in it is NaN or infinite."""
    rows = rows.detach().double().cpu()
    if bad := int((~rows.isfinite()).sum()):
        raise ValueError(
            f"{name} {tuple(rows.shape)} holds {bad} values that are NaN or infinite; finite activations are wanted "
            "(float16 overflows on some models: read them in bfloat16 or float32)"
        )
    return rows


def float64(pos: Tensor, neg: Tensor) -> tuple[Tensor, Tensor]:
    if pos.shape != neg.shape or pos.ndim != 2 or not pos.numel():
        raise ValueError(
            f"pos {tuple(pos.shape)} and neg {tuple(neg.shape)} were given; two equal (pairs, d_model) with one pair or more"
        )
    return finite("pos", pos), finite("neg", neg)


def rounding(*parts: Tensor) -> Tensor:
    """What rounding alone can make of a difference, (d_model,) float64, from the largest activation in each dimension.

    Parts (n, d_model) in float64 are taken at their word; all others were float32 at best when they were computed.
    """
    kind = torch.float64 if all(p.dtype == torch.float64 for p in parts) else torch.float32
    largest = torch.stack([p.detach().double().cpu().abs().amax(0) for p in parts]).amax(0)
    terms = sum(map(len, parts))
    return largest * (4 * torch.finfo(kind).eps + terms * torch.finfo(torch.float64).eps)


def same(rows: Tensor, error: Tensor) -> bool:
    """Whether the rows (n, d_model) are one row, but for rounding."""
    return bool(((rows - rows[0]).abs() <= error).all())


def nonzero_mean(pos: Tensor, neg: Tensor) -> Tensor:
    """The mean difference, where a method takes its sign and length from it: ValueError if it is zero."""
    one, other = float64(pos, neg)
    v = (one - other).mean(0)
    if bool((v.abs() <= rounding(pos, neg)).all()) or not float(v.norm()) > 0:
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
    _, sizes, directions = torch.linalg.svd(finite("rows", rows), full_matrices=False)
    if not sizes[0] > 0:
        raise ValueError(f"all {len(rows)} rows are zero: they have no first component")
    if len(sizes) > 1 and float(1 - sizes[1] / sizes[0]) <= max(rows.shape) * torch.finfo(torch.float64).eps:
        raise ValueError(
            "the two largest components are of equal size: which is the first is undefined; give more pairs"
        )
    return directions[0]


def mean(pos: Tensor, neg: Tensor) -> Tensor:
    """The mean of pos - neg over pairs; zero where the differences cancel."""
    pos, neg = float64(pos, neg)
    return (pos - neg).mean(0)


def pc1_uncentred(pos: Tensor, neg: Tensor) -> Tensor:
    """First singular vector of the differences as they are (equal to PCA of the differences and their negatives)."""
    v = nonzero_mean(pos, neg)
    pos, neg = float64(pos, neg)
    return _oriented(first_component(pos - neg), v)


def pc1_centred(pos: Tensor, neg: Tensor) -> Tensor:
    """First principal component of the differences with their mean taken out: the main way in which pairs *disagree*."""
    v, error = nonzero_mean(pos, neg), rounding(pos, neg)
    pos, neg = float64(pos, neg)
    diff = pos - neg
    if len(diff) < 2:
        raise ValueError("the centred component of one difference is undefined; give two pairs or more")
    if same(diff, error):
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
    v = nonzero_mean(pos, neg)
    pos, neg = float64(pos, neg)
    centre = (pos + neg) / 2
    return _oriented(first_component(torch.cat([pos - centre, neg - centre])), v)


def logistic(pos: Tensor, neg: Tensor, penalty: float = 1.0) -> Tensor:
    """Weights of a logistic probe, positive against negative activations, features standardised, C = 1/penalty.

    A dimension in which nothing varies, but for rounding, has weight zero. Fitted in the span of the activations, outside of
    which the penalty leaves no weight: as exact, and as fast as there are few pairs.
    """
    from sklearn.linear_model import LogisticRegression

    v, error = nonzero_mean(pos, neg), rounding(pos, neg)
    pos, neg = float64(pos, neg)
    x = torch.cat([pos, neg])
    varies = ((x - x[0]).abs() > error).any(0)
    x = x[:, varies]
    scale = x.std(0)
    weights = torch.zeros_like(v)
    if bool(varies.any()):
        probe = LogisticRegression(C=1 / penalty, max_iter=2000, tol=1e-8, solver="newton-cholesky")
        left, sizes, axes = torch.linalg.svd((x - x.mean(0)) / scale, full_matrices=False)
        probe.fit((left * sizes).numpy(), [1] * len(pos) + [0] * len(neg))
        weights[varies] = torch.from_numpy(probe.coef_[0]) @ axes / scale
    return _oriented(weights, v)


def lda(pos: Tensor, neg: Tensor) -> Tensor:
    """Linear discriminant, S_w^-1 (mu+ - mu-), within-class covariance shrunk by Ledoit & Wolf, as sklearn's
    LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto") has it, which solves by a singular value decomposition."""
    v, error = nonzero_mean(pos, neg), rounding(pos, neg)
    pos, neg = float64(pos, neg)
    if len(pos) < 2:
        raise ValueError("a discriminant needs a within-class covariance: give two pairs or more")
    if same(pos, error) and same(neg, error):
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
    v, error = nonzero_mean(pos, neg), rounding(pos, neg)
    pos, neg = float64(pos, neg)
    pool = torch.cat([pos, neg])
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    half = len(pool) // 2
    diff = pool[order[:half]] - pool[order[half : 2 * half]]
    if bool((diff.abs() <= error).all()):
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


# --- fewer pairs than there are --------------------------------------------------------------------------------------------


def _of_places(rows: Tensor, places: np.ndarray, signs: np.ndarray | float = 1.0) -> Tensor:
    """Means (draws, d_model) of the rows (pairs, d_model) at `places` (draws, size), each times its sign (size,)."""
    weights = np.zeros((len(places), len(rows)))
    np.put_along_axis(weights, places, signs / places.shape[1], axis=1)
    return torch.from_numpy(weights) @ rows


def of_subsets(differences: Mapping[str, Tensor], size: int, draws: int, seed: int = 0) -> dict[str, Tensor]:
    """Means of `size` of each behaviour's differences (pairs, d_model), drawn anew each time, by name: float64 (draws, d_model).

    Of a single pair, every one takes its turn. ValueError for a size that is not between 1 and the pairs.
    """
    found, rng = {}, np.random.default_rng(seed)
    for name, rows in differences.items():
        exact, pairs = finite(name, rows), len(rows)
        if not 1 <= size <= pairs:
            raise ValueError(f"{name}: {size} of {pairs} pairs were asked for")
        orders = [[i % pairs] if size == 1 else rng.permutation(pairs)[:size] for i in range(draws)]
        found[name] = _of_places(exact, np.array(orders))
    return found


def split_cosines(
    differences: Mapping[str, Tensor], size: int, draws: int, seed: int = 0, swapped: bool = False
) -> np.ndarray:
    """Cosines (draws,), mean of behaviours, between the mean differences of two halves of `size` pairs drawn at random; the halves
    have no pair in common.

    `swapped`: their null, in which half of each half has its sides swapped, so that no common direction is left; what is odd
    about a half stays out. ValueError for more pairs than a behaviour has, for one alone, and for the null of three.
    """
    half, pairs = size // 2 - (size // 2) % 2 if swapped else size // 2, min(map(len, differences.values()))
    if half < 1 or size > pairs:
        raise ValueError(f"{size} of {pairs} pairs cannot be split{' and swapped' if swapped else ''}")
    rng, signs = np.random.default_rng(seed), np.resize([1.0, -1.0 if swapped else 1.0], half)
    found = []
    for name, rows in differences.items():
        exact = finite(name, rows)
        order = np.stack([rng.permutation(len(rows))[: 2 * half] for _ in range(draws)])
        one, other = (_of_places(exact, part, signs).numpy() for part in (order[:, :half], order[:, half:]))
        found.append(stats.cosine(one, other))
    return np.mean(found, axis=0)


def between(
    differences: Mapping[str, Mapping[str, Tensor]], draws: int, seed: int = 0, single: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """How well methods agree on a direction: cosines (methods, methods) between the vector of one half of the pairs by the one
    method and of the other half by the other, mean over random halves and behaviours; and the same between vectors of different
    behaviours.

    `differences`: (pairs, d_model) by method and behaviour, pair i of one being pair i of the other where they share pairs, so
    that no pair is on both sides. The diagonal is a method against itself on other pairs; two methods that find one direction
    have the square root of the product of theirs. Of methods in `single` one pair of the half is taken. ValueError for fewer than two pairs.
    """
    rng, names = np.random.default_rng(seed), list(next(iter(differences.values())))
    half = min(len(rows) for of in differences.values() for rows in of.values()) // 2
    if half < 1:
        raise ValueError("one pair was given for a behaviour: it has no halves; give two or more")
    orders = {n: np.stack([rng.permutation(2 * half) for _ in range(draws)]) for n in names}

    def units(part: slice) -> np.ndarray:
        """Unit vectors (methods, behaviours, draws, d_model) of the pairs in one half of every order."""
        rows = [
            [_of_places(finite(n, of[n]), orders[n][:, part][:, : 1 if m in single else half]).numpy() for n in names]
            for m, of in differences.items()
        ]
        return np.array(rows) / np.linalg.norm(rows, axis=-1, keepdims=True)

    found = np.einsum("intd,jktd->nkij", units(slice(half)), units(slice(half, None)), optimize=True) / draws
    cosines = (found + np.einsum("nkij->knji", found)) / 2  # (behaviours, behaviours, methods, methods)
    same = np.eye(len(names), dtype=bool)
    return cosines[same].mean(0), cosines[~same].mean(0)


def coherence(rows: Tensor) -> float:
    """The length of the mean of differences (pairs, d_model) each brought to length one: 1 where all point one way, about
    1 / sqrt(pairs) where they have nothing in common. The mean response to the pairs, one by one at equal length, is that to
    one vector along this mean, so much shorter."""
    exact = finite("rows", rows)
    return float((exact / exact.norm(dim=1, keepdim=True)).mean(0).norm())
