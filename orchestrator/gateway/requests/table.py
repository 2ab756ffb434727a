"""All requests in flight, and how they are found."""

from collections.abc import Iterator

from mgpu.orchestrator.gateway.requests.quota import Quota
from mgpu.orchestrator.gateway.requests.request import Choice, Request

Name = tuple[str, int]
"""A client's own name of a request: its session and the id."""


class RequestTable:
    """Requests by connection and id, by sequence id and by name; what they hold is counted by the quota."""

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self._by_connection: dict[bytes, dict[int, Request]] = {}
        self._by_sequence: dict[int, tuple[Request, Choice]] = {}
        self._by_session: dict[Name, Request] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        """Iterate over a copy, so that requests may end meanwhile."""
        return iter([request for requests in self._by_connection.values() for request in requests.values()])

    def get(self, connection: bytes, request_id: int) -> Request | None:
        return self._by_connection.get(connection, {}).get(request_id)

    def of_connection(self, connection: bytes) -> list[Request]:
        return list(self._by_connection.get(connection, {}).values())

    def by_sequence(self, sequence_id: int) -> tuple[Request, Choice] | None:
        """Return a choice that goes on, with its request; None if it has ended here."""
        return self._by_sequence.get(sequence_id)

    def by_session(self, session: str | None, request_id: int) -> Request | None:
        """Return the request of that name, on any connection."""
        return None if session is None else self._by_session.get((session, request_id))

    def add(self, request: Request) -> None:
        request.is_over = False
        self._by_connection.setdefault(request.connection, {})[request.id] = request
        if request.spec.session is not None:
            self._by_session[request.spec.session, request.id] = request
        self._count += 1
        self.quota.arrive(request.account, request.size, request.spec.n)

    def start(self, request: Request, choices: list[Choice]) -> None:
        """Record that the engine has the sequences of ``request``."""
        request.choices = choices
        self.quota.submit(request.account, [choice.sequence_id for choice in choices], request.size)
        for choice in choices:
            self._by_sequence[choice.sequence_id] = (request, choice)

    def end_choice(self, choice: Choice) -> None:
        """Forget a choice, unless another request has taken over its sequence."""
        found = self._by_sequence.get(choice.sequence_id)
        if found is not None and found[1] is choice:
            del self._by_sequence[choice.sequence_id]

    def remove(self, request: Request) -> None:
        """Forget a request that has ended."""
        self._take_out(request)
        request.is_over = True
        if not request.choices and not request.is_encoding:
            self.forget_prompt(request)
        self.quota.leave(request.account, [each.sequence_id for each in request.choices if self._is_own(request, each)])
        for choice in request.choices:
            self.end_choice(choice)

    def _take_out(self, request: Request) -> None:
        requests = self._by_connection[request.connection]
        del requests[request.id]
        if not requests:
            del self._by_connection[request.connection]
        if self.by_session(request.spec.session, request.id) is request:
            del self._by_session[request.spec.session or "", request.id]
        self._count -= 1

    def _is_own(self, request: Request, choice: Choice) -> bool:
        """Return whether no other request has taken over the sequence of ``choice``."""
        found = self._by_sequence.get(choice.sequence_id)
        return found is None or found[0] is request

    def move(self, request: Request, connection: bytes, owner: str) -> None:
        """Continue a request whose prompt is being tokenized on another connection.

        It is never over meanwhile: the thread that has its prompt looks at any time.
        """
        self._take_out(request)
        self.quota.leave(request.account, [])
        self.forget_prompt(request)
        request.connection, request.owner = connection, owner
        self.add(request)

    def forget_prompt(self, request: Request) -> None:
        """Stop counting a request that was never submitted, once no thread needs its prompt."""
        self.quota.withdraw(request.account, request.size, request.spec.n)
