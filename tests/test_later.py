"""The layers above a steered one, as a notebook asks for them: the right sides, latents and controls reach the measures."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_decompose import sae_of, unit
from test_study import Session

from helpers import figures, later, nulls, study
from helpers.later import Later
from helpers.sae import activations, decompose, downstream
from helpers.sae.latents import Context, Latent
from helpers.steering import behaviors, directions

NAMES = ("joy", "refusal", "anger", "fear")


@pytest.fixture
def lab(tiny, cache):
    data = {n: behaviors.trim(behaviors.load_behavior(n), 6, 3) for n in NAMES}
    return study.Single(Session(fast=False, layers=[0, 1, 2, 3]), tiny, 1, [0, 1, 2, 3], data)


@pytest.fixture
def above(lab):
    g = torch.Generator().manual_seed(4)
    saes, texts = {}, {}
    for k in (1, 2, 3):
        sae = sae_of("topk", unit(torch.randn(96, 48, generator=g)), k=8, rescale_acts_by_decoder_norm=False)
        saes[k] = SimpleNamespace(sae=sae)
        rows = activations.Array(lab.model.embedding[torch.randint(4000, (400,), generator=g)].float() * 3)
        texts[k] = (rows, rows)
    return Later(lab, [1, 2, 3], saes, texts)


@pytest.mark.parametrize(
    ("swept", "deep", "ids", "fast", "found"),
    [
        ([2, 6, 10, 14, 18, 22, 26], 30, {}, False, [14, 18, 22, 26]),
        ([14], 30, {}, False, [14, 19, 24, 29]),
        ([14], 16, {}, False, [14, 15]),
        ([2, 14, 18, 22, 26], 30, {}, True, [14, 22, 26]),
        ([14, 15], 30, {16: "a", 17: "b", 9: "c"}, False, [14, 16, 17]),
    ],
)
def test_the_layers_that_are_looked_at(swept, deep, ids, fast, found):
    sae = SimpleNamespace(release="r" if ids else None, ids_above=ids)
    s = SimpleNamespace(fast=fast, profile=SimpleNamespace(layers=swept, sae=sae))
    assert later.layers(SimpleNamespace(session=s, layer=14, model=SimpleNamespace(layers=deep))) == found


def test_vectors_are_made_of_one_half_of_the_pairs_and_latents_told_by_the_other(above, lab):
    pos, neg = lab.halves()["refusal"].at(1)
    expected = directions.mean(pos[::2], neg[::2])
    v = above.vectors(0.2)
    assert v.norm(dim=1).numpy() == pytest.approx(0.2 * lab.residual_norm, rel=1e-5)
    torch.testing.assert_close(v[1] / v[1].norm(), (expected / expected.norm()).float())
    assert above.random(0.2, 7).norm(dim=1).numpy() == pytest.approx(0.2 * lab.residual_norm, rel=1e-5)
    pos, neg = lab.halves()["refusal"].at(3)
    np.testing.assert_array_equal(above.told(3)[1], downstream.told(above.saes[3].sae, pos[1::2], neg[1::2]))


def test_changes_scores_and_owners_of_every_vector(above, lab):
    where, v, random = above.replies(2, 4), above.vectors(0.5), above.random(0.5, 9)
    assert len(where.sequences) == 8
    found = above.changed(where, v, random)
    assert found.own[2].shape == (4, 2, 96) and found.random[3].shape == (9, 2, 96)
    again = found.again(2, 5)
    assert again.shape == (4, 4) and 0 <= again.min() <= again.max() <= 1
    assert found.again_by_chance(2, 5).shape == (9,)
    own, chance = above.belonging(found, 2, 5, 0.7)
    assert own.shape == (4, 4) and chance.shape == (9, 4)
    words = {k: {i: Latent(i, 0.1, [Context("a", "b", "c", 1.0)], ["w"], ["x"]) for i in range(96)} for k in (1, 2, 3)}
    assert "| layer | by behaviours' vectors" in above.counted(found, 0.05, 5).data
    listed = above.listed(found, "joy", 3, words).data
    assert listed.count("a«b»c") == 6  # three at each of two layers
    flow = above.flow(found, "joy", 3, words)
    assert len(flow.nodes) == 9 and isinstance(flow.nodes[0], figures.Node)
    assert all(flow.nodes[b].column == flow.nodes[a].column + 1 for a, b, _ in flow.links)


def test_a_latent_is_met_below_if_the_dictionary_continues_and_not_if_it_is_turned(above, monkeypatch):
    where, v, random = above.replies(2, 4), above.vectors(0.5), above.random(0.5, 9)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    rows = decompose.rows_of(above.saes[2].sae)
    above.saes[3] = SimpleNamespace(sae=sae_of("topk", rows[order].clone(), k=8, rescale_acts_by_decoder_norm=False))
    assert torch.equal(above.followed()[3].B_for_A, order)
    found = above.changed(where, v, random)
    tops = found.tops(3, 5)
    at = order[np.abs(tops) - 1].numpy() + 1
    np.testing.assert_array_equal(above.met(found, 3, 5), downstream.shared(at * np.sign(tops), found.tops(2, 5)))
    monkeypatch.setattr(study.Single, "saes", lambda lab, seeds: [above.saes[1], above.saes[1]])
    lines = above.matched(0.7).data.split("\n")
    assert "| layer 3 with layer 2 | 1.00 | 100.0% |" in lines and lines[-2].endswith("| 0.0% |")
    assert lines[-1] == "| two seeds of layer 1 | 1.00 | 100.0% |"


def test_elements_are_put_back_for_each_behaviour_with_its_own_sets(above, lab):
    v, items = above.vectors(0.5), above.items(2)
    basis = above.components(3)
    sets = [[torch.tensor([i]), torch.arange(48)] for i in range(4)]
    found = above.parted(items, 3, v, basis, sets, True)
    assert len(found) == 4
    for one, where, push in zip(found, items.values(), v, strict=True):
        np.testing.assert_allclose(one.back[1], one.effect, atol=1e-3)  # all components are the whole stream
        expected = downstream.ends(where, 3, push)
        np.testing.assert_allclose(one.effect, expected.effect, atol=1e-5)
    bases = {"a": basis, "b": downstream.read_by(lab.model, 2)}
    ranked = above.ranked(above.replies(1, 4), v, bases, 3)
    assert {n: x.shape for n, x in ranked.items()} == {"a": (4, 48), "b": (4, 48)}


def test_a_row_that_is_the_vector_does_what_the_vector_does_and_a_random_one_less(above, lab):
    v = above.vectors(0.01)
    rows = decompose.rows_of(above.saes[1].sae).clone()
    rows[7] = -v[0] / v[0].norm()
    above.saes[1] = SimpleNamespace(sae=sae_of("topk", rows, k=8, rescale_acts_by_decoder_norm=False))
    found = above.rows_alone(above.replies(1, 4), 3, 2, 0.01)["joy"]
    assert found.latents[0] == 7 and found.nats[0, 0] == pytest.approx(found.vector, rel=1e-3)
    halves = (found.vector[::2].mean() + found.vector[1::2].mean()) / 2
    assert later.best_on_others(found.nats[0][:1]) == pytest.approx(halves, rel=1e-3)
    assert found.length[0, 0] == pytest.approx(1, rel=1e-3) and found.cosine[0, 0] == pytest.approx(1, abs=1e-3)
    assert np.abs(found.cosine[1]).max() < 0.9 and len(found.cells()) == len(later.ALONE)
    assert nulls.random(v[0], 2).shape == (2, 48)


def test_the_best_row_is_chosen_on_other_items_so_that_noise_is_not_rewarded():
    noise = np.random.default_rng(0).normal(size=(200, 10, 40))
    found = [later.best_on_others(x) for x in noise]
    assert abs(np.mean(found)) < 0.05 < np.mean([x.mean(1).max() for x in noise])
    noise[:, 3] += 2
    assert np.mean([later.best_on_others(x) for x in noise]) == pytest.approx(2, abs=0.05)
