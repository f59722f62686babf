"""Arrays of MATLAB up to version 7: mat:FILE. See arrays.py.

Omniglot's chardata.mat is mat:FILE?image=data&layout=(WH)N&range=0,1, the Caltech 101 silhouettes (train_data,
train_labels, ...) mat:FILE?layout=N(WH)&range=0,1, the Frey faces mat:FILE?image=ff&layout=(HW)N&size=28x20, SVHN
mat:train_32x32.mat. Only arrays of numbers are read, and only those that are used. Files of version 7.3 are HDF5, which
is not read.
"""

from __future__ import annotations

import functools
import math
import os

import numpy as np
from scipy import io

from jaxgen.addresses import Address
from jaxgen.data import arrays
from jaxgen.data.records import Contents, open_file
from jaxgen.errors import UserError

DTYPES = {
    **{name: name for name in ('int8', 'uint8', 'int16', 'uint16', 'int32', 'uint32', 'int64', 'uint64')},
    'double': 'float64',
    'single': 'float32',
    'logical': 'bool',
}


def read(address: Address, data) -> Contents:
    """The arrays in a file."""
    path = address.path
    with open_file(path) as file:
        start, size = file.read(128), os.fstat(file.fileno()).st_size
    if start[:8] == b'\x89HDF\r\n\x1a\n' or start[:10] == b'MATLAB 7.3':
        raise UserError(f"{path} is of MATLAB 7.3, which is HDF5: save it by save(..., '-v7'), or as .npz")
    try:
        listed = io.whosmat(path)
    except Exception as e:  # a damaged header raises nearly anything
        raise damaged(path, e) from e
    # The compressed parts of a file have at most INFLATION times its size; a character is stored as text.
    stored, left_out = {}, []
    for name, shape, kind in listed:
        if kind not in DTYPES:
            left_out.append(f'{name} ({kind})')
            continue
        dtype = np.dtype(DTYPES[kind])
        if min(shape, default=0) < 0 or math.prod(shape) > arrays.INFLATION * size:
            raise UserError(f'{path} is damaged: {name} is {kind} {list(shape)}, more than the file can hold')
        stored[name] = arrays.Stored(name, tuple(shape), dtype, functools.partial(load, path, name, tuple(shape)))
    notes = (f'what is no array of numbers: {", ".join(left_out[:5])}',) if left_out else ()
    return arrays.of_names(address, data, stored, (path,), last=True, notes=notes)


def load(path: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        x = io.loadmat(path, variable_names=[name], squeeze_me=False, chars_as_strings=False)[name]
    except Exception as e:
        raise damaged(path, e) from e
    if not isinstance(x, np.ndarray) or x.dtype.hasobject or x.shape != shape:
        raise UserError(f'{path} is damaged: {name} is no array {list(shape)}')
    return x


def damaged(path: str, e: Exception) -> UserError:
    why = ' '.join(str(e).split())[:200] or type(e).__name__
    return UserError(f'{path} is no file of MATLAB, or damaged: {why}')
