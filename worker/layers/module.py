"""The base of the parts of a model: walk over all of them."""

from collections.abc import Iterator


class Module:
    """A part of a model; parts of parts are found in its attributes and in lists of them.

    Deliberately not ``nn.Module``, which looks every weight and part up in Python and calls through its hooks: that
    was a twelfth of a decoding step on the CPU. Nothing here needs hooks, gradients or state dicts.
    """

    waits_for_host = False
    """True if its computation reads numbers on the host, which no CUDA graph can."""

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, "Module"]]:
        """Yield this part and all parts within, each once, with dotted names."""
        yield from self._walk(prefix, set())

    def _walk(self, prefix: str, seen: set[int]) -> Iterator[tuple[str, "Module"]]:
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, value in vars(self).items():
            parts = [(name, value)] if isinstance(value, Module) else []
            if isinstance(value, list):
                parts = [(f"{name}.{at}", part) for at, part in enumerate(value) if isinstance(part, Module)]
            for inner, part in parts:
                yield from part._walk(f"{prefix}.{inner}" if prefix else inner, seen)
