"""Experts whose weights are in the memory of the machine, in a worker whose layers are on a GPU.

The router is on the GPU. For each layer its choice and the rows go to the CPU, which computes the experts, and the sums
come back. There are two ways. In bfloat16, where kernels for the CPU take the weights, the GPU's stream does it all: it
copies to pinned memory, calls the kernel, and copies back (`host_stream.py`). The worker does not wait, and such calls
can be in a CUDA graph. Else the worker waits for the GPU, computes by torch, and no CUDA graph has such a layer in it.
Where the layers are on the CPU, too, the same code computes the same numbers.
"""

# T tokens, D model dim, A active experts of a token

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from mgpu.protocol.model.expert_facts import ExpertFacts
from mgpu.protocol.model.facts import Activation
from mgpu.protocol.model.placement import ExpertShard
from mgpu.worker.layers.experts.experts import Experts
from mgpu.worker.layers.experts.host_stream import HostStream
from mgpu.worker.layers.experts.router import Routing
from mgpu.worker.layers.linear import Storage
from mgpu.worker.layers.module import Module
from mgpu.worker.loaders.reader import WeightReader

_CPU = torch.device("cpu")


class HostRows:
    """Memory of the machine through which rows reach the CPU and come back; pinned beside a GPU.

    The layers of a stage share it. They are computed one after the other on one stream, so a layer overwrites only what
    the layer before has used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self.is_pinned = device.type == "cuda"
        self._arrived = torch.cuda.Event(blocking=False) if self.is_pinned else None  # type: ignore[no-untyped-call]

    @cached_property
    def stream(self) -> HostStream:
        """The other way, in which the worker does not wait."""
        return HostStream(self._device)

    def bring(self, **tensors: Tensor) -> list[Tensor]:
        """Copy tensors to the CPU, wait until they are there, and return them."""
        copies = [self._like(name, tensor).copy_(tensor, non_blocking=True) for name, tensor in tensors.items()]
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(self._device))
            self._arrived.synchronize()
        return copies

    def send(self, x: Tensor) -> Tensor:
        """Return a tensor of the CPU on the device; the copy is not waited for."""
        if self._arrived is None:
            return x
        return self._like("back", x).copy_(x).to(self._device, non_blocking=True)

    def _like(self, name: str, tensor: Tensor) -> Tensor:
        """Return a part of a buffer as large as a tensor. The buffer grows as needed, and doubles."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != tensor.dtype or buffer.numel() < tensor.numel():
            size = max(tensor.numel(), 2 * (0 if buffer is None else buffer.numel()))
            buffer = torch.empty(size, dtype=tensor.dtype, pin_memory=self.is_pinned)
            self._buffers[name] = buffer
        return buffer[: tensor.numel()].view(tensor.shape)


class CpuExperts(Module):
    """This rank's share of the experts of a layer, on the CPU. Called as `Experts` are, with rows of the device."""

    def __init__(
        self,
        facts: ExpertFacts,
        hidden_size: int,
        activation: Activation,
        shard: ExpertShard,
        storage: Storage,
        rows: HostRows,
    ) -> None:
        self.experts = Experts(facts, hidden_size, activation, shard, replace(storage, device=_CPU))
        self.is_idle = False
        """True: zeros are returned, where kernels are compiled and nothing is computed."""
        self.waits_for_host = True
        self._rows = rows

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        if self.is_idle:
            return torch.zeros_like(x_TD)
        if not self.waits_for_host and self.experts.kernel is not None:
            return self._rows.stream.compute(self.experts.kernel, x_TD, *routing)
        x, experts, weights = self._rows.bring(x=x_TD, experts=routing.experts_TA, weights=routing.weights_TA)
        return self._rows.send(self.experts(x, Routing(experts, weights)))

    def finalize(self) -> None:
        """Choose the way, once, after loading."""
        self.experts.finalize()
        self.waits_for_host = self.experts.kernel is None or not self._rows.is_pinned

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.experts.load(reader.for_cpu(), prefix)
