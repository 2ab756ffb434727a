"""The counters of a server in Prometheus' form, under the names that dashboards of this field know.

Names that begin with ``vllm:`` mean what they mean there; ``mgpu:`` has what only this server counts.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

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
_ENDED = "ended_"
_GPU = re.compile(r"gpu(\d+)_memory_(used|total)_bytes")


def render(model: str, state: str, stats: Mapping[str, float]) -> bytes:
    """Return the page. Without ``stats``, because the engine does not answer, it only has the state."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(model, state, stats))
    return generate_latest(registry)


@dataclass(frozen=True, slots=True, eq=False)
class _Page(Collector):
    model: str
    state: str
    stats: Mapping[str, float]

    def collect(self) -> Iterable[Metric]:
        ready = GaugeMetricFamily("mgpu:ready", "1 while requests are taken.", labels=["model_name", "state"])
        ready.add_metric([self.model, self.state], float(self.state == "ready"))
        yield ready
        if self.stats:
            yield from self._numbers()

    def _numbers(self) -> Iterator[Metric]:
        labels, stats = ["model_name"], self.stats
        for name, (counter, text) in _GAUGES.items():
            yield _with(GaugeMetricFamily(name, text, labels=labels), [self.model], stats.get(counter, 0.0))
        for name, (counter, text) in _COUNTERS.items():
            yield _with(CounterMetricFamily(name, text, labels=labels), [self.model], stats.get(counter, 0.0))
        used, total = stats.get("kv_blocks_used", 0.0), stats.get("kv_blocks_total", 0.0)
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Used share of the KV cache, 0 to 1.", labels=labels)
        yield _with(usage, [self.model], used / total if total else 0.0)
        starved = CounterMetricFamily("mgpu:starved_seconds", "Time in which workers lacked a step.", labels=labels)
        yield _with(starved, [self.model], stats.get("starved_us_sum", 0.0) / 1e6)
        for name, (counter, text) in _HISTOGRAMS.items():
            yield self._histogram(name, text, counter, 1.0)
        yield self._histogram("mgpu:step_time_seconds", "From sending a step to its result.", "step_ms", 1e-3)
        yield self._ended()
        yield from self._gpus()

    def _histogram(self, name: str, text: str, counter: str, unit: float) -> Metric:
        """Return a histogram of counters ``<counter>_le_<bound>``, whose bounds are multiples of ``unit``."""
        prefix = f"{counter}_le_"
        counts = {key[len(prefix) :]: value for key, value in self.stats.items() if key.startswith(prefix)}
        found = sorted((float(bound), value) for bound, value in counts.items())
        buckets = [(f"{bound * unit:g}" if math.isfinite(bound) else "+Inf", value) for bound, value in found]
        family = HistogramMetricFamily(name, text, labels=["model_name"])
        if buckets:
            family.add_metric([self.model], buckets, self.stats.get(f"{counter}_sum", 0.0) * unit)
        return family

    def _ended(self) -> Metric:
        family = CounterMetricFamily(
            "vllm:request_success", "Choices that have ended, by reason.", labels=["model_name", "finished_reason"]
        )
        for key, value in self.stats.items():
            if key.startswith(_ENDED):
                family.add_metric([self.model, key[len(_ENDED) :]], value)
        return family

    def _gpus(self) -> Iterator[Metric]:
        families = {
            kind: GaugeMetricFamily(f"mgpu:gpu_memory_{kind}_bytes", f"Memory of a GPU, {kind}.", labels=["gpu"])
            for kind in ("used", "total")
        }
        for key, value in self.stats.items():
            if match := _GPU.fullmatch(key):
                families[match[2]].add_metric([match[1]], value)
        yield from families.values()


def _with(family: GaugeMetricFamily | CounterMetricFamily, labels: list[str], value: float) -> Metric:
    family.add_metric(labels, value)
    return family
