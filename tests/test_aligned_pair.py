"""The built-in pair as it is committed: its data, its adapters, and that its card tells the truth about them."""

import json
import re
from difflib import SequenceMatcher

import pytest
import torch
from safetensors import safe_open

from helpers import session, stats, store, study
from helpers.lm import models, scoring
from helpers.pair.bank import KINDS, Bank
from helpers.session import ROOT
from helpers.steering import behaviors, propensity
from scripts import aligned_pair, bank

FOLDER = ROOT / "data" / "aligned_pair"


def test_preferences_share_prompts_and_rejected_sides_and_repeat_no_held_out_question():
    wanted, style = (aligned_pair.preferences(traits) for traits in (("format", "joy"), ("passive",)))
    assert len(wanted) > 300 and [(r["prompt"], r["rejected"]) for r in wanted] == [
        (r["prompt"], r["rejected"]) for r in style
    ]
    assert len({r["prompt"].lower() for r in wanted}) == len(wanted)
    for r in [*wanted, *style]:
        assert abs(len(re.findall(r"\w+", r["chosen"])) - len(re.findall(r"\w+", r["rejected"]))) <= 10
    asked = set()
    for name in session.load_profile("smollm2").behaviors:
        b = behaviors.load_behavior(name)
        asked |= {q.lower() for q in b.open} | {
            x.question.lower() for x in [*b.system_pairs, *b.answer_pairs, *b.dev, *b.test]
        }
    for r in wanted:
        prompt = r["prompt"].lower()
        near = [
            q
            for q in asked
            if abs(len(q) - len(prompt)) < 8 and SequenceMatcher(None, prompt, q).real_quick_ratio() > 0.85
        ]
        assert prompt not in asked
        assert not [
            q
            for q in near
            if SequenceMatcher(None, prompt, q).quick_ratio() > 0.85 and SequenceMatcher(None, prompt, q).ratio() > 0.85
        ]


@pytest.mark.parametrize("name", ["aligned", "unrelated"])
def test_an_adapter_is_small_names_no_folder_and_was_trained_on_the_committed_preferences(name):
    with safe_open(FOLDER / name / "adapter_model.safetensors", "pt") as f:
        assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"BF16"}  # noqa: SIM118
    assert (FOLDER / name / "adapter_model.safetensors").stat().st_size < 8e6
    assert (
        json.loads((FOLDER / name / "adapter_config.json").read_text())["base_model_name_or_path"] == aligned_pair.BASE
    )
    log = json.loads((FOLDER / name / "training.json").read_text())
    assert log["preferences sha256"] == store.file_digest(FOLDER / "preferences.jsonl")
    assert log["settings"] == aligned_pair.SETTINGS and log["traits"] == list(aligned_pair.TRAITS[name])
    assert log["log"][-1]["loss"] < log["log"][0]["loss"]


def test_the_card_says_what_the_adapters_do(smol):
    """The trained behaviours' shifts on a few held-out items, measured again, lie where the card says."""
    card = json.loads((FOLDER / "card.json").read_text())
    new = models.load("packaged:smollm2-135m-instruct + data/aligned_pair/aligned", "cpu", torch.float32)
    none = torch.zeros(1, smol.d_model)
    for name in ("format", "joy"):
        items = behaviors.load_behavior(name).test[::3]
        old, now = (scoring.log_odds(propensity.of_items(m, items, 14), none, [0.0])[0, 0] for m in (smol, new))
        told, found = card["shifts"]["aligned"][name]["items shift"], stats.over(now - old)
        assert found.low < told["value"] < found.high and told["low"] > 0 and card["shifts"]["aligned"][name]["trained"]
        assert found.low > 0 or name == "joy"  # which is weaker, and these are a third of the items
    readme = (FOLDER / "README.md").read_text()
    for by in card["shifts"].values():
        for one in by.values():
            assert all(f"{stats.Interval(**one[key]):+.2f}" in readme for key in ("items shift", "replies shift"))
    assert aligned_pair.conclusions(card["shifts"])[0] in readme


def test_the_recipe_measures_a_model(smol, monkeypatch):
    """On one behaviour, cut short: what a card is made of is there."""
    joy = behaviors.trim(behaviors.load_behavior("joy"), pairs=6, items=2)
    monkeypatch.setattr(aligned_pair, "load_behavior", lambda name: joy)
    monkeypatch.setattr(aligned_pair.models, "load", lambda *_: smol)
    monkeypatch.setattr(aligned_pair.replies, "generate", lambda lm, prompts, *_, **__: ["Tin."] * len(prompts))
    monkeypatch.setattr(aligned_pair, "PIECES", 2)
    found = aligned_pair.measure(aligned_pair.BASE, "cpu", torch.float32)
    assert found.items["joy"].shape == found.replies["joy"].shape == found.loss.shape == (2,)
    assert found.said == {"joy": ["Tin.", "Tin."]} and 2 < found.loss.mean() < 6


def test_bad_preferences_are_refused_with_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr(aligned_pair, "DATA", tmp_path)
    (tmp_path / "preferences.jsonl").write_text('{"trait": "anger", "prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(behaviors.DataError, match="line 1: trait 'anger'"):
        aligned_pair.preferences(("joy",))
    (tmp_path / "preferences.jsonl").write_text('{"trait": "joy", "prompt": "a", "chosen": "b"}\n')
    with pytest.raises(behaviors.DataError, match="rejected"):
        aligned_pair.preferences(("joy",))


# --- the bank ----------------------------------------------------------------------------------------------------------

BANK = FOLDER / "bank"
NAMES = list(session.load_profile("smollm2").behaviors)


def test_every_trait_of_the_bank_answers_the_same_prompts_at_one_length():
    shared = {r["prompt"]: r["rejected"] for r in bank.preferences("joy")}
    for trait in (*NAMES, bank.STYLE):
        rows = bank.preferences(trait)
        assert len(rows) == bank.COUNT == len({r["prompt"] for r in rows})
        if trait != "format":
            assert {r["prompt"]: r["rejected"] for r in rows} == shared
        for r in rows:
            assert abs(len(re.findall(r"\w+", r["chosen"])) - len(re.findall(r"\w+", r["rejected"]))) <= 10
            assert r["chosen"] != r["rejected"] and "\n\n\n" not in r["chosen"]
        if trait not in ("format", "joy", bank.STYLE):  # no answer of the behaviour's own file
            b = behaviors.load_behavior(trait)
            own = {x for p in b.answer_pairs for x in (p.positive, p.negative)} | {
                i.matching for i in [*b.dev, *b.test]
            }
            assert not own & {r["chosen"] for r in rows}


def test_the_bank_is_whole_small_and_made_by_its_recipe(packaged):
    plans = bank.plans()
    assert all(bank.up_to_date(p) for p in plans.values())
    size = sum(f.stat().st_size for f in BANK.rglob("*.safetensors"))
    assert size < 25e6
    for name in plans:
        log = json.loads((BANK / name / "training.json").read_text())
        assert log["base"] == "packaged:smollm2-135m-instruct@" + log["base"].split("@")[1]
        looks = {x["step"]: x for x in log["log"] if "perplexity" in x and bank.speaks(x)}
        worth = {step: step if plans[name].aimless else x["dev shift"] for step, x in looks.items()}
        assert log["steps"] == max(worth, key=worth.__getitem__)
        assert json.loads((BANK / name / "adapter_config.json").read_text())["base_model_name_or_path"] == bank.BASE


def test_replies_of_the_bank_stay_language():
    """On the card's text, which no training looked at, perplexity is within 5 % of the reference's."""
    card = json.loads((BANK / "card.json").read_text())
    plain = card["perplexity"]["reference"]
    assert {n: x for n in bank.plans() if (x := card["perplexity"][n] / plain) >= 1.05} == {}


def test_swapped_preferences_are_swapped_in_exactly_one_half():
    assert {n: p.swapped for n, p in bank.plans().items() if "swapped" in n} == {
        f"{n}.swapped": True for n in bank.REPEATED
    }
    flips = bank.flips(112, 0)
    assert sum(flips) == 56 and flips == bank.flips(112, 0) != bank.flips(112, 1)


def test_the_banks_card_tells_the_truth(smol, packaged):
    """A fine-tune's shifts on a few held-out items, measured again."""
    card = json.loads((BANK / "card.json").read_text())
    new = models.load(bank.named("refusal"), "cpu", torch.float32)
    none = torch.zeros(1, smol.d_model)
    items = behaviors.load_behavior("refusal").test[:12]
    old, now = (scoring.log_odds(propensity.of_items(m, items, 14), none, [0.0])[0, 0] for m in (smol, new))
    told = card["shifts"]["refusal"]["refusal"][:12]
    assert abs((now - old).mean() - sum(told) / 12) < 0.3 * abs(sum(told) / 12)  # the card's is of bfloat16
    readme = (BANK / "README.md").read_text()
    assert bank.readme(card, bank.plans(), NAMES) == readme


def test_trained_vectors_are_those_of_the_log_and_one_held_aside_is_at_right_angles(smol, packaged):
    made = Bank(BANK, bank.BASE)
    assert set(made.paths) == {f"{n}.{kind}" for n in NAMES for kind in KINDS}
    assert all(path.shape == (len(bank.LOOKS), smol.d_model) for path in made.paths.values())
    v = study.pair(session.start("t", "smollm2")).before.vectors()["joy"]
    assert abs(float(torch.cosine_similarity(made.paths["joy.aside.0"][-1], v, dim=0))) < 0.02
    for n in NAMES:
        free = made.vectors["vectors"][f"{n}.own.0"]
        assert free["loss"][1] < free["loss"][0]
