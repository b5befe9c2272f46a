"""Open an encoder, fork, use it in the child, end the child in the ordinary way.

Run by `test_backends.py` in a process of its own: `fork_child.py BUNDLE BACKEND`.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable

import numpy as np

from vzip.runtime import VisionEncoder
from vzip.runtime.errors import BackendError

IMAGE = np.zeros((1, 16, 16, 3), np.uint8)


def say(text: str) -> None:
    """Write a line now: what stands in a buffer at a fork is written twice."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def told(use: Callable[[], object]) -> str:
    """Return what the error says that a use of the encoder must raise."""
    try:
        use()
    except BackendError as error:
        say(type(error).__name__)
        return str(error)
    raise AssertionError("an encoder was used in a fork")


def main() -> None:
    bundle, backend = sys.argv[1:]
    # Several, each with its second session: destroying few inherited ones often goes well.
    encoders = [VisionEncoder.open(bundle, backend=backend) for _ in range(4)]
    encoder = encoders[0]

    def groups_of(each: VisionEncoder) -> object:
        tokens = each.run(IMAGE)
        return tokens.kept if backend == "tensorrt" else tokens.groups  # engines can't tell those

    groups = [groups_of(each) for each in encoders]
    again = encoder.run(IMAGE)
    child = os.fork()
    if child == 0:
        told(lambda: again.groups)
        say(told(lambda: encoder.run(IMAGE)))
        for each in encoders:
            each.close()
            each.close()
        del encoders, encoder, each, again
        gc.collect()
        say("child ends")
        sys.exit(0)  # not os._exit: destructors and exit handlers run
    say(str(os.waitpid(child, 0)[1]))
    assert all(np.array_equal(each, groups_of(encoder)) for each in groups)
    encoder.close()
    say("parent works")


if __name__ == "__main__":
    main()
