"""CIFAR-10 and CIFAR-100 as they are published (Krizhevsky 2009): cifar:PATH of the archive, or of what was in it.

The binary and the Python version, cifar-10-binary.tar.gz, cifar-100-python.tar.gz, cifar-10-batches-py/. The labels of
CIFAR-100 are the fine ones; cifar:PATH?label=coarse takes the superclasses. The Python version is pickles, which are
programs: they are not run, see `unpickled`.
"""

from __future__ import annotations

import functools
import os
import pickletools
import re
import tarfile
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from jaxgen import files
from jaxgen.addresses import Address
from jaxgen.data import arrays
from jaxgen.data.records import Contents, open_file
from jaxgen.errors import UserError

PIXELS = 3 * 32 * 32
MOST = 2**30  # bytes in an archive; the published ones hold less than a fifth
# {name: split} of the files with images, in both versions, and of those with the names of classes.
FILES = {
    **{f'data_batch_{i}{end}': 'train' for i in range(1, 6) for end in ('', '.bin')},
    **{f'{name}{end}': name.removesuffix('_batch') for name in ('train', 'test', 'test_batch') for end in ('', '.bin')},
}
NAMES = {
    'batches.meta.txt': 'label',
    'fine_label_names.txt': 'label',
    'coarse_label_names.txt': 'coarse',
    'batches.meta': '',
    'meta': '',
}
CLASSES = {False: {'label': 10}, True: {'label': 100, 'coarse': 20}}  # of CIFAR-10, and of CIFAR-100
KEYS = {'label': ('fine_label_names', 'label_names'), 'coarse': ('coarse_label_names',)}


def read(address: Address, data) -> Contents:
    """The images and labels of an archive, a folder or a file."""
    path = address.path
    splits, names, paths, notes = load(path, *stamp(path))

    def stored(name: str, x: np.ndarray) -> arrays.Stored:
        return arrays.Stored(name, x.shape, x.dtype, lambda: x)

    options = {'layout': 'N(CHW)', 'size': '32x32', **address.options}
    named = {split: {name: stored(name, x) for name, x in one.items()} for split, one in splits.items()}
    return arrays.contents(address._replace(options=options), data, named, paths, notes=notes, class_names=names)


def stamp(path: str) -> tuple[int, ...]:
    """What changes when the files do."""
    parts = [path] if not os.path.isdir(path) else [file for _, file in sorted(files_of(path).items())]
    about = [os.stat(part) for part in parts]
    return tuple(n for one in about for n in files.version_of(one))


def files_of(path: str) -> dict[str, str]:
    """{name: path} of a folder's files, or of those in a folder within."""
    paths: dict[str, str] = {}
    for top, folders, names in os.walk(path):
        folders[:] = sorted(folders) if top == path else []
        for name in names:
            if name in FILES or name in NAMES:
                paths.setdefault(name, os.path.join(top, name))
    return paths


class Loaded(NamedTuple):
    splits: dict[str, dict[str, np.ndarray]]
    names: dict[str, tuple[str, ...]]
    paths: tuple[str, ...]
    notes: tuple[str, ...]


@functools.lru_cache(maxsize=2)
def load(path: str, *_: int) -> Loaded:
    """All of a set, in memory: 180 MB.

    Raises:
      UserError: it is none, or damaged.
    """
    parts, paths = contents_of(path)
    images = {name: part for name, part in parts.items() if name in FILES}
    if not images:
        raise UserError(f'{path} holds no batches of CIFAR: data_batch_1.bin, test_batch, train, ...')
    splits: dict[str, list[dict[str, np.ndarray]]] = {}
    for name in sorted(images):
        where = f'{name} in {path}' if len(paths) != 1 or paths[0] != path or len(parts) > 1 else path
        batch = binary(where, images[name], name) if name.endswith('.bin') else pickled(where, images[name])
        splits.setdefault(FILES[name], []).append(batch)
    if any(len({tuple(batch) for batch in batches}) > 1 for batches in splits.values()):
        raise UserError(f'{path} holds batches of CIFAR-10 and of CIFAR-100: name one of them')
    joined = {
        split: {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        for split, batches in splits.items()
    }
    for split, arrays_ in joined.items():
        for name, n in CLASSES['coarse' in arrays_].items():
            if name in arrays_ and arrays_[name].max(initial=0) >= n:
                raise UserError(f'{path} is damaged: labels of {split} are up to {arrays_[name].max()}, of {n} classes')
    return Loaded(joined, class_names(path, parts), paths, missing(images))


def missing(names: Collection[str]) -> tuple[str, ...]:
    """What is said of the batches of CIFAR-10 that are not there, where some are."""
    numbers = {name.removesuffix('.bin')[-1] for name in names if name.startswith('data_batch_')}
    lacking = sorted(set('12345') - numbers) if len(numbers) > 1 else []
    return (f'data_batch_{", ".join(lacking)}, which {"are" if lacking[1:] else "is"} not there',) if lacking else ()


def contents_of(path: str) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """({name: bytes} of the files of a set, the paths that they are read from)."""
    if os.path.isdir(path):
        paths = files_of(path)
        if sum(os.path.getsize(one) for one in paths.values()) > MOST:
            raise UserError(f'{path} holds more than the {MOST} bytes that CIFAR has')
        parts = {}
        for name, one in paths.items():
            with open_file(one) as file:
                parts[name] = file.read()
        return parts, tuple(sorted(paths.values()))
    with open_file(path) as file:
        start = file.read(6)
        file.seek(0)
        if not (start[:2] == b'\x1f\x8b' or start[:3] == b'BZh' or start == b'\xfd7zXZ\0' or is_tar(file)):
            if os.fstat(file.fileno()).st_size > MOST:
                raise UserError(f'{path} is larger than CIFAR')
            file.seek(0)
            name = os.path.basename(path)
            return {name if name in FILES else 'data_batch_1' + '.bin' * name.endswith('.bin'): file.read()}, (path,)
        file.seek(0)
        parts, total = {}, 0
        try:
            with tarfile.open(fileobj=file, mode='r|*') as archive:
                for member in archive:
                    total += 512 + member.size
                    if total > MOST:
                        raise UserError(f'{path} holds more than the {MOST} bytes that CIFAR has')
                    name = os.path.basename(member.name)
                    if member.isfile() and name not in parts and (name in FILES or name in NAMES):
                        parts[name] = archive.extractfile(member).read()
                        if len(parts[name]) != member.size:
                            raise UserError(f'{path} is damaged: {name} ends early')
        except UserError:
            raise
        except Exception as e:  # damaged archives raise errors of many kinds
            raise UserError(f'{path} is damaged: {" ".join(str(e).split())[:200] or type(e).__name__}') from e
        return parts, (path,)


def is_tar(file) -> bool:
    file.seek(257)
    return file.read(5) == b'ustar'


def binary(where: str, content: bytes, name: str) -> dict[str, np.ndarray]:
    """A batch of the binary version: of each image a label, two of CIFAR-100, and its red, green and blue pixels."""
    labels = ('coarse', 'label') if name.startswith('train') or name == 'test.bin' else ('label',)
    size = len(labels) + PIXELS
    if not content or len(content) % size:
        raise UserError(f'{where} is damaged: {len(content)} bytes are not a number of images with {size} bytes each')
    x = np.frombuffer(content, np.uint8).reshape(-1, size)
    return {'image': x[:, len(labels) :], **{label: x[:, k] for k, label in enumerate(labels)}}


def pickled(where: str, content: bytes) -> dict[str, np.ndarray]:
    """A batch of the Python version."""
    batch = dictionary(where, content)
    x, labels = batch.get('data'), batch.get('fine_labels', batch.get('labels'))
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.shape[1:] != (PIXELS,):
        raise UserError(f'{where} is no batch of CIFAR: it has no data, uint8 [n, {PIXELS}]')
    out = {'image': x, 'label': labels}
    out |= {'coarse': batch['coarse_labels']} if 'coarse_labels' in batch else {}
    for name in out:
        if name != 'image':
            if not isinstance(out[name], list) or len(out[name]) != len(x) or {type(y) for y in out[name]} != {int}:
                raise UserError(f'{where} is damaged: it has no {len(x)} labels')
            if not all(0 <= y < 256 for y in out[name]):
                raise UserError(f'{where} is damaged: it has labels that are no classes')
            out[name] = np.array(out[name], np.int64)
    return out


def dictionary(where: str, content: bytes) -> dict[str, Any]:
    try:
        value = unpickled(content)
        return {key.decode() if isinstance(key, bytes) else str(key): x for key, x in value.items()}
    except Exception as e:
        raise UserError(f'{where} is no batch of CIFAR, or damaged: {" ".join(str(e).split())[:200]}') from e


def class_names(path: str, parts: dict[str, bytes]) -> dict[str, tuple[str, ...]]:
    """{'label': names of the classes, 'coarse': of the superclasses}, as far as the set has them."""
    names = {}
    for file, content in parts.items():
        if NAMES.get(file):
            names[NAMES[file]] = tuple(content.decode('utf-8', 'replace').split())
        elif file in NAMES:
            about = dictionary(f'{file} in {path}', content)
            for label, keys in KEYS.items():
                for key in keys:
                    if isinstance(about.get(key), list):
                        names[label] = tuple(
                            x.decode('utf-8', 'replace') if isinstance(x, bytes) else str(x) for x in about[key]
                        )
    return names


# --- pickles


class Global(NamedTuple):
    """A function that a pickle names. It is not called."""

    name: str


class Pending:
    """An array or a type of numbers, before its state is known."""

    def __init__(self, kind: str, value: Any = None):
        self.kind, self.value = kind, value


MARK = object()
CONSTANTS = {
    'NONE': lambda: None,
    'NEWTRUE': lambda: True,
    'NEWFALSE': lambda: False,
    'EMPTY_DICT': dict,
    'EMPTY_LIST': list,
    'EMPTY_TUPLE': tuple,
    'MARK': lambda: MARK,
}
VALUES = (
    *('BININT', 'BININT1', 'BININT2', 'LONG1', 'INT', 'LONG', 'BINFLOAT'),
    *('SHORT_BINSTRING', 'BINSTRING', 'STRING', 'SHORT_BINBYTES', 'BINBYTES', 'BINBYTES8', 'BYTEARRAY8'),
    *('SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8', 'UNICODE'),
)
TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
# What NumPy's arrays, their types and, in old pickles, bytes are made of again.
RECONSTRUCT = re.compile(r'numpy\.(core|_core)\.multiarray _reconstruct')
FROM_BUFFER = re.compile(r'numpy\.(core|_core)\.numeric _frombuffer')
DTYPE, ARRAY, ENCODE = 'numpy dtype', 'numpy ndarray', '_codecs encode'


def unpickled(content: bytes) -> Any:
    """The dicts, lists, tuples, numbers, texts and arrays of numbers in a pickle. Its instructions are read as data:
    those that make arrays of NumPy have their meaning here, and there is nothing that calls anything else.

    Raises:
      ValueError: it has another instruction, or names another function.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop_mark() -> list[Any]:
        at = max(i for i, x in enumerate(stack) if x is MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    for opcode, arg, _ in pickletools.genops(content):
        name = opcode.name
        if name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name in VALUES:
            stack.append(arg.encode('latin-1') if name in ('SHORT_BINSTRING', 'BINSTRING', 'STRING') else arg)
        elif name in ('PROTO', 'FRAME'):
            pass
        elif name in ('BINPUT', 'LONG_BINPUT', 'PUT'):
            memo[arg] = stack[-1]
        elif name == 'MEMOIZE':
            memo[len(memo)] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET', 'GET'):
            stack.append(memo[arg])
        elif name == 'GLOBAL':
            stack.append(known(arg))
        elif name == 'STACK_GLOBAL':
            attribute, module = stack.pop(), stack.pop()
            stack.append(known(f'{module} {attribute}'))
        elif name in TUPLES:
            items = [stack.pop() for _ in range(TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name == 'TUPLE':
            items = pop_mark()
            stack.append(tuple(items))
        elif name in ('APPEND', 'APPENDS'):
            items = [stack.pop()] if name == 'APPEND' else pop_mark()
            stack[-1].extend(items)
        elif name in ('SETITEM', 'SETITEMS'):
            items = [stack.pop(-2), stack.pop()] if name == 'SETITEM' else pop_mark()
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == 'REDUCE':
            args = stack.pop()
            stack.append(made(stack.pop(), args))
        elif name == 'BUILD':
            state = stack.pop()
            build(stack[-1], state)
        elif name == 'STOP':
            return finished(stack.pop())
        else:
            raise ValueError(f'a pickle with the instruction {name} is not read')
    raise ValueError('it ends early')


def known(name: str) -> Global:
    """A function that pickles of arrays call.

    Raises:
      ValueError: it is any other.
    """
    if name in (DTYPE, ARRAY, ENCODE) or RECONSTRUCT.fullmatch(name) or FROM_BUFFER.fullmatch(name):
        return Global(name)
    raise ValueError(f'a pickle that calls {name[:100]!r} is not run')


def made(function: Any, args: Any) -> Any:
    """What a call in a pickle of arrays stands for."""
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise ValueError('a pickle that calls a value is not run')
    if RECONSTRUCT.fullmatch(function.name):
        return Pending('array')
    if FROM_BUFFER.fullmatch(function.name):
        content, dtype, shape, order = args
        return np.frombuffer(content, dtype.value).reshape(tuple(map(int, shape)), order='F' if order == 'F' else 'C')
    if function.name == DTYPE:
        text = args[0].decode() if isinstance(args[0], bytes) else args[0]
        if not re.fullmatch('[biufc][0-9]{1,2}', text):
            raise ValueError(f'an array of {text!r} is not read')
        return Pending('dtype', np.dtype(text))
    if function.name == ENCODE and args[1:] == ('latin1',):  # bytes in pickles of protocol 2
        return args[0].encode('latin-1')
    raise ValueError(f'a pickle that calls {function.name!r} is not run')


def build(target: Any, state: Any) -> None:
    """Gives an array or a type its state."""
    if not isinstance(target, Pending) or not isinstance(state, tuple):
        raise ValueError('a pickle of objects is not read')
    if target.kind == 'dtype':
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        target.value = target.value.newbyteorder(order if order in '<>' else '=')
        return
    _, shape, dtype, fortran, content = state
    x = np.frombuffer(content, dtype.value)
    target.value = x.reshape(tuple(map(int, shape)), order='F' if fortran else 'C')


def finished(value: Any) -> Any:
    """A dict of the pickle with its arrays in place."""
    if not isinstance(value, dict) or any(isinstance(x, Global) for x in value.values()):
        raise ValueError('it holds no dictionary of values')
    return {key: x.value if isinstance(x, Pending) else x for key, x in value.items()}
