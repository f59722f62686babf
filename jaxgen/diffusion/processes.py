"""How an image becomes noise: x_t = alpha(t) x_0 + sigma(t) eps, in continuous time or in T steps.

    process = vp()
    process.at(t)  # Schedule(t, alpha, sigma) for times t, numpy float64 or traced float32
    process.time(ratio)  # the t at which sigma / alpha = ratio
    process.c_noise(t)  # input of the network's time embedding

Time runs from `start`, next to the data, to `end`. All formulations differ in nothing but these
functions; everything else reads alpha and sigma. The keyword arguments of a process are its fields of
`config.model.process`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.diffusion import schedules
from jaxgen.diffusion.schedules import Schedule
from jaxgen.errors import UserError
from jaxgen.options import Rule, own_fields

# The least and the largest sigma over images in [-1, 1]: of score_sde's VE (0.01 and 50 over images in [0, 1]), of
# NCSN's 2019 CIFAR-10 model (0.01 and 1 over [0, 1]) and of EDM (stated over [-1, 1]).
SIGMAS = {'ve': (0.02, 100.0), 'geometric': (0.02, 2.0), 'edm': (0.002, 80.0)}
LEAST_RATIO = 1e-5  # at which logarithms of sigma / alpha and of alpha / sigma end


class Process(NamedTuple):
    """A forward process, from data to noise."""

    at: Callable[[Any], Schedule]  # times, numpy or jax, to noise levels; float64 for numpy
    time: Callable[[Any], Any]  # sigma / alpha to t
    c_noise: Callable[[Any], Any]  # t to the input of a network's time embedding (EDM's term)
    start: float  # of time, in training
    low: float  # of time, in sampling: the level next to the data, or the data itself where sigma is 0 there
    end: float
    steps: int  # T of a chain, whose times are 0 .. T - 1; 0: continuous
    logarithmic: bool = False  # c_noise is a logarithm of the noise level
    straight: bool = False  # x_t is on a straight line between data and noise: alpha + sigma = 1


def module(x):
    """numpy for numpy arrays (float64 constants of a program), jax.numpy for traced ones."""
    return np if isinstance(x, np.ndarray | float) else jnp


Beta = Annotated[float, '(0, 1)']
Steps = Annotated[int, '[2, inf)']
Sigma = Annotated[float | None, '(0, inf)']


def linear(
    *,
    timesteps: Steps = 1000,
    beta_start: Beta = 1e-4,
    beta_end: Beta = 0.02,
    zero_terminal: bool = False,
    rescale_timesteps: bool = False,
) -> Process:
    """The chain of DDPM: beta evenly from beta_start to beta_end (Ho et al. 2020).

    Args:
      timesteps: T, steps of the chain.
      beta_start, beta_end: variances of the first and the last forward step.
      zero_terminal: alpha_bar is moved and stretched to end at 0 exactly (Lin et al. 2023, algorithm 1).
      rescale_timesteps: the network embeds t 1000 / timesteps, as most released models of Nichol & Dhariwal 2021 do.
    """
    check_ordered('beta_start', beta_start, 'beta_end', beta_end)
    betas = schedules.linear_betas(timesteps, beta_start, beta_end)
    return chain(schedules.variance_preserving(betas, zero_terminal), rescale_timesteps)


def scaled_linear(
    *,
    timesteps: Steps = 1000,
    beta_start: Beta = 0.00085,
    beta_end: Beta = 0.012,
    zero_terminal: bool = False,
) -> Process:
    """The chain of latent diffusion: the root of beta evenly from that of beta_start to that of beta_end (Rombach et
    al. 2021; the defaults are Stable Diffusion's).

    Args:
      timesteps: T, steps of the chain.
      beta_start, beta_end: variances of the first and the last forward step.
      zero_terminal: alpha_bar is moved and stretched to end at 0 exactly (Lin et al. 2023, algorithm 1).
    """
    check_ordered('beta_start', beta_start, 'beta_end', beta_end)
    betas = schedules.linear_betas(timesteps, math.sqrt(beta_start), math.sqrt(beta_end)) ** 2
    return chain(schedules.variance_preserving(betas, zero_terminal))


def sigmoid(
    *,
    timesteps: Steps = 1000,
    beta_start: Beta = 1e-4,
    beta_end: Beta = 0.02,
    zero_terminal: bool = False,
) -> Process:
    """The chain whose betas follow the logistic function between -6 and 6 (Xu et al. 2022, arXiv 2203.02923; 'sigmoid'
    of diffusers).

    Args:
      timesteps: T, steps of the chain.
      beta_start, beta_end: variances that the first and the last forward step tend to.
      zero_terminal: alpha_bar is moved and stretched to end at 0 exactly (Lin et al. 2023, algorithm 1).
    """
    check_ordered('beta_start', beta_start, 'beta_end', beta_end)
    betas = beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, timesteps)))
    return chain(schedules.variance_preserving(betas, zero_terminal))


def listed(
    *,
    betas: Annotated[tuple[float, ...], '(0, 1)', Rule(lambda b: len(b) >= 2, 'two variances or more')] = (1e-4, 0.02),
    zero_terminal: bool = False,
    rescale_timesteps: bool = False,
) -> Process:
    """The chain of any variances of the forward steps.

    Args:
      betas: variance of each forward step.
      zero_terminal: alpha_bar is moved and stretched to end at 0 exactly (Lin et al. 2023, algorithm 1).
      rescale_timesteps: the network embeds t 1000 / timesteps.
    """
    return chain(schedules.variance_preserving(np.asarray(betas, np.float64), zero_terminal), rescale_timesteps)


def cosine(*, timesteps: Steps = 1000, zero_terminal: bool = False, rescale_timesteps: bool = False) -> Process:
    """The chain of Improved DDPM: alpha_bar a squared cosine (Nichol & Dhariwal 2021, eq. 17).

    Args:
      timesteps: T, steps of the chain.
      zero_terminal: alpha_bar is moved and stretched to end at 0 exactly (Lin et al. 2023, algorithm 1).
      rescale_timesteps: the network embeds t 1000 / timesteps, as most released models of Nichol & Dhariwal 2021 do.
    """
    betas = schedules.cosine_betas(timesteps)
    return chain(schedules.variance_preserving(betas, zero_terminal), rescale_timesteps)


def geometric(*, timesteps: Steps = 1000, sigma_min: Sigma = None, sigma_max: Sigma = None) -> Process:
    """The noise levels of NCSN: alpha = 1, sigma from sigma_min to sigma_max with one ratio (Song & Ermon 2019, section
    4.2).

    Args:
      timesteps: L, the number of noise levels.
      sigma_min, sigma_max: the least and the largest sigma over images in [-1, 1]; None: 0.02 and 2, NCSN's.
    """
    steps, continuous = timesteps - 1, exploding(*sigma_range('geometric', sigma_min, sigma_max))
    return continuous._replace(
        at=lambda t: continuous.at(t / steps)._replace(t=t),
        time=lambda ratio: steps * continuous.time(ratio),
        c_noise=lambda t: t,
        end=steps,
        steps=timesteps,
        logarithmic=False,
    )


def vp(*, beta_start: Beta = 1e-4, beta_end: Beta = 0.02) -> Process:
    """The variance-preserving SDE, beta(t) from 1000 beta_start to 1000 beta_end (Song et al. 2021, arXiv 2011.13456,
    appendix B and C).

    Args:
      beta_start, beta_end: those of a chain of 1000 steps.
    """
    check_ordered('beta_start', beta_start, 'beta_end', beta_end)
    return stochastic(1000 * beta_start, 1000 * beta_end, sub=False)


def sub_vp(*, beta_start: Beta = 1e-4, beta_end: Beta = 0.02) -> Process:
    """The sub-VP SDE, whose variance is at most that of `vp` (Song et al. 2021, arXiv 2011.13456, appendix B and C).

    Args:
      beta_start, beta_end: those of a chain of 1000 steps.
    """
    check_ordered('beta_start', beta_start, 'beta_end', beta_end)
    return stochastic(1000 * beta_start, 1000 * beta_end, sub=True)


def ve(*, sigma_min: Sigma = None, sigma_max: Sigma = None) -> Process:
    """The variance-exploding SDE, alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t (Song et al. 2021, arXiv
    2011.13456, appendix C).

    Args:
      sigma_min, sigma_max: the least and the largest sigma over images in [-1, 1]; None: 0.02 and 100, score_sde's, or
        with the prediction 'edm' 0.002 and 80.
    """
    return exploding(*sigma_range('ve', sigma_min, sigma_max))


def flow() -> Process:
    """Straight lines between image and noise, alpha = 1 - t, sigma = t (Lipman et al. 2022; Liu et al. 2022). t = 1 is
    noise, as in SD3; Liu et al. count the other way."""

    def at(t) -> Schedule:
        return Schedule(t, 1 - t, t)

    def time(ratio):
        return ratio / (1 + ratio)

    return Process(at, time, lambda t: 1000 * t, 0.0, 0.0, 1.0, 0, straight=True)


PROCESSES = {
    'linear': linear,
    'scaled_linear': scaled_linear,
    'cosine': cosine,
    'sigmoid': sigmoid,
    'listed': listed,
    'geometric': geometric,
    'vp': vp,
    'sub_vp': sub_vp,
    've': ve,
    'flow': flow,
}
CHAINS = ('linear', 'scaled_linear', 'cosine', 'sigmoid', 'listed', 'geometric')


def make(section: dict, prediction: str = '') -> Process:
    """The process of a complete section {'name': ..., its fields}; sigmas that are None are the paper's, see
    `sigma_range`.

    Raises:
      UserError: fields that do not fit each other.
    """
    own = own_fields(section)
    if prediction == 'edm' and 'sigma_min' in own:
        own |= dict(
            zip(('sigma_min', 'sigma_max'), sigma_range('edm', own['sigma_min'], own['sigma_max']), strict=True)
        )
    return PROCESSES[section['name']](**own)


def check_ordered(low_name: str, low: float, high_name: str, high: float, strict: bool = False) -> None:
    """Raises UserError where low is more than high, or with `strict` as much."""
    if low > high or (strict and low == high):
        raise UserError(
            f'config.model.process.{low_name} {low} must be {"less" if strict else "at most as much"} than '
            f'{high_name} {high}'
        )


def sigma_range(name: str, sigma_min: float | None = None, sigma_max: float | None = None) -> tuple[float, float]:
    """(sigma_min, sigma_max), each as given or, where it is None, that of `SIGMAS[name]`.

    Raises:
      UserError: sigma_min is not below sigma_max.
    """
    low, high = SIGMAS[name]
    low, high = low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max
    check_ordered('sigma_min', low, 'sigma_max', high, strict=True)
    return low, high


def expanded(values, x):
    """Numbers [n], one for each example, with as many axes as x [n, ...], to multiply it."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def coefficients(process: Process, t, x) -> tuple[Any, Any]:
    """alpha and sigma at times t [n], or at levels [n], with as many axes as x [n, ...]."""
    at = level_at(process, t)
    return expanded(at.alpha, x), expanded(at.sigma, x)


def level_at(process: Process, t) -> Schedule:
    """The noise level at times t, or t itself where it is a Schedule: a level beside the process's, with the time that
    the network gets."""
    return t if isinstance(t, Schedule) else process.at(t)


def time_of(t):
    """The time of a time or a level."""
    return t.t if isinstance(t, Schedule) else t


def ends_at_noise(process: Process) -> bool:
    """Whether the last level is noise alone: alpha is 0 there."""
    return process.at(np.array([process.end])).alpha[0] == 0


def log_noise_ratio(at: Schedule):
    """log(sigma / alpha), finite where alpha or sigma is 0: the ratio ends at LEAST_RATIO and one over it."""
    xp = module(at.alpha)
    alpha, sigma = xp.maximum(at.alpha, LEAST_RATIO * at.sigma), xp.maximum(at.sigma, LEAST_RATIO * at.alpha)
    return xp.log(sigma) - xp.log(alpha)


def network_time(process: Process, t, prediction: str, logarithmic: bool):
    """c_noise, the input of a network's time embedding, at times t [n].

    log(sigma / alpha) / 4 for EDM's prediction (Karras et al. 2022, table 1), else what the process says: steps of a
    chain of about 1000, or a logarithm.

    Args:
      logarithmic: the embedding is for logarithms, as random Fourier features are (Song et al. 2021, appendix H): of
        steps its frequencies would make neighbours unrelated. log(sigma / alpha) where the process has no logarithm.
    """
    if prediction == 'edm':
        return 0.25 * log_noise_ratio(process.at(t))
    return log_noise_ratio(process.at(t)) if logarithmic and not process.logarithmic else process.c_noise(t)


def uniform_times(process: Process, rng, n: int):
    """Times [n] for training, all equally likely: steps of a chain, int32, or real numbers from start to end."""
    if process.steps:
        return jax.random.randint(rng, (n,), 0, process.steps)
    return jax.random.uniform(rng, (n,), minval=process.start, maxval=process.end)


def chain(table: Schedule, rescale: bool = False) -> Process:
    """The chain whose steps are those of a table; between them log(sigma / alpha) is linear.

    Args:
      rescale: c_noise runs to 1000 whatever the number of steps.
    """
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

    c_noise = (lambda t: t * (1000 / steps)) if rescale else (lambda t: t)
    return Process(at, time, c_noise, 0, 0, steps - 1, steps)


def stochastic(low: float, high: float, sub: bool) -> Process:
    """dx = -beta / 2 x dt + ..., beta(t) = low + t (high - low); `sub`: with less noise between."""

    def at(t) -> Schedule:
        xp = module(t)
        total = t * low + 0.5 * t**2 * (high - low)  # integral of beta
        variance = -xp.expm1(-total)
        return Schedule(t, xp.exp(-0.5 * total), variance if sub else xp.sqrt(variance))

    def time(ratio):
        xp = module(ratio)
        total = 2 * xp.arcsinh(ratio / 2) if sub else xp.log1p(ratio**2)
        return 2 * total / (low + xp.sqrt(low**2 + 2 * (high - low) * total))

    # The published networks embed t in steps of a chain of 1000, counted from 0.
    return Process(at, time, lambda t: 999 * t, 1e-5, 1e-3, 1.0, 0)


def exploding(low: float, high: float) -> Process:
    """Noise is added to the image as it is, its standard deviation growing geometrically."""
    log_range = math.log(high / low)

    def at(t) -> Schedule:
        xp = module(t)
        return Schedule(t, xp.ones_like(t), low * xp.exp(t * log_range))

    def time(ratio):
        return module(ratio).log(ratio / low) / log_range

    # The published networks embed the logarithm of sigma over images in [0, 1], where it is half as large.
    return Process(at, time, lambda t: math.log(low / 2) + t * log_range, 0.0, 0.0, 1.0, 0, True)
