"""Harvest: the right residuals, the same bits after any interruption or split, damage found, pairs aligned, shuffles exact."""

import copy
import dataclasses
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import a_profile, small_tokenizer

from helpers import store
from helpers.lm import models, reading, replies, text
from helpers.lm.reading import LM
from helpers.sae import activations, harvest, train
from helpers.sae.activations import Array, HarvestError
from helpers.session import ROOT
from helpers.steering.behaviors import DataError

HOW = dict(context=32, shard_rows=8, batch=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small local source."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = [
        "the",
        "river",
        "ran",
        "past",
        "seven",
        "grey",
        "stones",
        "and",
        "a",
        "mill",
        "where",
        "nobody",
        "had",
        "worked",
        "since",
        "the",
        "war",
    ]
    g = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(80):
        chosen = torch.randint(len(words), (40,), generator=g).tolist()
        lines.append(json.dumps({"text": " ".join(words[i] for i in chosen)}))
    path.write_text("\n".join(lines))
    return str(path)


def small(seed=1, width=48, layers=4, kind="llama"):
    """A bare random transformers model with a small tokenizer."""
    from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig

    tokenizer = small_tokenizer()
    shared = dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=96, num_hidden_layers=layers,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, max_position_embeddings=512)  # fmt: skip
    config = {
        "llama": lambda: LlamaConfig(**shared),
        "gemma2": lambda: Gemma2Config(**shared, sliding_window=64),
        "neox": lambda: GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=96,
        ),
        "gpt2": lambda: GPT2Config(vocab_size=len(tokenizer), n_embd=width, n_layer=layers, n_head=4),
    }[kind]()
    torch.manual_seed(seed)
    weights = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in weights.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return LM.of(weights, tokenizer, f"small-{kind}-{seed}")


@pytest.fixture(scope="module")
def model():
    return small()


def every_byte(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("shard-*"))}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "neox"])
def test_residuals_are_transformers_own_and_nothing_above_runs(kind):
    model = small(kind=kind)
    ids = torch.randint(100, 4000, (3, 20))
    whole = model.weights(ids, output_hidden_states=True).hidden_states
    ran = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(model.blocks)]
    acts = reading.packed(model, ids, [0, 2])
    assert ran == [0, 1, 2] and sorted(acts) == [0, 2]
    for k in acts:
        torch.testing.assert_close(acts[k], whole[k + 1], rtol=0, atol=0)
    for handle in handles:
        handle.remove()
    before = [len(b._forward_hooks) for b in model.blocks]
    reading.packed(model, ids, [1])
    assert [len(b._forward_hooks) for b in model.blocks] == before
    with pytest.raises(IndexError, match="0 to 3"):
        reading.packed(model, ids, [4])


def test_samples_are_the_residuals_of_the_kept_tokens(model, source, cache):
    samples = harvest.run(model, source, [1, 2], 1500, **HOW)
    ids, row = samples.token_rows()
    acts = reading.packed(model, ids.long(), [1, 2])
    for k in (1, 2):
        there = samples.at(k)
        assert len(there) + there.dropped >= 1500
        torch.testing.assert_close(
            there.rows(torch.arange(len(there))), acts[k][row.long(), there.named("position").long()]
        )
    kept = np.concatenate([r.kept for r in text.rows(model.tokenizer, source, 32, "train")][: len(ids)])
    assert kept.sum() == len(samples) + samples.dropped == samples.note["counts"]["kept"]
    assert samples.about()["hook_name"] == "blocks.1.hook_resid_post" and str(cache) not in json.dumps(samples.about())


def test_massive_activations_are_left_out_and_counted(model, source, cache, monkeypatch):
    monkeypatch.setattr(reading, "unhooked", lambda lm: None)  # the hook plants what a model of that identity has
    plain = harvest.run(model, source, [1], 1000, **HOW)
    block = model.blocks[1]
    handle = block.register_forward_hook(
        lambda m, i, out: out.index_fill(1, torch.tensor([5]), 300.0), always_call=False
    )
    try:
        loud = harvest.run(dataclasses.replace(model, identity="loud"), source, [1], 1000, **HOW)
    finally:
        handle.remove()
    assert plain.dropped == 0 and loud.dropped == (plain.named("position") == 5).sum()
    assert not (loud.named("position") == 5).any()
    assert float(activations.Samples(loud.folder, 1, outlier=1e9).rows(torch.arange(500)).norm(dim=1).max()) > 1000


def test_a_second_call_runs_nothing_and_another_parameter_runs_anew(model, source, cache, monkeypatch):
    first = harvest.run(model, source, [1], 800, **HOW)
    monkeypatch.setattr(harvest, "_forward", lambda *_: pytest.fail("ran again"))
    again = harvest.run(model, source, [1], 800, **HOW)
    assert again.folder == first.folder
    with pytest.raises(pytest.fail.Exception):
        harvest.run(model, source, [2], 800, **HOW)


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from helpers.sae import harvest
from test_harvest import small, HOW
def die():
    os.kill(os.getpid(), signal.SIGKILL)
real_bytes, real_replace = Path.write_bytes, Path.replace
def is_it(path):
    return {shard!r} in path.name
def write_bytes(self, data):
    if {when!r} == "half way through a file" and is_it(self):
        real_bytes(self, data[: len(data) // 2])
        die()
    return real_bytes(self, data)
def replace(self, target):
    if {when!r} == "before the rename" and is_it(target):
        die()
    out = real_replace(self, target)
    if {when!r} == "between shard and sidecar" and is_it(target):
        die()
    return out
Path.write_bytes, Path.replace = write_bytes, replace
harvest.run(small(), {source!r}, [1], 1500, **HOW)
"""


@pytest.mark.parametrize(
    ("shard", "when"),
    [("shard-00000.safetensors", "half way through a file"), ("shard-00003.safetensors", "between shard and sidecar"),
     ("shard-00003.json", "half way through a file"), ("plan.json", "half way through a file")],
)  # fmt: skip
def test_killed_at_any_moment_it_resumes_to_the_same_bits(model, source, tmp_path, monkeypatch, shard, when):
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "whole"))
    whole = every_byte(harvest.run(model, source, [1], 1500, **HOW).folder)
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "killed"))
    code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), shard=shard, when=when, source=source)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "TQDM_DISABLE": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    calls = []
    real = harvest._forward
    monkeypatch.setattr(harvest, "_forward", lambda *a: calls.append(1) or real(*a))
    resumed = harvest.run(model, source, [1], 1500, **HOW)
    assert every_byte(resumed.folder) == whole and len(whole) > 8
    kept = int(shard[6:11]) if shard.startswith("shard") else len(whole) // 2 if shard == "sidecar.json" else 0
    assert len(calls) == len(whole) // 2 - kept
    assert not list(resumed.folder.glob(".tmp*"))


def test_a_damaged_shard_is_named_and_made_again(model, source, cache, capsys):
    first = harvest.run(model, source, [1], 1500, **HOW)
    before = every_byte(first.folder)
    for damage in ("truncated", "flipped", "gone", "sidecar"):
        shard = first.folder / "shard-00002.safetensors"
        data = bytearray(shard.read_bytes())
        if damage == "truncated":
            shard.write_bytes(data[:-10])
        elif damage == "flipped":
            data[-5] ^= 1
            shard.write_bytes(data)
        elif damage == "gone":
            shard.unlink()
        else:
            (first.folder / "shard-00002.json").write_text("{")
        with pytest.raises(HarvestError, match="shard 2"):
            activations.Samples(first.folder, 1)
        again = harvest.run(model, source, [1], 1500, **HOW)
        assert "shard 2" in capsys.readouterr().out and every_byte(again.folder) == before, damage


def test_nan_is_named_by_shard_and_row_and_earlier_shards_stay(source, cache, monkeypatch):
    monkeypatch.setattr(reading, "unhooked", lambda lm: None)
    broken = small(seed=7)
    block, seen = broken.blocks[1], []

    def poison(module, inputs, out):
        seen.append(1)
        return out.index_fill(1, torch.tensor([9]), float("nan")) if len(seen) == 6 else out

    handle = block.register_forward_hook(poison)
    with pytest.raises(HarvestError, match=r"shard 2, sample \d+ \(row 4, document \d+\) holds NaN"):
        harvest.run(broken, source, [1], 1500, **HOW)
    handle.remove()
    folder = next((cache / "harvest").iterdir())
    assert len(list(folder.glob("shard-*.json"))) == 2
    assert len(harvest.run(broken, source, [1], 1500, **HOW)) > 1400


def test_a_full_disk_stops_cleanly(model, source, cache, monkeypatch):
    real = Path.write_bytes

    def full(self, data):
        if "shard-00002.safetensors" in self.name:
            real(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="the disk is full .* CACHE_DIR"):
        harvest.run(model, source, [1], 1500, **HOW)
    folder = next((cache / "harvest").iterdir())
    assert len(list(folder.glob("shard-*.json"))) == 2 and not list(folder.glob(".tmp*"))
    monkeypatch.setattr(Path, "write_bytes", real)
    assert len(harvest.run(model, source, [1], 1500, **HOW)) > 1400
    monkeypatch.setattr(store, "free_bytes", lambda _: 1000)
    with pytest.raises(OSError, match="GB are free"):
        harvest.run(model, source, [2], 1500, **HOW)


def test_a_shard_that_cannot_be_read_just_now_is_not_thrown_away(model, source, cache, monkeypatch):
    first = harvest.run(model, source, [1], 1500, **HOW)
    before = every_byte(first.folder)

    def busy(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(store, "file_digest", busy)
    with pytest.raises(OSError, match="Too many"):
        activations.Samples(first.folder, 1)
    assert every_byte(first.folder) == before


def test_a_sidecar_cut_short_is_an_unfinished_harvest(model, source, cache):
    first = harvest.run(model, source, [1], 800, **HOW)
    sidecar = first.folder / "sidecar.json"
    sidecar.write_text(sidecar.read_text()[:20])
    with pytest.raises(HarvestError, match="not a finished harvest"):
        activations.Samples(first.folder, 1)
    assert len(harvest.run(model, source, [1], 800, **HOW)) == len(first)


def test_layers_keep_the_order_asked_for(model, source, cache):
    assert harvest.run(model, source, [2, 1], 800, **HOW).layer == 2
    assert harvest.run(model, source, [1, 2], 800, **HOW).layer == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [({"tokens": -5}, "tokens"), ({"shard_rows": 0}, "shard_rows"), ({"batch": -1}, "batch"), ({"context": 1}, "context"),
     ({"context": 4096}, "at most 512"), ({"layers": []}, "layers 0 to 3"), ({"layers": [4]}, "layers 0 to 3")],
)  # fmt: skip
def test_nonsense_sizes_are_refused(model, source, cache, change, word):
    with pytest.raises((ValueError, HarvestError), match=word):
        harvest.run(**{"model": model, "source": source, "layers": [1], "tokens": 800, **HOW, **change})
    assert not (cache / "harvest").exists()


def test_a_source_with_too_little_text_says_so(model, source, cache, capsys):
    samples = harvest.run(model, source, [1], 10**6, **HOW)
    assert f"holds {len(samples):,} tokens" in capsys.readouterr().out


def test_a_batch_that_did_not_fit_can_be_changed_while_no_shard_is_there(model, source, cache, monkeypatch):
    def tight(*_):
        raise torch.OutOfMemoryError("no")

    with monkeypatch.context() as m:
        m.setattr(harvest, "_forward", tight)
        with pytest.raises(torch.OutOfMemoryError):
            harvest.run(model, source, [1], 800, **{**HOW, "batch": 64})
    samples = harvest.run(model, source, [1], 800, **{**HOW, "batch": 2})
    assert samples.note["parameters"]["batch"] == 2
    (samples.folder / "sidecar.json").unlink()
    assert harvest.run(model, source, [1], 800, **{**HOW, "batch": 8}).note["parameters"]["batch"] == 2


def test_two_ranks_write_what_one_writes(model, source, tmp_path, monkeypatch):
    """torchrun with gloo on two CPU ranks, by the command line, against this process."""
    for part in (model.weights, model.tokenizer):
        part.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "one"))
    one = harvest.run(models.load(str(tmp_path / "model")), source, [1, 2], 2000, 32, shard_rows=8, batch=8).folder
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617", "-m", "helpers.sae.harvest",
               "--model", str(tmp_path / "model"), "--source", source, "--layers", "1", "2", "--tokens", "2000",
               "--context", "32", "--shard-rows", "8", "--batch", "8"]  # fmt: skip
    own = {"CACHE_DIR": str(tmp_path / "two"), "DTYPE": "float32", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "samples at layer(s) [1, 2]" in done.stdout
    (two,) = (tmp_path / "two" / "harvest").iterdir()
    assert every_byte(one) == every_byte(two) and len(every_byte(one)) >= 14


def test_memory_that_runs_out_is_said(model, source, cache, monkeypatch):
    def hopeless(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(reading, "packed", hopeless)
    with pytest.raises(HarvestError, match="32 x 32 tokens does not fit"):
        harvest.run(model, source, [1], 1000, context=32, batch=32)
    assert harvest.rows_a_pass(128) == 16 and harvest.rows_a_pass(100_000) == 1


# --- reading -----------------------------------------------------------------------------------------------------------


def test_tokens_left_out_do_not_move_the_order_of_the_others(model, source, cache):
    """Two models' outliers are other tokens: their SAEs still read the same text in the same order."""
    whole, other = (harvest.run(model, source, [1], 1500, **HOW) for _ in range(2))
    mask = torch.ones(int(whole.starts[-1]), dtype=torch.bool)
    whole.keep_only(mask)
    mask[[3, 700, len(mask) - 1]] = False
    other.keep_only(mask)
    for one, two, _ in zip(whole.batches(256, seed=2), other.batches(256, seed=2), range(12), strict=False):
        assert (one != two).any(1).sum() <= 3
    few = harvest.run(model, source, [1], 1500, **HOW)
    few.keep_only(
        torch.arange(len(mask)) % 2 == 0
    )  # a part of the text: an order of its own, nothing twice in an epoch
    rows = torch.cat([b for b, _ in zip(few.batches(64, block=8), range(len(few) // 64), strict=False)])
    twins = len(few) - len(
        few.rows(torch.arange(len(few))).unique(dim=0)
    )  # tokens that are one another's from the start
    assert len(rows.unique(dim=0)) >= len(rows) - twins and twins < 5


def test_batches_are_a_seeded_shuffle_without_repeats_that_can_start_anywhere():
    x = torch.arange(1000.0)[:, None].expand(-1, 3).contiguous()
    source = Array(x)

    def take(n, **how):
        return [b[:, 0] for _, b in zip(range(n), source.batches(100, block=16, pool=3, **how), strict=False)]

    two = take(18, seed=1)
    for epoch in (torch.cat(two[:9]), torch.cat(two[9:])):
        assert len(epoch.unique()) == 900  # the last, partial block and batch are left out
    assert not torch.equal(torch.cat(two[:9]), torch.cat(two[9:]))
    assert not torch.equal(two[0], two[0].sort().values)
    for start in (1, 5, 9, 13):
        assert all(torch.equal(a, b) for a, b in zip(take(4, seed=1, start=start), two[start:], strict=False))
    assert not torch.equal(torch.cat(take(9, seed=2)), torch.cat(two[:9]))
    spread = torch.stack([b.std() for b in two])
    assert float(spread.min()) > 150  # each batch is drawn from all over (288 if uniform)
    with pytest.raises(ValueError, match="cannot fill"):
        next(source.batches(1001))


def test_rows_come_in_the_order_asked_for(model, source, cache):
    samples = harvest.run(model, source, [1], 1500, **HOW)
    whole = samples.rows(torch.arange(len(samples)))
    index = torch.randint(len(samples), (333,))
    assert torch.equal(samples.rows(index), whole[index])
    batches = torch.cat([b for _, b in zip(range(len(samples) // 64), samples.batches(64, block=8), strict=False)])
    known = {tuple(r) for r in whole.tolist()}
    assert {tuple(r) for r in batches.tolist()} <= known
    assert (
        torch.equal(samples.sample(50, seed=3), samples.sample(50, seed=3))
        and samples.sample(10**6).shape == whole.shape
    )
    assert samples.place(0).startswith("shard 0, row 0")


def test_reading_holds_no_shard_in_memory(tmp_path):
    """A harvest of 200 MB is opened and read from by a process that grows by far less."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory is read from /proc")

    def held():
        return (
            int(next(line for line in status.read_text().splitlines() if line.startswith("RssAnon")).split()[1]) / 1e3
        )

    rows, width, n = 8, 512, 25_000
    for i in range(8):
        ids = np.zeros((rows, n // rows), dtype=np.int32)
        chunk = activations.Chunk(i, ids, np.ones_like(ids, bool), ids, {})
        acts = torch.full((n, width), float(i + 1), dtype=torch.bfloat16)
        activations.write_shard(tmp_path, chunk, {1: activations.Acts(acts, acts.float().norm(dim=1))})
        del acts
    note = {"shards": 8, "parameters": {"layers": [1]}, "counts": {}}
    (tmp_path / "sidecar.json").write_text(json.dumps(note))
    gc.collect()
    before = held()
    samples = activations.Samples(tmp_path, 1, verify=False)
    for _, batch in zip(range(20), samples.batches(1024), strict=False):
        assert batch.shape == (1024, width)
    assert len(samples) == 8 * n and held() - before < 60


def test_nan_on_disk_is_named_by_shard_and_row(model, source, cache):
    samples = harvest.run(model, source, [1], 1500, **HOW)
    samples.parts = [p.clone() for p in samples.parts]
    samples.parts[2][5, 3] = float("nan")
    with pytest.raises(ValueError, match="shard 2, row 5 of"):
        list(zip(range(30), samples.batches(64, block=8), strict=False))
    with pytest.raises(ValueError, match="shard 2, row 5 of"):
        samples.sample(10**6)


def test_streaming_gives_the_harvested_rows_and_can_start_anywhere(model, source, cache):
    on_disk = harvest.run(model, source, [1], 10**6, **HOW)
    stream = harvest.Stream(model, source, 1, context=32, pool_tokens=512, batch_rows=4)
    per_epoch = sum(int(0.99 * c.kept.sum()) // 64 for c in stream._chunks())
    batches = [b for _, b in zip(range(per_epoch + 4), stream.batches(64, seed=1), strict=False)]
    known = {tuple(np.round(r, 3)) for r in on_disk.rows(torch.arange(len(on_disk))).tolist()}
    got = [tuple(np.round(r, 3)) for r in torch.cat(batches[:per_epoch]).tolist()]
    assert set(got) <= known and len(set(got)) > 0.9 * len(got)
    assert not torch.equal(batches[0], batches[per_epoch])  # the second epoch is shuffled anew
    for start in (1, per_epoch - 1, per_epoch + 1):
        again = [b for _, b in zip(range(3), stream.batches(64, seed=1, start=start), strict=False)]
        assert all(torch.equal(a, b) for a, b in zip(again, batches[start:], strict=False))
    done = train.fit(stream, train.Config(96, 4, 64 * 10, 64, low=False))
    assert len(done.log) == 1 and done.weights.W_enc.shape == (96, 48)
    with pytest.raises(ValueError, match="fills one batch"):
        next(stream.batches(10**6))


# --- pairs -------------------------------------------------------------------------------------------------------------


def test_a_pair_is_aligned_token_by_token(model, source, cache):
    other = small(seed=2)
    both = harvest.pair(model, other, source, [1, 2], 1200, **HOW)
    ids, row = both.base.token_rows()
    position = both.base.named("position").long()
    a, b = (reading.packed(m, ids.long(), [1])[1][row.long(), position] for m in (model, other))
    everything = torch.arange(len(both.base))
    torch.testing.assert_close(both.difference.rows(everything), b - a)
    torch.testing.assert_close(both.chat.rows(everything), b)
    assert len(both.at(2).difference) == len(both.base)
    assert "difference" in both.difference.about() and both.difference.about()["base_harvest"] == both.base.folder.name
    stream = harvest.Stream(model, source, 1, chat=other, context=32, pool_tokens=512, batch_rows=4)
    known = {tuple(np.round(r, 3)) for r in both.difference.rows(everything).tolist()}
    assert {tuple(np.round(r, 3)) for r in next(stream.batches(64)).tolist()} <= known


def test_a_pair_uses_the_chat_models_template_and_end_of_text(model, cache, tmp_path):
    other = small(seed=2)
    base = model.read_as(copy.deepcopy(model.tokenizer))
    base.tokenizer.chat_template = None
    base.tokenizer.eos_token = "<|endoftext|>"
    lines = [json.dumps({"question": f"What is {i}?", "answer": "It is what it is, they say."}) for i in range(20)]
    lines += [json.dumps({"text": f"The number {i} is followed by {i + 1}, as ever."}) for i in range(40)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    how = dict(context=64, shard_rows=8, batch=4, part="all")
    both = harvest.pair(base, other, str(tmp_path / "mixed.jsonl"), [1], 600, **how)
    alone = harvest.run(other, str(tmp_path / "mixed.jsonl"), [1], 600, **how)
    assert both.chat.folder == alone.folder and len(both.difference) > 550
    stream = harvest.Stream(base, str(tmp_path / "mixed.jsonl"), 1, chat=other, context=64, part="all", batch_rows=4)
    assert torch.equal(torch.from_numpy(next(stream._chunks()).ids[:8]), alone.token_rows()[0][:8])


@pytest.fixture
def three(source, monkeypatch):
    """Three small models and the profile that names them; what is loaded by name is noted."""
    made = {name: small(seed=seed) for name, seed in (("base", 1), ("chat", 2), ("style", 3))}
    loaded = []
    monkeypatch.setattr(models, "key", lambda name, device, dtype: made[name].key)
    monkeypatch.setattr(models, "load", lambda name, device, dtype: loaded.append(name) or made[name])
    how = {"source": source, "chats": 4, "tokens": 900, "held_out": 200, "context": 64}
    pair = {"base": "base", "chat": "chat", "unrelated": "style"}
    profile = a_profile(chat="base", layer=1, pair=pair, sae={"harvest": how})
    return made, profile, loaded


def test_every_model_of_a_profile_reads_one_text_with_the_answers_of_all(three, cache):
    made, profile, loaded = three
    one, two = (harvest.pair_of_profile(made["base"], made[m], profile, fast=True) for m in ("chat", "style"))
    assert loaded == ["style"]  # the others were at hand, and answers that are kept load nothing
    alone = harvest.of_profile(made["base"], profile, fast=True)
    assert one.base.folder == two.base.folder == alone.folder and loaded == ["style"]
    turned = profile.model_copy(update={"chat": "chat"})
    assert harvest.of_profile(made["base"], turned, fast=True).folder == alone.folder
    sources = alone.note["parameters"]["source"]
    assert len(sources) == len(set(sources)) == 4 and sum(s.startswith("file:") for s in sources) == 4
    one.base.keep_only(torch.rand(int(one.base.starts[-1])) < 0.7)
    one.chat.keep_only(torch.rand(int(one.base.starts[-1])) < 0.7)
    activations.common(one, two)
    places = [torch.stack([side.named(n) for n in ("row", "position")]) for side in (*one, *two)]
    assert all(torch.equal(places[0], p) for p in places) and 0 < places[0].shape[1] < 0.6 * int(one.base.starts[-1])
    profile = profile.model_copy(update={"pair": profile.pair.model_copy(update={"unrelated": None})})
    with pytest.raises(HarvestError, match="do not hold the same tokens"):
        activations.common(one, harvest.pair_of_profile(made["base"], made["chat"], profile, fast=True))
    with pytest.raises(HarvestError, match="no section sae: harvest"):
        harvest.pair_of_profile(made["base"], made["chat"], a_profile())


def test_streams_of_another_dtype_are_not_mistaken_for_one_another(model, source, cache):
    half = LM.of(copy.deepcopy(model.weights).bfloat16(), model.tokenizer, model.identity)
    a, b = (harvest.Stream(m, source, 1, context=32, batch_rows=4).about() for m in (model, half))
    assert a["stream"] != b["stream"] and a["model_dtype"] == "float32"
    samples = harvest.run(model, source, [1], 800, **HOW)
    assert samples.about() != activations.Samples(samples.folder, 1, outlier=50.0).about()


def test_an_outlier_in_either_model_leaves_both(model, source, cache, monkeypatch):
    monkeypatch.setattr(reading, "unhooked", lambda lm: None)
    other = small(seed=2)
    handle = other.blocks[1].register_forward_hook(lambda m, i, out: out.index_fill(1, torch.tensor([5]), 300.0))
    try:
        both = harvest.pair(model, other, source, [1], 1000, **HOW)
    finally:
        handle.remove()
    assert len(both.base) == len(both.chat) == len(both.difference)
    assert both.base.dropped > 0 and not (both.base.named("position") == 5).any()


def test_a_pair_by_name_is_loaded_one_after_the_other(model, source, cache, monkeypatch):
    earlier = []

    def load(name, *_):
        gc.collect()
        assert all(ref() is None for ref in earlier)  # the first model is gone before the second is loaded
        loaded = small(seed={"a": 1, "b": 2}[name])
        earlier.append(weakref.ref(loaded.weights))
        return loaded

    tokenizer = model.tokenizer
    real = models.outline
    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(
        models, "outline", lambda name: models.Outline(tokenizer, 48, 4) if name in "ab" else real(name)
    )
    both = harvest.pair("a", "b", source, [1], 800, **HOW)
    assert len(earlier) == 2 and len(both.difference) > 700


class Words:
    """A tokenizer of given words."""

    def __init__(self, *words, split=1):
        self.words, self.split = words, split

    def get_vocab(self):
        return {w: i for i, w in enumerate(self.words)}

    def __call__(self, source, **_):
        return {"input_ids": list(range(0, len(source), self.split))}


def test_a_pair_that_does_not_fit_is_refused(model, source):
    for other, word in (
        (small(width=64), "d_model 48"),
        (small(layers=3), "4 layers"),
        (dataclasses.replace(model, tokenizer=Words("a")), "tokenizer"),
    ):
        with pytest.raises(HarvestError, match=word):
            harvest.pair(model, other, source, [1], 500)
    harvest.check_tokenizers(Words("a", "b"), Words("a", "b"))
    with pytest.raises(HarvestError, match="token 1 is 'b' in the base and 'c'"):
        harvest.check_tokenizers(Words("a", "b"), Words("a", "c"))
    with pytest.raises(HarvestError, match="token 2 is None in the base and 'c'"):
        harvest.check_tokenizers(Words("a", "b"), Words("a", "b", "c"))
    with pytest.raises(HarvestError, match="from token 1 on"):
        harvest.check_tokenizers(Words("a"), Words("a", split=2))


def test_text_that_cannot_be_harvested_leaves_nothing_behind(model, tmp_path, cache):
    for content, word in (("", "empty"), ("short", "less than one row")):
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(DataError, match=word):
            harvest.run(model, str(tmp_path / "a.txt"), [1], 100, part="all", **HOW)
    assert not list((cache / "harvest").rglob("shard-*"))


def test_chats_are_the_models_own_and_a_source(model, cache):
    path = replies.chats(model, ["Who are you?", "What is rain?"], max_new_tokens=8)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["question"] for line in lines} <= {"Who are you?", "What is rain?"} and lines
    before = path.stat().st_mtime_ns
    assert (
        replies.chats(model, ["Who are you?", "What is rain?"], max_new_tokens=8) == path
        and path.stat().st_mtime_ns == before
    )
    assert len(harvest.run(model, str(path), [1], 5, context=64, part="all")) >= 5


def test_an_sae_of_half_the_samples_is_another(model, source, cache):
    samples = harvest.run(model, source, [1], 800, **HOW)
    whole, half = samples.about(), torch.zeros(int(samples.starts[-1]), dtype=torch.bool)
    half[: len(half) // 2] = True
    samples.keep_only(half)
    first = samples.about()
    samples.keep_only(~half)
    assert len({json.dumps(a, sort_keys=True) for a in (whole, first, samples.about())}) == 3
