"""Read how a model of the hub is named: ids, quantizations, files, revisions and addresses. Pure: nothing is asked."""

import re
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from mgpu.orchestrator.errors import ModelError

HUB_PREFIX = "hf:"
"""How to name a model of the hub where a folder has the same name."""
HUB_FORMS = "ORG/NAME, ORG/NAME:Q4_K_M, ORG/NAME/FILE.gguf, each with @REVISION, or its address"
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_PREFIXES = ("hf://", HUB_PREFIX, "hf.co/", "huggingface.co/")
_PART = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = r"refs/(?:pr|convert)/[\w.-]+|[\w.-]+"
_PLAIN = re.compile(
    r"(?P<path>[^@:]+?)(?::(?P<early>[^@:/]*))?"
    rf"(?:@(?P<revision>{_REVISION})(?:/(?P<late_path>[^@:]+))?(?::(?P<late>[^@:/]*))?)?",
    re.ASCII,
)
_PAGES = ("resolve", "blob", "raw", "tree")


@dataclass(frozen=True, slots=True)
class HubName:
    """A model of the hub: the whole repository, the GGUF file of one quantization, or one GGUF file."""

    repo: str
    revision: str = ""
    """Empty: the main branch."""
    file: str = ""
    quant: str = ""

    def __str__(self) -> str:
        text = self.repo + (f"/{self.file}" if self.file else "") + (f":{self.quant}" if self.quant else "")
        return text + (f"@{self.revision}" if self.revision else "")


def parse_hub_name(text: str, endpoint: str = "") -> HubName | None:
    """Read a name; None if it has no form of the hub. ``endpoint`` is the address of a mirror, from HF_ENDPOINT.

    ModelError for an address that is not that of a model, and for a name with the prefix of the hub that has no form.
    """
    text = text.strip()
    if re.match(r"https?://", text, re.IGNORECASE):
        return _from_address(text, endpoint)
    for prefix in _PREFIXES:
        if text.lower().startswith(prefix):
            name = _from_plain(text[len(prefix) :].strip("/"))
            if name is None:
                raise _not_understood(text)
            return name
    return _from_plain(text)


def _not_understood(text: str, problem: str = "") -> ModelError:
    return ModelError(f"{text[:200]}: {problem or 'not the name of a model of the hub'}; write {HUB_FORMS}")


def _from_plain(text: str) -> HubName | None:
    match = _PLAIN.fullmatch(text)
    if match is None:
        return None
    parts = match["path"].split("/") + (match["late_path"].split("/") if match["late_path"] else [])
    quants = [quant for quant in (match["early"], match["late"]) if quant is not None]
    file = "/".join(parts[2:])
    if len(parts) < 2 or len(quants) > 1 or (quants and file) or not all(map(_PART.fullmatch, quants)):
        return None
    if not all(map(_PART.fullmatch, parts[:2])) or (file and not _is_gguf_path(file)) or parts[1].endswith(".gguf"):
        return None
    if "" in parts or match["revision"] in (".", "..", "refs"):
        return None
    return HubName("/".join(parts[:2]), _other_than_main(match["revision"] or ""), file, "".join(quants))


def _is_gguf_path(path: str) -> bool:
    is_inside = all(part not in ("", ".", "..") and "\\" not in part and part.isprintable() for part in path.split("/"))
    return is_inside and path.lower().endswith(".gguf")


def _from_address(text: str, endpoint: str) -> HubName:
    try:
        address = urlsplit(text)
        mirror = urlsplit(endpoint)
    except ValueError as error:
        raise _not_understood(text, f"not an address ({error})") from error
    on_mirror = bool(mirror.netloc) and address.netloc.lower() == mirror.netloc.lower()
    path = address.path.removeprefix(mirror.path) if on_mirror else address.path
    if not on_mirror and address.netloc.lower() not in _HOSTS:
        raise _not_understood(text, "not an address of the hub; HF_ENDPOINT names a mirror of it")
    parts = [part for part in unquote(path).split("/") if part]
    if parts and parts[0] in ("datasets", "spaces", "collections", "papers", "api"):
        raise _not_understood(text, f"the address of {parts[0]}, not of a model")
    if len(parts) > 2 and parts[2] in _PAGES:
        return _from_page(text, parts)
    shown = parse_qs(address.query).get("show_file_info", [""])[0]
    name = _from_plain("/".join([*parts[:2], shown] if len(parts) == 2 and shown else parts))
    if name is None:
        raise _not_understood(text)
    return name


def _from_page(text: str, parts: list[str]) -> HubName:
    """Read the address of a file, or of the list of files: ORG/NAME/blob/REVISION/FILE."""
    rest = parts[3:]
    length = 3 if rest[:1] == ["refs"] else 1
    revision, file = "/".join(rest[:length]), "/".join(rest[length:])
    if not re.fullmatch(_REVISION, revision, re.ASCII) or not all(map(_PART.fullmatch, parts[:2])):
        raise _not_understood(text)
    if file and not _is_gguf_path(file):
        repo = "/".join(parts[:2])
        raise _not_understood(text, f"{file} is not a .gguf file; {repo} alone names the whole model")
    return HubName("/".join(parts[:2]), _other_than_main(revision), file)


def _other_than_main(revision: str) -> str:
    return "" if revision == "main" else revision
