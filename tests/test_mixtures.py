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
    return Steered(3 * v, cosine * v / v.norm() + (1 - cosine**2) ** 0.5 * side / side.norm())


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
        mixtures.aside(Steered(torch.zeros(8), torch.ones(8)), 2)


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


def test_measures_say_yes_of_the_same_and_no_of_another(g):
    one = behaviour(g)
    unrelated = Change.of(0.01 * torch.randn(500, 32, generator=g))
    u = mixtures.aside(one, 1)[0]
    same, other = (
        mixtures.measures(unrelated.pushed(mixtures.push(one, u, rho, 5.0)), one, 1, 1) for rho in (1.0, 0.0)
    )
    assert all(x > 0.98 for x in same.values())
    assert all(abs(x) < 0.02 for name, x in other.items() if name != mixtures.REMOVAL)
    assert other[mixtures.CAUSE] == pytest.approx(0, abs=0.02) and abs(other[mixtures.REMOVAL]) < 0.05
    none = mixtures.measures(unrelated, one, 1, 1, unrelated)
    assert all(none[name] == 0 for name in (mixtures.MEAN, mixtures.ENERGY, mixtures.SPARSE, mixtures.REMOVAL))


def test_a_curve_orders_rho_and_a_value_excludes_what_it_cannot_be(g):
    behaviors = {str(i): behaviour(g) for i in range(4)}
    unrelated = Change.of(0.05 * torch.randn(400, 32, generator=g))
    rhos = [0.0, 0.25, 0.5, 0.75, 1.0]
    found = mixtures.curve(unrelated, behaviors, rhos, 5.0, 1, 1, draws=3)
    assert found.values[mixtures.MEAN].shape == (4, 3, 5)
    assert found.orders(mixtures.MEAN) == 1
    low, high = found.rho(mixtures.MEAN, 0.5)
    assert 0.3 < low <= 0.5 <= high < 0.7
    assert np.isnan(found.rho(mixtures.MEAN, 2.0)).all()


def test_a_measure_that_knows_nothing_does_not_order(g):
    noise = np.random.default_rng(0).normal(size=(20, 10, 6))
    blind = mixtures.Curve(np.linspace(0, 1, 6), {"x": noise})
    assert blind.orders("x") == pytest.approx(0.5, abs=0.05)
    assert blind.rho("x", 0.0) == (0.0, 1.0)
