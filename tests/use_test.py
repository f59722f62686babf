"""Using a trained run: what may be changed, whose paths are followed, where outputs go, and runs that have moved."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import assert_same, mistake, path, python_on, saved_state

from jaxgen import arguments as command
from jaxgen import config as configs
from jaxgen import directory, library, origin, outputs, run, sample
from jaxgen.contract import Family
from jaxgen.data import captions
from jaxgen.errors import RunError, UserError
from jaxgen.evaluation import held_out
from jaxgen.evaluation.bound import BoundModel
from jaxgen.main import run_main
from jaxgen.networks.first_stage import Decoder
from jaxgen.sections import sides

pytestmark = pytest.mark.slow  # compiles networks, trains or starts processes

VAE, GAN = f'--config={path("vae_digits")}', f'--config={path("conditional_gan_digits")}'
MODES = ('sample', 'evaluate', 'explore')

opened: list[str] | None = None  # paths, while somebody watches


def watch(event: str, args) -> None:
    if opened is not None and event in ('open', 'os.listdir', 'os.scandir') and isinstance(args[0], str | bytes):
        opened.append(os.fsdecode(args[0]))


sys.addaudithook(watch)


@pytest.fixture
def watched(monkeypatch) -> list[str]:
    """The paths of all files and folders that are opened in a test."""
    paths: list[str] = []
    monkeypatch.setattr(sys.modules[__name__], 'opened', paths)
    return paths


def train(*args) -> None:
    assert run_main(['jaxgen', *map(str, args)]) == 0


def use(mode: str, workdir, *args) -> None:
    assert run_main(['jaxgen', f'--mode={mode}', f'--workdir={workdir}', *map(str, args)]) == 0


@pytest.fixture(scope='module')
def vae(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('vae') / 'run'
    train(VAE, f'--workdir={workdir}')
    return workdir


@pytest.fixture
def copy(vae, tmp_path):
    return shutil.copytree(vae, tmp_path / 'copy')


def make_images(folder, shade: int = 0) -> None:
    for number, name in enumerate(('cat', 'dog', 'fox')):
        os.makedirs(folder / name)
        for i in range(6):
            Image.new('L', (8, 8), 40 * number + 5 * i + shade).save(folder / name / f'{i}.png')


@pytest.fixture(scope='module')
def labelled_once(tmp_path_factory):
    root = tmp_path_factory.mktemp('labelled')
    make_images(root / 'images')
    train(GAN, f'--workdir={root}/run', f'--config.data.source=folder:{root}/images',
          f'--config.data.dir={root}/prepared')  # fmt: skip
    return root


@pytest.fixture
def labelled(labelled_once, tmp_path):
    """A run of three classes, 'run', beside a 'moved' copy of its folder and 'others', of other images. The folder that
    it was trained on is away."""
    shutil.copytree(labelled_once / 'run', tmp_path / 'run')
    shutil.copytree(labelled_once / 'images', tmp_path / 'moved')
    make_images(tmp_path / 'others', shade=3)
    os.rename(labelled_once / 'images', labelled_once / 'away')
    yield tmp_path
    os.rename(labelled_once / 'away', labelled_once / 'images')


# --- what may be changed


@pytest.mark.parametrize(
    'text',
    [
        *('model.likelihood=bernoulli', 'model.latent=5', 'model.scale=0.7', 'optim.lr=0.1', 'seed=1', 'data.batch=4'),
        *('data.source=shapes', 'data.source=folder:/nowhere', 'data.flip=True', 'optim.networks.coder.lr=1'),
        *('data.test_fraction=0.5', 'optim.ema=0.5'),
    ],
)
def test_what_training_depends_on_is_not_changed_in_use(text, vae, capfd, no_compile):
    field = text.partition('=')[0]
    for mode in MODES:
        said = mistake(capfd, f'--mode={mode}', f'--workdir={vae}', f'--config.{text}')
        assert 'was trained with another config' in said and field in said, mode
    changed = configs.override(directory.saved_config(str(vae)), [f'--config.{text}'])
    with pytest.raises(UserError, match='was trained with another config'):
        run.load(str(vae), config=changed)
    given: dict | object = configs.get(changed.to_dict(), field)
    for key in reversed(field.split('.')):
        given = {key: given}
    with pytest.raises(UserError, match='was trained with another config'):
        run.load(str(vae), config=given)


def test_what_training_does_not_depend_on_is(vae):
    free = {
        'model': {'iwae_samples': 2},
        'sample': {'batch': 3},
        'evaluate': {'batch': 4, 'examples': 5, 'split': 'test'},
        'train': {'steps': 8, 'dtype': 'bfloat16', 'remat': True},
        'data': {'threads': 1, 'max_corrupt': 0.5},
    }
    loaded = run.load(str(vae), config=free).config
    for field, value in configs.flat(free).items():
        assert configs.get(loaded, field) == value
    # Fields of the model are free by what the family says of them.
    assert run.load(str(vae)).assembled.family.free == ('iwae_samples',)


# --- images of another size


def convolutional(size, **changes):
    """A tiny autoencoder by the factor 2 with attention at half the height, for scenes of `size`."""
    attention = (sides(size)[0] // 2,)
    model = dict(channels=8, multipliers=(1, 2), blocks=1, perceptual=0.0, adversarial=0.0, attention=attention)
    return configs.make(family='vqgan', data=dict(source='shapes', size=size, channels=3, batch=2),
                        model=model | changes, optim=dict(ema=0.0),
                        train=dict(steps=1, sample_every=0))  # fmt: skip


def of_latents(first, size, network: dict, family: str = 'diffusion'):
    model = dict(process='flow', network=network, training=dict(prediction='flow'),
                 sampler=dict(name='euler', steps=2, clip=False))  # fmt: skip
    return configs.make(family=family, stages=dict(first=str(first)), model=model if network else {},
                        data=dict(source='shapes', size=size, channels=3, batch=2), optim=dict(ema=0.0),
                        train=dict(steps=1, sample_every=0))  # fmt: skip


@pytest.fixture(scope='module')
def stages(tmp_path_factory):
    """{name: directory} of autoencoders of images of 16 pixels."""
    root = tmp_path_factory.mktemp('autoencoders')
    for name, changes in {'kl': {}, 'codes': dict(regulariser='vq', vocabulary=8)}.items():
        library.train(convolutional(16, **changes), str(root / name))
    return root


def test_a_convolutional_first_stage_serves_images_of_any_size(stages, tmp_path):
    network = dict(name='latent_unet', channels=8, multipliers=(1,), blocks=1, depths=(1,), heads=2, group_size=4)
    size = height, width = 24, 32
    made = library.train(of_latents(stages / 'kl', size, network), str(tmp_path / 'run'))
    assert made.sample(n=2).shape == (2, height, width, 3)
    state, _ = made.assembled.frozen['first']
    assert_same(state.ema, run.load(str(stages / 'kl')).state.ema)
    # The images of its latents are those that the run itself decodes, with attention at its own level.
    z = np.random.default_rng(0).normal(size=(2, height // 2, width // 2, 4)).astype(np.float32)
    images = run.load(str(stages / 'kl'), config={'data.size': size}).decode(z, dtype=np.float32)
    decoder = Decoder(8, (1, 2), blocks=1, attention=(height // 2,), image_channels=3)
    y, _ = decoder.apply({'params': state.ema['decoder']}, z)
    np.testing.assert_allclose(images, np.clip(y, -1, 1), atol=1e-5)
    again = run.load(str(tmp_path / 'run'))
    np.testing.assert_array_equal(again.sample(n=2), made.sample(n=2))


@pytest.mark.slow
def test_a_trained_run_draws_images_of_another_size(stages, tmp_path, capfd):
    network = dict(name='latent_unet', channels=8, multipliers=(1,), blocks=1, depths=(1,), heads=2, group_size=4)
    workdir = tmp_path / 'run'
    library.train(of_latents(stages / 'kl', 16, network), str(workdir))
    use('sample', workdir, '--n=2')
    use('sample', workdir, '--n=2', '--config.data.size=(32,24)')
    drawn = []
    for file in (workdir / 'samples').glob('*/images/00000.png'):
        with Image.open(file) as image:
            drawn.append(image.size)
    assert sorted(drawn) == [(16, 16), (24, 32)]
    capfd.readouterr()
    said = mistake(capfd, '--mode=sample', f'--workdir={workdir}', '--config.data.size=15')
    assert 'multiple of 2' in said


@pytest.mark.slow
def test_sizes_that_weights_do_not_fit(vae, stages, tmp_path, capfd, no_compile):
    for mode in MODES:
        said = mistake(capfd, f'--mode={mode}', f'--workdir={vae}', '--config.data.size=16')
        assert 'config.data.size = 16: the weights are of images of 8 pixels and fit no other size' in said, mode
    transformer = of_latents(vae, 16, dict(name='dit', channels=8, heads=2, blocks=1))
    transformer.data.channels = 1
    with pytest.raises(UserError, match=r'config\.stages\.first = .*for images of 16: the weights are of images of 8 '):
        library.train(transformer, str(tmp_path / 'run'))
    transformer.data.channels = 3
    with pytest.raises(UserError, match='trained on images of 1 channels'):
        library.train(transformer, str(tmp_path / 'run'))
    with pytest.raises(UserError, match=r'first = .* was trained on images of 16 pixels: .*must be a multiple of 2'):
        library.train(of_latents(stages / 'kl', 15, dict(name='dit', patch=1)), str(tmp_path / 'run'))


@pytest.mark.slow
def test_grids_of_codes_are_those_of_training(stages, tmp_path, capfd):
    """A first stage gives codes of images of any size; what has learned where they lie is of one size."""
    config = of_latents(stages / 'codes', 24, {}, 'maskgit')
    config.model.update(channels=8, blocks=1, heads=2, steps=2)
    made = library.train(config, str(tmp_path / 'run'))
    assert made.sample(n=1).shape == (1, 24, 24, 3)
    capfd.readouterr()
    said = mistake(capfd, '--mode=sample', f'--workdir={tmp_path}/run', '--config.data.size=16')
    assert 'config.data.size = 16: the weights are of images of 24 pixels and fit no other size' in said


def test_another_system(vae, capfd, no_compile):
    assert 'another system' in mistake(
        capfd, '--mode=sample', f'--workdir={vae}', f'--config={path("ddpm_digits")}', '--n=1'
    )
    other = path('vae_digits', '')
    assert 'model.hidden' in mistake(capfd, '--mode=evaluate', f'--workdir={vae}', f'--config={other}')


@pytest.mark.parametrize('seed', [2**31, -1, 2**64, 1.5, True, '1', None])
def test_seeds(seed, vae):
    loaded = run.load(str(vae))
    for call in (
        lambda: loaded.sample(n=1, seed=seed),
        lambda: next(loaded.draw(1, seed)),
        lambda: loaded.film(1, 1, seed),
        lambda: loaded.modes(1, seed),
    ):
        with pytest.raises(UserError, match='seed must be'):
            call()
    with pytest.raises(UserError, match='n must be'):
        loaded.sample(n=-1 if seed is None else seed if isinstance(seed, str | float) else 2**31)


def test_options_that_a_mode_does_not_read():
    """Each of them, in each mode, is read or refused."""
    values = {'n': '2', 'seed': '5', 'film': '2', 'profile': 'true', 'multihost': 'true', 'condition': 'label=1'}
    values['step'] = '4'
    shared = {'mode', 'help', 'version', 'config', 'workdir'}
    for which, names in command.READS.items():
        mode = which.partition(' ')[0]
        for name in sorted({n for others in command.READS.values() for n in others} - shared):
            if name == 'images':
                continue
            text = [
                f'--mode={mode}',
                *['--config=x.py'] * ('config' in names),
                f'--{name}={values.get(name, "params")}',
            ]
            if '--images' in which:
                text.append('--images=here')
            needed = {'import': 'from', 'export': 'to', 'merge': 'to', 'compile': 'topology'}.get(mode, name)
            text += [f'--{needed}=here'] * (needed != name)
            given, *_ = command.parse(['jaxgen', *text])
            if name in names:
                command.check_flags(given)
            else:
                with pytest.raises(UserError, match=rf'--{name} is read by --mode='):
                    command.check_flags(given)
    given, *_ = command.parse(['jaxgen', '--mode=describe', '--config=x.py', '--workdir=y'])
    with pytest.raises(UserError, match='--workdir is read by'):
        command.check_flags(given)


# --- a run without what it was trained on


def test_classes_by_name_without_the_folder(labelled, capfd):
    workdir = labelled / 'run'
    assert json.loads((workdir / 'data.json').read_text())['names'] == ['cat', 'dog', 'fox']
    images = []
    for label in ('fox', '2'):
        use('sample', workdir, '--n=2', f'--condition=label={label}', f'--out={labelled}/{label}')
        with np.load(labelled / label / 'samples.npz') as file:
            images.append(file['images'])
    np.testing.assert_array_equal(*images)
    capfd.readouterr()
    base = ('--mode=sample', f'--workdir={workdir}', '--n=1')
    assert 'did you mean fox?' in mistake(capfd, *base, '--condition=label=foxx')
    assert 'cat, dog, fox' in mistake(capfd, *base, '--condition=label=zebu')
    for label in ('3', '-1'):
        assert 'between 0 and 2' in mistake(capfd, *base, f'--condition=label={label}')
    for text in ('label', '=3', 'label='):
        mistake(capfd, *base, f'--condition={text}')
    # Evaluation needs the images, and says so.
    said = mistake(capfd, '--mode=evaluate', f'--workdir={workdir}')
    assert 'images' in said


def test_a_folder_that_has_moved(labelled, capfd):
    workdir, moved = labelled / 'run', f'--config.data.source=folder:{labelled}/moved'
    others = f'--config.data.source=folder:{labelled}/others'
    prepared = f'--config.data.dir={labelled}/prepared'
    said = mistake(capfd, '--mode=sample', f'--workdir={workdir}', others, prepared, '--n=1')
    assert 'its images are not those' in said and 'others' in said
    said = mistake(capfd, GAN, f'--workdir={workdir}', others, prepared, '--config.train.steps=6')
    assert 'its images are not those' in said
    before = run.load(str(workdir)).state
    loaded = run.load(
        str(workdir), config={'data': {'source': f'folder:{labelled}/moved/', 'dir': f'{labelled}/prepared'}}
    )
    assert_same(loaded.state.ema, before.ema)
    train(GAN, f'--workdir={workdir}', moved, prepared, '--config.train.steps=6')
    assert saved_state(workdir, 6) and directory.saved_config(str(workdir)).data.source == f'folder:{labelled}/moved'


# --- whose paths are followed


def strangers(workdir) -> None:
    """Makes a run one that somebody else trained."""
    signed = json.loads((workdir / origin.NAME).read_text())
    (workdir / origin.NAME).write_text(json.dumps({'paths': '0' * len(signed['paths'])}))


@pytest.mark.parametrize('by', ['none', 'another', 'key', 'json', 'changed'])
def test_paths_of_a_stranger_are_not_followed(by, labelled, labelled_once, capfd, watched, monkeypatch):
    workdir = labelled / 'run'
    os.rename(labelled_once / 'away', labelled_once / 'images')
    try:
        if by == 'none':
            os.remove(workdir / origin.NAME)
        elif by == 'another':
            strangers(workdir)
        elif by == 'key':
            monkeypatch.setenv('XDG_CONFIG_HOME', str(labelled / 'another person'))
        elif by == 'json':
            (workdir / origin.NAME).write_text('[' * 900)
        else:
            config = json.loads((workdir / 'config.json').read_text())
            config['evaluate']['features'] = f'run:{labelled}/network'
            (workdir / 'config.json').write_text(json.dumps(config))
        watched.clear()
        assert run.load(str(workdir)).config.data.dir == ''
        for mode in ('evaluate', 'explore'):
            said = mistake(capfd, f'--mode={mode}', f'--workdir={workdir}', '--n=2')
            assert 'which lies outside of the run' in said and '--config.data.source=' in said
        there = [p for p in watched if p.startswith((str(labelled_once), str(labelled / 'network')))]
        assert not there
    finally:
        os.rename(labelled_once / 'images', labelled_once / 'away')
    # Named by the person, it is: though here it leads to nothing.
    same = f'--config.data.source=folder:{labelled_once}/images'
    assert 'config.data.source names' not in mistake(capfd, '--mode=evaluate', f'--workdir={workdir}', same)


def test_own_paths_are(labelled, labelled_once):
    config = directory.saved_config(str(labelled / 'run'))
    assert origin.is_own(str(labelled / 'run'), config)
    assert origin.unnamed(str(labelled / 'run'), config, config, set()) == {}
    strangers(labelled / 'run')
    unnamed = origin.unnamed(str(labelled / 'run'), config, config, set())
    assert unnamed == {'data.source': f'{labelled_once}/images', 'data.dir': f'{labelled_once}/prepared'}
    # A section names all that is in it; a name that only begins the same does not.
    assert origin.unnamed(str(labelled / 'run'), config, config, {'data'}) == {}
    assert origin.unnamed(str(labelled / 'run'), config, config, {'dat', 'data.s'}) == unnamed


def test_what_lies_outside(tmp_path):
    (tmp_path / 'run').mkdir()
    os.symlink(tmp_path, tmp_path / 'run' / 'up')
    for inside in ('', 'stages/first', 'a/../b'):
        assert not origin.outside(str(tmp_path / 'run'), str(tmp_path / 'run' / inside))
    for outside in ('..', '../run2', 'up', 'up/x', '/'):
        assert origin.outside(str(tmp_path / 'run'), str(tmp_path / 'run' / outside))


@pytest.mark.parametrize('name', sorted({*origin.OWN, 'checkpoints/4/x', 'samples/x', 'digests/4.json'}))
def test_no_links_and_pipes_in_a_run(name, copy, tmp_path, capfd, no_compile):
    """None is followed or waited for, to read or to write."""
    elsewhere, target = tmp_path / 'elsewhere', copy / name
    elsewhere.write_text('mine')
    for make in (
        lambda: os.symlink(elsewhere, target),
        lambda: os.symlink(tmp_path, target),
        lambda: os.mkfifo(target),
    ):
        if os.path.isdir(target) and not os.path.islink(target):
            shutil.rmtree(target)
        elif os.path.lexists(target):
            os.remove(target)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        make()
        for args in (['--mode=sample'], ['--mode=evaluate'], [VAE]):
            said = mistake(capfd, *args, f'--workdir={copy}')
            assert str(target) in said or (name == 'config.json' and str(copy) in said)
        with pytest.raises(UserError):
            run.load(str(copy))
    assert elsewhere.read_text() == 'mine'


def test_the_directory_of_a_run_may_be_a_link(vae, tmp_path):
    os.symlink(vae, tmp_path / 'link')
    assert run.load(f'{tmp_path}/link/').step == 4


# --- outputs


def test_outputs_lie_side_by_side(vae, tmp_path):
    use('sample', vae, '--n=2')
    use('sample', vae, '--n=2', '--seed=1')
    use('sample', vae, '--n=2', '--weights=params')
    use('sample', vae, '--n=2', '--config.train.dtype=bfloat16')
    folders = sorted(d for d in os.listdir(vae / 'samples') if os.path.isdir(vae / 'samples' / d))
    assert folders[0] == 'step4_ema_seed0_n2' and folders[2:] == ['step4_ema_seed1_n2', 'step4_params_seed0_n2']
    assert folders[1].startswith('step4_ema_seed0_n2_') and len(folders) == 4
    for folder in folders:
        assert sorted(os.listdir(vae / 'samples' / folder / 'images')) == ['00000.png', '00001.png']


def test_names_of_outputs_are_of_their_settings():
    one = types.SimpleNamespace(step=4, weights='ema')
    settings = [
        ({}, 0, None, {}), ({}, 1, None, {}),
        ({'model.sampler.clip': False}, 0, None, {}), ({'model.sampler.clip': True}, 0, None, {}),
        ({}, 0, {'label': '3'}, {}), ({}, 0, {'caption': 'a red heart'}, {}), ({}, 0, {'caption': 'A red heart'}, {}),
        ({}, 0, {'caption': 'a-red-heart'}, {}), ({}, 0, {'caption': 'a red heart' * 9}, {}),
        ({}, 0, {'caption': 'a red heart' * 10}, {}), ({}, 0, {'caption': '../../x'}, {}), ({}, 0, None, {'n': 3}),
        ({}, 0, None, {'film': 3}),
    ]  # fmt: skip
    names = [outputs.name(one, changed, seed, given, **numbers) for changed, seed, given, numbers in settings]
    assert len({*names}) == len(names)
    assert all(os.path.basename(name) == name and len(name) < 120 for name in names)


def test_out_holds_the_samples_of_one_call_and_what_was_there(vae, tmp_path, capfd):
    out = tmp_path / 'mine'
    out.mkdir()
    (out / 'notes.txt').write_text('mine')
    use('sample', vae, f'--out={out}', '--n=3')
    use('sample', vae, f'--out={out}', '--n=2', '--seed=1')
    assert sorted(os.listdir(out)) == ['grid.png', 'images', 'notes.txt', 'samples.json', 'samples.npz']
    assert sorted(os.listdir(out / 'images')) == ['00000.png', '00001.png']
    assert (out / 'notes.txt').read_text() == 'mine'
    capfd.readouterr()
    # Images of the person's own among the samples are neither removed nor mixed with them.
    (out / 'images' / 'holiday.png').write_text('mine')
    assert 'holiday.png there was not written by jaxgen' in mistake(
        capfd, '--mode=sample', f'--workdir={vae}', f'--out={out}', '--n=1'
    )
    assert sorted(os.listdir(out / 'images')) == ['00000.png', '00001.png', 'holiday.png']
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'grid.png').write_text('mine')
    said = mistake(capfd, '--mode=sample', f'--workdir={vae}', f'--out={other}', '--n=1')
    assert 'grid.png there was not written' in said and (other / 'grid.png').read_text() == 'mine'
    assert os.listdir(other) == ['grid.png']


def test_a_stopped_call_leaves_what_was_there(tmp_path):
    def write(text: str, *names: str) -> None:
        with outputs.directory(str(tmp_path / 'out'), 'samples.npz') as folder:
            os.mkdir(os.path.join(folder, 'images'))
            for name in ('samples.npz', *names):
                with open(os.path.join(folder, name), 'w') as file:
                    file.write(text)
            if text == 'fault':
                raise RunError('stopped')

    write('one', 'film.png', 'images/00000.png', 'images/00001.png')
    with pytest.raises(RunError):
        write('fault', 'grid.png', 'images/00000.png')
    there = {
        os.path.relpath(os.path.join(d, f), tmp_path / 'out')
        for d, _, files in os.walk(tmp_path / 'out')
        for f in files
    }
    assert there == {'samples.npz', 'film.png', 'images/00000.png', 'images/00001.png'}
    assert (tmp_path / 'out' / 'images' / '00000.png').read_text() == 'one'
    write('two', 'grid.png', 'images/00000.png')
    assert sorted(os.listdir(tmp_path / 'out')) == ['grid.png', 'images', 'samples.npz']
    assert (tmp_path / 'out' / 'images' / '00000.png').read_text() == 'two'
    assert os.listdir(tmp_path / 'out' / 'images') == ['00000.png']


def test_out_that_is_a_file(vae, tmp_path, capfd, no_compile):
    file = tmp_path / 'file'
    file.write_text('mine')
    for mode in ('sample', 'explore'):
        for out in (file, file / 'x'):
            said = mistake(capfd, f'--mode={mode}', f'--workdir={vae}', f'--out={out}', '--n=1')
            assert str(file) in said and '--out' in said
    assert file.read_text() == 'mine'


@pytest.mark.parametrize('mode', ['out', 'workdir'])
def test_home(mode, copy, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'cwd').mkdir()
    monkeypatch.chdir(tmp_path / 'cwd')
    use('sample', '~/copy' if mode == 'workdir' else copy, '--n=1', *(['--out=~/o'] if mode == 'out' else []))
    assert os.listdir(tmp_path / 'cwd') == []
    assert os.path.exists(tmp_path / ('o' if mode == 'out' else 'copy/samples/step4_ema_seed0_n1') / 'grid.png')


@pytest.mark.parametrize(
    'fault, says',
    [
        (MemoryError(), 'out of memory'),
        (MemoryError('Unable to allocate\n8 GiB'), 'out of memory Unable to allocate 8 GiB'),
        (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes'), 'batch smaller'),
        (jax.errors.JaxRuntimeError('INTERNAL: a\nb\n'), 'the device failed: INTERNAL: a b'),
        (OSError(28, 'No space left\non device', 'a\nb'), 'No space left on device'),
        (RunError('one\ntwo\x1b[31m'), 'one two'),
    ],
)
def test_a_fault_is_one_line(fault, says, monkeypatch, capfd):
    def fail(*_):
        raise fault

    monkeypatch.setattr(sys.modules[run_main.__module__], 'main', fail)
    assert run_main(['jaxgen']) == 1
    err = capfd.readouterr().err
    assert err.startswith('jaxgen: stopped: ') and says in err
    assert len(err.splitlines()) == 1 and err[:-1].isprintable()


def test_captions_that_are_no_text():
    """Bytes of the command line that are no UTF-8 come as half characters."""
    with pytest.raises(UserError, match='it has none'):
        captions.check(os.fsdecode(b'\xff\xfe'), 16, 0, None)


# --- small numbers


def test_a_film_ends_with_the_last_step():
    """Step k of the sampler is an image of the value k / 8; frames are evenly spaced and one frame is the end."""
    states = jnp.linspace(0, 1, 9)[:, None, None, None, None] * jnp.ones((9, 2, 4, 4, 1))
    family = Family(None, None, None, None, trajectory=lambda *_: {'x': states})
    model = BoundModel(family, {}, {}, jax.make_mesh((1, 1), ('data', 'fsdp')))
    for frames, steps in ((1, [8]), (2, [0, 8]), (3, [0, 4, 8]), (9, range(9)), (50, range(9))):
        film = sample.film(model, {'index': np.arange(2)}, 2, 0, frames)
        grey = np.round((np.array([*steps]) / 8 + 1) * 127.5)
        assert film.shape == (2, 1, len(grey), 4, 4, 1)
        np.testing.assert_allclose(film[0, 0, :, 0, 0, 0], grey, atol=1)


def test_one_value_has_no_standard_error():
    assert held_out.mean(np.array([3.0])) == {'value': 3.0, 'n': 1}
    several = held_out.mean(np.array([1.0, 3.0, 5.0]))
    assert several == {'value': 3.0, 'stderr': pytest.approx(2 / np.sqrt(3)), 'n': 3}


def test_one_example(vae, copy):
    use('evaluate', copy, '--config.evaluate.examples=1')
    record = json.loads((copy / 'evaluation.json').read_text())
    assert record['examples'] == 1
    for metric in record['metrics'].values():
        assert metric['n'] == 1 and 'stderr' not in metric and np.isfinite(metric['value'])
    # Another measurement lies beside it.
    use('evaluate', copy, '--config.evaluate.examples=2')
    assert len(os.listdir(copy / 'results')) == 2
    assert json.loads((copy / 'evaluation.json').read_text())['examples'] == 2


# --- stages


@pytest.fixture(scope='module')
def staged(tmp_path_factory):
    """A prior, 'prior', on codes of the run 'first', named by a path relative to their directory."""
    root = tmp_path_factory.mktemp('staged')
    train(f'--config={path("vqvae_digits")}', f'--workdir={root}/first')
    before = os.getcwd()
    os.chdir(root)
    try:
        train(f'--config={path("vqvae_digits_prior")}', '--workdir=prior', '--config.stages.first=first/')
    finally:
        os.chdir(before)
    return root


def test_stages_from_anywhere_and_moved(staged, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert directory.saved_config(str(staged / 'prior')).stages.first == f'{staged}/first'
    assert run.load(f'{staged}/prior/').step == 4
    # Of the same digest it may lie anywhere; with another it is another.
    shutil.copytree(staged / 'first', tmp_path / 'moved')
    for folder in (f'{tmp_path}/moved', f'{tmp_path}/moved/', 'moved'):
        assert (
            run.load(str(staged / 'prior'), config={'stages': {'first': folder}}).config.stages.first
            == f'{tmp_path}/moved'
        )
    train(f'--config={path("vqvae_digits")}', f'--workdir={tmp_path}/moved', '--config.train.steps=6')
    capfd.readouterr()
    said = mistake(capfd, '--mode=sample', f'--workdir={staged}/prior', '--config.stages.first=moved', '--n=1')
    assert 'are not those that' in said and 'config.stages.first' in said


def test_stages_in_a_run_and_of_strangers(staged, tmp_path, capfd, watched):
    prior = shutil.copytree(staged / 'prior', tmp_path / 'prior')
    strangers(prior)
    watched.clear()
    said = mistake(capfd, '--mode=sample', f'--workdir={prior}', '--n=1')
    assert 'config.stages.first names' in said and not [p for p in watched if p.startswith(f'{staged}/first')]
    assert run.load(str(prior), config={'stages': {'first': f'{staged}/first'}}).step == 4
    # What lies in the run is the run's own.
    shutil.copytree(staged / 'first', prior / 'stages' / 'first')
    assert run.load(str(prior)).config.stages.first == f'{prior}/stages/first'


def test_a_stage_of_itself(staged, tmp_path, capfd, no_compile):
    prior, first = (shutil.copytree(staged / name, tmp_path / name) for name in ('prior', 'first'))
    base = f'--config={path("vqvae_digits_prior")}'
    os.symlink(prior, tmp_path / 'link')
    for folder in (prior, f'{prior}/', tmp_path / 'link'):
        for args in (['--mode=sample'], [base]):
            assert 'is a stage of itself' in mistake(
                capfd, *args, f'--workdir={prior}', f'--config.stages.first={folder}'
            )
    # By way of another: the first stage has the prior for a stage.
    config = json.loads((prior / 'config.json').read_text())
    for folder, stage in ((prior, first), (first, prior)):
        config['stages'] = {'first': str(stage)}
        (folder / 'config.json').write_text(json.dumps(config))
        origin.sign(str(folder), configs.complete(config))
    for args in (['--mode=sample'], [base, f'--config.stages.first={first}']):
        assert 'is a stage of itself' in mistake(capfd, *args, f'--workdir={prior}')


# --- devices


def test_a_sharded_run_on_one_device(tmp_path):
    """Trained with its weights cut over two devices, it is sampled and gone on with on one, to rounding the same."""
    two, one = tmp_path / 'two', tmp_path / 'one'
    code = (
        'import sys, numpy, jaxgen; from jaxgen.main import run_main\n'
        f'assert run_main(["jaxgen", {VAE!r}, "--workdir={two}", "--config.mesh.fsdp=2"]) == 0\n'
        f'numpy.save("{tmp_path}/two.npy", jaxgen.load("{two}").sample(n=4))\n'
    )
    done = python_on(2, code)
    assert done.returncode == 0, done.stderr
    loaded = run.load(str(two))
    assert directory.saved_config(str(two)).mesh.fsdp == 2 and loaded.config.mesh.fsdp == 1
    np.testing.assert_allclose(loaded.sample(n=4).astype(int), np.load(tmp_path / 'two.npy').astype(int), atol=1)
    for workdir in (two, one):
        train(VAE, f'--workdir={workdir}', '--config.mesh.fsdp=1', '--config.train.steps=6')
    for x, y in zip(jax.tree.leaves(saved_state(two, 6).ema), jax.tree.leaves(saved_state(one, 6).ema), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
