"""Losses of adversarial training. A critic (or discriminator) is a callable x [n, ...] -> [n].

Losses are scalars to minimise, in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def wasserstein_critic(real: Array, fake: Array) -> Array:
    """Minus the estimate of the Wasserstein distance (Arjovsky et al. 2017, eq. 3).

    Args:
      real, fake: [n] critic values of data and of samples.
    """
    return fake.astype(jnp.float32).mean() - real.astype(jnp.float32).mean()


def wasserstein_generator(fake: Array) -> Array:
    """What the generator minimises, from the critic values [n] of its samples."""
    return -fake.astype(jnp.float32).mean()


def input_gradient_norm(critic: Callable, x: Array) -> Array:
    """Euclidean norm of d critic / d x per example, float32 [n], over all pixels and channels.

    The critic must treat examples one by one (no batch normalisation): the gradient of the sum
    is then each example's own.
    """
    gradient = jax.grad(lambda x: critic(x).astype(jnp.float32).sum())(x)
    square = jnp.square(gradient.astype(jnp.float32)).reshape(len(x), -1).sum(-1)
    # The root has no derivative at 0, and a critic that is flat somewhere must not give NaN.
    return jnp.sqrt(jnp.maximum(square, 1e-12))


def gradient_penalty(critic: Callable, real: Array, fake: Array, rng: Array, one_sided: bool = False) -> Array:
    """(|d critic / d x| - 1)^2 at random points between data and samples (Gulrajani et al. 2017, eq. 3).

    Args:
      critic: [n, ...] -> [n], see input_gradient_norm.
      real, fake: [n, ...]; each pair has its own point on the line between them.
      one_sided: only slopes above 1 cost anything.

    Returns:
      float32 [n]; the loss is the mean times the weight (10 in the paper).
    """
    share = jax.random.uniform(rng, (len(real),) + (1,) * (real.ndim - 1), real.dtype)
    excess = input_gradient_norm(critic, real + share * (fake - real)) - 1
    return jnp.square(jnp.maximum(excess, 0.0) if one_sided else excess)
