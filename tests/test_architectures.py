"""Tiny random models of many architectures: what is read, scored, written and patched equals transformers itself.

Every comparison is with one unpadded sequence that transformers runs whole, with hooks of this file. The weights are
large (standard deviation 0.2), so that a token in the wrong place shows; windows are shorter than the texts.
`python -m tests.test_architectures` writes what was measured into docs/models.md, and a test holds that page to it.
"""

import contextlib
import io
import math
import re
import socket
import subprocess
from functools import cache as once
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers import T5ForConditionalGeneration as T5

from helpers.lm import hooks, reading, replies, scoring, tokens
from helpers.lm.reading import LM, ModelError
from helpers.lm.tokens import ANSWER, TEMPLATE, USER, Tokens

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
START, END = "<!-- architectures:start -->", "<!-- architectures:end -->"
LAYERS, LAYER, WIDTH, WORDS = 3, 1, 32, 96
CLOSE = 1e-4  # of the largest value, in float32

# What a configuration is made small by, under any of the names that it knows.
SMALL = dict(
    vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, max_seq_len=64, sliding_window=8,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    d_model=WIDTH, n_layers=LAYERS, n_heads=4, ffn_hidden_size=48, rotary_dim=4,
    decoder_layers=LAYERS, decoder_attention_heads=4, decoder_ffn_dim=48, ffn_dim=48,
    moe_intermediate_size=32, shared_expert_intermediate_size=32, num_local_experts=4, num_experts=4,
    n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16, state_size=8,
)  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
MLA = dict(qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, head_dim=4, num_key_value_heads=4)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_expand=2, mamba_chunk_size=4)

# name -> transformers' model type, and what of its configuration is not as in SMALL
WHOLE = {
    "Llama": ("llama", {}),
    "Llama, tied": ("llama", dict(tie_word_embeddings=True)),
    "Mistral (sliding)": ("mistral", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen2 (sliding)": ("qwen2", dict(use_sliding_window=True, max_window_layers=1)),
    "Qwen3": ("qwen3", {}),
    "Gemma": ("gemma", {}),
    "Gemma 2 (sliding)": ("gemma2", dict(final_logit_softcapping=5.0)),
    "Gemma 3, text (sliding)": ("gemma3_text", dict(layer_types=SLIDING)),
    "Gemma 3, text and images": ("gemma3", {}),
    "Gemma 4 (shared keys and values)": ("gemma4_text", dict(
        layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=WORDS, global_head_dim=8)),
    "Llava, text and images": ("llava", {}),
    "Llama 4 (chunked)": ("llama4_text", dict(
        attention_chunk_size=8, intermediate_size_mlp=48, layer_types=["chunked_attention", "full_attention"] * 2,
        num_hidden_layers=4)),
    "Phi": ("phi", {}),
    "Phi-3": ("phi3", {}),
    "Phi-3 (longrope)": ("phi3", dict(original_max_position_embeddings=48, rope_parameters=dict(
        rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[3.0] * 4,
        original_max_position_embeddings=48))),
    "GPT-2": ("gpt2", {}),
    "GPT-NeoX (Pythia)": ("gpt_neox", {}),
    "GPT-Neo (local)": ("gpt_neo", dict(
        num_layers=LAYERS, num_heads=4, window_size=8, attention_types=[[["global", "local", "global"], 1]])),
    "GPT-J": ("gptj", {}),
    "GPT-BigCode": ("gpt_bigcode", {}),
    "GPT-OSS (sliding, sinks)": ("gpt_oss", dict(layer_types=SLIDING)),
    "CodeGen": ("codegen", {}),
    "BLOOM": ("bloom", {}),
    "OPT": ("opt", dict(word_embed_proj_dim=WIDTH)),
    "MPT": ("mpt", {}),
    "Falcon, rotary": ("falcon", {}),
    "Falcon, ALiBi": ("falcon", dict(alibi=True)),
    "Falcon, new decoder": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    "Cohere": ("cohere", {}),
    "Cohere 2 (sliding)": ("cohere2", dict(layer_types=SLIDING)),
    "OLMo": ("olmo", dict(clip_qkv=2.0)),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3 (sliding)": ("olmo3", dict(layer_types=SLIDING)),
    "StableLM": ("stablelm", {}),
    "StarCoder 2 (sliding)": ("starcoder2", {}),
    "Granite": ("granite", dict(
        logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=3.0, attention_multiplier=0.2)),
    "GLM": ("glm", {}),
    "GLM-4": ("glm4", {}),
    "SmolLM3": ("smollm3", dict(no_rope_layers=[1, 0, 1])),
    "Nemotron": ("nemotron", {}),
    "NanoChat": ("nanochat", {}),
    "ModernBERT decoder": ("modernbert-decoder", dict(local_attention=8)),
    "Mixtral": ("mixtral", {}),
    "Qwen2-MoE": ("qwen2_moe", {}),
    "Qwen3-MoE": ("qwen3_moe", {}),
    "OLMoE": ("olmoe", {}),
    "DeepSeek-V2": ("deepseek_v2", MLA | dict(first_k_dense_replace=1, n_shared_experts=1)),
    "DeepSeek-V3": ("deepseek_v3", MLA | dict(first_k_dense_replace=1, n_shared_experts=1)),
    "XGLM": ("xglm", dict(num_layers=LAYERS, attention_heads=4)),
    "BERT as a decoder": ("bert", dict(is_decoder=True)),
}  # fmt: skip
READ = {  # what can be read only, and the words in which the rest is refused
    "Mamba": ("mamba", {}, "has layers of kind linear_attention"),
    "Bamba (hybrid)": ("bamba", MAMBA | dict(attn_layer_indices=[1, 3], num_hidden_layers=4),
        "has layers of kind linear_attention"),
    "Qwen3.5 (hybrid)": ("qwen3_5_text", dict(
        layer_types=["linear_attention", "full_attention"] * 2, num_hidden_layers=4, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8), "has layers of kind linear_attention"),
    "BART's decoder": ("bart", {}, "padding lies on the left"),
}  # fmt: skip
REFUSED = {  # what is refused at load, and in which words
    "BERT": ("bert", {}, "a later token changes what is predicted before it"),
    "RoBERTa as a decoder": ("roberta", dict(is_decoder=True, pad_token_id=1), "positions counted from 0"),
    "XLNet": ("xlnet", dict(n_layer=LAYERS, n_head=4), "its blocks are not known"),
    "XLM, causal": ("xlm", dict(n_layers=LAYERS, emb_dim=WIDTH, causal=True), "its blocks are not known"),
    "Gemma 3n": ("gemma3n_text", dict(
        layer_types=SLIDING[:2] * 2, num_hidden_layers=4, num_kv_shared_layers=1, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=WORDS, laurel_rank=4, altup_num_inputs=5, intermediate_size=[48] * 4,
        activation_sparsity_pattern=None), "its blocks are not known"),
    "T5": ("t5", dict(d_kv=8, d_ff=48, num_heads=4, num_layers=LAYERS), "does not predict next tokens"),
}  # fmt: skip
KINDS = {name: entry[:2] for name, entry in (WHOLE | READ | REFUSED).items()}


# --- the models, and the texts ---------------------------------------------------------------------------------------


@once
def word_tokenizer(words=WORDS):
    """One token a word, with padding, a first and a last token."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, words))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def small(kind, own):
    """A configuration of that type, small."""
    made = CONFIG_MAPPING[kind]
    known = set(made().to_dict()) | set(made.attribute_map)
    names = {n: v for n, v in SMALL.items() if n in known and made.attribute_map.get(n) not in SMALL}
    return made(**{**names, **own})


def seeing(kind):
    """A configuration of a model of text and images, with as many blocks for either."""
    vision = dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    if kind == "gemma3":
        text = small("gemma3_text", dict(layer_types=SLIDING)).to_dict()
        return CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return CONFIG_MAPPING["llava"](
        text_config=small("llama", {}), vision_config=CONFIG_MAPPING["clip_vision_model"](**vision), image_token_index=5
    )


def random_weights(kind, own):
    """transformers' own model of that type: weights and biases random and large, gains about one."""
    config = seeing(kind) if kind in ("gemma3", "llava") else small(kind, own)
    torch.manual_seed(1)
    made = {"llava": LlavaForConditionalGeneration._from_config, "t5": T5._from_config}
    weights = made.get(kind, AutoModelForCausalLM.from_config)(config, attn_implementation="eager").eval()
    for parameter in weights.parameters():
        if parameter.ndim > 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.2)
        else:
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return weights


@once
def built(name):
    """The LM of one of the architectures; ModelError where it is refused."""
    with torch.no_grad():
        return LM.of(random_weights(*KINDS[name]), word_tokenizer(), f"tiny {name}")


@once
def groups():
    """Three prompts of 9, 16 and 5 tokens, with two answers each."""
    draw, out = torch.Generator().manual_seed(3), []
    for n, answers in ((9, (5, 3)), (16, (4, 6)), (5, (3, 4))):
        words = torch.randint(4, WORDS, (n + sum(answers),), generator=draw).tolist()
        prompt, first, second = words[:n], words[n : n + answers[0]], words[n + answers[0] :]
        roles = [USER] * (n - 1) + [TEMPLATE]
        out.append([Tokens(prompt + answer, roles + [ANSWER] * len(answer)) for answer in (first, second)])
    return out


def first_of_each():
    return [group[0] for group in groups()]


def shift(lm):
    return 2 * torch.randn(lm.d_model, generator=torch.Generator().manual_seed(7))


# --- what transformers gives, with nothing of ours -------------------------------------------------------------------


def gap(ours, other):
    """The largest difference, in units of the largest value."""
    ours, other = (torch.as_tensor(x).double() for x in (ours, other))
    assert ours.shape == other.shape and bool(torch.isfinite(ours).all())
    return float((ours - other).abs().max() / other.abs().max())


@contextlib.contextmanager
def added(module, vector, start):
    """Context: `vector` is added to what `module` gives from token `start` on, over the passes of one sequence."""
    seen = 0

    def hook(module, args, out):
        nonlocal seen
        x = out[0] if isinstance(out, tuple) else out
        at = torch.arange(seen, seen + x.shape[1])
        seen += x.shape[1]
        new = x + (at >= start)[None, :, None] * vector
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def alone(lm, sequence, **options):
    """transformers' output for one sequence, whole."""
    return lm.weights(input_ids=torch.tensor([sequence.ids]), use_cache=False, **options)


def streams_alone(lm, sequence):
    """The stream after every block, (tokens, d_model) each, by plain hooks; the same as transformers' hidden_states.

    Those begin with the embedding, save in state-space models, and their last is normed.
    """
    found = []

    def keep(module, args, out):
        found.append((out[0] if isinstance(out, tuple) else out)[0])

    with hooks.hooked(lm.blocks, [keep] * lm.layers):
        hidden = [x[0] for x in alone(lm, sequence, output_hidden_states=True).hidden_states]
    first = 0 if torch.equal(found[0], hidden[0]) else 1
    assert all(torch.equal(x, y) for x, y in zip(found[:-1], hidden[first : first + lm.layers - 1], strict=True))
    return found


def log_p(lm, sequence, vector):
    """log p of the answer with `vector` added from the last prompt token on: a whole pass."""
    start = sequence.roles.index(ANSWER)
    with added(lm.blocks[LAYER], vector, start - 1):
        given = alone(lm, sequence).logits[0].double().log_softmax(-1)
    at = torch.arange(start, len(sequence.ids))
    return given[at - 1, torch.tensor(sequence.ids[start:])].sum()


# --- the measurements: the largest difference of each ----------------------------------------------------------------


def reads(lm):
    """Streams at every layer, of padded batches (on the right only, where no other is taken) and of the reader."""
    texts, found = first_of_each(), []
    expected = [streams_alone(lm, text) for text in texts]
    for side in ("right",) if lm.unscored else ("left", "right"):
        batch = tokens.pad(texts, lm.tokenizer.pad_token_id, side)
        with hooks.capture(lm, range(lm.layers)) as acts:
            reading.forward(lm, batch)
        for row, streams in enumerate(expected):
            found += [gap(acts[k][row][batch.mask[row]], stream) for k, stream in enumerate(streams)]
    for k in range(lm.layers):
        read = reading.residuals(lm, texts, k)
        found += [gap(stream, streams[k]) for stream, streams in zip(read, expected, strict=True)]
    return max(found)


def scores(lm):
    """log p of every answer without and under a vector, all prompts in one batch and one by one."""
    where, found = scoring.Continuations(lm, groups(), LAYER), []
    alone_each = scoring.Continuations(lm, groups(), LAYER)
    alone_each.chunk = 1
    for multiplier in (0.0, 1.0, -2.0):
        expected = torch.tensor([[float(log_p(lm, s, multiplier * shift(lm))) for s in group] for group in groups()])
        found += [gap(w.log_probs(shift(lm), multiplier), expected) for w in (where, alone_each)]
    return max(found)


def gradients(lm):
    """Gradients of log p by the shift: against a backward pass through transformers, and against finite differences."""
    where, expected = scoring.Continuations(lm, groups(), LAYER), []
    for sequence in (s for group in groups() for s in group):
        with torch.enable_grad():
            at = torch.zeros(lm.d_model, requires_grad=True)
            expected.append(torch.autograd.grad(log_p(lm, sequence, at), at)[0])
    found, u, h = where.gradients()[:, :, 0], shift(lm), 3e-3
    finite = (where.log_probs(u, h) - where.log_probs(u, -h)) / (2 * h)
    off = np.abs(found.numpy() @ u.numpy() - finite)
    assert np.median(off) < 1e-2 * np.abs(finite).max()  # the median: within a step an expert may change
    return gap(found, torch.stack(expected).reshape(found.shape))


def patching(lm):
    """Answers' logits if a text's own streams are put in after a block, each block; and those by the exact rule."""
    texts, found = first_of_each(), []
    for layer in range(lm.layers):
        streams = reading.residuals(lm, texts, layer)
        for rows, counts, predicted, _ in scoring.resumed(lm, texts, layer, streams):
            expected = torch.cat(
                [alone(lm, texts[i]).logits[0, -n - 1 : -1] for i, n in zip(rows, counts, strict=True)]
            )
            said = torch.tensor([word for i, n in zip(rows, counts, strict=True) for word in texts[i].ids[-n:]])
            exact = scoring.exact_logits(lm, predicted, said)
            found += [gap(predicted.logits, expected), gap(exact, expected.gather(1, said[:, None])[:, 0])]
    return max(found)


def same_replies(lm):
    """Whether eight greedy tokens, without and under a vector, are those of transformers' generate, one by one."""
    prompts = [Tokens(*(part[: t.roles.index(ANSWER)] for part in t)) for t in first_of_each()]
    batch, special = tokens.pad(prompts, 0, "left"), tokens.special_ids(lm.tokenizer)
    plain = dict(
        max_new_tokens=8, do_sample=False, num_beams=1, use_cache=True, pad_token_id=0, eos_token_id=sorted(special)
    )
    for vector in (torch.zeros(lm.d_model), shift(lm)):
        with hooks.add(lm, LAYER, vector, 1.0, tokens.positions(batch, "response")):
            ours = replies.write(lm, batch, 8)
        for prompt, row in zip(prompts, ours, strict=True):
            ids = torch.tensor([prompt.ids])
            with added(lm.blocks[LAYER], vector, len(prompt.ids) - 1):
                theirs = lm.weights.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **plain)
            theirs = theirs[0, len(prompt.ids) :]
            stop = [k for k, i in enumerate(theirs.tolist()) if i in special]
            theirs = theirs[: max(stop[0], 1)] if stop else theirs
            if row[row >= 0].tolist() != theirs.tolist():
                return False
    return True


def bridge(lm):
    """Why TransformerLens cannot wrap the model; empty where it can. No process or connection may be begun for it."""

    def refused(*args, **kwargs):
        begun.append(args)
        raise OSError("a process or a connection was begun")

    begun = []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(subprocess.Popen, "_execute_child", refused)
        patch.setattr(socket, "getaddrinfo", refused)
        try:
            _, cache = lm.bridge.run_with_cache(torch.tensor([first_of_each()[0].ids]))
            assert gap(cache[hooks.resid_post(LAYER)][0], streams_alone(lm, first_of_each()[0])[LAYER]) < CLOSE
            why = ""
        except ModelError as error:
            why = str(error)
    assert not begun
    reading.unhooked(lm)
    return why


class Row(NamedTuple):
    """What was measured of an architecture: the words where something is refused, and the differences by name."""

    refused: str = ""
    unscored: str = ""
    unbridged: str = ""
    differences: dict[str, float] = {}

    def cells(self):
        """yes or no: reads, scores, generates, gradients, bridge; then the power of ten that no difference exceeds."""
        if self.refused:
            return ["no"] * 5 + ["-"]
        rest = ["no" if self.unscored else "yes"] * 3
        power = math.ceil(math.log10(max(self.differences.values())))
        return ["yes", *rest, "no" if self.unbridged else "yes", f"1e{power}"]


@once
def measured(name):
    """The Row of an architecture."""
    try:
        lm = built(name)
    except ModelError as error:
        return Row(refused=str(error))
    with torch.no_grad():
        found = {"reads": reads(lm), "patching": patching(lm)}
        if not lm.unscored:
            found |= {"scores": scores(lm), "gradients": gradients(lm), "replies": 0.0 if same_replies(lm) else 1.0}
        return Row(unscored=lm.unscored, unbridged=bridge(lm), differences=found)


# --- the page --------------------------------------------------------------------------------------------------------


def table():
    """The page's table, measured now."""
    head = ["architecture", "reads", "scores", "generates", "gradients", "bridge", "equal to transformers to"]
    rows = [head, ["---"] * len(head), *([name, *measured(name).cells()] for name in KINDS)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def committed():
    """name -> cells of the page as it is."""
    inside = PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in inside.strip().splitlines()]
    return {name: cells for name, *cells in rows[2:]}


def rewrite():
    """Put the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(START)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{after}", encoding="utf-8")


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
def test_streams_scores_gradients_replies_and_patches_equal_transformers(name):
    row = measured(name)
    assert not row.refused and not row.unscored
    assert len(row.differences) == 5 and max(row.differences.values()) < CLOSE, row.differences
    assert built(name).unembedding.exact


@pytest.mark.parametrize("name", READ)
def test_what_cannot_be_run_on_from_a_cached_prompt_is_read_right_and_refused_for_the_rest(name):
    row, lm, prompts = measured(name), built(name), [t._replace(roles=[USER] * len(t.ids)) for t in first_of_each()]
    assert READ[name][2] in row.unscored and max(row.differences.values()) < CLOSE, row
    left = tokens.pad(prompts, 0, "left")
    for call in (
        lambda: scoring.Continuations(lm, groups(), LAYER).log_probs(shift(lm), 1.0),
        lambda: scoring.Continuations(lm, groups()[:1], LAYER).gradients(),
        lambda: replies.write(lm, left, 2),
        lambda: replies.write(lm, tokens.pad(prompts[:1], 0, "left"), 2),
        lambda: reading.forward(lm, left),
    ):
        with pytest.raises(ValueError, match=re.escape(lm.unscored)):
            call()


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused_at_load(name):
    assert REFUSED[name][2] in measured(name).refused


@pytest.mark.parametrize("name", KINDS)
def test_the_page_says_what_is_measured(name):
    *now, power = measured(name).cells()
    *said, limit = committed()[name]
    assert now == said
    assert limit == power == "-" or float(power) <= 10 * float(limit)
    assert list(committed()) == list(KINDS)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "Gemma 2 (sliding)", "Mixtral", "BLOOM", "Gemma 4 (shared keys and values)"])
def test_rounding_is_not_taken_for_another_model(name, kind):
    lm = LM.of(random_weights(*KINDS[name]).to(kind), word_tokenizer(), "tiny")
    assert not lm.unscored and lm.skips == built(name).skips


def test_where_upper_blocks_need_the_lower_ones_none_is_skipped():
    lm, text = built("Gemma 4 (shared keys and values)"), first_of_each()[:1]
    assert not lm.skips and built("Llama").skips
    acts = torch.randn(1, len(text[0].ids), lm.d_model)
    with hooks.resume_at(lm, 2, acts), hooks.capture(lm, [2]) as found:
        alone(lm, text[0])
    assert torch.equal(found[2], acts)
    reading.unhooked(lm)


def test_the_blocks_are_those_that_hold_the_stream():
    """A list of as many other modules is not taken for them: a vision tower, or projections into several streams."""
    for name in ("Gemma 3, text and images", "Llava, text and images"):
        lm = built(name)
        towers = [m for m in lm.weights.modules() if isinstance(m, nn.ModuleList) and len(m) == lm.layers]
        assert len(towers) == 2 and all(
            "Vision" not in type(b).__name__ and "CLIP" not in type(b).__name__ for b in lm.blocks
        )
    own = REFUSED["Gemma 3n"][1]
    assert own["num_hidden_layers"] == own["altup_num_inputs"] - 1  # four blocks, four projections


@pytest.mark.parametrize("name", ["Llama", "MPT", "GPT-2", "OPT", "Phi-3 (longrope)"])
def test_more_tokens_than_a_model_takes_are_refused(name):
    lm = built(name)
    limit = 48 if "longrope" in name else 64
    words = [4 + i % 90 for i in range(limit + 1)]
    fits, over = (Tokens(words[:n], [USER] * n) for n in (limit, limit + 1))
    assert gap(reading.residuals(lm, [fits, fits], LAYER)[0], streams_alone(lm, fits)[LAYER]) < CLOSE
    with pytest.raises(ValueError, match=f"{limit + 1} tokens was given; tiny .* takes {limit}"):
        reading.residuals(lm, [over], LAYER)


def test_rotary_angles_that_depend_on_the_longest_text_are_why_longrope_is_limited():
    lm = built("Phi-3 (longrope)")
    short, long = torch.arange(4, 24)[None], torch.arange(4, 54)[None]
    mask = torch.cat([torch.ones(1, 20), torch.zeros(1, 30)], 1).long()
    both = dict(
        input_ids=torch.cat([long, torch.cat([short, long[:, 20:]], 1)]), attention_mask=torch.cat([mask * 0 + 1, mask])
    )
    assert gap(lm.weights(**both).logits[1, :20], lm.weights(short).logits[0]) > 0.1


@pytest.mark.parametrize("words", [97, 400])
def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(words):
    with pytest.raises(ModelError, match=f"the tokenizer has {words} tokens, the embedding 96 rows.* such as 'w"):
        LM.of(random_weights("llama", {}), word_tokenizer.__wrapped__(words), "tiny")
    with pytest.raises(ModelError, match=f"the tokenizer has {words} tokens"):
        built("Llama").read_as(word_tokenizer.__wrapped__(words))


def test_a_model_that_does_not_run_on_token_ids_says_so():
    weights = random_weights("llama", {})
    weights.model.layers[1].self_attn.q_proj.weight = nn.Parameter(torch.randn(32, 31))
    with pytest.raises(ModelError, match=r"tiny \(LlamaForCausalLM\) cannot be run on token ids alone: "):
        LM.of(weights, word_tokenizer(), "tiny")


def test_the_bridge_leaves_the_tokenizer_as_it_was():
    """TransformerLens gives a tokenizer without a first token one: to its own copy."""
    tokenizer = word_tokenizer.__wrapped__()
    tokenizer.bos_token = None
    lm = LM.of(random_weights("qwen2", {}), tokenizer, "tiny")
    before = tokens.fingerprint(tokenizer), tokens.plain(tokenizer, "w5 w6")
    assert not bridge(lm)
    assert (
        tokenizer.bos_token_id is None and (tokens.fingerprint(tokenizer), tokens.plain(tokenizer, "w5 w6")) == before
    )


if __name__ == "__main__":
    rewrite()
