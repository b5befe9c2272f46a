"""What positions and selections give the demo model: ``python -m benchmarks.demo_positions``.

Bundles of the demo model, as they were exported, on held-out scenes; each answered by an LLM as
``vzip ask`` runs it, with the tokens' original positions and with consecutive ones. Beside them all
tokens, uncompressed. Accuracies have one standard error by scene, and differences to all tokens are
paired by scene.

    vzip export --model demo --tokens 22 --no-cls -o demo-22
    python -m benchmarks.demo_positions --bundle demo-22 --llm packed onnxruntime:demo-22-llm
    python -m benchmarks.demo_positions --make bundles --rows coverage scope

``--make`` exports the bundles of `ROWS` into a folder, unless they are there.

``--llm packed`` is transformers with all questions about a picture in one pass, which is what
greedy decoding answers and much faster; others are what ``vzip ask --llm`` takes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import numpy as np
import torch
import transformers
from tqdm import tqdm

from benchmarks.harness import results
from vzip.calibration.demo import accuracy, dialogue
from vzip.export import export
from vzip.export.pages import markdown
from vzip.runtime import demo
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.encoder import VisionEncoder
from vzip.runtime.llm.opening import open_llm
from vzip.runtime.machine.record import machine
from vzip.runtime.tokens.positions import EncodedImage, Positions, by_place

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

PACKED: Final = "packed"
SEEDS: Final = (31337, 777001)
TOKENS: Final = (43, 22, 12)
ROWS: Final[dict[str, dict[str, Any]]] = {
    "visionzip": {},
    "coverage": {"place": 0.25, "radius": 1.5, "alpha": 0.5, "features": "keys"},
    "coverage-uncalibrated": {"alpha": 0.5, "features": "keys"},
    "coverage-tower": {"place": 0.25, "radius": 1.5, "alpha": 0.5, "features": "tower"},
    "scope": {},
    "divprune": {},
    "uniform": {},
}
"""Name of a row → options of the selection, whose name it begins with; all are without CLS."""
SCENES: Final = 200
NEW_TOKENS: Final = 16


@dataclasses.dataclass(frozen=True)
class Result:
    """Answers to the questions of one test set.

    Attributes:
        right: Of each scene, how many of its questions were answered right.
        asked: Of each scene, how many there are.
    """

    right: npt.NDArray[np.int64]
    asked: npt.NDArray[np.int64]

    @classmethod
    def of(cls, answers: Sequence[Sequence[bool]]) -> Result:
        """Count right answers."""
        return cls(np.array([sum(each) for each in answers]), np.array([len(e) for e in answers]))

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.sum() / self.asked.sum())

    @property
    def error(self) -> float:
        """One standard error of `accuracy`, by scene."""
        return _error(self.right, self.asked)

    def beside(self, other: Result) -> tuple[float, float]:
        """Return the difference to another's accuracy on the same scenes, and its paired error."""
        return self.accuracy - other.accuracy, _error(self.right - other.right, self.asked)


def _error(values: npt.NDArray[np.int64], asked: npt.NDArray[np.int64]) -> float:
    """Return one standard error of a ratio of sums over scenes."""
    rest = values - values.sum() / asked.sum() * asked
    scenes = len(asked)
    return math.sqrt(scenes / (scenes - 1) * float((rest**2).sum())) / float(asked.sum())


class Test:
    """Held-out scenes, and the demo model that answers questions about them.

    Args:
        seeds: Of the scenes.
        count: How many scenes of each seed.
        checkpoint: The demo model.
    """

    __test__ = False

    def __init__(
        self, seeds: Sequence[int] = SEEDS, count: int = SCENES, checkpoint: Path | None = None
    ) -> None:
        folder = checkpoint or demo.checkpoint()
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        parts = [accuracy.held_out(seed, count) for seed in seeds]
        self.pictures = np.concatenate([part.pictures for part in parts])
        self.questions = [asked for part in parts for asked in part.questions]

    @torch.no_grad()
    def all_tokens(self) -> Result:
        """Return what is answered with all tokens."""
        features = accuracy.encode(self.model, self.pictures).hidden[:, 1:]
        packer = self._packer(features.shape[1])
        right = accuracy.right_answers(self.model, packer, features, self.questions)
        return Result.of(right)

    def encoded(self, bundle: Path) -> list[EncodedImage]:
        """Return a bundle's tokens of all pictures."""
        with VisionEncoder.open(bundle) as encoder:
            return [encoder.image_tokens(picture) for picture in self.pictures]

    def answers(
        self, bundle: Path, encoded: Sequence[EncodedImage], llm: str, positions: Positions
    ) -> Result:
        """Return what an LLM answers about a bundle's tokens.

        Args:
            bundle: The bundle.
            encoded: Its tokens of all pictures.
            llm: ``packed``, or what ``vzip ask --llm`` takes.
            positions: Which positions the tokens have.
        """
        if llm == PACKED:
            return self._packed(encoded, positions)
        opened = open_llm(read_bundle(bundle, verify=False), llm)
        right = []
        for tokens, asked in zip(tqdm(encoded, desc=llm), self.questions, strict=True):
            found = []
            for question in asked:
                conversation = opened.conversation(tokens, positions=positions)
                answer = conversation.ask(question.text, max_new_tokens=NEW_TOKENS)
                if conversation.positions != positions:
                    raise SystemExit(f"{llm}: the positions became {conversation.positions}")
                found.append(answer == question.answer)
            right.append(found)
        return Result.of(right)

    @torch.no_grad()
    def _packed(self, encoded: Sequence[EncodedImage], positions: Positions) -> Result:
        embeds = np.stack([each.embeds for each in encoded])
        placed = None
        if positions == "original":
            where = [each.where for each in encoded]
            orders = np.stack([by_place(each) for each in where])  # [B, K]
            rows = np.arange(len(orders))[:, None]
            embeds = embeds[rows, orders]
            places = np.stack([np.array(each.places) for each in where])[rows, orders]
            placed = places, where[0].span or 0
        packer = self._packer(embeds.shape[1])
        tokens = torch.from_numpy(embeds)
        right = accuracy.right_with(self.model, packer, tokens, self.questions, placed)
        return Result.of(right)

    def _packer(self, tokens: int) -> dialogue.Packer:
        return dialogue.Packer(self.tokenizer, self.model.config.image_token_id, tokens)


def measure(
    test: Test, bundles: Sequence[Path], llms: Sequence[str], positions: Sequence[Positions]
) -> list[dict[str, Any]]:
    """Return a row for all tokens, and one for each bundle, LLM and kind of positions."""
    full = test.all_tokens()
    rows: list[dict[str, Any]] = [
        {"selection": "all tokens", "tokens": None, "llm": PACKED, "positions": None}
        | _compared(full, full)
    ]
    for bundle in bundles:
        selection = read_bundle(bundle, verify=False).manifest.selection
        encoded = test.encoded(bundle)
        options = ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                            for key, value in selection.options.items())  # fmt: skip
        name = ", ".join(
            filter(
                None,
                [
                    selection.method,
                    options,
                    f"{'with' if selection.cls_token else 'without'} CLS",
                ],
            )
        )
        for llm in llms:
            for each in positions:
                what = {
                    "selection": name,
                    "tokens": selection.tokens,
                    "llm": llm.partition(":")[0],
                    "positions": each,
                }
                rows.append(what | _compared(test.answers(bundle, encoded, llm, each), full))
    return rows


def make(folder: Path, rows: Sequence[str], tokens: Sequence[int]) -> list[Path]:
    """Return the bundles of some rows of `ROWS`, and export those that aren't there."""
    found = []
    for row in rows:
        for count in tokens:
            path = folder / f"{row}-{count}"
            found.append(path)
            if not path.exists():
                export(
                    "demo",
                    path,
                    tokens=count,
                    cls_token=False,
                    selection=row.partition("-")[0],
                    selection_options=ROWS[row],
                )
    return found


def _compared(found: Result, full: Result) -> dict[str, float]:
    """Return the numbers of a row."""
    difference, error = found.beside(full)
    return {
        "accuracy": round(found.accuracy, 4),
        "error": round(found.error, 4),
        "kept": round(found.accuracy / full.accuracy, 4),
        "difference": round(difference, 4),
        "paired_error": round(error, 4),
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    heading = (
        f"Accuracy on {result['questions']} questions about {result['scenes']} held-out scenes "
        f"(seeds {', '.join(map(str, result['seeds']))}), ± one standard error by scene; kept is "
        "relative to all tokens, and the difference to them is paired by scene."
    )
    columns = ("selection", "tokens", "LLM", "positions", "accuracy", "kept", "difference")
    rows = [
        (
            row["selection"],
            row["tokens"] or "all",
            row["llm"],
            row["positions"] or "",
            f"{row['accuracy']:.4f} ± {row['error']:.4f}",
            f"{100 * row['kept']:.1f} %",
            f"{row['difference']:+.4f} ± {row['paired_error']:.4f}",
        )
        for row in result["rows"]
    ]
    return "\n".join([heading, "", *markdown.table(columns, rows)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = results.parser(__doc__)
    parser.add_argument("--bundle", type=Path, nargs="+", default=[])
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="export the bundles of --rows")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of --make")
    parser.add_argument("--llm", nargs="+", default=[PACKED])
    parser.add_argument(
        "--positions", nargs="+", choices=get_args(Positions), default=get_args(Positions)
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--scenes", type=int, default=SCENES, help="of each seed")
    parser.add_argument("--name", default="demo_positions", help="of the files that are written")
    options = parser.parse_args(arguments)
    logging.getLogger("vzip").setLevel(logging.ERROR)
    bundles = list(options.bundle)
    if options.make is not None:
        bundles += make(options.make, options.rows, options.tokens)
    if not bundles:
        parser.error("give --bundle, or --make for bundles to be exported")
    test = Test(options.seeds, options.scenes)
    result = {
        "seeds": list(options.seeds),
        "scenes": len(test.questions),
        "questions": sum(map(len, test.questions)),
        "rows": measure(test, bundles, options.llm, options.positions),
        "environment": machine(),
    }
    results.write(options.output, options.name, result, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
