"""What a writer leaves that is killed, in a real process, with SIGKILL, at every step it takes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vzip.runtime.files.atomic import StagedFolder, replace_file

# In one process that forks once per step: the child is killed at its n-th call of the system that
# touches files, the parent looks at what is left.
KILLER = r"""
import dataclasses, json, os, shutil, signal, sys
from pathlib import Path
from vzip.runtime.files import atomic
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.bundle.writer import bundle_writer, update_manifest
from vzip.runtime.errors import BundleError

folder, old, new, case = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
target = folder / "target"
manifests = {name: read_bundle(path).manifest for name, path in (("old", old), ("new", new))}
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}
renames = atomic._exchange

def write():
    if case == "update":
        update_manifest(read_bundle(target), parity={"passed": True})
        return
    with bundle_writer(target) as writer:
        for name in ("model.onnx", "model.onnx.data"):
            data = (new / name).read_bytes()
            with (writer.folder / name).open("wb", buffering=0) as file:
                file.write(data[:100])
                step("half a file")
                file.write(data[100:])
        writer.publish(dataclasses.replace(manifests["new"], files={}))

def unsupported(one, other):
    raise OSError(22, "not here")

def exchange(one, other):
    step("exchange")
    renames(one, other)
    step("exchanged")

def step(event):
    global count
    count += 1
    if count > limit:
        os.kill(os.getpid(), signal.SIGKILL)

def state(path):
    if not path.exists():
        return "absent"
    try:
        manifest = read_bundle(path).manifest
    except BundleError:
        return "refused"
    if manifest == manifests["old"] and manifest.parity is None:
        return "old"
    return "new" if dataclasses.replace(manifest, parity=None) in manifests.values() else "mixed"

atomic._exchange = unsupported if case == "no exchange" else exchange
sync = os.fsync
seen = []
for limit in range(1000):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if case != "fresh":
        shutil.copytree(old, target)
    child = os.fork()
    if child == 0:
        count = 0
        os.fsync = lambda descriptor: (step("fsync"), sync(descriptor))[1]
        sys.addaudithook(lambda event, _: step(event) if event in EVENTS else None)
        write()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    hidden = sorted(path for path in folder.iterdir() if path != target)
    seen.append([state(target), [[path.name, state(path)] for path in hidden]])
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
# The next writer clears what the dead ones left.
leftover = folder / ".target.0123.vzip-tmp"
leftover.mkdir()
(leftover / "model.onnx").write_bytes(b"x")
if case != "update":
    count, limit = 0, 10**9
    write()
print(json.dumps([seen, sorted(path.name for path in folder.iterdir())]))
"""


def killed(tmp_path: Path, old: Path, new: Path, case: str) -> list[tuple[str, dict[str, str]]]:
    """Return, for each step, what stands at the target and what beside it."""
    command = [sys.executable, "-c", KILLER, str(tmp_path / "k"), str(old), str(new), case]
    threads = {"OPENBLAS_NUM_THREADS": "1"}  # a fork must not leave threads of numpy behind
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **threads}
    )
    assert done.returncode == 0, done.stderr
    seen, last = json.loads(done.stdout)
    assert len(seen) > 8, "the child was not killed at every step"
    if case != "update":
        assert last == ["target"], "the next writer left what a killed one had made"
    return [(target, dict(hidden)) for target, hidden in seen]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "first"), [("replace", "old"), ("fresh", "absent"), ("update", "old")]
)
def test_a_killed_writer_leaves_the_old_or_the_new_bundle(
    tmp_path, tiny_bundle, tiny_static_bundle, case, first
):
    seen = killed(tmp_path, tiny_bundle, tiny_static_bundle, case)
    states = [target for target, _ in seen]
    change = states.index("new")
    assert change > 5
    assert set(states[:change]) == {first}
    assert set(states[change:]) == {"new"}
    assert not seen[-1][1], "a writer that ends leaves nothing beside the bundle"
    for _, hidden in seen:
        assert "mixed" not in hidden.values()


def test_without_exchange_the_old_bundle_is_never_lost(tmp_path, tiny_bundle, tiny_static_bundle):
    seen = killed(tmp_path, tiny_bundle, tiny_static_bundle, "no exchange")
    for target, hidden in seen:
        assert target in {"old", "absent", "new"}
        if target == "absent":
            aside = [state for name, state in hidden.items() if name.endswith(".vzip-old")]
            assert aside == ["old"]
    assert "absent" in {target for target, _ in seen}
    assert seen[-1][0] == "new"


def test_sweeps_the_dead_and_spares_the_living(tmp_path):
    target = tmp_path / "a[1]*"
    living = StagedFolder(target)
    dead = tmp_path / ".a[1]*.00000000.vzip-tmp"
    dead.mkdir()
    others = [tmp_path / ".a1.00000000.vzip-tmp", tmp_path / ".a[1]*.00000000.vzip-old"]
    for other in others:
        other.mkdir()
    second = StagedFolder(target)
    assert not dead.exists()
    assert living.path.exists()
    assert all(other.exists() for other in others)
    living.close()
    living.close()
    assert second.path.exists()
    second.close()
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_without_exchange_a_rename_that_fails_is_taken_back(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    staged = StagedFolder(target)
    (staged.path / "new").touch()
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self == staged.path:
            raise OSError(errno.EIO, "the disk is gone")
        return rename(self, to)

    def unsupported(one: Path, other: Path) -> None:
        raise OSError(errno.ENOSYS, "not here")

    monkeypatch.setattr("vzip.runtime.files.atomic._exchange", unsupported)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        staged.commit()
    staged.close()
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_an_exchange_that_fails_for_another_reason_is_not_worked_around(tmp_path, monkeypatch):
    (tmp_path / "target").mkdir()
    staged = StagedFolder(tmp_path / "target")

    def fail(one: Path, other: Path) -> None:
        raise OSError(errno.EACCES, "not yours")

    monkeypatch.setattr("vzip.runtime.files.atomic._exchange", fail)
    with pytest.raises(PermissionError, match="not yours"):
        staged.commit()
    staged.close()
    assert list(tmp_path.iterdir()) == [tmp_path / "target"]


def test_replace_file_never_writes_into_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        replace_file(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_replace_file_leaves_the_old_file_on_any_error(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
