"""A notebook's claims: stated with their rule before any number, judged by that rule, read and saved from one object.

    ledger = claims.Ledger(session)
    ledger.state("01.2", "one padded pair steers as well as forty", claims.at_least(0.9, margin=0.1), source="source 001",
                 unit="of the other's response", over="behaviours", null="random vectors")
    ledger.judge("01.2", stats.ratio(one, forty), null_draws)
    ledger.reading("01.2")

Every claim has an id; a cell that is run again replaces what it said. What the verdicts mean, and how often each rule is wrong
where nothing is there and where something is, stands in docs/verdicts.md.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from IPython.display import Markdown

from helpers import stats
from helpers.session import Session
from helpers.stats import Interval
from helpers.store import versions, write_file

VERDICTS = ("holds", "fails", "algebra", "artefact", "undecided", "not run")
MAIN = 5  # claims of a notebook that are its argument; the rest is "also measured"
P = 0.05


# --- rules -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a rule is given: the `value` with its interval, the null's number, and whether the value `beats` the null."""

    value: Interval
    null: float
    beats: bool


@dataclass(frozen=True)
class Rule:
    """`words` for the reader, `decide` for the computer; `sign` is -1 where less is more, which turns the p-value round."""

    words: str
    decide: Callable[[Found], str]
    sign: int = 1


def at_least(threshold: float, margin: float = 0.0) -> Rule:
    """The value is `threshold` or more; `fails` where it is clearly less, by more than `margin`."""

    def decide(found: Found) -> str:
        low = found.value.low > threshold and found.beats
        return "holds" if low else "fails" if found.value.high < threshold - margin else "undecided"

    words = f"holds if the 95 % interval lies above {threshold:g} and beats the null, fails if it lies below {threshold - margin:g}"
    return Rule(f"{words}, else undecided", decide)


def at_most(threshold: float, margin: float = 0.0, beats: bool = True) -> Rule:
    """The value is `threshold` or less; `fails` where it is clearly more, by more than `margin`.

    Not `beats`: the null stands beside the value and is not asked. Where little being left is the claim, nothing is what a
    null leaves, and no value beats it.
    """

    def decide(found: Found) -> str:
        high = found.value.high < threshold and (found.beats or not beats)
        return "holds" if high else "fails" if found.value.low > threshold + margin else "undecided"

    asked = " and beats the null" if beats else ", whatever the null gives"
    words = f"holds if the 95 % interval lies below {threshold:g}{asked}, fails if it lies above {threshold + margin:g}"
    return Rule(f"{words}, else undecided", decide, sign=-1)


def effect(smallest: float) -> Rule:
    """There is an effect: the value less what the null gives. `fails` where all that matters, `smallest` and more, is excluded."""

    def decide(found: Found) -> str:
        if found.value.high < smallest:
            return "fails"
        return "holds" if found.value.low > 0 and found.beats else "undecided"

    words = f"fails if the 95 % interval lies below {smallest:g}, the smallest effect that would matter"
    return Rule(f"{words}; else holds if it lies above zero and beats the null, else undecided", decide)


def within(target: float, margin: float) -> Rule:
    """The value is `target`, give or take `margin`: the whole interval must lie inside."""

    def decide(found: Found) -> str:
        low, high = target - margin, target + margin
        inside = low < found.value.low and found.value.high < high
        return "holds" if inside else "fails" if found.value.low > high or found.value.high < low else "undecided"

    words = f"holds if the whole 95 % interval lies within {margin:g} of {target:g}, fails if it lies outside"
    return Rule(f"{words}, else undecided", decide)


def of_anything(threshold: float, margin: float = 0.0) -> Rule:
    """The value is `threshold` or more, and so is the null: whatever goes in gives it. `fails` as `at_least` does."""

    def decide(found: Found) -> str:
        if found.value.high < threshold - margin:
            return "fails"
        return "holds" if found.value.low > threshold and found.null > threshold else "undecided"

    words = f"holds if the 95 % interval and the null both lie above {threshold:g}: it is so whatever goes in"
    return Rule(f"{words}; fails if the interval lies below {threshold - margin:g}, else undecided", decide)


def of_the_method(low: float, high: float) -> Rule:
    """`artefact` if value and null both lie between `low` and `high`, about what the method gives when nothing goes in.

    Then the number is the method's own. `holds` above, where the vector makes it larger, and `fails` below.
    """

    def decide(found: Found) -> str:
        if low < found.value.low and found.value.high < high and low < found.null < high:
            return "artefact"
        return "holds" if found.value.low > high else "fails" if found.value.high < low else "undecided"

    words = f"artefact if the whole 95 % interval and the null lie between {low:g} and {high:g}"
    return Rule(f"{words}, holds if the interval lies above, fails if it lies below, else undecided", decide)


def identity(tolerance: float) -> Rule:
    """`algebra` if the value is 1 within `tolerance`, on the null too."""

    def decide(found: Found) -> str:
        gaps = [abs(x - 1) for x in (found.value.low, found.value.high, found.null)]
        return "algebra" if max(gaps) < tolerance else "fails"

    return Rule(f"algebra if it is 1 within {tolerance:g} for the data and for noise alike, else fails", decide)


def artefact(threshold: float, null_below: float) -> Rule:
    """`artefact` if the value, which ought to be as small as what stands in the null's place, lies above `threshold` all the same."""

    def decide(found: Found) -> str:
        high = found.value.low > threshold and found.null < null_below
        return "artefact" if high else "holds" if found.value.high < null_below else "undecided"

    words = f"artefact if the 95 % interval lies above {threshold:g} and what it is compared with below {null_below:g}"
    return Rule(f"{words}, holds if the interval lies below {null_below:g} too, else undecided", decide)


def by_mistake(reached: float, left: float) -> Rule:
    """`artefact` if the value is `reached` or more only by a mistake: the null, the same measurement with the mistake in it,
    reaches that, and the value, without it, is below `left`."""

    def decide(found: Found) -> str:
        if found.value.high < left:
            return "artefact" if found.null >= reached else "fails"
        return "holds" if found.value.low > reached else "undecided"

    words = f"artefact if it is {reached:g} or more measured with the mistake, and the 95 % interval measured without lies below {left:g}"
    return Rule(f"{words}; holds if that interval lies above {reached:g}, else fails or undecided", decide)


def reproduces(published: float, tolerance: float) -> Rule:
    """The value is a published number, give or take `tolerance` (a share of it), and the null is not."""
    same = within(published, tolerance * abs(published))

    def decide(found: Found) -> str:
        null = abs(found.null - published) <= tolerance * abs(published)
        verdict = same.decide(found)
        return "undecided" if null and verdict == "holds" else verdict

    words = f"holds if the whole 95 % interval lies within {tolerance:.0%} of the published {published:g} and the null does not"
    return Rule(f"{words}, fails if the interval lies outside, else undecided", decide)


def beside(why: str) -> Rule:
    """No verdict: the value stands beside a published number that it cannot be judged by, for a reason."""

    def decide(found: Found) -> str:
        return "not run"

    return Rule(f"shown beside the published number, not judged: {why}", decide)


# --- claims ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A claim as stated and, once judged, as found; `published` is a number where one can be compared with, else words.

    `over`: what was sampled, which is what the interval ranges over. `null`: what the null is; `null_value`, the largest number
    that it gives by chance (one draw in twenty is beyond it), or its one number; `p` where it has draws, after Holm's
    correction within its `family`. `main`: one of the notebook's few, not "also measured".
    """

    id: str
    statement: str
    rule: str
    source: str
    unit: str
    over: str
    null: str
    main: bool = True
    family: str = ""
    published: str | float = "-"
    value: float | None = None
    low: float | None = None
    high: float | None = None
    null_value: float | None = None
    p: float | None = None
    ceiling: float | None = None
    verdict: str = ""
    reason: str = ""

    @property
    def interval(self) -> Interval:
        """The value with its interval; ValueError for a claim that was not judged."""
        if self.value is None or self.low is None or self.high is None:
            raise ValueError(f"claim {self.id} has no number: {self.reason or 'judge it first'}")
        return Interval(self.value, self.low, self.high)

    def __format__(self, spec: str) -> str:
        return format(self.interval, spec)

    def _repr_markdown_(self) -> str:
        return reading(self) if self.verdict or self.value is not None else stated(self)


def stated(claim: Claim) -> str:
    """A claim and its rule for the reader, before any number."""
    lines = [
        f"**Claim {claim.id}** ({claim.source}): *{claim.statement}*.",
        f"**Rule**: {claim.rule}.",
        f"Sampled: {claim.over}. Null: {claim.null}.",
    ]
    if claim.family:
        lines.append(f"One of the questions of *{claim.family}*; their p-values are corrected together (Holm).")
    return "  \n".join(lines)


def reading(claim: Claim) -> str:
    """What was found, in one sentence."""
    if claim.value is None:
        return f"*{claim.statement[:1].upper()}{claim.statement[1:]}*: **{claim.verdict}** ({claim.reason})."
    found = f"{number(claim.value)} [{number(claim.low)}, {number(claim.high)}] {claim.unit}"
    if not claim.verdict:
        return f"*{claim.statement[:1].upper()}{claim.statement[1:]}*: {found}; {claim.reason}."
    drawn = claim.p is not None  # of draws, the number is what one in twenty reaches by chance
    beside = (
        f"null reaches {number(claim.null_value)}, p = {claim.p:.2g}" if drawn else f"null {number(claim.null_value)}"
    )
    if claim.ceiling is not None:
        beside += f", ceiling {number(claim.ceiling)}"
    more = f" {claim.reason}." if claim.reason else ""
    return f"*{claim.statement[:1].upper()}{claim.statement[1:]}*: {found} ({beside}): **{claim.verdict}**.{more}"


def number(x: float | None) -> str:
    """Three digits, as a person would write them."""
    return "-" if x is None else f"{x:.3g}"


class _Judged(NamedTuple):
    """What a claim was given: its interval, the null's number, its draws, the p-value against them."""

    value: Interval
    null: float
    draws: int
    p: float | None
    ceiling: float | None


class Ledger:
    """The claims of one notebook, by id. Without a session nothing can be saved."""

    def __init__(self, session: Session | None = None):
        self.session = session
        self._stated: dict[str, tuple[Claim, Rule]] = {}
        self._found: dict[str, _Judged] = {}
        self._parts: dict[str, tuple[list[str], Callable[[list[str]], str]]] = {}
        self._refused: dict[str, str] = {}

    def state(
        self, id: str, statement: str, rule: Rule, *, source: str, unit: str, over: str, null: str, main: bool = True,
        family: str = "", published: str | float = "-",
    ) -> Claim:  # fmt: skip
        """State a claim: shown with its rule. Stated again otherwise it is replaced, and what was found for it is forgotten.

        Claims of one `family` are stated before the first of them is judged, and have their verdicts when the last is.
        ValueError for a sixth claim that would be one of the notebook's main ones, and for one that comes late to its family.
        """
        judged = [x for x in self._found if family and self._stated[x][0].family == family]
        if id not in self._stated and judged:
            raise ValueError(
                f"claim {id} belongs to the family {family!r}, of which {', '.join(judged)} is judged: state all of a family first"
            )
        claim = Claim(id, statement, rule.words, source, unit, over, null, main, family, published)
        if id not in self._stated or self._stated[id][0] != claim:
            self._forget(id)
        self._stated[id] = claim, rule
        if sum(c.main for c, _ in self._stated.values()) > MAIN:
            del self._stated[id]
            raise ValueError(f"claim {id} would be one of more than {MAIN} main claims: state it with main=False")
        return claim

    def judge(
        self, id: str, value: Interval | None, null: float | Sequence[float] | np.ndarray, ceiling: float | None = None,
        unless: str = "",
    ) -> Claim:  # fmt: skip
        """Put a number to a claim: its interval and the null's draws, made by the same function as the value, or its one number.

        The verdict is the rule's. Judged again it is replaced. Not run: None, which `stats.ratio_if_clear` gives, and whatever lacks
        a condition, which `unless` says. ValueError for a claim not stated, or numbers that are none.
        """
        self._known(id)
        if unless:
            return self.not_run(id, unless)
        if value is None:
            return self.not_run(id, "what it would be divided by is not clear of zero")
        draws = np.atleast_1d(np.asarray(null, np.float64)).ravel()
        if not len(draws) or not np.isfinite(draws).all() or not np.isfinite([*value, ceiling or 0.0]).all():
            raise ValueError(
                f"claim {id}: {value} with null {null} is not a result; every claim needs an interval and a null"
            )
        if not value.low <= value.value <= value.high:
            raise ValueError(
                f"claim {id}: the value {value.value} lies outside its interval [{value.low}, {value.high}]"
            )
        self._forget(id)
        sign, p, shown = self._stated[id][1].sign, None, float(draws[0])
        if len(draws) > 1:
            p = stats.p_value(sign * value.value, sign * draws)
            shown = sign * stats.reach(sign * draws)
        self._found[id] = _Judged(Interval(*map(float, value)), shown, len(draws), p, ceiling)
        return self[id]

    def not_run(self, id: str, reason: str) -> Claim:
        """Say why a claim is not judged: a condition is missing."""
        self._known(id)
        self._forget(id)
        self._refused[id] = reason
        return self[id]

    def combine(self, id: str, of: Sequence[str], decide: Callable[[list[str]], str]) -> Claim:
        """A verdict that follows from those of other claims, whatever they turn out to be."""
        for part in (id, *of):
            self._known(part)
        self._forget(id)
        self._parts[id] = list(of), decide
        return self[id]

    def __getitem__(self, id: str) -> Claim:
        self._known(id)
        claim, rule = self._stated[id]
        if id in self._refused:
            return replace(claim, verdict="not run", reason=self._refused[id])
        if id in self._parts:
            of, decide = self._parts[id]
            parts = [self[part] for part in of]
            said = ", ".join(f"{part.id} {part.verdict or 'not judged'}" for part in parts)
            return replace(claim, verdict=self._checked(id, decide([part.verdict for part in parts])), reason=said)
        if id not in self._found:
            return claim
        found = self._found[id]
        if waits := self._waits(id):
            said, value = f"judged together with {', '.join(waits)}, of the same family", found.value
            return replace(claim, value=value.value, low=value.low, high=value.high, ceiling=found.ceiling, reason=said)
        p = self._p(id)
        value, null = found.value, found.null
        clear = value.low > null if rule.sign > 0 else value.high < null
        verdict = self._checked(id, rule.decide(Found(value, null, clear if p is None else p < P)))
        seen = (
            f"To be told from the threshold four times in five, a value must lie {number(stats.seen(value))} beyond it"
        )
        reason = seen if verdict == "undecided" else ""
        least = len(self._family(id)) / (found.draws + 1)
        if reason and p is not None and least >= P and rule.decide(Found(value, null, True)) == "holds":
            reason += f"; {found.draws} draws are too few, p cannot fall below {least:.2g}"
        return replace(
            claim, value=value.value, low=value.low, high=value.high, null_value=null, p=p, ceiling=found.ceiling,
            verdict=verdict, reason=reason,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Claim]:
        return (self[id] for id in self._stated)

    def reading(self, id: str) -> str:
        """What was found for a claim, in one sentence of Markdown."""
        return reading(self[id])

    def table(self, main: bool | None = None) -> str:
        """The claims as a Markdown table: all, the main ones, or what was also measured."""
        return markdown([asdict(c) for c in self if main is None or c.main == main])

    def save(self, summary: str, numbers: dict[str, Any]) -> None:
        """Write the study's results file (summary in words, claims, numbers, versions) and print where it lies.

        ValueError for a claim that was stated and not judged.
        """
        if left := [c.id for c in self if not c.verdict]:
            raise ValueError(
                f"claims {', '.join(left)} were stated and not judged; judge them, or say why not (not_run)"
            )
        s = self.session
        if s is None:
            raise ValueError("a ledger without a session has no folder to save in: Ledger(session.start(...))")
        result = {
            "notebook": s.notebook,
            "profile": s.name,
            "model": s.model,
            "layer": s.profile.layer,
            "parameters": s.parameters,
            "device": s.device,
            "dtype": str(s.dtype).removeprefix("torch."),
            "seed": s.seed,
            "summary": summary,
            "claims": [asdict(c) for c in self],
            "numbers": numbers,
            "versions": versions(),
        }
        path = s.results / f"{s.notebook}.json"
        write_file(path, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        print(f"saved {len(self._stated)} claims and {len(numbers)} numbers to {'/'.join(path.parts[-3:])}")

    def _known(self, id: str) -> None:
        if id not in self._stated:
            raise ValueError(f"claim {id} was not stated; stated are {', '.join(self._stated) or 'none yet'}")

    def _forget(self, id: str) -> None:
        for kept in (self._found, self._parts, self._refused):
            kept.pop(id, None)

    def _checked(self, id: str, verdict: str) -> str:
        if verdict not in VERDICTS and verdict:
            raise ValueError(f"claim {id}: the rule gave {verdict!r}; a verdict is one of {', '.join(VERDICTS)}")
        return verdict

    def _waits(self, id: str) -> list[str]:
        """The claims of this one's family without a number yet: their p-values are corrected together, so none has a verdict alone."""
        family = self._stated[id][0].family
        known = self._found.keys() | self._refused.keys()
        return [x for x, (claim, _) in self._stated.items() if family and claim.family == family and x not in known]

    def _family(self, id: str) -> dict[str, float]:
        """The p-values that a claim's is corrected with, its own among them."""
        family = self._stated[id][0].family
        asked = [x for x in self._found if x == id or family and self._stated[x][0].family == family]
        return {x: p for x in asked if (p := self._found[x].p) is not None}

    def _p(self, id: str) -> float | None:
        """The p-value of a claim's number against the null's draws, corrected within its family; None for a single number."""
        family = self._family(id)
        return dict(zip(family, stats.holm([*family.values()]).tolist(), strict=True)).get(id)


# --- for readers of results --------------------------------------------------------------------------------------------


def published(claim: dict[str, Any]) -> str:
    """A claim's published number with the gap ours leaves to it, or the published words."""
    given = claim["published"]
    if isinstance(given, str) or claim["value"] is None:
        return str(given)
    return f"{given:g} (gap {claim['value'] - given:+.2g})"


def markdown(claims: Sequence[dict[str, Any]], with_rule: bool = True) -> str:
    """Claims, as a results file has them, as a Markdown table: what was claimed, where, published and our number, null, verdict."""
    head = ["claim", "source", "published", "ours [95 %]", "null", "verdict"] + (["rule"] if with_rule else [])
    rows = []
    for c in claims:
        ours = "-" if c["value"] is None else f"{c['value']:.3g} [{c['low']:.3g}, {c['high']:.3g}] {c['unit']}"
        null = number(c["null_value"]) + (f" (p = {c['p']:.2g})" if c["p"] is not None else "")
        cells = [f"**{c['id']}** {c['statement']}", c["source"], published(c), ours, null]
        why = f": {c['reason']}" if c["verdict"] == "not run" else ""
        cells += [f"**{c['verdict']}**{why}"] + ([c["rule"]] if with_rule else [])
        rows.append(cells)
    return str(table(head, rows).data)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Markdown:
    """A Markdown table; what would break a cell is escaped, numbers come as the caller wrote them."""
    lines = [head, ["---"] * len(head), *rows]
    return Markdown("\n".join("| " + " | ".join(_cell(x) for x in line) + " |" for line in lines))


def _cell(x: object) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", str(x)).replace("\n", " ")
