"""Attention over the positions of an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import Dense, GroupNorm, variance_scaling

Array = jax.Array


class SelfAttention(nn.Module):
    """Residual self-attention of every pixel to every pixel: [n, H, W, C] to the same.

    Logits are scaled by (C / heads)^-1/2 (Vaswani et al. 2017, eq. 1) and the softmax is taken in
    float32. The last layer starts at zero: a new block passes its input on unchanged.

    Attributes:
      heads: C is a multiple of it. The product `qkv` gives [q, k, v], each of them head by head.
      normalisation: what comes first, GroupNorm with other arguments, say.
      init: of `qkv`'s kernel; None: that of q, k and v as three layers of variance_scaling(1).
    """

    dtype: Any = jnp.float32
    heads: int = 1
    normalisation: Callable = GroupNorm
    init: Callable | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, height, width, features = x.shape
        h = self.normalisation(dtype=self.dtype, name='norm')(x)
        # One product for q, k and v. Its fan out is three times theirs, (1 + 3) / 2 = 2 in the mean:
        # a scale of 2 gives each of them the variance that it would have alone.
        qkv = Dense(3 * features, init=self.init or variance_scaling(2.0), dtype=self.dtype, name='qkv')(h)
        qkv = qkv.reshape(n, height * width, 3, self.heads, -1)  # [n, HW, 3, heads, C / heads]
        h = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])  # [n, HW, heads, C / heads]
        h = h.reshape(n, height, width, features)
        return x + Dense(features, init=variance_scaling(0), dtype=self.dtype, name='out')(h)
