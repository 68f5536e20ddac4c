"""What a run shows: bars told from text, estimates that are never negative, times that add up, a line that fits."""

import io
import json
import re
import sys
import time

import pytest
from tqdm import tqdm

from helpers import progress, store
from helpers.progress import Bars, Expected, Left, Progress


class Stream(io.StringIO):
    """Collects what is written as a kernel does: everything up to a flush is one message."""

    def __init__(self):
        super().__init__()
        self.messages, self.waiting = [], ""

    def write(self, text):
        self.waiting += text

    def flush(self):
        if self.waiting:
            self.messages.append(self.waiting)
        self.waiting = ""


def split(stream):
    stream.flush()
    bars = Bars()
    found = [bars.split(message) for message in stream.messages]
    return "".join(text for text, _ in found), [bar for _, some in found for bar in some]


@pytest.mark.parametrize("leave", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_bars_are_taken_out_and_text_between_them_stays(leave, inner):
    stream = Stream()
    stream.write("before\n")
    for _ in tqdm(range(3), desc="outer", file=stream, leave=leave, disable=False, mininterval=0):
        for _ in tqdm(range(2), desc="inner", file=stream, leave=False, disable=not inner, mininterval=0):
            pass
        stream.write("UserWarning: in between\n  warn(it)\n")
    stream.write("after [at 3 o'clock]\nand\r\nmore")
    text, bars = split(stream)
    said = "UserWarning: in between\n  warn(it)\n"
    assert text.replace("\n\n", "\n") == f"before\n{said * 3}after [at 3 o'clock]\nand\r\nmore"
    assert any(progress.brief(b) == "67% outer" for b in bars)
    assert any(b.startswith("inner") for b in bars) == inner


def test_a_carriage_return_that_is_no_bar_stays():
    assert Bars().split("\rloading 1 of 3\rloading 2 of 3\n") == ("\rloading 1 of 3\rloading 2 of 3\n", [])


@pytest.mark.parametrize(
    "bar,said",
    [
        ("train:  45%|####5     | 12/27 [00:03<00:04,  3.51step/s, dead=0.1]", "45% train"),
        ("harvest 14:   0%|          | 0.00/240k [00:00<?, ?token/s]", "0% harvest 14"),
        ("read: 12it [00:01,  9.5it/s]", "12it read"),
        ("100%|##########| 3/3 [00:00<00:00]", "100%"),
        ("", ""),
    ],
)
def test_a_bar_in_brief(bar, said):
    assert progress.brief(bar) == said


KNOWN = Expected({"one": 10.0, "two": 20.0, "three": 30.0}, "the last time")


def test_what_is_left_counts_from_the_section_and_is_never_negative():
    assert progress.remaining(KNOWN) == (60, False)
    assert progress.remaining(KNOWN, "two", 5, 500) == (45, False)  # the first section took long: that is past
    assert progress.remaining(KNOWN, "two", 25, 40) == (30, True)
    assert progress.remaining(KNOWN, "three", 31, 70) == (0, True)
    assert progress.remaining(KNOWN, "new", 1, 61) == (0, True)
    assert progress.remaining(Expected({"": 50.0}, "the profile says"), "any", 2, 20) == (30, False)
    assert progress.remaining(None) is None


def test_what_is_left_in_words_claims_no_more_than_is_known():
    assert progress.told(None) == "time left unknown"
    assert progress.told(Left(75, False)) == "about 1:15 left"
    assert progress.told(Left(75, True), "the last time") == "more than 1:15 left"
    assert progress.told(Left(0, True), "the last time") == "longer than the last time"
    assert progress.together([None, None]) is None and progress.together([]) is None
    assert progress.together([Left(10, False), Left(5, False)]) == (15, False)
    assert progress.together([Left(10, False), None]) == (10, True)
    assert progress.together([Left(10, False), Left(0, True)]) == (10, True)


def test_the_last_run_tells_more_than_the_profile():
    last = {"01": {"seconds": 3.0, "sections": [{"heading": "a", "seconds": 3.0, "kinds": {}}]}}
    assert progress.expected("01", last, {"01": 9}) == ({"a": 3.0}, "the last time")
    assert progress.expected("02", last, {"02": 9}) == ({"": 9.0}, "the profile says")
    assert progress.expected("03", last, {}) is None


@pytest.mark.parametrize("seconds,said", [(7.9, "0:07"), (750, "12:30"), (3723, "1:02:03")])
def test_clock(seconds, said):
    assert progress.clock(seconds) == said


@pytest.mark.parametrize(
    "kept", ["", "[1]", '{"01": 3}', '{"01": {"seconds": 1}}', '{"01": {"seconds": 1, "sections": [{"heading": "a"}]}}']
)
def test_a_timeline_that_is_damaged_is_left_out(tmp_path, kept):
    path = tmp_path / "timeline.json"
    assert progress.load(path) == {}
    path.write_text(kept)
    assert progress.load(path) == {}
    whole = {"02": {"seconds": 1.0, "sections": [{"heading": "a", "seconds": 1.0, "kinds": {}}]}}
    path.write_text(json.dumps({"01": 3} | whole))
    assert progress.load(path) == whole


def test_kinds_of_work_add_up_to_the_notebook(tmp_path):
    scores = {"scores": {"seconds": 6.0, "count": 3, "cached": 1}}
    sections = [
        {"heading": progress.START, "seconds": 4.0, "kinds": {"load": {"seconds": 1.0, "count": 1, "cached": 0}}},
        {"heading": "a", "seconds": 9.0, "kinds": scores},
        {"heading": "b", "seconds": 7.0, "kinds": scores},
    ]
    found = progress.by_kind({"seconds": 20.0, "sections": sections})
    assert [(k["kind"], k["seconds"]) for k in found] == [
        ("scores", 12.0), ("other", 4.0), (progress.START, 3.0), ("load", 1.0),
    ]  # fmt: skip
    assert (found[0]["count"], found[0]["cached"]) == (6, 2) and sum(k["seconds"] for k in found) == 20.0


@pytest.fixture
def run(tmp_path):
    changes = []
    run = Progress(["01_one", "02_two"], {"01_one": KNOWN, "02_two": None}, {}, lambda: changes.append(1))
    run.changes, run.file = changes, tmp_path / "spent.jsonl"
    return run


def test_a_log_gets_a_line_a_section_and_the_times_are_kept(run, capsys):
    with run:
        run.begin("01_one", run.file)
        run.file.write_text('{"kind": "load", "seconds": 0.001, "cached": false}\n{"kind": "cut')
        run.section("one")
        run.section("two")
        run.end("ran")
        assert run.state == {"01_one": "ran", "02_two": "waiting"} and run.going
    said = capsys.readouterr().out
    assert re.findall(r"^ +\d+\.\d s  (.*)$", said, re.M) == [progress.START, "one", "two"]
    opening = r"01_one \(1 of 2\), about (0:59|1:00) left; of all, more than (0:59|1:00) left\n"
    assert re.match(opening, said) and said.endswith("01_one ran in 0 s\n")
    assert "\r" not in said and len(run.changes) == 3
    kinds = [s["kinds"] for s in run.timeline["01_one"]["sections"]]
    assert kinds == [{"load": {"seconds": 0.001, "count": 1, "cached": 0}}, {}, {}]


def test_a_long_section_shows_life_in_a_log(run, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LIFE", 0.0)
    with run:
        run.begin("01_one", run.file)
        run.bar = "train:  45%|####5     | 12/27 [00:03<00:04]"
        run._show()
    assert "kernel and imports, 45% train, 0:00 so far" in capsys.readouterr().out


def test_a_run_that_breaks_off_says_so(run):
    with pytest.raises(KeyboardInterrupt), run:
        run.begin("01_one", run.file)
        raise KeyboardInterrupt
    assert run.state == {"01_one": "stopped", "02_two": "not run"} and not run.going and len(run.changes) == 2


def test_the_live_line_fits_and_ticks_though_nothing_is_told(run, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    file, run = run.file, Progress(["01_one", "02_two"], run.known, {}, lambda: None)
    run.begin("01_one", file)
    run.section("A rather long heading of a section that says what it is about, and more")
    run.cells, run.bar = (4, 15), "log p:  45%|####5     | 12/27 [00:03<00:04]"
    full = run.line(300)
    assert full.startswith("01_one (1/2), cell 5/15 · A rather long heading") and "· 45% log p ·" in full
    assert re.search(r"· 0:00 ~(0:59|1:00) left · all 0:00 >(0:59|1:00)$", full)  # the second is not known
    for width in range(10, 200, 10):
        assert len(run.line(width)) <= width
    assert re.match(r"01 \(1/2\), cell 5/15 · A rather \w+.* · 45%.* · 0:00 ~", run.line(80))
    monkeypatch.setattr(run._over, "wait", ticks(2))
    run._tick()
    run.end("ran")
    said = capsys.readouterr().out
    assert said.count("\r01 (1/2), cell 5/15 ·") == 2 and said.endswith("\r01_one ran in 0 s\n")


def ticks(n):
    left = iter([False] * n + [True])
    return lambda seconds: next(left)


def test_steps_inside_steps_are_not_counted_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("SPENT_FILE", str(tmp_path / "spent.jsonl"))

    @store.spent("inner")
    def inner():
        time.sleep(0.05)
        store.from_cache()

    began = time.perf_counter()
    with store.spent("outer"):
        time.sleep(0.02)
        inner()
        inner()
    whole = time.perf_counter() - began
    lines = [json.loads(line) for line in (tmp_path / "spent.jsonl").read_text().splitlines()]
    assert [(x["kind"], x["cached"]) for x in lines] == [("inner", True), ("inner", True), ("outer", False)]
    assert sum(x["seconds"] for x in lines) == pytest.approx(whole, abs=0.01) and lines[2]["seconds"] < 0.05


def test_a_step_that_fails_is_told_and_without_a_file_nothing_is(tmp_path, monkeypatch):
    for file in ("", str(tmp_path / "none" / "spent.jsonl")):
        monkeypatch.setenv("SPENT_FILE", file)
        with pytest.raises(ZeroDivisionError), store.spent("a"):
            raise ZeroDivisionError
    monkeypatch.setenv("SPENT_FILE", str(tmp_path / "spent.jsonl"))
    with pytest.raises(ZeroDivisionError), store.spent("a"):
        raise ZeroDivisionError
    assert json.loads((tmp_path / "spent.jsonl").read_text())["kind"] == "a"
    assert not (tmp_path / "none").exists()


def test_the_cache_tells_kind_and_whether_it_was_there(cache, tmp_path, monkeypatch):
    import torch

    monkeypatch.setenv("SPENT_FILE", str(tmp_path / "spent.jsonl"))
    for _ in range(2):
        store.cached("scores", {"a": 1}, lambda: {"x": torch.zeros(1)})
    lines = [json.loads(line) for line in (tmp_path / "spent.jsonl").read_text().splitlines()]
    assert [(x["kind"], x["cached"]) for x in lines] == [("scores", False), ("scores", True)]
