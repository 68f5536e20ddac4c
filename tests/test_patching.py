"""A planted pair: the copy's MLP writes a known direction on a known class of tokens. Everything of notebook 06 must find it there.

The base is a random four-layer Llama; block 1 of the copy has a few neurons more, which fire on capital letters' tokens and write the
direction. All the change lies below the layer that is read, so that the true differences recover everything.
"""

import numpy as np
import pytest
import torch
from conftest import small_tokenizer, tiny_weights

from helpers import nulls
from helpers.lm import hooks, reading, scoring, tokens
from helpers.lm.reading import LM
from helpers.lm.tokens import ANSWER, USER
from helpers.pair import overlap, patching
from helpers.sae import decompose, evaluation, harvest, saes, train
from helpers.steering import caa, propensity
from helpers.steering.behaviors import AnswerPair, Item

LAYER = 1


@pytest.fixture(scope="module")
def planted():
    """(base, chat, direction, ids of the class): the two models, the unit direction written."""
    with torch.no_grad():
        return make_planted(small_tokenizer())


def make_planted(tokenizer):
    both, d = [tiny_weights("llama") for _ in range(2)], 48
    g = torch.Generator().manual_seed(8)
    marked = torch.tensor([i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip()[:1].isupper()])
    key, direction = (torch.nn.functional.normalize(torch.randn(d, generator=g), dim=0) for _ in range(2))
    for weights in both:  # both know the class; only the copy acts on it
        weights.model.embed_tokens.weight[marked] += 4 * key
    mlp, extra = both[1].model.layers[LAYER].mlp, 2
    for name in ("gate_proj", "up_proj"):
        rows = torch.cat([getattr(mlp, name).weight, 3 * key.expand(extra, d)])
        setattr(mlp, name, torch.nn.Linear(d, len(rows), bias=False))
        getattr(mlp, name).weight.copy_(rows)
    columns = torch.cat([mlp.down_proj.weight, 0.2 * direction[:, None].expand(d, extra)], 1)
    mlp.down_proj = torch.nn.Linear(columns.shape[1], d, bias=False)
    mlp.down_proj.weight.copy_(columns)
    base, chat = (LM.of(w, tokenizer, f"tiny-{n}") for w, n in zip(both, ("base", "planted"), strict=True))
    return base, chat, direction.double(), marked


@pytest.fixture(scope="module")
def text():
    names = ["Paris", "Rome", "Europe", "Sunday", "Egypt", "Japan", "China", "March"]  # a token each
    return [
        f"the way from {a} to {b} is long and we saw {c} there in a very old house"
        for a in names
        for b in names
        for c in names[:3]
        if a != b
    ]


@pytest.fixture(scope="module")
def difference(planted, text, tmp_path_factory):
    """The pair's differences over the text, harvested as the notebook does."""
    base, chat = planted[:2]
    folder = tmp_path_factory.mktemp("text") / "text.txt"
    folder.write_text("\n\n".join(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield harvest.pair(base, chat, str(folder), [LAYER], 3000, context=32).difference


@pytest.fixture(scope="module")
def dictionary(difference, tmp_path_factory):
    """A diff-SAE of the planted pair, as sae_lens holds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        config = train.Config(latents=24, k=1, samples=60_000, batch=512, lr=3e-3, low=False)
        return saes.load(train.sae(difference, config)).sae


@pytest.fixture(scope="module")
def talks(planted):
    base = planted[0]
    said = [
        ("where is Paris", " Paris is in Europe now"),
        ("when was it", " it was on Sunday in March"),
        ("who is old", " nobody is very old"),
    ]
    return [tokens.chat(base.tokenizer, q, answer=a) for q, a in said]


def unit_rows(sae, samples):
    return decompose.rows_of(sae).double()[evaluation.evaluate(sae, samples).order]


def test_the_pair_differs_along_the_planted_direction_on_its_class_alone(planted, difference):
    *_, direction, marked = planted
    ids, row = difference.token_rows()
    token = ids[row, difference.named("position").long()].long()
    rows = difference.rows(torch.arange(len(difference))).double()
    inside = torch.isin(token, marked)
    assert 0.1 < inside.double().mean() < 0.6
    assert rows[inside].norm(dim=1).median() > 50 * rows[~inside].norm(dim=1).median()
    assert overlap.energy(rows[inside], direction[None]).mean() > 0.99


def test_the_diff_sae_finds_the_direction(planted, difference, dictionary):
    direction, fit = planted[2], evaluation.evaluate(dictionary, difference)
    assert fit.l0 <= 1 and fit.explained_variance > 0.9
    assert overlap.best(direction[None], unit_rows(dictionary, difference)[:3])[1][0] > 0.9


@pytest.mark.parametrize("measure", ["sparse", "used", "components", "best"])
def test_overlap_fires_along_the_direction_and_is_silent_for_orthogonal_and_random_vectors(
    planted, difference, dictionary, measure
):
    direction = planted[2]
    rows, samples = unit_rows(dictionary, difference), difference.rows(torch.arange(len(difference)))
    aside = overlap.project_out(torch.randn(1, 48, dtype=torch.float64), direction[None])
    noise = nulls.random(direction, 200, 3)
    score = {
        "sparse": lambda v: overlap.sparse(v, rows[:6], 2),
        "used": lambda v: overlap.energy(v, rows[:1]),
        "components": lambda v: overlap.energy(v, overlap.principal(samples, 1)),
        "best": lambda v: overlap.best(v, rows[:1])[1],
    }[measure]
    null = np.quantile(score(noise), 0.975)
    assert score(direction[None])[0] > max(0.8, null + 0.2)
    assert score(aside)[0] < max(null, 0.35) and np.mean(score(noise) > null) < 0.05


def test_taking_the_latents_out_of_a_vector_stops_it_steering_and_leaves_another_alone(
    planted, difference, dictionary, cache
):
    base, _, direction, _ = planted
    spanned = unit_rows(dictionary, difference)[:1]
    aside = overlap.project_out(
        torch.randn(1, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), direction[None]
    )[0]
    where = propensity.of_items(
        base,
        [Item("who is it", "Paris and Japan", "nobody at all"), Item("what is it", "a long river", "Rome")],
        LAYER,
    )

    def effect(v):
        x = scoring.log_odds(where, [5 * v / v.norm() if v.norm() > 0.3 else 5 * v], [-1.0, 1.0])[0]
        return np.abs(x[1] - x[0]).mean()

    along = overlap.project_out(direction[None], spanned)[0]
    other = overlap.project_out(aside[None] / aside.norm(), spanned)[0]
    assert along.norm() < 0.3 and effect(along) < 0.3 * effect(direction)
    assert other.norm() > 0.9 and effect(other) > 0.7 * effect(aside)


def test_true_differences_recover_everything_few_latents_nearly_all_and_random_ones_nothing(
    planted, difference, dictionary, talks, cache
):
    base, chat = (patching.Runs(m, talks, LAYER) for m in planted[:2])
    change, target = patching.difference(chat, base), chat
    before = base.kl(target)
    assert before.mean() > 0.05 and np.abs(chat.kl(chat)).max() < 1e-6
    first = [a[:1] - b[:1] for a, b in zip(chat.residuals, base.residuals, strict=True)]
    whole = [torch.cat([f, rows[1:]]) for f, rows in zip(first, change.laid(change.rows), strict=True)]
    assert np.abs(base.kl(target, whole)).max() < 1e-6  # every token: nothing is left
    rows, order = decompose.rows_of(dictionary), evaluation.evaluate(dictionary, difference).order[:2]
    codes = decompose.codes_of(dictionary, change.rows)
    few = base.kl(target, change.laid(codes[:, order] @ rows[order] + dictionary.b_dec))
    turned = torch.linalg.qr(torch.randn(48, 48)).Q
    random = base.kl(target, change.laid(codes[:, order] @ rows[order] @ turned))
    true = base.kl(target, change.laid(change.rows))
    recovered = [1 - kl.sum() / before.sum() for kl in (true, few, random)]
    assert recovered[0] > 0.95 and recovered[1] > 0.85 and recovered[2] < 0.3


# --- exactness, on models without a plant ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "gemma"])
def test_runs_equal_whole_forward_passes(name, request, talks, cache):
    model = request.getfixturevalue(name)
    runs = patching.Runs(model, talks, LAYER, batch_size=2)
    logp = runs.log_probs()
    for i, t in enumerate(talks):
        full = model.weights(torch.tensor([t.ids])).logits[0].float().log_softmax(-1)
        at = [j for j, role in enumerate(t.roles) if role == ANSWER]
        assert logp[i] == pytest.approx(sum(float(full[j - 1, t.ids[j]]) for j in at), abs=1e-3)
        np.testing.assert_allclose(runs.own[i], full[[j - 1 for j in at]], atol=1e-3)


@pytest.mark.parametrize("name", ["tiny", "gemma"])
def test_first_order_equals_finite_differences(name, request, talks, cache):
    model = request.getfixturevalue(name)
    runs = patching.Runs(model, talks, LAYER, batch_size=2)
    rows = [torch.randn(len(t.ids), 48) for t in talks]
    h = 1e-2
    finite = (runs.log_probs([h * r for r in rows]) - runs.log_probs([-h * r for r in rows])) / (2 * h)
    np.testing.assert_allclose(runs.first_order(rows), finite, rtol=2e-2, atol=5e-2)
    later = [
        torch.cat([torch.zeros(t.roles.index(ANSWER) - 1, 48), r])[: len(r)] for t, r in zip(talks, rows, strict=True)
    ]
    assert np.abs(runs.first_order(later) - runs.first_order(rows)).min() > 0.01  # tokens before the answer count too
    with pytest.raises(ValueError, match="rows of shape"):
        runs.first_order([torch.zeros(3, 48) for _ in talks])


def test_adding_a_constant_row_is_steering_at_those_tokens(tiny, talks, cache):
    v, runs = torch.randn(48), patching.Runs(tiny, talks, LAYER)
    steered = runs.log_probs([v.expand(len(t.ids), -1) for t in talks])
    for i, t in enumerate(talks):
        with hooks.add(tiny, LAYER, v):
            full = reading.forward(tiny, tokens.pad([t], tiny.tokenizer.pad_token_id)).logits[0].log_softmax(-1)
        at = [j for j, role in enumerate(t.roles) if role == ANSWER]
        assert steered[i] == pytest.approx(sum(float(full[j - 1, t.ids[j]]) for j in at), abs=1e-3)
    assert not tiny.weights.get_output_embeddings()._forward_pre_hooks
    np.testing.assert_array_equal(runs.log_probs([torch.zeros(len(t.ids), 48) for t in talks]), runs.log_probs())


def test_a_change_is_laid_where_it_was_and_knows_the_roles(tiny, planted, talks):
    base, chat = (patching.Runs(m, talks, LAYER) for m in planted[:2])
    change = patching.difference(chat, base)
    laid = change.laid(change.rows)
    for rows, a, b in zip(laid, chat.residuals, base.residuals, strict=True):
        assert torch.equal(rows[1:], (a - b)[1:]) and not rows[0].any()
    spoken = change.at([USER, ANSWER], talks)
    assert 0 < spoken.sum() < len(spoken) == sum(len(t.ids) - 1 for t in talks)
    short = patching.difference(chat, base, limit=float(torch.cat(base.residuals).norm(dim=1).median()))
    assert 0 < len(short.rows) < len(change.rows)


def test_what_cannot_be_patched_is_refused_with_a_sentence(tiny, planted, talks):
    runs = patching.Runs(tiny, talks, LAYER)
    with pytest.raises(ValueError, match="has no answer"):
        patching.Runs(tiny, [tokens.chat(tiny.tokenizer, "who is it")], LAYER)
    with pytest.raises(ValueError, match=r"conversation 0: rows of shape \(3, 48\)"):
        runs.log_probs([torch.zeros(3, 48) for _ in talks])
    with pytest.raises(ValueError, match="different tokens"):
        patching.difference(runs, patching.Runs(tiny, talks[::-1], LAYER))
    change = patching.difference(*(patching.Runs(m, talks, LAYER) for m in planted[1::-1]))
    with pytest.raises(ValueError, match="2 rows were given"):
        change.laid(change.rows[:2])


def test_patched_runs_are_cached_and_another_row_is_not_a_hit(tiny, talks, cache, monkeypatch):
    runs, rows = patching.Runs(tiny, talks, LAYER), [torch.ones(len(t.ids), 48) for t in talks]
    first, kl = runs.log_probs(rows), runs.kl(runs, rows)
    monkeypatch.setattr(scoring, "above", lambda *_: pytest.fail("computed again"))
    again = patching.Runs(tiny, talks, LAYER)
    np.testing.assert_array_equal(again.log_probs(rows), first)
    np.testing.assert_array_equal(again.kl(again, rows), kl)
    with pytest.raises(pytest.fail.Exception):
        again.log_probs([2 * r for r in rows])


def test_vectors_of_the_planted_pair_need_no_answer_pairs_to_be_read(planted, cache):
    """caa reads the copy as it reads any model: the difference of the two models on the class is the direction."""
    base, chat, direction, _ = planted
    pairs = [AnswerPair("who is it", "Japan", "nobody"), AnswerPair("where is it", "Rome", "somewhere")]
    gap = caa.extract(chat, pairs, [LAYER]).pos - caa.extract(base, pairs, [LAYER]).pos
    assert overlap.energy(gap[:, 0], direction[None]).max() > 0.9


def test_a_reference_is_known_by_what_it_read_and_not_by_its_name(tiny, talks, cache):
    import copy

    from helpers.lm.reading import LM

    runs = patching.Runs(tiny, talks, np.int64(LAYER))
    half = LM.of(copy.deepcopy(tiny.weights).bfloat16(), tiny.tokenizer, tiny.identity)
    one, other = runs.kl(runs), runs.kl(patching.Runs(half, talks, LAYER))
    assert not one.any() and (other > 0).all()
    with hooks.add(tiny, LAYER, torch.ones(48)), pytest.raises(ValueError, match="has hooks set"):
        patching.Runs(tiny, talks, LAYER)


# --- a behaviour's items, moved through a part of the change ---------------------------------------------------------------

ITEMS = [
    Item("who is it", "Paris and Japan", "nobody at all"),
    Item("what is it", "a long river", "Rome"),
    Item("when was it", "on Sunday", "in the morning"),
    Item("where is it", "in Europe", "here"),
]


@pytest.fixture(scope="module")
def moved(planted, tmp_path_factory):
    """The planted pair on four items."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield patching.answers(*planted[:2], ITEMS, LAYER, float("inf"))


def test_the_planted_direction_carries_the_whole_shift_and_another_none(planted, moved, cache):
    direction, aside = planted[2], overlap.project_out(torch.randn(1, 48), planted[2][None])
    whole, along = moved.added(moved.rows), moved.added(overlap.project_onto(moved.rows, direction[None]))
    assert whole.shape == (4,) and np.abs(whole - moved.shift).max() < 0.1 < np.abs(whole).max()
    np.testing.assert_allclose(along, whole, rtol=0.02, atol=0.02)
    assert np.abs(moved.added(overlap.project_onto(moved.rows, aside))).max() < 0.05 * np.abs(whole).max()
    np.testing.assert_allclose(moved.removed(moved.rows), whole, atol=0.2)


def test_the_gradient_along_many_directions_is_first_order_in_each(planted, moved, cache):
    several = torch.cat([planted[2][None], torch.randn(3, 48, dtype=torch.float64)])
    each = [moved.first_order(overlap.project_onto(moved.rows, q[None])) for q in several]
    found = moved.along({"plant": 5 * several[:1], "random": several[1:]})
    np.testing.assert_allclose(np.concatenate(list(found.values())), np.stack(each), rtol=1e-4, atol=1e-5)


def test_replies_are_the_chat_models_own_and_the_true_differences_bring_their_predictions_back(planted, cache):
    base, chat = planted[:2]
    found = patching.said(base, chat, ["where is Paris", "who is old"], LAYER, 6, float("inf"))
    assert len(found.base.sequences) == 2 and found.spoken.shape == (len(found.rows), 1) and found.spoken.any()
    assert found.kl(found.rows).sum() < 0.1 * found.kl().sum()
    np.testing.assert_allclose(found.recovered(found.rows, ["a", "b"]), found.kl() - found.kl(found.rows))


def test_who_moves_is_who_is_clear_of_zero_either_way():
    up = np.array([1.0, 1.1, 0.9, 1.0])
    assert patching.moving({"up": up, "down": -up, "still": np.array([1.0, -1, 2, -2])}) == ["up", "down"]
    assert patching.of_whole(np.array([[2.0, 1, 0], [2, 1, 2]])).tolist() == [0.5, 0.5]


def test_log_odds_are_of_completions_in_turn():
    assert patching.odds(np.array([5.0, 2, 1, 1])).tolist() == [3, 0]
