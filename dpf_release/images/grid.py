"""Picture grids. They show S or its reconstructions: they go into the vault, never into a release."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dpf_release.core.files import replacing

GAP, LABEL_WIDTH, TILE = 4, 80, 96


def write_grid(path: Path, rows: Mapping[str, Tensor]) -> None:
    """A PNG file; see `draw_grid`."""
    with replacing(path) as partial:
        partial.write_bytes(draw_grid(rows))


def draw_grid(rows: Mapping[str, Tensor]) -> bytes:
    """A PNG with one labelled row of pictures a key.

    Args:
        rows: label → (N, 3, H, W) pictures in [0, 1]; small ones are shown larger, pixel by pixel.
    """
    columns = max(len(pictures) for pictures in rows.values())
    height, width = next(iter(rows.values())).shape[2:]
    zoom = max(1, round(TILE / height))
    tile_height, tile_width = height * zoom, width * zoom
    size = (LABEL_WIDTH + columns * (tile_width + GAP), len(rows) * (tile_height + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for line, (label, pictures) in enumerate(rows.items()):
        top = GAP + line * (tile_height + GAP)
        draw.text((GAP, top + tile_height // 2), label, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            pixels = (picture.cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()  # (H, W, 3)
            tile = Image.fromarray(np.ascontiguousarray(pixels)).resize(
                (tile_width, tile_height), Image.Resampling.NEAREST
            )
            sheet.paste(tile, (LABEL_WIDTH + column * (tile_width + GAP), top))
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    return file.getvalue()
