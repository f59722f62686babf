"""Glow: a normalising flow with invertible 1x1 convolutions (Kingma & Dhariwal 2018, arXiv 1807.03039).

An invertible network f maps an image to noise of the same size, so that its density is exact (eq. 6):

    log p(y) = log p(f(y)) + log |det df/dy|.

Each of `levels` resolution levels turns 2x2 squares of pixels into channels and has `depth` steps, and all but the last
factor out half of the channels as noise z, whose mean and standard deviation are those of a convolution of the other
half. A step is

    actnorm       (x + b) e^logs per channel, with mean 0 and deviation 1 on the first batch (section 3.1)
    1x1           a learned matrix of the channels (section 3.2)
    coupling      the second half of the channels is shifted, and scaled by sigmoid(h + 2), by a network of the first
                  half (section 3.3; the scale is that of the authors' code)

Mean and standard deviation of the last z are learned as well, and depend on the class with `conditional`.

Training minimises -log p(y) of images with uniform noise between their 256 quantisation levels, in bits per dimension:
an upper bound on -log P of the levels. With `bits` = 5 images have 32 levels, as the paper's of 256 pixels.
"""

from __future__ import annotations

import functools
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.checks import check_labels, check_size
from jaxgen.contract import Aux, Context, Family, Latents, State, by_settings, make_update, new_state
from jaxgen.losses.likelihoods import gaussian
from jaxgen.networks.couplings import bits_per_dim, mean_bits_per_dim, to_image, to_unit
from jaxgen.networks.glow import Flow, Top, latent_shapes
from jaxgen.options import TRACED, Count, NonNegative, OneOf
from jaxgen.randomness import example_keys, normal

Array = jax.Array


class Model(NamedTuple):
    """The flow from images around 0 to latents, and the prior of the last of them."""

    flow: Flow
    conditional: bool
    levels: int  # of quantisation

    @property
    def size(self) -> int:
        return math.prod(self.flow.image)

    def label(self, batch: dict) -> Array | None:
        return batch['label'] if self.conditional else None

    def apply(self, params, extra, *inputs, **kwargs) -> tuple[Array, Array | None]:
        """See Flow. extra: State.extra, the matrices that are not learned with 'lu'."""
        return self.flow.apply({'params': params['flow'], **(extra or {})}, *inputs, **kwargs)

    def density(self, params, extra, x: Array, label: Array | None, noise: Array | float) -> tuple[Array, Array]:
        """Latents [n, D] and log p(y), nats [n], of images in [-1, 1]."""
        return self.apply(params, extra, to_unit(x, noise, self.levels) - 0.5, label)

    def images(self, state: State, latents: Array, label: Array | None = None) -> Array:
        """Images in [-1, 1] of latents [n, D]."""
        y, _ = self.apply(state.ema, state.extra, latents, label, inverse=True)
        # The scales of couplings have no lower bound: an unlikely draw can overflow float32 on its way back. The
        # inverse itself is that of the density, exactly; only here, where values are clipped to an image's, NaN
        # becomes grey.
        return to_image(jnp.nan_to_num(y, posinf=1.0, neginf=-1.0) + 0.5, self.levels)


def loss(model: Model, params, state: State, frozen, batch, rng) -> tuple[Array, Aux]:
    """Bits per dimension."""
    x = batch['image']
    _, log_p = model.density(params, state.extra, x, model.label(batch), jax.random.uniform(rng, x.shape))
    bits = bits_per_dim(log_p, model.size, model.levels).mean()
    return bits, Aux({'loss': bits})


def init(model: Model, optim, rng: Array, batch: dict, frozen: dict) -> State:
    weights_rng, noise_rng = jax.random.split(rng)
    y = to_unit(batch['image'], jax.random.uniform(noise_rng, batch['image'].shape), model.levels) - 0.5
    extra = model.flow.init(weights_rng, y, model.label(batch))
    return new_state({'flow': extra.pop('params')}, optim, extra=extra or None)


def class_logits(top: Top, weights, latents: Array) -> Array:
    """log p(z | class) of the last z, [n, classes], from latents [n, D] without a class; the rest of log p(y | class)
    is the same for all classes."""
    variables, shape = {'params': weights}, top.shape
    mean, log_std = top.apply(variables)
    z = mean + jnp.exp(log_std) * latents[:, -math.prod(shape) :].reshape(-1, *shape)
    means, log_stds = top.apply(variables, jnp.arange(top.classes))
    return jax.vmap(lambda mean, log_std: gaussian(mean, log_std, z), out_axes=1)(means, log_stds)


@options.checked
def build(
    context: Context,
    *,
    width: Count = 512,
    depth: Count = 32,
    levels: Count = 3,
    coupling: Annotated[str, OneOf('affine', 'additive')] = 'affine',
    mixing: Annotated[str, OneOf('matrix', 'lu')] = 'matrix',
    edge: bool = True,
    learn_top: bool = True,
    conditional: bool = False,
    temperature: Annotated[NonNegative, TRACED] = 1.0,
    bits: Annotated[int, '[1, 8]'] = 8,
    draws: Count = 1,
) -> Family:
    """Glow. The defaults are those for CIFAR-10.

    Args:
      width: channels inside the couplings' networks.
      depth, levels: steps of a level, and resolution levels (K and L of the paper).
      coupling: 'affine', or 'additive', which has no scale.
      mixing: of the channels: 'matrix', or 'lu', a matrix kept as the product of its factors.
      edge: give 3x3 convolutions a channel that marks the image's border.
      learn_top: learn the last z's mean and standard deviation.
      conditional: they depend on the class, `batch['label']`, too.
      temperature: factor of the noise of samples. Below 1 samples are less diverse and of higher quality.
      bits: of a value: the highest of the 8 that are stored. Bits per dimension are of 2^bits levels.
      draws: noises between levels over which `evaluate` takes the mean, for each image.

    `evaluate` returns 'bits_per_dim'. `encode` puts every pixel into the middle of its level and returns latents, which
    are standard normal noise under the model, float32 [n, H W C], without the class's part; `decode` is its inverse.
    With `conditional`, `classify` returns log p(y | class) but for a constant, by Bayes' rule the logits of classes
    that are equally frequent.

    Raises:
      UserError: a value out of range, no labels.
    """
    check_labels(context, conditional)
    check_size(context.image, 2**levels, f'config.model.levels = {levels}')
    top_shape = latent_shapes(context.image, levels)[-1]
    top = Top(top_shape, context.classes if conditional else 0, learn_top, edge)
    flow = Flow(context.image, width, depth, levels, coupling, mixing, edge, top, context.dtype, context.remat)
    model = Model(flow, conditional, 2**bits)

    def evaluate(state, frozen, batch, rng):
        def log_p(noise):
            return model.density(state.ema, state.extra, batch['image'], model.label(batch), noise)[1]

        return {'bits_per_dim': mean_bits_per_dim(log_p, example_keys(rng, batch), context.image, draws, 2**bits)}

    def sample(state, frozen, batch, rng, settings):
        latents = settings['temperature'] * normal(example_keys(rng, batch), (model.size,))
        return model.images(state, latents, model.label(batch))

    def encode(state, frozen, batch, rng):
        """Latents, float32 [n, H W C]."""
        return model.density(state.ema, state.extra, batch['image'], None, 0.5)[0]

    def decode(state, frozen, batch, latents, rng):
        return model.images(state, latents)

    def classify(state, frozen, batch, rng):
        """Logits, float32 [n, classes]."""
        return class_logits(top, state.ema['flow']['top'], encode(state, frozen, batch, rng))

    def settings():
        return {'temperature': temperature}

    return Family(
        functools.partial(init, model, context.optim),
        make_update(functools.partial(loss, model), context.optim, 'flow'),
        by_settings(sample, settings),
        evaluate,
        encode,
        decode,
        classify=classify if conditional else None,
        conditions=('label',) if conditional else (),
        divisor=2**levels,
        free=('temperature', 'draws'),
        sampling=('temperature',),
        settings=settings,
        latents=Latents(shape=(model.size,)),
    )
