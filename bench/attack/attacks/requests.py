"""Attacks by what requests hold: long texts, long lists, wrong fields, costly options."""

import time
from array import array
from collections.abc import Callable

import msgpack

from bench.attack.attacks.clock import Clock
from bench.attack.peers import FRAME_BYTES, VERSION, Attacker, drain

TURN = {"role": "user", "content": "hello " * 40}


def long_prompts(attacker: Attacker, clock: Clock) -> None:
    """Ask for the continuation of texts of a megabyte."""
    _ask_with(attacker, clock, 5, prompt="hello " * (FRAME_BYTES // 6 - 100), max_tokens=1)


def fitting_prompts(attacker: Attacker, clock: Clock) -> None:
    """Ask for the continuation of texts that just fit into the context, over and over, and cancel none."""
    _ask_with(attacker, clock, 5, prompt="hello " * 300, max_tokens=1)


def long_chats(attacker: Attacker, clock: Clock) -> None:
    """Send conversations of 300 turns, which no context holds."""
    _ask_with(attacker, clock, 5, messages=[TURN] * 300, max_tokens=1)


def large_token_lists(attacker: Attacker, clock: Clock) -> None:
    """Send a megabyte of token ids, which is refused for its length."""
    ids = array("i", [5] * (FRAME_BYTES // 4 - 100)).tobytes()
    _ask_with(attacker, clock, 5, prompt_ids=ids, max_tokens=1)


def bad_fields(attacker: Attacker, clock: Clock) -> None:
    """Send requests that are refused for one of their fields, with as much beside it as a message may hold."""
    _ask_with(attacker, clock, 5, prompt="x", temperature=-1, stop=["y" * 256] * 16, logit_bias=[[1, 1.0]] * 1000)


def _ask_with(attacker: Attacker, clock: Clock, connections: int, **fields: object) -> None:
    peers = attacker.connect_many(connections)
    for turn in clock.turns():
        peer = peers[turn % len(peers)]
        if not attacker.say(peer, type="generate", **fields):
            time.sleep(0.001)
        drain(peer)


def odd_texts(attacker: Attacker, clock: Clock) -> None:
    """Ask for the continuation of texts of rare characters, of marks without end, and of special tokens."""
    texts = ("a" + "\u0301" * 20_000, "\u200d\U0001f468" * 8000, "<|im_end|>" * 5000, "\ufdfa" * 20_000, " " * 60_000)
    peers = attacker.connect_many(5)
    for turn in clock.turns():
        peer = peers[turn % len(peers)]
        if not attacker.say(peer, type="generate", prompt=texts[turn % len(texts)], max_tokens=1):
            time.sleep(0.001)
        drain(peer)


def unknown_fields(attacker: Attacker, clock: Clock) -> None:
    """Send fields that do not exist, with names that are costly to compare with known ones."""
    _ask_with(attacker, clock, 5, prompt="x", **{"max_token" + "s" * 60_000: 1, "temprature": 1.0})


def dense_bodies(attacker: Attacker, clock: Clock) -> None:
    """Send bodies that are as costly to decode as a megabyte can be, and no message."""
    bodies = (
        b"\xdc\xff\xff" + b"\x90" * 65_535,
        b"\x91" * FRAME_BYTES,
        b"\xdd\x00\x10\x00\x00" + b"\xc0" * FRAME_BYTES,
        msgpack.packb({str(number): number for number in range(60_000)}),
    )
    peers = attacker.connect_many(5)
    for turn in clock.turns():
        peer = peers[turn % len(peers)]
        if not attacker.send(peer, [VERSION, bodies[turn % len(bodies)][: FRAME_BYTES - 2]]):
            time.sleep(0.001)
        drain(peer)


def worst_stop_strings(attacker: Attacker, clock: Clock) -> None:
    """Generate with stop strings that begin like everything and never come."""
    stops = [(" " * 300 + str(number))[-256:] for number in range(16)]
    _ask_with(attacker, clock, 5, prompt_ids=[216] * 20, max_tokens=100, stop=stops, stream=True, ignore_eos=True)


def extreme_sampling(attacker: Attacker, clock: Clock) -> None:
    """Generate with every rule of sampling at its bound, of many choices, with all log-probabilities."""
    _ask_with(
        attacker, clock, 3, prompt_ids=[5, 6, 7], max_tokens=60, n=16, temperature=100.0, top_k=2**31 - 1, top_p=1e-9,
        min_p=1.0, repetition_penalty=1e-9, presence_penalty=-2.0, frequency_penalty=2.0, logprobs=20, stream=True,
        logit_bias=[[number, 100.0] for number in range(1024)], ignore_eos=True, seed=2**64 - 1,
    )  # fmt: skip


def regular_expression(attacker: Attacker, clock: Clock) -> None:
    """Send prompts that a model's own tokenizer panics at: an expression that gives up, a token that its file lacks."""
    _ask_with(attacker, clock, 5, prompt="a" * 30, max_tokens=1)


REQUESTS: tuple[Callable[[Attacker, Clock], None], ...] = (
    long_prompts, fitting_prompts, long_chats, large_token_lists, bad_fields, odd_texts, unknown_fields, dense_bodies,
    worst_stop_strings, extreme_sampling,
)  # fmt: skip
