"""Edges of images against those that they were requested to have: precision, recall and F1 of pixels."""

from __future__ import annotations

import numpy as np

STEP = 0.2  # least height of a step between two pixels, of values from 0 to 1, that is an edge
TOLERANCE = 1  # pixels by which an edge may lie beside another one (Martin et al. 2004 match within a distance)


def detected(images: np.ndarray) -> np.ndarray:
    """bool [n, H, W]: where the gradient of uint8 images [n, H, W, C] by Sobel's operator, in any channel, is that of a
    step of at least STEP."""
    x = np.pad(images.astype(np.float32) / 255, ((0, 0), (1, 1), (1, 1), (0, 0)), 'edge')
    smooth = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    across = (smooth[:, :, 2:] - smooth[:, :, :-2]) / 4
    smooth = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    down = (smooth[:, 2:] - smooth[:, :-2]) / 4
    return np.sqrt(across**2 + down**2).max(-1) >= STEP


def widened(edges: np.ndarray, by: int = TOLERANCE) -> np.ndarray:
    """Edges [n, H, W] with all pixels at most `by` rows and columns away."""
    _, height, width = edges.shape
    x = np.pad(edges, ((0, 0), (by, by), (by, by)))
    shifts = [(i, j) for i in range(2 * by + 1) for j in range(2 * by + 1)]
    return np.any([x[:, i : i + height, j : j + width] for i, j in shifts], 0)


def fraction(edges: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of edges [n, H, W] those within TOLERANCE of the others, [n]; 1 where there are none."""
    near = (edges & widened(others)).sum((1, 2))
    count = edges.sum((1, 2))
    return np.where(count, near / np.maximum(count, 1), 1.0)


def match(images: np.ndarray, requested: np.ndarray) -> dict[str, np.ndarray]:
    """'precision' (of the edges of images, those that were requested), 'recall' (of those that were requested, those
    that are there) and 'f1', their harmonic mean, [n] each.

    Args:
      images: uint8 [n, H, W, C].
      requested: uint8 [n, H, W, 1], edges white.
    """
    there, wanted = detected(images), requested[..., 0] > 127
    precision, recall = fraction(there, wanted), fraction(wanted, there)
    both = precision + recall
    return {
        'precision': precision,
        'recall': recall,
        'f1': np.where(both > 0, 2 * precision * recall / np.maximum(both, 1e-12), 0.0),
    }
