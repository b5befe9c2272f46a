"""What `vzip plan` predicts, beside what was measured: ``python -m benchmarks.plan``.

Takes the results of `benchmarks.encoder` and `benchmarks.end_to_end` in ``benchmarks/results``, as
far as they are there, and two published measurements. The encoder is predicted from the ceilings in
its own result, the LLMs from what `vzip plan --target here` measures when this runs: so run it
right after them, on the same machine. Writes ``plan.json`` and the same as a table in ``plan.md``.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import results
from benchmarks.harness.llm_shapes import LLMS
from vzip.export.bench.peers import UNCOMPRESSED
from vzip.export.hardware import HERE, Device, find_device
from vzip.export.pages import markdown
from vzip.export.plan.here import measure
from vzip.export.plan.model import PlanModel, read_model
from vzip.export.plan.predict import Estimator, short
from vzip.runtime.machine.record import machine

TEXT = 60  # tokens beside the image's where a source doesn't say

MODELS = {"LLaVA-1.5": "llava-1.5-7b", "LLaVA-NeXT": "llava-next-vicuna-7b"}
"""`benchmarks.end_to_end`'s name of a model → ours."""

RUNNERS = ("transformers", "llama.cpp")  # with weights of 16 bits there; ONNX Runtime's have 32
PRECISIONS = ("fp32", "bf16")

PAPER = "arXiv 2412.04467, LLaVA-NeXT-7B; its GPU taken to be an A800, which multiplies as an A100"
NVIDIA = "NVIDIA's blog on the Orin Nano Super: Qwen2.5-7B in 4 bits with MLC"
NOT_RUN = "not run on hardware: no machine with an NVIDIA GPU was at hand"

Row = dict[str, Any]


def row(what: str, source: str, predicted: float, measured: float, unit: str) -> Row:
    """Return one comparison; ``off`` is by what share the prediction is above the measurement."""
    return {
        "what": what,
        "source": source,
        "predicted": round(predicted, 3),
        "measured": round(measured, 3),
        "unit": unit,
        "off": round(predicted / measured - 1, 4),
    }


def published() -> Iterator[Row]:
    """Yield what others measured and a plan predicts; nothing is run."""
    paper = Estimator(read_model(MODELS["LLaVA-NeXT"]), find_device("a100"), "fp16", TEXT)
    full, few = (paper.predict(tokens).prefill_ms for tokens in (576, 32))
    yield row("prefill, 2880 tokens (the plan's share is from this)", PAPER, full, 218, "ms")
    yield row("prefill, 160 tokens", PAPER, few, 27.8, "ms")
    # LLaVA-OneVision-7B's LLM is a Qwen2-7B, whose sizes Qwen2.5-7B has.
    qwen = Estimator(read_model("llava-onevision-7b"), find_device("orin-nano"), "int4", 0)
    yield row("answer, no image", NVIDIA, 1000 / qwen.weights_ms, 21.75, "tokens/s")


def encoders(result: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the encoder of `benchmarks.encoder`, batch 1: the fastest stack of each precision.

    Args:
        result: Its result, of schema 1; it holds the ceilings of the same turns.
    """
    fastest: dict[tuple[str, str], Mapping[str, Any]] = {}
    for each in result["rows"]:
        if each["kind"] in {"ours", "peer"} and each["name"] != UNCOMPRESSED and each["batch"] == 1:
            key = (each["bundle"], each["precision"])
            if key not in fastest or each["median_ms"] < fastest[key]["median_ms"]:
                fastest[key] = each
    for (bundle, precision), each in fastest.items():
        if precision not in PRECISIONS:
            continue
        same = {"kind": "ceiling", "bundle": bundle, "batch": 1, "group": each["group"]}
        ceiling = next(
            other
            for other in result["rows"]
            if other["precision"] == precision and same.items() <= other.items()
        )
        speed = ceiling["flops"] / ceiling["median_ms"] / 1e9  # 10¹² a second
        cpu = Device(HERE, "", 0, dict.fromkeys(PRECISIONS, speed), math.inf)
        yield row(
            f"encoder, {each['tokens']} tokens, {each['stack']}",
            "benchmarks/results/encoder.json",
            Estimator(read_model(MODELS["LLaVA-1.5"]), cpu, "fp16", TEXT).encoder_ms(
                each["tokens"], precision
            ),
            each["median_ms"],
            "ms",
        )


def conversations(result: Mapping[str, Any], here: Device) -> Iterator[Row]:
    """Yield prefill and answer of `benchmarks.end_to_end`, in runners whose weights have 16 bits.

    Args:
        result: Its result.
        here: This machine, measured.
    """
    for each in result["rows"]:
        if each["runner"] not in RUNNERS:
            continue
        plan = Estimator(spoken(each["model"], each["llm"]), here, "fp16", result["text_tokens"])
        found = plan.predict(each["tokens"] // plan.model.units)
        named = f"{each['llm']} in {each['runner']}, {each['tokens']} tokens"
        source, rate = "benchmarks/results/end_to_end.json", each["decode_tokens_per_s"]
        measured = each["first_token"]["median_ms"]
        yield row(f"prefill, {named}", source, found.prefill_ms, measured, "ms")
        yield row(f"answer, {named}", source, found.tokens_per_second, rate, "tokens/s")


def spoken(model: str, llm: str) -> PlanModel:
    """Return a model of `benchmarks.end_to_end` with one of its LLMs."""
    size = LLMS[llm]
    return replace(
        read_model(MODELS[model]),
        llm=size.shape("bfloat16"),
        heads=size.heads,
        vocabulary=size.vocabulary,
        tied=False,
    )


def compared(folder: Path, here: Device) -> dict[str, Any]:
    """Return every comparison that there is something for.

    Args:
        folder: Where results are.
        here: This machine, measured.
    """
    rows = list(published())
    empty = [{"cell": "encoder, prefill and answer on a GPU, measured by us", "why": NOT_RUN}]
    for name, take in (
        ("encoder", encoders),
        ("end_to_end", lambda result: conversations(result, here)),
    ):
        path = folder / f"{name}.json"
        if path.exists():
            rows += take(json.loads(path.read_text(encoding="utf-8")))
        else:
            empty.append({"cell": name, "why": f"{path.name} is not there"})
    speeds = {name: round(value, 4) for name, value in here.tflops.items()}
    return {
        "what": "what vzip plan predicts, beside what was measured",
        "here": {"tflops": speeds, "bandwidth_gb": round(here.bandwidth_gb, 2)},
        "rows": rows,
        "empty": empty,
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the result of `compared` as Markdown."""
    speeds = ", ".join(f"{name} {value:g}" for name, value in result["here"]["tflops"].items())
    lines = [
        f"This machine: {speeds} TFLOPS, {result['here']['bandwidth_gb']:g} GB/s, measured.",
        "",
    ]
    rows = [
        (
            each["what"],
            *(f"{short(each[name])} {each['unit']}" for name in ("predicted", "measured")),
            f"{each['off']:+.0%}",
            each["source"],
        )
        for each in result["rows"]
    ]
    lines += markdown.table(("", "predicted", "measured", "off by", "source"), rows)
    empty = "; ".join(f"{each['cell']}: {each['why']}" for each in result["empty"])
    return "\n".join([*lines, "", f"Empty cells: {empty}."]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    folder = results.parser(__doc__).parse_args(given).output
    about = {"command": " ".join(["python -m benchmarks.plan", *given]), "environment": machine()}
    result = {**about, **compared(folder, measure(read_model(MODELS["LLaVA-1.5"])))}
    results.write(folder, "plan", result, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
