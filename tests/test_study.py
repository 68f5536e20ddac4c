"""What a notebook starts from, on small models: what training moved, and which behaviours stand for the trained ones."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import study
from helpers.lm.reading import LM
from helpers.steering import behaviors


@pytest.fixture
def two(tiny, cache):
    """A model and a copy whose weights were changed a little, with two small behaviours."""
    weights = copy.deepcopy(tiny.weights)
    torch.manual_seed(0)
    for parameter in weights.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    after = LM.of(weights, tiny.tokenizer, "tiny-after")
    data = {n: behaviors.trim(behaviors.load_behavior(n), pairs=2, items=4) for n in ("joy", "format")}
    sides = [study.Single(SimpleNamespace(), m, 1, [1], data) for m in (tiny, after)]
    return study.Two(*sides, None, ("before", "after"), [])


def test_shifts_are_those_of_the_items_and_none_for_a_model_that_did_not_change(two):
    found = two.shifts(items=3)
    assert list(two.models) == ["before", "after"] and list(found) == ["after"]
    assert {n: len(x) for n, x in found["after"].items()} == {"joy": 3, "format": 3}
    assert np.abs(found["after"]["joy"]).max() > 0 and all(x > 0 for x in two.spreads().values())
    same = study.Two(two.before, two.before, None, ("before", "after"), [])
    assert not any(x.any() for x in same.shifts()["after"].values()) and same.moved_on_dev() == []


def test_behaviours_whose_dev_items_moved_stand_for_the_trained_ones(two, monkeypatch):
    shifts = {"joy": np.array([1.0, 1.1, 0.9, 1.0]), "format": np.array([1.0, -1.0, 2.0, -2.0])}
    monkeypatch.setattr(study.Two, "shifts", lambda self, part: {"after": shifts})
    assert two.moved_on_dev() == ["joy"]
