"""Intervals that cover, slopes that are exact, nulls that are fair."""

import numpy as np
import pytest

from helpers import stats


def test_bootstrap_interval_covers_the_mean_about_95_percent_of_the_time():
    rng = np.random.default_rng(0)
    inside = [
        (lambda i: i.low <= 1.0 <= i.high)(stats.bootstrap(rng.normal(1, 2, 50), draws=500, seed=k)) for k in range(300)
    ]
    assert 0.89 < np.mean(inside) < 0.98


def test_bootstrap_is_reproducible_takes_a_statistic_and_refuses_one_value():
    x = np.arange(30.0)
    assert stats.bootstrap(x, seed=1) == stats.bootstrap(x, seed=1) != stats.bootstrap(x, seed=2)
    assert stats.bootstrap(x, np.median).value == 14.5
    with pytest.raises(ValueError, match="two or more"):
        stats.bootstrap([1.0])


def test_cosine_of_zero_is_zero_not_nan():
    assert stats.cosine([0.0, 0], [1.0, 0]) == 0 and stats.cosine([2.0, 0], [5.0, 0]) == 1


def test_at_level_interpolates_and_says_when_it_is_never_reached():
    assert stats.at_level([0, 1, 2], [0, 10, 30], 1.5) == 20
    assert np.isnan(stats.at_level([0, 1], [0, 1], 5))


def test_interval_formats_itself():
    assert f"{stats.Interval(1, 0.5, 2):.1f}" == "1.0 [0.5, 2.0]"


def test_a_planted_change_of_mean_is_found_where_it_is_and_none_is_seen_in_noise():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 60)
    stepped = noise + np.where(np.arange(60) < 37, 0, 2.5)
    found = stats.change_point(stepped)
    assert abs(found.at - 37) <= 1 and found.p < 0.01
    assert np.mean([stats.change_point(rng.normal(0, 1, 60), draws=200).p < 0.05 for _ in range(100)]) < 0.15
    by_hand = np.array([0.0, 0, 0, 1, 1, 1])  # at 3: sqrt(9 / 6) * 1 / 0.5
    assert stats.change_point(by_hand).at == 3 and stats.change_point(by_hand).statistic == pytest.approx(
        np.sqrt(1.5) * 2
    )
    with pytest.raises(ValueError, match="6 finite values"):
        stats.change_point([1.0, 2, 3])


def test_a_mean_of_intervals_adds_half_widths_in_quadrature():
    mean = stats.mean_of([stats.Interval(1, 0.7, 1.3), stats.Interval(3, 2.6, 3.4)])
    assert mean == pytest.approx((2.0, 2 - 0.25, 2 + 0.25))


def test_an_interval_laid_around_a_point_holds_it_however_skewed_the_draws():
    skewed = np.r_[np.zeros(990), np.ones(10)]
    assert stats.centred(0.0, skewed) == (0.0, pytest.approx(-0.01), 0.0)


def test_p_values_count_the_value_itself_and_holm_is_hand_arithmetic():
    assert stats.p_value(5, [1, 2, 3]) == 1 / 4 and stats.p_value(2, [1, 2, 3]) == 3 / 4
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(stats.holm([0.9, 0.5]), [1.0, 1.0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.holm([0.5, 1.2])


def test_a_table_of_seeds_and_units_varies_over_both():
    units = np.array([1.0, 2, 3, 4])
    assert stats.over_both([units]) == stats.over(units)
    apart = stats.over_both(np.array([[0.0], [1.0], [2.0]]) + np.zeros(4))  # the seeds alone differ
    assert apart.value == 1 and apart.high - 1 == pytest.approx(4.303 / 3**0.5, rel=1e-3)
