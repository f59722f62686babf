"""Mean and covariance of features, and the Frechet distance between two such sets."""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import numpy as np

from jaxgen.errors import RunError, UserError

# Rows at a time: what is held in float64 beside the features.
ROWS = 4096


def finite(x, what: str = 'features') -> np.ndarray:
    """`x` [n, d] as a NumPy array.

    Raises:
      RunError: a value is not finite; names the first such row.
    """
    x = np.asarray(x)
    good = np.isfinite(x).all(1)
    if not good.all():
        raise RunError(f'{what} of sample {int(np.argmin(good))} are not finite')
    return x


class Moments(NamedTuple):
    """Sufficient statistics, for a Frechet distance, of n features with d dimensions."""

    n: int
    mean: np.ndarray  # float64 [d]
    scatter: np.ndarray  # float64 [d, d], sum of outer products of x - mean

    @staticmethod
    def empty(d: int) -> Moments:
        """The moments of no features."""
        return Moments(0, np.zeros(d), np.zeros((d, d)))

    @staticmethod
    def of(x) -> Moments:
        """The moments of features [n, d] of any float dtype, in float64.

        Raises:
          RunError: a feature is not finite.
        """
        x = finite(x)
        parts = (x[i : i + ROWS].astype(np.float64) for i in range(0, len(x), ROWS))
        centred = ((len(part), part.mean(0), part - part.mean(0)) for part in parts)
        return functools.reduce(merge, (Moments(n, mean, c.T @ c) for n, mean, c in centred), Moments.empty(x.shape[1]))

    def covariance(self) -> np.ndarray:
        """[d, d], divided by n - 1, as in TTUR, pytorch-fid and torch-fidelity.

        Raises:
          UserError: fewer than two samples.
        """
        if self.n < 2:
            raise UserError(f'a covariance needs two samples or more; there are {self.n}')
        return self.scatter / (self.n - 1)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets together, exact to rounding whatever the sizes and means (Chan et al. 1979)."""
    chex.assert_equal_shape((a.mean, b.mean))  # one number would broadcast
    n = a.n + b.n
    if n == 0:
        return a
    delta = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(delta, delta) * (a.n * b.n / n)
    return Moments(n, a.mean + delta * (b.n / n), scatter)


def root(covariance: np.ndarray) -> np.ndarray:
    """A [d, d] with A A^T = covariance. What is below an eigenvalue's rounding error counts as zero."""
    values, vectors = np.linalg.eigh(covariance)
    noise = len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors * np.sqrt(np.where(values > noise, values, 0))


def frechet(a: Moments, b: Moments) -> float:
    """Squared Frechet (2-Wasserstein) distance between the Gaussians with these moments.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) (Dowson & Landau 1982; the FID of Heusel et al.
    2017, eq. 6, for features of Inception). It depends on the number of samples: compare at equal n.

    The last trace is the sum of the singular values of A1^T A2 for any roots A A^T = S. So no rounding
    error is blown up by a square root, as happens to the zero eigenvalues of S1 S2 where features are
    linearly dependent, constant, or more than the samples.

    Raises:
      UserError: fewer than two samples on a side.
    """
    chex.assert_equal_shape((a.mean, b.mean))
    first, second = a.covariance(), b.covariance()
    cross = np.linalg.svd(root(first).T @ root(second), compute_uv=False).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(first) + np.trace(second) - 2 * cross
    return max(float(distance), 0.0)  # rounding of equal sets
