"""Sources that are read as they are: their splits, identity and damaged examples."""

from __future__ import annotations

import contextlib
import os
import shutil

import numpy as np
import pytest
from data_sets import encoded, grey, make, refused, take

from jaxgen import addresses, data
from jaxgen import config as configs
from jaxgen.data import records, sources
from jaxgen.errors import RunError


def contents(tmp_path, values, labels=None, **fields) -> records.Contents:
    """A set of grey images, or of other values of the feature 'image', in a file that need not be there."""
    values = list(values)
    features = {'image': records.Feature(('image',), image=True)}
    if labels is not None:
        features['label'] = records.Feature(('label',), dtype=np.int32, classes=int(np.max(labels)) + 1)

    def open_examples(names):
        def example(i):
            if isinstance(values[i], Exception):
                raise values[i]
            x = values[i] if isinstance(values[i], bytes) else np.full((8, 8), values[i], np.uint8)
            return {'image': x} | ({'label': labels[i]} if 'label' in names else {})

        return example

    split = records.Split(len(values), open_examples, None if labels is None else lambda: np.asarray(labels))
    return records.Contents(str(tmp_path / 'set'), features, {'train': split}, (), digest=lambda: 'abc', **fields)


def use(monkeypatch, made: records.Contents) -> str:
    """The source of which these are the contents."""
    monkeypatch.setitem(sources.READERS, 'idx', lambda address, data: made)
    return f'idx:{made.path}'


def values_of(config, split='train') -> list[int]:
    examples = data.dataset(config, split)
    return [int(examples[i]['image'][0, 0, 0]) for i in range(len(examples))]


def test_every_kind_has_a_reader_and_a_source():
    assert set(addresses.KINDS) <= set(sources.SOURCES)
    assert set(sources.READERS) <= set(addresses.READ)


def test_an_address_is_what_it_is_written_as():
    for text in ('idx:a', 'idx:/a b/c?d', 'npz:a.npz?image=x&range=0,1', 'npz:a?b/c.npz', 'folder:a?b=c', 'idx:'):
        assert str(addresses.parse(text)) == text
    assert addresses.parse('mat:a.mat?image=data&layout=(WH)N') == (
        'mat',
        'a.mat',
        {'image': 'data', 'layout': '(WH)N'},
    )
    assert addresses.parse('folder:a?b=c').path == 'a?b=c' and addresses.parse('npz:a?b=c/d.npz').path == 'a?b=c/d.npz'
    assert all(addresses.parse(name) is None for name in ('digits', 'shapes:outlined', 'mnist', 'idx', ''))


@pytest.mark.parametrize('field', ['source', 'other', 'test_source', 'validation_source'])
@pytest.mark.parametrize('kind', addresses.KINDS)
def test_a_config_knows_the_path_of_every_kind(kind, field, tmp_path, monkeypatch):
    """So a stranger's run cannot choose it, it may be moved, and the config is the same in every directory."""
    monkeypatch.chdir(tmp_path)
    for options in ('', '?range=0,1&layout=N(HW)') if kind in addresses.READ else ('',):
        section = {'source': 'digits', field: f'{kind}:in/set{options}'}
        section |= {'features': ('image', 'other')} if field == 'other' else {}
        config = configs.make('', family='vae', model={'latent': 2}, data=section)
        assert config.data[field] == f'{kind}:{tmp_path}/in/set{options}'
        assert configs.paths(config) == {f'data.{field}': f'{tmp_path}/in/set'}
        assert data.canonical(config.data[field]) == config.data[field]
        other = configs.override(config, [f'--config.data.{field}={kind}:{tmp_path}/elsewhere{options}'])
        assert configs.moved(config, other) == [f'data.{field}']


def test_contents_are_read_anew_when_a_file_changes(tmp_path):
    config = make(tmp_path / 'sets', source=f'npz:{tmp_path}/a.npz', test_fraction=0.5)
    for n in (4, 9):
        np.savez(tmp_path / 'a.npz', images=np.full((n, 8, 8), 7 * n, np.uint8))
        sets = [data.dataset(config, split) for split in ('train', 'test')]
        assert sum(map(len, sets)) == n and sets[0][0]['image'].min() == 7 * n


def test_held_out_examples_stay_held_out_when_others_are_added():
    split = records.Split(500, lambda names: None)
    train, test = records.held_out(split, 0.3, '')
    more_train, more_test = records.held_out(split._replace(n=800), 0.3, '')
    assert sorted([*train, *test]) == list(range(500)) and 110 <= len(test) <= 190
    assert set(test) <= set(more_test) and set(train) <= set(more_train)
    assert list(test) != sorted(test), 'classes that are stored one after another mix'


@pytest.mark.parametrize('fraction', [1e-9, 0.3, 1 - 1e-9])
@pytest.mark.parametrize('labels', [[0, 1, 2, 3], [0] * 9 + [1], [0, 1], [0, 0, 1, 1]])
def test_of_each_class_one_is_trained_on(fraction, labels):
    split = records.Split(len(labels), lambda names: None, lambda: np.array(labels))
    train, test = records.held_out(split, fraction, '')
    assert len(test) and len(train) and sorted([*train, *test]) == list(range(len(labels)))
    if len(set(labels)) < len(labels):
        assert {labels[i] for i in train} == set(labels)
    else:  # every class has one example: they are held out as if there were no classes
        plain = records.held_out(split._replace(labels=None), fraction, '')
        assert list(train) == list(plain[0]) and list(test) == list(plain[1])


def test_damaged_examples_are_replaced_by_their_number(tmp_path, monkeypatch, capfd):
    values = [bytes(3) if i % 10 == 3 else ValueError('bad row') if i == 4 else encoded(grey(i)) for i in range(100)]
    config = make(tmp_path, source=use(monkeypatch, contents(tmp_path, values)), max_corrupt=0.5, test_fraction=0.1)
    first = take(config, 40)
    seen = {int(x) for b in first for x in b['image'][:, 0, 0, 0]}
    train = set(records.held_out(records.Split(100, None), 0.1, '')[0].tolist())
    assert seen == {i for i in train if i % 10 != 3 and i != 4}
    err = capfd.readouterr().err
    assert 'takes its place' in err and err.count('\n') <= 5 and err.count('others will not be named') == 1
    # Anew, in another order, and not in memory: the same.
    for changes, start in (({}, 0), ({'cache_mb': 0}, 0), ({'cache_mb': 0, 'threads': 1}, 17)):
        again = take({**config, **changes}, 40 - start, start=start)
        for a, b in zip(first[start:], again, strict=True):
            np.testing.assert_array_equal(a['image'], b['image'])


def test_too_many_damaged_examples_end_the_run(tmp_path, monkeypatch):
    def run(damaged: int, most: float):
        values = [b'not an image' if i < damaged else i for i in range(20)]
        config = make(tmp_path, source=use(monkeypatch, contents(tmp_path, values)), max_corrupt=most)
        return [*values_of(config), *values_of(config, 'test')]

    assert len(run(2, 0.5)) == 20
    for damaged, most in ((2, 0.0), (6, 0.1), (20, 1.0)):
        with pytest.raises(RunError, match=r'set: example \d+ cannot be decoded \(UnidentifiedImageError.*max_corrupt'):
            run(damaged, most)


def test_identity_is_what_files_hold_and_how_they_are_read(tmp_path):
    for name, byte in (('a', 1), ('b', 2)):
        os.makedirs(tmp_path / 'in', exist_ok=True)
        (tmp_path / 'in' / name).write_bytes(bytes([byte]) * 40)

    def digest(where='in', files=('a', 'b'), **fields):
        paths = tuple(str(tmp_path / where / file) for file in files)
        one = records.Contents(str(tmp_path / where), {}, {}, paths, **fields)
        return records.contents_digest(one, str(tmp_path / 'kept'), True)

    first = digest()
    shutil.copytree(tmp_path / 'in', tmp_path / 'elsewhere')
    assert digest('elsewhere') == digest(files=('b', 'a')) == first
    assert digest(recipe='transposed') != first and digest(files=('a',)) != first
    os.rename(tmp_path / 'elsewhere' / 'b', tmp_path / 'elsewhere' / 'c')
    assert digest('elsewhere', ('a', 'c')) != first, 'names are of a set of several files'
    assert digest('elsewhere', ('c',)) == digest(files=('b',)), 'and not of one file'


def test_the_digest_of_a_large_file_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(records, 'LONG', 10)
    path, kept = tmp_path / 'file', str(tmp_path / 'sets')
    path.write_bytes(bytes(20))
    first = records.file_digest(str(path), kept, True)
    read = []
    monkeypatch.setattr(records.hashlib, 'file_digest', lambda *args: read.append(args))
    assert records.file_digest(str(path), kept, True) == first and not read
    path.write_bytes(bytes(21))
    with contextlib.suppress(AttributeError):
        records.file_digest(str(path), kept, True)
    assert read, 'another file is read anew'


def test_digests_are_not_written_through_a_link_out_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(records, 'LONG', 10)
    (tmp_path / 'file').write_bytes(bytes(20))
    os.makedirs(tmp_path / 'run')
    os.makedirs(tmp_path / 'home')
    os.symlink(tmp_path / 'home', tmp_path / 'run' / records.DIGESTS)
    assert len(records.file_digest(str(tmp_path / 'file'), str(tmp_path / 'run'), True)) == 64
    assert not os.listdir(tmp_path / 'home')


@pytest.mark.parametrize(
    'stored, classes, expected, names',
    [
        ([0, 2, 1], 0, [0, 2, 1], ()),
        ([1, 3, 2], 0, [0, 2, 1], ('1', '2', '3')),
        ([3, 7, 3], 0, [0, 1, 0], ('3', '7')),
        ([3, 7, 3], 10, [3, 7, 3], ()),
        ([-1, 0], 0, [0, 1], ('-1', '0')),
        (['dog', 'cat', 'dog'], 0, [1, 0, 1], ('cat', 'dog')),
        ([b'b', b'a'], 0, [1, 0], ('a', 'b')),
        ([[1.0], [2.0]], 0, [0, 1], ('1', '2')),
        ([[2, 1, 2]], 0, [1, 0, 1], ('1', '2')),
        ([True, False], 0, [1, 0], ()),
    ],
)
def test_classes_of_labels(stored, classes, expected, names):
    numbers, found, n = records.classes_of(np.array(stored), classes, 'file')
    assert numbers.tolist() == expected and numbers.dtype == np.int32 and found == names
    assert n == (classes or max(expected) + 1)


@pytest.mark.parametrize('stored', [[0.5, 1.0], [np.nan, 1.0], [[0, 1], [1, 0]], [1j, 0]])
def test_what_no_class_can_be_is_refused(stored):
    with refused('labels must be one integer or text for each example'):
        records.classes_of(np.array(stored), 0, 'file')
