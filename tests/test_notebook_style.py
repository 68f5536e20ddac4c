"""What a notebook may hold: short cells, a ledger, and functions that take what they need as arguments."""

import ast
import builtins
import json
import statistics
import symtable

import pytest

from helpers.session import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
LONGEST, MEDIAN = 20, 8  # lines of a code cell
PARAMETERS = 24  # of the cell of parameters


def code(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def read_from_outside(tables):
    """(function, name) for every name that a function or lambda of these symbol tables takes from the notebook."""
    for table in tables:
        if table.get_type() == "function" and table.get_name() not in ("genexpr", "listcomp", "dictcomp", "setcomp"):
            yield from ((table.get_name(), s.get_name()) for s in table.get_symbols() if s.is_global())
        yield from read_from_outside(table.get_children())


def imported_or_defined(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((a.asname or a.name).split(".")[0] for a in node.names)
        if isinstance(node, ast.FunctionDef):
            yield node.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_code_cells_are_short(path):
    parameters, lengths = [], []
    for cell in code(path):
        (parameters if cell.startswith("profile = ") else lengths).append(len(cell.splitlines()))
    assert max(lengths) <= LONGEST and statistics.median(lengths) <= MEDIAN and max(parameters) <= PARAMETERS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_words_stand_after_every_three_code_cells(path):
    kinds = "".join(c["cell_type"][0] for c in json.loads(path.read_text(encoding="utf-8"))["cells"])
    assert "cccc" not in kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_functions_take_what_they_need_as_arguments(path):
    text = "\n".join(code(path))
    known = {*dir(builtins), *imported_or_defined(ast.parse(text))}
    taken = {
        (f, name) for f, name in read_from_outside([symtable.symtable(text, path.name, "exec")]) if name not in known
    }
    assert not taken, f"functions that read the notebook's own names: {sorted(taken)}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_claims_live_in_a_ledger_and_statistics_in_helpers(path):
    text = "\n".join(code(path))
    assert "claims.Ledger(" in text and "ledger.save(" in text
    for word in ("table[-", "bootstrap", "quantile", "permutation(", "rng.integers"):
        assert word not in text, f"{word} stands in {path.name}"
