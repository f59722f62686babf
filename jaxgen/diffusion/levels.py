"""The sampler of a config: which noise levels it visits, and its table (samplers.py) with the options of the section.

    sampler = make(section, process)  # config.model.sampler
    sampler.table, sampler.schedule  # what `samplers.run` takes, and the levels

Levels are spaced over the steps of a chain or over continuous time (`Visits`), in the forms of the papers and of
published pipelines, whose schedulers are fields here (weights/schedulers.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Annotated, Any, NamedTuple

import numpy as np

from jaxgen.diffusion import schedules
from jaxgen.diffusion.processes import Process, ends_at_noise
from jaxgen.diffusion.samplers import SAMPLERS, Table, with_levels
from jaxgen.diffusion.schedules import Schedule
from jaxgen.errors import UserError
from jaxgen.options import TRACED, Component, OneOf, Positive, Rate, fields, own_fields

CONTINUOUS_SPACINGS = ('uniform', 'karras')
# Samplers that divide by alpha, or by a difference of log(alpha / sigma) from the last level.
DIVIDING = ('lms', 'deis', 'dpm_solver', 'dpm_solver_sde', 'dpm_solver_single', 'dpm_solver_pp_single')
LITERAL = ('leading', 'linspace')  # spacings of diffusers, whose single level is the first one and not noise


@dataclasses.dataclass(frozen=True)
class Visits:
    """The noise levels that a sampler visits, and what is done to the estimate at each of them.

    Attributes:
      steps: number of noise levels; 0: all T of a chain, 100 in continuous time.
      spacing: which noise levels. Of a chain 'uniform' | 'leading' (by whole strides) | 'trailing' (from the last one
        down) | 'respaced' (both ends) | 'linspace' (the same between whole steps, where sigma / alpha is linear) |
        'quadratic' | 'distilled' (of the steps that a latent consistency model was distilled on, see `grid`); in
        continuous time 'uniform'; of both 'karras', by sigma / alpha to the power 1/7 (EDM, eq. 5).
      offset: of a chain, steps by which the levels of a spacing are moved up: 1 in latent diffusion's code
        (steps_offset of diffusers).
      shift: of process 'flow': t becomes shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23).
      clip: estimates of x_0 to [-1, 1] at every step.
      unit_start: of a process with alpha^2 + sigma^2 = 1, the noise that sampling starts from has standard deviation 1
        in place of the last level's sigma, which is a little less (guided-diffusion, latent diffusion, diffusers).
      skip_first: one level more is spaced, and the one next to the data is left out (multistep solvers of diffusers).
      grid: of spacing 'distilled', the number of steps.
      ramp: the levels are spread anew between the first and the last of the spacing, by sigma / alpha, of process
        'flow' by t: 'karras' (to the power 1/7), 'exponential' (in the logarithm) or 'beta' (quantiles of Beta(0.6,
        0.6)); 'log_linear': in the logarithm between the ends of the chain, with the network's times those of the
        spacing.
      ramp_ends: the least and the largest sigma / alpha of a ramp; 0: those of the spacing.
      rounding: of levels between the steps of a chain, or of t 1000 in continuous time, the network's time: '' as it
        is, 'nearest' step or 'down'.
      least_alpha: alpha is at least this, so that the last level of a chain with zero terminal SNR has a finite
        sigma / alpha.
      ends: of process 'flow', t between which the levels are spaced before the shift, (0, 1). From 0 the level at the
        data itself is left out.
      dynamic_shift: of process 'flow', shift is mu ('linear') or e^mu ('exponential'), mu linear in the number of
        tokens of the network; '': shift.
      shift_range: mu at the least and at the largest number of tokens.
      token_range: the least and the largest number of tokens.
    """

    steps: Annotated[int, '[0, inf)'] = 0
    spacing: Annotated[str, OneOf(*schedules.SPACINGS, 'linspace', 'distilled', 'karras'), TRACED] = 'uniform'
    offset: Annotated[int, '[0, inf)', TRACED] = 0
    shift: Annotated[Positive, TRACED] = 1.0
    clip: bool = True
    unit_start: Annotated[bool, TRACED] = False
    skip_first: Annotated[bool, TRACED] = False
    grid: Annotated[int, '[1, inf)', TRACED] = 50
    ramp: Annotated[str, OneOf('', *schedules.RAMPS, 'log_linear'), TRACED] = ''
    ramp_ends: Annotated[tuple[float, float], '[0, inf)', TRACED] = (0.0, 0.0)
    rounding: Annotated[str, OneOf('', 'nearest', 'down'), TRACED] = ''
    least_alpha: Annotated[Rate, TRACED] = 0.0
    ends: Annotated[tuple[float, float], '[0, 1]', TRACED] = (0.0, 1.0)
    dynamic_shift: Annotated[str, OneOf('', 'exponential', 'linear'), TRACED] = ''
    shift_range: Annotated[tuple[float, float], TRACED] = (0.5, 1.15)
    token_range: Annotated[tuple[int, int], '[0, inf)', TRACED] = (256, 4096)

    @property
    def stated(self) -> bool:
        """Whether the levels may differ from those of the process at the network's times, see `with_levels`."""
        return self.spacing == 'linspace' or bool(self.ramp or self.rounding or self.least_alpha)


# Arguments of samplers that follow from the process and the levels.
DERIVED = ('straight', 'level', 'sigma_min', 'first', 'below', 'at', 'stride', 'levels', 'skipped')
COMPONENT = Component(SAMPLERS, Visits, DERIVED)


class Sampler(NamedTuple):
    """A sampler bound to its options and to the noise levels that it visits."""

    table: Table
    schedule: Schedule
    clip: bool
    start: float  # standard deviation of the noise that it starts from
    variance: str  # of an ancestral one, else ''
    ddim: bool  # whether it is DDIM without noise
    stated: bool = False  # whether tables hold the levels of the schedule, see `with_levels`

    @property
    def clip_here(self) -> bool:
        """Whether the steps of `run` clip, and the denoiser is not to."""
        return 'raw_weight' in self.table


def make(section: dict, process: Process, learned: bool = False, *, tokens: int = 0, skip: int = 0) -> Sampler:
    """The sampler of a complete section {'name': ..., its fields, those of `Visits`}.

    Args:
      learned: the network puts out a variance.
      tokens: of the network, for `dynamic_shift`.
      skip: levels that are left out from the noisy end, see `skipped_levels`: x begins at the schedule's last level, as
        alpha x_0 + sigma eps. A method that uses earlier estimates begins anew there.

    Raises:
      UserError: fields that do not go with each other or with the process.
    """
    name = section['name']
    visits = Visits(**{f.name: section[f.name] for f in dataclasses.fields(Visits)})
    own = {k: v for k, v in own_fields(section).items() if not hasattr(visits, k)}
    check(name, own, visits, process, learned)
    schedule = levels_of(process, visits, own.get('last_step', 0.0), tokens)
    n = len(schedule.t)
    repeated = name == 'pndm' and n > 1  # N + 1 evaluations, of which `skip` are left out
    if not 0 <= skip < n + repeated:
        raise UserError(f'of {n} noise levels from 0 to {n - 1 + repeated} may be left out; it is {skip}')
    if not repeated:
        schedule = Schedule(*(values[: n - skip] for values in schedule))
    parameters = fields(SAMPLERS[name])
    if name == 'ancestral':
        own['variance'] = model_variance(own['variance'], process, learned)
    if name == 'heun':
        own |= {'straight': process.straight, 'level': lambda ratio: process.at(process.time(ratio))}
    if name == 'ddim':
        own['clipped_noise'] |= not visits.clip
    own |= {k: v for k, v in derive(process, schedule, n, skip).items() if k in parameters}
    table = with_levels(functools.partial(SAMPLERS[name], **own), schedule, visits.stated)
    if repeated:
        schedule = Schedule(*(values[schedule.t <= table['t'][0]] for values in schedule))
    start = 1.0 if visits.unit_start else float(schedule.sigma[-1])
    still = name == 'ddim' and not own['eta']
    return Sampler(table, schedule, visits.clip, start, own.get('variance', ''), still, visits.stated)


def derive(process: Process, schedule: Schedule, n: int, skip: int) -> dict[str, Any]:
    """Arguments of samplers that follow from the process and the levels: of those in DERIVED each that some take.

    Args:
      n: number of levels before `skip` of them were left out.
    """
    first, stride = process.at(np.array([process.low])), process.steps // n
    derived = {'first': (first.alpha[0], first.sigma[0]), 'levels': n, 'skipped': skip, 'stride': stride}
    if not process.steps:
        return derived

    def at(steps: np.ndarray) -> Schedule:
        """Levels of steps of the chain; below it sigma is 0."""
        levels = process.at(np.clip(steps, 0, process.steps - 1))
        return levels._replace(sigma=np.where(steps < 0, 0, levels.sigma))

    whole = np.issubdtype(schedule.t.dtype, np.integer)
    return derived | {'at': at, 'below': at(schedule.t - stride) if whole else None}


def skipped_levels(steps: int, strength: float, whole: bool = True) -> int:
    """How many of `steps` noise levels are left out where an image is changed by `strength`, from 0, not at all, to 1,
    into anything (SDEdit, Meng et al. 2022, arXiv 2108.01073).

    Args:
      whole: the number that is kept is rounded down, as in diffusers' pipelines of Stable Diffusion 1, 2 and XL; else
        the number that is left out, as in those of Stable Diffusion 3 and FLUX.
    """
    kept = min(int(steps * strength) if whole else steps * strength, steps)
    return int(max(steps - kept, 0))


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
    most = process.steps - visits.skip_first
    if process.steps and (visits.steps or process.steps) > most:
        raise UserError(f'{where}.steps must be from 0 to timesteps {most}; it is {visits.steps}')
    check_visits(where, name, own, visits, process)
    ends = process.at(np.array([process.low, process.end]))
    if visits.unit_start and not np.allclose(ends.alpha**2 + ends.sigma**2, 1):
        raise UserError(f'{where}.unit_start is of processes with alpha^2 + sigma^2 = 1, and this is none')
    if visits.offset and not process.steps:
        raise UserError(f'{where}.offset is of chains; it is {visits.offset}')
    if own.get('last_step') and (process.steps or own['last_step'] >= process.end):
        raise UserError(f'{where}.last_step is of continuous time, from 0 to below 1; it is {own["last_step"]}')


def ended(table: Table, t: float) -> Table:
    """The table without the evaluations at times below t: it ends with x at the level that its last step leads to. Of
    SDXL's two networks the first one draws so far, and the second goes on from there, see `skip` of `make`."""
    last = table['t'] >= t
    return {name: values if name == 'first' else values[last] for name, values in table.items()}


def check_visits(where: str, name: str, own: dict, visits: Visits, process: Process) -> None:
    """Raises UserError for levels that the process does not have, or the sampler cannot visit.

    Args:
      where: the section.
      own: options of the sampler.
    """
    noise = process.straight or (ends_at_noise(process) and not visits.least_alpha)
    if noise and not visits.least_alpha and name in DIVIDING:
        raise UserError(
            f'{where}.name = {name!r} divides by alpha, which is 0 at the last level here: least_alpha above 0'
        )
    if not process.steps and (name in ('pndm', 'lcm') or own.get('by_stride')):
        raise UserError(f'{where}: {name!r} with {"by_stride" if name == "ddim" else "its steps"} is of chains')
    if visits.stated and (name == 'pndm' or own.get('by_stride') or own.get('s_churn')):
        raise UserError(f'{where}: {name!r} as it is set visits whole steps of a chain: no ramp, rounding, least_alpha')
    if visits.spacing == 'distilled' and not (visits.steps or process.steps) <= visits.grid <= process.steps:
        raise UserError(
            f"{where}.spacing = 'distilled' chooses steps of grid {visits.grid}, at most all {process.steps} of the "
            f'chain; steps is {visits.steps}'
        )
    if visits.ramp == 'log_linear' and not process.steps:
        raise UserError(f"{where}.ramp = 'log_linear' is of chains")
    if not process.straight and (visits.ends != (0.0, 1.0) or visits.dynamic_shift):
        raise UserError(f"{where}.ends and dynamic_shift are of process 'flow'")
    if not visits.ends[0] < visits.ends[1] or 0 < visits.ramp_ends[1] < visits.ramp_ends[0]:
        raise UserError(f'{where}: ends {visits.ends} and ramp_ends {visits.ramp_ends} are the least and the largest')
    if visits.token_range[0] >= visits.token_range[1]:
        raise UserError(f'{where}.token_range {visits.token_range} is the least and the largest number of tokens')


def levels_of(process: Process, visits: Visits, last_step: float = 0.0, tokens: int = 0) -> Schedule:
    """The noise levels that a sampler visits, numpy float64, from the one next to the data to the last; see `Visits`.

    Args:
      last_step, tokens: see `visited`, `make`.
    """
    shift = visits.shift
    if visits.dynamic_shift:
        if not tokens:
            raise UserError('config.model.sampler.dynamic_shift is by the number of tokens, and this network has none')
        (least, most), (low, high) = visits.token_range, visits.shift_range
        mu = low + (high - low) * (tokens - least) / (most - least)
        shift = math.exp(mu) if visits.dynamic_shift == 'exponential' else mu
        if shift <= 0:
            raise UserError(f'config.model.sampler: {tokens} tokens have the shift {shift}, and it must be above 0')
    n = visits.steps or process.steps or 100
    options = {'last_step': last_step, 'offset': visits.offset, 'grid': visits.grid, 'ends': visits.ends}
    spaced = visited(process, n + visits.skip_first, visits.spacing, shift, **options)
    spaced = Schedule(*(values[int(visits.skip_first) :] for values in spaced))
    if not visits.stated:
        return spaced
    levels = between(process, visits, spaced, n) if not process.steps else on_chain(process, visits, spaced, n)
    with np.errstate(divide='ignore'):
        ratio = levels.sigma / levels.alpha
    if np.any(ratio[1:] <= ratio[:-1]):
        raise UserError(
            f'config.model.sampler: of the {n} noise levels some are equal: ramp_ends and least_alpha leave no room '
            'between them'
        )
    return levels


def on_chain(process: Process, visits: Visits, spaced: Schedule, n: int) -> Schedule:
    """Levels of a chain, spread anew, which lie between its steps, with the network's times rounded."""
    chain = process.at(np.arange(process.steps))
    preserving = bool(np.allclose(chain.alpha**2 + chain.sigma**2, 1))
    alpha = np.maximum(chain.alpha, visits.least_alpha)
    sigma = np.sqrt(1 - alpha**2) if preserving else chain.sigma
    chain_ratio = sigma / alpha
    t, ratio = spaced.t, np.interp(spaced.t, np.arange(process.steps), chain_ratio)
    if visits.ramp == 'log_linear':
        ratio = schedules.exponential_ramp(chain_ratio[0], chain_ratio[-1], n + 1)[:-1][::-1]
    elif visits.ramp:
        low, high = (own or there for own, there in zip(visits.ramp_ends, ratio[[0, -1]], strict=True))
        ratio = schedules.RAMPS[visits.ramp](low, high, n)[::-1]
        t = np.interp(np.log(ratio), np.log(chain_ratio), np.arange(process.steps, dtype=np.float64))
    # What is a whole step but for rounding errors stays one.
    t = {'': t, 'nearest': np.round(t), 'down': np.floor(t + 1e-9)}[visits.rounding]
    alpha = 1 / np.sqrt(1 + ratio**2) if preserving else np.interp(ratio, chain_ratio, alpha)
    return Schedule(t, alpha, ratio * alpha)


def between(process: Process, visits: Visits, levels: Schedule, n: int) -> Schedule:
    """Levels of a process in continuous time, spread anew, with the network's times rounded."""
    if visits.ramp:
        place = levels.t if process.straight else levels.sigma / levels.alpha
        low, high = (own or there for own, there in zip(visits.ramp_ends, place[[0, -1]], strict=True))
        ratio = schedules.RAMPS[visits.ramp](low, high, n)[::-1]
        levels = process.at(ratio if process.straight else process.time(ratio))
    if visits.least_alpha:
        low = levels.alpha < visits.least_alpha
        sigma = 1 - visits.least_alpha if process.straight else math.sqrt(1 - visits.least_alpha**2)
        alpha = np.where(low, visits.least_alpha, levels.alpha)
        levels = Schedule(np.where(low & process.straight, sigma, levels.t), alpha, np.where(low, sigma, levels.sigma))
    rounded = {
        '': levels.t,
        'nearest': np.round(levels.t * 1000) / 1000,
        'down': np.floor(levels.t * 1000 + 1e-9) / 1000,
    }
    return levels._replace(t=rounded[visits.rounding])


def visited(
    process: Process,
    n: int,
    spacing: str,
    shift: float = 1.0,
    last_step: float = 0.0,
    offset: int = 0,
    grid: int = 50,
    ends: tuple[float, float] = (0.0, 1.0),
) -> Schedule:
    """The noise levels of a spacing, numpy float64, from the one next to the data to the last.

    Args:
      n: how many; 0: all steps of a chain, 100 in continuous time; 1: the last one, which is noise.
      spacing, shift, grid, ends: see `Visits`; 'uniform' in continuous time is evenly in t. The shift moves last_step
        too.
      last_step: in continuous time, t of the level next to the data where it is above 0; the others are evenly between
        it and the end.
      offset: of a chain, steps by which the levels are moved up.

    Raises:
      UserError: the offset moves a level beyond the last.
    """
    n = n or process.steps or 100
    alone = (
        n == 1 and spacing not in LITERAL
    )  # most spacings have the first level then, the data but for a little noise
    if alone and (process.steps or ends[1] == 1):
        return process.at(np.array([process.end]))
    if spacing == 'karras':
        limits = process.at(np.array([process.low, process.end], np.float64))
        low, high = (limits.sigma / limits.alpha) ** (1 / 7)
        return process.at(process.time(np.linspace(low, high, n) ** 7))
    if process.steps:
        if spacing == 'linspace':
            return process.at(np.linspace(0.0, process.steps - 1, n))
        if spacing == 'distilled':
            steps = schedules.distilled_steps(process.steps, n, grid)
        else:
            steps = schedules.SPACINGS[spacing](process.steps, n) + offset
        if steps[-1] >= process.steps:
            raise UserError(
                f'config.model.sampler.offset {offset} moves the last of {n} levels, {steps[-1] - offset}, beyond that '
                f'of the process, {process.steps - 1}'
            )
        return process.at(steps)
    low, high = last_step or max(process.low, ends[0]), min(process.end, ends[1])
    at_data = process.at(np.array([low])).sigma[0] == 0
    times = np.array([high]) if alone else np.linspace(low, high, n + at_data)[int(at_data) :]
    if shift != 1:
        # Written so that t = 1 stays 1, whatever is rounded: beyond it alpha would be below 0.
        times = shift * times / (1 - times + shift * times)
    return process.at(times)
