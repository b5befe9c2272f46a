"""Pictures made ready in several threads, before they are needed.

Pillow lets go of Python's lock while it decodes and resizes. A thread that works on one of several
pictures has its share of the cores for the strips of that one, so that all together have no more
threads at work than cores.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_here = threading.local()


def share() -> int | None:
    """Return how many threads the calling one may have work for it; None where nobody said."""
    return getattr(_here, "share", None)


def ahead(
    function: Callable[[_Item], _Result], items: Sequence[_Item], *, threads: int, most: int
) -> Generator[_Result, None, None]:
    """Yield the function of each item, in their order, computed before it is asked for.

    Close it, or use it up: what has begun is waited for, what hasn't is given up.

    Args:
        function: Called in several threads; in the caller's, where `threads` or `items` are 1.
        items: What it is called with.
        threads: How many work at once, at most.
        most: How many items are being worked on, or done and not yet taken, at most; at least 1.

    Raises:
        Exception: What the function raises, in the item's turn.
    """
    workers = min(len(items), threads, most)
    if workers <= 1:
        yield from map(function, items)
        return
    from concurrent.futures import ThreadPoolExecutor  # one picture needs none

    each_has = max(1, threads // workers)

    def work(item: _Item) -> _Result:
        _here.share = each_has
        return function(item)

    pool = ThreadPoolExecutor(workers)
    try:
        rest = iter(items)
        begun: deque[Future[_Result]] = deque(
            pool.submit(work, each) for each in islice(rest, most)
        )
        while begun:
            result = begun.popleft().result()
            begun.extend(pool.submit(work, each) for each in islice(rest, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
