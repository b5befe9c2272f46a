"""The record of a TensorRT engine in a bundle's manifest, checked when it is made.

An engine is compiled code for one GPU, one version of one library and one graph. The record says
which, so that a reader can refuse an engine before a library reads a byte of it; it also says how
it was built and what its proof against PyTorch gave. `docs/bundle.md` specifies the form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from vzip.runtime.bundle import checks
from vzip.runtime.bundle.precision_record import PRECISIONS, QUANTISED, Precision, Quantised

ENGINES_FOLDER: Final = "engines"
ENGINE_SUFFIX: Final = ".plan"
TIMING_CACHE: Final = "timing.cache"
LOCK_FILE: Final = ".lock"

STACKS: Final = ("tensorrt", "tensorrt_rtx")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION = re.compile(r"[0-9]{1,4}(\.[0-9]{1,5}){1,3}")
_SM = re.compile(r"[1-9][0-9]{1,2}")


def check_name(name: object) -> str:
    """Return `name` as the name of an engine, which is a part of a file's name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise checks.refuse(
            "engines", name, "names of letters, digits, '.', '_' and '-', at most 100"
        )
    return name


@dataclass(frozen=True)
class EngineBatch:
    """The optimization profile of an engine: how many images one call takes.

    Attributes:
        min: The smallest number.
        opt: The number the engine is tuned for.
        max: The largest number.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        checks.integer("engines.batch.min", self.min, low=1, high=2**16)
        checks.integer("engines.batch.opt", self.opt, low=self.min, high=2**16)
        checks.integer("engines.batch.max", self.max, low=self.opt, high=2**16)


@dataclass(frozen=True)
class EngineRecord:
    """What an engine is, and for what.

    Attributes:
        sha256: Digest of the engine's file.
        bytes: Size of the engine's file.
        stack: Python module that built it and that must run it.
        version: Version of that library, such as ``10.3.0.30``.
        gpu: Name of the GPU it was built on; None if it was built ahead of time, without one.
        sm: Compute capabilities it runs on, such as ``87`` for 8.7.
        jetpack: JetPack of the machine that built it; None where there is none.
        precision: Precision of the graph it was built from.
        batch: How many images one call takes.
        model_sha256: Digest of the graph it was built from: ``model.onnx``, or a quantised one.
        settings: Settings of the builder, by name.
        seconds: How long the build took.
        fused_attention: Layers of fused attention that the inspector confirmed; None if it can't
            tell.
        proof: Numbers of the comparison with PyTorch's tokens on the machine that built it, and its
            verdict ``passed``; None if it was not run there (ahead of time).
    """

    sha256: str
    bytes: int
    stack: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    gpu: str | None
    sm: tuple[str, ...]
    jetpack: str | None
    precision: Precision
    batch: EngineBatch
    model_sha256: str
    settings: Mapping[str, checks.Scalar]
    seconds: float
    fused_attention: int | None
    proof: Mapping[str, checks.Scalar] | None

    def __post_init__(self) -> None:
        checks.digest("engines.sha256", self.sha256)
        checks.integer("engines.bytes", self.bytes, low=1)
        checks.choice("engines.stack", self.stack, STACKS)
        _matching("engines.version", self.version, _VERSION, "a version such as '10.3.0.30'")
        for name, value in (("gpu", self.gpu), ("jetpack", self.jetpack)):
            if value is not None:
                checks.text(f"engines.{name}", value)
        if not isinstance(self.sm, tuple) or not self.sm:
            raise checks.refuse("engines.sm", self.sm, "a list of compute capabilities")
        for each in self.sm:
            _matching("engines.sm", each, _SM, "compute capabilities such as '87'")
        checks.choice("engines.precision", self.precision, PRECISIONS)
        if not isinstance(self.batch, EngineBatch):
            raise checks.refuse("engines.batch", self.batch, "an EngineBatch")
        checks.digest("engines.model_sha256", self.model_sha256)
        _check_scalars("settings", self.settings)
        seconds = checks.scalar("engines.seconds", self.seconds)
        if isinstance(seconds, (str, bool)) or seconds < 0:
            raise checks.refuse("engines.seconds", self.seconds, "a number of at least 0")
        if self.fused_attention is not None:
            checks.integer("engines.fused_attention", self.fused_attention, low=0)
        if self.proof is not None:
            _check_scalars("proof", self.proof)
            checks.boolean("engines.proof.passed", self.proof.get("passed"))

    @property
    def quantised(self) -> Quantised | None:
        """Which of the bundle's quantised graphs it was built from; None for its own."""
        return next((each for each in QUANTISED if each == self.precision), None)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values, in the order of `docs/bundle.md`."""
        return {
            **vars(self),
            "sm": list(self.sm),
            "batch": dict(vars(self.batch)),
            "settings": dict(self.settings),
            "proof": None if self.proof is None else dict(self.proof),
        }

    @classmethod
    def from_json(cls, where: str, value: object) -> EngineRecord:
        """Return the record that `value`, parsed JSON, describes.

        Args:
            where: Its place in the manifest, for messages.
            value: The JSON.

        Raises:
            BundleError: An unknown or missing key, a wrong type, or a value out of range.
        """
        values: dict[str, Any] = dict(checks.mapping(where, value, cls.__dataclass_fields__))
        batch = checks.mapping(f"{where}.batch", values["batch"], EngineBatch.__dataclass_fields__)
        sm = values["sm"]
        values["batch"] = EngineBatch(**dict[str, Any](batch))
        values["sm"] = tuple(sm) if isinstance(sm, list) else sm
        return cls(**values)


def _matching(where: str, value: object, pattern: re.Pattern[str], expected: str) -> None:
    """Refuse what is no text of the form of `pattern`."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise checks.refuse(where, value, expected)


def _check_scalars(name: str, values: object) -> None:
    """Refuse what is no flat mapping of names to scalars."""
    if not isinstance(values, Mapping):
        raise checks.refuse(f"engines.{name}", values, "an object")
    for key, value in values.items():
        checks.text(f"engines.{name}", key)
        checks.scalar(f"engines.{name}.{key}", value)
