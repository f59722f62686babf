"""Attention: one function for every network, computed by what is fastest on the device that a program is compiled for.

Implementations of softmax(scale q k^T + bias) v, equal to rounding:

    plain    products and a softmax by XLA, with all logits in memory. For short sequences
    chunked  the same by some queries at a time, and once more in the backward pass: logits of all queries are never
             there together. For long sequences where no kernel fits; on CPUs it is faster too, with gradients and
             without, since logits stay in the cache
    cudnn    flash attention of cuDNN on NVIDIA's GPUs, in bfloat16 and float16, for the head sizes that it takes
    splash   flash attention for TPUs in Pallas, for long sequences

A program that is traced on a CPU has the choice in it until it is lowered (`lax.platform_dependent`), so that one that
is compiled for a device that is not there has that device's. Where the mesh says that device already, or the machine
has it, the other platforms' code is left out at once: a loop over blocks would keep room for what their backward
passes read. The environment variable JAXGEN_ATTENTION = plain, chunked, cudnn or splash forces
one, where it fits at all.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgen.errors import UserError
from jaxgen.networks import convolution
from jaxgen.networks.layers import Dense, GroupNorm, variance_scaling

Array = jax.Array

LONG = 680  # tokens, about, from which on logits cost more to write and read than to compute twice
SHORT = 128  # tokens below which cuDNN's kernel has nothing to save
CHUNK = 256  # queries of a chunk
BLOCK = 512  # most queries and keys of a block of the TPU's kernel
LANES = 128  # of which its blocks are multiples
VARIABLE = 'JAXGEN_ATTENTION'
IMPLEMENTATIONS = ('plain', 'chunked', 'cudnn', 'splash')


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | np.ndarray | None = None,
    bias: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    drop: Callable | None = None,
    kernels: bool = True,
) -> Array:
    """softmax(scale q k^T + bias) v, [n, T, heads, d], in v's dtype; logits and softmax are float32.

    Args:
      q: [n, T, heads, c].
      k, v: [n, S, heads, c] and [n, S, heads, d].
      mask: bool, true where a query attends to a key; one at least for every query. Of any shape that broadcasts to
        [n, heads, T, S]. An np.ndarray [T, S], the same for all, is a constant of the program, and kernels skip blocks
        of it that are false.
      bias: added to the scaled logits, broadcasts to [n, heads, T, S].
      causal: a query attends to the keys up to its own position; T is S then.
      scale: c^-1/2 by default (Vaswani et al. 2017, eq. 1).
      drop: of the weights [n, heads, T, S], dropout in training; all weights are in memory then.
      kernels: False where second derivatives are taken, which flash attention has not.
    """
    chex.assert_rank([q, k, v], 4)
    chex.assert_equal_shape([k, v], dims=(0, 1, 2))
    chex.assert_equal_shape([q, k], dims=(0, 2, 3))
    if causal:
        chex.assert_equal(q.shape[1], k.shape[1])
    scale = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
    if drop is not None:
        return plain(q, k, v, mask, bias, causal, scale, drop)
    chosen = choices(q, k, v, mask, bias, causal, kernels and not convolution.in_forward_mode())
    static = isinstance(mask, np.ndarray)
    traced = (q, k, v, None if static else mask, bias)

    def by(name: str) -> Callable:
        def run(q, k, v, given, bias):
            return FUNCTIONS[name](q, k, v, mask if static else given, bias, causal, scale)

        return run

    known = target()
    if known or len({*chosen.values()}) == 1:
        return by(chosen[known or 'default'])(*traced)
    functions = {name: by(name) for name in {*chosen.values()}}
    branches = {platform: functions[name] for platform, name in chosen.items()}
    return lax.platform_dependent(*traced, default=branches.pop('default'), **branches)


def target() -> str | None:
    """The accelerator that the program under way is for: that of the mesh in whose context it is traced, or else of
    this machine. None where it is a CPU, on which programs for other devices are traced too."""
    return {'gpu': 'cuda', 'cuda': 'cuda', 'rocm': 'rocm', 'tpu': 'tpu'}.get(convolution.platform())


def choices(q: Array, k: Array, v: Array, mask: Any, bias: Any, causal: bool, kernels: bool) -> dict[str, str]:
    """The implementation by platform; 'default' stands for CPUs."""
    forced = os.environ.get(VARIABLE, '')
    if forced and forced not in IMPLEMENTATIONS:
        raise UserError(f'{VARIABLE} must be one of {", ".join(IMPLEMENTATIONS)}; it is {forced!r}')
    fit = {
        'cudnn': lambda: kernels and fits_cudnn(q, k, v, mask, bias, causal),
        'splash': lambda: kernels and fits_splash(q, mask, bias),
    }
    if forced in ('plain', 'chunked'):
        return dict.fromkeys(('default', 'cuda', 'rocm', 'tpu'), forced)
    long = 'chunked' if q.shape[1] > 1 and q.shape[1] * k.shape[1] >= LONG**2 else 'plain'
    chosen = dict.fromkeys(('default', 'cuda', 'rocm', 'tpu'), long)
    if (forced == 'cudnn' or (not forced and min(q.shape[1], k.shape[1]) >= SHORT)) and fit['cudnn']():
        chosen['cuda'] = 'cudnn'
    if (forced == 'splash' or (not forced and long == 'chunked' and k.shape[1] >= SHORT)) and fit['splash']():
        chosen['tpu'] = 'splash'
    return chosen


def joined(mask: Any, bias: Array | None, causal: bool, queries: int) -> Array | None:
    """What is added to logits, float32: the bias, and a large negative number where a query does not attend."""
    if causal:
        lower = np.tri(queries, dtype=bool)
        mask = lower if mask is None else mask & lower
    if mask is None:
        return bias
    low = 0.7 * float(np.finfo(np.float32).min)
    return jnp.where(mask, 0.0 if bias is None else bias, low)


def plain(q, k, v, mask, bias, causal: bool, scale: float, drop: Callable | None = None) -> Array:
    """`attend` by products and a softmax of all logits."""
    alone = drop is None and q.shape[2] == 1 and scale == 1  # GANs' attention
    if drop is None and v.shape[-1] == k.shape[-1] and not alone:
        mask = mask if mask is None else jnp.asarray(mask).reshape((1,) * (4 - mask.ndim) + mask.shape)
        return jax.nn.dot_product_attention(q, k, v, bias, mask, is_causal=causal, scale=scale)
    added = joined(mask, bias, causal, q.shape[1])
    if alone:  # without the axis of the heads, as saved runs have it: to the last bit
        added = added if added is None or added.ndim < 3 else added.reshape(-1, *added.shape[-2:])
        logits = jnp.einsum('nqc,nkc->nqk', q[:, :, 0], k[:, :, 0], preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits if added is None else logits + added).astype(v.dtype)
        return jnp.einsum('nqk,nkc->nqc', weights, v[:, :, 0])[:, :, None]
    logits = jnp.einsum('nqhc,nkhc->nhqk', q, k, preferred_element_type=jnp.float32) / (1 / scale)
    weights = jax.nn.softmax(logits if added is None else logits + added)
    return jnp.einsum('nhqk,nkhc->nqhc', (drop or (lambda x: x))(weights).astype(v.dtype), v)


def chunked(q, k, v, mask, bias, causal: bool, scale: float) -> Array:
    """`attend` by `CHUNK` queries at a time."""
    queries = q.shape[1]
    count = -(-queries // CHUNK)
    size = -(-queries // count)
    # Gradients of keys and values are summed over the chunks, which is done in float32.
    k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)

    def cut(x, axis: int):
        """[..., T, ...] to [count, ..., size, ...], zeros at the end; what is broadcast stays as it is."""
        x = jnp.pad(x, [(0, count * size - queries if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    parts: dict[str, Array] = {'q': cut(q, 1), 'start': size * jnp.arange(count)}
    whole = {}
    for name, x in (('mask', mask), ('bias', bias)):
        if x is not None and x.ndim > 1 and x.shape[-2] == queries:
            parts[name] = cut(jnp.asarray(x), x.ndim - 2)
        elif x is not None:
            whole[name] = jnp.asarray(x)

    @jax.checkpoint
    def one(part):
        part = {**whole, **part}
        mask = part.get('mask')
        if causal:
            lower = jnp.arange(k.shape[1]) <= (part['start'] + jnp.arange(size))[:, None]
            mask = lower if mask is None else mask & lower
        return plain(part['q'], k32.astype(k.dtype), v32.astype(v.dtype), mask, part.get('bias'), False, scale)

    out = lax.map(one, parts)  # [count, n, size, heads, d]
    return jnp.moveaxis(out, 0, 1).reshape(len(q), count * size, *out.shape[3:])[:, :queries]


def cudnn(q, k, v, mask, bias, causal: bool, scale: float) -> Array:
    """`attend` by cuDNN."""

    def whole(x, dtype=None):
        """[heads or 1, T, S] in front of which is a batch axis."""
        x = jnp.asarray(x, dtype)
        x = x.reshape((1,) * (4 - x.ndim) + x.shape)
        return jnp.broadcast_to(x, (*x.shape[:2], q.shape[1], k.shape[1]))

    mask = None if mask is None else whole(mask)
    bias = None if bias is None else whole(bias, q.dtype)
    return jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, is_causal=causal, implementation='cudnn')


def fits_cudnn(q, k, v, mask, bias, causal: bool) -> bool:
    """Whether cuDNN is installed, and takes these arrays and their gradients."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        return False
    if bias is not None and bias.shape[:-2] not in ((), (1,), (1, 1), (1, q.shape[2]), (q.shape[0], q.shape[2])):
        return False
    shapes = tuple(None if x is None else (tuple(x.shape), jnp.dtype(x.dtype).name) for x in (q, k, v, mask, bias))
    return cudnn_takes(shapes, causal)


@functools.lru_cache(maxsize=256)
def cudnn_takes(shapes: tuple, causal: bool) -> bool:
    """Whether tracing cuDNN's attention and its gradient raises no error: it knows what it takes."""
    q, k, v, mask, bias = (None if s is None else jax.ShapeDtypeStruct(*s) for s in shapes)

    def gradient(q, k, v, mask, bias):
        out, pull = jax.vjp(lambda q, k, v: cudnn(q, k, v, mask, bias, causal, 1.0), q, k, v)
        return pull(out)

    try:
        jax.eval_shape(gradient, q, k, v, mask, bias)
    except (RuntimeError, ValueError):  # the first: no cuDNN, or not for such arrays
        return False
    return True


def splash(q, k, v, mask, bias, causal: bool, scale: float, interpret: bool = False) -> Array:
    """`attend` by the TPU's kernel, on every device its part of the batch.

    interpret: run the kernel's program without a TPU, slowly.
    """
    assert bias is None

    def kernel(q, k, v):
        return splash_alone(q, k, v, mask, causal, scale, interpret)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return kernel(q, k, v)
    place = jax.sharding.PartitionSpec(mesh.axis_names)
    return jax.shard_map(kernel, mesh=mesh, in_specs=(place,) * 3, out_specs=place, check_vma=False)(q, k, v)


def fits_splash(q: Array, mask: Any, bias: Any) -> bool:
    """Whether the TPU's kernel computes this: masks are constants, and every device has as many examples."""
    static = mask is None or (isinstance(mask, np.ndarray) and mask.ndim == 2)
    mesh = jax.sharding.get_abstract_mesh()
    return bias is None and static and (mesh.empty or bool(mesh.manual_axes) or len(q) % mesh.size == 0)


def blocks_of(length: int) -> tuple[int, int]:
    """(block, padded length) of a sequence: as few blocks of at most BLOCK as there can be, with little padding."""
    count = -(-length // BLOCK)
    block = -(-length // (count * LANES)) * LANES
    return block, count * block


def splash_alone(q, k, v, mask: np.ndarray | None, causal: bool, scale: float, interpret: bool) -> Array:
    """`splash` of arrays on one device. Sequences are padded to whole blocks, and padded keys masked."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (_, queries, heads, _), keys = q.shape, k.shape[1]
    (block_q, padded_q), (block_k, padded_k) = blocks_of(queries), blocks_of(keys)
    segments = None
    if mask is not None:
        mask = np.broadcast_to(mask, (queries, keys)) & (np.tri(queries, dtype=bool) if causal else True)
        padded = np.zeros((padded_q, padded_k), bool)
        padded[:queries, :keys] = mask
        padded[queries:, 0] = True  # no query is without a key
        of_head: Any = masks.NumpyMask(padded)
    elif causal:  # padded keys come after every query
        of_head = masks.CausalMask((padded_q, padded_k))
    else:
        of_head = masks.FullMask((padded_q, padded_k))
        if padded_k > keys:
            ends = jnp.zeros(padded_q, jnp.int32), (jnp.arange(padded_k) >= keys).astype(jnp.int32)
            segments = kernels.SegmentIds(*ends)
    sizes = kernels.BlockSizes(
        block_q=block_q, block_kv=block_k, block_kv_compute=block_k, block_q_dkv=block_q, block_kv_dkv=block_k,
        block_kv_dkv_compute=block_k, block_q_dq=block_q, block_kv_dq=block_k,
    )  # fmt: skip
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([of_head] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret,
        residual_checkpoint_name=SAVED,
    )  # fmt: skip

    def heads_first(x, length: int):
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)))

    scaled = (scale * q.astype(jnp.float32)).astype(q.dtype)
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(
        heads_first(scaled, padded_q), heads_first(k, padded_k), heads_first(v, padded_k)
    )
    return jnp.swapaxes(out[:, :, :queries], 1, 2)


FUNCTIONS = {'plain': plain, 'chunked': chunked, 'cudnn': cudnn, 'splash': splash}
SAVED = 'attention'  # the name of what a kernel's backward pass reads, for `keep`
CUDNN = 'dot_product_attention_fwd'  # begins the names of cuDNN's primitives of the forward pass


def keep(primitive: Any, *args: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint` for blocks whose products are worth keeping: those without a batch axis are kept,
    and the outputs of flash attention; norms and activations, and attention without a kernel, are computed twice."""
    of_products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    named = jax.checkpoint_policies.save_only_these_names(SAVED)
    return of_products(primitive, *args, **params) or named(primitive, *args, **params) or (
        primitive.name.startswith(CUDNN)
    )  # fmt: skip


def empty_cache(shape: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
    """Keys and values [blocks, n, ...] before the first token, zeros; every device has its part of the n examples."""
    mesh = jax.sharding.get_abstract_mesh()
    cache = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    if mesh.empty or mesh.size == 1 or mesh.manual_axes or shape[1] % mesh.size:
        return cache
    return jax.lax.with_sharding_constraint(cache, jax.sharding.PartitionSpec(None, mesh.axis_names))


def attend_cached(q: Array, k: Array, v: Array, length: Array | int) -> Array:
    """Attention of one query to the first keys of a cache, scaled by c^-1/2: [n, 1, heads, c] to the same.

    Args:
      q: [n, 1, heads, c].
      k, v: [n, heads, S, c], the caches: heads before positions, as the products read them, so that nothing is moved.
      length: keys that count; the others are not there yet.
    """
    chex.assert_equal_shape([k, v])
    logits = jnp.einsum('nqhc,nhkc->nhqk', q, k, preferred_element_type=jnp.float32)
    logits = logits * jnp.float32(1 / np.sqrt(q.shape[-1]))
    logits = jnp.where(jnp.arange(k.shape[2]) < length, logits, 0.7 * float(np.finfo(np.float32).min))
    return jnp.einsum('nhqk,nhkc->nqhc', jax.nn.softmax(logits).astype(v.dtype), v)


class SelfAttention(nn.Module):
    """Residual self-attention of every pixel to every pixel: [n, H, W, C] to the same.

    The softmax is computed in float32. The last layer starts at zero: initially a block is the identity.

    Attributes:
      heads: C is a multiple of it. The outputs of `qkv` are q, k and v in turn, each of them head by head.
      normalisation: of the input, GroupNorm with other arguments, say.
      init: of `qkv`'s kernel; None: that of q, k and v as three layers of variance_scaling(1).
    """

    dtype: Any = jnp.float32
    heads: int = 1
    normalisation: Callable = GroupNorm
    init: Callable | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        _, height, width, features = x.shape
        h = self.normalisation(dtype=self.dtype, name='norm')(x)
        # One product for q, k and v. Its fan out is three times theirs, (1 + 3) / 2 = 2 in the mean: with a scale of 2
        # each of them has the initial variance of a layer of its own.
        qkv = Dense(3 * features, init=self.init or variance_scaling(2.0), dtype=self.dtype, name='qkv')(h)
        # Split before they are reshaped: the gradient is one concatenation then, not a sum of padded arrays.
        q, k, v = (einops.rearrange(x, 'n h w (k c) -> n (h w) k c', k=self.heads) for x in jnp.split(qkv, 3, -1))
        h = einops.rearrange(attend(q, k, v), 'n (h w) k c -> n h w (k c)', h=height, w=width)
        return x + Dense(features, init=variance_scaling(0), dtype=self.dtype, name='out')(h)
