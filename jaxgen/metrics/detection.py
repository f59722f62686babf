"""Detection of anomalies by a score: the area under the ROC curve; NumPy in float64."""

from __future__ import annotations

import chex
import numpy as np

from jaxgen.errors import UserError
from jaxgen.metrics.moments import finite


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks of x [n] from 1, equal values sharing the mean of theirs."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[which]


def roc_auc(scores, anomalous) -> tuple[float, float]:
    """Area under the ROC curve: the probability that an anomalous example scores higher than a normal one, ties count
    half.

    By ranks, as the statistic of Mann and Whitney.

    Args:
      scores: [n], higher for examples that should be anomalous.
      anomalous: bool [n], which of them are.

    Returns:
      The area, from 0 to 1, and its standard error (DeLong et al. 1988): nan with one example of a kind.

    Raises:
      UserError: all examples are of one kind.
      RunError: a score is not finite.
    """
    scores, anomalous = finite(np.asarray(scores)[:, None], 'scores')[:, 0], np.asarray(anomalous, bool)
    chex.assert_equal_shape((scores, anomalous))
    m, n = int(anomalous.sum()), int((~anomalous).sum())
    if not m or not n:
        raise UserError(f'an ROC curve is of two kinds of examples; these are {m} anomalous and {n} normal ones')
    among_all = ranks(scores)
    # Of each example: the fraction of the other kind that it is on the right side of.
    higher = (among_all[anomalous] - ranks(scores[anomalous])) / n
    lower = 1 - (among_all[~anomalous] - ranks(scores[~anomalous])) / m
    with np.errstate(invalid='ignore', divide='ignore'):
        stderr = np.sqrt(higher.var(ddof=1) / m + lower.var(ddof=1) / n) if min(m, n) > 1 else np.nan
    return float(higher.mean()), float(stderr)
