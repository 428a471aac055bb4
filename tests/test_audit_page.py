"""The audit's page in a real browser, desk and phone, light and dark: no error, no request, no sideways scroll.

The screenshots lie under pytest's temporary folder (`--basetemp`), or where DPF_SCREENSHOTS says, to be looked at.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_audit import HOSTILE, list_anew

from dpf_release.audit import audit, project_of, write_page

pytest.importorskip("selenium", reason="selenium is not installed: pip install 'dpf-release[test]'")
from selenium.webdriver import Chrome, ChromeOptions, ChromeService  # noqa: E402

WIDTHS = {"desk": (1280, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
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
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def pages(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good release with and without its vault, and a bad one whose names are long and hostile."""
    out, copy = tmp_path_factory.mktemp("pages"), tmp_path_factory.mktemp("bad") / "shapes"
    shutil.copytree(finished, copy)
    list_anew(copy / "release", licence=HOSTILE)
    (copy / "release" / ("a-long-name-without-any-place-to-break-" * 6)).touch()
    (copy / "release" / "<img src=x onerror=alert(1)>").symlink_to("/etc/passwd")
    with next((copy / "release" / "features" / "val").glob("*.h5")).open("ab") as shard:
        shard.write(b"x")
    (copy / "vault" / "ids.csv").chmod(0o644)
    found = {}
    for name, folder, vault in (("good", finished, False), ("good-vault", finished, True), ("bad-vault", copy, True)):
        found[name] = out / f"{name}.html"
        project = project_of(folder / "vault") if vault else None
        write_page(audit(folder / "release", project), found[name], folder / "release")
    return found


def _show(browser: Chrome, page: Path, width: int, height: int, scheme: str) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(page.as_uri())


def _requests(browser: Chrome) -> tuple[list[str], list[Any]]:
    """What the page asked for, and what of that failed."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return asked, [event["params"] for event in events if event["method"] == "Network.loadingFailed"]


# Each page at each width, each width in each scheme: the schemes differ in colours only.
@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        ("good", "desk", "light"),
        ("good", "phone", "dark"),
        ("good-vault", "desk", "dark"),
        ("good-vault", "phone", "light"),
        ("bad-vault", "desk", "light"),
        ("bad-vault", "phone", "dark"),
    ],
)
def test_the_page_has_no_error_no_request_and_no_sideways_scroll(
    browser: Chrome, pages: dict[str, Path], tmp_path: Path, name: str, width: str, scheme: str
) -> None:
    _show(browser, pages[name], *WIDTHS[width], scheme)
    browser.execute_script("document.querySelectorAll('details').forEach((each, i) => each.open = i % 2 == 0)")
    asked, not_loaded = _requests(browser)
    assert asked == [pages[name].as_uri()]
    assert not_loaded == []
    assert browser.get_log("browser") == []
    inner, scroll = browser.execute_script("return [window.innerWidth, document.documentElement.scrollWidth]")
    assert inner == WIDTHS[width][0]
    assert scroll <= inner
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(20, 24, 27)") == (scheme == "dark")
    folder = Path(os.environ.get("DPF_SCREENSHOTS", tmp_path))
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    picture = base64.b64decode(shot["data"])
    assert picture.startswith(b"\x89PNG")
    (folder / f"{name}-{width}-{scheme}.png").write_bytes(picture)


def test_the_browser_would_tell_of_an_error_a_request_and_a_scroll(browser: Chrome, tmp_path: Path) -> None:
    """The control: the same questions about a page that has all three."""
    page = tmp_path / "bad.html"
    page.write_text("<body style='width: 3000px'><img src='nowhere.png'><script>console.error('x')</script>")
    _show(browser, page, *WIDTHS["phone"], "light")
    asked, not_loaded = _requests(browser)
    assert len(asked) == 2
    assert not_loaded
    assert browser.get_log("browser")
    assert browser.execute_script("return document.documentElement.scrollWidth > window.innerWidth")
