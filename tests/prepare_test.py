"""Frozen stages' work done once: the same updates as in every update, kept safely, and never mixed up."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_sets import encoded, random_image
from support import NAMES, assemble, assert_same, first_batch, metrics, tiny, tiny_stage

from jaxgen import assembly, directory, prepare, run, testing
from jaxgen import config as configs
from jaxgen.data import prepared as sets
from jaxgen.errors import UserError
from jaxgen.train import train

STAGED = [name for name in NAMES if 'first' in tiny(name).stages]


@pytest.mark.slow
@pytest.mark.parametrize('name', STAGED)
def test_updates_are_those_of_images(name):
    """Of every config with a first stage, which has random weights here."""
    config = tiny(name, optim={'accumulate': 2 if name == 'maskgit_digits' else 1})
    a = assemble(config)
    subject = testing.Subject(a.family, a.frozen, first_batch(config), {})
    reason = prepare.why_not(a, prepare.analyse(a))
    expected = config.data.crop != 'center' or 'other' in config.data.features
    assert a.family.prepare is not None and bool(reason) == expected, reason
    testing.check_prepare(subject, jax.jit(a.family.init)(jax.random.key(0), subject.batch, a.frozen))


# --- trainings


@pytest.fixture(scope='module')
def stage(tmp_path_factory):
    """A trained tiny VQ-VAE of digits."""
    config = tiny_stage('runs/vqvae_digits')
    config.train.steps, config.train.save_every, config.train.log_every = 1, 1, 1
    config.train.sample_every = 1
    folder = str(tmp_path_factory.mktemp('stage') / 'vqvae')
    train(config, folder)
    return folder


@pytest.fixture
def few(monkeypatch):
    """Sets of several files."""
    monkeypatch.setattr(sets, 'MOST_EXAMPLES', 500)  # of 1,438


def config_of(stage: str, where, **sections):
    """A tiny MaskGIT on codes of the stage, whose sets lie in `where`."""
    fields = {
        'stages': {'first': stage},
        'data': {'prepared': 'on', 'prepared_dir': str(where), 'flip': True, 'batch': 8},
        'train': {'steps': 4, 'log_every': 1, 'save_every': 2, 'sample_every': 4, 'samples': 1, 'updates_per_call': 1},
        'sample': {'batch': 1},
    }
    return tiny('maskgit_digits', **configs.deep_update(fields, sections))


def saved_about(workdir) -> dict:
    """config.json of a run."""
    with open(os.path.join(workdir, 'config.json'), encoding='utf-8') as file:
        return json.load(file)


def weights(workdir):
    return jax.device_get(run.load(str(workdir), all_weights=True).state)


@pytest.mark.slow
def test_trains_as_from_images_and_resumes_bit_for_bit(stage, tmp_path, few, capsys, monkeypatch):
    for name, prepared in (('images', 'off'), ('whole', 'on'), ('parts', 'on')):
        steps = 2 if name == 'parts' else 4
        train(config_of(stage, tmp_path / 'sets', data={'prepared': prepared}, train={'steps': steps}), tmp_path / name)
    text = capsys.readouterr().err
    assert text.count('computed once') == 1 and text.count('read from') == 1 and '2 views of each' in text
    shutil.rmtree(tmp_path / 'sets')  # as when other sets needed the space; 'auto' goes on as the run began
    train(config_of(stage, tmp_path / 'sets', data={'prepared': 'auto'}), tmp_path / 'parts')
    assert_same(weights(tmp_path / 'whole'), weights(tmp_path / 'parts'))
    assert metrics(tmp_path / 'whole') == metrics(tmp_path / 'parts')
    assert 'rounding' not in capsys.readouterr().err
    for ours, theirs in zip(metrics(tmp_path / 'whole'), metrics(tmp_path / 'images'), strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-4)
    # A run that began without goes on without, and one that is told otherwise says what that means.
    long = {'data': {'prepared': 'auto'}, 'train': {'steps': 5}}
    monkeypatch.setattr(prepare, 'is_worth_it', lambda *_: True)
    train(config_of(stage, tmp_path / 'sets', **long), tmp_path / 'images')
    assert saved_about(tmp_path / 'images')['data']['prepared'] == 'off'
    capsys.readouterr()
    train(config_of(stage, tmp_path / 'sets', train={'steps': 6}), tmp_path / 'images')
    assert 'differs by rounding' in capsys.readouterr().err


def test_runs_saved_before_go_on_as_they_were(tmp_path):
    """Without the fields in config.json: no prepared set, and each stage in its own dtype."""
    config = tiny('maskgit_digits', train={'dtype': 'bfloat16'})
    saved = config.to_dict()
    del saved['data']['prepared'], saved['data']['prepared_dir'], saved['data']['prepared_gb']
    del saved['train']['stages_dtype']
    (tmp_path / 'config.json').write_text(json.dumps(saved))
    read = directory.saved_config(str(tmp_path))
    assert (read.data.prepared, read.train.stages_dtype) == ('off', 'stage')
    seen = []

    def of_stage(path, mesh, dtype=''):
        seen.append(dtype)
        return assembly.abstract_stage(path, mesh, dtype)

    for c in (read, config):
        assembly.assemble(c, stage=of_stage)
    assert seen == ['', 'bfloat16']


def test_frozen_stages_compute_in_the_dtype_of_the_run():
    """bfloat16: 8 bits of a product's factors; weights stay float32."""
    for dtype, found in (('float32', False), ('bfloat16', True)):
        config = tiny('maskgit_digits', train={'dtype': dtype})
        a = assembly.assemble(config, stage=assembly.abstract_stage)
        assert ('bf16' in prepare.analyse(a).text) == found
        assert {x.dtype for x in jax.tree.leaves(a.frozen)} <= {jnp.dtype('float32'), jnp.dtype('int32')}


def plan(stage, where, **sections):
    a = assembly.assemble(config_of(stage, where, **sections))
    return a, prepare.plan_or_reason(a, a.dataset('train'), 'on')


def test_a_set_is_of_its_images_and_weights_alone(stage, tmp_path):
    """Its name is the same where a value can be no other, and another one where it can."""
    name = plan(stage, tmp_path)[1].name
    same = [
        {'seed': 5, 'model': {'channels': 32}, 'optim': {'lr': 1.0}, 'train': {'steps': 9}},
        {'data': {'batch': 16, 'threads': 1, 'cache_mb': 0, 'features': ('image', 'label', 'domain')}},
    ]
    others = [
        {'data': {'pad': 1}},
        {'data': {'pad': 1, 'fill': 'edge'}},
        {'data': {'validation_fraction': 0.1}},
        {'data': {'binarise': 'fixed'}},
        {'train': {'dtype': 'bfloat16'}},
    ]
    assert {plan(stage, tmp_path, **fields)[1].name for fields in same} == {name}
    different = [plan(stage, tmp_path, **fields)[1].name for fields in others]
    assert len({name, *different}) == len(others) + 1
    a, _ = plan(stage, tmp_path)
    state, its = a.frozen['first']
    a.frozen['first'] = (jax.tree.map(lambda x: x + 1e-3 if x.dtype == jnp.float32 else x, state), its)
    assert prepare.plan_or_reason(a, a.dataset('train'), 'on').name not in {name, *different}


@pytest.mark.parametrize('called', ['itself', 'jit', 'scan', 'checkpoint', 'cond', 'custom_vjp', 'literal'])
def test_programs_that_differ_in_a_constant_differ(called):
    """Wherever it is closed over."""

    def text(values: np.ndarray) -> str:
        def multiply(x):
            return x * (float(values[50]) if called == 'literal' else values)

        def twice(x):
            return jax.lax.scan(lambda s, _: (jax.jit(multiply)(s), None), x, None, length=2)[0]

        same = jax.custom_vjp(multiply)
        same.defvjp(lambda x: (multiply(x), None), lambda _, g: (g,))
        call = {
            'jit': jax.jit(multiply),
            'scan': twice,
            'checkpoint': jax.checkpoint(multiply),
            'cond': lambda x: jax.lax.cond(x[0] > 0, jax.jit(multiply), lambda x: x, x),
            'custom_vjp': same,
        }.get(called, multiply)
        closed = jax.make_jaxpr(call)(jnp.ones(2000))
        return prepare.program_text(closed.jaxpr, closed.consts)

    values = np.arange(2000, dtype=np.float32)
    other = values.copy()
    other[50] += 1e-5
    assert text(values) == text(values.copy()) != text(other)


def test_a_changed_image_of_a_large_folder_has_another_set(stage, tmp_path):
    """Its identity is names and sizes alone; also what could not be decoded is of a limit."""
    for i in range(12):
        (tmp_path / 'images').mkdir(exist_ok=True)
        (tmp_path / 'images' / f'{i}.bmp').write_bytes(encoded(random_image(i), 'BMP'))
    data = {
        'source': f'folder:{tmp_path / "images"}',
        'direct': 0,
        'dir': str(tmp_path / 'sets'),
        'features': ('image',),
    }
    fields = {'data': data, 'model': {'conditional': False}}
    names = [plan(stage, tmp_path, **fields)[1].name for _ in range(2)]
    path = tmp_path / 'images' / '3.bmp'
    path.write_bytes(encoded(random_image(50), 'BMP'))
    names.append(plan(stage, tmp_path, **fields)[1].name)
    fields['data']['max_pixels'] = 2**20
    names.append(plan(stage, tmp_path, **fields)[1].name)
    assert names[0] == names[1] and len(set(names)) == 3


def test_what_was_stopped_goes_on(stage, tmp_path, few, monkeypatch):
    """And is the same as in one go; files that another process wrote meanwhile are not made again."""
    a, p = plan(stage, tmp_path / 'one')
    whole = prepare.prepared(a, p)
    monkeypatch.setattr(prepare.random, 'random', lambda: 0.5)
    a, p = plan(stage, tmp_path / 'two')
    write, written = prepare.write, []

    def stops(directory, layout, file, pieces):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(file)
        write(directory, layout, file, pieces)

    monkeypatch.setattr(prepare, 'write', stops)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepared(a, p)
    monkeypatch.setattr(prepare, 'write', lambda *args: (written.append(args[2]), write(*args)))
    again = prepare.prepared(a, p)
    assert sorted(written) == [0, 1, 2] and written[0] == 1
    assert again.identity == whole.identity
    os.truncate(os.path.join(again.directory, '00002.features'), 100)
    assert prepare.prepared(a, p).identity == whole.identity and written[3:] == [2]


def test_values_are_those_of_the_stage(stage, tmp_path):
    a, p = plan(stage, tmp_path, data={'batch': 40})
    made, examples = prepare.prepared(a, p), a.dataset('train')
    indices, flip = np.array([3, 1000, 1437, 7]), np.array([0, 1, 0, 1])
    images = examples.take(indices)['image']
    images[flip > 0] = images[flip > 0, :, ::-1]
    encode = jax.jit(a.context.stages['first'].encode)
    codes = encode(*a.frozen['first'], {'image': jnp.asarray(images / 127.5 - 1, jnp.float32)}, jax.random.key(0))
    batch = made.take(indices, flip)
    assert set(batch) == {'first/codes0'} and batch['first/codes0'].dtype == np.uint16
    np.testing.assert_array_equal(batch['first/codes0'], codes[0])


@pytest.mark.parametrize(
    ('fields', 'words'),
    [
        ({'crop': 'random'}, "config.data.crop = 'random'"),
        ({'binarise': 'dynamic'}, "config.data.binarise = 'dynamic'"),
        ({'prepared_gb': 1e-6}, 'config.data.prepared_gb'),
        ({'prepared_dir': '{}/file/below'}, 'config.data.prepared_dir'),
        ({'prepared_dir': '{}/others'}, 'others may write'),
    ],
)
def test_says_why_nothing_can_be_prepared(stage, tmp_path, no_compile, fields, words, capsys):
    """In one line, before anything is compiled; where the person has not asked for it, images are read."""
    (tmp_path / 'file').write_text('')
    (tmp_path / 'others').mkdir()
    (tmp_path / 'others').chmod(0o777)
    fields = {name: v.format(tmp_path) if isinstance(v, str) else v for name, v in fields.items()}
    a = assembly.assemble(config_of(stage, tmp_path / 'sets', data=fields))
    with pytest.raises(UserError, match=r'^config\.data\.prepared = on: ') as caught:
        prepare.for_training(a, a.dataset('train'))
    assert words in str(caught.value) and '\n' not in str(caught.value)
    a.config.data.prepared = 'auto'
    a.config.train.steps = 10_000
    assert prepare.for_training(a, a.dataset('train')) is None
    assert words in capsys.readouterr().err


def test_a_family_without_frozen_work(tmp_path, no_compile, capsys):
    a = assembly.assemble(tiny('ddpm_digits'))
    assert prepare.for_training(a, a.dataset('train')) is None and not capsys.readouterr().err
    a.config.data.prepared = 'on'
    with pytest.raises(UserError, match='frozen stages'):
        prepare.for_training(a, a.dataset('train'))


def test_encoders_that_draw_noise_are_run_in_every_update(stage, tmp_path):
    a, _ = plan(stage, tmp_path)
    codes = a.family.prepare

    def noisy(frozen, batch, rng):
        return {**codes(frozen, batch, rng), 'first/noise': jax.random.normal(rng, (len(batch['image']),))}

    a = assembly.dataclasses.replace(a, family=a.family._replace(prepare=noisy))
    assert 'random numbers' in prepare.plan_or_reason(a, a.dataset('train'), 'on')


def test_what_does_not_depend_on_the_image_has_one_view(stage, tmp_path):
    """Embedded captions, say: kept once for each example."""
    a, _ = plan(stage, tmp_path, data={'features': ('image', 'label')})
    codes = a.family.prepare

    def embedded(frozen, batch, rng):
        return {**codes(frozen, batch, rng), 'text/embedding': 0.5 * batch['label'][:, None]}

    a = assembly.dataclasses.replace(a, family=a.family._replace(prepare=embedded))
    p = prepare.plan_or_reason(a, a.dataset('train'), 'on')
    assert p.program.reads == ('image', 'label') and p.layout.views == 2
    assert {name: f.by_view for name, f in p.layout.features.items()} == {'first/codes0': True, 'text/embedding': False}
    made, examples = prepare.prepared(a, p), a.dataset('train')
    indices = np.arange(5, 1400, 100)
    for flip in (0, 1):
        batch = made.take(indices, np.full(len(indices), flip))
        np.testing.assert_array_equal(batch['text/embedding'][:, 0], 0.5 * examples.take(indices)['label'])


@pytest.mark.slow
def test_what_text_encoders_make_of_captions(tmp_path):
    """The updates are those of captions that are read in each."""
    fields = {'data': {'prepared_dir': str(tmp_path / 'sets')}, 'train': {'steps': 2, 'log_every': 1, 'save_every': 2}}
    base = tiny('ldm_text_shapes', **fields)
    for name, path in base.stages.items():
        base.stages[name] = str(tmp_path / os.path.basename(path))
        of_stage = tiny_stage(path)
        of_stage.stages = {}
        if of_stage.family == 'vqgan':
            of_stage.model.perceptual = 0.0
        train(of_stage, base.stages[name])
    for prepared in ('on', 'off'):
        base.data.prepared = prepared
        train(base.copy_and_resolve_references(), str(tmp_path / prepared))
    made, read = (metrics(str(tmp_path / prepared)) for prepared in ('on', 'off'))
    assert len(made) == len(read) == 2
    for a, b in zip(made, read, strict=True):
        np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-4)
