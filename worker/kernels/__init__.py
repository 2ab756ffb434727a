"""Triton kernels of the CUDA path, each beside a plain torch reference.

Builds of torch for the CPU come without Triton, so modules that import it are imported only if the device is CUDA, or
if a test runs the kernels in Triton's interpreter. `use`, `attention.inputs`, `linear.inputs`, `linear.rule` and
`peers.memory` need no Triton.
Every kernel is deterministic, reads lengths and block tables on the device, and has a grid that depends on shapes
alone, so that a CUDA graph of it stays valid. Arguments of one kind share a line in a kernel's signature, and the
launch has the same lines. ``docs/kernels.md`` has the floors, the measured times and the choices.
"""
