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

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.diffusion import schedules
from jaxgen.diffusion.processes import Process, ends_at_noise
from jaxgen.diffusion.schedules import Schedule, posterior
from jaxgen.errors import UserError
from jaxgen.options import TRACED, Choice, Component, Fraction, NonNegative, OneOf, Positive, Rate, own_fields
from jaxgen.randomness import normal

Array = jax.Array

VARIANCES = ('fixed_large', 'fixed_small', 'learned')
PREDICTORS = ('reverse_diffusion', 'euler_maruyama', 'none')

# Weights of the steps of a sampler by name, in the order of the steps: see `entries` and `run`.
Table = dict[str, Any]


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
    first: tuple[float, float] = (1.0, 0.0),
) -> Table:
    """Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16.

    Args:
      eta: 0: x_0 is a function of x alone; 1: `ancestral` with 'fixed_small'.
      clipped_noise: where estimates of x_0 are clipped, the noise of a step is what x_t then holds beside them
        (guided-diffusion). False: it is the network's own (pipelines of diffusers, whose use_clipped_model_output is
        False).
      to_first: the last step leads to the first level of the chain in place of the data (latent diffusion's code;
        set_alpha_to_one False of diffusers).
      first: alpha and sigma of that level.
    """
    alpha, sigma, alpha_s, sigma_s = noise_levels(schedule)
    variance = posterior(schedule).variance
    if to_first:
        alpha_s[0], sigma_s[0] = first
        variance[0] = (sigma_s[0] / sigma[0]) ** 2 * max(1 - (alpha[0] / alpha_s[0]) ** 2, 0)
    std = np.minimum(eta * np.sqrt(variance), sigma_s)
    # x_s = alpha_s x_0 + direction eps + std noise, with eps = (x_t - alpha x_0) / sigma
    direction = np.sqrt(sigma_s**2 - std**2)
    of_noise = -direction * alpha / sigma
    if clipped_noise:
        return linear(schedule.t, direction / sigma, alpha_s + of_noise, std)
    return linear(schedule.t, direction / sigma, alpha_s, std) | entries({'t': schedule.t, 'raw_weight': of_noise})


def ddim_inversion(denoise: Callable, x_0: Array, schedule: Schedule, *, trajectory: bool = False) -> Array:
    """The noise x at the schedule's last level that `ddim` turns into the images x_0 [n, ...], but for an
    error that falls with the number of steps (Song et al. 2021, arXiv 2010.02502, section 4.3).

    The noise of a step is estimated where it starts. From the data to the first level it is that of
    alpha x_0 at the first level: the data have no noise to estimate.
    """
    alpha, sigma, alpha_s, sigma_s = noise_levels(schedule)
    first = np.arange(len(alpha)) == 0
    ratio = np.divide(sigma, sigma_s, out=np.full_like(sigma, 2.0), where=~first)
    weights = ratio, np.where(first, -alpha, alpha - ratio * alpha_s)
    t = np.concatenate([schedule.t[:1], schedule.t[:-1]])
    x = jnp.float32(alpha[0]) * x_0
    table = linear(t[::-1], *(w[::-1] for w in weights), np.zeros(len(t)))
    return run(denoise, x, table, None, trajectory)


@by_table
def euler(schedule: Schedule) -> Table:
    """Euler's method for x / alpha as a function of sigma / alpha (Karras et al. 2022, arXiv 2206.00364,
    section 3). For a flow it is Euler's method on the velocity; in each case it is `ddim` without noise."""
    return ddim.table(schedule)


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
def dpm_solver_pp(
    schedule: Schedule,
    *,
    order: Annotated[int, '[1, 2]'] = 2,
    sde: bool = False,
) -> Table:
    """DPM-Solver++ (2M), algorithm 2 of Lu et al. 2022 (arXiv 2211.01095), of first order in its first and last step.

    Args:
      order: 1: `ddim`; 2.
      sde: SDE-DPM-Solver++ (2M), which adds noise and with order 1 is `ancestral` with 'fixed_small'.
    """
    alpha, sigma, alpha_s, sigma_s = noise_levels(schedule)
    h = log_ratio(alpha_s, sigma_s) - log_ratio(alpha, sigma)
    k = 2 * h if sde else h
    # An estimate that moves on as it did in the step before has moved so much by the middle of this one.
    beyond = np.zeros(len(h))
    if order == 2:
        beyond[1:-1] = 0.5 * h[1:-1] / h[2:]
    x_t_weight = sigma_s / sigma * (np.exp(-h) if sde else 1)
    x_0_weight = -alpha_s * np.expm1(-k)
    std = sigma_s * np.sqrt(-np.expm1(-2 * h)) if sde else np.zeros(len(h))
    both = np.stack([x_0_weight * (1 + beyond), -x_0_weight * beyond], -1)
    return linear(schedule.t, x_t_weight, both, std)


@by_table
def unipc(
    schedule: Schedule,
    *,
    order: Annotated[int, '[1, 9]'] = 2,
) -> Table:
    """UniPC-p with B(h) = e^h - 1 and x_0 prediction (Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2): a
    step is made by UniP, then made again by UniC with the estimate at its end, which serves the next step too.
    The order rises from 1 in the first steps and falls to 1 in the last.

    Args:
      order: p, from 1.
    """
    alpha, sigma, alpha_s, sigma_s = noise_levels(schedule)
    n = len(alpha)
    half_log_snr = log_ratio(alpha, sigma)
    h = log_ratio(alpha_s, sigma_s) - half_log_snr
    usable = n - (alpha[-1] == 0)  # there lambda is infinite, and the estimate no point of a polynomial
    p = [min(order, max(usable - i, 1), i + 1) for i in range(n)]
    nodes = [(half_log_snr[i + 1 : i + p[i]] - half_log_snr[i]) / h[i] for i in range(n)]
    uni_p = [bh2_weights(h[i], nodes[i], alpha_s[i]) for i in range(n)]
    x_0_weight = np.zeros((n, order + 1))
    for i in range(n):
        x_0_weight[i, : p[i]] = uni_p[i]
        if i < n - 1:
            # UniC's step to level i starts from the same x as UniP's and differs from it in the estimates' weights:
            # that difference is all that is added here, and no earlier x need be kept.
            *earlier, here = bh2_weights(h[i + 1], np.append(nodes[i + 1], 1), alpha[i])
            x_0_weight[i, : p[i + 1] + 1] += sigma_s[i] / sigma[i] * np.array([here, *(earlier - uni_p[i + 1])])
    return linear(schedule.t, sigma_s / sigma, x_0_weight, np.zeros(n))


def bh2_weights(h: float, nodes: np.ndarray, alpha_s: float) -> np.ndarray:
    """Weights of the estimates at the start of a step and at `nodes` in x_s (Zhao et al. 2023, theorem 3.1).

    Args:
      h: difference of log(alpha / sigma), may be infinite where there is no node but 1.
      nodes: positions of the other estimates, in units of h from the start: 1 is the end, earlier ones are below 0.
      alpha_s: at the end.

    Returns:
      [1 + len(nodes)].
    """
    scale = np.expm1(-h)
    rho = np.full(len(nodes), 0.5)  # the paper's choice for one node
    if len(nodes) > 1:
        phi, moments = scale / -h, []  # phi_1(-h)
        for k in range(1, len(nodes) + 1):
            phi = (phi - 1 / math.factorial(k)) / -h  # phi_{k+1}
            moments.append(-h * phi * math.factorial(k) / scale)
        rho = np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
    weights = -alpha_s * scale * rho / nodes
    return np.array([-alpha_s * scale - weights.sum(), *weights])


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


# {name: function from a Schedule and options to a Table}
SAMPLERS = {
    'ancestral': ancestral.table,
    'ddim': ddim.table,
    'euler': euler.table,
    'euler_ancestral': euler_ancestral.table,
    'heun': heun.table,
    'dpm_solver_pp': functools.partial(dpm_solver_pp.table, sde=False),
    'dpm_solver_pp_sde': functools.partial(dpm_solver_pp.table, sde=True),
    'unipc': unipc.table,
    'euler_maruyama': euler_maruyama.table,
    'predictor_corrector': predictor_corrector.table,
    'annealed_langevin': annealed_langevin.table,
    'consistency': consistency.table,
}
CONTINUOUS_SPACINGS = ('uniform', 'karras')


@dataclasses.dataclass(frozen=True)
class Visits:
    """The noise levels that a sampler visits, and what is done to the estimate at each of them.

    Attributes:
      steps: number of noise levels; 0: all T of a chain, 100 in continuous time.
      spacing: which noise levels. Of a chain 'uniform' | 'leading' (by whole strides) | 'trailing' (from the last one
        down) | 'respaced' (both ends) | 'quadratic'; in continuous time 'uniform'; of both 'karras', by sigma / alpha
        to the power 1/7 (EDM, eq. 5).
      offset: of a chain, steps by which the levels of a spacing are moved up: 1 in latent diffusion's code
        (steps_offset of diffusers).
      shift: of process 'flow': t becomes shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23).
      clip: estimates of x_0 to [-1, 1] at every step.
      unit_start: of a process with alpha^2 + sigma^2 = 1, the noise that sampling starts from has standard deviation 1
        in place of the last level's sigma, which is a little less (guided-diffusion, latent diffusion, diffusers).
    """

    steps: Annotated[int, '[0, inf)'] = 0
    spacing: Annotated[str, OneOf(*schedules.SPACINGS, 'karras'), TRACED] = 'uniform'
    offset: Annotated[int, '[0, inf)', TRACED] = 0
    shift: Annotated[Positive, TRACED] = 1.0
    clip: bool = True
    unit_start: Annotated[bool, TRACED] = False


# Arguments of samplers that follow from the process.
DERIVED = ('straight', 'level', 'sigma_min', 'first')
COMPONENT = Component(SAMPLERS, Visits, DERIVED)


class Sampler(NamedTuple):
    """A sampler bound to its options and to the noise levels that it visits."""

    table: Table
    schedule: Schedule
    clip: bool
    start: float  # standard deviation of the noise that it starts from
    variance: str  # of an ancestral one, else ''
    ddim: bool  # whether it is DDIM without noise

    @property
    def clip_here(self) -> bool:
        """Whether the steps of `run` clip, and the denoiser is not to."""
        return 'raw_weight' in self.table


def make(section: dict, process: Process, learned: bool = False) -> Sampler:
    """The sampler of a complete section {'name': ..., its fields, those of `Visits`}.

    Args:
      learned: the network puts out a variance.

    Raises:
      UserError: fields that do not go with each other or with the process.
    """
    name = section['name']
    visits = Visits(**{f.name: section[f.name] for f in dataclasses.fields(Visits)})
    own = {k: v for k, v in own_fields(section).items() if not hasattr(visits, k)}
    check(name, own, visits, process, learned)
    schedule = visited(process, visits.steps, visits.spacing, visits.shift, own.get('last_step', 0.0), visits.offset)
    if name == 'ancestral':
        own['variance'] = model_variance(own['variance'], process, learned)
    if name == 'heun':
        own |= {'straight': process.straight, 'level': lambda ratio: process.at(process.time(ratio))}
    if name == 'ddim':
        first = process.at(np.array([process.low]))
        own |= {'first': (first.alpha[0], first.sigma[0])}
        own['clipped_noise'] |= not visits.clip
    start = 1.0 if visits.unit_start else float(schedule.sigma[-1])
    table, still = SAMPLERS[name](schedule, **own), name == 'ddim' and not own['eta']
    return Sampler(table, schedule, visits.clip, start, own.get('variance', ''), still)


def model_variance(variance: str, process: Process, learned: bool) -> str:
    """The variance of p(x_s | x_t) that is meant: '' is the learned one where there is one.

    Raises:
      UserError: 'learned' without a learned variance, or a variance of a chain in continuous time.
    """
    if not variance:
        return 'learned' if learned else 'fixed_large' if process.steps else 'fixed_small'
    if variance == 'learned' and not learned:
        raise UserError("config.model: variance = 'learned' needs config.model.training.variance = 'learned'")
    if variance == 'fixed_large' and not process.steps:
        raise UserError("config.model: variance = 'fixed_large' is that of a chain, and the process is none")
    return variance


def check(name: str, own: dict, visits: Visits, process: Process, learned: bool) -> None:
    """Raises UserError for a sampler that does not go with the process."""
    where = 'config.model.sampler'
    if not process.steps and visits.spacing not in CONTINUOUS_SPACINGS:
        raise UserError(f'{where}.spacing = {visits.spacing!r} is of chains; in continuous time: {CONTINUOUS_SPACINGS}')
    if ends_at_noise(process) and visits.spacing == 'karras':
        raise UserError(f"{where}.spacing = 'karras' is by sigma / alpha, and the last level here has alpha = 0")
    if ends_at_noise(process) and name in ('predictor_corrector', 'annealed_langevin'):
        raise UserError(f'{where}.name = {name!r} divides by alpha, which is 0 at the last level here')
    if visits.shift != 1 and not process.straight:
        raise UserError(f"{where}.shift is of process 'flow'; it is {visits.shift}")
    if process.steps and visits.steps > process.steps:
        raise UserError(f'{where}.steps must be from 0 to timesteps {process.steps}; it is {visits.steps}')
    ends = process.at(np.array([process.low, process.end]))
    if visits.unit_start and not np.allclose(ends.alpha**2 + ends.sigma**2, 1):
        raise UserError(f'{where}.unit_start is of processes with alpha^2 + sigma^2 = 1, and this is none')
    if visits.offset and not process.steps:
        raise UserError(f'{where}.offset is of chains; it is {visits.offset}')
    if own.get('last_step') and (process.steps or own['last_step'] >= process.end):
        raise UserError(f'{where}.last_step is of continuous time, from 0 to below 1; it is {own["last_step"]}')


def visited(
    process: Process, n: int, spacing: str, shift: float = 1.0, last_step: float = 0.0, offset: int = 0
) -> Schedule:
    """The noise levels that a sampler visits, numpy float64, from the one next to the data to the last.

    Args:
      n: how many; 0: all steps of a chain, 100 in continuous time; 1: the last one, which is noise.
      spacing, shift: see `Visits`; 'uniform' in continuous time is evenly in t. The shift moves last_step too.
      last_step: in continuous time, t of the level next to the data where it is above 0; the others are evenly between
        it and the end.
      offset: of a chain, steps by which the levels are moved up.

    Raises:
      UserError: the offset moves a level beyond the last.
    """
    n = n or process.steps or 100
    if n == 1:  # most spacings have the first level then, which is the data but for a little noise
        return process.at(np.array([process.end]))
    if spacing == 'karras':
        ends = process.at(np.array([process.low, process.end], np.float64))
        low, high = (ends.sigma / ends.alpha) ** (1 / 7)
        return process.at(process.time(np.linspace(low, high, n) ** 7))
    if process.steps:
        steps = schedules.SPACINGS[spacing](process.steps, n) + offset
        if steps[-1] >= process.steps:
            raise UserError(
                f'config.model.sampler.offset {offset} moves the last of {n} levels, {steps[-1] - offset}, beyond that '
                f'of the process, {process.steps - 1}'
            )
        return process.at(steps)
    at_data = process.at(np.array([process.low])).sigma[0] == 0 and not last_step
    times = np.linspace(last_step or process.low, process.end, n + at_data)[int(at_data) :]
    if shift != 1:
        # Written so that t = 1 stays 1, whatever is rounded: beyond it alpha would be below 0.
        times = shift * times / (1 - times + shift * times)
    return process.at(times)


def noise_levels(schedule: Schedule) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """alpha and sigma of each level, and those of the level below it, [N] each. Below the first lies the data."""
    alpha, sigma = schedule.alpha, schedule.sigma
    return alpha, sigma, np.concatenate([[1.0], alpha[:-1]]), np.concatenate([[0.0], sigma[:-1]])


def log_ratio(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio; infinite at the data."""
    with np.errstate(divide='ignore'):
        return np.log(alpha) - np.log(sigma)


def linear(
    t: np.ndarray, x_t_weight: np.ndarray, x_0_weight: np.ndarray, std: np.ndarray, growth: np.ndarray | None = None
) -> Table:
    """Steps x = x_t_weight x + sum of x_0_weight and the newest estimates + std noise, from the last entry down.

    Args:
      t: [M], times at which denoise is evaluated.
      x_t_weight, std: [M].
      x_0_weight: [M], or [M, p] for p estimates, the newest first.
      growth: [M], of std, which is multiplied by e^(growth fraction), fraction as denoise returns it.
    """
    table = {'t': t, 'x_t_weight': x_t_weight, 'x_0_weight': x_0_weight.reshape(len(t), -1)}
    table |= {'std': std} if std.any() else {}
    return entries(table | ({'growth': growth} if growth is not None and growth.any() else {}))


def entries(columns: dict[str, np.ndarray]) -> Table:
    """The table of columns [M, ...], float64 from the level next to the data up: float32, in the order of steps."""
    columns = {'number': np.arange(len(columns['t'])), **columns}
    kinds = {'f': np.float32, 'i': np.int32, 'b': bool}
    return {name: np.ascontiguousarray(v[::-1], kinds[v.dtype.kind]) for name, v in columns.items()}


def run(denoise: Callable, x: Array, table: Table, keys: Array | None, trajectory: bool = False):
    """x_0 [n, ...], or with `trajectory` (x_0, what was passed through): the steps of a table from x.

    Where the table has 'correct', these entries are Langevin steps along the score in place of the sum. Where it has
    'raw_weight', estimates are clipped to [-1, 1] here, and that is the weight of those that are not.
    """
    columns = {name: jnp.asarray(values) for name, values in table.items() if name != 'first'}
    if 'first' in table:  # x at a higher level than it is given at
        noise = noise_of(keys, len(columns['t']), x)
        x = table['first']['x_t_weight'] * x + table['first']['std'] * noise

    def step(carry, at):
        x, *earlier = carry
        raw, fraction = estimate(denoise, x, at['t'])
        x_0 = jnp.clip(raw, -1, 1) if 'raw_weight' in at else raw
        estimates = (x_0, *earlier)
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
        return (moved, *estimates[:-1]), {'x': moved, 'x_0': x_0} if trajectory else None

    start = (x, *[jnp.zeros_like(x)] * (columns['x_0_weight'].shape[1] - 1))
    (x, *_), passed = jax.lax.scan(step, start, columns)
    return (x, passed) if trajectory else x


def estimate(denoise: Callable, x: Array, t: Array) -> tuple[Array, Array | None]:
    """(x_0, fraction) of a denoise that returns either x_0 or both."""
    output = denoise(x, t)
    return output if isinstance(output, tuple) else (output, None)


def noise_of(keys: Array, number: Array | int, x: Array) -> Array:
    """Standard normal noise like x, a draw of its own for each sample and each number."""
    return normal(jax.vmap(jax.random.fold_in, (0, None))(keys, number), x.shape[1:])
