"""The finished graph: its operators, shapes, types and bytes, and what the passes refuse."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from tests.export.layouts import CONFIG, PROCESSOR
from tests.places import ROOT
from tests.refusals import refused
from vzip.export import families
from vzip.export.algorithm.budget import Budget, Merge
from vzip.export.checkpoint.random_weights import random_vision
from vzip.export.graph import passes
from vzip.export.graph.trace import GraphOptions, save, trace
from vzip.export.graph.traced import Encoder, GraphInput
from vzip.runtime.backends.packages import import_onnxruntime
from vzip.runtime.bundle import graph_check
from vzip.runtime.bundle.manifest import (
    DATA_FILE,
    EMBEDS,
    KEPT,
    MODEL_FILE,
    POSITIONS,
    TOKEN_WEIGHTS,
)
from vzip.runtime.errors import ExportError
from vzip.runtime.pictures.preprocess import pixel_values

LAYERS = 2  # of three; the last is dead
BASE = families.describe(CONFIG, PROCESSOR)
CONFIGURATION = dataclasses.replace(BASE, tower=dataclasses.replace(BASE.tower, num_layers=3))
TOKENS, WIDTH, LLM = 65, 32, 48
DOMINANT, CONTEXTUAL = 11, 5

# Every operator type, the same in all variants: `Cast` is also that of indices and comparisons.
OPERATORS = frozenset(
    {
        "Add", "ArgMax", "Cast", "Clip", "Concat", "Conv", "Div", "Equal", "Erf", "GreaterOrEqual",
        "LayerNormalization", "MatMul", "Mul", "Neg", "Pad", "ReduceMax",
        "ReduceSum", "Reshape", "Sigmoid", "Slice", "Softmax", "Sqrt", "Squeeze", "Sub", "TopK",
        "Transpose", "Unsqueeze",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One graph; the defaults are those of the command line."""

    precision: str = "fp32"
    opset: int = 18
    batch: int = 1
    dynamic: bool = False
    graph_input: GraphInput = "image"
    merge: Merge = "average"
    cls_token: bool = True

    def __str__(self) -> str:
        batch = f"to{self.batch}" if self.dynamic else str(self.batch)
        cls = "cls" if self.cls_token else "patches"
        return "-".join([self.precision, str(self.opset), batch, self.graph_input, self.merge, cls])

    @property
    def options(self) -> GraphOptions:
        return GraphOptions(self.graph_input, self.batch, self.dynamic, self.opset)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else torch.float16


# Every value of every axis, every pair of precision × opset × batch, every pair of input × merge ×
# CLS with a precision.
VARIANTS = (
    Variant(),
    Variant("fp32", 17, 3, False, "pixel_values", "sum", False),
    Variant("fp32", 18, 4, True, "pixel_values", "average", False),
    Variant("fp32", 17, 4, True, "image", "sum", True),
    Variant("fp16", 18, 3, False, "image", "sum", False),
    Variant("fp16", 17, 1, False, "pixel_values", "average", True),
    Variant("fp16", 17, 4, True, "image", "average", False),
    Variant("fp16", 18, 1, True, "pixel_values", "sum", True),
)


@functools.cache
def weights() -> Any:
    return random_vision(CONFIGURATION, 0)


def encoder(variant: Variant) -> Encoder:
    return Encoder(
        CONFIGURATION,
        weights().tensors,
        budget=Budget(DOMINANT, CONTEXTUAL, variant.cls_token, merge=variant.merge),
        graph_input=variant.graph_input,
        dtype=variant.dtype,
    ).eval()


def traced(variant: Variant) -> ir.Model:
    return trace(encoder(variant), variant.options, image_size=32)


@dataclass(frozen=True)
class Graph:
    """A saved graph and the module that it came from."""

    variant: Variant
    folder: Path
    encoder: Encoder

    @functools.cached_property
    def proto(self) -> onnx.ModelProto:
        return onnx.load(self.folder / MODEL_FILE)  # with its weights

    @functools.cached_property
    def session(self) -> Any:
        """The plan's matrix is an output here: it is in the graph under its name."""
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        (weights,) = [each for each in model.graph.value_info if each.name == TOKEN_WEIGHTS]
        model.graph.output.append(weights)
        onnxruntime = import_onnxruntime("this test", "cpu")
        return onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )

    def run(self, array: np.ndarray) -> dict[str, np.ndarray]:
        outputs = self.session.run(None, {self.variant.graph_input: array})
        return dict(zip((EMBEDS, KEPT, POSITIONS, TOKEN_WEIGHTS), outputs, strict=True))

    def input(self, images: np.ndarray) -> np.ndarray:
        if self.variant.graph_input == "image":
            return images
        return pixel_values(images, CONFIGURATION.preprocessing)


def images(count: int) -> np.ndarray:
    """Return distinct uint8 images [count, 32, 32, 3]: coarse noise, as photographs are smooth."""
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


Graphs = Callable[[Variant], Graph]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    @functools.cache
    def exported(variant: Variant) -> Graph:
        folder = tmp_path_factory.mktemp("graph")
        save(traced(variant), folder)
        return Graph(variant, folder, encoder(variant))

    return exported


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def graph(request: pytest.FixtureRequest, graphs: Graphs) -> Graph:
    return graphs(request.param)


# What every graph is


@pytest.mark.slow
def test_exactly_these_operators(graph: Graph) -> None:
    assert {node.op_type for node in graph.proto.graph.node} == OPERATORS
    assert {node.domain for node in graph.proto.graph.node} == {""}
    assert not graph.proto.functions


@pytest.mark.slow
def test_onnx_checks_it_in_full(graph: Graph) -> None:
    onnx.checker.check_model(str(graph.folder / MODEL_FILE), full_check=True)
    assert [(each.domain, each.version) for each in graph.proto.opset_import] == [
        ("", graph.variant.opset)
    ]
    onnx.shape_inference.infer_shapes(graph.proto, strict_mode=True, data_prop=True)


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    sizes = value.type.tensor_type.shape.dim
    return [size.dim_value if size.HasField("dim_value") else size.dim_param for size in sizes]


def test_names_shapes_and_types_of_the_interface(graph: Graph) -> None:
    variant = graph.variant
    proto = graph.proto.graph
    batch: list[int | str] = ["batch" if variant.dynamic else variant.batch]
    image = variant.graph_input == "image"
    assert [
        (value.name, value.type.tensor_type.elem_type, shape_of(value)) for value in proto.input
    ] == [
        (
            variant.graph_input,
            onnx.TensorProto.UINT8 if image else onnx.TensorProto.FLOAT,
            batch + ([32, 32, 3] if image else [3, 32, 32]),
        )
    ]
    half = variant.precision == "fp16"
    assert [
        (value.name, value.type.tensor_type.elem_type, shape_of(value)) for value in proto.output
    ] == [
        (
            EMBEDS,
            onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT,
            [*batch, DOMINANT + CONTEXTUAL, LLM],
        ),
        (KEPT, onnx.TensorProto.INT64, [*batch, DOMINANT]),
        (POSITIONS, onnx.TensorProto.INT64, [*batch, DOMINANT + CONTEXTUAL]),
    ]


def test_every_shape_is_static_but_the_batch(graph: Graph) -> None:
    proto = graph.proto.graph
    shapes = {value.name: shape_of(value) for value in proto.value_info}
    produced = [name for node in proto.node for name in node.output]
    outputs = {value.name for value in proto.output}
    assert set(produced) <= set(shapes) | outputs
    for name, shape in shapes.items():
        open_axes = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
        assert open_axes in ([], [0]) if graph.variant.dynamic else not open_axes, name
    batch = "batch" if graph.variant.dynamic else graph.variant.batch
    assert shapes[TOKEN_WEIGHTS] == [batch, DOMINANT + CONTEXTUAL, TOKENS]
    softmaxes = [node.output[0] for node in proto.node if node.op_type == "Softmax"]
    assert [shapes[name][1:] for name in softmaxes] == [[4, TOKENS, TOKENS]] * LAYERS + [
        [4, 1, TOKENS]
    ]


def test_it_computes_what_the_module_does(graph: Graph) -> None:
    for count in {1, graph.variant.batch} if graph.variant.dynamic else {graph.variant.batch}:
        array = graph.input(images(count))
        with torch.no_grad():
            embeds, kept, positions, token_weights = (
                output.numpy() for output in graph.encoder(torch.from_numpy(array))
            )
        got = graph.run(array)
        if graph.variant.precision == "fp32":
            np.testing.assert_array_equal(got[KEPT], kept)
            np.testing.assert_array_equal(got[POSITIONS], positions)
            np.testing.assert_allclose(got[TOKEN_WEIGHTS], token_weights, atol=1e-6)
            assert np.abs(got[EMBEDS] - embeds).max() <= 1e-5 * np.abs(embeds).max()
            continue
        # FP16 may be rounded in other places: what both kept must look alike.
        assert got[EMBEDS].dtype == np.float16
        for image in range(count):
            both = np.intersect1d(got[KEPT][image], kept[image])
            assert len(both) >= 0.8 * DOMINANT
            one = got[EMBEDS][image, np.searchsorted(got[KEPT][image], both)].astype(float)
            other = embeds[image, np.searchsorted(kept[image], both)].astype(float)
            assert np.abs(one - other).max() <= 1e-2 * np.abs(other).max()


def test_rows_of_a_batch_do_not_meet(graph: Graph) -> None:
    batch = graph.variant.batch
    if batch == 1:
        return  # one row has no neighbour
    array = graph.input(images(batch))
    together = graph.run(array)
    assert len({row.tobytes() for row in together[KEPT]}) == batch
    for index in range(batch):
        # A static batch is filled up with other images.
        rows = array[index : index + 1]
        if not graph.variant.dynamic:
            rows = np.concatenate([rows, graph.input(images(batch + 2)[batch - 3 : -3])])[:batch]
            rows = np.concatenate([rows, array[:1].repeat(batch - len(rows), axis=0)])
        alone = graph.run(np.ascontiguousarray(rows))
        for name in (KEPT, EMBEDS, POSITIONS, TOKEN_WEIGHTS):
            np.testing.assert_allclose(
                alone[name][0].astype(float), together[name][index].astype(float), atol=2e-6
            )


def consumers(proto: onnx.GraphProto, name: str) -> list[onnx.NodeProto]:
    return [node for node in proto.node if name in node.input]


def producer(proto: onnx.GraphProto, name: str) -> onnx.NodeProto | None:
    return next((node for node in proto.node if name in node.output), None)


def constant(proto: onnx.GraphProto, name: str) -> np.ndarray | None:
    for each in proto.initializer:
        if each.name == name:
            return onnx.numpy_helper.to_array(each)
    return None


def ancestors(proto: onnx.GraphProto, name: str) -> Iterator[onnx.NodeProto]:
    """Go up through everything between a product and the LayerNormalization before it."""
    node = producer(proto, name)
    if node is not None and node.op_type != "LayerNormalization":
        yield node
        for each in node.input:
            yield from ancestors(proto, each)


def test_attention_is_what_tensorrt_fuses(graph: Graph) -> None:
    proto = graph.proto.graph
    softmaxes = [node for node in proto.node if node.op_type == "Softmax"]
    assert len(softmaxes) == LAYERS + 1
    for number, node in enumerate(softmaxes):
        (after,) = consumers(proto, node.output[0])
        before = producer(proto, node.input[0])
        assert before is not None
        assert before.op_type == "MatMul"  # nothing between the product and the softmax
        if number < LAYERS:
            assert after.op_type == "MatMul"
            assert after.input[0] == node.output[0]
        else:
            assert after.op_type != "MatMul"  # the scores
        # The scale, head width 8 to the power -½, once: on the queries, not on the keys.
        scales = []
        for side in before.input:
            factors = [
                value
                for up in ancestors(proto, side)
                if up.op_type in {"Mul", "Div"}
                for each in up.input
                if (value := constant(proto, each)) is not None
            ]
            scales.append([float(each.reshape(-1)[0]) for each in factors])
        assert scales == [[pytest.approx(8**-0.5, rel=1e-3)], []]
        is_half = graph.variant.precision == "fp16" and number < LAYERS
        wanted = onnx.TensorProto.FLOAT16 if is_half else onnx.TensorProto.FLOAT
        types = {value.name: value.type.tensor_type.elem_type for value in proto.value_info}
        assert types[node.output[0]] == wanted  # scores in FP32 in either precision


def test_norms_and_top_k_are_as_tensorrt_wants_them(graph: Graph) -> None:
    proto = graph.proto.graph
    count = [node.op_type for node in proto.node].count
    assert count("LayerNormalization") == 2 * LAYERS + 1
    assert count("Conv") == 1
    assert count("Erf") == 1  # the projector's GELU, on K tokens
    assert count("Sigmoid") == LAYERS
    assert count("ArgMax") == 1
    types = {value.name: value.type.tensor_type.elem_type for value in proto.value_info}
    sorts = [node for node in proto.node if node.op_type == "TopK"]
    assert len(sorts) == 2
    for node in sorts:
        assert types[node.input[0]] == onnx.TensorProto.FLOAT
        k = constant(proto, node.input[1])
        assert k is not None
        assert k.tolist() == [DOMINANT - int(graph.variant.cls_token)]
    for node in proto.node:
        if node.op_type == "Reshape":
            assert constant(proto, node.input[1]) is not None
            assert not node.attribute  # allowzero is unknown to old parsers
    if graph.variant.graph_input == "image":  # uint8 is taken by Cast alone
        (first,) = consumers(proto, "image")
        assert first.op_type == "Cast"


def test_the_dead_layer_is_gone_and_the_projector_sees_k_tokens(graph: Graph) -> None:
    shapes = {value.name: shape_of(value) for value in graph.proto.graph.value_info}
    (erf,) = [node for node in graph.proto.graph.node if node.op_type == "Erf"]
    assert shapes[erf.output[0]][1:] == [DOMINANT + CONTEXTUAL, LLM]
    numbers = sum(
        int(np.prod(each.dims))
        for each in graph.proto.graph.initializer
        if each.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    )
    needed = sum(parameter.numel() for parameter in graph.encoder.parameters())
    assert needed <= numbers <= needed + 250


def test_weights_lie_beside_the_graph_in_their_precision(graph: Graph) -> None:
    proto = onnx.load(graph.folder / MODEL_FILE, load_external_data=False)
    outside = [each for each in proto.graph.initializer if each.external_data]
    assert {
        entry.value for each in outside for entry in each.external_data if entry.key == "location"
    } == {DATA_FILE}
    wanted = onnx.TensorProto.FLOAT16 if graph.variant.precision == "fp16" else 1
    # The small constants of the FP32 side branch have none of the module's names.
    names = {name for name, _ in graph.encoder.named_parameters()} - {
        "embedding.scale",
        "embedding.shift",
    }
    types = {each.name: each.data_type for each in proto.graph.initializer}
    assert {types[name] for name in names & set(types)} == {wanted}
    big = [
        each for each in proto.graph.initializer if len(each.dims) > 1 and np.prod(each.dims) > 5
    ]
    assert {each.data_type for each in big} == {wanted}
    assert len(outside) >= 10
    size = (graph.folder / DATA_FILE).stat().st_size
    width = 2 if graph.variant.precision == "fp16" else 4
    numbers = sum(parameter.numel() for parameter in graph.encoder.parameters())
    # Offsets may be aligned, and small tensors lie in the graph.
    assert 0.8 * numbers * width <= size <= 1.3 * numbers * width + 2**16
    assert sorted(path.name for path in graph.folder.iterdir()) == [MODEL_FILE, DATA_FILE]


def digests(folder: Path) -> list[str]:
    return [
        hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (MODEL_FILE, DATA_FILE)
    ]


def test_no_trace_of_the_machine_in_the_bytes(graph: Graph) -> None:
    data = (graph.folder / MODEL_FILE).read_bytes()
    weights_data = (graph.folder / DATA_FILE).read_bytes()
    roots = [Path(torch.__file__).parents[1], Path(families.__file__).parents[2], Path.home()]
    for word in [*map(str, roots), ".py", "site-packages", 'File "', "pkg.torch", "stack_trace"]:
        assert word.encode() not in data, word
        assert len(word) < 8 or word.encode() not in weights_data, word
    proto = graph.proto
    assert (proto.producer_name, proto.producer_version, proto.domain) == ("vzip", "", "")
    assert (proto.graph.name, proto.doc_string) == ("vzip", "")
    assert not proto.metadata_props


# Once for all variants


@pytest.mark.slow
def test_the_same_bytes_again(graphs: Graphs, tmp_path: Path) -> None:
    variant = VARIANTS[6]
    save(traced(variant), tmp_path)
    assert digests(tmp_path) == digests(graphs(variant).folder)


OTHER_PROCESS = """
import sys
from pathlib import Path
import tests.export.graph.test_trace as here
here.save(here.traced(here.VARIANTS[0]), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_the_same_bytes_in_another_process(graphs: Graphs, tmp_path: Path) -> None:
    """Sets and dictionaries may have another order there."""
    paths = [str(ROOT), *sys.path]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path)]
    subprocess.run(command, env=environment, check=True, cwd=tmp_path)
    assert digests(tmp_path) == digests(graphs(VARIANTS[0]).folder)


@pytest.mark.slow
def test_the_first_cls_alone_is_a_graph_too(tmp_path: Path) -> None:
    module = Encoder(
        CONFIGURATION,
        weights().tensors,
        budget=Budget(1, 3),
        graph_input="image",
        dtype=torch.float32,
    )
    save(trace(module, GraphOptions(batch=2, dynamic_batch=True), image_size=32), tmp_path)
    onnx.checker.check_model(str(tmp_path / MODEL_FILE), full_check=True)
    got = Graph(Variant(), tmp_path, module).run(images(2))
    with torch.no_grad():
        expected = module(torch.from_numpy(images(2)))[0].numpy()
    assert got[KEPT].tolist() == [[0], [0]]
    assert np.abs(got[EMBEDS] - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("batch", [0, -1])
def test_options_with_no_batch(batch: int) -> None:
    with refused(ExportError, got=f"batch is {batch}", expected="at least 1"):
        GraphOptions(batch=batch)


@pytest.mark.parametrize("opset", [16, 19, 21])
def test_options_of_another_opset(opset: int) -> None:
    with refused(ExportError, got=f"opset is {opset}", expected="18, or 17"):
        GraphOptions(opset=opset)


# What the passes refuse


def value(name: str, *shape: int | str, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def node(
    op: str, inputs: list[ir.Value | None], *outputs: ir.Value, name: str | None = None, **kw: Any
) -> ir.Node:
    return ir.node(op, inputs, attributes=kw, outputs=list(outputs), name=name or op.lower())


def model(
    inputs: list[ir.Value], nodes: list[ir.Node], outputs: list[ir.Value], opset: int = 18
) -> ir.Model:
    constants = {
        each.name: each
        for one in nodes
        for each in one.inputs
        if each is not None and each.const_value is not None
    }
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=list(constants.values()),
        opset_imports={"": opset},
        name="hand-made",
    )
    return ir.Model(graph, ir_version=8)


def fixed(name: str, *numbers: int) -> ir.Value:
    return ir.Value(
        name=name,
        const_value=ir.tensor(np.array(numbers, dtype=np.int64), name=name),
        shape=ir.Shape([len(numbers)]),
        type=ir.TensorType(ir.DataType.INT64),
    )


def refuses(graph_pass: ir.passes.InPlacePass, broken: ir.Model, text: str) -> None:
    with pytest.raises(ir.passes.PostconditionError) as caught:
        graph_pass(broken)
    assert text in str(caught.value.__cause__ or caught.value)


def relus(inputs: list[ir.Value], *names: str) -> tuple[list[ir.Node], list[ir.Value]]:
    values = [value(name, 1, 4) for name in names]
    return [node("Relu", inputs, each) for each in values], values


def test_hide_token_weights() -> None:
    x = value("image", 1, 4)
    nodes, outputs = relus([x], EMBEDS, KEPT, POSITIONS, TOKEN_WEIGHTS)
    good = model([x], nodes, outputs)
    assert passes.HideTokenWeights()(good).modified
    assert [each.name for each in good.graph.outputs] == [EMBEDS, KEPT, POSITIONS]
    assert not passes.HideTokenWeights()(good).modified

    x = value("image", 1, 4)
    nodes, outputs = relus([x], EMBEDS, KEPT, POSITIONS, "other")
    # An attention map as an output would be that, and a second consumer of the softmax.
    refuses(passes.HideTokenWeights(), model([x], nodes, outputs), "'other']; expected ['image_emb")
    x = value("image", 1, 4)
    nodes, outputs = relus([x], KEPT, EMBEDS, POSITIONS, TOKEN_WEIGHTS)
    refuses(passes.HideTokenWeights(), model([x], nodes, outputs), "outputs are ['kept_indices'")
    x = value("image", 1, 4)
    nodes, outputs = relus([x], EMBEDS, KEPT, POSITIONS)
    refuses(passes.HideTokenWeights(), model([x], nodes, outputs), "0 values are named token_wei")


def test_plain_reshape() -> None:
    def reshaping(shape: ir.Value, *inputs: ir.Value) -> ir.Model:
        x, y = value("x", 2, 6), value("y", 2, 3, 2)
        return model([x, *inputs], [node("Reshape", [x, shape], y, allowzero=1)], [y])

    good = reshaping(fixed("shape", -1, 3, 2))
    assert passes.PlainReshape()(good).modified
    assert "allowzero" not in good.graph[0].attributes
    refuses(passes.PlainReshape(), reshaping(fixed("shape", 2, -1, 2)), "leaves an axis open")
    refuses(passes.PlainReshape(), reshaping(fixed("shape", 2, 3, 0)), "leaves an axis open")
    refuses(passes.PlainReshape(), reshaping(fixed("shape", 0, 3, 2)), "leaves an axis open")
    computed = value("shape", 3, dtype=ir.DataType.INT64)
    refuses(passes.PlainReshape(), reshaping(computed, computed), "is computed at run time")


def test_lower_to_opset_17() -> None:
    x, y = value("x", 2, 6), value("y", 2, 1)
    good = model([x], [node("ReduceMax", [x, fixed("axes", 1)], y, keepdims=1)], [y])
    passes.LowerToOpset17()(good)
    (lowered,) = good.graph
    assert dict(good.opset_imports) == {"": 17}
    assert len(lowered.inputs) == 1
    assert list(lowered.attributes["axes"].as_ints()) == [1]

    axes = value("axes", 1, dtype=ir.DataType.INT64)
    x, y = value("x", 2, 6), value("y", 2, 1)
    computed = model([x, axes], [node("ReduceMax", [x, axes], y)], [y])
    refuses(passes.LowerToOpset17(), computed, "ReduceMax are computed at run time")

    x, y = value("x", 2, 6), value("y", 3, 6)
    inputs = [x, fixed("pads", 1, 0), None, fixed("axes", 0)]
    refuses(
        passes.LowerToOpset17(), model([x], [node("Pad", inputs, y)], [y]), "Pad has 4 inputs in"
    )


def test_anonymise() -> None:
    x = value("x", 1, 4)
    nodes, outputs = relus([x], "y")
    told = model([x], nodes, outputs)
    where = 'File "here.py"'
    told.producer_version, told.doc_string, told.graph.doc_string = "2.0", where, where
    for owner in (told, told.graph, x, *nodes, *outputs):
        owner.metadata_props["pkg.torch.stack_trace"] = where
    for one in nodes:
        one.doc_string = where
    for broken in (*nodes, *outputs):
        with pytest.raises(ir.passes.PostconditionError, match="still carries metadata"):
            passes.Anonymise().ensures(told)
        broken.metadata_props.clear()
        broken.doc_string = None
    passes.Anonymise().ensures(told)
    nodes[0].metadata_props["pkg.torch.stack_trace"] = where
    passes.Anonymise()(told)
    assert b"here.py" not in ir.to_proto(told).SerializeToString()
    assert told.producer_version is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], ir.Model]:
    """Return a way to load a finished FP16 graph afresh, to break it."""
    folder = tmp_path_factory.mktemp("finished")
    save(traced(Variant("fp16")), folder)
    return lambda: ir.load(folder / MODEL_FILE)


def promises(**change: Any) -> passes.Promises:
    return passes.Promises(
        **{"opset": 18, "softmaxes": LAYERS + 1, "norms": 2 * LAYERS + 1, "half": True} | change
    )


def first(graph_model: ir.Model, op: str) -> ir.Node:
    return next(each for each in graph_model.graph if each.op_type == op)


@pytest.mark.slow
def test_promises_hold_for_what_was_exported(finished: Callable[[], ir.Model]) -> None:
    assert not promises()(finished()).modified


def test_promises_refuse_an_operator_with_a_shape_that_depends_on_data(
    finished: Callable[[], ir.Model],
) -> None:
    broken = finished()
    kept = next(each for each in broken.graph.outputs if each.name == KEPT)
    found = value("found", 2, "n", dtype=ir.DataType.INT64)
    broken.graph.append(node("NonZero", [kept], found))
    refuses(promises(), broken, "operators ['NonZero'] are not allowed")


@pytest.mark.parametrize("op", ["Loop", "If", "Where", "ScatterElements", "Gelu"])
def test_promises_refuse_other_operators(finished: Callable[[], ir.Model], op: str) -> None:
    broken = finished()
    first(broken, "Sigmoid").op_type = op
    refuses(promises(), broken, f"operators ['{op}'] are not allowed")


def test_promises_refuse_a_second_consumer_of_the_softmax(
    finished: Callable[[], ir.Model],
) -> None:
    for number in range(LAYERS + 1):
        broken = finished()
        softmax = [each for each in broken.graph if each.op_type == "Softmax"][number]
        broken.graph.append(
            node("Neg", [softmax.outputs[0]], value("second", 1, 4, dtype=ir.DataType.FLOAT16))
        )
        refuses(promises(), broken, "a second consumer of the softmax breaks fused attention")


def test_promises_refuse_wide_weights_in_a_half_graph(finished: Callable[[], ir.Model]) -> None:
    broken = finished()
    weight = next(
        each
        for each in broken.graph.initializers.values()
        if each.dtype == ir.DataType.FLOAT16 and len(each.shape or ()) == 2
    )
    assert weight.const_value is not None
    array = weight.const_value.numpy().astype(np.float32)
    weight.const_value = ir.tensor(array, name=weight.name)
    weight.dtype = ir.DataType.FLOAT
    refuses(promises(), broken, "are FP32 in an FP16 graph")
    promises(half=False)(broken)


def test_promises_refuse_a_missing_norm(finished: Callable[[], ir.Model]) -> None:
    broken = finished()
    first(broken, "LayerNormalization").op_type = "Add"
    refuses(promises(), broken, "4 LayerNormalization; expected 5, one a norm of the model")


def test_promises_refuse_a_missing_or_another_softmax(finished: Callable[[], ir.Model]) -> None:
    broken = finished()
    first(broken, "Softmax").op_type = "Sigmoid"
    refuses(promises(), broken, "2 Softmax; expected 3, one a layer and one for the scores")
    refuses(promises(softmaxes=2), finished(), "3 Softmax; expected 2")


def test_promises_refuse_another_opset_or_domain(finished: Callable[[], ir.Model]) -> None:
    refuses(promises(opset=17), finished(), "opset imports are {'': 18}; expected 17 alone")
    broken = finished()
    broken.opset_imports["com.microsoft"] = 1
    refuses(promises(), broken, "'com.microsoft': 1}; expected 18 alone")


def test_promises_refuse_open_and_unknown_shapes(finished: Callable[[], ir.Model]) -> None:
    broken = finished()
    first(broken, "Softmax").outputs[0].shape = ir.Shape([1, 4, "tokens", TOKENS])
    refuses(promises(), broken, "only the batch axis may be open")
    broken = finished()
    first(broken, "Erf").outputs[0].shape = None
    refuses(promises(), broken, "has no shape")


@pytest.mark.slow
def test_a_broken_promise_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_check, "EXPORTED", graph_check.EXPORTED - {"TopK"})
    with pytest.raises(ExportError) as caught:
        traced(Variant())
    text = str(caught.value)
    assert text.startswith("the traced graph breaks a promise: operators ['TopK'] are not allowed;")
    assert f"torch {torch.__version__}" in text
    assert "constraints.txt" in text
    assert "\n" not in text
