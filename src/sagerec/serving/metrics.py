"""What /metrics counts. With several workers each writes to files of its own, which any of them adds up."""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Where the workers' counts are; read by the client when it is imported."""
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The metrics of one worker."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("sagerec_requests", "Requests answered.", ("route", "status"), registry=registry)
        self.seconds = Histogram(
            "sagerec_request_seconds", "Time of a request.", ("route",), buckets=SECONDS, registry=registry
        )
        self.rows = Histogram("sagerec_batch_rows", "Queries decoded together.", buckets=ROWS, registry=registry)
        self.waited = Histogram(
            "sagerec_wait_seconds", "Time that the oldest query of a batch waited.", buckets=SECONDS, registry=registry
        )
        self.decoded = Histogram("sagerec_decode_seconds", "Time of a batch.", buckets=SECONDS, registry=registry)
        self.waiting = Gauge(
            "sagerec_waiting_queries", "Queries in the queue.", registry=registry, multiprocess_mode="livesum"
        )
        self.swaps = Counter("sagerec_swaps", "Reloads and rollbacks.", ("kind", "result"), registry=registry)

    def on_batch(self, rows: int, waited: float, took: float) -> None:
        """Count a batch."""
        self.rows.observe(rows)
        self.waited.observe(waited)
        self.decoded.observe(took)

    def text(self) -> bytes:
        """All metrics in the Prometheus text format, of all workers."""
        if FOLDER_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)
