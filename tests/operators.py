"""The operators of every family's graph, beside what TensorRT's ONNX parser makes of each.

    python -m tests.operators      writes docs/operators.md anew

`tests/export/graph/test_operators.py` compares the document with the graphs and holds the rule.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

import torch

from tests.export.layouts import FAMILIES, write_layout
from tests.places import DOCS, GOLDEN
from vzip.export.algorithm.budget import Budget, Merge
from vzip.export.architecture import Media, VisionConfig
from vzip.export.checkpoint.random_weights import random_vision
from vzip.export.graph.trace import GraphOptions, trace
from vzip.export.graph.traced import Encoder
from vzip.export.pipeline import WeightSource

DOCUMENT: Final = DOCS / "operators.md"
TILES: Final = "tiles in newline order"
CASES: Final[tuple[tuple[str, str], ...]] = (
    *((family, "image") for family in FAMILIES),
    ("llava-next", TILES),
    ("llava-onevision", TILES),
    ("video-llava", "video"),
    ("llava-onevision", "video"),  # whose frames are pooled
)
"""Tiny models of every family, and what their graphs are made for."""

Opset = Literal[17, 18]
OPSETS: Final[tuple[Opset, ...]] = (17, 18)
Importers = Mapping[str, Mapping[str, list[str]]]

_HEAD: Final = """# Operators of the graphs

`python -m tests.operators` writes this page: it traces a tiny model of every family at both opsets
and counts each operator's nodes, with CLS where the tower has one. Beside them stands what
[onnx-tensorrt](https://github.com/onnx/onnx-tensorrt)'s own source of that release makes of the
operator (`tests/golden/make_importers.py`): "layers", or "loop" where its function adds a loop, a
branch or a layer with a data-dependent shape, of none of which a CUDA graph can be captured. No
graph was compiled for this page.

A test holds that no operator that vzip writes is such a one, and `vzip export` refuses every
graph with an operator outside this list.
"""


def importers() -> Importers:
    """Return version → "plain" and "loop" → operators, of TensorRT's ONNX parser."""
    text = (GOLDEN / "importers.json").read_text(encoding="utf-8")
    found: Importers = json.loads(text)
    return found


def configuration(family: str, made_for: str) -> VisionConfig:
    """Return the numbers of a tiny model, read from files as those of a real one are."""
    media: Media = "video" if made_for == "video" else "image"
    with tempfile.TemporaryDirectory() as folder:
        write_layout("llava-hf-single", Path(folder), family=family)
        config = WeightSource(folder, media=media).config()
    return config.with_tile_order("newline") if made_for == TILES else config


def operators(
    config: VisionConfig, opset: Opset, *, cls_token: bool, merge: Merge = "average"
) -> dict[str, int]:
    """Return operator → nodes of the finished graph of a model with random weights."""
    encoder = Encoder(
        config,
        random_vision(config, 0).tensors,
        budget=Budget(7, 3, cls_token, merge=merge),
        graph_input="image",
        dtype=torch.float32,
    )
    options = GraphOptions(batch=3, dynamic_batch=True, opset=opset)
    graph = trace(encoder, options, image_size=config.tower.image_size).graph
    found: dict[str, int] = {}
    for node in graph:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def document() -> str:
    """Return the text of docs/operators.md."""
    known = importers()
    columns: dict[str, dict[Opset, dict[str, int]]] = {}
    for family, made_for in CASES:
        config = configuration(family, made_for)
        columns[f"{family}, {made_for}"] = {
            opset: operators(config, opset, cls_token=config.tower.cls_token) for opset in OPSETS
        }
    return "\n".join([_HEAD, *_table(columns, known)]) + "\n"


def _table(
    columns: Mapping[str, Mapping[Opset, Mapping[str, int]]], known: Importers
) -> Iterator[str]:
    versions = [f"TensorRT {version}" for version in known]
    yield f"| operator | {' | '.join(versions)} | {' | '.join(columns)} |"
    yield "|---" * (1 + len(known) + len(columns)) + "|"
    names = sorted({name for each in columns.values() for found in each.values() for name in found})
    for name in names:
        made = ["layers" if name in each["plain"] else "loop" for each in known.values()]
        counts = [
            _both(*(found.get(name, 0) for found in each.values())) for each in columns.values()
        ]
        yield f"| {name} | {' | '.join(made)} | {' | '.join(counts)} |"


def _both(older: int, newer: int) -> str:
    """Return the nodes at opset 17 and 18, once where they are as many."""
    return str(older) if older == newer else f"{older} / {newer}"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
