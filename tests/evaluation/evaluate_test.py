"""Evaluation by command: samples and folders against data sets, caches, faults, and samplers that are broken."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from support import ROOT, devices, main, metrics, mistake, path

import jaxgen
from jaxgen import config as configs
from jaxgen import files, run, sample
from jaxgen.errors import RunError
from jaxgen.evaluation import cache, samples
from jaxgen.main import run_main
from jaxgen.metrics import statistics
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
    return sorted(glob.glob(os.path.join(run.saved_config(str(workdir)).data.dir, 'statistics', '*')))


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


# --- the cache


def some_statistics(seed: int = 0):
    rng = np.random.default_rng(seed)
    piece = {name: rng.normal(size=(50, d)).astype(np.float32) for name, d in
             (('features', 5), ('logits', 3), ('spatial', 4))}  # fmt: skip
    return statistics.gather([piece], 50)


def assert_same_statistics(a, b):
    for x, y in zip(jax.tree.leaves(a._replace(logits=None)), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_statistics_do_not_depend_on_the_pieces():
    rng = np.random.default_rng(0)
    whole = {'features': rng.normal(size=(50, 5)).astype(np.float32), 'logits': rng.normal(size=(50, 3))}
    parts = [{name: x[i : i + 7] for name, x in whole.items()} for i in range(0, 50, 7)]
    one, many = statistics.gather([whole], 50), statistics.gather(parts, 50)
    np.testing.assert_array_equal(one.features, many.features)
    np.testing.assert_array_equal(one.counts, many.counts)
    assert one.counts.sum() == 50 and sorted(map(tuple, one.features)) == sorted(map(tuple, whole['features']))
    np.testing.assert_allclose(one.moments.scatter, many.moments.scatter, rtol=1e-12, atol=1e-12)
    whole['features'][31, 2] = np.nan
    with pytest.raises(RunError, match='features of image 31 are not finite'):
        statistics.gather([{name: x[i : i + 7] for name, x in whole.items()} for i in range(0, 50, 7)], 50)


def test_only_a_fair_part_of_many_features_is_kept(monkeypatch):
    monkeypatch.setattr(statistics, 'KEPT', 100)
    x = np.arange(1000, dtype=np.float32)[:, None]  # sorted, as a folder by its classes is
    kept = statistics.gather([{'features': x[i : i + 64]} for i in range(0, 1000, 64)], 1000)
    assert kept.features.shape == (100, 1) and kept.moments.n == 1000 and kept.moments.mean == x.mean()
    assert abs(kept.features[:50].mean() - 499.5) < 100, 'the first ones are no fair sample'


def test_statistics_that_cannot_be_kept_are_used_all_the_same(tmp_path, monkeypatch, capfd):
    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(statistics, 'write', full)
    made = statistics.Statistics(*[None] * len(statistics.Statistics._fields))
    assert statistics.cached(str(tmp_path), 'title', 'key', lambda: made) == made
    assert 'No space left' in capfd.readouterr().err


@pytest.mark.parametrize('damage', ['truncate', 'flip', 'empty', 'other'])
def test_damaged_cache_is_put_aside_and_made_again(damage, tmp_path, capfd):
    made = []

    def make():
        made.append(1)
        return some_statistics()

    def get(key='key'):
        return statistics.cached(str(tmp_path), 'title', key, make)

    assert_same_statistics(get(), get())
    assert len(made) == 1
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == 'truncate':
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == 'flip':
        at = whole.index(some_statistics().features.tobytes()) + 100
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif damage == 'empty':
        file.write_bytes(b'')
    else:
        np.savez(file, key=np.array('of another set'))
    assert_same_statistics(some_statistics(), get())
    assert len(made) == 2 and 'is damaged' in capfd.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2, 'the damaged one is kept aside'
    assert_same_statistics(some_statistics(), get())
    get('another key')
    assert len(made) == 3


def test_two_processes_write_one_cache(tmp_path):
    code = (
        'import pickle, sys; from jaxgen.metrics import statistics; made = pickle.load(sys.stdin.buffer)\n'
        'for i in range(60): statistics.write(sys.argv[1], "key", made)'
    )
    file = str(tmp_path / 'cache' / 'one.npz')
    command = [sys.executable, '-c', code, file]
    processes = [subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        process.stdin.write(pickle.dumps(some_statistics()))
        process.stdin.close()
    reads = 0
    while any(process.poll() is None for process in processes):
        if os.path.exists(file):
            assert_same_statistics(some_statistics(), statistics.read(file, 'key'))
            reads += 1
    assert all(process.returncode == 0 for process in processes)
    assert reads and os.listdir(tmp_path / 'cache') == ['one.npz']


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


# --- samplers that are broken, each caught by the metric that is there for it


@pytest.fixture(scope='module')
def evaluator(tmp_path_factory):
    """With a classifier that has learned the digits."""
    workdir = str(tmp_path_factory.mktemp('runs') / 'digits')
    sections = {
        'model': {'width': 16, 'features': 16},
        'train': {'steps': 300, 'updates_per_call': 50, 'log_every': 50, 'save_every': 300},
        'optim': {'schedule': 'constant'},
    }
    config = configs.make(**configs.deep_update(configs.load(path('classifier_digits', '')).to_dict(), sections))
    train(config, workdir)
    config.evaluate.features = f'run:{workdir}'
    return run.make_evaluator(config, jaxgen.load(workdir).assembled.mesh)


def values(evaluator, images) -> dict[str, float]:
    """Metrics of images uint8 [n, H, W, C] by their names."""
    compared = evaluator.compare([evaluator.extract(images, len(images))], len(images))
    return {name.partition('/')[0]: metric['value'] for name, metric in compared.items()}


def test_broken_samplers_are_caught(evaluator):
    from jaxgen import data

    config = configs.load(path('classifier_digits', ''))
    training, held_out = (data.dataset(config.data, split) for split in ('train', 'test'))
    training, held_out = (source.take(np.arange(len(source))) for source in (training, held_out))
    rng = np.random.default_rng(0)
    real = values(evaluator, held_out['image'])
    assert real['precision'] > 0.5 and real['recall'] > 0.5 and real['authenticity'] > 0.3 and real['modes'] == 10

    pixels = held_out['image'].reshape(-1, 64)
    shuffled = values(evaluator, rng.permuted(pixels, axis=1).reshape(held_out['image'].shape))
    assert shuffled['frechet'] > 20 * real['frechet'] and shuffled['kid'] > 20 * abs(real['kid'])
    assert shuffled['precision'] < 0.2 < real['precision'] / 2

    one_mode = values(evaluator, training['image'][training['label'] == 3])
    assert one_mode['precision'] > 0.9 and one_mode['modes'] <= 2 and one_mode['class_kl'] > 1.5
    assert one_mode['recall'] < 0.3 and one_mode['coverage'] < 0.3, 'precision alone does not see it'
    assert one_mode['inception_score'] < 2 < 5 < real['inception_score']

    memorised = values(evaluator, training['image'])
    assert memorised['frechet'] < 1e-6 and memorised['precision'] == memorised['coverage'] == 1
    assert memorised['authenticity'] == 0, 'what every other metric takes for perfect'


def test_authenticity_only_where_all_training_images_are_kept(monkeypatch, capfd):
    """A copy of an image whose features are not kept would pass as new."""
    features = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    pieces = [{'features': features}]
    copies = statistics.gather(iter(pieces), 60)
    assert samples.compare(copies, copies, 'net', True)['authenticity/net']['value'] == 0
    monkeypatch.setattr(statistics, 'KEPT', 40)
    some = statistics.gather(iter(pieces), 60)
    compared = samples.compare(copies, some, 'net', True)
    assert 'authenticity/net' not in compared and '40 of the 60' in capfd.readouterr().err
    assert compared['coverage/net']['n_reference'] == compared['kid/net']['n_reference'] == 40
    assert compared['frechet/net']['n_reference'] == 60


def test_a_piece_with_any_byte_changed_is_whole_or_none(tmp_path):
    """A changed byte makes zipfile ask for a password, miss a method of compression, or lose an entry."""
    file, whole = tmp_path / 'piece.npz', {'features': np.arange(6.0).reshape(2, 3), 'logits': np.ones((2, 1))}
    files.save_npz(str(file), {**whole, cache.NAMES: np.array(list(whole))})
    content, pieces = file.read_bytes(), []
    for i in range(len(content)):
        file.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
        pieces.append(cache.read(str(file), 2))
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            statistics.read(str(file), 'another')
    for piece in filter(None, pieces):
        assert piece.keys() == whole.keys() and all(np.array_equal(piece[name], x) for name, x in whole.items())
    assert pieces.count(None) > len(pieces) / 3
    file.write_bytes(content)
    assert cache.read(str(file), 2).keys() == whole.keys() and cache.read(str(file), 3) is None
