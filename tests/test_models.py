"""Loading: the packaged model, folders, and refusals that come before gigabytes."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import a_profile

from helpers.lm import files, models, reading, tokens
from helpers.steering import behaviors, caa


def test_the_packaged_model_answers_and_loads_fast_the_second_time(smol):
    began = time.perf_counter()
    again = models.load("packaged:smollm2-135m-instruct", "cpu", torch.float32)
    assert (
        time.perf_counter() - began < 10
    )  # a guard against dequantising again (15 s), not a benchmark: it takes about 1 s
    batch = tokens.pad([tokens.chat(again.tokenizer, "What is the capital of France?")], again.tokenizer.pad_token_id)
    ids = again.weights.generate(
        input_ids=batch.ids, attention_mask=batch.mask.long(), max_new_tokens=10, do_sample=False
    )
    assert "Paris" in again.tokenizer.decode(ids[0, batch.ids.shape[1] :])
    assert again.identity.startswith("packaged:smollm2-135m-instruct@") and not any(
        p.requires_grad for p in again.weights.parameters()
    )


def test_digits_are_split_as_the_model_was_trained(smol):
    assert smol.tokenizer.tokenize("2026") == ["2", "0", "2", "6"]


def small(tokenizer, folder, seed=0):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)

    weights = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_folder_loads_and_other_weights_have_another_identity(tiny, tmp_path):
    small(tiny.tokenizer, tmp_path / "a" / "mine", seed=0)
    small(tiny.tokenizer, tmp_path / "b" / "mine", seed=1)
    one, other = (models.load(str(tmp_path / x / "mine")) for x in "ab")
    assert one.layers == 2 and one.identity != other.identity and str(tmp_path) not in one.identity


def test_a_hub_model_fetched_before_loads_without_a_network(tiny, tmp_path, monkeypatch):
    """Only the snapshot folder exists, no refs, no network: weights and tokenizer must both come from it."""
    snapshot = tmp_path / "models--some--thing" / "snapshots" / ("c" * 40)
    small(tiny.tokenizer, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub(monkeypatch, error=ConnectionError("no route"))
    model = models.load("some/thing")
    assert model.layers == 2 and model.identity == "some/thing@" + "c" * 40


def test_the_tokenizer_is_the_models_own(smol):
    """The bridge makes a variant that adds a first token; plain text must not get one the model's tokenizer would not add."""
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(models.packaged_folder("packaged:smollm2-135m-instruct"))
    assert tokens.plain(smol.bridge.tokenizer, "Hi there").ids == stock("Hi there")["input_ids"]


def test_layers_are_those_the_model_has(tiny):
    assert models.choose_layers(tiny, a_profile(layer=1, layers=[0, 3, 26])) == (1, [0, 1, 3])
    assert models.choose_layers(tiny, a_profile(layer=1, layers=[3]), fast=True) == (1, [0, 1])
    with pytest.raises(models.ModelError, match="layer 14 was asked for, but the model has layers 0 to 3"):
        models.choose_layers(tiny, a_profile(layer=14))


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
    monkeypatch.setattr(files, "setting", lambda name, default="": default)
    hub(
        monkeypatch,
        info=SimpleNamespace(gated="manual", sha="0" * 40, safetensors=None, siblings=[]),
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


def test_pickled_weights_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    hub(monkeypatch, info=SimpleNamespace(gated=False, sha="0" * 40, safetensors=None, siblings=[]))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(models.ModelError, match="holds no safetensors weights"):
        models.load("old/model")


def test_too_little_memory_is_said_before_the_download(monkeypatch):
    hub(monkeypatch, info=SimpleNamespace(gated=False, sha="0" * 40, safetensors=SimpleNamespace(total=70_000_000_000)))
    monkeypatch.setattr(files, "free_memory", lambda device: 24_000_000_000)
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("went on to load"))
    with pytest.raises(
        models.ModelError, match="70.0 billion parameters, 140.0 GB in bfloat16, but 24.0 GB are free on cpu"
    ):
        models.load("big/model", "cpu", torch.bfloat16)


def test_filler_keeps_its_position_but_is_not_attended_to(tiny):
    one, other = caa.padded_pair(
        tiny.tokenizer, behaviors.SystemPair("Be a loud and angry old man.", "Be kind.", "Why?")
    )
    batch = tokens.pad([other], tiny.tokenizer.pad_token_id)
    assert batch.position_ids[0].tolist() == list(range(len(other.ids)))
    changed = batch._replace(ids=torch.where(batch.roles == tokens.FILLER, 100, batch.ids))
    last = [reading.forward(tiny, b, attend_filler=False).logits[0, -1] for b in (batch, changed)]
    assert torch.equal(*last)
    assert json.dumps(tiny.identity)


def adapter(base, folder, made_for="", scale=1.0):
    """A LoRA adapter, random in both halves, of the model in `base`, as peft writes it; returns peft's own forward."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    weights = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    tuned = get_peft_model(
        weights, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3 * scale)
    tuned.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": made_for}))
    return tuned


def test_an_adapter_is_merged_and_has_an_identity_of_its_own(tiny, tmp_path):
    small(tiny.tokenizer, tmp_path / "mine")
    tuned = adapter(tmp_path / "mine", tmp_path / "tuned")
    base, chat = models.load_pair(
        a_profile(pair={"base": str(tmp_path / "mine"), "chat": f"{tmp_path}/mine + {tmp_path}/tuned"})
    )
    ids = torch.randint(100, (2, 9))
    expected, plain = tuned(input_ids=ids).logits, base.weights(input_ids=ids).logits
    assert (
        torch.allclose(chat.weights(input_ids=ids).logits, expected, atol=1e-4) and (plain - expected).abs().max() > 0.1
    )
    assert type(chat.weights) is type(base.weights)  # nothing of the adapter is left to cost a forward anything
    assert chat.identity != base.identity and "+tuned@" in chat.identity and str(tmp_path) not in chat.identity
    assert models.outline(f"{tmp_path}/mine + {tmp_path}/tuned").d_model == 16
    again = adapter(tmp_path / "mine", tmp_path / "again" / "tuned", scale=2)
    assert again and models.load(f"{tmp_path}/mine + {tmp_path}/again/tuned").identity != chat.identity
    half = models.load(f"{tmp_path}/mine + {tmp_path}/tuned", dtype=torch.bfloat16).weights
    expected = chat.weights.state_dict()  # merged in float32, then rounded once
    assert all(torch.equal(w, expected[n].bfloat16()) for n, w in half.state_dict().items())


def test_adapters_and_pairs_that_cannot_be_had_are_refused_in_words(tiny, tmp_path):
    small(tiny.tokenizer, tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(models.ModelError, match="holds no adapter_config.json"):
        models.load(f"{tmp_path}/mine + {tmp_path}/empty")
    adapter(tmp_path / "mine", tmp_path / "other", made_for="packaged:another")
    with pytest.raises(models.ModelError, match="was made for packaged:another"):
        models.load(f"{tmp_path}/mine + {tmp_path}/other")
    small(tiny.tokenizer, tmp_path / "wide")
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    adapter(tmp_path / "mine", tmp_path / "fits")
    with pytest.raises(models.ModelError, match="the adapter fits does not fit.*before the"):
        models.load(f"{tmp_path}/wide + {tmp_path}/fits")
    with pytest.raises(models.ModelError, match="set BASE_MODEL"):
        models.load_pair(a_profile(chat="x"))
    with pytest.raises(models.ModelError, match="names no unrelated model.*write unrelated: into"):
        models.pair_names(a_profile(chat="x", base="y"), unrelated=True)
    assert models.pair_names(a_profile(chat="x", base="y")) == ("y", "x")
