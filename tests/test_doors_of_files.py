"""What is no plain file is refused at once, at every door.

A FIFO without a writer blocks who opens it: each door has a few seconds before the test fails.
"""

from __future__ import annotations

import ast
import contextlib
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vzip.runtime
from tests.plain_files import KINDS, a_folder, quick
from tests.refusals import refused
from tests.runtime.llm.llm_server_stubs import checkpoint_of
from vzip.calibration.samples import Samples
from vzip.calibration.tuning.data import InstructionData
from vzip.export.checkpoint.containers import read_index, read_json, read_tensors
from vzip.export.checkpoint.folders import LocalFolder
from vzip.export.checkpoint.reader import Checkpoint, read_vision
from vzip.export.engines.published import build_lock
from vzip.export.engines.tensorrt.publish import _read_cache
from vzip.runtime import demo
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.errors import BundleError, CheckpointError, VzipError
from vzip.runtime.llm.experimental.embedding_table import EmbeddingTable
from vzip.runtime.llm.local.llama_cpp import _check_file
from vzip.runtime.llm.text_side import TextCheckpoint
from vzip.runtime.pictures.images import load_image
from vzip.runtime.pictures.video import is_video, sample_frames
from vzip.runtime.tokens.cache import TokenCache, read_image
from vzip.runtime.tokens.file import TokenFile

__all__ = ["quick"]  # a fixture

PACKAGE = Path(vzip.runtime.__file__).parent.parent


def of_checkpoint(use: Callable[[Path], Any], file: str) -> Callable[[Path], Any]:
    """Use a checkpoint with a file of which what was made is in the place."""

    def door(path: Path) -> Any:
        folder = checkpoint_of(path.parent / "checkpoint")
        shutil.copyfile(demo.checkpoint() / "model.safetensors", folder / "model.safetensors")
        (folder / file).unlink(missing_ok=True)
        path.rename(folder / file)
        if (path.with_name("pipe")).exists():
            path.with_name("pipe").rename(folder / "pipe")
        return use(folder)

    return door


def of_bundle(path: Path) -> Any:
    (path.parent / "bundle").mkdir()
    path.rename(path.parent / "bundle" / "manifest.json")
    return read_bundle(path.parent / "bundle")


def vision(folder: Path) -> Any:
    return read_vision(Checkpoint.open(folder), None)


def text(folder: Path) -> Any:
    return TextCheckpoint.open("sglang", folder)


def table(folder: Path) -> Any:
    return EmbeddingTable.of(text(folder))


DOORS: dict[str, Callable[[Path], Any]] = {
    "picture": load_image,
    "picture of the cache": read_image,
    "video": sample_frames,
    "token file": TokenFile.open,
    "manifest": of_bundle,
    "configuration": read_json,
    "index": read_index,
    "tensors": lambda path: read_tensors(path.rename(path.with_suffix(".safetensors")), ["a"]),
    "pickle": lambda path: read_tensors(path.rename(path.with_suffix(".bin")), ["a"]),
    "checkpoint's configuration": of_checkpoint(vision, "config.json"),
    "file of a checkpoint": lambda path: LocalFolder(path.parent).find(path.name),
    "checkpoint's processor": of_checkpoint(vision, "processor_config.json"),
    "checkpoint's tensors": of_checkpoint(vision, "model.safetensors"),
    "LLM's tokenizer": of_checkpoint(text, "tokenizer.json"),
    "LLM's settings": of_checkpoint(text, "generation_config.json"),
    "LLM's template": of_checkpoint(text, "chat_template.jinja"),
    "LLM's table": of_checkpoint(table, "model.safetensors"),
    "LLM's index": of_checkpoint(table, "model.safetensors.index.json"),
    "GGUF": _check_file,
    "list of images": lambda path: Samples.open(str(path), count=2),
    "records": lambda path: InstructionData(path, path.parent),
    "picture of a record": lambda path: InstructionData.read(
        type("", (), {"_folder": path.parent})(), path.name
    ),
}
# A folder is taken there: it holds the frames, or the images; or it is passed over.
FOLDERS = {"video", "list of images", "LLM's settings", "LLM's template", "LLM's index"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.usefixtures("quick")
def test_a_door_refuses_it_at_once(tmp_path, door, kind):
    kind(tmp_path / "it")
    if kind is a_folder and door in FOLDERS:
        with contextlib.suppress(VzipError):
            DOORS[door](tmp_path / "it")
        return
    with pytest.raises(VzipError) as caught:
        DOORS[door](tmp_path / "it")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.usefixtures("quick")
def test_doors_that_answer(tmp_path, kind):
    kind(tmp_path / "it")
    assert is_video(tmp_path / "it") is (kind is a_folder)
    said: list[str] = []
    assert _read_cache(tmp_path / "it", said.append) == b""
    assert len(said) == 1
    cache = TokenCache(tmp_path / "cache")
    kind(cache.path("1" * 64, "2" * 64))
    assert cache.get("1" * 64, "2" * 64) is None


def test_a_link_to_nothing_is_no_absent_file(tmp_path):
    (tmp_path / "preprocessor_config.json").symlink_to("../blobs/absent")
    with refused(CheckpointError, got="preprocessor_config.json", cure="put the file itself"):
        LocalFolder(tmp_path).find("preprocessor_config.json")
    assert LocalFolder(tmp_path).find("config.json") is None


def test_a_bundle_whose_folder_of_engines_leads_elsewhere(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "bundle" / "engines").symlink_to(tmp_path / "elsewhere")
    bundle: Any = types.SimpleNamespace(path=tmp_path / "bundle")
    with refused(BundleError, got="symbolic link"), build_lock(bundle, print):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


# Files are opened by `vzip.runtime.files.plain` and by nothing else, but for these.

OPENERS = {"open", "read_bytes", "read_text", "memmap", "fromfile", "load", "load_file",
           "safe_open", "mmap", "VideoCapture"}  # fmt: skip
LIBRARIES = {"np", "torch", "onnx", "json", "pickle", "tomllib"}
OWN = "vzip's own, or the system's"
ELSEWHERE = {
    # What opens no path.
    "runtime/agreement/reference_file.py: archive.open": "a member of an archive",
    "runtime/llm/opening.py: (choice or own(opened)).open": "an LLM",
    "runtime/cli/asking.py: choice.open": "an LLM",
    "runtime/llm/server/http_client.py: self._opener.open": "an address",
    "runtime/cli/serve.py: choice.open": "an LLM",
    "runtime/service/adapters/bodies.py: opener.open": "an address of a host that was allowed",
    "runtime/service/adapters/web.py: (Path(__file__).parent / PAGE).read_bytes": "our page",
    "runtime/service/encoding.py: Image.open": "bytes, of which the header is read",
    "runtime/service/adapters/triton_repository.py: (folder / 'model.plan').open": "written",
    "runtime/service/adapters/triton_repository.py: (folder / data).open": "written",
    "export/engines/cpu/choice.py: own.open": "an engine",
    "export/engines/cpu/choice.py: candidate.open": "an engine",
    "export/bench/peers/onnx_engines.py: candidate.open": "an engine",
    "export/bench/peers/onnx_engines.py: made.open": "an engine",
    # What is given a file that is open, or what was read.
    "runtime/llm/experimental/embedding_table.py: np.memmap": "an open file",
    "runtime/llm/llm_files.py: np.memmap": "an open file",
    "calibration/tuning/session.py: torch.load": "an open file",
    "runtime/llm/jinja_child.py: json.load": "standard input, which is ours",
    # Paths that were looked at just before, of libraries that take nothing else.
    "export/checkpoint/containers.py: safe_open": "behind open_plain",
    "export/checkpoint/containers.py: torch.load": "behind open_plain",
    "runtime/pictures/video_pyav.py: av.open": "behind open_plain",
    "runtime/pictures/video_opencv.py: cv2.VideoCapture": "behind open_plain",
    # What is written, locked or flushed.
    "runtime/files/plain.py: os.open": "this",
    "runtime/files/locks.py: os.open": "a lock",
    "runtime/files/names.py: os.open": "a folder",
    "runtime/files/atomic.py: temporary.open": "written",
    "runtime/files/atomic.py: os.open": "written before",
    "runtime/tokens/job.py: temporary.open": "written",
    "export/engines/tensorrt/build_log.py: os.open": "written, and new",
    "export/bench/judging.py: path.open": "written",
    "export/bench/judging.py: archive.open": "a member of an archive that is written",
    "export/bench/judging.py: np.load": "an open file",
    "runtime/console.py: os.open": "the null device",
    "runtime/console.py: Path(os.devnull).open": "the null device",
    # Of vzip or of the system.
    "runtime/doctor/environment.py: settings.read_text": OWN,
    "runtime/machine/process.py: siblings.read_text": OWN,
    "runtime/machine/process.py: path.read_text": OWN,
    "runtime/machine/sensors.py: path.read_bytes": OWN,
    "export/cli/models.py: (demo.checkpoint() / 'config.json').read_text": OWN,
    "export/bench/worker.py: Image.open": OWN,
    "export/contact/engine_steps.py: (copy / 'manifest.json').read_bytes": "a copy of ours",
    "export/contact/engine_steps.py: (place / RECORD).read_text": OWN,
    "export/contact/engine_steps.py: path.read_bytes": "what was just written",
    "export/contact/visit.py: (place / INSPECTOR).read_text": OWN,
    "export/contact/visit.py: path.read_text": "what a step of ours wrote",
    "export/debugging/comparing.py: path.read_text": "what a stage of ours wrote",
    # A script that is copied out and runs without vzip.
    "export/debugging/script.py: (FOLDER / 'compare.json').read_text": OWN,
    "export/debugging/script.py: (FOLDER / 'settings.json').read_text": OWN,
    "export/debugging/script.py: (FOLDER / 'tensors.json').read_text": OWN,
    "export/debugging/script.py: np.load": OWN,
    "export/debugging/script.py: onnx.load": "a copy of what was checked",
}


def opening_calls() -> Iterator[str]:
    for top in ("runtime", "export", "calibration"):
        for path in sorted((PACKAGE / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                called = ast.unparse(node.func)
                receiver, _, name = called.rpartition(".")
                # A class that is opened reads by itself: VisionEncoder, Checkpoint, TokenFile.
                last = receiver.rpartition(".")[2].lstrip("_")
                of_class = last[:1].isupper() and receiver not in ("Image", "Path")
                ours = receiver == "self" or called == "read_text"
                ours = ours or (name == "load" and receiver not in LIBRARIES)
                if name in OPENERS and not of_class and not ours:
                    yield f"{path.relative_to(PACKAGE).as_posix()}: {called}"


def test_nothing_else_opens_files():
    found = set(opening_calls())
    assert sorted(found - set(ELSEWHERE)) == []
    assert sorted(set(ELSEWHERE) - found) == []
