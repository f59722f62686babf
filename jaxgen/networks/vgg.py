"""VGG-16 without its classifier (Simonyan & Zisserman 2014, arXiv 1409.1556, configuration D), for its feature maps."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import Conv, max_pool

Array = jax.Array

# Channels of the convolutions between one halving of the image and the next.
CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
LEAST = 2 ** (len(CHANNELS) - 1)  # pixels of the smallest image


class VGG16(nn.Module):
    """Images float32 [n, H, W, 3] to the map before each halving and at the end, by depth.

    Maps are [n, H, W, 64], [n, H/2, W/2, 128], [n, H/4, W/4, 256], [n, H/8, W/8, 512] and [n, H/16, W/16, 512], after
    their ReLU, float32. H and W are 16 or more. The scale of images is up to the caller.
    """

    channels: tuple[tuple[int, ...], ...] = CHANNELS

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        chex.assert_shape(x, (None, None, None, 3))
        maps = []
        for i, group in enumerate(self.channels):
            x = max_pool(x) if i else x
            for j, features in enumerate(group):
                x = nn.relu(Conv(features, padding=((1, 1), (1, 1)), dtype=jnp.float32, name=f'conv{i}_{j}')(x))
            maps.append(x)
        return maps
