"""Verdicts come out of rules; every control fires on a planted case and is silent on a sound one."""

import json

import pytest

from helpers import claims, session
from helpers.stats import Interval


def judged(rule, interval, null=0.0):
    return claims.judge(rule, "t.1", "a thing", "a source", Interval(*interval), null, "units").verdict


@pytest.mark.parametrize(
    "interval,verdict", [((1, 0.95, 1.1), "holds"), ((0.5, 0.4, 0.6), "fails"), ((0.9, 0.8, 1.0), "undecided")]
)
def test_above(interval, verdict):
    assert judged(claims.above(0.9, "x"), interval) == verdict


def test_above_needs_the_null_to_be_cleared_too():
    assert judged(claims.above(0.9, "x"), (1.5, 1.2, 1.8), null=1.3) == "undecided"


@pytest.mark.parametrize("null,verdict", [(0.2, "holds"), (2.0, "fails"), (1.0, "undecided")])
def test_beyond_null(null, verdict):
    assert judged(claims.beyond_null("x", "the null"), (1, 0.8, 1.2), null) == verdict


def test_identity_needs_the_null_to_be_one_too():
    rule = claims.identity("the cosine", 1e-6)
    assert judged(rule, (1, 1, 1), 1.0) == "algebra"
    assert judged(rule, (1, 1, 1), 0.3) == "fails" and judged(rule, (0.9, 0.8, 1), 1.0) == "fails"


def test_a_number_without_interval_or_null_is_not_a_result():
    rule = claims.above(0, "x")
    for value, null in (
        (Interval(1, float("nan"), 2), 0.0),
        (Interval(1, 0, 2), float("nan")),
        (Interval(3, 0, 2), 0.0),
    ):
        with pytest.raises(ValueError, match="claim t.1"):
            claims.judge(rule, "t.1", "s", "s", value, null, "u")
    with pytest.raises(ValueError, match="a verdict is one of"):
        judged(claims.Rule("odd", lambda *_: "maybe"), (1, 0, 2))


def test_saved_claims_read_back_and_ids_are_unique(monkeypatch, tmp_path):
    monkeypatch.setenv("REPORT_DIR", str(tmp_path))
    s = session.start("00_base", n_items=5)
    claim = claims.judge(claims.above(0, "x"), "t.1", "a | thing", "src", Interval(1, 0.5, 2), 0.1, "nats")
    result = json.loads(claims.save(s, "Words.", [claim], {"n": 3}).read_text())
    assert (
        result["claims"][0]["verdict"] == "holds"
        and result["claims"][0]["rule"] == claim.rule
        and result["profile"] == "smollm2"
    )
    assert result["parameters"] == {"n_items": 5} and result["layer"] == 14
    assert "a \\| thing" in claims.markdown([claim]) and claims.markdown(result["claims"]) == claims.markdown([claim])
    with pytest.raises(ValueError, match="share an id"):
        claims.save(s, "", [claim, claim], {})


def test_a_published_number_stands_beside_ours_with_the_gap():
    rule = claims.reproduces(0.5, 0.02)
    near = claims.judge(rule, "1.1", "as published", "there", Interval(0.505, 0.5, 0.51), 0.1, "share", 0.5)
    assert near.verdict == "holds" and "| 0.5 (gap +0.005) |" in claims.markdown([near])
    for value, null in ((0.6, 0.1), (0.5, 0.5)):
        far = claims.judge(rule, "1.1", "as published", "there", Interval(value, value, value), null, "share", 0.5)
        assert far.verdict == "fails"


def test_below_is_above_turned_round_and_a_refusal_is_never_judged():
    for value, null, verdict in (
        ((0.1, 0.0, 0.2), 1.0, "holds"), ((0.1, 0.0, 0.2), 0.15, "undecided"), ((0.9, 0.8, 1.0), 2.0, "fails"), ((0.5, 0.1, 0.9), 2.0, "undecided"),
    ):  # fmt: skip
        assert claims.below(0.5, "x").decide(Interval(*value), null) == verdict
    refused = claims.refused("two constants")
    assert refused.decide(Interval(1, 1, 1), 0) == "not run" and "two constants" in refused.words
