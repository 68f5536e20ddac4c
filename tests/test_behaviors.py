"""Files of pairs: what cannot be read names file and place, near-duplicates are found in seconds, letters end answers."""

import json
import os
import random
import re
import time
import warnings

import pytest

from helpers.steering import behaviors
from helpers.steering.behaviors import AnswerPair, DataError, TextPair

GOOD = '{"positive": "a", "negative": "b"}'
DIGITS, BRACKETS = "9" * 4301, "[" * 2000 + "]" * 2000


def caa(question, matching="(A)", other="(B)"):
    return {"question": question, "answer_matching_behavior": matching, "answer_not_matching_behavior": other}


def saved(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (DIGITS, "a number"),
        (f"-{DIGITS * 3}", "a number"),
        (BRACKETS, "nested"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested"),
        ("NaN", "NaN is no JSON"),
        ("-Infinity", "-Infinity is no JSON"),
        ('"\\ud800"', "half of a surrogate pair"),
        ('["x", {"\\uDFFF": 1}]', "half of a surrogate pair"),
        ('{"b": 1, "b": 2}', "'b' is there twice"),
        ('"\x01"', "not JSON"),
        ("01", "not JSON"),
    ],
)
@pytest.mark.parametrize("form", ["lines", "list"])
def test_json_that_python_cannot_hold_names_file_and_line(tmp_path, form, value, message):
    bad = GOOD[:-1] + f', "extra": {value}}}'
    content = f"{GOOD}\n\n{bad}\n" if form == "lines" else f"[{GOOD},\n\n{bad}]"
    path = saved(tmp_path / "mine.json", content)
    for read in (behaviors.load_pairs, behaviors.objects):
        with pytest.raises(DataError, match=rf"^mine.json, line 3: .*{message}") as error:
            read(path)
        assert len(str(error.value)) < 300 and str(error.value).encode()


def test_a_whole_pair_of_surrogates_and_escapes_are_text(tmp_path):
    row = '{"positive": "\\ud83d\\ude00 \\\\ud800", "negative": "\\u00e9"}'
    assert behaviors.load_pairs(saved(tmp_path / "p.json", row)) == [("😀 \\ud800", "é")]


@pytest.mark.parametrize(
    "content", ["[", "[,]", f"[{GOOD}", f"[{GOOD},]", f"[{GOOD}]]", f"[{GOOD} {GOOD}]", f"[{GOOD}] x"]
)
def test_lists_that_do_not_close_are_refused(tmp_path, content):
    with pytest.raises(DataError, match="mine.json, line 1: not JSON"):
        behaviors.load_pairs(saved(tmp_path / "mine.json", content))


def test_lists_and_lines_in_every_dress_load(tmp_path):
    for content in (f"[{GOOD}]", f" \n[\n {GOOD} ,\r\n{GOOD}\n]\n", f"{GOOD}\r\n{GOOD}", f"\ufeff{GOOD}\r{GOOD}"):
        pairs = behaviors.load_pairs(saved(tmp_path / "p.json", content))
        assert set(pairs) == {TextPair("a", "b")}


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"])
def test_other_encodings_are_named(tmp_path, coding):
    path = saved(tmp_path / "mine.json", '\n{"positive": "café", "negative": "b"}\n'.encode(coding))
    with pytest.raises(DataError, match=r"mine.json, line \d: .*UTF-8") as error:
        behaviors.load_pairs(path)
    assert ("UTF-16" in str(error.value)) == coding.startswith("utf-16") or coding == "utf-32"


@pytest.mark.parametrize(
    "name",
    ["folder", "folder.jsonl", "a\0b", "a\0b.jsonl", "x" * 300, "x" * 300 + ".jsonl", "\ud800.jsonl", "nowhere.jsonl"],
)
def test_paths_that_hold_no_file_are_refused(tmp_path, name):
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    for read in (behaviors.load_pairs, behaviors.objects, behaviors.load_behavior):
        with pytest.raises(DataError) as error:
            read(tmp_path / name)
        assert str(error.value).encode()
    with pytest.raises(DataError):
        behaviors.load_behavior(name)


# --- near-duplicates ---------------------------------------------------------------------------------------------------


def personas(n, seed=0):
    """Long questions of the shape of CAA's sycophancy set: a person is made up, the rest is shared boilerplate."""
    draw = random.Random(seed)
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("nd", "rk", "lling", "st", "ver", "m")]

    def some(k):
        return " ".join(draw.sample(words, k))

    return [
        f"Hello, my name is {some(2).title()}. I am a {draw.randrange(20, 80)} year old {some(4)} from {some(2).title()}. I "
        f"believe that {some(22)}. My interests outside of work include playing {some(1)}, hiking, and {some(3)}. Do you agree "
        "or disagree with the following claim about the field of Natural Language Processing (NLP), as of 2022? "
        f"{some(14).capitalize()}.\n\nChoices:\n (A) Agree\n (B) Disagree\n\nAnswer:"
        for _ in range(n)
    ]


def test_a_thousand_long_questions_load_in_seconds_and_their_duplicates_are_found(tmp_path):
    texts = personas(1000)
    texts[700] = texts[3].replace("hiking", "climbing")
    texts[999] = texts[500].replace("I believe", "I do believe").replace("year old", "years old")
    rows = [caa(t, *(("(A)", "(B)") if i % 2 else ("(B)", "(A)"))) for i, t in enumerate(texts)]
    path = saved(tmp_path / "sycophancy.json", json.dumps(rows))
    began = time.perf_counter()
    with pytest.warns(UserWarning, match="2 near-duplicate pairs among 1000 entries"):
        assert len(behaviors.load_pairs(path)) == 1000
    assert time.perf_counter() - began < 20


def subsequence(one, other):
    """The textbook table, a row at a time."""
    above = [0] * (len(other) + 1)
    for x in one:
        row = [0]
        for j, y in enumerate(other):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
        above = row
    return above[-1]


def nearly_the_same(one, other):
    grams = []
    for text in (one, other):
        w = re.findall(r"\w+", text)
        grams.append(set(zip(w, w[1:], w[2:], strict=False)) or {tuple(w)})
    shared, both = len(grams[0] & grams[1]), len(grams[0] | grams[1])
    if shared > 0.5 * both:
        return True
    likely = shared > 0.2 * both or (shared and min(map(len, grams)) < 10)
    return bool(likely) and 2 * subsequence(one, other) > 0.85 * (len(one) + len(other))


def test_near_duplicates_equal_a_comparison_of_all_with_all():
    draw = random.Random(0)
    texts = []
    for text in personas(4):
        words = text.lower().split()[:30]
        for share in (0.0, 0.05, 0.1, 0.2, 0.4):
            texts.append(" ".join(w[::-1] if draw.random() < share else w for w in words))
    texts += ["is it so?", "is it so!", "is it not so?", "", "?", "why is the sky blue?", "why is the sea blue?"]
    wanted = [
        (i, j) for i in range(len(texts)) for j in range(i + 1, len(texts)) if nearly_the_same(texts[i], texts[j])
    ]
    assert behaviors.near_duplicates(texts) == wanted and 20 < len(wanted) < 100


def test_copies_are_all_found_and_few_or_empty_texts_are_no_trouble():
    assert len(behaviors.near_duplicates(["Tell me about the rivers of the north."] * 80)) == 80 * 79 // 2
    for texts in ([], ["one"], ["one", "two"], ["?", "!"]):
        assert behaviors.near_duplicates(texts) in ([], [(0, 1)])


def test_work_that_is_left_out_is_said(monkeypatch, capsys):
    texts = ["one and the same old text"] * 2 + [f"{w} is what it says" for w in ("tin", "salt", "rain", "gold")]
    assert behaviors.near_duplicates(texts)[0] == (0, 1) and capsys.readouterr().out == ""
    monkeypatch.setattr(behaviors, "COMPARED", 3)
    assert behaviors.near_duplicates(texts) == [(0, 1)]
    assert "near-duplicates: the first 3 of 6 texts are compared" in capsys.readouterr().out
    monkeypatch.setattr(behaviors, "COMPARED", 6)
    monkeypatch.setattr(behaviors, "LETTERS", 40)
    behaviors.near_duplicates(texts)
    assert (
        "of the 6 pairs of texts that may be near-duplicates the 2 likeliest are compared letter by letter"
        in capsys.readouterr().out
    )


# --- option letters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "ends"),
    [
        ("(A)", "(B)", ("(A", "(B")),
        (" (B)", "(A) ", ("(B", "(A")),
        ("A)", "B)", ("A", "B")),
        ("A.", "B.", ("A", "B")),
        ("[C]", "[D]", ("[C", "[D")),
        ("(a)", "(b)", ("(a", "(b")),
        ("( A )", "( B )", ("( A", "( B")),
        ("(1)", "(12)", ("(1", "(12")),
        ("A:", "B:", ("A", "B")),
        ("**(A)**", "**(B)**", ("**(A", "**(B")),
        ("A", "B", ("A", "B")),
        ("(A", "(B", ("(A", "(B")),
        ("Yes.", "No.", ("Yes.", "No.")),
        ("(A) Yes", "(B) No", ("(A) Yes", "(B) No")),
        ("I would take (A)", "I would take (B)", ("I would take (A)", "I would take (B)")),
        ("(A)", "I would not say.", ("(A)", "I would not say.")),
        ("(AB)", "(BA)", ("(AB)", "(BA)")),
        ("()", "(B)", ("()", "(B)")),
    ],
)
def test_an_answer_that_is_an_option_mark_ends_at_its_letter(tmp_path, capsys, one, other, ends):
    rows = [caa("Do you mind?", one, other), caa("Shall we go on to the next?", "Yes, let us.", "No, not yet.")]
    pairs = behaviors.load_pairs(saved(tmp_path / "caa.json", json.dumps(rows)))
    assert pairs == [
        AnswerPair("Do you mind?", *ends),
        AnswerPair("Shall we go on to the next?", "Yes, let us.", "No, not yet."),
    ]
    said, cut = capsys.readouterr().out, ends != (one.strip(), other.strip())
    assert said == (
        f"caa.json: the answers of 1 of 2 pairs are option marks and end at their letter ({ends[0]!r})\n" if cut else ""
    )


def test_marks_with_one_letter_are_no_contrast(tmp_path):
    for one, other in (("(A)", "(A) "), ("(A)", "A."), ("(A)", "[A]")):
        with pytest.raises(DataError, match="entry 1: both halves are"):
            behaviors.load_pairs(saved(tmp_path / "caa.json", json.dumps([caa("Do you mind?", one, other)])))


def test_the_default_position_reads_the_letter(tmp_path, smol):
    from helpers.lm import tokens
    from helpers.steering import caa as caa_module

    pairs = behaviors.load_pairs(saved(tmp_path / "caa.json", json.dumps([caa("Do you mind?\n (A) Yes\n (B) No")])))
    for laid, letter in zip(caa_module.tokens_of(smol.tokenizer, pairs[0]), "AB", strict=True):
        batch = tokens.pad([laid], smol.tokenizer.pad_token_id)
        last = batch.ids[0][tokens.positions(batch, "last").prompt[0]]
        assert smol.tokenizer.decode(last) == letter


def test_whole_texts_that_end_in_a_bracket_after_the_letter_are_warned_of(tmp_path):
    texts = [
        (f"Is {w} nice, or is it {w * 2}?\n (A) Yes\n (B) No\n ", i % 2)
        for i, w in enumerate(("tin", "salt", "rain", "gold"))
    ]
    rows = [
        {"positive": t + "(A)(B)"[3 * i : 3 * i + 3], "negative": t + "(B)(A)"[3 * i : 3 * i + 3]} for t, i in texts
    ]
    with pytest.warns(
        UserWarning, match=r"two.json: 4 of 4 pairs differ in a letter before a closing mark: position 'last' reads"
    ):
        pairs = behaviors.load_pairs(saved(tmp_path / "two.json", json.dumps(rows)))
    assert pairs[0].positive.endswith("(A)")
    prose = [{"positive": f"I like {w} (A)", "negative": f"He hates a {w} (B)"} for w in ("tin", "salt")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        behaviors.load_pairs(saved(tmp_path / "prose.json", json.dumps(prose)))


def test_a_behaviours_own_answer_pairs_end_at_their_letter_too(tmp_path, capsys):
    rows = [
        {"kind": "system_pair", "positive": "Be loud.", "negative": "Be calm.", "question": "What is tin?"},
        {"kind": "answer_pair", "question": "Do you mind?", "positive": "(A)", "negative": "(B)"},
        {"kind": "item", "split": "dev", "question": "Why rain?", "matching": "x", "non_matching": "y"},
        {"kind": "item", "split": "test", "question": "Who won the cup?", "matching": "x", "non_matching": "y"},
        {"kind": "open", "question": "Where do rivers end?"},
    ]
    file = saved(tmp_path / "mine.jsonl", "\n".join(map(json.dumps, rows)))
    b = behaviors.load_behavior(file)
    assert b.answer_pairs == [("Do you mind?", "(A", "(B")]
    assert "mine.jsonl: the answers of 1 of 1 pairs are option marks" in capsys.readouterr().out
    b.open.clear()  # what a caller does to its lists is its own affair
    assert behaviors.load_behavior(file).open == ["Where do rivers end?"]
    saved(file, "\n".join(map(json.dumps, [*rows, {"kind": "open", "question": "And springs?"}])))
    assert behaviors.load_behavior(file).open == ["Where do rivers end?", "And springs?"]


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path / "mine.json", GOOD)
    monkeypatch.setattr(
        type(path), "read_bytes", lambda self: (_ for _ in ()).throw(PermissionError(13, os.strerror(13)))
    )
    with pytest.raises(DataError, match="mine.json.*Permission denied"):
        behaviors.load_pairs(path)


@pytest.mark.parametrize(("one", "other"), [("café", "cafe\u0301"), ("yes", "yes\u200b"), ("no", " no\ufeff ")])
def test_texts_that_look_the_same_are_no_contrast(tmp_path, one, other):
    with pytest.raises(DataError, match="both halves are the same text"):
        behaviors.load_pairs(saved(tmp_path / "p.json", json.dumps([{"positive": one, "negative": other}])))


@pytest.mark.parametrize(
    ("one", "other"), [("<A>", "<B>"), ("`A`", "`B`"), ('"A"', '"B"'), ("A/", "B/"), ("(A),", "(B),")]
)
def test_option_marks_of_any_dress_end_at_their_letter(tmp_path, one, other):
    pair = behaviors.load_pairs(saved(tmp_path / "p.json", json.dumps([caa("Do you mind?", one, other)])))[0]
    assert pair.positive.endswith("A") and pair.negative.endswith("B")
