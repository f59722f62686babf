"""Large folders, read where they lie: the same examples as of the prepared set, and nothing read at the start."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from data_sets import encoded, grey, make, refused, take, write_folder
from support import assert_same

from jaxgen import data
from jaxgen.data import folder, transforms, trees
from jaxgen.errors import RunError


def both(tmp_path, **fields) -> tuple[dict, dict]:
    """Sections of one folder: prepared, and read as it is."""
    one = make(tmp_path / 'sets', source=f'folder:{tmp_path}/in', **fields)
    return one, {**one, 'dir': str(tmp_path / 'none'), 'direct': 0}


@pytest.mark.parametrize(
    'inside', [{}, {'cat': 10, 'dog': 15, 'emu': 1}, {'train/b': 9, 'train/a': 3, 'val/a': 3, 'test/b': 2, 'test/c': 1}]
)
def test_a_folder_that_is_read_as_it_is_has_the_examples_of_a_prepared_one(tmp_path, capfd, inside):
    """In the same order, with the same classes and splits, and the same is said of what is left out."""
    subfolders = {name: range(30 * i, 30 * i + n) for i, (name, n) in enumerate(inside.items())}
    write_folder(tmp_path / 'in', range(200, 212) if not inside else [], **subfolders)
    (tmp_path / 'in' / 'notes.txt').write_text('x')
    features = ('image', 'label') if inside else ('image',)
    prepared, direct = both(tmp_path, features=features, flip=True)
    said = []
    for config in (prepared, direct):
        folder.announced.clear()
        data.dataset(config, 'train')
        said.append(capfd.readouterr().err)
    assert said[0] == said[1] and 'notes' not in said[0] and '1 files with other endings' in said[0]
    assert data.spec(prepared) == data.spec(direct)
    assert_same(take(prepared, 12), take(direct, 12))
    for split in ('test', 'validation'):
        fields = {'validation_fraction': 0.3} if split == 'validation' and 'val/a' not in inside else {}
        one, other = (data.dataset({**config, **fields}, split) for config in (prepared, direct))
        assert len(one) == len(other) and len(one) > 0
        for name, x in one.take(np.arange(len(one))).items():
            np.testing.assert_array_equal(x, other.take(np.arange(len(one)))[name])
    assert not os.path.exists(tmp_path / 'none')


def test_nothing_is_read_at_the_start(tmp_path, monkeypatch):
    write_folder(tmp_path / 'in', range(50))
    _, direct = both(tmp_path)
    loads, load = [], transforms.load
    monkeypatch.setattr(transforms, 'load', lambda *args: loads.append(0) or load(*args))
    data.dataset(direct, 'train')
    assert len(loads) == 1, 'one example, to see whether the crop fits'
    walks, walk = [], trees.walk
    monkeypatch.setattr(trees, 'walk', lambda *args: walks.append(0) or walk(*args))
    for split in ('train', 'test', 'train'):
        data.dataset(direct, split)
    assert not walks, 'a large folder is listed once'
    grey(99).save(tmp_path / 'in' / 'new.png')
    assert sum(len(data.dataset(direct, split)) for split in ('train', 'test')) == 51 and len(walks) == 1


def test_identity_is_names_and_sizes(tmp_path):
    write_folder(tmp_path / 'in', range(9), sub=range(9, 12))
    _, direct = both(tmp_path)
    identity = data.dataset(direct, 'train').identity
    shutil.copytree(tmp_path / 'in', tmp_path / 'elsewhere' / 'out')
    elsewhere = {**direct, 'source': f'folder:{tmp_path}/elsewhere/out'}
    assert data.dataset(elsewhere, 'train').identity == identity
    assert data.dataset({**direct, 'test_fraction': 0.5}, 'train').identity != identity
    os.rename(tmp_path / 'elsewhere' / 'out' / '0.png', tmp_path / 'elsewhere' / 'out' / '00.png')
    renamed = data.dataset(elsewhere, 'train').identity
    with open(tmp_path / 'in' / '0.png', 'ab') as file:
        file.write(b'more')
    os.rename(tmp_path / 'in', tmp_path / 'out')
    longer = data.dataset({**direct, 'source': f'folder:{tmp_path}/out'}, 'train').identity
    assert len({identity, renamed, longer}) == 3


def test_a_folder_that_was_prepared_stays_so(tmp_path):
    """A run that was begun on the prepared set goes on with it."""
    write_folder(tmp_path / 'in', range(9))
    prepared, direct = both(tmp_path)
    before = data.dataset(prepared, 'train').identity
    assert data.dataset({**direct, 'dir': prepared['dir']}, 'train').identity == before
    assert data.dataset(direct, 'train').identity != before


def test_damaged_files_are_met_in_reading(tmp_path, capfd):
    write_folder(tmp_path / 'in', range(36))
    (tmp_path / 'in' / 'cut.png').write_bytes(encoded(grey(200))[:40])
    (tmp_path / 'in' / 'empty.png').write_bytes(b'')
    os.symlink('nowhere', tmp_path / 'in' / 'link.png')
    grey(250, 100, 100).save(tmp_path / 'in' / 'bomb.png')
    _, direct = both(tmp_path, max_corrupt=0.2, max_pixels=1000)

    def read() -> dict[str, np.ndarray]:
        splits = (data.dataset(direct, split) for split in ('train', 'test'))
        return {str(len(examples)): examples.take(np.arange(len(examples)))['image'] for examples in splits}

    one = read()
    assert sum(map(int, one)) == 40 and {int(x) for batch in one.values() for x in batch.ravel()} <= {*range(36)}
    message = capfd.readouterr().err
    for name in ('cut.png', 'empty.png', 'link.png', 'bomb.png'):
        assert f"'{name}' cannot be decoded" in message
    assert_same([one], [read()])  # what stands in for them is always the same
    for name in ('1.png', '2.png', '3.png'):  # while it is read from
        os.remove(tmp_path / 'in' / name)
    (tmp_path / 'in' / '4.png').write_bytes(b'x')
    direct['max_corrupt'] = 0.0
    with pytest.raises(RunError, match=r'more than config.data.max_corrupt = 0;'):
        read()
    with refused('has no labels'):
        data.dataset({**direct, 'classes': 3, 'features': ('image', 'label')}, 'train')


def test_a_file_that_goes_while_it_is_read_from(tmp_path, capfd):
    write_folder(tmp_path / 'in', range(30))
    _, direct = both(tmp_path, max_corrupt=0.1, cache_mb=0)
    examples = data.dataset(direct, 'train')
    gone = int(examples[3]['image'][0, 0, 0])
    os.remove(tmp_path / 'in' / f'{gone}.png')
    stand_in = int(examples[3]['image'][0, 0, 0])
    assert stand_in != gone and int(examples[3]['image'][0, 0, 0]) == stand_in
    assert f"'{gone}.png' cannot be decoded" in capfd.readouterr().err
