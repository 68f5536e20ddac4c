"""One-to-one matching of two dictionaries' rows: optimal with a proof, and the cheaper ways beside it.

Pure: tensors in, tensors out. `match` finds the assignment of least total cost (1 - cosine) without ever holding the dense cost:
it solves on candidate edges, the nearest few of each row and column (scipy's sparse Jonker-Volgenant), derives prices from
shortest paths on them, and checks the reduced cost of *every* pair, block by block. Pairs that violate it join the
candidates until there are none: by linear-programming duality the assignment is then optimal (Burkard, Dell'Amico &
Martello 2009, ch. 4). Another score than the cosine, or a matrix of costs, may be given. Direction, by construction: row i of A
goes with row `B_for_A[i]` of B.
"""

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
from helpers.topk import product

TOLERANCE = (
    2e-6  # of a reduced cost: float32 products of unit rows are exact to about 1e-7 times the root of their length
)


# Rows (r, ...) of A and all of B (m, ...) -> (r, m), larger is more alike.
Likeness = Callable[[Tensor, Tensor], Tensor]


class Match(NamedTuple):
    """An assignment of A (n, d) to B (m, d).

    `B_for_A` (n,) and `A_for_B` (m,): the partner's row, -1 for a row left over. `score` (n,): each row's cosine with its partner (or
    the score given), NaN where there is none. `total`: summed cost 1 - score of the pairs. Certificate: `violation`, the most negative reduced cost
    over all n m pairs (0 if none), and `gap`, by how much `total` can at most exceed the optimum. `edges` looked at by the
    solver, `rounds` of it, `seconds`.
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


def unit_rows(rows: Tensor, device: str | torch.device = "cpu") -> Tensor:
    """Rows (n, d) of length 1, float32; a row of zeros stays one (its cosine with anything is 0). ValueError if not finite."""
    if rows.ndim != 2 or not len(rows):
        raise ValueError(
            f"a dictionary of shape {tuple(rows.shape)} was given; (rows, d_model) with one row or more is wanted"
        )
    rows = rows.detach().to(device).float()
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("a dictionary row holds NaN or infinity: which SAE is this?")
    return decompose.unit_rows(rows)[0]


def _blocks(A: Tensor, B: Tensor, rows: int, what: str, likeness: Likeness = product) -> Iterator[tuple[int, Tensor]]:
    """(first row, scores (block, m)), block by block; of unit rows the cosines."""
    for first in tqdm(range(0, len(A), rows), desc=what, leave=False):
        yield first, likeness(A[first : first + rows], B)


def _back(likeness: Likeness) -> Likeness:
    """The same likeness asked from B's side: one that is given need not be symmetric."""
    return lambda x, rows: likeness(rows, x).T


def _candidates(
    A: Tensor, B: Tensor, k: int, rows: int, likeness: Likeness = product
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges (i, j, cost): the k nearest of each row and of each column, each once, sorted by row."""
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
    i, j, c = (np.concatenate(x) for x in zip(*found, strict=True))
    return _once(i, j, 1 - c, len(B))


def _once(i: np.ndarray, j: np.ndarray, c: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    _, first = np.unique(i.astype(np.int64) * m + j, return_index=True)
    return i[first], j[first], c[first]


# --- prices and proof --------------------------------------------------------------------------------------------------


def _solve(i: np.ndarray, j: np.ndarray, c: np.ndarray, n: int, m: int) -> np.ndarray:
    """The column of each row in the cheapest full matching of the candidate graph (n <= m); ValueError if there is none."""
    graph = csr_matrix((c + 1.0, (i, j)), shape=(n, m))  # one more each, so that no weight is an explicit zero
    row, column = min_weight_full_bipartite_matching(graph)
    out = np.empty(n, np.int64)
    out[row] = column
    return out


def _feasible(
    A: Tensor, B: Tensor, i: np.ndarray, j: np.ndarray, c: np.ndarray, likeness: Likeness = product
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The candidates, with every column for the rows that no matching within them can serve: a full matching then exists."""
    n, m = len(A), len(B)
    graph = csr_matrix((np.ones(len(i)), (i, j)), shape=(n, m))
    alone = np.flatnonzero(maximum_bipartite_matching(graph, perm_type="column") < 0)
    if not len(alone):
        return i, j, c
    costs = 1 - likeness(A[torch.from_numpy(alone).to(A.device)], B).double().cpu().numpy()
    every = np.repeat(alone, m), np.tile(np.arange(m), len(alone)), costs.ravel()
    return _once(*(np.concatenate(pair) for pair in zip((i, j, c), every, strict=True)), m)


def _prices(
    i: np.ndarray, j: np.ndarray, c: np.ndarray, column_of: np.ndarray, m: int
) -> tuple[np.ndarray, np.ndarray]:
    """Dual prices u (n,), v (m,) with u_i + v_j = c_ij on matched and <= c_ij on all candidate edges, v <= 0.

    Shortest paths on the residual graph (Bellman-Ford, all edges at once): v_j <= v_match(i) + c_ij - c_i,match(i).
    """
    order = np.lexsort((i, j))
    i, j, c = i[order], j[order], c[order]
    starts = np.flatnonzero(np.r_[True, j[1:] != j[:-1]])
    touched = j[starts]
    own = np.empty(len(column_of))
    matched = j == column_of[i]
    own[i[matched]] = c[matched]
    slack = c - own[i]
    v = np.zeros(m)
    for _ in range(len(column_of) + 1):
        reach = np.minimum.reduceat(v[column_of][i] + slack, starts)
        new = np.minimum(v[touched], reach)
        if (new >= v[touched] - 1e-12).all():
            break
        v[touched] = new
    return own - v[column_of], v


def _check(
    A: Tensor,
    B: Tensor,
    u: np.ndarray,
    v: np.ndarray,
    rows: int,
    most: int = 64,
    likeness: Likeness = product,
    tolerance: float = TOLERANCE,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float]:
    """Violated edges (i, j, cost), at most `most` a row; the largest violation, and the sum over rows of each row's largest."""
    price_u, price_v = (torch.from_numpy(x).to(A.device).float() for x in (u, v))
    found, worst, total = [], 0.0, 0.0
    for first, scores in _blocks(A, B, rows, "certificate", likeness):
        raised = (
            scores.add_(price_v) if likeness is product else scores + price_v
        )  # bound by memory: in place where it is ours
        own = 1 - price_u[first : first + len(raised)]
        low = (own - raised.amax(1)).clamp_max(0.0).double()
        worst, total = min(worst, float(low.min())), total + float(low.sum())
        bad = (low < -tolerance).nonzero()[:, 0]
        if len(bad):
            near = raised[bad].topk(min(most, raised.shape[1]), dim=1)
            keep = own[bad, None] - near.values < -tolerance
            i, j = bad[:, None].expand_as(near.indices)[keep], near.indices[keep]
            found.append(((i + first).cpu(), j.cpu(), (1 - (near.values[keep] - price_v[j])).double().cpu()))
    edges = (
        [torch.cat(x).numpy() for x in zip(*found, strict=True)]
        if found
        else [np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)]
    )
    return *edges, -worst, -total


def match(
    A: Tensor,
    B: Tensor,
    k: int = 64,
    block: int = 2048,
    device: str | torch.device = "cpu",
    rounds: int = 20,
    score: Likeness | None = None,
) -> Match:
    """The one-to-one assignment of A's rows (n, d) to B's (m, d) with the greatest summed cosine, and its certificate.

    `score` in place of the cosine: a function of rows of A, as they are given, and all of B, to (rows, m); larger is more alike.

    `k`: nearest rows of either side that start as candidates; `block`: rows of cosines held at once. If n and m differ the larger
    side has rows left over. Ties and duplicate rows are broken somehow; the total is the optimum. RuntimeError if no
    proof is found within `rounds`.
    """
    began = time.perf_counter()
    if A.ndim == 2 and B.ndim == 2 and A.shape[1] != B.shape[1]:
        raise ValueError(
            f"dictionaries of width {A.shape[1]} and {B.shape[1]} were given: map one into the other's space first"
        )
    if k < 1 or block < 1:
        raise ValueError(f"k = {k}, block = {block} given; both must be at least 1")
    if len(A) > len(B):
        return turned(match(B, A, k, block, device, rounds, score and _back(score)))
    likeness = score or product
    one, other = (A.to(device), B.to(device)) if score else (unit_rows(A, device), unit_rows(B, device))
    n, m = len(one), len(other)
    i, j, c = _feasible(one, other, *_candidates(one, other, k, block, likeness), likeness)
    if not np.isfinite(c).all():
        raise ValueError("a score is NaN or infinite: every row of A must have one with every row of B")
    tolerance = TOLERANCE * max(1.0, float(np.abs(c).max()) / 2)  # cosine costs go to 2
    done = 0
    while True:
        done += 1
        column_of = _solve(i, j, c, n, m)
        u, v = _prices(i, j, c, column_of, m)
        # Each round may add four times as many edges a row: a few at a time took dozens of rounds.
        more_i, more_j, more_c, violation, gap = _check(
            one, other, u, v, block, 64 * 4 ** (done - 1), likeness, tolerance
        )
        if not len(more_i):
            break
        if done == rounds:
            raise RuntimeError(
                f"no proof of optimality after {rounds} rounds (violation {violation:.1e}): raise k or rounds"
            )
        i, j, c = _once(np.r_[i, more_i], np.r_[j, more_j], np.r_[c, more_c], m)
    partner = torch.from_numpy(column_of)
    back = torch.full((m,), -1, dtype=torch.long)
    back[partner] = torch.arange(n)
    scores, matched = torch.empty(n), j == column_of[i]
    scores[torch.from_numpy(i[matched])] = torch.from_numpy(1 - c[matched]).float()
    total = float(c[matched].sum())
    return Match(partner, back, scores, total, violation, gap, len(i), done, time.perf_counter() - began)


def match_costs(costs: Tensor, **how: Any) -> Match:
    """The assignment of least total cost for a matrix of costs (n, m), with its certificate; `score` there is 1 - cost. `how` as for
    `match`. For costs that come from rows give `match` the rows and a score: the matrix need then not exist."""
    if costs.ndim != 2 or not costs.numel():
        raise ValueError(f"costs of shape {tuple(costs.shape)} were given; (n, m) with one row or more is wanted")
    numbers = [torch.arange(n)[:, None] for n in costs.shape]
    return match(*numbers, score=lambda x, y: 1 - costs[x[:, 0].cpu()][:, y[:, 0].cpu()].to(x.device).float(), **how)


# --- the cheaper ways, and what to hold a match against ----------------------------------------------------------------


class Nearest(NamedTuple):
    """Each row of A with its nearest in B, which several may share: `B_for_A` (n,), `cosine` (n,); `collisions`, the share of A's rows
    whose choice another row shares; `mutual` (n,) bool: rows that are also the nearest of their nearest."""

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

    Found as the mutual nearest among the rows still free, again and again: the same pairs, since the best pair of all is
    mutual, and so is every pair that no better one touches.
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
    """Share of A's rows to which two matches of the same dictionaries (by decoder and by encoder, say) give the same partner."""
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
    """What a match of A to B is read against: A to its own rows in another order (must be 1), to B's rows turned by a random
    rotation (as coherent as B, without its meaning), and to as many random rows. `how` as for `match`.

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
    """How much of each latent is in the activations it was encoded from, `own`, and in the `other` model's for the same tokens; each
    (latents,) float64, NaN for a latent that never fires. other / own is near 1 for a shared latent, near 0 for one the other lacks."""

    own: Tensor
    other: Tensor


def latent_scaling(sae: Any, own: Tensor, other: Tensor, batch: int = 4096) -> Scaling:
    """Latent scaling (Minder et al. 2025, arXiv:2504.02922): for a latent with codes f (tokens,) on `own` activations (tokens, d_model) and
    decoder row d, the beta that makes |beta f d - Y|^2 least, once for each model.

    Y is a model's activations less what all *other* latents reconstruct of `own`. Closed form beta = d.(Y^T f) / (|f|^2 |d|^2); with Y =
    rest + f d that is 1 + d.(rest^T f) / (|f|^2 |d|^2), rest the activations less the whole reconstruction.
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
    """What is compared of one dictionary's latents: encoder norms and the share of tokens each fired on; each (latents,)."""

    encoder_norms: Tensor
    frequency: Tensor


def side(sae: Any, frequency: Tensor) -> Side:
    """The side of an SAE, encoder norms in units of the largest, as source 002 takes them."""
    norms = sae.W_enc.detach().double().cpu().norm(dim=0)
    return Side(norms / norms.max(), frequency.double())


def only_in_B(found: Match, A: Side, B: Side, scaling: Scaling, least: float = 1e-4) -> dict[str, Tensor]:
    """How much each latent of B looks as if A had none like it, by five measures; {name: (m,)}, larger is more, NaN where unmatched.

    encoder norm: B's less its partner's in A. encoder norm, wrong way: the same with the permutation applied backwards, as source 002
    does (it pairs the latents at random). matched cosine: how unlike it is to its partner, -cosine. frequency: log of the ratio of firing
    shares, each raised by `least`. latent scaling: -(other / own), with B's codes.
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
    score = torch.full((len(found.A_for_B),), torch.nan)
    matched = found.A_for_B >= 0
    score[matched] = found.score[found.A_for_B[matched]]
    return found._replace(B_for_A=found.A_for_B, A_for_B=found.B_for_A, score=score)
