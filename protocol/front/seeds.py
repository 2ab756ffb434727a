"""The seeds of several answers to one request."""

from hashlib import blake2b


def seed_of_choice(seed: int, index: int) -> int:
    """Return the seed of one of ``n`` choices; the first has the request's own, as if it were the only one."""
    if index == 0:
        return seed
    digest = blake2b(seed.to_bytes(8, "little") + index.to_bytes(4, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
