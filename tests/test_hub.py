"""Models of a hub: huggingface_hub's own client against a small hub on this machine that counts what it is asked."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import load as tensors_of

from helpers.lm import files, models
from helpers.session import ROOT

NAME, TOKEN = "lab/little", "hf_" + "S3cretOfTheReader" * 2
SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


# --- a hub -------------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """One request, as the hub saw it."""

    what: str
    method: str
    path: str
    file: str
    range: str
    authorization: str


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: dict = {}


class Hub(ThreadingHTTPServer):
    """Repositories by name, commit and file; `says` replaces what it answers to info, auth, tree or a file."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.refs, self.asked = {}, {}, []
        self.gated, self.renamed, self.says, self.cuts, self.storage = set(), {}, {}, {}, None
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def holds(self, name, files, ref="main"):
        """Put files in a repository; the commit, which `ref` names from now on."""
        commit = hashlib.sha1(repr(sorted((n, hashlib.sha1(b).hexdigest()) for n, b in files.items())).encode())
        self.repositories.setdefault(name, {})[commit.hexdigest()] = files
        self.refs.setdefault(name, {})[ref] = commit.hexdigest()
        return commit.hexdigest()

    def count(self, *what):
        """The files, or the paths, of the requests of these kinds, sorted."""
        return sorted(a.file or a.path for a in self.asked if a.what in what)

    def stop(self):
        if self.thread.is_alive():
            self.shutdown()
            self.thread.join(10)
            self.server_close()

    def answer(self, asked, name, revision):
        token = asked.authorization.removeprefix("Bearer ")
        if planted := self.says.get(asked.file or asked.what):
            return planted
        if name in self.renamed:
            return Answer(307, b"", {"Location": asked.path.replace(name, self.renamed[name], 1)})
        if name not in self.repositories:
            return Answer(404 if token else 401, b"", {"X-Error-Code": "RepoNotFound"})
        if name in self.gated and asked.what in ("auth", "file") and token != TOKEN:
            message = f"the token {token} may not read this" if token else "sign in"
            return Answer(403 if token else 401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
        commits = self.repositories[name]
        commit = revision if revision in commits else self.refs[name].get(revision)
        if commit is None:
            return Answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = commits[commit]
        if asked.what == "auth":
            return Answer(200, b"{}")
        if asked.what == "info":
            said = {"id": name, "sha": commit, "gated": "manual" if name in self.gated else False}
            return Answer(200, json.dumps(said | {"siblings": [{"rfilename": f} for f in files]}).encode())
        if asked.what == "tree":
            tree = [{"type": "file", "path": f, "size": len(b), "oid": "0" * 40} for f, b in files.items()]
            return Answer(200, json.dumps(tree).encode())
        if asked.file not in files:
            return Answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        body = files[asked.file]
        tag, size = f'"{hashlib.sha256(body).hexdigest()}"', str(len(body))
        if self.storage and asked.file.endswith(".safetensors"):  # as the hub does for large files
            elsewhere = {"Location": f"{self.storage.address}/stored/resolve/{commit}/{asked.file}"}
            return Answer(302, b"", elsewhere | {"X-Linked-Etag": tag, "X-Linked-Size": size, "X-Repo-Commit": commit})
        return Answer(200, body, {"ETag": tag, "X-Repo-Commit": commit})


class Handler(BaseHTTPRequestHandler):
    timeout = 20

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        file, revision, what = "", "main", "?"
        if path.startswith("/api/models/"):
            name, what = path.removeprefix("/api/models/"), "info"
            for key, kind in (("/auth-check", "auth"), ("/revision/", "info"), ("/tree/", "tree")):
                if key in name:
                    name, _, rest = name.partition(key)
                    what, revision = kind, rest or "main"
        elif "/resolve/" in path:
            name, _, rest = path.strip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            what = "file"
        else:
            name = path
        get = self.headers.get
        asked = Asked(what, self.command, path, file, get("Range", ""), get("Authorization", ""))
        self.server.asked.append(asked)
        status, body, headers = self.server.answer(asked, name, revision)
        if asked.range and status == 200:
            start = int(asked.range.removeprefix("bytes=").rstrip("-"))
            headers = headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            status, body = 206, body[start:]
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            cuts = self.server.cuts.get(file)
            self.wfile.write(body[: cuts.pop(0)] if cuts else body)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub, the client pointed at it, with an empty cache, no token, and no patience between its tries."""
    server, wait = Hub(), time.sleep
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.setenv(name, "")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: wait(min(seconds, 0.01)))
    close_session()  # a client of another test, with its settings
    yield server
    server.stop()
    close_session()
    assert not [a.path for a in server.asked if a.what == "?"]  # nothing beside the model is asked for


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The files of small random Llamas that read bytes: `one`, its like `other`, and `one` in two `shards`."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({sign: i for i, sign in enumerate(signs)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip

    def files(folder, seed, **how):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, **how)
        tokenizer.save_pretrained(folder)
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    at = tmp_path_factory.mktemp("made")
    found = {
        "one": files(at / "one", 0),
        "other": files(at / "other", 1),
        "shards": files(at / "shards", 0, max_shard_size="17KB"),
    }
    assert SMALL | {SINGLE} == set(found["one"]) and len(shards_of(found["shards"])) == 2
    return found


def shards_of(files):
    return sorted(f for f in files if f.startswith("model-"))


def same_weights(lm, files):
    """Whether a model has the weights that these files hold."""
    loaded = lm.weights.state_dict()
    return all(
        torch.equal(loaded[key], value)
        for name, content in files.items()
        if name.endswith(".safetensors")
        for key, value in tensors_of(content).items()
    )


def refused(name=NAME, load=models.load, **how):
    """What a load says when it is refused: one line, without a secret or a place on this machine."""
    with pytest.raises(models.ModelError) as error:
        load(name, **how)
    said = str(error.value)
    assert TOKEN not in said and "/tmp" not in said and constants.HF_HUB_CACHE not in said and "\n" not in said
    assert "Traceback" not in said and len(said) < 700
    return said


def cached(*parts):
    return models.Path(constants.HF_HUB_CACHE, f"models--{NAME.replace('/', '--')}", *parts)


# --- a hub that answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one", "shards"])
def test_a_model_is_fetched_once_and_then_only_asked_about(hub, made, kind):
    commit = hub.holds(NAME, made[kind])
    lm = models.load(NAME)
    assert lm.identity == f"{NAME}@{commit}" and lm.layers == 2 and same_weights(lm, made[kind])
    got = sorted(a.file for a in hub.asked if a.method == "GET" and a.what == "file")
    assert got == sorted(made[kind])  # each file, once
    assert all("/resolve/main/" not in a.path for a in hub.asked)  # of one commit, even if main moves meanwhile
    hub.asked.clear()
    again = models.load(NAME)
    assert [a.what for a in hub.asked] == ["info"]
    assert again.identity == lm.identity and same_weights(again, made[kind])


def test_only_what_loading_reads_is_fetched(hub, made):
    junk = ("consolidated.safetensors", "original/consolidated.00.pth", "pytorch_model.bin", "little-q4.gguf",
            "onnx/model.onnx", "onnx/model.safetensors", "model-fp16.safetensors", "tf_model.h5", "README.md",
            "model-00001-of-00009.safetensors", "adapter.safetensors", "checkpoint-1/config.json")  # fmt: skip
    for kind in ("one", "shards"):
        hub.holds(f"lab/{kind}", made[kind] | dict.fromkeys(junk, b"x" * 99))
        hub.asked.clear()
        models.load(f"lab/{kind}")
        assert set(hub.count("file")) == set(made[kind])


def test_where_both_layouts_lie_side_by_side_one_is_fetched_and_it_is_the_one_that_loads(hub, made, tmp_path):
    both = made["shards"] | {SINGLE: made["other"][SINGLE]}
    hub.holds(NAME, both)
    assert same_weights(models.load(NAME), {SINGLE: both[SINGLE]})
    assert not set(shards_of(both)) & set(hub.count("file"))
    folder = tmp_path / "both"
    folder.mkdir()
    for name, content in both.items():
        (folder / name).write_bytes(content)
    assert [p.name for p in files.weight_files(folder)] == [SINGLE]  # what the identity of a folder is made of
    assert same_weights(models.load(str(folder)), {SINGLE: both[SINGLE]})


def test_shards_are_those_that_the_index_names_whatever_they_are_called(hub, made):
    index = json.loads(made["shards"][INDEX])
    called = dict(zip(shards_of(made["shards"]), ("weights_a.safetensors", "model.safetensors-2-of-2"), strict=True))
    called[shards_of(made["shards"])[1]] = "part.two.safetensors"
    index["weight_map"] = {k: called[f] for k, f in index["weight_map"].items()}
    files = {called.get(n, n): b for n, b in made["shards"].items()} | {INDEX: json.dumps(index).encode()}
    hub.holds(NAME, files)
    assert same_weights(models.load(NAME), files) and set(hub.count("file")) == set(files)


@pytest.mark.parametrize("how", ["commit", "tag", "branch with a slash"])
def test_a_pinned_revision_is_read_and_main_is_not_asked_for(hub, made, how):
    ref = {"commit": "v1", "tag": "v1", "branch with a slash": "refs/pr/1"}[how]
    old = hub.holds(NAME, made["other"], ref)
    hub.holds(NAME, made["one"])
    lm = models.load(NAME, revision=old if how == "commit" else ref)
    assert lm.identity == f"{NAME}@{old}" and same_weights(lm, made["other"])
    assert hub.asked[0].path == f"/api/models/{NAME}/revision/{old if how == 'commit' else ref}"
    assert not [a for a in hub.asked if "main" in a.path or a.path == f"/api/models/{NAME}"]
    hub.stop()
    assert models.load(NAME, revision=old if how == "commit" else ref).identity == lm.identity
    if how != "commit":
        assert "does not hold it whole" in refused()  # a tag does not stand in for main


def test_an_outline_fetches_no_weights_and_a_load_after_it_nothing_else(hub, made):
    hub.holds(NAME, made["shards"])
    outline = models.outline(NAME)
    assert (outline.d_model, outline.layers) == (16, 2)
    assert set(hub.count("file")) == set(made["shards"]) - set(shards_of(made["shards"]))
    hub.asked.clear()
    lm = models.load(NAME)
    assert same_weights(lm, made["shards"])
    assert set(hub.count("file")) == set(shards_of(made["shards"])) and hub.count("tree", "auth") == []


# --- a hub that refuses ------------------------------------------------------------------------------------------------


def test_a_gated_model_wants_a_token_that_may_read_it(hub, made, monkeypatch):
    hub.gated.add(NAME)
    hub.holds(NAME, made["one"])
    hub.storage = storage = Hub()
    storage.holds("stored", made["one"], hub.refs[NAME]["main"])
    try:
        assert f"{NAME} is gated and HF_TOKEN is not set" in refused()
        monkeypatch.setenv("HF_TOKEN", "hf_" + "another" * 5)
        said = refused()
        assert "is gated and the HF_TOKEN given may not read it" in said and "another" not in said
        assert hub.count("file") == [] and hub.asked[-1].authorization == "Bearer hf_" + "another" * 5
        hub.asked.clear()
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        lm = models.load(NAME)
        assert same_weights(lm, made["one"]) and TOKEN not in lm.identity
        assert {a.authorization for a in hub.asked} == {f"Bearer {TOKEN}"}
        assert storage.count("file") == [SINGLE]  # where the hub sends large files from
        assert {a.authorization for a in storage.asked} == {""}
    finally:
        storage.stop()


def test_a_token_that_the_hub_refuses_or_repeats_is_said_and_not_shown(hub, made, monkeypatch):
    hub.holds(NAME, made["one"])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.says["info"] = Answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
    assert "does not accept the HF_TOKEN given" in refused()
    hub.says["info"] = Answer(500, f"cannot serve {TOKEN}".encode())
    assert "cannot be asked" in refused()
    del hub.says["info"]
    hub.says["config.json"] = Answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"not you, {TOKEN}"})
    assert "may not read it" in refused()


@pytest.mark.parametrize("token", ["", TOKEN])
def test_a_missing_repository_and_a_missing_revision_are_said(hub, made, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.holds(NAME, made["one"])
    said = refused("lab/nothing")
    assert "no model 'lab/nothing'" in said and "packaged:" in said and "HF_TOKEN" in said
    said = refused(revision="v9")
    assert f"{NAME} has no revision 'v9'" in said and "no model" not in said
    assert "lab/a/b/c" in refused("lab/a/b/c")  # no name of a hub
    assert hub.count("file") == []


@pytest.mark.parametrize("kind", ["one", "shards"])
def test_a_renamed_repository_works_under_the_old_name_and_the_new_one_is_told(hub, made, capsys, kind):
    hub.renamed["lab/before"] = NAME
    commit = hub.holds(NAME, made[kind])
    lm = models.load("lab/before")
    assert same_weights(lm, made[kind])
    assert lm.identity == f"lab/before@{commit}"  # as asked for: the same with and without a network
    told = [line for line in capsys.readouterr().out.splitlines() if NAME in line]
    assert len(told) == 1 and "lab/before" in told[0]
    hub.stop()
    assert models.load("lab/before").identity == lm.identity
    assert NAME not in capsys.readouterr().out


def test_a_repository_without_safetensors_is_refused_before_anything_large_moves(hub, made):
    rest = {n: b for n, b in made["shards"].items() if n in SMALL}
    index, shards = {INDEX: made["shards"][INDEX]}, {n: made["shards"][n] for n in shards_of(made["shards"])}
    for number, large in enumerate(
        [{"pytorch_model.bin": b"x"}, {"little.gguf": b"x"}, {"consolidated.safetensors": b"x"}, shards, {}]
    ):
        hub.holds(f"lab/bad{number}", rest | large)
        assert "holds no safetensors weights" in refused(f"lab/bad{number}")
        assert not set(hub.count("file")) & set(large)
    one = dict(list(shards.items())[:1])
    hub.holds(NAME, rest | index | one)
    said = refused()
    assert "1 of the 2 files that it names are not there" in said and list(shards)[1] in said
    hub.holds("lab/cut", rest | {INDEX: b'{"weight_map": '} | shards)
    assert "it names no weights" in refused("lab/cut")
    assert not set(hub.count("file")) & set(shards)
    hub.holds("lab/bare", {SINGLE: made["one"][SINGLE]})
    assert "no config.json" in refused("lab/bare") and "no config.json" in refused("lab/bare", models.outline)
    assert SINGLE not in hub.count("file")


def test_what_is_wrong_inside_a_repository_is_said_without_a_place_on_this_machine(hub, made):
    hub.holds(NAME, made["one"] | {"config.json": b'{"model_type": "llama",'})
    assert "configuration cannot be used" in refused()
    hub.holds(NAME, made["one"] | {"tokenizer.json": b"{}"})
    assert "no tokenizer can be loaded" in refused()
    hub.holds(NAME, made["one"] | {SINGLE: made["one"][SINGLE][:-9]})
    assert "cut short or damaged" in refused()
    hub.holds(NAME, made["one"] | {SINGLE: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"})
    assert "Git LFS pointer" in refused()


@pytest.mark.parametrize("named", ["LlamaTokenizer", "GPT2Tokenizer", "GemmaTokenizer"])
def test_a_tokenizer_without_its_words_is_refused(hub, made, named, tmp_path):
    """transformers makes an empty one in silence where tokenizer_config.json is all there is."""
    config = json.loads(made["one"]["tokenizer_config.json"]) | {"tokenizer_class": named}
    files = {n: b for n, b in made["one"].items() if n != "tokenizer.json"}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    hub.holds(NAME, files)
    assert "no tokenizer can be loaded" in refused()
    assert "no tokenizer can be loaded" in refused(load=models.outline)
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / "folder" / name).write_bytes(content)
    assert "no tokenizer can be loaded" in refused(str(tmp_path / "folder"))


# --- a hub that breaks off ---------------------------------------------------------------------------------------------


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, made, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what the client keeps of a broken download: 10 MB
    hub.holds(NAME, made["shards"])
    first, second = shards_of(made["shards"])
    hub.cuts[first] = [5000, 2000]
    lm = models.load(NAME)
    assert same_weights(lm, made["shards"])
    ranges = [a.range for a in hub.asked if a.file == first and a.method == "GET"]
    assert ranges == ["", "bytes=5000-", "bytes=7000-"]
    assert hub.count("file").count(second) == 2  # HEAD and GET, once each
    hub.asked.clear()
    models.load(NAME)
    assert hub.count("file") == []


def test_a_download_that_cannot_go_on_is_said_and_whole_files_are_kept(hub, made):
    hub.holds(NAME, made["shards"])
    first, second = shards_of(made["shards"])
    hub.cuts[second] = [1000] + [0] * 20
    said = refused()
    assert "could not be fetched whole" in said and "Run again: the files that came whole are kept" in said
    hub.cuts.clear()
    hub.asked.clear()
    lm = models.load(NAME)
    assert same_weights(lm, made["shards"])
    assert set(hub.count("file")) == {second} and hub.count("file").count(second) == 2
    assert not list(cached().rglob("*.incomplete"))


def test_a_cache_that_cannot_be_written_is_said(hub, made):
    hub.holds(NAME, made["one"])
    models.Path(constants.HF_HUB_CACHE).write_text("a file in the folder's place")
    assert "could not be fetched whole" in refused()


@pytest.mark.parametrize("what", ["tree", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("answer", [Answer(500), Answer(429), Answer(404), Answer(200, b"<html>log in</html>")])
def test_half_a_snapshot_is_never_loaded_when_the_hub_fails_midway(hub, made, what, answer):
    hub.holds(NAME, made["one"])
    hub.says[what] = answer
    said = refused()
    assert "could not be fetched whole" in said and "http" not in said
    assert (f"it answers with status {answer.status}" if answer.status != 200 else "is no hub") in said
    hub.stop()
    refused()


# --- no hub ------------------------------------------------------------------------------------------------------------

UNASKABLE = {
    "stopped": None,
    "offline": None,
    "an error": Answer(500, b"Internal Server Error"),
    "too many requests": Answer(429, b'{"error": "slow down"}'),
    "maintenance": Answer(503, b"<html>back soon</html>", {"Content-Type": "text/html"}),
    "a wall to log in at": Answer(200, b"<html>hotel</html>", {"Content-Type": "text/html"}),
    "half an answer": Answer(200, b'{"id": "lab/little", "sha": "'),
    "a list": Answer(200, b"[]"),
    "nothing": Answer(200, b"{}"),
    "null": Answer(200, b"null"),
    "no commit": Answer(200, b'{"id": "lab/little", "siblings": []}'),
    "no JSON but bytes": Answer(200, b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("how", UNASKABLE)
def test_a_whole_copy_is_used_when_the_hub_cannot_be_asked_and_it_is_said(hub, made, how, capsys, monkeypatch):
    commit = hub.holds(NAME, made["shards"])
    online = models.load(NAME)
    if how == "stopped":
        hub.stop()
    elif how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.says["info"] = UNASKABLE[how]
    hub.asked.clear()
    capsys.readouterr()
    lm = models.load(NAME)
    assert lm.identity == online.identity == f"{NAME}@{commit}" and same_weights(lm, made["shards"])
    assert f"the copy fetched before is used, commit {commit[:12]}" in capsys.readouterr().out
    assert [a.what for a in hub.asked] == ([] if how in ("stopped", "offline") else ["info"])
    shutil.rmtree(cached())
    said = refused()
    assert f"the hub cannot be asked about {NAME}" in said and "does not hold it whole" in said and "packaged:" in said
    if how in ("an error", "too many requests", "maintenance"):
        assert f"it answers with status {UNASKABLE[how].status}" in said
    assert "'sha'" not in said and "NoneType" not in said and "line 1" not in said


def test_the_environment_alone_sends_a_run_to_the_cache(hub, made):
    """As a reader without a network sets it: another process, nothing of the client's changed from inside."""
    commit = hub.holds(NAME, made["one"])
    models.load(NAME)
    hub.asked.clear()
    away = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "1"}
    program = f"from helpers.lm import models; print(models.load({NAME!r}).identity)"
    run = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | away, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.splitlines()[-1:] == [f"{NAME}@{commit}"], run.stderr
    assert hub.asked == []


def test_of_two_commits_the_one_that_main_was_last_is_used(hub, made):
    old = hub.holds(NAME, made["one"])
    assert models.load(NAME).identity.endswith(old)
    new = hub.holds(NAME, made["other"])
    assert models.load(NAME).identity.endswith(new)
    hub.refs[NAME]["main"] = old
    assert models.load(NAME).identity.endswith(old)
    hub.stop()
    lm = models.load(NAME)
    assert lm.identity == f"{NAME}@{old}" and same_weights(lm, made["one"])
    cached("refs", "main").write_text(new + "\n")  # as another program may
    lm = models.load(NAME)
    assert lm.identity == f"{NAME}@{new}" and same_weights(lm, made["other"])
    pinned = models.load(NAME, revision=old)
    assert pinned.identity == f"{NAME}@{old}" and same_weights(pinned, made["one"])
    shutil.rmtree(cached("refs"))
    said = refused()
    assert "2 versions" in said and old in said and new in said and "revision" in said
    assert models.load(NAME, revision=new).identity == f"{NAME}@{new}"
    cached("refs").mkdir()
    cached("refs", "main").write_text("0" * 40)  # a commit that is not here
    assert "does not hold it whole" in refused()


def test_a_newer_version_that_broke_off_does_not_hide_the_whole_one(hub, made):
    old = hub.holds(NAME, made["one"])
    models.load(NAME)
    hub.holds(NAME, made["other"])
    hub.says[SINGLE] = Answer(500)
    refused()
    hub.stop()
    assert models.load(NAME).identity == f"{NAME}@{old}"


LACKING = {
    "a shard": lambda folder: (folder / shards_of(p.name for p in folder.iterdir())[1]).unlink(),
    "the index": lambda folder: (folder / INDEX).unlink(),
    "all weights": lambda folder: [p.unlink() for p in folder.glob("model*")],
    "all but config.json": lambda folder: [p.unlink() for p in folder.iterdir() if p.name != "config.json"],
    "the configuration": lambda folder: (folder / "config.json").unlink(),
    "the tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "the chat template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "where a reply ends": lambda folder: (folder / "generation_config.json").unlink(),
    "what a link to a shard points at": lambda folder: (
        (folder / shards_of(p.name for p in folder.iterdir())[0]).resolve().unlink()
    ),
    "what a link to the tokenizer points at": lambda folder: (folder / "tokenizer.json").resolve().unlink(),
    "what every link points at": lambda folder: shutil.rmtree(folder.parents[1] / "blobs"),
}


@pytest.mark.parametrize("lacking", LACKING)
def test_half_a_snapshot_is_refused_without_a_hub_and_made_whole_with_one(hub, made, lacking, monkeypatch):
    commit = hub.holds(NAME, made["shards"])
    models.load(NAME)
    folder = cached("snapshots", commit)
    LACKING[lacking](folder)
    lost = {n for n in made["shards"] if not (folder / n).is_file()}
    assert lost
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "does not hold it whole" in refused()
    if not lost & SMALL:
        assert models.outline(NAME).layers == 2  # which reads no weights
    else:
        assert "does not hold it whole" in refused(load=models.outline)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.asked.clear()
    lm = models.load(NAME)
    assert same_weights(lm, made["shards"]) and set(hub.count("file")) <= lost


def test_an_outline_is_not_taken_for_the_model(hub, made):
    hub.holds(NAME, made["one"])
    models.outline(NAME)
    hub.stop()
    assert models.outline(NAME).layers == 2
    assert "does not hold it whole" in refused()


def test_pickled_weights_in_the_cache_are_not_read_either(hub, made):
    """Another program may have fetched them beside, or instead of, the safetensors."""
    commit = hub.holds(NAME, made["one"])
    models.load(NAME)
    folder = cached("snapshots", commit)
    torch.save(tensors_of(made["other"][SINGLE]), folder / "pytorch_model.bin")
    hub.stop()
    assert same_weights(models.load(NAME), made["one"])
    (folder / SINGLE).unlink()
    assert "does not hold it whole" in refused()
    shutil.rmtree(cached("trees"))  # as a client writes none that fetches file by file
    assert "does not hold it whole" in refused()
