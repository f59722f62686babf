"""Log-likelihoods of pixels, per example, and the cross-entropy of classes and codes, in nats.

Every log-likelihood is float32 [n]: the sum over all axes but the first. All are computed in float32 whatever the dtype
of their inputs.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

Array = jax.Array

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# Upper bound on -log scale: squares of distances up to 1e6 over e^-30 are finite in float32, and e^-30 = 9e-14 is far
# below the distance of neighbouring float32 numbers between pixels' values.
LARGEST_EXPONENT = 30.0
LARGEST_DRAWN = 80.0  # log scale of a logistic in sampling: times the noise it is finite


def sum_per_example(x: Array) -> Array:
    """[n, ...] -> [n], the sum over all axes but the first."""
    return x.reshape(len(x), -1).sum(-1)


def bernoulli(logits: Array, x: Array) -> Array:
    """log p(x) of independent bits with P(1) = sigmoid(logits).

    Args:
      logits: [n, ...], any real numbers; probabilities are never computed, so that large ones keep their precision.
      x: [n, ...] in {0, 1}. For x between 0 and 1 this is minus the cross-entropy, which is a common training loss but
        not the log of a normalised density.
    """
    chex.assert_equal_shape([logits, x])
    logits, x = logits.astype(jnp.float32), x.astype(jnp.float32)
    return sum_per_example(x * jax.nn.log_sigmoid(logits) + (1 - x) * jax.nn.log_sigmoid(-logits))


def gaussian(mean: Array, log_scale: Array, x: Array) -> Array:
    """Log-density of N(mean, exp(log_scale)^2) at x. A density: it has no upper bound.

    Args:
      mean, x: [n, ...].
      log_scale: log of the standard deviation, broadcast against them.
    """
    mean, log_scale, x = (jnp.asarray(a, jnp.float32) for a in (mean, log_scale, x))
    inverse = jnp.exp(jnp.minimum(-log_scale, LARGEST_EXPONENT))
    return sum_per_example(-0.5 * jnp.square((x - mean) * inverse) - log_scale - HALF_LOG_2PI)


def discretised_gaussian(mean: Array, log_scale: Array, x: Array, levels: int = 256) -> Array:
    """log P(x) of pixels with `levels` values, as the normal's mass in each pixel's bin.

    The first and the last bin extend to -inf and +inf, so that the probabilities of all quantisation levels sum to 1
    (Ho et al. 2020, eq. 13). Divided by the number of pixels and ln 2 this is minus bits per dimension.

    Args:
      mean: [n, ...].
      log_scale: log of the standard deviation in units of x, broadcast against mean.
      x: [n, ...] in [-1, 1], at the levels -1, -1 + 2 / (levels - 1), ..., 1.
    """
    mean, log_scale, x = (jnp.asarray(a, jnp.float32) for a in (mean, log_scale, x))
    half = 1 / (levels - 1)
    inverse = jnp.exp(jnp.minimum(-log_scale, LARGEST_EXPONENT))
    width, centre = 2 * half * inverse, (x - mean) * inverse
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
    log_p = above + jnp.where(open_below, 0.0, jnp.log(-jnp.expm1(gap)))
    # The mass of a bin that is narrow beside the standard deviation is a difference of nearly equal numbers. Taken
    # instead: the density at its middle times its width (whose log is exact), and the series' next term in the width.
    narrow = (width < 0.1) & (jnp.abs(centre) * width < 0.1) & ~first & ~last
    w, z = jnp.where(narrow, width, 0), jnp.where(narrow, centre, 0)
    series = (
        math.log(2 * half) - log_scale - HALF_LOG_2PI - jnp.square(z) / 2 + (jnp.square(z) - 1) * jnp.square(w) / 24
    )
    return sum_per_example(jnp.where(narrow, series, log_p))


def discretised_logistic(mean: Array, log_scale: Array, x: Array, levels: int = 256) -> Array:
    """Log P(x) of pixels with `levels` values, as the logistic's mass in each pixel's bin (Kingma et al. 2016, arXiv
    1606.04934, appendix C.1); the first and the last bin extend to -inf and +inf.

    Args:
      mean: [n, ...].
      log_scale: log of the scale in units of x, broadcast against mean; SMALLEST_LOG_SCALE or more.
      x: [n, ...] in [-1, 1], at the levels -1, -1 + 2 / (levels - 1), ..., 1.
    """
    log_scale = jnp.broadcast_to(log_scale, mean.shape)
    one = jnp.stack([jnp.zeros_like(mean), mean, log_scale], -1)  # a mixture of one
    return discretised_logistic_mixture(one, x[..., None], levels)


def cross_entropy(logits: Array, label: Array, smoothing: float = 0.0) -> Array:
    """-log p(label) of each label, float32 [...].

    Args:
      logits: [..., k].
      label: integers [...] from 0 to k - 1; NaN for others.
      smoothing: s: the label has probability 1 - s + s / k and all others s / k (Szegedy et al. 2016, arXiv 1512.00567,
        section 7).
    """
    chex.assert_shape(label, logits.shape[:-1])
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    k = log_p.shape[-1]
    # A sum instead of indexing, whose gradient adds up in an order that changes on GPUs (sharding.overlapping_writes).
    right = jnp.where(jnp.arange(k) == label[..., None], log_p, 0).sum(-1)
    right = jnp.where((label >= 0) & (label < k), right, jnp.nan)
    return -(1 - smoothing) * right - smoothing * log_p.mean(-1) if smoothing else -right


def categorical(logits: Array, values: Array) -> Array:
    """log P(values) of independent integers.

    Args:
      logits: [n, ..., k].
      values: integers [n, ...] from 0 to k - 1.
    """
    return -sum_per_example(cross_entropy(logits, values))


SMALLEST_LOG_SCALE = -7.0  # of a logistic in a mixture: a tenth of a quantisation level


def logistic_mixture_size(channels: int, mixtures: int) -> int:
    """Parameters per pixel of a mixture of logistics: 10 for each of `mixtures` with 3 channels, 3 with 1."""
    return mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)


def logistic_mixture(parameters: Array, channels: int) -> tuple[Array, Array, Array, Array]:
    """The parameters of a mixture of m logistics in each pixel, from a network's outputs.

    First come the m logits, then for each channel m means, m log scales and, with three channels, m coefficients
    by which a mean depends on the channels before: green on red, blue on red, blue on green.

    Args:
      parameters: [..., logistic_mixture_size(channels, m)], channels 1 or 3.

    Returns:
      logits [..., m]; means, log_scales and coefficients [..., channels, m], the last in [-1, 1] (with one channel
      they are none, [..., 1, 0]).
    """
    m = parameters.shape[-1] // logistic_mixture_size(channels, 1)
    logits, rest = parameters[..., :m].astype(jnp.float32), parameters[..., m:].astype(jnp.float32)
    rest = rest.reshape(*rest.shape[:-1], channels, -1)
    log_scales = jnp.maximum(rest[..., m : 2 * m], SMALLEST_LOG_SCALE)
    return logits, rest[..., :m], log_scales, jnp.tanh(rest[..., 2 * m :])


def shifted_mean(means: Array, coefficients: Array, x: Array, channel: int) -> Array:
    """Means [..., m] of a channel, given the channels before it, x [..., channels] (Salimans et al. 2017, eq. 3)."""
    first = channel * (channel - 1) // 2
    moved = [coefficients[..., first + k, :] * x[..., k, None] for k in range(channel)]
    return sum(moved, means[..., channel, :])


def discretised_logistic_mixture(parameters: Array, x: Array, levels: int = 256) -> Array:
    """log P(x) of pixels with `levels` values, each pixel a mixture of logistics with the mass in each value's bin
    (Salimans et al. 2017, arXiv 1701.05517, section 2.1 and 2.2).

    One component is chosen for all channels of a pixel. The first and the last bin extend to -inf and +inf: the
    probabilities of all values sum to 1.

    Args:
      parameters: [n, ..., logistic_mixture_size(C, mixtures)].
      x: [n, ..., C] in [-1, 1], at the levels -1, -1 + 2 / (levels - 1), ..., 1; C is 1 or 3.
    """
    chex.assert_equal_shape_prefix([parameters, x], x.ndim - 1)
    x = x.astype(jnp.float32)
    channels, half = x.shape[-1], 1 / (levels - 1)
    logits, means, log_scales, coefficients = logistic_mixture(parameters, channels)
    moved = jnp.stack([shifted_mean(means, coefficients, x, c) for c in range(channels)], -2)  # [n, ..., C, m]
    inverse = jnp.exp(-log_scales)  # 0 above 104; the log of a bin's mass is finite there all the same
    centred = x[..., None] - moved
    lower, upper = (centred - half) * inverse, (centred + half) * inverse
    first, last = (x < -1 + half)[..., None], (x > 1 - half)[..., None]
    # sigmoid(b) - sigmoid(a) = e^b (1 - e^(a - b)) / ((1 + e^a) (1 + e^b)): exact in both tails.
    width = 2 * half * inverse
    narrow = width < 1e-2
    log_difference = jnp.where(
        narrow,
        math.log(2 * half) - log_scales - width / 2 + jnp.square(width) / 24,  # of 1 - e^-width
        jnp.log(-jnp.expm1(-jnp.where(narrow, 1.0, width))),
    )
    inside = log_difference + jax.nn.log_sigmoid(upper) + jax.nn.log_sigmoid(-lower)
    log_p = jnp.where(first, jax.nn.log_sigmoid(upper), jnp.where(last, jax.nn.log_sigmoid(-lower), inside))
    return sum_per_example(jax.nn.logsumexp(log_p.sum(-2) + jax.nn.log_softmax(logits), -1))


def draw_logistic_mixture(
    keys: Array, parameters: Array, channels: int, levels: int = 256, temperature: float = 1.0
) -> Array:
    """Samples of `discretised_logistic_mixture`: one pixel for each key, int32 [n, channels] from 0 to levels - 1.

    Args:
      keys: [n].
      parameters: [n, logistic_mixture_size(channels, mixtures)].
      temperature: 1: the mixture itself; less: components of high probability, and narrower ones.
    """
    logits, means, log_scales, coefficients = logistic_mixture(parameters, channels)

    def noise(key):
        component_key, value_key = jax.random.split(key)
        return jax.random.gumbel(component_key, logits.shape[1:]), jax.random.logistic(value_key, (channels,))

    gumbel, logistic = jax.vmap(noise)(keys)
    chosen = (logits + temperature * gumbel).argmax(-1)

    def component(a):  # [n, ., m] -> [n, ., 1]
        return jnp.take_along_axis(a, chosen[:, None, None], -1)

    means, scales = component(means), jnp.exp(jnp.minimum(component(log_scales), LARGEST_DRAWN))
    coefficients = component(coefficients) if channels > 1 else coefficients
    x, values = jnp.zeros((len(chosen), channels)), []
    for c in range(channels):
        drawn = shifted_mean(means, coefficients, x, c)[:, 0] + temperature * scales[:, c, 0] * logistic[:, c]
        value = jnp.clip(jnp.round((drawn + 1) / 2 * (levels - 1)), 0, levels - 1)
        values.append(value)
        x = x.at[:, c].set(2 * value / (levels - 1) - 1)
    return jnp.stack(values, -1).astype(jnp.int32)
