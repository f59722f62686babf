"""Consistency models: schedules by hand, losses and gradients by a slow oracle, Gaussian data by closed forms."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxgen import options
from jaxgen.config import DEFAULTS
from jaxgen.contract import Context, Family
from jaxgen.diffusion.processes import expanded
from jaxgen.errors import UserError
from jaxgen.families import consistency
from jaxgen.networks.conditions import OneHot
from jaxgen.optim import make_optim

pytestmark = pytest.mark.slow  # compiles networks, trains or starts processes

UNET = {'name': 'unet', 'channels': 8, 'multipliers': (1, 2), 'blocks': 1, 'attention': (), 'dropout': 0.0}
TINY = {'network': UNET, 'discretisation': {'total_steps': 100, 'end_scales': 40}}
LOW, HIGH, DATA = 0.002, 80.0, 0.5
ENDS = LOW ** (1 / 7), HIGH ** (1 / 7)
MEAN, STD = 0.2, 0.15  # of the pixels of Gaussian data


def optim(**changes):
    return make_optim(10, **{**DEFAULTS['optim'], **changes})


def context(**changes):
    return Context((8, 8, 1), 0, optim())._replace(**changes)


def build(changes=None, **sections):
    return consistency.build(context(**(changes or {})), **{**TINY, **sections})


def data(n, seed=1):
    return jnp.asarray(MEAN + STD * np.random.default_rng(seed).normal(size=(n, 8, 8, 1)), jnp.float32)


def wide(a):
    return np.asarray(a, np.float64)[:, None, None, None]


# What Gaussian data make exact: the denoiser, and where the ODE leads from x at sigma (the distance from the mean falls
# as the standard deviation of x does).
def exact_denoise(x, sigma):
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def exact(x, sigma):
    return MEAN + (x - MEAN) * ((STD**2 + LOW**2) / (STD**2 + sigma**2)) ** 0.5


def exact_output(scaled, c_noise):
    """The output of a network whose consistency function is `exact`."""
    sigma = jnp.exp(4 * c_noise)[:, None, None, None]
    x, above = scaled * jnp.sqrt(sigma**2 + DATA**2), sigma - LOW
    skip, out = DATA**2 / (above**2 + DATA**2), DATA * above / jnp.sqrt(sigma**2 + DATA**2)
    return jnp.where(above < 1e-6, 0, (exact(x, sigma) - skip * x) / jnp.where(above < 1e-6, 1, out))


TEACHER = Family(
    None, None, None, None,
    denoise=lambda state, frozen, batch, x, sigma: exact_denoise(x, sigma[:, None, None, None]),
)  # fmt: skip
FROZEN = {'teacher': (None, {})}
PIXELS = dict(times='uniform', distance='l2', weighting='none')
DISTIL = dict(PIXELS, teacher={'initialise': False})


def constant(intervals):
    return {'name': 'constant', 'end_scales': intervals}


class Net(nn.Module):
    """In the network's place: any function of its inputs, plus a weight. Remembers its inputs."""

    output: Callable = staticmethod(lambda scaled, c_noise: jnp.sin(3 * scaled) + 0.1 * expanded(c_noise, scaled))
    noise: bool = False
    takes = ('vector',)
    inputs = []

    @nn.nowrap
    def class_embedding(self, classes):
        return OneHot(classes)

    @nn.compact
    def __call__(self, x, t, vector=None, *, train):
        drop = jax.random.normal(self.make_rng('dropout'), x.shape) if self.noise and train else 0 * x
        self.inputs.append((x, t, vector, train, drop))
        return self.output(x, t) + drop + self.param('w', nn.initializers.zeros, ())


@pytest.fixture
def stub(monkeypatch):
    """Puts a Net in the network's place; without jit, its inputs are numbers."""

    def put(**fields):
        monkeypatch.setattr(consistency.denoisers, 'make_module', lambda *_: Net(**fields))
        Net.inputs.clear()

    return put


def start(family, frozen=None, step=0):
    state = family.init(jax.random.key(0), {}, frozen or {})
    Net.inputs.clear()
    return state.replace(step=jnp.int32(step))


# N at chosen updates, by hand from the formulas of the papers.
BY_HAND = {
    # K' = floor(400000 / 8) = 50000
    ('doubling', 10, 1280, 400_000): {0: 11, 49_999: 11, 50_000: 21, 349_999: 641, 350_000: 1281, 399_999: 1281},
    # K' = floor(900 / 5) = 180
    ('doubling', 10, 160, 900): {0: 11, 179: 11, 180: 21, 360: 41, 540: 81, 720: 161, 899: 161},
    # floor(200 / 10) = 20, K' = floor(1000 / 5.32) = 187; 10 * 2^5 is cut to 200
    ('doubling', 10, 200, 1000): {0: 11, 186: 11, 187: 21, 748: 161, 934: 161, 935: 201, 999: 201},
    ('doubling', 4, 4, 10): {0: 5, 9: 5},
    # ceil(sqrt(0.5 * 22797 + 4) - 1) + 1 = ceil(105.78) + 1; the last: ceil(sqrt(22801 - 0.03) - 1) + 1 = 150 + 1
    ('sqrt', 2, 150, 800_000): {0: 2, 400_000: 107, 799_999: 151},
    # ceil(sqrt(k / 10 * 32 + 4) - 1) + 1: 2, 2.68, 3.22, ..., sqrt(32.8) = 5.73
    ('sqrt', 2, 5, 10): {0: 2, 1: 3, 2: 4, 3: 4, 4: 5, 5: 5, 6: 5, 7: 6, 8: 6, 9: 6},
    ('constant', 2, 17, 100): {0: 18, 99: 18},
}  # fmt: skip


def fields(name, start, end, updates):
    """The section of a discretisation."""
    rising = {} if name == 'constant' else {'start_scales': start, 'total_steps': updates}
    return {'name': name, 'end_scales': end, **rising}


def discretisation(*case):
    return consistency.made(consistency.DISCRETISATIONS, fields(*case))


@pytest.mark.parametrize('case', BY_HAND, ids=lambda case: '-'.join(map(str, case)))
def test_number_of_levels_by_hand(case):
    counts = discretisation(*case).count(np.arange(case[-1]))
    assert len(counts) == case[-1] and (np.diff(counts) >= 0).all()
    assert {k: counts[k] for k in BY_HAND[case]} == BY_HAND[case]


@pytest.mark.parametrize('case', [('doubling', 10, 160, 900), ('sqrt', 2, 5, 10)], ids=lambda case: case[0])
def test_update_follows_the_schedule_and_stays_at_its_end(case, stub):
    stub()
    family = build(discretisation=fields(*case))
    update, state = jax.jit(family.update), start(family)
    steps = {**BY_HAND[case], case[-1]: case[2] + 1, 10 * case[-1]: case[2] + 1}
    for step, n in steps.items():
        _, logs = update(state.replace(step=jnp.int32(step)), {}, {'image': data(2)}, jax.random.key(1))
        assert logs['levels'] == n, step


def karras(n):
    """EDM's levels, eq. 5, from the lowest."""
    return (ENDS[0] + np.arange(n) / (n - 1) * (ENDS[1] - ENDS[0])) ** 7


@pytest.mark.parametrize('intervals', [1, 10, 160])
def test_lognormal_intervals_have_the_probabilities_of_the_paper(intervals):
    mean, std, n = -1.1, 2.0, 200_000
    draw = jax.jit(lambda rng, m: consistency.lognormal(ENDS, mean=mean, std=std)(rng, n, m))
    counts = np.bincount(draw(jax.random.key(0), intervals), minlength=intervals)
    assert len(counts) == intervals
    p = np.diff(special.erf((np.log(karras(intervals + 1)) - mean) / (math.sqrt(2) * std)))
    p /= p.sum()

    def surprise(p):  # a normal number or so
        return (((counts - n * p) ** 2 / (n * p)).sum() - intervals + 1) / math.sqrt(2 * intervals)

    assert abs(surprise(p)) < 4
    if intervals > 1:
        assert surprise(np.full(intervals, 1 / intervals)) > 100
        wrong = np.diff(stats.norm.cdf(np.log(karras(intervals + 1)), -1.2, 2.0))
        assert surprise(wrong / wrong.sum()) > 6


def test_uniform_intervals():
    counts = np.bincount(consistency.uniform(ENDS)(jax.random.key(0), 40_000, jnp.int32(8)), minlength=8)
    assert len(counts) == 8 and np.abs(counts - 5000).max() < 4 * math.sqrt(5000)


def test_boundary_condition(stub):
    """f(x, sigma_min) = x to the last bit whatever the weights, and above it is something else."""
    stub()
    family = build()
    state = start(family).replace(ema={'denoiser': {'w': jnp.float32(0.3)}})
    x = data(3)
    np.testing.assert_array_equal(family.denoise(state, {}, {}, x, jnp.full(3, LOW)), x)
    for sigma in (0.1, 80.0):
        x_0 = family.denoise(state, {}, {}, x, jnp.full(3, sigma))
        np.testing.assert_allclose(x_0, function(sine, x, np.full(3, sigma), 0.3), atol=1e-5)
        assert jnp.abs(x_0 - x).max() > 1e-2


def function(output, x, sigma, w=0.0):
    """The consistency function of a network, from the paper's appendix C, float64."""
    x, sigma = np.asarray(x, np.float64), wide(sigma)
    skip = DATA**2 / ((sigma - LOW) ** 2 + DATA**2)
    out = DATA * (sigma - LOW) / np.sqrt(sigma**2 + DATA**2)
    values = output(x / np.sqrt(sigma**2 + DATA**2), np.log(sigma[:, 0, 0, 0]) / 4)
    return skip * x + out * (np.asarray(values, np.float64) + w)


def sine(scaled, c_noise):
    return np.sin(3 * scaled) + 0.1 * wide(c_noise)


FEATURES = Family(None, None, None, None, encode=lambda state, frozen, batch, rng: batch['image'].reshape(-1, 64))


def slow_distance(name, a, b):
    if name == 'perceptual':  # of FEATURES: the squared distance of two vectors of length 1
        a, b = (x.reshape(len(x), -1) / np.sqrt(np.square(x).sum((1, 2, 3)))[:, None] for x in (a, b))
        return np.square(a - b).sum(1)
    total = []
    for one in a - b:
        if name == 'l2':
            total.append(sum(v * v for v in one.ravel()) / one.size)
        elif name == 'l1':
            total.append(sum(abs(v) for v in one.ravel()) / one.size)
        else:
            c = 0.00054 * math.sqrt(one.size)
            total.append(math.sqrt(sum(v * v for v in one.ravel()) + c * c) - c)
    return np.array(total)


@pytest.mark.parametrize('target_decay', [0.0, 0.9])
@pytest.mark.parametrize('recipe', ['pseudo_huber-gap', 'l2-none', 'l1-none', 'l2-gap', 'perceptual-none'])
def test_loss_and_gradient_are_those_of_a_slow_oracle(recipe, target_decay, stub):
    """What is compared are neighbours of the N levels with one image and one noise; no gradient reaches the lower."""
    distance, weighting = recipe.split('-')
    stub()
    sgd = optim(name='sgd', lr=1.0, b1=0.0)
    stages = {'stages': {'perceptual': FEATURES}} if distance == 'perceptual' else {}
    frozen = {name: (None, {}) for name in stages.get('stages', {})}
    target = {'name': 'average', 'decay': target_decay} if target_decay else 'weights'
    family = build({'optim': sgd, **stages}, distance=distance, weighting=weighting, target=target)
    state, x_0, w, other = start(family, step=99), data(64), 0.2, -0.3
    state = state.replace(params={'denoiser': {'w': jnp.float32(w)}})
    if target_decay:
        state = state.replace(extra={'target': {'w': jnp.float32(other)}})
    after, logs = family.update(state, frozen, {'image': x_0}, jax.random.key(1))
    (scaled_low, noise_low, _, train_low, _), (scaled, noise, _, train, _) = Net.inputs
    assert train and train_low
    low, high = (np.exp(4 * np.asarray(t, np.float64)) for t in (noise_low, noise))
    levels = karras(41)  # start_scales 10, doubled twice
    index = np.abs(np.log(high)[:, None] - np.log(levels)).argmin(1)
    assert len(set(index)) > 15
    np.testing.assert_allclose(high, levels[index], rtol=1e-4)
    np.testing.assert_allclose(low, levels[index - 1], rtol=1e-4)
    x, x_low = (np.asarray(s) * np.sqrt(wide(v) ** 2 + DATA**2) for s, v in ((scaled, high), (scaled_low, low)))
    eps = (x - x_0) / wide(high)
    assert abs(eps.mean()) < 0.06 and abs(eps.std() - 1) < 0.05
    np.testing.assert_allclose(x_low, x_0 + wide(low) * eps, rtol=1e-3, atol=1e-3)

    expected = function(sine, x_low, low, other if target_decay else w)
    weight = 1 / (levels[index] - levels[index - 1]) if weighting == 'gap' else 1

    def loss(w):
        return (weight * slow_distance(distance, function(sine, x, high, w), expected)).mean()

    np.testing.assert_allclose(logs['loss'], loss(w), rtol=1e-3)
    slope = (loss(w + 1e-4) - loss(w - 1e-4)) / 2e-4
    np.testing.assert_allclose(w - after.params['denoiser']['w'], slope, rtol=5e-3)


def test_both_networks_drop_the_same(stub):
    stub(noise=True)
    family = build()
    state = start(family)
    family.update(state, {}, {'image': data(4)}, jax.random.key(1))
    (*_, first), (*_, second) = Net.inputs
    assert first.std() > 0.5
    np.testing.assert_array_equal(first, second)
    Net.inputs.clear()
    family.evaluate(state, {}, {'image': data(4), 'index': jnp.arange(4)}, jax.random.key(1))
    assert not any(train for _, _, _, train, _ in Net.inputs)


@pytest.mark.parametrize(('adapt', 'accumulate'), [(False, 1), (True, 1), (False, 2)])
def test_target_is_the_average_of_a_slow_loop(adapt, accumulate, stub):
    stub()
    sgd = optim(name='sgd', lr=0.1, b1=0.0, accumulate=accumulate, ema=0.5)
    average = {'name': 'average', 'decay': 0.8, 'adaptive': adapt}
    family = build({'optim': sgd}, target=average, discretisation=fields('sqrt', 2, 5, 10))
    state, target = start(family), 0.0
    update = jax.jit(family.update)
    for k in range(10):
        state, _ = update(state, {}, {'image': data(8, k)}, jax.random.key(k))
        n = BY_HAND['sqrt', 2, 5, 10][k]
        decay = math.exp(2 * math.log(0.8) / (n - 1)) if adapt else 0.8  # of the released code
        target = decay * target + (1 - decay) * float(state.params['denoiser']['w'])
    assert abs(target) > 1e-3 and target != pytest.approx(float(state.ema['denoiser']['w']), rel=0.01)
    assert float(state.extra['target']['w']) == pytest.approx(target, rel=1e-5)
    assert build().init(jax.random.key(0), {}, {}).extra is None


# Error of one step of the method between neighbours, squared: of Heun's in h^3, of Euler's in h^2. Without a teacher
# the neighbour is on another path, by as much as h times the noise.
@pytest.mark.parametrize(('solver', 'order'), [('heun', 6), ('euler', 4), ('alone', 2)])
def test_the_exact_function_has_the_loss_of_one_step_of_the_solver(solver, order, stub):
    stub(output=exact_output)
    changes, options = {'stages': {'teacher': TEACHER}}, {**PIXELS, 'teacher': {'initialise': False, 'solver': solver}}
    if solver == 'alone':
        changes, options = {}, PIXELS
    losses = []
    for intervals in (32, 64):
        family = build(changes, **options, discretisation=constant(intervals))
        _, logs = jax.jit(family.update)(start(family, FROZEN), FROZEN, {'image': data(4096)}, jax.random.key(1))
        losses.append(float(logs['loss']))
    assert abs(math.log2(losses[0] / losses[1]) - order) < 0.4, losses
    assert losses[1] < {'heun': 1e-8, 'euler': 1e-5, 'alone': 1e-3}[solver]
    stub()  # another function
    family = build(changes, **options, discretisation=constant(64))
    _, logs = family.update(start(family, FROZEN), FROZEN, {'image': data(64)}, jax.random.key(1))
    assert logs['loss'] > 5e-4


@pytest.mark.parametrize('levels', [(80.0,), (80.0, 0.5), (80.0, 5.0, 0.821)])
def test_samples_of_the_exact_function_have_the_moments_of_a_slow_loop(levels, stub):
    stub(output=exact_output)
    family = build(sampler={'levels': levels})
    x = jax.jit(family.sample)(start(family), {}, {'index': jnp.arange(512)}, jax.random.key(0))
    mean, variance = 0.0, HIGH**2
    for sigma in levels:
        if sigma < HIGH:
            variance += sigma**2 - LOW**2
        mean, shrunk = float(exact(mean, sigma)), (STD**2 + LOW**2) / (STD**2 + sigma**2)
        variance *= shrunk
    n = x.size
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(variance / n)
    assert abs(float(x.var()) / variance - 1) < 4 * math.sqrt(2 / n)
    # One step starts from noise without the image, and misses its mean by what is left of it; more steps do not.
    missed = {1: 4e-4, 2: 4e-4, 3: 1e-4}[len(levels)]
    assert abs(mean - MEAN) < missed and abs(math.sqrt(variance) / STD - 1) < 1e-3


def test_levels_of_a_sample(stub):
    stub()
    batch = {'index': jnp.arange(2)}
    for steps, expected in ((1, [80.0]), (2, [80.0, ((ENDS[0] + ENDS[1]) / 2) ** 7]), (4, karras(5)[:0:-1])):
        family = build(sampler={'steps': steps})
        state = start(family)
        x = family.sample(state, {}, batch, jax.random.key(0))
        assert not any(train for *_, train, _ in Net.inputs)
        by_levels = build(sampler={'levels': tuple(map(float, expected))})
        np.testing.assert_allclose(by_levels.sample(state, {}, batch, jax.random.key(0)), x, atol=1e-5)
        path = family.trajectory(state, {}, batch, jax.random.key(0))
        assert path['x'].shape == path['x_0'].shape == (steps, 2, 8, 8, 1)
        np.testing.assert_allclose(jnp.clip(path['x'][-1], -1, 1), x, atol=1e-5)
        assert jnp.abs(path['x_0']).max() <= 1
    # The noise is so much less as the estimate is taken to have.
    path = build(sampler={'levels': (80.0, 0.0025)}).trajectory(state, {}, {'index': jnp.arange(32)}, jax.random.key(0))
    assert abs(float((path['x'][0] - path['x_0'][0]).std()) / 0.0015 - 1) < 0.06  # (0.0025^2 - 0.002^2)^(1/2)
    unclipped = build(sampler={'clip': False})
    state = start(unclipped).replace(ema={'denoiser': {'w': jnp.float32(9.0)}})
    assert unclipped.trajectory(state, {}, batch, jax.random.key(0))['x'].max() > 2
    assert unclipped.sample(state, {}, batch, jax.random.key(0)).max() == 1


def test_the_average_is_what_samples_denoises_and_is_measured(stub):
    stub()
    family = build()
    state = start(family)
    batch = {'image': data(2), 'index': jnp.arange(2)}
    calls = [
        lambda s: family.sample(s, {}, batch, jax.random.key(0)),
        lambda s: family.denoise(s, {}, batch, batch['image'], jnp.ones(2)),
        lambda s: family.evaluate(s, {}, batch, jax.random.key(0))['reconstruction/2.5'],
    ]
    for call in calls:
        for field, changes in (('params', False), ('ema', True)):
            other = state.replace(**{field: {'denoiser': {'w': jnp.float32(0.3)}}})
            assert bool(jnp.abs(call(state) - call(other)).max() > 1e-3) == changes


@pytest.mark.parametrize('distil', [False, True])
def test_metrics_of_the_exact_function(distil, stub):
    stub(output=exact_output)
    family = build({'stages': {'teacher': TEACHER}} if distil else {}, **DISTIL, discretisation=constant(64))
    batch = {'image': data(2048), 'index': jnp.arange(2048)}
    metrics = jax.jit(family.evaluate)(start(family, FROZEN), FROZEN, batch, jax.random.key(0))
    assert set(metrics) == {'reconstruction/0.17', 'reconstruction/2.5', 'reconstruction/18', 'self_consistency'}
    for fraction in (0.25, 0.5, 0.75):
        sigma = (ENDS[0] + fraction * (ENDS[1] - ENDS[0])) ** 7
        r = math.sqrt((STD**2 + LOW**2) / (STD**2 + sigma**2))
        expected = STD**2 * (1 - r) ** 2 + sigma**2 * r**2
        values = metrics[f'reconstruction/{sigma:.2g}']
        assert abs(float(values.mean()) / expected - 1) < 4 * float(values.std()) / math.sqrt(2048) / expected
    # By one step of the teacher the neighbour is on the path, but for Heun's error.
    assert (metrics['self_consistency'].mean() < 1e-8) == distil


@pytest.mark.parametrize('distance', ['pseudo_huber', 'l2', 'l1'])
def test_vectors_are_images_of_another_shape(distance, stub):
    """With a network of single values: losses, samples and metrics are those of images of the same values."""
    stub()
    results = []
    for shape in ((8, 8, 1), (64,)):
        family = build({'image': shape}, distance=distance, sampler={'steps': 2})
        batch, state = {'image': data(4).reshape(4, *shape), 'index': jnp.arange(4)}, start(family)
        _, logs = family.update(state, {}, batch, jax.random.key(1))
        x = family.sample(state, {}, batch, jax.random.key(2))
        assert x.shape == (4, *shape)
        results.append((logs['loss'], x.reshape(4, 64), family.evaluate(state, {}, batch, jax.random.key(3))))
    chex.assert_trees_all_close(*results, rtol=1e-5)


def test_teacher_and_network_are_conditioned_on_the_class(stub):
    stub()
    calls = []

    def denoise(state, frozen, batch, x, sigma):
        calls.append((state, frozen, batch['label'], sigma))
        return exact_denoise(x, sigma[:, None, None, None])

    teacher = TEACHER._replace(denoise=denoise, conditions=('label',))
    family = build({'stages': {'teacher': teacher}, 'classes': 10}, **DISTIL, conditioning={'label': {}})
    assert family.conditions == ('label',)
    frozen = {'teacher': ('its state', 'its frozen')}
    label = jnp.array([3, 7])
    batch = {'image': data(2), 'label': label}
    state = family.init(jax.random.key(0), batch, frozen)
    Net.inputs.clear()
    family.update(state, frozen, batch, jax.random.key(0))
    assert len(calls) == 2  # Heun's two evaluations, at the two levels
    (_, low, *_), (_, high, *_) = ((t, jnp.exp(4 * t)) for _, t, *_ in Net.inputs)
    for (state, its, labels, sigma), expected in zip(calls, (high, low), strict=True):
        assert (state, its) == frozen['teacher']
        np.testing.assert_array_equal(labels, label)
        np.testing.assert_allclose(sigma, expected, rtol=1e-4)
    for _, _, vector, *_ in Net.inputs:
        np.testing.assert_array_equal(vector, jax.nn.one_hot(label, 10))


def test_a_condition_is_left_out_of_both_estimates_alike(stub):
    """With dropout, the class after the last stands for no class, for the network and its target in the same rows."""
    stub()
    family = build({'classes': 10}, conditioning={'label': {'dropout': 0.5}})
    batch = {'image': data(64), 'label': jnp.full(64, 3)}
    state = family.init(jax.random.key(0), batch, {})
    Net.inputs.clear()
    family.update(state, {}, batch, jax.random.key(0))
    (_, _, low, *_), (_, _, high, *_) = Net.inputs
    np.testing.assert_array_equal(low, high)
    classes, counts = np.unique(np.argmax(low, 1), return_counts=True)
    assert list(classes) == [3, 10] and counts.min() > 16


def test_starts_from_the_teachers_average(stub):
    stub()
    family = build({'stages': {'teacher': TEACHER}}, **PIXELS, target='average')
    # What a teacher with augmentation learned of it is left out.
    theirs = (
        build()
        .init(jax.random.key(5), {}, {})
        .replace(params=None, ema={'denoiser': {'w': jnp.float32(0.7), 'augment': {'kernel': jnp.ones((9, 4))}}})
    )
    frozen = {'teacher': (theirs, {})}
    state = family.init(jax.random.key(0), {}, frozen)
    for weights in (state.params['denoiser'], state.ema['denoiser'], state.extra['target']):
        assert weights['w'] == jnp.float32(0.7)
    # State is donated: what is frozen must not go with it.
    jax.jit(family.update, donate_argnums=0)(state, frozen, {'image': data(2)}, jax.random.key(1))
    assert theirs.ema['denoiser']['w'] == jnp.float32(0.7)
    assert (
        build({'stages': {'teacher': TEACHER}}, **DISTIL).init(jax.random.key(0), {}, frozen).params['denoiser']['w']
        == 0
    )


def test_a_teacher_of_another_network_is_refused_before_a_compile(no_compile):
    theirs = jax.eval_shape(build().init, jax.random.key(0), {}, {})
    changes = {'stages': {'teacher': TEACHER}}
    wider = build(changes, network={**UNET, 'channels': 16})
    for ema in (theirs.ema, {'generator': theirs.ema['denoiser']}):
        with pytest.raises(UserError, match=r'teacher\.initialise') as error:
            jax.eval_shape(wider.init, jax.random.key(0), {}, {'teacher': (theirs.replace(ema=ema), {})})
        assert '\n' not in str(error.value)
    free = build(changes, network={**UNET, 'channels': 16}, teacher={'initialise': False})
    jax.eval_shape(free.init, jax.random.key(0), {}, {'teacher': (theirs, {})})


class Pixels(nn.Module):
    """A network of each pixel alone, as Gaussian pixels need."""

    @nn.compact
    def __call__(self, x, t, *, train):
        h = jnp.concatenate([x, 0 * x + t[:, None, None, None]], -1)
        for _ in range(2):
            h = nn.silu(nn.Dense(32)(h))
        return nn.Dense(1, kernel_init=nn.initializers.zeros)(h)


@pytest.mark.parametrize('distil', [True, False])
def test_training_brings_a_network_to_the_exact_function(distil, monkeypatch):
    monkeypatch.setattr(consistency.denoisers, 'make_module', lambda *_: Pixels())
    changes = {'optim': optim(lr=6e-3, ema=0.9), 'stages': {'teacher': TEACHER} if distil else {}}
    options = {'discretisation': fields('doubling', 5, 20, 200)}
    if distil:
        options = DISTIL | {'target': {'name': 'average', 'decay': 0.5}, 'discretisation': constant(20)}
    family = build(changes, **options)
    sigma = jnp.asarray(karras(21)[4:])
    eps = jnp.asarray(np.random.default_rng(7).normal(size=(17, 8, 8, 1)), jnp.float32)
    x = data(17) + sigma[:, None, None, None] * eps

    def error(state):
        x_0 = family.denoise(state, {}, {}, x, sigma)
        return float(jnp.square(x_0 - exact(x, sigma[:, None, None, None])).mean())

    @jax.jit
    def updates(state, key):
        def one(state, key):
            rng, noise = jax.random.split(key)
            image = MEAN + STD * jax.random.normal(noise, (16, 8, 8, 1))
            return family.update(state, FROZEN, {'image': image}, rng)

        return jax.lax.scan(one, state, jax.random.split(key, 200))

    state = jax.jit(family.init)(jax.random.key(0), {}, FROZEN)
    before = error(state)
    state, logs = updates(state, jax.random.key(1))
    assert error(state) < 0.1 * before
    assert not distil or logs['loss'][-10:].mean() < 0.3 * logs['loss'][:10].mean()


def test_defaults_are_the_improved_recipe():
    assert options.complete(consistency.build, {}, 'model') | {'network': None} == dict(
        network=None, conditioning={}, sigma_min=0.002, sigma_max=80.0, data_std=0.5,
        discretisation=dict(name='doubling', start_scales=10, end_scales=1280, total_steps=1000),
        times=dict(name='lognormal', mean=-1.1, std=2.0), distance=dict(name='pseudo_huber', huber=0.00054),
        weighting='gap', target=dict(name='weights'), teacher=dict(solver='heun', initialise=True),
        sampler=dict(steps=1, levels=(), clip=True),
    )  # fmt: skip
    # Song et al. 2023, CIFAR-10: training, and distillation.
    training, distillation = consistency.sqrt(), consistency.constant()
    assert (training.start, training.end) == (2, 150) and distillation.end == 17


@pytest.mark.parametrize(('discretisation', 'first'), [('doubling', 11), ('sqrt', 2), ('constant', 18)])
def test_numbers_of_levels_are_those_of_the_discretisations_own_paper(discretisation, first, stub):
    stub()
    family = consistency.build(context(), network=UNET, discretisation=discretisation)
    _, logs = jax.jit(family.update)(start(family), {}, {'image': data(2)}, jax.random.key(1))
    assert logs['levels'] == first


@pytest.mark.parametrize(
    ('options', 'changes', 'says'),
    [
        ({'network': 'mlp'}, {}, ['network', 'ncsnpp', 'mlp']),
        ({'network': 'refinenet'}, {}, ['network', 'ncsnpp', 'refinenet']),
        ({'discretisation': 'linear'}, {}, ['discretisation', 'doubling']),
        ({'discretisation': {'name': 'constant', 'start_scales': 2}}, {}, ['start_scales', 'no such field']),
        ({'distance': 'lpips'}, {}, ['distance', 'pseudo_huber', 'lpips']),
        ({'distance': 'perceptual'}, {}, ['distance', 'stages.perceptual', 'distance.lpips']),
        ({'distance': 'perceptual'}, {'stages': {'perceptual': TEACHER}}, ['stages.perceptual', 'features']),
        (
            {'distance': {'name': 'perceptual', 'lpips': ('lpips.pth',)}}, {'stages': {'perceptual': FEATURES}},
            ['stages.perceptual', 'model.distance.lpips', 'not both'],
        ),
        ({'weighting': 'snr'}, {}, ['weighting', 'gap']),
        ({'times': 'karras'}, {}, ['times', 'lognormal']),
        ({'teacher': {'solver': 'rk4'}}, {}, ['teacher.solver', 'heun']),
        ({'sigma_min': 0.0}, {}, ['sigma_min']),
        ({'sigma_max': 0.001}, {}, ['sigma_max']),
        ({'data_std': 0.0}, {}, ['data_std']),
        ({'distance': {'huber': 0.0}}, {}, ['distance.huber']),
        ({'distance': {'name': 'l2', 'huber': 0.1}}, {}, ['distance.huber', 'no such field']),
        ({'times': {'std': 0.0}}, {}, ['times.std']),
        ({'discretisation': {'start_scales': 0}}, {}, ['start_scales', '0']),
        ({'discretisation': {'start_scales': 50, 'end_scales': 40}}, {}, ['start_scales 50', 'end_scales 40']),
        ({'discretisation': {'name': 'sqrt', 'start_scales': 1}}, {}, ['start_scales', '2 or more', '1']),
        ({'discretisation': {'total_steps': 2}}, {}, ['total_steps', 'train.steps']),
        ({'discretisation': {'name': 'sqrt', 'total_steps': 0}}, {}, ['total_steps']),
        ({'target': {'name': 'average', 'decay': 1.0}}, {}, ['target.decay', '1.0']),
        ({'target': {'name': 'average', 'decay': 0.0}}, {}, ['target.decay', '0.0']),
        ({'target': {'adaptive': True}}, {}, ['target.adaptive', 'no such field']),
        ({'sampler': {'steps': 0}}, {}, ['sampler.steps', '0']),
        ({'sampler': {'levels': (0.5, 80.0)}}, {}, ['levels', 'fall']),
        ({'sampler': {'levels': (80.0, 80.0)}}, {}, ['levels']),
        ({'sampler': {'levels': (100.0, 1.0)}}, {}, ['levels', '100']),
        ({'sampler': {'levels': (80.0, 0.002)}}, {}, ['levels', 'sigma_min']),
        ({'sampler': {'levels': ('80',)}}, {}, ['levels']),
        ({'conditioning': {'label': {}}}, {}, ['conditioning.label', 'label']),
        ({}, {'image': (9, 9, 1)}, ['9', 'multiple of 2']),
        ({'network': {**UNET, 'dropout': 1.0}}, {}, ['dropout']),
        ({}, {'stages': {'teacher': TEACHER._replace(denoise=None)}}, ['teacher', 'denoise']),
        ({}, {'stages': {'teacher': TEACHER._replace(conditions=('label',))}}, ['teacher', 'label']),
    ],
)  # fmt: skip
def test_refuses_in_one_line(options, changes, says):
    with pytest.raises(UserError) as error:
        build(changes, **options)
    assert '\n' not in str(error.value)
    for part in says:
        assert re.search(part, str(error.value)), str(error.value)


@pytest.mark.parametrize('case', [('doubling', 10, 1280, 400), ('doubling', 2, 3, 5), ('sqrt', 2, 150, 999),
                                  ('sqrt', 2, 2, 7), ('constant', 1, 17, 3), ('doubling', 1, 1, 1)])  # fmt: skip
def test_starts_of_numbers_of_levels_are_those_of_the_whole_row(case):
    made = discretisation(*case)
    whole = np.unique(made.count(np.arange(case[-1])), return_index=True)
    for ours, expected in zip(consistency.first_updates(made), whole, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_two_billion_updates_need_no_row_of_two_billion():
    counts, starts = consistency.first_updates(discretisation('doubling', 10, 1280, 2_000_000_000))
    np.testing.assert_array_equal(counts, 10 * 2 ** np.arange(8) + 1)
    np.testing.assert_array_equal(starts, np.arange(8) * 250_000_000)
