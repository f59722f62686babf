"""The transformer of VAR (Tian et al. 2024, arXiv 2404.02905, section 3.3), which predicts codes scale by scale.

A token is one position of one scale. Its input is the sum of all coarser scales there, and it attends to the tokens of
its own scale and of the coarser ones: all codes of a scale are predicted at once.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.networks.attention import attend, empty_cache
from jaxgen.networks.layers import Dense, Embed, LayerNorm, look_up

Array = jax.Array
Cache = tuple[Array, Array]

MAX_LOG_SCALE = math.log(100)  # of the factor of normalised queries


def modulation_init(std: float, gate: float) -> nn.initializers.Initializer:
    """Initialiser of a layer with [..., 6 C] outputs, in the order of `Block`: normal, with `gate` times this standard
    deviation for the gates and half of it for scales and shifts."""

    def init(rng, shape, dtype=jnp.float32):
        factor = jnp.repeat(jnp.array([gate, gate, 0.5, 0.5, 0.5, 0.5]), shape[-1] // 6)
        return std * factor * jax.random.normal(rng, shape, dtype)

    return init


def normalised(x: Array) -> Array:
    """x with Euclidean norm 1 along the last axis, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


class Block(nn.Module):
    """Self-attention, then an MLP, with adaptive norms: tokens [n, T, C], condition [n, 6 C or C] to tokens.

    With a cache, the input is the tokens of one scale, and they attend to those of coarser scales too. The cache is
    that of all blocks and scales, [blocks, n, T of all scales, heads, C / heads] each of keys and values, of which this
    is block `block`. It is carried through the blocks and from scale to scale, so that it is written in place. The
    second result is None, since `nn.scan` asks for two.

    Attributes:
      blocks: of the whole network.
      std: of the initial weights; those of the last layer of a branch are smaller by (2 blocks)^1/2.
      gate: see `modulation_init`.
      unit_queries: queries and keys have norm 1, with a learned scale for each head.
      shared: `condition` has the 6 C parameters of the adaptive norms, to which a learned table is added.
      drops_path: whole branches are dropped in training, with probability `drop_path`.
      lengths: number of tokens of each scale.
      begin: position of the first of the tokens, with a cache.
    """

    heads: int
    blocks: int
    std: float
    gate: float
    unit_queries: bool
    shared: bool
    dropout: float
    drops_path: bool
    train: bool
    dtype: Any
    lengths: tuple[int, ...]
    begin: int = 0

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Cache | None],
        block: Array | None,
        drop_path: Array,
        condition: Array,
    ):
        x, cache = carry
        n, tokens, channels = x.shape
        init, last = nn.initializers.normal(self.std), nn.initializers.normal(self.std / math.sqrt(2 * self.blocks))
        modulation = modulation_init(self.std, self.gate)
        if self.shared:
            # A table of this block on top of the common modulation of all blocks.
            table = self.param('modulation', modulation_init(channels**-0.5, self.gate), (6 * channels,))
            m = condition + table.astype(self.dtype)
        else:
            m = Dense(6 * channels, init=modulation, dtype=self.dtype, name='modulation')(condition)
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.split(m[:, None], 6, -1)  # [n, 1, C] each

        def norm(x, scale, shift, name):
            return LayerNorm(affine=False, dtype=self.dtype, name=name)(x) * (1 + scale) + shift

        def branch(h):
            """Dropout of features, and of the whole branch of some examples (stochastic depth, Huang et al. 2016)."""
            h = nn.Dropout(self.dropout, deterministic=not self.train)(h)
            if not (self.drops_path and self.train):
                return h
            kept = jax.random.bernoulli(self.make_rng('dropout'), 1 - drop_path, (n, 1, 1))
            return jnp.where(kept, h / (1 - drop_path).astype(self.dtype), 0)

        h = norm(x, scale1, shift1, 'norm1')
        qkv = Dense(3 * channels, bias=False, init=init, dtype=self.dtype, name='qkv')(h)
        bias = self.param('bias', nn.initializers.zeros, (2, channels)).astype(self.dtype)  # keys need none
        q, k, v = jnp.split(qkv, 3, -1)
        q, k, v = (
            einops.rearrange(a, 'n t (heads c) -> n t heads c', heads=self.heads) for a in (q + bias[0], k, v + bias[1])
        )
        scale = 0.25 * (channels // self.heads) ** -0.5
        if self.unit_queries:
            log_scale = self.param('log_scale', nn.initializers.constant(math.log(4)), (self.heads,))
            q = normalised(q) * jnp.exp(jnp.minimum(log_scale, MAX_LOG_SCALE))[:, None]
            q, k, scale = q.astype(self.dtype), normalised(k).astype(self.dtype), 1.0
        if cache is None:
            scale_of = np.repeat(np.arange(len(self.lengths)), self.lengths)
            mask = scale_of[:, None] >= scale_of  # [T, T]
        else:  # no tokens of finer scales are there yet
            mask = None
            cache = tuple(
                jax.lax.dynamic_update_slice(every, new[None].astype(every.dtype), (block, 0, self.begin, 0, 0))
                for every, new in zip(cache, (k, v), strict=True)
            )
            k, v = (every[block][:, : self.begin + tokens] for every in cache)
        h = attend(q, k, v, mask=mask, scale=scale)  # [n, T, heads, C / heads]
        h = einops.rearrange(h, 'n t heads c -> n t (heads c)')
        h = Dense(channels, init=last, dtype=self.dtype, name='out')(h)
        x = x + branch(gate1 * h)

        h = norm(x, scale2, shift2, 'norm2')
        h = nn.gelu(Dense(4 * channels, init=init, dtype=self.dtype, name='mlp1')(h), approximate=True)
        h = Dense(channels, init=last, dtype=self.dtype, name='mlp2')(h)
        return (x + branch(gate2 * h), cache), None


class VARTransformer(nn.Module):
    """Logits of the codes of every scale, given the sum of the coarser scales and a class.

    Attributes:
      vocabulary: number of codes.
      grids: (rows, columns) of each scale, coarse first.
      channels, blocks, heads: published with d = 16, 20, 24, 30, 36 blocks: 64 d channels, d heads.
      classes: number of classes; label `classes` is the null label.
      dropout, drop_path: of branches, in training; the second drops whole ones, with a probability from 0 in the first
        block to this in the last. Published: 0 and d / 240.
      unit_queries: queries and keys have norm 1, and each head's queries are then scaled by a learned number.
      shared: one layer computes the adaptive norms' parameters of all blocks from the class, and each block adds a
        learned table.
      gate: of the initial gates of the branches, where scales and shifts have 0.5, see `modulation_init`.
    """

    vocabulary: int
    grids: tuple[tuple[int, int], ...]
    channels: int = 64
    blocks: int = 4
    heads: int = 4
    classes: int = 0
    dropout: float = 0.0
    drop_path: float = 0.0
    unit_queries: bool = True
    shared: bool = False
    gate: float = 1e-3
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, inputs: Array | None, label: Array, cache: Cache | None = None, scale: int = 0, *, train: bool = False
    ):
        """Args:
          inputs: float32 [n, T, D], the sum of the scales before a token's own at its position, scale by scale: of all
            scales but the first, which has none before it. With a cache those of the scale `scale`, None of the first.
          label: int32 [n], from 0 to `classes`.
          cache: of `empty_cache`, or the result at the scale before.

        Returns:
          float32 logits [n, T of all scales, vocabulary]; with a cache (logits of this scale's tokens, cache).
        """
        chex.assert_rank(label, 1)
        channels, lengths = self.channels, [h * w for h, w in self.grids]
        std = (3 * channels) ** -0.5
        init = nn.initializers.normal(std)
        condition = Embed(self.classes + 1, channels, embedding_init=init, dtype=self.dtype, name='label')(label)
        parts = []
        if scale == 0:
            start = self.param('start', init, (lengths[0], channels)).astype(self.dtype)
            parts.append(condition[:, None] + start)
        if inputs is not None:  # 'words' and 'levels' are names in saved runs
            parts.append(Dense(channels, init=init, dtype=self.dtype, name='words')(inputs))
        x = jnp.concatenate(parts, 1)  # [n, T, C]
        scale_of = np.repeat(np.arange(len(lengths)), lengths)  # the scale of each token
        embedding = self.param('positions', init, (len(scale_of), channels))
        embedding += look_up(self.param('levels', init, (len(lengths), channels)), scale_of)
        begin = sum(lengths[:scale])
        x = x + embedding[begin : begin + x.shape[1]].astype(self.dtype)

        condition = nn.silu(condition)  # once here, as every block would begin with it
        modulation = condition
        if self.shared:
            modulation = Dense(6 * channels, init=init, dtype=self.dtype, name='modulation')(condition)
        stack = nn.scan(
            nn.remat(Block, prevent_cse=False) if self.remat else Block,
            variable_axes={'params': 0},
            split_rngs={'params': True, 'dropout': True},
            in_axes=(0, 0, nn.broadcast),
            length=self.blocks,
        )(
            heads=self.heads, blocks=self.blocks, std=std, gate=self.gate, unit_queries=self.unit_queries,
            shared=self.shared, dropout=self.dropout, drops_path=self.drop_path > 0, train=train, dtype=self.dtype,
            lengths=tuple(lengths), begin=begin, name='blocks',
        )  # fmt: skip
        number = None if cache is None else jnp.arange(self.blocks)
        rates = jnp.linspace(0, self.drop_path, self.blocks)
        (x, new), _ = stack((x, cache), number, rates, modulation)

        half = nn.initializers.normal(0.5 * std)
        m = Dense(2 * channels, init=half, dtype=self.dtype, name='head_modulation')(condition)
        gain, shift = jnp.split(m[:, None], 2, -1)
        x = LayerNorm(affine=False, dtype=self.dtype, name='norm')(x) * (1 + gain) + shift
        head = Dense(self.vocabulary, init=nn.initializers.normal(0.02 * std), dtype=self.dtype, name='head')
        logits = head(x).astype(jnp.float32)
        return logits if cache is None else (logits, new)

    def empty_cache(self, n: int) -> Cache:
        """The cache before the first scale: keys and values, [blocks, n, T of all scales, heads, C / heads] each."""
        shape = (self.blocks, n, sum(h * w for h, w in self.grids), self.heads, self.channels // self.heads)
        return empty_cache(shape, self.dtype)
