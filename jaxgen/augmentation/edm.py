"""Augmentation that does not leak into samples (Karras et al. 2022, arXiv 2206.00364, appendix F.2).

Training images are mirrored, rotated, stretched and moved at random, as StyleGAN2-ADA does it for its discriminator
(Karras et al. 2020, arXiv 2006.06676, appendix B), and the network is conditioned on the parameters of the change. In
sampling these are 0: no change. Colours stay as they are.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxgen.augmentation.warp import rotation, warp

Array = jax.Array

LABELS = 9  # parameters of an image's change, a condition of the network; all 0: no change
# Standard deviations: of the logarithm to base 2 of the scale and of the stretch; of the move, in sides of the image.
SCALE, STRETCH, MOVE = 0.2, 0.2, 0.125
TURNED = 0.5  # fraction of the stretches that are along any direction, not along an axis


def augment(rng: Array, x: Array, p: float) -> tuple[Array, Array]:
    """Images [n, H, W, C] after their changes, and labels [n, LABELS].

    Half of the images are mirrored left to right. Each other kind of change is made with probability p: top to bottom
    (half of the time), scale, turn, stretch, move.
    """
    n, height, width, _ = x.shape
    keys = iter(jax.random.split(rng, 13))

    def chosen(value, probability=p):
        """The value [n], or 0 where the change is not made."""
        return jnp.where(jax.random.bernoulli(next(keys), probability, (n,)), value, 0.0)

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
    # Positions in the result to positions in the image. (As published, the labels do not separate a stretch along a
    # direction from one across it: both are changes of the same data.)
    shrink = 2 ** jnp.stack([STRETCH * stretch, -STRETCH * stretch], -1)[:, :, None]  # of rows, of columns
    matrix = jnp.einsum(
        *('nij,njk,nkl->nil', rotation(turn), rotation(-along), shrink * rotation(along)), precision='highest'
    )
    matrix = matrix / (2 ** (SCALE * scale))[:, None, None]
    move = MOVE * moves[::-1].T * jnp.array([height, width])
    changed = (labels[:, 2:] != 0).any(-1)
    moved = warp(x, matrix, -jnp.einsum('nij,nj->ni', matrix, move, precision='highest'))
    return jnp.where(changed[:, None, None, None], moved, x), labels
