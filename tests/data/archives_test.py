"""Zips, tars and ArrayRecord files that are read in place: like the folder that they were made of, or refused."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import threading
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from data_sets import encoded, grey, make, random_image, refused, take, write_folder, write_tar, write_zip
from tensorflow_datasets.proto import tf_example_pb2

from jaxgen import data
from jaxgen.data import sources, tars
from jaxgen.errors import RunError


def files_of(folder) -> dict[str, bytes]:
    """{path below the folder: content}."""
    paths = sorted(path for path in folder.rglob('*') if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def images(n: int = 12, below: str = '') -> dict[str, bytes]:
    """Grey images named by their values."""
    return {f'{below}{i}.png': encoded(grey(i)) for i in range(n)}


def write_records(path, contents: list[bytes]) -> str:
    writer = ArrayRecordWriter(str(path), 'group_size:1')
    for content in contents:
        writer.write(content)
    writer.close()
    return f'arrayrecord:{path}'


def example(**fields) -> bytes:
    """A serialised tf.train.Example with one value in each field."""
    record = tf_example_pb2.Example()
    for name, value in fields.items():
        kind = {bytes: 'bytes_list', int: 'int64_list', float: 'float_list'}[type(value)]
        getattr(record.features.feature[name.replace('__', '/')], kind).value.append(value)
    return record.SerializeToString()


WRITERS = {
    'zip': write_zip,
    'zip stored': lambda path, files: write_zip(path, files, zipfile.ZIP_STORED),
    'tar': write_tar,
    'tar of GNU': lambda path, files: write_tar(path, files, tarfile.GNU_FORMAT),
    'ustar': lambda path, files: write_tar(path, files, tarfile.USTAR_FORMAT),
}


def values(config: dict, split: str = 'train') -> dict[int, int]:
    """{grey value: label, -1 without labels} of a split."""
    examples = data.dataset(config, split)
    rows = [examples[i] for i in range(len(examples))]
    return {int(row['image'][0, 0, 0]): int(row.get('label', -1)) for row in rows}


# --- what is whole


@pytest.mark.parametrize('inside', [('cat', 'dog'), ('train/cat', 'train/dog', 'test/dog'), ('',), ('train', 'val')])
@pytest.mark.parametrize('kind', WRITERS)
def test_an_archive_is_the_folder_that_it_was_made_of(tmp_path, kind, inside):
    """The same batches, in the same order, with the same classes and the same test split."""
    source = write_folder(tmp_path / 'in', [], **{below: range(40 * i, 40 * i + 12) for i, below in enumerate(inside)})
    archive = WRITERS[kind](tmp_path / 'x', files_of(tmp_path / 'in'))
    features = (
        ('image', 'label') if data.spec(make(tmp_path, source=source)).features and 'cat' in inside[0] else ('image',)
    )
    one, other = (make(tmp_path, source=s, features=features, flip=True) for s in (source, archive))
    assert data.spec(one) == data.spec(other)
    for a, b in zip(take(one, 6), take(other, 6), strict=True):
        assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)
    assert values(one, 'test') == values(other, 'test')
    assert data.dataset(other, 'train').identity == data.dataset(other, 'train').identity


@pytest.mark.parametrize('top', ['data/', 'a/b/', 'é' * 120 + '/', 'long' * 60 + '/deep/'])
@pytest.mark.parametrize('kind', ['zip', 'tar', 'tar of GNU'])
def test_folders_around_everything_change_nothing(tmp_path, kind, top):
    files = images(6, 'cat/') | images(12, 'dog/')
    plain, below = (
        make(tmp_path, source=WRITERS[kind](tmp_path / f'x{i}', {t + name: c for name, c in files.items()}))
        for i, t in enumerate(('', top))
    )
    for config in (plain, below):
        config['features'] = ('image', 'label')
    assert data.spec(plain) == data.spec(below) and data.spec(plain).names == ('cat', 'dog')
    for a, b in zip(take(plain, 3), take(below, 3), strict=True):
        assert (a['image'] == b['image']).all() and (a['label'] == b['label']).all()


@pytest.mark.parametrize('below', ['', 'set/'])
def test_labels_of_a_dataset_json(tmp_path, below):
    """EDM's and StyleGAN's: folders are chunks and no classes."""
    files = {f'{below}0000{i // 6}/img{i}.png': encoded(grey(i)) for i in range(12)}
    rows = [[name.removeprefix(below), i % 3] for i, name in enumerate(files)]
    numbers = dict(enumerate(i % 3 for i in range(12)))
    vectors = [[name, [float(k == i % 3) for k in range(3)]] for i, (name, _) in enumerate(rows)]
    for labels, expected in ((rows, numbers), (vectors, numbers)):
        about = json.dumps({'labels': labels}).encode()
        source = write_zip(tmp_path / 'x.zip', {**files, f'{below}dataset.json': about})
        config = make(tmp_path, source=source, features=('image', 'label'))
        assert values(config) | values(config, 'test') == expected and data.spec(config).classes == 3
        assert data.spec({**config, 'classes': 5}).classes == 5
    config['source'] = write_zip(tmp_path / 'y.zip', {**files, f'{below}dataset.json': b'{"labels": null}'})
    with refused("has no 'label'"):
        data.spec(config)
    angles = [[name, [i / 10, -1.0]] for i, (name, _) in enumerate(rows)]
    about = json.dumps({'labels': angles}).encode()
    config['source'] = write_zip(tmp_path / 'z.zip', {**files, f'{below}dataset.json': about})
    config['features'] = ('image', 'vector')
    examples = data.dataset(config, 'train')
    for row in (examples[i] for i in range(len(examples))):
        np.testing.assert_allclose(row['vector'], [row['image'][0, 0, 0] / 10, -1])


@pytest.mark.parametrize(
    'about, match',
    [
        (b'{"labels": [["0.png", 1]]}', "has no label for '1.png'"),
        (b'{"labels": [["0.png"]]}', 'must be a list of'),
        (b'{"labels": {"0.png": 1}}', 'must be a list of'),
        (json.dumps({'labels': [[f'{i}.png', [0.5] * (1 + i % 2)] for i in range(12)]}).encode(), 'all of one length'),
        (json.dumps({'labels': [[f'{i}.png', 10**30] for i in range(12)]}).encode(), 'must be a list of'),
        (json.dumps({'labels': [[f'{i}.png', [10**400, 1]] for i in range(12)]}).encode(), 'must be a list of'),
        (json.dumps({'labels': [[f'{i}.png', [float('nan'), 1]] for i in range(12)]}).encode(), 'finite numbers'),
        (json.dumps({'labels': [[f'{i}.png', [1e40, 1]] for i in range(12)]}).encode(), 'finite numbers'),
        (b'[' * 100_000, 'dataset.json cannot be read'),
        (b'\xff\xfe{', 'dataset.json cannot be read'),
        (b'[1, 2]', 'must be a list of'),
        (b'[' + b'0,' * 10**6 + b'0]', 'dataset.json cannot be read: it has 2000003 bytes'),
    ],
)
def test_a_dataset_json_of_another_form(tmp_path, about, match):
    source = write_zip(tmp_path / 'x.zip', {**images(), 'dataset.json': about})
    with refused(match):
        data.dataset(make(tmp_path, source=source), 'train')


def shard(i: int, kind: str = 'cls') -> dict[str, bytes]:
    """Ten examples of a WebDataset: files of one stem, one after the other."""
    files = {}
    for k in range(10 * i, 10 * i + 10):
        files[f'{k:06d}.png'] = encoded(grey(k))
        if kind == 'cls':
            files[f'{k:06d}.cls'] = b'%d\n' % (k % 3)
            files[f'{k:06d}.txt'] = f'number {k}, é'.encode()
        else:
            files[f'{k:06d}.json'] = json.dumps({'label': k % 3, 'caption': f'number {k}, é', 'other': [1]}).encode()
    return files


@pytest.mark.parametrize('kind', ['cls', 'json'])
@pytest.mark.parametrize('pattern', ['x-{000..002}.tar', 'x-*.tar', 'x-{000,001,002}.tar', 'x-00[0-2].tar', ''])
def test_shards_of_a_webdataset(tmp_path, kind, pattern):
    for i in range(3):
        write_tar(tmp_path / f'x-{i:03d}.tar', shard(i, kind))
    config = make(tmp_path / 'sets', source=f'tar:{tmp_path}/{pattern}', features=('image', 'label', 'caption'))
    assert values(config) | values(config, 'test') == {k: k % 3 for k in range(30)}
    examples = data.dataset(config, 'train')
    for row in (examples[i] for i in range(len(examples))):
        assert bytes(row['caption']).rstrip(b'\0').decode() == f'number {row["image"][0, 0, 0]}, é'
    # The headers are read once: what is kept says the same.
    kept = os.listdir(tmp_path / 'sets' / tars.INDICES)
    assert len(kept) == 3 and values(config) == {k: k % 3 for k in values(config)}


def test_shards_named_after_their_splits(tmp_path):
    for i, name in enumerate(('train-0', 'train-1', 'test-0')):
        write_tar(tmp_path / f'{name}.tar', shard(i))
    config = make(tmp_path / 'sets', source=f'tar:{tmp_path}', features=('image', 'label'))
    assert values(config, 'test') == {k: k % 3 for k in range(20, 30)} and len(values(config)) == 20


def test_one_stem_in_two_shards_is_two_examples(tmp_path):
    for i in range(2):
        files = {'a.png': encoded(grey(i)), 'a.cls': b'%d' % i, 'b.png': encoded(grey(i + 2)), 'b.cls': b'%d' % i}
        write_tar(tmp_path / f'{i}.tar', files)
    config = make(tmp_path / 'sets', source=f'tar:{tmp_path}', features=('image', 'label'))
    assert values(config) | values(config, 'test') == {0: 0, 1: 1, 2: 0, 3: 1}


def test_an_index_that_is_something_else_is_made_anew(tmp_path):
    config = make(tmp_path / 'sets', source=write_tar(tmp_path / 'x.tar', images()))
    expected = values(config)
    (kept,) = (tmp_path / 'sets' / tars.INDICES).iterdir()
    whole = kept.read_bytes()
    line, rest = whole.split(b'\n', 1)
    head = json.loads(line)
    huge = json.dumps({**head, 'n': 2**50}).encode()
    for content in (
        b'',
        whole[:-1],
        whole + b'x',
        b'[' * 10_000,
        b'{}\n',
        huge + b'\n' + rest,
        line + b'\n' + rest[::-1],
    ):
        kept.write_bytes(content)
        sources._contents.clear()
        assert values(config) == expected
        assert kept.read_bytes() == whole


def test_zip_of_more_than_32_bits_has(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, 'ZIP64_LIMIT', 20)
    monkeypatch.setattr(zipfile, 'ZIP_FILECOUNT_LIMIT', 3)
    write_zip(tmp_path / 'x.zip', images())
    monkeypatch.undo()
    content = (tmp_path / 'x.zip').read_bytes()
    assert b'PK\6\6' in content
    for before in (b'', b'#!/bin/sh\n'):
        (tmp_path / 'y.zip').write_bytes(before + content)
        config = make(tmp_path, source=f'zip:{tmp_path}/y.zip')
        assert set(values(config)) | set(values(config, 'test')) == {*range(12)}


def test_zip_behind_something_else_and_with_a_comment(tmp_path):
    write_zip(tmp_path / 'x.zip', images())
    with zipfile.ZipFile(tmp_path / 'x.zip', 'a') as archive:
        archive.comment = b'PK\5\6 is how it ends' * 100
    content = b'#!/bin/sh\nexit\n' + (tmp_path / 'x.zip').read_bytes()
    (tmp_path / 'y.zip').write_bytes(content)
    config = make(tmp_path, source=f'zip:{tmp_path}/y.zip')
    assert set(values(config)) | set(values(config, 'test')) == {*range(12)}


def test_names_are_no_paths(tmp_path, capfd):
    """What they lead to is neither read nor written; other files, links and folders are left out."""
    names = ('../../up.png', '/etc/passwd.png', 'C:\\\\x.png', 'a/../b.png', '\n\x1b[31m.png', 'caf\udce9.png')
    files = {name: encoded(grey(i)) for i, name in enumerate(names[:-1])} | {'readme.md': b'x', '.DS_Store': b'x'}
    before = sorted(tmp_path.rglob('*'))
    write_zip(tmp_path / 'x.zip', {**files, 'folder/': b'', '__MACOSX/._a.png': b'x'})
    with tarfile.open(tmp_path / 'x.tar', 'w') as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            entry = tarfile.TarInfo(f'odd{kind.decode()}.png')
            entry.type, entry.linkname = kind, '/etc/passwd'
            archive.addfile(entry)
    for kind in ('zip', 'tar'):
        config = make(tmp_path / 'sets', source=f'{kind}:{tmp_path}/x.{kind}')
        assert set(values(config)) | set(values(config, 'test')) == {*range(5)}
        message = capfd.readouterr().err
        assert message.count('\n') == 1 and '1 files with other endings (1 .md)' in message
    assert '4 that are no regular files' in message
    added = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob('*')} - {p.name for p in before}
    assert added <= {'x.zip', 'x.tar', 'sets'}


def write_entries(path, entries) -> str:
    """An archive of [(name, bytes)], of which names may be equal; the source's name."""
    kind = path.suffix[1:]
    if kind == 'zip':
        with warnings.catch_warnings(), zipfile.ZipFile(path, 'w') as archive:
            warnings.simplefilter('ignore')
            for name, content in entries:
                archive.writestr(name, content)
    else:
        with tarfile.open(path, 'w') as archive:
            for name, content in entries:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return f'{kind}:{path}'


@pytest.mark.parametrize('kind', ['zip', 'tar'])
@pytest.mark.parametrize('start', ['/', './', '../', '/.././/'])
def test_how_names_begin_changes_no_classes(tmp_path, kind, start):
    """As unpacking drops it."""
    entries = [(f'{start}{"ab"[i % 2]}/{i}.png', encoded(grey(i))) for i in range(12)]
    config = make(tmp_path, source=write_entries(tmp_path / f'x.{kind}', entries), features=('image', 'label'))
    assert data.spec(config).names == ('a', 'b')
    assert values(config) | values(config, 'test') == {i: i % 2 for i in range(12)}


@pytest.mark.parametrize('kind', ['zip', 'tar'])
def test_of_files_of_one_name_the_last_is_taken(tmp_path, capfd, kind):
    entries = [(name, encoded(grey(v))) for i in range(4) for name, v in (('a.png', i), (f'b{i}.png', 10 + i))]
    config = make(tmp_path, source=write_entries(tmp_path / f'x.{kind}', entries))
    assert set(values(config)) | set(values(config, 'test')) == {3, 10, 11, 12, 13}
    assert '3 files of which the archive has a later one of the same name' in capfd.readouterr().err


# --- what is not


def with_bytes(path, changes: dict[int, bytes]) -> None:
    """Overwrites bytes of a file, from its end where a position is negative."""
    content = bytearray(path.read_bytes())
    for at, new in changes.items():
        at = at % len(content)
        content[at : at + len(new)] = new
    path.write_bytes(content)


def listed_at(path, number: int) -> int:
    """Where the list of a zip has its file of this number."""
    content, at = path.read_bytes(), -1
    for _ in range(number + 1):
        at = content.index(b'PK\1\2', at + 1)
    return at


def zip_with(change):
    """A zip one of whose files' entries in the list is changed."""

    def write(path):
        write_zip(path, images())
        change(path, listed_at(path, 3))

    return write


def zip_of_method(method: int):
    def write(path):
        with zipfile.ZipFile(path, 'w', method) as archive:
            for name, content in images().items():
                archive.writestr(name, content)

    return write


def cut(write, length: int):
    def shorter(path):
        write(path, images())
        path.write_bytes(path.read_bytes()[:length])

    return shorter


@pytest.mark.parametrize(
    'kind, write, match',
    [
        ('zip', lambda path: None, 'x: No such file'),
        ('tar', lambda path: None, 'x does not exist'),
        ('arrayrecord', lambda path: None, 'x does not exist'),
        ('zip', os.mkdir, 'x cannot be read: it is no regular file|Is a directory'),
        ('tar', os.mkdir, 'holds no files'),
        ('zip', os.mkfifo, 'no regular file'),
        ('tar', os.mkfifo, 'no regular file'),
        ('arrayrecord', os.mkfifo, 'no regular file'),
        *((kind, lambda path: path.write_bytes(b''), 'no whole zip|holds no images|cannot be read as')
          for kind in ('zip', 'tar', 'arrayrecord')),
        *((kind, lambda path: path.write_bytes(b'text ' * 50_000), 'no whole zip|no tar file|cannot be read as|neither')
          for kind in ('zip', 'tar', 'arrayrecord')),
        *((kind, lambda path: path.write_bytes(b'\0' * 10_240), 'no whole zip|no tar file|cannot be read as')
          for kind in ('zip', 'tar', 'arrayrecord')),
        ('zip', lambda path: write_zip(path, {'a.txt': b'x'}), 'holds no images .*, but 1 other files'),
        ('tar', lambda path: write_tar(path, {'a.txt': b'x'}), 'holds no images .*, but 1 other files'),
        ('zip', lambda path: write_zip(path, {}), 'holds no images'),
        ('zip', cut(write_zip, 700), 'its end is not there'),
        ('zip', cut(write_zip, -30), 'its end is not there'),
        ('tar', lambda path: write_tar(path, images(), mode='w:gz'), 'is packed.*gunzip'),
        ('tar', lambda path: write_tar(path, images(), mode='w:bz2'), 'is packed.*bunzip2'),
        ('tar', lambda path: write_tar(path, images(), mode='w:xz'), 'is packed.*unxz'),
        ('zip', lambda path: write_tar(path, images(), mode='w:gz'), 'a gzipped file'),
        ('tar', lambda path: (write_tar(path, images()), with_bytes(path, {1024 + 20: b'!'})), 'damaged at byte 1024'),
        ('zip', zip_with(lambda path, at: with_bytes(path, {at + 8: b'\1'})), "'3.png' is encrypted"),
        ('zip', zip_of_method(zipfile.ZIP_BZIP2), 'is packed by bzip2'),
        ('zip', zip_of_method(zipfile.ZIP_LZMA), 'is packed by LZMA'),
        ('zip', zip_with(lambda path, at: with_bytes(path, {at: b'PK\0\0'})), 'its list of files is damaged'),
        ('zip', zip_with(lambda path, at: with_bytes(path, {-10: b'\xff\xff\xff\x7f'})), 'its list of files is'),
        ('zip', zip_with(lambda path, at: with_bytes(path, {-18: b'\1'})), 'one of several parts'),
        ('arrayrecord', lambda path: write_records(path, [b'\x80\4}q\0.'] * 3), 'neither files of images nor'),
        ('arrayrecord', lambda path: write_records(path, [example(a=1)] * 3), 'which field holds'),
    ],
)  # fmt: skip
def test_what_is_refused_in_one_line(tmp_path, kind, write, match):
    write(tmp_path / 'x')
    with refused(match):
        data.dataset(make(tmp_path / 'sets', source=f'{kind}:{tmp_path}/x', features=('image',)), 'train')


def bomb(path, at: int) -> None:
    """A file of the declared size whose bytes unpack to a thousand times as many."""
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    content = packed.compress(b'\0' * 2**24) + packed.flush()
    offset = struct.unpack_from('<L', path.read_bytes(), at + 42)[0]
    whole = path.read_bytes()
    start = len(whole) - 22 - struct.unpack_from('<L', whole, len(whole) - 10)[0]
    # Its bytes are put behind the list's place, and the list says where.
    body, listed, end = whole[:start], bytearray(whole[start:-22]), bytearray(whole[-22:])
    local = bytearray(whole[offset : offset + 30])
    struct.pack_into('<H', local, 8, 8), struct.pack_into('<HH', local, 26, 0, 0)
    at -= start
    struct.pack_into('<H', listed, at + 10, 8)
    struct.pack_into('<LL', listed, at + 20, len(content), 2000)
    struct.pack_into('<L', listed, at + 42, len(body))
    struct.pack_into('<L', end, 16, len(body) + len(local) + len(content))
    path.write_bytes(body + bytes(local) + content + bytes(listed) + bytes(end))


def tar_with_a_damaged_image(path) -> None:
    write_tar(path, {**images(), '3.png': b'no image'})


@pytest.mark.parametrize(
    'kind, write, match',
    [
        ('zip', zip_with(lambda path, at: with_bytes(path, {at + 16: b'\1\2\3\4'})), 'checksum'),
        ('zip', zip_with(lambda path, at: with_bytes(path, {at + 24: b'\xff\xff\xff\x7f'})), 'more than the'),
        ('zip', zip_with(lambda path, at: with_bytes(path, {at + 42: b'\xff\xff\xff\x0f'})), 'no file where'),
        (
            'zip',
            zip_with(lambda path, at: with_bytes(path, {at + 20: b'\xff\xff\xff\x0f'})),
            'more bytes than unpacked',
        ),
        ('zip', zip_with(bomb), 'checksum|damaged'),
        ('tar', tar_with_a_damaged_image, 'UnidentifiedImageError'),
        (
            'arrayrecord',
            lambda path: write_records(path, [*images(3).values(), b'x', *images().values()]),
            'Unidentified',
        ),
        (
            'arrayrecord',
            lambda path: write_records(path, [example(image=c) for c in images().values()] + [example(x=1), b'\xff']),
            r'no tf.train.Example|has 0 values',
        ),
    ],
)
def test_damaged_files_are_replaced_and_counted(tmp_path, capfd, kind, write, match):
    write(tmp_path / 'x')
    config = make(tmp_path / 'sets', source=f'{kind}:{tmp_path}/x', cache_mb=0, test_fraction=0.1)
    good = set()
    for split in ('train', 'test'):
        examples = data.dataset({**config, 'max_corrupt': 0.9}, split)
        good |= {int(examples[i]['image'][0, 0, 0]) for i in range(len(examples))}
    assert good <= {*range(12)} and len(good) >= 9
    with pytest.raises(RunError, match=match):
        for split in ('train', 'test'):
            examples = data.dataset({**config, 'max_corrupt': 0.0}, split)
            [examples[i] for i in range(len(examples))]


def test_a_tar_that_is_cut_off_has_what_is_whole(tmp_path, capfd):
    write_tar(tmp_path / 'x.tar', images())
    whole = (tmp_path / 'x.tar').read_bytes()
    (tmp_path / 'x.tar').write_bytes(whole[: 1024 * 8 + 512 + 20])  # the ninth image's header and some of it
    config = make(tmp_path / 'sets', source=f'tar:{tmp_path}/x.tar')
    assert len(values(config)) + len(values(config, 'test')) == 8
    assert '1 files that are cut off' in capfd.readouterr().err


# --- records


def test_records_of_images(tmp_path):
    for i in range(2):
        write_records(tmp_path / f'x-{i}.array_record', list(images(20).values())[10 * i : 10 * i + 10])
    for source in (f'arrayrecord:{tmp_path}', f'arrayrecord:{tmp_path}/x-*.array_record'):
        config = make(tmp_path / 'sets', source=source)
        assert set(values(config)) | set(values(config, 'test')) == {*range(20)}
    with refused("has no 'label'"):
        data.spec({**config, 'features': ('image', 'label')})


@pytest.mark.parametrize(
    'fields, options',
    [
        ({'image': 'image', 'label': 'label', 'caption': 'caption'}, ''),
        ({'image': 'image/encoded', 'label': 'image/class/label', 'caption': 'text'}, ''),
        ({'image': 'photo', 'label': 'kind', 'caption': 'words'}, '?image=photo&label=kind&caption=words'),
    ],
)
@pytest.mark.parametrize('named', [False, True])
def test_records_of_examples(tmp_path, fields, options, named):
    def record(i: int) -> bytes:
        label = b'abc'[i % 3 : i % 3 + 1] if named else i % 3
        values = {fields['image']: encoded(grey(i)), fields['label']: label, fields['caption']: b'number %d' % i}
        return example(**{name.replace('/', '__'): value for name, value in values.items()}, other=0.5)

    source = write_records(tmp_path / 'x.array_record', [record(i) for i in range(12)]) + options
    config = make(tmp_path / 'sets', source=source, features=('image', 'label', 'caption'))
    assert data.spec(config).names == (('a', 'b', 'c') if named else ())
    for _ in range(2):  # read, and kept
        assert values(config) | values(config, 'test') == {i: i % 3 for i in range(12)}
    examples = data.dataset(config, 'train')
    assert bytes(examples[0]['caption']).rstrip(b'\0') == b'number %d' % examples[0]['image'][0, 0, 0]
    # Who is held out does not depend on what is asked for.
    assert set(values({**config, 'features': ('image',)})) == set(values(config))


def test_kept_labels_are_those_of_the_records(tmp_path):
    """Also those that are no float64."""
    numbers = [2**62 + i % 3 for i in range(12)]
    records = [example(image=encoded(grey(i)), label=label) for i, label in enumerate(numbers)]
    config = make(tmp_path / 'sets', source=write_records(tmp_path / 'x.array_record', records))
    for features in (('image', 'label'), ('label',)):  # read, and kept
        assert data.spec({**config, 'features': features}).names == tuple(str(2**62 + k) for k in range(3))


def test_sets_of_tfds_are_named_as_such(tmp_path):
    directory = tmp_path / 'faces' / '1.0.0'
    directory.mkdir(parents=True)
    source = write_records(directory / 'faces-train.array_record-00000-of-00001', list(images().values()))
    (directory / 'features.json').write_text('{}')
    with refused(rf'prepared.*config.data.source=faces.*, config.data.dir={tmp_path}'):
        data.dataset(make(tmp_path / 'sets', source=source), 'train')


# --- threads


@pytest.mark.parametrize('kind', ['zip', 'tar'])
def test_several_threads_read_what_one_does(tmp_path, kind):
    files = {f'{i}.png': encoded(random_image(i)) for i in range(60)}
    config = make(tmp_path, source=WRITERS[kind](tmp_path / 'x', files), cache_mb=0, channels=3)
    examples = data.dataset(config, 'train')
    expected = examples.take(np.arange(len(examples)))['image']
    wrong = []

    def read(start: int) -> None:
        order = np.random.default_rng(start).permutation(len(examples))
        wrong.extend(order[(examples.take(order)['image'] != expected[order]).any((1, 2, 3))])

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.parametrize('kind', ['zip', 'tar'])
def test_classes_of_one_image_each_are_held_out_as_in_a_folder(tmp_path, kind):
    entries = [(f'{i}/{i}.png', encoded(grey(i))) for i in range(40)]
    for name, content in entries:
        os.makedirs(tmp_path / 'folder' / os.path.dirname(name))
        (tmp_path / 'folder' / name).write_bytes(content)
    source = write_entries(tmp_path / f'x.{kind}', entries)
    config = make(tmp_path / 'sets', features=('image', 'label'), test_fraction=0.3)
    parts = [
        {split: set(values({**config, 'source': one, 'direct': direct}, split)) for split in ('train', 'test')}
        for one, direct in ((source, 0), (f'folder:{tmp_path}/folder', 0), (f'folder:{tmp_path}/folder', 100))
    ]
    assert parts[0] == parts[1] == parts[2] and 4 < len(parts[0]['test']) < 20


@pytest.mark.parametrize('kind', ['tar', 'arrayrecord'])
@pytest.mark.parametrize('pattern', ['run/{..,..}/x.tar', 'run/{a,..}/x.tar', 'run/{.,a}{.,b}/x.tar'])
def test_patterns_stay_in_the_folder_that_they_name(tmp_path, kind, pattern):
    """Whether a path lies in a stranger's run is seen before it is spelled out."""
    (tmp_path / 'run' / 'a').mkdir(parents=True)
    write_tar(tmp_path / 'x.tar', images())
    write_tar(tmp_path / 'run' / 'a' / 'x.tar', images())
    with refused('must not stand for|does not exist'):
        data.dataset(make(tmp_path / 'sets', source=f'{kind}:{tmp_path}/{pattern}'), 'train')


@pytest.mark.parametrize('kind', ['zip', 'tar'])
def test_an_archive_takes_no_options(tmp_path, kind):
    source = write_entries(tmp_path / f'x.{kind}', list(images().items()))
    with refused(f'{kind}: takes no options.*label=x'):
        data.spec(make(tmp_path / 'sets', source=f'{source}?label=x'))


@pytest.mark.parametrize('kind', ['zip', 'tar'])
def test_a_pixel_more_is_another_set_and_another_place_is_none(tmp_path, kind):
    """Also where the size of the file stays."""
    files = {f'{i}.bmp': encoded(grey(i), 'BMP') for i in range(8)}
    identities = []
    for place, changed in (('a', {}), ('b', {}), ('c', {'3.bmp': encoded(grey(200), 'BMP')})):
        os.makedirs(tmp_path / place)
        source = write_entries(tmp_path / place / f'x.{kind}', list({**files, **changed}.items()))
        identities.append(data.dataset(make(tmp_path / 'sets', source=source), 'train').identity)
    assert identities[0] == identities[1] != identities[2]
