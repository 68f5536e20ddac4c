"""Verdicts come out of rules, by id; cells run twice change nothing; a number without interval and null is no result."""

import json

import numpy as np
import pytest

from helpers import claims, session
from helpers.stats import Interval

SAID = dict(source="a source", unit="units", over="behaviours", null="random vectors")


@pytest.fixture
def ledger(monkeypatch, tmp_path):
    monkeypatch.setenv("REPORT_DIR", str(tmp_path))
    return claims.Ledger(session.start("00_base", n_items=5))


def judged(ledger, rule, interval, null=0.0, **more):
    ledger.state("t.1", "a thing", rule, **SAID, **more)
    return ledger.judge("t.1", Interval(*interval), null)


@pytest.mark.parametrize(
    "interval,verdict",
    [
        ((1, 0.95, 1.1), "holds"),
        ((0.5, 0.4, 0.6), "fails"),
        ((0.82, 0.79, 0.85), "undecided"),  # clearly below, by less than the margin
        ((0.9, 0.8, 1.0), "undecided"),
    ],
)
def test_at_least_and_at_most_are_one_rule_turned_round(ledger, interval, verdict):
    assert judged(ledger, claims.at_least(0.9, 0.1), interval).verdict == verdict
    turned = tuple(-x for x in (interval[0], interval[2], interval[1]))
    assert judged(ledger, claims.at_most(-0.9, 0.1), turned).verdict == verdict


def test_an_effect_too_small_to_matter_fails_and_one_inside_the_null_does_not(ledger):
    rule = claims.effect(0.5)
    assert judged(ledger, rule, (0.2, 0.1, 0.3)).verdict == "fails"  # there, and smaller than what would matter
    assert judged(ledger, rule, (1.0, 0.6, 1.4)).verdict == "holds"
    assert judged(ledger, rule, (0.3, -0.2, 0.8)).verdict == "undecided"
    inside = judged(ledger, rule, (1.0, 0.6, 1.4), np.linspace(-2, 2, 101))
    assert inside.verdict == "undecided" and inside.p > 0.05 and "would have been seen" in inside.reason


def test_equivalence_is_containment(ledger):
    rule = claims.within(1.0, 0.1)
    for interval, verdict in (
        ((1, 0.95, 1.05), "holds"), ((1, 0.5, 1.5), "undecided"), ((1.5, 1.2, 1.8), "fails"), ((0.5, 0.2, 0.8), "fails"),
    ):  # fmt: skip
        assert judged(ledger, rule, interval).verdict == verdict


def test_algebra_and_reproduction_need_the_null_too(ledger):
    rule = claims.identity(1e-6)
    assert judged(ledger, rule, (1, 1, 1), 1.0).verdict == "algebra"
    assert judged(ledger, rule, (1, 1, 1), 0.3).verdict == judged(ledger, rule, (0.9, 0.8, 1), 1.0).verdict == "fails"
    again = claims.reproduces(0.5, 0.02)
    assert judged(ledger, again, (0.505, 0.5, 0.51), 0.1, published=0.5).verdict == "holds"
    assert "| 0.5 (gap +0.005) |" in ledger.table()
    assert (
        judged(ledger, again, (0.6, 0.6, 0.6), 0.1).verdict
        == judged(ledger, again, (0.5, 0.5, 0.5), 0.5).verdict
        == "fails"
    )


def test_an_artefact_is_there_with_the_mistake_and_gone_without_it(ledger):
    rule = claims.artefact(0.4, 0.1)
    assert judged(ledger, rule, (0.01, 0.01, 0.01), 0.5).verdict == "artefact"
    assert judged(ledger, rule, (0.01, 0.01, 0.01), 0.2).verdict == "fails"  # the mistake does not make it either
    assert judged(ledger, rule, (0.5, 0.45, 0.6), 0.5).verdict == "holds"
    assert judged(ledger, rule, (0.2, 0.05, 0.3), 0.5).verdict == "undecided"


def test_p_values_count_the_draws_and_are_corrected_within_a_family(ledger):
    draws = np.arange(99.0)
    for i in range(3):
        ledger.state(f"f.{i}", f"thing {i}", claims.at_least(0), **SAID, family="things")
    for i, value in enumerate((98.5, 97.5, 200.0)):
        assert not ledger["f.0"].verdict  # none alone: the others would still move its p-value
        ledger.judge(f"f.{i}", Interval(value, value - 1, value + 1), draws)
    with pytest.raises(ValueError, match="state all of a family first"):
        ledger.state("f.3", "late", claims.at_least(0), **SAID, family="things")
    ledger.state("g.0", "alone", claims.at_least(0), **SAID)
    alone = ledger.judge("g.0", Interval(97.5, 96.5, 98.5), draws)
    assert alone.p == 0.02 and alone.verdict == "holds" and alone.null_value == 94.0
    assert [ledger[f"f.{i}"].p for i in range(3)] == [0.03, 0.03, 0.03]
    ledger.state("l.0", "less", claims.at_most(0), **SAID)
    less = ledger.judge("l.0", Interval(-98.5, -99.5, -97.5), -draws)
    assert less.p == 0.01 and less.null_value == -94.0 and less.verdict == "holds"


def test_a_cell_that_runs_again_replaces_what_it_said_and_nothing_else(ledger):
    for _ in range(2):
        ledger.state("t.1", "a thing", claims.at_least(0), **SAID)
        ledger.state("t.2", "another", claims.at_least(0), **SAID)
        for _ in range(2):
            ledger.judge("t.1", Interval(1, 0.5, 1.5), 0.0)
            ledger.judge("t.2", Interval(-1, -1.5, -0.5), 0.0)
    assert [c.verdict for c in ledger] == ["holds", "fails"]
    ledger.judge("t.1", Interval(-1, -1.5, -0.5), 0.0)
    assert [c.verdict for c in ledger] == ["fails", "fails"]
    ledger.state("t.1", "a thing", claims.at_least(-2), **SAID)  # another rule: the old number is not judged by it
    assert ledger["t.1"].verdict == "" and ledger["t.2"].verdict == "fails"


def test_verdicts_that_follow_from_others_follow_them(ledger):
    for id in ("a", "b"):
        ledger.state(id, id, claims.at_least(0), **SAID)
        ledger.judge(id, Interval(1, 0.5, 1.5), 0.0)
    ledger.state("both", "both", claims.Rule("holds if a and b do", lambda found: ""), **SAID)
    decide = lambda parts: "holds" if set(parts) == {"holds"} else "undecided"
    assert ledger.combine("both", ["a", "b"], decide).verdict == "holds"
    ledger.not_run("b", "there is no b")
    assert ledger["both"].verdict == "undecided" and "b not run" in ledger["both"].reason
    assert "**not run** (there is no b)" in ledger.reading("b")


def test_what_is_no_result_is_refused(ledger):
    ledger.state("t.1", "a thing", claims.at_least(0), **SAID)
    nan = float("nan")
    for value, null in (
        (Interval(1, nan, 2), 0.0),
        (Interval(1, 0, 2), nan),
        (Interval(3, 0, 2), 0.0),
        (Interval(1, 0, 2), []),
    ):
        with pytest.raises(ValueError, match="claim t.1"):
            ledger.judge("t.1", value, null)
    with pytest.raises(ValueError, match="not stated; stated are t.1"):
        ledger.judge("t.2", Interval(1, 0, 2), 0.0)
    with pytest.raises(ValueError, match="stated and not judged"):
        ledger.save("Words.", {})
    with pytest.raises(ValueError, match="a verdict is one of"):
        judged(ledger, claims.Rule("odd", lambda found: "maybe"), (1, 0, 2))
    with pytest.raises(ValueError, match="has no number"):
        f"{ledger['t.1'] if ledger.not_run('t.1', 'no reason') else ''}"


def test_five_claims_are_the_argument_and_a_sixth_is_refused(ledger):
    for i in range(5):
        ledger.state(f"m.{i}", "main", claims.at_least(0), **SAID)
    ledger.state("also", "beside", claims.at_least(0), **SAID, main=False)
    with pytest.raises(ValueError, match="main=False"):
        ledger.state("m.5", "one too many", claims.at_least(0), **SAID)
    assert "m.5" not in [c.id for c in ledger]


def test_saved_claims_read_back_as_they_were_shown(ledger):
    ledger.state("t.1", "a | thing", claims.at_least(0), **SAID)
    assert "**Claim t.1** (a source): *a | thing*" in claims.stated(ledger["t.1"]) and "holds if" in claims.stated(
        ledger["t.1"]
    )
    claim = ledger.judge("t.1", Interval(1, 0.5, 2), [0.1, 0.2, 0.0] * 30, ceiling=3.0)
    assert f"{claim:.0%}" == "100% [50%, 200%]" and "ceiling 3" in ledger.reading("t.1")
    result = json.loads(ledger.save("Words.", {"n": 3}).read_text())
    assert result["claims"][0]["verdict"] == "holds" and result["claims"][0]["rule"] == claim.rule
    assert result["profile"] == "smollm2" and result["parameters"] == {"n_items": 5} and result["layer"] == 14
    assert claims.markdown(result["claims"]) == ledger.table() and "a \\| thing" in ledger.table()
