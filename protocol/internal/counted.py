"""Write a number with its noun."""


def counted(count: int, noun: str) -> str:
    """Return ``1 token`` or ``2 tokens``. The plural must be regular."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
