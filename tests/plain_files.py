"""What stands in the place of a file and is none; each is made at a path."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest


class BlockedError(BaseException):
    """Nothing catches it on the way."""


@pytest.fixture
def quick() -> Iterator[None]:
    """Fail a test that waits."""

    def blocked(*_: object) -> NoReturn:
        raise BlockedError

    before = signal.signal(signal.SIGALRM, blocked)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_link_to_a_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's name is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("s")
        Path("s").rename(path.name)
    finally:
        os.chdir(here)


def a_folder(path: Path) -> None:
    path.mkdir()


KINDS = [a_fifo, a_link_to_a_fifo, a_device, a_socket, a_folder]
