"""Several processes that tune one projector together, as torchrun and accelerate start them."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from vzip.runtime.errors import InvalidInputError

# Reading and encoding images may keep one process busy long after another is done.
_PATIENCE: Final = dt.timedelta(hours=6)

_VARIABLES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Workers:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: Which one this is.
        count: How many there are.
        local: Which one on this machine; the number of its GPU.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls) -> Workers:
        """Read what torchrun or ``accelerate launch`` says; one process where they say nothing.

        Raises:
            InvalidInputError: They say it in part.
        """
        said = [os.environ.get(name) for name in _VARIABLES]
        if said[1] is None:
            return cls()
        try:
            rank, count, local = (int(str(value)) for value in said)
        except ValueError as error:
            raise InvalidInputError(
                f"got {', '.join(_VARIABLES)} = {said} in the environment",
                expected="three integers as torchrun sets them",
                cure="start vzip with torchrun, or unset WORLD_SIZE",
            ) from error
        return cls(rank, count, local)

    @property
    def first(self) -> bool:
        """Whether this process writes what all of them made."""
        return self.rank == 0

    @contextlib.contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Connect the processes, by NCCL on GPUs and Gloo on CPUs, and part at the end."""
        if self.count == 1:
            yield
            return
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=_PATIENCE)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes, in one exchange.

        Args:
            tensors: float32, of the same shapes in every process.
        """
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        place = 0
        for tensor in tensors:
            tensor.copy_(flat[place : place + tensor.numel()].view_as(tensor))
            place += tensor.numel()

    def gathered(self, value: Any) -> list[Any]:
        """Return every process's value, by rank; all of them wait for the last."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values
