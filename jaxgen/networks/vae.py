"""Networks of variational autoencoders: from images to normal distributions of latents, and back.

An encoder returns the mean and the log variance of a diagonal normal. `condition` is another input, [n, k]: the class,
one-hot, or the latents of the level above.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import repeat

from jaxgen.networks.layers import Conv, Dense, upsample_nearest, variance_scaling

Array = jax.Array

# Bounds on the log variances of gated networks (Tomczak & Welling's code): no component of a mixture of posteriors
# can shrink to a point or swallow the others.
LOG_VAR = (-6.0, 2.0)


def hidden_layer(x: Array, features: int, activation: Callable | None, dtype: Any) -> Array:
    """activation(W x), or without one a gated layer, (A x) sigmoid(B x) (Dauphin et al. 2017, eq. 1).

    The weights belong to the module that calls this.
    """
    if activation is not None:
        return activation(Dense(features, dtype=dtype)(x))
    value, gate = jnp.split(Dense(2 * features, init=he_normal(), dtype=dtype)(x), 2, -1)
    return value * nn.sigmoid(gate)


def he_normal():
    """Init of gated networks: N(0, 2 / fan in)."""
    return nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')


def moments(x: Array, latent: int, gated: bool, dtype: Any) -> tuple[Array, Array]:
    """Mean and log variance, float32 [n, latent] both, by one linear layer; its weights belong to the caller."""
    init = he_normal() if gated else variance_scaling()
    mean, log_var = jnp.split(Dense(2 * latent, init=init, dtype=dtype)(x).astype(jnp.float32), 2, -1)
    return mean, jnp.clip(log_var, *LOG_VAR) if gated else log_var


def with_condition(x: Array, condition: Array | None) -> Array:
    """[n, ..., c] and [n, k] -> [n, ..., c + k], the condition at every position."""
    if condition is None:
        return x
    chex.assert_shape(condition, (len(x), None))
    if x.ndim == 4:
        condition = repeat(condition, 'n k -> n h w k', h=x.shape[1], w=x.shape[2])
    return jnp.concatenate([x, condition], -1)


class Down(nn.Module):
    """[n, H, W, C] -> [n, H/2, W/2, features]."""

    features: int
    activation: Callable
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.activation(Conv(self.features, stride=2, dtype=self.dtype)(x))
        return self.activation(Conv(self.features, dtype=self.dtype)(x))


class Up(nn.Module):
    """[n, H, W, C] -> [n, 2H, 2W, features]."""

    features: int
    activation: Callable
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.activation(Conv(self.features, dtype=self.dtype)(x))
        return self.activation(Conv(self.features, dtype=self.dtype)(upsample_nearest(x)))


class ConvEncoder(nn.Module):
    """[n, H, W, C] -> mean and log_var [n, latent], float32."""

    latent: int
    width: int
    levels: int
    activation: Callable
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        block = nn.remat(Down) if self.remat else Down
        x = self.activation(Conv(self.width, dtype=self.dtype)(with_condition(x, condition)))
        for i in range(self.levels):
            x = block(self.width * 2 ** (i + 1), self.activation, self.dtype, name=f'down{i}')(x)
        return moments(x.reshape(len(x), -1), self.latent, False, self.dtype)


class ConvDecoder(nn.Module):
    """[n, latent] -> one number per pixel and channel, float32 [n, H, W, C]."""

    image: tuple[int, int, int]
    width: int
    levels: int
    activation: Callable
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, z: Array) -> Array:
        block = nn.remat(Up) if self.remat else Up
        height, width, channels = self.image
        shape = (height >> self.levels, width >> self.levels, self.width << self.levels)
        x = self.activation(Dense(math.prod(shape), dtype=self.dtype)(z))
        x = x.reshape(-1, *shape)
        for i in reversed(range(self.levels)):
            x = block(self.width * 2**i, self.activation, self.dtype, name=f'up{i}')(x)
        return Conv(channels, dtype=self.dtype)(x).astype(jnp.float32)


class MlpEncoder(nn.Module):
    """[n, ...] -> mean and log_var [n, latent], float32."""

    latent: int
    hidden: tuple[int, ...]
    activation: Callable | None  # None: gated layers
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        x = with_condition(x.reshape(len(x), -1), condition)
        for features in self.hidden:
            x = hidden_layer(x, features, self.activation, self.dtype)
        return moments(x, self.latent, self.activation is None, self.dtype)


class MlpDecoder(nn.Module):
    """[n, latent] -> one number per pixel and channel, float32 [n, H, W, C]; layers in reverse order."""

    image: tuple[int, int, int]
    hidden: tuple[int, ...]
    activation: Callable | None  # None: gated layers
    dtype: Any

    @nn.compact
    def __call__(self, z: Array) -> Array:
        for features in reversed(self.hidden):
            z = hidden_layer(z, features, self.activation, self.dtype)
        return output_layer(z, self.image, self.activation is None, self.dtype)


def output_layer(x: Array, image: tuple[int, int, int], gated: bool, dtype: Any) -> Array:
    """The last layer of a decoder, float32 [n, H, W, C]; its weights belong to the caller."""
    init = he_normal() if gated else variance_scaling()
    return Dense(math.prod(image), init=init, dtype=dtype)(x).astype(jnp.float32).reshape(-1, *image)


def joined(a: Array, b: Array, hidden: tuple[int, ...], activation: Callable | None, dtype: Any) -> Array:
    """All layers but the last for each of a and b [n, ...] alone, the last one for both."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    for features in hidden[:-1]:
        a = hidden_layer(a, features, activation, dtype)
    for features in hidden[:-1]:
        b = hidden_layer(b, features, activation, dtype)
    return hidden_layer(jnp.concatenate([a, b], -1), hidden[-1], activation, dtype)


class JoinedEncoder(nn.Module):
    """x [n, ...] and the latents of the level above [n, k] -> mean and log_var [n, latent], float32."""

    latent: int
    hidden: tuple[int, ...]
    activation: Callable | None  # None: gated layers
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, above: Array) -> tuple[Array, Array]:
        x = joined(x, above, self.hidden, self.activation, self.dtype)
        return moments(x, self.latent, self.activation is None, self.dtype)


class JoinedDecoder(nn.Module):
    """Latents [n, latent + k], of the level below and then of the level above, -> float32 [n, H, W, C]."""

    image: tuple[int, int, int]
    latent: int
    hidden: tuple[int, ...]
    activation: Callable | None  # None: gated layers
    dtype: Any

    @nn.compact
    def __call__(self, z: Array) -> Array:
        x = joined(z[:, : self.latent], z[:, self.latent :], self.hidden[::-1], self.activation, self.dtype)
        return output_layer(x, self.image, self.activation is None, self.dtype)


class PixelDistribution(nn.Module):
    """A decoder with what else the distribution of pixels has: z -> means, or logits of bits, float32 [n, H, W, C], and
    log scales, a scalar or of the same shape.

    Attributes:
      decoder: z -> [n, H, W, C], or [n, H, W, 2 C] where each pixel has a scale of its own.
      log_scale: at the start, or fixed.
      scales: 'fixed', 'shared', one learned number, or 'pixel', by the decoder.
      log_range: least and most log scale; (): any.
      bounded: means are bounded to (-1, 1) by a sigmoid.
    """

    decoder: nn.Module
    log_scale: float
    scales: str
    log_range: tuple[float, ...] = ()
    bounded: bool = False

    @nn.compact
    def __call__(self, z: Array) -> tuple[Array, Array]:
        output, log_scale = self.decoder(z), jnp.float32(self.log_scale)
        if self.scales == 'shared':
            log_scale = self.param('log_scale', nn.initializers.constant(self.log_scale), ())
        elif self.scales == 'pixel':
            output, change = jnp.split(output, 2, -1)
            log_scale = self.log_scale + change
        if self.log_range:
            log_scale = jnp.clip(log_scale, *self.log_range)
        return 2 * nn.sigmoid(output) - 1 if self.bounded else output, log_scale
