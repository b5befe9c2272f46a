"""How much of the demo model's accuracy VisionZip keeps: ``python -m benchmarks.demo_accuracy``.

Held-out scenes from a seed that training never saw, with handwritten digits that it never saw.
Writes ``benchmarks/results/demo_accuracy.json`` and the same as a table in Markdown.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

from benchmarks.harness import results
from vzip.calibration.demo import accuracy, dialogue, scenes
from vzip.export.pages import markdown
from vzip.runtime import demo
from vzip.runtime.machine.record import machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Selection = Callable[[accuracy.Encoded], torch.Tensor]

SHARES = (33, 22, 11, 6)
"""Budgets in percent of the patches."""

DRAWS = 5
"""Draws of the random selection."""


def budget(share: int, patches: int) -> int:
    """Tokens of a budget of ``share`` percent."""
    return round(share / 100 * patches)


def selections(patches: int) -> Iterator[tuple[str, int, list[Selection]]]:
    """Every row of the table that compresses: its name, its tokens and its draws.

    Args:
        patches: Number of patches of the tower.
    """
    for share in SHARES:
        tokens = budget(share, patches)
        for merge in ("average", "sum"):
            for cls_token in (True, False):
                yield (
                    f"VisionZip, {merge}, {'with' if cls_token else 'without'} CLS",
                    tokens,
                    [
                        lambda encoded, k=tokens, m=merge, c=cls_token: accuracy.compressed(
                            encoded, k, m, cls_token=c
                        )
                    ],
                )
        for cls_token in (True, False):
            yield (
                f"dominant only, {'with' if cls_token else 'without'} CLS",
                tokens,
                [
                    lambda encoded, k=tokens, c=cls_token: accuracy.dominant_only(
                        encoded, k, cls_token=c
                    )
                ],
            )
        yield "uniform grid", tokens, [lambda encoded, k=tokens: accuracy.uniform_grid(encoded, k)]
        yield (
            "random",
            tokens,
            [
                lambda encoded, k=tokens, s=seed: accuracy.random_patches(encoded, k, s)
                for seed in range(DRAWS)
            ],
        )


def measure(folder: Path, seed: int, count: int) -> dict[str, Any]:
    """Measure every row.

    Args:
        folder: The checkpoint.
        seed: Of the test scenes.
        count: How many scenes.
    """
    started = time.monotonic()
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    side = model.config.vision_config.image_size
    patches = (side // model.config.vision_config.patch_size) ** 2
    test = accuracy.held_out(seed, count, side)
    large = accuracy.held_out(seed, count, side, painted=4 * side)
    encoded = accuracy.encode(model, test.pictures)

    def answer(features: torch.Tensor) -> dict[str, float]:
        packer = dialogue.Packer(tokenizer, model.config.image_token_id, features.shape[1])
        right = accuracy.right_answers(model, packer, features, test.questions)
        return accuracy.by_kind(test.questions, right)

    every = encoded.hidden[:, 1:]
    full = answer(every)
    rows = [_row("all tokens", patches, [full], full["all"])]
    wrong = answer(every.roll(1, dims=0))
    rows.append(_row("all tokens of another picture", patches, [wrong], full["all"]))
    scaled = answer(accuracy.encode(model, large.pictures).hidden[:, 1:])
    rows.append(_row(f"all tokens, painted at {4 * side} px", patches, [scaled], full["all"]))
    for name, tokens, draws in tqdm(list(selections(patches)), desc="selections"):
        rows.append(_row(name, tokens, [answer(draw(encoded)) for draw in draws], full["all"]))
    return {
        "seed": seed,
        "scenes": count,
        "questions": dict(Counter(question.kind for asked in test.questions for question in asked)),
        "patches": patches,
        "rows": rows,
        "seconds": round(time.monotonic() - started, 1),
        "environment": machine(),
    }


def table(result: dict[str, Any]) -> str:
    """The result of :func:`measure` as Markdown."""
    counts = result["questions"]
    total = sum(counts.values())
    heading = (
        f"Accuracy in percent on {total} questions about {result['scenes']} held-out scenes (seed "
        f"{result['seed']}); `kept` is relative to all tokens. Random: mean of {DRAWS} draws ± "
        "standard deviation. A budget of K tokens is split 27:5 into dominant and contextual."
    )
    rows = [("", "questions", total, "", *(counts[kind] for kind in scenes.KINDS))]
    for row in result["rows"]:
        spread = f" ± {100 * row['deviation']:.1f}" if row["draws"] > 1 else ""
        rows.append(
            (
                f"{row['tokens']} ({100 * row['tokens'] / result['patches']:.0f} %)",
                row["name"],
                f"{100 * row['accuracy']:.1f}{spread}",
                f"{100 * row['kept']:.1f}",
                *(f"{100 * row['kinds'][kind]:.1f}" for kind in scenes.KINDS),
            )
        )
    columns = ("tokens", "selection", "accuracy", "kept", *scenes.KINDS)
    return "\n".join([heading, "", *markdown.table(columns, rows)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = results.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, default=demo.checkpoint())
    parser.add_argument("--seed", type=int, default=90210, help="of the test scenes")
    parser.add_argument("--scenes", type=int, default=600)
    options = parser.parse_args(arguments)
    result = measure(options.checkpoint, options.seed, options.scenes)
    results.write(options.output, "demo_accuracy", result, table)
    return 0


def _row(name: str, tokens: int, draws: list[dict[str, float]], full: float) -> dict[str, Any]:
    mean = float(np.mean([draw["all"] for draw in draws]))
    return {
        "name": name,
        "tokens": tokens,
        "draws": len(draws),
        "accuracy": round(mean, 4),
        "deviation": round(float(np.std([draw["all"] for draw in draws])), 4),
        "kept": round(mean / full, 4),
        "kinds": {
            kind: round(float(np.mean([draw[kind] for draw in draws])), 4) for kind in scenes.KINDS
        },
    }


if __name__ == "__main__":
    raise SystemExit(main())
