"""From an image to the first word, with and without VisionZip: ``python -m benchmarks.end_to_end``.

Tower, projector and LLM at their true sizes with random weights, LLaVA-1.5 (one image of 576
patches) and LLaVA-NeXT (five tiles, 2880), in the local LLMs that run on a CPU:
time to the first token, decode speed, the KV cache's bytes and the process's peak memory, beside
what the paper's cost model predicts. What can't run is an empty cell that says why.

    python -m benchmarks.end_to_end --work /dev/shm

Each runner has a process of its own; its budgets take turns. Writes
``benchmarks/results/end_to_end.json``, the same as tables in Markdown, and a plot. `--work` is
where an LLM is while it is measured, up to 14 GB; of a folder in memory that counts as memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import results
from benchmarks.harness.end_to_end_worker import CACHES, NEW_TOKENS, PATCHES, SPLITS, WEIGHTS
from benchmarks.harness.llm_shapes import LLMS, Llm
from vzip.export.pages import figures, markdown
from vzip.runtime.console import say
from vzip.runtime.errors import InvalidInputError, VzipError
from vzip.runtime.files import outputs
from vzip.runtime.machine.record import machine

ROOT = Path(__file__).parent.parent
TEXT = 60  # tokens: LLaVA-1.5's system prompt has 35, a question of a benchmark 10 to 30
SECONDS = 40.0
PACKAGES = ("llama_cpp_python", "tokenizers")

ENCODER = "PyTorch, SDPA, no dead layer, BF16"
SOURCE = "arXiv 2412.04467, LLaVA-NeXT-7B"
PAPER_MS = (218.0, 27.8)  # prefill with 2880 tokens and with 160
PAPER_LLM, PAPER_TOKENS = "llama-2-7b", (2880, 160)

Result = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A LLaVA, as far as its tokens go.

    Attributes:
        name: Its name.
        tiles: How many images the tower sees.
        budgets: Tokens of all tiles together, all of them first.
    """

    name: str
    tiles: int
    budgets: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.budgets[0] == self.tiles * PATCHES
        assert all(tokens / self.tiles in SPLITS for tokens in self.budgets[1:])


MODELS = (Model("LLaVA-1.5", 1, (576, 192, 128, 64)), Model("LLaVA-NeXT", 5, (2880, 640, 320, 160)))

SERVER = (
    "a server on an NVIDIA GPU in an environment of its own, which this command doesn't start; not "
    "run on hardware"
)
ABSENT = {
    **dict.fromkeys(("vllm", "sglang", "trtllm"), SERVER),
    "encoder as a TensorRT engine": (
        "this command measures on the CPU; benchmarks.gpu_evidence is for GPUs; not run on hardware"
    ),
}
"""Cell → why it is empty wherever this runs."""


class JobError(VzipError):
    """What a worker says went wrong."""


def work(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job in a process of its own; see `end_to_end_worker`.

    Raises:
        JobError: It failed, or was killed.
    """
    command = [sys.executable, "-m", "benchmarks.harness.end_to_end_worker", json.dumps(job)]
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=log, text=True, check=False, cwd=ROOT
        )
        log.seek(0)
        said = log.read().strip().splitlines()
    if done.returncode < 0:
        raise JobError(f"was killed by signal {-done.returncode}", cause="memory may be short")
    if done.returncode or not done.stdout.strip():
        raise JobError(f"ended with status {done.returncode} ({said[-1] if said else ''})")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    if "error" in answer:
        raise JobError(answer["error"])
    return dict(answer["ok"])


def measure(
    llms: Sequence[str],
    models: Sequence[Model],
    folder: Path,
    *,
    seconds: float = SECONDS,
    with_encoder: bool = True,
) -> Result:
    """Measure every LLM in every runner with every budget.

    Args:
        llms: Names in `LLMS`.
        models: What they see.
        folder: For what is made and deleted again.
        seconds: For the rounds of one runner; each has two at least.
        with_encoder: Whether the tower is timed. Without, there is no time to the first token.
    """
    result: Result = {
        "what": "time to the first token, decoding and memory of LLaVAs with fewer image tokens",
        "environment": machine(*PACKAGES),
        "text_tokens": TEXT,
        "new_tokens": NEW_TOKENS,
        "encoder": [],
        "rows": [],
        "empty": [{"cell": cell, "why": why} for cell, why in ABSENT.items()],
    }
    for llm in llms:
        encoded: dict[int, dict[str, Any]] = {}
        if with_encoder:
            for model in models:
                say(f"{llm}: tower and projector, {model.tiles} images")
                try:
                    encoded |= _encode(llm, model, seconds, result)
                except JobError as error:
                    result["empty"].append(
                        {"cell": f"{llm}, encoder of {model.name}", "why": str(error)}
                    )
        for runner in WEIGHTS:
            say(f"{llm}: {runner}")
            try:
                found = _speak(llm, runner, models, folder, seconds)
            except JobError as error:
                result["empty"].append({"cell": f"{llm} in {runner}", "why": str(error)})
                say(f"  {error}")
            else:
                result["rows"] += rows(LLMS[llm], runner, models, found, encoded)
    return result


def _encode(llm: str, model: Model, seconds: float, result: Result) -> dict[int, dict[str, Any]]:
    """Return budget → times of tower and projector, which are put into the result too."""
    job = {"do": "encode", "llm": llm, "tiles": model.tiles, "budgets": model.budgets}
    found = work({**job, "seconds": seconds / 4})
    times = {int(tokens): taken for tokens, taken in found["ms"].items()}
    result["encoder"] += [
        {
            "llm": llm,
            "model": model.name,
            "tokens": tokens,
            "stack": ENCODER,
            "encode": taken,
            "min_cosine": found["agreement"].get(str(tokens)),
        }
        for tokens, taken in times.items()
    ]
    return times


def _speak(
    llm: str, runner: str, models: Sequence[Model], folder: Path, seconds: float
) -> dict[str, Any]:
    """Make an LLM for a runner, measure it, and delete it."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="vzip-end-to-end-") as made:
        checkpoint, file = Path(made) / "checkpoint", Path(made) / "llm"
        job = {"llm": llm, "runner": runner, "checkpoint": str(checkpoint), "file": str(file)}
        budgets = [tokens for model in models for tokens in model.budgets]
        work({"do": "prepare", **job})
        return work({"do": "speak", **job, "budgets": budgets, "text": TEXT, "seconds": seconds})


def rows(
    llm: Llm,
    runner: str,
    models: Sequence[Model],
    found: Mapping[str, Any],
    encoded: Mapping[int, Mapping[str, Any]],
) -> list[Result]:
    """Return a row a budget, with its ratios to all tokens: measured, and the cost model's.

    Args:
        llm: The LLM.
        runner: What ran it.
        models: What it saw.
        found: What the worker's `speak` returned.
        encoded: Budget → times of tower and projector; empty where these were not measured.
    """
    shape = llm.shape(CACHES[runner])
    made = []
    for model in models:
        everything = model.budgets[0]
        for tokens in model.budgets:
            one, full = (found["budgets"][str(each)] for each in (tokens, everything))
            prefill, full_prefill = (each["first_token"]["median_ms"] for each in (one, full))
            row = {
                "llm": llm.name,
                "runner": runner,
                "weights": WEIGHTS[runner],
                "cache": CACHES[runner],
                "model": model.name,
                "tokens": tokens,
                "prompt_tokens": tokens + TEXT,
                "first_token": one["first_token"],
                "prefill_flops": shape.prefill_flops(tokens + TEXT),
                "prefill_ratio": round(full_prefill / prefill, 3),
                "predicted_ratio": round(
                    shape.prefill_flops(everything + TEXT) / shape.prefill_flops(tokens + TEXT), 3
                ),
                "ttft_ms": None,
                "ttft_ratio": None,
                "decode": one["decode"],
                "decode_tokens_per_s": round(1000 / one["decode"]["median_ms"], 2),
                "kv_bytes": one["kv_bytes"],
                "peak_bytes": one["peak_bytes"],
                "first_token_id": one["token"],
                "open_s": found["open_s"],
                "open_peak_bytes": found["open_peak_bytes"],
            }
            if {tokens, everything} <= set(encoded):
                taken = encoded[tokens]["median_ms"] + prefill
                row["ttft_ms"] = round(taken, 2)
                whole = encoded[everything]["median_ms"] + full_prefill
                row["ttft_ratio"] = round(whole / taken, 3)
            made.append(row)
    return made


def table(result: Result) -> str:
    """The result of `measure` as Markdown."""
    where = result["environment"]
    lines = [
        (
            f"Tower, projector and LLM of true shape, random weights; {result['text_tokens']} "
            "tokens of text around the image's. Medians on "
            f"{where['cores']} cores, {where['processor']}. Time to first token: encoder "
            f"({ENCODER}; with all tokens, its projector runs on every patch) and prefill. *Cost "
            "model*: T(4nd² + 2n²d + 2ndm) with all tokens, over that with these. Peak: of the "
            "LLM's process (VmHWM), its weights included."
        )
    ]
    for llm, runner, weights in dict.fromkeys(
        (row["llm"], row["runner"], row["weights"]) for row in result["rows"]
    ):
        lines += ["", f"**{llm} in {runner}, {weights}**", "", *_table(result, llm, runner)]
    lines += ["", f"{_same(result)}Empty cells:", "", *_empty(result)]
    lines += ["", "### The paper's 7.8×", "", *_paper(result)]
    return "\n".join(lines) + "\n"


def _same(result: Result) -> str:
    """Say in how many cells the runners, which have the same weights, say the same first token."""
    said: dict[tuple[str, int], list[int]] = {}
    for row in result["rows"]:
        said.setdefault((row["llm"], row["tokens"]), []).append(row["first_token_id"])
    several = [tokens for tokens in said.values() if len(tokens) > 1]
    if not several:
        return ""
    same = sum(len(set(tokens)) == 1 for tokens in several)
    return (
        f"The runners' first token is the same one in {same} of {len(several)} cases; they round "
        "differently, and to random weights many are nearly equal. "
    )


def _table(result: Result, llm: str, runner: str) -> list[str]:
    columns = (
        "", "image tokens", "encoder", "prefill", "time to first token", "faster",
        "prefill faster", "cost model", "off by", "tokens/s", "KV cache", "peak",
    )  # fmt: skip
    cells = []
    encoded = {
        (each["model"], each["tokens"]): each["encode"]["median_ms"]
        for each in result["encoder"]
        if each["llm"] == llm
    }
    for row in result["rows"]:
        if (row["llm"], row["runner"]) != (llm, runner):
            continue
        encode = encoded.get((row["model"], row["tokens"]))
        cells.append(
            (
                row["model"],
                str(row["tokens"]),
                _seconds(encode),
                _seconds(row["first_token"]["median_ms"]),
                _seconds(row["ttft_ms"]),
                "" if row["ttft_ratio"] is None else f"{row['ttft_ratio']:.2f}×",
                f"{row['prefill_ratio']:.2f}×",
                f"{row['predicted_ratio']:.2f}×",
                f"{row['prefill_ratio'] / row['predicted_ratio'] - 1:+.0%}",
                f"{row['decode_tokens_per_s']:.2f}",
                f"{row['kv_bytes'] / 1e6:.1f} MB",
                f"{row['peak_bytes'] / 1e9:.2f} GB",
            )
        )
    return markdown.table(columns, cells)


def plot(result: Result) -> bytes:
    """Return times to first token as bars, encoder and prefill, a panel for each LLM and runner.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    encoded = {
        (each["llm"], each["model"], each["tokens"]): each["encode"]["median_ms"] / 1000
        for each in result["encoder"]
    }
    panels: dict[tuple[str, str], list[Any]] = {}
    for row in result["rows"]:
        panels.setdefault((row["llm"], row["runner"]), []).append(row)
    heights = [max(2, len(rows)) for rows in panels.values()]
    size = (9, 0.26 * sum(heights) + 0.9 * len(panels) + 0.4)
    figure = figures.figure(size, needed_for="the plot of a benchmark")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, ((llm, runner), rows) in zip(axes, panels.items(), strict=True):
        rows = rows[::-1]  # noqa: PLW2901 - the first on top
        places = range(len(rows))
        encoder = [encoded.get((llm, row["model"], row["tokens"]), 0.0) for row in rows]
        prefill = [row["first_token"]["median_ms"] / 1000 for row in rows]
        panel.barh(places, encoder, color="#8c959f", label="encoder")
        panel.barh(places, prefill, left=encoder, color="#0969da", label="prefill")
        whole = [one + other for one, other in zip(encoder, prefill, strict=True)]
        for place, row in enumerate(rows):
            ratio = "" if row["ttft_ratio"] is None else f"  {row['ttft_ratio']:.1f}×"
            panel.annotate(f" {whole[place]:.2f} s{ratio}", (whole[place], place), va="center",
                           fontsize=7, xytext=(3, 0), textcoords="offset points")  # fmt: skip
        panel.set_yticks(places, [f"{row['model']}, {row['tokens']}" for row in rows])
        panel.set_title(f"{llm} in {runner}, {rows[0]['weights']}", fontsize=10, loc="left")
        panel.set_xlim(0, 1.18 * max(whole))
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("seconds to the first token", fontsize=8)
    axes[0].legend(fontsize=8, loc="lower right", frameon=False)
    return figures.drawn(figure, "svg")


def _seconds(milliseconds: float | None) -> str:
    """Return a cell; an empty one where nothing was measured."""
    return "" if milliseconds is None else f"{milliseconds / 1000:.2f} s"


def _empty(result: Result) -> Iterator[str]:
    """Yield a line for each reason."""
    cells: dict[str, list[str]] = {}
    for each in result["empty"]:
        cells.setdefault(each["why"], []).append(each["cell"])
    for why, names in cells.items():
        yield f"* {', '.join(names)}: {why}"


def _paper(result: Result) -> Iterator[str]:
    """Say what the paper's ratio of prefill times is made of, beside what was measured here."""
    many, few = PAPER_TOKENS
    text, shape = result["text_tokens"], LLMS[PAPER_LLM].shape("float16")
    works = [2 * shape.prefill_flops(tokens + text) for tokens in (many, few)]
    rates = [flops / ms / 1e9 for flops, ms in zip(works, PAPER_MS, strict=True)]
    ratio, predicted = PAPER_MS[0] / PAPER_MS[1], works[0] / works[1]
    yield (
        f"{SOURCE}: prefill {PAPER_MS[0]:g} → {PAPER_MS[1]:g} ms with {many} → {few} tokens, "
        f"{ratio:.1f}×. The cost model says {predicted:.1f}×, text taken to be {text} tokens. The "
        f"difference is the rate at which the GPU works: by the same model, a multiply-add as two, "
        f"{rates[0]:.0f} TFLOP/s with {many} tokens and {rates[1]:.0f} with {few}, {text} of text "
        f"included; {predicted:.1f} · {rates[1]:.0f} / {rates[0]:.0f} = {ratio:.1f}. Few "
        "tokens don't fill the GPU, or they wait for Python to start kernels; which was not "
        "tested. At the same rate for both it would take "
        f"{text_for(ratio)} tokens of text to make it {ratio:.1f}×."
    )
    for row in result["rows"]:
        if (row["llm"], row["tokens"]) == (PAPER_LLM, few):
            yield ""
            yield (
                f"Here, {row['runner']}: {row['prefill_ratio']:.1f}×, time to first token "
                + ("not measured." if row["ttft_ratio"] is None else f"{row['ttft_ratio']:.1f}×.")
            )


def text_for(ratio: float) -> int:
    """Return how many tokens of text make the paper's budgets differ by no more than a ratio."""
    many, few = PAPER_TOKENS
    shape = LLMS[PAPER_LLM].shape("float16")
    return next(
        text
        for text in range(4096)
        if shape.prefill_flops(many + text) <= ratio * shape.prefill_flops(few + text)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = results.parser(__doc__)
    published = [name for name in LLMS if name != "tiny"]
    parser.add_argument("--llm", action="append", choices=LLMS, help="default: all but tiny")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a runner's rounds")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    try:
        outputs.write_folder(options.output, {})  # an hour of measurements needs a place
    except InvalidInputError as error:
        parser.error(str(error))
    result = measure(
        options.llm or published, MODELS, options.work.resolve(), seconds=options.seconds
    )
    result = {"command": " ".join(["python -m benchmarks.end_to_end", *given]), **result}
    results.write(options.output, "end_to_end", result, table, svg=plot(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
