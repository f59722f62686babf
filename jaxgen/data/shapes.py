"""Simple scenes, drawn at any size, with the factors that generate them.

    factors = draw_factors(number=3)
    scene = draw(factors, size=64)
    scene.image, scene.mask, scene.edges  # the image, the mask of the shape, and its outline
    print(caption(factors))  # a small cyan heart on a beige background

A scene is one shape on a plain background. Seven factors of variation generate it (`FACTORS`); each is
drawn on its own, all values equally likely, so that what a model learns of one factor cannot be
read off another (as in dSprites, Matthey et al. 2017). Scene `number` is a pure function of that number.
"""

from __future__ import annotations

import colorsys
import functools
import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from jaxgen.data.transforms import uniform
from jaxgen.sections import sides

SHAPES = ('circle', 'square', 'triangle', 'star', 'cross', 'ring', 'heart', 'crescent')
COLOURS = {  # hue in [0, 1), saturation, value
    'red': (0.0, 0.85, 0.9),
    'orange': (0.08, 0.95, 1.0),
    'yellow': (0.15, 0.9, 1.0),
    'green': (0.36, 0.8, 0.75),
    'cyan': (0.5, 0.75, 0.95),
    'blue': (0.6, 0.85, 0.95),
    'purple': (0.77, 0.7, 0.85),
    'pink': (0.92, 0.5, 1.0),
}
# Pale, dark or grey, so that every colour is visible on every one of them.
BACKGROUNDS = {
    'white': (0.0, 0.0, 1.0),
    'gray': (0.0, 0.0, 0.55),
    'black': (0.0, 0.0, 0.08),
    'beige': (0.11, 0.22, 0.92),
    'brown': (0.06, 0.6, 0.35),
    'olive': (0.17, 0.6, 0.4),
    'navy': (0.64, 0.75, 0.35),
    'lavender': (0.7, 0.2, 0.93),
}
SIZES = {'small': 0.16, 'medium': 0.23, 'large': 0.3}  # radius over the image's width
# Name of each factor and the number of its values, in the order of the array `factors`.
FACTORS = {
    'shape': len(SHAPES),
    'colour': len(COLOURS),
    'size': len(SIZES),
    'x': 8,
    'y': 8,
    'rotation': 12,
    'background': len(BACKGROUNDS),
}
NAMES = {
    'shape': SHAPES,
    'colour': tuple(COLOURS),
    'size': tuple(SIZES),
    'background': tuple(BACKGROUNDS),
}  # of the values of factors
CAPTIONED_FACTORS = tuple(NAMES)  # a caption states their values
# The shape is coloured all over; along its border only; or all over, and in the middle of every image.
STYLES = ('filled', 'outlined', 'centred')
# A shape that no such scene shows, with the word for it in captions: a new object to fine-tune on.
NEW = {'hourglass': 'zig'}
FEW = 5  # scenes of it to train on
MIDDLE = 4  # the value of x and y, of 8, that is nearest to the middle
BORDER = 0.065  # width of the border over the image's width
CAPTION = 64  # bytes
FINER, FINEST = 4, 256  # drawn at 4 times the size, and at 256 pixels at least, then averaged


class Scene(NamedTuple):
    """One scene and its annotations, uint8."""

    image: np.ndarray  # [height, width, 3]
    mask: np.ndarray  # [height, width], how much of each pixel the shape covers, 0..255
    edges: np.ndarray  # [height, width], the same of the shape's outline, a line of one pixel's width
    segments: np.ndarray  # [height, width, 3], the segmentation map: see `segment_colours`
    sketch: np.ndarray  # [height, width, 3], the outline on the background, in the colours of that map


def draw_factors(number: int, style: str = 'filled') -> np.ndarray:
    """Factors int32 [7] of scene `number`, independent and uniform; x and y of 'centred' are always MIDDLE, and the
    shape of a scene of NEW is len(SHAPES), none of them."""
    counts = np.array(list(FACTORS.values()))
    factors = (uniform(0, np.arange(len(counts)), stream=number) * counts).astype(np.int32)
    if style == 'centred':
        factors[[list(FACTORS).index(name) for name in 'xy']] = MIDDLE
    if style in NEW:
        factors[list(FACTORS).index('shape')] = len(SHAPES)
    return factors


def named(factors: np.ndarray) -> dict[str, int]:
    """{factor: value} from int [7]."""
    return dict(zip(FACTORS, map(int, factors), strict=True))


def caption(factors: np.ndarray, style: str = 'filled') -> str:
    """English for the factors that have names, at most 64 bytes."""
    f = named(factors)
    size, colour, background = list(SIZES)[f['size']], list(COLOURS)[f['colour']], list(BACKGROUNDS)[f['background']]
    article = 'an' if background[0] in 'aeiou' else 'a'
    return f'a {size} {colour} {NEW.get(style) or SHAPES[f["shape"]]} on {article} {background} background'


def encode_caption(text: str) -> np.ndarray:
    """UTF-8 bytes, uint8 [64], zeros behind the text."""
    return np.frombuffer(text.encode().ljust(CAPTION, b'\0'), np.uint8)


def decode_caption(x: np.ndarray) -> str:
    """The text in uint8 [64]."""
    return bytes(x).rstrip(b'\0').decode()


def rotation(angle: float) -> np.ndarray:
    """The matrix [2, 2] that rotates points [n, 2] (x right, y down) clockwise: points @ rotation(angle)."""
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def outline(shape: str) -> list[np.ndarray]:
    """Polygons [n, 2] (x right, y down) inside the unit circle: the first is filled, the others are holes."""

    def arc(start, stop, n=72):
        angle = np.linspace(start, stop, n) * 2 * np.pi
        return np.stack([np.cos(angle), np.sin(angle)], -1)

    def corners(n):
        return arc(-0.25, 0.75, n + 1)[:-1]

    if shape == 'circle':
        return [arc(0, 1)]
    if shape == 'ring':
        return [arc(0, 1), 0.55 * arc(0, 1)]
    if shape == 'square':
        return [0.95 * arc(-0.125, 0.875, 5)[:-1]]
    if shape == 'triangle':
        return [corners(3)]
    if shape == 'star':
        return [corners(10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]]
    if shape == 'cross':
        w = 0.3
        quarter = np.array([[w, -0.95], [w, -w], [0.95, -w]])
        return [np.concatenate([quarter @ rotation(a) for a in np.arange(4) * np.pi / 2])]
    if shape == 'hourglass':
        half = np.array([[0.12, 0.0], [0.7, 0.95], [-0.7, 0.95]])
        return [np.concatenate([half, -half])]
    if shape == 'heart':
        a = np.linspace(0, 2 * np.pi, 72)
        x = 16 * np.sin(a) ** 3
        y = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)
        return [np.stack([x, -y - 2.5], -1) / 17]
    return [arc(0, 1), np.array([0.45, -0.0]) + 0.85 * arc(0, 1)]  # crescent


OUTLINES = {shape: outline(shape) for shape in (*SHAPES, *NEW)}


def segment_colours(factors: np.ndarray) -> np.ndarray:
    """Colours of the background and of the shape in a segmentation map, uint8 [2, 3]. Each of the 16 segment classes (8
    colours of the background, then 8 of the shape) has one of its own: the digits of its number in base 3."""
    f = named(factors)
    number = np.array([f['background'], len(BACKGROUNDS) + f['colour']])
    return (number[:, None] // np.array([9, 3, 1]) % 3 * 127).astype(np.uint8)


def falling_light(height: int) -> np.ndarray:
    """Brightness of the background, [height, 1, 1]: a little darker towards the floor."""
    return 1 - 0.12 * np.linspace(0, 1, height)[:, None, None]


def draw(factors: np.ndarray, size: int | tuple[int, int], style: str = 'filled') -> Scene:
    """The scene in one of STYLES, or of the shape of NEW that is named in its place: a square of this side or (height,
    width) in pixels; the shape is as large as its shorter side has it. All but the image is the same in all styles.

    A 'centred' scene has its shape where x and y of its factors are: see draw_factors."""
    f = named(factors)
    height, width = sides(size)
    shorter = min(height, width)
    radius = list(SIZES.values())[f['size']]
    # Centres with which the largest shape lies wholly inside, the same for all sizes: factors stay independent.
    low, high = max(SIZES.values()) + 0.02, 1 - max(SIZES.values()) - 0.02
    centre = low + (high - low) * np.array([f['x'] / (FACTORS['x'] - 1), f['y'] / (FACTORS['y'] - 1)])
    rotated = rotation(2 * np.pi * f['rotation'] / FACTORS['rotation'])
    finer = max(FINER, FINEST // shorter)
    polygons = []
    for polygon in OUTLINES[style if style in NEW else SHAPES[f['shape']]]:
        # PIL wants whole pixels and fills those of the outline too: half a pixel less on each side.
        scale = radius * shorter * finer - 0.5
        points = np.rint(centre * [width, height] * finer + scale * polygon @ rotated - 0.5)
        polygons.append([tuple(p) for p in points])

    def canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
        image = Image.new('L', (width * finer, height * finer))
        return image, ImageDraw.Draw(image)

    def lines(width: int) -> Image.Image:
        """The shape's outline: of its body where there is no hole, and of its hole where there is a body."""
        image, pen = canvas()
        pen.line(polygons[0] + polygons[0][:2], fill=255, width=width, joint='curve')
        for hole in polygons[1:]:
            pen.polygon(hole, fill=0)
            inner, pen = canvas()
            pen.line(hole + hole[:2], fill=255, width=width, joint='curve')
            body, pen = canvas()
            pen.polygon(polygons[0], fill=255)
            image = ImageChops.lighter(image, ImageChops.darker(inner, body))
        return image

    inside, pen = canvas()
    for i, polygon in enumerate(polygons):
        pen.polygon(polygon, fill=0 if i else 255)
    # Half of a line lies outside.
    coloured = ImageChops.darker(inside, lines(2 * round(BORDER * shorter * finer))) if style == 'outlined' else inside
    cover, covered, edges = (np.asarray(x.reduce(finer)) for x in (inside, coloured, lines(finer)))

    colour = np.array(colorsys.hsv_to_rgb(*list(COLOURS.values())[f['colour']]))
    background = np.array(colorsys.hsv_to_rgb(*list(BACKGROUNDS.values())[f['background']]))
    light = falling_light(height)
    alpha = covered[..., None] / 255
    image = np.rint(255 * (alpha * colour + (1 - alpha) * background * light)).astype(np.uint8)
    below, above = segment_colours(factors)
    segments = np.where(cover[..., None] > 127, above, below)
    sketch = np.where(edges[..., None] > 127, above, below)
    return Scene(image, cover, edges, segments, sketch)


# --- what an image shows


@functools.cache
def templates(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(shape of each, int [m]; spectra [m, H, W // 2 + 1]) of masks of all shapes, NEW too, in all their sizes and
    rotations, four times by parts of a pixel, each of mean 0 and norm 1."""
    named_shapes = [(i, shape) for i, shape in enumerate((*SHAPES, *NEW))]
    turns, places = range(FACTORS['rotation']), (MIDDLE - 1, MIDDLE)
    each = [
        (i, draw(np.array([i, 0, s, x, y, turn, 0]), size, shape if shape in NEW else STYLES[0]).mask)
        for i, shape in named_shapes
        for s, turn, x, y in itertools.product(range(FACTORS['size']), turns, places, places)
    ]
    masks = np.stack([mask for _, mask in each]).astype(np.float32)
    masks -= masks.mean((1, 2), keepdims=True)
    masks /= np.sqrt(np.square(masks).sum((1, 2), keepdims=True))
    return np.array([i for i, _ in each]), np.conj(np.fft.rfft2(masks)).astype(np.complex64)


def standing_out(images: np.ndarray) -> np.ndarray:
    """How much each pixel is of what stands out from the background, whose colour the border has, float32 [n, H, W],
    about 0 to 1.

    images: uint8 [n, H, W, 3].
    """
    x = images.astype(np.float32) / falling_light(images.shape[1])
    border = np.concatenate([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1)
    x = x - np.median(border, 1)[:, None, None]
    far = np.square(x).sum(-1).reshape(len(x), -1)
    most = np.argsort(-far, 1)[:, : max(far.shape[1] // 40, 1), None]
    colour = np.median(np.take_along_axis(x.reshape(len(x), -1, 3), most, 1), 1)[:, None, None]
    return np.clip((x * colour).sum(-1) / np.maximum(np.square(colour).sum(-1), 1), 0, 1)


def recognised(images: np.ndarray) -> np.ndarray:
    """The shape that each image shows, an entry of (*SHAPES, *NEW), int [n]: that of the mask with the greatest
    correlation with what stands out, wherever it lies.

    images: uint8 [n, H, W, 3].
    """
    shape, spectra = templates(images.shape[1:3])
    shapes_seen = []
    for one in standing_out(images):
        one = one - one.mean()
        shapes_seen.append(shape[np.fft.irfft2(np.fft.rfft2(one) * spectra, one.shape).max((1, 2)).argmax()])
    return np.array(shapes_seen)


def shown(style: str, images: np.ndarray) -> dict[str, dict]:
    """{'new_object': {'value', 'stderr', 'n'}}, the fraction of images uint8 [n, H, W, 3] in which the shape of NEW by
    this name is `recognised`."""
    n, right = len(images), recognised(images) == len(SHAPES) + list(NEW).index(style)
    value = float(right.mean())
    return {'new_object': {'value': value, 'stderr': float(np.sqrt(value * (1 - value) / n)), 'n': n}}
