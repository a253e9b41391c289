"""Prometheus metrics, under vLLM's names where they mean the same, so that its dashboards work unchanged."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine.messages import Event, Ready, Stats

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
FINISHED = ("stop", "length", "abort", "error")


class _Engine(Collector):
    """Gauges that are read when they are asked for."""

    def __init__(self, model: str, stats: Callable[[], Stats], ready: Callable[[], Ready | None]) -> None:
        self._model, self._stats, self._ready = model, stats, ready

    def collect(self) -> list[Metric]:
        stats, ready = self._stats(), self._ready()
        used = stats.blocks_used / stats.blocks if stats.blocks else 0.0
        values = {
            "vllm:num_requests_running": ("Sequences that are computing.", stats.running),
            "vllm:num_requests_waiting": ("Sequences that wait for a place.", stats.waiting),
            "vllm:kv_cache_usage_perc": ("Share of the cache's blocks that sequences hold (1 is all of them).", used),
            "penjing:engine_ready": ("1 while the engine has its model loaded.", float(ready is not None)),
            "penjing:model_load_seconds": ("Time the model took to load.", ready.load_seconds if ready else 0.0),
            "penjing:weights_bytes": ("Weights in memory.", ready.weights_bytes if ready else 0),
            "penjing:memory_budget_bytes": ("What weights and caches may take.", ready.memory_budget if ready else 0),
        }
        counts = {
            "vllm:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            "vllm:prefix_cache_hits": ("Prompt tokens found there.", stats.prefix_hits),
            "vllm:num_preemptions": ("Sequences that gave their memory to others.", stats.preemptions),
            "vllm:spec_decode_num_drafts": ("Times that tokens were guessed.", stats.drafts),
            "vllm:spec_decode_num_draft_tokens": ("Tokens that were guessed.", stats.guessed),
            "vllm:spec_decode_num_accepted_tokens": ("Guessed tokens that were right.", stats.accepted),
        }
        families: list[Metric] = []
        for kind, given in ((GaugeMetricFamily, values), (CounterMetricFamily, counts)):
            for name, (text, value) in given.items():
                family = kind(name, text, labels=["model_name"])
                family.add_metric([self._model], value)
                families.append(family)
        return families


class Metrics:
    """All metrics of one server; `watch` follows one sequence."""

    def __init__(self, model: str, stats: Callable[[], Stats], ready: Callable[[], Ready | None]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Engine(model, stats, ready))

        def counter(name: str, text: str) -> Counter:
            return Counter(f"vllm:{name}", text, ["model_name"], registry=self.registry).labels(model)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"vllm:{name}", text, ["model_name"], buckets=buckets, registry=self.registry).labels(
                model
            )

        finished = Counter(
            "vllm:request_success", "Sequences, by how they ended.", ["model_name", "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        self.finished = {reason: finished.labels(model, reason) for reason in FINISHED}
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens computed.")
        self.generation_tokens = counter("generation_tokens", "Tokens written.")
        self.rejections = counter("admission_rejections", "Requests refused because too many were waiting.")
        self.prefix_queries = counter("prefix_cache_queries", "Tokens looked up in a prefix cache; there is none yet.")
        self.prefix_hits = counter("prefix_cache_hits", "Tokens found in a prefix cache; there is none yet.")
        self.preemptions = counter("num_preemptions", "Sequences put back; a sequence is never preempted here.")
        self.first_token = histogram("time_to_first_token_seconds", "From the request to its first token.")
        self.between_tokens = histogram("inter_token_latency_seconds", "Between two tokens of a sequence.")
        self.latency = histogram("e2e_request_latency_seconds", "From the request to its last token.")
        self.queue = histogram("request_queue_time_seconds", "Waiting for a place in the batch.")
        self.prefill = histogram("request_prefill_time_seconds", "From the place in the batch to the first token.")
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.")
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens of a sequence.", TOKENS)
        self.output_length = histogram("request_generation_tokens", "Tokens that a sequence wrote.", TOKENS)

    def watch(self, prompt_tokens: int) -> Watch:
        return Watch(self, prompt_tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Watch:
    """Times one sequence, on the server's clock; what only the engine knows comes with its last event."""

    def __init__(self, metrics: Metrics, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._tokens = 0
        self._start = time.monotonic()
        self._last: float | None = None
        self._closed = False

    def event(self, event: Event) -> None:
        metrics, now = self._metrics, time.monotonic()
        if event.tokens:
            if self._last is None:
                metrics.first_token.observe(now - self._start)
                metrics.prompt_tokens.inc(self._prompt_tokens)
            else:
                metrics.between_tokens.observe(now - self._last)
            self._last = now
            self._tokens += len(event.tokens)
            metrics.generation_tokens.inc(len(event.tokens))
        if event.timings:
            metrics.queue.observe(event.timings.queue)
            metrics.prefill.observe(event.timings.prefill)
            metrics.decode.observe(event.timings.decode)
        if event.finish_reason:
            self.close(event.finish_reason)

    def close(self, reason: str) -> float:
        """The sequence is over; returns its seconds. Only the first call counts."""
        seconds = time.monotonic() - self._start
        if not self._closed:
            self._closed = True
            self._metrics.finished[reason].inc()
            self._metrics.latency.observe(seconds)
            self._metrics.prompt_length.observe(self._prompt_tokens)
            self._metrics.output_length.observe(self._tokens)
        return seconds
