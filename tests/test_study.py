"""The entrance of a notebook: what it gives is what the rooms give one by one."""

import copy

import numpy as np
import pytest
import torch
from conftest import HARVEST, a_profile

from helpers import study
from helpers.lm import scoring
from helpers.lm.reading import LM
from helpers.sae.activations import Array
from helpers.steering import behaviors, caa, directions


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


def test_tables_show_pairs_and_replies(lab):
    assert lab.contrast("joy", rows=2).data.count("\n") == 3
    said = lab.say("What is tin?", {"joy": lab.vectors()["joy"]}, 0.1, tokens=3).data
    assert "| nothing |" in said and "| joy |" in said


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


def test_responses_are_gradients_times_vectors_of_one_length(two):
    vectors = {n: torch.randn(3, 48) for n in two.names}
    found = two.responses(vectors, 0.1)
    gradient = two.gradients()["format"].mean(0)
    v = vectors["format"][2].double()
    assert found.shape == (3, 2) and found[2, 1] == pytest.approx(float(gradient @ (v / v.norm()).numpy()))


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


def test_behaviours_whose_dev_items_moved_stand_for_the_trained_ones(changed, monkeypatch):
    shifts = {"joy": np.array([1.0, 1.1, 0.9, 1.0]), "format": np.array([1.0, -1.0, 2.0, -2.0])}
    monkeypatch.setattr(study.Two, "shifts", lambda self, part: {"after": shifts})
    assert changed.moved_on_dev() == ["joy"]
