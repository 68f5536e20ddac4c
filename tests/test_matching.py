"""Optimal matches against scipy's dense solver, planted permutations both ways, and certificates that notice a worse match."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from helpers import matching


def dense_optimum(A, B):
    costs = 1 - (matching.unit_rows(A) @ matching.unit_rows(B).T).double().numpy()
    i, j = linear_sum_assignment(costs)
    return costs[i, j].sum()


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
    """Partners that nearly coincide, and a few rows that have none, as SAEs of one seed: adding a few violated pairs at a time took
    more than twenty rounds."""
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


def test_the_certificate_notices_a_worse_assignment():
    A, B = (matching.unit_rows(torch.randn(40, 6)) for _ in range(2))
    i, j, c = matching._candidates(A, B, 40, 16)
    best = matching._solve(i, j, c, 40, 40)
    worse = best.copy()
    worse[[0, 1]] = best[[1, 0]]
    for columns, fine in ((best, True), (worse, False)):
        u, v = matching._prices(i, j, c, columns, 40)
        assert (matching._check(A, B, u, v, 16)[3] <= matching.TOLERANCE) == fine


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
        (lambda: matching.match_costs(torch.full((4, 3), torch.nan)), "NaN or infinite"),
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
    """B holds A's latents in another order; three of B's are given longer encoders, other rows, a higher frequency, no share in A."""
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
    uneven = matching.only_in_B(
        matching.match(A[:150], B), matching.Side(norms[:150], often[:150]), other, matching.Scaling(share, share)
    )
    assert int(torch.isnan(uneven["encoder norm"]).sum()) == 50 and all(len(v) == n for v in uneven.values())
