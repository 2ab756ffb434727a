"""The page in a real browser, by keys and clicks, before a gateway whose engine is a script."""

from collections.abc import Iterator
from hashlib import sha256

import pytest

from harness.browser import NARROW, WIDE, Browser
from harness.servers.gateway_process import GatewayProcess, says
from harness.servers.http_process import HttpServer
from harness.waiting import eventually
from mgpu.protocol.internal.http_spec import ApiKey

ENTER, ESCAPE, SHIFT_ENTER = "\ue007", "\ue00c", "\ue008\ue007\ue000"
ANSWER = "article.assistant:last-of-type"
SECRET = "sk-0123456789-alice"
HOSTILE = (
    "<img src=x onerror=document.title='hit'><script>document.title='hit'</script>\n\n"
    "[a](javascript:document.title='hit') ![b](http://elsewhere.example/x.png) [c](https://c.example/?q=1)\n\n"
    "<style>body{display:none}</style>&lt;"
)


@pytest.fixture(scope="module")
def browsed(shared_http: HttpServer) -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(browsed: Browser, http: HttpServer) -> Iterator[Browser]:
    """The page without anything stored; in the end nothing may have broken the policy or asked another server."""
    browsed.resize(WIDE)
    browsed.open(http.url)
    browsed.wait(lambda: browsed.text("#state") == "ready")
    browsed.complaints()
    yield browsed
    asked = browsed.script("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert {each for each in asked if not each.startswith((http.url, "data:"))} == set()
    assert browsed.complaints() == []
    browsed.driver.get("about:blank")


def is_done(page: Browser) -> bool:
    return page.count("article.assistant") > 0 and not page.find("#stop").is_displayed()


def say(page: Browser, text: str) -> None:
    page.type("#input", text + ENTER)


def test_a_message_is_sent_by_enter_and_its_answer_shown_as_markdown(page: Browser, gateway: GatewayProcess) -> None:
    gateway.engine.script = says(
        "<think>Let me **see**.</think>\n\n# Title\n\nSome **bold** and `code`:\n\n```python\nprint('<b>')\n```\n\n"
        "- one\n- two\n  - three\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n"
    )
    page.type("#input", "Hi" + SHIFT_ENTER + "there" + ENTER)
    page.wait(lambda: is_done(page))
    assert page.text("article.user .text") == "Hi\nthere"
    assert page.text(f"{ANSWER} .text strong") == "bold"
    assert page.text(f"{ANSWER} .code pre") == "print('<b>')"
    assert page.text(f"{ANSWER} .text li li") == "three"
    assert page.text(f"{ANSWER} td.right") == "2"
    assert page.text(f"{ANSWER} .thought") == "Let me see."
    assert not page.find(f"{ANSWER} .thought").is_displayed()
    page.click(f"{ANSWER} summary")
    assert page.find(f"{ANSWER} .thought").is_displayed()
    assert "tokens/s" in page.text(f"{ANSWER} .hint")


def test_what_a_model_writes_is_never_html(page: Browser, gateway: GatewayProcess) -> None:
    gateway.engine.script = says(HOSTILE)
    say(page, "<b>me</b>")
    page.wait(lambda: is_done(page))
    assert page.count("article img, article script, article style, article b") == 0
    assert page.script("return [...document.querySelectorAll('article a')].map((each) => each.href)") == [
        "http://elsewhere.example/x.png",
        "https://c.example/?q=1",
    ]
    assert page.script("return document.title") == "mgpu"
    assert "<script>" in page.text(f"{ANSWER} .text")


def test_markdown_without_an_end_and_deep_markdown_is_text_soon(page: Browser) -> None:
    code = """
        const {renderMarkdown} = await import("/page/markdown.js");
        const node = document.createElement("div");
        const began = performance.now();
        for (const text of arguments[0]) renderMarkdown(node, text);
        return [node.textContent.length, performance.now() - began];
    """
    marks = [
        "*",
        "_",
        "**a",
        "`",
        "[",
        "![",
        "[a](",
        "<",
        "> ",
        "- ",
        "| ",
        "~~",
        "http://",
        "*a _b ",
        "` `` ",
        "1. ",
        "\\",
    ]
    length, took = page.script(code, [mark * (20_000 // len(mark)) for mark in marks])
    assert length > 0
    assert took < 20_000


@pytest.mark.parametrize("by", ["escape", "button"])
def test_an_answer_is_stopped(page: Browser, gateway: GatewayProcess, by: str) -> None:
    gateway.engine.script = says("word " * 100_000)
    say(page, "Go")
    page.wait(lambda: "word word" in page.text(f"{ANSWER} .text"))
    if by == "escape":
        page.press(ESCAPE)
    else:
        page.click("#stop")
    page.wait(lambda: is_done(page))
    assert "stopped" in page.text(f"{ANSWER} .hint")
    eventually(lambda: len(gateway.engine.cancels) == 1, lambda: "not cancelled")
    assert page.script("return document.activeElement.id") == "input"


def test_the_history_is_sent_without_thoughts_and_an_answer_can_be_had_again(
    page: Browser, gateway: GatewayProcess
) -> None:
    gateway.engine.script = says("<think>hm</think>first")
    say(page, "One")
    page.wait(lambda: is_done(page))
    gateway.engine.script = says("second")
    say(page, "Two")
    page.wait(lambda: page.text(f"{ANSWER} .text") == "second" and is_done(page))
    assert b"hm" not in prompt(gateway)
    assert b"first" in prompt(gateway)
    gateway.engine.script = says("third")
    page.click(f"{ANSWER} .retry")
    page.wait(lambda: page.text(f"{ANSWER} .text") == "third" and is_done(page))
    assert page.count("article") == 4


def test_conversations_stay_in_the_browser(page: Browser, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("an answer")
    for text in ("First", "Second"):
        page.click("#new")
        say(page, text)
        page.wait(lambda: page.count("article") == 2 and is_done(page))
    assert page.text("#conversations li:first-child .title") == "Second"
    page.driver.refresh()
    page.wait(lambda: page.text("article.user") == "Second")
    page.click("#conversations li:last-child .title")
    page.wait(lambda: page.text("article.user") == "First")
    page.click("#conversations li:last-child .drop")
    page.driver.switch_to.alert.accept()
    page.wait(lambda: page.text("article.user") == "Second" and page.count("#conversations li") == 1)


def test_a_conversation_that_is_deleted_while_it_streams_stays_deleted(page: Browser, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("word " * 100_000)
    say(page, "Go")
    page.wait(lambda: "word" in page.text(f"{ANSWER} .text"))
    page.click("#conversations .drop")
    page.driver.switch_to.alert.accept()
    eventually(lambda: len(gateway.engine.cancels) == 1, lambda: "not cancelled")
    page.wait(lambda: page.count("article") == 0 and not page.find("#stop").is_displayed())
    stored = "return Object.keys(localStorage).filter((each) => each.startsWith('mgpu.conversation.'))"
    assert page.script(stored) == []


def test_two_conversations_stream_side_by_side(page: Browser, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("word " * 100_000)
    say(page, "First")
    page.wait(lambda: "word" in page.text(f"{ANSWER} .text"))
    page.click("#new")
    gateway.engine.script = says("short")
    say(page, "Second")
    page.wait(lambda: page.text(f"{ANSWER} .text") == "short" and is_done(page))
    page.click("#conversations li:last-child .title")
    page.wait(lambda: page.text("article.user") == "First" and page.find("#stop").is_displayed())
    page.press(ESCAPE)
    page.wait(lambda: is_done(page))
    assert "stopped" in page.text(f"{ANSWER} .hint")


def test_settings_reach_the_server_and_stay(page: Browser, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("ok")
    page.click("#to-settings")
    page.type("#system", "Be brief.")
    page.type("#setting-temperature", "0.5")
    page.type("#setting-max_tokens", "1")
    page.click("#settings button[type=submit]")
    say(page, "Hi")
    page.wait(lambda: is_done(page))
    [submit] = gateway.engine.submits
    assert (submit.max_tokens, submit.sampling.temperature) == (1, 0.5)
    assert b"system\nBe brief." in prompt(gateway)
    assert "cut off" in page.text(f"{ANSWER} .hint")
    page.driver.refresh()
    page.wait(lambda: page.count("article") == 2)
    page.click("#to-settings")
    assert page.find("#system").get_property("value") == "Be brief."
    page.press(ESCAPE)
    page.wait(lambda: not page.find("#settings").is_displayed())


def test_an_error_of_the_server_stands_in_the_conversation(page: Browser, gateway: GatewayProcess) -> None:
    page.click("#to-settings")
    page.type("#setting-max_tokens", "100000")
    page.click("#settings button[type=submit]")
    say(page, "Hi")
    page.wait(lambda: page.text(f"{ANSWER} .error"))
    assert "100000" in page.text(f"{ANSWER} .error")


def test_the_status_view_follows_the_server(page: Browser, gateway: GatewayProcess) -> None:
    gateway.engine.stats = {
        "tokens_per_s": 123.0, "kv_blocks_used": 25.0, "kv_blocks_total": 100.0,
        "gpu0_memory_used_bytes": 2.0**33, "gpu0_memory_total_bytes": 2.0**34,
    }  # fmt: skip
    page.click("#to-status")
    page.wait(lambda: page.text("#speed-now") == "123")
    assert page.text("#layout") == "layout: one fake engine"
    assert "25 of 100 blocks (25 %)" in page.text("#kv")
    assert "GPU 0: 8.0 of 16.0 GiB" in page.text("#memory")
    assert "," in page.find("#points").get_attribute("points")
    gateway.set_info(state="recovering")
    page.wait(lambda: page.text("#state") == "recovering")
    gateway.set_info()
    page.wait(lambda: page.text("#state") == "ready")
    assert "recovering → ready" in page.text("#changes")
    assert page.count("#recoveries line") == 2
    page.click("#to-chat")
    assert page.find("#input").is_displayed()


def test_on_a_phone_nothing_is_wider_than_the_screen(page: Browser, gateway: GatewayProcess) -> None:
    gateway.engine.script = says(
        "```\n" + "x" * 300 + "\n```\n\n" + "y" * 300 + "\n\n|" + "column|" * 30 + "\n|" + "-|" * 30
    )
    page.resize(NARROW)
    page.driver.refresh()
    page.wait(lambda: page.text("#state") == "ready")
    assert page.find("#input").get_attribute("placeholder") == "Message", "a longer one would be cut"
    page.type("#input", "Hi" + ENTER + "there")
    assert page.count("article") == 0, "a touch screen has no Shift+Enter: Enter begins a line"
    page.click("#send")
    page.wait(lambda: is_done(page))
    assert page.text("article.user .text") == "Hi\nthere"
    for view in ("#to-status", "#to-chat"):
        page.click(view)
        assert page.script("return document.documentElement.scrollWidth <= innerWidth")
    assert not page.find("#side").is_displayed()
    page.click("#menu")
    assert page.find("#side").is_displayed()
    page.press(ESCAPE)
    assert not page.find("#side").is_displayed()
    assert page.script("return document.activeElement.id") == "menu"
    page.click("#menu")
    page.click("#new")
    assert not page.find("#side").is_displayed()


def test_every_control_has_a_name_and_can_be_reached_by_tab(page: Browser) -> None:
    unnamed = """
        return [...document.querySelectorAll("button, input, textarea")]
            .filter((each) => !(each.textContent.trim() || each.ariaLabel || each.labels?.length))
            .map((each) => each.id)
    """
    assert page.script(unnamed) == []
    reached = set()
    for _ in range(15):
        page.press("\ue004")
        reached.add(page.script("return document.activeElement.id"))
    assert {"to-chat", "to-status", "new", "input", "to-settings", "send"} <= reached


def test_with_keys_the_page_asks_for_one(browsed: Browser, shared_gateway: GatewayProcess) -> None:
    shared_gateway.engine.reset()
    shared_gateway.engine.script = says("hello")
    browsed.resize(WIDE)
    with HttpServer(shared_gateway.endpoint, api_keys=[ApiKey("alice", sha256(SECRET.encode()).digest())]) as server:
        browsed.open(server.url)
        browsed.wait(lambda: browsed.find("#key").is_displayed())
        browsed.type("#key", "sk-wrong" + ENTER)
        browsed.wait(lambda: "does not know" in browsed.text("#key-text") and browsed.find("#key").is_displayed())
        browsed.type("#key", SECRET + ENTER)
        browsed.wait(lambda: browsed.text("#state") == "ready")
        say(browsed, "Hi")
        browsed.wait(lambda: browsed.text(f"{ANSWER} .text") == "hello" and is_done(browsed))
        assert SECRET not in str(browsed.script("return JSON.stringify(localStorage)"))
        browsed.driver.get("about:blank")


def prompt(gateway: GatewayProcess) -> bytes:
    """Return the bytes of the last prompt, without special tokens."""
    ids = memoryview(gateway.engine.submits[-1].token_ids).cast("i")
    return bytes(token for token in ids if token < 256)
