r"""A graph in ONNX Runtime beside the same graph in TensorRT, by Polygraphy; needs no vzip.

`vzip debug` copies this file into the folder that it writes, and runs it there. Whoever gets the
folder can run it again:

    pip install polygraphy colored onnx onnx_graphsurgeon onnxruntime
    python debug.py build|compare|tensors|reduce|extract

The right side is built by Polygraphy from `model.onnx`, strongly typed where TensorRT can be: never
from an engine file. The left side is ONNX Runtime on the CPU, which computes FP16 graphs in FP32.

* ``build``: does TensorRT take the graph?
* ``compare``: the graph's outputs on all pictures: each side beside PyTorch, and beside each other.
* ``tensors``: every tensor, in the graph's order, on the first picture. All of them are outputs
  then, which keeps TensorRT from fusing across them: a fault of a fusion may not show here. Apart
  are those behind a choice (the largest scores, the nearest target), which rounding may flip.
* ``reduce``: the smallest part of the graph whose outputs still differ (``polygraphy debug
  reduce``), in `reduced.onnx`. Parts are compiled with their fusions.
* ``extract``: one operator (``polygraphy surgeon extract``), in `layer.onnx`, with what goes in and
  what comes out in ONNX Runtime; and whether it differs alone.
* ``check MODEL``: status 1 if the outputs of a part of the graph differ; what ``reduce`` asks.

Each writes what it found into NAME.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FOLDER: Final = Path(__file__).parent
SETTINGS: Final[dict[str, Any]] = {}
"""What `settings.json` says; `main` reads it."""

MODEL: Final = FOLDER / "model.onnx"
REDUCED: Final = FOLDER / "reduced.onnx"
LAYER: Final = FOLDER / "layer.onnx"
DIFFERS: Final = 1
CHOICES: Final = ("TopK", "ArgMax", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
"""Operators whose results jump where inputs are close: rounding may flip one, and all behind it."""
FAR: Final = 1e30
"""What a difference is said to be that no number is: where one isn't finite, or another shape."""

Array = NDArray[Any]
Tensors = Mapping[str, Array]


# The two sides


def left(model: Path) -> Any:
    """Return a runner: ONNX Runtime on the CPU, as it comes."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    return OnnxrtRunner(SessionFromOnnx(str(model)))


def right(model: Path, feeds: Tensors) -> Any:
    """Return a runner: TensorRT; or ONNX Runtime with the graph as it is, nothing rewritten."""
    if SETTINGS["right"] == "onnxruntime":
        import onnxruntime
        from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

        plain = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return OnnxrtRunner(SessionFromOnnx(str(model), graph_optimization_level=plain))
    from polygraphy.backend.trt import EngineFromNetwork, TrtRunner

    return TrtRunner(EngineFromNetwork(*_network(model, feeds)))


def _network(model: Path, feeds: Tensors) -> tuple[Any, Any]:
    """Return Polygraphy's loader of the network, and its configuration."""
    from polygraphy.backend.trt import CreateConfig, NetworkFromOnnxPath, Profile
    from polygraphy.mod.trt_importer import lazy_import_trt

    profile = Profile()
    for name, array in feeds.items():
        profile.add(name, array.shape, array.shape, array.shape)
    strong = hasattr(lazy_import_trt().NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    network = NetworkFromOnnxPath(str(model), strongly_typed=strong)
    if strong or SETTINGS["precision"] != "fp16":
        return network, CreateConfig(profiles=[profile])
    # TensorRT 8: precision is a matter of flags. vzip holds layers to FP32 one by one, this
    # doesn't: the engine is not the same.
    return network, CreateConfig(profiles=[profile], fp16=True, precision_constraints="obey")


def pictures() -> Tensors:
    """Return the bundle's pictures, and what PyTorch says of them."""
    with np.load(FOLDER / "pictures.npz", allow_pickle=False) as archive:
        return dict(archive)


def feeds_of(model: Path) -> Tensors:
    """Return what goes into a part of the graph: the first picture, or what becomes of it."""
    import onnx

    inputs = [each.name for each in onnx.load(model, load_external_data=False).graph.input]
    first = {SETTINGS["input"]: batch(pictures()["input"], 0)}
    found = {name: array for name, array in first.items() if name in inputs}
    if inner := [name for name in inputs if name not in first]:
        with marked(inner) as cut, left(cut) as runner:
            found.update(_run(runner, first))
    return found


def batch(given: Array, start: int) -> Array:
    """Return a batch of pictures; one that they don't fill starts over with the first one."""
    rows = [number % len(given) for number in range(start, start + SETTINGS["batch"])]
    return np.ascontiguousarray(given[rows])


@contextlib.contextmanager
def marked(outputs: Sequence[str] | None) -> Iterator[Path]:
    """Give a copy of the graph that has other outputs; None for all of its tensors."""
    from polygraphy import constants
    from polygraphy.backend.onnx import ModifyOutputs, OnnxFromPath, SaveOnnx

    wanted = constants.MARK_ALL if outputs is None else list(outputs)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        path = Path(folder) / "model.onnx"
        graph = ModifyOutputs(OnnxFromPath(str(MODEL)), outputs=wanted)
        SaveOnnx(graph, str(path), external_data_path="")()
        yield path


def _run(runner: Any, feeds: Tensors) -> dict[str, Array]:
    """Run once; the arrays are the caller's."""
    return {name: np.array(array) for name, array in runner.infer(dict(feeds)).items()}


def _save(name: str, arrays: Tensors) -> None:
    """Write arrays under their tensors' names."""
    np.savez(FOLDER / name, **arrays)  # type: ignore[arg-type]  # no tensor is 'allow_pickle'


# How two arrays differ


def difference(name: str, expected: Array, got: Array) -> float:
    """Return how far two arrays are apart.

    Of floats the largest difference, relative to the largest magnitude; `FAR` where one isn't
    finite. Of the kept indices the share that the other doesn't have. Of all else the share of
    numbers that aren't equal.
    """
    if expected.shape != got.shape:
        return FAR
    if name == SETTINGS["kept"]:
        return 1.0 - overlap(expected, got)
    if expected.dtype.kind != "f":
        return float(np.mean(expected != got)) if expected.size else 0.0
    here, there = got.astype(np.float64), expected.astype(np.float64)
    if not np.isfinite(there).all():  # as -inf in a mask: what isn't finite must be the same
        same = here == there
        here, there = np.where(same, 0.0, here), np.where(same, 0.0, there)
    scale = float(np.abs(there).max(initial=0.0)) or 1.0
    return _finite(float(np.abs(here - there).max(initial=0.0)) / scale, FAR)


def overlap(expected: Array, got: Array) -> float:
    """Return the mean share of kept indices that both have, whatever their order."""
    shares = [
        len(np.intersect1d(a, b)) / max(1, len(a)) for a, b in zip(expected, got, strict=True)
    ]
    return float(np.mean(shares))


def tokens(expected: tuple[Array, Array], got: tuple[Array, Array]) -> dict[str, float]:
    """Compare the tokens that both keep, and merged ones of pictures where both keep the same.

    Args:
        expected: Indices [n, dominant] and embeddings [n, K, L], the kept tokens first.
        got: Those of the other side.
    """
    cosines, errors, merged = [], [], []
    for right_kept, right_rows, kept, rows in zip(*expected, *got, strict=True):
        a, b = right_rows.astype(np.float64), rows.astype(np.float64)
        _, there, here = np.intersect1d(right_kept, kept, return_indices=True)
        cosines.append(_cosines(a[there], b[here]))
        errors.append(np.abs(a[there] - b[here]).max(axis=1) / max(float(np.abs(a).max()), 1e-300))
        if np.array_equal(np.sort(right_kept), np.sort(kept)):
            merged.append(_cosines(a[len(kept) :], b[len(kept) :]))
    every, relative = np.concatenate(cosines), np.concatenate(errors)
    others = np.concatenate([*merged, np.zeros(0)])
    return {
        "kept_overlap": overlap(expected[0], got[0]),
        "tokens": len(every),
        "mean_cosine": float(every.mean()) if len(every) else -1.0,
        "lowest_cosine": float(every.min()) if len(every) else -1.0,
        "median_error": _finite(float(np.median(relative)), FAR) if len(relative) else FAR,
        # Rounding alone may move a token or two far, but not one in twenty.
        "share_beyond": float(np.mean(~(relative <= SETTINGS["tolerance"]))) if len(every) else 1.0,
        "largest_error": _finite(float(relative.max(initial=0.0)), FAR) if len(relative) else FAR,
        "merged_cosine": float(others.mean()) if len(others) else 1.0,
    }


def _finite(number: float, otherwise: float) -> float:
    return number if np.isfinite(number) else otherwise


def _cosines(a: Array, b: Array) -> Array:
    """Return the cosine of each row; −1 where a number isn't finite."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore"):
        found = (a * b).sum(axis=1) / np.maximum(lengths, 1e-300)
    return np.where(np.isfinite(found), found, -1.0)


def apart(found: Mapping[str, float]) -> bool:
    """Say whether what `tokens` found is a difference, and no rounding."""
    return not (
        found["kept_overlap"] >= SETTINGS["least_overlap"]
        and found["mean_cosine"] >= SETTINGS["least_cosine"]
        and found["share_beyond"] <= SETTINGS["most_beyond"]
        and found["merged_cosine"] >= SETTINGS["least_merged_cosine"]
    )


def beyond(name: str, found: float) -> bool:
    """Say whether what `difference` found of a tensor is a difference, and no rounding."""
    if name == SETTINGS["kept"]:
        return not 1.0 - found >= SETTINGS["least_overlap"]
    return not found <= SETTINGS["tolerance"]


# The commands


def build() -> dict[str, Any]:
    """Have TensorRT compile the graph, and throw the engine away."""
    from polygraphy.backend.trt import EngineBytesFromNetwork
    from polygraphy.mod.trt_importer import lazy_import_trt

    engine = EngineBytesFromNetwork(*_network(MODEL, feeds_of(MODEL)))()
    return {"version": str(lazy_import_trt().__version__), "bytes": memoryview(engine).nbytes}


def compare() -> dict[str, Any]:
    """Compare the graph's outputs on all pictures."""
    right_ones, size = pictures(), SETTINGS["batch"]
    kept, embeds = SETTINGS["kept"], SETTINGS["embeds"]
    given = right_ones["input"]
    found: dict[str, list[dict[str, Array]]] = {"left": [], "right": []}
    for name, runner in (
        ("left", left(MODEL)),
        ("right", right(MODEL, {SETTINGS["input"]: batch(given, 0)})),
    ):
        with runner as opened:
            for start in range(0, len(given), size):
                answer = _run(opened, {SETTINGS["input"]: batch(given, start)})
                room = min(size, len(given) - start)
                found[name].append({tensor: each[:room] for tensor, each in answer.items()})

    def side(name: str) -> tuple[Array, Array]:
        parts = found[name]
        return np.concatenate([e[kept] for e in parts]), np.concatenate([e[embeds] for e in parts])

    torch = right_ones["kept"], right_ones["embeds"]
    both = tokens(side("left"), side("right"))
    return {
        "pictures": len(given),
        "left_beside_pytorch": tokens(torch, side("left")),
        "right_beside_pytorch": tokens(torch, side("right")),
        "right_beside_left": both,
        "differs": apart(both),
    }


def compare_tensors() -> dict[str, Any]:
    """Compare every tensor on the first picture; name the first that differs."""
    import onnx

    first = feeds_of(MODEL)
    with marked(None) as every:
        with left(every) as runner:
            expected = _run(runner, first)
        with right(every, first) as runner:
            got = _run(runner, first)
    made: dict[str, float] = {}
    rows, chosen = [], set[str]()
    for node in onnx.load(MODEL, load_external_data=False).graph.node:
        if node.op_type in CHOICES or chosen.intersection(node.input):
            chosen.update(node.output)
        before = max((made.get(name, 0.0) for name in node.input), default=0.0)
        for name in node.output:
            if name not in expected or name not in got:
                continue
            made[name] = difference(name, expected[name], got[name])
            rows.append({
                "tensor": name, "operator": node.op_type, "node": node.name,
                "dtype": str(expected[name].dtype), "shape": list(expected[name].shape),
                "difference": made[name], "of_inputs": before,
                "behind_choice": name in chosen,
            })  # fmt: skip
    found = [row for row in rows if beyond(row["tensor"], row["difference"])]
    plain = [row for row in rows if not row["behind_choice"]]
    return {
        "compared": len(rows),
        "first": next((row for row in found if not row["behind_choice"]), None),
        "first_behind_choice": next((row for row in found if row["behind_choice"]), None),
        # What adds most of what it didn't get from its inputs.
        "worst": max(plain, key=lambda row: row["difference"] - row["of_inputs"], default=None),
        "tensors": rows,
    }


def polygraphy(*arguments: str) -> None:
    """Run one of Polygraphy's commands in a process of its own."""
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=FOLDER, check=False, stdin=subprocess.DEVNULL)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"polygraphy {' '.join(arguments[:2])} ended with {done.returncode}")


def reduce() -> dict[str, Any]:
    """Have Polygraphy find the smallest part of the graph that differs."""
    import onnx

    shape = ",".join(map(str, batch(pictures()["input"], 0).shape))
    polygraphy(
        "debug", "reduce", MODEL.name, "-o", REDUCED.name, "--mode=bisect",
        f"--model-input-shapes={SETTINGS['input']}:[{shape}]", f"--fail-code={DIFFERS}",
        "--check", sys.executable, sys.argv[0], "check", "polygraphy_debug.onnx",
    )  # fmt: skip
    part = onnx.load(REDUCED, load_external_data=False).graph
    _save("reduced_inputs.npz", feeds_of(REDUCED))
    return {
        "operators": [node.op_type for node in part.node],
        "nodes": [node.name for node in part.node],
        "inputs": [each.name for each in part.input],
        "outputs": [each.name for each in part.output],
        **differences(REDUCED),
    }


def differences(model: Path) -> dict[str, Any]:
    """Compare the outputs of a part of the graph on the first picture."""
    given = feeds_of(model)
    with left(model) as runner:
        expected = _run(runner, given)
    with right(model, given) as runner:
        got = _run(runner, given)
    found = {name: difference(name, expected[name], got[name]) for name in expected}
    kept, embeds = SETTINGS["kept"], SETTINGS["embeds"]
    if found.keys() >= {kept, embeds}:  # row by row only where the same tokens are kept
        both = tokens((expected[kept], expected[embeds]), (got[kept], got[embeds]))
        return {"differences": found, "differs": apart(both)}
    return {"differences": found, "differs": any(beyond(*each) for each in found.items())}


def extract() -> dict[str, Any]:
    """Cut out one operator, by its name or by that of a tensor that it makes."""
    import onnx

    graph = onnx.load(MODEL, load_external_data=False).graph
    wanted = SETTINGS["layer"] or _first()
    node = next((n for n in graph.node if wanted in (n.name, *n.output)), None)
    if node is None:
        raise SystemExit(f"the graph has no operator or tensor '{wanted}'")
    constant = {each.name for each in graph.initializer}
    inputs = [name for name in dict.fromkeys(node.input) if name and name not in constant]
    polygraphy(
        "surgeon", "extract", MODEL.name, "-o", LAYER.name,
        "--inputs", *(f"{name}:auto:auto" for name in inputs),
        "--outputs", *(f"{name}:auto" for name in node.output if name),
    )  # fmt: skip
    given = feeds_of(LAYER)
    with left(LAYER) as runner:
        _save("layer_outputs.npz", _run(runner, given))
    _save("layer_inputs.npz", given)
    return {
        "node": node.name,
        "operator": node.op_type,
        "inputs": inputs,
        "outputs": list(node.output),
        **differences(LAYER),
    }


def _first() -> str:
    """Return the tensor that differs first, by `tensors.json`; else what adds most.

    Behind a choice a difference counts only where the outputs differ too.
    """
    found = json.loads((FOLDER / "tensors.json").read_text(encoding="utf-8"))
    wrong = json.loads((FOLDER / "compare.json").read_text(encoding="utf-8"))["differs"]
    behind = found["first_behind_choice"] if wrong else None
    return str((found["first"] or behind or found["worst"])["tensor"])


COMMANDS: Final = {
    "build": build,
    "compare": compare,
    "tensors": compare_tensors,
    "reduce": reduce,
    "extract": extract,
}


def main(argv: Sequence[str]) -> int:
    """Run a command."""
    SETTINGS.update(json.loads((FOLDER / "settings.json").read_text(encoding="utf-8")))
    if SETTINGS["right"] == "tensorrt-rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read as Polygraphy is imported
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if argv[:1] == ["check"] and len(argv) == 2:
        return DIFFERS if differences(Path(argv[1]).absolute())["differs"] else 0
    if len(argv) != 1 or argv[0] not in COMMANDS:
        sys.stderr.write(f"usage: debug.py {'|'.join(COMMANDS)}\n")
        return 2
    found = COMMANDS[argv[0]]()
    text = json.dumps(found, indent=1, default=float)
    (FOLDER / f"{argv[0]}.json").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
