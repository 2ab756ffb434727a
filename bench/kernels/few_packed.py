"""Time the packed experts of one token, beside the grouped products of many; ``--sweep`` times every tiling.

    python -m bench.kernels.few_packed [--forms MXFP4,FP8] [--sweep]

MXFP4 has the experts of gpt-oss-20b, with biases and limits; other formats those of Qwen3-30B-A3B. Needs a Hopper GPU.
Products are checked against plain torch before they are timed. Medians are from a CUDA graph in which each launch has
other experts; shares count the weights of the chosen experts once, at the measured read bandwidth.
"""

import argparse
from dataclasses import astuple, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.timing import BF16, READ_TBPS, Launch, compile_all, graph_us, relative_error
from mgpu.launch.bench.report import describe, heading
from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.expert_facts import Clamp
from mgpu.protocol.model.quantization import weight_format
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.experts.choose import choose_tiles
from mgpu.worker.kernels.experts.few_packed import FewPackedTiling, choose_tiling, few_packed
from mgpu.worker.kernels.experts.grouped_packed import PackedTiling, grouped_packed
from mgpu.worker.kernels.experts.grouped_scaled import grouped_scaled
from mgpu.worker.kernels.experts.sort import sort_pairs
from mgpu.worker.quantization.packing import PackedWeight, dequantize
from mgpu.worker.quantization.quantize import quantize
from mgpu.worker.quantization.random_packed import random_packed
from mgpu.worker.quantization.stacks import empty_stack, matrix_of, put_matrix

FORMS = {
    "MXFP4": WeightFormat("fp4", 32, 1, 1, source="MXFP4"),
    "FP8": WeightFormat("fp8", 128, 128, source="FP8"),
    "GPTQ": WeightFormat("4", 128, scale_bytes=2, zero_bytes=1, source="GPTQ"),
    **{name: GGUF_FORMATS[name] for name in ("Q4_K", "Q6_K")},
    "int8": weight_format("8"), "fp8": weight_format("fp8"), "int4": weight_format("4"),
}  # fmt: skip
COUNT, LAUNCHES = 32, 8
CLAMP = Clamp(1.702, 7.0)
SWEEP = [FewPackedTiling(*each) for each in (
    (4, 128, 1), (8, 64, 1), (16, 64, 1), (8, 128, 2), (8, 256, 2), (4, 256, 1), (2, 512, 2),
)]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One product of the experts of a token."""

    x: Tensor
    stack: PackedWeight
    bias_NO: Tensor | None
    gate: int
    active: int
    clamp: Clamp | None

    def routing(self, launch: int) -> tuple[Tensor, Tensor]:
        device = self.x.device
        experts = torch.arange(self.active, device=device) + launch * self.active
        chosen = (experts % len(self.stack.words)).to(torch.int32).view(1, -1)
        return chosen, torch.full((1, self.active), 1 / self.active, device=device)

    def few(self, routing: tuple[Tensor, Tensor], tiling: FewPackedTiling | None = None) -> Tensor:
        how = self.x, self.stack, routing, 0, self.gate
        return few_packed(*how, bias_NO=self.bias_NO, clamp=self.clamp, tiling=tiling)

    def grouped(self, routing: tuple[Tensor, Tensor]) -> Tensor:
        experts_TA, weights_TA = routing
        pairs = sort_pairs(experts_TA, 0, len(self.stack.words), choose_tiles(1, BF16).block_m)
        given = self.x, self.stack, pairs, weights_TA, self.gate
        if self.stack.is_simple:
            return grouped_packed(*given, PackedTiling())
        return grouped_scaled(*given, bias_NO=self.bias_NO, clamp=self.clamp)

    def expected(self) -> Tensor:
        """Compute the first launch in float32, without few or grouped kernels."""
        found, (experts, weights) = [], self.routing(0)
        for pair, expert in enumerate(experts[0].tolist()):
            y = dequantize(matrix_of(self.stack, expert), torch.float32) @ self.x[0 if self.gate else pair].float()
            y += 0 if self.bias_NO is None else self.bias_NO[expert].float()
            found.append(self._gated(y) if self.gate else y * weights[0, pair])
        return torch.stack(found)

    def _gated(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2)
        if self.clamp is None:
            return F.silu(gate) * up
        gate, up = gate.clamp(max=self.clamp.limit), up.clamp(-self.clamp.limit, self.clamp.limit)
        return (up + 1) * gate * torch.sigmoid(self.clamp.alpha * gate)


def make_case(device: torch.device, form: str, is_down: bool) -> Case:
    dim, width, active = (2880, 2880, 4) if form == "MXFP4" else (2048, 768, 8)
    outputs, inputs = (dim, width) if is_down else (2 * width, dim)
    count = 2 if device.type == "cpu" else COUNT if form == "MXFP4" else 4 * COUNT
    generator = torch.Generator(device).manual_seed(0)
    stack = None
    for index in range(count):
        if FORMS[form].source:
            matrix = random_packed(FORMS[form], (outputs,), inputs, generator)
        else:
            matrix = quantize(torch.randn(outputs, inputs, generator=generator, device=device), FORMS[form])
        stack = stack or empty_stack(matrix, count)
        put_matrix(stack, index, matrix)
    assert stack is not None
    x = torch.randn(active if is_down else 1, inputs, generator=generator, device=device).to(BF16)
    bias = torch.randn(count, outputs, generator=generator, device=device).to(BF16) if form == "MXFP4" else None
    return Case(x, stack, bias, 0 if is_down else 1, active, CLAMP if form == "MXFP4" and not is_down else None)


def run(device: torch.device, form: str, is_down: bool, tiling: FewPackedTiling | None) -> None:
    (case := make_case(device, form, is_down)).few(case.routing(0), tiling)


def measure(form: str, is_down: bool, sweep: bool) -> None:
    case = make_case(torch.device("cuda"), form, is_down)
    floor_us = case.stack.nbytes / len(case.stack.words) * case.active / READ_TBPS * 1e-6
    expected, chosen = case.expected(), choose_tiling(case.stack)
    routings = [case.routing(launch) for launch in range(LAUNCHES)]
    grouped: list[Launch] = [partial(case.grouped, routing) for routing in routings]
    print(
        f"{form} {'down' if is_down else 'gate_up'}: floor {floor_us:.1f}, sorted and grouped {graph_us(grouped):.1f}"
    )
    for tiling in [chosen, *(SWEEP if sweep else [])]:
        error = relative_error(case.few(routings[0], tiling), expected)
        launches: list[Launch] = [partial(case.few, routing, tiling) for routing in routings]
        us = graph_us(launches)
        print(f"   {astuple(tiling)} {us:7.2f} us {floor_us / us:5.0%}  err {error:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", type=lambda text: text.split(","), default=list(FORMS))
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    print(heading(describe("triton")))
    products = [(form, is_down) for form in arguments.forms for is_down in (False, True)]
    jobs = [(run, (*each, tiling)) for each in products for tiling in [None, *(SWEEP if arguments.sweep else [])]]
    for error in compile_all(jobs):
        print(error)
    for form, is_down in products:
        measure(form, is_down, arguments.sweep)


if __name__ == "__main__":
    main()
