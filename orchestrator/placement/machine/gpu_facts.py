"""What the makers' data sheets say of common GPUs: memory, and how fast they read, compute and reach each other."""

import re
from dataclasses import dataclass

from mgpu.orchestrator.placement.machine.nvml import Link

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One kind of GPU. Products are without sparsity, with sums in float32."""

    name: str
    pattern: str
    """What of its name in the driver, in small letters and digits alone, tells it from others (regular expression)."""
    memory_bytes: int
    bytes_per_s: float
    flops: float
    """Products in bfloat16, or in float16 where it has no bfloat16."""
    float8_flops: float
    """0: it does not multiply float8."""
    capability: tuple[int, int]
    link: Link
    """How two of them reach each other's memory as a rule: GeForce cards of the 40s and 50s only through the host."""
    link_bytes_per_s: float
    """In one direction."""


def _gpu(
    name: str, pattern: str, gib: int, gb_per_s: float, tflops: float, float8_tflops: float,
    capability: tuple[int, int], link: Link, link_gb_per_s: float,
) -> GpuFacts:  # fmt: skip
    rates = gb_per_s * 1e9, tflops * 1e12, float8_tflops * 1e12
    return GpuFacts(name, pattern, gib * GIB, *rates, capability, link, link_gb_per_s * 1e9)


GPUS = (
    _gpu("B200", "b200", 180, 8000, 2250, 4500, (10, 0), "nvlink", 900),
    _gpu("GB200", "gb200", 186, 8000, 2500, 5000, (10, 0), "nvlink", 900),
    _gpu("H200", "h200", 141, 4800, 989, 1979, (9, 0), "nvlink", 450),
    _gpu("H200 NVL", "h200nvl", 141, 4800, 835, 1671, (9, 0), "nvlink", 450),
    _gpu("GH200", "gh200(480gb)?", 96, 4000, 989, 1979, (9, 0), "none", 0),
    _gpu("H100", "h100(80gbhbm3|sxm.*)?", 80, 3350, 989, 1979, (9, 0), "nvlink", 450),
    _gpu("H100 PCIe", "h100pcie", 80, 2000, 756, 1513, (9, 0), "pcie", 50),
    _gpu("H100 NVL", "h100nvl", 94, 3900, 835, 1671, (9, 0), "nvlink", 300),
    _gpu("H20", "h20", 96, 4000, 148, 296, (9, 0), "nvlink", 450),
    _gpu("A100", "a100(sxm480gb|sxm80gb|80gb)?", 80, 2039, 312, 0, (8, 0), "nvlink", 300),
    _gpu("A100 80GB PCIe", "a100(80gbpcie|pcie80gb)", 80, 1935, 312, 0, (8, 0), "pcie", 25),
    _gpu("A100 40GB", "a100(sxm440gb|sxm40gb|40gb)", 40, 1555, 312, 0, (8, 0), "nvlink", 300),
    _gpu("A100 40GB PCIe", "a100(40gbpcie|pcie40gb)", 40, 1555, 312, 0, (8, 0), "pcie", 25),
    _gpu("A30", "a30", 24, 933, 165, 0, (8, 0), "pcie", 25),
    _gpu("A40", "a40", 48, 696, 150, 0, (8, 6), "pcie", 25),
    _gpu("A10", "a10g?", 24, 600, 125, 0, (8, 6), "pcie", 25),
    _gpu("RTX A6000", "rtxa6000", 48, 768, 155, 0, (8, 6), "pcie", 25),
    _gpu("RTX A5000", "rtxa5000", 24, 768, 111, 0, (8, 6), "pcie", 25),
    _gpu("L40S", "l40s", 48, 864, 362, 733, (8, 9), "pcie", 25),
    _gpu("L40", "l40", 48, 864, 181, 362, (8, 9), "pcie", 25),
    _gpu("L4", "l4", 24, 300, 121, 242, (8, 9), "pcie", 25),
    _gpu("RTX 6000 Ada", "rtx6000ada(generation)?", 48, 960, 364, 728, (8, 9), "pcie", 25),
    _gpu("RTX PRO 6000 Blackwell", "rtx(pro)?6000blackwell.*", 96, 1792, 504, 1007, (12, 0), "pcie", 50),
    _gpu("RTX 5090", "(geforce)?(rtx)?5090", 32, 1792, 210, 419, (12, 0), "none", 50),
    _gpu("RTX 5080", "(geforce)?(rtx)?5080", 16, 960, 113, 225, (12, 0), "none", 50),
    _gpu("RTX 4090", "(geforce)?(rtx)?4090", 24, 1008, 165, 330, (8, 9), "none", 25),
    _gpu("RTX 4080", "(geforce)?(rtx)?4080", 16, 717, 97, 195, (8, 9), "none", 25),
    _gpu("RTX 3090", "(geforce)?(rtx)?3090", 24, 936, 71, 0, (8, 6), "none", 25),
    _gpu("RTX 3090 Ti", "(geforce)?(rtx)?3090ti", 24, 1008, 80, 0, (8, 6), "none", 25),
    _gpu("T4", "t4", 16, 320, 65, 0, (7, 5), "pcie", 12),
    _gpu("V100", "v100(sxm216gb|sxm2)?", 16, 900, 125, 0, (7, 0), "nvlink", 150),
    _gpu("V100 32GB", "v100(sxm232gb|sxm332gb|32gb)", 32, 900, 125, 0, (7, 0), "nvlink", 150),
    _gpu("V100 PCIe", "v100pcie.*", 16, 900, 112, 0, (7, 0), "pcie", 12),
)  # fmt: skip
"""From NVIDIA's data sheets and white papers of each GPU, as of 2026. GeForce cards have half the rate in sums of
float32 that they have in sums of float16."""


def find_gpu(name: str) -> GpuFacts | None:
    """Return the facts of a GPU by its name in the driver, or as people write it. None: not known, or a MIG part."""
    if "MIG" in name.upper().split():
        return None
    plain = re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia").removeprefix("tesla")
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.pattern, plain)), None)
