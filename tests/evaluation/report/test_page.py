"""The attack report: the verdict in words, the page in a real browser, what the public page holds, the terminal."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from browsing import Browser
from commands import run_cli
from dpf_release.errors import ConfigError
from dpf_release.evaluation import suite as run
from dpf_release.evaluation.gallery import FILE, read_pictures
from dpf_release.evaluation.report import plots
from dpf_release.evaluation.report.frontier_points import Frontier
from dpf_release.evaluation.report.headline import MEASURES, strongest, verdict_in_words
from dpf_release.evaluation.report.page import page, write_page, write_public_page
from dpf_release.evaluation.report.plots import leakage_plot, scatter_plot, series_plot
from dpf_release.evaluation.report.public_page import publish_page
from dpf_release.evaluation.report.terminal import print_attacks
from dpf_release.evaluation.suite import attack
from dpf_release.images.dataset import Pictures
from dpf_release.owner.project import Project
from dpf_release.release.attack_report import AttackReport, AttackResult, Interval, Power, Utility, Way
from places import ROOT

HOSTILE = "<script>alert('$x$')</script> [bold]"


def about(value: float, half: float = 0.02) -> Interval:
    return Interval(value=value, low=value - half, high=value + half)


def result(code: str = "A1", verdict: str = "pass", claim: str | None = "reconstruction", **more: Any) -> AttackResult:
    """An attack that got nothing, unless told otherwise."""
    fields: dict[str, Any] = {
        "code": code,
        "title": "straw man and unseen reconstructors",
        "version": 1,
        "claim": claim,
        "granted": "ReleaseView",
        "rows": 5000,
        "images": 150_000,
        "seconds": 12.0,
        "ways": {"rx2s2-c, SSIM": Way(measures={"affine_ssim": about(0.2), "l1": about(0.1)}, leakage=about(0.03))},
        "baseline": 0.18,
        "ceiling": 0.52,
        "leakage": about(0.03),
        "re_identification": about(0.006, 0.002),
        "among": 200,
        "power": Power(passed=True, planted={"weak-noise": about(0.9)}),
        "verdict": verdict,
    }
    return AttackResult.model_validate(fields | more)


def report(*results: AttackResult, **more: Any) -> AttackReport:
    digest = "0" * 64
    return AttackReport(
        index_sha256=digest,
        featurizer_sha256=digest,
        public_images_sha256=digest,
        profile="standard",
        seed=0,
        function=more.pop("function", "default"),
        attacks=results,
        **more,
    )


LINKED = result(
    "A5",
    "fail",
    "linkage",
    title="linkage, membership",
    granted="Candidates",
    ways={"cosine of features": Way(measures={"top1": about(0.91), "auc": about(0.7)})},
    baseline=0.005,
    ceiling=1.0,
    leakage=about(0.91),
    re_identification=about(0.91),
    reasons=("top-1 0.910 [0.890, 0.930], limit 0.05",),
)
SHOWN = result("A4", "fail", leakage=about(0.34), reasons=("leakage 0.340 [0.320, 0.360], limit 0.1",))
FULL = report(
    result("A0", "reported", None, title="leaked vault", granted="LeakedVault", leakage=about(0.8)),
    result(),
    result("A3", "inconclusive", title="shadow functions", reasons=("no power: it does not break what it must",),
           power=Power(passed=False, planted={"weak-noise": about(0.2), "channel-affine": about(0.4)}),
           series={"shadows": {"1": about(0.02), "2": about(0.03), "4": about(0.05)}}),
    SHOWN,
    LINKED,
    result("A6", "reported", None, title=HOSTILE, granted="KnownPairs", leakage=None, re_identification=None,
           series={HOSTILE: {str(m): about(0.1 * i) for i, m in enumerate((1, 10, 100, 1000))}}),
    function="default",
    utility={"U1": Utility(measures={"top1": about(0.87), "top1 on clean rows": about(0.88)})},
)  # fmt: skip
PROBED = result(
    "A8",
    "fail",
    "attribute",
    title="attribute, identity",
    granted="LabelledRows",
    ways={"linear": Way(measures={"accuracy": about(0.4), "rank1": about(0.5), "gain": about(0.28)})},
    baseline=0.12,
    re_identification=None,
)
FRONTIER = Frontier.model_validate(
    {
        "profile": "quick",
        "points": [
            {"name": name, "function": name, "privacy": privacy and about(privacy).model_dump(),
             "linkage": about(linkage).model_dump(), "m": "m = 10",
             "gain": about(u2).model_dump(), "gain_of_clean": about(u2 + 0.02).model_dump()}
            for name, privacy, linkage, u2 in (
                ("identity", 1.0, 1.0, 0.86), ("equivalence", 0.1, 0.95, 0.8), ("class-gaussian", None, 0.03, 0.6),
                ("a-name-without-any-place-to-break-as-long-as-they-may-be-at-most", 0.02, 0.1, 0.84))
        ],
    }
)  # fmt: skip


def some_pictures(codes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4, generator=draws), (32, 32), mode="bilinear")
    names = ("original", "clean", "attack", "worst original", "worst clean", "worst attack", "worst fitted")
    pictures = (smooth * 255).byte()
    return {
        f"{code}/{name}": (pictures if "original" in name else pictures // (2 + place % 3))
        for code in codes
        for place, name in enumerate(names)
    }


# --------------------------------------------------------------------------------------------- in words


def test_the_headline_is_the_worst_finding() -> None:
    verdict = verdict_in_words(report(result(), SHOWN, LINKED))
    assert verdict.tone == "bad"
    assert "find its row: in 91 of 100 cases, among 200" in verdict.headline
    assert "A4, A5 got through; A1 stayed within limits" in verdict.detail
    shown = verdict_in_words(report(result(), SHOWN))
    assert shown.headline == "A stranger's best reconstruction shows 34 % of what the unprotected rows show."


def test_of_a_reconstruction_only_what_broke_its_limit_is_told() -> None:
    """Re-identification can fail where leakage does not, and the other way round."""
    limits = {"leakage": about(0.5), "re_identification": about(0.43), "among": 160}
    matched = report(result(verdict="fail", **limits, reasons=("re-identification 0.430 [0.41, 0.45], limit 0.06",)))
    showing = report(result(verdict="fail", **limits, reasons=("leakage 0.500 [0.48, 0.52], limit 0.1",)))
    assert "in 43 of 100 cases, among 160" in verdict_in_words(matched).headline
    assert "shows 50 %" in verdict_in_words(showing).headline


def test_every_measure_that_an_attack_is_known_by_has_a_name_on_the_page() -> None:
    text = page(report(PROBED, LINKED, result()), {}, Frontier(), private=True)
    for words in ("balanced accuracy", "right row first", "SSIM after the best colour fit"):
        assert words in text
    assert all(MEASURES.values())


def test_a_public_page_does_not_name_the_function(tmp_path: Path) -> None:
    named = report(result(), function="recombine-of-my-hospital")
    write_public_page(named, {}, tmp_path / "attack.html")
    assert "my-hospital" not in (tmp_path / "attack.html").read_text()
    assert "my-hospital" in page(named, {}, Frontier(), private=True)


def test_membership_and_attributes_are_told_in_cases_of_a_hundred() -> None:
    member = LINKED.model_copy(update={"re_identification": None})
    assert "whether it is in this release: in 70 of 100 cases" in verdict_in_words(report(member)).headline
    attribute = result("A8", "fail", "attribute", ways={"linear": Way(measures={"accuracy": about(0.4)})},
                       baseline=0.12)  # fmt: skip
    told = verdict_in_words(report(attribute, attribute="person")).headline
    assert told == (
        "Someone can read person from a row: right in 40 of 100 cases, where the label alone is right in 12."
    )


def test_only_a_run_in_which_every_attack_could_and_none_did_is_good() -> None:
    good = verdict_in_words(report(result(), result("A6", "reported", None, leakage=about(0.9))))
    assert (good.tone, good.headline) == ("good", "No attack of the profile standard got past its limits.")
    assert "at most 5 %" in good.detail  # of the attacks that are judged: what P's leak would show is not among them
    open_ = verdict_in_words(report(result(), result("A3", "inconclusive")))
    assert open_.tone == "open"
    assert open_.headline == "It is not known whether this release is safe: 1 of 2 attacks could not tell."
    assert verdict_in_words(report()).tone == "open"


def test_the_way_shown_is_the_one_that_got_most() -> None:
    ways = {name: Way(measures={"affine_ssim": about(value)}) for name, value in (("a", 0.2), ("b", 0.4), ("c", 0.3))}
    best = strongest(result(ways=ways))
    assert best is not None
    assert (best.way, best.found.value) == ("b", 0.4)
    assert strongest(result(ways={"a": Way(measures={"unheard of": about(1)})})) is None


# --------------------------------------------------------------------------------------------- the terminal


@pytest.mark.parametrize("columns", [80, 160])
def test_the_table_fits_the_terminal_and_has_every_number(columns: int) -> None:
    console = Console(width=columns, file=io.StringIO(), color_system=None)
    print_attacks(FULL, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith("Someone who holds a photograph that is in this release can find its row")
    assert max(map(len, text.splitlines())) <= columns
    for number in ("0.18", "0.20", "0.52", "0.34", "[0.32, 0.36]", "91 %", "inconclusive", "reported", "≥ 0.88"):
        assert number in text
    assert "A4 fail: leakage 0.340" in text
    assert "[bold]" in text.replace("\n", "")  # a title is text, not markup


# --------------------------------------------------------------------------------------------- the page


def test_the_same_numbers_give_the_same_page_and_others_another() -> None:
    pictures = some_pictures(("A1", "A4"))
    one = page(FULL, pictures, FRONTIER, private=True)
    assert page(FULL, pictures, FRONTIER, private=True) == one
    other = FULL.model_copy(update={"attacks": FULL.attacks[:3]})
    assert page(other, pictures, FRONTIER, private=True) != one
    for plot in (leakage_plot(FULL.attacks), series_plot({"$x": {"1": about(0.1)}}),
                 scatter_plot({"1": (about(0.1), about(0.2))}, "a", "$b$ <")):  # fmt: skip
        assert "<svg" in plot
        assert "20" not in re.findall(r"<dc:date>(.*?)</dc:date>", plot)
        assert "Matplotlib" not in plot.split("</metadata>")[0].split("<metadata>")[-1]


def test_labels_of_points_that_lie_close_lie_apart_and_within_the_plot() -> None:
    points = {f"{place}": (about(0.9), about(0.8 + 0.001 * place)) for place in range(12)} | {
        "far": (about(0), about(0))
    }

    def overlaps(placed: bool) -> int:
        figure, axes = plots._figure(3.4)
        plots._scatter(axes, points, "x", "y", {"a line": about(0.8)})
        if placed:
            plots._label(figure, axes, points)
        else:
            for label, (across, up) in points.items():
                axes.annotate(label, (across.value, up.value))
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text() in points]
        assert len(boxes) == len(points)
        if placed:
            assert all(axes.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
        return sum(box.count_overlaps(boxes) - 1 for box in boxes)

    assert overlaps(placed=True) == 0 < overlaps(placed=False)


def test_names_are_escaped_and_every_picture_says_what_it_is() -> None:
    text = page(FULL, some_pictures(("A1", "A4")), FRONTIER, private=True)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    images = re.findall(r"<img [^>]*>", text)
    assert len(images) > 15
    assert all(re.search(r' alt="[^"]{10,}"', image) and 'src="data:image/' in image for image in images)


def test_typical_pictures_of_all_attacks_stand_below_the_same_originals() -> None:
    pictures = some_pictures(("A1", "A4"))
    text = page(report(result(), SHOWN), pictures, Frontier(), private=True)
    typical = text.split('id="pictures"')[1].split("The worst 1 %")[0]
    assert [typical.count(words) for words in (">Original<", "<strong>A1</strong>", "<strong>A4</strong>")] == [1, 1, 1]
    pictures["A4/original"] = pictures["A4/original"].flip(0)
    text = page(report(result(), SHOWN), pictures, Frontier(), private=True)
    assert text.split('id="pictures"')[1].split("The worst 1 %")[0].count(">Original<") == 2


# --------------------------------------------------------------------------------------------- in a browser


@pytest.mark.parametrize(("width", "private"), [("desk", True), ("phone", True), ("phone", False)])
def test_the_page_has_no_error_no_request_and_no_sideways_scroll(
    browser: Browser, tmp_path: Path, width: str, private: bool
) -> None:
    path = tmp_path / "attack.html"
    pictures = {key: found for key, found in some_pictures(("A1", "A3", "A4")).items() if private or "worst" not in key}
    path.write_text(page(FULL, pictures, FRONTIER if private else Frontier(), private=private), encoding="utf-8")
    browser.show(path, width)
    browser.assert_sound(path, width)
    assert all(browser.ask("return [...document.images].map(each => each.complete && each.naturalWidth > 0)"))
    browser.photograph(tmp_path, f"attack-{'private' if private else 'public'}-{width}.png")


# --------------------------------------------------------------------------------------------- a project


@pytest.fixture(scope="module")
def attacked(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AttackReport]:
    """A project whose candidate was attacked, with hardly any training; read-only."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("attacked") / "shapes"))
    return folder, attack(Project.open(folder / "dpf.toml"), profile="quick", only=["A1"], images=500)


def pictures_in(text: str) -> list[NDArray[np.uint8]]:
    """The strips of a page, as they are shown."""
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def tiles(strips: list[NDArray[np.uint8]], side: int = 32) -> set[bytes]:
    return {
        strip[:, left : left + side].tobytes() for strip in strips for left in range(0, strip.shape[1], side + 1)
    }  # between two lies a pixel


def private_pictures(folder: Path) -> set[bytes]:
    images = Project.open(folder / "dpf.toml").private_images
    rows = np.concatenate([images.rows(split) for split in ("train", "val", "test")])
    return {picture.permute(1, 2, 0).numpy().tobytes() for picture in images.pictures.read(rows)}


def test_an_attack_leaves_a_private_page_with_pictures_of_s(attacked: tuple[Path, AttackReport]) -> None:
    folder, _ = attacked
    path = folder / "vault" / "reports" / "default" / "attack.html"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text(encoding="utf-8")
    assert text.count("Private. This page shows pictures of the data set") == 1
    assert len(tiles(pictures_in(text)) & private_pictures(folder)) >= 8  # and the test below finds none


def test_the_page_can_be_made_again_without_attacking(attacked: tuple[Path, AttackReport], tmp_path: Path) -> None:
    folder, found = Path(shutil.copytree(attacked[0], tmp_path / "shapes")), attacked[1]
    project = Project.open(folder / "dpf.toml")
    path = folder / "vault" / "reports" / "default" / "attack.html"
    first = path.read_bytes()
    path.unlink()
    assert write_page(project.vault, "default", found).read_bytes() == first
    frontier = {"points": [point.model_dump() for point in FRONTIER.points]}
    project.vault.write_json(project.vault.root / "reports" / "frontier.json", frontier)
    assert b'id="frontier"' not in first
    assert b'id="frontier"' in write_page(project.vault, "default", found).read_bytes()
    another = found.model_copy(update={"index_sha256": "1" * 64})
    assert read_pictures(project.vault, "default", found)
    assert read_pictures(project.vault, "default", another) == {}  # pictures of another bank are not shown
    assert (folder / "vault" / "reports" / "default" / FILE).is_file()


def test_the_public_page_holds_nothing_of_s_or_p(
    attacked: tuple[Path, AttackReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = attacked
    folder = Path(shutil.copytree(folder, tmp_path / "shapes"))
    private = private_pictures(folder)
    shown = tiles(pictures_in((folder / "vault/reports/default/attack.html").read_text(encoding="utf-8")))
    (folder / "vault" / "functions" / "default" / "state.safetensors").unlink()  # P is not even there
    shutil.rmtree(folder / "vault" / "candidates")
    shutil.rmtree(folder / "vault" / "features")
    monkeypatch.setattr("dpf_release.evaluation.report.public_page.EPOCHS", 2)
    project = Project.open(folder / "dpf.toml")
    reads = Pictures.read

    def no_pixel_of_s(pictures: Pictures, rows: Any, **more: Any) -> torch.Tensor:
        assert pictures is not project.private_images.pictures
        return reads(pictures, rows, **more)

    monkeypatch.setattr(Pictures, "read", no_pixel_of_s)
    publish_page(project, "default", found, tmp_path / "public.html")
    text = (tmp_path / "public.html").read_text(encoding="utf-8")
    mine = tiles(pictures_in(text))
    assert len(mine) >= 8 * 3
    assert mine & private == set()
    assert mine & shown == set()  # nor what anybody made of a row of the release
    assert "None of these pictures is in the data set" in text
    assert "Private." not in text
    assert "The worst 1 %" not in text
    assert stat.S_IMODE((tmp_path / "public.html").stat().st_mode) == 0o644


def test_a_public_page_is_not_put_into_a_release(tmp_path: Path) -> None:
    (tmp_path / "release" / "reports").mkdir(parents=True)
    (tmp_path / "release" / "manifest.json").touch()
    with pytest.raises(ConfigError, match="--public"):
        write_public_page(FULL, {}, tmp_path / "release" / "reports" / "attack.html")
    write_public_page(FULL, {}, tmp_path / "attack.html")


def test_the_cost_that_is_told_is_of_what_is_asked_for(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project, told = Project.open(project_folder / "dpf.toml"), {}
    monkeypatch.setattr(run._Run, "go", lambda self, restart: None)  # it is told before anything is done
    monkeypatch.setattr(run, "decoder_rate", lambda view: 100.0)
    for only in ((), ("A2",), ("A5",)):
        attack(project, profile="quick", only=only, images=10_000_000)
        found = re.search(r"(\d+) attacks on .* about (\d+) minutes", capsys.readouterr().err)
        assert found is not None
        told[only] = [int(number) for number in found.groups()]
    assert [count for count, _ in told.values()] == [3, 1, 1]
    assert told["A5",][1] == 0  # it trains nothing in `quick`
    # A2 is compared with what A1 reaches on clean rows too.
    assert told["A2",][1] == told[()][1] > 0


def test_the_schema_in_the_docs_is_that_of_the_report() -> None:
    written = json.loads((ROOT / "docs" / "attack.schema.json").read_text(encoding="utf-8"))
    today = AttackReport.model_json_schema()
    for said, held in ((written, today), *((written["$defs"][name], part) for name, part in today["$defs"].items())):
        assert said["properties"].keys() == held["properties"].keys()
        assert said.get("required") == held.get("required")
    assert {"baseline", "ceiling", "leakage", "re_identification", "power", "verdict"} <= set(
        written["$defs"]["AttackResult"]["properties"]
    )


def test_the_command_prints_json_or_the_table(attacked: tuple[Path, AttackReport], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(attacked[0], tmp_path / "shapes"))
    done = run_cli("attack", "--profile", "quick", "--only", "A1", "--budget", "0.02", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert {"baseline", "ceiling", "leakage", "re_identification", "power", "verdict"} <= set(said["attacks"][0])
    assert AttackReport.model_validate(said).as_json() == done.stdout.rstrip("\n")
