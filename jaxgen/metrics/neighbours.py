"""Fidelity, diversity and copying, by nearest neighbours in feature space.

Around each sample lies a ball whose radius is the distance to its k-th nearest neighbour in its own set; itself is
left out by its index, so duplicates are neighbours at distance 0. Balls are closed; in the published
code of density and coverage they are open, which differs where distances are exactly equal.

Distances are taken in float32 as |x|^2 + |y|^2 - 2 x . y, after centring. What is smaller than the
rounding error of that counts as 0: copies, and samples nearer than about 0.1 % (d = 8) to 0.5 %
(d = 2048) of their distance from the mean.
"""

from __future__ import annotations

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.errors import UserError
from jaxgen.metrics.moments import finite

Array = jax.Array

# Rows of a distance matrix that are held at a time.
CHUNK = 1024


def squared_distances(x: Array, y: Array) -> Array:
    """Squared Euclidean distances of x [n, d] and y [m, d]: [n, m]."""
    squares = jnp.square(x).sum(1)[:, None] + jnp.square(y).sum(1)
    distances = squares - 2 * jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    noise = 2 * jnp.finfo(jnp.float32).eps * math.sqrt(x.shape[1]) * squares
    return jnp.where(distances > noise, distances, 0)


def chunks(x: Array) -> tuple[Array, Array]:
    """The rows of x [n, ...], cut into [chunks, rows, ...] with zeros at the end, and their indices [chunks, rows]."""
    n = -(-len(x) // CHUNK)
    rows = -(-len(x) // n)
    x = jnp.pad(x, [(0, n * rows - len(x))] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(n, rows, *x.shape[1:]), jnp.arange(n * rows).reshape(n, rows)


@functools.partial(jax.jit, static_argnames='ks')
def radii(x: Array, ks: tuple[int, ...]) -> Array:
    """Squared distance from each x [n, d] to its k-th nearest other one, for each k: [n, len(ks)]."""

    def some(part):
        rows, index = part
        distances = jnp.where(index[:, None] == jnp.arange(len(x)), jnp.inf, squared_distances(rows, x))
        nearest = -jax.lax.top_k(-distances, max(ks))[0]
        return nearest[:, jnp.array(ks) - 1]

    return jax.lax.map(some, chunks(x)).reshape(-1, len(ks))[: len(x)]


@jax.jit
def each_sample(real: Array, fake: Array, real_radii: Array, fake_radii: Array) -> dict[str, Array]:
    """The terms of the means of `neighbourhood`: of 'precision', 'density' and 'authenticity' one for each of fake
    [m, d], of 'recall' and 'coverage' one for each of real [n, d].

    Args:
      real_radii: squared, [n, 3]: to the nearest one, for precision, for density.
      fake_radii: squared, [m].
    """
    nearest_radii, precision_radii, density_radii = real_radii.T

    def step(carry, part):
        recalled, nearest_fake = carry
        (rows, index), (radius, _) = part
        distances = squared_distances(rows, real)
        distances = jnp.where((index < len(fake))[:, None], distances, jnp.inf)
        recalled |= (distances <= radius[:, None]).any(0)
        nearest_fake = jnp.minimum(nearest_fake, distances.min(0))
        terms = {
            'precision': (distances <= precision_radii).any(1),
            'density': (distances <= density_radii).sum(1),
            'authenticity': distances.min(1) > nearest_radii[distances.argmin(1)],
        }
        return (recalled, nearest_fake), terms

    start = (jnp.zeros(len(real), bool), jnp.full(len(real), jnp.inf))
    (recalled, nearest_fake), terms = jax.lax.scan(step, start, (chunks(fake), chunks(fake_radii)))
    terms = {name: values.reshape(-1)[: len(fake)] for name, values in terms.items()}
    return {**terms, 'recall': recalled, 'coverage': nearest_fake <= density_radii}


def neighbourhood(real, fake, k_precision: int = 3, k_density: int = 5) -> dict[str, float]:
    """Five fractions, one for each kind of failure.

    Args:
      real: features of data, [n, d]. For 'authenticity' it must be all the data that were trained on:
        a copy of an image that is not among them passes.
      fake: features of samples, [m, d].
      k_precision, k_density: which neighbour is the radius of a ball; the second for density and coverage.

    Returns:
      'precision': of fakes, in a real sample's ball; 'recall': of real ones, in a fake's ball
        (Kynkaanniemi et al. 2019, arXiv 1904.06991).
      'density': real samples' balls that a fake lies in, over k, mean; 1 for equal distributions, may be
        above. 'coverage': of real samples, with a fake in their ball (Naeem et al. 2020, arXiv 2002.09797).
      'authenticity': of fakes, farther from the nearest real sample than that one is from the nearest other
        real one (Alaa et al. 2022, arXiv 2102.08921). Copies score 0, also those of data that occur twice.

    Raises:
      UserError: a side has k samples or fewer.
      RunError: a feature is not finite.
    """
    real, fake = finite(real, 'real features'), finite(fake, 'fake features')
    chex.assert_equal(real.shape[1], fake.shape[1])
    k = max(k_precision, k_density)
    if min(len(real), len(fake)) <= k:
        raise UserError(
            f'{k} nearest neighbours need {k + 1} samples or more on either side: '
            f'there are {len(real)} real and {len(fake)} fake ones'
        )
    mean = real.mean(0, dtype=np.float64)
    # Subtracted in no less than the features' own precision, so that an offset costs no digits.
    real, fake = (
        np.subtract(x, mean, dtype=np.result_type(x, np.float32), casting='same_kind').astype(np.float32)
        for x in (real, fake)
    )
    terms = each_sample(real, fake, radii(real, (1, k_precision, k_density)), radii(fake, (k_precision,))[:, 0])
    means = {name: float(np.mean(values, dtype=np.float64)) for name, values in jax.device_get(terms).items()}
    return {**means, 'density': means['density'] / k_density}
