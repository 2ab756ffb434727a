"""What a caller gets back: pieces while an answer streams, and whole completions."""

from dataclasses import asdict, dataclass
from html import escape


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    """All choices together."""
    cached_tokens: int
    """Prompt tokens whose keys and values were reused."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one generated token, and of the likeliest ones at its position."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float, str], ...]
    """(token id, log-probability, text), likeliest first."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants to be called."""

    id: str
    """The result names it: `{"role": "tool", "tool_call_id": id, "content": …}`."""
    name: str
    arguments: dict[str, object]
    arguments_text: str
    """The same as the JSON that the model wrote."""


@dataclass(frozen=True, slots=True)
class ToolCallPart:
    """News of a tool call while streaming. The first part has id and name, all have a part of the arguments' JSON."""

    index: int
    id: str
    """Empty in all but the first part."""
    name: str
    arguments: str
    is_broken: bool = False
    """The call does not parse after all: it is void, and its text follows as text of the answer."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of the answer of one choice while streaming. ``text`` may lag behind ``token_ids``."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: str | None
    """stop, length, tool_calls or cancelled, in the last piece of a choice."""
    usage: Usage | None
    """In the last piece of the request."""
    reasoning: str = ""
    """Of a chat: what the model has thought before its answer. It is not part of ``text``."""
    tool_calls: tuple[ToolCallPart, ...] = ()
    stop_string: str | None = None
    """In the last piece of a choice that one of ``stop`` has ended: that string."""


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: str
    reasoning: str = ""
    """Of a chat: what the model has thought before its answer. It is not part of ``text``."""
    tool_calls: tuple[ToolCall, ...] = ()
    stop_string: str | None = None
    """Which of ``stop`` has ended it; None if none has."""

    @property
    def message(self) -> dict[str, object]:
        """The answer as a message that continues the chat."""
        message: dict[str, object] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


@dataclass(frozen=True, slots=True, repr=False)
class Completion:
    """A whole answer. What a choice has can be asked of the completion too: then it is that of the first choice."""

    choices: tuple[CompletionChoice, ...]
    usage: Usage
    model: str
    seed: int
    """The same request with this seed gets the same answer."""

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason

    @property
    def stop_string(self) -> str | None:
        return self.choices[0].stop_string

    @property
    def reasoning(self) -> str:
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.choices[0].tool_calls

    @property
    def message(self) -> dict[str, object]:
        return self.choices[0].message

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        more = f", {len(self.choices)} choices" if len(self.choices) > 1 else ""
        return f"Completion({text!r}, {self.usage.completion_tokens} tokens, {self.finish_reason!r}{more})"

    def _repr_html_(self) -> str:
        """Return the text as a notebook shows it: wrapped, and without meaning as HTML."""
        facts = f"{self.usage.completion_tokens} tokens, {self.finish_reason}, {self.model}"
        texts = "".join(f'<pre style="white-space: pre-wrap">{escape(each.text)}</pre>' for each in self.choices)
        return f"{texts}<small>{escape(facts)}</small>"

    def to_dict(self) -> dict[str, object]:
        """Return all fields as maps, lists, strings and numbers, which `json.dumps` takes."""
        return asdict(self, dict_factory=_plain)


def _plain(pairs: list[tuple[str, object]]) -> dict[str, object]:
    return {name: _listed(value) for name, value in pairs}


def _listed(value: object) -> object:
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value
