"""The convolutional encoder and decoder of VQ-VAE, with residual blocks at the coarse size.

Van den Oord et al. 2017 (arXiv 1711.00937, section 4.1): strided 4x4 convolutions, then residual blocks of a 3x3 and a
1x1 convolution; the decoder is the mirror image with transposed convolutions. Sizes are those of the authors' own
example in the library Sonnet. VQ-VAE-2 (Razavi et al. 2019, arXiv 1906.00446) stacks several of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import Conv, ConvTranspose, Dense

Array = jax.Array


class ResidualBlock(nn.Module):
    """ReLU, 3x3, ReLU, 1x1, beside a shortcut: [n, h, w, C] to the same.

    Attributes:
      hidden: channels between the two convolutions.
    """

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = Conv(self.hidden, dtype=self.dtype, name='conv1')(nn.relu(x))
        return x + Dense(x.shape[-1], dtype=self.dtype, name='conv2')(nn.relu(h))


class ResidualStack(nn.Module):
    """`blocks` residual blocks and a last ReLU: [n, h, w, C] to the same."""

    blocks: int
    hidden: int
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        block = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        for i in range(self.blocks):
            x = block(self.hidden, self.dtype, name=f'block{i}')(x)
        return nn.relu(x)


class Encoder(nn.Module):
    """[n, H, W, C] to [n, H / 2^halvings, W / 2^halvings, width].

    Attributes:
      width: channels; half of them after the first convolution.
      blocks, hidden: of the residual stack.
      halvings: convolutions with stride 2, one at least.
      rectified: with a ReLU before the residual stack too, as in Sonnet; not so in the known port of VQ-VAE-2.
      remat: recompute each residual block in the backward pass.
    """

    width: int = 128
    blocks: int = 2
    hidden: int = 32
    halvings: int = 2
    rectified: bool = True
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        padding = ((1, 1), (1, 1))
        for i in range(self.halvings):
            features = self.width if i else self.width // 2
            x = nn.relu(Conv(features, 4, stride=2, padding=padding, dtype=self.dtype, name=f'down{i}')(x))
        x = Conv(self.width, dtype=self.dtype, name='conv')(x)
        x = nn.relu(x) if self.rectified else x
        return ResidualStack(self.blocks, self.hidden, self.remat, self.dtype, name='stack')(x)


class Decoder(nn.Module):
    """[n, h, w, C] to [n, h 2^halvings, w 2^halvings, features], float32 and not bounded.

    Attributes:
      features: of the result.
      width: and the others as of Encoder; half of `width` is left before the last transposed convolution.
    """

    features: int = 3
    width: int = 128
    blocks: int = 2
    hidden: int = 32
    halvings: int = 2
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array) -> Array:
        x = Conv(self.width, dtype=self.dtype, name='conv')(z)
        x = ResidualStack(self.blocks, self.hidden, self.remat, self.dtype, name='stack')(x)
        for i in range(self.halvings - 1):
            features = self.width // 2 if i == self.halvings - 2 else self.width
            x = nn.relu(ConvTranspose(features, dtype=self.dtype, name=f'up{i}')(x))
        return ConvTranspose(self.features, dtype=self.dtype, name='last')(x).astype(jnp.float32)


class Pyramid(nn.Module):
    """Encoder of several resolution levels, each conditioned on the coarser ones (VQ-VAE-2, algorithm 1).

    The finest level halves the image `halvings` times, each coarser one halves the level below it once more. Going
    back from coarse to fine, a level's latents are linear in its own encoding and a decoding of the level above.

    Attributes:
      levels: resolution levels, 1 or more.
      latent: channels of the latents of each level.
      width: and the others as of Encoder.
    """

    levels: int = 1
    latent: int = 64
    width: int = 128
    blocks: int = 2
    hidden: int = 32
    halvings: int = 2
    rectified: bool = True
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, through: Callable) -> tuple[Array, ...]:
        """Latents, float32 [n, h, w, latent], coarse first.

        Args:
          x: [n, H, W, C].
          through: (level counted from the coarsest, its latents) -> these as inputs of finer levels, quantised say.
        """
        chex.assert_rank(x, 4)
        rest = dict(remat=self.remat, dtype=self.dtype)
        maps = []
        for i in range(self.levels):
            halvings = 1 if i else self.halvings
            encoder = Encoder(
                self.width, self.blocks, self.hidden, halvings, self.rectified, **rest, name=f'encoder{i}'
            )
            x = encoder(x)
            maps.append(x)
        latents: list[Array] = []
        for i, h in enumerate(reversed(maps)):
            if i:
                above = through(i - 1, latents[-1])
                decoder = Decoder(self.latent, self.width, self.blocks, self.hidden, 1, **rest, name=f'decoder{i - 1}')
                h = jnp.concatenate([decoder(above).astype(h.dtype), h], -1)
            latents.append(Dense(self.latent, dtype=self.dtype, name=f'latent{i}')(h).astype(jnp.float32))
        return tuple(latents)


class PyramidDecoder(nn.Module):
    """Latents [n, h, w, latent] of each level, coarse first, to [n, H, W, features], float32 and not bounded.

    Coarse latents are doubled by transposed convolutions and concatenated with the next finer ones.
    """

    features: int = 3
    width: int = 128
    blocks: int = 2
    hidden: int = 32
    halvings: int = 2
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latents: tuple[Array, ...]) -> Array:
        h = latents[0]
        for i, finer in enumerate(latents[1:]):
            h = ConvTranspose(h.shape[-1], dtype=self.dtype, name=f'double{i}')(h)
            h = jnp.concatenate([h, finer.astype(h.dtype)], -1)
        decoder = Decoder(
            self.features, self.width, self.blocks, self.hidden, self.halvings, self.remat, self.dtype, name='decoder'
        )
        return decoder(h)
