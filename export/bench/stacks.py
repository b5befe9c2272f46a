"""What is timed, and how each is called: a bundle's own ways to run, peers, ceilings, phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from vzip.export.bench.peers import Device
from vzip.export.bench.peers.catalogue import PEERS
from vzip.runtime.backends import BACKENDS, OPENVINO, TENSORRT
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import InvalidInputError

KIND = Literal["ours", "peer", "ceiling", "phase"]

CEILINGS: Final[Mapping[Device, str]] = {"cpu": "ceiling", "cuda": "ceiling-cuda"}
PREPROCESSING: Final = "preprocessing"
COPIES: Final = ("host-to-device", "device-to-host")
FASTEST: Final = "fastest"
"""What stands for the precision of a CPU engine, whose linear layers may be in 8 bits."""
CPU_BACKENDS: Final = ("onnxruntime", "pytorch")
PICTURES: Final = ("china.jpg", "flower.jpg")
"""Of `vzip.export.pictures`: what preprocessing is timed with."""


@dataclass(frozen=True)
class Stack:
    """One thing that is timed, in a process of its own.

    Attributes:
        kind: ``ours`` (a backend of vzip), ``peer``, ``ceiling``, or ``phase``: what a call has
            beside the encoder.
        name: Of the backend, the peer or the phase.
        form: What it runs: a precision; an engine's name; a picture's.
        precision: Of what it runs, as far as it is known before.
        device: What it runs on.
    """

    kind: KIND
    name: str
    form: str
    precision: str
    device: Device

    def __str__(self) -> str:
        return f"{self.name}:{self.form}" if self.form else self.name

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


def own(bundle: Bundle) -> list[Stack]:
    """Return every backend, engine and precision of a bundle, whether or not it runs here."""
    manifest = bundle.manifest
    there = (manifest.precision, *manifest.precisions)
    stacks = [
        Stack("ours", TENSORRT, name, record.precision, "cuda")
        if record.cpu is None
        else Stack("ours", record.stack, name, FASTEST, "cpu")
        for name, record in manifest.engines.items()
    ]
    stacks += [Stack("ours", "onnxruntime-cuda", each, each, "cuda") for each in there]
    stacks += [Stack("ours", name, each, each, "cpu") for name in CPU_BACKENDS for each in there]
    # The backend `openvino` runs a graph just as the peer of that name does.
    assert {TENSORRT, "onnxruntime-cuda", OPENVINO, *CPU_BACKENDS} == set(BACKENDS)
    return stacks


def peers(device: Device, *, asked: bool = False) -> list[Stack]:
    """Return every peer on a device, in each of its precisions, and those of the CPU alone.

    Args:
        device: The best that the machine has.
        asked: Those that are timed where they are asked for by name alone, instead.
    """
    found = []
    for name, kind in PEERS.items():
        if kind.asked != asked:
            continue
        place: Device = device if kind.precisions(device) else "cpu"
        found += [Stack("peer", name, each, each, place) for each in kind.precisions(place)]
    return found


def named() -> list[Stack]:
    """Return the peers that run on the CPU where one asks for them by their whole name alone."""
    return [
        Stack("peer", name, each, each, "cpu")
        for name, kind in PEERS.items()
        for each in kind.named
    ]


def ceilings(stacks: Sequence[Stack], device: Device) -> list[Stack]:
    """Return the ceilings that stacks are set beside, one for each precision and device.

    Args:
        stacks: What is timed.
        device: The best that the machine has: none is measured on what isn't there.
    """
    wanted = dict.fromkeys(
        (ceiling_of(each.precision), each.device)
        for each in stacks
        if each.device in ("cpu", device)
    )
    return [
        Stack("ceiling", CEILINGS[place], precision, precision, place)
        for precision, place in wanted
        if precision is not None
    ]


def ceiling_of(precision: str) -> str | None:
    """Return the precision whose multiplications bound a stack; None where none is measured.

    A CPU engine is held to INT8's, whatever its form.
    """
    if precision == FASTEST:
        return "int8"
    return precision if precision in ("fp32", "fp16", "bf16", "int8") else None


def phases(device: Device) -> list[Stack]:
    """Return what a call has beside the encoder; on a CPU nothing is copied."""
    stacks = [Stack("phase", PREPROCESSING, each, "", "cpu") for each in PICTURES]
    copies = COPIES if device == "cuda" else ()
    return [*stacks, *(Stack("phase", each, "", "", device) for each in copies)]


def chosen(stacks: Sequence[Stack], names: Sequence[str]) -> list[Stack]:
    """Return those that are named, by ``name:form`` or by the name alone.

    Raises:
        InvalidInputError: There is none of that name.
    """
    for name in names:
        if not any(name in (str(each), each.name) for each in stacks):
            raise InvalidInputError(
                f"--only has {name!r}",
                expected=(
                    f"some of {', '.join(map(str, stacks))}, or a name without what follows its "
                    "colon for all of that name"
                ),
            )
    return [each for each in stacks if not {str(each), each.name}.isdisjoint(names)]
