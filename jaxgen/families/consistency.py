"""Consistency models: one evaluation of a network turns noise into an image (Song et al. 2023, arXiv 2303.01469).

Noise is added as in EDM, x = image + sigma eps. The probability-flow ODE leads from every x at every sigma to one
image at sigma_min, and the consistency function is where it leads:

    f(x, sigma) = c_skip(sigma) x + c_out(sigma) network(c_in(sigma) x, log(sigma) / 4),   f(x, sigma_min) = x

(appendix C). Between sigma_min and sigma_max lie N levels, EDM's with rho = 7. Of two neighbours on one path, the
estimate at the higher is taught what is found at the lower, which no gradient reaches:

    L = E weight d(f(x_high, sigma_high), f_target(x_low, sigma_low))

In isolation (consistency training, algorithm 3) x_low is the same image with the same noise, only less of it. With
`config.stages.teacher`, a diffusion model, x_low is one step of its ODE from x_high (consistency distillation,
algorithm 2). Both networks drop the same activations.

    recipe                               levels     d             weight  N         target
    CD (Song et al. 2023), CIFAR-10      uniform    perceptual    none    constant  the weights themselves
    CT (Song et al. 2023)                uniform    perceptual    none    sqrt      averaged weights
    improved CT (Song & Dhariwal 2023)   lognormal  pseudo_huber  gap     doubling  the weights themselves

Song & Dhariwal 2023 is arXiv 2310.14189. What the first two see with is LPIPS; l2 and l1 are their second choices.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.checks import check_labels, check_stage_image
from jaxgen.contract import Aux, Context, Family, advance, gradient_step, new_state
from jaxgen.diffusion import samplers
from jaxgen.diffusion.schedules import Schedule
from jaxgen.errors import UserError
from jaxgen.losses import perceptual
from jaxgen.networks.denoisers import FIELDS, NETWORKS, check_network
from jaxgen.randomness import example_keys, normal

Array = jax.Array

RHO = 7  # of the levels (Karras et al. 2022, arXiv 2206.00364, eq. 5)
# {discretisation: (start_scales, end_scales)} of the recipe for CIFAR-10 that it belongs to.
SCHEDULES = {'doubling': (10, 1280), 'sqrt': (2, 150), 'constant': (17, 17)}
DISTANCES = ('pseudo_huber', 'l2', 'l1', 'perceptual')
SEEN = 224  # pixels; smaller images are enlarged to it before LPIPS is asked, as in the published code
# Where evaluate looks, in shares of the way from sigma_min^(1/7) to sigma_max^(1/7).
PLACES = (0.25, 0.5, 0.75)


def level_counts(schedule: str, start: int, end: int, updates: int, k: np.ndarray | None = None) -> np.ndarray:
    """N, the number of levels, at each of so many updates: int32 [updates], never falling. All end at end + 1.

    Args:
      schedule: 'doubling'  min(start 2^(k // K'), end) + 1 (Song & Dhariwal 2023, section 3.4)
          'sqrt'  ceil(sqrt(k / K ((end + 1)^2 - start^2) + start^2) - 1) + 1 (Song et al. 2023, appendix C)
          'constant'  end + 1
        with K updates, of which k are done.
      k: the updates that are wanted; None: all.
    """
    k = np.arange(updates) if k is None else k
    if schedule == 'doubling':
        intervals = np.minimum(float(start) * 2.0 ** (k // doubling_every(start, end, updates)), end)
    elif schedule == 'sqrt':
        intervals = np.ceil(np.sqrt(k / updates * ((end + 1) ** 2 - start**2) + start**2) - 1)
    else:
        intervals = np.full(np.shape(k), end)
    return (intervals + 1).astype(np.int32)


def level_starts(schedule: str, start: int, end: int, updates: int) -> tuple[np.ndarray, np.ndarray]:
    """The values that `level_counts` takes, rising, and the first update of each, by bisection: no array is as long as
    the run."""
    ends = level_counts(schedule, start, end, updates, np.array([0, updates - 1]))
    counts = np.arange(ends[0], ends[1] + 1, dtype=np.int32)
    low, high = np.zeros(len(counts), np.int64), np.full(len(counts), updates - 1, np.int64)
    while (low < high).any():
        middle = (low + high) // 2
        reached = level_counts(schedule, start, end, updates, middle) >= counts
        low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
    taken = level_counts(schedule, start, end, updates, low) == counts
    return counts[taken], low[taken]


def doubling_every(start: int, end: int, updates: int) -> int:
    """K' of 'doubling': as many updates at each number of levels. 0: there are too few updates."""
    return int(updates / (math.log2(end // start) + 1))


def level(place, ends: tuple[float, float]):
    """sigma at a place: 0 is sigma_min, 1 is sigma_max, evenly in sigma^(1/7) between; ends are theirs."""
    return (ends[0] + place * (ends[1] - ends[0])) ** RHO


def place_of(sigma, ends: tuple[float, float]):
    """The inverse of `level`."""
    return (sigma ** (1 / RHO) - ends[0]) / (ends[1] - ends[0])


def draw_intervals(
    rng: Array, n: int, intervals: Array, ends: tuple[float, float], lognormal: tuple[float, float] | None
) -> Array:
    """Which interval between neighbouring levels each example is shown: int32 [n] in [0, intervals).

    Args:
      intervals: how many there are; may be traced.
      ends: as of `level`.
      lognormal: None: all are as likely. (mean, std): the weight of an interval is the probability that a normal
        log(sigma) lies in it (Song & Dhariwal 2023, section 3.5). So what is drawn is a sigma between the two ends,
        and the interval is the one that it falls into: no table, whatever their number.
    """
    if lognormal is None:
        return jax.random.randint(rng, (n,), 0, intervals)
    mean, std = lognormal
    bounds = [(RHO * math.log(end) - mean) / std for end in ends]
    sigma = jnp.exp(mean + std * jax.random.truncated_normal(rng, *bounds, (n,)))
    return jnp.clip((intervals * place_of(sigma, ends)).astype(jnp.int32), 0, intervals - 1)


def wide(sigma: Array) -> Array:
    """[n] as [n, 1, 1, 1], to meet images."""
    return sigma[:, None, None, None]


def build(
    context: Context,
    *,
    network: str = 'unet',
    unet: dict = FIELDS['unet'],
    adm: dict = FIELDS['adm'],
    ncsnpp: dict = FIELDS['ncsnpp'],
    dit: dict = FIELDS['dit'],
    conditional: bool = False,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    data_std: float = 0.5,
    discretisation: str = 'doubling',
    start_scales: int | None = None,
    end_scales: int | None = None,
    total_steps: int = 1000,
    times: str = 'lognormal',
    time_mean: float = -1.1,
    time_std: float = 2.0,
    distance: str = 'pseudo_huber',
    huber: float = 0.00054,
    lpips: tuple[str, ...] = (),
    weighting: str = 'gap',
    target_decay: float = 0.0,
    adapt_decay: bool = False,
    solver: str = 'heun',
    init_from_teacher: bool = True,
    sample_steps: int = 1,
    levels: tuple[float, ...] = (),
    clip: bool = True,
) -> Family:
    """Consistency model; the defaults are those of improved consistency training.

    Args:
      network: 'unet' | 'adm' | 'ncsnpp' | 'dit'; the section of that name says how it looks, see `networks`.
      conditional: tell the network the class, `batch['label']`.
      sigma_min, sigma_max: the ends of all levels, over images in [-1, 1].
      data_std: of c_skip, c_out and c_in.
      discretisation, start_scales, end_scales, total_steps: N, the number of levels, over `total_steps` updates, see
        `level_counts`; end_scales + 1 after them. Where they are None start_scales and end_scales are those of
        SCHEDULES. `total_steps` is `config.train.steps` unless a run is to go on with its last N.
      times: how a pair of levels is drawn: 'uniform' | 'lognormal', log(sigma) with mean `time_mean` and standard
        deviation `time_std`, see `draw_intervals`.
      distance: 'pseudo_huber', sqrt(|a - b|^2 + c^2) - c with c = `huber` times the root of the number of values in an
        image; 'l2', 'l1': the mean of squared or absolute differences, as in the published code; 'perceptual', by the
        features of `config.stages.perceptual`, a run of a classifier, or by LPIPS.
      lpips: files with its weights, see losses/perceptual.py.
      weighting: of the distance: 'none' | 'gap', 1 / (sigma_high - sigma_low).
      target_decay: mu, of the average of the weights that the lower level is judged by; 0: the weights themselves.
      adapt_decay: mu is target_decay^(start_scales / (N - 1)), so it rises with N. (Song et al. 2023, appendix C, write
        N; their code divides by the number of intervals.)
      solver: of the teacher's ODE, 'heun' | 'euler'.
      init_from_teacher: start from the teacher's averaged weights. Its network must be the same; worth most where
        it is one of prediction 'edm' with the same `data_std`, whose network has nearly the same task.
      sample_steps: evaluations for a sample (algorithm 1): the image, noise up to a lower level, and so on. Their
        levels are places 1, ..., 1 / sample_steps, see `level`.
      levels: those levels themselves, sigmas from the highest down, in place of sample_steps. (): none are given.
      clip: estimates to [-1, 1] at every step of a sample.

    evaluate gives per image, with noise of its own and at three levels: 'reconstruction/S', the squared error of the
    image from sigma = S; 'self_consistency', the mean squared distance between what is found from a level and from
    its neighbour below among end_scales + 1, as in training. All are means over pixels in [-1, 1].

    Raises:
      UserError: a value out of range, an image that cannot be halved often enough, no labels, a teacher that
        does not denoise or has another network.
    """
    sections = {'unet': unet, 'adm': adm, 'ncsnpp': ncsnpp, 'dit': dit}
    choices = {
        'network': (network, tuple(sections)),
        'discretisation': (discretisation, tuple(SCHEDULES)),
        'times': (times, ('uniform', 'lognormal')),
        'distance': (distance, DISTANCES),
        'weighting': (weighting, ('none', 'gap')),
        'solver': (solver, ('heun', 'euler')),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(f'config.model.{name} must be one of {allowed}; it is {value!r}')
    if not 0 < sigma_min < sigma_max or min(data_std, time_std, huber) <= 0:
        raise UserError(
            f'config.model: 0 < sigma_min {sigma_min} < sigma_max {sigma_max}, and data_std {data_std}, '
            f'time_std {time_std} and huber {huber} must be more than 0'
        )
    start, end = SCHEDULES[discretisation]
    end_scales = end if end_scales is None else end_scales
    start_scales = min(start, end_scales) if start_scales is None else start_scales
    least = 2 if discretisation == 'sqrt' else 1
    if not least <= start_scales <= end_scales or not all(isinstance(n, int) for n in (start_scales, end_scales)):
        raise UserError(
            f'config.model: start_scales {start_scales} must be a whole number from {least} to end_scales '
            f'{end_scales}; discretisation is {discretisation!r}'
        )
    if total_steps < 1 or (discretisation == 'doubling' and not doubling_every(start_scales, end_scales, total_steps)):
        raise UserError(
            f'config.model.total_steps = {total_steps} is too few to get from start_scales {start_scales} to '
            f'end_scales {end_scales}: give it the number of updates, config.train.steps'
        )
    if not 0 <= target_decay < 1 or (adapt_decay and not target_decay):
        raise UserError(
            f'config.model.target_decay must be in [0, 1), and more than 0 with adapt_decay; it is {target_decay}'
        )
    if sample_steps < 1:
        raise UserError(f'config.model.sample_steps must be 1 or more; it is {sample_steps}')
    falls = all(isinstance(v, int | float) for v in levels) and list(levels) == sorted(set(levels), reverse=True)
    if not falls or not all(sigma_min < v <= sigma_max for v in levels):
        raise UserError(
            f'config.model.levels must fall, from sigma_max {sigma_max} at most to more than sigma_min {sigma_min}; '
            f'they are {levels}'
        )
    check_labels(context, conditional)
    seen = perceptual.measure(context.stages, lpips, context.image)
    if distance == 'perceptual' and seen is None:
        raise UserError(
            "config.model.distance = 'perceptual' needs a network to see with: name a run of a classifier as "
            'config.stages.perceptual, or give weights as config.model.lpips'
        )
    teacher = context.stages.get('teacher')
    if teacher is not None and teacher.denoise is None:
        raise UserError('config.stages.teacher must be the run of a diffusion model: this one does not denoise')
    if teacher is not None and (others := sorted({*teacher.conditions} - {'label'})):
        raise UserError(f'config.stages.teacher wants {", ".join(others)}, which nothing here gives it')
    if teacher is not None:
        check_stage_image(context, 'teacher')
    if teacher is not None and 'label' in teacher.conditions and not context.classes:
        raise UserError("config.stages.teacher is told the class: config.data.features must hold 'label'")

    section = {**FIELDS[network], **sections[network]}
    divisor = check_network(network, section, context.image)
    classes = context.classes if conditional else 0
    net = NETWORKS[network](
        **section, classes=classes, out_channels=context.image[2], remat=context.remat, dtype=context.dtype
    )
    ends = sigma_min ** (1 / RHO), sigma_max ** (1 / RHO)
    # N rises so seldom that the updates at which it does fit in a table: counts[i] from update starts[i] on.
    counts, starts = level_starts(discretisation, start_scales, end_scales, total_steps)
    margin = huber * math.sqrt(math.prod(context.image))
    sampled = np.array(levels[::-1]) if levels else level(np.linspace(0, 1, sample_steps + 1)[1:], ends)
    grid = Schedule(sampled, np.ones_like(sampled), sampled)

    def estimate(weights, x, sigma, label, rng=None) -> Array:
        """f(x, sigma); x [n, H, W, C], sigma [n]. rng: of dropout, None: nothing is dropped."""
        spread = jnp.sqrt(sigma**2 + data_std**2)
        above = sigma - sigma_min
        skip, out = data_std**2 / (above**2 + data_std**2), data_std * above / spread
        rngs = None if rng is None else {'dropout': rng}
        told = 0.25 * jnp.log(sigma)
        found = net.apply({'params': weights}, x / wide(spread), told, label, train=rng is not None, rngs=rngs)
        return wide(skip) * x + wide(out) * found

    def lower(frozen, batch, eps, x, high, low) -> Array:
        """x at level `low` on the path on which x = image + high eps lies; high and low [n]."""
        if teacher is None:
            return batch['image'] + wide(low) * eps
        shown, its_frozen = frozen['teacher']

        def slope(x, sigma):
            return (x - teacher.denoise(shown, its_frozen, batch, x, sigma)) / wide(sigma)

        here, step = slope(x, high), wide(low - high)
        there = slope(x + step * here, low) if solver == 'heun' else here
        return x + step * (here + there) / 2

    def enlarged(x: Array) -> Array:
        size = [max(side, SEEN) for side in context.image[:2]]
        return jax.image.resize(x, (len(x), *size, context.image[2]), 'linear') if lpips else x

    def compare(frozen, a: Array, b: Array) -> Array:
        """`distance` of each example, [n]."""
        if distance == 'perceptual':
            return seen(frozen, enlarged(a), enlarged(b))
        if distance == 'l1':
            return jnp.abs(a - b).mean((1, 2, 3))
        if distance == 'l2':
            return jnp.square(a - b).mean((1, 2, 3))
        square = jnp.square(a - b).sum((1, 2, 3))
        # = sqrt(square + margin^2) - margin, but no digits are lost where square is small
        return square / (jnp.sqrt(square + margin**2) + margin)

    def levels_at(step) -> Array:
        """N(k) of this update, how many levels there are."""
        return jnp.asarray(counts)[(starts <= step).sum() - 1]

    def loss(params, state, frozen, batch, rng):
        intervals = levels_at(state.step) - 1
        rng_level, rng_noise, rng_dropout = jax.random.split(rng, 3)
        x_0, label = batch['image'], batch.get('label')
        lognormal = (time_mean, time_std) if times == 'lognormal' else None
        i = draw_intervals(rng_level, len(x_0), intervals, ends, lognormal)
        low, high = level(i / intervals, ends), level((i + 1) / intervals, ends)
        eps = jax.random.normal(rng_noise, x_0.shape)
        x = x_0 + wide(high) * eps
        target = state.extra['target'] if target_decay else params['denoiser']
        wanted = estimate(target, lower(frozen, batch, eps, x, high, low), low, label, rng_dropout)
        found = estimate(params['denoiser'], x, high, label, rng_dropout)
        values = compare(frozen, found, jax.lax.stop_gradient(wanted))
        value = (values / (high - low) if weighting == 'gap' else values).mean()
        return value, Aux({'loss': value})

    step = gradient_step(loss, context.optim, 'denoiser')

    def init(rng, batch, frozen):
        label = jnp.zeros(1, jnp.int32) if classes else None
        weights = net.init(rng, jnp.zeros((1, *context.image)), jnp.zeros(1), label, train=False)['params']
        if teacher is not None and init_from_teacher:
            theirs = dict(frozen['teacher'][0].ema.get('denoiser', {}))
            theirs.pop('augment', None)  # of no use to a network that is never told of augmentation
            if jax.tree.map(jnp.shape, theirs) != jax.tree.map(jnp.shape, weights):
                raise UserError(
                    f"config.model.init_from_teacher: the teacher's network has other weights than this {network!r}; "
                    'give it the fields of the teacher, or set init_from_teacher to False'
                )
            weights = jax.tree.map(jnp.copy, theirs)  # a copy: State is donated, what is frozen is not
        extra = {'target': jax.tree.map(jnp.copy, weights)} if target_decay else None
        return new_state({'denoiser': weights}, context.optim, extra)

    def update(state, frozen, batch, rng):
        n = levels_at(state.step)
        state, (logs, _) = step(state, frozen, batch, rng)
        if target_decay:
            target = state.extra['target']
            decay = target_decay ** (start_scales / (n - 1)) if adapt_decay else target_decay
            mean = jax.tree.map(lambda t, p: decay * t + (1 - decay) * p, target, state.params['denoiser'])
            state = state.replace(extra={'target': mean})
        return advance(state, context.optim), {**logs, 'levels': n.astype(jnp.float32)}

    def walk(state, batch, rng, **options):
        rng_start, rng_steps = jax.random.split(rng)
        x = grid.sigma[-1] * normal(example_keys(rng_start, batch), context.image)

        def at(x, sigma):
            found = estimate(state.ema['denoiser'], x, jnp.broadcast_to(sigma, (len(x),)), batch.get('label'))
            return jnp.clip(found, -1, 1) if clip else found

        return samplers.consistency(at, x, grid, example_keys(rng_steps, batch), sigma_min=sigma_min, **options)

    def sample(state, frozen, batch, rng):
        return jnp.clip(walk(state, batch, rng), -1, 1)

    def trajectory(state, frozen, batch, rng):
        return walk(state, batch, rng, trajectory=True)[1]

    def evaluate(state, frozen, batch, rng):
        x_0, label = batch['image'], batch.get('label')
        eps = normal(example_keys(rng, batch), context.image)
        at = functools.partial(estimate, state.ema['denoiser'], label=label)

        def one(pair):
            low, high = (jnp.full(len(x_0), sigma) for sigma in pair)
            x = x_0 + wide(high) * eps
            found = at(x, high)
            below = at(lower(frozen, batch, eps, x, high, low), low)
            return jnp.square(found - x_0).mean((1, 2, 3)), jnp.square(found - below).mean((1, 2, 3))

        pairs = [(level(max(place - 1 / end_scales, 0), ends), level(place, ends)) for place in PLACES]
        errors, gaps = jax.lax.map(one, jnp.array(pairs))  # [3, n] each, from one network's program
        figures = {f'reconstruction/{sigma:.2g}': error for (_, sigma), error in zip(pairs, errors, strict=True)}
        return {**figures, 'self_consistency': gaps.mean(0)}

    def denoise(state, frozen, batch, x, sigma):
        """The image that the ODE leads to from x = image + sigma eps, and not the mean of all that x may show;
        float32 [n, H, W, C]; sigma [n], from sigma_min to sigma_max."""
        return estimate(state.ema['denoiser'], x, sigma, batch.get('label'))

    return Family(
        init,
        update,
        sample,
        evaluate,
        denoise=denoise,
        trajectory=trajectory,
        conditions=('label',) if conditional else (),
        divisor=divisor,
        free=('sample_steps', 'levels', 'clip'),
    )
