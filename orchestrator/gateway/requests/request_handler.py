"""The life of a request: admitted as one sequence per choice, fed with the engine's steps, ended by one message."""

import logging
import time
from collections.abc import Sequence

from mgpu.orchestrator.gateway.front.account import NAMED_PREFIX
from mgpu.orchestrator.gateway.front.refusal import RETRY_AFTER_S, Refusal
from mgpu.orchestrator.gateway.front.socket import Received
from mgpu.orchestrator.gateway.requests.admission import ServedModel, admit, check_length, longest_prompt
from mgpu.orchestrator.gateway.requests.demands import with_demanded_call
from mgpu.orchestrator.gateway.requests.outgoing import Outgoing
from mgpu.orchestrator.gateway.requests.quota import account_number, size_of
from mgpu.orchestrator.gateway.requests.request import Choice, Request
from mgpu.orchestrator.gateway.requests.request_times import RequestTimes
from mgpu.orchestrator.gateway.requests.resume_context import pack_context, without_input
from mgpu.orchestrator.gateway.requests.table import RequestTable
from mgpu.orchestrator.gateway.text.detokenizer import Detokenizer
from mgpu.protocol.chat.formats import ChatFormat
from mgpu.protocol.front.client_messages import Generate, TextQuery
from mgpu.protocol.front.fields import int32_array
from mgpu.protocol.front.server_messages import Accepted, Detokenized, FailureCode, Keepalive, Tokenized
from mgpu.protocol.internal.gateway_messages import REFUSALS, Cancel, Outputs, Resumable, Submit
from mgpu.protocol.internal.worker_messages import Vocabulary

KEEPALIVE_S = 1.0
_FAILURE_LOG_INTERVAL_S = 1.0

log = logging.getLogger(__name__)


class RequestHandler:
    """Handles whatever happens to a request. Those in flight are in ``table``."""

    def __init__(self, model: ServedModel, table: RequestTable, outgoing: Outgoing) -> None:
        self.table = table
        self._model = model
        self._quota = table.quota
        self._outgoing = outgoing
        self.times = RequestTimes(model.spec.logs_requests)
        self._next_sequence = model.spec.first_sequence
        self._next_failure_log_s = 0.0
        self.has_sent_vocabulary = False

    # ------------------------------------------------------------- beginning

    def begin(self, received: Received, message: Generate, query: TextQuery | None = None) -> Request:
        """Return a request that is not in the table yet. Refusal for what can be seen before its prompt is read."""
        known = self.table.get(received.connection, message.id) or self.table.by_session(message.session, message.id)
        if known is not None:
            raise Refusal("duplicate_id", "a request with this id is in flight; choose another id")
        self._model.check(message)
        message = with_demanded_call(message, self._model.chat_format)
        size = size_of(len(received.frames[-1]), message.n)
        self._quota.check(received.account, size, message.n)
        now = time.monotonic()
        deadline = None if message.timeout_s is None else now + message.timeout_s
        return Request(
            received.connection,
            message,
            now,
            deadline,
            received.identity,
            received.owner,
            received.client,
            size=size,
            query=query,
            began_s=now,
        )

    @property
    def chat_format(self) -> ChatFormat:
        """How the model marks tool calls and reasoning."""
        return self._model.chat_format

    @property
    def longest_prompt(self) -> int:
        """The most tokens of a prompt that can be admitted now."""
        return longest_prompt(self._model.public_info)

    def check_length(self, num_tokens: int, is_exact: bool = True) -> None:
        """Raise Refusal if a prompt of so many tokens, or of at least so many, cannot run."""
        check_length(self._model, num_tokens, is_exact)

    def send_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Send the engine what it needs before the first request with a grammar."""
        if not self.has_sent_vocabulary:
            self.has_sent_vocabulary = True
            self._outgoing.to_engine(vocabulary)

    def admit(self, request: Request, prompt: bytes, grammar: str = "", opens_reasoning: bool = False) -> None:
        """Send the engine one sequence per choice. Refusal when the request cannot run.

        ``opens_reasoning``: the answer begins within the reasoning.
        """
        spec, share = request.spec, self._share_of(request)
        accepted, submits = admit(self._model, spec, prompt, self._next_sequence, share, grammar)
        if spec.show_markers:
            accepted = self._model.with_format(accepted, opens_reasoning)
        self._next_sequence += len(submits)
        request.prompt_tokens = accepted.prompt_tokens
        choices = [self.new_choice(spec, at, each.sequence_id, each.stop_token_ids) for at, each in enumerate(submits)]
        if spec.emitted_ids is not None:
            choices[0].begin_after(int32_array(spec.emitted_ids))
        self.table.add(request)
        try:
            self._submit(request, choices, accepted, submits)
        except BaseException:  # the caller tells the client; what is in the table would be waited for without end
            self.drop(request)
            raise

    def _submit(self, request: Request, choices: list[Choice], accepted: Accepted, submits: list[Submit]) -> None:
        self.table.start(request, choices)
        if request.spec.session is not None:
            context = pack_context(request, accepted)
            self._outgoing.to_engine(Resumable(request.spec.session, request.id, context, submits))
        else:
            for submit in submits:
                self._outgoing.to_engine(submit)
        request.spec = without_input(request.spec)
        self._outgoing.to_client(request.connection, accepted)

    def _share_of(self, request: Request) -> list[tuple[int, float]]:
        """Return number and weight of each part of the account, the owner first."""
        owner, *parts = request.account.path
        weight_of = self._quota.limits.weight_of
        named = owner if owner.startswith(NAMED_PREFIX) else request.identity
        weights = [weight_of(named), *map(weight_of, parts)]
        return [(account_number(name), weight) for name, weight in zip((owner, *parts), weights, strict=True)]

    def reply(self, request: Request, message: Tokenized | Detokenized) -> None:
        """Answer a text query; it is not in the table any more."""
        self._outgoing.to_client(request.connection, message)

    def new_choice(self, spec: Generate, index: int, sequence_id: int, stop_ids: Sequence[int]) -> Choice:
        codec, text = self._model.codec, None
        if codec is not None:
            shown = self._model.shown_with_markers if spec.show_markers else codec.shown_bytes
            bytes_of = shown if spec.skip_special_tokens else codec.all_bytes
            text = Detokenizer(bytes_of, spec.stop, spec.min_tokens)
        return Choice(index, sequence_id, frozenset(stop_ids), codec, text)

    # --------------------------------------------------------------- running

    def on_outputs(self, outputs: Outputs) -> None:
        """Pass the tokens of one engine step on."""
        now = time.monotonic()
        for sequence_id, queue_s in outputs.queue_s.items():
            found = self.table.by_sequence(sequence_id)
            if found is not None and found[0].queue_s is None:
                found[0].queue_s = queue_s
        for at, sequence_id in enumerate(outputs.sequence_ids):
            found = self.table.by_sequence(sequence_id)
            if outputs.finish[at]:
                self._quota.ended(sequence_id)
            elif found is None or found[1].last_token_s is None:
                self._quota.begun(sequence_id)
            if found is None or found[1].is_replaying:
                continue  # the request has ended here, or a portion of the engine's record will bring the tokens
            request, choice = found
            if choice.last_token_s is None and choice.index == 0:
                request.cached_tokens = outputs.cached_tokens[at]
            if outputs.finish[at] == "error":
                self.fail(request, _failure_of(outputs.errors[at]))
                continue
            logprobs = outputs.logprobs[at] if outputs.logprobs else ()
            self.times.on_tokens(request, choice, len(outputs.token_ids[at]), now)
            try:
                choice.add_tokens(outputs.token_ids[at], logprobs, outputs.finish[at])
            except BaseException as error:
                self.fail(request, self.text_failure(error))
                continue
            if choice.is_over:
                self.end_choice(choice, engine_goes_on=not outputs.finish[at])
            if request.wants_message(choice):
                request.last_sent_s = now
                self._outgoing.to_client(request.connection, choice.take_message(request.id))
            if request.is_done:
                self.finish(request)

    def text_failure(self, error: BaseException) -> Refusal:
        """Return how a request ends whose tokens cannot be turned into text. Signals to stop are raised again."""
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            raise error
        if (now := time.monotonic()) >= self._next_failure_log_s:
            self._next_failure_log_s = now + _FAILURE_LOG_INTERVAL_S
            log.error("the tokens of an answer could not be turned into text", exc_info=error)
        return Refusal("engine_error", "the model's tokenizer cannot turn this answer into text")

    def end_choice(self, choice: Choice, engine_goes_on: bool) -> None:
        """Forget a choice that has ended; a stop string ends it before the engine does."""
        self.table.end_choice(choice)
        if engine_goes_on:
            self._outgoing.to_engine(Cancel(choice.sequence_id, "stop"))

    def run_periodic_work(self, now: float) -> None:
        """Tell clients that wait that their requests are alive, and end what is over time."""
        for request in self.table:
            if request.deadline_s is not None and now >= request.deadline_s:
                text = f"not finished within timeout_s {request.spec.timeout_s:g}"
                self.fail(request, Refusal("deadline_exceeded", text))
            elif now - request.last_sent_s >= KEEPALIVE_S:
                request.last_sent_s = now
                self._outgoing.to_client(request.connection, Keepalive(request.id))

    # ---------------------------------------------------------------- ending

    def finish(self, request: Request) -> None:
        """End a request whose choices have ended."""
        self.times.on_end(request, time.monotonic())
        self.table.remove(request)
        self._outgoing.to_client(request.connection, request.finished())

    def cancel(self, request: Request) -> None:
        """End a request for its client, with the tokens so far."""
        self._cancel_sequences(request)
        for last in request.cancel():
            self._outgoing.to_client(request.connection, last)
        self.finish(request)

    def fail(self, request: Request, refusal: Refusal) -> None:
        """End a request that was accepted."""
        self._remove(request, refusal.code)
        self._outgoing.to_client(request.connection, refusal.answer(request.id))

    def fail_all(self) -> None:
        """End every request because the server stops."""
        for request in self.table:
            self.fail(request, Refusal("stopped", "the server has stopped"))

    def drop(self, request: Request) -> None:
        """End a request without a message, because its connection is gone."""
        self._remove(request)

    def _remove(self, request: Request, failure: str = "") -> None:
        self._cancel_sequences(request)
        if request.query is None:
            self.times.on_end(request, time.monotonic(), failure)
        self.table.remove(request)

    def refuse(self, connection: bytes, request_id: int | None, refusal: Refusal) -> None:
        """Answer a message that starts nothing; if its id is in flight, the answer must not end that request."""
        if request_id is not None and self.table.get(connection, request_id) is not None:
            refusal = Refusal(refusal.code, f"request {request_id}: {refusal}", refusal.retry_after_s)
            request_id = None
        self._outgoing.to_client(connection, refusal.answer(request_id))

    def _cancel_sequences(self, request: Request) -> None:
        for choice in request.choices:
            if not choice.is_over:
                self._outgoing.to_engine(Cancel(choice.sequence_id, "cancelled"))


def _failure_of(error: str) -> Refusal:
    """Return how a request ends that the engine has failed or refused."""
    code: FailureCode = REFUSALS.get(error, "engine_error")
    return Refusal(code, error or "the engine failed", RETRY_AFTER_S if code == "draining" else None)
