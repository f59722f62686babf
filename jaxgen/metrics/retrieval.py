"""How well texts and images go together by their embeddings, [n, d]: text i is that of image i."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxgen.errors import UserError
from jaxgen.metrics.moments import finite

CANDIDATES = 100  # captions of one image's R-precision
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


def normalised(x: np.ndarray) -> np.ndarray:
    """Embeddings [n, d] of length 1, float64; one of zeros stays.

    Raises:
      RunError: one is not finite.
    """
    x = finite(x, 'embeddings').astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def clip_scores(images: np.ndarray, texts: np.ndarray, weight: float = 100.0) -> np.ndarray:
    """CLIP score of each pair, weight * max(cosine, 0), float64 [n] (Hessel et al. 2021, arXiv 2104.08718, section 3).

    Args:
      images, texts: embeddings [n, d] of any length.
      weight: 100, as most tables have it; the paper's w is 2.5.

    Raises:
      RunError: an embedding is not finite.
    """
    images, texts = (normalised(x) for x in (images, texts))
    return weight * np.maximum((images * texts).sum(1), 0)


def r_precision(
    images: np.ndarray, texts: np.ndarray, same: np.ndarray, candidates: int = CANDIDATES, seed: int = 2020
) -> np.ndarray:
    """Whether of `candidates` captions, an image's own and others at random, its own is the most similar, bool [n]: the
    mean is the R-precision with R = 1 (Xu et al. 2017, arXiv 1711.10485, section 4).

    One that another is as similar as is not the most similar.

    Args:
      images, texts: embeddings [n, d], compared by their cosines.
      same: int [n], equal for captions that are the same: these are not among the others.
      candidates: captions of each image.

    Raises:
      UserError: an image has fewer others.
      RunError: an embedding is not finite.
    """
    images, texts = (normalised(x) for x in (images, texts))
    n, others = len(texts), candidates - 1
    # Captions that are the same lie together in this order, and the others of one on both sides of its own.
    order = np.argsort(same, kind='stable')
    first, last = (np.searchsorted(same[order], same, side) for side in ('left', 'right'))
    most = int((last - first).max(initial=0))
    if others < 1 or n - most < others:
        raise UserError(
            f"R-precision takes {others} captions beside an image's own, and of {n} as few as {n - most} are others: "
            'draw more samples'
        )
    rng = np.random.default_rng(seed)
    right = np.zeros(n, bool)
    for i in range(n):
        drawn = rng.choice(n - (last[i] - first[i]), others, replace=False)
        wrong = order[np.where(drawn < first[i], drawn, drawn + last[i] - first[i])]
        right[i] = images[i] @ texts[i] > (texts[wrong] @ images[i]).max()
    return right
