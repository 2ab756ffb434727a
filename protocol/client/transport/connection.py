"""The connections of one `Client`: one for each thread that uses it, in each process.

Theory. A ZeroMQ socket serves one thread at a time, and none survives a fork: the threads that move its bytes exist in
the parent only. So a thread that first uses a client makes a connection, and a child process makes its own. A child
never touches what it inherited, because closing such a socket would wait for threads that are not there.

A stream may be read by another thread than the one that began it (web frameworks do so). It then uses the connection
of that thread, and a lock lets them take turns.
"""

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from weakref import WeakSet

import zmq

from mgpu.protocol.client.requests.many import Answers, AnyPrompt
from mgpu.protocol.client.transport import timeouts
from mgpu.protocol.client.transport.resumable import ResumableRequest
from mgpu.protocol.client.transport.session import Reply, Session
from mgpu.protocol.errors import MgpuError

_SHARED_POLL_S = 0.02
"""The longest wait for messages if several threads take turns."""
MakeRequest = Callable[[AnyPrompt], tuple[ResumableRequest, float]]
"""Returns a request that is not sent yet, and its longest time in seconds."""


class Connection:
    """A session with the server and the lock that guards it."""

    def __init__(self, make_session: Callable[[], Session], limits: timeouts.ClientTimeouts) -> None:
        """Begin to connect."""
        self.pid = os.getpid()
        self.is_closed = False
        self.session = make_session()
        self._limits = limits
        self._lock = threading.RLock()
        self._depth = 0
        """How often the owner of the lock has taken it."""
        self._thread = threading.get_ident()
        self._is_shared = False
        self._dropped: deque[ResumableRequest] = deque()
        """Requests whose streams were garbage while the session was in use."""
        self._poller = zmq.Poller()
        self._poller.register(self.session.channel.socket, zmq.POLLIN)
        self._poller.register(self.session.channel.monitor, zmq.POLLIN)

    def begin(self, request: ResumableRequest, longest_s: float) -> None:
        """Send a request, after waiting for the server, ``longest_s`` at most, if the connection was lost."""
        self.connect(longest_s)
        with self:
            self.session.begin(request)

    def query(self, message: Mapping[str, object], reply_type: type[Reply], *waits_s: float) -> Reply:
        """Ask and wait for the reply; ``waits_s`` are for `until_reply`."""
        self.connect(min(waits_s, default=math.inf))
        with self:
            query_id = self.session.ask(message)
        try:
            self.wait(timeouts.until_reply(self.session, query_id, *waits_s))
            with self:
                return self.session.take_reply(query_id, reply_type)
        finally:
            with suppress(MgpuError), self:  # a client that was closed has forgotten it
                self.session.forget(query_id)

    def connect(self, longest_s: float = math.inf) -> None:
        """Wait until the server is connected, the first time or after a disconnection, ``longest_s`` at most."""
        with self:
            self.session.receive()
        self.wait(timeouts.until_connected(self.session, self._limits, longest_s))

    def is_lost(self) -> bool:
        """Return True if the server was connected and is not now."""
        with self:
            self.session.receive()
            return not self.session.channel.is_connected

    def wait_for(self, request: ResumableRequest, deadline_s: float) -> None:
        """Wait for a piece of the answer or its end. If time runs out, cancel the request and raise."""
        self.check_usable()
        if threading.get_ident() != self._thread:
            self._is_shared = True
        try:
            self.wait(timeouts.until_progress(self.session, request, deadline_s, self._limits))
        except MgpuError:
            self.cancel(request)
            raise

    def answer_all(self, answers: Answers, make_request: MakeRequest) -> None:
        """Send the requests of many prompts, so many at the same time as ``answers`` allows, and add what comes."""
        running: dict[ResumableRequest, tuple[int, float]] = {}
        prompts = answers.next_prompts()
        try:
            while True:
                while len(running) < answers.max_in_flight and (prompt := next(prompts, None)) is not None:
                    self._begin_one(answers, make_request, *prompt, running)
                if not running:
                    return
                self.wait_for_any({request: deadline_s for request, (_, deadline_s) in running.items()})
                for request in [each for each in running if each.has_ended]:
                    number, _ = running.pop(request)
                    _add_answer(answers, number, request)
        finally:
            for request in running:
                self.cancel(request)

    def _begin_one(
        self,
        answers: Answers,
        make_request: MakeRequest,
        number: int,
        prompt: AnyPrompt,
        running: dict[ResumableRequest, tuple[int, float]],
    ) -> None:
        try:
            request, timeout_s = make_request(prompt)
            deadline_s = time.monotonic() + timeout_s
            self.begin(request, timeout_s)
        except MgpuError as error:
            answers.fail(number, error)
        else:
            running[request] = number, deadline_s

    def wait_for_any(self, deadlines_s: Mapping[ResumableRequest, float]) -> None:
        """Wait until one of several requests has ended; one that is overdue is cancelled and gets its error."""
        self.check_usable()
        self.wait(timeouts.until_one_ends(self.session, deadlines_s, self._limits))
        with self:
            for request, at_s in deadlines_s.items():
                error = None if request.has_ended else timeouts.overdue(self.session, request, at_s, self._limits)
                if error is not None:
                    request.fail(error)
                    self.session.cancel(request)

    def wait(self, waits: Iterable[float]) -> None:
        """Wait until ``waits`` ends. It yields how long to poll next; see timeouts.py."""
        for seconds in waits:
            if self._is_shared:
                seconds = min(seconds, _SHARED_POLL_S)
                time.sleep(0)  # let another thread have its turn
            with self:
                self._poller.poll(max(0, int(seconds * 1000) + 1))
                self.session.receive()

    def cancel(self, request: ResumableRequest) -> None:
        """End a request, here and at the server. In a child of the process that began it, do nothing."""
        if not self._is_ours() or request.has_ended:
            return
        with suppress(MgpuError), self:  # a client that was closed has ended it
            self.session.cancel(request)

    def drop(self, request: ResumableRequest) -> None:
        """Cancel a request from a destructor: at once if the session is free, else when it is used next."""
        if not self._is_ours() or request.has_ended:
            return
        self._dropped.append(request)
        if self._lock.acquire(blocking=False):
            try:
                if not self._depth:
                    self._cancel_dropped()
            finally:
                self._lock.release()

    def close(self) -> None:
        """End everything in flight and close the socket; a second call does nothing."""
        if self._is_ours():
            self.is_closed = True  # a thread that waits leaves
            with self._lock:
                self.session.close()

    def check_usable(self) -> None:
        """Raise MgpuError if the connection was closed, or belongs to another process."""
        if self.is_closed:
            raise MgpuError("the client is closed")
        if self.pid != os.getpid():
            raise MgpuError("this stream belongs to the process that began it; ask again in this one")

    def __enter__(self) -> None:
        """Take the session. MgpuError if it is closed."""
        self._lock.acquire()
        self._depth += 1
        if self.is_closed:
            self.__exit__()
            raise MgpuError("the client is closed")
        if self._dropped:
            self._cancel_dropped()

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._lock.release()

    def __del__(self) -> None:
        """Close the socket when its thread has ended and no stream needs it."""
        if hasattr(self, "_lock"):
            self.close()

    def _is_ours(self) -> bool:
        return not self.is_closed and self.pid == os.getpid()

    def _cancel_dropped(self) -> None:
        while self._dropped and not self.is_closed:
            self.session.cancel(self._dropped.popleft())


def _add_answer(answers: Answers, number: int, request: ResumableRequest) -> None:
    try:
        completion = request.answer.completion()
    except MgpuError as error:
        answers.fail(number, error)
    else:
        answers.add(number, completion)


class ProcessConnections:
    """The connections of one client in one process."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.RLock()
        self._all: WeakSet[Connection] = WeakSet()
        self._is_closed = False

    def of_this_thread(self) -> Connection | None:
        """Return the connection of the calling thread, if it has one."""
        return getattr(self._local, "connection", None)

    def add(self, connection: Connection) -> None:
        """Keep a connection for as long as the calling thread uses it. Close it if the client was closed meanwhile."""
        with self._lock:
            self._all.add(connection)
            is_closed = self._is_closed
        if is_closed:
            connection.close()
        self._local.connection = connection

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._lock:
            self._is_closed = True
            connections = list(self._all)
        for connection in connections:
            connection.close()
        self._local = threading.local()
