"""One-to-one matching of two dictionaries' rows: optimal with a proof, and the cheaper ways beside it.

Pure: tensors in, tensors out. `match` finds the assignment of least total cost (1 - cosine) without ever
holding the dense cost: it solves on candidate edges, the nearest few of each row and column (scipy's sparse
Jonker-Volgenant), takes prices from shortest paths on them, and asks *every* pair, block by block, whether
it would beat them. Pairs that do join the candidates until there are none: by linear-programming duality
the assignment is then optimal (Burkard, Dell'Amico & Martello 2009, ch. 4). Whatever the prices are, they
bound the optimum, so `gap` holds for any costs; it counts the rounding of float64. Large dictionaries are
compared in float32, and every pair that this rounding could hide is computed again in float64. Another
score than the cosine, or a matrix of costs, may be given. Direction, by construction: row i of A goes with
row `B_for_A[i]` of B.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching, min_weight_full_bipartite_matching
from torch import Tensor
from tqdm import tqdm

from helpers import decompose
from helpers.decompose import Dictionary
from helpers.topk import product

TOLERANCE = 2e-6  # of a cosine in float32: its rounding is about 1e-7 times the root of the rows' length
CLOSE = 1e-5  # of the total: a larger gap is not left to float32
SMALL = 2048 * 2048  # pairs that are compared in float64 from the start
# Steps between a row's best and worst candidate in scipy's fast solver, which can loop forever on finer ones.
GRID = 2.0**26
LEAST = np.nextafter(0, 1)  # for a cost of zero, which scipy would drop
EPS = np.finfo(float).eps
PART = 8192  # rows that go through float64 at once


# Rows (r, ...) of A and all of B (m, ...) -> (r, m), larger is more alike.
Likeness = Callable[[Tensor, Tensor], Tensor]


class Match(NamedTuple):
    """An assignment of A (n, d) to B (m, d).

    `B_for_A` (n,) and `A_for_B` (m,): the partner's row, -1 for a row left over. `score` (n,): each row's
    cosine with its partner (or the score given; 1 - cost), NaN where there is none; float32, or float64 if
    the scores or costs were. `total`: summed cost 1 - score of the pairs, in float64. Certificate:
    `violation`, the most negative reduced cost over all n m pairs (0 if none), and `gap`: `total` exceeds
    the optimum by no more, rounding included, so it is never quite 0 unless all costs are. `edges` looked
    at by the solver, `rounds` of it, `seconds`.
    """

    B_for_A: Tensor
    A_for_B: Tensor
    score: Tensor
    total: float
    violation: float
    gap: float
    edges: int
    rounds: int
    seconds: float


def _lengths(rows: Tensor) -> Tensor:
    """Lengths (n,) of rows (n, d), float64; 1 for a row of zeros. ValueError if not finite."""
    if rows.ndim != 2 or not len(rows):
        raise ValueError(
            f"a dictionary of shape {tuple(rows.shape)} was given; (rows, d_model) with one row or more is wanted"
        )
    out = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    if not bool(torch.isfinite(out).all()):
        raise ValueError("a dictionary row holds NaN or infinity: which SAE is this?")
    return torch.where(out == 0, 1.0, out)


def _units(rows: Tensor, lengths: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of length 1, divided in float64, few at a time."""
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    for part, row, length in zip(out.split(PART), rows.split(PART), lengths.split(PART), strict=True):
        part.copy_(row.double() / length[:, None])
    return out


def _on(rows: Tensor, device: str | torch.device) -> Tensor:
    """Rows on the device, or on the CPU if it has no float64 (mps); whole numbers in float64."""
    rows = rows.detach().to("cpu" if torch.device(device).type == "mps" else device)
    return rows if rows.is_floating_point() else rows.double()


def _moderate(rows: Tensor) -> Tensor:
    """Rows whose squares fit float64: those in float64 divided by their largest number, others as they are."""
    if rows.dtype != torch.float64 or rows.ndim != 2 or not rows.numel():
        return rows
    largest = rows.abs().amax(1, keepdim=True)
    return rows / torch.where(largest == 0, 1.0, largest)


def unit_rows(rows: Tensor, device: str | torch.device = "cpu") -> Tensor:
    """Rows (n, d) of length 1, float32; a row of zeros stays one (its cosine with anything is 0).
    ValueError if not finite.
    """
    rows = _moderate(_on(rows, device))
    return _units(rows, _lengths(rows), torch.float32)


def _blocks(A: Tensor, B: Tensor, rows: int, what: str, likeness: Likeness = product) -> Iterator[tuple[int, Tensor]]:
    """(first row, scores (block, m)), block by block; of unit rows the cosines."""
    for first in tqdm(range(0, len(A), rows), desc=what, leave=False):
        yield first, likeness(A[first : first + rows], B)


def _back(likeness: Likeness) -> Likeness:
    """The same likeness asked from B's side: one that is given need not be symmetric."""
    return lambda x, rows: likeness(rows, x).T


def _finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass over memory."""
    return all(bool(torch.isfinite(x)) for x in values.aminmax())


def _given(likeness: Likeness) -> Likeness:
    """A user's score, with what it returns looked at: the shape, every number finite, and a float on a
    device with float64.
    """

    def ask(x: Tensor, rows: Tensor) -> Tensor:
        scores = likeness(x, rows).detach()
        if scores.shape != (len(x), len(rows)):
            raise ValueError(
                f"the score gave {tuple(scores.shape)}"
                f" for {len(x)} rows of A and {len(rows)} of B: one for each pair is wanted"
            )
        if not _finite(scores):
            raise ValueError("a score is NaN or infinite: every row of A must have a finite one with every row of B")
        scores = _on(scores, scores.device)
        return scores if scores.dtype in (torch.float32, torch.float64) else scores.double()

    return ask


Edges = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows, columns and scores (edges,), each pair once, sorted by row


def _candidates(A: Tensor, B: Tensor, k: int, rows: int, likeness: Likeness = product) -> Edges:
    """The k nearest of each row and of each column."""
    found = []
    other_way = product if likeness is product else _back(likeness)
    for swap, one, other, ask in ((False, A, B, likeness), (True, B, A, other_way)):
        near = [
            scores.topk(min(k, len(other)), dim=1, sorted=False)
            for _, scores in _blocks(one, other, rows, "candidates", ask)
        ]
        indices, values = (torch.cat([getattr(x, name) for x in near]).cpu() for name in ("indices", "values"))
        own = torch.arange(len(one))[:, None].expand_as(indices)
        found.append(
            [x.flatten().numpy() for x in ((indices, own) if swap else (own, indices))]
            + [values.flatten().double().numpy()]
        )
    return _once(*(np.concatenate(x) for x in zip(*found, strict=True)), len(B))


def _once(i: np.ndarray, j: np.ndarray, s: np.ndarray, m: int) -> Edges:
    """The first of each pair's edges."""
    _, first = np.unique(i.astype(np.int64) * m + j, return_index=True)
    return i[first], j[first], s[first]


def _feasible(A: Tensor, B: Tensor, i: np.ndarray, j: np.ndarray, s: np.ndarray, likeness: Likeness = product) -> Edges:
    """The candidates, with every column for the rows that no matching within them can serve: a full
    matching then exists.
    """
    n, m = len(A), len(B)
    graph = csr_matrix((np.ones(len(i)), (i, j)), shape=(n, m))
    alone = np.flatnonzero(maximum_bipartite_matching(graph, perm_type="column") < 0)
    if not len(alone):
        return i, j, s
    scores = likeness(A[torch.from_numpy(alone).to(A.device)], B).double().cpu().numpy()
    every = np.repeat(alone, m), np.tile(np.arange(m), len(alone)), scores.ravel()
    return _once(*(np.concatenate(pair) for pair in zip((i, j, s), every, strict=True)), m)


# --- prices and proof --------------------------------------------------------------------------------------------------


def _cheapest(i: np.ndarray, j: np.ndarray, c: np.ndarray, n: int, m: int) -> np.ndarray:
    """The column of each of n rows in the cheapest full matching, costs c >= 0.

    scipy's solver bids for columns first if there are as many as rows. That is fast, but on costs that
    differ by rounding only it need not end; with one column more it goes by shortest paths alone.
    """
    row, column = min_weight_full_bipartite_matching(csr_matrix((np.maximum(c, LEAST), (i, j)), shape=(n, m)))
    out = np.empty(n, np.int64)
    out[row] = column
    return out


def _above_best(i: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Costs less the least of their row: the same assignment is cheapest, at any offset of the costs."""
    starts = np.flatnonzero(np.r_[True, i[1:] != i[:-1]])
    return c - np.minimum.reduceat(c, starts)[i]


def _solve(
    i: np.ndarray, j: np.ndarray, s: np.ndarray, n: int, m: int, exact: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The column of each row (n,) in the best full matching of the candidates, and prices (m,) (n <= m).

    Large square problems are solved on a grid of whole numbers first; if `exact`, what those prices leave
    is then solved as it is.
    """
    c, v = _above_best(i, -s), np.zeros(m)
    if n == m and n * m > SMALL and c.any():
        step = c.max() / GRID
        whole = np.rint(c / step)
        column_of = _cheapest(i, j, whole, n, m)
        v = _prices(i, j, whole, column_of, m) * step
        if not exact:
            return column_of, v
        c = _above_best(i, c - v[j])
    column_of = _cheapest(i, j, c, n, m + (n == m))
    return column_of, v + _prices(i, j, c, column_of, m)


def _prices(i: np.ndarray, j: np.ndarray, c: np.ndarray, column_of: np.ndarray, m: int) -> np.ndarray:
    """Dual prices v (m,) <= 0 of the columns: c_ij - v_j >= c_i,match(i) - v_match(i) on all candidate
    edges.

    Shortest paths on the residual graph (Bellman-Ford, all edges at once): v_j <= v_match(i) + c_ij -
    c_i,match(i). No path is shorter than minus the matched costs' sum, to whose rounding the prices are
    found.
    """
    order = np.lexsort((i, j))
    i, j, c = i[order], j[order], c[order]
    starts = np.flatnonzero(np.r_[True, j[1:] != j[:-1]])
    touched = j[starts]
    own = np.empty(len(column_of))
    matched = j == column_of[i]
    own[i[matched]] = c[matched]
    slack, rounding = c - own[i], own.sum() * 2.0**-48
    v = np.zeros(m)
    for _ in range(len(column_of) + 1):
        reach = np.minimum.reduceat(v[column_of][i] + slack, starts)
        new = np.minimum(v[touched], reach)
        if (new >= v[touched] - rounding).all():
            break
        v[touched] = new
    return v


# Rows i of A, rows j of B (pairs,) -> their cosines in float64.
Cosines = Callable[[Tensor, Tensor], Tensor]


class _Seen(NamedTuple):
    """What a pass over all pairs shows of an assignment and its prices.

    `edges`: the matched ones, then those that beat them. `scores` (n,): the matched pairs', as given.
    `slack` (n,): by how much each row's best pair beats its own. `rounding` of all slacks together.
    """

    edges: Edges
    scores: np.ndarray
    slack: np.ndarray
    rounding: float


def _check(
    A: Tensor,
    B: Tensor,
    column_of: np.ndarray,
    v: np.ndarray,
    rows: int,
    most: int = 64,
    likeness: Likeness = product,
    shift: float = 0.0,
    again: Cosines | None = None,
) -> _Seen:
    """Every pair against the prices v (m,); of those that beat the match at most `most` edges a row. Scores
    of edges are less `shift`.

    `again`: A and B are unit rows in float32, their cosines rounded, and this gives a pair's in float64.
    """
    high, rounding = float(np.abs(v).max()), 0.0
    found, scores_of, slack_of = [], [], []
    for first, scores in _blocks(A, B, rows, "certificate", likeness):
        at = torch.arange(first, first + len(scores), device=scores.device)
        column = torch.from_numpy(column_of[first : first + len(scores)]).to(scores.device)
        price = torch.from_numpy(v).to(scores.device)
        if again:
            matched = again(at, column)
            own = matched + price[column]
            raised = scores.add_(price.float())  # bound by memory: in place
            best = _best(raised, own, column, price, at, again, 2.0**-24 * (A.shape[1] + 4 + 4 * high))
            tolerance = torch.full_like(own, TOLERANCE)
        else:
            matched = scores.gather(1, column[:, None])[:, 0].double()
            own = matched - shift + price[column]
            raised = (scores.double() - shift).add_(price)
            best = raised.amax(1)
            tolerance = 1e-13 * (own.abs() + best.abs() + price[column].abs())
        slack = (best - own).clamp_min(0.0)
        rounding += 4 * EPS * float((own.abs() + best.abs() + 2 * high).sum())
        scores_of.append(matched)
        slack_of.append(slack)
        found.append((at, column, matched - shift))
        bad = (slack > tolerance).nonzero()[:, 0]
        if len(bad):
            near = raised[bad].double().topk(min(most, raised.shape[1]), dim=1)
            keep = near.values - own[bad, None] > tolerance[bad, None]
            j = near.indices[keep]
            found.append((at[bad, None].expand_as(keep)[keep], j, near.values[keep] - price[j]))
    edges = tuple(torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))
    return _Seen(edges, *(torch.cat(part).cpu().numpy() for part in (scores_of, slack_of)), rounding)


def _best(raised: Tensor, own: Tensor, column: Tensor, price: Tensor, at: Tensor, again: Cosines, off: float) -> Tensor:
    """Each row's largest cosine + price in float64, found among the pairs that are in question where
    `raised` is off by `off` at most.

    `own` is that of the matched `column`. Infinite if too many are in question: then all had better be
    computed in float64.
    """
    found = _near(raised, 2 * off, raised.numel() // 64 + 64 * len(raised))
    if found is None:
        return torch.full_like(own, math.inf)
    row, j = (x[found[1] != column[found[0]]] for x in found)
    return own.scatter_reduce(0, row, again(at[row], j) + price[j], "amax")


def _near(values: Tensor, within: float, most: int) -> tuple[Tensor, Tensor] | None:
    """(row, column) of all values within so much of their row's largest; None if more than `most`.

    One pass over memory: the largest of every 64 columns, and then only those 64 that hold one.
    """
    whole = values.shape[1] // 64 * 64
    tops = [values[:, :whole].unflatten(1, (-1, 64)).amax(2)] if whole else []
    if whole < values.shape[1]:
        tops.append(values[:, whole:].amax(1, keepdim=True))
    groups = torch.cat(tops, 1)
    least = groups.amax(1) - within
    row, group = (groups >= least[:, None]).nonzero(as_tuple=True)
    if len(row) > most:
        return None
    column = group[:, None] * 64 + torch.arange(64, device=values.device)
    inside, column = column < values.shape[1], column.clamp_max(values.shape[1] - 1)
    keep = inside & (values[row[:, None], column] >= least[row, None])
    if int(keep.count_nonzero()) > most:
        return None
    return row[:, None].expand_as(keep)[keep], column[keep]


class _Found(NamedTuple):
    """The column of each row (n,), the pairs' scores (n,) float64, and the certificate's part of a `Match`."""

    column_of: np.ndarray
    scores: np.ndarray
    violation: float
    gap: float
    edges: int
    rounds: int


def _optimal(
    A: Tensor,
    B: Tensor,
    k: int,
    block: int,
    rounds: int,
    likeness: Likeness = product,
    again: Cosines | None = None,
    off: float = 0.0,
) -> _Found:
    """The best assignment of n rows to m >= n. Scores are off by `off` at most, as given to float64 or by `again`."""
    n, m = len(A), len(B)
    i, j, s = _feasible(A, B, *_candidates(A, B, k, block, likeness), likeness)
    shift = 0.0 if again else float(s.max())
    if not math.isfinite(4.0 * n * (shift - float(s.min()))):
        raise ValueError("the scores or costs lie so far apart that their sum overflows: divide them by a constant")
    s = s - shift
    done = 0
    while True:
        done += 1
        column_of, v = _solve(i, j, s, n, m, exact=again is None)
        # Each round may add four times as many edges a row: a few at a time took dozens of rounds.
        seen = _check(A, B, column_of, v, block, 64 * 4 ** (done - 1), likeness, shift, again)
        new = _once(*(np.concatenate(pair) for pair in zip(seen.edges, (i, j, s), strict=True)), m)
        settled = len(new[0]) == len(i) and np.array_equal(new[2], s)  # what is left is rounding, and in the gap
        violation = float(seen.slack.max())
        if len(seen.edges[0]) == n or settled or math.isinf(violation):
            break
        if done == rounds:
            raise RuntimeError(
                f"no proof of optimality after {rounds} rounds (violation {violation:.1e}): raise k or rounds"
            )
        i, j, s = new
    free = np.ones(m, bool)
    free[column_of] = False
    gap = math.fsum(seen.slack) - math.fsum(v[free]) + seen.rounding + 2 * n * off
    return _Found(column_of, seen.scores, violation, gap, len(i), done)


def _by_cosine(A: Tensor, B: Tensor, k: int, block: int, rounds: int) -> _Found:
    """The best assignment by cosine. Many pairs are compared in float32 first, and in float64 if that
    leaves too wide a gap.
    """
    A, B = _moderate(A), _moderate(B)
    lengths, off = (_lengths(A), _lengths(B)), (A.shape[1] + 4) * EPS

    def again(i: Tensor, j: Tensor) -> Tensor:
        parts = zip(i.split(PART), j.split(PART), strict=True)
        dots = torch.cat([torch.linalg.vecdot(A[x].double(), B[y].double()) for x, y in parts])
        return dots / (lengths[0][i] * lengths[1][j])

    if len(A) * len(B) > SMALL and _full_float32(A.device):
        units = [_units(rows, length, torch.float32) for rows, length in zip((A, B), lengths, strict=True)]
        found = _optimal(*units, k, block, rounds, again=again, off=off)
        if found.gap <= CLOSE * math.fsum(1 - found.scores):
            return found
    return _optimal(*(_units(*pair) for pair in zip((A, B), lengths, strict=True)), k, block, rounds, off=off)


def _full_float32(device: torch.device) -> bool:
    """Whether products of float32 are that, and not TF32 or bfloat16, which torch can be told to use for them."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("none", "ieee")


def match(
    A: Tensor,
    B: Tensor,
    k: int = 64,
    block: int = 2048,
    device: str | torch.device = "cpu",
    rounds: int = 20,
    score: Likeness | None = None,
) -> Match:
    """The one-to-one assignment of A's rows (n, d) to B's (m, d) with the greatest summed cosine, and its
    certificate.

    `score` in place of the cosine: a function of rows of A, as they are given, and all of B, to (rows, m);
    larger is more alike.

    `k`: nearest rows of either side that start as candidates; `block`: rows of cosines held at once. If n
    and m differ the larger side has rows left over. Ties and duplicate rows are broken somehow; the total
    is the optimum, to `gap`. ValueError for rows or scores that are not finite, RuntimeError if no proof is
    found within `rounds`.
    """
    return _match(A, B, 1.0, k, block, device, rounds, score)


def _match(
    A: Tensor,
    B: Tensor,
    free: float,
    k: int = 64,
    block: int = 2048,
    device: str | torch.device = "cpu",
    rounds: int = 20,
    score: Likeness | None = None,
) -> Match:
    """`match`; a pair costs `free` - score."""
    began = time.perf_counter()
    for rows in (A, B):
        if not rows.ndim or not len(rows):
            raise ValueError(f"rows of shape {tuple(rows.shape)} were given; (rows, d) with one row or more is wanted")
    if A.ndim == 2 and B.ndim == 2 and A.shape[1] != B.shape[1]:
        raise ValueError(
            f"dictionaries of width {A.shape[1]} and {B.shape[1]} were given: map one into the other's space first"
        )
    if min(k, block, rounds) < 1:
        raise ValueError(f"k = {k}, block = {block}, rounds = {rounds} given; each must be at least 1")
    if len(A) > len(B):
        return turned(_match(B, A, free, k, block, device, rounds, score and _back(score)))
    dtype = torch.float32
    if score:
        one, other, likeness = A.to(device), B.to(device), _given(score)
        dtype = likeness(one[:1], other).dtype
        found = _optimal(one, other, k, block, rounds, likeness)
    else:
        found = _by_cosine(_on(A, device), _on(B, device), k, block, rounds)
    partner = torch.from_numpy(found.column_of)
    back = torch.full((len(B),), -1, dtype=torch.long)
    back[partner] = torch.arange(len(A))
    costs = free - found.scores
    scores = torch.from_numpy(found.scores + (1 - free)).to(dtype)
    gap = found.gap + 16 * EPS * float(np.abs(costs).sum())
    certificate = math.fsum(costs), found.violation, gap, found.edges, found.rounds
    return Match(partner, back, scores, *certificate, time.perf_counter() - began)


def match_costs(costs: Tensor, **how: Any) -> Match:
    """The assignment of least total cost for a matrix of costs (n, m), with its certificate; `score` there
    is 1 - cost. `how` as for `match`. Costs are taken as they are, in float64. ValueError if one is not
    finite. For costs that come from rows give `match` the rows and a score: the matrix need then not
    exist.
    """
    costs = torch.as_tensor(costs).detach()
    if costs.ndim != 2 or not costs.numel() or costs.is_complex():
        raise ValueError(
            f"costs of shape {tuple(costs.shape)} and {costs.dtype} were given; "
            "real ones (n, m) with one row or more are wanted"
        )
    if not _finite(costs):
        count = int((~torch.isfinite(costs)).sum())
        raise ValueError(
            f"{count} of {costs.numel()} costs are NaN or infinite: "
            "give every pair a finite one, a large one if it must not be"
        )

    def score(x: Tensor, y: Tensor) -> Tensor:
        part = costs
        for dim, rows in enumerate((x, y)):
            if len(rows) < costs.shape[dim]:  # else all of them, in order
                part = part.index_select(dim, rows[:, 0].to(costs.device))
        part = part.to(x.device)
        return -(part if part.dtype in (torch.float32, torch.float64) else part.double())

    return _match(*(torch.arange(n)[:, None] for n in costs.shape), 0.0, score=score, **how)


# --- the cheaper ways, and what to hold a match against ----------------------------------------------------------------


class Nearest(NamedTuple):
    """Each row of A with its nearest in B, which several may share: `B_for_A` (n,), `cosine` (n,);
    `collisions`, the share of A's rows whose choice another row shares; `mutual` (n,) bool: rows that
    are also the nearest of their nearest.
    """

    B_for_A: Tensor
    cosine: Tensor
    collisions: float
    mutual: Tensor


def nearest(A: Tensor, B: Tensor, block: int = 2048, device: str | torch.device = "cpu") -> Nearest:
    """Arg-max matching of A's rows (n, d) to B's (m, d) by cosine: no assignment, as collisions show."""
    one, other = unit_rows(A, device), unit_rows(B, device)
    partner, cosine = [], []
    best, back = (
        torch.full((len(other),), -2.0, device=other.device),
        torch.zeros(len(other), dtype=torch.long, device=other.device),
    )
    for first, cosines in _blocks(one, other, block, "nearest"):
        row, column = cosines.max(1), cosines.max(0)
        partner.append(row.indices), cosine.append(row.values)
        better = column.values > best
        best, back = torch.where(better, column.values, best), torch.where(better, column.indices + first, back)
    chosen = torch.cat(partner)
    shared = torch.bincount(chosen, minlength=len(other))[chosen] > 1
    mutual = back[chosen] == torch.arange(len(one), device=chosen.device)
    return Nearest(chosen.cpu(), torch.cat(cosine).cpu(), float(shared.double().mean()), mutual.cpu())


def greedy(A: Tensor, B: Tensor, block: int = 2048, device: str | torch.device = "cpu") -> Tensor:
    """B_for_A (n,), -1 for a row left over: pairs taken by falling cosine, each row once.

    Found as the mutual nearest among the rows still free, again and again: the same pairs, since the best
    pair of all is mutual, and so is every pair that no better one touches.
    """
    out = torch.full((len(A),), -1, dtype=torch.long)
    rows, columns = torch.arange(len(A)), torch.arange(len(B))
    while len(rows) and len(columns):
        found = nearest(A[rows], B[columns], block, device)
        chosen = found.B_for_A[found.mutual]
        out[rows[found.mutual]] = columns[chosen]
        rows = rows[~found.mutual]
        left = torch.ones(len(columns), dtype=torch.bool)
        left[chosen] = False
        columns = columns[left]
    return out


def agreement(one: Match, other: Match) -> float:
    """Share of A's rows to which two matches of the same dictionaries (by decoder and by encoder, say) give
    the same partner.
    """
    if len(one.B_for_A) != len(other.B_for_A) or len(one.A_for_B) != len(other.A_for_B):
        raise ValueError(
            f"matches of {len(one.B_for_A)} x {len(one.A_for_B)} and {len(other.B_for_A)} x {len(other.A_for_B)} rows were given: they "
            "are not of the same two dictionaries"
        )
    return float((one.B_for_A == other.B_for_A).double().mean())


def cycle_consistency(A_to_B: Match, B_to_C: Match, C_to_A: Match) -> float:
    """Share of A's rows that come back to themselves through B and C; a row left over on the way does not."""
    at = torch.arange(len(A_to_B.B_for_A))
    for step in (A_to_B, B_to_C, C_to_A):
        at = torch.where(at >= 0, step.B_for_A[at.clamp_min(0)], -1)
    return float((at == torch.arange(len(at))).double().mean())


def references(A: Tensor, B: Tensor, seed: int = 0, **how: Any) -> dict[str, Match]:
    """What a match of A to B is read against: A to its own rows in another order (must be 1), to B's rows
    turned by a random rotation (as coherent as B, without its meaning), and to as many random rows.
    `how` as for `match`.

    The ceiling, a second seed's dictionary of the same model, is a match like any other.
    """
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(B.shape[1], B.shape[1], generator=g)).Q.to(B)
    return {
        "own rows, permuted": match(A, A[torch.randperm(len(A), generator=g).to(A.device)], **how),
        "rotated": match(A, B.detach() @ turn, **how),
        "random": match(A, torch.randn(B.shape, generator=g), **how),
    }


class Scaling(NamedTuple):
    """How much of each latent is in the activations it was encoded from, `own`, and in the `other` model's
    for the same tokens; each (latents,) float64, NaN for a latent that never fires. other / own is near
    1 for a shared latent, near 0 for one the other lacks.
    """

    own: Tensor
    other: Tensor


def latent_scaling(sae: Dictionary, own: Tensor, other: Tensor, batch: int = 4096) -> Scaling:
    """Latent scaling (Minder et al. 2025, arXiv:2504.02922): for a latent with codes f (tokens,) on `own`
    activations (tokens, d_model) and decoder row d, the beta that makes |beta f d - Y|^2 least, once for
    each model.

    Y is a model's activations less what all *other* latents reconstruct of `own`. Closed form beta = d.(Y^T
    f) / (|f|^2 |d|^2); with Y = rest + f d that is 1 + d.(rest^T f) / (|f|^2 |d|^2), rest the activations
    less the whole reconstruction.
    """
    if own.shape != other.shape:
        raise ValueError(
            f"activations {tuple(own.shape)} and {tuple(other.shape)} were given; the same tokens are wanted"
        )
    rows = decompose.rows_of(sae).double().cpu()
    batch = max(min(batch, (1 << 27) // len(rows)), 1)  # codes of a very wide SAE: half a gigabyte at once
    sums, power = (
        [torch.zeros(len(rows), dtype=torch.float64) for _ in range(2)],
        torch.zeros(len(rows), dtype=torch.float64),
    )
    for first in tqdm(range(0, len(own), batch), desc="latent scaling", leave=False):
        part = slice(first, first + batch)
        codes = decompose.codes_of(sae, own[part])
        with torch.no_grad():
            reconstruction = sae.decode(codes).float().cpu()
        codes = codes.cpu()
        power += codes.double().square().sum(0)
        for total, acts in zip(sums, (own, other), strict=True):
            total += ((codes.T @ (acts[part].float().cpu() - reconstruction)).double() * rows).sum(1)
    power *= rows.square().sum(1)
    return Scaling(*(torch.where(power > 0, 1 + total / power, torch.nan) for total in sums))


class Side(NamedTuple):
    """What is compared of one dictionary's latents: encoder norms and the share of tokens each fired on;
    each (latents,).
    """

    encoder_norms: Tensor
    frequency: Tensor


def side(sae: Dictionary, frequency: Tensor) -> Side:
    """The side of an SAE, encoder norms in units of the largest, as source 002 takes them."""
    norms = sae.W_enc.detach().double().cpu().norm(dim=0)
    return Side(norms / norms.max(), frequency.double())


def only_in_B(found: Match, A: Side, B: Side, scaling: Scaling, least: float = 1e-4) -> dict[str, Tensor]:
    """How much each latent of B looks as if A had none like it, by five measures; {name: (m,)}, larger is
    more, NaN where unmatched.

    encoder norm: B's less its partner's in A. encoder norm, wrong way: the same with the permutation
    applied backwards, as source 002 does (it pairs the latents at random). matched cosine: how unlike it is
    to its partner, -cosine. frequency: log of the ratio of firing shares, each raised by `least`. latent
    scaling: -(other / own), with B's codes.
    """

    def of_partner(values: Tensor, partner: Tensor) -> Tensor:
        return torch.where(partner >= 0, values.double()[partner.clamp_min(0)], torch.nan)

    score = turned(found).score.double()
    backwards = found.B_for_A[: len(found.A_for_B)]
    wrong = torch.full_like(score, torch.nan)
    wrong[: len(backwards)] = B.encoder_norms[: len(backwards)] - of_partner(
        A.encoder_norms, backwards.clamp_max(len(A.frequency) - 1)
    )
    return {
        "encoder norm": B.encoder_norms - of_partner(A.encoder_norms, found.A_for_B),
        "encoder norm, wrong way": wrong,
        "matched cosine": -score,
        "frequency": torch.log((B.frequency + least) / (of_partner(A.frequency, found.A_for_B) + least)),
        "latent scaling": -(scaling.other / scaling.own),
    }


def turned(found: Match) -> Match:
    """The same match with A and B exchanged."""
    score = torch.full((len(found.A_for_B),), torch.nan, dtype=found.score.dtype)
    matched = found.A_for_B >= 0
    score[matched] = found.score[found.A_for_B[matched]]
    return found._replace(B_for_A=found.A_for_B, A_for_B=found.B_for_A, score=score)
