"""A folder as a source of images: `train/CLASS/*.jpg`, or `CLASS/*.jpg` without splits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from dpf_release.errors import ImageError
from dpf_release.images.table import SPLIT_NAMES, ImageTable, first_of, require_classes

_READ_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"}
# Other image formats are listed too: such a file becomes a reported bad image, not a missing one.
_OTHER_SUFFIXES = {".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".heic", ".heif", ".avif", ".jp2", ".jxl"}


def image_files(folder: Path) -> Iterator[str]:
    """Yields the sorted posix paths, relative to `folder`, of its image files; hidden ones never."""
    seen: set[Path] = set()  # of real folders: links are followed, but a link to a parent must not loop
    found = []
    suffixes = _READ_SUFFIXES | _OTHER_SUFFIXES
    for place, folders, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            seen.add(real)
            found += [Path(place, name) for name in names if not name.startswith(".")]
    yield from sorted(file.relative_to(folder).as_posix() for file in found if file.suffix.lower() in suffixes)


def read_folder(source: Path, classes: tuple[str, ...], earlier: tuple[str, ...]) -> ImageTable:
    """A labelled folder, its splits as far as it names them; arguments as of `read.read_table`."""
    paths = list(image_files(source))
    parts = [PurePosixPath(path).parts for path in paths]
    has_splits = any(entry.is_dir() and entry.name.lower() in SPLIT_NAMES for entry in source.iterdir())
    depth = 1 if has_splits else 0  # where the class folder stands
    stray = [
        path
        for path, names in zip(paths, parts, strict=True)
        if len(names) < depth + 2 or (has_splits and names[0].lower() not in SPLIT_NAMES)
    ]
    if stray:
        layout = "train/CLASS/IMAGE, val/CLASS/IMAGE, test/CLASS/IMAGE" if has_splits else "CLASS/IMAGE"
        raise ImageError(
            f"{source}: expected {layout}, found {len(stray)} images elsewhere, first {first_of(stray)}. "
            "Move them into a class folder, or out of the tree."
        )
    found = {names[depth] for names in parts}.union(earlier)
    names = classes or tuple(sorted(found))
    require_classes(source, names, found)
    index = {name: number for number, name in enumerate(names)}
    kept = [row for row, folders in enumerate(parts) if folders[depth] in index]
    splits = [SPLIT_NAMES[parts[row][0].lower()] if has_splits else "train" for row in kept]
    targets = np.array([index[parts[row][depth]] for row in kept], dtype=np.int64)
    return ImageTable(source, tuple(paths[row] for row in kept), targets, names, (), np.array(splits, "U5"), {})
