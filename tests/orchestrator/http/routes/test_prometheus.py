"""/metrics: names that dashboards know, from the counters of the stats query."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from harness.servers.http_process import HttpServer
from mgpu.orchestrator.http.routes.prometheus import render

STATS = {
    "running": 3.0, "waiting": 2.0, "kv_blocks_used": 25.0, "kv_blocks_total": 100.0, "generated_tokens": 70.0,
    "loaded_bytes": 16e9,
    "prompt_tokens": 40.0, "prefix_hit_tokens": 16.0, "first_token_s_le_0.005": 1.0, "first_token_s_le_inf": 4.0,
    "first_token_s_sum": 2.5, "step_ms_le_1": 1.0, "step_ms_le_inf": 2.0, "step_ms_sum": 30.0, "ended_stop": 6.0,
    "gpu0_memory_used_bytes": 5e9, "gpu0_memory_total_bytes": 8e10,
}  # fmt: skip


def samples(page: str) -> dict[str, float]:
    """Return every sample under its name and its labels but the model's."""
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sample.labels.items() if key != "model_name")
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_counters_have_the_names_that_dashboards_know() -> None:
    found = samples(render("tiny", "ready", STATS).decode())
    assert found["vllm:num_requests_running"] == 3
    assert found["vllm:kv_cache_usage_perc"] == 0.25
    windows = {"window_pages_used": 9.0, "window_pages_total": 10.0}
    assert samples(render("tiny", "ready", STATS | windows).decode())["vllm:kv_cache_usage_perc"] == 0.9
    assert found["vllm:generation_tokens_total"] == 70
    assert found["vllm:prefix_cache_hits_total"] == 16
    assert found["vllm:time_to_first_token_seconds_bucket{le=0.005}"] == 1
    assert found["vllm:time_to_first_token_seconds_bucket{le=+Inf}"] == 4
    assert found["vllm:time_to_first_token_seconds_count"] == 4
    assert found["vllm:time_to_first_token_seconds_sum"] == 2.5
    assert found["vllm:request_success_total{finished_reason=stop}"] == 6
    assert found["mgpu:step_time_seconds_bucket{le=0.001}"] == 1
    assert found["mgpu:step_time_seconds_sum"] == 0.03
    assert found["mgpu:gpu_memory_used_bytes{gpu=0}"] == 5e9
    assert found["mgpu:loaded_bytes_total"] == 16e9
    assert found["mgpu:ready{state=ready}"] == 1


def test_behind_a_router_every_number_has_the_replica_it_is_of() -> None:
    own = {
        f"replica{at}_{name}": value * (at + 1)
        for at in (0, 10)
        for name, value in {**STATS, "ready": 1.0, "requests": 2.0}.items()
    }
    found = samples(render("tiny", "ready", {**STATS, **own, "router_moved": 4.0, "replicas": 2.0}).decode())
    assert found["vllm:num_requests_running{replica=replica0}"] == 3
    assert found["vllm:num_requests_running{replica=replica10}"] == 33
    assert "vllm:num_requests_running" not in found, "a sum over replicas would count everything twice"
    assert found["vllm:request_success_total{finished_reason=stop,replica=replica0}"] == 6
    assert found["vllm:time_to_first_token_seconds_count{replica=replica10}"] == 44
    assert found["mgpu:gpu_memory_used_bytes{gpu=0,replica=replica0}"] == 5e9
    assert found["mgpu:replica_ready{replica=replica10}"] == 11
    assert found["mgpu:replica_requests{replica=replica0}"] == 2
    assert (found["mgpu:router_moved_total"], found["mgpu:replicas"]) == (4, 2)


def test_a_server_that_cannot_be_asked_is_only_not_ready() -> None:
    assert samples(render("", "unreachable", {}).decode()) == {"mgpu:ready{state=unreachable}": 0.0}


def test_the_page_of_a_server(http: HttpServer) -> None:
    answer = httpx.get(f"{http.url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = samples(answer.text)
    assert found["mgpu:ready{state=ready}"] == 1
    assert "vllm:inter_token_latency_seconds_count" in found
