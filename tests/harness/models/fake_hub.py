"""A server on the loopback that speaks as much of the hub's API as a download needs, with its faults."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = (".json", ".jinja", ".txt", ".md")
"""Endings of files that are not stored as large ones."""


@dataclass
class FakeHub:
    """One repository, org/model, whose behaviour a test changes while it runs."""

    files: dict[str, bytes]
    url: str = ""
    commit: str = COMMIT
    revisions: tuple[str, ...] = ("main",)
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Answers to the next questions for the list of files, one each, instead of the list."""
    page: bytes | None = None
    """An HTML page in place of every answer with status 200."""
    cut_after: int | None = None
    """Bytes of a file after which the connection ends."""
    resumes: bool = True
    """False: a Range is ignored, and the whole file is sent."""
    redirects: bool = False
    """Large files are sent by another address, as the hub does."""
    stalls_after: int | None = None
    """Bytes of a file after which nothing comes any more, though the connection stays."""
    gates_files: bool = False
    """Files are refused, though they are listed: so is a gated model."""
    wrong_bytes: bool = False
    wrong_length: bool = False
    lists_wrong_size: bool = False
    released: threading.Event = field(default_factory=threading.Event)
    """Set at the end: connections that stand still go on."""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def asked(self, part: str) -> list[str]:
        """List the paths that were asked for and contain ``part``."""
        return [path for path, _ in self.requests if part in path]

    def listing(self) -> dict[str, Any]:
        """Return what the hub says of the repository."""
        siblings = []
        for name, data in self.files.items():
            each: dict[str, Any] = {"rfilename": name, "size": len(data) + (7 if self.lists_wrong_size else 0)}
            each["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if not name.endswith(SMALL):
                each["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": each["size"], "pointerSize": 134}
            siblings.append(each)
        return {"id": "org/model", "sha": self.commit, "siblings": siblings}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def do_GET(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((path, {key.lower(): value for key, value in self.headers.items()}))
        if hub.page is not None:
            self._send(200, hub.page, {"Content-Type": "text/html"})
        elif path.startswith("/api/models/"):
            self._list(hub, path)
        elif match := re.fullmatch(r"/(?:cdn/)?org/model/resolve/[^/]+/(.+)", path):
            if hub.redirects and not path.startswith("/cdn/") and not match[1].endswith(SMALL):
                self._send(302, b"", {"Location": f"{hub.url}/cdn{path}"})
            else:
                self._send_file(hub, match[1])
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _list(self, hub: FakeHub, path: str) -> None:
        if hub.statuses:
            status, headers = hub.statuses.pop(0)
            self._send(status, b"{}", headers)
        elif not path.startswith("/api/models/org/model/revision/"):
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.removeprefix("/api/models/org/model/revision/") not in (*hub.revisions, hub.commit):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self._send(200, json.dumps(hub.listing()).encode(), {"Content-Type": "application/json"})

    def _send_file(self, hub: FakeHub, name: str) -> None:
        if name not in hub.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if hub.gates_files:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
            return
        data = hub.files[name]
        if hub.wrong_bytes:
            data = bytes(byte ^ 1 for byte in data)
        start, status = 0, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and hub.resumes:
            start, status = int(wanted[1]), 206
            data = data[: int(wanted[2]) + 1] if wanted[2] else data
        cut_after = hub.cut_after if hub.stalls_after is None else hub.stalls_after
        self._send(status, data[start:] + (b"more" if hub.wrong_length else b""), {"ETag": '"wrong"'}, cut_after)

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut_after: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cut_after is not None and cut_after < len(body):
            self.wfile.write(body[:cut_after])
            self.wfile.flush()
            if self.server.hub.stalls_after is not None:
                self.server.hub.released.wait(20)
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: FakeHub


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[FakeHub]:
    """Serve a repository until the end of the block."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = FakeHub(files, f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join(5)
