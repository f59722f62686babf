"""Sets on disk: what is read is what was written, or an error; and batches of views are the loader's own."""

import os
import pickle
import time

import ml_dtypes
import numpy as np
import pytest

from jaxgen import data
from jaxgen.data import prepared, views
from jaxgen.data.prepared import Feature, Layout, PreparedSet
from jaxgen.errors import RunError


def values(layout: Layout, seed: int = 0) -> dict[str, np.ndarray]:
    """{name: [examples, views, ...]}, random."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 200, (layout.examples, layout.views_of(name), *f.shape)).astype(f.dtype)
        for name, f in layout.features.items()
    }


def write(folder: str, layout: Layout, arrays: dict[str, np.ndarray], batch: int = 3, files=None) -> None:
    """The set of these values, in pieces of `batch` rows."""
    os.makedirs(folder, exist_ok=True)
    for file in range(layout.files) if files is None else files:
        own = layout.examples_of(file)
        rows = np.arange(own.start * layout.views, own.stop * layout.views)

        def pieces(rows=rows):
            for start in range(0, len(rows), batch):
                i, v = np.divmod(rows[start : start + batch], layout.views)
                yield start, {n: a[i, np.minimum(v, a.shape[1] - 1)] for n, a in arrays.items()}

        prepared.write(folder, layout, file, pieces())


LAYOUT = Layout(
    examples=11,
    views=4,
    features={
        'first/mean': Feature((2, 3), np.float32, True),
        'first/codes0': Feature((5,), np.uint16, True),
        'text/half': Feature((3,), ml_dtypes.bfloat16, False),
        'text/none': Feature((), np.int32, False),
    },
)


@pytest.fixture
def several_files(monkeypatch):
    monkeypatch.setattr(prepared, 'MOST_EXAMPLES', 4)  # of 11


def test_reads_what_was_written(tmp_path, several_files):
    arrays = values(LAYOUT)
    write(str(tmp_path), LAYOUT, arrays)
    assert LAYOUT.files == 3 and not prepared.missing(str(tmp_path), LAYOUT)
    assert sum(os.path.getsize(f) for f in tmp_path.iterdir()) == LAYOUT.nbytes
    rng = np.random.default_rng(1)
    for read in (PreparedSet(str(tmp_path), LAYOUT), pickle.loads(pickle.dumps(PreparedSet(str(tmp_path), LAYOUT)))):
        indices, view = rng.integers(0, 11, 40), rng.integers(0, 4, 40)
        batch = read.take(indices, view)
        for name, array in arrays.items():
            expected = array[indices, view if array.shape[1] > 1 else 0]
            assert batch[name].dtype == LAYOUT.features[name].dtype
            np.testing.assert_array_equal(batch[name], expected)
    one, other = tmp_path / 'one', tmp_path / 'other'
    write(str(one), LAYOUT, arrays, batch=5)
    write(str(other), LAYOUT, values(LAYOUT, seed=1))
    assert PreparedSet(str(one), LAYOUT).identity == read.identity != PreparedSet(str(other), LAYOUT).identity


def test_a_file_is_whole_or_not_there(tmp_path, several_files):
    arrays = values(LAYOUT)

    def stopped():
        yield 0, {name: a[:1, 0] for name, a in arrays.items()}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared.write(str(tmp_path), LAYOUT, 1, stopped())
    assert not list(tmp_path.iterdir()) and prepared.missing(str(tmp_path), LAYOUT) == [0, 1, 2]
    for name, age in (('00001.features.x.new', 90_000), ('00001.features.y.new', 80_000)):  # of killed processes
        (tmp_path / name).write_bytes(b'part')
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    prepared.remove_leftovers(str(tmp_path))
    assert os.listdir(tmp_path) == ['00001.features.y.new'], 'its process may still be there'
    write(str(tmp_path), LAYOUT, arrays, files=[0, 2])
    assert prepared.missing(str(tmp_path), LAYOUT) == [1]
    with pytest.raises(RunError, match='cannot be read'):
        PreparedSet(str(tmp_path), LAYOUT)


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path, several_files, monkeypatch):
    """Is a line, and not the end of the process, which a mapped page that is gone would be."""
    write(str(tmp_path), LAYOUT, values(LAYOUT))
    read, one = PreparedSet(str(tmp_path), LAYOUT), np.array([1])
    read.take(one, one)
    os.truncate(tmp_path / '00000.features', 40)
    with pytest.raises(RunError, match=r'damaged.*makes it anew'):
        read.take(one, one)
    pread = os.pread
    monkeypatch.setattr(os, 'pread', lambda file, n, at: pread(file, min(n, 7), at))  # as of a network's disk, say
    write(str(tmp_path), LAYOUT, values(LAYOUT))
    again = PreparedSet(str(tmp_path), LAYOUT).take(one, one)
    for name, array in values(LAYOUT).items():
        np.testing.assert_array_equal(again[name], array[one, one if array.shape[1] > 1 else 0])


@pytest.mark.parametrize('harm', ['cut', 'longer', 'byte', 'digest', 'link', 'folder'])
def test_damage_is_seen(tmp_path, several_files, harm, monkeypatch):
    """At the start; of a large set, whose files are not read then, when the file is first used."""
    folder, path = str(tmp_path / 'set'), str(tmp_path / 'set' / '00001.features')
    write(folder, LAYOUT, values(LAYOUT))
    with open(path, 'rb') as file:
        whole = file.read()
    byte = 3 if harm == 'digest' else 100
    harmed = {'cut': whole[:-1], 'longer': whole + b'x', 'link': whole, 'folder': b''}.get(
        harm, whole[:byte] + bytes([whole[byte] ^ 1]) + whole[byte + 1 :]
    )
    os.remove(path)
    if harm == 'folder':
        os.mkdir(path)
    else:
        with open(tmp_path / 'elsewhere' if harm == 'link' else path, 'wb') as file:
            file.write(harmed)
        if harm == 'link':
            os.symlink(tmp_path / 'elsewhere', path)
    assert prepared.missing(folder, LAYOUT) == [1]
    monkeypatch.setattr(prepared, 'VERIFIED', 0)
    assert prepared.missing(folder, LAYOUT) == ([] if harm in ('byte', 'digest') else [1])
    with pytest.raises(RunError):
        PreparedSet(folder, LAYOUT).take(np.array([0, 5]), np.array([0, 0]))
    if harm in ('byte', 'digest'):
        assert not os.path.exists(path), 'so that the next start makes it anew'


def test_the_least_recently_used_sets_go_first(tmp_path, several_files):
    names = ['a' * 32, 'b' * 32, 'c' * 32, 'd' * 32]
    for i, name in enumerate(names):
        write(str(tmp_path / name), LAYOUT, values(LAYOUT))
        os.utime(tmp_path / name, (i, i))
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis').write_bytes(b'x' * 10_000)
    size = LAYOUT.nbytes
    read = PreparedSet(str(tmp_path / names[0]), LAYOUT, prepared.set_lock(str(tmp_path / names[0])))
    os.utime(tmp_path / names[0], (0, 0))  # in use, though it is the oldest
    assert prepared.make_room(str(tmp_path), names[3], 2 * size) == 2 * size
    assert sorted(os.listdir(tmp_path)) == sorted([names[0], names[2], names[3], 'mine'])
    assert prepared.make_room(str(tmp_path), names[3], 0) == size
    del read
    assert prepared.make_room(str(tmp_path), names[3], 0) == 0
    assert sorted(os.listdir(tmp_path)) == sorted([names[3], 'mine'])


SECTIONS = [  # and the number of views
    ({}, 1),
    ({'flip': True, 'features': ('image', 'label', 'edges')}, 2),
    ({'jitter': 2, 'flip': True}, 2 * 3 * 3),
    ({'pad': 1, 'fill': 'edge', 'shift': 0.1}, 5 * 5),  # by 1 of the border and 1.2 of 12 pixels
    ({'pad': 1, 'jitter': 1, 'flip': True, 'low_resolution': 6, 'features': ('low_resolution', 'image')}, 8 * 9),
    ({'keep_classes': (0, 2), 'features': ('image', 'label'), 'flip': True, 'binarise': 'fixed'}, 2),
]


@pytest.mark.parametrize(('section', 'number'), SECTIONS, ids=[' '.join(fields) or 'none' for fields, _ in SECTIONS])
def test_batches_hold_the_view_that_the_augmentation_makes(tmp_path, section, number, monkeypatch):
    """A set of the images themselves: what it gives is what the loader makes of the image, and all else is as before;
    in any order, from any step."""
    section = {'source': 'shapes', 'size': 12, 'channels': 3, 'batch': 10, **section}
    examples = data.dataset(section, 'train')
    assert not views.why_none(examples.data)
    n, count = 24, views.count(examples.data)
    assert count == number
    monkeypatch.setattr(type(examples), '__len__', lambda self: n)
    layout = Layout(n, count, {'pixels': Feature(examples[0]['image'].shape, np.uint8, True)})
    rows = np.arange(n * count)
    images = views.take(examples, rows // count, rows % count)['image']
    write(str(tmp_path), layout, {'pixels': images.reshape(n, count, *images.shape[1:])}, batch=1000)
    read = PreparedSet(str(tmp_path), layout)
    for start in (0, 7):
        plain = data.batches(section, 'train', seed=3, start=start)
        other = data.batches(section, 'train', seed=3, start=start, prepared=read)
        for _ in range(4):
            expected, batch = next(plain), next(other)
            np.testing.assert_array_equal(batch.pop('pixels'), expected.pop('image'))
            assert batch.keys() == expected.keys()
            for name, values in batch.items():
                np.testing.assert_array_equal(values, expected[name])
        plain.close()
        other.close()


@pytest.mark.parametrize('field', [{'crop': 'random'}, {'crop': 'resized'}, {'binarise': 'dynamic'}])
def test_views_that_cannot_be_numbered(field):
    examples = data.dataset({'source': 'digits', **field}, 'train')
    assert next(iter(field.values())) in views.why_none(examples.data)
