"""Samplers: free functions of the callable `denoise(x, t) -> x_0`, each one `lax.scan`.

They share a signature: (denoise, x, schedule, keys, options) -> x_0 [n, ...]. `x` is noise at the
schedule's last level; `keys` [n] is one key per sample, so that a sample does not depend on what is
drawn with it. Fewer steps come from a subset of the schedule.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.contract import normal
from jaxgen.diffusion.schedules import Schedule, posterior

Array = jax.Array


def ancestral(denoise: Callable, x: Array, schedule: Schedule, keys: Array, *, variance: str) -> Array:
    """Algorithm 2 of Ho et al. 2020: draws each x_s from p(x_s | x_t). The last step adds no noise.

    Args:
      variance: of p, 'fixed_large' (that of the forward step) or 'fixed_small' (the posterior's).
    """
    moves = posterior(schedule)
    var = {'fixed_large': moves.forward, 'fixed_small': moves.variance}[variance]
    return linear(denoise, x, schedule, keys, moves.x_t_weight, moves.x_0_weight, np.sqrt(var))


def ddim(denoise: Callable, x: Array, schedule: Schedule, keys: Array, *, eta: float = 0.0) -> Array:
    """Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16.

    Args:
      eta: 0: x_0 is a function of x alone; 1: `ancestral` with 'fixed_small'.
    """
    alpha, sigma = schedule.alpha, schedule.sigma
    alpha_s, sigma_s = np.concatenate([[1.0], alpha[:-1]]), np.concatenate([[0.0], sigma[:-1]])
    std = eta * np.sqrt(posterior(schedule).variance)
    # x_s = alpha_s x_0 + direction eps + std noise, with eps = (x_t - alpha x_0) / sigma
    direction = np.sqrt(np.maximum(sigma_s**2 - std**2, 0))
    return linear(denoise, x, schedule, keys, direction / sigma, alpha_s - direction * alpha / sigma, std)


def linear(
    denoise: Callable,
    x: Array,
    schedule: Schedule,
    keys: Array,
    x_t_weight: np.ndarray,
    x_0_weight: np.ndarray,
    std: np.ndarray,
) -> Array:
    """Steps x_s = x_t_weight x_t + x_0_weight denoise(x_t, t) + std noise, from the last level down.

    Args:
      x_t_weight, x_0_weight, std: [T]; entry i leads from level i to the one below. No noise is
        added at entry 0, which leads to the data.
    """
    std = np.concatenate([[0.0], std[1:]])
    steps = {
        'number': np.arange(len(std)),
        't': schedule.t,
        'x_t_weight': x_t_weight.astype(np.float32),
        'x_0_weight': x_0_weight.astype(np.float32),
        'std': std.astype(np.float32),
    }

    def step(x, at):
        new = at['x_t_weight'] * x + at['x_0_weight'] * denoise(x, at['t'])
        if std.any():
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, at['number'])
            new = new + at['std'] * normal(step_keys, x.shape[1:])
        return new, None

    return jax.lax.scan(step, x, jax.tree.map(jnp.asarray, steps), reverse=True)[0]
