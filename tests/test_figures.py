"""Curves laid over one another at an event, and series over words, show the numbers they are given."""

import json

import numpy as np
import pytest
from matplotlib import pyplot as plt

from helpers import figures, session


def test_series_of_different_lengths_are_averaged_at_the_same_distance_from_their_starts():
    figure, axis = plt.subplots()
    series = [np.arange(10.0), np.arange(4.0, 12.0), [0.0, 7.0]]
    mean = figures.around(axis, series, [5, 1, 1], before=2, after=3, least=2, label="x")
    # offsets -2..2: series one 3 4 5 6 7, series two - 4 5 6 7, series three - 0 7 - -
    assert mean == pytest.approx([8 / 3, 17 / 3, 6, 7])
    low, high = (f(p.vertices[:, 1]) for p in axis.collections[0].get_paths() for f in (min, max))
    spread = 1.96 * np.std([3.0 + 1, 4, 0]) / np.sqrt(3)  # at offset -1 the three series are 4, 4 and 0
    assert low == pytest.approx(8 / 3 - spread) and high >= 7
    assert axis.lines[0].get_xdata().tolist() == [-1, 0, 1, 2] and axis.lines[0].get_label() == "x"
    plt.close(figure)


def test_words_stand_under_their_values_and_the_answer_is_marked():
    figure = figures.over_words(
        [" one", "\n", "two"],
        {"a": {"v": [1, 2, 3]}, "b": {"v": [3, 2, 1], "null": [0, 0, 0]}},
        2,
        "t",
        {"v": "red", "null": "grey"},
    )
    axes = figure.axes
    assert [t.get_text() for t in axes[-1].get_xticklabels()] == ["one", "⏎", "two"]
    assert axes[0].lines[-1].get_xdata()[0] == 1.5 and axes[1].lines[1].get_color() != axes[1].lines[0].get_color()
    plt.close(figure)


def test_text_is_shown_letter_by_letter():
    assert figures.literal("a $5 – $6 bill\nnaïve 你") == "a \\$5 – \\$6 bill⏎naïve ?"
    figure = figures.over_words(["$x", "_{", "$"], {"a": {"v": [1, 2, 3]}}, 1, "t", {"v": "red"})
    figure.canvas.draw()  # a formula cut short would raise here
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
