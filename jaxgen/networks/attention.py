"""Attention over the positions of an image."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import Dense, GroupNorm, variance_scaling

Array = jax.Array


class SelfAttention(nn.Module):
    """Residual self-attention of every pixel to every pixel, one head: [n, H, W, C] to the same.

    Logits are scaled by C^-1/2 (Vaswani et al. 2017, eq. 1) and the softmax is taken in float32.
    The last layer starts at zero: a new block passes its input on unchanged.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, height, width, features = x.shape
        h = GroupNorm(dtype=self.dtype, name='norm')(x)
        # One product for q, k and v. Its fan out is three times theirs, (1 + 3) / 2 = 2 in the mean:
        # a scale of 2 gives each of them the variance that it would have alone.
        qkv = Dense(3 * features, init=variance_scaling(2.0), dtype=self.dtype, name='qkv')(h)
        qkv = qkv.reshape(n, height * width, 3, 1, features)  # [n, HW, 3, heads, C]
        h = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])  # [n, HW, 1, C]
        h = h.reshape(n, height, width, features)
        return x + Dense(features, init=variance_scaling(0), dtype=self.dtype, name='out')(h)
