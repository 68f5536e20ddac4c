"""Planted new latents come first, what pushes is found, and every null and interval does what it says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, ttest_ind

from helpers import stats
from helpers.pair import matching, rankings
from helpers.pair.rankings import Top
from helpers.sae.activations import Array
from helpers.stats import p_value

N, D = 40, 16


class Toy(torch.nn.Module):
    """A dictionary of latents that read and write their own direction; `bias` keeps a latent silent below it."""

    def __init__(self, rows, bias=0.0):
        super().__init__()
        self.W_dec, self.W_enc = torch.nn.Parameter(rows), torch.nn.Parameter(rows.T.clone())
        self.cfg = SimpleNamespace(d_in=rows.shape[1], d_sae=len(rows))
        self.bias, self.device = bias, "cpu"

    def encode(self, x):
        return torch.relu(x @ self.W_enc - self.bias)

    def decode(self, codes):
        return codes @ self.W_dec


def test_living_latents_are_those_that_fire_with_their_rows_columns_and_norms():
    sae = Toy(torch.diag(torch.arange(1.0, 5.0)))
    found = rankings.alive(sae, torch.tensor([0.5, 0.0, 0.25, 0.1]).double(), 100)
    assert found.ids.tolist() == [0, 2, 3] and found.fired.tolist() == pytest.approx([50, 25, 10])
    assert torch.equal(found.rows, sae.W_dec[found.ids]) and torch.equal(found.columns, sae.W_enc.T[found.ids])
    assert found.side.encoder_norms.tolist() == [0.25, 0.75, 1.0]  # of the largest of all


def test_a_planted_new_latent_is_ranked_first_and_silent_or_unused_ones_are_not_ranked(cache):
    rows = torch.eye(D)
    old, new = torch.rand(400, D), torch.rand(400, D) + 0.1
    old[:, 3] = 0  # what latent 3 writes is not in the old model
    sae = Toy(rows)
    one = rankings.alive(Toy(rows), torch.ones(D).double(), 400)
    frequency = torch.ones(D).double()
    frequency[5] = 0.01  # fires on four tokens
    other = rankings.alive(sae, frequency, 400)
    found = rankings.ranked(sae, other, one, matching.match(rows, rows), new, old, least_fired=50)
    assert 5 not in found.ids and len(found.ids) == D - 1 and found.of == D
    assert found.ids[rankings.top(found.by["latent scaling"], 1)].tolist() == [3]
    assert np.allclose(np.linalg.norm(found.rows, axis=1), 1) and "encoder norm, wrong way" not in found.by
    assert len(rankings.ranked(sae, other, one, matching.match(rows, rows), new, old, 500).ids) == 0
    drawn = rankings.drawn(found.by["latent scaling"], 4, 6, seed=1)
    assert len(set(drawn.tolist())) == 6
    assert not set(drawn) & set(rankings.top(found.by["latent scaling"], 4))
    assert len(rankings.drawn(found.by["latent scaling"], 10, 60)) == D - 1 - 10


def test_likeness_is_the_mean_cosine_of_pairs():
    rows = np.random.default_rng(0).normal(size=(7, D))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert rankings.likeness(rows) == pytest.approx((rows @ rows.T)[~np.eye(7, dtype=bool)].mean())


def test_push_follows_the_behaviours_that_moved_and_ignores_the_others():
    rng = np.random.default_rng(0)
    rows, gradients = rng.normal(size=(N, D)), {n: rng.normal(size=D) for n in ("moved", "still", "fell")}
    found = rankings.push(rows, gradients, {"moved": 2.0, "still": 0.0, "fell": 0.0})
    assert np.corrcoef(found, rows @ gradients["moved"])[0, 1] == pytest.approx(1) and found.std() == pytest.approx(1)
    assert np.allclose(found, rankings.push(rows, {n: 7 * g for n, g in gradients.items()}, {"moved": 1.0, "still": 0}))
    assert np.allclose(rankings.push(rows, gradients, {"fell": -1.0}), -rankings.push(rows, gradients, {"fell": 1.0}))


def test_the_change_of_codes_is_what_the_decoder_writes_of_it():
    sae, before, after = Toy(torch.randn(24, D)), torch.randn(300, D), torch.randn(300, D)
    by_hand = (sae.encode(after) - sae.encode(before)).double().mean(0) @ sae.W_dec.double()
    assert torch.allclose(rankings.change_of_codes(sae, before, after, batch=64), by_hand, atol=1e-6)


def test_the_top_of_a_ranking_is_compared_with_the_controls_top():
    """The interval is Welch's, but for the degrees of freedom; random tops give the null around zero."""
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=300), rng.normal(size=280)
    tops = [Top(one, np.arange(30)), Top(other, np.arange(50))]
    found = rankings.beyond(tops)
    assert found.value == pytest.approx(one[:30].mean() - other[:50].mean())
    welch = ttest_ind(one[:30], other[:50], equal_var=False).confidence_interval(0.95)
    assert found.high - found.low == pytest.approx(welch.high - welch.low, rel=0.03)
    null = rankings.by_chance(tops, 400, seed=2)
    assert abs(null.mean() - (one.mean() - other.mean())) < 0.05 and p_value(found.value, null) > 0.01
    best = [Top(one, rankings.top(one, 30)), tops[1]]
    assert p_value(rankings.beyond(best).value, null) == pytest.approx(1 / 401)
    alone = rankings.beyond(tops[:1])
    assert alone.value == pytest.approx(one[:30].mean() - one.mean())
    assert abs(rankings.by_chance(tops[:1], 400).mean()) < 0.05


def test_saes_of_several_seeds_are_matched_two_by_two(cache):
    rows = torch.linalg.qr(torch.randn(D, D)).Q
    other = rows[torch.randperm(D)].clone()
    other[0] = torch.randn(D)
    silent = torch.cat([rows, 100 * torch.eye(D)[:1]])
    samples = Array(torch.rand(300, D) @ rows, model_name="toy")
    some = [Toy(x, bias) for x, bias in ((rows, 0.0), (other, 0.0), (silent, torch.tensor([0.0] * D + [1e6])))]
    found = rankings.between(some, samples)
    assert list(found) == [(0, 1), (0, 2), (1, 2)] and all(len(x) == D for x in found.values())
    assert found[0, 2].min() > 0.999 and (found[0, 1] > 0.999).sum() == (found[1, 2] > 0.999).sum() == D - 1
    floor = rankings.between(some, samples, turned=True)
    high, low = (rankings.of_pairs({k: float(x.mean()) for k, x in one.items()}).value for one in (found, floor))
    assert list(floor) == list(found) and high > 0.9 > 0.8 > low


def test_the_interval_of_pairs_is_over_what_they_are_pairs_of():
    """Values of pairs are sums over their seeds: the mean is that of the seeds, twice, and so is its t interval."""
    effects = np.random.default_rng(0).normal(size=6)
    found = rankings.of_pairs({(i, j): effects[i] + effects[j] for i in range(6) for j in range(i)})
    alone = stats.over(2 * effects)
    assert found.value == pytest.approx(2 * effects.mean())
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=1e-9)
    three = rankings.of_pairs({(0, 1): 0.5, (0, 2): 0.6, (1, 2): 0.7})
    assert three.low < 0.6 < three.high
    with pytest.raises(ValueError, match="three or more"):
        rankings.of_pairs({(0, 1): 0.5})


def test_correlations_are_within_a_fine_tune_and_over_behaviours():
    """Two fine-tunes that differ in their mean alone would correlate if their points were pooled."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(9, 2, 2))
    points[:, 1] += 10
    found = rankings.correlation(points)
    each = [pearsonr(*points[:, k].T).statistic for k in (0, 1)]
    assert found.value == pytest.approx(np.tanh(np.arctanh(each).mean())) and -1 < found.low < found.high < 1
    assert np.corrcoef(points.reshape(-1, 2).T)[0, 1] > 0.9 and p_value(found.value, rankings.dealt(points, 200)) > 0.02
    points[..., 0] = 3 * points[..., 1] + 0.1 * rng.normal(size=(9, 2))
    assert rankings.correlation(points).low > 0.9
    assert p_value(rankings.correlation(points).value, rankings.dealt(points, 200)) < 0.02
    points[:, 0, 0] = 1.0  # nothing predicted
    assert np.isfinite(rankings.correlation(points)).all()
    with pytest.raises(ValueError, match="four or more"):
        rankings.correlation(points[:3])


def sides(n=400, extra=0, seed=0):
    """Two SAEs of one model and one of another, matched as they stand; the other has `extra` longer encoder columns."""
    g = torch.Generator().manual_seed(seed)
    made = [matching.Side(torch.rand(n, generator=g, dtype=torch.float64), torch.ones(n)) for _ in range(3)]
    made[2].encoder_norms[:extra] += 3
    rows = torch.randn(n, 8, generator=g)
    return made, matching.match(rows, rows)


def test_the_largest_norm_differences_stand_out_where_some_are_planted_and_not_where_none_is():
    for extra, low, high in ((0, 0.85, 1.15), (20, 2.0, 6.0)):
        (second, base, chat), found = sides(extra=extra)
        gaps = np.stack([rankings.norm_gaps(found, second, side) for side in (chat, base)], 1)
        ratio = rankings.largest(gaps, 20)
        assert low < ratio.value < high and ratio.low < ratio.value < ratio.high
        p = p_value(ratio.value, rankings.exchanged(gaps, 20, 200))
        assert p < 0.02 if extra else p > 0.05
    top = np.sort(gaps, axis=0)[-20:].mean(0)
    assert ratio.value == pytest.approx(top[0] / top[1])
    gaps[:5] = np.nan  # latents without a partner
    assert np.isfinite(rankings.largest(gaps, 20)).all()


def test_the_interval_of_the_largest_covers_what_new_samples_give():
    """One that resamples those chosen once would be too narrow."""
    rng = np.random.default_rng(0)
    found = [rankings.largest(rng.exponential(size=(200, 2)), 20) for _ in range(200)]
    assert np.mean([x.low < 1 < x.high for x in found]) > 0.9


def test_norm_differences_go_with_the_latents_of_A():
    rows = torch.randn(6, 8)
    found = matching.match(rows[:4], rows[torch.tensor([3, 1, 0, 2, 5, 4])])
    A, B = (matching.Side(torch.arange(float(n)), torch.ones(n)) for n in (4, 6))
    assert rankings.norm_gaps(found, A, B).tolist() == [2, 0, 1, -3]
    assert np.isnan(rankings.norm_gaps(matching.turned(found), B, A)).sum() == 2


def test_a_ranking_is_found_again_by_itself_and_not_by_random_partners():
    (A, _, B), found = sides(extra=0)
    rightly = matching.norm_excess(found, A, B).numpy()
    assert rankings.found_again(rightly, rightly, 30).all()
    assert not rankings.found_again(rightly, -rightly, 30).any()
    null = rankings.random_partners(rightly, A, B, 30, 200)
    assert null.shape == (200,) and 0 < null.mean() < 0.6  # the longest are on top whatever the partner


def test_marked_tokens_and_the_share_of_firing_on_them(bpe):
    pieces = ["\n", "*", "a", " -", "b", "\n\n"]
    ids = torch.tensor([[bpe(p, add_special_tokens=False)["input_ids"][0] for p in pieces]])
    rows = torch.tensor([[1.0, 0], [1, 0], [1, 1], [0, 1], [0, 0], [0, 0]])
    samples = SimpleNamespace(
        token_rows=lambda: (ids, torch.zeros(6, dtype=torch.long)),
        named=lambda name: torch.arange(6),
        rows=lambda index: rows[index],
    )
    marked = rankings.like(samples, bpe, r".*\n.*|\s*[*#|-]+\s*")
    assert marked[[0, 1, 2, 4]].tolist() == [True, True, False, False] and bool(marked[5])
    share = rankings.share_of_firing(Toy(torch.eye(3)[:, :2], bias=0.5), samples, marked, batch=4)
    assert share.tolist() == pytest.approx([2 / 3, float(marked[3]) / 2, 0])
