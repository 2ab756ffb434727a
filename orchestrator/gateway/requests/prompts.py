"""Turn what clients send into token ids: short prompts at once, long ones and chats in a thread."""

import logging
from concurrent.futures import Future

from mgpu.orchestrator.gateway.front.bounded_log import BoundedLog
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.requests.request import Request
from mgpu.orchestrator.gateway.requests.request_handler import RequestHandler
from mgpu.orchestrator.gateway.text.background import BackgroundTasks
from mgpu.orchestrator.gateway.text.chat_template import ChatTemplateError
from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec
from mgpu.protocol.front.fields import int32_bytes

INLINE_CHARS = 4096
"""Longer prompts are tokenized in a thread."""

log = logging.getLogger(__name__)


class Prompts:
    """Tokenizes every request and admits or refuses it; while a thread has the prompt, the request is in the table."""

    def __init__(self, requests: RequestHandler, background: BackgroundTasks) -> None:
        self._requests = requests
        self._background = background
        self._bug_log = BoundedLog(log, logging.ERROR)

    def encode(self, request: Request, codec: TextCodec | None) -> None:
        """Begin with ``request``. Refusal when it is known at once that it will not run."""
        spec = request.spec
        if spec.prompt_ids is not None:
            self._requests.admit(request, spec.prompt_ids)
        elif codec is None:
            raise Refusal("bad_request", "the model's folder has no tokenizer; send prompt_ids")
        elif spec.prompt is not None and len(spec.prompt) <= INLINE_CHARS:
            self._requests.admit(request, int32_bytes(codec.encode(spec.prompt)))
        else:
            request.is_encoding = True
            self._requests.table.add(request)
            self._background.run(lambda: _encoded(codec, request), lambda future: self._finish(request, future))

    def _finish(self, request: Request, future: "Future[list[int]]") -> None:
        request.is_encoding = False
        table = self._requests.table
        if table.get(request.connection, request.id) is not request:  # it has ended meanwhile
            table.forget_prompt(request)
            return
        table.remove(request)
        error = future.exception()
        try:
            if isinstance(error, (TokenizerError, ChatTemplateError)):
                raise Refusal("bad_request", str(error)[:500])
            if error is not None:  # the server's own failure, such as a process that cannot be started
                self._bug_log.write("a prompt could not be tokenized", error=error)
                raise Refusal("engine_error", "internal error in the gateway")
            self._requests.admit(request, int32_bytes(future.result()))
        except Refusal as refusal:
            self._requests.refuse(request.connection, request.id, refusal)


def _encoded(codec: TextCodec, request: Request) -> list[int]:
    """Tokenize in a thread, unless the request has ended before its turn."""
    if request.is_over:
        return []
    spec = request.spec
    if spec.prompt is not None:
        return codec.encode(spec.prompt)
    return codec.encode_chat(spec.messages or (), spec.template_options)
