"""Wide residual network (Zagoruyko & Komodakis 2016, arXiv 1605.07146) without normalisation, as JEM has it.

Grathwohl et al. 2020 (arXiv 1912.03263) leave the normalisation out: batch statistics would make the energy of one
image depend on the others. WRN-28-10 is width 160, multipliers (1, 2, 4) and blocks 4.
"""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import Conv, Dense

Array = jax.Array

STEM = 16  # channels of the first convolution
LEAK = 0.2
# What torch's layers start with: a third of the variance that keeps the size of a signal. Without normalisation
# larger weights grow from block to block.
INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class Block(nn.Module):
    """Two activations and 3x3 convolutions beside a shortcut, [n, H, W, C] -> [n, H / stride, W / stride, features]."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        same = ((1, 1), (1, 1))
        h = nn.leaky_relu(x, LEAK)
        h = Conv(self.features, init=INIT, dtype=self.dtype, name='conv1')(h)
        h = nn.leaky_relu(h, LEAK)
        h = Conv(self.features, stride=self.stride, padding=same, init=INIT, dtype=self.dtype, name='conv2')(h)
        if self.stride > 1 or x.shape[-1] != self.features:
            x = x[:, :: self.stride, :: self.stride]
            x = Dense(self.features, init=INIT, dtype=self.dtype, name='shortcut')(x)
        return x + h


class WideResNet(nn.Module):
    """Images [n, H, W, C] -> [n, outputs], float32.

    Attributes:
      width: channels of the first group of blocks, 16 times the factor in the paper's names.
      multipliers: of the groups' channels; every group but the first halves the image.
      blocks: in each group.
    """

    width: int = 160
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 4
    outputs: int = 10
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        chex.assert_rank(x, 4)
        block = nn.remat(Block) if self.remat else Block
        x = Conv(STEM, init=INIT, dtype=self.dtype, name='first')(x)
        for i, multiplier in enumerate(self.multipliers):
            for j in range(self.blocks):
                stride = 2 if i and not j else 1
                x = block(self.width * multiplier, stride, self.dtype, name=f'block{i}_{j}')(x)
        x = nn.leaky_relu(x, LEAK).astype(jnp.float32).mean((1, 2))
        return Dense(self.outputs, init=INIT, name='outputs')(x)
