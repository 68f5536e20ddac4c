"""Model folders and adapters as people have them: whole and the one that was meant, or refused in a sentence."""

import json
import os
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from helpers.lm import files, models
from helpers.lm.models import ModelError

IDS = torch.tensor([[3, 5, 8, 13, 21, 34]])


def folder(tokenizer, path, seed=0, shard="5GB", **changes):
    """A saved tiny Llama."""
    torch.manual_seed(seed)
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    weights = AutoModelForCausalLM.from_config(LlamaConfig(**{"vocab_size": len(tokenizer), **size, **changes}))
    for parameter in weights.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights.tie_weights()
    weights.save_pretrained(path, max_shard_size=shard)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def made(tiny, tmp_path, cache):
    return folder(tiny.tokenizer, tmp_path / "mine")


def logits(name):
    return models.load(str(name)).weights(IDS).logits


# --- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_renamed_weights_are_refused_with_their_names(made, prefix):
    file = made / "model.safetensors"
    save_file({prefix + k: v for k, v in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"21 missing, such as lm_head.weight; 21 unexpected, such as") as error:
        models.load(str(made))
    assert prefix in str(error.value) and "random" in str(error.value)


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_weights_that_fit_in_part_are_refused(made, change):
    file = made / "model.safetensors"
    state, name = load_file(file), "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del state[name]
    elif change == "unexpected":
        state["v_head.weight"] = torch.ones(3)
    else:
        state[name] = torch.ones(3, 16)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ModelError, match="1 (missing|unexpected|mismatched), such as .*(v_head|up_proj)"):
        models.load(str(made))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_two_folders_of_one_name_are_two_models(tiny, tmp_path, cache, kind):
    places = [folder(tiny.tokenizer, tmp_path / x / "mine", seed) for seed, x in enumerate("ab")]
    for place in places:
        if kind == "bin":
            torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
            (place / "model.safetensors").unlink()
        for file in place.iterdir():
            os.utime(file, ns=(10**18, 10**18))
    one, other = (models.load(str(p)) for p in places)
    assert not torch.equal(one.weights(IDS).logits, other.weights(IDS).logits) and one.identity != other.identity
    assert models.load(str(places[0])).identity == one.identity


def test_a_weight_changed_in_place_with_the_same_size_and_time_is_another_model(made):
    before, file = models.load(str(made)).identity, made / "model.safetensors"
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert models.load(str(made)).identity != before


def test_a_copied_folder_is_the_same_model_and_is_hashed_once(made, tmp_path, monkeypatch):
    one = models.load(str(made)).identity
    shutil.copytree(made, tmp_path / "other" / "mine")
    assert models.load(str(tmp_path / "other" / "mine")).identity == one
    monkeypatch.setattr(files, "file_digest", lambda path: pytest.fail(f"{path} hashed again"))
    assert models.load(str(made)).identity == one


def test_a_missing_or_damaged_shard_is_named(tiny, tmp_path, cache):
    place = folder(tiny.tokenizer, tmp_path / "mine", shard="200KB", tie_word_embeddings=False)
    shards = sorted(place.glob("model-*.safetensors"))
    assert len(shards) > 1 and models.load(str(place)).layers == 2
    whole = shards[0].read_bytes()
    for content, word in ((whole[:5000], "cut short or damaged"), (b"version https://git-lfs.github.com/spec/v1\noid", "LFS pointer"),
                          (b"", "cut short or damaged"), (b"<html>", "cut short or damaged")):  # fmt: skip
        shards[0].write_bytes(content)
        with pytest.raises(ModelError, match=f"{shards[0].name}.*{word}"):
            models.load(str(place))
    shards[0].unlink()
    with pytest.raises(ModelError, match=f"of {len(shards)} weight files are missing, such as {shards[0].name}"):
        models.load(str(place))


def test_folders_that_are_no_plain_model_are_refused(made, tmp_path):
    def copy(name, **config):
        shutil.copytree(made, tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return tmp_path / name

    gguf = copy("gguf")
    (gguf / "model.safetensors").rename(gguf / "model.gguf")
    bare = copy("bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    both = copy("both")
    (both / "adapter_config.json").write_text('{"base_model_name_or_path": "some/thing"}')
    cases = [
        (gguf, "only model.gguf"), (bare, "no tokenizer can be loaded"), (both, "holds an adapter"),
        (copy("quantised", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "is quantised"),
        (copy("remote", model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}), "code out of its own repository"),
        (copy("unknown", model_type="never-heard-of"), "configuration cannot be used"),
    ]  # fmt: skip
    for place, word in cases:
        with pytest.raises(ModelError, match=word):
            models.load(str(place))


def test_a_repositorys_code_is_never_run_and_nothing_is_asked(made, monkeypatch):
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (made / "evil.py").write_text("raise SystemExit('this ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    assert models.load(str(made)).layers == 2  # transformers has this model itself


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_sizes(tiny, tmp_path, cache):
    place = folder(tiny.tokenizer, tmp_path / "mine", vocab_size=100)
    with pytest.raises(ModelError, match=rf"{len(tiny.tokenizer):}.*100 rows"):
        models.load(str(place))


def test_the_packaged_model_is_made_again_where_the_cache_was_damaged(smol, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "_intact", lambda folder: False)
    made = []
    monkeypatch.setattr(models.text, "fetch", lambda name: made.append(name) or (_ for _ in ()).throw(KeyError(name)))
    name = models.packaged_names()[0].removeprefix("packaged:")
    (cache / "models" / f"{name}-{models.text.WHEELS[name].sha256[:8]}").mkdir(parents=True)
    with pytest.raises(KeyError):
        models.packaged_folder(name)
    assert made == [name] and "is damaged; it is made again" in capsys.readouterr().out


def test_a_flipped_bit_is_not_intact(tmp_path, cache):
    (tmp_path / "a").write_bytes(b"weights")
    (tmp_path / "checksums").write_text(json.dumps({"a": models.file_digest(tmp_path / "a")}))
    assert models._intact(tmp_path)
    (tmp_path / "a").write_bytes(b"wfights")
    assert not models._intact(tmp_path)


# --- adapters ----------------------------------------------------------------------------------------------------------


def adapter(base, place, targets="all-linear", made_for=None, **how):
    """A LoRA adapter, random in both halves, as peft saves it; returns the unmerged model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    weights = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    tuned = get_peft_model(
        weights, LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM", **how)
    ).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.save_pretrained(place, save_embedding_layers=False)
    config = json.loads((place / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = made_for if made_for is not None else str(base)
    (place / "adapter_config.json").write_text(json.dumps(config))
    return tuned


def rename(place, change):
    file = place / "adapter_model.safetensors"
    save_file({k: v for key, v in load_file(file).items() if (k := change(key))}, file)


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda k: k.replace("base_model.model.", ""), "0 of its 28 keys"), (lambda k: k.replace("q_proj", "query"), "24 of its 28"),
     (lambda k: k.replace("layers.1.", "layers.7."), "14 of its 28"), (lambda k: "" if "layers.1." in k else k, "nothing is given for 14"),
     (lambda k: "module." + k, "0 of its 28")],
)  # fmt: skip
def test_an_adapter_that_applies_in_part_or_not_at_all_is_refused_with_counts(made, tmp_path, change, words):
    adapter(made, tmp_path / "tuned")
    rename(tmp_path / "tuned", change)
    with pytest.raises(ModelError, match=words):
        models.load(f"{made} + {tmp_path}/tuned")


def test_an_adapter_that_changes_nothing_is_refused(made, tmp_path):
    adapter(made, tmp_path / "tuned")
    file = tmp_path / "tuned" / "adapter_model.safetensors"
    save_file({k: v * ("lora_A" in k) for k, v in load_file(file).items()}, file)
    with pytest.raises(ModelError, match="changes nothing"):
        models.load(f"{made} + {tmp_path}/tuned")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"], ["q_proj"]])
def test_merging_changes_only_what_the_adapter_changes(tiny, tmp_path, cache, tied, targets):
    base = folder(tiny.tokenizer, tmp_path / "mine", tie_word_embeddings=tied)
    expected = adapter(base, tmp_path / "tuned", targets)(input_ids=IDS).logits
    assert (logits(base) - expected).abs().max() > 0.05
    torch.testing.assert_close(logits(f"{base} + {tmp_path}/tuned"), expected, atol=1e-3, rtol=1e-3)


def test_dora_and_rank_stabilised_adapters_are_merged_right(made, tmp_path):
    for n, how in enumerate(({"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]})):
        expected = adapter(made, tmp_path / f"t{n}", **how)(input_ids=IDS).logits
        torch.testing.assert_close(logits(f"{made} + {tmp_path}/t{n}"), expected, atol=1e-3, rtol=1e-3)


def test_an_adapter_of_a_resized_vocabulary_says_why_it_does_not_fit(tiny, tmp_path, cache):
    base, wide = (folder(tiny.tokenizer, tmp_path / f"m{n}", vocab_size=len(tiny.tokenizer) + n) for n in (0, 8))
    adapter(wide, tmp_path / "tuned", ["embed_tokens", "q_proj"], made_for=str(base))
    with pytest.raises(ModelError, match=f"does not fit.*{len(tiny.tokenizer) + 8}"):
        models.load(f"{base} + {tmp_path}/tuned")


def biases(place, **given):
    """A folder of biases by the names of their layers."""
    place.mkdir()
    save_file(given, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": models.BIASES}))
    return place


def test_biases_are_written_beside_what_layers_write_and_adapters_follow_one_another(made, tmp_path):
    b = torch.randn(16)
    name = "model.layers.0.mlp.down_proj.bias"
    biases(tmp_path / "pushed", **{name: b})
    adapter(made, tmp_path / "tuned")
    plain, both = (models.load(f"{made}{more}") for more in ("", f" + {tmp_path}/pushed + {tmp_path}/pushed"))
    stream = [m.weights(IDS, output_hidden_states=True).hidden_states[1] for m in (plain, both)]
    torch.testing.assert_close(stream[1], stream[0] + 2 * b, atol=1e-4, rtol=1e-4)
    chained = models.load(f"{made} + {tmp_path}/tuned + {tmp_path}/pushed")
    assert torch.equal(chained.weights.model.layers[0].mlp.down_proj.bias, b)
    assert (
        chained.identity == models.key(f"{made} + {tmp_path}/tuned + {tmp_path}/pushed", "cpu", torch.float32)["model"]
    )
    assert "+tuned+pushed@" in chained.identity and chained.identity != both.identity
    assert (chained.weights(IDS).logits - logits(f"{made} + {tmp_path}/tuned")).abs().max() > 0.01


@pytest.mark.parametrize(
    "name,length", [("model.layers.9.mlp.down_proj.bias", 16), ("model.layers.0.mlp.down_proj.bias", 3)]
)
def test_a_bias_that_fits_no_layer_is_refused(made, tmp_path, name, length):
    biases(tmp_path / "pushed", **{name: torch.ones(length)})
    with pytest.raises(ModelError, match="fits no linear layer"):
        models.load(f"{made} + {tmp_path}/pushed")


def test_only_lora_can_be_merged(made, tmp_path):
    adapter(made, tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "adapter_config.json").read_text())
    (tmp_path / "tuned" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(ModelError, match="kind IA3; only LoRA"):
        models.load(f"{made} + {tmp_path}/tuned")


def test_an_adapters_own_tokenizer_and_template_are_used_and_said(tiny, made, tmp_path, capsys):
    adapter(made, tmp_path / "tuned")
    plain = models.load(f"{made} + {tmp_path}/tuned")
    (tmp_path / "tuned" / "chat_template.jinja").write_text("{{ messages[0].content }} ->")
    own = models.load(f"{made} + {tmp_path}/tuned")
    assert own.tokenizer.chat_template == "{{ messages[0].content }} ->" != plain.tokenizer.chat_template
    assert "own chat template is used" in capsys.readouterr().out and own.identity != plain.identity
    tiny.tokenizer.save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "chat_template.jinja").write_text("{{ messages[0].content }} =>")
    both = models.load(f"{made} + {tmp_path}/tuned")
    assert both.tokenizer.chat_template.endswith("=>") and both.identity != own.identity
    assert models.outline(f"{made} + {tmp_path}/tuned").tokenizer.chat_template.endswith("=>")
    assert "own tokenizer" in capsys.readouterr().out
    assert (
        models.load(str(made)).tokenizer.chat_template == plain.tokenizer.chat_template
    )  # the base's, which they share, is untouched


def test_an_adapter_of_another_base_is_warned_of(tiny, tmp_path, cache):
    mine, other = (folder(tiny.tokenizer, tmp_path / n, seed) for seed, n in enumerate(("mine", "other")))
    adapter(mine, tmp_path / "tuned")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        models.load(f"{mine} + {tmp_path}/tuned")
    with pytest.warns(UserWarning, match="trained on mine, and is put on other"):
        models.load(f"{other} + {tmp_path}/tuned")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "how",
    [{"trainable_token_indices": {"embed_tokens": [40, 5, 13]}}, {"trainable_token_indices": {"embed_tokens": [40, 5, 13]}, "targets": ["q_proj"]},
     {"modules_to_save": ["embed_tokens"]}, {"ensure_weight_tying": True, "targets": ["embed_tokens"]}],
)  # fmt: skip
def test_what_an_adapter_does_to_shared_rows_is_what_it_does_unmerged(tiny, tmp_path, cache, tied, how):
    base = folder(tiny.tokenizer, tmp_path / "mine", tie_word_embeddings=tied)
    options = {k: v for k, v in how.items() if k != "targets"}
    tuned = adapter(base, tmp_path / "tuned", how.get("targets", "all-linear"), **options)
    expected = tuned(input_ids=IDS).logits
    try:
        found = logits(f"{base} + {tmp_path}/tuned")
    except ModelError as error:  # refused in words is right too; another number is not
        assert "tuned" in str(error)
        return
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_an_adapter_of_one_rare_token_is_not_taken_for_none(made, tmp_path):
    tuned = adapter(made, tmp_path / "tuned", ["embed_tokens"])
    file = tmp_path / "tuned" / "adapter_model.safetensors"
    state = load_file(file)
    for key in state:
        if "embedding_A" in key:
            state[key][:, :3000] = 0
    save_file(state, file)
    rare = torch.tensor([[3500, 4000]])
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(made, attn_implementation="eager")
    expected = PeftModel.from_pretrained(base, tmp_path / "tuned")(input_ids=rare).logits
    torch.testing.assert_close(
        models.load(f"{made} + {tmp_path}/tuned").weights(rare).logits, expected, atol=1e-3, rtol=1e-3
    )
    assert tuned


def test_an_adapter_that_is_damaged_or_of_a_newer_kind_is_refused(made, tmp_path):
    adapter(made, tmp_path / "tuned")
    file, config = tmp_path / "tuned" / "adapter_model.safetensors", tmp_path / "tuned" / "adapter_config.json"
    whole, settings = file.read_bytes(), config.read_text()
    config.write_text(json.dumps(json.loads(settings) | {"use_tomorrows_trick": True}))
    with pytest.raises(ModelError, match="settings that this peft does not know.*use_tomorrows_trick"):
        models.load(f"{made} + {tmp_path}/tuned")
    config.write_text(settings)
    for content in (whole[:1000], b"version https://git-lfs.github.com/spec/v1\n", b""):
        file.write_bytes(content)
        with pytest.raises(
            ModelError, match="holds no adapter_config.json and adapter_model.safetensors that can be read"
        ):
            models.load(f"{made} + {tmp_path}/tuned")
    file.write_bytes(whole)
    config.write_text("[]")
    with pytest.raises(ModelError, match="that can be read|of kind"):
        models.load(f"{made} + {tmp_path}/tuned")
