"""Mixtures have the answer that they were made with, and measures of them are those of rows pushed one by one."""

import numpy as np
import pytest
import torch

from helpers.pair import mixtures, overlap
from helpers.pair.mixtures import Change, Steered


@pytest.fixture
def g():
    return torch.Generator().manual_seed(7)  # not the seed of the draws: its first would be v itself


def behaviour(g, d=32, cosine=0.3):
    v = torch.randn(d, generator=g, dtype=torch.float64)
    side = torch.randn(d, generator=g, dtype=torch.float64)
    side -= (side @ v) / (v @ v) * v
    pairs = torch.randn(40, d, generator=g, dtype=torch.float64)
    pairs += 3 * v - pairs.mean(0)
    return Steered(3 * v, cosine * v / v.norm() + (1 - cosine**2) ** 0.5 * side / side.norm(), pairs)


def test_what_stands_aside_is_at_right_angles_and_steers_as_well(g):
    one = behaviour(g)
    u = mixtures.aside(one, 50)
    v = one.vector / one.vector.norm()
    assert torch.allclose(u.norm(dim=1), torch.ones(50, dtype=torch.float64))
    assert (u @ v).abs().max() < 1e-12 and torch.allclose(u @ one.gradient, (one.gradient @ v).expand(50))
    assert torch.equal(u, mixtures.aside(one, 50)) and not torch.equal(u, mixtures.aside(one, 50, seed=1))


def test_nothing_stands_aside_of_the_gradient_itself(g):
    with pytest.raises(ValueError, match=r"0\.90"):
        mixtures.aside(behaviour(g, cosine=0.9), 2)
    with pytest.raises(ValueError, match="zero"):
        mixtures.aside(Steered(torch.zeros(8), torch.ones(8), torch.ones(3, 8)), 2)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_a_push_moves_log_odds_by_so_many_nats_and_has_its_rho(g, rho):
    one = behaviour(g)
    b = mixtures.push(one, mixtures.aside(one, 1)[0], rho, 5.0)
    assert float(one.gradient @ b) == pytest.approx(5)
    assert float(torch.cosine_similarity(b, one.vector, dim=0)) == pytest.approx(rho, abs=1e-9)


def test_a_vector_that_does_not_steer_and_a_rho_that_is_none_are_refused(g):
    one = behaviour(g)
    with pytest.raises(ValueError, match="does not steer"):
        mixtures.push(one._replace(gradient=-one.gradient), one.vector, 0.5, 5.0)
    with pytest.raises(ValueError, match=r"1\.2"):
        mixtures.push(one, one.vector, 1.2, 5.0)


def test_pushed_moments_are_those_of_pushed_rows(g):
    rows, b = torch.randn(200, 32, generator=g).double(), torch.randn(32, generator=g).double()
    found, naive = Change.of(rows).pushed(b), Change.of(rows + b)
    assert torch.allclose(found.mean, naive.mean) and torch.allclose(found.moment, naive.moment)
    v = torch.randn(1, 32, generator=g)
    mine = overlap.energy(v, found.components[:4])
    assert mine == pytest.approx(overlap.energy(v, overlap.principal(rows + b, 4)))


def test_other_pairs_show_the_vector_with_its_noise(g):
    one = behaviour(g)
    again = torch.stack([x.vector for x in one.again(300, 0)])
    assert torch.allclose(again.mean(0), one.vector, atol=0.1)
    assert float(again.var(0).mean() * 40) == pytest.approx(float(one.pairs.var(0).mean()), rel=0.1)


def test_pairs_whose_resamplings_do_not_steer_are_refused(g):
    noise = torch.randn(40, 32, generator=g).double()
    blind = Steered(noise.mean(0), -noise.mean(0), noise)
    assert not blind.steers
    with pytest.raises(ValueError, match="tells nothing apart"):
        list(blind.again(20, 0))


def test_a_share_of_the_ruler_is_linear_between_its_ends():
    ruler = mixtures.Ruler(np.array([0.0, 1.0]), np.array([[0.1, 0.9], [0.1, 0.9], [0.0, 0.7]]), np.zeros(3))
    assert ruler.share(0.1) == pytest.approx(0) and ruler.share(0.9) == pytest.approx(1)
    assert ruler.share(0.5) == pytest.approx(0.5) and ruler.share(-0.7) == pytest.approx(-1)


ONE = mixtures.Sizes(1, 1)


def test_measures_say_yes_of_the_same_and_no_of_another(g):
    one = behaviour(g)
    unrelated = Change.of(0.01 * torch.randn(500, 32, generator=g))
    u = mixtures.aside(one, 1)[0]
    same, other = (unrelated.pushed(mixtures.push(one, u, rho, 5.0)) for rho in (1.0, 0.0))
    for name in mixtures.MEASURES:
        assert mixtures.measure(name, same, one, ONE) > 0.98
        assert abs(mixtures.measure(name, other, one, ONE)) < 0.05
        if name != mixtures.CAUSE:
            assert mixtures.beyond(name, unrelated, [unrelated], one, ONE) == 0


def test_a_change_alone_has_no_mean_and_the_same_spread(g):
    rows = torch.randn(300, 8, generator=g).double() + 3
    signs = torch.where(torch.arange(300) % 2 == 0, 1.0, -1.0)[:, None]
    alone, naive = Change.of(rows).alone(), Change.of(rows * signs)
    assert not alone.mean.any() and torch.allclose(alone.moment, naive.moment)


@pytest.mark.parametrize("count", [1, 8])
def test_a_ruler_orders_rho_says_yes_and_no_and_excludes(g, count):
    chance = [Change.of(0.05 * torch.randn(400, 32, generator=g)) for _ in range(count)]
    found = mixtures.ruler(mixtures.MEAN, chance, behaviour(g), 5.0, ONE, draws=20)
    assert found.values.shape == (20 * count, 5) and found.orders == 1
    low, high = found.read(float(np.median(found.values[:, 2])))
    assert 0.25 < low < 0.5 < high < 0.75
    assert found.read(9.0) == (1, 1) and found.read(-9.0) == (0, 0)
    assert found.read(0.2, 0.6).low == found.read(0.2).low and found.read(0.2, 0.6).high == found.read(0.6).high
    missed, invented = mixtures.faults([found, found])
    assert missed.shape == (2,) and missed.max() <= 0.05 and invented.max() <= 0.15
    parts = found.parts()
    assert len(parts) == max(count, 2) and sum(len(b.values) for _, b in parts) == 20 * count
    assert all(len(a.values) + len(b.values) == 20 * count for a, b in parts)
    if count > 2:
        assert all(not set(a.which) & set(b.which) for a, b in parts)
    said = mixtures.sayings([found])
    assert np.allclose(sum(said.values()), 1) and said[mixtures.SAME][-1] == pytest.approx(1 - missed[0])


def test_verdicts_are_those_of_the_rule():
    for given, wanted in {
        (0.6, 1.0): mixtures.SAME,
        (0.1, 0.9): mixtures.RELATED,
        (0.0, 0.4): mixtures.DIFFERENT,
        (0.0, 0.6): mixtures.UNDECIDED,
    }.items():
        assert mixtures.Rhos(*given).verdict == wanted


def test_a_measure_that_knows_nothing_does_not_order_and_decides_nothing():
    noise = np.random.default_rng(0).normal(size=(400, 6))
    blind = mixtures.Ruler(np.linspace(0, 1, 6), noise, np.zeros(400))
    assert blind.orders == pytest.approx(0.5, abs=0.05)
    assert blind.read(0.0) == (0.0, 1.0)
    missed, invented = mixtures.faults([blind])
    assert missed[0] > 0.9 and invented[0] < 0.1
