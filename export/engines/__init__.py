"""Engines: a bundle's graph compiled for one machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vzip.runtime import console
from vzip.runtime.errors import BackendError, InvalidInputError, ParityError
from vzip.runtime.files.outputs import check_file
from vzip.runtime.guard import door

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vzip.export.engines.published import BuiltEngine
    from vzip.export.engines.tensorrt.request import BuildRequest


@door(BackendError, "no engine of the bundle '{bundle}' can be built", reads=False)
def build(
    bundle: str | os.PathLike[str],
    *,
    cpu: bool = False,
    name: str | None = None,
    precision: str | None = None,
    workspace_mib: int | None = None,
    builder_optimization_level: int | None = None,
    opt_batch: int | None = None,
    low_memory: bool = False,
    safer: bool = False,
    rtx: str | None = None,
    unproven: bool = False,
    log: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = console.say,
) -> BuiltEngine:
    """Build an engine from a bundle on the machine that will run it, and put it into the bundle.

    The engine's tokens are compared with PyTorch's, which the bundle holds. An engine whose tokens
    differ is not kept, and what was in the bundle before is untouched. An engine that is there
    already, the same in every respect, is not built again.

    Args:
        bundle: The folder of the bundle.
        cpu: Make an engine for this machine's CPU instead of a GPU: the form of the bundle's graph
            that is measured to be the fastest of those whose tokens agree (`docs/fastest.md`). All
            options below but `name` and `opt_batch` are TensorRT's and are refused.
        name: The engine's name; None for one after TensorRT and the GPU, or after the processor.
        precision: Of the graph to build from: ``int8`` or ``fp8``, which `vzip calibrate` made;
            ``auto`` builds from the bundle's own graph and from those, and keeps of those an engine
            that runs faster on this machine; None for the bundle's own graph.
        workspace_mib: Limit in MiB for the builder's scratch memory; None for TensorRT's own.
        builder_optimization_level: From 0 (quick) to 5 (searches longest); None for TensorRT's own.
        opt_batch: Batch that the engine is tuned for, where the graph's batch is open; None for the
            largest, on a CPU for one picture and for eight alike.
        low_memory: Build with little memory, for modules with 4 or 8 GB; what can't fit is not
            started.
        safer: If the tokens differ, try settings that are slower and safer.
        rtx: Build with TensorRT-RTX for these GPUs, such as ``sm86,sm89``, without having one. Such
            an engine is not compared with PyTorch.
        unproven: Build from a bundle whose graph differs from PyTorch's by its last parity check.
        log: File, ending with ``.log`` or ``.txt``, for all that TensorRT says, up to 32 MiB. None
            for ``engines/NAME.log`` in the bundle, which stays there only if the build fails.
        say: Told, in lines, what goes on.

    Returns:
        The engine; with ``auto`` the fastest.

    Raises:
        InvalidInputError: An option that doesn't fit.
        BundleError: The bundle is damaged.
        MissingDependencyError: TensorRT is not installed; or, with `cpu`, ONNX Runtime or onnx_ir.
        BackendError: There is no GPU, or the graph can't be built.
        ParityError: The engine's tokens differ from PyTorch's, or the bundle's own graph's do.
    """
    _check_parity(bundle, unproven=unproven, say=say)
    if cpu:
        given = {
            "precision (--precision)": precision,
            "workspace_mib (--workspace)": workspace_mib,
            "builder_optimization_level (--builder-optimization-level)": builder_optimization_level,
            "low_memory (--low-memory)": low_memory or None,
            "safer (--safer)": safer or None,
            "rtx (--rtx)": rtx,
            "log (--log)": log,
        }
        others = [each for each in given if given[each] is not None]
        return _build_cpu(bundle, name, opt_batch, others, say)
    from vzip.export.engines.tensorrt.auto import AUTO
    from vzip.export.engines.tensorrt.request import BuildRequest

    request = BuildRequest(
        name=name,
        workspace_mib=workspace_mib,
        level=builder_optimization_level,
        opt_batch=opt_batch,
        low_memory=low_memory,
        rtx=rtx,
        safer=safer,
        precision=None if precision == AUTO else precision,
        log=None if log is None else check_file(log, ".log", ".txt"),
    )
    return _build_for_gpu(bundle, request, say, best=precision == AUTO)


def _build_for_gpu(
    bundle: str | os.PathLike[str],
    request: BuildRequest,
    say: Callable[[str], None],
    *,
    best: bool,
) -> BuiltEngine:
    """Build an engine of TensorRT's; `best` takes the precision that is measured to be fastest."""
    from vzip.export.engines.tensorrt.auto import build_best
    from vzip.export.engines.tensorrt.publish import build_engine

    if best:
        engine, built = build_best(bundle, request, say=say)
    else:
        engine = build_engine(bundle, request, say=say)
        built = [engine]
    for each in built:
        if each.reused:
            say(f"'{each.name}' is there already, the same in every respect; it was not built")
    if best:
        say(f"the fastest that agrees is '{engine.name}'")
    if (quantised := engine.record.quantised) is not None:
        say(f"to run it, open the bundle with --precision {quantised} (precision='{quantised}')")
    return engine


def _check_parity(
    path: str | os.PathLike[str], *, unproven: bool, say: Callable[[str], None]
) -> None:
    """Refuse a bundle whose graph was found to differ from the untouched model.

    An engine is compared with the model's tokens too, but by a gate that is wider than a graph's.
    """
    from vzip.runtime.agreement import missed_shown
    from vzip.runtime.bundle.reader import read_bundle

    bundle = read_bundle(path, verify=False)
    parity = bundle.manifest.parity
    if parity is None or parity["passed"] is True:
        return
    missed = missed_shown(parity, bundle.manifest) or "it doesn't say by what"
    found = f"{bundle.path}: its graph failed its parity check ({missed})"
    if not unproven:
        raise ParityError(
            found,
            expected="a graph whose tokens are the untouched model's",
            cause="an engine of it would be as wrong",
            cure="export the bundle again, or build it all the same with unproven (--unproven)",
        )
    say(f"warning: {found}; the engine is built all the same")


def _build_cpu(
    bundle: str | os.PathLike[str],
    name: str | None,
    batch: int | None,
    others: Sequence[str],
    say: Callable[[str], None],
) -> BuiltEngine:
    """Make a CPU engine; `others` are the options for GPUs that were given."""
    if others:
        raise InvalidInputError(
            f"got cpu (--cpu) together with {', '.join(others)}",
            expected="no other options than name and opt_batch (--name, --opt-batch)",
            cause="only TensorRT has the others",
            cure="leave them out",
        )
    from vzip.export.engines.cpu.making import build_cpu

    engine = build_cpu(bundle, name, batch=batch, say=say)
    if engine.reused:
        say(f"'{engine.name}' is there already, the same in every respect; it was not made again")
    return engine
