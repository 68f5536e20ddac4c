"""Settings, overrides and secrets."""

import html
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from urllib.parse import quote

import pytest
import torch

from helpers import session

SECRET = "hf_" + "Z9" * 17


def test_an_override_gets_a_profile_name_of_its_own(monkeypatch):
    assert session.load_profile().name == "smollm2"
    monkeypatch.setenv("CHAT_MODEL", "google/gemma-2-2b-it")
    monkeypatch.setenv("LAYER", "13")
    profile = session.load_profile()
    assert profile.chat == "google/gemma-2-2b-it" and profile.layer == 13
    assert profile.name.startswith("smollm2+gemma-2-2b-it-")


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
    by_hand = session.start("00_base", fast=True)  # what is committed changes by the report's --commit only
    assert by_hand.results == session.ROOT / "reports" / "smollm2-fast" / "results"
    assert by_hand.figures == session.ROOT / "reports" / "smollm2-fast" / "figures"
    assert session.start("00_base").results == session.ROOT / "reports" / "smollm2" / "results"
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
    assert session.load_profile().pair.names == ("reference", "aligned")
    monkeypatch.setenv("CHAT_MODEL", "someone/else")
    assert session.load_profile().pair is None
    folder = tmp_path / "secret" / "model"
    folder.mkdir(parents=True)
    assert session.shown(str(folder)) == "folder:model"
    assert session.shown(f"{folder} + {tmp_path}/secret/mine") == "folder:model + mine"
    assert session.shown("packaged:x + data/aligned_pair/aligned") == "packaged:x + aligned"


def test_paths_start_at_the_root_and_variables_are_expanded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("BIG", str(tmp_path / "big"))
    for text, wanted in (
        ("x", session.ROOT / "x"),
        (Path("x") / "y", session.ROOT / "x" / "y"),
        ("~", Path("/home/someone")),
        ("~/x", Path("/home/someone/x")),
        ("$HOME/x", Path("/home/someone/x")),
        ("${BIG}/x", tmp_path / "big" / "x"),
        ("/a/b", Path("/a/b")),
    ):
        assert session.path(text) == wanted
    monkeypatch.setenv("CACHE_DIR", "$BIG/cache")
    assert session.cache_dir() == tmp_path / "big" / "cache"
    monkeypatch.setenv("CACHE_DIR", "here")
    assert session.cache_dir() == session.ROOT / "here"
    monkeypatch.setenv("EMPTY", "")
    for text, word in (("$NOT_SET_1/x", "NOT_SET_1"), ("a/${EMPTY}/x", "EMPTY"), ("~nobody-of-this-name/x", "home")):
        with pytest.raises(ValueError, match=f"the path .*{word}"):
            session.path(text)


def test_a_variable_of_a_path_may_stand_in_env_file(monkeypatch, tmp_path):
    monkeypatch.setattr(session, "ROOT", tmp_path)
    (tmp_path / ".env").write_text("DISK=/big\n")
    assert session.path("$DISK/x") == Path("/big/x")


def test_models_that_are_folders_are_named_from_the_root(monkeypatch, tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "mymodel", root / "adapters" / "mine", elsewhere / "mymodel"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(session, "ROOT", root)
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(elsewhere))
    for given, wanted in (
        ("mymodel", f"{root}/mymodel"),
        ("./mymodel", f"{root}/mymodel"),
        ("~/mymodel", f"{elsewhere}/mymodel"),
        ("$HOME/absent", f"{elsewhere}/absent"),  # no name of the hub, and never asked there
        ("mymodel + adapters/mine", f"{root}/mymodel + {root}/adapters/mine"),
        ("packaged:x + adapters/mine", f"packaged:x + {root}/adapters/mine"),
        ("google/gemma-2-2b-it", "google/gemma-2-2b-it"),
    ):
        monkeypatch.setenv("CHAT_MODEL", given)
        monkeypatch.setenv("BASE_MODEL", given)
        profile = session.load_profile()
        assert profile.chat == profile.base == wanted
    monkeypatch.setenv("CHAT_MODEL", "mymodel")
    assert session.shown(session.load_profile().chat) == session.shown("mymodel") == "folder:mymodel"
    assert session.load_profile().name.startswith("smollm2+mymodel-")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_an_env_file_that_is_not_utf8_is_named(monkeypatch, tmp_path, encoding):
    monkeypatch.setattr(session, "ROOT", tmp_path)
    (tmp_path / ".env").write_bytes("NAME=caf\u00e9\n".encode(encoding))
    with pytest.raises(ValueError, match=r"^\.env is written in .*: save it as UTF-8"):
        session.setting("NAME")
    (tmp_path / ".env").write_bytes("NAME=caf\u00e9\n".encode("utf-8-sig"))
    assert session.setting("NAME") == "caf\u00e9"


@pytest.mark.parametrize("wanted", ["gpu", "cuda", "cuda:0", "cuda:x", "cuda:-1", "tpu", "mps", "", "0"])
def test_a_device_that_is_not_here_is_refused_by_name(monkeypatch, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device '{wanted}' given; DEVICE may be auto or what .* have: cpu$"):
        session.choose_device(wanted)
    if wanted:
        monkeypatch.setenv("DEVICE", wanted)
        with pytest.raises(ValueError, match="DEVICE may be"):
            session.start("00_base")


def test_devices_that_are_here_are_taken_in_any_case(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [session.choose_device(x) for x in ("auto", "CUDA", "cuda:0", "CPU ")] == ["cuda", "cuda", "cuda:0", "cpu"]
    with pytest.raises(ValueError, match="'cuda:7' given.* have: cuda, cpu, cuda:0"):
        session.choose_device("cuda:7")
    assert session.choose_dtype("BFloat16", "cpu") == torch.bfloat16


def test_fast_given_as_text_is_refused():
    for fast in ("false", "False", "no", "0", "true", "", 2, None):
        with pytest.raises(ValueError, match="fast=.* given; it must be True or False"):
            session.start("00_base", fast=fast)
    assert session.start("00_base", fast=0).fast is False and session.start("00_base", fast=1).fast is True
    torch.set_grad_enabled(True)


def test_another_checkouts_helpers_are_refused(monkeypatch, tmp_path):
    (tmp_path / "other" / "helpers").mkdir(parents=True)
    (tmp_path / "other" / "helpers" / "session.py").write_text("")
    (tmp_path / "other" / "notebooks" / "deep").mkdir(parents=True)
    for folder in ("", "notebooks", "notebooks/deep"):
        monkeypatch.chdir(tmp_path / "other" / folder)
        with pytest.raises(RuntimeError, match=f"runs in {tmp_path}/other, but .* those of {session.ROOT}: start it"):
            session.start("00_base")
    for folder in (tmp_path, session.ROOT, session.ROOT / "notebooks"):
        monkeypatch.chdir(folder)
        session.check_checkout()


@pytest.mark.parametrize(
    "encoding",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_a_terminal_that_cannot_show_a_character_gets_its_escape(encoding):
    code = "from helpers import session; print('go \\u2026'); session.start('x')"
    environment = {k: v for k, v in os.environ.items() if k not in ("LANG", "LC_ALL", "PYTHONIOENCODING")} | encoding
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert run.returncode == 0 and b"go \\u2026" in run.stdout and b"profile smollm2" in run.stdout, run.stderr


@pytest.mark.parametrize(
    "value",
    ["null", "None", "1", "ab", "changeme", "CHANGE_ME_please", "your_token_here", "<your token>", 
     "hf_xxxxxxxxxxxxxxxx", "hf_...", "hf_your_token_here", "YOUR-HF-TOKEN", "${HF_TOKEN}", "placeholder", "token_here"],
)  # fmt: skip
def test_a_placeholder_is_no_token(monkeypatch, value):
    monkeypatch.setenv("HF_TOKEN", value)
    assert session.setting("HF_TOKEN") == "" and os.environ["HF_TOKEN"] == ""  # nor is it sent by another library
    assert session.redact(f"11 tables, {value}") == f"11 tables, {value}"


@pytest.mark.parametrize(
    "token", ["abcd\"ef'gh\\ij", "p&q<r>s/t u+v", "caf\u00e9-caf\u00e9-caf\u00e9", SECRET, "x1234567890"]
)
def test_a_token_is_redacted_in_every_escaped_form(monkeypatch, token):
    monkeypatch.setenv("NEURONPEDIA_API_KEY", token)
    assert session.setting("NEURONPEDIA_API_KEY") == token
    for form in (
        token, json.dumps(token), json.dumps({"k": f"'{token}"}, ensure_ascii=False), repr(token),
        repr([f"\"'{token}"]), html.escape(token), html.escape(token, quote=False), html.escape(json.dumps(token)),
        json.dumps(json.dumps(token)),
        quote(token), quote(token, safe=""), json.dumps(html.escape(repr(token))),
    ):  # fmt: skip
        said = session.redact(f"before {form} after")
        assert said.startswith("before ") and said.endswith(" after") and "***" in said
        rest = said.removeprefix("before ").removesuffix(" after")
        assert not {token[:4], token[-4:]} & {rest[i : i + 4] for i in range(len(rest))}, said


def test_a_notebook_is_redacted_by_its_strings(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "12345678")
    given = {"a": [12345678, None, True, "x 12345678", {"12345678": ("12345678",)}], "b": 1.5}
    assert session.redact(given) == {"a": [12345678, None, True, "x ***", {"***": ["***"]}], "b": 1.5}


def test_a_warning_in_a_notebook_names_no_place(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    session.start("00_base")
    said = warnings.formatwarning(UserWarning("six units are skewed"), UserWarning, "/tmp/ipykernel_1/2.py", 3)
    assert said == "UserWarning: six units are skewed\n"
