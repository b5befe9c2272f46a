"""Device memory that callers hold for a while: handed out again, not freed, when they let go.

cudaFree waits for everything that the device does, so freeing the tokens of each picture would
stall the language model that shares the GPU.
"""

from __future__ import annotations

import logging
import os
from typing import Final

from vzip.runtime.backends.tensorrt.cuda import DEFAULT_STREAM, Cuda, CudaError

_log = logging.getLogger(__name__)

MOST_FREE: Final = 8
"""Blocks of one size that wait to be used again; more are freed when the next one is asked for."""

_SMALLEST: Final = 256


class DeviceBlocks:
    """Blocks of device memory, of sizes that are powers of two.

    A block comes back in whichever thread and at whichever moment its array goes: that takes no
    lock and calls nothing of CUDA's, as long as this isn't closed. Whoever let go of it may have
    work under way that still reads it. On the default stream, which is PyTorch's, an event marks
    that work, and the next writer waits for the event on the device (`order`). A block that went to
    any other stream is freed in the next call, which waits for the whole device.
    """

    def __init__(self, cuda: Cuda) -> None:
        """Prepare to lend; memory is taken when it is first needed."""
        self._cuda = cuda
        self._free: dict[int, list[int]] = {}  # size → addresses
        self._elsewhere: list[int] = []  # to be freed: they went to streams that nobody knows
        self._sizes: dict[int, int] = {}
        self._event: int | None = None
        self._marked = False
        self._closed = False
        self._process = os.getpid()

    def take(self, size: int) -> int:
        """Return the address of a block of at least `size` bytes; one caller at a time.

        Raises:
            CudaError: Memory is short, even without the blocks that wait here.
        """
        self._trim()
        size = max(_SMALLEST, 1 << (size - 1).bit_length())
        waiting = self._free.setdefault(size, [])
        if waiting and self._mark():
            return waiting.pop()
        try:
            address = self._cuda.malloc(size)
        except CudaError as error:
            if error.sticky or not any(self._free.values()):
                raise
            self._drain()
            address = self._cuda.malloc(size)
        self._sizes[address] = size
        return address

    def order(self, stream: int) -> None:
        """Let a stream wait for those who used the block that was taken last, before it writes."""
        if self._marked:
            assert self._event is not None
            self._cuda.stream_wait_event(stream, self._event)
            self._marked = False

    def take_back(self, address: int, *, any_stream: bool) -> None:
        """Take a block whose array is gone.

        Args:
            address: The block's.
            any_stream: Whether it may be in use on another stream than the default one.
        """
        if os.getpid() != self._process:
            return  # it is the parent's
        (self._elsewhere if any_stream else self._free[self._sizes[address]]).append(address)
        if self._closed:
            self._drain()

    def close(self) -> None:
        """Free every block that waits here; others are freed when they come back."""
        self._closed = True
        self._drain()
        if self._event is not None:
            event, self._event = self._event, None
            try:
                self._cuda.event_destroy(event)
            except CudaError as error:
                _log.debug("could not destroy an event: %s", error)

    def _mark(self) -> bool:
        """Mark what is under way on the default stream.

        Returns:
            False where CUDA refuses to, as it may while somebody captures there.
        """
        try:
            if self._event is None:
                self._event = self._cuda.event_create()
            self._cuda.event_record(self._event, DEFAULT_STREAM)
        except CudaError as error:
            if error.sticky:
                raise
            return False
        self._marked = True
        return True

    def _trim(self) -> None:
        self._empty(self._elsewhere)
        for waiting in self._free.values():
            self._empty(waiting, MOST_FREE)

    def _drain(self) -> None:
        self._empty(self._elsewhere)
        for waiting in self._free.values():
            self._empty(waiting)

    def _empty(self, addresses: list[int], leave: int = 0) -> None:
        """Free blocks; steps on a list are atomic, so that any thread may come by."""
        while len(addresses) > leave:
            try:
                address = addresses.pop()
            except IndexError:  # another thread took the last one
                return
            self._sizes.pop(address, None)
            try:
                with self._cuda.on_device():
                    self._cuda.free(address)
            except CudaError as error:  # a dead device has freed everything
                _log.debug("could not free an array: %s", error)
