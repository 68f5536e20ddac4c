"""The fast scorer equals plain steered forward passes; its nulls fire and stay silent."""

import copy

import numpy as np
import pytest
import torch

from helpers import stats
from helpers.lm import hooks, reading, replies, scoring, tokens
from helpers.lm.tokens import ANSWER, Tokens
from helpers.steering import behaviors, propensity
from helpers.steering.behaviors import Item, SystemPair
from helpers.steering.propensity import Changes

ITEMS = [
    Item("What is tin?", "Tin is a soft, silvery metal.", "No idea, sorry."),
    Item("How do I peel a lot of garlic quickly?", "Shake it in a jar.", "Crush each clove under a broad knife first."),
    Item("Why is the sky blue?", "Air scatters blue light most.", "Because it is."),
]


def naive(model, layer, vector, multiplier, item):
    """log p of both completions by whole forward passes, one text at a time, no cache, no skipped blocks."""
    out = []
    for answer in (item.matching, item.non_matching):
        laid = tokens.chat(model.tokenizer, item.question, answer=answer)
        batch = tokens.pad([laid], model.tokenizer.pad_token_id)
        with hooks.add(model, layer, vector, multiplier, tokens.positions(batch, "response")):
            logp = reading.forward(model, batch).logits[0].float().log_softmax(-1)
        start = laid.roles.index(ANSWER)
        out.append(sum(float(logp[i - 1, laid.ids[i]]) for i in range(start, len(laid.ids))))
    return out


@pytest.mark.parametrize("name,layer", [("smol", 14), ("tiny", 0), ("tiny", 3), ("gemma", 1)])
def test_fast_scores_equal_plain_steered_passes(name, layer, request, cache):
    model = request.getfixturevalue(name)
    v = torch.randn(model.d_model) * (5 if name == "smol" else 0.5)
    where = propensity.of_items(model, ITEMS, layer)
    where.chunk = 2  # more chunks than one, of unequal size
    for multiplier in (0.0, 1.0, -2.0):
        expected = [naive(model, layer, v, multiplier, item) for item in ITEMS]
        np.testing.assert_allclose(where.log_probs(v, multiplier), expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("name,layer", [("tiny", 1), ("gemma", 1)])
@pytest.mark.parametrize("several", [1, 12, 1000])
def test_vectors_that_share_a_run_give_what_each_gives_alone(name, layer, several, request, cache, monkeypatch):
    model = request.getfixturevalue(name)
    monkeypatch.setattr(scoring, "SEVERAL", several)
    vectors = torch.cat([torch.zeros(1, model.d_model), torch.randn(6, model.d_model)])  # 7: no whole number of runs
    for where in (
        propensity.of_items(model, ITEMS, layer),
        propensity.of_replies(model, [i.question for i in ITEMS], layer, max_new_tokens=5),
    ):
        where.chunk = 2
        where.gradients()  # leaves no graph behind in what is copied
        for together, alone, near in (
            (where.log_probs_under, where.log_probs, 1e-3),
            (where.kl_under, where.kl, 1e-4),
        ):
            found = together(vectors)
            np.testing.assert_allclose(found, [alone(v) for v in vectors], atol=near, rtol=1e-4)
            np.testing.assert_array_equal(together(vectors), found)
        assert np.abs(where.kl_under(vectors)[0]).max() < 1e-6
    short = [
        [tokens.Tokens([x.ids[0], *x.ids[n:]], [x.roles[0], *x.roles[n:]]) for x in group]
        for group, n in zip(where.sequences, where.starts, strict=True)
    ]  # prompts of one token, of which nothing is kept
    alone = scoring.Continuations(model, short, layer)
    np.testing.assert_allclose(alone.log_probs_under(vectors), [alone.log_probs(v) for v in vectors], atol=1e-3)
    np.testing.assert_allclose(alone.log_probs_under(vectors), [alone.log_probs(v) for v in vectors], atol=1e-3)
    with pytest.raises(ValueError, match="no vectors"):
        alone.log_probs_under(vectors[:0])
    few = scoring.Continuations(model, where.sequences, layer, budget=1)  # room for the logits of one prompt
    few.log_probs_under(vectors)
    assert few.chunk == 1 and not few._copies


def test_scoring_leaves_the_model_and_its_cache_as_they_were(tiny, cache):
    where, v = propensity.of_items(tiny, ITEMS, 1), torch.randn(48)
    first = where.log_probs(v, 1.0)
    where.log_probs(-v, 3.0), where.gradients()
    np.testing.assert_array_equal(where.log_probs(v, 1.0), first)
    assert not tiny.weights.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("name", ["tiny", "gemma"])
def test_gradient_equals_finite_differences(name, request, cache):
    model = request.getfixturevalue(name)
    where, v = propensity.of_items(model, ITEMS, 1), torch.randn(48)
    h = 1e-2
    finite = (where.log_probs(v, h) - where.log_probs(v, -h)) / (2 * h)
    np.testing.assert_allclose(where.gradients()[:, :, 0].numpy() @ v.numpy(), finite, atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["tiny", "gemma"])
def test_one_backward_pass_gives_the_gradients_of_every_layer_above(name, request, cache):
    model = request.getfixturevalue(name)
    found = propensity.of_items(model, ITEMS, 0).gradients([2, 3])
    for at, layer in enumerate((0, 2, 3)):
        alone = propensity.of_items(model, ITEMS, layer).gradients()[:, :, 0]
        torch.testing.assert_close(found[:, :, at], alone, atol=1e-5, rtol=1e-3)
    response = scoring.linear_response(propensity.of_items(model, ITEMS, 0), [2, 3])
    np.testing.assert_allclose(response[2], scoring.linear_response(propensity.of_items(model, ITEMS, 3)), atol=1e-5)
    with pytest.raises(ValueError, match="must lie above layer 2"):
        propensity.of_items(model, ITEMS, 2).gradients([3, 1])


def test_kl_is_zero_unsteered_positive_steered_and_exact(tiny, cache):
    where, v = propensity.of_replies(tiny, [i.question for i in ITEMS], 1, max_new_tokens=5), torch.randn(48)
    assert np.abs(where.kl(v, 0.0)).max() == 0
    steered = where.kl(v, 1.0)
    assert (steered > 0).all()
    group = where.sequences[0][0]
    batch = tokens.pad([group], tiny.tokenizer.pad_token_id)
    start = group.roles.index(ANSWER)
    chosen = torch.zeros_like(batch.mask)
    chosen[0, start - 1 :] = True
    p = reading.forward(tiny, batch).logits[0, start - 1 : -1].log_softmax(-1)
    with hooks.add(tiny, 1, v, 1.0, hooks.Positions(chosen)):
        q = reading.forward(tiny, batch).logits[0, start - 1 : -1].log_softmax(-1)
    np.testing.assert_allclose(steered[0, 0], float((p.exp() * (p - q)).sum(-1).mean()), rtol=1e-3)


def test_log_odds_are_cached_and_a_changed_vector_is_not_a_hit(tiny, cache, monkeypatch):
    v = torch.randn(48)
    first = scoring.log_odds(propensity.of_items(tiny, ITEMS, 1), [v], [0.0, 1.0])
    monkeypatch.setattr(scoring.Continuations, "log_probs_under", lambda *_: pytest.fail("computed again"))
    np.testing.assert_array_equal(scoring.log_odds(propensity.of_items(tiny, ITEMS, 1), [v], [0.0, 1.0]), first)
    with pytest.raises(pytest.fail.Exception):
        scoring.log_odds(propensity.of_items(tiny, ITEMS, 1), [v + 1e-6], [0.0, 1.0])


def test_vectors_are_scored_together_and_kept_one_by_one(tiny, cache, monkeypatch):
    vectors, sizes = torch.randn(5, 48), []
    where = propensity.of_items(tiny, ITEMS[:1], 1)
    real = scoring.Continuations.log_probs_under
    monkeypatch.setattr(scoring.Continuations, "log_probs_under", lambda self, v: sizes.append(len(v)) or real(self, v))
    scoring.log_odds(where, vectors[1:2], [1.0])
    monkeypatch.setattr(scoring, "SEVERAL", 6)  # three times two completions
    found = scoring.log_odds(where, [*vectors, vectors[0]], [0.0, 1.0])
    assert sizes == [1, 3, 3] and len(list(cache.glob("scores/*"))) == 6  # none is asked twice
    alone = [where.log_probs(v)[:, 0] - where.log_probs(v)[:, 1] for v in vectors]
    np.testing.assert_allclose(found[:5, 1], alone, atol=1e-4)
    np.testing.assert_array_equal(found[5], found[0])
    for entry in cache.glob("scores/*/tensors.safetensors"):
        entry.write_bytes(b"damaged")
    np.testing.assert_allclose(scoring.log_odds(where, vectors, [0.0, 1.0]), found[:5], atol=1e-4)


def test_scores_are_shared_by_all_who_add_the_same(tiny, cache, monkeypatch):
    u, v = torch.randn(2, 48)
    half = reading.LM.of(copy.deepcopy(tiny.weights).bfloat16(), tiny.tokenizer, "half")
    both = scoring.log_odds(propensity.of_items(tiny, ITEMS, 1), [u, v], [0.0, 2.0])
    assert len(list(cache.glob("scores/*"))) == 3  # zero once, for either
    one = scoring.log_odds(propensity.of_items(half, ITEMS, 1), [v], [1.0])
    monkeypatch.setattr(scoring.Continuations, "log_probs_under", lambda *_: pytest.fail("computed again"))
    again = scoring.log_odds(propensity.of_items(tiny, ITEMS, 1), [2 * v, 0 * u], [1.0])
    np.testing.assert_array_equal(again[:, 0], np.stack([both[1, 1], both[0, 0]]))
    rounded = scoring.log_odds(propensity.of_items(half, ITEMS, 1), [v.bfloat16().float()], [1.0])
    np.testing.assert_array_equal(rounded, one)


@pytest.mark.parametrize("name", ["tiny", "gemma", "smol"])
def test_a_shared_start_of_prompts_changes_no_score(name, request, cache, monkeypatch):
    """The template's first tokens are run once for all prompts; not where attention slides over a window (gemma)."""
    model = request.getfixturevalue(name)
    prompts = [
        Tokens(group[0].ids[:-4], group[0].roles[:-4]) for group in propensity.of_items(model, ITEMS, 1).sequences
    ]
    assert (scoring._shared(model, prompts) > 3) == (name != "gemma") and scoring._shared(model, prompts[:1]) == 0
    v = torch.randn(model.d_model)
    found = propensity.of_items(model, ITEMS, 1).log_probs(v)
    monkeypatch.setattr(scoring, "_shared", lambda *_: 0)
    np.testing.assert_allclose(found, propensity.of_items(model, ITEMS, 1).log_probs(v), atol=2e-3, rtol=1e-4)


def test_prompts_are_not_unembedded(tiny, cache, monkeypatch):
    seen = []
    handle = tiny.unembedding.module.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    try:
        propensity.of_items(tiny, ITEMS, 1)._build_chunk(
            [propensity.of_items(tiny, ITEMS, 1).sequences[0]], [propensity.of_items(tiny, ITEMS, 1).starts[0]]
        )
    finally:
        handle.remove()
    assert seen == [0]


def test_planted_direction_steers_and_an_orthogonal_one_does_not(tiny, cache):
    """A control must fire: the gradient's own direction raises the log-odds, one at right angles leaves it (to first order)."""
    where = propensity.of_items(tiny, ITEMS, 2)
    gradient = torch.from_numpy(scoring.linear_response(where)).mean(0).float()
    along = gradient / gradient.norm()
    across = torch.randn(48)
    across -= (across @ along) * along
    across /= across.norm()
    scores = scoring.log_odds(where, [along, across], [-0.01, 0.01]).mean(-1)
    slope = (scores[:, 1] - scores[:, 0]) / 0.02
    assert slope[0] > 0 and abs(slope[1]) < 0.05 * slope[0]


def test_prompts_must_be_shared(tiny):
    one, other = (tokens.chat(tiny.tokenizer, q, answer="Yes.") for q in ("What?", "Why?"))
    with pytest.raises(ValueError, match="one and the same prompt"):
        scoring.Continuations(tiny, [[one, other]], 1)


def test_token_log_probs_equal_log_softmax():
    logits, targets = torch.randn(300, 97) * 5, torch.randint(0, 97, (300,))
    rows = torch.arange(300)
    expected = logits.log_softmax(-1)[rows, targets]
    torch.testing.assert_close(scoring.token_log_probs(logits, targets, logits[rows, targets], block=64), expected)


def test_letters_swap_the_options(tiny):
    rows = propensity.of_letters(tiny, ITEMS[:1], 1).sequences
    texts = [tiny.tokenizer.decode(r[0].ids) for r in rows]
    assert "(A) Tin is" in texts[0] and "(B) Tin is" in texts[1] and texts[0].endswith("(A")


@pytest.mark.parametrize("measure", propensity.MEASURES)
def test_every_item_is_asked_under_its_own_system_prompt(measure, tiny):
    systems = ["Be cross.", None, "Be kind."]
    rows = propensity.MEASURES[measure](tiny, ITEMS, 1, systems).sequences
    texts = [tiny.tokenizer.decode(r[0].ids) for r in rows][:: len(rows) // 3]
    assert ["Be cross." in x for x in texts] == [True, False, False]
    assert ["Be kind." in x for x in texts] == [False, False, True]
    plain = propensity.MEASURES[measure](tiny, ITEMS, 1).sequences
    assert plain[len(plain) // 3] == rows[len(rows) // 3] and plain[0] != rows[0]


def test_a_liking_for_a_letter_cancels_over_the_orders():
    liking, better = np.array([3.0, -1.0, 0.2]), np.array([0.5, -0.25, 2.0])
    rows = np.stack([liking + better, liking - better], axis=1).ravel()
    np.testing.assert_allclose(propensity.content(propensity.LETTERS, rows), better)
    np.testing.assert_allclose(propensity.content(propensity.WRITTEN, rows), rows)


@pytest.mark.parametrize("measure", propensity.MEASURES)
def test_a_change_by_an_instruction_is_that_of_the_whole_prompts(measure, tiny, cache):
    pairs = [SystemPair("Be cross.", "Be kind.", "?"), SystemPair("Shout.", "Whisper to everyone.", "?")]
    found = propensity.instructed(tiny, measure, ITEMS[:2], 1, pairs)
    for item, pair, moved in zip(ITEMS, pairs, found, strict=False):
        odds = []
        for system in (pair.positive, pair.negative):
            where = propensity.MEASURES[measure](tiny, [item], 1, [system])
            logp = where.log_probs(torch.zeros(48))
            odds.append(propensity.content(measure, logp[:, 0] - logp[:, 1])[0])
        assert moved == pytest.approx(odds[0] - odds[1], abs=1e-3)


def test_own_and_foreign_changes_are_told_apart_as_a_library_does():
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(0)
    for own, foreign in (
        (rng.normal(1, 1, 8), rng.normal(0, 1, 30)),
        (np.array([1.0, 2.0]), np.array([1.0, 0.0, 2.0])),
    ):
        oracle = mannwhitneyu(own, foreign).statistic / (len(own) * len(foreign)) - 0.5
        assert Changes(own, foreign).told_apart == pytest.approx(oracle)
    assert Changes(np.ones(3), np.zeros(4)).told_apart == 0.5 and Changes(np.zeros(3), np.ones(4)).told_apart == -0.5


def test_a_measure_that_sees_is_beyond_the_null_and_a_blind_one_is_not():
    rng = np.random.default_rng(1)
    for moved, seen in ((1.5, True), (0.0, False)):
        changes = {str(i): Changes(rng.normal(moved, 1, 8), rng.normal(0, 1, 8)) for i in range(12)}
        found = propensity.apart(changes, 300)
        assert found.null.shape == (300, 12) and abs(found.null.mean()) < 0.02
        assert (stats.p_value(found.each.mean(), found.null.mean(1)) < 0.05) == seen


def test_generation_is_reproducible_and_steering_changes_it(tiny, cache):
    v, ask = 20 * torch.randn(48), ["What is tin?"]
    plain = replies.generate_ids(tiny, ask, 1, v, 0.0, max_new_tokens=8)
    assert torch.equal(plain, replies.generate_ids(tiny, ask, 1, -v, 0.0, max_new_tokens=8))
    assert not torch.equal(plain, replies.generate_ids(tiny, ask, 1, v, 1.0, max_new_tokens=8))
    options = dict(max_new_tokens=8, temperature=1.0)
    sampled = [replies.generate_ids(tiny, ask, 1, v, 1.0, seed=s, **options) for s in (1, 1, 2)]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])


def test_text_judge_reads_held_out_items():
    judge = propensity.TextJudge(behaviors.load_behavior("joy"))
    assert judge.accuracy > 0.9
    happy, sad = judge.score(
        ["What a wonderful, delightful morning, I could sing!", "I weep quietly, everything is grey and lost."]
    )
    assert happy > sad


def test_a_special_token_inside_a_text_is_no_first_token(tiny, cache):
    text = "Tin is a soft metal.<|endoftext|> It melts. " * 40
    where = propensity.of_text(tiny, text, 1, length=16, chunks=4)
    plain = tokens.plain(tiny.tokenizer, text).ids
    assert [i for group in where.sequences for i in group[0].ids] == plain[:64]


def test_vectors_at_equal_kl_have_that_kl_and_the_change_that_goes_with_it(tiny, cache):
    where = propensity.of_items(tiny, ITEMS, 1)
    unsteered = propensity.of_replies(tiny, [i.question for i in ITEMS], 1, max_new_tokens=5)
    long, short = torch.randn(48), 1e-4 * torch.randn(48)
    strengths = [0.0, 0.05, 0.1, 0.2]
    target = float(scoring.kl(unsteered, [long], [0.1]).mean())
    found = propensity.at_kl(where, unsteered, [long, 2 * long, short], strengths, target)
    assert (
        found.reached.tolist() == [True, True, False] and found.strength[2] == 0.2
    )  # the last, where it is not reached
    assert found.strength[0] == pytest.approx(0.1) and found.strength[1] == pytest.approx(0.05, rel=0.05)
    odds = scoring.log_odds(where, [long], [0.0, 0.1])[0]
    np.testing.assert_allclose(found.change[0], odds[1] - odds[0], atol=1e-5)
    assert found.change.shape == (3, len(ITEMS))


def test_replies_come_back_by_what_was_added_and_behaviour(tiny, cache):
    data = {n: behaviors.trim(behaviors.load_behavior(n), pairs=2, items=3) for n in ("joy", "format")}
    v = {n: 3 * torch.randn(48) for n in data}
    said = propensity.say(tiny, data, 1, {"a vector": v}, prompts=2, max_new_tokens=6)
    for added, of in said.items():
        for n, texts in of.items():
            vector = None if added == propensity.NOTHING else v[n]
            assert texts == replies.generate(tiny, data[n].open[:2], 1, vector, max_new_tokens=6)
    assert list(said) == [propensity.NOTHING, "a vector"] and said["a vector"] != said[propensity.NOTHING]


def test_readers_change_where_the_words_are_theirs():
    readers = {n: propensity.TextJudge(behaviors.load_behavior(n)) for n in ("joy", "anger")}
    joyful = [p.positive for p in behaviors.load_behavior("joy").answer_pairs[:4]]
    plain = [p.negative for p in behaviors.load_behavior("joy").answer_pairs[:4]]
    found = propensity.heard(readers, {"joy": plain, "anger": plain}, {"joy": joyful, "anger": plain})
    assert found.crossed.shape == (2, 2) and (found.own["joy"] > 0).all() and not found.own["anger"].any()
    assert found.crossed[0, 0] == pytest.approx(found.own["joy"].mean())
    assert found.crossed[0, 0] > found.crossed[1, 0] and not found.crossed[:, 1].any()
