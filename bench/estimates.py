"""Compare the speeds that `plan` estimates with those that were measured on H200s.

``python -m bench.estimates`` prints the table of docs/notes/performance.md. It needs no GPU: the measured values are
those of docs/performance.md (8B and 32B on one GPU at 1,024 tokens of context, the first token), and of two H200s
(NVLink, torch 2.11.0, triton 3.6, NCCL 2.28.9; ``python -m bench.multi_gpu``, 2026-11-29; the layer map and the GPUs
without peer access: ``python -m bench.multi_gpu.laps``, 2026-11-30).
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bench.model_shapes import SHAPES, write_config
from mgpu.orchestrator.placement.machine.described import described_machine
from mgpu.orchestrator.placement.options import LayoutOptions
from mgpu.orchestrator.placement.planner import Plan, plan
from mgpu.orchestrator.placement.reports.speed import MANY, PROMPT, REQUEST_S, estimate_speed
from mgpu.protocol.checkpoint.huggingface.config import read_config_facts
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.quantization import Quant

DECODED = 48
"""Tokens that a row has decoded when it is counted, about."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Tokens per second of one stream and of 64, and of prompts; None where that was not measured."""

    shape: str
    tp: int
    quant: Quant
    context: int
    one: float | None
    many: float | None
    prompts: float | None = None
    """16 prompts of 2,048 tokens."""
    layers: str = ""
    """A layer map; ``tp`` does not count then."""
    reach: bool = True
    """False: the GPUs do not reach each other's memory (MGPU_NO_P2P=1)."""

    @property
    def what(self) -> str:
        name = {"none": "bf16", "8": "int8", "4": "int4"}.get(self.quant, self.quant)
        where = f"{self.tp} GPU{'s' if self.tp > 1 else ''}"
        where = f"layers {self.layers}" if self.layers else where
        return f"{self.shape} {name}, {where}{'' if self.reach else ' without peer access'}"

    def planned(self, facts: ModelFacts) -> Plan:
        machine = described_machine(f"{2 if self.layers else self.tp}xH200", {})
        if not self.reach:
            machine = replace(machine, links=tuple(("none",) * len(machine.devices) for _ in machine.devices))
        layout = LayoutOptions(device_layers=self.layers) if self.layers else LayoutOptions(tp=self.tp)
        return plan(facts, machine, replace(layout, quant=self.quant, max_seq_len=16384))


MEASURED = (
    Measured("8B", 1, "none", 128, 239, 11_666, 42_747),
    Measured("8B", 2, "none", 128, 394, 17_909, 69_693),
    Measured("8B", 1, "fp8", 128, 380, 16_086, 71_417),
    Measured("8B", 2, "fp8", 128, 544, 20_409, 96_464),
    Measured("8B", 1, "4", 128, 427, 9_508, 40_777),
    Measured("8B", 2, "4", 128, 598, 14_714, 66_923),
    Measured("8B", 1, "8", 128, 374, None),
    Measured("32B", 1, "none", 128, 60.9, 3_269, 9_851),
    Measured("32B", 2, "none", 128, 104.5, 5_603, 17_619),
    Measured("32B", 1, "fp8", 128, 99, 5_342, 16_830),
    Measured("32B", 2, "fp8", 128, 158, 7_979, 26_781),
    Measured("32B", 1, "4", 128, 104, 2_368, 9_367),
    Measured("32B", 2, "4", 128, 167, 4_076, 16_860),
    Measured("70B", 2, "none", 128, 52.5, 2_931, 8_382),
    Measured("70B", 2, "fp8", 128, 84.8, 4_586, 13_244),
    Measured("8B", 2, "none", 128, 240, 12_881, layers="0:17;1:15"),
    Measured("8B", 2, "none", 128, 378, 9_822, 32_643, reach=False),
    Measured("8B", 1, "none", 1024, 238, 9_426),
    Measured("8B", 1, "fp8", 1024, 371, 12_129),
    Measured("32B", 1, "none", 1024, 61.2, 2_790),
)
FIRST_TOKEN_S = 9.0e-3
"""Of a 128-token prompt, 8B in bfloat16 on one GPU, on an idle server."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One number that was estimated and measured."""

    what: str
    estimated: float
    measured: float

    @property
    def error(self) -> float:
        return self.estimated / self.measured - 1


def pairs() -> Iterator[Pair]:
    """Yield every measured number with its estimate."""
    with tempfile.TemporaryDirectory() as folder:
        facts = {name: read_config_facts(write_config(Path(folder) / name, SHAPES[name])) for name in SHAPES}
    for row in MEASURED:
        speed = estimate_speed(row.planned(facts[row.shape]), row.context + DECODED)
        assert speed is not None
        what = row.what
        if row.one:
            yield Pair(f"{what}, 1 stream, {row.context:,} context", speed.one_stream, row.one)
        if row.many and speed.many_streams:
            yield Pair(f"{what}, {MANY} streams, {row.context:,} context", speed.many_streams, row.many)
        if row.prompts and speed.first_token_s:
            # Prompts were read one after the other: what a request costs on its way hides behind the others.
            yield Pair(f"{what}, prompts", PROMPT / (speed.first_token_s - REQUEST_S), row.prompts)
    small = estimate_speed(plan(facts["8B"], described_machine("1xH200", {}), LayoutOptions()), prompt=128)
    assert small is not None
    assert small.first_token_s is not None
    yield Pair("8B bf16, first token of 128, ms", small.first_token_s * 1000, FIRST_TOKEN_S * 1000)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def main() -> None:
    print("| what | estimated | measured | error |\n| --- | --- | --- | --- |")
    for pair in pairs():
        print(f"| {pair.what} | {_number(pair.estimated)} | {_number(pair.measured)} | {pair.error:+.1%} |")


if __name__ == "__main__":
    main()
