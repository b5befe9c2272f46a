"""Random weights, every peer: ``python -m benchmarks.encoder --bundles FOLDER``.

LLaVA-1.5's tower and projector (CLIP ViT-L/14-336) with seeded random weights, in FP32 and INT8; of
trained weights, and of such with outliers, `benchmarks.real_towers` has the numbers. At
64 tokens and batch 1 every stack; at 128 and 192 tokens, and in batches, the main ones.
576 tokens, no compression, is the peer ``torch-uncompressed``. `vzip bench` measures; this makes
the bundles, which are kept in the folder, and writes benchmarks/results/encoder.json, .md and .svg.

INT8 is calibrated on the demo's scenes, without the search for sensitive layers: random weights
have none, and the search takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness.bundles import CPU_ENGINE, sources, with_cpu_engine
from vzip.export.bench.measure import Wanted, bench
from vzip.export.bench.output import plot, table, without_paths
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.console import say
from vzip.runtime.doctor.environment import gpus
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files import atomic

FILE = Path(__file__).parent / "results" / "encoder.json"
MODEL = "llava-1.5-7b"
LARGEST_BATCH = 32
WAIT_S = 120.0  # for a machine that nobody else uses
# On a CPU what is compared most is timed together: not all are open at once, for want of memory.
MAIN = (
    "torch-published", "torch-sdpa", "onnxruntime", "onnxruntime-dynamic", "openvino",
    "openvino-f32",
)  # fmt: skip
OTHERS = (
    "torch-published:fp32", "torch-compile", "torch-dynamic", "torch-uncompressed",
    "onnxruntime-plain", "pytorch", "onnxruntime-cuda",
)  # fmt: skip
# At the other budgets, which share the tower: ours and the best of each peer.
BEST = (
    "torch-published:fp32", "torch-sdpa:bf16", "onnxruntime", "onnxruntime:fastest",
    "onnxruntime-dynamic", "openvino:fp32", "openvino-f32",
)  # fmt: skip
# In batches, where a call of the published form takes 20 s: what is open at once.
FEW = ("torch-published:fp32", "torch-sdpa:bf16", "onnxruntime:fastest", "openvino-f32")
# Tokens, batch, stacks, most turns of each.
RUNS: tuple[tuple[int, int, tuple[str, ...], int], ...] = (
    (64, 1, MAIN, 7), (64, 1, OTHERS, 5), (128, 1, BEST, 5), (192, 1, BEST, 5),
    (64, 8, FEW, 3),
)  # fmt: skip
# On a GPU every stack of the machine; in batches, where a CPU's call takes a minute, its own alone.
ON_A_GPU = (
    "torch-published", "torch-sdpa", "torch-compile", "torch-uncompressed", "onnxruntime-cuda",
)  # fmt: skip
RUNS_ON_A_GPU: tuple[tuple[int, int, tuple[str, ...], int], ...] = (
    (64, 1, (), 7), (64, 8, ON_A_GPU, 7), (64, LARGEST_BATCH, ON_A_GPU, 5), (128, 1, (), 7),
    (192, 1, (), 7),
)  # fmt: skip
# What a CPU leaves empty.
LARGER = {
    "cell": f"tokens-64, batch 16 and {LARGEST_BATCH}",
    "why": "left out on a CPU: a call of the published form, which the ratios are of, would take "
    "40 and 80 s at batch 1's rate, and at batch 32 it would keep 15 GiB of attention (24 layers, "
    "16 heads, 577² in FP32)",
}
ENGINES = {
    "cell": "tensorrt",
    "why": "there is no GPU here; on one, benchmarks.gpu_evidence builds engines and times them",
}
IMAGES = 20
DISK_GB = 2  # of a bundle: FP32 and INT8


def made(folder: Path, model: str, tokens: int, *, weights: str = "random") -> Bundle:
    """Return the bundle of a budget: exported, calibrated and built for this CPU where it isn't.

    Raises:
        InvalidInputError: What is there is another bundle.
    """
    path = folder / f"tokens-{tokens}"
    stamp, code = folder / f"{path.name}.made-by", sources()
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < DISK_GB * 1e9:
            raise InvalidInputError(
                f"'{folder}' has less than {DISK_GB} GB free",
                cause="one bundle takes as much",
                cure="give another folder with --bundles",
            )
        stamp.write_text(code, encoding="utf-8")
        _vzip(
            "export", "--model", model, "--weights", weights, "--dtype", "fp32",
            "--tokens", str(tokens), "--max-batch", str(LARGEST_BATCH), "-o", str(path),
        )  # fmt: skip
    bundle = read_bundle(path, verify=False)
    manifest = bundle.manifest
    selection, batch = manifest.selection, manifest.batch
    got = (manifest.model.weights, manifest.precision, selection.tokens, batch.max)
    expected = (weights, "fp32", tokens, LARGEST_BATCH)
    if got != expected:
        raise InvalidInputError(
            f"'{path}' has weights, precision, tokens and largest batch {got}",
            expected=f"{expected}",
            cause="it was exported with other options",
            cure="delete it, or give another folder with --bundles",
        )
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != code:
        raise InvalidInputError(
            f"'{path}' was made by other code of vzip",
            expected="this one's",
            cause="what it would measure is not what there is now",
            cure="delete it, or give another folder with --bundles",
        )
    if "int8" not in manifest.precisions:
        _vzip(
            "calibrate", str(path), "--images", "demo", "--count", str(IMAGES),
            "--precision", "int8", "--min-agreement", "none", "--min-cosine", "none",
        )  # fmt: skip
    if CPU_ENGINE not in manifest.engines:
        _vzip("build", str(path), "--cpu", "--name", CPU_ENGINE)
    return read_bundle(path, verify=False)


def joined(results: Sequence[dict[str, Any]], command: str) -> dict[str, Any]:
    """Return measurements of one machine, one after the other, as one; the first one's facts."""
    first, *others = results
    for other in others:
        if other["baseline"] != first["baseline"]:
            raise InvalidInputError(
                f"the baselines are {first['baseline']} and {other['baseline']}",
                expected="one",
                cause="the first failed to open in one of the bundles",
                cure="look at what was printed",
            )
    whole = {**first, "command": command, "rows": [], "states": []}
    groups = 0  # every run numbers its own from 0
    for result in results:
        for name in ("rows", "states"):
            whole[name] += [{**each, "group": groups + each["group"]} for each in result[name]]
        groups += 1 + max((each["group"] for each in result["rows"]), default=0)
    for name in ("bundles", "empty", "warnings"):  # a bundle may be in several
        every = [each for result in results for each in result.get(name, ())]
        whole[name] = [each for at, each in enumerate(every) if each not in every[:at]]
    return whole


def _some(
    parser: argparse.ArgumentParser, option: str, text: str, known: Sequence[int]
) -> list[int]:
    """Return the numbers of an option, which must be among those that there are runs of."""
    every = sorted(set(known))
    if not text:
        return every
    if not set(text.split(",")) <= set(map(str, every)):
        parser.error(f"{option} has {text!r}, expected some of {every} with commas between them")
    return [int(part) for part in text.split(",")]


def add_wait(parser: argparse.ArgumentParser) -> None:
    """Add ``--wait``, as `vzip bench` has it."""
    parser.add_argument(
        "--wait",
        type=float,
        default=WAIT_S,
        metavar="S",
        help="seconds to wait, at most, for an idle machine (default: %(default)g)",
    )


def _vzip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "vzip.runtime.cli.main", *arguments], check=True)


def main() -> None:
    """Command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--bundles", type=Path, required=True, help="where bundles are kept")
    parser.add_argument("--rounds", type=int, default=7, help="most turns of each (default: 7)")
    parser.add_argument("--tokens", default="", help="some of 64,128,192 (default: all)")
    parser.add_argument(
        "--batches", default="", help="some of 1,8; on a GPU of 1,8,32 (default: all)"
    )
    parser.add_argument("--only", default="", help="stacks, as of vzip bench (default: all)")
    add_wait(parser)
    parser.add_argument("-o", "--output", type=Path, default=FILE, metavar="FILE.json")
    options = parser.parse_args()
    device: Literal["cpu", "cuda"] = "cpu" if isinstance(gpus(), str) else "cuda"
    runs = RUNS if device == "cpu" else RUNS_ON_A_GPU
    budgets = _some(parser, "--tokens", options.tokens, [run[0] for run in runs])
    batches = _some(parser, "--batches", options.batches, [run[1] for run in runs])
    runs = tuple(run for run in runs if run[0] in budgets and run[1] in batches)
    if not runs:
        parser.error(f"batches of {batches} are measured at 64 tokens alone, not at {budgets}")
    bundles = {tokens: made(options.bundles, MODEL, tokens) for tokens in budgets}
    asked = tuple(filter(None, options.only.split(",")))
    results = []
    for tokens, batch, main, most in runs:
        bundle = bundles[tokens]
        wanted = Wanted(
            peers=True, only=with_cpu_engine(asked or main, bundle), batches=(batch,),
            rounds=min(options.rounds, most), device=device, wait_s=options.wait,
        )  # fmt: skip
        results.append(bench({bundle.path.name: bundle}, wanted, command="", say=say))
        arguments = without_paths(sys.argv[1:])
        command = " ".join(["python", "-m", "benchmarks.encoder", *arguments])
        result = without_paths(joined(results, command))
        if device == "cpu":
            result["empty"] += [LARGER, ENGINES]
        # After each: an hour may be lost later.
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        atomic.replace_file(options.output, text.encode())
        atomic.replace_file(options.output.with_suffix(".md"), table(result).encode())
        atomic.replace_file(options.output.with_suffix(".svg"), plot(result, "svg"))
    print(table(result))


if __name__ == "__main__":
    main()
