"""The report refuses, survives failures, and leaves nothing half-written; the committed notebooks are clean."""

import ast
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout, suppress

import nbformat
import papermill
import pytest
from conftest import HARVEST, a_profile
from nbformat import v4

from helpers import report
from helpers.progress import END, START
from helpers.session import ROOT

COMMITTED = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--only", "42"], "no notebook 42; there are 00_base"),
        (["--only", "00", "-p", "n_itens=3"], "00_base has no parameter n_itens; it has .*n_items"),
        (["--only", "00", "-p", "n_items"], "written -p name=value"),
        (["--profile", "nope"], "no profile 'nope'"),
        (["--only", ","], "--only ',' names no notebook; there are 00_base"),
        (["--only", " , "], "names no notebook"),
        (["--only", "00", "-p", "fast='false'"], "fast='false' given; it must be True or False"),
        (["--only", "00", "-p", "fast=maybe"], "fast='maybe' given"),
        (["--commit", "--fast"], "--commit takes a run of the default profile on default parameters"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_at_once(arguments, message, capsys):
    assert report.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_settings_that_cannot_be_met_are_refused_before_anything_runs(monkeypatch, tmp_path, capsys):
    for name, value, said in (
        ("DEVICE", "gpu", "device 'gpu' given"),
        ("DTYPE", "half", "dtype 'half' given"),
        ("CACHE_DIR", "$NOT_SET_1/x", "NOT_SET_1, which is not set"),
    ):
        monkeypatch.setenv(name, value)
        assert report.main(["--only", "00", "--fast", "--out", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
        monkeypatch.setenv(name, "")


def test_an_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/deeper"):
        assert report.main(["--only", "00", "--out", str(tmp_path / out)]) == 2
        assert "is no folder that can be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def notebook(folder, name, *cells, parameters="fast = False\nprofile = ''"):
    made = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    made.cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *((v4.new_markdown_cell if c.startswith("#") else v4.new_code_cell)(c) for c in cells),
    ]
    nbformat.write(made, folder / f"{name}.ipynb")


GOOD = """
from helpers import claims, session, stats
ledger = claims.Ledger(session.start("01_good", fast=fast))
said = dict(source="here", unit="nats", over="behaviours", null="none")
ledger.state("01.9", "it is there beside", claims.at_least(0.0), main=False, **said)
ledger.state("01.1", "it <b>works</b>", claims.at_least(0.0), **said)
ledger.state("01.2", "it works on a hub model", claims.at_least(0.0), **said)
ledger.judge("01.9", stats.Interval(1, 0.5, 2), 0.0)
ledger.judge("01.1", stats.Interval(1, 0.5, 2), [0.0] * 99)
ledger.not_run("01.2", "no <i>network</i>")
ledger.save("A summary in words.", {})
"""


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    stand_in(monkeypatch, folder)
    return folder


def stand_in(monkeypatch, folder):
    """The report of the notebooks in `folder`: no model to fetch, and a cache of its own."""
    monkeypatch.setattr(report, "NOTEBOOKS", folder)
    monkeypatch.setattr(report.text, "WHEELS", {})
    monkeypatch.setenv("CACHE_DIR", str(folder.parent / "cache"))
    monkeypatch.setenv("REPORT_DIR", "")


def test_a_profile_runs_the_notebooks_it_lists_and_none_that_compares_two_models_where_it_has_one(workshop, capsys):
    for name, needs in (("00_base", None), ("05_map", "pair"), ("08_down", "above")):
        notebook(workshop, name, GOOD)
        made = nbformat.read(workshop / f"{name}.ipynb", 4)
        if needs:
            made.metadata["needs"] = needs
        nbformat.write(made, workshop / f"{name}.ipynb")
    paths = report.notebooks()

    def stems(**profile):
        return [p.stem for p in report.fitting(paths, a_profile(sae=registered, **profile))]

    registered = {"harvest": HARVEST, "release": "r", "id": "a"}
    above = {"tokens": 50, "held_out": 5, "ids": {3: "b"}}
    found = report.fitting(paths, a_profile(sae={**registered, "above": above}))
    assert [p.stem for p in found] == ["00_base", "08_down"]
    assert stems(base="b") == stems(pair={"base": "b", "chat": "c"}) == ["00_base", "05_map"]
    assert "08_down: left out, profile p names no SAEs" in capsys.readouterr().out
    assert stems(base=None) == ["00_base"] and "05_map: left out" in capsys.readouterr().out
    assert stems(base="b", notebooks=(5,)) == ["05_map"] and "lists notebooks 05" in capsys.readouterr().out
    assert report.strip(nbformat.read(paths[1], 4)).metadata["needs"] == "pair"  # survives a report


def test_a_profile_given_as_a_parameter_decides_the_folder(tmp_path):
    for words in (["-p", "profile=gemma-2b"], ["--profile", "gemma-2b"]):
        asked = report._asked(report._options([*words, "--only", "05", "--out", str(tmp_path)]))
        assert asked.name == asked.profile.name == "gemma-2b"  # names the report's folder and heading
        assert asked.given == {"profile": "gemma-2b"}


def test_a_failing_notebook_is_shown_as_failed_and_the_rest_go_on(workshop, tmp_path, capsys):
    notebook(workshop, "00_bad", "secret = 'hf_' + 'a' * 30\nraise RuntimeError('planted ' + secret)")
    notebook(workshop, "01_good", GOOD)
    out = tmp_path / "out"
    assert report.main(["--fast", "--out", str(out)]) == 1
    page = (out / "index.html").read_text()
    assert (
        "failed" in page
        and "planted" in page
        and "it &lt;b&gt;works&lt;/b&gt;" in page
        and "A summary in words." in page
    )
    assert (out / "01_good.html").exists() and json.loads((out / "runs.json").read_text())["00_bad"][
        "status"
    ] == "failed"
    for path in out.rglob("*"):
        assert not path.is_file() or "hf_" + "a" * 30 not in path.read_text(errors="ignore")
    ran = nbformat.read(out / "01_good.ipynb", 4)
    assert "papermill" not in ran.metadata and not any({"papermill", "execution"} & set(c.metadata) for c in ran.cells)
    assert "failed: 00_bad" in capsys.readouterr().err


def test_results_of_an_older_version_do_not_break_the_index(workshop, tmp_path):
    for name in ("00_old", "01_good"):
        notebook(workshop, name, GOOD)
    out = tmp_path / "out"
    (out / "results").mkdir(parents=True)
    old = {"summary": "Then.", "claims": [{"id": "00.1", "value": 1.0, "null": 0.0}]}
    (out / "results" / "00_old.json").write_text(json.dumps(old))
    (out / "runs.json").write_text('{"00_old": {"status": "ran", "seconds": 1.0, "error": ""}}')
    assert report.main(["--out", str(out), "--only", "01"]) == 0
    page = (out / "index.html").read_text()
    assert "A summary in words." in page and "of an older version; run it again" in page and "Then." not in page


def test_main_claims_come_before_what_was_also_measured_and_what_was_not_run_says_why(workshop, tmp_path):
    notebook(workshop, "01_good", GOOD)
    assert report.main(["--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    order = ["<h2>What the last study says", "<h3>How sure", "<h2>Studies", "<h2>Claims", 'class="beside"']
    assert [page.index(x) for x in order] == sorted(page.index(x) for x in order)
    sure, table = page.split("<h2>Studies")[0], page.split("<h2>Claims")[1]
    assert ">01.1</a>" in sure and ">01.2</a>" in sure and ">01.9</a>" not in sure and "A summary in words." in sure
    assert (
        table.index(">01.1</a>") < table.index(">01.2</a>") < table.index('class="beside"') < table.index(">01.9</a>")
    )
    assert "1 [0.5, 2] nats" in table and "0 (p = 0.01)" in table
    assert "no &lt;i&gt;network&lt;/i&gt;" in table and '<strong class="verdict not-run">' in table


WHOSE = """
import sys, helpers.session
print("python", sys.executable, "helpers", helpers.session.__file__, "name")
"""


def test_the_kernel_is_this_python_with_this_checkout_first(workshop, tmp_path, monkeypatch):
    notebook(workshop, "01_whose", WHOSE)
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    other = {"argv": ["/bin/false", "{connection_file}"], "display_name": "other", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(other))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    for folder in (workshop, tmp_path / "first"):  # the kernel's working folder, and one on the import path
        (folder / "helpers").mkdir(parents=True)
        (folder / "helpers" / "__init__.py").write_text("")
        (folder / "helpers" / "session.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "first"))
    out = tmp_path / "out"
    assert report.main(["--out", str(out)]) == 0
    said = nbformat.read(out / "01_whose.ipynb", 4).cells[1].outputs[0]["text"]
    assert f"python {sys.executable} helpers {ROOT / 'helpers' / 'session.py'} name" in said


def test_the_page_begins_with_the_answer_where_its_study_has_run(workshop, tmp_path, monkeypatch):
    notebook(workshop, "01_good", GOOD)
    monkeypatch.setattr(report, "ANSWER", "01_good")
    assert report.main(["--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<h2>The answer</h2>" in page and "last study" not in page


@pytest.mark.parametrize("kept", ['{"01_good": {"stat', "", "[1]", '{"01_good": 3, "02_x": {}}'])
def test_a_record_cut_short_is_made_anew(workshop, tmp_path, kept, capsys):
    notebook(workshop, "01_good", "print(1)")
    out = tmp_path / "out"
    (out / "results").mkdir(parents=True)
    (out / "results" / "01_good.json").write_text('{"cla')
    (out / "runs.json").write_text(kept)
    assert report.main(["--out", str(out)]) == 0
    assert json.loads((out / "runs.json").read_text())["01_good"]["status"] == "ran"
    assert "its file of results is missing, cut short" in (out / "index.html").read_text()


def test_a_placeholder_or_an_odd_token_breaks_no_report_and_does_not_leak(workshop, tmp_path, monkeypatch):
    notebook(
        workshop, "01_odd", "import os\nprint(1, 'ab', os.environ.get('HF_TOKEN'))\n[os.environ.get('HF_TOKEN'), '\\'']"
    )
    out = tmp_path / "out"
    for token in ("1", "ab", "null", "zq\"ken'with\\zqodd<marks>"):
        monkeypatch.setenv("HF_TOKEN", token)
        assert report.main(["--out", str(out)]) == 0
        raw = (out / "01_odd.ipynb").read_text() + (out / "01_odd.html").read_text()
        assert "zqodd" not in raw and 'zq"ken' not in raw
        assert "1 ab " in nbformat.read(out / "01_odd.ipynb", 4).cells[1].outputs[0]["text"]


def test_a_dead_kernel_is_a_failure_like_another(workshop, tmp_path):
    notebook(workshop, "00_dead", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    notebook(workshop, "01_good", GOOD)
    out = tmp_path / "out"
    assert report.main(["--out", str(out)]) == 1
    runs = json.loads((out / "runs.json").read_text())
    assert (
        runs["00_dead"]["status"] == "failed"
        and "DeadKernel" in runs["00_dead"]["error"]
        and runs["01_good"]["status"] == "ran"
    )


def test_commit_refreshes_what_is_committed_and_nothing_else(workshop, tmp_path, monkeypatch):
    notebook(workshop, "01_good", GOOD)
    kept = {"results": tmp_path / "r", "figures": tmp_path / "f"}
    kept["figures"].mkdir()
    for name in ("01_stale.png", "02_other.png"):
        (kept["figures"] / name).write_bytes(b"")
    (tmp_path / "README.md").write_text("before\n<!-- claims:start -->\na stale row\n<!-- claims:end -->\nafter\n")
    monkeypatch.setattr(report, "COMMITTED", kept)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "TEN", ("01.2", "01.1", "09.9"))  # in this order; what is not there is left out
    assert report.main(["--commit", "--out", str(tmp_path / "out")]) == 0
    assert [p.name for p in kept["figures"].iterdir()] == ["02_other.png"] and (
        kept["results"] / "01_good.json"
    ).exists()
    readme = (tmp_path / "README.md").read_text()
    assert readme.index("**01.2**") < readme.index("**01.1**") and "**01.9**" not in readme
    assert "a stale row" not in readme and readme.startswith("before") and readme.endswith("after\n")
    page = (tmp_path / "docs" / "claims.md").read_text()
    assert page.index("**01.1**") < page.index("**01.2**") < page.index("**01.9**") and page.count("holds if") == 3
    ran = nbformat.read(workshop / "01_good.ipynb", 4)
    assert ran.cells[1].execution_count == 2 and not any("injected" in str(c.metadata) for c in ran.cells)


def test_widgets_are_dropped_and_plotly_keeps_its_picture(tmp_path, monkeypatch, capsys):
    output = nbformat.v4.new_output(
        "display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"}
    )
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[output])])
    assert report.strip(made).cells[0].outputs == []
    import plotly.express as px
    from matplotlib import pyplot as plt

    from helpers import figures, session

    monkeypatch.setenv("REPORT_DIR", str(tmp_path))
    shown = []
    monkeypatch.setattr(figures, "display", lambda bundle, raw: shown.append(bundle))
    s = session.start("01_good")
    figures.show(s, "x", plt.figure(), {"n": float("nan"), "m": [1.23456789]}, interactive=px.scatter(x=[1], y=[2]))
    assert {"image/png", "application/vnd.plotly.v1+json"} < set(shown[0]) and "text/html" not in shown[0]
    assert json.loads((tmp_path / "figures" / "01_x.json").read_text()) == {"n": None, "m": [1.23457]}


def test_the_next_kernel_waits_with_its_imports_done_and_none_outlives_the_run(workshop, tmp_path, monkeypatch):
    told = "import os, sys\nprint(os.getpid(), 'torch' in sys.modules and 'helpers' not in sys.modules, os.environ['SPENT_FILE'])"
    for name in ("01_one", "02_two", "03_three"):
        notebook(workshop, name, told, "## A heading", *["## Another"] * (name == "01_one"))
    out = tmp_path / "out"
    assert report.main(["--out", str(out)]) == 0
    said = [nbformat.read(p, 4).cells[1].outputs[0]["text"].split() for p in sorted(out.glob("*.ipynb"))]
    assert [x[1] for x in said] == ["False", "True", "True"] and len({x[2] for x in said}) == 3
    assert not any(alive(int(x[0])) for x in said)
    pids = []
    with report.Kernels(3) as kernels:
        report.run_sync(kernels.prepare)(), report.run_sync(kernels.prepare)()  # one is enough
        first = kernels.take()
        report.run_sync(kernels.prepare)()
        pids = [one.manager.provisioner.pid for one in kernels.waiting]
        os.kill(pids[0], signal.SIGKILL)  # for want of memory, say
        until = time.monotonic() + 20
        while alive(pids[0]) and time.monotonic() < until:
            time.sleep(0.05)
        second = kernels.take()
        report.run_sync(kernels.prepare)()
        pids += [one.manager.provisioner.pid for one in (first, second, *kernels.waiting)]
        assert len(pids) == 4 and all(map(alive, pids[1:]))
        for one in (first, second):
            report.run_sync(one.manager.shutdown_kernel)(now=True)
    assert not any(map(alive, pids))


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_keeps_what_is_finished_and_nothing_half_written(workshop, tmp_path, monkeypatch):
    notebook(workshop, "00_good", GOOD)
    notebook(workshop, "01_good", GOOD)
    real, calls = report.execute, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(report, "execute", interrupted)
    out = tmp_path / "out"
    assert report.main(["--out", str(out)]) == 130
    assert list(json.loads((out / "runs.json").read_text())) == ["00_good"]
    assert not (out / "01_good.ipynb").exists() and not list(out.rglob(".tmp-*"))
    page = (out / "index.html").read_text()
    assert "This run was stopped" in page and "http-equiv=refresh" not in page and "01_good<td>not run" in page


ALONE = """
import sys
from pathlib import Path
from helpers import report
report.NOTEBOOKS, report.text.WHEELS = Path({folder!r}), {{}}
sys.exit(report.main(["--out", {out!r}]))
"""


def test_ctrl_c_in_the_middle_of_a_cell_ends_it_without_a_traceback(workshop, tmp_path):
    notebook(workshop, "01_long", "## A long one", "import time\nwhile True:\n    time.sleep(60)")
    out = tmp_path / "out"
    code = ALONE.format(folder=str(workshop), out=str(out))
    running = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's & ignores it
    )  # fmt: skip
    page, until = out / "index.html", time.monotonic() + 120
    while not (page.exists() and "A long one, since" in page.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(0.5)
    os.killpg(running.pid, signal.SIGINT)
    said, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in said + errors and "stopped; finished" in errors
    assert "This run was stopped" in page.read_text() and "http-equiv=refresh" not in page.read_text()
    assert sorted(p.name for p in out.iterdir()) == ["index.html"]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("rows,columns", [(0, 0), (24, 20), (50, 200)])
def test_a_terminal_of_any_size_shows_the_bar_and_the_notebook_does_not(workshop, tmp_path, rows, columns):
    import pty
    import termios

    loop = "import time\nfrom tqdm import tqdm\nfor _ in tqdm(range(5), desc='wait'):\n    time.sleep(0.6)"
    notebook(workshop, "01_bar", "## One", loop)
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (rows, columns))
    code = ALONE.format(folder=str(workshop), out=str(tmp_path / "out"))
    own = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    running = subprocess.Popen(  # a kernel's warnings would stand behind a bar
        [sys.executable, "-c", code], cwd=ROOT, stdout=slave, stderr=subprocess.DEVNULL, env=own
    )
    os.close(slave)
    said = b""
    with suppress(OSError):  # the other end is closed
        while piece := os.read(master, 4096):
            said += piece
    os.close(master)
    assert running.wait(60) == 0
    lines = re.findall("\r([^\r]+)", said.decode())
    if columns == 20:
        bars = [line for line in lines if "(1/1)" in line]
        assert bars and all(len(line) < 20 for line in bars), bars
    else:
        assert any(re.search(r"· \d+% wait ·", line) for line in lines)
    assert not [o for c in nbformat.read(tmp_path / "out" / "01_bar.ipynb", 4).cells for o in c.get("outputs", [])]


WATCHED = """
import os, shutil, sys, time
from pathlib import Path
from helpers import store
from tqdm import tqdm
from tqdm.auto import tqdm as automatic
out = Path(os.environ["REPORT_DIR"])
shutil.copy(out / "index.html", out / "seen.html")
print("one")
with store.spent("outer"):
    for i in tqdm(range(3), desc="count", mininterval=0):
        with store.spent("inner"):
            time.sleep(0.1)
            store.from_cache()
        for j in automatic(range(2), desc="deep", leave=False, mininterval=0):
            pass
        print("a real warning", file=sys.stderr)
print("two")
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """What a report of two notebooks leaves and says: its folder, its log, the bars it was told of, its cache."""
    folder, bars = tmp_path_factory.mktemp("watched") / "notebooks", []
    folder.mkdir()
    notebook(folder, "01_watched", "# Title", "1", "## First *one*\nwords", WATCHED, "## Last")
    notebook(folder, "02_next", "1")

    class Told(report.Progress):
        def __setattr__(self, name, value):
            if name == "bar" and value:
                bars.append(value)
            super().__setattr__(name, value)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as log:
        stand_in(patch, folder)
        patch.setattr(report, "Progress", Told)
        assert report.main(["--out", str(folder.parent / "out")]) == 0
    return folder.parent / "out", log.getvalue(), bars, folder.parent / "cache"


def test_bars_reach_the_progress_and_not_the_notebook(watched):
    out, _, bars, _ = watched
    assert any(b.startswith("count: 100%") for b in bars) and any(b.startswith("deep") for b in bars)
    raw = (out / "01_watched.ipynb").read_text()
    assert "%|" not in raw and "\\r" not in raw and "widget" not in raw
    outputs = nbformat.read(out / "01_watched.ipynb", 4).cells[4].outputs
    assert [(o.name, o.text) for o in outputs] == [
        ("stdout", "one\n"),
        ("stderr", "a real warning\n" * 3),
        ("stdout", "two\n"),
    ]


def test_a_log_without_a_terminal_says_each_section(watched):
    out, log, _, _ = watched
    page = str(out / "index.html")
    assert log.index(page) < log.index("01_watched (1 of 2)") < log.index("01_watched ran in") < log.rindex(page)
    headings = re.findall(r"^ +\d+\.\d s  (.*)$", log, re.M)
    assert headings == [START, "First one", "Last", END, START, END] and "\r" not in log
    assert "2 notebooks, time left unknown" in log and re.search(r"^2 notebooks in 0:\d\d$", log, re.M)


def test_the_page_is_there_from_the_first_and_follows_the_run(watched):
    out = watched[0]
    seen, last = (out / "seen.html").read_text(), (out / "index.html").read_text()
    assert "http-equiv=refresh" in seen and "http-equiv=refresh" not in last
    assert "01_watched<td>running<td>First one, since" in seen and "02_next<td>waiting" in seen
    assert "<b>Running</b>" in seen and "<b>Running</b>" not in last and "stopped" not in last


def test_the_timeline_adds_up_and_counts_nothing_twice(watched):
    out, _, _, cache = watched
    timeline = json.loads((out / "timeline.json").read_text())
    times = timeline["01_watched"]
    assert times["seconds"] == pytest.approx(sum(s["seconds"] for s in times["sections"]), abs=0.01)
    first = times["sections"][1]
    assert first["heading"] == "First one" and set(first["kinds"]) == {"outer", "inner"}
    inner, outer = first["kinds"]["inner"], first["kinds"]["outer"]
    assert (inner["count"], inner["cached"], outer["count"], outer["cached"]) == (3, 3, 1, 0)
    assert 0.3 <= inner["seconds"] < first["seconds"] and outer["seconds"] < 0.3
    page = (out / "index.html").read_text()
    assert "<details><summary>01_watched" in page and "<td>inner<td" in page and f"{START} " in page
    assert [json.loads(p.read_text()) for p in cache.rglob("timelines/smollm2.json")] == [timeline]
    assert "SPENT_FILE" not in os.environ


def test_text_that_the_kernel_cut_in_pieces_is_one_again():
    kinds = [("stdout", "a"), ("stdout", "b"), ("stderr", "c"), ("stdout", "d")]
    outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in kinds]
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=outputs)])
    assert [o.text for o in report.strip(made).cells[0].outputs] == ["ab", "c", "d"]


def cells(path):
    return nbformat.read(path, 4).cells


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_committed_notebooks_are_clean(path):
    raw, code = path.read_text(), [c for c in cells(path) if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert "injected-parameters" not in cell.metadata.get("tags", [])
        for output in cell.outputs:
            assert output.output_type != "error"
            data = output.get("data", {})
            assert not any("widget" in kind for kind in data)
            assert "application/vnd.plotly.v1+json" not in data or "image/png" in data
    assert sum("parameters" in c.metadata.get("tags", []) for c in code) == 1
    assert not re.search(
        r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,}|/(home|root|Users|tmp|work)/|site-packages|\d+%\|", raw
    )
    run = longest = 0
    for cell in cells(path):
        words = cell.cell_type != "code" or any("text/markdown" in o.get("data", {}) for o in cell.outputs)
        run = 0 if words else run + 1
        longest = max(longest, run)
    assert longest <= 4, "more than four code cells without a word, of text or of what they show, between them"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_committed_results_and_figures_belong_to_the_notebooks(path):
    result = json.loads((ROOT / "data" / "results" / "smollm2" / f"{path.stem}.json").read_text())
    shown = "".join(
        str(o.get("data", {}).get("text/markdown", "")) for c in cells(path) if c.cell_type == "code" for o in c.outputs
    )
    declared = papermill.inspect_notebook(str(path))
    for name, value in result["parameters"].items():
        default = json.loads(json.dumps(ast.literal_eval(declared[name]["default"])))  # a tuple is a list there
        assert value == default, f"{path.stem}: committed from a run with another {name}"
    for claim in result["claims"]:
        assert f"**{claim['id']}**" in shown
        if claim["value"] is not None:
            assert f"{claim['value']:.3g} [{claim['low']:.3g}, {claim['high']:.3g}]" in shown
    pictures = list((ROOT / "figures" / "smollm2").glob(f"{path.stem[:2]}_*.png"))
    assert pictures and all(p.with_suffix(".json").exists() for p in pictures)


def test_the_readme_and_the_page_of_claims_are_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    assert report.with_parts(readme) == readme and report.claims_page() == (ROOT / "docs" / "claims.md").read_text()
    assert all(readme.count(f"<!-- {part}:{end} -->") == 1 for part in report.PARTS for end in ("start", "end"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_a_notebook_opens_with_its_question_and_its_answer(path):
    title, question, answer = report.opening(path.stem)
    assert title.startswith(path.stem[:2]) and question.endswith("?") and 15 <= len(answer.split()) <= 60


def test_make_is_the_whole_interface():
    assert shutil.which("make")
    text = (ROOT / "Makefile").read_text()
    for target in ("help", "report", "test", "test-fast", "lab"):
        assert re.search(rf"^{target}:", text, re.M)
    steps = re.sub(r"\$\(PIP\) --upgrade pip\n\t@", "", text)
    assert len(re.findall(r'@echo "installing .*\n\t@\$\(PIP\)', steps)) == steps.count("@$(PIP)") == 6
    assert "make test" in (ROOT / ".ci" / "run").read_text()
