"""What each node of a bundle's graph is for: embedding, attention, selection and so on.

Told from the graph's form and from two names: the value `token_weights`, and those that the export
gives to the projector's weights. The projector is what takes these, and what follows from it. The
tower is what leads there without the token weights; LayerNorms cut it into segments, of which one
with a Softmax is attention. Everything else scores, chooses and merges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, Literal

from vzip.runtime.bundle.manifest import TOKEN_WEIGHTS
from vzip.runtime.errors import BundleError
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    import onnx_ir as ir

Part = Literal[
    "embedding", "attention", "feed-forward", "LayerNorm", "selection and merge", "projector"
]
SELECTION: Final[Part] = "selection and merge"

_PROJECTOR = "projector."  # weights are called after the modules that hold them
_NORM, _PRODUCT, _SOFTMAX = "LayerNormalization", "MatMul", "Softmax"


def parts(graph: Iterable[ir.Node]) -> dict[str, Part]:
    """Return node name → part, in the order of the graph; nodes without a name are left out.

    Raises:
        BundleError: There is no merge or no projector: the graph isn't one of vzip's.
    """
    nodes = list(graph)
    merged = _followers(nodes, lambda name: name == TOKEN_WEIGHTS)
    projector = _followers(nodes, lambda name: name.startswith(_PROJECTOR))
    if not merged or not projector:
        raise BundleError(
            f"model.onnx has {counted(len(nodes), 'operator')} and no merge by {TOKEN_WEIGHTS}, or "
            "no projector",
            expected="a graph that 'vzip export' made",
        )
    if next(node for node in nodes if node in projector) not in merged:
        projector -= merged  # else pooled tokens are merged behind the projector
    tower = _leading(projector, merged) - merged - projector
    found: dict[ir.Node, Part] = dict.fromkeys(projector, "projector")
    for segment in _segments(node for node in nodes if node in tower):
        operators = {node.op_type for node in segment}
        part: Part = "feed-forward" if _PRODUCT in operators else "embedding"
        if _SOFTMAX in operators:
            part = "attention"
        for node in segment:
            found[node] = "LayerNorm" if node.op_type == _NORM else part
    return {node.name: found.get(node, SELECTION) for node in nodes if node.name}


def _followers(nodes: Iterable[ir.Node], first: Callable[[str], bool]) -> set[ir.Node]:
    """Return the nodes that take a value of some name, or a value of such a node."""
    found: set[ir.Node] = set()
    for node in nodes:  # makers stand before takers
        if any(x and (x.producer() in found or first(x.name or "")) for x in node.inputs):
            found.add(node)
    return found


def _leading(ends: Iterable[ir.Node], merged: set[ir.Node]) -> set[ir.Node]:
    """Return some nodes and all that lead to them, the choice of tokens left out.

    Nor does a cast before the merge count, which is in FP32 in every graph: it serves the merge.
    """
    found: set[ir.Node] = set()
    pending = list(ends)
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        for value in node.inputs:
            if value is None or value.name == TOKEN_WEIGHTS:
                continue
            before = value.producer()
            if before and node in merged and before.op_type == "Cast" and before not in merged:
                (source,) = before.inputs
                before = source.producer() if source else None
            if before is not None:
                pending.append(before)
    return found


def _segments(nodes: Iterable[ir.Node]) -> list[list[ir.Node]]:
    """Return nodes in their order, cut before each LayerNorm."""
    segments: list[list[ir.Node]] = [[]]
    for node in nodes:
        if node.op_type == _NORM:
            segments.append([])
        segments[-1].append(node)
    return segments
