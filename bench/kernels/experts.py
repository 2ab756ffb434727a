# ruff: noqa: B023 - closures are called within the iteration that makes them
"""Time the kernels of experts, and with ``--sweep`` their tilings: where the choices of `experts.choose` come from.

Shapes are those of Qwen3-30B-A3B: 128 experts of width 768, 8 active, model dim 2,048, in bf16. The floor counts the
weights of all experts that any token chose once, at the measured read bandwidth. Needs a Hopper GPU:
``PYTHONPATH=src python -m bench.kernels.experts OUT_DIRECTORY [--sweep]``.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.timing import Job, Row, compile_all, graph_us, relative_error, set_overlap
from mgpu.protocol.model.quantization import Quant, weight_format
from mgpu.worker.kernels.experts.choose import FEW_TOKENS, ExpertStacks, RouterWeights, sparse_mlp
from mgpu.worker.kernels.experts.combine import PairRows
from mgpu.worker.kernels.experts.few import FewTiling, few_tokens
from mgpu.worker.kernels.experts.grouped import GroupedTiling, grouped_down, grouped_gate_up
from mgpu.worker.kernels.experts.route import route_few
from mgpu.worker.kernels.experts.route_and_sort import Choice, route_and_sort
from mgpu.worker.kernels.experts.sort import SortedPairs, sort_pairs
from mgpu.worker.layers.partial_sum import summed_tensor
from mgpu.worker.quantization.quantize import quantize
from mgpu.worker.quantization.stacks import empty_stack, put_matrix

DIM, WIDTH, COUNT, ACTIVE = 2048, 768, 128, 8
BF16 = torch.bfloat16
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 8192)
FEW = [FewTiling(*each) for each in (
    (4, 1024, 1, 1, 256, 2), (4, 2048, 1, 1, 512, 2), (4, 512, 1, 1, 256, 1), (8, 1024, 1, 2, 256, 2),
    (8, 2048, 2, 2, 256, 4), (4, 2048, 2, 1, 128, 2), (8, 512, 1, 1, 1024, 4), (2, 2048, 1, 2, 512, 4),
    (16, 512, 1, 4, 128, 2), (16, 1024, 4, 1, 256, 4), (4, 1024, 2, 1, 128, 1), (8, 2048, 4, 2, 128, 1),
)]  # fmt: skip
SWEEP_TOKENS = (64, 256, 8192)


def gate_up_tilings(tokens: int) -> Iterator[tuple[int, GroupedTiling]]:
    """Yield tiles for the product with gate and up: rows of a tile, and how it is cut."""
    if tokens >= 1024:
        for k, warps, stages, bulk in ((64, 8, 3, False), (64, 8, 4, False), (32, 8, 4, False), (32, 8, 6, False),
                                       (128, 8, 2, False), (64, 8, 3, True)):  # fmt: skip
            yield 128, GroupedTiling(128, k, warps, stages, bulk)
        yield 128, GroupedTiling(64, 64, 4, 3, bulk=False)
        yield 128, GroupedTiling(64, 64, 8, 4, bulk=False)
        yield 256, GroupedTiling(64, 64, 8, 3, bulk=False)
        yield 64, GroupedTiling(128, 64, 4, 3, bulk=False)
        return
    for rows in {64: (16,), 256: (16, 32)}[tokens]:
        for n, k, stages in itertools.product((32, 64), (64, 128), (3, 4)):
            yield rows, GroupedTiling(n, k, 4, stages)


def down_tilings(tokens: int) -> Iterator[tuple[int, GroupedTiling]]:
    if tokens >= 1024:
        for n, k, warps, stages in ((256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 4, 4), (128, 64, 8, 4),
                                    (128, 128, 8, 3), (256, 32, 8, 6), (128, 64, 8, 3)):  # fmt: skip
            yield 128, GroupedTiling(n, k, warps, stages)
        yield 128, GroupedTiling(256, 64, 8, 4, bulk=False)
        yield 64, GroupedTiling(256, 64, 4, 4)
        yield 256, GroupedTiling(128, 64, 8, 4)
        return
    for rows in {64: (16,), 256: (32,)}[tokens]:
        for n, k, warps, stages in itertools.product((32, 64), (64, 128), (2, 4), (3, 5)):
            yield rows, GroupedTiling(n, k, warps, stages)


class Case:
    """Experts and tokens of one size, on the GPU or, to compile only, undefined on the CPU."""

    def __init__(self, device: torch.device, tokens: int, stacks: tuple[Tensor, Tensor] | None = None) -> None:
        self.x = torch.empty(tokens, DIM, dtype=BF16, device=device).normal_()
        self.router = torch.empty(COUNT, DIM, dtype=BF16, device=device).normal_(0, DIM**-0.5)
        self.gate_up, self.down = stacks or new_stacks(device)
        (self.experts, self.weights), _ = self.route(16)

    def route(self, rows: int) -> tuple[tuple[Tensor, Tensor], SortedPairs]:
        """Choose and sort, as more than a few tokens do."""
        return route_and_sort(self.x, self.router, Choice(ACTIVE, True, None, 0, COUNT), rows)

    @property
    def chooser(self) -> RouterWeights:
        return RouterWeights(self.router, ACTIVE, True)

    @property
    def stacks(self) -> ExpertStacks:
        return ExpertStacks(self.gate_up, self.down, 0, "silu")

    def pairs(self, rows: int) -> SortedPairs:
        return sort_pairs(self.experts, 0, COUNT, rows)

    @property
    def hit(self) -> int:
        return len(self.experts.unique())

    def reference(self) -> Tensor:
        """Compute a few tokens in float32."""
        out = torch.zeros(min(4, len(self.x)), DIM, device=self.x.device)
        for token in range(len(out)):
            for expert, weight in zip(self.experts[token].tolist(), self.weights[token], strict=True):
                gate, up = F.linear(self.x[token].float(), self.gate_up[expert].float()).chunk(2)
                out[token] += weight * F.linear(F.silu(gate) * up, self.down[expert].float())
        return out


def new_stacks(device: torch.device) -> tuple[Tensor, Tensor]:
    if device.type == "cpu":  # undefined and never touched
        return torch.empty(COUNT, 2 * WIDTH, DIM, dtype=BF16), torch.empty(COUNT, DIM, WIDTH, dtype=BF16)
    gate_up = torch.empty(COUNT, 2 * WIDTH, DIM, dtype=BF16, device=device).normal_(0, DIM**-0.5)
    return gate_up, torch.empty(COUNT, DIM, WIDTH, dtype=BF16, device=device).normal_(0, WIDTH**-0.5)


def whole(case: Case) -> Tensor:
    """Compute a layer's experts with the sum over each token's."""
    return summed_tensor(sparse_mlp(case.x, case.chooser, case.stacks))


def run_all(device: torch.device, tokens: int) -> None:
    whole(Case(device, tokens))


def run_few(device: torch.device, tiling: FewTiling) -> None:
    case = Case(device, 1)
    few_tokens(case.x, case.gate_up, case.down, (case.experts, case.weights), 0, 1, tiling)


def run_grouped(device: torch.device, tokens: int, rows: int, tiling: GroupedTiling, is_down: bool) -> None:
    case = Case(device, tokens)
    pairs = sort_pairs(case.experts, 0, COUNT, rows)
    if is_down:
        h = torch.empty(tokens * ACTIVE, WIDTH, dtype=BF16, device=device)
        PairRows(grouped_down(h, case.down, pairs, case.weights, tiling), case.experts, 0, COUNT).total()
    else:
        grouped_gate_up(case.x, case.gate_up, pairs, case.weights, 1, tiling)


def jobs(sweep: bool) -> list[Job]:
    found: list[Job] = [(run_all, (tokens,)) for tokens in TOKENS]
    if sweep:
        found += [(run_few, (tiling,)) for tiling in FEW]
        for tokens in SWEEP_TOKENS:
            found += [(run_grouped, (tokens, *each, False)) for each in gate_up_tilings(tokens)]
            found += [(run_grouped, (tokens, *each, True)) for each in down_tilings(tokens)]
    return found


class Results:
    def __init__(self, out: Path) -> None:
        self.path, self.lines = out / "experts.txt", list[str]()

    def measure(self, name: str, launches: list[Callable[[], object]], **facts: float) -> None:
        try:
            row = Row(name, graph_us(launches, 5), **facts)
            self.lines.append(row.line())
        except Exception as failure:  # a variant that does not fit is a result too
            self.lines.append(f"{name}: {type(failure).__name__}: {str(failure)[:150]}")
        self.path.write_text("\n".join(self.lines) + "\n")


def time_whole(results: Results, stacks: tuple[Tensor, Tensor]) -> None:
    """Time routing, sorting, experts and everything, by number of tokens."""
    device = stacks[0].device
    for tokens in TOKENS:
        cases = [Case(device, tokens, stacks) for _ in range(8)]
        moved = sum(case.hit for case in cases) / len(cases) * 3 * DIM * WIDTH * 2
        flops = 6.0 * tokens * ACTIVE * DIM * WIDTH
        case = cases[0]
        got = summed_tensor(sparse_mlp(case.x, case.chooser, case.stacks))
        reference = case.reference()
        error = relative_error(got[: len(reference)], reference)
        if tokens <= FEW_TOKENS:
            results.measure(f"route T{tokens}", [lambda c=c: route_few(c.x, c.router, ACTIVE, True) for c in cases])
        else:
            results.measure(f"route and sort T{tokens}", [lambda c=c: c.route(16) for c in cases])
        launches: list[Callable[[], object]] = [lambda c=c: whole(c) for c in cases]
        results.measure(f"whole T{tokens}", launches, bytes=moved, flops=flops, error=error)
        if tokens > FEW_TOKENS:
            y, weight = torch.randn(tokens * ACTIVE, DIM, device=device).to(BF16), torch.ones(DIM, device=device)
            sums = [PairRows(y, c.experts, 0, COUNT) for c in cases]
            results.measure(f"sum T{tokens}", [lambda s=s: s.total() for s in sums])
            results.measure(
                f"sum in norm T{tokens}",
                [lambda s=s, c=c: s.add_and_norm(c.x, weight, 1e-6) for s, c in zip(sums, cases, strict=True)],
            )


def time_packed(results: Results, stacks: tuple[Tensor, Tensor]) -> None:
    """Time quantized experts."""
    quants: list[Quant] = ["8", "fp8", "4"]
    for quant in quants:
        packed = []
        for stack in stacks:
            matrices = (quantize(matrix, weight_format(quant)) for matrix in stack)
            first = next(matrices)
            whole = empty_stack(first, COUNT)
            for index, matrix in enumerate(itertools.chain([first], matrices)):
                put_matrix(whole, index, matrix)
            packed.append(whole)
        for tokens in (1, 64, 256, 8192):
            cases = [Case(stacks[0].device, tokens, stacks) for _ in range(8)]
            case, held = cases[0], ExpertStacks(packed[0], packed[1], 0, "silu")
            got = summed_tensor(sparse_mlp(case.x, case.chooser, held))
            reference = case.reference()
            results.measure(
                f"experts {quant} T{tokens}",
                [lambda c=c: sparse_mlp(c.x, c.chooser, held) for c in cases],
                error=relative_error(got[: len(reference)], reference),
            )


def sweep_few(results: Results, stacks: tuple[Tensor, Tensor]) -> None:
    for tokens in (1, 4, 8):
        cases = [Case(stacks[0].device, tokens, stacks) for _ in range(8)]
        moved = sum(case.hit for case in cases) / len(cases) * 3 * DIM * WIDTH * 2
        for tiling in FEW:
            launches: list[Callable[[], object]] = [
                lambda c=c: few_tokens(c.x, *stacks, (c.experts, c.weights), 0, 1, tiling) for c in cases
            ]
            results.measure(f"few T{tokens} {tiling}".replace("FewTiling", ""), launches, bytes=moved)


def sweep_grouped(results: Results, stacks: tuple[Tensor, Tensor]) -> None:
    for tokens in SWEEP_TOKENS:
        cases = [Case(stacks[0].device, tokens, stacks) for _ in range(8 if tokens <= 256 else 3)]
        moved = sum(case.hit for case in cases) / len(cases) * DIM * WIDTH * 2
        flops = 2.0 * tokens * ACTIVE * DIM * WIDTH
        sorted_pairs = {rows: [c.pairs(rows) for c in cases] for rows in (16, 32, 64, 128, 256)}
        for rows, tiling in gate_up_tilings(tokens):
            both = list(zip(cases, sorted_pairs[rows], strict=True))
            results.measure(
                f"gate_up T{tokens} m{rows} {tiling}".replace("GroupedTiling", ""),
                [lambda c=c, p=p: grouped_gate_up(c.x, c.gate_up, p, c.weights, 1, tiling) for c, p in both],
                bytes=2 * moved, flops=2 * flops,
            )  # fmt: skip
        h = torch.randn(tokens * ACTIVE, WIDTH, device="cuda").to(BF16)
        for rows, tiling in down_tilings(tokens):
            both = list(zip(cases, sorted_pairs[rows], strict=True))
            results.measure(
                f"down T{tokens} m{rows} {tiling}".replace("GroupedTiling", ""),
                [lambda c=c, p=p: grouped_down(h, c.down, p, c.weights, tiling) for c, p in both],
                bytes=moved, flops=flops,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for error in compile_all(jobs(arguments.sweep)):
        print(error, flush=True)
    set_overlap(enabled=True)
    results = Results(arguments.out)
    stacks = new_stacks(torch.device("cuda"))
    time_whole(results, stacks)
    if arguments.sweep:
        sweep_few(results, stacks)
        sweep_grouped(results, stacks)
    time_packed(results, stacks)
    print("\n".join(results.lines))


if __name__ == "__main__":
    main()
