"""Chat templates as people's models have them: every token's role follows from how the prompt was put together."""

import copy
import re
from datetime import datetime

import pytest

from helpers.entries import DataError
from helpers.lm import tokens
from helpers.lm.tokens import ANSWER, SYSTEM, USER

# The layouts of well-known families, each written down here in a few lines: what is printed, not their own code.
LOOP = "{% for m in messages %}"
CHATML = LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
TEMPLATES = {
    "chatml": CHATML,
    "llama-2": "{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
    + LOOP
    + "{% if m.role == 'user' %}[INST] {% if first %}<<SYS>>\n{{ first }}\n<</SYS>>\n\n{% endif %}{{ m.content.strip() }} [/INST]{% endif %}{% endfor %}",
    "llama-3": LOOP
    + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama-3.2": "{% set date = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}"
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: {{ date }}\n\n"
    "{{ messages[0].content if messages[0].role == 'system' else '' }}<|eot_id|>" + LOOP
    + "{% if m.role != 'system' %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + LOOP
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n",
    "gemma-3": "{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}" + LOOP
    + "{% if m.role == 'user' %}<start_of_turn>user\n{{ first }}{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}<start_of_turn>model\n",
    "mistral v0.1": LOOP
    + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "[INST] {{ m.content }} [/INST]{% endfor %}",
    "phi-3": LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n",
    "qwen-3": LOOP
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
    "r1": LOOP + "{% if m.role == 'system' %}{{ m.content }}{% else %}<|User|>{{ m.content }}{% endif %}{% endfor %}<|Assistant|><think>\n",
    "drops the system prompt": LOOP + "{% if m.role == 'user' %}Q: {{ m.content }}\n{% endif %}{% endfor %}A: ",
    "none": None,
}  # fmt: skip
LETTERS = ["A", "B", "a", "o", "model", "ant", "is", "user", "Assistant", "(A", "assistant\n<think>"]


MARKS = re.compile(r"<\|\w+\|>|<(?:start|end)_of_turn>|\[/?INST\]")


def shaped(tokenizer, template):
    """The small tokenizer with another template, whose marks are tokens of their own, as in the models they come from."""
    other = copy.deepcopy(tokenizer)
    # jinja drops a template's last line break, so that it is written as text
    other.chat_template = template[:-1] + "{{ '\\n' }}" if (template or "").endswith("\n") else template
    marks = sorted(set(MARKS.findall(template or "")) - set(other.all_special_tokens))
    marks += ["<|user|>", "<|system|>", "<|assistant|>"] if "<|{{" in (template or "") else []
    if marks:
        other.add_special_tokens({"additional_special_tokens": marks}, replace_extra_special_tokens=False)
    return other


@pytest.fixture(params=TEMPLATES)
def tokenizer(request, bpe):
    return shaped(bpe, TEMPLATES[request.param])


def said(tokenizer, laid, role):
    return tokenizer.decode([i for i, r in zip(laid.ids, laid.roles, strict=True) if r == role]).strip()


@pytest.mark.parametrize("answer", LETTERS)
@pytest.mark.parametrize("system", [None, "Be brief.", "user"])
def test_every_role_is_what_was_put_there(tokenizer, answer, system):
    question = "Is it user or model, A or B?"
    laid = tokens.chat(tokenizer, question, system=system, answer=answer)
    bare = tokens.chat(tokenizer, question, system=system)
    assert said(tokenizer, laid, ANSWER) == answer and said(tokenizer, laid, USER) == question
    assert said(tokenizer, laid, SYSTEM) == (system or "")
    assert laid.roles[-1] == ANSWER and sorted(set(laid.roles[laid.roles.index(ANSWER) :])) == [ANSWER]
    assert tokenizer.decode(laid.ids).startswith(tokenizer.decode(bare.ids).rstrip())


@pytest.mark.parametrize(
    "question", ["user", "Be brief.", "a {{ m.content }} b", "what is <think> for?", "näïve 你好 🙂?"]
)
def test_any_question_is_marked_whole(tokenizer, question):
    laid = tokens.chat(tokenizer, question, system="Be brief.", answer="Yes.")
    assert said(tokenizer, laid, USER) == question and said(tokenizer, laid, ANSWER) == "Yes."
    assert said(tokenizer, laid, SYSTEM) == "Be brief."


def test_a_prompt_does_not_depend_on_the_clock(bpe, monkeypatch):
    from transformers.utils import chat_template_utils

    tokenizer = shaped(bpe, TEMPLATES["llama-3.2"])
    today, mark = tokens.chat(tokenizer, "Why?", system="Be brief."), tokens.fingerprint(tokenizer)

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert tokens.chat(tokenizer, "Why?", system="Be brief.") == today and tokens.fingerprint(tokenizer) == mark
    assert "26 Jul 2024" in tokenizer.decode(today.ids)


def test_a_changed_template_changes_the_fingerprint(bpe):
    marks = {name: tokens.fingerprint(shaped(bpe, t)) for name, t in TEMPLATES.items()}
    assert len(set(marks.values())) == len(marks)


@pytest.mark.parametrize(("name", "end"), [("qwen-3", "<think>\n\n</think>"), ("r1", "<think>\n\n</think>")])
def test_answers_follow_an_empty_thought_unless_asked_otherwise(bpe, monkeypatch, name, end):
    tokenizer = shaped(bpe, TEMPLATES[name])
    assert tokenizer.decode(tokens.chat(tokenizer, "Why?").ids).rstrip().endswith(end)
    closed = tokens.fingerprint(tokenizer)
    monkeypatch.setenv("THINKING", "open")
    assert "</think>" not in tokenizer.decode(tokens.chat(tokenizer, "Why?").ids)
    assert tokens.fingerprint(tokenizer) != closed
    monkeypatch.setenv("THINKING", "perhaps")
    with pytest.raises(DataError, match="THINKING='perhaps'.*closed.*open"):
        tokens.chat(tokenizer, "Why?")


@pytest.mark.parametrize("name", ["gemma", "mistral v0.1", "drops the system prompt"])
def test_a_system_prompt_without_a_place_joins_the_first_turn_and_it_is_said_once(bpe, capsys, monkeypatch, name):
    monkeypatch.setattr(tokens, "_SAID", set())
    tokenizer = shaped(bpe, TEMPLATES[name])
    for _ in range(2):
        laid = tokens.chat(tokenizer, "Why?", system="Be brief.")
    assert "Be brief.\n\nWhy?" in tokenizer.decode(laid.ids)
    assert capsys.readouterr().out.count("takes no system prompt") == 1


@pytest.mark.parametrize(
    "template",
    [LOOP + "{{ m.content | upper }}{% endfor %}", LOOP + "{{ m.content[:9] }}{% endfor %}", "Hello.", "{{ messages | length }}",
     LOOP + "{{ m.content | replace('tin', 'lead') }}{% endfor %}", LOOP + "{{ 'short' if m.content | length < 9 else m.content }}{% endfor %}"],
)  # fmt: skip
def test_a_template_that_changes_the_texts_is_refused(bpe, template):
    with pytest.raises(DataError, match="changed or dropped|has no place"):
        for question in ("Where is tin found, and why?", "Why?"):
            tokens.chat(shaped(bpe, template), question)


def test_a_template_that_refuses_a_user_says_why(bpe):
    tokenizer = shaped(bpe, "{{ raise_exception('no users here') }}")
    with pytest.raises(DataError, match="'Why\\?'.*no users here"):
        tokens.chat(tokenizer, "Why?")


def test_half_a_character_an_empty_answer_and_a_tokenizer_without_places_are_refused(bpe):
    with pytest.raises(DataError, match="lone surrogate"):
        tokens.chat(bpe, "What is \ud83d?")
    for answer in ("", "  \n"):
        with pytest.raises(DataError, match="the answer to 'Why\\?' is empty"):
            tokens.chat(bpe, "Why?", answer=answer)

    class Slow:
        all_special_ids, chat_template, bos_token_id = [], None, None

        def __call__(self, text, **_):
            return {"input_ids": [1, 2]}

    with pytest.raises(DataError, match="Slow cannot say which characters"):
        tokens.plain(Slow(), "a b")


TURN = "{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
ANSWERED = {  # a template, what stands right before an answer, and before a reply that the model is to write
    "channels": (LOOP + TURN + "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
                 "<|start|>assistant<|channel|>final<|message|>", "<|start|>assistant<|channel|>final<|message|>"),
    "no generation prompt": (LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}", "<|im_start|>assistant\n", "<|im_start|>assistant\n"),
    "a space": (LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}", "[/INST] ", "[/INST]"),
    "a thought of another name": (LOOP + "{% if m.role == 'user' %}Q {{ m.content }}\n{% else %}A {{ m.content }}{% endif %}{% endfor %}"
                                  "{% if add_generation_prompt %}A [THINK]{% endif %}", "A ", "A [THINK]"),
    "no assistant's turn": (LOOP + "{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}U {{ m.content }}\n{% endfor %}"
                            "{% if add_generation_prompt %}A {% endif %}", "A ", "A "),
    "contents as parts": (LOOP + "<|{{ m.role }}|>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}"
                          "{% if add_generation_prompt %}<|assistant|>{% endif %}", "<|assistant|>", "<|assistant|>"),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERED)
def test_an_answer_stands_where_the_template_itself_would_put_it(bpe, name):
    template, before, prompt = ANSWERED[name]
    tokenizer = shaped(bpe, template)
    laid = tokens.chat(tokenizer, "Is it so?", system="Be brief.", answer="Yes, it is.")
    assert tokenizer.decode(laid.ids).endswith(before + "Yes, it is.")
    assert said(tokenizer, laid, ANSWER) == "Yes, it is." and said(tokenizer, laid, USER) == "Is it so?"
    assert tokenizer.decode(tokens.chat(tokenizer, "Is it so?").ids).endswith(prompt)


def test_the_first_token_is_the_templates_or_for_plain_text_the_tokenizers(bpe):
    from tokenizers.processors import TemplateProcessing

    tokenizer = shaped(bpe, TEMPLATES["phi-3"])
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert tokens.plain(tokenizer, "Tin.").ids[0] == tokenizer.bos_token_id != tokens.plain(tokenizer, "Tin.").ids[1]
    theirs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert tokens.chat(tokenizer, "Why?").ids == list(theirs["input_ids"])


def test_a_tokenizer_that_splits_otherwise_has_another_fingerprint(bpe):
    from tokenizers.normalizers import Replace

    other = copy.deepcopy(bpe)
    other.backend_tokenizer.normalizer = Replace("tin", "lead")
    assert tokens.fingerprint(other) != tokens.fingerprint(bpe) == tokens.fingerprint(copy.deepcopy(bpe))


def test_a_base_models_reply_begins_with_its_own_space(bpe):
    tokenizer = shaped(bpe, None)
    assert tokenizer.decode(tokens.chat(tokenizer, "Why?").ids).endswith("\nAssistant:")
    one, other = tokens.chat(tokenizer, "Why?"), tokens.chat(tokenizer, "Why?", answer="Yes.")
    assert other.ids[: len(one.ids)] == one.ids


@pytest.mark.parametrize("prefix", [["<|endoftext|>"], ["<|im_start|>", "<|endoftext|>"]])
def test_plain_text_begins_as_the_tokenizer_begins_it(bpe, prefix):
    from tokenizers.processors import TemplateProcessing

    tokenizer = shaped(bpe, None)
    ids = tokenizer.convert_tokens_to_ids(prefix)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*prefix, "$A"]), special_tokens=list(zip(prefix, ids, strict=True))
    )
    laid = tokens.plain(tokenizer, "Tin is soft.")
    assert laid.ids == tokenizer("Tin is soft.")["input_ids"] and laid.roles[: len(ids)] == [tokens.SPECIAL] * len(ids)
