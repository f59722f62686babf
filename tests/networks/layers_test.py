"""Norms and resampling against slow oracles."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.networks import masked, refinenet, stylegan2
from jaxgen.networks.couplings import ActNorm, FlowBatchNorm
from jaxgen.networks.layers import (
    BatchNorm,
    Conv,
    Dense,
    Embed,
    GroupNorm,
    LayerNorm,
    Norm,
    check_groups,
    downsample_mean,
    from_patches,
    instance_norm,
    look_up,
    max_pool,
    normalised,
    to_patches,
    upsample_nearest,
    variance_scaling,
)


def slow_group_norm(x, groups, eps):
    """Group by group in float64, by the definition."""
    x = np.asarray(x, np.float64)
    out = np.empty_like(x)
    size = x.shape[-1] // groups
    for n in range(len(x)):
        for g in range(groups):
            part = x[n, ..., g * size : (g + 1) * size]
            out[n, ..., g * size : (g + 1) * size] = (part - part.mean()) / np.sqrt(part.var() + eps)
    return out


@pytest.mark.parametrize(
    ('channels', 'groups', 'most'),
    [(128, 32, 32), (32, 8, 32), (160, 32, 32), (14, 2, 32), (2, 1, 32), (64, 2, 2)],
)
def test_group_norm(channels, groups, most):
    x = 1 + 2 * jax.random.normal(jax.random.key(0), (2, 3, 5, channels))
    scale, bias = 1 + 0.3 * jax.random.normal(jax.random.key(1), (2, channels))
    norm = GroupNorm(most, 1e-2)
    params = jax.eval_shape(norm.init, jax.random.key(2), x)['params']
    assert jax.tree.map(jnp.shape, params) == {'scale': (channels,), 'bias': (channels,)}
    y = jax.jit(norm.apply)({'params': {'scale': scale, 'bias': bias}}, x)
    np.testing.assert_allclose(y, slow_group_norm(x, groups, 1e-2) * scale + bias, atol=2e-5)


def test_as_many_groups_as_published_or_one_line():
    x = 1 + 2 * jax.random.normal(jax.random.key(0), (2, 3, 5, 64))
    norm = GroupNorm(32, 1e-2, least=0, affine=False)
    np.testing.assert_allclose(norm.apply({}, x), slow_group_norm(x, 32, 1e-2), atol=2e-5)
    for channels in (16, 48, 100):
        with pytest.raises(UserError, match=f'32 groups do not divide {channels}'):
            norm.apply({}, jnp.ones((1, 2, 2, channels)))


@pytest.mark.parametrize('groups, size, eps, widths, says', [
    (32, 0, 1e-6, (64, 48), '48'),
    (3, 0, 1e-6, (8,), 'groups = 3'),
    (0, 4, 1e-6, (64,), 'groups must be'),
    (32, -1, 1e-6, (64,), 'group_size'),
    *((32, 4, eps, (64,), 'eps') for eps in (0.0, -1.0, float('nan'), float('inf'))),
])  # fmt: skip
def test_groups_that_cannot_work_are_refused(groups, size, eps, widths, says):
    with pytest.raises(UserError, match=says) as error:
        check_groups('config.model.network', groups, size, eps, widths)
    assert '\n' not in str(error.value) and 'config.model.network' in str(error.value)
    check_groups('config.model.network', 32, 4, 1e-6, (48, 8))  # as many as fit


def test_group_norm_keeps_its_digits_far_from_zero():
    """The plain E[x^2] - E[x]^2 is off by thousands here."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 32))
    far = (x + 1000.0) - 1000.0  # what float32 keeps of x at 1000
    norm = GroupNorm()
    apply = jax.jit(lambda x: norm.apply({'params': {'scale': jnp.ones(32), 'bias': jnp.zeros(32)}}, x))
    np.testing.assert_allclose(apply(x + 1000.0), slow_group_norm(far, 8, 1e-6), atol=1e-4)


def test_group_norm_gradient():
    """The shift inside must not change the derivative: compared with central differences in float64."""
    x = np.random.default_rng(0).normal(1, 2, (1, 2, 2, 8))
    weights = np.random.default_rng(1).normal(size=x.shape)
    norm = GroupNorm()
    params = {'params': {'scale': jnp.ones(8), 'bias': jnp.zeros(8)}}
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(norm.apply(params, x) * weights)))(jnp.asarray(x, jnp.float32))
    for place in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[place] = 1e-5
        rise = np.sum((slow_group_norm(x + step, 2, 1e-6) - slow_group_norm(x - step, 2, 1e-6)) * weights) / 2e-5
        np.testing.assert_allclose(gradient[place], rise, atol=1e-4)


def test_group_norm_in_bfloat16_has_float32_statistics():
    x = (5 + jax.random.normal(jax.random.key(0), (2, 16, 16, 32))).astype(jnp.bfloat16)
    params = {'params': {'scale': jnp.ones(32), 'bias': jnp.zeros(32)}}
    y = jax.jit(GroupNorm(dtype=jnp.bfloat16).apply)(params, x)
    assert y.dtype == jnp.bfloat16
    exact = slow_group_norm(x.astype(jnp.float32), 8, 1e-6)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.02)  # rounding of the result only


def standardised(x, axes, eps):
    """float64, by the definition, of the numbers that x holds."""
    x = np.asarray(x, np.float64)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


def zeros_and_ones(module, x, *args):
    """The module's result with factors 1 and shifts 0."""
    variables = module.init(jax.random.key(0), x, *args)
    return jax.jit(lambda x: module.apply(variables, x, *args, mutable=['batch_stats'])[0])(x)


def by_actnorm(x):
    layer = ActNorm()
    return layer.apply(layer.init(jax.random.key(0), x), x)[0]


def by_weight_norm(x):
    scale, bias = masked.standardise(x)
    return x * scale + bias


def by_refinenet(x):
    norm, level = refinenet.Norm(1), (jnp.zeros(len(x), int), None)
    params = {'level': jnp.concatenate([jnp.ones((1, 6)), jnp.zeros((1, 12))], 1)}  # no mean's factor, no shift
    return jax.jit(norm.apply)({'params': params}, x, level)


NORMALISATIONS = {
    'batch': (lambda x: zeros_and_ones(BatchNorm(train=True, eps=1e-5), x), (0, 1, 2), 1e-5),
    'layer': (lambda x: zeros_and_ones(LayerNorm(eps=1e-6), x), 3, 1e-6),
    'layer of MaskGIT': (lambda x: zeros_and_ones(LayerNorm(eps=1e-12), x), 3, 1e-12),
    'instance': (lambda x: zeros_and_ones(Norm('instance', 6), x), (1, 2), 1e-5),
    'instance without weights': (jax.jit(instance_norm), (1, 2), 1e-5),
    'instance++': (by_refinenet, (1, 2), 1e-5),
    'group of all': (lambda x: zeros_and_ones(GroupNorm(1), x), (1, 2, 3), 1e-6),
    'actnorm': (by_actnorm, (0, 1, 2), 0),
    'by data, weight norm': (by_weight_norm, (0, 1, 2), 1e-10),
    'batch of a flow': (lambda x: zeros_and_ones(FlowBatchNorm(), x, None, True), (0, 1, 2), 1e-4),
}


@pytest.mark.parametrize('mean', [0, 300, 3000])
@pytest.mark.parametrize('name', NORMALISATIONS)
def test_norms_keep_their_digits_at_any_mean(name, mean):
    """With deviation 1. E[x^2] - E[x]^2 is off by 0.1 at 300, and by hundreds at 3,000."""
    normalise, axes, eps = NORMALISATIONS[name]
    x = mean + jax.random.normal(jax.random.key(1), (8, 16, 16, 6))
    got = normalise(x)
    got = got[0] if isinstance(got, tuple) else got
    np.testing.assert_allclose(got, standardised(x, axes, eps), atol=1e-5 + 1e-6 * mean)


@pytest.mark.parametrize('mean, deviation', [(1e4, 1.0), (1e4, 1e-2), (3000.0, 1e-3), (1e6, 1.0), (0.0, 1e-5)])
@pytest.mark.parametrize('name', sorted({*NORMALISATIONS} - {'actnorm', 'by data, weight norm', 'batch of a flow'}))
def test_norms_lose_nothing_of_the_numbers_they_are_given(name, mean, deviation):
    """However far from 0 beside their deviation: a mean that is rounded at 1e4 would be off by 5 % of 0.01."""
    normalise, axes, eps = NORMALISATIONS[name]
    x = mean + deviation * jax.random.normal(jax.random.key(1), (4, 8, 8, 6))
    want = standardised(x, axes, eps)
    np.testing.assert_allclose(normalise(x), want, atol=2e-5 * max(1, np.abs(want).max()))


def test_a_pixel_far_from_all_others_costs_few_digits():
    """The first pixel, whose value group norms take from all others."""
    x = jax.random.normal(jax.random.key(0), (1, 32, 32, 8)).at[0, 0, 0].set(1e4)
    want = standardised(x, (1, 2, 3), 1e-6)
    np.testing.assert_allclose(GroupNorm(1, affine=False).apply({}, x), want, rtol=2e-3, atol=1e-4)
    got, _ = BatchNorm(train=True, affine=False).apply({}, x, mutable=['batch_stats'])
    np.testing.assert_allclose(got, standardised(x, (0, 1, 2), 1e-5), rtol=2e-3, atol=1e-4)


def test_batch_norm_gradient_is_that_of_the_definition():
    """The shift inside is a constant to gradients, and no result depends on it."""
    x = np.random.default_rng(0).normal(1, 2, (2, 2, 2, 3))
    weights = np.random.default_rng(1).normal(size=x.shape)
    for name, axes in (('batch', (0, 1, 2)), ('layer', 3), ('instance without weights', (1, 2))):
        normalise, _, eps = NORMALISATIONS[name]
        with jax.disable_jit():
            got = jax.grad(lambda x, f=normalise: jnp.sum(jnp.asarray(f(x)) * weights))(jnp.asarray(x, jnp.float32))
        for place in list(np.ndindex(x.shape))[::5]:
            step = np.zeros_like(x)
            step[place] = 1e-5
            rise = (standardised(x + step, axes, eps) - standardised(x - step, axes, eps)) * weights
            np.testing.assert_allclose(got[place], rise.sum() / 2e-5, atol=1e-4)


@pytest.mark.parametrize(
    'name', ['batch', 'layer', 'instance', 'instance without weights', 'instance++', 'group of all']
)
def test_norms_of_bfloat16_have_float32_statistics(name):
    normalise, axes, eps = NORMALISATIONS[name]
    x = (300 + 10 * jax.random.normal(jax.random.key(1), (8, 16, 16, 6))).astype(jnp.bfloat16)
    got = normalise(x)
    np.testing.assert_allclose(got.astype(jnp.float32), standardised(x.astype(jnp.float32), axes, eps), atol=0.02)


def test_running_statistics_far_from_zero():
    """What training leaves in 'batch_stats' is what sampling divides by."""
    x = 3000 + jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    norm = BatchNorm(train=True, affine=False)
    actual = norm.apply(norm.init(jax.random.key(0), x), x, mutable=['batch_stats'])[1]['batch_stats']
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(actual['mean'], exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(actual['var'], exact.var((0, 1, 2)), rtol=1e-5)


def test_deviations_of_a_minibatch_far_from_zero():
    x = 3000 + jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    want = np.sqrt(np.asarray(x, np.float64).var(0) + 1e-8).mean()
    np.testing.assert_allclose(stylegan2.minibatch_deviation(x, 4), want, rtol=1e-4)


def test_vectors_in_bfloat16_are_normalised_in_float32():
    """The mean of 4,096 squares of 1 is 1; added up in bfloat16 they stop at 256."""
    x = jnp.full((2, 4096), 3, jnp.bfloat16)
    assert normalised(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(normalised(x).astype(jnp.float32), 1, rtol=1e-2)
    assert (normalised(jnp.zeros((2, 4))) == 0).all()


def test_resampling():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    np.testing.assert_array_equal(upsample_nearest(x), np.repeat(np.repeat(x, 2, 1), 2, 2))
    mean = downsample_mean(x)
    assert mean.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(mean[1, 1, 2], np.asarray(x)[1, 2:4, 4:6].mean((0, 1)), rtol=1e-6)


def test_stride_two_pads_bottom_and_right():
    """A kernel that picks its top left tap gives pixel (2i, 2j): nothing is padded before it."""
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1)
    y = Conv(1, stride=2).apply({'params': {'kernel': kernel, 'bias': jnp.zeros(1)}}, x)
    np.testing.assert_array_equal(y[0, :, :, 0], [[0, 2], [8, 10]])


def slopes(function, x):
    """Of the sum of a function, each number with a weight of its own."""
    y, backward = jax.vjp(function, x)
    return backward(jax.random.normal(jax.random.key(1), y.shape, y.dtype))[0]


def test_maxima_are_those_of_flax():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 3))
    ours, theirs = max_pool, lambda x: nn.max_pool(x, (2, 2), (2, 2))
    assert max_pool(x).shape == (2, 2, 3, 3)
    np.testing.assert_array_equal(ours(x), theirs(x))
    np.testing.assert_array_equal(slopes(ours, x), slopes(theirs, x))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_look_ups_are_those_of_indexing(dtype):
    numbers = jnp.array([[0, 3, 3], [2, 3, 0]])
    params = Embed(4, 5).init(jax.random.key(0), numbers)
    ours, theirs = (
        lambda p, e=e: e(4, 5, dtype=dtype).apply({'params': {'embedding': p}}, numbers) for e in (Embed, nn.Embed)
    )
    table = params['params']['embedding']
    assert ours(table).dtype == dtype and ours(table).shape == (2, 3, 5)
    np.testing.assert_array_equal(ours(table), theirs(table))
    actual, expected = slopes(ours, table), slopes(theirs, table)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=1e-6 if dtype == jnp.float32 else 0.02)
    np.testing.assert_array_equal(actual[1], 0)
    assert np.isnan(look_up(table, jnp.array([-1, 0, 4]))).all(1).tolist() == [True, False, True]


def test_patches_and_back():
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    y = to_patches(x, 2)
    assert y.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(y[1, 1, 2], x[1, 2:, 4:].reshape(-1))
    np.testing.assert_array_equal(from_patches(y, 2), x)


def test_initial_weights():
    kernel = jax.jit(Conv(64).init)(jax.random.key(0), jnp.zeros((1, 4, 4, 32)))['params']['kernel']
    limit = np.sqrt(3 / (9 * (32 + 64) / 2))  # uniform, variance 1 / mean fan
    assert 0.98 * limit < float(jnp.abs(kernel).max()) <= limit
    np.testing.assert_allclose(kernel.std(), limit / np.sqrt(3), rtol=0.02)
    small = jax.jit(Dense(64, init=variance_scaling(0)).init)(jax.random.key(0), jnp.zeros((1, 32)))['params']['kernel']
    assert 0 < float(jnp.abs(small).max()) < 1e-5


@pytest.mark.parametrize('shape', [(5, 3), (2, 7, 3), (2, 3, 4, 3)])
def test_dense_has_the_gradients_of_a_product_twice(shape):
    x, w = jax.random.normal(jax.random.key(0), shape), jax.random.normal(jax.random.key(1), (3, 4))

    def own(x, w):
        return Dense(4, bias=False).apply({'params': {'kernel': w}}, x)

    def first(f):
        return jax.grad(lambda x, w: jnp.tanh(f(x, w)).sum(), (0, 1))

    def second(f):
        return jax.grad(lambda x, w: sum(jnp.tanh(g).sum() for g in first(f)(x, w)), (0, 1))

    for build in (lambda f: f, first, second):
        got, want = build(own)(x, w), build(lambda x, w: x @ w)(x, w)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_gradient_of_dense_weights_is_one_product_without_transposes():
    x, w = jnp.zeros((2, 5, 3)), jnp.zeros((3, 4))
    loss = jax.grad(lambda w: jnp.tanh(Dense(4, bias=False).apply({'params': {'kernel': w}}, x)).sum())
    assert 'transpose[' not in str(jax.make_jaxpr(loss)(w))
