"""Data sets made here, digits and shapes, hold what they are described to hold."""

from __future__ import annotations

import jax
import numpy as np
from data_sets import make, refused
from sklearn.datasets import load_digits

from jaxgen import data
from jaxgen.data import builders, shapes


def test_digits_are_all_there_once(prepared):
    config = make(prepared, features=('image', 'label'))
    spec = data.spec(config)
    assert spec.classes == 10 and spec.features['image'].shape == (8, 8, 1)
    assert spec.features['image'].dtype == np.uint8 and spec.features['label'] == jax.ShapeDtypeStruct((), np.int32)
    splits = {split: data.dataset(config, split) for split in ('train', 'test')}
    assert [len(s) for s in splits.values()] == [1438, 359]
    stored = [(e['image'].tobytes(), int(e['label'])) for s in splits.values() for e in (s[i] for i in range(len(s)))]
    original = load_digits()
    expected = np.round(original.images / 16 * 255).astype(np.uint8)
    assert sorted(stored) == sorted((x.tobytes(), y) for x, y in zip(expected, original.target.tolist(), strict=True))
    fractions = [np.bincount([y for _, y in stored[1438:]])[c] / np.bincount(original.target)[c] for c in range(10)]
    np.testing.assert_allclose(fractions, 0.2, atol=0.005)
    labels = [y for _, y in stored[:1438]]
    assert abs(np.corrcoef(labels[1:], labels[:-1])[0, 1]) < 0.1, 'the stored order is independent of the label'


def test_digits_at_another_size_and_in_colour(prepared):
    config = make(prepared, size=16, channels=3)
    assert data.spec(config).features['image'].shape == (16, 16, 3) and data.spec(config).classes == 0
    example = data.dataset(config, 'test')[3]
    assert example['image'].shape == (16, 16, 3) and (np.ptp(example['image'].astype(int), axis=-1) == 0).all()
    assert set(example) == {'image'}


def test_shapes_examples_agree_with_their_factors(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, 'SHAPES', {'train': 300, 'test': 200})
    config = make(tmp_path, source='shapes', size=16, channels=3, features=('image', 'label', 'factors', 'caption'))
    spec = data.spec(config)
    assert spec.classes == len(shapes.SHAPES)
    train, test = data.dataset(config, 'train'), data.dataset(config, 'test')
    assert (len(train), len(test)) == (300, 200)
    names = [shapes.SHAPES, list(shapes.COLOURS), list(shapes.SIZES), list(shapes.BACKGROUNDS)]
    for examples, first in ((train, 0), (test, builders.FIRST['test'])):
        for i in (0, 1, 77, len(examples) - 1):
            e = examples[i]
            assert {k: (v.shape, v.dtype) for k, v in e.items()} == {
                k: (s.shape, s.dtype) for k, s in spec.features.items()
            }
            np.testing.assert_array_equal(e['factors'], shapes.draw_factors(first + i))
            np.testing.assert_array_equal(e['image'], shapes.draw(e['factors'], 16).image)
            assert e['label'] == e['factors'][0]
            shape, colour, size, background = (n[v] for n, v in zip(names, e['factors'][[0, 1, 2, 6]], strict=True))
            words = shapes.decode_caption(e['caption']).split()
            assert words[:5] == ['a', size, colour, shape, 'on'] and words[-2:] == [background, 'background']
    scenes = [{examples[i]['factors'].tobytes() for i in range(200)} for examples in (train, test)]
    assert len(scenes[0]) == len(scenes[1]) == 200 and not scenes[0] & scenes[1]


def test_shapes_with_their_masks_and_edges(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, 'SHAPES', {'train': 12, 'test': 5})
    features = (*shapes.Scene._fields, 'factors')
    config = make(tmp_path, source='shapes', size=16, channels=3, features=features)
    about = data.spec(config).features
    assert about['mask'].shape == about['edges'].shape == (16, 16, 1)
    plain, styled = (data.dataset({**config, 'source': s}, 'train') for s in ('shapes', 'shapes:outlined'))
    for examples, style in ((plain, 'filled'), (styled, 'outlined')):
        scene = shapes.draw(examples[7]['factors'], 16, style)
        for name, x in scene._asdict().items():
            np.testing.assert_array_equal(examples[7][name], x.reshape(about[name].shape))
    scenes = [{e['factors'].tobytes() for e in (x[i] for i in range(12))} for x in (plain, styled)]
    assert not scenes[0] & scenes[1], 'each style has training scenes of its own'
    plain, styled = (data.dataset({**config, 'source': s}, 'test') for s in ('shapes', 'shapes:outlined'))
    assert all((plain[i]['factors'] == styled[i]['factors']).all() for i in range(5))
    assert any((plain[i]['image'] != styled[i]['image']).any() for i in range(5))
    centred = data.dataset({**config, 'source': 'shapes:centred'}, 'test')
    plain = [plain[i]['factors'] for i in range(5)]
    assert len({tuple(f[3:5]) for f in plain}) > 1
    for i, f in enumerate(plain):
        np.testing.assert_array_equal(centred[i]['factors'], [*f[:3], 4, 4, *f[5:]])
        y, x = np.nonzero(centred[i]['mask'][..., 0] > 127)  # of 16 pixels
        assert max(abs(y.mean() - 7.9), abs(x.mean() - 7.9)) < 2
    with refused('shapes:dotted must be shapes:STYLE, one of filled, outlined, centred, hourglass'):
        data.spec({**config, 'source': 'shapes:dotted'})
