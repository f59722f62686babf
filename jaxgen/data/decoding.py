"""From what a set stores of an image to the array that a batch holds: the same function in the process that trains and
in the processes that decode for it (workers.py). Neither jax nor a data set is imported here.

    x = prepared(png, Target('image', (32, 32, 3)), section, Crops())  # uint8 [32, 32, 3]
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image, features

from jaxgen.data import transforms
from jaxgen.sections import sides

VERSION = 1  # another one where the same file gives other pixels
# The fields of the section `data` that are read here.
FIELDS = ('box', 'size', 'crop_area', 'crop_aspect', 'jitter', 'fill', 'white', 'draft', 'max_pixels')


def version() -> str:
    """A text that is the same where the same files give the same pixels."""
    libraries = [features.version(name) for name in ('libjpeg_turbo', 'jpg', 'zlib', 'webp')]
    return f'{VERSION} Pillow {PIL.__version__} {libraries} {platform.machine()}'


class Crops(NamedTuple):
    """Random crops, translations and mirroring of training images; arrays with a leading [n], None: not at random."""

    cropped: np.ndarray | None = None  # bool: whether there is a random crop; None: of all
    position: np.ndarray | None = None  # of the part that is resized, in [0, 1), see transforms.fit
    rectangle: np.ndarray | None = None  # [n, tries, 4] in [0, 1), see transforms.rectangle
    row: np.ndarray | None = None  # position of the window in an image that is data.jitter pixels larger than it,
    column: np.ndarray | None = None  # in [0, 1)
    down: np.ndarray | None = None  # int: pixels by which the result is translated,
    right: np.ndarray | None = None
    mirrored: np.ndarray | None = None  # bool: left to right, at the end

    def one(self, n: int) -> Crops:
        """Those of example n, without the leading axis."""
        return Crops(*(None if x is None else x[n] for x in self))


class Target(NamedTuple):
    """An image feature as a batch holds it."""

    name: str
    shape: tuple[int, int, int]  # height, width, channels
    palette: bool = False  # see records.Feature


def prepared(stored: bytes | np.ndarray, target: Target, data: Mapping[str, Any], crop: Crops) -> np.ndarray:
    """The image uint8 `target.shape` of a file's bytes or of an array [H, W] or [H, W, C].

    Args:
      data: the section `data` of a config, or its FIELDS.
      crop: of this one.

    Raises:
      UserError: data.box does not lie in it.
      Exception: of any kind where it is damaged.
    """
    channels = target.shape[2]
    options, reduction = (channels, data['max_pixels'], target.palette), None
    if isinstance(stored, np.ndarray):
        image = transforms.from_array(stored, channels)
    elif data['draft']:
        image, reduction = transforms.load_reduced(stored, draft_size(data), *options)
    else:
        image = transforms.load(stored, *options)
    if data['white'] < 255 and target.name in ('image', 'low_resolution'):
        image = transforms.brightened(image, data['white'])
    x = cropped(transforms.cut(image, data['box']), data, crop, channels, reduction)
    if crop.down is not None:
        x = transforms.moved(x, int(crop.down), int(crop.right), data['fill'])
    x = transforms.reduced(x, target.shape[0])
    return x if crop.mirrored is None or not crop.mirrored else transforms.mirrored(x)


def draft_size(data: Mapping[str, Any]) -> int:
    """Pixels that the shorter side of an image keeps at least where JPEG files are decoded at a part of their size."""
    return data['draft'] * (max(sides(data['size'])) + data['jitter'])


def cropped(
    image: Image.Image,
    data: Mapping[str, Any],
    crop: Crops,
    channels: int,
    reduction: transforms.Reduction | None = None,
) -> np.ndarray:
    """The crop of the image as uint8 [*size, C], resized.

    Args:
      reduction: that the image is of a larger one.
    """
    height, width = size = sides(data['size'])
    at_random = crop.cropped is None or bool(crop.cropped)
    if crop.rectangle is not None and at_random:
        ranges = tuple(data['crop_area']), tuple(data['crop_aspect'])
        box = transforms.rectangle(image.height, image.width, *ranges, crop.rectangle)
        part = transforms.cut(image, box).resize((width, height), Image.Resampling.BICUBIC)
        return transforms.to_array(part, channels)
    position = crop.position if at_random else None
    if crop.row is None:
        return transforms.to_array(transforms.fit(image, size, position, reduction), channels)
    larger = height + data['jitter'], width + data['jitter']
    # A window of the whole image, where the part would be anywhere; of its middle else.
    fit = functools.partial(transforms.fit, position=None) if position is None else transforms.cover
    image = fit(image, larger, reduction=reduction)
    return transforms.to_array(transforms.window(image, size, crop.row, crop.column), channels)
