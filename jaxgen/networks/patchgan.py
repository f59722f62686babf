"""PatchGAN: a discriminator that classifies every patch of an image by itself (Isola et al. 2017, arXiv 1611.07004).

Section 3.2 and appendix 6.1.2; used by pix2pix, CycleGAN, VQGAN and latent diffusion.
"""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.errors import UserError
from jaxgen.networks.layers import BatchNorm, Conv, instance_norm

Array = jax.Array

NORMS = ('batch', 'instance', 'none')


def patches(height: int, layers: int) -> int:
    """Rows of patches in an image of this height; 0 or less: it is too small.

    With three layers patches are of 70 x 70 pixels.
    """
    for _ in range(layers):
        height //= 2
    return height - 2


def check(field: str, image: tuple[int, int, int], layers: int) -> None:
    """Raises UserError where images are too small for a discriminator of so many layers, by this config field."""
    if min(patches(size, layers) for size in image[:2]) < 1:
        raise UserError(
            f'config.{field} = {layers} is too many for images of {image[0]} x {image[1]} pixels: '
            f'it needs {3 * 2**layers} pixels'
        )


class PatchGAN(nn.Module):
    """Images [n, H, W, C] to one value per patch, float32 [n, h, w].

    Convolutions of kernel 4: `layers` with stride 2 and two without, leaky ReLUs of slope 0.2 between, norms after all
    but the first and the last.

    Attributes:
      channels: of the first layer, ndf in the published code; doubled with every layer up to 8 times as many.
      layers: n_layers of the published code, 3 for patches of 70 x 70 pixels.
      norm: 'batch': BatchNorm, see there about `train` and the collection 'batch_stats'; 'instance': without weights;
        'none'.
    """

    channels: int = 64
    layers: int = 3
    norm: str = 'batch'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """train: batch statistics are those of this batch."""
        chex.assert_rank(x, 4)

        def conv(x, features, stride, bias, name):
            init = nn.initializers.normal(0.02)
            padding = ((1, 1), (1, 1))
            return Conv(features, 4, stride=stride, padding=padding, bias=bias, init=init, dtype=self.dtype, name=name)(
                x
            )

        x = nn.leaky_relu(conv(x, self.channels, 2, True, 'conv0'), 0.2)
        for i in range(1, self.layers + 1):
            # The norm takes the mean away and has a bias of its own, if it has weights.
            x = conv(x, self.channels * min(2**i, 8), 2 if i < self.layers else 1, self.norm != 'batch', f'conv{i}')
            if self.norm == 'batch':
                x = BatchNorm(train=train, dtype=self.dtype, name=f'norm{i}')(x)
            elif self.norm == 'instance':
                x = instance_norm(x)
            x = nn.leaky_relu(x, 0.2)
        return conv(x, 1, 1, True, 'last').astype(jnp.float32)[..., 0]
