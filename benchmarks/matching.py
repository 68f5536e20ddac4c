"""Certified optimal matching of two dictionaries against scipy's dense `linear_sum_assignment`, by cosine; same total.

    python -m benchmarks.matching [--n 16384] [--d 576] [--kind independent|planted|real] [--rounds 3] [--alone] [--device cpu]

`independent`: two sets of random rows, the hardest case; `planted`: three tenths of the rows shared, with noise, in another order; `real`: decoders of two SAEs of the packaged model, n latents each, that differ in their seed (trained on first use).
`--alone` leaves scipy out, for sizes at which its dense float64 cost does not fit. The peak of memory is the process's.
"""

import argparse
import json
import resource

import torch
from scipy.optimize import linear_sum_assignment

from benchmarks import clock, line
from helpers import harvest, matching, saes, session, train
from helpers.lm import models


def dictionaries(n, d, kind):
    g = torch.Generator().manual_seed(0)
    A, B = (torch.randn(n, d, generator=g) for _ in range(2))
    if kind == "planted":
        shared = 3 * n // 10
        B[:shared] = A[:shared] + 0.3 * torch.randn(shared, d, generator=g)
        B = B[torch.randperm(n, generator=g)]
    return matching.unit_rows(A), matching.unit_rows(B)


def decoders(n, device):
    profile = session.load_profile("smollm2")
    bare = models.load(profile["chat"], *session.device_and_dtype(profile))
    samples = harvest.of_profile(bare, profile)
    out = []
    for seed in (0, 1):
        config = train.of_profile(profile, samples.d_model, seed)._replace(latents=n)
        out.append(saes.load(train.sae(samples, config, device)).sae.W_dec.detach())
    return tuple(map(matching.unit_rows, out))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in (("n", 16_384), ("d", 576), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kind", choices=("independent", "planted", "real"), default="independent")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alone", action="store_true")
    o = parser.parse_args()
    A, B = decoders(o.n, o.device) if o.kind == "real" else dictionaries(o.n, o.d, o.kind)
    o.d = A.shape[1]
    ours, theirs, totals = [], [], {}

    def certified():
        found = matching.match(A, B, device=o.device)
        totals["ours"], totals["certificate"] = found.total, (found.violation, found.gap, found.rounds, found.edges)

    def dense():
        costs = (1 - A @ B.T).numpy()
        i, j = linear_sum_assignment(costs)
        totals["scipy"] = float(costs[i, j].astype(float).sum())

    for _ in range(o.rounds):
        ours.append(clock(certified, o.device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        if not o.alone:
            theirs.append(clock(dense, o.device))
    violation, gap, rounds, edges = totals["certificate"]
    print(
        f"ours   {min(ours):7.1f} s   total {totals['ours']:.4f}, proven to {gap:.1e} ({rounds} round(s), {edges:,} edges, violation {violation:.1e})"
    )
    extra = {"seconds": round(min(ours), 1), "certificate_gap": gap, "rounds": rounds}
    if theirs:
        print(f"scipy  {min(theirs):7.1f} s   total {totals['scipy']:.4f}")
        extra["total_gap"] = abs(totals["ours"] - totals["scipy"]) / totals["scipy"]
    else:
        extra["peak_gb"] = round(peak, 1)
        print(f"peak memory {peak:.1f} GB")
    sizes = {"n": o.n, "d": o.d, "kind": o.kind}
    if o.alone:
        print(json.dumps({"bench": "matching", "ratio": None, "sizes": sizes, "device": o.device, **extra}))
        return
    print(json.dumps(line("matching", [b / a for a, b in zip(ours, theirs, strict=True)], sizes, o.device, **extra)))


if __name__ == "__main__":
    main()
