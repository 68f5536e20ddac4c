"""Downstream of a vector: rows, Jacobian and patched predictions against plain runs; measures find a plant and stay silent without."""

import numpy as np
import pytest
import torch
from conftest import small_tokenizer, tiny_weights
from test_decompose import sae_of, unit
from test_steer import ITEMS

from helpers import nulls
from helpers.lm import hooks, reading, scoring, tokens
from helpers.lm.downstream import Downstream
from helpers.lm.reading import LM
from helpers.sae import downstream
from helpers.sae.downstream import Axes
from helpers.steering import propensity

L, LATER = 1, 2  # where vectors are added, and the block that reads a planted direction


def of(lm, layer=L):
    return Downstream.of(propensity.of_items(lm, ITEMS, layer))


@pytest.fixture(scope="module")
def axes():
    """48 directions at right angles to one another; the first is what the plant writes, the second what it reads."""
    return Axes(torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(5))).Q)


@pytest.fixture(scope="module")
def planted(axes):
    """A small model whose third block writes one direction by what it reads of another, in one neuron of its MLP."""
    weights = tiny_weights("llama")
    mlp = weights.model.layers[LATER].mlp
    written, read = axes.W_dec[:2]
    with torch.no_grad():
        mlp.gate_proj.weight[0], mlp.up_proj.weight[0] = 2 * read, 2 * read
        mlp.down_proj.weight[:, 0] = 4 * written
    return LM.of(weights, small_tokenizer(), "tiny-planted")


@pytest.fixture
def where(planted, cache):
    return of(planted)


@pytest.fixture
def v(axes, where):
    """The planted direction, a third as long as the stream."""
    return axes.W_dec[1] * where.rows([L], 0 * axes.W_dec[1])[L].norm(dim=1).median() / 3


# --- the model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "gemma"])
def test_rows_are_those_of_whole_steered_passes(name, request, cache):
    model = request.getfixturevalue(name)
    where, v = of(model), torch.randn(48)
    where.chunk = 2  # more chunks than one
    found = where.rows([1, 3], v)
    for i, item in enumerate(ITEMS):
        for j, answer in enumerate((item.matching, item.non_matching)):
            laid = tokens.chat(model.tokenizer, item.question, answer=answer)
            batch = tokens.pad([laid], model.pad_id)
            start, own = laid.roles.index(tokens.ANSWER) - 1, where.owners == 2 * i + j
            with hooks.add(model, L, v, positions=tokens.positions(batch, "response")):
                acts = reading.packed(model, batch.ids, [1, 3])
            for k in (1, 3):
                torch.testing.assert_close(found[k][own], acts[k][0, start:-1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["tiny", "gemma"])
def test_the_jacobian_is_the_slope_of_the_rows(name, request, cache):
    where, v = of(request.getfixturevalue(name)), torch.randn(48)
    slope, plain, near = where.carried([1, 3], v), where.rows([1, 3], v, -1e-2), where.rows([1, 3], v, 1e-2)
    assert torch.equal(slope[1], v.expand_as(slope[1]))
    assert downstream.explained((near[3] - plain[3]) / 2e-2, slope[3]) > 0.999
    assert where.log_odds(L, where.rows([1], v)[1]) == pytest.approx(scoring.log_odds(where, [v], [1.0])[0, 0])


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_known_answers_of_putting_back(layer, tiny, cache):
    where, v = of(tiny), torch.randn(48)
    found = downstream.ends(where, layer, v)
    plain, steered = scoring.log_odds(where, [v], [0.0, 1.0])[0]
    np.testing.assert_allclose([found.before, found.after], [plain, steered], atol=1e-4)
    whole = found.steered - found.plain
    if layer == L:
        torch.testing.assert_close(whole, v.expand_as(whole), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(downstream.put_back(where, layer, found, whole), found.effect, atol=1e-4)
    np.testing.assert_allclose(downstream.put_in(where, layer, found, whole), found.effect, atol=1e-4)
    assert not downstream.put_back(where, layer, found, 0 * whole).any()
    assert not downstream.put_in(where, layer, found, 0 * whole).any()


def test_a_layer_below_the_steered_one_is_refused_and_the_model_stays_as_it_was(tiny, cache):
    where, v = of(tiny), torch.randn(48)
    before = where.log_probs(v)
    with pytest.raises(ValueError, match="layer 0 was asked for; the vector is added after layer 1"):
        where.rows([0, 2], v)
    where.rows([2], v), where.carried([2], v)
    np.testing.assert_array_equal(where.log_probs(v), before)
    reading.unhooked(tiny)  # raises where a hook was left; transformers' own may stay


# --- which elements change -----------------------------------------------------------------------------------------------


def test_changes_are_means_over_tokens_and_then_over_the_prompts_of_a_part(tiny, axes, cache):
    where, vectors = of(tiny), torch.randn(2, 48)
    found = downstream.changes(where, vectors, {"a": axes}, {"a": 2}, [0, 1, 0])["a"]
    assert found.shape == (2, 2, 48)
    for i, v in enumerate(vectors):
        gap = axes.encode(where.rows([2], v)[2] - where.rows([2], 0 * v)[2])
        each = [gap[where.owners // 2 == p].mean(0) for p in range(3)]
        torch.testing.assert_close(found[i, 0], (each[0] + each[2]) / 2, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[i, 1], each[1], atol=1e-4, rtol=1e-4)


def test_the_planted_element_is_found_and_a_vector_that_the_plant_does_not_read_changes_nothing(where, axes, v):
    random = nulls.random(v, 40).float()
    random -= (random @ axes.W_dec[1])[:, None] * axes.W_dec[1]
    other = torch.randn(48, generator=torch.Generator().manual_seed(9))
    other -= (other @ axes.W_dec[1]) * axes.W_dec[1]
    own = torch.stack([v, other / other.norm() * v.norm()])
    found = downstream.changes(where, torch.cat([own, random]), {"a": axes}, {"a": LATER}, [0, 0, 1])["a"]
    both = [downstream.scores(found[:2, part], found[2:, part]) for part in (0, 1)]
    for scored in both:
        told, by_chance = downstream.discovered(scored)
        assert downstream.tops(scored.own, 2)[0].tolist().count(1) == 1 and told[0, 0]
        assert not told[1].any() and by_chance.mean() < 0.005
    again = downstream.shared(*(downstream.tops(x.own, 2) for x in both))
    assert again[0, 0] == 1 and again[0, 1] == 0  # the same on other prompts, and not another vector's


def test_scores_are_standard_and_false_discoveries_rare_where_nothing_is_there():
    g = torch.Generator().manual_seed(1)
    scale = torch.rand(500, generator=g) + 0.5
    random, own = (scale * torch.randn(n, 500, generator=g) + 3 for n in (100, 200))
    found = downstream.scores(own, random)
    assert found.own.mean() == pytest.approx(0, abs=0.05) and found.own.std() == pytest.approx(1, abs=0.1)
    assert found.null.std() == pytest.approx(found.own.std(), abs=0.02)
    told, by_chance = (x.any(1).mean() for x in downstream.discovered(found))
    assert 0 < told < 0.1 and 0 < by_chance < 0.12  # a random vector is counted like any other
    own[:, :20] += 8 * scale[:20]
    told = downstream.discovered(downstream.scores(own, random))[0]
    assert told[:, :20].mean() > 0.95 and told[:, 20:].sum() / told.sum() < 0.08
    still = downstream.scores(torch.zeros(1, 3), torch.zeros(5, 3))
    assert not still.own.any() and not still.null.any()
    with pytest.raises(ValueError, match="2 random vectors were given"):
        downstream.scores(own, random[:2])


def test_tops_have_a_sign_and_are_shared_with_it():
    z = np.array([[0.0, -3, 2, 1], [0, 3, 2, -1]])
    found = downstream.tops(z, 2)
    assert found.tolist() == [[-2, 3], [2, 3]]
    assert downstream.shared(found, found).tolist() == [[1, 0.5], [0.5, 1]]


def test_a_latent_belongs_to_the_behaviour_whose_pairs_it_tells_apart_and_to_no_other():
    g = torch.Generator().manual_seed(2)
    rows = unit(torch.randn(96, 48, generator=g))
    sae = sae_of("topk", rows, k=8, rescale_acts_by_decoder_norm=False)
    noise = torch.randn(4, 30, 48, generator=g)
    told = np.stack(
        [
            downstream.told(sae, noise[0] + 4 * rows[5], noise[1] - 4 * rows[5]),
            downstream.told(sae, noise[2], noise[3]),
        ]
    )
    found = downstream.belonging(np.array([[6, 7], [-6, 7]]), told, 0.9)
    assert told[0, 5] > 0.99 and found[:, 1].tolist() == [0, 0]
    assert found[0, 0] >= 0.5 and found[1, 0] == found[0, 0] - 0.5  # in the direction of the change alone


# --- how much is linear --------------------------------------------------------------------------------------------------


def test_small_steps_are_linear_and_long_ones_through_the_plant_are_not(where, axes, v):
    other = axes.W_dec[7] * v.norm()
    found = downstream.linear(where, torch.stack([v, other]), [L, LATER], [0.001, 3.0])
    assert found.fit.shape == found.skipped.shape == (2, 2, 2)
    assert found.fit[:, 0] == pytest.approx(1, abs=1e-3)  # at the layer itself it is v
    assert found.fit[:, 1, 0].min() > 0.98 and found.fit[0, 1, 1] < 0.5
    assert found.skipped[0, 1, 0] < 0.2 < found.skipped[1, 1, 0]  # the planted direction makes more than itself


# --- what depends on them ------------------------------------------------------------------------------------------------


def test_the_effect_goes_with_the_planted_element_and_not_with_another(where, axes, v):
    found = downstream.parted(where, LATER, v, axes, [torch.tensor([0]), torch.tensor([5]), torch.arange(48)], True)
    share = found.back.mean(1) / found.effect.mean()
    assert share[0] > 0.5 and abs(share[1]) < 0.2
    np.testing.assert_allclose(found.back[2], found.effect, atol=1e-3)
    np.testing.assert_allclose(found.alone[2], found.effect, atol=1e-3)
    assert found.alone[0].mean() / found.effect.mean() > 0.5 and found.length[2] == pytest.approx(1)
    like = downstream.parted(where, LATER, v, axes, [torch.tensor([5])], like=torch.tensor([0]))
    assert like.length[0] == pytest.approx(found.length[0], rel=1e-3) and np.isnan(like.alone).all()


def test_the_sets_that_are_put_back(axes):
    change = torch.zeros(48)
    change[[3, 9, 4]] = torch.tensor([-5.0, 2, 1])
    assert downstream.largest(change, axes, 2).tolist() == [3, 9]
    assert downstream.largest(change, axes, 5).tolist() == [3, 9, 4]
    assert sorted(downstream.largest(change, axes).tolist()) == list(range(48))  # what the prompts did not show too
    sets = downstream.any_of(change, 2, 5)
    assert len(sets) == 5 and all(len(set(x.tolist())) == 2 and set(x.tolist()) <= {3, 4, 9} for x in sets)
    signs = downstream.signs(4, 50)
    assert signs.shape == (50, 4) and set(np.unique(signs)) == {-1.0, 1.0}


def test_singular_vectors_are_what_the_next_block_reads(planted, axes):
    found = downstream.read_by(planted, LATER - 1)
    rows = found.W_dec
    torch.testing.assert_close(rows @ rows.T, torch.eye(48), atol=1e-4, rtol=1e-4)
    gain = torch.cat(
        [
            m.weight
            for n, m in planted.blocks[LATER].named_modules()
            if n.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
        ]
    )
    assert (gain @ rows[0]).norm() == pytest.approx(float(torch.linalg.matrix_norm(gain, 2)), rel=1e-4)
    assert (gain @ rows[0]).norm() > (gain @ rows[-1]).norm()
    with pytest.raises(IndexError, match="layer 4 given"):
        downstream.read_by(planted, 3)
