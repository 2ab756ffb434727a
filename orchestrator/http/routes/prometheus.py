"""The counters of a server in Prometheus' form, under the names that dashboards of this field know.

Names that begin with ``vllm:`` mean what they mean there; ``mgpu:`` has what only this server counts. Behind a router
every number has the label ``replica``, and the sum over it is that of all replicas.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from mgpu.protocol.front.counters import by_replica, kv_share

CONTENT_TYPE = CONTENT_TYPE_LATEST
_GAUGES = {
    "vllm:num_requests_running": ("running", "Sequences that run."),
    "vllm:num_requests_waiting": ("waiting", "Sequences that wait for a place."),
    "mgpu:tokens_per_second": ("tokens_per_s", "Generated tokens per second, over the last 5 seconds."),
    "mgpu:prompt_tokens_per_second": ("prompt_tokens_per_s", "Prompt tokens per second, over the last 5 seconds."),
    "mgpu:uptime_seconds": ("uptime_s", "Seconds since the server was ready."),
    "mgpu:last_recovery_seconds": ("last_recovery_s", "How long the last replacement of workers took."),
    "mgpu:steps_in_flight": ("steps_in_flight", "Steps that the workers have and have not answered."),
}
"""Metric: the counter that it shows, and what it means."""
_COUNTERS = {
    "vllm:prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "vllm:generation_tokens": ("generated_tokens", "Generated tokens."),
    "vllm:prefix_cache_queries": ("prompt_tokens", "Prompt tokens that were looked up in the prefix cache."),
    "vllm:prefix_cache_hits": ("prefix_hit_tokens", "Prompt tokens that were found there."),
    "vllm:num_preemptions": ("preemptions", "Sequences that had to leave and start again."),
    "mgpu:steps": ("steps", "Steps of the workers."),
    "mgpu:worker_restarts": ("restarts", "Replacements of failed workers since the start."),
    "mgpu:loaded_bytes": ("loaded_bytes", "Bytes of weights that workers have read from files, restarts included."),
    "mgpu:gateway_restarts": ("gateway_restarts", "Replacements of a failed gateway since the start."),
}
_HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("first_token_s", "From a request's arrival to its first token."),
    "vllm:inter_token_latency_seconds": ("between_tokens_s", "Between two tokens of a choice."),
    "vllm:e2e_request_latency_seconds": ("request_s", "From a request's arrival to its end."),
    "vllm:request_queue_time_seconds": ("queue_s", "From a sequence's arrival to its first step."),
}
_OF_ROUTER = {
    "mgpu:router_requests": (GaugeMetricFamily, "router_requests", "Requests that pass through the router."),
    "mgpu:router_moved": (CounterMetricFamily, "router_moved", "Requests that went on at another replica."),
    "mgpu:router_restarts": (CounterMetricFamily, "router_restarts", "Replacements of a failed router."),
    "mgpu:replicas": (GaugeMetricFamily, "replicas", "Replicas that the router knows."),
    "mgpu:replica_restarts": (CounterMetricFamily, "copies_restarts", "Replacements of failed copies."),
}
_ENDED = "ended_"
_GPU = re.compile(r"gpu(\d+)_memory_(used|total)_bytes")


def render(model: str, state: str, stats: Mapping[str, float]) -> bytes:
    """Return the page. Without ``stats``, because the engine does not answer, it only has the state."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(model, state, stats))
    return generate_latest(registry)


@dataclass(frozen=True, slots=True)
class _Source:
    """The counters of the server, or of one of the replicas."""

    labels: list[str]
    stats: Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class _Page(Collector):
    model: str
    state: str
    stats: Mapping[str, float]

    def collect(self) -> Iterable[Metric]:
        ready = GaugeMetricFamily("mgpu:ready", "1 while requests are taken.", labels=["model_name", "state"])
        ready.add_metric([self.model, self.state], float(self.state == "ready"))
        yield ready
        replicas = by_replica(self.stats)
        if replicas:
            yield from self._router(replicas)
            sources = [_Source([self.model, name], stats) for name, stats in replicas.items()]
            yield from _Numbers(["model_name", "replica"], sources).collect()
        elif self.stats:
            yield from _Numbers(["model_name"], [_Source([self.model], self.stats)]).collect()

    def _router(self, replicas: Mapping[str, Mapping[str, float]]) -> Iterator[Metric]:
        for name, (family, counter, text) in _OF_ROUTER.items():
            if counter in self.stats:
                yield _with(family(name, text, labels=["model_name"]), [self.model], self.stats[counter])
        labels = ["model_name", "replica"]
        ready = GaugeMetricFamily("mgpu:replica_ready", "1 while the replica takes requests.", labels=labels)
        own = GaugeMetricFamily("mgpu:replica_requests", "Requests that the replica has of the router.", labels=labels)
        for replica, stats in replicas.items():
            ready.add_metric([self.model, replica], stats.get("ready", 0.0))
            own.add_metric([self.model, replica], stats.get("requests", 0.0))
        yield ready
        yield own


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The families that every server has."""

    labels: list[str]
    sources: Sequence[_Source]

    def collect(self) -> Iterator[Metric]:
        for name, (counter, text) in _GAUGES.items():
            yield self._of(GaugeMetricFamily(name, text, labels=self.labels), counter)
        for name, (counter, text) in _COUNTERS.items():
            yield self._of(CounterMetricFamily(name, text, labels=self.labels), counter)
        yield self._kv_usage()
        starved = CounterMetricFamily(
            "mgpu:starved_seconds", "Time in which workers lacked a step.", labels=self.labels
        )
        yield self._of(starved, "starved_us_sum", 1e-6)
        for name, (counter, text) in _HISTOGRAMS.items():
            yield self._histogram(name, text, counter, 1.0)
        yield self._histogram("mgpu:step_time_seconds", "From sending a step to its result.", "step_ms", 1e-3)
        yield self._ended()
        yield from self._gpus()

    def _of(self, family: GaugeMetricFamily | CounterMetricFamily, counter: str, unit: float = 1.0) -> Metric:
        for source in self.sources:
            family.add_metric(source.labels, source.stats.get(counter, 0.0) * unit)
        return family

    def _kv_usage(self) -> Metric:
        text = "Used share of the KV cache, 0 to 1: of the pool that is nearest to its end."
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", text, labels=self.labels)
        for source in self.sources:
            usage.add_metric(source.labels, kv_share(source.stats))
        return usage

    def _histogram(self, name: str, text: str, counter: str, unit: float) -> Metric:
        """Return a histogram of counters ``<counter>_le_<bound>``, whose bounds are multiples of ``unit``."""
        prefix = f"{counter}_le_"
        family = HistogramMetricFamily(name, text, labels=self.labels)
        for source in self.sources:
            stats = source.stats
            counts = {key[len(prefix) :]: value for key, value in stats.items() if key.startswith(prefix)}
            found = sorted((float(bound), value) for bound, value in counts.items())
            buckets = [(f"{bound * unit:g}" if math.isfinite(bound) else "+Inf", value) for bound, value in found]
            if buckets:
                family.add_metric(source.labels, buckets, stats.get(f"{counter}_sum", 0.0) * unit)
        return family

    def _ended(self) -> Metric:
        labels = [*self.labels, "finished_reason"]
        family = CounterMetricFamily("vllm:request_success", "Choices that have ended, by reason.", labels=labels)
        for source in self.sources:
            for key, value in source.stats.items():
                if key.startswith(_ENDED):
                    family.add_metric([*source.labels, key[len(_ENDED) :]], value)
        return family

    def _gpus(self) -> Iterator[Metric]:
        labels = ["gpu", *self.labels[1:]]
        families = {
            kind: GaugeMetricFamily(f"mgpu:gpu_memory_{kind}_bytes", f"Memory of a GPU, {kind}.", labels=labels)
            for kind in ("used", "total")
        }
        for source in self.sources:
            for key, value in source.stats.items():
                if match := _GPU.fullmatch(key):
                    families[match[2]].add_metric([match[1], *source.labels[1:]], value)
        yield from families.values()


def _with(family: GaugeMetricFamily | CounterMetricFamily, labels: list[str], value: float) -> Metric:
    family.add_metric(labels, value)
    return family
