"""Name the machine and the versions that a benchmark ran with; what `mgpu-launch bench` uses, under a short name."""

from mgpu.launch.bench.report import cpu_name, describe, gpu_names, heading, versions

__all__ = ["cpu_name", "describe", "gpu_names", "heading", "versions"]
