"""Sources, transforms and the loader, with real files and real prepared sets."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageFile
from sklearn.datasets import load_digits
from support import ROOT

from jaxgen import config as configs
from jaxgen import data
from jaxgen.config import DEFAULTS
from jaxgen.data import builders, folder, shapes, sources, transforms
from jaxgen.data.loader import UnpairedExamples, order
from jaxgen.errors import RunError, UserError


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """One directory of prepared sets for all tests that do not mind what is in it."""
    return str(tmp_path_factory.mktemp('prepared'))


def make(where, **fields) -> dict:
    """A section `data` of a config."""
    assert not set(fields) - set(DEFAULTS['data'])
    return {**DEFAULTS['data'], 'dir': str(where), 'batch': 8, **fields}


def take(config: dict, n: int, **kwargs) -> list[dict]:
    """The first n batches."""
    with contextlib.closing(data.batches(config, **{'seed': 0, **kwargs})) as found:
        return list(itertools.islice(found, n))


def assert_same(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def refused(match: str):
    """The block raises a UserError of one line."""

    @contextlib.contextmanager
    def context():
        with pytest.raises(UserError, match=match) as caught:
            yield
        assert '\n' not in str(caught.value)

    return context()


def encoded(image: Image.Image, form: str = 'PNG', **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def grey(value: int, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(np.full((height, width), value, np.uint8))


def picture(seed: int = 0, height: int = 12, width: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def write_folder(path, values, **subfolders) -> str:
    """Grey images named by their values; the source's name."""
    for where, inside in {'': values, **subfolders}.items():
        os.makedirs(os.path.join(path, where), exist_ok=True)
        for value in inside:
            grey(value).save(os.path.join(path, where, f'{value}.png'))
    return f'folder:{path}'


# --- transforms


def test_uniform_against_integers_of_python():
    word = (1 << 64) - 1

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) & word
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    for seed, number, stream in [(0, 0, 1), (0, 1, 1), (2**31, 5, 2), (2**32 - 1, 2**62, 7)]:
        expected = (mix(mix(number ^ mix(seed)) ^ mix(stream)) >> 11) / 2**53
        assert transforms.uniform(seed, number, stream) == expected


def test_uniform_is_uniform_and_its_streams_are_independent():
    n = np.arange(100_000)
    streams = np.stack([transforms.uniform(seed, n, stream) for seed, stream in [(0, 1), (0, 2), (1, 1), (2, 1)]])
    assert (streams >= 0).all() and (streams < 1).all()
    np.testing.assert_allclose(streams.mean(1), 1 / 2, atol=0.005)
    np.testing.assert_allclose(streams.var(1), 1 / 12, atol=0.002)
    np.testing.assert_allclose(np.corrcoef(streams), np.eye(4), atol=0.015)
    assert abs(np.corrcoef(streams[0, 1:], streams[0, :-1])[0, 1]) < 0.015


def test_float_and_back_is_exact():
    x = jnp.arange(256, dtype=jnp.uint8)
    inside = jax.jit(data.to_float)(x)
    assert inside.dtype == jnp.float32 and inside.min() == -1 and inside.max() == 1
    np.testing.assert_array_equal(jax.jit(data.to_uint8)(inside), x)
    np.testing.assert_array_equal(data.to_uint8(jnp.array([-7.0, 7.0, 0.0])), [0, 255, 128])
    assert data.to_uint8(inside.astype(jnp.bfloat16)).dtype == jnp.uint8


def sixteen_bit(values, mode):
    return Image.fromarray(np.array([values], np.uint16 if mode == 'I;16' else np.int32 if mode == 'I' else np.float32))


def palette_with_transparency() -> Image.Image:
    image = Image.new('P', (1, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    return image


PICTURES = {
    'L': (encoded(grey(7, 1, 1)), [[[7, 7, 7]]]),
    '1': (encoded(Image.fromarray(np.array([[0, 1]], bool))), [[[0, 0, 0], [255, 255, 255]]]),
    'LA': (encoded(Image.merge('LA', [grey(0, 1, 1), grey(51, 1, 1)])), [[[204, 204, 204]]]),
    'RGB': (encoded(Image.new('RGB', (1, 1), (1, 2, 3))), [[[1, 2, 3]]]),
    'RGBA': (encoded(Image.new('RGBA', (1, 1), (255, 0, 0, 0))), [[[255, 255, 255]]]),
    'RGBA half': (encoded(Image.new('RGBA', (1, 1), (255, 0, 0, 51))), [[[255, 204, 204]]]),
    'RGB with one transparent colour': (
        encoded(Image.new('RGB', (1, 1), (9, 8, 7)), transparency=(9, 8, 7)),
        [[[255, 255, 255]]],
    ),
    'P': (encoded(palette_with_transparency()), [[[255, 0, 0]]]),
    'P transparent': (encoded(palette_with_transparency(), transparency=b'\0\xff'), [[[255, 255, 255]]]),
    'I;16': (encoded(sixteen_bit([0, 257 * 100, 65535], 'I;16')), [[[0] * 3, [100] * 3, [255] * 3]]),
    'I': (encoded(sixteen_bit([0, 257 * 100, 65535], 'I'), 'TIFF'), [[[0] * 3, [100] * 3, [255] * 3]]),
    'F to 1': (encoded(sixteen_bit([0, 0.2, 1], 'F'), 'TIFF'), [[[0] * 3, [51] * 3, [255] * 3]]),
    'F to 255': (encoded(sixteen_bit([0, 20, 255], 'F'), 'TIFF'), [[[0] * 3, [20] * 3, [255] * 3]]),
    'CMYK': (encoded(Image.new('CMYK', (1, 1), (0, 255, 255, 0)), 'TIFF'), [[[255, 0, 0]]]),
    'first frame': (
        encoded(
            Image.new('RGB', (1, 1), 'red'),
            'GIF',
            save_all=True,
            append_images=[Image.new('RGB', (1, 1), 'blue')],
        ),
        [[[255, 0, 0]]],
    ),
}


@pytest.mark.parametrize('kind', PICTURES)
def test_load_of_every_mode(kind):
    bytes_, expected = PICTURES[kind]
    assert transforms.to_array(transforms.load(bytes_, 3)).tolist() == expected
    one = transforms.to_array(transforms.load(bytes_, 1))
    luma = np.array(expected) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(one[..., 0], luma, atol=0.51)


def test_load_turns_as_exif_says():
    image = Image.fromarray(np.array([[0, 0, 255]], np.uint8).repeat(8, 0).repeat(8, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # shot with the camera turned: show it turned clockwise
    x = transforms.to_array(transforms.load(encoded(image, 'JPEG', exif=exif, quality=95), 1))
    assert x.shape == (24, 8, 1) and x[2].mean() < 10 and x[-2].mean() > 245


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_load_despite_damaged_exif():
    good = encoded(grey(50), 'JPEG', exif=b'Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff\xff\xff')
    assert transforms.load(good, 1).size == (8, 8)


def test_square_is_the_largest_one():
    wide = Image.fromarray(np.arange(20, dtype=np.uint8)[None].repeat(4, 0))
    for image, axis in ((wide, 1), (wide.transpose(Image.Transpose.TRANSPOSE), 0)):

        def columns(position, image=image, axis=axis):
            return np.asarray(transforms.square(image, 4, position)).take(0, 1 - axis).tolist()

        assert columns(None) == [8, 9, 10, 11]
        assert columns(0.0) == [0, 1, 2, 3]
        assert columns(0.999) == [16, 17, 18, 19]
        assert {columns(p)[0] for p in np.linspace(0, 0.999, 200)} == set(range(17))


def test_resizing_does_not_alias():
    """Fine stripes become their mean; PIL without its growing support would pick black or white."""
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    small = np.asarray(transforms.square(stripes, 8))
    assert np.abs(small.astype(int) - 127).max() <= 6
    assert np.asarray(transforms.square(grey(9, 1, 1), 32)).tolist() == np.full((32, 32), 9).tolist()


def test_cut_takes_rows_and_columns():
    x = np.arange(30, dtype=np.uint8).reshape(5, 6)
    np.testing.assert_array_equal(np.asarray(transforms.cut(Image.fromarray(x), (1, 2, 3, 4))), x[1:4, 2:6])
    for box in [(0, 0, 6, 6), (0, 1, 5, 6), (-1, 0, 2, 2), (0, 0, 0, 3)]:
        with refused(r'config.data.box = .* height 5 and width 6'):
            transforms.cut(Image.fromarray(x), box)


# --- digits


def test_digits_are_all_there_once(prepared):
    config = make(prepared, features=('image', 'label'))
    spec = data.spec(config)
    assert spec.classes == 10 and spec.features['image'].shape == (8, 8, 1)
    assert spec.features['image'].dtype == np.uint8 and spec.features['label'] == jax.ShapeDtypeStruct((), np.int32)
    splits = {split: data.dataset(config, split) for split in ('train', 'test')}
    assert [len(s) for s in splits.values()] == [1438, 359]
    found = [(e['image'].tobytes(), int(e['label'])) for s in splits.values() for e in (s[i] for i in range(len(s)))]
    original = load_digits()
    expected = np.round(original.images / 16 * 255).astype(np.uint8)
    assert sorted(found) == sorted((x.tobytes(), y) for x, y in zip(expected, original.target.tolist(), strict=True))
    shares = [np.bincount([y for _, y in found[1438:]])[c] / np.bincount(original.target)[c] for c in range(10)]
    np.testing.assert_allclose(shares, 0.2, atol=0.005)
    labels = [y for _, y in found[:1438]]
    assert abs(np.corrcoef(labels[1:], labels[:-1])[0, 1]) < 0.1, 'the stored order says nothing of the label'


def test_digits_at_another_size_and_in_colour(prepared):
    config = make(prepared, size=16, channels=3)
    assert data.spec(config).features['image'].shape == (16, 16, 3) and data.spec(config).classes == 0
    example = data.dataset(config, 'test')[3]
    assert example['image'].shape == (16, 16, 3) and (np.ptp(example['image'].astype(int), axis=-1) == 0).all()
    assert set(example) == {'image'}


def test_dataset_is_random_access(prepared):
    examples = data.dataset(make(prepared, features=('image', 'label')), 'test')
    assert isinstance(examples[0]['label'], np.ndarray) and examples[0]['label'].dtype == np.int32
    np.testing.assert_array_equal(examples[-1]['image'], examples[358]['image'])
    for i in (359, -360):
        with pytest.raises(IndexError):
            examples[i]
    with refused("a split is 'train' or 'test', not 'valid'"):
        data.dataset(make(prepared), 'valid')


def test_a_prepared_set_is_not_prepared_again(prepared, monkeypatch):
    first = data.dataset(make(prepared), 'train')[7]['image']

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(builders.JaxgenDigits, '_split_generators', never)
    monkeypatch.setattr(sources, 'lock', never)  # so that a directory that one cannot write to will do
    np.testing.assert_array_equal(data.dataset(make(prepared), 'train')[7]['image'], first)


def test_environment_names_the_directory(tmp_path, monkeypatch):
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'here'))
    assert sources.root(make('')) == str(tmp_path / 'here')
    assert sources.root(make('~/x')) == os.path.expanduser('~/x')
    monkeypatch.delenv('TFDS_DATA_DIR')
    assert sources.root(make('')) == os.path.expanduser('~/tensorflow_datasets')


# --- shapes


def test_shapes_factors_are_uniform_and_independent():
    factors = np.stack([shapes.draw_factors(i) for i in range(20_000)])
    counts = list(shapes.FACTORS.values())
    assert factors.shape == (20_000, 7) and len(counts) == 7
    for column, count in zip(factors.T, counts, strict=True):
        share = np.bincount(column, minlength=count) / len(column)
        assert len(share) == count
        np.testing.assert_allclose(share, 1 / count, atol=0.01)
    for i, j in itertools.combinations(range(7), 2):
        joint = np.zeros((counts[i], counts[j]))
        np.add.at(joint, (factors[:, i], factors[:, j]), 1)
        expected = len(factors) / joint.size
        chi2 = ((joint - expected) ** 2 / expected).sum() / (joint.size - 1)
        assert chi2 < 1.7, (i, j, chi2)  # mean 1, deviation at most sqrt(2 / 23) = 0.3


def test_shapes_examples_say_what_they_show(tmp_path, monkeypatch):
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
    seen = [{examples[i]['factors'].tobytes() for i in range(200)} for examples in (train, test)]
    assert len(seen[0]) == len(seen[1]) == 200 and not seen[0] & seen[1]


def test_every_caption_fits_and_comes_back():
    for shape, colour, size, background in itertools.product(
        *(range(shapes.FACTORS[k]) for k in ('shape', 'colour', 'size', 'background'))
    ):
        text = shapes.caption([shape, colour, size, 0, 0, 0, background])
        x = shapes.encode_caption(text)
        assert x.shape == (64,) and x.dtype == np.uint8 and shapes.decode_caption(x) == text
    assert shapes.caption([2, 0, 2, 0, 0, 0, 5]) == 'a large red triangle on an olive background'


@pytest.mark.parametrize('size', [8, 33, 64])
def test_shapes_lie_where_the_factors_say(size):
    for shape, (x, y), rotation in itertools.product(range(8), [(0, 0), (7, 0), (2, 5)], [0, 1, 5]):
        cover = shapes.draw([shape, 0, 2, x, y, rotation, 0], size).mask / 255
        # Wherever it is, all of it shows.
        np.testing.assert_allclose(
            cover.sum(), shapes.draw([shape, 0, 2, 3, 3, rotation, 0], size).mask.sum() / 255, rtol=0.03
        )
        centre = (cover * np.arange(size)).sum() / cover.sum(), (cover.T * np.arange(size)).sum() / cover.sum()
        where = 0.32 + 0.36 * np.array([x, y]) / 7
        # The crescent's and the heart's mass lie off their centres.
        np.testing.assert_allclose((np.array(centre) + 0.5) / size, where, atol=0.2 if shape >= 6 else 0.02)


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
    seen = [{e['factors'].tobytes() for e in (x[i] for i in range(12))} for x in (plain, styled)]
    assert not seen[0] & seen[1], 'each style has training scenes of its own'
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
    with refused('shapes:dotted must be shapes:STYLE, one of filled, outlined, centred'):
        data.spec({**config, 'source': 'shapes:dotted'})


# --- order


@pytest.fixture
def five(tmp_path):
    """Five training images and a test image, 12 x 20 pixels, a ramp that tells which one and left from right."""
    for i in range(6):
        ramp = np.arange(20, dtype=np.uint8)[None].repeat(12, 0) + 20 * i
        os.makedirs(tmp_path / 'images', exist_ok=True)
        Image.fromarray(ramp).save(tmp_path / 'images' / f'{i}.png')
    return make(tmp_path / 'sets', source=f'folder:{tmp_path / "images"}', size=12, test_share=0.01, batch=8)


def which(batch) -> list[int]:
    """The numbers of the images of `five` in a batch."""
    return (np.minimum(batch['image'][:, 0, 0, 0], batch['image'][:, 0, -1, 0]) // 20).tolist()


def test_every_epoch_is_a_new_order_of_all_examples(five):
    assert len(data.dataset(five, 'train')) == 5
    numbers = [i for batch in take(five, 25) for i in which(batch)]
    epochs = [tuple(numbers[i : i + 5]) for i in range(0, 200, 5)]
    assert all(sorted(e) == sorted(epochs[0]) and len(set(e)) == 5 for e in epochs)
    assert len(set(epochs)) > 10


def test_order_is_uniform():
    """All 24 orders of four examples are equally likely; a place says nothing of the next epoch's."""
    found = order(7, 4)(np.arange(4 * 24_000)).reshape(-1, 4)
    counts = np.unique(found, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and ((counts - 1000) ** 2 / 1000).sum() < 50  # chi squared with 23 degrees
    joint = np.zeros((4, 4))
    np.add.at(joint, (found[:-1, 0], found[1:, 0]), 1)
    np.testing.assert_allclose(joint / len(found), 1 / 16, atol=0.008)


@pytest.mark.parametrize('n', [1, 2, 5, 4095, 4096, 5000])
def test_order_is_the_same_from_everywhere(n):
    numbers = np.arange(3 * n + 7)
    whole = order(3, n)(numbers)
    np.testing.assert_array_equal(np.sort(whole[: 3 * n].reshape(3, n)), np.arange(n)[None].repeat(3, 0))
    np.testing.assert_array_equal(order(3, n)(numbers[::-1]), whole[::-1])
    np.testing.assert_array_equal(np.concatenate([order(3, n)(p) for p in np.array_split(numbers, 7)]), whole)


def test_order_is_a_function_of_the_seed(prepared):
    config = make(prepared, features=('image', 'label'), flip=True, batch=64)
    assert_same(take(config, 3), take(config, 3))
    assert_same(take(config, 3, seed=2**31), take(config, 3, seed=2**31))
    orders = {
        np.concatenate([b['label'] for b in take(config, 2, seed=s)]).tobytes() for s in (0, 1, 2, 2**31, 2**64 - 1)
    }
    assert len(orders) == 5
    for seed in (-1, 2**64):
        with refused('config.seed'):
            take(config, 1, seed=seed)


@pytest.mark.parametrize('fields', [{}, {'crop': 'random'}, {'cache_mb': 0, 'threads': 1}])
def test_seeking_equals_reading_through(five, fields):
    config = {**five, 'flip': True, **fields}
    assert_same(take(config, 12)[7:], take(config, 5, start=7))


def test_seeking_far_is_quick(prepared):
    begin = time.time()
    assert take(make(prepared), 1, start=10**12)[0]['image'].shape == (8, 8, 8, 1)
    assert time.time() - begin < 5


@pytest.mark.parametrize('fields', [{}, {'crop': 'random'}])
def test_processes_share_the_batch_of_one(five, fields):
    config = {**five, 'flip': True, 'batch': 12, **fields}
    whole = take(config, 6, start=3)
    for count in (2, 4):
        parts = [take(config, 6, start=3, process_index=i, process_count=count) for i in range(count)]
        assert all(len(p[0]['image']) == 12 // count for p in parts)
        assert_same(whole, [{'image': np.concatenate([x['image'] for x in step])} for step in zip(*parts, strict=True)])
    with refused('must be a multiple of the 5 processes'):
        take(config, 1, process_count=5)


def test_another_batch_goes_on_with_the_same_examples(five):
    config = {**five, 'flip': True, 'crop': 'random'}
    a, b = take(config, 6, batch=4), take(config, 3, batch=8)
    np.testing.assert_array_equal(np.concatenate([x['image'] for x in a]), np.concatenate([x['image'] for x in b]))


def test_half_are_mirrored_anew_every_time(five):
    plain, flipped = take(five, 40), take({**five, 'flip': True}, 40)
    seen = {}
    for x, y in zip(plain, flipped, strict=True):
        for a, b in zip(x['image'], y['image'], strict=True):
            mirrored = (a != b).any()
            np.testing.assert_array_equal(a[:, ::-1] if mirrored else a, b)
            seen.setdefault(int(a[0, 0, 0]), []).append(bool(mirrored))
    assert 0.4 < np.mean([m for ms in seen.values() for m in ms]) < 0.6
    assert all(0 < np.mean(m) < 1 for m in seen.values()), 'one image is mirrored at one time and not at another'


def test_random_crops_move_and_evaluation_does_not(five):
    lefts = {int(i) % 20 for b in take({**five, 'crop': 'random'}, 40) for i in b['image'][:, 0, 0, 0]}
    assert lefts == set(range(9))
    assert {int(i) % 20 for b in take(five, 5) for i in b['image'][:, 0, 0, 0]} == {4}
    examples = data.dataset({**five, 'crop': 'random', 'flip': True}, 'train')
    assert {int(examples[i]['image'][0, 0, 0]) % 20 for i in range(5) for _ in range(3)} == {4}


def test_box_is_cut_first(five):
    config = {**five, 'box': (2, 3, 4, 6), 'size': 4}
    assert data.dataset(config, 'train')[0]['image'][:, :, 0].tolist()[0][0] % 20 == 4  # 3, then the middle of 6
    with refused('config.data.box'):
        data.dataset({**five, 'box': (0, 0, 12, 21)}, 'train')


def test_memory_and_disk_give_the_same(prepared):
    config = make(prepared, features=('image', 'label'), flip=True, batch=32)
    assert_same(take(config, 50), take({**config, 'cache_mb': 0}, 50))
    batch = take(config, 1)[0]
    batch['image'][:] = 0  # a batch is its receiver's own
    assert take(config, 1)[0]['image'].any()


def settle() -> list:
    """Waits for the loader's threads; the ones that stay."""
    end = time.time() + 10
    while threads := [t for t in threading.enumerate() if 'grain' in t.name]:
        if time.time() > end:
            break
        time.sleep(0.05)
    return threads


def test_small_sets_are_decoded_once(five, monkeypatch):
    settle()  # threads of earlier tests may still be at their last batch
    loads = []
    load = transforms.load
    monkeypatch.setattr(transforms, 'load', lambda *a: loads.append(0) or load(*a))
    take({**five, 'threads': 1}, 50)
    assert 5 <= len(loads) <= 6
    settle()
    loads.clear()
    take({**five, 'threads': 1, 'cache_mb': 0}, 5)
    assert len(loads) > 40


def test_closing_ends_the_threads(prepared):
    with contextlib.closing(data.batches(make(prepared), seed=0)) as found:
        next(found)
        assert [t for t in threading.enumerate() if 'grain' in t.name]
    assert not settle()


def test_an_error_in_a_thread_reaches_the_caller(five, monkeypatch):
    def broken(*_):
        raise OSError('bad\nbytes')

    config = {**five, 'crop': 'random'}
    found = data.batches(config, seed=0)
    monkeypatch.setattr(transforms, 'load', broken)
    with (
        contextlib.closing(found),
        pytest.raises(RunError, match=r'example \d cannot be decoded \(OSError: bad bytes\)'),
    ):
        list(itertools.islice(found, 50))


# --- folders


def test_folder_classes_from_subfolders(tmp_path):
    source = write_folder(tmp_path / 'in', [], cat=[10, 20], dog=[30], **{'ant/deep/er': [40, 50]})
    config = make(tmp_path, source=source, features=('image', 'label'), test_share=0.3)
    assert data.spec(config).classes == 3
    found = {}
    for split in ('train', 'test'):
        examples = data.dataset(config, split)
        found.update({int(e['image'][0, 0, 0]): int(e['label']) for e in (examples[i] for i in range(len(examples)))})
    assert found == {40: 0, 50: 0, 10: 1, 20: 1, 30: 2}
    assert data.spec({**config, 'classes': 5}).classes == 5
    with refused('has 3 sub-folders'):
        data.dataset({**config, 'classes': 2}, 'train')
    with refused("has no 'factors'"):
        data.spec({**config, 'features': ('image', 'factors')})


def test_folder_without_classes(tmp_path):
    config = make(tmp_path, source=write_folder(tmp_path / 'in', [1], cat=[2, 3]), features=('image', 'label'))
    for call in (data.spec, lambda c: data.dataset({**c, 'classes': 4}, 'train')):
        with refused('put every image into a sub-folder'):
            call(config)
    assert data.spec({**config, 'features': ('image',)}).classes == 0
    # Described on a machine that lacks the folder.
    elsewhere = {**config, 'source': 'folder:/not/here'}
    assert data.spec({**elsewhere, 'features': ('image',)}).features['image'].shape == (8, 8, 1)
    with refused('/not/here does not exist'):
        data.spec(elsewhere)


def test_folder_of_all_kinds_of_files(tmp_path, capfd):
    place = tmp_path / 'in'
    os.makedirs(place / 'sub' / '.thumbnails')
    wanted = {
        'grey.png': grey(1),
        'sub/bits.bmp': Image.fromarray(np.eye(9, dtype=bool)),
        'colour.JPG': picture(),
        'sub/alpha.webp': picture().convert('RGBA'),
        'palette.gif': picture().convert('P'),
        'print.tif': picture().convert('CMYK'),
        'deep.png': sixteen_bit([0, 65535], 'I;16'),
        'dot.ppm': Image.new('RGB', (1, 1), 'red'),
        'line.png': grey(3, 1, 500),
    }
    for name, image in wanted.items():
        image.save(place / name)
    (place / 'readme.txt').write_text('no image')
    (place / '.DS_Store').write_bytes(b'\0')
    (place / '._grey.png').write_bytes(b'a resource fork')
    grey(5).save(place / 'sub' / '.thumbnails' / 'small.png')
    os.symlink(place, place / 'sub' / 'loop')
    strange = os.fsencode(place) + b'/caf\xe9 \xe2\x98\x83\n.png'
    with open(strange, 'wb') as f:
        f.write(encoded(grey(4)))
    config = make(tmp_path, source=f'folder:{place}', channels=3, size=6)
    train, test = (data.dataset(config, split) for split in ('train', 'test'))
    assert len(train) + len(test) == len(wanted) + 1 and len(test) >= 1
    for examples in (train, test):
        for i in range(len(examples)):
            assert examples[i]['image'].shape == (6, 6, 3)
    out, said = capfd.readouterr()
    assert not out and said == f'{place}: left out 1 folders linked twice, 1 files with other endings (1 .txt)\n'


def damage(place) -> None:
    """Four files that claim to be images."""
    whole = encoded(picture(height=60, width=60), 'JPEG')
    (place / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
    (place / 'empty.png').write_bytes(b'')
    (place / 'text.gif').write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n')
    os.symlink(place / 'nowhere', place / 'link.png')


def test_folder_with_unreadable_files(tmp_path, capfd):
    source = write_folder(tmp_path / 'in', range(36))
    damage(tmp_path / 'in')
    config = make(tmp_path / 'sets', source=source)
    with refused(r'4 of 40 files, which cannot be read.*\.\.\.\), are more than config.data.max_corrupt = 0.01') as _:
        data.dataset(config, 'train')
    assert not capfd.readouterr().err
    examples = data.dataset({**config, 'max_corrupt': 0.1}, 'train')
    assert len(examples) + len(data.dataset({**config, 'max_corrupt': 0.1}, 'test')) == 36
    said = capfd.readouterr().err
    assert said.count('\n') == 1 and '4 of 40' in said and 'cut.jpg' in said
    report = said.rpartition('why: ')[2].strip()
    with open(report) as f:
        lines = f.read().splitlines()
    assert len(lines) == 4 and all('\t' in line for line in lines) and str(tmp_path / 'sets') in report
    with refused('4 of 40'):  # prepared by now, and still refused to one who does not want it
        data.dataset(config, 'train')


def test_folder_of_which_nothing_can_be_read(tmp_path):
    os.makedirs(tmp_path / 'in')
    damage(tmp_path / 'in')
    with refused('4 of 4 files.*that is all of them'):
        data.dataset(make(tmp_path, source=f'folder:{tmp_path / "in"}', max_corrupt=1.0), 'train')


def test_image_that_is_too_large_is_unreadable(tmp_path, capfd):
    source = write_folder(tmp_path / 'in', range(5))
    grey(0, 100, 100).save(tmp_path / 'in' / 'bomb.png')
    examples = data.dataset(make(tmp_path, source=source, max_corrupt=0.5, max_pixels=1000), 'train')
    assert len(examples) <= 4
    assert 'bomb.png' in capfd.readouterr().err


@pytest.mark.parametrize(
    ('names', 'match'),
    [
        ([], 'holds no images .*, but no files'),
        (['a.txt', 'b/c.csv', '.hidden.png'], 'holds no images .*, but 2 other files'),
    ],
)
def test_folder_without_images(tmp_path, names, match):
    place = tmp_path / 'in'
    os.makedirs(place / 'b')
    for name in names:
        (place / name).write_text('x')
    with refused(match):
        data.dataset(make(tmp_path, source=f'folder:{place}'), 'train')


def test_no_folder(tmp_path):
    (tmp_path / 'file').write_text('x')
    for source, match in {
        f'folder:{tmp_path}/nowhere': 'does not exist',
        f'folder:{tmp_path}/file': 'is a file',
        'folder:': 'say which folder',
        str(tmp_path): f'write folder:{tmp_path}',
    }.items():
        with refused(match):
            data.dataset(make(tmp_path, source=source), 'train')


def test_folder_of_one_image(tmp_path):
    config = make(tmp_path, source=write_folder(tmp_path / 'in', [9]))
    assert len(data.dataset(config, 'train')) == 1
    assert take(config, 3)[2]['image'].shape == (8, 8, 8, 1)
    with refused('too few images'):
        data.dataset(config, 'test')


def test_changed_folder_is_prepared_anew(tmp_path):
    source = write_folder(tmp_path / 'in', range(10))
    config = make(tmp_path, source=source)
    before = len(data.dataset(config, 'train')), len(data.dataset(config, 'test'))
    grey(200).save(tmp_path / 'in' / 'new.png')
    assert len(data.dataset(config, 'train')) + len(data.dataset(config, 'test')) == 11
    os.remove(tmp_path / 'in' / 'new.png')
    assert (len(data.dataset(config, 'train')), len(data.dataset(config, 'test'))) == before
    grey(255).save(tmp_path / 'in' / '0.png')  # other pixels, same name
    os.utime(tmp_path / 'in' / '0.png', (1, 1))
    pixels = {
        int(examples[i]['image'][0, 0, 0])
        for examples in (data.dataset(config, split) for split in ('train', 'test'))
        for i in range(len(examples))
    }
    assert pixels == {*range(1, 10), 255}


def test_held_out_images_stay_held_out():
    files = [folder.File(f'a/{i}.png', 1, 1) for i in range(3000)]
    train, test = folder.split(files, 0.2)
    assert sorted(train + test) == sorted(files) and 540 < len(test) < 660
    fewer = folder.split(files[:1000], 0.2)[1]
    assert set(fewer) == set(test) & set(files[:1000])
    assert set(test) < set(folder.split(files, 0.4)[1])
    changed = [f._replace(size=9, time=9) for f in files]
    assert {f.path for f in folder.split(changed, 0.2)[1]} == {f.path for f in test}
    for n in (2, 3, 4):
        assert all(
            folder.split(files[i : i + n], share)[k] for i in range(20) for share in (0.01, 0.99) for k in (0, 1)
        )


# --- pictures that belong together, and such that do not


def write_pairs(path, image, **others) -> str:
    """Ramps by number: as they are in image/, darker by the feature's number in the others; the source's name."""
    for k, (part, numbers) in enumerate({'image': image, **others}.items()):
        os.makedirs(path / part, exist_ok=True)
        for i in numbers:
            ramp = np.arange(20, dtype=np.uint8)[None].repeat(12, 0) + 20 * i + 100 * k
            Image.fromarray(ramp).save(path / part / f'{i}.{"png" if k else "bmp"}')
    return f'pairs:{path}'


def test_pairs_stay_together(tmp_path):
    """Whatever the order, the crop, the window and the mirror."""
    source = write_pairs(tmp_path / 'in', range(5), edges=range(5))
    config = make(tmp_path, source=source, size=6, features=('image', 'edges'), test_share=0.3)
    assert data.spec(config).features['edges'].shape == (6, 6, 1)
    splits = [data.dataset(config, split) for split in ('train', 'test')]
    assert len(splits[0]) + len(splits[1]) == 5 and min(map(len, splits)) > 0
    only = data.dataset({**config, 'features': ('image',)}, 'test')
    assert len(only) == len(splits[1]), 'one set is prepared, whichever of its features are asked for'
    smaller = {**config, 'features': ('image', 'edges', 'low_resolution'), 'low_resolution': 3}
    assert data.dataset(smaller, 'test')[0]['low_resolution'].shape == (3, 3, 1)
    with refused(f'{source} has pictures alone, and no label'):
        data.spec({**config, 'features': ('image', 'label')})
    windows = set()
    for fields in ({}, {'flip': True}, {'crop': 'random', 'flip': True, 'jitter': 4}):
        for batch in take({**config, **fields}, 12):
            np.testing.assert_array_equal(batch['edges'], batch['image'] + 100)
            windows |= {int(x) % 20 for x in batch['image'].min((1, 2, 3))} if 'jitter' in fields else set()
    assert len(windows) > 8


@pytest.mark.parametrize('parts, match', [
    (dict(edges=[0, 1]), "2 of the images in image/ have no partner in edges/, like 'image/2.bmp'"),
    (dict(edges=[0, 1, 2, 3, 4]), "1 of the images in edges/ have no partner in image/, like 'edges/4.png'"),
    (dict(mask=[0, 1, 2, 3]), 'must hold its images in image, edges: edges is not there'),
    (dict(edges=[0, 1, 2, 3], **{'': [9]}), 'lies outside of all sub-folders'),
])  # fmt: skip
def test_pairs_that_are_none(tmp_path, parts, match):
    source = write_pairs(tmp_path / 'in', range(4), **parts)
    with refused(match):
        data.dataset(make(tmp_path, source=source, features=('image', 'edges')), 'train')


def test_pairs_without_a_folder_or_with_two_of_a_name(tmp_path):
    config = make(tmp_path, source='pairs:/not/here', features=('image', 'edges'))
    assert data.spec(config).features['edges'].shape == (8, 8, 1), 'described where the folder is not'
    with refused('/not/here does not exist'):
        data.dataset(config, 'train')
    with refused('say which folder, like pairs:/home'):
        data.spec({**config, 'source': 'pairs:'})
    source = write_pairs(tmp_path / 'in', range(3), edges=range(3))
    grey(1).save(tmp_path / 'in' / 'image' / '1.png')
    with refused(r'image/1.bmp and image/1.png have one name'):
        data.dataset({**config, 'source': source}, 'train')


def test_pairs_of_which_one_cannot_be_read(tmp_path, capfd):
    source = write_pairs(tmp_path / 'in', range(6), edges=range(6))
    (tmp_path / 'in' / 'edges' / '3.png').write_bytes(b'')
    config = make(tmp_path, source=source, size=12, features=('image', 'edges'), max_corrupt=0.1)
    splits = [data.dataset(config, split) for split in ('train', 'test')]
    found = [int(e['image'].min()) // 20 for s in splits for e in (s[i] for i in range(len(s)))]
    assert sorted(found) == [0, 1, 2, 4, 5] and '1 of 12 files' in capfd.readouterr().err


def test_jitter_moves_a_window(five):
    """Every window of a square that is larger, and none in evaluation."""
    config = {**five, 'size': 8, 'jitter': 4}  # squares of 12 pixels, as they are stored: nothing is resized
    found = np.concatenate([b['image'][:, 0, 0, 0] for b in take(config, 60)])
    assert {int(x) % 20 for x in found} == set(range(4, 9)), 'columns 0 to 4 of the square, which begins at 4'
    plain = data.dataset(config, 'train')[0]['image']
    np.testing.assert_array_equal(plain, data.dataset({**five, 'size': 8}, 'train')[0]['image'])
    assert_same(take(config, 12)[7:], take(config, 5, start=7))


def test_a_window_of_the_whole_image(five):
    """With a random crop, the window of an enlarged image lies anywhere in it: all places alike (VAR's resize and
    crop)."""
    config = {**five, 'size': 8, 'jitter': 4, 'crop': 'random'}  # of 12 x 20 pixels: nothing is resized
    found = np.concatenate([b['image'][:, 0, 0, 0] for b in take(config, 300)]) % 20
    counts = np.bincount(found, minlength=13)
    assert len(counts) == 13 and counts.min() > 0.7 * len(found) / 13 and counts.max() < 1.3 * len(found) / 13


@pytest.mark.parametrize('fill', ['reflect', 'edge'])
def test_moved_images_are_those_of_padding_and_cutting(fill):
    """A slow loop over pixels, and numpy's own padding."""
    x = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    padded = np.pad(x, ((4, 4), (4, 4), (0, 0)), fill)
    for down, right in itertools.product(range(-4, 5), repeat=2):
        y = transforms.moved(x, down, right, fill)
        np.testing.assert_array_equal(y, padded[4 - down : 9 - down, 4 - right : 10 - right])
        for i, j in itertools.product(range(5), range(6)):
            if 0 <= i - down < 5 and 0 <= j - right < 6:
                assert (y[i, j] == x[i - down, j - right]).all()
    assert transforms.moved(x[:1, :1], 3, -2, fill).shape == (1, 1, 3)


def test_pad_and_shift_move_training_images_alone(five):
    """JEM pads by 4 pixels and cuts out anywhere; Glow shifts by up to a tenth, in real numbers that are rounded."""
    ramp = {**five, 'size': 12, 'fill': 'edge'}  # columns 4 to 15 of each ramp
    for fields, most in ((dict(pad=3), 3), (dict(shift=1 / 6), 2)):  # of 12: 2 pixels
        images = np.concatenate([b['image'][:, 0, :, 0] for b in take({**ramp, **fields}, 150)]) % 20
        first, last = images[:, 0], images[:, -1]
        left = np.bincount(last.astype(int), minlength=20)
        # Moved left, the first column is another; moved right, the last one is.
        assert set(first.tolist()) == set(range(4, 5 + most)) and set(last.tolist()) == set(range(15 - most, 16))
        wanted = np.full(most, 1 / 7) if 'pad' in fields else np.array([1 / 8, 1 / 4])  # by 2 and by 1
        np.testing.assert_allclose(left[15 - most : 15] / len(first), wanted, atol=0.03)
        examples = data.dataset({**ramp, **fields}, 'train')
        np.testing.assert_array_equal(examples[0]['image'], data.dataset(ramp, 'train')[0]['image'])
        assert_same(take({**ramp, **fields, 'flip': True}, 12)[7:], take({**ramp, **fields, 'flip': True}, 5, start=7))


def test_rectangles_have_the_areas_and_aspects_that_were_asked_for():
    u = np.random.default_rng(0).random((4000, 10, 4))
    area, aspect = (0.2, 0.8), (0.5, 2.0)
    boxes = np.array([transforms.rectangle(300, 300, area, aspect, one) for one in u])
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 300).all() and (left + w <= 300).all()
    share, ratio = h * w / 90_000, w / h
    assert share.min() > 0.19 and share.max() < 0.81 and ratio.min() > 0.49 and ratio.max() < 2.03
    # The first try is uniform in area and in the logarithm of the aspect; where it fits it is taken.
    fits = np.array([rectangle_fits(one[0], area, aspect) for one in u])
    np.testing.assert_allclose(share[fits], 0.2 + 0.6 * u[fits, 0, 0], atol=0.01)
    np.testing.assert_allclose(np.log(ratio[fits]), np.log(0.5) + u[fits, 0, 1] * np.log(4), atol=0.02)
    np.testing.assert_array_equal(top[fits], np.floor(u[fits, 0, 2] * (301 - h[fits])))
    assert 0.5 < fits.mean() < 1 and abs(np.log(ratio).mean()) < 0.05
    # None fits: the largest central one. A strip of 10 x 100 and aspects from 3/4 to 4/3.
    assert transforms.rectangle(10, 100, (0.9, 1.0), (0.75, 4 / 3), u[0]) == (0, 43, 10, 13)
    assert transforms.rectangle(100, 10, (0.9, 1.0), (0.75, 4 / 3), u[0]) == (43, 0, 13, 10)
    assert transforms.rectangle(64, 64, (1.0, 1.0), (1.0, 1.0), u[0]) == (0, 0, 64, 64)


def rectangle_fits(u, area, aspect) -> bool:
    size = (area[0] + u[0] * (area[1] - area[0])) * 90_000
    ratio = np.exp(np.log(aspect[0]) + u[1] * np.log(aspect[1] / aspect[0]))
    return max(np.sqrt(size * ratio), np.sqrt(size / ratio)) <= 300


def test_rectangles_are_cut_out_of_some_training_images(five):
    config = {**five, 'crop': 'resized', 'crop_area': (0.25, 0.25), 'crop_aspect': (1.0, 1.0), 'size': 6}
    wide = {int(b['image'][n].max()) - int(b['image'][n].min()) for b in take(config, 20) for n in range(8)}
    assert max(wide) <= 8, 'a rectangle of a quarter is 8 pixels wide; of the square there are 12'
    half = np.concatenate([np.ptp(b['image'], axis=(1, 2, 3)) for b in take({**config, 'crop_rate': 0.5}, 100)])
    assert 0.4 < (half > 8).mean() < 0.6
    assert_same(take(config, 12)[7:], take(config, 5, start=7))
    np.testing.assert_array_equal(
        data.dataset(config, 'train')[0]['image'], data.dataset({**five, 'size': 6}, 'train')[0]['image']
    )


@pytest.mark.parametrize(
    'fields, match',
    [
        (dict(crop_area=(0.0, 1.0)), 'crop_area'),
        (dict(crop_area=(0.5, 1.5)), 'crop_area'),
        (dict(crop_aspect=(2.0, 1.0)), 'crop_aspect'),
        (dict(crop_aspect=(1.0,)), 'crop_aspect'),
        (dict(crop_rate=0.0), 'crop_rate'),
        (dict(pad=-1), 'pad'),
        (dict(pad=8), 'pad'),
        (dict(shift=0.5), 'shift'),
        (dict(crop='resized', jitter=1), 'jitter'),
        (dict(fill='black'), 'fill'),
    ],
)
def test_augmentation_that_cannot_work_is_refused(fields, match):
    with refused(match):
        configs.make(family='vae', data=fields)


def test_domain_is_the_label_once_more(prepared):
    config = make(prepared, features=('image', 'label', 'domain'))
    batch = data.dataset(config, 'test').take(np.arange(9))
    assert len(set(batch['label'].tolist())) > 1
    np.testing.assert_array_equal(batch['domain'], batch['label'])


def test_low_resolution_is_means_of_squares(five):
    """Of the image as it is in the batch: cut and mirrored with it."""
    config = {**five, 'size': 12, 'low_resolution': 4, 'features': ('image', 'low_resolution')}
    assert data.spec(config).features['low_resolution'].shape == (4, 4, 1)
    for fields in ({}, {'flip': True, 'crop': 'random', 'jitter': 4}):
        for batch in take({**config, **fields}, 3):
            means = batch['image'].reshape(-1, 4, 3, 4, 3, 1).mean((2, 4))
            np.testing.assert_allclose(batch['low_resolution'], means, atol=0.5001)
    assert data.dataset(config, 'train')[0]['low_resolution'].dtype == np.uint8
    with refused('config.data.low_resolution makes one'):
        data.spec({**config, 'low_resolution': 0})
    with refused('config.data.low_resolution = 5 must divide'):
        configs.make(family='diffusion', data={'size': 12, 'low_resolution': 5})


def test_rows_and_columns_of_a_window():
    square = Image.fromarray(np.arange(25, dtype=np.uint8).reshape(5, 5))
    for row, column in itertools.product((0, 1, 2), (0, 1, 2)):
        x = np.asarray(transforms.window(square, 3, (row + 0.5) / 3, (column + 0.5) / 3))
        np.testing.assert_array_equal(x, np.asarray(square)[row : row + 3, column : column + 3])


def test_others_come_unpaired(five, tmp_path):
    """A second source has an order and an augmentation of its own, both functions of (seed, number)."""
    other = write_folder(tmp_path / 'others', [200, 210, 220])
    config = {**five, 'other': other, 'features': ('image', 'other'), 'test_share': 0.3, 'size': 4}
    assert data.spec(config).features['other'].shape == (4, 4, 1)
    batches = take(config, 60)
    pairs = [
        (int(a.min()) // 20, int(b[0, 0, 0])) for x in batches for a, b in zip(x['image'], x['other'], strict=True)
    ]
    counts = np.unique(np.array(pairs), axis=0, return_counts=True)[1]
    assert len(counts) == 4 * 2 and counts.min() > 0.7 * counts.mean(), 'all pairs are met alike'
    assert_same(batches[7:12], take(config, 5, start=7))
    parts = [take(config, 6, process_index=i, process_count=2) for i in range(2)]
    joined = [{k: np.concatenate([x[k] for x in step]) for k in step[0]} for step in zip(*parts, strict=True)]
    assert_same(batches[:6], joined)
    alone = take({**config, 'other': '', 'features': ('image',)}, 6)
    assert_same(alone, [{'image': x['image']} for x in batches[:6]])
    # In evaluation both stand still.
    test = data.dataset(config, 'test')
    taken = test.take(np.arange(len(test)))
    assert all((taken[k][i] == test[i][k]).all() for k in ('image', 'other') for i in range(len(test)))
    others = data.dataset({**config, 'source': other, 'other': '', 'features': ('image',)}, 'test')
    np.testing.assert_array_equal(taken['other'][-1], others[(len(test) - 1) % len(others)]['image'])
    # Samples are of all pictures of both, however many there are of the other kind.
    for one, two in ((test.examples, others), (others, test.examples)):
        found = UnpairedExamples(one, two).take_cyclic(np.arange(7))
        for name, source in (('image', one), ('other', two)):
            np.testing.assert_array_equal(found[name], source.take(np.arange(7) % len(source))['image'])
    assert others.identity in test.identity


def test_others_are_mirrored_on_their_own(tmp_path):
    source = write_folder(tmp_path / 'in', [])
    for name in ('a', 'b'):
        Image.fromarray(np.arange(8, dtype=np.uint8)[None].repeat(8, 0)).save(tmp_path / 'in' / f'{name}.png')
    config = make(tmp_path, source=source, other=source, features=('image', 'other'), flip=True, batch=256)
    flipped = {k: x[:, 0, 0, 0] > 0 for k, x in take(config, 1)[0].items()}
    assert abs(np.corrcoef(flipped['image'], flipped['other'])[0, 1]) < 0.2 and 0.4 < flipped['other'].mean() < 0.6


def test_others_that_are_not_there(prepared, tmp_path):
    config = make(prepared, features=('image', 'other'))
    for other, match in {
        '': 'set config.data.other',
        'digit': "config.data.other: no source 'digit'",
        f'folder:{tmp_path}/nowhere': 'nowhere does not exist',
        'folder:': 'config.data.other: say which folder',
    }.items():
        with refused(match):
            data.dataset({**config, 'other': other}, 'train')


# --- sets of TFDS


class ToyFaces(tfds.core.GeneratorBasedBuilder):
    """As CelebA is: encoded images, attributes in a dict; only a train split."""

    VERSION = tfds.core.Version('1.0.0')
    splits = {'train': 10}
    generated = 0

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    'photo': tfds.features.Image(shape=(None, None, 3)),
                    'name': tfds.features.Text(),
                    'kind': tfds.features.ClassLabel(names=['a', 'b', 'c']),
                    'attributes': {'Smiling': np.bool_, 'Age': np.int64},
                    'landmarks': tfds.features.Tensor(shape=(2, 2), dtype=np.float32),
                    'words': tfds.features.Sequence(np.int64),
                }
            )
        )

    def dataset_info_from_configs(self, **kwargs):
        return tfds.core.DatasetInfo(builder=self, **kwargs)

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(n) for name, n in self.splits.items()}

    def image(self, i):
        return encoded(grey(i, 14, 10))

    def _generate_examples(self, n):
        for i in range(n):
            type(self).generated += 1
            yield (
                i,
                {
                    'photo': self.image(i),
                    'name': f'face {i}',
                    'kind': i % 3,
                    'attributes': {'Smiling': i % 2 == 1, 'Age': i + 20},
                    'landmarks': np.full((2, 2), i / 2, np.float32),
                    'words': list(range(i)),
                },
            )


class ToyValidated(ToyFaces):
    splits = {'train': 6, 'validation': 4}


class ToyUntrained(ToyFaces):
    splits = {'extra': 4}


class ToyArrays(ToyFaces):
    def image(self, i):
        return np.zeros((4, 4, 3), np.uint8)


class ToyFragile(ToyFaces):
    broken = True

    def image(self, i):
        if self.broken and i == 7:
            raise OSError('the disk\nis full')
        return super().image(i)


def test_tfds_set(tmp_path, capfd):
    names = ('image', 'label', 'attributes/Smiling', 'attributes/Age', 'landmarks')
    config = make(tmp_path, source='toy_faces', features=names, size=10)
    spec = data.spec(config)
    assert spec.classes == 3 and spec.features['landmarks'] == jax.ShapeDtypeStruct((2, 2), np.float32)
    assert not os.listdir(tmp_path), 'spec prepares nothing'
    ToyFaces.generated = 0
    train, test = data.dataset(config, 'train'), data.dataset(config, 'test')
    assert (len(train), len(test)) == (8, 2) and ToyFaces.generated == 10
    seen = []
    for examples in (train, test):
        for i in range(len(examples)):
            e = examples[i]
            n = int(e['image'][0, 0, 0])
            assert (e['label'], e['attributes/Smiling'], e['attributes/Age']) == (n % 3, n % 2, n + 20)
            np.testing.assert_array_equal(e['landmarks'], np.full((2, 2), n / 2, np.float32))
            assert {k: (v.shape, v.dtype) for k, v in e.items()} == {
                k: (s.shape, s.dtype) for k, s in spec.features.items()
            }
            seen.append(n)
    assert sorted(seen) == list(range(10))
    assert 'Traceback' not in capfd.readouterr().err
    assert take(config, 3)[0]['attributes/Age'].shape == (8,)


def test_tfds_validation_stands_in_for_test(tmp_path):
    config = make(tmp_path, source='toy_validated')
    assert (len(data.dataset(config, 'train')), len(data.dataset(config, 'test'))) == (6, 4)


def test_tfds_set_without_train_split(tmp_path):
    with refused('toy_untrained has no split train, only extra'):
        data.dataset(make(tmp_path, source='toy_untrained'), 'train')


def test_tfds_features_that_are_not_there(tmp_path):
    config = make(tmp_path, source='toy_faces')
    with refused("has no 'attributes/Smilin'; did you mean attributes/Smiling"):
        data.spec({**config, 'features': ('image', 'attributes/Smilin')})
    with refused("has no 'zzz'; it has image, label, "):
        data.spec({**config, 'features': ('image', 'zzz')})
    for name in ('name', 'words'):  # text, and a list of no fixed length
        with refused(f"has no '{name}'"):
            data.spec({**config, 'features': ('image', name)})
    with refused('config.data.classes = 7, but toy_faces has 3 classes'):
        data.spec({**config, 'features': ('image', 'label'), 'classes': 7})


def test_tfds_set_that_fails_half_way_is_no_set(tmp_path):
    config = make(tmp_path, source='toy_fragile')
    ToyFragile.broken = True
    with refused('toy_fragile could not be prepared: .*the disk is full'):
        data.dataset(config, 'train')
    ToyFragile.broken = False
    assert len(data.dataset(config, 'train')) == 8


@pytest.mark.skipif(bool(sources.importlib.util.find_spec('tensorflow')), reason='TensorFlow is installed')
def test_tfds_set_that_needs_tensorflow(tmp_path):
    with refused(r"toy_arrays could not be prepared: it needs TensorFlow .*pip install 'jaxgen\[prepare\]'"):
        data.dataset(make(tmp_path, source='toy_arrays'), 'train')


def test_tfds_set_in_another_format(tmp_path):
    config = make(tmp_path, source='toy_faces')
    data.dataset(config, 'train')
    info = tmp_path / 'toy_faces' / '1.0.0' / 'dataset_info.json'
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with refused(r'stored as tfrecord.*convert_format --dataset_version_dir=.*toy_faces/1.0.0'):
        data.dataset(config, 'train')


def test_tfds_set_of_which_a_part_is_there(tmp_path):
    config = make(tmp_path, source='toy_faces')
    data.dataset(config, 'train')
    place = tmp_path / 'toy_faces' / '1.0.0'
    os.rename(place / 'dataset_info.json', place / 'kept')
    with refused('a part of toy_faces only'):
        data.dataset(config, 'train')
    os.rename(place / 'kept', place / 'dataset_info.json')
    for file in place.glob('*array_record*'):
        file.unlink()
    with pytest.raises(RunError, match=r'toy_faces/1.0.0: cannot read example 0 .*No such file.*; delete it'):
        data.dataset(config, 'train')


def test_unknown_names(tmp_path):
    for name, match in {
        'cifa10': 'did you mean cifar10',
        'digit': 'did you mean digits',
        'zzzzzzzz': 'known: digits, shapes, folder:PATH',
        'mnist/nosuch': 'mnist/nosuch cannot be had',
        'nowhere:mnist': 'no source',
        'two words': 'no source',
        '': "no source ''",
    }.items():
        for call in (data.spec, lambda c: data.dataset(c, 'train')):
            with refused(match):
                call(make(tmp_path, source=name))


@pytest.mark.parametrize(
    ('name', 'match'),
    [
        (
            'cifar10',
            'cifar10 could not be prepared: www.cs.toronto.edu cannot be reached; put cifar-10-binary.tar.gz into',
        ),
        ('celeb_a', 'on quota.*img_align_celeba.zip.*downloads/manual.*folder:PATH'),
        ('imagenet2012', 'fetched by hand, into .*downloads/manual: .*ILSVRC2012_img_train.tar'),
    ],
)
def test_tfds_set_without_a_network(tmp_path, monkeypatch, capfd, name, match):
    def no_network(*_, **__):
        raise socket.gaierror(-2, 'Name or service not known')

    monkeypatch.setattr(socket, 'getaddrinfo', no_network)
    config = make(tmp_path, source=name)
    assert data.spec(config).features['image'].shape == (8, 8, 1)
    begin = time.time()
    with refused(match):
        data.dataset(config, 'train')
    assert time.time() - begin < 30
    assert capfd.readouterr() == ('', '')


def test_labels_of_tfds_sets_are_known_without_them(tmp_path):
    counts = {'cifar10': 10, 'imagenet2012': 1000, 'mnist': 10}
    for name, count in counts.items():
        assert data.spec(make(tmp_path, source=name, features=('image', 'label'))).classes == count
    assert data.spec(make(tmp_path, source='celeb_a', features=('image', 'attributes/Smiling'))).classes == 0
    assert not os.listdir(tmp_path)


# --- faults


def run(code: str, *args: str, **env: str) -> subprocess.Popen:
    tests = os.path.join(ROOT, 'tests')
    paths = os.pathsep.join([*filter(None, [env.pop('first', '')]), ROOT, tests, os.path.join(tests, 'data')])
    return subprocess.Popen(
        [sys.executable, '-W', 'error', '-c', code, *args],
        env={**os.environ, 'PYTHONPATH': paths, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_interrupted_preparation_leaves_no_set(tmp_path, monkeypatch):
    code = """
import os, signal, sys
from jaxgen import data
from jaxgen.config import DEFAULTS
from jaxgen.data import builders, shapes
builders.SHAPES = {'train': 50, 'test': 20}
draw, calls = shapes.draw, []
def dying(*args):
    calls.append(0)
    if len(calls) == 60:  # in the second split
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(*args)
shapes.draw = dying
data.dataset({**DEFAULTS['data'], 'dir': sys.argv[1], 'source': 'shapes', 'size': 4, 'channels': 3}, 'train')
"""
    process = run(code, str(tmp_path))
    assert process.communicate(timeout=120)[1] == '' and process.returncode == -signal.SIGKILL
    place = tmp_path / 'jaxgen_shapes' / 'size4'
    assert [name for name in os.listdir(place) if name.startswith('incomplete')] and not (place / '1.4.0').exists()
    monkeypatch.setattr(builders, 'SHAPES', {'train': 50, 'test': 20})
    assert len(data.dataset(make(tmp_path, source='shapes', size=4, channels=3), 'test')) == 20
    assert sorted(os.listdir(place)) == ['.lock', '1.4.0']


def test_two_processes_prepare_one_set(tmp_path):
    code = """
import sys
from jaxgen import data
from jaxgen.config import DEFAULTS
print(len(data.dataset({**DEFAULTS['data'], 'dir': sys.argv[1]}, 'train')))
"""
    processes = [run(code, str(tmp_path)) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.strip() == '1438' and 'Traceback' not in err
    assert sorted(os.listdir(tmp_path / 'jaxgen_digits')) == ['.lock', '1.0.0']


def test_waits_for_the_one_who_prepares(tmp_path, capfd):
    config = make(tmp_path)
    entered = threading.Event()
    builder = sources.resolve(config).builder()
    done = []

    def other():
        entered.wait()
        done.append(len(data.dataset(config, 'train')))

    thread = threading.Thread(target=other)
    thread.start()
    with sources.lock(builder):
        entered.set()
        time.sleep(1)
        assert not done and not (tmp_path / 'jaxgen_digits' / '1.0.0').exists()
    thread.join(60)
    assert done == [1438] and 'waiting for another process' in capfd.readouterr().err


def test_a_directory_that_cannot_be_written_to(tmp_path):
    (tmp_path / 'file').write_text('x')
    with refused('cannot write to .*config.data.dir'):
        data.dataset(make(tmp_path / 'file' / 'inside'), 'train')


def test_tensorflow_is_not_imported(tmp_path):
    """A package of that name lies in wait, so that even a guarded import would show."""
    os.makedirs(tmp_path / 'trap' / 'tensorflow')
    (tmp_path / 'trap' / 'tensorflow' / '__init__.py').write_text("print('TRAPPED')\nraise ImportError('trap')\n")
    source = write_folder(tmp_path / 'in', [], a=range(5), b=range(5, 10))
    code = """
import sys
import data_test
from jaxgen import data
base = data_test.make(sys.argv[1], features=('image', 'label'), channels=3)
for source in ('digits', sys.argv[2], 'toy_faces'):
    config = {**base, 'source': source}
    data.spec(config), data.dataset(config, 'test')[0]
    print(next(data.batches(config, seed=0))['image'].shape)
print([name for name in sys.modules if name.partition('.')[0] == 'tensorflow'])
"""
    process = run(code, str(tmp_path / 'sets'), source, first=str(tmp_path / 'trap'))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines() == ['(8, 8, 8, 3)'] * 3 + ['[]']


# --- what a run keeps of its data


def test_a_spec_comes_back_from_json(tmp_path, prepared):
    source = write_folder(tmp_path / 'in', [], cat=[1, 2], dog=[3, 4])
    for config in (
        make(tmp_path, source=source, features=('image', 'label')),
        make(prepared, features=('image', 'label', 'domain')),
        make(prepared, source='shapes', channels=3, features=('image', 'label', 'factors', 'caption')),
        make(prepared),
    ):
        spec = data.spec(config)
        assert data.spec_from_json(json.loads(json.dumps(data.spec_to_json(spec)))) == spec
    assert data.spec(make(tmp_path, source=source, features=('image', 'label'))).names == ('cat', 'dog')
    good = data.spec_to_json(spec)
    for bad in (
        *([], None, 3, {}, {**good, 'classes': -1}, {**good, 'classes': '3'}, {**good, 'names': ['a']}),
        *({**good, 'features': {}}, {**good, 'features': []}, {**good, 'features': {'image': {'shape': [8, 8]}}}),
        {**good, 'features': {'image': {'shape': [8, 8, -1], 'dtype': 'uint8'}}},
        {**good, 'features': {'image': {'shape': [8, 8, 1], 'dtype': 'object'}}},
        {**good, 'captioned': [0]},  # without factors
    ):
        with pytest.raises(ValueError, match=r'.'):
            data.spec_from_json(bad)


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


@pytest.mark.parametrize('sources, same', [
    (('shapes', 'shapes:outlined'), True), (('shapes', 'shapes'), True), (('shapes', 'shapes:centred'), False),
    (('shapes:centred', 'shapes:centred'), False), (('digits', 'digits'), False),
])  # fmt: skip
def test_which_sources_show_the_same_test_scenes(prepared, sources, same):
    one, other = sources
    assert data.same_test_scenes(make(prepared, source=one, other=other, channels=3)) is same


def test_classes_by_name():
    spec = data.Spec({}, 3, ('1', '2', 'red fox'))
    assert [spec.class_number(x) for x in ('1', '2', 'red fox', 1, 2, '0')] == [0, 1, 2, 1, 2, 0]
    with refused("no class 'red fix'; did you mean red fox"):
        spec.class_number('red fix')
    with refused("no class 'zzz'; they are 1, 2, red fox"):
        spec.class_number('zzz')
    assert data.Spec({}, 3).class_number('2') == 2


def test_one_place_has_one_name(tmp_path, monkeypatch):
    write_folder(tmp_path / 'in', [1, 2, 3])
    os.symlink(tmp_path / 'in', tmp_path / 'link')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    spellings = [
        f'folder:{p}' for p in (f'{tmp_path}/in', f'{tmp_path}/in/', 'in', './in//', '~/in', 'link', '~/link/')
    ]
    assert {data.canonical(source) for source in spellings} == {f'folder:{os.path.realpath(tmp_path / "in")}'}
    assert data.canonical('cifar10') == 'cifar10' and data.canonical('shapes:outlined') == 'shapes:outlined'
    assert data.canonical('folder:') == 'folder:'


# --- prepared sets of strangers


def plant(where, kind: str, marker, change) -> str:
    """A complete prepared set below `where` whose features.json is changed; the source's name."""
    name = {'toy': 'toy_faces:1.0.0', 'unknown': 'planted:1.0.0', 'config': 'toy_faces/other'}[kind]
    data.dataset(make(where, source='toy_faces'), 'train')
    place = where / 'toy_faces' / '1.0.0'
    if kind != 'toy':
        new = where / 'planted' / '1.0.0' if kind == 'unknown' else where / 'toy_faces' / 'other' / '1.0.0'
        os.makedirs(new.parent)
        os.rename(place, new)
        place = new
        info = json.loads((place / 'dataset_info.json').read_text())
        for shard in place.glob('toy_faces-*'):
            os.rename(shard, place / shard.name.replace('toy_faces', new.parent.name))
        info |= {'name': 'planted'} if kind == 'unknown' else {'configName': 'other'}
        (place / 'dataset_info.json').write_text(json.dumps(info))
    (where / 'planted_module.py').write_text(f'open({str(marker)!r}, "w").close()\n')
    features = json.loads((place / 'features.json').read_text())
    (place / 'features.json').write_text(json.dumps(change(features)))
    return name


def in_a_dict(features: dict) -> dict:
    features['featuresDict']['features']['evil'] = {'pythonClassName': 'planted_module.Evil', 'text': {}}
    return features


def in_a_sequence(features: dict) -> dict:
    inner = {'pythonClassName': 'planted_module.Evil', 'text': {}}
    name = 'tensorflow_datasets.core.features.sequence_feature.Sequence'
    features['featuresDict']['features']['evil'] = {
        'pythonClassName': name,
        'sequence': {'feature': inner, 'length': '-1'},
    }
    return features


PLANTED = {
    'at the top': lambda features: {**features, 'pythonClassName': 'planted_module.Evil'},
    'in a dict': in_a_dict,
    'in a sequence': in_a_sequence,
    'in JSON of old': lambda _: {'type': 'planted_module.Evil', 'content': {}},
}


@pytest.mark.parametrize('where', PLANTED)
@pytest.mark.parametrize('kind', ['toy', 'unknown', 'config'])
def test_a_prepared_set_runs_no_code(tmp_path, monkeypatch, kind, where):
    marker = tmp_path / 'marker'
    name = plant(tmp_path, kind, marker, PLANTED[where])
    monkeypatch.syspath_prepend(str(tmp_path))
    config = make(tmp_path, source=name)
    for call in (data.spec, lambda c: data.dataset(c, 'train'), lambda c: data.labels(c, 'test')):
        with refused(r"names the class 'planted_module.Evil', which is not one of TFDS"):
            call(config)
    assert not marker.exists() and 'planted_module' not in sys.modules
    with pytest.raises(UserError):  # another way into TFDS
        tfds.builder_from_directory(next(iter(tmp_path.glob('**/features.json'))).parent)
    assert not marker.exists()


def test_a_prepared_set_without_its_builder_is_read(tmp_path):
    name = plant(tmp_path, 'unknown', tmp_path / 'marker', lambda features: features)
    examples = data.dataset(make(tmp_path, source=name, features=('image', 'label', 'landmarks')), 'train')
    assert len(examples) == 8 and int(examples[5]['label']) == int(examples[5]['image'][0, 0, 0]) % 3


class ToyPickled(ToyFaces):
    content = b''

    def image(self, i):
        pickle.loads(self.content)
        return super().image(i)


class Call:
    def __reduce__(self):
        return os.mkdir, (Call.place,)


def test_pickles_of_a_set_are_not_run(tmp_path):
    Call.place = str(tmp_path / 'marker')
    ToyPickled.content = pickle.dumps(Call())
    with refused(r'pickle that calls posix.mkdir: it is not run'):
        data.dataset(make(tmp_path, source='toy_pickled'), 'train')
    assert not os.path.exists(Call.place)
    ToyPickled.content = pickle.dumps({'a': np.arange(3), 'b': np.float64(2), 'c': [1, 'x']})
    assert len(data.dataset(make(tmp_path, source='toy_pickled'), 'train')) == 8
    pickle.loads(pickle.dumps(Call()))  # outside it is as ever
    assert os.path.exists(Call.place)


def test_nothing_is_written_through_planted_links(tmp_path, monkeypatch):
    outside = tmp_path / 'outside'
    os.makedirs(outside)
    os.makedirs(tmp_path / 'sets')
    os.symlink(outside, tmp_path / 'sets' / 'jaxgen_digits')
    with refused('is a link that leads out of'):
        data.dataset(make(tmp_path / 'sets'), 'train')
    os.remove(tmp_path / 'sets' / 'jaxgen_digits')
    os.makedirs(tmp_path / 'sets' / 'jaxgen_digits')
    os.symlink(outside / 'new', tmp_path / 'sets' / 'jaxgen_digits' / '.lock')
    with refused(r'cannot write to .*\.lock'):
        data.dataset(make(tmp_path / 'sets'), 'train')
    assert not os.listdir(outside)
    # A person's own directory may be a link, and where it is the default, hold links.
    os.symlink(outside, tmp_path / 'mine')
    assert len(data.dataset(make(tmp_path / 'mine'), 'test')) == 359
    os.rename(outside / 'jaxgen_digits', tmp_path / 'moved')
    os.symlink(tmp_path / 'moved', outside / 'jaxgen_digits')
    monkeypatch.setenv('TFDS_DATA_DIR', str(outside))
    (tmp_path / 'moved' / '1.0.0' / 'dataset_info.json').unlink()
    assert len(data.dataset(make(''), 'test')) == 359


# --- what a folder holds, and what is said of the rest


def numbers(config: dict, split: str = 'train') -> dict[int, int]:
    """{grey value: label} of a split of `write_folder`'s images."""
    examples = data.dataset({**config, 'features': ('image', 'label')}, split)
    return {int(e['image'][0, 0, 0]): int(e['label']) for e in (examples[i] for i in range(len(examples)))}


def test_folders_named_by_numbers_are_in_their_order(tmp_path):
    inside = {str(c): range(20 * c, 20 * c + 6) for c in range(11)}
    config = make(tmp_path, source=write_folder(tmp_path / 'in', [], **inside), features=('image', 'label'))
    assert data.spec(config).names == tuple(map(str, range(11)))
    found = numbers(config) | numbers(config, 'test')
    assert found == {20 * c + i: c for c in range(11) for i in range(6)}
    assert folder.ordered({'1', '10', '9', 'a'}) == ('1', '10', '9', 'a')
    assert folder.ordered({'-1', '10', '9'}) == ('-1', '10', '9')
    assert folder.ordered({'007', '10', '9', '7'}) == ('007', '7', '9', '10')


@pytest.mark.parametrize(
    ('train', 'test', 'unused'),
    [('train', 'test', ''), ('Train', 'val', ''), ('training', 'Validation', ''), ('train', 'test', 'valid')],
)
def test_folders_of_splits(tmp_path, capfd, train, test, unused):
    inside = {f'{train}/cat': range(10), f'{train}/dog': range(10, 20), f'{test}/dog': [200, 201], f'{test}/emu': [250]}
    inside |= {f'{unused}/cat': [99]} if unused else {}
    config = make(tmp_path, source=write_folder(tmp_path / 'in', [], **inside), features=('image', 'label'))
    assert data.spec(config).names == ('cat', 'dog')
    assert numbers(config) == {i: i // 10 for i in range(20)}
    assert numbers(config, 'test') == {200: 1, 201: 1}
    said = capfd.readouterr().err
    assert said.count('\n') == 1 and '1 test images of no class that training has' in said
    assert not unused or f'1 files in {unused}/, which is not used beside {test}/' in said


def test_folders_that_are_classes_after_all(tmp_path):
    """A train is also a vehicle; a training split alone is split by us; a test split may have no labels."""
    config = make(tmp_path, source=write_folder(tmp_path / 'a', [], train=range(5), bus=range(9, 14)))
    assert data.spec({**config, 'features': ('image', 'label')}).names == ('bus', 'train')
    config = make(tmp_path, source=write_folder(tmp_path / 'b', [], val=range(5), test=range(9, 14)))
    assert data.spec({**config, 'features': ('image', 'label')}).names == ('test', 'val')
    inside = {'train/cat': range(8), 'train/dog': range(8, 16), 'test': [99]}
    config = make(tmp_path, source=write_folder(tmp_path / 'c', [], **inside))
    train, test = numbers(config), numbers(config, 'test')
    assert test and train | test == {i: i // 8 for i in range(16)}
    flat = make(tmp_path, source=write_folder(tmp_path / 'd', [], train=range(8), test=[98, 99]))
    assert [len(data.dataset(flat, split)) for split in ('train', 'test')] == [8, 2]


def test_pairs_in_splits(tmp_path):
    for split, n in (('train', 4), ('val', 2)):
        write_pairs(tmp_path / 'in' / split, range(n), edges=range(n))
    config = make(tmp_path, source=f'pairs:{tmp_path / "in"}', size=12, features=('image', 'edges'))
    assert [len(data.dataset(config, split)) for split in ('train', 'test')] == [4, 2]
    for split in ('train', 'test'):
        x = data.dataset(config, split)[1]
        np.testing.assert_array_equal(x['image'] + 100, x['edges'])


def test_every_class_of_two_images_is_trained_on():
    files = [folder.File(f'{c}/{i}.png', 1, 1) for c in range(300) for i in range(2)]
    alone = [folder.File(f'alone{c}/0.png', 1, 1) for c in range(40)]
    for share in (0.2, 0.8):
        train, test = folder.split([*files, *alone], share, classes=True)
        assert sorted(train + test) == sorted([*files, *alone])
        assert {f.path.split('/')[0] for f in train} == {f.path.split('/')[0] for f in [*files, *alone]}
        assert len(test) > 50 and not set(test) & set(alone)
        # Others stay where they would be: the rarest alone are moved.
        assert set(test) <= set(folder.split([*files, *alone], share)[1])
    for n in range(2, 6):  # each side has one in any case
        for group in (alone[:n], files[:n]):
            assert all(folder.split(group, share, classes=True)[k] for share in (0.01, 0.99) for k in (0, 1))


def test_what_a_folder_leaves_out_is_counted(tmp_path, capfd):
    place = tmp_path / 'in'
    source = write_folder(place, [], cat=range(10), dog=range(10, 20), emu=[30])
    for i in range(40):
        (place / 'cat' / f'IMG_{i}.HEIC').write_bytes(b'x')
    (place / 'notes').write_text('x')
    os.symlink(place / 'cat' / '1.png', place / 'dog' / '1.png')  # the first link, but no real file
    os.link(place / 'dog' / '11.png', place / 'emu' / 'hard.png')
    os.symlink(place / 'dog', place / 'a dog')
    os.mkfifo(place / 'cat' / 'x.png')
    os.symlink('/dev/zero', place / 'dog' / 'zero.PNG')
    (place / 'cat' / 'bad.JPEG').write_bytes(b'x')
    os.makedirs(place / 'fox' / '.hidden')
    config = make(tmp_path / 'sets', source=source, max_corrupt=0.1)
    found = numbers(config) | numbers(config, 'test')
    # Of the two names of one file the first in order is taken, dog/1.png being a link to a later one's equal.
    assert found == {**dict.fromkeys(range(10), 0), **dict.fromkeys(range(10, 20), 1), 30: 2}
    said = capfd.readouterr().err
    assert said.count('\n') == 1
    for part in (
        '41 files with other endings (40 .heic, 1 without one)',
        '2 files linked twice',
        '1 folders linked twice',
        '2 that are no regular files',
        '1 classes of one image',
        "1 folders without images ('fox')",
        "1 of 22 files, which cannot be read as images ('cat/bad.JPEG')",
    ):
        assert part in said, (part, said)


def test_endless_files_are_no_images(tmp_path):
    """Nothing waits and nothing is read without an end, wherever images are read."""
    place = tmp_path / 'in'
    write_folder(place, range(4))
    os.mkfifo(place / 'x.png')
    os.symlink('/dev/zero', place / 'y.png')
    with refused('holds 2 that are no regular files'):
        data.Pictures(str(place), (8, 8, 1))
    for name in ('x.png', 'y.png'):
        with pytest.raises(ValueError, match='no regular file'):
            folder.read_file(str(place / name))
    with open(place / 'z.png', 'wb') as file:
        file.truncate(2**40)  # a file with a hole, which reading would fill
    with pytest.raises(ValueError, match=r'it has more than the .* bytes'):
        folder.read_file(str(place / 'z.png'))
    os.remove(place / 'x.png'), os.remove(place / 'y.png'), os.remove(place / 'z.png')
    os.symlink(place, place / 'loop')
    os.symlink('self', place / 'self')
    assert len(data.Pictures(str(place), (8, 8, 1))) == 4


def bomb(side: int) -> bytes:
    """A PNG whose header says side x side pixels, and which has none."""
    chunk = b'IHDR' + struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    end = b'IDAT' + zlib.compress(b'')
    chunks = b''.join(struct.pack('>I', len(c) - 4) + c + struct.pack('>I', zlib.crc32(c)) for c in (chunk, end))
    return b'\x89PNG\r\n\x1a\n' + chunks


def test_images_of_too_many_pixels_are_not_decoded(tmp_path, monkeypatch, capfd):
    icon = struct.pack('<HHHBBBBHHII', 0, 1, 1, 16, 16, 0, 0, 1, 32, len(bomb(9000)), 22) + bomb(9000)
    loads, contents = [], (bomb(9000), icon, encoded(grey(0, 1, 90)), encoded(grey(0, 90, 1), 'BMP'))
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda self: loads.append(self.size))
    for content in contents:
        with pytest.raises(ValueError, match=r'pixels are more than config.data.max_pixels = 80$'):
            transforms.load(content, 3, 80)
    with pytest.raises(ValueError, match='9000 x 9000 pixels are more than'):
        transforms.load(bomb(9000), 3)
    assert not loads
    monkeypatch.undo()
    source = write_folder(tmp_path / 'in', range(8))
    grey(1, 100, 100).save(tmp_path / 'in' / 'large.png')
    config = make(tmp_path, source=source, max_corrupt=0.2)
    few = data.dataset({**config, 'max_pixels': 9999}, 'train')
    assert 'large.png' in capfd.readouterr().err
    more = data.dataset({**config, 'max_pixels': 10_000}, 'train')
    assert len(more) + len(data.dataset(config, 'test')) == 9 > len(few)
    with pytest.raises(RunError, match=r'more than config.data.max_pixels = 60\)'):  # of TFDS and of our own sets, too
        data.dataset(make(tmp_path, max_pixels=60), 'train')


def test_the_limit_of_pixels_is_the_one_of_the_config(monkeypatch):
    """PIL has one of its own, which says nothing of what the person allows."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50)
    assert transforms.load(encoded(grey(0, 20, 20)), 1, 400).size == (20, 20)


def test_pairs_of_other_aspect_ratios(tmp_path):
    for i in range(4):
        for part, (width, height) in {'image': (64, 32), 'mask': (32, 32)}.items():
            os.makedirs(tmp_path / 'in' / part, exist_ok=True)
            grey(i, height, width).save(tmp_path / 'in' / part / f'{i}.png')
    config = make(tmp_path, source=f'pairs:{tmp_path / "in"}', size=8, features=('image', 'mask'))
    with refused(r'image/\d.png is 64 x 32 pixels and mask/\d.png is 32 x 32'):
        data.dataset(config, 'train')
    for i in range(4):
        grey(i, 16, 31).save(tmp_path / 'in' / 'mask' / f'{i}.png')  # half of it, rounded down
    assert len(data.dataset(config, 'train')) + len(data.dataset(config, 'test')) == 4
    turned = Image.Exif()
    turned[0x0112] = 6
    for i in range(4):  # 16 x 32 as stored, 32 x 16 as shown
        grey(i, 32, 16).save(tmp_path / 'in' / 'mask' / f'{i}.png', exif=turned)
    assert len(data.dataset(config, 'train')) + len(data.dataset(config, 'test')) == 4


def test_masks_with_a_palette_keep_their_classes(tmp_path):
    """Numbers stay what they are, at every size: red and this blue are of one grey, and no class lies between two."""
    classes = np.random.default_rng(0).integers(0, 3, (4, 12, 12), np.uint8)
    for part in ('image', 'mask'):
        os.makedirs(tmp_path / 'in' / part)
        for i, x in enumerate(classes):
            image = Image.fromarray(x)
            image.putpalette([0, 0, 0, 128, 0, 0, 0, 0, 255, 255, 255, 255])
            image.save(tmp_path / 'in' / part / f'{i}.png', transparency=2 if i else b'\0\xff')
    config = make(tmp_path, source=f'pairs:{tmp_path / "in"}', size=12, features=('image', 'mask'), test_share=0.3)
    found = [
        x for s in ('train', 'test') for x in (data.dataset(config, s)[i] for i in range(len(data.dataset(config, s))))
    ]
    assert sorted(x['mask'].tobytes() for x in found) == sorted(x.tobytes() for x in classes)
    for size in (5, 31):
        x = data.dataset({**config, 'size': size}, 'train')
        assert {*np.unique(x[0]['mask'])} == {0, 1, 2}
    moving = {**config, 'size': 9, 'crop': 'random', 'jitter': 2}
    assert {v for b in take(moving, 4) for v in np.unique(b['mask'])} == {0, 1, 2}
    colours = {(0, 0, 0), (128, 0, 0), (0, 0, 255)}
    x = data.dataset({**config, 'size': 7, 'channels': 3}, 'train')[0]['mask']
    assert {tuple(map(int, pixel)) for pixel in x.reshape(-1, 3)} == colours
    two = Image.fromarray(np.array([[0, 1]], np.uint8))
    two.putpalette([0, 0, 0, 255, 255, 255])
    black_and_white = transforms.load(encoded(two), 1, palette=True)
    assert transforms.to_array(black_and_white)[..., 0].tolist() == [[0, 255]]


def png_of(depth: int, kind: int, rows: list[bytes], key: bytes) -> bytes:
    """A PNG one pixel high for each row of packed pixels, with a transparent value."""
    width = {(0, 1): 8, (0, 2): 4, (0, 4): 2, (0, 8): 1, (0, 16): 1, (2, 8): 1, (2, 16): 1}[kind, depth]
    chunks = [b'IHDR' + struct.pack('>IIBBBBB', width, len(rows), depth, kind, 0, 0, 0), b'tRNS' + key]
    chunks += [b'IDAT' + zlib.compress(b''.join(b'\0' + row for row in rows)), b'IEND']
    packed = (struct.pack('>I', len(c) - 4) + c + struct.pack('>I', zlib.crc32(c)) for c in chunks)
    return b'\x89PNG\r\n\x1a\n' + b''.join(packed)


@pytest.mark.parametrize(
    ('content', 'shown'),
    {
        '1 bit': (png_of(1, 0, [b'\x80'], b'\0\0'), [255] * 8),
        '2 bits': (png_of(2, 0, [b'\x1b'], b'\0\1'), [0, 255, 170, 255]),
        '4 bits': (png_of(4, 0, [b'\x23'], b'\0\2'), [255, 51]),
        '8 bits': (png_of(8, 0, [b'\7', b'\5'], b'\0\7'), [255, 5]),
        '16 bits': (png_of(16, 0, [b'\0\0', b'\1\1', b'\1\0'], b'\0\0'), [255, 1, 1]),
        '16 bits, another': (png_of(16, 0, [b'\0\0', b'\x75\x30', b'\x75\x31'], b'\x75\x30'), [0, 255, 117]),
        '24 bits': (png_of(8, 2, [b'\7\7\7', b'\5\5\5'], b'\0\7\0\7\0\7'), [255, 5]),
        '48 bits': (png_of(16, 2, [b'\7\0' * 3, b'\5\0' * 3], b'\7\0' * 3), [255, 5]),
    }.values(),
)
def test_a_transparent_value_is_white(content, shown):
    """The PNG specification scales a value of b bits by 255 / (2^b - 1); the transparent one is in b bits."""
    assert np.asarray(transforms.load(content, 1)).reshape(-1).tolist() == shown


def test_a_folder_is_known_by_what_it_holds(tmp_path):
    source = write_folder(tmp_path / 'in', [], cat=range(6), dog=range(6, 12))
    config = make(tmp_path / 'sets', source=source, features=('image', 'label'))
    identity = data.dataset(config, 'train').identity
    shutil.copytree(tmp_path / 'in', tmp_path / 'elsewhere' / 'out')
    for file in (tmp_path / 'elsewhere' / 'out').glob('*/*'):
        os.utime(file, (5, 5))
    for spelled in (f'{source}/', f'folder:{tmp_path / "elsewhere" / "out"}'):
        moved = data.dataset({**config, 'source': spelled}, 'train')
        assert moved.identity == identity
        np.testing.assert_array_equal(moved[3]['image'], data.dataset(config, 'train')[3]['image'])
    assert len(os.listdir(tmp_path / 'sets' / 'jaxgen_folder')) == 2, 'one place under two names is prepared once'
    assert data.dataset(config, 'test').identity != identity
    grey(77).save(tmp_path / 'elsewhere' / 'out' / 'cat' / '3.png')
    assert data.dataset({**config, 'source': f'folder:{tmp_path / "elsewhere" / "out"}'}, 'train').identity != identity
    os.rename(tmp_path / 'in' / 'cat' / '3.png', tmp_path / 'in' / 'cat' / '33.png')
    assert data.dataset(config, 'train').identity != identity


def test_reports_are_not_written_through_links(tmp_path):
    source = write_folder(tmp_path / 'in', range(9))
    (tmp_path / 'in' / 'bad.png').write_bytes(b'x')
    config = make(tmp_path / 'sets', source=source, max_corrupt=0.2)
    victim = tmp_path / 'victim'
    victim.write_text('mine')
    place = os.path.dirname(sources.resolve(config).builder().data_dir)
    os.makedirs(place)
    os.symlink(victim, os.path.join(place, 'unreadable.txt'))
    data.dataset(config, 'train')
    assert victim.read_text() == 'mine' and not os.path.islink(os.path.join(place, 'unreadable.txt'))
