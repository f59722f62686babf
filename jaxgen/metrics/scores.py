"""Inception score, kernel distances and balance of classes; NumPy in float64."""

from __future__ import annotations

import chex
import numpy as np

from jaxgen.errors import UserError
from jaxgen.metrics.moments import finite

ROWS = 1024  # of a matrix of pairs at a time


def log_sum_exp(x: np.ndarray, axis: int) -> np.ndarray:
    """log sum exp x over an axis, which is kept with length 1."""
    top = x.max(axis, keepdims=True)
    return top + np.log(np.exp(x - top).sum(axis, keepdims=True))


def inception_score(logits, splits: int = 10) -> tuple[float, float]:
    """Inception score (Salimans et al. 2016, section 4): exp E KL(p(y | x) || p(y)), between 1 and c.

    Args:
      logits: of a classifier, [n, c]. They are split in their order, part i from row
        i n // splits on, and p(y) is the mean over a part.

    Returns:
      Mean and standard deviation (ddof 0) over the parts.

    Raises:
      UserError: fewer samples than parts.
      RunError: a logit is not finite.
    """
    logits = finite(logits, 'logits')
    n = len(logits)
    if n < splits:
        raise UserError(f'the Inception score takes {splits} parts of the samples; there are only {n} samples')
    scores = []
    for i in range(splits):
        part = logits[i * n // splits : (i + 1) * n // splits].astype(np.float64)
        log_p = part - log_sum_exp(part, 1)
        log_marginal = log_sum_exp(log_p, 0) - np.log(len(part))
        scores.append(np.exp((np.exp(log_p) * (log_p - log_marginal)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(x, y, subsets: int = 100, size: int = 1000, seed: int = 2020) -> tuple[float, float]:
    """Kernel distance (KID for features of Inception; Binkowski et al. 2018, section 4).

    Squared maximum mean discrepancy of the kernel (x . y / d + 1)^3, estimated without bias (so it may
    be below 0) on random subsets, each drawn without replacement. Subsets are drawn as torch-fidelity
    draws them: the same features give the same distance.

    Args:
      x, y: features, [n, d] and [m, d].
      subsets, size: how many, and how many samples of either side are in each.

    Returns:
      Mean and standard deviation (ddof 0) over the subsets.

    Raises:
      UserError: a side has fewer than `size` samples, or `size` is below 2.
      RunError: a feature is not finite.
    """
    x, y = finite(x), finite(y)
    if not 2 <= size <= min(len(x), len(y)):
        raise UserError(f'the kernel distance needs subsets of 2 to {min(len(x), len(y))} samples; they are of {size}')

    def kernel(a, b):
        k = a @ b.T / a.shape[1] + 1
        return k * k * k

    rng = np.random.RandomState(seed)
    estimates = []
    for _ in range(subsets):
        a, b = (s[rng.choice(len(s), size, replace=False)].astype(np.float64) for s in (x, y))
        within = [(k.sum() - np.trace(k)) / (size * (size - 1)) for k in (kernel(a, a), kernel(b, b))]
        estimates.append(sum(within) - 2 * kernel(a, b).mean())
    return float(np.mean(estimates)), float(np.std(estimates))


def gaussian_discrepancy(x, y, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Squared maximum mean discrepancy with the kernel exp(-|a - b|^2 / (2 sigma^2)), times `scale`: CMMD, where x
    and y are CLIP's embeddings of images, of length 1 (Jayasumana et al. 2024, arXiv 2401.09603, section 5).

    As in the published code it is the mean over all pairs, also of an image with itself (the biased estimate, at least
    0), and embeddings are taken as they are.

    Args:
      x, y: features, [n, d] and [m, d].

    Raises:
      UserError: a side is empty, or they have different dimensions.
      RunError: a feature is not finite.
    """
    x, y = (finite(s).astype(np.float64) for s in (x, y))
    if not len(x) or not len(y) or x.shape[1] != y.shape[1]:
        raise UserError(f'a discrepancy needs features of one dimension on both sides; they are {x.shape}, {y.shape}')

    def mean(a, b):
        """Of the kernel, less 1: what is left of all means is far smaller."""
        squares, total = np.square(b).sum(1), 0.0
        for part in np.array_split(a, -(-len(a) // ROWS)):
            distance = np.square(part).sum(1)[:, None] + squares - 2 * part @ b.T
            total += np.expm1(-np.maximum(distance, 0) / (2 * sigma**2)).sum()
        return total / (len(a) * len(b))

    return float(max(scale * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), 0.0))


def modes_covered(points, weights, means, stds, within: float = 3.0) -> tuple[float, int, float]:
    """Mode coverage of a mixture of Gaussians by samples (VEEGAN, Srivastava et al. 2017; PacGAN, Lin et al. 2018).

    A point is good if it is within 3 standard deviations of a mean; that mode is then covered.

    Args:
      points: [n, d].
      weights, means, stds: of the mixture, [k], [k, d] and [k].

    Returns:
      Fraction of good points (0.989 of draws from the mixture where d = 2), number of modes covered, and
      KL(distribution of good points over modes || weights) in nats, infinite where no point is good.
    """
    points = finite(points, 'points').astype(np.float64)
    weights, means, stds = (np.asarray(x, np.float64) for x in (weights, means, stds))
    chex.assert_shape((weights, stds), (len(means),))
    chex.assert_shape(points, (None, means.shape[1]))
    distance = np.sqrt(np.square(points[:, None] - means).sum(-1)) / stds  # [n, k]
    good = distance.min(1) <= within
    counts = np.bincount(distance.argmin(1)[good], minlength=len(means))
    covered = counts > 0
    p = counts[covered] / max(counts.sum(), 1)
    kl = float((p * np.log(p / weights[covered])).sum()) if covered.any() else np.inf
    return float(good.mean()), int(covered.sum()), kl


def class_balance(logits, counts) -> tuple[int, float]:
    """Coverage of the classes by samples, and its balance (VEEGAN, Srivastava et al. 2017; PacGAN, Lin et al. 2018).

    Every sample counts as the class of its largest logit.

    Args:
      logits: of the samples, [n, c].
      counts: how many of the data are of each class, [c], by the same classifier if it errs. A class that
        none of them is of counts as one: a sample of it must cost something, but not infinity.

    Returns:
      Number of classes with a sample, and KL(class distribution of the samples || that of the data) in nats.

    Raises:
      RunError: a logit is not finite.
    """
    logits, counts = finite(logits, 'logits'), np.asarray(counts, np.float64)
    chex.assert_shape(counts, (logits.shape[1],))
    samples = np.bincount(logits.argmax(1), minlength=logits.shape[1])
    data = np.maximum(counts, 1)
    covered = samples > 0
    p = samples[covered] / samples.sum()
    return int(covered.sum()), float((p * np.log(p / (data / data.sum())[covered])).sum())
