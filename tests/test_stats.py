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


def test_slopes_are_exact_on_lines():
    m = [-1.0, 0.0, 2.0]
    lines = np.array([[3 * x + 1 for x in m], [-0.5 * x for x in m]])
    np.testing.assert_allclose(stats.slopes(lines, m), [3, -0.5])
    with pytest.raises(ValueError, match="do not fit"):
        stats.slopes(lines, [1.0])


def test_cosine_of_zero_is_zero_not_nan():
    assert stats.cosine([0.0, 0], [1.0, 0]) == 0 and stats.cosine([2.0, 0], [5.0, 0]) == 1


def test_at_level_interpolates_and_says_when_it_is_never_reached():
    assert stats.at_level([0, 1, 2], [0, 10, 30], 1.5) == 20
    assert np.isnan(stats.at_level([0, 1], [0, 1], 5))


def test_interval_formats_itself():
    assert f"{stats.Interval(1, 0.5, 2):.1f}" == "1.0 [0.5, 2.0]"
