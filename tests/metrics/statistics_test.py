"""Statistics of features, gathered piece by piece, and their cache: damage, full disks, several processes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import chex
import numpy as np
import pytest
from support import ROOT

from jaxgen.errors import RunError, UserError
from jaxgen.evaluation import samples
from jaxgen.metrics import statistics


def some_statistics(seed: int = 0):
    rng = np.random.default_rng(seed)
    piece = {name: rng.normal(size=(50, d)).astype(np.float32) for name, d in
             (('features', 5), ('logits', 3), ('spatial', 4))}  # fmt: skip
    return statistics.gather([piece], 50)


def assert_same_statistics(a, b):
    chex.assert_trees_all_equal(a._replace(logits=None), b)


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


@pytest.mark.slow  # starts processes
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


def test_published_moments_give_the_distance_of_the_images_that_they_are_of(tmp_path):
    """Files as EDM and pytorch-fid (mu, sigma) and guided-diffusion (mu_s, sigma_s too) publish them."""
    rng = np.random.default_rng(0)
    real, fake = (
        [{name: rng.normal(i, 1 + i, (n, d)) for name, d in (('features', 5), ('spatial', 3))}]
        for i, n in ((0, 200), (1, 150))
    )
    mu, sigma = (lambda x: x.mean(0)), (lambda x: np.cov(x, rowvar=False))
    moments = {'mu': mu(real[0]['features']), 'sigma': sigma(real[0]['features'])}
    spatial = {'mu_s': mu(real[0]['spatial']), 'sigma_s': sigma(real[0]['spatial'])}
    generated = statistics.gather(iter(fake), 150)
    expected = samples.compare(generated, statistics.gather(iter(real), 200), 'net', False)
    for arrays, names in ((moments, {'frechet/net'}), ({**moments, **spatial}, {'frechet/net', 'sfid/net'})):
        np.savez(tmp_path / 'x.npz', **arrays, arr_0=np.zeros(3))
        read = statistics.published(str(tmp_path / 'x.npz'), {'features': 5, 'spatial': 3})
        compared = samples.compare(generated, read, 'net', True)
        assert compared.keys() == names
        for name in names:
            assert compared[name] == {'value': pytest.approx(expected[name]['value'], rel=1e-6), 'n': 150}


@pytest.mark.parametrize(('arrays', 'line'), [
    ({'mu': np.zeros(4)}, 'has no mu and sigma'),
    ({'mu': np.zeros(4), 'sigma': np.eye(4)}, r'and the network has 5 features'),
    ({'mu': np.zeros(5), 'sigma': np.full((5, 5), np.nan)}, 'is not finite'),
    ({'mu': np.array([None] * 5), 'sigma': np.eye(5)}, 'is no .npz of moments'),
])  # fmt: skip
def test_files_that_are_no_moments_are_one_line(tmp_path, arrays, line):
    np.savez(tmp_path / 'x.npz', **arrays)
    with pytest.raises(UserError, match=line):
        statistics.published(str(tmp_path / 'x.npz'), {'features': 5})
    with pytest.raises(UserError, match='no such file'):
        statistics.published(str(tmp_path / 'y.npz'), {'features': 5})
