"""How much of a vector lies in what a dictionary, or a subspace, can express: five measures, their intervals and their nulls.

Pure: vectors (n, d_model) and the rows of a dictionary, or samples; nothing of models, text or files. Every measure is between 0 and
1, and none is 0 for an unrelated vector: a random direction has r / d_model of its energy in any r dimensions, the residual
stream's own directions far more. A number from here means something only beside that of random vectors and of what
certainly lies inside. Principal angles: Bjorck & Golub 1973. Description length of sparse codes: Ayonrinde et al. 2024
(arXiv:2410.11179).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
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


# --- four measures at once ---------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where vectors are looked for: `atoms` (1 + latents, d_model), the mean and the latents used most, and principal `components`
    (r, d_model). The mean counts as a latent: an SAE of differences keeps it in its bias, and it is a part of what training did."""

    atoms: Tensor
    components: Tensor


def places(rows: Mapping[str, Tensor], latents: Mapping[tuple[str, int], Tensor], r: int) -> dict[str, list[Place]]:
    """Where to look, by model: the mean and the r principal components of its `rows` (tokens, d_model), with each of its dictionaries'
    `latents` (latents, d_model), the most used first, by (model, seed). As many of each, for more rows come closer to anything."""
    live = min(len(x) for x in latents.values())
    means = {who: x.double().mean(0, keepdim=True).cpu() for who, x in rows.items()}
    components = {who: principal(x, r) for who, x in rows.items()}
    found: dict[str, list[Place]] = {who: [] for who in rows}
    for (who, _), x in latents.items():
        found[who].append(Place(torch.cat([means[who], x[:live].double().cpu()]), components[who]))
    return found


SPARSE, USED, COMPONENTS, BEST = "k-sparse sum", "most used latents", "principal components", "best latent"
MEASURES: dict[str, Callable[[Tensor, Place, int], np.ndarray]] = {
    SPARSE: lambda v, place, k: sparse(v, place.atoms.float(), k),
    USED: lambda v, place, k: energy(v, place.atoms[: k + 1]),
    COMPONENTS: lambda v, place, k: energy(v, place.components[:k]),
    BEST: lambda v, place, k: best(v, place.atoms)[1],
}
UNITS = {SPARSE: "cosine", USED: "of squared length", COMPONENTS: "of squared length", BEST: "cosine"}


def scores(groups: Mapping[str, Tensor], places: Sequence[Place], k: int) -> dict[str, dict[str, np.ndarray]]:
    """By measure and group, how much of the group's vectors (n, d_model) lies in each of `places`, (places, n): cosine with the best
    sum of k atoms; share of the squared length in the mean and k atoms, or in k components; the largest cosine with one atom."""
    every, ends = torch.cat(list(groups.values())), np.cumsum([len(x) for x in groups.values()])[:-1]
    found = {name: np.stack([f(every, place, k) for place in places]) for name, f in MEASURES.items()}
    return {m: dict(zip(groups, np.split(values, ends, axis=1), strict=True)) for m, values in found.items()}


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


class Ruler(NamedTuple):
    """A scale on which random vectors are 0 in the mean, and what certainly lies inside is 1: `of(x)`. `able`: the behaviours whose
    own ceiling is told from random vectors; of the others no overlap could be seen."""

    floor: float
    span: float
    able: list[str]

    def of(self, x: np.ndarray | Interval) -> np.ndarray:
        """Numbers on this scale."""
        return (np.asarray(x) - self.floor) / self.span


def ruler(null: np.ndarray, ceilings: Mapping[str, float], group: Sequence[str], p: float = 0.05) -> Ruler | None:
    """The scale of a group of behaviours from the null's draws (n,) and the `ceilings`; None where none is told from the null."""
    able = [name for name in group if stats.p_value(ceilings[name], null) < p]
    floor = float(np.mean(null))
    return Ruler(floor, float(np.mean([ceilings[n] for n in able])) - floor, able) if able else None


class Reading(NamedTuple):
    """What a ruler reads: `found`, and the null's draws. None, and no draws, where there is no ruler."""

    found: Interval | None
    null: np.ndarray


NOTHING = Reading(None, np.zeros(0))


def read(scale: Ruler | None, found: Mapping[str, np.ndarray], null: np.ndarray, pairs: bool, seed: int = 0) -> Reading:
    """The mean over a ruler's behaviours with its interval, and means of as many of the null's draws (n,).

    `found`: (seeds, 1 + pairs) a behaviour, as `over_pairs` wants it. The interval ranges over `pairs`, the behaviours taken as
    given, or over behaviours, of which there must be three.
    """
    if scale is None or not pairs and len(scale.able) < 3:
        return NOTHING
    each = [scale.of(found[n]) for n in scale.able]
    interval = over_pairs(each) if pairs else stats.over([x[:, 0].mean() for x in each])
    return Reading(interval, means(scale.of(null), len(each), seed=seed))


def read_more(scale: Ruler | None, found: Mapping[str, np.ndarray], group: Sequence[str]) -> Reading:
    """How much more a group's mean is than that of the others, over pairs; the null is every other group as large."""
    others = [n for n in found if n not in group]
    if scale is None or not others:
        return NOTHING
    weights = [1 / len(group) if n in group else -1 / len(others) for n in found]
    whole = scale.of(np.array([x[:, 0].mean() for x in found.values()]))
    names = list(found)
    gap = over_pairs([scale.of(x) for x in found.values()], weights)
    return Reading(gap, other_choices(whole, [names.index(n) for n in group]))


def read_span(vectors: Tensor, ceiling: Tensor, sets: Tensor, inside: Tensor, less: Sequence[Tensor] = ()) -> Reading:
    """`span_overlap` of all `vectors` (n, d_model) together, on the scale from that of random `sets` (draws, n, d_model) to that of
    the `ceiling` (n, d_model); over vectors, which are one a behaviour."""
    find = partial(span_overlap, inside=inside, less=less)
    null = np.array([find(x) for x in sets])
    scale = ruler(null, {"all": find(ceiling)}, ["all"])
    if scale is None:
        return NOTHING
    return Reading(Interval(*map(float, scale.of(stats.over(vectors.numpy(), find)))), scale.of(null))


def contrast(values: np.ndarray, chosen: Sequence[int]) -> float:
    """Mean of the chosen entries of `values` (n,) less the mean of the others."""
    inside = np.isin(np.arange(len(values)), list(chosen))
    return float(values[inside].mean() - values[~inside].mean())


def other_choices(values: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
    """`contrast` for every other way to choose as many of `values` (n,): what the labels would give if they meant nothing."""
    every = combinations(range(len(values)), len(chosen))
    return np.array([contrast(values, c) for c in every if set(c) != set(chosen)])


def span_overlap(vectors: Tensor | np.ndarray, inside: Tensor, less: Sequence[Tensor] = ()) -> float:
    """Mean squared cosine of the principal angles between the spans of `vectors` (m, d_model) and of `inside` (n, d_model), less
    that with each of `less`."""
    v = torch.as_tensor(vectors)
    first, *other = (float((principal_cosines(v, q) ** 2).mean()) for q in (inside, *less))
    return first - sum(other)


def carried(gradients: np.ndarray, vectors: Tensor, directions: Tensor) -> np.ndarray:
    """What the part of each of `vectors` (n, d_model) in the span of `directions` (m, d_model) does to first order, (n,): its product
    with that vector's own of `gradients` (n, d_model)."""
    q = basis(directions).numpy()
    return ((gradients @ q.T) * (vectors.double().numpy() @ q.T)).sum(1)


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


def mean_shared(tops: Sequence[Tensor]) -> float:
    """Mean Jaccard index over all pairs of sets of indices."""
    return float(np.mean([jaccard(a, b) for a, b in combinations(tops, 2)]))


def shared_by_chance(tops: Sequence[Tensor], size: int, draws: int = 500, seed: int = 0) -> np.ndarray:
    """`mean_shared` (draws,) of `size` of these sets, drawn at random."""
    rng = np.random.default_rng(seed)
    return np.array([mean_shared([tops[i] for i in rng.choice(len(tops), size, replace=False)]) for _ in range(draws)])
