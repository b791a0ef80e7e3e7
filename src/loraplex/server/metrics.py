"""Prometheus metrics: the engine's state when it is asked, and what requests added."""

import platform
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Sequence

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

import loraplex
from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.durations import BOUNDS_S, Durations
from loraplex.models.adapter_watcher import AdapterWatcher

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_MAX_ADAPTERS = 1000  # label values; what comes later is counted under "other"


class Metrics:
    """Of one server. Requests are counted on the event loop."""

    def __init__(self, engine: AsyncEngine, watched: AdapterWatcher | None = None) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(EngineCollector(engine))
        if watched is not None:
            registry.register(WatchCollector(watched))
        self._adapters: set[str] = set()
        self._requests = Counter("loraplex_http_requests", "HTTP requests", ["route", "status"], registry=registry)
        self._seconds = Histogram(
            "loraplex_request_seconds", "Latency of a request", ["adapter"], buckets=_SECONDS, registry=registry
        )
        self._first = Histogram(
            "loraplex_first_token_seconds", "Time to the first token", ["adapter"], buckets=_SECONDS, registry=registry
        )
        labels = ["adapter"]
        self._new = Counter("loraplex_adapter_new_tokens", "New tokens", labels, registry=registry)
        self._prompt = Counter("loraplex_adapter_prompt_tokens", "Tokens of prompts", labels, registry=registry)
        self._cached = Counter("loraplex_cached_prompt_tokens", "Found in the prefix cache", registry=registry)
        self._cancelled = Counter("loraplex_disconnects", "Requests whose client left", registry=registry)

    def text(self, encode: Callable[[CollectorRegistry], bytes] = generate_latest) -> bytes:
        """In Prometheus' form, or what `encode` writes."""
        return encode(self._registry)

    def count_request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()
        if status == 0:
            self._cancelled.inc()

    def finished(self, adapters: Sequence[str], *, seconds: float, num_prompt: int, num_new: int) -> None:
        """Count an answered request for each of its adapters."""
        for label in self._labels(adapters):
            self._seconds.labels(label).observe(seconds)
            self._new.labels(label).inc(num_new)
            self._prompt.labels(label).inc(num_prompt)

    def first_token(self, adapters: Sequence[str], seconds: float) -> None:
        for label in self._labels(adapters):
            self._first.labels(label).observe(seconds)

    def cached(self, num_tokens: int) -> None:
        self._cached.inc(num_tokens)

    def forget(self, adapter: str) -> None:
        """Drop the series of an adapter that was unloaded."""
        if adapter in self._adapters:
            self._adapters.discard(adapter)
            for metric in (self._seconds, self._first, self._new, self._prompt):
                if (adapter,) in metric._metrics:
                    metric.remove(adapter)

    def _labels(self, adapters: Sequence[str]) -> list[str]:
        labels = []
        for adapter in adapters or ("base",):
            if adapter not in self._adapters and len(self._adapters) >= _MAX_ADAPTERS:
                adapter = "other"
            self._adapters.add(adapter)
            labels.append(adapter)
        return labels


class EngineCollector(Collector):
    """Reads queue, batch, cache, tiers and drafts when it is asked."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        counts = stats.counts
        yield _gauge("requests_running", "Sequences that share steps", stats.num_running)
        yield _gauge("requests_waiting", "Sequences in the queue", stats.num_waiting)
        yield _gauge("cache_blocks", "Blocks of keys and values", stats.num_blocks)
        yield _gauge("cache_blocks_held", "Blocks that requests hold", stats.num_blocks_held)
        yield _counter("preemptions", "Sequences that gave way", stats.num_preempted)
        yield _counter("engine_faults", "Errors that ended all requests", self._engine.faults.count)
        yield _counter("steps", "Forward passes", counts.num_steps)
        yield _counter("prompt_tokens", "Tokens of prompts that were computed", counts.num_prompt_tokens)
        yield _counter("new_tokens", "New tokens", counts.num_new_tokens)
        yield _counter("scaling_tokens", "Tokens of scaling passes", counts.num_scaling_tokens)
        yield _counter("drafts", "Drafts of mixtures that a token was compared with", counts.num_drafted)
        yield _counter("drafts_accepted", "Drafts that were the token chosen", counts.num_accepted)
        yield _histogram("inter_token_seconds", "Time between tokens of an answer", counts.token_times)
        yield _histogram("queue_seconds", "From a request's arrival until it ran", counts.queue_times)
        yield from self._tiers()
        moved = self._engine.model.store.counts()
        yield _counter("adapter_disk_reads", "Adapters that were read again after an eviction", moved.num_disk_reads)
        yield _counter("adapter_host_evictions", "Adapters that left host memory", moved.num_host_evictions)
        yield _counter("adapter_slot_loads", "Adapters that were put into a slot", moved.num_slot_loads)
        yield _counter("adapter_slot_evictions", "Adapters that gave their slot to another", moved.num_slot_evictions)
        yield _build()

    def _tiers(self) -> Iterator[Metric]:
        states = self._engine.model.adapters()
        number, num_bytes = Counts[str](), Counts[str]()
        for state in states:
            number[state.tier] += 1
            num_bytes[state.tier] += state.num_bytes
        adapters = GaugeMetricFamily("loraplex_adapters", "Adapters by tier", labels=["tier"])
        sizes = GaugeMetricFamily("loraplex_adapter_bytes", "Bytes of adapters by tier", labels=["tier"])
        for tier in ("slot", "host", "disk"):
            adapters.add_metric([tier], number[tier])
            sizes.add_metric([tier], num_bytes[tier])
        yield adapters
        yield sizes
        yield _gauge("adapters_in_use", "Adapters that requests run with", sum(s.num_leases > 0 for s in states))


class WatchCollector(Collector):
    """Reads what is wrong in the watched folder when it is asked."""

    def __init__(self, watched: AdapterWatcher) -> None:
        self._watched = watched

    def collect(self) -> Iterator[Metric]:
        yield _gauge("watched_not_loaded", "Watched folders that can't be loaded", len(self._watched.errors))
        yield _gauge("watch_failing", "1 where the last look at the watched folder failed", bool(self._watched.fault))


def _histogram(name: str, text: str, durations: Durations) -> Metric:
    counted, buckets = 0, []
    for bound, count in zip((*BOUNDS_S, float("inf")), durations.counts, strict=True):
        counted += count
        buckets.append((floatToGoString(bound), counted))
    return HistogramMetricFamily(f"loraplex_{name}", text, buckets=buckets, sum_value=durations.total_s)


def _build() -> Metric:
    """Versions, as labels of a constant."""
    versions = {"version": loraplex.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return InfoMetricFamily("loraplex_build", "What the server is made of", value=versions)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"loraplex_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"loraplex_{name}", text, value=value)
