"""Triton kernels of the CUDA path, each beside a plain torch reference.

The only package that imports triton: builds of torch for CPU have none, so nothing here but `packing`, which is plain
torch, is imported unless the device is CUDA (or a test runs the kernels in Triton's interpreter). Every kernel is
deterministic, reads lengths and block tables on the device, and has a grid that depends on shapes alone, so that a CUDA
graph of it stays valid.
``docs/kernels.md`` has the floors, the measured times and the choices.
"""
