"""``vzip models``: the models that have a name, and what is known of each.

What it prints comes from the families' own `published` configurations, without transformers and
PyTorch, so that it is quick.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vzip.export import families
from vzip.export.families import Config, Family, View
from vzip.runtime.cli.options import Parser
from vzip.runtime.console import emit, emit_json
from vzip.runtime.models import ALIASES, DEMO

_TOWERS: Final[Mapping[str, str]] = {"clip_vision_model": "CLIP", "siglip_vision_model": "SigLIP"}


@dataclass(frozen=True)
class ModelRow:
    """What is printed of one model.

    Attributes:
        alias: What stands behind ``--model``: the alias, or the hub id where there is none.
        place: The hub's repository, or where else it is.
        family: Name in `vzip.export.families`.
        tower: Its kind, patch size and image size, such as ``CLIP/14-336``.
        media: Media that a graph can be made for → the patches of one unit that the LLM gets
            without VisionZip, such as ``576 a tile``; the family's own choice comes first.
        budgets: Those of the paper, dominant + contextual; empty where it has none.
        status: A key of the legend.
    """

    alias: str
    place: str
    family: str
    tower: str
    media: Mapping[str, str]
    budgets: str
    status: str


def main(argv: Sequence[str], *, prog: str) -> int:
    """Run ``vzip models``: print the table."""
    parser = Parser(
        prog,
        "Print the models that 'vzip export --model' knows by name. A local folder or a hub id "
        "with a model of one of these families can be exported too.",
        table=True,
    )
    arguments = parser.read(argv)
    if arguments.json:
        emit_json([dataclasses.asdict(row) for row in rows()])
    else:
        emit(table())
    return 0


def rows() -> list[ModelRow]:
    """Return what is known of every alias, in their order, then of repositories without one."""
    named = [_demo() if alias == DEMO else _published(alias, ALIASES[alias]) for alias in ALIASES]
    others = [
        hub_id
        for family in families.families().values()
        for hub_id in family.published
        if hub_id not in ALIASES.values()
    ]
    return [*named, *(_published(hub_id, hub_id) for hub_id in others)]


def table() -> str:
    """Return the table with its legend, at most 100 columns wide if every model has an alias."""
    models = rows()
    head = ("model", "family", "tower", "tokens", "budgets of the paper", "status")
    cells = [head, *((m.alias, m.family, m.tower, _first(m), m.budgets, m.status) for m in models)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += ["", "where it is, and --media where images and video are seen in different ways:"]
    for model in models:
        lines.append(f"  {model.alias:<{widths[0]}}  {model.place}")
        if len(model.media) > 1:
            choices = " or ".join(f"{name} ({tokens})" for name, tokens in model.media.items())
            lines.append(f"  {'':<{widths[0]}}    --media {choices}")
    return "\n".join([*lines, "", *_LEGEND])


_LEGEND: Final = (
    "tokens: patches that the LLM gets without VisionZip; --tokens is a budget of the same unit.",
    "budgets: dominant + contextual, of the paper's experiments (arXiv 2412.04467); the LLM of",
    "LLaVA-NeXT gets them for the base tile and each other tile, that of Video-LLaVA for 8 frames.",
    "status random: graph checked against transformers with tiny and full-size random weights (of",
    "  7B and 13B twins one of the two at full size); published weights not tried here.",
    "weights: comes with them, and its answers are measured.",
)


def _published(alias: str, hub_id: str) -> ModelRow:
    name, family = next(
        (name, each) for name, each in families.families().items() if hub_id in each.published
    )
    known = family.published[hub_id]
    tower, media = _tower(known.config), _media(known.config, family)
    return ModelRow(alias, hub_id, name, tower, media, known.budgets, "random")


def _demo() -> ModelRow:
    from vzip.runtime import demo

    text = (demo.checkpoint() / "config.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    name, family = families.family_of(config)
    return ModelRow(
        DEMO, "comes with vzip", name, _tower(config), _media(config, family), "", "weights"
    )


def _tower(config: Config) -> str:
    vision = config["vision_config"]
    return f"{_TOWERS[vision['model_type']]}/{vision['patch_size']}-{vision['image_size']}"


def _media(config: Config, family: Family) -> dict[str, str]:
    vision = config["vision_config"]
    edge = vision["image_size"] // vision["patch_size"]
    return {name: _tokens(edge, view) for name, view in family.media.items()}


def _tokens(edge: int, view: View) -> str:
    pooled = -(-edge // view.pool)
    article = "an" if view.unit == "image" else "a"
    return f"{pooled * pooled} {article} {view.unit}"


def _first(row: ModelRow) -> str:
    return next(iter(row.media.values()))
