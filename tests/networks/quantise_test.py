"""Vector quantisers against slow, plain computations."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import python_on

from jaxgen.contract import State
from jaxgen.networks import quantise

K, D = 7, 3

AVERAGES = ('codebook', 'codebook@0.05', 'codebook@0.1')  # the usual one and two post-hoc ones


def latents(n: int = 40, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """float32 [n, 2, D]"""
    return np.random.default_rng(seed).normal(size=(n, 2, D)).astype(np.float32) * scale


def book(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(K, D)).astype(np.float32)


def brute_force(z: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    distance = ((z[..., None, :].astype(np.float64) - codebook.astype(np.float64)) ** 2).sum(-1)
    return distance.argmin(-1)


def test_nearest_is_the_nearest():
    z, codebook = latents(500), book()
    codes = jax.jit(quantise.nearest)(z, codebook)
    assert codes.dtype == jnp.int32 and codes.shape == (500, 2)
    np.testing.assert_array_equal(codes, brute_force(z, codebook))
    half = jnp.asarray(z, jnp.bfloat16)
    np.testing.assert_array_equal(quantise.nearest(half, codebook), brute_force(np.asarray(half, np.float32), codebook))
    np.testing.assert_array_equal(quantise.embed(codes, codebook), codebook[codes])
    np.testing.assert_array_equal(quantise.nearest(codebook, codebook), np.arange(K))


def test_of_equally_near_codes_the_first():
    codebook = np.float32([[2, 0], [1, 1], [0, 0], [0, 0], [1, 1]])
    np.testing.assert_array_equal(quantise.nearest(np.float32([[0, 0.1], [1, 0.9], [1, -1]]), codebook), [2, 1, 0])


def test_nearest_makes_no_array_of_all_differences():
    shapes = jax.make_jaxpr(quantise.nearest)(jnp.zeros((50, D)), jnp.zeros((K, D)))
    assert max(v.aval.size for e in shapes.eqns for v in e.outvars) == 50 * K


def test_a_code_out_of_range_is_not_a_number():
    assert np.isnan(quantise.embed(jnp.array([K, -1]), book())).all()


def test_gradients_go_straight_through():
    z, q = jnp.asarray(latents()), jnp.asarray(latents(seed=2))
    np.testing.assert_array_equal(quantise.straight_through(z * 1000.1, q), q)  # to the last bit
    weights = jnp.asarray(latents(seed=3))
    to_z, to_q = jax.grad(lambda z, q: (weights * quantise.straight_through(z, q) ** 2).sum(), (0, 1))(z, q)
    np.testing.assert_allclose(to_z, 2 * weights * q, rtol=1e-6)
    assert not to_q.any()


def test_each_loss_moves_one_side():
    z, codebook = jnp.asarray(latents()), jnp.asarray(book())
    codes = quantise.nearest(z, codebook)

    def both(z, codebook):
        return quantise.losses(z, quantise.embed(codes, codebook))

    to_latents, to_codes = both(z, codebook)
    expected = np.square(z - codebook[codes]).mean()
    np.testing.assert_allclose([to_latents, to_codes], expected, rtol=1e-6)
    of_z, of_book = jax.grad(lambda *a: both(*a)[0], (0, 1))(z, codebook)
    assert not of_z.any()
    slow = np.zeros((K, D))
    for vector, code in zip(z.reshape(-1, D), np.ravel(codes), strict=True):
        slow[code] += 2 * (codebook[code] - vector) / z.size
    np.testing.assert_allclose(of_book, slow, rtol=1e-4, atol=1e-6)
    of_z, of_book = jax.grad(lambda *a: both(*a)[1], (0, 1))(z, codebook)
    assert not of_book.any()
    np.testing.assert_allclose(of_z, 2 * (z - codebook[codes]) / z.size, rtol=1e-5, atol=1e-8)


def slow_averages(codebook: np.ndarray, batches: list, decay: float, debiased: bool) -> np.ndarray:
    """The codebook after `batches`, one code at a time, in float64. Debiased as Sonnet writes it: averages that begin
    at 0 are divided by 1 - decay^updates, and then smoothed."""
    count = np.zeros(K) if debiased else np.ones(K)
    total = np.zeros((K, D)) if debiased else codebook.astype(np.float64)
    for z, codes in batches:
        for k in range(K):
            mine = z[codes == k].astype(np.float64)
            count[k] = decay * count[k] + (1 - decay) * len(mine)
            total[k] = decay * total[k] + (1 - decay) * mine.sum(0)
    if debiased:
        count, total = count / (1 - decay ** len(batches)), total / (1 - decay ** len(batches))
    n = count.sum()
    return total / ((count + 1e-5) / (n + K * 1e-5) * n)[:, None]


@pytest.mark.parametrize('debiased', [False, True])
def test_averages_are_those_of_a_slow_count(debiased):
    codebook = book()
    codebook[4] += 50  # which no latent comes to
    state = quantise.ema_start(jnp.asarray(codebook), debiased)
    np.testing.assert_allclose(quantise.ema_codebook(state), codebook, rtol=1e-6)
    batches = []
    update = jax.jit(quantise.ema_update)
    for i in range(5):
        z = latents(seed=10 + i)
        codes = np.asarray(quantise.nearest(z, quantise.ema_codebook(state)))
        batches.append((z, codes))
        state = update(state, z, codes, 0.8)
        np.testing.assert_allclose(
            quantise.ema_codebook(state), slow_averages(codebook, batches, 0.8, debiased), rtol=2e-5, atol=1e-6
        )
        if i == 0 or not debiased:  # at 0 it may be met again
            np.testing.assert_allclose(quantise.ema_codebook(state)[4], 0 if debiased else codebook[4], rtol=1e-3)


@pytest.mark.parametrize('updates', [10, 100, 2000])
def test_a_code_without_latents_goes_with_its_count(updates):
    """It stays while its count is far above the smoothing, and is 0 in the end, as in the published code."""
    book = jnp.array([[1.0, 2.0], [3.0, -4.0]])
    state = quantise.ema_start(book)
    z, codes = jnp.tile(book[:1], (8, 1)), jnp.zeros(8, int)
    state = jax.lax.fori_loop(0, updates, lambda _, s: quantise.ema_update(s, z, codes, 0.9), state)
    left = 0.9**updates  # of its count and of its sum
    total = 8 - 7 * left + left
    expected = np.array([3.0, -4.0]) * left / ((left + 1e-5) / (total + 2e-5) * total)
    np.testing.assert_allclose(quantise.ema_codebook(state)[1], expected, rtol=1e-3, atol=1e-6)
    if updates == 10:
        np.testing.assert_allclose(expected, [3, -4], rtol=1e-4)
    if updates == 2000:
        assert np.abs(expected).max() < 1e-6


def test_parts_of_a_batch_add_up():
    z = latents()
    codes = np.asarray(quantise.nearest(z, book()))
    whole = quantise.statistics(z, codes, K)
    parts = [quantise.statistics(z[i::4], codes[i::4], K) for i in range(4)]
    for name in whole:
        np.testing.assert_allclose(sum(p[name] for p in parts), whole[name], rtol=1e-5, atol=1e-6)
    assert whole['count'].sum() == 80


@pytest.mark.parametrize('debiased', [False, True])
def test_restart_leaves_no_dead_code(debiased):
    codebook = book()
    codebook[[1, 5]] += 50
    z = latents()
    state = quantise.ema_start(jnp.asarray(codebook), debiased)
    for _ in range(3):
        state = quantise.ema_update(state, z, quantise.nearest(z, codebook), 0.5)
    before = quantise.ema_codebook(state)
    after = jax.jit(quantise.ema_restart, static_argnums=3)(state, z, jax.random.key(0), 0.9)
    assert (after['count'] / quantise.ema_scale(after) >= 0.9).all()
    new = quantise.ema_codebook(after)
    dead = np.array([1, 5])
    for k in range(K):
        if k in dead:  # it is one of the batch's latents, and another one for each
            assert np.abs(z.reshape(-1, D) - new[k]).max(-1).min() < 1e-5
        else:
            np.testing.assert_allclose(new[k], before[k], rtol=1e-4)
    assert np.abs(new[1] - new[5]).max() > 1e-3
    met = np.bincount(np.ravel(quantise.nearest(z, new)), minlength=K)
    assert (met > 0).all(), 'each new code has at least the latent that it is'
    again = quantise.ema_restart(after, z, jax.random.key(1), 0.9)
    chex.assert_trees_all_equal(again, after)
    other = quantise.ema_codebook(quantise.ema_restart(state, z, jax.random.key(1), 0.9))
    assert np.abs(other[dead] - new[dead]).max() > 1e-3, 'drawn by the key'


def test_restart_with_fewer_latents_than_codes():
    z = latents(2)  # 4 vectors
    new, count, dead = quantise.restart(jnp.zeros((K, D)), jnp.zeros(K), z, jax.random.key(0), 2.0)
    assert dead.all() and (count == 2).all()
    assert len(np.unique(new, axis=0)) == 4


def test_restarted_codes_are_new_in_every_average():
    """And nothing else of the state changes: other codes, other codebooks, other networks."""
    books = {name: {'fine': jnp.full((3, 2), i), 'coarse': jnp.full((4, 2), i)} for i, name in enumerate(AVERAGES, 1)}
    params = {'codebook': books['codebook'], 'codebooks': {'fine': jnp.zeros((3, 2))}}
    state = State(jnp.zeros((), jnp.int32), params, {}, {**books, 'codebooks': params['codebooks']})
    new = jnp.arange(6.0).reshape(3, 2) + 10
    after = quantise.with_restarted(state, 'fine', new, jnp.array([True, False, True]))
    np.testing.assert_array_equal(after.params['codebook']['fine'], new)
    for i, name in enumerate(AVERAGES, 1):
        np.testing.assert_array_equal(after.ema[name]['fine'], [[10, 11], [i, i], [14, 15]])
        np.testing.assert_array_equal(after.ema[name]['coarse'], books[name]['coarse'])
    for kept in (after.params, after.ema):
        np.testing.assert_array_equal(kept['codebooks']['fine'], 0)
    np.testing.assert_array_equal(after.params['codebook']['coarse'], books['codebook']['coarse'])


def test_restart_does_not_depend_on_devices():
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxgen.networks import quantise
z = jax.random.normal(jax.random.key(0), (16, 2, 2, 3))
count = jnp.array([0.0, 5, 0, 1, 0])
book = jax.random.normal(jax.random.key(1), (5, 3))
def both(z):
    state = {'count': count, 'sum': book * count[:, None]}
    state = quantise.ema_restart(state, z, jax.random.key(2), 0.5)
    codes = quantise.nearest(z, quantise.ema_codebook(state))
    return codes, quantise.ema_update(state, z, codes, 0.9)
place = NamedSharding(Mesh(jax.devices(), 'd'), P('d'))
one, eight = jax.jit(both)(z), jax.jit(both)(jax.device_put(z, place))
assert len(eight[0].devices()) == 8
jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-6), one, eight)
"""
    done = python_on(8, code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_perplexity_and_usage():
    even = jnp.array([3, 3, 3, 3] + [0] * (K - 4))
    assert quantise.perplexity(even) == pytest.approx(4, rel=1e-6) and quantise.usage(even) == pytest.approx(4 / K)
    assert quantise.perplexity(jnp.array([0, 9, 0])) == pytest.approx(1)
    uneven = jnp.array([3, 1])  # entropy of (3/4, 1/4)
    assert quantise.perplexity(uneven) == pytest.approx(4 / 27**0.25, rel=1e-6)
    assert quantise.perplexity(jnp.zeros(K)) == 1 and np.isfinite(quantise.perplexity(jnp.array([1e6, 0])))


def test_probabilities_are_smoothed_frequencies():
    p = np.asarray(quantise.probabilities(jnp.array([6.0, 2.0, 0.0])))
    np.testing.assert_allclose(p, [0.75, 0.25, 0], atol=1e-5)
    assert (p > 0).all() and p.sum() == pytest.approx(1, rel=1e-6)


def test_shapes_that_would_broadcast_are_refused():
    z, codebook = jnp.zeros((4, 2, D)), jnp.zeros((K, D))
    for call in (
        lambda: quantise.nearest(z, codebook[:, :1]),
        lambda: quantise.losses(z, z[:, :1]),
        lambda: quantise.straight_through(z, z[:1]),
        lambda: quantise.statistics(z, jnp.zeros((4, 3), int), K),
    ):
        with pytest.raises(AssertionError):
            call()
