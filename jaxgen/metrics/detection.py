"""How well one number tells two kinds of examples apart; NumPy in float64."""

from __future__ import annotations

import numpy as np

from jaxgen.errors import UserError
from jaxgen.metrics.moments import finite


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks of x [n] from 1, equal values sharing the mean of theirs."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[which]


def roc_auc(scores, odd) -> tuple[float, float]:
    """Area under the ROC curve: the chance that an odd example scores higher than a usual one, ties counting half.

    By ranks, as the statistic of Mann and Whitney.

    Args:
      scores: [n], higher for what should be odd.
      odd: bool [n], which of them are.

    Returns:
      The area, from 0 to 1, and its standard error (DeLong et al. 1988): nan with one example of a kind.

    Raises:
      UserError: all examples are of one kind.
      RunError: a score is not finite.
    """
    scores, odd = finite(np.asarray(scores)[:, None], 'scores')[:, 0], np.asarray(odd, bool)
    m, n = int(odd.sum()), int((~odd).sum())
    if not m or not n:
        raise UserError(f'an ROC curve is of two kinds of examples; these are {m} odd and {n} usual ones')
    among_all = ranks(scores)
    # Of each example: the share of the other kind that it is on the right side of.
    higher = (among_all[odd] - ranks(scores[odd])) / n
    lower = 1 - (among_all[~odd] - ranks(scores[~odd])) / m
    with np.errstate(invalid='ignore', divide='ignore'):
        stderr = np.sqrt(higher.var(ddof=1) / m + lower.var(ddof=1) / n) if min(m, n) > 1 else np.nan
    return float(higher.mean()), float(stderr)
