"""Transformers in which an image's patches and a text's tokens attend to each other: the MMDiT of Stable Diffusion 3
(Esser et al. 2024, arXiv 2403.03206, section 4) and the network of FLUX.1 (Black Forest Labs 2024, no paper).

Image and text are two streams with weights of their own, which are joined in attention alone. FLUX has further blocks
behind them in which both are one stream, and rotary positions (Su et al. 2021, arXiv 2104.09864).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.networks.attention import attend
from jaxgen.networks.dit import position_embedding
from jaxgen.networks.embeddings import VectorEmbedding, cosines_first
from jaxgen.networks.layers import Dense, Embed, LayerNorm, RMSNorm
from jaxgen.options import Count

Array = jax.Array

ZEROS = nn.initializers.zeros
FREQUENCIES = 256  # of the embedding of time


def modulated(x: Array, shift: Array, scale: Array) -> Array:
    """A normalised x, scaled and shifted (adaLN: Peebles & Xie 2022)."""
    return LayerNorm(affine=False, dtype=x.dtype)(x) * (1 + scale) + shift


def rotated(x: Array, angles: Array) -> Array:
    """Neighbouring channels of [n, T, heads, c] turned by angles float32 [T, c / 2], in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.reshape(x.shape).astype(x.dtype)


def rotary_angles(height: int, width: int, texts: int, axes: tuple[int, ...], longest: float = 10_000.0) -> np.ndarray:
    """Angles float32 [texts + height * width, sum(axes) / 2] of `rotated`: texts, all at position 0, then patches row
    by row. The first axes[0] channels are for a number that is 0 everywhere, then come those of the row and column."""
    rows, columns = np.indices((height, width)).reshape(2, -1)
    patches = np.stack([np.zeros_like(rows), rows, columns], -1)
    positions = np.concatenate([np.zeros((texts, 3), patches.dtype), patches])
    parts = [
        positions[:, i : i + 1] * longest ** -(np.arange(0, channels, 2) / channels) for i, channels in enumerate(axes)
    ]
    return np.concatenate(parts, -1).astype(np.float32)


def joined(h: Array) -> Array:
    """[n, T, heads, c] to [n, T, heads * c]."""
    return einops.rearrange(h, 'n t h c -> n t (h c)')


class Block(nn.Module):
    """What blocks of one and of two streams have in common."""

    heads: int
    qk_norm: bool
    dtype: Any

    def dense(self, features: int, name: str, init: Any = None) -> nn.Module:
        return Dense(features, init=init, dtype=self.dtype, name=name)

    def modulation(self, vector: Array, channels: int, parts: int, name: str) -> list[Array]:
        """`parts` numbers [n, 1, channels] each; zeros at first."""
        return jnp.split(self.dense(parts * channels, name, ZEROS)(vector)[:, None], parts, -1)

    def qkv(self, h: Array, stream: str, ending: str = '') -> Array:
        """Queries, keys and values [3, n, T, heads, c]."""
        channels = h.shape[-1]
        qkv = self.dense(3 * channels, f'{stream}qkv{ending}')(h)
        q, k, v = einops.rearrange(qkv, 'n t (p h c) -> p n t h c', p=3, h=self.heads)
        if self.qk_norm:
            q = RMSNorm(dtype=self.dtype, name=f'{stream}norm_q{ending}')(q)
            k = RMSNorm(dtype=self.dtype, name=f'{stream}norm_k{ending}')(k)
        return jnp.stack([q, k, v])

    def mlp(self, h: Array, stream: str) -> Array:
        channels = h.shape[-1]
        h = nn.gelu(self.dense(4 * channels, f'{stream}mlp1')(h), approximate=True)
        return self.dense(channels, f'{stream}mlp2')(h)


def attention(qkv: Array, angles: Array | None) -> Array:
    """Attention [n, T, heads * c] of [3, n, T, heads, c], queries and keys turned by `angles`."""
    q, k, v = qkv
    if angles is not None:
        q, k = rotated(q, angles), rotated(k, angles)
    return joined(attend(q, k, v))


class JointBlock(Block):
    """Attention over both streams, then an MLP of each: (image [n, T, C], text [n, S, C]) to the same.

    Attributes:
      last: nothing of the text is used behind this block's attention.
      dual: the image also attends to itself alone (Stable Diffusion 3.5 medium).
    """

    last: bool = False
    dual: bool = False

    @nn.compact
    def __call__(self, streams: tuple[Array, Array], vector: Array, angles: Array | None) -> tuple[Any, None]:
        image, text = streams
        channels, texts = image.shape[-1], text.shape[1]
        shift1, scale1, gate1, shift2, scale2, gate2, *more = self.modulation(
            vector, channels, 9 if self.dual else 6, 'image_modulation'
        )
        of_text = self.modulation(vector, channels, 2 if self.last else 6, 'text_modulation')
        qkv = [
            self.qkv(modulated(text, *of_text[:2]), 'text_'),
            self.qkv(modulated(image, shift1, scale1), 'image_'),
        ]
        both = attention(jnp.concatenate(qkv, 2), angles)
        h = image + gate1 * self.dense(channels, 'image_out')(both[:, texts:])
        if self.dual:
            shift, scale, gate = more
            alone = attention(self.qkv(modulated(image, shift, scale), 'image_', '2'), None)
            h = h + gate * self.dense(channels, 'image_out2')(alone)
        image = h + gate2 * self.mlp(modulated(h, shift2, scale2), 'image_')
        if not self.last:
            _, _, gate1, shift2, scale2, gate2 = of_text
            text = text + gate1 * self.dense(channels, 'text_out')(both[:, :texts])
            text = text + gate2 * self.mlp(modulated(text, shift2, scale2), 'text_')
        return (image, text), None


class SingleBlock(Block):
    """Attention and an MLP side by side, of texts and patches as one stream: [n, S + T, C] to the same."""

    @nn.compact
    def __call__(self, x: Array, vector: Array, angles: Array | None) -> tuple[Array, None]:
        channels = x.shape[-1]
        shift, scale, gate = self.modulation(vector, channels, 3, 'modulation')
        h = modulated(x, shift, scale)
        attended = attention(self.qkv(h, ''), angles)
        hidden = nn.gelu(self.dense(4 * channels, 'mlp1')(h), approximate=True)
        return x + gate * self.dense(channels, 'out')(jnp.concatenate([attended, hidden], -1)), None


def scanned(block: type, length: int, remat: bool) -> Any:
    """`length` blocks as one whose weights are stacked; vector and angles are the same for all."""
    return nn.scan(
        nn.remat(block, prevent_cse=False) if remat else block,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=(nn.broadcast, nn.broadcast),
        length=length,
    )


class Transformer(nn.Module):
    """What MMDiT and FLUX have in common.

    Attributes:
      channels: of a token; a multiple of `heads`.
      heads: of the attention.
      patch: height and width in pixels of the square that is one token; those of x are multiples of it.
      out_channels: 0: as x.
    """

    channels: Count = 1536
    heads: Count = 24
    patch: Count = 2
    out_channels: int = 0
    remat: bool = False
    dtype: Any = jnp.float32

    takes: ClassVar = ('vector', 'pooled', 'tokens', 'planes')
    token_features: ClassVar = 0  # tokens of any width, by a linear map of the network's own

    @property
    def vector_features(self) -> int:
        return self.channels

    @nn.nowrap
    def class_embedding(self, classes: int) -> nn.Module:
        """A module of int32 [n] in [0, classes) to [n, vector_features]."""
        return Embed(classes, self.channels, dtype=self.dtype)

    @nn.nowrap
    def time(self, t: Array, name: str = 'time', zeros: bool = False) -> Array:
        """The embedding [n, C] of times [n]; `zeros`: zeros at first."""
        return VectorEmbedding(self.channels, self.dtype, zeros, name=name)(cosines_first(t, FREQUENCIES))

    @nn.nowrap
    def vector(self, embedding: Array, vector: Array | None, pooled: Array | None) -> Array:
        """What modulates all blocks, [n, C]: the sum of the embedding of time and those of conditions."""
        if vector is not None:
            embedding = embedding + vector
        if pooled is not None:
            embedding = embedding + VectorEmbedding(self.channels, self.dtype, name='pooled')(pooled)
        return nn.silu(embedding)

    @nn.nowrap
    def text(self, tokens: Array | None, n: int) -> Array:
        """The stream of the text [n, S, C]."""
        if tokens is None:
            return jnp.zeros((n, 1, self.channels), self.dtype)
        return Dense(self.channels, dtype=self.dtype, name='text')(tokens.astype(self.dtype))

    @nn.nowrap
    def last(self, h: Array, vector: Array, height: int, width: int, features: int) -> Array:
        """The map [n, height * patch, width * patch, features] of tokens [n, height * width, C], float32."""
        modulation = Dense(2 * self.channels, init=ZEROS, dtype=self.dtype, name='modulation')(vector)[:, None]
        h = modulated(h, *jnp.split(modulation, 2, -1))
        h = Dense(self.patch**2 * features, init=ZEROS, dtype=self.dtype, name='last')(h).astype(jnp.float32)
        return self.map_of(h, height, width)

    @nn.nowrap
    def map_of(self, h: Array, height: int, width: int) -> Array:
        """The map of its patches, the channels innermost in each."""
        sides = dict(h=height, w=width, a=self.patch, b=self.patch)
        return einops.rearrange(h, 'n (h w) (a b c) -> n (h a) (w b) c', **sides)


class MMDiT(Transformer):
    """x_t, t, tokens of a text and a pooled vector to a map of x_t's height and width, float32. The defaults are those
    of Stable Diffusion 3 medium; 3.5 large: 2432, 38 blocks, 38 heads, qk_norm; 3.5 medium: qk_norm, 13 dual blocks.

    Attributes (more: see `Transformer`):
      blocks: of two streams.
      dual: number of the first blocks in which the image also attends to itself alone.
      qk_norm: queries and keys are normalised.
      largest: rows and columns of the table of positions; a smaller map takes the middle of it.
      unit: patches of the table that are one unit of position (192 over 64 in Stable Diffusion 3).
    """

    blocks: Count = 24
    dual: Annotated[int, '[0, inf)'] = 0
    qk_norm: bool = False
    largest: Count = 192
    unit: float = 3.0

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        vector: Array | None = None,
        tokens: Array | None = None,
        pooled: Array | None = None,
        *,
        train: bool = False,
    ) -> Array:
        """Args:
        x: float32 [n, H, W, C].
        t: [n], from 0 to 1000.
        vector: [n, channels], added to the embedding of time; None: there is no condition.
        tokens: [n, S, D], of any width; None: one of zeros.
        pooled: [n, d], of which two layers make another vector: pooled texts.
        """
        height, width = (side // self.patch for side in x.shape[1:3])
        patches = einops.rearrange(x, 'n (h a) (w b) c -> n (h w) (a b c)', a=self.patch, b=self.patch)
        image = Dense(self.channels, dtype=self.dtype, name='first')(patches)
        image = image + jnp.asarray(self.positions(height, width), self.dtype)
        vector = self.vector(self.time(t), vector, pooled)
        streams = image, self.text(tokens, len(x))
        own = (self.heads, self.qk_norm, self.dtype)
        if self.dual:
            streams, _ = scanned(JointBlock, self.dual, self.remat)(*own, dual=True, name='dual')(streams, vector, None)
        if rest := self.blocks - self.dual - 1:
            streams, _ = scanned(JointBlock, rest, self.remat)(*own, name='blocks')(streams, vector, None)
        (image, _), _ = JointBlock(*own, last=True, name='end')(streams, vector, None)
        return self.last(image, vector, height, width, self.out_channels or x.shape[-1])

    def positions(self, height: int, width: int) -> np.ndarray:
        """Positions float32 [height * width, C]: the middle of the table."""
        top, left = (self.largest - height) // 2, (self.largest - width) // 2
        return position_embedding(height, width, self.channels, (top / self.unit, left / self.unit), self.unit)


class Flux(Transformer):
    """x_t, t, tokens of a text, a pooled vector and, where it was distilled, a scale of guidance to a map of x_t's
    height and width, float32. The defaults are those of FLUX.1-dev; -schnell has no `distilled`.

    Attributes (more: see `Transformer`):
      blocks: of two streams.
      single_blocks: of one stream, behind them.
      axes: channels of a head that are turned by 0, by the row and by the column; they sum to a head's width.
      distilled: the scale of guidance is embedded as time is, by zeros at first.
    """

    channels: Count = 3072
    heads: Count = 24
    blocks: Count = 19
    single_blocks: Count = 38
    axes: tuple[int, ...] = (16, 56, 56)
    distilled: bool = True

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        vector: Array | None = None,
        tokens: Array | None = None,
        pooled: Array | None = None,
        guidance: Array | None = None,
        *,
        train: bool = False,
    ) -> Array:
        """Args:
        x: float32 [n, H, W, C].
        t: [n], from 0 to 1000.
        vector: [n, channels], added to the embedding of time; None: there is no condition.
        tokens: [n, S, D], of any width; None: one of zeros.
        pooled: [n, d], of which two layers make another vector: pooled texts.
        guidance: scale [n] of a distilled network; None: 1.
        """
        height, width = (side // self.patch for side in x.shape[1:3])
        # A patch's channels are outermost here, as latents are packed.
        patches = einops.rearrange(x, 'n (h a) (w b) c -> n (h w) (c a b)', a=self.patch, b=self.patch)
        image = Dense(self.channels, dtype=self.dtype, name='first')(patches)
        text = self.text(tokens, len(x))
        embedding = self.time(t)
        if self.distilled:
            scale = jnp.ones(len(x)) if guidance is None else guidance
            embedding = embedding + self.time(1000 * scale, 'guidance', zeros=True)
        vector = self.vector(embedding, vector, pooled)
        texts = text.shape[1]
        angles = jnp.asarray(rotary_angles(height, width, texts, self.axes))
        own = (self.heads, True, self.dtype)
        joint, single = (
            scanned(JointBlock, self.blocks, self.remat),
            scanned(SingleBlock, self.single_blocks, self.remat),
        )
        (image, text), _ = joint(*own, name='blocks')((image, text), vector, angles)
        both, _ = single(*own, name='single')(jnp.concatenate([text, image], 1), vector, angles)
        return self.last(both[:, texts:], vector, height, width, self.out_channels or x.shape[-1])

    @nn.nowrap
    def map_of(self, h: Array, height: int, width: int) -> Array:
        """The map of its patches, the channels outermost in each."""
        sides = dict(h=height, w=width, a=self.patch, b=self.patch)
        return einops.rearrange(h, 'n (h w) (c a b) -> n (h a) (w b) c', **sides)
