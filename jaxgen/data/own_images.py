"""A person's own images in the form that a run's data have: from files, folders, arrays or images of PIL.

    images = OwnImages('image', 'photos', (32, 32, 3), config.data)
    len(images), images.take(np.arange(4))  # 12, uint8 [4, 32, 32, 3]

They go through the same functions as the data: transforms.load (the mode, EXIF rotation, transparency), fitted to the
model's size by transforms.fit, data.binarise. Only data.box is left out, which is in pixels of the data's own files. A
file may come from a stranger: it is read as those of folder:PATH are, regular files of formats without programs, and
data.max_pixels is held before decoding.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxgen.data import folder, loader, sources, transforms
from jaxgen.errors import RunError, UserError

BINARISED = ('image', loader.OTHER, 'reference')  # what data.binarise is of
AT_ONCE = 64  # files that are decoded before any of them is kept or dropped


class Item(NamedTuple):
    """One image, not decoded yet."""

    content: Any  # path, encoded bytes, array [h, w], [h, w, c], or image of PIL
    path: str = ''  # of its file, as the person wrote it; '': it is none
    listed: bool = False  # in a folder that the person named: may be left out where it cannot be read


class Decoded(NamedTuple):
    pixels: np.ndarray  # uint8 [H, W, C], as the model's
    size: tuple[int, int]  # width, height before
    digest: str  # SHA-256 of the file; '' of what is none


class OwnImages:
    """Images for one feature of a batch: `len(images)`, and `images.take(numbers)`, uint8 [n, H, W, C]; of a single
    one as many as wanted.

    All are decoded at once, so that every mistake comes before any computing; they are kept where they fit into
    data.cache_mb, and decoded again else.

    Attributes:
      paths: of their files, '' of what is none.
      sizes: (width, height) before they were brought to the model's.
      digests: SHA-256 of the files.
      left_out: one line of what a folder holds that cannot be read; ''.
      doubts: lines about what was read and may not be what the person means.

    Raises:
      UserError: no such file, not an image, an array of other axes, channels or range; a folder of which nothing can be
        read. Of other folders the unreadable files are left out.
    """

    def __init__(
        self,
        feature: str,
        value,
        shape: tuple[int, ...],
        section,
        binary: bool = False,
        border: tuple[int, int, int, int] = (0, 0, 0, 0),
    ):
        """
        Args:
          feature: its name; where it holds 'mask', images of 0 and 1 are of black and white.
          value: path of a file or folder, encoded bytes, an array [h, w], [h, w, c] or [n, h, w, c], an image of PIL;
            or a list of these.
          shape: (H, W, C) of the feature.
          section: the section `data` of the run's config.
          binary: pixels become black or white, the brighter half white.
          border: pixels that each image gets at its left, top, right and bottom, like those at its edge, before it is
            brought to the model's size; the result must have the model's aspect ratio.
        """
        self.feature, self.shape, self.section, self.border = feature, tuple(shape), section, border
        bits = 'threshold' if binary else section['binarise'] if feature in BINARISED else 'none'
        self.bits = functools.partial(transforms.binarised, how=bits) if bits != 'none' else None
        self.palette = section['source'].startswith('pairs:') and bool(sources.CLASS_MAPS.search(feature))
        given = list(items(feature, value))
        if not given:
            raise UserError(f'condition {feature}: an empty list; name one image at least')
        self.items: list[Item] = []
        self.sizes: list[tuple[int, int]] = []
        self.digests: list[str] = []
        self.kept: list[np.ndarray] | None = []
        self.doubts: list[str] = []
        failures: list[tuple[Item, Exception]] = []
        with ThreadPoolExecutor(min(loader.number_of_threads(section['threads']), len(given))) as pool:
            for start in range(0, len(given), AT_ONCE):
                part = given[start : start + AT_ONCE]
                for item, decoded in zip(part, pool.map(self.try_decode, part), strict=True):
                    if isinstance(decoded, Exception):
                        failures.append((item, decoded))
                    else:
                        self.add(item, decoded)
        self.left_out = self.judge(failures, len(given))
        if any(is_unit(item.content) for item in self.items) and 'mask' not in feature:
            self.doubts.append(
                f'{feature}: its real numbers, from 0 to 1, are read as the brighter half of [-1, 1]; of an image x in '
                '[0, 1] give 2 x - 1'
            )

    def add(self, item: Item, decoded: Decoded) -> None:
        self.items.append(item)
        self.sizes.append(decoded.size)
        self.digests.append(decoded.digest)
        if 'mask' in self.feature and decoded.pixels.max() < 128:
            self.doubts.append(f'{item.path or self.feature}: no pixel of this mask is white')
        if len(self.items) * decoded.pixels.size > self.section['cache_mb'] * 2**20:
            self.kept = None
        if self.kept is not None:
            self.kept.append(decoded.pixels)

    def judge(self, failures: list[tuple[Item, Exception]], n: int) -> str:
        """The line of what is left out.

        Raises:
          UserError: it is all, or what the person named by itself.
        """
        for item, error in failures:
            if isinstance(error, UserError):
                raise error
            if not item.listed or len(failures) == n:
                where = item.path or 'an image'
                if isinstance(error, FileNotFoundError):
                    raise UserError(f'condition {self.feature}: there is no file {where}') from error
                of_all = f'; none of the {n} images of that folder can' if item.listed and n > 1 else ''
                raise UserError(
                    f'condition {self.feature}: {where} cannot be read as an image ({reason(error)}){of_all}'
                ) from error
        if not failures:
            return ''
        some = ', '.join(f'{item.path}: {reason(error)}' for item, error in failures[:3])
        more = ', ...' if len(failures) > 3 else ''
        return f'{self.feature}: left out {len(failures)} of {n} files, which cannot be read as images ({some}{more})'

    def __len__(self) -> int:
        return len(self.items)

    @property
    def paths(self) -> list[str]:
        return [item.path for item in self.items]

    def take(self, numbers: np.ndarray) -> np.ndarray:
        images = self.grey(numbers)
        return self.bits(images) if self.bits else images

    def grey(self, numbers: np.ndarray) -> np.ndarray:
        """As `take`, before pixels become bits."""
        return np.stack([self.one(int(i) % len(self)) for i in numbers])

    def one(self, i: int) -> np.ndarray:
        if self.kept is not None:
            return self.kept[i]
        decoded = self.try_decode(self.items[i])
        if isinstance(decoded, Exception) or decoded.digest != self.digests[i]:
            raise RunError(f'{self.items[i].path} has changed since it was read first')
        return decoded.pixels

    def try_decode(self, item: Item) -> Decoded | Exception:
        """The image, or why it is none: PIL's plugins raise anything."""
        try:
            return self.decode(item)
        except Exception as e:
            return e

    def decode(self, item: Item) -> Decoded:
        content, channels, digest = item.content, self.shape[-1], ''
        most, mask = self.section['max_pixels'], 'mask' in self.feature
        if isinstance(content, np.ndarray):
            pixels = to_pixels(self.feature, content, mask)
            if pixels.shape == self.shape and not any(self.border):
                return Decoded(pixels, (pixels.shape[1], pixels.shape[0]), digest)
            image = transforms.from_array(pixels, channels)
        elif isinstance(content, Image.Image):
            transforms.check_pixels(content.size, most)
            image = transforms.decoded(content.copy(), channels, self.palette)
        else:
            encoded = content if isinstance(content, bytes) else folder.read_file(content, most)
            digest = hashlib.sha256(encoded).hexdigest()
            image = transforms.load(encoded, channels, most, self.palette)
        if mask and image.mode != 'P' and np.max(image.getextrema()) == 1:
            image = image.point([0] + [255] * 255) if image.mode == 'L' else image.point(([0] + [255] * 255) * 3)
        if any(self.border):
            image = extended(self.feature, image, self.border, self.shape, most)
        return Decoded(fitted(image, self.shape), image.size, digest)

    def note(self) -> str:
        """One line of what was done to the images' size: 'photo.png: 640 x 480, its central square resized to
        32 x 32'; '' where it was the model's."""
        height, width = self.shape[:2]
        if all(size == (width, height) for size in self.sizes):
            return ''
        part = 'square' if height == width else 'part'
        cut = any(w * height != h * width for w, h in self.sizes)
        low, high = (f'{size[0]} x {size[1]}' for size in (min(self.sizes), max(self.sizes)))
        sizes = low if low == high else f'{low} to {high}'
        if len(self) == 1:
            what, whose = self.paths[0] or self.feature, f'its central {part} '
        else:
            what, whose = f'{self.feature}: {len(self)} images', f'their central {part}s '
        return f'{what}{"," if len(self) > 1 else ":"} {sizes}, {whose if cut else ""}resized to {width} x {height}'


def extended(
    feature: str, image: Image.Image, border: tuple[int, int, int, int], shape: tuple[int, ...], most: int
) -> Image.Image:
    """The image on a larger canvas, see `OwnImages`.

    Raises:
      UserError: the canvas has more than `most` pixels, or another aspect ratio than the model's images.
    """
    left, top, right, bottom = border
    width, height = image.width + left + right, image.height + top + bottom
    transforms.check_pixels((width, height), most)
    if round(width * shape[0] / height) != shape[1]:
        raise UserError(
            f'condition {feature}: its canvas would be {width} x {height} pixels, and the model draws '
            f'{shape[1]} x {shape[0]}: choose borders with which {image.width} x {image.height} get that aspect ratio'
        )
    pixels = np.asarray(image)
    axes = [(top, bottom), (left, right)] + [(0, 0)] * (pixels.ndim - 2)
    return Image.fromarray(np.pad(pixels, axes, 'edge'))


def reason(error: Exception) -> str:
    text = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    return text.partition(' <')[0][:200] or type(error).__name__  # PIL names an object in memory


def items(feature: str, value) -> Iterator[Item]:
    """The images that a value names, in order; those of a folder by their paths below it.

    Raises:
      UserError: it names none.
    """
    if isinstance(value, str | os.PathLike):
        path = os.path.expanduser(os.fsdecode(value))
        if not path:
            raise UserError(f'condition {feature}: name a file or a folder')
        if '://' in path and not os.path.exists(path):
            raise UserError(f'condition {feature}: {path} is an address; name a file or folder of this machine')
        if os.path.isdir(path):
            yield from folder_items(feature, path)
        else:
            yield Item(path, path)
    elif isinstance(value, bytes | Image.Image):
        yield Item(value)
    elif isinstance(value, list | tuple) and not is_number(first_leaf(value)):
        for one in value:
            yield from items(feature, one)
    else:
        yield from array_items(feature, value)


def folder_items(feature: str, path: str) -> Iterator[Item]:
    try:
        files = folder.image_files(os.path.realpath(path), True, Counter())
    except UserError as e:
        raise UserError(f'condition {feature}: {str(e).removeprefix("config.data.source: ")}') from e
    for file in files:
        full = os.path.join(path, file.path)
        yield Item(full, full, listed=True)


def array_items(feature: str, value) -> Iterator[Item]:
    try:
        x = np.asarray(value)
    except Exception as e:  # rows of different lengths, an array on another device
        raise UserError(f'condition {feature}: no array can be made of it ({reason(e)})') from e
    if x.dtype.kind not in 'buif':
        raise UserError(
            f'condition {feature} must be paths, arrays or images of PIL, one or a list of them; it is a '
            f'{type(value).__name__}'
        )
    if x.ndim == 4:
        yield from (Item(one) for one in x)
    else:
        yield Item(x)


def is_unit(content) -> bool:
    """Whether an array's values are in [0, 1], which most libraries have and images here have not."""
    return isinstance(content, np.ndarray) and content.dtype.kind == 'f' and content.min() >= 0


def first_leaf(value):
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value


def is_number(value) -> bool:
    return isinstance(value, int | float | np.number | np.bool_)


def to_pixels(feature: str, x: np.ndarray, mask: bool) -> np.ndarray:
    """uint8 [h, w, c], c = 1, 3 or 4, of an array of uint8, of bool, or of real numbers in [-1, 1].

    Args:
      mask: arrays of 0 and 1, and of real numbers from 0 to 1, go from black to white.

    Raises:
      UserError: it has other axes, channels, types or values.
    """
    name = f'condition {feature}'
    if x.ndim == 2:
        x = x[..., None]
    if x.ndim != 3 or x.shape[-1] not in (1, 3, 4) or 0 in x.shape:
        raise UserError(
            f'{name}: an array of shape {x.shape}; it must be [height, width], [height, width, channels] or '
            '[n, height, width, channels] with 1, 3 or 4 channels, which come last'
        )
    if x.dtype == bool:
        return x.astype(np.uint8) * 255
    if x.dtype == np.uint8:
        return x * 255 if mask and x.max() <= 1 else x
    if x.dtype.kind != 'f':
        raise UserError(f'{name}: an array of {x.dtype}; it must be uint8, or real numbers in [-1, 1]')
    low, high = float(x.min()), float(x.max())
    if not (low >= -1 - 1e-5 and high <= 1 + 1e-5):  # false for NaN too
        raise UserError(
            f'{name}: real numbers must be in [-1, 1], from black to white; they go from {low:g} to {high:g} (images '
            'in 0..255 are uint8)'
        )
    x = x.astype(np.float64)
    unit = x if mask and low >= 0 else (x + 1) / 2
    return np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)


def fitted(image: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [H, W, C] of an image's largest central part in the aspect ratio of the shape."""
    height, width, channels = shape
    return transforms.to_array(transforms.fit(image, (height, width)), channels)


class Reduced:
    """Means of squares of own images, as the data's 'low_resolution' has them: `take` alone."""

    def __init__(self, images: OwnImages, height: int):
        self.images, self.height = images, height

    def __len__(self) -> int:
        return len(self.images)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        return np.stack([transforms.reduced(x, self.height) for x in self.images.grey(numbers)])
