"""What a scraper is told: counts, and how long things took. Nothing of what was asked or answered."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from gptjax.serve.worker import Stream, Worker

SECONDS = tuple(digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 6))
"""1 ms to 10 minutes."""


class Metrics:
    """Of one app."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Engine(worker))
        how: Any = dict(registry=self.registry, namespace="gptjax")
        self.requests = Counter("requests", "Requests by route and status", ["route", "status"], **how)
        timed: Any = dict(buckets=SECONDS, **how)
        self.first = Histogram("time_to_first_token_seconds", "From a request to its first token", **timed)
        self.each = Histogram("time_per_token_seconds", "Between the tokens of a reply, on average", **timed)
        self.whole = Histogram("request_seconds", "From a request to the end of its replies", **timed)

    def observe(self, stream: Stream, seconds: float) -> None:
        """How long the replies to a request took."""
        self.whole.observe(seconds)
        if not stream.first:
            return
        self.first.observe(stream.first - stream.began)
        longest = max(len(reply.tokens) for reply in stream.replies)
        if longest > 1:
            self.each.observe((stream.last - stream.first) / (longest - 1))

    def text(self) -> bytes:
        """In Prometheus's form."""
        return generate_latest(self.registry)


class _Engine:
    """What the worker counts anyway."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def collect(self) -> Iterator[Any]:
        worker = self.worker
        gauges = {
            "gptjax_queue_length": ("Replies that wait for a row", worker.waiting),
            "gptjax_slots_used": ("Rows in use", worker.used),
            "gptjax_slots_total": ("Rows that there are", worker.model.slots),
            "gptjax_replies_open": ("Replies asked for that are not over", worker.open),
            "gptjax_compiled_programs": ("Programs compiled or read", worker.programs),
        }
        counters = {
            "gptjax_prompt_tokens": ("Tokens of prompts", worker.prompt_tokens),
            "gptjax_completion_tokens": ("Tokens drawn, those of cancelled replies too", worker.completion_tokens),
            "gptjax_reused_prompt_tokens": ("Tokens of prompts that lay in a cache", worker.reused),
        }
        for name, (words, value) in gauges.items():
            yield GaugeMetricFamily(name, words, value)
        for name, (words, value) in counters.items():
            yield CounterMetricFamily(name, words, value)
