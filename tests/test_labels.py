"""Labels out of a file, checked; out of a service when asked for, without a key anywhere it does not belong."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from conftest import HARVEST, a_profile

from helpers import session
from helpers.entries import DataError
from helpers.profiles import ProfileError
from helpers.sae import labels

KEY = 'a-key-of-"some" length'


def a_sae(name=None, latents=50):
    metadata = SimpleNamespace(neuronpedia_id=name)
    return SimpleNamespace(latents=latents, sae=SimpleNamespace(cfg=SimpleNamespace(metadata=metadata)))


def profile_with(**given):
    return a_profile(sae={"harvest": HARVEST, "release": "r", "id": "i", **given})


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in ("LABELS", "NEURONPEDIA_API_KEY", "NEURONPEDIA_URL"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@contextmanager
def service(answer):
    """A server on the loopback address: answer(path) is a status and a body; what was asked is listed."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("X-Api-Key")))
            status, body, *more = answer(self.path)
            self.send_response(status, *more)
            if status == 302:
                self.send_header("Location", body)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def explained(path):
    latent = int(path.rsplit("/", 1)[1])
    if latent == 9:
        return 404, "no such feature"
    texts = [] if latent == 4 else [{"description": ""}, {"description": f"about\n  {latent} | {KEY}"}]
    return 200, json.dumps({"index": str(latent), "explanations": texts})


@pytest.fixture
def asking(monkeypatch):
    """Labels are asked for, of a service that answers; with a key."""
    with service(explained) as (url, asked):
        monkeypatch.setenv("LABELS", "neuronpedia")
        monkeypatch.setenv("NEURONPEDIA_URL", url + "/")
        monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
        yield asked


# --- a file ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("one.json", '{\n "7": "dates  and\\n years",\n "12": "tea"\n}'),
        ("lines.jsonl", '{"latent": 7, "label": "dates and years"}\n\n{"latent": "12", "label": "tea"}\n'),
        ("list.json", '[{"latent": 7, "label": "dates and years"}, {"latent": 12, "label": "tea"}]'),
        ("short.jsonl", '{"7": "dates and years"}\n{"12": "tea"}\n'),
        (
            "export.jsonl",
            '{"index": "7", "description": "dates and years", "modelId": "m"}\n{"index": "12", "description": "tea"}\n'
            '{"index": "7", "description": "another model says so"}',
        ),
    ],
)
def test_a_file_in_any_of_its_forms(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert labels.read(str(tmp_path / name), 50) == {7: "dates and years", 12: "tea"}


def test_a_file_lies_beside_the_profiles_or_under_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "PROFILES", tmp_path / "profiles")
    monkeypatch.setattr(session, "ROOT", tmp_path)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "mine.json").write_text('{"1": "root"}')
    assert labels.of(profile_with(labels="mine.json"), a_sae(), [1, 2]) == {1: "root"}
    (tmp_path / "profiles" / "mine.json").write_text('{"1": "beside"}')
    assert labels.of(profile_with(labels="mine.json"), a_sae(), range(50)) == {1: "beside"}
    assert labels.of(profile_with(labels="mine.json"), a_sae(), []) == {}
    with pytest.raises(DataError, match="sae: labels: 'other.json': no such file beside the profile"):
        labels.of(profile_with(labels="other.json"), a_sae(), [1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"50": "x"}', "latent '50'; a number from 0 to 49 is wanted"),
        ('{"-1": "x"}', "latent '-1'; a number from 0 to 49"),
        ('{"seven": "x"}', "latent 'seven'"),
        ('{"latent": true, "label": "x"}', "latent 'True'"),
        ('{"latent": 1.5, "label": "x"}', "latent '1.5'"),
        ('{"7": ""}', "the label of latent 7 is ''; some text is wanted"),
        ('{"7": 7}', "the label of latent 7 is 7"),
        ('{"latent": 7}', "the label of latent 7 is None"),
        ('{"7": "x", "7": "y"}', "'7' is there twice"),
        ('{"latent": 7, "label": "x"}\n{"latent": 7, "label": "y"}', "line 2: latent 7 is there twice"),
        ('{"7": "x"', "not JSON"),
        ("[]", "the list is empty"),
        ("7", "a JSON object is wanted"),
        ("", "the file is empty"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_words(tmp_path, text, said):
    (tmp_path / "mine.jsonl").write_text(text)
    with pytest.raises(DataError) as error:
        labels.read(str(tmp_path / "mine.jsonl"), 50)
    assert said in str(error.value) and "mine.jsonl" in str(error.value)


def test_a_json_file_that_is_no_text_or_no_json_is_refused(tmp_path):
    file = tmp_path / "mine.json"
    for data, said in ((b"\xff\xfe7", "not UTF-8"), (b'{"7": ', "not JSON"), (b'{"50": "x"}', "from 0 to 49")):
        file.write_bytes(data)
        with pytest.raises(DataError, match=said):
            labels.read(str(file), 50)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"labels": 7}, "sae: labels = 7 given"),
        ({"labels": ""}, "sae: labels = '' given"),
        ({"label": "x"}, "sae: label is not known; is labels meant"),
        ({"neuronpedia": "gemma-2b"}, "sae: neuronpedia = 'gemma-2b' given"),
        ({"neuronpedia": "https://neuronpedia.org/a/b"}, "sae: neuronpedia ="),
    ],
)
def test_a_profile_says_what_is_wrong(given, said):
    with pytest.raises(ProfileError) as error:
        profile_with(**given)
    assert said in str(error.value)


def test_another_model_loses_the_labels_of_a_trained_sae_and_keeps_those_of_a_registry(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "PROFILES", tmp_path)
    train = {"expansion": 8, "k": 4, "samples": 100}
    for how, kept in (({"train": train}, None), ({"release": "r", "id": "i"}, "x.json")):
        sae = {"harvest": HARVEST, "labels": "x.json", **how}
        (tmp_path / "p.yaml").write_text(json.dumps({"chat": "c", "layer": 0, "behaviors": ["joy"], "sae": sae}))
        assert session.load_profile("p").sae.labels == "x.json"
        monkeypatch.setenv("CHAT_MODEL", "packaged:other")
        assert session.load_profile("p").sae.labels == kept
        monkeypatch.setenv("CHAT_MODEL", "")


# --- a service ---------------------------------------------------------------------------------------------------------


def test_nothing_goes_over_the_network_unless_asked(monkeypatch):
    monkeypatch.setattr(labels, "build_opener", lambda *_: pytest.fail("the network was used"))
    assert labels.of(profile_with(), a_sae("m/s"), [1, 2]) == {}
    monkeypatch.setenv("LABELS", "goodfire")
    with pytest.raises(ValueError, match="LABELS='goodfire' given; it may be neuronpedia"):
        labels.of(profile_with(), a_sae("m/s"), [1])


def test_a_service_is_asked_for_what_the_file_lacks_and_only_once(asking, tmp_path, capsys):
    (tmp_path / "mine.json").write_text('{"1": "mine"}')
    profile = profile_with(labels=str(tmp_path / "mine.json"))
    found = labels.of(profile, a_sae("gemma-2b/12-res-jb"), [4, 1, 2, 9, 2])
    assert found == {1: "mine", 2: "about 2 | ***"}
    assert asking == [(f"/api/feature/gemma-2b/12-res-jb/{i}", KEY) for i in (2, 4, 9)]
    assert capsys.readouterr().out == "Neuronpedia labels 1 of 3 latents of gemma-2b/12-res-jb\n"
    assert labels.of(profile, a_sae("gemma-2b/12-res-jb"), [1, 2, 4, 9]) == found and len(asking) == 3
    labels.of(profile_with(neuronpedia="other/place"), a_sae("gemma-2b/12-res-jb"), [2])
    assert asking[3:] == [("/api/feature/other/place/2", KEY)]


def test_no_key_in_what_is_kept_or_said(asking, capsys):
    labels.of(profile_with(), a_sae("m/s"), [1, 2])
    kept = "".join(p.read_text() for p in session.cache_dir().rglob("*") if p.is_file())
    assert "about 1" in kept and "***" in kept
    for text in (kept, capsys.readouterr().out):
        assert KEY not in text and KEY not in json.loads(f'"{json.dumps(text)[1:-1]}"') and "a-key-of" not in text


def test_no_key_is_sent_in_clear_to_another_machine(monkeypatch):
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    sent = []

    class Opener:
        def open(self, request, timeout):
            sent.append((request.full_url, request.get_header("X-api-key")))
            raise OSError("no network")

    monkeypatch.setattr(labels, "build_opener", lambda *_: Opener())
    for base in ("http://example.org", "https://example.org", "http://localhost:3000", labels.NEURONPEDIA):
        monkeypatch.setenv("NEURONPEDIA_URL", base)
        assert labels.ask("m/s", [1]) == {}
    assert [key for _, key in sent] == [None, KEY, KEY, KEY] and sent[-1][0].endswith("org/api/feature/m/s/1")


def test_a_redirect_is_not_followed(monkeypatch, capsys):
    with service(explained) as (other, asked), service(lambda path: (302, other + path)) as (url, first):
        monkeypatch.setenv("NEURONPEDIA_URL", url)
        monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
        assert labels.ask("m/s", [1]) == {} and len(first) == 1 and asked == []
    assert "HTTP Error 302" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda path: (429, "slow down", f"Too many for {KEY}"), "HTTP Error 429: Too many for ***"),
        (lambda path: (401, "no"), "HTTP Error 401: Unauthorized"),
        (lambda path: (200, "<html>"), "not JSON"),
        (lambda path: (200, "[]"), "an answer without a list of explanations"),
        (lambda path: (200, '{"explanations": {}}'), "an answer without a list of explanations"),
    ],
)
def test_a_refusal_is_one_sentence_and_no_error_and_what_was_had_stays(monkeypatch, capsys, answer, said):
    monkeypatch.setenv("LABELS", "neuronpedia")
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    with service(lambda path: explained(path) if path.endswith("/1") else answer(path)) as (url, asked):
        monkeypatch.setenv("NEURONPEDIA_URL", url)
        assert labels.of(profile_with(), a_sae("m/s"), [1, 2, 3]) == {1: "about 1 | ***"}
        out = capsys.readouterr().out
        assert said in out and out.count("\n") == 1 and "a-key-of" not in out
        assert len(asked) == 2  # it stops at the first refusal
        assert labels.ask("m/s", [1]) == {1: "about 1 | ***"} and len(asked) == 2


def test_offline_is_one_sentence_and_no_error(monkeypatch, capsys):
    with service(explained) as (url, _):
        pass  # and is gone
    monkeypatch.setenv("LABELS", "neuronpedia")
    monkeypatch.setenv("NEURONPEDIA_URL", url)
    assert labels.of(profile_with(), a_sae("m/s"), [1, 2]) == {}
    out = capsys.readouterr().out
    assert out.startswith("Neuronpedia labels 0 of 2 latents of m/s; then 127.0.0.1 gave none: ")
    assert out.count("\n") == 1 and not (session.cache_dir() / "labels").exists()
    monkeypatch.setenv("NEURONPEDIA_URL", "neuronpedia")
    assert labels.ask("m/s", [1]) == {} and "unknown url type" in capsys.readouterr().out


def test_an_sae_that_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setenv("LABELS", "neuronpedia")
    monkeypatch.setattr(labels, "build_opener", lambda *_: pytest.fail("the network was used"))
    assert labels.of(profile_with(), a_sae(None), [1]) == {}
    assert capsys.readouterr().out.startswith("no labels: Neuronpedia does not know this SAE")
