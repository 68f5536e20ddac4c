"""The room of the language model is typed: mypy holds its bodies, this its public face."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from typing import Any, get_type_hints

import helpers.lm
from helpers.session import ROOT

MODULES = [importlib.import_module(f"helpers.lm.{m.name}") for m in pkgutil.iter_modules(helpers.lm.__path__)]


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
    return hint is Any or any(holds_any(part) for part in getattr(hint, "__args__", ()))


def test_no_public_function_takes_or_gives_anything_whatever():
    seen = 0
    for module in MODULES:
        for name, function in functions(module):
            seen += 1
            function = inspect.unwrap(function)
            hints = get_type_hints(function, {**vars(module), "TransformerBridge": object})
            given = set(inspect.signature(function).parameters) - {"self", "cls"}
            assert given | {"return"} <= set(hints), f"{module.__name__}.{name}"
            assert not any(map(holds_any, hints.values())), f"{module.__name__}.{name}"
    assert seen > 60


def test_mypy_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
