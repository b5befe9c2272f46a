"""One stack, opened and timed in a process of its own; `gpu_evidence` starts it and talks to it.

    PYTHON gpu_worker.py --path FOLDER … STACK BUNDLE MODEL DEVICE

Requests are lines of JSON on standard input, answers lines of JSON on standard output:
``{"do": "open"}`` loads, proves the tokens against the bundle's reference and warms up;
``{"do": "turn", "calls": n}`` answers with n times in milliseconds (``ms``; of an engine also
``engine_ms``, the GPU's own time for what a call launches, and ``on_device_ms``, calls that leave
their tokens on the device too); ``{"do": "close"}`` ends. An
answer is ``{"ok": …}`` or ``{"error": "…"}``. The paths are put first in ``sys.path``, so that
every Python runs this tree's vzip, whatever is installed there.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

Answer = dict[str, Any]
CEILING = "ceiling"
ENGINES = ("tensorrt", "tensorrt-rtx")  # what `gpu_evidence` names the engines it builds
WARM_CALLS, WARM_S = 10, 1.0


class Worker:
    """What is open in this process."""

    def __init__(self, stack: str, bundle: Path, model: str, device: str) -> None:
        self.stack, self.bundle, self.model, self.device = stack, bundle, model, device
        self.call: Callable[[], object] | None = None
        self.more: dict[str, Callable[[int], list[float]]] = {}

    def answer(self, request: Answer) -> Answer:
        """Do what is asked."""
        from vzip.runtime.bench import timing

        if request["do"] == "open":
            return self._open()
        assert self.call is not None, "open comes first"
        calls = request["calls"]
        found = {"ms": timing.turn(self.call, calls=calls)}
        return {**found, **{name: take(calls) for name, take in self.more.items()}}

    def _open(self) -> Answer:
        from vzip.runtime.bench import timing

        start = time.perf_counter()
        found = self._open_ceiling() if self.stack == CEILING else self._open_encoder()
        found["open_s"] = time.perf_counter() - start
        assert self.call is not None
        warm = timing.warm_up(self.call, calls=WARM_CALLS, seconds=WARM_S)
        return {
            **found,
            "first_call_ms": warm[0],
            "warm_up_calls": len(warm),
            "warm_ms": statistics.median(warm[len(warm) // 2 :]),
            # Kibibytes on Linux
            "peak_host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "python": platform.python_version(),
            "packages": _versions(),
        }

    def _open_ceiling(self) -> Answer:
        from benchmarks.torch_encoders import Ceiling
        from vzip.export.checkpoint import vision_config
        from vzip.runtime.bundle import read_bundle

        ceiling = Ceiling(
            vision_config(self.model), read_bundle(self.bundle, verify=False).manifest, self.device
        )
        self.call = ceiling.call
        return {"flops": ceiling.flops}

    def _open_encoder(self) -> Answer:
        import numpy as np

        from vzip.export.proof import prove, read_reference
        from vzip.runtime.bench import timing
        from vzip.runtime.bundle import read_bundle
        from vzip.runtime.manifest import EMBEDS, KEPT, REFERENCE_FILE

        bundle = read_bundle(self.bundle)
        manifest = bundle.manifest
        with (bundle.path / REFERENCE_FILE).open("rb") as file:
            reference = read_reference(file, manifest)
        about: Answer = {}
        if self.stack.startswith("pytorch-"):
            from benchmarks.torch_encoders import TorchEncoder

            torch_encoder = TorchEncoder(self.stack, self.model, manifest, self.device)
            run: Callable[[Any], Any] = torch_encoder.run
        else:
            from vzip.runtime import VisionEncoder

            if self.stack in ENGINES:
                encoder = VisionEncoder.open(bundle, backend="tensorrt", engine=self.stack)
            else:
                encoder = VisionEncoder.open(bundle, backend=self.stack)

            def run(images: Any) -> Any:
                tokens = encoder.run(images)
                return {EMBEDS: tokens.embeds, KEPT: tokens.kept}

        # Twice: a graph that was captured meanwhile is what will be timed.
        for _ in range(2):
            proof = prove(run, reference, manifest, [manifest.batch.max])
        about["agreement"] = proof.to_json()
        if not proof.passed:
            raise RuntimeError(f"the tokens differ from the reference: {proof}")
        count = np.arange(manifest.batch.max) % len(reference.input)
        images = np.ascontiguousarray(reference.input[count])
        self.call = lambda: run(images)
        if self.stack in ENGINES:
            rows, opened = len(images), encoder._opened
            self.more = {
                "engine_ms": lambda calls: opened.launch_ms(rows, calls),
                "on_device_ms": lambda calls: timing.turn(
                    lambda: encoder.run(images, on_device=True), calls=calls
                ),
            }
        if self.stack.startswith("pytorch-"):
            self.call()
            about["torch_reserved_mib"] = torch_encoder.memory_mib()
        return about


def _versions() -> dict[str, str]:
    names = ("numpy", "torch", "transformers", "tensorrt", "tensorrt_rtx", "onnxruntime")
    return {
        name: str(sys.modules[name].__version__)
        for name in names
        if hasattr(sys.modules.get(name), "__version__")
    }


def _serve(worker: Worker, requests: TextIO, answers: TextIO) -> None:
    for line in requests:
        request = json.loads(line)
        if request["do"] == "close":
            break
        try:
            answer: Answer = {"ok": worker.answer(request)}
        except Exception as error:  # noqa: BLE001 - the other side decides what it means
            text = (str(error).strip().splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {text}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _main() -> None:
    arguments = sys.argv[1:]
    paths = []
    while arguments and arguments[0] == "--path":
        paths.append(arguments[1])
        arguments = arguments[2:]
    sys.path[:1] = paths  # instead of this file's folder
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    stack, bundle, model, device = arguments
    _serve(Worker(stack, Path(bundle), model, device), sys.stdin, answers)
    answers.flush()
    os._exit(0)  # libraries of GPUs like to crash as they are unloaded; all was said


if __name__ == "__main__":
    _main()
