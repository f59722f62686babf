"""Prepared sets of strangers: nothing in them is executed, nothing is written through their links."""

from __future__ import annotations

import json
import os
import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_sets import ToyFaces, make, refused

from jaxgen import data
from jaxgen.errors import UserError


def plant(where, kind: str, marker, change) -> str:
    """A complete prepared set below `where` whose features.json is changed; the source's name."""
    name = {'toy': 'toy_faces:1.0.0', 'unknown': 'planted:1.0.0', 'config': 'toy_faces/other'}[kind]
    data.dataset(make(where, source='toy_faces'), 'train')
    path = where / 'toy_faces' / '1.0.0'
    if kind != 'toy':
        new = where / 'planted' / '1.0.0' if kind == 'unknown' else where / 'toy_faces' / 'other' / '1.0.0'
        os.makedirs(new.parent)
        os.rename(path, new)
        path = new
        info = json.loads((path / 'dataset_info.json').read_text())
        for shard in path.glob('toy_faces-*'):
            os.rename(shard, path / shard.name.replace('toy_faces', new.parent.name))
        info |= {'name': 'planted'} if kind == 'unknown' else {'configName': 'other'}
        (path / 'dataset_info.json').write_text(json.dumps(info))
    (where / 'planted_module.py').write_text(f'open({str(marker)!r}, "w").close()\n')
    features = json.loads((path / 'features.json').read_text())
    (path / 'features.json').write_text(json.dumps(change(features)))
    return name


def in_a_dict(features: dict) -> dict:
    features['featuresDict']['features']['evil'] = {'pythonClassName': 'planted_module.Evil', 'text': {}}
    return features


def in_a_sequence(features: dict) -> dict:
    inner = {'pythonClassName': 'planted_module.Evil', 'text': {}}
    name = 'tensorflow_datasets.core.features.sequence_feature.Sequence'
    features['featuresDict']['features']['evil'] = {
        'pythonClassName': name,
        'sequence': {'feature': inner, 'length': '-1'},
    }
    return features


PLANTED = {
    'at the top': lambda features: {**features, 'pythonClassName': 'planted_module.Evil'},
    'in a dict': in_a_dict,
    'in a sequence': in_a_sequence,
    'in JSON of old': lambda _: {'type': 'planted_module.Evil', 'content': {}},
}


@pytest.mark.parametrize('where', PLANTED)
@pytest.mark.parametrize('kind', ['toy', 'unknown', 'config'])
def test_a_prepared_set_runs_no_code(tmp_path, monkeypatch, kind, where):
    marker = tmp_path / 'marker'
    name = plant(tmp_path, kind, marker, PLANTED[where])
    monkeypatch.syspath_prepend(str(tmp_path))
    config = make(tmp_path, source=name)
    for call in (data.spec, lambda c: data.dataset(c, 'train'), lambda c: data.labels(c, 'test')):
        with refused(r"names the class 'planted_module.Evil', which is not one of TFDS"):
            call(config)
    assert not marker.exists() and 'planted_module' not in sys.modules
    with pytest.raises(UserError):  # another way into TFDS
        tfds.builder_from_directory(next(iter(tmp_path.glob('**/features.json'))).parent)
    assert not marker.exists()


def test_a_prepared_set_without_its_builder_is_read(tmp_path):
    name = plant(tmp_path, 'unknown', tmp_path / 'marker', lambda features: features)
    examples = data.dataset(make(tmp_path, source=name, features=('image', 'label', 'landmarks')), 'train')
    assert len(examples) == 8 and int(examples[5]['label']) == int(examples[5]['image'][0, 0, 0]) % 3


class ToyPickled(ToyFaces):
    content = b''

    def image(self, i):
        pickle.loads(self.content)
        return super().image(i)


class Call:
    def __reduce__(self):
        return os.mkdir, (Call.path,)


def test_pickles_of_a_set_are_not_run(tmp_path):
    Call.path = str(tmp_path / 'marker')
    ToyPickled.content = pickle.dumps(Call())
    with refused(r'pickle that calls posix.mkdir: it is not run'):
        data.dataset(make(tmp_path, source='toy_pickled'), 'train')
    assert not os.path.exists(Call.path)
    ToyPickled.content = pickle.dumps({'a': np.arange(3), 'b': np.float64(2), 'c': [1, 'x']})
    assert len(data.dataset(make(tmp_path, source='toy_pickled'), 'train')) == 8
    pickle.loads(pickle.dumps(Call()))  # outside it is as ever
    assert os.path.exists(Call.path)


def test_nothing_is_written_through_planted_links(tmp_path, monkeypatch):
    outside = tmp_path / 'outside'
    os.makedirs(outside)
    os.makedirs(tmp_path / 'sets')
    os.symlink(outside, tmp_path / 'sets' / 'jaxgen_digits')
    with refused('is a link that leads out of'):
        data.dataset(make(tmp_path / 'sets'), 'train')
    os.remove(tmp_path / 'sets' / 'jaxgen_digits')
    os.makedirs(tmp_path / 'sets' / 'jaxgen_digits')
    os.symlink(outside / 'new', tmp_path / 'sets' / 'jaxgen_digits' / '.lock')
    with refused(r'cannot write to .*\.lock'):
        data.dataset(make(tmp_path / 'sets'), 'train')
    assert not os.listdir(outside)
    # A person's own directory may be a link, and where it is the default, hold links.
    os.symlink(outside, tmp_path / 'mine')
    assert len(data.dataset(make(tmp_path / 'mine'), 'test')) == 359
    os.rename(outside / 'jaxgen_digits', tmp_path / 'moved')
    os.symlink(tmp_path / 'moved', outside / 'jaxgen_digits')
    monkeypatch.setenv('TFDS_DATA_DIR', str(outside))
    (tmp_path / 'moved' / '1.0.0' / 'dataset_info.json').unlink()
    assert len(data.dataset(make(''), 'test')) == 359
