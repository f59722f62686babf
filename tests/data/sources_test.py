"""From a name to a prepared set: names, preparation by one or several processes, sets of TFDS."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import jax
import numpy as np
import pytest
from data_sets import ToyFaces, make, refused, run_code, take, write_folder

from jaxgen import data
from jaxgen.data import builders, sources
from jaxgen.errors import RunError


def test_environment_names_the_directory(tmp_path, monkeypatch):
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'here'))
    assert sources.root(make('')) == str(tmp_path / 'here')
    assert sources.root(make('~/x')) == os.path.expanduser('~/x')
    monkeypatch.delenv('TFDS_DATA_DIR')
    assert sources.root(make('')) == os.path.expanduser('~/tensorflow_datasets')


def test_one_folder_has_one_name(tmp_path, monkeypatch):
    write_folder(tmp_path / 'in', [1, 2, 3])
    os.symlink(tmp_path / 'in', tmp_path / 'link')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    spellings = [
        f'folder:{p}' for p in (f'{tmp_path}/in', f'{tmp_path}/in/', 'in', './in//', '~/in', 'link', '~/link/')
    ]
    assert {data.canonical(source) for source in spellings} == {f'folder:{os.path.realpath(tmp_path / "in")}'}
    assert data.canonical('cifar10') == 'cifar10' and data.canonical('shapes:outlined') == 'shapes:outlined'
    assert data.canonical('folder:') == 'folder:'


def test_unknown_names(tmp_path):
    for name, match in {
        'cifa10': 'did you mean cifar10',
        'digit': 'did you mean digits',
        'zzzzzzzz': 'known: digits, shapes, folder:PATH, pairs:PATH, .*idx:PATH',
        'mnist/nosuch': 'mnist/nosuch cannot be had',
        'nowhere:mnist': 'no source',
        'two words': 'no source',
        '': "no source ''",
    }.items():
        for call in (data.spec, lambda c: data.dataset(c, 'train')):
            with refused(match):
                call(make(tmp_path, source=name))


@pytest.mark.parametrize('sources, same', [
    (('shapes', 'shapes:outlined'), True), (('shapes', 'shapes'), True), (('shapes', 'shapes:centred'), False),
    (('shapes:centred', 'shapes:centred'), False), (('digits', 'digits'), False),
])  # fmt: skip
def test_which_sources_show_the_same_test_scenes(prepared, sources, same):
    one, other = sources
    assert data.same_test_scenes(make(prepared, source=one, other=other, channels=3)) is same


def test_a_prepared_set_is_not_prepared_again(prepared, monkeypatch):
    first = data.dataset(make(prepared), 'train')[7]['image']

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(builders.JaxgenDigits, '_split_generators', never)
    monkeypatch.setattr(sources, 'lock', never)  # so that a directory that one cannot write to will do
    np.testing.assert_array_equal(data.dataset(make(prepared), 'train')[7]['image'], first)


def test_interrupted_preparation_leaves_no_set(tmp_path, monkeypatch):
    code = """
import os, signal, sys
from jaxgen import data
from jaxgen.config import DEFAULTS
from jaxgen.data import builders, shapes
builders.SHAPES = {'train': 50, 'test': 20}
draw, calls = shapes.draw, []
def dying(*args):
    calls.append(0)
    if len(calls) == 60:  # in the second split
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(*args)
shapes.draw = dying
data.dataset({**DEFAULTS['data'], 'dir': sys.argv[1], 'source': 'shapes', 'size': 4, 'channels': 3}, 'train')
"""
    process = run_code(code, str(tmp_path))
    assert process.communicate(timeout=120)[1] == '' and process.returncode == -signal.SIGKILL
    path = tmp_path / 'jaxgen_shapes' / 'size4'
    assert [name for name in os.listdir(path) if name.startswith('incomplete')] and not (path / '1.4.0').exists()
    monkeypatch.setattr(builders, 'SHAPES', {'train': 50, 'test': 20})
    assert len(data.dataset(make(tmp_path, source='shapes', size=4, channels=3), 'test')) == 20
    assert sorted(os.listdir(path)) == ['.lock', '1.4.0']


def test_two_processes_prepare_one_set(tmp_path):
    code = """
import sys
from jaxgen import data
from jaxgen.config import DEFAULTS
print(len(data.dataset({**DEFAULTS['data'], 'dir': sys.argv[1]}, 'train')))
"""
    processes = [run_code(code, str(tmp_path)) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.strip() == '1438' and 'Traceback' not in err
    assert sorted(os.listdir(tmp_path / 'jaxgen_digits')) == ['.lock', '1.0.0']


def test_waits_for_the_one_who_prepares(tmp_path, capfd):
    config = make(tmp_path)
    entered = threading.Event()
    builder = sources.resolve(config).builder()
    done = []

    def other():
        entered.wait()
        done.append(len(data.dataset(config, 'train')))

    thread = threading.Thread(target=other)
    thread.start()
    with sources.lock(builder):
        entered.set()
        time.sleep(1)
        assert not done and not (tmp_path / 'jaxgen_digits' / '1.0.0').exists()
    thread.join(60)
    assert done == [1438] and 'waiting for another process' in capfd.readouterr().err


def test_a_directory_that_cannot_be_written_to(tmp_path):
    (tmp_path / 'file').write_text('x')
    with refused('cannot write to .*config.data.dir'):
        data.dataset(make(tmp_path / 'file' / 'inside'), 'train')


def test_tensorflow_is_not_imported(tmp_path):
    """A package of that name lies in wait, so that even a guarded import would be noticed."""
    os.makedirs(tmp_path / 'trap' / 'tensorflow')
    (tmp_path / 'trap' / 'tensorflow' / '__init__.py').write_text("print('TRAPPED')\nraise ImportError('trap')\n")
    source = write_folder(tmp_path / 'in', [], a=range(5), b=range(5, 10))
    code = """
import sys
import data_sets
from jaxgen import data
base = data_sets.make(sys.argv[1], features=('image', 'label'), channels=3)
for source in ('digits', sys.argv[2], 'toy_faces'):
    config = {**base, 'source': source}
    data.spec(config), data.dataset(config, 'test')[0]
    print(next(data.batches(config, seed=0))['image'].shape)
print([name for name in sys.modules if name.partition('.')[0] == 'tensorflow'])
"""
    process = run_code(code, str(tmp_path / 'sets'), source, first=str(tmp_path / 'trap'))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines() == ['(8, 8, 8, 3)'] * 3 + ['[]']


class ToyValidated(ToyFaces):
    splits = {'train': 6, 'validation': 4}


class ToyThree(ToyFaces):
    splits = {'train': 8, 'validation': 4, 'test': 3}


class ToyUntrained(ToyFaces):
    splits = {'extra': 4}


class ToyArrays(ToyFaces):
    def image(self, i):
        return np.zeros((4, 4, 3), np.uint8)


class ToyFragile(ToyFaces):
    broken = True

    def image(self, i):
        if self.broken and i == 7:
            raise OSError('the disk\nis full')
        return super().image(i)


def test_tfds_set(tmp_path, capfd):
    names = ('image', 'label', 'attributes/Smiling', 'attributes/Age', 'landmarks')
    config = make(tmp_path, source='toy_faces', features=names, size=10)
    spec = data.spec(config)
    assert spec.classes == 3 and spec.features['landmarks'] == jax.ShapeDtypeStruct((2, 2), np.float32)
    assert not os.listdir(tmp_path), 'spec prepares nothing'
    ToyFaces.generated = 0
    train, test = data.dataset(config, 'train'), data.dataset(config, 'test')
    assert (len(train), len(test)) == (8, 2) and ToyFaces.generated == 10
    values = []
    for examples in (train, test):
        for i in range(len(examples)):
            e = examples[i]
            n = int(e['image'][0, 0, 0])
            assert (e['label'], e['attributes/Smiling'], e['attributes/Age']) == (n % 3, n % 2, n + 20)
            np.testing.assert_array_equal(e['landmarks'], np.full((2, 2), n / 2, np.float32))
            assert {k: (v.shape, v.dtype) for k, v in e.items()} == {
                k: (s.shape, s.dtype) for k, s in spec.features.items()
            }
            values.append(n)
    assert sorted(values) == list(range(10))
    assert 'Traceback' not in capfd.readouterr().err
    assert take(config, 3)[0]['attributes/Age'].shape == (8,)


def test_tfds_validation_stands_in_for_test(tmp_path):
    config = make(tmp_path, source='toy_validated')
    assert (len(data.dataset(config, 'train')), len(data.dataset(config, 'test'))) == (6, 4)


def test_tfds_validation_split(tmp_path):
    config = make(tmp_path, source='toy_three')
    assert [len(data.dataset(config, split)) for split in ('train', 'validation', 'test')] == [8, 4, 3]
    assert data.held_out(config) == 'validation'
    other = {**config, 'test_source': 'split:validation'}  # then it is not the validation split, too
    assert [len(data.dataset(other, split)) for split in ('train', 'test')] == [8, 4] and data.held_out(other) == 'test'
    with refused('toy_three has no validation split'):
        data.dataset(other, 'validation')
    other['validation_source'] = 'split:test'
    assert len(data.dataset(other, 'validation')) == 3
    # The validation split stands in for a test split where none is named, and the last fifth where there is neither.
    config = make(tmp_path, source='toy_validated')
    assert data.held_out(config) == 'test'
    config['test_source'] = 'toy_faces'
    assert [len(data.dataset(config, split)) for split in ('train', 'validation', 'test')] == [6, 4, 10]
    config = make(tmp_path, source='toy_faces', test_source='toy_three', features=('image', 'label'))
    assert [len(data.dataset(config, split)) for split in ('train', 'test')] == [10, 3]


def test_tfds_set_without_train_split(tmp_path):
    with refused('toy_untrained has no split train, only extra'):
        data.dataset(make(tmp_path, source='toy_untrained'), 'train')


def test_tfds_features_that_are_not_there(tmp_path):
    config = make(tmp_path, source='toy_faces')
    with refused("has no 'attributes/Smilin'; did you mean attributes/Smiling"):
        data.spec({**config, 'features': ('image', 'attributes/Smilin')})
    with refused("has no 'zzz'; it has image, label, "):
        data.spec({**config, 'features': ('image', 'zzz')})
    with refused("has no 'words'"):  # a list of numbers of no fixed length
        data.spec({**config, 'features': ('image', 'words')})
    with refused('config.data.classes = 7, but toy_faces has 3 classes'):
        data.spec({**config, 'features': ('image', 'label'), 'classes': 7})


def test_tfds_set_that_fails_half_way_is_no_set(tmp_path):
    config = make(tmp_path, source='toy_fragile')
    ToyFragile.broken = True
    with refused('toy_fragile could not be prepared: .*the disk is full'):
        data.dataset(config, 'train')
    ToyFragile.broken = False
    assert len(data.dataset(config, 'train')) == 8


@pytest.mark.skipif(bool(sources.importlib.util.find_spec('tensorflow')), reason='TensorFlow is installed')
def test_tfds_set_that_needs_tensorflow(tmp_path):
    with refused(r"toy_arrays could not be prepared: it needs TensorFlow .*pip install 'jaxgen\[prepare\]'"):
        data.dataset(make(tmp_path, source='toy_arrays'), 'train')


def test_tfds_set_in_another_format(tmp_path):
    config = make(tmp_path, source='toy_faces')
    data.dataset(config, 'train')
    info = tmp_path / 'toy_faces' / '1.0.0' / 'dataset_info.json'
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with refused(r'stored as tfrecord.*convert_format --dataset_version_dir=.*toy_faces/1.0.0'):
        data.dataset(config, 'train')


def test_tfds_set_of_which_a_part_is_there(tmp_path):
    config = make(tmp_path, source='toy_faces')
    data.dataset(config, 'train')
    path = tmp_path / 'toy_faces' / '1.0.0'
    os.rename(path / 'dataset_info.json', path / 'kept')
    with refused('a part of toy_faces only'):
        data.dataset(config, 'train')
    os.rename(path / 'kept', path / 'dataset_info.json')
    for file in path.glob('*array_record*'):
        file.unlink()
    with pytest.raises(RunError, match=r'toy_faces/1.0.0: cannot read example 0 .*No such file.*; delete it'):
        data.dataset(config, 'train')


@pytest.mark.parametrize(
    ('name', 'match'),
    [
        (
            'cifar10',
            'cifar10 could not be prepared: no connection to www.cs.toronto.edu; put cifar-10-binary.tar.gz into',
        ),
        ('celeb_a', 'on quota.*img_align_celeba.zip.*downloads/manual.*folder:PATH'),
        ('imagenet2012', 'fetched by hand, into .*downloads/manual: .*ILSVRC2012_img_train.tar'),
    ],
)
def test_tfds_set_without_a_network(tmp_path, monkeypatch, capfd, name, match):
    def no_network(*_, **__):
        raise socket.gaierror(-2, 'Name or service not known')

    monkeypatch.setattr(socket, 'getaddrinfo', no_network)
    config = make(tmp_path, source=name)
    assert data.spec(config).features['image'].shape == (8, 8, 1)
    begin = time.time()
    with refused(match):
        data.dataset(config, 'train')
    assert time.time() - begin < 30
    assert capfd.readouterr() == ('', '')


def test_labels_of_tfds_sets_are_known_without_them(tmp_path):
    counts = {'cifar10': 10, 'imagenet2012': 1000, 'mnist': 10}
    for name, count in counts.items():
        assert data.spec(make(tmp_path, source=name, features=('image', 'label'))).classes == count
    assert data.spec(make(tmp_path, source='celeb_a', features=('image', 'attributes/Smiling'))).classes == 0
    assert not os.listdir(tmp_path)
