"""From encoded bytes to a uint8 image of the requested size, and to [-1, 1] and back.

    image = to_array(fit(cut(load(png, channels=3), box=()), (64, 64)))

All of these are pure functions. Randomness comes in as numbers in [0, 1) that `uniform` makes
from (seed, example number), so what happens to an example does not depend on the batch, the
process or the thread that it lands in.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import re
import struct
import warnings
from typing import TYPE_CHECKING, NamedTuple

import einops
import numpy as np
from PIL import ExifTags, Image, ImageOps

from jaxgen.errors import UserError

if TYPE_CHECKING:
    import jax

# Streams of `uniform`: one per use, so that no two uses have the same numbers. 4 is in gaussians.py; a second source of
# images has the same ones plus OTHER.
FLIP, CROP, ORDER, ROW, COLUMN, OTHER = 1, 2, 3, 5, 6, 8
PAD, SHIFT, CROPPED, VALIDATION, BITS = (16, 17), (18, 19), 20, 21, 22
BLOCKS = 23
HELD_OUT, REPLACED = 7, 15  # these are of a source, whatever the seed is
CAPTION = 200  # beyond those of TRIES
TRIES = range(32, 32 + 10 * 16, 16)  # of a rectangle; each has four streams from there on

# What PIL may take a file for, whatever its name: decoders that read pixels and start no program. They are tried in
# this order, so the most frequent stand first; no two of these know their files by the same first bytes.
Image.init()
FORMATS = [
    name
    for name in (
        *('JPEG', 'PNG', 'WEBP', 'AVIF', 'BMP', 'DDS', 'DIB', 'GIF', 'ICNS', 'ICO', 'JPEG2000', 'PCX', 'PPM', 'PSD'),
        *('QOI', 'SGI', 'SUN', 'TGA', 'TIFF', 'XBM', 'XPM'),
    )
    if name in Image.OPEN
]
# Where a JPEG or PNG file says how the image is rotated.
ORIENTATIONS = ('exif', 'Raw profile type exif', 'xmp', 'XML:com.adobe.xmp')
# What PIL warns of, two lines for each file, `check_pixels` refuses or the person has allowed.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)
MAX_PIXELS = 2**26  # of an image, by default; decoding takes up to 16 bytes for each


def load(encoded: bytes, channels: int, max_pixels: int = MAX_PIXELS, palette: bool = False) -> Image.Image:
    """The image in a file's bytes, 8 bits, mode 'L' (channels 1) or 'RGB' (channels 3).

    Any mode that PIL reads: the first frame of an animation, rotated by its EXIF data; transparent
    pixels become white; 16-bit grey is scaled from 0..65535; float grey from 0..1, or from
    0..255 if anything is above 1. Colour becomes grey by Rec. 601 luma.

    Args:
      max_pixels: that the image may have. More are refused before any is decoded.
      palette: leave an image with a palette as it is, mode 'P', whose numbers are classes; see `to_array`.

    Raises:
      Exception: of any kind, as PIL's plugins do, when the bytes are damaged or no image.
    """
    return decoded(opened(encoded, max_pixels), channels, palette)


class Reduction(NamedTuple):
    """How an image that was decoded at a part of its size lies in its pixels, of which the last are cut off."""

    factor: int
    size: tuple[int, int]  # width and height in full
    left: float = 0.0  # pixels of the reduction that the image begins at
    top: float = 0.0

    def box(self, left: int, top: int, width: int, height: int) -> tuple[float, float, float, float]:
        """A part of the full image in pixels of the reduction: left, top, right, bottom."""
        x, y = (self.left + left / self.factor, self.top + top / self.factor)
        return x, y, x + width / self.factor, y + height / self.factor


def load_reduced(
    encoded: bytes, least: int, channels: int, max_pixels: int = MAX_PIXELS, palette: bool = False
) -> tuple[Image.Image, Reduction | None]:
    """(an image as `load` makes it, None), or a reduction of it and which: a JPEG file is decoded at 1/2, 1/4 or 1/8 of
    its size where its shorter side has `least` pixels then. That is a part of the work, and gives other pixels than
    reducing the whole image."""
    image = opened(encoded, max_pixels)
    width, height = image.size
    if image.format != 'JPEG' or not image.draft(None, (least, least)) or image.size == (width, height):
        return decoded(image, channels, palette), None
    factor = next(q for q in (2, 4, 8) if image.size == (-(-width // q), -(-height // q)))
    spare = image.width - width / factor, image.height - height / factor  # at the right and at the bottom
    orientation = 1
    with contextlib.suppress(Exception):
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    image = decoded(image, channels, palette)
    swapped = orientation in (5, 6, 7, 8)
    size, spare = ((height, width), spare[::-1]) if swapped else ((width, height), spare)
    left = spare[0] if orientation in (2, 3, 6, 7) else 0.0  # mirrored, so that they are at the left
    top = spare[1] if orientation in (3, 4, 7, 8) else 0.0
    return image, Reduction(factor, size, left, top)


def displayed_size(encoded: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of an image after the rotation of its EXIF data, by its header."""
    image = opened(encoded, max_pixels)
    with contextlib.suppress(Exception):
        if image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8):
            return image.height, image.width
    return image.size


def opened(encoded: bytes, max_pixels: int) -> Image.Image:
    """An image's file whose header has been read, and no pixel yet."""
    check_icon(encoded, max_pixels)
    if Image.MAX_IMAGE_PIXELS and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:  # PIL refuses more than twice this
        Image.MAX_IMAGE_PIXELS = max_pixels
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    check_pixels(image.size, max_pixels)
    return image


def decoded(image: Image.Image, channels: int, palette: bool) -> Image.Image:
    """What `load` makes of an opened file."""
    scale = key_scale(image)
    image.load()
    if image.format not in ('JPEG', 'PNG') or not image.info.keys().isdisjoint(
        ORIENTATIONS
    ):  # else nothing to look for
        with contextlib.suppress(Exception):  # damaged EXIF data is ignored; the pixels are there
            image = ImageOps.exif_transpose(image)
    key = image.info.get('transparency')
    if palette and image.mode == 'P':
        image.info.pop('transparency', None)
        return image
    if image.mode.startswith('I') or image.mode == 'F':
        x = np.asarray(image, np.float32)  # exact up to 2^24
        if not np.isfinite(x).all():
            raise ValueError('it has pixels that are not numbers')
        top = 65535 if image.mode.startswith('I') else 1 if x.max() <= 1 else 255
        grey = np.rint(np.clip(x / top, 0, 1) * 255).astype(np.uint8)
        if isinstance(key, int):  # a PNG's transparent value
            grey[x == key] = 255
        image = Image.fromarray(grey)
    elif image.has_transparency_data:
        if scale != 1 and key is not None:
            image.info['transparency'] = tuple(int(k * scale) for k in key) if type(key) is tuple else int(key * scale)
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    mode = 'L' if channels == 1 else 'RGB'
    return image if image.mode == mode else image.convert(mode)


def from_array(x: np.ndarray, channels: int) -> Image.Image:
    """The image uint8 [H, W] or [H, W, C], C = 1 (grey), 2 (grey and alpha), 3 or 4, as `load` gives it."""
    if x.dtype != np.uint8 or not (x.ndim == 2 or (x.ndim == 3 and 1 <= x.shape[2] <= 4)) or not x.size:
        raise ValueError(f'an array {x.dtype} {x.shape} is no image')
    image = Image.fromarray(np.ascontiguousarray(x[..., 0] if x.shape[2:] == (1,) else x))
    if image.mode in ('LA', 'RGBA'):
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('L' if channels == 1 else 'RGB')


def brightened(image: Image.Image, white: int) -> Image.Image:
    """The image with the pixel value `white` at 255, and those between 0 and it in proportion."""
    return image.point([min(round(255 * x / white), 255) for x in range(256)] * len(image.getbands()))


def check_icon(encoded: bytes, most: int) -> None:
    """Raises ValueError where a PNG or JPEG 2000 file within an icon has more pixels than `most`.

    The icon's own size does not bound theirs, and PIL may decode them in opening it.
    """
    if encoded[:4] in (b'\0\0\1\0', b'icns'):
        for header in re.finditer(b'(?s)(?:IHDR|ihdr)(.{8})', encoded):
            check_pixels(struct.unpack('>II', header[1]), most)


def check_pixels(size: tuple[int, ...], most: int) -> None:
    """Raises ValueError where an image of this size has more pixels than `most`."""
    if math.prod(size) > most:
        raise ValueError(f'its {size[0]} x {size[1]} pixels are more than config.data.max_pixels = {most}')


def key_scale(image: Image.Image) -> float:
    """What a PNG's transparent value is multiplied by to be in the 8 bits that PIL makes of pixels of other depths."""
    depth = image.tile[0][3] if image.format == 'PNG' and image.tile else ''
    return {'L;2': 255 / 3, 'L;4': 255 / 15, 'RGB;16B': 1 / 256}.get(depth, 1)


def cut(image: Image.Image, box: tuple[int, ...]) -> Image.Image:
    """The part (top, left, height, width) of the image; () is all of it."""
    if not box:
        return image
    top, left, height, width = box
    if min(top, left) < 0 or min(height, width) < 1 or top + height > image.height or left + width > image.width:
        raise UserError(
            f'config.data.box = {tuple(box)} (top, left, height, width) does not lie inside an image '
            f'of height {image.height} and width {image.width}'
        )
    return image.crop((left, top, left + width, top + height))


def fit(
    image: Image.Image,
    size: tuple[int, int],
    position: float | None = None,
    reduction: Reduction | None = None,
) -> Image.Image:
    """The largest part of the image in the aspect ratio of size = (height, width), a square for a square, resized to
    that.

    Args:
      position: where the part lies along the side of which some is left out, from 0 (top or left) to below 1 (bottom
        or right), all positions equally likely; None for the middle.
      reduction: that this image is, of another, whose part is taken.

    The filter is PIL's bicubic, whose support grows when it reduces, so that it does not alias:
    the one that FID is least upset by (Parmar et al. 2022, On Aliased Resizing and Surprising
    Subtleties in GAN Evaluation), and smooth when it enlarges.
    """
    height, width = size
    whole_width, whole_height = whole = reduction.size if reduction else image.size
    if whole_width * height > whole_height * width:  # some of its width is left out
        part = max(1, round(whole_height * width / height)), whole_height
    else:
        part = whole_width, max(1, round(whole_width * height / width))
    spare = (length - kept for length, kept in zip(whole, part, strict=True))
    left, top = (n // 2 if position is None else int(position * (n + 1)) for n in spare)
    if reduction:
        return image.resize((width, height), Image.Resampling.BICUBIC, reduction.box(left, top, *part))
    if part != image.size:
        image = image.crop((left, top, left + part[0], top + part[1]))
    return image if part == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def window(image: Image.Image, size: tuple[int, int], row: float, column: float) -> Image.Image:
    """size = (height, width) pixels of a larger image; row and column are its position, from 0 (top, left) to below
    1."""
    height, width = size
    left, top = int(column * (image.width - width + 1)), int(row * (image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def cover(image: Image.Image, size: tuple[int, int], reduction: Reduction | None = None) -> Image.Image:
    """The whole image, resized to no less than size = (height, width): one side is as long as there, the other is cut
    off to a whole number of pixels, as torchvision's Resize does.

    Args:
      reduction: as in `fit`.
    """
    height, width = size
    whole_width, whole_height = whole = reduction.size if reduction else image.size
    if whole_width * height > whole_height * width:
        to = height * whole_width // whole_height, height
    else:
        to = width, width * whole_height // whole_width
    if reduction:
        return image.resize(to, Image.Resampling.BICUBIC, reduction.box(0, 0, *whole))
    return image if to == image.size else image.resize(to, Image.Resampling.BICUBIC)


def rectangle(
    height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], u: np.ndarray
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random rectangle inside an image: its area is uniform in `area`, a fraction of
    the image's, the logarithm of its width / height uniform in that of `aspect`, its position uniform (Szegedy et al.
    2015, arXiv 1409.4842, section 6).

    Args:
      u: [tries, 4], each in [0, 1): area, aspect, row and column of each try; the first one that fits is taken. Where
        none does: the largest central one whose aspect is in the range.
    """
    for u_area, u_aspect, u_row, u_column in np.asarray(u, np.float64):
        size = height * width * (area[0] + u_area * (area[1] - area[0]))
        ratio = math.exp(math.log(aspect[0]) + u_aspect * math.log(aspect[1] / aspect[0]))
        w, h = round(math.sqrt(size * ratio)), round(math.sqrt(size / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u_row * (height - h + 1)), int(u_column * (width - w + 1)), h, w
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


def moved(x: np.ndarray, down: int, right: int, fill: str) -> np.ndarray:
    """An image [H, W, C] moved by whole pixels. fill: the padding beyond its border, 'reflect', mirrored at the
    outermost pixels, or 'edge', these again."""
    rows = np.arange(x.shape[0]) - down
    columns = np.arange(x.shape[1]) - right
    return x[padded_index(rows, x.shape[0], fill)[:, None], padded_index(columns, x.shape[1], fill)]


def padded_index(index: np.ndarray, n: int, fill: str) -> np.ndarray:
    """The indices, 0 to n - 1, of the pixels that padding puts at any indices, inside and beyond the border."""
    if fill == 'edge' or n == 1:
        return np.clip(index, 0, n - 1)
    around = index % (2 * n - 2)
    return np.minimum(around, 2 * n - 2 - around)


def to_array(image: Image.Image, channels: int = 1) -> np.ndarray:
    """uint8 [H, W, C], C = 1 or 3.

    Of an image with a palette, mode 'P': its colours where `channels` is 3 or the palette is grey; otherwise its
    numbers, since two colours may be of one grey.
    """
    if image.mode == 'P':
        colours = np.reshape(image.getpalette('RGB'), (-1, 3))
        if channels == 3 or (colours == colours[:, :1]).all():
            image = image.convert('RGB' if channels == 3 else 'L')
    x = np.asarray(image)
    return x[..., None] if x.ndim == 2 else x


def mirrored(x: np.ndarray) -> np.ndarray:
    """Images [..., W, C] left to right."""
    out = np.empty_like(x)
    for channel in range(x.shape[-1]):  # several times as fast as all at once
        out[..., channel] = x[..., ::-1, channel]
    return out


def reduced(x: np.ndarray, height: int) -> np.ndarray:
    """Means of equal squares of an image [H, W, C], uint8 [height, width, C]; their side H / height divides W too."""
    side = len(x) // height
    if side == 1:
        return x
    return np.rint(einops.rearrange(x, '(h p) (w q) c -> h w c p q', p=side, q=side).mean((-2, -1))).astype(np.uint8)


def binarised(images: np.ndarray, how: str, words: np.ndarray | None = None) -> np.ndarray:
    """Images uint8 [n, H, W, C] of black and white, 0 and 255; what is so already stays.

    The channels of a pixel have one threshold: grey stays grey.

    Args:
      how: 'threshold', at half; else bits with P(white) = x / 255 (Salakhutdinov & Murray 2008).
      words: uint64 [n], of each image's draw; None: those of the image itself, so that its bits are always the same,
        in whatever set, split or order it is.
    """
    if how == 'threshold':
        return np.where(images > 127, 255, 0).astype(np.uint8)
    words = np.array([content_word(x) for x in images], np.uint64) if words is None else words
    n, height, width, _ = images.shape
    noise = to_unit(mix(words[:, None] ^ mix(np.arange(height * width, dtype=np.uint64)))).reshape(n, height, width, 1)
    return np.where(noise * 255 < images, 255, 0).astype(np.uint8)


def content_word(x: np.ndarray) -> int:
    """A 64-bit integer that is the same for the same pixels."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(x), digest_size=8).digest(), 'little')


def uniform(seed: int, number, stream: int) -> np.ndarray:
    """A number in [0, 1) for each example number: float64, of number's shape.

    A pure function of (seed, number, stream), see `words`.
    """
    return to_unit(words(seed, number, stream))


def words(seed: int, number, stream: int) -> np.ndarray:
    """A uint64 for each example number, of number's shape: the finaliser of SplitMix64 (Steele, Lea, Flood 2014, Fast
    Splittable Pseudorandom Number Generators, figure 17), once for each of the three."""
    x = np.asarray(number).astype(np.uint64)
    for word in (seed, stream):
        x = mix(x ^ mix(np.uint64(word)))
    return x


def to_unit(x: np.ndarray) -> np.ndarray:
    """uint64 to float64 in [0, 1)."""
    return (x >> np.uint64(11)) * 2.0**-53


def mix(x: np.ndarray) -> np.ndarray:
    """Scrambles uint64s, one to one."""
    with np.errstate(over='ignore'):  # arithmetic modulo 2^64 is meant
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def to_float(image: jax.Array) -> jax.Array:
    """uint8 0..255 to float32 in [-1, 1], any shape."""
    import jax.numpy as jnp  # not above: processes that decode (workers.py) do without it

    return image.astype(jnp.float32) / 127.5 - 1


def to_uint8(image: jax.Array) -> jax.Array:
    """Float in [-1, 1] to uint8 0..255, any shape; what lies outside is clipped."""
    import jax.numpy as jnp

    return jnp.clip(jnp.round((image + 1) * 127.5), 0, 255).astype(jnp.uint8)
