"""One-to-one matching of two dictionaries' rows: optimal with a proof, and the cheaper ways beside it.

Pure: tensors in, tensors out. `match` finds the assignment of least total cost (1 - cosine): it solves on
candidate edges, the nearest few of each row and column (scipy's sparse Jonker-Volgenant), takes prices from
shortest paths on them, and asks *every* pair, block by block, whether it would beat them. Pairs that do join
the candidates until there are none: by linear-programming duality the assignment is then optimal (Burkard,
Dell'Amico & Martello 2009, ch. 4). Whatever the prices are, they bound the optimum, so `gap` holds for any
costs; it counts the rounding of float64. All cosines are held if they fit, and computed block by block, once
for the candidates and once a proof, if not. Large dictionaries are compared in float32, and every pair that
this rounding could hide is computed again in float64. Another score than the cosine, or a matrix of costs,
may be given. Direction, by construction: row i of A goes with row `B_for_A[i]` of B.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching, min_weight_full_bipartite_matching
from torch import Tensor
from tqdm import tqdm

from helpers.sae import decompose
from helpers.sae.topk import Dictionary, product

TOLERANCE = 2e-6  # of a cosine in float32: its rounding is about 1e-7 times the root of the rows' length
CLOSE = 1e-5  # of the total: a larger gap is not left to float32
SMALL = 512 * 512  # pairs that are compared in float64 from the start
# Steps between a row's best and worst candidate in scipy's fast solver, which can loop forever on finer ones.
GRID = 2.0**26
LEAST = np.nextafter(0, 1)  # for a cost of zero, which scipy would drop
EPS = np.finfo(float).eps
PART = 512  # rows that go through float64 at once
CHUNK = 2**21  # numbers that a pass works on at once: they stay in the cache
GROUP = 64  # columns of which only the largest is looked at first
HELD = 2**28  # cosines that are held at once: 1 GB in float32


# Rows (r, ...) of A and all of B (m, ...) -> (r, m), larger is more alike.
Likeness = Callable[[Tensor, Tensor], Tensor]
# Rows of A, a slice or indices -> their scores (rows, m) with all of B.
Scores = Callable[[slice | Tensor], Tensor]


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
    """Rows or scores on the device, or on the CPU if it has no float64 (mps); whole numbers in float64, less
    than float32 in float32.
    """
    rows = rows.detach().to("cpu" if torch.device(device).type == "mps" else device)
    return rows.float() if rows.is_floating_point() and rows.dtype != torch.float64 else rows.double()


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


def _blocks(scores_of: Scores, n: int, block: int, what: str) -> Iterator[tuple[int, Tensor]]:
    """(first row, scores (block, m)), block by block."""
    for first in tqdm(range(0, n, block), desc=what, leave=False):
        yield first, scores_of(slice(first, first + block))


def _finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass over memory."""
    return all(bool(torch.isfinite(x)) for x in values.aminmax())


def _given(scores: Tensor, rows: int, columns: int) -> Tensor:
    """What a user's score returned, looked at: the shape, every number finite, and a float on a device with
    float64.
    """
    if scores.shape != (rows, columns):
        raise ValueError(
            f"the score gave {tuple(scores.shape)} for {rows} rows of A and {columns} of B: one for each pair is wanted"
        )
    if not _finite(scores):
        raise ValueError("a score is NaN or infinite: every row of A must have a finite one with every row of B")
    return _on(scores, scores.device)


Edges = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows, columns, scores (edges,): each once, sorted by row


def _tops(values: Tensor) -> Tensor:
    """The largest of every GROUP columns of each row: (rows, m) to (rows, m / GROUP rounded up)."""
    full = values.shape[1] // GROUP
    whole, rest = values[:, : full * GROUP], values[:, full * GROUP :]
    if values.stride(0) == 1:  # a transposed view: twenty times as fast the way its memory lies
        tops = whole.T.unflatten(0, (full, GROUP)).amax(1).T
    else:
        tops = whole.unflatten(1, (full, GROUP)).amax(2)
    return torch.cat([tops, rest.amax(1, keepdim=True)], 1) if rest.shape[1] else tops


def _columns(groups: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The columns (..., GROUP) of some groups (...), and whether each exists; the last of m where not."""
    columns = groups[..., None] * GROUP + torch.arange(GROUP, device=groups.device)
    return columns.clamp_max(m - 1), columns < m


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns and values, (rows, k) each, of the k largest of each row of values (rows, m), in the k groups
    with the largest tops.
    """
    m, found = values.shape[1], []
    if m < 4 * GROUP * k:
        best = values.contiguous().topk(min(k, m), dim=1, sorted=False)
        return best.indices, best.values
    few = max(CHUNK // (GROUP * k), 1)
    for part, tops in zip(values.split(few), _tops(values).split(few), strict=True):
        columns, inside = (x.flatten(1) for x in _columns(tops.topk(k, dim=1, sorted=False).indices, m))
        best = part.gather(1, columns).masked_fill_(~inside, -math.inf).topk(k, dim=1, sorted=False)
        found.append((columns.gather(1, best.indices), best.values))
    indices, largest = zip(*found, strict=True)
    return torch.cat(indices), torch.cat(largest)


def _candidates(scores_of: Scores, n: int, m: int, k: int, block: int) -> Edges:
    """The k nearest of each row and of each column, in one pass."""
    found, rows, values = [], torch.empty(m, 0, dtype=torch.long), torch.empty(m, 0)
    for first, scores in _blocks(scores_of, n, block, "candidates"):
        columns, best = _largest(scores, k)
        own = torch.arange(first, first + len(scores), device=scores.device)
        found.append((own[:, None].expand_as(columns), columns, best))
        near = _largest(scores.T, k)
        rows, values = (
            torch.cat(x, 1) for x in ((rows.to(own.device), near[0] + first), (values.to(own.device), near[1]))
        )
        values, kept = values.topk(min(k, values.shape[1]), dim=1, sorted=False)
        rows = rows.gather(1, kept)
    found.append((rows, torch.arange(m, device=rows.device)[:, None].expand_as(rows), values))
    i, j, s = (torch.cat([x.flatten() for x in part]).cpu().numpy() for part in zip(*found, strict=True))
    return _once((i, j, s.astype(float)), m)


def _joined(one: Edges, other: Edges) -> Edges:
    (i, j, s), (k, l, t) = one, other
    return np.concatenate((i, k)), np.concatenate((j, l)), np.concatenate((s, t))


def _once(edges: Edges, m: int) -> Edges:
    """The first of each pair's edges."""
    i, j, s = edges
    _, first = np.unique(i.astype(np.int64) * m + j, return_index=True)
    return i[first], j[first], s[first]


def _feasible(scores_of: Scores, n: int, m: int, i: np.ndarray, j: np.ndarray, s: np.ndarray) -> Edges:
    """The candidates, with every column for the rows that no matching within them can serve: a full
    matching then exists.
    """
    graph = csr_matrix((np.ones(len(i)), (i, j)), shape=(n, m))
    alone = np.flatnonzero(maximum_bipartite_matching(graph, perm_type="column") < 0)
    if not len(alone):
        return i, j, s
    scores = scores_of(torch.from_numpy(alone)).double().cpu().numpy()
    every = np.repeat(alone, m), np.tile(np.arange(m), len(alone)), scores.ravel()
    return _once(_joined((i, j, s), every), m)


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

    Shortest paths on the residual graph (Bellman-Ford): v_j <= v_match(i) + c_ij - c_i,match(i). Only rows
    whose price fell are looked at again. No path is shorter than minus the matched costs' sum, to whose
    rounding the prices are found.
    """
    own, row_of = np.empty(len(column_of)), np.full(m, -1)
    matched = j == column_of[i]
    own[i[matched]] = c[matched]
    row_of[column_of] = np.arange(len(column_of))
    slack, rounding = c - own[i], own.sum() * 2.0**-48
    v, again = np.zeros(m), np.ones(len(column_of), bool)
    for _ in range(len(column_of) + 1):
        edges = np.flatnonzero(again[i])
        new = v.copy()
        np.minimum.at(new, j[edges], v[column_of[i[edges]]] + slack[edges])
        fell = row_of[new < v - rounding]
        v = new
        again[:] = False
        again[fell[fell >= 0]] = True
        if not again.any():
            break
    return v


# Rows i of A, rows j of B (pairs,) -> their cosines in float64.
Cosines = Callable[[Tensor, Tensor], Tensor]


class _Seen(NamedTuple):
    """What a pass over all pairs shows of an assignment and its prices.

    `edges`: the matched ones, then those that beat them. `scores` (n,): the matched pairs', as given.
    `slack` (n,): by how much each row's best pair beats its own, infinite where that was left open.
    `rounding` of all slacks together.
    """

    edges: Edges
    scores: np.ndarray
    slack: np.ndarray
    rounding: float


def _check(
    scores_of: Scores,
    column_of: np.ndarray,
    v: np.ndarray,
    block: int,
    most: int = 64,
    shift: float = 0.0,
    off: float = 0.0,
    again: Cosines | None = None,
) -> _Seen:
    """Every pair against the prices v (m,); of those that beat the match at most `most` edges a row. Scores
    of edges are less `shift`.

    `again`: the scores are cosines of unit rows in float32, and this gives a pair's in float64, off by
    `off` at most. Once a pair beats the match the slack is left open: prices will change anyway.
    """
    high, rounding, beaten = float(np.abs(v).max()), 0.0, False
    found, matched_of, slack_of = [], [], []
    for first, scores in _blocks(scores_of, len(column_of), block, "certificate"):
        at = torch.arange(first, first + len(scores), device=scores.device)
        column = torch.from_numpy(column_of[first : first + len(scores)]).to(scores.device)
        exact = torch.from_numpy(v).to(scores.device)
        price = exact.float() if again else exact
        matched = scores.gather(1, column[:, None])[:, 0]
        own = _raised(matched, price[column], shift)
        parts = scores.split(max(CHUNK // len(v), 1))
        tops = torch.cat([_tops(_raised(part, price, shift)) for part in parts])
        best = tops.amax(1)
        tolerance = 1e-13 * (own.abs() + best.abs() + price[column].abs())
        if again:
            tolerance = torch.full_like(own, TOLERANCE)
        found.append((at, column, matched.double() - shift))
        bad = (best - own > tolerance).nonzero()[:, 0]
        if len(bad):
            beaten = True
            near = _raised(scores[bad], price, shift).topk(min(most, len(v)), dim=1)
            row, place = (near.values - own[bad, None] > tolerance[bad, None]).nonzero(as_tuple=True)
            row, j = bad[row], near.indices[row, place]
            found.append((at[row], j, scores[row, j].double() - shift))
        if again and beaten:
            best = torch.full_like(best, math.inf)
        elif again:
            within = 2.0**29 * (off + 4 * EPS * high)
            matched, own, best = _exactly(_near(scores, price, tops, within), at, column, exact, again)
        rounding += 4 * EPS * float((own.abs() + best.abs() + 2 * high).sum())
        matched_of.append(matched.double())
        slack_of.append((best - own).double().clamp_min(0.0))
    rows, columns, values = (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))
    return _Seen(
        (rows, columns, values), torch.cat(matched_of).cpu().numpy(), torch.cat(slack_of).cpu().numpy(), rounding
    )


def _raised(scores: Tensor, price: Tensor, shift: float) -> Tensor:
    """Scores less `shift`, and prices, in the prices' dtype."""
    return (scores.to(price.dtype) - shift).add_(price)


def _exactly(
    near: tuple[Tensor, Tensor] | None, at: Tensor, column: Tensor, price: Tensor, again: Cosines
) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, of some rows `at`: the scores of the matched `column`, those + price, and the largest score
    + price, which is among the `near` pairs; infinite if those are too many.
    """
    matched = again(at, column)
    own = matched + price[column]
    if near is None:
        return matched, own, torch.full_like(own, math.inf)
    row, j = (x[near[1] != column[near[0]]] for x in near)
    return matched, own, own.scatter_reduce(0, row, again(at[row], j) + price[j], "amax")


def _near(scores: Tensor, price: Tensor, tops: Tensor, within: float) -> tuple[Tensor, Tensor] | None:
    """(row, column) of all scores + price within so much of their row's largest; `tops` are theirs. None if
    there are so many that all had better be computed in float64.
    """
    most, least = len(scores) * (scores.shape[1] // 64 + 64), tops.amax(1) - within
    row, group = (tops >= least[:, None]).nonzero(as_tuple=True)
    if len(row) > most:
        return None
    column, inside = _columns(group, scores.shape[1])
    keep = inside & (scores[row[:, None], column] + price[column] >= least[row, None])
    if int(keep.count_nonzero()) > most:
        return None
    return row[:, None].expand_as(keep)[keep], column[keep]


def _optimal(
    scores_of: Scores,
    n: int,
    m: int,
    k: int,
    block: int,
    rounds: int,
    free: float = 1.0,
    off: float = 0.0,
    again: Cosines | None = None,
    at_once: int = 0,
) -> Match:
    """The best assignment of n rows to m >= n; a pair costs `free` - score. Scores are off by `off` at most,
    as given to float64 or by `again`; `at_once` rows of them can be had, `block` if not said.
    """
    if min(k, block, rounds) < 1:
        raise ValueError(f"k = {k}, block = {block}, rounds = {rounds} given; each must be at least 1")
    began = time.perf_counter()
    i, j, s = _feasible(scores_of, n, m, *_candidates(scores_of, n, m, k, at_once or block))
    shift = 0.0 if again else float(s.max())
    if not math.isfinite(4.0 * n * (shift - float(s.min()))):
        raise ValueError("the scores or costs lie so far apart that their sum overflows: divide them by a constant")
    s = s - shift
    done = 0
    while True:
        done += 1
        column_of, v = _solve(i, j, s, n, m, exact=again is None)
        # Each round may add four times as many edges a row: a few at a time took dozens of rounds.
        seen = _check(scores_of, column_of, v, block, 64 * 4 ** (done - 1), shift, off, again)
        new = _once(_joined(seen.edges, (i, j, s)), m)
        settled = len(new[0]) == len(i) and np.array_equal(new[2], s)  # what is left is rounding, and in the gap
        violation = float(seen.slack.max())
        if len(seen.edges[0]) == n or settled:
            break
        if done == rounds:
            raise RuntimeError(
                f"no proof of optimality after {rounds} rounds, {len(seen.edges[0]) - n} pairs would still be "
                "cheaper: raise k or rounds"
            )
        i, j, s = new
    alone = np.ones(m, bool)
    alone[column_of] = False
    costs = free - seen.scores
    gap = math.fsum(seen.slack) - math.fsum(v[alone]) + seen.rounding + 2 * n * off
    gap += 16 * EPS * float(np.abs(costs).sum())
    partner, back = torch.from_numpy(column_of), torch.full((m,), -1, dtype=torch.long)
    back[partner] = torch.arange(n)
    score = torch.from_numpy(seen.scores + (1 - free)).to(scores_of(slice(1)).dtype)
    seconds = time.perf_counter() - began
    return Match(partner, back, score, math.fsum(costs), violation, gap, len(i), done, seconds)


def _by_cosine(A: Tensor, B: Tensor, k: int, block: int, rounds: int) -> Match:
    """The best assignment by cosine. Many pairs are compared in float32 first, and in float64 if that
    leaves too wide a gap.
    """
    n, m, A, B = len(A), len(B), _moderate(A), _moderate(B)
    lengths, off = (_lengths(A), _lengths(B)), (A.shape[1] + 4) * EPS

    def again(i: Tensor, j: Tensor) -> Tensor:
        parts = zip(i.split(PART), j.split(PART), strict=True)
        dots = torch.cat([torch.linalg.vecdot(A[x].double(), B[y].double()) for x, y in parts])
        return dots / (lengths[0][i] * lengths[1][j])

    def found_in(dtype: torch.dtype, again: Cosines | None = None) -> Match:
        one, other = (_units(*pair, dtype) for pair in zip((A, B), lengths, strict=True))
        if n * m > HELD:
            return _optimal(lambda rows: product(one[rows], other), n, m, k, block, rounds, 1.0, off, again)
        return _optimal(product(one, other).__getitem__, n, m, k, block, rounds, 1.0, off, again, at_once=n)

    if n * m > SMALL and _full_float32(A.device):
        found = found_in(torch.float32, again)
        if found.gap <= CLOSE * found.total:
            return found
    found = found_in(torch.float64)
    return found._replace(score=found.score.float())


def _full_float32(device: torch.device) -> bool:
    """Whether products of float32 are that, and not TF32 or bfloat16, which torch can be told to use for them."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("none", "ieee")


def match(
    A: Tensor,
    B: Tensor,
    k: int = 32,
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
    began = time.perf_counter()
    for rows in (A, B):
        if not rows.ndim or not len(rows):
            raise ValueError(f"rows of shape {tuple(rows.shape)} were given; (rows, d) with one row or more is wanted")
    if A.ndim == 2 and B.ndim == 2 and A.shape[1] != B.shape[1]:
        raise ValueError(
            f"dictionaries of width {A.shape[1]} and {B.shape[1]} were given: map one into the other's space first"
        )
    if len(A) > len(B):
        back = score and (lambda x, y: score(y, x).T)
        return turned(match(B, A, k, block, device, rounds, back))
    if not score:
        found = _by_cosine(_on(A, device), _on(B, device), k, block, rounds)
        return found._replace(seconds=time.perf_counter() - began)
    one, other = A.to(device), B.to(device)

    def scores_of(rows: slice | Tensor) -> Tensor:
        part = one[rows]
        return _given(score(part, other).detach(), len(part), len(other))

    return _optimal(scores_of, len(A), len(B), k, block, rounds)


def match_costs(
    costs: Tensor, k: int = 32, block: int = 2048, device: str | torch.device = "cpu", rounds: int = 20
) -> Match:
    """The assignment of least total cost for a matrix of costs (n, m), with its certificate; `score` there
    is 1 - cost. `k`, `block`, `rounds` as for `match`. Costs are taken as they are, in float64. ValueError
    if one is not finite. For costs that come from rows give `match` the rows and a score: the matrix need
    then not exist.
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
    n, m = costs.shape
    if n > m:
        return turned(match_costs(costs.T, k, block, device, rounds))

    def scores_of(rows: slice | Tensor) -> Tensor:
        return -_on(costs[rows], device)

    return _optimal(scores_of, n, m, k, block, rounds, free=0.0)


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
    for first, cosines in _blocks(lambda rows: product(one[rows], other), len(one), block, "nearest"):
        row, column = cosines.max(1), cosines.max(0)
        partner.append(row.indices)
        cosine.append(row.values)
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


def facts(A: Tensor, B: Tensor, found: Match, device: str | torch.device = "cpu") -> dict[str, str]:
    """What else there is to say of an optimal match of A to B, in words and numbers: how nearly optimal it is, and what greedy and
    nearest-neighbour matching give in its place."""
    close, taken = nearest(A, B, device=device), greedy(A, B, device=device)
    paired = taken >= 0
    cosine = torch.cosine_similarity(A[paired], B[taken[paired]]).double()
    return {
        "total cost (1 - cosine), and its gap to the best possible": f"{found.total:.0f}, {found.gap:.0e}",
        "a greedy assignment costs more by": f"{float((1 - cosine).sum()) - found.total:.1f}",
        "nearest neighbours that collide": f"{close.collisions:.0%}",
        "nearest neighbours that are mutual": f"{float(close.mutual.double().mean()):.0%}",
    }


class Planted(NamedTuple):
    """A case whose map and match are known: dictionary `A` (latents, d), `B`, which is A turned, in another `order` and three times as
    long, and activations (tokens, d) before and after the turn."""

    A: Tensor
    B: Tensor
    acts: Tensor
    turned: Tensor
    order: Tensor


def planted(latents: int = 60, width: int = 24, tokens: int = 2000, seed: int = 0) -> Planted:
    """A `Planted` case, with a little noise on the rows."""
    g = torch.Generator().manual_seed(seed)
    acts, A = torch.randn(tokens, width, generator=g), torch.randn(latents, width, generator=g)
    turn = torch.linalg.qr(torch.randn(width, width, generator=g)).Q
    order = torch.randperm(latents, generator=g)
    B = 3 * (A @ turn)[order] + 0.05 * torch.randn(latents, width, generator=g)
    return Planted(A, B, acts, acts @ turn, order)


def references(
    A: Tensor, B: Tensor, seed: int = 0, device: str | torch.device = "cpu", block: int = 2048
) -> dict[str, Match]:
    """What a match of A to B is read against: A to its own rows in another order (must be 1), to B's rows
    turned by a random rotation (as coherent as B, without its meaning), and to as many random rows.
    `device` and `block` as for `match`.

    The ceiling, a second seed's dictionary of the same model, is a match like any other.
    """
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(B.shape[1], B.shape[1], generator=g)).Q.to(B)
    return {
        "own rows, permuted": match(A, A[torch.randperm(len(A), generator=g).to(A.device)], device=device, block=block),
        "rotated": match(A, B.detach() @ turn, device=device, block=block),
        "random": match(A, torch.randn(B.shape, generator=g), device=device, block=block),
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

    partner = found.A_for_B
    theirs = torch.where(partner >= 0, A.frequency.double()[partner.clamp_min(0)], torch.nan)
    return {
        "encoder norm": norm_excess(found, A, B),
        "encoder norm, wrong way": norm_excess(found, A, B, backwards=True),
        "matched cosine": -turned(found).score.double(),
        "frequency": torch.log((B.frequency + least) / (theirs + least)),
        "latent scaling": -(scaling.other / scaling.own),
    }


def norm_excess(found: Match, A: Side, B: Side, backwards: bool = False) -> Tensor:
    """The encoder norm of each latent of B less that of its partner in A, (m,) float64, NaN where it has none. `backwards`: with the
    permutation applied the wrong way round, as source 002 does, which pairs the latents at random."""
    partner = found.A_for_B
    if backwards:
        partner = torch.full_like(found.A_for_B, -1)
        given = found.B_for_A[: len(partner)]
        partner[: len(given)] = given.clamp_max(len(A.encoder_norms) - 1)
    theirs = A.encoder_norms.double()[partner.clamp_min(0)]
    return torch.where(partner >= 0, B.encoder_norms - theirs, torch.nan)


def cosines(found: Match) -> np.ndarray:
    """Each row of A's cosine with its partner (n,) float64, 0 where it has none."""
    return np.asarray(np.nan_to_num(found.score.double().numpy()))


def turned(found: Match) -> Match:
    """The same match with A and B exchanged."""
    score = torch.full((len(found.A_for_B),), torch.nan, dtype=found.score.dtype)
    matched = found.A_for_B >= 0
    score[matched] = found.score[found.A_for_B[matched]]
    return found._replace(B_for_A=found.A_for_B, A_for_B=found.B_for_A, score=score)
