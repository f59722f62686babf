"""How well texts and images that belong together find each other by their embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROWS = 1024  # of the matrix of similarities at a time


def recall(
    queries: np.ndarray, answers: np.ndarray, right: tuple[np.ndarray, np.ndarray], ks: Sequence[int]
) -> dict[int, float]:
    """{k: fraction of the queries of whose k most similar answers one at least is right}, recall@k.

    Answers that are as similar as a right one count as more similar, so that embeddings which are all alike find
    nothing.

    Args:
      queries, answers: embeddings [n, d] and [m, d]; the similarity is their product.
      right: int [n] of the queries and [m] of the answers: an answer is right where the numbers are equal.
      ks: each from 1 to m.
    """
    of_queries, of_answers = right
    best = []
    for start in range(0, len(queries), ROWS):
        similarity = queries[start : start + ROWS] @ answers.T
        equal = of_queries[start : start + ROWS, None] == of_answers
        highest = np.where(equal, similarity, -np.inf).max(1)
        best.append(((similarity >= highest[:, None]) & ~equal).sum(1))
    rank = np.concatenate(best)
    return {k: float((rank < k).mean()) for k in ks}
