"""Anomaly detection: the area under the ROC curve, training on some classes, and the metrics of a run."""

from __future__ import annotations

import contextlib
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from jaxgen import assembly, data, run, sharding
from jaxgen import config as configs
from jaxgen.config import DEFAULTS
from jaxgen.contract import Family, State
from jaxgen.errors import RunError, UserError
from jaxgen.evaluation import held_out
from jaxgen.metrics.detection import roc_auc

SECTION = {**DEFAULTS['data'], 'batch': 8}
KEPT = (1, 7)


def cases():
    rng = np.random.default_rng(0)
    anomalous = rng.random(40) < 0.3
    yield rng.normal(size=40), anomalous
    yield rng.integers(0, 4, 40), anomalous  # ties
    yield np.zeros(40), anomalous
    yield anomalous.astype(float), anomalous
    yield -anomalous.astype(float), anomalous
    yield rng.normal(size=40) + 2 * anomalous, anomalous


@pytest.mark.parametrize(('scores', 'anomalous'), list(cases()))
def test_area_is_the_fraction_of_pairs_in_order(scores, anomalous):
    pairs = np.array([[(a > b) + 0.5 * (a == b) for b in scores[~anomalous]] for a in scores[anomalous]])
    area, stderr = roc_auc(scores, anomalous)
    np.testing.assert_allclose(area, pairs.mean(), atol=1e-12)
    np.testing.assert_allclose(area, roc_auc_score(anomalous, scores), atol=1e-12)
    by_anomalous, by_normal = pairs.mean(1), pairs.mean(0)
    expected = np.sqrt(by_anomalous.var(ddof=1) / len(by_anomalous) + by_normal.var(ddof=1) / len(by_normal))
    np.testing.assert_allclose(stderr, expected, atol=1e-12)


def test_standard_error_is_the_standard_deviation_over_sets():
    rng = np.random.default_rng(1)
    anomalous = np.arange(90) < 30
    areas, stderrs = np.array([roc_auc(rng.normal(size=90) + anomalous, anomalous) for _ in range(2000)]).T
    np.testing.assert_allclose(areas.mean(), 0.7602, atol=0.005)  # of N(1, 1) over N(0, 1)
    np.testing.assert_allclose(stderrs.mean(), areas.std(), rtol=0.05)


def test_refuses_what_has_no_curve():
    for anomalous in ([True, True], [False, False]):
        with pytest.raises(UserError, match='two kinds'):
            roc_auc([1.0, 2.0], anomalous)
    with pytest.raises(RunError, match='sample 1'):
        roc_auc([1.0, np.nan], [True, False])
    area, stderr = roc_auc([1.0, 2.0, 3.0], [False, False, True])
    assert area == 1 and np.isnan(stderr)


# --- training on some classes


def take(n: int, **fields) -> list[dict]:
    start = fields.pop('start', 0)
    section = {**SECTION, 'features': ('image', 'label'), **fields}
    with contextlib.closing(data.batches(section, seed=0, start=start)) as batches:
        return list(itertools.islice(batches, n))


def test_training_meets_the_kept_classes_only_and_the_test_split_has_all():
    whole = data.dataset({**SECTION, 'features': ('image', 'label')}, 'train')
    part = data.dataset({**SECTION, 'keep_classes': KEPT}, 'train')  # the label need not be in the batch
    everything = whole.take(np.arange(len(whole)))
    kept = np.isin(everything['label'], KEPT)
    assert len(part) == kept.sum() < len(whole)
    np.testing.assert_array_equal(part.take(np.arange(len(part)))['image'], everything['image'][kept])
    np.testing.assert_array_equal(data.labels(SECTION, 'train'), everything['label'])
    assert {len(data.dataset({**SECTION, 'keep_classes': k}, 'test')) for k in ((), KEPT)} == {359}
    labels = np.concatenate([b['label'] for b in take(60, keep_classes=KEPT)])
    assert set(labels) == set(KEPT)
    first = labels[: len(part)]  # an epoch: each example once
    assert [(first == k).sum() for k in KEPT] == [(everything['label'] == k).sum() for k in KEPT]


def test_what_is_cached_of_a_part_is_not_taken_for_the_whole():
    identities = {data.dataset({**SECTION, 'keep_classes': k}, 'train').identity for k in ((), KEPT, (1,), (7, 1))}
    assert len(identities) == 4


def test_going_on_is_exact():
    later = take(3, keep_classes=KEPT, start=50)
    for a, b in zip(take(53, keep_classes=KEPT)[50:], later, strict=True):
        np.testing.assert_array_equal(a['image'], b['image'])
    assert (take(1)[0]['label'] != take(1, keep_classes=KEPT)[0]['label']).any()


def test_a_class_that_is_not_there_is_refused():
    for wrong in ((10,), (-1,), (0.5,), ('three',)):
        with pytest.raises(UserError, match='0 to 9'):
            data.spec({**SECTION, 'keep_classes': wrong})
    old, new = (configs.make(family='vae', data={'keep_classes': k}) for k in (KEPT, (1,)))
    assert configs.differences_that_matter(old, new), 'a run must not go on with other data'


# --- the metrics of a run


def bright(state, frozen, batch, rng):
    return {'brightness': batch['image'].mean((1, 2, 3)), 'nothing': jnp.zeros(len(batch['image']))}


def toy(keep: tuple, **fields) -> run.Run:
    """A run whose metric is how bright an image is, without weights."""
    config = configs.make(family='vae', data={'keep_classes': keep}, evaluate={'batch': 100, **fields})
    family = Family(None, None, None, bright)
    assembled = assembly.Assembled(config, family, {}, data.spec(config.data), sharding.make_mesh(1))
    return run.Run('', config, assembled, State(jnp.int32(0), {}, {}, {}), 'ema')


def test_each_metric_of_a_run_is_an_anomaly_score_for_the_other_classes(capfd):
    metrics = toy(KEPT).evaluate()
    test = data.dataset({**SECTION, 'features': ('image', 'label')}, 'test').take(np.arange(359))
    anomalous = ~np.isin(test['label'], KEPT)
    expected = roc_auc_score(anomalous, test['image'].mean((1, 2, 3)))
    entry = metrics['auc/brightness']
    np.testing.assert_allclose(entry['value'], expected, atol=1e-3)  # but for float32's ties
    assert entry['n'] == anomalous.sum() and entry['n_reference'] == (~anomalous).sum() and 0 < entry['stderr'] < 0.1
    assert metrics['auc/nothing']['value'] == 0.5
    assert metrics['brightness']['n'] == 359, 'means are over the whole split'
    assert not [name for name in toy(()).evaluate() if name.startswith('auc')]
    assert not [name for name in toy(tuple(range(10))).evaluate() if name.startswith('auc')]
    assert 'one kind' in capfd.readouterr().err


def test_means_and_standard_errors():
    r = toy(())
    source = data.dataset(r.config.data, 'test')
    metrics = held_out.evaluate(r.model, source, 50, 16, 0)
    values = source.take(np.arange(50))['image'].astype(np.float64).mean((1, 2, 3)) / 127.5 - 1
    np.testing.assert_allclose(metrics['brightness']['value'], values.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics['brightness']['stderr'], values.std(ddof=1) / np.sqrt(50), rtol=1e-4)
