"""What goes into a linear layer and what comes out of it. Both are Tensors, unless the product is float8 (W8A8)."""

from torch import Tensor

from mgpu.worker.quantization.float8_rows import Float8Rows, UnscaledProduct

Activations = Tensor | Float8Rows
"""Type of a linear layer's input: a Tensor, or rows that the kernel before has already quantized to float8."""
Product = Tensor | UnscaledProduct
"""Type of a linear layer's output: a Tensor, unless the product is float8; then the scales are applied by the next
kernel."""


def scaled(product: Product) -> Tensor:
    """Return a product as a Tensor, for code whose next step is no kernel that applies scales."""
    return product.scaled() if isinstance(product, UnscaledProduct) else product


def values_and_scale(product: Product) -> tuple[Tensor, Tensor | None]:
    """Return a product's values, and the scales that its rows still have to be multiplied by; None for a Tensor."""
    return (product.values, product.scale_T) if isinstance(product, UnscaledProduct) else (product, None)
