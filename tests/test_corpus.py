"""Token rows: packing, what is kept and why not, sources, parts, errors."""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from helpers.lm import text, tokens
from helpers.steering.behaviors import DataError


def write(path, *lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_packing_loses_no_token_and_marks_separators(bpe, tmp_path):
    texts = [f"Document {i} speaks of {'rivers and ' * (i % 7)}hills." for i in range(60)]
    source = write(tmp_path / "a.jsonl", *(json.dumps({"text": t}) for t in texts))
    count = Counter()
    rows = list(text.rows(bpe, source, 32, count=count))
    stream = [i for t in texts for i in [*bpe(t)["input_ids"], bpe.eos_token_id]]
    ids = np.concatenate([r.ids for r in rows])
    assert ids.tolist() == stream[: len(ids)] and count["left over"] == len(stream) - len(ids) < 32
    kept = np.concatenate([r.kept for r in rows])
    special = np.isin(ids, list(tokens.special_ids(bpe)))
    assert not kept[::32].any() and not (kept & special).any()
    assert kept.sum() == count["kept"] == len(ids) - special.sum() - count["first"]
    assert count["special"] == special.sum() and count["padding"] == 0
    of = np.concatenate([r.documents for r in rows])
    assert (np.diff(of) >= 0).all() and bpe.decode(ids[of == 3][:-1]) == texts[3]


def test_a_tokenizer_with_a_first_token_puts_it_before_every_row(tmp_path):
    class Letters:
        bos_token_id, eos_token_id, pad_token_id, all_special_ids = 1, 2, 2, [1, 2]

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    source = write(tmp_path / "a.txt", "abcdefgh", "", "ijkl")
    rows = list(text.rows(Letters(), source, 5))
    assert ["".join(chr(i) if i > 2 else str(i) for i in r.ids) for r in rows] == ["1abcd", "1efgh", "12ijk"]
    assert [r.kept.tolist() for r in rows] == [[False] + [True] * 4] * 2 + [[False, False, True, True, True]]


def test_a_conversation_has_a_row_of_its_own_with_user_and_answer_kept(bpe, tmp_path):
    source = write(tmp_path / "c.jsonl", json.dumps({"question": "Who are you?", "answer": "A small model."}))
    count = Counter()
    (row,) = text.rows(bpe, source, 64, count=count)
    assert bpe.decode(row.ids[row.kept]) == "Who are you?A small model."
    assert count["padding"] == 64 - len(tokens.chat(bpe, "Who are you?", answer="A small model.").ids)
    assert (
        count["template"] > 0
        and count["special"] > 0
        and sum(count[k] for k in ("kept", "template", "special", "first", "padding")) == 64
    )


def test_a_conversation_longer_than_a_row_is_cut_and_counted_or_left_out(bpe, tmp_path):
    long = {"question": "Why?", "answer": "Because of the wind. " * 30}
    hopeless = {"question": "Why is that so? " * 30, "answer": "No."}
    source = write(tmp_path / "c.jsonl", json.dumps(long), json.dumps(hopeless))
    count = Counter()
    rows = list(text.rows(bpe, source, 64, count=count))
    whole = [len(tokens.chat(bpe, c["question"], answer=c["answer"]).ids) for c in (long, hopeless)]
    assert len(rows) == 1 and count["truncated"] == sum(whole) - 2 * 64 and count["padding"] == 0
    with pytest.raises(DataError, match="less than one row"):
        list(text.rows(bpe, write(tmp_path / "h.jsonl", json.dumps(hopeless)), 64))


def test_parts_divide_documents_and_do_not_depend_on_order(bpe, tmp_path):
    texts = [f"Text number {i} about nothing in particular, word {i * i}." for i in range(300)]
    forward = write(tmp_path / "a.jsonl", *(json.dumps({"text": t}) for t in texts))
    train = {t for t in texts if not text.held_out(t)}
    assert 15 < 300 - len(train) < 50
    count = {part: Counter() for part in text.PARTS}
    decoded = {}
    for part in text.PARTS:
        rows = text.rows(bpe, forward, 16, part, count[part])
        decoded[part] = bpe.decode(np.concatenate([r.ids for r in rows]), skip_special_tokens=True)
    assert count["train"]["rows"] + count["held-out"]["rows"] in (count["all"]["rows"], count["all"]["rows"] - 1)
    kept_out = next(t for t in texts if t not in train)
    assert kept_out in decoded["held-out"] and kept_out not in decoded["train"] and kept_out in decoded["all"]


def test_several_sources_are_taken_in_turn(tmp_path):
    a = write(tmp_path / "a.txt", "one", "", "two", "", "three")
    b = write(tmp_path / "b.txt", "uno")
    assert list(text.documents([a, b])) == ["one", "uno", "two", "three"]


def test_packaged_text_is_many_documents_in_a_fixed_order(packaged):
    first, again = (list(text.documents("packaged:wiki+stories")) for _ in range(2))
    assert first == again and len(first) > 500 and not any("<doc" in d for d in first)
    assert len(set(map(len, first[:20]))) > 5


def test_the_fingerprint_of_a_local_file_is_its_content(tmp_path):
    source = write(tmp_path / "a.txt", "some words")
    before = text.fingerprint(source)
    write(tmp_path / "a.txt", "other words")
    assert text.fingerprint(source) != before and str(tmp_path) not in before[0]
    packaged, hub = text.fingerprint(["packaged:wiki", "hub:a/b@c0ffee"])
    assert re.fullmatch("packaged:wiki@[0-9a-f]{12}", packaged) and hub == "hub:a/b@c0ffee"


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [("a.txt", "", "empty"), ("a.txt", "too short", "less than one row of 64"), ("a.jsonl", '{"text": "x"}\nnot json', "line 2"),
     ("a.jsonl", '{"body": "x"}', "line 1.*body"), ("a.jsonl", '["x"]', "list"), ("a.jsonl", '{"question": "x", "answer": 3}', "question and answer")],
)  # fmt: skip
def test_bad_files_are_refused(bpe, tmp_path, name, content, word):
    with pytest.raises(DataError, match=word):
        list(text.rows(bpe, write(tmp_path / name, content), 64))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes('{"text": "café"}'.encode("latin-1"))
        with pytest.raises(DataError, match="not UTF-8"):
            list(text.documents(str(tmp_path / name)))


def test_bad_names_are_refused(bpe, packaged):
    for source, word in (("nowhere.txt", "existing"), ("packaged:poems", "wiki"), ("FineWeb", "hub:OWNER")):
        with pytest.raises(DataError, match=word):
            list(text.rows(bpe, source, 64))
    with pytest.raises(ValueError, match="part"):
        next(text.rows(bpe, "packaged:wiki", 64, "test"))
    with pytest.raises(ValueError, match="context"):
        next(text.rows(bpe, "packaged:wiki", 1))


def test_a_hub_data_set_is_pinned_and_streamed_with_its_subset_and_revision(monkeypatch, bpe):
    import datasets
    import huggingface_hub

    asked = {}

    def load(name, subset, **options):
        asked.update(name=name, subset=subset, **options)
        return ({"text": f"page {i} with words"} for i in range(30))

    class Api:
        def __init__(self, token):
            pass

        def dataset_info(self, name, revision, timeout):
            assert (name, revision) == ("HuggingFaceFW/fineweb", "v1.0.0")
            return SimpleNamespace(sha="c0ffee")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", "not-to-be-shown")
    pinned = text.resolved(["packaged:wiki", "hub:HuggingFaceFW/fineweb:sample-10BT@v1.0.0"])
    assert pinned == ["packaged:wiki", "hub:HuggingFaceFW/fineweb:sample-10BT@c0ffee"]
    rows = list(text.rows(bpe, pinned[1], 16))
    assert len(rows) > 5 and asked["streaming"] and asked["split"] == "train"
    assert (asked["name"], asked["subset"], asked["revision"]) == ("HuggingFaceFW/fineweb", "sample-10BT", "c0ffee")


def test_a_source_pinned_to_a_commit_asks_nobody(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: pytest.fail("the hub was asked"))
    pinned = f"hub:a/b:part@{'0123456789' * 4}"
    assert text.resolved([pinned, "packaged:wiki"]) == [pinned, "packaged:wiki"]


def test_a_hub_that_fails_is_explained_without_the_token(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setenv("HF_TOKEN", "not-to-be-shown")

    def broken(*_, **__):
        raise OSError("no network for not-to-be-shown")

    def later(*_, **__):
        yield {"text": "one"}
        broken()

    monkeypatch.setattr(huggingface_hub, "HfApi", broken)
    with pytest.raises(DataError, match="packaged:wiki") as error:
        text.resolved("hub:a/b")
    assert "not-to-be-shown" not in str(error.value)
    for load in (broken, later):
        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(DataError, match="packaged:wiki") as error:
            list(text.documents("hub:a/b"))
        assert "not-to-be-shown" not in str(error.value)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"body": "x"}]))
    with pytest.raises(DataError, match="no field text; it has body"):
        next(text.documents("hub:a/b"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([]))
    with pytest.raises(DataError, match="no rows"):
        next(text.documents("hub:a/b"))


def test_all_answers_to_one_question_are_on_one_side():
    for i in range(40):
        assert len({text.held_out(text.Chat(f"What is {i}?", answer)) for answer in ("this", "that", "nothing")}) == 1
    assert {text.held_out(text.Chat(f"What is {i}?", "this")) for i in range(40)} == {True, False}


def test_a_path_is_a_source_like_its_name(bpe, tmp_path):
    name = write(tmp_path / "a.txt", "one and two and three and four", "", "five")
    other = write(tmp_path / "b.jsonl", '{"text": "uno"}')
    for source, path in (
        (name, Path(name)),
        ([name, other], [Path(name), other]),
        ([name, other], (Path(name), Path(other))),
    ):
        assert list(text.documents(path)) == list(text.documents(source))
        assert text.fingerprint(path) == text.fingerprint(source)
        assert text.resolved(path) == text.resolved(source) and json.dumps(text.resolved(path))
        ours, theirs = (list(text.rows(bpe, s, 4)) for s in (path, source))
        assert [r.ids.tolist() for r in ours] == [r.ids.tolist() for r in theirs]
    with pytest.raises(DataError, match="no source '.*nowhere.txt'"):
        next(text.documents(tmp_path / "nowhere.txt"))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_is_no_text(tmp_path, mark):
    plain = write(tmp_path / "a.txt", f"{mark}one", "", "two \ufeffthree")
    lines = write(tmp_path / "a.jsonl", f'{mark}{{"text": "one"}}', '{"text": "two \ufeffthree"}')
    assert list(text.documents(plain)) == list(text.documents(lines)) == ["one", "two \ufeffthree"]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.jsonl", rb'{"text": "x \ud83d y"}', "line 2: .*half of a surrogate pair"),
        ("a.jsonl", rb'{"question": "\uDE00", "answer": "x"}', "line 2: .*half of a surrogate pair"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"1" * 4301 + b"}", "line 2: .*digits"),
        ("a.jsonl", b"[" * 2000 + b"]" * 2000, "line 2: nested"),
        ("a.jsonl", b'{"text": "x", "n": NaN}', "line 2: NaN"),
        ("a.jsonl", b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
        ("a.txt", b"x \xed\xa0\x80 y", "not UTF-8"),
        ("a.txt", "x y".encode("utf-16-le"), "line 2: zero bytes, as of UTF-16"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16-le"), "line 2: zero bytes, as of UTF-16"),
    ],
)
def test_text_that_no_tokenizer_takes_is_refused_where_it_is(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(b'{"text": "fine"}\n' + content)
    with pytest.raises(DataError, match=word) as error:
        list(map(text.held_out, text.documents(tmp_path / name)))
    assert "a." in str(error.value) and len(str(error.value)) < 300


def test_a_whole_pair_of_surrogates_is_text(tmp_path):
    source = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}')
    assert list(text.documents(source)) == ["😀"]


def test_names_that_no_file_can_have_are_refused(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for source in ("a\0b.txt", "x" * 5000 + ".txt", tmp_path / "folder.txt"):
        with pytest.raises(DataError, match="no source"):
            next(text.documents(source))
        assert text.fingerprint(source) == [str(source)]
