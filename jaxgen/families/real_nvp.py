"""Real NVP: a normalising flow of affine couplings (Dinh et al. 2016, arXiv 1605.08803).

An invertible network f maps an image to noise of the same size, so that its density is exact (eq. 2):

    log p(y) = log N(f(y); 0, I) + log |det df/dy|.

A coupling leaves a part of the values alone, and shifts and scales the others by the output of a residual network of
that part: (x + t) e^s, s = r tanh(.) with a learned r per channel. At each scale (section 3.6) three couplings
alternate between the colours of a checkerboard; 2x2 squares become channels; three alternate between halves of the
channels; and half of the values, one colour of the checkerboard, are factored out as noise. The last scale has four
couplings by checkerboards.

Pixels: the input of the flow is logit((1 - a)/2 + a y) of y in (0, 1), a = 0.9 (section 4.1), whose derivative is in
log p(y). A little of the density lies outside of the image's range: bits are too high by it, never too low. Training
minimises -log p(y) of images with uniform noise between their 256 quantisation levels, in bits per dimension: an upper
bound on -log P of the levels. With fewer `bits` there are 2^bits of them.

Batch norm stands in the networks and, with its determinant, after each coupling (section 3.7). In training it has the
statistics of the batch, and then no example has a density of its own. Evaluation and sampling have fixed statistics,
running means of those of the averaged weights, and are exact. Networks start at 0, the whole as a normalisation.
"""

from __future__ import annotations

import functools
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.checks import check_size, size_text
from jaxgen.contract import (
    Aux,
    Context,
    Family,
    Latents,
    State,
    advance,
    by_settings,
    gradient_step,
    new_state,
    running_mean,
)
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import gaussian
from jaxgen.networks.couplings import bits_per_dim, mean_bits_per_dim, sum_per_example, to_image, to_unit
from jaxgen.networks.real_nvp import Flow
from jaxgen.options import TRACED, Count, NonNegative
from jaxgen.randomness import example_keys, normal

Array = jax.Array

STATISTICS_DECAY = 0.99


def to_logit(y: Array, constraint: float) -> tuple[Array, Array]:
    """logit((1 - a)/2 + a y) with a = constraint, and its log-determinant [n]. y: [n, ...] in [0, 1]."""
    # 1 - p by itself: where a is nearly 1 the rounded p may be 1.
    p, rest = ((1 - constraint) / 2 + constraint * part for part in (y, 1 - y))
    x = jnp.log(p) - jnp.log(rest)
    # The derivative of the logit is 1 / (p (1 - p)), by x itself: log p = -softplus(-x).
    return x, sum_per_example(jax.nn.softplus(x) + jax.nn.softplus(-x) + math.log(constraint))


def from_logit(x: Array, constraint: float) -> Array:
    """The inverse of `to_logit`."""
    return (jax.nn.sigmoid(x) - (1 - constraint) / 2) / constraint


class Model(NamedTuple):
    """The flow from logits to latents, and the logit's `constraint`."""

    flow: Flow
    constraint: float
    levels: int  # of quantisation

    @property
    def size(self) -> int:
        return math.prod(self.flow.image)

    def logits(self, x: Array, noise: Array | float) -> tuple[Array, Array]:
        """Logits of images in [-1, 1] with noise in [0, 1) between levels, and the log-determinant [n]."""
        return to_logit(to_unit(x, noise, self.levels), self.constraint)

    def noisy_logits(self, rng: Array, x: Array) -> tuple[Array, Array]:
        return self.logits(x, jax.random.uniform(rng, x.shape))

    def apply_train(self, weights, logits: Array) -> tuple[tuple[Array, Array], dict]:
        """Latents and log-determinant with the statistics of the batch, and these."""
        return self.flow.apply({'params': weights}, logits, train=True, mutable=['batch_stats'])

    def apply(self, state: State, x: Array, inverse: bool = False) -> tuple[Array, Array]:
        """Latents of logits, or the inverse, and log-determinant, with averaged weights and fixed statistics."""
        return self.flow.apply({'params': state.ema['flow'], **state.extra}, x, inverse=inverse)

    def log_density(self, state: State, x: Array, noise: Array | float) -> Array:
        """log p(y), nats [n], of images in [-1, 1]."""
        logits, log_slope = self.logits(x, noise)
        latents, log_det = self.apply(state, logits)
        return log_density(latents, log_det, log_slope)


def log_density(latents: Array, *log_dets: Array) -> Array:
    """log p(y), nats [n]: standard normal latents and the log-determinants of all maps (eq. 2)."""
    return gaussian(0.0, 0.0, latents) + sum(log_dets)


def is_scale(path: tuple) -> bool:
    """Whether a leaf of the weights is a scale of weight normalisation: batch norm's have the same name."""
    names = [key.key for key in path]
    return names[-1] == 'scale' and not names[-2].startswith('norm')


def loss(model: Model, scale_penalty: float, params, state: State, frozen, batch, rng) -> tuple[Array, Aux]:
    """Bits per dimension, and the penalty of weight normalisation's scales in the same unit."""
    logits, log_slope = model.noisy_logits(rng, batch['image'])
    (latents, log_det), _ = model.apply_train(params['flow'], logits)
    bits = bits_per_dim(log_density(latents, log_det, log_slope), model.size, model.levels).mean()
    scales = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params['flow']) if is_scale(path)]
    nats = scale_penalty * sum(jnp.square(scale).sum() for scale in scales)
    penalty = nats / (model.size * math.log(2))
    return bits + penalty, Aux({'loss': bits + penalty, 'bits_per_dim': bits})


def init(model: Model, optim, rng: Array, batch: dict, frozen: dict) -> State:
    weights_rng, noise_rng = jax.random.split(rng)
    logits, _ = model.noisy_logits(noise_rng, batch['image'])
    params = model.flow.init(weights_rng, logits[:1])['params']
    _, statistics = model.apply_train(params, logits)
    return new_state({'flow': params}, optim, extra=statistics)


def check(image: tuple[int, int, int], scales: int) -> None:
    """Raises UserError where images cannot be halved for so many scales."""
    divisor = 2 ** (scales - 1)
    check_size(image, divisor, f'config.model.scales = {scales}')
    if math.prod(image[:2]) < 2 * divisor**2:
        raise UserError(
            f'config.data.size = {size_text(image)}: a checkerboard needs two colours, so the smallest map of '
            f'config.model.scales = {scales} must have 2 pixels or more'
        )


@options.checked
def build(
    context: Context,
    *,
    width: Count = 64,
    blocks: Count = 8,
    scales: Count = 2,
    norm: bool = True,
    constraint: Annotated[float, '(0, 1)'] = 0.9,
    scale_penalty: NonNegative = 5e-5,
    temperature: Annotated[NonNegative, TRACED] = 1.0,
    bits: Annotated[int, '[1, 8]'] = 8,
    draws: Count = 1,
) -> Family:
    """Real NVP. The defaults are those for CIFAR-10.

    Args:
      width, blocks: channels of the residual networks at the first scale, doubled by every squeeze, and their blocks.
      scales: resolution levels; at all but the last one half of the values are factored out.
      norm: batch norm after the couplings.
      constraint: a, the fraction of (0, 1) that grey levels cover before the logit, so that it stays finite.
      scale_penalty: of the sum of squares of weight normalisation's scales, added to the nats of an image, as the
        authors do: here to the bits per dimension, it is divided by H W C log 2.
      temperature: factor of the noise of samples. Below 1 samples are less diverse and of higher quality.
      bits: of a value: the highest of the 8 that are stored. Bits per dimension are of 2^bits levels.
      draws: noises between levels over which `evaluate` takes the mean, for each image.

    `evaluate` returns 'bits_per_dim'. `encode` puts every pixel into the middle of its level and returns latents, which
    are standard normal noise under the model, float32 [n, H W C]; `decode` is its inverse.

    Raises:
      UserError: a value out of range.
    """
    check(context.image, scales)
    model = Model(Flow(context.image, scales, width, blocks, norm, context.dtype, context.remat), constraint, 2**bits)
    step = gradient_step(functools.partial(loss, model, scale_penalty), context.optim, 'flow')

    def update(state, frozen, batch, rng):
        step_rng, noise_rng = jax.random.split(rng)
        state, aux = step(state, frozen, batch, step_rng)
        state = advance(state, context.optim)
        # Statistics are those of the averaged weights, which are evaluated; those of init, of the first batch, count
        # too.
        _, new = model.apply_train(state.ema['flow'], model.noisy_logits(noise_rng, batch['image'])[0])
        return state.replace(extra=running_mean(state, state.extra, new, STATISTICS_DECAY)), aux.logs

    def evaluate(state, frozen, batch, rng):
        log_p = functools.partial(model.log_density, state, batch['image'])
        return {'bits_per_dim': mean_bits_per_dim(log_p, example_keys(rng, batch), context.image, draws, 2**bits)}

    def encode(state, frozen, batch, rng):
        """Latents, float32 [n, H W C]."""
        return model.apply(state, model.logits(batch['image'], 0.5)[0])[0]

    def decode(state, frozen, batch, latents, rng):
        return to_image(from_logit(model.apply(state, latents, inverse=True)[0], constraint), model.levels)

    def sample(state, frozen, batch, rng, settings):
        latents = settings['temperature'] * normal(example_keys(rng, batch), (model.size,))
        return decode(state, frozen, batch, latents, rng)

    def settings():
        return {'temperature': temperature}

    return Family(
        functools.partial(init, model, context.optim),
        update,
        by_settings(sample, settings),
        evaluate,
        encode,
        decode,
        divisor=2 ** (scales - 1),
        free=('temperature', 'draws'),
        sampling=('temperature',),
        settings=settings,
        statistics=True,
        latents=Latents(shape=(model.size,)),
    )
