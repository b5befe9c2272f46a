"""A bundle's graph as nodes and tensors: found linear layers, cut in pieces, run, saved.

The graph is small without its weights, and these stay in the bundle's file until they are needed:
what is copied and edited here are names.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import onnx
from numpy.typing import NDArray
from onnx import external_data_helper, helper, numpy_helper

from vzip.runtime.backends.onnxruntime import import_onnxruntime
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BackendError, BundleError

Array = NDArray[Any]
Kind = Literal["qkv", "out_proj", "fc1", "fc2", "projector"]

_LINEAR = re.compile(r"(layers\.\d+|projector)\.(q|k|v|out|fc1|fc2|linear_1|linear_2)\.weight")
_KINDS: Mapping[str, Kind] = {
    "q": "qkv", "k": "qkv", "v": "qkv", "out": "out_proj", "fc1": "fc1", "fc2": "fc2",
    "linear_1": "projector", "linear_2": "projector",
}  # fmt: skip
_FIRST_OF_LAYER = re.compile(r"layers\.\d+\.norm1\.weight")
_FOLDER_KEY = "session.model_external_initializers_file_folder_path"
_INLINE = 1024  # bytes up to which a saved tensor stays in the graph, as the exporter has it


@dataclass(frozen=True)
class Linear:
    """A linear layer, or the three that share an input: what is quantised or left as one.

    Attributes:
        name: Such as ``layers.3.qkv``, ``layers.3.fc1``, ``projector.linear_1``.
        kind: Which part of the model.
        input: Name of the value that it multiplies.
        weights: Names of its weights, each [in, out].
        nodes: Names of its MatMuls, in the order of `weights`.
        norm: Names of gamma and beta of the LayerNorm whose output is `input` and nothing else's
            input; None where there is no such norm.
    """

    name: str
    kind: Kind
    input: str
    weights: tuple[str, ...]
    nodes: tuple[str, ...]
    norm: tuple[str, str] | None


@dataclass(frozen=True)
class Graph:
    """Nodes in order and what they refer to.

    Attributes:
        nodes: In topological order.
        tensors: Initializers by name; their bytes are here, or in the file of weights.
        values: Dtype and shape of every value.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        opset: Version of the operators.
        ir_version: Version of the ONNX format.
        folder: Where the file of weights lies.
    """

    nodes: tuple[Any, ...]
    tensors: Mapping[str, Any]
    values: Mapping[str, Any] = field(repr=False)
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    ir_version: int
    folder: Path

    @classmethod
    def read(cls, bundle: Bundle) -> Graph:
        """Read a bundle's own graph, whatever other precisions it has, after checking its files.

        Raises:
            BundleError: A file is missing or damaged.
        """
        bundle = bundle.at(None)
        model = onnx.load_model_from_string(bundle.read_model())
        graph = model.graph
        values = {each.name: each for each in (*graph.value_info, *graph.input, *graph.output)}
        return cls(
            tuple(graph.node),
            {each.name: each for each in graph.initializer},
            values,
            tuple(each.name for each in graph.input),
            tuple(each.name for each in graph.output),
            model.opset_import[0].version,
            model.ir_version,
            bundle.weights_folder,
        )

    def array(self, name: str) -> Array:
        """Return a tensor's numbers."""
        array: Array = numpy_helper.to_array(self.tensors[name], base_dir=str(self.folder))
        return array

    def linears(self) -> list[Linear]:
        """Return the linear layers in the order in which they run.

        Raises:
            BundleError: There are none under the names that the exporter gives them.
        """
        readers: dict[str, int] = {}
        for node in self.nodes:
            for name in node.input:
                readers[name] = readers.get(name, 0) + 1
        norms = {
            node.output[0]: (node.input[1], node.input[2])
            for node in self.nodes
            if node.op_type == "LayerNormalization"
        }
        groups: dict[str, list[Any]] = {}
        for node in self.nodes:
            match = _LINEAR.fullmatch(node.input[1]) if node.op_type == "MatMul" else None
            if match:
                part = "qkv" if _KINDS[match[2]] == "qkv" else match[2]
                groups.setdefault(f"{match[1]}.{part}", []).append(node)
        if not groups:
            raise BundleError(
                f"{self.folder}: the graph has no linear layers under the exporter's names",
                expected="layers.0.q.weight and others",
                cause="it was made by another exporter",
                cure="export the model again",
            )
        linears = []
        for name, nodes in groups.items():
            source = nodes[0].input[0]
            assert all(node.input[0] == source for node in nodes)
            whole = readers[source] == len(nodes) and source not in self.outputs
            linears.append(
                Linear(
                    name,
                    _KINDS.get(name.rpartition(".")[2], "qkv"),
                    source,
                    tuple(node.input[1] for node in nodes),
                    tuple(node.name for node in nodes),
                    norms.get(source) if whole else None,
                )
            )
        return linears

    def pieces(self) -> list[Graph]:
        """Cut the graph before every layer.

        What one piece makes and a later one reads is an output of the first and an input of the
        second, so that any run of pieces can be repeated from stored values.
        """
        starts = [
            place
            for place, node in enumerate(self.nodes)
            if any(_FIRST_OF_LAYER.fullmatch(name) for name in node.input)
        ]
        bounds = [0, *starts, len(self.nodes)]
        spans = [self.nodes[a:b] for a, b in itertools.pairwise(bounds) if a < b]
        return [
            self._piece(span, [node for later in spans[place + 1 :] for node in later])
            for place, span in enumerate(spans)
        ]

    def _piece(self, nodes: Sequence[Any], later: Iterable[Any]) -> Graph:
        made = {name for node in nodes for name in node.output}
        read = dict.fromkeys(name for node in nodes for name in node.input if name)
        needed = {name for node in later for name in node.input} | set(self.outputs)
        return replace(
            self,
            nodes=tuple(nodes),
            tensors={name: self.tensors[name] for name in read if name in self.tensors},
            inputs=tuple(x for x in read if x not in made and x not in self.tensors),
            outputs=tuple(x for node in nodes for x in node.output if x in needed),
        )

    def to_model(self, outputs: Sequence[str] | None = None) -> Any:
        """Return the ONNX model, with other outputs if any are given."""
        wanted = self.outputs if outputs is None else outputs
        hidden = [
            value for name, value in self.values.items() if name not in (*self.inputs, *wanted)
        ]
        made = {name for node in self.nodes for name in node.output}
        graph = helper.make_graph(
            self.nodes,
            "vzip",
            [self.values[name] for name in self.inputs],
            [self.values[name] for name in wanted],
            list(self.tensors.values()),
            value_info=[value for value in hidden if value.name in made],
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=self.ir_version,
            producer_name="vzip",
        )

    def save(self, folder: Path, file: str) -> None:
        """Write the graph as `file` and its weights beside it as ``file.data``.

        Tensors are copied one at a time; none of them is needed in memory twice.
        """
        location = f"{file}.data"
        model = self.to_model()
        with (folder / location).open("wb") as data:
            for tensor in model.graph.initializer:
                raw = self._bytes(tensor)
                if len(raw) > _INLINE:
                    data.write(b"\0" * (-data.tell() % 64))  # as loaders like to map them
                    offset = data.tell()
                    data.write(raw)
                    _point(tensor, location, offset, len(raw))
                else:
                    tensor.ClearField("external_data")
                    tensor.ClearField("data_location")
                    tensor.raw_data = raw
        (folder / file).write_bytes(model.SerializeToString(deterministic=True))

    def _bytes(self, tensor: Any) -> bytes:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            if tensor.HasField("raw_data"):
                return bytes(tensor.raw_data)
            whole: bytes = numpy_helper.to_array(tensor).tobytes()
            return whole
        info = external_data_helper.ExternalDataInfo(tensor)
        with (self.folder / info.location).open("rb") as file:
            file.seek(info.offset or 0)
            content: bytes = file.read(info.length)
            return content


def _point(tensor: Any, location: str, offset: int, length: int) -> None:
    """Make a tensor refer to bytes in a file."""
    for name in ("raw_data", "external_data", "float_data", "int32_data", "int64_data"):
        tensor.ClearField(name)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)


class Session:
    """A graph, or a piece of one, opened in ONNX Runtime on the CPU.

    Args:
        graph: The graph.
        extra: Values inside it that `run` gives as well.
    """

    def __init__(self, graph: Graph, extra: Sequence[str] = ()) -> None:
        onnxruntime = import_onnxruntime("vzip calibrate", "export")
        self.inputs = graph.inputs
        self.names = (*graph.outputs, *(x for x in extra if x not in graph.outputs))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        # Many sessions are open at once: memory that each kept for its next run would add up.
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry(_FOLDER_KEY, str(graph.folder))
        if any(each.data_type == onnx.TensorProto.FLOAT8E4M3FN for each in graph.tensors.values()):
            # ONNX Runtime 1.31 makes integer MatMuls of FP8 ones too, and then can't run them.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        model = graph.to_model(self.names).SerializeToString()
        try:
            self._session: Any = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's errors have no base class of their own
            raise BackendError(
                f"ONNX Runtime {onnxruntime.__version__} can't open the graph: "
                f"{str(error).splitlines()[0]}",
                cause="memory is short, or it doesn't know an operator",
                cure="update onnxruntime",
            ) from error

    def run(
        self, values: Mapping[str, Array], wanted: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Return the outputs, or those wanted, by name."""
        names = self.names if wanted is None else tuple(wanted)
        feeds = {name: values[name] for name in self.inputs}
        return dict(zip(names, self._session.run(names, feeds), strict=True))


class Chain:
    """The pieces of a graph, each opened when it is first run.

    Args:
        graph: The whole graph.
        observed: Values inside it that can be asked for.
    """

    def __init__(self, graph: Graph, observed: Collection[str] = ()) -> None:
        self.pieces = graph.pieces()
        self._observed = set(observed)
        self._sessions: dict[int, Session] = {}
        self._outputs = graph.outputs

    def __len__(self) -> int:
        return len(self.pieces)

    def place(self, linear: Linear) -> int:
        """Return the number of the piece that a linear layer is in."""
        for place, piece in enumerate(self.pieces):
            if any(node.name == linear.nodes[0] for node in piece.nodes):
                return place
        raise AssertionError(linear.name)

    def session(self, place: int) -> Session:
        """Return a piece's session."""
        if place not in self._sessions:
            made = [x for node in self.pieces[place].nodes for x in node.output]
            extra = [name for name in made if name in self._observed]
            self._sessions[place] = Session(self.pieces[place], extra)
        return self._sessions[place]

    def close(self) -> None:
        """Free the sessions; a later run opens them again."""
        self._sessions.clear()

    def live(self, values: Mapping[str, Array], place: int) -> dict[str, Array]:
        """Return those values that piece `place` or a later one reads."""
        needed = {name for piece in self.pieces[place:] for name in piece.inputs}
        return {name: value for name, value in values.items() if name in needed}
