"""FLOPs counted on the jaxpr, against sums by hand and XLA's own count."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas

from jaxgen.describe import flops


def count(f, *shapes) -> int:
    return flops(jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr)


def test_matrix_products():
    assert count(lambda a, b: a @ b, (5, 7), (7, 11)) == 2 * 5 * 7 * 11
    assert count(lambda a, b: jnp.einsum('bij,bjk->bik', a, b), (3, 5, 7), (3, 7, 11)) == 3 * 2 * 5 * 7 * 11


def by_xla(f, *shapes) -> int:
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).cost_analysis()['flops']


def conv(x, w, stride=1, groups=1, padding='SAME', **dilation):
    dims = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=dims, feature_group_count=groups, **dilation
    )


def test_convolutions():
    assert count(partial(conv, padding='VALID'), (2, 8, 8, 3), (3, 3, 3, 16)) == 2 * 2 * 6 * 6 * 16 * 3 * 3 * 3
    # At both edges of an axis one of three taps falls on padding, with stride 2 at one of them.
    assert count(conv, (2, 8, 8, 3), (3, 3, 3, 16)) == 2 * 2 * (8 * 3 - 2) ** 2 * 16 * 3
    assert count(lambda x, w: conv(x, w, 2), (2, 8, 8, 3), (3, 3, 3, 16)) == 2 * 2 * (4 * 3 - 1) ** 2 * 16 * 3
    assert count(lambda x, w: conv(x, w, 1, 4), (2, 8, 8, 4), (3, 3, 1, 4)) == 2 * 2 * (8 * 3 - 2) ** 2 * 4


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'stride': 2},
        {'padding': 'VALID', 'rhs_dilation': (2, 3)},
        {'lhs_dilation': (2, 2), 'padding': ((1, 2), (2, 1))},
        {'groups': 2},
        {'padding': ((-1, 2), (0, -1))},
    ],
)
def test_convolutions_and_their_gradients_count_as_xla_counts_them(options):
    x, w = (2, 9, 8, 4), (3, 3, 4 // options.get('groups', 1), 6)
    f = partial(conv, **options)
    out = jax.eval_shape(f, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in (x, w))).shape
    assert count(f, x, w) == by_xla(f, x, w)

    def gradients(x, w, g):
        return jax.vjp(f, x, w)[1](g)  # holds the convolution itself, whose result nobody reads

    assert 0 < count(gradients, x, w, out) == by_xla(gradients, x, w, out)


def test_what_nobody_reads_is_not_counted():
    @jax.custom_vjp
    def product(a, b):
        return a @ b

    def backward(saved, g):
        return jax.vjp(jnp.matmul, *saved)[1](g)  # computes the product once more

    product.defvjp(lambda a, b: (product(a, b), (a, b)), backward)
    one = 2 * 8**3

    def gradient(a, b):
        return jax.grad(lambda a, b: product(a, b).sum(), (0, 1))(a, b)

    assert count(gradient, (8, 8), (8, 8)) == 2 * one, 'the value is not asked for'
    assert count(jax.jit(gradient), (8, 8), (8, 8)) == 2 * one
    assert count(lambda a, b: jax.lax.scan(lambda c, _: (gradient(c, b)[0], None), a, None, 5)[0], (8, 8), (8, 8)) == (
        5 * 1 * one
    ), "the other factor's gradient is dead in the loop"
    value = jax.checkpoint(lambda a, b: jnp.tanh(product(a, b)))
    both = jax.value_and_grad(lambda a, b: value(a, b).sum(), (0, 1))
    assert count(both, (8, 8), (8, 8)) == 4 * one, 'value, recomputed value, two gradients'


def test_attention():
    n, t, h, d = 3, 16, 4, 8

    def f(q, k, v):
        return jax.nn.dot_product_attention(q, k, v)

    def gradients(q, k, v, g):
        return jax.vjp(f, q, k, v)[1](g)

    qkv = [(n, t, h, d)] * 3
    assert count(f, *qkv) == 2 * (2 * n * h * t * t * d)
    assert count(gradients, *qkv, qkv[0]) == 5 * (2 * n * h * t * t * d), 'logits once more, two gradients of each'


def test_a_scan_counts_as_often_as_it_runs():
    def body(x, _):
        return jax.jit(lambda y: y @ y)(x), None

    assert count(lambda x: jax.lax.scan(body, x, None, 6)[0], (4, 4)) == 6 * 2 * 4**3
    assert count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y, x), (4, 4)) == 2 * 4**3


def test_a_kernel_counts_for_each_element_of_its_grid():
    def kernel(x, w, o):
        o[...] = x[...] @ w[...]

    def f(x, w):
        x_spec, w_spec, out = (pallas.BlockSpec(s, i) for s, i in (
            ((16, 32), lambda i: (i, 0)), ((32, 8), lambda i: (0, 0)), ((16, 8), lambda i: (i, 0))
        ))  # fmt: skip
        shape = jax.ShapeDtypeStruct((64, 8), jnp.float32)
        return pallas.pallas_call(kernel, shape, grid=(4,), in_specs=[x_spec, w_spec], out_specs=out)(x, w)

    assert count(f, (64, 32), (32, 8)) == 2 * 64 * 32 * 8
    both = jax.make_jaxpr(lambda x, w: f(x, w) + x @ w)(jnp.zeros((64, 32)), jnp.zeros((32, 8))).jaxpr
    assert (flops(both), flops(both, 'pallas_call')) == (4 * 64 * 32 * 8, 2 * 64 * 32 * 8)


def test_what_is_mapped_over_devices_counts_on_each():
    mesh = jax.sharding.AbstractMesh((2, 4), ('data', 'fsdp'))
    batch, whole = jax.sharding.PartitionSpec(('data', 'fsdp')), jax.sharding.PartitionSpec()
    f = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(batch, whole), out_specs=batch)
    assert count(f, (64, 32), (32, 8)) == 2 * 64 * 32 * 8


def test_a_choice_by_platform_counts_as_that_platform_has_it():
    def f(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x @ x @ x, cpu=lambda x: x, default=lambda x: x @ x)

    jaxpr = jax.make_jaxpr(f)(jnp.zeros((4, 4))).jaxpr
    found = [flops(jaxpr, platform=name) for name in ('tpu', 'cuda', 'cpu', '')]
    assert found == [2 * 2 * 4**3, 2 * 4**3, 0, 0]


def test_gradient_of_a_network_is_twice_its_value():
    def f(x, w1, w2):
        return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(x @ w1))(x) @ w2)

    forward = count(f, (8, 16), (16, 32), (32, 4))
    assert forward == 2 * 8 * 16 * 32 + 2 * 8 * 32 * 4
    both = count(jax.grad(f, (0, 1, 2)), (8, 16), (16, 32), (32, 4))
    recomputed = 2 * 8 * 16 * 32
    assert 2 * forward <= both <= 3 * forward + recomputed
