# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Shared by all kernels: launch options, the scratch of split reductions, programmatic dependent launch."""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from mgpu.protocol.model.quantization import FLOAT8_CAPABILITY

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""True in Triton's interpreter (TRITON_INTERPRET=1 before the first import): no inline assembly, no launch options."""

HOPPER_SMS = 132
"""Multiprocessors of an H100 or H200, on which the tilings were measured."""
HOPPER_SHARED_BYTES = 227 << 10
"""Shared memory of a program on an H100 or H200."""


@dataclass(slots=True)
class LaunchMode:
    """How kernels are launched in this process."""

    compiles_only: bool = False
    """Launches compile and do not run (see `compile_ahead`): results are undefined, and so is the error of a trial."""


LAUNCH_MODE = LaunchMode()


@cache
def overlaps_launches(device: torch.device) -> bool:
    """Return whether kernels may start before their predecessor ends (programmatic dependent launch, Hopper on)."""
    return not INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def has_warpgroups(device: torch.device) -> bool:
    """Return whether four warps multiply together there: on Hopper, and on no GPU before or after it."""
    return not INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@cache
def shared_bytes(device: torch.device) -> int:
    """Return the shared memory of a program: 99 KiB on most consumer GPUs, 163 on an A100, 227 on an H200."""
    if INTERPRETED or device.type != "cuda":
        return HOPPER_SHARED_BYTES
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


@cache
def has_float8(device: torch.device) -> bool:
    """Return whether the GPU converts and multiplies float8 in hardware: Ada is the first that does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


def uses_assembly(kind: str, device: torch.device) -> bool:
    """Return whether words of a kind become float32 by instructions: GPUs before Ada have none that converts float8."""
    return not INTERPRETED and (kind != "fp8" or has_float8(device))


def launch_options(device: torch.device, num_warps: int, num_stages: int = 2) -> dict[str, int | bool]:
    """Return launch keywords; a kernel launched with them must call `wait_for_inputs` in every program."""
    if INTERPRETED:
        return {}
    options: dict[str, int | bool] = {"num_warps": num_warps, "num_stages": num_stages}
    if overlaps_launches(device):
        options["launch_pdl"] = True
    return options


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Let the next kernel start, then wait until all earlier kernels are done and their writes visible.

    Every kernel of the chain must wait, also in programs with nothing to do: the next kernel relies on
    "my predecessor is done" meaning "all before it are done".
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@dataclass(frozen=True, slots=True)
class Workspace:
    """Scratch of kernels that split a reduction over programs. One stream at a time may use it.

    The counters are zero between launches: the last program of each reduction resets its own.
    """

    partials: Tensor
    """float32 [n]."""
    counters: Tensor
    """int32 [m]."""

    @staticmethod
    def create(device: torch.device, num_floats: int = 9 << 20, num_counters: int = 1 << 14) -> "Workspace":
        """Allocate; the defaults (36 MiB) serve 256 rows of attention and every projection of a 70B model."""
        partials = torch.empty(num_floats, dtype=torch.float32, device=device)
        return Workspace(partials, torch.zeros(num_counters, dtype=torch.int32, device=device))

    def most_splits(self, splits: int, tiles: int, tile_floats: int) -> int:
        """Return into how many parts so many tiles may be split, at most ``splits``: one needs no scratch."""
        if tiles > self.counters.numel():
            return 1
        return max(1, min(splits, self.partials.numel() // (tiles * tile_floats)))

    def require(self, num_floats: int, num_counters: int) -> None:
        """Raise ValueError with the numbers when the scratch is too small."""
        if num_floats > self.partials.numel() or num_counters > self.counters.numel():
            raise ValueError(
                f"kernel scratch holds {self.partials.numel()} floats and {self.counters.numel()} counters, "
                f"needs {num_floats} and {num_counters}: create a larger Workspace"
            )


@cache
def default_workspace(device: torch.device) -> Workspace:
    """Return the scratch that callers on ``device`` share when they pass none."""
    return Workspace.create(device)


def workspace_for(device: torch.device, num_floats: int, num_counters: int) -> Workspace:
    """Return the default scratch, or a temporary one if that is too small and the work cannot be cut otherwise.

    A temporary one has counters of its own, which a CUDA graph sets to zero each time that it is replayed.
    """
    shared = default_workspace(device)
    if num_floats <= shared.partials.numel() and num_counters <= shared.counters.numel():
        return shared
    return Workspace.create(device, num_floats, num_counters)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()
