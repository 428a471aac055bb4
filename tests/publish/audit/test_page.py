"""The audit's page in a real browser, desk and phone, light and dark: no error, no request, no sideways scroll."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from browsing import Browser
from dpf_release.publish.audit.audit import audit, project_of
from dpf_release.publish.audit.page import write_page
from small_releases import HOSTILE, list_anew


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
    browser: Browser, pages: dict[str, Path], tmp_path: Path, name: str, width: str, scheme: str
) -> None:
    browser.show(pages[name], width, scheme)
    browser.assert_sound(pages[name], width)
    ground = browser.ask("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(20, 24, 27)") == (scheme == "dark")
    browser.photograph(tmp_path, f"{name}-{width}-{scheme}.png")


def test_the_browser_would_tell_of_an_error_a_request_and_a_scroll(browser: Browser, tmp_path: Path) -> None:
    """The control: the same questions about a page that has all three."""
    page = tmp_path / "bad.html"
    page.write_text("<body style='width: 3000px'><img src='nowhere.png'><script>console.error('x')</script>")
    browser.show(page, "phone")
    asked, not_loaded = browser.requests()
    assert len(asked) == 2
    assert not_loaded
    assert browser.chrome.get_log("browser")
    assert browser.ask("return document.documentElement.scrollWidth > window.innerWidth")
