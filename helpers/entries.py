"""JSON that people bring: strict, and with errors that name the file, the line and what is wanted.

Python's own reader takes NaN, a field that is there twice and half of a surrogate pair, and fails on long numbers and deep
nesting without a place. Knows text, not what the entries mean.
"""

import json
import re
from collections import Counter
from typing import NoReturn


class DataError(ValueError):
    """Bad input data; the message names file, line and field, or the text, and what is wanted."""


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"field {twice!r:.60} is there twice")
    return out


_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(parse_constant=_constant, object_pairs_hook=_unique)


def _whole(text: str) -> bool:
    """Whether UTF-8 can hold the text: not if half of a surrogate pair is in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _next(text: str, at: int) -> int:
    """Where in `text`, from `at` on, something begins that is not space."""
    space = _SPACE.match(text, at)
    assert space  # it may be empty
    return space.end()


def _value(name: str, text: str, line: int, start: int) -> tuple[object, int]:
    """The JSON value in `text` from `start`, and where the next thing begins; `line` is that of the text's start."""
    start, problem = _next(text, start), ""
    try:
        value, end = _DECODER.raw_decode(text, start)
        if re.search(r"\\u[dD][89a-fA-F]", text[start:end]) and not _whole(json.dumps(value, ensure_ascii=False)):
            problem = "an escape from \\ud800 to \\udfff is half of a surrogate pair; write the character itself"
    except json.JSONDecodeError as error:
        start, problem = error.pos, f"not JSON ({error.msg})"
    except RecursionError:
        problem = "nested too deep to be read; flat objects are wanted"
    except ValueError as error:
        what = "a number with more digits than can be read" if "digits" in str(error) else error
        problem = f"{what}; plain JSON is wanted"
    if problem:
        raise DataError(f"{name}, line {line + text.count(chr(10), 0, start)}: {problem}")
    return value, _next(text, end)


def parse(name: str, text: str, line: int = 1) -> object:
    """The one JSON value that `text` is. DataError names the file and the line; `line` is that of the text's beginning.

    Refused besides what is no JSON: NaN and Infinity, a field that is there twice, numbers and nesting beyond what
    Python reads, half of a surrogate pair, which no file can hold.
    """
    value, end = _value(name, text, line, 0)
    if end < len(text):
        at = line + text.count("\n", 0, end)
        raise DataError(f"{name}, line {at}: not JSON (something follows the value's end)")
    return value


def listed(name: str, text: str) -> list[object]:
    """The entries of a JSON list, read one by one so that an error knows its line."""
    out, at, mark = [], _next(text, text.index("[") + 1), ","
    if text[at : at + 1] == "]":
        at, mark = at + 1, "]"
    while mark == ",":
        entry, at = _value(name, text, 1, at)
        out.append(entry)
        mark, at = text[at : at + 1], at + 1
    if mark != "]" or text[at:].strip():
        line = text.count("\n", 0, at) + 1
        wanted = "the list's end, and nothing after it" if mark == "]" else "a comma or the list's end"
        raise DataError(f"{name}, line {line}: not JSON (after entry {len(out)} {wanted} is wanted)")
    return out
