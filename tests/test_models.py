"""Loading: the packaged model, folders, and refusals that come before gigabytes."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from helpers import models, prompts


def test_the_packaged_model_answers_and_loads_fast_the_second_time(smol):
    began = time.perf_counter()
    again = models.load("packaged:smollm2-135m-instruct", "cpu", torch.float32)
    assert time.perf_counter() - began < 10  # a guard against dequantising again (15 s), not a benchmark
    batch = prompts.pad([prompts.chat(again.tokenizer, "What is the capital of France?")], again.tokenizer.pad_token_id)
    ids = again.original_model.generate(
        input_ids=batch.ids, attention_mask=batch.mask.long(), max_new_tokens=10, do_sample=False
    )
    assert "Paris" in again.tokenizer.decode(ids[0, batch.ids.shape[1] :])
    assert again.identity.startswith("packaged:smollm2-135m-instruct@") and not any(
        p.requires_grad for p in again.parameters()
    )


def test_digits_are_split_as_the_model_was_trained(smol):
    assert smol.tokenizer.tokenize("2026") == ["2", "0", "2", "6"]


def test_a_folder_loads(tiny, tmp_path):
    folder = tmp_path / "mine"
    from transformers import AutoModelForCausalLM, LlamaConfig

    weights = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tiny.tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    weights.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    assert models.load(str(folder)).cfg.n_layers == 2


def test_wrong_names_are_refused_with_what_there_is(tmp_path):
    with pytest.raises(models.ModelError, match="no packaged model 'packaged:x'; there is packaged:smollm2"):
        models.load("packaged:x")
    with pytest.raises(models.ModelError, match="holds no config.json"):
        models.load(str(tmp_path))


def hub(monkeypatch, *, info=None, error=None, auth=None):
    class Api:
        def __init__(self, token=None):
            pass

        def model_info(self, *_, **__):
            if error:
                raise error
            return info

        def auth_check(self, *_):
            if auth:
                raise auth

    monkeypatch.setattr("huggingface_hub.HfApi", Api)


def hub_error(name):
    import httpx
    from huggingface_hub import errors

    return getattr(errors, name)("planted", response=httpx.Response(403, request=httpx.Request("GET", "http://hub")))


def test_gated_unknown_and_unreachable_hub_models_say_what_to_do(monkeypatch):
    monkeypatch.setattr(models, "setting", lambda name, default="": default)
    hub(
        monkeypatch,
        info=SimpleNamespace(gated="manual", sha="0" * 40, safetensors=None),
        auth=hub_error("GatedRepoError"),
    )
    with pytest.raises(models.ModelError, match="gated and HF_TOKEN is not set in .env"):
        models.load("google/gemma-2-2b-it")
    hub(monkeypatch, error=hub_error("RepositoryNotFoundError"))
    with pytest.raises(models.ModelError, match="no model 'some/thing'.*packaged:smollm2"):
        models.load("some/thing")
    hub(monkeypatch, error=ConnectionError("no route, token hf_" + "a" * 30))
    with pytest.raises(models.ModelError, match="cannot be asked.*without|Without a network") as refused:
        models.load("some/thing")
    assert "hf_aaaa" not in str(refused.value)


def test_too_little_memory_is_said_before_the_download(monkeypatch):
    hub(monkeypatch, info=SimpleNamespace(gated=False, sha="0" * 40, safetensors=SimpleNamespace(total=70_000_000_000)))
    monkeypatch.setattr(models, "_memory", lambda device: 24_000_000_000)
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("went on to load"))
    with pytest.raises(
        models.ModelError, match="70.0 billion parameters, 140.0 GB in bfloat16, but 24.0 GB are free on cpu"
    ):
        models.load("big/model", "cpu", torch.bfloat16)


def test_filler_keeps_its_position_but_is_not_attended_to(tiny):
    one, other = prompts.padded_pair(
        tiny.tokenizer, prompts.SystemPair("Be a loud and angry old man.", "Be kind.", "Why?")
    )
    batch = prompts.pad([other], tiny.tokenizer.pad_token_id)
    assert batch.position_ids[0].tolist() == list(range(len(other.ids)))
    changed = batch._replace(ids=torch.where(batch.roles == prompts.FILLER, 100, batch.ids))
    last = [models.run(tiny, b, attend_filler=False).logits[0, -1] for b in (batch, changed)]
    assert torch.equal(*last)
    assert json.dumps(tiny.identity)
