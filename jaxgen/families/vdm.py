"""VDM: variational diffusion models (Kingma et al. 2021, arXiv 2107.00630). Trained on the likelihood itself.

An image x becomes z_t = alpha_t x + sigma_t eps with alpha_t^2 + sigma_t^2 = 1 and a learned schedule

    gamma(t) = log(sigma_t^2 / alpha_t^2),  t in [0, 1],

minus the logarithm of the signal-to-noise ratio (section 3.2). The network estimates eps of z_t and gamma(t).
The loss is the bound on -log p(x) of 256 levels (eq. 11), in bits per dimension, the sum of

    prior            KL(q(z_1 | x) || N(0, I))
    reconstruction   -E log p(x | z_0), where each pixel's p is a softmax over the 256 levels, log-probabilities
                     -|z_0 / alpha_0 - level|^2 / (2 sigma_0^2 / alpha_0^2)
    diffusion        1/2 E gamma'(t) |eps - eps_hat|^2, in continuous time (eq. 17), or with T steps
                     T/2 E (e^(gamma(t) - gamma(s)) - 1) |eps - eps_hat|^2, t one of 1/T .. 1, s = t - 1/T (eq. 14)

each over ln 2 times the number of dimensions. In continuous time the bound depends on the schedule by its ends
gamma(0) and gamma(1) alone (eq. 18), but for what the estimate of it varies by: so `schedule_loss = 'variance'` trains
what is between the ends to lower that (appendix I.2), and 'bound' is the authors' published code.

Inside, the levels are the middles of 256 equal parts of [-1, 1]: images are multiplied by 255/256.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgen.checks import check_labels
from jaxgen.contract import Aux, Context, Family, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.losses.divergences import normal_kl
from jaxgen.networks.layers import check_groups
from jaxgen.networks.vdm import SCHEDULES, Schedule, VDMNet
from jaxgen.randomness import example_keys, normal

Array = jax.Array

LEVELS = 256
INWARD = 1 - 1 / LEVELS  # what images are multiplied by, so that levels are the middles of their bins


def alpha_sigma(gamma: Array) -> tuple[Array, Array]:
    """alpha and sigma, with the axes of an image: gamma [n] to [n, 1, 1, 1] each, scalars to scalars."""
    gamma = gamma.reshape(-1, 1, 1, 1) if gamma.ndim else gamma
    return jnp.exp(0.5 * jax.nn.log_sigmoid(-gamma)), jnp.exp(0.5 * jax.nn.log_sigmoid(gamma))


def antithetic_times(rng: Array, n: int) -> Array:
    """(u + i / n) mod 1 for i = 0 .. n - 1 with one u for all, [n] in [0, 1) (appendix I.1).

    Each t is uniform, and together they are spread evenly: means over them vary less.
    """
    return jnp.mod(jax.random.uniform(rng) + jnp.arange(n) / n, 1.0)


# The 256 logits of a pixel are made twice, and never kept for the backward pass.
@jax.checkpoint
def reconstruction(x: Array, eps: Array, gamma: Array) -> Array:
    """-log p(x | z_0), nats [n], with z_0 = alpha x + sigma eps at the level gamma, a scalar (section 3.3).

    Args:
      x: [n, H, W, C] in [-1, 1], at 256 levels.
      eps: like x.
    """
    level = jnp.round((x + 1) * (LEVELS - 1) / 2)
    # (z_0 / alpha - level k) over its standard deviation is eps plus this: no difference of nearly equal numbers.
    distance = 2 / LEVELS * (level[..., None] - jnp.arange(LEVELS))
    logits = -0.5 * jnp.square(eps[..., None] + jnp.exp(-0.5 * gamma) * distance)
    return (0.5 * jnp.square(eps) + jax.nn.logsumexp(logits, -1)).sum((1, 2, 3))


def build(
    context: Context,
    *,
    channels: int = 128,
    blocks: int = 32,
    fourier: tuple[int, ...] = (6, 7),
    attention: bool = False,
    dropout: float = 0.1,
    groups: int = 32,
    group_size: int = 4,
    eps: float = 1e-6,
    conditional: bool = False,
    schedule: str = 'scalar',
    gamma_min: float = -13.3,
    gamma_max: float = 5.0,
    schedule_loss: str = 'bound',
    timesteps: int = 0,
    sample_steps: int = 0,
    bound_times: int = 16,
) -> Family:
    """VDM. The defaults are those for CIFAR-10 without augmentation.

    Args:
      channels, blocks, fourier, attention, dropout, groups, group_size, eps: of the network, see `VDMNet`.
      conditional: tell the network the class, `batch['label']`.
      schedule: 'fixed', 'scalar' (learned ends) or 'network' (learned ends and a monotone network between them).
      gamma_min, gamma_max: the schedule's ends at the start. The network is told where gamma lies between these.
      schedule_loss: what 'network' learns between its ends: 'bound', by the same loss as all else, or 'variance', by
        the mean square of the diffusion loss of one example and one t. The ends learn by the bound always.
      timesteps: T of the bound; 0: continuous time.
      sample_steps: levels that sampling visits; 0: timesteps, or 1000 in continuous time.
      bound_times: how many times of each example evaluate looks at, spread evenly. With timesteps as many it is
        every step.

    evaluate gives, in bits per dimension, 'bits_per_dim', an estimate of the bound whose mean is right, and the
    parts that it is the sum of: 'bits_prior', 'bits_reconstruction', 'bits_diffusion'.

    Raises:
      UserError: a value out of range, no labels.
    """
    if schedule not in SCHEDULES:
        raise UserError(f'config.model.schedule must be one of {SCHEDULES}; it is {schedule!r}')
    if schedule_loss not in ('bound', 'variance'):
        raise UserError(f"config.model.schedule_loss must be 'bound' or 'variance'; it is {schedule_loss!r}")
    if schedule_loss == 'variance' and (schedule != 'network' or timesteps):
        raise UserError(
            "config.model.schedule_loss = 'variance' is for schedule 'network' in continuous time, timesteps 0: "
            f'they are {schedule!r} and {timesteps}'
        )
    if not gamma_min < gamma_max:
        raise UserError(f'config.model.gamma_min {gamma_min} must be less than gamma_max {gamma_max}')
    if channels < 4 or channels % 2 or blocks < 1 or not 0 <= dropout < 1:
        raise UserError(
            f'config.model: channels {channels} must be even and at least 4, blocks {blocks} at least 1, '
            f'dropout {dropout} in [0, 1)'
        )
    if timesteps < 0 or sample_steps < 0 or bound_times < 1:
        raise UserError(
            f'config.model: timesteps {timesteps} and sample_steps {sample_steps} must be 0 or more, '
            f'bound_times {bound_times} at least 1'
        )
    check_groups('config.model', groups, group_size, eps, (channels,))
    check_labels(context, conditional)

    net = VDMNet(
        channels=channels,
        blocks=blocks,
        fourier=fourier,
        attention=attention,
        dropout=dropout,
        groups=groups,
        group_size=group_size,
        eps=eps,
        classes=context.classes if conditional else 0,
        remat=context.remat,
        dtype=context.dtype,
    )
    line = Schedule(schedule, gamma_min, gamma_max)
    networks = ('denoiser',) if schedule == 'fixed' else ('denoiser', 'schedule')
    bits = 1 / (math.prod(context.image) * math.log(2))
    steps = sample_steps or timesteps or 1000

    def ends(params) -> tuple[Array, Array]:
        return line.apply({'params': params.get('schedule', {})})

    def rise(params) -> Callable:
        return lambda t: line.apply({'params': params.get('schedule', {})}, t, method='rise')

    def at(params, t: Array) -> Array:
        """gamma(t), [n]."""
        low, high = ends(params)
        return low + (high - low) * rise(params)(t)

    def estimate(weights, z, gamma, label, train=False, rngs=None) -> Array:
        """eps of z at the levels gamma [n]. The network puts out what z is wrong by: without it eps_hat is z."""
        told = 1000 * (gamma - gamma_min) / (gamma_max - gamma_min)
        return z + net.apply({'params': weights}, z, told, label, train=train, rngs=rngs)

    def places(params, t: Array) -> tuple[Array, Array]:
        """Of times t [n]: rise(t), and what a term of the diffusion loss has for a weight by the rise, [n] each.

        The weight is rise'(t), or with T steps rise(s).
        """
        if not timesteps:
            return jax.jvp(rise(params), (t,), (jnp.ones_like(t),))
        i = jnp.minimum(jnp.floor(t * timesteps), timesteps - 1)  # a t below 1 may be rounded up to 1
        return rise(params)((i + 1) / timesteps), rise(params)(i / timesteps)

    def diffusion(weights, span, place, other, f, eps, label, train=False, rngs=None) -> Array:
        """The diffusion term, nats [n], of one time for each example, given by its `places`. f: image times INWARD."""
        low, high = span
        gamma = low + (high - low) * place
        alpha, sigma = alpha_sigma(gamma)
        eps_hat = estimate(weights, alpha * f + sigma * eps, gamma, label, train, rngs)
        error = jnp.square(eps - eps_hat).sum((1, 2, 3))
        if timesteps:
            return 0.5 * timesteps * jnp.expm1((high - low) * (place - other)) * error
        return 0.5 * (high - low) * other * error

    def fixed_terms(params, x, eps) -> tuple[Array, Array]:
        """Prior and reconstruction, nats [n] each."""
        low, high = ends(params)
        alpha, _ = alpha_sigma(high)
        prior = normal_kl(alpha * INWARD * x, jnp.broadcast_to(jax.nn.log_sigmoid(high), x.shape))
        return prior, reconstruction(x, eps, low)

    def loss(params, state, frozen, batch, rng):
        rng_z0, rng_zt, rng_dropout = jax.random.split(rng, 3)
        x, label = batch['image'], batch.get('label')
        prior, decoder = fixed_terms(params, x, jax.random.normal(rng_z0, x.shape))
        eps = jax.random.normal(rng_zt, x.shape)

        def terms(weights, span, place, other):
            return bits * diffusion(weights, span, place, other, INWARD * x, eps, label, True, {'dropout': rng_dropout})

        terms = squared_for_last_two(terms) if schedule_loss == 'variance' else terms
        middle = terms(params['denoiser'], ends(params), *places(params, batch['t'])).mean()
        prior, decoder = bits * prior.mean(), bits * decoder.mean()
        total = prior + decoder + middle
        logs = {'loss': total, 'prior': prior, 'reconstruction': decoder, 'diffusion': middle}
        return total, Aux(logs | dict(zip(('gamma_0', 'gamma_1'), ends(params), strict=True)))

    train = make_update(loss, context.optim, *networks)

    def init(rng, batch, frozen):
        rng_net, rng_line = jax.random.split(rng)
        label = jnp.zeros(1, jnp.int32) if conditional else None
        params = {'denoiser': net.init(rng_net, jnp.zeros((1, *context.image)), jnp.zeros(1), label, train=False)}
        if schedule != 'fixed':
            params['schedule'] = line.init(rng_line)
        return new_state({name: variables['params'] for name, variables in params.items()}, context.optim)

    def update(state, frozen, batch, rng):
        rng_t, rng_step = jax.random.split(rng)
        # By the place in the whole batch, of which the loss may be given parts.
        t = antithetic_times(rng_t, len(batch['image']))
        return train(state, frozen, {**batch, 't': t}, rng_step)

    def to_image(weights, z, gamma, label) -> tuple[Array, Array]:
        """eps_hat of z [n, H, W, C] at the level gamma [n], and the image that it leaves."""
        alpha, sigma = alpha_sigma(gamma)
        eps_hat = estimate(weights, z, gamma, label)
        return eps_hat, (z - sigma * eps_hat) / (INWARD * alpha)

    def walk(state, batch, rng):
        """Draws z_1, then each z_s from p(z_s | z_t), down to z_0 (appendix A.4, eq. 32 to 34).

        Returns:
          z_0, and what it passed through, see `trajectory`.
        """
        rng_start, rng_steps = jax.random.split(rng)
        keys = example_keys(rng_steps, batch)
        label = batch.get('label')
        gammas = at(state.ema, jnp.arange(steps + 1) / steps)

        def one(z, level):
            number, gamma_s, gamma_t = level
            (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_sigma(gamma_s), alpha_sigma(gamma_t)
            eps_hat, x = to_image(state.ema['denoiser'], z, jnp.broadcast_to(gamma_t, (len(z),)), label)
            share = -jnp.expm1(gamma_s - gamma_t)  # of sigma_t^2 that is noise which z_s does not have
            noise = normal(jax.vmap(jax.random.fold_in, (0, None))(keys, number), context.image)
            z = alpha_s / alpha_t * (z - share * sigma_t * eps_hat) + jnp.sqrt(share) * sigma_s * noise
            return z, {'x': z, 'x_0': x}

        z = normal(example_keys(rng_start, batch), context.image)
        return jax.lax.scan(one, z, (jnp.arange(steps), gammas[:-1], gammas[1:]), reverse=True)

    def sample(state, frozen, batch, rng):
        """The levels that p(x | z_0) gives the highest probability: the nearest to z_0 / alpha_0."""
        z, _ = walk(state, batch, rng)
        alpha, _ = alpha_sigma(ends(state.ema)[0])
        middle = (LEVELS - 1) / 2
        level = jnp.round((z / (INWARD * alpha) + 1) * middle)
        return jnp.clip(level, 0, LEVELS - 1) / middle - 1

    def trajectory(state, frozen, batch, rng):
        """'x': z_s after each step, and 'x_0': the estimate of the image that the step was made with."""
        return walk(state, batch, rng)[1]

    def evaluate(state, frozen, batch, rng):
        rng_decoder, rng_time, rng_noise = jax.random.split(rng, 3)
        x, label, params = batch['image'], batch.get('label'), state.ema
        prior, decoder = fixed_terms(params, x, normal(example_keys(rng_decoder, batch), context.image))
        first = jax.vmap(jax.random.uniform)(example_keys(rng_time, batch))
        keys = example_keys(rng_noise, batch)

        def one(total, number):
            t = jnp.mod(first + number / bound_times, 1.0)
            eps = normal(jax.vmap(jax.random.fold_in, (0, None))(keys, number), context.image)
            term = diffusion(params['denoiser'], ends(params), *places(params, t), INWARD * x, eps, label)
            return total + term, None

        total, _ = jax.lax.scan(one, jnp.zeros(len(x)), jnp.arange(bound_times))
        middle = total / bound_times
        return {
            'bits_per_dim': bits * (prior + decoder + middle),
            'bits_prior': bits * prior,
            'bits_reconstruction': bits * decoder,
            'bits_diffusion': bits * middle,
        }

    def denoise(state, frozen, batch, x, sigma):
        """Estimate of the image of x = image + sigma eps, float32 [n, H, W, C]; sigma [n].

        The network has seen sigma from e^(gamma_0 / 2) to e^(gamma_1 / 2): outside it guesses.
        """
        gamma = 2 * jnp.log(INWARD * jnp.maximum(sigma, 1e-6))
        alpha, _ = alpha_sigma(gamma)
        return to_image(state.ema['denoiser'], alpha * INWARD * x, gamma, batch.get('label'))[1]

    return Family(
        init,
        update,
        sample,
        evaluate,
        denoise=denoise,
        trajectory=trajectory,
        conditions=('label',) if conditional else (),
        free=('sample_steps', 'bound_times'),
    )


def squared_for_last_two(terms: Callable) -> Callable:
    """terms(weights, span, place, other) -> [n], with another gradient for place and other, [n] each.

    These two get that of terms^2, the first two arguments that of terms: one backward pass for both. Since the mean
    of terms does not depend on what is between a schedule's ends, the gradient of their mean square is that of
    their variance (appendix I.2).
    """

    @jax.custom_vjp
    def both(weights, span, place, other):
        return terms(weights, span, place, other)

    def forward(*args):
        value, pull = jax.vjp(terms, *args)
        return value, (value, pull)

    def backward(saved, cotangent):
        value, pull = saved
        weights, span, place, other = pull(cotangent)
        # terms of an example depends on its own place alone, so the chain rule is a product, example by example.
        return weights, span, 2 * value * place, 2 * value * other

    both.defvjp(forward, backward)
    return both
