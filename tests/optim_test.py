"""Optimisation from the config: schedules, averages, accumulation, several steps in one update."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.config import DEFAULTS
from jaxgen.contract import advance, gradient_step, new_state, split_batch
from jaxgen.optim import exponent, learning_rate, make_optim, post_hoc


def optim(steps: int = 100, **fields):
    return make_optim(steps, **{**DEFAULTS['optim'], 'name': 'sgd', 'b1': 0.0, 'lr': 0.1, **fields})


def loss(params, frozen, batch, rng):
    """Least squares of one network; the other must never move."""
    error = batch['x'] @ params['line'] - batch['y'] + 0 * params['other'].sum()
    value = jnp.square(error).mean()
    return value, {'loss': value}


def state(o):
    return new_state({'line': jnp.ones(3), 'other': jnp.ones(2)}, o)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {'x': jnp.asarray(rng.normal(size=(12, 3)), jnp.float32), 'y': jnp.asarray(rng.normal(size=12), jnp.float32)}


def test_schedules():
    rate = learning_rate(10, lr=1.0, schedule='linear', warmup=4)
    np.testing.assert_allclose([rate(i) for i in range(4)], [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose([rate(i) for i in (4, 7, 10)], [1.0, 0.5, 0.0], atol=1e-7)
    cosine = learning_rate(8, lr=2.0, schedule='cosine', warmup=0)
    np.testing.assert_allclose([cosine(i) for i in (0, 4, 8)], [2.0, 1.0, 0.0], atol=1e-6)
    half = learning_rate(12, lr=2.0, schedule='half_linear', warmup=2)
    np.testing.assert_allclose([half(i) for i in (0, 1, 2, 7, 8, 12)], [1.0, 2.0, 2.0, 2.0, 1.6, 0.0], atol=1e-6)
    assert learning_rate(8, lr=2.0, schedule='constant', warmup=0)(1000) == 2.0


def test_accumulation_is_the_whole_batch(batch):
    """The gradient of the parts' mean is that of the whole; clipping comes after."""
    for clip in (0.0, 0.05):
        results = []
        for parts in (1, 4):
            o = optim(accumulate=parts, clip=clip)
            results.append(gradient_step(loss, o, 'line')(state(o), {}, batch, jax.random.key(0)))
        for a, b in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_steps_within_one_update(batch):
    """times = 3 is three steps, each on its own part, at the rate of the one update."""
    o = optim(schedule='linear', steps=2)
    many, _ = gradient_step(loss, o, 'line', times=3)(state(o), {}, batch, jax.random.key(0))
    line = jnp.ones(3)
    for part in range(3):
        own = {k: v[part::3] for k, v in batch.items()}
        line = line - 0.1 * jax.grad(lambda p, own=own: loss({'line': p, 'other': jnp.ones(2)}, {}, own, None)[0])(line)
    np.testing.assert_allclose(many.params['line'], line, rtol=1e-5)


def test_only_the_named_network_moves(batch):
    o = optim(networks={'line': {'lr': 0.3}})
    before = state(o)
    after, logs = gradient_step(loss, o, 'line')(before, {}, batch, jax.random.key(0))
    np.testing.assert_array_equal(after.params['other'], before.params['other'])
    assert jax.tree.all(jax.tree.map(np.array_equal, after.opt['other'], before.opt['other']))
    gradient = jax.grad(lambda p: loss({**before.params, 'line': p}, {}, batch, None)[0])(before.params['line'])
    np.testing.assert_allclose(after.params['line'], before.params['line'] - 0.3 * gradient, rtol=1e-5)
    np.testing.assert_allclose(logs['grad_norm/line'], optax.tree.norm(gradient), rtol=1e-5)


def test_moving_average():
    for warm in (False, True):
        o = optim(ema=0.9, ema_warmup=warm)
        s, slow = state(o), 1.0
        for n in range(30):
            weights = float(n)
            s = advance(s.replace(params={**s.params, 'line': jnp.full(3, weights)}), o)
            decay = min(0.9, (1 + n) / (10 + n)) if warm else 0.9
            slow = decay * slow + (1 - decay) * weights
        np.testing.assert_allclose(s.ema['line'], slow, rtol=1e-5)
        assert int(s.step) == 30


def test_parts_of_a_batch_are_all_of_it():
    parts = split_batch({'x': jnp.arange(12)}, 3)['x']
    assert parts.shape == (3, 4) and sorted(parts.reshape(-1).tolist()) == list(range(12))


def test_widths_of_power_function_averages():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01) and exponent(0.1) == pytest.approx(6.94, abs=0.01)  # paper
    gamma = exponent(0.1)
    t = (np.arange(100_000) + 0.5) / 100_000
    share = t**gamma / (t**gamma).sum()
    assert np.sqrt((share * t**2).sum() - (share * t).sum() ** 2) == pytest.approx(0.1, rel=1e-4)


def test_an_average_put_together_afterwards_is_the_one_tracked():
    """Of two widths, saved now and then, any other width comes out as if it had been kept all along."""
    wanted = 0.07
    o = optim(ema_std=(0.05, 0.1, wanted))
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.normal(size=(400, 3)), 0) * 0.1  # weights wander
    s, saved = state(o), []
    step = jax.jit(lambda s, w: advance(s.replace(params={**s.params, 'line': w}), o))
    for n in range(400):
        s = step(s, jnp.asarray(path[n], jnp.float32))
        if (n + 1) % 50 == 0:
            saved += [(n + 1, std, np.asarray(s.ema[f'line@{std}'])) for std in (0.05, 0.1)]
    assert set(s.ema) == {f'{name}{at}' for name in ('line', 'other') for at in ('', '@0.05', '@0.1', '@0.07')}
    share = np.arange(1, 401) ** exponent(wanted)
    np.testing.assert_allclose(s.ema['line@0.07'], share @ path / share.sum(), atol=0.02)
    steps, stds, values = zip(*saved, strict=True)
    shares = post_hoc(np.array(steps), np.array(stds), 400, wanted)
    np.testing.assert_allclose(shares @ np.stack(values), s.ema['line@0.07'], atol=2e-3)
    # Far more exact than the nearest of those that were kept.
    assert np.abs(values[-2] - s.ema['line@0.07']).max() > 0.02
