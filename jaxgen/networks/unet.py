"""The U-Net of DDPM (Ho et al. 2020, arXiv 2006.11239, appendix B)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.attention import SelfAttention
from jaxgen.networks.embeddings import sinusoidal
from jaxgen.networks.fields import Channels, GroupSize, Multipliers
from jaxgen.networks.layers import (
    Conv,
    Dense,
    Embed,
    GroupNorm,
    from_patches,
    to_patches,
    upsample_nearest,
    variance_scaling,
)
from jaxgen.options import Count, Positive, Rate

Array = jax.Array


class ResBlock(nn.Module):
    """Pre-activation residual block conditioned on the time: [n, H, W, C], [n, E] to [n, H, W, features].

    The second convolution starts at zero: a new block passes its input on unchanged.
    """

    features: int
    dropout: float = 0.0
    dtype: Any = jnp.float32
    normalisation: Callable = GroupNorm

    @nn.compact
    def __call__(self, x: Array, embedding: Array, train: bool) -> Array:
        h = nn.silu(self.normalisation(dtype=self.dtype, name='norm1')(x))
        h = Conv(self.features, dtype=self.dtype, name='conv1')(h)
        h = h + Dense(self.features, dtype=self.dtype, name='embedding')(embedding)[:, None, None, :]
        h = nn.silu(self.normalisation(dtype=self.dtype, name='norm2')(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Conv(self.features, init=variance_scaling(0), dtype=self.dtype, name='conv2')(h)
        if x.shape[-1] != self.features:
            x = Dense(self.features, dtype=self.dtype, name='shortcut')(x)
        return x + h


class UNet(nn.Module):
    """x_t, t (and class) to a map of x_t's size, float32.

    Attributes:
      channels: of the first level; an even number, at least 4.
      multipliers: channels of each level over `channels`. The height and width of x must be
        divisible by patch 2 ** (levels - 1).
      blocks: residual blocks per level on the way down; one more on the way up.
      attention: heights at which every residual block is followed by attention, in pixels, or in
        patches. The middle always has it.
      patch: side in pixels of the squares that are the positions of the first level, each put out at
        once (Luhman & Luhman 2022, arXiv 2207.04316): with 2 the work is a quarter.
      dropout: rate of dropout of the second convolution's inputs, in training.
      groups, group_size, eps: of the group norms, see GroupNorm (`least` is group_size there). DDPM has 32 groups at
        every width, group_size 0.
      out_channels: 0: as x.
      remat: recompute each block's activations in the backward pass.
    """

    channels: Channels = 128
    multipliers: Multipliers = (1, 2, 2, 2)
    blocks: Count = 2
    attention: tuple[int, ...] = (16,)
    patch: Count = 1
    dropout: Rate = 0.0
    groups: Count = 32
    group_size: GroupSize = 4
    eps: Positive = 1e-6
    out_channels: int = 0
    remat: bool = False
    dtype: Any = jnp.float32

    takes: ClassVar = ('vector', 'planes')

    @property
    def vector_features(self) -> int:
        return 4 * self.channels

    @nn.nowrap
    def class_embedding(self, classes: int) -> nn.Module:
        """A module of int32 [n] in [0, classes) to [n, vector_features]."""
        return Embed(classes, self.vector_features, dtype=self.dtype)

    @nn.compact
    def __call__(self, x: Array, t: Array, vector: Array | None = None, *, train: bool) -> Array:
        """Args:
        x: float32 [n, H, W, C].
        t: [n], step of the schedule, integer or real.
        vector: [n, vector_features], added to the embedding of time; None: there is no condition.
        train: with dropout; needs the rng 'dropout'.
        """
        top, image_channels = self.channels, x.shape[-1]
        res_block = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
        attention = nn.remat(SelfAttention) if self.remat else SelfAttention

        norm = functools.partial(GroupNorm, self.groups, self.eps, least=self.group_size)

        def block(h, level, name, attend):
            h = res_block(top * self.multipliers[level], self.dropout, self.dtype, norm, name=name)(h, embedding, train)
            return attention(self.dtype, normalisation=norm, name=f'{name}_attention')(h) if attend else h

        embedding = Dense(4 * top, dtype=self.dtype, name='time1')(sinusoidal(t, top))  # [n, 4 channels]
        embedding = Dense(4 * top, dtype=self.dtype, name='time2')(nn.silu(embedding))
        if vector is not None:
            embedding = embedding + vector
        embedding = nn.silu(embedding)  # once here, as every block would begin with it

        last = len(self.multipliers) - 1
        h = Conv(top, dtype=self.dtype, name='first')(to_patches(x, self.patch))
        skips = [h]
        for level in range(last + 1):
            for i in range(self.blocks):
                h = block(h, level, f'down{level}_{i}', h.shape[1] in self.attention)
                skips.append(h)
            if level < last:
                # 'SAME' pads at the bottom and right only, which is what the paper's code does.
                h = Conv(h.shape[-1], stride=2, padding='SAME', dtype=self.dtype, name=f'down{level}')(h)
                skips.append(h)

        h = block(h, last, 'middle_0', True)
        h = block(h, last, 'middle_1', False)

        for level in range(last, -1, -1):
            for i in range(self.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], -1)
                h = block(h, level, f'up{level}_{i}', h.shape[1] in self.attention)
            if level > 0:
                h = Conv(h.shape[-1], dtype=self.dtype, name=f'up{level}')(upsample_nearest(h))

        h = nn.silu(norm(dtype=self.dtype, name='norm')(h))
        out_channels = self.patch**2 * (self.out_channels or image_channels)
        h = Conv(out_channels, init=variance_scaling(0), dtype=self.dtype, name='last')(h)
        return from_patches(h, self.patch).astype(jnp.float32)
