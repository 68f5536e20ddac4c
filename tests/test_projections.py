"""Leaning latents and feigned positives: silent where nothing is planted, exact where something is."""

import numpy as np
import pytest
import torch
from test_decompose import sae_of

from helpers import stats
from helpers.sae import decompose, projections


def sides(pairs=40, latents=300, planted=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    level = torch.rand(latents, generator=g) * 5
    pos, neg = ((torch.randn(pairs, latents, generator=g) + level - 3).relu() for _ in range(2))
    neg[:, :planted] += 2.0
    pos[:, planted : 2 * planted] += 1e-3
    return pos, neg


def test_half_of_the_latents_lean_to_the_negative_side_when_nothing_does():
    result = projections.negative(*sides())
    low, high = stats.band(result.null)
    assert abs(result.share - 0.5) < 0.12 and low < result.share < high
    assert result.reliable < 0.02 and result.reliable_null.max() < 0.05


def test_planted_negative_latents_are_seen_and_counted():
    result = projections.negative(*sides(planted=100))
    assert result.share > stats.reach(result.null)
    assert result.reliable > max(0.2, stats.reach(result.reliable_null))
    assert result.active <= 300 and (result.difference[:100] < 0).all()
    assert result.weight > 0.6 and result.raised < 0.1
    turned = projections.negative(*reversed(sides(planted=100)))
    assert turned.weight == pytest.approx(1 - result.weight) and turned.raised == result.reliable


def test_a_negative_latent_shows_as_a_positive_one_that_is_aligned_against_it():
    rows = torch.eye(20)
    rows[1, 0], rows[1, 1] = -0.8, 0.6  # opposed to latent 0
    sae = sae_of("topk", rows, k=3, rescale_acts_by_decoder_norm=False)
    difference = torch.zeros(20)
    difference[0], difference[5], difference[7] = -4.0, 3.0, -1.0
    (only,) = projections.spurious(sae, difference @ rows, difference)
    assert only[:5] == (1, pytest.approx(3.2), 0.0, 0.0, 0) and only.cosine == pytest.approx(-0.8)
    assert only.share == pytest.approx(1.0)  # all of 3.2 comes from -4 times -0.8
    assert projections.spurious(sae, 3 * rows[5], difference) == []
    # a positive code that no lowered latent is opposed to has no source; nor has any when nothing is lowered
    (alone,) = projections.spurious(sae, 2 * rows[9], difference)
    assert alone.latent == 9 and alone.source == -1 and np.isnan(alone.share)
    assert [s.source for s in projections.spurious(sae, 2 * rows[9], difference.clamp_min(0))] == [-1]


@pytest.mark.parametrize("centred", [True, False])
def test_the_account_of_a_pre_code_adds_up_and_names_what_was_planted(centred):
    rows = torch.eye(20)
    rows[1, 0], rows[1, 1] = -0.8, 0.6  # opposed to latent 0
    b_enc, b_dec = torch.linspace(-1, 1, 20), torch.linspace(0.5, -0.5, 20)
    sae = sae_of("standard", rows, b_enc, b_dec, apply_b_dec_to_input=centred)
    difference = torch.zeros(20)
    difference[[0, 1, 5, 7]] = torch.tensor([-4.0, -0.5, 3.0, -1.0])
    v = difference @ rows + 0.3 * torch.randn(20)
    found = projections.account(sae, v, difference, 1, n=1)
    (part,) = found.parts
    assert part == (0, -4.0, pytest.approx(-0.8), pytest.approx(3.2))
    assert found.raised == 0 and found.lowered == pytest.approx(-0.5)  # its own, -0.5 times 1
    whole = found.bias + sum(p.adds for p in found.parts) + found.raised + found.lowered + found.rest
    assert whole == pytest.approx(found.total, abs=1e-12)
    assert found.total == pytest.approx(float(decompose.pre_codes(sae, v[None])[0, 1]), abs=1e-5)
    assert found.code == pytest.approx(max(found.total, 0), abs=1e-5)
    zero = float(decompose.pre_codes(sae, torch.zeros(1, 20))[0, 1])
    assert found.bias == pytest.approx(zero, abs=1e-5)


def test_an_account_adds_up_in_a_crowded_dictionary_with_any_number_of_names():
    g = torch.Generator().manual_seed(0)
    sae = sae_of(
        "topk", torch.randn(80, 30, generator=g), torch.randn(80, generator=g), k=5, rescale_acts_by_decoder_norm=True
    )
    difference = torch.randn(80, generator=g) * (torch.rand(80, generator=g) < 0.3)
    v = torch.randn(30, generator=g)
    for latent, n in ((3, 0), (4, 5), (11, 80)):
        found = projections.account(sae, v, difference, latent, n)
        assert len(found.parts) == min(n, int((difference != 0).sum()))
        whole = found.bias + sum(p.adds for p in found.parts) + found.raised + found.lowered + found.rest
        assert whole == pytest.approx(found.total, abs=1e-9)
        assert found.total == pytest.approx(float(decompose.pre_codes(sae, v[None])[0, latent]), abs=1e-4)
        assert [abs(p.adds) for p in found.parts] == sorted((abs(p.adds) for p in found.parts), reverse=True)


@pytest.mark.parametrize(
    "codes,message",
    [
        (torch.ones(1, 4), "2 pairs or more"),
        (torch.zeros(3, 4), "no latent is active"),
        (torch.ones(4), "2 pairs or more"),
    ],
)
def test_codes_that_cannot_be_compared_are_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        projections.negative(codes, codes)


def test_one_pair_that_leans_is_a_share_and_nothing_reliable():
    pos, neg = torch.zeros(12, 30), torch.zeros(12, 30)
    pos[:, :15], neg[3, 15:] = 1.0, 1.0
    found = projections.negative(pos, neg, draws=100)
    assert found.share == 0.5 and found.reliable == 0


def test_several_vectors_are_read_one_by_one_with_shuffles_of_their_own():
    sae = sae_of("standard", torch.nn.functional.normalize(torch.randn(50, 30), dim=1))
    pos, neg = torch.randn(12, 30) + 0.5, torch.randn(12, 30)
    one, other = projections.of_vectors(sae, [(pos, neg), (pos, neg)], draws=40)
    alone = projections.negative(sae.encode(pos), sae.encode(neg), draws=40)
    assert one.share == other.share == alone.share and np.array_equal(one.null, alone.null)
    assert not np.array_equal(one.null, other.null)


def test_differences_dealt_out_at_random_explain_a_planted_rise_only_by_luck():
    g = torch.Generator().manual_seed(2)
    rows = torch.nn.functional.normalize(torch.randn(60, 40, generator=g), dim=1)
    rows[1] = -rows[0]
    sae = sae_of("standard", rows)
    difference = 0.2 * torch.randn(60, generator=g)
    difference[0], difference[1] = -4.0, 0.0
    v = difference @ rows
    own = projections.median_share([x for x in projections.spurious(sae, v, difference) if x.latent == 1])
    found = projections.supplied(sae, v[None], [difference], 100)
    assert own > 0.9 and found.chance.shape == (100, 1) and np.nanmedian(found.chance) < 0.8
    assert found.share[0] == projections.median_share(projections.spurious(sae, v, difference))
    assert np.isnan(projections.median_share([]))
