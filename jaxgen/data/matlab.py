"""Arrays of MATLAB up to version 7: mat:FILE. See arrays.py.

Omniglot's chardata.mat is mat:FILE?image=data&layout=(WH)N&range=0,1, the Caltech 101 silhouettes (train_data,
train_labels, ...) mat:FILE?layout=N(WH)&range=0,1, the Frey faces mat:FILE?image=ff&layout=(HW)N&size=28x20, SVHN
mat:train_32x32.mat. Only arrays of numbers are read, and only those that are used. Files of version 7.3 are HDF5, which
is not read.

The format is that of MathWorks, MAT-File Format (versions 4 and 5; 6 and 7 are 5, 7 with compressed elements). SciPy's
reader is not used: on damaged files it ends the process.
"""

from __future__ import annotations

import functools
import math
import os
import struct
import zlib
from typing import NamedTuple

import numpy as np

from jaxgen.addresses import Address
from jaxgen.data import arrays
from jaxgen.data.records import Contents, open_file
from jaxgen.errors import UserError

# Types of stored values, by their numbers in a tag.
TYPES = {1: 'i1', 2: 'u1', 3: 'i2', 4: 'u2', 5: 'i4', 6: 'u4', 7: 'f4', 9: 'f8', 12: 'i8', 13: 'u8'}
MATRIX, COMPRESSED = 14, 15
# Types of arrays, which may be stored as smaller ones; other classes are no arrays of numbers.
CLASSES = {6: 'f8', 7: 'f4', 8: 'i1', 9: 'u1', 10: 'i2', 11: 'u2', 12: 'i4', 13: 'u4', 14: 'i8', 15: 'u8'}
OTHERS = {1: 'cell', 2: 'struct', 3: 'object', 4: 'char', 5: 'sparse'}
TYPES_4 = ('f8', 'f4', 'i4', 'i2', 'u2', 'u1')  # of version 4
LOGICAL, COMPLEX = 0x0200, 0x0800  # flags
HEADER = 128  # bytes, of a file
BEGIN = 2**16  # bytes that hold the header of any array
MOST = 10_000  # arrays
NAME = 63  # characters of a name


class Variable(NamedTuple):
    """An array by its header: where its values begin, in the file or in what is compressed there."""

    name: str
    kind: str  # of its class where it has no numbers
    shape: tuple[int, ...] = ()
    dtype: np.dtype = np.dtype('f8')
    stored: np.dtype = np.dtype('f8')
    begin: int = 0
    compressed: tuple[int, int, int] | None = None  # (offset, bytes) in the file, and bytes unpacked


def read(address: Address, data) -> Contents:
    """The arrays in a file."""
    path = address.path
    stored, left_out = {}, []
    for variable in variables(path):
        if variable.kind:
            left_out.append(f'{variable.name} ({variable.kind})')
        elif variable.name:
            values = functools.partial(load, path, variable, data)
            stored[variable.name] = arrays.Stored(variable.name, variable.shape, variable.dtype, values)
    notes = (f'what is no array of numbers: {", ".join(left_out[:5])}',) if left_out else ()
    return arrays.of_names(address, data, stored, (path,), last=True, notes=notes)


def variables(path: str) -> list[Variable]:
    """What a file holds.

    Raises:
      UserError: it is of another kind, or damaged.
    """
    with open_file(path) as file:
        start, size = file.read(HEADER), os.fstat(file.fileno()).st_size
        if start[:8] == b'\x89HDF\r\n\x1a\n' or start[:10] == b'MATLAB 7.3':
            raise UserError(f"{path} is of MATLAB 7.3, which is HDF5: save it by save(..., '-v7'), or as .npz")
        try:
            if len(start) > 20 and 0 in start[:4]:
                return version_4(file, size)
            order = {b'IM': '<', b'MI': '>'}.get(start[126:])
            if order is None:
                raise ValueError(f'it starts with {start[:16]!r}')
            return version_5(file, size, order)
        except (ValueError, KeyError, TypeError, struct.error, zlib.error, OverflowError) as e:
            raise UserError(f'{path} is no file of MATLAB, or damaged: {" ".join(str(e).split())[:200]}') from e


def version_5(file, size: int, order: str) -> list[Variable]:
    variables, at = [], HEADER
    while at < size and len(variables) < MOST:
        file.seek(at)
        kind, n = struct.unpack(order + 'II', file.read(8))
        if at + 8 + n > size:
            raise ValueError('it ends early')
        if kind == COMPRESSED:
            begin = zlib.decompressobj().decompress(file.read(min(n, BEGIN)), BEGIN)
            inner, length = struct.unpack_from(order + 'II', begin)
            if inner == MATRIX:
                one = matrix(begin[8:], order, length)
                variables.append(one._replace(begin=one.begin + 8, compressed=(at + 8, n, length + 8)))
        elif kind == MATRIX:
            one = matrix(file.read(min(n, BEGIN)), order, n)
            variables.append(one._replace(begin=one.begin + at + 8))
        at += 8 + n
    return variables


def matrix(begin: bytes, order: str, length: int) -> Variable:
    """An array by its first bytes; `begin` counts from these.

    Args:
      length: of the array's element.

    Raises:
      ValueError, struct.error, KeyError: it is damaged.
    """
    _, _, at, after = tag(begin, 0, order)
    (flags,) = struct.unpack_from(order + 'I', begin, at)
    _, n, at, after = tag(begin, after, order)
    shape = struct.unpack_from(f'{order}{n // 4}i', begin, at)
    _, n, at, after = tag(begin, after, order)
    name = begin[at : at + n].decode('ascii', 'replace')
    if len(name) > NAME:
        raise ValueError(f'an array has a name of {len(name)} characters')
    kind = flags & 0xFF
    if kind not in CLASSES or flags & COMPLEX:
        return Variable(name, 'complex' if kind in CLASSES else OTHERS.get(kind, 'unknown'))
    number, n, at, _ = tag(begin, after, order)
    stored = np.dtype(TYPES[number]).newbyteorder(order)
    if min(shape, default=0) < 0 or n != math.prod(shape) * stored.itemsize or at + n > length:
        raise ValueError(f'{name} is {list(shape)} by its header, and has {n} bytes')
    return Variable(name, '', shape, np.dtype('?' if flags & LOGICAL else CLASSES[kind]), stored, at)


def tag(content: bytes, at: int, order: str) -> tuple[int, int, int, int]:
    """(type, bytes, where the values begin, where the next tag does)."""
    (word,) = struct.unpack_from(order + 'I', content, at)
    if word >> 16:  # up to four bytes in the tag itself
        return word & 0xFFFF, word >> 16, at + 4, at + 8
    (n,) = struct.unpack_from(order + 'I', content, at + 4)
    return word, n, at + 8, at + 8 + -(-n // 8) * 8


def version_4(file, size: int) -> list[Variable]:
    variables, at = [], 0
    while at < size and len(variables) < MOST:
        file.seek(at)
        header = file.read(20)
        order = '<' if 0 <= struct.unpack('<i', header[:4])[0] < 5000 else '>'
        code, rows, columns, imaginary, length = struct.unpack(order + '5i', header)
        machine, kind, form = code // 1000, code // 10 % 10, code % 10
        if machine not in (0, 1) or code // 100 % 10 or form > 2 or min(rows, columns) < 0 or not 0 < length < BEGIN:
            raise ValueError('it has no header of an array')
        dtype = np.dtype(TYPES_4[kind] if kind < len(TYPES_4) else '').newbyteorder('>' if machine else '<')
        name = file.read(length).rstrip(b'\0').decode('ascii', 'replace')
        begin, n = at + 20 + length, rows * columns * dtype.itemsize
        if begin + n * (2 if imaginary else 1) > size:
            raise ValueError(f'{name} is {[rows, columns]} by its header, more than the file holds')
        other = 'complex' if imaginary else ('', 'char', 'sparse')[form]
        variables.append(Variable(name, other, (rows, columns), dtype.newbyteorder('='), dtype, begin))
        at = begin + n * (2 if imaginary else 1)
    return variables


def load(path: str, variable: Variable, data) -> np.ndarray:
    """The array: mapped, or unpacked where it is compressed."""
    shape, n = variable.shape, math.prod(variable.shape)
    if not variable.compressed:
        x = np.memmap(path, variable.stored, 'r', variable.begin, shape, 'F') if n else np.zeros(shape, variable.stored)
    else:
        offset, length, unpacked = variable.compressed
        what = f'{variable.name} in {path}'
        stream = functools.partial(Inflated, path, offset, length)
        content = arrays.unpack(what, path, f'{offset}', unpacked, data, stream)[variable.begin :]
        x = content[: n * variable.stored.itemsize].view(variable.stored).reshape(shape, order='F')
    return x if x.dtype == variable.dtype else np.asarray(x).astype(variable.dtype)


class Inflated:
    """What is compressed by zlib in a part of a file, to be read in order."""

    def __init__(self, path: str, offset: int, length: int):
        self.file, self.left = open_file(path), length
        self.file.seek(offset)
        self.inflate = zlib.decompressobj()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def read(self, n: int) -> bytes:
        while True:
            packed = self.inflate.unconsumed_tail
            if not packed:
                packed = self.file.read(min(self.left, arrays.PART))
                self.left -= len(packed)
            out = self.inflate.decompress(packed, n)
            if out or not packed:
                return out
