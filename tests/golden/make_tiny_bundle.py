"""Make the two golden bundles beside this file, and what they must compute.

    python tests/golden/make_tiny_bundle.py

`tiny_bundle` takes 1 to 3 uint8 images, FP32, opset 18; `tiny_static_bundle` takes exactly two
arrays of pixel_values, FP16, opset 17. The tower is one patch convolution, CLS is a constant plus
the mean of the patches; selection and merge are VisionZip's. `tiny_golden.npz`
holds inputs and results of `reference`, a loop in float64 that shares no code with the graphs.

The bundles are committed, so that the runtime's tests need neither onnx nor vzip.export.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vzip.runtime.bundle.manifest import Batch, Llm, Manifest, Selection, Tensor, Tower
from vzip.runtime.bundle.origin import Model
from vzip.runtime.bundle.writer import bundle_writer
from vzip.runtime.pictures.preprocess import Preprocessing

HERE = Path(__file__).parent
SIDE, PATCH, GRID = 16, 4, 4
PATCHES, TOKENS = GRID * GRID, GRID * GRID + 1
DOMINANT, CONTEXTUAL = 4, 3
K, REST = DOMINANT + CONTEXTUAL, TOKENS - DOMINANT
WIDTH, HIDDEN = 16, 6
STEP = REST // CONTEXTUAL
TARGETS = [STEP * place for place in range(CONTEXTUAL)]
MERGED = [place for place in range(REST) if place not in TARGETS]


def weights() -> dict[str, np.ndarray]:
    """Return the weights, float64."""
    rng = np.random.default_rng(20261121)
    return {
        "patch_weight": rng.normal(size=(WIDTH, 3, PATCH, PATCH)) * 0.5,
        "class_embedding": rng.normal(size=(1, 1, WIDTH)),
        "score_weight": rng.normal(size=(WIDTH, 1)),
        "project_weight": rng.normal(size=(WIDTH, HIDDEN)) * 0.3,
        "project_bias": rng.normal(size=(HIDDEN,)) * 0.3,
    }


def reference(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Return what the graph must compute for normalised pixels [B, 3, SIDE, SIDE].

    Returns:
        `embeds` [B, K, HIDDEN] float64, `kept` [B, DOMINANT] int64 and `groups` [B, TOKENS] int64.
    """
    w = weights()
    embeds, kept, groups = [], [], []
    for image in pixels.astype(np.float64):
        patches = []
        for row in range(GRID):
            for column in range(GRID):
                area = image[:, row * PATCH :, column * PATCH :][:, :PATCH, :PATCH]
                patches.append((w["patch_weight"] * area).sum(axis=(1, 2, 3)))
        scores = [float((patch @ w["score_weight"])[0]) for patch in patches]
        hidden = [w["class_embedding"][0, 0] + sum(patches) / PATCHES, *patches]
        ranked = sorted(range(PATCHES), key=lambda j: (-scores[j], j))
        margin = scores[ranked[DOMINANT - 2]] - scores[ranked[DOMINANT - 1]]
        assert margin > 0.02, "an input whose selection FP16 could change proves nothing"
        chosen = [0, *sorted(1 + j for j in ranked[: DOMINANT - 1])]
        rest = [token for token in range(TOKENS) if token not in chosen]
        targets = [rest[place] for place in TARGETS]
        group = [-1] * TOKENS
        for token in rest:
            unit = [hidden[target] / np.linalg.norm(hidden[target]) for target in targets]
            likeness = [float(hidden[token] @ each) for each in unit]
            ahead = sorted(likeness)[-1] - sorted(likeness)[-2]
            assert token in targets or ahead > 0.02, "an input whose merge FP16 could change"
            group[token] = (
                targets.index(token) if token in targets else likeness.index(max(likeness))
            )
        rows = [hidden[token] for token in chosen]
        for place in range(CONTEXTUAL):
            members = [hidden[token] for token in range(TOKENS) if group[token] == place]
            rows.append(sum(members) / len(members))
        embeds.append(np.stack(rows) @ w["project_weight"] + w["project_bias"])
        kept.append(chosen)
        groups.append(group)
    return {
        "embeds": np.stack(embeds),
        "kept": np.array(kept, np.int64),
        "groups": np.array(groups, np.int64),
    }


def model(*, image: bool, half: bool, batch: int | str, opset: int) -> onnx.ModelProto:
    """Return the graph."""
    dtype = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    real = np.float16 if half else np.float32
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {
        name: value.astype(np.float32 if name == "score_weight" else real)
        for name, value in weights().items()
    }

    def put(name: str, value: object, kind: type = np.int64) -> str:
        constants[name] = np.array(value, kind)
        return name

    def op(kind: str, inputs: list[str], outputs: str | list[str], **attributes: object) -> str:
        names = [outputs] if isinstance(outputs, str) else outputs
        nodes.append(helper.make_node(kind, inputs, names, name=names[-1], **attributes))
        return names[-1]

    if image:  # uint8 in 0 … 255, mean 0.5 and deviation 0.5: x/127.5 − 1
        op("Cast", ["image"], "float_image", to=dtype)
        op("Transpose", ["float_image"], "planes", perm=[0, 3, 1, 2])
        op("Div", ["planes", put("scale", 127.5, real)], "scaled")
        pixels = op("Sub", ["scaled", put("one", 1.0, real)], "pixels")
    else:
        pixels = op("Cast", ["pixel_values"], "pixels", to=dtype)
    op("Conv", [pixels, "patch_weight"], "map", strides=[PATCH, PATCH])
    op("Reshape", ["map", put("flat", [0, WIDTH, PATCHES])], "columns")
    op("Transpose", ["columns"], "patches", perm=[0, 2, 1])
    if opset == 18:
        op("ReduceMean", ["patches", put("axis_1", [1])], "mean", keepdims=1)
    else:
        op("ReduceMean", ["patches"], "mean", axes=[1], keepdims=1)
    op("Add", ["mean", "class_embedding"], "cls")
    op("Concat", ["cls", "patches"], "hidden", axis=1)

    op("Cast", ["patches"], "patches_32", to=TensorProto.FLOAT)
    op("MatMul", ["patches_32", "score_weight"], "score_column")
    op("Squeeze", ["score_column", put("axis_2", [2])], "scores")
    op("TopK", ["scores", put("kept_patches", [DOMINANT - 1])], ["_s", "ranked"], axis=1)
    op("Cast", ["ranked"], "ranked_32", to=TensorProto.FLOAT)
    op("TopK", ["ranked_32", "kept_patches"], ["_p", "order"], axis=1, largest=0)
    op("GatherElements", ["ranked", "order"], "spatial", axis=1)
    op("Add", ["spatial", put("first_patch", [1])], "kept_tokens")
    op("Slice", ["kept_tokens", put("from", [0]), put("to", [1]), put("along", [1])], "any_kept")
    op("Mul", ["any_kept", put("zero", [0])], "cls_index")
    op("Concat", ["cls_index", "kept_tokens"], "kept_indices", axis=1)

    tokens = put("tokens", np.arange(TOKENS)[None, None])
    op("Unsqueeze", ["kept_indices", "axis_2"], "kept_column")
    op("Equal", ["kept_column", tokens], "kept_equal")
    op("Cast", ["kept_equal"], "kept_rows", to=TensorProto.FLOAT)
    op("ReduceSum", ["kept_rows", put("rows", [1])], "kept_mask", keepdims=0)
    op("Mul", ["kept_mask", put("far", 1000.0, np.float32)], "pushed")
    op("Add", ["pushed", put("positions", np.arange(TOKENS)[None], np.float32)], "rest_key")
    op("TopK", ["rest_key", put("rest_count", [REST])], ["_r", "rest"], axis=1, largest=0)
    op("Unsqueeze", ["rest", "axis_2"], "rest_column")
    op("Equal", ["rest_column", tokens], "rest_equal")
    op("Cast", ["rest_equal"], "rest_rows", to=TensorProto.FLOAT)
    op("Gather", ["rest_rows", put("target_places", TARGETS)], "target_rows", axis=1)
    op("Gather", ["rest_rows", put("merged_places", MERGED)], "merged_rows", axis=1)
    op("Cast", ["hidden"], "hidden_32", to=TensorProto.FLOAT)
    op("MatMul", ["target_rows", "hidden_32"], "target_hidden")
    op("Mul", ["target_hidden", "target_hidden"], "target_squares")
    op("ReduceSum", ["target_squares", "axis_2"], "target_square", keepdims=1)
    op("Sqrt", ["target_square"], "target_norm")
    op("Div", ["target_hidden", "target_norm"], "target_units")
    op("MatMul", ["merged_rows", "hidden_32"], "merged_hidden")
    op("Transpose", ["target_units"], "target_columns", perm=[0, 2, 1])
    op("MatMul", ["merged_hidden", "target_columns"], "likeness")
    op("ArgMax", ["likeness"], "nearest", axis=2, keepdims=1)
    op("Equal", ["nearest", put("groups", np.arange(CONTEXTUAL)[None, None])], "member")
    op("Cast", ["member"], "member_32", to=TensorProto.FLOAT)
    op("Transpose", ["member_32"], "members", perm=[0, 2, 1])
    op("MatMul", ["members", "merged_rows"], "group_rows")
    op("Add", ["target_rows", "group_rows"], "sum_rows")
    op("ReduceSum", ["sum_rows", "axis_2"], "sizes", keepdims=1)
    op("Div", ["sum_rows", "sizes"], "contextual_rows")
    op("Concat", ["kept_rows", "contextual_rows"], "token_weights", axis=1)
    op("Cast", ["token_weights"], "mix", to=dtype)
    op("MatMul", ["mix", "hidden"], "compressed")
    op("MatMul", ["compressed", "project_weight"], "projected")
    op("Add", ["projected", "project_bias"], "image_embeds")

    name, kind, shape = (
        ("image", TensorProto.UINT8, [batch, SIDE, SIDE, 3])
        if image
        else ("pixel_values", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])
    )
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, kind, shape)],
        [
            helper.make_tensor_value_info("image_embeds", dtype, [batch, K, HIDDEN]),
            helper.make_tensor_value_info("kept_indices", TensorProto.INT64, [batch, DOMINANT]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    result = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(result, full_check=True)
    return result


def write(folder: Path, *, image: bool, half: bool, batch: Batch, opset: int) -> None:
    """Write one bundle."""
    extent = "batch" if batch.dynamic else batch.max
    name, dtype = ("image", "uint8") if image else ("pixel_values", "float32")
    shape = (extent, SIDE, SIDE, 3) if image else (extent, 3, SIDE, SIDE)
    manifest = Manifest(
        model=Model("tests/tiny", None, "tiny", "random", 20261121),
        selection=Selection("visionzip", DOMINANT, CONTEXTUAL, "average", cls_token=True),
        tower=Tower(TOKENS, (GRID, GRID), cls_token=True, image_size=SIDE, patch_size=PATCH),
        inputs=(Tensor(name, dtype, shape),),
        outputs=(
            Tensor("image_embeds", "float16" if half else "float32", (extent, K, HIDDEN)),
            Tensor("kept_indices", "int64", (extent, DOMINANT)),
        ),
        batch=batch,
        preprocessing=Preprocessing(
            image_size=SIDE,
            mode="resize_crop",
            shortest_edge=SIDE,
            resample="bicubic",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            rescale_factor=1 / 255,
        ),
        llm=Llm(hidden_size=HIDDEN, image_token_id=7),
        precision="fp16" if half else "fp32",
        opset=opset,
        versions={"onnx": onnx.__version__},
    )
    with bundle_writer(folder) as writer:
        onnx.save_model(
            model(image=image, half=half, batch=extent, opset=opset),
            writer.folder / "model.onnx",
            save_as_external_data=True,
            location="model.onnx.data",
            size_threshold=64,
        )
        writer.publish(manifest)


def main(folder: Path) -> None:
    """Write both bundles and the golden results into `folder`."""
    write(folder / "tiny_bundle", image=True, half=False, batch=Batch(3, dynamic=True), opset=18)
    write(
        folder / "tiny_static_bundle",
        image=False,
        half=True,
        batch=Batch(2, dynamic=False),
        opset=17,
    )
    images = []
    rng = np.random.default_rng(1)
    while len(images) < 5:
        image = rng.integers(0, 256, size=(SIDE, SIDE, 3), dtype=np.uint8)
        try:
            reference(image.transpose(2, 0, 1)[None] / 127.5 - 1)
        except AssertionError:
            continue
        images.append(image)
    stacked = np.stack(images)
    pixels = (stacked.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)
    golden = reference(pixels)
    assert math.isfinite(golden["embeds"].sum())
    np.savez_compressed(folder / "tiny_golden.npz", images=stacked, pixel_values=pixels, **golden)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
