"""The entrance of a notebook: what it gives is what the rooms give one by one."""

import numpy as np
import pytest
import torch
from conftest import HARVEST, a_profile

from helpers import study
from helpers.steering import behaviors, directions


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


def test_the_price_of_a_vector_grows_with_its_length_on_the_models_own_replies(lab):
    vectors = torch.stack([lab.vectors()["joy"], 7 * lab.vectors()["joy"]])
    low, high = (lab.price("joy", vectors, length, 2) for length in (0.05, 0.2))
    assert low.shape == (2, 2) and (0 < low).all() and (low < high).all()
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
