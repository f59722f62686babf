"""Edges of images against requested ones."""

import numpy as np
import pytest

from jaxgen.metrics import edges


def square(start: int, size: int = 10) -> np.ndarray:
    """A white square of 10 x 10 pixels on black, uint8 [1, 24, 24, 3]."""
    image = np.zeros((1, 24, 24, 3), np.uint8)
    image[:, start : start + size, start : start + size] = 255
    return image


def outline(start: int, size: int = 10) -> np.ndarray:
    """The outermost pixels of that square."""
    filled = square(start, size)[..., :1]
    filled[:, start + 1 : start + size - 1, start + 1 : start + size - 1] = 0
    return filled


def values(image, requested):
    return {name: float(x[0]) for name, x in edges.match(image, requested).items()}


def test_edges_of_a_square():
    """A step has an edge on either side of it: 36 pixels inside of a square's border and 44 outside, four of them
    corners, where the gradient is sqrt(2) / 4."""
    assert edges.detected(square(5)).sum() == 36 + 44
    assert values(square(5), outline(5)) == {'precision': 1.0, 'recall': 1.0, 'f1': 1.0}
    apart = values(square(1, 4), outline(15, 4))
    assert apart == {'precision': 0.0, 'recall': 0.0, 'f1': 0.0}


def test_edges_that_lack_or_are_too_many():
    nothing = np.full((1, 24, 24, 3), 200, np.uint8)
    assert values(nothing, outline(5)) == {'precision': 1.0, 'recall': 0.0, 'f1': 0.0}
    assert values(nothing, np.zeros((1, 24, 24, 1), np.uint8))['f1'] == 1
    two = square(1, 4) | square(14, 8)  # of two squares one was requested
    made = values(two, outline(14, 8))
    inside, outside = 4 * 8 - 4, 4 * 8 + 4
    of_small = 4 * 4 - 4 + 4 * 4 + 4
    assert made['recall'] == 1
    assert made['precision'] == pytest.approx((inside + outside) / (inside + outside + of_small))


def test_edges_are_by_contrast_and_channel():
    faint = (square(5) // 255 * 40).astype(np.uint8)
    assert not edges.detected(faint).any()  # a step of 40 / 255
    coloured = square(5)
    coloured[..., 1:] = 0
    np.testing.assert_array_equal(edges.detected(coloured), edges.detected(square(5)))
