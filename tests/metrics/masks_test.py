"""Objects in images against requested masks."""

import numpy as np
import pytest

from jaxgen.data import shapes
from jaxgen.metrics import masks


def square(start: int, size: int = 10) -> np.ndarray:
    """A mask of a square, uint8 [1, 24, 24, 1]."""
    mask = np.zeros((1, 24, 24, 1), np.uint8)
    mask[:, start : start + size, start : start + size] = 255
    return mask


def painted(mask: np.ndarray) -> np.ndarray:
    """Orange on a grey that darkens to the right and downwards."""
    light = np.linspace(150, 110, 24)[None, :, None, None] + np.linspace(0, -20, 24)[None, None, :, None]
    return np.where(mask > 127, np.array([250, 120, 20]), light).astype(np.uint8)


def iou(images, requested) -> float:
    return float(masks.match(images, requested)['iou'][0])


def test_a_square_on_a_background_that_darkens():
    np.testing.assert_array_equal(masks.objects(painted(square(5)))[0], square(5)[0, ..., 0] > 0)
    assert iou(painted(square(5)), square(5)) == 1
    # 10 x 10 beside 10 x 10, moved by 4 pixels: 6 x 6 are in both
    assert iou(painted(square(5)), square(9)) == pytest.approx(36 / (200 - 36))
    assert iou(painted(square(2, 6)), square(12, 6)) == 0


def test_no_object():
    nothing = painted(np.zeros((1, 24, 24, 1), np.uint8))
    assert not masks.objects(nothing).any()
    assert iou(nothing, square(5)) == 0 and iou(nothing, 0 * square(5)) == 1
    assert iou(painted(square(5)), 0 * square(5)) == 0
    grey = painted(square(5))[..., :1]
    grey[square(5) > 0] = 20
    assert iou(grey, square(5)) == 1  # a dark object of images of one channel


def test_objects_of_scenes():
    """Those of drawn scenes are their masks, but for pixels of the border, of which a part is covered."""
    scenes = [shapes.draw(shapes.draw_factors(i), 32) for i in range(60)]
    images, wanted = (np.stack(x) for x in zip(*((s.image, s.mask[..., None]) for s in scenes), strict=True))
    found = masks.match(images, wanted)['iou']
    assert found.mean() > 0.97 and found.min() > 0.85
