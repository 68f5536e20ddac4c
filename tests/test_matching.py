"""Optimal matches against scipy's dense solver, planted permutations both ways, and certificates that
notice a worse match.

`large=True` sends small problems the way of large ones: float32 first, cosines computed block by block, and a
grid of whole numbers in the solver.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from helpers.pair import matching


def unit64(rows):
    """Unit rows in float64, with numpy alone; rows of zeros stay."""
    rows = rows.double().numpy()
    for length in (lambda x: np.abs(x).max(1, keepdims=True), lambda x: np.linalg.norm(x, axis=1, keepdims=True)):
        rows = rows / np.where(length(rows) == 0, 1, length(rows))
    return rows


def dense_costs(A, B):
    return 1 - unit64(A) @ unit64(B).T


def dense_optimum(A, B):
    costs = dense_costs(A, B)
    return costs[linear_sum_assignment(costs)].sum()


@pytest.fixture(params=[False, True], ids=["small", "large"])
def large(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(matching, "SMALL", 0)
        monkeypatch.setattr(matching, "HELD", 0)
    return request.param


def hold(found, costs, rounding, loose):
    """The match is one, its total that of its pairs, and its certificate true; `gap` is at most `loose`, or
    says nothing.
    """
    pairs = np.flatnonzero(found.B_for_A.numpy() >= 0)
    partner = found.B_for_A.numpy()[pairs]
    assert len(pairs) == len(set(partner.tolist())) == min(costs.shape)
    assert found.total == pytest.approx(costs[pairs, partner].sum(), rel=0, abs=rounding)
    assert found.violation >= 0 and found.total - costs[linear_sum_assignment(costs)].sum() <= found.gap <= loose


COSTS = {
    "whole numbers": lambda g, shape: g.integers(-3, 2, shape),
    "bytes": lambda g, shape: g.integers(0, 200, shape, dtype=np.uint8),
    "normal": lambda g, shape: g.normal(size=shape),
    "float32": lambda g, shape: g.normal(size=shape).astype(np.float32),
    "tiny": lambda g, shape: 1e-6 * g.random(shape),
    "tinier": lambda g, shape: 1e-30 * g.random(shape),
    "huge": lambda g, shape: 1e290 * g.normal(size=shape),
    "offset": lambda g, shape: 1e9 + g.random(shape),
    "large offset": lambda g, shape: 1e-3 * g.random(shape) - 1e9,
    "tied": lambda g, shape: np.round(g.random(shape), 1),
    "tied to rounding": lambda g, shape: np.round(g.random(shape), 1) + 1e-16 * g.integers(0, 3, shape),
    "equal": lambda g, shape: np.full(shape, g.normal()),
    "Monge": lambda g, shape: -(np.add.outer(*map(np.arange, shape)) ** 2.0),
    "products": lambda g, shape: np.multiply.outer(*map(np.arange, shape)).astype(float),
    "clustered": lambda g, shape: g.integers(0, 2, shape) + 1e-6 * g.random(shape),
    "on a line": lambda g, shape: np.abs(np.subtract.outer(*(g.random(n) for n in shape))),
    "some forbidden": lambda g, shape: g.random(shape) + 1e12 * (g.random(shape) < 0.5),
    "of all sizes": lambda g, shape: 10 ** g.uniform(-12, 12, shape),
}


@pytest.mark.parametrize("kind", COSTS)
def test_the_certificate_of_any_costs_is_true(kind, large):
    """A hundred small problems of each kind, both ways: never better than the proof says, and the proof is tight."""
    g = np.random.default_rng(len(kind))
    for _ in range(100):
        costs = COSTS[kind](g, tuple(g.integers(1, 13, 2)))
        found = matching.match_costs(torch.from_numpy(costs), k=int(g.integers(1, 5)), block=int(g.integers(1, 9)))
        costs = costs.astype(float)
        used = np.sort(np.abs(costs[linear_sum_assignment(costs)])).sum()
        hold(found, costs, 1e-15 * used, 1e-14 * used + 3e-13 * np.ptp(costs))


ROWS = {
    "random": lambda n: torch.randn(n, 6),
    "scaled by 1e-15": lambda n: 1e-15 * torch.randn(n, 6),
    "scaled by 1e-38": lambda n: 1e-38 * torch.randn(n, 6),
    "scaled by 10^18.5": lambda n: 10**18.5 * torch.randn(n, 6),
    "each of its own scale": lambda n: torch.randn(n, 6) * 10 ** (60 * torch.rand(n, 1) - 30),
    "float64 out of float32's range": lambda n: 1e250 * torch.randn(n, 6).double(),
    "float64 at its ends": lambda n: torch.randn(n, 6).double() * 10 ** (620 * torch.rand(n, 1).double().round() - 313),
    "near-duplicates": lambda n: torch.arange(1.0, 7) + 1e-3 * torch.randn(n, 6),
    "nearer duplicates": lambda n: torch.arange(1.0, 7).double() + 1e-6 * torch.randn(n, 6).double(),
    "clusters": lambda n: torch.eye(6)[torch.randint(3, (n,))] + 1e-3 * torch.randn(n, 6),
    "duplicates": lambda n: torch.eye(6)[torch.randint(3, (n,))] + 1,
    "some zeros": lambda n: torch.randn(n, 6) * (torch.rand(n, 1) < 0.6),
    "all zeros": lambda n: torch.zeros(n, 6),
    "bfloat16": lambda n: torch.randn(n, 6).bfloat16(),
    "whole numbers": lambda n: torch.randint(-2, 3, (n, 6)),
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_certificate_of_any_rows_is_true_in_float64(kind, large):
    for _ in range(30):
        n, m = torch.randint(1, 20, (2,)).tolist()
        A, B = ROWS[kind](n), ROWS[kind](m)
        k, block = int(torch.randint(1, 6, ())), int(torch.randint(1, 9, ()))
        loose = matching.CLOSE * min(n, m) if large else 1e-12
        hold(matching.match(A, B, k=k, block=block), dense_costs(A, B), 1e-13, loose)


def test_near_duplicates_are_told_apart_where_float32_cannot(large):
    """One vector and noise of 1e-3: costs near 1e-6, which cosines in float32 round to an assignment a
    tenth too dear.
    """
    v = torch.randn(1, 32)
    A, B = (v + 1e-3 * torch.randn(300, 32) for _ in range(2))
    found, costs = matching.match(A, B), dense_costs(A, B)
    hold(found, costs, 1e-12, 1e-6 * costs.mean() * 300)
    assert found.gap >= 300 * 32 * np.finfo(float).eps  # what the cosines themselves are rounded by


def test_products_that_are_less_than_float32_are_not_trusted(monkeypatch):
    monkeypatch.setattr(matching, "SMALL", 0)
    A, B = torch.randn(60, 64), torch.randn(60, 64)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not matching._full_float32(torch.device("cpu"))
        hold(matching.match(A, B), dense_costs(A, B), 1e-12, 1e-11)
    finally:
        torch.set_float32_matmul_precision(before)
    assert matching._full_float32(torch.device("cpu"))


@pytest.mark.parametrize(
    "costs,total,partner",
    [
        ([[-1, 0]], -1, [0]),
        ([[-1]], -1, [0]),
        ([[0.0]], 0, [0]),
        ([[3.0, 2.0, -1.0]], -1, [2]),
        ([[3], [2], [5]], 2, [-1, 0, -1]),
        ([[0, -1], [-1, 5]], -2, [1, 0]),
        ([[1 << 40, 1], [1, 0]], 2, [1, 0]),
        ([[True, False], [False, True]], 0, [1, 0]),
    ],
)
def test_small_matrices_by_hand(costs, total, partner, large):
    found = matching.match_costs(torch.tensor(costs))
    assert found.total == total and found.B_for_A.tolist() == partner and 0 <= found.gap < 1e-12
    assert found.violation == 0


@pytest.mark.parametrize("scale", [1e-5, 1e-6, 1e-12, 1e6])
def test_the_scale_of_the_costs_does_not_matter(scale, large):
    costs = np.random.default_rng(0).random((300, 300))
    i, j = linear_sum_assignment(costs)
    found = matching.match_costs(torch.from_numpy(scale * costs), k=8)
    assert found.B_for_A.tolist() == j.tolist()
    assert found.total == pytest.approx(scale * costs[i, j].sum(), rel=1e-12) and found.gap < 1e-10 * found.total


def test_a_small_spread_on_a_large_offset_is_kept_in_float64():
    costs = np.random.default_rng(0).random((80, 80)) / 1024
    found = matching.match_costs(torch.from_numpy(costs + 1e9), k=8)
    assert (
        found.score.dtype == torch.float64 and found.B_for_A.tolist() == linear_sum_assignment(costs + 1e9)[1].tolist()
    )
    assert (1 - found.score - 1e9).max() < 1e-3


def test_many_rows_that_want_few_columns_end(large):
    """Near-ties among half of the columns and a hundred thousand for the others: scipy's bidding alone did not end."""
    g = np.random.default_rng(0)
    for _ in range(20):
        costs = 1e5 + g.integers(0, 10, (30, 30)).astype(float)
        costs[:, :15] = g.random((30, 15))
        hold(matching.match_costs(torch.from_numpy(costs)), costs, 1e-8, 1e-7)


def test_any_prices_bound_the_optimum(large):
    """The pass over all pairs against a naive one, in float64 and in float32: random prices and assignments,
    and the best ones. In float32 the slack is left open once a pair is found that beats the match.
    """
    g = np.random.default_rng(0)
    for trial in range(300):
        n = int(g.integers(1, 9))
        m = n + int(g.integers(0, 4))
        A, B = torch.randn(n, 5), torch.randn(m, 5)
        one, other = (torch.from_numpy(unit64(x)) for x in (A, B))
        cosines = (one @ other.T).numpy()
        column_of, v = g.permutation(m)[:n], -g.random(m) * g.integers(0, 2, m)
        if trial % 2:
            column_of = linear_sum_assignment(-cosines)[1]
            v = matching._prices(*np.divmod(np.arange(n * m), m), 1 - cosines.ravel(), column_of, m)
        slack = (cosines + v).max(1) - (cosines[np.arange(n), column_of] + v[column_of])
        again = lambda i, j: torch.linalg.vecdot(one[i], other[j])  # noqa: B023, E731
        rows = (matching.unit_rows(A), matching.unit_rows(B)) if large else (one, other)
        scores_of, off = (rows[0] @ rows[1].T).__getitem__, 9 * np.finfo(float).eps
        seen = matching._check(scores_of, column_of, v, 3, off=off, again=again if large else None)
        open_from = int((slack > matching.TOLERANCE).argmax()) // 3 * 3 if large and slack.max() > 1e-5 else n
        assert np.allclose(seen.slack[:open_from], slack[:open_from], rtol=0, atol=1e-14)
        assert np.isinf(seen.slack[open_from:]).all() and (open_from == n or not trial % 2)
        matched = cosines[np.arange(n), column_of]
        assert np.allclose(seen.scores[:open_from], matched[:open_from], rtol=0, atol=1e-14)
        assert np.allclose(seen.scores, matched, rtol=0, atol=1e-6)
        left = np.setdiff1d(np.arange(m), column_of)
        gap = seen.slack.sum() - v[left].sum() + seen.rounding
        assert gap >= cosines[linear_sum_assignment(-cosines)].sum() - seen.scores.sum()
        i, j, s = seen.edges
        beaten = cosines + v - (cosines[np.arange(n), column_of] + v[column_of])[:, None] > matching.TOLERANCE
        assert set(zip(i.tolist(), j.tolist(), strict=True)) == {
            *enumerate(column_of),
            *zip(*beaten.nonzero(), strict=True),
        }
        assert np.allclose(s, cosines[i, j], atol=1e-6)


@pytest.mark.parametrize("shape", [(60, 60, 8), (300, 300, 24), (90, 140, 8), (140, 90, 8), (40, 40, 2), (1, 5, 3)])
@pytest.mark.parametrize("k", [1, 8, 64])
def test_the_total_is_the_dense_optimum_and_proven(shape, k):
    n, m, d = shape
    A, B = torch.randn(n, d), torch.randn(m, d)
    found = matching.match(A, B, k=k, block=37)
    assert found.total == pytest.approx(dense_optimum(A, B), abs=1e-4)
    assert found.violation <= matching.TOLERANCE and found.gap <= min(n, m) * matching.TOLERANCE
    pairs = (found.B_for_A >= 0).nonzero()[:, 0]
    assert len(pairs) == min(n, m) and len(found.B_for_A[pairs].unique()) == len(pairs)
    assert torch.equal(found.A_for_B[found.B_for_A[pairs]], pairs)
    expected = torch.cosine_similarity(A[pairs], B[found.B_for_A[pairs]])
    assert torch.allclose(found.score[pairs], expected, atol=1e-5) and torch.isnan(found.score).sum() == n - len(pairs)


@pytest.mark.parametrize("swap", [False, True])
def test_a_planted_permutation_is_found_the_right_way_round(swap):
    A, order = torch.randn(200, 16), torch.randperm(200)
    B = 3 * A[order] + 0.05 * torch.randn(200, 16)  # row r of B is row order[r] of A, three times as long
    found = matching.match(B, A) if swap else matching.match(A, B)
    one, other = (found.B_for_A, found.A_for_B) if swap else (found.A_for_B, found.B_for_A)
    assert torch.equal(one, order) and torch.equal(other[order], torch.arange(200))
    right = (A - B[found.B_for_A if not swap else found.A_for_B] / 3).norm()
    assert right < 0.1 * (A[order] - B[torch.arange(200).flip(0)]).norm()


def test_candidates_that_no_full_matching_fits_are_widened():
    """All rows of A are nearest to one row of B, and k = 1: nothing can be matched until more edges join."""
    hub = torch.randn(1, 12)
    A = hub + 0.01 * torch.randn(50, 12)
    B = torch.cat([hub, -hub + torch.randn(49, 12)])
    found = matching.match(A, B, k=1)
    assert found.total == pytest.approx(dense_optimum(A, B), abs=1e-4) and found.violation <= matching.TOLERANCE


def test_nearly_equal_dictionaries_are_proven_in_a_few_rounds():
    """Partners that nearly coincide, and a few rows that have none, as SAEs of one seed: adding a few
    violated pairs at a time took more than twenty rounds.
    """
    A = torch.randn(1000, 64)
    B = A[torch.randperm(1000)] + 0.3 * torch.randn(1000, 64)
    B[:20] = torch.randn(20, 64)
    found = matching.match(A, B, k=1)
    assert found.total == pytest.approx(dense_optimum(A, B), abs=1e-3) and found.violation <= matching.TOLERANCE
    assert found.rounds <= 8


def test_ties_duplicate_rows_and_rows_of_zeros_do_no_harm():
    A = torch.randn(30, 6)[torch.arange(60) // 2]
    A[5] = 0
    B = A[torch.randperm(60)]
    found = matching.match(A, B, k=3)
    assert found.total == pytest.approx(1.0, abs=1e-4)  # all but the row of zeros, which goes with anything, are found
    assert found.total == pytest.approx(dense_optimum(A, B), abs=1e-4)


@pytest.mark.parametrize("shape", [(50, 50), (40, 70), (70, 40)])
def test_a_given_cost_takes_the_place_of_the_cosine(shape):
    """Any matrix, of any scale and sign; and distances of rows, where long rows would mislead a cosine."""
    costs = 1000 * torch.randn(shape) - 300
    found = matching.match_costs(costs, k=4, block=16)
    i, j = linear_sum_assignment(costs.numpy())
    assert found.total == pytest.approx(float(costs[i, j].double().sum()), rel=1e-6)
    pairs = (found.B_for_A >= 0).nonzero()[:, 0]
    assert torch.allclose(1 - found.score[pairs], costs[pairs, found.B_for_A[pairs]], rtol=1e-5)
    A, B = torch.randn(shape[0], 6), torch.randn(shape[1], 6)
    near = matching.match(A, B, k=4, block=16, score=lambda x, y: -torch.cdist(x, y))
    i, j = linear_sum_assignment(torch.cdist(A, B).numpy())
    assert near.total == pytest.approx(len(i) + float(torch.cdist(A, B)[i, j].sum()), rel=1e-5)
    uneven = matching.match(A, B, k=4, score=lambda x, y: x[:, :1] * y[:, 1])  # not symmetric
    i, j = linear_sum_assignment(-(A[:, :1] * B[:, 1]).numpy())
    assert uneven.total == pytest.approx(len(i) - float((A[i, 0] * B[j, 1]).sum()), rel=1e-4)


@pytest.mark.parametrize("m", [1, 5, 63, 64, 65, 200, 1000])
def test_what_is_near_the_largest_is_all_found(m):
    scores, price = torch.randn(9, m), torch.randn(m)
    values = scores + price
    for within in (0.0, 0.1, 1.0):
        expected = (values >= (values.amax(1) - within)[:, None]).nonzero().tolist()
        row, column = matching._near(scores, price, matching._tops(values), within)
        assert sorted(zip(row.tolist(), column.tolist(), strict=True)) == [tuple(x) for x in expected]
    assert (matching._near(scores, price, matching._tops(values), 99.0) is None) == (m > 65)


@pytest.mark.parametrize("m", [1, 63, 256, 300, 1000])
@pytest.mark.parametrize("k", [1, 2, 70])
def test_the_largest_of_each_row_are_found_also_in_a_transposed_view(m, k, monkeypatch):
    monkeypatch.setattr(matching, "CHUNK", 3 * k * matching.GROUP)
    values = torch.randn(7, m)
    for given in (values, values.T.contiguous().T, -values.abs()):
        columns, found = matching._largest(given, k)
        best = given.topk(min(k, m), dim=1)
        assert torch.equal(found.sort(1, descending=True).values, best.values)
        assert torch.equal(columns.sort(1).values, best.indices.sort(1).values)
        assert torch.equal(given.gather(1, columns), found)


@pytest.mark.parametrize("k", [1, 4, 99])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_candidates_are_the_nearest_of_each_row_and_each_column(k, block):
    scores = torch.randn(23, 31)
    near = [(r, c) for r in range(23) for c in scores[r].topk(min(k, 31)).indices.tolist()]
    near += [(r, c) for c in range(31) for r in scores[:, c].topk(min(k, 23)).indices.tolist()]
    i, j, s = matching._candidates(scores.__getitem__, 23, 31, k, block)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == sorted(set(near))
    assert np.array_equal(s, scores.double().numpy()[i, j])


def test_the_certificate_notices_a_worse_assignment():
    A, B = (matching.unit_rows(torch.randn(40, 6)).double() for _ in range(2))
    scores_of = (A @ B.T).__getitem__
    edges = matching._candidates(scores_of, 40, 40, 40, 16)
    best, _ = matching._solve(*edges, 40, 40)
    worse = best.copy()
    worse[[0, 1]] = best[[1, 0]]
    for columns, fine in ((best, True), (worse, False)):
        v = matching._prices(edges[0], edges[1], 1 - edges[2], columns, 40)
        assert (matching._check(scores_of, columns, v, 16).slack.max() <= matching.TOLERANCE) == fine


def test_nearest_counts_collisions_and_greedy_takes_the_best_pair_first():
    A = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1]])
    B = torch.tensor([[1.0, 0.05], [0.6, 0.8], [-1, 0]])
    found = matching.nearest(A, B, block=2)
    assert found.B_for_A.tolist() == [0, 0, 1] and found.collisions == pytest.approx(2 / 3)
    assert found.mutual.sum() == 2
    C, D = torch.randn(80, 5), torch.randn(70, 5)
    cosines = matching.unit_rows(C) @ matching.unit_rows(D).T
    expected, left = torch.full((80,), -1), cosines.clone()
    for _ in range(70):
        at = int(left.argmax())
        i, j = divmod(at, 70)
        expected[i], left[i], left[:, j] = j, -9.0, -9.0
    assert torch.equal(matching.greedy(C, D, block=13), expected)
    total = (1 - cosines[expected >= 0, expected[expected >= 0]]).sum()
    assert matching.match(C, D).total <= float(total)


def test_agreement_and_cycles():
    A = torch.randn(50, 10)
    one, two = torch.randperm(50), torch.randperm(50)
    B, C = A[one], A[two]
    there, on, back = matching.match(A, B), matching.match(B, C), matching.match(C, A)
    assert matching.cycle_consistency(there, on, back) == 1.0 and matching.agreement(there, there) == 1.0
    assert matching.cycle_consistency(there, on, matching.match(torch.randn(50, 10), A)) < 0.3
    assert matching.agreement(there, matching.match(A, torch.randn(50, 10))) < 0.3
    with pytest.raises(ValueError, match="not of the same two dictionaries"):
        matching.agreement(there, matching.match(A, B[:20]))


def test_the_floor_is_low_and_a_permuted_copy_is_one():
    A = torch.randn(120, 32)
    B = A + 0.3 * torch.randn(120, 32)
    found = matching.references(A, B)
    assert found["own rows, permuted"].score.min() > 0.9999
    own = matching.match(A, B).score.mean()
    assert max(found[x].score.mean() for x in ("rotated", "random")) < 0.6 < own
    assert np.isclose(found["rotated"].total, 120 - float(found["rotated"].score.sum()), atol=1e-3)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: matching.match(torch.randn(4, 3), torch.randn(4, 5)), "width 3 and 5"),
        (lambda: matching.match(torch.randn(4, 3), torch.full((4, 3), torch.nan)), "NaN"),
        (lambda: matching.match(torch.randn(4, 3), torch.randn(4, 3), k=0), "k = 0"),
        (lambda: matching.match(torch.randn(4, 3), torch.randn(4, 3), rounds=0), "rounds = 0"),
        (lambda: matching.match_costs(torch.full((4, 3), torch.nan)), "12 of 12 costs are NaN or infinite"),
        (lambda: matching.match_costs(torch.tensor([[0, torch.inf], [1, 2]])), "1 of 4 costs are NaN or infinite"),
        (lambda: matching.match_costs(torch.tensor([[0, 1], [-torch.inf, 2]])), "1 of 4 costs are NaN or infinite"),
        (lambda: matching.match_costs(torch.tensor([[-1e308, 1e308], [1, 2]], dtype=torch.float64)), "overflows"),
        (lambda: matching.match_costs(torch.zeros(2, 2, dtype=torch.complex64)), "complex64"),
        (lambda: matching.match_costs(torch.zeros(0, 3)), r"\(0, 3\)"),
        (lambda: matching.match(*torch.zeros(2, 2, 3), score=lambda x, y: -torch.inf * x @ y.T), "NaN or infinite"),
        (lambda: matching.match(*torch.zeros(2, 2, 3), score=lambda x, y: x), "one for each pair"),
        (lambda: matching.match(torch.zeros(0, 3), torch.zeros(2, 3), score=lambda x, y: x @ y.T), r"\(0, 3\)"),
        (lambda: matching.match_costs(torch.zeros(4)), r"\(n, m\)"),
        (lambda: matching.match(torch.randn(3), torch.randn(4, 3)), r"shape \(3,\)"),
    ],
)
def test_bad_input_is_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_latent_scaling_is_least_squares_and_tells_a_latent_that_one_model_lacks():
    """Six features, the last one missing from the base model and the one before it at half strength there."""
    d = torch.linalg.qr(torch.randn(16, 16)).Q[:6] * torch.linspace(1, 2, 6)[:, None]
    codes = torch.relu(torch.randn(400, 6)) * (torch.rand(400, 6) < 0.3)
    codes[:, 3] = 0
    chat = codes @ d + 0.01 * torch.randn(400, 16)
    base = (codes * torch.tensor([1, 1, 1, 1, 0.5, 0])) @ d + 0.01 * torch.randn(400, 16)
    found_codes = lambda x: codes[[int((chat - row).abs().sum(1).argmin()) for row in x]]  # noqa: E731
    sae = SimpleNamespace(
        W_dec=d, device="cpu", encode=found_codes, decode=lambda f: f @ d, cfg=SimpleNamespace(d_in=16)
    )
    found = matching.latent_scaling(sae, chat, base, batch=150)
    for got, expected in ((found.own, [1, 1, 1, float("nan"), 1, 1]), (found.other, [1, 1, 1, float("nan"), 0.5, 0])):
        assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), atol=0.01, equal_nan=True)
    for j in (0, 4):
        y = base - codes @ d + codes[:, j : j + 1] * d[j]
        x = (codes[:, j : j + 1] * d[j]).double().flatten()
        assert float(found.other[j]) == pytest.approx(float(x @ y.double().flatten() / (x @ x)), abs=1e-5)
    with pytest.raises(ValueError, match="same tokens"):
        matching.latent_scaling(sae, chat, base[:9])


def test_rankings_find_a_planted_latent_the_right_way_round_and_not_the_wrong_way():
    """B holds A's latents in another order; three of B's are given longer encoders, other rows, a higher
    frequency, no share in A.
    """
    n, g = 200, torch.Generator().manual_seed(4)
    A, order = torch.randn(n, 24, generator=g), torch.randperm(n, generator=g)
    norms, often = torch.rand(n, generator=g).double() * 0.5, torch.rand(n, generator=g).double() * 0.1
    B, new = A[order].clone(), [3, 70, 150]
    one, other = matching.Side(norms, often), matching.Side(norms[order].clone(), often[order].clone())
    B[new] = torch.randn(3, 24, generator=g)
    other.encoder_norms[new] += 2
    other.frequency[new] += 10
    share = torch.ones(n, dtype=torch.float64)
    share[new] = 0.1
    found = matching.match(A, B)
    ranked = matching.only_in_B(found, one, other, matching.Scaling(torch.ones(n).double(), share))
    for name, values in ranked.items():
        if name != "encoder norm, wrong way":
            assert sorted(values.topk(3).indices.tolist()) == new, name
            assert (
                float(
                    values[[i for i in range(n) if i not in new]]
                    .abs()
                    .sub(1 if name in ("matched cosine", "latent scaling") else 0)
                    .max()
                )
                < 1e-5
            )
    wrong = ranked["encoder norm, wrong way"]
    assert torch.allclose(wrong, other.encoder_norms - norms[found.B_for_A]) and float(wrong.abs().median()) > 0.05
    assert torch.equal(matching.turned(matching.turned(found)).score, found.score)
    assert torch.equal(matching.norm_excess(found, one, other), ranked["encoder norm"])
    assert np.array_equal(matching.cosines(found), found.score.double().numpy())
    uneven = matching.only_in_B(
        matching.match(A[:150], B), matching.Side(norms[:150], often[:150]), other, matching.Scaling(share, share)
    )
    assert int(torch.isnan(uneven["encoder norm"]).sum()) == 50 and all(len(v) == n for v in uneven.values())
    lone = matching.turned(matching.match(A[:150], B))
    assert (matching.cosines(lone) == 0).sum() == 50 and np.isfinite(matching.cosines(lone)).all()


def test_the_planted_case_is_found_and_its_facts_say_so():
    case = matching.planted(seed=1)
    turned = case.A @ torch.linalg.lstsq(case.acts, case.turned).solution
    found = matching.match(turned, case.B)
    assert torch.equal(found.A_for_B, case.order)
    facts = matching.facts(turned, case.B, found)
    assert facts["nearest neighbours that collide"] == "0%" and facts["nearest neighbours that are mutual"] == "100%"
    assert facts["a greedy assignment costs more by"] in ("0.0", "-0.0")
