"""IDX files, MNIST's format: idx:PATH of a folder with the usual names, or of a file of images, labels beside it.

A file is 0, 0, the type, the number of axes; the length of each axis in 32 bits; the values: all big-endian (LeCun,
Cortes and Burges, The MNIST database of handwritten digits). MNIST, Fashion-MNIST, KMNIST and EMNIST come as four of
them, train-images-idx3-ubyte, train-labels-idx1-ubyte and t10k-..., gzipped or not. The images of EMNIST are stored by
column: idx:PATH?layout=NWH. Where a folder has several sets, as EMNIST has, the address is that of one file of images.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import math
import os
import re
import struct

import numpy as np

from jaxgen.addresses import Address
from jaxgen.data import arrays
from jaxgen.data.records import Contents, open_file, text_digest
from jaxgen.errors import UserError

DTYPES = {0x08: 'u1', 0x09: 'i1', 0x0B: '>i2', 0x0C: '>i4', 0x0D: '>f4', 0x0E: '>f8'}  # by the third byte
# train-images-idx3-ubyte, emnist-balanced-test-labels-idx1-ubyte.gz, train-images.idx3-ubyte
NAME = re.compile(r'(?:(.+)[-_.])?(train|t10k|test|val|valid|validation)[-_.](images|labels)(?:[-_.].*)?')
SPLITS = {**arrays.WORDS, 't10k': 'test'}
WHAT = {'images': 'image', 'labels': 'label'}


def read(address: Address, data) -> Contents:
    """A folder's IDX files, or a file of images and what lies beside it."""
    paths = files_of(address.path)
    splits = {split: {what: stored(path, what, data) for what, path in parts.items()} for split, parts in paths.items()}
    used = tuple(path for parts in paths.values() for path in parts.values())

    def digest() -> str:
        """Of the values, so that it does not matter whether they are gzipped."""
        about = [
            (split, what, x.shape, x.dtype.str, x.load()) for split, one in splits.items() for what, x in one.items()
        ]
        return text_digest(*(f'{one} {hashlib.sha256(np.ascontiguousarray(x)).hexdigest()}' for *one, x in about))

    return arrays.contents(address, data, splits, used)._replace(digest=digest)


def files_of(path: str) -> dict[str, dict[str, str]]:
    """{split: {'image': path, 'label': path}}.

    Raises:
      UserError: there are none, or of several sets.
    """
    single = not os.path.isdir(path)
    folder = os.path.dirname(path) if single else path
    own = NAME.fullmatch(os.path.basename(path)) if single else None
    if single and not own:  # any other name: the labels' is the same with 'labels' for 'images'
        beside = re.sub('images', 'labels', os.path.basename(path)).replace('idx3', 'idx1')
        labels = os.path.join(folder, beside)
        return {'train': {'image': path} | ({'label': labels} if beside not in path and os.path.exists(labels) else {})}
    sets: dict[str, dict[str, dict[str, str]]] = {}
    for name in sorted(os.listdir(folder)):
        if match := NAME.fullmatch(name):
            parts = sets.setdefault(match[1] or '', {}).setdefault(SPLITS[match[2]], {})
            parts.setdefault(WHAT[match[3]], os.path.join(folder, name))  # the unpacked one of both sorts first
    if own:
        sets = {own[1] or '': sets.get(own[1] or '', {})}
    if len(sets) > 1:
        some = ', '.join(map(repr, sorted(sets)[:10]))
        raise UserError(f'{folder} holds IDX files of several sets, {some}: name one file of images, idx:{folder}/FILE')
    parts = next(iter(sets.values()), {})
    parts = {split: files for split, files in parts.items() if 'image' in files}
    if not parts:
        raise UserError(f'{folder} holds no IDX files with names like train-images-idx3-ubyte.gz')
    return parts


def stored(path: str, what: str, data) -> arrays.Stored:
    """The array of an IDX file by its header, which is checked against the file's size.

    Raises:
      UserError: it is no IDX file, or damaged.
    """
    with open_file(path) as file:
        size, packed = os.fstat(file.fileno()).st_size, file.read(2) == b'\x1f\x8b'
    try:
        with gzip.open(path) if packed else open(path, 'rb') as file:
            start = file.read(4)
            axes = start[3] if len(start) == 4 and start[:2] == b'\0\0' else 0
            lengths = file.read(4 * axes)
    except (EOFError, OSError, gzip.zlib.error) as e:
        raise UserError(f'{path} is damaged: {e}') from e
    if not 1 <= axes <= 5 or start[2] not in DTYPES:
        raise UserError(f'{path} is no IDX file: it starts with {start.hex(" ") or "nothing"}, not 00 00 08 03')
    if len(lengths) < 4 * axes:
        raise UserError(f'{path} is damaged: it ends within its header')
    shape, dtype = struct.unpack(f'>{axes}I', lengths), np.dtype(DTYPES[start[2]])
    offset, n_bytes = 4 + 4 * axes, math.prod(shape) * dtype.itemsize
    if not packed and size != offset + n_bytes:
        raise UserError(f'{path} is damaged: by its header it has {offset + n_bytes} bytes, but it has {size}')
    if packed and n_bytes > arrays.INFLATION * size:
        raise UserError(f'{path} is damaged: by its header it has {n_bytes} bytes, more than the file can hold')

    def load() -> np.ndarray:
        if not packed:
            return np.memmap(path, dtype, 'r', offset, shape)
        content = arrays.unpack(path, path, '', offset + n_bytes, data, functools.partial(gzip.open, path))
        return content[offset:].view(dtype).reshape(shape)

    return arrays.Stored(os.path.basename(path), shape, dtype, load)
