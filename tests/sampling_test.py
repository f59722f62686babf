"""Options of sampling: which of them are arguments of a compiled program, and what compiles."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys

import jax
import numpy as np
import pytest
import support
from support import assemble, devices, first_batch, path

import jaxgen
from jaxgen import assembly, conditions, directory, options, run, sample, sharding
from jaxgen import config as configs
from jaxgen.diffusion import levels, samplers
from jaxgen.errors import UserError
from jaxgen.options import Component, Fields

# --- every field that is marked TRACED, in every family


def sections_of(known: dict, where: tuple = ()):
    """(path, fields) of a section and of those within it, every component of a table being one."""
    yield where, known
    for name, field in known.items():
        if isinstance(field.section, Component):
            for component in field.section.table:
                own = field.section.fields(component)
                yield from sections_of(own, (*where, f'{name}={component}'))
        elif isinstance(field.section, Fields):
            yield from sections_of(field.section.fields(), (*where, name))


def marked(family: str) -> set[tuple]:
    """Paths of the fields that are marked TRACED."""
    known = options.fields(configs.builder(family))
    return {(*where, name) for where, own in sections_of(known) for name, field in own.items() if field.traced}


MARKED = {family: paths for family in configs.families() if (paths := marked(family))}


def present(known: dict, values: dict, where: tuple = ()):
    """(path, Field, value) of the traced fields of a complete section."""
    for name, field in known.items():
        value = values[name]
        if isinstance(field.section, Component):
            own = options.own_fields(value)
            yield from present(field.section.fields(value['name']), own, (*where, f'{name}={value["name"]}'))
        elif isinstance(field.section, Fields):
            yield from present(field.section.fields(), value, (*where, name))
        elif field.traced:
            yield (*where, name), field, value


def others(field: options.Field, value) -> list:
    """Values of a field that differ from its own, as its annotation allows them."""
    if isinstance(value, str):
        return [v for rule in field.constraints if isinstance(rule, options.Choice) for v in rule.allowed if v != value]
    if isinstance(value, tuple):
        return [tuple(0.9 * v for v in value)] if value else []
    candidates = [0.8 * value, 0.5 * value + 0.3, value + 0.1]
    return [v for v in candidates if v != value and allowed(field, v)]


def allowed(field: options.Field, value) -> bool:
    try:
        for rule in field.constraints:
            rule.check(field.name, value)
    except UserError:
        return False
    return True


def nested(where: tuple, value):
    """The fields {section: {field: value}} of a path."""
    for name in reversed(where):
        value = {name.partition('=')[0]: value}
    return value


GUIDED = {'scale': 2.0, 'low': 0.1, 'high': 5.0, 'rescale': 0.5}
FLUX = {'name': 'flux', 'channels': 16, 'heads': 2, 'blocks': 1, 'single_blocks': 1, 'axes': (2, 2, 4)}
# Configs in which the marked fields do something: [(config, its changed fields)].
BASES = {
    'consistency': [('consistency_digits', {'sampler': {'levels': (80.0, 2.0)}})],
    'diffusion': [
        ('dit_digits', {'guidance': GUIDED}),
        ('dit_digits', {'guidance': {'conditions': ('label',), 'scales': (2.0,)}}),
        ('adm_digits:guided', {'sampler': {'name': 'ancestral'}}),
        *[('flow_digits', {'sampler': {'name': 'euler_maruyama', 'steps': 3, 'last_step': 0.02}})],
        *[
            (name, {'sampler': {'name': sampler, 'steps': 3}})
            for name in ('score_vp_digits', 'flow_digits')
            for sampler in samplers.SAMPLERS
        ],
        *[('score_vp_digits', {'sampler': {'name': s, 'steps': 3, 'eta': 0.5}}) for s in ('ddim', 'euler_ancestral')],
        ('score_vp_digits', {'sampler': {'name': 'heun', 'steps': 4, 's_churn': 0.5, 's_min': 0.01, 's_max': 10.0}}),
        ('flow_digits', {'sampler': {'name': 'euler', 'steps': 3, 'ramp': 'karras', 'ramp_ends': (0.05, 0.9)}}),
        ('flow_digits', {'sampler': {'name': 'euler', 'steps': 3, 'rounding': 'down', 'least_alpha': 0.01}}),
        ('sit_digits', {'sampler': {'name': 'euler', 'steps': 3, 'dynamic_shift': 'linear', 'token_range': (4, 64)}}),
        ('flow_digits', {'network': FLUX, 'guidance': {'distilled': 3.5}}),
    ],
    'gan': [('conditional_gan_digits', {'truncation': 0.5})],
    'glow': [('glow_digits', {})],
    'maskgit': [('maskgit_digits', {'top_p': 0.9})],
    'pixelcnn': [('pixelcnn_digits', {})],
    'pixelcnn_pp': [('pixelcnn_pp_digits', {})],
    'real_nvp': [('real_nvp_digits', {})],
    'stylegan2': [('stylegan2_digits', {})],
    'transformer': [('transformer_digits', {'top_p': 0.9})],
    'var': [('var_digits', {'top_p': 0.9, 'guidance': 1.5})],
}


# Whole numbers and truths, which `others` does not vary; tests/diffusion/samplers_test.py holds them.
WHOLE = ('offset', 'unit_start', 'skip_first', 'grid', 'token_range')
VISITS = {field.name for field in dataclasses.fields(levels.Visits)} - {*WHOLE}


def of_any_sampler(where: tuple) -> tuple:
    """The path of a field, one for all samplers where it says which noise levels they visit: all get these alike."""
    return ('sampler', where[-1]) if where[0].startswith('sampler=') and where[-1] in VISITS else where


IMPOSSIBLE = {'diffusion': {(f'sampler={name}', field) for name in samplers.SAMPLERS for field in WHOLE}}


def config_of(name: str, model: dict):
    """A tiny config with these fields of config.model."""
    name, _, variant = name.partition(':')
    config = configs.load(path(name, f'{variant},tiny' if variant else 'tiny'))
    changed = options.update(configs.builder(config.family), config.model.to_dict(), model)
    return configs.make(**{**config.to_dict(), 'model': changed})


def traced(assembled: assembly.Assembled, batch: dict) -> tuple[str, list]:
    """The sampler of a family as a jaxpr, and the constants in it."""
    family = assembled.family
    jaxpr = jax.make_jaxpr(family.sample)(
        assembled.abstract, assembled.frozen, batch, jax.random.key(0), sample.settings_of(family)
    )
    constants = []

    def collect(closed):
        constants.extend(closed.consts)
        inner(closed.jaxpr)

    def inner(jaxpr):
        for eqn in jaxpr.eqns:
            for value in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda v: hasattr(v, 'eqns')):
                if hasattr(value, 'consts'):
                    collect(value)
                elif hasattr(value, 'eqns'):
                    inner(value)

    collect(jaxpr)
    return re.sub('0x[0-9a-f]+', '', str(jaxpr)), constants


@pytest.mark.slow
@pytest.mark.parametrize('family', sorted(MARKED))
def test_marked_fields_reach_the_program_by_settings_alone(family):
    """The sampler that is traced with one value of a field is that of another: the same operations and constants."""
    seen = set()
    for name, model in BASES[family]:
        try:
            assembled = assemble(config_of(name, model))
        except UserError:  # a sampler that does not go with this process
            continue
        assert {where[0].partition('=')[0] for where in MARKED[family]} <= set(assembled.family.sampling)
        assert set(assembled.family.sampling) <= set(assembled.family.free)
        build, own = configs.builder(family), assembled.config.model.to_dict()
        given = {k: np.asarray(v) for k, v in conditions.first(assembled, assembled.config, 2, {}).items()}
        given = jax.eval_shape(sample.to_inside, given)
        first = None
        for where, field, value in present(options.fields(build), own):
            for new in others(field, value):
                try:
                    changed = assembled.with_model(
                        options.complete(build, options.update(build, own, nested(where, new)), 'model')
                    )
                except UserError:
                    continue
                before, after = (sample.settings_of(a.family) for a in (assembled, changed))
                if sample.program(assembled.family) is not sample.program(changed.family):
                    continue  # switched something on or off
                if all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after))):
                    continue  # not read in this config
                first = first or traced(assembled, given)
                text, constants = traced(changed, given)
                assert text == first[0], f'{where} {value} -> {new} changes the program'
                assert len(constants) == len(first[1]) and all(map(np.array_equal, constants, first[1])), where
                seen.add(where)
                break
    seen = {*map(of_any_sampler, seen)}
    expected = {*map(of_any_sampler, MARKED[family] - IMPOSSIBLE.get(family, set()))}
    assert seen == expected, f'no base in which these do anything: {expected - seen}'


def test_all_families_with_marked_fields_have_bases():
    assert set(BASES) == set(MARKED)


# --- what compiles


@pytest.fixture
def compiled():
    """A list that gets an entry for everything that XLA compiles."""
    events: list[str] = []

    def listen(event: str, duration: float, **_):
        if 'backend_compile' in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@functools.cache
def untrained(name: str) -> run.Run:
    """A run of random weights by a tiny config, which was never trained."""
    config = config_of(name, {})
    assembled = assemble(config)
    state = jax.jit(assembled.family.init)(jax.random.key(0), first_batch(config), assembled.frozen)
    rng = np.random.default_rng(0)

    def shaken(w):
        return w + 0.03 * rng.normal(size=w.shape).astype(np.float32) if w.dtype == np.float32 else w

    return run.Run('', config, assembled, state.replace(ema=jax.tree.map(shaken, state.ema)), 'ema')


def without_weights(name: str) -> run.Run:
    """A run that can be given options and nothing more."""
    config = config_of(name, {})
    return run.Run('', config, assemble(config), None, 'ema')


def with_config(given: run.Run, model: dict) -> run.Run:
    """The same weights in a family that was built with these fields, and compiled for it alone."""
    options_of = options.update(configs.builder(given.config.family), given.config.model.to_dict(), model)
    config = configs.make(**{**given.config.to_dict(), 'model': options_of})
    assembled = assemble(config)
    alone = assembled.family._replace(program=None)
    return run.Run('', config, run.dataclasses.replace(assembled, family=alone), given.state, 'ema')


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two images' pixels, in grey levels."""
    return np.abs(a.astype(int) - b.astype(int)).max()


SHIFTED = {'sampler.name': 'heun', 'sampler': {'steps': 4}, 'sampler.shift': 3}
# (config, first options, options that compile nothing after these).
CHANGES = [
    ('gan_digits', {'truncation': 0.9}, {'truncation': 0.2}),
    ('glow_digits', {'temperature': 0.9}, {'temperature': 0.5}),
    ('dit_digits', {'guidance': {'scale': 2.0}}, {'guidance.scale': np.float32(4), 'guidance.high': 3.0}),
    ('flow_digits', {'sampler': {'name': 'heun', 'steps': 4}}, SHIFTED),
    ('conditional_gan_digits', {'truncation': 0.9}, {'truncation': 0.2}),
    ('transformer_digits', {'top_p': 0.9}, {'top_p': 0.5, 'temperature': 0.5}),
]
QUICK, *SLOW = CHANGES


@pytest.mark.parametrize(
    'name, first, second', [QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_other_values_and_numbers_compile_nothing(name, first, second, compiled):
    """And give what a run gives whose config has them."""
    made = untrained(name)
    made.sample(4, **first)
    assert compiled
    del compiled[:]
    changed = made.sample(4, 3, **second)
    five = made.sample(5, 3, **second)
    one = made.sample(1, 3, **second)
    back = made.sample(4, **first)
    assert not compiled
    assert distance(five[:4], changed) <= 1 and distance(one, changed[:1]) <= 1 and len(five) == 5
    np.testing.assert_array_equal(made.sample(4, **first), back)
    assert distance(back, changed) > 5
    baked = with_config(made, made.with_sampling(**second).config.model.to_dict()).sample(4, 3)
    assert distance(baked, changed) <= 1


def test_several_seeds():
    made = untrained('gan_digits')
    several = made.sample(2, seed=[3, 7])
    np.testing.assert_array_equal(several, np.concatenate([made.sample(2, seed) for seed in (3, 7)]))
    assert made.sample(seed=(1, 2, 3)).shape[0] == 3 and made.sample(0, seed=[]).shape[0] == 0


def test_mistakes_in_options(no_compile):
    made = without_weights('glow_digits')
    for given, message in (
        ({'temprature': 0.5}, "takes no option 'temprature'.* its options are temperature"),
        ({'width': 3}, "'width': training depends on config.model.width"),
        ({'draws': 3}, "'draws': it does not read config.model.draws"),
        ({'temperature': -1.0}, 'config.model.temperature must be 0 or more'),
        ({'temperature': 'high'}, 'config.model.temperature must be float'),
        ({'temperature': np.nan}, 'config.model.temperature must be a finite number'),
        ({'temperature.x': 1}, 'config.model.temperature must be'),
        ({'temperature': {(1, 2): 3}}, 'config.model.temperature must be float'),
        ({'seed': [1, -1]}, 'seed must be from 0'),
        ({'seed': 'x'}, 'seed must be an integer'),
        ({'seed': [[1, 2], [3]]}, 'seed must be an integer'),
    ):
        with pytest.raises(UserError, match=message) as e:
            made.sample(1, **given)
        assert '\n' not in str(e.value)
    with pytest.raises(UserError, match=r"'steps': did you mean sampler=\{'steps': \.\.\.\}\?"):
        without_weights('ddpm_digits').sample(1, steps=3)


def test_sections_are_put_together_from_names_dicts_and_dots(no_compile):
    made = without_weights('flow_digits')
    for given in (
        {'sampler': {'name': 'ddim', 'steps': 7, 'eta': 0.5}},
        {'sampler': 'ddim', 'sampler.steps': 7, 'sampler.eta': 0.5},
        {'sampler.eta': np.float32(0.5), 'sampler': {'steps': np.int64(7)}, 'sampler.name': 'ddim'},
    ):
        sampler = made.with_sampling(**given).config.model.sampler
        assert (sampler.name, sampler.steps, sampler.eta) == ('ddim', 7, 0.5)
    assert made.config.model.sampler.name != 'ddim' and made.with_sampling() is made
    for given, message in (
        ({'sampler': {'eta': 2.0, 'name': 'ddim'}}, 'config.model.sampler.eta must be'),
        ({'sampler': 'best'}, 'config.model.sampler.name must be one of'),
        ({'sampler.order': 3, 'sampler': 'heun'}, 'config.model.sampler.order: no such field'),
        ({'process.name': 'vp'}, "'process.name': training depends on config.model.process"),
        ({'guidance.scale': 3.0}, 'config.model.guidance needs'),
    ):
        with pytest.raises(UserError, match=message):
            made.with_sampling(**given)


@pytest.mark.parametrize(
    'fields',
    [
        {'model': {'sampler': {'name': 'ddim', 'steps': 7}}},
        {'model': {'sampler': {'steps': np.int64(7)}}, 'model.sampler.name': 'ddim'},
        {'model.sampler': 'ddim', 'model.sampler.steps': 7},
    ],
)
def test_a_run_is_loaded_with_options_as_it_samples_with_them(fields, tmp_path, no_compile):
    """Of the former sampler what the other one has stays, and nothing else."""
    saved = config_of('ddpm_digits', {'sampler': {'clip': False, 'variance': 'fixed_large'}})
    directory.save_config(str(tmp_path), saved, run.data.spec(saved.data))
    with pytest.raises(UserError, match='has no checkpoint yet'):
        run.load(str(tmp_path), config=fields)
    used, _ = directory.used_config(str(tmp_path), saved, configs.nested_fields(configs.plain(fields)), frozenset())
    sampled = run.Run('', saved, assemble(saved), None, 'ema').with_sampling(sampler={'name': 'ddim', 'steps': 7})
    assert used.model == sampled.config.model
    assert (used.model.sampler.clip, 'variance' in used.model.sampler) == (False, False)


@pytest.mark.parametrize(
    'path, fields, message',
    [
        (None, None, 'workdir must be a path; it is None'),
        (b'run', None, 'workdir must be a path'),
        ('run', 'ddpm_digits', "config must be the fields that differ.*it is 'ddpm_digits'"),
        ('run', [('seed', 1)], 'config must be the fields that differ'),
        ('run', {1: 2}, 'a field is named by a text'),
        (
            'run',
            {'model.sampler.steps': 1, 'model': {'sampler': {'steps': 2}}},
            'config.model.sampler.steps is given',
        ),
    ],
)
def test_mistakes_in_loading(path, fields, message, no_compile):
    with pytest.raises(UserError, match=message):
        jaxgen.load(path, config=fields)


def test_sizes_of_batches():
    """One that is compiled is taken again, unless it is far too large or would have to be run many times."""
    made = without_weights('gan_digits')
    model = made.model._replace(family=made.model.family._replace(program='of this test'))
    many, compiled = sharding.round_up(model.mesh, 1), sample.program(model.family)
    assert sample.batch_size(model, compiled, 4 * many, 256) == 4 * many
    compiled.sizes.add((model.mesh, 4 * many))
    for n in (1, 3, 4, 5, 31, 32):
        assert sample.batch_size(model, compiled, n * many, 256) == 4 * many
    assert sample.batch_size(model, compiled, 33 * many, 256 * many) == 33 * many
    assert sample.batch_size(model, compiled, 1000 * many, 256 * many) == 256 * many
    compiled.sizes.add((model.mesh, 256 * many))
    assert sample.batch_size(model, compiled, 1000 * many, 256 * many) == 256 * many
    assert sample.batch_size(model, compiled, 20 * many, 256 * many) == 4 * many


@pytest.mark.slow
def test_films_take_the_same_options():
    made = untrained('flow_digits')
    options_of = {'sampler': {'name': 'ddim', 'steps': 4}}
    film = made.film(2, 5, **options_of, **{'sampler.shift': 2.0})
    longer = made.film(3, 5, **options_of, **{'sampler.shift': 1.5})
    assert film.shape[:3] == (2, 2, 4) and longer.shape[0] == 3
    assert distance(made.film(2, 5, **options_of, **{'sampler.shift': 2.0}), film) == 0
    np.testing.assert_array_less(5, distance(longer[:2], film))
    baked = with_config(made, {'sampler': {'name': 'ddim', 'steps': 4, 'shift': 2.0}}).film(2, 5)
    assert distance(baked, film) <= 1


@pytest.mark.slow
def test_on_eight_devices(tmp_path):
    """The tests of what compiles, where batches are cut over devices."""
    command = [sys.executable, '-m', 'pytest', '-q', '-n', '0', '-p', 'no:cacheprovider', __file__]
    chosen = 'compile_nothing and gan_digits and not conditional or seeds or sizes'
    done = support.run([*command, '-k', chosen], devices(8), timeout=500)
    assert done.returncode == 0 and '3 passed' in done.stdout, done.stdout[-3000:]
