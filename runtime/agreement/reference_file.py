"""`reference.npz`: what the untouched model says of a few pictures, read with sizes checked."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.agreement.floor import ROUNDOFF, floor_of
from vzip.runtime.agreement.found import (
    FLOOR,
    PICTURES,
    SCORES,
    SIMILARITY,
    WEIGHTS,
    Array,
    Outputs,
)
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, RANK, REFERENCE_FILE, Manifest
from vzip.runtime.bundle.reader import npy_header
from vzip.runtime.errors import BundleError, InvalidInputError
from vzip.runtime.guard import guarded

if TYPE_CHECKING:
    from vzip.runtime.bundle.reader import Bundle


_FLOOR: Final = "floor_"
"""What the names of the arrays begin with that hold a floor."""


@dataclass(frozen=True)
class Reference:
    """What the untouched model says of n pictures: the content of `reference.npz`.

    Attributes:
        input: uint8 [n, H, W, 3] or float32 [n, 3, H, W], as the graph takes it.
        kept: int64 [n, dominant].
        scores: float32 [n, N], one per patch.
        embeds: float32 or float16 [n, K, L].
        floors: Precision → float32 [n, K, 2]: the error, and 1 minus the cosine, of each token of
            the untouched model that computes in this precision, as `Values` has them. Empty in
            bundles that were exported before it was measured.
        rank: int64 [n, K], the step of each kept token of a greedy selection, else None.
        similarity: float16 [n, N, N], see `Objective`; None where there is no rank.
        weights: float32 [n, N], likewise; None also where picks are to be far apart.
    """

    input: Array
    kept: NDArray[np.int64]
    scores: Array
    embeds: Array
    floors: Mapping[str, Array] = field(default_factory=dict)
    rank: NDArray[np.int64] | None = None
    similarity: Array | None = None
    weights: Array | None = None

    def outputs(self, pictures: Sequence[int], precision: str | None = None) -> Outputs:
        """Return what is right for some of the pictures, for `compare`.

        Args:
            pictures: Which of them.
            precision: Of what is to be judged, for what rounding alone costs; None leaves it out.
        """
        chosen = list(pictures)
        found = {
            EMBEDS: self.embeds[chosen],
            KEPT: self.kept[chosen],
            SCORES: self.scores[chosen],
            PICTURES: np.array(chosen),
        }
        found |= {name: array[chosen] for name, array in self._greedy().items()}
        floor = None if precision is None else floor_of(self.floors, precision)
        return found if floor is None else {**found, FLOOR: floor[chosen]}

    def to_arrays(self) -> dict[str, Array]:
        """Return the arrays of the file, by name."""
        return {
            "input": self.input,
            "kept": self.kept,
            "scores": self.scores,
            "embeds": self.embeds,
            **{f"{_FLOOR}{name}": array for name, array in self.floors.items()},
            **self._greedy(),
        }

    def _greedy(self) -> dict[str, Array]:
        """Return the arrays that greedy selections alone have, by name."""
        every = {RANK: self.rank, SIMILARITY: self.similarity, WEIGHTS: self.weights}
        return {name: array for name, array in every.items() if array is not None}


def load_reference(bundle: Bundle) -> Reference:
    """Read a bundle's `reference.npz`, after checking its digest.

    Raises:
        InvalidInputError: The bundle was exported without it.
        BundleError: It is damaged, or not what the graph takes and gives.
    """
    if REFERENCE_FILE not in bundle.manifest.files:
        raise InvalidInputError(
            f"{bundle.path} has no {REFERENCE_FILE}",
            expected="the untouched model's tokens to compare with",
            cause="it was exported with --no-check",
            cure="export it again without --no-check",
        )
    with bundle.open_file(REFERENCE_FILE) as file:
        return read_reference(file, bundle.manifest)


def read_reference(data: Any, manifest: Manifest) -> Reference:
    """Read the content of `reference.npz`, whose digest was already checked.

    Args:
        data: The file, open for reading in binary.
        manifest: Of the bundle.

    Raises:
        BundleError: It isn't what the manifest's graph takes and gives.
    """
    with (
        guarded(
            BundleError,
            f"{REFERENCE_FILE} can't be read",
            expected="an archive of numpy arrays",
            cure="export the bundle again",
        ),
        zipfile.ZipFile(data) as archive,
    ):
        found = _arrays(archive, data, manifest)
    floors = {name: found.pop(f"{_FLOOR}{name}", None) for name in ROUNDOFF}
    known = {name: array for name, array in floors.items() if array is not None}
    return Reference(**found, floors=known)


def _arrays(archive: zipfile.ZipFile, data: Any, manifest: Manifest) -> dict[str, Array]:
    """Return the arrays of `reference.npz`, each checked before memory is taken for it."""
    members = {each.filename: each for each in archive.infolist()}
    room = data.seek(0, os.SEEK_END)
    headers: dict[str, tuple[tuple[int, ...], np.dtype[Any], int]] = {}
    floors = [f"{_FLOOR}{each}" for each in ROUNDOFF]
    for name in ("input", "kept", "scores", "embeds", *floors, RANK, SIMILARITY, WEIGHTS):
        member = members.get(f"{name}.npy")
        if member is None:
            continue
        with archive.open(member) as file:
            shape, dtype = npy_header(file, f"{REFERENCE_FILE}: '{name}'", "an array")  # type: ignore[arg-type]
            begin = file.tell()
        # vzip packs nothing; an array that is packed may be of any size.
        size = math.prod(shape) * dtype.itemsize
        packed = member.compress_type != zipfile.ZIP_STORED
        if packed or begin + size != member.file_size or member.file_size > room:
            raise BundleError(
                f"{REFERENCE_FILE} has {member.file_size} {'packed ' * packed}bytes for '{name}', "
                f"{dtype} {list(shape)}",
                expected="the bytes of the array as they are",
                cause="it was made by another tool",
                cure="export the bundle again",
            )
        headers[name] = shape, dtype, begin
    count = headers["input"][0][0] if "input" in headers and headers["input"][0] else 0
    expected: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
        "input": ((count, *manifest.input.shape[1:]), (manifest.input.dtype,)),
        "kept": ((count, manifest.selection.dominant), ("int64",)),
        "scores": ((count, manifest.tower.grid[0] * manifest.tower.grid[1]), ("float32",)),
        "embeds": ((count, *manifest.embeds.shape[1:]), ("float32", "float16")),
    }
    tokens, patches = manifest.selection.tokens, manifest.tower.grid[0] * manifest.tower.grid[1]
    may_be: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
        **dict.fromkeys(floors, ((count, tokens, 2), ("float32",))),  # not in bundles of before
        RANK: ((count, tokens), ("int64",)),
        SIMILARITY: ((count, patches, patches), ("float16",)),
        WEIGHTS: ((count, patches), ("float32",)),
    }
    there = {name for name in may_be if name in headers}
    if {RANK, SIMILARITY, WEIGHTS} & there:  # one means nothing without the other
        there |= {RANK, SIMILARITY}
    expected |= {name: each for name, each in may_be.items() if name in there}
    found = {}
    for name, (wanted, dtypes) in expected.items():
        got = headers.get(name)
        if got is None or got[0] != wanted or got[1].name not in dtypes or not count:
            shown = "nothing" if got is None else f"{got[1]} {list(got[0])}"
            raise BundleError(
                f"{REFERENCE_FILE} has {shown} for '{name}'",
                expected=f"{' or '.join(dtypes)} {[*wanted]} of at least one picture",
                cure="export the bundle again",
            )
        shape, dtype, begin = got
        with archive.open(f"{name}.npy") as file:
            file.seek(begin)
            array = np.empty(shape, dtype)
            array.reshape(-1).view(np.uint8)[:] = np.frombuffer(file.read(), np.uint8)
        found[name] = array
    return found
