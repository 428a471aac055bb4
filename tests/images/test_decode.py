"""Tables of images, splits, decoding: no image is dropped silently."""

import csv
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms

from dpf_release.errors import ImageError
from dpf_release.images.decode import Preprocess, decode
from dpf_release.images.read import read_public, read_table
from dpf_release.images.table import ImageTable

PLAIN = Preprocess(size=(16, 16), resize=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def _photo(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """Returns a smooth RGB image of (width, height), so that a lossy format keeps it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def _write(path: Path, seed: int = 0, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _photo(seed).save(path, **options)


def _write_tree(root: Path, counts: dict[str, int]) -> Path:
    """Writes as many images as `counts` says into each folder, cat/0.jpg and so on."""
    blob = io.BytesIO()
    _photo().save(blob, "JPEG")
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for number in range(count):
            (root / folder / f"{number}.jpg").write_bytes(blob.getvalue())
    return root


def _write_csv(path: Path, header: list[str], rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def _splits_by_class(table: ImageTable) -> Counter[tuple[str, str]]:
    names = [table.classes[target] for target in table.targets]
    return Counter(zip(table.splits.tolist(), names, strict=True))


# Tables.


def test_a_tree_with_splits_is_taken_as_it_is(tmp_path: Path) -> None:
    counts = {"train/cat": 3, "train/dog": 2, "validation/cat": 1, "test/dog": 2}
    table = read_table(_write_tree(tmp_path / "s", counts), task="classification")
    assert table.classes == ("cat", "dog")
    assert _splits_by_class(table) == {
        ("train", "cat"): 3,
        ("train", "dog"): 2,
        ("val", "cat"): 1,
        ("test", "dog"): 2,
    }
    assert table.paths[0] == "test/dog/0.jpg"
    assert table.counts() == {"train": 5, "val": 1, "test": 2}
    assert table.targets.dtype == np.int64


def test_missing_splits_are_stratified_and_repeat_by_seed(tmp_path: Path) -> None:
    root = _write_tree(tmp_path / "s", {"cat": 60, "dog": 20, "eel": 1})
    table = read_table(root, task="classification", seed=1)
    assert table.counts() == {"train": 65, "val": 8, "test": 8}
    found = _splits_by_class(table)
    assert found["train", "eel"] == 1  # the only image of a class is trained on
    for split in ("val", "test"):
        assert 5 <= found[split, "cat"] <= 7
        assert 1 <= found[split, "dog"] <= 3
    assert (read_table(root, task="classification", seed=1).splits == table.splits).all()
    assert (read_table(root, task="classification", seed=2).splits != table.splits).any()


def test_only_the_missing_split_is_carved_from_train(tmp_path: Path) -> None:
    root = _write_tree(tmp_path / "s", {"train/cat": 20, "train/dog": 20, "test/cat": 4})
    table = read_table(root, task="classification", val_fraction=0.2)
    assert table.counts() == {"train": 32, "val": 8, "test": 4}
    assert {table.paths[row] for row in table.rows_of("test")} == {f"test/cat/{n}.jpg" for n in range(4)}
    assert read_table(root, task="classification", val_fraction=0).counts()["val"] == 0


def test_classes_limit_a_tree_and_set_the_order(tmp_path: Path) -> None:
    root = _write_tree(tmp_path / "s", {"train/cat": 2, "train/dog": 3, "train/eel": 4})
    table = read_table(root, task="classification", classes=["eel", "cat"], val_fraction=0, test_fraction=0)
    assert table.classes == ("eel", "cat")
    assert Counter(table.targets.tolist()) == {0: 4, 1: 2}
    with pytest.raises(ImageError, match=r"expected images of class emu, found cat, dog, eel"):
        read_table(root, task="classification", classes=["emu"])


@pytest.mark.parametrize("stray", ["train/lost.jpg", "extra/cat/0.jpg", "top.png", "Train2/x.WEBP"])
def test_an_image_outside_the_layout_is_an_error_and_other_files_are_not(tmp_path: Path, stray: str) -> None:
    root = _write_tree(tmp_path / "s", {"train/cat": 9, "train/dog": 9})
    (root / "train" / "notes.txt").write_text("not an image")
    assert len(read_table(root, task="classification")) == 18
    _write(root / stray)
    with pytest.raises(ImageError, match="found 1 images elsewhere"):
        read_table(root, task="classification")


def test_links_are_followed_once(tmp_path: Path) -> None:
    _write_tree(tmp_path / "elsewhere", {"dog": 3})
    root = _write_tree(tmp_path / "s", {"cat": 9})
    (root / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (root / "cat" / "up").symlink_to(root)
    assert Counter(read_table(root, task="classification").targets.tolist()) == {0: 9, 1: 3}


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "found none"),
        ({"test/cat": 3}, "expected images in the split train"),
        ({"train/cat": 2}, "expected enough images"),
    ],
)
def test_a_tree_without_enough_images_is_an_error(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(ImageError, match=message):
        read_table(_write_tree(tmp_path / "s", counts), task="classification")


def test_a_csv_table_keeps_labels_splits_and_attributes(tmp_path: Path) -> None:
    rows = [
        ["b/1.jpg", "cat", "train", "ann"],
        ["./a.png", "dog", "valid", "bob"],
        ["c.webp", "cat", "test", "ann"],
    ]
    path = _write_csv(tmp_path / "s.csv", ["path", "label", "split", "person"], rows)
    table = read_table(path, task="classification")
    assert table.paths == ("b/1.jpg", "a.png", "c.webp")
    assert table.targets.tolist() == [0, 1, 0]
    assert table.splits.tolist() == ["train", "val", "test"]
    assert table.attributes == {"person": ("ann", "bob", "ann")}
    assert table.root == tmp_path


def test_csv_classes_limit_rows_and_set_the_order(tmp_path: Path) -> None:
    rows = [[f"{n}.jpg", "abc"[n % 3], "train"] for n in range(9)]
    path = _write_csv(tmp_path / "s.csv", ["path", "label", "split"], rows)
    table = read_table(path, task="classification", classes="ca", val_fraction=0, test_fraction=0)
    assert Counter(table.classes[target] for target in table.targets) == {"a": 3, "c": 3}
    assert table.classes == ("c", "a")


def test_regression_targets_are_float_columns_split_over_their_deciles(tmp_path: Path) -> None:
    rows = [[f"{n}.jpg", n / 10, -n, "x"] for n in range(200)]
    path = _write_csv(tmp_path / "s.csv", ["path", "age", "height", "note"], rows)
    table = read_table(path, task="regression", target_columns=["age", "height"])
    assert table.targets.shape == (200, 2)
    assert table.targets.dtype == np.float32
    assert table.target_names == ("age", "height")
    assert table.classes == ()
    assert set(table.attributes) == {"note"}
    assert table.counts() == {"train": 160, "val": 20, "test": 20}
    deciles = Counter((table.targets[table.rows_of("val"), 0] // 2).tolist())
    assert len(deciles) == 10
    assert max(deciles.values()) <= 4


def test_no_group_is_in_two_splits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [[f"{n}.jpg", "ab"[n % 2], f"person {rng.integers(40)}"] for n in range(300)]
    path = _write_csv(tmp_path / "s.csv", ["path", "label", "person"], rows)

    def shared(table: ImageTable) -> int:
        homes = set(zip(table.attributes["person"], table.splits.tolist(), strict=True))
        return len(homes) - len(set(table.attributes["person"]))

    grouped = read_table(path, task="classification", group_column="person")
    assert shared(grouped) == 0
    assert 20 <= grouped.counts()["val"] <= 30
    assert 20 <= grouped.counts()["test"] <= 30
    assert shared(read_table(path, task="classification")) > 0


def test_large_groups_still_fill_every_split_and_two_groups_cannot(tmp_path: Path) -> None:
    rows = [[f"{n}.jpg", "ab"[n % 2], n // 10] for n in range(30)]
    path = _write_csv(tmp_path / "s.csv", ["path", "label", "person"], rows)
    table = read_table(path, task="classification", group_column="person")
    assert table.counts() == {"train": 10, "val": 10, "test": 10}
    path = _write_csv(tmp_path / "two.csv", ["path", "label", "person"], rows[:20])
    with pytest.raises(ImageError, match="expected enough groups"):
        read_table(path, task="classification", group_column="person")


def test_a_group_that_the_table_splits_is_an_error(tmp_path: Path) -> None:
    rows = [["0.jpg", "a", "ann", "train"], ["1.jpg", "b", "ann", "val"], ["2.jpg", "b", "bob", "test"]]
    path = _write_csv(tmp_path / "s.csv", ["path", "label", "person", "split"], rows)
    with pytest.raises(ImageError, match=r"found 1 in several: ann \(train, val\)"):
        read_table(path, task="classification", group_column="person")
    assert len(read_table(path, task="classification")) == 3


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (["file", "label"], ["a.jpg", "x"], "found no column path"),
        (["path", "class"], ["a.jpg", "x"], "found no column label"),
        (["path", "label", "label"], ["a.jpg", "x", "y"], "a column name twice"),
        (["path", "label"], ["/etc/a.jpg", "x"], "line 3: path .* stay inside"),
        (["path", "label"], ["b/../../a.jpg", "x"], "line 3: path .* stay inside"),
        (["path", "label"], ["C:\\a.jpg", "x"], "line 3: path .* stay inside"),
        (["path", "label"], ["./ok.jpg", "x"], "line 3: ok.jpg is on line 2 already"),
        (["path", "label"], ["a.jpg", ""], "line 3: label is empty"),
        (["path", "label"], ["a.jpg"], "line 3: expected 2 cells, found 1"),
        (["path", "label", "split"], ["a.jpg", "x", "dev"], "line 3: split is 'dev'"),
    ],
)
def test_a_faulty_csv_line_is_named(tmp_path: Path, header: list[str], row: list[object], message: str) -> None:
    good: list[object] = ["ok.jpg", "x", "train"]
    path = _write_csv(tmp_path / "s.csv", header, [good[: len(header)], row])
    with pytest.raises(ImageError, match=message):
        read_table(path, task="classification", val_fraction=0, test_fraction=0)


@pytest.mark.parametrize("cell", ["old", "nan", "inf", "1e39", ""])
def test_a_target_that_is_no_number_is_named_by_line(tmp_path: Path, cell: str) -> None:
    path = _write_csv(tmp_path / "s.csv", ["path", "age"], [["a.jpg", 1], ["b.jpg", cell], ["c.jpg", cell]])
    with pytest.raises(ImageError, match=r"2 rows cannot be used: line 3: age is .*; line 4: age is"):
        read_table(path, task="regression", target_columns=["age"])


def test_every_faulty_line_is_counted_and_the_first_shown(tmp_path: Path) -> None:
    path = _write_csv(tmp_path / "s.csv", ["path", "label"], [[f"{n}.jpg", ""] for n in range(9)])
    with pytest.raises(ImageError, match=r"9 rows cannot be used: line 2.*line 6: label is empty; and 4 more"):
        read_table(path, task="classification")


def test_a_file_that_is_no_table_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    with pytest.raises(ImageError, match="found neither"):
        read_table(path, task="classification")
    path.write_bytes(b"path,label\n\xff\xfe,x\n")
    with pytest.raises(ImageError, match="UTF-8"):
        read_table(path, task="classification")
    path.write_bytes(b"")
    with pytest.raises(ImageError, match="no column path"):
        read_table(path, task="classification")


def test_folders_have_neither_groups_nor_numbers(tmp_path: Path) -> None:
    root = _write_tree(tmp_path / "s", {"cat": 9, "dog": 9})
    with pytest.raises(ImageError, match="group column 'person'"):
        read_table(root, task="classification", group_column="person")
    with pytest.raises(ImageError, match="numbers as targets"):
        read_table(root, task="regression", target_columns=["age"])


def test_select_keeps_classes_and_the_given_order(tmp_path: Path) -> None:
    rows = [[f"{n}.jpg", "abc"[n % 3], n] for n in range(9)]
    table = read_table(
        _write_csv(tmp_path / "s.csv", ["path", "label", "n"], rows),
        task="classification",
        val_fraction=0,
        test_fraction=0,
    )
    some = table.select([5, 2])
    assert (some.paths, some.attributes) == (("5.jpg", "2.jpg"), {"n": ("5", "2")})
    assert some.classes == table.classes
    assert some.targets.tolist() == [2, 2]


def test_the_digest_follows_files_labels_and_splits_but_not_the_order(tmp_path: Path) -> None:
    root = _write_tree(tmp_path / "s", {"cat": 9, "dog": 9})
    table = read_table(root, task="classification")
    assert table.digest() == read_table(root, task="classification").digest()
    assert table.digest() == table.select(np.arange(len(table))[::-1]).digest()
    others = [
        read_table(root, task="classification", seed=9),
        read_table(root, task="classification", classes=["cat"]),
    ]
    assert table.digest() not in [other.digest() for other in others]
    before = table.digest()
    with (root / "cat" / "0.jpg").open("ab") as stream:
        stream.write(b"\0")
    assert table.digest() != before
    (root / "cat" / "0.jpg").unlink()
    assert table.digest() != before


def test_public_images_need_no_labels(tmp_path: Path) -> None:
    root = _write_tree(tmp_path / "q", {"a/b": 30, "train": 10, "test/a": 5, ".hidden": 3})
    _write(root / "TOP.JPEG", format="JPEG")
    table = read_public(root, val_fraction=0.1)
    assert table.counts() == {"train": 37, "val": 4, "test": 5}
    assert not table.targets.any()
    assert table.classes == ()
    limited = read_public(root, classes=["a"])
    assert len(limited) == 35
    assert all("a/" in path for path in limited.paths)
    with pytest.raises(ImageError, match="class emu"):
        read_public(root, classes=["emu"])


def test_public_images_can_be_a_csv_table(tmp_path: Path) -> None:
    rows = [[f"{n}.jpg", "ab"[n % 2], ["train", "test"][n < 4]] for n in range(40)]
    path = _write_csv(tmp_path / "q.csv", ["path", "label", "split"], rows)
    assert read_public(path, val_fraction=0.25).counts() == {"train": 27, "val": 9, "test": 4}
    assert len(read_public(path, classes=["b"])) == 20
    bare = _write_csv(tmp_path / "bare.csv", ["path"], [[f"{n}.jpg"] for n in range(20)])
    assert read_public(bare).counts() == {"train": 19, "val": 1, "test": 0}


# Decoding.


@pytest.mark.parametrize(("suffix", "tolerance"), [("png", 0), ("jpg", 12), ("webp", 12)])
def test_each_format_decodes_to_its_pixels(tmp_path: Path, suffix: str, tolerance: int) -> None:
    _write(tmp_path / f"a.{suffix}")
    picture = decode(tmp_path / f"a.{suffix}", Preprocess((20, 24), None, (0, 0, 0), (1, 1, 1)))
    assert picture.dtype == np.uint8
    expected = np.asarray(_photo()).transpose(2, 0, 1).astype(int)
    assert np.abs(picture - expected).mean() <= tolerance
    assert np.abs(picture - expected[:, ::-1]).mean() > 20


@pytest.mark.parametrize(
    ("size", "resize", "crop"),
    [((40, 30), 24, (16, 20)), ((31, 57), 20, (20, 20)), ((60, 60), 17, (8, 9)), ((64, 48), None, (32, 32))],
)
def test_resize_and_crop_equal_torchvision_s(size: tuple[int, int], resize: int | None, crop: tuple[int, int]) -> None:
    image = _photo(3, size)
    steps = [transforms.Resize(resize)] if resize else []
    theirs = transforms.Compose([*steps, transforms.CenterCrop(crop)])(image)
    ours = Preprocess(crop, resize, (0, 0, 0), (1, 1, 1)).picture(image)
    assert np.array_equal(ours, np.asarray(theirs).transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(5, 7), (50, 9), (9, 50)])
@pytest.mark.parametrize("resize", [None, 10])
def test_an_image_smaller_than_the_crop_is_enlarged_to_cover_it(size: tuple[int, int], resize: int | None) -> None:
    white = Image.new("RGB", size, (255, 255, 255))
    picture = Preprocess((16, 24), resize, (0, 0, 0), (1, 1, 1)).picture(white)
    assert picture.shape == (3, 16, 24)
    assert picture.min() == 255  # a crop beyond the image would be black


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_the_exif_orientation_is_honoured(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    _write(path, exif=exif)
    size = (24, 20) if orientation > 4 else (20, 24)
    picture = decode(path, Preprocess(size, None, (0, 0, 0), (1, 1, 1)))
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).transpose(2, 0, 1)
        stored = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(picture, upright)
    assert (orientation == 1) == np.array_equal(picture, stored)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = _photo().convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes(range(256))  # Pillow warns on the straight way to RGB
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    picture = decode(path, Preprocess((20, 24), None, (0, 0, 0), (1, 1, 1)))
    assert picture.shape == (3, 20, 24)
    expected = np.asarray(_photo().convert(mode).convert("RGB")).transpose(2, 0, 1).astype(int)
    assert np.abs(picture - expected).mean() < 8


def test_16_bit_grey_is_scaled_and_not_cut_off(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    picture = decode(tmp_path / "a.png", PLAIN)
    assert np.abs(picture[0] - ramp / 257).max() <= 0.5
    assert len(np.unique(picture)) > 200


def _png_of_a_bomb() -> bytes:
    """A PNG whose header says 10000 × 10000 pixels, more than Pillow warns at and less than it refuses."""
    blob = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(blob, "PNG")
    return blob.getvalue()


def _broken_files() -> dict[str, tuple[bytes, str]]:
    blobs = {}
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        blob = io.BytesIO()
        _photo().save(blob, kind)
        blobs[kind] = blob.getvalue()
    return {
        "empty.jpg": (b"", "not a JPEG"),
        "text.png": (b"hello", "not a JPEG"),
        "renamed.jpg": (blobs["BMP"], "not a JPEG"),
        "half.jpg": (blobs["JPEG"][: len(blobs["JPEG"]) // 2], ""),
        "half.png": (blobs["PNG"][: len(blobs["PNG"]) // 2], ""),
        "half.webp": (blobs["WEBP"][: len(blobs["WEBP"]) // 2], ""),
        "end.jpg": (blobs["JPEG"][:-40], "truncated"),
        "flipped.png": (blobs["PNG"][:60] + b"\0\0\0\0" + blobs["PNG"][64:], ""),
        "bomb.png": (_png_of_a_bomb(), "pixels"),
    }


@pytest.mark.parametrize("name", _broken_files())
def test_a_broken_file_is_an_image_error_with_its_name_and_reason(tmp_path: Path, name: str) -> None:
    content, reason = _broken_files()[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=rf"^{name}: .*{reason}") as caught:
        decode(tmp_path / name, PLAIN)
    assert str(tmp_path) not in str(caught.value)


def test_what_is_no_file_is_an_image_error(tmp_path: Path) -> None:
    for name in ("missing.jpg", "nul\0.jpg", "."):
        with pytest.raises(ImageError, match="no such file"):
            decode(tmp_path / name, PLAIN)


def test_damage_anywhere_raises_image_errors_only_and_no_warning(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    rng = np.random.default_rng(0)
    outcomes = Counter[str]()
    for kind in ("JPEG", "PNG", "WEBP"):
        blob = io.BytesIO()
        _photo().save(blob, kind, exif=exif)
        for _ in range(150):
            content = bytearray(blob.getvalue())
            content[rng.integers(min(len(content), 300))] = rng.integers(256)
            (tmp_path / "a.img").write_bytes(content)
            try:
                outcomes[str(decode(tmp_path / "a.img", PLAIN).shape)] += 1
            except ImageError:
                outcomes["bad"] += 1
    assert set(outcomes) == {"(3, 16, 16)", "bad"}


def test_decoding_leaves_the_warning_filters_as_they_were(tmp_path: Path) -> None:
    _write(tmp_path / "a.png")
    before = list(warnings.filters)
    decode(tmp_path / "a.png", PLAIN)
    assert list(warnings.filters) == before


def test_an_image_too_elongated_to_resize_is_bad_and_not_a_crash(tmp_path: Path) -> None:
    Image.new("L", (60_000, 1)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="too elongated"):
        decode(tmp_path / "a.png", Preprocess((256, 256), 256, (0, 0, 0), (1, 1, 1)))


# Preprocessing.


def test_all_inputs_give_the_same_network_input(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    _write(path)
    from_file = PLAIN([path, str(path)])
    pictures = torch.from_numpy(np.stack([PLAIN.picture(_photo())] * 2))
    for other in (PLAIN([_photo(), _photo()]), PLAIN(pictures), PLAIN.normalise(pictures.float() / 255)):
        assert torch.equal(from_file, other)
    assert torch.equal(PLAIN(str(path)), from_file[:1])
    assert from_file.dtype == torch.float32
    assert PLAIN([]).shape == (0, 3, 16, 16)
    with pytest.raises(ImageError, match=r"expected pictures \(N, 3, 16, 16\)"):
        PLAIN(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_normalise_uses_each_channel_s_mean_and_std() -> None:
    preprocess = Preprocess((8, 8), None, (0.1, 0.2, 0.3), (1, 2, 4))
    values = preprocess.normalise(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8))[0, :, 0, 0]
    assert values.tolist() == pytest.approx([0.9, 0.4, 0.175])


def test_values_out_of_bounds_are_refused() -> None:
    fields = {"size": (16, 16), "resize": None, "mean": (0, 0, 0), "std": (1, 1, 1)}
    assert Preprocess(**fields).size == (16, 16)
    for change in (
        {"size": (4, 16)},
        {"size": (16, 5000)},
        {"resize": 4},
        {"resize": True},
        {"resize": 20.5},
        {"mean": (0, 0, 2)},
        {"mean": ("0", 0, 0)},
        {"std": (1, 1, 0)},
        {"std": (1, 1, float("nan"))},
    ):
        with pytest.raises(ImageError, match="preprocessing: expected"):
            Preprocess(**{**fields, **change})


def test_public_images_have_the_labels_of_their_folders_where_all_have_one(tmp_path: Path) -> None:
    for place in ("train/cat", "train/dog", "test/cat"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "one.png")
    table = read_public(tmp_path)
    labels = {path: table.classes[target] for path, target in zip(table.paths, table.targets, strict=True)}
    assert labels == {"train/cat/one.png": "cat", "train/dog/one.png": "dog", "test/cat/one.png": "cat"}
    assert read_public(tmp_path, classes=["dog", "cat"]).classes == ("dog", "cat")
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "nobody's.png")
    bare = read_public(tmp_path)
    assert bare.classes == ()
    assert not bare.targets.any()
