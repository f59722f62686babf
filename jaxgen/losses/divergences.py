"""Divergences between distributions that have a closed form."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

Array = jax.Array


def normal_kl(
    mean: Array, log_var: Array, prior_mean: Array | float = 0.0, prior_log_var: Array | float = 0.0
) -> Array:
    """KL(N(mean, exp(log_var)) || N(prior_mean, exp(prior_log_var))) of diagonal normals, per example.

    The default prior is N(0, I): Kingma & Welling 2013, appendix B. Arguments are those of `normal_kl_by_latent`.

    Returns:
      float32 [n], nats, summed over all axes but the first; 0 only where the two are equal.
    """
    kl = normal_kl_by_latent(mean, log_var, prior_mean, prior_log_var)
    return kl.reshape(len(kl), -1).sum(-1)


def normal_kl_by_latent(
    mean: Array, log_var: Array, prior_mean: Array | float = 0.0, prior_log_var: Array | float = 0.0
) -> Array:
    """The same of each dimension, float32 [n, ...], nats.

    Args:
      mean, log_var: [n, ...], any dtype; computed in float32.
      prior_mean, prior_log_var: broadcast against them.
    """
    chex.assert_equal_shape([mean, log_var])
    mean, log_var, prior_mean, prior_log_var = (
        jnp.asarray(a, jnp.float32) for a in (mean, log_var, prior_mean, prior_log_var)
    )
    log_ratio = log_var - prior_log_var
    # Bounded, for 0 times infinity is not a number.
    distance = jnp.square(mean - prior_mean) * jnp.exp(jnp.minimum(-prior_log_var, 80))
    return 0.5 * (distance + jnp.expm1(log_ratio) - log_ratio)  # expm1: exact for nearly equal variances
