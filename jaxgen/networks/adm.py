"""The U-Net of Improved DDPM and of ADM, and the classifier that guides ADM.

Nichol & Dhariwal 2021 (arXiv 2102.09672) take DDPM's network, give attention several heads, let the
time scale and shift the second norm of a block (appendix A) and put out a variance too. Dhariwal &
Nichol 2021 (arXiv 2105.05233, section 3) resample inside residual blocks as BigGAN does and fix the
width of a head. EDM (Karras et al. 2022) trains ADM's network too, without the variance.

Published weights fit, with the axes of convolutions moved, and one trap: here a product qkv gives
q, k, v and each of them head by head, as ADM's 'new attention order'. Of the published networks
only ADM at 64 pixels and the pool of the classifiers have it; the others give head by head q, k, v.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.attention import SelfAttention, attend
from jaxgen.networks.embeddings import cosines_first
from jaxgen.networks.fields import Channels, GroupSize, RealMultipliers
from jaxgen.networks.layers import Conv, Dense, Embed, GroupNorm, downsample_mean, upsample_nearest, variance_scaling
from jaxgen.options import Count, OneOf, Positive, Rate

Array = jax.Array

# As torch starts kernels: uniform in +-1 / sqrt(fan in).
INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
RESAMPLE = {'': lambda x: x, 'down': downsample_mean, 'up': upsample_nearest}


class ResBlock(nn.Module):
    """Pre-activation residual block conditioned on the time: [n, H, W, C], [n, E] to [n, H', W', features].

    The second convolution starts at zero: a new block only resamples its input, or nothing at all.

    Attributes:
      resample: '' | 'down' | 'up': H' is H, H / 2 or 2 H, for both branches.
      scale_shift: the embedding scales and shifts after the second norm, or else is added before it.
    """

    features: int
    resample: str = ''
    scale_shift: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32
    normalisation: Callable = functools.partial(GroupNorm, eps=1e-5, least=2)

    @nn.compact
    def __call__(self, x: Array, embedding: Array, train: bool) -> Array:
        resample = RESAMPLE[self.resample]
        wide = 2 * self.features if self.scale_shift else self.features
        condition = Dense(wide, init=INIT, dtype=self.dtype, name='embedding')(embedding)[:, None, None, :]
        h = resample(nn.silu(self.normalisation(dtype=self.dtype, name='norm1')(x)))
        h = Conv(self.features, init=INIT, dtype=self.dtype, name='conv1')(h)
        norm2 = self.normalisation(dtype=self.dtype, name='norm2')
        if self.scale_shift:
            scale, shift = jnp.split(condition, 2, -1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + condition)
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        h = Conv(self.features, init=variance_scaling(0), dtype=self.dtype, name='conv2')(h)
        x = resample(x)
        if x.shape[-1] != self.features:
            x = Dense(self.features, init=INIT, dtype=self.dtype, name='shortcut')(x)
        return x + h


class Half(nn.Module):
    """What U-Net and classifier have in common: their attributes, and the way down to the middle.

    Attributes:
      channels: of the first level at multiplier 1; an even number.
      multipliers: channels of each level over `channels`, such as 0.5 too. The height and width of x
        must be divisible by 2 ** (levels - 1).
      blocks: residual blocks per level on the way down; one more on the way up.
      attention: heights in pixels at which every residual block is followed by attention. The
        middle always has it.
      heads: of each attention, if head_channels is 0.
      head_channels: of one head; wherever attention is, the channels are a multiple of it.
      scale_shift: the embedding scales and shifts in a block, else it is added.
      resample_in_blocks: resolution changes inside residual blocks (ADM), else by a convolution with
        stride 2, or one after doubling (DDPM).
      dropout: rate of dropout of the second convolution's inputs, in training.
      groups, group_size, eps: of the group norms, see GroupNorm (`least` is group_size there). Published with 32 groups
        at every width, group_size 0; EDM's has min(C // 4, 32), group_size 4.
      sines_first, freq_shift: of the embedding of time, as in ADM; networks of diffusers may have sines before cosines
        (flip_sin_to_cos False) and frequencies that end at 1 / 10000 (freq_shift 1), see `cosines_first`.
      padding: of the convolutions with stride 2: one pixel on 'all' sides, as in ADM, or at the 'end', bottom and right
        (downsample_padding 0 of diffusers).
      remat: recompute each block's activations in the backward pass.
      dtype: of the computation; the last layers are in float32 all the same, as published.
    """

    channels: Channels = 192
    multipliers: RealMultipliers = (1.0, 2.0, 3.0, 4.0)
    blocks: Count = 3
    attention: tuple[int, ...] = (32, 16, 8)
    heads: Count = 1
    head_channels: Annotated[int, '[0, inf)'] = 64
    scale_shift: bool = True
    resample_in_blocks: bool = True
    dropout: Rate = 0.0
    groups: Count = 32
    group_size: GroupSize = 2
    eps: Positive = 1e-5
    sines_first: bool = False
    freq_shift: Annotated[int, '[0, 1]'] = 0
    padding: Annotated[str, OneOf('all', 'end')] = 'all'
    remat: bool = False
    dtype: Any = jnp.float32

    @property
    def vector_features(self) -> int:
        return 4 * self.channels

    @nn.nowrap
    def class_embedding(self, classes: int) -> nn.Module:
        """A module of int32 [n] in [0, classes) to [n, vector_features]."""
        start = nn.initializers.normal(1.0)  # as torch starts embeddings
        return Embed(classes, self.vector_features, embedding_init=start, dtype=self.dtype)

    def norm(self) -> Callable:
        return functools.partial(GroupNorm, self.groups, self.eps, least=self.group_size)

    def embed(self, t: Array) -> Array:
        """[n] to [n, 4 channels]."""
        waves = cosines_first(t, self.channels, freq_shift=self.freq_shift)
        waves = jnp.roll(waves, self.channels // 2, -1) if self.sines_first else waves
        embedding = Dense(4 * self.channels, init=INIT, dtype=self.dtype, name='time1')(waves)
        return Dense(4 * self.channels, init=INIT, dtype=self.dtype, name='time2')(nn.silu(embedding))

    def width(self, level: int) -> int:
        return int(self.channels * self.multipliers[level])

    def block(self, h, embedding, train, name: str, features: int, attend: bool = False, resample: str = '') -> Array:
        res_block = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
        own = (features, resample, self.scale_shift, self.dropout, self.dtype, self.norm())
        h = res_block(*own, name=name)(h, embedding, train)
        if attend:
            heads = features // self.head_channels if self.head_channels else self.heads
            attention = nn.remat(SelfAttention) if self.remat else SelfAttention
            h = attention(self.dtype, heads, self.norm(), INIT, name=f'{name}_attention')(h)
        return h

    def resample(self, h, embedding, train, name: str, direction: str) -> Array:
        """h at half or twice the height and width; direction: 'down' | 'up'."""
        features = h.shape[-1]
        if self.resample_in_blocks:
            return self.block(h, embedding, train, name, features, resample=direction)
        if direction == 'down':
            padding = ((1, 1), (1, 1)) if self.padding == 'all' else ((0, 1), (0, 1))
            return Conv(features, stride=2, padding=padding, init=INIT, dtype=self.dtype, name=name)(h)
        return Conv(features, init=INIT, dtype=self.dtype, name=name)(upsample_nearest(h))

    def descend(self, x: Array, embedding: Array, train: bool) -> tuple[Array, list[Array]]:
        """x [n, H, W, C] to the middle's output and what the way up takes of the way down."""
        h = Conv(self.width(0), init=INIT, dtype=self.dtype, name='first')(x)
        skips = [h]
        last = len(self.multipliers) - 1
        for level in range(last + 1):
            for i in range(self.blocks):
                attend = h.shape[1] in self.attention
                h = self.block(h, embedding, train, f'down{level}_{i}', self.width(level), attend)
                skips.append(h)
            if level < last:
                h = self.resample(h, embedding, train, f'down{level}', 'down')
                skips.append(h)
        h = self.block(h, embedding, train, 'middle_0', self.width(last), attend=True)
        h = self.block(h, embedding, train, 'middle_1', self.width(last))
        return h, skips


class ADMUNet(Half):
    """x_t and t to a map of x_t's height and width, float32. The defaults are ADM's at 64 pixels.

    ADM's upsamplers are this network conditioned on the small image: enlarged to x_t's size (bilinear), it is
    concatenated to x_t, so that x has 6 channels. Then out_channels must be given.

    Attributes (more: see `Half`):
      out_channels: 0: as x; twice an image's with a learned variance, which comes second.
    """

    out_channels: int = 0

    takes: ClassVar = ('vector', 'planes')

    @nn.compact
    def __call__(self, x: Array, t: Array, vector: Array | None = None, *, train: bool) -> Array:
        """Args:
        x: float32 [n, H, W, C].
        t: [n], step of a schedule with about 1000 of them, integer or real; EDM: log(sigma) / 4.
        vector: [n, vector_features], added to the embedding of time; None: there is no condition.
        train: with dropout; needs the rng 'dropout'.
        """
        embedding = self.embed(t)
        if vector is not None:
            embedding = embedding + vector
        embedding = nn.silu(embedding)  # once here, as every block would begin with it

        h, skips = self.descend(x, embedding, train)
        for level in range(len(self.multipliers) - 1, -1, -1):
            for i in range(self.blocks + 1):
                attend = h.shape[1] in self.attention
                h = jnp.concatenate([h, skips.pop()], -1)
                h = self.block(h, embedding, train, f'up{level}_{i}', self.width(level), attend)
            if level > 0:
                h = self.resample(h, embedding, train, f'up{level}', 'up')

        h = nn.silu(self.norm()(name='norm')(h))
        return Conv(self.out_channels or x.shape[-1], init=variance_scaling(0), name='last')(h)


class AttentionPool(nn.Module):
    """What the image's mean attends to in it (CLIP, Radford et al. 2021): [n, H, W, C] to [n, features].

    Positions are learned, so H and W are fixed with the weights.
    """

    features: int
    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, height, width, channels = x.shape
        x = x.reshape(n, -1, channels)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], 1)  # [n, 1 + HW, C]
        start = nn.initializers.normal(channels**-0.5)
        x = x + self.param('positions', start, (1 + height * width, channels))
        qkv = Dense(3 * channels, init=INIT, name='qkv')(x).reshape(n, -1, 3, self.heads, channels // self.heads)
        h = attend(qkv[:, :1, 0], qkv[:, :, 1], qkv[:, :, 2])  # [n, 1, heads, C / heads]
        return Dense(self.features, init=INIT, name='out')(h.reshape(n, channels))


class ADMClassifier(Half):
    """x_t, t to logits of its class, by the first half of ADM's U-Net: for classifier guidance (section 4).

    Published with channels 128 and 2 blocks (4 at 64 pixels), and otherwise as ADM of that size.

    Attributes (more: see `Half`):
      head_channels: of one head; the pool has heads of so many channels too.
      classes: number of classes.
    """

    head_channels: Count = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x: Array, t: Array, *, train: bool = False) -> Array:
        """Logits [n, classes], float32. Args as for `ADMUNet`; H and W are fixed with the weights."""
        h, _ = self.descend(x, nn.silu(self.embed(t)), train)
        h = nn.silu(self.norm()(name='norm')(h))
        return AttentionPool(self.classes, h.shape[-1] // self.head_channels, name='pool')(h)
