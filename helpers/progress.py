"""What a run of notebooks shows while it goes on, how long it may still take, and where its time went.

It is told names, headings, cells and the bars of a kernel, and knows nothing else of notebooks. Times are in seconds.
"""

import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from helpers.store import read_json

START, END = "kernel and imports", "the page"  # before the first heading and after the last cell
LIFE = 60.0  # seconds after which a section that goes on says so in a log


def clock(seconds: float) -> str:
    """0:07, 12:30, 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# --- bars --------------------------------------------------------------------------------------------------------------


class Bars:
    """Tells tqdm's bars from what else is written to stderr.

    A bar is written over the one before it: a carriage return, the text with its clock (or blanks) and, at its end, a
    carriage return or a newline. Bars under others move down by newlines and up again by an escape.
    """

    _bar = re.compile(r"\s*|.*\[\d+:\d\d.*", re.DOTALL)
    _after = False  # was a bar the last thing written?

    def split(self, text: str) -> tuple[str, list[str]]:
        """What of `text` is no bar, as it was written, and the bars in it ("" where one was wiped away)."""
        first, *pieces = text.replace("\x1b[A", "").split("\r")
        plain, bars = first.lstrip("\n") if self._after else first, []
        self._after &= not plain
        for piece in pieces:
            line, newline, rest = piece.partition("\n")
            crlf = not line and newline and not self._after
            if self._bar.fullmatch(line) and not crlf:
                bars.append(line.strip())
                plain += rest
                self._after = not rest
            else:
                plain += piece if self._after else f"\r{piece}"
                self._after = False
        return plain, bars


def brief(bar: str) -> str:
    """How far a bar is, and of what: `train:  45%|####5     | 12/27 [00:03<00:04]` is `45% train`."""
    found = re.fullmatch(r"(?:(.*): +)?([^\s|]+)(?:\|.*)?", bar.split(" [")[0])
    return " ".join(filter(None, [found[2], found[1]])) if found else bar.split(" [")[0]


# --- what is left ------------------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """Seconds a notebook took by section, in order (one nameless section where only the whole is known), and when."""

    sections: dict[str, float]
    when: str


class Left(NamedTuple):
    """Seconds that are left; with `more`, at least so many."""

    seconds: float
    more: bool


def expected(stem: str, last: dict[str, Any], recorded: dict[str, float]) -> Expected | None:
    """What is known of a notebook: from `last`, timelines of this machine, else from what a profile has `recorded`."""
    if times := last.get(stem):
        return Expected({s["heading"]: s["seconds"] for s in times["sections"]}, "the last time")
    return Expected({"": float(recorded[stem])}, "the profile says") if stem in recorded else None


def remaining(known: Expected | None, heading: str = "", inside: float = 0.0, so_far: float = 0.0) -> Left | None:
    """What a notebook still wants, `inside` seconds into section `heading`, `so_far` into the whole; None: unknown."""
    if known is None:
        return None
    names = list(known.sections)
    later = sum(list(known.sections.values())[names.index(heading) + 1 :]) if heading in names else 0.0
    here = known.sections[heading] - inside if heading in names else sum(known.sections.values()) - so_far
    return Left(later + max(here, 0.0), here < 0)


def together(parts: Iterable[Left | None]) -> Left | None:
    """What several want: more than that where some are unknown or longer than expected, None where all are unknown."""
    parts = list(parts)
    known = [p for p in parts if p]
    if not known:
        return None
    return Left(sum(p.seconds for p in known), len(known) < len(parts) or any(p.more for p in known))


def told(left: Left | None, when: str = "") -> str:
    """What is left, in words: never less than nothing, no number where none is known. `when`: longer than what."""
    if left is None:
        return "time left unknown"
    if left.more and left.seconds < 1 and when:
        return f"longer than {when}"
    return f"{'more than' if left.more else 'about'} {clock(left.seconds)} left"


# --- where the time went -----------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """The timelines of an earlier run, by notebook; what is missing, damaged or of another shape is left out."""
    kept, out = read_json(path), {}
    for stem, times in kept.items() if isinstance(kept, dict) else ():
        with suppress(AttributeError, KeyError, TypeError, ValueError):
            sections = [
                {"heading": str(s["heading"]), "seconds": float(s["seconds"]), "kinds": dict(s["kinds"])}
                for s in times["sections"]
            ]
            whole = {"seconds": float(times["seconds"]), "sections": sections}
            by_kind(whole)
            out[stem] = whole
    return out


def by_kind(times: dict[str, Any]) -> list[dict[str, Any]]:
    """A notebook's kinds of work, largest first: kind, seconds, count, how many of them came from the cache.

    What no step took is `other`, or has the section's own name in START and END. The seconds add up to the notebook's.
    """
    total: dict[str, dict[str, Any]] = {}
    for section in times["sections"]:
        known = sum(kind["seconds"] for kind in section["kinds"].values())
        rest = {"seconds": max(section["seconds"] - known, 0.0), "count": 0, "cached": 0}
        name_of_rest = section["heading"] if section["heading"] in (START, END) else "other"
        for name, kind in (section["kinds"] | {name_of_rest: rest}).items():
            line = total.setdefault(name, {"kind": name, "seconds": 0.0, "count": 0, "cached": 0})
            for key in ("seconds", "count", "cached"):
                line[key] += kind[key]
    return sorted(total.values(), key=lambda line: -line["seconds"])


def _steps(lines: list[str]) -> dict[str, dict[str, Any]]:
    """The steps that `store.spent` told of, by kind; a line that was cut short is left out."""
    kinds: dict[str, dict[str, Any]] = {}
    for line in lines:
        with suppress(ValueError):
            step = json.loads(line)
            kind = kinds.setdefault(step["kind"], {"seconds": 0.0, "count": 0, "cached": 0})
            kind["seconds"] = round(kind["seconds"] + step["seconds"], 4)
            kind["count"] += 1
            kind["cached"] += step["cached"]
    return kinds


# --- what is shown -----------------------------------------------------------------------------------------------------


class Progress:
    """A run of notebooks as it goes on: one live line in a terminal, in a log one line a section.

    As a context it ticks, and says at the end of a block that raised what was stopped. `changed` is called when a section
    begins; `state` says of each notebook waiting, running, ran, failed, stopped or not run; `timeline` holds, for each
    that ended, its seconds, and by section its heading, seconds and kinds of work.
    """

    def __init__(
        self, stems: Sequence[str], known: dict[str, Expected | None], timeline: dict[str, Any],
        changed: Callable[[], object],
    ):  # fmt: skip
        self.state = dict.fromkeys(stems, "waiting")
        self.known, self.timeline, self.changed = known, timeline, changed
        self.stem, self.heading, self.bar, self.cells = "", "", "", (0, 0)
        self.began = self._notebook = self._section = self._said = time.monotonic()
        self.since = ""  # the clock on the wall when the section began
        self._sections: list[dict[str, Any]] = []
        self._spent, self._read = Path(), 0
        self._terminal, self._length = sys.stdout.isatty(), 0
        self._lock, self._over = threading.RLock(), threading.Event()

    def __enter__(self) -> "Progress":
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._ticker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._ticker.join()
        self._wipe()
        if kind:
            ended = {"running": "stopped", "waiting": "not run"}
            self.state = {stem: ended.get(state, state) for stem, state in self.state.items()}
            with suppress(OSError):
                self.changed()

    @property
    def going(self) -> bool:
        """Is a notebook running, or does one wait?"""
        return bool({"running", "waiting"} & set(self.state.values()))

    # what it is told

    def begin(self, stem: str, spent: Path) -> None:
        """A notebook begins, whose long steps are told in the file `spent`."""
        with self._lock:
            self.stem, self.state[stem], self.cells = stem, "running", (0, 0)
            self._sections, self._spent, self._read = [], spent, 0
            self._notebook = self._section = time.monotonic()
        if not self._terminal:
            own, every = self.left()
            self.say(f"{stem} ({self._place()}), {own}" + f"; of all, {every}" * (every != own))
        self.section(START)

    def section(self, heading: str) -> None:
        """A section begins, and the one before it ends."""
        self._close()
        with self._lock:
            self.heading, self.bar, self.since = heading, "", time.strftime("%H:%M:%S")
        with suppress(OSError):  # a disk that is full is told of when the notebook is written
            self.changed()

    def end(self, state: str, error: str = "") -> float:
        """The notebook has ended: its seconds."""
        self._close()
        with self._lock:
            seconds = round(sum(s["seconds"] for s in self._sections), 2)
            self.timeline[self.stem] = {"seconds": seconds, "sections": self._sections}
            self.state[self.stem], self.heading, self.bar = state, "", ""
        self.say(f"{self.stem} {state} in {seconds:.0f} s {error}".rstrip())
        return seconds

    def _close(self) -> None:
        if not self.heading:
            return
        now, lines = time.monotonic(), []
        with suppress(OSError):
            lines = self._spent.read_text(encoding="utf-8").splitlines()[self._read :]
        self._read += len(lines)
        seconds = round(now - self._section, 2)
        self._sections.append({"heading": self.heading, "seconds": seconds, "kinds": _steps(lines)})
        if not self._terminal:
            self.say(f"{seconds:8.1f} s  {self.heading}")
        self._section = now

    # what it shows

    def left(self) -> tuple[str, str]:
        """What is left of this notebook, and of all, in words."""
        now, known = time.monotonic(), self.known.get(self.stem)
        here = remaining(known, self.heading, now - self._section, now - self._notebook)
        waiting = [remaining(self.known.get(stem)) for stem, state in self.state.items() if state == "waiting"]
        running = [here] if "running" in self.state.values() else []
        return told(here, known.when if known else ""), told(together([*running, *waiting]))

    def line(self, width: int) -> str:
        """The live line, in at most `width` columns: the heading gives way first, then the name, then the bar."""
        now, (here, all_) = time.monotonic(), self.left()
        place, (done, cells) = f"({self._place('/')})", self.cells
        parts = [
            self.stem,
            f"{place}, cell {done + 1}/{cells}" if cells else place,
            self.heading,
            brief(self.bar),
            f"{clock(now - self._notebook)} {here}",
            f"all {clock(now - self.began)}" + f" {all_.removesuffix(' left')}" * (all_ != here),
        ]
        parts[4:] = [p.replace("about ", "~").replace("more than ", ">") for p in parts[4:]]
        for i, least in ((2, 16), (0, 2), (3, 4), (2, 8), (3, 0), (2, 0)):
            over = max(len(self._joined(parts)) - width, 0)
            parts[i] = parts[i][: max(len(parts[i]) - over, least)].rstrip()
        return self._joined(parts)[: max(width, 0)]

    @staticmethod
    def _joined(parts: list[str]) -> str:
        return " · ".join(filter(None, [" ".join(parts[:2]), *parts[2:]]))

    def _place(self, of: str = " of ") -> str:
        return f"{list(self.state).index(self.stem) + 1}{of}{len(self.state)}"

    def say(self, text: str) -> None:
        """Print a line that stays."""
        with self._lock:
            self._wipe()
            print(text, flush=True)
            self._said = time.monotonic()

    def _wipe(self) -> None:
        with self._lock:
            if self._length:
                print("\r" + " " * self._length + "\r", end="", flush=True)
                self._length = 0

    def _show(self) -> None:
        with self._lock:
            if not self.heading:
                return
            if self._terminal:
                line = self.line(shutil.get_terminal_size().columns - 1)
                print("\r" + line.ljust(self._length), end="", flush=True)
                self._length = len(line)
            elif time.monotonic() - self._said >= LIFE:
                so_far = clock(time.monotonic() - self._section)
                self.say(f"           {', '.join(filter(None, [self.heading, brief(self.bar), f'{so_far} so far']))}")

    def _tick(self) -> None:
        while not self._over.wait(1.0):
            with suppress(OSError, ValueError):  # a terminal that is gone
                self._show()
