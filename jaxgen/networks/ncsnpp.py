"""NCSN++ and DDPM++: the U-Nets of score-based SDEs (Song et al. 2021, arXiv 2011.13456, section 4.4, appendix H).

EDM (Karras et al. 2022, arXiv 2206.00364) trains the same two, at other widths.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.attention import SelfAttention
from jaxgen.networks.conditions import OneHotLinear
from jaxgen.networks.embeddings import sinusoidal
from jaxgen.networks.fields import Channels, GroupSize, Multipliers
from jaxgen.networks.layers import (
    Conv,
    Dense,
    GroupNorm,
    downsample_mean,
    smooth,
    upsample_nearest,
    upsample_smooth,
    variance_scaling,
)
from jaxgen.options import Choice, Count, Positive, Rate

Array = jax.Array

# What the attributes of NCSNpp by these names may be.
EMBEDDINGS = ('positional', 'fourier')
RESAMPLINGS = ('fir', 'box', 'conv')
PYRAMIDS = ('none', 'residual', 'skip')


class Block(nn.Module):
    """Residual block of BigGAN's kind, conditioned on the time: [n, H, W, C], [n, E] to [n, H', W', features].

    With a style [n, S] it says gains and shifts of the norms (adaptive group normalisation).

    Attributes:
      resample: applied in both branches, after the first norm in the one and before the shortcut
        in the other: a function of images, or None.
      scale: of the sum. The second convolution starts at zero.
    """

    features: int
    resample: Any = None
    scale: float = math.sqrt(0.5)
    dropout: float = 0.0
    dtype: Any = jnp.float32
    normalisation: Callable = GroupNorm

    @nn.compact
    def __call__(self, x: Array, embedding: Array, style: Array | None, train: bool) -> Array:
        def norm(h, name):
            if style is None:
                return self.normalisation(dtype=self.dtype, name=name)(h)
            modulation = Dense(2 * h.shape[-1], dtype=self.dtype, name=f'{name}_style')(style)[:, None, None, :]
            gain, shift = jnp.split(modulation, 2, -1)
            return (1 + gain) * self.normalisation(affine=False, dtype=self.dtype, name=name)(h) + shift

        h = nn.silu(norm(x, 'norm1'))
        if self.resample:
            x, h = self.resample(x), self.resample(h)
        h = Conv(self.features, dtype=self.dtype, name='conv1')(h)
        h = h + Dense(self.features, dtype=self.dtype, name='embedding')(embedding)[:, None, None, :]
        h = nn.silu(norm(h, 'norm2'))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Conv(self.features, init=variance_scaling(0), dtype=self.dtype, name='conv2')(h)
        if self.resample or x.shape[-1] != self.features:
            x = Dense(self.features, dtype=self.dtype, name='shortcut')(x)
        return (x + h) * self.scale


class NCSNpp(nn.Module):
    """x_t and t to a map of x_t's size, float32. The published networks:

      NCSN++, 32x32            'fourier', 'fir', 'residual', blocks 4 ("deep": 8)
      NCSN++, 256x256          'fourier', 'fir', 'skip', blocks 2, multipliers (1, 1, 2, 2, 2, 2, 2)
      NCSN++, 1024x1024        the same with channels 16, blocks 1, multipliers (1, 2, 4, 8, 16, 32, 32, 32)
      DDPM++                   'positional', 'box', 'none', blocks 4 ("deep": 8); the defaults
      score_sde's DDPM         'positional', 'conv', 'none', blocks 2
      EDM, 32x32               NCSN++ or DDPM++ with multipliers (2, 2, 2)
      EDM, 64x64               the same with multipliers (1, 2, 2, 2)

    Their outer parts (data in [0, 1] moved to [-1, 1], the output divided by sigma, EDM's
    preconditioning) are the caller's.

    Attributes:
      channels: of the first level; an even number, at least 4.
      multipliers: channels of each level over `channels`. The height and width of x must be
        divisible by 2 ** (levels - 1).
      blocks: residual blocks per level on the way down; one more on the way up.
      attention: heights in pixels with attention: after every residual block on the way down, once
        on the way up. The middle always has it.
      embedding, fourier_scale: of t. 'positional', as DDPM's, or 'fourier': `channels` random frequencies
        of standard deviation `fourier_scale`. These are among the parameters, so that a checkpoint
        has them, and their gradient is zero; decay of the weights would change them all the same.
      resampling: between levels. Residual blocks with the filter [1, 3, 3, 1] inside ('fir') or
        with means of 2x2 and nearest neighbours ('box'); or DDPM's convolutions ('conv'), and then
        sums are not divided by sqrt(2) either.
      pyramid: 'residual': x, made smaller by filter and convolution, joins every level's start, and
        the sum is what is made smaller next. 'skip': x, made smaller by the filter alone, joins
        through 1x1 convolutions, and every level adds its part to the output. 'none'.
      dropout: rate of dropout of the second convolution's inputs, in training.
      groups, group_size, eps: of the group norms, see GroupNorm (`least` is group_size there). The defaults are the
        published ones, min(C // 4, 32) groups; only score_sde's DDPM has 32 at every width, group_size 0.
      out_channels: 0: as many as x has.
      remat: recompute each block's activations in the backward pass.
    """

    channels: Channels = 128
    multipliers: Multipliers = (1, 2, 2, 2)
    blocks: Count = 4
    attention: tuple[int, ...] = (16,)
    embedding: Annotated[str, Choice(EMBEDDINGS)] = 'positional'
    fourier_scale: float = 16.0
    resampling: Annotated[str, Choice(RESAMPLINGS)] = 'box'
    pyramid: Annotated[str, Choice(PYRAMIDS)] = 'none'
    dropout: Rate = 0.0
    groups: Count = 32
    group_size: GroupSize = 4
    eps: Positive = 1e-6
    out_channels: int = 0
    remat: bool = False
    dtype: Any = jnp.float32

    takes: ClassVar = ('vector', 'planes')

    @property
    def vector_features(self) -> int:
        return self.channels * (2 if self.embedding == 'fourier' else 1)

    @nn.nowrap
    def class_embedding(self, classes: int) -> nn.Module:
        """A module of int32 [n] in [0, classes) to [n, vector_features]."""
        return OneHotLinear(classes, self.vector_features, self.dtype)

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        vector: Array | None = None,
        style: Array | None = None,
        *,
        train: bool,
    ) -> Array:
        """Args:
        x: float32 [n, H, W, C].
        t: [n], what is embedded, integer or real: 0 to 999 or so if 'positional', a logarithm of
          sigma if 'fourier' (score_sde: ln sigma; EDM: ln(sigma) / 4).
        vector: [n, vector_features], added to the embedding of time before its MLP; None: there is no condition.
        style: float32 [n, S], sets gains and shifts of the blocks' norms (denoising diffusion GANs); None: none.
        train: with dropout; needs the rng 'dropout'.
        """
        scale = 1.0 if self.resampling == 'conv' else math.sqrt(0.5)
        down, up = {
            'fir': (lambda h: smooth(h, 1, 2), upsample_smooth),
            'box': (downsample_mean, upsample_nearest),
            'conv': (None, None),
        }[self.resampling]
        res_block = nn.remat(Block, static_argnums=(4,)) if self.remat else Block
        attend = nn.remat(SelfAttention) if self.remat else SelfAttention

        norm = functools.partial(GroupNorm, self.groups, self.eps, least=self.group_size)

        def block(h, features, name, *, resample=None, attention=False):
            made = res_block(features, resample, scale, self.dropout, self.dtype, norm, name=name)
            h = made(h, embedding, style, train)
            if attention:
                # q, k and v start with a tenth of the usual variance.
                options = dict(normalisation=norm, init=variance_scaling(0.2))
                h = attend(self.dtype, **options, name=f'{name}_attention')(h) * scale
            return h

        embedding = self.embed(t, vector)
        widths = [self.channels * multiplier for multiplier in self.multipliers]
        last = len(widths) - 1

        h = Conv(self.channels, dtype=self.dtype, name='first')(x)
        skips, small = [h], x
        for level, width in enumerate(widths):
            for i in range(self.blocks):
                h = block(h, width, f'down{level}_{i}', attention=h.shape[1] in self.attention)
                skips.append(h)
            if level < last:
                if down:
                    h = block(h, width, f'down{level}', resample=down)
                else:  # 'SAME' pads at the bottom and right only, as DDPM does
                    h = Conv(width, stride=2, padding='SAME', dtype=self.dtype, name=f'down{level}')(h)
                if self.pyramid == 'residual':
                    small = smooth(small, 2, 1)  # [n, H + 1, W + 1, C]
                    small = Conv(width, stride=2, padding='VALID', dtype=self.dtype, name=f'input{level}')(small)
                    h = small = (small + h) * scale
                elif self.pyramid == 'skip':
                    small = smooth(small, 1, 2)
                    h = h + Dense(width, dtype=self.dtype, name=f'input{level}')(small)
                skips.append(h)

        h = block(h, widths[last], 'middle_0', attention=True)
        h = block(h, widths[last], 'middle_1')

        image = None
        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.blocks + 1):
                attention = i == self.blocks and h.shape[1] in self.attention
                h = block(jnp.concatenate([h, skips.pop()], -1), width, f'up{level}_{i}', attention=attention)
            if level == 0 or self.pyramid == 'skip':
                part = nn.silu(norm(dtype=self.dtype, name=f'norm{level}')(h))
                out = self.out_channels or x.shape[-1]
                part = Conv(out, init=variance_scaling(0), dtype=self.dtype, name=f'last{level}')(part)
                part = part.astype(jnp.float32)
                image = part if image is None else upsample_smooth(image) + part
            if level > 0:
                if up:
                    h = block(h, width, f'up{level}', resample=up)
                else:
                    h = Conv(width, dtype=self.dtype, name=f'up{level}')(upsample_nearest(h))
        return image

    def embed(self, t: Array, vector: Array | None) -> Array:
        """The embedding of time and conditions, of every block: [n, 4 channels]."""
        if self.embedding == 'fourier':
            frequencies = self.param('frequencies', nn.initializers.normal(self.fourier_scale), (self.channels,))
            angles = 2 * math.pi * t.astype(jnp.float32)[:, None] * jax.lax.stop_gradient(frequencies)
            h = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)  # [n, 2 channels]
        else:
            h = sinusoidal(t, self.channels)
        if vector is not None:
            h = h + vector
        h = nn.silu(Dense(4 * self.channels, dtype=self.dtype, name='time1')(h))
        return nn.silu(Dense(4 * self.channels, dtype=self.dtype, name='time2')(h))
