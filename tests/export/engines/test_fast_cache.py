"""What keeps the fastest form: found again, damaged, read-only, shared, killed while writing."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.places import ROOT
from vzip.export.engines.cpu import cache
from vzip.export.engines.cpu.choice import Candidate, Measured
from vzip.export.graph.reading import read_graph
from vzip.runtime import VisionEncoder
from vzip.runtime.bundle.fingerprint import fingerprint
from vzip.runtime.bundle.reader import FASTEST, Bundle, read_bundle
from vzip.runtime.errors import BackendError, InvalidInputError

GOLDEN = dict[str, np.ndarray[Any, Any]]


class Chooser:
    """Stands for the measurement: the bundle's graph, saved as a form with weights of its own."""

    def __init__(self, form: str = "dynamic") -> None:
        self.form, self.calls = form, 0

    def __call__(
        self, bundle: Bundle, opened: object, work: Path
    ) -> tuple[Candidate, list[Measured]]:
        self.calls += 1
        if self.form == "dynamic":
            graph = read_graph(bundle, "a test")
            ir.save(graph, work / "dynamic.onnx", external_data="dynamic.onnx.data")
        return Candidate(self.form, b"", work), [Measured(self.form, 1.0, 1.0, 1.0)]


@pytest.fixture
def chooser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Chooser:
    found = Chooser()
    monkeypatch.setattr(cache, "choose", found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users"))
    return found


def check(path: Path, golden: GOLDEN) -> None:
    with VisionEncoder.open(path, "onnxruntime", precision="fastest") as encoder:
        tokens = encoder.run(golden["images"][:2])
    assert np.array_equal(tokens.kept, golden["kept"][:2])
    assert np.abs(tokens.embeds - golden["embeds"][:2]).max() < 1e-4


def only(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if path.name != ".lock")
    return found


@pytest.mark.parametrize("form", ["dynamic", "own"])
def test_what_was_chosen_is_found_again(
    tiny_bundle: Path, golden: GOLDEN, chooser: Chooser, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    chooser.form = form
    check(tiny_bundle, golden)
    assert "measuring what is fastest here, once" in caplog.text
    caplog.clear()
    check(tiny_bundle, golden)
    assert (chooser.calls, caplog.text) == (1, "")
    names = {path.name for path in only(tiny_bundle / FASTEST).iterdir()}
    own = {"dynamic.onnx", "dynamic.onnx.data"} if form == "dynamic" else set()
    assert names == {"record.json", *own}
    record = cache.read_record(read_bundle(tiny_bundle), _version())
    assert record is not None
    assert record["form"] == form
    assert record["measured"][0]["kept_overlap"] == 1.0
    assert set(record["depends_on"]) == {
        "version", "files", "processor", "instructions", "threads", "onnxruntime"
    }  # fmt: skip


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


@pytest.mark.parametrize(
    "what", ["processor", "instructions", "threads", "onnxruntime", "bundle", "version"]
)
def test_anything_that_matters_is_measured_again(
    tiny_bundle: Path, golden: GOLDEN, chooser: Chooser, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    check(tiny_bundle, golden)
    if what == "processor":
        monkeypatch.setattr(cache, "processor", lambda: "another")
    elif what == "instructions":
        monkeypatch.setattr("vzip.export.engines.cpu.cache.instructions", lambda: ["avx2"])
    elif what == "threads":
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3, 4, 5, 6, 7})
    elif what == "onnxruntime":
        monkeypatch.setattr("onnxruntime.__version__", "1.0")
    elif what == "version":
        monkeypatch.setattr(cache, "VERSION", 99)
    else:
        right = cache._depends_on
        monkeypatch.setattr(
            cache, "_depends_on", lambda *given: {**right(*given), "files": {"model.onnx": "0"}}
        )
    check(tiny_bundle, golden)
    check(tiny_bundle, golden)
    assert chooser.calls == 2


DAMAGES = [
    "graph",
    "weights",
    "weights-cut",
    "graph-gone",
    "record",
    "record-list",
    "form",
    "files",
    "link",
    "fifo",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_form_is_measured_again(
    tiny_bundle: Path,
    golden: GOLDEN,
    chooser: Chooser,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    check(tiny_bundle, golden)
    folder = only(tiny_bundle / FASTEST)
    record = json.loads((folder / "record.json").read_text())
    weights, graph = folder / "dynamic.onnx.data", folder / "dynamic.onnx"
    if damage in {"graph", "weights"}:
        path = graph if damage == "graph" else weights
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "weights-cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "graph-gone":
        graph.unlink()
    elif damage == "record":
        (folder / "record.json").write_text("{")
    elif damage == "record-list":
        (folder / "record.json").write_text("[]")
    elif damage == "link":  # to the same bytes, which can change behind their digest
        weights.rename(tiny_bundle / "elsewhere")
        weights.symlink_to(tiny_bundle / "elsewhere")
    elif damage == "fifo":
        (folder / "record.json").unlink()
        os.mkfifo(folder / "record.json")
    elif damage == "form":
        (folder / "record.json").write_text(json.dumps({**record, "form": "../x"}))
    else:
        (folder / "record.json").write_text(json.dumps({**record, "files": {}}))
    caplog.clear()
    check(tiny_bundle, golden)
    assert chooser.calls == 2
    assert "is damaged; the fastest form is measured again" in caplog.text
    check(tiny_bundle, golden)
    assert chooser.calls == 2


def test_a_graph_that_reads_other_files_is_refused(
    tiny_bundle: Path, golden: GOLDEN, chooser: Chooser
) -> None:
    """Whoever wrote the digests too."""
    check(tiny_bundle, golden)
    folder = only(tiny_bundle / FASTEST)
    graph = folder / "dynamic.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"dynamic.onnx.data", b"/tmp/secret12345."))
    record = json.loads((folder / "record.json").read_text())
    record["files"]["dynamic.onnx"] = cache._digest(graph)
    (folder / "record.json").write_text(json.dumps(record))
    check(tiny_bundle, golden)
    assert chooser.calls == 2


def test_a_bundle_that_cannot_be_written_to_uses_the_users_cache(
    tiny_bundle: Path,
    golden: GOLDEN,
    chooser: Chooser,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    right = Path.mkdir

    def mkdir(self: Path, *args: Any, **options: Any) -> None:
        if self == tiny_bundle / FASTEST:
            raise PermissionError(13, "Permission denied")
        right(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    check(tiny_bundle, golden)
    check(tiny_bundle, golden)
    assert chooser.calls == 1
    assert not (tiny_bundle / FASTEST).exists()
    assert only(tmp_path / "users" / "vzip" / "fastest").is_dir()


def test_nowhere_to_keep_it_is_an_error(
    tiny_bundle: Path, chooser: Chooser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tiny_bundle / FASTEST).write_text("")
    (tmp_path / "users").write_text("")
    with pytest.raises(BackendError, match=r"kept nowhere \(.*File exists; .*; set XDG_CACHE_HOME"):
        VisionEncoder.open(tiny_bundle, "onnxruntime", precision="fastest")
    assert chooser.calls == 0


def test_a_full_disk_is_an_error_and_leaves_nothing(
    tiny_bundle: Path, golden: GOLDEN, chooser: Chooser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "choose", full)
    with pytest.raises(BackendError, match=r"can't be kept \(No space left on device"):
        VisionEncoder.open(tiny_bundle, "onnxruntime", precision="fastest")
    assert [path.name for path in (tiny_bundle / FASTEST).iterdir()] == [".lock"]
    monkeypatch.setattr(cache, "choose", chooser)
    check(tiny_bundle, golden)


# In processes of their own

SLOW = """
import os, sys, time
from pathlib import Path
from tests.export.engines.test_fast_cache import Chooser
from vzip.runtime import VisionEncoder
from vzip.export.engines.cpu import cache

bundle, log = Path(sys.argv[1]), Path(sys.argv[2])
chosen = Chooser()

def choose(*given):
    with log.open("a") as file:
        file.write("measuring\\n")
    done = chosen(*given)
    time.sleep(float(sys.argv[3]))
    return done

cache.choose = choose
VisionEncoder.open(bundle, "onnxruntime", precision="fastest").close()
"""


def start(bundle: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SLOW, str(bundle), str(log), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT)


def wait_for(log: Path) -> None:
    end = time.monotonic() + 120
    while not log.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_two_processes_measure_once(tiny_bundle: Path, golden: GOLDEN, tmp_path: Path) -> None:
    log = tmp_path / "log"
    both = [start(tiny_bundle, log, 1) for _ in range(2)]
    assert [each.wait() for each in both] == [0, 0]
    assert log.read_text().splitlines() == ["measuring"]
    check(tiny_bundle, golden)


def test_a_writer_that_is_killed_leaves_nothing_that_is_read(
    tiny_bundle: Path, golden: GOLDEN, chooser: Chooser, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    process = start(tiny_bundle, log, 600)
    wait_for(log)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(path.name.endswith(".vzip-tmp") for path in (tiny_bundle / FASTEST).iterdir())
    check(tiny_bundle, golden)
    assert chooser.calls == 1
    only(tiny_bundle / FASTEST)  # what the dead one left is gone


# What asks for it


@pytest.mark.parametrize("name", ["auto", "pytorch", "tensorrt"])
def test_other_backends_have_no_fastest_form(tiny_bundle: Path, name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"'fastest' with backend='{name}', expected"):
        VisionEncoder.open(tiny_bundle, name, precision="fastest")


def test_engines_have_no_fastest_form(tiny_bundle: Path) -> None:
    with pytest.raises(InvalidInputError, match="'fastest' with engine='x', expected"):
        VisionEncoder.open(tiny_bundle, "auto", engine="x", precision="fastest")


def test_a_bundle_without_a_reference_is_refused(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidInputError, match=r"no reference.npz, expected the untouched model"):
        VisionEncoder.open(tiny_bundle, "onnxruntime", precision="fastest")


def test_it_is_no_precision_that_engines_are_built_from(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    with pytest.raises(InvalidInputError, match="got precision='fastest'"):
        bundle.at("fastest")
    fast = bundle.to_run("fastest")
    assert (fast.fastest, fast.precision, fast.at(None).fastest) == (True, "fp32", False)
    assert bundle.to_run(None) == bundle


def test_its_tokens_are_told_from_the_bundles_own(tiny_bundle: Path) -> None:
    manifest = read_bundle(tiny_bundle).manifest
    assert fingerprint(manifest, fastest=True) != fingerprint(manifest)


def test_an_export_replaces_a_bundle_that_keeps_a_form(
    tiny_bundle: Path, golden: GOLDEN, chooser: Chooser
) -> None:
    from vzip.runtime.bundle.writer import bundle_writer

    check(tiny_bundle, golden)
    manifest = read_bundle(tiny_bundle).manifest
    with bundle_writer(tiny_bundle) as writer:
        for name in manifest.files:
            (writer.folder / name).write_bytes((tiny_bundle / name).read_bytes())
        writer.publish(manifest)
    assert not (tiny_bundle / FASTEST).exists()


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
