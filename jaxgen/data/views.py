"""The views of a training image: what its random augmentation may make of it, where that are few, by number.

An image that is mirrored or not has two; one that is cut out of an image `jitter` pixels larger has (jitter + 1)^2,
one that is moved by up to m pixels (2 m + 1)^2. View 0 is the first of every choice, not what evaluation reads.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from jaxgen.data.decoding import Crops
from jaxgen.sections import sides

if TYPE_CHECKING:
    from jaxgen.data.loader import Examples


def why_none(data) -> str:
    """Why the views of an image cannot be numbered, '' where they can."""
    if data['crop'] != 'center':
        return f'config.data.crop = {data["crop"]!r} has another set of them for every image'
    if data['binarise'] == 'dynamic':
        return "config.data.binarise = 'dynamic' has one for every drawing"
    return ''


def choices(data) -> tuple[int, ...]:
    """How many there are of each choice: mirrored, row and column of the window, pixels moved down and right."""
    down, right = (data['pad'] + round(data['shift'] * side) for side in sides(data['size']))
    return (2 if data['flip'] else 1, data['jitter'] + 1, data['jitter'] + 1, 2 * down + 1, 2 * right + 1)


def count(data) -> int:
    """The number of views."""
    return math.prod(choices(data))


def numbers(data, n: int, crops: Crops) -> np.ndarray:
    """The number of the view, int [n], that the loader's crops and mirroring of n examples make."""
    sizes = choices(data)
    windows = [
        np.zeros(n, int) if u is None else (u * size).astype(int)
        for u, size in zip((crops.row, crops.column), sizes[1:3], strict=True)
    ]
    moved = [
        np.zeros(n, int) if x is None else x + size // 2
        for x, size in zip((crops.down, crops.right), sizes[3:], strict=True)
    ]
    flip = np.zeros(n, int) if crops.mirrored is None else crops.mirrored.astype(int)
    return np.ravel_multi_index((flip, *windows, *moved), sizes)


def take(examples: Examples, indices: np.ndarray, view: np.ndarray) -> dict[str, np.ndarray]:
    """The examples [n] in these views [n], as training has them."""
    data, sizes = examples.data, choices(examples.data)
    flip, row, column, down, right = np.unravel_index(view, sizes)
    jitter, moves = data['jitter'] > 0, data['pad'] > 0 or data['shift'] > 0
    crops = Crops(
        row=(row + 0.5) / sizes[1] if jitter else None,
        column=(column + 0.5) / sizes[2] if jitter else None,
        down=down - sizes[3] // 2 if moves else None,
        right=right - sizes[4] // 2 if moves else None,
        mirrored=flip > 0,
    )
    return examples.take(indices, crops)
