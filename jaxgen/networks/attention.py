"""Attention over the positions of an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import Dense, GroupNorm, variance_scaling

Array = jax.Array


class SelfAttention(nn.Module):
    """Residual self-attention of every pixel to every pixel: [n, H, W, C] to the same.

    Logits are scaled by (C / heads)^-1/2 (Vaswani et al. 2017, eq. 1) and the softmax is computed in
    float32. The last layer starts at zero: initially a block is the identity.

    Attributes:
      heads: C is a multiple of it. The outputs of `qkv` are q, k and v in turn, each of them head by head.
      normalisation: of the input, GroupNorm with other arguments, say.
      init: of `qkv`'s kernel; None: that of q, k and v as three layers of variance_scaling(1).
    """

    dtype: Any = jnp.float32
    heads: int = 1
    normalisation: Callable = GroupNorm
    init: Callable | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        _, height, width, features = x.shape
        h = self.normalisation(dtype=self.dtype, name='norm')(x)
        # One product for q, k and v. Its fan out is three times theirs, (1 + 3) / 2 = 2 in the mean: with a scale of 2
        # each of them has the initial variance of a layer of its own.
        qkv = Dense(3 * features, init=self.init or variance_scaling(2.0), dtype=self.dtype, name='qkv')(h)
        q, k, v = einops.rearrange(qkv, 'n h w (qkv k c) -> qkv n (h w) k c', qkv=3, k=self.heads)
        h = jax.nn.dot_product_attention(q, k, v)  # [n, HW, heads, C / heads]
        h = einops.rearrange(h, 'n (h w) k c -> n h w (k c)', h=height, w=width)
        return x + Dense(features, init=variance_scaling(0), dtype=self.dtype, name='out')(h)
