"""Arrays in a GPU's memory that other libraries take without a copy."""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
from typing import Any, Final, Protocol

from vzip.runtime.errors import BackendError

_log = logging.getLogger(__name__)

CPU: Final = 1
CUDA: Final = 2
"""Device types of DLPack."""

_LEGACY_STREAM = 1  # DLPack's number of CUDA's default stream, and what None means there
_UNUSED = b"dltensor"
# DLPack's code and bits, and the typestr of the array interface.
_DTYPES: Final = {"float16": (2, 16, "<f2"), "float32": (2, 32, "<f4")}


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [
        ("tensor", _DLTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class Lender(Protocol):
    """Whose memory an array is."""

    def take_back(self, address: int, *, any_stream: bool) -> None:
        """Take back the memory of an array that is gone; see `DeviceBlocks.take_back`."""


class DeviceArray:
    """An array in device memory that is its holder's own, as numpy arrays are.

    It was complete when it was handed out, so a consumer may read it on any stream. Its memory is
    used again when this object and everything that was made from it by DLPack are gone, after the
    work on the consumer's stream that still reads it. Later calls of the encoder, and closing it,
    leave it alone. A consumer that reads it on more streams than the one that it took it on waits
    for those before it lets go, as with an array of its own.

    Attributes:
        shape: Extents.
        dtype: numpy's name of the element type.
        address: Address on the device.
    """

    def __init__(
        self, lender: Lender, address: int, shape: tuple[int, ...], dtype: str, kind: int = CUDA
    ) -> None:
        """Take over memory.

        Args:
            lender: Whose it is, and goes back to.
            address: Its address.
            shape: Extents of the array, C order.
            dtype: ``float16`` or ``float32``.
            kind: DLPack's device type.
        """
        self.shape = shape
        self.dtype = dtype
        self.address = address
        self._lender = lender
        self._any_stream = False
        self._kind = kind
        self._process = os.getpid()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        size = _DTYPES[self.dtype][1] // 8
        for extent in self.shape:
            size *= extent
        return size

    def keep_rows(self, count: int) -> None:
        """Cut the array to its first rows, before it is handed out."""
        self.shape = (count, *self.shape[1:])

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Return the array for Numba, CuPy and torch.as_tensor, version 3 of the protocol."""
        self._usable()
        self._any_stream = True  # the protocol has no word for the consumer's stream
        return {
            "shape": self.shape,
            "typestr": _DTYPES[self.dtype][2],
            "data": (self.address, False),
            "version": 3,
            "strides": None,
            "stream": None,  # complete already: nothing to wait for
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return DLPack's device type and number."""
        return self._kind, 0

    def __dlpack__(
        self,
        *,
        stream: int | None = None,  # the consumer's; complete already: nothing to wait for
        max_version: tuple[int, int] | None = None,  # unversioned, as every consumer takes it
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """Return the array as a DLPack capsule, which keeps it alive.

        Raises:
            BufferError: A copy, or another device, was asked for.
            BackendError: This is a fork of the process that the memory belongs to.
        """
        self._usable()
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError(
                f"got copy={copy} and dl_device={dl_device}, expected no copy and "
                f"{self.__dlpack_device__()}; copy it with the library that takes it"
            )
        if stream not in {None, _LEGACY_STREAM}:
            self._any_stream = True
        return _capsule(self)

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype} {list(self.shape)} at {self.address:#x})"

    def __del__(self) -> None:
        if os.getpid() != self._process:
            return  # the memory is the parent's
        try:
            self._lender.take_back(self.address, any_stream=self._any_stream)
        except BackendError as error:  # a dead device has freed everything
            _log.debug("could not free an array: %s", error)

    def _usable(self) -> None:
        """Refuse use in a fork."""
        if os.getpid() != self._process:
            raise BackendError(
                f"the array was made in process {self._process}, this is its fork {os.getpid()}",
                cause="device memory doesn't survive a fork",
                cure="open the bundle in this process",
            )


_lent: dict[int, tuple[object, ...]] = {}
"""What capsules that are alive need: their arrays, and the structures that C reads."""
_keys = itertools.count(1)


def _capsule(array: DeviceArray) -> object:
    """Return a capsule with a DLManagedTensor that keeps `array` alive until it is deleted."""
    rank = len(array.shape)
    strides = [1] * rank
    for axis in reversed(range(rank - 1)):
        strides[axis] = strides[axis + 1] * array.shape[axis + 1]
    extents, steps = (ctypes.c_int64 * rank)(*array.shape), (ctypes.c_int64 * rank)(*strides)
    code, bits, _ = _DTYPES[array.dtype]
    kind, device = array.__dlpack_device__()
    tensor = _DLTensor(array.address, kind, device, rank, code, bits, 1, extents, steps, 0)
    key = next(_keys)
    managed = _DLManagedTensor(tensor, key, ctypes.cast(_on_delete, ctypes.c_void_p))
    _lent[key] = (array, extents, steps, managed)
    return _new_capsule(ctypes.addressof(managed), _UNUSED, _on_destroy)


def _delete(managed: int) -> None:
    """Let go of what a capsule's consumer has finished with; called from any thread."""
    _lent.pop(_DLManagedTensor.from_address(managed).manager_ctx, None)


def _destroy(capsule: int) -> None:
    """Let go of what nobody consumed: Python destroys the capsule, whose consumer renames it."""
    if _is_valid(capsule, _UNUSED):
        _delete(_get_pointer(capsule, _UNUSED))


_on_delete = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_delete)
_on_destroy = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_destroy)

# The capsule that is being destroyed has no references left: addresses, never Python objects.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, type(_on_destroy)
)(("PyCapsule_New", ctypes.pythonapi))

# Tensors of other libraries may be deleted after this module was taken down at the process's end.
for _callback in (_on_delete, _on_destroy):
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_callback))
