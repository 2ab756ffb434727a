"""The formats in which models write tool calls and reasoning, and how a chat template shows which it is."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

from mgpu.protocol.chat import gemma, harmony, hermes, llama, mistral, pythonic, sections, tagged
from mgpu.protocol.chat.machine import Found, Machine


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A way to write tool calls."""

    machine: Callable[[Found], Machine]
    markers: tuple[str, ...]
    """Texts that the parser must see, though they may be special tokens."""
    template: re.Pattern[str]
    """Finds it in a chat template."""


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The markers around reasoning."""

    begin: str
    end: str
    template: re.Pattern[str]
    label: str = ""
    """What the model writes behind ``begin`` before it thinks."""


def _tagged(tags: tagged.Tags, template: str) -> ToolFormat:
    return ToolFormat(partial(tagged.Tagged, tags=tags), tags.whole_tags(), re.compile(template))


HARMONY = "harmony"
"""Calls and reasoning have one format, and one parser."""
TOOL_FORMATS = {
    # The first whose pattern is in the template is taken, so the special ones come first.
    HARMONY: ToolFormat(
        harmony.Harmony,
        (harmony.START, harmony.CHANNEL, harmony.MESSAGE, *harmony.ENDS, "<|constrain|>"),
        re.compile(r"<\|channel\|>"),
    ),
    "gemma4": ToolFormat(gemma.Gemma, (gemma.BEGIN, gemma.END, gemma.QUOTE), re.compile(r"<\|tool_call>")),
    # V3 and R1 write JSON in a block, V3.1 does not: one parser takes both.
    "deepseek-v3": ToolFormat(
        sections.DeepSeek, sections.DeepSeek.markers(), re.compile(r"<｜tool▁sep｜>[\s\S]*?```json")
    ),
    "deepseek-v3.1": ToolFormat(sections.DeepSeek, sections.DeepSeek.markers(), re.compile(r"<｜tool▁call▁begin｜>")),
    "deepseek-v3.2": _tagged(tagged.DEEPSEEK, r"｜DSML｜"),
    "kimi-k2": ToolFormat(sections.Kimi, sections.Kimi.markers(), re.compile(r"<\|tool_calls?_(section_)?begin\|>")),
    "minimax": _tagged(tagged.MINIMAX, r"<minimax:tool_call>"),
    "glm": _tagged(tagged.GLM, r"<arg_key>"),
    "qwen3-coder": _tagged(tagged.QWEN_CODER, r"<function=[^>]*>[\s\S]*<parameter="),
    "mistral": ToolFormat(mistral.Mistral, (mistral.BEGIN, mistral.ARGS, mistral.CALL_ID), re.compile(r"\[TOOL_CALLS")),
    "hermes": ToolFormat(hermes.Hermes, (hermes.BEGIN, hermes.END), re.compile(r"<tool_call>")),
    "pythonic": ToolFormat(
        pythonic.Pythonic,
        (pythonic.BEGIN, pythonic.END),
        re.compile(r"\[\s*func(tion)?_?name\d?\s*\(|<\|python_start(?![\s\S]*\"parameters\")"),
    ),
    "llama": ToolFormat(
        llama.Llama,
        (llama.TAG,),
        re.compile(r"<\|python_tag\|>|<\|(start_header_id|header_start)\|>[\s\S]*\"parameters\""),
    ),
}
REASONING_FORMATS = {
    "think": ReasoningFormat("<think>", "</think>", re.compile(r"</?think>")),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]", re.compile(r"\[/?THINK\]")),
    "gemma4": ReasoningFormat("<|channel>", "<channel|>", re.compile(r"<\|channel>"), "thought"),
}
TOOL_FORMAT_NAMES = ("auto", "none", *TOOL_FORMATS)
REASONING_FORMAT_NAMES = ("auto", "none", HARMONY, *REASONING_FORMATS)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a model marks calls and reasoning; empty names if it does not, or it is not known."""

    tools: str = ""
    reasoning: str = ""

    def markers(self) -> tuple[str, ...]:
        """Return the texts that a parser must see, though they may be special tokens."""
        tools = TOOL_FORMATS[self.tools].markers if self.tools else ()
        if self.reasoning == HARMONY:
            return tools or TOOL_FORMATS[HARMONY].markers
        reasoning = REASONING_FORMATS[self.reasoning] if self.reasoning else None
        return tools if reasoning is None else (*tools, reasoning.begin, reasoning.end)


@lru_cache(maxsize=4)
def detected(template: str | None, tools: str = "auto", reasoning: str = "auto") -> ChatFormat:
    """Return the format of a chat template. ``tools`` and ``reasoning`` override it unless they are `auto`."""
    text = template or ""
    if tools == "auto":
        tools = next((name for name, each in TOOL_FORMATS.items() if each.template.search(text)), "")
    if reasoning == "auto":
        found = next((name for name, each in REASONING_FORMATS.items() if each.template.search(text)), "")
        reasoning = HARMONY if tools == HARMONY else found
    return ChatFormat("" if tools == "none" else tools, "" if reasoning == "none" else reasoning)


def opens_reasoning(prompt: str) -> bool:
    """Return whether a rendered prompt ends with the marker that begins reasoning."""
    return prompt[-64:].rstrip().endswith(tuple(each.begin + each.label for each in REASONING_FORMATS.values()))
