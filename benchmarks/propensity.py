"""Scoring a steering vector: `scoring.Continuations` against plain steered forward passes over prompt and completion.

    python benchmarks/propensity.py [--items 50] [--rounds 5] [--random]

Both score the same items under the same vectors, batched, in the same dtype, and must agree. `--random` uses random weights of
Gemma-2-2B's shape instead of the packaged model (for a GPU).
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch

from helpers import session
from helpers.lm import hooks, models, reading, tokens
from helpers.lm.reading import LM
from helpers.lm.tokens import ANSWER
from helpers.steering import behaviors, propensity

FEW, VECTORS = 3, 30  # items on which so many vectors share runs


def plain(model, items, layer, vector, multiplier):
    """log p of both completions by whole steered forward passes, in batches of like length."""
    rows = [tokens.chat(model.tokenizer, i.question, answer=a) for i in items for a in (i.matching, i.non_matching)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    out = np.zeros(len(rows))
    for start in range(0, len(order), 40):
        chosen = order[start : start + 40]
        batch = tokens.pad([rows[i] for i in chosen], model.tokenizer.pad_token_id, "right")
        with hooks.add(model, layer, vector, multiplier, tokens.positions(batch, "response")):
            logits = reading.forward(model, batch).logits[:, :-1].float()
        targets = batch.ids[:, 1:].to(logits.device)
        token = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
        keep = (batch.roles[:, 1:] == ANSWER).to(logits.device)
        out[chosen] = (token * keep).double().sum(1).cpu()
    return out.reshape(-1, 2)


def gemma_shape(device, dtype):
    """A Gemma-2-2B of random weights with the packaged tokenizer's words inside its vocabulary."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

    tokenizer = AutoTokenizer.from_pretrained(models.packaged_folder("smollm2-135m-instruct"))
    with torch.device(device):
        weights = AutoModelForCausalLM.from_config(Gemma2Config(), dtype=dtype, attn_implementation="eager").eval()
    return LM.of(weights, tokenizer, "random-gemma-2-2b")


def clock(call, device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--random", action="store_true")
    options = parser.parse_args()
    s = session.start("benchmark")
    model = gemma_shape(s.device, s.dtype) if options.random else models.load(s.profile.chat, s.device, s.dtype)
    layer = model.layers // 2 - 1
    items = behaviors.load_behavior("refusal").test[: options.items]
    where, v = propensity.of_items(model, items, layer), torch.randn(model.d_model)
    build, _ = clock(where._build, s.device)
    gradient, _ = clock(where.gradients, s.device)
    where.log_probs(v, 1.0), plain(model, items, layer, v, 1.0)  # warm-up
    ours, theirs, gap = [], [], 0.0
    for round_ in range(options.rounds):
        multiplier = 1.0 + round_
        a, x = clock(lambda m=multiplier: where.log_probs(v, m), s.device)
        b, y = clock(lambda m=multiplier: plain(model, items, layer, v, m), s.device)
        ours, theirs, gap = [*ours, a], [*theirs, b], max(gap, float(np.abs(x - y).mean()))
        print(f"round {round_}: ours {a:.3f} s, plain {b:.3f} s, ratio {b / a:.2f}, mean |difference| {gap:.3f} nats")
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    few, vectors = propensity.of_items(model, items[:FEW], layer), torch.randn(VECTORS, model.d_model)
    together, alone = few.log_probs_under(vectors), np.stack([few.log_probs(x) for x in vectors])  # warm-up
    shared = []
    for _ in range(options.rounds):
        a, _ = clock(lambda: few.log_probs_under(vectors), s.device)
        b, _ = clock(lambda: [few.log_probs(x) for x in vectors], s.device)
        shared.append(b / a)
    print(
        f"{VECTORS} vectors on {FEW} items, runs shared: {statistics.median(shared):.2f} ({min(shared):.2f} to {max(shared):.2f}) times "
        f"as fast as a run of each, mean |difference| {np.abs(together - alone).mean():.3f} nats"
    )
    print(f"built once in {build:.2f} s; one gradient, which stands for any number of vectors, in {gradient:.2f} s")
    print(json.dumps({
        "benchmark": "propensity", "ratio": round(statistics.median(ratios), 2), "low": round(min(ratios), 2),
        "high": round(max(ratios), 2), "items": options.items, "layer": layer, "model": model.identity, "device": s.device,
        "dtype": str(s.dtype).removeprefix("torch."), "shared_over_alone": round(statistics.median(shared), 2), "gradient_over_score": round(gradient / statistics.median(ours), 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
