"""Count requests and tokens in the form that Prometheus reads."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..decoding.batching import Batcher
from .generation import Generation

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Hold the server's counters.

    Parameters
    ----------
    batcher : Batcher
    """

    def __init__(self, batcher: Batcher):
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry, "namespace": "littlebit"}
        self.requests = Counter("requests", "Requests by path and status of HTTP", ["path", "status"], **common)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **common)
        self.new_tokens = Counter("new_tokens", "Tokens generated", **common)
        self.duration = Histogram("request_seconds", "From request to answer", buckets=SECONDS, **common)
        self.first_token = Histogram("first_token_seconds", "From request to first token", buckets=SECONDS, **common)
        Gauge("running", "Texts being generated", **common).set_function(lambda: len(batcher.running))
        Gauge("waiting", "Texts waiting", **common).set_function(lambda: len(batcher.waiting))

    def count(self, path: str, status: int, seconds: float, generation: Generation | None) -> None:
        """Count a request that has ended."""
        self.requests.labels(path, str(status)).inc()
        self.duration.observe(seconds)
        if generation is not None:
            self.prompt_tokens.inc(generation.prompt_tokens)
            self.new_tokens.inc(generation.new_tokens)
            if generation.first_token_s is not None:
                self.first_token.observe(generation.first_token_s)

    def text(self) -> bytes:
        """Write all counters in Prometheus' text format."""
        return generate_latest(self.registry)
