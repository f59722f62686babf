"""Runs that are moved, with their stages, and runs that are packed to be shared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from support import mistake, path

import jaxgen
from jaxgen import origin, pack
from jaxgen.errors import RunError, UserError
from jaxgen.main import run_main


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with a first stage and a prior that was trained on it, `first` and `prior`, and samples of the prior."""
    root = tmp_path_factory.mktemp('pack')
    fields = ('--config.train.samples=1', '--config.train.save_every=2')
    first, prior = f'--config={path("vqvae_digits")}', f'--config={path("vqvae_digits_prior")}'
    assert run_main(['jaxgen', first, f'--workdir={root}/first', *fields]) == 0
    assert run_main(['jaxgen', prior, f'--workdir={root}/prior', f'--config.stages.first={root}/first', *fields]) == 0
    return root, jaxgen.load(str(root / 'prior')).sample(n=3)


@pytest.fixture
def moved(trained, tmp_path):
    """Both in another folder, and nothing where they were."""
    root, samples = trained
    hidden = root.with_name('hidden')
    shutil.copytree(root, tmp_path / 'moved')
    os.rename(root, hidden)
    yield tmp_path / 'moved', samples
    os.rename(hidden, root)


def samples_of(workdir) -> np.ndarray:
    return jaxgen.load(str(workdir)).sample(n=3)


# --- moved


def test_stages_that_moved_with_the_run(moved, monkeypatch):
    folder, samples = moved
    np.testing.assert_array_equal(samples_of(folder / 'prior'), samples)
    monkeypatch.chdir(folder)
    np.testing.assert_array_equal(samples_of('prior'), samples)
    assert jaxgen.load('prior').config.stages.first == str(folder / 'first')


def test_stages_at_the_same_place_from_the_run(moved, tmp_path):
    """Not beside it, but where the signed path from the run leads."""
    folder, samples = moved
    os.makedirs(folder / 'stages' / 'of mine')
    os.rename(folder / 'first', folder / 'stages' / 'of mine' / 'one')
    config = json.loads((folder / 'prior' / 'config.json').read_text())
    config['stages']['first'] = str(folder / 'stages' / 'of mine' / 'one')
    (folder / 'prior' / 'config.json').write_text(json.dumps(config))
    origin.sign(str(folder / 'prior'), jaxgen.config.complete(config))
    os.rename(folder, tmp_path / 'again')
    np.testing.assert_array_equal(samples_of(tmp_path / 'again' / 'prior'), samples)
    os.rename(tmp_path / 'again' / 'prior', tmp_path / 'prior')  # from here the path leads elsewhere
    with pytest.raises(UserError, match='no run in'):
        jaxgen.load(str(tmp_path / 'prior'))
    os.rename(tmp_path / 'again', folder)


def test_stages_beside_the_run_by_their_name(moved):
    folder, samples = moved
    signed = origin.read(str(folder / 'prior'))
    (folder / 'prior' / origin.NAME).write_text(json.dumps({'paths': signed['paths']}))  # of a run of before
    np.testing.assert_array_equal(samples_of(folder / 'prior'), samples)


def test_in_the_run_comes_first(trained, tmp_path):
    root, samples = trained
    prior = shutil.copytree(root / 'prior', tmp_path / 'prior')
    shutil.copytree(root / 'first', prior / 'stages' / 'first')
    assert jaxgen.load(str(prior)).config.stages.first == str(prior / 'stages' / 'first')
    os.remove(prior / origin.NAME)  # also of a stranger's
    np.testing.assert_array_equal(samples_of(prior), samples)


@pytest.mark.parametrize('change', ['unsigned', 'another key', 'other relative path', 'no text'])
def test_what_no_one_signed_is_not_followed(change, moved, tmp_path, monkeypatch):
    folder, _ = moved
    file = folder / 'prior' / origin.NAME
    signed = json.loads(file.read_text())
    if change == 'unsigned':
        file.unlink()
    elif change == 'another key':
        monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path / 'another person'))
    else:
        os.rename(folder / 'first', folder / 'elsewhere')
        other = {'first': '../elsewhere'} if change == 'other relative path' else 3
        file.write_text(json.dumps(signed | {'stages': other}))
    with pytest.raises(UserError, match=r'config\.stages(\.first names| *: no run)|no run in'):
        jaxgen.load(str(folder / 'prior'))
    named = folder / ('first' if (folder / 'first').exists() else 'elsewhere')
    assert jaxgen.load(str(folder / 'prior'), config={'stages': {'first': str(named)}}).step == 4


# --- packed


UNPACK = {'zip': ['-m', 'zipfile', '-e'], 'tar.gz': ['-m', 'tarfile', '-e']}


@pytest.mark.parametrize('kind', ['zip', *(pytest.param(k, marks=pytest.mark.slow) for k in ('tar.gz', 'folder'))])
def test_a_pack_is_used_anywhere(kind, trained, tmp_path, monkeypatch):
    root, samples = trained
    out = tmp_path / f'shared.{kind}' if kind != 'folder' else tmp_path / 'new' / 'shared'
    assert run_main(['jaxgen', '--mode=pack', f'--workdir={root}/prior', f'--out={out}']) == 0
    here = out
    if kind != 'folder':
        here = tmp_path / 'unpacked'
        subprocess.run([sys.executable, *UNPACK[kind], str(out), str(here)], check=True)
        assert os.listdir(here) == ['prior']
        here = here / 'prior'
    items = {p.name for p in (here / 'checkpoints' / '4').iterdir() if p.is_dir()}
    assert items == {'about', 'ema', 'params'} and os.listdir(here / 'checkpoints') == ['4']
    assert sorted(os.listdir(here)) == ['checkpoints', 'config.json', 'data.json', 'digests', 'origin.json', 'stages']
    hidden = root.with_name('hidden')
    os.rename(root, hidden)
    try:
        monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path / 'another person'))
        monkeypatch.chdir(tmp_path)
        np.testing.assert_array_equal(samples_of(os.path.relpath(here)), samples)
        assert run_main(['jaxgen', '--mode=evaluate', f'--workdir={here}']) == 0
    finally:
        os.rename(hidden, root)


def test_a_pack_is_checked_and_not_trained_on(trained, tmp_path, capfd):
    root, _ = trained
    out = tmp_path / 'shared'
    assert run_main(['jaxgen', '--mode=pack', f'--workdir={root}/first', f'--out={out}', '--step=2']) == 0
    assert jaxgen.load(str(out)).step == 2
    capfd.readouterr()
    said = mistake(capfd, f'--config={path("vqvae_digits")}', f'--workdir={out}', '--config.train.save_every=2')
    assert 'was packed without opt' in said and 'cannot be trained on' in said
    file = max((p for p in out.rglob('*') if p.is_file() and 'ema' in str(p)), key=lambda p: p.stat().st_size)
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)
    with pytest.raises(RunError, match='none of the checkpoints'):
        jaxgen.load(str(out))


def test_archives_hold_files_in_one_folder(trained, tmp_path):
    root, _ = trained
    run = jaxgen.load(str(root / 'prior'))
    for ending in ('zip', 'tar', 'tgz'):
        out = tmp_path / f'shared.{ending}'
        count, size = pack.pack(run, str(out))
        if ending == 'zip':
            with zipfile.ZipFile(out) as archive:
                names, sizes = archive.namelist(), sum(i.file_size for i in archive.infolist())
        else:
            with tarfile.open(out) as archive:
                assert all(member.isreg() for member in archive)
                names, sizes = archive.getnames(), sum(member.size for member in archive)
        assert len(names) == len(set(names)) == count and sizes == size
        assert all(name.startswith('prior/') and '..' not in name for name in names)
        assert not any('/opt/' in name or name.endswith(('.png', 'metrics.jsonl')) for name in names)


def test_a_file_that_changes_leaves_nothing(trained, tmp_path, monkeypatch):
    root, _ = trained
    run = jaxgen.load(str(root / 'first'))
    real = pack.parts

    def changing(*args):
        return [part._replace(sha256='0' * 64) if part.sha256 else part for part in real(*args)]

    monkeypatch.setattr(pack, 'parts', changing)
    for name in ('shared.zip', 'shared.tar.gz', 'shared'):
        with pytest.raises(RunError, match='changed while it was packed'):
            pack.pack(run, str(tmp_path / name))
    assert not os.listdir(tmp_path)


def test_mistakes(trained, tmp_path, capfd, no_compile):
    root, _ = trained
    workdir = f'--workdir={root}/first'
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'file').write_text('mine')
    (tmp_path / 'x.zip').mkdir()
    assert 'needs --out=FILE.zip' in mistake(capfd, '--mode=pack', workdir)
    assert 'is there: name a new folder' in mistake(capfd, '--mode=pack', workdir, f'--out={tmp_path}/full')
    assert 'is a file' in mistake(capfd, '--mode=pack', workdir, f'--out={tmp_path}/full/file')
    assert 'is a directory' in mistake(capfd, '--mode=pack', workdir, f'--out={tmp_path}/x.zip')
    assert '--n is read by' in mistake(capfd, '--mode=pack', workdir, '--n=3')
    assert 'no run in' in mistake(capfd, '--mode=pack', f'--workdir={tmp_path}/none', f'--out={tmp_path}/y.zip')
    (tmp_path / 'archive.zip').write_bytes(b'')
    for mode in ('sample', 'pack'):
        said = mistake(capfd, f'--mode={mode}', f'--workdir={tmp_path}/archive.zip', f'--out={tmp_path}/y.zip')
        assert 'is an archive: unpack it, python -m zipfile -e' in said
    assert not (tmp_path / 'y.zip').exists()


def test_a_stage_that_is_not_trained_is_named(tmp_path, capfd):
    said = mistake(capfd, f'--config={path("vqvae_digits_prior")}', f'--workdir={tmp_path}/a',
                   f'--config.stages.first={tmp_path}/vqvae_digits')  # fmt: skip
    assert 'config.stages.first: no run in' in said and 'train it first (--config=' in said
    assert '--config.stages.first=PATH' in said
