"""Turn what clients send into token ids, or into text: what is short at once, what is long and chats in a thread."""

import logging
from concurrent.futures import Future

from mgpu.orchestrator.gateway.front.bounded_log import BoundedLog
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.requests.request import Request
from mgpu.orchestrator.gateway.requests.request_handler import RequestHandler
from mgpu.orchestrator.gateway.text.background import BackgroundTasks
from mgpu.orchestrator.gateway.text.chat_template import ChatTemplateError
from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError
from mgpu.orchestrator.gateway.text.text_queries import reply_to
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec
from mgpu.protocol.front.client_messages import Generate
from mgpu.protocol.front.fields import int32_bytes
from mgpu.protocol.front.server_messages import Detokenized, Tokenized

INLINE_CHARS = 4096
"""Longer prompts are tokenized in a thread."""
INLINE_IDS = 256
"""More token ids are turned into text in a thread."""

Encoded = bytes | Tokenized | Detokenized
"""Token ids as little-endian int32, or the reply to a text query."""

log = logging.getLogger(__name__)


class Prompts:
    """Tokenizes every request and admits or refuses it; while a thread has the prompt, the request is in the table.

    Text queries (tokenize, detokenize) go the same way, and are answered where a request is admitted.
    """

    def __init__(self, requests: RequestHandler, background: BackgroundTasks, vocab_size: int) -> None:
        self._requests = requests
        self._vocab_size = vocab_size
        self._background = background
        self._bug_log = BoundedLog(log, logging.ERROR)

    def encode(self, request: Request, codec: TextCodec | None) -> None:
        """Begin with ``request``. Refusal when it is known at once that it will not run."""
        spec = request.spec
        if spec.prompt_ids is not None and request.query is None:
            self._requests.admit(request, spec.prompt_ids)
        elif codec is None:
            way_out = "" if request.query else "; send prompt_ids"
            raise Refusal("bad_request", f"the model's folder has no tokenizer{way_out}")
        elif _is_short(spec):
            self._conclude(request, self._encoded(codec, request))
        else:
            request.is_encoding = True
            self._requests.table.add(request)
            self._background.run(lambda: self._encoded(codec, request), lambda future: self._finish(request, future))

    def _encoded(self, codec: TextCodec, request: Request) -> Encoded:
        """Do the work on the text, perhaps in a thread, unless the request has ended before its turn."""
        spec = request.spec
        if request.is_over:
            return b""
        if request.query is not None:
            return reply_to(codec, request.query, self._vocab_size)
        if spec.prompt is not None:
            return int32_bytes(codec.encode(spec.prompt))
        return int32_bytes(codec.encode_chat(spec.messages or (), spec.template_options))

    def _conclude(self, request: Request, encoded: Encoded) -> None:
        if isinstance(encoded, bytes):
            self._requests.admit(request, encoded)
        else:
            self._requests.reply(request, encoded)

    def _finish(self, request: Request, future: "Future[Encoded]") -> None:
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
            self._conclude(request, future.result())
        except Refusal as refusal:
            self._requests.refuse(request.connection, request.id, refusal)


def _is_short(spec: Generate) -> bool:
    """Return True if a turn of the gateway's loop has time for the text of this request."""
    if spec.prompt_ids is not None:
        return len(spec.prompt_ids) <= 4 * INLINE_IDS
    return spec.prompt is not None and len(spec.prompt) <= INLINE_CHARS
