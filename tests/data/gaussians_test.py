"""Points of mixtures of Gaussians: their distribution, the data set, and its metrics of samples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from jaxgen import data
from jaxgen.config import DEFAULTS
from jaxgen.data import builders, gaussians
from jaxgen.errors import UserError


def section(where, dimensions: int, **fields) -> dict:
    source = {'source': f'gaussians:{dimensions}', 'size': 1, 'channels': gaussians.CHANNELS[dimensions]}
    return DEFAULTS['data'] | {'dir': str(where), 'features': ('image', 'label'), **source, **fields}


@pytest.mark.parametrize('dimensions', [1, 2])
def test_data_set_holds_the_points_by_their_numbers(dimensions, tmp_path, monkeypatch):
    monkeypatch.setattr(builders, 'POINTS', {'train': 60, 'test': 30})
    config = section(tmp_path, dimensions)
    about = data.spec(config)
    assert about.features['image'].shape == (1, 1, config['channels']) and about.classes == (3, 25)[dimensions - 1]
    for split, n in builders.POINTS.items():
        examples = data.dataset(config, split)
        assert len(examples) == n
        batch = examples.take(np.arange(n))
        label, x = gaussians.draw(dimensions, builders.FIRST[split] + np.arange(n))
        np.testing.assert_array_equal(batch['label'], label)
        pixels = batch['image'][:, 0, 0].astype(float)
        np.testing.assert_allclose(pixels[:, :dimensions] / 127.5 - 1, np.clip(x, -1, 1), atol=0.0040)
        assert (pixels[:, 2:] == 128).all()


@pytest.mark.parametrize('dimensions', [1, 2])
def test_points_have_the_weights_means_and_standard_deviations(dimensions):
    weights, means, stds = gaussians.mixture(dimensions)
    assert weights.sum() == pytest.approx(1) and means.shape == (len(weights), dimensions)
    label, x = gaussians.draw(dimensions, np.arange(50_000))
    np.testing.assert_allclose(np.bincount(label, minlength=len(weights)) / 50_000, weights, atol=0.007)
    for k in range(len(weights)):
        standard = (x[label == k] - means[k]) / stds[k]
        assert stats.kstest(standard[:, 0], 'norm').pvalue > 1e-4
        if dimensions == 2:
            assert abs(np.corrcoef(standard.T)[0, 1]) < 0.1


def test_metrics_of_the_data_are_those_of_the_normal_distribution(tmp_path):
    # Of a Gaussian, 0.9973 lies within 3 standard deviations in one dimension, 1 - exp(-9/2) in two.
    for dimensions, good in ((1, stats.norm.cdf(3) - stats.norm.cdf(-3)), (2, 1 - np.exp(-4.5))):
        measure = data.sample_metrics(section(tmp_path, dimensions))
        _, x = gaussians.draw(dimensions, np.arange(20_000))
        metrics = measure(gaussians.to_images(x))
        assert metrics['good_samples']['value'] == pytest.approx(good, abs=0.005), dimensions
        assert metrics['modes'] == {'value': (3, 25)[dimensions - 1], 'n': 20_000, 'of': (3, 25)[dimensions - 1]}
        assert 0 <= metrics['mode_kl']['value'] < 0.002


def test_metrics_of_samples_that_miss_modes(tmp_path):
    # Half of the samples lie on one mean, the others between two: far from both.
    means = gaussians.mixture(2).means
    images = gaussians.to_images(np.repeat([means[0], (means[0] + means[1]) / 2], 5, 0))
    metrics = data.sample_metrics(section(tmp_path, 2))(images)
    assert metrics['good_samples'] == {'value': 0.5, 'stderr': pytest.approx(0.5 / np.sqrt(10)), 'n': 10}
    assert metrics['modes'] == {'value': 1, 'n': 10, 'of': 25}
    assert metrics['mode_kl']['value'] == pytest.approx(np.log(25))
    assert data.sample_metrics(DEFAULTS['data']) is None, 'of digits no distribution is known'


def test_points_as_other_images_are_refused(tmp_path):
    for config, match in (
        (section(tmp_path, 1, size=8), 'set size = 1 and channels = 1'),
        (section(tmp_path, 2, channels=1), 'set size = 1 and channels = 3'),
        (section(tmp_path, 2, source='gaussians:3'), 'must be gaussians:1 or gaussians:2'),
        (section(tmp_path, 2, source='gaussians'), 'must be gaussians:1 or gaussians:2'),
    ):
        with pytest.raises(UserError, match=match):
            data.spec(config)
