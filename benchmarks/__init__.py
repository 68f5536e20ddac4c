"""One script a claim about speed; see README.md beside this file."""

import statistics


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
