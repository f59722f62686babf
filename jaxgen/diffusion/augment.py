"""Augmentation that does not leak into samples (Karras et al. 2022, arXiv 2206.00364, appendix F.2).

Training images are mirrored, turned, stretched and moved at random, as StyleGAN2-ADA does it for its discriminator
(Karras et al. 2020, arXiv 2006.06676, appendix B), and the network is told how. In sampling it is told that nothing
was done. Colours stay as they are.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

LABELS = 9  # numbers that tell what was done to an image; all 0: nothing
# Standard deviations: of the logarithm to base 2 of the scale and of the stretch; of the move, in sides of the image.
SCALE, STRETCH, MOVE = 0.2, 0.2, 0.125
TURNED = 0.5  # share of the stretches that are along any direction, not along an axis
# Low-pass filter of the wavelet sym6 (Daubechies 1992). Orthogonal to itself moved by an even number of samples: what
# is enlarged by it to twice the size and reduced again is the same image.
SYM6 = np.array(
    [
        *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
        *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
        *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
    ]
)


def augment(rng: Array, x: Array, p: float) -> tuple[Array, Array]:
    """Images [n, H, W, C] after their changes, and labels [n, LABELS].

    Half of the images are mirrored left to right. Each other kind of change is made with probability p: top to bottom
    (half of the time), scale, turn, stretch, move.
    """
    n, height, width, _ = x.shape
    keys = iter(jax.random.split(rng, 13))

    def chosen(value, share=p):
        """The value [n], or 0 where the change is not made."""
        return jnp.where(jax.random.bernoulli(next(keys), share, (n,)), value, 0.0)

    def normal():
        return jax.random.normal(next(keys), (n,))

    def angle():
        return jax.random.uniform(next(keys), (n,), minval=-math.pi, maxval=math.pi)

    across = jax.random.bernoulli(next(keys), 0.5, (n,)).astype(jnp.float32)
    down = chosen(1.0, p / 2)
    scale = chosen(normal())
    turn = chosen(angle())
    stretch, along = chosen(normal()), chosen(angle(), TURNED)
    moves = jax.random.normal(next(keys), (2, n)) * chosen(1.0)
    labels = jnp.stack(
        [
            *(across, down, scale, jnp.cos(turn) - 1, jnp.sin(turn)),
            *(stretch * jnp.cos(along), stretch * jnp.sin(along), *moves),
        ],
        -1,
    )

    x = jnp.where(across[:, None, None, None] > 0, x[:, :, ::-1], x)
    x = jnp.where(down[:, None, None, None] > 0, x[:, ::-1], x)
    # Places in the result to places in the image. (As published, the labels do not tell a stretch along a direction
    # from one across it: both are changes of the same data.)
    size = 2 ** (SCALE * scale)
    stretched = 2 ** (STRETCH * stretch)
    matrix = rotation(turn) / size[:, None, None]
    matrix = matrix @ rotation(-along) @ jax.vmap(jnp.diag)(jnp.stack([1 / stretched, stretched], -1)) @ rotation(along)
    move = MOVE * moves.T * jnp.array([width, height])
    changed = (labels[:, 2:] != 0).any(-1)
    return jnp.where(changed[:, None, None, None], warp(x, matrix, move), x), labels


def rotation(angle: Array) -> Array:
    """Matrices [n, 2, 2] of angles [n]."""
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([c, -s], -1), jnp.stack([s, c], -1)], -2)


def warp(x: Array, matrix: Array, move: Array) -> Array:
    """Images [n, H, W, C] whose pixel at place q, (x, y) from the middle, is that of x at matrix (q - move).

    Looked up between the nearest pixels of x at twice its size, and reduced again (StyleGAN2-ADA's appendix B.2).
    Outside lies the mirror image.

    Args:
      matrix: [n, 2, 2].
      move: [n, 2], in pixels.
    """
    height, width = x.shape[1:3]
    (wide, columns), (high, rows) = enlargement(width), enlargement(height)
    y = jnp.einsum('uh,vw,nhwc->nuvc', rows, columns, x)
    middle = jnp.array([(width - 1) / 2, (height - 1) / 2])
    places = jnp.stack(jnp.meshgrid(wide, high), -1) - middle  # [2H + 10, 2W + 10, 2]
    places = jnp.einsum('nij,nuvj->nuvi', matrix, places - move[:, None, None]) + middle

    def index(at: Array, size: int) -> Array:
        """Place among the samples of `enlargement`, a real number."""
        period = 2 * max(size - 1, 1)
        mirrored = jnp.abs((at + (size - 1)) % period - (size - 1))
        return 2 * jnp.where((at < -2.51) | (at > size + 2.01), mirrored, at) + 5

    def look_up(y, u, v):  # [U, V, C], [U, V] each
        i, j = (jnp.clip(jnp.floor(at).astype(jnp.int32), 0, len(line) - 2) for at, line in ((u, high), (v, wide)))
        below, right = (u - i)[..., None], (v - j)[..., None]
        upper = (1 - right) * y[i, j] + right * y[i, j + 1]
        lower = (1 - right) * y[i + 1, j] + right * y[i + 1, j + 1]
        return (1 - below) * upper + below * lower

    y = jax.vmap(look_up)(y, index(places[..., 1], height), index(places[..., 0], width))
    return jnp.einsum('uh,vw,nuvc->nhwc', rows_back(height), rows_back(width), y)


def enlargement(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Places [2 size + 10], in pixels, of the samples of a line of pixels at twice its size, some of them beyond its
    ends, and the matrix [2 size + 10, size] that makes these samples of the line and its mirror image.

    The middle of SYM6 is its fifth number, by weight.
    """
    places = (np.arange(2 * size + 10) - 5) / 2
    matrix = np.zeros((len(places), size))
    for j in range(len(places)):
        for k in range(len(SYM6)):
            pixel, odd = divmod(j - k, 2)
            if not odd:
                matrix[j, mirrored(pixel, size)] += SYM6[k]
    return places.astype(np.float32), math.sqrt(2) * matrix.astype(np.float32)


def rows_back(size: int) -> np.ndarray:
    """The matrix [2 size + 10, size] whose transpose makes pixels of the samples of `enlargement`."""
    matrix = np.zeros((2 * size + 10, size), np.float32)
    for i in range(size):
        matrix[2 * i : 2 * i + 12, i] = SYM6 / math.sqrt(2)
    return matrix


def mirrored(pixel: int, size: int) -> int:
    """The pixel of a line that is seen at a place beyond its ends: mirrors stand in its first and its last pixel."""
    period = 2 * max(size - 1, 1)
    pixel = pixel % period
    return min(pixel, period - pixel) if size > 1 else 0
