"""Consistency models: one evaluation of a network turns noise into an image (Song et al. 2023, arXiv 2303.01469).

Noise is added as in EDM, x = x_0 + sigma eps. The probability-flow ODE leads from every x at every sigma to one x_0 at
sigma_min, and the consistency function is where it leads:

    f(x, sigma) = c_skip(sigma) x + c_out(sigma) network(c_in(sigma) x, log(sigma) / 4),   f(x, sigma_min) = x

(appendix C). Between sigma_min and sigma_max lie N noise levels, EDM's with rho = 7. Of two neighbours on one path, the
estimate at the higher is trained towards the target network's estimate at the lower, which no gradient reaches:

    L = E weight d(f(x_high, sigma_high), f_target(x_low, sigma_low))

In isolation (consistency training, algorithm 3) x_low is the same image with the same noise, only less of it. With
`config.stages.teacher`, a diffusion model, x_low is one step of its ODE from x_high (consistency distillation,
algorithm 2). Both networks drop the same activations.

    recipe                               times      d             weight  N         target
    CD (Song et al. 2023), CIFAR-10      uniform    perceptual    none    constant  the weights themselves
    CT (Song et al. 2023)                uniform    perceptual    none    sqrt      averaged weights
    improved CT (Song & Dhariwal 2023)   lognormal  pseudo_huber  gap     doubling  the weights themselves

Song & Dhariwal 2023 is arXiv 2310.14189. The perceptual distance of the first two is LPIPS; l2 and l1 are their second
choices.
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

from jaxgen import options
from jaxgen.checks import check_stage_image
from jaxgen.contract import Aux, Captions, Context, Family, State, advance, by_settings, gradient_step, new_state
from jaxgen.diffusion import conditioning as conditions
from jaxgen.diffusion import former as formats
from jaxgen.diffusion import samplers
from jaxgen.diffusion.conditioning import Conditioning, Embeddings, Values
from jaxgen.diffusion.processes import expanded
from jaxgen.diffusion.schedules import Schedule
from jaxgen.errors import UserError
from jaxgen.imports import OwnToo
from jaxgen.losses import perceptual
from jaxgen.networks import denoisers
from jaxgen.networks.denoisers import Network
from jaxgen.options import TRACED, Component, Count, Fields, OneOf, Positive, Section, own_fields
from jaxgen.randomness import example_keys, normal, stream

Array = jax.Array

former = formats.consistency  # fields of runs that were saved before there were sections
MOVED = formats.MOVED['consistency']
EMPTY: dict[str, Any] = {}
NETWORKS = OwnToo({name: network for name, network in denoisers.NETWORKS.items() if name != 'refinenet'})
RHO = 7  # of the noise levels (Karras et al. 2022, arXiv 2206.00364, eq. 5)
LEAST_SIDE = 224  # pixels; smaller images are enlarged to it for LPIPS, as in the published code
# Of the noise levels that evaluate reports, as fractions of the way from sigma_min^(1/7) to sigma_max^(1/7).
FRACTIONS = (0.25, 0.5, 0.75)

# --- N, the number of noise levels, by update


class Discretisation(NamedTuple):
    """N by update, never falling."""

    count: Callable[[np.ndarray], np.ndarray]  # k, number of updates done, to N, int32
    start: int  # number of intervals between noise levels in the first update; N - 1
    end: int  # and in the last
    updates: int  # over which N rises


def doubling(*, start_scales: Count = 10, end_scales: Count = 1280, total_steps: Count = 1000) -> Discretisation:
    """N(k) = min(s_0 2^(k // K'), s_1) + 1, with as many updates, K', at each N (Song & Dhariwal 2023, section 3.4).

    Args:
      start_scales, end_scales: s_0 and s_1, numbers of intervals in the first and the last update.
      total_steps: K, updates over which N rises; `config.train.steps` unless a run is to go on with its last N.
    """
    check_rising(start_scales, end_scales)
    every = int(total_steps / (math.log2(end_scales // start_scales) + 1))  # K'
    if not every:
        raise UserError(
            f'config.model.discretisation.total_steps = {total_steps} is too few to get from start_scales '
            f'{start_scales} to end_scales {end_scales}: give it the number of updates, config.train.steps'
        )

    def count(k):
        return (np.minimum(float(start_scales) * 2.0 ** (k // every), end_scales) + 1).astype(np.int32)

    return Discretisation(count, start_scales, end_scales, total_steps)


def sqrt(
    *, start_scales: Annotated[int, '[2, inf)'] = 2, end_scales: Count = 150, total_steps: Count = 1000
) -> Discretisation:
    """N(k) = ceil(sqrt(k / K ((s_1 + 1)^2 - s_0^2) + s_0^2) - 1) + 1 (Song et al. 2023, appendix C).

    Args:
      start_scales, end_scales: s_0 and s_1, numbers of intervals in the first and the last update, about.
      total_steps: K, updates over which N rises; `config.train.steps` unless a run is to go on with its last N.
    """
    check_rising(start_scales, end_scales)

    def count(k):
        square = k / total_steps * ((end_scales + 1) ** 2 - start_scales**2) + start_scales**2
        return (np.ceil(np.sqrt(square) - 1) + 1).astype(np.int32)

    return Discretisation(count, start_scales, end_scales, total_steps)


def constant(*, end_scales: Count = 17) -> Discretisation:
    """The same N in all updates.

    Args:
      end_scales: number of intervals, N - 1.
    """
    return Discretisation(lambda k: np.full(np.shape(k), end_scales + 1, np.int32), end_scales, end_scales, 1)


DISCRETISATIONS = {'doubling': doubling, 'sqrt': sqrt, 'constant': constant}


def check_rising(start: int, end: int) -> None:
    """Raises UserError where a number of intervals is to fall."""
    if start > end:
        raise UserError(f'config.model.discretisation: start_scales {start} must be at most end_scales {end}')


def first_updates(discretisation: Discretisation) -> tuple[np.ndarray, np.ndarray]:
    """The values of N, rising, and the first update of each, by bisection: no array is as long as the run."""
    count, updates = discretisation.count, discretisation.updates
    first, last = count(np.array([0, updates - 1]))
    counts = np.arange(first, last + 1, dtype=np.int32)
    low, high = np.zeros(len(counts), np.int64), np.full(len(counts), updates - 1, np.int64)
    while (low < high).any():
        middle = (low + high) // 2
        enough = count(middle) >= counts
        low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
    taken = count(low) == counts
    return counts[taken], low[taken]


# --- noise levels, and how two neighbours are drawn


def sigma_at(fraction, ends: tuple[float, float]):
    """sigma at a fraction of the way from sigma_min to sigma_max, evenly in sigma^(1/7).

    Args:
      ends: sigma_min^(1/7) and sigma_max^(1/7).
    """
    return (ends[0] + fraction * (ends[1] - ends[0])) ** RHO


def fraction_at(sigma, ends: tuple[float, float]):
    """The inverse of `sigma_at`."""
    return (sigma ** (1 / RHO) - ends[0]) / (ends[1] - ends[0])


def uniform(ends: tuple[float, float]) -> Callable:
    """All intervals equally likely (Song et al. 2023)."""
    return lambda rng, n, intervals: jax.random.randint(rng, (n,), 0, intervals)


def lognormal(ends: tuple[float, float], *, mean: float = -1.1, std: Positive = 2.0) -> Callable:
    """The weight of an interval is the probability that a normal log(sigma) lies in it (Song & Dhariwal 2023, section
    3.5). So a sigma between the two ends is drawn, and the interval is the one that it falls into: no table, whatever
    their number.

    Args:
      mean, std: of log(sigma).
    """
    bounds = [(RHO * math.log(end) - mean) / std for end in ends]

    def draw(rng: Array, n: int, intervals: Array) -> Array:
        sigma = jnp.exp(mean + std * jax.random.truncated_normal(rng, *bounds, (n,)))
        return jnp.clip((intervals * fraction_at(sigma, ends)).astype(jnp.int32), 0, intervals - 1)

    return draw


TIMES = {'uniform': uniform, 'lognormal': lognormal}

# --- distances of two estimates, (frozen, a, b) -> [n]; a and b [n, ...]


def pseudo_huber(context: Context, *, huber: Positive = 0.00054) -> Callable:
    """sqrt(|a - b|^2 + c^2) - c (Song & Dhariwal 2023, section 3.3).

    Args:
      huber: c over the root of the number of values in an image.
    """
    c = huber * math.sqrt(math.prod(context.image))

    def distance(frozen, a: Array, b: Array) -> Array:
        square = jnp.square(a - b).sum(tuple(range(1, a.ndim)))
        # = sqrt(square + c^2) - c, but no digits are lost where square is small
        return square / (jnp.sqrt(square + c**2) + c)

    return distance


def l2(context: Context) -> Callable:
    """The mean squared difference, as in the published code."""
    return lambda frozen, a, b: jnp.square(a - b).mean(tuple(range(1, a.ndim)))


def l1(context: Context) -> Callable:
    """The mean absolute difference, as in the published code."""
    return lambda frozen, a, b: jnp.abs(a - b).mean(tuple(range(1, a.ndim)))


def by_features(context: Context, *, lpips: tuple[str, ...] = ()) -> Callable:
    """The perceptual distance of images, by features of `config.stages.perceptual`, a run of a classifier, or by LPIPS.

    Args:
      lpips: files with its weights, see losses/perceptual.py.
    """
    try:
        measure = perceptual.measure(context.stages, lpips, context.image)
    except UserError as e:  # autoencoders have this field elsewhere
        raise UserError(str(e).replace('config.model.lpips', 'config.model.distance.lpips')) from e
    if measure is None:
        raise UserError(
            "config.model.distance.name = 'perceptual' needs a network of features: name a run of a classifier as "
            'config.stages.perceptual, or give weights as config.model.distance.lpips'
        )
    size = [max(side, LEAST_SIDE) for side in context.image[:2]]

    def enlarged(x: Array) -> Array:
        return jax.image.resize(x, (len(x), *size, x.shape[-1]), 'linear') if lpips else x

    return lambda frozen, a, b: measure(frozen, enlarged(a), enlarged(b))


DISTANCES = {'pseudo_huber': pseudo_huber, 'l2': l2, 'l1': l1, 'perceptual': by_features}

# --- the target network, the teacher and the sampler


class Target(NamedTuple):
    """Decay of the weights' average that estimates at the lower level."""

    decay: float  # mu
    adaptive: bool


def average(*, decay: Annotated[float, '(0, 1)'] = 0.9, adaptive: bool = False) -> Target:
    """An average of the weights.

    Args:
      decay: mu of the average.
      adaptive: mu is decay^(s_0 / (N - 1)), so it rises with N. (Song et al. 2023, appendix C, write N; their code
        divides by the number of intervals.)
    """
    return Target(decay, adaptive)


TARGETS = {'weights': None, 'average': average}


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What is taken from `config.stages.teacher` where there is one.

    Attributes:
      solver: of the teacher's ODE, 'heun' | 'euler'.
      initialise: start from the teacher's averaged weights. Its network must be the same; worth most where it is one of
        prediction 'edm' with the same `data_std`, whose network has nearly the same task.
    """

    solver: Annotated[str, OneOf('heun', 'euler')] = 'heun'
    initialise: bool = True


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The noise levels that samples visit.

    Attributes:
      steps: evaluations for a sample (algorithm 1): the estimate, noise up to a lower level, and so on. Their levels
        lie at the fractions 1, ..., 1 / steps, see `sigma_at`.
      levels: those levels themselves, sigmas from the highest down, in place of steps; (): by steps.
      clip: estimates to [-1, 1] at every step of a sample.
    """

    steps: Count = 1
    levels: Annotated[tuple[float, ...], TRACED] = ()
    clip: bool = True


def visited(sampling: Sampling, sigma_min: float, sigma_max: float) -> Schedule:
    """The noise levels of a sample, from the lowest.

    Raises:
      UserError: levels that do not fall, or beyond the ends.
    """
    levels = sampling.levels
    falls = all(isinstance(v, int | float) for v in levels) and list(levels) == sorted(set(levels), reverse=True)
    if not falls or not all(sigma_min < v <= sigma_max for v in levels):
        raise UserError(
            f'config.model.sampler.levels must fall, from sigma_max {sigma_max} at most to more than sigma_min '
            f'{sigma_min}; they are {levels}'
        )
    fractions = np.linspace(0, 1, sampling.steps + 1)[1:]
    sigma = np.array(levels[::-1]) if levels else sigma_at(fractions, (sigma_min ** (1 / RHO), sigma_max ** (1 / RHO)))
    return Schedule(sigma, np.ones_like(sigma), sigma)


class Model(NamedTuple):
    """A consistency model, its parts bound to their options."""

    shape: tuple[int, ...]  # of one x_0
    network: Network
    conditioning: Conditioning
    sigma_min: float
    ends: tuple[float, float]  # sigma_min^(1/7) and sigma_max^(1/7)
    data_std: float
    discretisation: Discretisation
    draw_intervals: Callable  # (rng, n, intervals) -> int32 [n] in [0, intervals); intervals may be traced
    distance: Callable  # (frozen, a, b) -> [n]
    by_gap: bool  # the distance is weighted by 1 / (sigma_high - sigma_low)
    target: Target | None  # None: the weights themselves
    lower: Callable  # (frozen, batch, eps, x, high, low) -> x at the level below
    table: samplers.Table  # of samples
    start: float  # standard deviation of the noise that they start from
    clip: bool


@options.checked
def build(
    context: Context,
    *,
    network: Annotated[Section, Component(NETWORKS, omit=denoisers.GIVEN)] = 'unet',
    conditioning: Annotated[Section, conditions.NAMED] = EMPTY,
    sigma_min: Positive = 0.002,
    sigma_max: Positive = 80.0,
    data_std: Positive = 0.5,
    discretisation: Annotated[Section, Component(DISCRETISATIONS)] = 'doubling',
    times: Annotated[Section, Component(TIMES)] = 'lognormal',
    distance: Annotated[Section, Component(DISTANCES)] = 'pseudo_huber',
    weighting: Annotated[str, OneOf('none', 'gap')] = 'gap',
    target: Annotated[Section, Component(TARGETS)] = 'weights',
    teacher: Annotated[Section, Fields(Distillation)] = EMPTY,
    sampler: Annotated[Section, Fields(Sampling)] = EMPTY,
) -> Family:
    """Consistency model; the defaults are those of improved consistency training.

    Args:
      network: see networks/denoisers.py.
      conditioning: {name of an array of the batch: kind and dropout}, see diffusion/conditioning.py.
      sigma_min, sigma_max: the ends of all noise levels, over images in [-1, 1].
      data_std: sigma_data of c_skip, c_out and c_in.
      discretisation: N, the number of noise levels, by update.
      times: how a pair of neighbouring levels is drawn in training.
      distance: d, of the estimates at two neighbouring levels.
      weighting: of the distance, 'none' or 'gap', 1 / (sigma_high - sigma_low).
      target: the weights of the network that estimates at the lower level: the 'weights' themselves or an 'average'.
      teacher: what is taken from `config.stages.teacher`, see `Distillation`.
      sampler: the noise levels that samples visit, see `Sampling`.

    Raises:
      UserError: values that do not go together, an image that cannot be halved often enough, no labels, a teacher that
        does not denoise or has another network.
    """
    if not sigma_min < sigma_max:
        raise UserError(f'config.model.sigma_min {sigma_min} must be less than sigma_max {sigma_max}')
    check_teacher(context)
    module = denoisers.make_module(network, context.image, context.image[-1], context)
    bound = conditions.make(conditioning, context, module)
    ends = sigma_min ** (1 / RHO), sigma_max ** (1 / RHO)
    distillation, sampling = Distillation(**teacher), Sampling(**sampler)
    schedule = visited(sampling, sigma_min, sigma_max)
    model = Model(
        shape=context.image,
        network=denoisers.bind(module, bound),
        conditioning=bound,
        sigma_min=sigma_min,
        ends=ends,
        data_std=data_std,
        discretisation=made(DISCRETISATIONS, discretisation),
        draw_intervals=made(TIMES, times, ends),
        distance=made(DISTANCES, distance, context),
        by_gap=weighting == 'gap',
        target=made(TARGETS, target),
        lower=functools.partial(ode_step, context.stages['teacher'].denoise, distillation.solver)
        if 'teacher' in context.stages
        else same_noise,
        table=samplers.consistency.table(schedule, sigma_min=sigma_min),
        start=float(schedule.sigma[-1]),
        clip=sampling.clip,
    )
    number = functools.partial(number_of_levels, *first_updates(model.discretisation))
    step = gradient_step(functools.partial(loss, model, number), context.optim, 'denoiser')
    initial = 'teacher' in context.stages and distillation.initialise

    def settings():
        return {'start': model.start, 'table': model.table}

    return Family(
        functools.partial(init, model, context, initial),
        functools.partial(update, model, context, number, step),
        by_settings(functools.partial(sample, model), settings),
        functools.partial(evaluate, model),
        denoise=functools.partial(denoise, model),
        trajectory=by_settings(functools.partial(trajectory, model), settings),
        conditions=tuple(c.name for c in bound if not c.optional),
        captions=Captions(encoded=conditions.reads_text(bound)),
        divisor=denoisers.divisor_of(network),
        free=('sampler',),
        sampling=('sampler',),
        settings=settings,
    )


def made(table: dict[str, Callable | None], section: dict, *args):
    """What the component of a complete section makes of its fields, None where it is none."""
    component = table[section['name']]
    return component and component(*args, **own_fields(section))


def check_teacher(context: Context) -> None:
    """Raises UserError where `config.stages.teacher` cannot teach a consistency model."""
    teacher = context.stages.get('teacher')
    if teacher is None:
        return
    if teacher.denoise is None:
        raise UserError('config.stages.teacher must be the run of a diffusion model: this one does not denoise')
    if others := sorted({*teacher.conditions} - {'label'}):
        raise UserError(f'config.stages.teacher is conditioned on {", ".join(others)}, which no batch here has')
    if 'label' in teacher.conditions and not context.classes:
        raise UserError("config.stages.teacher is conditioned on the class: config.data.features must hold 'label'")
    check_stage_image(context, 'teacher')


def consistency_function(
    model: Model, params: Any, x: Array, sigma: Array, embeddings: Embeddings, rng: Array | None = None
) -> Array:
    """f(x, sigma), the estimate of x_0 (Song et al. 2023, appendix C).

    Args:
      x, sigma: [n, ...], [n].
      rng: of dropout; None: nothing is dropped.
    """
    data_std, above = model.data_std, sigma - model.sigma_min
    std = jnp.sqrt(sigma**2 + data_std**2)  # of x
    c_skip, c_out = data_std**2 / (above**2 + data_std**2), data_std * above / std
    options = {'train': rng is not None, 'rngs': None if rng is None else {'dropout': rng}}
    output = model.network.apply(params, x / expanded(std, x), 0.25 * jnp.log(sigma), embeddings, **options)
    return expanded(c_skip, x) * x + expanded(c_out, x) * output


def same_noise(frozen, batch, eps: Array, x: Array, high: Array, low: Array) -> Array:
    """x_low = x_0 + low eps: consistency training (algorithm 3)."""
    return batch['image'] + expanded(low, x) * eps


def ode_step(denoise: Callable, solver: str, frozen, batch, eps: Array, x: Array, high: Array, low: Array) -> Array:
    """x_low, one step of the teacher's ODE from x at the level high: consistency distillation (algorithm 2).

    Args:
      denoise: the teacher's.
      x, high, low: [n, ...], [n], [n].
    """

    def slope(x: Array, sigma: Array) -> Array:
        return (x - denoise(*frozen['teacher'], batch, x, sigma)) / expanded(sigma, x)

    here, step = slope(x, high), expanded(low - high, x)
    there = slope(x + step * here, low) if solver == 'heun' else here
    return x + step * (here + there) / 2


def number_of_levels(counts: np.ndarray, starts: np.ndarray, step: Array) -> Array:
    """N(k) of this update. N rises so seldom that the updates at which it does fit in a table: counts[i] from update
    starts[i] on."""
    return jnp.asarray(counts)[(starts <= step).sum() - 1]


def loss(model: Model, number: Callable, params, state: State, frozen, batch, rng) -> tuple[Array, Aux]:
    """The weighted distance of the estimates at two neighbouring noise levels (Song et al. 2023, eq. 7 and 10)."""
    rng_level, rng_noise, rng_dropout = jax.random.split(rng, 3)
    x_0, intervals = batch['image'], number(state.step) - 1
    i = model.draw_intervals(rng_level, len(x_0), intervals)
    low, high = sigma_at(i / intervals, model.ends), sigma_at((i + 1) / intervals, model.ends)
    eps = jax.random.normal(rng_noise, x_0.shape)
    x_high = x_0 + expanded(high, x_0) * eps
    x_low = model.lower(frozen, batch, eps, x_high, high, low)
    values = conditions.values_of(model.conditioning, batch, frozen, train=True)
    values = conditions.drop(model.conditioning, stream(rng, 'conditions'), values)
    target_params = state.extra['target'] if model.target else params['denoiser']
    target = estimate(model, target_params, x_low, low, values, rng_dropout)
    errors = model.distance(
        frozen, estimate(model, params['denoiser'], x_high, high, values, rng_dropout), jax.lax.stop_gradient(target)
    )
    value = (errors / (high - low) if model.by_gap else errors).mean()
    return value, Aux({'loss': value})


def estimate(model: Model, params: Any, x: Array, sigma: Array, values: Values, rng: Array | None = None) -> Array:
    """f(x, sigma) under these conditions, [n, ...]."""
    return consistency_function(model, params, x, sigma, conditions.embed(model.conditioning, params, values, x), rng)


def init(model: Model, context: Context, from_teacher: bool, rng, batch, frozen) -> State:
    """The state before the first update.

    Args:
      from_teacher: the weights are the teacher's averaged ones.

    Raises:
      UserError: the teacher's network has other weights.
    """
    one = conditions.values_of(model.conditioning, jax.tree.map(lambda v: v[:1], batch), frozen)
    params = model.network.init(rng, jnp.zeros((1, *model.shape)), one)
    if from_teacher:
        theirs = dict(frozen['teacher'][0].ema.get('denoiser', {}))
        theirs.pop('augment', None)  # of no use to a network without conditions on the augmentation
        if jax.tree.map(jnp.shape, theirs) != jax.tree.map(jnp.shape, params):
            raise UserError(
                "config.model.teacher.initialise: the teacher's network has other weights than config.model.network: "
                'give it the fields of the teacher, or set initialise to False'
            )
        params = jax.tree.map(jnp.copy, theirs)  # a copy: State is donated, what is frozen is not
    extra = {'target': jax.tree.map(jnp.copy, params)} if model.target else None
    return new_state({'denoiser': params}, context.optim, extra)


def update(model: Model, context: Context, number: Callable, step: Callable, state: State, frozen, batch, rng):
    """One update of the weights, then of the target network."""
    n = number(state.step)
    state, (logs, _) = step(state, frozen, batch, rng)
    if model.target:
        mu, adaptive = model.target
        decay = mu ** (model.discretisation.start / (n - 1)) if adaptive else mu
        target, params = state.extra['target'], state.params['denoiser']
        state = state.replace(extra={'target': jax.tree.map(lambda t, p: decay * t + (1 - decay) * p, target, params)})
    return advance(state, context.optim), {**logs, 'levels': n.astype(jnp.float32)}


def run_sampler(model: Model, state: State, frozen, batch, rng, settings: dict, **options):
    """x_0 [n, ...] of the samples of a batch (algorithm 1); with `trajectory` (x_0, what was passed through)."""
    rng_start, rng_steps = jax.random.split(rng)
    x = settings['start'] * normal(example_keys(rng_start, batch), model.shape)
    values = conditions.values_of(model.conditioning, batch, frozen)

    def denoise(x: Array, sigma: Array) -> Array:
        x_0 = estimate(model, state.ema['denoiser'], x, jnp.broadcast_to(sigma, (len(x),)), values)
        return jnp.clip(x_0, -1, 1) if model.clip else x_0

    return samplers.run(denoise, x, settings['table'], example_keys(rng_steps, batch), **options)


def sample(model: Model, state: State, frozen, batch, rng, settings: dict) -> Array:
    """Samples, float32 [n, H, W, C] in [-1, 1]."""
    return jnp.clip(run_sampler(model, state, frozen, batch, rng, settings), -1, 1)


def trajectory(model: Model, state: State, frozen, batch, rng, settings: dict) -> dict[str, Array]:
    """'x': after each evaluation of the network, and 'x_0': its estimates, [steps, n, H, W, C]."""
    return run_sampler(model, state, frozen, batch, rng, settings, trajectory=True)[1]


def evaluate(model: Model, state: State, frozen, batch, rng) -> dict[str, Array]:
    """Per image, with noise of its own and at three noise levels, means over pixels in [-1, 1], [n] each.

    'reconstruction/S' is the squared error of the estimate from sigma = S; 'self_consistency' the mean squared distance
    between the estimates at a level and at its neighbour below among end_scales + 1, as in training.
    """
    x_0, values = batch['image'], conditions.values_of(model.conditioning, batch, frozen)
    eps = normal(example_keys(rng, batch), model.shape)
    axes = tuple(range(1, x_0.ndim))

    def one(pair: Array) -> tuple[Array, Array]:
        low, high = (jnp.full(len(x_0), sigma) for sigma in pair)
        x_high = x_0 + expanded(high, x_0) * eps
        x_low = model.lower(frozen, batch, eps, x_high, high, low)
        of_high = estimate(model, state.ema['denoiser'], x_high, high, values)
        of_low = estimate(model, state.ema['denoiser'], x_low, low, values)
        return jnp.square(of_high - x_0).mean(axes), jnp.square(of_high - of_low).mean(axes)

    interval = 1 / model.discretisation.end
    pairs = [(sigma_at(max(f - interval, 0), model.ends), sigma_at(f, model.ends)) for f in FRACTIONS]
    errors, gaps = jax.lax.map(one, jnp.array(pairs))  # [3, n] each, from one network's program
    metrics = {f'reconstruction/{sigma:.2g}': error for (_, sigma), error in zip(pairs, errors, strict=True)}
    return {**metrics, 'self_consistency': gaps.mean(0)}


def denoise(model: Model, state: State, frozen, batch, x: Array, sigma: Array) -> Array:
    """The image that the ODE leads to from x = image + sigma eps, and not the mean of all images that x leaves open;
    float32 [n, H, W, C]; sigma [n], from sigma_min to sigma_max."""
    return estimate(model, state.ema['denoiser'], x, sigma, conditions.values_of(model.conditioning, batch, frozen))
