"""Picture grids. They show S or its reconstructions: they go into the vault, never into a release."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP, LABEL_WIDTH, TILE = 4, 80, 96


def draw_grid(rows: Mapping[str, Tensor]) -> bytes:
    """A PNG with a row for each label's (N, 3, H, W) pictures in [0, 1]; small ones are larger, pixel by pixel."""
    columns = max(len(pictures) for pictures in rows.values())
    height, width = next(iter(rows.values())).shape[2:]
    zoom = max(1, round(TILE / height))
    tile_height, tile_width = height * zoom, width * zoom
    size = (LABEL_WIDTH + columns * (tile_width + GAP), len(rows) * (tile_height + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for line, (label, pictures) in enumerate(rows.items()):
        top = GAP + line * (tile_height + GAP)
        draw.text((GAP, top + tile_height // 2), label, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            pixels = (picture.cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()  # (H, W, 3)
            tile = Image.fromarray(np.ascontiguousarray(pixels))
            tile = tile.resize((tile_width, tile_height), Image.Resampling.NEAREST)
            sheet.paste(tile, (LABEL_WIDTH + column * (tile_width + GAP), top))
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    return file.getvalue()
