"""Results in pinned host memory that a GPU writes and a caller keeps: no copy in between."""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.backends.tensorrt.cuda import Cuda, CudaError

_log = logging.getLogger(__name__)

MOST_LENT: Final = 4
"""Blocks of a kind that may be out at a time; pinned memory is memory that others can't use."""


class Lending:
    """Blocks of pinned memory of one size, lent as arrays and used again when those are gone.

    A block comes back when the last array that looks into it goes, in whichever thread and at
    whichever moment that is: so nothing here takes a lock. Steps on the list of free blocks are
    atomic, and whoever finds the lending closed frees what is in it.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Prepare to lend; memory is taken when it is first needed.

        Args:
            cuda: What gives and frees the memory.
            shape: Of the arrays.
            dtype: Of the arrays.
        """
        self._cuda = cuda
        self._shape, self._dtype = shape, dtype
        self._kind = ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)
        self._free: list[int] = []
        self._next: int | None = None
        self._made = 0
        self._closed = False
        self._process = os.getpid()

    def address(self) -> int | None:
        """Return where the next array will be; None if `MOST_LENT` are out.

        It stays the same until `lend` was called, so that a call that fails loses nothing. One
        caller at a time.

        Raises:
            CudaError: Memory is short.
        """
        if self._next is None:
            if self._free:
                self._next = self._free.pop()
            elif self._made < MOST_LENT:
                self._next = self._cuda.host_alloc(ctypes.sizeof(self._kind))
                self._made += 1
        return self._next

    def lend(self) -> NDArray[Any]:
        """Return the array at `address`, for good."""
        assert self._next is not None
        address, self._next = self._next, None
        memory = self._kind.from_address(address)
        # Holds this object, not the backend; the end of the process takes all memory anyway.
        weakref.finalize(memory, self._back, address).atexit = False
        array: NDArray[Any] = np.frombuffer(memoryview(memory), self._dtype).reshape(self._shape)
        return array

    def close(self) -> None:
        """Free every block that isn't lent; those that are go when they come back."""
        self._closed = True
        if self._next is not None:
            self._free.append(self._next)
            self._next = None
        self._drain()

    def _back(self, address: int) -> None:
        """Take a block whose last array is gone."""
        self._free.append(address)
        if self._closed:
            self._drain()

    def _drain(self) -> None:
        """Free what is here; what is in a fork is the parent's."""
        while self._free and os.getpid() == self._process:
            try:
                address = self._free.pop()
            except IndexError:  # another thread took the last one
                return
            try:
                self._cuda.host_free(address)
            except CudaError as error:  # a dead device has freed everything
                _log.debug("could not free a result: %s", error)
