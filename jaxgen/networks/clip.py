"""The two towers of CLIP (Radford et al. 2021, arXiv 2103.00020): transformers over the tokens of a text and over the
patches of an image, each with a projection to one space in which a text lies near its image."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.networks.attention import attend
from jaxgen.networks.layers import Dense, Embed, LayerNorm
from jaxgen.options import Count, OneOf

Array = jax.Array

NORMAL = nn.initializers.normal

# Mean and standard deviation of a channel in [0, 1] by which images are normalised.
NORMALISATIONS = {
    'none': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    'clip': ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def normalised(images: Array, kind: str) -> Array:
    """Images [n, H, W, C] in [-1, 1] by the mean and deviation of each channel."""
    mean, deviation = (np.asarray(row, np.float32)[: images.shape[-1]] for row in NORMALISATIONS[kind])
    return (images / 2 + 0.5 - mean) / deviation


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the approximation of GELU that OpenAI's weights were trained with."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS = {'quick_gelu': quick_gelu, 'gelu': lambda x: nn.gelu(x, approximate=False)}


class Block(nn.Module):
    """Self-attention, then an MLP, each of a normalised input and added to it: [n, T, C] to the same.

    The carry is (tokens, those before the last block); `index` numbers the blocks of a scan over them.
    """

    heads: int
    hidden: int
    causal: bool
    activation: str
    kept: int
    dtype: Any

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        x, before = carry
        before = jnp.where(index == self.kept, x, before)
        channels = x.shape[-1]
        h = LayerNorm(eps=1e-5, dtype=self.dtype, name='norm1')(x)
        qkv = Dense(3 * channels, init=NORMAL(channels**-0.5), dtype=self.dtype, name='qkv')(h)
        q, k, v = (einops.rearrange(x, 'n t (heads c) -> n t heads c', heads=self.heads) for x in jnp.split(qkv, 3, -1))
        h = attend(q, k, v, causal=self.causal)
        h = einops.rearrange(h, 'n t heads c -> n t (heads c)')
        x = x + Dense(channels, init=NORMAL(channels**-0.5), dtype=self.dtype, name='out')(h)
        h = LayerNorm(eps=1e-5, dtype=self.dtype, name='norm2')(x)
        h = Dense(self.hidden, init=NORMAL((2 * channels) ** -0.5), dtype=self.dtype, name='mlp1')(h)
        h = ACTIVATIONS[self.activation](h)
        return (x + Dense(channels, init=NORMAL(channels**-0.5), dtype=self.dtype, name='mlp2')(h), before), None


def apply_blocks(module: Any, x: Array, causal: bool) -> tuple[Array, Array]:
    """(tokens after all blocks of a tower, tokens before the last one), a scan over the stacked weights."""
    scanned = nn.scan(
        nn.remat(Block, prevent_cse=False) if module.remat else Block,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=module.blocks,
    )
    hidden = module.hidden or 4 * module.channels
    blocks = scanned(module.heads, hidden, causal, module.activation, module.blocks - 1, module.dtype, name='blocks')
    return blocks((x, x), jnp.arange(module.blocks))[0]


def projected(module: Any, pooled: Array) -> Array:
    """The embedding [n, features] of a tower; `pooled` [n, C] itself where it has no projection."""
    if not module.features:
        return pooled
    init = NORMAL(module.channels**-0.5)
    return Dense(module.features, bias=False, init=init, dtype=module.dtype, name='project')(pooled)


class TextOutput(NamedTuple):
    """What a text tower computes of texts."""

    last: Array  # [n, T, C], of each token, normalised: the context of Stable Diffusion 1
    before: Array  # [n, T, C], of each token before the last block, not normalised: that of SDXL and SD 3
    before_normalised: Array  # [n, T, C], the same by the last norm: that of Stable Diffusion 2
    pooled: Array  # [n, C], `last` at the end of the text
    embedding: Array  # [n, D], its projection; `pooled` where there is none


class TextTower(nn.Module):
    """Tokens of texts int32 [n, T] to `TextOutput`; a token attends to itself and those before it.

    Published: ViT-B/32 and B/16 512, 12, 8 with 512 dimensions, ViT-L/14 768, 12, 12 with 768; OpenCLIP's ViT-H/14
    1024, 24, 16 with 1024 and bigG/14 1280, 32, 20 with 1280, both of exact GELU; vocabulary 49,408, length 77.

    Attributes:
      vocabulary: number of tokens.
      length: most tokens of a text.
      channels, blocks, heads: width of a token, depth, and heads of attention.
      hidden: width of the MLPs; 0: four times the channels.
      features: dimensions of the embedding; 0: there is no projection.
      activation: of the MLPs: 'quick_gelu', OpenAI's; 'gelu', the exact one.
      end: number of the token that ends a text, the first of which is the pooled one; -1: the largest in the text.
    """

    vocabulary: Count = 49_408
    length: Count = 77
    channels: Count = 512
    blocks: Count = 12
    heads: Count = 8
    hidden: Annotated[int, '[0, inf)'] = 0
    features: Annotated[int, '[0, inf)'] = 512
    activation: Annotated[str, OneOf(*ACTIVATIONS)] = 'quick_gelu'
    end: Annotated[int, '[-1, inf)'] = -1
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, added: Array | None = None) -> TextOutput:
        """Args:
        added: [m, channels], embeddings of the tokens behind the vocabulary.
        """
        chex.assert_rank(tokens, 2)
        embed = Embed(self.vocabulary, self.channels, embedding_init=NORMAL(0.02), dtype=self.dtype, name='tokens')
        x = embed(tokens, added)
        tokens = tokens if added is None else jnp.where(tokens < self.vocabulary, tokens, -1)  # none ends a text
        positions = self.param('positions', NORMAL(0.01), (self.length, self.channels))
        x = x + positions[: tokens.shape[1]].astype(self.dtype)
        x, before = apply_blocks(self, x, causal=True)
        norm = LayerNorm(eps=1e-5, dtype=self.dtype, name='norm')
        last = norm(x)
        # Not by an index, whose gradient adds up in no fixed order on GPUs.
        place = (tokens if self.end < 0 else tokens == self.end).argmax(-1)
        end = jax.nn.one_hot(place, tokens.shape[1], dtype=last.dtype)
        pooled = jnp.einsum('nt,ntc->nc', end, last, precision='highest')
        return TextOutput(last, before, norm(before), pooled, projected(self, pooled))


class VisionOutput(NamedTuple):
    """What a vision tower computes of images."""

    last: Array  # [n, 1 + patches, C], of the class token and each patch, not normalised
    before: Array  # [n, 1 + patches, C], before the last block
    pooled: Array  # [n, C], of the class token, normalised
    embedding: Array  # [n, D], its projection; `pooled` where there is none


class VisionTower(nn.Module):
    """Images float [n, H, W, C], normalised as the weights want it, to `VisionOutput`.

    Published: ViT-B/32 and B/16 768, 12, 12 with 512 dimensions, ViT-L/14 1024, 24, 16 with 768; OpenCLIP's ViT-H/14
    1280, 32, 16 with 1024 and bigG/14 1664, 48, 16, hidden 8192, with 1280.

    Attributes:
      patch: side in pixels of the square that is one token; H and W are multiples of it.
      channels, blocks, heads, hidden, features, activation: as `TextTower`'s.
    """

    patch: Count = 32
    channels: Count = 768
    blocks: Count = 12
    heads: Count = 12
    hidden: Annotated[int, '[0, inf)'] = 0
    features: Annotated[int, '[0, inf)'] = 512
    activation: Annotated[str, OneOf(*ACTIVATIONS)] = 'quick_gelu'
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> VisionOutput:
        chex.assert_rank(images, 4)
        patches = einops.rearrange(images, 'n (h a) (w b) c -> n (h w) (a b c)', a=self.patch, b=self.patch)
        x = Dense(self.channels, bias=False, dtype=self.dtype, name='patches')(patches)
        start = self.param('class', NORMAL(self.channels**-0.5), (self.channels,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(start, (len(x), 1, self.channels)), x], 1)
        positions = self.param('positions', NORMAL(self.channels**-0.5), (x.shape[1], self.channels))
        x = LayerNorm(eps=1e-5, dtype=self.dtype, name='norm1')(x + positions.astype(self.dtype))
        x, before = apply_blocks(self, x, causal=False)
        pooled = LayerNorm(eps=1e-5, dtype=self.dtype, name='norm2')(x[:, 0])
        return VisionOutput(x, before, pooled, projected(self, pooled))
