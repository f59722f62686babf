"""Log-likelihoods of pixels, per example, in nats.

Every function returns float32 [n]: the sum over all axes but the first, computed in float32
whatever comes in.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

Array = jax.Array

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def per_example(x: Array) -> Array:
    """[n, ...] -> [n], the sum over all axes but the first."""
    return x.reshape(len(x), -1).sum(-1)


def bernoulli(logits: Array, x: Array) -> Array:
    """log p(x) of independent bits with P(1) = sigmoid(logits).

    Args:
      logits: [n, ...], any real numbers; never turned into probabilities, so that large ones
        lose nothing.
      x: [n, ...] in {0, 1}. For x between 0 and 1 this is minus the cross-entropy, which is a
        common training loss but not the log of a normalised density.
    """
    logits, x = logits.astype(jnp.float32), x.astype(jnp.float32)
    return per_example(x * jax.nn.log_sigmoid(logits) + (1 - x) * jax.nn.log_sigmoid(-logits))


def gaussian(mean: Array, log_scale: Array, x: Array) -> Array:
    """Log-density of N(mean, exp(log_scale)^2) at x. A density: it has no upper bound.

    Args:
      mean, x: [n, ...].
      log_scale: log of the standard deviation, broadcast against them.
    """
    mean, log_scale, x = (jnp.asarray(a, jnp.float32) for a in (mean, log_scale, x))
    return per_example(-0.5 * jnp.square((x - mean) * jnp.exp(-log_scale)) - log_scale - HALF_LOG_2PI)


def discretised_gaussian(mean: Array, log_scale: Array, x: Array, levels: int = 256) -> Array:
    """log P(x) of pixels with `levels` values, as the normal's mass in each pixel's bin.

    The first and the last bin reach to -inf and +inf, so that the probabilities of all levels
    sum to 1 (Ho et al. 2020, eq. 13). Over pixels and ln 2 this is minus bits per dimension.

    Args:
      mean: [n, ...].
      log_scale: log of the standard deviation in units of x, broadcast against mean.
      x: [n, ...] in [-1, 1], at the levels -1, -1 + 2 / (levels - 1), ..., 1.
    """
    mean, log_scale, x = (jnp.asarray(a, jnp.float32) for a in (mean, log_scale, x))
    half = 1 / (levels - 1)
    inverse = jnp.exp(-log_scale)
    lower, upper = (x - half - mean) * inverse, (x + half - mean) * inverse
    # The lower tail is where the logs of the distribution function are exact: mirror the others.
    mirrored = x > mean
    lower, upper = jnp.where(mirrored, -upper, lower), jnp.where(mirrored, -lower, upper)
    first, last = x < -1 + half, x > 1 - half
    open_below = jnp.where(mirrored, last, first)
    open_above = jnp.where(mirrored, first, last)
    below = jax.scipy.stats.norm.logcdf(lower)
    above = jnp.where(open_above, 0.0, jax.scipy.stats.norm.logcdf(upper))
    # log(exp(above) - exp(below)); the inner where keeps the gradient of the unused branch finite.
    gap = jnp.where(open_below, -1.0, jnp.minimum(below - above, -1e-7))
    return per_example(above + jnp.where(open_below, 0.0, jnp.log(-jnp.expm1(gap))))
