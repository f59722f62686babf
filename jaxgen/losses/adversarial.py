"""Losses of adversarial training. A critic (or discriminator) is a callable x [n, ...] -> [n].

Losses are scalars to minimise, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
PyTree = Any


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


def hinge_discriminator(real: Array, fake: Array) -> Array:
    """E max(0, 1 - real) + E max(0, 1 + fake) (Lim & Ye 2017, arXiv 1705.02894; Miyato et al. 2018).

    Args:
      real, fake: values of data and of samples, [n] or one per patch.
    """
    real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
    return jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()


def vanilla_discriminator(real: Array, fake: Array) -> Array:
    """-E log sigmoid(real) - E log(1 - sigmoid(fake)) of logits (Goodfellow et al. 2014, eq. 1).

    Args:
      real, fake: logits of data and of samples, [n] or one per patch.
    """
    real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
    return jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()


def non_saturating_generator(fake: Array) -> Array:
    """-E log sigmoid(fake) of the logits of samples (Goodfellow et al. 2014, section 3), for `vanilla_discriminator`.

    To the hinge loss belongs -E fake, which is `wasserstein_generator`.
    """
    return jax.nn.softplus(-fake.astype(jnp.float32)).mean()


def adaptive_weight(reconstruction: PyTree, adversarial: PyTree) -> Array:
    """Weight of an adversarial loss beside another loss: ratio of their gradients' norms (Esser et al. 2021, eq. 7).

    Args:
      reconstruction, adversarial: gradients by the same weights, those of the generator's last layer.

    Returns:
      float32 scalar from 0 to 10,000, a constant to gradients. As in the published code 1e-4 is added to the
      denominator (1e-6 in the paper), and the result is clipped.
    """
    ratio = optax.tree.norm(reconstruction) / (optax.tree.norm(adversarial) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio.astype(jnp.float32), 0, 1e4))
