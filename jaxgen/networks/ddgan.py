"""Networks of denoising diffusion GANs (Xiao et al. 2021, arXiv 2112.07804, appendix C)."""

from __future__ import annotations

import math
from typing import Annotated, Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.embeddings import sinusoidal
from jaxgen.networks.fields import Channels, Multipliers
from jaxgen.networks.layers import Conv, Dense, normalised, smooth, variance_scaling
from jaxgen.networks.ncsnpp import PYRAMIDS, RESAMPLINGS, NCSNpp
from jaxgen.networks.stylegan2 import minibatch_deviation
from jaxgen.options import Choice, Count, Rate

Array = jax.Array

SLOPE = 0.2  # of the discriminator's leaky ReLU


class Generator(nn.Module):
    """x_t [n, H, W, C], t [n] and z [n, latent] to x_0 float32 [n, H, W, C] in (-1, 1).

    A perceptron makes a style of z, and NCSN++ with this style does the rest. The defaults are those for CIFAR-10.

    Attributes:
      latent: dimensions of z, from N(0, I).
      style: features of the style.
      mapping_layers: dense layers after the perceptron's first.
      channels, multipliers, blocks, attention, resampling, pyramid, dropout: of the U-Net, see networks/ncsnpp.py.
    """

    latent: Count = 100
    style: Count = 256
    mapping_layers: Annotated[int, '[0, inf)'] = 4
    channels: Channels = 128
    multipliers: Multipliers = (1, 2, 2, 2)
    blocks: Count = 2
    attention: tuple[int, ...] = (16,)
    resampling: Annotated[str, Choice(RESAMPLINGS)] = 'fir'
    pyramid: Annotated[str, Choice(PYRAMIDS)] = 'residual'
    dropout: Rate = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, t: Array, z: Array, *, train: bool) -> Array:
        chex.assert_shape(z, (len(x), self.latent))
        h = normalised(z)
        for i in range(self.mapping_layers + 1):
            h = nn.silu(Dense(self.style, dtype=self.dtype, name=f'mapping{i}')(h))
        unet = NCSNpp(
            self.channels,
            self.multipliers,
            self.blocks,
            self.attention,
            resampling=self.resampling,
            pyramid=self.pyramid,
            dropout=self.dropout,
            remat=self.remat,
            dtype=self.dtype,
            name='unet',
        )
        return jnp.tanh(unet(x, t, style=h, train=train))


class Block(nn.Module):
    """Residual block conditioned on the time: [n, H, W, C], [n, E] to [n, H, W, features], or half as high and wide."""

    features: int
    down: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, embedding: Array) -> Array:
        h = Conv(self.features, dtype=self.dtype, name='conv1')(nn.leaky_relu(x, SLOPE))
        h = h + Dense(self.features, dtype=self.dtype, name='embedding')(embedding)[:, None, None, :]
        h = nn.leaky_relu(h, SLOPE)
        if self.down:
            x, h = smooth(x, 1, 2), smooth(h, 1, 2)
        h = Conv(self.features, init=variance_scaling(0), dtype=self.dtype, name='conv2')(h)
        return (h + Dense(self.features, bias=False, dtype=self.dtype, name='shortcut')(x)) * math.sqrt(0.5)


class Discriminator(nn.Module):
    """x_s and x_t [n, H, W, C], s the step before t, and s [n] to values float32 [n].

    Attributes:
      channels: of the first layer.
      multipliers: channels of each block over `channels`.
      full: how many blocks come before the first one that makes the map smaller; all others do.
      embedding: features of the time's embedding.
      group: images whose standard deviation is taken together, see stylegan2.minibatch_deviation.
    """

    channels: Annotated[int, '[4, inf)'] = 128
    multipliers: Annotated[tuple[int, ...], '[1, inf)'] = (1, 2, 4, 4)
    full: Annotated[int, '[0, inf)'] = 1
    embedding: Channels = 256
    group: Count = 4
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_s: Array, s: Array, x_t: Array) -> Array:
        chex.assert_equal_shape([x_s, x_t])
        block = nn.remat(Block) if self.remat else Block
        embedding = sinusoidal(s, self.embedding)
        for i in (1, 2):
            embedding = nn.leaky_relu(Dense(self.embedding, dtype=self.dtype, name=f'time{i}')(embedding), SLOPE)
        h = Dense(self.channels, dtype=self.dtype, name='first')(jnp.concatenate([x_s, x_t], -1))
        for i, multiplier in enumerate(self.multipliers):
            h = block(self.channels * multiplier, i >= self.full, self.dtype, name=f'block{i}')(h, embedding)
        deviation = minibatch_deviation(h, self.group)[:, None, None, None]
        h = jnp.concatenate([h, jnp.broadcast_to(deviation, (*h.shape[:-1], 1)).astype(h.dtype)], -1)
        h = Conv(h.shape[-1] - 1, init=variance_scaling(0), dtype=self.dtype, name='last')(h)
        h = nn.leaky_relu(h, SLOPE).astype(jnp.float32).sum((1, 2))
        return Dense(1, name='value')(h)[:, 0]
