"""Tokens, roles and positions by meaning; loaders that name file, line and field."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from helpers.lm import text, tokens
from helpers.lm.tokens import ANSWER, FILLER, PAD, SPECIAL, SYSTEM, USER
from helpers.session import ROOT
from helpers.steering import behaviors, caa
from helpers.steering.behaviors import DataError, SystemPair

NAMES = sorted(p.stem for p in behaviors.BEHAVIORS.glob("*.jsonl") if p.stem != "pirate")  # those of full size


def text_of(tokenizer, batch, chosen, row=0):
    return tokenizer.decode(batch.ids[row][chosen.prompt[row]])


@pytest.fixture(params=["bpe", "smol"])
def tokenizer(request):
    found = request.getfixturevalue(request.param)
    return getattr(found, "tokenizer", found)


def test_chat_marks_roles_and_never_doubles_the_first_token(tokenizer):
    t = tokens.chat(tokenizer, "Why is tin soft?", system="Be brief.", answer="It just is.")
    by_role = {
        role: tokenizer.decode([i for i, r in zip(t.ids, t.roles, strict=True) if r == role]) for role in set(t.roles)
    }
    assert by_role[SYSTEM] == "Be brief." and by_role[USER] == "Why is tin soft?" and by_role[ANSWER] == "It just is."
    assert t.ids[0] == tokenizer.bos_token_id and t.ids[1] != tokenizer.bos_token_id
    assert all(r == SPECIAL for i, r in zip(t.ids, t.roles, strict=True) if i in tokenizer.all_special_ids)


def test_chat_equals_the_tokenizers_own_template(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert tokens.chat(tokenizer, "Why?", system="Be brief.").ids == list(theirs["input_ids"])


def test_plain_text_gets_the_bos_the_tokenizer_would_add_once():
    class Fake:
        all_special_ids, bos_token_id, chat_template = [7], 7, None

        def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
            ids = ([7] if add_special_tokens else []) + [ord(c) for c in text]
            return {"input_ids": ids, "offset_mapping": [(i, i + 1) for i in range(len(text))]}

    assert tokens.plain(Fake(), "ab").ids == [7, 97, 98]
    assert tokens.chat(Fake(), "Why?", answer="So.").ids[:2] == [7, ord("U")]  # a base model: a plain transcript


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_by_meaning(tokenizer, side):
    rows = [
        tokens.chat(tokenizer, q, answer=a)
        for q, a in (("Why?", "Because."), ("How does one peel garlic?", "Slowly, by hand."))
    ]
    batch = tokens.pad(rows, tokenizer.pad_token_id, side)
    for row, (q, a) in enumerate((("Why?", "Because."), ("How does one peel garlic?", "Slowly, by hand."))):

        def show(where, row=row):
            return text_of(tokenizer, batch, tokens.positions(batch, where), row)

        assert show("answer") == a
        assert show("response") == "\n" + a
        assert show("after_instruction") == "<|im_end|>\n<|im_start|>assistant\n" + a
        assert show("last") == "."
        assert show("prompt").endswith("user\n" + q + "\nassistant\n") and "<|im" not in show("prompt")
        assert show("all").endswith(a) and "<|im" not in show("all")
        assert show([0, -1]) == "<|im_start|>."
    assert not any(
        tokens.positions(batch, w).prompt[batch.roles == PAD].any() for w in ("all", "response", "after_instruction")
    )
    assert tokens.positions(batch, "response").later and not tokens.positions(batch, "prompt").later


def test_special_tokens_without_a_name_are_special_too():
    added = {5: SimpleNamespace(special=True), 6: SimpleNamespace(special=False)}
    assert tokens.special_ids(SimpleNamespace(all_special_ids=[1], added_tokens_decoder=added)) == {1, 5}


def test_first_token_and_specials_stay_out_of_averages(tokenizer):
    batch = tokens.pad([tokens.chat(tokenizer, "Why?")], tokenizer.pad_token_id)
    assert not tokens.positions(batch, "all").prompt[0, 0]
    with_specials = tokens.positions(batch, "all", specials=True).prompt
    assert with_specials.sum() > tokens.positions(batch, "all").prompt.sum() and not with_specials[0, 0]


def test_padding_does_not_move_positions(tokenizer):
    rows = [tokens.chat(tokenizer, q) for q in ("Why?", "How does one peel garlic?")]
    for side in ("left", "right"):
        batch = tokens.pad(rows, tokenizer.pad_token_id, side)
        for i, t in enumerate(rows):
            assert batch.position_ids[i][batch.mask[i]].tolist() == list(range(len(t.ids)))


def test_bad_positions_are_refused(tokenizer):
    batch = tokens.pad([tokens.chat(tokenizer, "Why?")], tokenizer.pad_token_id)
    with pytest.raises(ValueError, match="'middle' given; choose one of all"):
        tokens.positions(batch, "middle")
    with pytest.raises(IndexError, match="position 999"):
        tokens.positions(batch, [999])
    with pytest.raises(ValueError, match="mask of shape"):
        tokens.positions(batch, torch.ones(1, 2))


def test_provenance_marks_the_chosen_tokens(tokenizer):
    batch = tokens.pad([tokens.chat(tokenizer, "Why?", answer="It is so.")], tokenizer.pad_token_id)
    shown = tokens.provenance(tokenizer, batch, tokens.positions(batch, "answer"))
    assert shown.count("«") == 4 and "«It»« is»« so»«.»" in shown and shown.endswith("«.»")
    later = tokens.provenance(tokenizer, batch, tokens.positions(batch, "response"))
    assert later.endswith("and every generated token")


def test_padded_pair_has_equal_length_and_equal_tokens_after(tokenizer):
    pair = SystemPair("You are a very angry old sailor.", "You are calm.", "What is tin?")
    one, other = caa.padded_pair(tokenizer, pair)
    assert len(one.ids) == len(other.ids) and FILLER in other.roles and FILLER not in one.roles
    last = max(i for i, r in enumerate(other.roles) if r in (SYSTEM, FILLER))
    assert one.ids[last + 1 :] == other.ids[last + 1 :]


@pytest.mark.parametrize("name", [*NAMES, "pirate"])
def test_behaviours_hold_what_their_cards_promise(name):
    """All are of full size but pirate, which serves one vector of one profile."""
    b = behaviors.load_behavior(name)
    counts = (len(b.system_pairs), len(b.answer_pairs), len(b.dev), len(b.test), len(b.open))
    assert counts == ((40, 40, 10, 50, 20) if name in NAMES else (12, 12, 4, 20, 8))
    questions = [p.question for p in [*b.system_pairs, *b.answer_pairs, *b.dev, *b.test]] + b.open
    systems = [text for p in b.system_pairs for text in (p.positive, p.negative)]
    matching, other = [i.matching for i in b.dev + b.test], [i.non_matching for i in b.dev + b.test]
    for texts in (questions, systems[0::2], systems[1::2], matching, other, [p.positive for p in b.answer_pairs]):
        assert behaviors.near_duplicates(texts) == []
    assert (ROOT / "data" / "behaviors" / f"{name}.md").exists()


def test_no_behaviour_is_another_or_its_negative():
    sides = {}
    for name in NAMES:
        b = behaviors.load_behavior(name)
        for pole, texts in (("+", [p.positive for p in b.answer_pairs]), ("-", [p.negative for p in b.answer_pairs])):
            sides[name + pole] = set(texts)
    keys = list(sides)
    assert not any(sides[a] & sides[b] for i, a in enumerate(keys) for b in keys[i + 1 :])


SETS = [f"packaged:{m.removesuffix('.json')}" for m in text.WHEELS["pairs"].members if m != "instructions.json"]


@pytest.mark.parametrize("name", SETS)
def test_a_packaged_set_is_split_without_overlap_and_balanced(name, smol):
    b = behaviors.load_behavior(name)
    assert f"packaged:{b.name}" == name and b.system_pairs == [] and b == behaviors.load_behavior(name)
    assert (len(b.dev), len(b.test), len(b.open)) == (10, 50, 20) and len(b.answer_pairs) >= 280
    for items in (b.dev, b.test, b.test[:6], b.answer_pairs[:6]):
        sides = [i[-2:] for i in items]  # matching, non_matching, or two texts
        assert 2 * sum(one[-1] < other[-1] for one, other in sides) == len(items)
    asked = [i.question for i in b.dev + b.test]
    paired = [p.positive.rpartition("(")[0].rstrip() for p in b.answer_pairs]
    assert len({*asked, *paired}) == len(asked) + len(paired)
    assert all(i.matching[0] == "(" and i.matching[1:].isupper() and i.matching != i.non_matching for i in b.test)
    assert all(question in i.question and "(A)" not in question for question, i in zip(b.open, b.test, strict=False))
    for pair in b.answer_pairs[:20]:
        assert pair.positive[:-1] == pair.negative[:-1] and pair.positive[-2] == "("
        one, other = caa.tokens_of(smol.tokenizer, pair)
        assert one.ids[:-1] == other.ids[:-1] and smol.tokenizer.decode(one.ids[-1:]) == pair.positive[-1]


def test_packaged_sets_that_cannot_be_had_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(DataError, match="'kindness'; there are packaged:sycophancy, .*packaged:coordinate-other-ais"):
        behaviors.load_behavior("packaged:kindness")
    rows = [
        {"positive": f"Is it {i}?\n (A) Yes\n (B) No\n (A)", "negative": f"Is it {i}?\n (A) Yes\n (B) No\n (B)"}
        for i in range(70)
    ]
    monkeypatch.setattr(text, "fetch", lambda name: tmp_path)
    write(tmp_path / "refusal.json", json.dumps([*rows, rows[3]]))
    b = behaviors.load_behavior("packaged:refusal")
    assert "refusal.json: 1 of 71 entries repeat a question" in capsys.readouterr().out
    assert (len(b.answer_pairs), len(b.dev), len(b.test)) == (10, 10, 50)
    for wrong in ("Is it 3?\n (A) Yes\n (B) Nay\n (B)", rows[3]["positive"], "Is it 3? No."):
        write(tmp_path / "refusal.json", json.dumps([*rows, rows[3] | {"negative": wrong}]))
        with pytest.raises(DataError, match="refusal.json, entry 71: two texts that differ in the letter they end in"):
            behaviors.load_behavior("packaged:refusal")


def test_near_duplicates_fire_and_stay_silent():
    assert behaviors.near_duplicates(["How do I boil an egg well?", "How do I boil an egg well at home?"]) == [(0, 1)]
    assert behaviors.near_duplicates(["How do I boil an egg?", "Why is the sky blue at noon?"]) == []


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


CAA = {"question": "Do you mind?", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}


@pytest.mark.parametrize(
    "content,message",
    [
        ("", "empty"),
        ("[]", "list is empty"),
        (b"{}\n\xff\xfe{}", "line 2: not UTF-8"),
        ('{"positive": "a",\n', "line 1: not JSON"),
        ('[{"positive": "a", "negative": "b"},\n oops]', "line 2: not JSON"),
        ('{"positive": "a"}', "line 1: field 'negative' is missing"),
        ('{"positive": "a", "negative": 3}', "field 'negative' is 3"),
        ('{"positive": "same", "negative": "same "}', "both halves are the same"),
        ('{"question": "q", "answer_matching_behavior": "(A)"}', "'answer_not_matching_behavior' is missing"),
        ('{"prompt": "x"}', "fields .'prompt'. given; wanted are"),
        ("[3]", "entry 1: int given"),
    ],
)
def test_bad_pairs_name_file_place_and_field(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as error:
        behaviors.load_pairs(write(tmp_path / "mine.json", content))
    assert "mine.json" in str(error.value)


def test_caa_and_positive_negative_forms_load(tmp_path):
    rows = [{**CAA, "question": q} for q in ("Do you mind?", "Shall we go on?")]
    assert behaviors.load_pairs(write(tmp_path / "caa.json", json.dumps(rows)))[1] == ("Shall we go on?", "(A", "(B")
    assert behaviors.load_pairs(write(tmp_path / "p.jsonl", '{"positive": "a", "negative": "b"}\n')) == [("a", "b")]
    assert behaviors.load_pairs(write(tmp_path / "b.jsonl", '\ufeff{"positive": "a\u2028z", "negative": "b"}\n')) == [
        ("a\u2028z", "b")
    ]


def test_one_sided_letters_and_near_duplicates_are_warned_of(tmp_path):
    words = ["tin", "salt", "rain", "gold", "moss", "clay"]
    rows = [
        {**CAA, "question": f"What would {w} say to a stone?" if w == "tin" else f"{w} is {i} times nicer, no?"}
        for i, w in enumerate(words)
    ]
    with pytest.warns(UserWarning, match=r"6 of 6 positive answers are \(A\)"):
        behaviors.load_pairs(write(tmp_path / "one.json", json.dumps(rows)))
    with pytest.warns(UserWarning, match="1 near-duplicate pairs among 7 entries"):
        behaviors.load_pairs(write(tmp_path / "two.json", json.dumps([*rows, rows[0]])))
    mixed = [
        {
            **r,
            "answer_matching_behavior": "(AB)"[0] + "AB"[i % 2] + ")",
            "answer_not_matching_behavior": f"({'BA'[i % 2]})",
        }
        for i, r in enumerate(rows)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        behaviors.load_pairs(write(tmp_path / "three.json", json.dumps(mixed)))


@pytest.mark.parametrize(
    "row,message",
    [
        ({"kind": "verdict", "question": "q", "positive": "a", "negative": "b"}, "field 'kind' is 'verdict'"),
        (
            {"kind": "item", "split": "train", "question": "q", "matching": "a", "non_matching": "b"},
            "'split' is 'train'",
        ),
        ({"kind": "item", "split": "dev", "question": "q", "matching": "a"}, "'non_matching' is missing"),
        ({"kind": "open", "question": "q"}, "no system_pairs, answer_pairs, dev, test in the file"),
    ],
)
def test_bad_behaviours_name_line_and_field(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        behaviors.load_behavior(write(tmp_path / "mine.jsonl", json.dumps(row)))
    with pytest.raises(DataError, match="no behaviour 'kindness'; there are anger"):
        behaviors.load_behavior("kindness")


def test_a_template_without_a_system_role_gets_the_prompt_in_front(tokenizer):
    def apply(messages, **_):
        if messages[0]["role"] == "system":
            raise ValueError("System role not supported")
        return "".join(m["content"] for m in messages) + ">"

    def call(text, **options):
        return tokenizer(text, **options)

    fake = SimpleNamespace(chat_template="x", apply_chat_template=apply, all_special_ids=[], bos_token_id=None)
    fake = type(
        "Fake",
        (),
        {**vars(fake), "__call__": lambda self, text, **o: call(text, **o), "apply_chat_template": staticmethod(apply)},
    )()
    t = tokens.chat(fake, "Why?", system="Be brief.")
    assert tokenizer.decode(t.ids) == "Be brief.\n\nWhy?>" and SYSTEM in t.roles and USER in t.roles


def test_a_reply_has_a_turn_of_its_own_or_ends_the_users(tokenizer):
    reply = tokenizer(" In springs, high up.", add_special_tokens=False)["input_ids"]
    for own_turn in (True, False):
        talk = tokens.conversation(tokenizer, "Where do rivers begin?", reply, own_turn)
        said = tokenizer.decode(talk.ids)
        assert [i for i, r in zip(talk.ids, talk.roles, strict=True) if r == ANSWER] == reply
        assert (said.index("assistant\n") < said.index("In springs")) == own_turn
        assert len(talk.ids) == len(talk.roles) and said.count("In springs") == 1


def test_ids_and_roles_go_together(tokenizer):
    for wrong in ([], [tokens.Tokens([1, 5, 6], [3])]):
        with pytest.raises(ValueError, match="a role for every id"):
            tokens.pad(wrong, 0)
