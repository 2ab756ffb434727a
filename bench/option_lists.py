"""Options of these scripts that are lists."""


def numbers(text: str) -> list[int]:
    """Read ``1,8,64``. ValueError for anything else."""
    return [int(part) for part in text.split(",") if part]
