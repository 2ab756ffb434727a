"""Answers as models of each format write them, and what a parser finds in them."""

from dataclasses import dataclass, field

from mgpu.protocol.chat.formats import ChatFormat

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "For tests.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "code": {"type": "string"},
                    "tags": {"type": "array"},
                },
            },
        },
    }
    for name in ("get_weather", "get-time", "run_code")
]


@dataclass(frozen=True, slots=True)
class Recorded:
    name: str
    chat_format: ChatFormat
    text: str
    content: str = ""
    calls: list[tuple[str, object]] = field(default_factory=list)
    reasoning: str = ""
    in_reasoning: bool = False


_H = ChatFormat("hermes")
_T = ChatFormat("hermes", "think")
_Q = ChatFormat("qwen3-coder")
_G = ChatFormat("glm", "think")
_X = ChatFormat("minimax", "think")
_V32 = ChatFormat("deepseek-v3.2", "think")
_4 = ChatFormat("gemma4", "gemma4")
_L = ChatFormat("llama")
_M = ChatFormat("mistral", "mistral")
_P = ChatFormat("pythonic")
_O = ChatFormat("harmony", "harmony")
_WEATHER = '{"name": "get_weather", "arguments": {"city": "Zürich 🌧", "days": 3}}'
_WEATHER_CALL = ("get_weather", {"city": "Zürich 🌧", "days": 3})
_CODE_VALUE = 'def f():\n    return "<a>\\n"  # </par'
_TOO_LARGE = '<tool_call>{"name": "get-time", "arguments": {"a": 1e999}}</tool_call>'
_NEVER_ENDS = "<function=get_weather><parameter=city>" * 3

_GLM_CALL = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Zürich 🌧</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>"
)
_DSML_CALL = (
    '<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">Zürich 🌧</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>'
)
_DSML_UNSAID = '<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city">Bern</｜DSML｜parameter>'
_MINIMAX_CALL = (
    '<invoke name="get_weather">\n<parameter name="city">Zürich 🌧</parameter>\n<parameter name="days">3</parameter>\n'
    "</invoke>"
)
_GEMMA_CALL = '<|tool_call>call:get_weather{city:<|"|>Zürich 🌧<|"|>,days:3}<tool_call|>'
_GEMMA_VALUES = (
    '<|tool_call>call:run_code{code:<|"|>{"a": [1]}\n, }<|"|>, tags: [<|"|>x<|"|>, -1.5e3, {deep: true, <|"|>no<|"|>:'
    "null}, []]}<tool_call|>"
)
_GEMMA_BROKEN = "<|tool_call>call:get_weather{city:Bern}<tool_call|>"
_GEMMA_TWICE = "<|tool_call>call:get_weather{days:1,days:2}<tool_call|>"

_V3 = ChatFormat("deepseek-v3", "think")
_V31 = ChatFormat("deepseek-v3.1", "think")
_K2 = ChatFormat("kimi-k2")
_V3_CALL = (
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Zürich 🌧", "days": 3}\n```<｜tool▁call▁end｜>'
)
_V31_CALL = '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Zürich 🌧", "days": 3}<｜tool▁call▁end｜>'
_V3_BROKEN = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>rm<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
_K2_CALL = (
    '<|tool_call_begin|>functions.{}:{}<|tool_call_argument_begin|>{{"city": "Zürich 🌧", "days": 3}}<|tool_call_end|>'
)
_K2_BROKEN = "<|tool_calls_section_begin|> <|tool_call_begin|>get-time<|tool_call_argument_begin|>{}"

RECORDED = [
    Recorded(
        "deepseek-v3 reasoning that the prompt began, two calls in blocks",
        _V3,
        f"Hm.</think>\n\nI look.<｜tool▁calls▁begin｜>{_V3_CALL}\n{_V3_CALL}<｜tool▁calls▁end｜>",
        "I look.",
        [_WEATHER_CALL] * 2,
        "Hm.",
        in_reasoning=True,
    ),
    Recorded(
        "deepseek-v3.1 text, two calls",
        _V31,
        f"I look.\n\n<｜tool▁calls▁begin｜>{_V31_CALL}{_V31_CALL}<｜tool▁calls▁end｜>",
        "I look.",
        [_WEATHER_CALL] * 2,
    ),
    Recorded(
        "deepseek-v3.1 a call without a section or its end",
        _V31,
        _V31_CALL.removesuffix("<｜tool▁call▁end｜>"),
        calls=[_WEATHER_CALL],
    ),
    Recorded("deepseek-v3.1 no such tool", _V31, _V3_BROKEN, _V3_BROKEN),
    Recorded("deepseek-v3.1 a section without calls", _V31, "<｜tool▁calls▁begin｜>No.", "<｜tool▁calls▁begin｜>No."),
    Recorded(
        "kimi-k2 text, two calls",
        _K2,
        "I look.<|tool_calls_section_begin|>"
        + _K2_CALL.format("get_weather", 0)
        + _K2_CALL.format("run_code", 1)
        + "<|tool_calls_section_end|>",
        "I look.",
        [_WEATHER_CALL, ("run_code", _WEATHER_CALL[1])],
    ),
    Recorded("kimi-k2 an id without its number", _K2, _K2_BROKEN, _K2_BROKEN),
    Recorded(
        "gemma4 keys and strings as JSON has them",
        _4,
        '<|tool_call>call:run_code{code:"a\\n<|\\"",tags:[{"x \\u00e9" : "]"}, "b"]}<tool_call|>',
        calls=[("run_code", {"code": 'a\n<|"', "tags": [{"x é": "]"}, "b"]})],
    ),
    Recorded(
        "glm reasoning, text, two calls",
        _G,
        f"<think>\nHm.</think>\nI look.\n{_GLM_CALL}\n{_GLM_CALL}",
        "I look.",
        [_WEATHER_CALL] * 2,
        "Hm.",
    ),
    Recorded(
        "glm without line breaks or arguments",
        _G,
        "<tool_call>get-time</tool_call><tool_call>run_code<arg_key>code</arg_key><arg_value>\na < b\n</arg_value>"
        "<arg_key>tags</arg_key><arg_value>[1]</arg_value></tool_call>",
        calls=[("get-time", {}), ("run_code", {"code": "\na < b\n", "tags": [1]})],
    ),
    Recorded("glm no such tool", _G, "<tool_call>rm\n</tool_call>", "<tool_call>rm\n</tool_call>"),
    Recorded("glm cut in a key", _G, "<tool_call>get-time\n<arg_ke", "<tool_call>get-time\n<arg_ke"),
    Recorded(
        "minimax reasoning that the prompt began, two calls in a block",
        _X,
        f"Hm.\n</think>\n\n<minimax:tool_call>\n{_MINIMAX_CALL}\n{_MINIMAX_CALL}\n</minimax:tool_call>",
        calls=[_WEATHER_CALL] * 2,
        reasoning="Hm.",
        in_reasoning=True,
    ),
    Recorded(
        "deepseek-v3.2 reasoning that the prompt began, text, two calls in a block",
        _V32,
        f"Hm.</think>I look.\n\n<｜DSML｜function_calls>\n{_DSML_CALL}\n{_DSML_CALL}\n</｜DSML｜function_calls>",
        "I look.",
        [_WEATHER_CALL] * 2,
        reasoning="Hm.",
        in_reasoning=True,
    ),
    Recorded(
        "deepseek-v3.2 tags say what a value is, whatever the schema says",
        _V32,
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="false">'
        '["a"]</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="true">3</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>",
        calls=[("get_weather", {"city": ["a"], "days": "3"})],
    ),
    Recorded("deepseek-v3.2 a parameter that does not say what it is", _V32, _DSML_UNSAID, _DSML_UNSAID),
    Recorded("minimax name without its quote", _X, '<invoke name="get-time>', '<invoke name="get-time>'),
    Recorded(
        "gemma4 reasoning, text, two calls",
        _4,
        f"<|channel>thought\nHm.\n<channel|>I look.{_GEMMA_CALL}{_GEMMA_CALL}",
        "I look.",
        [_WEATHER_CALL] * 2,
        "Hm.",
    ),
    Recorded("gemma4 empty reasoning", _4, "<|channel>thought\n<channel|>Hello.", "Hello."),
    Recorded(
        "gemma4 values of all kinds",
        _4,
        _GEMMA_VALUES,
        calls=[("run_code", {"code": '{"a": [1]}\n, }', "tags": ["x", -1.5e3, {"deep": True, "no": None}, []]})],
    ),
    Recorded("gemma4 no arguments, no end", _4, "<|tool_call>call:get-time{}", calls=[("get-time", {})]),
    Recorded("gemma4 a string without its tokens", _4, _GEMMA_BROKEN, _GEMMA_BROKEN),
    Recorded("gemma4 a key twice", _4, _GEMMA_TWICE, _GEMMA_TWICE),
    Recorded("gemma4 no such tool", _4, "<|tool_call>call:rm{}<tool_call|>", "<|tool_call>call:rm{}<tool_call|>"),
    Recorded(
        "gemma4 cut in a string",
        _4,
        '<|tool_call>call:run_code{code:<|"|>x<|',
        '<|tool_call>call:run_code{code:<|"|>x<|',
    ),
    Recorded(
        "qwen3-coder number too large",
        _Q,
        "<tool_call><function=get_weather><parameter=days>1e999</parameter></function></tool_call>",
        calls=[("get_weather", {"days": "1e999"})],
    ),
    Recorded("qwen3-coder values that never end", _Q, _NEVER_ENDS, _NEVER_ENDS),
    Recorded("pythonic half a surrogate pair", _P, r"[get_weather(city='\ud800')]", r"[get_weather(city='\ud800')]"),
    Recorded("hermes text", _H, "Just text, 1 < 2 <tool", "Just text, 1 < 2 <tool"),
    Recorded("hermes call", _H, f"<tool_call>\n{_WEATHER}\n</tool_call>", calls=[_WEATHER_CALL]),
    Recorded("hermes spaces after", _H, f"<tool_call>\n{_WEATHER}\n</tool_call>\n\n", calls=[_WEATHER_CALL]),
    Recorded(
        "hermes parallel calls",
        _H,
        f'I look.\n\n<tool_call>\n{_WEATHER}\n</tool_call>\n<tool_call>\n{{"arguments": {{}}, "name": "get-time"}}\n'
        "</tool_call>",
        "I look.",
        [_WEATHER_CALL, ("get-time", {})],
    ),
    Recorded("hermes no arguments", _H, '<tool_call>{"name": "get-time"}</tool_call>', calls=[("get-time", {})]),
    Recorded(
        "hermes arguments as text",
        _H,
        r'<tool_call>{"name": "get_weather", "arguments": "{\"city\": \"A\"}"}</tool_call>',
        calls=[("get_weather", {"city": "A"})],
    ),
    Recorded("hermes number too large", _H, _TOO_LARGE, _TOO_LARGE),
    Recorded("hermes without end marker", _H, f"<tool_call>{_WEATHER}", calls=[_WEATHER_CALL]),
    Recorded("hermes two in one tag", _H, f"<tool_call>{_WEATHER}\n{_WEATHER}</tool_call>", calls=[_WEATHER_CALL] * 2),
    Recorded(
        "hermes a bracket after a call",
        _H,
        f"<tool_call>{_WEATHER}{{x}}</tool_call>",
        "{x}</tool_call>",
        [_WEATHER_CALL],
    ),
    Recorded("hermes text after", _H, f"<tool_call>{_WEATHER}</tool_call>\nDone.", "Done.", [_WEATHER_CALL]),
    Recorded(
        "hermes cut in a call",
        _H,
        'A\n<tool_call>{"name": "get_weather", "arguments": {"city": "Zü',
        'A\n<tool_call>{"name": "get_weather", "arguments": {"city": "Zü',
    ),
    Recorded(
        "hermes broken arguments",
        _H,
        '<tool_call>{"name": "get_weather", "arguments": {city: 1}}</tool_call> B',
        '<tool_call>{"name": "get_weather", "arguments": {city: 1}}</tool_call> B',
    ),
    Recorded(
        "hermes unknown tool",
        _H,
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
    ),
    Recorded(
        "hermes arguments are a list",
        _H,
        '<tool_call>{"name": "get-time", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "get-time", "arguments": [1]}</tool_call>',
    ),
    Recorded(
        "hermes broken, then a call",
        _H,
        f"<tool_call>{{'name': 1}}</tool_call>\n<tool_call>{_WEATHER}</tool_call>",
        "<tool_call>{'name': 1}</tool_call>",
        [_WEATHER_CALL],
    ),
    Recorded(
        "hermes call in a broken one",
        _H,
        f"<tool_call><tool_call>{_WEATHER}</tool_call>",
        "<tool_call>",
        [_WEATHER_CALL],
    ),
    Recorded(
        "hermes replacement characters",
        _H,
        '<tool_call>{"name": "get-time", "arguments": {"\ufffd": "\ufffd"}}',
        calls=[("get-time", {"\ufffd": "\ufffd"})],
    ),
    Recorded(
        "thinking, then a call",
        _T,
        f"<think>\nIt may rain.\n\nYes.\n</think>\n\n<tool_call>{_WEATHER}</tool_call>",
        "",
        [_WEATHER_CALL],
        "It may rain.\n\nYes.",
    ),
    Recorded("thinking, then text", _T, "<think>a < b</think>\nAnswer </think>", "Answer </think>", [], "a < b"),
    Recorded("no thoughts", _T, "<think>\n\n</think>\n\nAnswer\n", "Answer\n"),
    Recorded("prompt has opened think", _T, "Hm.\n</think>\n\nAnswer", "Answer", [], "Hm.", True),
    Recorded("think is never closed", _T, "<think>\nHm. </thin", "", [], "Hm. </thin"),
    Recorded("no think marker", _T, "Answer with <think>", "Answer with <think>"),
    Recorded(
        "a call inside of think",
        _T,
        f"<think><tool_call>{_WEATHER}</tool_call></think>B",
        "B",
        [],
        f"<tool_call>{_WEATHER}</tool_call>",
    ),
    Recorded(
        "coder call",
        _Q,
        "Look:\n<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich\n</parameter>\n<parameter=days>\n3\n"
        '</parameter>\n<parameter=tags>\n["a", 1]\n</parameter>\n</function>\n</tool_call>',
        "Look:",
        [("get_weather", {"city": "Zürich", "days": 3, "tags": ["a", 1]})],
    ),
    Recorded(
        "coder code",
        _Q,
        f"<tool_call>\n<function=run_code>\n<parameter=code>\n{_CODE_VALUE}\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=get-time>\n</function>\n</tool_call>",
        "",
        [("run_code", {"code": _CODE_VALUE}), ("get-time", {})],
    ),
    Recorded(
        "coder without tag",
        _Q,
        "<function=get_weather><parameter=city>A</parameter></function>",
        "",
        [("get_weather", {"city": "A"})],
    ),
    Recorded(
        "coder value that is no number",
        _Q,
        "<function=get_weather><parameter=days>three</parameter></function>",
        "",
        [("get_weather", {"days": "three"})],
    ),
    Recorded(
        "coder cut in a value",
        _Q,
        "<tool_call><function=run_code><parameter=code>x = 1\n</param",
        "<tool_call><function=run_code><parameter=code>x = 1\n</param",
    ),
    Recorded(
        "coder unknown function",
        _Q,
        "<tool_call><function=rm></function></tool_call>",
        "<tool_call><function=rm></function></tool_call>",
    ),
    Recorded(
        "llama call", _L, '{"name": "get_weather", "parameters": {"city": "A"}}', "", [("get_weather", {"city": "A"})]
    ),
    Recorded(
        "llama tag",
        _L,
        '<|python_tag|>{"type": "function", "name": "get-time", "parameters": {}}',
        "",
        [("get-time", {})],
    ),
    Recorded(
        "llama two calls",
        _L,
        '{"name": "get-time", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "B"}}',
        "",
        [("get-time", {}), ("get_weather", {"city": "B"})],
    ),
    Recorded(
        "llama JSON that is no call", _L, '{"city": "A", "name": "get-time"}', '{"city": "A", "name": "get-time"}'
    ),
    Recorded(
        "llama text", _L, 'Say {"name": "get-time", "parameters": {}}', 'Say {"name": "get-time", "parameters": {}}'
    ),
    Recorded(
        "llama built-in tool",
        _L,
        '<|python_tag|>brave_search.call(query="x")',
        '<|python_tag|>brave_search.call(query="x")',
    ),
    Recorded(
        "llama text after", _L, '{"name": "get-time", "parameters": {}}; and more', "; and more", [("get-time", {})]
    ),
    Recorded(
        "mistral list",
        _M,
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "A"}}, {"name": "get-time", "arguments": {}}]',
        "",
        [("get_weather", {"city": "A"}), ("get-time", {})],
    ),
    Recorded(
        "mistral names",
        _M,
        'So:[TOOL_CALLS]get_weather[ARGS]{"city": "A"}[TOOL_CALLS]get-time[CALL_ID]a1b2[ARGS]{}',
        "So:",
        [("get_weather", {"city": "A"}), ("get-time", {})],
    ),
    Recorded(
        "mistral name without marker",
        _M,
        'x [TOOL_CALLS]get_weather{"city": "A"}',
        "x",
        [("get_weather", {"city": "A"})],
    ),
    Recorded(
        "mistral broken",
        _M,
        '[TOOL_CALLS] [{"name": "get-time", "arguments": {]',
        '[TOOL_CALLS] [{"name": "get-time", "arguments": {]',
    ),
    Recorded("mistral unknown", _M, "[TOOL_CALLS]rm[ARGS]{}", "[TOOL_CALLS]rm[ARGS]{}"),
    Recorded("mistral reasoning", _M, "[THINK]Hm.[/THINK]Hello [", "Hello [", [], "Hm."),
    Recorded(
        "pythonic calls",
        _P,
        "[get_weather(city='Zürich, [A)', days=-3, tags=['a', None, {'b': True}]), get-time()]",
        "",
        [("get_weather", {"city": "Zürich, [A)", "days": -3, "tags": ["a", None, {"b": True}]}), ("get-time", {})],
    ),
    Recorded(
        "pythonic markers",
        _P,
        '<|python_start|>[get_weather(city="A")]<|python_end|>',
        "",
        [("get_weather", {"city": "A"})],
    ),
    Recorded("pythonic list", _P, "[1, 2] is a list", "[1, 2] is a list"),
    Recorded("pythonic code", _P, "[get_weather(city=open('x'))]", "[get_weather(city=open('x'))]"),
    Recorded("pythonic position", _P, "[get_weather('A')]", "[get_weather('A')]"),
    Recorded("pythonic cut", _P, "[get-time(), get_weather(city='A", ", get_weather(city='A", [("get-time", {})]),
    Recorded(
        "harmony answer",
        _O,
        "<|channel|>analysis<|message|>Hm. <b><|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>",
        "Hello!",
        [],
        "Hm. <b>",
    ),
    Recorded(
        "harmony call",
        _O,
        "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city": "Zürich"}<|call|>',
        "",
        [("get_weather", {"city": "Zürich"})],
        "Look.",
    ),
    Recorded(
        "harmony recipient first, two calls",
        _O,
        "<|start|>assistant to=functions.get-time<|channel|>commentary json<|message|>{}<|call|><|start|>assistant "
        'to=functions.get_weather<|channel|>commentary<|message|>{"city": "A"}',
        "",
        [("get-time", {}), ("get_weather", {"city": "A"})],
    ),
    Recorded("harmony preamble", _O, "<|channel|>commentary<|message|>I look.<|end|>", "I look."),
    Recorded("harmony plain text", _O, "Hello <|", "Hello <|"),
    Recorded("harmony cut in a header", _O, "<|channel|>final<|mess", "<|channel|>final<|mess"),
    Recorded("harmony cut in reasoning", _O, "<|channel|>analysis<|message|>Hm", "", [], "Hm"),
    Recorded(
        "harmony broken call",
        _O,
        "<|channel|>commentary to=functions.get-time<|message|>{x}<|call|>",
        "<|channel|>commentary to=functions.get-time<|message|>{x}",
    ),
    Recorded(
        "harmony unknown tool",
        _O,
        "<|channel|>commentary to=browser.search<|message|>{}<|call|>",
        "<|channel|>commentary to=browser.search<|message|>{}",
    ),
]
