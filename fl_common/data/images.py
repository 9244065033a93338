"""Image files and bytes to uint8 arrays."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fl_common.data.errors import DataError

Encoded = tuple[str, bytes | Path]
"""An image not yet decoded: its name in messages, and its bytes or its file."""

_BLOCK = 256
_GREY = {"1", "L", "LA"}
_COLOUR = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class Frame:
    """What every image becomes.

    mode: "RGB" or "L" (one channel); images of any other 8-bit mode are converted.
    resize: bring the shorter side to `size` and cut the centre out, as ImageNet's evaluation
        does; otherwise an image of another size than (height, width) is an error.
    """

    mode: str
    height: int
    width: int
    resize: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3 if self.mode == "RGB" else 1, self.height, self.width)


def survey(images: Iterable[Encoded], image_size: int) -> Frame:
    """The frame for images of unknown size, from their headers: L only if all are greyscale.

    Raises DataError if sizes differ and `image_size` is 0.
    """
    first, colour = None, False
    for name, data in images:
        with _opened(name, data) as image:
            colour = colour or image.mode not in _GREY
            first = first or (name, image.size)
            if not image_size and image.size != first[1]:
                raise DataError(
                    f"{first[0]} is {_by(first[1])} and {name} is {_by(image.size)}; set "
                    "data.image-size to bring all images to one size"
                )
    if first is None:
        raise DataError("there is no image; check the path")
    width, height = (image_size, image_size) if image_size else first[1]
    return Frame("RGB" if colour else "L", height, width, resize=image_size > 0)


def decode(images: Iterable[Encoded], frame: Frame) -> Iterator[np.ndarray]:
    """Blocks (k, C, H, W) uint8 of the images in order."""
    rows: list[np.ndarray] = []
    for name, data in images:
        rows.append(_pixels(name, data, frame))
        if len(rows) == _BLOCK:
            yield np.stack(rows)
            rows = []
    if rows:
        yield np.stack(rows)


def _pixels(name: str, data: bytes | Path, frame: Frame) -> np.ndarray:
    with _opened(name, data) as image:
        image = image.convert(frame.mode)
        if frame.resize:
            image = _fit(image, frame)
        elif image.size != (frame.width, frame.height):
            expected = _by((frame.width, frame.height))
            raise DataError(f"{name} is {_by(image.size)}, expected {expected}; check the data set")
        return np.asarray(image).reshape(frame.height, frame.width, -1).transpose(2, 0, 1)


def _fit(image: Image.Image, frame: Frame) -> Image.Image:
    """torchvision's Resize(size) and CenterCrop(size) on PIL images: bilinear, antialiased."""
    size, (width, height) = frame.height, image.size
    short = min(width, height)
    width, height = size * width // short, size * height // short
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


@contextmanager
def _opened(name: str, data: bytes | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(data if isinstance(data, Path) else io.BytesIO(data)) as image:
            if image.mode not in _GREY | _COLOUR:
                raise DataError(f"{name} has mode {image.mode}; convert it to 8 bits per channel")
            yield image
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is not a readable image: {error}; replace or remove it") from error


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"
