"""The residual network of IGEBM (Du & Mordatch 2019, arXiv 1903.08689, appendix), and its spectral normalisation.

Every convolution's kernel, as a matrix [pixels x channels in, channels out], is divided by its largest singular value
(Miyato et al. 2018, arXiv 1802.05957): the energy's slope is bounded, and chains that follow it do not run away. The
second convolution of a block is so only where that value is above 1, for it starts as good as zero.

Normalising is a function of the weights, outside the network (networks/spectral.py): `normalise` once, then any number
of steps of a chain. The singular vectors go on by one power iteration in each update.
"""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxgen.networks import spectral
from jaxgen.networks.layers import Conv, Dense, downsample_mean

Array = jax.Array

LEAK = 0.2


class Block(nn.Module):
    """[n, H, W, C] -> [n, H', W', features]: two convolutions, each with its bias before it, and a shortcut.

    `down` halves H and W at the end.
    """

    features: int
    down: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def convolution(features: int, name: str, std: float = 1.0):
            # Kernels are normalised, so their initial size only sets how fast their direction changes.
            init = nn.initializers.normal(std)
            return Conv(features, bias=False, init=init, dtype=self.dtype, name=name)

        def bias(x: Array, name: str) -> Array:
            return x + self.param(name, nn.initializers.zeros, (x.shape[-1],)).astype(self.dtype)

        h = convolution(self.features, 'conv1')(bias(x, 'bias1'))
        h = convolution(self.features, 'conv2', 1e-10)(bias(nn.leaky_relu(h, LEAK), 'bias2'))
        h = h * self.param('scale', nn.initializers.ones, (self.features,)).astype(self.dtype)
        if x.shape[-1] != self.features:
            x = convolution(self.features, 'shortcut')(x)
        x = x + h
        return nn.leaky_relu(downsample_mean(x) if self.down else x, LEAK)


class ResidualEnergy(nn.Module):
    """Images [n, H, W, C] in [-1, 1] -> [n, outputs], float32. Weights are to be normalised first.

    Attributes:
      width: channels of the first group of blocks.
      multipliers: of the groups' channels; every group halves the image, its first block does.
      blocks: in each group.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 3
    outputs: int = 1
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        chex.assert_rank(x, 4)
        block = nn.remat(Block) if self.remat else Block
        x = (x + 1) / 2  # the paper's images are in [0, 1]
        x = Conv(self.width, bias=False, init=nn.initializers.normal(1.0), dtype=self.dtype, name='first')(x)
        x = nn.leaky_relu(x, LEAK)
        for i, multiplier in enumerate(self.multipliers):
            for j in range(self.blocks):
                x = block(self.width * multiplier, j == 0, self.dtype, name=f'block{i}_{j}')(x)
        x = nn.relu(x).astype(jnp.float32).sum((1, 2))
        return Dense(self.outputs, name='outputs')(x)


def start_vectors(params: dict, steps: int = 10) -> dict:
    """Singular vectors [o] of the convolutions' kernels [h, w, c, o], by their paths, after so many power iterations
    from equal entries."""
    kernels = {path: leaf for path, leaf in traverse_util.flatten_dict(params).items() if leaf.ndim == 4}
    vectors = traverse_util.unflatten_dict({path: jnp.ones(kernel.shape[-1]) for path, kernel in kernels.items()})
    return jax.lax.fori_loop(0, steps, lambda _, vectors: iterate(params, vectors), vectors)


def iterate(params: dict, vectors: dict) -> dict:
    """The singular vectors of `params` after one power iteration from `vectors`."""
    return spectral.normalise(params, vectors)[1]


def normalise(params: dict, vectors: dict) -> dict:
    """Weights with every kernel divided by its largest singular value; a block's second one only if that is above 1."""
    return spectral.normalise(params, vectors, lambda path: 1.0 if 'conv2' in path else 0.0)[0]
