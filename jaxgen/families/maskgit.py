"""MaskGIT: masked generative image transformer (Chang et al. 2022, arXiv 2202.04200).

`config.stages.first`, a quantising autoencoder, makes an image a sequence of codes. A share gamma(r) of them, r drawn
evenly, is masked, and a transformer that sees all the others in both directions learns what they were:

    L = -E sum_{i masked} log p(code_i | the codes shown)                                                  (eq. 1)

with gamma(r) = cos(pi r / 2) (section 3.3). Sampling begins with all masked and takes `steps` of these: every masked
code is drawn, the surest of them stay, and gamma(t / steps) of all are masked again (section 3.2). How sure a draw is
is its log probability plus Gumbel noise, whose scale falls from `choice_temperature` to 0.

A class is one more token in front, with a number of its own after those of the codes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxgen.checks import check_labels
from jaxgen.contract import Aux, Context, Family, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import cross_entropy
from jaxgen.networks.transformer import MaskedTransformer, categorical, check_prior, filtered, flatten, unflatten
from jaxgen.randomness import example_keys, stream

Array = jax.Array


def masked_share(r: Array) -> Array:
    """gamma(r), the share that is masked, falling from 1 at r = 0 to 0 at r = 1."""
    return jnp.cos(0.5 * jnp.pi * r)


def mask_some(keys: Array, r: Array, length: int) -> Array:
    """Which codes are masked: bool [n, length], ceil(gamma(r) length) of them, at least one, by keys [n]; r [n]."""
    order = jax.vmap(lambda key: jax.random.permutation(key, length))(keys)
    return order < jnp.maximum(jnp.ceil(masked_share(r) * length), 1)[:, None]


def keep_surest(keys: Array, sureness: Array, temperature: Array, count: Array) -> Array:
    """Which of the codes are masked again: the `count` least sure ones after noise, bool [n, T].

    sureness: log probabilities [n, T], infinite where a code is not to be masked.
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, sureness.shape[1:]))(keys)
    order = jnp.argsort(jnp.argsort(sureness + temperature * noise, -1), -1)
    return order < count


def build(
    context: Context,
    *,
    channels: int = 64,
    blocks: int = 4,
    heads: int = 4,
    dropout: float = 0.1,
    attention_dropout: float = 0.0,
    conditional: bool = False,
    smoothing: float = 0.1,
    mean: str = 'batch',
    steps: int = 8,
    choice_temperature: float = 4.5,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Family:
    """MaskGIT over the codes of `config.stages.first`.

    Args:
      channels, blocks, heads, dropout, attention_dropout: of the transformer.
      conditional: tell it the class, `batch['label']`.
      smoothing: of the codes as labels in training.
      mean: of the loss over masked codes, 'batch': every masked code counts alike (eq. 1); 'image': every image counts
        alike, with the mean over its own masked codes (the released code).
      steps: of sampling.
      choice_temperature: of the noise that decides which draws stay.
      temperature, top_k, top_p: of the draws, see `networks.transformer.filtered`.

    evaluate gives per image 'masked_bits': bits per masked code, mean over eight shares of masked codes. It is no
    likelihood.

    Raises:
      UserError: a value that cannot work, or a first stage without codes.
    """
    first = context.stages.get('first')
    check_prior(first, channels, blocks, heads)
    check_labels(context, conditional)
    if mean not in ('batch', 'image'):
        raise UserError(f"config.model.mean must be 'batch' or 'image'; it is {mean!r}")
    if not (0 <= min(dropout, attention_dropout) <= max(dropout, attention_dropout) < 1):
        raise UserError(
            f'config.model.dropout and attention_dropout must be in [0, 1); they are {dropout}, {attention_dropout}'
        )
    if not (0 <= smoothing < 1 and temperature > 0 and top_k >= 0 and 0 < top_p <= 1):
        raise UserError(
            'config.model: smoothing must be in [0, 1), temperature above 0, top_k not negative, top_p in (0, 1]'
        )
    length, codes_number = sum(h * w for h, w in first.latents.grids), first.latents.vocabulary
    if not 1 <= steps <= length or choice_temperature < 0:
        raise UserError(
            f'config.model.steps must be from 1 to the {length} codes of an image, choice_temperature not negative; '
            f'they are {steps} and {choice_temperature}'
        )
    front = int(conditional)
    classes = context.classes if conditional else 0
    mask_token = codes_number + classes
    net = MaskedTransformer(
        vocabulary=mask_token + 1, length=length + front, channels=channels, blocks=blocks, heads=heads,
        dropout=dropout, attention_dropout=attention_dropout, remat=context.remat, dtype=context.dtype,
    )  # fmt: skip

    # Codes masked in the mean over r: j or more are where cos(pi r / 2) > (j - 1) / length.
    usual = sum(2 / math.pi * math.acos(j / length) for j in range(length))

    def to_codes(frozen, batch, rng) -> Array:
        return flatten(first.encode(*frozen['first'], batch, rng))

    def logits_of(params, tokens, batch, train=False, rngs=None) -> Array:
        """Logits [n, T, vocabulary] of tokens [n, T]; the class's own are left out."""
        if conditional:
            tokens = jnp.concatenate([codes_number + batch['label'][:, None].astype(jnp.int32), tokens], 1)
        return net.apply({'params': params['transformer']}, tokens, train=train, rngs=rngs)[:, front:]

    def loss(params, state, frozen, batch, rng):
        code_rng, share_rng, mask_rng, dropout_rng = jax.random.split(rng, 4)
        codes = to_codes(frozen, batch, code_rng)
        n = len(codes)
        masked = mask_some(jax.random.split(mask_rng, n), jax.random.uniform(share_rng, (n,)), length)
        shown = jnp.where(masked, mask_token, codes)
        logits = logits_of(params, shown, batch, True, {'dropout': dropout_rng})
        error, right = (cross_entropy(logits, codes, s) for s in (smoothing, 0.0))  # [n, T]
        of_image = masked.sum(1) if mean == 'image' else usual
        value, bits = (((e * masked).sum(1) / of_image).mean() for e in (error, right / math.log(2)))
        return value, Aux({'loss': value, 'masked_bits': bits})

    update = make_update(loss, context.optim, 'transformer')

    def init(rng, batch, frozen):
        params = net.init(rng, jnp.zeros((1, length + front), jnp.int32))['params']
        return new_state({'transformer': params}, context.optim)

    def draw_codes(params, batch, keys) -> Array:
        """int32 [n, T]."""

        def one(tokens, t):
            draw_keys, choice_keys = jnp.moveaxis(
                jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, t)))(keys), 1, 0
            )
            logits = logits_of(params, tokens, batch)[..., :codes_number]
            drawn = categorical(draw_keys, filtered(logits, temperature, top_k, top_p))
            unknown = tokens == mask_token
            drawn = jnp.where(unknown, drawn, tokens)
            sureness = jnp.where(unknown, -cross_entropy(logits, drawn), jnp.inf)
            done = (t + 1) / steps
            # At least one code is settled in each step, and none is left after the last.
            count = jnp.minimum(jnp.floor(masked_share(done) * length), unknown.sum(1, keepdims=True) - 1)
            count = jnp.where(t + 1 < steps, jnp.maximum(count, 0), 0)
            again = keep_surest(choice_keys, sureness, choice_temperature * (1 - done), count)
            return jnp.where(again, mask_token, drawn), None

        tokens, _ = jax.lax.scan(one, jnp.full((len(keys), length), mask_token, jnp.int32), jnp.arange(steps))
        return tokens

    def sample(state, frozen, batch, rng):
        draw_rng, first_rng = jax.random.split(rng)
        codes = unflatten(draw_codes(state.ema, batch, example_keys(draw_rng, batch)), first.latents.grids)
        return jnp.clip(first.decode(*frozen['first'], batch, codes, first_rng), -1, 1)

    def evaluate(state, frozen, batch, rng):
        codes = to_codes(frozen, batch, stream(rng, 'encoder'))
        keys = example_keys(rng, batch)

        def one(r):
            at = jax.vmap(jax.random.fold_in, (0, None))(keys, (8 * r).astype(jnp.int32))
            masked = mask_some(at, jnp.full(len(codes), r), length)
            right = cross_entropy(logits_of(state.ema, jnp.where(masked, mask_token, codes), batch), codes)
            return (right * masked).sum(1) / masked.sum(1)

        return {'masked_bits': jax.lax.map(one, (jnp.arange(8) + 0.5) / 8).mean(0) / math.log(2)}

    return Family(
        init,
        update,
        sample,
        evaluate,
        conditions=('label',) if conditional else (),
        divisor=first.divisor,
        free=('steps', 'choice_temperature', 'temperature', 'top_k', 'top_p'),
    )
