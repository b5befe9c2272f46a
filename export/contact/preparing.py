"""`vzip firstcontact --prepare`: the demo bundles that first contact builds engines from.

They are made on a machine with PyTorch, by vzip's own commands, so that they are of the format and
graph of the vzip that made them, and carried to the machine with the GPU.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vzip.runtime import console
from vzip.runtime.bundle.manifest import MODEL_FILE
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.errors import ExportError, InvalidInputError, require
from vzip.runtime.files import outputs
from vzip.runtime.machine.children import run_child

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

DEMOS: Final[Mapping[str, tuple[str, str | None]]] = {
    "fp16": ("fp16", None),
    "open": ("open", None),
    "fp32": ("fp32", None),
    "int8": ("fp32", "int8"),
}
"""What engines are built from: a folder below that of `prepare`, and a precision."""

CUMSUM: Final = "cumsum"
"""Folder of the graph that has a CumSum, as graphs of vzip once had."""

_TOKENS: Final = ("--model", "demo", "--tokens", "43")
_COMMANDS: Final = (
    ("export", *_TOKENS, "--dtype", "fp16", "--opset", "17", "-o", "fp16"),
    ("export", *_TOKENS, "--dtype", "fp16", "--opset", "17", "--max-batch", "4", "-o", "open"),
    ("export", *_TOKENS, "--dtype", "fp32", "-o", "fp32"),
    ("calibrate", "fp32", "--images", "demo", "--precision", "int8", "--count", "20"),
)
_LIMIT_S: Final = 1800.0


def prepare(folder: str | os.PathLike[str], *, say: Callable[[str], None] = console.say) -> Path:
    """Make the demo bundles, about 12 MB, into a folder.

    Args:
        folder: A folder that is empty or not there.
        say: Told, in lines, what goes on.

    Returns:
        The folder.

    Raises:
        InvalidInputError: The folder holds files, or can't be written.
        MissingDependencyError: A package of the extra ``export`` is not installed.
        ExportError: A bundle could not be made.
    """
    target = outputs.check_folder(folder)
    if target.is_dir() and any(target.iterdir()):
        raise InvalidInputError(
            f"the output '{target}' holds files", expected="an empty folder", cure="name a new one"
        )
    require("torch", "onnx", "onnxruntime", needed_for="making the demo bundles", extra="export")
    target.mkdir(parents=True, exist_ok=True)
    for command in _COMMANDS:
        say(f"vzip {' '.join(command)}")
        ended = run_child(
            [sys.executable, "-m", "vzip.runtime", *command],
            _LIMIT_S,
            folder=target,
            environment={"PYTHONPATH": _search_path()},
        )
        if ended.how:
            last = (ended.output.strip().splitlines() or ["it said nothing"])[-1]
            raise ExportError(f"'vzip {' '.join(command)}' {ended.how}", cause=last)
    with_cumsum(target / "fp16", target / CUMSUM)
    return target


def _search_path() -> str:
    """Return where this process finds packages, for one with another working directory."""
    return os.pathsep.join(str(Path(each).absolute()) for each in sys.path if each)


def with_cumsum(bundle: Path, folder: Path) -> None:
    """Write a bundle's graph with a running sum in place of comparisons, as it once was.

    TensorRT 8.6 to 10.7 make a loop of CumSum. Both forms give the same numbers, which is checked,
    so that their times can be compared.

    Raises:
        ExportError: The graph has no such place, or gives something else then.
    """
    import onnx
    from onnx import helper, numpy_helper

    opened = read_bundle(bundle)
    model = onnx.load_from_string(opened.read_model())
    graph = model.graph
    rank, rest = _rank_and_rest(graph)
    one, axis = _array([1.0], "float32"), _array(1, "int64")
    graph.initializer.extend(
        [numpy_helper.from_array(one, "cumsum_one"), numpy_helper.from_array(axis, "cumsum_axis")]
    )
    place = next(k for k, node in enumerate(graph.node) if rank.output[0] in node.input)
    made = [
        helper.make_node("CumSum", [rest, "cumsum_axis"], ["cumsum"], "node_cumsum"),
        helper.make_node("Sub", ["cumsum", "cumsum_one"], ["cumsum_rank"], "node_cumsum_rank"),
    ]
    for node in graph.node:
        for k, name in enumerate(node.input):
            if name == rank.output[0]:
                node.input[k] = "cumsum_rank"
    for node in reversed(made):
        graph.node.insert(place, node)
    folder.mkdir()
    if opened.data_path is not None:
        shutil.copyfile(opened.data_path, folder / opened.data_path.name)
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    _check_same(bundle, folder)


def _array(value: Any, dtype: str) -> Any:
    import numpy as np

    return np.array(value, dtype)


def _rank_and_rest(graph: GraphProto) -> tuple[NodeProto, str]:
    """Return what gives a token's number among the rest, and what says which tokens these are.

    The number is compared with the targets' numbers, a constant; what comes out is multiplied with
    the mask of the rest.
    """
    made = {output: node for node in graph.node for output in node.output}
    users = {name: node for node in graph.node for name in node.input}
    constant = {each.name for each in graph.initializer}
    for equal in graph.node:
        if equal.op_type != "Equal" or equal.input[1] not in constant:
            continue
        rank = made.get(made[equal.input[0]].input[0]) if equal.input[0] in made else None
        cast = users.get(equal.output[0])
        times = users.get(cast.output[0]) if cast is not None else None
        if rank is None or times is None or (rank.op_type, times.op_type) != ("Sub", "Mul"):
            continue
        other = next(name for name in times.input if cast is None or name != cast.output[0])
        return rank, made[other].input[0]
    raise ExportError("the graph has no rank that a CumSum could stand for")


def _check_same(bundle: Path, folder: Path) -> None:
    import numpy as np
    import onnxruntime

    from vzip.runtime.agreement.reference_file import load_reference

    opened = read_bundle(bundle)
    given = {opened.manifest.input.name: load_reference(opened).input[:1]}
    one, other = (
        onnxruntime.InferenceSession(
            str(path / MODEL_FILE), providers=["CPUExecutionProvider"]
        ).run(None, given)
        for path in (bundle, folder)
    )
    if not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True)):
        raise ExportError("the graph with a CumSum gives other tokens than the bundle's")
