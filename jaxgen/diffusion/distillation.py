"""Distillation: a network learns to do in one evaluation what a trained one, its teacher, does in several.

The teacher is `config.stages.teacher`, a diffusion run of the same process, latents and conditions. From x_t of the
data it goes down k noise levels of the probability-flow ODE to x_s, by DDIM (for a flow Euler's method), guided by a
scale w. The student is trained towards the x_0 from which one such step leads there,

    target = (x_s - sigma_s / sigma_t x_t) / (alpha_s - sigma_s / sigma_t alpha_t)

(Salimans & Ho 2022, arXiv 2202.00512, algorithm 2, with any k in place of 2).

    distillation  t            s                        k              student
    guidance      as in        the data: the target is  1              any sampler, one evaluation a step in place of
                  training     the guided estimate                     two (Meng et al. 2022, arXiv 2210.03142, 3.1)
    progressive   one of N     the student's next one   teacher_steps  N steps of DDIM or Euler (there 3.2)
                  levels

Where w is drawn from a range the student reads it: by `network.distilled` of FLUX, or, for other networks, by the
condition `distilled_guidance`. What it reads it by is zero at first, so that it starts as its teacher without guidance.
The teacher's own stages are those of this run with the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgen.diffusion import adapters as adapting
from jaxgen.diffusion import levels as noise_levels
from jaxgen.diffusion import samplers
from jaxgen.diffusion.conditioning import DISTILLED, Conditioning, droppable, names
from jaxgen.diffusion.guidance import Guidance
from jaxgen.diffusion.processes import CHAINS, Process, expanded
from jaxgen.diffusion.schedules import SPACINGS, Schedule
from jaxgen.errors import UserError
from jaxgen.options import Component, Count, OneOf, Positive, Rule

Array = jax.Array

TEACHER = 'teacher'  # its stage
SHARED = ('process', 'latent_scale', 'latent_shift')  # of config.model, which are the teacher's
OWN = ('network', 'training', 'conditioning', 'sampler', 'guidance')  # that the teacher has of its own
# Weights that a student may have beside those of its teacher, and a teacher beside those of its student.
EXTRA = ('guidance', DISTILLED, 'augment')
LEAST_SIGMA = 1e-6  # of those that are divided by

Scales = Annotated[
    tuple[float, ...],
    '[0, inf)',
    Rule(lambda w: not w or (len(w) == 2 and w[0] <= w[1]), "the least and the largest scale, or () for the teacher's"),
]


def guidance(*, scales: Scales = (), initialise: bool = True) -> None:
    """The guided estimate in one evaluation, at all noise levels.

    Args:
      scales: w is drawn evenly between these, the least and the largest; (): the teacher is guided as its own run says,
        and one scale needs nothing that reads it.
      initialise: the student starts with the teacher's averaged weights. Else its network may be another.
    """


def progressive(
    *,
    steps: Count = 4,
    teacher_steps: Count = 2,
    spacing: Annotated[str, OneOf('', *SPACINGS, 'karras')] = '',
    shift: Positive = 1.0,
    scales: Scales = (),
    initialise: bool = True,
) -> None:
    """Several steps in one, between the few noise levels that the student's samples visit.

    Args:
      steps: N, noise levels of the student. Sample with as many (`sampler.steps`), of the same spacing and shift.
      teacher_steps: k, steps of the teacher in one of the student's.
      spacing: of the levels, see `sampler`; '': 'trailing' of a chain, 'uniform' in continuous time.
      shift: of process 'flow', see `sampler`.
      scales: w is drawn evenly between these, the least and the largest; (): the teacher is guided as its own run says,
        and one scale needs nothing that reads it.
      initialise: the student starts with the teacher's averaged weights. Else its network may be another.
    """


COMPONENT = Component({'none': None, 'guidance': guidance, 'progressive': progressive})


class Distillation(NamedTuple):
    """A distillation bound to its teacher."""

    teacher: Any  # the Model of the teacher's run
    scales: tuple[float, ...]
    initialise: bool
    levels: Schedule | None  # [N, k + 1], the levels that the teacher visits from each of the student's; None: t is
    # drawn as in training, and the teacher's estimate is the target


def sections_of(family: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """config.model of the teacher's run.

    Args:
      family: of its stage.
      given: the complete sections of config.model here.

    Raises:
      UserError: it is no diffusion run, a part of one, or a model that this one cannot learn from.
    """
    where, about = f'config.stages.{TEACHER}', adapting.built_of(family)
    if about.get('family') != 'diffusion':
        raise UserError(f'{where} must be a diffusion run: a student learns what its sampler does')
    model = about['model']
    for section in ('adapter', 'controlnet'):
        if model[section]['name'] != 'none':
            raise UserError(f'{where} is the run of part of a network, config.model.{section}: name a whole one')
    if model['guidance']['classifier_scale']:
        raise UserError(f'{where} is guided by a classifier: its own guidance alone can be distilled')
    same = (*SHARED, 'conditioning', *(('network',) if given['distillation']['initialise'] else ()))
    here, there = (compared(one, same) for one in (given, model))
    if given['distillation']['initialise']:
        for fields, one in ((here, given), (there, model)):
            own = {name: one['training'][name] for name in adapting.SAME_TRAINING}
            fields |= adapting.flat_fields(own, '.training')
    wrong = [path for path in sorted(here.keys() | there.keys()) if here.get(path) != there.get(path)]
    if wrong:
        path = min(wrong, key=lambda path: not path.endswith(('.name', '.kind')))
        raise UserError(
            f'{where} is a run of another model: config.model{path} = {here.get(path)!r} here, {there.get(path)!r} '
            'there; --config=RUN:distilled or RUN:few takes all of it from the run'
        )
    return {name: model[name] for name in (*SHARED, *OWN)}


def compared(model: Mapping[str, Any], sections: tuple[str, ...]) -> dict[str, Any]:
    """{path: value} of the fields of sections in which student and teacher must be the same: all but rates of dropout,
    and what the scale of guidance is read by."""
    flat = adapting.flat_fields({name: model[name] for name in sections})
    left_out = f'.conditioning.{DISTILLED}.'
    return {
        path: list(value) if isinstance(value, tuple) else value
        for path, value in flat.items()
        if not (path.endswith('dropout') or path.startswith(left_out) or path == '.network.distilled')
    }


def bind(section: Mapping[str, Any], teacher: Any, process: Process, scale_is_read: bool, importance: bool):
    """The Distillation of a complete section.

    Args:
      teacher: its Model.
      scale_is_read: by the student.
      importance: t is drawn by the size of its loss.

    Raises:
      UserError: a range of scales that the student does not read, or that the teacher has not; levels that the process
        does not have.
    """
    where, scales = 'config.model.distillation', tuple(section['scales'])
    guidance = teacher.guidance
    if scales and scales[0] < scales[1] and not scale_is_read:
        raise UserError(
            f'{where}.scales = {scales} is a range, and nothing here reads the scale: config.model.network.distilled = '
            f"True of a 'flux', config.model.conditioning.{DISTILLED} = {{}} of other networks; or scales = ()"
        )
    if scales and not (reads_scale(teacher.conditioning) or droppable(teacher.conditioning)):
        raise UserError(
            f'{where}.scales = {scales}: the teacher has no guidance, since it never does without a condition: ()'
        )
    if scales and guidance.conditions:
        raise UserError(f'{where}.scales is one scale, and the teacher has one for each of {guidance.conditions}: ()')
    by_levels = section['name'] == 'progressive'
    if by_levels and importance:
        raise UserError(f"{where}: 'progressive' draws t from its levels: config.model.training.times = 'uniform'")
    levels = path_of(process, section) if by_levels else None
    return Distillation(teacher, scales, section['initialise'], levels)


def path_of(process: Process, section: Mapping[str, Any]) -> Schedule:
    """The levels [N, k + 1] that the teacher visits from each level of the student to the one below, evenly in t; below
    the first lies the data. Of a chain they are whole steps, some of which may be equal: nothing moves between these.

    Raises:
      UserError: levels that the process does not have.
    """
    spacing = section['spacing'] or ('trailing' if process.steps else 'uniform')
    visits = noise_levels.Visits(steps=section['steps'], spacing=spacing, shift=section['shift'])
    try:
        noise_levels.check('euler', {}, visits, process, False)
        t = noise_levels.levels_of(process, visits).t
    except UserError as e:
        raise UserError(str(e).replace('config.model.sampler', 'config.model.distillation')) from e
    below = np.append(-1 if process.steps else process.low, t[:-1])
    fractions = np.linspace(0, 1, section['teacher_steps'] + 1)
    times = t[:, None] + (below - t)[:, None] * fractions
    if process.steps:
        times = np.maximum(np.round(times), 0).astype(np.int32)
    at = process.at(times)
    alpha, sigma = np.array(at.alpha, np.float64), np.array(at.sigma, np.float64)
    alpha[0, -1], sigma[0, -1] = 1, 0
    return Schedule(times if process.steps else times.astype(np.float32), alpha, sigma)


def drawn(levels: Schedule, rng: Array, n: int) -> Schedule:
    """Levels [k + 1, n] of the teacher from levels of the student that are all equally likely."""
    i = jax.random.randint(rng, (n,), 0, len(levels.t))
    kinds = (None, jnp.float32, jnp.float32)
    return Schedule(*(jnp.asarray(x.T, kind)[:, i] for x, kind in zip(levels, kinds, strict=True)))


def at(levels: Schedule, i: int) -> Schedule:
    """Level i of a row of them."""
    return Schedule(*(values[i] for values in levels))


def to_data(process: Process, t: Array, x: Array) -> Schedule:
    """Levels [2, n]: that of t [n], and the data."""
    here = process.at(t)
    return Schedule(
        *(jnp.stack(pair) for pair in ((t, t), (here.alpha, jnp.ones(len(x))), (here.sigma, jnp.zeros(len(x)))))
    )


def scale_of(distillation: Distillation, rng: Array, n: int) -> Array:
    """w [n] of each example: what the student reads, if it reads one."""
    scales, own = distillation.scales, distillation.teacher.guidance
    if scales and scales[0] < scales[1]:
        return jax.random.uniform(rng, (n,), minval=scales[0], maxval=scales[1])
    said = own.distilled if reads_scale(distillation.teacher.conditioning) else own.scale
    return jnp.full(n, scales[0] if scales else said, jnp.float32)


def reads_scale(conditioning: Conditioning) -> bool:
    """Whether the network reads a scale of guidance."""
    return DISTILLED in names(conditioning)


def guidance_of(distillation: Distillation, scale: Array, x: Array) -> Guidance:
    """The teacher's guidance with w in place of its own scale, where it reads none and there is a range of them."""
    own = distillation.teacher.guidance
    if not distillation.scales or reads_scale(distillation.teacher.conditioning):
        return own
    return dataclasses.replace(own, scale=expanded(scale, x))


def values_of(teacher: Any, values: Mapping[str, Any], scale: Array) -> dict[str, Any]:
    """The values of the teacher's conditions, by the student's."""
    known = {**values, DISTILLED: scale}
    return {c.name: known[c.name] if c.name in known else c.absent(len(scale)) for c in teacher.conditioning}


def target(denoise: Callable, x: Array, levels: Schedule) -> Array:
    """The x_0 [n, ...] from which one step of DDIM from x leads to where the teacher comes to in k steps.

    Args:
      denoise: the teacher's, (x, t) -> x_0.
      x: [n, ...] at the first of the levels.
      levels: [k + 1, n].
    """

    def step(x: Array, pair: tuple[Schedule, Schedule]) -> tuple[Array, None]:
        here, there = pair
        ratio = expanded(there.sigma / jnp.maximum(here.sigma, LEAST_SIGMA), x)
        x_0 = samplers.estimate(denoise, x, here)[0]
        return ratio * x + (expanded(there.alpha, x) - ratio * expanded(here.alpha, x)) * x_0, None

    upper, lower = (Schedule(*(values[part] for values in levels)) for part in (slice(-1), slice(1, None)))
    end, _ = jax.lax.scan(step, x, (upper, lower))
    first, last = at(levels, 0), at(levels, -1)
    ratio = expanded(last.sigma / jnp.maximum(first.sigma, LEAST_SIGMA), x)
    return (end - ratio * x) / (expanded(last.alpha, x) - ratio * expanded(first.alpha, x))


def noise_of(x: Array, x_0: Array, alpha: Array, sigma: Array) -> Array:
    """The eps with which x = alpha x_0 + sigma eps."""
    return (x - alpha * x_0) / jnp.maximum(sigma, LEAST_SIGMA)


def start(params: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The student's weights before the first update: the teacher's, and its own where that has none.

    Args:
      params: of the network by its config, new.
      teacher: averaged weights of the teacher's.

    Raises:
      UserError: other weights differ than what the scale of guidance, or augmentation, is read by.
    """
    new, theirs = (flatten_dict(tree, sep='/') for tree in (params, teacher))
    for path in sorted(new.keys() | theirs.keys()):
        both = path in new and path in theirs
        if (both and new[path].shape != theirs[path].shape) or (not both and path.split('/')[0] not in EXTRA):
            here, there = (tree[path].shape if path in tree else None for tree in (new, theirs))
            raise UserError(
                f"config.model.distillation.initialise: the teacher's network has other weights: {path} is {there} "
                f'there and {here} here: give config.model the fields of the teacher, data with as many classes and '
                'channels, or set initialise to False'
            )
    return unflatten_dict({p: jnp.array(theirs.get(p, x), x.dtype) for p, x in new.items()}, sep='/')


def without(sections: dict[str, Any]) -> dict[str, Any]:
    """The sections of a config without a teacher: of a student that is trained."""
    stages = {name: path for name, path in sections['stages'].items() if name != TEACHER}
    return {**sections, 'stages': stages, 'model': {**sections['model'], 'distillation': 'none'}}


# --- tuning.py

ON_ITS_OWN = ('distilled', 'few')  # variants that are trained on the data of the run


def student_of(sections: dict[str, Any], run: str) -> dict[str, Any]:
    """What the config of a student has over that of its teacher: what it reads the scale by, no guidance of its own,
    and a rate for weights that are nearly right."""
    model = sections['model']
    own, flux, conditioning = model['guidance'], model['network']['name'] == 'flux', model['conditioning']
    reads = {'network': {'distilled': True}} if flux else {'conditioning': {DISTILLED: {'kind': 'guidance_scale'}}}
    has_scale = model['network'].get('distilled') or DISTILLED in conditioning
    scale = own['distilled'] if has_scale else own['scale']
    scale = scale if scale > 1 else 4.0
    guided = has_scale or any(section.get('dropout') for section in conditioning.values())
    off = dataclasses.asdict(Guidance(distilled=scale if guided else 1.0))
    scales = (1.0, 2 * scale) if guided else ()
    return {
        'stages': {TEACHER: run},
        'model': {**(reads if guided else {}), 'guidance': off, 'distillation': {'scales': scales}},
        'optim': {'name': 'adamw', 'lr': 1e-4, 'warmup': 100, 'clip': 1.0, 'ema': 0.999, 'ema_warmup': True},
        'train': {'steps': 5000, 'save_every': 500, 'sample_every': 1000, 'samples': 16},
    }


def distilled_of(sections: dict[str, Any], run: str) -> dict[str, Any]:
    """What the config of a student that is guided in one evaluation has over that of its teacher."""
    over = student_of(sections, run)
    over['model']['distillation'] = {'name': 'guidance', **over['model']['distillation']}
    return over


def few_of(sections: dict[str, Any], run: str) -> dict[str, Any]:
    """What the config of a student of four steps has over that of its teacher."""
    over, model = student_of(sections, run), sections['model']
    own = model['sampler']
    spacing = 'trailing' if model['process']['name'] in CHAINS else 'uniform'
    steps = {'steps': 4, 'spacing': spacing, 'shift': own['shift']}
    usual = dataclasses.asdict(noise_levels.Visits(clip=own['clip'], unit_start=own['unit_start']))
    over['model']['distillation'] = {
        'name': 'progressive',
        'teacher_steps': 4,
        **steps,
        **over['model']['distillation'],
    }
    over['model']['sampler'] = {'name': 'euler', **usual, **steps}
    return over
