"""Overlap measures against hand arithmetic and known answers; each fires on a plant and stays silent without one."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import TruncatedSVD

from helpers import stats
from helpers.pair import overlap


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_basis_is_orthonormal_nested_and_gives_nothing_for_what_is_there_already():
    rows = drawn(4, 12)
    rows = torch.stack([rows[0], rows[1], 2 * rows[0] - rows[1], rows[2], torch.zeros(12), rows[3]])
    q = overlap.basis(rows)
    kept = q.any(1)
    assert kept.tolist() == [True, True, False, True, False, True]
    assert torch.allclose(q[kept] @ q[kept].T, torch.eye(4).double(), atol=1e-12)
    for r in range(1, 7):  # the first r rows lie in the span of the first r of the basis
        assert torch.allclose(rows[:r] @ q[:r].T @ q[:r], rows[:r], atol=1e-10)


def test_energy_is_hand_arithmetic_and_a_random_vector_has_r_over_d():
    v = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    axes = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    np.testing.assert_allclose(overlap.energy(v, axes, [0, 1, 2]), [[0, 0, 0], [9 / 25, 0, 0], [1, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(overlap.energy(v, axes), [1, 0, 0], atol=1e-12)
    assert overlap.energy(drawn(2000, 60), drawn(15, 60, seed=1)).mean() == pytest.approx(15 / 60, abs=0.01)
    with pytest.raises(ValueError, match=r"ranks \[3\].*0 to 2"):
        overlap.energy(v, axes, [3])


def test_principal_directions_are_about_zero_as_sklearns_truncated_svd():
    rows = drawn(300, 10) * torch.arange(1, 11) + 5
    own, theirs = overlap.principal(rows, 3), TruncatedSVD(3, algorithm="arpack").fit(rows.numpy()).components_
    np.testing.assert_allclose(np.abs((own.numpy() * theirs).sum(1)), 1, atol=1e-9)


def test_projections_add_up_and_what_was_projected_out_is_gone():
    v, q = drawn(5, 20), drawn(3, 20, seed=1)
    out, onto = overlap.project_out(v, q), overlap.project_onto(v, q)
    assert torch.allclose(out + onto, v, atol=1e-12) and (out @ q.T).abs().max() < 1e-10
    np.testing.assert_allclose(overlap.energy(v, q), (onto.norm(dim=1) / v.norm(dim=1)).numpy() ** 2, atol=1e-12)
    assert torch.allclose(overlap.project_out(onto, q), torch.zeros(5, 20).double(), atol=1e-12)


def test_principal_angles_of_known_planes():
    a, angle = torch.eye(4)[:2].double(), 0.3
    b = torch.tensor([[1.0, 0, 0, 0], [0, math.cos(angle), math.sin(angle), 0]]).double()
    np.testing.assert_allclose(overlap.principal_cosines(a, b @ b.T @ b), [1, math.cos(angle)], atol=1e-12)
    np.testing.assert_allclose(overlap.principal_cosines(a, torch.eye(4)[2:].double()), [0, 0], atol=1e-12)
    assert len(overlap.principal_cosines(drawn(3, 9), drawn(5, 9))) == 3


def test_sparse_sums_and_best_rows_find_what_is_planted_and_signs_do_not_matter():
    rows = torch.nn.functional.normalize(drawn(80, 40), dim=1)
    v = torch.stack([2 * rows[3] - 3 * rows[50], rows[7], drawn(1, 40, seed=9)[0]])
    cosine = overlap.sparse(v, rows, 4)
    assert cosine[0] > 0.999 and cosine[1] > 0.999 > 0.9 > cosine[2]
    np.testing.assert_allclose(overlap.sparse(-v, rows, 4), cosine, atol=1e-9)
    index, size = overlap.best(-v, rows)
    assert index[1] == 7 and size[1] == pytest.approx(1) and size[2] < 0.7


def test_matched_rank_counts_bits():
    assert overlap.matched_rank(2, 1, bits=1) == 2  # one value of one bit, and one bit for which
    assert overlap.matched_rank(100, 100) == 100  # all of them: nothing to say which
    choose = math.log2(math.comb(4608, 32))
    assert overlap.matched_rank(4608, 32) == round(32 + choose / 16)
    with pytest.raises(ValueError, match="k = 0 given"):
        overlap.matched_rank(10, 0)


def test_directions_that_are_not_finite_are_refused():
    q, wrong = torch.randn(2, 8), torch.full((1, 8), torch.nan)
    for call in (
        lambda: overlap.project_out(q, wrong),
        lambda: overlap.energy(wrong, q),
        lambda: overlap.best(wrong, q),
    ):
        with pytest.raises(ValueError, match="NaN or infinity"):
            call()


# --- intervals and nulls -------------------------------------------------------------------------------------------------


def test_vectors_with_a_pair_left_out_are_the_mean_of_the_others():
    pairs = drawn(6, 4)
    found = overlap.left_out(pairs)
    assert torch.allclose(found[0], pairs.mean(0)) and torch.allclose(found[3], pairs[[0, 1, 3, 4, 5]].mean(0))


def test_an_interval_over_pairs_is_the_t_interval_for_a_number_that_is_linear_in_them():
    axis, pairs = drawn(4, seed=2), drawn(30, 4)
    linear = (overlap.left_out(pairs) @ axis).numpy()[None]
    assert overlap.over_pairs([linear]) == pytest.approx(stats.over((pairs @ axis).numpy()))
    two = overlap.over_pairs([linear, linear + 1])  # as many again, sampled apart: less noise by half
    assert two.value == pytest.approx(linear[0, 0] + 0.5)
    wide, narrow = (x.high - x.low for x in (overlap.over_pairs([linear]), two))
    assert narrow / wide == pytest.approx(0.5**0.5, abs=0.03)
    apart = overlap.over_pairs([linear, linear + 1], weights=[1, -1])
    assert apart.value == pytest.approx(-1) and apart.low < -1 < apart.high
    seeds = overlap.over_pairs([np.concatenate([linear, linear + 3, linear - 3])])
    assert seeds.value == pytest.approx(linear[0, 0]) and seeds.high - seeds.low > 2 * wide


def test_a_scale_runs_from_random_vectors_to_the_ceiling_and_leaves_out_who_has_none():
    null = np.linspace(0.1, 0.3, 101)
    found = overlap.scale_of(null, {"a": 0.7, "b": 0.9, "c": 0.25}, ["a", "b", "c"])
    assert found.able == ["a", "b"] and found.of(np.array([0.2, 0.8])) == pytest.approx([0, 1])
    assert overlap.scale_of(null, {"c": 0.25}, ["c"]) is None and overlap.scale_of(null, {}, []) is None


def test_group_means_are_what_labels_without_meaning_give():
    null = np.arange(10.0)
    assert set(overlap.means(null, 1, 500)) == set(null) and overlap.means(null, 10, 3) == pytest.approx([4.5] * 3)
    assert overlap.largest(null, 10, 3).tolist() == [9, 9, 9] and overlap.largest(null, 3, 500).mean() > 6


def around(value, g, pairs=30, seeds=2):
    return value + 0.02 * torch.randn(seeds, 1 + pairs, generator=g, dtype=torch.float64).numpy() / pairs**0.5


def test_readings_fire_for_behaviours_that_lie_inside_and_not_for_those_among_random_vectors():
    g = torch.Generator().manual_seed(0)
    null = 0.2 + 0.05 * torch.randn(300, generator=g, dtype=torch.float64).numpy()
    ceilings = {"a": 0.8, "b": 0.7, "c": 0.75, "d": 0.21}
    found = {"a": around(0.6, g), "b": around(0.55, g), "c": around(0.2, g), "d": around(0.6, g)}
    scale = overlap.scale_of(null, ceilings, ["a", "b", "d"])
    inside = overlap.read(scale, found, null)
    assert scale.able == ["a", "b"] and inside.found.low > 0.5 and stats.p_value(inside.found.value, inside.null) < 0.01
    outside = overlap.read(overlap.scale_of(null, ceilings, ["c"]), found, null)
    assert outside.found.low < 0 < outside.found.high and stats.p_value(outside.found.value, outside.null) > 0.05
    assert overlap.read(None, found, null) == overlap.NOTHING
