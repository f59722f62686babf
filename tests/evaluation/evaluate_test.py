"""Evaluation by command: samples and folders against data sets, caches and faults."""

from __future__ import annotations

import glob
import json
import os

import jax
import numpy as np
import pytest
from PIL import Image
from support import devices, main, metrics, mistake, path

import jaxgen
from jaxgen import config as configs
from jaxgen import directory, files, run, sample
from jaxgen.errors import RunError
from jaxgen.evaluation import cache
from jaxgen.main import run_main
from jaxgen.train import train

pytestmark = pytest.mark.slow  # compiles networks, trains or starts processes

SAMPLES = 20


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """A run whose features are good enough to count with: 8 of them."""
    workdir = str(tmp_path_factory.mktemp('runs') / 'net')
    train(configs.load(path('classifier_digits')), workdir)
    return workdir


@pytest.fixture(scope='module')
def trained(classifier, tmp_path_factory):
    """A run that draws samples, with a data directory of its own, evaluated in the features of `classifier`."""
    workdir = str(tmp_path_factory.mktemp('runs') / 'model')
    config = configs.load(path('vae_digits'))
    config.data.dir = str(tmp_path_factory.mktemp('data'))
    config.evaluate.features, config.evaluate.samples = f'run:{classifier}', SAMPLES
    train(config, workdir)
    return workdir


@pytest.fixture
def copy(trained, tmp_path):
    import shutil

    return shutil.copytree(trained, tmp_path / 'model')


def rounded(value):
    """Numbers to 9 digits: the last ones of an eigenvalue depend on where its matrix lies in memory."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f'{value:.9g}') if isinstance(value, float) else value


def evaluation(workdir) -> dict:
    with open(os.path.join(workdir, 'evaluation.json'), encoding='utf-8') as file:
        return rounded(json.load(file))


def caches(workdir) -> list[str]:
    return sorted(glob.glob(os.path.join(directory.saved_config(str(workdir)).data.dir, 'statistics', '*')))


def test_evaluation_records_its_metrics_and_settings(trained, capfd):
    # What an earlier version left is replaced.
    piece = os.path.join(trained, 'evaluation', '0123456789abcdef', '00000000.npz')
    files.save_npz(piece, {'asked/accuracy': np.ones(8), cache.NAMES: np.array(['asked/accuracy'])})
    files.save_json(os.path.join(trained, 'evaluation.json'), {'metrics': {'asked/accuracy/net': {'value': 1, 'n': 8}}})
    assert run_main(['jaxgen', '--mode=evaluate', f'--workdir={trained}', '--seed=3']) == 0
    record = evaluation(trained)
    values = record['metrics']
    expected = 'frechet kid precision recall density coverage authenticity inception_score modes class_kl'
    assert {f'{name}/net' for name in expected.split()} < set(values), 'the name of the network is part of the metric'
    assert not [name for name in values if {'fid', 'asked'} & {*name.lower().split('/')}]
    assert all(np.isfinite(m['value']) and m['n'] > 0 for m in values.values())
    assert values['frechet/net']['n'] == SAMPLES and values['frechet/net']['n_reference'] == 1438
    assert values['nll_elbo']['n'] == 8
    assert record['weights'] == 'ema' and record['step'] == 4 and record['samples'] == {'n': SAMPLES, 'seed': 3}
    assert record['features']['name'] == 'net' and len(record['features']['sha256']) == 64
    assert record['reference'] == {'source': 'digits', 'split': 'train', 'n': 1438} and record['versions']['jax']
    assert 'few for 8 features' in capfd.readouterr().err
    assert not os.path.exists(os.path.join(trained, 'evaluation')), 'pieces are left behind'
    # Again: the same metrics, and the data set's statistics come from the cache.
    (kept,) = caches(trained)
    before = os.stat(kept).st_mtime_ns
    assert run_main(['jaxgen', '--mode=evaluate', f'--workdir={trained}', '--seed=3']) == 0
    assert evaluation(trained)['metrics'] == values and os.stat(kept).st_mtime_ns == before
    assert run_main(['jaxgen', '--mode=evaluate', f'--workdir={trained}', '--seed=4', '--n=30']) == 0
    other = evaluation(trained)['metrics']['frechet/net']
    assert other['n'] == 30 and other['value'] != values['frechet/net']['value']


def test_another_split_or_network_has_a_cache_of_its_own(trained):
    assert run_main(['jaxgen', '--mode=evaluate', f'--workdir={trained}']) == 0
    before = set(caches(trained))
    args = ['jaxgen', '--mode=evaluate', f'--workdir={trained}']
    assert run_main([*args, '--config.evaluate.split=test']) == 0
    assert 'authenticity/net' not in evaluation(trained)['metrics'], 'nobody trains on the test split'
    assert evaluation(trained)['reference']['n'] == 359
    assert run_main([*args, f'--features=run:{trained}']) == 0
    assert 'frechet/model' in evaluation(trained)['metrics'], 'any family that encodes has features'
    assert len(set(caches(trained)) - before) == 2
    assert run_main([*args, '--features=none']) == 0
    assert not [name for name in evaluation(trained)['metrics'] if '/' in name]


def test_stopped_in_sampling_goes_on(copy, monkeypatch, capfd):
    args = ['jaxgen', '--mode=evaluate', f'--workdir={copy}', '--config.sample.batch=4']
    assert run_main(args) == 0
    whole = evaluation(copy)
    os.remove(copy / 'evaluation.json')
    drawn, real = [], sample.draw_batch

    def count(*args):
        if len(drawn) == 3:
            raise OSError('the lights went out')
        drawn.append(args)
        return real(*args)

    monkeypatch.setattr(sample, 'draw_batch', count)
    assert run_main(args) == 1
    assert 'lights' in capfd.readouterr().err and not os.path.exists(copy / 'evaluation.json')
    (torn, *rest) = sorted(glob.glob(str(copy / 'evaluation' / '*' / '*.npz')))
    assert len(rest) == 2
    os.truncate(torn, os.path.getsize(torn) // 2)
    drawn.clear()
    monkeypatch.setattr(sample, 'draw_batch', lambda *args: drawn.append(args) or real(*args))
    assert run_main(args) == 0
    assert len(drawn) == SAMPLES // 4 - 2, 'draws what is missing or torn, and nothing else'
    assert evaluation(copy) == whole
    # Pieces of other weights are no pieces of these.
    drawn.clear()
    assert run_main([*args, '--weights=params']) == 0
    assert len(drawn) == SAMPLES // 4 and evaluation(copy)['weights'] == 'params'


def test_devices_do_not_matter(copy):
    done = main('--mode=evaluate', f'--workdir={copy}', '--config.evaluate.batch=20', env=devices(8))
    assert done.returncode == 0, done.stderr
    eight = evaluation(copy)
    assert eight['device'].startswith('8 x')
    assert run_main(['jaxgen', '--mode=evaluate', f'--workdir={copy}']) == 0
    for name, metric in evaluation(copy)['metrics'].items():
        np.testing.assert_allclose(metric['value'], eight['metrics'][name]['value'], rtol=2e-3, atol=1e-5, err_msg=name)


def test_a_folder_of_samples_has_the_metrics_of_the_run(copy, classifier, tmp_path):
    assert run_main(['jaxgen', '--mode=evaluate', f'--workdir={copy}']) == 0
    own = evaluation(copy)['metrics']
    assert run_main(['jaxgen', '--mode=sample', f'--workdir={copy}', f'--n={SAMPLES}', f'--out={tmp_path}/drawn']) == 0
    folder, out = f'--images={tmp_path}/drawn/images', tmp_path / 'measured'
    args = ['jaxgen', '--mode=evaluate', folder, f'--out={out}', f'--workdir={copy}']
    assert run_main(args) == 0
    record = evaluation(out)
    assert record['images']['n'] == SAMPLES
    assert record['metrics'] == {name: metric for name, metric in own.items() if '/' in name}
    # Against the data of a config that nobody has trained.
    args = ['jaxgen', '--mode=evaluate', folder, f'--out={out}', f'--config={path("ddpm_digits", "")}']
    assert run_main([*args, f'--features=run:{classifier}']) == 0
    value = evaluation(out)['metrics']['frechet/net']['value']
    np.testing.assert_allclose(value, own['frechet/net']['value'], rtol=1e-4)  # other batches, other rounding


# --- while training


def test_metrics_in_the_logs_and_a_stopped_run(classifier, tmp_path):
    config = configs.load(path('vae_digits')).to_dict()
    fields = {'steps': 4, 'save_every': 2, 'log_every': 1, 'evaluate_every': 2, 'evaluate_samples': SAMPLES}
    more = {'train': fields, 'evaluate': {'features': f'run:{classifier}'}}
    config = configs.make(**configs.deep_update(config, more))
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    train(config, str(whole))
    lines = rounded(metrics(whole))
    assert [line['step'] for line in lines if 'frechet/net' in line] == [2, 4]
    assert [line['step'] for line in lines] == [1, 2, 2, 3, 4, 4]
    config.train.steps = 2
    train(config, str(parts))
    # As a kill leaves it after the checkpoint and before the metrics of its step.
    text = (parts / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (parts / 'metrics.jsonl').write_text(''.join(text[:-1]))
    config.train.steps = 4
    train(config, str(parts))
    assert rounded(metrics(parts)) == lines


# --- mistakes: one line, nothing overwritten


def image_folder(folder, n: int = 30, size: int = 8):
    os.makedirs(folder)
    rng = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (size, size), np.uint8)).save(os.path.join(folder, f'{i:03d}.png'))
    return folder


def test_mistakes_of_evaluation(copy, classifier, tmp_path, capfd, no_compile):
    (copy / 'evaluation.json').write_text('precious')
    base = ['--mode=evaluate', f'--workdir={copy}']
    assert '8 images are too few' in mistake(capfd, *base, '--n=8')
    assert 'no run in' in mistake(capfd, *base, '--features=run:nowhere')
    assert "must be 'inception'" in mistake(capfd, *base, '--features=clip')
    assert '--inception=' in mistake(capfd, *base, '--features=inception')
    (tmp_path / 'weights.pth').write_bytes(b'not weights')
    stderr = mistake(capfd, *base, '--features=inception', f'--inception={tmp_path}/weights.pth')
    assert 'weights.pth' in stderr
    assert 'split' in mistake(capfd, *base, '--config.evaluate.split=validation')
    other = f'--config={path("vae_mnist", "")}'
    one = image_folder(tmp_path / 'one', 1)
    good = image_folder(tmp_path / 'good')
    features = f'--features=run:{classifier}'
    stderr = mistake(capfd, '--mode=evaluate', other, '--config.data.source=digits', f'--images={good}', features)
    assert 'net reads images of 8 x 8 x 1' in stderr
    assert '1 images are too few' in mistake(capfd, *base, f'--images={one}')
    assert '--mode=evaluate' in mistake(capfd, f'--config={path("ddpm_digits")}', f'--images={good}')
    assert 'needs --features' in mistake(capfd, *base, f'--images={good}', '--features=none')
    assert 'does not exist' in mistake(capfd, *base, f'--images={tmp_path}/nowhere')
    Image.new('L', (9, 8)).save(good / 'wide.png')
    stderr = mistake(capfd, *base, f'--images={good}')
    assert 'wide.png is 8 x 9 pixels' in stderr and 'one size' in stderr
    (good / 'wide.png').write_bytes(b'\x89PNG torn')
    assert 'wide.png cannot be measured' in mistake(capfd, *base, f'--images={good}')
    assert (copy / 'evaluation.json').read_text() == 'precious'


def test_images_that_are_damaged_inside(copy, tmp_path, capfd):
    """What the header does not show: rows that are missing, pixels that are not numbers."""
    folder = image_folder(tmp_path / 'damaged')
    args = ['--mode=evaluate', f'--workdir={copy}', f'--images={folder}', f'--out={tmp_path}/out']
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(folder / 'nan.tiff')
    assert run_main(['jaxgen', *args]) == 2
    assert 'nan.tiff cannot be measured (it has pixels that are not numbers)' in capfd.readouterr().err
    os.remove(folder / 'nan.tiff')
    whole = (folder / '003.png').read_bytes()
    (folder / '003.png').write_bytes(whole[:60])
    assert run_main(['jaxgen', *args]) == 2
    assert '003.png cannot be measured' in capfd.readouterr().err
    assert not os.path.exists(tmp_path / 'out')


def test_samples_that_are_not_numbers(copy, monkeypatch):
    import dataclasses

    loaded = jaxgen.load(str(copy))
    broken = loaded.state.replace(ema=jax.tree.map(lambda x: x * np.nan, loaded.state.ema))
    evaluator = run.make_evaluator(loaded.config, loaded.assembled.mesh)
    with pytest.raises(RunError, match='sample 0 is not finite'):
        dataclasses.replace(loaded, state=broken).compare(evaluator, SAMPLES)
