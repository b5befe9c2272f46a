from __future__ import annotations

import dataclasses
import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from tests.bundles import OWN, copy_files, engine_record, names, put_in_the_place_of
from tests.faults import fill_disk, killed
from tests.refusals import refused
from vzip.runtime.bundle.reader import Bundle, open_engine, read_bundle
from vzip.runtime.bundle.writer import add_engine, bundle_writer, update_manifest
from vzip.runtime.errors import BundleError
from vzip.runtime.files.codec import MisfitError

OLD, NEW = b"the old engine" * 10, b"another engine" * 20


def add(bundle: Bundle, plan: bytes, name: str = "orin") -> Bundle:
    return add_engine(bundle, name, engine_record(bundle, plan), plan)


def read(bundle: Bundle, name: str = "orin") -> bytes:
    with open_engine(bundle, name) as file:
        return file.read()


def test_adds_an_engine_and_reads_it(tiny_bundle):
    before = read_bundle(tiny_bundle)
    after = add(before, OLD)
    assert read_bundle(tiny_bundle) == after
    assert dataclasses.replace(after.manifest, engines={}) == before.manifest
    assert (tiny_bundle / "engines" / "orin.plan").read_bytes() == OLD == read(after)
    judged = update_manifest(after, parity={"passed": True})
    assert judged.manifest.engines == after.manifest.engines
    assert names(tiny_bundle / "engines") == ["orin.plan"]


def test_adds_a_second_and_replaces_the_first(tiny_bundle):
    bundle = add(add(read_bundle(tiny_bundle), OLD), memoryview(NEW), name="thor")  # type: ignore[arg-type]
    bundle = add(bundle, NEW)
    assert read(bundle) == read(bundle, "thor") == NEW
    assert read_bundle(tiny_bundle) == bundle
    assert names(tiny_bundle / "engines") == ["orin.plan", "thor.plan"]


def test_a_name_that_begins_another_leaves_its_file_alone(tiny_bundle):
    bundle = add(read_bundle(tiny_bundle), OLD, name="x.y")
    folder = tiny_bundle / "engines"
    # As a writer leaves it that is killed between the manifest and the last rename.
    digest = bundle.manifest.engines["x.y"].sha256
    (folder / "x.y.plan").rename(folder / f".x.y.{digest[:16]}.plan")
    bundle = add(bundle, NEW, name="x")
    assert (read(bundle, "x"), read(bundle, "x.y")) == (NEW, OLD)


def test_an_engine_that_is_renamed_while_it_is_opened(tiny_bundle, monkeypatch):
    bundle = add(read_bundle(tiny_bundle), OLD)
    final = tiny_bundle / "engines" / "orin.plan"
    waiting = final.with_name(f".orin.{bundle.manifest.engines['orin'].sha256[:16]}.plan")
    final.rename(waiting)
    opened = os.open

    def raced(path: str | Path, *arguments: int, **place: int) -> int:
        if Path(path) == waiting and waiting.exists():
            waiting.rename(final)
        return opened(path, *arguments, **place)

    monkeypatch.setattr(os, "open", raced)
    assert read(bundle) == OLD


def test_a_missing_or_damaged_engine_leaves_the_graph_usable(tiny_bundle):
    add(read_bundle(tiny_bundle), OLD)
    path = tiny_bundle / "engines" / "orin.plan"
    path.write_bytes(b"")
    assert read_bundle(tiny_bundle).read_model()
    path.unlink()
    bundle = read_bundle(tiny_bundle)
    with refused(BundleError, got="engines: orin.plan can't be read"):
        read(bundle)


@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo", "folder", "linked folder"])
def test_opens_nothing_but_a_plain_file(tiny_bundle, kind):
    bundle = add(read_bundle(tiny_bundle), OLD)
    folder = tiny_bundle / "engines"
    if kind == "linked folder":
        folder.rename(tiny_bundle.parent / "elsewhere")
        folder.symlink_to(tiny_bundle.parent / "elsewhere")
    else:
        put_in_the_place_of(folder / "orin.plan", kind)
    with refused(BundleError, expected="a plain file"):
        read(bundle)


def test_refuses_a_record_that_is_not_the_engines(tiny_bundle):
    bundle = read_bundle(tiny_bundle)
    with refused(BundleError, got=("140 bytes", "280"), cause="a defect"):
        add_engine(bundle, "orin", engine_record(bundle, OLD), NEW)
    record = dataclasses.replace(engine_record(bundle, OLD), model_sha256="0" * 64)
    with refused(BundleError, got="000000000000…", cure="build the engine again"):
        add_engine(bundle, "orin", record, OLD)
    with refused(MisfitError, got="'../orin'", expected="letters, digits"):
        add_engine(bundle, "../orin", engine_record(bundle, OLD), OLD)
    assert names(tiny_bundle) == OWN


def test_refuses_a_bundle_that_was_replaced(tiny_bundle, tiny_static_bundle):
    bundle = read_bundle(tiny_bundle)
    update_manifest(bundle, parity={"passed": True})
    with refused(BundleError, cure="open the bundle again"):
        add(bundle, OLD)
    assert names(tiny_bundle / "engines") == []


@pytest.mark.parametrize("when", range(6))
def test_a_full_disk_leaves_the_old_engine(tiny_bundle, monkeypatch, when):
    before = add(read_bundle(tiny_bundle), OLD)
    fill_disk(monkeypatch, after=when)
    if when == 5:  # as many as there are
        assert read(add(before, NEW)) == NEW
        return
    with refused(BundleError, got="No space", cure="free some space"):
        add(before, NEW)
    monkeypatch.undo()
    after = read_bundle(tiny_bundle)
    # From the rename of the manifest on, the new one is there, though its flush failed.
    assert read(after) == (OLD if when < 3 else NEW)
    assert sha256(read(after)).hexdigest() == after.manifest.engines["orin"].sha256
    assert (after == before) == (when < 3)
    if when < 3:
        assert names(tiny_bundle / "engines") == ["orin.plan"]


def test_sigkill_at_any_step_leaves_the_old_engine_or_the_new(tiny_bundle):
    found = []
    for steps in range(100):
        shutil.rmtree(tiny_bundle / "engines", ignore_errors=True)
        start = dataclasses.replace(read_bundle(tiny_bundle).manifest, engines={})
        (tiny_bundle / "manifest.json").write_bytes(start.to_bytes())
        before = add(read_bundle(tiny_bundle), OLD)
        was_killed = killed(lambda before=before: add(before, NEW), steps)  # type: ignore[misc]
        after = read_bundle(tiny_bundle)
        found.append(read(after))
        assert sha256(found[-1]).hexdigest() == after.manifest.engines["orin"].sha256
        # The next writer gets through, and nothing is left behind but what it knows as its own.
        assert read(add(after, b"third")) == b"third"
        assert [name for name in names(tiny_bundle / "engines") if "vzip-tmp" not in name] == [
            "orin.plan"
        ]
        for entry in tiny_bundle.glob("**/.*"):
            entry.unlink()
        if not was_killed:
            break
    assert len(found) >= 6  # five flushes at least; 3.10's pathlib hides the renames
    assert found == [OLD] * found.count(OLD) + [NEW] * found.count(NEW)


def test_an_export_replaces_a_bundle_and_its_engines(tiny_bundle, tiny_static_bundle):
    add(read_bundle(tiny_bundle), OLD)
    for name in ("timing.cache", ".lock", ".orin.0123456789abcdef.plan", ".x.0123.vzip-tmp"):
        (tiny_bundle / "engines" / name).write_bytes(b"x")
    manifest = add(read_bundle(tiny_static_bundle), OLD).manifest
    before = names(tiny_bundle)
    kept = refused(BundleError, got="the engine 'orin'", cure="--replace")
    with kept, bundle_writer(tiny_bundle):
        pytest.fail("hours of work were about to go")
    assert names(tiny_bundle) == before
    with bundle_writer(tiny_bundle, replace=True) as writer:
        copy_files(tiny_static_bundle, writer.folder)
        writer.publish(manifest)
    assert read_bundle(tiny_bundle).manifest == dataclasses.replace(manifest, engines={})
    assert names(tiny_bundle) == OWN


@pytest.mark.parametrize("kind", ["file", "link", "foreign"])
def test_an_export_replaces_no_folder_that_is_not_of_engines(tiny_bundle, kind):
    folder = tiny_bundle / "engines"
    if kind == "file":
        folder.write_text("thesis")
    elif kind == "link":
        folder.symlink_to(tiny_bundle.parent)
    else:
        folder.mkdir()
        (folder / "thesis.txt").write_text("thesis")
    before = names(tiny_bundle)
    with refused(BundleError, got="['engines", cure="-o"), bundle_writer(tiny_bundle):
        pytest.fail("it was about to be replaced")
    assert names(tiny_bundle) == before


def test_publishes_reference_answers(tmp_path, tiny_bundle):
    manifest = read_bundle(tiny_bundle).manifest
    with bundle_writer(tmp_path / "new") as writer:
        copy_files(tiny_bundle, writer.folder)
        (writer.folder / "reference.npz").write_bytes(b"arrays")
        writer.publish(manifest)
    assert read_bundle(tmp_path / "new").manifest.files["reference.npz"].bytes == 6
    (tmp_path / "new" / "reference.npz").write_bytes(b"arrayz")
    with refused(BundleError, got="reference.npz has SHA-256"):
        read_bundle(tmp_path / "new")
