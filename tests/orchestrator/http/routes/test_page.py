"""The page's files and the state it shows, as any HTTP client gets them."""

import re
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from harness.servers.gateway_process import GatewayProcess
from harness.servers.http_client import ask
from harness.servers.http_process import HttpServer
from mgpu.protocol.internal.http_spec import ApiKey

ROOT = Path(__file__).parents[4]
FOLDER = ROOT / "orchestrator" / "http" / "page"
NAMES = sorted(file.name for file in FOLDER.iterdir())
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
SECRET = "sk-0123456789-alice"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_of_the_page_is_served_under_a_strict_policy(http: HttpServer, name: str) -> None:
    answer = http.get(f"/page/{name}")
    assert (answer.status, answer.body) == (200, (FOLDER / name).read_bytes())
    assert answer.headers["content-type"] == f"{TYPES[Path(name).suffix]}; charset=utf-8"
    policy = dict(each.strip().split(" ", 1) for each in answer.headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "connect-src": "'self'",
        "img-src": "'self' data:", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
    }  # fmt: skip
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_the_page_is_at_the_root_and_head_has_no_body(http: HttpServer) -> None:
    found = http.get("/")
    assert found.body == (FOLDER / "index.html").read_bytes()
    head = ask(http.url, "HEAD", "/")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(found.body))
    assert head.headers["content-security-policy"] == found.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    ["/page/", "/page/other.js", "/page/../app.py", "/page/..%2Fapp.py", "/page/%2e%2e/app.py", "/page/a/app.js",
     "/page//etc/passwd", "/page/app.js%00", "/index.html", "/page"],
)  # fmt: skip
def test_what_is_no_file_of_the_page_is_not_found(http: HttpServer, path: str) -> None:
    answer = http.get(path)
    assert (answer.status, answer.error["code"]) == (404, "not_found")


def test_the_page_takes_no_post(http: HttpServer) -> None:
    assert http.post("/", {}).status == 405


def test_the_files_name_no_other_host_and_have_no_inline_script_or_style() -> None:
    index = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", index)
    for name in NAMES:
        text = (FOLDER / name).read_text()
        assert not re.search(r"""["'(](?:https?:)?//\w""", text.replace("http://www.w3.org/", "")), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )


def test_every_module_that_the_page_names_is_one_of_its_files() -> None:
    for name in NAMES:
        text = (FOLDER / name).read_text()
        named = re.findall(r"""from "\./([\w.]+)"|(?:src|href)="page/([\w.]+)\"""", text)
        assert {first or second for first, second in named} <= set(NAMES)


def test_with_keys_the_page_needs_none_but_its_numbers_do(shared_gateway: GatewayProcess) -> None:
    with HttpServer(shared_gateway.endpoint, api_keys=[ApiKey("alice", sha256(SECRET.encode()).digest())]) as server:
        assert server.get("/").status == server.get("/page/app.js").status == 200
        assert server.get("/page/nothing").status == 404
        assert server.get("/pages").status == server.get("/status").status == 401
        assert server.get("/status", authorization=f"Bearer {SECRET}").json["state"] == "ready"


def test_pages_of_other_sites_get_neither(http: HttpServer) -> None:
    for path in ("/", "/page/app.js", "/status"):
        assert http.get(path, origin="https://evil.example").status == 403


def test_the_status_has_the_state_and_the_counters(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.stats = {"kv_blocks_used": 3.0, "tokens_per_s": 1.5, "endless": float("inf"), "step_ms_le_1": 2.0}
    found = http.get("/status").json
    assert (found["state"], found["model"], found["layout"]) == ("ready", "tiny", "layout: one fake engine")
    assert (found["stats"]["kv_blocks_used"], found["stats"]["tokens_per_s"]) == (3, 1.5)
    assert not {"endless", "step_ms_le_1"} & set(found["stats"])
    gateway.set_info(state="recovering")
    assert http.get("/status").json["state"] == "recovering"


def test_a_wheel_has_the_page(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "orchestrator", "launch", "protocol", "worker"):
        (source / name).symlink_to(ROOT / name)
    (source / "src" / "mgpu").mkdir(parents=True)
    for path in (ROOT / "src" / "mgpu").iterdir():
        (source / "src" / "mgpu" / path.name).symlink_to(path)
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        packed = {each.rpartition("/")[2] for each in opened.namelist() if "orchestrator/http/page/" in each}
    assert packed == set(NAMES)
