"""Nulls: of the right length, with nothing of what they stand beside, and refused where they are none."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import nulls
from helpers.sae import decompose
from helpers.steering import directions


def pairs(n=40, width=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    pos, neg = (torch.randn(n, width, generator=g, dtype=torch.float64) for _ in range(2))
    return pos + 0.5, neg


def test_every_null_is_as_long_as_its_vector():
    pos, neg = pairs()
    v = directions.mean(pos, neg)
    rows = torch.randn(50, 24)
    for drawn in (
        nulls.random(v, 30),
        nulls.like_rows(v, rows, 30),
        nulls.shuffled(pos, neg, 30),
        nulls.others(v, list(rows[:30])),
        nulls.equal_response(v, torch.randn(24), 30),
    ):
        assert drawn.shape == (30, 24) and drawn.dtype == torch.float64
        torch.testing.assert_close(drawn.norm(dim=1), v.norm().expand(30))


def test_a_seed_is_a_draw():
    v = torch.ones(6)
    assert torch.equal(nulls.random(v, 3, 5), nulls.random(v, 3, 5))
    assert not torch.equal(nulls.random(v, 3, 5), nulls.random(v, 3, 6))


def test_random_is_isotropic_and_like_rows_has_their_covariance():
    v = torch.ones(24, dtype=torch.float64)
    rows = torch.randn(500, 24, dtype=torch.float64) * torch.linspace(0.1, 3, 24, dtype=torch.float64)
    even, uneven = (
        x.square().mean(0) / x.square().mean(0).sum() for x in (nulls.random(v, 400), nulls.like_rows(v, rows, 400))
    )
    assert even.max() < 0.08 and uneven[-1] > 0.1 and uneven[0] < 0.01


def test_equal_response_has_the_vectors_own_and_nothing_else_of_it():
    g = torch.Generator().manual_seed(1)
    v, gradient = torch.randn(400, generator=g), torch.randn(400, generator=g)
    drawn = nulls.equal_response(v, gradient.numpy(), 200)
    torch.testing.assert_close(drawn @ gradient.double(), (v.double() @ gradient.double()).expand(200))
    unit = gradient.double() / gradient.double().norm()
    rest = drawn - (drawn @ unit)[:, None] * unit
    cosine = rest @ v.double() / rest.norm(dim=1) / v.double().norm()
    assert abs(float(cosine.mean())) < 0.02 and float(cosine.std()) < 0.08
    along = nulls.equal_response(gradient, gradient, 2)  # nothing is left over: the vector itself
    torch.testing.assert_close(along, gradient.double().expand(2, 400))


def test_swapping_exactly_half_leaves_nothing_of_a_constant_difference():
    pos, neg = torch.ones(40, 5), torch.zeros(40, 5)
    assert torch.equal(directions.mean(*nulls.flipped(pos, neg, seed=3)), torch.zeros(5, dtype=torch.float64))
    assert not torch.equal(nulls.flipped(pos, neg, 1)[0], nulls.flipped(pos, neg, 2)[0])


def test_shuffled_labels_keep_nothing_of_the_mean():
    pos, neg = pairs(200)
    v = directions.mean(pos + 5, neg)
    cosine = nulls.shuffled(pos + 5, neg, 300) @ v / v.norm().square()
    assert abs(float(cosine.mean())) < 0.05


@pytest.mark.parametrize("count", [8, 7])
def test_many_shuffles_are_one_flip_after_another(count):
    pos, neg = pairs(count)
    length = directions.mean(pos, neg).norm()
    for i, row in enumerate(nulls.shuffled(pos, neg, 5, seed=3)):
        v = directions.mean(*nulls.flipped(pos, neg, 3 + i))
        torch.testing.assert_close(row, v / v.norm() * length)


def test_one_pair_has_nothing_to_shuffle_and_an_odd_one_is_left_out():
    pos, neg = torch.randn(7, 5), torch.randn(7, 5)
    for f in (lambda p, n: nulls.flipped(p, n, 0), nulls.shuffled):
        with pytest.raises(ValueError, match="nothing to shuffle"):
            f(pos[:1], neg[:1])
    left_out = set()
    for seed in range(40):
        one, other = nulls.flipped(pos, neg, seed)
        swapped = [int(((neg == row).all(1)).any()) for row in one]
        assert len(one) == 6 and sum(swapped) == 3
        rows = [
            ((pos == a).all(1) & (neg == b).all(1)) | ((neg == a).all(1) & (pos == b).all(1))
            for a, b in zip(one, other, strict=True)
        ]
        index = [int(r.nonzero()[0, 0]) for r in rows]
        assert index == sorted(set(index))
        left_out |= set(range(7)) - set(index)
    assert left_out == set(range(7))
    two = directions.mean(*nulls.flipped(pos[:2], neg[:2], 0))
    torch.testing.assert_close(two.abs(), ((pos - neg)[0] - (pos - neg)[1]).double().abs() / 2)


def test_nothing_keeps_its_place_and_every_other_order_comes_up():
    found = nulls.elsewhere(4, 2000)
    assert found.shape == (2000, 4) and (np.sort(found, 1) == np.arange(4)).all() and (found != np.arange(4)).all()
    assert len(np.unique(found, axis=0)) == 9 and nulls.elsewhere(2, 3).tolist() == [[1, 0]] * 3
    with pytest.raises(ValueError, match="no other place"):
        nulls.elsewhere(1, 3)


def test_rotations_keep_every_angle_and_are_uniform():
    rows = torch.randn(9, 7, dtype=torch.float64)
    turns = list(nulls.rotations(7, 300))
    for turn in turns[:5]:
        torch.testing.assert_close(rows @ turn @ (rows @ turn).T, rows @ rows.T)
    first = torch.stack([turn[0] for turn in turns])  # where the first axis goes: a point of the sphere, uniform
    assert first.mean(0).abs().max() < 0.1 and np.allclose(first.square().mean(0), 1 / 7, atol=0.04)
    assert len({float(t.det().sign()) for t in turns}) == 2 or len(turns) < 20


def test_what_is_no_null_is_refused():
    rows = torch.randn(9, 6)
    for call, word in (
        (lambda: nulls.random(torch.zeros(6)), "v is zero"),
        (lambda: nulls.random(rows), r"v \(9, 6\)"),
        (lambda: nulls.random(rows[0], 0), "0 draws"),
        (lambda: nulls.like_rows(rows[0], rows[:1], 2), "two rows or more of 6"),
        (lambda: nulls.like_rows(rows[0], rows[:, :5], 2), "two rows or more of 6"),
        (lambda: nulls.like_rows(rows[0], torch.ones(9, 6) * 0.1, 2), "are the same"),
        (lambda: nulls.others(rows[0], [rows[0], torch.zeros(6)]), r"vectors\[1\] \(6,\)"),
        (lambda: nulls.others(rows[0], [rows[0, :1]]), r"vectors\[0\] \(1,\)"),
        (lambda: nulls.equal_response(rows[0], torch.zeros(6)), r"gradient \(6,\)"),
        (lambda: nulls.flipped(rows, rows[:3], 0), "were given"),
        (lambda: nulls.shuffled(torch.ones(4, 3), torch.zeros(4, 3)), "differ alike"),
    ):
        with pytest.raises(ValueError, match=word):
            call()


def test_concepts_are_fifty_and_more_and_no_behaviour_of_ours(tmp_path, monkeypatch):
    named = nulls.named_concepts()
    ours = {p.stem for p in (nulls.CONCEPTS.parent / "behaviors").glob("*.jsonl")}
    assert len(named) >= 50 and len({word for pair in named for word in pair}) == 2 * len(named)
    assert not ours & {word for pair in named for word in pair}
    wrong = tmp_path / "concepts.txt"
    wrong.write_text("# a comment\npatient\n")
    monkeypatch.setattr(nulls, "CONCEPTS", wrong)
    with pytest.raises(ValueError, match="line 2: 'patient'"):
        nulls.named_concepts()


def test_concept_vectors_are_those_of_the_pairs(smol):
    found = nulls.concepts(smol, 14, questions=2)
    stack = torch.stack(list(found.values()))
    unit = stack / stack.norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T).fill_diagonal_(0)
    assert len(found) >= 50 and stack.isfinite().all() and float(cosine.abs().max()) < 0.999


def test_other_items_keep_a_behaviours_responses_and_lose_whose_they_are():
    rng = np.random.default_rng(0)
    responses = [rng.normal(size=(3, 40)), rng.normal(size=(2, 30))]
    drawn = list(nulls.other_items(responses, 50, seed=1))
    for one in drawn:
        for was, now in zip(responses, one, strict=True):
            order = [int(np.flatnonzero(was[0] == x)[0]) for x in now[0]]
            np.testing.assert_array_equal(now, was[:, order])  # one order for all vectors
    assert abs(np.mean([np.corrcoef(responses[0].ravel(), one[0].ravel())[0, 1] for one in drawn])) < 0.1


def test_rows_that_are_turned_are_pursued_as_if_they_had_been():
    rows, vectors = torch.randn(60, 24), torch.randn(3, 24, dtype=torch.float64)
    found = nulls.in_rotated_rows(rows, vectors, [1, 4], draws=2, seed=7)
    for part, turn in zip(found, nulls.rotations(24, 2, 7), strict=True):
        for k, made in zip((1, 4), part, strict=True):
            plain = decompose.pursuit((rows.double() @ turn).float(), vectors, k).reconstruction
            torch.testing.assert_close(made, plain, atol=1e-4, rtol=1e-4)


def test_an_sae_that_is_turned_encodes_as_if_it_had_been():
    rows, bias, vectors = nulls.random_rows(60, 24), torch.randn(24), torch.randn(3, 24, dtype=torch.float64)
    assert torch.allclose(rows.norm(dim=1), torch.ones(60)) and not torch.equal(rows, nulls.random_rows(60, 24, seed=1))

    def sae(turn):
        weights = {name: (x.double() @ turn).float() for name, x in (("W_dec", rows), ("b_dec", bias))}
        return SimpleNamespace(
            cfg=SimpleNamespace(d_in=24),
            device=torch.device("cpu"),
            W_dec=weights["W_dec"],
            encode=lambda x: ((x - weights["b_dec"]) @ weights["W_dec"].T - 0.2).relu(),
            decode=lambda z: z @ weights["W_dec"] + weights["b_dec"],
        )

    found = nulls.in_rotated_sae(sae(torch.eye(24).double()), vectors, draws=2, seed=7)
    for part, turn in zip(found, nulls.rotations(24, 2, 7), strict=True):
        torch.testing.assert_close(part, decompose.encode(sae(turn), vectors).reconstruction, atol=1e-4, rtol=1e-4)


def test_rows_with_a_meaning_are_ahead_of_turned_ones():
    rows = torch.randn(200, 48)
    planted = rows[:3].sum(0, keepdim=True)
    turned = nulls.in_rotated_rows(rows, planted, [3], draws=20)
    assert decompose.pursuit(rows, planted, 3).cosine[0] > 0.999
    assert torch.cosine_similarity(turned[:, 0, 0], planted, dim=1).max() < 0.95


def test_dealt_orders_are_all_as_likely_and_off_the_diagonal_is_what_other_rows_have():
    found = nulls.dealt(3, 6000, 1)
    orders, counts = np.unique(found, axis=0, return_counts=True)
    assert len(orders) == 6 and counts.min() > 850 and counts.max() < 1150
    table = np.arange(9.0).reshape(3, 3)
    assert nulls.off_diagonal(table).tolist() == [[3, 1, 2], [6, 7, 5]]
