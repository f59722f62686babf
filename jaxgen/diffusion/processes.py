"""How an image becomes noise: x_t = alpha(t) x_0 + sigma(t) eps, in continuous time or in T steps.

    process = make('vp')
    process.at(t)  # Schedule(t, alpha, sigma) for times t, numpy float64 or traced float32
    process.time(ratio)  # the t at which sigma / alpha = ratio
    process.told(t)  # what the network is told of t

Time runs from `start`, next to the data, to `end`. All formulations differ in nothing but these
functions; everything else reads alpha and sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.diffusion import schedules
from jaxgen.diffusion.schedules import Schedule
from jaxgen.errors import UserError

PROCESSES = ('linear', 'cosine', 'geometric', 'vp', 'sub_vp', 've', 'flow')
# The least and the largest sigma over images in [-1, 1]: of score_sde's VE (0.01 and 50 over images in [0, 1]), of
# NCSN's 2019 CIFAR-10 model (0.01 and 1 over [0, 1]) and of EDM (stated over [-1, 1]).
SIGMAS = {'ve': (0.02, 100.0), 'geometric': (0.02, 2.0), 'edm': (0.002, 80.0)}
LEAST_RATIO = 1e-5  # at which logarithms of sigma / alpha and of alpha / sigma end


class Process(NamedTuple):
    """One way from data to noise."""

    at: Callable[[Any], Schedule]  # times, numpy or jax, to levels; float64 for numpy
    time: Callable[[Any], Any]  # sigma / alpha to t
    told: Callable[[Any], Any]  # t to what a network embeds
    start: float  # of time, in training
    low: float  # of time, in sampling: the level next to the data, or the data itself where sigma is 0 there
    end: float
    steps: int  # T of a chain, whose times are 0 .. T - 1; 0: continuous
    log_told: bool = False  # `told` is a logarithm of the noise level


def module(x):
    """numpy for numpy arrays (float64 constants of a program), jax.numpy for traced ones."""
    return np if isinstance(x, np.ndarray | float) else jnp


def make(
    name: str,
    *,
    timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    zero_terminal: bool = False,
) -> Process:
    """A process by its name.

    Args:
      name: a chain of `timesteps` steps,
          'linear'  beta evenly from beta_start to beta_end (Ho et al. 2020)
          'cosine'  alpha_bar a squared cosine (Nichol & Dhariwal 2021, eq. 17)
          'geometric'  alpha = 1, sigma from sigma_min to sigma_max with one ratio (Song & Ermon 2019, section 4.2)
        or in continuous time (Song et al. 2021, arXiv 2011.13456, appendix B and C),
          'vp', 'sub_vp'  with the betas of a chain of 1000 steps: beta(t) from 1000 beta_start to 1000 beta_end
          've'  alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t
          'flow'  alpha = 1 - t, sigma = t (Lipman et al. 2022; Liu et al. 2022)
      sigma_min, sigma_max: over images in [-1, 1]; None: as `sigma_range` has them.
      zero_terminal: of a chain: alpha_bar is moved to end at 0 exactly (Lin et al. 2023, algorithm 1).

    Raises:
      UserError: a value out of range.
    """
    sigma_min, sigma_max = sigma_range(name, '', sigma_min, sigma_max)
    if timesteps < 2 or not 0 < beta_start <= beta_end < 1 or not 0 < sigma_min < sigma_max:
        raise UserError(
            f'config.model: timesteps {timesteps} must be at least 2, 0 < beta_start {beta_start} <= '
            f'beta_end {beta_end} < 1, 0 < sigma_min {sigma_min} < sigma_max {sigma_max}'
        )
    if name in ('linear', 'cosine'):
        betas = (
            schedules.linear_betas(timesteps, beta_start, beta_end)
            if name == 'linear'
            else schedules.cosine_betas(timesteps)
        )
        return chain(schedules.variance_preserving(betas, zero_terminal))
    if name == 'geometric':
        steps = timesteps - 1
        way = exploding(sigma_min, sigma_max)
        return way._replace(
            at=lambda t: way.at(t / steps)._replace(t=t), time=lambda ratio: steps * way.time(ratio),
            told=lambda t: t, end=steps, steps=timesteps, log_told=False,
        )  # fmt: skip
    if name in ('vp', 'sub_vp'):
        return stochastic(1000 * beta_start, 1000 * beta_end, sub=name == 'sub_vp')
    if name == 've':
        return exploding(sigma_min, sigma_max)
    return flow()


def sigma_range(
    process: str, prediction: str, sigma_min: float | None = None, sigma_max: float | None = None
) -> tuple[float, float]:
    """(sigma_min, sigma_max), each as given or, where it is None, that of the paper: EDM's for the prediction 'edm',
    else that of the process."""
    low, high = SIGMAS['edm'] if prediction == 'edm' else SIGMAS.get(process, SIGMAS['ve'])
    return low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max


def log_noise_ratio(at: Schedule):
    """log(sigma / alpha), finite where alpha or sigma is 0: the ratio ends at LEAST_RATIO and one over it."""
    xp = module(at.alpha)
    alpha, sigma = xp.maximum(at.alpha, LEAST_RATIO * at.sigma), xp.maximum(at.sigma, LEAST_RATIO * at.alpha)
    return xp.log(sigma) - xp.log(alpha)


def network_time(process: Process, t, prediction: str, logarithmic: bool):
    """What a network embeds of times t [n].

    log(sigma / alpha) / 4 for EDM's prediction (Karras et al. 2022, table 1), else what the process says: steps of a
    chain of about 1000, or a logarithm.

    Args:
      logarithmic: the embedding is for logarithms, as random Fourier features are (Song et al. 2021, appendix H): of
        steps its frequencies would make neighbours unrelated. log(sigma / alpha) where the process has no logarithm.
    """
    if prediction == 'edm':
        return 0.25 * log_noise_ratio(process.at(t))
    return log_noise_ratio(process.at(t)) if logarithmic and not process.log_told else process.told(t)


def uniform_times(process: Process, rng, n: int):
    """Times [n] for training, all equally likely: steps of a chain, int32, or real numbers from start to end."""
    if process.steps:
        return jax.random.randint(rng, (n,), 0, process.steps)
    return jax.random.uniform(rng, (n,), minval=process.start, maxval=process.end)


def chain(table: Schedule) -> Process:
    """The steps of a table; between them log(sigma / alpha) is linear."""
    log_ratio = np.log(table.sigma) - np.log(np.maximum(table.alpha, 1e-12))
    steps = len(table.t)

    def at(t) -> Schedule:
        xp = module(t)
        if np.issubdtype(t.dtype, np.integer):
            return Schedule(t, *(xp.asarray(values, xp.float32 if xp is jnp else None)[t] for values in table[1:]))
        value = xp.interp(t, np.arange(steps), log_ratio)
        # alpha^2 + sigma^2 = 1
        return Schedule(t, xp.exp(-0.5 * xp.logaddexp(0.0, 2 * value)), xp.exp(-0.5 * xp.logaddexp(0.0, -2 * value)))

    def time(ratio):
        xp = module(ratio)
        return xp.interp(xp.log(ratio), log_ratio, np.arange(steps, dtype=np.float64))

    return Process(at, time, lambda t: t, 0, 0, steps - 1, steps)


def stochastic(low: float, high: float, sub: bool) -> Process:
    """dx = -beta / 2 x dt + ..., beta(t) = low + t (high - low); `sub`: with less noise on the way."""

    def at(t) -> Schedule:
        xp = module(t)
        total = t * low + 0.5 * t**2 * (high - low)  # integral of beta
        variance = -xp.expm1(-total)
        return Schedule(t, xp.exp(-0.5 * total), variance if sub else xp.sqrt(variance))

    def time(ratio):
        xp = module(ratio)
        total = 2 * xp.arcsinh(ratio / 2) if sub else xp.log1p(ratio**2)
        return 2 * total / (low + xp.sqrt(low**2 + 2 * (high - low) * total))

    # The published networks are told t in steps of a chain of 1000, counted from 0.
    return Process(at, time, lambda t: 999 * t, 1e-5, 1e-3, 1.0, 0)


def exploding(low: float, high: float) -> Process:
    """Noise is added to the image as it is, its standard deviation growing geometrically."""
    span = math.log(high / low)

    def at(t) -> Schedule:
        xp = module(t)
        return Schedule(t, xp.ones_like(t), low * xp.exp(t * span))

    def time(ratio):
        return module(ratio).log(ratio / low) / span

    # The published networks are told the logarithm of sigma over images in [0, 1], where it is half as large.
    return Process(at, time, lambda t: math.log(low / 2) + t * span, 0.0, 0.0, 1.0, 0, True)


def flow() -> Process:
    """Straight lines between image and noise. t = 1 is noise, as in SD3; Liu et al. count the other way."""

    def at(t) -> Schedule:
        return Schedule(t, 1 - t, t)

    def time(ratio):
        return ratio / (1 + ratio)

    return Process(at, time, lambda t: 1000 * t, 0.0, 0.0, 1.0, 0)


def levels(process: Process, n: int, spacing: str, shift: float = 1.0, last_step: float = 0.0) -> Schedule:
    """The levels that a sampler visits, numpy float64, from the one next to the data to the last.

    Args:
      n: how many; 0: all steps of a chain, 100 in continuous time; 1: the last one, which is noise.
      spacing: of a chain 'uniform' | 'trailing' | 'respaced' | 'quadratic', see `schedules`; in continuous time
        'uniform', evenly in t. Of both 'karras': evenly in (sigma / alpha)^(1/7) (Karras et al. 2022, eq. 5).
      last_step: in continuous time, t of the level next to the data where it is above 0, as in SiT's released SDE
        sampler (0.04); the others are evenly between it and the end.
      shift: moves times, also last_step, t to shift t / (1 + (shift - 1) t) (Esser et al. 2024, arXiv 2403.03206,
        eq. 23).
    """
    n = n or process.steps or 100
    if n == 1:  # most spacings have the first level then, which is the data but for a little noise
        return process.at(np.array([process.end]))
    if spacing == 'karras':
        ends = process.at(np.array([process.low, process.end], np.float64))
        low, high = (ends.sigma / ends.alpha) ** (1 / 7)
        return process.at(process.time(np.linspace(low, high, n) ** 7))
    if process.steps:
        return process.at(schedules.SPACINGS[spacing](process.steps, n))
    at_data = process.at(np.array([process.low])).sigma[0] == 0 and not last_step
    times = np.linspace(last_step or process.low, process.end, n + at_data)[int(at_data) :]
    if shift != 1:
        # Written so that t = 1 stays 1, whatever is rounded: beyond it alpha would be below 0.
        times = shift * times / (1 - times + shift * times)
    return process.at(times)
