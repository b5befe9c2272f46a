"""Counters and histograms of a service, in Prometheus' form where its package is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from vzip.runtime.errors import missing

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128)


class Figures:
    """Where a service says what it does; this one keeps nothing."""

    def called(self, rows: int, seconds: float, waited: float) -> None:
        """Count a call of the graph: its pictures, how long it took, how long its first waited."""

    def recalled(self, found: bool) -> None:
        """Count a picture that was looked for among those remembered."""

    def prepared(self, seconds: float) -> None:
        """Count a picture that was decoded and encoded, and how long all of it took."""

    def spoken(self, tokens: int, first: float, rest: float) -> None:
        """Count an answer: its tokens, seconds until the first piece and from there to the end."""

    def continued(self, kept: bool) -> None:
        """Count a later turn, and whether its KV cache was still there."""

    def served(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""


class PrometheusFigures(Figures):
    """Keeps them for ``GET /metrics``.

    Raises:
        MissingDependencyError: prometheus-client is not installed.
    """

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise missing("prometheus_client", needed_for="the service", extra="serve") from error
        self._prometheus: Any = prometheus
        self._registry = prometheus.CollectorRegistry()
        kept = {"registry": self._registry}

        def counter(name: str, text: str, *labels: str) -> Any:
            return prometheus.Counter(f"vzip_{name}", text, labels, **kept)

        def histogram(name: str, text: str, *labels: str, buckets: Any = _SECONDS) -> Any:
            return prometheus.Histogram(f"vzip_{name}", text, labels, buckets=buckets, **kept)

        self._requests = counter("requests", "Requests by route and HTTP status", "route", "status")
        self._seconds = histogram("request_seconds", "From a request to its whole answer", "route")
        self._calls = histogram("batch_pictures", "Pictures in a call of the graph", buckets=_SIZES)
        self._engine = histogram("engine_seconds", "A call of the graph")
        self._waited = histogram("queue_seconds", "What the first picture of a call waited for it")
        self._pictures = histogram("picture_seconds", "A picture, decoded and encoded")
        self._cache = counter("cache_lookups", "Pictures looked for in the token cache", "found")
        self._turns = counter("later_turns", "Later turns, by whether a KV cache was kept", "kept")
        self._first = histogram("first_token_seconds", "From the prompt to the first piece")
        self._rest = histogram("answer_seconds", "From the first piece to the last")
        self._tokens = counter("answer_tokens", "Tokens of answers")

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a number that is asked for when it is read."""
        made = self._prometheus.Gauge(f"vzip_{name}", text, registry=self._registry)
        made.set_function(value)

    def text(self) -> tuple[bytes, str]:
        """Return all of it, and its media type."""
        latest: bytes = self._prometheus.generate_latest(self._registry)
        return latest, str(self._prometheus.CONTENT_TYPE_LATEST)

    def called(self, rows: int, seconds: float, waited: float) -> None:
        """See `Figures.called`."""
        self._calls.observe(rows)
        self._engine.observe(seconds)
        self._waited.observe(waited)

    def recalled(self, found: bool) -> None:
        """See `Figures.recalled`."""
        self._cache.labels("yes" if found else "no").inc()

    def prepared(self, seconds: float) -> None:
        """See `Figures.prepared`."""
        self._pictures.observe(seconds)

    def spoken(self, tokens: int, first: float, rest: float) -> None:
        """See `Figures.spoken`."""
        self._tokens.inc(tokens)
        self._first.observe(first)
        self._rest.observe(rest)

    def continued(self, kept: bool) -> None:
        """See `Figures.continued`."""
        self._turns.labels("yes" if kept else "no").inc()

    def served(self, route: str, status: int, seconds: float) -> None:
        """See `Figures.served`."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
