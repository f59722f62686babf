"""ControlNets: beside a network that stays as it is, against sums of maps written out here."""

import functools
import json

import jax
import numpy as np
import pytest
from support import context

from jaxgen import conditions, options
from jaxgen.contract import condition_names
from jaxgen.diffusion import control
from jaxgen.errors import UserError
from jaxgen.families import diffusion
from jaxgen.networks.latent_unet import LatentUNet

IMAGE = (8, 8, 3)
NETWORK = dict(
    name='latent_unet', channels=8, multipliers=(1.0, 2.0), blocks=1, depths=(0, 1), heads=2, group_size=4, groups=4
)
MODEL = dict(
    process=dict(name='linear', timesteps=20),
    network=NETWORK,
    conditioning=dict(text=dict(kind='tokens', dropout=0.5)),
    sampler=dict(name='ddim', steps=5, clip=False),
)
OWN = dict(name='latent_unet', condition='edges', hint=(4,), image_channels=3)
N = 2
RNG = np.random.default_rng(0)
BATCH = {
    'image': RNG.uniform(-1, 1, (N, *IMAGE)).astype(np.float32),
    'edges': RNG.uniform(-1, 1, (N, 8, 8, 1)).astype(np.float32),
    'mask': RNG.uniform(-1, 1, (N, 8, 8, 3)).astype(np.float32),
    'text': RNG.normal(size=(N, 3, 5)).astype(np.float32),
    'index': np.arange(N),
}


def build(stages=None, **model):
    """A family, with what `assembly.make_family` says of its config."""
    given = options.complete(diffusion.build, MODEL | model, 'model')
    family = diffusion.build(context(IMAGE, stages=stages or {}), **given)
    return family._replace(config=json.dumps({'family': 'diffusion', 'model': given}))


def shaken(tree, seed: int):
    """Weights that are not 0."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [x + 0.2 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def state_of(family, frozen, seed=None):
    state = jax.jit(family.init)(jax.random.key(3), BATCH, frozen)
    if seed is None:
        return state
    weights = shaken(state.params, seed)
    return state.replace(params=weights, ema=weights)


@functools.cache
def base():
    family = build()
    return family, state_of(family, {}, 1)


@functools.cache
def controlled(condition: str = 'edges', seed=None):
    """(family, state) of a ControlNet of that base."""
    family, state = base()
    made = build({'base': family}, controlnet=OWN | {'condition': condition})
    return made, state_of(made, {'base': (state, {})}, seed)


def frozen_of(**stages):
    return {name: (state, {}) for name, (_, state) in stages.items()}


def families(**stages):
    return {name: family for name, (family, _) in stages.items()}


@functools.cache
def program(family, name):
    return jax.jit(getattr(family, name))


def drawn(family, state, frozen, settings=None, batch=BATCH, name='sample'):
    settings = settings or family.settings()
    return jax.tree.map(np.asarray, program(family, name)(state, frozen, batch, jax.random.key(0), settings))


def test_a_new_one_adds_nothing_and_begins_with_the_weights_of_the_base():
    (family, state), (plain, weights) = controlled(), base()
    frozen = frozen_of(base=base())
    np.testing.assert_array_equal(drawn(family, state, frozen), drawn(plain, weights, {}))
    own, of_base = state.params['control'], weights.ema['denoiser']
    for name in ('first', 'time1', 'down0_0', 'down0', 'down1_0_transformer', 'middle_0', 'middle_transformer'):
        jax.tree.map(np.testing.assert_array_equal, own[name], of_base[name])
    assert set(own) - set(of_base) == {'hint_first', 'hint_last', 'zero0', 'zero1', 'zero2', 'zero3', 'zero_middle'}
    assert family.conditions == ('text', 'edges')


@pytest.mark.slow
def test_only_it_is_trained():
    family, state = controlled()
    after, logs = jax.jit(family.update)(state, frozen_of(base=base()), BATCH, jax.random.key(1))
    assert set(after.params) == {'control'} and np.isfinite(logs['loss'])
    moved = {name: not np.array_equal(*(jax.tree.leaves(s.params['control'][name])[0] for s in (state, after)))
             for name in after.params['control']}  # fmt: skip
    assert moved['zero0'] and moved['zero_middle']


@pytest.mark.slow
def test_several_with_weights_are_sums_of_maps():
    """The network's output with two stages, and in guess mode, is that of the maps added by hand."""
    stages = dict(one=controlled('edges', 5), two=controlled('mask', 6))
    says = dict(one=dict(scale=0.7, guess=True), two=dict(scale=-0.3))
    module = LatentUNet(**{k: v for k, v in NETWORK.items() if k != 'name'}, out_channels=3)
    given = options.complete(diffusion.build, MODEL, 'model')
    nets = control.bind(context(IMAGE, stages=families(**stages)), module, given, {'name': 'none'}, says)
    assert [net.name for net in nets] == ['one', 'two']
    conditioning = control.conditioning_of(nets, IMAGE)
    batch = BATCH | control.batch_of(nets, control.settings_of(nets, np.arange(5.0)), N)
    values = {c.name: c.compute({}, batch, False) for c in conditioning}
    weights = base()[1].ema['denoiser']
    own = {name: tree for name, tree in weights.items() if name != 'text'}
    x, t, tokens = BATCH['image'], np.array([3.0, 3.0]), RNG.normal(size=(N, 3, 5)).astype(np.float32)

    def plain(params, x, t, embeddings, train, rngs):
        return module.apply({'params': params}, x, t, **embeddings, train=train)

    network = control.attach(control.Network(None, plain), nets)
    params = own | control.weights_of(nets, {}, frozen_of(**stages))

    def ours(values):
        embeddings = {'tokens': tokens}
        parts = [c.embed(values[c.name], x)['control'] for c in conditioning]
        return network.apply(params, x, t, embeddings | {'control': {k: v for p in parts for k, v in p.items()}})

    def maps(net, image):
        weights = stages[net.name][1].ema['control']
        return net.module.apply({'params': weights}, x, t, image, tokens=tokens, train=False)

    one = maps(nets[0], np.repeat((BATCH['edges'] + 1) / 2, 3, -1))
    two = maps(nets[1], (BATCH['mask'] + 1) / 2)
    weak = np.logspace(-1, 0, 5)  # four maps of the way down and the middle
    both = [0.7 * w * a - 0.3 * b for w, a, b in zip(weak, one, two, strict=True)]
    expected = module.apply({'params': own}, x, t, tokens=tokens, control=both, train=False)
    np.testing.assert_allclose(jax.jit(ours)(values), expected, atol=2e-5)
    without = {c.name: c.null(values[c.name]) for c in conditioning}  # guidance leaves the first out
    expected = module.apply({'params': own}, x, t, tokens=tokens, control=[-0.3 * b for b in two], train=False)
    np.testing.assert_allclose(jax.jit(ours)(without), expected, atol=2e-5)
    assert [net.left_out for net in nets] == [True, False]


def with_control(settings, **numbers):
    """Settings with other numbers of the run's own ControlNet."""
    return settings | {'control': {'own': settings['control']['own'] | numbers}}


@pytest.mark.slow
def test_scale_and_steps():
    """Of five steps the first two lie within 0 to 0.4; scale 0 is the base."""
    (family, _), (plain, weights) = controlled(), base()
    state = controlled(seed=4)[1]
    frozen = frozen_of(base=base())
    settings = family.settings()
    assert settings['control'] == {'own': {'scale': 1.0, 'low': -np.inf, 'high': np.inf}}
    full = drawn(family, state, frozen, name='trajectory')['x']
    bare = drawn(plain, weights, {}, name='trajectory')['x']
    off = drawn(family, state, frozen, with_control(settings, scale=0.0), name='trajectory')['x']
    np.testing.assert_allclose(off, bare, atol=1e-5)
    assert np.abs(full[0] - bare[0]).max() > 1e-2

    def path(**fields):
        made = build(families(base=base()), controlnet=OWN, control={'own': fields})
        return drawn(family, state, frozen, made.settings(), name='trajectory')['x']

    np.testing.assert_allclose(path(end=0.4)[:2], full[:2], atol=1e-5)
    assert np.abs(path(end=0.4)[2] - full[2]).max() > 1e-3
    np.testing.assert_allclose(path(start=0.4)[:2], bare[:2], atol=1e-5)
    assert np.abs(path(start=0.4)[2] - bare[2]).max() > 1e-3
    np.testing.assert_allclose(path(start=0.41, end=0.59), bare, atol=1e-5)  # no whole step lies in it


@pytest.mark.parametrize(
    ('start', 'end', 'active'),
    [(0, 1, [1, 1, 1, 1]), (0, 0.5, [1, 1, 0, 0]), (0.25, 0.75, [0, 1, 1, 0]), (0.3, 1, [0, 0, 1, 1]),
     (0, 0.2, [0, 0, 0, 0])],
)  # fmt: skip
@pytest.mark.parametrize('times', [[750, 500, 250, 0], [-4, -3, -2, -1]])  # falling, or counted from the noise on
def test_interval(times, start, end, active):
    """As the flags of diffusers' pipelines, by the number of the step."""
    keep = [1 - float(i / 4 < start or (i + 1) / 4 > end) for i in range(4)]
    assert keep == active
    made = control.interval(np.array(times, np.float32), control.Control(start=start, end=end))
    assert [float(made['low'] <= t <= made['high']) for t in times] == active


@pytest.mark.slow
def test_stages_control_a_run_where_their_image_is_given():
    """A stage that is a ControlNet changes samples of the base where the batch holds its image, and is its own run."""
    stages = dict(one=controlled('edges', 5))
    family = build(families(**stages))
    assert 'edges' in [i.name for i in family.inputs] and family.conditions == ('text',)
    state, frozen = base()[1], frozen_of(**stages)
    batch = {name: x for name, x in BATCH.items() if name != 'edges'}
    np.testing.assert_array_equal(drawn(family, state, frozen, batch=batch), drawn(*base(), {}))
    own, one = controlled('edges', 5)
    np.testing.assert_allclose(drawn(family, state, frozen), drawn(own, one, frozen_of(base=base())), atol=1e-5)
    assert condition_names(family, BATCH) == ['text']


@pytest.mark.slow
def test_the_mask_that_a_controlnet_reads_is_no_hole():
    family = build(families(one=controlled('mask')))
    assert {i.name: i.beside for i in family.inputs} == {'mask': ()}
    assert not conditions.fills_holes(family) and conditions.fills_holes(base()[0])
    changed = build(families(one=controlled('mask')), editing=dict(strength=0.5))
    assert {i.name: i.required for i in changed.inputs} == {'image': True, 'mask': False}
    assert {i.name for i in build(families(one=controlled('edges'))).inputs} == {'image', 'mask', 'edges'}
    both = dict(inpainting=dict(kind='inpainting'))
    with pytest.raises(UserError, match="both read 'mask'"):
        build({'base': build(conditioning=both)}, conditioning=both, controlnet=OWN | {'condition': 'mask'})


@pytest.mark.slow
def test_nothing_is_put_over_samples_under_a_mask():
    family, state = controlled('mask', 5)
    frozen = frozen_of(base=base())
    without = {name: x for name, x in BATCH.items() if name != 'image'}
    np.testing.assert_array_equal(drawn(family, state, frozen), drawn(family, state, frozen, batch=without))
    stage = build(families(one=controlled('mask', 5)))
    made = drawn(stage, base()[1], frozen_of(one=controlled('mask', 5)))
    np.testing.assert_allclose(made, drawn(family, state, frozen), atol=1e-5)


def test_mistakes():
    family = base()[0]
    one = controlled('edges')[0]
    other = build(network=NETWORK | {'heads': 4})
    for stages, model, message in (
        ({}, dict(controlnet=OWN), 'needs config.stages.base'),
        ({'base': one}, dict(controlnet=OWN), 'config.stages.base is the run of a ControlNet'),
        (
            {'base': other},
            dict(controlnet=OWN),
            r'config.stages.base is a run of another model: config.model.network.heads = 2 here, 4',
        ),
        ({'one': one}, dict(network=NETWORK | {'heads': 4}), 'config.stages.one is a run of another model'),
        ({}, dict(control=dict(own=dict(scale=1.0))), 'no ControlNet of its own'),
        ({}, dict(control=dict(one=dict(scale=1.0))), 'needs config.stages.one'),
        ({'base': family}, dict(controlnet=OWN, control=dict(own=dict(start=0.6, end=0.4))), 'at most end, 0.4'),
        ({'base': family}, dict(controlnet=OWN | {'hint': ()}), 'hint must be one number or more'),
        ({'base': family}, dict(controlnet=OWN | {'depths': (1,)}), 'depths must be 2 numbers'),
    ):
        with pytest.raises(UserError, match=message):
            build(stages, **model)
    halved = build({'base': family}, controlnet=OWN | {'hint': (4, 4)})
    with pytest.raises(UserError, match=r'1 halvings of edges, 8x8, are 4x4 pixels, and the network reads 8x8'):
        jax.eval_shape(halved.init, jax.random.key(0), BATCH, frozen_of(base=base()))
    with pytest.raises(UserError, match=r"needs 'edges' in config\.data\.features"):
        without = {name: x for name, x in BATCH.items() if name != 'edges'}
        jax.eval_shape(one.init, jax.random.key(0), without, frozen_of(base=base()))
