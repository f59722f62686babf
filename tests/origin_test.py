"""Runs of strangers: nothing outside of them is read or written unless the person names it."""

from __future__ import annotations

import json
import os

import pytest
from support import path

from jaxgen import config as configs
from jaxgen import data, directory, origin, run
from jaxgen.errors import UserError


def make_run(workdir, **changes) -> None:
    """A run without checkpoints: what says where everything lies is written before the first of them."""
    config = configs.load(path('vae_digits'))
    config = configs.complete(configs.deep_update(config.to_dict(), changes))
    os.makedirs(workdir)
    directory.save_config(str(workdir), config, data.spec(configs.load(path('vae_digits')).data))


@pytest.fixture
def be_a_stranger(tmp_path, monkeypatch):
    """From this call on the person is another one than who trained."""

    def become():
        monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path / 'another'))

    return become


@pytest.fixture
def read_configs(monkeypatch) -> list[str]:
    """The config.json files that were read."""
    files, read = [], configs.read_json

    def record(file):
        files.append(os.path.realpath(file))
        return read(file)

    monkeypatch.setattr(configs, 'read_json', record)
    return files


@pytest.mark.parametrize('place', ['{outside}', '{run}/../outside', '/etc', '{run}/inner'])
def test_no_stage_outside_is_read(place, tmp_path, be_a_stranger, read_configs):
    outside, workdir = tmp_path / 'outside', tmp_path / 'run'
    make_run(outside)
    place = place.format(outside=outside, run=workdir)
    make_run(workdir, stages={'first': place})
    if place.endswith('inner'):  # a stage within the run, whose own stage lies outside
        make_run(workdir / 'inner', stages={'first': str(outside)})
    del read_configs[:]
    be_a_stranger()
    with pytest.raises(UserError, match='lies outside of the run'):
        run.load(str(workdir))
    assert not [file for file in read_configs if not file.startswith(f'{workdir}/')]


def test_whoever_trained_it_or_names_it_may_read_it(tmp_path, be_a_stranger):
    make_run(tmp_path / 'outside')
    make_run(tmp_path / 'run', stages={'first': str(tmp_path / 'outside')})
    assert directory.read(str(tmp_path / 'run'))[2] == {}
    be_a_stranger()
    fields = {'stages': {'first': str(tmp_path / 'outside')}}
    assert directory.read(str(tmp_path / 'run'), fields)[2] == {}


@pytest.mark.parametrize('place', ['images', 'data/toy/1.0.0', 'wherever', 'checkpoints/4', 'samples'])
@pytest.mark.parametrize('what', ['link', 'link to a folder', 'pipe', 'dangling link'])
def test_links_and_pipes_anywhere_in_the_run_of_a_stranger(what, place, tmp_path, be_a_stranger):
    """Its config may name images, or a prepared data set, that lie in it: links there would lead out again."""
    workdir = tmp_path / 'run'
    make_run(workdir)
    os.makedirs(workdir / place)
    (tmp_path / 'secret').write_text('outside')
    target = {'link': 'secret', 'link to a folder': '.', 'dangling link': 'nothing'}
    if what == 'pipe':
        os.mkfifo(workdir / place / 'x')
    else:
        os.symlink(tmp_path / target[what], workdir / place / 'x')
    if place.partition('/')[0] not in origin.OWN:  # where a run writes, links do harm to anybody
        directory.read(str(workdir))
    be_a_stranger()
    with pytest.raises(UserError, match=r'run/.*/x is .*: the files of a run must lie in its own directory'):
        directory.read(str(workdir))


@pytest.mark.parametrize('text', ['', '[]', '{"paths": "\u00fc"}', '{"paths": null}', '[' * 50_000, '{"paths": ""}'])
def test_a_forged_signature_is_none(text, tmp_path, be_a_stranger):
    make_run(tmp_path / 'run', stages={'first': '/etc'})
    be_a_stranger()
    (tmp_path / 'run' / 'origin.json').write_text(text)
    with pytest.raises(UserError, match='lies outside of the run'):
        directory.read(str(tmp_path / 'run'))


@pytest.mark.parametrize('where', ['/etc/', '../../', '../../../../../../../../../etc/', 'x/../../y/'])
def test_examples_of_a_prepared_set_lie_in_it(where, tmp_path):
    """What names the files of a set is in its own dataset_info.json."""
    config = configs.deep_update(configs.load(path('vae_digits')).data.to_dict(), {'dir': str(tmp_path)})
    data.dataset(config, 'train')
    (info,) = tmp_path.glob('*/*/dataset_info.json')
    about = json.loads(info.read_text())
    for split in about['splits']:
        split['filepathTemplate'] = where + split['filepathTemplate']
    os.rename(info.parent.parent, tmp_path / 'planted')
    info = tmp_path / 'planted' / info.parent.name / 'dataset_info.json'
    info.write_text(json.dumps({**about, 'name': 'planted'}))
    with pytest.raises(UserError, match='names a file outside of it'):
        data.dataset({**config, 'source': 'planted'}, 'train')
