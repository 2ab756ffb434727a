"""Which replica has the beginning of a prompt in its prefix cache, as far as the router can know.

A prompt is cut into chunks of about 64 tokens. Each chunk gets a key that depends on all chunks before it, as blocks of
a KV cache do. A replica that was sent a prompt has its keys. As many are kept as its KV cache has room for, those that
were used last.

    prompt A   [c1 c2 c3]   keys k1, k12, k123       sent to replica 0
    prompt B   [c1 c2 d3]   keys k1, k12, k12d       replica 0 matches two chunks of it
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from hashlib import blake2b

CHUNK_BYTES = 256
"""64 token ids, or about as many tokens of English text."""
CHUNK_TOKENS = 64
MAX_CHUNKS = 1024
"""The beginning that is compared: 65,536 tokens."""
_KEY_BYTES = 16


def prompt_bytes(message: Mapping[str, object]) -> bytes:
    """Return the prompt of a checked generate message as bytes that begin alike where prompts do."""
    prompt, ids, messages = message.get("prompt"), message.get("prompt_ids"), message.get("messages")
    if isinstance(prompt, str):
        return prompt.encode()
    if isinstance(ids, bytes):
        return ids
    turns = messages if isinstance(messages, (list, tuple)) else ()
    return b"".join(repr(turn).encode(errors="replace") for turn in turns)


def chunk_keys(prompt: bytes, salt: str) -> list[bytes]:
    """Return the keys of the whole chunks of a prompt, the first chunk first; ``salt`` keeps clients apart."""
    key, keys = salt.encode(), []
    for start in range(0, min(len(prompt) // CHUNK_BYTES, MAX_CHUNKS) * CHUNK_BYTES, CHUNK_BYTES):
        key = blake2b(key + prompt[start : start + CHUNK_BYTES], digest_size=_KEY_BYTES).digest()
        keys.append(key)
    return keys


class PrefixKeys:
    """The keys of the prompts that one replica has, the least recently used first."""

    def __init__(self, room_tokens: int = 0) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()
        self.room_tokens = room_tokens
        """Of the replica's KV cache."""

    def matched(self, keys: Iterable[bytes]) -> int:
        """Return how many tokens of a prompt with these keys the replica probably has."""
        count = 0
        for key in keys:
            if key not in self._keys:
                break
            count += 1
        return count * CHUNK_TOKENS

    def add(self, keys: Iterable[bytes]) -> None:
        """Note a prompt that the replica was sent."""
        for key in keys:
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) * CHUNK_TOKENS > self.room_tokens:
            self._keys.popitem(last=False)

    def clear(self) -> None:
        """Forget everything: the replica has started again."""
        self._keys.clear()
