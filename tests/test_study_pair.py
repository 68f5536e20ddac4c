"""A pair of models as a notebook gets it: shifts of items, the unit they compare in, the models and SAEs by name."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HARVEST, a_profile

from helpers import study
from helpers.lm import models, scoring
from helpers.lm.reading import LM
from helpers.pair import crosscoder
from helpers.pair.crosscoder import Joined
from helpers.sae import train
from helpers.sae.activations import Array, Pair
from helpers.steering import behaviors


@pytest.fixture
def two(tiny, cache):
    """A model and a copy whose weights were changed a little, with two small behaviours."""
    weights = copy.deepcopy(tiny.weights)
    for parameter in weights.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    after = LM.of(weights, tiny.tokenizer, "tiny-after")
    data = {n: behaviors.trim(behaviors.load_behavior(n), pairs=2, items=4) for n in ("joy", "format")}
    session = SimpleNamespace(profile=None, device="cpu", fast=True)
    sides = [study.Single(session, m, 1, [1], data) for m in (tiny, after)]
    return study.Two(*sides, None, ("before", "after"), ["joy"])


def test_shifts_are_differences_of_unsteered_log_odds_and_spreads_their_unit_in_the_base(two):
    found, spread = two.shifts(), two.spreads()
    none = torch.zeros(1, two.before.model.d_model)
    for n in ("joy", "format"):
        before, after = (scoring.log_odds(one.tested()[n], none, [0.0])[0, 0] for one in (two.before, two.after))
        assert np.allclose(found["after"][n], after - before) and spread[n] == pytest.approx(before.std(ddof=1))
    assert two.untrained == ["format"] and list(two.models) == ["before", "after"]
    same = study.Two(two.before, two.before, None, ("before", "after"), [])
    assert not any(x.any() for x in same.shifts()["after"].values())


def test_diff_latents_are_kept_by_models_and_text_and_load_no_model_again(cache, monkeypatch):
    asked, ids = [], {"base": "1", "chat": "1"}

    def pair(s):
        asked.append(s)
        return SimpleNamespace(diff_latents=lambda seed: torch.full((2, 3), float(len(asked))))

    monkeypatch.setattr(study, "pair", pair)
    monkeypatch.setattr(models, "pair_names", lambda profile: ("base", "chat"))
    monkeypatch.setattr(models, "key", lambda name, device, dtype: {"model": name + ids[name]})
    s = SimpleNamespace(key={"profile": "one"}, profile=None, device="cpu", dtype=torch.float32)
    lab = SimpleNamespace(session=s, text=(torch.zeros(2), torch.ones(2)))
    assert study.diff_latents(lab)[0, 0] == study.diff_latents(lab)[0, 0] == 1
    lab.text = (torch.zeros(2), torch.zeros(2))  # other text; other models; another profile; another seed
    assert study.diff_latents(lab)[0, 0] == 2
    ids["chat"] = "2"
    assert study.diff_latents(lab)[0, 0] == 3
    s.key = {"profile": "two"}
    assert study.diff_latents(lab)[0, 0] == 4 and study.diff_latents(lab, 1)[0, 0] == 5
    assert study.diff_latents(lab)[0, 0] == 4


def test_every_model_has_its_sae_and_the_base_a_second_one(two, monkeypatch):
    class Single(study.Single):
        text = property(lambda self: (f"text of {self.model.identity}", None))

    one, other = (Single(s.session, s.model, 1, [1], s.data) for s in (two.before, two.after))
    trained = []

    def dictionary(profile, source, device, seed, fast):
        trained.append((source, seed))
        return f"SAE of {source}, {seed}", None

    def dictionaries(profile, base, chat, device, seed, fast):
        made = [
            dictionary(profile, *x, True)[0]
            for x in ((base, device, seed), (chat, device, seed), (base, device, seed + 1))
        ]
        return train.Dictionaries(*made)

    monkeypatch.setattr(train, "dictionary", dictionary)
    monkeypatch.setattr(train, "dictionaries", dictionaries)
    found = study.Two(one, other, other, ("before", "after"), []).saes(seed=3)
    assert list(found) == ["before", "after", study.SECOND, study.UNRELATED]
    base, chat = (f"text of {m.model.identity}" for m in (one, other))
    assert trained == [(base, 3), (chat, 3), (base, 4), (chat, 3)]
    assert found[study.SECOND] == f"SAE of {base}, 4"


def test_crosscoders_are_of_each_fine_tune_and_the_base_and_the_control_of_the_base_and_itself(two, monkeypatch):
    g = torch.Generator().manual_seed(0)
    rows = {n: Array(torch.randn(400, 8, generator=g), model_name=n) for n in ("base", "chat", "other")}

    class Pairs(study.Two):
        texts = property(lambda self: {n: (Pair(rows["base"], rows[n]),) * 2 for n in ("chat", "other")})

    def dictionary(profile, joined, device, seed, fast):
        return (joined.base, joined.chat, seed), None

    monkeypatch.setattr(crosscoder, "dictionary", dictionary)
    lab = Pairs(two.before, two.after, None, ("base", "chat"), [])
    lab.before.session.profile = a_profile(sae={"harvest": HARVEST, "train": {"expansion": 2, "k": 2, "samples": 100}})
    found = lab.crosscoders(seed=4)
    assert {n: x[0] for n, x in found.items()} == {n: (rows["base"], rows[n], 4) for n in ("chat", "other")}
    sae, held, directions = lab.control([1.0, 2.0], seed=4)
    assert sae[0] is rows["base"] and sae[1].energies == [1.0, 2.0] and len(directions) == 2
    assert held.chat.energies == [1.0, 2.0] and torch.equal(held.chat.directions, directions)
    assert held.scales == Joined(sae[0], sae[1]).scales != found["chat"][1].scales
    lab.before.session.profile = a_profile()
    assert lab.crosscoders() == {} and lab.control([1.0]) is None
