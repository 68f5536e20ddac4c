"""Extraction against hand arithmetic and a peer; vectors that keep their bits."""

import json

import pytest
import torch

from helpers import caa, directions
from helpers.behaviors import AnswerPair, SystemPair, TextPair
from helpers.lm import hooks, reading, tokens

PAIRS = [
    SystemPair("You are a very angry old sailor.", "You are calm.", "What is tin?"),
    SystemPair("Shout at everyone.", "Speak gently to everyone who asks.", "Why is the sky blue at noon?"),
    SystemPair("Be cross.", "Be kind.", "How far is the moon?"),
]


def alone(model, laid, layer):
    batch = tokens.pad([laid], model.tokenizer.pad_token_id)
    with hooks.capture(model, [layer]) as acts:
        reading.forward(model, batch)
    return acts[layer][0]


@pytest.mark.parametrize("name", ["tiny", "gemma"])
def test_last_position_equals_one_text_at_a_time(name, request, cache):
    model = request.getfixturevalue(name)
    halves = caa.extract(model, PAIRS, [0, 2], batch_size=2)
    for i, pair in enumerate(PAIRS):
        one, other = caa.tokens_of(model.tokenizer, pair)
        torch.testing.assert_close(halves.at(2)[0][i], alone(model, one, 2)[-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(halves.at(2)[1][i], alone(model, other, 2)[-1], atol=1e-4, rtol=1e-4)
    assert halves.passes == 6 and halves.pos.shape == (3, 2, 48)


def test_answer_positions_average_the_answer_only(tiny, cache):
    pair = AnswerPair("What is tin?", "A dull metal, you fool!", "A soft metal.")
    laid = caa.tokens_of(tiny.tokenizer, pair)[0]
    rows = torch.tensor([r == tokens.ANSWER for r in laid.roles])
    expected = alone(tiny, laid, 1)[rows].mean(0)
    torch.testing.assert_close(caa.extract(tiny, [pair], [1], "answer").at(1)[0][0], expected, atol=1e-4, rtol=1e-4)


def test_left_and_right_padding_give_the_same_vector(tiny, cache, monkeypatch):
    right = caa.extract(tiny, PAIRS, [1]).at(1)
    pad = tokens.pad
    monkeypatch.setattr(tokens, "pad", lambda batch, pad_id, side="left": pad(batch, pad_id, "left"))
    monkeypatch.setenv("CACHE_DIR", str(cache) + "2")
    left = caa.extract(tiny, PAIRS, [1]).at(1)
    torch.testing.assert_close(directions.mean(*left), directions.mean(*right), atol=1e-5, rtol=1e-4)


def test_padded_pair_by_hand_and_nothing_before_the_contrast(tiny, cache):
    one, other = caa.padded_pair(tiny.tokenizer, PAIRS[0])
    masks = caa.padded_masks(one, other)
    found = caa.extract_padded(tiny, PAIRS[:1], [2], ["masked", "after"])
    acts = []
    for side in (one, other):
        batch = tokens.pad([side], tiny.tokenizer.pad_token_id)
        with hooks.capture(tiny, [2]) as a:
            reading.forward(tiny, batch, attend_filler=False)
        acts.append(a[2][0])
    difference = acts[0] - acts[1]
    for name, halves in found.items():
        expected = difference[masks[name]].mean(0).double()
        torch.testing.assert_close(directions.mean(*halves.at(2)), expected, atol=1e-5, rtol=1e-4)
    assert not difference[masks["before"]].any() and difference[masks["contrast"]].any(1).all()
    assert masks["masked"].equal(masks["contrast"] | masks["after"]) and not masks["masked"][0]


def test_masked_fillers_are_not_attended_to(tiny, cache):
    """The control fires when fillers are attended to, and is silent when they are not: their identity then changes nothing."""

    def vector(filler, attend):
        return directions.mean(
            *caa.extract_padded(tiny, PAIRS[:1], [2], ["after"], filler, attend_filler=attend)["after"].at(2)
        )

    torch.testing.assert_close(vector(" .", False), vector(" x", False), atol=1e-6, rtol=1e-5)
    assert (vector(" .", True) - vector(" x", True)).norm() > 1e-3


def test_mean_vector_equals_the_steering_vectors_package(smol, cache):
    peers = pytest.importorskip("steering_vectors", reason="pip install --no-deps -r requirements-oracle.txt")
    pairs = [TextPair("I love this day.", "I hate this day."), TextPair("What a good dog!", "What a bad dog!")]
    theirs = peers.train_steering_vector(
        smol.weights,
        smol.tokenizer,
        [tuple(p) for p in pairs],
        layers=[14],
        layer_config={"decoder_block": "model.layers.{num}"},
    ).layer_activations[14]
    ours = directions.mean(*caa.extract(smol, pairs, [14]).at(14)).float()
    torch.testing.assert_close(ours, theirs.float(), atol=1e-3, rtol=1e-4)


def test_residual_rows_leave_first_and_special_tokens_out(smol):
    laid = tokens.chat(smol.tokenizer, "What is tin?")
    rows = reading.rows(smol, [laid], 14)
    content = laid.roles.count(tokens.USER)
    assert rows.shape == (content, 576) and float(rows.norm(dim=1).max()) < 2000  # the first token's is above 20,000
    assert float(alone(smol, laid, 14)[0].norm()) > 10_000


def test_an_empty_selection_is_refused(tiny, cache):
    with pytest.raises(ValueError, match="no position 'answer'"):
        caa.extract(tiny, PAIRS, [1], "answer")


@pytest.fixture
def vector(tiny):
    return caa.make_vector(tiny, torch.randn(48), 2, "anger", "mean", "last", PAIRS, 123.4)


def test_a_vector_comes_back_to_the_same_bits(vector, tmp_path):
    path = caa.save_vector(vector, tmp_path / "v")
    back = caa.load_vector(path)
    assert torch.equal(back.vector, vector.vector) and back.summary() == vector.summary()
    assert {k: v for k, v in vars(back).items() if k != "vector"} == {
        k: v for k, v in vars(vector).items() if k != "vector"
    }
    note = json.loads((tmp_path / "v.json").read_text())
    assert note["hook"] == "blocks.2.hook_resid_post" and note["residual_norm"] == 123.4 and "«" in note["read_from"]


def test_dots_in_a_vectors_name_do_not_make_two_vectors_one(vector, tmp_path):
    caa.save_vector(vector, tmp_path / "llama-3.1-refusal")
    caa.save_vector(vector, tmp_path / "llama-3.1-anger")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_vector_with_foreign_papers_is_refused(vector, tmp_path):
    caa.save_vector(vector, tmp_path / "v")
    from safetensors.torch import save_file

    save_file({"vector": vector.vector + 1}, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match="not the vector that its .json describes"):
        caa.load_vector(tmp_path / "v")


def test_exports_are_what_peers_read(vector, tmp_path):
    import gguf

    path = caa.export_repeng([vector], tmp_path / "v.gguf", "llama")
    reader = gguf.GGUFReader(path)
    assert reader.tensors[0].name == "direction.2"
    assert torch.equal(torch.tensor(reader.tensors[0].data), vector.vector)
    assert bytes(reader.get_field("controlvector.model_hint").parts[-1]).decode() == "llama"
    with pytest.raises(ValueError, match="two vectors at one layer"):
        caa.export_repeng([vector, vector], tmp_path / "w.gguf", "llama")
    folder = caa.export_direction(vector, tmp_path / "d")
    assert torch.equal(torch.load(folder / "direction.pt", weights_only=True), vector.vector)
    assert json.loads((folder / "direction_metadata.json").read_text()) == {"pos": -1, "layer": 3}
