"""What each node of a bundle's graph is for: embedding, attention, selection and so on.

Told from the graph's form and from two names: the value `token_weights`, and those that the export
gives to the projector's weights. The projector is what takes these, and what follows from it. The
tower is what leads there without the token weights; LayerNorms cut it into segments, of which one
with a Softmax is attention. Everything else scores, chooses and merges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Literal

from vzip.export.engines.cpu.form_graph import Node
from vzip.runtime.bundle.manifest import TOKEN_WEIGHTS
from vzip.runtime.errors import BundleError

Part = Literal[
    "embedding", "attention", "feed-forward", "LayerNorm", "selection and merge", "projector"
]
SELECTION: Final[Part] = "selection and merge"

_PROJECTOR = "projector."  # weights are called after the modules that hold them
_NORM, _PRODUCT, _SOFTMAX = "LayerNormalization", "MatMul", "Softmax"


def parts(nodes: Sequence[Node]) -> dict[str, Part]:
    """Return node name → part, in the order of the graph; nodes without a name are left out.

    Raises:
        BundleError: There is no merge or no projector: the graph isn't one of vzip's.
    """
    maker = {value: place for place, node in enumerate(nodes) for value in node.outputs}
    merged = _followers(nodes, lambda value: value == TOKEN_WEIGHTS)
    projector = _followers(nodes, lambda value: value.startswith(_PROJECTOR))
    if not merged or not projector:
        raise BundleError(
            f"model.onnx has {len(nodes)} operators and no merge by {TOKEN_WEIGHTS}, or no "
            "projector",
            expected="a graph that 'vzip export' made",
        )
    if min(projector) not in merged:  # pooled tokens are merged behind the projector
        projector -= merged
    tower = _leading(sorted(projector), nodes, maker, merged) - merged - projector
    found: dict[int, Part] = dict.fromkeys(projector, "projector")
    for segment in _segments(nodes, sorted(tower)):
        operators = {nodes[place].operator for place in segment}
        part: Part = "feed-forward" if _PRODUCT in operators else "embedding"
        if _SOFTMAX in operators:
            part = "attention"
        for place in segment:
            found[place] = "LayerNorm" if nodes[place].operator == _NORM else part
    return {node.name: found.get(place, SELECTION) for place, node in enumerate(nodes) if node.name}


def _followers(nodes: Sequence[Node], first: Callable[[str], bool]) -> set[int]:
    """Return the nodes that take a value of some name, or a value of such a node."""
    places: set[int] = set()
    values: set[str] = set()
    for place, node in enumerate(nodes):  # makers stand before takers
        if any(value in values or first(value) for value in node.inputs):
            places.add(place)
            values.update(node.outputs)
    return places


def _leading(
    ends: Iterable[int], nodes: Sequence[Node], maker: Mapping[str, int], merged: set[int]
) -> set[int]:
    """Return some nodes and all that lead to them, the choice of tokens left out.

    Nor does a cast before the merge count, which is in FP32 in every graph: it serves the merge.
    """
    found: set[int] = set()
    pending = list(ends)
    while pending:
        place = pending.pop()
        if place in found:
            continue
        found.add(place)
        for value in nodes[place].inputs:
            before = None if value == TOKEN_WEIGHTS else maker.get(value)
            if before is None:
                continue
            if place in merged and nodes[before].operator == "Cast" and before not in merged:
                before = maker.get(nodes[before].inputs[0])
            if before is not None:
                pending.append(before)
    return found


def _segments(nodes: Sequence[Node], places: Iterable[int]) -> list[list[int]]:
    """Return places in their order, cut before each LayerNorm."""
    segments: list[list[int]] = [[]]
    for place in places:
        if nodes[place].operator == _NORM:
            segments.append([])
        segments[-1].append(place)
    return segments
