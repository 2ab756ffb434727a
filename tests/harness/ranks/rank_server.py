"""One rank of many small models, one after the other: ``rank_server RANK DEVICE``.

Reads jobs as lines of JSON (`rank_pool.Job`), and prints for each what its rows got, or what went wrong. A process per
rank and model would spend its time on importing torch.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.answers.greedy_runner import BLOCK, MOST_TOKENS, ROWS, make_runner, run_greedily
from harness.specs import make_spec
from mgpu.protocol.checkpoint.read import Checkpoint, read_checkpoint
from mgpu.protocol.internal.worker_messages import WorkerSpec
from mgpu.worker.ranks import host_channel, peer_setup, relay_setup
from mgpu.worker.ranks.links import connect, layout_of

TIMEOUT_S = 20.0
_pinned: list[Tensor] = []
"""Memory of a job that CUDA knows. A worker's ends with its process; here the next job may be mapped to its place."""


def spec_of(checkpoint: Checkpoint, job: dict[str, Any], device: str, fd: int) -> WorkerSpec:
    """Return a spec whose ranks add up and pass on by kernels on GPUs, in shared memory on the CPU."""
    spec = make_spec(
        checkpoint.facts, job["sizes"], device=device, dtype=job["dtype"], shared_fd=fd,
        stage_transport="shared-memory" if device == "cpu" else "peer", expert_split=job["split"], block_size=BLOCK,
        max_rows=ROWS, max_batch_tokens=256, max_seq_len=MOST_TOKENS, worker_timeout_s=TIMEOUT_S,
    )  # fmt: skip
    return replace(spec, model=checkpoint.source, shared_bytes=layout_of(spec).total_bytes)


def pin(memory: Tensor, register: Callable[[Tensor], None] = host_channel.pin) -> None:
    register(memory)
    _pinned.append(memory)


def unpin() -> None:
    """Let CUDA forget the memory of a job."""
    while _pinned:
        torch.cuda.cudart().cudaHostUnregister(_pinned.pop().data_ptr())  # type: ignore[no-untyped-call]


def answer(job: dict[str, Any], rank: int, device: str) -> dict[str, Any]:
    """Return what one rank's rows got; nothing from ranks that choose no tokens."""
    checkpoint = read_checkpoint(job["model"], code=job["code"])
    fd = os.open(job["shared"], os.O_RDWR)
    spec = spec_of(checkpoint, job, device, fd)
    os.ftruncate(fd, spec.shared_bytes)  # the same size on all ranks
    plan = spec.layout.placement
    place = plan.place_of(rank)
    own = plan.stages[place.stage_index]
    links = connect(spec, rank, torch.device(device))
    try:
        runner = make_runner(
            checkpoint, place, range(own.first_layer, own.end_layer), plan.num_stages, links,
            getattr(torch, job["dtype"]), torch.device(device), job["split"],
        )  # fmt: skip
        has_graphs = runner._graphs is not None
        rows = run_greedily(runner, job["prompt_ids"], job["count"], checkpoint.facts.vocab_size, plan.num_stages)
        runner.check_peers()
        runner.close()
        links.close()
    except BaseException:
        links.report_failure()  # ends the other ranks' waits
        raise
    finally:
        unpin()
        os.close(fd)
    found: dict[str, Any] = {"has_graphs": has_graphs, "notes": links.notes}
    if rows is not None:
        found |= {"token_ids": rows.token_ids, "logprobs": rows.logprobs_NV.tolist()}
    return found


def main() -> None:
    rank, device = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    for module in (host_channel, peer_setup, relay_setup):
        module.pin = pin  # type: ignore[assignment]
    if device != "cpu":
        torch.cuda.set_device(device)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        try:
            found = answer(json.loads(line), rank, device)
        except Exception:
            found = {"error": traceback.format_exc()}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
