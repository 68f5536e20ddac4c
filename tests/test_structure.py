"""The arrows between modules: a helper imports only from rows above its own, or to its left."""

import ast
import re

import helpers
from helpers.session import ROOT


def test_imports_follow_the_rows():
    order = [name for row in re.findall(r"row \d   (.*?)  {2,}\S", helpers.__doc__) for name in row.split()]
    modules = {path.stem: path for path in (ROOT / "helpers").glob("*.py") if path.stem != "__init__"}
    assert sorted(order) == sorted(modules)
    for name, path in modules.items():
        used = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "helpers":
                used |= {node.module.split(".")[1]} if "." in node.module else {a.name for a in node.names}
        wrong = [u for u in used if order.index(u) >= order.index(name)]
        assert not wrong, f"{name} imports {wrong}, which stand below it or to its right"


def test_importing_the_package_imports_nothing():
    tree = ast.parse((ROOT / "helpers" / "__init__.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
