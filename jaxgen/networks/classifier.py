"""A residual convolutional classifier (He et al. 2016, arXiv 1603.05027, pre-activation) with features of its last map.

The nonlinearity is smooth, and there are no statistics of the batch; see jaxgen/families/classifier.py for why.
"""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import Conv, Dense, GroupNorm, downsample_mean, variance_scaling

Array = jax.Array


class Block(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions, [n, H, W, C] -> [n, H, W, features]."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.silu(GroupNorm(dtype=self.dtype, name='norm1')(x))
        h = Conv(self.features, dtype=self.dtype, name='conv1')(h)
        h = nn.silu(GroupNorm(dtype=self.dtype, name='norm2')(h))
        h = Conv(self.features, init=variance_scaling(0), dtype=self.dtype, name='conv2')(h)
        if x.shape[-1] != self.features:
            x = Dense(self.features, dtype=self.dtype, name='shortcut')(x)
        return x + h


class Classifier(nn.Module):
    """[n, H, W, C] -> features [n, features] and logits [n, outputs], both float32."""

    width: int
    levels: int
    stride: int
    features: int
    outputs: int
    dropout: float
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: Array, train: bool = False, maps: bool = False) -> tuple[Array, ...]:
        """Args:
        train: with dropout of the features before the logits; needs the rng 'dropout'.
        maps: return the output of every block instead, for perceptual distances; images may be of any size then.
        """
        chex.assert_rank(x, 4)
        block = nn.remat(Block) if self.remat else Block
        x = Conv(self.width, stride=self.stride, dtype=self.dtype, name='first')(x)
        outputs = []
        for i in range(self.levels + 1):
            x = downsample_mean(x) if i else x
            x = block(self.width * 2**i, self.dtype, name=f'block{i}')(x)
            outputs.append(x)
        if maps:
            return tuple(outputs)
        x = nn.silu(GroupNorm(dtype=self.dtype, name='norm')(x))
        x = Dense(self.features, dtype=self.dtype, name='features')(x.reshape(len(x), -1))
        features = nn.silu(x.astype(jnp.float32))
        dropped = nn.Dropout(self.dropout, deterministic=not train)(features)
        return features, Dense(self.outputs, name='logits')(dropped)
