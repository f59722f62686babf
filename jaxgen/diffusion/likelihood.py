"""Likelihoods in bits per dimension: the variational bound of a chain, and that of the probability-flow ODE."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.diffusion.processes import Process, coefficients, expanded
from jaxgen.diffusion.samplers import VARIANCES, estimate
from jaxgen.diffusion.schedules import Schedule, model_log_variance, posterior
from jaxgen.losses import likelihoods
from jaxgen.losses.divergences import normal_kl
from jaxgen.options import Count, OneOf
from jaxgen.randomness import normal

Array = jax.Array

EARLIEST = 1e-5  # time at which the likelihood by the ODE starts (Song et al. 2021, the released code)


def bound(*, steps: Annotated[int, '[0, inf)'] = 0, variance: Annotated[str, OneOf('', *VARIANCES)] = '') -> None:
    """The variational bound of a chain, see `variational_bound`.

    Args:
      steps: terms that are computed, of the T - 1 between the first and the last; drawn evenly, the mean is right;
        0: all.
      variance: of p(x_s | x_t): 'fixed_large' | 'fixed_small' | 'learned'; '': 'learned' where the network puts out a
        variance, else 'fixed_large'.
    """


def ode(*, steps: Count = 50) -> None:
    """The likelihood by the probability-flow ODE, see `ode_likelihood`.

    Args:
      steps: of the Runge-Kutta method. Where each pixel has one of three values and a noise of one grey level, 50 are
        wrong by 0.001 (vp, ve) to 0.008 bits/dim (flow), 200 by less than 0.0002
        (tests/diffusion/processes_test.py).
    """


LIKELIHOODS = {'bound': bound, 'ode': ode}


def tables(schedule: Schedule, variance: str) -> dict[str, np.ndarray]:
    """Constants of each step's term of the bound, float32 [T]."""
    moves = posterior(schedule)
    # At step 0 the posterior's variance is 0; that step is the decoder's and reads no other.
    small = model_log_variance(schedule, 'fixed_small')
    values = {
        'alpha': schedule.alpha,
        'sigma': schedule.sigma,
        'x_0_weight': moves.x_0_weight,
        'log_posterior': np.log(np.maximum(moves.variance, 1e-300)),
        'log_model': small if variance == 'learned' else model_log_variance(schedule, variance),
        # What is added to the last where a fraction of 1 is learned.
        'log_range': np.log(moves.forward) - small,
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def term(at: dict[str, Array], x_0: Array, x_0_hat: Array, fraction: Array | None, first: Array) -> Array:
    """One step's term of the bound, nats [n] (Ho et al. 2020, eq. 5): KL(q(x_s | x_t, x_0) || p(x_s | x_t)), or at
    the first step the decoder's -log p(x_0 | x_t) of 256 levels (eq. 13).

    Args:
      at: the tables' entries, [n, 1, ...] each.
      fraction: where the learned log-variance lies between the smallest and the largest (Nichol & Dhariwal
        2021, eq. 15); None: fixed.
      first: bool [n].
    """
    log_model = at['log_model'] if fraction is None else at['log_model'] + fraction * at['log_range']
    decoder = -likelihoods.discretised_gaussian(x_0_hat, 0.5 * log_model, x_0)
    # Means of q and p: the x_t in them is the same, so only this differs.
    distance = at['x_0_weight'] * (x_0 - x_0_hat)
    middle = normal_kl(distance, jnp.broadcast_to(at['log_posterior'], x_0.shape), 0.0, log_model)
    return jnp.where(first, decoder, middle)


def entries(table: dict[str, np.ndarray], i: Array, x: Array) -> dict[str, Array]:
    """Entries i [n] of the tables, shaped to broadcast against x."""
    return {name: expanded(jnp.asarray(values)[i], x) for name, values in table.items()}


def bound_term(schedule: Schedule, x_0: Array, x_0_hat: Array, i: Array, fraction: Array) -> Array:
    """The term of step i [n] with a learned variance, in bits per dimension, [n]; T times its mean over
    steps is the bound without its constant."""
    at = entries(tables(schedule, 'learned'), i, x_0)
    return term(at, x_0, x_0_hat, fraction, i == 0) / (x_0[0].size * math.log(2))


def variational_bound(
    denoise: Callable, x_0: Array, schedule: Schedule, variance: str, keys: Array, steps: int = 0
) -> dict[str, Array]:
    """Upper bound on -log2 p(x_0) per dimension: Ho et al. 2020, eq. 5, with a draw of x_t for each term.

    Args:
      denoise: (x [n, ...], t [n]) -> x_0, or (x_0, fraction) with a learned variance. Its argument t is the schedule's.
      x_0: float32 [n, ...] in [-1, 1], at 256 levels.
      variance: of p(x_s | x_t), 'fixed_large' | 'fixed_small' | 'learned'.
      keys: [n], of the draws of each example.
      steps: number of the T - 1 middle terms that are computed. They are cut into so many runs of
        nearly equal length, and one term of each run, drawn for each example, stands for its run:
        the estimate has the right mean. 0: all of them.

    Returns:
      float32 [n] each: 'bits_per_dim', the bound, and the parts of it that are always computed in
      full, 'bits_prior' (L_T: what of x_0 is left at the last level) and 'bits_decoder' (L_0: from
      the first level to 256 values, eq. 13).
    """
    dims = x_0[0].size
    bits = 1 / (dims * math.log(2))
    last = len(schedule.t) - 1
    steps = steps or last
    table, t = tables(schedule, variance), jnp.asarray(schedule.t)

    def one(_, run):
        number, low, size = run
        which, noise = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, number)))(keys), 1, 0)
        i = low + jax.vmap(lambda key: jax.random.randint(key, (), 0, size))(which)  # [n], a step of the run
        at = entries(table, i, x_0)
        x_t = at['alpha'] * x_0 + at['sigma'] * normal(noise, x_0.shape[1:])
        x_0_hat, fraction = estimate(denoise, x_t, t[i])
        return None, size * term(at, x_0, x_0_hat, fraction, i == 0)

    # Run 0 is step 0, the decoder's; the others cut 1 .. T - 1 into `steps`. One scan over all, so
    # that the network is compiled once.
    edges = np.concatenate([[0], 1 + np.arange(steps + 1) * last // steps])
    runs = jax.tree.map(jnp.asarray, (np.arange(steps + 1), edges[:-1], np.diff(edges)))
    terms = jax.lax.scan(one, None, runs)[1]  # [steps + 1, n]
    # The prior is N(0, I), or sigma times that where the image is never made smaller.
    log_variance = 2 * math.log(schedule.sigma[last])
    log_prior = log_variance if schedule.alpha[last] == 1 else 0.0
    prior = normal_kl(float(schedule.alpha[last]) * x_0, jnp.full_like(x_0, log_variance), 0.0, log_prior)
    return {
        'bits_per_dim': bits * (prior + terms.sum(0)),
        'bits_prior': bits * prior,
        'bits_decoder': bits * terms[0],
    }


def ode_likelihood(denoise: Callable, x_0: Array, process: Process, keys: Array, steps: int) -> dict[str, Array]:
    """-log2 p(x_0) per dimension by the probability-flow ODE (Song et al. 2021, arXiv 2011.13456, section 4.3).

    With y = x / alpha and r = sigma / alpha the ODE is dy / dr = eps(y, r), and along it (their eq. 39)

        log p(y at the data) = log p(y at the end) + integral of div eps dr,

    the divergence by one Rademacher vector per example (Hutchinson; unbiased, and exact where eps is diagonal
    in y). Images are dequantised by uniform noise, so that this is a bound on the likelihood of 256 levels.

    The integral starts where the noise is far below a grey level, at t = 1e-5 as in the published code (`EARLIEST`),
    and not where sampling ends: at VP's 1e-3 sigma is 1.3 grey levels. What is measured is the density of
    x_0 with that noise, sigma_min of 've'.

    Args:
      denoise: (x, t) -> x_0, not clipped: the derivative of a clipped estimate is 0.
      steps: of the classical Runge-Kutta method, evenly in log r, from EARLIEST to the process's end; four
        evaluations each.

    Returns:
      float32 [n] each: 'bits_per_dim', and 'bits_prior', the part of it that the noise at the end has.
    """
    axes, dims = tuple(range(1, x_0.ndim)), x_0[0].size
    ends = process.at(np.array([max(process.start, EARLIEST), process.end], np.float64))
    low, high = np.log(ends.sigma) - np.log(np.maximum(ends.alpha, 1e-3))
    edges = np.linspace(low, high, steps + 1)
    noise_keys, probe_keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key))(keys), 1, 0)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, x_0.shape[1:], minval=-0.5, maxval=0.5))(noise_keys)
    probe = jax.vmap(lambda key: jax.random.rademacher(key, x_0.shape[1:], jnp.float32))(probe_keys)

    def slope(y, log_ratio):
        """d y / d log r, and its divergence."""
        ratio = jnp.exp(log_ratio)
        t = jnp.broadcast_to(process.time(ratio), (len(y),))
        alpha = coefficients(process, t, y)[0]

        def flow(y):
            return y - estimate(denoise, alpha * y, t)[0]

        value, pull = jax.vjp(flow, y)
        return value, (pull(probe)[0] * probe).sum(axes)

    def step(carry, edge):
        y, total = carry
        at, to = edge
        h = to - at

        def stage(carry, constants):  # of four, so that the network is compiled once
            k, dy, dtotal = carry
            c, weight = constants
            k, divergence = slope(y + c * h * k, at + c * h)
            return (k, dy + weight * k, dtotal + weight * divergence), None

        start = (jnp.zeros_like(y), jnp.zeros_like(y), jnp.zeros_like(total))
        (_, dy, dtotal), _ = jax.lax.scan(stage, start, (jnp.array([0, 0.5, 0.5, 1]), jnp.array([1, 2, 2, 1]) / 6))
        return (y + h * dy, total + h * dtotal), None

    between = jnp.asarray(np.stack([edges[:-1], edges[1:]], -1), jnp.float32)
    y = x_0 + uniform / 127.5
    (y, total), _ = jax.lax.scan(step, (y, jnp.zeros(len(x_0))), between)
    prior = -likelihoods.gaussian(0.0, float(high), y)
    bits = 1 / (dims * math.log(2))
    return {'bits_per_dim': bits * (prior - total) + math.log2(127.5), 'bits_prior': bits * prior}


def noise_error(denoise: Callable, x_0: Array, process: Process, keys: Array, levels: int = 10) -> Array:
    """Mean square error of the noise [n], over times evenly between the data and the end.

    Args:
      denoise: (x [n, ...], t [n]) -> x_0, or (x_0, fraction).
      keys: [n], of the noise of each example.
      levels: number of the times.
    """

    def one(t: Array, keys: Array) -> Array:
        t = jnp.full(len(x_0), t)
        alpha, sigma = coefficients(process, t, x_0)
        x_t = alpha * x_0 + sigma * normal(keys, x_0.shape[1:])
        # The noise differs as the estimates of x_0 do.
        error = alpha / sigma * (x_0 - estimate(denoise, x_t, t)[0])
        return jnp.square(error).mean(tuple(range(1, x_0.ndim)))

    t = (jnp.arange(levels) + 0.5) / levels
    t = (process.steps * t).astype(jnp.int32) if process.steps else process.start + (process.end - process.start) * t
    keys = jax.vmap(jax.random.split, (0, None), 1)(keys, levels)
    return jax.lax.map(lambda a: one(*a), (t, keys)).mean(0)
