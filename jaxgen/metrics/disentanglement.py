"""Disentanglement: how far the axes of a latent space are the factors of variation of the data; NumPy in float64."""

from __future__ import annotations

import chex
import numpy as np

from jaxgen.errors import UserError
from jaxgen.metrics.moments import finite

BINS = 20  # of a latent's range, as in Locatello et al. 2019


def entropy(counts: np.ndarray) -> float:
    """Entropy of the probabilities in proportion to counts [...], nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def binned(latents: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Indices of the bins of latents [n, d], 0 to bins - 1: even parts of each one's range."""
    low, high = latents.min(0), latents.max(0)
    position = (latents - low) / np.where(high > low, high - low, 1) * bins
    return np.minimum(position.astype(np.int64), bins - 1)


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information of two columns of integers [n], 0 or more, by their counts, nats. It is biased upwards where
    examples are few."""
    counts = np.zeros((a.max() + 1, b.max() + 1), np.int64)
    np.add.at(counts, (a, b), 1)
    return entropy(counts.sum(0)) + entropy(counts.sum(1)) - entropy(counts)


def check(latents, factors) -> tuple[np.ndarray, np.ndarray]:
    """The two as arrays; raises UserError where latents are no vectors of two numbers or more."""
    latents, factors = finite(latents, 'latents').astype(np.float64), np.asarray(factors)
    chex.assert_rank(factors, 2)
    chex.assert_equal_shape_prefix((latents, factors), 1)
    if latents.ndim != 2 or latents.shape[1] < 2:
        raise UserError(f'disentanglement is of latents of two numbers or more; these are {latents.shape[1:]}')
    return latents, factors


def normalised_information(latents, factors, bins: int = BINS) -> np.ndarray:
    """Mutual information of each factor and each latent over the factor's entropy, [k, d] from 0 to 1; nan for a factor
    that is the same in all examples. Arguments as below.
    """
    latents, factors = check(latents, factors)
    indices = binned(latents, bins)
    information = np.full((factors.shape[1], indices.shape[1]), np.nan)
    for i, factor in enumerate(factors.T):
        h = entropy(np.bincount(factor))
        if h > 0:
            information[i] = [mutual_information(index, factor) / h for index in indices.T]
    return information


def mutual_information_gap(latents, factors, bins: int = BINS) -> tuple[float, np.ndarray]:
    """MIG (Chen et al. 2018, arXiv 1802.04942, eq. 6): the difference between the two highest mutual informations of a
    factor with a latent, over the factor's entropy; mean over factors.

    The information is that of the means of q(z | x), each in even bins (Locatello et al. 2019, arXiv 1811.12359),
    where the paper took that of draws from q: so it is a metric of any encoder.

    Args:
      latents: [n, d], d of 2 or more.
      factors: integers [n, k], 0 or more.

    Returns:
      The mean gap, 0 (no factor has a latent of its own) to 1, and the gap of each factor [k]: nan for one that is the
      same in all examples, which the mean goes without.

    Raises:
      UserError: latents of one number, or no factor that differs.
      RunError: a latent is not finite.
    """
    ordered = np.sort(normalised_information(latents, factors, bins), 1)
    gaps = ordered[:, -1] - ordered[:, -2]
    if np.isnan(gaps).all():
        raise UserError('no factor differs between these examples: there is nothing to disentangle')
    return float(np.nanmean(gaps)), gaps


def beta_vae_score(
    latents, factors, votes: int = 5000, held_out: int = 5000, pairs: int = 64, seed: int = 0
) -> tuple[float, float]:
    """The disentanglement score of Higgins et al. 2017 (beta-VAE, appendix A.4): whether a linear classifier predicts
    which factor is equal in pairs of examples, by the mean of |difference of their latents| over `pairs` of them.

    The pairs are drawn from these examples: any one, and another with the same value of the factor. The latents are
    the means of q(z | x). Numbers are those of Locatello et al. 2019.

    Args:
      latents: [n, d], d of 2 or more.
      factors: integers [n, k]. Those that are the same in all examples are left out.
      votes, held_out: means that the classifier is trained on, and others that it is tested on.

    Returns:
      Accuracy, 1 / k for latents without information, and its standard error (of the votes; the examples are fixed).

    Raises:
      UserError: latents of one number, or fewer than two factors that differ.
      RunError: a latent is not finite.
    """
    from sklearn.linear_model import LogisticRegression

    latents, factors = check(latents, factors)
    differ = [i for i, factor in enumerate(factors.T) if factor.min() < factor.max()]
    if len(differ) < 2:
        raise UserError('the score needs two or more factors that differ between the examples')
    rng = np.random.default_rng(seed)
    shared = rng.choice(differ, votes + held_out)
    differences = np.empty((votes + held_out, latents.shape[1]))
    for i in differ:
        rows = np.flatnonzero(shared == i)
        factor = factors[:, i]
        order = np.argsort(factor, kind='stable')  # examples of one value side by side
        start = np.searchsorted(factor[order], factor, 'left')
        count = np.searchsorted(factor[order], factor, 'right') - start
        first = rng.integers(len(latents), size=(len(rows), pairs))
        second = order[start[first] + (rng.random(first.shape) * count[first]).astype(np.int64)]
        for row, a, b in zip(rows, first, second, strict=True):
            differences[row] = np.abs(latents[a] - latents[b]).mean(0)
    classifier = LogisticRegression(max_iter=1000).fit(differences[:votes], shared[:votes])
    accuracy = float(classifier.score(differences[votes:], shared[votes:]))
    return accuracy, float(np.sqrt(accuracy * (1 - accuracy) / held_out))
