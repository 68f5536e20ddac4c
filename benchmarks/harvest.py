"""Harvest to disk against a bare transformers forward cut at the same layer, and against sae_lens's ActivationsStore.

    python -m benchmarks.harvest [--tokens 40000] [--context 128] [--rounds 5] [--random] [--train]

All three run the same token rows of packaged text through the same weights, in turn, A B A B, in one process. Ours tokenises, packs,
runs, filters and writes checksummed shards; the bare forward runs ready token rows and throws the result away; the store
gets ready rows too and returns shuffled batches in memory. Their residuals must be equal, bit for bit. `--random` uses random
weights of Gemma-2-2B's shape (for a GPU); `--train` then harvests a pair of such models as a stream and trains a TopK SAE
of 18,432 latents on the differences, and prints the peak memory.
"""

import argparse
import copy
import json
import os
import shutil
import statistics
import tempfile
import warnings
from pathlib import Path

import torch

from benchmarks import clock, line
from helpers import session
from helpers.lm import models, text
from helpers.lm.reading import LM
from helpers.sae import harvest, train

warnings.filterwarnings("ignore")


def gemma_shape(device, dtype, seed=0):
    """A Gemma-2-2B of random weights with the packaged tokenizer's words inside its vocabulary."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(seed)
    with torch.device(device):
        weights = AutoModelForCausalLM.from_config(Gemma2Config(), dtype=dtype, attn_implementation="eager").eval()
    return LM.of(weights, models.outline(models.packaged_names()[0]).tokenizer, f"random-gemma-2-2b-{seed}")


def store(model, layer, ids, batch):
    """sae_lens's ActivationsStore over its wrapper of the same transformers weights, reading ready token rows."""
    from datasets import Dataset
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activations_store import ActivationsStore

    block = next(n for n, m in model.weights.named_modules() if m is model.blocks[layer])
    shared = {id(t): t for t in (*model.weights.parameters(), *model.weights.buffers())}
    twin = copy.deepcopy(model.weights, shared)  # the same parameters; its hooks stay off ours
    dataset = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    return ActivationsStore(
        HookedProxyLM(twin, model.tokenizer, hook_names=[block]), dataset, streaming=False, hook_name=block,
        hook_head_index=None, context_size=ids.shape[1], d_in=model.d_model, n_batches_in_buffer=8192 // ids.shape[1],
        total_training_tokens=ids.numel(), store_batch_size_prompts=batch, train_batch_size_tokens=4096, prepend_bos=False,
        normalize_activations="none", device=model.device, dtype="float32",
    )  # fmt: skip


def stream_and_train(device, dtype, context):
    """Tokens/s and peak memory of a streamed pair harvest with training on its differences, Gemma-2-2B's shape."""
    base, chat = gemma_shape(device, dtype, 0), gemma_shape(device, dtype, 1)
    rows = harvest.Stream(base, "packaged:wiki+web+stories", 13, chat, context=context)
    config = train.Config(latents=18_432, k=64, samples=40 * 4096)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    seconds = clock(lambda: train.fit(rows, config, device), device)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.startswith("cuda") else float("nan")
    print(f"pair streamed and trained on: {config.samples / seconds:,.0f} tokens/s, peak memory {peak:.1f} GB")
    return {"pair_tokens_per_second": round(config.samples / seconds), "pair_peak_gb": round(peak, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in (("tokens", 40_000), ("context", 128), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--train", action="store_true")
    o = parser.parse_args()
    torch.set_grad_enabled(False)
    device, dtype = session.device_and_dtype()
    model = gemma_shape(device, dtype) if o.random else models.load(session.load_profile().chat, device, dtype)
    layer = model.layers // 2 - 1
    source = "packaged:wiki+web+stories"
    batch = harvest.rows_a_pass(o.context)
    text.fetch("text")
    cache, folder = session.cache_dir(), Path(tempfile.mkdtemp())
    (folder / "assets").symlink_to((cache / "assets").resolve())
    os.environ["CACHE_DIR"] = str(folder)  # every round harvests anew
    cut = model.weights.get_decoder().layers
    whole = list(cut)
    inner = model.weights.get_decoder()

    def bare(keep=None):
        del cut[layer + 1 :]
        norm, inner.norm = inner.norm, torch.nn.Identity()
        try:
            for first in range(0, len(ids), batch):
                out = inner(input_ids=ids[first : first + batch].to(device), use_cache=False).last_hidden_state
                if keep is not None:
                    keep.append(out.cpu())
        finally:
            inner.norm = norm
            cut.extend(whole[layer + 1 :])

    def ours():
        shutil.rmtree(folder / "harvest", ignore_errors=True)
        return harvest.run(model, source, [layer], o.tokens, o.context, batch=batch)

    try:
        samples = ours()
        ids = samples.token_rows()[0].long()
        theirs = store(model, layer, ids, batch)
        reference: list = []
        bare(reference)
        everything = torch.cat(reference)
        rows_of, at = samples.token_rows()[1].long(), samples.named("position").long()
        gap = float((samples.rows(torch.arange(len(samples))) - everything[rows_of, at].float()).abs().max())
        other = theirs.get_activations(ids[:batch].to(device)).cpu()
        other_gap = float((other - everything[:batch].float()).abs().max())
        print(
            f"largest difference of a residual from the bare forward's: ours {gap:.1e}, ActivationsStore {other_gap:.1e}"
        )
        if gap or other_gap:
            raise SystemExit("the two do not compute the same")
        tokens = {"bare forward": ids.numel(), "harvest": ids.numel(), "ActivationsStore": 0}
        seconds = {name: [] for name in tokens}
        for _ in range(o.rounds):
            seconds["bare forward"].append(clock(bare, device))
            seconds["harvest"].append(clock(ours, device))
            theirs.reset_input_dataset()
            theirs._dataloader = None
            batches = max(ids.numel() // 4096 - 1, 1)
            loader = theirs.get_data_loader()
            next(loader)  # its buffer is filled outside the clock
            seconds["ActivationsStore"].append(clock(lambda b=batches, it=loader: [next(it) for _ in range(b)], device))
            tokens["ActivationsStore"] = batches * 4096
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.environ["CACHE_DIR"] = str(cache)
    speed = {name: [tokens[name] / s for s in values] for name, values in seconds.items()}
    for name, values in speed.items():
        print(f"{name:18s} {statistics.median(values):9,.0f} tokens/s   {min(values):,.0f} to {max(values):,.0f}")
    ratios = [a / b for a, b in zip(speed["harvest"], speed["bare forward"], strict=True)]
    over = [a / b for a, b in zip(speed["harvest"], speed["ActivationsStore"], strict=True)]
    extra = stream_and_train(device, dtype, o.context) if o.train else {}
    sizes = {
        "model": model.identity.split("@")[0],
        "layer": layer,
        "tokens": o.tokens,
        "context": o.context,
        "batch": batch,
    }
    print(json.dumps(line("harvest", ratios, sizes, device, dtype=str(dtype).removeprefix("torch."),
                          ratio_activations_store=round(statistics.median(over), 2), **extra)))  # fmt: skip


if __name__ == "__main__":
    main()
