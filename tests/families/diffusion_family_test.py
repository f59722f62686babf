"""The diffusion family: the target of its loss, what samples depend on, what build refuses.

Most models are written in the fields of runs that were saved before `config.model` had sections (see `sections`):
they are short, and so every test shows that such runs still load.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import config, options
from jaxgen.config import DEFAULTS
from jaxgen.contract import Context, Latents, Posterior
from jaxgen.diffusion import conditioning as conditions
from jaxgen.diffusion import guidance, levels, likelihood, objective, processes, samplers
from jaxgen.diffusion.former import diffusion_sections as sections
from jaxgen.diffusion.schedules import posterior
from jaxgen.errors import UserError
from jaxgen.families import diffusion
from jaxgen.networks import denoisers
from jaxgen.optim import make_optim

pytestmark = pytest.mark.slow  # compiles networks, trains or starts processes

UNET = {'channels': 8, 'multipliers': (1,), 'blocks': 1, 'attention': (), 'dropout': 0.0}
TINY = {'unet': UNET, 'timesteps': 20}


def context(**changes):
    return Context((8, 8, 1), 0, make_optim(10, **DEFAULTS['optim']))._replace(**changes)


def tiny(**options):
    """Jitted family with a state whose weights are all random."""
    return made(json.dumps(options))


@functools.cache
def made(text):
    """`tiny` of options as a text."""
    options = json.loads(text)
    labels = options.get('conditional', False)
    family = diffusion.build(context(classes=10 if labels else 0), **sections({**TINY, **options}))
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 1
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan), leaf.dtype)

    state = jax.eval_shape(family.init, jax.random.key(0), first_batch(family), {})
    state = jax.tree.map(draw, state)
    return family._replace(sample=jax.jit(family.sample), evaluate=jax.jit(family.evaluate)), state


def images(n, size=8):
    levels = np.random.default_rng(1).integers(0, 256, (n, size, size, 1))
    return jnp.asarray(levels / 127.5 - 1, jnp.float32)


def first_batch(family):
    """A batch of one example with the conditions that a family has."""
    label = {'label': jnp.zeros(1, jnp.int32)} if 'label' in family.conditions else {}
    return {'image': images(1), **label}


def stand_in(monkeypatch, module):
    """Puts a module in the place of every network."""
    monkeypatch.setattr(denoisers, 'make_module', lambda *_, **__: module)


class Label(nn.Module):
    """Embeds a label as itself."""

    def __call__(self, label):
        return label


class Base(nn.Module):
    """What a module needs to be a diffusion model's network."""

    takes = ('vector', 'planes')
    vector_features = 1

    @nn.nowrap
    def class_embedding(self, classes):
        return Label()


class Stub(Base):
    """A network that records its inputs; its output is a constant."""

    output: float = 0.0
    seen = []

    @nn.compact
    def __call__(self, x, t, vector=None, *, train):
        self.seen.append((x, t, train))
        return 0 * x + self.output + self.param('w', nn.initializers.zeros, ())


@pytest.mark.parametrize('prediction', ['eps', 'x0', 'v'])
def test_loss_shows_all_steps_evenly_and_asks_for_the_target(prediction, monkeypatch):
    stand_in(monkeypatch, Stub())
    family = diffusion.build(
        context(),
        **sections(dict(**{**TINY, 'timesteps': 4, 'beta_start': 0.3, 'beta_end': 0.9}, prediction=prediction)),
    )
    state = family.init(jax.random.key(0), first_batch(family), {})
    x_0 = images(4096)
    Stub.seen.clear()
    _, logs = family.update(state, {}, {'image': x_0}, jax.random.key(1))
    ((x_t, t, train),) = Stub.seen
    assert train
    assert np.unique(t).tolist() == [0, 1, 2, 3]
    assert np.bincount(t).min() > 4096 / 4 - 4 * np.sqrt(4096 * 3 / 16)
    alpha = np.sqrt(np.cumprod(1 - np.linspace(0.3, 0.9, 4)))[t][:, None, None, None]
    sigma = np.sqrt(1 - alpha**2)
    eps = (x_t - alpha * x_0) / sigma
    for step in range(4):
        assert abs(eps[t == step].mean()) < 0.02 and abs(eps[t == step].std() - 1) < 0.02
    wanted = {'eps': eps, 'x0': x_0, 'v': alpha * eps - sigma * x_0}[prediction]
    np.testing.assert_allclose(logs['loss'], np.square(wanted).mean(), rtol=1e-4)


def test_estimates_are_clipped(monkeypatch):
    """A network that says 'all noise is -1000' means x_0 far above 1."""
    stand_in(monkeypatch, Stub(-1000.0))
    family = diffusion.build(context(), **sections(TINY))
    state = family.init(jax.random.key(0), first_batch(family), {})
    x = family.sample(state, {}, {'index': jnp.arange(2)}, jax.random.key(1))
    np.testing.assert_array_equal(x, np.ones((2, 8, 8, 1)))
    assert not any(train for _, _, train in Stub.seen[-1:])


DDIM = {'conditional': True, 'sampler': 'ddim', 'sample_steps': 5, 'eta': 0.5, 'spacing': 'quadratic'}


def draw(family, state, part=slice(8), seed=0, labels=(0, 1, 2)):
    index = jnp.arange(8)
    batch = {'index': index} | ({'label': jnp.array(labels)[index % 3]} if family.conditions else {})
    return family.sample(state, {}, jax.tree.map(lambda a: a[part], batch), jax.random.key(seed))


@pytest.mark.parametrize('options', [{}, DDIM], ids=['ancestral', 'ddim'])
def test_a_sample_depends_on_seed_and_number_alone(options):
    family, state = tiny(**options)
    together = draw(family, state)
    assert together.shape == (8, 8, 8, 1) and together.dtype == jnp.float32
    assert jnp.abs(together).max() <= 1
    np.testing.assert_allclose(together[:4], draw(family, state, slice(4)), atol=1e-4)
    np.testing.assert_allclose(together[4:], draw(family, state, slice(4, 8)), atol=1e-4)
    assert jnp.abs(together[0] - together[3]).max() > 0.05
    assert jnp.abs(together - draw(family, state, seed=1)).max() > 0.05


def test_the_average_is_what_samples():
    family, state = tiny()
    x = draw(family, state)
    np.testing.assert_array_equal(x, draw(family, state.replace(params=jax.tree.map(jnp.zeros_like, state.params))))
    assert jnp.abs(x - draw(family, state.replace(ema=jax.tree.map(jnp.zeros_like, state.ema)))).max() > 0.05


def test_samples_follow_the_class():
    family, state = tiny(**DDIM)
    assert family.conditions == ('label',)
    x, y = draw(family, state), draw(family, state, labels=(0, 7, 2))
    changed = jnp.arange(8) % 3 == 1
    assert jnp.abs(x - y)[changed].max() > 1e-3
    np.testing.assert_array_equal(x[~changed], y[~changed])


def test_bits_of_an_example_are_its_own_and_follow_the_class():
    family, state = tiny(conditional=True, bound_steps=5)

    def bits(index, label=3):
        n = len(index)
        batch = {'image': images(10)[index], 'index': index, 'label': jnp.full(n, label)}
        return family.evaluate(state, {}, batch, jax.random.key(0))

    few, other = bits(jnp.arange(4)), bits(jnp.array([8, 3, 2, 9]))
    assert set(few) == {'bits_per_dim', 'bits_prior', 'bits_decoder'}
    assert (few['bits_per_dim'] > few['bits_prior'] + few['bits_decoder']).all()
    for name, values in few.items():
        assert values.shape == (4,)
        np.testing.assert_allclose(values[2:4], other[name][2:0:-1], rtol=1e-3)
    assert jnp.abs(few['bits_per_dim'] - bits(jnp.arange(4), label=4)['bits_per_dim']).min() > 0


def build(**options):
    conditional = options.get('conditional', False)
    return diffusion.build(context(classes=10 if conditional else 0), **sections({**TINY, **options}))


def test_labels_are_left_out_and_guidance_asks_for_none(monkeypatch):
    """The class after the last stands for no label: a fraction of them in training, half of a guided batch."""
    seen = []

    class Net(Base):
        @nn.compact
        def __call__(self, x, t, vector=None, *, train):
            seen.append(vector)
            return 0 * x + self.param('w', nn.initializers.zeros, ())

    stand_in(monkeypatch, Net())
    family = build(conditional=True, label_dropout=0.25, guidance=2.0)
    state = family.init(jax.random.key(0), first_batch(family), {})
    batch = {'image': images(2048), 'label': jnp.full(2048, 3)}
    seen.clear()
    family.update(state, {}, batch, jax.random.key(1))
    (label,) = seen
    assert set(np.unique(label)) == {3, 10} and abs((label == 10).mean() - 0.25) < 0.04
    seen.clear()
    with jax.disable_jit():
        family.sample(state, {}, {'index': jnp.arange(2), 'label': jnp.array([4, 5])}, jax.random.key(1))
    np.testing.assert_array_equal(seen[0], [4, 5, 10, 10])


def test_upsampling_shows_the_small_image(monkeypatch):
    """Beside x_t, enlarged by linear interpolation; in a guided batch twice; in samples it is a condition."""
    stand_in(monkeypatch, Half())
    Half.seen.clear()
    family = build(upsampling=True, conditional=True, label_dropout=0.1, guidance=2.0, sample_steps=2, bound_steps=3)
    assert family.conditions == ('label', 'low_resolution') and family.encode is None
    small = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (5, 4, 4, 1)), jnp.float32)
    batch = {'image': images(5), 'label': jnp.arange(5), 'low_resolution': small, 'index': jnp.arange(5)}
    state = family.init(jax.random.key(0), batch, {})
    assert Half.seen[-1].shape == (1, 8, 8, 2)
    # Between pixels of twice the size lie a quarter and three quarters; at the edge the pixel itself.
    padded = np.pad(small, [(0, 0), (1, 1), (1, 1), (0, 0)], mode='edge')
    rows = np.stack([padded[:, :-2] + 3 * padded[:, 1:-1], 3 * padded[:, 1:-1] + padded[:, 2:]], 2) / 4
    rows = rows.reshape(5, 8, 6, 1)
    wanted = np.stack([rows[:, :, :-2] + 3 * rows[:, :, 1:-1], 3 * rows[:, :, 1:-1] + rows[:, :, 2:]], 3) / 4
    wanted = wanted.reshape(5, 8, 8, 1)
    family.update(state, {}, batch, jax.random.key(1))
    np.testing.assert_allclose(Half.seen[-1][..., 1:], wanted, atol=1e-6)
    with jax.disable_jit():
        family.sample(state, {}, {k: batch[k] for k in ('index', *family.conditions)}, jax.random.key(1))
    np.testing.assert_allclose(Half.seen[-1][..., 1:], np.tile(wanted, (2, 1, 1, 1)), atol=1e-6)
    assert family.evaluate(state, {}, batch, jax.random.key(1))['bits_per_dim'].shape == (5,)
    with pytest.raises(UserError, match='low_resolution'):
        family.init(jax.random.key(0), {'image': images(5), 'label': jnp.arange(5)}, {})


class Half(Base):
    """A network that remembers what it was shown and puts out half as many channels."""

    seen = []

    @nn.compact
    def __call__(self, x, t, vector=None, *, train):
        self.seen.append(x)
        return 0 * x[..., :1] + self.param('w', nn.initializers.zeros, ())


def test_lognormal_times(monkeypatch):
    """EDM: log sigma is normal, and what the network is told is a quarter of it."""
    stand_in(monkeypatch, Stub())
    family = build(
        process='ve', sigma_min=0.002, sigma_max=80.0, prediction='edm', times='lognormal', variance='fixed_small',
        sampler='heun', spacing='karras', sample_steps=4,
    )  # fmt: skip
    state = family.init(jax.random.key(0), first_batch(family), {})
    Stub.seen.clear()
    _, logs = family.update(state, {}, {'image': images(4096)}, jax.random.key(1))
    ((x, told, _),) = Stub.seen
    assert abs(4 * told.mean() + 1.2) < 0.06 and abs(4 * told.std() - 1.2) < 0.05
    # Uniform pixels have a variance of 1/3 where 1/4 is expected: what the network sees is nearly of variance 1.
    assert 0.9 < float(jnp.square(x).mean()) < 1.35 and 0.9 < logs['loss'] < 1.35


@pytest.mark.parametrize(('times', 'mean', 'std'), [('lognormal', -1.2, 1.2), ('logit_normal', 0.0, 1.0)])
def test_times_have_the_moments_of_their_own_paper(times, mean, std, monkeypatch):
    """EDM's log(sigma) and SD3's log(t / (1 - t)), where nothing else is given."""
    stand_in(monkeypatch, Stub())
    for given in ({}, {'time_mean': 0.5, 'time_std': 0.25}):
        family = build(process='flow', prediction='flow', variance='fixed_small', sampler='euler', times=times, **given)
        state = family.init(jax.random.key(0), first_batch(family), {})
        Stub.seen.clear()
        family.update(state, {}, {'image': images(4096)}, jax.random.key(1))
        t = Stub.seen[0][1] / 1000
        drawn = jnp.log(t / (1 - t))  # of a flow sigma / alpha is t / (1 - t)
        wanted = (0.5, 0.25) if given else (mean, std)
        assert abs(drawn.mean() - wanted[0]) < 0.06 and abs(drawn.std() - wanted[1]) < 0.05


@pytest.mark.parametrize('process', ['linear', 'vp', 'flow', 've'])
def test_fourier_features_are_shown_logarithms(process, monkeypatch):
    section = {'channels': 8, 'multipliers': (1,), 'blocks': 1, 'attention': (), 'embedding': 'fourier'}
    stand_in(monkeypatch, Stub())
    prediction = 'flow' if process == 'flow' else 'eps'
    family = build(network='ncsnpp', ncsnpp=section, process=process, prediction=prediction, variance='fixed_small')
    state = family.init(jax.random.key(0), first_batch(family), {})
    Stub.seen.clear()
    family.update(state, {}, {'image': images(512)}, jax.random.key(1))
    ((_, told, _),) = Stub.seen
    assert jnp.isfinite(told).all() and jnp.abs(told).max() < 12 and told.min() < -1


@pytest.mark.parametrize(('rescale', 'last'), [(False, 19), (True, 950)])
def test_rescaled_timesteps(rescale, last, monkeypatch):
    """improved-diffusion's default embeds t 1000 / T, so that 20 steps look like 1000."""
    stand_in(monkeypatch, Stub())
    family = build(rescale_timesteps=rescale)
    state = family.init(jax.random.key(0), first_batch(family), {})
    Stub.seen.clear()
    family.update(state, {}, {'image': images(512)}, jax.random.key(1))
    assert Stub.seen[0][1].max() == last


class Velocity(Base):
    """A velocity that is the label over 10, and 0 without one."""

    @nn.compact
    def __call__(self, x, t, vector=None, *, train):
        scale = jnp.where(vector == 10, 0, vector / 10)[:, None, None, None]
        return 0 * x + scale + self.param('w', nn.initializers.zeros, ())


@pytest.mark.parametrize('options', [
    {'process': 'flow', 'prediction': 'flow', 'variance': 'fixed_small', 'sampler': 'euler'},
    {'process': 'linear', 'prediction': 'flow', 'zero_terminal': True, 'sampler': 'ddim', 'spacing': 'trailing'},
], ids=['flow', 'zero_terminal'])  # fmt: skip
@pytest.mark.parametrize('steps', [1, 4])
def test_guidance_guides_every_level(options, steps, monkeypatch):
    """With a scale of 3 the network's constant output counts three times at every level, that of alpha 0 too."""
    stand_in(monkeypatch, Velocity())
    options = {**options, 'conditional': True, 'label_dropout': 0.1, 'clip': False, 'sample_steps': steps}
    one, three = build(**options), build(**options, guidance=3.0)
    capped = build(**options, guidance=3.0, guidance_to=1e8)
    state = one.init(jax.random.key(0), first_batch(one), {})

    def last(family, label):
        seen = family.trajectory(state, {}, {'index': jnp.arange(2), 'label': jnp.full(2, label)}, jax.random.key(1))
        return seen['x_0'][0] if steps > 1 else seen['x'][0]

    plain = last(one, 0)
    moved = last(one, 2) - plain
    np.testing.assert_allclose(moved, -0.2 * jnp.ones_like(moved), rtol=1e-4)  # x_0 = x - output at alpha 0
    np.testing.assert_allclose(last(three, 2) - plain, 3 * moved, rtol=1e-4)
    np.testing.assert_allclose(last(capped, 2) - plain, moved, rtol=1e-4)


@pytest.mark.parametrize('sampler', ['euler', 'euler_ancestral', 'heun', 'dpm_solver_pp', 'unipc', 'euler_maruyama'])
@pytest.mark.parametrize('prediction', ['v', 'edm'])
def test_every_solver_starts_at_alpha_0(sampler, prediction):
    """A chain of zero terminal SNR goes with every solver and prediction that has a limit there."""
    family, state = tiny(
        zero_terminal=True, prediction=prediction, sampler=sampler, spacing='trailing', sample_steps=4, beta_end=0.5
    )
    x = draw(family, state)
    assert jnp.isfinite(x).all() and jnp.abs(x[0] - x[1]).max() > 1e-3


def test_classifier_guidance_at_alpha_0():
    """A flow's first step is guided too: by the toy's shift at sigma / alpha = 100, its limit."""
    options = {'unet': UNET, 'process': 'flow', 'prediction': 'flow', 'variance': 'fixed_small', 'sampler': 'euler'}
    _, state = tiny(**{k: v for k, v in options.items() if k != 'unet'})
    drawn = {}
    for scale in (0.0, 1.0):
        family = diffusion.build(
            context(classes=2, stages={'classifier': toy_classifier(0.01)}),
            **sections({**options, 'sample_steps': 1, 'clip': False, 'classifier_scale': scale}),
        )  # fmt: skip
        batch = {'index': jnp.arange(4), 'label': jnp.zeros(4, jnp.int32)}
        drawn[scale] = family.trajectory(state, {'classifier': (None, {})}, batch, jax.random.key(0))['x_0'][-1]
    x = drawn[1.0] - drawn[0.0]
    # log p = -log(1 + exp(-2 m)), m = 0.01 mean(y) / 101, y = 100 x_t: its gradient in y times 100^2.
    largest = 100**2 * 2 * 0.01 / 101 / 64
    assert (x > 0.4 * largest).all() and (x < 0.6 * largest).all()


def test_the_likelihood_of_the_ode_is_of_unclipped_estimates():
    """The derivative of a clipped estimate is 0, and no density's."""
    options = {**CONTINUOUS, 'process': 'vp'}
    (clipped, state), (plain, _) = tiny(**options, clip=True), tiny(**options, clip=False)
    batch = {'image': images(2), 'index': jnp.arange(2)}
    a, b = (f.evaluate(state, {}, batch, jax.random.key(0))['bits_per_dim'] for f in (clipped, plain))
    np.testing.assert_array_equal(a, b)


def test_denoising_at_sigma_0_is_finite():
    for process, prediction in {'linear': 'eps', 'vp': 'eps', 've': 'score', 'flow': 'flow'}.items():
        family, state = tiny(process=process, prediction=prediction, variance='fixed_small', sampler='ddim', clip=False)
        x = images(2)
        found = family.denoise(state, {}, {}, x, jnp.zeros(2))
        assert jnp.abs(found - x).max() < (0.2 if process == 'linear' else 0.02), process


def test_learned_variance_is_taught_by_the_bound_alone():
    """Half of the outputs are the variance's; the bound's gradient reaches them and no others."""
    family = build(variance='learned', bound_weight=1.0)
    plain = build(variance='learned', bound_weight=0.0)
    state = jax.jit(family.init)(jax.random.key(0), first_batch(family), {})
    assert state.params['denoiser']['last']['kernel'].shape[-1] == 2
    batch = {'image': images(16)}
    after, logs = jax.jit(family.update)(state, {}, batch, jax.random.key(1))
    without, _ = jax.jit(plain.update)(state, {}, batch, jax.random.key(1))
    np.testing.assert_allclose(logs['loss'], logs['simple'] + logs['bound'], rtol=1e-6)
    moved, still = (s.params['denoiser']['last']['bias'] for s in (after, without))
    assert moved[1] != 0 and still[1] == 0 and moved[0] == still[0] != 0


CONTINUOUS = {'process': 'vp', 'variance': 'fixed_small', 'sample_steps': 4, 'ode_steps': 3}


@pytest.mark.parametrize('options', [
    {'process': 'flow', 'prediction': 'flow', 'sampler': 'heun'},
    {'process': 've', 'prediction': 'score', 'sampler': 'predictor_corrector'},
    {'process': 'vp', 'sampler': 'heun', 's_churn': 2.0},
], ids=lambda options: f"{options['process']}-{options['sampler']}")  # fmt: skip
def test_continuous_time(options):
    family, state = tiny(**{**CONTINUOUS, **options})
    x = draw(family, state)
    assert jnp.isfinite(x).all() and jnp.abs(x).max() <= 1 and jnp.abs(x[0] - x[1]).max() > 1e-3
    np.testing.assert_allclose(x[4:], draw(family, state, slice(4, 8)), atol=1e-4)
    bits = family.evaluate(state, {}, {'image': images(2), 'index': jnp.arange(2)}, jax.random.key(0))
    assert jnp.isfinite(bits['bits_per_dim']).all() and bits['bits_per_dim'].shape == (2,)


def test_divisor():
    assert diffusion.build(context(), **sections(dict(unet={**UNET, 'multipliers': (1, 2)}))).divisor == 2
    assert diffusion.build(context(image=(32, 32, 3))).divisor == 8


FLOW = {'process': 'flow', 'training': {'prediction': 'flow'}}
NET = {'channels': 8, 'multipliers': (1,), 'blocks': 1, 'attention': ()}
ZERO = {'process': {'zero_terminal': True}}


@pytest.mark.parametrize(
    ('model', 'changes', 'message'),
    [
        (
            {'network': {**NET, 'multipliers': (1, 1, 1)}},
            {'image': (10, 10, 1)},
            ['10', 'multiple of 4'],
        ),
        ({'network': {**NET, 'attention': (16,)}}, {}, ['attention', '16', r'\[8\]']),
        ({'network': {**NET, 'multipliers': ()}}, {}, ['multipliers']),
        ({'network': {**NET, 'blocks': 0}}, {}, ['blocks']),
        ({'network': {**NET, 'channels': 7}}, {}, ['channels', '7']),
        ({'network': {**NET, 'heads': 2}}, {}, ['heads', 'no such field']),
        ({'conditioning': {'label': {}}}, {}, ['conditioning.label', 'labels']),
        ({'conditioning': {'label': {'dropout': 1.0}}}, {'classes': 3}, ['dropout', '1.0']),
        ({'conditioning': {'text': {}}}, {}, ['conditioning.text.kind', 'class, embedding']),
        ({'conditioning': {'text': {'kind': 'tokens', 'vocabulary': 5}}}, {}, ['tokens', 'UNet', 'vector, planes']),
        ({'sampler': 'dim'}, {}, ['sampler', 'ddim', "'dim'"]),
        ({'sampler': {'variance': 'large'}}, {}, ['variance', 'fixed_large']),
        ({'sampler': {'variance': 'learned'}}, {}, ['variance', 'training.variance']),
        ({'likelihood': {'variance': 'learned'}}, {}, ['variance', 'training.variance']),
        ({'training': {'prediction': 'noise'}}, {}, ['prediction', 'eps']),
        ({'training': {'prediction': {'name': 'eps', 'data_std': 0.5}}}, {}, ['data_std', 'no such field']),
        ({'sampler': {'spacing': 'linear'}}, {}, ['spacing', 'uniform']),
        ({'sampler': {'steps': 1001}}, {}, ['steps', '1000', '1001']),
        ({'sampler': {'name': 'ddim', 's_churn': 1.0}}, {}, ['s_churn', 'no such field']),
        ({'likelihood': {'steps': 1000}}, {}, ['steps', '999', '1000']),
        ({'process': {'beta_end': 1.0}}, {}, ['beta_end']),
        ({'process': {'beta_start': 0.5}}, {}, ['beta_start', 'beta_end']),
        ({'guidance': {'scale': 2.0}}, {}, ['guidance', 'dropout']),
        ({'guidance': {'conditions': ('label',), 'scales': (2.0,)}}, {}, ['guidance', 'dropout']),
        (
            {'guidance': {'conditions': ('label',)}, 'conditioning': {'label': {'dropout': 0.1}}},
            {'classes': 3},
            ['scales', 'one for each'],
        ),
        ({'guidance': {'low': 3.0, 'high': 2.0}}, {}, ['guidance.low', '3.0', '2.0']),
        (
            {
                'guidance': {'conditions': ('label',) * 2, 'scales': (1.0, 2.0)},
                'conditioning': {'label': {'dropout': 0.1}},
            },
            {'classes': 3},
            ['conditions must differ'],
        ),
        (
            {'guidance': {'channels': 2, 'scale': 2.0}, 'conditioning': {'label': {'dropout': 0.1}}},
            {'classes': 3},
            ['channels', 'from 0 to 1'],
        ),
        ({'process': 'vp', 'sampler': {'variance': 'fixed_large'}}, {}, ['variance', 'chain']),
        ({'process': 'vp', 'training': {'variance': 'learned'}}, {}, ['variance', 'chain']),
        ({'process': 'vp', 'sampler': {'spacing': 'trailing'}}, {}, ['spacing', 'trailing', 'continuous']),
        ({'training': {'times': 'lognormal'}}, {}, ['times', 'lognormal', 'importance']),
        ({'training': {'weighting': 'bound'}}, {}, ['weighting', 'learned']),
        ({'network': {**NET, 'patch': 8}}, {'image': (12, 12, 1)}, ['12', 'multiple of 8']),
        (ZERO, {}, ['prediction', 'alpha']),
        ({'process': {'name': 've', 'sigma_min': 160.0}}, {}, ['sigma_min']),
        ({**FLOW, 'sampler': {'name': 'heun', 'spacing': 'karras'}}, {}, ['karras', 'alpha']),
        ({'process': {'timesteps': 1}}, {}, ['timesteps']),
        ({'sampler': {'name': 'ddim', 'eta': 1.5}}, {}, ['eta', '1.5']),
        ({'network': {**NET, 'dropout': 1.0}}, {}, ['dropout']),
        ({'network': {**NET, 'groups': 32, 'group_size': 0}}, {}, ['network.groups', '32']),
        ({'process': 'flow'}, {}, ['prediction', 'alpha']),
        ({'sampler': {'shift': 3.0}}, {}, ['shift', 'flow']),
        ({'sampler': {'name': 'predictor_corrector', 'predictor': 'euler'}}, {}, ['predictor', 'euler_maruyama']),
        ({'process': 'vp', 'likelihood': {'steps': 0}}, {}, ['likelihood.steps']),
        ({'process': 'vp', 'likelihood': {'variance': ''}}, {}, ['variance', 'no such field']),
        ({'sampler': {'name': 'annealed_langevin', 'langevin_steps': 0}}, {}, ['langevin_steps']),
        ({'sampler': {'name': 'euler_maruyama', 'last_step': 0.04}}, {}, ['last_step', 'continuous']),
        ({'process': {'name': 'vp', 'rescale_timesteps': True}}, {}, ['rescale_timesteps', 'no such field']),
        ({**ZERO, 'training': {'prediction': 'v'}, 'sampler': 'annealed_langevin'}, {}, ['annealed', 'alpha']),
        ({'training': {'prediction': {'name': 'edm', 'data_std': 0.0}}}, {}, ['data_std']),
        ({'process': 'vp', 'sampler': {'name': 'euler_maruyama', 'strength': -1.0}}, {}, ['strength']),
        ({'network': {'name': 'adm', 'heads': 0, 'attention': ()}}, {}, ['heads']),
        ({'network': 'refinenet'}, {}, ['refinenet', 'geometric']),
        ({'latent_scale': 0.0}, {}, ['latent_scale']),
    ],
)
def test_refuses_in_one_line(model, changes, message):
    with pytest.raises(UserError) as error:
        diffusion.build(context(**changes), **{'network': NET, **model})
    assert '\n' not in str(error.value)
    for part in message:
        assert re.search(part, str(error.value)), str(error.value)


def test_inversion_and_back():
    """Image to noise to the same image, and the noise is that of a standard normal where the model is right."""
    family, state = tiny(sampler='ddim', sample_steps=20, clip=False)
    state = jax.tree.map(lambda w: 0.05 * w, state)  # nearly x_0 of no noise: a smooth path
    x_0 = 0.5 * images(2)
    z = jax.jit(family.encode)(state, {}, {'image': x_0}, jax.random.key(0))
    back = jax.jit(family.decode)(state, {}, {}, z, jax.random.key(1))
    assert z.shape == x_0.shape
    assert jnp.abs(back - x_0).max() < 0.05 < jnp.abs(z - x_0).max()


def test_inversion_needs_no_label():
    assert build(conditional=True).encode is None
    assert build(conditional=True, label_dropout=0.1).encode is not None


@pytest.mark.parametrize('options', [
    {}, {'process': 'vp', 'variance': 'fixed_small'}, {'variance': 'learned'},
    {'process': 'flow', 'prediction': 'flow', 'variance': 'fixed_small'},
    {'process': 've', 'prediction': 'edm', 'variance': 'fixed_small'},
], ids=str)  # fmt: skip
def test_denoise_is_of_image_plus_sigma_noise(options, monkeypatch):
    """Whatever the process, later stages give x = image + sigma eps: the network sees its own process at that ratio."""
    outputs = 2 if options.get('variance') == 'learned' else 1

    class Net(Base):
        @nn.compact
        def __call__(self, x, t, vector=None, *, train):
            Stub.seen.append((x, t, train))
            return jnp.concatenate([0 * x + self.param('w', nn.initializers.zeros, ())] * outputs, -1)

    stand_in(monkeypatch, Net())
    family = build(**options, clip=False, **({} if 'process' in options else {'beta_end': 0.5}))
    state = family.init(jax.random.key(0), first_batch(family), {})
    x, sigma = images(3), jnp.array([0.1, 0.3, 2.0])
    Stub.seen.clear()
    x_0 = family.denoise(state, {}, {}, x, sigma)
    assert x_0.shape == x.shape
    seen = Stub.seen[-1][0]
    # x_0 of an output 0, by hand: alpha and sigma are those of the process where their ratio is sigma.
    s = sigma[:, None, None, None]
    process = options.get('process', 'linear')
    alpha = {'ve': 1.0 + 0 * s, 'flow': 1 / (1 + s)}.get(process, 1 / jnp.sqrt(1 + s**2))
    scale = 1 / jnp.sqrt(s**2 + 0.25) if process == 've' else alpha
    np.testing.assert_allclose(seen, scale * x, rtol=2e-3, atol=1e-5)
    wanted = {'ve': 0.25 / (s**2 + 0.25) * x, 'flow': alpha * x}.get(process, x)
    np.testing.assert_allclose(x_0, wanted, rtol=2e-3, atol=1e-5)


def toy_classifier(sharpness=1.0):
    """log p(y | x) of two classes by the mean pixel."""
    from jaxgen.contract import Family

    def classify(state, frozen, batch, rng):
        assert set(batch) == {'image', 'sigma'}
        mean = sharpness * batch['image'].mean((1, 2, 3)) / (1 + batch['sigma'])
        return jnp.stack([mean, -mean], -1)

    return Family(None, None, None, None, classify=classify)


def test_classifier_guidance_pulls_to_the_class():
    options = {**TINY, 'sampler': 'ddim', 'sample_steps': 5, 'beta_end': 0.5}
    with_stage = context(classes=2, stages={'classifier': toy_classifier(5.0)})
    plain, state = tiny(sampler='ddim', sample_steps=5, beta_end=0.5)
    drawn = {}
    for scale in (0.0, 1.0, 50.0):
        family = diffusion.build(with_stage, **sections({**options, 'classifier_scale': scale}))
        assert family.conditions == (('label',) if scale else ())
        for label in (0, 1):
            batch = {'index': jnp.arange(4), 'label': jnp.full(4, label)}
            frozen = {'classifier': (None, {})}
            drawn[scale, label] = family.sample(state, frozen, batch, jax.random.key(0))
    np.testing.assert_allclose(drawn[0.0, 0], drawn[0.0, 1])
    np.testing.assert_allclose(
        drawn[0.0, 0], plain.sample(state, {}, {'index': jnp.arange(4)}, jax.random.key(0)), atol=1e-4
    )
    pull = {s: (drawn[s, 0] - drawn[s, 1]).mean() for s in (1.0, 50.0)}
    assert 0 < pull[1.0] < pull[50.0]


@pytest.mark.parametrize('variance', ['fixed_small', 'fixed_large'])
def test_guided_ancestral_steps_move_by_their_variance(monkeypatch, variance):
    """Dhariwal & Nichol 2021, algorithm 1: the mean of a step moves by its variance times the gradient."""
    seen, (_, state) = {}, tiny(sample_steps=5, beta_end=0.5)  # kept for others: built with the sampler as it is

    def recorded(denoise, x, table, keys):
        seen.update(moved=denoise(x, jnp.asarray(table['t'])[1:2]), x=x)  # of the last level but one
        return x

    monkeypatch.setattr(samplers, 'run', recorded)
    options = {**TINY, 'sample_steps': 5, 'beta_end': 0.5, 'variance': variance, 'clip': False}
    batch = {'index': jnp.arange(2), 'label': jnp.zeros(2, jnp.int32)}
    stages, frozen = {'classifier': toy_classifier()}, {'classifier': (None, {})}
    x_0 = []
    for scale in (0.0, 3.0):
        family = diffusion.build(context(classes=2, stages=stages), **sections({**options, 'classifier_scale': scale}))
        family.sample(state, frozen, batch, jax.random.key(0))
        x_0.append(seen['moved'])
    schedule = levels.visited(processes.linear(timesteps=20, beta_end=0.5), 5, 'uniform')
    moves = posterior(schedule)
    alpha, sigma = schedule.alpha[-2], schedule.sigma[-2]

    def log_p(x):
        mean = (x / alpha).mean((1, 2, 3)) / (1 + sigma / alpha)
        return jax.nn.log_sigmoid(2 * mean).sum()

    gradient = jax.grad(log_p)(seen['x'])
    moved = moves.x_0_weight[-2] * (x_0[1] - x_0[0])
    expected = {'fixed_small': moves.variance, 'fixed_large': moves.forward}[variance][-2]
    np.testing.assert_allclose(moved, 3.0 * expected * gradient, rtol=1e-3, atol=1e-7)


def test_importance_sampling_through_updates():
    """The history fills with the losses of the steps shown, also where the batch is cut for accumulation."""
    states = []
    for accumulate in (1, 2):
        optim = make_optim(10, **{**DEFAULTS['optim'], 'accumulate': accumulate})
        options = dict(variance='learned', weighting='bound', times='importance', timesteps=3, beta_end=0.5)
        family = diffusion.build(context(optim=optim), **sections({**TINY, **options}))
        state = jax.jit(family.init)(jax.random.key(0), first_batch(family), {})
        update = jax.jit(family.update)
        for i in range(3):
            state, logs = update(state, {}, {'image': images(32)}, jax.random.key(i))
        assert int(state.extra['seen'].sum()) == 96 and (state.extra['errors'] > 0).all()
        assert np.isfinite(logs['loss']) and logs['loss'].shape == ()
        states.append(state)
    # Other noise, the same sizes: accumulation must not scale what is remembered.
    a, b = (state.extra['errors'].mean(-1) for state in states)
    np.testing.assert_allclose(a, b, rtol=0.5)


def test_trajectory_ends_in_the_sample():
    family, state = tiny(sample_steps=5, beta_end=0.5)
    batch = {'index': jnp.arange(2)}
    seen = jax.jit(family.trajectory)(state, {}, batch, jax.random.key(0))
    assert seen['x'].shape == seen['x_0'].shape == (5, 2, 8, 8, 1)
    np.testing.assert_allclose(seen['x'][-1].clip(-1, 1), family.sample(state, {}, batch, jax.random.key(0)), atol=1e-4)


def toy_autoencoder(factor=2.0):
    """Pixels of every 2x2 square become channels, times a factor: loses nothing."""
    from einops import rearrange

    from jaxgen.contract import Family

    def encode(state, frozen, batch, rng):
        return state * rearrange(batch['image'], 'n (h a) (w b) c -> n h w (a b c)', a=2, b=2)

    def decode(state, frozen, batch, latents, rng):
        return rearrange(latents, 'n h w (a b c) -> n (h a) (w b) c', a=2, b=2) / state

    family = Family(None, None, None, None, encode, decode, divisor=2, latents=Latents(shape=(4, 4, 4)))
    return family, {'first': (jnp.float32(factor), {})}


def test_diffusion_of_latents_is_diffusion_of_what_they_are():
    """Through a first stage that only reshapes and scales, a flow in its latents is one in the reshaped images."""
    first, frozen = toy_autoencoder()
    options = dict(
        unet=UNET, process='flow', prediction='flow', variance='fixed_small', sampler='heun',
        sample_steps=3, clip=False,
    )  # fmt: skip
    latent = diffusion.build(context(stages={'first': first}), **sections({**options, 'latent_scale': 0.5}))
    plain = diffusion.build(context(image=(4, 4, 4)), **sections(options))
    batch = {'image': images(4), 'index': jnp.arange(4)}
    reshaped = {**batch, 'image': first.encode(1.0, {}, batch, None)}
    latent, plain = (
        f._replace(update=jax.jit(f.update), sample=jax.jit(f.sample), trajectory=jax.jit(f.trajectory))
        for f in (latent, plain)
    )
    assert latent.divisor == 2
    state = jax.jit(latent.init)(jax.random.key(0), batch, frozen)
    state = jax.tree.map(lambda x: x + 0.1 if x.ndim else x, state)
    _, logs = latent.update(state, frozen, batch, jax.random.key(1))
    _, wanted = plain.update(state, {}, reshaped, jax.random.key(1))
    np.testing.assert_allclose(logs['loss'], wanted['loss'], rtol=1e-5)
    drawn = latent.sample(state, frozen, batch, jax.random.key(2))
    assert drawn.shape == batch['image'].shape
    in_latents = plain.sample(state, {}, batch, jax.random.key(2))
    np.testing.assert_allclose(first.encode(1.0, {}, {'image': drawn}, None), in_latents, atol=1e-4)
    film = latent.trajectory(state, frozen, batch, jax.random.key(2))
    np.testing.assert_allclose(film['x'][-1], drawn, atol=1e-5)
    noise = latent.encode(state, frozen, batch, jax.random.key(3))
    np.testing.assert_allclose(noise, plain.encode(state, {}, reshaped, jax.random.key(3)), atol=1e-4)
    decoded = latent.decode(state, frozen, {}, noise, jax.random.key(4))
    in_latents = plain.decode(state, {}, {}, noise, jax.random.key(4))
    np.testing.assert_allclose(first.encode(1.0, {}, {'image': decoded}, None), in_latents, atol=1e-4)


def test_training_draws_latents_from_the_posterior(monkeypatch):
    """As LDM, DiT and SiT do; what is measured is of the mean."""
    first, frozen = toy_autoencoder()
    posterior = Posterior(
        lambda *args: {'mean': first.encode(*args)},
        lambda m, rng: 3 + m['mean'] + jax.random.normal(rng, m['mean'].shape),
    )
    stand_in(monkeypatch, Stub())
    # Almost no noise: the network sees alpha x_0.
    options = {**TINY, 'clip': False, 'timesteps': 2, 'beta_start': 1e-9, 'beta_end': 1e-9}
    seen = []
    for stage in (first, first._replace(posterior=posterior)):
        family = diffusion.build(context(stages={'first': stage}), **sections(options))
        state = family.init(jax.random.key(0), {'image': images(1)}, frozen)
        Stub.seen.clear()
        family.update(state, frozen, {'image': 0 * images(256)}, jax.random.key(1))
        seen.append(Stub.seen[0][0])
    assert jnp.abs(seen[0]).max() < 0.01
    assert abs(seen[1].mean() - 3) < 0.05 and abs(seen[1].std() - 1) < 0.05


@pytest.mark.parametrize('times', ['uniform', 'importance'])
def test_prepared_latents_are_drawn_anew_in_each_update(monkeypatch, times):
    """The moments are computed once; the draws, and all that an update draws beside them, are those of images."""
    encoder, frozen = toy_autoencoder()

    def moments(*args):
        mean = encoder.encode(*args)
        return {'mean': mean, 'deviation': 0.5 + jnp.abs(mean)}

    def draw(moments, rng):
        return moments['mean'] + moments['deviation'] * jax.random.normal(rng, moments['mean'].shape)

    first = encoder._replace(posterior=Posterior(moments, draw))
    stand_in(monkeypatch, Stub())
    family = diffusion.build(context(stages={'first': first}), **sections({**TINY, 'clip': False, 'times': times}))
    batch = {'image': images(8)}
    state = family.init(jax.random.key(0), batch, frozen)
    made = family.prepare(frozen, batch, jax.random.key(5))
    assert {name: x.shape for name, x in made.items()} == {'first/mean': (8, 4, 4, 4), 'first/deviation': (8, 4, 4, 4)}
    Stub.seen.clear()
    for given, key in ((batch, 1), (made, 1), (made, 2)):
        family.update(state, frozen, given, jax.random.key(key))
    of_images, prepared, other = ((x, t) for x, t, *_ in Stub.seen)
    for a, b in zip(of_images, prepared, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (np.asarray(other[0]) != np.asarray(prepared[0])).mean() > 0.9


def test_latents_are_measured_by_the_error_of_the_noise(monkeypatch):
    """A network that tells no noise at all has an error of about 1, and one that tells half of it a quarter."""
    first, frozen = toy_autoencoder()
    stand_in(monkeypatch, Stub())
    batch = {'image': 0 * images(64), 'index': jnp.arange(64)}
    options = {**TINY, 'clip': False}
    family = diffusion.build(context(stages={'first': first}), **sections(options))
    state = family.init(jax.random.key(0), batch, frozen)
    found = family.evaluate(state, frozen, batch, jax.random.key(1))
    assert set(found) == {'eps_error'} and found['eps_error'].shape == (64,)
    np.testing.assert_allclose(found['eps_error'].mean(), 1, atol=0.03)


def test_says_what_is_wrong_with_a_first_stage():
    first, frozen = toy_autoencoder()
    with pytest.raises(UserError, match='continuous'):
        diffusion.build(
            context(stages={'first': first._replace(latents=Latents(shape=()))}), **sections({**TINY, 'clip': False})
        )
    with pytest.raises(UserError, match='maps'):
        diffusion.build(
            context(stages={'first': first._replace(latents=Latents(shape=(64,)))}), **sections({**TINY, 'clip': False})
        )
    with pytest.raises(UserError, match='clip'):
        diffusion.build(context(stages={'first': first}), **sections(TINY))
    family = diffusion.build(context(stages={'first': first}), **sections({**TINY, 'clip': False}))
    with pytest.raises(UserError, match='other images'):
        family.init(jax.random.key(0), {'image': images(2, 16)}, frozen)


def test_numbers_of_the_choices_paper_can_be_set_and_unset():
    """Fields that are None until somebody gives a number: in a file, on the command line, and back."""
    plain = config.make(family='diffusion', model={'process': 've'})
    assert plain.model.process.sigma_min is None
    given = config.override(plain, ['--config.model.process.sigma_min=0.05'])
    assert given.model.process.sigma_min == 0.05
    assert config.override(given, ['--config.model.process.sigma_min=None']).model.process.sigma_min is None
    for text in ('small', 'true', '(1,)'):
        with pytest.raises(UserError, match='must be a number or None'):
            config.override(plain, [f'--config.model.process.sigma_min={text}'])


def test_a_config_holds_the_fields_of_its_components_alone():
    """Naming another component on the command line brings its fields and takes the former one's away."""
    edm = config.make(
        family='diffusion',
        model=dict(
            process=dict(name='ve', sigma_min=0.01), network=dict(name='ncsnpp', channels=8),
            training=dict(prediction='edm', times='lognormal'),
            sampler=dict(name='heun', steps=9, clip=False, s_churn=3.0),
        ),
    )  # fmt: skip
    assert edm.model.training.times.to_dict() == {'name': 'lognormal', 'mean': -1.2, 'std': 1.2}
    assert edm.model.likelihood.to_dict() == {'steps': 50}
    order = ['--config.model.sampler.eta=0.5', '--config.model.sampler=ddim']
    for texts in (order, order[::-1]):
        sampler = config.override(edm, texts).model.sampler.to_dict()
        common = dataclasses.asdict(levels.Visits(steps=9, clip=False))
        own = {'name': 'ddim', 'eta': 0.5, 'clipped_noise': True, 'to_first': False, 'by_stride': False}
        assert sampler == common | own
    network = config.override(edm, ['--config.model.network.name=dit', '--config.model.network.heads=4']).model.network
    assert network.heads == 4 and network.channels == 8 and 'multipliers' not in network
    with pytest.raises(UserError, match='s_churn: no such field'):
        config.override(edm, ['--config.model.sampler=ddim', '--config.model.sampler.s_churn=1'])
    cosine = config.override(edm, ['--config.model.process=cosine', '--config.model.training.prediction=eps'])
    assert cosine.model.likelihood.to_dict() == {'steps': 0, 'variance': ''}


def test_runs_that_were_saved_without_sections_are_the_same_models():
    """Losses, samples and bits of a model written in both ways."""
    flat = dict(
        network='unet', unet=UNET, timesteps=20, beta_end=0.5, conditional=True, label_dropout=0.2, prediction='v',
        weighting='min_snr', gamma=4.0, sampler='ddim', eta=0.3, sample_steps=4, guidance=2.0, bound_steps=3,
        variance='fixed_small', s_churn=7.0, ode_steps=9,
    )  # fmt: skip
    now = dict(
        network=UNET, process=dict(timesteps=20, beta_end=0.5), conditioning=dict(label=dict(dropout=0.2)),
        training=dict(prediction='v', weighting=dict(name='min_snr', gamma=4.0)),
        sampler=dict(name='ddim', eta=0.3, steps=4), guidance=dict(scale=2.0),
        likelihood=dict(steps=3, variance='fixed_small'),
    )  # fmt: skip
    complete = [options.complete(diffusion.build, model, 'model') for model in (diffusion.former(flat), now)]
    assert complete[0] == complete[1] and diffusion.former(complete[1]) == complete[1]


def test_composed_guidance_is_a_sum_over_conditions():
    """Liu et al. 2022, eq. 11, by hand: the outputs of a network that adds its conditions up."""
    conditioning = tuple(
        conditions.Condition(name, 'vector', None, conditions.same, jnp.zeros_like, 0.1) for name in 'ab'
    )
    values = {'a': jnp.array([1.0, 2.0]), 'b': jnp.array([10.0, 20.0])}

    def apply(x, t, values):  # conditions interact, so that composed guidance differs from joint guidance
        a, b = values['a'][:, None], values['b'][:, None]
        return x + a + b + a * b, a + b

    x, t = jnp.array([[0.5, 0.1], [0.2, 0.3]]), jnp.zeros(2)
    guide = guidance.Guidance(conditions=('a', 'b'), scales=(2.0, 3.0))
    output, rest = guidance.guided(apply, x, t, conditioning, values, guide, jnp.array([True, False]))
    np.testing.assert_allclose(output[0], x[0] + 2 * 1 + 3 * 10, rtol=1e-6)
    np.testing.assert_allclose(output[1], x[1] + 2 + 20 + 40, rtol=1e-6)  # outside the interval: with all conditions
    np.testing.assert_allclose(rest[:, 0], [11, 22])
    joint = guidance.Guidance(scale=2.0)
    output, _ = guidance.guided(apply, x, t, conditioning, values, joint, jnp.array([True, True]))
    np.testing.assert_allclose(output, x + 2 * jnp.array([[21.0], [62.0]]), rtol=1e-6)


def test_conditions_are_dropped_each_by_its_own_probability():
    conditioning = tuple(
        conditions.Condition(name, 'vector', None, conditions.same, lambda v: v - v - 1, rate)
        for name, rate in (('a', 0.5), ('b', 0.1), ('c', 0.0))
    )
    values = {name: jnp.ones((4000, 2)) for name in 'abc'}
    dropped = conditions.drop(conditioning, jax.random.key(0), values)
    absent = {name: np.asarray(dropped[name] == -1) for name in 'abc'}
    for name, rate in (('a', 0.5), ('b', 0.1), ('c', 0.0)):
        assert (absent[name][:, 0] == absent[name][:, 1]).all()
        assert abs(absent[name].mean() - rate) < 0.03, name
    both = (absent['a'] & absent['b'])[:, 0].mean()
    assert abs(both - 0.05) < 0.02, 'independently'


def test_tokens_and_embeddings_reach_a_transformer():
    """Text tokens in the context of the patches and a pooled vector: samples follow both, and their absence."""
    model = dict(
        network=dict(name='dit', channels=8, blocks=1, heads=2, patch=4), process=dict(timesteps=10, beta_end=0.5),
        conditioning=dict(
            words=dict(kind='tokens', vocabulary=7, dropout=0.1),
            features=dict(kind='tokens', dropout=0.1),
            pooled=dict(kind='embedding', dropout=0.1),
        ),
        sampler=dict(name='ddim', steps=2), guidance=dict(scale=2.0),
    )  # fmt: skip
    family = diffusion.build(context(), **model)
    assert family.conditions == ('words', 'features', 'pooled') and family.encode is None
    rng = np.random.default_rng(0)
    batch = {
        'image': images(3),
        'index': jnp.arange(3),
        'words': jnp.asarray(rng.integers(0, 7, (3, 5))),
        'features': jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float32),
        'pooled': jnp.asarray(rng.normal(size=(3, 6)), jnp.float32),
    }
    state = jax.jit(family.init)(jax.random.key(0), batch, {})
    shapes = jax.tree.map(jnp.shape, {name: state.params['denoiser'][name] for name in family.conditions})
    assert shapes == {
        'words': {'embedding': (7, 8)},
        'features': {'kernel': (4, 8), 'bias': (8,)},
        'pooled': {'kernel': (6, 8)},
    }
    state = jax.tree.map(lambda w: w + 0.1 * rng.normal(size=w.shape).astype(w.dtype) if w.ndim else w, state)
    sample = jax.jit(family.sample)
    x = sample(state, {}, batch, jax.random.key(1))
    for name in family.conditions:
        other = {**batch, name: jnp.flip(batch[name], -1) if name != 'words' else (batch[name] + 1) % 7}
        assert jnp.abs(sample(state, {}, other, jax.random.key(1)) - x).max() > 1e-4, name
    _, logs = jax.jit(family.update)(state, {}, batch, jax.random.key(2))
    assert np.isfinite(logs['loss'])


@pytest.mark.parametrize('shape', [(6,), (2, 6), (2, 4, 4, 3), (2, 2, 4, 4, 3)], ids=str)
@pytest.mark.parametrize('learned', [False, True])
def test_arrays_of_any_rank(shape, learned):
    """Vectors, point clouds, images and clips: loss, sampler and likelihood of one formula, and of its flat form."""
    variance = dict(name='learned', bound_weight=0.1) if learned else 'fixed'
    given = options.complete(objective.formulate, dict(variance=variance, prediction='v'), 'model.training')
    formulation = objective.formulate(processes.linear(timesteps=10, beta_end=0.5), **given)

    def apply(params, x, t, embeddings, *, train=False, rngs=None):
        output = params * jnp.tanh(x) + t.reshape(-1, *[1] * (x.ndim - 1)) / 10
        return jnp.concatenate([output, 0.5 * output], -1) if learned else output

    network = denoisers.Network(None, apply)
    flat = int(np.prod(shape))
    x_0, eps = (np.random.default_rng(i).uniform(-1, 1, (3, *shape)).astype(np.float32) for i in range(2))
    t, keys = jnp.array([0, 4, 9]), jax.random.split(jax.random.key(0), 3)
    sampler = levels.make(
        options.value_of(options.fields(diffusion.build)['sampler'], dict(name='ddim', steps=4, clip=False), 'sampler'),
        formulation.process,
        learned,
    )
    results = []
    for x, noise in ((x_0, eps), (x_0.reshape(3, flat), eps.reshape(3, flat))):
        values, _ = objective.errors(formulation, network, 0.3, x, t, noise, {})
        denoise = objective.denoiser(formulation, network, 0.3, (), {}, guidance.OFF, clip=False)
        drawn = samplers.run(denoise, noise, sampler.table, keys)
        error = likelihood.noise_error(denoise, x, formulation.process, keys, 2)
        assert drawn.shape == x.shape and values.shape == error.shape == (3,)
        results.append((values, drawn.reshape(3, flat)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
