"""Chat templates: the field's conventions, in a sandbox with limits."""

import sys
import time

import pytest

from mgpu.orchestrator.gateway.text.chat_template import ChatPrompt, ChatTemplate, ChatTemplateError

USER: tuple[dict[str, object], ...] = ({"role": "user", "content": "hi"},)


def render(source: str, **options: object) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, time_limit_s=0.5)
    return template.render(ChatPrompt(USER, options=options))


def test_conventions_of_the_field_hold() -> None:
    source = (
        "{{ bos_token }}\n"
        "{% for message in messages %}\n"
        "    {% if loop.index > 1 %}{% continue %}{% endif %}\n"
        "{{ message['role'] + ': ' + message.content | trim }}\n"
        "{% generation %}x{% endgeneration %}\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
        "{% if tools is none %}!{% endif %}"
    )
    assert render(source) == "<s>\nuser: hi\nx>!"
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{{ '=' * 3 }}{{ '%d' % 5 }}{{ 2 ** 3 }}") == "===58"
    assert len(render("{{ strftime_now('%Y') }}")) == 4


def test_options_reach_the_template() -> None:
    source = "{% if enable_thinking is defined and not enable_thinking %}off{% endif %}"
    assert render(source, enable_thinking=False) == "off"


def test_the_templates_own_complaint_is_told() -> None:
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ChatTemplateError, match="refuses these messages"):
        render("{{ messages[5].content }}")


@pytest.mark.parametrize("source", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{% set s = namespace.__init__ %}{{ s.__globals__ }}",
    "{{ '%s' | attr('__class__') }}{{ x | attr('__class__') }}",
])  # fmt: skip
def test_code_cannot_be_reached(source: str) -> None:
    try:
        text = render(source)
    except ChatTemplateError:
        return
    assert "class" not in text
    assert "uid=" not in text


@pytest.mark.parametrize("source", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'a' * 300000000 }}",
    "{{ ['a' * 1000] * 1000000 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{% for a in range(9000) %}{{ 'a' * 1000 }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
])  # fmt: skip
def test_templates_that_never_end_or_grow_are_stopped(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(ChatTemplateError):
        render(source)
    assert time.monotonic() - started < 5


def test_the_callers_trace_function_is_restored() -> None:
    before = sys.gettrace()
    render("x")
    assert sys.gettrace() is before


def test_a_template_that_is_none_is_refused_when_it_is_compiled() -> None:
    with pytest.raises(ChatTemplateError, match="not valid"):
        ChatTemplate("{% if %}", {})
    with pytest.raises(ChatTemplateError, match="characters"):
        ChatTemplate("x" * (1 << 21), {})


@pytest.mark.parametrize(
    "source",
    ["{% break %}", "{% continue %}", "{% for a in b %}" * 30 + "x" + "{% endfor %}" * 30, "{{ " + "(" * 3000 + "1"],
)
def test_a_template_that_python_cannot_compile_is_not_valid(source: str) -> None:
    """Jinja turns it into a program, and Python's compiler refuses that with errors of its own."""
    with pytest.raises(ChatTemplateError, match="not valid"):
        ChatTemplate(source, {})


@pytest.mark.parametrize(("source", "allowed"), [
    ("{{ ('a' * 65536) | length }}", "65536"), ("{{ (65536 * 'a') | length }}", "65536"),
    ("{{ ([0, 1] * 32768) | length }}", "65536"), ("{{ (-5 * 'a') | length }}", "0"),
    ("{{ 70000 * 70000 }}", "4900000000"),
    ("{{ ('a' * 65537) | length }}", None), ("{{ (65537 * 'a') | length }}", None),
    ("{{ ([0, 1] * 32769) | length }}", None), ("{{ (32769 * (0, 1)) | length }}", None),
])  # fmt: skip
def test_a_text_or_list_is_repeated_up_to_a_bound(source: str, allowed: str | None) -> None:
    if allowed is not None:
        assert render(source) == allowed
        return
    with pytest.raises(ChatTemplateError, match="repeats a text or list too often"):
        render(source)
