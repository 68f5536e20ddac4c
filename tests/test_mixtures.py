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
    mine = overlap.energy(v, found.components(4))
    assert mine == pytest.approx(overlap.energy(v, overlap.principal(rows + b, 4)))


def test_other_pairs_show_the_vector_with_its_noise(g):
    one = behaviour(g)
    again = torch.stack([x.vector for x in one.resampled(300, 0)])
    assert torch.allclose(again.mean(0), one.vector, atol=0.1)
    assert float(again.var(0).mean() * 40) == pytest.approx(float(one.pairs.var(0).mean()), rel=0.1)


def test_pairs_whose_resamplings_do_not_steer_are_refused(g):
    noise = torch.randn(40, 32, generator=g).double()
    blind = Steered(noise.mean(0), -noise.mean(0), noise)
    assert not blind.steers
    with pytest.raises(ValueError, match="tells nothing apart"):
        list(blind.resampled(20, 0))


def test_a_rho_is_read_off_the_mean_mixture_and_the_line_goes_on():
    values = np.array([[[0.0, 0.4, 0.6], [0.0, 0.4, 0.6]], [[0.0, 0.4, 0.6], [0.0, 0.4, 0.6]]])
    ruler = mixtures.Ruler(np.array([0.0, 0.5, 1.0]), values, np.zeros(2))
    for value, rho in ((0.0, 0.0), (0.2, 0.25), (0.4, 0.5), (0.5, 0.75), (0.6, 1.0), (-0.4, -0.5), (0.8, 1.5)):
        assert ruler.rho(value) == pytest.approx(rho)


def test_redrawn_changes_have_the_spread_and_means_as_long_elsewhere(g):
    one = Change.of(torch.randn(500, 32, generator=g) + 0.5)
    found = list(one.redrawn(40, 0))
    lengths = torch.stack([c.mean.norm() for c in found])
    assert torch.allclose(lengths, one.mean.norm().expand(40))
    spread = one.moment - torch.outer(one.mean, one.mean)
    assert torch.allclose(found[0].moment - torch.outer(found[0].mean, found[0].mean), spread)
    cosines = torch.stack([torch.cosine_similarity(c.mean, one.mean, dim=0) for c in found])
    assert abs(float(cosines.mean())) < 0.1 and cosines.abs().max() < 0.9


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


def chances(g, count, d=32):
    """Changes by chance: each with a mean of its own."""
    return [Change.of(0.05 * (torch.randn(400, d, generator=g) + torch.randn(d, generator=g))) for _ in range(count)]


def test_a_ruler_orders_rho_says_yes_and_no_and_excludes(g):
    one, chance = behaviour(g, 256), chances(g, 10, 256)
    found = mixtures.ruler(mixtures.MEAN, chance, one, 5.0, ONE, draws=8)
    assert found.values.shape == (10, 8, 5) and found.orders == 1 and found.accepted
    low, high = found.read(float(found.values[:, :, 2].mean()))
    assert 0.25 < low < 0.5 < high < 0.75
    assert found.read(9.0) == (1, 1) and found.read(-9.0) == (0, 0)
    said = mixtures.verdict_shares([found])
    assert np.allclose(sum(said.values()), 1)
    assert said[mixtures.SAME][-1] > 0.95 and said[mixtures.SAME][0] + said[mixtures.RELATED][0] < 0.05


def test_the_rule_rarely_calls_chance_related_however_large_the_shift_it_is_read_at(g):
    """A push dilutes a change by chance, so that mixtures alone would call one without a push related."""
    for nats in (0.5, 2.0, 8.0):
        wrong = []
        for i in range(12):
            one, chance = behaviour(g), chances(g, 15)
            ruler = mixtures.ruler(mixtures.MEAN, chance[:14], one, nats, ONE, draws=4, seed=100 * i)
            value = mixtures.beyond(mixtures.MEAN, chance[14], chance[:14], one, ONE)
            wrong.append(ruler.read(value).low > 0)
            assert 0 <= ruler.by_chance() <= 0.3
        assert np.mean(wrong) <= 0.1


def test_errors_are_those_of_changes_the_ruler_was_made_without(g):
    rulers = [mixtures.ruler(mixtures.MEAN, chances(g, 10), behaviour(g), 5.0, ONE, draws=4) for _ in range(3)]
    assert np.mean([r.errors for r in rulers]) < 0.1 and all(r.accepted == (max(r.errors) <= 0.05) for r in rulers)
    assert len(mixtures.faults(rulers)) == 4 == len(mixtures.faults([])) and mixtures.faults(rulers)[3].endswith("of 3")
    less = rulers[0].without(2)
    assert less.values.shape == (9, 4, 5) and len(less.alone) == 9
    assert np.array_equal(less.values[2], rulers[0].values[3])


def test_a_ruler_too_coarse_for_its_shift_tells_nothing_apart(g):
    values = np.linspace(0, 0.1, 5) + 0.2 * torch.randn(6, 4, 5, generator=g).numpy()
    assert not mixtures.Ruler(np.linspace(0, 1, 5), values, values[:, 0, 0]).accepted
    strong = Change.of(torch.randn(50, 32, generator=g) + 5)
    with pytest.raises(ValueError, match="0 changes by chance"):
        mixtures.ruler(mixtures.MEAN, [strong] * 5, behaviour(g), 1e-3, ONE)


def test_what_a_change_by_chance_does_itself_counts_towards_the_shift(g):
    one = behaviour(g)
    (b,) = chances(g, 1)
    own = float(one.gradient @ b.mean)
    u = mixtures.aside(one, 1)[0]
    mixed = b.pushed(mixtures.push(one, u, 0.5, 5.0 - own))
    assert float(one.gradient @ mixed.mean) == pytest.approx(5.0)


def test_verdicts_are_those_of_the_rule():
    for given, wanted in {
        (0.6, 1.0): mixtures.SAME,
        (0.1, 0.9): mixtures.RELATED,
        (0.0, 0.4): mixtures.NOT_SAME,
        (0.0, 0.6): mixtures.UNDECIDED,
    }.items():
        assert mixtures.Rhos(*given).verdict == wanted


def test_a_measure_that_knows_nothing_does_not_order_and_decides_nothing():
    noise = np.random.default_rng(0).normal(size=(20, 20, 6))
    blind = mixtures.Ruler(np.linspace(0, 1, 6), noise, noise[:, 0, 0])
    assert blind.orders == pytest.approx(0.5, abs=0.05)
    assert blind.read(0.0) == (0.0, 1.0)
    assert blind.errors[0] > 0.9 and blind.errors[1] < 0.05 and not blind.accepted


def test_without_takes_out_what_lies_along(g):
    x, v = torch.randn(3, 2, 8, generator=g).numpy(), torch.randn(3, 1, 8, generator=g).numpy()
    found = mixtures.without(x, v)
    assert np.abs((found * v).sum(-1)).max() < 1e-5
    assert np.allclose(mixtures.without(found, v), found, atol=1e-6)


def test_a_value_and_its_ruler_leave_out_the_same_changes_by_chance(g):
    one, chance = behaviour(g), chances(g, 6)
    strong = chance[0].pushed(10 * one.gradient)
    assert mixtures.mild([strong, *chance], one, 5.0) == chance
    rulers = [mixtures.ruler(mixtures.MEAN, x, one, 5.0, ONE, draws=2) for x in (chance, [*chance, strong])]
    assert np.array_equal(rulers[0].values, rulers[1].values) and np.array_equal(rulers[0].alone, rulers[1].alone)
    assert mixtures.level(mixtures.MEAN, [], one, ONE) == 0
