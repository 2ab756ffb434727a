"""Turn what clients send into token ids, or into text: what is short at once, what is long and chats in processes.

Owners take turns by the CPU time that their texts took (`front/fair_turns.py`), and so do the accounts of each, none
of which has two under way. An owner whose last text took long has one under way, whatever accounts it has. So one whose
texts are long, or hang until they are killed, delays others by one of them at most, once it is known. Where cores are
few, an owner whose texts have cost much begins them at a pace that leaves the core to the streams (`text_pace.py`).
"""

import logging
import time
from collections import Counter
from concurrent.futures import Future

from mgpu.orchestrator.gateway.front.fair_turns import FairTurns, Path
from mgpu.orchestrator.gateway.front.refusal import RETRY_AFTER_S, Refusal
from mgpu.orchestrator.gateway.requests.demands import form_after_reasoning, thinking_limit
from mgpu.orchestrator.gateway.requests.request import Request
from mgpu.orchestrator.gateway.requests.request_handler import RequestHandler
from mgpu.orchestrator.gateway.requests.text_pace import TextPace
from mgpu.orchestrator.gateway.text.processes.background import NUM_THREADS, BackgroundTasks
from mgpu.orchestrator.gateway.text.processes.encoder_messages import TextReply, TextTask
from mgpu.orchestrator.gateway.text.processes.encoder_process import EncoderFailed, EncoderProcesses, reason_of
from mgpu.orchestrator.gateway.text.processes.text_tasks import do
from mgpu.orchestrator.gateway.text.text_queries import chat_of
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec
from mgpu.protocol.front.client_messages import Detokenize, Generate, Tokenize
from mgpu.protocol.internal.process.bounded_log import BoundedLog

INLINE_CHARS = 2048
"""Longer prompts go to another process."""
INLINE_IDS = 256
"""More token ids are turned into text in another process."""
SLOW_S = 0.05
"""If a short prompt takes longer, all further ones go to another process too."""
MOST_SLOW = 4096
"""Owners that are remembered as slow."""

log = logging.getLogger(__name__)


class Prompts:
    """Tokenizes every request and admits or refuses it; while another process has the text, it is in the table.

    Text queries (tokenize, detokenize) go the same way, and are answered where a request is admitted.
    """

    def __init__(
        self, requests: RequestHandler, background: BackgroundTasks, encoders: EncoderProcesses, vocab_size: int
    ) -> None:
        self._requests = requests
        self._background = background
        self._encoders = encoders
        self._vocab_size = vocab_size
        self._turns: FairTurns[Request] = FairTurns()
        self._running_of: Counter[str] = Counter()
        """Texts of each owner that are worked on."""
        self._slow: set[str] = set()
        """Owners whose last text took long."""
        self._pace = TextPace()
        self._num_running = 0
        self._bug_log, self._limit_log = BoundedLog(log, logging.ERROR), BoundedLog(log, logging.ERROR)

    def encode(self, request: Request, codec: TextCodec | None) -> None:
        """Begin with ``request``. Refusal when it is known at once that it will not run."""
        spec, is_query = request.spec, request.query is not None
        if spec.prompt_ids is not None and not is_query:
            self._requests.check_length(len(spec.prompt_ids) // 4)
            if spec.structured_outputs is None:
                self._requests.admit(request, spec.prompt_ids)
                return
        if codec is None:
            way_out = "" if is_query or spec.structured_outputs else "; send prompt_ids"
            raise Refusal("bad_request", f"the model's folder has no tokenizer{way_out}")
        if spec.prompt is not None and not is_query:
            self._requests.check_length(codec.least_tokens(spec.prompt), is_exact=False)
        if codec.is_quick and spec.structured_outputs is None and _is_short(spec):
            self._conclude(request, self._done_here(codec, request))
            return
        request.is_encoding = True
        self._requests.table.add(request)
        self._turns.put(request.account.path, request)
        self._start_next()

    def _done_here(self, codec: TextCodec, request: Request) -> TextReply:
        began_s = time.thread_time()
        try:
            return do(codec, self._task_of(request), self._vocab_size)
        finally:
            if time.thread_time() - began_s > SLOW_S:
                codec.is_quick = False

    def _task_of(self, request: Request) -> TextTask:
        longest, query, spec = self._requests.longest_prompt, request.query, request.spec
        if isinstance(query, Tokenize):
            return TextTask(longest, tokenize=query)
        if isinstance(query, Detokenize):
            return TextTask(longest, detokenize=query)
        thinking = thinking_limit(spec, self._requests.chat_format)
        needs_vocabulary = spec.structured_outputs is not None or thinking is not None
        return TextTask(
            longest, spec.prompt, None if spec.messages is None else chat_of(spec),
            structured_outputs=spec.structured_outputs,
            structured_after_reasoning=form_after_reasoning(spec, self._requests.chat_format),
            thinking=thinking,
            wants_vocabulary=needs_vocabulary and not self._requests.has_sent_vocabulary,
        )  # fmt: skip

    # ---------------------------------------------------------------- in turns

    def wait_s(self) -> float:
        """Return how long to wait until `begin_paused` has something to do."""
        return self._pace.wait_s()

    def begin_paused(self) -> None:
        """Begin texts that had to wait, now that their time has come."""
        if self._pace.is_due():
            self._start_next()

    def _start_next(self) -> None:
        """Let as many processes work as there may be, for the accounts whose turn it is."""
        while self._num_running < NUM_THREADS and (taken := self._turns.take(self._may_begin)) is not None:
            path, request = taken
            if self._has_ended(request):
                self._turns.charge(path, 0.0)
            else:
                self._start(path, request)

    def _may_begin(self, owner: str) -> bool:
        """Return whether an owner may have one more process: those with slow texts leave one to the others."""
        num_running, table = self._running_of[owner], self._requests.table
        if num_running and owner in self._slow:
            return False
        return self._pace.lets(owner, num_running, len(table) > table.quota.usage_of_owner(owner).requests)

    def _note_cost(self, owner: str, cpu_s: float) -> None:
        self._running_of[owner] -= 1
        if not self._running_of[owner]:
            del self._running_of[owner]
        self._pace.charge(owner, cpu_s)
        if cpu_s < SLOW_S:
            self._slow.discard(owner)
        elif len(self._slow) < MOST_SLOW or owner in self._slow:
            self._slow.add(owner)
        else:
            self._slow = {owner}

    def _start(self, path: Path, request: Request) -> None:
        began_s = time.monotonic()
        task = self._task_of(request)
        self._running_of[path[0]] += 1

        def finish(future: "Future[TextReply]") -> None:
            self._num_running -= 1
            cpu_s = (0.0 if future.exception() else future.result().cpu_s) or time.monotonic() - began_s
            self._note_cost(path[0], cpu_s)
            self._turns.charge(path, cpu_s)
            self._start_next()
            if not self._has_ended(request):
                self._finish(request, future)

        self._num_running += 1
        self._background.run(lambda: self._encoders.do(task), finish)

    def _has_ended(self, request: Request) -> bool:
        """Return whether the request has ended meanwhile; then its prompt is not counted any longer."""
        table = self._requests.table
        if table.get(request.connection, request.id) is request:
            return False
        request.is_encoding = False
        table.forget_prompt(request)
        return True

    def _finish(self, request: Request, future: "Future[TextReply]") -> None:
        request.is_encoding = False
        self._requests.table.remove(request)
        error = future.exception()
        try:
            if isinstance(error, (EncoderFailed, OSError)):  # at a limit of this machine, which may pass
                self._limit_log.write("no process for texts can be started: %s", reason_of(error))
                text = f"the server cannot start a process for this text: {reason_of(error)}"
                raise Refusal("overloaded", text, RETRY_AFTER_S)
            if error is not None:  # a failure of the server's own
                self._bug_log.write("a prompt could not be tokenized", error=error)
                raise Refusal("engine_error", "internal error in the gateway")
            self._conclude(request, future.result())
        except Refusal as refusal:
            self._requests.refuse(request.connection, request.id, refusal)
        except Exception as bug:  # our own bug must cost one request, not the gateway
            self._bug_log.write("a request could not be admitted", error=bug)
            self._requests.refuse(
                request.connection, request.id, Refusal("engine_error", "internal error in the gateway")
            )

    def _conclude(self, request: Request, result: TextReply) -> None:
        """Admit the request, or answer the query. Refusal when there is no result, or one that does not fit."""
        reply = result.tokenized or result.detokenized
        if result.error:
            raise Refusal("bad_request", result.error)
        if reply is not None:
            self._requests.reply(request, reply)
            return
        self._requests.check_length(result.num_tokens, result.is_exact)
        if result.vocabulary is not None:
            self._requests.send_vocabulary(result.vocabulary)
        self._requests.admit(
            request, request.spec.prompt_ids or result.token_ids, result.grammar, result.opens_reasoning
        )


def _is_short(spec: Generate) -> bool:
    """Return True if a turn of the gateway's loop has time for the text of this request."""
    if spec.prompt_ids is not None:
        return len(spec.prompt_ids) <= 4 * INLINE_IDS
    return spec.prompt is not None and len(spec.prompt) <= INLINE_CHARS
