"""Entries are whole or absent: killed, damaged, raced and full-disk writes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from helpers import store


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
    store.cached("kind", {}, entry, ("stats",))
    monkeypatch.setitem(store._SOURCE, "stats", "edited")
    assert store.cached("kind", {}, lambda: entry(7), ("stats",))["x"].shape == (7,)


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
