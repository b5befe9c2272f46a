"""`vzip debug`: which tensor differs first, and the part of the graph that is to blame."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.references import with_reference
from tests.refusals import refused
from vzip.export import debug
from vzip.export.debugging import comparing
from vzip.export.debugging.comparing import findings
from vzip.runtime.agreement.gates import ENGINE
from vzip.runtime.bundle.precision_record import QUANTISED
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import InvalidInputError, MissingDependencyError
from vzip.runtime.machine.children import Ended

WRONG = '''
import sys, onnx, debug
from pathlib import Path

real = debug.right

def wrong(model, feeds):
    """The right side, of a graph with one operator that isn't what it should be."""
    graph = onnx.load(model)
    for node in graph.graph.node:
        if node.output[0] == "{tensor}":
            node.op_type = "{operator}"
    path = Path(model).parent / "wrong.onnx"
    onnx.save(graph, path)
    return real(path, feeds)

debug.right = wrong
'''


@pytest.fixture
def bundle(tiny_bundle: Path, golden: dict[str, np.ndarray]) -> Bundle:
    return with_reference(tiny_bundle, golden)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No stage runs; the names of those that would."""
    names: list[str] = []

    def run(command: list[str], *_: Any, **__: Any) -> Ended:
        names.append(command[-1])
        return Ended(1, "ended with status 1", "why\n", 0.1)

    monkeypatch.setattr(comparing, "run_child", run)
    return names


def loaded(folder: Path) -> Any:
    """Import the folder's script, as `python debug.py` does."""
    spec = importlib.util.spec_from_file_location("debug", folder / "debug.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SETTINGS.update(json.loads((folder / "settings.json").read_text()))
    return module


@pytest.mark.slow
def test_the_sides_agree_and_every_tensor_is_compared(
    bundle: Bundle, tmp_path: Path, silent: list[str]
) -> None:
    folder = tmp_path / "out"
    debug(bundle.path, folder, side="onnxruntime", say=lambda _: None)
    script = loaded(folder)
    compared = script.compare()
    assert compared["differs"] is False
    assert compared["pictures"] == 5
    for pair in ("left_beside_pytorch", "right_beside_pytorch"):
        assert compared[pair]["kept_overlap"] == 1
        assert compared[pair]["lowest_cosine"] > 0.9999
    tensors = script.compare_tensors()
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    made = [name for node in graph.node for name in node.output]
    assert [row["tensor"] for row in tensors["tensors"]] == made
    assert tensors["first"] is None
    # The folder is what can be sent: nothing of the work is left in it.
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {
        "debug.py", "settings.json", "model.onnx", "model.onnx.data", "pictures.npz",
        "compare.log", "tensors.log", "result.json",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "instead", "inputs", "behind"),
    [
        ("mean", "ReduceSum", ["patches"], False),
        # The patches that are merged were chosen before.
        ("sum_rows", "Sub", ["target_rows", "group_rows"], True),
    ],
)
def test_the_operator_that_is_wrong_is_named_and_cut_out(
    bundle: Bundle,
    tmp_path: Path,
    silent: list[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    tensor: str,
    instead: str,
    inputs: list[str],
    behind: bool,
) -> None:
    folder = tmp_path / "out"
    debug(bundle.path, folder, side="onnxruntime", say=lambda _: None)
    script = loaded(folder)
    monkeypatch.setitem(sys.modules, "debug", script)
    exec(WRONG.format(tensor=tensor, operator=instead), {})
    compared = script.compare()
    assert compared["differs"] is True
    if behind:  # merged tokens alone are wrong
        assert compared["right_beside_left"]["largest_error"] < 1e-6
        assert compared["right_beside_left"]["merged_cosine"] < 0.9
    found = script.compare_tensors()
    first = found["first_behind_choice" if behind else "first"]
    assert first["tensor"] == tensor
    assert first["of_inputs"] < 1e-3
    assert behind is (found["first"] is None)
    (folder / "tensors.json").write_text(json.dumps(found))
    (folder / "compare.json").write_text(json.dumps(compared))
    cut = script.extract()
    assert (cut["outputs"], cut["differs"]) == ([tensor], True)
    assert cut["inputs"] == inputs
    with np.load(folder / "layer_inputs.npz", allow_pickle=False) as saved:
        assert list(saved) == inputs
    # Another, by its name, is right when it is alone.
    script.SETTINGS["layer"] = "map"
    assert script.extract()["differs"] is False
    script.SETTINGS["layer"] = "nothing-like-it"
    with pytest.raises(SystemExit, match="nothing-like-it"):
        script.extract()


@pytest.mark.full
def test_polygraphy_reduces_the_graph_to_the_operator_that_is_wrong(
    bundle: Bundle, tmp_path: Path, silent: list[str]
) -> None:
    folder = tmp_path / "out"
    debug(bundle.path, folder, side="onnxruntime", say=lambda _: None)
    code = WRONG.format(tensor="sum_rows", operator="Sub") + "sys.exit(debug.main(sys.argv[1:]))\n"
    (folder / "wrong.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "wrong.py", "reduce"], cwd=folder, capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "reduce.json").read_text())
    assert found["outputs"] == ["sum_rows"]
    assert (found["operators"], found["differs"]) == (["Add"], True)
    assert (folder / "reduced.onnx").is_file()
    assert (folder / "reduced_inputs.npz").is_file()


@pytest.mark.slow
def test_without_a_gpu_tensorrt_builds_and_onnxruntime_is_compared_with_itself(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "gpus", lambda: "no GPU here")
    said: list[str] = []
    found = debug(bundle.path, tmp_path / "out", side="tensorrt-rtx", say=said.append)
    assert found.differs is False
    assert found.stages["build"]["bytes"] > 0
    assert found.stages["tensorrt-rtx"] == {"not_here": "no GPU here"}
    assert found.stages["extract"]["differs"] is False
    assert any("no GPU here" in line for line in said)
    (record,) = [json.loads((found.folder / "result.json").read_text())]
    assert record == found.stages
    lines = "\n".join(findings(found.stages))
    for part in ("build: 1.", "right beside pytorch: kept overlap 1.0000", "none", "cut out"):
        assert part in lines


def test_a_stage_that_fails_is_told_and_the_others_run(
    bundle: Bundle, tmp_path: Path, silent: list[str]
) -> None:
    said: list[str] = []
    found = debug(bundle.path, tmp_path / "out", side="onnxruntime", say=said.append)
    assert silent == ["compare", "tensors"]
    assert found.differs is None
    assert "ended with status 1" in found.stages["compare"]["failed"]
    assert (tmp_path / "out" / "tensors.log").read_text() == "why\n"
    assert sum("warning" in line for line in said) == 2
    assert findings(found.stages) == []


def test_what_can_t_be_is_refused_before_any_work(
    bundle: Bundle, tiny_static_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with refused(InvalidInputError, got=str(taken), expected="empty"):
        debug(bundle.path, taken)
    with refused(InvalidInputError, got="reference.npz", cure="--no-check"):
        debug(tiny_static_bundle, tmp_path / "out")
    with refused(InvalidInputError, got="(--with) is 'cudnn'", expected="tensorrt-rtx"):
        debug(bundle.path, tmp_path / "out", side="cudnn")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with refused(MissingDependencyError, got="polygraphy", cure="vzip[debug]"):
        debug(bundle.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_precision_has_its_tolerance() -> None:
    assert comparing.APART.keys() >= {*ENGINE, *QUANTISED}


def compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    from vzip.export.debugging import script

    return script.tokens((a["kept"], a["embeds"]), (b["kept"], b["embeds"]))


def test_indices_are_compared_as_a_set_and_tokens_by_what_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vzip.export.debugging import script

    settings = {"kept": "kept_indices", "tolerance": 0.1, "least_overlap": 0.8, "most_beyond": 0.2,
                "least_cosine": 0.9, "least_merged_cosine": 0.9}  # fmt: skip
    monkeypatch.setattr(script, "SETTINGS", settings)
    rng = np.random.default_rng(0)
    kept = np.array([[3, 5, 9, 12, 40]])
    one = {"kept": kept, "embeds": rng.normal(size=(1, 8, 6)).astype(np.float32)}
    order = [4, 0, 2, 1, 3]
    turned = {"kept": kept[:, order], "embeds": one["embeds"][:, [*order, 5, 6, 7]]}
    assert script.difference("kept_indices", one["kept"], turned["kept"]) == 0
    same = compared(one, turned)
    assert (same["kept_overlap"], same["largest_error"], same["tokens"]) == (1, 0, 5)
    assert not script.apart(same)
    swapped = {"kept": np.array([[3, 5, 9, 12, 41]]), "embeds": one["embeds"]}
    found = compared(one, swapped)
    assert (found["kept_overlap"], found["tokens"]) == (0.8, 4)
    assert script.beyond("kept_indices", 0.21)
    assert not script.beyond("kept_indices", 0.2)
    # Rounding may move one token of twenty far; two are no rounding.
    many = {"kept": np.arange(20)[None], "embeds": np.ones((1, 20, 6), np.float32)}
    for count, differs in ((1, False), (2, True)):
        far = {**many, "embeds": many["embeds"].copy()}
        far["embeds"][0, :count, 0] -= 0.16
        monkeypatch.setitem(settings, "most_beyond", 0.05)
        assert script.apart(compared(many, far)) is differs
    # Merged tokens alone can be wrong.
    merged = {"kept": kept, "embeds": one["embeds"] * np.where(np.arange(8) < 5, 1, -1)[:, None]}
    assert script.apart(compared(one, merged))
    infinite = np.array([1.0, -np.inf], np.float32)
    assert script.difference("mask", infinite, infinite) == 0
    assert script.difference("mask", infinite, -infinite) == script.FAR
    assert script.difference("mask", infinite, np.array([1.0, np.nan], np.float32)) == script.FAR
    broken = {
        "kept": kept,
        "embeds": np.where(np.arange(8) < 5, 1, np.nan)[:, None] * one["embeds"],
    }
    assert compared(one, broken)["merged_cosine"] == -1
    broken = {"kept": kept, "embeds": one["embeds"] * np.nan}
    assert (compared(one, broken)["lowest_cosine"], script.apart(compared(one, broken))) == (
        -1,
        True,
    )
    assert script.difference("bits", np.array([True, False]), np.array([True, True])) == 0.5
