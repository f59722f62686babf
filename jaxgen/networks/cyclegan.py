"""The generator of CycleGAN (Zhu et al. 2017, arXiv 1703.10593, appendix 7.2), a residual network."""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.hourglass import hourglass
from jaxgen.networks.layers import Conv, ConvTranspose, Norm, instance_norm

Array = jax.Array

INIT = nn.initializers.normal(0.02)


def reflection_pad(x: Array, pad: int) -> Array:
    """[n, H, W, C] with `pad` pixels more at each side, mirrored about the last row or column."""
    return jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode='reflect')


class Normed(nn.Module):
    """Instance norm without weights, or group norm, of four channels or more, with them: [n, H, W, C] to the same."""

    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.norm == 'instance':
            return instance_norm(x)
        return Norm(self.norm, x.shape[-1], dtype=self.dtype, name='group')(x)


class Block(nn.Module):
    """Residual block of two 3x3 convolutions: [n, H, W, C] to the same."""

    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = x
        for i in (1, 2):
            h = Conv(x.shape[-1], padding='VALID', init=INIT, dtype=self.dtype, name=f'conv{i}')(reflection_pad(h, 1))
            h = Normed(self.norm, self.dtype, name=f'norm{i}')(h)
            h = nn.relu(h) if i == 1 else h
        return x + h


class Generator(nn.Module):
    """Images [n, H, W, C] to images float32 [n, H, W, C] in (-1, 1) (appendix 7.2, after Johnson et al. 2016).

    Attributes:
      width: channels of the first convolution; doubled with every halving.
      halvings: of the image, before the residual blocks.
      blocks: residual blocks.
      norm: 'instance' | 'group'.
    """

    width: int = 64
    halvings: int = 2
    blocks: int = 9
    norm: str = 'instance'
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        chex.assert_rank(x, 4)
        channels, rest = x.shape[-1], dict(init=INIT, dtype=self.dtype)
        block = nn.remat(Block) if self.remat else Block

        def activate(x, name):
            return nn.relu(Normed(self.norm, self.dtype, name=name)(x))

        def down(i, x):
            x = Conv(self.width * 2 ** (i + 1), stride=2, padding=((1, 1), (1, 1)), **rest, name=f'down{i + 1}')(x)
            return activate(x, f'down_norm{i + 1}')

        def middle(x):
            for i in range(self.blocks):
                x = block(self.norm, self.dtype, name=f'block{i}')(x)
            return x

        def up(i, x, skip):
            x = ConvTranspose(self.width * 2**i, 3, **rest, name=f'up{i + 1}')(x)
            return activate(x, f'up_norm{i + 1}')

        x = activate(Conv(self.width, 7, padding='VALID', **rest, name='first')(reflection_pad(x, 3)), 'first_norm')
        x = hourglass(x, self.halvings, down, middle, up)
        x = Conv(channels, 7, padding='VALID', **rest, name='last')(reflection_pad(x, 3))
        return jnp.tanh(x.astype(jnp.float32))
