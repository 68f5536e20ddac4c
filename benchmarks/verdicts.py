"""How often the rules of `helpers/claims.py` are wrong at the notebooks' sizes, for docs/verdicts.md.

    python -m benchmarks.verdicts [--studies 4000] [--seed 0] [--page docs/verdicts.md]

Simulated studies whose truth is known are judged by the rules themselves. With the default number
of studies, or more, the tables are written into the page, between its two marks. The last line
printed is JSON. Two minutes on one core.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from helpers import claims, stats
from helpers.claims import Found, Ledger, Rule
from helpers.session import ROOT
from helpers.stats import Interval

STUDIES, POWER_STUDIES = 4000, 1000  # of a row; of a power in the table of change points
COVERED, WRONG = 0.92, 0.05  # wanted: at least; at most
MARKS = ("<!-- tables: python -m benchmarks.verdicts -->", "<!-- end of tables -->")

# Measured at commit a14a601, in data/results/smollm2: seven behaviours with 50 items each, in nats.
BETWEEN, WITHIN = 5.94, 7.94  # 05, "shift (nats)", aligned: sd between behaviours, and of items
SHIFT, LOG_SPREAD = 2.59, 0.66  # 00, "instruction shift by behaviour": mean, and sd of the logs
# figures/smollm2/01_headline.json, "last position, system pairs": mean, sd between behaviours; then
# the sd of ratios of one padded pair's response to it, and of the mean of 50 items.
RESPONSE, RESPONSES, RATIOS, NOISE = 1.40, 0.83, 0.4, 0.3
ITEMS = 50

Draw = Callable[[np.random.Generator, float], Interval]


# --- intervals ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """What is sampled: `draw` makes one study's interval for a given truth. `truth`: the one that is
    used; `effect`: how far beyond a threshold power is stated, in words `said`; `none`: whether zero
    is no effect."""

    name: str
    draw: Draw
    truth: float
    effect: float
    said: str
    none: bool = True


def normal(n: int, flat: bool = False) -> Draw:
    """A mean over behaviours with items in each; `flat`: over all items, as if those were sampled."""

    def draw(rng, truth):
        behaviours = truth + BETWEEN * rng.standard_normal((n, 1))
        items = behaviours + WITHIN * rng.standard_normal((n, ITEMS))
        return stats.over(items.ravel() if flat else items)

    return draw


def skewed(n: int, mean: float, spread: float, logs: bool = False) -> Draw:
    """A mean over `n` lognormal units; `logs`: of their logs, which are normal."""

    def draw(rng, truth):
        z = spread * rng.standard_normal(n)
        return stats.over(truth + (z if logs else mean * (np.exp(z - spread**2 / 2) - 1)))

    return draw


def talks(flat: bool = False) -> Draw:
    """A mean over 56 conversations, eight of each of seven behaviours, which share 0.3 of the variance."""

    def draw(rng, truth):
        shared = 0.3**0.5 * rng.standard_normal((7, 1))
        found = truth + shared + 0.7**0.5 * rng.standard_normal((7, 8))
        return stats.over(found.ravel() if flat else found)

    return draw


def ratio(n: int) -> Draw:
    """A ratio of sums over behaviours whose sizes and own ratios differ."""
    spread = np.log(1 + (RESPONSES / RESPONSE) ** 2) ** 0.5

    def draw(rng, truth):
        z, own, *noise = rng.standard_normal((4, n))
        size = RESPONSE * np.exp(spread * z - spread**2 / 2)
        return stats.ratio((truth + RATIOS * own) * size + NOISE * noise[0], size + NOISE * noise[1])

    return draw


def seeds(n: int, trained: int, spread: float) -> Draw:
    """A mean over behaviours and SAEs; a seed moves all behaviours by `spread`, and each by 0.5, of the
    standard deviation between them."""

    def draw(rng, truth):
        behaviour, seed = rng.standard_normal((n, 1)), spread * rng.standard_normal(trained)
        found = truth + behaviour + seed + 0.5 * rng.standard_normal((n, trained))
        return stats.over(found, lambda part: part.mean(0))

    return draw


def designs() -> list[Design]:
    def mean(name, draw, effect, said):
        return Design(f"mean of {name}", draw, effect, effect, said)

    def of_share(n, p):
        return Design(
            f"share, {p:g} of {n}", lambda rng, truth: stats.share(rng.random(n) < truth), p, 0.25, "0.25", False
        )

    shifts = "behaviours, skewed as shifts by an instruction are"
    rows = [mean(f"{n} behaviours", normal(n), 6.0, "6 nats") for n in (7, 12, 13)]
    rows += [mean(f"{n} {shifts}", skewed(n, SHIFT, LOG_SPREAD), SHIFT, "2.6 nats") for n in (7, 12, 13)]
    rows += [mean("those 7 in logs", skewed(7, 1, LOG_SPREAD, logs=True), LOG_SPREAD, "a factor of 1.9")]
    rows += [mean(f"{n} units, sd of their logs 1", skewed(n, 1, 1), 1.0, "the mean") for n in (7, 12)]
    rows += [mean("40 pairs", skewed(40, 1, 1, logs=True), 0.5, "half a sd")]
    rows += [mean("40 pairs, skewed as those shifts", skewed(40, 1, LOG_SPREAD), 0.5, "half the mean")]
    rows += [mean("56 conversations, over their 7 behaviours", talks(), 0.6, "0.6 sd")]
    rows += [Design(f"ratio of sums, {n} behaviours", ratio(n), 0.8, 0.5, "0.5 of 0.8") for n in (7, 12, 13)]
    rows += [of_share(n, p) for n, p in ((7, 0.5), (50, 0.5), (56, 0.5), (56, 0.02))]
    rows += [
        mean(f"{n} behaviours x {s} SAEs, seeds differ {much}", seeds(n, s, spread), 1.0, "1 sd")
        for s in (2, 3, 4)
        for n, spread, much in ((7, 0.2, "a fifth as much"), (7, 1.0, "as much"), (12, 1.0, "as much"))
    ]
    rows += [mean("350 items, as if they were sampled (wrong)", normal(7, flat=True), 6.0, "6 nats")]
    rows += [mean("those 56 conversations, one by one (wrong)", talks(flat=True), 0.6, "0.6 sd")]
    return rows


def rate(rule: Rule, studies: list[Interval], verdict: str) -> float:
    """How often the rule says `verdict` of studies that all beat their null."""
    return float(np.mean([rule.decide(Found(found, 0.0, True)) == verdict for found in studies]))


def drawn(design: Design, truth: float, studies: int, rng: np.random.Generator) -> tuple[list[Interval], str]:
    """That many studies, and how many were refused or came with a warning, in words."""
    found, refused = [], 0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        while len(found) < studies:
            try:
                found.append(design.draw(rng, truth))
            except ValueError:
                refused += 1
    said = [f"refused in {refused / (refused + studies):.0%}"] if refused > 0.005 * studies else []
    said += [f"warns in {len(warned) / studies:.0%}"] if len(warned) > 0.02 * studies else []
    return found, ", ".join(said)


def edges(truth: float, effect: float) -> list[Rule]:
    """Rules to whose threshold the truth sits exactly."""
    both = [claims.within(truth + side * effect, effect) for side in (1, -1)]
    return [claims.at_least(truth), claims.at_most(truth), *both]


def intervals(studies: int, seed: int) -> list[list]:
    """For each design: its name, coverage, false verdicts (the worst of the rules), powers, what was said."""
    rows = []
    for number, d in enumerate(designs()):
        rng = np.random.default_rng((seed, 1, number))
        found, said = drawn(d, d.truth, studies, rng)
        nothing = drawn(d, 0.0, studies, rng)[0] if d.none else []
        rules, t = edges(d.truth, d.effect), d.truth
        rows.append([
            d.name,
            d.said,
            float(np.mean([x.low <= t <= x.high for x in found])),
            max(rate(rule, found, "holds") for rule in rules),
            rate(claims.effect(d.effect), nothing, "holds") if d.none else None,
            max(rate(rule, found, "fails") for rule in [*rules, claims.effect(t)]),
            rate(claims.at_least(t - d.effect), found, "holds"),
            rate(claims.within(t, d.effect), found, "holds"),
            said,
        ])  # fmt: skip
    return rows


def seen(studies: int, seed: int) -> list[float]:
    """The power to tell from a threshold what the ledger says is told from it "four times in five", over 7 and 12 behaviours and 40 pairs."""
    found = []
    for draw in (normal(7), normal(12), skewed(40, 1, 1, logs=True)):
        some, _ = drawn(Design("", draw, 0.0, 0.0, ""), 0.0, studies, np.random.default_rng((seed, 2)))
        found.append(rate(claims.at_least(-float(np.mean([stats.seen(x) for x in some]))), some, "holds"))
    return found


# --- rules -------------------------------------------------------------------------------------------------------------


def by_rule(studies: int, seed: int) -> list[list]:
    """Each rule over 7 behaviours, in standard deviations between them: its words, false *holds*, false
    *fails*, and either verdict where it is right."""
    one = (BETWEEN**2 + WITHIN**2 / ITEMS) ** 0.5
    rng = np.random.default_rng((seed, 3))
    zero, _ = drawn(Design("", normal(7), 0.0, 0.0, ""), 0.0, studies, rng)

    def at(truth):
        return [Interval(*(truth + x / one for x in found)) for found in zero]

    rows = []
    for name, rule, no, yes, clear_yes, clear_no in (
        ("at_least(0)", claims.at_least(0), 0, 0, 1, -1),
        ("at_least(0, margin=1)", claims.at_least(0, margin=1), 0, 0, 1, -2),
        ("at_most(0)", claims.at_most(0), 0, 0, -1, 1),
        ("effect(1)", claims.effect(1), 0, 1, 1, 0),
        ("within(0, 1)", claims.within(0, 1), 1, 1, 0, 2),
        ("reproduces(10, 0.1)", claims.reproduces(10, 0.1), 11, 11, 10, 12),
    ):
        found = [(no, "holds"), (yes, "fails"), (clear_yes, "holds"), (clear_no, "fails")]
        rows.append([f"`{name}`", rule.words, *(rate(rule, at(truth), verdict) for truth, verdict in found)])
    return [*rows, identity(studies, seed)]


def identity(studies: int, seed: int) -> list:
    """300 cosines of 1 within bfloat16's rounding, as of notebook 04; false where the null alone is not 1."""
    rng, rule, said = np.random.default_rng((seed, 4)), claims.identity(1e-3), []
    for _ in range(studies):
        cosines = 1 - 1e-4 * np.abs(rng.standard_normal((2, 300)))
        data = Interval(cosines[0].mean(), cosines[0].min(), cosines[0].max())
        nulls = cosines[1].min(), cosines[1].min() - 2e-3
        said.append([rule.decide(Found(data, null, False)) for null in nulls])
    same, other = (np.array(column) for column in zip(*said, strict=True))
    wrong, missed = (other == "algebra").mean(), (same == "fails").mean()
    return [
        "`identity(0.001)`, 300 cosines",
        rule.words,
        wrong,
        missed,
        (same == "algebra").mean(),
        (other == "fails").mean(),
    ]


# --- p-values ----------------------------------------------------------------------------------------------------------


def families(studies: int, seed: int) -> list[list]:
    """Families of claims with nothing there, through the ledger: any that holds; then one of them with an
    effect of four standard deviations of its null: whether that one holds, and what is said if none can."""
    rows = []
    for draws in (100, 300, 500):
        for m in (1, 2, 4, 8):
            rng, ledger = np.random.default_rng((seed, 5, draws, m)), Ledger()
            ids = [f"{i}" for i in range(m)]
            for id in ids:
                ledger.state(id, "-", claims.at_least(-99), source="-", unit="-", over="-", null="-",
                             main=False, family="one")  # fmt: skip
            wrong = right = 0
            for _ in range(studies):
                values, nulls = rng.standard_normal(m), rng.standard_normal((m, draws))
                for id, value, null in zip(ids, values, nulls, strict=True):
                    last = ledger.judge(id, Interval(value, value - 1, value + 1), null)
                wrong += any(ledger[id].verdict == "holds" for id in ids)
                value = values[0] + 4
                last = ledger.judge("0", Interval(value, value - 1, value + 1), nulls[0])
                right += last.verdict == "holds"
            said = last.reason.partition("; ")[2] if not right else ""
            rows.append([f"{draws} draws, {m} claim{'s' * (m > 1)}", wrong / studies, right / studies, said])
    return rows


# --- change points -----------------------------------------------------------------------------------------------------


def remembering(rng: np.random.Generator, n: int, rho: float, jump: float) -> np.ndarray:
    """A stationary AR(1) series (n,) with standard deviation 1 and, from its middle on, a jump."""
    x = (1 - rho**2) ** 0.5 * rng.standard_normal(n)
    x[0] /= (1 - rho**2) ** 0.5
    for now in range(1, n):
        x[now] += rho * x[now - 1]
    x[n // 2 :] += jump
    return x


def changes(studies: int, seed: int) -> list[list]:
    """For each length and memory: the share of series with p <= 0.05, with no jump and with three."""
    rows = []
    for n in (24, 48, 96, 200):
        for rho in (0.0, 0.3, 0.6, 0.9):
            rng = np.random.default_rng((seed, 6, n, int(10 * rho)))
            found = []
            for jump in range(4):
                times = studies if not jump else min(studies, POWER_STUDIES)
                p = [stats.change_point(remembering(rng, n, rho, jump), draws=99, seed=i).p for i in range(times)]
                found.append(float(np.mean(np.array(p) <= 0.05)))
            rows.append([f"{n} values, rho {rho:g}", *found])
    return rows


# --- the page ----------------------------------------------------------------------------------------------------------

# Columns, and which misses are bold: -1 for a share that should not be too small, 1 for one too large.
INTERVALS = {
    "interval": 0, "effect": 0, "coverage": -1, "false *holds*, at the threshold": 1,
    "false *holds*, nothing there": 1, "false *fails*": 1, "effect is found": 0,
    "`within` effect, if equal": 0, "note": 0,
}  # fmt: skip
RULES = {
    "rule": 0, "in words": 0, "false *holds*, at its edge": 1, "false *fails*, at its edge": 1,
    "*holds* (*algebra*), one inside": 0, "*fails*, one outside": 0,
}  # fmt: skip
FAMILIES = {"family": 0, "any false *holds*": 1, "*holds*, at 4 sd of the null": 0, "note": 0}
CHANGES = {"series": 0, "no jump": 1, "jump of 1 sd": 0, "2 sd": 0, "3 sd": 0}


def cell(value: float | str | None, studies: int, sign: int) -> str:
    """A share with three digits, bold where it misses what is wanted by more than two standard errors."""
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    wanted = COVERED if sign < 0 else WRONG
    miss = sign and sign * (value - wanted) > 2 * (wanted * (1 - wanted) / studies) ** 0.5
    return f"**{value:.3f}**" if miss else f"{value:.3f}"


def table(head: dict[str, int], rows: list[list], studies: int) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [cell(value, studies, sign) for value, sign in zip(row, head.values(), strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(studies: int, seed: int) -> tuple[str, list[str]]:
    """All tables as Markdown, and the rows that miss what is wanted."""
    found = ", ".join(f"{x:.2f}" for x in seen(studies, seed))
    text = f"""### Which interval, at which size

{table(INTERVALS, intervals(studies, seed), studies)}

What the ledger says must be so "to be told four times in five" is told in a share of {found} of
studies: 7 behaviours, 12, 40 pairs.

### Which rule

Over 7 behaviours, in standard deviations between them.

{table(RULES, by_rule(studies, seed), studies)}

### p-values

{table(FAMILIES, families(studies, seed), studies)}

### `stats.change_point`

{table(CHANGES, changes(studies, seed), studies)}"""
    return text, [line.split(" | ")[0].strip("| ") for line in text.splitlines() if "**0." in line]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--studies", type=int, default=STUDIES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", default=str(ROOT / "docs" / "verdicts.md"))
    o = parser.parse_args(given)
    began = time.process_time()
    text, misses = tables(o.studies, o.seed)
    print(text)
    if o.studies >= STUDIES:
        with open(o.page, encoding="utf-8") as file:
            before, _, rest = file.read().partition(MARKS[0])
        with open(o.page, "w", encoding="utf-8") as file:
            file.write(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    seconds = round(time.process_time() - began, 1)
    print(json.dumps({"bench": "verdicts", "studies": o.studies, "seconds": seconds, "misses": misses}))


if __name__ == "__main__":
    main()
