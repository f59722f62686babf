"""Augmentation of variational diffusion models: flips, quarter turns and exchanged channels. Whether there were any is
a condition of the network (Kingma et al. 2021, arXiv 2107.00630; the condition as in the released code)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgen.randomness import stream

Array = jax.Array

KINDS = ('none', 'turns', 'turns_and_channels')


def quarter_turned(x: Array, turns: Array) -> Array:
    """Images [n, H, H, C] turned by turns [n] quarters, 0 to 3."""
    turned = x
    for k in (1, 2, 3):
        turned = jnp.where((turns == k)[:, None, None, None], jnp.rot90(x, k, (1, 2)), turned)
    return turned


def augment(rng: Array, x: Array, channels: bool) -> tuple[Array, Array]:
    """Square images [n, H, H, C] after their changes, and bool [n], whether one was made.

    Each is made with probability 1/2: mirrored left to right; turned by one, two or three quarters, all as likely; with
    `channels`, the channels in a random order.
    """
    n = len(x)

    def chosen(name: str) -> Array:
        return jax.random.bernoulli(stream(rng, name), 0.5, (n,))

    flipped, turned = chosen('flip'), chosen('turn')
    x = jnp.where(flipped[:, None, None, None], x[:, :, ::-1], x)
    quarters = jax.random.randint(stream(rng, 'quarters'), (n,), 1, 4)
    x = quarter_turned(x, jnp.where(turned, quarters, 0))
    changed = flipped | turned
    if channels:
        exchanged = chosen('exchange')
        order = jnp.argsort(jax.random.uniform(stream(rng, 'order'), (n, x.shape[-1])), -1)
        one_hot = jax.nn.one_hot(order, x.shape[-1], dtype=x.dtype)
        reordered = jnp.einsum('nhwc,ndc->nhwd', x, one_hot, precision='highest')
        x, changed = jnp.where(exchanged[:, None, None, None], reordered, x), changed | exchanged
    return x, changed
