"""Entries are whole or absent: killed, damaged, raced and full-disk writes."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError

from helpers import store
from helpers.session import ROOT


def entry(n=3):
    return {"x": torch.arange(float(n))}


def test_a_second_call_is_a_hit_and_a_changed_parameter_is_not(cache):
    first = store.cached("kind", {"a": 1}, entry)
    hit = store.cached("kind", {"a": 1}, lambda: pytest.fail("computed again"))
    assert torch.equal(first["x"], hit["x"])
    assert store.cached("kind", {"a": 2}, lambda: entry(5))["x"].shape == (5,)
    sidecars = [json.loads(p.read_text()) for p in cache.glob("kind/*/sidecar.json")]
    assert len(sidecars) == 2 and sidecars[0]["parameters"]["libraries"]["torch"] == torch.__version__


def test_edited_code_is_not_a_stale_hit(cache, monkeypatch):
    store.cached("kind", {}, entry, "helpers.stats")
    monkeypatch.setitem(store._SOURCE, "helpers.stats", "edited = 1")
    assert store.cached("kind", {}, lambda: entry(7), "helpers.stats")["x"].shape == (7,)


@pytest.mark.parametrize(
    "damage", [lambda p: p.write_bytes(b""), lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1])]
)
def test_a_damaged_entry_is_named_and_made_again(cache, damage, capsys):
    store.cached("kind", {}, entry)
    damage(next(cache.glob("kind/*/tensors.safetensors")))
    assert torch.equal(store.cached("kind", {}, entry)["x"], entry()["x"])
    assert "damaged; it is made again" in capsys.readouterr().out


def test_a_failed_computation_leaves_nothing(cache):
    def broken():
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        store.cached("kind", {}, broken)
    with pytest.raises(RuntimeError), store.writing(cache / "kind" / "e") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not list(cache.rglob("*.safetensors")) and not list(cache.glob("kind/*"))


def test_a_killed_writer_leaves_no_entry_and_its_rubbish_is_swept(cache):
    code = (
        "import os, time; from helpers import store; from pathlib import Path\n"
        f"with store.writing(Path({str(cache / 'kind' / 'e')!r})) as f:\n"
        " (f / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline().strip() == "ready"
    assert list((cache / "kind").glob(".tmp-*"))
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not (cache / "kind" / "e").exists()
    with store.writing(cache / "kind" / "e") as folder:
        (folder / "whole").write_text("x")
    assert os.listdir(cache / "kind") == ["e"] and os.listdir(cache / "kind" / "e") == ["whole"]


def test_two_writers_at_once_do_no_harm(cache):
    target = cache / "kind" / "e"
    with store.writing(target) as one:
        (one / "who").write_text("slow")
        with store.writing(target) as other:
            (other / "who").write_text("fast")
    assert (target / "who").read_text() == "fast" and os.listdir(cache / "kind") == ["e"]


def test_a_full_disk_says_what_to_do(cache):
    with pytest.raises(OSError, match="disk is full.*CACHE_DIR"), store.writing(cache / "kind" / "e"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list((cache / "kind").iterdir())


def test_write_file_replaces_whole_files_only(tmp_path, monkeypatch):
    path = store.write_file(tmp_path / "a" / "f.txt", "one")
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda *_: (_ for _ in ()).throw(OSError("planted")))
    with pytest.raises(OSError, match="planted"):
        store.write_file(path, "two")
    assert path.read_text() == "one" and os.listdir(path.parent) == ["f.txt"]


def test_digest_sees_bits_shape_and_type():
    x = torch.tensor([1.0, 2.0])
    assert store.digest(x) == store.digest(x.clone())
    assert len({store.digest(v) for v in (x, x[None], x.double(), x + 1e-7, "x", {"a": 1})}) == 6


def test_sweeping_spares_the_living(cache):
    (cache / "kind").mkdir(parents=True)
    mine = cache / "kind" / f".tmp-{os.getpid()}-{time.monotonic_ns()}"
    mine.mkdir()
    with store.writing(cache / "kind" / "e"):
        pass
    assert mine.exists()


def make(folder, name, age=0.0):
    """A temporary of that name with a file in it, last touched `age` seconds ago."""
    (folder / name).mkdir(parents=True)
    (folder / name / "part").write_text("x")
    for path in (folder / name / "part", folder / name):
        os.utime(path, (time.time() - age,) * 2)
    return folder / name


def test_another_hosts_temporaries_are_left_until_they_are_a_day_old(cache, monkeypatch):
    here = store.temporary_name()
    monkeypatch.setattr(socket, "gethostname", lambda: "another-host")
    foreign = [store.temporary_name(), ".tmp-999999-1", f".tmp-{os.getpid()}-2"]  # the last two: of an older version
    monkeypatch.undo()
    monkeypatch.setenv("CACHE_DIR", str(cache))
    assert foreign[0].split("-")[1] != here.split("-")[1]
    young = [make(cache / "a", name) for name in foreign]
    old = [make(cache / "b", name, 2 * store.FOREIGN_AGE) for name in foreign]
    (old[0] / "part").touch()  # still written
    for folder in ("a", "b"):
        store.sweep(cache / folder)
    assert all(path.exists() for path in young) and [path.exists() for path in old] == [True, False, False]


def test_a_process_number_used_again_is_another_process(cache):
    _, host, pid, began, number = store.temporary_name().removeprefix(".").split("-")
    mine = make(cache, f".tmp-{host}-{pid}-{began}-{number}")
    earlier = make(cache, f".tmp-{host}-{pid}-{int(began) - 1}-{number}")
    store.sweep(cache)
    assert mine.exists() and not earlier.exists()


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
@pytest.mark.parametrize("proc", [["--mount-proc"], []])
def test_a_container_does_not_sweep_its_neighbours_temporaries(cache, proc):
    mine = make(cache, store.temporary_name())
    code = f"from helpers import store; from pathlib import Path; store.sweep(Path({str(cache)!r})); print('swept')"
    run = subprocess.run(
        ["unshare", "--pid", "--fork", *proc, sys.executable, "-c", code], capture_output=True, text=True
    )
    if "swept" not in run.stdout:
        pytest.skip(f"no namespaces here: {run.stderr[-100:]}")
    assert mine.exists()


@pytest.mark.parametrize(
    "number,said",
    [
        (errno.ENOSPC, "the disk is full .*GB free"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "cannot be written: the file system is read-only"),
        (errno.EACCES, "cannot be written: this user may not write there"),
    ],
)
def test_a_disk_that_cannot_be_written_says_why_and_names_the_setting(cache, number, said, monkeypatch):
    for error in (OSError(number, os.strerror(number)), SafetensorError(f"I/O error: x (os error {number})")):
        with pytest.raises(OSError, match=f"{said}.*CACHE_DIR") as raised, store.writing(cache / "kind" / "e"):
            raise error
        assert raised.value.errno == number
    refused = OSError(number, os.strerror(number), str(cache))
    monkeypatch.setattr("pathlib.Path.mkdir", lambda *_, **__: (_ for _ in ()).throw(refused))
    for write in (lambda: store.write_file(cache / "x", "x"), lambda: store.cached("new", {}, entry)):
        with pytest.raises(OSError, match=f"{said}.*CACHE_DIR"):
            write()


def test_a_cache_that_is_a_file_says_so_and_other_errors_stay(cache):
    cache.write_text("")
    with pytest.raises(OSError, match="a file stands where a folder is wanted.*CACHE_DIR"):
        store.cached("kind", {}, entry)
    with pytest.raises(PermissionError, match="^.Errno 13. no: '/elsewhere/x'"), store.full_disk_said(cache):
        raise PermissionError(errno.EACCES, "no", "/elsewhere/x")


def test_json_is_read_as_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "x.json").write_bytes('{"a": "caf\u00e9"}'.encode())
    path = str(tmp_path / "x.json")
    code = f"from helpers import store; from pathlib import Path; print(ascii(store.read_json(Path({path!r}))))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == r"{'a': 'caf\xe9'}", run.stderr


def checkout(folder, **modules):
    """A checkout of `helpers` with only the cache and these modules; `digests` says what the digest of each is."""
    (folder / "helpers" / "lm").mkdir(parents=True)
    for name in ("session", "store", "profiles"):
        shutil.copy(ROOT / "helpers" / f"{name}.py", folder / "helpers")
    for name, text in {"__init__": "", "lm/__init__": "", **modules}.items():
        (folder / "helpers" / f"{name}.py").write_text(text)


def digests(folder, *names):
    code = f"from helpers import store; print(*(store.code_digest('helpers.' + m) for m in {names!r}))"
    env = {**os.environ, "PYTHONPATH": str(folder)}
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=env)
    assert not run.returncode, run.stderr
    return run.stdout.split()


BELOW = "def f(x):\n    return x + 1\n"
ABOVE = "from helpers.lm import below\n\ndef g(x):\n    return below.f(x)\n"


def test_a_digest_covers_what_is_imported_and_not_where_it_lies_or_how_it_is_commented(tmp_path):
    checkout(tmp_path / "a", **{"lm/below": BELOW, "above": ABOVE})
    one = digests(tmp_path / "a", "above", "lm.below")
    assert len(set(one)) == 2
    checkout(tmp_path / "b", **{"lm/below": BELOW.replace("+ 1", "+ 2"), "above": ABOVE})
    edited = digests(tmp_path / "b", "above", "lm.below")
    assert set(edited).isdisjoint(one)
    commented = BELOW.replace("x):\n", 'x):\n    """One more."""\n    # indeed\n')
    checkout(tmp_path / "c", **{"below": commented, "lm/above": ABOVE.replace("helpers.lm ", "helpers ")})
    moved = digests(tmp_path / "c", "lm.above", "below")
    assert moved[0] == one[0]


def test_a_sidecar_cut_short_is_a_damaged_entry(cache, capsys):
    for _ in range(2):
        store.cached("kind", {"a": 1}, lambda: {"x": torch.ones(2)})
    sidecar = next(cache.glob("kind/*/sidecar.json"))
    sidecar.write_text(sidecar.read_text()[:20])
    assert torch.equal(store.cached("kind", {"a": 1}, lambda: {"x": torch.ones(2)})["x"], torch.ones(2))
    assert "is damaged; it is made again" in capsys.readouterr().out
