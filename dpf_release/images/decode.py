"""How an image file becomes a picture and a network's input, and which files cannot."""

from __future__ import annotations

import contextlib
import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dpf_release.errors import ImageError

_FORMATS = ("JPEG", "PNG", "WEBP")
_EXIF_ORIENTATION = 0x0112
_TURN_NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_TURNS = dict(enumerate((Image.Transpose[name] for name in _TURN_NAMES.split()), start=2))  # by the orientation
_MAX_PIXELS = 2**26  # of a resized picture, before the crop


@dataclass(frozen=True)
class Preprocess:
    """How an image file becomes the input of a network; a part of the model's record.

    Attributes:
        size: (H, W) of the network's input, 8 to 4096 pixels.
        resize: length of the shorter side before the centre crop, 8 to 4096; None keeps the image's own.
        mean: per channel, for pixels in [0, 1].
        std: per channel, for pixels in [0, 1]; 0.001 to 10.

    Raises:
        ImageError: a value is out of its bounds.
    """

    size: tuple[int, int]
    resize: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        lengths = [*self.size, *([] if self.resize is None else [self.resize])]
        if len(self.size) != 2 or not all(type(length) is int and 8 <= length <= 4096 for length in lengths):
            raise ImageError(
                "preprocessing: expected a size of two whole numbers and a resize, each from 8 to 4096, "
                f"found size {self.size}, resize {self.resize}."
            )
        for name, values, low, high in (("mean", self.mean, 0, 1), ("std", self.std, 0.001, 10)):
            if len(values) != 3 or not all(isinstance(v, (int, float)) and low <= v <= high for v in values):
                raise ImageError(
                    f"preprocessing: expected three numbers from {low} to {high} as {name}, found {values}."
                )

    def picture(self, image: Image.Image) -> np.ndarray:
        """Returns the image as (3, H, W) uint8: upright by its EXIF orientation, RGB, resized, cropped.

        Equal to torchvision's `Resize` and `CenterCrop` on PIL images, but that an image which would not
        cover the crop is enlarged until it does. An alpha channel is ignored.

        Raises:
            ImageError: the image is so elongated that resizing its shorter side would exhaust the memory.
        """
        # Not ImageOps.exif_transpose: it writes the EXIF anew, and fails where that cannot be written.
        turn = _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
        image = _rgb(image)
        if turn is not None:
            image = image.transpose(turn)
        height, width = self.size
        if self.resize is not None:
            short, long = sorted(image.size)
            other = int(self.resize * long / short)  # rounded down, as torchvision does
            image = _resized(image, (self.resize, other) if image.width <= image.height else (other, self.resize))
        scale = max(width / image.width, height / image.height)
        if scale > 1:
            cover = max(width, round(image.width * scale)), max(height, round(image.height * scale))
            image = _resized(image, cover)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        pixels = np.asarray(image.crop((left, top, left + width, top + height)))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (H, W, 3) -> (3, H, W)

    def normalise(self, pictures: Tensor) -> Tensor:
        """Returns (N, 3, H, W) float32 network inputs from pictures: uint8, or floats in [0, 1]."""
        scaled = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()
        mean, std = (torch.tensor(v, device=pictures.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (scaled - mean) / std

    def __call__(self, images: Sequence[Image.Image | Path | str] | Image.Image | Path | str | Tensor) -> Tensor:
        """Returns (N, 3, H, W) float32 network inputs from images, files, or pictures (N, 3, H, W) uint8.

        Raises:
            ImageError: a file cannot be decoded, or a tensor is not of the network's input size.
        """
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, *self.size):
                raise ImageError(
                    f"expected pictures (N, 3, {self.size[0]}, {self.size[1]}) of uint8, found "
                    f"{tuple(images.shape)} of {images.dtype}. PIL images and files are resized."
                )
            return self.normalise(images)
        if isinstance(images, (Image.Image, Path, str)):
            images = [images]
        pictures = [self.picture(image) if isinstance(image, Image.Image) else decode(image, self) for image in images]
        stacked = np.stack(pictures) if pictures else np.empty((0, 3, *self.size), np.uint8)
        return self.normalise(torch.from_numpy(stacked))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion cuts off everything above 255.
        pixels = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB warns where the palette has alpha
    return image.convert("RGB")


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if size == image.size:
        return image
    if math.prod(size) > _MAX_PIXELS:
        raise ImageError(f"{image.width} × {image.height} pixels are too elongated to resize to {size[0]} × {size[1]}")
    return image.resize(size, Image.Resampling.BILINEAR)


# What Pillow's parsers let out on damaged files: there is no narrower common root.
_BROKEN: tuple[type[BaseException], ...] = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, MemoryError),
    *(struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning),
)


@contextlib.contextmanager
def strict_pillow() -> Iterator[None]:
    """Makes Pillow refuse bombs and be silent about the rest.

    The filters hold for all threads of the process: they are set around a pool's work, not in it, and name
    only Pillow's modules.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        yield


def picture_or_reason(path: Path, preprocess: Preprocess) -> np.ndarray | str:
    """Returns the picture, (3, H, W) uint8, or the reason that there is none."""
    try:
        if not path.is_file():
            return "there is no such file"
        with Image.open(path, formats=_FORMATS) as image:
            image.load()
            return preprocess.picture(image)
    except UnidentifiedImageError:  # Pillow's message has the whole path
        return "not a JPEG, PNG or WebP image"
    except ImageError as error:
        return str(error)
    except _BROKEN as error:
        return f"{(isinstance(error, OSError) and error.strerror) or error or type(error).__name__}"


def decode(path: Path | str, preprocess: Preprocess) -> np.ndarray:
    """Returns the picture of a JPEG, PNG or WebP file, (3, H, W) uint8, as `preprocess` wants it.

    Raises:
        ImageError: `NAME: reason`, for a file that is missing, damaged, too large, or of another format.
    """
    path = Path(path)
    with strict_pillow():
        found = picture_or_reason(path, preprocess)
    if isinstance(found, str):
        raise ImageError(f"{path.name}: {found}")
    return found
