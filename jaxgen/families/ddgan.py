"""Denoising diffusion GAN: a diffusion of few large steps (Xiao et al. 2021, arXiv 2112.07804).

The forward process is that of diffusion models, with T = 4 or so steps in place of a thousand. Going back over such a
step, p(x_s | x_t) is no Gaussian any more: it has many modes. So it is made by a conditional GAN. The generator takes
x_t and a latent z to an image x_0, with which x_s is drawn from the posterior q(x_s | x_t, x_0) (eq. 5); the
discriminator sees x_s beside x_t, and whether it came about by the forward process or this way. They minimise

    D: -E log s(D(x_s, x_t)) - E log(1 - s(D(x_s', x_t))) + r1 * 1/2 E |d D(x_s, x_t) / d x_s|^2
    G: -E log s(D(x_s', x_t)),    x_s' ~ q(x_s | x_t, G(x_t, z))

(eq. 4; s is the sigmoid, all steps alike). Each player has steps and noise of its own.

The variances are those of the SDE that preserves the variance, alpha-bar(t) = exp(-t beta_min - t^2 / 2 (beta_max -
beta_min)), at T + 1 times from 0.001 to 1; the first stands for the data. The authors' code adds noise of variance 1e-8
to the data too; here it does not.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, advance, gradient_step, new_state, shard_batch
from jaxgen.diffusion.samplers import ancestral, levels
from jaxgen.diffusion.schedules import Schedule, posterior, variance_preserving
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import lazily, non_saturating_generator, r1_penalty, vanilla_discriminator
from jaxgen.networks.ddgan import Discriminator, Generator
from jaxgen.networks.ncsnpp import PYRAMIDS, RESAMPLINGS
from jaxgen.randomness import example_keys, normal

Array = jax.Array

EARLIEST = 1e-3  # time of the SDE that stands for the data


def schedule(timesteps: int, beta_min: float, beta_max: float) -> Schedule:
    """Levels of x_1, ..., x_T; see above."""
    t = EARLIEST + (1 - EARLIEST) * np.arange(timesteps + 1) / timesteps
    alpha_bar = np.exp(-t * beta_min - 0.5 * t**2 * (beta_max - beta_min))
    return variance_preserving(1 - alpha_bar[1:] / alpha_bar[:-1])


def build(
    context: Context,
    *,
    timesteps: int = 4,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    latent: int = 100,
    style: int = 256,
    mapping_layers: int = 4,
    channels: int = 128,
    multipliers: tuple[int, ...] = (1, 2, 2, 2),
    blocks: int = 2,
    attention: tuple[int, ...] = (16,),
    resampling: str = 'fir',
    pyramid: str = 'residual',
    dropout: float = 0.0,
    discriminator_channels: int = 128,
    discriminator_multipliers: tuple[int, ...] = (1, 2, 4, 4),
    discriminator_full: int = 1,
    discriminator_embedding: int = 256,
    r1: float = 0.02,
    r1_every: int = 1,
) -> Family:
    """Denoising diffusion GAN.

    Args:
      timesteps: T.
      beta_min, beta_max: of the process, see above.
      latent: dimensions of z, from N(0, I).
      style, mapping_layers: of the generator, see networks/ddgan.py.
      channels, multipliers, blocks, attention, resampling, pyramid, dropout: of its U-Net, see networks/ncsnpp.py.
      discriminator_channels, discriminator_multipliers, discriminator_full, discriminator_embedding: see
        networks/ddgan.py.
      r1: weight of the penalty.
      r1_every: updates from one with the penalty to the next; it then counts so many times.

    evaluate gives per image 'squared_error', of the generator's x_0 against the image, mean over pixels in [-1, 1] and
    steps, and that of each step, 'squared_error/1' (the step that ends at the data) to 'squared_error/T'. It is to be
    no smaller than the images that x_t leaves open differ: a generator without z would get half of it.

    Raises:
      UserError: a value that cannot work.
    """
    if not multipliers:
        raise UserError('config.model.multipliers must have a number for each level: they are none')
    divisor = math.lcm(2 ** (len(multipliers) - 1), 2 ** max(len(discriminator_multipliers) - discriminator_full, 0))
    if min(timesteps, latent, style, blocks, r1_every, *multipliers, *discriminator_multipliers) < 1:
        raise UserError(
            'config.model: timesteps, latent, style, blocks, r1_every and all multipliers must be 1 or more'
        )
    if min(mapping_layers, discriminator_full, r1) < 0 or not 0 <= dropout < 1:
        raise UserError(
            'config.model: mapping_layers, discriminator_full and r1 must be 0 or more, dropout from 0 to below 1'
        )
    if not 0 <= beta_min <= beta_max or not beta_max:
        raise UserError('config.model: beta_min must be 0 or more, and beta_max as much or more, and not 0')
    if (
        min(channels, discriminator_channels, discriminator_embedding) < 4
        or channels % 2
        or discriminator_embedding % 2
    ):
        raise UserError(
            'config.model: channels, discriminator_channels and discriminator_embedding must be 4 or more, the first '
            'and the last even'
        )
    for field, value, choices in (('resampling', resampling, RESAMPLINGS), ('pyramid', pyramid, PYRAMIDS)):
        if value not in choices:
            raise UserError(f'config.model.{field} must be one of {choices}; it is {value!r}')
    check_size(context.image, divisor, 'config.model.multipliers and discriminator_multipliers')

    sizes = dict(channels=channels, multipliers=multipliers, blocks=blocks, attention=attention)
    sizes |= dict(resampling=resampling, pyramid=pyramid, dropout=dropout, remat=context.remat)
    generator = Generator(style, mapping_layers, sizes, context.dtype)
    discriminator = Discriminator(
        discriminator_channels,
        discriminator_multipliers,
        discriminator_full,
        discriminator_embedding,
        remat=context.remat,
        dtype=context.dtype,
    )
    table = schedule(timesteps, beta_min, beta_max)
    moves = posterior(table)
    alpha, sigma, alpha_s, sigma_s = levels(table)

    def at(values: np.ndarray, step: Array) -> Array:
        """Entries of a table of the steps, beside images."""
        return jnp.asarray(values, jnp.float32)[step][:, None, None, None]

    def diffuse(rng: Array, x: Array) -> dict[str, Array]:
        """A step for each image, and x_s and x_t before and after it."""
        step_rng, first_rng, second_rng = jax.random.split(rng, 3)
        step = jax.random.randint(step_rng, (len(x),), 0, timesteps)
        x_s = at(alpha_s, step) * x + at(sigma_s, step) * jax.random.normal(first_rng, x.shape)
        noise = jax.random.normal(second_rng, x.shape)
        return {'step': step, 'x_s': x_s, 'x_t': at(alpha / alpha_s, step) * x_s + at(moves.forward**0.5, step) * noise}

    def undo(params, given: dict[str, Array], rng: Array) -> Array:
        """x_s' of the steps and x_t that are given."""
        step, x_t = given['step'], given['x_t']
        z_rng, dropout_rng, noise_rng = jax.random.split(rng, 3)
        z = shard_batch(jax.random.normal(z_rng, (len(x_t), latent)))
        rngs = {'dropout': dropout_rng}
        x_0 = generator.apply({'params': params['generator']}, x_t, step, z, train=True, rngs=rngs)
        noise = jax.random.normal(noise_rng, x_t.shape)
        mean = at(moves.x_t_weight, step) * x_t + at(moves.x_0_weight, step) * x_0
        return mean + at(moves.variance**0.5, step) * noise

    def judge(params, given: dict[str, Array], x_s: Array) -> Array:
        return discriminator.apply({'params': params['discriminator']}, x_s, given['step'], given['x_t'])

    def discriminator_loss(params, state, frozen, batch, rng):
        diffusion_rng, rng = jax.random.split(rng)
        given = diffuse(diffusion_rng, batch['image'])
        real, fake = judge(params, given, given['x_s']), judge(params, given, undo(params, given, rng))
        value = vanilla_discriminator(real, fake)
        logs = {'discriminator_real': real.mean(), 'discriminator_fake': fake.mean(), 'discriminator_loss': value}
        if r1:
            logs['r1'] = lazily(
                lambda: r1_penalty(lambda x: judge(params, given, x), given['x_s']).mean(), state.step, r1_every
            )
            value = value + r1 * logs['r1']
        return value, Aux(logs)

    def generator_loss(params, state, frozen, batch, rng):
        diffusion_rng, rng = jax.random.split(rng)
        given = diffuse(diffusion_rng, batch['image'])
        value = non_saturating_generator(judge(params, given, undo(params, given, rng)))
        return value, Aux({'generator_loss': value})

    discriminator_step = gradient_step(discriminator_loss, context.optim, 'discriminator')
    generator_step = gradient_step(generator_loss, context.optim, 'generator')

    def init(rng, batch, frozen):
        generator_rng, discriminator_rng = jax.random.split(rng)
        x, step = batch['image'][:1], jnp.zeros(1, jnp.int32)
        params = {
            'generator': generator.init(generator_rng, x, step, jnp.zeros((1, latent)), train=False)['params'],
            'discriminator': discriminator.init(discriminator_rng, x, step, x)['params'],
        }
        # Only the generator makes pictures; an averaged discriminator would serve nothing.
        return new_state(params, context.optim, ema=('generator',))

    def update(state, frozen, batch, rng):
        discriminator_rng, generator_rng = jax.random.split(rng)
        state, discriminator = discriminator_step(state, frozen, batch, discriminator_rng)
        state, generator = generator_step(state, frozen, batch, generator_rng)
        return advance(state, context.optim), discriminator.logs | generator.logs

    def denoiser(state, keys: Array):
        """(x_t, step) -> x_0, with a latent of each sample's own key in each step."""

        def denoise(x, step):
            step = jnp.broadcast_to(step, len(x))
            z = normal(jax.vmap(jax.random.fold_in)(keys, step), (latent,))
            return generator.apply({'params': state.ema['generator']}, x, step, z, train=False)

        return denoise

    def walk(state, batch, rng, **options):
        start_rng, z_rng, noise_rng = jax.random.split(rng, 3)
        x = normal(example_keys(start_rng, batch), context.image)
        denoise, keys = denoiser(state, example_keys(z_rng, batch)), example_keys(noise_rng, batch)
        return ancestral(denoise, x, table, keys, variance='fixed_small', **options)

    def sample(state, frozen, batch, rng):
        return walk(state, batch, rng)

    def trajectory(state, frozen, batch, rng):
        return walk(state, batch, rng, trajectory=True)[1]

    def evaluate(state, frozen, batch, rng):
        x, (z_rng, noise_rng) = batch['image'], jax.random.split(rng)
        denoise, keys = denoiser(state, example_keys(z_rng, batch)), example_keys(noise_rng, batch)

        def one(step):
            step = jnp.broadcast_to(step, len(x))
            noise = normal(jax.vmap(jax.random.fold_in)(keys, step), context.image)
            return jnp.square(denoise(at(alpha, step) * x + at(sigma, step) * noise, step) - x).mean((1, 2, 3))

        errors = jax.lax.map(one, jnp.arange(timesteps))
        by_step = {f'squared_error/{i + 1}': errors[i] for i in range(timesteps)}
        return {'squared_error': errors.mean(0), **by_step}

    return Family(init, update, sample, evaluate, trajectory=trajectory, divisor=divisor)
