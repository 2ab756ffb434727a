"""Requests as documented: the curl commands of docs/http.md and the README, and the calls of Open WebUI."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harness.servers.http_client import ask, get, post
from mgpu.launch.server_process import ServerProcess

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def url(server: ServerProcess) -> str:
    return server.http_url()


def curl_commands() -> list[str]:
    found = []
    for page in ("README.md", "docs/http.md"):
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
        found += [line.partition("   # ")[0].strip() for line in text.splitlines() if line.startswith("curl ")]
    return found


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")
@pytest.mark.parametrize("command", curl_commands())
def test_a_curl_command_of_the_pages_works(url: str, command: str) -> None:
    typed = re.sub(r"(http://)?(localhost|127\.0\.0\.1):8000", url, command)
    done = subprocess.run([*shlex.split(typed), "-sS", "--fail-with-body"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_open_webuis_calls_are_answered(url: str) -> None:
    """Its backend lists the models, chats with a stream, names a chat without one, and stops by closing."""
    headers = {"authorization": "Bearer none", "x-openwebui-user-name": "Ada", "x-openwebui-chat-id": "1"}
    [model] = get(url, "/v1/models", **headers).json["data"]
    body: dict[str, Any] = {
        "model": model["id"],
        "stream": True,
        "messages": [
            {"role": "system", "content": "You are kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        ],
        "max_tokens": 4,
        "stream_options": {"include_usage": True},
        "metadata": {"chat_id": "1"},
        "chat_id": "1",
        "session_id": "2",
        "background_tasks": {"title_generation": True},
        "features": {"web_search": False},
        "tool_ids": None,
    }
    streamed = ask(url, "POST", "/v1/chat/completions", body, headers)
    assert streamed.status == 200
    assert streamed.events[-1] == "[DONE]"
    assert streamed.events[-2]["usage"]["completion_tokens"] == 4
    title = {"model": model["id"], "messages": [{"role": "user", "content": "A title, please."}], "stream": False}
    named = post(url, "/v1/chat/completions", {**title, "max_completion_tokens": 5}, **headers)
    assert named.json["choices"][0]["message"]["content"]
