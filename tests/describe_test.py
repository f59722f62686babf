"""FLOPs counted on the jaxpr, against sums by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgen.describe import flops


def count(f, *shapes) -> int:
    return flops(jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr)


def test_matrix_products():
    assert count(lambda a, b: a @ b, (5, 7), (7, 11)) == 2 * 5 * 7 * 11
    assert count(lambda a, b: jnp.einsum('bij,bjk->bik', a, b), (3, 5, 7), (3, 7, 11)) == 3 * 2 * 5 * 7 * 11


def conv(x, w, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=groups
    )


def test_convolutions():
    assert count(conv, (2, 8, 8, 3), (3, 3, 3, 16)) == 2 * 2 * 8 * 8 * 16 * 3 * 3 * 3
    assert count(lambda x, w: conv(x, w, 2), (2, 8, 8, 3), (3, 3, 3, 16)) == 2 * 2 * 4 * 4 * 16 * 3 * 3 * 3
    assert count(lambda x, w: conv(x, w, 1, 4), (2, 8, 8, 4), (3, 3, 1, 4)) == 2 * 2 * 8 * 8 * 4 * 9


def test_a_scan_counts_as_often_as_it_runs():
    def body(x, _):
        return jax.jit(lambda y: y @ y)(x), None

    assert count(lambda x: jax.lax.scan(body, x, None, 6)[0], (4, 4)) == 6 * 2 * 4**3
    assert count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y, x), (4, 4)) == 2 * 4**3


def test_gradient_of_a_network_is_twice_its_value():
    def f(x, w1, w2):
        return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(x @ w1))(x) @ w2)

    forward = count(f, (8, 16), (16, 32), (32, 4))
    assert forward == 2 * 8 * 16 * 32 + 2 * 8 * 32 * 4
    both = count(jax.grad(f, (0, 1, 2)), (8, 16), (16, 32), (32, 4))
    recomputed = 2 * 8 * 16 * 32
    assert 2 * forward <= both <= 3 * forward + recomputed
