"""Arrays of NumPy: npz:FILE, npy:FILE of images, npy:FOLDER of several, each called as its file. See arrays.py.

What is stored uncompressed is mapped into memory: a set may be larger than that. Nothing is unpickled: arrays of
objects are left out.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import zipfile
from typing import Any

import numpy as np
from numpy.lib import format as npy

from jaxgen.addresses import Address
from jaxgen.data import arrays
from jaxgen.data.records import Contents, open_file
from jaxgen.errors import UserError

LOCAL_HEADER = 30  # bytes of a member's header in a zip file, before its name
MOST_MEMBERS = 10_000


def read_npy(address: Address, data) -> Contents:
    """The array in a file, or the arrays in a folder's files."""
    path = address.path
    if not os.path.isdir(path):
        images = npy_file(path, 'images')
        if images is None:
            raise UserError(f'{path} is an array of Python objects, which is not unpickled')
        return arrays.contents(address, data, {'train': {'images': images}}, (path,))
    names = [name for name in sorted(os.listdir(path)) if name.endswith('.npy')]
    if not names:
        raise UserError(f'{path} holds no .npy files')
    opened = {name[:-4]: npy_file(os.path.join(path, name), name[:-4]) for name in names}
    stored = {name: x for name, x in opened.items() if x is not None}
    files = tuple(os.path.join(path, f'{name}.npy') for name in stored)
    return arrays.of_names(address, data, stored, files, notes=without_objects([n for n in opened if n not in stored]))


def without_objects(names: list[str]) -> tuple[str, ...]:
    """What is left out of a set with these arrays of Python objects."""
    if not names:
        return ()
    return (f'arrays of Python objects ({", ".join(map(ascii, names[:5]))}), which are not unpickled',)


def npy_file(path: str, name: str) -> arrays.Stored | None:
    """The array in a file; None: of Python objects, whose bytes are addresses in memory and must never be mapped."""
    with open_file(path) as file:
        shape, fortran, dtype, start = header(path, file)
        if dtype.hasobject:
            return None
        if start + math.prod(shape) * dtype.itemsize > os.fstat(file.fileno()).st_size:
            raise UserError(f'{path} is damaged: by its header it is {dtype} {list(shape)}, more than the file holds')
    return arrays.Stored(name, shape, dtype, functools.partial(mapped, path, dtype, start, shape, fortran))


def header(what: str, file) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, whether its first axis is the fastest, type, where the values begin) of an array in the .npy format.

    Raises:
      UserError: it is none.
    """
    try:
        version = npy.read_magic(file)
        read: Any = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        # 3.0 is 2.0 with names of fields in UTF-8, and arrays with fields are no images.
        shape, fortran, dtype = (read or npy.read_array_header_2_0)(file)
    except Exception as e:  # a damaged header raises nearly anything
        raise UserError(f'{what} is no array of NumPy: {" ".join(str(e).split())[:200] or type(e).__name__}') from e
    if any(type(n) is not int or n < 0 for n in shape):
        raise UserError(f'{what} is damaged: its shape is {shape}')
    return shape, fortran, dtype, file.tell()


def mapped(path: str, dtype: np.dtype, start: int, shape: tuple[int, ...], fortran: bool) -> np.ndarray:
    assert not dtype.hasobject
    if math.prod(shape) * dtype.itemsize == 0:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, 'r', start, shape, 'F' if fortran else 'C')


def read_npz(address: Address, data) -> Contents:
    """The arrays in a file."""
    path, stored, left_out = address.path, {}, []
    with open_file(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = [m for m in archive.infolist() if m.filename.endswith('.npy')]
                if len(members) > MOST_MEMBERS:
                    raise UserError(f'{path} holds {len(members)} arrays: npz is for arrays of all images')
                for member in members:
                    name = member.filename.removesuffix('.npy')
                    with archive.open(member) as inside:
                        shape, fortran, dtype, start = header(f'{name} in {path}', inside)
                    if dtype.hasobject:
                        left_out.append(name)
                        continue
                    if start + math.prod(shape) * dtype.itemsize != member.file_size:
                        raise UserError(
                            f'{path} is damaged: {name} is {dtype} {list(shape)} by its header, and has '
                            f'{member.file_size} bytes'
                        )
                    about = (shape, fortran, dtype, start)
                    stored[name] = arrays.Stored(
                        name, shape, dtype, functools.partial(load_member, path, member, about, data)
                    )
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as e:
            raise UserError(f'{path} is no .npz file, or damaged: {" ".join(str(e).split())[:200]}') from e
        except Exception as e:
            if isinstance(e, UserError | OSError):
                raise
            raise UserError(f'{path} is damaged: {type(e).__name__}: {" ".join(str(e).split())[:200]}') from e
    return arrays.of_names(address, data, stored, (path,), notes=without_objects(left_out))


def load_member(path: str, member: zipfile.ZipInfo, about: tuple, data) -> np.ndarray:
    """The array of a member: mapped, or unpacked where it is compressed."""
    shape, fortran, dtype, start = about
    if member.compress_type == zipfile.ZIP_STORED:
        with open_file(path) as file:
            file.seek(member.header_offset)
            local = file.read(LOCAL_HEADER)
            size = os.fstat(file.fileno()).st_size
        if len(local) == LOCAL_HEADER and local[:4] == b'PK\3\4':
            names = int.from_bytes(local[26:28], 'little') + int.from_bytes(local[28:30], 'little')
            begin = member.header_offset + LOCAL_HEADER + names
            if begin + member.file_size <= size:
                return mapped(path, dtype, begin + start, shape, fortran)
        raise UserError(f'{path} is damaged: {member.filename} is not where its index says')

    @contextlib.contextmanager
    def stream():
        with zipfile.ZipFile(path) as archive, archive.open(member.filename) as inside:
            yield inside

    content = arrays.unpack(f'{member.filename} in {path}', path, member.filename, member.file_size, data, stream)
    return content[start:].view(dtype).reshape(shape, order='F' if fortran else 'C')
