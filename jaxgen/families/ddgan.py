"""Denoising diffusion GAN: a diffusion of few large steps (Xiao et al. 2021, arXiv 2112.07804).

The forward process is that of diffusion models, with T = 4 or so steps in place of a thousand. Going back over such a
step, p(x_s | x_t) is no Gaussian any more: it has many modes. So a conditional GAN models it. The generator takes
x_t and a latent z to an estimate of x_0, with which x_s is drawn from the posterior q(x_s | x_t, x_0) (eq. 5); the
discriminator tells pairs (x_s, x_t) of the forward process from these. They minimise

    D: -E log s(D(x_s, x_t)) - E log(1 - s(D(x_s', x_t))) + r1 * 1/2 E |d D(x_s, x_t) / d x_s|^2
    G: -E log s(D(x_s', x_t)),    x_s' ~ q(x_s | x_t, G(x_t, z))

(eq. 4; s is the sigmoid, all steps alike). Each of the two losses has steps and noise of its own.

The variances are those of the SDE that preserves the variance, alpha-bar(t) = exp(-t beta_min - t^2 / 2 (beta_max -
beta_min)), at T + 1 times from 0.001 to 1; the first stands for the data. The authors' code adds noise of variance 1e-8
to the data too; here it does not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import options
from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, State, advance, gradient_step, new_state, shard_batch
from jaxgen.diffusion import former as formats
from jaxgen.diffusion import samplers
from jaxgen.diffusion.processes import expanded
from jaxgen.diffusion.schedules import Schedule, posterior, variance_preserving
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import lazily, non_saturating_generator, r1_penalty, vanilla_discriminator
from jaxgen.networks.ddgan import Discriminator, Generator
from jaxgen.options import Count, Fields, NonNegative, Positive, Section
from jaxgen.randomness import example_keys, normal

Array = jax.Array

former = formats.ddgan  # fields of runs that were saved before there were sections
MOVED = formats.MOVED['ddgan']
EMPTY: dict[str, Any] = {}
EARLIEST = 1e-3  # time of the SDE that stands for the data


def noise_levels(*, timesteps: Count = 4, beta_min: NonNegative = 0.1, beta_max: Positive = 20.0) -> Schedule:
    """The noise levels of x_1, ..., x_T.

    Args:
      timesteps: T.
      beta_min, beta_max: of the SDE at times 0 and 1.

    Raises:
      UserError: beta_min is more than beta_max.
    """
    if beta_min > beta_max:
        raise UserError(f'config.model.process.beta_min {beta_min} must be at most as much as beta_max {beta_max}')
    t = EARLIEST + (1 - EARLIEST) * np.arange(timesteps + 1) / timesteps
    alpha_bar = np.exp(-t * beta_min - 0.5 * t**2 * (beta_max - beta_min))
    return variance_preserving(1 - alpha_bar[1:] / alpha_bar[:-1])


class Model(NamedTuple):
    """A denoising diffusion GAN, its parts bound to their options."""

    shape: tuple[int, ...]  # of one x_0
    table: Schedule
    generator: Generator
    discriminator: Discriminator


class Transition(NamedTuple):
    """A step of the forward process for each example."""

    step: Array  # int32 [n]
    x_s: Array  # before it, [n, ...]
    x_t: Array  # and after


@options.checked
def build(
    context: Context,
    *,
    process: Annotated[Section, Fields(noise_levels)] = EMPTY,
    generator: Annotated[Section, Fields(Generator, ('remat', 'dtype'))] = EMPTY,
    discriminator: Annotated[Section, Fields(Discriminator, ('remat', 'dtype'))] = EMPTY,
    r1: NonNegative = 0.02,
    r1_every: Count = 1,
) -> Family:
    """Denoising diffusion GAN.

    Args:
      process: its noise levels, see `noise_levels`.
      generator, discriminator: see networks/ddgan.py.
      r1: weight of the penalty.
      r1_every: updates from one with the penalty to the next; it then counts so many times.

    Raises:
      UserError: an image that cannot be halved often enough, values that do not go together.
    """
    halvings = len(generator['multipliers']) - 1, max(len(discriminator['multipliers']) - discriminator['full'], 0)
    divisor = math.lcm(*(2**n for n in halvings))
    check_size(context.image, divisor, 'config.model.generator.multipliers and discriminator.multipliers')
    shared = {'remat': context.remat, 'dtype': context.dtype}
    networks = Generator(**generator, **shared), Discriminator(**discriminator, **shared)
    model = Model(context.image, noise_levels(**process), *networks)
    of_discriminator = functools.partial(discriminator_loss, model, r1, r1_every)
    steps = (
        gradient_step(of_discriminator, context.optim, 'discriminator'),
        gradient_step(functools.partial(generator_loss, model), context.optim, 'generator'),
    )
    return Family(
        functools.partial(init, model, context),
        functools.partial(update, context, *steps),
        functools.partial(sample, model),
        functools.partial(evaluate, model),
        trajectory=functools.partial(trajectory, model),
        divisor=divisor,
    )


def at(values: np.ndarray, step: Array, x: Array) -> Array:
    """Entries of a table of the steps, with as many axes as x [n, ...]."""
    return expanded(jnp.asarray(values, jnp.float32)[step], x)


def diffuse(model: Model, rng: Array, x: Array) -> Transition:
    """A random step of each example x [n, ...], and x_s and x_t before and after it."""
    alpha, _, alpha_s, sigma_s = samplers.noise_levels(model.table)
    std = posterior(model.table).forward ** 0.5  # of q(x_t | x_s)
    step_rng, first_rng, second_rng = jax.random.split(rng, 3)
    step = jax.random.randint(step_rng, (len(x),), 0, len(alpha))
    x_s = at(alpha_s, step, x) * x + at(sigma_s, step, x) * jax.random.normal(first_rng, x.shape)
    noise = jax.random.normal(second_rng, x.shape)
    return Transition(step, x_s, at(alpha / alpha_s, step, x) * x_s + at(std, step, x) * noise)


def draw_before(model: Model, params, forward: Transition, rng: Array) -> Array:
    """x_s' ~ q(x_s | x_t, G(x_t, z)), in training (eq. 5)."""
    step, x_t, moves = forward.step, forward.x_t, posterior(model.table)
    z_rng, dropout_rng, noise_rng = jax.random.split(rng, 3)
    z = shard_batch(jax.random.normal(z_rng, (len(x_t), model.generator.latent)))
    rngs = {'dropout': dropout_rng}
    x_0 = model.generator.apply({'params': params['generator']}, x_t, step, z, train=True, rngs=rngs)
    mean = at(moves.x_t_weight, step, x_t) * x_t + at(moves.x_0_weight, step, x_t) * x_0
    return mean + at(moves.variance**0.5, step, x_t) * jax.random.normal(noise_rng, x_t.shape)


def discriminate(model: Model, params, forward: Transition, x_s: Array) -> Array:
    """D(x_s, x_t), logits [n] of x_s being from the forward process."""
    return model.discriminator.apply({'params': params['discriminator']}, x_s, forward.step, forward.x_t)


def discriminator_loss(
    model: Model, r1: float, r1_every: int, params, state: State, frozen, batch, rng
) -> tuple[Array, Aux]:
    """The discriminator's loss with the R1 penalty in x_s (eq. 4)."""
    diffusion_rng, rng = jax.random.split(rng)
    forward = diffuse(model, diffusion_rng, batch['image'])
    real = discriminate(model, params, forward, forward.x_s)
    fake = discriminate(model, params, forward, draw_before(model, params, forward, rng))
    value = vanilla_discriminator(real, fake)
    logs = {'discriminator_real': real.mean(), 'discriminator_fake': fake.mean(), 'discriminator_loss': value}
    if r1:

        def penalty() -> Array:
            return r1_penalty(lambda x_s: discriminate(model, params, forward, x_s), forward.x_s).mean()

        logs['r1'] = lazily(penalty, state.step, r1_every)
        value = value + r1 * logs['r1']
    return value, Aux(logs)


def generator_loss(model: Model, params, state: State, frozen, batch, rng) -> tuple[Array, Aux]:
    """The generator's non-saturating loss (eq. 4)."""
    diffusion_rng, rng = jax.random.split(rng)
    forward = diffuse(model, diffusion_rng, batch['image'])
    fake = discriminate(model, params, forward, draw_before(model, params, forward, rng))
    value = non_saturating_generator(fake)
    return value, Aux({'generator_loss': value})


def init(model: Model, context: Context, rng, batch, frozen) -> State:
    """The state before the first update."""
    generator_rng, discriminator_rng = jax.random.split(rng)
    x, step, z = batch['image'][:1], jnp.zeros(1, jnp.int32), jnp.zeros((1, model.generator.latent))
    params = {
        'generator': model.generator.init(generator_rng, x, step, z, train=False)['params'],
        'discriminator': model.discriminator.init(discriminator_rng, x, step, x)['params'],
    }
    # Only the generator makes samples; an averaged discriminator would serve nothing.
    return new_state(params, context.optim, ema=('generator',))


def update(
    context: Context, discriminator_step: Callable, generator_step: Callable, state: State, frozen, batch, rng
) -> tuple[State, dict[str, Array]]:
    """One update: a step of the discriminator, then one of the generator."""
    discriminator_rng, generator_rng = jax.random.split(rng)
    state, discriminator = discriminator_step(state, frozen, batch, discriminator_rng)
    state, generator = generator_step(state, frozen, batch, generator_rng)
    return advance(state, context.optim), discriminator.logs | generator.logs


def denoiser(model: Model, state: State, keys: Array) -> Callable:
    """The generator as (x_t, step) -> x_0, with a latent of each sample's own key in each step.

    Args:
      keys: [n].
    """

    def denoise(x: Array, step: Array) -> Array:
        step = jnp.broadcast_to(step, len(x))
        z = normal(jax.vmap(jax.random.fold_in)(keys, step), (model.generator.latent,))
        return model.generator.apply({'params': state.ema['generator']}, x, step, z, train=False)

    return denoise


def run_sampler(model: Model, state: State, batch, rng, **options):
    """x_0 [n, ...] of the samples of a batch; with `trajectory` (x_0, what was passed through)."""
    start_rng, z_rng, noise_rng = jax.random.split(rng, 3)
    x = normal(example_keys(start_rng, batch), model.shape)
    denoise, keys = denoiser(model, state, example_keys(z_rng, batch)), example_keys(noise_rng, batch)
    return samplers.ancestral(denoise, x, model.table, keys, variance='fixed_small', **options)


def sample(model: Model, state: State, frozen, batch, rng) -> Array:
    """Samples, float32 [n, H, W, C] in [-1, 1]."""
    return run_sampler(model, state, batch, rng)


def trajectory(model: Model, state: State, frozen, batch, rng) -> dict[str, Array]:
    """'x': after each step, and 'x_0': the generator's estimates, [T, n, H, W, C]."""
    return run_sampler(model, state, batch, rng, trajectory=True)[1]


def evaluate(model: Model, state: State, frozen, batch, rng) -> dict[str, Array]:
    """Per image 'squared_error', of the generator's x_0 against the image, mean over pixels in [-1, 1] and steps, and
    that of each step, 'squared_error/1' (the step that ends at the data) to 'squared_error/T', [n] each.

    It is to be no smaller than the images that x_t leaves open differ: a generator without z would get half of it.
    """
    x, (z_rng, noise_rng) = batch['image'], jax.random.split(rng)
    alpha, sigma, steps = model.table.alpha, model.table.sigma, len(model.table.t)
    denoise, keys = denoiser(model, state, example_keys(z_rng, batch)), example_keys(noise_rng, batch)

    def one(step: Array) -> Array:
        step = jnp.broadcast_to(step, len(x))
        noise = normal(jax.vmap(jax.random.fold_in)(keys, step), model.shape)
        x_0 = denoise(at(alpha, step, x) * x + at(sigma, step, x) * noise, step)
        return jnp.square(x_0 - x).mean(tuple(range(1, x.ndim)))

    errors = jax.lax.map(one, jnp.arange(steps))
    by_step = {f'squared_error/{i + 1}': errors[i] for i in range(steps)}
    return {'squared_error': errors.mean(0), **by_step}
