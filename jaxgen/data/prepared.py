"""Prepared sets: arrays that were computed once of each training image, on disk, read by the example's number.

A set is a directory ROOT/KEY of files, each with the arrays of some examples that follow each other, `about.json` for
people, and a lock that its readers share. What lies where in a file follows from the `Layout`, which is computed, and
never from a file: a file is 32 bytes, the SHA-256 of all that follows, and for each array by name [examples, views,
...], or [examples, 1, ...] where all views have one value. Files are written whole or not at all, so several processes
may make one set together, and what was stopped goes on with the files that are missing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import math
import os
import re
import shutil
import time
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxgen import files, locks
from jaxgen.errors import RunError

DIGEST = 32  # bytes of SHA-256 before a file's arrays
MOST_FILES = 256  # of a set: each stays open in every process that reads it
LARGE = 2**26  # bytes of a file, about, where that makes no more files than these
MOST_EXAMPLES = 8192  # in a file, likewise: what is lost where making one is stopped
ABOUT, LOCK = 'about.json', 'lock'
VERIFIED = 2**30  # bytes of a set that is read once at the start to verify it; larger ones are as they are first used


class Feature(NamedTuple):
    """One array of an example."""

    shape: tuple[int, ...]
    dtype: Any
    by_view: bool  # whether it depends on the view

    @property
    def nbytes(self) -> int:
        """Of one view."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Layout(NamedTuple):
    """What a set holds, and where."""

    examples: int
    views: int
    features: dict[str, Feature]

    def views_of(self, name: str) -> int:
        return self.views if self.features[name].by_view else 1

    @property
    def example_bytes(self) -> int:
        return sum(self.views_of(name) * f.nbytes for name, f in self.features.items())

    @property
    def nbytes(self) -> int:
        """Of the whole set."""
        return self.examples * self.example_bytes + DIGEST * self.files

    @property
    def each(self) -> int:
        """Examples of a file; the last one may have fewer."""
        usual = min(LARGE // max(self.example_bytes, 1), MOST_EXAMPLES)
        return max(usual, math.ceil(self.examples / MOST_FILES), 1)

    @property
    def files(self) -> int:
        return math.ceil(self.examples / self.each)

    def examples_of(self, file: int) -> range:
        """Numbers of the examples in a file."""
        return range(file * self.each, min((file + 1) * self.each, self.examples))

    def size(self, file: int) -> int:
        """Bytes of a file."""
        return DIGEST + len(self.examples_of(file)) * self.example_bytes

    def offsets(self, file: int) -> dict[str, int]:
        """Where each array begins in a file."""
        n, offset, out = len(self.examples_of(file)), DIGEST, {}
        for name in sorted(self.features):
            out[name] = offset
            offset += n * self.views_of(name) * self.features[name].nbytes
        return out


def file_path(directory: str, file: int) -> str:
    return os.path.join(directory, f'{file:05d}.features')


def digest_of(file) -> bytes:
    """SHA-256 of all behind the digest in an open file."""
    file.seek(DIGEST)
    sha = hashlib.sha256()
    while block := file.read(2**22):
        sha.update(block)
    return sha.digest()


def missing(directory: str, layout: Layout) -> list[int]:
    """Files of a set that are not there, or not of their size; where the set is small, also damaged ones."""
    out = []
    for file in range(layout.files):
        try:
            with open_regular(file_path(directory, file)) as stored:
                whole = os.fstat(stored.fileno()).st_size == layout.size(file)
                if whole and layout.nbytes <= VERIFIED:
                    whole = stored.read(DIGEST) == digest_of(stored)
        except OSError:
            whole = False
        out += [] if whole else [file]
    return out


def open_regular(path: str):
    """A file, open for reading; no link is followed, and no pipe waited for."""
    return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), 'rb')


def write(directory: str, layout: Layout, file: int, pieces: Iterable[tuple[int, dict[str, np.ndarray]]]) -> None:
    """Writes a file of a set, whole or not at all.

    Args:
      pieces: (first row, {name: [rows, ...]}), a row for each view of each of the file's examples, in order; of arrays
        that do not depend on the view, the rows of view 0 are kept.

    Raises:
      OSError: the disk is full, say.
    """
    offsets = layout.offsets(file)
    with files.replacing(file_path(directory, file)) as new:
        for start, arrays in pieces:
            for name, feature in layout.features.items():
                values = np.ascontiguousarray(arrays[name], feature.dtype)
                first = start
                if not feature.by_view:
                    rows = np.arange(start, start + len(values))
                    values, first = values[rows % layout.views == 0], -(-start // layout.views)
                new.seek(offsets[name] + first * feature.nbytes)
                new.write(values.tobytes())
        new.flush()
        if os.fstat(new.fileno()).st_size != layout.size(file):
            raise RunError(f'{directory}: a file of prepared features came out at another size than expected')
        digest = digest_of(new)
        new.seek(0)
        new.write(digest)
        new.flush()
        os.fsync(new.fileno())


class PreparedSet:
    """A whole set, open. `take` may be called from several threads, and the set be sent to other processes, which open
    it themselves."""

    def __init__(self, directory: str, layout: Layout, lock: int | None = None):
        """lock: of `set_lock`, which is held as long as there is this object."""
        self.directory, self.layout = directory, layout
        if lock is not None:
            weakref.finalize(self, os.close, lock)
        self.opened = [self.open_file(file) for file in range(layout.files)]
        self.verified: set[int] = set()

    def __reduce__(self):
        return PreparedSet, (self.directory, self.layout)

    def open_file(self, file: int) -> int:
        """The descriptor of a file.

        Raises:
          RunError: it is not there, or not of its size.
        """
        try:
            with open_regular(file_path(self.directory, file)) as stored:
                if os.fstat(stored.fileno()).st_size != self.layout.size(file):
                    raise self.damaged(file)
                descriptor = os.dup(stored.fileno())
        except OSError as e:
            raise self.unreadable(file, e) from e
        weakref.finalize(self, os.close, descriptor).atexit = False  # threads may still read then
        return descriptor

    def read(self, file: int, offset: int, out: memoryview) -> None:
        """Reads bytes of a file; by position, since a page of a mapped file that is gone ends the process.

        Raises:
          RunError: it has been cut off, or cannot be read.
        """
        while len(out):  # some file systems read less than the whole
            try:
                part = os.pread(self.opened[file], len(out), offset)
            except OSError as e:
                raise self.unreadable(file, e) from e
            if not part:
                raise self.damaged(file)
            out[: len(part)] = part
            out, offset = out[len(part) :], offset + len(part)

    def unreadable(self, file: int, e: OSError) -> RunError:
        return RunError(
            f'{file_path(self.directory, file)} cannot be read ({e.strerror}): the same command makes it anew'
        )

    def damaged(self, file: int) -> RunError:
        """The error of a damaged file, which is removed, so that it is made anew."""
        path = file_path(self.directory, file)
        with contextlib.suppress(OSError):
            os.remove(path)
        return RunError(f'{path} was damaged, and has been removed: the same command makes it anew and goes on')

    @functools.cached_property
    def identity(self) -> str:
        """64 hexadecimal digits, the same for the same values."""
        return hashlib.sha256(b''.join(map(self.digest, range(self.layout.files)))).hexdigest()

    def digest(self, file: int) -> bytes:
        out = bytearray(DIGEST)
        self.read(file, 0, memoryview(out))
        return bytes(out)

    def verify(self, file: int) -> None:
        """Raises RunError where a file's values are not those that were written; it is read whole once a process."""
        if file not in self.verified:
            sha, size, block = hashlib.sha256(), self.layout.size(file), memoryview(bytearray(2**22))
            for start in range(DIGEST, size, len(block)):
                part = block[: size - start]
                self.read(file, start, part)
                sha.update(part)
            if sha.digest() != self.digest(file):
                raise self.damaged(file)
            self.verified.add(file)

    def take(self, indices: np.ndarray, view: np.ndarray) -> dict[str, np.ndarray]:
        """{name: [n, ...]} of the examples [n] in these views [n], fresh arrays."""
        layout, which = self.layout, (indices // self.layout.each).tolist()
        for file in set(which):
            self.verify(file)
        out = {}
        for name, feature in layout.features.items():
            out[name] = np.empty((len(indices), *feature.shape), feature.dtype)
            rows = out[name].reshape(len(indices), math.prod(feature.shape)).view(np.uint8)
            views = layout.views_of(name)
            offsets = {file: layout.offsets(file)[name] for file in set(which)}
            for k, (file, i, v) in enumerate(zip(which, indices.tolist(), view.tolist(), strict=True)):
                row = (i - file * layout.each) * views + (v if feature.by_view else 0)
                self.read(file, offsets[file] + row * feature.nbytes, memoryview(rows[k]))
        return out


# --- the directory of all sets


NAME = re.compile('[0-9a-f]{32}')  # of a set's directory


def open_lock(directory: str) -> int:
    """The descriptor of a set's lock."""
    return os.open(os.path.join(directory, LOCK), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def set_lock(directory: str) -> int:
    """The lock of a set, whose directory is made where it is not there: a descriptor, until which is closed no process
    removes it.

    Raises:
      OSError: the directory cannot be made.
    """
    for _ in range(100):
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process removed it in between
            lock = open_lock(directory)
            with contextlib.suppress(OSError):  # also where the file system has no locks
                locks.hold(lock, wait=True, shared=True)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(os.path.join(directory, LOCK))):
                    os.utime(directory)  # the least recently used go first
                    return lock
            os.close(lock)
    raise OSError(errno.EBUSY, 'it is removed again and again', directory)


def remove_leftovers(directory: str) -> None:
    """Removes the unfinished files of processes that were killed, a day ago or more."""
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another process has removed it
                if entry.name.endswith('.new') and entry.stat(follow_symlinks=False).st_mtime < time.time() - 86400:
                    os.remove(entry.path)


def size_of(directory: str) -> int:
    """Bytes of the files in a directory."""
    with os.scandir(directory) as entries:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)


def make_room(root: str, keep: str, most: int) -> int:
    """Removes the least recently used sets of `root` until the others take at most so many bytes; the bytes that those
    take that are left, which other processes read.

    keep: the name of a set that is neither removed nor counted.
    """
    sets = []
    for entry in os.scandir(root):
        if entry.is_dir(follow_symlinks=False) and NAME.fullmatch(entry.name) and entry.name != keep:
            with contextlib.suppress(OSError):  # another process has removed it
                sets.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.path, size_of(entry.path)))
    total = sum(size for _, _, size in sets)
    for _, directory, size in sorted(sets):
        if total <= most:
            break
        with contextlib.suppress(OSError):
            lock = open_lock(directory)
            try:
                locks.hold(lock)
                shutil.rmtree(directory)
                total -= size
            finally:
                os.close(lock)
    return total
