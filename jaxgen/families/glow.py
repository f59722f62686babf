"""Glow: a normalising flow with invertible 1x1 convolutions (Kingma & Dhariwal 2018, arXiv 1807.03039).

An invertible network f turns an image into noise of the same size, so that its density is exact:

    log p(y) = log p(f(y)) + log |det df/dy|.

Each of `levels` levels turns 2x2 squares of pixels into channels, makes `depth` steps, and but for the last one gives
half of the channels away as noise z, whose mean and deviation a convolution reads off the other half. A step is

    actnorm       (x + b) e^logs per channel, with mean 0 and deviation 1 on the first batch (section 3.1)
    1x1           a learned matrix of the channels (section 3.2)
    coupling      the second half of the channels is shifted, and scaled by sigmoid(h + 2), by what a network makes of
                  the first half (section 3.3; the scale is that of the authors' code)

The mean and deviation of the last z are learned as well, and depend on the class where `conditional` says so.

Training minimises -log p(y) of images with uniform noise between their 256 levels, in bits per dimension: a bound on
what their levels cost. Bits are those of 256 levels always.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxgen.checks import check_labels, check_size
from jaxgen.contract import Aux, Context, Family, Latents, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import gaussian
from jaxgen.networks.couplings import (
    bits_per_dim,
    to_image,
    to_unit,
)
from jaxgen.networks.glow import Flow, Top, latent_shapes
from jaxgen.randomness import example_keys, normal

Array = jax.Array

COUPLINGS, MIXING = ('affine', 'additive'), ('matrix', 'lu')


def build(
    context: Context,
    *,
    width: int = 512,
    depth: int = 32,
    levels: int = 3,
    coupling: str = 'affine',
    mixing: str = 'matrix',
    edge: bool = True,
    learn_top: bool = True,
    conditional: bool = False,
    temperature: float = 1.0,
    draws: int = 1,
) -> Family:
    """Glow. The defaults are those for CIFAR-10.

    Args:
      width: channels inside the couplings' networks.
      depth, levels: steps of a level, and levels (K and L of the paper).
      coupling: 'affine', or 'additive', which has no scale.
      mixing: of the channels: 'matrix', or 'lu', a matrix kept as the product of its factors.
      edge: tell 3x3 convolutions where the image ends.
      learn_top: learn the last z's mean and deviation.
      conditional: they depend on the class, `batch['label']`, too.
      temperature: what the noise of samples is multiplied by. Below 1 samples are fewer kinds of better pictures.
      draws: noises between levels that evaluate takes the mean over, for each image.

    evaluate gives 'bits_per_dim'. encode puts every pixel into the middle of its level and gives what the model takes
    for standard normal noise, float32 [n, H W C], without the class's part; decode is its inverse. With `conditional`,
    classify gives log p(y | class), by Bayes' rule the logits of even classes, up to what they have in common.

    Raises:
      UserError: a value out of range, no labels.
    """
    if coupling not in COUPLINGS:
        raise UserError(f'config.model.coupling must be one of {COUPLINGS}; it is {coupling!r}')
    if mixing not in MIXING:
        raise UserError(f'config.model.mixing must be one of {MIXING}; it is {mixing!r}')
    if min(width, depth, levels, draws) < 1:
        raise UserError('config.model: width, depth, levels and draws must be 1 or more')
    if temperature < 0:
        raise UserError(f'config.model.temperature {temperature} must be 0 or more')
    check_labels(context, conditional)
    check_size(context.image, 2**levels, f'config.model.levels = {levels}')

    size, last = math.prod(context.image), latent_shapes(context.image, levels)[-1]
    top = Top(last, context.classes if conditional else 0, learn_top, edge)
    net = Flow(context.image, width, depth, levels, coupling, mixing, edge, top, context.dtype, context.remat)

    def variables(params, fixed) -> dict:
        return {'params': params['flow'], **(fixed or {})}

    def density(params, fixed, x: Array, noise: Array | float, label: Array | None = None) -> tuple[Array, Array]:
        """Latents [n, D] and log p(y), nats [n], of images in [-1, 1]."""
        return net.apply(variables(params, fixed), to_unit(x, noise) - 0.5, label)

    def labels(batch) -> Array | None:
        return batch['label'] if conditional else None

    # Where others have earlier stages' weights, this loss has the matrices that stay as they are.
    def loss(params, state, frozen, batch, rng):
        x = batch['image']
        _, log_p = density(params, state.extra, x, jax.random.uniform(rng, x.shape), labels(batch))
        bits = bits_per_dim(log_p, size).mean()
        return bits, Aux({'loss': bits})

    update = make_update(loss, context.optim, 'flow')

    def init(rng, batch, frozen):
        weights_rng, noise_rng = jax.random.split(rng)
        y = to_unit(batch['image'], jax.random.uniform(noise_rng, batch['image'].shape)) - 0.5
        fixed = net.init(weights_rng, y, labels(batch))
        return new_state({'flow': fixed.pop('params')}, context.optim, extra=fixed or None)

    def evaluate(state, frozen, batch, rng):
        def draw(keys):
            noise = jax.vmap(lambda key: jax.random.uniform(key, context.image))(keys)
            _, log_p = density(state.ema, state.extra, batch['image'], noise, labels(batch))
            return bits_per_dim(log_p, size)

        keys = jax.vmap(jax.random.split, (0, None), 1)(example_keys(rng, batch), draws)  # [draws, n]
        return {'bits_per_dim': jax.lax.map(draw, keys).mean(0)}

    def pictures(state, latents, label=None) -> Array:
        y, _ = net.apply(variables(state.ema, state.extra), latents, label, inverse=True)
        # The scales of couplings have no lower bound: an unlikely draw can grow past all float32 numbers on its way
        # back. The inverse itself is that of the density, exactly; only here, where values beyond an image's are cut,
        # what is no number any more becomes grey.
        return to_image(jnp.nan_to_num(y, posinf=1.0, neginf=-1.0) + 0.5)

    def sample(state, frozen, batch, rng):
        return pictures(state, temperature * normal(example_keys(rng, batch), (size,)), labels(batch))

    def encode(state, frozen, batch, rng):
        """Latents, float32 [n, H W C]."""
        return density(state.ema, state.extra, batch['image'], 0.5)[0]

    def decode(state, frozen, batch, latents, rng):
        return pictures(state, latents)

    def classify(state, frozen, batch, rng):
        """Logits, float32 [n, classes]: the last z is all that depends on the class."""
        weights = {'params': state.ema['flow']['top']}
        z = encode(state, frozen, batch, rng)[:, -math.prod(last) :].reshape(-1, *last)
        mean, log_std = top.apply(weights)
        z = mean + jnp.exp(log_std) * z
        means, log_stds = top.apply(weights, jnp.arange(context.classes))
        return jax.vmap(lambda mean, log_std: gaussian(mean, log_std, z), out_axes=1)(means, log_stds)

    return Family(
        init,
        update,
        sample,
        evaluate,
        encode,
        decode,
        classify=classify if conditional else None,
        conditions=('label',) if conditional else (),
        divisor=2**levels,
        free=('temperature', 'draws'),
        latents=Latents(shape=(size,)),
    )
