"""The arrows between modules: a helper imports only from rows above its own, or to its left."""

import ast
import re

import helpers
from helpers.session import ROOT


def test_imports_follow_the_rows():
    order = [name for row in re.findall(r"row \d   (.*?)  {2,}\S", helpers.__doc__) for name in row.split()]
    room = ROOT / "helpers"
    modules = {
        ".".join(path.relative_to(room).with_suffix("").parts): path
        for path in room.rglob("*.py")
        if path.stem != "__init__"
    }
    assert sorted(order) == sorted(modules)
    for name, path in modules.items():
        used = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "helpers":
                place = node.module.removeprefix("helpers").lstrip(".")
                used |= {place} if place in modules else {f"{place}.{a.name}".lstrip(".") for a in node.names}
        wrong = [u for u in used if order.index(u) >= order.index(name)]
        assert not wrong, f"{name} imports {wrong}, which stand below it or to its right"


def test_importing_the_packages_imports_nothing():
    for path in (ROOT / "helpers").rglob("__init__.py"):
        assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]


def test_three_modules_run_a_model_and_no_others():
    runs = re.compile(r"(?<!\w)weights\(|(?<!replies)\.generate\(|original_model\(")
    found = {p.stem for p in (ROOT / "helpers").rglob("*.py") if runs.search(re.sub(r"def \w+\(", "", p.read_text()))}
    assert found == {"reading", "scoring", "replies"}
