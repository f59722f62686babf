"""Distillation: the target against the steps written out, where a student starts, and runs of students."""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_same, context, main, metrics, path, random_weights

import jaxgen
from jaxgen import config as configs
from jaxgen import library, merging, options, sample
from jaxgen.contract import Family
from jaxgen.diffusion import distillation, processes
from jaxgen.diffusion.schedules import Schedule
from jaxgen.errors import UserError
from jaxgen.families import diffusion

RNG = np.random.default_rng(0)
PROGRESSIVE = {'steps': 4, 'teacher_steps': 2, 'spacing': '', 'shift': 1.0}


def estimate(x, t):
    """A teacher's estimate of x_0, which depends on x and on the time of each example."""
    t = t.t if isinstance(t, Schedule) else t
    return np.cos(1.0) * x / (1 + t[:, None]) + t[:, None] ** 2


def levels_from(process, section: dict, i: list[int]) -> Schedule:
    path = distillation.path_of(process, PROGRESSIVE | section)
    return Schedule(*(np.asarray(x, np.float32)[i].T for x in path))


def test_of_a_flow_the_target_is_the_mean_velocity_of_euler_steps():
    t = np.array([0.75, 0.25])  # of the third level and of the first, from which the last step leads to the data
    x = RNG.normal(size=(2, 5))
    there, small = x, 0.25 / 3
    for j in range(3):
        here = t - j * small
        there = there - small * (there - estimate(there, here)) / here[:, None]
    right = x + t[:, None] * (there - x) / 0.25  # x - t velocity, the velocity (x - there) / 0.25
    levels = levels_from(processes.flow(), {'teacher_steps': 3}, [2, 0])
    np.testing.assert_allclose(distillation.target(estimate, jnp.asarray(x), levels), right, rtol=1e-4, atol=1e-4)


def test_of_a_chain_one_step_of_the_target_leads_where_two_of_ddim_do():
    process = processes.linear(timesteps=40)
    x = RNG.normal(size=(1, 5))

    def ddim(x, x_0, i, j):
        """From step i of the chain to step j, by eps (Song et al. 2021, eq. 12)."""
        (a, b), (c, d) = ((float(at.alpha[0]), float(at.sigma[0])) for at in map(process.at, ([i], [j])))
        return c * x_0 + d * (x - a * x_0) / b

    process = process._replace(at=lambda t, at=process.at: at(np.asarray(t)))
    middle = ddim(x, estimate(x, np.array([29.0])), 29, 24)
    end = ddim(middle, estimate(middle, np.array([24.0])), 24, 19)
    levels = levels_from(process, {}, [2])
    assert levels.t[:, 0].tolist() == [29, 24, 19]
    target = distillation.target(estimate, jnp.asarray(x, jnp.float32), levels)
    np.testing.assert_allclose(ddim(x, np.asarray(target), 29, 19), end, rtol=1e-4, atol=1e-4)


def test_levels_of_the_teacher_lie_between_those_of_the_student():
    flow = distillation.path_of(processes.flow(), PROGRESSIVE)
    np.testing.assert_allclose(flow.t[1], [0.5, 0.375, 0.25])
    np.testing.assert_allclose(flow.t[0], [0.25, 0.125, 0])
    assert (flow.alpha[0, -1], flow.sigma[0, -1]) == (1, 0)
    shifted = distillation.path_of(processes.flow(), PROGRESSIVE | {'shift': 3.0})
    np.testing.assert_allclose(shifted.t[:, 0], [0.5, 0.75, 0.9, 1.0])  # 3 t / (1 + 2 t)
    chain = distillation.path_of(processes.linear(timesteps=8), PROGRESSIVE)
    assert chain.t.tolist() == [[1, 0, 0], [3, 2, 1], [5, 4, 3], [7, 6, 5]]
    vp = distillation.path_of(processes.vp(), PROGRESSIVE | {'steps': 1})
    assert vp.sigma[0, 0] > vp.sigma[0, 1] > vp.sigma[0, 2] == 0
    few = distillation.path_of(processes.linear(timesteps=8), PROGRESSIVE | {'steps': 8, 'teacher_steps': 3})
    x = jnp.asarray(RNG.normal(size=(8, 5)), jnp.float32)
    rows = Schedule(*(np.asarray(v, np.float32).T for v in few))  # steps between equal levels move nothing
    assert np.isfinite(distillation.target(estimate, x, rows)).all()
    with pytest.raises(UserError, match=r'config\.model\.distillation\.steps must be from 0 to timesteps 8'):
        distillation.path_of(processes.linear(timesteps=8), PROGRESSIVE | {'steps': 9})


LABELLED = {
    'conditioning': {'label': {'dropout': 0.1}},
    'network': {'channels': 8, 'multipliers': (1,), 'attention': ()},
}


def stage(**changes) -> Family:
    """A stage of this config.model that is never computed."""
    model = options.complete(diffusion.build, configs.make(family='diffusion', model=changes).model.to_dict(), 'model')
    return Family(None, None, None, None, config=json.dumps({'family': 'diffusion', 'model': model}))


@pytest.mark.parametrize(
    ('teacher', 'changes', 'message'),
    [
        (None, {}, r"name = 'guidance' needs config\.stages\.teacher"),
        (LABELLED | {'process': 'cosine'}, {}, r"process\.name = 'linear' here, 'cosine' there"),
        (
            LABELLED | {'network': {'channels': 16, 'multipliers': (1,), 'attention': ()}},
            {},
            r'network\.channels = 8 here, 16 there',
        ),
        (LABELLED | {'training': {'prediction': 'v'}}, {}, r"training\.prediction\.name = 'eps' here, 'v' there"),
        (LABELLED | {'conditioning': {}}, {}, r'conditioning\.label\.kind = \'class\' here, None there'),
        (LABELLED, {'distillation': {'scales': (1.0, 3.0)}}, r'is a range, and nothing here reads the scale'),
        (LABELLED, {'distillation': {'scales': (3.0, 1.0)}}, r'the least and the largest scale'),
        (LABELLED | {'guidance': {'conditions': ('label',), 'scales': (2.0,)}}, {}, r'one for each of'),
        (LABELLED, {'distillation': {'name': 'progressive'}, 'training': {'times': 'importance'}}, 'draws t from its'),
    ],
)
def test_teachers_that_a_model_cannot_learn_from(teacher, changes, message):
    model = {'distillation': {'name': 'guidance', 'scales': (2.0, 2.0)}}
    for name, section in {**LABELLED, **changes}.items():
        model[name] = {**model.get(name, {}), **section}
    stages = {} if teacher is None else {'teacher': stage(**teacher)}
    with pytest.raises(UserError, match=message):
        diffusion.build(context(classes=10, stages=stages), **model)


def test_a_student_starts_with_the_weights_of_its_teacher():
    weights = {'first': {'kernel': jnp.ones((2, 3))}, 'augment': {'kernel': jnp.ones(2)}}
    new = {'first': {'kernel': jnp.zeros((2, 3))}, 'guidance': {'linear2': {'kernel': jnp.zeros(4)}}}
    made = distillation.start(new, weights)
    assert_same(made, {'first': weights['first'], 'guidance': new['guidance']})
    for wrong in ({'first': {'kernel': jnp.zeros((2, 4))}}, {**new, 'last': {'bias': jnp.zeros(1)}}):
        with pytest.raises(UserError, match=r'the teacher\'s network has other weights: (first|last)'):
            distillation.start(wrong, weights)


LABEL = {'label': {'dropout': 0.2}}
UNET = {'name': 'unet', 'channels': 8, 'multipliers': (1,), 'attention': (), 'blocks': 1, 'groups': 4}
DIT = {'name': 'dit', 'channels': 16, 'blocks': 1, 'heads': 2}
# What a scale of guidance is read by, processes and predictions.
MODELS = {
    'chain': {'network': DIT, 'process': {'name': 'linear', 'timesteps': 20, 'beta_end': 0.5}},
    'learned variance': {'network': DIT, 'process': 'cosine', 'training': {'variance': 'learned'}},
    'vp': {'network': UNET, 'process': 'vp', 'training': {'prediction': 'v'}},
    'edm': {'network': UNET, 'process': 've', 'training': {'prediction': 'edm', 'times': 'lognormal'}},
    'flow': {
        'network': {'name': 'flux', 'channels': 16, 'heads': 2, 'blocks': 1, 'single_blocks': 1, 'axes': (2, 2, 4)},
        'process': 'flow',
        'training': {'prediction': 'flow'},
    },
}
SCALES = (1.0, 2.0, 3.5)


def pair(name: str, scale: float = 1.0):
    """(teacher, frozen, model of a student, its Family) of a name in MODELS, the teacher with random weights and guided
    by this scale."""
    flux = MODELS[name]['network']['name'] == 'flux'
    given = MODELS[name] | {'conditioning': LABEL, 'guidance': {'scale': scale}, 'sampler': {'clip': False}}
    given['network'] = given['network'] | ({'distilled': False} if flux else {})
    complete = options.complete(diffusion.build, given, 'model')
    at = context(classes=10)
    teacher = diffusion.build(at, **complete)._replace(config=json.dumps({'family': 'diffusion', 'model': complete}))
    batch = {'image': jnp.zeros((2, 8, 8, 1)), 'label': jnp.array([1, 2])}
    state = jax.jit(teacher.init)(jax.random.key(0), batch, {})
    frozen = {'teacher': (state.replace(ema=random_weights(state.ema, scale=0.4)), {})}
    over = distillation.distilled_of({'model': complete}, 'a run')['model']
    sections = options.complete(diffusion.build, options.update(diffusion.build, complete, over), 'model')
    at = at._replace(stages={'teacher': teacher})
    model = diffusion.bind(at, sections)
    student = diffusion.build(at, **sections)
    return teacher, frozen, model._replace(distillation=diffusion.distillation_of(model, at, sections)), student


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_a_student_starts_as_its_teacher_without_guidance_and_learns_it_guided(name):
    teacher, frozen, model, student = pair(name)
    process, n, label = model.formulation.process, len(SCALES), jnp.array([1, 5, 9])
    t = jnp.array([3, 6, 9]) if process.steps else jnp.array([0.2, 0.3, 0.4]) * process.end
    x_0, eps = (jnp.asarray(RNG.normal(size=(n, 8, 8, 1)), jnp.float32) for _ in range(2))
    alpha, sigma = processes.coefficients(process, t, x_0)
    x, ratio = alpha * x_0 + sigma * eps, (sigma / alpha).reshape(-1)
    close = {'rtol': 2e-3, 'atol': 2e-3}
    batch = {'image': x_0, 'label': label}
    state = jax.jit(student.init)(jax.random.key(1), batch, frozen)
    # What a run is to other stages is another way to its estimates.
    alone = teacher.denoise(*frozen['teacher'], batch, x / alpha, ratio)
    np.testing.assert_allclose(student.denoise(state, frozen, batch, x / alpha, ratio), alone, **close)
    scale = jnp.array(SCALES)
    values = {'label': label, 'distilled_guidance': scale}
    taught = diffusion.taught(model, frozen, values, scale, jax.random.key(0), t, x_0, eps)
    np.testing.assert_allclose(alpha * taught[1] + sigma * taught[2], x, **close)
    for i, w in enumerate(SCALES):
        one = {'label': label[i : i + 1]}
        guided = pair(name, w)[0].denoise(*frozen['teacher'], one, (x / alpha)[i : i + 1], ratio[i : i + 1])
        np.testing.assert_allclose(taught[1][i : i + 1], guided, **close)
        assert w == 1 or abs(guided - alone[i]).max() > 3 * close['atol']


CHANGES = {'data.batch': 8, 'train.steps': 4, 'train.save_every': 2, 'train.log_every': 1, 'train.sample_every': 0}
CHANGES |= {'optim.warmup': 0, 'optim.lr': 1e-3, 'sample.batch': 4}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A tiny run with labels."""
    fields = {'data.features': ('image', 'label'), 'model.conditioning': LABEL, 'model.guidance.scale': 2.0}
    fields |= {'train.steps': 2, 'train.sample_every': 0}
    folder = tmp_path_factory.mktemp('runs') / 'base'
    library.train(library.config(configs.load(path('flow_digits')), **fields), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['distilled', 'few'])
def test_an_interrupted_student_is_the_uninterrupted_one(base, tmp_path, variant):
    config = library.config(f'{base}:{variant}', **CHANGES)
    assert config.data.source == 'digits'  # the teacher's
    library.train(config, tmp_path / 'whole')
    for steps in (2, 4):
        library.train(library.config(config, **{'train.steps': steps}), tmp_path / 'parts')
    assert_same(*(jaxgen.load(tmp_path / name).state.ema for name in ('whole', 'parts')))
    assert metrics(tmp_path / 'parts') == metrics(tmp_path / 'whole')
    if variant == 'few':  # a student is a teacher
        again = library.config(f'{tmp_path}/whole:few', **CHANGES | {'train.steps': 1})
        library.train(again, tmp_path / 'again')
        assert again.model.sampler.steps == 4 and np.isfinite(metrics(tmp_path / 'again')[0]['loss'])
        return
    student = jaxgen.load(tmp_path / 'whole')
    # The scale compiles nothing, and samples without the teacher are the same.
    other = student.with_sampling(guidance={'distilled': 3.0})
    assert sample.program(other.assembled.family) is sample.program(student.assembled.family)
    merging.merge(student, str(tmp_path / 'alone'))
    alone = jaxgen.load(tmp_path / 'alone')
    assert not alone.config.stages
    np.testing.assert_array_equal(alone.sample(4), student.sample(4))


@pytest.mark.slow
def test_mistakes_in_a_command(base, tmp_path):
    done = main(
        f'--config={base}:distilled', f'--config.stages.teacher={tmp_path}/nowhere', f'--workdir={tmp_path}/run'
    )
    assert (
        done.returncode == 2 and f'config.stages.teacher: no run in {tmp_path}/nowhere' in done.stderr.splitlines()[-1]
    )
    assert not os.path.exists(tmp_path / 'run' / 'checkpoints')
