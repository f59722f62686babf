"""WGAN-GP: Wasserstein GAN with gradient penalty (Gulrajani et al. 2017, arXiv 1704.00028).

A critic f with slopes near 1 estimates the Wasserstein distance between data and samples, and the
generator G lowers it. Critic loss (eq. 3), `n_critic` steps for each generator step (algorithm 1):

    E f(G(z)) - E f(x) + penalty * E (|grad f(x_hat)| - 1)^2,  x_hat on the line from x to G(z)

and generator loss -E f(G(z)). The networks are the paper's residual ones for CIFAR-10 (appendix F),
for other sizes with more or fewer levels. The critic has no batch normalisation: its gradient at one
image must not depend on the others.

One update takes a batch of n_critic * b images: b for each critic step. The generator step draws
`generator_batch` * b latents.

Batch normalisation of the generator: training normalises by the batch. Samples are drawn with fixed
statistics, so that an image does not depend on what is drawn with it: after each update the
averaged generator (the one that samples) runs once on the update's latents, and the running average
of those statistics is State.extra. Statistics gathered in training instead would belong to other
weights than those that sample. The paper normalises its samples by their own batch.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.contract import Context, Family, advance, example_keys, gradient_step, new_state, normal, spread
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import gradient_penalty, wasserstein_critic, wasserstein_generator
from jaxgen.networks.layers import BatchNorm, Conv, Dense, downsample_mean, upsample_nearest, variance_scaling

Array = jax.Array

# Of the running batch statistics: the newest ten updates or so count.
STATISTICS_DECAY = 0.9


class Block(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions, [n, H, W, C] -> [n, H', W', features].

    Attributes:
      resample: 'up' doubles H and W, 'down' halves them, '' keeps them.
      norm: with batch normalisation, on the statistics of the batch if `train`.
      first: no normalisation and activation before the first convolution, as the input is an image.
    """

    features: int
    resample: str = ''
    norm: bool = False
    first: bool = False
    train: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def activate(h, name):
            return nn.relu(BatchNorm(train=self.train, dtype=self.dtype, name=name)(h) if self.norm else h)

        he = variance_scaling(2.0)
        middle = x.shape[-1] if self.resample == 'down' and not self.first else self.features

        h = x if self.first else activate(x, 'norm1')
        h = upsample_nearest(h) if self.resample == 'up' else h
        h = Conv(middle, init=he, dtype=self.dtype, name='conv1')(h)
        h = activate(h, 'norm2')
        h = Conv(self.features, init=he, dtype=self.dtype, name='conv2')(h)
        h = downsample_mean(h) if self.resample == 'down' else h

        # A 1x1 convolution and resampling may change places: it runs where there are fewer pixels.
        # (The authors' code pools last except in the critic's first block; the result is the same.)
        x = downsample_mean(x) if self.resample == 'down' else x
        if self.resample or x.shape[-1] != self.features:
            x = Dense(self.features, dtype=self.dtype, name='shortcut')(x)
        x = upsample_nearest(x) if self.resample == 'up' else x
        return x + h


class Generator(nn.Module):
    """[n, latent] -> images float32 [n, H, W, C] in (-1, 1)."""

    image: tuple[int, int, int]
    width: int
    levels: int
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, z: Array, train: bool = False) -> Array:
        block = nn.remat(Block) if self.remat else Block
        height, width, channels = self.image
        height, width = height >> self.levels, width >> self.levels
        x = Dense(height * width * self.width, dtype=self.dtype)(z)
        x = x.reshape(-1, height, width, self.width)
        for i in range(self.levels):
            x = block(self.width, 'up', norm=True, train=train, dtype=self.dtype, name=f'block{i}')(x)
        x = nn.relu(BatchNorm(train=train, dtype=self.dtype, name='norm')(x))
        return jnp.tanh(Conv(channels, dtype=self.dtype)(x).astype(jnp.float32))


class Critic(nn.Module):
    """[n, H, W, C] -> float32 [n]. Halves the image one time fewer than the generator doubles it."""

    width: int
    levels: int
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        block = nn.remat(Block) if self.remat else Block
        resample = ('down',) * max(self.levels - 1, 1) + ('', '')
        for i, how in enumerate(resample):
            x = block(self.width, how, first=i == 0, dtype=self.dtype, name=f'block{i}')(x)
        x = nn.relu(x).astype(jnp.float32).mean((1, 2))  # [n, width]
        return Dense(1)(x)[:, 0]


def build(
    context: Context,
    *,
    latent: int = 128,
    width: int = 128,
    levels: int = 3,
    n_critic: int = 5,
    penalty: float = 10.0,
    one_sided: bool = False,
    generator_batch: int = 2,
    dequantise: bool = True,
) -> Family:
    """WGAN-GP.

    Args:
      latent: dimensions of z ~ N(0, I).
      width: channels of all blocks of both networks.
      levels: times that the generator doubles the image's size.
      n_critic: critic steps in one update.
      penalty: weight of the gradient penalty.
      one_sided: penalise only slopes above 1.
      generator_batch: latents of the generator step, as a multiple of the images of a critic step.
      dequantise: real pixels get uniform noise as wide as one of 256 levels.

    evaluate gives 'critic' per image: the critic's value, of meaning only next to that of other
    images under the same critic (test images well below training images: it overfits).

    Raises:
      UserError: a value that cannot work.
    """
    height, columns, _ = context.image
    divisor = 2**levels
    if min(latent, width, levels, n_critic, generator_batch) < 1 or penalty < 0:
        raise UserError(
            'config.model: latent, width, levels, n_critic, generator_batch must be 1 or more, penalty 0 or more'
        )
    if height % divisor or columns % divisor:
        raise UserError(
            f'config.data.size = {height} must be a multiple of {divisor} for config.model.levels = {levels}'
        )

    generator = Generator(context.image, width, levels, context.dtype, context.remat)
    critic = Critic(width, levels, context.dtype, context.remat)

    def generate(weights, z: Array) -> tuple[Array, dict]:
        """Images normalised by their batch, and the batch's statistics."""
        return generator.apply({'params': weights}, z, train=True, mutable=['batch_stats'])

    def critic_loss(params, frozen, batch, rng):
        z_rng, pixel_rng, penalty_rng = jax.random.split(rng, 3)

        def f(x):
            return critic.apply({'params': params['critic']}, x)

        x = batch['image']
        if dequantise:
            x = x + jax.random.uniform(pixel_rng, x.shape, minval=-1 / 255, maxval=1 / 255)
        fake, _ = generate(params['generator'], jax.random.normal(z_rng, (len(x), latent)))
        distance = wasserstein_critic(f(x), f(fake))
        excess = gradient_penalty(f, x, fake, penalty_rng, one_sided).mean()
        value = distance + penalty * excess
        return value, {'critic_loss': value, 'wasserstein': -distance, 'penalty': excess}

    def generator_loss(params, frozen, batch, rng):
        images, _ = generate(params['generator'], batch['z'])
        value = wasserstein_generator(critic.apply({'params': params['critic']}, images))
        return value, {'generator_loss': value}

    critic_steps = gradient_step(critic_loss, context.optim, 'critic', times=n_critic)
    generator_step = gradient_step(generator_loss, context.optim, 'generator')

    def init(rng, batch, frozen):
        generator_rng, critic_rng = jax.random.split(rng)
        if len(batch['image']) % n_critic:
            raise UserError(
                f'config.data.batch = {len(batch["image"])} must be a multiple of config.model.n_critic = {n_critic}'
            )
        variables = generator.init(generator_rng, jnp.zeros((1, latent)))
        params = {
            'generator': variables['params'],
            'critic': critic.init(critic_rng, batch['image'][:1])['params'],
        }
        # Only the generator makes pictures; an averaged critic would serve nothing.
        return new_state(params, context.optim, extra=variables['batch_stats'], ema=('generator',))

    def update(state, frozen, batch, rng):
        critic_rng, z_rng, generator_rng = jax.random.split(rng, 3)
        n = len(batch['image']) // n_critic * generator_batch
        z = spread(jax.random.normal(z_rng, (n, latent)))
        state, critic_logs = critic_steps(state, frozen, {'image': batch['image']}, critic_rng)
        state, generator_logs = generator_step(state, frozen, {'z': z}, generator_rng)
        # At first all statistics count alike: the start values would else linger.
        decay = jnp.minimum(STATISTICS_DECAY, state.step / (state.step + 1))
        state = advance(state, context.optim)
        _, new = generate(state.ema['generator'], z)
        extra = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.extra, new['batch_stats'])
        return state.replace(extra=extra), critic_logs | generator_logs

    def decode(state, frozen, latents, rng):
        return generator.apply({'params': state.ema['generator'], 'batch_stats': state.extra}, latents)

    def sample(state, frozen, batch, rng):
        return decode(state, frozen, normal(example_keys(rng, batch), (latent,)), rng)

    def evaluate(state, frozen, batch, rng):
        return {'critic': critic.apply({'params': state.params['critic']}, batch['image'])}

    return Family(init, update, sample, evaluate, decode=decode, divisor=divisor, latent=(latent,))
