"""DiffAugment against loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.augmentation import diff_augment

KINDS = tuple(diff_augment.AUGMENTATIONS)


def images(n: int = 40, shape=(8, 16, 3)):
    return jax.random.uniform(jax.random.key(0), (n, *shape), minval=0.2, maxval=1.0)  # 0 is what moves in


def moved(x: np.ndarray, down: int, right: int) -> np.ndarray:
    """One image moved by whole pixels; 0 moves in."""
    out = np.zeros_like(x)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            if 0 <= i - down < x.shape[0] and 0 <= j - right < x.shape[1]:
                out[i, j] = x[i - down, j - right]
    return out


def test_translation_is_by_whole_pixels_up_to_an_eighth():
    x = images()
    got, moves = np.asarray(jax.jit(diff_augment.translation)(x, jax.random.key(1))), set()
    for before, after in zip(np.asarray(x), got, strict=True):
        matches = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-3, 4)
            if np.array_equal(moved(before, down, right), after)
        ]
        assert len(matches) == 1
        moves.add(matches[0])
    assert {down for down, _ in moves} == {-1, 0, 1} and {right for _, right in moves} == {-2, -1, 0, 1, 2}


def test_cutout_is_one_hole_of_half_the_side():
    x = np.asarray(images())
    got, sizes = np.asarray(jax.jit(diff_augment.cutout)(x, jax.random.key(1))), set()
    for before, after in zip(x, got, strict=True):
        hole = (after == 0).all(-1)
        rows, columns = hole.any(1), hole.any(0)
        assert (hole == rows[:, None] & columns[None]).all() and (after[~hole] == before[~hole]).all()
        for line in (rows, columns):
            assert np.abs(np.diff(line.astype(int), prepend=0, append=0)).sum() == 2, 'in one piece'
        sizes.add((int(rows.sum()), int(columns.sum())))
    assert max(sizes) == (4, 8) and len(sizes) > 5, 'whole in the middle, cut off at the edges'


def test_colour_is_light_saturation_and_contrast_of_each_picture():
    x = images()
    got = np.asarray(jax.jit(diff_augment.colour)(x, jax.random.key(1)))
    light, saturation, contrast = np.asarray(jax.random.uniform(jax.random.key(1), (3, len(x))))
    for i, before in enumerate(np.asarray(x, np.float64)):
        y = before + light[i] - 0.5
        grey = y.mean(-1, keepdims=True)
        y = grey + 2 * saturation[i] * (y - grey)
        want = y.mean() + (0.5 + contrast[i]) * (y - y.mean())
        np.testing.assert_allclose(got[i], want, atol=1e-5)


@pytest.mark.parametrize('kinds', [(), *((kind,) for kind in KINDS), KINDS], ids=str)
def test_gradients_reach_the_picture_and_no_other(kinds):
    x = images(3, (8, 8, 1))

    def of_second(x):
        return diff_augment.augment(x, jax.random.key(2), kinds)[1].sum()

    slope = np.asarray(jax.jit(jax.grad(of_second))(x))
    assert np.abs(slope[1]).sum() > 5 and (slope[[0, 2]] == 0).all()
    y = jax.jit(lambda x: diff_augment.augment(x, jax.random.key(2), kinds))(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert np.array_equal(y, x) == (not kinds)
    half = diff_augment.augment(x.astype(jnp.bfloat16), jax.random.key(2), kinds)
    np.testing.assert_allclose(half.astype(jnp.float32), y, atol=0.03)
