"""All of helpers is typed: mypy holds its bodies, this its public face."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from typing import Any, get_type_hints

import helpers
from helpers.session import ROOT

FOUND = pkgutil.walk_packages(helpers.__path__, "helpers.")
MODULES = [importlib.import_module(m.name) for m in FOUND if not m.ispkg]


def functions(module):
    """Public functions of a module, and public methods of its public classes."""
    for name, found in vars(module).items():
        if name.startswith("_") or getattr(found, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(found):
            yield name, found
        elif inspect.isclass(found):
            yield from ((f"{name}.{n}", f) for n, f in vars(found).items() if inspect.isfunction(f) and n[0] != "_")


def holds_any(hint):
    """Whether a type is or holds Any; what JSON gives, dict[str, Any], does not count."""
    return hint is Any or hint != dict[str, Any] and any(holds_any(part) for part in getattr(hint, "__args__", ()))


# What it is given is of any kind, and goes on to a function that is given too.
ANYTHING = {"helpers.stats.over"}


def test_no_public_function_takes_or_gives_anything_whatever():
    seen, wrong = 0, []
    for module in MODULES:
        for name, function in functions(module):
            seen += 1
            function = inspect.unwrap(function)
            hints = get_type_hints(function, {**vars(module), "TransformerBridge": object})
            given = set(inspect.signature(function).parameters) - {"self", "cls"}
            if not given | {"return"} <= set(hints) or any(map(holds_any, hints.values())):
                wrong.append(f"{module.__name__}.{name}")
    assert set(wrong) == ANYTHING and seen > 300


def test_mypy_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
