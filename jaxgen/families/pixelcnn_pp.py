"""PixelCNN++ (Salimans et al. 2017, arXiv 1701.05517): an image pixel after pixel, each from a mixture of logistics.

    p(x) = prod_i sum_k pi_k p_k(x_i | x_1, ..., x_{i-1})                                               (eq. 1 to 3)

where the mixture's parameters are computed from the pixels before, and a pixel's colours share the component k; the
means of green and blue are linear in the colours before them, with coefficients of the network (eq. 3). So one pass
per pixel gives all of its colours. The distribution is over the 256 quantisation levels
(`losses.likelihoods.discretised_logistic_mixture`), and the likelihood exact.

Samples have just this distribution: every value is rounded to its level before the next one depends on it. The
samplers 'cached' and 'plain' are those of the family pixelcnn.
"""

from __future__ import annotations

import math
from typing import Annotated

import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.checks import check_labels, check_size
from jaxgen.contract import Aux, Context, Family, by_settings, make_update, new_state
from jaxgen.losses import likelihoods
from jaxgen.networks.masked import SAMPLERS, with_cache
from jaxgen.networks.pixelcnn import Condition
from jaxgen.networks.pixelcnn_pp import PixelCNNpp
from jaxgen.options import TRACED, Count, OneOf, Positive, Rate
from jaxgen.randomness import example_keys

Array = jax.Array

LEVELS = 256


def with_ones(x: Array) -> Array:
    """The network's input: images [..., C] with a channel of ones, [..., C + 1]."""
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)


def to_image(values: Array) -> Array:
    """Integers from 0 to 255 as float32 in [-1, 1]."""
    return 2 * values.astype(jnp.float32) / (LEVELS - 1) - 1


def negative_log_likelihood(net: PixelCNNpp, weights, x: Array, label: Array | None, rng=None) -> Array:
    """-log p(x) [n] nats.

    Args:
      label: int32 [n], or None.
      rng: a key of dropout in training; None: not in training.
    """
    rngs = None if rng is None else {'dropout': rng}
    mixture = net.apply({'params': weights}, with_ones(x), Condition(label), rng is not None, rngs=rngs)
    return -likelihoods.discretised_logistic_mixture(mixture, x, LEVELS)


def sample_images(
    net: PixelCNNpp, weights, keys: Array, image: tuple[int, int, int], label, temperature: float, sampler: str
) -> Array:
    """Samples, float32 [n, H, W, C] in [-1, 1].

    Args:
      keys: [n], one for each example.
      image: (H, W, C).
      label: int32 [n], or None.
      temperature: see `likelihoods.draw_logistic_mixture`.
      sampler: one of SAMPLERS.
    """
    height, width, channels = image
    variables, condition = {'params': weights}, Condition(label)

    def apply(variables, x, position, **options):
        return net.apply(variables, x, condition, False, position, **options)

    def draw(mixture, pixel, colour, old):
        """All colours of a pixel, by its own key."""
        own = jax.vmap(lambda key: jax.random.fold_in(key, pixel))(keys)
        new = likelihoods.draw_logistic_mixture(own, mixture, channels, LEVELS, temperature)
        return new, with_ones(to_image(new))

    values = SAMPLERS[sampler](
        with_cache(apply, variables),
        draw,
        (len(keys), height, width, channels + 1),
        channels,
        margin=net.margin,
        rows=net.rows,
        scales=net.scales,
    )
    return to_image(values)


@options.checked
def build(
    context: Context,
    *,
    filters: Count = 160,
    blocks: Count = 5,
    scales: Count = 3,
    mixtures: Count = 10,
    dropout: Rate = 0.5,
    conditional: bool = False,
    temperature: Annotated[Positive, TRACED] = 1.0,
    sampler: Annotated[str, OneOf(*SAMPLERS)] = 'cached',
) -> Family:
    """PixelCNN++.

    Args:
      filters: features of each of the two streams.
      blocks: gated residual blocks of each at each resolution, on the way down (and one more on the way up).
      scales: resolutions, each half the one before.
      mixtures: logistics in a mixture.
      dropout: within the blocks, in training.
      conditional: condition on the class, `batch['label']`.
      temperature: of the choice of a component and of its width in sampling; 1: as learned.
      sampler: 'cached' | 'plain', see the family pixelcnn.

    evaluate gives per image 'nll', in nats, and 'bits_per_dim', both exact.

    Raises:
      UserError: a value out of range, an image that cannot be halved often enough, no labels.
    """
    divisor = 2 ** (scales - 1)
    check_labels(context, conditional)
    check_size(context.image, divisor, f'config.model.scales = {scales}')
    net = PixelCNNpp(
        likelihoods.logistic_mixture_size(context.image[2], mixtures),
        filters,
        blocks,
        scales,
        dropout,
        context.classes if conditional else 0,
        context.dtype,
        context.remat,
    )
    to_bits = 1 / (math.prod(context.image) * math.log(2))  # nats per image to bits per dimension

    def loss(params, state, frozen, batch, rng):
        nll = negative_log_likelihood(net, params['pixelcnn'], batch['image'], batch.get('label'), rng)
        bits = nll.mean() * to_bits
        return bits, Aux({'loss': bits})

    def init(rng, batch, frozen):
        # The batch sets scales and biases, so that every layer starts with outputs of one size.
        label = batch['label'] if conditional else None
        params = net.init(rng, with_ones(batch['image']), Condition(label))['params']
        return new_state({'pixelcnn': params}, context.optim)

    def settings():
        return {'temperature': temperature}

    def sample(state, frozen, batch, rng, settings):
        keys, label = example_keys(rng, batch), batch.get('label')
        weights, temperature = state.ema['pixelcnn'], settings['temperature']
        return sample_images(net, weights, keys, context.image, label, temperature, sampler)

    def evaluate(state, frozen, batch, rng):
        nll = negative_log_likelihood(net, state.ema['pixelcnn'], batch['image'], batch.get('label'))
        return {'nll': nll, 'bits_per_dim': nll * to_bits}

    return Family(
        init,
        make_update(loss, context.optim, 'pixelcnn'),
        by_settings(sample, settings),
        evaluate,
        conditions=('label',) if conditional else (),
        divisor=divisor,
        free=('temperature', 'sampler'),
        sampling=('temperature', 'sampler'),
        settings=settings,
    )
