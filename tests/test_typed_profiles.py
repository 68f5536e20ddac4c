"""A profile is checked whole before anything is loaded: file, key, what is wanted, the nearest known key."""

import subprocess
import sys

import pytest
import yaml
from conftest import HARVEST, a_profile

from helpers import profiles, session
from helpers.profiles import ProfileError
from helpers.session import ROOT

TRAIN = {"expansion": 8, "k": 32, "samples": 1000}


@pytest.mark.parametrize("file", sorted(session.PROFILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_profile_of_the_repository_is_one(file):
    found = profiles.of({"name": file.stem, **profiles.read(file)}, file.name)
    assert found.layer in found.layers and found.behaviors and found.sae.harvest.tokens > found.sae.harvest.held_out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"behaviours": ["joy"]}, "behaviours is not known; is behaviors meant"),
        ({"extras": ["pirate"]}, "extras is not known; is extra meant"),
        ({"sae": {"harvest": HARVEST, "train": TRAIN | {"learning": 1}}}, "sae: train: learning is not known"),
        ({"sae": {"train": TRAIN}}, "sae: harvest is missing"),
        ({"layer": "middle"}, "layer = 'middle' given"),
        ({"layer": -1}, "layer = -1 given"),
        ({"layer": True}, "layer = True given; a number or text, not yes or no, is wanted"),
        ({"sae": {"harvest": HARVEST, "train": TRAIN | {"k": True}}}, "sae: train: k = True given"),
        ({"sae": {"harvest": HARVEST, "train": TRAIN | {"lr": "fast"}}}, "sae: train: lr = 'fast' given"),
        ({"sae": {"harvest": HARVEST, "train": TRAIN | {"k": 0}}}, "sae: train: k = 0 given"),
        ({"pair": {"base": "a", "chat": "b", "names": ["one"]}}, "pair: names"),
        ({"chat": None}, "chat = None given"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(given, said):
    with pytest.raises(ProfileError) as error:
        a_profile(**given)
    assert "p.yaml: " in str(error.value) and said in str(error.value)


def test_every_wrong_key_is_named_at_once():
    with pytest.raises(ProfileError) as error:
        profiles.of({"name": "p", "behaviours": []}, "p.yaml")
    assert all(word in str(error.value) for word in ("chat is missing", "layer is missing", "is behaviors meant"))


def test_a_diff_says_what_differs_and_what_is_wrong_in_both_is_said_once():
    def pair(**harvest):
        return {"base": "a", "chat": "b", "diff": {"harvest": harvest}}

    sae = {"harvest": HARVEST | {"context": 64}}
    found = a_profile(sae=sae, pair=pair(tokens=7)).pair.diff.harvest
    assert (found.tokens, found.context, found.source) == (7, 64, ("packaged:wiki",))
    with pytest.raises(ProfileError, match="pair: diff: harvest: tokns is not known; is tokens meant"):
        a_profile(sae=sae, pair=pair(tokns=7))
    with pytest.raises(ProfileError) as error:
        a_profile(sae={"harvest": HARVEST | {"tokens": 0}}, pair=pair(context=1))
    assert str(error.value).count("tokens = 0") == 1 and "diff: harvest: context = 1" in str(error.value)


def test_the_sae_of_a_layer_above_is_trained_on_less_or_named():
    above = {"tokens": 50, "held_out": 5, "samples": 70}
    found = a_profile(layer=3, sae={"harvest": HARVEST, "train": TRAIN, "above": above}).above(5)
    assert (found.layer, found.sae.harvest.tokens, found.sae.harvest.held_out, found.sae.train.samples) == (
        5,
        50,
        5,
        70,
    )
    assert found.sae.harvest.source == ("packaged:wiki",) and found.sae.train.k == TRAIN["k"]
    del above["samples"]
    found = a_profile(sae={"harvest": HARVEST, "train": TRAIN, "above": above}).above(5)
    assert found.sae.train.samples == TRAIN["samples"]
    named = a_profile(sae={"harvest": HARVEST, "release": "r", "id": "a", "above": above | {"ids": {5: "b"}}})
    assert (named.above(5).sae.release, named.above(5).sae.id) == ("r", "b")
    with pytest.raises(ProfileError, match="sae: above: ids: names no SAE of layer 6"):
        named.above(6)
    assert named.has_above and not a_profile(sae={"harvest": HARVEST, "release": "r", "id": "a"}).has_above
    alike = a_profile(sae={"harvest": HARVEST, "train": TRAIN})
    assert alike.has_above and alike.above(5).sae == alike.sae and alike.above(5).layer == 5
    with pytest.raises(ProfileError, match="profile p has no section sae:"):
        a_profile().above(5)


def test_numbers_may_be_written_as_yaml_reads_them():
    given = yaml.safe_load("{layer: '14', sae: {train: {expansion: 8, k: 32, samples: 1e6, lr: 2e-3}}}")
    given["sae"]["harvest"] = HARVEST
    found = a_profile(**given)
    assert found.layer == 14 and found.sae.train.lr == 0.002 and found.sae.train.samples == 1_000_000
    assert found.sae.harvest.source == ("packaged:wiki",)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "holds nothing"), ("- a\n", "holds a list"), ("a: [", "is not YAML"), ("\ufeffchat: c\n", None)],
)
def test_files_that_are_no_profile(tmp_path, text, said):
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    if said is None:
        assert profiles.read(file) == {"chat": "c"}
    else:
        with pytest.raises(ProfileError, match=f"mine.yaml {said}"):
            profiles.read(file)


def test_the_command_checks_and_documents(tmp_path):
    good, bad = session.PROFILES / "smollm2.yaml", tmp_path / "bad.yaml"
    bad.write_text("chat: c\nlayer: 3\nbehaviors: [joy]\nextras: [x]\n")
    run = subprocess.run(
        [sys.executable, "-m", "helpers.profiles", "check", str(good), str(bad)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "smollm2.yaml is a profile" in run.stdout and "is extra meant" in run.stderr
    assert (ROOT / "docs" / "profiles.md").read_text() == profiles.document()
