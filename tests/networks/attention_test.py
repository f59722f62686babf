"""Attention: every implementation is the sum of the definition, and each platform gets its own."""

from __future__ import annotations

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from support import python_on

from jaxgen.errors import UserError
from jaxgen.networks import attention
from jaxgen.networks.attention import attend, attend_cached
from jaxgen.networks.convolution import forward_mode

slow = pytest.mark.slow


def oracle(q, k, v, cotangent, allowed, bias, scale):
    """The output and the gradients of q, k and v by their formulas, float64, head by head of each example."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    out, (dq, dk, dv) = np.zeros((*q.shape[:3], v.shape[3])), map(np.zeros_like, (q, k, v))
    for n, h in np.ndindex(q.shape[0], q.shape[2]):
        logits = scale * q[n, :, h] @ k[n, :, h].T + bias[n, h]
        w = np.where(allowed[n, h], np.exp(logits - logits.max(1, keepdims=True)), 0)
        w /= w.sum(1, keepdims=True)
        out[n, :, h] = w @ v[n, :, h]
        dw = cotangent[n, :, h] @ v[n, :, h].T
        ds = scale * w * (dw - (w * dw).sum(1, keepdims=True))
        dq[n, :, h], dk[n, :, h], dv[n, :, h] = ds @ k[n, :, h], ds.T @ q[n, :, h], w.T @ cotangent[n, :, h]
    return out, dq, dk, dv


def case(n, queries, keys, heads, c, d, dtype, kind, seed=0):
    """(arrays, options of attend, allowed and bias as the oracle takes them)."""
    rng = np.random.default_rng(seed)
    q, k, v, ct = (
        jnp.asarray(rng.normal(size=(n, t, heads, f)), dtype)
        for t, f in ((queries, c), (keys, c), (keys, d), (queries, d))
    )
    shape, options = (n, heads, queries, keys), {}
    allowed, bias = np.ones(shape, bool), np.zeros(shape)
    if kind == 'causal':
        allowed, options['causal'] = np.broadcast_to(np.tri(queries, dtype=bool), shape), True
    elif kind == 'levels':  # blocks of tokens that attend to themselves and to those before
        level = np.searchsorted([1, 5, 14, 30, 55], np.arange(queries), 'right')
        options['mask'] = level[:, None] >= level
        allowed = np.broadcast_to(options['mask'], shape)
    elif kind == 'lengths':  # of the keys, of each example its own
        options['mask'] = jnp.arange(keys)[None] < jnp.asarray(rng.integers(1, keys, n))[:, None, None, None]
        allowed = np.broadcast_to(options['mask'], shape)
    elif kind == 'bias':
        options['bias'] = jnp.asarray(rng.normal(size=(1, heads, queries, keys)), jnp.float32)
        bias = np.broadcast_to(np.asarray(options['bias'], np.float64), shape)
    elif kind == 'scale':
        options['scale'] = 1.0
    return (q, k, v, ct), options, allowed, bias


def check(function, arrays, options, allowed, bias):
    q = arrays[0]
    scale = options.get('scale', q.shape[-1] ** -0.5)

    def both(q, k, v, ct):
        value, pull = jax.vjp(lambda q, k, v: function(q, k, v, **options), q, k, v)
        return value, *pull(ct)

    value, *gradients = jax.jit(both)(*arrays)
    assert value.dtype == q.dtype
    tolerance = 2e-5 if q.dtype == jnp.float32 else 3e-2
    expected = oracle(*arrays, allowed, bias, scale)
    for name, actual, right in zip('oqkv', (value, *gradients), expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(actual, np.float64), right, rtol=tolerance, atol=tolerance * np.abs(right).max(), err_msg=name
        )


KINDS = ('full', 'causal', 'levels', 'lengths', 'bias', 'scale')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ['plain', 'chunked'])
def test_implementations_are_the_definition(name, kind, monkeypatch):
    monkeypatch.setenv(attention.VARIABLE, name)
    monkeypatch.setattr(attention, 'CHUNK', 16)
    keys = 37 if kind in ('causal', 'levels') else 23
    check(attend, *case(2, 37, keys, 3, 5, 5, jnp.float32, kind))


@pytest.mark.parametrize('name', ['plain', 'chunked'])
@pytest.mark.parametrize(('heads', 'c', 'd'), [(1, 8, 8), (1, 4, 12), (2, 3, 7)])
def test_one_head_other_values_and_bfloat16(name, heads, c, d, monkeypatch):
    monkeypatch.setenv(attention.VARIABLE, name)
    monkeypatch.setattr(attention, 'CHUNK', 16)
    for kind in ('scale', 'lengths'):
        check(attend, *case(2, 19, 33, heads, c, d, jnp.float32, kind))
    check(attend, *case(1, 40, 33, heads, c, d, jnp.bfloat16, 'full'))


def interpreted(q, k, v, mask=None, causal=False, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attention.splash(q, k, v, mask, None, causal, scale, interpret=True)


@pytest.mark.parametrize(
    ('kind', 'queries', 'keys', 'dtype'),
    [
        ('levels', 61, 61, jnp.float32),
        pytest.param('full', 150, 77, jnp.float32, marks=slow),
        pytest.param('causal', 257, 257, jnp.float32, marks=slow),
        pytest.param('scale', 130, 300, jnp.bfloat16, marks=slow),
        pytest.param('full', 600, 600, jnp.float32, marks=slow),
    ],
)
def test_kernel_of_tpus_is_the_definition(kind, queries, keys, dtype):
    """Interpreted; lengths that are no whole blocks, and several blocks."""
    check(interpreted, *case(1, queries, keys, 2, 24, 40, dtype, kind))


def test_blocks_cover_sequences_with_little_padding():
    for length in (1, 128, 129, 256, 680, 1024, 1025, 4096, 5000):
        block, padded = attention.blocks_of(length)
        assert padded % block == 0 and block % attention.LANES == 0 and block <= attention.BLOCK
        assert 0 <= padded - length < max(attention.LANES * (padded // block), attention.LANES)


def mesh_of(platform: str, size: int = 1) -> AbstractMesh:
    """A mesh of devices that are not there."""
    device = AbstractDevice(device_kind=platform, num_cores=None, platform='gpu' if platform == 'cuda' else platform)
    return AbstractMesh((size, 1), ('data', 'fsdp'), (AxisType.Auto,) * 2, abstract_device=device)


def program(platform, *arrays, mesh=None, **options):
    """The StableHLO of attention and its gradient for a platform that may not be there."""

    def loss(*arrays):
        with jax.sharding.use_abstract_mesh(mesh) if mesh else contextlib.nullcontext():
            return attend(*arrays, **options).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def like(n, tokens, heads, c, dtype):
    return (jax.ShapeDtypeStruct((n, tokens, heads, c), dtype),) * 3


@pytest.fixture
def with_cudnn(monkeypatch):
    """As if cuDNN were installed: its calls can be lowered, and not compiled."""
    module = pytest.importorskip('jax._src.cudnn.fused_attention_stablehlo')

    class Versions:
        cudnn_get_version = staticmethod(lambda: 91000)

    attention.cudnn_takes.cache_clear()
    monkeypatch.setattr(module, 'cuda_versions', Versions)
    yield
    attention.cudnn_takes.cache_clear()


@pytest.mark.parametrize('known', [False, True])
def test_each_platform_gets_its_implementation(known, with_cudnn):
    """Whether the platform is known when the program is traced, or only when it is lowered."""

    def of(platform, *arrays):
        return program(platform, *arrays, mesh=mesh_of(platform) if known else None)

    arrays = like(2, 1024, 4, 64, jnp.bfloat16)
    texts = {platform: of(platform, *arrays) for platform in ('cpu', 'cuda', 'tpu')}
    assert 'custom_call @__cudnn$fmhaSoftmaxBackward' in texts['cuda']
    assert texts['tpu'].count('custom_call @tpu_custom_call') == 3  # forward, and of q and of k and v
    assert 'custom_call' not in texts['cpu']
    # Heads that cuDNN does not take, and few tokens.
    assert 'custom_call' not in of('tpu', *like(2, 256, 4, 64, jnp.bfloat16))
    assert 'cudnn' in of('cuda', *like(2, 256, 4, 64, jnp.bfloat16))
    assert 'cudnn' not in of('cuda', *like(2, 256, 4, 65, jnp.bfloat16))
    if not known:
        return
    # No array has all logits; without a kernel for float32, GPUs have those of some queries at a time.
    assert '1024x1024x' not in texts['cpu'] + texts['tpu'] + texts['cuda']
    assert '256x256x' in of('cpu', *like(2, 256, 4, 64, jnp.bfloat16))
    assert '1024x1024x' not in of('cuda', *like(2, 1024, 4, 64, jnp.float32))


def test_masks_reach_the_kernels(with_cudnn):
    arrays = like(2, 680, 4, 64, jnp.bfloat16)
    level = np.searchsorted([1, 5, 14, 30, 55, 91, 155, 255, 424], np.arange(680), 'right')
    mask = level[:, None] >= level
    assert 'custom_call @tpu_custom_call' in program('tpu', *arrays, mesh=mesh_of('tpu'), mask=mask)
    assert 'cudnn' in program('cuda', *arrays, mesh=mesh_of('cuda'), mask=mask)
    traced = np.ones((2, 1, 1, 680), bool)
    text = program('tpu', *arrays, mesh=mesh_of('tpu'), mask=traced)
    assert 'tpu_custom_call' not in text and '680x680x' not in text


def test_other_derivatives_do_without_kernels(with_cudnn):
    arrays = like(2, 1024, 2, 64, jnp.bfloat16)
    assert 'custom_call' not in program('tpu', *arrays, kernels=False)
    x = jnp.ones((1, 1024, 1, 8))
    with forward_mode():
        jax.eval_shape(lambda x: jax.jvp(lambda x: attend(x, x, x), (x,), (x,)), x)
    twice = jax.grad(lambda x: jax.grad(lambda x: attend(x, x, x, kernels=False).sum())(x).sum())
    jax.jit(twice).trace(x).lower(lowering_platforms=('tpu',))


@pytest.mark.parametrize('name', ['plain', 'chunked', 'splash'])
def test_an_implementation_can_be_forced(name, monkeypatch):
    monkeypatch.setenv(attention.VARIABLE, name)
    text = program('tpu', *like(1, 300, 2, 64, jnp.float32), mesh=mesh_of('tpu'))
    assert ('tpu_custom_call' in text) == (name == 'splash')
    assert ('300x300xf32' in text) == (name == 'plain')
    monkeypatch.setenv(attention.VARIABLE, 'fast')
    with pytest.raises(UserError, match='JAXGEN_ATTENTION must be one of plain, chunked, cudnn, splash'):
        program('tpu', *like(1, 300, 2, 64, jnp.float32))


GATHERS = """
import functools, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxgen import sharding
from jaxgen.networks import attention

attention.CHUNK = 64
mesh = sharding.make_mesh(4)
q, k, v, ct = jax.random.normal(jax.random.key(0), (4, 8, 130, 2, 16))
place = NamedSharding(mesh, P(('data', 'fsdp')))

def gradients(function):
    def both(q, k, v, ct):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            value, pull = jax.vjp(function, q, k, v)
            return value, *pull(ct)
    return both

options = dict(mask=None, bias=None, causal=True, scale=0.25)
right = jax.jit(gradients(functools.partial(attention.plain, **options)))(q, k, v, ct)
for function in (attention.chunked, functools.partial(attention.splash, interpret=True)):
    both = gradients(functools.partial(function, **options))
    compiled = jax.jit(both, in_shardings=place, out_shardings=place).lower(q, k, v, ct).compile()
    assert 'f32[1,' in compiled.as_text()
    assert not re.search('all-gather|all-reduce|all-to-all|collective-permute', compiled.as_text())
    for a, b in zip(compiled(*jax.device_put((q, k, v, ct), place)), right):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
print('none')
"""


@slow
def test_nothing_is_gathered_where_the_batch_is_cut():
    """On eight devices every one attends within its own examples, and the result is that of one device."""
    done = python_on(8, GATHERS)
    assert done.stdout == 'none\n', done.stderr


def test_a_batch_that_devices_cannot_share_has_no_kernel():
    for n, there in ((8, True), (4, False), (9, False)):
        text = program('tpu', *like(n, 1024, 2, 64, jnp.float32), mesh=mesh_of('tpu', 8))
        assert ('tpu_custom_call' in text) == there


def test_a_cache_is_attended_up_to_its_length():
    (q, k, v, _), *_ = case(2, 1, 9, 3, 4, 4, jnp.float32, 'full')
    for length in (1, 5, 9):
        right = oracle(
            q, k[:, :length], v[:, :length], q, np.ones((2, 3, 1, length), bool), np.zeros((2, 3, 1, length)), 0.5
        )
        actual = attend_cached(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), length)
        np.testing.assert_allclose(actual, right[0], rtol=1e-5, atol=1e-6)


def test_what_kernels_save_is_kept_for_the_backward_pass(with_cudnn):
    """Under `keep` the forward kernel runs once; under no policy the backward pass runs it again."""

    def calls(platform, policy):
        def loss(x):
            with jax.sharding.use_abstract_mesh(mesh_of(platform)):
                h = jax.checkpoint(lambda x: attend(x, x, x), policy=policy)(jnp.sin(x))
            return jnp.square(h.astype(jnp.float32)).sum()

        x = like(1, 1024, 2, 64, jnp.bfloat16)[0]
        text = jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=(platform,)).as_text()
        return len(re.findall(r'custom_call @(tpu_custom_call|__cudnn\$fmha\w+)', text))

    assert calls('tpu', attention.keep) == 3 and calls('tpu', None) == 4
    assert calls('cuda', attention.keep) == 2 and calls('cuda', None) == 3
