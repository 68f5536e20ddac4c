"""Settings, overrides and secrets."""

import subprocess
import sys

import pytest
import torch

from helpers import session

SECRET = "hf_" + "Z9" * 17


def test_an_override_gets_a_profile_name_of_its_own(monkeypatch):
    assert session.load_profile()["name"] == "smollm2"
    monkeypatch.setenv("CHAT_MODEL", "google/gemma-2-2b-it")
    monkeypatch.setenv("LAYER", "13")
    profile = session.load_profile()
    assert profile["chat"] == "google/gemma-2-2b-it" and profile["layer"] == 13
    assert profile["name"].startswith("smollm2+gemma-2-2b-it-")


def test_bad_settings_say_what_is_wanted(monkeypatch):
    with pytest.raises(FileNotFoundError, match="no profile 'nope': notebooks/profiles has .*smollm2"):
        session.load_profile("nope")
    monkeypatch.setenv("LAYER", "middle")
    with pytest.raises(ValueError, match="LAYER='middle' given"):
        session.load_profile()
    with pytest.raises(ValueError, match="dtype 'half' given; choose one of auto"):
        session.choose_dtype("half", "cpu")


def test_fast_runs_and_reports_write_elsewhere(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("REPORT_DIR", str(tmp_path))
    s = session.start("00_base", fast=True)
    assert s.name == "smollm2-fast" and s.results == tmp_path / "results" and "smollm2-fast" in capsys.readouterr().out
    monkeypatch.setenv("REPORT_DIR", "")
    assert session.start("00_base", fast=True).results.name == "smollm2-fast"
    torch.set_grad_enabled(True)


def test_secrets_are_redacted_and_never_printed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert SECRET not in session.redact(f"bad {SECRET} at http://me:pw@host/x") and "pw" not in session.redact(
        "http://me:pw@host/x"
    )
    code = "import os; from helpers import session; session.start('x'); print(session.redact('said ' + os.environ['HF_TOKEN']))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and "said ***" in run.stdout and SECRET not in run.stdout + run.stderr


def test_a_pair_belongs_to_the_profiles_own_model_and_paths_are_not_shown(monkeypatch, tmp_path):
    assert session.load_profile()["pair"]["names"] == ["reference", "aligned"]
    monkeypatch.setenv("CHAT_MODEL", "someone/else")
    assert "pair" not in session.load_profile()
    folder = tmp_path / "secret" / "model"
    folder.mkdir(parents=True)
    assert session.shown(str(folder)) == "folder:model"
    assert session.shown(f"{folder} + {tmp_path}/secret/mine") == "folder:model + mine"
    assert session.shown("packaged:x + data/aligned_pair/aligned") == "packaged:x + aligned"
