"""What a network predicts, as two coefficients: output = a x_0 + b eps.

With x_t = alpha x_0 + sigma eps this is two equations for x_0 and eps, solved in one place.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

PREDICTIONS = ('eps', 'x0', 'v')


def coefficients(prediction: str, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """(a, b) of output = a x_0 + b eps: the noise (Ho et al. 2020), the image, or the velocity
    v = alpha eps - sigma x_0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""
    zero, one = jnp.zeros_like(alpha), jnp.ones_like(alpha)
    return {'eps': (zero, one), 'x0': (one, zero), 'v': (-sigma, alpha)}[prediction]


def target(prediction: str, x_0: Array, eps: Array, alpha: Array, sigma: Array) -> Array:
    """What the network should put out. alpha and sigma broadcast against x_0."""
    a, b = coefficients(prediction, alpha, sigma)
    return a * x_0 + b * eps


def to_x_0(prediction: str, output: Array, x_t: Array, alpha: Array, sigma: Array) -> Array:
    """The x_0 that the network's output stands for."""
    a, b = coefficients(prediction, alpha, sigma)
    return (b * x_t - sigma * output) / (b * alpha - a * sigma)
