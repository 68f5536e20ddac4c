"""One script a claim about speed; see README.md beside this file."""

import statistics
import time

import torch


def line(bench, ratios, sizes, device, **extra):
    """The last line every benchmark prints, as a dict: the median ratio, its range, the sizes and the device."""
    return {
        "bench": bench,
        "ratio": round(statistics.median(ratios), 2),
        "low": round(min(ratios), 2),
        "high": round(max(ratios), 2),
        "sizes": sizes,
        "device": device,
        **extra,
    }


def clock(call, device):
    """Seconds that `call` takes, a GPU's queue included."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began
