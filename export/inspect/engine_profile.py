"""Where an engine's time goes: TensorRT's time of each layer, summed by what it computes.

TensorRT says which of the graph's nodes each layer of an engine computes (8.6 tells layers' names
alone, which hold nodes' names where they weren't compiled together); `graph_parts` says what these
are for. A layer that computes nodes of several parts counts as what weighs most in it: products
before norms before the rest.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vzip.export.engines.tensorrt.api import load_bindings
from vzip.export.engines.tensorrt.layers import (
    FUSED,
    EngineLayers,
    inspect_engine,
    is_opaque,
)
from vzip.export.graph.reading import read_graph
from vzip.export.inspect.parts import SELECTION, parts
from vzip.runtime.backends.tensorrt.engine_file import read_engine
from vzip.runtime.errors import BackendError

if TYPE_CHECKING:
    import onnx_ir as ir

    from vzip.runtime.backends.tensorrt.backend import TensorRt
    from vzip.runtime.bundle.reader import Bundle

REFORMAT: Final = "reformat"
UNKNOWN: Final = "unknown"
OPAQUE: Final = "many nodes in one layer"
"""What TensorRT 8.6 makes of a transformer: it doesn't tell where the time goes inside."""

CALLS, WARM_UP = 20, 3
_SLOWEST = 10
_WEIGHTS: Final = {"MatMul": 3, "Conv": 3, "Softmax": 3, "LayerNormalization": 2}
_WORD = re.compile(r"[^\s+(),{}\[\]]+")

Run = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Profile:
    """What one engine's runs took.

    Attributes:
        calls: Runs that were timed.
        total_ms: Of all layers, median of the runs. A profiler makes every layer wait, so this is
            above what a run takes without.
        parts: Part of the graph, `REFORMAT`, `OPAQUE` or `UNKNOWN` → milliseconds (sum of its
            layers' medians), most first.
        layers: Likewise → number of layers.
        slowest: Name, part and milliseconds of the slowest layers.
        fused_attention: Layers that run attention as one kernel; None where TensorRT doesn't tell.
    """

    calls: int
    total_ms: float
    parts: Mapping[str, float]
    layers: Mapping[str, int]
    slowest: tuple[tuple[str, str, float], ...]
    fused_attention: int | None

    def share(self, part: str) -> float:
        """Return a part's share of all layers' time."""
        return self.parts.get(part, 0.0) / sum(self.parts.values())

    @property
    def reformat_layers(self) -> int:
        """Layers that only change how numbers lie in memory."""
        return self.layers.get(REFORMAT, 0)

    def to_json(self) -> dict[str, Any]:
        """Return what `json` writes."""
        return {
            "calls": self.calls,
            "total_ms": round(self.total_ms, 4),
            "parts": {
                part: {
                    "ms": round(ms, 4),
                    "share": round(self.share(part), 4),
                    "layers": self.layers[part],
                }
                for part, ms in self.parts.items()
            },
            "selection_share": round(self.share(SELECTION), 4),
            "unknown_share": round(self.share(UNKNOWN), 4),
            "reformat_layers": self.reformat_layers,
            "fused_attention": self.fused_attention,
            "slowest": [[name, part, round(ms, 4)] for name, part, ms in self.slowest],
        }


def profile_engine(
    opened: TensorRt, bundle: Bundle, rows: int, *, calls: int = CALLS, warm_up: int = WARM_UP
) -> Profile:
    """Profile an engine that is open.

    Args:
        opened: The backend that runs it.
        bundle: Where it is from.
        rows: A batch size that was run before.
        calls: Runs to time.
        warm_up: Runs before, which aren't counted.

    Raises:
        BackendError: TensorRT can't look into the engine here, or its profiler said nothing.
        BundleError: Engine or graph are damaged.
    """
    record = bundle.manifest.engines[opened.engine]
    runs = opened.layer_ms(rows, warm_up + calls)[warm_up:]
    layers = inspect_engine(load_bindings(record.gpu_stack), read_engine(bundle, opened.engine))
    built_from = bundle.at(record.quantised or bundle.manifest.precision)
    return summary(runs, layers, list(read_graph(built_from, "an engine's profile").graph))


def summary(runs: Sequence[Run], layers: EngineLayers, graph: Sequence[ir.Node]) -> Profile:
    """Sum runs up by what each layer is for.

    Args:
        runs: Of each run, name and milliseconds of every layer.
        layers: What the inspector says of the engine.
        graph: Operators of the graph that it was built from.

    Raises:
        BackendError: There is no layer in the runs.
        BundleError: As `parts`.
    """
    taken: dict[str, list[float]] = {}
    for run in runs:
        at_once: dict[str, float] = {}
        for name, ms in run:  # a name may stand for several layers
            at_once[name] = at_once.get(name, 0.0) + ms
        for name, ms in at_once.items():
            taken.setdefault(name, []).append(ms)
    if not taken:
        raise BackendError(
            f"TensorRT's profiler told no layer in {len(runs)} runs",
            expected="at least one",
            cause="the engine was built without layers' names",
            cure="build it again with vzip build",
        )
    labels = _labels(layers, graph)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    of = {name: labels.get(name) or _label(name, "", (), {}, {}) for name in medians}
    by_part: dict[str, float] = {}
    for name, ms in medians.items():
        by_part[of[name]] = by_part.get(of[name], 0.0) + ms
    slowest = sorted(medians, key=lambda name: -medians[name])[:_SLOWEST]
    return Profile(
        calls=len(runs),
        total_ms=statistics.median(sum(ms for _, ms in run) for run in runs),
        parts=dict(sorted(by_part.items(), key=lambda item: -item[1])),
        layers=Counter(of.values()),
        slowest=tuple((name, of[name], medians[name]) for name in slowest),
        fused_attention=layers.fused_attention,
    )


def _labels(layers: EngineLayers, graph: Sequence[ir.Node]) -> dict[str, str]:
    """Return layer name → part, `REFORMAT` or `UNKNOWN`."""
    part = parts(graph)
    operators = {node.name or "": node.op_type for node in graph}
    return {
        name: _label(name, kind, origins, part, operators)
        for (name, kind, _), origins in zip(layers.layers, layers.origins, strict=True)
    }


def _label(
    name: str,
    kind: str,
    origins: Iterable[str],
    part: Mapping[str, str],
    operators: Mapping[str, str],
) -> str:
    """Return what a layer is for."""
    if kind == "Reformat" or name.startswith("Reformatting CopyNode"):
        return REFORMAT
    if is_opaque(name, kind):
        return OPAQUE
    if FUSED.search(name):
        return "attention"
    computed = [node for node in (*origins, *_WORD.findall(name)) if node in part]
    if not computed:
        return UNKNOWN
    return part[max(computed, key=lambda node: _WEIGHTS.get(operators[node], 1))]
