"""The U-Net of latent diffusion and Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.3): ADM's, with
transformers whose pixels attend to each other and to the tokens of a condition. SDXL (Podell et al. 2023,
arXiv 2307.01952) has the same network with other depths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.adm import INIT, Half
from jaxgen.networks.attention import attend
from jaxgen.networks.embeddings import VectorEmbedding, cosines_first
from jaxgen.networks.fields import GroupSize
from jaxgen.networks.layers import Conv, Dense, GroupNorm, LayerNorm, upsample_nearest, variance_scaling
from jaxgen.options import Count

Array = jax.Array


def embedded_numbers(numbers: Array, features: int) -> Array:
    """Cosines and sines [n, k * features] of k numbers of each example, [n, k]: of SDXL's original height and width,
    the crop's top and left, the target's height and width (Podell et al. 2023, section 2.2)."""
    n, k = numbers.shape
    return cosines_first(numbers.reshape(-1), features).reshape(n, k * features)


def split_heads(x: Array, parts: int, heads: int) -> Array:
    """[n, T, parts * C] to [parts, n, T, heads, C / heads]."""
    return einops.rearrange(x, 'n t (p h c) -> p n t h c', p=parts, h=heads)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context and a gated MLP (GEGLU: Shazeer 2020, arXiv 2002.05202), each of a
    normalised input and added to it: [n, T, C], context [n, S, D] to [n, T, C]."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, context: Array) -> tuple[Array, None]:
        channels = x.shape[-1]

        def dense(features: int, name: str, bias: bool = False) -> nn.Module:
            return Dense(features, bias=bias, init=INIT, dtype=self.dtype, name=name)

        def norm(name: str) -> nn.Module:
            return LayerNorm(eps=1e-5, dtype=self.dtype, name=name)

        def joined(h: Array) -> Array:
            return einops.rearrange(h, 'n t h c -> n t (h c)')

        q, k, v = split_heads(dense(3 * channels, 'qkv')(norm('norm1')(x)), 3, self.heads)
        x = x + dense(channels, 'out', bias=True)(joined(attend(q, k, v)))
        (q,) = split_heads(dense(channels, 'cross_q')(norm('norm2')(x)), 1, self.heads)
        k, v = split_heads(dense(2 * channels, 'cross_kv')(context), 2, self.heads)
        x = x + dense(channels, 'cross_out', bias=True)(joined(attend(q, k, v)))
        h, gate = jnp.split(dense(8 * channels, 'mlp1', bias=True)(norm('norm3')(x)), 2, -1)
        return x + dense(channels, 'mlp2', bias=True)(h * nn.gelu(gate, approximate=False)), None


class SpatialTransformer(nn.Module):
    """`depth` blocks over the pixels of a map, added to it: [n, H, W, C], context [n, S, D] to [n, H, W, C]. The last
    layer starts at zero.

    Attributes:
      groups, least: of the norm before them, see GroupNorm.
    """

    depth: int
    heads: int
    groups: int = 32
    least: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        _, height, width, channels = x.shape
        h = GroupNorm(self.groups, 1e-6, self.dtype, self.least, name='norm')(x)
        h = Dense(channels, init=INIT, dtype=self.dtype, name='first')(h)
        h = einops.rearrange(h, 'n h w c -> n (h w) c')
        scanned = nn.scan(
            TransformerBlock,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        h, _ = scanned(self.heads, self.dtype, name='blocks')(h, context)
        h = einops.rearrange(h, 'n (h w) c -> n h w c', h=height, w=width)
        return x + Dense(channels, init=variance_scaling(0), dtype=self.dtype, name='last')(h)


class LatentUNet(Half):
    """x_t, t and the tokens of a condition to a map of x_t's height and width, float32. Any height and width will do.
    The defaults are Stable Diffusion 1's.

    Published, as channels, multipliers, depths, middle_depth, heads or head_channels: Stable Diffusion 1 320,
    (1, 2, 4, 4), (1, 1, 1, 0), 1, 8 heads; 2 the same with heads of 64; SDXL 320, (1, 2, 4), (0, 2, 10), 10, heads of
    64; its refiner 384, (1, 2, 4, 4), (0, 4, 4, 0), 4, heads of 64. All have 2 blocks and 32 groups.

    Attributes (more: see `Half`; there are no `attention` and `resample_in_blocks`):
      depths: blocks of the transformer behind every residual block of each level, 0 for none.
      middle_depth: the same of the middle.
      out_channels: 0: as x.
    """

    channels: Annotated[int, '[2, inf)'] = 320
    multipliers: tuple[float, ...] = (1.0, 2.0, 4.0, 4.0)
    blocks: Count = 2
    attention: tuple[int, ...] = ()
    heads: Count = 8
    head_channels: Annotated[int, '[0, inf)'] = 0
    scale_shift: bool = False
    resample_in_blocks: bool = False
    group_size: GroupSize = 0
    depths: Annotated[tuple[int, ...], '[0, inf)'] = (1, 1, 1, 0)
    middle_depth: Annotated[int, '[0, inf)'] = 1
    out_channels: int = 0

    takes: ClassVar = ('vector', 'pooled', 'tokens', 'planes')
    token_features: ClassVar = 0  # tokens of any width are attended to as they are

    @nn.nowrap
    def attend(self, h: Array, tokens: Array, name: str, depth: int) -> Array:
        """h after a transformer of so many blocks; h itself where there is none."""
        if not depth:
            return h
        channels = h.shape[-1]
        heads = channels // self.head_channels if self.head_channels else self.heads
        made = nn.remat(SpatialTransformer) if self.remat else SpatialTransformer
        return made(depth, heads, self.groups, self.group_size, self.dtype, name=f'{name}_transformer')(h, tokens)

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        vector: Array | None = None,
        tokens: Array | None = None,
        pooled: Array | None = None,
        control: Sequence[Array] | None = None,
        *,
        train: bool,
    ) -> Array:
        """Args:
        x: float32 [n, H, W, C].
        t: [n], step of a schedule with about 1000 of them, integer or real.
        vector: [n, vector_features], added to the embedding of time; None: there is no condition.
        pooled: [n, d], of which two layers make another such vector: pooled texts, and sizes as of `embedded_numbers`.
        tokens: [n, S, D], of any width; None: one token of zeros.
        control: maps to be added to those that the way down hands to the way up, in their order, and to the middle's
          (Zhang et al. 2023, arXiv 2302.05543).
        train: with dropout; needs the rng 'dropout'.
        """
        embedding, tokens = self.conditions(x, t, vector, tokens, pooled)
        h, skips = self.descend_with(x, embedding, tokens, train)
        if control is not None:
            *added, middle = control
            h, skips = h + middle, [s + a for s, a in zip(skips, added, strict=True)]
        for level in range(len(self.multipliers) - 1, -1, -1):
            for i in range(self.blocks + 1):
                name = f'up{level}_{i}'
                h = jnp.concatenate([h, skips.pop()], -1)
                h = self.block(h, embedding, train, name, self.width(level))
                h = self.attend(h, tokens, name, self.depths[level])
            if level > 0:
                height, width = skips[-1].shape[1:3]  # of an odd height twice its half is one more
                h = upsample_nearest(h)[:, :height, :width]
                h = Conv(h.shape[-1], init=INIT, dtype=self.dtype, name=f'up{level}')(h)
        h = nn.silu(self.norm()(name='norm')(h))
        return Conv(self.out_channels or x.shape[-1], init=variance_scaling(0), name='last')(h)

    @nn.nowrap
    def conditions(
        self, x: Array, t: Array, vector: Array | None, tokens: Array | None, pooled: Array | None
    ) -> tuple[Array, Array]:
        """The embedding of time and vectors [n, vector_features], as blocks read it, and tokens; see `__call__`."""
        tokens = jnp.zeros((len(x), 1, 1)) if tokens is None else tokens
        embedding = self.embed(t)
        if vector is not None:
            embedding = embedding + vector
        if pooled is not None:
            embedding = embedding + VectorEmbedding(self.vector_features, self.dtype, name='pooled')(pooled)
        return nn.silu(embedding), tokens.astype(self.dtype)

    @nn.nowrap
    def descend_with(
        self, x: Array, embedding: Array, tokens: Array, train: bool, hint: Array | None = None
    ) -> tuple[Array, list[Array]]:
        """x to the middle's output and what the way up takes of the way down.

        Args:
          hint: map that is added behind the first layer.
        """
        h = Conv(self.width(0), init=INIT, dtype=self.dtype, name='first')(x)
        h = h if hint is None else h + hint
        skips, last = [h], len(self.multipliers) - 1
        for level in range(last + 1):
            for i in range(self.blocks):
                name = f'down{level}_{i}'
                h = self.block(h, embedding, train, name, self.width(level))
                h = self.attend(h, tokens, name, self.depths[level])
                skips.append(h)
            if level < last:
                h = self.resample(h, embedding, train, f'down{level}', 'down')
                skips.append(h)
        h = self.block(h, embedding, train, 'middle_0', self.width(last))
        h = self.attend(h, tokens, 'middle', self.middle_depth)
        return self.block(h, embedding, train, 'middle_1', self.width(last)), skips
