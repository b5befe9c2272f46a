"""The Open Inference Protocol, version 2, with its binary tensors; no web framework is known here.

https://github.com/kserve/open-inference-protocol, and Triton's extension of binary data. Two models
are served: one takes what the graph takes, the other pictures as files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vzip.runtime.bundle.manifest import POSITIONS, RANK
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.guard import shown
from vzip.runtime.service.adapters.bodies import parsed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.runtime.bundle.manifest import Manifest, Tensor

HEADER_LENGTH: Final = "inference-header-content-length"
PICTURE: Final = "picture"
VERSION: Final = "1"
_NAMES: Final[Mapping[str, str]] = {
    "uint8": "UINT8", "float16": "FP16", "float32": "FP32", "int64": "INT64",
}  # fmt: skip
_BYTES: Final = "BYTES"


@dataclass(frozen=True)
class Inference:
    """A request, checked as far as the protocol goes.

    Attributes:
        id: The client's name of it; it comes back.
        inputs: Name → array; of BYTES a list.
        outputs: Name → whether it is wanted in binary.
    """

    id: str | None
    inputs: Mapping[str, NDArray[Any] | list[bytes]]
    outputs: Mapping[str, bool]


def model_metadata(name: str, manifest: Manifest, *, pictures: bool) -> dict[str, Any]:
    """Return what ``GET /v2/models/NAME`` says.

    Args:
        name: The model's name.
        manifest: The bundle's.
        pictures: Whether it takes pictures as files.
    """
    taken = (
        [{"name": PICTURE, "datatype": _BYTES, "shape": [-1]}]
        if pictures
        else [_metadata(each) for each in manifest.inputs]
    )
    return {
        "name": name,
        "versions": [VERSION],
        "platform": "vzip",
        "inputs": taken,
        "outputs": [_metadata(each) for each in manifest.outputs if given(each, pictures=pictures)],
    }


def given(output: Tensor, *, pictures: bool) -> bool:
    """Return whether the protocol hands on an output of the graph.

    Args:
        output: The output.
        pictures: Whether the model takes pictures as files.
    """
    # Ranks are for who wants fewer tokens. Of a picture in tiles there are several positions.
    return output.name != RANK and not (pictures and output.name == POSITIONS)


def _metadata(tensor: Tensor) -> dict[str, Any]:
    shape = [-1, *tensor.shape[1:]]
    return {"name": tensor.name, "datatype": _NAMES[tensor.dtype], "shape": shape}


def read_request(body: bytes, header_length: str | None, outputs: Sequence[str]) -> Inference:
    """Read a request.

    Args:
        body: Its body: JSON, then the binary tensors.
        header_length: What the header `HEADER_LENGTH` says; None without it.
        outputs: Names that may be asked for.

    Raises:
        InvalidInputError: It is none.
    """
    size = header_size(header_length, len(body))
    head, rest = parsed(body[:size]), memoryview(body)[size:]
    listed = head.get("inputs")
    if not isinstance(listed, list) or not listed or not all(isinstance(e, dict) for e in listed):
        raise InvalidInputError("'inputs' is no list of tensors", expected="one tensor or more")
    inputs: dict[str, NDArray[Any] | list[bytes]] = {}
    for each in listed:
        name = each.get("name")
        if not isinstance(name, str) or name in inputs:
            raise InvalidInputError(
                f"an input has the name {shown(name)!r}", expected="a text, once in the request"
            )
        value, rest = _input(name, each, rest)
        inputs[name] = value
    if len(rest):
        raise InvalidInputError(
            f"{len(rest)} bytes follow the last tensor",
            expected="as many as the inputs' binary_data_size say",
        )
    request_id = head.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InvalidInputError("'id' is no text", expected="a text, or none")
    return Inference(request_id, inputs, _wanted(head, outputs))


def write_response(
    model: str, inference: Inference, arrays: Mapping[str, NDArray[Any]]
) -> tuple[bytes, dict[str, str]]:
    """Return a response's body, and its headers."""
    described: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for name, binary in inference.outputs.items():
        array = np.ascontiguousarray(arrays[name])
        one: dict[str, Any] = {
            "name": name,
            "datatype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
        }
        if binary:
            blobs.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            one["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            one["data"] = array.ravel().tolist()
        described.append(one)
    head: dict[str, Any] = {"model_name": model, "model_version": VERSION, "outputs": described}
    if inference.id is not None:
        head["id"] = inference.id
    text = json.dumps(head, separators=(",", ":"), allow_nan=False).encode()
    if not blobs:
        return text, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join([text, *blobs]), headers


def header_size(stated: str | None, size: int) -> int:
    """Return how many bytes of a body are JSON.

    Args:
        stated: What the header `HEADER_LENGTH` says; None without it.
        size: Bytes of the body.

    Raises:
        InvalidInputError: The header says what can't be.
    """
    if stated is None:
        return size
    number = int(stated) if stated.isascii() and stated.isdigit() and len(stated) < 12 else -1
    if not 0 <= number <= size:
        raise InvalidInputError(
            f"Inference-Header-Content-Length is {shown(stated)!r}",
            expected=f"a number of bytes, at most the {size} of the body",
        )
    return number


def _input(
    name: str, described: Mapping[str, Any], rest: memoryview
) -> tuple[NDArray[Any] | list[bytes], memoryview]:
    """Return a tensor, and the binary data behind it."""
    where = f"the input {shown(name)!r}"
    shape = described.get("shape")
    if not isinstance(shape, list) or not all(type(e) is int and 0 <= e < 2**31 for e in shape):
        raise InvalidInputError(f"{where} has no shape", expected="a list of extents")
    kind = described.get("datatype")
    dtypes = {theirs: np.dtype(ours).newbyteorder("<") for ours, theirs in _NAMES.items()}
    if kind not in (*dtypes, _BYTES):
        raise InvalidInputError(
            f"{where} has the datatype {shown(kind)!r}",
            expected=f"one of {', '.join((*dtypes, _BYTES))}",
        )
    count = 1
    for extent in shape:
        count *= extent
    parameters = described.get("parameters", {})
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        data = described.get("data")
        if kind == _BYTES or not isinstance(data, list):
            raise InvalidInputError(
                f"{where} has no data", expected="'data', or binary data with its size"
            )
        return _listed(where, data, dtypes[kind], shape, count), rest
    if type(size) is not int or not 0 <= size <= len(rest):
        raise InvalidInputError(
            f"{where} has the binary_data_size {shown(size)}",
            expected=f"at most the {len(rest)} bytes that are left",
            cause="the request was cut off, or the size is wrong",
        )
    blob, rest = rest[:size], rest[size:]
    if kind == _BYTES:
        return _texts(where, blob, count), rest
    dtype = dtypes[kind]
    if count * dtype.itemsize != size:
        raise InvalidInputError(
            f"{where} has {size} bytes",
            expected=f"{count * dtype.itemsize} of {kind} {shape}",
        )
    return np.frombuffer(blob, dtype).reshape(shape).astype(
        dtype.newbyteorder("="), copy=False
    ), rest


def _listed(
    where: str, data: list[Any], dtype: np.dtype[Any], shape: list[int], count: int
) -> NDArray[Any]:
    """Return the tensor of a list of numbers, flat or nested."""
    try:
        array = np.array(data)
    except (ValueError, RecursionError, OverflowError) as error:
        array, why = np.array([]), str(error)[:200]
    else:
        why = f"it holds {array.size} values of {array.dtype}"
    fits = array.dtype.kind in "iuf" and array.size == count
    if fits and dtype.kind in "iu" and count:
        limits = np.iinfo(dtype)
        fits = array.dtype.kind != "f" and limits.min <= array.min() <= array.max() <= limits.max
    if not fits:
        raise InvalidInputError(
            f"{where} holds what is no tensor",
            expected=f"{count} numbers of {dtype.name} for {shape}",
            cause=why,
        )
    return array.astype(dtype.newbyteorder("=")).reshape(shape)


def _texts(where: str, blob: memoryview, count: int) -> list[bytes]:
    """Return elements of BYTES: each has its length in front, in four bytes."""
    found: list[bytes] = []
    while len(blob) and len(found) < count:
        (length,) = struct.unpack("<I", blob[:4]) if len(blob) >= 4 else (2**32,)
        if length > len(blob) - 4:
            break
        found.append(bytes(blob[4 : 4 + length]))
        blob = blob[4 + length :]
    if len(found) != count or len(blob):
        raise InvalidInputError(
            f"{where} holds {len(found)} whole elements",
            expected=f"{count}, each behind its length in 4 bytes",
        )
    return found


def _wanted(head: Mapping[str, Any], known: Sequence[str]) -> dict[str, bool]:
    """Return which outputs are wanted, and whether in binary."""
    parameters = head.get("parameters", {})
    binary = isinstance(parameters, dict) and parameters.get("binary_data_output") is True
    listed = head.get("outputs")
    if listed is None:
        return dict.fromkeys(known, binary)
    wanted: dict[str, bool] = {}
    for each in listed if isinstance(listed, list) else [None]:
        described = each if isinstance(each, dict) else {}
        name = str(described.get("name"))
        if name not in known or name in wanted:
            raise InvalidInputError(
                f"the output {shown(name)!r} is asked for", expected=f"some of {', '.join(known)}"
            )
        own = described.get("parameters", {})
        if not isinstance(own, dict) or own.get("classification"):
            raise InvalidInputError(
                f"the output {name!r} has parameters that aren't known here",
                expected="binary_data alone",
            )
        wanted[name] = own.get("binary_data", binary) is True
    return wanted
