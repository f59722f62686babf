"""What a network predicts, as two coefficients: output = a x_0 + b eps.

With x_t = alpha x_0 + sigma eps this is two equations for x_0 and eps, solved in one place:

    x_0 = (b x_t - sigma output) / (b alpha - a sigma)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgen.options import NonNegative, Positive

Array = jax.Array


def edm(*, data_std: Positive = 0.5) -> None:
    """Args:
    data_std: standard deviation of the data.
    """


def min_snr(*, gamma: NonNegative = 5.0) -> None:
    """Args:
    gamma: largest weight of the error of x_0.
    """


# {name: function whose keyword arguments are its fields, or None}
PREDICTIONS = {'eps': None, 'x0': None, 'v': None, 'score': None, 'flow': None, 'edm': edm}
WEIGHTINGS = {'none': None, 'min_snr': min_snr, 'eps': None, 'v': None, 'flow': None, 'bound': None}


def coefficients(prediction: str, alpha: Array, sigma: Array, data_std: float = 0.5) -> tuple[Array, Array]:
    """(a, b) of output = a x_0 + b eps.

    'eps'    the noise (Ho et al. 2020)
    'x0'     the image
    'v'      the velocity alpha eps - sigma x_0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D)
    'score'  sigma times the score, -eps (Song et al. 2021, arXiv 2011.13456; the network before its
             output is divided by sigma)
    'flow'   eps - x_0, the velocity of a straight line (Lipman et al. 2022; Liu et al. 2022)
    'edm'    what is left of x_0 where data of standard deviation `data_std` are expected, with variance 1
             (Karras et al. 2022, arXiv 2206.00364, eq. 7 and table 1)
    """
    zero, one = jnp.zeros_like(alpha), jnp.ones_like(alpha)
    if prediction == 'edm':
        total = jnp.sqrt(sigma**2 + (alpha * data_std) ** 2)
        return sigma / (data_std * total), -data_std * alpha / total
    return {
        'eps': (zero, one),
        'x0': (one, zero),
        'v': (-sigma, alpha),
        'score': (zero, -one),
        'flow': (-one, one),
    }[prediction]


def input_scale(prediction: str, alpha: Array, sigma: Array, data_std: float = 0.5) -> Array:
    """What x_t is multiplied by before the network sees it: for 'edm' to variance 1, else 1."""
    if prediction == 'edm':
        return 1 / jnp.sqrt(sigma**2 + (alpha * data_std) ** 2)
    return jnp.ones_like(alpha)


def target(prediction: str, x_0: Array, eps: Array, alpha: Array, sigma: Array, data_std: float = 0.5) -> Array:
    """What the network should put out. alpha and sigma broadcast against x_0."""
    a, b = coefficients(prediction, alpha, sigma, data_std)
    return a * x_0 + b * eps


def to_x_0(prediction: str, output: Array, x_t: Array, alpha: Array, sigma: Array, data_std: float = 0.5) -> Array:
    """The x_0 that the network's output stands for."""
    a, b = coefficients(prediction, alpha, sigma, data_std)
    return (b * x_t - sigma * output) / (b * alpha - a * sigma)


def error_scale(prediction: str, alpha: Array, sigma: Array, data_std: float = 0.5) -> Array:
    """Error of x_0 over the error of the output that it comes from."""
    a, b = coefficients(prediction, alpha, sigma, data_std)
    return -sigma / (b * alpha - a * sigma)


LEAST = 0.05  # sigma, where a weight would grow without bound


def weight(weighting: str, prediction: str, alpha: Array, sigma: Array, data_std: float, gamma: float) -> Array:
    """Weight of the squared error of the output.

    'none'        1: what each of the papers that brought a prediction in minimises
    'min_snr'     error of x_0 times min(alpha^2 / sigma^2, gamma) (Hang et al. 2023, arXiv 2303.09556)
    'eps', 'v', 'flow'
                  the error of that prediction, whatever the network puts out: of large patches the image is more
                  easily predicted than noise or velocity (Li & He 2025, arXiv 2511.13720)
    'bound'       1, since another loss stands in its place: the terms of the variational bound
    """
    if weighting in ('none', 'bound'):
        return jnp.ones_like(alpha)
    sigma = jnp.maximum(sigma, 1e-6)  # 0 / 0 else
    of_x_0 = error_scale(prediction, alpha, sigma, data_std) ** 2
    if weighting == 'min_snr':
        return jnp.minimum((alpha / sigma) ** 2, gamma) * of_x_0
    return of_x_0 / error_scale(weighting, alpha, jnp.maximum(sigma, LEAST)) ** 2
