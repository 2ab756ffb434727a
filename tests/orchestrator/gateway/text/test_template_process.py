"""Templates that the sandbox cannot stop: the process that renders them ends, and the next one serves."""

import gc
import threading
import time

import psutil
import pytest

from mgpu.orchestrator.gateway.text.chat_template import ChatTemplateError
from mgpu.orchestrator.gateway.text.template_process import TemplateProcess

LIMIT_S = 0.5


def process_of(bomb: str) -> TemplateProcess:
    """Make a template that goes off on the message ``boom`` and else repeats the message."""
    source = "{% if messages[0].content == 'boom' %}" + bomb + "{% endif %}{{ bos_token }}{{ messages[0].content }}"
    return TemplateProcess(source, {"bos_token": "<s>"}, LIMIT_S)


def say(template: TemplateProcess, text: str) -> str:
    return template.render([{"role": "user", "content": text}])


def helpers() -> list[psutil.Process]:
    """List the processes that render for this one."""
    return [each for each in psutil.Process().children() if each.cmdline()[-1].endswith("template_process")]


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
def test_a_bomb_ends_in_an_error_and_the_next_messages_are_rendered(bomb: str) -> None:
    template, before = process_of(bomb), psutil.Process().memory_info().rss
    assert say(template, "hello") == "<s>hello"
    started_s = time.monotonic()
    with pytest.raises(ChatTemplateError):
        say(template, "boom")
    assert time.monotonic() - started_s < 20 * LIMIT_S
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert say(template, "hello again") == "<s>hello again"


def test_the_templates_own_complaint_and_options_pass_through() -> None:
    template = TemplateProcess("{% if x %}{{ raise_exception('no ' ~ x) }}{% endif %}é", {})
    assert template.render([]) == "é"
    with pytest.raises(ChatTemplateError, match="no y"):
        template.render([], {"x": "y"})


def test_a_template_that_is_none_is_refused_each_time() -> None:
    template = TemplateProcess("{% if %}", {})
    for _ in range(2):
        with pytest.raises(ChatTemplateError, match="not valid"):
            template.render([])


def test_threads_take_turns() -> None:
    template, texts = TemplateProcess("{{ messages[0].content }}", {}), [str(i) * 50_000 for i in range(8)]
    answers: dict[int, str] = {}

    def render(at: int) -> None:
        answers[at] = say(template, texts[at])

    threads = [threading.Thread(target=render, args=(at,)) for at in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [answers[at] for at in range(len(texts))] == texts


def test_nothing_is_started_before_it_is_needed_and_nothing_stays() -> None:
    gc.collect()
    before = len(helpers())
    template = process_of("")
    assert len(helpers()) == before
    say(template, "hello")
    assert len(helpers()) == before + 1
    helper = helpers()[-1]
    del template
    gc.collect()
    assert not helper.is_running()
