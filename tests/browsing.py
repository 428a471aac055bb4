"""A real browser for the pages that the tool writes.

Screenshots lie under pytest's temporary folder (`--basetemp`), or where DPF_SCREENSHOTS says, to be looked at.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

WIDTHS = {"desk": (1280, 800), "phone": (390, 844)}


@dataclass
class Browser:
    """One page at a time.

    Attributes:
        chrome: selenium's.
    """

    chrome: Any

    def show(self, page: Path, width: str, scheme: str = "light") -> None:
        """Loads a page at the width of a desk or a phone, every other of its details open."""
        across, down = WIDTHS[width]
        metrics = {"width": across, "height": down, "deviceScaleFactor": 1, "mobile": width == "phone"}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.chrome.get_log("browser")
        self.chrome.get_log("performance")
        self.chrome.get(page.as_uri())
        self.ask("document.querySelectorAll('details').forEach((each, i) => each.open = i % 2 == 0)")

    def ask(self, script: str) -> Any:
        """What a script returns."""
        return self.chrome.execute_script(script)

    def requests(self) -> tuple[list[str], list[Any]]:
        """What the page asked for, pictures inside it left out; and what of that failed."""
        events = [json.loads(entry["message"])["message"] for entry in self.chrome.get_log("performance")]
        asked = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        failed = [event["params"] for event in events if event["method"] == "Network.loadingFailed"]
        return [url for url in asked if not url.startswith("data:")], failed

    def assert_sound(self, page: Path, width: str) -> None:
        """No error, no request but for the page, no sideways scroll."""
        assert self.requests() == ([page.as_uri()], [])
        assert self.chrome.get_log("browser") == []
        inner, scroll = self.ask("return [window.innerWidth, document.documentElement.scrollWidth]")
        assert inner == WIDTHS[width][0]
        assert scroll <= inner

    def photograph(self, folder: Path, name: str) -> None:
        """Keeps the whole page as a picture, to be looked at."""
        shot = self.chrome.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        picture = base64.b64decode(shot["data"])
        assert picture.startswith(b"\x89PNG")
        (Path(os.environ.get("DPF_SCREENSHOTS", folder)) / name).write_bytes(picture)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Headless Chromium; skips where there is none."""
    pytest.importorskip("selenium", reason="selenium is not installed: pip install 'dpf-release[test]'")
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no browser: Debian's packages chromium and chromium-driver are not installed")
    options = ChromeOptions()
    options.binary_location = program
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options=options, service=ChromeService(executable_path=driver))
    yield Browser(chrome)
    chrome.quit()
