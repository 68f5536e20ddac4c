"""Families of latents: against plain computations; a planted hierarchy is found, over seeds and widths, and noise is not."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from test_decompose import sae_of, unit

from helpers import claims, features, stats
from helpers.sae import activations, families
from helpers.sae.latents import Context, Latent


def dense(found):
    table = np.zeros((found.tokens, found.latents))
    table[found.token, found.latent] = 1
    return table


def judged(rule, value, null):
    ledger = claims.Ledger()
    ledger.state("x", "s", rule, source="s", unit="u", over="SAEs", null="n")
    return ledger.judge("x", value, null).verdict


def test_firing_together_is_the_correlation_of_what_fired():
    found = families.planted(3, 4, 500, seed=2).fired
    np.testing.assert_allclose(families.together(found), np.corrcoef(dense(found).T), atol=1e-9)


def test_what_fires_is_what_the_sae_encodes_and_halves_are_numbered_from_their_start():
    rows = unit(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)))
    sae = sae_of("topk", rows, k=4, rescale_acts_by_decoder_norm=False)
    x = activations.Array(torch.randn(50, 16))
    found = families.fired(sae, x, 20, 50, batch=7)
    np.testing.assert_array_equal(dense(found), (sae.encode(x.tensor[20:]) != 0).numpy())
    some = found.only(np.array([5, 2, 30]))
    np.testing.assert_array_equal(dense(some), dense(found)[:, [5, 2, 30]])


def test_shuffled_codes_fire_as_often_and_have_nothing_to_do_with_one_another():
    found = families.planted(8, 4, 3000, seed=1)
    mixed = found.fired.shuffled(0)
    np.testing.assert_array_equal(mixed.counts(), found.fired.counts())
    assert dense(mixed).max() == 1 and dense(mixed).sum() == len(mixed.token)
    labels = families.clusters(families.together(mixed), 8)
    assert abs(families.agreement(labels, found.family)) < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_planted_trees_are_found_and_random_ones_are_not(seed):
    tree, random = (families.planted(12, 5, 6000, seed=seed, random=r) for r in (False, True))
    np.testing.assert_allclose(random.fired.counts().mean(), tree.fired.counts().mean(), rtol=0.1)
    for family in (families.clusters(families.together(tree.fired), 12), families.by_decoder(tree.rows, 12)):
        assert families.agreement(family, tree.family) > 0.9
    for family in (families.clusters(families.together(random.fired), 12), families.by_decoder(random.rows, 12)):
        assert families.agreement(family, random.family) < 0.1


def test_clusters_are_at_most_so_many_and_agreement_does_not_mind_names():
    alike = np.kron(np.eye(3), np.ones((4, 4)))
    found = families.clusters(alike, 3)
    assert len(set(found)) == 3 and families.agreement(found, np.repeat([7, 1, 4], 4)) == 1
    assert families.agreement(found, np.tile([0, 1, 2, 3], 3)) < 0


def test_the_rule_of_stable_families_passes_a_plant_and_refuses_noise():
    """Two SAEs that hold the same features in another order, and two whose codes have nothing to do with one another."""
    rule, rng = claims.at_least(0.5, 0.1), np.random.default_rng(0)
    for random, wanted in ((False, "holds"), (True, "fails")):
        values, null = [], []
        for seed in range(3):
            halves = [families.planted(12, 5, 4000, seed=10 * seed + i, random=False).fired for i in (0, 1)]
            order = rng.permutation(halves[0].latents)
            theirs = families.clusters(families.together(halves[1].only(order)), 12)[np.argsort(order)]
            own, again = (families.clusters(families.together(x), 12) for x in halves)
            if random:
                theirs = families.clusters(families.together(halves[1].shuffled(seed)), 12)
            values.append(families.agreement(own, theirs) / families.agreement(own, again))
            mixed = [families.clusters(families.together(halves[0].shuffled(i)), 12) for i in range(20)]
            null.append([families.agreement(x, theirs) for x in mixed])
        assert judged(rule, stats.over(values), np.mean(null, 0)) == wanted


def test_random_partners_have_the_cosines_that_were_asked_for():
    wanted = np.linspace(-0.2, 1, 30)
    one, other = families.partner_rows(torch.zeros(30, 64), wanted, 3)
    np.testing.assert_allclose((one * other).sum(1), wanted, atol=1e-5)
    np.testing.assert_allclose(other.norm(dim=1), 1, rtol=1e-5)


class Partner:
    """What `features` reads of an SAE."""

    def __init__(self, rows):
        self.sae = sae_of("topk", rows, k=4, rescale_acts_by_decoder_norm=False)


def test_partners_are_asked_by_their_match_on_other_text_and_rare_latents_are_left_out(monkeypatch, cache):
    """Three SAEs with the same planted features, in other orders and slightly turned."""
    order = [torch.arange(72), *(torch.randperm(72, generator=torch.Generator().manual_seed(i)) for i in range(3))]
    planted = [families.planted(12, 5, 6000, width=96, seed=i) for i in range(2)]
    rows = unit(planted[0].rows + 0.5 * torch.eye(72, 96))
    partners = [Partner(unit(rows[o] + 0.01 * torch.randn(72, 96))) for o in order]
    halves = [tuple(p.fired.only(o.numpy()) for p in planted) for o in order]
    lab = SimpleNamespace(session=SimpleNamespace(device="cpu"))
    made = features.Families(lab, partners[0], partners[1:], 6, 20, 60)
    made.__dict__["_halves"] = halves
    for match, o in zip(made.matches, order[1:], strict=True):
        assert torch.equal(o[match.B_for_A], torch.arange(72))
    assert (made.firing < 0).sum() == 12 and made.over_halves().min() > 0.6
    np.testing.assert_allclose(made.over_seeds(), made.over_halves(), atol=0.25)
    assert np.abs(made.shuffled(5)).max() < 0.2 and made.shuffled(5).shape == (5, 3)
    own, chance = made.of_decoders()
    assert own.min() > 0.6 and chance.shape == (3,)
    every, none = made.by_match([-1, 0.999999]).data.split("\n")[2:]
    assert every.startswith("| -1 | 60 | 0.") or every.startswith("| -1 | 5") and none.endswith("| 0 | - | - |")
    words = [Latent(i, 0.1, [Context("a", "b", "c", 1.0)], [], []) for i in range(72)]
    assert "a«b»c" in made.listed(words, 2).data


# --- splitting -----------------------------------------------------------------------------------------------------------


def test_axes_are_the_right_singular_vectors():
    rows = torch.randn(12, 30, generator=torch.Generator().manual_seed(8))
    found, expected = families.axes(rows, 3), torch.linalg.svd(unit(rows), full_matrices=False).Vh[:3].double()
    torch.testing.assert_close((found @ expected.T).abs(), torch.eye(3).double(), atol=1e-5, rtol=0)
    assert len(families.axes(rows[:2], 3)) == 2


def test_heirs_are_nearest_by_cosine():
    g = torch.Generator().manual_seed(4)
    rows, other = torch.randn(9, 8, generator=g), 3 * torch.randn(31, 8, generator=g)
    nearest = cdist(other, rows, "cosine").argmin(1)
    np.testing.assert_array_equal(families.heirs(rows, other, block=5), nearest)


def grown_from(rows, children, noise, seed):
    g = torch.Generator().manual_seed(seed)
    return unit(
        rows.repeat_interleave(children, 0)
        + noise * unit(torch.randn(len(rows) * children, rows.shape[1], generator=g))
    )


def test_a_family_is_kept_by_itself_and_by_what_its_latents_split_into_and_not_by_noise():
    planted = families.planted(8, 5, 10, width=128, seed=5)
    rows, labels = planted.rows, planted.family
    np.testing.assert_allclose(families.kept_subspaces(rows, labels, rows, 3, 4), 1, atol=1e-5)
    assert len(families.kept_subspaces(rows, labels, rows, 3, 7)) == 0
    split = families.kept_subspaces(rows, labels, grown_from(rows, 4, 0.3, 0), 3, 4)
    noise = families.kept_subspaces(rows, labels, unit(torch.randn(160, 128)), 3, 4)
    assert split.min() > 0.7 and noise.max() < 0.3
    assert families.kept_subspaces(rows, labels, rows[:6], 3, 4)[1:].max() == 0  # no heirs


def test_the_rule_of_growth_passes_dictionaries_that_split_and_refuses_others(cache):
    rows = families.planted(8, 5, 10, width=96, seed=6).rows
    smalls = [Partner(grown_from(rows, 1, 0.3, i)) for i in range(3)]
    for wide, wanted in ((grown_from(rows, 4, 0.3, 9), "holds"), (unit(torch.randn(192, 96)), "fails")):
        split = features.Grown(smalls, {4: Partner(wide)}, 0).split(6, 2, 3)
        np.testing.assert_allclose(split.shares()[:, 0], 1)
        assert split.kept.shape == split.thinned.shape == (3, 2) and split.chance.shape == (features.ROTATIONS, 3, 2)
        null = split.by_chance()[:, :, -1].mean(1)
        assert abs(null).max() < 0.2 and null.mean() == pytest.approx(0)
        assert judged(claims.at_least(0.8, 0.1), stats.over(split.shares()[:, -1]), null) == wanted
        assert split.shares(thinned=True)[:, -1].mean() < split.shares()[:, -1].mean() + 0.1


# --- the map -------------------------------------------------------------------------------------------------------------


def test_the_layout_is_the_same_twice_and_puts_like_near_like():
    planted = families.planted(6, 7, 10, width=64, seed=1)
    rows = planted.rows + 2 * torch.eye(6, 64)[torch.as_tensor(planted.family)]
    at = families.layout(rows, 3)
    np.testing.assert_array_equal(at, families.layout(rows, 3))
    apart = cdist(at, at) + 1e9 * np.eye(len(at))
    assert (planted.family[apart.argmin(1)] == planted.family).mean() > 0.9


def test_the_nearest_rows_are_by_cosine():
    rows = torch.eye(4) * torch.tensor([1.0, 5.0, 0.1, 2.0])[:, None]
    found = families.nearest(rows, torch.tensor([[0.0, 0.5, 1.0, 0.0], [9.0, 0.0, 0.0, 1.0]]), 2)
    assert found.tolist() == [[2, 1], [0, 3]]


def test_a_page_and_a_twin_say_where_latents_fire(tmp_path):
    words = [
        Latent(i + 3, 0.01 * i, [Context("a <b> ", "wörd", " after", 2.0)] * (i > 0), ["up"], []) for i in range(5)
    ]
    found = features.Map(np.arange(10.0).reshape(5, 2), np.arange(5) % 2, words, {"joy": [1, 2]})
    session = type(
        "S", (), {"results": tmp_path / "out" / "results", "model": "m", "profile": type("P", (), {"layer": 3})}
    )()
    assert features.write_page(session, found) == "out/features.html"
    page = (tmp_path / "out" / "features.html").read_text(encoding="utf-8")
    assert "wörd" in page and "Latents of m after layer 3" in page and "<b> " not in page
    drawn = json.dumps(json.loads(features.twin(found, 3).to_json()), ensure_ascii=False)
    assert "wörd" in drawn and "joy" in drawn and '"7: ' in drawn and "<b> " not in drawn
