"""What the installed TensorRT can do: one place that knows how 8.6, 10, 11 and TensorRT-RTX differ.

NVIDIA renumbered enumerations at 10 and at 11 and took things away, so nothing here is a number or
follows from a version: every ability is looked for by name on the module itself. The names were
compared with the wheels of 8.6.0, 10.3.0, 10.13.3, 11.4.0 and TensorRT-RTX 1.7.1
(`tests/golden/trt_names.json` holds the lists).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from vzip.runtime.backends.tensorrt.bindings import INSTALL, TITLES, import_bindings, version_of
from vzip.runtime.errors import BackendError, InvalidInputError, MissingDependencyError

BindingsName = Literal["tensorrt", "tensorrt_rtx"]

_EXTERNAL_TACTICS = ("CUBLAS", "CUBLAS_LT", "CUDNN")
_SM = re.compile(r"SM(\d{2,3})")


@dataclass(frozen=True)
class Abilities:
    """What a TensorRT module offers, as far as a build needs to know.

    Attributes:
        strongly_typed_flag: A network can be asked to be strongly typed (10 and newer, RTX); 11 has
            the flag, and networks are without it too.
        weakly_typed: Precision can still be a matter of builder flags (8, and 10 if asked).
        explicit_batch_flag: Networks need the flag EXPLICIT_BATCH (8).
        precision_constraints: Layers can be held to a precision (8, and 10 weakly typed).
        timing_cache: Timings are kept in a cache; in TensorRT-RTX that does nothing.
        editable_timing_cache: A cache makes builds repeatable (10.8 and newer).
        progress_monitor: A build tells how far it is (10 and newer, RTX).
        ahead_of_time: Compute capabilities that can be built for without a GPU, as ``86`` for 8.6.
        external_tactics: Libraries that tactics may come from and that cost memory to load.
        profile_sharing: Contexts share an optimization profile only if the engine is built for it
            (8.6); later versions always do, and still have the name.
        user_allocation: An engine can be had that never allocates while it runs, so that it can be
            captured in a CUDA graph (TensorRT-RTX).
    """

    strongly_typed_flag: bool
    weakly_typed: bool
    explicit_batch_flag: bool
    precision_constraints: bool
    timing_cache: bool
    editable_timing_cache: bool
    progress_monitor: bool
    ahead_of_time: tuple[str, ...]
    external_tactics: tuple[str, ...]
    profile_sharing: bool
    user_allocation: bool

    @property
    def strongly_typed(self) -> bool:
        """Whether networks are strongly typed: where it can be asked for, and where it's all."""
        return self.strongly_typed_flag or not self.weakly_typed


@dataclass(frozen=True)
class Bindings:
    """A TensorRT that was imported.

    Attributes:
        name: Name of the Python module.
        module: The module.
        version: Its version, such as ``10.3.0.30``.
        can: Its abilities.
    """

    name: BindingsName
    module: Any
    version: str
    can: Abilities

    def __str__(self) -> str:
        return f"{TITLES[self.name]} {self.version}"


def load_bindings(name: BindingsName) -> Bindings:
    """Import one TensorRT and look at what it can do.

    Args:
        name: The Python module.

    Raises:
        MissingDependencyError: It isn't installed, or a library that it needs can't be loaded;
            the message names that library.
        BackendError: The module is no TensorRT that vzip can build with.
    """
    module = import_bindings(name)
    version = version_of(module)
    for attribute in ("Builder", "OnnxParser", "Runtime", "BuilderFlag", "MemoryPoolType"):
        if not hasattr(module, attribute):
            raise BackendError(
                f"the module {name} {version} has no {attribute}",
                expected="TensorRT 8.6 or newer with its ONNX parser",
                cause="only a part is installed (a lean or dispatch runtime?)",
                cure=INSTALL[name],
            )
    return Bindings(name, module, version, abilities(module, name))


def installed_bindings(*, ahead_of_time: bool) -> Bindings:
    """Return the TensorRT to build with: the only one for ahead of time, the first one otherwise.

    One that is installed and can't be imported is an error, not a reason to take the other.

    Raises:
        MissingDependencyError: None is installed, or a library of one is missing.
    """
    if ahead_of_time:
        return load_bindings("tensorrt_rtx")
    try:
        return load_bindings("tensorrt")
    except MissingDependencyError as error:
        if not _absent(error.__cause__, "tensorrt"):
            raise
    try:
        return load_bindings("tensorrt_rtx")
    except MissingDependencyError as error:
        if not _absent(error.__cause__, "tensorrt_rtx"):
            raise
        raise MissingDependencyError(
            "building an engine needs the package 'tensorrt' (or 'tensorrt_rtx'), and neither is "
            "installed in this environment",
            cure=INSTALL["tensorrt"],
        ) from error


def abilities(module: Any, name: BindingsName) -> Abilities:
    """Return what a TensorRT module can do, by the names that it has."""
    creation = getattr(module, "NetworkDefinitionCreationFlag", None)
    flags, config = module.BuilderFlag, module.IBuilderConfig
    sources = getattr(module, "TacticSource", None)
    preview = getattr(module, "PreviewFeature", None)
    strongly_typed_flag = hasattr(creation, "STRONGLY_TYPED")
    capabilities: tuple[str, ...] = ()
    if hasattr(config, "set_compute_capability"):
        capabilities = _capabilities(getattr(module, "ComputeCapability", None))
    return Abilities(
        strongly_typed_flag=strongly_typed_flag,
        weakly_typed=hasattr(flags, "FP16"),
        explicit_batch_flag=hasattr(creation, "EXPLICIT_BATCH"),
        precision_constraints=hasattr(flags, "OBEY_PRECISION_CONSTRAINTS"),
        timing_cache=name == "tensorrt" and hasattr(config, "create_timing_cache"),
        editable_timing_cache=name == "tensorrt" and hasattr(flags, "EDITABLE_TIMING_CACHE"),
        progress_monitor=hasattr(module, "IProgressMonitor"),
        ahead_of_time=capabilities,
        external_tactics=tuple(each for each in _EXTERNAL_TACTICS if hasattr(sources, each)),
        profile_sharing=not strongly_typed_flag and hasattr(preview, "PROFILE_SHARING_0806"),
        user_allocation=hasattr(flags, "REQUIRE_USER_ALLOCATION"),
    )


def capabilities_of(text: str, bindings: Bindings) -> tuple[str, ...]:
    """Return the compute capabilities that a user named, ``sm86,sm89`` or ``8.6,8.9``.

    Args:
        text: Names separated by commas.
        bindings: What is to build for them.

    Returns:
        As ``86``, ascending, without duplicates.

    Raises:
        InvalidInputError: A name that is none, or a GPU that TensorRT can't build for.
    """
    known = bindings.can.ahead_of_time
    if not known:
        raise InvalidInputError(
            f"{bindings} can't build without a GPU",
            cause="TensorRT-RTX can",
            cure=INSTALL["tensorrt_rtx"],
        )
    chosen = set()
    for word in text.split(","):
        match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", word.strip().lower())
        if match is None:
            raise InvalidInputError(
                f"rtx (--rtx) has {word.strip()!r}",
                expected=f"compute capabilities such as 'sm86,sm89', of {_names(known)}",
            )
        number = match[1] + match[2]
        if number not in known:
            raise InvalidInputError(
                f"rtx (--rtx) has {word.strip()!r}",
                expected=f"what {bindings} builds for without a GPU: {_names(known)}",
                cure="build on the machine itself for any other GPU (a Jetson, a data center GPU)",
            )
        chosen.add(number)
    return tuple(sorted(chosen, key=int))


def _names(capabilities: tuple[str, ...]) -> str:
    return ", ".join(f"sm{each}" for each in capabilities)


def _capabilities(enumeration: Any) -> tuple[str, ...]:
    """Return the members of ComputeCapability that are GPUs, as ``86``."""
    matches = (_SM.fullmatch(name) for name in getattr(enumeration, "__members__", ()))
    return tuple(sorted((match[1] for match in matches if match), key=int))


def _absent(error: BaseException | None, name: str) -> bool:
    """Return whether a module isn't installed at all, as opposed to broken."""
    return isinstance(error, ModuleNotFoundError) and error.name == name
