"""A bundle's graph: its linear layers, cut in pieces, run.

The graph is small without its weights, and these stay in the bundle's file until they are needed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
from numpy.typing import NDArray

from vzip.export.graph.unshared import LINEAR, read_own_graph
from vzip.runtime.backends.onnxruntime import session_options, with_output
from vzip.runtime.backends.packages import import_onnxruntime
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BackendError, BundleError
from vzip.runtime.files.names import in_utf8

Array = NDArray[Any]
Kind = Literal["qkv", "out_proj", "fc1", "fc2", "projector"]

_KINDS: Mapping[str, Kind] = {
    "q": "qkv", "k": "qkv", "v": "qkv", "out": "out_proj", "fc1": "fc1", "fc2": "fc2",
    "linear_1": "projector", "linear_2": "projector",
}  # fmt: skip
_FIRST_OF_LAYER = re.compile(r"layers\.\d+\.norm1\.weight")
_FOLDER_KEY = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class LinearGroup:
    """A linear layer, or the three that share an input: what is quantised or left as one.

    Attributes:
        name: Such as ``layers.3.qkv``, ``layers.3.fc1``, ``projector.linear_1``.
        kind: Which part of the model.
        input: Name of the value that it multiplies.
        weights: Names of its weights, each [in, out].
        nodes: Names of its MatMuls, in the order of `weights`: q, k, v.
        norm: Names of gamma and beta of the LayerNorm whose output is `input` and nothing else's
            input; None where there is no such norm.
    """

    name: str
    kind: Kind
    input: str
    weights: tuple[str, ...]
    nodes: tuple[str, ...]
    norm: tuple[str, str] | None


def own_graph(bundle: Bundle) -> ir.Model:
    """Read a bundle's own graph, whatever other precisions it has, after checking its files.

    Its layers have nodes and initializers of their own.

    Raises:
        BundleError: A file is missing or damaged.
    """
    return read_own_graph(bundle.at(None), "'vzip calibrate'")


def array_of(model: ir.Model, name: str) -> Array:
    """Return an initializer's numbers, which the bundle's file holds."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None, name
    return tensor.numpy()


def names_of(values: Collection[ir.Value | None]) -> tuple[str, ...]:
    """Return the names of values, in their order; one that is left out has none."""
    return tuple(value.name for value in values if value is not None and value.name)


def linear_groups(model: ir.Model) -> list[LinearGroup]:
    """Return the linear layers in the order in which they run.

    Raises:
        BundleError: There are none under the names that the exporter gives them.
    """
    groups: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not weight.is_initializer():
            continue
        if match := LINEAR.fullmatch(weight.name or ""):
            part = "qkv" if _KINDS[match[2]] == "qkv" else match[2]
            groups.setdefault(f"{match[1]}.{part}", []).append(node)
    if not groups:
        raise BundleError(
            "the graph has no linear layers under the exporter's names",
            expected="layers.0.q.weight and others",
            cause="it was made by another exporter",
            cure="export the model again",
        )
    found = []
    for name, nodes in groups.items():
        nodes.sort(key=_place)
        (source,) = {node.inputs[0] for node in nodes}
        assert source is not None
        norm, maker = None, source.producer()
        whole = len(source.uses()) == len(nodes) and not source.is_graph_output()
        if whole and maker is not None and maker.op_type == "LayerNormalization":
            gamma, beta = names_of(maker.inputs[1:])
            norm = gamma, beta
        found.append(
            LinearGroup(
                name,
                _KINDS.get(name.rpartition(".")[2], "qkv"),
                str(source.name),
                names_of([node.inputs[1] for node in nodes]),
                tuple(str(node.name) for node in nodes),
                norm,
            )
        )
    return found


def _place(linear: ir.Node) -> int:
    """Return where q, k and v stand in a group, whatever the graph's order."""
    (name,) = names_of(linear.inputs[1:])
    return "qkv".find(name.split(".")[-2])


def pieces(model: ir.Model) -> list[ir.Model]:
    """Cut the graph before every layer.

    What one piece makes and a later one reads is an output of the first and an input of the
    second, so that any run of pieces can be repeated from stored values.
    """
    nodes = list(model.graph)
    starts = [
        place
        for place, node in enumerate(nodes)
        if any(_FIRST_OF_LAYER.fullmatch(name) for name in names_of(node.inputs))
    ]
    cut = []
    for first, last in itertools.pairwise([0, *starts, len(nodes)]):
        span, later = set(nodes[first:last]), set(nodes[last:])
        if not span:
            continue
        read = dict.fromkeys(value for node in nodes[first:last] for value in node.inputs)
        made = [value for node in nodes[first:last] for value in node.outputs]
        graph = ir.convenience.extract(
            model.graph,
            [x for x in read if x and not x.is_initializer() and x.producer() not in span],
            [
                value
                for value in made
                if value.is_graph_output() or any(use.node in later for use in value.uses())
            ],
        )
        cut.append(ir.Model(graph, ir_version=model.ir_version))
    return cut


class PieceSession:
    """A graph, or a piece of one, opened in ONNX Runtime on the CPU.

    Args:
        model: The graph.
        extra: Values inside it that `run` gives as well.
    """

    def __init__(self, model: ir.Model, extra: Sequence[str] = ()) -> None:
        onnxruntime = import_onnxruntime("vzip calibrate", "export")
        graph = model.graph
        self.inputs, outputs = names_of(graph.inputs), names_of(graph.outputs)
        added = tuple(name for name in extra if name not in outputs)
        self.names = (*outputs, *added)
        options = session_options(onnxruntime)
        options.log_severity_level = 4
        # Many sessions are open at once: memory that each kept for its next run would add up.
        options.enable_cpu_mem_arena = False
        tensors = [value.const_value for value in graph.initializers.values()]
        external = {each.base_dir for each in tensors if isinstance(each, ir.ExternalTensor)}
        assert len(external) <= 1, "weights of one bundle lie in one folder"
        if any(each and each.dtype == ir.DataType.FLOAT8E4M3FN for each in tensors):
            # ONNX Runtime 1.31 makes integer MatMuls of FP8 ones too, and then can't run them.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        data = ir.to_proto(model).SerializeToString()
        for name in added:
            data = with_output(data, name)
        try:
            with in_utf8(Path(next(iter(external), ""))) as folder:
                options.add_session_config_entry(_FOLDER_KEY, folder)
                self._session: Any = onnxruntime.InferenceSession(
                    data, options, providers=["CPUExecutionProvider"]
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
        model: The whole graph.
        observed: Values inside it that can be asked for.
    """

    def __init__(self, model: ir.Model, observed: Collection[str] = ()) -> None:
        self.pieces = pieces(model)
        self.inputs = [names_of(piece.graph.inputs) for piece in self.pieces]
        self.outputs = [names_of(piece.graph.outputs) for piece in self.pieces]
        self._observed = set(observed)
        self._sessions: dict[int, PieceSession] = {}

    def __len__(self) -> int:
        return len(self.pieces)

    def place(self, linear: LinearGroup) -> int:
        """Return the number of the piece that a linear layer is in."""
        for place, piece in enumerate(self.pieces):
            if any(node.name == linear.nodes[0] for node in piece.graph):
                return place
        raise AssertionError(linear.name)

    def session(self, place: int) -> PieceSession:
        """Return a piece's session."""
        if place not in self._sessions:
            extra = [name for name in self.made(place) if name in self._observed]
            self._sessions[place] = PieceSession(self.pieces[place], extra)
        return self._sessions[place]

    def made(self, place: int) -> list[str]:
        """Return the names of all values that a piece makes."""
        return [x for node in self.pieces[place].graph for x in names_of(node.outputs)]

    def close(self) -> None:
        """Free the sessions; a later run opens them again."""
        self._sessions.clear()

    def live(self, values: Mapping[str, Array], place: int) -> dict[str, Array]:
        """Return those values that piece `place` or a later one reads."""
        needed = {name for names in self.inputs[place:] for name in names}
        return {name: value for name, value in values.items() if name in needed}
