"""Extraction against hand arithmetic and a peer; vectors that keep their bits."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from helpers.lm import hooks, reading, tokens
from helpers.steering import caa, directions
from helpers.steering.behaviors import AnswerPair, SystemPair, TextPair

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


def test_the_turns_end_is_one_token_after_whatever_the_answers_end_in(tiny, cache):
    pair = AnswerPair("What is tin?", "A dull metal, you fool!", "A soft metal.")
    one, other = (laid.ids for laid in caa.tokens_of(tiny.tokenizer, pair, closed=True))
    open_one, open_other = (laid.ids for laid in caa.tokens_of(tiny.tokenizer, pair))
    assert tiny.tokenizer.decode([one[-1]]) == "<|im_end|>" and open_one[-1] != open_other[-1]
    assert one == [*open_one, one[-1]] and other == [*open_other, one[-1]]
    closed = caa.tokens_of(tiny.tokenizer, pair, closed=True)[1]
    torch.testing.assert_close(
        caa.extract_answers(tiny, [pair], [1])["turn"].at(1)[1][0], alone(tiny, closed, 1)[-1], atol=1e-4, rtol=1e-4
    )
    kept = caa.make_vector(tiny, torch.randn(48), 1, "x", "mean", "turn", [pair], 1.0)
    assert kept.read_from.endswith("«<|im_end|>»")


def test_one_pass_reads_answers_at_all_places(tiny, cache):
    pairs = [
        AnswerPair("What is tin?", "A dull metal, you fool!", "A soft metal."),
        AnswerPair("Why is the sky blue at noon?", "Look it up!", "Air scatters the short waves of light most."),
    ]
    found = caa.extract_answers(tiny, pairs, [1, 3], batch_size=3)
    assert list(found) == list(caa.READ)
    closed = [laid for pair in pairs for laid in caa.tokens_of(tiny.tokenizer, pair, closed=True)]
    ends = reading.means(tiny, closed, [1, 3])[0][:, 0]
    at_ends = caa.Halves(ends[0::2], ends[1::2], [1, 3], 4, 0.0)
    for where, halves in found.items():
        alone = at_ends if where == "turn" else caa.extract(tiny, pairs, [1, 3], where)
        torch.testing.assert_close(halves.at(3), alone.at(3), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(halves.at(1), alone.at(1), atol=1e-4, rtol=1e-4)


def test_a_base_models_turn_ends_with_the_line(tiny):
    plain = copy.copy(tiny.tokenizer)
    plain.chat_template = None
    assert plain.decode([tokens.end_of_turn(plain)]) == "\n"


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


def steering(vector=None, layer=2, **changes):
    return dataclasses.replace(
        caa.SteeringVector(
            torch.arange(1.0, 7.0) if vector is None else vector,
            layer,
            "anger",
            "mean",
            "last",
            "m",
            3,
            "d",
            9.0,
            "«x»",
        ),
        **changes,
    )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"vector": torch.tensor([1.0, float("nan")])}, "1 values that are NaN or infinite"),
        ({"vector": torch.tensor([1e39, 1.0], dtype=torch.float64)}, "1 values that are NaN or infinite"),
        ({"vector": torch.zeros(6)}, "zero"),
        ({"vector": torch.ones(2, 3)}, r"shape \(2, 3\)"),
        ({"vector": torch.tensor(3.0)}, r"shape \(\)"),
        ({"vector": torch.ones(0)}, r"shape \(0,\)"),
        ({"layer": -1}, "layer -1"),
        ({"layer": 2.5}, "layer 2.5"),
        ({"layer": np.float32(2)}, "layer .*2"),
        ({"layer": torch.tensor(2.5)}, "layer tensor"),
        ({"residual_norm": 0.0}, "residual_norm 0.0"),
        ({"residual_norm": float("nan")}, "residual_norm nan"),
    ],
)
def test_a_vector_that_steers_nothing_is_refused(change, word):
    with pytest.raises(ValueError, match=word):
        steering(**change)


def test_a_vector_takes_the_numbers_people_have(tmp_path):
    for layer in (np.int64(2), torch.tensor(2), 2):
        v = steering(torch.ones(6, dtype=torch.bfloat16).requires_grad_(), layer, residual_norm=np.float32(9))
        back = caa.load_vector(caa.save_vector(v, tmp_path / "v"))
        assert back.layer == 2 and back.vector.dtype == torch.float32 and torch.equal(back.vector, torch.ones(6))
        caa.export_direction(v, tmp_path / "d")
        caa.export_repeng([v], tmp_path / "v.gguf", "llama")


@pytest.mark.parametrize(
    ("positions", "pos"), [("last", -1), ("-2", -2), ("-1", -1), ("7", 7), ("answer", None), ("", None)]
)
def test_refusal_directions_layout_comes_back(tmp_path, positions, pos):
    folder = caa.export_direction(steering(positions=positions), tmp_path / "d")
    assert json.loads((folder / "direction_metadata.json").read_text()) == {"pos": pos, "layer": 3}
    for place in (folder, str(folder), folder / "direction.pt"):
        back = caa.import_direction(place)
        assert torch.equal(back.vector, steering().vector) and back.layer == 2
        again = caa.export_direction(back, tmp_path / "again")
        assert (again / "direction_metadata.json").read_text() == (folder / "direction_metadata.json").read_text()
    assert ("position not said" in back.summary()) == (pos is None)


def refusal(folder, vector=None, **metadata):
    folder.mkdir(exist_ok=True)
    torch.save(torch.arange(1.0, 7.0, dtype=torch.float64) if vector is None else vector, folder / "direction.pt")
    (folder / "direction_metadata.json").write_text(json.dumps({"pos": -2, "layer": 10} | metadata, indent=4))
    return folder


def test_a_direction_of_theirs_enters_at_the_layer_below_and_keeps_its_position(tmp_path):
    v = caa.import_direction(refusal(tmp_path / "a"), behavior="refusal", model="m", residual_norm=50.0)
    assert (v.layer, v.positions, v.behavior, v.model, v.residual_norm) == (9, "-2", "refusal", "m", 50.0)
    assert v.vector.dtype == torch.float32 and v.vector.tolist() == [1, 2, 3, 4, 5, 6]
    assert "norm 9.54 = 0.191 of the residual norm 50" in v.summary()
    assert caa.import_direction(tmp_path / "a", layer=10).layer == 9
    bare = caa.import_direction(tmp_path / "a")
    assert "residual norm not measured" in bare.summary() and "pairs" not in bare.summary()
    back = caa.load_vector(caa.save_vector(bare, tmp_path / "v"))
    assert vars(back) | {"vector": 0} == vars(bare) | {"vector": 0} and torch.equal(back.vector, bare.vector)
    again = caa.export_direction(back, tmp_path / "b")
    assert json.loads((again / "direction_metadata.json").read_text()) == {"pos": -2, "layer": 10}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"layer": 0}, "layer 0.*embeddings"),
        ({"layer": -3}, "layer -3"),
        ({"layer": "10"}, "layer '10'"),
        ({"layer": 10.5}, "layer 10.5"),
        ({"layer": True}, "layer True"),
        ({"layer": None}, "layer None"),
        ({"pos": "last"}, "pos 'last'"),
        ({"vector": torch.ones(3, 4)}, r"shape \(3, 4\)"),
        ({"vector": torch.tensor([1.0, float("inf")])}, "NaN or infinite"),
        ({"vector": torch.zeros(5)}, "zero"),
        ({"vector": {"direction": torch.ones(3)}}, "dict"),
        ({"vector": torch.ones(3, dtype=torch.complex64)}, "complex64"),
        ({"vector": torch.ones(3, dtype=torch.int64)}, "int64"),
        ({"vector": np.ones(3)}, "weights"),
    ],
)
def test_directions_of_theirs_that_cannot_be_used_are_refused(tmp_path, change, word):
    with pytest.raises(ValueError, match=word) as error:
        caa.import_direction(refusal(tmp_path / "a", **change))
    assert "direction" in str(error.value)


def test_files_of_directions_that_are_missing_or_broken_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.*no such file"):
        caa.import_direction(tmp_path / "nowhere")
    folder = refusal(tmp_path / "a")
    with pytest.raises(ValueError, match="layer 9.*layer 10"):
        caa.import_direction(folder, layer=9)
    for text, word in (
        ("{", "not JSON"),
        ("[]", "layer and pos"),
        ('{"pos": -1}', "layer None"),
        ('{"layer": NaN}', "NaN"),
    ):
        (folder / "direction_metadata.json").write_text(text)
        with pytest.raises(ValueError, match=f"direction_metadata.json.*{word}"):
            caa.import_direction(folder)
    (folder / "direction_metadata.json").unlink()
    with pytest.raises(ValueError, match="direction_metadata.json.*no such file"):
        caa.import_direction(folder)
    (folder / "direction.pt").write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match="direction.pt.*cannot be read"):
        caa.import_direction(folder)
    (folder / "direction.pt").unlink()
    with pytest.raises(ValueError, match="direction.pt.*no such file"):
        caa.import_direction(folder)
    (tmp_path / "v.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"v.npy.*\.pt.*\.gguf"):
        caa.import_direction(tmp_path / "v.npy")


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("it ran",))

    torch.save(Evil(), tmp_path / "evil_response_avg_diff.pt")
    with pytest.raises(ValueError, match="cannot be read as a tensor"):
        caa.import_direction(tmp_path / "evil_response_avg_diff.pt", layer=2)


def test_persona_vectors_rows_are_hidden_states(tmp_path):
    rows = torch.randn(5, 6).half()  # four blocks: the embeddings, three streams, and what comes out of the final norm
    path = tmp_path / "evil_response_avg_diff.pt"
    torch.save(rows, path)
    for layer in (1, 2, np.int64(3)):
        v = caa.import_direction(path, layer=layer, model="m")
        assert v.layer == layer - 1 and torch.equal(v.vector, rows[int(layer)].float())
    assert v.behavior == "evil" and v.positions == "response_avg" and "persona_vectors" in v.method
    back = caa.load_vector(caa.save_vector(v, tmp_path / "v"))
    assert torch.equal(back.vector, v.vector) and back.summary() == v.summary()
    for layer, word in (
        (None, "layer=1 to layer=4"),
        (0, "embeddings"),
        (5, "layer 5"),
        (-1, "layer -1"),
        (1.5, "1.5"),
    ):
        with pytest.raises(ValueError, match=word):
            caa.import_direction(path, layer=layer)
    with pytest.warns(UserWarning, match="row 4 .* final norm"):
        assert caa.import_direction(path, layer=4).layer == 3
    rows[2, 3] = float("nan")
    torch.save(rows, path)
    with pytest.raises(ValueError, match="NaN or infinite"):
        caa.import_direction(path, layer=2)
    for wrong in (torch.ones(6), torch.ones(2, 5, 6)):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match="shape"):
            caa.import_direction(path, layer=1)


def test_a_persona_vectors_row_is_the_stream_after_the_block_below(tiny, tmp_path):
    ids = torch.tensor([tiny.tokenizer("How far is the moon?")["input_ids"]])
    with hooks.capture(tiny, [0, 2]) as acts:
        tiny.weights(ids)
    states = tiny.weights(ids, output_hidden_states=True).hidden_states
    torch.save(torch.stack([h[0, -1] for h in states]), tmp_path / "x.pt")
    for layer in (0, 2):
        v = caa.import_direction(tmp_path / "x.pt", layer=layer + 1)
        assert v.layer == layer
        torch.testing.assert_close(v.vector, acts[layer][0, -1], atol=1e-4, rtol=1e-4)


def test_control_vectors_come_back(tmp_path):
    import gguf

    given = [steering(torch.randn(6), layer) for layer in (1, 3)]
    path = caa.export_repeng(given, tmp_path / "new" / "v.gguf", "llama")
    for v in given:
        back = caa.import_direction(path, layer=v.layer)
        assert back.layer == v.layer and torch.equal(back.vector, v.vector)
    assert caa.import_direction(caa.export_repeng(given[:1], tmp_path / "one.gguf", "llama")).layer == 1
    for layer, word in ((None, "layers 1, 3"), (2, "no direction.2.*1, 3")):
        with pytest.raises(ValueError, match=word):
            caa.import_direction(path, layer=layer)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((2, 6), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(ValueError, match="model.gguf holds no direction"):
        caa.import_direction(tmp_path / "model.gguf", layer=1)
    path.write_bytes(b"GGUF nonsense")
    with pytest.raises(ValueError, match="v.gguf cannot be read"):
        caa.import_direction(path)


def test_control_vectors_that_no_reader_takes_are_not_written(tmp_path):
    for vectors, word in (
        ([steering(layer=0)], "layer 0.*llama.cpp"),
        ([steering(layer=3), steering(layer=0)], "layer 0.*llama.cpp"),
        ([], "no vectors"),
        ([steering(torch.ones(6)), steering(torch.ones(5), 3)], "6, 5"),
    ):
        with pytest.raises(ValueError, match=word):
            caa.export_repeng(vectors, tmp_path / "v.gguf", "llama")
    assert not list(tmp_path.iterdir())


def test_the_pair_that_needs_most_fillers_is_shown_with_what_is_averaged(bpe):
    pair = caa.most_filled(bpe, PAIRS)
    lengths = [abs(len(one.ids) - len(other.ids)) for one, other in (caa.tokens_of(bpe, p) for p in PAIRS)]
    assert pair == PAIRS[int(np.argmax(lengths))] and max(lengths) > 0
    one, other = caa.padded_pair(bpe, pair)
    masks = caa.padded_masks(one, other)
    for side, shown in zip((one, other), caa.shown_padded(bpe, pair), strict=True):
        assert shown.count("«") == int((masks["masked"] & ~masks["masked"].roll(1)).sum()) and "»«" not in shown
        assert shown.replace("«", "").replace("»", "") == bpe.decode(side.ids).replace("\n", "⏎")


def test_what_is_averaged_from_the_start_is_what_is_masked_and_what_is_before(tiny, cache):
    masks = caa.padded_masks(*caa.padded_pair(tiny.tokenizer, PAIRS[0]))
    assert masks["from the start"].equal(masks["masked"] | masks["before"]) and masks["before"].any()
    assert not (masks["masked"] & masks["before"]).any()
    cosines = caa.same_from_the_start(caa.extract_padded(tiny, PAIRS, [2], caa.PARTS), 2)
    assert cosines.shape == (3,) and cosines == pytest.approx(np.ones(3), abs=1e-6)
    halves = caa.extract_padded(tiny, PAIRS, [2], ["masked", "after"])
    other = caa.same_from_the_start({"masked": halves["masked"], "from the start": halves["after"]}, 2)
    assert other.max() < 0.999  # other positions are another direction


def test_a_difference_is_zero_until_the_prompts_differ(tiny):
    lengths = caa.position_lengths(tiny, PAIRS[0], 2)
    one, other = caa.padded_pair(tiny.tokenizer, PAIRS[0])
    first = next(i for i, (a, b) in enumerate(zip(one.ids, other.ids, strict=True)) if a != b)
    assert len(lengths) == len(one.ids) and not lengths[:first].any() and lengths[first:].all()
