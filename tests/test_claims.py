"""Verdicts come out of rules, by id; cells run twice change nothing; a number without interval and null is no result."""

import json
import re

import numpy as np
import pytest
import torch

from helpers import claims, nulls, session, stats, study
from helpers.stats import Interval
from helpers.steering import directions
from helpers.steering.caa import Halves

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


def test_little_can_be_claimed_without_a_null_that_leaves_less(ledger):
    for null, asked, unasked in ((0.5, "holds", "holds"), (0.0, "undecided", "holds")):
        assert judged(ledger, claims.at_most(0.4), (0.2, 0.1, 0.3), null).verdict == asked
        assert judged(ledger, claims.at_most(0.4, beats=False), (0.2, 0.1, 0.3), null).verdict == unasked
    assert judged(ledger, claims.at_most(0.4, 0.1, beats=False), (0.6, 0.55, 0.7)).verdict == "fails"


def test_what_cannot_be_judged_stands_beside_what_was_published(ledger):
    found = judged(ledger, claims.beside("other prompts"), (0.5, 0.5, 0.5), published=0.6)
    assert found.verdict == "not run" and found.value == 0.5 and "other prompts" in found.rule


def test_an_effect_too_small_to_matter_fails_and_one_inside_the_null_does_not(ledger):
    rule = claims.effect(0.5)
    assert judged(ledger, rule, (0.2, 0.1, 0.3)).verdict == "fails"  # there, and smaller than what would matter
    assert judged(ledger, rule, (1.0, 0.6, 1.4)).verdict == "holds"
    assert judged(ledger, rule, (0.3, -0.2, 0.8)).verdict == "undecided"
    inside = judged(ledger, rule, (1.0, 0.6, 1.4), np.linspace(-2, 2, 101))
    assert inside.verdict == "undecided" and inside.p > 0.05 and "four times in five" in inside.reason


def test_equivalence_is_containment(ledger):
    rule = claims.within(1.0, 0.1)
    for interval, verdict in (
        ((1, 0.95, 1.05), "holds"), ((1, 0.5, 1.5), "undecided"), ((1.5, 1.2, 1.8), "fails"), ((0.5, 0.2, 0.8), "fails"),
    ):  # fmt: skip
        assert judged(ledger, rule, interval).verdict == verdict


@pytest.mark.parametrize(
    "interval,null,verdict",
    [
        ((0.7, 0.6, 0.8), 0.7, "holds"),
        ((0.7, 0.6, 0.8), 0.3, "undecided"),  # true of the value alone
        ((0.45, 0.3, 0.6), 0.7, "undecided"),
        ((0.3, 0.2, 0.35), 0.7, "fails"),
    ],
)
def test_what_anything_gives_holds_only_with_its_null(ledger, interval, null, verdict):
    assert judged(ledger, claims.of_anything(0.5, 0.1), interval, null).verdict == verdict


@pytest.mark.parametrize(
    "interval,null,verdict",
    [
        ((1, 0.9, 1.1), 1.0, "artefact"),
        ((1, 0.9, 1.1), 2.0, "undecided"),
        ((1, 0.7, 1.1), 1.0, "undecided"),
        ((2, 1.5, 2.5), 1.0, "holds"),
        ((0.5, 0.3, 0.7), 1.0, "fails"),
    ],
)
def test_a_number_that_the_method_gives_on_nothing_is_an_artefact(ledger, interval, null, verdict):
    assert judged(ledger, claims.of_the_method(0.8, 1.25), interval, null).verdict == verdict


def test_algebra_needs_noise_to_be_the_same(ledger):
    rule = claims.identity(1e-6)
    assert judged(ledger, rule, (1, 1, 1), 1.0).verdict == "algebra"
    assert judged(ledger, rule, (1, 1, 1), 0.3).verdict == "fails"
    assert judged(ledger, rule, (0.9, 0.8, 1), 1.0).verdict == "fails"


def test_a_published_number_is_reproduced_by_the_whole_interval_and_not_by_the_null(ledger):
    rule = claims.reproduces(0.5, 0.02)
    assert judged(ledger, rule, (0.505, 0.5, 0.509), 0.1, published=0.5).verdict == "holds"
    assert "| 0.5 (gap +0.005) |" in ledger.table()
    for interval, null, verdict in (
        ((0.6, 0.55, 0.65), 0.1, "fails"),
        ((0.5, 0.4, 0.6), 0.1, "undecided"),  # too wide to say
        ((0.5, 0.495, 0.505), 0.5, "undecided"),  # chance gives it too
        ((-0.5, -0.505, -0.495), 0.5, "fails"),
    ):
        assert judged(ledger, rule, interval, null).verdict == verdict


@pytest.mark.parametrize(
    ("rule", "yes", "no", "between"),
    [
        (claims.at_least(2), 5, -1, 2),
        (claims.at_least(2, margin=1), 5, -1, 2),
        (claims.at_most(2), -1, 5, 2),
        (claims.effect(1), 4, -1, 0.5),
        (claims.within(2, 2), 2, 6, 4),
        (claims.reproduces(10, 0.2), 10, 6, 8),
    ],
)
def test_every_rule_knows_a_yes_a_no_and_what_lies_between(ledger, rule, yes, no, between):
    """Seven behaviours around a truth, whose interval is 1 either way; docs/verdicts.md has how often rules err."""
    behaviours = np.arange(-3, 4) / 2
    for truth, verdict in ((yes, "holds"), (no, "fails"), (between, "undecided")):
        found = judged(ledger, rule, stats.over(truth + behaviours), -99.0 * rule.sign)
        assert found.verdict == verdict
        assert f"**{verdict}**" in ledger.reading("t.1") and found.rule == rule.words
    assert (
        f"To be told from the threshold four times in five, a value must lie {claims.number(stats.seen(found.interval))} beyond it"
        == found.reason
    )


def test_an_artefact_is_there_with_the_mistake_and_gone_without_it(ledger):
    rule = claims.by_mistake(0.99, 0.0)
    assert judged(ledger, rule, (-0.3, -0.4, -0.2), 1.0).verdict == "artefact"
    assert judged(ledger, rule, (-0.3, -0.4, -0.2), 0.5).verdict == "fails"  # the mistake was not found again
    assert judged(ledger, rule, (0.995, 0.992, 0.998), 1.0).verdict == "holds"
    assert judged(ledger, rule, (0.5, 0.4, 0.6), 1.0).verdict == "undecided"


def test_a_claim_whose_condition_is_missing_is_not_run_whatever_its_number(ledger):
    ledger.state("t.1", "a thing", claims.at_least(0), **SAID)
    refused = ledger.judge("t.1", Interval(1, 0.5, 1.5), 0.0, unless="the gate refuses")
    assert refused.verdict == "not run" and refused.reason == "the gate refuses" and refused.value is None
    assert ledger.judge("t.1", Interval(1, 0.5, 1.5), 0.0, unless="").verdict == "holds"


def test_a_cell_of_a_table_is_escaped_once():
    assert claims.table(["a"], [["x | y"], [r"x \| y"]]).data.splitlines()[2:] == [r"| x \| y |"] * 2


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


def test_a_family_has_no_verdicts_before_all_of_it_are_judged(ledger):
    for i in range(3):
        ledger.state(f"f.{i}", f"thing {i}", claims.at_least(0), **SAID, family="things")
    first = ledger.judge("f.0", Interval(98.5, 97, 99), np.arange(99.0))
    assert not first.verdict and first.p is None and "with f.1, f.2" in ledger.reading("f.0")
    ledger.judge("f.1", Interval(3.0, 2, 4), 1.0)  # one number for a null: no p-value, nothing to correct for
    assert not ledger["f.1"].verdict
    ledger.not_run("f.2", "no reason")
    assert ledger["f.0"].p == 0.01 and ledger["f.0"].verdict == ledger["f.1"].verdict == "holds"


def test_draws_too_few_for_their_family_are_named(ledger):
    for i in range(2):
        ledger.state(f"f.{i}", f"thing {i}", claims.at_least(0), **SAID, family="things")
    for i in range(2):
        ledger.judge(f"f.{i}", Interval(98.5, 97, 99), np.arange(30.0))
    few = ledger["f.0"]
    assert few.verdict == "undecided" and "30 draws are too few, p cannot fall below 0.065" in few.reason
    for i in range(2):
        ledger.judge(f"f.{i}", Interval(98.5, 97, 99), np.arange(40.0))
    assert ledger["f.0"].verdict == "holds" and "draws" not in ledger["f.0"].reason


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

    def decide(parts):
        return "holds" if set(parts) == {"holds"} else "undecided"

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
    with pytest.raises(ValueError, match="no folder to save in"):
        claims.Ledger().save("Words.", {})
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
    ledger.save("Words.", {"n": 3})
    result = json.loads((ledger.session.results / f"{ledger.session.notebook}.json").read_text())
    assert result["claims"][0]["verdict"] == "holds" and result["claims"][0]["rule"] == claim.rule
    assert result["profile"] == "smollm2" and result["parameters"] == {"n_items": 5} and result["layer"] == 14
    assert claims.markdown(result["claims"]) == ledger.table() and "a \\| thing" in ledger.table()


def test_what_hoards_is_an_artefact_and_what_does_not_is_not(ledger):
    for id, value, null, verdict in (
        ("h.1", (0.8, 0.7, 0.9), 0.01, "artefact"),
        ("h.2", (0.8, 0.7, 0.9), 0.2, "undecided"),
        ("h.3", (0.02, 0.01, 0.04), 0.01, "holds"),
        ("h.5", (0.45, 0.4, 0.48), 0.01, "undecided"),  # much is explained by one row, if not most
        ("h.4", (0.5, 0.4, 0.6), 0.01, "undecided"),
    ):
        ledger.state(id, "a few hold it all", claims.artefact(0.5, 0.05), **SAID)
        assert ledger.judge(id, Interval(*value), null).verdict == verdict


def test_a_ratio_without_a_denominator_is_not_run(ledger):
    ledger.state("r.1", "a ratio", claims.at_least(0), **SAID)
    assert ledger.judge("r.1", None, 0.0).verdict == "not run"


def test_a_table_keeps_its_cells_whole():
    assert claims.table(["a", "b"], [["x|y", "two\nlines"]]).data == "| a | b |\n| --- | --- |\n| x\\|y | two lines |"


def test_a_claim_can_be_added_from_the_page_alone(ledger):
    """The example of docs/verdicts.md runs, ten lines at most, on vectors that agree by a known amount."""
    page = (session.ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    assert 0 < len(code.splitlines()) <= 10
    assert set(re.findall(r"lab\.(\w+)", page)) <= {*dir(study.Single), *study.Single.__dataclass_fields__}

    class Lab:
        names, layer = ["joy", "anger", "format"], 1

        def halves(self, kind):
            """Pairs whose mean differences are 2, 3 and 4 times as long in answers as in system prompts."""
            g = torch.Generator().manual_seed(0)
            pairs = {n: torch.randn(2, 40, 8, generator=g, dtype=torch.float64) * 0.01 for n in self.names}
            for i, x in enumerate(pairs.values()):
                x[0] += (i + 2 if kind == "answer pairs" else 1) - (x[0] - x[1]).mean(0)
            return {n: Halves(x[0][:, None], x[1][:, None], [1], 0, 0.0) for n, x in pairs.items()}

    exec(code, {"lab": Lab(), "ledger": ledger, "claims": claims, "stats": stats, "np": np, "nulls": nulls,
                "directions": directions, "Markdown": str})  # fmt: skip
    claim = ledger["02.8"]
    assert claim.value == pytest.approx(24 ** (1 / 3)) and claim.verdict in ("holds", "undecided") and claim.p < 0.05
    for rule in (claims.at_least(0, margin=1), claims.at_most(0), claims.effect(1), claims.within(0, 1)):
        assert rule.words in page
