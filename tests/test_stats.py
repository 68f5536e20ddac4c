"""Intervals against scipy and statsmodels, and by hand; nulls that are fair where nothing is there."""

import warnings

import numpy as np
import pytest
from scipy import spatial
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score
from statsmodels.stats import multitest, proportion, weightstats

from helpers import stats

RNG = np.random.default_rng(0)


# --- intervals over units ----------------------------------------------------------------------------------------------


def test_a_mean_of_units_without_skewness_has_the_t_interval():
    x = np.array([1.0, 2, 3, 5, 7, 8, 9])
    low, high = weightstats.DescrStatsW(x).tconfint_mean()
    assert stats.over(x) == pytest.approx((5, low, high))


def test_skewed_units_have_the_ends_that_halls_cubic_gives():
    x = np.array([1.0, 1, 2, 2, 3, 4, 9])
    n, skew, t = 7, scipy_stats.skew(x), scipy_stats.t.ppf(0.975, 6)
    found = stats.over(x)
    assert found.low > weightstats.DescrStatsW(x).tconfint_mean()[0]  # the tail is above
    for end, wanted in ((found.low, t), (found.high, -t)):
        u = (x.mean() - end) / x.std(ddof=1)
        cubic = u + skew * u**2 / 3 + skew**2 * u**3 / 27 + skew / (6 * n)
        assert cubic * n**0.5 == pytest.approx(wanted)
    flipped = stats.over(-x)
    assert (-flipped.high, -flipped.low) == pytest.approx((found.low, found.high))


def test_a_statistic_is_jackknifed_whole_units_at_a_time():
    rows = [RNG.normal(size=k) for k in (3, 5, 4, 6)]  # behaviours with items, not equally many
    assert stats.over(rows) == pytest.approx(stats.over([x.mean() for x in rows]))
    x = RNG.normal(2, 1, (9, 5))
    for same in (stats.over(x, np.mean), stats.over(list(x)), stats.over(list(x), np.mean), stats.over(x)):
        assert same == pytest.approx(stats.over(x.mean(1)))
    left_out = np.array([np.delete(x, i, 0).mean() ** 2 for i in range(9)])
    by_hand = stats.over(9 * x.mean() ** 2 - 8 * left_out)  # of the pseudo-values, laid around the value
    found = stats.over(x, lambda part: part.mean() ** 2)
    assert found.value == pytest.approx(x.mean() ** 2)
    assert found.high - found.value == pytest.approx(by_hand.high - by_hand.value)


def test_seeds_widen_the_interval_by_what_they_differ_beyond_the_units():
    units = np.array([1.0, 2, 3, 5, 7, 8, 9])[:, None]
    alone = stats.over(units[:, 0])
    same = stats.over(units + [0.0, 0, 0], lambda part: part.mean(0))
    assert same == pytest.approx(alone)
    for moved in ([-1.0, 1], [-1.0, 0, 1]):  # all units alike, so that nothing is taken off
        found = stats.over(units + moved, lambda part: part.mean(0))
        s = len(moved)
        arm = scipy_stats.t.ppf(0.975, s - 1) * np.std(moved, ddof=1) / s**0.5
        assert found.high - found.value == pytest.approx(np.hypot(alone.high - alone.value, arm))
    crossed = units + np.outer([1, -1, 1, -1, 1, -1, 0], [-1.0, 1])  # seeds that differ by unit alone
    found = stats.over(crossed, lambda part: part.mean(0))
    assert found.high - found.value == pytest.approx(alone.high - alone.value)


def test_clearly_skewed_units_are_warned_of_and_too_few_refused():
    with pytest.warns(UserWarning, match="take logs"):
        stats.over([1.0, 1, 1, 2, 2, 3, 40])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats.over(np.log([1.0, 1, 1, 2, 2, 3, 9]))
        assert stats.over([2.0, 2.0, 2.0]) == (2, 2, 2)
    with pytest.raises(ValueError, match="three or more"):
        stats.over([1.0, 2.0])


@pytest.mark.filterwarnings("ignore:the 7 units are skewed")
def test_intervals_cover_what_they_say():
    """The whole table, at more sizes and with its rules, is docs/verdicts.md."""
    rng = np.random.default_rng(1)
    normal = [stats.over(1 + rng.normal(size=7)) for _ in range(600)]
    assert 0.92 < np.mean([x.low <= 1 <= x.high for x in normal]) < 0.98
    two_seeds = [rng.normal(size=(7, 1)) + rng.normal(size=2) + rng.normal(size=(7, 2)) / 2 for _ in range(600)]
    found = [stats.over(x, lambda part: part.mean(0)) for x in two_seeds]
    assert 0.92 < np.mean([x.low <= 0 <= x.high for x in found]) < 0.99


# --- ratios and shares -------------------------------------------------------------------------------------------------


def test_a_ratio_ends_where_a_t_test_of_its_parts_turns():
    top, bottom = RNG.normal(1, 0.5, 9), RNG.normal(2, 0.5, 9)
    found = stats.ratio(top, bottom)
    assert found.value == pytest.approx(top.sum() / bottom.sum()) and found.low < found.value < found.high
    for end in found[1:]:
        assert scipy_stats.ttest_1samp(top - end * bottom, 0).pvalue == pytest.approx(0.05)
    assert stats.ratio(bottom * 0.3, bottom) == pytest.approx((0.3, 0.3, 0.3), abs=1e-6)


def test_a_ratio_to_nothing_is_refused():
    with pytest.raises(ValueError, match="not clear of zero"):
        stats.ratio([1.0, 2, 3], [1.0, -1, 0.1])
    with pytest.raises(ValueError, match="three or more"):
        stats.ratio([1.0, 2], [1.0, 2])


@pytest.mark.parametrize(("true", "n"), [(0, 7), (1, 56), (4, 7), (25, 50), (7, 7)])
def test_a_share_has_the_exact_interval(true, n):
    found = stats.share(np.arange(n) < true)
    low, high = proportion.proportion_confint(true, n, method="beta")
    assert found == pytest.approx((true / n, 0.0 if not true else low, 1.0 if true == n else high))
    ci = scipy_stats.binomtest(true, n).proportion_ci(method="exact")
    assert found[1:] == pytest.approx((ci.low, ci.high))


# --- nulls -------------------------------------------------------------------------------------------------------------


def test_series_without_a_jump_remember_as_much():
    x = remembering(np.random.default_rng(0), 400, 0.7)
    drawn = stats.ar1(x, 200, seed=1)
    assert drawn.shape == (200, 400) and abs(drawn.mean()) < 0.1
    rho = np.mean([np.corrcoef(row[1:], row[:-1])[0, 1] for row in drawn])
    assert rho == pytest.approx(np.corrcoef(x[1:], x[:-1])[0, 1], abs=0.05)
    assert drawn.std() == pytest.approx(x.std(), rel=0.15)


def test_p_values_count_the_value_itself():
    assert stats.p_value(5, [1, 2, 3]) == 1 / 4 and stats.p_value(2, [1, 2, 3]) == 3 / 4


def test_what_is_seen_is_what_four_in_five_studies_would_find():
    half, sd = 1.96, 1.0
    assert 1 - scipy_stats.norm.cdf(half - stats.seen(stats.Interval(0, -half, half)), scale=sd) == pytest.approx(
        0.8, abs=1e-3
    )


def test_holm_is_statsmodels_own_and_refuses_what_is_no_p_value():
    for n in (1, 2, 8):
        p = RNG.uniform(0, 0.2, n)
        np.testing.assert_allclose(stats.holm(p), multitest.multipletests(p, method="holm")[1])
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.holm([0.5, 1.2])


def test_reach_is_the_largest_draw_that_a_p_value_of_a_twentieth_leaves():
    draws = np.arange(1.0, 101)
    assert stats.reach(draws) == 96 and stats.p_value(stats.reach(draws) + 0.5, draws) < 0.05
    assert stats.p_value(stats.reach(draws), draws) > 0.05
    assert stats.band(draws) == pytest.approx((3.475, 97.525))


def test_cosines_are_scipys_and_zero_where_there_is_nothing():
    a, b = RNG.normal(size=(2, 5))
    assert stats.cosine(a, b) == pytest.approx(1 - spatial.distance.cosine(a, b))
    assert stats.cosine([0.0, 0], [1.0, 0]) == 0 and stats.cosine([2.0, 0], [5.0, 0]) == 1


def test_an_auroc_is_the_libraries_own_column_by_column_ties_counted_a_half():
    rng = np.random.default_rng(0)
    pos, neg = rng.integers(0, 4, (9, 5)).astype(np.float32), rng.integers(0, 3, (14, 5)).astype(np.float32)
    found = stats.auroc(pos, neg)
    for i in range(5):
        assert found[i] == pytest.approx(roc_auc_score([1] * 9 + [0] * 14, np.concatenate([pos[:, i], neg[:, i]])))
        assert found[i] == pytest.approx(scipy_stats.mannwhitneyu(pos[:, i], neg[:, i]).statistic / (9 * 14))
    assert stats.auroc(np.array([1.0, 2]), np.array([2.0])) == 0.25 and stats.auroc(np.zeros(3), np.zeros(4)) == 0.5


def test_an_interval_of_an_auroc_covers_is_symmetric_and_has_ends_where_the_sides_are_told_perfectly():
    for value, n, m in ((0.8, 20, 20), (0.97, 7, 30), (0.5, 3, 3)):
        one, turned = stats.auroc_interval(value, n, m), stats.auroc_interval(1 - value, m, n)
        assert one.low < value < one.high
        assert (1 - turned.high, 1 - turned.low) == pytest.approx((one.low, one.high))
    perfect = stats.auroc_interval(1.0, 20, 20)
    assert perfect.high == 1.0 and 0.85 < perfect.low < 0.95 < stats.auroc_interval(1.0, 200, 200).low
    rng, apart = np.random.default_rng(1), {0.5: 0.0, 0.85: 2**0.5 * 1.0364, 0.97: 2**0.5 * 1.8808}
    for truth, shift in apart.items():
        draws = [stats.auroc(rng.normal(shift, 1, 20), rng.normal(0, 1, 20)) for _ in range(1000)]
        inside = [low <= truth <= high for _, low, high in (stats.auroc_interval(float(x), 20, 20) for x in draws)]
        assert 0.93 <= np.mean(inside) <= 0.995


def test_at_level_interpolates_and_says_when_it_is_never_reached():
    assert stats.at_level([0, 1, 2], [0, 10, 30], 1.5) == np.interp(1.5, [0, 1, 2], [0, 10, 30]) == 20
    assert np.isnan(stats.at_level([0, 1], [0, 1], 5))


def test_interval_formats_itself():
    assert f"{stats.Interval(1, 0.5, 2):.1f}" == "1.0 [0.5, 2.0]"


# --- change points -----------------------------------------------------------------------------------------------------


def remembering(rng, n, rho):
    """A stationary series with standard deviation 1 that keeps a share rho of its last value."""
    x = rng.normal(0, (1 - rho**2) ** 0.5, n)
    x[0] /= (1 - rho**2) ** 0.5
    for now in range(1, n):
        x[now] += rho * x[now - 1]
    return x


def test_a_change_points_statistic_is_hand_arithmetic():
    x = np.array([0.0, 1, 0, 1, 0, 1, 4, 5, 4, 5, 4, 5])
    # At 6: what is left is +-1/2 and alternates, save across the jump, where it goes on doing so: rho -11/12.
    found = stats.change_point(x)
    assert found.at == 6
    assert found.statistic == pytest.approx((6 * 6 / 12) ** 0.5 * 4 / (0.5 * ((1 - 11 / 12) / (1 + 11 / 12)) ** 0.5))
    assert stats.change_point(-7 * x + 3)[:2] == pytest.approx(found[:2])
    assert stats.change_point(np.full(20, 0.1)) == (3, 0.0, 1.0)


def test_a_planted_change_of_mean_is_found_where_it_is():
    noise = np.random.default_rng(0).normal(0, 1, 60)
    found = stats.change_point(noise + np.where(np.arange(60) < 37, 0, 2.5))
    assert abs(found.at - 37) <= 1 and found.p < 0.01
    assert stats.change_point(noise) == stats.change_point(noise) and stats.change_point(noise).p > 0.05


@pytest.mark.parametrize(("n", "rho"), [(24, 0.0), (24, 0.9), (48, 0.6)])
def test_noise_with_and_without_memory_shows_no_change(n, rho):
    """Of 300 series at most 0.06 and two standard errors; shuffled values would see one in two with memory."""
    rng = np.random.default_rng(2)
    p = [stats.change_point(remembering(rng, n, rho), draws=99).p for _ in range(300)]
    assert np.mean(np.array(p) <= 0.05) < 0.06 + 2 * (0.06 * 0.94 / 300) ** 0.5


def test_p_values_count_the_value_itself_and_holm_is_hand_arithmetic():
    assert stats.p_value(5, [1, 2, 3]) == 1 / 4 and stats.p_value(2, [1, 2, 3]) == 3 / 4
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(stats.holm([0.9, 0.5]), [1.0, 1.0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.holm([0.5, 1.2])


def test_a_correlation_over_parts_is_that_of_all_their_values():
    x, y = np.random.default_rng(0).normal(size=(2, 3, 8))
    parts = [(x[:2], y[:2]), (x[2], y[2])]
    assert stats.correlation(parts) == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    assert stats.correlation([(x, 3 * x + 1)]) == pytest.approx(1)


def test_columns_dealt_out_are_the_null_of_a_diagonal():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(7, 7))
    assert stats.p_value(np.trace(noise + 2 * np.eye(7)) / 7, stats.dealt(noise + 2 * np.eye(7), 500)) < 0.01
    drawn = stats.dealt(noise, 2000)
    assert drawn.shape == (2000,) and drawn.mean() == pytest.approx(noise.mean(), abs=0.03)
    tables = rng.normal(size=(200, 7, 7))
    assert np.mean([stats.p_value(np.trace(x) / 7, stats.dealt(x, 100)) < 0.05 for x in tables]) < 0.1
    with pytest.raises(ValueError, match="a square one"):
        stats.dealt(noise[:3], 5)


def test_a_series_too_short_to_show_its_memory_is_refused():
    for series in (np.arange(11.0), np.full(20, np.nan), np.ones((4, 20))):
        with pytest.raises(ValueError, match="12 finite values"):
            stats.change_point(series)
    with pytest.raises(ValueError, match="16 finite values"):
        stats.change_point(np.arange(15.0), least=8)


def test_a_table_of_seeds_and_units_varies_over_both():
    units = np.array([1.0, 2, 3, 4])
    assert stats.over_both([units]) == stats.over(units)
    apart = stats.over_both(np.array([[0.0], [1.0], [2.0]]) + np.zeros(4))  # the seeds alone differ
    assert apart.value == 1 and apart.high - 1 == pytest.approx(4.303 / 3**0.5, rel=1e-3)
