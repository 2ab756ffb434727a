"""Turn what clients send into token ids: short prompts at once, long ones and chats in a thread."""

import logging
from collections.abc import Callable
from concurrent.futures import Future

from mgpu.orchestrator.gateway.requests.admission import Refusal
from mgpu.orchestrator.gateway.requests.table import Request, RequestTable
from mgpu.orchestrator.gateway.text.background import Jobs
from mgpu.orchestrator.gateway.text.chat_template import ChatTemplateError
from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec
from mgpu.protocol.front.client_messages import Generate
from mgpu.protocol.front.fields import int32_bytes

INLINE_CHARS = 4096
"""Longer prompts are tokenized in a thread."""

log = logging.getLogger(__name__)


class Prompts:
    """Hands every request on to ``admit`` with its ids, or to ``refuse``; meanwhile it is in the table."""

    def __init__(
        self,
        table: RequestTable,
        jobs: Jobs,
        admit: Callable[[Request, bytes], None],
        refuse: Callable[[bytes, int | None, Refusal], None],
    ) -> None:
        self._table = table
        self._jobs = jobs
        self._admit = admit
        self._refuse = refuse

    def encode(self, request: Request, codec: TextCodec | None) -> None:
        """Begin with ``request``. Refusal when it can be seen at once that it will not run."""
        message = request.spec
        if message.prompt_ids is not None:
            self._admit(request, message.prompt_ids)
        elif codec is None:
            raise Refusal("bad_request", "the model's folder has no tokenizer; send prompt_ids")
        elif message.prompt is not None and len(message.prompt) <= INLINE_CHARS:
            self._admit(request, int32_bytes(codec.encode(message.prompt)))
        else:
            request.is_encoding = True
            self._table.add(request)
            self._jobs.start(lambda: _encoded(codec, request), lambda future: self._finish(request, future))

    def _finish(self, request: Request, future: "Future[list[int]]") -> None:
        request.is_encoding = False
        if self._table.get(request.client, request.id) is not request:  # cancelled meanwhile
            self._table.forget_prompt(request)
            return
        self._table.remove(request)
        error = future.exception()
        if error is not None:
            if not isinstance(error, (TokenizerError, ChatTemplateError)):
                log.error("a prompt could not be tokenized", exc_info=error)
            self._refuse(request.client, request.id, Refusal("bad_request", str(error)[:500]))
            return
        try:
            self._admit(request, int32_bytes(future.result()))
        except Refusal as refusal:
            self._refuse(request.client, request.id, refusal)


def _encoded(codec: TextCodec, request: Request) -> list[int]:
    """Tokenize in a thread, unless the request has ended before its turn."""
    if request.is_over:
        return []
    message: Generate = request.spec
    if message.prompt is not None:
        return codec.encode(message.prompt)
    return codec.encode_chat(message.messages or (), message.template_options)
