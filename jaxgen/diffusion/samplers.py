"""Samplers: each is a table of weights, made of the noise levels that it visits, and `run` takes its steps in one
`lax.scan` of the callable `denoise(x, t) -> x_0`.

    table = ddim.table(schedule, eta=0.5)  # on the host, in float64; kept in float32
    x_0 = run(denoise, x, table, keys)
    x_0 = ddim(denoise, x, schedule, keys, eta=0.5)  # the same

`x` [n, ...] is noise at the schedule's last level (alpha 0 or small; where alpha is 1 all the way, sigma_max times
noise); `keys` [n] is one key per sample, so that a sample does not depend on what is drawn with it. Any (alpha, sigma)
will do, with sigma / alpha increasing. A step leads from a level to the one below, the last one to the data (alpha 1,
sigma 0): it is the estimate itself. Fewer steps come from a subset of the schedule.

A table is an argument of a compiled sampler: other noise levels or weights need no other program, where they do not
change its shapes.

`denoise` may return a pair (x_0, fraction): where between the smallest and the largest the variance of a
reverse step lies. Only `ancestral` with variance 'learned' looks at it.

With `trajectory` all return (x_0, {'x': [M, n, ...], 'x_0': [M, n, ...]}): the x that each of the M
evaluations of `denoise` led to, and what it returned. The last 'x' is the sample.

Nearly every sampler is a sum of x, the newest estimates and noise, with weights that are known before
(`linear`). They differ in the weights: those are written here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.diffusion.schedules import Schedule, posterior
from jaxgen.errors import UserError
from jaxgen.options import (
    TRACED,
    Choice,
    Fraction,
    NonNegative,
    OneOf,
    Positive,
    Rate,
)
from jaxgen.randomness import normal

Array = jax.Array

VARIANCES = ('fixed_large', 'fixed_small', 'learned')
PREDICTORS = ('reverse_diffusion', 'euler_maruyama', 'none')

# Weights of the steps of a sampler by name, in the order of the steps: see `entries` and `run`.
Table = dict[str, Any]
STATED = ('t', 'alpha_t', 'sigma_t')  # columns of a table that holds the levels, see `with_levels`


def by_table(make: Callable[..., Table]) -> Callable:
    """The sampler (denoise, x, schedule, keys, trajectory=False, **options) that takes the steps of the table
    `make(schedule, **options)`; its attribute `table` is `make`."""

    @functools.wraps(make)
    def draw(denoise: Callable, x: Array, schedule: Schedule, keys: Array, *, trajectory: bool = False, **options):
        return run(denoise, x, make(schedule, **options), keys, trajectory)

    draw.table = make
    return draw


@by_table
def ancestral(
    schedule: Schedule,
    *,
    variance: Annotated[str, OneOf('', *VARIANCES)] = '',
) -> Table:
    """Algorithm 2 of Ho et al. 2020: draws each x_s from p(x_s | x_t). The last step adds no noise.

    Args:
      variance: of p, 'fixed_large' (that of the forward step), 'fixed_small' (the posterior's) or 'learned':
        its logarithm lies between those of the two, where the `fraction` that denoise returns says, from 0,
        small, to 1, large (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15). '', in a config: 'learned' where the
        network puts out a variance, else 'fixed_large' of a chain and 'fixed_small' in continuous time.
    """
    moves = posterior(schedule)
    std, growth = np.zeros((2, len(schedule.t)))
    std[1:] = np.sqrt(moves.forward if variance in ('', 'fixed_large') else moves.variance)[1:]
    if variance == 'learned':
        growth[1:] = 0.5 * np.log(moves.forward[1:] / moves.variance[1:])
    weights = moves.x_t_weight, moves.x_0_weight, std, growth
    return linear(schedule.t, *weights)


@by_table
def ddim(
    schedule: Schedule,
    *,
    eta: Annotated[Fraction, TRACED] = 0.0,
    clipped_noise: bool = True,
    to_first: bool = False,
    by_stride: bool = False,
    first: tuple[float, float] = (1.0, 0.0),
    below: Schedule | None = None,
) -> Table:
    """Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16.

    Args:
      eta: 0: x_0 is a function of x alone; 1: `ancestral` with 'fixed_small'.
      clipped_noise: where estimates of x_0 are clipped, the noise of a step is what x_t then holds beside them
        (guided-diffusion). False: it is the network's own (pipelines of diffusers, whose use_clipped_model_output is
        False).
      to_first: the last step leads to the first level of the chain in place of the data (latent diffusion's code;
        set_alpha_to_one False of diffusers).
      by_stride: of a chain of T steps, a step leads floor(T / N) steps down, wherever the next of the N levels is: as
        diffusers' DDIM, which differs where the levels are spaced otherwise.
      first: alpha and sigma of that level.
      below: levels that the steps lead to, of sigma 0 where beyond the chain; None: the next ones.
    """
    alpha, sigma, alpha_s, sigma_s = noise_levels(schedule, first if to_first else (1.0, 0.0))
    variance = posterior(schedule).variance
    if by_stride and below is not None:
        end = alpha_s[0], sigma_s[0]
        alpha_s, sigma_s = (np.where(below.sigma > 0, own, last) for own, last in zip(below[1:], end, strict=True))
    if to_first or by_stride:
        variance = (sigma_s / sigma) ** 2 * np.maximum(1 - (alpha / alpha_s) ** 2, 0)
    std = np.minimum(eta * np.sqrt(variance), sigma_s)
    # x_s = alpha_s x_0 + direction eps + std noise, with eps = (x_t - alpha x_0) / sigma
    direction = np.sqrt(sigma_s**2 - std**2)
    of_noise = -direction * alpha / sigma
    if clipped_noise:
        return linear(schedule.t, direction / sigma, alpha_s + of_noise, std)
    return linear(schedule.t, direction / sigma, alpha_s, std) | entries({'t': schedule.t, 'raw_weight': of_noise})


def ddim_inversion(
    denoise: Callable, x_0: Array, schedule: Schedule, *, trajectory: bool = False, stated: bool = False
) -> Array:
    """The noise x at the schedule's last level that `ddim` turns into the images x_0 [n, ...], but for an
    error that falls with the number of steps (Song et al. 2021, arXiv 2010.02502, section 4.3).

    The noise of a step is estimated where it starts. From the data to the first level it is that of
    alpha x_0 at the first level: the data have no noise to estimate.

    Args:
      stated: as in `with_levels`.
    """
    alpha, sigma, alpha_s, sigma_s = noise_levels(schedule)
    first = np.arange(len(alpha)) == 0
    ratio = np.divide(sigma, sigma_s, out=np.full_like(sigma, 2.0), where=~first)
    weights = ratio, np.where(first, -alpha, alpha - ratio * alpha_s)

    def make(schedule: Schedule) -> Table:
        t = np.concatenate([schedule.t[:1], schedule.t[:-1]])
        return linear(t[::-1], *(w[::-1] for w in weights), np.zeros(len(t)))

    return run(denoise, jnp.float32(alpha[0]) * x_0, with_levels(make, schedule, stated), None, trajectory)


@by_table
def euler(schedule: Schedule, *, to_first: bool = False, first: tuple[float, float] = (1.0, 0.0)) -> Table:
    """Euler's method for x / alpha as a function of sigma / alpha (Karras et al. 2022, arXiv 2206.00364,
    section 3). For a flow it is Euler's method on the velocity; in each case it is `ddim` without noise.

    Args:
      to_first: the last step leads to the first level of the chain in place of the data.
      first: alpha and sigma of that level.
    """
    return ddim.table(schedule, to_first=to_first, first=first)


@by_table
def euler_ancestral(schedule: Schedule, *, eta: Annotated[Fraction, TRACED] = 1.0) -> Table:
    """Euler's method to a level below the next (sigma_down), then noise up to the next (sigma_up), as in
    the package k-diffusion.

    With sigma_up = eta sigma_s sqrt(1 - sigma_s^2 / sigma_t^2), sigmas in units of alpha, it is `ddim`.
    """
    return ddim.table(schedule, eta=eta)


@by_table
def heun(
    schedule: Schedule,
    *,
    straight: bool = False,
    s_churn: Annotated[NonNegative, TRACED] = 0.0,
    s_min: Annotated[float, TRACED] = 0.0,
    s_max: Annotated[float, TRACED] = 1e9,
    s_noise: Annotated[NonNegative, TRACED] = 1.0,
    level: Callable[[np.ndarray], Schedule] | None = None,
) -> Table:
    """Heun's method, 2N - 1 evaluations for N levels (Karras et al. 2022, arXiv 2206.00364, algorithm 1), and
    with churn the stochastic sampler of algorithm 2. The step to the data is Euler's, and so is one that
    comes from alpha 0 unless `straight`.

    Args:
      straight: the method for x / (alpha + sigma) as a function of sigma / (alpha + sigma), which for a flow
        is that on the velocity. Else for x / alpha as a function of sigma / alpha.
      s_churn: sigma / alpha is raised before each step, by a factor 1 + min(s_churn / N, sqrt(2) - 1).
      s_min, s_max: sigma / alpha between which it is raised.
      s_noise: of the noise that is added, standard deviation.
      level: (sigma / alpha [N]) -> the Schedule of levels there or near, for s_churn > 0.
    """
    alpha, sigma, alpha_s, sigma_s = noise_levels(schedule)
    n = len(alpha)
    positive = np.where(alpha > 0, alpha, 1)
    ratio = sigma / positive
    gamma = min(s_churn / n, np.sqrt(2) - 1) * ((alpha > 0) & (s_min <= ratio) & (ratio <= s_max))
    hat = schedule
    if gamma.any():
        up = level(ratio * (1 + gamma))
        hat = Schedule(*(np.where(gamma, new, own) for new, own in zip(up, schedule, strict=True)))
    scale = np.where(gamma, hat.alpha / positive, 1)
    std = s_noise * np.sqrt(np.maximum(hat.sigma**2 - (scale * sigma) ** 2, 0))

    # Heun's step is Euler's plus weight (x_0 there - x_0 here): eps there, with the x of Euler's step, differs from
    # eps here by what x_0 does.
    unit, unit_s = hat.alpha + straight * hat.sigma, alpha_s + straight * sigma_s
    with np.errstate(divide='ignore'):
        weight = 0.5 * unit_s * (hat.sigma / unit * unit_s / sigma_s - 1)
    weight = np.where((sigma_s > 0) & (unit > 0), weight, 0)

    # Entry 2 i leaves level i by Euler's step. Entry 2 i + 1 has come to level i by it: it corrects this x and raises
    # its level for what follows.
    t = np.empty(2 * n - 1, hat.t.dtype)
    x_t_weight, noise, x_0_weight = np.empty(2 * n - 1), np.zeros(2 * n - 1), np.zeros((2 * n - 1, 2))
    t[::2], t[1::2] = hat.t, schedule.t[:-1]
    x_t_weight[::2], x_t_weight[1::2] = sigma_s / hat.sigma, scale[:-1]
    x_0_weight[::2, 0] = alpha_s - sigma_s * hat.alpha / hat.sigma
    x_0_weight[1::2] = (scale[:-1] * weight[1:])[:, None] * [1, -1]
    noise[1::2] = std[:-1]
    first = {'first': {'x_t_weight': float(scale[-1]), 'std': float(std[-1])}} if std[-1] else {}
    return linear(t, x_t_weight, x_0_weight, noise) | first


@by_table
def euler_maruyama(
    schedule: Schedule,
    *,
    strength: Annotated[NonNegative, TRACED] = 1.0,
    last_step: Annotated[Rate, TRACED] = 0.0,
) -> Table:
    """Euler-Maruyama's method for a reverse SDE with the marginals of the ODE: Euler's step for the velocity
    alpha' x_0 + sigma' eps, a step along the score, and noise. The last step, to the data, is the estimate.

    For a flow and strength 1 it is SiT's sampler with the diffusion coefficient sigma (Ma et al. 2024, arXiv
    2401.08740, section 3.5; `w` of the paper is 2 sigma in its code, and here).

    Args:
      strength: of noise and score; 0: `euler` on the velocity.
      last_step: in continuous time, t of the last level, see `visited`; from it a step like the others, only without
        noise, leads to the data, as in SiT's released sampler (0.04); for a flow it ends at x_0 - strength sigma eps.
        0: levels evenly from the end to the data, the last step the estimate.
    """
    alpha, sigma, alpha_s, sigma_s = noise_levels(schedule)
    fall = sigma - sigma_s
    # x_s = x + (alpha_s - alpha) x_0 - fall eps - strength fall eps + noise, with eps = (x - alpha x_0) / sigma
    back = (1 + strength) * fall / sigma
    x_t_weight, x_0_weight = 1 - back, alpha_s - alpha + back * alpha
    std = np.sqrt(2 * strength * sigma * fall)
    std[0] = 0
    if not last_step:
        x_t_weight[0], x_0_weight[0] = 0, 1
    return linear(schedule.t, x_t_weight, x_0_weight, std)


@by_table
def dpm_solver(
    schedule: Schedule,
    *,
    order: Annotated[int, '[1, 3]'] = 2,
    correction: Annotated[str, OneOf('midpoint', 'heun')] = 'midpoint',
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    to_first: bool = False,
    first: tuple[float, float] = (1.0, 0.0),
    levels: int = 0,
    noise: bool = False,
    sde: bool = False,
) -> Table:
    """Multistep DPM-Solver++, algorithm 2 of Lu et al. 2022 (arXiv 2211.01095), and with `noise` multistep DPM-Solver
    (Lu et al. 2022, arXiv 2206.00927), which interpolates eps in place of x_0. The order rises from 1; the step to
    the data is of first order.

    Args:
      order: 1: `ddim`; 2; 3, of the ODE alone.
      correction: of second order, how the slope of the estimates enters: 'midpoint' (2M) or 'heun'.
      lower_order_final: of fewer than 15 levels the last two steps are of second and of first order.
      euler_at_final: the last step is of first order.
      to_first: the last step leads to the first level of the chain in place of the data.
      first: alpha and sigma of that level.
      levels: number of levels where the schedule is the lower part of more, see `levels.make`.
      noise: estimates of eps.
      sde: the reverse SDE, which adds noise and with order 1 and without `noise` is `ancestral` with 'fixed_small'.
    """
    if order == 3 and sde:
        raise UserError('config.model.sampler.order = 3 is of the ODE; that of an SDE is 1 or 2')
    alpha, sigma, alpha_s, sigma_s = noise_levels(schedule, first if to_first else (1.0, 0.0))
    n = len(alpha)
    h = log_ratio(alpha_s, sigma_s) - log_ratio(alpha, sigma)
    # In eps all is as in x_0, with alpha and sigma changed over and h < 0.
    k = -h if noise else 2 * h if sde else h
    scale = 2 * sigma_s if noise and sde else sigma_s if noise else alpha_s
    few = lower_order_final and max(levels, n) < 15
    p = np.minimum(order, n - np.arange(n))
    p[:1] = np.minimum(p[:1], 1 if few or euler_at_final or not to_first else order)
    p[1:2] = np.minimum(p[1:2], 2 if few else order)
    weights = np.zeros((n, order))
    for i in range(n):
        # Derivatives of the estimate by lambda, times powers of h, from differences.
        here = scale[i] * exponential_moments(k[i]) if scale[i] else np.zeros(3)
        weights[i, 0] = here[0]
        if p[i] == 2:
            slope = h[i] / h[i + 1] * (0.5 * here[0] if correction == 'midpoint' else here[1])
            weights[i, :2] += slope, -slope
        if p[i] == 3:
            # The second derivative has half the weight of the polynomial's, as in the released code.
            nodes = -np.array([0, h[i + 1], h[i + 1] + h[i + 2]]) / h[i]
            weights[i] = np.linalg.solve(np.vander(nodes, increasing=True).T, here)
    growth = np.exp(-h) if sde else 1
    x_t_weight = alpha_s / alpha if noise else sigma_s / sigma * growth
    std = np.zeros(n)
    if sde:
        with np.errstate(invalid='ignore', over='ignore'):
            std = sigma_s * np.sqrt(np.expm1(2 * h) if noise else -np.expm1(-2 * h))
    if noise and not to_first:
        weights[0, 0], std[0] = -sigma[0] / alpha[0], 0  # to the data, the estimate of x_0
    return linear(schedule.t, x_t_weight, weights, std, kept=eps_of(alpha, sigma) if noise else None)


def exponential_moments(k: float) -> np.ndarray:
    """[3], the integrals of k e^(k (u - 1)) u^j / j! for u from 0 to 1, j from 0: weights in an exponential integrator
    of an estimate, its derivative and its second one. Infinite k: 1, with the others 1 and 1/2."""
    if np.isinf(k):
        return np.array([1.0, 1.0, 0.5])
    if abs(k) < 1e-3:
        return k * np.array([1 - k / 2 + k**2 / 6, 1 / 2 - k / 6 + k**2 / 24, 1 / 6 - k / 24 + k**2 / 120])
    all_of_it = -np.expm1(-k)
    slope = 1 - all_of_it / k
    return np.array([all_of_it, slope, 0.5 - slope / k])


dpm_solver_pp = by_table(functools.partial(dpm_solver.table, noise=False))


@by_table
def dpm_solver_singlestep(
    schedule: Schedule,
    *,
    order: Annotated[int, '[1, 3]'] = 2,
    correction: Annotated[str, OneOf('midpoint', 'heun')] = 'midpoint',
    lower_order_final: bool = True,
    to_first: bool = False,
    first: tuple[float, float] = (1.0, 0.0),
    levels: int = 0,
    noise: bool = False,
) -> Table:
    """Singlestep DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095, algorithm 1; of third order appendix C), and with
    `noise` DPM-Solver: groups of `order` levels, each entered by steps of orders 1, 2, ... from the group's first
    level. One evaluation a level. The step to the data is of first order.

    Args:
      order: levels of a group.
      correction: of the highest derivative, 'midpoint' or 'heun'.
      lower_order_final: the last group is smaller, whatever the number of levels; else it is so where they are no whole
        number of groups.
      to_first: the last step leads to the first level of the chain in place of the data.
      first: alpha and sigma of that level.
      levels: number of levels where the schedule is the lower part of more, see `levels.make`.
      noise: estimates of eps.
    """
    alpha, sigma, alpha_s, sigma_s = (v[::-1] for v in noise_levels(schedule, first if to_first else (1.0, 0.0)))
    n = len(alpha)
    lambdas, ends = log_ratio(alpha, sigma), log_ratio(alpha_s, sigma_s)
    orders = singlestep_orders(max(levels, n), order, lower_order_final or not to_first, to_first)[-n:]
    steps = []
    for i in range(n):
        p = min(orders[i], i + 1)
        base = i - p + 1
        h = ends[i] - lambdas[base]
        if sigma_s[i] == 0 and noise:  # to the data, the estimate of x_0
            steps.append(Step(1 / alpha[i], np.array([-sigma[i] / alpha[i]]), False))
            continue
        here = (sigma_s[i] if noise else alpha_s[i]) * exponential_moments(-h if noise else h)
        nodes = (lambdas[base : i + 1] - lambdas[base]) / h
        values = [here[0]]
        if p == 2:
            slope = (0.5 * here[0] if correction == 'midpoint' else here[1]) / nodes[1]
            values = [slope, here[0] - slope]
        elif p == 3 and correction == 'midpoint':
            slope = here[1] / nodes[2]
            values = [slope, 0, here[0] - slope]
        elif p == 3:
            values = np.linalg.solve(np.vander(nodes, increasing=True).T, here * [1, 1, 2])[::-1]
        growth = alpha_s[i] / alpha[base] if noise else sigma_s[i] / sigma[base]
        steps.append(Step(growth, np.array(values, float), p > 1))
    return restarted(schedule.t[::-1], steps, eps_of(alpha, sigma) if noise else None)


def singlestep_orders(n: int, order: int, lower_order_final: bool, to_first: bool) -> list[int]:
    """Orders of n steps, in groups 1, 2, ..., `order`. The last ones are lower where they are to be, or where n is no
    multiple of the order; to the data (not `to_first`) the last step is of first order."""
    groups = [*range(1, order + 1)]
    if not (lower_order_final or n % order):
        return groups * (n // order)
    if to_first and order == 3 and n % 3 == 2:
        return [*groups * (n // 3), 1, 2]
    return [*groups * ((n - 1) // order), *groups[: (n - 1) % order], 1]


@by_table
def unipc(
    schedule: Schedule,
    *,
    order: Annotated[int, '[1, 9]'] = 2,
    b: Annotated[str, OneOf('bh1', 'bh2')] = 'bh2',
    noise: bool = False,
    uncorrected: Annotated[tuple[int, ...], '[0, inf)'] = (),
    to_first: bool = False,
    first: tuple[float, float] = (1.0, 0.0),
    skipped: int = 0,
) -> Table:
    """UniPC-p with x_0 prediction (Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2): a
    step is made by UniP, then made again by UniC with the estimate at its end, which serves the next step too.
    The order rises from 1 in the first steps and falls to 1 in the last.

    Args:
      order: p, from 1.
      b: B(h), 'bh2' e^h - 1 or 'bh1' h.
      noise: estimates of eps in place of x_0.
      uncorrected: steps, from 0, that UniC does not make again.
      to_first: the last step leads to the first level of the chain in place of the data.
      first: alpha and sigma of that level.
      skipped: number of levels above the schedule's that are left out, see `levels.make`.
    """
    alpha, sigma, alpha_s, sigma_s = noise_levels(schedule, first if to_first else (1.0, 0.0))
    n = len(alpha)
    half_log_snr = log_ratio(alpha, sigma)
    h = log_ratio(alpha_s, sigma_s) - half_log_snr
    usable = n - (alpha[-1] == 0)  # there lambda is infinite, and the estimate no point of a polynomial
    p = [min(order, max(usable - i, 1), i + 1) for i in range(n)]
    nodes = [(half_log_snr[i + 1 : i + p[i]] - half_log_snr[i]) / h[i] for i in range(n)]
    # In eps all is as in x_0, with alpha and sigma changed over and h < 0.
    signed, scale, scale_s = (-h, sigma, sigma_s) if noise else (h, alpha, alpha_s)
    x_t_weight = alpha_s / alpha if noise else sigma_s / sigma
    uni_p = [bh_weights(signed[i], nodes[i], scale_s[i], b) for i in range(n)]
    if noise and not to_first:
        uni_p[0] = np.array([-sigma[0] / alpha[0]])  # to the data, the estimate of x_0
    x_0_weight = np.zeros((n, order + 1))
    for i in range(n):
        x_0_weight[i, : p[i]] = uni_p[i]
        if i < n - 1 and n - 2 - i + skipped not in uncorrected:
            # UniC's step to level i starts from the same x as UniP's and differs from it in the estimates' weights:
            # that difference is all that is added here, and no earlier x need be kept.
            *earlier, here = bh_weights(signed[i + 1], np.append(nodes[i + 1], 1), scale[i], b)
            x_0_weight[i, : p[i + 1] + 1] += x_t_weight[i] * np.array([here, *(earlier - uni_p[i + 1])])
    return linear(schedule.t, x_t_weight, x_0_weight, np.zeros(n), kept=eps_of(alpha, sigma) if noise else None)


def bh_weights(h: float, nodes: np.ndarray, alpha_s: float, b: str = 'bh2') -> np.ndarray:
    """Weights of the estimates at the start of a step and at `nodes` in x_s (Zhao et al. 2023, theorem 3.1).

    Args:
      h: difference of log(alpha / sigma), may be infinite where there is no node but 1.
      nodes: positions of the other estimates, in units of h from the start: 1 is the end, earlier ones are below 0.
      alpha_s: at the end.
      b: B(h) of one node; of several it cancels.

    Returns:
      [1 + len(nodes)].
    """
    scale = np.expm1(-h)
    rho = np.full(len(nodes), 0.5 if b == 'bh2' else -0.5 * h / scale)  # the paper's choice for one node
    if len(nodes) > 1:
        phi, moments = scale / -h, []  # phi_1(-h)
        for k in range(1, len(nodes) + 1):
            phi = (phi - 1 / math.factorial(k)) / -h  # phi_{k+1}
            moments.append(-h * phi * math.factorial(k) / scale)
        rho = np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
    weights = -alpha_s * scale * rho / nodes
    return np.array([-alpha_s * scale - weights.sum(), *weights])


@by_table
def lms(schedule: Schedule, *, order: Annotated[int, '[1, 9]'] = 4) -> Table:
    """The linear multistep method of Adams and Bashforth for x / alpha as a function of sigma / alpha, whose derivative
    is eps, with the steps as they are; its order rises from 1 (package k-diffusion).

    Args:
      order: estimates of eps that a step is made of.
    """
    alpha, sigma, alpha_s, sigma_s = noise_levels(schedule)
    ratio, n = sigma / alpha, len(alpha)
    step = sigma_s / alpha_s - ratio
    weights = np.zeros((n, order))
    for i in range(n):
        p = min(order, n - i)
        nodes = (ratio[i : i + p] - ratio[i]) / step[i]
        moments = 1 / np.arange(1, p + 1)
        weights[i, :p] = alpha_s[i] * step[i] * np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
    return linear(schedule.t, alpha_s / alpha, weights, np.zeros(n), kept=eps_of(alpha, sigma))


@by_table
def deis(
    schedule: Schedule,
    *,
    order: Annotated[int, '[1, 3]'] = 2,
    lower_order_final: bool = True,
    to_first: bool = False,
    first: tuple[float, float] = (1.0, 0.0),
    levels: int = 0,
) -> Table:
    """DEIS in log(rho), rho = sigma / alpha (Zhang & Chen 2023, arXiv 2204.13902, section 3.3): the polynomial in
    log(rho) through the newest estimates of eps is integrated by rho. The order rises from 1; the step to the data is
    of first order.

    Args:
      order: estimates of eps that a step is made of.
      lower_order_final: of fewer than 15 levels the last two steps are of second and of first order.
      to_first: the last step leads to the first level of the chain in place of the data.
      first: alpha and sigma of that level.
      levels: number of levels where the schedule is the lower part of more, see `levels.make`.
    """
    alpha, sigma, alpha_s, sigma_s = noise_levels(schedule, first if to_first else (1.0, 0.0))
    n, rho, rho_s = len(alpha), sigma / alpha, sigma_s / alpha_s
    few = lower_order_final and max(levels, n) < 15
    weights = np.zeros((n, order))
    for i in range(n):
        last = 1 if few or not to_first else order
        p = min(order, n - i, {0: last, 1: 2 if few else order}.get(i, order))
        span = np.log(rho_s[i] / rho[i]) if p > 1 else 0.0
        moments = [rho_s[i] - rho[i]]  # integrals of log(r / rho)^k from rho to rho_s
        for k in range(1, p):
            moments.append(rho_s[i] * span**k - k * moments[-1])
        nodes = np.log(rho[i : i + p] / rho[i])
        weights[i, :p] = alpha_s[i] * np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
    return linear(schedule.t, alpha_s / alpha, weights, np.zeros(n), kept=eps_of(alpha, sigma))


@by_table
def pndm(
    schedule: Schedule,
    *,
    runge_kutta: bool = False,
    combined: Annotated[str, OneOf('eps', 'v')] = 'eps',
    to_first: bool = True,
    first: tuple[float, float] = (1.0, 0.0),
    stride: int = 1,
    at: Callable[[np.ndarray], Schedule] | None = None,
    skipped: int = 0,
) -> Table:
    """Pseudo numerical methods (Liu et al. 2022, arXiv 2202.09778): DDIM's step along a sum of the newest outputs
    of the network, those of the linear multistep method of order 4. Without `runge_kutta` the order rises from 1 and
    the first step is made twice, N + 1 evaluations of N levels (PLMS of latent diffusion); with it the first three
    steps are of the pseudo Runge-Kutta method, of four evaluations each (algorithm 2), from 4 levels.

    Of a chain of T steps, a step leads floor(T / N) steps down, as in diffusers.

    Args:
      runge_kutta: see above.
      combined: the outputs that are summed, 'eps' or the velocity 'v', which is what networks of v-prediction put out.
      to_first: the last step leads to the first level of the chain in place of the data.
      first: alpha and sigma of that level.
      stride: floor(T / N).
      at: steps of the chain to their levels.
      skipped: number of evaluations that are left out at the start, see `levels.make`.
    """
    if runge_kutta and len(schedule.t) < 4:
        raise UserError(
            'config.model.sampler.runge_kutta takes its first three steps so: config.model.sampler.steps >= 4'
        )
    t = schedule.t[::-1]
    ends = (1.0, 0.0) if not to_first else first
    moves = pndm_moves(t, stride, runge_kutta, skipped)

    def level(i: int) -> tuple[float, float]:
        level = at(np.array([max(i, 0)]))
        return (level.alpha[0], level.sigma[0]) if i >= 0 else ends

    steps = []
    for move in moves:
        (alpha, sigma), (alpha_s, sigma_s) = level(move.start), level(move.end)
        of_x, of_eps = alpha_s / alpha, sigma_s - alpha_s * sigma / alpha
        if combined == 'v':  # eps = alpha v + sigma x
            of_x, of_eps = of_x + of_eps * sigma, of_eps * alpha
        steps.append(Step(of_x, of_eps * np.array(move.weights), move.restart))
    times = np.array([move.t for move in moves])
    _, alpha, sigma = at(times)
    return restarted(times, steps, eps_of(alpha, sigma) if combined == 'eps' else v_of(alpha, sigma))


class Move(NamedTuple):
    """A step of `pndm`, in steps of the chain."""

    t: int  # at which the network is evaluated
    start: int
    end: int
    weights: tuple[float, ...]  # of the outputs, the newest first
    restart: bool  # from where the move before began


def pndm_moves(t: np.ndarray, stride: int, runge_kutta: bool, skipped: int = 0) -> list[Move]:
    """The steps of `pndm` over levels t, decreasing.

    Args:
      skipped: evaluations that are left out at the start. The method begins anew at the next one, as in diffusers.
    """
    times = [int(one) for one in t]
    moves = []
    slopes: list[int] = []  # evaluations whose outputs the multistep method is made of
    if runge_kutta:
        half = stride // 2
        for first in times[:3]:
            slopes.append(len(moves))
            weights = ((1,), (1,), (1,), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
            visits = (first, first - half, first - half, first - stride)
            ends = (first - half, first - half, first - stride, first - stride)
            rows = zip(visits, ends, weights, range(4), strict=True)
            moves += [Move(one, first, end, weight, bool(i)) for one, end, weight, i in rows]
        times = times[3:]
    else:
        times = [*times[:2], *times[1:2], *times[2:]][skipped:]
    for i, one in enumerate(times):
        if not runge_kutta and i == 1:  # the first step again
            moves.append(Move(one, one + stride, one, (0.5, 0.5), True))
            continue
        slopes = [*slopes[-3:], len(moves)]
        sums = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
        weights = np.zeros(len(moves) - slopes[0] + 1)
        weights[[len(moves) - slope for slope in slopes[::-1]]] = sums[len(slopes)]
        moves.append(Move(one, one, one - stride, tuple(weights), False))
    return moves


class Step(NamedTuple):
    """x = x_t_weight base + sum of weights and what is kept of the newest evaluations, the newest first."""

    x_t_weight: float
    weights: np.ndarray
    restart: bool  # base: the x that the step before started from; else the newest x


def restarted(t: np.ndarray, steps: list[Step], kept: np.ndarray | None) -> Table:
    """The table of steps some of which start again where the one before did: that x is a sum of the newest x and what
    is kept, and need not be kept itself.

    Args:
      t: [M], times of the evaluations, in the order of the steps.
      kept: [M, 2], see `linear`, in the same order.
    """
    width = max(len(step.weights) + 1 for step in steps)
    x_t_weight, weights = np.zeros(len(steps)), np.zeros((len(steps), width))
    base, since = 1.0, np.zeros(width)  # the newest x = base (x of the start) + since (what is kept)
    for i, step in enumerate(steps):
        own = np.pad(np.asarray(step.weights, np.float64), (0, width - len(step.weights)))
        before = np.append(0, since[:-1]) if step.restart else np.zeros(width)
        x_t_weight[i] = step.x_t_weight / (base if step.restart else 1)
        weights[i] = own - x_t_weight[i] * before
        base, since = step.x_t_weight, own
    used = max(int(np.flatnonzero(np.any(weights != 0, 0)).max(initial=0)) + 1, 1)
    kept = kept if kept is None else kept[::-1]
    return linear(t[::-1], x_t_weight[::-1], weights[::-1, :used], np.zeros(len(steps)), kept=kept)


def eps_of(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """[N, 2], weights of x and x_0 in eps."""
    return np.stack([1 / sigma, -alpha / sigma], -1)


def v_of(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """[N, 2], weights of x and x_0 in the velocity v = alpha eps - sigma x_0, where alpha^2 + sigma^2 = 1."""
    return np.stack([alpha / sigma, -1 / sigma], -1)


@by_table
def predictor_corrector(
    schedule: Schedule,
    *,
    predictor: Annotated[str, Choice(PREDICTORS)] = 'reverse_diffusion',
    corrector_steps: Annotated[int, '[0, inf)'] = 1,
    snr: Annotated[Positive, TRACED] = 0.16,
) -> Table:
    """Langevin steps at each level, then a step of the reverse SDE to the next (Song et al. 2021, arXiv 2011.13456,
    algorithms 2 to 5); corrector_steps + 1 evaluations a level. The step to the data removes the noise.

    The paper's step size has the norms of noise and score averaged over the batch. Here it is a sample's own: the
    norm of its score, and the square root of the number of dimensions for the noise (their advice for small batches).

    Args:
      predictor: 'reverse_diffusion' (appendix E: with the drift and variance of the forward step), 'euler_maruyama'
        (those of the SDE, frozen at the upper level) or 'none'. Both are for small steps and alpha > 0.
      corrector_steps: Langevin steps at each level, from 0.
      snr: r, step size of these.
    """
    alpha, sigma, alpha_s, sigma_s = noise_levels(schedule)
    moves = posterior(schedule)
    n = len(alpha)
    if predictor == 'none':
        drift, diffusion = np.zeros(n), np.zeros(n)  # of x, the factor; of the SDE, g^2 dt
    elif predictor == 'reverse_diffusion':
        drift, diffusion = 1 - alpha / alpha_s, moves.forward
    else:
        drift = np.log(alpha_s / alpha)
        diffusion = 2 * sigma**2 * (log_ratio(alpha_s, sigma_s) - log_ratio(alpha, sigma))
        diffusion[0] = 0  # infinite, and not used
    # x_s = (1 + drift) x + diffusion score + sqrt(diffusion) noise, with score = (alpha x_0 - x) / sigma^2
    table = {
        't': schedule.t,
        'x_t_weight': np.append(0, (1 + drift - diffusion / sigma**2)[1:]),
        'x_0_weight': np.append(1, (diffusion * alpha / sigma**2)[1:]),
        'std': np.append(0, np.sqrt(diffusion)[1:]),
    }
    if corrector_steps == 0:
        return linear(**table)
    # Of the corrections, size = 2 (snr alpha / alpha_s)^2 over the mean square of the score.
    table |= {'alpha': alpha, 'precision': 1 / sigma**2, 'size': 2 * (snr * alpha / alpha_s) ** 2}
    table = {name: np.repeat(values, corrector_steps + 1) for name, values in table.items()}
    correct = np.arange(len(table['t'])) % (corrector_steps + 1) > 0
    return entries({**table, 'x_0_weight': table['x_0_weight'][:, None], 'correct': correct})


@by_table
def annealed_langevin(
    schedule: Schedule,
    *,
    langevin_steps: Annotated[int, '[1, inf)'] = 100,
    langevin_size: Annotated[float, '[0, inf)', TRACED] = 8e-5,
    final_denoising: bool = True,
) -> Table:
    """Annealed Langevin dynamics, algorithm 1 of Song & Ermon 2019 (arXiv 1907.05600), of x / alpha.

    Args:
      langevin_steps: T, Langevin steps at each level.
      langevin_size: epsilon, the step at the first level; a level's is larger with the square of its sigma / alpha.
      final_denoising: one evaluation more at the first level, which leads to the data (Song & Ermon 2020, arXiv
        2006.09011). The algorithm of 2019 ends before it, with x at the first level.
    """
    alpha, sigma = schedule.alpha, schedule.sigma
    rate = 0.5 * langevin_size * (alpha[0] / sigma[0]) ** 2  # half the step over sigma^2 is the same at every level
    at = np.repeat(np.arange(len(alpha)), langevin_steps)
    to = np.append(0, at[:-1])
    move = alpha[to] / alpha[at]
    columns = schedule.t[at], (1 - rate) * move, rate * alpha[to], np.sqrt(2 * rate) * sigma[at] * move
    if final_denoising:
        columns = (np.append(*pair) for pair in zip((schedule.t[0], 0, 1, 0), columns, strict=True))
    t, *weights = columns
    return linear(t, *weights)


@by_table
def consistency(schedule: Schedule, *, sigma_min: float = 0.0) -> Table:
    """Multistep consistency sampling, algorithm 1 of Song et al. 2023 (arXiv 2303.01469): the estimate, noise up to
    the next level, the estimate there; with one level it is the estimate.

    Args:
      sigma_min: epsilon of the paper, the noise that the estimates are taken to have, in units of alpha.
    """
    _, _, alpha_s, sigma_s = noise_levels(schedule)
    std = np.sqrt(np.maximum(sigma_s**2 - (alpha_s * sigma_min) ** 2, 0))
    return linear(schedule.t, np.zeros(len(std)), alpha_s, std)


@by_table
def lcm(schedule: Schedule, *, time_scale: Positive = 10.0) -> Table:
    """Multistep sampling of latent consistency models (Luo et al. 2023, arXiv 2310.04378, algorithm 3): the consistency
    function c_skip x + c_out x_0, then noise up to the next level.

    Args:
      time_scale: of the steps of the chain in c_skip and c_out, with which they are near 0 and 1 everywhere but at the
        data.
    """
    _, _, alpha_s, sigma_s = noise_levels(schedule)
    t = time_scale * schedule.t
    skip, out = 0.25 / (t**2 + 0.25), t / np.sqrt(t**2 + 0.25)
    return linear(schedule.t, alpha_s * skip, alpha_s * out, sigma_s)


# {name: function from a Schedule and options to a Table}
SAMPLERS = {
    'ancestral': ancestral.table,
    'ddim': ddim.table,
    'euler': euler.table,
    'euler_ancestral': euler_ancestral.table,
    'heun': heun.table,
    'lms': lms.table,
    'pndm': pndm.table,
    'dpm_solver': functools.partial(dpm_solver.table, noise=True, sde=False),
    'dpm_solver_sde': functools.partial(dpm_solver.table, noise=True, sde=True),
    'dpm_solver_pp': functools.partial(dpm_solver.table, noise=False, sde=False),
    'dpm_solver_pp_sde': functools.partial(dpm_solver.table, noise=False, sde=True),
    'dpm_solver_single': functools.partial(dpm_solver_singlestep.table, noise=True),
    'dpm_solver_pp_single': functools.partial(dpm_solver_singlestep.table, noise=False),
    'unipc': unipc.table,
    'deis': deis.table,
    'euler_maruyama': euler_maruyama.table,
    'predictor_corrector': predictor_corrector.table,
    'annealed_langevin': annealed_langevin.table,
    'consistency': consistency.table,
    'lcm': lcm.table,
}


def with_levels(make: Callable[[Schedule], Table], schedule: Schedule, stated: bool) -> Table:
    """The table `make(schedule)`, which visits no other levels.

    Args:
      stated: it holds alpha and sigma of the levels beside the times, and the denoiser gets all three, in a `Schedule`,
        as its t. Else the process gives them by t.
    """
    if not stated:
        return make(schedule)
    table = make(schedule._replace(t=np.arange(len(schedule.t))))
    i = table['t']
    return table | {name: values[i].astype(np.float32) for name, values in zip(STATED, schedule, strict=True)}


def noise_levels(
    schedule: Schedule, last: tuple[float, float] = (1.0, 0.0)
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """alpha and sigma of each level, and those of the level below it, [N] each. Below the first lies the data, or the
    level of alpha and sigma `last`."""
    alpha, sigma = schedule.alpha, schedule.sigma
    return alpha, sigma, np.concatenate([last[:1], alpha[:-1]]), np.concatenate([last[1:], sigma[:-1]])


def log_ratio(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio; infinite at the data."""
    with np.errstate(divide='ignore'):
        return np.log(alpha) - np.log(sigma)


def linear(
    t: np.ndarray,
    x_t_weight: np.ndarray,
    x_0_weight: np.ndarray,
    std: np.ndarray,
    growth: np.ndarray | None = None,
    kept: np.ndarray | None = None,
) -> Table:
    """Steps x = x_t_weight x + sum of x_0_weight and the newest estimates + std noise, from the last entry down.

    Args:
      t: [M], times at which denoise is evaluated.
      x_t_weight, std: [M].
      x_0_weight: [M], or [M, p] for p estimates, the newest first.
      growth: [M], of std, which is multiplied by e^(growth fraction), fraction as denoise returns it.
      kept: [M, 2], weights of x and x_0 in what takes the place of an estimate of x_0 in the sum, as `eps_of`; None:
        the estimate itself.
    """
    table = {'t': t, 'x_t_weight': x_t_weight, 'x_0_weight': x_0_weight.reshape(len(t), -1)}
    table |= {} if kept is None else {'kept': kept}
    table |= {'std': std} if std.any() else {}
    return entries(table | ({'growth': growth} if growth is not None and growth.any() else {}))


def entries(columns: dict[str, np.ndarray]) -> Table:
    """The table of columns [M, ...], float64 from the level next to the data up: float32, in the order of steps."""
    columns = {'number': np.arange(len(columns['t'])), **columns}
    kinds = {'f': np.float32, 'i': np.int32, 'b': bool}
    return {name: np.ascontiguousarray(v[::-1], kinds[v.dtype.kind]) for name, v in columns.items()}


def run(
    denoise: Callable,
    x: Array,
    table: Table,
    keys: Array | None,
    trajectory: bool = False,
    keep: Callable | None = None,
    then: Table | None = None,
):
    """x_0 [n, ...], or with `trajectory` (x_0, what was passed through): the steps of a table from x.

    Where the table has STATED levels, the denoiser gets them as its t, in a Schedule. Where it has 'correct', these
    entries are Langevin steps along the score in place of the sum. Where it has 'raw_weight', estimates are clipped to
    [-1, 1] here, and that is the weight of those that are not.

    Args:
      keep: (x, level, last) -> x, what x of each step is replaced by: the level is that of the next evaluation, and at
        the last step of none, but x is data.
      then: the table that goes on from x, which is not data then.
    """
    columns = {name: jnp.asarray(values) for name, values in table.items() if name != 'first'}
    if keep is not None:
        columns['last'] = (jnp.arange(len(columns['t'])) == len(columns['t']) - 1) & (then is None)
        after = {name: jnp.asarray((then or columns)[name])[:1] for name in STATED if name in columns}
        columns |= {f'next_{name}': jnp.concatenate([columns[name][1:], one]) for name, one in after.items()}
    if 'first' in table:  # x at a higher level than it is given at
        noise = noise_of(keys, len(columns['t']), x)
        x = table['first']['x_t_weight'] * x + table['first']['std'] * noise

    def step(carry, at):
        x, *earlier = carry
        level = Schedule(*(at[name] for name in STATED)) if 'alpha_t' in at else at['t']
        raw, fraction = estimate(denoise, x, level)
        x_0 = jnp.clip(raw, -1, 1) if 'raw_weight' in at else raw
        newest = at['kept'][0] * x + at['kept'][1] * x_0 if 'kept' in at else x_0
        estimates = (newest, *earlier)
        moved = at['x_t_weight'] * x + sum(at['x_0_weight'][k] * value for k, value in enumerate(estimates))
        if 'raw_weight' in at:
            moved = moved + at['raw_weight'] * raw
        if 'std' in at:
            noise = noise_of(keys, at['number'], x)
            moved = moved + at['std'] * noise * (jnp.exp(at['growth'] * fraction) if 'growth' in at else 1)
        if 'correct' in at:
            score = at['precision'] * (at['alpha'] * x_0 - x)
            size = at['size'] / jnp.square(score).mean(tuple(range(1, x.ndim)), keepdims=True)
            moved = jnp.where(at['correct'], x + size * score + jnp.sqrt(2 * size) * noise, moved)
        if keep is not None:
            after = [at[f'next_{name}'] for name in STATED if name in at]
            moved = keep(moved, Schedule(*after) if len(after) > 1 else after[0], at['last'])
        return (moved, *estimates[:-1]), {'x': moved, 'x_0': x_0} if trajectory else None

    start = (x, *[jnp.zeros_like(x)] * (columns['x_0_weight'].shape[1] - 1))
    (x, *_), passed = jax.lax.scan(step, start, columns)
    return (x, passed) if trajectory else x


def run_both(
    denoise: tuple[Callable, Callable],
    x: Array,
    tables: tuple[Table, Table],
    keys: tuple[Array, Array],
    trajectory: bool = False,
    keep: Callable | None = None,
):
    """As `run`, with one denoiser after the other; the first table is one of `ended`."""
    middle = run(denoise[0], x, tables[0], keys[0], trajectory, keep, then=tables[1])
    if not trajectory:
        return run(denoise[1], middle, tables[1], keys[1], False, keep)
    x_0, passed = run(denoise[1], middle[0], tables[1], keys[1], True, keep)
    return x_0, jax.tree.map(lambda *parts: jnp.concatenate(parts), middle[1], passed)


def estimate(denoise: Callable, x: Array, t: Array) -> tuple[Array, Array | None]:
    """(x_0, fraction) of a denoise that returns either x_0 or both."""
    output = denoise(x, t)
    return output if isinstance(output, tuple) else (output, None)


def noise_of(keys: Array, number: Array | int, x: Array) -> Array:
    """Standard normal noise like x, a draw of its own for each sample and each number."""
    return normal(jax.vmap(jax.random.fold_in, (0, None))(keys, number), x.shape[1:])
