"""One generator of replies: transformers' own greedy text, whatever a model's own generation settings say."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from helpers.lm import hooks, models, reading, replies, scoring, tokens

ASK = ["What is tin?", "How do I peel a lot of garlic quickly without a knife?"]


def batch_of(model, side="left"):
    return tokens.pad([tokens.chat(model.tokenizer, q) for q in ASK], model.tokenizer.pad_token_id, side)


def theirs(model, batch, n):
    special = torch.tensor(sorted(tokens.special_ids(model.tokenizer)))
    settings = GenerationConfig(
        max_new_tokens=n, do_sample=False, pad_token_id=model.tokenizer.pad_token_id, eos_token_id=special.tolist()
    )
    ids = model.weights.generate(input_ids=batch.ids, attention_mask=batch.mask.long(), generation_config=settings)
    out = torch.full((len(ids), n), -1)
    new = ids[:, batch.ids.shape[1] :]
    out[:, : new.shape[1]] = new
    ended = torch.isin(out, special).long().cumsum(1) > 0
    ended[:, 0] = False
    return torch.where(ended, -1, out)


@pytest.mark.parametrize("name", ["smol", "tiny", "gemma"])
@pytest.mark.parametrize("steered", [False, True])
def test_greedy_replies_are_transformers_own(name, steered, request):
    model, n = request.getfixturevalue(name), 12
    batch, v = batch_of(model), 30 * torch.randn(model.d_model)
    with hooks.add(model, 1, v * steered, 1.0, tokens.positions(batch, "response")):
        assert torch.equal(replies.write(model, batch, n), theirs(model, batch, n))


@pytest.mark.parametrize(
    "odd",
    [{"use_cache": False}, {"num_beams": 2}, {"repetition_penalty": 1.7}, {"do_sample": True, "temperature": 9.0}],
)
def test_a_models_own_settings_change_nothing_and_it_is_said(tiny, odd, cache, capsys, monkeypatch):
    monkeypatch.setattr(replies, "_SAID", set())
    plain = replies.generate_ids(tiny, ASK, max_new_tokens=6)
    kept, tiny.weights.generation_config = tiny.weights.generation_config, GenerationConfig(**odd)
    use_cache, tiny.weights.config.use_cache = tiny.weights.config.use_cache, odd.get("use_cache", True)
    try:
        other = dataclasses.replace(tiny, identity=f"tiny {odd}")
        assert torch.equal(replies.generate_ids(other, ASK, max_new_tokens=6), plain)
        steered = replies.generate_ids(other, ASK, 1, torch.ones(48), 1.0, max_new_tokens=6)
        assert steered.shape == plain.shape
    finally:
        tiny.weights.generation_config, tiny.weights.config.use_cache = kept, use_cache
    said = capsys.readouterr().out
    assert ("are not used here" in said) == bool({"num_beams", "repetition_penalty", "use_cache"} & set(odd))


@pytest.mark.parametrize("name", ["tiny", "gemma"])
def test_each_question_may_have_a_vector_of_its_own(name, request, cache):
    model = request.getfixturevalue(name)
    vectors = 30 * torch.randn(2, 48)
    both = replies.generate_ids(model, ASK, 1, vectors, 0.5, max_new_tokens=8)
    alone = [replies.generate_ids(model, [q], 1, v, 0.5, max_new_tokens=8) for q, v in zip(ASK, vectors, strict=True)]
    assert torch.equal(both, torch.cat(alone)) and not torch.equal(*alone)
    assert torch.equal(
        replies.generate_ids(model, ASK, 1, 0 * vectors, max_new_tokens=8),
        replies.generate_ids(model, ASK, max_new_tokens=8),
    )
    for wrong, word in (
        (torch.ones(3, 48), "3 vectors were given for 2 questions"),
        (torch.ones(2, 47), r"shape \(47,\)"),
        (torch.tensor(1.0), r"shape \(\)"),
    ):
        with pytest.raises(ValueError, match=word):
            replies.generate_ids(model, ASK, 1, wrong)


def test_only_the_last_token_is_unembedded(tiny):
    seen = []
    handle = tiny.unembedding.module.register_forward_hook(lambda module, args, out: seen.append(out.shape[:2]))
    try:
        replies.write(tiny, batch_of(tiny), 3)
    finally:
        handle.remove()
    assert set(seen) == {(1, len(ASK))}


def test_sampling_is_seeded_and_leaves_the_random_state_alone(tiny, cache):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = [replies.generate_ids(tiny, ASK, max_new_tokens=6, temperature=1.0, seed=s) for s in (1, 2)]
    assert torch.equal(torch.rand(3), expected) and not torch.equal(*one)


def test_sampled_tokens_follow_the_softmax(tiny):
    batch = tokens.pad([tokens.chat(tiny.tokenizer, ASK[0])] * 400, tiny.tokenizer.pad_token_id)
    p = (reading.forward(tiny, batch).logits[0, -1].double() / 9).softmax(-1)
    with replies.seeded(tiny, 3):
        drawn = replies.write(tiny, batch, 1, temperature=9.0)[:, 0]
    rank = p.argsort(descending=True).argsort()[drawn]
    top = float(p.sort(descending=True).values[:200].sum())
    assert abs(float((rank < 200).double().mean()) - top) < 4 * (top * (1 - top) / 400) ** 0.5


def test_what_cannot_be_written_is_refused(tiny, cache):
    with pytest.raises(ValueError, match="ends in padding"):
        replies.write(tiny, batch_of(tiny, "right"), 3)
    for wrong in ({"max_new_tokens": 0}, {"max_new_tokens": 3, "temperature": -1.0}):
        with pytest.raises(ValueError, match="are wanted"):
            replies.write(tiny, batch_of(tiny), **wrong)
    with pytest.raises(ValueError, match="tiny-llama takes 512"):
        replies.write(tiny, batch_of(tiny), 600)
    with pytest.raises(ValueError, match="no questions"):
        replies.generate_ids(tiny, [])
    with pytest.raises(ValueError, match=r"shape \(1,\)"):
        replies.generate_ids(tiny, ASK, 1, torch.ones(1))


def test_own_answers_are_kept_with_their_questions(tiny, cache):
    path = replies.chats(tiny, ASK, max_new_tokens=5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["question"] for r in rows] == ASK and all(r["answer"] for r in rows)
    assert replies.chats(tiny, ASK, max_new_tokens=5) == path != replies.chats(tiny, ASK, max_new_tokens=4)


# --- what a score is not given for -------------------------------------------------------------------------------------


@pytest.fixture
def where(tiny):
    both = [[tokens.chat(tiny.tokenizer, q, answer=a) for a in ("Yes.", "No, never.")] for q in ASK]
    return scoring.Continuations(tiny, both, 1)


@pytest.mark.parametrize(
    ("vector", "word"),
    [(torch.full((48,), torch.nan), "NaN"), (torch.full((48,), torch.inf), "NaN or infinity"), (torch.ones(1), r"shape \(1,\)"),
     (torch.ones(47), r"shape \(47,\)"), (torch.ones(1, 48), r"shape \(1, 48\)"), (torch.tensor(1.0), r"shape \(\)")],
)  # fmt: skip
def test_vectors_that_are_none_are_refused_and_not_kept(where, cache, vector, word):
    for score in (scoring.log_odds, scoring.kl, scoring.text_loss):
        with pytest.raises(ValueError, match=word):
            score(where, [vector], [1.0])
    with pytest.raises(ValueError, match="must be finite"):
        scoring.log_odds(where, [torch.ones(48)], [float("nan")])
    assert not list(cache.glob("scores/*"))


def test_a_stream_that_overflows_is_refused(tiny, cache):
    import copy

    half = reading.LM.of(copy.deepcopy(tiny.weights).half(), tiny.tokenizer, "half")
    both = [[tokens.chat(half.tokenizer, q, answer=a) for a in ("Yes.", "No, never.")] for q in ASK]
    where = scoring.Continuations(half, both, 1)
    assert np.isfinite(scoring.log_odds(where, [torch.ones(48)], [1.0])).all()
    for vector, multiplier in ((torch.ones(48), 1e6), (1e6 * torch.ones(48), 1.0), (torch.ones(48), -7e4)):
        with pytest.raises(ValueError, match="bfloat16 or float32"):
            scoring.log_odds(where, [vector], [multiplier])


def test_zero_is_the_unsteered_run_and_numbers_of_any_kind_name_a_layer(tiny, where, cache):
    zero = scoring.log_odds(where, [torch.zeros(48)], [1.0])
    np.testing.assert_array_equal(zero, scoring.log_odds(where, [torch.ones(48)], [0.0]))
    for layer in (np.int64(1), torch.tensor(1), True):
        again = scoring.Continuations(tiny, where.sequences, layer)
        np.testing.assert_array_equal(
            scoring.log_odds(again, [torch.ones(48)], [1.0]), scoring.log_odds(where, [torch.ones(48)], [1.0])
        )
        assert reading.means(tiny, where.sequences[0], [layer])[0].shape == (2, 1, 1, 48)
    with pytest.raises(TypeError):
        scoring.Continuations(tiny, where.sequences, 1.5)


def test_prompts_and_ids_beyond_the_model_are_refused(tiny):
    long = tokens.plain(tiny.tokenizer, "tin " * 600)
    with pytest.raises(ValueError, match="tiny-llama takes 512"):
        reading.residuals(tiny, [long], 1)
    beyond = tokens.Tokens([1, 4096, 2], [tokens.USER] * 3)
    with pytest.raises(ValueError, match="token id 4096.*0 to 4095"):
        reading.residuals(tiny, [beyond], 1)


def test_an_encoder_is_no_language_model(bpe):
    from transformers import AutoModelForCausalLM, BertConfig

    config = BertConfig(
        vocab_size=len(bpe), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(models.ModelError, match="a causal model is wanted"):
        reading.LM.of(AutoModelForCausalLM.from_config(config), bpe, "bert")


def test_completions_prepared_under_a_hook_are_refused(tiny, where, cache):
    with hooks.add(tiny, 2, 9 * torch.ones(48)):
        for call in (
            lambda: where.log_probs(torch.ones(48), 1.0),
            lambda: where.kl(torch.ones(48), 1.0),
            where.gradients,
        ):
            with pytest.raises(ValueError, match="has hooks set"):
                call()
    fresh = scoring.Continuations(tiny, where.sequences, 1)
    np.testing.assert_array_equal(where.log_probs(torch.ones(48), 1.0), fresh.log_probs(torch.ones(48), 1.0))


def test_a_completion_needs_something_before_it_and_one_token_is_enough(tiny, cache):
    answer = tokens.Tokens([9, 8, 7], [tokens.ANSWER] * 3)
    with pytest.raises(ValueError, match="nothing stands before"):
        scoring.Continuations(tiny, [[answer]], 1)
    one = tokens.Tokens([1, 9, 8, 7], [tokens.SPECIAL] + [tokens.ANSWER] * 3)
    v = torch.randn(48)
    found = scoring.Continuations(tiny, [[one]], 1).log_probs(v, 2.0)[0, 0]
    with hooks.add(tiny, 1, v, 2.0):
        logits = tiny.weights(torch.tensor([one.ids])).logits[0].log_softmax(-1)
    assert found == pytest.approx(sum(float(logits[i, one.ids[i + 1]]) for i in range(3)), abs=1e-3)


def test_log_odds_are_of_two(tiny, cache):
    three = [[tokens.chat(tiny.tokenizer, ASK[0], answer=a) for a in ("Yes.", "No.", "Perhaps.")]]
    for n in (1, 3):
        where = scoring.Continuations(tiny, [three[0][:n]], 1)
        for call in (
            lambda w=where: scoring.log_odds(w, [torch.ones(48)], [1.0]),
            lambda w=where: scoring.linear_response(w),
        ):
            with pytest.raises(ValueError, match=f"two completions a prompt, and {n} were"):
                call()


def test_gradients_want_no_inference_mode(where):
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        where.gradients()


def test_a_layer_named_twice_is_read_once_and_a_multiplier_that_overflows_is_refused(tiny, cache):
    with hooks.capture(tiny, [0, 0, 2]) as acts:
        reading.forward(tiny, batch_of(tiny))
    assert acts[0].shape == acts[2].shape
    both = reading.means(tiny, [tokens.chat(tiny.tokenizer, ASK[0])], [0, 0, 2])[0]
    assert torch.equal(both[:, :, 0], both[:, :, 1]) and not torch.equal(both[:, :, 0], both[:, :, 2])
    for vector, multiplier in ((torch.full((48,), 100.0, dtype=torch.float16), 1e5), (torch.ones(48), float("nan"))):
        with pytest.raises(ValueError, match="with its multiplier, holds NaN or infinity"):
            hooks.add(tiny, 1, vector, multiplier)


def test_replies_know_which_tokens_end_them(tiny, cache):
    import copy

    ids = replies.generate_ids(tiny, ASK, max_new_tokens=6)
    other = copy.deepcopy(tiny.tokenizer)
    other.add_special_tokens({"additional_special_tokens": [tiny.tokenizer.decode([int(ids[0, 2])])]})
    if len(other) == len(tiny.tokenizer):  # the token was there and is special now
        again = replies.generate_ids(tiny.read_as(other), ASK, max_new_tokens=6)
        assert int(again[0, 2]) == -1 and int(ids[0, 2]) >= 0


@pytest.mark.parametrize("change", ["no end, no padding", "padding beyond the embedding"])
def test_any_id_will_do_for_padding(tiny, cache, change):
    import copy

    tokenizer = copy.deepcopy(tiny.tokenizer)
    if change == "no end, no padding":
        tokenizer.pad_token = tokenizer.eos_token = None
    else:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    other = dataclasses.replace(tiny, tokenizer=tokenizer, identity=change)
    laid = [tokens.chat(tiny.tokenizer, q) for q in ASK]
    torch.testing.assert_close(reading.means(other, laid, [2])[0], reading.means(tiny, laid, [2])[0])
    assert torch.equal(
        replies.write(other, tokens.pad(laid, other.pad_id), 4), replies.write(tiny, tokens.pad(laid, tiny.pad_id), 4)
    )


def test_a_reply_ends_where_the_models_own_settings_end_it(tiny):
    batch = batch_of(tiny)
    ids = replies.write(tiny, batch, 6)
    kept, tiny.weights.generation_config = (
        tiny.weights.generation_config,
        GenerationConfig(eos_token_id=[int(ids[0, 3])]),
    )
    try:
        stopped = replies.write(tiny, batch, 6)
    finally:
        tiny.weights.generation_config = kept
    assert stopped[0].tolist() == [*ids[0, :3].tolist(), -1, -1, -1] or int(ids[0, 3]) in ids[0, :3].tolist()


def test_batches_of_nothing_are_refused(tiny, cache):
    laid = [tokens.chat(tiny.tokenizer, q) for q in ASK]
    for how in ({"batch_size": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="at a time"):
            reading.means(tiny, laid, [1], **how)
        with pytest.raises(ValueError, match="at least 1"):
            list(scoring.resumed(tiny, laid, 1, [torch.zeros(len(t.ids), 48) for t in laid], **how))
    for wrong in ([], [tokens.Tokens([], [])]):
        with pytest.raises(ValueError, match="none empty"):
            reading.residuals(tiny, wrong, 1)
    with pytest.raises(ValueError, match="token id -1 was given"):
        reading.residuals(tiny, [tokens.Tokens([1, -1], [0, 3])], 1)


@pytest.mark.parametrize("change", ["autocast", "training", "edited", "global hook"])
def test_what_is_kept_is_that_of_the_model_as_it_was_loaded(tiny, cache, change):
    import copy

    other = reading.LM.of(copy.deepcopy(tiny.weights), tiny.tokenizer, "changed")
    both = [[tokens.chat(tiny.tokenizer, q, answer=a) for a in ("Yes.", "No.")] for q in ASK]
    handle = None
    if change == "training":
        other.weights.train()
    elif change == "edited":
        other.weights.get_output_embeddings().weight.mul_(2)
    elif change == "global hook":
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, out: None)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
            for call in (
                lambda: scoring.log_odds(scoring.Continuations(other, both, 1), [torch.ones(48)], [1.0]),
                lambda: reading.means(other, both[0], [1]),
                lambda: replies.generate_ids(other, ASK),
            ):
                with pytest.raises(ValueError, match="as that of the model as it was loaded"):
                    call()
    finally:
        if handle:
            handle.remove()


def test_weights_with_something_beside_them_are_no_plain_model(tiny):
    import copy

    weights = copy.deepcopy(tiny.weights)
    torch.nn.utils.parametrize.register_parametrization(weights.get_output_embeddings(), "weight", torch.nn.Identity())
    with pytest.raises(models.ModelError, match="beside its weights"):
        reading.LM.of(weights, tiny.tokenizer, "parametrised")


def test_a_default_dtype_of_somebody_elses_changes_nothing(tiny, where, cache):
    expected = scoring.log_odds(where, [torch.ones(48)], [1.0])
    means = reading.means(tiny, where.sequences[0], [1])[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        fresh = scoring.Continuations(tiny, where.sequences, 1)
        found = fresh.log_probs(torch.ones(48, dtype=torch.float32), 1.0)
        np.testing.assert_allclose(found[:, 0] - found[:, 1], expected[0, 0])
        assert (
            reading._means(tiny, where.sequences[0], [1], "last", None, 32, True).dtype == means.dtype == torch.float32
        )
    finally:
        torch.set_default_dtype(torch.float32)
