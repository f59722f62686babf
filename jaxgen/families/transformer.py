"""Transformer over codes: the second stage of VQGAN (Esser et al. 2020, arXiv 2012.09841).

`config.stages.first`, a quantising autoencoder, encodes an image as a sequence s of codes, row by row, coarse grids
first. A causal transformer learns

    p(s | c) = prod_i p(s_i | s_<i, c)                                                          (eq. 10 and 11)

where c is a token in front: the class, or 0 where there is none. It has the codes' vocabulary, as published.

Sampling takes a step for each code, with keys and values cached, and decodes by the first stage. `enlarge` makes larger
images than were trained on: each code is sampled given the window of the trained size around it (section 3.2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from jaxgen import options, stages
from jaxgen.checks import check_labels
from jaxgen.contract import Aux, Context, Family, by_settings, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import cross_entropy
from jaxgen.networks.transformer import (
    CausalTransformer,
    categorical,
    check_prior,
    flatten,
    kernels_as,
    truncated,
    truncation_settings,
    unflatten,
)
from jaxgen.options import TRACED, Count, NonNegative, Rate
from jaxgen.randomness import example_keys

Array = jax.Array


def start_token(batch: dict, n: int, conditional: bool) -> Array:
    """The token c in front, int32 [n, 1]."""
    return batch['label'][:, None].astype(jnp.int32) if conditional else jnp.zeros((n, 1), jnp.int32)


def code_nats(net: CausalTransformer, weights, start: Array, inputs: Array, codes: Array, rng=None) -> Array:
    """-log p(s_i | s_<i, c) of each code, [n, T].

    Args:
      start: c, int32 [n, 1].
      inputs: the codes s that condition later ones, int32 [n, T].
      codes: those that are predicted, int32 [n, T].
      rng: a key of dropout in training; None: not in training.
    """
    chex.assert_equal_shape([inputs, codes])
    tokens = jnp.concatenate([start, inputs[:, :-1]], 1)
    rngs = None if rng is None else {'dropout': rng}
    return cross_entropy(net.apply({'params': weights}, tokens, train=rng is not None, rngs=rngs), codes)


def corrupted(keep_rng: Array, code_rng: Array, codes: Array, keep: float, vocabulary: int) -> Array:
    """Codes of which each is kept with probability `keep`, and else replaced by a uniform one."""
    if keep == 1:
        return codes
    uniform = jax.random.randint(code_rng, codes.shape, 0, vocabulary)
    return jnp.where(jax.random.bernoulli(keep_rng, keep, codes.shape), codes, uniform)


def draw_code(keys: Array, logits: Array, i: Array, top_k: int, settings: dict) -> Array:
    """One code for each example, int32 [n], from logits [n, V], by its own key and the code's index.

    top_k, settings: see `networks.transformer.truncated`.
    """
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
    return categorical(own, truncated(logits, top_k, settings))


def sample_codes(net: CausalTransformer, weights, start: Array, keys: Array, draw: Callable) -> Array:
    """Sequences of codes, int32 [n, T], each code at the cost of one token.

    Args:
      start: c, int32 [n, 1].
      keys: [n].
      draw: (keys, logits [n, V], index of the code) -> code [n].
    """

    def one(carry, i):
        token, cache = carry
        logits, cache = net.apply({'params': weights}, token, cache, i)
        code = draw(keys, logits[:, 0], i)
        return (code[:, None], cache), code

    _, codes = jax.lax.scan(one, (start, net.empty_cache(len(keys), net.length)), jnp.arange(net.length))
    return codes.T


def sample_enlarged(
    net: CausalTransformer, weights, start: Array, keys: Array, draw: Callable, grid: tuple[int, int], enlarge: int
) -> Array:
    """Grids of codes int32 [n, H, W] of `enlarge` times the trained (rows, columns), each code given its window."""
    (h, w), n = grid, len(keys)
    rows, columns = enlarge * h, enlarge * w

    def one(codes, i):
        row, column = i // columns, i % columns
        top, left = jnp.clip(row - h // 2, 0, rows - h), jnp.clip(column - w // 2, 0, columns - w)
        window = jax.lax.dynamic_slice(codes, (0, top, left), (n, h, w)).reshape(n, -1)
        logits = net.apply({'params': weights}, jnp.concatenate([start, window[:, :-1]], 1))
        code = draw(keys, jnp.take(logits, (row - top) * w + column - left, axis=1), i)
        return jax.lax.dynamic_update_slice(codes, code[:, None, None], (0, row, column)), None

    codes, _ = jax.lax.scan(one, jnp.zeros((n, rows, columns), jnp.int32), jnp.arange(rows * columns))
    return codes


def check(first: Family, classes: int, enlarge: int) -> None:
    """Raises UserError where fields do not fit the first stage; classes: 0 if not conditional."""
    if enlarge > 1 and len(first.latents.grids) > 1:
        raise UserError(f'config.model.enlarge above 1 needs a first stage of one grid of codes; it is {enlarge}')
    if classes > first.latents.vocabulary:
        raise UserError(f'{classes} classes do not fit the {first.latents.vocabulary} codes of config.stages.first')


@options.checked
def build(
    context: Context,
    *,
    channels: Count = 64,
    blocks: Count = 4,
    heads: Count = 4,
    dropout: Rate = 0.0,
    attention_dropout: Rate = 0.0,
    conditional: bool = False,
    keep: Annotated[float, '(0, 1]'] = 1.0,
    temperature: Annotated[NonNegative, TRACED] = 1.0,
    top_k: Annotated[int, '[0, inf)'] = 0,
    top_p: Annotated[float, '(0, 1]', TRACED] = 1.0,
    enlarge: Count = 1,
) -> Family:
    """Transformer over the codes of `config.stages.first`.

    Args:
      channels: features of a token, a multiple of heads.
      blocks, heads: of the transformer; heads of attention in each block.
      dropout: of embeddings and branches, in training.
      attention_dropout: of the weights of attention, in training.
      conditional: condition on the class, `batch['label']`.
      keep: probability that a code of the input is kept in training; the others are replaced by uniform ones (pkeep in
        the released code).
      temperature: that logits are divided by in sampling; 0: the likeliest code.
      top_k, top_p: truncation of the distribution in sampling, see `networks.transformer.filtered`.
      enlarge: samples are so many times as high and wide as the training images.

    evaluate gives per image 'code_nats' = -log p(codes), and 'bits_per_code'. They are of the codes, not of the image:
    comparable between priors of one first stage only.

    Raises:
      UserError: a value out of range, or a first stage without codes.
    """
    first = context.stages.get('first')
    check_prior(first, channels, heads)
    check_labels(context, conditional)
    check(first, context.classes if conditional else 0, enlarge)
    grids, vocabulary = first.latents.grids, first.latents.vocabulary
    length = sum(h * w for h, w in grids)
    net = CausalTransformer(
        vocabulary=vocabulary, length=length, channels=channels, blocks=blocks, heads=heads, dropout=dropout,
        attention_dropout=attention_dropout, remat=context.remat, dtype=context.dtype,
    )  # fmt: skip

    encoder = stages.encoder(first, 'first')

    def encode(frozen, batch, rng) -> tuple[Array, Array]:
        """Codes int32 [n, T], and the token in front."""
        codes = flatten(encoder.encode(frozen, batch, rng))
        return codes, start_token(batch, len(codes), conditional)

    def loss(params, state, frozen, batch, rng):
        encode_rng, keep_rng, other_rng, dropout_rng = jax.random.split(rng, 4)
        codes, start = encode(frozen, batch, encode_rng)
        inputs = corrupted(keep_rng, other_rng, codes, keep, vocabulary)
        value = code_nats(net, params['transformer'], start, inputs, codes, dropout_rng).mean()
        return value, Aux({'loss': value, 'bits_per_code': value / math.log(2)})

    def init(rng, batch, frozen):
        params = net.init(rng, jnp.zeros((1, length), jnp.int32))['params']
        return new_state({'transformer': params}, context.optim)

    def settings():
        return truncation_settings(temperature, top_p)

    def sample(state, frozen, batch, rng, settings):
        draw = functools.partial(draw_code, top_k=top_k, settings=settings)
        draw_rng, first_rng = jax.random.split(rng)
        keys, start = example_keys(draw_rng, batch), start_token(batch, len(batch['index']), conditional)
        weights = kernels_as(state.ema['transformer'], context.dtype)
        if enlarge > 1:
            codes = (sample_enlarged(net, weights, start, keys, draw, grids[0], enlarge),)
        else:
            codes = unflatten(sample_codes(net, weights, start, keys, draw), grids)
        return jnp.clip(first.decode(*frozen['first'], batch, codes, first_rng), -1, 1)

    def evaluate(state, frozen, batch, rng):
        codes, start = encode(frozen, batch, rng)
        nats = code_nats(net, state.ema['transformer'], start, codes, codes)
        return {'code_nats': nats.sum(1), 'bits_per_code': nats.mean(1) / math.log(2)}

    return Family(
        init,
        make_update(loss, context.optim, 'transformer'),
        by_settings(sample, settings),
        evaluate,
        prepare=encoder.prepare,
        conditions=('label',) if conditional else (),
        divisor=first.divisor,
        free=('temperature', 'top_k', 'top_p', 'enlarge'),
        sampling=('temperature', 'top_k', 'top_p', 'enlarge'),
        settings=settings,
    )
