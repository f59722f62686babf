"""DiffAugment: differentiable augmentation of the discriminator's inputs (Zhao et al. 2020, arXiv 2006.10738).

With few images a discriminator memorises them. Where data and samples both go through random changes first, it has to
discriminate augmented images, and the generator's gradients flow back through the changes. The generator then learns
the images as they are, if the change can be undone in distribution. Each image has its own change.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

SHIFT = 1 / 8  # of the side, the farthest
HOLE = 1 / 2  # of the side


def colour(x: Array, rng: Array) -> Array:
    """Brightness, saturation and contrast of images [n, H, W, C] in [-1, 1], by the paper's ranges."""
    light, saturation, contrast = jax.random.uniform(rng, (3, len(x), 1, 1, 1))
    x = x + (light - 0.5)
    grey = x.mean(-1, keepdims=True)
    x = grey + 2 * saturation * (x - grey)
    mean = x.mean((1, 2, 3), keepdims=True)
    return mean + (0.5 + contrast) * (x - mean)


def translation(x: Array, rng: Array) -> Array:
    """Images [n, H, W, C] moved by whole pixels, up to an eighth of the side; 0 moves in."""
    for axis, key in zip((1, 2), jax.random.split(rng), strict=True):
        size = x.shape[axis]
        most = int(size * SHIFT + 0.5)
        shift = jax.random.randint(key, (len(x), 1, 1), -most, most + 1)
        position = jnp.arange(size)
        moves = (position[None, None, :] == position[None, :, None] - shift).astype(x.dtype)  # [n, to, from]
        form = 'nts,nswc->ntwc' if axis == 1 else 'nts,nhsc->nhtc'
        x = jnp.einsum(form, moves, x, precision='highest')
    return x


def cutout(x: Array, rng: Array) -> Array:
    """Images [n, H, W, C] with a hole of 0, half as high and wide, its middle anywhere in the image."""
    hole = jnp.ones((len(x), 1, 1, 1), bool)
    for axis, key in zip((1, 2), jax.random.split(rng), strict=True):
        size = x.shape[axis]
        length = int(size * HOLE + 0.5)
        middle = jax.random.randint(key, (len(x), 1), 0, size + 1 - length % 2)
        position = jnp.arange(size) - middle + length // 2  # within the hole, if from 0 to length - 1
        within = (position >= 0) & (position < length)  # [n, size]
        hole &= within[:, :, None, None] if axis == 1 else within[:, None, :, None]
    return jnp.where(hole, 0, x)


AUGMENTATIONS = {'colour': colour, 'translation': translation, 'cutout': cutout}


def augment(x: Array, rng: Array, kinds: tuple[str, ...]) -> Array:
    """Images [n, H, W, C] after the named changes, one after another; () leaves them as they are."""
    for kind, key in zip(kinds, jax.random.split(rng, len(kinds)), strict=True):
        x = AUGMENTATIONS[kind](x, key)
    return x
