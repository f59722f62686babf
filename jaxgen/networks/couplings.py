"""Layers of normalising flows: invertible maps of images with the logarithm of their determinant.

A layer maps [n, H, W, C] to the same shape and returns log |det dy/dx| per example too, float32 [n], in nats; with
`inverse` it maps back, and returns minus that. The flow itself is computed in float32 whatever the dtype, which is that
of the networks inside the couplings: an inverse cannot be better than its input.

Pixels: a quantisation level k in 0 .. 255 becomes y = (k + u) / 256 with u uniform in [0, 1). By Jensen the density of
y bounds the probability of the level: log P(k) >= E log p(y) - log 256 (Theis et al. 2015, arXiv 1511.01844, section
3.1). With fewer levels, 2^b of b bits, k is the highest b bits of the stored value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jaxgen.losses.likelihoods import sum_per_example
from jaxgen.networks.layers import Conv

Array = jax.Array

LEVELS = 256  # of quantisation, in the data


def to_unit(x: Array, noise: Array | float = 0.5, levels: int = LEVELS) -> Array:
    """Images in [-1, 1] to (level + noise) / levels, in [0, 1). noise: u in [0, 1); 0.5 is the middle of the level."""
    stored = (x + 1) * ((LEVELS - 1) / 2)
    level = stored if levels == LEVELS else jnp.floor(jnp.round(stored) * (levels / LEVELS))
    return (level + noise) / levels


def to_image(y: Array, levels: int = LEVELS) -> Array:
    """Images in [-1, 1], of `levels` values where these are fewer than 256. Of 256 it is the inverse of `to_unit`
    without noise, cut off at -1 and 1; rounded to levels it is floor(256 y)."""
    if levels < LEVELS:
        return jnp.clip(jnp.floor(levels * y), 0, levels - 1) * (2 / (levels - 1)) - 1
    return jnp.clip((LEVELS * y - 0.5) * (2 / (LEVELS - 1)) - 1, -1, 1)


def bits_per_dim(log_p: Array, size: int, levels: int = LEVELS) -> Array:
    """Bits per dimension at so many levels, from log p(y) in nats of `size` values in the units of `to_unit`."""
    return (math.log(levels) - log_p / size) / math.log(2)


def mean_bits_per_dim(
    log_p: Callable, keys: Array, image: tuple[int, int, int], draws: int, levels: int = LEVELS
) -> Array:
    """Bits per dimension [n], the mean over `draws` noises between levels for each image.

    Args:
      log_p: noise [n, *image] in [0, 1) -> log p(y) [n], nats.
      keys: of the images, [n].
    """

    def draw(keys: Array) -> Array:
        noise = jax.vmap(lambda key: jax.random.uniform(key, image))(keys)
        return bits_per_dim(log_p(noise), math.prod(image), levels)

    return jax.lax.map(draw, jax.vmap(jax.random.split, (0, None), 1)(keys, draws)).mean(0)  # of [draws, n]


def squeeze(x: Array) -> Array:
    """[n, H, W, C] to [n, H/2, W/2, 4C]: channel 4c + 2i + j is channel c at row i and column j of its 2x2 square."""
    return rearrange(x, 'n (h i) (w j) c -> n h w (c i j)', i=2, j=2)


def unsqueeze(x: Array) -> Array:
    """The inverse of `squeeze`."""
    return rearrange(x, 'n h w (c i j) -> n (h i) (w j) c', i=2, j=2)


# Order of the four pixels of a 2x2 square (in rows): first the one diagonal, then the other.
DIAGONALS = (0, 3, 1, 2)


def squeeze_diagonals(x: Array) -> Array:
    """[n, H, W, C] to [n, H/2, W/2, 4C]: the C channels of each square's top left, then bottom right, top right,
    bottom left pixel. So either half of the channels is one colour of a checkerboard."""
    squares = rearrange(x, 'n (h i) (w j) c -> n h w (i j) c', i=2, j=2)
    return rearrange(squares[:, :, :, jnp.array(DIAGONALS)], 'n h w k c -> n h w (k c)')


def unsqueeze_diagonals(x: Array) -> Array:
    """The inverse of `squeeze_diagonals`."""
    back = jnp.array([DIAGONALS.index(i) for i in range(4)])
    squares = rearrange(x, 'n h w (k c) -> n h w k c', k=4)[:, :, :, back]
    return rearrange(squares, 'n h w (i j) c -> n (h i) (w j) c', i=2, j=2)


def checkerboard(height: int, width: int, first: int) -> Array:
    """Float32 [1, H, W, 1] of 0 and 1, no two neighbours equal; `first` is the number at the top left."""
    return ((jnp.arange(height)[:, None] + jnp.arange(width) + first) % 2).astype(jnp.float32)[None, :, :, None]


def affine(x: Array, shift: Array, log_scale: Array, inverse: bool = False) -> tuple[Array, Array]:
    """(x + shift) e^log_scale and the log-determinant [n], or their inverse. All [n, H, W, C].

    Real NVP's paper writes x e^s + t, its authors' code has this, as Glow: the same maps by another t.
    """
    chex.assert_equal_shape([x, log_scale])  # the determinant is a sum over all of x
    if inverse:
        return x * jnp.exp(-log_scale) - shift, -sum_per_example(log_scale)
    return (x + shift) * jnp.exp(log_scale), sum_per_example(log_scale)


class ActNorm(nn.Module):
    """(x + b) e^(factor logs), per channel of [n, ..., C] (Glow, section 3.1).

    b and logs start from the batch that `init` is called with, over all devices: its mean becomes 0 and its standard
    deviation 1, per channel.

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
        (eq. 10): the determinant costs C instead of C^3. Otherwise it is any matrix.
    """

    lu: bool = False

    @nn.compact
    def __call__(self, x: Array, inverse: bool = False) -> tuple[Array, Array]:
        c = x.shape[-1]
        rotation = nn.initializers.orthogonal()
        if self.lu:
            p = lower = upper = jnp.eye(c)  # after init only their shapes are used
            if self.is_initializing():
                p, lower, upper = jax.scipy.linalg.lu(rotation(self.make_rng('params'), (c, c)))
            diagonal = jnp.diag(upper)
            p = self.variable('fixed', 'permutation', lambda p: p, p).value
            sign = self.variable('fixed', 'sign', jnp.sign, diagonal).value
            logs = self.param('logs', lambda _, d: jnp.log(jnp.abs(d)), diagonal)
            lower = self.param('lower', lambda _, m: jnp.tril(m, -1), lower)
            upper = self.param('upper', lambda _, m: jnp.triu(m, 1), upper)
            # Only one triangle of each is used, so the other one stays 0.
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
        # In full precision on every device: rounding here is lost for the inverse.
        y = jnp.matmul(x, matrix, precision='highest')
        log_det = jnp.full(len(x), math.prod(x.shape[1:-1]) * log_det)
        return y, -log_det if inverse else log_det


def EdgeConv(features: int, kernel: int, *, edge: bool, init: Callable, dtype: Any, name: str) -> Callable:
    """Convolution without bias, zeros around the image, and, with `edge`, one more channel that is 1 in that border, so
    that the network knows where the image ends. Glow's code calls it edge_bias."""
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
      scale: of g at the start; 0: the layer starts at 0, and learns.
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

    With `train` mean and variance are those of the batch, over all devices, and are stored in the collection
    'batch_stats', as in networks.layers.BatchNorm; otherwise they are read from there. Only then is it a map of single
    examples, and its log-determinant one of a density.

    x: [n, H, W, C]. mask: [1, H, W, 1], 1 where x is normalised, 0 where it is left alone. None: 1 everywhere.
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
