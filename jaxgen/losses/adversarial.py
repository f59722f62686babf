"""Adversarial losses and penalties. A critic (or discriminator) is a callable x [n, ...] -> [n].

Losses are scalars to minimise, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from jaxgen.errors import UserError

Array = jax.Array
PyTree = Any


def wasserstein_critic(real: Array, fake: Array) -> Array:
    """Minus the estimate of the Wasserstein distance (Arjovsky et al. 2017, eq. 3).

    Args:
      real, fake: [n] critic values of data and of samples.
    """
    return fake.astype(jnp.float32).mean() - real.astype(jnp.float32).mean()


def wasserstein_generator(fake: Array) -> Array:
    """Generator loss of the Wasserstein distance, from the critic values [n] of samples."""
    return -fake.astype(jnp.float32).mean()


def input_gradient_square(critic: Callable, x: Array) -> Array:
    """Square of the Euclidean norm of d critic / d x per example, float32 [n], over all pixels and channels.

    Where the critic gives several values of an example (patches), it is the gradient of their sum. The critic must
    treat examples one by one (no batch normalisation): the gradient of the sum over all is then each example's own.
    """
    gradient = jax.grad(lambda x: critic(x).astype(jnp.float32).sum())(x)
    return jnp.square(gradient.astype(jnp.float32)).reshape(len(x), -1).sum(-1)


def input_gradient_norm(critic: Callable, x: Array) -> Array:
    """Euclidean norm of d critic / d x per example, float32 [n]; see input_gradient_square."""
    # The root has no derivative at 0, and a critic that is flat somewhere must not give NaN.
    return jnp.sqrt(jnp.maximum(input_gradient_square(critic, x), 1e-12))


def gradient_penalty(critic: Callable, real: Array, fake: Array, rng: Array, one_sided: bool = False) -> Array:
    """(|d critic / d x| - 1)^2 at random points between data and samples (Gulrajani et al. 2017, eq. 3).

    Args:
      critic: [n, ...] -> [n], see input_gradient_norm.
      real, fake: [n, ...]; each pair has its own point on the line between them.
      one_sided: only slopes above 1 cost anything.

    Returns:
      float32 [n]; the loss is the mean times the weight (10 in the paper).
    """
    chex.assert_equal_shape([real, fake])
    fraction = jax.random.uniform(rng, (len(real),) + (1,) * (real.ndim - 1), real.dtype)
    excess = input_gradient_norm(critic, real + fraction * (fake - real)) - 1
    return jnp.square(jnp.maximum(excess, 0.0) if one_sided else excess)


def r1_penalty(critic: Callable, x: Array) -> Array:
    """1/2 |d critic / d x|^2 at data: R1 (Mescheder et al. 2018, arXiv 1801.04406, eq. 9); at samples: R2 (eq. 10).

    Args:
      critic: [n, ...] -> [n] or one value per patch, logits; see input_gradient_square.
      x: [n, ...].

    Returns:
      float32 [n]; the loss is the mean times gamma (10 in the paper). Taken in every k-th step only (Karras et al.
      2020, arXiv 1912.04958, section 3.1) it counts k times.
    """
    return 0.5 * input_gradient_square(critic, x)


def check_penalties(batch_norm: bool, field: str = 'discriminator_norm', **weights: float) -> None:
    """Raises UserError where a penalty of single images has a weight and the discriminator has batch normalisation.

    Args:
      field: of config.model, that switches the normalisation off.
      weights: of the penalties, by their fields of config.model.
    """
    if batch_norm and any(weights.values()):
        raise UserError(
            f'config.model.{" and ".join(weights)} {"are" if len(weights) > 1 else "is"} of single images: set '
            f'config.model.{field} = False'
        )


def lazily(penalty: Callable, step: Array, every: int) -> Array:
    """penalty() at every so many-th step only, where it counts as often, else 0 (Karras et al. 2020, section 3.1): in
    the mean over updates it is what it would be in each.

    No condition where none is needed: on several virtual devices of one CPU XLA may come to a standstill over the sums
    under it.

    Args:
      penalty: () -> float32 scalar.
      step: int32 scalar, updates done.
    """
    if every == 1:
        return penalty()
    return jax.lax.cond(step % every == 0, lambda: every * penalty(), lambda: jnp.zeros(()))


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


def minimax_generator(fake: Array) -> Array:
    """E log(1 - sigmoid(fake)), minus the second half of `vanilla_discriminator` (Goodfellow et al. 2014, eq. 1).

    Its slope vanishes where the discriminator recognises samples. Against the best discriminator the value of eq. 1 is
    2 JS(data, samples) - 2 log 2.
    """
    return -jax.nn.softplus(fake.astype(jnp.float32)).mean()


def least_squares_discriminator(real: Array, fake: Array) -> Array:
    """1/2 E (real - 1)^2 + 1/2 E fake^2 (Mao et al. 2017, arXiv 1611.04076, eq. 9).

    Args:
      real, fake: values of data and of samples, [n] or one per patch; no sigmoid before them.
    """
    real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
    return 0.5 * jnp.square(real - 1).mean() + 0.5 * jnp.square(fake).mean()


def least_squares_generator(fake: Array) -> Array:
    """1/2 E (fake - 1)^2 (Mao et al. 2017, eq. 9). Code that leaves the half out (CycleGAN's) means twice as much."""
    return 0.5 * jnp.square(fake.astype(jnp.float32) - 1).mean()


# {name: (discriminator loss, of values of data and of samples; generator loss, of values of samples)}
ADVERSARIAL_LOSSES = {
    'minimax': (vanilla_discriminator, minimax_generator),
    'non_saturating': (vanilla_discriminator, non_saturating_generator),
    'wasserstein': (wasserstein_critic, wasserstein_generator),
    'hinge': (hinge_discriminator, wasserstein_generator),
    'least_squares': (least_squares_discriminator, least_squares_generator),
}


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
