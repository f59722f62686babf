"""Geometric changes of images without aliasing (Karras et al. 2020, arXiv 2006.06676, appendix B.2).

The image is enlarged twofold by the low-pass filter of a wavelet, read bilinearly, and made smaller by the same filter.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

Array = jax.Array

# Low-pass filter of the least asymmetric orthogonal wavelet with six vanishing moments, "sym6" (Daubechies 1992, table
# 6.3). Its sum is sqrt(2), and shifts by even numbers of taps are orthogonal to it: enlarging an image and making it
# smaller again by the same filter gives the image.
FILTER = (
    *(0.015404109327027, 0.003490712084217, -0.117990111148191, -0.048311742585633, 0.491055941926747),
    *(0.787641141030194, 0.337929421727622, -0.072637522786463, -0.021060292512300, 0.044724901770666),
    *(0.001767711864243, -0.007800708325034),
)
CENTRE = 5  # the tap that meets the pixel itself


def rotation(angle: Array) -> Array:
    """Matrices [n, 2, 2] that turn (row, column) by angles [n]."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([cos, sin], -1), jnp.stack([-sin, cos], -1)], -2)


def warp(x: Array, matrix: Array, offset: Array) -> Array:
    """Images that at position y have the value of x at matrix y + offset, without aliasing.

    Args:
      x: float32 [n, H, W, C], H and W at least 2. Outside of it lies x mirrored, over and over.
      matrix, offset: [n, 2, 2] and [n, 2], of positions (row, column) in pixels from the image's middle.
    """
    chex.assert_shape([matrix, offset[..., None]], [(len(x), 2, 2), (len(x), 2, 1)])
    fine = doubled(doubled(mirrored_period(mirrored_period(x, 1), 2), 1), 2)
    sides = x.shape[1:3]
    # Positions that the last filter reads: from CENTRE half pixels before the first one on.
    axes = [(np.arange(2 * side - 2 + len(FILTER)) - CENTRE) / 2 - (side - 1) / 2 for side in sides]
    grid = jnp.stack(jnp.meshgrid(*map(jnp.float32, axes), indexing='ij'), -1)  # [h, w, 2]
    source = jnp.einsum('nij,hwj->nhwi', matrix, grid, precision='highest') + offset[:, None, None]
    source = 2 * (source + (jnp.array(sides) - 1) / 2)  # in half pixels from the first one
    y = bilinear(fine, source)
    return halved(halved(y, 1), 2)


def mirrored_period(x: Array, axis: int) -> Array:
    """x and its mirror image along an axis, without doubling the edges: one period, 2 size - 2 long."""
    inner = jax.lax.slice_in_dim(x, 1, x.shape[axis] - 1, axis=axis)
    return jnp.concatenate([x, jnp.flip(inner, axis)], axis)


def doubled(x: Array, axis: int) -> Array:
    """Periodic x with half pixels along an axis: y_m = sqrt(2) sum_i FILTER_{m - 2i + CENTRE} x_i, twice as long."""
    size, taps = x.shape[axis], len(FILTER)
    side = taps // 4
    wide = jnp.pad(x, [(side, side) if i == axis else (0, 0) for i in range(x.ndim)], mode='wrap')

    def phase(r):  # of m = 2j + r: the sum over pixels j - d
        shifts = [d for d in range(-side, side + 1) if 0 <= 2 * d + r + CENTRE < taps]
        parts = [jax.lax.slice_in_dim(wide, side - d, side - d + size, axis=axis) for d in shifts]
        return sum(math.sqrt(2) * FILTER[2 * d + r + CENTRE] * y for d, y in zip(shifts, parts, strict=True))

    pairs = jnp.stack([phase(0), phase(1)], axis + 1)
    return pairs.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])


def halved(x: Array, axis: int) -> Array:
    """Every other value along an axis: y_i = sqrt(1/2) sum_t FILTER_t x_{2i + t}, (size - 12) / 2 + 1 long."""
    extent = x.shape[axis] - len(FILTER) + 1
    return sum(math.sqrt(0.5) * tap * jax.lax.slice_in_dim(x, t, t + extent, 2, axis) for t, tap in enumerate(FILTER))


def bilinear(x: Array, positions: Array) -> Array:
    """Periodic images [n, H, W, C] read at positions [n, h, w, 2] (row, column): [n, h, w, C]."""
    chex.assert_shape(positions, (len(x), None, None, 2))
    n, height, width, channels = x.shape
    flat = rearrange(x, 'n h w c -> n (h w) c')
    corner = jnp.floor(positions)
    fraction = positions - corner
    row, column = (corner[..., i].astype(jnp.int32) for i in (0, 1))

    def at(down, right):
        number = (row + down) % height * width + (column + right) % width
        return jnp.take_along_axis(flat, number.reshape(n, -1, 1), 1).reshape(*number.shape, channels)

    down, right = fraction[..., :1], fraction[..., 1:]
    upper = (1 - right) * at(0, 0) + right * at(0, 1)
    lower = (1 - right) * at(1, 0) + right * at(1, 1)
    return (1 - down) * upper + down * lower
