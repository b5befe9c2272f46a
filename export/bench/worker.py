"""One stack, opened, proven and timed in a process of its own; `processes.Process` starts it.

    PYTHON worker.py --path FOLDER … JOB

JOB is JSON: ``{"stack": a Stack's fields, "bundle": folder, "threads": of a graph on the CPU, or
null, "judge": what tokens are judged by instead of the bundle's reference, or null}``. Requests are
lines of JSON on standard input, answers lines of JSON on standard output, ``{"ok": …}`` or
``{"error": "…"}``:

* ``{"do": "open", "batches": […]}`` loads and proves the tokens of every batch size against the
  reference;
* ``{"do": "warm", "batch": b}`` warms up;
* ``{"do": "turn", "batch": b, "calls": n}`` answers with n times in milliseconds (``ms``; of an
  engine also ``engine_ms``, the GPU's own time for what a call launches, and ``on_device_ms``,
  calls that leave their tokens on the device too);
* ``{"do": "profile", "batch": b}`` says of an engine where its time goes;
* ``{"do": "close"}`` ends.

The paths are put first in ``sys.path``, so that every Python runs this vzip, whatever is installed
there.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from vzip.export.bench.stacks import Stack
    from vzip.runtime.bundle.reader import Bundle

Answer = dict[str, Any]
Call = Callable[[], object]
More = dict[str, Callable[[int], list[float]]]

WARM_CALLS, WARM_S = 10, 1.0
SLOW_MS = 300.0  # from here on one untimed call settles a turn
_PR_SET_PDEATHSIG = 1
_PACKAGES = (
    "numpy", "torch", "transformers", "tensorrt", "tensorrt_rtx", "onnxruntime", "openvino",
)  # fmt: skip


class Timed(Protocol):
    """What can be timed."""

    def prove(self, batches: list[int]) -> Answer:
        """Assert that it computes what it should, and say how well."""
        ...

    def call(self, batch: int) -> tuple[Call, More]:
        """Return what is timed, from host to host; and what else, by name."""
        ...

    def about(self, batch: int) -> Answer:
        """Say what is known after some calls."""
        ...


class TimedEncoder:
    """A backend of ours, or a peer."""

    def __init__(self, stack: Stack, bundle: Bundle, judge: Path | None = None) -> None:
        from vzip.export.bench import peers
        from vzip.export.bench.judging import JudgedBy, load_judge
        from vzip.export.bench.peers.catalogue import open_peer
        from vzip.runtime.agreement import load_reference
        from vzip.runtime.bundle.manifest import EMBEDS, KEPT

        self.stack, self.bundle = stack, bundle
        self.judging = judge is not None
        found = (
            JudgedBy(load_reference(bundle))
            if judge is None
            else load_judge(judge, bundle.manifest)
        )
        self.reference, self.keys = found.reference, found.keys
        self.precision = stack.precision
        self.peer: Any = None
        if stack.kind == "peer":
            self.peer = open_peer(stack.name, stack.form, bundle, stack.device)
            self.run: Callable[[Any], Any] = self.peer.run
            self.prove_by: Callable[[Any, list[int]], Any] = lambda reference, batches: (
                self.peer.prove(reference, batches, self.keys)
            )
        else:
            from vzip.runtime import VisionEncoder

            engine = stack.form if stack.form in bundle.manifest.engines else None
            precision = None if engine is not None else stack.form
            self.encoder = VisionEncoder.open(
                bundle, backend=stack.name, engine=engine, precision=precision
            )

            form = self.encoder.describe()["form"]
            self.chosen = {} if form is None else {"chosen": form}

            def run(images: Any) -> Any:
                tokens = self.encoder.run(images)
                return {EMBEDS: tokens.embeds, KEPT: tokens.kept}

            self.run = run
            self.prove_by = lambda reference, batches: peers.prove(
                run, reference, bundle, batches, self.precision,
                keys=self.keys,
                merging=self._merging if stack.name in {"onnxruntime", "openvino"} else None,
            )  # fmt: skip

    def _merging(self, images: Any) -> Any:
        """Return kept indices and ``token_weights``, of another session than is timed."""
        from vzip.runtime.backends import open_backend
        from vzip.runtime.bundle.manifest import TOKEN_WEIGHTS

        form, manifest = self.stack.form, self.bundle.manifest
        engine = form if form in manifest.engines else None
        at = self.bundle.at(None if engine is not None else form)
        _, session = open_backend(
            self.stack.name, at, extra_outputs=(TOKEN_WEIGHTS,), engine=engine
        )
        try:
            return session.run({manifest.input.name: images})
        finally:
            session.close()

    def images(self, batch: int) -> Any:
        """Return the reference's pictures, as often as a batch takes."""
        import numpy as np

        count = np.arange(batch) % len(self.reference.input)
        return np.ascontiguousarray(self.reference.input[count])

    def prove(self, batches: list[int]) -> Answer:
        """See `Timed`; on a GPU twice: a graph captured meanwhile is what will be timed."""
        start = time.perf_counter()
        self.run(self.images(batches[0]))
        first = (time.perf_counter() - start) * 1000
        for _ in range(2 if self.stack.device == "cuda" else 1):
            agreement = self.prove_by(self.reference, batches)
            if not agreement["passed"] and not self.judging:
                raise RuntimeError(f"the tokens differ from the reference: {_said(agreement)}")
        chosen = {} if self.peer is not None else self.chosen
        return {"first_call_ms": first, "agreement": dict(agreement), **chosen}

    def call(self, batch: int) -> tuple[Call, More]:
        """See `Timed`."""
        from vzip.runtime.machine import timing

        images = self.images(batch)
        more: More = {}
        if self.stack.name == "tensorrt":
            opened: Any = self.encoder._opened
            more = {
                "engine_ms": lambda calls: opened.launch_ms(batch, calls),
                "on_device_ms": lambda calls: timing.turn(
                    lambda: self.encoder.run(images, on_device=True), calls=calls
                ),
            }
        return lambda: self.run(images), more

    def about(self, batch: int) -> Answer:
        """See `Timed`."""
        return {} if self.peer is None else dict(self.peer.about(batch))


class TimedCeiling:
    """The encoder's multiplications."""

    def __init__(self, stack: Stack, bundle: Bundle) -> None:
        self.stack, self.bundle, self.flops = stack, bundle, 0

    def prove(self, _batches: list[int]) -> Answer:
        """See `Timed`: its tests say that it multiplies what it counts."""
        return {}

    def call(self, batch: int) -> tuple[Call, More]:
        """See `Timed`."""
        from vzip.export.bench.peers.ceiling import Ceiling

        made = Ceiling(self.bundle.manifest, self.stack.form, batch, self.stack.device)
        self.flops = made.flops
        return made.call, {}

    def about(self, _batch: int) -> Answer:
        """See `Timed`."""
        return {"flops": self.flops}


class TimedPreprocessing:
    """A picture's file to the tower's input."""

    def __init__(self, stack: Stack, bundle: Bundle) -> None:
        from PIL import Image

        from vzip.export.pictures import reference_images

        named = {path.name: path for path in reference_images()}
        self.path, self.manifest = named[stack.form], bundle.manifest
        with Image.open(self.path) as image:
            self.pixels = list(image.size)

    def prove(self, _batches: list[int]) -> Answer:
        """See `Timed`; `tests/parity` compares every byte with transformers'."""
        got, wanted = self._input(), self.manifest.input
        if got.shape != wanted.shape[1:] or got.dtype.name != wanted.dtype:
            raise RuntimeError(f"preprocessing gave {got.dtype} {got.shape}, expected {wanted}")
        return {}

    def _input(self) -> Any:
        from vzip.runtime.pictures.images import load_image
        from vzip.runtime.pictures.preprocess import pixel_values, tower_image

        prep = self.manifest.preprocessing
        image = tower_image(load_image(self.path), prep)
        return image if self.manifest.input.name == "image" else pixel_values(image[None], prep)[0]

    def call(self, _batch: int) -> tuple[Call, More]:
        """See `Timed`."""
        return self._input, {}

    def about(self, _batch: int) -> Answer:
        """See `Timed`."""
        return {"picture": self.path.name, "pixels": self.pixels}


class TimedCopies:
    """The graph's input to a GPU, or its outputs to the host, in pinned memory."""

    def __init__(self, stack: Stack, bundle: Bundle) -> None:
        from vzip.runtime.backends.tensorrt import cuda

        self.stack, self.manifest = stack, bundle.manifest
        self.cuda: Any = cuda.load()

    def prove(self, _batches: list[int]) -> Answer:
        """See `Timed`: there is nothing to compute."""
        return {}

    def bytes(self, batch: int) -> int:
        """Return how many are copied."""
        import math

        import numpy as np

        tensors = self.manifest.inputs if self.stack.name == "host-to-device" else (
            self.manifest.outputs
        )  # fmt: skip
        return sum(
            batch * math.prod(map(int, each.shape[1:])) * np.dtype(each.dtype).itemsize
            for each in tensors
        )

    def call(self, batch: int) -> tuple[Call, More]:
        """See `Timed`."""
        cuda, size = self.cuda, self.bytes(batch)
        with cuda.on_device():
            device, host, stream = cuda.malloc(size), cuda.host_alloc(size), cuda.stream_create()

        def copy() -> None:
            with cuda.on_device():
                if self.stack.name == "host-to-device":
                    cuda.to_device(device, host, size, stream)
                else:
                    cuda.to_host(host, device, size, stream)
                cuda.stream_synchronize(stream)

        return copy, {}

    def about(self, batch: int) -> Answer:
        """See `Timed`."""
        return {"bytes": self.bytes(batch)}


class Worker:
    """What is open in this process."""

    def __init__(self, job: Answer) -> None:
        from vzip.export.bench.stacks import Stack
        from vzip.runtime.machine import process

        process.limit_threads(job["threads"])
        self.stack, self.folder = Stack(**job["stack"]), Path(job["bundle"])
        self.judge = None if job.get("judge") is None else Path(job["judge"])
        self.timed: Timed | None = None
        self.calls: dict[int, tuple[Call, More]] = {}
        self.warm_ms: dict[int, float] = {}

    def answer(self, request: Answer) -> Answer:
        """Do what is asked."""
        from vzip.runtime.machine import timing

        if request["do"] == "open":
            return self._open(request["batches"])
        assert self.timed is not None, "open comes first"
        batch = request["batch"]
        if request["do"] == "warm":
            return self._warm(self.timed, batch)
        if request["do"] == "profile":
            return self._profile(self.timed, batch)
        call, more = self.calls[batch]
        calls = request["calls"]
        found = {"ms": timing.turn(call, calls=calls, settle=_settle(self.warm_ms[batch]))}
        return {**found, **{name: take(calls) for name, take in more.items()}}

    def _open(self, batches: list[int]) -> Answer:
        from vzip.export.bench import stacks
        from vzip.runtime.bundle.reader import read_bundle

        kinds: dict[str, Callable[[Stack, Bundle], Timed]] = {
            **dict.fromkeys(stacks.CEILINGS.values(), TimedCeiling),
            stacks.PREPROCESSING: TimedPreprocessing,
            **dict.fromkeys(stacks.COPIES, TimedCopies),
        }
        start = time.perf_counter()
        bundle = read_bundle(self.folder, verify=False)  # who opens it verifies what it runs
        make = kinds.get(self.stack.name, partial(TimedEncoder, judge=self.judge))
        self.timed = make(self.stack, bundle)
        opened = time.perf_counter() - start
        return {"open_s": opened, **self.timed.prove(batches)}

    def _profile(self, timed: Timed, batch: int) -> Answer:
        """Return where an engine's time goes; see `vzip.export.inspect.engine_profile`."""
        assert isinstance(timed, TimedEncoder), "an engine's stack"
        from vzip.export.inspect.engine_profile import profile_engine

        opened: Any = timed.encoder._opened
        found = profile_engine(opened, timed.bundle, batch)
        return dict(found.to_json())

    def _warm(self, timed: Timed, batch: int) -> Answer:
        from vzip.runtime.machine import timing
        from vzip.runtime.machine.process import peak_mib

        self.calls[batch] = timed.call(batch)
        call, _ = self.calls[batch]
        start = time.perf_counter()
        call()
        fit = int(WARM_S / (time.perf_counter() - start))
        calls = max(1, min(WARM_CALLS, fit))  # the proof ran it before
        warm = timing.warm_up(call, calls=calls, seconds=WARM_S)
        self.warm_ms[batch] = statistics.median(warm[len(warm) // 2 :])
        return {
            "warm_up_calls": 1 + len(warm),
            "warm_ms": self.warm_ms[batch],
            "peak_host_mib": peak_mib(),
            "python": platform.python_version(),
            "packages": _versions(),
            **timed.about(batch),
        }


def _settle(warm_ms: float) -> int:
    """Return the untimed calls at the start of a turn."""
    from vzip.runtime.machine import timing

    return 1 if warm_ms > SLOW_MS else timing.SETTLE_CALLS


def _said(agreement: Answer) -> str:
    """Return an agreement in one line."""
    shown = {
        name: f"{value:.6g}" if isinstance(value, float) else value
        for name, value in agreement.items()
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _versions() -> dict[str, str]:
    return {
        name: str(sys.modules[name].__version__)
        for name in _PACKAGES
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


def _die_with_the_parent() -> None:
    """Ask Linux to: a process that waits for its turn is stopped, and would stay for ever."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _main() -> None:
    arguments = sys.argv[1:]
    paths = []
    while arguments and arguments[0] == "--path":
        paths.append(arguments[1])
        arguments = arguments[2:]
    sys.path[:1] = paths  # instead of this file's folder
    _die_with_the_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    (job,) = arguments
    _serve(Worker(json.loads(job)), sys.stdin, answers)
    answers.flush()
    os._exit(0)  # libraries of GPUs like to crash as they are unloaded; all was said


if __name__ == "__main__":
    _main()
