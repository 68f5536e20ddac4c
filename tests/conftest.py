"""Shared fixtures: a tiny random Llama with the packaged tokenizer's shape, and the packaged model in float32."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("CHAT_MODEL", "BASE_MODEL", "LAYER", "PROFILE", "REPORT_DIR", "DEVICE", "DTYPE"):
    os.environ[name] = ""  # a developer's .env must not reach the tests

CACHE = os.environ.get("CACHE_DIR", "")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def smol():
    """The packaged model, float32, on the CPU: exactness is tested where rounding cannot hide an error."""
    from helpers.lm import models

    os.environ["CACHE_DIR"] = CACHE  # a test that asked for an empty cache may have been first
    return models.load("packaged:smollm2-135m-instruct", "cpu", torch.float32)


@pytest.fixture(scope="session")
def tiny(smol):
    """A random four-layer Llama with the packaged tokenizer: fast, exact, no meaning."""
    return tiny_model("llama", smol.tokenizer)


def tiny_model(kind, tokenizer):
    from helpers.lm.reading import LM

    return LM.of(tiny_weights(kind, tokenizer), tokenizer, f"tiny-{kind}")


def tiny_weights(kind, tokenizer):
    """transformers' own random model of four layers."""
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

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
def gemma(smol):
    """A random four-layer Gemma-2 (soft-capped logits, sliding windows, scaled embeddings)."""
    return tiny_model("gemma2", smol.tokenizer)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of its own."""
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"
