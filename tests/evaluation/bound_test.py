"""A bound model applied to host arrays, and the record of an evaluation."""

from __future__ import annotations

import json
import types

import jax
import numpy as np

from jaxgen import sharding
from jaxgen.evaluation import record
from jaxgen.evaluation.bound import BoundModel


def test_a_program_is_applied_to_a_padded_batch_and_its_padding_dropped():
    sizes = []

    def program(state, frozen, batch, scale):
        sizes.append(len(batch['x']))
        return {'y': state * batch['x'] + frozen, 'z': (scale * batch['x'],)}

    model = BoundModel(None, 2.0, 3.0, sharding.make_mesh(1, jax.devices()[:1]))
    x = np.arange(5, dtype=np.float32)
    outputs = model.apply(program, {'x': x}, 8, 10.0)
    np.testing.assert_array_equal(outputs['y'], 2 * x + 3)
    np.testing.assert_array_equal(outputs['z'][0], 10 * x)
    assert sizes == [8] and isinstance(outputs['y'], np.ndarray)


def test_batches_are_multiples_of_the_devices_and_no_larger_than_needed():
    model = BoundModel(None, None, None, types.SimpleNamespace(size=8))
    assert [model.batch_size(batch, n) for batch, n in ((16, 100), (20, 100), (100, 3), (4, 9), (64, 0))] == [
        16, 24, 8, 8, 8,
    ]  # fmt: skip


def test_the_record_of_an_evaluation(tmp_path, capfd):
    metrics = {
        'nll': {'value': 61.25, 'stderr': 0.5, 'n': 359},
        'kid/net': {'value': 0.0625, 'std': 0.25, 'n': 500, 'n_reference': 1438},
        'mig/0': {'value': 0.5, 'n': 8, 'latent': 3, 'known': 0.75},
    }
    run = {'step': 7, 'weights': 'ema', 'seed': 0}
    for about in (run, {**run, 'seed': 1}, {'images': {'folder': 'here', 'n': 8}}):
        record.save(str(tmp_path), about, metrics)
    assert capfd.readouterr().out.splitlines()[:3] == [
        'nll: 61.25 +- 0.5 (stderr), n = 359',
        'kid/net: 0.0625 +- 0.25 (std), n = 500 against 1438',
        'mig/0: 0.5, n = 8; latent 3 knows 0.75',
    ]
    names = sorted(path.name for path in (tmp_path / 'results').iterdir())
    assert [name.rpartition('_')[0] for name in names] == ['images', 'step7_ema', 'step7_ema'], 'one for each setting'
    newest = json.loads((tmp_path / 'evaluation.json').read_text())
    assert newest['metrics'] == metrics and newest['images'] == {'folder': 'here', 'n': 8} and newest['versions']
