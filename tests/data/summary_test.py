"""--mode=data: what a config's data are, before anything is trained."""

from __future__ import annotations

import json
import os

import jax
import numpy as np
from data_sets import make, take, write_folder, write_pairs
from PIL import Image
from support import mistake, path

from jaxgen.data import summary
from jaxgen.main import run_main


def test_what_a_folder_holds(tmp_path, capfd):
    source = write_folder(tmp_path / 'in', [], cat=range(0, 20), dog=range(20, 30))
    (tmp_path / 'in' / 'cat' / 'broken.png').write_bytes(b'no image')
    (tmp_path / 'in' / 'cat' / 'notes.txt').write_text('a note')
    Image.new('RGB', (40, 20), 'red').save(tmp_path / 'in' / 'dog' / 'wide.png')
    features = ('image', 'label')
    config = make(tmp_path / 'sets', source=source, size=16, features=features, max_corrupt=0.1, flip=True, channels=1)
    about, grid = summary.summarise(config, 0)
    assert about['splits']['train'] + about['splits']['test'] == 31
    counts = about['classes']
    assert {name: sum(counts[split][name] for split in counts) for name in ('cat', 'dog')} == {'cat': 20, 'dog': 11}
    assert about['features']['image']['shape'] == [16, 16, 1] and about['features']['label']['dtype'] == 'int32'
    assert about['augmentation'] == {'flip': True}
    left_out = ' '.join(about['left_out'])
    assert '1 files with other endings (1 .txt)' in left_out and "'cat/broken.png'" in left_out
    sizes = (about['height'], about['width'])
    assert sum(about['modes'].values()) == about['sampled'] and {one['least'] for one in sizes} == {8}
    notes = ' '.join(about['notes'])
    assert 'enlarged to config.data.size = 16 x 16' in notes
    assert ('become grey' in notes) == (about['width']['most'] == 40), 'the wide one may be held out'
    assert json.loads(json.dumps(about)) == about
    assert grid.dtype == np.uint8 and grid.shape[-1] == 1
    assert about['grid'][:4] == ['train image'] * 4 and set(about['grid'][4:]) == {'test image'}
    lines = summary.text(about)
    assert lines[0] == source and any(line.startswith('classes       train: cat') for line in lines)
    capfd.readouterr()


def test_the_grid_begins_with_the_first_training_batch(tmp_path):
    source = write_pairs(tmp_path / 'in', range(10), edges=range(10))
    config = make(tmp_path / 'sets', source=source, size=48, features=('image', 'edges'), flip=True, crop='random')
    about, grid = summary.summarise(config, 3)
    batch = take(config, 1, seed=3)[0]
    # Rows of the grid alternate between the features; a gap of two pixels is around each image.
    for row, name in enumerate(('image', 'edges')):
        for column in range(8):
            top, left = 2 + row * 50, 2 + column * 50
            np.testing.assert_array_equal(grid[top : top + 48, left : left + 48], batch[name][column])
    assert about['grid'] == ['train image', 'train edges'] * 2 + ['test image', 'test edges']


def test_every_sort_of_feature(tmp_path):
    n = 40
    images = np.random.default_rng(0).integers(0, 256, (n, 16, 16), np.uint8)
    np.savez(tmp_path / 'a.npz', images=images, captions=np.array(['a cat', 'two dogs'] * 20))
    source, other = f'npz:{tmp_path}/a.npz', write_folder(tmp_path / 'other', range(20))
    for fields in (
        {'features': ('image', 'other'), 'other': other, 'channels': 3},
        {'features': ('image', 'low_resolution', 'caption'), 'low_resolution': 8},
        {'validation_fraction': 0.1, 'binarise': 'dynamic'},
    ):
        about, grid = summary.summarise(make(tmp_path / 'sets', source=source, size=16, **fields), 0)
        assert list(about['splits']) == ['train', *(['validation'] if 'binarise' in fields else []), 'test']
        assert sum(about['splits'].values()) == n
        assert grid.ndim == 3 and all(len(line) < 500 for line in summary.text(about))
        assert set(about['captions']) <= {'a cat', 'two dogs'}
        assert bool(about['captions']) == ('caption' in fields.get('features', ()))
        limits = about['features']['image']['least'], about['features']['image']['most']
        assert (limits == (0, 255)) and about['height'] == {'least': 16, 'median': 16, 'most': 16}


def test_the_command_compiles_nothing_and_replaces_its_own_files(tmp_path, capfd, monkeypatch):
    def compiled(*_, **__):
        raise AssertionError('something is compiled')

    monkeypatch.setattr(jax._src.compiler, 'backend_compile_and_load', compiled)
    config, run = path('ddpm_digits'), tmp_path / 'run'
    assert run_main(['jaxgen', '--mode=data', f'--config={config}', f'--workdir={run}']) == 0
    out, err = capfd.readouterr()
    assert 'digits\nexamples      ' in out and f'image grid    {run}/data/grid.png' in out and not err
    assert sorted(os.listdir(run / 'data')) == ['grid.png', 'summary.json']
    assert json.loads((run / 'data' / 'summary.json').read_text())['splits'] == {'train': 1438, 'test': 359}
    # A later call replaces its own files, and touches no others.
    assert run_main(['jaxgen', '--mode=data', f'--config={config}', f'--out={run}/data']) == 0
    capfd.readouterr()
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'grid.png').write_bytes(b'mine')
    assert 'was not written by jaxgen' in mistake(capfd, '--mode=data', f'--config={config}', f'--out={tmp_path}/mine')
    assert (tmp_path / 'mine' / 'grid.png').read_bytes() == b'mine'
    field = f'--config.data.source=idx:{tmp_path}/nowhere'
    assert 'No such file' in mistake(capfd, '--mode=data', f'--config={config}', field)
