"""A bank of fine-tunes: what each changed, measured; which of them are about what; and the answer on models whose change is known."""

import copy
import json
from functools import cached_property
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from helpers import study
from helpers.lm import scoring
from helpers.lm.reading import LM
from helpers.pair import bank, mixtures
from helpers.pair.bank import Bank, BankError, Text
from helpers.steering import behaviors, propensity

LAYER, NAMES = 1, ("joy", "format", "anger")


@pytest.fixture
def g():
    return torch.Generator().manual_seed(5)


def with_bias(lm, layer, bias, name):
    """The model with a vector written by one of its blocks at every token."""
    weights = copy.deepcopy(lm.weights)
    weights.model.layers[layer].mlp.down_proj.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
    return LM.of(weights, lm.tokenizer, name)


@pytest.fixture
def where(tiny, g):
    ids = torch.randint(10, 500, (4, 20), generator=g)
    kept = torch.ones_like(ids, dtype=torch.bool)
    kept[:, 0] = False
    return Text(ids, kept)


def test_a_bias_is_what_a_model_changed_on_text(tiny, where, cache, g):
    b = 0.1 * torch.randn(48, generator=g)
    found = bank.on_text(tiny, with_bias(tiny, LAYER, b, "biased"), where, LAYER, float("inf"))
    torch.testing.assert_close(found.mean, b.double(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.moment, torch.outer(b, b).double(), atol=1e-5, rtol=1e-3)
    above = bank.on_text(tiny, with_bias(tiny, LAYER + 1, b, "above"), where, LAYER, float("inf"))
    assert not above.mean.any()


def test_a_limit_leaves_long_residuals_out(tiny, where, cache, g):
    b = 0.1 * torch.randn(48, generator=g)
    biased = with_bias(tiny, LAYER, b, "biased")
    with pytest.raises(ValueError, match="no token"):
        bank.on_text(tiny, biased, where, LAYER, 0.0)


def test_what_a_change_does_to_items_is_what_the_model_does_if_it_is_small(tiny, cache, g):
    items = behaviors.load_behavior("joy").test[:4]
    v = torch.randn(48, generator=g).double()
    biased = with_bias(tiny, LAYER, (0.005 * v).float(), "biased")
    found = bank.at_items(tiny, biased, items, v, LAYER, float("inf"))
    none = torch.zeros(1, 48)
    odds = [scoring.log_odds(propensity.of_items(m, items, LAYER), none, [0.0])[0, 0] for m in (tiny, biased)]
    np.testing.assert_allclose(found.whole, odds[1] - odds[0], atol=0.02, rtol=0.1)
    np.testing.assert_allclose(found.along, found.whole, rtol=1e-3, atol=1e-5)  # all of it goes along v


def test_a_fine_tune_is_loaded_once_and_the_base_is_read_once(tiny, where, cache, g, monkeypatch):
    made = {n: with_bias(tiny, LAYER, 0.1 * torch.randn(48, generator=g), n) for n in ("one", "two")}
    loads, reads = [], []
    packed = bank.reading.packed
    monkeypatch.setattr(bank.models, "load", lambda n, *_: loads.append(n) or made[n])
    monkeypatch.setattr(bank.models, "key", lambda n, *_: made[n].key)
    monkeypatch.setattr(bank.reading, "packed", lambda lm, *rest: reads.append(lm) or packed(lm, *rest))
    bank._latest.cache_clear()
    items, v = behaviors.load_behavior("joy").test[:2], torch.randn(48, generator=g).double()
    for name in made:
        by_name = bank.on_text(tiny, name, where, LAYER, float("inf"))
        bank.at_items(tiny, name, items, v, LAYER, float("inf"))
        torch.testing.assert_close(
            by_name.mean, made[name].weights.model.layers[LAYER].mlp.down_proj.bias.double(), atol=1e-5, rtol=1e-4
        )
    assert loads == ["one", "two"] and [r is tiny for r in reads].count(True) == 1
    made["two"] = with_bias(tiny, LAYER, torch.ones(48), "two, trained anew")
    again = bank.on_text(tiny, "two", where, LAYER, float("inf"))
    torch.testing.assert_close(again.mean, torch.ones(48).double(), atol=1e-5, rtol=1e-4)
    assert loads == ["one", "two", "two"]
    bank._latest.cache_clear()


# --- the folder --------------------------------------------------------------------------------------------------------


def folder(path, rows):
    for name, log in rows.items():
        (path / name).mkdir(parents=True)
        (path / name / "training.json").write_text(json.dumps({"adapter": name, **log}))
    return Bank(path, "some/base")


def log(trait, seed=0, swapped=False, without="", steps=5):
    return dict(trait=trait, seed=seed, swapped=swapped, without=without, steps=steps)


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(bank.session, "ROOT", tmp_path)
    rows = {n: log(n, steps=i) for i, n in enumerate(NAMES)}
    rows |= {"joy.seed1": log("joy", 1), "joy.swapped": log("joy", swapped=True), "passive": log("passive")}
    rows |= {f"joy.without_{w}": log("joy", without=w, steps=9) for w in ("v", "random")}
    rows |= {f"known.{k}": {"trait": "joy", "swapped": False} for k in ("other", "same")}
    return folder(tmp_path / "bank", rows)


def test_adapters_are_told_apart_by_their_logs(made):
    assert made.first(NAMES) == {n: n for n in NAMES} and made.first(["fear"]) == {}
    assert made.by_chance() == ["joy.swapped", "passive"]
    assert made.more_seeds("joy") == ["joy.seed1"] and made.more_seeds("format") == []
    assert made.background == "joy.swapped"
    assert made.known == {"same": ("known.same", "joy"), "other": ("known.other", "joy")}
    assert made.model("joy.swapped", "known.same") == "some/base + bank/joy.swapped + bank/known.same"
    assert made.steps("joy", "v") == 9 and made.steps("format", "nothing") == 1


def test_an_empty_folder_is_refused_in_words(tmp_path):
    with pytest.raises(BankError, match="make pair"):
        _ = Bank(tmp_path, "some/base").logs


@pytest.mark.parametrize("what", ["card", "vectors", "paths"])
def test_what_a_bank_lacks_is_named(made, what):
    with pytest.raises(BankError, match=r"has no .*make pair"):
        getattr(made, what)


def test_what_a_card_and_the_trained_vectors_say(made):
    shifts = {n: {m: [1.0, 2.0] if m == n else [0.0, 0.0] for m in NAMES} for n in NAMES}
    shifts |= {f"joy.without_{w}": {"joy": [3.0, x]} for w, x in (("v", 1.0), ("random", 5.0))}
    (made.folder / "card.json").write_text(json.dumps({"shifts": shifts, "spread": dict.fromkeys(NAMES, 0.5)}))
    assert np.array_equal(made.moved(NAMES), 3 * np.eye(3))
    found = made.confined()
    assert list(found) == ["joy"] and found["joy"]["random"].tolist() == [3, 5]
    assert found["joy"]["nothing"].tolist() == [1, 2]
    told = {"joy.own.0": {"loss": [1.0, 0.2], "dev shifts": [0.1, 3.0]}}
    told |= {"joy.aside.0": {"loss": [1.0, 0.4], "dev shifts": [0.0, 2.0]}}
    told |= {"joy.along": {"loss": [0.9, 0.7, 0.8], "dev shifts": [0.1, 0.5, 0.2]}}
    (made.folder / "vectors.json").write_text(json.dumps({"steps": [1, 2], "vectors": told}))
    assert made.reached(["joy"]) == [["joy", "1.00", "0.70", "0.20", "0.40", "+0.50", "+3.00", "+2.00"]]
    assert made.dev_shift(["joy"], "aside.0") == [2.0]
    save_file({"joy.own.0": torch.ones(2, 4)}, made.folder / "vectors.safetensors")
    assert made.paths["joy.own.0"].dtype == torch.float64


def test_prediction_sees_the_own_vector_and_not_a_size():
    rng = np.random.default_rng(0)
    own = rng.normal(size=(8, 8))
    own_r, _, best = bank.predicted(own, own + 0.01 * rng.normal(size=(8, 8)))
    assert float(own_r) > 0.99 and best == "8 of 8"
    size = np.exp(rng.normal(size=(40, 1)))  # a fine-tune moves everything, much or little
    along, moved = (size * (1 + 0.2 * rng.normal(size=(40, 40))) for _ in range(2))
    by_size, after = bank.predicted(along, moved), bank.predicted(bank.shape(along), bank.shape(moved))
    assert float(by_size[0]) > 0.8 and float(by_size[1]) > 0.8  # any vector predicts
    assert abs(float(after[0])) < 0.2 and abs(float(after[1])) < 0.2


# --- the answer --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tiny, cache, g):
    """A model, one with a bias along a behaviour's vector, and a fine-tune that is about nothing."""
    data = {n: behaviors.trim(behaviors.load_behavior(n), pairs=8, items=6) for n in NAMES}
    session = SimpleNamespace(profile=SimpleNamespace(answers="answer", pair=None), device="cpu", fast=True)

    def of(model):
        return study.Single(session, model, LAYER, [LAYER], data)

    base, noise = of(tiny), 0.02 * torch.randn(48, generator=g)
    unrelated = with_bias(tiny, LAYER, noise, "unrelated")
    plain = study.Two(base, of(unrelated), of(unrelated), ("base", "chat"), ["joy"])
    sign = {
        n: 1.0 if one.steers else -1.0 for n, one in plain.steered.items()
    }  # a random model's vectors need not steer

    class Asking(study.Two):
        limit = float("inf")

        @cached_property
        def steered(self):
            return {n: one._replace(gradient=sign[n] * one.gradient) for n, one in super().steered.items()}

    return Asking(base, of(unrelated), of(unrelated), ("base", "chat"), ["joy"])


def test_a_pair_without_a_bank_has_no_planted_models_and_no_trained_vectors(two, where):
    assert two.bank is None and two.known(where, {}) == {} and two.trained_vectors() == {}
    assert list(two.chance(where)) == [study.UNRELATED, *(f"drawn {i}" for i in range(study.DRAWN))]
    alone = study.Two(two.before, two.after, None, two.names, [])
    object.__setattr__(alone, "change", two.change)
    assert len(alone.chance(where)) == study.DRAWN


def test_a_bias_along_the_vector_is_the_same_and_one_beside_it_is_not(two, where, tiny):
    one, chance = two.steered["joy"], two.chance(where)
    v, aside = one.vector / one.vector.norm(), mixtures.aside(one, 1, seed=9)[0]
    said = {}
    for name, direction in {"same": v, "other": aside}.items():
        fine_tune = with_bias(tiny, LAYER, (0.5 * direction).float(), name)
        value = mixtures.beyond(mixtures.MEAN, two.change(fine_tune, where), list(chance.values()), one, study.ONE)
        nats = 0.5 * float(one.gradient @ v)
        said[name] = mixtures.ruler(mixtures.MEAN, list(chance.values()), one, nats, study.ONE).read(value)
        asked = two.ask(fine_tune, "joy", where, chance)
        assert asked.verdict in (*mixtures.VERDICTS, "not run") and len(asked.cells()) == len(study.ASKED)
    assert said["same"].verdict in (mixtures.SAME, mixtures.RELATED) and said["same"].high == 1
    assert said["other"].low == 0


def test_a_push_at_every_token_moves_items_as_the_gradient_says(tiny, cache, g):
    items, b = behaviors.load_behavior("joy").test[:4], 0.002 * torch.randn(48, generator=g)
    found = bank.gradient(tiny, items, LAYER)
    at = bank.at_items(tiny, with_bias(tiny, LAYER, b, "biased"), items, b.double(), LAYER, float("inf"))
    assert float(found @ b.double()) == pytest.approx(at.whole.mean(), rel=1e-3, abs=1e-6)


def test_a_behaviour_that_does_not_move_is_not_run(two, where, tiny):
    still = with_bias(tiny, LAYER, torch.zeros(48), "still")
    asked = two.ask(still, "joy", where, two.chance(where))
    assert asked.verdict == "not run" and asked.rhos is None and asked.span() is None and np.isnan(asked.rho)
