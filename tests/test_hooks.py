"""Reading and writing the residual stream is exact."""

import pytest
import torch

from helpers.lm import hooks, reading, replies, scoring, tokens

QUESTIONS = ["What is tin?", "How do I peel a lot of garlic quickly without a knife?"]


def batch_of(model, side="left", answer=None):
    asked = [tokens.chat(model.tokenizer, q, answer=answer) for q in QUESTIONS]
    return tokens.pad(asked, model.tokenizer.pad_token_id, side)


@pytest.mark.parametrize("name", ["smol", "tiny", "gemma"])
def test_the_bridge_holds_the_same_parameters_and_gives_the_same_streams(name, request):
    model = request.getfixturevalue(name)
    ids, v = model.encode("What is tin made of?"), 5 * torch.randn(model.d_model)
    names = {hooks.resid_post(k): k for k in range(model.layers)}
    with hooks.add(model, 1, v), hooks.capture(model, list(names.values())) as acts:
        logits = model.weights(ids).logits
    with model.bridge.hooks(fwd_hooks=[(hooks.resid_post(1), lambda x, hook: x + v)]):
        theirs, cache = model.bridge.run_with_cache(ids)
    torch.testing.assert_close(theirs, logits, atol=2e-3, rtol=1e-4)
    for name, k in names.items():
        torch.testing.assert_close(cache[name], acts[k], atol=2e-3, rtol=1e-4)
    ours = {p.data_ptr() for p in model.weights.parameters()}
    assert sum(p.numel() for p in model.bridge.parameters() if p.data_ptr() not in ours) <= len(model.embedding)
    assert model.bridge is model.bridge
    reading.unhooked(model)


@pytest.mark.parametrize("name", ["smol", "tiny", "gemma"])
def test_captured_residuals_equal_hidden_states_at_every_layer(name, request):
    model = request.getfixturevalue(name)
    batch = batch_of(model)
    layers = range(model.layers)
    with hooks.capture(model, layers) as acts:
        hidden = reading.forward(model, batch, output_hidden_states=True).hidden_states
    for k in layers[:-1]:  # the last entry of hidden_states is after the final norm
        assert torch.equal(acts[k], hidden[k + 1])


def test_zero_multiplier_changes_no_logit(smol):
    batch = batch_of(smol)
    plain = reading.forward(smol, batch).logits
    with hooks.add(smol, 14, torch.randn(576), 0.0):
        assert torch.equal(reading.forward(smol, batch).logits, plain)


@pytest.mark.parametrize("name", ["smol", "gemma"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_adding_moves_the_stream_there_by_the_vector_and_nothing_before(name, side, request):
    model = request.getfixturevalue(name)
    layer, v = 2, torch.randn(model.d_model)
    batch = batch_of(model, side)
    chosen = tokens.positions(batch, "response")
    with hooks.capture(model, [0, 1, layer]) as before:
        reading.forward(model, batch)
    with hooks.add(model, layer, v, 3.0, chosen), hooks.capture(model, [0, 1, layer]) as after:
        reading.forward(model, batch)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    moved = after[layer] - before[layer]
    assert not moved[~chosen.prompt & batch.mask].any()
    torch.testing.assert_close(moved[chosen.prompt], (3 * v).expand(2, -1), atol=1e-3, rtol=1e-5)


def test_plus_then_minus_cancels(tiny):
    batch, v = batch_of(tiny), torch.randn(48)
    plain = reading.forward(tiny, batch).logits
    with hooks.add(tiny, 1, v), hooks.add(tiny, 1, v, -1.0):
        torch.testing.assert_close(reading.forward(tiny, batch).logits, plain, atol=1e-4, rtol=1e-4)


def test_hooks_are_gone_after_an_exception(tiny):
    batch = batch_of(tiny)
    plain = reading.forward(tiny, batch).logits
    with pytest.raises(RuntimeError, match="planted"), hooks.add(tiny, 1, torch.randn(48)):
        raise RuntimeError("planted")
    with pytest.raises(RuntimeError, match="planted"), hooks.resume_at(tiny, 2, torch.zeros(1)):
        raise RuntimeError("planted")
    with hooks.capture(tiny, [1], stop=True):
        reading.forward(tiny, batch)
    assert torch.equal(reading.forward(tiny, batch).logits, plain)
    reading.unhooked(tiny)


def test_capture_stops_after_the_deepest_layer(tiny):
    ran = []
    handle = tiny.blocks[3].register_forward_hook(lambda *_: ran.append(3))
    with hooks.capture(tiny, [0, 2], stop=True) as acts:
        reading.forward(tiny, batch_of(tiny))
    handle.remove()
    assert sorted(acts) == [0, 2] and not ran


def test_positions_under_generate_with_its_cache(tiny):
    """Steered generation equals steering the finished sequence at the same positions: no token is missed or hit twice."""
    batch, v = batch_of(tiny, "left"), 5 * torch.randn(48)
    chosen = tokens.positions(batch, "response")
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=tiny.tokenizer.pad_token_id)
    with hooks.add(tiny, 1, v, 1.0, chosen), hooks.capture(tiny, [1]) as acts:
        ids = tiny.weights.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask.long(),
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    width = batch.ids.shape[1]
    whole_mask = torch.cat([batch.mask, torch.ones(2, 6, dtype=torch.bool)], 1)
    where = torch.cat([chosen.prompt, torch.ones(2, 6, dtype=torch.bool)], 1)
    positions = (whole_mask.long().cumsum(1) - 1).clamp_min(0)
    with hooks.add(tiny, 1, v, 1.0, hooks.Positions(where)), hooks.capture(tiny, [1]) as whole:
        logits = tiny.weights(input_ids=ids.sequences, attention_mask=whole_mask.long(), position_ids=positions).logits
    assert acts[1].shape == (2, width + 5, 48)
    for step in range(6):
        torch.testing.assert_close(ids.logits[step], logits[:, width + step - 1], atol=1e-3, rtol=1e-3)
    real = whole_mask[:, : width + 5]
    torch.testing.assert_close(acts[1][real], whole[1][:, : width + 5][real], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("where", ["prompt", "all", "after_instruction", [0, -1]])
def test_every_position_word_is_right_under_generate(tiny, where):
    batch, v = batch_of(tiny, "left"), 5 * torch.randn(48)
    chosen = tokens.positions(batch, where)
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=tiny.tokenizer.pad_token_id)
    with hooks.add(tiny, 1, v, positions=chosen), hooks.capture(tiny, [1]) as acts:
        ids = tiny.weights.generate(input_ids=batch.ids, attention_mask=batch.mask.long(), **options)
    extra = torch.ones(2, 4, dtype=torch.bool)
    mask = torch.cat([batch.mask, extra], 1)
    written = hooks.Positions(torch.cat([chosen.prompt, extra & chosen.later], 1))
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    with hooks.add(tiny, 1, v, positions=written), hooks.capture(tiny, [1]) as whole:
        tiny.weights(input_ids=ids, attention_mask=mask.long(), position_ids=positions)
    real = mask[:, :-1]
    torch.testing.assert_close(acts[1][real], whole[1][:, :-1][real], atol=1e-3, rtol=1e-3)


def test_the_hook_serves_two_generations_in_a_row(tiny):
    batch, v = batch_of(tiny, "left"), 5 * torch.randn(48)
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=tiny.tokenizer.pad_token_id)
    inputs = dict(input_ids=batch.ids, attention_mask=batch.mask.long())
    with hooks.add(tiny, 1, v, 1.0, tokens.positions(batch, "response")):
        first = tiny.weights.generate(**inputs, **options)
        second = tiny.weights.generate(**inputs, **options)
    assert torch.equal(first, second)


def test_padding_side_does_not_change_what_is_read(smol):
    left, right = batch_of(smol, "left"), batch_of(smol, "right")
    rows = []
    for batch in (left, right):
        with hooks.capture(smol, [14], tokens.positions(batch, "last"), stop=True) as acts:
            reading.forward(smol, batch)
        rows.append(acts[14])
    torch.testing.assert_close(*rows, atol=2e-3, rtol=1e-4)


def test_errors_name_what_was_given(tiny):
    with pytest.raises(IndexError, match="layer 9 given.*0 to 3"):
        hooks.block(tiny, 9)
    with pytest.raises(ValueError, match=r"shape \(7,\).*\(48,\)"):
        hooks.add(tiny, 1, torch.zeros(7))
    with pytest.raises(ValueError, match="NaN"):
        hooks.add(tiny, 1, torch.full((48,), torch.nan))
    other = tokens.positions(batch_of(tiny, answer="Yes."), "answer")
    with pytest.raises(ValueError, match="built for a prompt"), hooks.add(tiny, 1, torch.zeros(48), 1.0, other):
        reading.forward(tiny, batch_of(tiny))


@pytest.mark.parametrize(
    "context", [lambda m: hooks.add(m, 1, torch.ones(48)), lambda m: hooks.resume_at(m, 1, torch.zeros(1))]
)
def test_what_is_kept_on_disk_is_never_that_of_a_hooked_model(tiny, context, cache):
    sequences = [tokens.chat(tiny.tokenizer, QUESTIONS[0], answer="A metal.")]
    with context(tiny):
        for call in (
            lambda: reading.means(tiny, sequences, [2]),
            lambda: scoring.log_odds(scoring.Continuations(tiny, [sequences * 2], 2), [torch.ones(48)], [1.0]),
            lambda: replies.generate_ids(tiny, QUESTIONS),
        ):
            with pytest.raises(ValueError, match="has hooks set"):
                call()
    assert not list(cache.glob("*/*"))


def test_a_context_inside_another_leaves_the_outer_as_it_was(tiny):
    batch = batch_of(tiny)
    with hooks.capture(tiny, [1, 2]) as acts:
        reading.forward(tiny, batch)
    moved = acts[1] + 1
    with hooks.resume_at(tiny, 1, moved):
        outer = reading.forward(tiny, batch).logits
        with hooks.resume_at(tiny, 2, acts[2]):
            reading.forward(tiny, batch)
        assert torch.equal(reading.forward(tiny, batch).logits, outer)
    calls, block = [], tiny.blocks[0]
    own = block.forward
    block.forward = lambda *a, **k: calls.append(1) or own(*a, **k)
    try:
        reading.LM.of(tiny.weights, tiny.tokenizer, "patched by somebody else")
        before = len(calls)
        tiny.weights(batch.ids)
        assert len(calls) == before + 1
    finally:
        del block.forward
