"""How long requests take and how they end: counters for the stats query, and a line per request for the log.

A line has no text of a prompt or an answer.
"""

import logging
from collections import Counter

from mgpu.orchestrator.gateway.requests.request import Choice, Request
from mgpu.protocol.internal.histogram import LONG_S, SHORT_S, Histogram

access_log = logging.getLogger("mgpu.access")

REASONS = ("stop", "length", "abort", "error")
"""How a choice can end, under the names that dashboards know."""
_REASON_OF = {"stop": "stop", "length": "length", "cancelled": "abort"}


class RequestTimes:
    """Counts what happens to requests. A request that another gateway began is counted at its end only."""

    def __init__(self, logs_requests: bool = False) -> None:
        self._first_token = Histogram(LONG_S)
        self._between_tokens = Histogram(SHORT_S)
        self._whole = Histogram(LONG_S)
        self._ended: Counter[str] = Counter()
        self._logs_requests = logs_requests

    def on_tokens(self, request: Request, choice: Choice, count: int, now_s: float) -> None:
        """Note that ``count`` tokens of a choice have come in one step."""
        if not count:
            return
        if request.first_token_s is None:
            request.first_token_s = now_s
            if request.began_s is not None:
                self._first_token.add(now_s - request.began_s)
        elif choice.last_token_s is not None:
            self._between_tokens.add((now_s - choice.last_token_s) / count, count)
        choice.last_token_s = now_s

    def on_end(self, request: Request, now_s: float, failure: str = "") -> None:
        """Note that a request has ended, by a ``failure`` (its code) or with the reasons of its choices."""
        reasons = [choice.finish_reason or "cancelled" for choice in request.choices]
        for reason in reasons:
            self._ended["error" if failure else _REASON_OF.get(reason, "error")] += 1
        if request.began_s is not None:
            self._whole.add(now_s - request.began_s)
        if self._logs_requests:
            fields = _fields(request, failure or ",".join(reasons) or "cancelled", now_s)
            text = " ".join(
                f'{name}="{value}"' if " " in value else f"{name}={value}" for name, value in fields.items()
            )
            access_log.info("%s", text, extra={"fields": fields})

    def counters(self) -> dict[str, float]:
        """Return all counters under the names that clients see."""
        return {
            **self._first_token.counters("first_token_s"),
            **self._between_tokens.counters("between_tokens_s"),
            **self._whole.counters("request_s"),
            **{f"ended_{reason}": float(self._ended[reason]) for reason in REASONS},
        }


def _fields(request: Request, reason: str, now_s: float) -> dict[str, str]:
    """Return what a line says of a request; times in seconds since it arrived, but for the time in the queue."""
    new_tokens = sum(choice.num_tokens for choice in request.choices)
    return {
        "id": str(request.id),
        "account": ascii(request.account.name)[1:-1],
        "prompt": str(request.prompt_tokens),
        "cached": str(request.cached_tokens),
        "new": str(new_tokens),
        "queue_s": _seconds(request.queue_s, 0.0),
        "first_token_s": _seconds(request.first_token_s, request.began_s),
        "duration_s": _seconds(now_s, request.began_s),
        "reason": reason,
    }


def _seconds(at_s: float | None, since_s: float | None) -> str:
    return "-" if at_s is None or since_s is None else f"{at_s - since_s:.3f}"
