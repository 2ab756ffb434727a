"""Try what workers need of torch, for ``mgpu-launch doctor``: ``python -m mgpu.worker.probes.torch_support``.

The answer is one JSON object on standard output. What goes wrong in torch or in the driver ends or hangs this process,
so doctor gives it a deadline and reads what it says on standard error.
"""

import argparse
import json
import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import device as Device

    from mgpu.worker.ranks.collectives import TensorParallelGroup

PAIR_ELEMENTS = (1, 4097, 1 << 20, 1 << 24)
"""Sizes that NCCL and gloo treat in different ways, up to 64 MiB."""
_TIMED_RUNS = 5


def main() -> None:
    """Run one probe, print its answer, and leave without the clean-up, which may wait for a lost peer."""
    parser = argparse.ArgumentParser(
        prog="python -m mgpu.worker.probes.torch_support", description="A check of mgpu-launch doctor."
    )
    parser.add_argument("probe", choices=("devices", "pair"))
    parser.add_argument("--backend", default="gloo", choices=("gloo", "nccl"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--rendezvous", default="")
    parser.add_argument("--timeout", type=float, default=60.0)
    arguments = parser.parse_args()
    if arguments.probe == "devices":
        answer = devices()
    else:
        answer = pair(arguments.backend, arguments.device, arguments.rank, arguments.rendezvous, arguments.timeout)
    print(json.dumps(answer), flush=True)
    sys.stderr.flush()
    os._exit(0)


def devices() -> dict[str, object]:
    """Return what torch sees, after a product on every GPU was compared with that of the CPU."""
    import torch

    found = []
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randint(-8, 8, (256, 256), generator=generator).float() for _ in range(2))
    expected = left @ right  # whole numbers below 2^24, so every order of adding them up is exact
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        is_right = torch.equal((left.to(device) @ right.to(device)).cpu(), expected)
        found.append({"name": torch.cuda.get_device_name(device), "product_is_right": is_right})
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": found}


def pair(backend: str, device_name: str, rank: int, rendezvous: str, timeout_s: float) -> dict[str, object]:
    """All-reduce random data with the other of two ranks; return the sizes that came out wrong, and the speed.

    The ranks meet and sum as those of a server do.
    """
    import torch

    from mgpu.worker.ranks.collectives import DistGroup, new_groups, start_process_group

    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    start_process_group(
        f"file://{rendezvous}",
        rank,
        2,
        nccl_device=device if backend == "nccl" else None,
        start_s=timeout_s,
        timeout_s=timeout_s,
    )
    group = DistGroup(new_groups([(0, 1)], timeout_s)[0], rank, 2)
    wrong = []
    for elements in PAIR_ELEMENTS:
        parts = [torch.randn(elements, generator=torch.Generator().manual_seed(elements + each)) for each in range(2)]
        summed = group.all_reduce(parts[rank].to(device, copy=True))
        if not torch.equal(summed.cpu(), parts[0] + parts[1]):  # of two numbers the sum is exact in any order
            wrong.append(elements)
    return {"wrong": wrong, "bytes_per_s": _speed(group, device)}


def _speed(group: "TensorParallelGroup", device: "Device") -> float:
    import torch

    data = group.all_reduce(torch.ones(PAIR_ELEMENTS[-1], device=device))
    data[0].item()  # waits for the device
    began_s = time.perf_counter()
    for _ in range(_TIMED_RUNS):
        data = group.all_reduce(data)
    data[0].item()
    return data.numel() * data.element_size() * _TIMED_RUNS / (time.perf_counter() - began_s)


if __name__ == "__main__":
    main()
