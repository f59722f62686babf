"""PixelCNN++ (Salimans et al. 2017, arXiv 1701.05517): an image pixel after pixel, each from a mixture of logistics.

    p(x) = prod_i sum_k pi_k p_k(x_i | x_1, ..., x_{i-1}),

where all that is in a mixture depends on the pixels before, and a pixel's colours share the component k; the means
of green and blue move with the colours before them by a factor that the network gives. So one pass per pixel gives all
of its colours. The distribution is over the 256 levels (`losses.likelihoods.discretised_logistic_mixture`), and the
likelihood exact.

Samples are draws from just this distribution: every value is put to its level before the next one sees it. 'cached'
and 'plain' drawing are those of the family pixelcnn.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from jaxgen.checks import check_labels, check_size
from jaxgen.contract import Aux, Context, Family, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.losses import likelihoods
from jaxgen.networks.masked import draw_cached, draw_plainly
from jaxgen.networks.pixelcnn import Condition
from jaxgen.networks.pixelcnn_pp import PixelCNNpp
from jaxgen.randomness import example_keys

Array = jax.Array

LEVELS = 256


def build(
    context: Context,
    *,
    filters: int = 160,
    blocks: int = 5,
    scales: int = 3,
    mixtures: int = 10,
    dropout: float = 0.5,
    conditional: bool = False,
    temperature: float = 1.0,
    sampler: str = 'cached',
) -> Family:
    """PixelCNN++.

    Args:
      filters: features of each of the two streams.
      blocks: gated residual blocks of each at each size, on the way down (and one more on the way up).
      scales: sizes, each half the one before.
      mixtures: logistics in a mixture.
      dropout: within the blocks.
      conditional: tell the network the class, `batch['label']`.
      temperature: of the choice of a component and of its width; 1: as learned.
      sampler: 'cached' | 'plain'.

    evaluate gives per image 'nll', in nats, and 'bits_per_dim', both exact.

    Raises:
      UserError: a value out of range, an image that cannot be halved often enough, no labels.
    """
    if sampler not in ('cached', 'plain'):
        raise UserError(f"config.model.sampler must be 'cached' or 'plain'; it is {sampler!r}")
    check_labels(context, conditional)
    if min(filters, blocks, scales, mixtures) < 1 or not 0 <= dropout < 1 or temperature <= 0:
        raise UserError(
            'config.model: filters, blocks, scales and mixtures must be 1 or more, dropout in [0, 1), temperature '
            'more than 0'
        )
    height, width, channels = context.image
    divisor = 2 ** (scales - 1)
    check_size(context.image, divisor, f'config.model.scales = {scales}')

    net = PixelCNNpp(
        likelihoods.logistic_mixture_size(channels, mixtures),
        filters,
        blocks,
        scales,
        dropout,
        context.classes if conditional else 0,
        context.dtype,
        context.remat,
    )

    def look(values: Array) -> Array:
        """int [..., C] as the network sees them, with ones beside: float32 [..., C + 1]."""
        x = 2 * values.astype(jnp.float32) / (LEVELS - 1) - 1
        return jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)

    def score(params, batch, train, rng) -> Array:
        """-log p(x) [n], nats."""
        x = batch['image']
        seen = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
        rngs = {'dropout': rng} if train else None
        found = net.apply({'params': params['pixelcnn']}, seen, Condition(batch.get('label')), train, rngs=rngs)
        return -likelihoods.discretised_logistic_mixture(found, x, LEVELS)

    to_bits = 1 / (math.prod(context.image) * math.log(2))

    def loss(params, state, frozen, batch, rng):
        bits = score(params, batch, True, rng).mean() * to_bits
        return bits, Aux({'loss': bits})

    update = make_update(loss, context.optim, 'pixelcnn')

    def init(rng, batch, frozen):
        # The batch sets scales and biases, so that every layer starts with outputs of one size.
        x = batch['image']
        seen = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
        label = batch['label'] if conditional else None
        return new_state({'pixelcnn': net.init(rng, seen, Condition(label))['params']}, context.optim)

    def sample(state, frozen, batch, rng):
        params, keys = {'params': state.ema['pixelcnn']}, example_keys(rng, batch)
        condition = Condition(batch.get('label'))

        def run(x, place, cache):
            if place is None:
                return net.apply(params, x, condition), cache
            output, changed = net.apply({**params, 'cache': cache}, x, condition, False, place, mutable=['cache'])
            return output, changed['cache']

        def draw(found, pixel, colour, old):
            here = jax.vmap(lambda key: jax.random.fold_in(key, pixel))(keys)
            new = likelihoods.draw_logistic_mixture(here, found, channels, LEVELS, temperature)
            return new, look(new)

        way = functools.partial(draw_cached, margin=net.margin, rows=net.rows, scales=scales)
        shape = (len(keys), height, width, channels + 1)
        values = (way if sampler == 'cached' else draw_plainly)(run, draw, shape, channels)
        return 2 * values.astype(jnp.float32) / (LEVELS - 1) - 1

    def evaluate(state, frozen, batch, rng):
        nll = score(state.ema, batch, False, rng)
        return {'nll': nll, 'bits_per_dim': nll * to_bits}

    return Family(
        init,
        update,
        sample,
        evaluate,
        conditions=('label',) if conditional else (),
        divisor=divisor,
        free=('temperature', 'sampler'),
    )
