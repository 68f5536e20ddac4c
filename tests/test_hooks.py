"""Reading and writing the residual stream is exact."""

import pytest
import torch

from helpers import hooks, models, prompts

QUESTIONS = ["What is tin?", "How do I peel a lot of garlic quickly without a knife?"]


def batch_of(model, side="left", answer=None):
    tokens = [prompts.chat(model.tokenizer, q, answer=answer) for q in QUESTIONS]
    return prompts.pad(tokens, model.tokenizer.pad_token_id, side)


def test_captured_residuals_equal_an_unwrapped_model_at_every_layer(smol):
    """transformers' own model, never bridged, is the oracle: the bridge replaces modules in the model it wraps."""
    weights, _, _ = models.plain("packaged:smollm2-135m-instruct")
    batch = batch_of(smol)
    with hooks.capture(smol, range(30)) as acts:
        models.run(smol, batch)
    options = dict(attention_mask=batch.mask.long(), position_ids=batch.position_ids, output_hidden_states=True)
    out = weights(input_ids=batch.ids, **options)
    for k in range(30):
        theirs = out.hidden_states[k + 1][batch.mask]
        ours = acts[k][batch.mask] if k < 29 else weights.model.norm(acts[k])[batch.mask]
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("name", ["smol", "tiny", "gemma"])
def test_captured_residuals_equal_hidden_states_at_every_layer(name, request):
    model = request.getfixturevalue(name)
    batch = batch_of(model)
    layers = range(model.cfg.n_layers)
    with hooks.capture(model, layers) as acts:
        hidden = models.run(model, batch, output_hidden_states=True).hidden_states
    for k in layers[:-1]:  # the last entry of hidden_states is after the final norm
        assert torch.equal(acts[k], hidden[k + 1])


def test_zero_multiplier_changes_no_logit(smol):
    batch = batch_of(smol)
    plain = models.run(smol, batch).logits
    with hooks.add(smol, 14, torch.randn(576), 0.0):
        assert torch.equal(models.run(smol, batch).logits, plain)


@pytest.mark.parametrize("name", ["smol", "gemma"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_adding_moves_the_stream_there_by_the_vector_and_nothing_before(name, side, request):
    model = request.getfixturevalue(name)
    layer, v = 2, torch.randn(model.cfg.d_model)
    batch = batch_of(model, side)
    chosen = prompts.positions(batch, "response")
    with hooks.capture(model, [0, 1, layer]) as before:
        models.run(model, batch)
    with hooks.add(model, layer, v, 3.0, chosen), hooks.capture(model, [0, 1, layer]) as after:
        models.run(model, batch)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    moved = after[layer] - before[layer]
    assert not moved[~chosen.prompt & batch.mask].any()
    torch.testing.assert_close(moved[chosen.prompt], (3 * v).expand(2, -1), atol=1e-3, rtol=1e-5)


def test_plus_then_minus_cancels(tiny):
    batch, v = batch_of(tiny), torch.randn(48)
    plain = models.run(tiny, batch).logits
    with hooks.add(tiny, 1, v), hooks.add(tiny, 1, v, -1.0):
        torch.testing.assert_close(models.run(tiny, batch).logits, plain, atol=1e-4, rtol=1e-4)


def test_hooks_are_gone_after_an_exception(tiny):
    batch = batch_of(tiny)
    plain = models.run(tiny, batch).logits
    with pytest.raises(RuntimeError, match="planted"), hooks.add(tiny, 1, torch.randn(48)):
        raise RuntimeError("planted")
    with pytest.raises(RuntimeError, match="planted"), hooks.resume_at(tiny, 2, torch.zeros(1)):
        raise RuntimeError("planted")
    with hooks.capture(tiny, [1], stop=True):
        models.run(tiny, batch)
    assert torch.equal(models.run(tiny, batch).logits, plain)
    assert not any(point._forward_hooks for point in tiny.hook_dict.values())


def test_capture_stops_after_the_deepest_layer(tiny):
    ran = []
    handle = hooks.hook_point(tiny, 3).register_forward_hook(lambda *_: ran.append(3))
    with hooks.capture(tiny, [0, 2], stop=True) as acts:
        models.run(tiny, batch_of(tiny))
    handle.remove()
    assert sorted(acts) == [0, 2] and not ran


def test_ablation_leaves_nothing_along_the_direction_and_keeps_the_rest(tiny):
    batch, u = batch_of(tiny), torch.randn(48)
    with hooks.capture(tiny, [2]) as before:
        models.run(tiny, batch)
    with hooks.ablate(tiny, 2, u), hooks.capture(tiny, [2]) as after:
        models.run(tiny, batch)
    unit = u / u.norm()
    assert float((after[2] @ unit).abs().max()) < 1e-4
    parallel = (before[2] @ unit)[..., None] * unit
    torch.testing.assert_close(after[2], before[2] - parallel, atol=1e-4, rtol=1e-4)


def test_ablate_then_add_sets_the_component(tiny):
    batch, v = batch_of(tiny), torch.randn(48)
    with hooks.ablate_then_add(tiny, 2, v, 0.5), hooks.capture(tiny, [2]) as after:
        models.run(tiny, batch)
    component = after[2] @ (v / v.norm())
    torch.testing.assert_close(component, torch.full_like(component, 0.5 * float(v.norm())), atol=1e-3, rtol=1e-4)


def test_positions_under_generate_with_its_cache(tiny):
    """Steered generation equals steering the finished sequence at the same positions: no token is missed or hit twice."""
    batch, v = batch_of(tiny, "left"), 5 * torch.randn(48)
    chosen = prompts.positions(batch, "response")
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=tiny.tokenizer.pad_token_id)
    with hooks.add(tiny, 1, v, 1.0, chosen), hooks.capture(tiny, [1]) as acts:
        ids = tiny.original_model.generate(
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
        logits = tiny.original_model(
            input_ids=ids.sequences, attention_mask=whole_mask.long(), position_ids=positions
        ).logits
    assert acts[1].shape == (2, width + 5, 48)
    for step in range(6):
        torch.testing.assert_close(ids.logits[step], logits[:, width + step - 1], atol=1e-3, rtol=1e-3)
    real = whole_mask[:, : width + 5]
    torch.testing.assert_close(acts[1][real], whole[1][:, : width + 5][real], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("where", ["prompt", "all", "after_instruction", [0, -1]])
@pytest.mark.parametrize("change", [hooks.add, hooks.ablate, hooks.ablate_then_add])
def test_every_position_word_and_edit_is_right_under_generate(tiny, where, change):
    batch, v = batch_of(tiny, "left"), 5 * torch.randn(48)
    chosen = prompts.positions(batch, where)
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=tiny.tokenizer.pad_token_id)
    with change(tiny, 1, v, positions=chosen), hooks.capture(tiny, [1]) as acts:
        ids = tiny.original_model.generate(input_ids=batch.ids, attention_mask=batch.mask.long(), **options)
    extra = torch.ones(2, 4, dtype=torch.bool)
    mask = torch.cat([batch.mask, extra], 1)
    written = hooks.Positions(torch.cat([chosen.prompt, extra & chosen.later], 1))
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    with change(tiny, 1, v, positions=written), hooks.capture(tiny, [1]) as whole:
        tiny.original_model(input_ids=ids, attention_mask=mask.long(), position_ids=positions)
    real = mask[:, :-1]
    torch.testing.assert_close(acts[1][real], whole[1][:, :-1][real], atol=1e-3, rtol=1e-3)


def test_the_hook_serves_two_generations_in_a_row(tiny):
    batch, v = batch_of(tiny, "left"), 5 * torch.randn(48)
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=tiny.tokenizer.pad_token_id)
    inputs = dict(input_ids=batch.ids, attention_mask=batch.mask.long())
    with hooks.add(tiny, 1, v, 1.0, prompts.positions(batch, "response")):
        first = tiny.original_model.generate(**inputs, **options)
        second = tiny.original_model.generate(**inputs, **options)
    assert torch.equal(first, second)


def test_padding_side_does_not_change_what_is_read(smol):
    left, right = batch_of(smol, "left"), batch_of(smol, "right")
    rows = []
    for batch in (left, right):
        with hooks.capture(smol, [14], prompts.positions(batch, "last"), stop=True) as acts:
            models.run(smol, batch)
        rows.append(acts[14])
    torch.testing.assert_close(*rows, atol=2e-3, rtol=1e-4)


def test_errors_name_what_was_given(tiny):
    with pytest.raises(IndexError, match="layer 9 given.*0 to 3"):
        hooks.hook_point(tiny, 9)
    with pytest.raises(ValueError, match=r"shape \(7,\).*\(48,\)"):
        hooks.add(tiny, 1, torch.zeros(7))
    with pytest.raises(ValueError, match="NaN"):
        hooks.add(tiny, 1, torch.full((48,), torch.nan))
    other = prompts.positions(batch_of(tiny, answer="Yes."), "answer")
    with pytest.raises(ValueError, match="built for a prompt"), hooks.add(tiny, 1, torch.zeros(48), 1.0, other):
        models.run(tiny, batch_of(tiny))
