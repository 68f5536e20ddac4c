"""The entrance of a notebook: what it gives is what the rooms give one by one."""

import copy
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HARVEST, a_profile
from test_decompose import sae_of

from helpers import claims, comparisons, nulls, stats, study
from helpers.lm import reading, scoring, tokens
from helpers.lm.reading import LM
from helpers.pair import mixtures
from helpers.sae import activations, evaluation, evidence
from helpers.sae.activations import Array
from helpers.sae.latents import Latent
from helpers.steering import behaviors, caa, directions, propensity


class Session:
    """A session's parts that a study reads."""

    def __init__(self, fast=True, **given):
        self.fast, self.device, self.dtype, self.profile = fast, "cpu", torch.float32, a_profile(**given)


@pytest.fixture
def lab(tiny):
    data = {n: behaviors.trim(behaviors.load_behavior(n), 4, 3) for n in ("joy", "refusal", "anger")}
    return study.Single(Session(), tiny, 1, [0, 1], data)


def test_vectors_are_the_mean_differences_and_steps_have_one_length(lab):
    for kind in (study.ANSWERS, study.SYSTEM):
        for n, h in lab.halves(kind).items():
            assert torch.equal(lab.vectors(kind)[n], directions.mean(*h.at(1)))
            assert float(lab.steps(kind, 0.3)[n].norm()) == pytest.approx(0.3 * lab.residual_norm)


def test_nulls_are_as_long_as_the_vector_and_others_are_the_others(lab):
    found = lab.nulls("joy", 5)
    v = lab.vectors()["joy"]
    assert {len(x) for n, x in found.items() if n != study.OTHERS} == {5} and len(found[study.OTHERS]) == 2
    for x in found.values():
        torch.testing.assert_close(x.norm(dim=1), v.norm().expand(len(x)))
    other = lab.vectors()["refusal"]
    torch.testing.assert_close(found[study.OTHERS][0], other / other.norm() * v.norm())


def test_a_small_step_is_what_the_gradient_says(lab):
    vectors = torch.stack([lab.vectors()["joy"], lab.vectors()["anger"]])
    small = lab.change("joy", vectors, 1e-3), lab.response("joy", vectors, 1e-3)
    assert small[0].shape == small[1].shape == (2, 3)
    np.testing.assert_allclose(*small, atol=2e-4)


def test_the_response_by_layer_is_that_of_the_layer(lab):
    own, chance = lab.by_layer(length=0.1)
    assert own["joy"].shape == chance["joy"].shape == (2,)
    where = lab.data["joy"]._replace(test=lab.data["joy"].dev)
    alone = study.Single(Session(), lab.model, 1, [0, 1], {**lab.data, "joy": where})
    expected = alone.response("joy", lab.vectors()["joy"][None], 0.1).mean()
    assert own["joy"][1] == pytest.approx(float(expected), rel=1e-4)
    tested, _ = lab.by_layer(length=0.1, part="test", items=2)
    expected = lab.response("joy", lab.vectors()["joy"][None], 0.1, 2).mean()
    assert tested["joy"][1] == pytest.approx(float(expected), rel=1e-4)


def test_slopes_are_the_gradients_of_every_layer(lab):
    slopes = lab.slopes(2)
    assert slopes["joy"].shape == (2, 2, lab.model.d_model)
    np.testing.assert_allclose(slopes["joy"][1], lab.gradients(2)["joy"], atol=1e-5)
    assert lab.slopes(part="dev")["joy"].shape[1] == len(lab.data["joy"].dev)


def test_lengths_are_those_of_every_prompt_alone(lab):
    found = lab.lengths
    assert found.first.shape == found.user.shape == (2, len(lab._prompts)) and found.stream.shape == (2,)
    for i in (0, len(lab._prompts) - 1):
        laid = lab._prompts[i]
        rows = reading.residuals(lab.model, [laid], 1)[0].norm(dim=1)
        own = rows[torch.tensor(laid.roles) == tokens.USER].median()
        for x, expected in zip(found[:3], (rows[0], rows[1], own), strict=True):
            assert x[1, i] == pytest.approx(float(expected), rel=1e-4)
    assert found.stream[1] == pytest.approx(lab.residual_norm, rel=1e-5)


def test_vectors_that_know_nothing_of_a_case_weigh_the_same_tokens_at_every_layer(lab):
    cases = [(study.ANSWERS, "joy", lab.layer), (study.SYSTEM, "joy", lab.layer), (study.ANSWERS, "joy", 0)]
    own, system, below = lab.unlike(cases, 5)
    assert own.shape == (5, lab.model.d_model) and own.norm(dim=1).numpy() == pytest.approx(np.ones(5))
    torch.testing.assert_close(own, nulls.like_rows(own[0], lab.residuals, 5))
    torch.testing.assert_close(below, nulls.like_rows(own[0], reading.rows(lab.model, lab._prompts, 0), 5))
    assert not torch.allclose(own, system)


@pytest.mark.parametrize("measure", propensity.MEASURES)
def test_changes_by_own_and_foreign_instructions_and_vectors(measure, lab):
    told, pushed = lab.instructed(measure, 2), lab.steered(measure, 2, 0.01)
    for found, foreign in ((told, 2), (pushed, 4)):
        assert {n: (len(x.own), len(x.foreign)) for n, x in found.items()} == dict.fromkeys(lab.names, (2, foreign))
    b, other = lab.data["joy"], lab.data["refusal"]  # the next of the list is the first item's foreign one
    alone = propensity.instructed(lab.model, measure, b.test[:1], 1, b.system_pairs[:1])
    assert told["joy"].own[0] == pytest.approx(alone[0], abs=1e-3)
    alone = propensity.instructed(lab.model, measure, b.test[:1], 1, other.system_pairs[:1])
    assert told["joy"].foreign[0] == pytest.approx(alone[0], abs=1e-3)
    v = lab.vectors()["joy"]
    where = propensity.MEASURES[measure](lab.model, b.test[:2], 1)
    step = scoring.log_odds(where, [v / v.norm() * lab.residual_norm], [0.0, 0.01])[0]
    np.testing.assert_allclose(pushed["joy"].own, propensity.content(measure, step[1] - step[0]), atol=2e-3)


def test_what_stands_in_for_the_stream_costs_what_it_gets_wrong(lab, monkeypatch):
    ids, kept = torch.randint(100, 4000, (3, 12)), torch.ones(3, 12, dtype=torch.bool)
    kept[:, 0] = False
    some = evaluation.Spliceable(ids, kept, np.array([4, 4, 7]))
    monkeypatch.setattr(study.evaluation, "spliceable", lambda samples, rows, seed: some)
    rows = activations.Array(reading.packed(lab.model, ids, [1])[1].flatten(0, 1))
    rows.limit = 1e9
    lab.__dict__["text"] = (rows, rows)
    whole, half = (evaluation.Principal(rows.tensor, k) for k in (48, 2))
    found = lab.loss_added({"whole": whole, "half": half}, 3)
    assert list(found) == ["whole", "half", study.MEAN] and all(x.shape == (2,) for x in found.values())
    np.testing.assert_allclose(found["whole"], 0, atol=1e-3)
    assert np.abs(found["half"]).max() > 0.01 and np.abs(found[study.MEAN]).max() > 0.01


def test_marked_tokens_are_those_read_and_written(lab):
    lines = lab.marked("joy").data.splitlines()[2:]
    assert len(lines) == 3 and "every generated token" in lines[2]
    answer = lab.data["joy"].answer_pairs[0].positive
    assert "".join(re.findall("«(.*?)»", lines[0])).replace("\\", "").strip() == answer
    assert lines[1].count("«") == 1 and lines[2].count("«") == 1


def test_tables_show_pairs_and_replies(lab):
    assert lab.contrast("joy", rows=2).data.count("\n") == 3
    said = lab.say("What is tin?", {"joy": lab.vectors()["joy"]}, 0.1, tokens=3).data
    assert "| nothing |" in said and "| joy |" in said
    rows = lab.says({"mean": lab.vectors()}, [-0.1, 0.2], tokens=3).data.splitlines()
    assert rows[0] == "| asked | nothing | mean, -0.1 | mean, +0.2 |" and len(rows) == 5
    assert rows[2].startswith(f"| **joy**: {lab.data['joy'].open[0]} |")


def test_a_fast_run_has_few_behaviours_and_the_first_lead():
    data = study._data(Session(behaviors=["refusal", "anger", "joy", "format"]), ["joy"])
    assert list(data)[0] == "joy" and len(data) == study.FAST_BEHAVIORS
    assert all(len(b.answer_pairs) == study.FAST_PAIRS for b in data.values())


@pytest.fixture
def two(tiny, cache, monkeypatch):
    """A model with two small behaviours, its residual norm taken as 10."""
    data = {n: behaviors.trim(behaviors.load_behavior(n), pairs=3, items=4) for n in ("joy", "format")}
    monkeypatch.setattr(study.Single, "residual_norm", 10.0)
    return study.Single(Session(), tiny, 1, [1], data)


def test_padded_pairs_are_read_over_all_positions(two):
    for n, b in two.data.items():
        alone = caa.extract_padded(two.model, b.system_pairs, [1], ["masked", "after"])
        torch.testing.assert_close(two.vectors(study.PADDED)[n], directions.mean(*alone["masked"].at(1)))
        torch.testing.assert_close(two.parts()[n]["after"].at(1), alone["after"].at(1))
    assert two.nulls("joy", 5, kind=study.PADDED)[study.SHUFFLED].shape == (5, 48)


def test_the_sources_own_vectors_are_of_one_pair_and_every_position(two):
    pairs = two.data["joy"].system_pairs
    read = caa.extract_padded(two.model, pairs, [1], ["every"], attend_filler=True)["every"].at(1)
    assert list(two.as_source_001()) == ["joy", "format"]
    for one, other, all_of_them in zip(
        two.as_source_001()["joy"], read, two.as_source_001(["joy"], 0)["joy"], strict=True
    ):
        torch.testing.assert_close(one, other[:1])
        torch.testing.assert_close(all_of_them, other)


def test_responses_are_gradients_times_vectors_of_one_length(two):
    vectors = {n: torch.randn(3, 48) for n in two.names}
    found = two.responses(vectors, 0.1)
    gradient = two.gradients()["format"].mean(0)
    v = vectors["format"][2].double()
    assert found.shape == (3, 2) and found[2, 1] == pytest.approx(float(gradient @ (v / v.norm()).numpy()))


def test_differences_average_to_the_vectors_and_answers_are_read_where_asked(lab):
    for kind, where in ((study.SYSTEM, ""), (study.PADDED, ""), (study.ANSWERS, "turn")):
        for n, rows in lab.differences(kind, where).items():
            torch.testing.assert_close(rows.mean(0), lab.vectors(kind, where)[n])
    assert not torch.equal(lab.vectors(where="turn")["joy"], lab.vectors(where="last")["joy"])
    chosen = lab.vectors(where=lab.session.profile.answers)["joy"]
    assert torch.equal(lab.vectors()["joy"], chosen)


def test_ways_are_compared_item_by_item_at_one_length(lab, monkeypatch):
    many = {n: torch.randn(3, 48) * torch.tensor([[1.0], [5.0], [0.1]]) for n in lab.names}
    found = lab.compare({"many": many, "one": {n: v[0] for n, v in many.items()}}, 0.1)
    np.testing.assert_allclose(found.changes["many"]["joy"], lab.response("joy", many["joy"], 0.1).mean(0))
    np.testing.assert_allclose(found.changes["one"]["joy"], lab.response("joy", many["joy"][:1], 0.1)[0])
    assert found.mean("one")[0] == pytest.approx(found.changes["one"]["joy"].mean())
    assert found.over("one") == stats.over(found.mean("one"))
    fixed = {
        "all": {n: np.array([2.0, 3.0, 4.0]) + i for i, n in enumerate("abc")},
        "half": {n: np.array([-1.0, 2.0, 5.0]) + i for i, n in enumerate("abc")},
    }
    two = comparisons.Compared(fixed | {"none": {n: np.array([-1.0, 1.0, 0.0]) for n in "abc"}}, 0.1)
    assert two.ratio("half", "all").value == pytest.approx(3 / 4) and two.ratio("all", "none") is None
    assert two.ahead("all", "half").data == "*all* is ahead of *half* in 3 of 3 behaviours."
    assert two.ahead("half", "all").data.endswith("in 0 of 3 behaviours, not in a, b, c.")
    behind = comparisons.Compared({"up": fixed["all"], "down": {n: -x for n, x in fixed["all"].items()}}, 0.1)
    assert behind.ahead("up", "down").data.endswith("3 of 3 behaviours. Backwards go a, b, c (*down*).")
    rows = two.table().data.splitlines()
    assert rows[2].startswith("| all | +4.00") and rows[2].endswith("| 0% | 3 |") and "| 11% | 0 |" in rows[3]
    drawn = {}
    monkeypatch.setattr(comparisons.figures, "forest", lambda *args, **given: drawn.update(given, series=args[3]))
    said = claims.Claim("1", "all is well", "", "", "", "", "", verdict="holds")
    two.figure(None, "f", ["all"], np.zeros((5, 3)), "null", said)
    assert drawn["title"] == "All is well:" and drawn["verdict"] == "holds"
    assert drawn["series"]["half"] is None and len(drawn["series"]["all"]) == 3 and len(drawn["null"]) == 4
    monkeypatch.setattr(
        comparisons.figures, "forests", lambda s, name, rows, panels: drawn.update(rows=rows, panels=panels)
    )
    two.versus(None, "f", "all", "half", np.zeros((5, 3)), "null", said)
    (left, right), (gained,) = drawn["panels"].values(), drawn["panels"]["All: more than half?"]["series"].values()
    assert drawn["rows"] == ["a", "b", "c", "all"] and list(left["series"]) == ["all", "half", "none"]
    assert [x.value for x in gained] == [1, 1, 1, 1] and right["verdict"] == "holds" and len(left["null"]) == 4
    assert drawn["judged"] is None  # a difference of rows that are drawn
    two.figure(None, "f", ["all"], np.zeros((5, 3)), "null", replace(said, value=1.0, low=0.5, high=2.0), {"good": 0.9})
    assert drawn["judged"][1] == (1.0, 0.5, 2.0) and drawn["marks"] == {"good": 0.9}


def test_a_pass_is_priced_by_its_tokens(lab):
    tokenizer, data = lab.model.tokenizer, lab.data.values()
    plain = [len(side.ids) for b in data for p in b.system_pairs for side in caa.tokens_of(tokenizer, p)]
    assert lab.tokens_read(study.SYSTEM) == pytest.approx(sum(plain) / len(plain))
    assert lab.tokens_read(study.PADDED) >= lab.tokens_read(study.SYSTEM) != lab.tokens_read(study.ANSWERS)


def test_vectors_of_nothing_move_no_behaviour_on_average_and_others_are_dealt_out(lab):
    found = lab.chance(study.ANSWERS, 400, 0.1, seed=1)
    assert {x.shape for x in found.values()} == {(400, 3)}
    for kind in (study.RANDOM, study.SHUFFLED):
        assert (abs(found[kind].mean(0)) < 4 * found[kind].std(0) / 20).all()
    for i, n in enumerate(lab.names):
        given = {float(x) for x in found[study.OTHERS][:, i].round(9)}
        others = [v for other, v in lab.vectors().items() if other != n]
        assert given == {float(lab.response(n, v[None], 0.1).mean().round(9)) for v in others}


def test_doses_are_finite_steps_with_their_price_and_at_kl_is_the_dose_of_that_price(two, monkeypatch):
    monkeypatch.setattr(study.text, "excerpt", lambda name, characters: "Tin is a soft metal. " * 60)
    vectors, strengths = {n: torch.randn(2, 48) for n in two.names}, [-0.2, 0.0, 0.1]
    found = two.doses(vectors, strengths, prompts=2, pieces=1, measured=4)
    assert found.change.shape == found.kl.shape == found.loss.shape == (2, 2, 3)
    np.testing.assert_allclose(found.change[0, :, 2], two.change("joy", vectors["joy"], 0.1).mean(1))
    np.testing.assert_allclose(found.change[0, :, 0], two.change("joy", vectors["joy"], -0.2).mean(1))
    assert not found.change[:, :, 1].any() and not found.kl[:, :, 1].any() and (found.kl[:, :, ::2] > 0).all()
    assert np.ptp(found.loss[:, :, 1]) == 0 and np.ptp(found.loss[:, :, 0]) > 0
    three = comparisons.Doses(*(np.stack([x, x + 1, x + 2]) for x in (found.change[0], found.kl[0], found.loss[0])))
    panels = three.panels(["first", "second"])
    assert list(panels) == ["change of log-odds (nats)", "KL (nats per token)", "perplexity of plain text"]
    assert panels["change of log-odds (nats)"]["second"][2] == stats.over(three.change[:, 1, 2])
    assert panels["KL (nats per token)"]["first"][0].value == pytest.approx(np.mean(three.kl[:, 0, 0] ** 0.5) ** 2)
    assert panels["perplexity of plain text"]["first"][0].high == pytest.approx(
        np.exp(stats.over(three.loss[:, 0, 0]).high)
    )
    target = float(found.kl[0, 1, 2])
    reached = two.at_kl({n: v[1:] for n, v in vectors.items()}, [0.0, 0.1, 0.2], target, prompts=2, measured=4)["joy"]
    assert reached.strength == pytest.approx([0.1]) and reached.change.shape == (1,)
    np.testing.assert_allclose(reached.change, found.change[0, 1:, 2], atol=1e-4)


def test_draws_are_shown_by_their_mean_and_what_most_of_them_reach():
    draws = np.arange(1000.0)[:, None] + np.array([-5.0, 5.0])
    assert comparisons.central(draws) == pytest.approx((499.5, 24.975, 974.025))


def test_what_few_items_show_is_corrected_by_what_is_predicted_of_all(two):
    rng = np.random.default_rng(0)
    predicted = rng.normal(1, 2, (3, 400))
    true = 0.8 * predicted + rng.normal(0.3, 0.2, predicted.shape)
    found, raw = comparisons.estimated(true[:, :20], predicted), true[:, :20].mean(1)
    assert abs(found - true.mean(1)).max() < 0.25 < abs(raw - true.mean(1)).max()
    np.testing.assert_allclose(comparisons.estimated(true, predicted), true.mean(1))
    v = {n: torch.randn(1, 48) for n in two.names}
    few = two.at_kl(v, [0.0, 0.1], 1e9, prompts=1, measured=2)[
        "joy"
    ]  # a KL that is never reached: at the last strength
    step, slope = two.change("joy", v["joy"], 0.1, 2), two.response("joy", v["joy"], 0.1)
    np.testing.assert_allclose(few.change, (step - slope[:, :2]).mean(1) + slope.mean(1), atol=1e-5)


def test_changes_per_token_divide_each_log_p_by_its_tokens(two):
    v = torch.randn(1, 48)
    where = two.tested()["joy"]
    logp = [where.log_probs(m * v[0] / v.norm() * 10) / where.lengths() for m in (0.0, 0.1)]
    expected = (logp[1] - logp[0]) @ [1, -1]
    np.testing.assert_allclose(two.change("joy", v, 0.1, per_token=True)[0], expected, atol=1e-4)
    whole = scoring.log_odds(where, [v[0] / v.norm() * 10], [0.0, 0.1])[0]
    np.testing.assert_allclose(two.change("joy", v, 0.1)[0], whole[1] - whole[0])


def test_the_price_of_a_vector_grows_with_its_length_on_the_models_own_replies(lab):
    vectors = torch.stack([lab.vectors()["joy"], 7 * lab.vectors()["joy"]])
    low, high = (lab.price("joy", vectors, length, 2) for length in (0.05, 0.2))
    assert low.shape == (2, 2) and (low > 0).all() and (low < high).all()
    np.testing.assert_allclose(low[0], low[1], rtol=1e-4)


def test_an_sae_out_of_a_registry_has_one_seed_and_no_frozen_twin(lab, monkeypatch):
    trained = lambda profile, source, device, seed, fast, frozen=False: ((seed, frozen), None)  # noqa: E731
    monkeypatch.setattr(study.train, "dictionary", trained)
    lab.__dict__["text"] = (None, None)
    assert lab.saes((4, 5, 6)) == [(4, False), (5, False), (6, False)] and lab.frozen(4) == (4, True)
    of_registry = study.Single(
        Session(sae={"release": "r", "id": "i", "harvest": HARVEST}), lab.model, 1, [1], lab.data
    )
    of_registry.__dict__["text"] = (None, None)
    assert of_registry.saes((4, 5, 6)) == [(4, False)] and of_registry.frozen(4) is None
    assert of_registry.sae_after(0.5) is None


def test_an_sae_after_a_share_of_its_training_saw_as_many_tokens_and_after_all_of_it_is_the_sae(lab, cache):
    how = {"expansion": 1, "k": 2, "samples": 2048, "batch": 256, "low": False}
    session = Session(False, layer=1, sae={"harvest": HARVEST, "train": how})
    one = study.Single(session, lab.model, 1, [1], lab.data)
    rows = torch.randn(1024, lab.model.d_model)
    one.__dict__["text"] = (Array(rows, model_name="a", hook_name="blocks.1.hook_resid_post"), None)
    whole, half, tiny_share = (one.sae_after(share, seed=2) for share in (1.0, 0.5, 0.001))
    assert torch.equal(whole.sae.W_dec, one.sae(2).sae.W_dec) and not torch.equal(half.sae.W_dec, whole.sae.W_dec)
    seen = [x.sae.cfg.metadata.training_samples for x in (whole, half, tiny_share)]
    assert seen == [2048, 1024, 256]


def test_evidence_is_chosen_on_half_of_the_pairs_and_asked_of_the_rest(two):
    sae = sae_of("standard", torch.nn.functional.normalize(torch.randn(60, 48), dim=1))
    words = [Latent(i, float(i != 3), [], [], []) for i in range(60)]
    two.data["joy"] = behaviors.trim(behaviors.load_behavior("joy"), pairs=6, items=4)
    two.data["format"] = behaviors.trim(behaviors.load_behavior("format"), pairs=6, items=4)
    found = two.evidence(sae, words, 0.2, 2, 5)
    made, held = evidence.halved(two.halves()["format"].at(1))
    alone = evidence.of_latents(
        sae, made, held, two.gradients()["format"], 2.0, 5, 2, torch.tensor([w.frequency > 0 for w in words])
    )
    assert found["format"].rows == alone.rows and [len(x) for x in alone.found.values()] == [2, 2]
    assert found["format"].response == alone.response and len(found["joy"].null_response) == 59


def test_labels_are_those_of_the_sae_that_the_profile_names(lab, tmp_path):
    (tmp_path / "mine.json").write_text('{"7": "tea"}')
    loaded = SimpleNamespace(latents=9, sae=SimpleNamespace(cfg=None))
    given = {"harvest": HARVEST, "labels": str(tmp_path / "mine.json")}

    def found(seed=0, fast=False, **more):
        one = study.Single(Session(fast, sae=given | more), lab.model, 1, [1], lab.data)
        return one.labels(loaded, [7, 8], seed)

    assert found() == {7: "tea"} == found(seed=1, fast=True, release="r", id="i")
    assert found(fast=True) == found(seed=1) == {}  # another SAE, with other latents


@pytest.fixture
def changed(tiny, cache):
    """A model and a copy whose weights were changed a little, with two small behaviours."""
    weights = copy.deepcopy(tiny.weights)
    torch.manual_seed(0)
    for parameter in weights.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    after = LM.of(weights, tiny.tokenizer, "tiny-after")
    data = {n: behaviors.trim(behaviors.load_behavior(n), pairs=2, items=4) for n in ("joy", "format")}
    sides = [study.Single(Session(), m, 1, [1], data) for m in (tiny, after)]
    return study.Two(*sides, None, ("before", "after"), [])


def test_shifts_are_those_of_the_items_and_none_for_a_model_that_did_not_change(changed):
    found = changed.shifts(items=3)
    assert list(changed.models) == ["before", "after"] and list(found) == ["after"]
    assert {n: len(x) for n, x in found["after"].items()} == {"joy": 3, "format": 3}
    assert np.abs(found["after"]["joy"]).max() > 0 and all(x > 0 for x in changed.spreads().values())
    same = study.Two(changed.before, changed.before, None, ("before", "after"), [])
    assert not any(x.any() for x in same.shifts()["after"].values()) and same.moved_on_dev() == []


def test_moves_are_shifts_in_standard_deviations_less_the_unrelated_fine_tunes(changed):
    shifts, spread, moved = changed.shifts(), changed.spreads(), changed.moved()
    assert np.allclose(moved["after"]["joy"], shifts["after"]["joy"] / spread["joy"])
    assert all(np.array_equal(x, moved["after"][n]) for n, x in changed.beyond().items())
    both = study.Two(changed.before, changed.after, changed.after, ("before", "after"), [])
    assert not any(x.any() for x in both.beyond().values())


@pytest.mark.parametrize(
    ("low", "high", "chance", "found", "verdict"),
    [
        (0.2, 0.4, 0.0, (0.2, 0.4), "related"),
        (0.2, 0.4, 0.07, (0.0, 0.4), "not the same"),
        (0.2, 0.7, 0.07, (0.0, 0.7), "undecided"),
        (0.6, 1.0, 0.07, (0.6, 1.0), "same"),
    ],
)
def test_a_ruler_that_chance_misleads_tells_the_same_and_not_the_same_but_nothing_from_chance(
    low, high, chance, found, verdict
):
    ruler = SimpleNamespace(read=lambda value: mixtures.Rhos(low, high), rho=lambda v: 0.3, errors=(0.0, 0.0, chance))
    nats = stats.Interval(3.0, 2.0, 4.0)
    asked = study.Asked(0.3, nats, nats, ruler, "")
    assert tuple(asked.rhos) == found and asked.verdict == verdict
    assert asked.misled == (chance > 0)
    assert ("misled by chance" in asked.cells()[-1]) == (found[0] == 0)


def test_a_slow_machine_is_told_its_hours_before(changed, monkeypatch):
    clock = iter([0.0, 1.0, 0.0, 60.0])
    monkeypatch.setattr(study.time, "perf_counter", lambda: next(clock))
    quick, slow = changed.forecast(3), changed.forecast(300)
    assert quick.startswith("3 questions to fine-tunes at") and quick.split(": ")[1].startswith("about 0.")
    assert "minutes" in quick and "hours" in slow
    laid = [t for x in changed.before.tested().values() for g in x.sequences for t in g]
    assert len(laid) == 16  # all of them were timed, so that one pass over a behaviour takes half a minute
    assert slow.split("about ")[1].startswith(f"{(300 + 3 * 2) * 30 / 3600:.1f} hours")


def test_behaviours_whose_dev_items_moved_stand_for_the_trained_ones(changed, monkeypatch):
    shifts = {"joy": np.array([1.0, 1.1, 0.9, 1.0]), "format": np.array([1.0, -1.0, 2.0, -2.0])}
    monkeypatch.setattr(study.Two, "shifts", lambda self, part: {"after": shifts})
    assert changed.moved_on_dev() == ["joy"]
