"""`python -m mgpu.orchestrator.gateway.text.processes.encoder`: load the tokenizer once, fork a process for each use.

Standard input is a socket. Its first packet is the `EncoderSpec`; each later one brings the end of a socket for a new
process, and is answered with the pidfd of it. This process has one thread and runs no library code after loading, so
forking is safe, takes milliseconds, and shares the memory of the tokenizer.
"""

import os
import resource
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

from mgpu.orchestrator.gateway.text.chat_template import ChatTemplateError
from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError
from mgpu.orchestrator.gateway.text.grammars.grammar import GrammarError, GrammarTooSlow
from mgpu.orchestrator.gateway.text.processes.encoder_messages import ENCODER, LENGTH, EncoderSpec, TextReply, TextTask
from mgpu.orchestrator.gateway.text.processes.text_tasks import do
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec, load_codec
from mgpu.protocol.internal.process.child import end_with_parent
from mgpu.protocol.internal.process.logs import configure_logging

NICENESS = 8
"""Streams come first where there are too few cores for both."""
_MAX_SPEC_BYTES = 1 << 16


def main() -> int:
    """Serve until the other end of standard input is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps; the gateway has a pidfd of each process
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    os.nice(NICENESS)
    configure_logging("gateway", os.fdopen(os.dup(2), "w"))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the library writes a line of its own for each panic
    control = socket.socket(fileno=os.dup(0))
    spec = ENCODER.decode(control.recv(_MAX_SPEC_BYTES))
    codec = load_codec(spec.path, spec.model_format)
    control.send(b"ready")
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return 0
        pid = os.fork()
        if pid == 0:
            control.close()
            _serve(socket.socket(fileno=fds[0]), spec, codec)
        os.close(fds[0])
        pidfd = os.pidfd_open(pid)
        socket.send_fds(control, [b"pid"], [pidfd])
        os.close(pidfd)


def _serve(peer: socket.socket, spec: EncoderSpec, codec: TextCodec | None) -> None:
    """Work until the other end is closed; never returns."""
    try:
        end_with_parent(signal.SIGKILL)
        _limit(spec.memory_bytes)
        read = peer.makefile("rb").read
        while header := read(LENGTH.size):
            task = ENCODER.decode(read(LENGTH.unpack(header)[0]))
            # The kernel ends the process at the limit, whatever library code it is in.
            signal.setitimer(signal.ITIMER_PROF, spec.cpu_limit_s)
            reply = _answer(codec, task, spec.vocab_size)
            data = ENCODER.encode(reply)
            signal.setitimer(signal.ITIMER_PROF, 0)
            peer.sendall(LENGTH.pack(len(data)) + data)
            if reply.is_last:
                break
    finally:
        os._exit(1)  # nothing of the process that forked may run here


def _limit(memory_bytes: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = ((resource.RLIMIT_AS, used + memory_bytes), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0))
    for kind, limit in limits:
        resource.setrlimit(kind, (limit, limit))


def _answer(codec: TextCodec | None, task: TextTask, vocab_size: int) -> TextReply:
    began_s = time.process_time()
    try:
        result = TextReply(error="the model has no tokenizer") if codec is None else do(codec, task, vocab_size)
    except (TokenizerError, ChatTemplateError, GrammarError) as error:
        result = TextReply(error=str(error)[:500], is_last=isinstance(error, GrammarTooSlow))
    except MemoryError:
        result = TextReply(error="the text takes more memory than it may")
    return replace(result, cpu_s=time.process_time() - began_s)


if __name__ == "__main__":
    sys.exit(main())
