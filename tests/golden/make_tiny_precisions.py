"""Make quantised graphs for `tiny_bundle`, and what they must compute.

    python tests/golden/make_tiny_precisions.py

The one linear layer, the projection, gets Q and DQ as `vzip calibrate` places them. `golden.npz`
holds the embeddings that the loop of `make_tiny_bundle.py`, in float64, gives when that layer's
inputs and weights are rounded to INT8 or FP8.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import make_tiny_bundle
import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

HERE = Path(__file__).parent
LARGEST = {"int8": 127.0, "fp8": 448.0}
KINDS = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
DTYPES = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
OPSETS = {"int8": 18, "fp8": 19}


@dataclasses.dataclass(frozen=True)
class Steps:
    """Steps of the projection's inputs [] and weights [out], float32."""

    inputs: np.ndarray
    weights: np.ndarray


def rows(pixels: np.ndarray) -> np.ndarray:
    """Return what goes into the projection, float64 [B, K, WIDTH]."""
    whole = make_tiny_bundle.weights

    def without_projection() -> dict[str, np.ndarray]:
        width = make_tiny_bundle.WIDTH
        return {**whole(), "project_weight": np.eye(width), "project_bias": np.zeros(width)}

    make_tiny_bundle.weights = without_projection
    try:
        return make_tiny_bundle.reference(pixels)["embeds"]
    finally:
        make_tiny_bundle.weights = whole


def rounded(values: np.ndarray, steps: np.ndarray, precision: str) -> np.ndarray:
    """Return values in steps, rounded to what the precision holds, in its dtype."""
    least = {"int8": -128.0, "fp8": -448.0}[precision]
    scaled = np.clip(values / steps, least, LARGEST[precision])
    return (np.rint(scaled) if precision == "int8" else scaled).astype(DTYPES[precision])


def quantised(precision: str, weight: np.ndarray, steps: Steps) -> onnx.ModelProto:
    """Return the graph of `tiny_bundle` with a quantised projection."""
    opset = OPSETS[precision]
    model = make_tiny_bundle.model(image=True, half=False, batch="batch", opset=18)
    model.opset_import[0].version = opset
    model.ir_version = 8 if opset == 18 else 9
    graph, kind = model.graph, KINDS[precision]
    small = rounded(weight, steps.weights, precision)
    added = [
        helper.make_tensor("input.step", TensorProto.FLOAT, [], [float(steps.inputs)]),
        helper.make_tensor("input.zero", kind, [], b"\0", raw=True),
        helper.make_tensor("project.small", kind, small.shape, small.tobytes(), raw=True),
        helper.make_tensor(
            "project.step", TensorProto.FLOAT, steps.weights.shape, steps.weights.tolist()
        ),
        helper.make_tensor(
            "project.zero", kind, steps.weights.shape, b"\0" * len(steps.weights), raw=True
        ),
    ]
    kept = [each for each in graph.initializer if each.name != "project_weight"]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *added])
    nodes = []
    for node in graph.node:
        if node.output[0] == "projected":
            given, of_weights = ["input.step", "input.zero"], ["project.step", "project.zero"]
            nodes += [
                helper.make_node("QuantizeLinear", ["compressed", *given], ["q"]),
                helper.make_node("DequantizeLinear", ["q", *given], ["dq"]),
                helper.make_node(
                    "DequantizeLinear", ["project.small", *of_weights], ["wide"], axis=1
                ),
            ]
            node.input[:] = ["dq", "wide"]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    return model


def main(folder: Path) -> None:
    """Write the graphs and the golden results into `folder`."""
    folder.mkdir(exist_ok=True)
    with np.load(HERE / "tiny_golden.npz", allow_pickle=False) as golden:
        inputs = rows(golden["pixel_values"])
    weights = make_tiny_bundle.weights()
    weight = weights["project_weight"].astype(np.float32)
    expected = {}
    for precision, largest in LARGEST.items():
        # A range that clips a little, so that saturation is needed.
        reach = np.quantile(np.abs(inputs), 0.99)
        steps = Steps(np.float32(reach / largest), np.abs(weight).max(axis=0) / np.float32(largest))
        if precision == "int8":
            fractions = np.abs(inputs / steps.inputs) % 1
            assert np.abs(fractions - 0.5).min() > 1e-3, "float32 could round otherwise"
        small = rounded(weight, steps.weights, precision).astype(np.float64) * steps.weights
        wide = rounded(inputs, steps.inputs, precision).astype(np.float64) * steps.inputs
        expected[precision] = wide @ small + weights["project_bias"]
        name = f"model.{precision}.onnx"
        (folder / f"{name}.data").unlink(missing_ok=True)  # onnx would append
        onnx.save_model(
            quantised(precision, weight, steps),
            folder / name,
            save_as_external_data=True,
            location=f"{name}.data",
            size_threshold=64,
        )
        (folder / f"{name}.data").chmod(0o644)
    np.savez_compressed(folder / "golden.npz", **expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "tiny_precisions")
