"""Each corruption against a slow oracle."""

from __future__ import annotations

import functools

import jax
import numpy as np

from jaxgen.augmentation import corruptions

KEY = jax.random.key(0)
X = np.random.default_rng(0).uniform(-1, 1, (4, 8, 4, 3)).astype(np.float32)


def test_low_resolution_is_means_of_squares():
    x = np.asarray(X)
    small = np.stack([[x[:, i : i + 2, j : j + 2].mean((1, 2)) for j in (0, 2)] for i in (0, 2, 4, 6)])  # [4, 2, n, C]
    expected = np.kron(small.transpose(2, 3, 0, 1), np.ones((2, 2))).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(corruptions.low_resolution(x, 2), expected, rtol=1e-4, atol=1e-6)


def test_grey_is_luma():
    x = np.asarray(X)
    luma = 0.299 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2]
    np.testing.assert_allclose(corruptions.grey(x), np.stack([luma] * 3, -1), rtol=1e-5, atol=1e-6)
    whites = np.linspace(-1, 1, 48, dtype=np.float32).reshape(1, 4, 4, 3).mean(-1, keepdims=True).repeat(3, -1)
    np.testing.assert_allclose(corruptions.grey(whites), whites, atol=1e-6)  # grey stays what it is


def test_holes_are_squares_anywhere_alike():
    masks = np.asarray(jax.jit(lambda keys: corruptions.holes(keys, (5, 4), 3))(jax.random.split(KEY, 2000)))
    assert masks.shape == (2000, 5, 4, 1) and masks.dtype == bool
    places = set()
    for hole in masks[..., 0]:
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        assert hole.sum() == 9 and len(rows) == len(columns) == 3 and np.ptp(rows) == np.ptp(columns) == 2
        places.add((rows[0], columns[0]))
    assert places == {(i, j) for i in range(3) for j in range(2)}
    frequency = masks.mean(0)[..., 0]
    np.testing.assert_allclose(frequency, np.outer([1 / 3, 2 / 3, 1, 2 / 3, 1 / 3], [1 / 2, 1, 1, 1 / 2]), atol=0.05)


def test_blur_is_a_gaussian():
    point = np.zeros((1, 21, 21, 2), np.float32)
    point[0, 10, 10] = 1
    spread = np.asarray(corruptions.blurred(point, 1.7))
    y, x = np.mgrid[-10:11, -10:11]
    expected = np.exp(-(y**2 + x**2) / (2 * 1.7**2)) * (np.maximum(abs(y), abs(x)) <= 6)
    np.testing.assert_allclose(spread[0, ..., 0], expected / expected.sum(), atol=1e-6)
    np.testing.assert_allclose(corruptions.blurred(np.full((1, 5, 3, 1), 0.7), 2.0), 0.7, rtol=1e-5)
    np.testing.assert_array_equal(corruptions.blurred(X, 0.0), X)
    edge = np.zeros((1, 4, 9, 1), np.float32)
    edge[:, :, :2] = 1  # as if it went on for ever
    far = np.concatenate([np.ones((1, 4, 20, 1), np.float32), edge, np.zeros((1, 4, 20, 1), np.float32)], 2)
    np.testing.assert_allclose(
        corruptions.blurred(edge, 1.5), np.asarray(corruptions.blurred(far, 1.5))[:, :, 20:29], atol=1e-6
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(keys, size, widths):
    return corruptions.strokes(keys, size, widths)


def stroke(rng, height, width, widths) -> np.ndarray:
    """One stroke as the paper has it, pixel by pixel."""
    mean = np.hypot(height, width) / 8
    less, more = rng.uniform(0, 2 * np.pi / 15, 2)
    brush, pieces = rng.uniform(*widths), rng.integers(4, 12)
    at, covered = rng.uniform(0, 1, 2) * (height, width), np.zeros((height, width), bool)
    for i in range(pieces):
        angle = rng.uniform(2 * np.pi / 5 - less, 2 * np.pi / 5 + more)
        angle = 2 * np.pi - angle if i % 2 == 0 else angle
        length = np.clip(rng.normal(mean, mean / 2), 0, 2 * mean)
        to = np.clip(at + length * np.array([np.sin(angle), np.cos(angle)]), 0, (height, width))
        t = np.linspace(0, 1, 24)[:, None, None]
        y, x = np.mgrid[:height, :width] + 0.5
        covered |= (np.hypot(y - at[0] - t * (to - at)[0], x - at[1] - t * (to - at)[1]) < brush / 2).any(0)
        at = to
    return covered


def test_strokes_are_those_of_the_paper():
    """The fraction that is covered, where, and how long its border is, against a slow oracle."""
    size, widths, n = (24, 16), (2.0, 5.0), 1000
    drawn = np.asarray(draw(jax.random.split(KEY, n), size, widths))
    assert drawn.shape == (n, 24, 16, 1) and drawn.dtype == bool
    drawn, rng, expected = drawn[..., 0], np.random.default_rng(0), []
    for _ in range(200):
        mask = np.any([stroke(rng, *size, widths) for _ in range(rng.integers(1, 4))], 0)
        mask = mask[:, ::-1] if rng.random() < 0.5 else mask
        expected.append(mask[::-1] if rng.random() < 0.5 else mask)

    def statistics(masks):
        masks = np.asarray(masks)
        border = (masks[:, 1:] != masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))
        rows = masks.mean(2) @ np.abs(np.arange(24) - 11.5)
        return np.stack([masks.mean((1, 2)), border, rows], 1)

    a, b = statistics(drawn), statistics(expected)
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    assert (np.abs(a.mean(0) - b.mean(0)) < 4 * error).all(), (a.mean(0), b.mean(0), error)
    np.testing.assert_allclose(a.std(0), b.std(0), rtol=0.2)
    np.testing.assert_allclose(drawn.mean(0), drawn.mean(0)[::-1, ::-1], atol=0.05)  # no side is favoured


def test_a_mask_is_a_function_of_its_key():
    keys = jax.random.split(KEY, 1000)
    masks = np.asarray(draw(keys, (24, 16), (2.0, 5.0)))
    np.testing.assert_array_equal(masks[::-1], draw(keys[::-1], (24, 16), (2.0, 5.0)))
    assert all(mask.any() and not mask.all() for mask in masks)
