"""A streamed diff-SAE's speed and memory on random weights of Gemma-2's kind: does the run fit the budget it prints, how long would it take?

    python -m benchmarks.diff_sae [--device cuda] [--seconds 20] [--rounds 3] [--d 2304 --depth 26 --layer 13 --mlp 9216 --heads 8 ...]

On a GPU the shapes are those of the profile gemma-2-2b (a pair of Gemma-2-2B, layer 13, 18,432 latents, k = 64, batches of 4,096), on a CPU
small ones. Printed: the budget reckoned from shapes alone, harvest and training speed of `helpers.pair.budget.probe`, and the most memory
that torch held while two pools were trained on with as many dead latents as there can be. The ratio is that peak over the budget.
"""

import argparse
import json
import statistics
import warnings

import torch

from benchmarks import line
from helpers import session
from helpers.lm import models
from helpers.lm.reading import LM
from helpers.pair import budget, diff
from helpers.sae import harvest, train

warnings.filterwarnings("ignore")
TRUE = {"d": 2304, "depth": 26, "layer": 13, "mlp": 9216, "heads": 8, "head": 256, "vocabulary": 256_000, "latents": 18_432, "k": 64,
        "batch": 4096, "pool": diff.POOL_TOKENS, "tokens": 100_000_000}  # fmt: skip
SMALL = {"d": 256, "depth": 6, "layer": 3, "mlp": 1024, "heads": 4, "head": 64, "vocabulary": 0, "latents": 2048, "k": 32,
         "batch": 1024, "pool": 8192, "tokens": 1_000_000}  # fmt: skip


def gemma(o, device, dtype, seed):
    """A Gemma-2 of random weights in the given shape, with the packaged tokenizer's words inside its vocabulary."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    tokenizer = models.outline(models.packaged_names()[0]).tokenizer
    config = Gemma2Config(
        hidden_size=o.d, num_hidden_layers=o.depth, intermediate_size=o.mlp, num_attention_heads=o.heads,
        num_key_value_heads=max(o.heads // 2, 1), head_dim=o.head, vocab_size=max(o.vocabulary, len(tokenizer)),
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device(device):
        weights = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    return LM.of(weights, tokenizer, f"random-gemma-2-{seed}")


def peak(call, device):
    """The most bytes that torch held at once during `call`; on a CPU beyond what it held before."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(changes.cumsum(0).max())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default=session.choose_device())
    parser.add_argument("--dtype", default="auto")
    for name, default in (("context", 128), ("rounds", 3), ("seconds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in TRUE:
        parser.add_argument(f"--{name}", type=int)
    o = parser.parse_args()
    cuda = o.device.startswith("cuda")
    for name, value in (TRUE if cuda else SMALL).items():
        setattr(o, name, value if getattr(o, name) is None else getattr(o, name))
    torch.set_grad_enabled(False)
    dtype = session.choose_dtype(o.dtype, o.device)
    config = train.Config(o.latents, o.k, o.tokens, o.batch, lr=2e-4, low=dtype == torch.bfloat16)
    cut = budget.Sizes(max(min(harvest.PASS_TOKENS, o.pool) // o.context, 1), o.context, o.pool)
    base, chat = (gemma(o, o.device, dtype, seed) for seed in (0, 1))
    need = budget.reckoned(budget.shape(base), budget.shape(chat), dtype, config, cut)
    print(need.table())
    budget.check(need, o.device, budget.LOADED)
    stream = harvest.Stream(
        base, "packaged:wiki+web+stories", o.layer, chat, o.context, pool_tokens=o.pool, batch_rows=cut.rows
    )
    probes = [budget.probe(stream, config, o.device, o.seconds) for _ in range(o.rounds)]
    short = config._replace(samples=2 * o.pool // o.batch * o.batch, dead_after=0)  # whatever rested one batch is dead
    held = sum(need.parts[name] for name in budget.LOADED)
    taken = peak(lambda: train.fit(stream, short, o.device), o.device) + (0 if cuda else held)
    allowed = need.total + (0 if cuda else sum(need.host.values()))
    middle = budget.Probe(
        *(statistics.median(getattr(p, name) for p in probes) for name in ("harvest", "training")), o.tokens
    )
    print("\n| | median | range |\n|---|---|---|")
    for name in ("harvest", "training"):
        speeds = [getattr(p, name) for p in probes]
        print(f"| {name}, tokens/s | {statistics.median(speeds):,.0f} | {min(speeds):,.0f} to {max(speeds):,.0f} |")
    print(f"| peak memory, GB | {taken / 1e9:.2f} | budget {allowed / 1e9:.2f} |\n\n{middle}")
    if taken > allowed:
        print("the budget is too small: its estimates of working memory do not hold here")
    shape = {name: getattr(o, name) for name in (*TRUE, "context")}
    print(json.dumps(line("diff_sae", [taken / allowed], shape, o.device, dtype=str(dtype).removeprefix("torch."),
                          harvest_tokens_per_second=round(middle.harvest), training_tokens_per_second=round(middle.training),
                          hours=round(middle.hours, 2), peak_gb=round(taken / 1e9, 2), budget_gb=round(allowed / 1e9, 2))))  # fmt: skip


if __name__ == "__main__":
    main()
