"""Plain HTTP requests over TCP or a unix socket, with nothing of any API's client."""

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 60.0
JSON_TYPE = {"content-type": "application/json"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}
        assert isinstance(found, dict)
        return found

    @property
    def events(self) -> list[Any]:
        """The JSON of all server-sent events; ``[DONE]`` as text."""
        datas = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [data if data == "[DONE]" else json.loads(data) for data in datas]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)


def connection_to(url: str) -> http.client.HTTPConnection:
    if url.startswith("unix:"):
        return _UnixConnection(url.removeprefix("unix:"))
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)


@contextmanager
def opened(
    url: str, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
) -> Iterator[http.client.HTTPResponse]:
    """Send a request and yield its response, whose body has not been read; close the connection at the end."""
    connection = connection_to(url)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        connection.request(method, path, data, {**JSON_TYPE, **(headers or {})})
        yield connection.getresponse()
    finally:
        connection.close()


def ask(url: str, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> Answer:
    """Send a request and return the whole answer."""
    with opened(url, method, path, body, headers) as response:
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def get(url: str, path: str, **headers: str) -> Answer:
    return ask(url, "GET", path, headers=headers)


def post(url: str, path: str, body: object, **headers: str) -> Answer:
    return ask(url, "POST", path, body, headers)
