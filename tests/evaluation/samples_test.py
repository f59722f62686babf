"""Metrics of samples: broken samplers, each caught by the metric that is there for it."""

from __future__ import annotations

import numpy as np
import pytest
from support import path

import jaxgen
from jaxgen import config as configs
from jaxgen import data, run
from jaxgen.evaluation import samples
from jaxgen.metrics import statistics
from jaxgen.train import train


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


@pytest.mark.slow  # trains the classifier
def test_broken_samplers_are_caught(evaluator):
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


def test_samples_are_compared_with_what_was_requested():
    """Masks are of objects unless they say what is missing of an image; the data's own metrics are of all samples."""
    images = np.full((3, 12, 12, 3), 30, np.uint8)
    mask = np.zeros((3, 12, 12, 1), np.uint8)
    mask[:, 3:9, 3:9] = 255
    images[:, 3:9, 3:9] = 220
    images[2, 3:9, 3:6] = 30  # half of what was requested
    measures = samples.Measures(own=lambda images: {'mean': {'value': float(images.mean()), 'n': len(images)}})
    pieces = [measures.outputs(images[i:j], {'mask': mask[i:j], 'edges': mask[i:j]}, 3) for i, j in ((0, 2), (2, 3))]
    found = measures.compare(iter(pieces), 3)
    assert found['mask_iou']['value'] == pytest.approx((1 + 1 + 0.5) / 3) and found['mask_iou']['n'] == 3
    assert found['mean'] == {'value': images.mean(), 'n': 3}
    assert {'edges_f1', 'edges_precision', 'edges_recall'} < set(found)
    assert samples.requested({'mask': mask, 'image': images}, images.shape) == []
    assert samples.requested({'mask': mask[:, :6], 'caption': mask}, images.shape) == []
