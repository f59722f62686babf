"""Held-out metrics: batches of one shape, numbers of examples, means, and metrics that are not finite."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import sharding
from jaxgen.contract import Family, State
from jaxgen.errors import RunError
from jaxgen.evaluation import held_out
from jaxgen.evaluation.bound import BoundModel


class Squares:
    """Ten examples, of which example i holds i^2."""

    def __len__(self):
        return 10

    def take(self, index):
        return {'x': np.square(index).astype(np.float32)}


def model(evaluate=None) -> BoundModel:
    state = State(jnp.int32(0), {}, {}, {})
    return BoundModel(Family(None, None, None, evaluate), state, {}, sharding.make_mesh(1, jax.devices()[:1]))


@pytest.mark.parametrize('n', [10, 7, 1])
def test_examples_go_in_batches_of_one_shape_with_their_numbers(n):
    def program(state, frozen, batch, seed):
        return {'y': batch['x'] + 1000 * batch['index'] + seed, 'pair': jnp.stack([batch['x']] * 2, -1)}

    chex.clear_trace_counter()
    once = jax.jit(chex.assert_max_traces(program, 1))
    outputs = held_out.map_examples(once, model(), Squares(), n, 4, 7)
    i = np.arange(n)
    np.testing.assert_array_equal(outputs['y'], i**2 + 1000 * i + 7)
    np.testing.assert_array_equal(outputs['pair'], np.stack([i**2] * 2, -1))
    assert outputs['y'].dtype == np.float64


def test_means_are_of_the_first_examples_and_anomalies_have_an_area():
    def evaluate(state, frozen, batch, rng):
        return {'x': batch['x'], 'reversed': -batch['x']}

    anomalous = np.arange(8) >= 6
    metrics = held_out.evaluate(model(evaluate), Squares(), 8, 3, 0, anomalous)
    x = np.arange(8.0) ** 2
    assert metrics['x'] == {'value': x.mean(), 'stderr': pytest.approx(x.std(ddof=1) / np.sqrt(8)), 'n': 8}
    assert metrics['auc/x']['value'] == 1 and metrics['auc/reversed']['value'] == 0
    assert (metrics['auc/x']['n'], metrics['auc/x']['n_reference']) == (2, 6)


def test_a_metric_that_is_not_finite_names_its_example():
    def evaluate(state, frozen, batch, rng):
        return {'good': batch['x'], 'bad': jnp.where(batch['index'] == 5, jnp.nan, batch['x'])}

    with pytest.raises(RunError, match='bad is not finite for example 5 of the test split'):
        held_out.evaluate(model(evaluate), Squares(), 10, 4, 0)
