"""Transformer over codes: the second stage of VQGAN (Esser et al. 2020, arXiv 2012.09841).

`config.stages.first`, a quantising autoencoder, makes an image a sequence s of codes, row by row, coarse grids first.
A causal transformer learns p(s) = prod_i p(s_i | s_<i, c) (eq. 10 and 11), where c is a token in front: the class,
or 0 where there is none. It shares the codes' vocabulary, as published.

Samples are drawn code by code with keys and values kept, and decoded by the first stage. `enlarge` makes larger images
than were trained on: each code is drawn from the window of the trained size around it (section 3.2).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxgen.checks import check_labels
from jaxgen.contract import Aux, Context, Family, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import cross_entropy
from jaxgen.networks.transformer import CausalTransformer, categorical, check_prior, filtered, flatten, unflatten
from jaxgen.randomness import example_keys

Array = jax.Array


def build(
    context: Context,
    *,
    channels: int = 64,
    blocks: int = 4,
    heads: int = 4,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    conditional: bool = False,
    keep: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    enlarge: int = 1,
) -> Family:
    """Transformer over the codes of `config.stages.first`.

    Args:
      channels, blocks, heads, dropout, attention_dropout: of the transformer.
      conditional: tell it the class, `batch['label']`.
      keep: share of the codes that it is shown right in training; the others are drawn evenly from all (pkeep).
      temperature, top_k, top_p: of sampling, see `networks.transformer.filtered`.
      enlarge: samples are so many times as high and wide as the training images.

    evaluate gives per image 'code_nats' = -log p(codes), and 'bits_per_code'. They are of the codes, not of the image:
    comparable between priors of one first stage only.

    Raises:
      UserError: a value that cannot work, or a first stage without codes.
    """
    first = context.stages.get('first')
    check_prior(first, channels, blocks, heads)
    check_labels(context, conditional)
    if not (0 <= min(dropout, attention_dropout) <= max(dropout, attention_dropout) < 1):
        raise UserError(
            f'config.model.dropout and attention_dropout must be in [0, 1); they are {dropout}, {attention_dropout}'
        )
    if not (0 < keep <= 1 and temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise UserError('config.model: keep and top_p must be in (0, 1], temperature and top_k not negative')
    if enlarge < 1 or (enlarge > 1 and len(first.latents.grids) > 1):
        raise UserError(
            'config.model.enlarge must be at least 1, and more only goes with a first stage of one grid; it is '
            f'{enlarge}'
        )
    length, vocabulary = sum(h * w for h, w in first.latents.grids), first.latents.vocabulary
    if conditional and context.classes > vocabulary:
        raise UserError(f'{context.classes} classes do not fit the {vocabulary} codes of config.stages.first')
    net = CausalTransformer(
        vocabulary=vocabulary, length=length, channels=channels, blocks=blocks, heads=heads, dropout=dropout,
        attention_dropout=attention_dropout, remat=context.remat, dtype=context.dtype,
    )  # fmt: skip

    def to_codes(frozen, batch, rng) -> Array:
        return flatten(first.encode(*frozen['first'], batch, rng))

    def start(batch, n: int) -> Array:
        """The token in front, int32 [n, 1]."""
        return batch['label'][:, None].astype(jnp.int32) if conditional else jnp.zeros((n, 1), jnp.int32)

    def nats(params, codes, shown, batch, train, rngs=None) -> Array:
        """-log p of each code, [n, T]; `shown` are the codes that the network sees."""
        tokens = jnp.concatenate([start(batch, len(codes)), shown[:, :-1]], 1)
        logits = net.apply({'params': params['transformer']}, tokens, train=train, rngs=rngs)
        return cross_entropy(logits, codes)

    def loss(params, state, frozen, batch, rng):
        code_rng, keep_rng, other_rng, dropout_rng = jax.random.split(rng, 4)
        codes = to_codes(frozen, batch, code_rng)
        others = jax.random.randint(other_rng, codes.shape, 0, vocabulary)
        shown = jnp.where(jax.random.bernoulli(keep_rng, keep, codes.shape), codes, others) if keep < 1 else codes
        value = nats(params, codes, shown, batch, True, {'dropout': dropout_rng}).mean()
        return value, Aux({'loss': value, 'bits_per_code': value / math.log(2)})

    update = make_update(loss, context.optim, 'transformer')

    def init(rng, batch, frozen):
        params = net.init(rng, jnp.zeros((1, length), jnp.int32))['params']
        return new_state({'transformer': params}, context.optim)

    def draw(keys, logits, i) -> Array:
        """One code for each example, [n], by its own key and the code's place."""
        return categorical(
            jax.vmap(jax.random.fold_in, (0, None))(keys, i), filtered(logits, temperature, top_k, top_p)
        )

    def draw_codes(params, token, keys) -> Array:
        """A sequence [n, T], each code at the cost of one token."""

        def one(carry, i):
            token, cache = carry
            logits, cache = net.apply({'params': params}, token, cache, i)
            code = draw(keys, logits[:, 0], i)
            return (code[:, None], cache), code

        _, codes = jax.lax.scan(one, (token, net.empty_cache(len(keys), length)), jnp.arange(length))
        return codes.T

    def draw_larger(params, token, keys) -> Array:
        """A grid [n, H, W] of `enlarge` times the trained height and width, each code seen from its window."""
        (h, w), n = first.latents.grids[0], len(keys)
        rows, columns = enlarge * h, enlarge * w

        def one(grid, i):
            row, column = i // columns, i % columns
            top, left = jnp.clip(row - h // 2, 0, rows - h), jnp.clip(column - w // 2, 0, columns - w)
            window = jax.lax.dynamic_slice(grid, (0, top, left), (n, h, w)).reshape(n, -1)
            logits = net.apply({'params': params}, jnp.concatenate([token, window[:, :-1]], 1))
            logits = jnp.take(logits, (row - top) * w + column - left, axis=1)
            code = draw(keys, logits, i)
            return jax.lax.dynamic_update_slice(grid, code[:, None, None], (0, row, column)), None

        grid, _ = jax.lax.scan(one, jnp.zeros((n, rows, columns), jnp.int32), jnp.arange(rows * columns))
        return grid

    def sample(state, frozen, batch, rng):
        draw_rng, first_rng = jax.random.split(rng)
        keys, token = example_keys(draw_rng, batch), start(batch, len(batch['index']))
        params = state.ema['transformer']
        if enlarge > 1:
            codes = (draw_larger(params, token, keys),)
        else:
            codes = unflatten(draw_codes(params, token, keys), first.latents.grids)
        return jnp.clip(first.decode(*frozen['first'], batch, codes, first_rng), -1, 1)

    def evaluate(state, frozen, batch, rng):
        codes = to_codes(frozen, batch, rng)
        found = nats(state.ema, codes, codes, batch, False)
        return {'code_nats': found.sum(1), 'bits_per_code': found.mean(1) / math.log(2)}

    return Family(
        init,
        update,
        sample,
        evaluate,
        conditions=('label',) if conditional else (),
        divisor=first.divisor,
        free=('temperature', 'top_k', 'top_p', 'enlarge'),
    )
