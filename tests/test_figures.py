"""Curves laid over one another at an event, and series over words, show the numbers they are given."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from plotly import graph_objects as go

from helpers import figures, session, stats
from helpers.stats import Interval


def test_series_of_different_lengths_are_averaged_at_the_same_distance_from_their_starts():
    series = [np.arange(10.0), np.arange(4.0, 12.0), [0.0, 7.0]]
    table = figures.around(series, [5, 1, 1], ["a", "a", "b"], before=2, after=3)
    # offsets -2..2: series one 3 4 5 6 7, series two - 4 5 6 7, series three - 0 7 - -
    np.testing.assert_equal(table, [[3, 4, 5, 6, 7], [np.nan, 0, 7, np.nan, np.nan]])
    figure, axis = plt.subplots()
    rows = figures._over_groups(axis, np.array([[1.0, 2, np.nan], [2, 2, np.nan], [3, 5, 1]]), np.arange(3), "x", "red")
    assert rows[0] == pytest.approx(stats.over([1.0, 2, 3])) and rows[1, 0] == 3  # no skew, no correction
    assert np.isnan(rows[2]).all() and axis.lines[0].get_label() == "x"
    plt.close(figure)


def test_text_is_shown_letter_by_letter():
    assert figures.literal("a $5 – $6 bill\nnaïve 你") == "a \\$5 – \\$6 bill⏎naïve ?"
    figure, axis = plt.subplots()
    axis.set_xticks(range(3), [figures.literal(x) for x in ("$x", "_{", "$")])
    figure.canvas.draw()  # a formula cut short would raise here
    plt.close(figure)


def test_one_call_draws_saves_and_shows(tmp_path):
    session_like = SimpleNamespace(notebook="99_a", figures=tmp_path)
    x = Interval(1, 0.5, 1.5)
    figures.forest(session_like, "a", ["one", "two"], {"s": [x, None], "t": [x, x]}, title="T", xlabel="x",
                   null=[(0, 1), (0, 2)], pooled={"s": x, "t": x}, marks={"m": 1.0}, judged=("ratio", x), verdict="holds",
                   interactive=go.Figure())  # fmt: skip
    figures.lines(session_like, "b", [1, 2, 4], {"s": [x, x, x], "t": [1.0, 2.0, 3.0]}, title="T", xlabel="x",
                  ylabel="y", null=[(0, 1)] * 3, marks={"m": 1.0}, log=True, log_y=True, grey=["t"])  # fmt: skip
    curves = figures.twin(
        [1, 2, 4], {"s": [x, None, x], "t": [1.0, 2.0, 3.0]}, title="T", xlabel="x", ylabel="y", log=True
    )
    assert json.loads(curves.to_json())["data"][0]["error_y"]["arrayminus"] and len(curves.data) == 2
    figures.scatter(session_like, "c", {"s": ([1, 2], [3, 4])}, curves={"t": ([1, 2], [1, 2])}, title="T",
                    xlabel="x", ylabel="y", log=True, grey=["s"])  # fmt: skip
    figures.histogram(session_like, "d", {"s": [1, 2, 3], "t": [0, 1]}, grey=["t"], title="T", xlabel="x", ylabel="y")
    figures.matrices(session_like, "e", {"p": np.eye(3), "q": np.eye(3)}, ["x", "y", "z"], "T")
    steps = [np.array([1.0, 2, 3, 4])] * 4
    seam = {"series": {"s": steps, "n": steps}, "ylabel": "y", "grey": ["n"], "null": [steps, steps],
            "published": ((0, 1), (2, 3)), "verdict": "fails"}  # fmt: skip
    figures.at_the_seam(session_like, "f", {"T": seam}, {"s": [2] * 4, "n": [2] * 4}, list("abcc"), 2, 2)
    panels = {"one": [("a $x", 3.0, True), ("b", -1.0, False)], "two": [("c", 1.0, False)]}
    figures.ranked(session_like, "g", panels, xlabel="x", kinds=("plain", "marked"), interactive=go.Figure())
    for name in "abcdefg":
        assert (session_like.figures / f"99_{name}.png").stat().st_size > 5000
        assert json.loads((session_like.figures / f"99_{name}.json").read_text())
    assert figures.titled("Is it?", "holds") == "Is it? HOLDS" and figures.titled("Is it?", "") == "Is it?"


def test_rows_have_the_range_of_their_saes_and_the_null_its_pooled_band(monkeypatch):
    shown = {}
    monkeypatch.setattr(
        figures, "show", lambda session, name, figure, numbers, closer=None: shown.update({name: (figure, numbers)})
    )
    table, null = np.array([[1.0, 4], [3, 6]]), np.array([[0.0, 2]] * 20)
    said = dict(title="t", xlabel="x", null_label="noise")
    figures.by_row(None, "two", ["a", "b"], table, Interval(3, 1, 5), null, **said)
    figures.by_row(None, "one", ["a", "b"], table[:1], None, null, **said)
    figure, numbers = shown["two"]
    assert numbers["rows"] == ["a", "b", "all"] and numbers["null"] == [(0, 0), (2, 2), (1, 1)]
    assert numbers["series"] == {"mean and range of 2 SAEs": [(2, 1, 3), (5, 4, 6), (3, 1, 5)]}
    assert list(shown["one"][1]["series"]) == ["one SAE"]
    plt.close(figure)


def test_bars_have_their_labels_and_their_group(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        figures, "show", lambda session, name, figure, numbers, closer=None: shown.update({name: (figure, numbers)})
    )
    groups = {"none": (torch.tensor([True, False, False]), "black"), "some": ([False, True, True], "blue")}
    figures.bars(None, "b", ["a", " $b", "\n"], [0.0, 2.0, 3.0], groups, title="t", ylabel="y")
    figure, numbers = shown["b"]
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["a", r"\$b", "⏎"]
    assert [p.get_height() for p in axis.patches] == [0, 2, 3] and numbers["values"].tolist() == [0, 2, 3]
    assert [len(line.get_xdata()) for line in axis.lines] == [1, 0]  # a tick where a bar has no height
    plt.close(figure)


def test_panels_side_by_side_and_heat_maps_save_what_they_show(monkeypatch, tmp_path):
    monkeypatch.setenv("REPORT_DIR", str(tmp_path))
    s = session.start("00_base")
    one = {"series": {"v": [(1.0, 0.5, 1.5), None]}, "null": [(0.0, 0.2)] * 2, "xlabel": "x", "verdict": "holds"}
    figures.forests(s, "two", ["a", "b"], {"left": one, "right": {"series": {"v": [None, None]}, "xlabel": "y"}})
    saved = json.loads((s.figures / "00_two.json").read_text())
    assert saved["rows"] == ["a", "b"] and saved["panels"]["left"]["series"]["v"] == [[1.0, 0.5, 1.5], None]
    values = np.array([[0.5, -0.25]])
    figures.heat(s, "map", values, ["a"], ["b", "c"], values > 0.3, title="t")
    assert json.loads((s.figures / "00_map.json").read_text())["framed"] == [[True, False]]
    twice = {unit: {"v": [Interval(1, 0, 2)] * 2, "null": [Interval(0, 0, 0)] * 2} for unit in ("nats", "words")}
    figures.beside(s, "doses", [-0.1, 0.1], twice, title="t", xlabel="x", grey=["null"])
    assert json.loads((s.figures / "00_doses.json").read_text())["panels"]["words"]["v"][1] == [1, 0, 2]


def test_a_flow_has_its_points_lines_and_labels_that_do_not_lie_over_one_another(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", lambda bundle, raw: shown.append(bundle))
    session_like = SimpleNamespace(notebook="99_a", figures=tmp_path)
    nodes = [figures.Node(0, 1.0, "a $1", "all of a"), figures.Node(1, 2.0, "b", "b"), figures.Node(1, 2.1, "c", "c")]
    figures.flow(session_like, "f", ["one", "two"], nodes, [(0, 1, 0.5)], title="T", ylabel="y")
    told = json.loads((tmp_path / "99_f.json").read_text())
    assert told["links"] == [[0, 1, 0.5]] and len(told["nodes"]) == 3
    twin = shown[0]["application/vnd.plotly.v1+json"]
    assert len(twin["data"]) == 2 and twin["data"][1]["text"][0] == "all of a"


def test_a_chart_has_its_points_and_stars(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", lambda bundle, raw: shown.append(bundle))
    session_like = SimpleNamespace(notebook="99_a", figures=tmp_path)
    at, stars = np.arange(6.0).reshape(3, 2), {"joy": np.array([[1.0], [2.0]])}
    figures.chart(session_like, "c", at, np.array([0, 7, 3]), [0.1, 0.0, 0.5], stars, title="T")
    assert json.loads((tmp_path / "99_c.json").read_text()) == {"points": 3, "stars": {"joy": [[1.0], [2.0]]}}
    assert "image/png" in shown[0]


def test_heights_are_moved_apart_as_little_as_it_takes():
    assert figures.spread([0.0, 5.0], 1.0).tolist() == [0, 5]
    assert figures.spread([1.0, 1.0, 9.0], 2.0).tolist() == [0, 2, 9]
    assert figures.spread([], 1.0).tolist() == []
