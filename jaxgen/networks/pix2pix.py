"""The U-Net of pix2pix (Isola et al. 2017, arXiv 1611.07004, appendix 6.1.1), with dropout by example."""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.hourglass import hourglass
from jaxgen.networks.layers import Conv, ConvTranspose, Norm

Array = jax.Array

INIT = nn.initializers.normal(0.02)


def dropout(x: Array, keys: Array, rate: float) -> Array:
    """x [n, ...] with numbers set to 0 at this rate and the others divided by 1 - rate, each example by its key."""
    chex.assert_shape(keys, (len(x),))
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), 0)


class Down(nn.Module):
    """[n, H, W, C] to [n, H/2, W/2, features]; with `full` H and W stay.

    Attributes:
      first: its input is an image, without an activation before it.
      norm: the norm after it, or ''.
    """

    features: int
    full: bool
    first: bool
    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x if self.first else nn.leaky_relu(x, 0.2)
        rest = dict(padding=((1, 1), (1, 1)), bias=False, init=INIT, dtype=self.dtype, name='conv')
        x = Conv(self.features, **rest)(x) if self.full else Conv(self.features, 4, stride=2, **rest)(x)
        return Norm(self.norm, self.features, dtype=self.dtype, name='norm')(x) if self.norm else x


class Up(nn.Module):
    """[n, H, W, C] to [n, 2H, 2W, features]; with `full` H and W stay. With dropout at this rate."""

    features: int
    full: bool
    norm: str
    rate: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, keys: Array) -> Array:
        conv = Conv if self.full else ConvTranspose
        x = conv(self.features, bias=False, init=INIT, dtype=self.dtype, name='conv')(nn.relu(x))
        x = Norm(self.norm, self.features, dtype=self.dtype, name='norm')(x)
        return dropout(x, keys, self.rate) if self.rate else x


class UNet(nn.Module):
    """Inputs [n, H, W, C] to images float32 [n, H, W, features] in (-1, 1) (appendix 6.1.1).

    Convolutions of kernel 4 and stride 2, and as many transposed ones, each with a skip connection from the input of
    its counterpart. Norms come after all layers but the first, the innermost convolution and the last.

    Attributes:
      width: channels of the first convolution, ngf in the published code; doubled with every layer up to 8 times.
      full: convolutions of kernel 3 and stride 1 before these, and after. None as published; but for small images a
        first convolution that halves them is too coarse.
      halvings: of the image: 8 of 256 x 256 pixels leave one.
      dropouts: how many of the transposed convolutions after the innermost one have dropout.
      rate: of it.
      norm: 'instance' | 'group'.
    """

    features: int
    width: int = 64
    full: int = 0
    halvings: int = 8
    dropouts: int = 3
    rate: float = 0.5
    norm: str = 'instance'
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, keys: Array) -> Array:
        """keys [n], of the dropout."""
        chex.assert_rank(x, 4)
        down_block, up_block = (nn.remat(block) if self.remat else block for block in (Down, Up))
        widths = [self.width * min(2**i, 8) for i in range(self.full + self.halvings)]
        last = len(widths) - 1

        def down(i, x):
            norm = self.norm if 0 < i < last else ''
            return down_block(widths[i], i < self.full, i == 0, norm, self.dtype, name=f'down{i}')(x)

        def up(i, x, skip):
            if i == 0:  # to the image, without a skip connection
                conv = Conv if self.full else ConvTranspose
                return conv(self.features, init=INIT, dtype=self.dtype, name='last')(nn.relu(x))
            rate = self.rate if 0 < last - i <= self.dropouts else 0.0
            own = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
            x = up_block(widths[i - 1], i < self.full, self.norm, rate, self.dtype, name=f'up{i}')(x, own)
            return jnp.concatenate([skip, x], -1)

        x = hourglass(x, len(widths), down, lambda x: x, up)
        return jnp.tanh(x.astype(jnp.float32))
