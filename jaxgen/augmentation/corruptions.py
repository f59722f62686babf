"""Degradations of images, for models that learn to undo them: low resolution, greyscale, blur, masks.

All are functions of images float32 [n, H, W, C] in [-1, 1], and of a key for each image where they are random.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce, repeat

Array = jax.Array

LUMA = (0.299, 0.587, 0.114)  # Rec. 601


def low_resolution(x: Array, factor: int) -> Array:
    """[n, H, W, C] with every square of factor x factor pixels as its mean, at full size."""
    small = reduce(x, 'n (h a) (w b) c -> n h w c', 'mean', a=factor, b=factor)
    return repeat(small, 'n h w c -> n (h a) (w b) c', a=factor, b=factor)


def grey(x: Array) -> Array:
    """[n, H, W, 3] with its luma in all three channels."""
    return jnp.broadcast_to((x * jnp.array(LUMA)).sum(-1, keepdims=True), x.shape)


def blurred(x: Array, deviation: float) -> Array:
    """[n, H, W, C] under a Gaussian of this standard deviation in pixels, cut off at three of them.

    Beyond the border the image goes on as its last row or column; a deviation of 0 changes nothing.
    """
    radius = math.ceil(3 * deviation)
    if not radius:
        return x
    weights = np.exp(-0.5 * np.square(np.arange(-radius, radius + 1) / deviation))
    weights /= weights.sum()
    for axis in (1, 2):
        y = jnp.pad(x, [(radius, radius) if i == axis else (0, 0) for i in range(4)], mode='edge')
        x = sum(float(w) * jax.lax.slice_in_dim(y, i, i + x.shape[axis], 1, axis) for i, w in enumerate(weights))
    return x


def holes(keys: Array, size: tuple[int, int], hole: int) -> Array:
    """bool [n, H, W, 1], True in one square of hole x hole pixels per key, anywhere within the image alike."""

    def one(key: Array) -> Array:
        inside = []
        for axis, length in enumerate(size):
            first = jax.random.randint(jax.random.fold_in(key, axis), (), 0, length - hole + 1)
            position = jnp.arange(length)
            inside.append((position >= first) & (position < first + hole))
        return (inside[0][:, None] & inside[1][None])[..., None]

    return jax.vmap(one)(keys)


STROKES, VERTICES = 3, 12  # at most, of a mask and of a stroke
TURN, TURN_RANGE = 2 * math.pi / 5, 2 * math.pi / 15  # mean of a stroke's angles, and their range about it


def strokes(keys: Array, size: tuple[int, int], widths: tuple[float, float]) -> Array:
    """bool [n, H, W, 1], True under the strokes of a brush that goes to and fro: a free-form mask for each key.

    Yu et al. 2018 (arXiv 1806.03589), section 3.4 and algorithm 1, with the settings of the authors' code: 1 to 3
    strokes of 4 to 11 straight pieces from a random position; each piece turns back, by the mean angle and less or more
    than a third of it; its length has mean a and deviation a / 2, between 0 and 2 a, with a an eighth of the diagonal.

    Args:
      widths: the least and the largest width of a brush, pixels; 12 and 40 of 256 in the authors' code.
    """
    height, width = size
    mean = math.hypot(height, width) / 8
    rows, columns = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing='ij')
    bounds = jnp.array([height, width], jnp.float32)

    def distance(a: Array, b: Array) -> Array:
        """Of all pixels to the line from a to b, [H, W]."""
        along = b - a
        t = ((rows - a[0]) * along[0] + (columns - a[1]) * along[1]) / jnp.maximum((along**2).sum(), 1e-6)
        t = jnp.clip(t, 0, 1)  # of the nearest point, 0 at a and 1 at b
        return jnp.hypot(rows - a[0] - t * along[0], columns - a[1] - t * along[1])

    def stroke(key: Array) -> Array:
        names = ('pieces', 'start', 'angle', 'less', 'more', 'length', 'width')
        k = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        pieces = jax.random.randint(k['pieces'], (), 4, VERTICES)
        less, more = (TURN_RANGE * jax.random.uniform(k[name]) for name in ('less', 'more'))
        angle = TURN - less + (less + more) * jax.random.uniform(k['angle'], (VERTICES - 1,))
        angle = jnp.where(jnp.arange(VERTICES - 1) % 2 == 0, 2 * math.pi - angle, angle)
        length = jnp.clip(mean + mean / 2 * jax.random.normal(k['length'], (VERTICES - 1,)), 0, 2 * mean)
        moves = length[:, None] * jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1)
        brush = jax.random.uniform(k['width'], minval=widths[0], maxval=widths[1])

        def piece(at, step):
            i, move = step
            to = jnp.clip(at + move, 0, bounds)
            return to, (distance(at, to) < brush / 2) & (i < pieces)

        start = bounds * jax.random.uniform(k['start'], (2,))
        _, covered = jax.lax.scan(piece, start, (jnp.arange(VERTICES - 1), moves))
        return covered.any(0)

    def one(key: Array) -> Array:
        count_key, mirror_key, key = jax.random.split(key, 3)
        count = jax.random.randint(count_key, (), 1, STROKES + 1)
        covered = jax.vmap(stroke)(jax.random.split(key, STROKES))
        mask = (covered & (jnp.arange(STROKES) < count)[:, None, None]).any(0)
        across, over = jax.random.bernoulli(mirror_key, shape=(2,))
        mask = jnp.where(across, mask[:, ::-1], mask)
        return jnp.where(over, mask[::-1], mask)[..., None]

    return jax.vmap(one)(keys)
