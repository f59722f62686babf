"""Points of mixtures of Gaussians, in one and in two dimensions: data of which the density is known.

label, x = draw(dimensions=2, numbers=np.arange(1000))
coverage(2, to_images(x))  # {'good_samples': {'value': 0.989, ...}, 'modes': {'value': 25, ...}, 'mode_kl': ...}
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxgen.data.transforms import uniform
from jaxgen.metrics.scores import modes_covered

CHANNELS = {1: 1, 2: 3}  # of an image that is a point, by its dimensions
STREAM = 4  # of `uniform`; see transforms.py for the others


class Mixture(NamedTuple):
    """A mixture of k isotropic Gaussians in d dimensions."""

    weights: np.ndarray  # [k], sum 1
    means: np.ndarray  # [k, d], in [-1, 1]
    stds: np.ndarray  # [k]


def mixture(dimensions: int) -> Mixture:
    """The mixture in one dimension, of three Gaussians of different weights and widths; or in two, of 25 in a square,
    as evenly as the 256 values of a pixel let them."""
    if dimensions == 1:
        return Mixture(np.array([0.5, 0.3, 0.2]), np.array([[-0.6], [0.05], [0.6]]), np.array([0.08, 0.15, 0.04]))
    line = np.linspace(-0.8, 0.8, 5)
    means = np.stack(np.meshgrid(line, line, indexing='ij'), -1).reshape(25, 2)
    return Mixture(np.full(25, 1 / 25), means, np.full(25, 0.02))


def draw(dimensions: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points with these numbers: the number of each one's Gaussian, int [n], and its coordinates, [n, d]."""
    weights, means, stds = mixture(dimensions)
    which, radius, angle = (uniform(i, numbers, STREAM) for i in range(3))
    label = np.searchsorted(np.cumsum(weights)[:-1], which, side='right')
    radius, angle = np.sqrt(-2 * np.log1p(-radius)), 2 * np.pi * angle  # Box and Muller 1958
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)[:, :dimensions]
    return label, means[label] + stds[label, None] * normal


def to_images(x: np.ndarray) -> np.ndarray:
    """Points [n, d] as images of one pixel, uint8 [n, 1, 1, C]: grey, or red and green of a pixel whose blue is 128."""
    dimensions = x.shape[1]
    pixels = np.full((len(x), 1, 1, CHANNELS[dimensions]), 128, np.uint8)
    pixels[..., :dimensions] = np.rint(np.clip((x + 1) * 127.5, 0, 255))[:, None, None]
    return pixels


def coverage(dimensions: int, images: np.ndarray) -> dict[str, dict]:
    """{name: {'value', 'n', ...}} of samples, uint8 [n, 1, 1, C], by the known mixture; see `scores.modes_covered`.

    good_samples  fraction within three standard deviations of a mean
    modes         number of Gaussians that have such a sample
    mode_kl       KL(fractions of good samples by Gaussian || the mixture's weights), nats
    """
    n, known = len(images), mixture(dimensions)
    points = images.reshape(n, -1)[:, :dimensions] / 127.5 - 1
    good, covered, kl = modes_covered(points, *known)
    error = {'stderr': float(np.sqrt(good * (1 - good) / n))} if n > 1 else {}
    return {
        'good_samples': {'value': good, **error, 'n': n},
        'modes': {'value': covered, 'n': n, 'of': len(known.means)},
        'mode_kl': {'value': kl, 'n': n},
    }
