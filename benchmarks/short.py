"""The benchmarks in short, for continuous integration: ratios, compared with the committed ones.

    python -m benchmarks.short            # under two minutes; 1 if a ratio is worse than committed
    python -m benchmarks.short --write    # commit what this machine gives

A ratio is of two things timed in turn in one run, so it says the same on a slow and a fast machine;
times would not. What is compared with is what vzip stands on: Pillow, numpy, ONNX Runtime, PyTorch.
All runs on one core: how many there are, and what a neighbour leaves of a second, is no part of it.
A ratio that is worse is measured again, three times in all, because a busy neighbour passes and a
change for the worse stays. What improved is printed and never fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import export_cost, small_costs
from benchmarks.harness import results
from benchmarks.harness.bundles import CPU_ENGINE, CPU_ENGINE_STACKS, with_cpu_engine
from benchmarks.harness.photographs import jpeg, photograph
from vzip.export.bench.measure import Wanted, bench
from vzip.export.engines import build
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.machine.record import machine
from vzip.runtime.machine.timing import Timing, interleaved

RESULT = results.RESULTS / "short.json"
WHAT = "Ratios of what vzip takes to what it stands on; smaller is better"
ATTEMPTS = 3
SLACK = 2.0
"""How many times the committed ratio is still no change for the worse: it has to see a lost
optimisation, and to bear another CPU, where the sides of a ratio don't become slower alike."""
OURS, PEERS = "onnxruntime:fp32", ("torch-published:fp32", "torch-sdpa:fp32")
FASTEST = "engine of vzip build --cpu"

Ratios = dict[str, float]


@dataclass(frozen=True)
class Measure:
    """Ratios that are measured together.

    Attributes:
        names: Of the ratios.
        take: Measures them.
    """

    names: tuple[str, ...]
    take: Callable[[Bundle], Ratios]


def preprocessing(_bundle: Bundle) -> Ratios:
    """A JPEG of 12 megapixels to pixels beside Pillow's own decode and resize.

    That a resize uses all cores is for `tests/runtime/pictures/test_resize.py` to see.
    """
    times = small_costs.preprocessing(_picture(), seconds=6.0)
    plain = times["Pillow, one call each"]
    return {
        "JPEG to pixel values / Pillow": _ratio(times["exact"], plain),
        "JPEG to pixel values by a draft / Pillow": _ratio(times["draft"], plain),
    }


def imports(_bundle: Bundle) -> Ratios:
    """Imports in processor time: the wall clock of a new process depends on its neighbours."""
    taken: dict[str, list[float]] = {name: [] for name in small_costs.IMPORTS}
    for _ in range(7):
        for name, code in small_costs.IMPORTS.items():
            taken[name].append(export_cost.cost(code=code)["cpu_s"])
    least = {name: min(times) for name, times in taken.items()}
    return {
        "import VisionEncoder / numpy and Pillow": least["VisionEncoder"]
        / least["numpy and Pillow"],
        "vzip -h / python": least["vzip -h"] / least["python"],
    }


def opening(bundle: Bundle) -> Ratios:
    """Opening the demo model, all checks included, beside ONNX Runtime alone."""
    times = small_costs.opening(bundle, seconds=4.0)
    return {"VisionEncoder.open / ONNX Runtime alone": _ratio(
        times["VisionEncoder.open"], times["ONNX Runtime alone"]
    )}  # fmt: skip


def host(bundle: Bundle) -> Ratios:
    """What a call costs the host, beside ten calls of numpy on its tokens."""
    times = small_costs.host(bundle, seconds=0.5)
    tokens = small_costs.Nothing(bundle).outputs["image_embeds"]

    def numpys() -> None:
        for _ in range(10):
            np.isfinite(tokens)

    beside = interleaved({"numpy": numpys}, seconds=0.5)["numpy"]
    return {"run without a backend / numpy": _ratio(times["run, of the tower's pixels"], beside)}


def encoder(bundle: Bundle) -> Ratios:
    """The demo model's fused graph in ONNX Runtime beside PyTorch, all proven before."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(bundle.path, Path(folder) / "demo")
        build(copy, cpu=True, name=CPU_ENGINE)
        opened = {"demo": read_bundle(copy, verify=False)}
        (engine,) = with_cpu_engine(CPU_ENGINE_STACKS, opened["demo"])
        wanted = Wanted(only=(OURS, engine, *PEERS), rounds=5)
        result = bench(opened, wanted, command="", say=lambda _: None)
    found = {row["stack"]: row for row in result["rows"]}
    found[FASTEST] = found.pop(engine, None)
    missing = {name for name in (OURS, FASTEST, *PEERS) if found.get(name) is None}
    assert not missing, f"{missing} did not run: {result['empty']}"
    pairs = (*((OURS, peer) for peer in PEERS), (FASTEST, OURS))
    return {
        f"{one} / {other}": found[one]["min_ms"] / found[other]["min_ms"] for one, other in pairs
    }


def export(_bundle: Bundle) -> Ratios:
    """An export of the demo model and its build ahead of time, beside importing what they use."""
    imported = export_cost.cost(code="import torch, transformers, onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "bundle")
        exported = export_cost.cost("export", *small_costs.DEMO, "-o", output)
        built = export_cost.cost("build", output, *export_cost.BUILD)
    return {
        "vzip export / imports": exported["cpu_s"] / imported["cpu_s"],
        "vzip export / imports, memory": exported["peak_gb"] / imported["peak_gb"],
        "vzip build --rtx / imports": built["cpu_s"] / imported["cpu_s"],
        "vzip build --rtx / imports, memory": built["peak_gb"] / imported["peak_gb"],
    }


MEASURES = (
    Measure(
        ("JPEG to pixel values / Pillow", "JPEG to pixel values by a draft / Pillow"), preprocessing
    ),
    Measure(("import VisionEncoder / numpy and Pillow", "vzip -h / python"), imports),
    Measure(("VisionEncoder.open / ONNX Runtime alone",), opening),
    Measure(("run without a backend / numpy",), host),
    Measure((*(f"{OURS} / {peer}" for peer in PEERS), f"{FASTEST} / {OURS}"), encoder),
    Measure(
        (
            "vzip export / imports",
            "vzip export / imports, memory",
            "vzip build --rtx / imports",
            "vzip build --rtx / imports, memory",
        ),
        export,
    ),
)


def worse(committed: Mapping[str, float], found: Mapping[str, float]) -> list[str]:
    """Return a line for each ratio that is worse than committed by more than the slack."""
    return [
        f"{name}: {found[name]:.3f}, expected at most {committed[name] * SLACK:.3f}, which is "
        f"{SLACK} times the committed {committed[name]:.3f}; a change made it slower: find it, or "
        "commit the new ratio with python -m benchmarks.short --write and say why"
        for name in found
        if found[name] > committed[name] * SLACK
    ]


def judge(
    measure: Measure, committed: Mapping[str, float], bundle: Bundle
) -> tuple[Ratios, list[str]]:
    """Measure until nothing is worse, `ATTEMPTS` times at most.

    Returns:
        The smallest ratio of each that was found, and a line for each that is worse.
    """
    least: Ratios = {}
    for _ in range(ATTEMPTS):
        for name, ratio in measure.take(bundle).items():
            least[name] = min(ratio, least.get(name, ratio))
        lines = worse(committed, least)
        if not lines:
            break
    return least, lines


def _picture() -> bytes:
    return jpeg(photograph("textured"), 85)


def _ratio(ours: Timing, theirs: Timing) -> float:
    """Return a ratio of the fastest calls: those that nothing else on the machine delayed."""
    return ours.min_ms / theirs.min_ms


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if something became worse."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name} instead")
    options = parser.parse_args(arguments)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before threads are started
    committed: Mapping[str, Any] = {} if options.write else json.loads(RESULT.read_text())["ratios"]
    where, found, lines = machine(), Ratios(), []
    with small_costs.exported(*small_costs.DEMO) as path:
        bundle = read_bundle(path, verify=False)
        for measure in MEASURES:
            if options.write:
                ratios = measure.take(bundle)
            else:
                ratios, said = judge(measure, committed, bundle)
                lines += said
            for name, ratio in ratios.items():
                beside = "" if options.write else f" (committed {committed[name]:.3f})"
                print(f"{name}: {ratio:.3f}{beside}", flush=True)
            found |= ratios
    if options.write:
        ratios = {name: round(ratio, 4) for name, ratio in found.items()}
        command = "python -m benchmarks.short --write"
        text = {"what": WHAT, "command": command, "environment": where, "ratios": ratios}
        RESULT.write_text(results.text(text))
    for line in lines:
        print(f"worse: {line}", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
