r"""Latencies on this machine's GPU, beside PyTorch and the hardware's own limit.

    python -m benchmarks.gpu_evidence -o benchmarks/results/NAME.json \
        --stack torch=PYTHON --stack tensorrt=PYTHON --stack tensorrt-rtx=PYTHON \
        --stack onnxruntime=PYTHON [--bundles FOLDER] [--batches 1,8,32] [--rounds 10]

The full-size encoder (llava-1.5-7b, random weights, FP16) is exported once for each batch, built
with every stack that is there, proven against the reference in the bundle, and timed from uint8
pictures on the host to tokens on the host. Each stack runs in a process of its own, in the Python
that ``--stack`` names (this one otherwise); all are open at once and are timed in turn, so that a
GPU that drifts favours none. An engine's time on the GPU (``engine_ms``, by CUDA's events), what a
call costs beyond it (``host_ms``) and the time of a call that leaves its tokens on the device
(``on_device_ms``) are written beside, and where the engine's time goes (``profile``, after the
turns). Beside them, of the same weights: VisionZip as published
(``output_attentions=True``, eager), PyTorch with scaled_dot_product_attention, the same under
torch.compile, and the encoder's matrix multiplications alone.

A machine without torch 2.9, as every Jetson, takes bundles that were exported elsewhere, one a
batch (and the torch stacks fail there, which is recorded)::

    vzip export --model llava-1.5-7b --weights random --merge sum --opset 17 --tokens 64 \
        --dtype fp16 --batch 8 -o FOLDER/batch-8        # on a workstation; carry FOLDER
    python -m benchmarks.gpu_evidence -o FILE.json --stack tensorrt=PYTHON --bundles FOLDER \
        --batches 8                                     # on the Jetson

What fails is recorded with its reason, the rest is measured and written, after each batch, with all
that ``vzip build`` said (``said``); what TensorRT said of a build that failed is beside, in the
bundle's ``engines/NAME.log``. The status is 1 if a stack that ``--stack`` named failed. Where
nothing could be timed, and without a GPU, nothing is written and the status is 1 too.
``--dry-run-cpu`` runs the demo model on the CPU instead: it tries this program, its numbers say
nothing about any GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness.results import RESULTS
from vzip.export.bench.measure import summary
from vzip.export.bench.output import without_paths
from vzip.export.bench.processes import Process, WorkerError, profiles, take_turns
from vzip.export.bench.stacks import CEILINGS, Stack
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.console import run_command, say
from vzip.runtime.doctor.environment import environment
from vzip.runtime.errors import InvalidInputError, VzipError
from vzip.runtime.files import atomic
from vzip.runtime.machine import timing
from vzip.runtime.machine.record import state

ROOT = Path(__file__).parent.parent
CEILING = "ceiling"

# --stack's names → the stacks that live in that Python; TensorRT's are built before they are timed.
FAMILIES = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx",),
    "onnxruntime": ("onnxruntime-cuda",),
    "torch": ("torch-published", "torch-sdpa", "torch-compile", CEILING),
}
CPU_FAMILIES = {
    "onnxruntime": ("onnxruntime",),
    "torch": ("torch-published", "torch-sdpa", CEILING),
}
BUILT = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # family → Python module

_HEAD = f"  {'':<18}median ms   p90 ms   IQR ms  images/s  ceiling   engine     host"
OPEN_LIMIT_S, EXPORT_LIMIT_S, BUILD_LIMIT_S = 1200.0, 1800.0, 3600.0
DRY_RUN = "CPU dry run of this program with the demo model: says nothing about any GPU"
MEASURED = "uint8 pictures on the host to tokens on the host, wall clock, one call at a time"


class EvidenceError(VzipError):
    """Evidence that can't be had here."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured.

    Attributes:
        model: As the export's ``--model``.
        device: ``cuda`` or ``cpu``.
        export: Options of the export that make the bundle what it is.
        families: Stacks by the Python they share.
        pythons: Interpreter of each family.
        asked: Families that the command line named.
        batches: Static batches.
        rounds: Turns of every stack.
    """

    model: str
    device: str
    export: tuple[str, ...]
    families: dict[str, tuple[str, ...]]
    pythons: dict[str, str]
    asked: frozenset[str]
    batches: tuple[int, ...]
    rounds: int


def measure(plan: Measurement, bundles: Path, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Export, build, prove and time.

    Yields:
        The result so far, as the file has it, after each batch.
    """
    before = environment(folder=bundles)
    result: dict[str, Any] = {
        "what": MEASURED if plan.device == "cuda" else f"{DRY_RUN}; {MEASURED}",
        "dry_run": plan.device == "cpu",
        "command": ["python", "-m", "benchmarks.gpu_evidence", *sys.argv[1:]],
        "model": plan.model,
        "export": list(plan.export),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": before,
        "batches": {},
    }
    for batch in plan.batches:
        bundle = bundles / f"batch-{batch}"
        try:
            exported = export(plan, bundle, batch, paths)
        except EvidenceError as error:
            say(f"  {error}")
            found: dict[str, Any] = {"stacks": {}, "failed": {"export": str(error)}}
        else:
            said: dict[str, list[str]] = {}
            built, failed = build(plan, bundle, paths, said)
            timed = time_stacks(plan, bundle, paths, skip=set(failed))
            timed["failed"] = {**failed, **timed["failed"]}
            found = {"export": exported, "build": built, "said": said, **timed}
        result["batches"][str(batch)] = found
        yield result


def export(plan: Measurement, bundle: Path, batch: int, paths: Sequence[str]) -> dict[str, Any]:
    """Export a bundle, or take one that was carried here and is what an export would make."""
    if bundle.exists():
        _check_carried(plan, bundle, batch)
        return {"carried": True}
    say(f"batch {batch}: exporting")
    arguments = ["export", "--model", plan.model, *plan.export, "--batch", str(batch)]
    start = time.perf_counter()
    _vzip(plan.pythons["torch"], [*arguments, "-o", str(bundle)], paths, EXPORT_LIMIT_S)
    return {"carried": False, "seconds": time.perf_counter() - start}


def _check_carried(plan: Measurement, bundle: Path, batch: int) -> None:
    """Refuse a bundle that is not what this run would have exported."""
    manifest = read_bundle(bundle).manifest
    options = dict(zip(plan.export[::2], plan.export[1::2], strict=True))
    wanted = {
        "weights": options.get("--weights", "checkpoint"),
        "precision": options["--dtype"],
        "opset": int(options["--opset"]),
        "merge": options["--merge"],
        "tokens": int(options["--tokens"]),
        "batch": batch,
        "input": "image",
        "dynamic": False,
    }
    selection = manifest.selection
    got = {
        "weights": manifest.model.weights,
        "precision": manifest.precision,
        "opset": manifest.opset,
        "merge": selection.merge,
        "tokens": selection.dominant + selection.contextual,
        "batch": manifest.batch.max,
        "input": manifest.input.name,
        "dynamic": manifest.batch.dynamic,
    }
    if got != wanted:
        raise EvidenceError(
            f"the bundle '{bundle.name}' is {got}",
            expected=f"{wanted}",
            cause="it was exported with other options",
            cure="delete it, or give another folder with --bundles",
        )


def build(
    plan: Measurement, bundle: Path, paths: Sequence[str], said: dict[str, list[str]]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Build the engines of every TensorRT that is there.

    Args:
        plan: What to measure.
        bundle: The bundle.
        paths: Where this tree can be imported from.
        said: Given the lines that each build wrote to standard error.

    Returns:
        What was built, with seconds; and what failed, with the reason.
    """
    built: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for family in BUILT:
        if family not in plan.families:
            continue
        say(f"{bundle.name}: building with {family}")
        try:
            built[family] = _build_one(plan, family, bundle, paths, said)
        except EvidenceError as error:
            failed[family] = str(error)
            say(f"  {error}")
    return built, failed


def _build_one(
    plan: Measurement, family: str, bundle: Path, paths: Sequence[str], said: dict[str, list[str]]
) -> dict[str, Any]:
    """Build and prove one engine, which is named after its family."""
    start = time.perf_counter()
    arguments = ["build", str(bundle), "--name", family]
    said[family] = []
    _vzip(plan.pythons[family], arguments, paths, BUILD_LIMIT_S, said[family])
    seconds = time.perf_counter() - start
    record = read_bundle(bundle, verify=False).manifest.engines[family]
    if record.stack != BUILT[family]:
        raise EvidenceError(
            f"{family}: {plan.pythons[family]} built with {record.stack}",
            expected=f"{BUILT[family]}",
            cause="it has both",
            cure="name one that has only that with --stack",
        )
    return {
        "seconds": seconds,
        "version": record.version,
        "bytes": record.bytes,
        "fused_attention": record.fused_attention,
        "settings": dict(record.settings),
        "proof": None if record.proof is None else dict(record.proof),
    }


def time_stacks(
    plan: Measurement, bundle: Path, paths: Sequence[str], *, skip: set[str]
) -> dict[str, Any]:
    """Open every stack, time all in turn, close them."""
    batch = read_bundle(bundle, verify=False).manifest.batch.max
    opened: dict[str, Process] = {}
    about: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    try:
        for family, stacks in plan.families.items():
            for stack in stacks:
                if stack in skip:
                    continue
                say(f"{bundle.name}: opening {stack}")
                free = _device_memory()
                process = Process(
                    _stack(plan, stack), bundle, python=plan.pythons[family], paths=paths
                )
                try:
                    about[stack] = {
                        **process.ask(OPEN_LIMIT_S, do="open", batches=[batch]),
                        **process.ask(OPEN_LIMIT_S, do="warm", batch=batch),
                    }
                except WorkerError as error:
                    failed[stack] = str(error)
                    say(f"  {error}")
                    process.close()
                    continue
                about[stack]["device_memory_mib"] = _difference(_device_memory(), free)
                opened[stack] = process
        calls = {stack: timing.calls_per_turn(about[stack]["warm_ms"]) for stack in opened}
        turns, states = take_turns(plan.rounds, opened, calls, batch, failed, say=say)
        alive = {stack: each for stack, each in opened.items() if stack not in failed}
        for stack, profile in profiles(alive, batch).items():
            about[stack]["profile"] = profile
    finally:
        for process in opened.values():
            process.close()
    stacks_found = {
        stack: {**about[stack], **summary(answers)}
        for stack, answers in turns.items()
        if stack not in failed
    }
    _relate(stacks_found, batch)
    return {"stacks": stacks_found, "failed": failed, "states": states}


def _stack(plan: Measurement, name: str) -> Stack:
    """Return what a worker times under one of our names."""
    precision = dict(zip(plan.export[::2], plan.export[1::2], strict=True))["--dtype"]
    device: Literal["cpu", "cuda"] = "cpu" if plan.device == "cpu" else "cuda"
    if name == CEILING:
        return Stack("ceiling", CEILINGS[device], precision, precision, device)
    if name in BUILT:  # the engine is named after its family
        return Stack("ours", "tensorrt", name, precision, device)
    kind: Literal["ours", "peer"] = "peer" if name in FAMILIES["torch"] else "ours"
    return Stack(kind, name, precision, precision, device)


def _relate(stacks: dict[str, dict[str, Any]], batch: int) -> None:
    """Set every stack beside the ceiling: FLOPs per second, and share of what is attainable."""
    for found in stacks.values():
        found["images_per_s"] = batch / found["median_ms"] * 1000
    ceiling = stacks.get(CEILING)
    if ceiling is None:
        return
    for found in stacks.values():
        found["tflops"] = ceiling["flops"] / found["median_ms"] / 1e9
        found["share_of_ceiling"] = ceiling["median_ms"] / found["median_ms"]


def _device_memory() -> float | None:
    """Return MiB in use: of the first GPU, or of the machine where they share memory."""
    found = state()
    smi = found["nvidia_smi"]
    if smi and smi[0]["memory.used"].endswith(" MiB"):
        return float(smi[0]["memory.used"].removesuffix(" MiB"))
    available = found["memory_available_mib"]
    return None if available is None else -float(available)


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _vzip(
    python: str,
    arguments: list[str],
    paths: Sequence[str],
    limit_s: float,
    said: list[str] | None = None,
) -> None:
    """Run vzip's command line of this tree in another Python; `said` gets its standard error."""
    code = (
        f"import sys; sys.path[:1] = {list(paths)!r}; from vzip.runtime.cli.main import main; "
        f"sys.exit(main({arguments!r}))"
    )
    try:
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=False, timeout=limit_s
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        stderr = getattr(error, "stderr", None) or b""
        if said is not None:
            said += stderr.decode(errors="replace").splitlines()
        raise EvidenceError(f"vzip {arguments[0]} in {python}: {error}") from error
    if said is not None:
        said += done.stderr.splitlines()
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EvidenceError(f"vzip {arguments[0]} in {python} ended with {done.returncode}: {last}")


def _tree(folder: Path) -> list[str]:
    """Make this tree importable, as `vzip`, by any Python; return the paths."""
    package = folder / "vzip"
    package.mkdir()
    for name in ("export", "runtime", "calibration"):
        (package / name).symlink_to(ROOT / name)
    return [str(folder)]


def table(result: dict[str, Any]) -> str:
    """Return the result as one reads it."""
    lines = [result["what"], "engine: on the GPU alone, by CUDA's events; host: what a call adds"]
    for batch, found in result["batches"].items():
        lines += ["", f"batch {batch}", _HEAD]
        for stack, one in sorted(found["stacks"].items(), key=lambda each: each[1]["median_ms"]):
            share = f"{one['share_of_ceiling']:8.0%}" if "share_of_ceiling" in one else "       –"
            lines.append(
                f"  {stack:<18}{one['median_ms']:9.3f}{one['p90_ms']:9.3f}{one['iqr_ms']:9.3f}"
                f"{one['images_per_s']:10.1f} {share}"
                + "".join(f"{one[name]:9.3f}" for name in ("engine_ms", "host_ms") if name in one)
            )
        lines += [f"  {stack:<18}failed: {reason}" for stack, reason in found["failed"].items()]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Measure, print and store."""
    arguments = _parser().parse_args(argv)
    plan = _plan(arguments)
    output = Path(arguments.output)
    _check_output(output, dry_run=arguments.dry_run_cpu)
    if plan.device == "cuda":
        _require_gpu()
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        tree.mkdir()
        bundles = Path(scratch) / "bundles" if arguments.bundles is None else arguments.bundles
        bundles.mkdir(parents=True, exist_ok=True)
        for found in measure(plan, bundles, _tree(tree)):
            result = without_paths(found)
            if _timed(result):  # as soon as there is anything: hours may be lost later
                atomic.replace_file(output, (json.dumps(result, indent=1) + "\n").encode())
    if not _timed(result):
        reasons = [text for each in result["batches"].values() for text in each["failed"].values()]
        raise EvidenceError(
            "nothing could be timed",
            cause=f"{'; '.join(dict.fromkeys(reasons))}; nothing was written",
        )
    print(table(result))
    print(f"\nwritten to {output}")
    lacking = _lacking(plan, result)
    if lacking:
        say(f"gpu_evidence: failed, though asked for: {', '.join(lacking)}; the file says why")
    return 1 if lacking else 0


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="gpu_evidence",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE.json")
    parser.add_argument(
        "--stack",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"the interpreter that has one of {', '.join(FAMILIES)} (default: this one)",
    )
    parser.add_argument(
        "--bundles",
        type=Path,
        metavar="FOLDER",
        help="where bundles are kept, as batch-1, batch-8, …; those that are there are used",
    )
    parser.add_argument("--batches", default="1,8,32", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="turns a stack (default: 10)")
    parser.add_argument("--dry-run-cpu", action="store_true", help="try this program on the CPU")
    return parser


def _plan(arguments: argparse.Namespace) -> Measurement:
    dry = arguments.dry_run_cpu
    families = CPU_FAMILIES if dry else FAMILIES
    pythons = dict.fromkeys(families, sys.executable)
    for text in arguments.stack:
        name, separator, python = text.partition("=")
        if name not in families or not separator or not python:
            raise InvalidInputError(
                f"--stack is {text!r}",
                expected=f"NAME=PYTHON with a NAME of {', '.join(families)}",
            )
        pythons[name] = python
    parts = arguments.batches.split(",")
    if not all(part.isdigit() and int(part) for part in parts) or len({*parts}) < len(parts):
        raise InvalidInputError(
            f"--batches is {arguments.batches!r}",
            expected="different numbers from 1 on, as 1,8,32",
        )
    if arguments.rounds < 1:
        raise InvalidInputError(
            f"--rounds is {arguments.rounds}",
            expected="1 or more",
        )
    # The merge of the published code, so that all compute the same; opset 17 for TensorRT 8.6.
    common = ("--merge", "sum", "--opset", "17", "--tokens")
    return Measurement(
        model="demo" if dry else "llava-1.5-7b",
        device="cpu" if dry else "cuda",
        export=(*common, "43", "--dtype", "fp32")
        if dry
        else (*common, "64", "--dtype", "fp16", "--weights", "random"),
        families=families,
        pythons=pythons,
        asked=frozenset(text.partition("=")[0] for text in arguments.stack),
        batches=tuple(map(int, parts)),
        rounds=arguments.rounds,
    )


def _check_output(output: Path, *, dry_run: bool) -> None:
    """Refuse a file that can't or must not be written, before anything is measured."""
    if not output.parent.is_dir():
        raise InvalidInputError(
            f"-o is '{output}'",
            expected="a file in a folder that exists",
            cure=f"create the folder '{output.parent}' first",
        )
    if dry_run and output.resolve().is_relative_to(RESULTS.resolve()):
        raise InvalidInputError(
            f"-o is '{output}' and --dry-run-cpu was given",
            cause="results of a dry run are no evidence and never lie in benchmarks/results",
            cure="give another folder",
        )


def _require_gpu() -> None:
    from vzip.runtime.doctor.environment import gpus

    found = gpus()
    if isinstance(found, str):
        raise EvidenceError(
            f"there is no GPU to measure: {found}",
            cause="nothing was written",
            cure="run it on a machine with an NVIDIA GPU, or try it with --dry-run-cpu",
        )


def _timed(result: dict[str, Any]) -> bool:
    """Return whether there is any number worth a file."""
    return any(found["stacks"] for found in result["batches"].values())


def _lacking(plan: Measurement, result: dict[str, Any]) -> list[str]:
    """Return the stacks that the command line asked for and that failed, with their batches."""
    asked = [stack for family in plan.families if family in plan.asked
             for stack in plan.families[family]]  # fmt: skip
    return [
        f"{stack} at batch {batch}"
        for batch, found in result["batches"].items()
        for stack in asked
        if stack not in found["stacks"]
    ]


def _entry() -> int:
    status = run_command(lambda: main(sys.argv[1:]), prog="gpu_evidence")
    return 1 if status == 2 else status


if __name__ == "__main__":
    sys.exit(_entry())
