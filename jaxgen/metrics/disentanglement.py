"""How far the axes of a code are the factors that the data were made of; NumPy in float64."""

from __future__ import annotations

import numpy as np

from jaxgen.errors import UserError
from jaxgen.metrics.moments import finite

BINS = 20  # of a latent's range, as in Locatello et al. 2019


def entropy(counts: np.ndarray) -> float:
    """Of shares in proportion to counts [...], nats."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def in_bins(latents: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Latents [n, d] as integers from 0 to bins - 1: even parts of each one's range."""
    low, high = latents.min(0), latents.max(0)
    place = (latents - low) / np.where(high > low, high - low, 1) * bins
    return np.minimum(place.astype(np.int64), bins - 1)


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Of two columns of integers [n], 0 or more, by their counts: nats. It is a little too large for few examples."""
    counts = np.zeros((a.max() + 1, b.max() + 1), np.int64)
    np.add.at(counts, (a, b), 1)
    return entropy(counts.sum(0)) + entropy(counts.sum(1)) - entropy(counts)


def check(latents, factors) -> tuple[np.ndarray, np.ndarray]:
    latents, factors = finite(latents, 'latents').astype(np.float64), np.asarray(factors)
    if latents.ndim != 2 or latents.shape[1] < 2:
        raise UserError(f'disentanglement is of codes of two numbers or more; these are {latents.shape[1:]}')
    return latents, factors


def normalised_information(latents, factors, bins: int = BINS) -> np.ndarray:
    """How much each latent knows of each factor: their mutual information in shares of the factor's entropy, [k, d]
    from 0 to 1; nan for a factor that is the same in all examples. Arguments as below.
    """
    latents, factors = check(latents, factors)
    codes = in_bins(latents, bins)
    found = np.full((factors.shape[1], codes.shape[1]), np.nan)
    for i, factor in enumerate(factors.T):
        whole = entropy(np.bincount(factor))
        if whole > 0:
            found[i] = [mutual_information(code, factor) / whole for code in codes.T]
    return found


def mutual_information_gap(latents, factors, bins: int = BINS) -> tuple[float, np.ndarray]:
    """MIG (Chen et al. 2018, arXiv 1802.04942, eq. 6): how much more the best latent knows of a factor than the
    second best, in shares of the factor's entropy; mean over factors.

    The information is that of the means of q(z | x), each in even bins (Locatello et al. 2019, arXiv 1811.12359),
    where the paper took that of draws from q: so it is a figure of any encoder.

    Args:
      latents: [n, d], d of 2 or more.
      factors: integers [n, k], 0 or more.

    Returns:
      The mean gap, 0 (no factor has a latent of its own) to 1, and the gap of each factor [k]: nan for one that is the
      same in all examples, which the mean goes without.

    Raises:
      UserError: a code of one number, or no factor that differs.
      RunError: a latent is not finite.
    """
    ordered = np.sort(normalised_information(latents, factors, bins), 1)
    gaps = ordered[:, -1] - ordered[:, -2]
    if np.isnan(gaps).all():
        raise UserError('no factor differs between these examples: there is nothing to tell apart')
    return float(np.nanmean(gaps)), gaps


def beta_vae_score(
    latents, factors, votes: int = 5000, held_out: int = 5000, pairs: int = 64, seed: int = 0
) -> tuple[float, float]:
    """The disentanglement score of Higgins et al. 2017 (beta-VAE, appendix A.4): whether a linear classifier tells
    which factor pairs of examples share, by the mean of |difference of their codes| over `pairs` of them.

    The pairs are drawn from the examples given: any one, and another with the same value of the factor. The code is
    the mean of q(z | x). Numbers are those of Locatello et al. 2019.

    Args:
      latents: [n, d], d of 2 or more.
      factors: integers [n, k]. Those that are the same in all examples are left out.
      votes, held_out: means that the classifier learns from, and others that it is measured with.

    Returns:
      Accuracy, 1 / k for a code that says nothing, and its standard error (of the votes; the examples are given).

    Raises:
      UserError: a code of one number, or fewer than two factors that differ.
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
