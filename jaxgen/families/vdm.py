"""VDM: variational diffusion models (Kingma et al. 2021, arXiv 2107.00630). Trained on the likelihood itself.

An image x becomes z_t = alpha_t x + sigma_t eps with alpha_t^2 + sigma_t^2 = 1 and a learned schedule

    gamma(t) = log(sigma_t^2 / alpha_t^2) = -log SNR(t),  t in [0, 1],

minus the logarithm of the signal-to-noise ratio (section 3.2). The network estimates eps of z_t and gamma(t).
The loss is the bound on -log p(x) of 256 grey levels (eq. 11), in bits per dimension, the sum of

    L_prior   KL(q(z_1 | x) || N(0, I))
    L_recon   -E log p(x | z_0), where each pixel's p is a softmax over the 256 levels, log-probabilities
              -|z_0 / alpha_0 - level|^2 / (2 sigma_0^2 / alpha_0^2)
    L_diff    1/2 E gamma'(t) |eps - eps_hat|^2, in continuous time (eq. 17), or with T steps
              T/2 E (e^(gamma(t) - gamma(s)) - 1) |eps - eps_hat|^2, t one of 1/T .. 1, s = t - 1/T (eq. 14)

each over ln 2 times the number of dimensions. In continuous time the bound depends on the schedule by its ends
gamma(0) and gamma(1) alone (eq. 18), but for what the estimate of it varies by: so the schedule 'network' with loss
'variance' trains what is between the ends to lower that (appendix I.2), and 'bound' is the authors' published code.

Inside, the levels are the middles of 256 equal parts of [-1, 1]: images are multiplied by 255/256.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.augmentation import turns
from jaxgen.contract import Aux, Captions, Context, Family, State, make_update, new_state
from jaxgen.diffusion import conditioning as conditions
from jaxgen.diffusion import former as formats
from jaxgen.diffusion.conditioning import Conditioning, Values
from jaxgen.diffusion.processes import expanded
from jaxgen.errors import UserError
from jaxgen.losses.divergences import normal_kl
from jaxgen.networks import denoisers
from jaxgen.networks.denoisers import Network
from jaxgen.networks.layers import check_groups
from jaxgen.networks.vdm import Schedule, VDMNet
from jaxgen.options import Component, Count, Fields, OneOf, Section
from jaxgen.randomness import example_keys, normal, stream

Array = jax.Array

former = formats.vdm  # fields of runs that were saved before there were sections
MOVED = formats.MOVED['vdm']
EMPTY: dict[str, Any] = {}
LEVELS = 256  # grey levels
INWARD = 1 - 1 / LEVELS  # what images are multiplied by, so that grey levels are the middles of their bins


@dataclasses.dataclass(frozen=True)
class Ends:
    """The schedule's ends.

    Attributes:
      gamma_min, gamma_max: gamma(0) and gamma(1) at the start. Where gamma lies between these is the network's time.
    """

    gamma_min: float = -13.3
    gamma_max: float = 5.0


@dataclasses.dataclass(frozen=True)
class Monotone:
    """A monotone network between the schedule's ends.

    Attributes:
      loss: what it learns by: 'bound', the same loss as all else, or 'variance', the mean square of the diffusion loss
        of one example and one t, in continuous time. The ends learn by the bound always.
    """

    loss: Annotated[str, OneOf('bound', 'variance')] = 'bound'


SCHEDULES = {'fixed': None, 'scalar': None, 'network': Monotone}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Attributes:
      steps: noise levels that sampling visits; 0: timesteps, or 1000 in continuous time.
    """

    steps: Annotated[int, '[0, inf)'] = 0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How the bound is measured.

    Attributes:
      times: number of times of each example, spread evenly. With timesteps as many it is every step.
    """

    times: Count = 16


class Model(NamedTuple):
    """A variational diffusion model, its parts bound to their options."""

    shape: tuple[int, ...]  # of one x
    network: Network
    conditioning: Conditioning
    schedule: Schedule
    timesteps: int  # T; 0: continuous time
    by_variance: bool  # the schedule learns to lower the variance of L_diff
    steps: int  # of sampling
    times: int  # of the evaluated bound
    augmentation: str = 'none'  # of augmentation.turns.KINDS


@options.checked
def build(
    context: Context,
    *,
    network: Annotated[Section, Fields(VDMNet, denoisers.GIVEN)] = EMPTY,
    conditioning: Annotated[Section, conditions.NAMED] = EMPTY,
    schedule: Annotated[Section, Component(SCHEDULES, Ends)] = 'scalar',
    timesteps: Annotated[int, '[0, inf)'] = 0,
    sampler: Annotated[Section, Fields(Sampling)] = EMPTY,
    likelihood: Annotated[Section, Fields(Evaluation)] = EMPTY,
    augmentation: Annotated[str, OneOf(*turns.KINDS)] = 'none',
) -> Family:
    """VDM. The defaults are those for CIFAR-10 without augmentation.

    Args:
      network: see `networks.vdm.VDMNet`.
      conditioning: {name of an array of the batch: kind and dropout}, see diffusion/conditioning.py.
      schedule: gamma(t), 'fixed', 'scalar' (learned ends) or 'network' (learned ends and a monotone network between
        them).
      timesteps: T of the bound; 0: continuous time.
      sampler: see `Sampling`.
      likelihood: of held-out images, see `Evaluation`.
      augmentation: of training images: 'turns', flips and quarter turns; 'turns_and_channels', also channels in another
        order. Whether an image was changed is a condition of the network; held-out images and samples are not.

    Raises:
      UserError: values that do not go together, no labels, images to be turned that are not square.
    """
    check(schedule, timesteps)
    check_augmentation(augmentation, conditioning, context.image)
    check_groups(
        'config.model.network', network['groups'], network['group_size'], network['eps'], (network['channels'],)
    )
    module = VDMNet(**network, remat=context.remat, dtype=context.dtype)
    bound = conditions.make(conditioning, context, module)
    model = Model(
        shape=context.image,
        network=denoisers.bind(module, bound),
        conditioning=bound,
        schedule=Schedule(schedule['name'], schedule['gamma_min'], schedule['gamma_max']),
        timesteps=timesteps,
        by_variance=schedule.get('loss') == 'variance',
        steps=sampler['steps'] or timesteps or 1000,
        times=likelihood['times'],
        augmentation=augmentation,
    )
    networks = ('denoiser',) if schedule['name'] == 'fixed' else ('denoiser', 'schedule')
    step = make_update(functools.partial(loss, model), context.optim, *networks)
    return Family(
        functools.partial(init, model, context),
        functools.partial(update, step),
        functools.partial(sample, model),
        functools.partial(evaluate, model),
        denoise=functools.partial(denoise, model),
        trajectory=functools.partial(trajectory, model),
        conditions=tuple(c.name for c in bound if not c.optional),
        captions=Captions(encoded=conditions.reads_text(bound)),
        free=('sampler', 'likelihood'),
        sampling=('sampler',),
    )


def check(schedule: dict, timesteps: int) -> None:
    """Raises UserError for fields that do not go together."""
    if not schedule['gamma_min'] < schedule['gamma_max']:
        raise UserError(
            f'config.model.schedule.gamma_min {schedule["gamma_min"]} must be less than gamma_max '
            f'{schedule["gamma_max"]}'
        )
    if schedule.get('loss') == 'variance' and timesteps:
        raise UserError(
            "config.model.schedule.loss = 'variance' is of continuous time, config.model.timesteps 0; it is "
            f'{timesteps}'
        )


def check_augmentation(augmentation: str, conditioning: dict, image: tuple[int, ...]) -> None:
    """Raises UserError where images cannot be turned, or the network has another condition in that place."""
    if augmentation == 'none':
        return
    if len({*image[:2]}) > 1:
        raise UserError(
            f'config.model.augmentation turns images, so config.data.size must be square; it is {image[:2]}'
        )
    vectors = [name for name, section in conditioning.items() if conditions.PARTS[section['kind']] == 'vector']
    if vectors:
        raise UserError(
            'config.model.augmentation is a condition of its own, and the network has no place for '
            f'{vectors[0]} beside it: leave one of them out'
        )


# --- the schedule


def ends_of(model: Model, params) -> tuple[Array, Array]:
    """gamma(0) and gamma(1)."""
    return model.schedule.apply({'params': params.get('schedule', {})})


def normalised(model: Model, params) -> Callable:
    """u(t) = (gamma(t) - gamma(0)) / (gamma(1) - gamma(0)) of t [n]."""
    return lambda t: model.schedule.apply({'params': params.get('schedule', {})}, t, method='normalised')


def gamma_at(model: Model, params, t: Array) -> Array:
    """gamma(t), [n]."""
    gamma_0, gamma_1 = ends_of(model, params)
    return gamma_0 + (gamma_1 - gamma_0) * normalised(model, params)(t)


def normalised_pair(model: Model, params, t: Array) -> tuple[Array, Array]:
    """u(t) and its derivative u'(t), or with T steps u(t) and u(s) of the step from t to s, [n] each."""
    u, steps = normalised(model, params), model.timesteps
    if not steps:
        return jax.jvp(u, (t,), (jnp.ones_like(t),))
    i = jnp.minimum(jnp.floor(t * steps), steps - 1)  # a t below 1 may be rounded up to 1
    return u((i + 1) / steps), u(i / steps)


def alpha_sigma(gamma: Array) -> tuple[Array, Array]:
    """alpha and sigma like gamma: alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma)."""
    return jnp.exp(0.5 * jax.nn.log_sigmoid(-gamma)), jnp.exp(0.5 * jax.nn.log_sigmoid(gamma))


def antithetic_times(rng: Array, n: int) -> Array:
    """(u + i / n) mod 1 for i = 0 .. n - 1 with one u for all, [n] in [0, 1) (appendix I.1).

    Each t is uniform, and together they are spread evenly: means over them vary less.
    """
    return jnp.mod(jax.random.uniform(rng) + jnp.arange(n) / n, 1.0)


# --- the bound's three terms, nats [n] each


def prior_loss(x: Array, gamma_1: Array) -> Array:
    """L_prior = KL(q(z_1 | x) || N(0, I)).

    Args:
      x: [n, ...] in [-1, 1].
      gamma_1: scalar.
    """
    alpha, _ = alpha_sigma(gamma_1)
    return normal_kl(alpha * INWARD * x, jnp.broadcast_to(jax.nn.log_sigmoid(gamma_1), x.shape))


# The 256 logits of a pixel are made twice, and never kept for the backward pass.
@jax.checkpoint
def reconstruction_loss(x: Array, eps: Array, gamma_0: Array) -> Array:
    """L_recon = -log p(x | z_0) with z_0 = alpha x + sigma eps (section 3.3).

    Args:
      x: [n, ...] in [-1, 1], at 256 levels.
      eps: like x.
      gamma_0: scalar.
    """
    level = jnp.round((x + 1) * (LEVELS - 1) / 2)
    # (z_0 / alpha - level k) over its standard deviation is eps plus this: no difference of nearly equal numbers.
    distance = 2 / LEVELS * (level[..., None] - jnp.arange(LEVELS))
    logits = -0.5 * jnp.square(eps[..., None] + jnp.exp(-0.5 * gamma_0) * distance)
    return (0.5 * jnp.square(eps) + jax.nn.logsumexp(logits, -1)).sum(tuple(range(1, x.ndim)))


def diffusion_loss(
    model: Model,
    params: Any,
    ends,
    u_t: Array,
    other: Array,
    x: Array,
    eps: Array,
    values: Values,
    rngs: Any = None,
    changed: Array | None = None,
) -> Array:
    """L_diff of one time for each example (eq. 14 and 17).

    Args:
      params: of the denoiser.
      ends: gamma(0) and gamma(1).
      u_t, other: [n] each, see `normalised_pair`.
      x, eps: [n, ...].
      rngs: of dropout, in training.
      changed: bool [n], which images are augmented; None: none.
    """
    gamma_0, gamma_1 = ends
    gamma = gamma_0 + (gamma_1 - gamma_0) * u_t
    alpha, sigma = (expanded(a, x) for a in alpha_sigma(gamma))
    eps_hat = estimate(model, params, alpha * INWARD * x + sigma * eps, gamma, values, rngs, changed)
    error = jnp.square(eps - eps_hat).sum(tuple(range(1, x.ndim)))
    if model.timesteps:  # e^(gamma(t) - gamma(s)) - 1 = SNR(s) / SNR(t) - 1
        return 0.5 * model.timesteps * jnp.expm1((gamma_1 - gamma_0) * (u_t - other)) * error
    return 0.5 * (gamma_1 - gamma_0) * other * error  # gamma'(t) = -(log SNR)'(t)


def estimate(
    model: Model,
    params: Any,
    z: Array,
    gamma: Array,
    values: Values,
    rngs: Any = None,
    changed: Array | None = None,
) -> Array:
    """eps_hat of z [n, ...] at gamma [n]. The network puts out what z is wrong by: without it eps_hat is z."""
    schedule = model.schedule
    t = 1000 * (gamma - schedule.gamma_min) / (schedule.gamma_max - schedule.gamma_min)
    embeddings = conditions.embed(model.conditioning, params, values, z)
    if changed is not None:  # without a vector the network takes 0 in its place
        embeddings['vector'] = changed.astype(jnp.float32)[:, None]
    return z + model.network.apply(params, z, t, embeddings, train=rngs is not None, rngs=rngs)


def bits(model: Model) -> float:
    """Bits per dimension of a nat of an image."""
    return 1 / (math.prod(model.shape) * math.log(2))


def loss(model: Model, params, state: State, frozen, batch, rng) -> tuple[Array, Aux]:
    """L_prior + L_recon + L_diff, bits per dimension (eq. 11)."""
    rng_z0, rng_zt, rng_dropout = jax.random.split(rng, 3)
    x, ends, unit = batch['image'], ends_of(model, params), bits(model)
    changed = None
    if model.augmentation != 'none':
        x, changed = turns.augment(stream(rng, 'augmentation'), x, model.augmentation == 'turns_and_channels')
    values = conditions.values_of(model.conditioning, batch, frozen, train=True)
    values = conditions.drop(model.conditioning, stream(rng, 'conditions'), values)
    prior = unit * prior_loss(x, ends[1]).mean()
    reconstruction = unit * reconstruction_loss(x, jax.random.normal(rng_z0, x.shape), ends[0]).mean()
    eps = jax.random.normal(rng_zt, x.shape)

    def terms(weights, ends, u_t, other):
        return unit * diffusion_loss(
            model, weights, ends, u_t, other, x, eps, values, {'dropout': rng_dropout}, changed
        )

    terms = squared_for_last_two(terms) if model.by_variance else terms
    diffusion = terms(params['denoiser'], ends, *normalised_pair(model, params, batch['t'])).mean()
    total = prior + reconstruction + diffusion
    logs = {'loss': total, 'prior': prior, 'reconstruction': reconstruction, 'diffusion': diffusion}
    return total, Aux(logs | {'gamma_0': ends[0], 'gamma_1': ends[1]})


def squared_for_last_two(terms: Callable) -> Callable:
    """terms(weights, ends, u_t, other) -> [n], with another gradient for u_t and other, [n] each.

    These two get that of terms^2, the first two arguments that of terms: one backward pass for both. Since the mean
    of terms does not depend on what is between a schedule's ends, the gradient of their mean square is that of
    their variance (appendix I.2).
    """

    @jax.custom_vjp
    def both(weights, ends, u_t, other):
        return terms(weights, ends, u_t, other)

    def forward(*args):
        value, pull = jax.vjp(terms, *args)
        return value, (value, pull)

    def backward(saved, cotangent):
        value, pull = saved
        weights, ends, u_t, other = pull(cotangent)
        # terms of an example depends on its own u_t alone, so the chain rule is a product, example by example.
        return weights, ends, 2 * value * u_t, 2 * value * other

    both.defvjp(forward, backward)
    return both


def init(model: Model, context: Context, rng, batch, frozen) -> State:
    """The state before the first update."""
    rng_network, rng_schedule = jax.random.split(rng)
    one = conditions.values_of(model.conditioning, jax.tree.map(lambda v: v[:1], batch), frozen)
    params = {'denoiser': model.network.init(rng_network, jnp.zeros((1, *model.shape)), one)}
    if model.schedule.kind != 'fixed':
        params['schedule'] = model.schedule.init(rng_schedule)['params']
    return new_state(params, context.optim)


def update(step: Callable, state: State, frozen, batch, rng):
    """One update."""
    rng_t, rng_step = jax.random.split(rng)
    # By the position in the whole batch, of which the loss may be given parts.
    t = antithetic_times(rng_t, len(batch['image']))
    return step(state, frozen, {**batch, 't': t}, rng_step)


# --- samples


def estimates(model: Model, params: Any, z: Array, gamma: Array, values: Values) -> tuple[Array, Array]:
    """eps_hat of z [n, ...] at gamma [n], and the estimate of x that it leaves."""
    alpha, sigma = (expanded(a, z) for a in alpha_sigma(gamma))
    eps_hat = estimate(model, params, z, gamma, values)
    return eps_hat, (z - sigma * eps_hat) / (INWARD * alpha)


def run_sampler(model: Model, state: State, frozen, batch, rng) -> tuple[Array, dict[str, Array]]:
    """z_0, and what it passed through, see `trajectory`: draws z_1, then each z_s from p(z_s | z_t) (appendix A.4, eq.
    32 to 34)."""
    rng_start, rng_steps = jax.random.split(rng)
    keys, steps = example_keys(rng_steps, batch), model.steps
    values = conditions.values_of(model.conditioning, batch, frozen)
    gammas = gamma_at(model, state.ema, jnp.arange(steps + 1) / steps)

    def one(z: Array, at: tuple[Array, Array, Array]):
        number, gamma_s, gamma_t = at
        (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_sigma(gamma_s), alpha_sigma(gamma_t)
        eps_hat, x = estimates(model, state.ema['denoiser'], z, jnp.broadcast_to(gamma_t, (len(z),)), values)
        fraction = -jnp.expm1(gamma_s - gamma_t)  # of sigma_t^2 that is noise which z_s does not have
        noise = normal(jax.vmap(jax.random.fold_in, (0, None))(keys, number), model.shape)
        z = alpha_s / alpha_t * (z - fraction * sigma_t * eps_hat) + jnp.sqrt(fraction) * sigma_s * noise
        return z, {'x': z, 'x_0': x}

    z = normal(example_keys(rng_start, batch), model.shape)
    return jax.lax.scan(one, z, (jnp.arange(steps), gammas[:-1], gammas[1:]), reverse=True)


def sample(model: Model, state: State, frozen, batch, rng) -> Array:
    """The grey levels that p(x | z_0) gives the highest probability, the nearest to z_0 / alpha_0: float32 [n, H, W, C]
    in [-1, 1]."""
    z, _ = run_sampler(model, state, frozen, batch, rng)
    alpha, _ = alpha_sigma(ends_of(model, state.ema)[0])
    middle = (LEVELS - 1) / 2
    level = jnp.round((z / (INWARD * alpha) + 1) * middle)
    return jnp.clip(level, 0, LEVELS - 1) / middle - 1


def trajectory(model: Model, state: State, frozen, batch, rng) -> dict[str, Array]:
    """'x': z_s after each step, and 'x_0': the estimate of the image that the step was made with."""
    return run_sampler(model, state, frozen, batch, rng)[1]


def evaluate(model: Model, state: State, frozen, batch, rng) -> dict[str, Array]:
    """In bits per dimension, [n] each, 'bits_per_dim', an unbiased estimate of the bound, and the terms that it is the
    sum of: 'bits_prior', 'bits_reconstruction', 'bits_diffusion'."""
    rng_reconstruction, rng_time, rng_noise = jax.random.split(rng, 3)
    x, params, unit = batch['image'], state.ema, bits(model)
    values, ends = conditions.values_of(model.conditioning, batch, frozen), ends_of(model, params)
    prior = prior_loss(x, ends[1])
    reconstruction = reconstruction_loss(x, normal(example_keys(rng_reconstruction, batch), model.shape), ends[0])
    first = jax.vmap(jax.random.uniform)(example_keys(rng_time, batch))
    keys = example_keys(rng_noise, batch)

    def one(total: Array, number: Array):
        t = jnp.mod(first + number / model.times, 1.0)
        eps = normal(jax.vmap(jax.random.fold_in, (0, None))(keys, number), model.shape)
        pair = normalised_pair(model, params, t)
        return total + diffusion_loss(model, params['denoiser'], ends, *pair, x, eps, values), None

    total, _ = jax.lax.scan(one, jnp.zeros(len(x)), jnp.arange(model.times))
    diffusion = total / model.times
    return {
        'bits_per_dim': unit * (prior + reconstruction + diffusion),
        'bits_prior': unit * prior,
        'bits_reconstruction': unit * reconstruction,
        'bits_diffusion': unit * diffusion,
    }


def denoise(model: Model, state: State, frozen, batch, x: Array, sigma: Array) -> Array:
    """Estimate of the image of x = image + sigma eps, float32 [n, H, W, C]; sigma [n].

    The network was trained on sigma from e^(gamma_0 / 2) to e^(gamma_1 / 2): outside it guesses.
    """
    gamma = 2 * jnp.log(INWARD * jnp.maximum(sigma, 1e-6))
    alpha, _ = alpha_sigma(gamma)
    values = conditions.values_of(model.conditioning, batch, frozen)
    return estimates(model, state.ema['denoiser'], expanded(alpha, x) * INWARD * x, gamma, values)[1]
