"""The convolution with gradients of its own, against lax's."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxgen.networks.convolution import convolve, forward_mode
from jaxgen.networks.layers import Conv

CASES = [
    # size, kernel, strides, padding, x dilation, w dilation
    ((8, 8), (3, 3), (1, 1), 'SAME', (1, 1), (1, 1)),
    ((7, 10), (3, 2), (1, 1), 'VALID', (1, 1), (1, 1)),
    ((8, 8), (3, 3), (2, 2), 'SAME', (1, 1), (1, 1)),
    ((9, 7), (4, 3), (3, 2), ((1, 2), (0, 1)), (1, 1), (1, 1)),
    ((8, 8), (1, 1), (2, 2), 'VALID', (1, 1), (1, 1)),
    ((9, 9), (3, 3), (1, 1), 'SAME', (1, 1), (2, 2)),
    ((5, 6), (3, 3), (1, 2), ((2, 1), (2, 2)), (2, 3), (1, 2)),
    ((6, 6), (3, 3), (1, 1), ((-1, 0), (2, -1)), (1, 1), (1, 1)),
    ((9,), (3,), (2,), 'SAME', (1,), (1,)),
    ((4, 5, 6), (3, 3, 3), (1, 2, 2), 'SAME', (1, 1, 1), (1, 1, 1)),
]


@pytest.mark.parametrize('size, kernel, strides, padding, x_dilation, w_dilation', CASES)
def test_equals_lax_with_first_and_second_derivatives(size, kernel, strides, padding, x_dilation, w_dilation):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    w = jax.random.normal(jax.random.key(1), (*kernel, 3, 4))
    letters = 'DHW'[-len(size) :]

    def reference(x, w):
        numbers = (f'N{letters}C', f'{letters}IO', f'N{letters}C')
        return lax.conv_general_dilated(x, w, strides, padding, x_dilation, w_dilation, dimension_numbers=numbers)

    def own(x, w):
        return convolve(x, w, strides, padding, x_dilation, w_dilation)

    def first(f):
        return jax.grad(lambda x, w: jnp.tanh(f(x, w)).sum(), (0, 1))

    def second(f):
        # As a gradient penalty: gradients of a function of gradients.
        return jax.grad(lambda x, w: sum(jnp.tanh(g).sum() for g in first(f)(x, w)), (0, 1))

    for build in (lambda f: f, first, second):
        got, want = jax.jit(build(own))(x, w), jax.jit(build(reference))(x, w)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_gradients_in_a_loop_take_the_fast_layout():
    w = jax.random.normal(jax.random.key(1), (3, 3, 8, 8))

    def penalty(x):
        return jax.grad(lambda w: (jax.grad(lambda x: jnp.tanh(convolve(x, w, (1, 1), 'SAME')).sum())(x) ** 2).sum())(w)

    text = jax.jit(lambda xs: lax.map(penalty, xs)).lower(jnp.zeros((3, 2, 8, 8, 8))).compile().as_text()
    layouts = set(re.findall(r'convolution\(.*dim_labels=(\S+?),', text))
    assert layouts == {'b01f_01io->b01f'}


def test_jvp_needs_forward_mode_and_is_then_right():
    network = Conv(3)
    x, dx = jax.random.normal(jax.random.key(0), (2, 1, 6, 6, 2))
    weights = network.init(jax.random.key(1), x)

    def run(x):
        return network.apply(weights, x)

    with pytest.raises(TypeError):
        jax.jvp(run, (x,), (dx,))
    with forward_mode():
        y, dy = jax.jvp(run, (x,), (dx,))
    np.testing.assert_allclose(y, run(x), atol=1e-6)
    np.testing.assert_allclose(dy, run(x + dx) - run(x), atol=1e-5)  # linear up to the bias


def test_groups_are_left_to_lax():
    x, w = jnp.ones((1, 4, 4, 4)), jnp.ones((3, 3, 1, 4))
    numbers = lax.conv_dimension_numbers(x.shape, w.shape, ('NHWC', 'HWIO', 'NHWC'))
    y = convolve(x, w, (1, 1), 'SAME', dimension_numbers=numbers, feature_group_count=4)
    assert y.shape == (1, 4, 4, 4) and float(y[0, 1, 1, 0]) == 9


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_other_devices_keep_laxs_gradients(platform):
    x, w = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 4))

    def reference(x, w):
        return lax.conv_general_dilated(x, w, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

    def operations(f):
        gradient = jax.jit(jax.grad(lambda x, w: jnp.tanh(f(x, w)).sum(), (0, 1)))
        text = gradient.trace(x, w).lower(lowering_platforms=(platform,)).as_text()
        lines = [re.sub(r'%\w+', '', line).strip() for line in text.splitlines()]
        return sorted(line for line in lines if 'convolution' in line or 'transpose' in line)

    assert operations(lambda x, w: convolve(x, w, (2, 2), 'SAME')) == operations(reference)


@pytest.mark.parametrize('dilation', [(1, 1), (2, 2)], ids=['plain', 'transposed'])
@pytest.mark.parametrize('n', [4, 5, 9], ids=['one part', 'a rest', 'two parts and a rest'])
def test_kernels_gradients_are_sums_over_parts_of_a_batch(n, dilation):
    """By lax's own, in parts of four images of 16x16 pixels; in bfloat16 summed in float32."""
    x = jax.random.normal(jax.random.key(0), (n, 16, 16, 3))
    w = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))

    def gradient(function, dtype):
        return jax.jit(jax.grad(lambda w: jnp.tanh(function(x.astype(dtype), w.astype(dtype))).sum(dtype=jnp.float32)))

    def own(x, w):
        return convolve(x, w, (1, 1), ((1, 1), (1, 1)), dilation)

    def reference(x, w):
        numbers = ('NHWC', 'HWIO', 'NHWC')
        return lax.conv_general_dilated(x, w, (1, 1), ((1, 1), (1, 1)), dilation, dimension_numbers=numbers)

    want = gradient(reference, jnp.float32)(w)
    ours = gradient(own, jnp.float32)
    np.testing.assert_allclose(ours(w), want, rtol=1e-4, atol=1e-4)
    assert ('while' in ours.lower(w).as_text()) == (n > 4)
    low = gradient(own, jnp.bfloat16)(w)
    assert jnp.abs(low - want).max() < 0.03 * jnp.abs(want).max()
