"""Order, seeking, augmentation and batches of the training data; the examples of a split; the Spec."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time

import numpy as np
import pytest
import sklearn
from data_sets import make, random_image, refused, take, write_folder
from PIL import Image
from support import assert_same

from jaxgen import config as configs
from jaxgen import data
from jaxgen.data import transforms
from jaxgen.data.loader import UnpairedExamples, order
from jaxgen.errors import RunError


def image_numbers(batch) -> list[int]:
    """The numbers of the images of `five` in a batch."""
    return (np.minimum(batch['image'][:, 0, 0, 0], batch['image'][:, 0, -1, 0]) // 20).tolist()


def test_every_epoch_is_a_new_order_of_all_examples(five):
    assert len(data.dataset(five, 'train')) == 5
    numbers = [i for batch in take(five, 25) for i in image_numbers(batch)]
    epochs = [tuple(numbers[i : i + 5]) for i in range(0, 200, 5)]
    assert all(sorted(e) == sorted(epochs[0]) and len(set(e)) == 5 for e in epochs)
    assert len(set(epochs)) > 10


def test_order_is_uniform():
    """All 24 orders of four examples are equally likely; the order of one epoch is independent of the next."""
    orders = order(7, 4)(np.arange(4 * 24_000)).reshape(-1, 4)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and ((counts - 1000) ** 2 / 1000).sum() < 50  # chi squared with 23 degrees
    joint = np.zeros((4, 4))
    np.add.at(joint, (orders[:-1, 0], orders[1:, 0]), 1)
    np.testing.assert_allclose(joint / len(orders), 1 / 16, atol=0.008)


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
    assert time.time() - begin < 60  # reading through would take years


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


def test_dataset_is_random_access(prepared):
    examples = data.dataset(make(prepared, features=('image', 'label')), 'test')
    assert isinstance(examples[0]['label'], np.ndarray) and examples[0]['label'].dtype == np.int32
    np.testing.assert_array_equal(examples[-1]['image'], examples[358]['image'])
    for i in (359, -360):
        with pytest.raises(IndexError):
            examples[i]
    with refused("a split is one of train, validation, test, not 'valid'"):
        data.dataset(make(prepared), 'valid')


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
    with contextlib.closing(data.batches(make(prepared), seed=0)) as batches:
        next(batches)
        assert [t for t in threading.enumerate() if 'grain' in t.name]
    assert not settle()


def test_an_error_in_a_thread_reaches_the_caller(five, monkeypatch):
    def broken(*_):
        raise OSError('bad\nbytes')

    config = {**five, 'crop': 'random'}
    batches = data.batches(config, seed=0)
    monkeypatch.setattr(transforms, 'load', broken)
    with (
        contextlib.closing(batches),
        pytest.raises(RunError, match=r'example \d cannot be decoded \(OSError: bad bytes\)'),
    ):
        list(itertools.islice(batches, 50))


def test_half_are_mirrored_anew_every_time(five):
    plain, flipped = take(five, 40), take({**five, 'flip': True}, 40)
    mirroring = {}
    for x, y in zip(plain, flipped, strict=True):
        for a, b in zip(x['image'], y['image'], strict=True):
            mirrored = (a != b).any()
            np.testing.assert_array_equal(a[:, ::-1] if mirrored else a, b)
            mirroring.setdefault(int(a[0, 0, 0]), []).append(bool(mirrored))
    assert 0.4 < np.mean([m for ms in mirroring.values() for m in ms]) < 0.6
    assert all(0 < np.mean(m) < 1 for m in mirroring.values()), 'one image is mirrored at one time and not at another'


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


def test_jitter_moves_a_window(five):
    """Every window of a square that is larger, and none in evaluation."""
    config = {**five, 'size': 8, 'jitter': 4}  # squares of 12 pixels, as they are stored: nothing is resized
    first = np.concatenate([b['image'][:, 0, 0, 0] for b in take(config, 60)])
    assert {int(x) % 20 for x in first} == set(range(4, 9)), 'columns 0 to 4 of the square, which begins at 4'
    plain = data.dataset(config, 'train')[0]['image']
    np.testing.assert_array_equal(plain, data.dataset({**five, 'size': 8}, 'train')[0]['image'])
    assert_same(take(config, 12)[7:], take(config, 5, start=7))


def test_a_window_of_the_whole_image(five):
    """With a random crop, the window of an enlarged image lies anywhere in it (VAR's resize and crop)."""
    config = {**five, 'size': 8, 'jitter': 4, 'crop': 'random'}  # of 12 x 20 pixels: nothing is resized
    first = np.concatenate([b['image'][:, 0, 0, 0] for b in take(config, 300)]) % 20
    counts = np.bincount(first, minlength=13)
    assert len(counts) == 13 and counts.min() > 0.7 * len(first) / 13 and counts.max() < 1.3 * len(first) / 13


def test_pad_and_shift_move_training_images_alone(five):
    """JEM pads by 4 pixels and cuts out anywhere; Glow shifts by up to a tenth, in real numbers that are rounded."""
    ramp = {**five, 'size': 12, 'fill': 'edge'}  # columns 4 to 15 of each ramp
    for fields, most in ((dict(pad=3), 3), (dict(shift=1 / 6), 2)):  # of 12: 2 pixels
        images = np.concatenate([b['image'][:, 0, :, 0] for b in take({**ramp, **fields}, 150)]) % 20
        first, last = images[:, 0], images[:, -1]
        left = np.bincount(last.astype(int), minlength=20)
        # Moved left, the first column is another; moved right, the last one is.
        assert set(first.tolist()) == set(range(4, 5 + most)) and set(last.tolist()) == set(range(15 - most, 16))
        expected = np.full(most, 1 / 7) if 'pad' in fields else np.array([1 / 8, 1 / 4])  # by 2 and by 1
        np.testing.assert_allclose(left[15 - most : 15] / len(first), expected, atol=0.03)
        examples = data.dataset({**ramp, **fields}, 'train')
        np.testing.assert_array_equal(examples[0]['image'], data.dataset(ramp, 'train')[0]['image'])
        assert_same(take({**ramp, **fields, 'flip': True}, 12)[7:], take({**ramp, **fields, 'flip': True}, 5, start=7))


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
        (dict(draft=2, crop='resized'), 'draft'),
        (dict(draft=2, box=(0, 0, 4, 4)), 'draft'),
        (dict(draft=17), 'draft'),
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
    """Of the image as it is in the batch: cropped and mirrored with it."""
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


def drawn(config, n: int, **kwargs) -> dict[int, list[bytes]]:
    """{label: the images' bytes, each time that it was trained on} of the first n batches."""
    times: dict[int, list[bytes]] = {}
    for batch in take(config, n, **kwargs):
        for label, image in zip(batch['label'].tolist(), batch['image'], strict=True):
            times.setdefault(label, []).append(image.tobytes())
    return times


@pytest.fixture
def grey_levels(tmp_path):
    """Five images of noise, each a class of its own, in training and as many in the test split."""
    for i in range(5):
        os.makedirs(tmp_path / 'images' / f'{i}', exist_ok=True)
        for split in range(2):
            random_image(10 * i + split, 8, 6).convert('L').save(tmp_path / 'images' / f'{i}' / f'{split}.png')
    source = f'folder:{tmp_path / "images"}'
    return make(tmp_path / 'sets', source=source, test_fraction=0.5, size=(8, 6), features=('image', 'label'), batch=5)


def test_fixed_bits_are_drawn_once(grey_levels):
    config = {**grey_levels, 'binarise': 'fixed'}
    times = drawn(config, 6)
    assert len(times) > 1 and all(len(set(images)) <= 10 // len(times) for images in times.values())
    grey, bits = (data.dataset({**grey_levels, 'binarise': how}, 'train') for how in ('none', 'fixed'))
    for i in range(len(bits)):
        x = bits[i]['image']
        assert set(x.ravel()) == {0, 255} and x.tobytes() in times[int(bits[i]['label'])]
        np.testing.assert_array_equal(x, transforms.binarised(grey[i]['image'][None], 'fixed')[0])
    assert_same(take(config, 3), take({**config, 'cache_mb': 0}, 3))
    assert times.keys() == drawn(config, 6, seed=5).keys()
    assert {x for images in times.values() for x in images} == {
        x for images in drawn(config, 6, seed=5).values() for x in images
    }, 'whatever the seed'
    identities = {data.dataset({**grey_levels, 'binarise': b}, 'test').identity for b in ('none', 'threshold', 'fixed')}
    assert len(identities) == 3


def test_dynamic_bits_are_drawn_anew_in_training_alone(grey_levels):
    config = {**grey_levels, 'binarise': 'dynamic'}
    times = drawn(config, 8)
    assert all(len(set(images)) > 0.9 * len(images) for images in times.values())
    mean = np.mean([np.frombuffer(x, np.uint8) for images in drawn(config, 200).values() for x in images]) / 255
    expected = data.dataset(grey_levels, 'train').take(np.arange(len(data.dataset(grey_levels, 'train'))))['image']
    assert abs(mean - (expected / 255).mean()) < 0.01
    for split in ('train', 'test'):  # elsewhere they are those of 'fixed'
        fixed = data.dataset({**grey_levels, 'binarise': 'fixed'}, split)
        assert_same(data.dataset(config, split).take(np.arange(3)), fixed.take(np.arange(3)))
    # A function of (seed, number): from anywhere, in any process, with any augmentation beside it.
    for fields in ({}, {'flip': True, 'shift': 0.2}):
        changed = {**config, **fields}
        assert_same(take(changed, 12)[7:], take(changed, 5, start=7))
        halves = [take({**changed, 'batch': 10}, 3, process_index=i, process_count=2) for i in (0, 1)]
        for whole, *parts in zip(take({**changed, 'batch': 10}, 3), *halves, strict=True):
            assert_same(whole, {k: np.concatenate([p[k] for p in parts]) for k in whole})
    assert times != drawn(config, 8, seed=1)


def test_bits_are_of_the_image_and_not_of_what_is_beside_it(five):
    config = {**five, 'size': 12, 'low_resolution': 4, 'features': ('image', 'low_resolution')}
    grey, bits = (take({**config, 'binarise': how}, 1)[0] for how in ('none', 'threshold'))
    np.testing.assert_array_equal(bits['low_resolution'], grey['low_resolution'])
    np.testing.assert_array_equal(bits['image'], np.where(grey['image'] > 127, 255, 0))


def test_bits_that_are_stored_as_ones(tmp_path):
    """With white = 1 an image of 0 and 1 is black and white; values between 0 and white are in proportion."""
    for i in range(4):
        bits = np.random.default_rng(i).integers(0, 2, (8, 8)).astype(np.uint8)
        os.makedirs(tmp_path / 'images', exist_ok=True)
        Image.fromarray(bits).save(tmp_path / 'images' / f'{i}.png')
    config = make(tmp_path / 'sets', source=f'folder:{tmp_path / "images"}', test_fraction=0.5)
    for split in ('train', 'test'):
        stored, white = (data.dataset({**config, 'white': w}, split) for w in (255, 1))
        for i in range(len(stored)):
            np.testing.assert_array_equal(white[i]['image'], 255 * stored[i]['image'])
        assert stored.identity != white.identity
    grey = Image.fromarray(np.array([[0, 1, 15, 16, 255]], np.uint8))
    assert np.asarray(transforms.brightened(grey, 15)).tolist() == [[0, 17, 255, 255, 255]]
    assert np.asarray(transforms.brightened(grey.convert('RGB'), 15))[0, 1].tolist() == [17] * 3


@pytest.fixture
def coordinates(tmp_path):
    """Ten images of 16 rows and 24 columns: red is 4 * the row, green 4 * the column, blue the image's number."""
    for i in range(10):
        rows, columns = np.mgrid[:16, :24]
        image = np.stack([4 * rows, 4 * columns, np.full((16, 24), 20 * i)], -1).astype(np.uint8)
        os.makedirs(tmp_path / 'images', exist_ok=True)
        Image.fromarray(image).save(tmp_path / 'images' / f'{i}.png')
    return make(tmp_path / 'sets', source=f'folder:{tmp_path / "images"}', channels=3, test_fraction=0.5)


def corner(batch) -> np.ndarray:
    """(row, column) of the first pixel of each image, [n, 2]."""
    return batch['image'][:, 0, 0, :2] // 4


def test_images_that_are_not_square(coordinates):
    whole = {**coordinates, 'size': (16, 24)}
    assert data.spec(whole).features['image'].shape == (16, 24, 3)
    image = data.dataset(whole, 'test')[0]['image']
    np.testing.assert_array_equal(image[..., 1], 4 * np.arange(24)[None].repeat(16, 0))
    # 12 columns of 24, in the middle and anywhere; nothing is resized, so that pixels say where they were.
    tall = {**coordinates, 'size': (16, 12)}
    assert corner(data.dataset(tall, 'test').take(np.arange(2))).tolist() == [[0, 6]] * 2
    corners = np.concatenate([corner(b) for b in take({**tall, 'crop': 'random'}, 40)])
    assert set(corners[:, 0]) == {0} and set(corners[:, 1]) == set(range(13))
    # The window of 12 x 20 in 16 x 24 has 5 x 5 positions.
    wide = {**coordinates, 'size': (12, 20), 'jitter': 4}
    corners = np.concatenate([corner(b) for b in take(wide, 80)])
    assert {tuple(c) for c in corners.tolist()} == set(itertools.product(range(5), range(5)))
    corners = np.concatenate([corner(b) for b in take({**wide, 'crop': 'random'}, 80)])
    assert {tuple(c) for c in corners.tolist()} == set(itertools.product(range(5), range(5)))
    for fields in ({'flip': True, 'crop': 'random'}, {'crop': 'resized'}, {'pad': 3}, {'shift': 0.2, 'flip': True}):
        for size in ((16, 12), (5, 30)):
            config = {**coordinates, 'size': size, **fields}
            assert take(config, 1)[0]['image'].shape == (8, *size, 3)
            assert_same(take(config, 9)[7:], take(config, 2, start=7))


def test_shift_is_a_fraction_of_each_side(coordinates):
    config = {**coordinates, 'size': (16, 24), 'shift': 0.25, 'fill': 'edge'}
    images = np.concatenate([b['image'] for b in take(config, 80)])
    down = 15 - images[:, -1, 12, 0] // 4  # rows that moved out at the bottom; up: the border again
    right = 23 - images[:, 8, -1, 1] // 4
    assert set(down) == set(range(5)) and set(right) == set(range(7))


def test_low_resolution_of_images_that_are_not_square(coordinates):
    config = {**coordinates, 'size': (16, 24), 'low_resolution': 4, 'features': ('image', 'low_resolution')}
    assert data.spec(config).features['low_resolution'].shape == (4, 6, 3)
    for batch in take({**config, 'flip': True}, 2):
        means = batch['image'].reshape(-1, 4, 4, 6, 4, 3).mean((2, 4))
        np.testing.assert_allclose(batch['low_resolution'], means, atol=0.5001)


def test_others_come_unpaired(five, tmp_path):
    """A second source has an order and an augmentation of its own, both functions of (seed, number)."""
    other = write_folder(tmp_path / 'others', [200, 210, 220])
    config = {**five, 'other': other, 'features': ('image', 'other'), 'test_fraction': 0.3, 'size': 4}
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
    # Samples are of all images of both, however many there are of the other kind.
    for one, two in ((test.examples, others), (others, test.examples)):
        taken = UnpairedExamples(one, two).take_cyclic(np.arange(7))
        for name, source in (('image', one), ('other', two)):
            np.testing.assert_array_equal(taken[name], source.take(np.arange(7) % len(source))['image'])
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
        'folder:': 'config.data.other: name the folder',
    }.items():
        with refused(match):
            data.dataset({**config, 'other': other}, 'train')


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


def test_classes_by_name():
    spec = data.Spec({}, 3, ('1', '2', 'red fox'))
    assert [spec.class_number(x) for x in ('1', '2', 'red fox', 1, 2, '0')] == [0, 1, 2, 1, 2, 0]
    with refused("no class 'red fix'; did you mean red fox"):
        spec.class_number('red fix')
    with refused("no class 'zzz'; they are 1, 2, red fox"):
        spec.class_number('zzz')
    assert data.Spec({}, 3).class_number('2') == 2


@pytest.mark.parametrize(
    'fields, turned',
    [({}, 1), *(({'crop': 'random'}, turned) for turned in range(1, 9)), ({'jitter': 4, 'crop': 'random'}, 6)],
)
def test_drafts_of_jpeg_files_are_nearly_the_images(tmp_path, fields, turned):
    """Photographs of 641 x 427 pixels, decoded at a quarter: the same part of them, and nearly the same pixels."""
    photo = Image.open(os.path.join(os.path.dirname(sklearn.__file__), 'datasets', 'images', 'china.jpg'))
    exif = Image.Exif()
    exif[0x0112] = turned
    os.makedirs(tmp_path / 'in')
    for i in range(2):
        photo.resize((641, 427)).save(tmp_path / 'in' / f'{i}.jpg', quality=92, exif=exif)
    config = make(tmp_path, source=f'folder:{tmp_path}/in', size=(32, 24), channels=3, batch=2, **fields)
    full, draft = (np.float32(take({**config, 'draft': k}, 1)[0]['image']) for k in (0, 2))
    # An offset of one pixel of the photograph, a twentieth of one here, gives 1.2.
    assert 0 < np.abs(full - draft).mean() < 0.8
    near, exact = (data.dataset({**config, 'draft': k}, 'train').identity for k in (2, 0))
    assert near == f'{exact} draft=2'


def test_drafts_change_no_other_files(tmp_path):
    os.makedirs(tmp_path / 'in')
    for i in range(3):
        random_image(i, 300, 200).save(tmp_path / 'in' / f'{i}.png')
        random_image(i, 30, 20).save(tmp_path / 'in' / f'{i}.jpg')  # too small
    config = make(tmp_path, source=f'folder:{tmp_path}/in', size=16, channels=3)
    assert_same(take(config, 2), take({**config, 'draft': 2}, 2))
