"""A real gateway process, a scripted engine on its link, and a model folder whose tokens are single bytes."""

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import zmq
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from harness.waiting import eventually
from mgpu import Client
from mgpu.orchestrator.gateway.text.detokenizer import byte_level_table
from mgpu.protocol.front.fields import int32_array
from mgpu.protocol.internal.gateway_messages import (
    LINK,
    Alive,
    Cancel,
    EngineInfo,
    Floods,
    GatewayFailure,
    GatewayReady,
    GatewaySpec,
    Outputs,
    RecordQuery,
    RecordReply,
    Resumable,
    SequenceRecord,
    StateKnown,
    StatsQuery,
    StatsReply,
    Submit,
)
from mgpu.protocol.internal.packed_logprobs import LogprobPacking
from mgpu.protocol.internal.process.child import frame_spec
from mgpu.protocol.internal.worker_messages import TokenLogprobs

BOS, EOS, START, END = 256, 257, 258, 259
VOCAB_SIZE = 300
MODEL_NAME = "tiny"
DEADLINE_S = 60.0
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'tool' %}"
    "{{ raise_exception('no tools here') }}{% endif %}"
    "<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

Script = Callable[[Submit], Iterator[int]]


def make_model_folder(folder: Path, template: str | None = TEMPLATE, markers: Sequence[str] = ()) -> Path:
    """Write tokenizer.json and tokenizer_config.json of a byte-level tokenizer: byte b has id b.

    ``markers`` are tokens from id 260 on, special if they begin with `<|`.
    """
    vocabulary = dict(byte_level_table())
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>", "<|start|>", "<|end|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    more = [AddedToken(name, special=name.startswith("<|"), normalized=False) for name in markers]
    tokenizer.add_tokens(more)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def echo(submit: Submit) -> Iterator[int]:
    """Generate the prompt, without a leading BOS, over and over."""
    ids = [token for token in int32_array(submit.token_ids) if token != BOS]
    while True:
        yield from ids


def assert_serves(endpoint: str, keys: Path | None = None) -> None:
    """Fail unless a new client gets an answer."""
    with Client(endpoint, keys=keys) as client:
        assert client.generate([5], max_tokens=2).token_ids == (5, 5)


def says(text: str | bytes, then: int | None = EOS) -> Script:
    """Generate the bytes of a text, then the end-of-sequence token."""
    data = text.encode() if isinstance(text, str) else text

    def script(submit: Submit) -> Iterator[int]:
        yield from data
        while then is not None:
            yield then

    return script


def text_of(submit: Submit) -> str:
    """Return a prompt as text, without special tokens."""
    return bytes(token for token in int32_array(submit.token_ids) if token < 256).decode()


@dataclass(slots=True)
class _Running:
    submit: Submit
    tokens: Iterator[int]
    record: SequenceRecord
    count: int = 0


@dataclass(slots=True)
class FakeEngine:
    """The engine's end of the link in a thread: one token per running sequence and step, as the script says."""

    endpoint: str
    script: Script = echo
    submits: list[Submit] = field(default_factory=list)
    cancels: list[Cancel] = field(default_factory=list)
    messages: "queue.Queue[object]" = field(default_factory=queue.Queue)
    """GatewayReady and GatewayFailure."""
    going: threading.Event = field(default_factory=threading.Event)
    """Cleared: no step is made."""
    answers_stats: bool = True
    stats: dict[str, float] = field(default_factory=dict)
    """Counters beside that of what runs."""
    signs_of_life: int = 0
    known_state: str = ""
    """The last that the gateway has said to act on."""
    floods: list[int] = field(default_factory=list)
    """Who floods, as the gateway has said last."""
    error: str = ""
    """Set: the next step ends every sequence with this error."""
    portion: int = 1000
    """Tokens of each choice with which a question about a record is answered."""
    portions: int = 0
    """Such questions so far."""
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _outbox: "queue.Queue[object]" = field(default_factory=queue.Queue)
    _running: dict[int, _Running] = field(default_factory=dict)
    _records: dict[tuple[str, int], tuple[bytes, list[SequenceRecord]]] = field(default_factory=dict)
    _stopping: bool = False
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self.going.set()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        assert self._thread is not None
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def tell(self, message: object) -> None:
        self._outbox.put(message)

    def wait_until_told(self) -> None:
        self.wait(self._outbox.empty)

    def reset(self) -> None:
        self.script, self.error, self.answers_stats, self.portion = echo, "", True, 1000
        self.going.set()
        self.wait(lambda: not self._running)
        self.stats.clear()
        self.submits.clear()
        self.cancels.clear()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE_S), "the engine did not get there in time"

    def _loop(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        link = context.socket(zmq.DEALER)
        link.setsockopt(zmq.LINGER, 0)
        link.setsockopt(zmq.SNDHWM, 0)
        try:
            link.bind(self.endpoint)
            while not self._stopping:
                link.poll(1 if self._running and self.going.is_set() else 5)
                self._read(link)
                while not self._outbox.empty():
                    self._send(link, self._outbox.get())
                if self.going.is_set() and self._running:
                    self._send(link, self._step())
                with self._changed:
                    self._changed.notify_all()
        finally:  # a script that raises must not leave a socket to the garbage collector, and so to another test
            link.close()
            context.term()

    def _read(self, link: "zmq.Socket[bytes]") -> None:
        while link.poll(0):
            message = LINK.decode(link.recv())
            if isinstance(message, Submit | Resumable):
                self._begin(message)
            elif isinstance(message, RecordQuery):
                context, records = self._records.get((message.session, message.request_id), (b"", []))
                starts = zip([*message.known, *[0] * 16], [*message.offsets, *[0] * 16], strict=False)
                rest = [_portion(record, *at, self.portion) for record, at in zip(records, starts, strict=False)]
                self._send(link, RecordReply(message.query_id, context, rest))
                self.portions += 1
            elif isinstance(message, Cancel):
                self.cancels.append(message)
                if (running := self._running.pop(message.sequence_id, None)) is not None:
                    running.record.finish = message.reason
                    self._send(link, Outputs([message.sequence_id], [[]], [[]], [message.reason], [""], [0]))
            elif isinstance(message, StatsQuery):
                if self.answers_stats:
                    self._send(link, StatsReply(message.query_id, {"running": float(len(self._running)), **self.stats}))
            elif isinstance(message, Alive):
                self.signs_of_life += 1
            elif isinstance(message, Floods):
                self.floods = message.owners
            elif isinstance(message, StateKnown):
                self.known_state = message.state
            else:
                self.messages.put(message)

    def _begin(self, message: Submit | Resumable) -> None:
        submits = [message] if isinstance(message, Submit) else message.submits
        records = [
            SequenceRecord(each.sequence_id, each.stop_token_ids, 0, b"", b"", each.sampling.num_logprobs, "", "", 3)
            for each in submits
        ]
        if isinstance(message, Resumable):
            self._records[message.session, message.request_id] = (message.context, records)
        for submit, record in zip(submits, records, strict=True):
            self.submits.append(submit)
            self._running[submit.sequence_id] = self._continued(submit, record)

    def _continued(self, submit: Submit, record: SequenceRecord) -> _Running:
        """Let the script go on after the tokens that another engine has emitted."""
        end = len(submit.token_ids) - 4 * submit.num_emitted
        tokens = self.script(replace(submit, token_ids=submit.token_ids[:end]))
        for _ in range(submit.num_emitted):
            next(tokens)
        record.num_tokens, record.token_ids = submit.num_emitted, submit.token_ids[end:]
        return _Running(submit, tokens, record, submit.num_emitted)

    def _send(self, link: "zmq.Socket[bytes]", message: object) -> None:
        with contextlib.suppress(zmq.Again):  # a gateway that is gone takes nothing
            link.send(LINK.encode(message), zmq.NOBLOCK)

    def _step(self) -> Outputs:
        outputs = Outputs([], [], [], [], [], [])
        for sequence_id, running in list(self._running.items()):
            token, submit = next(running.tokens), running.submit
            running.count += 1
            finish = (
                "stop" if token in submit.stop_token_ids else "length" if running.count == submit.max_tokens else ""
            )
            finish = "error" if self.error else finish
            count = submit.sampling.num_logprobs
            logprob = TokenLogprobs(-0.5, list(range(count)), [-1.0 - at for at in range(count)])
            outputs.sequence_ids.append(sequence_id)
            outputs.token_ids.append([token])
            outputs.logprobs.append([logprob] if count >= 0 else [])
            outputs.finish.append(finish)
            outputs.errors.append(self.error)
            outputs.cached_tokens.append(3)
            running.record.token_ids += token.to_bytes(4, "little")
            running.record.num_tokens += 1
            running.record.logprobs += LogprobPacking(count).pack([logprob]) if count >= 0 else b""
            running.record.finish, running.record.error = finish, self.error
            if finish:
                del self._running[sequence_id]
        return outputs


def _portion(record: SequenceRecord, known: int, offset: int, size: int) -> SequenceRecord:
    """Cut out what `gateway_messages.RecordQuery` asks for, at most ``size`` tokens of it."""
    total = record.num_tokens
    start = total if known < 0 else known
    first = total if offset < 0 else max(start, offset)
    end, width = min(total, start + size), len(record.logprobs) // max(1, total)
    token_ids, logprobs = record.token_ids[4 * start : 4 * end], record.logprobs[width * first : width * end]
    return replace(record, token_ids=token_ids, logprobs=logprobs)


IN_FLIGHT = ("running", "gateway_requests", "gateway_sequences", "gateway_queued_bytes")
"""Counters of what runs or waits; the others add up what has been."""


class GatewayProcess:
    """Start `python -m mgpu.orchestrator.gateway` as the orchestrator does. A context manager."""

    def __init__(
        self,
        model: Path,
        *,
        bind: str | None = None,
        ready: bool = True,
        before: str = "",
        client_keys: Path | None = None,
        **spec: Any,
    ) -> None:
        """``before`` is shell code, such as a ulimit; ``spec`` overrides fields of the GatewaySpec.

        ``client_keys`` is a key file to look at the gateway with.
        """
        self._client_keys = client_keys
        self._is_closed = False
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="mgpu-test-"))
        self.engine = FakeEngine(f"ipc://{self.runtime_dir}/link")
        self.engine.start()
        values: dict[str, Any] = {
            "runtime_dir": str(self.runtime_dir),
            "bind": bind or f"ipc://{self.runtime_dir}/front",
            "link": self.engine.endpoint,
            "model_path": str(model),
            "model_format": "safetensors",
            "model_name": MODEL_NAME,
            "vocab_size": VOCAB_SIZE,
            "eos_token_ids": [EOS],
            "max_request_bytes": 1 << 20,
            **spec,
        }
        self._spec = GatewaySpec(**values)
        self._before = before
        self.process = self._start(self._spec)
        try:
            self._wait_for_first_message(ready)
        except BaseException:
            self.close()
            raise

    def _start(self, spec: GatewaySpec) -> "subprocess.Popen[bytes]":
        data = LINK.encode(spec)
        command = ["sh", "-c", f'{self._before} exec "$0" -m mgpu.orchestrator.gateway', sys.executable]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(frame_spec(data))
        process.stdin.flush()
        return process

    def _wait_for_first_message(self, ready: bool) -> None:
        self.first = self.engine.messages.get(timeout=DEADLINE_S)
        self.endpoint = self.first.endpoint if isinstance(self.first, GatewayReady) else ""
        if ready:
            assert not isinstance(self.first, GatewayFailure), self.first
            self.set_info()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)
        for stream in (self.process.stdin, self.process.stderr):
            assert stream is not None
            stream.close()

    def replace(self, wait: bool = True) -> None:
        """Start another gateway on the same endpoint after `kill`."""
        info = EngineInfo("ready", 512, 4096, "layout: one fake engine")
        first_sequence = self._spec.first_sequence + (1 << 40)
        self._spec = replace(self._spec, bind=self.endpoint, first_sequence=first_sequence, info=info)
        self.process = self._start(self._spec)
        if wait:
            self._wait_for_first_message(ready=True)

    def set_info(self, state: str = "ready", max_seq_len: int = 512, kv_tokens: int = 4096) -> None:
        """Let the engine report its state, and wait until a client can see it."""
        self.engine.tell(EngineInfo(state, max_seq_len, kv_tokens, "layout: one fake engine"))
        with Client(self.endpoint, keys=self._client_keys) as client:
            eventually(lambda: attrgetter("state", "kv_tokens")(client.health()) == (state, kv_tokens), client.health)

    def wait_until_idle(self) -> None:
        """Wait until the books say that nothing is in flight or waits."""
        with Client(self.endpoint) as client:
            eventually(lambda: not any(client.stats()[name] for name in IN_FLIGHT), client.stats)

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> str:
        """Close its standard input, as a dying parent does, and return what it wrote to standard error."""
        if self._is_closed:
            return ""
        self._is_closed = True
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.stderr is not None
        try:
            self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()
            self.process.wait()
            text = self.process.stderr.read().decode()
            self.process.stderr.close()
            self.engine.stop()
            shutil.rmtree(self.runtime_dir, ignore_errors=True)
        return text

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
