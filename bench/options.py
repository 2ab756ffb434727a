"""Options of these scripts that are lists."""

Sizes = tuple[tuple[int, int], ...]
"""Numbers of requests with lengths of their prompts."""


def words(text: str) -> list[str]:
    """Read ``a,b``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[int]:
    """Read ``1,8,64``. ValueError for anything else."""
    return [int(part) for part in words(text)]


def sizes(text: str) -> Sizes:
    """Read ``32x1024,4x8192``. ValueError for anything else."""
    pairs = [part.split("x") for part in words(text)]
    return tuple((int(count), int(length)) for count, length in pairs)


def size_text(pairs: Sizes) -> str:
    """Write what `sizes` reads."""
    return ",".join(f"{count}x{length}" for count, length in pairs)
