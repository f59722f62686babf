"""Steps drawn by the size of their loss: the history against a slow one, weights that leave the mean as it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.diffusion import importance


def test_history_equals_a_slow_one():
    """Batches with many, few and no examples of a step, one of them with more than is kept."""
    rng = np.random.default_rng(0)
    history, slow = importance.start(5), {t: [] for t in range(5)}
    record = jax.jit(importance.record)
    for n, steps in ((7, 5), (40, 2), (12, 5), (1, 5)):
        t, errors = rng.integers(0, steps, n), rng.uniform(size=n).astype(np.float32)
        history = record(history, jnp.asarray(t), jnp.asarray(errors))
        for step, error in zip(t, errors, strict=True):
            slow[int(step)].append(error)
        for step, all_errors in slow.items():
            assert int(history['seen'][step]) == len(all_errors)
            kept = all_errors[-importance.KEEP :]
            found = np.sort(history['errors'][step])[-len(kept) or importance.KEEP :]
            np.testing.assert_array_equal(found, np.sort(kept))


def test_even_until_all_are_known_then_by_the_root_of_the_second_moment():
    history = importance.start(3)
    np.testing.assert_allclose(importance.probabilities(history), 1 / 3)
    t = jnp.repeat(jnp.arange(2), importance.KEEP)
    history = importance.record(history, t, jnp.ones(len(t)))
    np.testing.assert_allclose(importance.probabilities(history), 1 / 3)
    history = importance.record(history, jnp.full(10, 2), jnp.array([0.0] * 5 + [6.0] * 5))
    p = np.array([1, 1, np.sqrt(18)])
    np.testing.assert_allclose(importance.probabilities(history), 0.999 * p / p.sum() + 0.001 / 3, rtol=1e-6)


def test_weights_leave_the_mean():
    losses = jnp.array([1.0, 10.0, 0.1, 3.0])
    history = importance.start(4)
    history = importance.record(history, jnp.repeat(jnp.arange(4), 10), jnp.repeat(losses, 10))
    t, weight = importance.draw(history, jax.random.key(0), 100_000)
    share = np.bincount(t, minlength=4) / len(t)
    np.testing.assert_allclose(share, importance.probabilities(history), atol=0.01)
    np.testing.assert_allclose((weight * losses[t]).mean(), losses.mean(), rtol=1e-3)
    assert (weight * losses[t]).std() < 0.05 * losses.std(), 'all weighted losses are nearly one number'
