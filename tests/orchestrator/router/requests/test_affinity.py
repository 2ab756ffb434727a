"""What the router takes for cached."""

from mgpu.orchestrator.router.requests.affinity import CHUNK_BYTES, CHUNK_TOKENS, PrefixKeys, chunk_keys, prompt_bytes


def test_prompts_match_as_far_as_they_begin_alike() -> None:
    prefixes = PrefixKeys(room_tokens=100 * CHUNK_TOKENS)
    prefixes.add(chunk_keys(b"a" * CHUNK_BYTES + b"b" * CHUNK_BYTES, ""))
    assert prefixes.matched(chunk_keys(b"a" * CHUNK_BYTES + b"b" * CHUNK_BYTES + b"more", "")) == 2 * CHUNK_TOKENS
    assert prefixes.matched(chunk_keys(b"a" * CHUNK_BYTES + b"c" * CHUNK_BYTES, "")) == CHUNK_TOKENS
    assert prefixes.matched(chunk_keys(b"b" * CHUNK_BYTES, "")) == 0, "the same chunk elsewhere is another one"
    assert prefixes.matched(chunk_keys(b"a" * CHUNK_BYTES, "salt")) == 0


def test_only_as_much_is_remembered_as_the_cache_holds() -> None:
    prefixes = PrefixKeys(room_tokens=2 * CHUNK_TOKENS)
    for letter in (b"a", b"b", b"a", b"c"):
        prefixes.add(chunk_keys(letter * CHUNK_BYTES, ""))
    matched = [prefixes.matched(chunk_keys(letter * CHUNK_BYTES, "")) for letter in (b"a", b"b", b"c")]
    assert matched == [CHUNK_TOKENS, 0, CHUNK_TOKENS]


def test_every_kind_of_prompt_has_bytes_that_begin_alike() -> None:
    turns = [{"role": "user", "content": "x" * 300}]
    assert prompt_bytes({"messages": [*turns, {"role": "user", "content": "y"}]}).startswith(
        prompt_bytes({"messages": turns})
    )
    assert prompt_bytes({"prompt": "hé"}) == "hé".encode()
    assert prompt_bytes({"prompt_ids": b"\1\0\0\0"}) == b"\1\0\0\0"
