"""Spectral normalisation and orthogonal regularisation against singular values and loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.networks import spectral


def kernels() -> dict:
    key = jax.random.key(7)
    return {
        'conv': {'kernel': jax.random.normal(key, (3, 3, 4, 6)), 'bias': jnp.ones(6)},
        'dense': {'kernel': jax.random.normal(key, (5, 3)), 'scale': jnp.ones(3)},
        'class': {'embedding': jnp.ones((4, 2))},
    }


def largest(kernel) -> float:
    return float(np.linalg.svd(np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]), compute_uv=False)[0])


@pytest.mark.parametrize('size', [1e-30, 1e-19, 1e-10, 1e10, 1e19, 1e30])
def test_singular_values_of_any_size(size):
    """Squares of such kernels are 0 or infinite in float32, their largest singular value is not."""
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 8))
    u = spectral.unit(jnp.ones(8))
    iterate = jax.jit(lambda u: spectral.power_iteration(jnp.asarray(kernel * size, jnp.float32), u))
    for _ in range(60):
        value, u = iterate(u)
    np.testing.assert_allclose(float(value) / size, np.linalg.svd(kernel.reshape(-1, 8))[1][0], rtol=1e-4)
    assert (spectral.unit(jnp.zeros(3)) == 0).all()


def test_spectral_normalisation_against_svd():
    weights = kernels()
    vectors = spectral.start(jax.random.key(1), weights)
    assert jax.tree.map(jnp.shape, vectors) == {'conv': {'kernel': (6,)}, 'dense': {'kernel': (3,)}}
    iterate = jax.jit(lambda v: spectral.normalise(weights, v))
    for _ in range(200):
        normalised, vectors = iterate(vectors)
    for name in ('conv', 'dense'):
        want = np.asarray(weights[name]['kernel']) / largest(weights[name]['kernel'])
        np.testing.assert_allclose(normalised[name]['kernel'], want, rtol=1e-4)
    assert normalised['conv']['bias'] is not None and (normalised['conv']['bias'] == 1).all()
    assert (normalised['class']['embedding'] == 1).all(), 'embeddings are left as they are'
    same, none = spectral.normalise(weights, {})
    assert none == {}
    jax.tree.map(np.testing.assert_array_equal, same, weights)

    # The slope goes through the singular value: of W / sigma, in the direction of W itself, it is 0.
    def value(w):
        out, _ = spectral.normalise({'dense': {'kernel': w}}, {'dense': vectors['dense']})
        return (out['dense']['kernel'] * jnp.arange(15.0).reshape(5, 3)).sum()

    w = weights['dense']['kernel']
    slope = np.asarray(jax.grad(value)(w))
    assert abs((slope * np.asarray(w)).sum()) < 1e-3 * np.abs(slope).sum()
    step = np.zeros((5, 3), np.float64)
    step[2, 1] = 1e-4

    def slow(matrix):
        return (matrix / largest(matrix) * np.arange(15.0).reshape(5, 3)).sum()

    exact = np.asarray(w, np.float64)
    np.testing.assert_allclose(slope[2, 1], (slow(exact + step) - slow(exact - step)) / 2e-4, rtol=1e-3)


def test_divisors_have_a_lower_bound():
    """Singular values 2 and 0.5, each divided by itself or by 1 if it is below that."""
    weights = {
        name: {'kernel': jnp.diag(jnp.array([size, size / 4]))} for name, size in (('large', 2.0), ('small', 0.5))
    }
    vectors = {name: {'kernel': jnp.array([1.0, 0.0])} for name in weights}
    bounded, _ = spectral.normalise(weights, vectors, lambda path: 1.0)
    np.testing.assert_allclose(bounded['large']['kernel'], np.diag([1, 0.25]), rtol=1e-6)
    np.testing.assert_allclose(bounded['small']['kernel'], np.diag([0.5, 0.125]), rtol=1e-6)
    named, _ = spectral.normalise(weights, vectors, lambda path: 1.0 if 'large' in path else 0.0)
    np.testing.assert_allclose(named['small']['kernel'], np.diag([1, 0.25]), rtol=1e-6)


def test_orthogonality_by_hand():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 4)), rng.normal(size=(5, 2))
    total = 0.0
    for matrix in (a.reshape(-1, 4), b):
        for i in range(matrix.shape[1]):
            total += sum((matrix[:, i] @ matrix[:, j]) ** 2 for j in range(matrix.shape[1]) if j != i)
    tree = {'a': {'kernel': jnp.asarray(a), 'bias': jnp.ones(4)}, 'b': {'kernel': jnp.asarray(b)}}
    np.testing.assert_allclose(spectral.orthogonality(tree), total, rtol=1e-5)
    assert float(spectral.orthogonality({'c': {'kernel': jnp.diag(jnp.array([1.0, 3.0]))}})) == 0
