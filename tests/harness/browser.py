"""A headless Chromium, driven as a user drives it."""

import os
import shutil
from collections.abc import Callable
from typing import Any, Self

import pytest

from harness.waiting import eventually

WIDE, NARROW = (1280, 800), (390, 844)


class Browser:
    """Chromium and its driver, or a skipped test that says what is not installed. A context manager."""

    def __init__(self, *arguments: str) -> None:
        pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        driver = shutil.which("chromedriver")
        if chromium is None or driver is None:
            pytest.skip("no Chromium with its driver; Debian has them as chromium and chromium-driver")
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        only_loopback = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        for argument in ("--headless=new", "--disable-dev-shm-usage", only_loopback, *arguments):
            options.add_argument(argument)
        if os.geteuid() == 0:  # its sandbox refuses root
            options.add_argument("--no-sandbox")
        self.driver = webdriver.Chrome(options, Service(driver))
        self.resize(WIDE)

    def open(self, url: str, *, forget: bool = True) -> None:
        """Show the page; ``forget`` what it has stored."""
        self.driver.get(url)
        if forget:
            self.script("localStorage.clear(); sessionStorage.clear()")
            self.driver.refresh()

    def resize(self, size: tuple[int, int]) -> None:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width < 600})

    def use_scheme(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def script(self, code: str, *arguments: object) -> Any:
        return self.driver.execute_script(code, *arguments)

    def find(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def count(self, css: str) -> int:
        return len(self.driver.find_elements("css selector", css))

    def click(self, css: str) -> None:
        self.find(css).click()

    def type(self, css: str, keys: str) -> None:
        self.find(css).send_keys(keys)

    def press(self, keys: str) -> None:
        """Press keys wherever the focus is."""
        self.driver.switch_to.active_element.send_keys(keys)

    def text(self, css: str) -> str:
        return str(self.script("return document.querySelector(arguments[0])?.textContent ?? ''", css))

    def wait(self, condition: Callable[[], object]) -> None:
        eventually(lambda: bool(condition()), lambda: self.text("body"))

    def complaints(self) -> list[str]:
        """Return the errors and warnings of the console since the last call, refused answers of the server aside."""
        entries = self.driver.get_log("browser")
        return [each["message"] for each in entries if each["level"] != "INFO" and each["source"] != "network"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.quit()
