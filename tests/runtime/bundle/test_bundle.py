from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bundles import OWN as FILES
from tests.bundles import copy_files, pooled, put_in_the_place_of, tiled
from tests.faults import fill_disk
from tests.refusals import refused
from vzip.runtime.bundle.manifest import Manifest
from vzip.runtime.bundle.reader import LARGEST_MANIFEST, Bundle, read_bundle
from vzip.runtime.bundle.writer import BundleWriter, bundle_writer, update_manifest
from vzip.runtime.errors import BundleError


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def rewrite(bundle: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change a manifest's JSON."""
    parsed = json.loads((bundle / "manifest.json").read_text("utf-8"))
    change(parsed)
    (bundle / "manifest.json").write_text(json.dumps(parsed), "utf-8")


def sign(bundle: Path) -> None:
    """Write the digests of the files as they are: what an attacker would do."""
    from hashlib import sha256

    def change(parsed: dict[str, object]) -> None:
        parsed["files"] = {
            name: {"sha256": sha256(data).hexdigest(), "bytes": len(data)}
            for name in FILES[1:]
            if (data := (bundle / name).read_bytes())
        }

    rewrite(bundle, change)


def fill(writer: BundleWriter, source: Path) -> Manifest:
    """Put the files of another bundle into a new one; return its manifest without files."""
    copy_files(source, writer.folder)
    return dataclasses.replace(read_bundle(source).manifest, files={})


def publish(
    target: Path, source: Path, spoil: Callable[[BundleWriter], object] = lambda writer: None
) -> Bundle:
    """Publish the files of another bundle, after `spoil` has done its worst."""
    with bundle_writer(target) as writer:
        manifest = fill(writer, source)
        spoil(writer)
        return writer.publish(manifest)


# Reading


def test_reads_a_bundle(tiny_bundle):
    bundle = read_bundle(str(tiny_bundle))
    assert bundle.path == tiny_bundle
    assert bundle.manifest.selection.dominant == 4
    assert bundle.data_path == tiny_bundle / "model.onnx.data"
    assert bundle.read_model() == (tiny_bundle / "model.onnx").read_bytes()


def test_a_relative_path_stays_valid(tiny_bundle, monkeypatch):
    monkeypatch.chdir(tiny_bundle.parent)
    bundle = read_bundle(tiny_bundle.name)
    monkeypatch.chdir("/")
    assert bundle.read_model()


def test_what_lies_beside_the_listed_files_is_not_read(tiny_bundle):
    (tiny_bundle / "overlay.png").write_bytes(b"")
    assert read_bundle(tiny_bundle)


@pytest.mark.parametrize("name", FILES)
def test_refuses_a_missing_file(tiny_bundle, name):
    (tiny_bundle / name).unlink()
    with refused(BundleError, got=name, cause="incomplete"):
        read_bundle(tiny_bundle)


def test_refuses_what_is_no_folder(tiny_bundle):
    with refused(BundleError, got="a file", expected="vzip export -o"):
        read_bundle(tiny_bundle / "model.onnx")
    with refused(BundleError, got=("absent", "nothing"), expected="vzip export -o"):
        read_bundle(tiny_bundle / "absent")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_refuses_another_size(tiny_bundle, name, verify):
    path = tiny_bundle / name
    data = path.read_bytes()
    for spoilt in (b"", data[:-1], data + b"\0"):
        path.write_bytes(spoilt)
        with refused(BundleError, got=(name, f"{len(spoilt)} bytes"), expected=str(len(data))):
            read_bundle(tiny_bundle, verify=verify)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_refuses_any_flipped_bit(tiny_bundle, name):
    path = tiny_bundle / name
    good = path.read_bytes()
    for place in (0, len(good) // 2, len(good) - 1):
        spoilt = bytearray(good)
        spoilt[place] ^= 1
        path.write_bytes(spoilt)
        with refused(BundleError, got=(name, "SHA-256"), expected="…"):
            read_bundle(tiny_bundle)
    path.write_bytes(good)
    assert read_bundle(tiny_bundle)


def test_verify_false_trusts_the_content_of_the_weights_alone(tiny_bundle):
    path = tiny_bundle / "model.onnx.data"
    path.write_bytes(b"\1" * path.stat().st_size)
    bundle = read_bundle(tiny_bundle, verify=False)
    with refused(BundleError, got=("model.onnx.data", "SHA-256")):
        bundle.read_model()


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda parsed: parsed.update(token_order="reversed"), "'token_order' is 'reversed'"),
        (lambda parsed: parsed.update(files={}), "lacks model.onnx"),
        (lambda parsed: parsed["files"].pop("model.onnx.data"), "model.onnx.data"),
    ],
)
def test_refuses_a_manifest_that_was_tampered_with(tiny_bundle, change, got):
    rewrite(tiny_bundle, change)
    with refused(BundleError, got=(f"{tiny_bundle}: ", got)):
        read_bundle(tiny_bundle)


def test_reads_no_more_than_a_manifest_can_have(tiny_bundle):
    with (tiny_bundle / "manifest.json").open("ab") as file:
        file.write(b" " * LARGEST_MANIFEST)
    with refused(BundleError, got="1048576 bytes"):
        read_bundle(tiny_bundle)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo", "folder", "socket", "device"])
def test_refuses_everything_but_plain_files(tiny_bundle, name, kind):
    put_in_the_place_of(tiny_bundle / name, kind)
    shown = {"symlink": "a symbolic link", "hard link": "a hard link"}.get(kind, "")
    with refused(BundleError, got=(name, shown), expected="a plain file"):
        read_bundle(tiny_bundle)


@pytest.mark.parametrize(
    "location",
    [
        *("../x", "/etc/hostname", "./model.onnx.data", "model.onnx", "sub/model.onnx.data", ""),
        "*/_ORT_MEM_ADDR_/*",  # ONNX Runtime takes what follows as an address in memory
    ],
)
def test_refuses_external_data_elsewhere(tiny_bundle, location):
    path = tiny_bundle / "model.onnx"
    path.write_bytes(with_location(path.read_bytes(), location))
    sign(tiny_bundle)
    with refused(BundleError, got=("'extra'", repr(location))):
        read_bundle(tiny_bundle)


@pytest.mark.parametrize(("offset", "length"), [(0, 10**6), (10**6, 1), (3868, 1), (0, 10**18)])
def test_refuses_external_data_out_of_range(tiny_bundle, offset, length):
    path = tiny_bundle / "model.onnx"
    path.write_bytes(with_location(path.read_bytes(), "model.onnx.data", offset, length))
    sign(tiny_bundle)
    with refused(BundleError, got=f"bytes {offset} to {offset + length}"):
        read_bundle(tiny_bundle)


def with_location(model: bytes, location: str, offset: int = 0, length: int = 4) -> bytes:
    """Append an external tensor to a model, by protobuf's merging of what stands twice."""

    def message(number: int, data: bytes) -> bytes:
        assert len(data) < 2**14
        return bytes([number << 3 | 2, len(data) & 0x7F | 0x80, len(data) >> 7]) + data

    pairs = {"location": location, "offset": str(offset), "length": str(length)}
    entries = b"".join(
        message(13, message(1, key.encode()) + message(2, value.encode()))
        for key, value in pairs.items()
    )
    tensor = message(8, b"extra") + entries + bytes([14 << 3, 1])
    return model + message(7, message(5, tensor))


# Writing


def test_publishes_what_can_be_read(tmp_path, tiny_bundle):
    target = tmp_path / "new"
    with bundle_writer(str(target)) as writer:
        assert writer.folder.parent == tmp_path  # the same file system: a rename must do
        manifest = fill(writer, tiny_bundle)
        assert not target.exists()
        published = writer.publish(manifest)
    assert published == read_bundle(target) == Bundle(target, read_bundle(tiny_bundle).manifest)
    assert names(target) == FILES
    assert names(tmp_path) == ["new", "tiny_bundle"]


def test_staging_gives_a_bundle_that_can_be_checked_first(tmp_path, tiny_bundle):
    with bundle_writer(tmp_path / "new") as writer:
        manifest = fill(writer, tiny_bundle)
        staged = writer.stage(manifest)
        assert read_bundle(staged.path) == staged
        assert not (tmp_path / "new").exists()
        writer.publish(dataclasses.replace(manifest, parity={"passed": True}))
    assert read_bundle(tmp_path / "new").manifest.parity == {"passed": True}


def test_a_parity_gate_that_fails_leaves_the_old_bundle(tiny_bundle, tiny_static_bundle):
    before = read_bundle(tiny_bundle)

    def gate(writer: BundleWriter) -> None:
        writer.stage(before.manifest)
        raise RuntimeError("gate")

    with pytest.raises(RuntimeError, match="gate"):
        publish(tiny_bundle, tiny_static_bundle, gate)
    assert read_bundle(tiny_bundle) == before
    assert names(tiny_bundle.parent) == ["tiny_bundle", "tiny_static_bundle"]


@pytest.mark.parametrize("state", ["whole", "of another version", "damaged"])
def test_replaces_a_bundle(tiny_bundle, tiny_static_bundle, state):
    manifest = tiny_bundle / "manifest.json"
    if state == "of another version":
        rewrite(tiny_bundle, lambda parsed: parsed.update(schema_version=0))
    elif state == "damaged":
        manifest.write_text(manifest.read_text()[:200])
    publish(tiny_bundle, tiny_static_bundle)
    assert read_bundle(tiny_bundle).manifest == read_bundle(tiny_static_bundle).manifest
    assert names(tiny_bundle.parent) == ["tiny_bundle", "tiny_static_bundle"]


def test_fills_an_empty_folder(tmp_path, tiny_bundle):
    (tmp_path / "new").mkdir()
    publish(tmp_path / "new", tiny_bundle)
    assert read_bundle(tmp_path / "new")


def test_files_have_the_mode_of_the_umask(tmp_path, tiny_bundle):
    before = os.umask(0o027)
    try:
        with bundle_writer(tmp_path / "new") as writer:
            manifest = fill(writer, tiny_bundle)
            (writer.folder / "model.onnx.data").chmod(0o600)  # as onnx leaves it
            writer.publish(manifest)
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o750
    for name in FILES:
        assert (tmp_path / "new" / name).stat().st_mode & 0o777 == 0o640


def test_every_file_and_folder_is_flushed_before_it_is_renamed(tmp_path, tiny_bundle, monkeypatch):
    flushed: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with bundle_writer(tmp_path / "new") as writer:
        manifest, hidden = fill(writer, tiny_bundle), writer.folder.name
        rename = Path.rename

        def note_rename(self: Path, to: Path) -> Path:
            flushed.append(f"{self.name} → {to.name}")
            return rename(self, to)

        monkeypatch.setattr(Path, "rename", note_rename)
        writer.publish(manifest)
    last = flushed.index(f"{hidden} → new")
    assert {*FILES, hidden} <= set(flushed[:last])
    assert flushed[last + 1 :] == [tmp_path.name]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_an_exception_leaves_nothing_behind(tmp_path, tiny_bundle, error):
    def fail(writer: BundleWriter) -> None:
        raise error

    with pytest.raises(type(error)):
        publish(tmp_path / "new", tiny_bundle, fail)
    assert names(tmp_path) == ["tiny_bundle"]


def test_a_writer_that_publishes_nothing_says_so(tmp_path):
    with refused(BundleError, expected="publish()"), bundle_writer(tmp_path / "new"):
        pass
    assert names(tmp_path) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, tiny_bundle):
    def fill_up(writer: BundleWriter) -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:  # the kernel's own ENOSPC
            file.write(b"x")

    with refused(BundleError, got=("new: ", "No space"), cure="free some space"):
        publish(tmp_path / "new", tiny_bundle, fill_up)
    assert names(tmp_path) == ["tiny_bundle"]


@pytest.mark.parametrize("when", range(6))
def test_a_disk_that_fills_while_flushing_leaves_the_old_bundle(
    tiny_bundle, tiny_static_bundle, monkeypatch, when
):
    before = read_bundle(tiny_bundle)
    with refused(BundleError, got="No space", cure="free some space"):
        publish(tiny_bundle, tiny_static_bundle, lambda writer: fill_disk(monkeypatch, after=when))
    assert read_bundle(tiny_bundle) == before
    assert names(tiny_bundle.parent) == ["tiny_bundle", "tiny_static_bundle"]


def test_a_read_only_folder_is_one_line(tmp_path, tiny_bundle):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    user = os.geteuid()
    for folder in [tmp_path, *tmp_path.parents][:4]:  # pytest-xdist adds one
        if user == 0:
            folder.chmod(folder.stat().st_mode | 0o055)
    if user == 0:  # root may write everywhere
        os.seteuid(65534)
    try:
        with (
            refused(BundleError, got=("new: ", "Permission denied"), cure="-o"),
            bundle_writer(closed / "new"),
        ):
            pass
    finally:
        os.seteuid(user)
    assert names(closed) == []


def test_a_missing_parent_is_one_line(tmp_path):
    with (
        refused(BundleError, cause=f"{tmp_path / 'a'} is no folder", cure="-o"),
        bundle_writer(tmp_path / "a" / "new"),
    ):
        pass
    assert names(tmp_path) == []


def test_other_errors_of_the_system_are_not_explained_away(tmp_path):
    with pytest.raises(FileNotFoundError), bundle_writer(tmp_path / "new"):
        (tmp_path / "weights of the user").read_bytes()
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "symlink", "folder", "more files", "no bundle"])
def test_replaces_nothing_but_a_bundle(tmp_path, tiny_bundle, kind):
    target = tmp_path / "precious"
    if kind == "file":
        target.write_text("thesis")
    elif kind == "symlink":
        target.symlink_to(tiny_bundle)
    elif kind == "more files":
        tiny_bundle.rename(target)
        (target / "thesis.txt").write_text("thesis")
    else:
        target.mkdir()
        name = "thesis.txt" if kind == "folder" else "manifest.json"
        (target / name).write_text('{"name": "a web app"}')
    before = sorted(tmp_path.rglob("*"))
    with (
        refused(BundleError, got="precious: ", expected="to replace", cure="-o"),
        bundle_writer(target),
    ):
        pytest.fail("it was about to be replaced")
    assert sorted(tmp_path.rglob("*")) == before


def test_does_not_replace_what_appeared_meanwhile(tmp_path, tiny_bundle):
    target = tmp_path / "new"

    def appear(writer: BundleWriter) -> None:
        target.mkdir()
        (target / "thesis.txt").write_text("thesis")

    with refused(BundleError, got="thesis.txt", expected="to replace", cure="-o"):
        publish(target, tiny_bundle, appear)
    assert names(target) == ["thesis.txt"]


def lead_out(folder: Path) -> None:
    model = folder / "model.onnx"
    model.write_bytes(with_location(model.read_bytes(), "weights.bin"))


@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (lead_out, "'weights.bin'"),
        (lambda folder: (folder / "model.onnx.data").write_bytes(b""), "model.onnx.data is empty"),
        (lambda folder: (folder / "notes.txt").write_bytes(b"x"), "notes.txt"),
        (lambda folder: (folder / "model.onnx.data2").write_bytes(b"x"), "model.onnx.data2"),
    ],
)
def test_publishes_nothing_that_a_reader_would_refuse(tmp_path, tiny_bundle, spoil, got):
    with refused(BundleError, got=got):
        publish(tmp_path / "new", tiny_bundle, lambda writer: spoil(writer.folder))
    assert names(tmp_path) == ["tiny_bundle"]


def test_two_builders_of_one_bundle_do_not_disturb_each_other(
    tmp_path, tiny_bundle, tiny_static_bundle
):
    target = tmp_path / "new"
    with bundle_writer(target) as one, bundle_writer(target) as other:
        first = one.publish(fill(one, tiny_bundle))
        assert read_bundle(target) == first
        second = other.publish(fill(other, tiny_static_bundle))
        assert read_bundle(target) == second
    assert names(tmp_path) == ["new", "tiny_bundle", "tiny_static_bundle"]


# Parity numbers


def test_update_manifest_changes_the_parity_alone(tiny_bundle):
    before = read_bundle(tiny_bundle)
    after = update_manifest(before, parity={"passed": False, "cosine_min": 0.5})
    assert read_bundle(tiny_bundle) == after
    assert dataclasses.replace(after.manifest, parity=None) == before.manifest
    assert update_manifest(after, parity=None) == before
    assert names(tiny_bundle) == FILES


def test_update_manifest_refuses_a_bundle_that_was_replaced(tiny_bundle):
    bundle = read_bundle(tiny_bundle)
    update_manifest(bundle, parity={"passed": True})
    with refused(BundleError, got="manifest.json", cure="open the bundle again"):
        update_manifest(bundle, parity={"passed": False})
    assert read_bundle(tiny_bundle).manifest.parity == {"passed": True}


def test_update_manifest_leaves_the_old_one_when_the_disk_is_full(tiny_bundle, monkeypatch):
    bundle = read_bundle(tiny_bundle)

    fill_disk(monkeypatch)
    with refused(BundleError, got="No space"):
        update_manifest(bundle, parity={"passed": True})
    monkeypatch.undo()
    assert read_bundle(tiny_bundle) == bundle
    assert names(tiny_bundle) == FILES


# The newline embedding

NEWLINE = np.arange(6, dtype=np.float32) - 2.5


def headed(shape: str) -> bytes:
    """Return a file in NumPy's format with a shape as it is written."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header


def npy(array: Any, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), version)
    return file.getvalue()


def with_newline(target: Path, source: Path, data: bytes) -> Bundle:
    """Publish another bundle's files and a newline embedding."""
    return publish(
        target, source, lambda writer: (writer.folder / "image_newline.npy").write_bytes(data)
    )


def test_reads_the_newline_embedding(tmp_path, tiny_bundle):
    bundle = with_newline(tmp_path / "new", tiny_bundle, npy(NEWLINE))
    assert sorted(bundle.manifest.files) == ["image_newline.npy", *FILES[1:]]
    newline = bundle.newline()
    assert newline.dtype == np.float32
    assert np.array_equal(newline, NEWLINE)
    assert np.array_equal(read_bundle(bundle.path).newline(), NEWLINE)
    # It is one of the files that a bundle may be replaced with, and without.
    assert with_newline(bundle.path, tiny_bundle, npy(2 * NEWLINE)).newline()[0] == -5
    assert names(publish(bundle.path, tiny_bundle).path) == FILES


def test_a_bundle_without_newline_says_so(tiny_bundle):
    with refused(BundleError, got="lacks image_newline.npy"):
        read_bundle(tiny_bundle).newline()


def test_the_newlines_digest_is_checked_whenever_it_is_read(tmp_path, tiny_bundle):
    bundle = with_newline(tmp_path / "new", tiny_bundle, npy(NEWLINE))
    (bundle.path / "image_newline.npy").write_bytes(npy(-NEWLINE))
    with refused(BundleError, got=("image_newline.npy", "SHA-256")):
        read_bundle(bundle.path)
    unverified = read_bundle(bundle.path, verify=False)
    with refused(BundleError, got=("image_newline.npy", "SHA-256")):
        unverified.newline()
    (bundle.path / "image_newline.npy").unlink()
    with refused(BundleError, got="image_newline.npy can't be read"):
        bundle.newline()


@pytest.mark.parametrize(
    ("data", "got", "expected"),
    [
        (npy(NEWLINE[:5]), "float32 [5] in 20 bytes", "float32 [6] in 24"),
        (npy(NEWLINE[None]), "float32 [1, 6] in 24 bytes", "float32 [6]"),
        (npy(NEWLINE.astype(np.float16)), "float16 [6] in 12 bytes", "float32 [6]"),
        (npy(NEWLINE.astype(">f4")), ">f4 [6] in 24 bytes", "float32 [6]"),
        (npy(NEWLINE)[:-4], "float32 [6] in 20 bytes", "24"),
        (npy(NEWLINE) + b"more", "float32 [6] in 28 bytes", "24"),
        # More than there is takes no memory.
        (
            npy(NEWLINE).replace(b"(6,), }" + 13 * b" ", b"(99999999999999,), }"),
            "float32 [99999999999999] in 24 bytes",
            "float32 [6]",
        ),
        # In hexadecimal an extent may have more digits than Python prints.
        (headed("(0x" + 9000 * "f" + ",)"), "format 1.0", "float32 [6]"),
        (headed("(-6,)"), "format 1.0", "float32 [6]"),
        (npy(np.array([None] * 6, object)), "object [6]", "float32 [6]"),
        (npy(NEWLINE, (2, 0)), "format 1.0", "float32 [6]"),
        (b"no array", "format 1.0", "float32 [6]"),
        (npy(NEWLINE)[:9], "format 1.0", "float32 [6]"),
        (npy(NEWLINE).replace(b"'<f4'", b"[[[[["), "format 1.0", "float32 [6]"),
        (npy(NEWLINE).replace(b"{'descr'", b"{{[]: 1}"), "format 1.0", "float32 [6]"),
        (npy(NEWLINE).replace(b"(6,)", b"(~6)"), "format 1.0", "float32 [6]"),
        (npy(NEWLINE * np.inf), "NaN or infinite", "finite"),
        (npy(np.zeros(4000, np.float32)), "16128 bytes", "10024 for float32 [6]"),
    ],
)
def test_refuses_a_newline_that_is_not_the_manifests(tmp_path, tiny_bundle, data, got, expected):
    bundle = with_newline(tmp_path / "new", tiny_bundle, data)
    with refused(BundleError, got=(f"{bundle.path}: image_newline.npy ", got), expected=expected):
        bundle.newline()


def test_a_newline_as_wide_as_no_memory_is_not_waited_for(tmp_path, tiny_bundle):
    bundle = with_newline(tmp_path / "new", tiny_bundle, npy(NEWLINE))
    llm = dataclasses.replace(bundle.manifest.llm, hidden_size=2**53)
    manifest = copy.copy(bundle.manifest)
    object.__setattr__(manifest, "llm", llm)
    with refused(BundleError, got="float32 [6]", expected=str(2**53)):
        Bundle(bundle.path, manifest).newline()


@pytest.mark.parametrize(
    ("change", "why"),
    [(tiled("newline"), "'tiling.order' is 'newline'"), (pooled, "'tower.pool' is 2")],
)
def test_refuses_a_bundle_that_lacks_the_newline_that_its_tokens_take(
    tmp_path, tiny_bundle, change, why
):
    target = tmp_path / "new"
    lacking = refused(BundleError, got="lacks image_newline.npy", expected=why)
    with lacking, bundle_writer(target) as writer:
        writer.publish(change(fill(writer, tiny_bundle)))
    with bundle_writer(target) as writer:
        manifest = change(fill(writer, tiny_bundle))
        (writer.folder / "image_newline.npy").write_bytes(npy(NEWLINE))
        bundle = writer.publish(manifest)
    assert np.array_equal(bundle.newline(), NEWLINE)


@pytest.mark.parametrize(
    ("files", "got", "cure"),
    [
        (("config.json", "model.safetensors"), "a checkpoint", "vzip export --model"),
        (("adapter_config.json",), "an adapter", "merge it"),
    ],
)
def test_a_checkpoint_where_a_bundle_is_expected_is_called_one(tmp_path, files, got, cure):
    folder = tmp_path / "my llava"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    with refused(BundleError, got=(got, str(folder)), cure=cure):
        read_bundle(folder)
    if "config.json" in files:
        with refused(BundleError, cure=f"'{folder}'"):  # quoted for a shell
            read_bundle(folder)


def test_an_alias_where_a_bundle_is_expected_is_called_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused(BundleError, cause="alias", cure="vzip export --model llava-1.5-7b"):
        read_bundle("llava-1.5-7b")
