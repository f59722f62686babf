"""Real NVP: a normalising flow of affine couplings (Dinh et al. 2016, arXiv 1605.08803).

An invertible network f turns an image into noise of the same size, so that its density is exact:

    log p(y) = log N(f(y); 0, I) + log |det df/dy|.

A coupling leaves a part of the numbers alone, and shifts and scales the others by what a residual network makes of that
part: (x + t) e^s, s = r tanh(.) with a learned r per channel. At each scale (section 3.6) three couplings take turns by
the colours of a checkerboard; 2x2 squares become channels; three take turns by halves of the channels; and half of the
numbers, one colour of the checkerboard, go away as noise. The last scale has four of checkerboards.

Pixels: of y in (0, 1) the flow sees logit((1 - a)/2 + a y), a = 0.9 (section 4.1), whose derivative is in log p(y). A
little of the density lies outside of the image's range: bits are too high by it, never too low. Training minimises
-log p(y) of images with uniform noise between their 256 levels, in bits per dimension: a bound on what the levels cost.

Batch norm stands in the networks and, with its determinant, after each coupling (section 3.7). In training it takes the
statistics of the batch, and then no example has a density of its own; what is measured and sampled has statistics held
fixed, running means of those of the averaged weights, and is exact. Networks start at 0, the whole as a normalisation.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, Latents, advance, gradient_step, new_state, running_mean
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import gaussian
from jaxgen.networks.couplings import (
    bits_per_dim,
    to_image,
    to_unit,
    total,
)
from jaxgen.networks.real_nvp import Flow
from jaxgen.randomness import example_keys, normal

Array = jax.Array

STATISTICS_DECAY = 0.99


def to_logit(y: Array, constraint: float) -> tuple[Array, Array]:
    """logit((1 - a)/2 + a y) with a = constraint, and its log-determinant [n]. y: [n, ...] in [0, 1]."""
    # 1 - p by itself: where a is nearly 1 the rounded p may be 1.
    p, rest = ((1 - constraint) / 2 + constraint * part for part in (y, 1 - y))
    x = jnp.log(p) - jnp.log(rest)
    # The derivative of the logit is 1 / (p (1 - p)), by x itself: log p = -softplus(-x).
    return x, total(jax.nn.softplus(x) + jax.nn.softplus(-x) + math.log(constraint))


def from_logit(x: Array, constraint: float) -> Array:
    return (jax.nn.sigmoid(x) - (1 - constraint) / 2) / constraint


def build(
    context: Context,
    *,
    width: int = 64,
    blocks: int = 8,
    scales: int = 2,
    norm: bool = True,
    constraint: float = 0.9,
    scale_penalty: float = 5e-5,
    temperature: float = 1.0,
    draws: int = 1,
) -> Family:
    """Real NVP. The defaults are those for CIFAR-10.

    Args:
      width, blocks: channels of the residual networks at the first scale, doubled by every squeeze, and their blocks.
      scales: how often the image's numbers are cut in two, and one more.
      norm: batch norm after the couplings.
      constraint: a, the share of (0, 1) that grey levels take before the logit, so that it stays finite.
      scale_penalty: of the sum of squares of weight normalisation's scales, added to the nats of an image, as the
        authors do: here to the bits per dimension, it is divided by H W C log 2.
      temperature: what the noise of samples is multiplied by. Below 1 samples are fewer kinds of better pictures.
      draws: noises between levels that evaluate takes the mean over, for each image.

    evaluate gives 'bits_per_dim'. encode puts every pixel into the middle of its level and gives what the model takes
    for standard normal noise, float32 [n, H W C]; decode is its inverse.

    Raises:
      UserError: a value out of range.
    """
    if min(width, blocks, scales, draws) < 1:
        raise UserError('config.model: width, blocks, scales and draws must be 1 or more')
    if not 0 < constraint < 1:
        raise UserError(f'config.model.constraint {constraint} must be between 0 and 1')
    if min(temperature, scale_penalty) < 0:
        raise UserError('config.model: temperature and scale_penalty must be 0 or more')
    divisor = 2 ** (scales - 1)
    check_size(context.image, divisor, f'config.model.scales = {scales}')
    if math.prod(context.image[:2]) < 2 * divisor**2:
        raise UserError(
            f'config.data.size = {context.image[0]}: half of the pixels stand still, so the smallest map of '
            f'config.model.scales = {scales} must have 2 or more'
        )

    size = math.prod(context.image)
    net = Flow(context.image, scales, width, blocks, norm, context.dtype, context.remat)

    def log_density(latents: Array, *log_dets: Array) -> Array:
        return gaussian(0.0, 0.0, latents) + sum(log_dets)

    def exact(state, x: Array, noise: Array | float) -> tuple[Array, Array]:
        """Latents [n, D] and log p(y), nats [n], of images in [-1, 1]."""
        logits, log_slope = to_logit(to_unit(x, noise), constraint)
        latents, log_det = net.apply({'params': state.ema['flow'], **state.extra}, logits)
        return latents, log_density(latents, log_det, log_slope)

    def trained(weights, x: Array) -> tuple[tuple[Array, Array], dict]:
        """As in training, of logits x: latents and log-determinant, and the statistics of the batch."""
        return net.apply({'params': weights}, x, train=True, mutable=['batch_stats'])

    def noisy_logits(rng, x: Array) -> tuple[Array, Array]:
        return to_logit(to_unit(x, jax.random.uniform(rng, x.shape)), constraint)

    def loss(params, state, frozen, batch, rng):
        logits, log_slope = noisy_logits(rng, batch['image'])
        (latents, log_det), _ = trained(params['flow'], logits)
        bits = bits_per_dim(log_density(latents, log_det, log_slope), size).mean()
        scales = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params['flow']) if is_scale(path)]
        nats = scale_penalty * sum(jnp.square(scale).sum() for scale in scales)
        penalty = nats / (size * math.log(2))
        return bits + penalty, Aux({'loss': bits + penalty, 'bits_per_dim': bits})

    step = gradient_step(loss, context.optim, 'flow')

    def init(rng, batch, frozen):
        weights_rng, noise_rng = jax.random.split(rng)
        logits, _ = noisy_logits(noise_rng, batch['image'])
        params = net.init(weights_rng, logits[:1])['params']
        _, statistics = trained(params, logits)
        return new_state({'flow': params}, context.optim, extra=statistics)

    def update(state, frozen, batch, rng):
        step_rng, noise_rng = jax.random.split(rng)
        state, aux = step(state, frozen, batch, step_rng)
        state = advance(state, context.optim)
        # Statistics are those of the averaged weights, which are what is measured; those of init, of the first batch,
        # count too.
        _, new = trained(state.ema['flow'], noisy_logits(noise_rng, batch['image'])[0])
        return state.replace(extra=running_mean(state, state.extra, new, STATISTICS_DECAY)), aux.logs

    def evaluate(state, frozen, batch, rng):
        def draw(keys):
            noise = jax.vmap(lambda key: jax.random.uniform(key, context.image))(keys)
            return bits_per_dim(exact(state, batch['image'], noise)[1], size)

        keys = jax.vmap(jax.random.split, (0, None), 1)(example_keys(rng, batch), draws)  # [draws, n]
        return {'bits_per_dim': jax.lax.map(draw, keys).mean(0)}

    def encode(state, frozen, batch, rng):
        """Latents, float32 [n, H W C]."""
        return exact(state, batch['image'], 0.5)[0]

    def decode(state, frozen, batch, latents, rng):
        logits, _ = net.apply({'params': state.ema['flow'], **state.extra}, latents, inverse=True)
        return to_image(from_logit(logits, constraint))

    def sample(state, frozen, batch, rng):
        return decode(state, frozen, batch, temperature * normal(example_keys(rng, batch), (size,)), rng)

    return Family(
        init,
        update,
        sample,
        evaluate,
        encode,
        decode,
        divisor=divisor,
        free=('temperature', 'draws'),
        statistics=True,
        latents=Latents(shape=(size,)),
    )


def is_scale(path: tuple) -> bool:
    """Whether a leaf of the weights is a scale of weight normalisation: batch norm's are called so too."""
    names = [key.key for key in path]
    return names[-1] == 'scale' and not names[-2].startswith('norm')
