"""Figures: one style, safe for colour-blind readers, every one saved with the numbers it shows.

Importing this module sets the style. A null or control is drawn in grey on the same axes as the claim.
"""

import io
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import matplotlib as mpl
import numpy as np
from cycler import cycler
from IPython.display import display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.session import Session
from helpers.store import write_file

NULL = "#9a9a9a"
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe & Ito 2008
MARKERS = ["o", "s", "D", "^", "v", "P", "X"]

mpl.rcParams.update(
    {
        "figure.dpi": 110,
        "savefig.dpi": 110,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "axes.prop_cycle": cycler(color=PALETTE),
    }
)


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, the same wherever the same list is used."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def literal(text: str) -> str:
    """A piece of text as matplotlib shows it letter by letter: no formulas, line ends visible, what the font lacks as `?`."""
    kept = "".join(
        c if c.isascii() or c in "⏎«»…·—–’“”" or c.isalpha() and ord(c) < 0x250 else "?"
        for c in text.replace("\n", "⏎")
    )
    return kept.replace("$", r"\$")


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays as lists, floats to six figures, NaN as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value


class Interactive(Protocol):
    """A figure that can be looked at closely, as plotly makes it."""

    def to_json(self) -> str: ...

    def to_html(self, *, include_plotlyjs: str) -> str: ...


def show(
    session: Session, name: str, figure: Figure, numbers: Mapping[str, object], interactive: Interactive | None = None
) -> None:
    """Display the figure and save <name>.png and its numbers as <name>.json in the session's figures.

    `interactive`, a plotly figure of the same thing, rides along in the same output (JupyterLab shows it, everything else
    the PNG) and is written as <name>.html.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    stem = f"{session.notebook[:2]}_{name}"
    write_file(session.figures / f"{stem}.png", buffer.getvalue())
    write_file(session.figures / f"{stem}.json", json.dumps(_plain(numbers), indent=1, ensure_ascii=False) + "\n")
    bundle: dict[str, Any] = {"image/png": b64encode(buffer.getvalue()).decode(), "text/plain": f"figure {stem}"}
    if interactive is not None:
        bundle["application/vnd.plotly.v1+json"] = json.loads(interactive.to_json())
        write_file(session.figures / f"{stem}.html", interactive.to_html(include_plotlyjs="cdn"))
    display(bundle, raw=True)


def forest(
    axis: Axes,
    rows: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float, float]] | None],
    null: Sequence[tuple[float, float]] | None = None,
    null_label: str = "null",
) -> None:
    """A forest plot on `axis`: one row a name, one marker a series, each a `stats.Interval` (value, low, high) a row.

    `null`: one (low, high) a row, drawn as a grey band behind the markers. A series that is None is not drawn but keeps its
    colour, so that a name has one colour on a page.
    """
    y = np.arange(len(rows))[::-1]
    if null is not None:
        for i, (left, right) in enumerate(null):
            name = null_label if i == 0 else None
            axis.fill_betweenx([y[i] - 0.42, y[i] + 0.42], left, right, color=NULL, alpha=0.3, linewidth=0, label=name)
    offsets = np.linspace(0.28, -0.28, len(series)) if len(series) > 1 else [0.0]
    for (label, values), offset, colour, marker in zip(series.items(), offsets, PALETTE * 3, MARKERS * 3, strict=False):
        if values is None:
            continue
        v, low, high = (np.array([x[i] for x in values], float) for i in range(3))
        axis.errorbar(
            v, y + offset, xerr=[v - low, high - v], fmt=marker, color=colour, markersize=5, linewidth=1.2, label=label
        )
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(y, rows)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.grid(axis="y", visible=False)


def over_words(
    words: Sequence[str],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    start: int,
    title: str,
    colour: Mapping[str, str],
) -> Figure:
    """Series over the words of a conversation, one panel a quantity: {y label: {series: values (words,)}}.

    A dotted line before word `start`, where the answer begins. `colour`: one for each series.
    """
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(max(8.0, 0.21 * len(words)), 2.6 * len(panels)), sharex=True, squeeze=False
    )
    for axis, (label, lines) in zip(axes[:, 0], panels.items(), strict=True):
        for name, values in lines.items():
            axis.plot(values, color=colour[name], marker="o", markersize=3, linewidth=1.2, label=name)
        axis.axvline(start - 0.5, color="black", linestyle=":", linewidth=1)
        axis.set_ylabel(label)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[0, 0].set_title(title)
    shown = [literal(word.strip(" ")) or "·" for word in words]
    axes[-1, 0].set_xticks(range(len(shown)), shown, rotation=90, fontsize=8)
    return figure


def around(
    axis: Axes,
    series: Sequence[Sequence[float]],
    starts: Sequence[int],
    before: int,
    after: int,
    least: int = 8,
    label: str | None = None,
    color: str | None = None,
    linestyle: str = "-",
    linewidth: float | None = None,
) -> np.ndarray:
    """Draw the mean of many series laid over one another at their `starts`, with its 95 % band over series; returns the mean.

    Offsets from -before to after - 1; an offset that fewer than `least` series (or all, if there are fewer) reach is left out.
    """
    table = np.full((len(series), before + after), np.nan)
    for row, values, start in zip(table, series, starts, strict=True):
        first, last = max(start - before, 0), min(start + after, len(values))
        row[first - start + before : last - start + before] = values[first:last]
    count = np.isfinite(table).sum(0)
    reached = count >= min(least, len(series))
    table, offsets = table[:, reached], np.arange(-before, after)[reached]
    centre, half = np.nanmean(table, 0), 1.96 * np.nanstd(table, 0) / np.sqrt(count[reached])
    drawn = axis.plot(offsets, centre, label=label, color=color, linestyle=linestyle, linewidth=linewidth)[0]
    axis.fill_between(offsets, centre - half, centre + half, color=drawn.get_color(), alpha=0.18, linewidth=0)
    return centre
