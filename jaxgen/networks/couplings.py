"""What normalising flows are made of: invertible maps of images with the logarithm of their determinant.

A layer maps [n, H, W, C] to the same shape and gives log |det dy/dx| per example, float32 [n], in nats; with `inverse`
it maps back, and gives minus that. The flow itself is computed in float32 whatever the dtype, which is that of the
networks inside the couplings: an inverse cannot be better than the numbers that it is made from.

Pixels: a level k in 0 .. 255 becomes y = (k + u) / 256 with u uniform in [0, 1). By Jensen the density of y bounds the
probability of the level (Theis et al. 2015, arXiv 1511.01844, section 3.1): log P(k) >= E log p(y) - log 256.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import Conv

Array = jax.Array

LEVELS = 256


def to_unit(x: Array, noise: Array | float = 0.5) -> Array:
    """Images in [-1, 1] to (level + noise) / 256, in [0, 1). noise: u in [0, 1); 0.5 is the middle of the level."""
    return ((x + 1) * ((LEVELS - 1) / 2) + noise) / LEVELS


def to_image(y: Array) -> Array:
    """The inverse of `to_unit` without noise, cut off at -1 and 1. Rounded to levels it is floor(256 y)."""
    return jnp.clip((LEVELS * y - 0.5) * (2 / (LEVELS - 1)) - 1, -1, 1)


def bits_per_dim(log_p: Array, size: int) -> Array:
    """log p(y) in nats of `size` numbers in the units of `to_unit`, to bits per number at 256 levels."""
    return (math.log(LEVELS) - log_p / size) / math.log(2)


def squeeze(x: Array) -> Array:
    """[n, H, W, C] to [n, H/2, W/2, 4C]: channel 4c + 2i + j is channel c at row i and column j of its 2x2 square."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // 2, 2, w // 2, 2, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(n, h // 2, w // 2, 4 * c)


def unsqueeze(x: Array) -> Array:
    """The inverse of `squeeze`."""
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, c // 4, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(n, 2 * h, 2 * w, c // 4)


# Where the four pixels of a 2x2 square (in rows) go: first the one diagonal, then the other.
DIAGONALS = (0, 3, 1, 2)


def squeeze_diagonals(x: Array) -> Array:
    """[n, H, W, C] to [n, H/2, W/2, 4C]: the C channels of each square's top left, then bottom right, top right,
    bottom left pixel. So either half of the channels is one colour of a checkerboard."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h // 2, w // 2, 4, c)[:, :, :, jnp.array(DIAGONALS)].reshape(n, h // 2, w // 2, 4 * c)


def unsqueeze_diagonals(x: Array) -> Array:
    """The inverse of `squeeze_diagonals`."""
    n, h, w, c = x.shape
    back = jnp.array([DIAGONALS.index(i) for i in range(4)])
    x = x.reshape(n, h, w, 4, c // 4)[:, :, :, back].reshape(n, h, w, 2, 2, c // 4)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, c // 4)


def checkerboard(height: int, width: int, first: int) -> Array:
    """Float32 [1, H, W, 1] of 0 and 1, no two neighbours equal; `first` is the number at the top left."""
    return ((jnp.arange(height)[:, None] + jnp.arange(width) + first) % 2).astype(jnp.float32)[None, :, :, None]


def total(x: Array) -> Array:
    """[n, ...] to [n], the sum over all axes but the first."""
    return x.reshape(len(x), -1).sum(-1)


def affine(x: Array, shift: Array, log_scale: Array, inverse: bool = False) -> tuple[Array, Array]:
    """(x + shift) e^log_scale and the log-determinant [n], or their inverse. All [n, H, W, C].

    Real NVP's paper writes x e^s + t, its authors' code has this, as Glow: the same maps by another t.
    """
    if inverse:
        return x * jnp.exp(-log_scale) - shift, -total(log_scale)
    return (x + shift) * jnp.exp(log_scale), total(log_scale)


class ActNorm(nn.Module):
    """(x + b) e^(factor logs), per channel of [n, ..., C] (Glow, section 3.1).

    b and logs are set from the data that `init` sees, the whole batch over all devices: its mean becomes 0 and its
    standard deviation 1, per channel.

    Attributes:
      factor: 3 makes the scales learn three times as fast, as in Glow's code.
    """

    factor: float = 3.0

    @nn.compact
    def __call__(self, x: Array, inverse: bool = False) -> tuple[Array, Array]:
        axes = tuple(range(x.ndim - 1))
        x = x.astype(jnp.float32)
        bias = self.param('bias', lambda _: -x.mean(axes))
        logs = self.param('logs', lambda _: -jnp.log(x.std(axes) + 1e-6) / self.factor) * self.factor
        log_det = jnp.full(len(x), math.prod(x.shape[1:-1]) * logs.sum())
        if inverse:
            return x * jnp.exp(-logs) - bias, -log_det
        return (x + bias) * jnp.exp(logs), log_det


class InvertibleConv(nn.Module):
    """A matrix that mixes the channels of [n, H, W, C], a rotation at first (Glow, section 3.2).

    Attributes:
      lu: the matrix is P L (U + diag s) with a permutation P and the signs of s held fixed, in the collection 'fixed'
        (eq. 10): the determinant costs C instead of C^3. Otherwise it is a matrix with no form.
    """

    lu: bool = False

    @nn.compact
    def __call__(self, x: Array, inverse: bool = False) -> tuple[Array, Array]:
        c = x.shape[-1]
        rotation = nn.initializers.orthogonal()
        if self.lu:
            p = lower = upper = jnp.eye(c)  # afterwards nothing of these but the shapes is read
            if self.is_initializing():
                p, lower, upper = jax.scipy.linalg.lu(rotation(self.make_rng('params'), (c, c)))
            diagonal = jnp.diag(upper)
            p = self.variable('fixed', 'permutation', lambda p: p, p).value
            sign = self.variable('fixed', 'sign', jnp.sign, diagonal).value
            logs = self.param('logs', lambda _, d: jnp.log(jnp.abs(d)), diagonal)
            lower = self.param('lower', lambda _, m: jnp.tril(m, -1), lower)
            upper = self.param('upper', lambda _, m: jnp.triu(m, 1), upper)
            # Only the halves that mean something are read, so what is outside them stays 0.
            lower = jnp.tril(lower, -1) + jnp.eye(c)
            upper = jnp.triu(upper, 1) + jnp.diag(sign * jnp.exp(logs))
            log_det = logs.sum()
            if inverse:
                solve = jax.scipy.linalg.solve_triangular
                matrix = solve(upper, solve(lower, p.T, lower=True, unit_diagonal=True))
            else:
                matrix = jnp.matmul(p, jnp.matmul(lower, upper, precision='highest'), precision='highest')
        else:
            matrix = self.param('kernel', rotation, (c, c))
            log_det = jnp.linalg.slogdet(matrix)[1]
            matrix = jnp.linalg.inv(matrix) if inverse else matrix
        # In full precision on every device: what is rounded here does not come back.
        y = jnp.matmul(x, matrix, precision='highest')
        log_det = jnp.full(len(x), math.prod(x.shape[1:-1]) * log_det)
        return y, -log_det if inverse else log_det


def EdgeConv(features: int, kernel: int, *, edge: bool, init: Callable, dtype: Any, name: str) -> Callable:
    """Convolution without bias, zeros around the image, and, with `edge`, one more channel that is 1 in that border: so
    the network sees where the image ends. Glow's code calls it edge_bias."""
    if not edge or kernel == 1:
        return Conv(features, kernel, bias=False, init=init, dtype=dtype, name=name)
    conv = Conv(features, kernel, padding='VALID', bias=False, init=init, dtype=dtype, name=name)
    r = kernel // 2

    def apply(x: Array) -> Array:
        border = ((0, 0), (r, r), (r, r), (0, 0))
        mark = jnp.pad(jnp.zeros((*x.shape[:3], 1), x.dtype), border, constant_values=1)
        return conv(jnp.concatenate([jnp.pad(x, border), mark], -1))

    return apply


class ZeroConv(nn.Module):
    """3x3 convolution that starts at 0, times e^(3 logs) per channel, float32 (Glow, section 3.3)."""

    features: int
    edge: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        zeros = nn.initializers.zeros
        x = EdgeConv(self.features, 3, edge=self.edge, init=zeros, dtype=self.dtype, name='conv')(x)
        bias = self.param('bias', zeros, (self.features,))
        logs = self.param('logs', zeros, (self.features,))
        return (x.astype(jnp.float32) + bias) * jnp.exp(3 * logs)


class WeightNormConv(nn.Module):
    """Convolution with kernel g v / |v|, v [k, k, C, features] and one g per feature (Salimans & Kingma 2016).

    Attributes:
      scale: of g at the start; 0 for a layer that starts at 0 and learns all the same.
    """

    features: int
    kernel: int = 3
    bias: bool = True
    scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = Conv(
            self.features, self.kernel, bias=False, init=nn.initializers.normal(), dtype=self.dtype, name='conv'
        )
        x = conv(x)
        v = conv.variables['params']['kernel']
        g = self.param('scale', nn.initializers.constant(self.scale), (self.features,))
        # The convolution is linear in v: its result is scaled instead.
        x = x * (g * jax.lax.rsqrt(jnp.maximum(jnp.square(v).sum((0, 1, 2)), 1e-30))).astype(self.dtype)
        return x + self.param('bias', nn.initializers.zeros, (self.features,)).astype(self.dtype) if self.bias else x


class FlowBatchNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) per channel as a layer of a flow (Real NVP, section 3.7), without weights.

    With `train` mean and variance are those of the batch, over all devices, and are left in the collection
    'batch_stats', as networks.layers.BatchNorm leaves them; otherwise they are taken from there. Only then is it a map
    of one example, and its log-determinant one of a density.

    x: [n, H, W, C]. mask: [1, H, W, 1], 1 where the layer works; 0 leaves x as it is. None: everywhere.
    """

    eps: float = 1e-4

    @nn.compact
    def __call__(
        self, x: Array, mask: Array | None = None, train: bool = False, inverse: bool = False
    ) -> tuple[Array, Array]:
        c = x.shape[-1]
        mask = jnp.ones((1, *x.shape[1:3], 1)) if mask is None else mask
        mean = self.variable('batch_stats', 'mean', jnp.zeros, (c,))
        var = self.variable('batch_stats', 'var', jnp.ones, (c,))
        if train:
            count = len(x) * mask.sum()
            new = (x * mask).sum((0, 1, 2)) / count
            mean.value, var.value = new, (jnp.square(x - new) * mask).sum((0, 1, 2)) / count
        log_scale = -0.5 * jnp.log(var.value + self.eps)
        shape = (len(x), *x.shape[1:])
        return affine(x, -mean.value * mask, jnp.broadcast_to(log_scale * mask, shape), inverse)
