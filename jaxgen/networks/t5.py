"""The encoder of T5 1.1 (Raffel et al. 2020, arXiv 1910.10683; gated GELU: Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import math
from typing import Annotated, Any

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.networks.attention import attend
from jaxgen.networks.layers import Dense, Embed, RMSNorm
from jaxgen.options import Count

Array = jax.Array

NORMAL = nn.initializers.normal


def distance_buckets(queries: int, keys: int, buckets: int, furthest: int) -> np.ndarray:
    """Bucket int32 [queries, keys] of each distance key - query: half of the buckets are for keys behind the query;
    of a half the first half are single distances, the rest grow as the logarithm up to `furthest` (section 2.1)."""
    distance = np.arange(keys)[None] - np.arange(queries)[:, None]
    half, exact = buckets // 2, buckets // 4
    far = np.maximum(np.abs(distance), 1).astype(np.float32)
    log = np.log(far / np.float32(exact)) / np.float32(math.log(furthest / exact)) * (half - exact)
    large = np.minimum(exact + log.astype(np.int32), half - 1)
    return (np.where(distance > 0, half, 0) + np.where(np.abs(distance) < exact, np.abs(distance), large)).astype(
        np.int32
    )


class Block(nn.Module):
    """Self-attention with a bias of distances, then a gated MLP: [n, T, C] to the same. Logits are not scaled."""

    heads: int
    head_channels: int
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, bias: Array, mask: Array | None) -> tuple[Array, None]:
        channels, inner = x.shape[-1], self.heads * self.head_channels
        h = RMSNorm(dtype=self.dtype, name='norm1')(x)
        qkv = Dense(3 * inner, bias=False, init=NORMAL(channels**-0.5), dtype=self.dtype, name='qkv')(h)
        q, k, v = (einops.rearrange(x, 'n t (heads c) -> n t heads c', heads=self.heads) for x in jnp.split(qkv, 3, -1))
        h = attend(q, k, v, bias=bias.astype(self.dtype), mask=mask, scale=1.0)
        h = einops.rearrange(h, 'n t heads c -> n t (heads c)')
        x = x + Dense(channels, bias=False, init=NORMAL(inner**-0.5), dtype=self.dtype, name='out')(h)
        h = RMSNorm(dtype=self.dtype, name='norm2')(x)
        gate = Dense(self.hidden, bias=False, init=NORMAL(channels**-0.5), dtype=self.dtype, name='gate')(h)
        h = Dense(self.hidden, bias=False, init=NORMAL(channels**-0.5), dtype=self.dtype, name='mlp1')(h)
        h = nn.gelu(gate, approximate=True) * h
        return x + Dense(channels, bias=False, init=NORMAL(self.hidden**-0.5), dtype=self.dtype, name='mlp2')(h), None


class T5Encoder(nn.Module):
    """Tokens of texts int32 [n, T] to their features [n, T, channels].

    Published: XXL 4096, 24 blocks, 64 heads of 64, hidden 10,240; XL 2048, 24, 32 of 64, 5,120; vocabulary 32,128.

    Attributes:
      vocabulary: number of tokens.
      channels, blocks, heads: width of a token, depth, and heads of attention.
      head_channels: width of a head.
      hidden: width of the MLPs.
      buckets, furthest: of distances between tokens that have a bias of their own, and the distance from which on all
        share one.
      length: tokens of a text as a run reads it; the network has no positions, and takes any number.
    """

    vocabulary: Count = 32_128
    channels: Count = 512
    blocks: Count = 8
    heads: Count = 6
    head_channels: Count = 64
    hidden: Count = 1024
    buckets: Annotated[int, '[4, inf)'] = 32
    furthest: Count = 128
    length: Count = 512
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, mask: Array | None = None, added: Array | None = None) -> Array:
        """Args:
        mask: bool [n, T], true where there is a token; None: all are attended to, as SD 3 and FLUX do it.
        added: [m, channels], embeddings of the tokens behind the vocabulary.
        """
        chex.assert_rank(tokens, 2)
        embed = Embed(self.vocabulary, self.channels, embedding_init=NORMAL(1.0), dtype=self.dtype, name='tokens')
        x = embed(tokens, added)
        table = self.param('distances', NORMAL(self.channels**-0.5), (self.buckets, self.heads))
        buckets = distance_buckets(tokens.shape[1], tokens.shape[1], self.buckets, self.furthest)
        bias = jnp.moveaxis(table[buckets], -1, 0)[None]  # [1, heads, T, T]
        mask = mask if mask is None else mask[:, None, None]
        scanned = nn.scan(
            nn.remat(Block, prevent_cse=False) if self.remat else Block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.blocks,
        )
        x, _ = scanned(self.heads, self.head_channels, self.hidden, self.dtype, name='blocks')(x, bias, mask)
        return RMSNorm(dtype=self.dtype, name='norm')(x)
