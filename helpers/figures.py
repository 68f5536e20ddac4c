"""Figures: one style, safe for colour-blind readers, every one saved with the numbers it shows.

Importing this module sets the style. A null or control is drawn in grey on the same axes as the claim.
"""

import io
import json
import warnings
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict

import matplotlib as mpl
import numpy as np
from cycler import cycler
from IPython.display import display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import TICKUP
from scipy import special
from scipy.optimize import isotonic_regression

from helpers import stats
from helpers.session import Session
from helpers.store import write_file

NULL = "#9a9a9a"
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe & Ito 2008
Range = tuple[float, float, float]  # a value with its interval, such as stats.Interval
Series = Mapping[str, Sequence[Range | None] | None]
Bands = Sequence[tuple[float, float]] | np.ndarray
MARKERS = ["o", "s", "D", "^", "v", "P", "X"]
STYLES = [":", "--", "-."] * 4  # of lines that mark a threshold

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


def show(
    session: Session, name: str, figure: Figure, numbers: Mapping[str, object], interactive: Interactive | None = None
) -> None:
    """Display the figure and save <name>.png and its numbers as <name>.json in the session's figures.

    `interactive`, a plotly figure of the same thing, rides along in the same output: JupyterLab shows it in place of the PNG,
    the report below it.
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
    display(bundle, raw=True)


def forest(
    session: Session,
    name: str,
    rows: Sequence[str],
    series: Series,
    *,
    title: str,
    xlabel: str,
    null: Bands | None = None,
    null_label: str = "null",
    pooled: Mapping[str, Range | None] | None = None,
    marks: Mapping[str, float] | None = None,
    judged: tuple[str, Range] | None = None,
    verdict: str = "",
    interactive: Interactive | None = None,
) -> None:
    """A forest plot, drawn, saved and shown: see `forest_on`.

    `pooled`: for each series one Interval over all rows, as a last row. `marks`: {label: x}, dotted lines (a threshold, a
    ceiling). `judged`: the number of the verdict and its name, where it is none of the rows; the marks are then its thresholds,
    on an axis of its own below. `verdict`: the word that stands on the figure.
    """
    shown = [*rows, "all"] if pooled else list(rows)
    drawn = {k: values if values is None or not pooled else [*values, pooled[k]] for k, values in series.items()}
    many = sum(values is not None for values in series.values())
    heights = [1.4 + 0.12 * len(shown) * (1.6 + many), *([0.9] if judged else [])]
    figure, axes = plt.subplots(len(heights), 1, figsize=(9.5, sum(heights)), height_ratios=heights, squeeze=False)
    axis, last = axes[0, 0], axes[-1, 0]
    forest_on(axis, shown, drawn, null, null_label)
    if pooled:
        axis.axhline(0.5, color="black", linewidth=0.8)
    if judged:
        what, (value, low, high) = judged
        last.errorbar([value], [0], xerr=[[value - low], [high - value]], fmt="o", color="black", markersize=5)
        last.set(xlabel=what, yticks=[], ylim=(-1, 1))
    for (label, x), style in zip((marks or {}).items(), STYLES, strict=False):
        last.axvline(x, color="black", linestyle=style, linewidth=1.2, label=label)
    axis.set(xlabel=xlabel, title=titled(title, verdict))
    for each in axes[:, 0]:
        each.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    numbers = {"rows": shown, "series": drawn, "null": null, "marks": marks, "judged": judged}
    show(session, name, figure, numbers, interactive)


class Panel(TypedDict):
    """What one panel of `forests` shows, in the words of `forest_on`."""

    series: Series
    xlabel: str
    null: NotRequired[Bands]
    null_label: NotRequired[str]
    verdict: NotRequired[str]


def forests(session: Session, name: str, rows: Sequence[str], panels: Mapping[str, Panel]) -> None:
    """Forest plots side by side over the same rows, drawn, saved and shown: {title: what each shows}.

    A panel's `xlabel` stands below it, its `verdict` in the title.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 2.2 + 0.5 * len(rows)), sharey=True)
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        forest_on(axis, rows, panel["series"], panel.get("null"), panel.get("null_label", "null"))
        axis.set(xlabel=panel["xlabel"], title=titled(title, panel.get("verdict", "")))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.7 / (0.5 * len(rows) + 0.6)), ncols=2)
    show(session, name, figure, {"rows": rows, "panels": panels})


def heat(
    session: Session,
    name: str,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    framed: np.ndarray,
    *,
    title: str,
    xlabel: str = "",
    reach: float = 1.0,
    interactive: Interactive | None = None,
) -> None:
    """A table of signed numbers (rows, columns) coloured from -reach to reach, those of `framed` in a frame; drawn, saved and shown.
    The colour bar has the signs that occur."""
    figure, axis = plt.subplots(figsize=(2.5 + 1.1 * len(columns), 1.6 + 0.42 * len(rows)))
    image = axis.imshow(values, cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto")
    box = {"boxstyle": "square,pad=0.25", "fill": False, "linewidth": 1.2}
    sign = "+" if (values < 0).any() else ""
    for (i, j), value in np.ndenumerate(values):
        ink = "white" if abs(value) > 0.6 * reach else "black"
        frame = {**box, "edgecolor": ink} if framed[i, j] else None
        axis.text(j, i, f"{value:{sign}.2f}", ha="center", va="center", fontsize=9, color=ink, bbox=frame)
    long = max(map(len, columns)) > 4
    axis.set_xticks(range(len(columns)), columns, rotation=30 if long else 0, ha="right" if long else "center")
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(visible=False)
    axis.set(title=title, xlabel=xlabel)
    bar = figure.colorbar(image, ax=axis, shrink=0.8)
    bar.ax.set_ylim(-reach if (values < 0).any() else 0, 0 if (values < 0).all() else reach)
    show(session, name, figure, {"rows": rows, "columns": columns, "values": values, "framed": framed}, interactive)


def by_row(
    session: Session,
    name: str,
    rows: Sequence[str],
    table: np.ndarray,
    pooled: Range | None,
    null: np.ndarray,
    *,
    title: str,
    xlabel: str,
    null_label: str,
    marks: Mapping[str, float] | None = None,
    verdict: str = "",
) -> None:
    """A forest plot of what several SAEs give for each of `rows`, `table` (SAEs, rows): mean and range. Beside them the central 95 %
    of a null's draws (draws, rows); below them the `pooled` Interval and the null's means. Drawn, saved and shown."""
    label = f"mean and range of {len(table)} SAEs" if len(table) > 1 else "one SAE"
    each: Series = {label: list(zip(table.mean(0), table.min(0), table.max(0), strict=True))}
    bands = [stats.band(x) for x in (*null.T, null.mean(1))]
    forest(
        session, name, rows, each, title=title, xlabel=xlabel, null=bands, null_label=f"{null_label}\n(95 % of draws)",
        pooled={label: pooled}, marks=marks, verdict=verdict,
    )  # fmt: skip


def titled(title: str, verdict: str) -> str:
    """A title with the verdict behind it."""
    return f"{title} {verdict.upper()}" if verdict else title


def lines(
    session: Session,
    name: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[Range | float | None] | np.ndarray | None],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    null: Bands | None = None,
    null_label: str = "null",
    marks: Mapping[str, float] | None = None,
    at: Mapping[str, float] | None = None,
    log: bool = False,
    log_y: bool = False,
    grey: Sequence[str] = (),
    verdict: str = "",
    ticks: Sequence[str] = (),
    interactive: Interactive | None = None,
) -> None:
    """Curves over `x`, drawn, saved and shown: each series numbers or Intervals (a band; None: not run), `null` a (low, high)
    for each x.

    A series that is None is not drawn but keeps its colour. `marks`: {label: y}, dotted lines across; `at`: {label: x}, grey
    ones upright. `log`: a logarithmic x axis, with a tick at every x where there are few. Series of `grey` are nulls. `ticks`: what
    stands at each x in place of its number.
    """
    figure, axis = plt.subplots(figsize=(9.5, 4.2))
    if null is not None:
        low, high = np.array(null, float).T
        axis.fill_between(x, low, high, color=NULL, alpha=0.3, linewidth=0, label=null_label)
    for (label, values), colour, marker in zip(series.items(), PALETTE * 3, MARKERS * 3, strict=False):
        if values is None:
            continue
        table = np.array([v if isinstance(v, Sequence) else (v, v, v) for v in values], float)
        shade, size = NULL if label in grey else colour, 5 if len(x) <= 40 else 0
        axis.plot(x, table[:, 0], color=shade, marker=marker, markersize=size, label=label)
        axis.fill_between(x, table[:, 1], table[:, 2], color=shade, alpha=0.15, linewidth=0)
        if len(only := np.flatnonzero(np.isfinite(table[:, 0]))) == 1:  # a band needs two points
            axis.vlines(np.asarray(x)[only], table[only, 1], table[only, 2], color=shade, linewidth=1.2)
    for (label, y), style in zip((marks or {}).items(), STYLES, strict=False):
        axis.axhline(y, color="black", linestyle=style, linewidth=1.2, label=label)
    for label, where in (at or {}).items():
        axis.axvline(where, color=NULL, linewidth=1.2, label=label)
    if log:
        axis.set(xscale="log")
    if log and len(x) <= 12:
        axis.set_xticks(x, ticks or [f"{value:g}" for value in x])
        axis.minorticks_off()
    if log_y:
        axis.set(yscale="log")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=titled(title, verdict))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    show(session, name, figure, {"x": x, "series": series, "null": null, "marks": marks}, interactive)


def twin(
    x: Sequence[float],
    series: Mapping[str, Sequence[Range | float] | np.ndarray],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log: bool = False,
) -> Interactive:
    """The curves of `lines` to look at closely: what `interactive` takes. Intervals are error bars, and in the hover text."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for label, values in series.items():
        value, low, high = np.array([v if isinstance(v, Sequence) else (v, v, v) for v in values], float).T
        bars = {"type": "data", "array": high - value, "arrayminus": value - low, "thickness": 1}
        figure.add_scatter(x=list(x), y=value, error_y=bars, name=label, mode="lines+markers")
    figure.update_layout(title=title, xaxis_title=xlabel, yaxis_title=ylabel, template="simple_white")
    figure.update_xaxes(type="log" if log else "linear", tickvals=list(x))
    return figure


def beside(
    session: Session,
    name: str,
    x: Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[Range] | None]],
    *,
    title: str,
    xlabel: str,
    grey: Sequence[str] = (),
    log: bool = False,
    interactive: Interactive | None = None,
) -> None:
    """The same curves over `x` in several units, side by side, drawn, saved and shown: {y label: {series: an Interval for each x}},
    those of `grey`, the nulls, in grey; None keeps its colour. `log`: a logarithmic x axis, with a tick at every x."""
    figure, axes = plt.subplots(1, len(panels), figsize=(max(9.5, 4.2 * len(panels)), 3.9), squeeze=False)
    for axis, (label, series) in zip(axes[0], panels.items(), strict=True):
        colour = dict(zip([who for who in series if who not in grey], PALETTE, strict=False))
        for (who, values), marker in zip(series.items(), MARKERS, strict=False):
            if values is None:
                continue
            value, low, high = np.array(values, float).T
            axis.plot(x, value, color=colour.get(who, NULL), marker=marker, markersize=5, label=who)
            axis.fill_between(x, low, high, color=colour.get(who, NULL), alpha=0.15, linewidth=0)
        if log:
            axis.set(xscale="log")
            axis.set_xticks(x, [f"{value:g}" for value in x])
            axis.minorticks_off()
        else:
            axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel=xlabel, ylabel=label)
    axes[0, 0].set_title(title)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(series))
    show(session, name, figure, {"x": x, "panels": panels}, interactive)


def histogram(
    session: Session,
    name: str,
    values: Mapping[str, Sequence[float]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    grey: Sequence[str] = (),
    verdict: str = "",
) -> None:
    """Distributions {label: values} in the same 40 bins, those of `grey` in grey, drawn, saved and shown."""
    bins = np.histogram_bin_edges(np.concatenate([np.asarray(v) for v in values.values()]), 40).tolist()
    figure, axis = plt.subplots(figsize=(9.5, 3.4))
    for (label, x), colour in zip(values.items(), PALETTE, strict=False):
        axis.hist(x, bins, color=NULL if label in grey else colour, alpha=0.75, label=label)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=titled(title, verdict))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    show(session, name, figure, values)


def matrices(
    session: Session,
    name: str,
    panels: Mapping[str, np.ndarray],
    labels: Sequence[str],
    title: str,
    digits: int = 1,
) -> None:
    """Square tables of cosines {panel title: (n, n)} with one row and column for each label, drawn, saved and shown."""
    n = len(labels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.5 + (1.6 + 0.42 * n) * len(panels), 1.4 + 0.42 * n), squeeze=False
    )
    for axis, (head, table) in zip(axes[0], panels.items(), strict=True):
        image = axis.imshow(table, vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set_xticks(range(n), labels, rotation=45, ha="right")
        axis.set_yticks(range(n), labels)
        axis.grid(False)
        axis.set_title(head)
        for (i, j), value in np.ndenumerate(np.round(table, digits) + 0.0):  # no -0
            ink = "white" if abs(value) > 0.6 else "black"
            axis.text(j, i, f"{value:.{digits}f}", ha="center", va="center", fontsize=9, color=ink)
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    show(session, name, figure, {"labels": labels, **panels})


def bars(
    session: Session,
    name: str,
    labels: Sequence[str],
    values: Sequence[float] | np.ndarray,
    groups: Mapping[str, tuple[Sequence[bool] | np.ndarray, str]],
    *,
    title: str,
    ylabel: str,
) -> None:
    """A bar for each label, drawn, saved and shown. `groups`: {group: (which bars, colour)}; a bar of no height gets a tick."""
    height = np.asarray(values, float)
    figure, axis = plt.subplots(figsize=(max(8.0, 0.22 * len(labels)), 3.8))
    for group, (chosen, colour) in groups.items():
        at = np.flatnonzero(np.asarray(chosen))
        axis.bar(at, height[at], color=colour, label=group)
        none = at[height[at] == 0]
        axis.plot(none, np.zeros(len(none)), marker=TICKUP, color=colour, markersize=7, markeredgewidth=3, linestyle="")
    axis.set_xticks(range(len(labels)), [literal(label.strip(" ")) or "·" for label in labels], rotation=90, fontsize=9)
    axis.set(ylabel=ylabel, title=title)
    axis.legend()
    numbers = {"labels": labels, "values": height, "groups": {group: chosen for group, (chosen, _) in groups.items()}}
    show(session, name, figure, numbers)


def scatter(
    session: Session,
    name: str,
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    log: bool = False,
    grey: Sequence[str] = (),
    verdict: str = "",
    interactive: Interactive | None = None,
) -> None:
    """Clouds of points {label: (x, y)}, those of `grey` (nulls) in grey, with `curves` in black behind them (a theory, the diagonal),
    drawn, saved and shown."""
    figure, axis = plt.subplots(figsize=(9.5, 4.4))
    for (label, (x, y)), style in zip((curves or {}).items(), ["-", ":", "--", "-."] * 2, strict=False):
        axis.plot(x, y, color="black", linewidth=1.2, linestyle=style, label=label)
    for (label, (x, y)), colour, marker in zip(points.items(), PALETTE * 3, MARKERS * 3, strict=False):
        axis.plot(x, y, marker, color=NULL if label in grey else colour, markersize=5, alpha=0.7, label=label)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=titled(title, verdict), xscale="log" if log else "linear")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    show(session, name, figure, {"points": points, "curves": curves}, interactive)


def chart(
    session: Session,
    name: str,
    at: np.ndarray,
    group: np.ndarray,
    size: Sequence[float],
    stars: Mapping[str, np.ndarray],
    *,
    title: str,
    interactive: Interactive | None = None,
) -> None:
    """Points on a plane (points, 2) without axes, coloured by the number of their `group`, larger by the root of their `size`, and
    `stars` {label: (x, y)} on them, named; drawn, saved and shown. The numbers are the stars' and how many points there are."""
    figure, axis = plt.subplots(figsize=(9.5, 7))
    area = 2 + 120 * np.sqrt(np.asarray(size, float))
    axis.scatter(at[:, 0], at[:, 1], s=area, c=[PALETTE[g % 6] for g in group], alpha=0.5, linewidth=0)
    for label, (xs, ys) in stars.items():
        axis.plot(xs, ys, "*", color="black", markersize=9, markerfacecolor="white")
        for x, y in zip(xs, ys, strict=True):
            axis.annotate(label, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axis.set(xticks=[], yticks=[], title=title)
    show(session, name, figure, {"points": len(at), "stars": stars}, interactive)


def ranked(
    session: Session,
    name: str,
    panels: Mapping[str, Sequence[tuple[str, float, bool]]],
    *,
    xlabel: str,
    kinds: tuple[str, str],
    interactive: Interactive | None = None,
) -> None:
    """Bars from the top down, one panel for each title, drawn, saved and shown: (label, value, which of the two `kinds`)."""
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9.5, 0.8 + sum(map(len, panels.values())) * 0.3), squeeze=False
    )
    for axis, (title, bars) in zip(axes[:, 0], panels.items(), strict=True):
        y = np.arange(len(bars))[::-1]
        axis.barh(y, [value for _, value, _ in bars], color=[PALETTE[int(marked)] for *_, marked in bars])
        axis.set_yticks(y, [literal(label) for label, *_ in bars], fontsize=9)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.grid(axis="y", visible=False)
        axis.set_title(title)
    for colour, kind in zip(PALETTE, kinds, strict=False):
        axes[-1, 0].barh([0], [0], color=colour, label=kind)
    axes[-1, 0].legend(loc="upper right", bbox_to_anchor=(1, -0.2), ncols=2)
    axes[-1, 0].set_xlabel(xlabel)
    show(session, name, figure, panels, interactive)


class Node(NamedTuple):
    """A point of `flow`: which column it stands in, how high, what is written beside it, and what a reader who points at it is told."""

    column: int
    height: float
    label: str
    told: str


def flow(
    session: Session,
    name: str,
    columns: Sequence[str],
    nodes: Sequence[Node],
    links: Sequence[tuple[int, int, float]],
    *,
    title: str,
    ylabel: str,
) -> None:
    """Points in columns, and lines (from node, to node, strength from 0 to 1) between them, drawn, saved and shown, with an interactive
    twin."""
    from plotly import graph_objects

    figure, axis = plt.subplots(figsize=(11, 6))
    twin = graph_objects.Figure()
    for start, end, strength in links:
        across, up = [nodes[i].column for i in (start, end)], [nodes[i].height for i in (start, end)]
        axis.plot(across, up, color=PALETTE[1], linewidth=0.5 + 3 * strength, alpha=0.6)
        twin.add_scatter(
            x=across,
            y=up,
            mode="lines",
            line={"width": 0.5 + 4 * strength, "color": PALETTE[1]},
            hoverinfo="skip",
        )
    x, y = [n.column for n in nodes], [n.height for n in nodes]
    axis.plot(x, y, "o", color=PALETTE[0], markersize=5)
    for column in range(len(columns)):
        own = sorted((n for n in nodes if n.column == column), key=lambda n: n.height)
        at = spread([n.height for n in own], (max(y) - min(y)) / 28)
        for node, height in zip(own, at, strict=True):
            box = {"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
            axis.annotate(literal(node.label), (column + 0.03, height), va="center", fontsize=9, bbox=box)
    twin.add_scatter(
        x=x,
        y=y,
        mode="markers",
        text=[n.told for n in nodes],
        hoverinfo="text",
        marker={"size": 9, "color": PALETTE[0]},
    )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(columns)), columns)
    axis.set(ylabel=ylabel, title=title, xlim=(-0.2, len(columns) - 0.3))
    axis.grid(axis="x", visible=False)
    twin.update_layout(title=title, yaxis_title=ylabel, template="simple_white", showlegend=False)
    twin.update_xaxes(tickvals=list(range(len(columns))), ticktext=list(columns))
    show(session, name, figure, {"columns": columns, "nodes": nodes, "links": links}, twin)


def spread(heights: Sequence[float], gap: float) -> np.ndarray:
    """Rising heights moved apart until neighbours are `gap` or more from one another, as little as that takes, so that labels do not
    lie over one another: least squares, by pooling (isotonic regression)."""
    steps = gap * np.arange(len(heights))
    return np.asarray(isotonic_regression(np.asarray(heights, float) - steps).x) + steps


def forest_on(
    axis: Axes,
    rows: Sequence[str],
    series: Series,
    null: Bands | None = None,
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
    many = sum(values is not None for values in series.values())
    offsets = iter(np.linspace(0.28, -0.28, many) if many > 1 else [0.0])
    for (label, values), colour, marker in zip(series.items(), PALETTE * 3, MARKERS * 3, strict=False):
        if values is None:
            continue
        offset = next(offsets)
        v, low, high = np.array([(np.nan,) * 3 if x is None else x for x in values], float).T  # None: not run
        axis.errorbar(
            v, y + offset, xerr=[v - low, high - v], fmt=marker, color=colour, markersize=5, linewidth=1.2, label=label
        )
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(y, rows)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.grid(axis="y", visible=False)


class Seam(TypedDict):
    """What a panel of `at_the_seam` shows: for each name one series (tokens,) a conversation, those of `grey`, the nulls, in grey.

    `null`: for each draw its series, one a conversation; drawn as the band of the middle 95 % of the draws' means. `published`:
    (low, high) before the answer and from it on.
    """

    series: Mapping[str, Sequence[np.ndarray]]
    ylabel: str
    verdict: NotRequired[str]
    grey: NotRequired[Sequence[str]]
    null: NotRequired[Sequence[Sequence[np.ndarray]]]
    null_label: NotRequired[str]
    published: NotRequired[tuple[tuple[float, float], tuple[float, float]]]


def at_the_seam(
    session: Session,
    name: str,
    panels: Mapping[str, Seam],
    starts: Mapping[str, Sequence[int]],
    groups: Sequence[str],
    before: int,
    after: int,
) -> None:
    """Many conversations laid over one another where the answer starts, drawn, saved and shown: {title: what a panel shows}.

    `starts`: where each answer starts, for each name of a series. `groups`: the behaviour of each conversation; a band is the
    95 % interval over behaviours, of means over their conversations.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(max(8.0, 6.0 * len(panels)), 4.6), squeeze=False)
    at, drawn = np.arange(-before, after), {}
    for axis, (title, panel) in zip(axes[0], panels.items(), strict=True):
        if "null" in panel:
            first = next(iter(starts.values()))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a mean of nothing is NaN
                means = [np.nanmean(around(x, first, groups, before, after), 0) for x in panel["null"]]
                low, high = np.nanquantile(means, [0.025, 0.975], axis=0)
            axis.fill_between(at, low, high, color=NULL, alpha=0.35, linewidth=0, label=panel.get("null_label", "null"))
        if "published" in panel:
            for (low, high), where, label in zip(
                panel["published"], (at < 0, at >= 0), ("published", None), strict=True
            ):
                axis.fill_between(at[where], low, high, color=PALETTE[4], alpha=0.3, linewidth=0, label=label)
        colours_left = iter(PALETTE * 3)
        for who, series in panel["series"].items():
            colour = NULL if who in panel.get("grey", ()) else next(colours_left)
            drawn[f"{title} {who}"] = _over_groups(
                axis, around(series, starts[who], groups, before, after), at, who, colour
            )
        axis.axvline(-0.5, color="black", linestyle=":", linewidth=1)
        axis.set(xlabel="tokens from the first of the answer", ylabel=panel["ylabel"])
        axis.set_title(titled(title, panel.get("verdict", "")))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    show(session, name, figure, drawn)


def around(
    series: Sequence[np.ndarray], starts: Sequence[int], groups: Sequence[str], before: int, after: int
) -> np.ndarray:
    """Series (tokens,) laid over one another at their `starts`, those of a group averaged: (groups, before + after), NaN where
    none reaches."""
    table = np.full((len(series), before + after), np.nan)
    for row, values, start in zip(table, series, starts, strict=True):
        first, last = max(start - before, 0), min(start + after, len(values))
        row[first - start + before : last - start + before] = values[first:last]
    names = np.asarray(groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a mean of nothing is NaN
        return np.stack([np.nanmean(table[names == g], 0) for g in dict.fromkeys(groups)])


def _over_groups(axis: Axes, table: np.ndarray, at: np.ndarray, label: str, colour: str) -> np.ndarray:
    """Draw the mean of `table` (groups, offsets) with its 95 % t interval, where two groups in three have a value; returns both."""
    count = np.isfinite(table).sum(0)
    reached = count >= max(3, 2 * len(table) / 3)
    rows, some = np.full((len(at), 3), np.nan), table[:, reached]
    arm = special.stdtrit(count[reached] - 1, 0.975) * np.nanstd(some, 0, ddof=1) / count[reached] ** 0.5
    centre = np.nanmean(some, 0)
    rows[reached] = np.stack([centre, centre - arm, centre + arm], axis=1)
    axis.plot(at, rows[:, 0], color=colour, linewidth=1.4, label=label)
    axis.fill_between(at, rows[:, 1], rows[:, 2], color=colour, alpha=0.18, linewidth=0)
    return rows
