"""The metrics of the service, in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tir_alp.tools.sandbox.result import RunResult

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 120.0)


class ServiceMetrics:
    """Each service has a registry of its own, so that two in one process do not mix."""

    def __init__(self, num_sessions: Callable[[], float], num_waiting: Callable[[], float]) -> None:
        self._registry = registry = CollectorRegistry()
        self._calls = Counter("sandbox_calls", "Calls by outcome", ["outcome"], registry=registry)
        self._seconds = Histogram(
            "sandbox_call_seconds", "Wall time of a call", buckets=_SECONDS, registry=registry
        )
        self._queue = Histogram(
            "sandbox_queue_seconds", "Wait before a call began", buckets=_SECONDS, registry=registry
        )
        self._refused = Counter(
            "sandbox_refused_requests", "Requests turned away", ["status"], registry=registry
        )
        self._failed_closes = Counter(
            "sandbox_failed_closes", "Sessions that could not be closed", registry=registry
        )
        gauges = {"sandbox_sessions": num_sessions, "sandbox_waiting_requests": num_waiting}
        for name, value in gauges.items():
            Gauge(name, "At this moment", registry=registry).set_function(value)

    def count_call(self, result: RunResult) -> None:
        """Count a call."""
        self._calls.labels(result.outcome.value).inc()
        self._seconds.observe(result.duration_s)
        self._queue.observe(result.queue_s)

    def count_refusal(self, status: int) -> None:
        """Count a request that was turned away."""
        self._refused.labels(str(status)).inc()

    def count_failed_close(self) -> None:
        """Count a session that could not be closed."""
        self._failed_closes.inc()

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)
