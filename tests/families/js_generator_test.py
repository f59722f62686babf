"""The generator of one number: histograms and their divergence against exact ones, and its likelihood."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from scipy.spatial.distance import jensenshannon
from support import optimiser

from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import js_generator
from jaxgen.families.js_generator import jensen_shannon, level_histogram, soft_histogram

slow = pytest.mark.slow  # compiles networks or trains


def family(image=(1, 1, 1), **model):
    optim = optimiser(optax.adam(1e-2))
    return js_generator.build(Context(image, 0, optim), **{'hidden': (16,), 'bins': 32, 'measured': 4096, **model})


def test_divergence_is_scipys():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.full(20, 0.3), 6), rng.dirichlet(np.full(20, 0.3), 6)
    p[0, :5], q[1, 3:] = 0, 0
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    np.testing.assert_allclose(
        jensen_shannon(jnp.float32(p), jnp.float32(q)), jensenshannon(p, q, axis=1) ** 2, atol=1e-6
    )
    apart = jensen_shannon(jnp.array([1.0, 0, 0]), jnp.array([0, 0.5, 0.5]))
    np.testing.assert_allclose(apart, math.log(2), rtol=1e-6)
    assert abs(jensen_shannon(jnp.float32(p), jnp.float32(p))).max() < 1e-7


def test_divergence_has_a_gradient_where_cells_are_empty():
    p, q = jnp.array([0.0, 0.0, 0.4, 0.6]), jnp.array([0.0, 0.3, 0.0, 0.7])
    slope = jax.grad(jensen_shannon)(p, q)
    chex.assert_tree_all_finite(slope)
    expected = 0.5 * np.log(p[2:] / ((p + q)[2:] / 2))  # the derivative by p, where p is more than 0
    np.testing.assert_allclose(slope[2:], expected, rtol=1e-5)


def test_soft_histogram_sums_to_one_and_becomes_a_count():
    x = np.random.default_rng(0).uniform(-1, 1, 500).astype(np.float32)
    x[:4] = [-1, 1, -0.9999, 0.9999]
    count = np.histogram(x, 20, (-1, 1))[0] / 500
    errors = []
    for smoothing in (2.0, 0.5, 0.1, 1e-5):
        p = soft_histogram(jnp.asarray(x), 20, smoothing)
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
        assert (p >= 0).all()
        errors.append(np.abs(p - count).max())
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-3


def test_soft_histogram_is_the_mass_of_logistic_kernels():
    x, bins, smoothing = np.array([-0.95, -0.2, 0.31, 0.6]), 8, 0.7
    edges = np.concatenate([[-np.inf], np.linspace(-1, 1, bins + 1)[1:-1], [np.inf]])
    kernels = stats.logistic(loc=x[:, None], scale=smoothing * 2 / bins)
    np.testing.assert_allclose(
        soft_histogram(jnp.float32(x), bins, smoothing), np.diff(kernels.cdf(edges), axis=1).mean(0), atol=1e-6
    )


def test_level_histogram_is_a_distribution_of_levels():
    x = jnp.array([-1.0, -1.0, 1.0, 0.0, -1.0 + 2 / 255])
    p = level_histogram(x)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
    counts = np.round(np.asarray(p) * (256 + 5)).astype(int) - 1
    assert {int(i): int(counts[i]) for i in np.nonzero(counts)[0]} == {0: 2, 1: 1, 128: 1, 255: 1}


@slow
def test_loss_is_the_mean_over_scales_of_exact_divergences():
    f = family(smoothing=(0.3, 2.0), generator_batch=3, latent=2)
    batch = {'image': jax.random.uniform(jax.random.key(0), (64, 1, 1, 1), minval=-1, maxval=1)}
    state = jax.jit(f.init)(jax.random.key(1), batch, {})
    _, logs = f.update(state, {}, batch, jax.random.key(2))
    drawn = f.decode(state, {}, {}, jax.random.normal(jax.random.key(2), (192, 2)), None)
    edges = np.concatenate([[-np.inf], np.linspace(-1, 1, 33)[1:-1], [np.inf]])

    def at(scale):
        p, q = (
            np.diff(stats.logistic(np.asarray(x).reshape(-1, 1), scale * 2 / 32).cdf(edges), axis=1).mean(0)
            for x in (batch['image'], drawn)
        )
        return jensenshannon(p, q) ** 2

    np.testing.assert_allclose(logs['js'], at(0.3), rtol=1e-4)
    np.testing.assert_allclose(logs['loss'], (at(0.3) + at(2.0)) / 2, rtol=1e-4)


@slow
def test_bits_are_those_of_the_samples():
    """A generator of zero weights makes 0 always: level 128 has all its samples, and the others one each."""
    f = family(measured=1000)
    batch = {'image': jnp.array([-1.0, 1.0, 1 / 255])[:, None, None, None], 'index': jnp.arange(3)}
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    nothing = state.replace(ema=jax.tree.map(jnp.zeros_like, state.ema))
    bits = f.evaluate(nothing, {}, batch, jax.random.key(1))['bits_per_dim']
    np.testing.assert_allclose(bits, [math.log2(1256), math.log2(1256), -math.log2(1001 / 1256)], atol=1e-5)


@slow
def test_learns_two_modes():
    """Half of the data around -0.5, half around 0.5: the samples' histogram comes near, and bits with it."""
    f = family(hidden=(32, 32), generator_batch=2)
    rng = np.random.default_rng(0)
    x = np.clip(rng.choice([-0.5, 0.5], 2048) + 0.07 * rng.normal(size=2048), -1, 1)
    batch = {
        'image': jnp.float32(np.round((x + 1) * 127.5) / 127.5 - 1)[:, None, None, None],
        'index': jnp.arange(2048),
    }
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    updates = jax.jit(lambda s, k: jax.lax.scan(lambda s, k: f.update(s, {}, batch, k), s, k))
    before = f.evaluate(state, {}, batch, jax.random.key(2))['bits_per_dim'].mean()
    state, logs = updates(state, jax.random.split(jax.random.key(1), 200))
    assert logs['js'][-20:].mean() < min(0.02, 0.3 * logs['js'][0]), logs['js']
    drawn = f.sample(state, {}, {'index': jnp.arange(2000)}, jax.random.key(3)).reshape(-1)
    assert abs((drawn > 0).mean() - 0.5) < 0.06 and (np.abs(drawn) < 0.2).mean() < 0.06
    entropy = 1 + math.log2(0.07 * 127.5 * math.sqrt(2 * math.pi * math.e))
    bits = f.evaluate(state, {}, batch, jax.random.key(2))['bits_per_dim'].mean()
    assert entropy - 0.1 < bits < min(entropy + 0.6, before - 0.3)


@pytest.mark.parametrize('model', [
    dict(image=(8, 8, 1)), dict(bins=1), dict(smoothing=()), dict(smoothing=(0.0, 1.0)), dict(latent=0),
    dict(hidden=(0,)), dict(measured=0),
])  # fmt: skip
def test_says_what_is_wrong(model):
    with pytest.raises(UserError, match=r'config\.') as error:
        family(**model)
    assert '\n' not in str(error.value)


# --- the data: points as pictures of one pixel
