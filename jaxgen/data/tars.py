"""Tar files, read in place: tar:PATTERN, of folders of images or the shards of a WebDataset.

    tar:/data/shard-{000000..000099}.tar    all of these, in order
    tar:/data/train-*.tar                   all that there are, by name
    tar:/data                               all .tar files in a folder; train-*.tar and test-*.tar are splits

A tar has no list of its files (POSIX.1-2017, pax, "ustar Interchange Format"), so the headers are read once, one for
each file, and what they say is kept beside the prepared sets. Files are then read by their offsets.
"""

from __future__ import annotations

import contextlib
import glob
import io
import itertools
import json
import os
import re
from array import array
from collections import Counter
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from jaxgen import files
from jaxgen.addresses import Address
from jaxgen.data import archives, guard, trees
from jaxgen.data.records import Contents, file_digest, open_file, root, text_digest
from jaxgen.errors import UserError

BLOCK = 512
MOST_SHARDS = 100_000
MOST_NAME = 2**16  # bytes
INDICES = 'jaxgen_indices'  # in the directory of prepared sets
VERSION = 2  # of a kept index
PACKED = {b'\x1f\x8b': 'gunzip', b'BZ': 'bunzip2', b'\xfd7': 'unxz', b'(\xb5': 'unzstd'}
RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}')
SPLIT = re.compile(r'(?:.*[-_.])?(train|training|test|testing|val|valid|validation)(?:[-_.].*)?\.tar', re.IGNORECASE)


class Index(NamedTuple):
    """The regular files in one tar."""

    names: trees.Names
    offsets: np.ndarray  # int64, of their bytes
    sizes: np.ndarray  # int64
    notes: dict[str, int]  # what is left out, by reason


def read(address: Address, data) -> Contents:
    """The images of all shards, their classes and captions, see archives.py."""
    archives.check_options(address)
    paths = shards(address.path, '*.tar')
    directory = root(data)
    indices = [
        index(path, directory, bool(data['dir']))
        for path in tqdm(paths, desc=f'listing {address.path}', disable=None, leave=False, delay=2)
    ]
    shard = np.repeat(np.arange(len(paths)), [len(one.names) for one in indices])
    offsets, sizes = (np.concatenate([getattr(one, f) for one in indices]) for f in ('offsets', 'sizes'))
    names = trees.Names.of(itertools.chain.from_iterable(in_split(paths, indices)))
    notes = sum((Counter(one.notes) for one in indices), Counter())

    def file(i: int, most: int) -> bytes:
        size = int(sizes[i])
        if size > most:
            raise ValueError(f'it has {size} bytes, more than the {most} that are read')
        handle = os.open(paths[shard[i]], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            content = os.pread(handle, size, int(offsets[i]))
        finally:
            os.close(handle)
        if len(content) != size:
            raise ValueError('it is cut off')
        return content

    entries = archives.Entries(
        names, sizes, file, tuple(f'{n} {what}' for what, n in notes.items()), shard if len(paths) > 1 else None
    )

    def digest() -> str:
        bar = tqdm(paths, desc=f'reading {address.path}', disable=None, leave=False, delay=2)
        digests = [file_digest(path, directory, bool(data['dir'])) for path in bar]
        return text_digest(archives.sizes_digest(names, sizes), *sorted(digests))

    return archives.contents(address.path, entries, data, 'tar 1', digest, tuple(paths))


def in_split(paths: list[str], indices: list[Index]):
    """The names in each shard, below a folder with the name of the split where all shards are named after theirs."""
    matches = [SPLIT.fullmatch(os.path.basename(path)) for path in paths]
    words = [match[1].lower() if match else '' for match in matches]
    apart = all(words) and len(set(words)) > 1
    for word, one in zip(words, indices, strict=True):
        yield (f'{word}/{name}' for name in one.names) if apart else one.names


def shards(pattern: str, inside: str) -> list[str]:
    """The paths that a folder, a name or a pattern of names stands for: {000..099}, {a,b}, *, ? and [abc]. Of a folder
    the files whose names are like `inside`.

    Raises:
      UserError: there is none, or no file of a name that is spelled out.
    """
    if os.path.isfile(pattern):
        return [pattern]
    if os.path.isdir(pattern):
        paths = sorted(glob.glob(os.path.join(glob.escape(pattern), inside)))
        if not paths:
            raise UserError(f'config.data.source: the folder {pattern} holds no files {inside}')
        return paths
    paths = []
    for name in spelled(pattern):
        if '..' in name.split('/'):  # it would lead out of the folder that a pattern seems to name: of a stranger's run
            raise UserError(f'config.data.source: {pattern}: a pattern must not stand for ..')
        some = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not some or not os.path.exists(some[0]):
            raise UserError(f'config.data.source: {name} does not exist')
        paths += some
        if len(paths) > MOST_SHARDS:
            raise UserError(f'config.data.source: {pattern} are more than {MOST_SHARDS} files')
    return paths


def spelled(pattern: str) -> list[str]:
    """Names by a pattern with {000..099} and {a,b}, in order."""
    match = RANGE.search(pattern)
    if not match:
        return [pattern]
    if match[3] is not None:
        parts = match[3].split(',')
    else:
        first, last = int(match[1]), int(match[2])
        if abs(last - first) >= MOST_SHARDS:
            raise UserError(f'config.data.source: {pattern} are more than {MOST_SHARDS} files')
        step = 1 if last >= first else -1
        parts = [str(i).zfill(len(match[1])) for i in range(first, last + step, step)]
    rest = spelled(pattern[match.end() :])
    if len(parts) * len(rest) > MOST_SHARDS:
        raise UserError(f'config.data.source: {pattern} are more than {MOST_SHARDS} files')
    return [pattern[: match.start()] + part + end for part in parts for end in rest]


# --- the index


def index(path: str, directory: str, confined: bool) -> Index:
    """What lies in a tar, from `directory` where it is known there.

    Raises:
      UserError: it is no tar, is packed, or cannot be read.
    """
    with open_file(path) as file:
        about = os.fstat(file.fileno())
        key = text_digest(os.path.realpath(path), *map(str, files.version_of(about)))
        kept = os.path.join(directory, INDICES, f'{key}.tar_index')
        if (known := load_index(kept, about.st_size)) is not None:
            return known
        made = scan(file.fileno(), about.st_size, path)
    with contextlib.suppress(OSError, UserError):  # a directory that cannot be written to is no fault of the data
        if confined:
            guard.check_inside(directory, os.path.dirname(kept))
        with files.replacing(kept) as new:
            save_index(new, made)
    return made


def save_index(file, made: Index) -> None:
    head = {'version': VERSION, 'n': len(made.names), 'block': len(made.names.block), 'notes': made.notes}
    file.write(json.dumps(head).encode() + b'\n' + made.names.block)
    for x in (made.names.ends, made.offsets, made.sizes):
        file.write(x.astype('<i8').tobytes())


def load_index(path: str, length: int) -> Index | None:
    """The index that `save_index` has written of a tar of `length` bytes, None where there is none."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            line = file.readline(MOST_NAME)
            head = json.loads(line)
            n, block = head['n'], head['block']
            if head['version'] != VERSION or not all(type(x) is int and x >= 0 for x in (n, block)):
                return None
            if size != len(line) + block + 24 * n:
                return None
            content = file.read(block)
            ends, offsets, sizes = np.frombuffer(file.read(24 * n), '<i8').reshape(3, n)
            notes = {str(what): int(count) for what, count in head['notes'].items()}
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    valid = not n or (
        (np.diff(ends, prepend=0) >= 0).all() and ends[-1] == block and (offsets >= 0).all() and (sizes >= 0).all()
    )
    if not valid or (offsets > length).any() or (sizes > length).any():
        return None
    return Index(trees.Names(content, ends), offsets, sizes, notes)


def scan(handle: int, length: int, path: str) -> Index:
    """Reads the headers of a tar, one after the other.

    Raises:
      UserError: it is no tar, packed, or damaged.
    """
    block, ends, offsets, sizes = bytearray(), array('q'), array('q'), array('q')
    notes: Counter = Counter()
    start = os.pread(handle, 4, 0)
    for magic, program in PACKED.items():
        if start.startswith(magic):
            raise UserError(
                f'{path} is packed, so its files cannot be read by number: unpack it once, {program} {path}'
            )
    by_name: dict[bytes, int] = {}
    at, name, long_size = 0, None, None
    while True:
        header = os.pread(handle, BLOCK, at)
        if not header.strip(b'\0'):  # the end, or a file that is cut off between two files
            if at == 0 and length:
                raise UserError(f'{path} is no tar file')
            break
        if len(header) < BLOCK or not sound(header):
            what = f'it is damaged at byte {at}' if at else 'it is no tar file'
            raise UserError(f'{path}: {what}')
        size = number(header[124:136])
        kind, at = header[156:157], at + BLOCK
        if size is None:
            raise UserError(f'{path}: it is damaged at byte {at - BLOCK}')
        if kind in (b'x', b'g', b'L', b'K'):
            content = os.pread(handle, min(size, MOST_NAME), at) if kind in (b'x', b'L') else b''
            if kind == b'L':
                name = content.rstrip(b'\0')
            elif kind == b'x':
                fields = extended(content)
                name = fields.get(b'path', name)
                if re.fullmatch(rb'[0-9]{1,18}', fields.get(b'size', b'')):
                    long_size = int(fields[b'size'])
            at += -(-size // BLOCK) * BLOCK
            continue
        size = size if long_size is None else long_size
        if kind in (b'0', b'\0', b'7'):
            if at + size > length:
                notes['files that are cut off'] += 1
                break
            prefix = header[345:500].split(b'\0', 1)[0] if header[257:263] == b'ustar\0' else b''
            own = header[:100].split(b'\0', 1)[0]
            full = name if name is not None else prefix + b'/' + own if prefix else own
            full = trees.inside(full)
            if full in by_name:
                notes[archives.REPLACED] += 1
                offsets[by_name[full]], sizes[by_name[full]] = at, size
            elif full and not full.endswith(b'/'):
                by_name[full] = len(ends)
                block += full
                ends.append(len(block))
                offsets.append(at)
                sizes.append(size)
        elif kind != b'5':
            notes['that are no regular files (links, pipes, devices)'] += 1
            size = 0 if kind in (b'1', b'2', b'3', b'4', b'6') else size
        at += -(-size // BLOCK) * BLOCK
        name = long_size = None
    columns = (trees.column(x) for x in (ends, offsets, sizes))
    ends_, offsets_, sizes_ = columns
    return Index(trees.Names(bytes(block), ends_), offsets_, sizes_, dict(notes))


def sound(header: bytes) -> bool:
    """Whether a header has its checksum, in which its own field counts as blanks."""
    expected = number(header[148:156])
    return expected is not None and expected == sum(header) - sum(header[148:156]) + 8 * 32


def number(field: bytes) -> int | None:
    """A number in octal digits, or in base 256 as GNU's tar has large ones; None where it is none."""
    if field[0] & 0x80:
        value = int.from_bytes(field, 'big') - (0x80 << 8 * (len(field) - 1))
        return value if 0 <= value < 2**62 else None
    text = field.strip(b' \0')
    try:
        return int(text, 8) if text else 0
    except ValueError:
        return None


def extended(content: bytes) -> dict[bytes, bytes]:
    """The fields of a pax header: 'LENGTH NAME=VALUE' and a new line, the length in bytes of all of it."""
    fields, file = {}, io.BytesIO(content)
    while match := re.match(rb'([0-9]{1,8}) ([^=]+)=', content[file.tell() : file.tell() + MOST_NAME]):
        length = int(match[1])
        record = file.read(length)
        if len(record) < length or length <= match.end():
            break
        fields[match[2]] = record[match.end() : -1]
    return fields
