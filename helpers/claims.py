"""Claims and their verdicts: a rule is stated first, a number is put to it after.

A claim is what a study reports: statement, source, published number, ours with its interval, the null's number, the rule
in words, and the verdict. Verdicts come out of `judge`, never out of a keyboard.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helpers.session import Session
from helpers.stats import Interval
from helpers.store import versions, write_file

VERDICTS = ("holds", "fails", "algebra", "artefact", "undecided", "not run")


@dataclass(frozen=True)
class Rule:
    """A verdict rule: `words` for the reader, `decide` (interval, null) -> verdict for the computer."""

    words: str
    decide: Callable[[Interval, float], str]


def above(threshold: float, what: str) -> Rule:
    """`holds` if the whole interval of `what` lies above `threshold` and the null, `fails` if below `threshold`, else `undecided`."""

    def decide(value: Interval, null: float) -> str:
        return "holds" if value.low > max(threshold, null) else "fails" if value.high < threshold else "undecided"

    words = f"holds if the 95 % interval of {what} lies above {threshold:g} and above the null, fails if below {threshold:g}"
    return Rule(f"{words}, else undecided", decide)


def below(threshold: float, what: str) -> Rule:
    """`holds` if the whole interval of `what` lies below `threshold` and the null, `fails` if above `threshold`, else `undecided`."""

    def decide(value: Interval, null: float) -> str:
        return "holds" if value.high < min(threshold, null) else "fails" if value.low > threshold else "undecided"

    words = f"holds if the 95 % interval of {what} lies below {threshold:g} and below the null, fails if above {threshold:g}"
    return Rule(f"{words}, else undecided", decide)


def beyond_null(what: str, null_name: str) -> Rule:
    """`holds` if the whole interval lies above the null's number, `fails` if it does not reach it, else `undecided`."""

    def decide(value: Interval, null: float) -> str:
        return "holds" if value.low > null else "fails" if value.high < null else "undecided"

    return Rule(f"holds if the 95 % interval of {what} lies above {null_name}, fails if below, else undecided", decide)


def identity(what: str, tolerance: float) -> Rule:
    """`algebra` if the value differs from 1 by less than `tolerance` on the null too; `fails` otherwise."""

    def decide(value: Interval, null: float) -> str:
        return "algebra" if max(abs(value.low - 1), abs(value.high - 1), abs(null - 1)) < tolerance else "fails"

    return Rule(f"algebra if {what} is 1 within {tolerance:g} for the data and for noise alike, else fails", decide)


def reproduces(published: float, tolerance: float) -> Rule:
    """`holds` if the value lies within `tolerance` (a share) of a published number and the null does not, else `fails`."""
    reach = tolerance * abs(published)

    def decide(value: Interval, null: float) -> str:
        return "holds" if abs(value.value - published) <= reach < abs(null - published) else "fails"

    return Rule(f"holds if it lies within {tolerance:.0%} of the published {published:g} and the null does not", decide)


def refused(reason: str) -> Rule:
    """`not run`, whatever the number: a condition for judging it is not met."""
    return Rule(f"not run: {reason}", lambda value, null: "not run")


@dataclass(frozen=True)
class Claim:
    """One row of the table of claims; `published` is a number where one can be compared with, else words."""

    id: str
    statement: str
    source: str
    published: str | float
    value: float
    low: float
    high: float
    null: float
    unit: str
    rule: str
    verdict: str


def judge(
    rule: Rule, id: str, statement: str, source: str, value: Interval, null: float, unit: str,
    published: str | float = "-",
) -> Claim:  # fmt: skip
    """The claim with the verdict `rule` gives; ValueError on a number that is missing or a verdict that does not exist."""
    if not all(math.isfinite(x) for x in (*value, null)):
        raise ValueError(
            f"claim {id}: {value} with null {null} is not a result; every claim needs an interval and a null"
        )
    if not value.low <= value.value <= value.high:
        raise ValueError(f"claim {id}: the value {value.value} lies outside its interval [{value.low}, {value.high}]")
    verdict = rule.decide(value, null)
    if verdict not in VERDICTS:
        raise ValueError(f"claim {id}: the rule gave {verdict!r}; a verdict is one of {', '.join(VERDICTS)}")
    return Claim(id, statement, source, published, *map(float, value), float(null), unit, rule.words, verdict)


def published(claim: dict[str, Any]) -> str:
    """A claim's published number with the gap ours leaves to it, or the published words."""
    given = claim["published"]
    return given if isinstance(given, str) else f"{given:g} (gap {claim['value'] - given:+.2g})"


def markdown(claims: list[Claim] | list[dict[str, Any]], with_rule: bool = True) -> str:
    """The claims as a Markdown table: what was claimed, where, published and our number, null, verdict."""
    rows = [c if isinstance(c, dict) else asdict(c) for c in claims]
    head = ["claim", "source", "published", "ours [95 %]", "null", "verdict"] + (["rule"] if with_rule else [])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for c in rows:
        ours = f"{c['value']:.3g} [{c['low']:.3g}, {c['high']:.3g}] {c['unit']}"
        cells = [f"**{c['id']}** {c['statement']}", c["source"], published(c), ours, f"{c['null']:.3g}"]
        cells += [f"**{c['verdict']}**"] + ([c["rule"]] if with_rule else [])
        lines.append("| " + " | ".join(str(x).replace("|", "\\|").replace("\n", " ") for x in cells) + " |")
    return "\n".join(lines)


def save(session: Session, summary: str, claims: list[Claim], numbers: dict[str, Any]) -> Path:
    """Write the study's results file (summary in words, claims, numbers, versions), print and return its path."""
    ids = [c.id for c in claims]
    if len(set(ids)) < len(ids):
        raise ValueError(f"two claims share an id: {sorted(ids)}")
    result = {
        "notebook": session.notebook,
        "profile": session.name,
        "model": session.model,
        "layer": session.profile.layer,
        "parameters": session.parameters,
        "device": session.device,
        "dtype": str(session.dtype).removeprefix("torch."),
        "seed": session.seed,
        "summary": summary,
        "claims": [asdict(c) for c in claims],
        "numbers": numbers,
        "versions": versions(),
    }
    path = session.results / f"{session.notebook}.json"
    write_file(path, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print(f"saved {len(claims)} claims and {len(numbers)} numbers to {'/'.join(path.parts[-3:])}")
    return path
