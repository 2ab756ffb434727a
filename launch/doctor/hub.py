"""Check that the Hugging Face hub answers."""

import threading
import urllib.error
import urllib.request
from collections.abc import Mapping

from mgpu.launch.doctor.finding import Finding, ok, warn

HUB = "https://huggingface.co"
_ANSWER_S = 10.0
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def check_hub(environ: Mapping[str, str], offline: bool, timeout_s: float = _ANSWER_S) -> Finding:
    """Ask the hub for its front page. Any answer of a server will do: it can be reached."""
    variable = next((name for name in _OFFLINE if environ.get(name, "").lower() in ("1", "true", "yes", "on")), "")
    if offline or variable:
        return ok("hub", f"not tried: {f'{variable} is set' if variable else '--offline'}")
    address = environ.get("HF_ENDPOINT", "").rstrip("/") or HUB
    answer: list[str] = []
    # A name server that does not answer holds the call up for longer than its time limit, so a thread makes it.
    asking = threading.Thread(target=lambda: answer.append(_ask(address, timeout_s)), daemon=True)
    asking.start()
    asking.join(timeout_s)
    problem = answer[0] if answer else f"no answer within {timeout_s:g} s"
    if not problem:
        return ok("hub", f"{address} answers")
    return warn(
        "hub",
        f"{address} cannot be reached: {problem}",
        "models in the cache and local files work; behind a proxy set HTTPS_PROXY, for a mirror HF_ENDPOINT",
    )


def _ask(address: str, timeout_s: float) -> str:
    """Return why a server does not answer; empty when it does."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=timeout_s):
            return ""
    except urllib.error.HTTPError as error:
        return "the proxy wants a name and a password (407)" if error.code == 407 else ""
    except Exception as error:  # addresses, proxies and certificates fail in many ways, not all of them OSError
        return str(getattr(error, "reason", error))[:200]
