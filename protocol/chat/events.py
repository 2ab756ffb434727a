"""What a parser finds in the text of an answer, piece by piece."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model has thought before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call begins. Calls are numbered from 0."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next part of the arguments, which are a JSON object as a whole."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is complete."""

    index: int


@dataclass(frozen=True, slots=True)
class CallBroken:
    """The call has begun, but what follows does not parse. It is no call; all of its text follows as `Content`."""

    index: int


Event = Content | Reasoning | CallBegin | CallArguments | CallEnd | CallBroken
