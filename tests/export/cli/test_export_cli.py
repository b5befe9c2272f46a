"""`vzip-export` and `vzip check` at every door: one clear line, and nothing half-written."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.layouts import CONFIG, write_layout
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.cli.main import main
from vzip.runtime.encoder import VisionEncoder
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files.atomic import is_temporary

SHARD = "model-00002-of-00004.safetensors"  # the tower's
QUICK = ("--tokens", "16", "--no-check")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint, which no test changes."""
    folder = tmp_path_factory.mktemp("good") / "tiny"
    write_layout("llava-hf", folder)
    return folder


@pytest.fixture(scope="module")
def good_bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "good"
    assert main(["export", "--model", str(model), *QUICK, "-o", str(folder)]) == 0
    return folder


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may spoil."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to write bundles into."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], place: Path) -> Callable[..., str]:
    """Return a way to run a command that is refused, and get its one line."""

    def run(*arguments: str | Path, command: str = "export", status: int = 2) -> str:
        output = [] if "-o" in arguments or command != "export" else ["-o", str(place / "new")]
        before = contents(place)
        capsys.readouterr()
        assert main([command, *map(str, arguments), *output]) == status
        captured = capsys.readouterr()
        assert captured.out == ""
        assert contents(place) == before
        return the_error(captured.err)

    return run


def the_error(err: str) -> str:
    """Return the one line that says what is wrong; it is the last, after what was going on."""
    lines = err.splitlines()
    assert "Traceback" not in err
    assert [line for line in lines if "error:" in line] == lines[-1:], err
    return lines[-1]


# The model


def test_a_model_that_is_none(
    refused: Callable[..., str], model: Path, broken: Path, tmp_path: Path
) -> None:
    line = refused("--model", "lava-1.5-7b")
    assert "'lava-1.5-7b'" in line
    assert "'llava-1.5-7b'" in line
    assert str(tmp_path / "nowhere") in refused("--model", tmp_path / "nowhere")
    assert "config.json" in refused("--model", model / "config.json")
    assert "--model" in refused("--tokens", "9")
    assert "''" in refused("--model", "")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("--model", tmp_path / "empty")
    (broken / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in refused("--model", broken, *QUICK)


def test_a_broken_config(refused: Callable[..., str], broken: Path) -> None:
    shape = {"text_config": {"model_type": "llama", "hidden_size": 64}}
    for text, says in (
        ("{", "config.json"),
        ("[]", "config.json"),
        ("", "config.json"),
        ("{}", "model_type"),
        (json.dumps(CONFIG | {"model_type": "bert"}), "bert"),
        (json.dumps(CONFIG | {"vision_feature_layer": [-2, 0]}), "feature_layer is 0"),
        (json.dumps(CONFIG | shape), "shape"),
    ):
        (broken / "config.json").write_text(text)
        assert says in refused("--model", broken, *QUICK), text


def test_a_missing_tensor(refused: Callable[..., str], tmp_path: Path) -> None:
    absent = "tower.encoder.layers.1.mlp.fc1.weight"
    write_layout("llava-hf-single", tmp_path / "lacks", keep=lambda name: name != absent)
    line = refused("--model", tmp_path / "lacks", *QUICK)
    assert "encoder.layers.1.mlp.fc1.weight" in line


def test_a_missing_shard(refused: Callable[..., str], broken: Path) -> None:
    (broken / SHARD).unlink()
    assert SHARD in refused("--model", broken, *QUICK)


def test_corrupt_shards(refused: Callable[..., str], broken: Path) -> None:
    data = (broken / SHARD).read_bytes()
    for spoilt in (b"", b"not a tensor file", data[: len(data) // 2], b"\xff" * len(data)):
        (broken / SHARD).write_bytes(spoilt)
        assert SHARD in refused("--model", broken, *QUICK)


def test_a_tensor_of_another_shape(refused: Callable[..., str], broken: Path) -> None:
    state = load_file(broken / SHARD)
    name = next(name for name in state if name.endswith("0.mlp.fc1.weight"))
    save_file(state | {name: torch.zeros(8, 8)}, broken / SHARD)
    line = refused("--model", broken, *QUICK)
    assert f"'{name}'" in line
    assert "has shape [8, 8], expected [64, 32]" in line


def test_a_revision_of_a_folder(refused: Callable[..., str], model: Path) -> None:
    line = refused("--model", model, "--revision", "main", *QUICK)
    assert "revision 'main' was given for the local folder" in line


# Options


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Work where what is written is seen: a default output goes there."""
    monkeypatch.chdir(place)


def test_options_that_make_no_sense(
    refused: Callable[..., str], model: Path, in_place: None
) -> None:
    for options, says in (
        (["--tokens", "9", "--dominant", "5"], "tokens 9, dominant 5 and contextual None"),
        (["--tokens", "9", "--contextual", "5"], "tokens 9, dominant None and contextual 5"),
        (["--dominant", "5"], "contextual is None"),
        (["--contextual", "5"], "dominant is None"),
        (["--tokens", "1"], "tokens is 1,"),
        (["--tokens", "0"], "tokens is 0,"),
        (["--tokens", "-4"], "tokens is -4,"),
        (["--tokens", "many"], "'many'"),
        (["--dominant", "0", "--contextual", "4"], "dominant is 0,"),
        (["--dominant", "4", "--contextual", "-1"], "contextual is -1,"),
        (["--selection", "coverage", "--tokens", "9"], "CLS is to be kept with the selection"),
        (["--coverage-place", "0.2"], "got --coverage-place with --selection visionzip"),
        (["--tokens", "65"], "at most 64"),
        (["--tokens", "64", "--no-cls"], "at most 63"),
        (["--tokens", "9999999"], "at most 64"),
        (["--batch", "0"], "batch is 0"),
        (["--batch", "-2"], "batch is -2"),
        (["--max-batch", "0"], "batch is 0"),
        (["--max-batch", "-1"], "batch is -1"),
        (["--batch", "2", "--max-batch", "4"], "--max-batch"),
        (["--seed", "1"], "seed is 1"),
        (["--seed", "0", "--weights", "checkpoint"], "seed is 0"),
        (["--seed", "-1", "--weights", "random"], "seed is -1"),
        (["--seed", "x", "--weights", "random"], "'x'"),
        (["--weights", "none"], "'none'"),
        (["--merge", "max"], "'max'"),
        (["--selection", "best"], "'best'"),
        (["--tiles", "rows"], "'rows'"),
        (["--tiles", "newline"], "tiles is 'newline'"),
        (["--media", "audio"], "'audio'"),
        (["--media", "video"], "video"),
        (["--dtype", "int8"], "int8"),
        (["--input", "jpeg"], "'jpeg'"),
        (["--opset", "16"], "16"),
        (["--opset", "19"], "19"),
        (["-o", ""], "-o"),
        (["surplus"], "surplus"),
        (["--tok", "9"], "--tok;"),  # no abbreviations: they would change what an old script says
        (["--he"], "--he;"),
    ):
        assert says in refused("--model", model, *options), options


# What a model decides where nothing is said


def family_bundle(family: str, place: Path, *options: str) -> Bundle:
    """Export a tiny random model of a family."""
    write_layout("llava-hf-single", place / family, family=family)
    arguments = ["--model", str(place / family), "--no-check", "-o", str(place / "bundle")]
    assert main(["export", *arguments, *options]) == 0
    return read_bundle(place / "bundle")


@pytest.mark.slow
def test_a_tower_without_cls_keeps_none(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = family_bundle("llava-siglip", place, "--tokens", "16").manifest
    assert not manifest.selection.cls_token
    assert "without CLS" in capsys.readouterr().err


@pytest.mark.slow
def test_all_tiles_go_in_one_call(place: Path) -> None:
    manifest = family_bundle("llava-next", place, "--tokens", "16", "--tiles", "newline").manifest
    assert manifest.tiling is not None
    assert manifest.tiling.order == "newline"
    side = manifest.tower.image_size
    most = max(height * width // side**2 for height, width in manifest.tiling.pinpoints)
    assert (manifest.batch.max, manifest.batch.dynamic) == (1 + most, True)


@pytest.mark.slow
def test_a_target_with_little_memory_takes_fewer(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vzip.export.hardware.Target.largest_batch", lambda *_: 2)
    manifest = family_bundle("llava-next", place, "--tokens", "16", "--target", "t4").manifest
    assert (manifest.batch.max, manifest.batch.dynamic) == (2, True)


@pytest.mark.slow
def test_frames_have_the_papers_budget(place: Path) -> None:
    manifest = family_bundle("video-llava", place).manifest
    assert manifest.media == ("video",)
    assert manifest.selection.tokens == 17
    assert (manifest.batch.max, manifest.batch.dynamic) == (8, True)


def test_a_default_name_tells_variants_apart(
    model: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(*options: str) -> str:
        seen: list[Path] = []

        def export_bundle(_source: object, output: Path, **_: object) -> None:
            seen.append(output)
            raise InvalidInputError("enough")

        monkeypatch.setattr("vzip.export.pipeline.export_bundle", export_bundle)
        assert main(["export", "--model", str(place / "m"), "--tokens", "16", *options]) == 2
        return str(seen[0])

    write_layout("llava-hf-single", place / "m", family="llava-next")
    assert named() == "m-16-fp32"
    monkeypatch.chdir(place / "m")
    assert named("--model", ".") == "m-16-fp32"
    assert named("--selection", "visionzip") == "m-16-fp32"
    assert named("--selection", "uniform") == "m-16-fp32-uniform"
    assert named("--tiles", "newline", "--dtype", "fp16") == "m-16-fp16-newline"
    every = ("--selection", "random", "--tiles", "reference", "--media", "image")
    assert named(*every) == "m-16-fp32-image-reference-random"
    assert named("-o", "here", *every) == "here"


# A projector of one's own


def test_projectors_that_can_not_be_used(
    refused: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    state = load_file(model / "model-00003-of-00004.safetensors")
    name = "multi_modal_projector.linear_2.weight"
    assert name in state
    wrong, lacks, rubbish = (
        tmp_path / f"{kind}.safetensors" for kind in ("wrong", "lacks", "rubbish")
    )
    save_file(state | {name: torch.zeros(48, 47)}, wrong)
    save_file({key: tensor for key, tensor in state.items() if key != name}, lacks)
    rubbish.write_bytes(b"rubbish")
    for file, says in (
        (wrong, "has shape [48, 47], expected [48, 48]"),
        (lacks, "linear_2.weight"),
        (rubbish, "rubbish.safetensors"),
        (tmp_path / "absent.safetensors", "absent.safetensors"),
        (tmp_path, tmp_path.name),
    ):
        assert says in refused("--model", model, "--projector", file, *QUICK)


# The output


@pytest.mark.parametrize("what", ["file", "foreign folder", "link", "orphan", "below a file"])
def test_outputs_that_are_something_else(
    refused: Callable[..., str], model: Path, place: Path, what: str
) -> None:
    output = place / "out"
    if what == "file":
        output.write_text("mine")
    elif what == "foreign folder":
        output.mkdir()
        (output / "thesis.txt").write_text("mine")
    elif what == "link":
        (place / "real").mkdir()
        output.symlink_to(place / "real")
    elif what == "orphan":
        output = place / "nowhere" / "out"
    else:
        (place / "file").write_text("mine")
        output = place / "file" / "out"
    line = refused("--model", model, *QUICK, "-o", output)
    assert str(output) in line


@pytest.mark.parametrize("folder", ["/sys", "/proc"])
def test_a_folder_that_nobody_may_write(
    refused: Callable[..., str], model: Path, folder: str
) -> None:
    line = refused("--model", model, *QUICK, "-o", f"{folder}/bundle")
    assert f"{folder}/bundle: can't be written" in line


@pytest.mark.slow
def test_an_empty_folder_and_an_older_bundle_are_replaced(
    model: Path, place: Path, good_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "empty").mkdir()
    Path(shutil.copytree(good_bundle, place / "old"))
    for name in ("empty", "old"):
        output = place / name
        options = ["--dominant", "9", "--contextual", "3", "--no-check"]
        assert main(["export", "--model", str(model), *options, "-o", str(output)]) == 0
        captured = capsys.readouterr()
        assert captured.out == f"{output}\n"
        assert "12 tokens = 9 dominant + 3 contextual, CLS among the dominant" in captured.err
        manifest = read_bundle(output).manifest
        assert (manifest.selection.dominant, manifest.selection.contextual) == (9, 3)
        assert manifest.parity is None
    assert sorted(path.name for path in place.iterdir()) == ["empty", "old"]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow above `size` bytes, as a quota would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("size", [20_000, 100_000, 0])
def test_a_quota_that_is_used_up(
    refused: Callable[..., str], model: Path, place: Path, good_bundle: Path, size: int
) -> None:
    sizes = [path.stat().st_size for path in good_bundle.iterdir()]
    assert size < max(sizes)
    shutil.copytree(good_bundle, place / "out")
    with largest_file(size):
        line = refused("--model", model, *QUICK, "-o", place / "out")
    assert f"{place / 'out'}: can't be written" in line
    assert "the disk or quota is full; free some space. Nothing was left behind" in line
    read_bundle(place / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 kB; where none may be mounted, a folder under a quota of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "vzip-test", str(folder)]
    mounted = (
        os.geteuid() == 0
        and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    )
    with contextlib.nullcontext() if mounted else largest_file(96 * 1024):
        yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk(refused: Callable[..., str], model: Path, small_disk: Path) -> None:
    line = refused("--model", model, *QUICK, "-o", small_disk / "out")
    assert f"{small_disk / 'out'}: can't be written" in line
    assert "the disk or quota is full" in line
    assert list(small_disk.iterdir()) == []


# Other processes


def command(*arguments: str | Path) -> list[str]:
    """`vzip-export`, as its entry point calls it."""
    code = "import sys; from vzip.export.cli.export import vzip_export; sys.exit(vzip_export())"
    return [sys.executable, "-c", code, *map(str, arguments)]


@pytest.mark.parametrize(
    "code",
    [
        "from vzip.export.cli.export import vzip_export; status = vzip_export()",
        # A mistake is answered as quickly.
        "from vzip.runtime.cli.main import main; status = main(['export', '--nope']) - 2",
        (
            "from vzip.runtime.cli.main import main\n"
            "status = main(['export', '--model=x', '--seed=1']) - 2"
        ),
    ],
)
def test_help_and_mistakes_import_nothing_heavy(code: str) -> None:
    heavy = ("torch", "transformers", "onnx", "onnxruntime", "numpy", "PIL", "safetensors")
    tail = (
        f"; print('heavy:', [name for name in {heavy!r} if name in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}{tail}", "-h"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # What the function itself refuses takes numpy and Pillow, which an export has in any case.
    light = "['numpy', 'PIL']" if "seed" in code else "[]"
    assert done.stdout.splitlines()[-1] == f"heavy: {light}"
    assert "Traceback" not in done.stderr


def test_no_network_for_a_hub_id(tmp_path: Path) -> None:
    output = tmp_path / "out"
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_ETAG_TIMEOUT": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        command("--model", "llava-hf/llava-1.5-7b-hf", "-o", output),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    line = the_error(done.stderr)
    assert "llava-hf/llava-1.5-7b-hf" in line
    assert "--weights random" in line or "local folder" in line
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []


@pytest.mark.slow
def test_random_weights_need_no_network_and_no_hub(
    model: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = place / "random"
    options = ["--weights", "random", "--seed", "3", *QUICK, "-o", str(output)]
    assert main(["export", "--model", str(model), *options]) == 0
    manifest = read_bundle(output).manifest
    assert (manifest.model.weights, manifest.model.seed) == ("random", 3)
    zero = ["--weights", "random", *QUICK, "-o", str(place / "zero")]
    assert main(["export", "--model", str(model), *zero]) == 0
    assert read_bundle(place / "zero").manifest.model.seed == 0
    assert (output / "model.onnx.data").read_bytes() != (
        place / "zero" / "model.onnx.data"
    ).read_bytes()
    planted = ["--weights", "random-outliers", *QUICK, "-o", str(place / "planted")]
    assert main(["export", "--model", str(model), *planted]) == 0
    manifest = read_bundle(place / "planted").manifest
    assert (manifest.model.weights, manifest.model.seed) == ("random-outliers", 0)
    assert main(["check", str(place / "planted")]) == 0


@pytest.mark.slow
def test_a_killed_export_leaves_the_old_bundle_as_it_was(
    model: Path, place: Path, good_bundle: Path
) -> None:
    output = Path(shutil.copytree(good_bundle, place / "out"))
    before = contents(output)
    arguments = command("--model", model, "--dominant", "9", "--contextual", "3", "-o", output)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while not any(
                (folder / "model.onnx").exists()
                for folder in place.iterdir()
                if is_temporary(folder)
            ):
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert contents(output) == before
    image = np.zeros((32, 32, 3), np.uint8)
    with VisionEncoder.open(output, backend="onnxruntime") as encoder:
        assert encoder.encode([image]).embeds.shape == (1, 16, 48)
    assert any(is_temporary(folder) for folder in place.iterdir())  # it was in the middle of it
    # The next export removes what the dead one left.
    assert main(["export", "--model", str(model), *QUICK, "-o", str(output)]) == 0
    assert [path.name for path in place.iterdir()] == ["out"]
    read_bundle(output)


def test_what_took_long_is_replaced_only_when_that_is_said(
    model: Path, place: Path, good_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(good_bundle, place / "out"))
    again = ["export", "--model", str(model), *QUICK, "-o", str(output)]
    assert main(again) == 0  # a bundle as it was exported is made anew
    engines = output / "engines"
    engines.mkdir()
    for name in ("orin.plan", ".rtx.0123456789abcdef.plan"):  # one was about to take its name
        (engines / name).write_bytes(b"hours")
    for name in ("model.int8.onnx", "llm.onnx"):
        (output / name).write_bytes(b"hours")
    (output / ".fp8.0123456789abcdef.waiting").mkdir()
    before = contents(output)
    capsys.readouterr()
    assert main(again) == 2
    err = capsys.readouterr().err
    for named in ("'orin'", "'rtx'", "int8 graph", "fp8 graph", "language model", "--replace"):
        assert named in err
    assert contents(output) == before
    assert main([*again, "--replace"]) == 0
    assert not engines.exists()
    read_bundle(output)


# vzip check


def test_check_at_every_door(
    refused: Callable[..., str], good_bundle: Path, place: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(good_bundle, place / "bundle"))

    def check(*arguments: str | Path) -> str:
        return refused(*arguments, command="check")

    assert "BUNDLE" in check()
    assert "absent.png" in check(bundle, tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("no image")
    assert "text.png" in check(bundle, tmp_path / "text.png")
    assert "'--projector'" in check(bundle, "--proj", "x")
    assert "absent.safetensors" in check(bundle, "--projector", tmp_path / "absent.safetensors")

    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    manifest["model"]["id"] = str(tmp_path / "gone")
    (bundle / "manifest.json").write_text(json.dumps(manifest, indent=2))
    assert str(tmp_path / "gone") in check(bundle)

    (bundle / "model.onnx.data").write_bytes(b"\0" * 9)
    assert "model.onnx.data" in check(bundle)
    (bundle / "manifest.json").write_text("{")
    assert "manifest.json" in check(bundle)


def test_a_failed_gate_has_status_1(
    good_bundle: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(good_bundle, place / "bundle"))
    write_layout("llava-hf", tmp_path / "other", seed=1)
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    manifest["model"]["id"] = str(tmp_path / "other")
    (bundle / "manifest.json").write_text(json.dumps(manifest, indent=2))
    capsys.readouterr()
    for option in ("--json", "--quiet"):
        assert main(["check", str(bundle), option]) == 1
        captured = capsys.readouterr()
        # Which limit was missed, and by what: the value and the limit.
        (line,) = captured.err.splitlines()
        parity = read_bundle(bundle).manifest.parity
        assert parity is not None
        assert parity["passed"] is False
        got = f"{parity['tokens_beyond']:.0f} of "
        for said in (str(bundle), got, "differ beyond the gate", f"{parity['median_error']:.3g}"):
            assert said in line
    assert "passed: False" in captured.out.splitlines()
