"""Ways of averaging, beside hand arithmetic and beside the slow way to the same number."""

import numpy as np
import pytest
import torch
from test_directions import cosine, planted

from helpers import nulls
from helpers.steering import averaging
from helpers.steering import directions as d
from helpers.steering.averaging import CENTRED, MEAN, UNCENTRED


@pytest.mark.parametrize("pairs", [6, 7, 40])
def test_components_of_swapped_pairs_are_what_swapping_them_gives(pairs):
    pos, neg, _ = planted(n=pairs, width=50)
    signs = averaging.half_swapped(pairs, 5, seed=1)
    assert signs.shape == (5, pairs - pairs % 2) and (signs.sum(1) == 0).all() and len(np.unique(signs, axis=0)) > 1
    found = averaging.of_swapped(pos, neg, signs)
    for draw, sign in enumerate(torch.from_numpy(signs)):
        kept = len(sign)
        one = torch.where(sign[:, None] < 0, neg[:kept], pos[:kept])
        other = torch.where(sign[:, None] < 0, pos[:kept], neg[:kept])
        for m in (UNCENTRED, CENTRED):
            v = d.METHODS[m](one, other)
            assert found[m][draw] == pytest.approx(cosine(v, d.mean(one, other)), abs=1e-9)
        where = abs(cosine(d.pc1_uncentred(one, other), d.pc1_uncentred(pos[:kept], neg[:kept])))
        assert where == pytest.approx(1)  # swapping sides leaves it where it is
    with pytest.raises(ValueError, match="one pair"):
        averaging.half_swapped(1, 5)


def test_a_mean_that_is_long_is_found_without_centring_and_never_with_it():
    for length, follows in ((3.0, True), (0.3, False)):
        toy = averaging.planted(length)
        assert (averaging.agreement(UNCENTRED, *toy) > 0.95) == follows
        assert averaging.agreement(CENTRED, *toy) < 0.3


def test_what_steers_is_measured_beside_the_mean():
    """The slope lies along the planted direction: the mean steers, the component as far as it agrees with it."""
    pairs, slopes = {}, {}
    for i, name in enumerate("abcd"):
        for kind in ("one", "two"):
            for layer in (3, 5):
                pos, neg, axis = planted(n=12, width=30, noise=0.3, seed=10 * i + layer)
                pairs[kind, name, layer] = pos, neg
                slopes[name, layer] = axis.numpy()
    unlike = [nulls.random(torch.eye(30)[0], 40, seed=i) for i in range(len(pairs))]
    both = averaging.compare(pairs, slopes, unlike, 30, seed=0)
    assert both.cosine(UNCENTRED, layer=3).shape == (4,) and (both.cosine(UNCENTRED) > 0.9).all()
    assert both.share(MEAN).value == pytest.approx(1)
    share = both.share(UNCENTRED, "one", 3)
    expected = [float(d.pc1_uncentred(*pairs["one", n, 3]) @ torch.from_numpy(slopes[n, 3])) for n in "abcd"]
    lengths = [float(d.mean(*pairs["one", n, 3]).norm()) for n in "abcd"]
    below = both.response(MEAN, "one", 3).sum()
    assert share.value == pytest.approx(sum(e / x for e, x in zip(expected, lengths, strict=True)) / below)
    chance = both.share_by_chance(layer=3)
    assert chance.shape == (40,) and 0 < chance.mean() < 0.4 < both.share(UNCENTRED, layer=3).low
    (pos, neg), drawn = pairs["one", "a", 3], unlike[0][0]
    one = float(drawn @ torch.from_numpy(slopes["a", 3])) * np.sign(float(drawn @ d.mean(pos, neg)))
    assert both.unlike["one", "a", 3][0] == pytest.approx(one)  # the mean gives the sign
    assert both.backwards(3) == []
    assert both.cosine_by_chance(CENTRED).shape == (30,)
    assert len(both.rows()) == 2 * len(pairs) and set(both.rows()[0]) >= {"kind", "behaviour", "layer", "cosine"}
    table = both.table(3)
    assert [row[0] for row in table] == averaging.METHODS and table[0][1:] == ["1.00 [1.00, 1.00]"] * 2 + ["0 of 8"]
    down = averaging.compare(pairs, {case: -slope for case, slope in slopes.items()}, unlike, 2)
    assert down.backwards(3) == [f"{n} by {kind}" for n in "abcd" for kind in ("one", "two")]
    flat = averaging.compare(pairs, {case: 0 * slope for case, slope in slopes.items()}, unlike, 2)
    assert flat.share(UNCENTRED) is None and {row[2] for row in flat.table(3)} == {"not run"}
    torch.testing.assert_close(averaging.units([MEAN, CENTRED], pos, neg).norm(dim=1), torch.ones(2).double())


def test_cases_are_averaged_within_behaviours():
    values = {("one", "a", 0): 1.0, ("two", "a", 0): 3.0, ("one", "b", 0): 5.0, ("one", "a", 1): 9.0}
    assert averaging.by_behavior(values, layer=0).tolist() == [2, 5]
    assert averaging.by_behavior(values, "one").tolist() == [5, 5]
    assert averaging.by_behavior({case: np.full(3, x) for case, x in values.items()}).shape == (2, 3)


def test_the_sources_round_trip_is_the_mean_on_any_data():
    pos, neg, _ = planted()
    for one, other in ((pos, neg), (torch.randn(30, 24), torch.zeros(30, 24))):
        cosine_, share = averaging.round_trip(one, other)
        assert abs(cosine_ - 1) < 1e-9 and 0 < share < 1


def test_the_race_is_what_two_axes_say_when_there_are_two():
    g = torch.Generator().manual_seed(0)
    axis, m = torch.eye(6, dtype=torch.float64)[:2]
    for length in (0.5, 0.9, 1.5, 3.0):
        for overlap in (0.0, 0.6):
            mean = length * (overlap * axis + (1 - overlap**2) ** 0.5 * m)
            scatter = torch.randn(4000, 1, generator=g, dtype=torch.float64)
            scatter = (scatter - scatter.mean()) / scatter.std(correction=0)
            found = averaging.race(mean + scatter * axis, torch.zeros(4000, 6, dtype=torch.float64))
            assert found.ratio == pytest.approx(length**2) and found.overlap == pytest.approx(overlap, abs=1e-6)
            assert found.cosine == pytest.approx(float(averaging.two_axis(found.ratio, overlap)[0]), abs=1e-6)
    assert averaging.two_axis(0.9, 0.0)[0] < 1e-4 and averaging.two_axis(1.1, 0.0)[0] > 1 - 1e-9


def test_the_theory_is_drawn_over_the_races_and_exact_where_there_are_two_axes():
    races = {
        ("k", "a", i): averaging.Race(r, float(averaging.two_axis(r, 0.3)[0]), 0.3) for i, r in enumerate((0.5, 2.0))
    }
    assert averaging.theory_errors(races).max() < 1e-12
    (label, (grid, cosines)), (flat, _), (_, (_, least)) = averaging.theory(races).items()
    assert (least <= cosines + 1e-9).all() and (least <= averaging.two_axis(grid, 0.0) + 1e-9).all()
    assert "0.30" in label and "0.00" in flat and grid[0] < 0.5 and grid[-1] > 2 and len(cosines) == len(grid)
    assert averaging.as_rows(races)[1] == {"kind": "k", "behaviour": "a", "layer": 1} | races["k", "a", 1]._asdict()


def test_agreement_is_the_cosine_of_a_method_with_the_mean():
    pos, neg, _ = planted()
    assert averaging.agreement("mean", pos, neg) == pytest.approx(1)
    assert averaging.agreement("PC1 uncentred", pos, neg) == pytest.approx(
        cosine(d.pc1_uncentred(pos, neg), d.mean(pos, neg))
    )


def test_chosen_cases_are_averaged_by_behaviour_and_beat_cases_dealt_at_random():
    races = {("k", n, i): averaging.Race(0, float(i >= 2), 0) for n in "abc" for i in range(4)}
    chosen = {case: race.cosine == 1 for case, race in races.items()}
    found, null = averaging.mean_where(races, chosen, 300, 0)
    assert found == [1, 1, 1] and abs(null.mean() - 0.5) < 0.05
    none = averaging.mean_where(races, dict.fromkeys(races, False), 10, 0)
    assert none[0] == [] and len(none[1]) == 0
