"""One TopK training step: `helpers.sae.topk` against SAELens's `TopKTrainingSAE` with its trainer's own clipping and Adam.

    python -m benchmarks.topk_step [--d 576 --latents 4608 --k 32 --batch 4096] [--steps 200] [--rounds 5] [--device cpu]

First both train from the same start on the same batches (an eighth of the size) in float64, and their loss curves must agree to
1e-4: the same mathematics. The same in float32 is printed beside SAELens against itself with its inputs changed in the last bit,
because Adam blows rounding up. Then they are timed in turn, A B A B, in one process: ours in float32, ours with latents ranked in
bfloat16, the dense product alone (torch's addmm, and ours), SAELens, and eai-sparsify and dictionary-learning where they are installed.
A turn is four steps, of which the last three count: in training too a step finds memory and caches as one of its kind left them.
"""

import argparse
import json
import statistics
import warnings

import torch

from benchmarks import clock, line
from helpers.sae import topk, train

warnings.filterwarnings("ignore")


def saelens(start, sizes, device):
    """SAELens's training SAE holding `start`, and a function that does what its SAETrainer does in one step."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    dtype = str(start.W_enc.dtype).removeprefix("torch.")
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=sizes.d, d_sae=sizes.latents, k=sizes.k, device=device, dtype=dtype)
    )
    with torch.no_grad():
        sae.W_enc.copy_(start.W_enc.T)
        sae.W_dec.copy_(start.W_dec)
        sae.b_dec.copy_(start.b_dec)
    optimiser = torch.optim.Adam(sae.parameters(), lr=sizes.lr)
    never_dead = torch.zeros(sizes.latents, dtype=torch.bool, device=device)
    fired, frequency = (torch.zeros(sizes.latents, device=device) for _ in range(2))

    def one(x):
        with torch.enable_grad():
            out = sae.training_forward_pass(TrainStepInput(x, {}, never_dead, 0, False))
            with torch.no_grad():  # its own bookkeeping of dead latents
                firing = out.feature_acts.bool().float()
                fired.add_(1)[firing.sum(-2).bool()] = 0
                frequency.add_(firing.sum(0))
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        return out.loss.detach()

    return one


def sparsify(start, sizes, device):
    """eai-sparsify's coder (Triton or its CPU fallback), same loss up to its normalisation, plain Adam."""
    from sparsify import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    coder = SparseCoder(sizes.d, SparseCoderConfig(num_latents=sizes.latents, k=sizes.k), device=device)
    optimiser = torch.optim.Adam(coder.parameters(), lr=sizes.lr)

    def one(x):
        with torch.enable_grad():
            loss = coder(x).fvu
            loss.backward()
            torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        return loss.detach()

    return one


def dictionary_learning(start, sizes, device):
    """dictionary_learning's TopK trainer with its own update."""
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

    trainer = TopKTrainer(
        steps=10**6, activation_dim=sizes.d, dict_size=sizes.latents, k=sizes.k, layer=0, lm_name="",
        lr=sizes.lr, warmup_steps=0, device=device, dict_class=AutoEncoderTopK,
    )  # fmt: skip

    def one(x):
        with torch.enable_grad():
            return torch.tensor(trainer.update(1, x))

    return one


def ours(start, sizes, low):
    """helpers.sae.train's own step: bookkeeping of dead latents, clipping and Adam included."""
    config = train.Config(
        sizes.latents, sizes.k, 10**12, sizes.batch, sizes.lr, warm_up=0.0, decay=0.0, alpha=0.0, low=low
    )
    state = train.State.new(start)

    def one(x):
        return train.update(state, x, config).loss

    return one


def same_curves(fresh, batch, sizes, device):
    """Largest relative difference between two loss curves: ours and SAELens's by dtype, and SAELens's with itself."""
    double, single = torch.float64, torch.float32
    runs = [ours(fresh(double), sizes, False), saelens(fresh(double), sizes, device), ours(fresh(single), sizes, False),
            saelens(fresh(single), sizes, device), saelens(fresh(single), sizes, device)]  # fmt: skip
    curves = []
    for _ in range(sizes.steps):
        x = batch(max(sizes.batch // 8, 1))
        nudged = torch.nextafter(x, torch.full_like(x, torch.inf))
        curves.append([float(run(i)) for run, i in zip(runs, (x.double(), x.double(), x, x, nudged), strict=True)])
    a, b, c, d, e = torch.tensor(curves, dtype=double).T if curves else torch.zeros(5, 1)
    pairs = {"float64": (a, b), "float32": (c, d), "float32, SAELens with itself": (e, d)}
    return {
        name: float(f"{float(((u - v).abs() / v).max()) if sizes.steps else 0.0:.1e}") for name, (u, v) in pairs.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in (("d", 576), ("latents", 4608), ("k", 32), ("batch", 4096), ("steps", 200), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sizes = parser.parse_args()
    torch.set_grad_enabled(False)
    device = sizes.device
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(sizes.latents // 4, sizes.d, generator=generator)
    features /= features.norm(dim=1, keepdim=True)

    def batch(n=sizes.batch):  # sparse sums of planted features: something there is to learn
        chosen = torch.randint(len(features), (n, max(sizes.k // 2, 1)), generator=generator)
        weight = torch.rand(n, max(sizes.k // 2, 1), generator=generator) + 0.5
        return torch.nn.functional.embedding_bag(chosen, features, per_sample_weights=weight, mode="sum").to(device)

    def fresh(dtype=torch.float32):
        return topk.Weights(
            *(t.to(dtype) for t in topk.initial(sizes.d, sizes.latents, torch.zeros(sizes.d, device=device)))
        )

    gaps = same_curves(fresh, batch, sizes, device)
    print(f"largest relative difference of the losses over {sizes.steps} steps: {gaps}", flush=True)
    if gaps["float64"] > 1e-4:
        raise SystemExit("the two do not compute the same")
    start = fresh()
    steps = {"ours, float32": ours(fresh(), sizes, False), "SAELens": saelens(start, sizes, device)}
    steps["ours, bfloat16 ranking"] = ours(fresh(), sizes, True)
    buffer, transposed = torch.empty(sizes.batch, sizes.latents, device=device), start.W_enc.T
    at_once = topk.ROWS if device == "cpu" else sizes.batch
    steps["one dense product, torch.addmm"] = lambda x: torch.addmm(start.b_enc, x, transposed, out=buffer)
    for name, dtype in (("as ours", torch.float32), ("as ours, bfloat16", torch.bfloat16)):
        rows, bias = start.W_enc.to(dtype), start.b_enc.to(dtype)
        steps[f"one dense product, {name}"] = lambda x, rows=rows, bias=bias: [
            topk.product(part.to(rows.dtype), rows, bias) for part in x.split(at_once)
        ]
    for name, maker in (("eai-sparsify", sparsify), ("dictionary-learning", dictionary_learning)):
        try:
            steps[name] = maker(start, sizes, device)
            steps[name](batch())
        except Exception as error:  # a peer that is missing or does not run here is reported, not fatal
            steps.pop(name, None)
            print(f"{name} left out: {type(error).__name__}: {str(error)[:120]}")
    seconds = {name: [] for name in steps}
    for _ in range(sizes.rounds):
        x = batch()
        for name, call in steps.items():
            call(x)
            seconds[name].append(clock(lambda c=call, x=x: [c(x) for _ in range(3)], device) / 3)
    print(f"\n{'':32s}  median s   range")
    for name, values in seconds.items():
        print(f"{name:32s}  {statistics.median(values):8.3f}   {min(values):.3f} to {max(values):.3f}")

    def ratio(over, under):
        return [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]

    extra = {
        "ratio_bfloat16": round(statistics.median(ratio("SAELens", "ours, bfloat16 ranking")), 2),
        "step_over_addmm": round(statistics.median(ratio("ours, float32", "one dense product, torch.addmm")), 2),
        "step_over_own_product": round(statistics.median(ratio("ours, float32", "one dense product, as ours")), 2),
        "loss_gaps": gaps,
        **{
            f"ratio_{n}": round(statistics.median(ratio(n, "ours, float32")), 2)
            for n in steps
            if n in ("eai-sparsify", "dictionary-learning")
        },
    }
    if device.startswith("cuda"):
        extra["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    shape = {"d": sizes.d, "latents": sizes.latents, "k": sizes.k, "batch": sizes.batch, "steps": sizes.steps}
    print(json.dumps(line("topk_step", ratio("SAELens", "ours, float32"), shape, device, **extra)))


if __name__ == "__main__":
    main()
