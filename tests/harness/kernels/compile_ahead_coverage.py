"""Print the kernels of a start that are not compiled ahead: run by a test, without a GPU and without compiling.

    python -m harness.kernels.compile_ahead_coverage MODEL_FOLDER "[1,1] none auto" "[2] 4 fp8" …

One line of JSON for each case of ranks by stage, quantization and type of the KV cache. Layers are made to use kernels
on the CPU, and launches are recorded with what they would be compiled for. ``tests/worker`` and ``bench`` must be in
PYTHONPATH.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import mgpu.worker.attention.choose as attention
import mgpu.worker.ranks.peer_setup as peers
from bench.kernels.timing import compile_only, set_overlap
from harness.models.parts import with_changes
from harness.specs import make_plan, make_spec
from mgpu.protocol.internal.worker_messages import WorkerSpec
from mgpu.protocol.model.kv_pools import PoolSize, has_pages
from mgpu.protocol.model.placement import RankPlace
from mgpu.worker.attention.check import attention_problem
from mgpu.worker.kernels.products import choose as products
from mgpu.worker.kernels.products import rounded_product, rounded_trial
from mgpu.worker.kernels.products.warpgroup import float8_trial, trial
from mgpu.worker.kernels.runtime import LAUNCH_MODE
from mgpu.worker.layers import linear, mlp, norm, vocab
from mgpu.worker.layers.experts import experts, sparse_mlp
from mgpu.worker.quantization.float8_rows import UnscaledProduct
from mgpu.worker.ranks import peer_check
from mgpu.worker.ranks.collectives import MeasurableGroup, SingleRank
from mgpu.worker.ranks.links import Links
from mgpu.worker.sampling import sampler
from mgpu.worker.start.compile_ahead.compile_ahead import CompileAhead
from mgpu.worker.start.startup import StartUp
from mgpu.worker.steps import graph_pool

CPU = torch.device("cpu")
Launch = tuple[str, str]
launched: set[Launch] = set()


def record(self: Any, *args: Any, grid: object, warmup: bool, **options: Any) -> None:
    """Note a launch with the types, the divisors and the constants that its kernel would be compiled for."""
    options = {"debug": False, "instrumentation_mode": "", **options}
    *_, binder = self.device_caches[driver.active.get_current_device()]
    _, specialization, used = binder(*args, **options)
    constants = [value for value, param in zip(args, self.params, strict=False) if param.is_constexpr]
    launched.add((self.__name__, f"{specialization} {constants} {used}"))


class FakePool:
    """Launches a graph's step twice, as a capture does, without a GPU."""

    def __init__(self, device: torch.device, most: int, tries: bool = False) -> None:
        del device, most, tries

    def capture(self, length: int, forward: Any) -> None:
        for _ in range(2):
            forward(torch.zeros(length, dtype=torch.int32))


def use_kernels_on_the_cpu() -> None:
    compile_only()
    set_overlap(True)
    for module in (mlp, norm, experts, sparse_mlp, sampler, attention):
        module.uses_kernels = lambda device: True
    linear.dense_product = vocab.dense_product = lambda device: products.matmul
    linear.packed_product = lambda device, form: (products.try_products(device, form), products.quantized_matmul)[1]
    trial._has_warpgroups = lambda device: True
    trial.trial_problem = float8_trial.trial_problem = lambda measure, tolerance: (measure(), "")[1]
    peers.uses_kernels = lambda device: True
    peers.can_quantize = lambda limits, device: True
    peer_check._error = lambda found, wanted: 0.0
    linear.pack = vocab.pack = lambda weight: weight
    linear.held_weight = rounded_trial.with_power
    rounded_trial.has_warpgroups = rounded_trial.multiplies_float8 = lambda device: True
    rounded_trial.trial_problem = trial.trial_problem
    rounded_product.multiply_float8 = lambda rows, weight, scale: UnscaledProduct(
        torch.zeros(len(rows.values), len(weight)), rows.scale_T
    )
    products.F = type("Shapes", (), {"linear": staticmethod(lambda x, w, b=None: x.new_zeros(len(x), len(w)))})
    graph_pool.GraphPool = graph_pool.Uncaptured = FakePool
    torch.empty = torch.zeros  # what no kernel writes must be a token that exists
    JITFunction.run = record


def take(what: Any) -> set[Launch]:
    launched.clear()
    with torch.inference_mode():
        what()
    return set(launched)


def missing_of(spec: WorkerSpec) -> dict[str, object]:
    """Return how many kernels are compiled ahead on all stages, and those that the starts launch besides."""
    missing: list[Launch] = []
    asked_in_all = 0
    for index in range(spec.layout.placement.num_stages):
        place = spec.layout.placement.place_of(spec.layout.placement.ranks_of_stage(index)[-1])
        group = MeasurableGroup(SingleRank())
        group.rank, group.size, group.alone = place.tp_rank, place.tp_size, True
        start_up = StartUp(spec, place, CPU, Links(group))
        LAUNCH_MODE.compiles_only = True
        asked = take(CompileAhead(spec, place, CPU).launch_all)
        LAUNCH_MODE.compiles_only = False
        missing += sorted(take(lambda s=start_up, p=place: start(s, spec, p)) - asked)
        asked_in_all += len(asked)
    return {"asked": asked_in_all, "missing": missing}


def start(start_up: StartUp, spec: WorkerSpec, place: RankPlace) -> None:
    """Do what a worker does until it is ready, as far as one rank can alone."""
    if (group := peers.lone_group(spec, place, CPU)) is not None:
        peer_check.peer_problem(group, CPU)
        if spec.layout.quant == "fp8":
            peer_check.float8_problem(group, CPU)
    stage, _ = start_up.load(lambda done, total: None)
    attention_problem(CPU, stage.attention_shape)
    stage.assume_kernels()
    start_up.run_largest_step(stage)
    runner = start_up.allocate(stage, PoolSize(40, 40 if has_pages(spec.facts.sight, spec.limits) else 0))
    if spec.layout.placement.num_stages == 1:
        start_up._links.group.alone = True
        runner.warm_up(16, 0)


def main() -> None:
    use_kernels_on_the_cpu()
    spec = make_spec(Path(sys.argv[1]), [1], dtype="bfloat16", block_size=64, max_batch_tokens=600, max_seq_len=700)
    for case in sys.argv[2:]:
        sizes, quant, kept = case.split()
        plan = make_plan(spec.facts.num_layers, json.loads(sizes))
        print(
            json.dumps(
                {"case": case, **missing_of(with_changes(spec, placement=plan, quant=quant, kv_cache_dtype=kept))}
            )
        )


if __name__ == "__main__":
    main()
