"""Templates of the families get tools, documents, options and whole messages, exactly as transformers passes them."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from harness.answers.tool_templates import FAMILIES, conversation, weather_tool
from mgpu.orchestrator.gateway.text.chat_template import ChatPrompt, ChatTemplate
from mgpu.protocol.front.chat_messages import CHAT, DOCUMENTS, TEMPLATE_OPTIONS, TOOLS

DOCUMENT = {"title": "Alps", "text": "High."}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"enable_thinking": False, "reasoning_effort": "high", "date_string": "1 May 2025"},
]


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tools", [[], [weather_tool(), weather_tool("get-time")]])
def test_a_chat_is_rendered_as_transformers_renders_it(
    theirs: PreTrainedTokenizerFast, family: str, options: dict[str, Any], tools: list[dict[str, Any]]
) -> None:
    source = FAMILIES[family]
    expected = theirs.apply_chat_template(
        conversation(), tools=tools or None, documents=[DOCUMENT], chat_template=source, tokenize=False,
        add_generation_prompt=True, **options,
    )  # fmt: skip
    chat = ChatPrompt(
        CHAT.parse("messages", conversation()),
        TOOLS.parse("tools", tools),
        DOCUMENTS.parse("documents", [DOCUMENT]),  # type: ignore[arg-type]
        TEMPLATE_OPTIONS.parse("template_options", options),
    )
    assert ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(chat) == expected
    assert all(tool["function"]["name"] in expected for tool in tools)
