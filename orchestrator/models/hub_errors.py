"""Tell what went wrong between this machine and the hub, in one sentence with the way out."""

import re
from collections.abc import Mapping

from mgpu.orchestrator.models.hub_names import HubName

_LASTING = frozenset({
    "HFValidationError", "RepositoryNotFoundError", "RevisionNotFoundError", "OfflineModeIsEnabled", "ImportError",
    "InvalidURL", "UnsupportedProtocol",
})  # fmt: skip
"""Errors of the hub's package and its HTTP library that only the user can help, by name: the library changes."""
_PASSING = (408, 425, 429)
"""Statuses below 500 after which the same request may succeed."""


class HubAnswer(Exception):
    """The hub answered with a status that is no success. ``code`` is its own word for the reason."""

    def __init__(self, status: int, headers: Mapping[str, str] | None = None, code: str = "") -> None:
        super().__init__(f"status {status}{f' ({code})' if code else ''}")
        self.status, self.code = status, code
        self.retry_after_s = retry_after(headers or {})


class NotTheHub(Exception):
    """Something answered that is no hub: a page to log in to a network, a proxy's error, another program."""

    def __init__(self, url: str, found: str) -> None:
        super().__init__(f"{url} gives {found}; is HF_ENDPOINT the address of a hub, with no proxy in between?")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of Retry-After; None without it, or if it is a date."""
    text = headers.get("Retry-After", "").strip()
    return float(text) if re.fullmatch(r"\d{1,6}(\.\d+)?", text) else None


def is_passing(status: int) -> bool:
    """Return True if the same request may succeed after this status."""
    return status in _PASSING or status >= 500


def may_pass(error: BaseException) -> bool:
    """Return True if the same request to the hub may succeed later, as when the network is down."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    if any(isinstance(each, HubAnswer) and not is_passing(each.status) for each in chain):
        return False
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    return not names & _LASTING and not any(type(each) in (ValueError, TypeError) for each in chain)


def reason_of(name: HubName, error: BaseException) -> str:
    """Return one sentence about an error, with the way out where there is one."""
    if not isinstance(error, HubAnswer):
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if error.code == "RevisionNotFound" or (error.status == 404 and name.revision and error.code != "RepoNotFound"):
        return f"{name.repo} has no revision {name.revision or 'main'}"
    if error.code == "GatedRepo" or error.status == 403:
        return (
            f"{name.repo} is gated: accept its terms on its page of the hub, then set HF_TOKEN to a token of that "
            f"account (status {error.status})"
        )
    if error.status in (401, 404):
        return f"no model {name.repo} there, or it is private and HF_TOKEN has no access (status {error.status})"
    if error.status == 429:
        wait = f" for {error.retry_after_s:.0f} s" if error.retry_after_s is not None else ""
        return f"too many requests from this address: it asks to wait{wait} (status 429); HF_TOKEN raises the limit"
    return f"its status is {error.status}"
