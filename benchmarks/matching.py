"""Certified optimal matching of two dictionaries by cosine, against lapjv (float32) and scipy's dense solver.

    python -m benchmarks.matching [--sizes 4096 8192 16384] [--kinds independent planted real] [--d 576]
        [--A folder ...] [--B folder ...] [--alone 32768 65536] [--rounds 3] [--device cpu]

`independent`: two sets of random rows; `planted`: three tenths of the rows shared, with noise, in another order; `real`: decoder rows of saved SAEs, those of A's folders under each other and those of B's, the first n of each.
Each contender is timed from unit rows in float32 to the assignment. Both peers get the same float32 product that ours uses, of A and -B, as their costs, and prove nothing; lapjv (`pip install lapjv==1.3.29`) and ours go in turn, scipy goes once. `--alone`: sizes for ours only; the peak of memory is the process's so far.
"""

import argparse
import json
import resource
import statistics
from pathlib import Path

import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

from benchmarks import clock, line
from helpers.pair import matching
from helpers.sae.topk import product

try:
    from lapjv import lapjv
except ImportError:
    lapjv = None


def dictionaries(kind, n, o):
    """Unit rows of A and of B, (n, d) each; fewer if the saved SAEs have no more."""
    if kind == "real":
        both = [torch.cat([load_file(x / "sae_weights.safetensors")["W_dec"] for x in side]) for side in (o.A, o.B)]
        n = min(n, *map(len, both))
        return tuple(matching.unit_rows(rows[:n]) for rows in both)
    g = torch.Generator().manual_seed(0)
    A, B = (torch.randn(n, o.d, generator=g) for _ in range(2))
    if kind == "planted":
        shared = 3 * n // 10
        B[:shared] = A[:shared] + 0.3 * torch.randn(shared, o.d, generator=g)
        B = B[torch.randperm(n, generator=g)]
    return matching.unit_rows(A), matching.unit_rows(B)


def contenders(A, B, device):
    """{name: a call that gives the column of each row, and the match if it is ours}."""

    def ours():
        found = matching.match(A, B, device=device)
        return found.B_for_A, found

    calls = {
        "scipy": lambda: (torch.from_numpy(linear_sum_assignment(product(A, -B).numpy())[1]), None),
        "lapjv": lambda: (torch.from_numpy(lapjv(product(A, -B).numpy())[0]).long(), None),
        "ours": ours,
    }
    return calls if lapjv else {name: call for name, call in calls.items() if name != "lapjv"}


def timed(kind, n, o, alone=False):
    """One row of the table: the seconds of each contender, ratios, totals and the certificate."""
    A, B = dictionaries(kind, n, o)
    calls = contenders(A, B, o.device)
    seconds, total = {name: [] for name in calls}, {}
    for number in range(o.rounds):
        for name, call in calls.items():
            if name != "ours" and alone or name == "scipy" and number and lapjv:
                continue
            seconds[name].append(clock(lambda: total.__setitem__(name, call()), o.device))  # noqa: B023
    (_, match), others = total.pop("ours"), {}
    for name, (columns, _) in total.items():
        others[name] = float((1 - torch.cosine_similarity(A.double(), B.double()[columns])).sum())
        assert match.total - others[name] <= match.gap + 1e-12 * len(A), f"{name} beats the certificate"
    ratios = {
        name: [theirs / own for theirs, own in zip(seconds[name], seconds["ours"], strict=False)] for name in total
    }
    return {
        "kind": kind,
        "n": len(A),
        "seconds": {name: round(statistics.median(times), 3) for name, times in seconds.items() if times},
        "ratios": ratios,
        "total": match.total,
        "gap": match.gap,
        "total_gap": max([abs(match.total - x) / match.total for x in others.values()], default=0.0),
        "rounds": match.rounds,
        "edges": match.edges,
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
    }


def show(row):
    def times(name):
        return f"{row['seconds'][name]:8.2f}" if name in row["seconds"] else "       -"

    def ratio(name):
        found = row["ratios"].get(name)
        return f"{statistics.median(found):5.2f} ({min(found):.2f} to {max(found):.2f})" if found else "-"

    print(
        f"{row['kind']:<12}{row['n']:>7}{times('scipy')}{times('lapjv')}{times('ours')}   {ratio('lapjv'):<22}"
        f"{ratio('scipy'):<22}{row['total']:11.4f}  {row['gap']:8.1e}  {row['rounds']}  {row['edges']:>10,}  {row['peak_gb']}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[4096, 8192, 16_384])
    parser.add_argument("--alone", type=int, nargs="*", default=[])
    parser.add_argument("--kinds", nargs="*", choices=("independent", "planted", "real"), default=["independent"])
    for side in "AB":
        parser.add_argument(f"--{side}", type=Path, nargs="*", default=[])
    for name, default in (("d", 576), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    o = parser.parse_args()
    if "real" in o.kinds and not (o.A and o.B):
        parser.error("--kinds real wants --A and --B: folders of saved SAEs")
    print(
        f"{'kind':<12}{'rows':>7}{'scipy s':>8}{'lapjv s':>8}{'ours s':>8}   {'lapjv / ours':<22}{'scipy / ours':<22}"
        f"{'total':>11}  {'proven':>8}  {'rounds, edges, peak GB'}"
    )
    rows = []
    for alone, sizes in ((False, o.sizes), (True, o.alone)):
        for n in sizes:
            for kind in o.kinds:
                rows.append(timed(kind, n, o, alone))
                show(rows[-1])
    peer = "lapjv" if lapjv else "scipy"
    compared = [row for row in rows if row["ratios"]]
    ratios = [x for row in compared for x in row["ratios"][peer]]
    worst = {name: max((row[name] for row in rows), default=0.0) for name in ("gap", "total_gap")}
    for row in rows:
        row["ratios"] = {name: [round(x, 2) for x in found] for name, found in row["ratios"].items()}
    sizes = {"sizes": o.sizes, "alone": o.alone, "d": o.d}
    extra = {"peer": peer, "certificate_gap": worst["gap"], "total_gap": worst["total_gap"], "cases": rows}
    nothing = {"bench": "matching", "ratio": None, "sizes": sizes, "device": o.device, **extra}
    print(json.dumps(line("matching", ratios, sizes, o.device, **extra) if ratios else nothing))


if __name__ == "__main__":
    main()
