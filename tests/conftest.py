"""Shared fixtures, and the two tiers: `make test-fast` leaves out what asks for the packaged model or texts, and notebooks."""

import functools
import os
import string
import sys
from pathlib import Path

import pytest
import torch

sys.modules["rfc3987_syntax"] = None  # nbformat's jsonschema does without it; its grammar takes seconds to import
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("CHAT_MODEL", "BASE_MODEL", "LAYER", "PROFILE", "REPORT_DIR", "DEVICE", "DTYPE", "LABELS"):
    os.environ[name] = ""  # a developer's .env must not reach the tests

CACHE = os.environ.get("CACHE_DIR", "")
ROOT = Path(__file__).resolve().parents[1]
# The marks of what asks for a fixture, itself, through another, or by a parameter that names it.
MARKED = {"packaged": "packaged", "smol": "packaged", "workshop": "notebooks", "watched": "notebooks"}
LONGEST = ("test_notebooks", "test_profiles", "test_types")  # go first, so that two processes end together


def pytest_collection_modifyitems(items):
    """Mark the tests of the full tier, and put the files that take longest first."""
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))
    for item in items:
        named = item.callspec.params.values() if hasattr(item, "callspec") else ()
        for name in {*item.fixturenames, *(p for p in named if isinstance(p, str))} & set(MARKED):
            item.add_marker(MARKED[name])


@pytest.fixture(autouse=True)
def sealed(request, tmp_path, monkeypatch):
    """A test that does not ask for `packaged` has an empty cache and no index: it leans on nothing fetched before."""
    if not request.node.get_closest_marker("packaged"):
        monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def packaged():
    """The tests' own cache, with its packaged model, texts and pairs, which are fetched where they are not there yet."""
    return Path(CACHE) if CACHE else ROOT / "data" / "cache"


@pytest.fixture(scope="session")
def smol(packaged):
    """The packaged model, float32, on the CPU: exactness is tested where rounding cannot hide an error."""
    from helpers.lm import models

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHE_DIR", str(packaged))  # a test that asked for an empty cache may have been first
        return models.load("packaged:smollm2-135m-instruct", "cpu", torch.float32)


@functools.cache
def small_tokenizer():
    """A byte-level BPE of 4,096 tokens, made of the committed behaviours, with the packaged model's marks and layout."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "data" / "behaviors").glob("*.jsonl"))]
    signs = string.ascii_letters + string.digits + string.punctuation
    texts.append(" ".join(signs) * 1000)  # a space and a sign are one token, as in large vocabularies
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token=marks[0], bos_token=marks[1], eos_token=marks[2], pad_token=marks[2]
    )
    made.chat_template = (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


@pytest.fixture(scope="session")
def bpe():
    """A small tokenizer."""
    return small_tokenizer()


@pytest.fixture(scope="session")
def tiny():
    """A random four-layer Llama with a small tokenizer: fast, exact, no meaning."""
    return tiny_model("llama")


def tiny_model(kind):
    from helpers.lm.reading import LM

    return LM.of(tiny_weights(kind), small_tokenizer(), f"tiny-{kind}")


def tiny_weights(kind):
    """transformers' own random model of four layers."""
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

    tokenizer = small_tokenizer()
    shared = dict(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = LlamaConfig(**shared) if kind == "llama" else Gemma2Config(**shared, sliding_window=64)
    torch.manual_seed(1)
    weights = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in weights.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return weights


@pytest.fixture(scope="session")
def gemma():
    """A random four-layer Gemma-2 (soft-capped logits, sliding windows, scaled embeddings)."""
    return tiny_model("gemma2")


HARVEST = {"source": "packaged:wiki", "tokens": 100, "held_out": 10}


def a_profile(**given):
    """A profile of these settings, and the least of others that one needs."""
    from helpers import profiles

    return profiles.of({"name": "p", "chat": "c", "layer": 0, "behaviors": ["joy"], **given}, "p.yaml")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of its own."""
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"
