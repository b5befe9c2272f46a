"""What an export at full size costs: wall time and peak memory.

    python -m benchmarks.export_cost [--runs 3]

Each run is `vzip-export --model llava-1.5-7b --weights random --precision fp16` in a process of its
own, parity check included, into a fresh folder; what it wrote is opened and its parity asserted.
Writes benchmarks/results/export_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.environment import environment
from vzip.runtime.bundle import read_bundle

RESULT = Path(__file__).parent / "results" / "export_cost.json"
ARGUMENTS = ("--model", "llava-1.5-7b", "--weights", "random", "--precision", "fp16")
AIM = {"wall_s": 60, "peak_gb": 3.0}


def run(*extra: str) -> dict[str, float]:
    """Export once in a fresh process.

    Returns:
        `wall_s`, `cpu_s` (both cores added up), `peak_gb` (largest resident set, 10⁹ bytes) and
        `bundle_gb`.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bundle"
        code = "import sys; from vzip.export.cli import vzip_export; sys.exit(vzip_export())"
        command = [sys.executable, "-c", code, *ARGUMENTS, *extra, "-o", str(output)]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        assert os.waitstatus_to_exitcode(status) == 0, f"{command} failed"
        manifest = read_bundle(output).manifest
        assert "--no-check" in extra or (manifest.parity and manifest.parity["passed"])
        return {
            "wall_s": wall,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_gb": usage.ru_maxrss * 1024 / 1e9,
            "bundle_gb": sum(entry.bytes for entry in manifest.files.values()) / 1e9,
        }


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    where = environment("torch", "onnx", "onnxscript", "onnxruntime", "transformers", "numpy")
    kinds = {"with parity check": (), "without": ("--no-check",)}
    # In turn, so that a machine that drifts favours neither.
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.runs):
        for kind, extra in kinds.items():
            runs[kind].append(run(*extra))
            print(kind, {key: round(value, 2) for key, value in runs[kind][-1].items()})
    median = {
        kind: {key: statistics.median(one[key] for one in ones) for key in ones[0]}
        for kind, ones in runs.items()
    }
    result = {
        "command": "vzip-export " + " ".join(ARGUMENTS),
        "environment": where,
        "aim": AIM,
        "median": median,
        "runs": runs,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"median {median}; written to {RESULT}")


if __name__ == "__main__":
    main()
