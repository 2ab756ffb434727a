"""Through a real gateway: the engine gets grammars that were compiled before, and the vocabulary once."""

import json
from pathlib import Path

import pytest

pytest.importorskip("llguidance")

from harness.servers.gateway_process import EOS, VOCAB_SIZE, GatewayProcess, make_model_folder, says
from harness.waiting import eventually
from mgpu import Client, RequestFailed
from mgpu.protocol.internal.worker_messages import Vocabulary


def vocabularies(gateway: GatewayProcess) -> list[Vocabulary]:
    found = []
    while not gateway.engine.messages.empty():
        message = gateway.engine.messages.get()
        if isinstance(message, Vocabulary):
            found.append(message)
    return found


def test_a_grammar_reaches_the_engine_after_the_vocabulary_which_is_sent_once(
    gateway: GatewayProcess, client: Client
) -> None:
    gateway.engine.script = says("ab")
    for prompt in ("x", [5, 6]):
        done = client.generate(prompt, structured_outputs={"regex": "ab"}, n=2, stop_token_ids=[7])
        assert [each.text for each in done.choices] == ["ab", "ab"]
    grammars = [submit.sampling.grammar for submit in gateway.engine.submits]
    assert all(each is not None and "/ab/" in each.text and each.stop_ids == [EOS, 7] for each in grammars)
    assert gateway.engine.submits[-1].token_ids == bytes([5, 0, 0, 0, 6, 0, 0, 0])
    [vocabulary] = vocabularies(gateway)
    assert vocabulary.tokens[ord("a")] == b"a"
    assert len(vocabulary.tokens) == VOCAB_SIZE
    assert EOS in vocabulary.special_ids


def test_a_schema_that_cannot_be_enforced_is_refused_and_reaches_no_engine(
    gateway: GatewayProcess, client: Client
) -> None:
    schema = json.dumps({"properties": {"a": {"not": {}}}})
    with pytest.raises(RequestFailed, match=r"structured_outputs.json_schema: .*\(at #/properties/a\)") as caught:
        client.generate("x", structured_outputs={"json_schema": schema})
    assert caught.value.code == "bad_request"
    assert gateway.engine.submits == []


def test_a_grammar_that_the_library_dies_of_ends_its_process_and_nothing_else(
    gateway: GatewayProcess, client: Client
) -> None:
    rules = [f'r{number}: "a"{{100000}} r{(number + 1) % 3000}?' for number in range(3000)]
    endless = "\n".join(["start: r0", *rules])  # more recursion than the library's stack has room for
    with Client(gateway.endpoint) as other, other.stream("y", max_tokens=400) as stream:
        next(stream)
        with pytest.raises(RequestFailed, match="structured_outputs, has ended; it may take"):
            client.generate("x", structured_outputs={"grammar": endless}, timeout_s=60)
        assert stream.completion().finish_reason == "length"
    assert eventually(lambda: client.generate("x", structured_outputs={"regex": "a"}, max_tokens=1).finish_reason)


def test_a_model_without_an_end_needs_a_stop_token(model_folder: object) -> None:
    with GatewayProcess(model_folder, eos_token_ids=[]) as gateway, Client(gateway.endpoint) as client:  # type: ignore[arg-type]
        with pytest.raises(RequestFailed, match="give stop_token_ids"):
            client.generate("x", structured_outputs={"regex": "a"})
        gateway.engine.script = says("a", then=9)
        assert client.generate("x", structured_outputs={"regex": "a"}, stop_token_ids=[9]).text == "a"


def test_an_answer_with_a_form_is_no_reasoning_where_the_template_has_begun_it(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}<think>\n"
    with GatewayProcess(make_model_folder(tmp_path, template)) as gateway, Client(gateway.endpoint) as client:
        gateway.engine.script = says("42")
        asked = [{"role": "user", "content": "x"}]
        assert client.chat(asked, max_tokens=9).reasoning == "42"
        assert client.chat(asked, max_tokens=9, regex="[0-9]+").text == "42"
