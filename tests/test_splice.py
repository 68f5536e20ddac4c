"""An SAE inside a model: no edit is no change, an edit is exactly the difference of its codes, and splicing is sae_lens's own."""

import pytest
import torch
from conftest import tiny_model
from sae_lens import SAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformers import AutoTokenizer

from helpers.lm import hooks, reading, tokens
from helpers.lm.hooks import Positions
from helpers.sae import splice

LAYER = 1


@pytest.fixture
def sae(tiny):
    """A TopK SAE of the tiny model's width with offsets, so that b_dec would be seen if it were added."""
    d = tiny.d_model
    cfg = {
        "d_in": d,
        "d_sae": 3 * d,
        "k": 5,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "device": "cpu",
    }
    made = SAE.from_dict(
        {
            "architecture": "topk",
            **cfg,
            "dtype": "float32",
            "rescale_acts_by_decoder_norm": False,
            "metadata": {"hook_name": hooks.resid_post(LAYER)},
        }
    )
    with torch.no_grad():
        for p in (made.W_enc, made.W_dec, made.b_enc, made.b_dec):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / p.shape[-1] ** 0.5)
    return made.eval()


@pytest.fixture
def sequences(tiny):
    return [tokens.chat(tiny.tokenizer, q) for q in ("Where do rivers begin?", "Name three birds.")]


def run(model, sequences):
    return reading.forward(model, tokens.pad(sequences, model.tokenizer.pad_token_id)).logits


def test_residuals_are_those_of_the_model_and_a_steered_run_differs_by_the_vector(tiny, sequences):
    v = torch.randn(tiny.d_model)
    plain, steered = reading.residuals(tiny, sequences, LAYER), reading.residuals(tiny, sequences, LAYER, 2 * v)
    for laid, a, b in zip(sequences, plain, steered, strict=True):
        alone = tiny.weights(torch.tensor([laid.ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]
        assert torch.allclose(a, alone, atol=1e-5) and torch.allclose(b - a, (2 * v).expand_as(a), atol=1e-5)


def test_the_error_is_what_decoding_misses(sae):
    x = torch.randn(7, sae.cfg.d_in)
    assert torch.allclose(splice.errors(sae, x), x - sae(x), atol=1e-5)


def test_no_edit_is_no_change_to_the_bit(tiny, sae, sequences):
    before = run(tiny, sequences)
    for edit in (None, lambda z: z, lambda z: z * 1.0):
        with splice.edited(tiny, LAYER, sae, edit):
            assert torch.equal(run(tiny, sequences), before)
    assert torch.equal(run(tiny, sequences), before)  # and the hook is gone


def test_an_edit_shifts_by_exactly_the_difference_of_two_decodes(tiny, sae, sequences):
    def edit(z):
        z[..., 4] += 3.0
        return torch.where(torch.arange(z.shape[-1]) == int(z[0, 0].argmax()), torch.zeros(()), z)

    plain = reading.residuals(tiny, sequences, LAYER)
    with splice.edited(tiny, LAYER, sae, edit):
        shifted = reading.residuals(tiny, sequences, LAYER)
    width = max(len(t.ids) for t in sequences)
    x = torch.stack([torch.nn.functional.pad(p, (0, 0, 0, width - len(p))) for p in plain])
    z = sae.encode(x)
    expected = sae.decode(edit(z.clone())) - sae.decode(z)
    for i, (a, b) in enumerate(zip(plain, shifted, strict=True)):
        assert torch.allclose(b - a, expected[i, : len(a)], atol=1e-4)
        assert (b - a).norm() > 1


def test_only_chosen_positions_are_edited(tiny, sae, sequences):
    batch = tokens.pad(sequences, tiny.tokenizer.pad_token_id, side="right")
    where = Positions(batch.roles == tokens.USER)
    plain = reading.residuals(tiny, sequences, LAYER)
    with splice.edited(tiny, LAYER, sae, error_term=False, positions=where):
        changed = reading.residuals(tiny, sequences, LAYER)
    for laid, a, b in zip(sequences, plain, changed, strict=True):
        user = torch.tensor(laid.roles) == tokens.USER
        assert torch.equal(a[~user], b[~user]) and torch.allclose(b[user], sae(a[user]), atol=1e-4)


@pytest.mark.parametrize("error_term", [True, False])
def test_the_splice_is_sae_lens_own_with_and_without_its_error_term(sae, tiny, error_term, tmp_path):
    weights = tiny_model("llama").weights  # the same weights; a bridge takes a model apart
    tiny.tokenizer.save_pretrained(tmp_path)  # a bridge loads it anew by its name
    theirs = SAETransformerBridge.boot_transformers(
        "llama", hf_model=weights, tokenizer=AutoTokenizer.from_pretrained(tmp_path)
    )
    ids = torch.tensor([tokens.chat(tiny.tokenizer, "Where do rivers begin?").ids])
    with theirs.saes([sae], use_error_term=error_term):
        expected = theirs(ids)
    with splice.edited(tiny, LAYER, sae, error_term=error_term):
        ours = tiny.weights(ids).logits
    assert torch.allclose(ours, expected, atol=1e-3)
    assert error_term == torch.allclose(ours, tiny.weights(ids).logits, atol=1e-3)


def test_an_edit_of_another_shape_is_refused(tiny, sae, sequences):
    with (
        pytest.raises(ValueError, match="returned codes of shape"),
        splice.edited(tiny, LAYER, sae, lambda z: z[..., :2]),
    ):
        run(tiny, sequences)


def test_what_is_spoken_leaves_out_first_template_special_and_outlier_tokens(tiny):
    reply = tiny.tokenizer(" In springs.", add_special_tokens=False)["input_ids"]
    talk = tokens.conversation(tiny.tokenizer, "Where do rivers begin?", reply)
    rows = reading.residuals(tiny, [talk], LAYER)[0]
    rows[-1] *= 1e6
    spoken = splice.spoken(talk, rows, limit=1e5)
    assert tiny.tokenizer.decode(spoken.ids) == "Where do rivers begin? In springs"
    assert tiny.tokenizer.decode(spoken.ids[torch.from_numpy(spoken.answer)]) == " In springs" and len(
        spoken.rows
    ) == len(spoken.ids)


def test_errors_are_compared_token_by_token(sae):
    x = torch.randn(6, sae.cfg.d_in)
    y = torch.randn(6, sae.cfg.d_in)
    same, other = splice.compare_errors(sae, x, x), splice.compare_errors(sae, x, y)
    assert abs(same.ratio - 1).max() < 1e-6 and abs(same.cosine - 1).max() < 1e-6
    a, b = x - sae(x), y - sae(y)
    assert torch.allclose(torch.from_numpy(other.ratio).float(), b.norm(dim=1) / a.norm(dim=1), atol=1e-4)
    assert torch.allclose(torch.from_numpy(other.cosine).float(), torch.cosine_similarity(a, b), atol=1e-4)
