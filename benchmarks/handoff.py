"""Compressed tokens in every local LLM: ``python -m benchmarks.handoff``.

The demo model's tower and VisionZip make the tokens of held-out scenes, once; transformers,
llama.cpp and ONNX Runtime answer the same questions about them. Counts the answers that equal
transformers', and those that are right; and times the first token of a first question beside that
of a second one about the same picture. The LLMs take turns, so that a drifting machine favours
none. Writes ``benchmarks/results/handoff.json`` and the same as a table in Markdown.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import results
from vzip.calibration.demo import accuracy
from vzip.export.pages import markdown
from vzip.runtime import VisionEncoder
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.cli.main import main as vzip
from vzip.runtime.llm.opening import parse
from vzip.runtime.machine.record import machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vzip.runtime.llm.shown import Embeds

TOKENS = 43
REFERENCE = "transformers"
PACKAGES = {
    REFERENCE: ("transformers", "torch"),
    "llama.cpp": ("llama_cpp_python",),
    "onnxruntime": ("onnxruntime", "tokenizers"),
}


def prepare(folder: Path) -> tuple[Path, dict[str, str]]:
    """Export the demo model with its LLM, and convert that for llama.cpp.

    Returns:
        The bundle, and what ``--llm`` says for each local LLM.
    """
    bundle, gguf = folder / "bundle", folder / "demo.gguf"
    arguments = ["--model", "demo", "--tokens", str(TOKENS), "--with-llm", "-o", str(bundle)]
    assert vzip(["export", *arguments]) == 0
    assert vzip(["convert", "--model", "demo", "--to", "gguf", "-o", str(gguf)]) == 0
    return bundle, {
        REFERENCE: f"{REFERENCE}:demo",
        "llama.cpp": f"llama.cpp:{gguf}",
        "onnxruntime": f"onnxruntime:{bundle}",
    }


def first_token_ms(conversation: Any, question: str) -> tuple[float, str]:
    """Ask, and time the first piece of the answer.

    Returns:
        Milliseconds from the question to the first piece, and the whole answer.
    """
    start = time.perf_counter()
    pieces = conversation.stream(question)
    first = next(pieces, "")
    taken = (time.perf_counter() - start) * 1000
    return taken, (first + "".join(pieces)).strip()


def measure(seed: int, count: int) -> dict[str, Any]:
    """Ask every local LLM every question, and as a second turn the next question of the scene."""
    where = machine()
    held_out = accuracy.held_out(seed, count, painted=224)
    with tempfile.TemporaryDirectory() as folder:
        path, names = prepare(Path(folder))
        bundle = read_bundle(path)
        with VisionEncoder.open(bundle) as encoder:
            embeds: list[Embeds] = []
            encode_ms: list[float] = []
            for picture in held_out.pictures:
                start = time.perf_counter()
                embeds.append(encoder.image_embeds(picture))
                encode_ms.append((time.perf_counter() - start) * 1000)
        llms = {name: parse(text).open(bundle) for name, text in names.items()}
        answers: dict[str, list[str]] = {name: [] for name in llms}
        second_answers: dict[str, list[str]] = {name: [] for name in llms}
        first_ms: dict[str, list[float]] = {name: [] for name in llms}
        second_ms: dict[str, list[float]] = {name: [] for name in llms}
        right = []
        for tokens, questions in zip(embeds, held_out.questions, strict=True):
            for number, question in enumerate(questions):
                right.append(question.answer)
                following = questions[(number + 1) % len(questions)].text
                for name, llm in llms.items():
                    conversation = llm.conversation(tokens)
                    taken, answer = first_token_ms(conversation, question.text)
                    first_ms[name].append(taken)
                    answers[name].append(answer)
                    taken, answer = first_token_ms(conversation, following)
                    second_ms[name].append(taken)
                    second_answers[name].append(answer)
    rows = []
    for name in llms:
        same = sum(a == b for a, b in zip(answers[name], answers[REFERENCE], strict=True))
        later = sum(
            a == b for a, b in zip(second_answers[name], second_answers[REFERENCE], strict=True)
        )
        rows.append(
            {
                "runner": name,
                "versions": {p: importlib.metadata.version(p) for p in PACKAGES[name]},
                "same_as_transformers": same,
                "second_turn_same": later,
                "right": sum(a == b for a, b in zip(answers[name], right, strict=True)),
                "first_token_ms": spread(first_ms[name]),
                "second_turn_first_token_ms": spread(second_ms[name]),
            }
        )
    return {
        "seed": seed,
        "scenes": count,
        "questions": len(right),
        "tokens": TOKENS,
        "encode_ms": spread(encode_ms),
        "rows": rows,
        "environment": where,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and 90th percentile."""
    return {
        "median": round(statistics.median(values), 2),
        "p90": round(statistics.quantiles(values, n=10)[-1], 2),
    }


def table(result: dict[str, Any]) -> str:
    """The result of `measure` as Markdown."""
    total = result["questions"]
    encode = result["encode_ms"]["median"]
    lines = [
        (
            f"{total} held-out questions about {result['scenes']} scenes (seed {result['seed']}), "
            f"the demo model, {result['tokens']} of 196 tokens, greedy; then another question "
            f"about the same picture. Medians on {result['environment']['cores']} cores, "
            f"{result['environment']['processor']}; encoding takes {encode:.1f} ms, once a picture."
        ),
        "",
    ]
    columns = (
        "local LLM", "answers as transformers'", "second turn's", "right",
        "first token, first turn (encoded already)", "with encoding", "first token, second turn",
    )  # fmt: skip
    rows = [
        (
            row["runner"],
            f"{row['same_as_transformers']} of {total}",
            f"{row['second_turn_same']} of {total}",
            f"{row['right'] / total:.1%}",
            f"{row['first_token_ms']['median']:.1f} ms",
            f"{row['first_token_ms']['median'] + encode:.1f} ms",
            f"{row['second_turn_first_token_ms']['median']:.1f} ms",
        )
        for row in result["rows"]
    ]
    return "\n".join([*lines, *markdown.table(columns, rows)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = results.parser(__doc__)
    parser.add_argument("--seed", type=int, default=4711, help="of the test scenes")
    parser.add_argument("--scenes", type=int, default=40)
    options = parser.parse_args(arguments)
    result = measure(options.seed, options.scenes)
    results.write(options.output, "handoff", result, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
