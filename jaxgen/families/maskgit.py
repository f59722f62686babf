"""MaskGIT: masked generative image transformer (Chang et al. 2022, arXiv 2202.04200).

`config.stages.first`, a quantising autoencoder, encodes an image as a sequence of codes. A fraction gamma(r) of them, r
uniform in [0, 1], is masked, and a bidirectional transformer learns to predict them from all others:

    L = -E sum_{i masked} log p(y_i | y_unmasked)                                                          (eq. 1)

with gamma(r) = cos(pi r / 2) (section 3.3). Sampling begins with all codes masked and takes `steps` of these: every
masked code is sampled, the most confident ones are kept, and gamma(t / steps) of all are masked again (section 3.2).
The confidence is the code's log probability plus Gumbel noise, whose scale falls from `choice_temperature` to 0.

A class is one more token in front, with an index of its own after those of the codes.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import options, stages
from jaxgen.checks import check_labels
from jaxgen.contract import Aux, Context, Family, by_settings, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import cross_entropy
from jaxgen.networks.transformer import (
    MaskedTransformer,
    categorical,
    check_prior,
    flatten,
    kernels_as,
    truncated,
    truncation_settings,
    unflatten,
)
from jaxgen.options import TRACED, Count, NonNegative, OneOf, Positive, Rate
from jaxgen.randomness import example_keys, stream

Array = jax.Array


def mask_ratio(r: Array) -> Array:
    """gamma(r), the fraction of codes that is masked, falling from 1 at r = 0 to 0 at r = 1."""
    return jnp.cos(0.5 * jnp.pi * r)


def sample_masks(keys: Array, r: Array, length: int) -> Array:
    """Which codes are masked: bool [n, length], ceil(gamma(r) length) of them, at least one, by keys [n]; r [n]."""
    order = jax.vmap(lambda key: jax.random.permutation(key, length))(keys)
    return order < jnp.maximum(jnp.ceil(mask_ratio(r) * length), 1)[:, None]


def expected_masked(length: int) -> float:
    """The mean over r of the number of codes that `sample_masks` masks."""
    # j or more are masked where cos(pi r / 2) > (j - 1) / length.
    return sum(2 / math.pi * math.acos(j / length) for j in range(length))


def least_confident(keys: Array, confidence: Array, temperature: Array, count: Array) -> Array:
    """Which codes are masked again: the `count` least confident ones after Gumbel noise, bool [n, T].

    confidence: log probabilities [n, T], infinite where a code is not to be masked.
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, confidence.shape[1:]))(keys)
    rank = jnp.argsort(jnp.argsort(confidence + temperature * noise, -1), -1)
    return rank < count


class Tokens(NamedTuple):
    """The transformer and its tokens: the codes, then the classes, then the mask."""

    net: MaskedTransformer
    codes: int
    classes: int  # 0: not conditional

    @property
    def mask(self) -> int:
        return self.codes + self.classes

    def logits(self, weights, tokens: Array, batch: dict, rng=None) -> Array:
        """Logits [n, T, all tokens] of tokens int32 [n, T].

        rng: a key of dropout in training; None: not in training.
        """
        front = int(self.classes > 0)
        if front:
            label = self.codes + batch['label'][:, None].astype(jnp.int32)
            tokens = jnp.concatenate([label, tokens], 1)
        rngs = None if rng is None else {'dropout': rng}
        return self.net.apply({'params': weights}, tokens, train=rng is not None, rngs=rngs)[:, front:]


def sample_codes(
    tokens: Tokens, weights, batch: dict, keys: Array, length: int, steps: int, top_k: int, settings: dict
) -> Array:
    """Codes int32 [n, length] by parallel decoding (section 3.2).

    Args:
      keys: [n].
      settings: 'choice_temperature', and those of `networks.transformer.truncated`.
    """

    def one(codes, t):
        step_keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, t)))(keys)
        draw_keys, choice_keys = step_keys[:, 0], step_keys[:, 1]
        logits = tokens.logits(weights, codes, batch)[..., : tokens.codes]
        masked = codes == tokens.mask
        sampled = jnp.where(masked, categorical(draw_keys, truncated(logits, top_k, settings)), codes)
        confidence = jnp.where(masked, -cross_entropy(logits, sampled), jnp.inf)
        r = (t + 1) / steps
        # At least one code is settled in each step, and none is left after the last.
        count = jnp.minimum(jnp.floor(mask_ratio(r) * length), masked.sum(1, keepdims=True) - 1)
        count = jnp.where(t + 1 < steps, jnp.maximum(count, 0), 0)
        again = least_confident(choice_keys, confidence, settings['choice_temperature'] * (1 - r), count)
        return jnp.where(again, tokens.mask, sampled), None

    codes, _ = jax.lax.scan(one, jnp.full((len(keys), length), tokens.mask, jnp.int32), jnp.arange(steps))
    return codes


def masked_bits(tokens: Tokens, weights, batch: dict, codes: Array, keys: Array, ratios: int = 8) -> Array:
    """Bits per masked code, [n], mean over so many evenly spaced r; keys [n]."""

    def one(r):
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, (ratios * r).astype(jnp.int32))
        masked = sample_masks(own, jnp.full(len(codes), r), codes.shape[1])
        nats = cross_entropy(tokens.logits(weights, jnp.where(masked, tokens.mask, codes), batch), codes)
        return (nats * masked).sum(1) / masked.sum(1)

    return jax.lax.map(one, (jnp.arange(ratios) + 0.5) / ratios).mean(0) / math.log(2)


@options.checked
def build(
    context: Context,
    *,
    channels: Count = 64,
    blocks: Count = 4,
    heads: Count = 4,
    dropout: Rate = 0.1,
    attention_dropout: Rate = 0.0,
    conditional: bool = False,
    smoothing: Rate = 0.1,
    mean: Annotated[str, OneOf('batch', 'image')] = 'batch',
    steps: Count = 8,
    choice_temperature: Annotated[NonNegative, TRACED] = 4.5,
    temperature: Annotated[Positive, TRACED] = 1.0,
    top_k: Annotated[int, '[0, inf)'] = 0,
    top_p: Annotated[float, '(0, 1]', TRACED] = 1.0,
) -> Family:
    """MaskGIT over the codes of `config.stages.first`.

    Args:
      channels: features of a token, a multiple of heads.
      blocks, heads: of the transformer; heads of attention in each block.
      dropout: of embeddings and branches, in training.
      attention_dropout: of the weights of attention, in training.
      conditional: condition on the class, `batch['label']`.
      smoothing: label smoothing of the codes in training.
      mean: of the loss over masked codes, 'batch': every masked code has the same weight (eq. 1); 'image': every image
        has, with the mean over its own masked codes (the released code).
      steps: of sampling, at most the number of codes.
      choice_temperature: of the noise on the confidence that decides which codes are kept.
      temperature: that logits are divided by in sampling.
      top_k, top_p: truncation of the distribution in sampling, see `networks.transformer.filtered`.

    evaluate gives per image 'masked_bits': bits per masked code, mean over eight fractions of masked codes. It is no
    likelihood.

    Raises:
      UserError: a value out of range, or a first stage without codes.
    """
    first = context.stages.get('first')
    check_prior(first, channels, heads)
    check_labels(context, conditional)
    length, classes = sum(h * w for h, w in first.latents.grids), context.classes if conditional else 0
    if steps > length:
        raise UserError(f'config.model.steps must be from 1 to the {length} codes of an image; it is {steps}')
    net = MaskedTransformer(
        vocabulary=first.latents.vocabulary + classes + 1, length=length + int(conditional), channels=channels,
        blocks=blocks, heads=heads, dropout=dropout, attention_dropout=attention_dropout, remat=context.remat,
        dtype=context.dtype,
    )  # fmt: skip
    tokens = Tokens(net, first.latents.vocabulary, classes)
    encoder = stages.encoder(first, 'first')

    def loss(params, state, frozen, batch, rng):
        encode_rng, r_rng, mask_rng, dropout_rng = jax.random.split(rng, 4)
        codes = flatten(encoder.encode(frozen, batch, encode_rng))
        n = len(codes)
        masked = sample_masks(jax.random.split(mask_rng, n), jax.random.uniform(r_rng, (n,)), length)
        inputs = jnp.where(masked, tokens.mask, codes)
        logits = tokens.logits(params['transformer'], inputs, batch, dropout_rng)
        smoothed, nats = (cross_entropy(logits, codes, s) for s in (smoothing, 0.0))  # [n, T]
        count = masked.sum(1) if mean == 'image' else expected_masked(length)
        value, bits = (((e * masked).sum(1) / count).mean() for e in (smoothed, nats / math.log(2)))
        return value, Aux({'loss': value, 'masked_bits': bits})

    def init(rng, batch, frozen):
        params = net.init(rng, jnp.zeros((1, net.length), jnp.int32))['params']
        return new_state({'transformer': params}, context.optim)

    def settings():
        return truncation_settings(temperature, top_p) | {'choice_temperature': choice_temperature}

    def sample(state, frozen, batch, rng, settings):
        draw_rng, first_rng = jax.random.split(rng)
        weights, keys = kernels_as(state.ema['transformer'], context.dtype), example_keys(draw_rng, batch)
        sequences = sample_codes(tokens, weights, batch, keys, length, steps, top_k, settings)
        codes = unflatten(sequences, first.latents.grids)
        return jnp.clip(first.decode(*frozen['first'], batch, codes, first_rng), -1, 1)

    def evaluate(state, frozen, batch, rng):
        codes = flatten(first.encode(*frozen['first'], batch, stream(rng, 'encoder')))
        keys = example_keys(rng, batch)
        return {'masked_bits': masked_bits(tokens, state.ema['transformer'], batch, codes, keys)}

    return Family(
        init,
        make_update(loss, context.optim, 'transformer'),
        by_settings(sample, settings),
        evaluate,
        prepare=encoder.prepare,
        conditions=('label',) if conditional else (),
        divisor=first.divisor,
        free=('steps', 'choice_temperature', 'temperature', 'top_k', 'top_p'),
        sampling=('steps', 'choice_temperature', 'temperature', 'top_k', 'top_p'),
        settings=settings,
    )
