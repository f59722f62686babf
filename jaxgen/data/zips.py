"""Zip files, read in place: zip:FILE, of folders of images, or EDM's and StyleGAN's dataset.zip.

The list of files is at the end of a zip (PKWARE, APPNOTE.TXT 6.3.10, sections 4.3 to 4.5). It is read at the start and
kept as arrays; a file is then read by its offset and unpacked in memory, to the size that the list declares and no
further, and held to its checksum.
"""

from __future__ import annotations

import os
import struct
import weakref
import zlib
from array import array
from collections import Counter

import numpy as np

from jaxgen.addresses import Address
from jaxgen.data import archives, trees
from jaxgen.data.records import Contents, open_file
from jaxgen.errors import UserError

END = struct.Struct('<4s4H2LH')  # of the list, and of the file but for a comment
LOCATOR = struct.Struct('<4sLQL')  # of the following
END64 = struct.Struct('<4sQ2H2L4Q')
ENTRY = struct.Struct('<4s6H3L5H2L')
LOCAL = struct.Struct('<4s5H3L2H')  # before a file's bytes
STORED, DEFLATED = 0, 8
METHODS = {9: 'Deflate64', 12: 'bzip2', 14: 'LZMA', 93: 'Zstandard', 95: 'xz', 99: 'AES'}
MOST_LIST = 2**31  # bytes of the list of files: that of 20 million
LINK = 0o120000


def read(address: Address, data) -> Contents:
    """A zip's images, classes and captions, see archives.py."""
    archives.check_options(address)
    archive = Zip(address.path)
    digest = lambda: archives.sizes_digest(archive.names, archive.sizes, archive.checksums)  # noqa: E731
    entries = archives.Entries(archive.names, archive.sizes, archive.file, archive.notes)
    return archives.contents(address.path, entries, data, 'zip 1', digest, (address.path,))


class Zip:
    """The files in a zip by number. Stays open, so that another file in its place changes nothing.

    Raises:
      UserError: it is no zip, damaged, or its files are encrypted or packed in a form that is not read.
    """

    def __init__(self, path: str):
        self.path = path
        with open_file(path) as file:
            self.handle = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.handle)
        names, offsets, packed, sizes, checksums, methods = (
            [],
            array('Q'),
            array('Q'),
            array('q'),
            array('L'),
            array('H'),
        )
        counts: Counter = Counter()
        by_name: dict[str, int] = {}
        for name, entry in self.listed():
            flags, method, external = entry['flags'], entry['method'], entry['external']
            if name.endswith('/') or external & 0x10:
                continue
            if (external >> 16) & 0o170000 == LINK:
                counts['links'] += 1
                continue
            if flags & 1:
                raise UserError(f'{path}: {name!a} is encrypted: unpack it, and name the folder by folder:PATH')
            if method not in (STORED, DEFLATED):
                what = METHODS.get(method, f'method {method}')
                raise UserError(f'{path}: {name!a} is packed by {what}: pack it by Deflate, as zip does, or store it')
            if name in by_name:
                counts[archives.REPLACED] += 1
                at = by_name[name]
            else:
                at = by_name[name] = len(names)
                names.append(name)
                for one in (offsets, packed, sizes, checksums, methods):
                    one.append(0)
            offsets[at], packed[at], sizes[at] = entry['offset'], entry['packed'], entry['size']
            checksums[at], methods[at] = entry['checksum'], method
        self.names = trees.Names.of(names)
        self.offsets, self.packed, self.checksums, self.methods = map(np.array, (offsets, packed, checksums, methods))
        self.sizes = np.array(sizes, np.int64)
        self.notes = tuple(f'{n} {what}' for what, n in counts.items())

    def damaged(self, why: str) -> UserError:
        return UserError(f'{self.path} is no whole zip file: {why}')

    def listed(self):
        """(name, what the list says of it), one after the other."""
        length = os.fstat(self.handle).st_size
        tail_at = max(0, length - END.size - 2**16)
        tail = os.pread(self.handle, length - tail_at, tail_at)
        at = tail.rfind(b'PK\5\6')
        while at >= 0 and at + END.size + int.from_bytes(tail[at + 20 : at + 22], 'little') != len(tail):
            at = tail.rfind(b'PK\5\6', 0, at)  # what was found is part of a comment
        if at < 0:
            packed = os.pread(self.handle, 2, 0) == b'\x1f\x8b'
            raise self.damaged('it is a gzipped file' if packed else 'its end is not there')
        _, disk, first, here, n, size, offset, _ = END.unpack_from(tail, at)
        end_at = tail_at + at
        locator = os.pread(self.handle, LOCATOR.size, max(0, end_at - LOCATOR.size))
        if locator[:4] == b'PK\6\7':
            # Before it as a rule, whatever lies before the archive; else where it says.
            for place in (end_at - LOCATOR.size - END64.size, LOCATOR.unpack(locator)[2]):
                end64 = os.pread(self.handle, END64.size, place) if 0 <= place < length else b''
                if len(end64) == END64.size and end64[:4] == b'PK\6\6':
                    end_at = place
                    break
            else:
                raise self.damaged('its end is damaged')
            _, _, _, _, disk, first, here, n, size, offset = END64.unpack(end64)
        if disk or first or here != n:
            raise self.damaged('it is one of several parts')
        if size > min(end_at, MOST_LIST):
            raise self.damaged('its list of files is damaged')
        self.start = end_at - size - offset  # of the archive in the file, behind a program that unpacks it, say
        if self.start < 0:
            raise self.damaged('its beginning is missing')
        listed = os.pread(self.handle, size, end_at - size)
        at = 0
        for _ in range(n):
            if len(listed) - at < ENTRY.size or listed[at : at + 4] != b'PK\1\2':
                raise self.damaged('its list of files is damaged')
            _, _, _, flags, method, _, _, checksum, packed, unpacked, *lengths, _, _, external, begin = (
                ENTRY.unpack_from(listed, at)
            )
            name_length, extra_length, comment_length = lengths
            at += ENTRY.size
            name = listed[at : at + name_length]
            extra = listed[at + name_length : at + name_length + extra_length]
            at += name_length + extra_length + comment_length
            if 0xFFFFFFFF in (packed, unpacked, begin):
                unpacked, packed, begin = self.long(extra, unpacked, packed, begin)
            if max(unpacked, packed, begin) >= 2**62:
                raise self.damaged('its list of files is damaged')
            name = trees.inside(name.replace(b'\\', b'/'))
            text = name.decode('utf-8' if flags & 0x800 else 'cp437', 'surrogateescape')
            yield (
                text,
                {
                    'flags': flags,
                    'method': method,
                    'checksum': checksum,
                    'packed': packed,
                    'size': unpacked,
                    'external': external,
                    'offset': begin,
                },
            )

    def long(self, extra: bytes, *values: int) -> list[int]:
        """Numbers that do not fit into 32 bits, from a file's field of them."""
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from('<2H', extra, at)
            if kind == 1:
                field = extra[at + 4 : at + 4 + length]
                longs = iter(struct.unpack(f'<{len(field) // 8}Q', field[: len(field) // 8 * 8]))
                numbers = [next(longs, -1) if value == 0xFFFFFFFF else value for value in values]
                if -1 not in numbers:
                    return numbers
            at += 4 + length
        raise self.damaged('its list of files is damaged')

    def file(self, i: int, most: int) -> bytes:
        """The bytes of file i.

        Raises:
          ValueError: it is damaged, or has more than `most`.
        """
        size, packed = int(self.sizes[i]), int(self.packed[i])
        if size > most:
            raise ValueError(f'it has {size} bytes, more than the {most} that are read')
        if packed > size + size // 1000 + 1000:
            raise ValueError('it is damaged: packed it has more bytes than unpacked')
        at = self.start + int(self.offsets[i])
        header = os.pread(self.handle, LOCAL.size, at)
        if len(header) < LOCAL.size or header[:4] != b'PK\3\4':
            raise ValueError('it is damaged: there is no file where the list has it')
        *_, name_length, extra_length = LOCAL.unpack(header)
        content = os.pread(self.handle, packed, at + LOCAL.size + name_length + extra_length)
        if self.methods[i] == DEFLATED:
            try:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
            except zlib.error as e:
                raise ValueError(f'it is damaged: {e}') from e
        if len(content) != size or zlib.crc32(content) != int(self.checksums[i]):
            raise ValueError('it is damaged: its checksum is another')
        return content
