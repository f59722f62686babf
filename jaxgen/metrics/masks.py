"""The object in images against the mask that it was requested to have: intersection over union of pixels."""

from __future__ import annotations

import numpy as np

FARTHEST = 40  # of the pixels one in so many, those that differ most from the background, have the object's colour
CONTRAST = 0.1  # least distance of the object's colour from the background's, of values from 0 to 1, in any channel


def background(images: np.ndarray) -> np.ndarray:
    """What images float32 [n, H, W, C] would be without an object: in each channel the linear function of height and
    width that fits the pixels of the image's border best, without the fifth of them that it fits worst."""
    n, height, width = images.shape[:3]
    rows, columns = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing='ij')
    plane = np.stack([np.ones_like(rows), rows, columns], -1).astype(np.float32)
    at = np.zeros((height, width), bool)
    at[[0, -1]] = at[:, [0, -1]] = True
    points, made = plane[at], np.empty_like(images)
    for i in range(n):
        values = images[i][at]
        fit = np.linalg.lstsq(points, values, rcond=None)[0]
        far = np.abs(points @ fit - values).max(-1)
        near = far <= np.quantile(far, 0.8)
        made[i] = plane @ np.linalg.lstsq(points[near], values[near], rcond=None)[0]
    return made


def objects(images: np.ndarray) -> np.ndarray:
    """bool [n, H, W]: the pixels of uint8 images [n, H, W, C] that are nearer to the object's colour than to the
    background's, which the border shows. The object's is the median of the pixels that differ most; an image in which
    these differ by less than CONTRAST has none."""
    x = images.astype(np.float32) / 255
    x = x - background(x)
    n, count = len(x), max(x[0, ..., 0].size // FARTHEST, 1)
    flat = x.reshape(n, -1, x.shape[-1])
    most = np.argsort(-np.square(flat).sum(-1), 1)[:, :count, None]
    colour = np.median(np.take_along_axis(flat, most, 1), 1)[:, None, None]
    there = (x * colour).sum(-1) > np.square(colour).sum(-1) / 2
    return there & (np.abs(colour).max(-1) >= CONTRAST)


def match(images: np.ndarray, requested: np.ndarray) -> dict[str, np.ndarray]:
    """'iou', the pixels that are in the object and in the requested mask, of those that are in either, [n]; 1 where
    there are none.

    Args:
      images: uint8 [n, H, W, C].
      requested: uint8 [n, H, W, 1], the object white.
    """
    there, wanted = objects(images), requested[..., 0] > 127
    either = (there | wanted).sum((1, 2))
    return {'iou': np.where(either, (there & wanted).sum((1, 2)) / np.maximum(either, 1), 1.0)}
