"""What a client gets for what it asks, from a real gateway process with a scripted engine."""

import time
from pathlib import Path
from typing import Any

import pytest

from harness.servers.gateway_process import BOS, EOS, GatewayProcess, says
from harness.waiting import eventually
from mgpu import Client, DeadlineExceeded, RequestFailed
from mgpu.protocol.front.fields import int32_array
from mgpu.protocol.front.seeds import seed_of_choice
from mgpu.protocol.internal.gateway_messages import REFUSALS, EngineInfo, Outputs, WakeUp
from mgpu.protocol.internal.worker_messages import LogitBias


def test_ids_are_continued_and_come_back_as_text(client: Client) -> None:
    done = client.generate(list(b"abc"), max_tokens=5)
    assert (done.text, done.token_ids, done.finish_reason) == ("abcab", tuple(b"abcab"), "length")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.cached_tokens) == (3, 5, 3)
    assert done.logprobs is None


def test_an_engine_that_wants_to_know_hears_of_a_request_before_it_is_read(model_folder: Path) -> None:
    with GatewayProcess(model_folder, sends_wake_up=True) as gateway, Client(gateway.endpoint) as client:
        engine = gateway.engine
        engine.going.clear()
        # A message that comes in the same turn as one of the engine is read without a word: ask until one comes alone.
        eventually(lambda: client.health() and engine.messages.qsize(), "no word of a question")
        streams = [client.stream([1], max_tokens=1)]
        engine.wait(lambda: len(engine.submits) == 1)
        heard = engine.messages.qsize()
        assert heard, "of the first one, and of the questions before it"
        streams.append(client.stream([2], max_tokens=1))
        engine.wait(lambda: len(engine.submits) == 2)
        assert engine.messages.qsize() == heard, "one is running: the engine is awake"
        engine.going.set()
        assert all(stream.completion().finish_reason == "length" for stream in streams)
        assert all(isinstance(engine.messages.get(), WakeUp) for _ in range(heard))


def test_an_engine_that_starts_or_is_silent_does_not_hear_of_every_message(model_folder: Path) -> None:
    with GatewayProcess(model_folder, sends_wake_up=True, ready=False) as gateway, Client(gateway.endpoint) as client:
        for _ in range(10):
            client.health()
        assert gateway.engine.messages.empty(), "it starts, and wants to hear of nothing else"
        gateway.set_info()
        gateway.engine.answers_stats = False
        for _ in range(10):
            client.models()
        assert gateway.engine.messages.qsize() <= 2


def test_an_answer_that_another_server_began_is_continued(gateway: GatewayProcess, client: Client) -> None:
    began = "né".encode()[:2]  # ends inside a character
    gateway.engine.script = says("né!")
    done = client.generate("x", max_tokens=9, seed=1, emitted_ids=list(began))
    [submit] = gateway.engine.submits
    assert (list(int32_array(submit.token_ids)), submit.num_emitted) == ([BOS, *b"x", *began], 2)
    assert (done.text, done.token_ids, done.finish_reason) == ("é!", (*"é!".encode()[1:], EOS), "stop")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (2, 5)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_tokens": 2}, "max_tokens is 2: all is said"),
        ({"n": 2}, "continue one choice"),
        ({"emitted_ids": [300]}, "emitted_ids has token id 300"),
        ({"emitted_ids": [5] * 65537}, "at most 65536 can be continued"),
        ({"stop": ["ab"]}, "hold a stop string"),
    ],
)
def test_what_cannot_be_continued_is_refused(client: Client, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestFailed, match=problem):
        client.generate([5], **{"emitted_ids": list(b"ab"), **options})


def test_text_is_tokenized_with_the_models_bos(gateway: GatewayProcess, client: Client) -> None:
    client.generate("hé", max_tokens=1)
    assert list(int32_array(gateway.engine.submits[0].token_ids)) == [BOS, *"hé".encode()]


def test_long_text_is_tokenized_outside_the_loop_with_the_same_result(gateway: GatewayProcess, client: Client) -> None:
    gateway.set_info(max_seq_len=100_000, kv_tokens=100_000)
    client.generate("é" * 10_000, max_tokens=1)
    assert list(int32_array(gateway.engine.submits[0].token_ids)) == [BOS, *("é" * 10_000).encode()]


def test_chat_goes_through_the_template(gateway: GatewayProcess, client: Client) -> None:
    done = client.chat([{"role": "user", "content": "hi"}], max_tokens=2)
    assert done.usage.prompt_tokens == len("user\nhi\nassistant\n") + 4
    assert int32_array(gateway.engine.submits[0].token_ids)[0] == BOS


def test_a_template_that_refuses_the_messages_says_why(client: Client) -> None:
    with pytest.raises(RequestFailed, match="no tools here") as caught:
        client.chat([{"role": "tool", "content": "1"}])
    assert caught.value.code == "bad_request"


def test_streaming_never_cuts_a_character(gateway: GatewayProcess, client: Client) -> None:
    gateway.engine.script = says("a€😀b")
    pieces = list(client.stream([1], max_tokens=20))
    assert [piece.text for piece in pieces if piece.text] == ["a", "€", "😀", "b"]
    assert [token for piece in pieces for token in piece.token_ids] == [*"a€😀b".encode(), EOS]
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].usage is not None
    assert all(piece.usage is None for piece in pieces[:-1])


def test_bytes_that_never_become_a_character_are_shown_at_the_end(gateway: GatewayProcess, client: Client) -> None:
    gateway.engine.script = says("x€".encode()[:-1])
    assert client.generate([1]).text == "x\ufffd"


def test_a_stop_string_across_tokens_ends_the_answer_and_frees_the_sequence(gateway: GatewayProcess) -> None:
    gateway.engine.script = says("one two END three", then=None)
    with Client(gateway.endpoint) as client:
        pieces = list(client.stream([1], stop=["END", "never"]))
    assert "".join(piece.text for piece in pieces) == "one two "
    assert pieces[-1].finish_reason == "stop"
    gateway.engine.wait(lambda: len(gateway.engine.cancels) == 1)
    assert gateway.engine.cancels[0].reason == "stop"


def test_text_held_back_for_a_stop_string_is_released_when_it_does_not_come(gateway: GatewayProcess) -> None:
    gateway.engine.script = says("the EN")
    with Client(gateway.endpoint) as client:
        assert client.generate([1], stop="END").text == "the EN"


def test_min_tokens_keeps_stop_strings_and_stop_tokens_away(gateway: GatewayProcess, client: Client) -> None:
    gateway.engine.script = says("ENDabcEND", then=None)
    done = client.generate([7, 8], stop="END", min_tokens=3, stop_token_ids=[5])
    assert done.text == "ENDabc"
    sampling = gateway.engine.submits[0].sampling
    assert (sampling.banned_until, sampling.banned_ids) == (2 + 3, [EOS, 5])


def test_a_stop_tokens_own_text_is_not_part_of_the_answer(gateway: GatewayProcess, client: Client) -> None:
    gateway.engine.script = says("ab.", then=None)
    done = client.generate([1], stop_token_ids=[ord(".")])
    assert (done.text, done.token_ids, done.finish_reason) == ("ab", tuple(b"ab."), "stop")


def test_special_tokens_are_shown_on_request_only(gateway: GatewayProcess, client: Client) -> None:
    gateway.engine.script = says("ab")
    assert client.generate([1], ignore_eos=True, max_tokens=3).text == "ab"
    assert client.generate([1], ignore_eos=True, max_tokens=3, skip_special_tokens=False).text == "ab</s>"


def test_n_choices_get_seeds_of_their_own_and_the_first_equals_a_lone_request(gateway: GatewayProcess) -> None:
    with Client(gateway.endpoint) as client:
        done = client.generate(list(b"xy"), n=3, seed=11, max_tokens=2)
        lone = client.generate(list(b"xy"), seed=11, max_tokens=2)
    assert [choice.text for choice in done.choices] == ["xy"] * 3
    assert done.usage.completion_tokens == 6
    assert done.seed == lone.seed == 11
    seeds = [submit.sampling.seed for submit in gateway.engine.submits]
    assert seeds == [11, seed_of_choice(11, 1), seed_of_choice(11, 2), 11]
    assert len(set(seeds)) == 3


def test_a_missing_seed_is_drawn_and_told(gateway: GatewayProcess, client: Client) -> None:
    seeds = {client.generate([1], max_tokens=1).seed for _ in range(4)}
    assert len(seeds) == 4
    assert {submit.sampling.seed for submit in gateway.engine.submits} == seeds


def test_logprobs_name_tokens_and_their_text(client: Client) -> None:
    done = client.generate(list(b"ab"), max_tokens=2, logprobs=2)
    plain = client.generate(list(b"ab"), max_tokens=1, logprobs=0)
    assert done.logprobs is not None
    found = [(entry.token_id, entry.text, entry.logprob) for entry in done.logprobs]
    assert found == [(97, "a", -0.5), (98, "b", -0.5)]
    assert done.logprobs[0].top == ((0, -1.0, "\0"), (1, -2.0, "\x01"))
    assert plain.logprobs is not None
    assert plain.logprobs[0].top == ()


def test_sampling_reaches_the_engine_unchanged(gateway: GatewayProcess, client: Client) -> None:
    client.generate(
        [1, 2], max_tokens=1, temperature=0.5, top_k=-1, top_p=0.9, min_p=0.1, repetition_penalty=1.1,
        presence_penalty=-1, frequency_penalty=2, seed=2**64 - 1, logit_bias={7: -100.0, 8: 1.5}, priority=-3,
        cache_salt="tenant",
    )  # fmt: skip
    submit = gateway.engine.submits[0]
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 0, 0.9, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, -1.0, 2.0)
    assert (sampling.seed, sampling.logit_bias) == (2**64 - 1, LogitBias.of([(7, -100.0), (8, 1.5)]))
    assert (submit.priority, submit.cache_salt, submit.stop_token_ids) == (-3, b"tenant", [EOS])


def test_max_tokens_defaults_to_the_room_that_is_left(client: Client) -> None:
    assert client.generate([1] * 500).usage.completion_tokens == 12


@pytest.mark.parametrize(("prompt", "options", "words"), [
    ([1] * 512, {}, ["512 tokens", "context holds 512", "at most 511"]),
    ([1] * 500, {"max_tokens": 13}, ["make 513", "holds 512", "max_tokens 12 or less"]),
    ([1] * 500, {"min_tokens": 13}, ["min_tokens 13", "12"]),
    ([1, 300], {}, ["token id 300", "0 to 299"]),
    ([1], {"stop_token_ids": [300]}, ["stop_token_ids", "token id 300"]),
    ([1], {"logit_bias": {299: 1.0, 301: 1.0}}, ["logit_bias", "token id 301"]),
])  # fmt: skip
def test_what_does_not_fit_the_model_is_refused_with_the_numbers(
    gateway: GatewayProcess, client: Client, prompt: list[int], options: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(RequestFailed) as caught:
        client.generate(prompt, **options)  # type: ignore[arg-type]
    assert caught.value.code == "bad_request"
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not gateway.engine.submits


def test_a_pool_smaller_than_the_context_is_the_limit(gateway: GatewayProcess, client: Client) -> None:
    gateway.set_info(kv_tokens=64)
    with pytest.raises(RequestFailed, match="KV cache holds 64"):
        client.generate([1] * 64)


def test_another_model_is_not_served(client: Client) -> None:
    assert client.generate([1], max_tokens=1, model="tiny").token_ids == (1,)
    with pytest.raises(RequestFailed, match="tiny") as caught:
        client.generate([1], max_tokens=1, model="../../etc/passwd")
    assert caught.value.code == "unknown_model"


def test_a_request_over_its_time_is_cancelled(gateway: GatewayProcess, client: Client) -> None:
    gateway.engine.going.clear()
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        client.generate([1], timeout_s=0.3)
    assert time.monotonic() - started < 5
    gateway.engine.wait(lambda: len(gateway.engine.cancels) == 1)


def test_an_engine_error_fails_the_whole_request_and_the_next_one_is_served(gateway: GatewayProcess) -> None:
    gateway.engine.error = "device lost"
    with Client(gateway.endpoint) as client:
        with pytest.raises(RequestFailed, match="device lost") as caught:
            client.generate([1], n=2)
        assert caught.value.code == "engine_error"
        gateway.engine.error = ""
        assert client.generate([1], max_tokens=1).token_ids == (1,)


@pytest.mark.parametrize(("error", "code"), REFUSALS.items())
def test_what_the_engine_refuses_has_its_own_code(
    gateway: GatewayProcess, client: Client, error: str, code: str
) -> None:
    """A name that another gateway has begun a request under; a stop that the gateway has not heard of."""
    gateway.engine.error = error
    with pytest.raises(RequestFailed) as caught:
        client.generate([1], n=2)
    assert caught.value.code == code
    assert caught.value.retry_after_s == (1.0 if code == "draining" else None)


def test_states_of_the_engine_decide_what_is_accepted(gateway: GatewayProcess, client: Client) -> None:
    running = client.stream([1], max_tokens=500)
    next(running)
    gateway.set_info("draining")
    with pytest.raises(RequestFailed) as caught:
        client.generate([1])
    assert (caught.value.code, caught.value.retry_after_s) == ("draining", 1.0)
    assert running.completion().usage.completion_tokens == 500
    gateway.set_info("ready")
    assert client.generate([1], max_tokens=1).token_ids == (1,)


def test_health_models_and_stats_tell_what_runs(client: Client) -> None:
    health = client.health()
    assert (health.state, health.model, health.max_seq_len, health.kv_tokens) == ("ready", "tiny", 512, 4096)
    assert "fake engine" in health.layout
    assert client.models() == [{"name": "tiny", "max_seq_len": 512, "vocab_size": 300, "chat": True}]
    now = {
        "running": 0.0, "gateway_clients": 0.0, "gateway_requests": 0.0, "gateway_sequences": 0.0,
        "gateway_queued_bytes": 0.0,
    }  # fmt: skip
    assert client.stats().items() >= now.items()  # the others add up what has been


def test_an_engine_that_does_not_answer_stats_is_reported(gateway: GatewayProcess, client: Client) -> None:
    gateway.engine.answers_stats = False
    with pytest.raises(RequestFailed, match="did not answer"):
        client.stats()


def test_clients_are_heard_while_the_engine_has_much_to_say(gateway: GatewayProcess) -> None:
    many = list(range(10**6, 10**6 + 500))
    step = Outputs(many, [[1]] * 500, [[]] * 500, [""] * 500, [""] * 500, [0] * 500)
    for _ in range(4000):
        gateway.engine.tell(step)
    gateway.engine.tell(EngineInfo("ready", 100, 4096, ""))
    with Client(gateway.endpoint) as client:
        assert client.models()[0]["max_seq_len"] == 512  # answered before the last word of the engine is read
    gateway.engine.wait_until_told()
