"""Images that belong together, in sub-folders by feature."""

from __future__ import annotations

import os

import numpy as np
import pytest
from data_sets import encoded, grey, make, refused, take, write_pairs
from PIL import Image

from jaxgen import data
from jaxgen.data import transforms


@pytest.fixture(params=[100_000, 0], ids=['prepared', 'direct'])
def direct(request) -> int:
    """config.data.direct: the pairs are prepared, or read where they lie."""
    return request.param


def test_pairs_stay_together(tmp_path, direct):
    """Under any order, crop, window and mirroring."""
    source = write_pairs(tmp_path / 'in', range(5), edges=range(5))
    config = make(tmp_path, direct=direct, source=source, size=6, features=('image', 'edges'), test_fraction=0.3)
    assert data.spec(config).features['edges'].shape == (6, 6, 1)
    splits = [data.dataset(config, split) for split in ('train', 'test')]
    assert len(splits[0]) + len(splits[1]) == 5 and min(map(len, splits)) > 0
    only = data.dataset({**config, 'features': ('image',)}, 'test')
    assert len(only) == len(splits[1]), 'one set is prepared, whichever of its features are chosen'
    smaller = {**config, 'features': ('image', 'edges', 'low_resolution'), 'low_resolution': 3}
    assert data.dataset(smaller, 'test')[0]['low_resolution'].shape == (3, 3, 1)
    with refused(f'{source} has images and captions, and no label'):
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
def test_pairs_that_are_none(tmp_path, parts, match, direct):
    source = write_pairs(tmp_path / 'in', range(4), **parts)
    with refused(match):
        data.dataset(make(tmp_path, direct=direct, source=source, features=('image', 'edges')), 'train')


def test_pairs_without_a_folder_or_with_two_of_a_name(tmp_path, direct):
    config = make(tmp_path, direct=direct, source='pairs:/not/here', features=('image', 'edges'))
    assert data.spec(config).features['edges'].shape == (8, 8, 1), 'described where the folder is not'
    with refused('/not/here does not exist'):
        data.dataset(config, 'train')
    with refused('name the folder, as in pairs:/home'):
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
    values = [int(e['image'].min()) // 20 for s in splits for e in (s[i] for i in range(len(s)))]
    assert sorted(values) == [0, 1, 2, 4, 5] and '1 of 12 files' in capfd.readouterr().err


def test_pairs_in_splits(tmp_path, direct):
    for split, n in (('train', 4), ('val', 2)):
        write_pairs(tmp_path / 'in' / split, range(n), edges=range(n))
    config = make(tmp_path, direct=direct, source=f'pairs:{tmp_path / "in"}', size=12, features=('image', 'edges'))
    assert [len(data.dataset(config, split)) for split in ('train', 'test')] == [4, 2]
    for split in ('train', 'test'):
        x = data.dataset(config, split)[1]
        np.testing.assert_array_equal(x['image'] + 100, x['edges'])


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
    rotated = Image.Exif()
    rotated[0x0112] = 6
    for i in range(4):  # 16 x 32 as stored, 32 x 16 as displayed
        grey(i, 32, 16).save(tmp_path / 'in' / 'mask' / f'{i}.png', exif=rotated)
    assert len(data.dataset(config, 'train')) + len(data.dataset(config, 'test')) == 4


def test_pairs_of_other_aspect_ratios_are_damaged_where_they_are_read(tmp_path, capfd):
    source = write_pairs(tmp_path / 'in', range(12), edges=range(12))
    grey(7, 12, 12).save(tmp_path / 'in' / 'edges' / '3.png')
    (tmp_path / 'in' / 'edges' / '5.png').write_bytes(b'')
    config = make(tmp_path, source=source, size=12, features=('image', 'edges'), max_corrupt=0.5, direct=0)
    splits = [data.dataset(config, split) for split in ('train', 'test')]
    for x in (examples[i] for examples in splits for i in range(len(examples))):
        np.testing.assert_array_equal(x['image'] + 100, x['edges'])
    message = capfd.readouterr().err
    assert (
        'it has 20 x 12 pixels and its partner in edges/ 12 x 12' in message and message.count('takes its place') == 2
    )
    prepared = {**config, 'direct': 100, 'dir': str(tmp_path / 'other')}
    os.remove(tmp_path / 'in' / 'edges' / '3.png'), os.remove(tmp_path / 'in' / 'image' / '3.bmp')
    os.remove(tmp_path / 'in' / 'edges' / '5.png'), os.remove(tmp_path / 'in' / 'image' / '5.bmp')
    for one, other in zip(take(prepared, 5), take(config, 5), strict=True):
        assert all((one[name] == other[name]).all() for name in one), 'the same examples in the same order'


def test_masks_with_a_palette_keep_their_classes(tmp_path, direct):
    """Numbers stay what they are, at every size: red and this blue are of one grey, and no class lies between two."""
    classes = np.random.default_rng(0).integers(0, 3, (4, 12, 12), np.uint8)
    for part in ('image', 'mask'):
        os.makedirs(tmp_path / 'in' / part)
        for i, x in enumerate(classes):
            image = Image.fromarray(x)
            image.putpalette([0, 0, 0, 128, 0, 0, 0, 0, 255, 255, 255, 255])
            image.save(tmp_path / 'in' / part / f'{i}.png', transparency=2 if i else b'\0\xff')
    config = make(
        tmp_path,
        direct=direct,
        source=f'pairs:{tmp_path / "in"}',
        size=12,
        features=('image', 'mask'),
        test_fraction=0.3,
    )
    examples = [
        x for s in ('train', 'test') for x in (data.dataset(config, s)[i] for i in range(len(data.dataset(config, s))))
    ]
    assert sorted(x['mask'].tobytes() for x in examples) == sorted(x.tobytes() for x in classes)
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


def test_pairs_for_validation(tmp_path, direct):
    """They have no classes of which each keeps its share."""
    source = write_pairs(tmp_path / 'in', range(9), edges=range(9))
    config = make(tmp_path, direct=direct, source=source, size=6, features=('image', 'edges'))
    config |= {'test_fraction': 0.2, 'validation_fraction': 0.3}
    parts = {split: data.dataset(config, split) for split in ('train', 'validation', 'test')}
    seen = [tuple(one[i]['image'].reshape(-1)) for one in parts.values() for i in range(len(one))]
    assert len(seen) == len(set(seen)) == 9 and min(map(len, parts.values())) > 0
