"""What of a service can be set, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from vzip.runtime.backends import AUTO
from vzip.runtime.files.codec import Count, Index, Must, Record, within

Seconds = Annotated[float, Must(lambda value: 0 < value <= 86400, "seconds, above 0")]


@dataclass(frozen=True, kw_only=True)
class ServiceSettings(Record):
    """How a bundle is served.

    Attributes:
        backend: As for `VisionEncoder.open`.
        engine: As for `VisionEncoder.open`.
        precision: As for `VisionEncoder.open`.
        threads: As for `VisionEncoder.open`.
        batch: Most pictures of a call of the graph; None for as many as it takes.
        delay: Longest wait of a picture for others to share its call, in seconds.
        workers: Threads that decode and prepare pictures, and wait for the graph; None for as many
            as fill two calls, and four at least.
        queue: Most requests that are in hand at once; others are refused.
        per_client: Most requests in hand of one client.
        memory: Most bytes of bodies of all requests in hand.
        body: Most bytes of a request's body.
        pixels: Most pixels of a picture.
        pictures: Most pictures of a request.
        seconds: Longest time from a request to the end of its answer.
        cache_bytes: Tokens that are remembered in memory, in bytes; 0 for none.
        cache: Folder of a token cache that outlives the service; None for none.
        conversations: How many KV caches are kept for later turns, where the LLM runs here.
        answers: Most answers that are made at once.
    """

    backend: str = AUTO
    engine: str | None = None
    precision: str | None = None
    threads: Count | None = None
    batch: Count | None = None
    delay: Annotated[float, Must(lambda value: 0 <= value <= 10, "0 to 10 seconds")] = 0.002
    workers: Annotated[int, within(1, 1024)] | None = None
    queue: Count = 128
    per_client: Count = 64
    memory: Count = 2**29
    body: Count = 2**26
    pixels: Count = 2**25
    pictures: Count = 32
    seconds: Seconds = 120.0
    cache_bytes: Index = 2**28
    cache: str | None = None
    conversations: Index = 8
    answers: Annotated[int, within(1, 1024)] = 8
