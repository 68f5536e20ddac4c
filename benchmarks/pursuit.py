"""Orthogonal matching pursuit of many vectors at once against scikit-learn's, one vector after another; same latents, same codes.

    python -m benchmarks.pursuit [--d 576] [--latents 4608] [--k 32] [--vectors 100] [--rounds 5] [--device cpu]

Vectors are sparse signed sums of dictionary rows plus noise, as a steering vector is hoped to be. scikit-learn gets its fast path
too (a Gram matrix made once, inside its time) and the faster of the two is the peer. sae_lens's matching pursuit, which
re-fits nothing and has no sign, is timed beside them.
"""

import argparse
import json
import warnings

import torch
from sae_lens import SAE
from sklearn.linear_model import orthogonal_mp

from benchmarks import clock, line
from helpers.sae import decompose

warnings.filterwarnings("ignore")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in (("d", 576), ("latents", 4608), ("k", 32), ("vectors", 100), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    o = parser.parse_args()
    torch.set_grad_enabled(False)
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(o.latents, o.d, generator=g))
    support = torch.stack([torch.randperm(o.latents, generator=g)[: o.k] for _ in range(o.vectors)])
    clean = torch.einsum("nk,nkd->nd", torch.randn(o.vectors, o.k, generator=g), rows[support])
    vectors = clean + 0.1 * clean.std() * torch.randn(o.vectors, o.d, generator=g)
    design, targets, on = rows.double().numpy().T, vectors.double().numpy().T, rows.to(o.device)
    cfg = {
        "d_in": o.d,
        "d_sae": o.latents,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "dtype": "float32",
    }
    unsigned = {"residual_threshold": 0.0, "max_iterations": o.k, "stop_on_duplicate_support": False}
    sae = SAE.from_dict({"architecture": "matching_pursuit", "device": o.device, **cfg, **unsigned})
    sae.W_dec.copy_(on)
    sae.b_dec.zero_()

    calls = {
        "ours": lambda: decompose.pursuit(on, vectors, o.k),
        "sklearn": lambda: orthogonal_mp(design, targets, n_nonzero_coefs=o.k),
        "sklearn, Gram": lambda: orthogonal_mp(design, targets, n_nonzero_coefs=o.k, precompute=True),
        "sae_lens matching": lambda: sae.encode(vectors.to(o.device)),
        "ours matching": lambda: decompose.pursuit(on, vectors, o.k, "matching", signed=False),
    }
    ours, theirs = calls["ours"]().codes, torch.from_numpy(calls["sklearn"]().T).float()
    gap = float((ours - theirs).abs().max() / theirs.abs().max())
    seconds = {name: [] for name in calls}
    for _ in range(o.rounds):
        for name, call in calls.items():
            seconds[name].append(clock(call, o.device))
    for name, taken in seconds.items():
        print(f"{name:18} {1000 * min(taken) / o.vectors:8.2f} ms a vector")
    print(f"largest difference of a code, relative to the largest code: {gap:.1e}")
    ratios = [
        min(a, b) / c for a, b, c in zip(seconds["sklearn"], seconds["sklearn, Gram"], seconds["ours"], strict=True)
    ]
    matching = [a / b for a, b in zip(seconds["sae_lens matching"], seconds["ours matching"], strict=True)]
    sizes = {k: getattr(o, k) for k in ("d", "latents", "k", "vectors")}
    print(
        json.dumps(
            line(
                "pursuit",
                ratios,
                sizes,
                o.device,
                code_gap=gap,
                ratio_matching=round(sorted(matching)[len(matching) // 2], 2),
            )
        )
    )


if __name__ == "__main__":
    main()
