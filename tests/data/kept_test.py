"""Decoded images on disk: what decoding gives, whatever has happened to the file, and for nobody else to write."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
from data_sets import encoded, make, random_image, take
from support import assert_same

from jaxgen import data, files, log
from jaxgen.data import kept, loader, transforms


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """The directory of kept images, for sets of any size."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(loader, 'FEW', 2)
    kept.announced.clear()
    return tmp_path / 'cache' / 'jaxgen' / 'images'


@pytest.fixture
def section(tmp_path):
    """A folder of 30 files, two of which are damaged."""
    for i in range(30):
        content = encoded(random_image(i))
        path = tmp_path / 'images' / f'{i % 3}' / f'{i}.png'
        os.makedirs(path.parent, exist_ok=True)
        path.write_bytes(content[: len(content) // 2] if i in (7, 20) else content)
    fields = {
        'size': 8,
        'channels': 3,
        'features': ('label', 'image'),
        'direct': 0,
        'max_corrupt': 0.3,
        'test_fraction': 0.1,
    }
    return make(tmp_path / 'sets', source=f'folder:{tmp_path / "images"}', processes=0, **fields)


def everything(section, **fields) -> dict:
    examples = data.dataset({**section, **fields}, 'train')
    return examples.take(np.arange(len(examples)))


@contextlib.contextmanager
def counted(monkeypatch):
    """What is decoded in the block."""
    decoded, load = [], transforms.load
    with monkeypatch.context() as patch:
        patch.setattr(transforms, 'load', lambda *a: decoded.append(a[0]) or load(*a))
        yield decoded


@pytest.mark.parametrize('cache_mb', [0, 512])
def test_what_was_decoded_is_read_again(section, monkeypatch, directory, cache_mb):
    expected = everything(section, disk_mb=0)
    assert not os.path.exists(directory)
    section = {**section, 'cache_mb': cache_mb}
    half = data.dataset(section, 'train')
    half.take(np.arange(10))  # nothing needs to be complete
    with counted(monkeypatch) as decoded:
        first = everything(section)
    assert 0 < len(decoded) < len(first['label'])
    with counted(monkeypatch) as decoded:
        examples = data.dataset(section, 'train')
        second = examples.take(np.arange(len(examples)))
    assert_same([expected] * 2, [first, second])
    assert len(examples.corrupt) == 2, 'damaged ones are counted in every process'
    assert len(decoded) <= 1 + 2 * 3, 'and nothing else is decoded but what takes their places'
    batches = take({**section, 'flip': True, 'binarise': 'dynamic'}, 5)
    assert_same(batches, take({**section, 'flip': True, 'binarise': 'dynamic', 'disk_mb': 0}, 5))
    assert len(os.listdir(directory)) == 1 and os.stat(directory).st_mode & 0o077 == 0


@pytest.mark.parametrize(
    'fields', [{'size': 6}, {'channels': 1}, {'box': (0, 0, 8, 8)}, {'white': 200}, {'features': ('image',)}]
)
def test_other_preparation_has_a_file_of_its_own(section, directory, fields):
    everything(section)
    found = everything(section, **fields)
    assert_same([everything(section, **fields, disk_mb=0)], [found])
    assert len(os.listdir(directory)) == 2


def test_other_files_have_one_of_their_own(section, tmp_path, directory):
    """An image of the same name and length, and another part of the set."""
    path = tmp_path / 'images' / '0' / '0.png'
    everything(section)
    before = os.stat(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    loader.sources._contents.clear()
    loader.sources.archives.folders.clear()  # as in another process
    everything(section)
    assert len(os.listdir(directory)) == 2
    everything(section, keep_classes=(0, 1))
    everything(section, validation_fraction=0.3)
    assert len(os.listdir(directory)) == 4


def test_a_changed_image_of_the_same_size_and_time(section, tmp_path, directory):
    """As some programs leave it that copy files; also in a process that goes on."""
    path = tmp_path / 'images' / '1' / '1.bmp'
    path.write_bytes(encoded(random_image(100), 'BMP'))
    first = everything(section)
    before = os.stat(path)
    with open(path, 'r+b') as file:
        file.write(encoded(random_image(101), 'BMP'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    found = everything(section)
    assert not np.array_equal(first['image'], found['image'])
    assert_same([everything(section, disk_mb=0, cache_mb=0)], [found])


def test_times_beyond_64_bits(section, tmp_path, directory):
    try:
        os.utime(tmp_path / 'images' / '1' / '1.png', (1.4e10, 1.4e10))
    except (OverflowError, OSError):
        pytest.skip('the file system has no such times')
    assert len(everything(section)['image'])


@pytest.mark.parametrize('given', ['cache', '~nobody_at_all/cache', ''])
def test_relative_cache_directories_are_none(given, tmp_path, monkeypatch):
    """By the XDG specification."""
    monkeypatch.setenv('XDG_CACHE_HOME', given)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path)
    assert kept.open_store('what', 3, 5, 10) is not None
    assert os.listdir(tmp_path) == ['home']
    files.make_private('a/b')  # and ends
    assert stat.S_IMODE(os.stat(tmp_path / 'a' / 'b').st_mode) == 0o700


def test_what_is_torn_or_changed_is_decoded_again(section, directory, monkeypatch):
    expected = everything(section)
    (name,) = os.listdir(directory)
    path = directory / name
    content = bytearray(path.read_bytes())
    length = 8 * 8 * 3 + 4 + kept.DIGEST
    n = len(content) // length
    assert len(content) == n * length == len(expected['label']) * length
    content[3 * length + 50] ^= 1
    content[5 * length : 6 * length] = content[6 * length : 7 * length]  # another example's
    content[8 * length + 100 : 9 * length] = bytes(length - 100)
    path.write_bytes(content)
    with counted(monkeypatch) as decoded:
        assert_same([expected], [everything(section)])
    assert 3 <= len(decoded) <= 1 + 3 + 2 * 3
    with open(path, 'r+b') as file:
        file.truncate(4 * length + 10)
    assert_same([expected], [everything(section)])
    assert os.path.getsize(path) == n * length
    path.write_bytes(b'')
    assert_same([expected], [everything(section)])


def test_several_at_once(section, directory):
    """Threads here, each with a file of its own open, and another process."""
    expected, found = everything(section, disk_mb=0), []
    code = 'import numpy as np; from jaxgen import data; from jaxgen.data import loader; loader.FEW = 2\n'
    code += f'examples = data.dataset({section!r}, "train")\n'
    code += 'print(examples.take(np.arange(len(examples)))["image"].sum())'
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) as other:
        threads = [threading.Thread(target=lambda: found.append(everything(section))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        output = other.communicate(timeout=60)[0]
    assert_same([expected] * 4, found)
    assert int(output) == expected['image'].sum()
    assert len(os.listdir(directory)) == 1


def test_nothing_is_kept_where_others_may_write(section, directory, monkeypatch):
    lines = []
    monkeypatch.setattr(log, 'say', lines.append)
    os.makedirs(directory, mode=0o777)
    os.chmod(directory, 0o777)
    everything(section)
    assert not os.listdir(directory)
    (line,) = (line for line in lines if 'not kept' in line)
    assert 'others may write' in line and 'config.data.disk_mb' in line


def test_no_link_is_followed(section, directory, tmp_path):
    everything(section)
    (name,) = os.listdir(directory)
    victim = tmp_path / 'victim'
    victim.write_bytes(b'precious')
    os.remove(directory / name)
    os.symlink(victim, directory / name)
    expected = everything(section, disk_mb=0)
    assert_same([expected], [everything(section)])
    assert victim.read_bytes() == b'precious'


def test_a_full_disk_only_ends_the_keeping(section, monkeypatch):
    lines = []
    monkeypatch.setattr(log, 'say', lines.append)

    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'pwrite', full)
    assert_same([everything(section, disk_mb=0)], [everything(section)])
    assert sum('not kept any more: No space left' in line for line in lines) == 1


def test_the_least_recently_used_go_first(directory):
    """Sets of 400 kB within one megabyte."""
    for i, name in enumerate('abc'):
        store = kept.open_store(name, 1000, 392, 1)
        assert store is not None
        os.utime(store.file, (i, i))
        if name == 'b':  # a is used once more
            again = kept.open_store('a', 1000, 392, 1)
            os.utime(again.file, (10, 10))
    assert len(os.listdir(directory)) == 2
    rows = np.zeros((1, 400), np.uint8)
    for name in 'ac':
        store = kept.open_store(name, 1000, 392, 1)
        store.write(np.array([3]), rows)
    assert len(os.listdir(directory)) == 2
    assert kept.open_store('d', 1000, 2000, 1) is None, 'it would not fit by itself'
    assert len(os.listdir(directory)) == 2


def test_a_directory_that_can_only_be_read(section, directory, monkeypatch):
    expected = everything(section)
    (name,) = os.listdir(directory)
    if not os.geteuid():  # whom no mode stops
        usual = os.open

        def refusing(path, flags, *args, **kwargs):
            if str(path).endswith(kept.ENDING) and flags & os.O_RDWR:
                raise PermissionError(errno.EACCES, 'Permission denied')
            return usual(path, flags, *args, **kwargs)

        monkeypatch.setattr(os, 'open', refusing)
    os.chmod(directory / name, 0o400)
    with counted(monkeypatch) as decoded:
        assert_same([expected], [everything(section)])
    assert len(decoded) <= 1 + 2 * 3


def test_arrays_are_not_kept(tmp_path, directory):
    np.save(tmp_path / 'images.npy', np.arange(40 * 64, dtype=np.uint8).reshape(40, 8, 8))
    everything(make(tmp_path, source=f'npy:{tmp_path / "images.npy"}', size=8))
    assert not os.path.exists(directory)
