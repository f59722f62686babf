"""Noise schedules and what follows from them, in float64 numpy: they are constants of a program.

Steps are counted from 0, the one next to the data, to T - 1. Ho et al. count from 1 to T.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.special


class Schedule(NamedTuple):
    """Noise levels from the least to the most: x_t = alpha x_0 + sigma eps. Arrays [T]."""

    t: np.ndarray  # time, as the network embeds it
    alpha: np.ndarray
    sigma: np.ndarray


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) = N(x_t_weight x_t + x_0_weight x_0, variance), s the level below t. Arrays [T].

    Below the first level lies the data: alpha 1, sigma 0.
    """

    x_t_weight: np.ndarray
    x_0_weight: np.ndarray
    variance: np.ndarray
    forward: np.ndarray  # variance of q(x_t | x_s)


def linear_betas(timesteps: int, start: float, end: float) -> np.ndarray:
    """Variances beta of the forward steps, evenly spaced from start to end, both included: [T]."""
    return np.linspace(start, end, timesteps, dtype=np.float64)


def cosine_betas(timesteps: int) -> np.ndarray:
    """Variances beta for alpha-bar = cos((t / T + s) / (1 + s) pi / 2)^2, s = 0.008, at most 0.999: [T]
    (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17)."""
    alpha_bar = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def variance_preserving(betas: np.ndarray, zero_terminal: bool = False) -> Schedule:
    """Schedule of the forward process x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps.

    alpha^2 is the paper's alpha-bar (Ho et al. 2020, eq. 4) and alpha^2 + sigma^2 = 1.

    zero_terminal: alpha is moved and stretched to end at 0 where it began, so that the last level
      is noise and nothing else (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
    """
    alpha_bar = np.cumprod(1 - betas)
    if zero_terminal:
        alpha = np.sqrt(alpha_bar)
        alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return Schedule(np.arange(len(betas)), np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))


def subset(schedule: Schedule, steps: np.ndarray) -> Schedule:
    """The schedule that visits only `steps`, increasing. The network embeds the original steps."""
    return Schedule(*(values[steps] for values in schedule))


def uniform_steps(timesteps: int, n: int) -> np.ndarray:
    """n of the steps 0..T-1: floor(i T / n) (Song et al. 2021, arXiv 2010.02502, appendix D.2: 'linear')."""
    return np.arange(n) * timesteps // n


def leading_steps(timesteps: int, n: int) -> np.ndarray:
    """n of the steps 0..T-1: i floor(T / n), diffusers' 'leading'."""
    return np.arange(n) * (timesteps // n)


def quadratic_steps(timesteps: int, n: int) -> np.ndarray:
    """n of the steps 0..T-1, denser near the data: floor(c i^2), the last near 0.8 T.

    That c is the one of the code behind the paper's results (Song et al. 2021, appendix D.2). Where
    squares fall on one step, steps are moved up to the next free one.
    """
    steps = np.floor(np.linspace(0, np.sqrt(0.8 * timesteps), n) ** 2).astype(int)
    for i in range(1, n):
        steps[i] = max(steps[i], steps[i - 1] + 1)
    return steps


def trailing_steps(timesteps: int, n: int) -> np.ndarray:
    """n of the steps 0..T-1, evenly from the last one down: round(i T / n) - 1 (Lin et al. 2023, table 2)."""
    return np.round(np.arange(1, n + 1) * timesteps / n).astype(int) - 1


def respaced_steps(timesteps: int, n: int) -> np.ndarray:
    """n of the steps 0..T-1, evenly between both ends: round(i (T - 1) / (n - 1)) (Nichol & Dhariwal 2021)."""
    return np.round(np.arange(n) * (timesteps - 1) / max(n - 1, 1)).astype(int)


def distilled_steps(timesteps: int, n: int, grid: int) -> np.ndarray:
    """n of the steps 0..T-1: of the `grid` steps i floor(T / grid) - 1, i from 1, that a consistency model was
    distilled on, about evenly from the last one down (Luo et al. 2023, arXiv 2310.04378, section 4.4; diffusers'
    LCM)."""
    taught = np.arange(1, grid + 1)[::-1] * (timesteps // grid) - 1
    return taught[np.arange(n) * grid // n][::-1]


SPACINGS = {
    'uniform': uniform_steps,
    'leading': leading_steps,
    'trailing': trailing_steps,
    'respaced': respaced_steps,
    'quadratic': quadratic_steps,
}


def karras_ramp(low: float, high: float, n: int) -> np.ndarray:
    """n values, decreasing from high to low, evenly in the power 1/7 (Karras et al. 2022, eq. 5)."""
    return np.linspace(high ** (1 / 7), low ** (1 / 7), n) ** 7


def exponential_ramp(low: float, high: float, n: int) -> np.ndarray:
    """n values, decreasing from high to low, evenly in the logarithm."""
    return np.exp(np.linspace(np.log(high), np.log(low), n))


def beta_ramp(low: float, high: float, n: int) -> np.ndarray:
    """n values, decreasing from high to low, by quantiles of Beta(0.6, 0.6): denser at both ends (Lee et al. 2024,
    arXiv 2407.12173)."""
    return low + scipy.special.betaincinv(0.6, 0.6, np.linspace(1, 0, n)) * (high - low)


RAMPS = {'karras': karras_ramp, 'exponential': exponential_ramp, 'beta': beta_ramp}


def posterior(schedule: Schedule) -> Posterior:
    """Posteriors between neighbouring levels (Ho et al. 2020, eq. 7, for any alpha and sigma)."""
    alpha, var = schedule.alpha, schedule.sigma**2
    alpha_s, var_s = np.concatenate([[1.0], alpha[:-1]]), np.concatenate([[0.0], var[:-1]])
    ratio = alpha / alpha_s  # q(x_t | x_s) = N(ratio x_s, forward)
    forward = var - ratio**2 * var_s
    return Posterior(ratio * var_s / var, alpha_s * forward / var, forward * var_s / var, forward)


def model_log_variance(schedule: Schedule, variance: str) -> np.ndarray:
    """Log-variance of p(x_s | x_t), [T]: 'fixed_large', that of q(x_t | x_s), or 'fixed_small', that of
    q(x_s | x_t, x_0) (Ho et al. 2020, section 3.2).

    At step 0 both are the posterior variance of step 1: there the posterior's own is 0, and the
    first step's beta would blur the data more than need be.
    """
    moves = posterior(schedule)
    values = {'fixed_large': moves.forward, 'fixed_small': moves.variance}[variance]
    return np.log(np.concatenate([moves.variance[1:2], values[1:]]))
