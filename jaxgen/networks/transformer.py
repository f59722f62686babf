"""Transformers over sequences of codes: causal ones that predict the next code, and ones that predict masked codes."""

from __future__ import annotations

from typing import Any

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.contract import Family
from jaxgen.errors import UserError
from jaxgen.networks.attention import attend, attend_cached, empty_cache
from jaxgen.networks.layers import Dense, Embed, LayerNorm

Array = jax.Array
Cache = tuple[Array, Array]  # keys and values

NORMAL = nn.initializers.normal(0.02)


class Block(nn.Module):
    """Self-attention, then an MLP: tokens [n, T, C] to the same.

    With a cache, the input is the one token at `index`, [n, 1, C], and attends to the keys and values of the tokens up
    to it. The cache is that of all blocks, [blocks, n, heads, T, C / heads] each, of which this is block `block`. It is
    carried through the blocks and from token to token: a loop's carry is written in place, where its stacked outputs
    are a copy of the whole for every token. The second result is None, since `nn.scan` asks for two.

    Attributes:
      causal: a token attends to itself and those before it, else to all.
      post_norm: each residual sum is normalised (Vaswani et al. 2017; BERT), else each branch's input (GPT-2).
      exact_gelu: GELU by the error function, else its approximation by tanh.
      eps: of the norms.
      attention_dropout: of the weights of attention, in training.
    """

    heads: int
    dropout: float
    train: bool
    causal: bool
    post_norm: bool
    exact_gelu: bool
    eps: float
    dtype: Any
    attention_dropout: float = 0.0

    @nn.compact
    def __call__(self, carry: tuple[Array, Cache | None], block: Array | None, index: Array | None):
        x, cache = carry
        channels = x.shape[-1]

        def norm(name):
            return LayerNorm(eps=self.eps, dtype=self.dtype, name=name)

        def dropped(h):
            return nn.Dropout(self.dropout, deterministic=not self.train)(h)

        h = x if self.post_norm else norm('norm1')(x)
        qkv = Dense(3 * channels, init=NORMAL, dtype=self.dtype, name='qkv')(h)
        q, k, v = (einops.rearrange(x, 'n t (heads c) -> n t heads c', heads=self.heads) for x in jnp.split(qkv, 3, -1))
        if self.attention_dropout and self.train:
            h = attend(q, k, v, causal=self.causal, drop=nn.Dropout(self.attention_dropout, deterministic=False))
        elif cache is None:
            h = attend(q, k, v, causal=self.causal)  # [n, T, heads, C / heads]
        else:
            keys, values = cache = tuple(
                jax.lax.dynamic_update_slice(
                    all_, jnp.swapaxes(new, 1, 2)[None].astype(all_.dtype), (block, 0, 0, index, 0)
                )
                for all_, new in zip(cache, (k, v), strict=True)
            )
            h = attend_cached(q, keys[block], values[block], index + 1)
        h = einops.rearrange(h, 'n t heads c -> n t (heads c)')
        h = dropped(Dense(channels, init=NORMAL, dtype=self.dtype, name='out')(h))
        x = norm('norm1')(x + h) if self.post_norm else x + h

        h = x if self.post_norm else norm('norm2')(x)
        h = nn.gelu(Dense(4 * channels, init=NORMAL, dtype=self.dtype, name='mlp1')(h), approximate=not self.exact_gelu)
        h = dropped(Dense(channels, init=NORMAL, dtype=self.dtype, name='mlp2')(h))
        return ((norm('norm2')(x + h) if self.post_norm else x + h), cache), None


def apply_blocks(module, x: Array, cache, index, **options) -> tuple[Array, Any]:
    """Output and cache of `module.blocks` blocks, a scan over their stacked weights; see `Block`."""
    scanned = nn.scan(
        nn.remat(Block, prevent_cse=False) if module.remat else Block,
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=(0, nn.broadcast),
        length=module.blocks,
    )
    blocks = scanned(
        heads=module.heads,
        dropout=module.dropout,
        attention_dropout=module.attention_dropout,
        dtype=module.dtype,
        **options,
        name='blocks',
    )
    (x, cache), _ = blocks((x, cache), None if cache is None else jnp.arange(module.blocks), index)
    return x, cache


class CausalTransformer(nn.Module):
    """GPT-2's transformer (Radford et al. 2019) as VQGAN has it: tokens [n, T] to logits of the token after each.

    Attributes:
      vocabulary: number of tokens.
      length: maximal number of tokens of a sequence.
      channels, blocks, heads: published for ImageNet: 1536, 48, 24.
      dropout: of embeddings and branches, in training.
      attention_dropout: of the weights of attention, in training.
    """

    vocabulary: int
    length: int
    channels: int = 64
    blocks: int = 4
    heads: int = 4
    dropout: float = 0.0
    attention_dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, cache=None, index: Array | None = None, *, train: bool = False):
        """Args:
          tokens: int32 [n, T] with T <= length; with a cache [n, 1], the token at `index`.
          cache: of `empty_cache`, or None.

        Returns:
          float32 logits [n, T, vocabulary]; with a cache (logits [n, 1, vocabulary], cache).
        """
        chex.assert_rank(tokens, 2)
        x = Embed(self.vocabulary, self.channels, embedding_init=NORMAL, dtype=self.dtype, name='tokens')(tokens)
        positions = self.param('positions', nn.initializers.zeros, (self.length, self.channels))
        own = positions[: tokens.shape[1]] if cache is None else jax.lax.dynamic_slice_in_dim(positions, index, 1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x + own.astype(self.dtype))
        options = dict(train=train, causal=True, post_norm=False, exact_gelu=True, eps=1e-5)
        x, new = apply_blocks(self, x, cache, index, **options)
        x = LayerNorm(eps=1e-5, dtype=self.dtype, name='norm')(x)
        logits = Dense(self.vocabulary, bias=False, init=NORMAL, dtype=self.dtype, name='head')(x).astype(jnp.float32)
        return logits if cache is None else (logits, new)

    def empty_cache(self, n: int, length: int) -> Cache:
        """The cache before the first token: keys and values, [blocks, n, heads, length, channels / heads] each."""
        shape = (self.blocks, n, self.heads, length, self.channels // self.heads)
        return empty_cache(shape, self.dtype)


class MaskedTransformer(nn.Module):
    """BERT's transformer (Devlin et al. 2018) as MaskGIT has it: tokens [n, T], some of them masked, to logits of each.

    The head's weights are those of the embedding.

    Attributes:
      vocabulary: number of tokens.
      length: number of tokens of a sequence.
      channels, blocks, heads: published for ImageNet: 768, 24, 16.
      dropout: of embeddings and branches, in training.
      attention_dropout: of the weights of attention, in training.
    """

    vocabulary: int
    length: int
    channels: int = 64
    blocks: int = 4
    heads: int = 4
    dropout: float = 0.1
    attention_dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, *, train: bool = False) -> Array:
        """tokens: int32 [n, length] -> float32 logits [n, length, vocabulary]."""
        chex.assert_shape(tokens, (None, self.length))
        init = nn.initializers.truncated_normal(0.02)
        embed = Embed(self.vocabulary, self.channels, embedding_init=init, dtype=self.dtype, name='tokens')
        positions = self.param('positions', init, (self.length, self.channels)).astype(self.dtype)
        x = LayerNorm(eps=1e-12, dtype=self.dtype, name='embedded')(embed(tokens) + positions)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x, _ = apply_blocks(self, x, None, None, train=train, causal=False, post_norm=True, exact_gelu=False, eps=1e-12)
        x = nn.gelu(Dense(self.channels, init=init, dtype=self.dtype, name='head')(x), approximate=True)
        x = LayerNorm(eps=1e-12, dtype=self.dtype, name='norm')(x)
        bias = self.param('bias', nn.initializers.zeros, (self.vocabulary,))
        return embed.attend(x).astype(jnp.float32) + bias


def kernels_as(weights: Any, dtype: Any) -> Any:
    """Weights whose kernels are of the dtype that layers compute in, which is what layers make of them: done once in
    front of a loop over tokens, and not for every one."""

    def one(path, x):
        return x.astype(dtype) if path[-1].key == 'kernel' else x

    return jax.tree_util.tree_map_with_path(one, weights)


def check_prior(first: Family | None, channels: int, heads: int) -> None:
    """Raises UserError where a transformer of this size cannot be the prior of codes of the stage `first`."""
    if first is None or not first.latents.grids:
        raise UserError('config.stages.first must be the run of a family with codes: vqvae or vqgan')
    if channels % heads:
        raise UserError(f'config.model.channels = {channels} must be a multiple of config.model.heads = {heads}')


def flatten(codes: tuple[Array, ...]) -> Array:
    """Grids of codes, [n, h, w] each, as one sequence [n, T]: one grid after another, row by row."""
    return jnp.concatenate([einops.rearrange(grid, 'n h w -> n (h w)') for grid in codes], 1)


def unflatten(sequence: Array, grids: tuple[tuple[int, int], ...]) -> tuple[Array, ...]:
    """The grids of a sequence [n, T]."""
    ends = np.cumsum([h * w for h, w in grids])[:-1]
    parts = jnp.split(sequence, ends, 1)
    return tuple(part.reshape(-1, h, w) for part, (h, w) in zip(parts, grids, strict=True))


def truncation_settings(temperature: float, top_p: float) -> dict[str, float]:
    """Those of temperature and top_p that are on, by name; see `filtered` and `Family.settings`."""
    return ({'temperature': temperature} if temperature else {}) | ({'top_p': top_p} if top_p < 1 else {})


def truncated(logits: Array, top_k: int, settings: dict[str, Any]) -> Array:
    """`filtered` by the numbers of `truncation_settings`, which may be traced."""
    return filtered(logits, settings.get('temperature', 0), top_k, settings.get('top_p', 1))


def filtered(logits: Array, temperature: Any = 1.0, top_k: int = 0, top_p: Any = 1.0) -> Array:
    """Logits [..., V] of the truncated distribution, -inf for the tokens that are left out.

    Args:
      temperature: logits are divided by it; 0, not traced: the likeliest token alone.
      top_k: only the k likeliest tokens; 0: all.
      top_p: only the likeliest tokens that together have at least this probability, the nucleus (Holtzman et al. 2019,
        arXiv 1904.09751); 1, not traced: all.
    """
    # At temperature 0 ties would leave several tokens: the first of them is taken.
    logits = (
        logits / temperature
        if isinstance(temperature, jax.Array) or temperature
        else jnp.where(jnp.arange(logits.shape[-1]) == logits.argmax(-1)[..., None], 0.0, -jnp.inf)
    )
    if 0 < top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][..., -1:], -jnp.inf, logits)
    if isinstance(top_p, jax.Array) or top_p < 1:
        order = jnp.argsort(-logits, -1)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, -1))
        # A token is kept if those before it have less than top_p together: the likeliest always is.
        keep = jnp.cumsum(probabilities, -1) - probabilities < top_p
        inverse = jnp.argsort(order, -1)
        logits = jnp.where(jnp.take_along_axis(keep, inverse, -1), logits, -jnp.inf)
    return logits


def categorical(keys: Array, logits: Array) -> Array:
    """Draws int32 [n, ...] from logits [n, ..., V], each example by its own key of keys [n]."""
    return jax.vmap(lambda key, row: jax.random.categorical(key, row))(keys, logits).astype(jnp.int32)
