"""Many prompts at once: what one prompt is, and the answers in the order of their prompts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized

from mgpu.protocol.client.requests.request_message import chat_fields, prompt_field
from mgpu.protocol.client.requests.results import Completion
from mgpu.protocol.errors import MgpuError, RequestFailed

OnePrompt = str | Sequence[int]
"""Text or token ids."""
Chat = Sequence[Mapping[str, object]]
AnyPrompt = OnePrompt | Chat
ManyPrompts = list[str] | tuple[str, ...] | Sequence[Sequence[int]]
Outcome = Completion | MgpuError
Progress = Callable[[int, int | None], object]
"""Called with the number of answers so far and that of prompts, None if it is not known."""

MAX_IN_FLIGHT = 128
"""Half of what a server takes from one client by default, so that the client can ask for something else meanwhile."""


def are_many(prompt: object) -> bool:
    """Return True for a list of prompts: of texts, of lists of token ids, or of lists of chat messages."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], (str, list, tuple))


def are_many_chats(messages: object) -> bool:
    """Return True for a list of lists of chat messages. Texts are no chats."""
    return are_many(messages) and not isinstance(messages[0], str)  # type: ignore[index]  # it is a list


def any_field(prompt: AnyPrompt) -> dict[str, object]:
    """Return the field of a message for a prompt of any kind. RequestFailed says what is wrong with it."""
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping):
        return chat_fields(prompt)
    return prompt_field(prompt)  # type: ignore[arg-type]  # it checks


class Answers:
    """The answers that have come, by the number of their prompt."""

    def __init__(
        self, prompts: Iterable[AnyPrompt], max_in_flight: int, on_progress: Progress | None, keep_errors: bool
    ) -> None:
        """``keep_errors``: an error takes the place of its answer. Otherwise `fail` raises it."""
        if max_in_flight < 1:
            raise RequestFailed("bad_request", f"max_in_flight must be at least 1, got {max_in_flight}")
        self.max_in_flight = max_in_flight
        self._prompts = enumerate(prompts)
        self._total = len(prompts) if isinstance(prompts, Sized) else None
        self._on_progress = on_progress
        self._keep_errors = keep_errors
        self._by_number: dict[int, Outcome] = {}
        self._lost: MgpuError | None = None
        """Why the server cannot be asked any more; it is the outcome of all further prompts."""

    def next_prompts(self) -> Iterator[tuple[int, AnyPrompt]]:
        """Yield prompts that nobody has taken, with their numbers; none if the server is lost."""
        for number, prompt in self._prompts:
            if self._lost is None:
                yield number, prompt
            else:
                self._note(number, self._lost)

    def add(self, number: int, completion: Completion) -> None:
        """Note an answer, and report the progress."""
        self._note(number, completion)

    def fail(self, number: int, error: MgpuError) -> None:
        """Note the error of a prompt, or raise it."""
        if not self._keep_errors:
            raise error
        if isinstance(error, ConnectionError):
            self._lost = error
        self._note(number, error)

    def _note(self, number: int, outcome: Outcome) -> None:
        self._by_number[number] = outcome
        if self._on_progress is not None:
            self._on_progress(len(self._by_number), self._total)

    def in_order(self) -> list[Outcome]:
        """Return all outcomes in the order of their prompts."""
        return [self._by_number[number] for number in sorted(self._by_number)]
