"""Encoder and decoder between images and the latents that later stages model.

One pair serves VQGAN (Esser et al. 2021, arXiv 2012.09841, table 7) and the autoencoders of latent diffusion, KL-f8 of
Stable Diffusion among them (Rombach et al. 2022, arXiv 2112.10752, appendix G): DDPM's U-Net without its skips and
without time. As in the published code a 1x1 convolution stands on either side of the latents; it is part of the
network here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.attention import SelfAttention
from jaxgen.networks.layers import Conv, Dense, GroupNorm, upsample_nearest

Array = jax.Array

# Variance 1 / (3 fan in): torch's default, which the published networks keep in all layers.
INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class ResBlock(nn.Module):
    """Pre-activation residual block, [n, H, W, C] to [n, H, W, features]."""

    features: int
    normalisation: Callable = GroupNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.silu(self.normalisation(dtype=self.dtype, name='norm1')(x))
        h = Conv(self.features, init=INIT, dtype=self.dtype, name='conv1')(h)
        h = nn.silu(self.normalisation(dtype=self.dtype, name='norm2')(h))
        h = Conv(self.features, init=INIT, dtype=self.dtype, name='conv2')(h)
        if x.shape[-1] != self.features:
            x = Dense(self.features, init=INIT, dtype=self.dtype, name='shortcut')(x)
        return x + h


class Stack(nn.Module):
    """The parts that encoder and decoder share.

    Attributes:
      channels: at full size.
      multipliers: channels of each resolution level over `channels`; every level but the last halves the height and
        width.
      blocks: residual blocks per level of the encoder; the decoder has one more.
      height: of the images that it is trained on; 0: of its input.
      attention: heights in pixels, of maps in training, at which every residual block is followed by attention.
      middle_attention: attention in the middle, at the smallest size.
      groups, group_size, eps: of the group norms, see GroupNorm (`least` is group_size there). Published with 32 groups
        at every width, group_size 0.
      latent_kernel: height and width of the convolutions on either side of the latents; 0: there are none.
      remat: recompute each block's activations in the backward pass.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    height: int = 0
    attention: tuple[int, ...] = ()
    groups: int = 32
    group_size: int = 4
    eps: float = 1e-6
    latent_kernel: int = 1
    middle_attention: bool = True
    remat: bool = False
    dtype: Any = jnp.float32

    def norm(self) -> Callable:
        return functools.partial(GroupNorm, self.groups, self.eps, least=self.group_size)

    def at_latents(self, x: Array, name: str) -> Array:
        if not self.latent_kernel:
            return x
        size = x.shape[-1]
        options = dict(init=INIT, dtype=self.dtype, name=name)
        return (Conv(size, self.latent_kernel, **options) if self.latent_kernel > 1 else Dense(size, **options))(x)

    def block(self, x: Array, features: int, name: str) -> Array:
        block = nn.remat(ResBlock) if self.remat else ResBlock
        return block(features, self.norm(), self.dtype, name=name)(x)

    def attend(self, x: Array, name: str) -> Array:
        attention = nn.remat(SelfAttention) if self.remat else SelfAttention
        return attention(self.dtype, normalisation=self.norm(), init=INIT, name=name)(x)

    def level(self, x: Array, level: int, blocks: int, name: str) -> Array:
        for i in range(blocks):
            x = self.block(x, self.channels * self.multipliers[level], f'{name}{level}_{i}')
            if (self.height >> level if self.height else x.shape[1]) in self.attention:
                x = self.attend(x, f'{name}{level}_{i}_attention')
        return x

    def middle(self, x: Array) -> Array:
        x = self.block(x, x.shape[-1], 'middle_0')
        x = self.attend(x, 'middle_attention') if self.middle_attention else x
        return self.block(x, x.shape[-1], 'middle_1')

    def end(self, x: Array) -> Array:
        """The input of the last convolution."""
        return nn.silu(self.norm()(dtype=self.dtype, name='norm')(x))


class Encoder(Stack):
    """Images [n, H, W, C] to float32 [n, H / f, W / f, outputs] with f = 2 ** (levels - 1)."""

    outputs: int = 8

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(self.channels, init=INIT, dtype=self.dtype, name='first')(x)
        for level in range(len(self.multipliers)):
            if level:
                # 'SAME' pads at the bottom and right only, as the published code does.
                x = Conv(x.shape[-1], stride=2, init=INIT, dtype=self.dtype, name=f'down{level - 1}')(x)
            x = self.level(x, level, self.blocks, 'down')
        x = self.end(self.middle(x))
        x = Conv(self.outputs, init=INIT, dtype=self.dtype, name='last')(x)
        return self.at_latents(x, 'to_latent').astype(jnp.float32)


class Decoder(Stack):
    """Latents [n, h, w, c] to images [n, h f, w f, image_channels], not clipped.

    Returns:
      The images, float32, and the input of the last convolution, [n, h f, w f, channels of the first level].
    """

    image_channels: int = 3

    @nn.compact
    def __call__(self, z: Array) -> tuple[Array, Array]:
        last = len(self.multipliers) - 1
        x = self.at_latents(z, 'from_latent')
        x = Conv(self.channels * self.multipliers[last], init=INIT, dtype=self.dtype, name='first')(x)
        x = self.middle(x)
        for level in range(last, -1, -1):
            x = self.level(x, level, self.blocks + 1, 'up')
            if level:
                x = Conv(x.shape[-1], init=INIT, dtype=self.dtype, name=f'up{level}')(upsample_nearest(x))
        h = self.end(x)
        return last_layer(self.image_channels, self.dtype, name='last')(h).astype(jnp.float32), h


def last_layer(image_channels: int, dtype: Any, name: str | None = None) -> nn.Module:
    """The decoder's last convolution; the ratio of gradients by its kernel weights the adversarial loss."""
    return Conv(image_channels, init=INIT, dtype=dtype, name=name)
