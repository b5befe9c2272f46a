"""The proof of an engine that isn't published yet, run by the runtime's own TensorRT backend."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vzip.runtime.agreement import ENGINE, Proof, load_reference, prove
from vzip.runtime.bundle.engine_record import ENGINE_SUFFIX, ENGINES_FOLDER, EngineRecord
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BundleError
from vzip.runtime.files import atomic

if TYPE_CHECKING:
    from vzip.runtime.backends.tensorrt.backend import TensorRt

_NAME = "unproven"


def prove_engine(
    bundle: Bundle,
    record: EngineRecord,
    plan: memoryview,
    kernels: Callable[[bytes], None] = lambda _: None,
) -> Proof:
    """Run an engine on the bundle's reference pictures and judge what it gives.

    It runs in the smallest and the largest batch that it takes, in each twice: the first run is
    enqueued plainly, and from the second on a captured CUDA graph computes, as it will in use.

    Args:
        bundle: The bundle; it has a `reference.npz`.
        record: What the engine is.
        plan: The engine.
        kernels: Given what TensorRT-RTX compiled for this GPU meanwhile.

    Raises:
        BundleError: The reference is damaged.
        BackendError: The engine can't be loaded or run.
    """
    reference = load_reference(bundle)
    manifest = bundle.manifest
    with open_staged(bundle, record, plan) as backend:
        sizes = sorted({record.batch.min, record.batch.max})
        proof = prove(
            lambda array: backend.run({manifest.input.name: array}),
            reference,
            manifest,
            [*sizes, *sizes],
            ENGINE[record.precision],
        )
        if record.stack == "tensorrt_rtx" and (compiled := backend.kernels()):
            kernels(compiled)
        return proof


@contextlib.contextmanager
def open_staged(bundle: Bundle, record: EngineRecord, plan: memoryview) -> Iterator[TensorRt]:
    """Open an engine that isn't published yet with the runtime's own backend.

    Raises:
        BackendError: The engine can't be loaded.
    """
    from vzip.runtime.backends.tensorrt.backend import TensorRt

    with (
        staged(bundle, record, plan) as candidate,
        contextlib.closing(TensorRt(candidate, engine=_NAME)) as backend,
    ):
        yield backend


@contextlib.contextmanager
def staged(bundle: Bundle, record: EngineRecord, plan: memoryview) -> Iterator[Bundle]:
    """Put an engine where the runtime can open it and nobody else looks.

    Called with the builder's lock held: what other builders left when they were killed is removed.
    """
    engines = bundle.path / ENGINES_FOLDER
    for left in engines.glob(f".*{atomic.TEMPORARY}"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=engines, prefix=".", suffix=atomic.TEMPORARY) as name:
        folder = Path(name)
        try:
            (folder / ENGINES_FOLDER).mkdir()
            (folder / ENGINES_FOLDER / f"{_NAME}{ENGINE_SUFFIX}").write_bytes(plan)
        except OSError as error:
            raise BundleError(
                f"{engines}: the engine can't be written ({error.strerror}) to be proven",
                cure=f"free {2 * record.bytes // 2**20 + 1} MiB. Nothing was left behind",
            ) from error
        manifest = dataclasses.replace(bundle.manifest, engines={_NAME: record})
        yield Bundle(folder, manifest, record.quantised)
