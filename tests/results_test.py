"""Samples, films, sheets and evaluations: of any kept checkpoint, beside each other, with a record of how they were
made."""

from __future__ import annotations

import json
import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from support import mistake, path

import jaxgen
from jaxgen import config as configs
from jaxgen.main import run_main


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A diffusion model with its checkpoints of steps 2, 3 and 4."""
    workdir = tmp_path_factory.mktemp('results') / 'run'
    fields = ('train.save_every=1', 'train.keep=3', 'train.samples=1')
    arguments = [f'--config={path("ddpm_digits")}', f'--workdir={workdir}', *(f'--config.{f}' for f in fields)]
    assert run_main(['jaxgen', *arguments]) == 0
    return workdir


def use(mode: str, workdir, *args) -> None:
    assert run_main(['jaxgen', f'--mode={mode}', f'--workdir={workdir}', *map(str, args)]) == 0


def read(*names) -> dict:
    with open(os.path.join(*names), encoding='utf-8') as file:
        return json.load(file)


def test_any_kept_checkpoint_is_used(trained, capfd):
    digests = set()
    for step in (2, 3, 4):
        loaded = jaxgen.load(str(trained), step=step)
        assert loaded.step == step
        with ocp.StandardCheckpointer() as orbax:  # without our own code
            saved = orbax.restore(trained / 'checkpoints' / str(step) / 'ema')
        for a, b in zip(jax.tree.leaves(loaded.state.ema), jax.tree.leaves(saved), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        use('sample', trained, '--n=1', f'--step={step}')
        about = read(trained, 'samples', f'step{step}_ema_seed0_n1', 'samples.json')
        assert about['step'] == step
        digests.add(about['weights_sha256'])
    assert len(digests) == 3
    capfd.readouterr()
    said = mistake(capfd, '--mode=sample', f'--workdir={trained}', '--step=1')
    assert 'no such checkpoint' in said and 'there are those of 2, 3, 4' in said
    for text in ('-1', '2.0', 'newest', '1e3'):
        assert 'must be the step' in mistake(capfd, '--mode=sample', f'--workdir={trained}', f'--step={text}')


def test_a_damaged_checkpoint_that_is_named_is_a_fault(trained, tmp_path, capfd):
    copy = shutil.copytree(trained, tmp_path / 'copy')
    shutil.rmtree(copy / 'checkpoints' / '3' / 'ema')
    assert run_main(['jaxgen', '--mode=sample', f'--workdir={copy}', '--step=3']) == 1
    assert 'checkpoint of step 3 is damaged' in capfd.readouterr().err
    assert jaxgen.load(str(copy), step=2).step == 2


def test_results_say_how_they_were_made(trained, tmp_path):
    use('sample', trained, '--n=2', f'--out={tmp_path}/one', '--film=2', '--config.model.sampler.name=ddim')
    use('sample', trained, '--n=2', f'--out={tmp_path}/two', '--weights=params', '--seed=3')
    use('evaluate', trained)
    one, two = read(tmp_path, 'one', 'samples.json'), read(tmp_path, 'two', 'samples.json')
    evaluation = read(trained, 'evaluation.json')
    saved = configs.flat(read(trained, 'config.json'))
    for about in (one, two, evaluation):
        assert about['step'] == 4 and about['device'] and {'jax', 'jaxgen', 'numpy'} <= set(about['versions'])
        assert about['config']['train.dtype'] == 'float32'
    # Complete: fields that are as they were in training are there, too.
    sampling = {key: value for key, value in saved.items() if key.startswith(('model.sampler.', 'model.likelihood.'))}
    assert sampling and sampling.items() <= two['config'].items() and sampling.items() <= evaluation['config'].items()
    assert one['config']['model.sampler.name'] == 'ddim' and 'model.sampler.eta' in one['config']
    assert one['weights_sha256'] == evaluation['weights_sha256'] != two['weights_sha256']
    assert (one['n'], one['film'], one['condition'], two['weights'], two['seed']) == (2, 2, {}, 'params', 3)
    assert sorted(os.listdir(tmp_path / 'one')) == ['film.png', 'grid.png', 'images', 'samples.json', 'samples.npz']
    assert 'film' not in two and sorted(os.listdir(tmp_path / 'two')) == sorted(
        ['grid.png', 'images', 'samples.json', 'samples.npz']
    )


def test_results_of_other_settings_lie_beside_each_other(trained):
    results = trained / 'results'
    use('evaluate', trained, '--config.evaluate.examples=3')
    before = set(os.listdir(results))
    for more in ('evaluate.examples=4', 'model.likelihood.steps=5', 'evaluate.examples=3'):
        use('evaluate', trained, f'--config.{more}')
    assert len(set(os.listdir(results)) - before) == 2, 'the last one is the first once more'
    use('evaluate', trained, '--config.evaluate.examples=3', '--step=2')
    assert len(set(os.listdir(results)) - before) == 3
