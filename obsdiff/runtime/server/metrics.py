"""What /metrics shows, in a registry of the server's own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters and histograms, each by model; queue lengths are read when they are asked for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by = ["model"]
        at = self.registry
        self.requests = Counter("obsdiff_requests", "Requests for pictures by status.", [*by, "status"], registry=at)
        self.errors = Counter("obsdiff_errors", "Requests that got no picture, by why.", [*by, "code"], registry=at)
        self.images = Counter("obsdiff_images", "Pictures drawn.", by, registry=at)
        self.cancelled = Counter("obsdiff_cancelled_images", "Pictures that nobody waited for.", by, registry=at)
        self.restarts = Counter("obsdiff_worker_restarts", "Workers started again after one died.", by, registry=at)
        self.latency = Histogram(
            "obsdiff_request_seconds", "From request to answer, where pictures came.", by, buckets=SECONDS, registry=at
        )
        self.wait = Histogram("obsdiff_queue_wait_seconds", "From request to batch.", by, buckets=SECONDS, registry=at)
        self.batch = Histogram("obsdiff_batch_size", "Pictures a batch.", by, buckets=(1, 2, 4, 8, 16, 32), registry=at)
        self.step = Histogram("obsdiff_step_seconds", "One step of a batch.", by, buckets=SHORT, registry=at)
        self.waiting = Gauge("obsdiff_queue_length", "Pictures that wait.", by, registry=at)
        self.running = Gauge("obsdiff_running_images", "Pictures that are being drawn.", by, registry=at)
        self.ready = Gauge("obsdiff_ready", "Whether the model's worker can draw.", by, registry=at)

    def text(self) -> bytes:
        return generate_latest(self.registry)
