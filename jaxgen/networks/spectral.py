"""Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957): kernels divided by their largest singular value.

It bounds the slope of every layer by 1, and so that of a network of ReLUs. The singular value comes from power
iteration (the paper's algorithm 1): one iteration in each training step, from the vector of the step before, since
weights change little in between. These vectors are state beside the weights; a family keeps them in State.extra.

It is a function of the weights, not of the layers: any network is normalised by it, and none knows of it. So is
BigGAN's orthogonal regularisation (Brock et al. 2018, arXiv 1809.11096, eq. 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Array = jax.Array
PyTree = Any


def unit(x: Array) -> Array:
    """x [n] with length 1, however small or large its numbers are; 0 stays 0."""
    largest = jnp.abs(x).max()
    x = x / jnp.where(largest > 0, largest, 1)  # squares of numbers below 1e-19 or above 1e19 are 0 or infinite
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(), 1))


def power_iteration(kernel: Array, u: Array) -> tuple[Array, Array]:
    """The largest singular value of a kernel [..., features], a scalar, and its right singular vector [features], by
    one iteration from u.

    A convolution's kernel is taken as the matrix [height * width * in, features]. The value's gradient is that of
    v^T W u with both vectors held: v u^T, the exact one where they are exact (eq. 12). Products are in float32 on every
    device: the shorter floats that GPUs and TPUs take by default would move the bound on the slope.
    """
    with jax.default_matmul_precision('float32'):
        matrix = kernel.astype(jnp.float32).reshape(-1, kernel.shape[-1])
        fixed = jax.lax.stop_gradient(matrix)
        v = unit(fixed @ jax.lax.stop_gradient(u))
        u = unit(v @ fixed)
        return v @ matrix @ u, u


def start(rng: Array, weights: PyTree) -> PyTree:
    """Random vectors [features], one for each kernel [..., features] among the weights, under its name.

    Scales, biases and embeddings have none: they are left as they are.
    """
    kernels = {path: w for path, w in flatten_dict(weights).items() if path[-1] == 'kernel'}
    keys = jax.random.split(rng, len(kernels))
    drawn = {path: unit(jax.random.normal(k, w.shape[-1:])) for k, (path, w) in zip(keys, kernels.items(), strict=True)}
    return unflatten_dict(drawn)


def normalise(weights: PyTree, vectors: PyTree, least: Callable | None = None) -> tuple[PyTree, PyTree]:
    """The weights with their kernels normalised, and the vectors after one iteration of each.

    Gradients go through the singular value and not through the vectors, see `power_iteration`.

    Args:
      vectors: those of `start` or of the call before; {} leaves the weights as they are.
      least: (path of a kernel) -> lower bound of its divisor, the singular value; None: 0 for all.
    """
    normalised, iterated = flatten_dict(weights), {}
    for path, u in flatten_dict(vectors).items():
        sigma, iterated[path] = power_iteration(normalised[path], u)
        normalised[path] = normalised[path] / (jnp.maximum(sigma, least(path)) if least and least(path) else sigma)
    return unflatten_dict(normalised), unflatten_dict(iterated)


def orthogonality(weights: PyTree) -> Array:
    """Sum over kernels of |W^T W * (1 - I)|^2: 0 where the filters of each are orthogonal, whatever their lengths."""

    def one(kernel: Array) -> Array:
        matrix = kernel.reshape(-1, kernel.shape[-1])
        gram = jnp.matmul(matrix.T, matrix, precision='float32')
        return jnp.square(jnp.where(jnp.eye(len(gram), dtype=bool), 0, gram)).sum()

    return sum(one(w) for path, w in flatten_dict(weights).items() if path[-1] == 'kernel')
