"""The networks of InfoGAN (Chen et al. 2016, arXiv 1606.03657, appendix C): generator, discriminator, recogniser."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jaxgen.networks.layers import BatchNorm, Conv, ConvTranspose, Dense

Array = jax.Array


class Generator(nn.Module):
    """Noise and codes [n, d] to images float32 [n, H, W, C] in (-1, 1): two linear layers, transposed convolutions.

    Attributes:
      width: channels of the largest map but the image; they double towards the smallest, 2 ** levels times as small.
      hidden: units of the first linear layer.
    """

    image: tuple[int, int, int]
    width: int = 64
    levels: int = 2
    hidden: int = 1024
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array, train: bool = False) -> Array:
        def normed(x, name):
            return nn.relu(BatchNorm(train=train, dtype=self.dtype, name=name)(x))

        init = nn.initializers.normal(0.02)
        height, columns, channels = self.image
        height, columns = height >> self.levels, columns >> self.levels
        features = [self.width * 2**i for i in reversed(range(self.levels))] + [channels]
        x = normed(Dense(self.hidden, init=init, dtype=self.dtype, name='dense0')(z), 'norm0')
        x = Dense(height * columns * features[0], init=init, dtype=self.dtype, name='dense1')(x)
        x = rearrange(normed(x, 'norm1'), 'n (h w c) -> n h w c', h=height, w=columns)
        for i in range(self.levels):
            x = normed(x, f'up_norm{i}') if i else x
            x = ConvTranspose(features[i + 1], init=init, dtype=self.dtype, name=f'up{i}')(x)
        return jnp.tanh(x.astype(jnp.float32))


class Discriminator(nn.Module):
    """Images [n, H, W, C] to values float32 [n] and features [n, hidden], which the recogniser has too.

    Attributes:
      width: channels of the first map; they double with each of `levels` halvings of the image.
      hidden: units of the linear layer.
      norm: batch normalisation.
      slope: of the leaky ReLUs.
    """

    width: int = 64
    levels: int = 2
    hidden: int = 1024
    norm: bool = True
    slope: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array]:
        def normed(x, name):
            return BatchNorm(train=train, dtype=self.dtype, name=name)(x) if self.norm else x

        init = nn.initializers.normal(0.02)
        for i in range(self.levels):
            common = dict(stride=2, padding=((1, 1), (1, 1)), init=init, dtype=self.dtype)
            x = Conv(self.width * 2**i, 4, **common, name=f'conv{i}')(x)
            x = normed(x, f'norm{i}') if i else x
            x = nn.leaky_relu(x, self.slope)
        x = Dense(self.hidden, init=init, dtype=self.dtype, name='dense')(x.reshape(len(x), -1))
        x = nn.leaky_relu(normed(x, 'norm'), self.slope)
        return Dense(1, init=init, name='value')(x.astype(jnp.float32))[:, 0], x


class Recogniser(nn.Module):
    """Features [n, hidden] to the parameters of Q(c | x), float32 [n, outputs]."""

    outputs: int
    hidden: int = 128
    slope: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        init = nn.initializers.normal(0.02)
        x = Dense(self.hidden, init=init, dtype=self.dtype, name='dense')(x)
        x = nn.leaky_relu(BatchNorm(train=train, dtype=self.dtype, name='norm')(x), self.slope)
        return Dense(self.outputs, init=init, name='out')(x.astype(jnp.float32))
