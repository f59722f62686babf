"""Metrics of arrays: against closed forms and torch-fidelity, by every kind of features, and what they refuse."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from support import assemble, first_batch, tiny, torch_fidelity

import jaxgen
import jaxgen.files
from jaxgen import data, metrics
from jaxgen.errors import RunError, UserError
from jaxgen.run import Run


@functools.cache
def classifier() -> Run:
    config = tiny('classifier_digits')
    a = assemble(config)
    state = jax.jit(a.family.init)(jax.random.key(0), first_batch(config), a.frozen)
    return Run('runs/classifier', a.config, a, state.replace(params=None, opt=None), 'ema')


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 1), np.uint8)


def two_sets(n=300, m=250, d=4):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)).astype(np.float32), rng.normal(0.5, 1.2, size=(m, d)).astype(np.float32)


def test_lazily_and_by_name():
    assert jaxgen.metrics.frechet_distance is metrics.arrays.frechet_distance
    assert set(metrics.__all__) <= set(dir(metrics))
    with pytest.raises(AttributeError):
        _ = metrics.fid


def test_frechet_distance_of_points_on_a_line():
    """Mean 0 and 3, deviations 1 and 2: 9 + 1."""
    a = np.array([[-1.0], [1.0]]) / np.sqrt(2)  # of variance 1 with n - 1
    assert metrics.frechet_distance(a, 2 * a + 3) == pytest.approx(10)
    assert metrics.frechet_distance(a, a) == 0


@pytest.mark.slow
def test_as_torch_fidelity_has_them():
    torch_fidelity()
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = two_sets()
    in_torch = [torch.from_numpy(x.astype(np.float64)) for x in (a, b)]
    fid = fid_statistics_to_metric(*map(fid_features_to_statistics, in_torch), verbose=False)
    assert metrics.frechet_distance(a, b) == pytest.approx(fid['frechet_inception_distance'], rel=1e-6)
    kid = kid_features_to_metric(*in_torch, kid_subset_size=100, verbose=False)
    expected = kid['kernel_inception_distance_mean'], kid['kernel_inception_distance_std']
    assert metrics.kernel_distance(a, b, size=100) == pytest.approx(expected, rel=1e-4)
    isc = isc_features_to_metric(in_torch[0], splits=10, shuffle=False)
    assert metrics.inception_score(a)[0] == pytest.approx(isc['inception_score_mean'], rel=1e-6)
    prc = prc_features_to_metric(*in_torch, save_cpu_ram=False, verbose=False)
    fractions = metrics.neighbourhood(a, b)
    assert fractions['precision'] == pytest.approx(prc['precision'], abs=1e-6)
    assert fractions['recall'] == pytest.approx(prc['recall'], abs=1e-6)
    assert fractions['precision'] != fractions['recall']


def test_images_in_features_of_every_kind(tmp_path):
    run, a, b = classifier(), images(40), images(30, seed=1)
    z = run.encode(a).reshape(40, -1), run.encode(b).reshape(30, -1)
    expected = metrics.frechet_distance(*z)
    assert metrics.frechet_distance(a, b, features=run, batch=16) == pytest.approx(expected, rel=1e-4)
    floats = [np.asarray(data.to_float(x)) for x in (a, b)]
    assert metrics.frechet_distance(*floats, features=run) == pytest.approx(expected, rel=1e-4)
    seen = []

    def own(part):
        assert part.dtype == np.uint8
        seen.append(len(part))
        return run.encode(part).reshape(len(part), -1)

    assert metrics.frechet_distance(a, b, features=own, batch=16) == pytest.approx(expected, rel=1e-4)
    assert seen == [16, 16, 8, 16, 14]
    score = metrics.inception_score(a, features=run)
    assert score == pytest.approx(metrics.inception_score(run.classify(a)), rel=1e-4)

    for i, image in enumerate(b):
        jaxgen.files.save_png(str(tmp_path / f'{i:02d}.png'), image)
    folder = data.FolderImages(str(tmp_path), (8, 8, 1))
    assert metrics.frechet_distance(a, folder, features=run) == pytest.approx(expected, rel=1e-4)


def test_small_sets_take_smaller_subsets():
    a, b = two_sets(20, 30)
    assert metrics.kernel_distance(a, b) == metrics.kernel_distance(a, b, size=20)


@pytest.mark.slow
def test_two_calls_compile_once(monkeypatch):
    run, compiled = classifier(), []
    metrics.extract(images(6), run)

    def listen(event: str, duration: float, **_):
        compiled.append(event) if 'backend_compile' in event else None

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        metrics.extract(images(6, seed=3), run)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: metrics.frechet_distance(images(3), images(3)), 'name the network, features='),
        (lambda: metrics.frechet_distance(*two_sets(), features=classifier()), 'must be images'),
        (lambda: metrics.frechet_distance(images(3), images(3), features=3), 'features must be a run that encodes'),
        (lambda: metrics.frechet_distance(images(3), images(3), features='no_such_file.pth'), 'cannot be read'),
        (lambda: metrics.frechet_distance(images(3), images(3), features='run:tests'), 'no run in'),
        (lambda: metrics.frechet_distance(images(0), images(3), features=classifier()), 'n of 1 or more'),
        (lambda: metrics.frechet_distance(images(3).repeat(2, 1), images(3), features=classifier()), 'reads images of'),
        (lambda: metrics.frechet_distance(two_sets()[0], two_sets()[1][:, :2]), 'samples have 4 features'),
        (
            lambda: metrics.frechet_distance(images(3), images(3), features=lambda x: x.mean((1, 2, 3))),
            r'give \[n, d\]',
        ),
        (lambda: metrics.inception_score(images(9), features=lambda x: np.ones((len(x), 2))), 'no logits'),
        (lambda: metrics.neighbourhood(two_sets()[0][:4], two_sets()[1]), 'nearest neighbours need'),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(UserError, match=message) as e:
        call()
    assert '\n' not in str(e.value)


def test_features_that_are_not_finite():
    with pytest.raises(RunError, match='of sample 2 are not finite'):
        metrics.frechet_distance(np.array([[0.0], [1.0], [np.nan]]), np.ones((3, 1)))
