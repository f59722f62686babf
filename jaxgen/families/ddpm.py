"""DDPM: denoising diffusion (Ho et al. 2020, arXiv 2006.11239). DDIM is one of its samplers.

A fixed chain turns an image x_0 into noise, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
(eq. 4), and the network learns to tell eps from x_t and t. The loss is the unweighted one (eq. 14,
algorithm 1), with t uniform:

    L_simple = E |eps - eps_theta(x_t, t)|^2

Samples come from the learned reverse chain (algorithm 2) or from DDIM (Song et al. 2021, arXiv
2010.02502), over all steps or some of them; the estimate of x_0 is clipped to [-1, 1] at each step.
The variational bound (eq. 5) measures the model in bits per dimension.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxgen.contract import Context, Family, advance, example_keys, gradient_step, new_state, normal
from jaxgen.diffusion import samplers, schedules
from jaxgen.diffusion.likelihood import variational_bound
from jaxgen.diffusion.parameterisations import PREDICTIONS, target, to_x_0
from jaxgen.errors import UserError
from jaxgen.networks.unet import UNet

Array = jax.Array


def build(
    context: Context,
    *,
    channels: int = 128,
    multipliers: tuple[int, ...] = (1, 2, 2, 2),
    blocks: int = 2,
    attention: tuple[int, ...] = (16,),
    dropout: float = 0.1,
    conditional: bool = False,
    timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    prediction: str = 'eps',
    variance: str = 'fixed_large',
    sampler: str = 'ancestral',
    sample_steps: int = 0,
    spacing: str = 'uniform',
    eta: float = 0.0,
    bound_steps: int = 0,
) -> Family:
    """Args:
      channels, multipliers, blocks, attention, dropout: of the U-Net, see `networks.unet.UNet`.
      conditional: tell the network the class, `batch['label']`.
      timesteps: T, steps of the chain.
      beta_start, beta_end: variance of the chain's first and last step, linear between.
      prediction: what the network puts out and the loss compares: 'eps' | 'x0' | 'v'.
      variance: of the reverse steps, 'fixed_large' (beta) | 'fixed_small' (the posterior's).
      sampler: 'ancestral' | 'ddim'.
      sample_steps: steps that a sampler takes, 0: all T.
      spacing: which steps, if not all: 'uniform' | 'quadratic'.
      eta: randomness of 'ddim', from 0, none, to 1, as much as 'ancestral' with 'fixed_small'.
      bound_steps: terms of the variational bound that `evaluate` computes, of the T - 1 between the
        first and the last; drawn evenly, the mean is right. 0: all.

    Raises:
      UserError: a value out of range, an image that cannot be halved often enough, no labels.
    """
    levels = len(multipliers)
    sizes = [context.image[0] >> level for level in range(levels)]
    choices = {
        'prediction': (prediction, PREDICTIONS),
        'variance': (variance, ('fixed_large', 'fixed_small')),
        'sampler': (sampler, ('ancestral', 'ddim')),
        'spacing': (spacing, ('uniform', 'quadratic')),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(f'config.model.{name} must be one of {allowed}; it is {value!r}')
    if channels < 4 or channels % 2:
        raise UserError(f'config.model.channels must be even and at least 4; it is {channels}')
    if not multipliers or min(multipliers) < 1 or blocks < 1:
        raise UserError('config.model.multipliers must be one or more numbers from 1, and blocks at least 1')
    divisor = 2 ** (levels - 1)
    for size in context.image[:2]:
        if size % divisor:
            raise UserError(
                f'images of {size} pixels cannot be halved {levels - 1} times, as config.model.multipliers '
                f'{tuple(multipliers)} asks for: config.data.size must be a multiple of {divisor}'
            )
    for size in attention:
        if size not in sizes:
            raise UserError(f'config.model.attention: no level of the network has {size} pixels, only {sizes}')
    if timesteps < 2 or not 0 < beta_start <= beta_end < 1:
        raise UserError(
            f'config.model: timesteps {timesteps} must be at least 2, '
            f'and 0 < beta_start {beta_start} <= beta_end {beta_end} < 1'
        )
    if not 0 <= sample_steps <= timesteps:
        raise UserError(f'config.model.sample_steps must be from 0 to timesteps {timesteps}; it is {sample_steps}')
    if not 0 <= bound_steps < timesteps:
        raise UserError(f'config.model.bound_steps must be from 0 to {timesteps - 1}; it is {bound_steps}')
    if not 0 <= eta <= 1 or not 0 <= dropout < 1:
        raise UserError(f'config.model: eta {eta} must be in [0, 1] and dropout {dropout} in [0, 1)')
    if conditional and not context.classes:
        raise UserError(
            "config.model.conditional needs labels: take a data set with classes, with 'label' in config.data.features"
        )

    network = UNet(
        channels,
        tuple(multipliers),
        blocks,
        tuple(attention),
        dropout,
        classes=context.classes if conditional else 0,
        remat=context.remat,
        dtype=context.dtype,
    )
    schedule = schedules.variance_preserving(schedules.linear_betas(timesteps, beta_start, beta_end))
    log_variance = schedules.model_log_variance(schedule, variance)
    spaced = {'uniform': schedules.uniform_steps, 'quadratic': schedules.quadratic_steps}[spacing]
    visited = schedules.subset(schedule, spaced(timesteps, sample_steps)) if sample_steps else schedule
    draw = {
        'ancestral': functools.partial(samplers.ancestral, variance=variance),
        'ddim': functools.partial(samplers.ddim, eta=eta),
    }[sampler]

    def level(t):
        """alpha and sigma at steps t [n], [n, 1, 1, 1] each."""
        both = jnp.asarray(schedule.alpha, jnp.float32), jnp.asarray(schedule.sigma, jnp.float32)
        return (values[t][:, None, None, None] for values in both)

    def denoiser(params, batch):
        """(x, t) -> estimate of x_0, clipped."""

        def denoise(x, t):
            t = jnp.broadcast_to(t, (len(x),))
            output = network.apply({'params': params['denoiser']}, x, t, batch.get('label'), train=False)
            return jnp.clip(to_x_0(prediction, output, x, *level(t)), -1, 1)

        return denoise

    def loss(params, frozen, batch, rng):
        rng_t, rng_noise, rng_dropout = jax.random.split(rng, 3)
        x_0 = batch['image']
        t = jax.random.randint(rng_t, (len(x_0),), 0, timesteps)
        eps = jax.random.normal(rng_noise, x_0.shape)
        alpha, sigma = level(t)
        output = network.apply(
            {'params': params['denoiser']},
            alpha * x_0 + sigma * eps,
            t,
            batch.get('label'),
            train=True,
            rngs={'dropout': rng_dropout},
        )
        value = jnp.square(output - target(prediction, x_0, eps, alpha, sigma)).mean()
        return value, {'loss': value}

    step = gradient_step(loss, context.optim, 'denoiser')

    def init(rng, batch, frozen):
        label = jnp.zeros(1, jnp.int32)
        variables = network.init(rng, jnp.zeros((1, *context.image)), jnp.zeros(1, jnp.int32), label, train=False)
        return new_state({'denoiser': variables['params']}, context.optim)

    def update(state, frozen, batch, rng):
        state, logs = step(state, frozen, batch, rng)
        return advance(state, context.optim), logs

    def sample(state, frozen, batch, rng):
        rng_start, rng_steps = jax.random.split(rng)
        x = normal(example_keys(rng_start, batch), context.image)
        return draw(denoiser(state.ema, batch), x, visited, example_keys(rng_steps, batch))

    def evaluate(state, frozen, batch, rng):
        keys = example_keys(rng, batch)
        return variational_bound(denoiser(state.ema, batch), batch['image'], schedule, log_variance, keys, bound_steps)

    return Family(
        init,
        update,
        sample,
        evaluate,
        conditions=('label',) if conditional else (),
        divisor=divisor,
        free=('variance', 'sampler', 'sample_steps', 'spacing', 'eta', 'bound_steps'),
    )
