"""The pages: short enough, linked to what is there, and their code made of what the helpers have."""

import ast
import functools
import importlib
import json
import re
from collections import Counter
from itertools import chain
from urllib.parse import unquote

import pytest

from helpers import report
from helpers.session import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS, ROOT / "benchmarks" / "README.md"]
CARDS = [ROOT / "data" / "aligned_pair" / "README.md", *sorted((ROOT / "data" / "behaviors").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def name(path):
    return str(path.relative_to(ROOT))


def written(path):
    """A page without its code, its tables, and what is made between markers."""
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    text = re.sub(r"<!-- (\w+):start -->.*?<!-- \1:end -->", "", text, flags=re.S)
    return "\n".join(line for line in text.split("\n") if not line.startswith("|"))


@functools.cache
def anchors(path):
    """The headings of a page as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "]", h).lower()).replace(" ", "-") for h in headings}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1500


@pytest.mark.parametrize("path", [*PAGES, *CARDS], ids=name)
def test_links_lead_somewhere(path):
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        target, _, anchor = "".join(link).partition("#")
        if re.match(r"\w+:", target):
            continue
        file = (path.parent / unquote(target)).resolve() if target else path
        assert file.exists(), f"{name(path)} links to {target}"
        assert not anchor or anchor in anchors(file), f"{name(path)} links to {target}#{anchor}"


def test_the_readme_leads_to_every_page_and_every_notebook():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = [*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CITATION.cff", *(ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")]
    assert not [p for p in found if f"({name(p)})" not in readme]


def test_no_sentence_stands_in_two_places():
    places = Counter()
    for path in PAGES:
        words = re.sub(r"\s+", " ", written(path))
        places.update({s for s in re.split(r"(?<=[.!?:]) ", words) if len(s.split()) > 6})
    assert not [s for s, n in places.items() if n > 1]


def blocks():
    for path in PAGES:
        for language, code in FENCED.findall(path.read_text(encoding="utf-8")):
            yield path, language, code


def test_code_on_a_page_is_made_of_what_is_there():
    """Names of a page's helpers exist; what each block does was seen by running it."""
    for path in PAGES:
        code = "".join(c for p, language, c in blocks() if p == path and language == "python")
        tree = ast.parse(code)
        imported = {
            a.asname or a.name: importlib.import_module(f"{node.module}.{a.name}")
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "helpers"
            for a in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
                assert hasattr(imported[node.value.id], node.attr), f"{name(path)}: {node.value.id}.{node.attr}"


def test_commands_on_a_page_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M):
            assert re.search(rf"^{target}:", makefile, re.M), f"{name(path)}: make {target}"
        for module in re.findall(r"python -m ((?:helpers|benchmarks|tests)[\w.]*)", text):
            assert ROOT.joinpath(*module.split(".")).with_suffix(".py").exists(), f"{name(path)}: {module}"
        for file in re.findall(r"`((?:docs|helpers|tests|data|notebooks|scripts|benchmarks)/[\w./-]+\w)`", text):
            made = file.startswith("data/cache") or "yours" in file
            assert made or (ROOT / file).exists(), f"{name(path)}: {file}"


def test_claims_named_on_a_page_are_judged():
    results = (ROOT / "data" / "results" / "smollm2").glob("*.json")
    known = {c["id"] for c in chain.from_iterable(json.loads(p.read_text())["claims"] for p in results)}
    assert set(report.TEN) <= known and len(report.TEN) == 10
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]:
        for said in re.findall(r"claims? (\d\d\.\w+(?: and \d\d\.\w+)*)", written(path)):
            assert set(said.split(" and ")) <= known, f"{name(path)}: {said}"
