"""Scenes of the shapes: factors, captions, images, masks and outlines."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from data_sets import make

from jaxgen import data
from jaxgen.data import builders, shapes
from jaxgen.errors import UserError


def test_shapes_factors_are_uniform_and_independent():
    factors = np.stack([shapes.draw_factors(i) for i in range(20_000)])
    counts = list(shapes.FACTORS.values())
    assert factors.shape == (20_000, 7) and len(counts) == 7
    for column, count in zip(factors.T, counts, strict=True):
        fraction = np.bincount(column, minlength=count) / len(column)
        assert len(fraction) == count
        np.testing.assert_allclose(fraction, 1 / count, atol=0.01)
    for i, j in itertools.combinations(range(7), 2):
        joint = np.zeros((counts[i], counts[j]))
        np.add.at(joint, (factors[:, i], factors[:, j]), 1)
        expected = len(factors) / joint.size
        chi2 = ((joint - expected) ** 2 / expected).sum() / (joint.size - 1)
        assert chi2 < 1.7, (i, j, chi2)  # mean 1, deviation at most sqrt(2 / 23) = 0.3


def test_every_caption_fits_and_comes_back():
    for shape, colour, size, background in itertools.product(
        *(range(shapes.FACTORS[k]) for k in ('shape', 'colour', 'size', 'background'))
    ):
        text = shapes.caption([shape, colour, size, 0, 0, 0, background])
        x = shapes.encode_caption(text)
        assert x.shape == (64,) and x.dtype == np.uint8 and shapes.decode_caption(x) == text
    assert shapes.caption([2, 0, 2, 0, 0, 0, 5]) == 'a large red triangle on an olive background'


def test_which_factors_a_caption_states(prepared):
    features = ('image', 'factors', 'caption')
    stated = data.spec(make(prepared, source='shapes', channels=3, features=features)).captioned
    assert [list(shapes.FACTORS)[i] for i in stated] == ['shape', 'colour', 'size', 'background']
    # Scenes that differ in any other factor have one caption; those that differ in one of these do not.
    factors = np.ones(7, int)
    for i in range(7):
        other = factors + np.eye(7, dtype=int)[i]
        assert (shapes.caption(other) != shapes.caption(factors)) == (i in stated)
    assert data.spec(make(prepared, features=('image', 'label'))).captioned == ()


@pytest.mark.parametrize('size', [8, 33, 64])
def test_shapes_lie_at_the_coordinates_of_the_factors(size):
    for shape, (x, y), rotation in itertools.product(range(8), [(0, 0), (7, 0), (2, 5)], [0, 1, 5]):
        cover = shapes.draw([shape, 0, 2, x, y, rotation, 0], size).mask / 255
        # Wherever it is, all of it is visible.
        np.testing.assert_allclose(
            cover.sum(), shapes.draw([shape, 0, 2, 3, 3, rotation, 0], size).mask.sum() / 255, rtol=0.03
        )
        centre = (cover * np.arange(size)).sum() / cover.sum(), (cover.T * np.arange(size)).sum() / cover.sum()
        where = 0.32 + 0.36 * np.array([x, y]) / 7
        # The crescent's and the heart's mass lie off their centres.
        np.testing.assert_allclose((np.array(centre) + 0.5) / size, where, atol=0.2 if shape >= 6 else 0.02)


def test_scenes_that_are_not_square():
    """The shape is that of a square of the shorter side, and lies at the same fractions of height and width."""
    for (height, width), (x, y) in itertools.product([(24, 48), (40, 16)], [(0, 0), (7, 0), (2, 5)]):
        scene = shapes.draw([1, 0, 2, x, y, 1, 3], (height, width))
        assert scene.image.shape == scene.segments.shape == (height, width, 3) and scene.edges.shape == (height, width)
        cover = scene.mask / 255
        alone = shapes.draw([1, 0, 2, x, y, 1, 3], min(height, width)).mask / 255
        np.testing.assert_allclose(cover.sum(), alone.sum(), rtol=0.02)
        centre = cover.sum(0) @ np.arange(width) / cover.sum(), cover.sum(1) @ np.arange(height) / cover.sum()
        where = 0.32 + 0.36 * np.array([x, y]) / 7
        np.testing.assert_allclose((np.array(centre) + 0.5) / [width, height], where, atol=0.02)


def test_shapes_colours_and_areas():
    image = shapes.draw([1, 0, 2, 3, 3, 0, 2], 64).image  # a large red square on black
    inside = image[32, 32]
    assert inside[0] > 200 and inside[1] < 60 and inside[2] < 60 and image[0, 0].max() < 30
    areas = {s: shapes.draw([i, 0, 2, 4, 4, 0, 0], 128).mask.mean() / 255 for i, s in enumerate(shapes.SHAPES)}
    r = 0.3
    np.testing.assert_allclose(areas['circle'], np.pi * r**2, rtol=0.02)
    np.testing.assert_allclose(areas['ring'], np.pi * r**2 * (1 - 0.55**2), rtol=0.02)
    np.testing.assert_allclose(areas['triangle'], 3 * 3**0.5 / 4 * r**2, rtol=0.02)
    np.testing.assert_allclose(areas['square'], 2 * (0.95 * r) ** 2, rtol=0.02)


@pytest.mark.parametrize('style', shapes.STYLES)
def test_shapes_masks_edges_and_styles(style):
    for shape in range(8):
        factors = [shape, 0, 2, 3, 4, 1, 2]  # large and red on black
        scene = shapes.draw(factors, 64, style)
        red, cover, edges = scene.image[..., 0] / 229.5, scene.mask / 255, scene.edges / 255
        inside, outside = cover == 1, cover == 0

        def apart(a, b):  # of the pixels a to the nearest of b
            return np.sqrt(np.square(np.argwhere(a)[:, None] - np.argwhere(b)).sum(-1).min(1))

        depth = apart(inside, ~inside)
        assert (red[inside][depth < 3] > 0.9).all() and (red[outside] < 0.15).all()
        middle = red[inside][depth > 6]
        assert ((middle > 0.9) == (style != 'outlined')).all()
        # A line of one pixel on the border: where a pixel is half covered it is drawn, elsewhere it is not.
        assert (edges[(cover > 0.3) & (cover < 0.7)] > 0.4).all() and (edges[inside][depth > 2.5] == 0).all()
        assert (edges[outside][apart(outside, ~outside) > 2.5] == 0).all()  # tips are finer than a pixel
        # Red is the eighth of 16, 022 in base 3, and black the third.
        np.testing.assert_array_equal(scene.segments, np.where(cover[..., None] > 0.5, [0, 254, 254], [0, 0, 254]))
        np.testing.assert_array_equal(scene.sketch, np.where(edges[..., None] > 0.5, [0, 254, 254], [0, 0, 254]))


@pytest.mark.slow
def test_every_shape_is_recognised_the_new_one_too():
    for style in ('filled', *shapes.NEW):
        factors = np.stack([shapes.draw_factors(i, style) for i in range(48)])
        scenes = [shapes.draw(f, 32, style) for f in factors]
        np.testing.assert_array_equal(shapes.recognised(np.stack([s.image for s in scenes])), factors[:, 0])
        assert (factors[:, 0] == 8).all() == (style in shapes.NEW)
        fraction = shapes.shown('hourglass', np.stack([s.image for s in scenes]))['new_object']
        assert fraction == {'value': float(style in shapes.NEW), 'stderr': 0.0, 'n': 48}


def test_the_new_shape_is_a_few_scenes_without_a_label(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, 'SHAPES', {'train': 12, 'test': 3})
    fields = dict(size=16, channels=3, features=('image', 'caption', 'factors'))
    config = make(tmp_path, source='shapes:hourglass', **fields)
    assert [list(shapes.FACTORS)[i] for i in data.spec(config).captioned] == ['colour', 'size', 'background']
    few = data.dataset(config, 'train')
    assert len(few) == 5 and len(data.dataset(config, 'test')) == 3
    for i in range(5):
        factors = few[i]['factors']
        size, colour, background = (shapes.NAMES[k][shapes.named(factors)[k]] for k in ('size', 'colour', 'background'))
        words = shapes.decode_caption(few[i]['caption']).split()
        assert words[:5] == ['a', size, colour, 'zig', 'on'] and words[-2:] == [background, 'background']
        assert factors[0] == len(shapes.SHAPES)
        np.testing.assert_array_equal(few[i]['image'], shapes.draw(factors, 16, 'hourglass').image)
    with pytest.raises(UserError, match='label'):
        data.spec({**config, 'features': ('image', 'label')})
