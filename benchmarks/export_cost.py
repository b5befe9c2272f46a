"""What an export and a build cost at full size: wall time and peak memory.

    python -m benchmarks.export_cost [--runs 3]

Each run is `vzip-export --model llava-1.5-7b --weights random --dtype fp16` in a process of its
own, parity check included, into a fresh folder; what it wrote is opened and its parity asserted.
Then TensorRT-RTX compiles it ahead of time, which takes no GPU: `vzip build BUNDLE --rtx sm86`; the
engine's record is asserted to be in the manifest. What a build on a GPU costs is
`benchmarks.gpu_evidence`'s to say. Writes benchmarks/results/export_cost.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import results
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.machine.record import machine

RESULT = results.RESULTS / "export_cost.json"
ARGUMENTS = ("--model", "llava-1.5-7b", "--weights", "random", "--dtype", "fp16")
BUILD = ("--rtx", "sm86")
AIM = {"wall_s": 60, "peak_gb": 3.0}
VZIP = "import sys; from vzip.runtime.cli.main import main; sys.exit(main(sys.argv[1:]))"
# The process says it itself as it ends: the kernel's own account begins with its parent's size.
_PEAK = """
import atexit, resource, sys
from vzip.runtime.machine.process import peak_bytes
def _say():
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(max(peak_bytes() // 1024, children), file=sys.stderr)
atexit.register(_say)
"""
CHECKED, PLAIN, BUILT = "with parity check", "without", "build"

Cost = dict[str, float]


def runs() -> dict[str, Cost]:
    """Export with and without the check, and build, each in a fresh process.

    Returns:
        For each: `wall_s`, `cpu_s` (cores added up) and `peak_gb` (largest resident set, 10⁹
        bytes); of an export `bundle_gb` too.
    """
    found = {}
    for kind, extra in ((CHECKED, ()), (PLAIN, ("--no-check",))):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "bundle"
            found[kind] = cost("export", *ARGUMENTS, *extra, "-o", str(output))
            manifest = read_bundle(output).manifest
            assert kind == PLAIN or (manifest.parity and manifest.parity["passed"])
            found[kind]["bundle_gb"] = _gigabytes(output)
            if kind == CHECKED:
                found[BUILT] = cost("build", str(output), *BUILD)
                assert read_bundle(output).manifest.engines
    return found


def cost(*arguments: str, code: str = VZIP) -> Cost:
    """Run a command of vzip, or other code, in a process of its own.

    Returns:
        ``wall_s``, ``cpu_s`` and ``peak_gb``, as `runs` has them.
    """
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-c", _PEAK + code, *arguments]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        *before, peak = said.read().splitlines()
    assert process.returncode == 0, f"{command} failed: {before[-1:]}"
    return {
        "wall_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_gb": int(peak) * 1024 / 1e9,
    }


def _gigabytes(bundle: Path) -> float:
    return sum(entry.bytes for entry in read_bundle(bundle).manifest.files.values()) / 1e9


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and store."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args(arguments)
    where = machine("onnx", "onnxscript", "tensorrt-rtx-cu13")
    taken: dict[str, list[Cost]] = {kind: [] for kind in (CHECKED, PLAIN, BUILT)}
    # In turn, so that a machine that drifts favours none.
    for _ in range(options.runs):
        for kind, each in runs().items():
            taken[kind].append(each)
            print(kind, {key: round(value, 2) for key, value in each.items()}, flush=True)
    median = {
        kind: {key: statistics.median(each[key] for each in costs) for key in costs[0]}
        for kind, costs in taken.items()
    }
    result = {
        "command": "vzip-export " + " ".join(ARGUMENTS),
        "build_command": "vzip build BUNDLE " + " ".join(BUILD),
        "environment": where,
        "aim": AIM,
        "median": median,
        "runs": taken,
    }
    RESULT.write_text(results.text(result))
    print(f"median {median}; written to {RESULT.name}")


if __name__ == "__main__":
    main()
