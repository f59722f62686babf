"""A generator of one dimension, trained on the divergence of two histograms: the simplest path from noise to samples.

A multilayer perceptron maps z ~ N(0, I) to a number in [-1, 1]. Its samples and the data of a batch are each made a
histogram of `bins` cells, and the loss is their Jensen-Shannon divergence (Lin 1991),

    JS(p, q) = (KL(p || m) + KL(q || m)) / 2,  m = (p + q) / 2,  in nats, from 0 to ln 2,

which a GAN's discriminator estimates where histograms cannot be counted (Goodfellow et al. 2014, theorem 1). Counting
has no gradient, so every number counts for a cell with the mass there of a logistic kernel around it; as the kernel's
scale goes to 0 the counts become whole. Data and samples are smoothed alike, and the divergence is 0 where they agree.
A narrow kernel resolves shapes but has no gradient across empty cells: a sample between two modes is drawn to neither.
So the loss is the mean over several scales, `smoothing`.

In d dimensions there are bins^d cells, most of them empty: this is the tutorial's case, and it stops at one.
With few examples per cell two histograms of one distribution differ: JS of two batches of n is about (bins - 1) / (4 n)
even then, so batches are large. Where gradients are accumulated each part of a batch has a histogram of its own.
"""

from __future__ import annotations

import math
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.contract import Aux, Context, Family, Latents, make_update, new_state, shard_batch
from jaxgen.errors import UserError
from jaxgen.networks.js_generator import Generator
from jaxgen.options import Count, Rule
from jaxgen.randomness import example_keys, normal

Array = jax.Array

LEVELS = 256  # grey levels of a pixel


def soft_histogram(x: Array, bins: int, smoothing: float) -> Array:
    """Probabilities [bins] of cells of one width, by numbers [n] in [-1, 1].

    Args:
      smoothing: scale of the logistic kernel, in cells. What of it is outside [-1, 1] counts for the outermost cells.
    """
    chex.assert_rank(x, 1)
    edges = jnp.linspace(-1, 1, bins + 1)[1:-1]
    scale = smoothing * 2 / bins
    below = jax.nn.sigmoid((edges - x[:, None].astype(jnp.float32)) / scale).mean(0)  # mass below each inner edge
    return jnp.diff(jnp.concatenate([jnp.zeros(1), below, jnp.ones(1)]))


def jensen_shannon(p: Array, q: Array) -> Array:
    """JS of two distributions [..., k], in nats, [...]. Its gradient is finite where entries are 0."""
    chex.assert_equal_shape([p, q])
    m = (p + q) / 2

    def kl(a: Array) -> Array:
        # a log(a / m) tends to 0 with a; the bound keeps the logarithm's gradient from infinity times 0.
        least = jnp.finfo(jnp.float32).tiny
        return (a * (jnp.log(jnp.maximum(a, least)) - jnp.log(jnp.maximum(m, least)))).sum(-1)

    return (kl(p) + kl(q)) / 2


def level_histogram(x: Array) -> Array:
    """Probabilities [256] of the grey levels by samples [n] in [-1, 1] and one more of each level: none is 0."""
    chex.assert_rank(x, 1)
    level = jnp.clip(jnp.round((x + 1) * 127.5), 0, LEVELS - 1).astype(jnp.int32)
    counts = jnp.zeros(LEVELS).at[level].add(1.0) + 1
    return counts / counts.sum()


@options.checked
def build(
    context: Context,
    *,
    latent: Count = 1,
    hidden: Annotated[tuple[int, ...], '[1, inf)', Rule(len, 'one number or more')] = (64, 64),
    bins: Annotated[int, '[2, inf)'] = 64,
    smoothing: Annotated[tuple[float, ...], '(0, inf)', Rule(len, 'one number or more')] = (0.5, 2.0),
    generator_batch: Count = 4,
    measured: Count = 2**16,
) -> Family:
    """A generator of one number.

    Args:
      latent: dimensions of z.
      hidden: units of the generator's layers, one layer or more.
      bins: cells of the histograms.
      smoothing: scales of the kernels, in cells.
      generator_batch: samples of a histogram, as a multiple of the batch of data.
      measured: samples from which `evaluate` estimates the model's distribution.

    evaluate returns 'bits_per_dim', -log2 p(x) of the example's grey level, where p is the histogram over the 256
    levels of `measured` samples and one more of each level: a true likelihood, of the model that draws from this
    histogram.
    The logs' 'js' is of one batch and the first scale, in nats.

    Raises:
      UserError: a value that cannot work, or data that are not one number each.
    """
    if context.image != (1, 1, 1):
        raise UserError(
            'this generator makes one number: set config.data.source = gaussians:1 or config.data.size and channels to '
            f'1; an image has {math.prod(context.image)} numbers here'
        )
    generator = Generator(hidden, context.dtype)

    def generate(weights, z: Array) -> Array:
        return generator.apply({'params': weights}, z)

    def loss(params, state, frozen, batch, rng):
        z = shard_batch(jax.random.normal(rng, (generator_batch * len(batch['image']), latent)))
        real, fake = batch['image'].reshape(-1), generate(params['generator'], z).reshape(-1)
        by_scale = [jensen_shannon(*(soft_histogram(x, bins, scale) for x in (real, fake))) for scale in smoothing]
        value = sum(by_scale) / len(by_scale)
        return value, Aux({'loss': value, 'js': by_scale[0], 'deviation': fake.std()})

    update = make_update(loss, context.optim, 'generator')

    def init(rng, batch, frozen):
        weights = generator.init(rng, jnp.zeros((1, latent)))['params']
        return new_state({'generator': weights}, context.optim)

    def decode(state, frozen, batch, latents, rng):
        return generate(state.ema['generator'], latents)

    def sample(state, frozen, batch, rng):
        return decode(state, frozen, batch, normal(example_keys(rng, batch), (latent,)), rng)

    def evaluate(state, frozen, batch, rng):
        # The same samples for every batch: an example's likelihood depends on no other example.
        x = generate(state.ema['generator'], shard_batch(jax.random.normal(rng, (measured, latent))))
        p = level_histogram(x.reshape(-1))
        level = jnp.round((batch['image'].reshape(-1) + 1) * 127.5).astype(jnp.int32)
        return {'bits_per_dim': -jnp.log2(p[level])}

    return Family(init, update, sample, evaluate, decode=decode, free=('measured',), latents=Latents(shape=(latent,)))
