"""A whole training of a TopK SAE: `helpers.sae.train.fit` against SAELens's `SAETrainer`, both fed from a harvest's shards.

    python -m benchmarks.topk_training [--tokens 60000 --batch 2048 --steps 120 --expansion 8 --k 32] [--rounds 3]

Residuals of the embedded model are harvested once, into data/cache. Then both train in turn, A B A B, in one process: from the same
start, on the same rows in the same order, by the same learning rates, clipping and Adam, neither with checkpoints. Timed is all of it:
drawing and measuring the sample, reading shards, every step. Their losses are compared step by step as logged.
"""

import argparse
import json
import statistics
import warnings

import torch

from benchmarks import clock, line
from helpers import session
from helpers.lm import models
from helpers.sae import harvest, topk, train

warnings.filterwarnings("ignore")


def saelens(rows, config, device):
    """The losses (steps,) of SAELens's trainer, given the start, the rows and the schedule of `train.fit`."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    class Recorder(SAETrainer):
        def step(self, batch):
            done = super().step(batch)
            losses.append(done.loss.detach())
            return done

    losses, steps, d_model = [], config.samples // config.batch, rows.d_model
    centre, scale = train.measure(rows.sample(min(config.samples, 16_384), config.seed))
    start = topk.initial(d_model, config.latents, scale * centre, config.seed)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_model, d_sae=config.latents, k=config.k, device=device))
    for name, values in (("W_enc", start.W_enc.T), ("W_dec", start.W_dec), ("b_dec", start.b_dec)):
        getattr(sae, name).data.copy_(values)
    how = SAETrainerConfig(
        config.samples, config.batch, config.lr, lr_end=config.lr, device=device, lr_warm_up_steps=round(config.warm_up * steps),
        lr_decay_steps=round(config.decay * steps), dead_feature_window=10**9,
    )  # fmt: skip
    with torch.enable_grad():
        Recorder(how, sae, (scale * x for x in rows.batches(config.batch, config.seed))).fit()
    return torch.stack(losses).cpu()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in (
        ("tokens", 60_000), ("batch", 2048), ("steps", 120), ("expansion", 8), ("k", 32), ("rounds", 3)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=2e-3)
    o = parser.parse_args()
    torch.set_grad_enabled(False)
    profile = session.load_profile()
    device, dtype = session.device_and_dtype(profile)
    model = models.load(profile.chat, device, dtype)
    rows = harvest.run(model, list(profile.sae.harvest.source), [profile.layer], o.tokens)
    config = train.Config(
        rows.d_model * o.expansion, o.k, o.steps * o.batch, o.batch, o.lr, alpha=0.0, clip=1 / rows.d_model, low=False
    )  # SAELens clips at 1 and here sees no latent as dead
    runs = {
        "ours, float32": lambda: torch.tensor([row["loss"] for row in train.fit(rows, config, device).log]),
        "SAELens": lambda: saelens(rows, config, device),
        "ours, bfloat16 ranking": lambda: torch.tensor(
            [row["loss"] for row in train.fit(rows, config._replace(low=True), device).log]
        ),
    }
    logged = torch.arange(config.log_every, o.steps + 1, config.log_every) - 1
    seconds, losses = {name: [] for name in runs}, {}
    for _ in range(o.rounds):
        for name, run in runs.items():
            seconds[name].append(clock(lambda n=name, r=run: losses.update({n: r()}), device))
    theirs = losses["SAELens"][logged]
    gaps = {
        n: float(f"{float((losses[n][: len(theirs)] / theirs - 1).abs().max()):.1e}") for n in runs if n != "SAELens"
    }
    print(f"\n{'':24s}  median s   range            last loss   largest relative difference of losses")
    for name, values in seconds.items():
        print(
            f"{name:24s}  {statistics.median(values):8.2f}   {min(values):.2f} to {max(values):.2f}"
            f"   {float(losses[name][-1]):9.3f}   {gaps.get(name, 0.0):.1e}"
        )

    def ratio(under):
        return [a / b for a, b in zip(seconds["SAELens"], seconds[under], strict=True)]

    sizes = {"d": rows.d_model, "latents": config.latents, "k": o.k, "batch": o.batch, "steps": o.steps}
    low = round(statistics.median(ratio("ours, bfloat16 ranking")), 2)
    print(json.dumps(line("topk_training", ratio("ours, float32"), sizes, device, ratio_bfloat16=low, loss_gaps=gaps)))


if __name__ == "__main__":
    main()
