"""Every kind of file that is read as it is, on files that the tests write: good, damaged, empty, mixed, malicious."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pytest
import scipy.io
from data_sets import encoded, make, refused, take
from PIL import Image
from pyarrow import parquet
from support import path

from jaxgen import config as configs
from jaxgen import data
from jaxgen.data import arrays, cifar, matlab
from jaxgen.data import parquet as read_parquet
from jaxgen.errors import RunError

RNG = np.random.default_rng(0)
GREY = {split: RNG.integers(0, 256, (n, 6, 6), np.uint8) for split, n in (('train', 12), ('test', 8))}
COLOUR = {split: RNG.integers(0, 256, (n, 32, 32, 3), np.uint8) for split, n in (('train', 10), ('test', 5))}
LABELS = {split: (np.arange(n) * 3 % 4).astype(np.uint8) for split, n in (('train', 12), ('test', 8))}
CIFAR_LABELS = {'train': np.arange(10)[::-1].astype(np.uint8), 'test': np.arange(5).astype(np.uint8)}
CLASSES = ['airplane', 'car', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']


def idx_bytes(x: np.ndarray, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, x.ndim]) + struct.pack(f'>{x.ndim}I', *x.shape) + x.tobytes()


def write(path, content: bytes):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as file:
        file.write(content)


def write_idx(path, pack=lambda content: content, end=''):
    for split, name in (('train', 'train'), ('test', 't10k')):
        write(f'{path}/{name}-images-idx3-ubyte{end}', pack(idx_bytes(GREY[split])))
        write(f'{path}/{name}-labels-idx1-ubyte{end}', pack(idx_bytes(LABELS[split])))
    return f'idx:{path}'


def write_npz(path, save=np.savez, **others):
    save(path, x_train=GREY['train'], y_train=LABELS['train'], x_test=GREY['test'], y_test=LABELS['test'], **others)
    return f'npz:{path}.npz'


def write_npy(path):
    os.makedirs(path)
    for split in GREY:
        np.save(f'{path}/images_{split}.npy', GREY[split])
        np.save(f'{path}/labels_{split}.npy', LABELS[split])
    return f'npy:{path}'


def write_mat(path, compress=False):
    values = {'data': GREY['train'], 'target': LABELS['train'] + 1, 'testdata': GREY['test']}
    values = {name: np.moveaxis(x, 0, -1) if x.ndim == 3 else x for name, x in values.items()}
    scipy.io.savemat(f'{path}.mat', {**values, 'testtarget': LABELS['test'] + 1}, do_compression=compress)
    return f'mat:{path}.mat'


def write_flat_mat(path):
    """As Omniglot's chardata.mat: pixels by column along the first axis, in [0, 1], labels one-hot."""
    one_hot = {split: np.eye(4)[LABELS[split]].T for split in LABELS}
    flat = {split: GREY[split].transpose(0, 2, 1).reshape(len(GREY[split]), -1).T / 255.0 for split in GREY}
    names = {'data': flat['train'], 'testdata': flat['test'], 'target': one_hot['train'], 'testtarget': one_hot['test']}
    scipy.io.savemat(f'{path}.mat', names)
    return f'mat:{path}.mat?image=data&layout=(WH)N&range=0,1'


def hub_metadata(names):
    features = {'image': {'_type': 'Image'}, 'label': {'names': names, '_type': 'ClassLabel'}}
    return {'huggingface': json.dumps({'info': {'features': features}})}


def hub_table(split: str, rows: slice = slice(None), metadata=True) -> pa.Table:
    images = [{'bytes': encoded(Image.fromarray(x)), 'path': None} for x in GREY[split][rows]]
    table = pa.table({'image': images, 'label': LABELS[split][rows].astype(np.int64)})
    return table.replace_schema_metadata(hub_metadata(list('abcd'))) if metadata else table


def write_parquet(path, metadata=True):
    os.makedirs(f'{path}/data')
    shards = {'train-00000-of-00002': ('train', slice(0, 7)), 'train-00001-of-00002': ('train', slice(7, None))}
    shards['test-00000-of-00001'] = 'test', slice(None)
    for name, (split, rows) in shards.items():
        parquet.write_table(hub_table(split, rows, metadata), f'{path}/data/{name}.parquet', row_group_size=3)
    return f'parquet:{path}'


def cifar_binary(split: str, rows: slice = slice(None)) -> bytes:
    images, labels = COLOUR[split][rows], CIFAR_LABELS[split][rows]
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels[:, None], planes], 1).tobytes()


def cifar_files() -> dict[str, bytes]:
    return {
        'data_batch_1.bin': cifar_binary('train', slice(0, 6)),
        'data_batch_2.bin': cifar_binary('train', slice(6, None)),
        'test_batch.bin': cifar_binary('test'),
        'batches.meta.txt': '\n'.join(CLASSES).encode(),
        'readme.html': b'not read',
    }


def write_cifar(path):
    for name, content in cifar_files().items():
        write(f'{path}/{name}', content)
    return f'cifar:{path}'


def write_tar(path, files: dict[str, bytes]):
    with tarfile.open(f'{path}.tar.gz', 'w:gz') as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f'cifar-10-batches/{name}')
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return f'cifar:{path}.tar.gz'


def pickles(protocol=2) -> dict[str, bytes]:
    """As Python 2 has written them, but for the kind of texts."""

    def batch(split, rows=slice(None)):
        planes = COLOUR[split][rows].transpose(0, 3, 1, 2).reshape(-1, 3072)
        labels = CIFAR_LABELS[split][rows].tolist()
        return pickle.dumps({b'batch_label': b'one', b'data': planes, b'labels': labels}, protocol)

    names = [name.encode() for name in CLASSES]
    parts = {'data_batch_1': batch('train', slice(0, 6)), 'data_batch_2': batch('train', slice(6, None))}
    return {**parts, 'test_batch': batch('test'), 'batches.meta': pickle.dumps({b'label_names': names}, protocol)}


GOOD = {
    'idx': write_idx,
    'idx gzipped': lambda path: write_idx(path, gzip.compress, '.gz'),
    'npz': write_npz,
    'npz compressed': lambda path: write_npz(path, np.savez_compressed),
    'npy': write_npy,
    'mat': write_mat,
    'mat compressed': lambda path: write_mat(path, True),
    'mat by column': write_flat_mat,
    'parquet': write_parquet,
    'parquet without names': lambda path: write_parquet(path, False),
    'cifar': write_cifar,
    'cifar in a tar': lambda path: write_tar(path, cifar_files()),
    'cifar pickles': lambda path: write_tar(path, pickles()),
    'cifar pickles of protocol 5': lambda path: write_tar(path, pickles(5)),
}
NAMES = {'mat': list('1234'), 'mat compressed': list('1234'), 'parquet': list('abcd')}


@pytest.mark.parametrize('kind', GOOD)
@pytest.mark.parametrize('cache_mb', [512, 0])
def test_examples_are_those_of_the_file(kind, cache_mb, tmp_path):
    source = GOOD[kind](f'{tmp_path}/set')
    images, labels, names = GREY, LABELS, NAMES.get(kind, [])
    if kind.startswith('cifar'):
        images, labels, names = COLOUR, CIFAR_LABELS, CLASSES
    size, channels = images['train'].shape[1], 3 if images is COLOUR else 1
    fields = {'size': size, 'channels': channels, 'features': ('image', 'label'), 'cache_mb': cache_mb}
    config = make(tmp_path / 'sets', source=source, **fields)
    spec = data.spec(config)
    assert spec.classes == len(set(labels['train'].tolist())) and list(spec.names) == names
    for split in ('train', 'test'):
        examples = data.dataset(config, split)
        assert len(examples) == len(images[split])
        for i in (len(examples) - 1, *range(len(examples))):
            example = examples[i]
            np.testing.assert_array_equal(example['image'].reshape(images[split][i].shape), images[split][i])
            assert example['label'] == labels[split][i]
    unpacked = os.path.isdir(tmp_path / 'sets' / arrays.UNPACKED)
    assert unpacked == (cache_mb == 0 and kind in ('idx gzipped', 'npz compressed', 'mat compressed'))
    # Elsewhere it is the same set, and with other images another.
    identity = data.dataset(config, 'train').identity
    moved = shutil.move(source.partition(':')[2].partition('?')[0], tmp_path / ('moved' + source.split('?')[0][-7:]))
    elsewhere = source.partition(':')[0] + f':{moved}' + (f'?{source.partition("?")[2]}' if '?' in source else '')
    assert data.dataset({**config, 'source': elsewhere}, 'train').identity == identity
    assert data.dataset(config | {'source': elsewhere}, 'test').identity != identity


def test_gzipped_or_not_it_is_one_set(tmp_path):
    sets = [GOOD[kind](f'{tmp_path}/{i}') for i, kind in enumerate(('idx', 'idx gzipped'))]
    configs_of = [make(tmp_path / 'sets', source=source, size=6) for source in sets]
    first, second = (data.dataset(config, 'train').identity for config in configs_of)
    assert first == second
    damage(tmp_path / '0' / 'train-images-idx3-ubyte', lambda x: x[:-1] + bytes([x[-1] ^ 1]))
    assert data.dataset(configs_of[0], 'train').identity != second


def test_two_processes_and_a_later_start_divide_one_order(tmp_path):
    config = make(tmp_path / 'sets', source=write_parquet(f'{tmp_path}/set'), size=6, crop='random', cache_mb=0)
    config |= {'features': ('image', 'label')}
    whole = take(config, 6)
    parts = [take(config, 4, start=2, process_index=i, process_count=2) for i in range(2)]
    for b in range(4):
        for name in ('image', 'label'):
            both = np.concatenate([part[b][name] for part in parts])
            np.testing.assert_array_equal(whole[2 + b][name], both)


def test_one_file_without_a_split_holds_some_out(tmp_path):
    np.savez(tmp_path / 'one.npz', images=GREY['train'], labels=LABELS['train'])
    config = make(tmp_path / 'sets', source=f'npz:{tmp_path}/one.npz', size=6, test_fraction=0.3)
    rows = [
        {data.dataset(config, split)[i]['image'].tobytes() for i in range(len(data.dataset(config, split)))}
        for split in ('train', 'test')
    ]
    assert not rows[0] & rows[1] and rows[0] | rows[1] == {x.tobytes() for x in GREY['train']} and rows[1]


# --- what is wrong is said in one line


def damage(path, change):
    """Changes the bytes of a file."""
    with open(path, 'rb') as file:
        content = file.read()
    with open(path, 'wb') as file:
        file.write(change(content))


def use(tmp_path, source: str, **fields):
    """Everything that a training run does with its data before it compiles."""
    config = make(tmp_path / 'sets', source=source, size=6, **fields)
    data.spec(config)
    for split in ('train', 'test'):
        data.dataset(config, split)


FILES = {
    'idx': 'train-images-idx3-ubyte',
    'idx gzipped': 'train-images-idx3-ubyte.gz',
    'npy': 'images_train.npy',
    'parquet': 'data/train-00001-of-00002.parquet',
    'cifar': 'data_batch_2.bin',
}
WRONG = {
    'cut in half': (lambda x: x[: len(x) // 2 + 1], 'damaged|is no |ends early'),
    'empty': (lambda x: b'', 'damaged|is no |holds no|ends early'),
    'of another kind': (lambda x: b'GIF89a' + bytes(3000), 'damaged|is no '),
}


@pytest.mark.parametrize('kind', GOOD)
@pytest.mark.parametrize('wrong', WRONG)
def test_damaged_files(kind, wrong, tmp_path):
    source = GOOD[kind](f'{tmp_path}/set')
    change, says = WRONG[wrong]
    path = source.partition(':')[2].partition('?')[0]
    damage(os.path.join(path, FILES[kind]) if os.path.isdir(path) and kind in FILES else
           path if not os.path.isdir(path) else os.path.join(path, FILES[kind.split()[0]]), change)  # fmt: skip
    with refused(says):
        use(tmp_path, source, cache_mb=0)


@pytest.mark.parametrize('kind', GOOD)
def test_what_is_not_there(kind, tmp_path):
    source = GOOD[kind](f'{tmp_path}/set')
    kind = source.partition(':')[0]
    with refused('No such file|holds no'):
        use(tmp_path, f'{kind}:{tmp_path}/nowhere')
    for bare in (kind, f'{kind}:', f'{kind}:?range=0,1'):
        with refused('config.data.source: name the file'):
            use(tmp_path, bare)
    os.mkfifo(tmp_path / 'pipe')
    with refused('no regular file'):
        use(tmp_path, f'{kind}:{tmp_path}/pipe')
    os.makedirs(tmp_path / 'bare')
    with refused('holds no|Is a directory|no regular file'):
        use(tmp_path, f'{kind}:{tmp_path}/bare')


def large_npy(shape=(2**40, 6, 6)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {'descr': '|u1', 'fortran_order': False, 'shape': shape})
    return file.getvalue() + bytes(100)


def zipped(path, **members: bytes) -> str:
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f'{name}.npy', content)
    return f'npz:{path}'


def objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{}], object), allow_pickle=True)
    return file.getvalue()


def of_addresses() -> bytes:
    """An array of objects whose bytes, if they were mapped, would be taken for their addresses."""
    header = objects()[:128].replace(b'(1,)', b'(4, 6, 6)')
    return header[: header.index(b'}') + 1].ljust(127) + b'\n' + b'A' * (4 * 36 * 8)


def write_columns(path, labels, names=()):
    table = pa.table({'image': [encoded(Image.fromarray(GREY['train'][0]))] * 3, 'label': labels})
    described = {'label': {'_type': 'ClassLabel', 'names': list(names)}} if names else {}
    about = json.dumps({'info': {'features': described}})
    parquet.write_table(table.replace_schema_metadata({'huggingface': about}), path)


class Malicious:
    def __reduce__(self):
        return (os.system, ('touch executed',))


CASES = {
    'header beyond the file': (
        lambda p: write(p / 'a', idx_bytes(GREY['train'])[:4] + struct.pack('>3I', 2**31, 2**31, 2**31)),
        'idx:{p}/a', 'by its header it has'),
    'gzipped header beyond the file': (
        lambda p: write(p / 'a', gzip.compress(b'\0\0\x08\x03' + struct.pack('>3I', 2**31, 2**31, 2**31))),
        'idx:{p}/a', 'more than the file can hold'),
    'idx with more bytes than its header': (
        lambda p: write(p / 'a', gzip.compress(idx_bytes(GREY['train']) + b'more')), 'idx:{p}/a', 'more bytes'),
    'idx of other labels': (
        lambda p: [write(p / 'train-images-idx3-ubyte', idx_bytes(GREY['train'])),
                   write(p / 'train-labels-idx1-ubyte', idx_bytes(LABELS['test']))],
        'idx:{p}', 'layout|12 images'),
    'idx of two sets': (
        lambda p: [write(p / f'emnist-{name}-train-images-idx3-ubyte', idx_bytes(GREY['train']))
                   for name in ('digits', 'letters')],
        'idx:{p}', "several sets, 'emnist-digits', 'emnist-letters'"),
    'splits of two sizes': (
        lambda p: [write(p / 'train-images-idx3-ubyte', idx_bytes(GREY['train'])),
                   write(p / 't10k-images-idx3-ubyte', idx_bytes(GREY['test'][:, :5]))],
        'idx:{p}', 'differ in size'),
    'no images at all': (
        lambda p: write(p / 'a', idx_bytes(GREY['train'][:0])), 'idx:{p}/a', 'are empty'),
    'npy beyond the file': (
        lambda p: write(p / 'a.npy', large_npy()), 'npy:{p}/a.npy', 'more than the file holds'),
    'npz beyond the file': (lambda p: zipped(p / 'a.npz', images=large_npy()), 'npz:{p}/a.npz', 'by its header'),
    'objects alone': (lambda p: zipped(p / 'a.npz', images=objects()), 'npz:{p}/a.npz', 'no arrays.*Python objects'),
    'objects in a file': (lambda p: write(p / 'a.npy', of_addresses()), 'npy:{p}/a.npy', 'Python objects'),
    'objects in a folder': (lambda p: write(p / 'images.npy', of_addresses()), 'npy:{p}', 'no arrays.*Python objects'),
    'an option twice': (
        lambda p: np.savez(p / 'a.npz', x=GREY['train']), 'npz:{p}/a.npz?range=0,1&range=0,2', 'range=0,1&range=0,2'),
    'a size alone': (lambda p: np.savez(p / 'a.npz', x=GREY['train']), 'npz:{p}/a.npz?size=6x6', 'add layout'),
    'texts for images': (
        lambda p: np.savez(p / 'a.npz', x=GREY['train'].astype(str)), 'npz:{p}/a.npz', 'no real numbers'),
    'structures for images': (
        lambda p: np.savez(p / 'a.npz', x=np.zeros((4, 6, 6), 'u1,f4')), 'npz:{p}/a.npz?range=0,1', 'no real numbers'),
    'complex images': (
        lambda p: np.savez(p / 'a.npz', x=GREY['train'] * 1j), 'npz:{p}/a.npz?range=0,255', 'no real numbers'),
    'labels beyond all integers': (
        lambda p: np.savez(p / 'a.npz', x=GREY['train'], y=LABELS['train'] * 1e300), 'npz:{p}/a.npz', 'one integer'),
    'texts for numbers of classes': (
        lambda p: write_columns(p / 'a.parquet', ['cat'] * 3, ['cat']), 'parquet:{p}/a.parquet', 'not the numbers'),
    'lists for labels': (
        lambda p: write_columns(p / 'a.parquet', [[1], [2, 3], []]), 'parquet:{p}/a.parquet', 'not lists'),
    'two columns of one name': (
        lambda p: parquet.write_table(pa.Table.from_arrays([pa.array([b'x'])] * 2, ['image'] * 2), p / 'a.parquet'),
        'parquet:{p}/a.parquet', 'several columns'),
    'no name of images': (
        lambda p: np.savez(p / 'a.npz', cells=GREY['train'], kind=LABELS['train']),
        'npz:{p}/a.npz', r'which array holds the images\? Write \?image=NAME.*it has cells uint8'),
    'no such array': (
        lambda p: np.savez(p / 'a.npz', cells=GREY['train']), 'npz:{p}/a.npz?image=cell', 'did you mean cells'),
    'no such option': (
        lambda p: np.savez(p / 'a.npz', images=GREY['train']), 'npz:{p}/a.npz?size_=3', 'no such array'),
    'floats without a range': (
        lambda p: np.savez(p / 'a.npz', images=GREY['train'] / 255.0),
        'npz:{p}/a.npz', r'float64 from 0\S* to (0|1)\S* .*\?range=0,1'),
    'bits without a range': (
        lambda p: np.savez(p / 'a.npz', images=GREY['train'] // 128), 'npz:{p}/a.npz', r'from 0 to 1.*range=0,1'),
    'no range': (
        lambda p: np.savez(p / 'a.npz', images=GREY['train']), 'npz:{p}/a.npz?range=0-1', 'must be BLACK,WHITE'),
    'two axes': (
        lambda p: np.savez(p / 'a.npz', images=GREY['train'].reshape(12, -1)),
        'npz:{p}/a.npz', r'layout=NHWC.*N\(HW\)'),
    'no layout': (
        lambda p: np.savez(p / 'a.npz', images=GREY['train']), 'npz:{p}/a.npz?layout=NHH', 'once each'),
    'another layout': (
        lambda p: np.savez(p / 'a.npz', images=GREY['train']), 'npz:{p}/a.npz?layout=N(HW)', '2 axes, the array 3'),
    'a layout that is not square': (
        lambda p: np.savez(p / 'a.npz', images=GREY['train'][:, :5].reshape(12, -1)),
        'npz:{p}/a.npz?layout=N(HW)', 'add size='),
    'another size': (
        lambda p: np.savez(p / 'a.npz', images=GREY['train'].reshape(12, -1)),
        'npz:{p}/a.npz?layout=N(HW)&size=7x6', 'is not'),
    'labels that are no classes': (
        lambda p: np.savez(p / 'a.npz', images=GREY['train'], labels=np.linspace(0, 1, 12)),
        'npz:{p}/a.npz', 'labels must be one integer'),
    'one image': (
        lambda p: np.savez(p / 'a.npz', images=GREY['train'][:1], labels=[0]), 'npz:{p}/a.npz', 'too few'),
    'MATLAB 7.3': (
        lambda p: write(p / 'a.mat', b'MATLAB 7.3 MAT-file'.ljust(512) + b'\x89HDF\r\n\x1a\n'),
        'mat:{p}/a.mat', "save.*-v7'"),
    'structs alone': (
        lambda p: scipy.io.savemat(p / 'a.mat', {'s': {'x': 1}}), 'mat:{p}/a.mat', 'no arrays|which array'),
    'mixed columns': (
        lambda p: [parquet.write_table(hub_table('train'), p / 'train-0.parquet'),
                   parquet.write_table(pa.table({'image': [b'']}), p / 'train-1.parquet')],
        'parquet:{p}', 'other columns'),
    'no column of images': (
        lambda p: parquet.write_table(pa.table({'label': [1, 2]}), p / 'a.parquet'),
        'parquet:{p}/a.parquet', 'no column with the bytes of images; it has label int64'),
    'no rows': (
        lambda p: parquet.write_table(hub_table('train')[:0], p / 'a.parquet'), 'parquet:{p}/a.parquet',
        'no examples'),
    'classes beyond the names': (
        lambda p: parquet.write_table(hub_table('train').replace_schema_metadata(hub_metadata(['a'])),
                                      p / 'a.parquet'),
        'parquet:{p}/a.parquet', 'labels of train are 0 to 3, of 1 classes'),
    'both sorts of CIFAR': (
        lambda p: [write(p / 'train.bin', bytes(3074)), write(p / 'data_batch_1.bin', bytes(3073))],
        'cifar:{p}', 'CIFAR-10 and of CIFAR-100'),
    'a malicious pickle': (
        lambda p: write(p / 'data_batch_1', pickle.dumps({'data': Malicious()})), 'cifar:{p}', 'is not run'),
    'a malicious name of classes': (
        lambda p: [write(p / 'data_batch_1', pickles()['data_batch_1']),
                   write(p / 'batches.meta', pickle.dumps({'label_names': Malicious()}, 2))],
        'cifar:{p}', 'is not run'),
}  # fmt: skip


@pytest.mark.parametrize('case', CASES)
def test_mistakes_are_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare, source, says = CASES[case]
    (tmp_path / 'in').mkdir()
    prepare(tmp_path / 'in')
    with refused(says):
        use(tmp_path, source.format(p=tmp_path / 'in'))
    assert not os.path.exists('executed')
    with contextlib.suppress(FileNotFoundError):
        assert not os.listdir(tmp_path / 'sets' / arrays.UNPACKED)


# --- arrays: layouts, ranges, features


LAYOUTS = {
    'NHWC': lambda x: x,
    'NCHW': lambda x: x.transpose(0, 3, 1, 2),
    'HWCN': lambda x: x.transpose(1, 2, 3, 0),
    'NWHC': lambda x: x.transpose(0, 2, 1, 3),
    'N(HWC)': lambda x: x.reshape(len(x), -1),
    'N(CWH)': lambda x: x.transpose(0, 3, 2, 1).reshape(len(x), -1),
    '(WH)CN': lambda x: x.transpose(2, 1, 3, 0).reshape(-1, 3, len(x)),
}


@pytest.mark.parametrize('order', ['C', 'F'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts(layout, order, tmp_path):
    x = RNG.integers(0, 256, (9, 5, 7, 3), np.uint8)
    np.savez(tmp_path / 'a.npz', images=np.asarray(LAYOUTS[layout](x), order=order))
    source = f'npz:{tmp_path}/a.npz?layout={layout}' + ('&size=5x7' if '(' in layout else '')
    config = make(tmp_path / 'sets', source=source, size=(5, 7), channels=3, test_fraction=0.2)
    seen = [data.dataset(config, split)[i]['image'] for split in ('train', 'test')
            for i in range(len(data.dataset(config, split)))]  # fmt: skip
    assert sorted(one.tobytes() for one in seen) == sorted(one.tobytes() for one in x)


@pytest.mark.parametrize('shape, layout', [((9, 5, 7), 'NHW'), ((9, 5, 7, 3), 'NHWC'), ((9, 3, 5, 7), 'NCHW')])
def test_shapes_that_leave_no_doubt(shape, layout, tmp_path):
    np.savez(tmp_path / 'a.npz', images=RNG.integers(0, 256, shape, np.uint8))
    found = [f'npz:{tmp_path}/a.npz', f'npz:{tmp_path}/a.npz?layout={layout}']
    config = make(tmp_path / 'sets', size=(5, 7), channels=3)
    first, second = (data.dataset({**config, 'source': source}, 'train')[0]['image'] for source in found)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize('dtype, limits', [(np.float32, (0, 1)), (np.float64, (-1, 1)), (np.uint16, (0, 65535)),
                                           (np.float32, (1, 0)), (np.bool_, None), (np.uint8, (0, 1))])  # fmt: skip
def test_ranges(dtype, limits, tmp_path):
    bits = dtype is np.bool_ or (limits == (0, 1) and dtype is np.uint8)
    levels = np.array([0, 255] if bits else [0, 51, 102, 255], float)
    low, high = limits or (0, 1)
    x = np.resize(levels / 255 * (high - low) + low, (8, 2, 2)).astype(dtype)
    np.savez(tmp_path / 'a.npz', images=x)
    options = f'?range={low},{high}' if limits else ''
    config = make(tmp_path / 'sets', source=f'npz:{tmp_path}/a.npz{options}', size=2)
    image = data.dataset(config, 'train')[0]['image'].reshape(-1)
    np.testing.assert_array_equal(image, np.resize(levels, 4))


def test_what_lies_outside_of_the_range_is_a_damaged_example(tmp_path, capfd):
    x = np.zeros((200, 2, 2), np.float32)
    x[:, 0] = 1
    x[7], x[9] = np.nan, 2
    np.savez(tmp_path / 'a.npz', images=x)
    config = make(tmp_path / 'sets', source=f'npz:{tmp_path}/a.npz?range=0,1', size=2, max_corrupt=0.05)
    for split in ('train', 'test'):
        examples = data.dataset(config, split)
        assert all(examples[i]['image'].mean() == 127.5 for i in range(len(examples)))
    err = capfd.readouterr().err
    assert 'example 7 cannot be decoded' in err and 'example 9 cannot be decoded' in err and 'range=0,1' in err


def test_other_arrays_are_features_by_their_names(tmp_path):
    n = 12
    np.savez(
        tmp_path / 'a.npz',
        imgs=GREY['train'],
        latents_classes=np.arange(n * 6).reshape(n, 6),
        position=np.linspace(0, 1, n * 2).reshape(n, 2),
        mask=GREY['train'] > 100,
        captions=np.array(['a dog', 'eine Kuh', 'é' * 3] * 4),
        constant=np.arange(3),
        metadata=np.array({}, object),
    )
    features = ('image', 'factors', 'position', 'mask', 'caption')
    source = f'npz:{tmp_path}/a.npz?factors=latents_classes'
    config = make(tmp_path / 'sets', source=source, size=6, features=features)
    spec = data.spec(config)
    assert {name: (f.shape, f.dtype.name) for name, f in spec.features.items()} == {
        'image': ((6, 6, 1), 'uint8'),
        'factors': ((6,), 'int32'),
        'position': ((2,), 'float32'),
        'mask': ((6, 6, 1), 'uint8'),
        'caption': ((8,), 'uint8'),
    }
    train = data.dataset(config, 'train')
    for i in range(len(train)):
        example = train[i]
        number = int(example['factors'][0]) // 6
        np.testing.assert_array_equal(example['image'][..., 0], GREY['train'][number])
        np.testing.assert_array_equal(example['mask'][..., 0], np.where(GREY['train'][number] > 100, 255, 0))
        assert bytes(example['caption']).rstrip(b'\0').decode() == ['a dog', 'eine Kuh', 'é' * 3][number % 3]
    with refused(r"has no 'constant'"):
        data.spec({**config, 'features': ('image', 'constant')})


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    source = write_parquet(f'{tmp_path}/set')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with refused(r"pip install 'jaxgen\[parquet\]'"):
        use(tmp_path, source)


def test_captions_and_columns_of_parquet(tmp_path):
    table = pa.table(
        {
            'picture': [encoded(Image.fromarray(x)) for x in GREY['train']],
            'text': [f'number {i}' for i in range(12)],
            'kind': ['dog', 'cat'] * 6,
            'width': [float(i) for i in range(12)],
        }
    )
    parquet.write_table(table, tmp_path / 'a.parquet', row_group_size=5)
    features = ('image', 'caption', 'label', 'width')
    source = f'parquet:{tmp_path}/a.parquet?image=picture&label=kind'
    config = make(tmp_path / 'sets', source=source, size=6, features=features)
    assert data.spec(config).names == ('cat', 'dog') and data.spec(config).features['caption'].shape == (9,)
    example = data.dataset(config, 'train')[3]
    number = int(example['width'])
    assert bytes(example['caption']).rstrip(b'\0') == f'number {number}'.encode()
    assert example['label'] == (number + 1) % 2
    np.testing.assert_array_equal(example['image'][..., 0], GREY['train'][number])


def test_a_path_in_a_column_is_not_followed(tmp_path, capfd):
    Image.fromarray(GREY['train'][0]).save(tmp_path / 'secret.png')
    images = [{'bytes': encoded(Image.fromarray(x)), 'path': None} for x in GREY['train']]
    images[5] = {'bytes': None, 'path': str(tmp_path / 'secret.png')}
    parquet.write_table(pa.table({'image': images}), tmp_path / 'a.parquet')
    config = make(tmp_path / 'sets', source=f'parquet:{tmp_path}/a.parquet', size=6, max_corrupt=0.5)
    for split in ('train', 'test'):
        examples = data.dataset(config, split)
        assert all(examples[i]['image'].tobytes() != GREY['train'][0].tobytes() or i for i in range(len(examples)))
    assert 'row 5 of a.parquet cannot be decoded (ValueError: it has a path and no bytes)' in capfd.readouterr().err


def test_test_labels_that_the_hub_keeps_back(tmp_path):
    write_parquet(f'{tmp_path}/set')
    hidden = hub_table('test')
    hidden = hidden.set_column(1, 'label', pa.array([-1] * 8)).replace_schema_metadata(hub_metadata(list('abcd')))
    parquet.write_table(hidden, f'{tmp_path}/set/data/test-00000-of-00001.parquet')
    parquet.write_table(hub_table('test'), f'{tmp_path}/set/data/validation-00000-of-00001.parquet')
    config = make(tmp_path / 'sets', source=f'parquet:{tmp_path}/set', size=6, features=('image', 'label'))
    assert [int(data.dataset(config, 'test')[i]['label']) for i in range(8)] == LABELS['test'].tolist()


def test_superclasses_of_cifar_100(tmp_path):
    coarse, fine = np.arange(10) % 3, np.arange(10) * 7 % 10
    planes = COLOUR['train'].transpose(0, 3, 1, 2).reshape(10, -1)
    content = np.concatenate([coarse[:, None], fine[:, None], planes], 1).astype(np.uint8).tobytes()
    write(f'{tmp_path}/set/train.bin', content)
    write(f'{tmp_path}/set/test.bin', content)
    write(f'{tmp_path}/set/fine_label_names.txt', '\n'.join(CLASSES).encode())
    write(f'{tmp_path}/set/coarse_label_names.txt', b'thing\nanimal\nplant\n')
    config = make(tmp_path / 'sets', size=32, channels=3, features=('image', 'label'))
    for options, labels, names in (('', fine, CLASSES), ('?label=coarse', coarse, ['thing', 'animal', 'plant'])):
        one = {**config, 'source': f'cifar:{tmp_path}/set{options}'}
        assert list(data.spec(one).names) == names
        assert [int(data.dataset(one, 'test')[i]['label']) for i in range(10)] == labels.tolist()


@pytest.mark.parametrize('protocol', range(6))
def test_pickles_of_arrays_are_read_without_running_them(protocol):
    value = {
        b'a': [1, 2, 2**40, -5, None, True],
        'data': np.arange(6, dtype='>i4').reshape(2, 3),
        'f': np.asfortranarray([[1.5, 2], [3, 4]]),
    }
    if protocol == 0:  # its instructions are others
        with pytest.raises(ValueError):
            cifar.unpickled(pickle.dumps(value, protocol))
        return
    read = cifar.unpickled(pickle.dumps(value, protocol))
    assert set(read) == set(value) and read[b'a'] == value[b'a']
    for name in ('data', 'f'):
        np.testing.assert_array_equal(read[name], value[name])


@pytest.mark.parametrize(
    'value', [Malicious(), {'x': Malicious()}, {'x': print}, {'x': np.array([print], object)}, {'x': io.BytesIO(b'a')}]
)
def test_pickles_of_anything_else_are_refused(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in (2, 4, 5):
        with pytest.raises(ValueError):
            print(cifar.unpickled(pickle.dumps(value, protocol)))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('form, compress', [('5', False), ('5', True), ('4', False)])
def test_arrays_of_matlab_are_those_that_scipy_reads(form, compress, tmp_path):
    values = {f'a_{name}': (RNG.random((5, 3)) * 100).astype(name) for name in ('f8', 'f4', 'i2', 'u2', 'i4', 'u1')}
    values |= {'scalar': np.float64(7), 'text': 'abc', 'complex': np.ones((2, 2)) * 1j, 'i': np.array([[1, 2]], 'u1')}
    if form == '5':
        values |= {'four': RNG.random((2, 3, 4, 5)), 'i8': np.arange(4), 'bits': np.eye(3) > 0, 's': {'x': 1}}
        values |= {'empty': np.zeros((0, 3)), 'one': np.array([[5]], 'i2'), 'large': RNG.random((200, 300))}
    scipy.io.savemat(tmp_path / 'a.mat', values, format=form, do_compression=compress)
    expected = scipy.io.loadmat(tmp_path / 'a.mat')
    found = {one.name: one for one in matlab.variables(str(tmp_path / 'a.mat'))}
    assert set(found) == set(values)
    assert {name for name, one in found.items() if one.kind} == {'text', 'complex', 's'} & set(values)
    for name, one in found.items():
        if not one.kind:
            x = matlab.load(str(tmp_path / 'a.mat'), one, make(tmp_path))
            assert x.shape == one.shape and x.dtype == one.dtype
            assert x.dtype == (bool if name == 'bits' else expected[name].dtype)
            np.testing.assert_array_equal(x, expected[name])


def test_large_sets_of_row_groups_are_read_a_window_at_a_time(tmp_path, monkeypatch):
    """Every epoch has each example once, mixed within windows of random row groups; a later start goes on."""
    n = 60
    images = [encoded(Image.fromarray(np.full((6, 6), i, np.uint8))) for i in range(n)]
    table = pa.table({'image': images, 'label': np.arange(n) % 3})
    os.makedirs(tmp_path / 'set')
    parquet.write_table(table, tmp_path / 'set' / 'train-0.parquet', row_group_size=5)
    parquet.write_table(table[:8], tmp_path / 'set' / 'test-0.parquet')
    size = sum(parquet.read_metadata(tmp_path / 'set' / 'train-0.parquet').row_group(i).total_byte_size
               for i in range(12))  # fmt: skip
    monkeypatch.setattr(read_parquet, 'WINDOW', size // 3)
    config = make(tmp_path / 'sets', source=f'parquet:{tmp_path}/set', size=6, cache_mb=0, batch=10)
    order = np.concatenate([b['image'][:, 0, 0, 0] for b in take(config, 12)])
    epochs = order.reshape(2, n)
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
        windows = [set(part // 5) for part in epoch.reshape(3, 20)]
        assert all(len(groups) == 4 for groups in windows), 'of four row groups each'
        assert list(epoch[:20]) != sorted(epoch[:20])
    assert set(epochs[0][:20] // 5) != set(epochs[1][:20] // 5), 'other ones in another epoch'
    again = [b['image'][:, 0, 0, 0] for b in take({**config, 'cache_mb': 512, 'threads': 2}, 7, start=5)]
    np.testing.assert_array_equal(np.concatenate(again), order[50:])
    kept = take({**config, 'keep_classes': (1,), 'features': ('image', 'label')}, 2)
    seen = np.concatenate([b['image'][:, 0, 0, 0] for b in kept])
    assert sorted(seen) == [i for i in range(n) if i % 3 == 1]


# --- the files of published protocols


def section_of(name: str, folder, variant: str = '', **fields) -> dict:
    """The section `data` of a config, its file in this folder."""
    section = configs.load(path(name, variant)).data.to_dict()
    return {**section, 'source': section['source'].replace(os.getcwd(), str(folder)), 'dir': str(folder), **fields}


def test_the_frey_faces(tmp_path):
    """1,965 faces of 28 x 20 pixels, one a column: none is lost, and each is what numpy makes of its column."""
    faces = RNG.integers(0, 256, (560, 1965), np.uint8)
    scipy.io.savemat(tmp_path / 'frey_rawface.mat', {'ff': faces})
    section = section_of('vae_frey', tmp_path)
    splits = [data.dataset(section, split) for split in ('train', 'validation', 'test')]
    assert [round(len(split), -2) for split in splits] == [1600, 200, 200] and sum(map(len, splits)) == 1965
    seen = np.concatenate([split.take(np.arange(len(split)))['image'] for split in splits])
    assert seen.shape == (1965, 28, 20, 1)
    np.testing.assert_array_equal(np.unique(seen.reshape(1965, -1), axis=0), np.unique(faces.T, axis=0))


def test_silhouettes_and_characters(tmp_path):
    """Caltech's silhouettes are stored white on black and trained on the other way round, as in the papers."""
    parts = {'train': RNG.integers(0, 2, (9, 28, 28)), 'val': RNG.integers(0, 2, (4, 28, 28)),
             'test': RNG.integers(0, 2, (5, 28, 28))}  # fmt: skip
    by_column = {f'{k}_data': x.transpose(0, 2, 1).reshape(len(x), -1).astype(np.uint8) for k, x in parts.items()}
    labels = {f'{k}_labels': np.arange(len(x))[:, None] % 3 + 1 for k, x in parts.items()}
    scipy.io.savemat(tmp_path / 'caltech101_silhouettes_28_split1.mat', {**by_column, **labels})
    section = section_of('vampprior_mnist', tmp_path, 'caltech')
    for split, part in (('train', 'train'), ('validation', 'val'), ('test', 'test')):
        x = data.dataset(section, split).take(np.arange(len(parts[part])))['image']
        np.testing.assert_array_equal(x[..., 0], 255 * (1 - parts[part]))
    grey = {name: RNG.random((n, 28, 28)) for name, n in (('data', 40), ('testdata', 6))}
    flat = {name: x.transpose(0, 2, 1).reshape(len(x), -1).T for name, x in grey.items()}
    scipy.io.savemat(tmp_path / 'chardata.mat', flat)
    section = section_of('vampprior_mnist', tmp_path, 'omniglot')
    assert [len(data.dataset(section, split)) for split in ('train', 'validation', 'test')] == [38, 2, 6]
    bits = data.dataset(section, 'test').take(np.arange(6))['image']
    levels = data.dataset({**section, 'binarise': 'none'}, 'test').take(np.arange(6))['image']
    np.testing.assert_array_equal(levels[..., 0], np.rint(255 * grey['testdata']))
    assert set(bits.ravel()) == {0, 255} and np.corrcoef(bits.ravel(), levels.ravel())[0, 1] > 0.5


def test_files_may_be_elsewhere_where_the_config_is_complete(tmp_path):
    """As of a folder: what a model is built of is known without them, and training says that they are not there."""
    gone = make(tmp_path, source=f'mat:{tmp_path}/gone.mat?image=ff', size=(28, 20))
    assert data.spec(gone).features['image'].shape == (28, 20, 1)
    assert data.spec({**gone, 'features': ('image', 'label'), 'classes': 7}).classes == 7
    for features in (('image', 'label'), ('image', 'angle')):
        with refused('No such file'):
            data.spec({**gone, 'features': features})
    with refused('No such file'):
        data.dataset(gone, 'train')


def write_svhn(path, images):
    scipy.io.savemat(path / 'train_32x32.mat', {'X': images.transpose(1, 2, 3, 0), 'y': np.arange(9)[:, None] % 3 + 1})
    return f'mat:{path}/train_32x32.mat'


def write_frey(path, images):
    scipy.io.savemat(path / 'frey.mat', {'ff': images[..., 0].reshape(9, -1).T})
    return f'mat:{path}/frey.mat?image=ff&layout=(HW)N&size=5x7'


def write_medmnist(path, images):
    label = np.arange(3)[:, None]
    parts = {f'{split}_images': images[3 * k : 3 * k + 3] for k, split in enumerate(('train', 'val', 'test'))}
    np.savez_compressed(path / 'a.npz', **parts, **{name.replace('images', 'labels'): label for name in parts})
    return f'npz:{path}/a.npz'


def write_emnist(path, images):
    for name in ('balanced', 'letters'):
        for split, rows in (('train', images[:6, :, :, 0]), ('test', images[6:, :, :, 0])):
            x = rows.transpose(0, 2, 1) if name == 'balanced' else 255 - rows.transpose(0, 2, 1)
            write(f'{path}/emnist-{name}-{split}-images-idx3-ubyte.gz', gzip.compress(idx_bytes(x)))
            labels = np.arange(len(x)).astype(np.uint8)
            write(f'{path}/emnist-{name}-{split}-labels-idx1-ubyte.gz', gzip.compress(idx_bytes(labels)))
    return f'idx:{path}/emnist-balanced-train-images-idx3-ubyte.gz?layout=NWH'


PUBLISHED = {write_svhn: {}, write_frey: {}, write_medmnist: {'train': 3, 'validation': 3, 'test': 3},
             write_emnist: {'train': 6, 'test': 3}}  # fmt: skip


@pytest.mark.parametrize('write_set', PUBLISHED)
def test_sets_as_they_are_published(write_set, tmp_path):
    """Their axes, names and splits, on a few small images of three levels of grey or colour."""
    images = RNG.integers(0, 256, (9, 5, 7, 3), np.uint8)
    source = write_set(tmp_path, images)
    channels = 3 if write_set in (write_svhn, write_medmnist) else 1
    config = make(tmp_path / 'sets', source=source, size=(5, 7), channels=channels)
    sizes = PUBLISHED[write_set]
    sets = [data.dataset(config, split) for split in sizes or ('train', 'test')]
    assert not sizes or [len(one) for one in sets] == list(sizes.values())
    seen = [one[i]['image'].tobytes() for one in sets for i in range(len(one))]
    assert sorted(seen) == sorted(x[..., :channels].tobytes() for x in images)


def test_a_short_section_in_a_program(tmp_path):
    """As docs/data.md has it."""
    np.savez(tmp_path / 'cells.npz', images=GREY['train'] / 255, labels=LABELS['train'])
    section = {'source': f'npz:{tmp_path}/cells.npz?range=0,1', 'size': 6, 'features': ('image', 'label'), 'batch': 4}
    assert data.spec(section).classes == 4
    assert data.dataset(section, 'test')[0]['image'].shape == (6, 6, 1)
    with contextlib.closing(data.batches(section, seed=0)) as batches:
        x = data.to_float(next(batches)['image'])
    assert x.shape == (4, 6, 6, 1) and -1 <= x.min() < x.max() <= 1


@pytest.mark.parametrize('kind', ['npy', 'npz', 'mat', 'idx'])
@pytest.mark.parametrize('how', ['cut off', 'overwritten', 'replaced'])
def test_a_file_that_changes_while_it_is_mapped(kind, how, tmp_path):
    """What a file no longer has must not be touched: the system would end the process."""
    x = RNG.integers(0, 256, (40, 32, 32), np.uint8)
    file, other = tmp_path / f'x.{kind}', tmp_path / f'other.{kind}'
    for one, values in ((file, x), (other, 255 - x)):
        with open(one, 'wb') as out:
            if kind == 'idx':
                out.write(idx_bytes(values))
            elif kind == 'mat':
                scipy.io.savemat(out, {'x': values.transpose(1, 2, 0)})
            else:
                np.save(out, values) if kind == 'npy' else np.savez(out, x=values)
    os.utime(file, (1, 1))
    examples = data.dataset(make(tmp_path, source=f'{kind}:{file}', size=32, cache_mb=0), 'train')
    before = [examples[i]['image'] for i in range(len(examples))]
    if how == 'replaced':
        os.replace(other, file)  # the old one is still there for who has it open
        np.testing.assert_array_equal([examples[i]['image'] for i in range(len(examples))], before)
        return
    if how == 'cut off':
        os.truncate(file, 600)
    else:
        with open(file, 'r+b') as out:
            out.write(other.read_bytes())
    with pytest.raises(RunError, match='has been written to while it is read'):
        examples[len(examples) - 1]


def test_a_split_that_is_empty_is_none(tmp_path, capfd):
    np.savez(tmp_path / 'a.npz', x_train=GREY['train'], x_test=GREY['test'][:0], x_val=GREY['test'])
    config = make(tmp_path / 'sets', source=f'npz:{tmp_path}/a.npz', size=6)
    assert [len(data.dataset(config, split)) for split in ('train', 'test')] == [12, 8]
    assert 'left out the split test, which is empty' in capfd.readouterr().err


def test_batches_of_cifar_that_are_not_there(tmp_path, capfd):
    for name in ('data_batch_1', 'data_batch_3', 'test_batch'):
        write(tmp_path / f'{name}.bin', np.full((4, 3073), 9, np.uint8).tobytes())
    data.dataset(make(tmp_path / 'sets', source=f'cifar:{tmp_path}', size=32, channels=3), 'train')
    assert 'left out data_batch_2, 4, 5, which are not there' in capfd.readouterr().err
    write(tmp_path / 'data_batch_2.bin', np.full((4, 3073), 10, np.uint8).tobytes())
    with refused('labels of train are up to 10, of 10 classes'):
        data.dataset(make(tmp_path / 'sets', source=f'cifar:{tmp_path}', size=32, channels=3), 'train')


def test_labels_that_are_gone_are_gone(tmp_path):
    """What has been read before in the same process does not matter."""
    source = write_idx(f'{tmp_path}/set')
    config = make(tmp_path, source=source, size=6, features=('image', 'label'))
    assert data.spec(config).classes == 4
    for split in ('train', 't10k'):
        os.remove(f'{tmp_path}/set/{split}-labels-idx1-ubyte')
    with refused("has no 'label'"):
        data.spec(config)


def test_a_value_that_stands_in_many_rows_is_not_unfolded_without_end(tmp_path, monkeypatch):
    """Parquet stores a value of a dictionary once: this file has 10 KB, its rows 100 MB."""
    monkeypatch.setattr(read_parquet, 'WINDOW', 2**22)
    value = RNG.bytes(8_000) + bytes(992_000)
    images = pa.DictionaryArray.from_arrays(pa.array(np.zeros(110, np.int32)), pa.array([value]))
    table = pa.table({'image': images, 'label': np.zeros(110, int)})
    parquet.write_table(table, tmp_path / 'x.parquet', compression='zstd', store_schema=False)
    assert os.path.getsize(tmp_path / 'x.parquet') < 30_000
    with pytest.raises(RunError, match='more than 8388608 bytes'):
        data.dataset(make(tmp_path / 'sets', source=f'parquet:{tmp_path}/x.parquet'), 'train')
