"""Text that no sandbox can stop: the process that works on it ends, and the next one serves."""

import errno
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from harness.models.demo_model import demo_model
from harness.servers.gateway_process import BOS, VOCAB_SIZE, make_model_folder
from harness.waiting import eventually
from mgpu.orchestrator.gateway.text.chat_template import ChatPrompt
from mgpu.orchestrator.gateway.text.processes import encoder_process as module
from mgpu.orchestrator.gateway.text.processes.encoder import NICENESS
from mgpu.orchestrator.gateway.text.processes.encoder_messages import TextTask
from mgpu.orchestrator.gateway.text.processes.encoder_process import EncoderFailed, EncoderProcesses, reason_of
from mgpu.protocol.front.client_messages import Detokenize, Tokenize

CPU_LIMIT_S, MEMORY_BYTES = 1.0, 256 << 20

Make = Callable[..., EncoderProcesses]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Return a function that makes the processes for a chat template."""
    monkeypatch.setattr(module, "MEMORY_BYTES", MEMORY_BYTES)
    with ExitStack() as stack:

        def make(template: str = "{{ messages[0].content }}") -> EncoderProcesses:
            made = EncoderProcesses(str(make_model_folder(tmp_path, template)), "safetensors", VOCAB_SIZE, CPU_LIMIT_S)
            stack.callback(made.close)
            return made

        yield make


def chat(text: str, **options: object) -> TextTask:
    return TextTask(512, chat=ChatPrompt(({"role": "user", "content": text},), options=options))


def ids(text: str) -> bytes:
    return array("i", list(text.encode())).tobytes()


def encoders_below() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if each.cmdline()[-1:] == [module.COMMAND[-1]]]


OTHERS = set[int]()
"""Processes of servers that tests share."""


@pytest.fixture(autouse=True)
def _others() -> None:
    OTHERS.clear()
    OTHERS.update(each.pid for each in encoders_below())


def helpers() -> list[psutil.Process]:
    """List the processes that work for the test."""
    return [each for each in encoders_below() if each.pid not in OTHERS]


@pytest.mark.parametrize("bomb", [
    "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s=['a']) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{{ range(99999) | join('a' * 65536) }}",
    "{{ ('a' * 65536).replace('a', 'b' * 65536) }}",
    "{{ 'a'.center(10 ** 10) }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ 'a' * 300000000 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(i=3) %}{% for i in range(60) %}{% set n.i = n.i * n.i %}{% endfor %}",
])  # fmt: skip
def test_a_template_that_goes_off_costs_its_own_prompt(make: Make, bomb: str) -> None:
    source = "{% if messages[0].content == 'boom' %}" + bomb + "{% endif %}{{ messages[0].content }}"
    encoders, before = make(source), psutil.Process().memory_info().rss
    assert encoders.do(chat("hello")).token_ids == ids("hello")
    started_s = time.monotonic()
    assert encoders.do(chat("boom")).error
    assert time.monotonic() - started_s < 15
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert encoders.do(chat("hello again")).token_ids == ids("hello again")


def test_a_regular_expression_that_runs_for_hours_is_ended_with_its_process(make: Make, tmp_path: Path) -> None:
    encoders = make()
    file = tmp_path / "tokenizer.json"
    split = '{"type": "Split", "pattern": {"Regex": "(a+)+b|."}, "behavior": "Isolated", "invert": false}'
    usual = '"pre_tokenizer":{"type":"ByteLevel"'
    text = file.read_text().replace(" ", "").replace("\n", "")
    assert usual in text
    levels = '{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false}'
    begin, end = text.index('"pre_tokenizer":'), text.index(',"post_processor"')
    sequence = f'"pre_tokenizer":{{"type":"Sequence","pretokenizers":[{split},{levels}]}}'
    file.write_text(text[:begin] + sequence + text[end:])
    result = encoders.do(TextTask(1 << 20, prompt=("a" * 20 + "c") * 40_000))
    assert "1 s of CPU time" in result.error
    assert encoders.do(TextTask(512, prompt="hello")).num_tokens == 6


def test_a_form_that_takes_too_long_ends_its_process_and_the_next_one_gets_another() -> None:
    pytest.importorskip("llguidance")
    encoders = EncoderProcesses(demo_model(), "gguf", 49_152)
    rules = [f"r{each}: /[a-z]{{1,{each + 1}}}/ start" for each in range(1500)]
    slow = "\n".join(["start: " + " | ".join(f"r{each}" for each in range(1500)), *rules])
    try:
        assert "0.5 s of CPU time" in encoders.do(TextTask(512, structured_outputs={"grammar": slow})).error
        assert encoders.do(TextTask(512, structured_outputs={"choice": ["a"]})).grammar
    finally:
        encoders.close()


def test_a_template_has_its_own_words_and_options(make: Make) -> None:
    encoders = make("{% if thinking %}{{ raise_exception('no ' ~ messages[0].content) }}{% endif %}é")
    assert encoders.do(chat("x")).token_ids == ids("é")
    assert "no y" in encoders.do(chat("y", thinking=True)).error


def test_a_template_that_is_none_is_refused_each_time(make: Make) -> None:
    encoders = make("{% if %}")
    for _ in range(2):
        assert "not valid" in encoders.do(chat("x")).error


def test_of_a_prompt_that_is_too_long_only_the_length_comes_back(make: Make) -> None:
    encoders = make()
    result = encoders.do(TextTask(100, prompt="x" * 500))
    assert (result.token_ids, result.num_tokens, result.is_exact) == (b"", 501, True)
    result = encoders.do(chat("x" * 100_000))
    assert (result.token_ids, result.is_exact) == (b"", False)
    assert 512 < result.num_tokens <= 100_000


def test_questions_about_text_are_answered(make: Make) -> None:
    encoders = make()
    tokenized = encoders.do(TextTask(512, tokenize=Tokenize(3, prompt="é"))).tokenized
    assert tokenized is not None
    assert tokenized.token_ids == array("i", [BOS, *"é".encode()]).tobytes()
    detokenized = encoders.do(TextTask(512, detokenize=Detokenize(4, ids("hé")))).detokenized
    assert detokenized is not None
    assert (detokenized.id, detokenized.text) == (4, "hé")


def test_threads_have_a_process_each(make: Make) -> None:
    encoders, texts = make(), [str(at) * 300 for at in range(8)]
    answers: dict[int, bytes] = {}

    def work(at: int) -> None:
        answers[at] = encoders.do(chat(texts[at])).token_ids

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [answers[at] for at in range(len(texts))] == [ids(text) for text in texts]


def test_processes_for_text_come_after_the_streams(make: Make) -> None:
    assert make().do(chat("one")).token_ids == ids("one")
    nice = min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
    assert [each.nice() for each in helpers()] == [nice, nice], "that of the loader, and one that works"


def test_processes_that_somebody_has_killed_are_replaced(make: Make) -> None:
    encoders = make()
    assert encoders.do(chat("one")).token_ids == ids("one")
    for process in helpers():
        process.kill()
        process.wait(10)
    assert encoders.do(chat("two")).token_ids == ids("two")


def test_nothing_is_started_before_it_is_needed_and_nothing_stays(make: Make) -> None:
    before = len(helpers())
    encoders = make()
    assert len(helpers()) == before
    encoders.start()
    assert len(helpers()) == before + 1
    encoders.do(chat("hello"))
    assert len(helpers()) == before + 2
    encoders.close()
    eventually(lambda: len(helpers()) == before)


def test_processes_that_cannot_be_started_are_no_fault_of_the_text(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMMAND", ("/bin/false",))
    with pytest.raises(EncoderFailed):
        make().do(chat("hello"))


@pytest.mark.parametrize(("number", "words"), [
    (errno.EAGAIN, "the limit of processes is reached (ulimit -u, or TasksMax in a unit)"),
    (errno.ENOMEM, "memory has run out"), (errno.EMFILE, "Too many open files"),
])  # fmt: skip
def test_what_a_process_that_cannot_be_started_lacks_is_said(
    make: Make, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(*_: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.subprocess, "Popen", refuse)
    with pytest.raises(OSError) as caught:
        make().do(chat("hello"))
    assert words in reason_of(caught.value)
