"""Decoded images on disk, so that the next process need not decode them: in the person's cache directory, bounded.

    store = open_store('text that says what is kept', n=60_000, size=785, most=4096)
    known = store.read(np.array([5, 7]), rows)  # bool [2]; rows uint8 [2, size + DIGEST]
    store.write(np.array([7]), rows[1:])

A file has a place for every example of a set, behind each of which stands a digest of what is there, of its number and
of what is kept. A place that was written in part, or damaged, is one that was never written. So several processes and
hosts may read and write one file without a lock, no entry needs to be complete, and an example is there from its first
decoding on. Files are read by position and not mapped into memory: a page of a mapped file that cannot be read ends the
process.

As with compiled programs no directory is used that others can write to, since nobody else is to choose what a run is
trained on, and the least recently used files go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import weakref

import numpy as np

from jaxgen import files, log

ENDING = '.images'
DIGEST = 8  # bytes behind each example
announced: set[str] = set()  # lines that this process has written


class Store:
    """The file of one set."""

    def __init__(self, file: int, key: bytes, n: int, size: int, writable: bool):
        self.file, self.key, self.size, self.writable = file, key, size, writable
        self.verified = np.zeros(n, bool)  # places whose digest this process has looked at
        weakref.finalize(self, os.close, file).atexit = False  # threads may still read then

    def digest(self, i: int, content) -> bytes:
        return hashlib.blake2b(content, digest_size=DIGEST, key=self.key, salt=i.to_bytes(8, 'little')).digest()

    def read(self, numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Reads examples [n] into `rows`, uint8 [n, size + DIGEST]; which of them are there, bool [n]."""
        length, kept = self.size + DIGEST, np.zeros(len(numbers), bool)
        for k, i in enumerate(numbers.tolist()):
            row = memoryview(rows[k])
            try:
                whole = os.preadv(self.file, [row], i * length) == length
            except OSError:
                continue
            if whole and not self.verified[i]:
                self.verified[i] = row[self.size :] == self.digest(i, row[: self.size])
            kept[k] = whole and self.verified[i]
        return kept

    def write(self, numbers: np.ndarray, rows: np.ndarray) -> None:
        """Keeps examples, as they are in `rows`. What cannot be written is not kept."""
        length = self.size + DIGEST
        for k, i in enumerate(numbers.tolist()):
            if not self.writable:
                return
            row = memoryview(rows[k])
            row[self.size :] = self.digest(i, row[: self.size])
            try:
                os.pwrite(self.file, row, i * length)
            except OSError as e:
                self.writable = False
                say(f'decoded images are not kept any more: {e.strerror}')


def length(n: int, size: int) -> int:
    """Bytes of the file for `n` examples of `size` bytes."""
    return n * (size + DIGEST)


def say(line: str) -> None:
    """Writes a line on stderr, once."""
    if line not in announced:
        announced.add(line)
        log.say(line)


def open_store(what: str, n: int, size: int, most: int) -> Store | None:
    """The file for `n` examples of `size` bytes, made if it is not there; None where nothing is kept.

    Args:
      what: a text that is another one wherever an example may be another one.
      most: megabytes of all files together.
    """
    if not hasattr(os, 'preadv') or not hasattr(os, 'geteuid'):
        return None
    key = hashlib.sha256(f'{what} {n} {size}'.encode('utf-8', 'surrogateescape')).digest()
    whole, directory = length(n, size), files.cache_directory('images')
    try:
        files.make_private(directory)
        directory = os.path.realpath(directory)  # a link may be replaced
        if problem := files.distrusted(directory):
            say(f'WARNING: decoded images are not kept: {problem}; config.data.disk_mb = 0 keeps none')
            return None
        path = os.path.join(directory, key.hex()[:32] + ENDING)
        if not os.path.lexists(path) and not make_room(directory, whole, most):
            return None
        file, writable = opened(path)
    except OSError:
        return None
    try:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise OSError
        if writable:
            if about.st_size != whole:  # it is new, or what a full disk has left
                os.ftruncate(file, whole)
            os.utime(file)
    except OSError:
        os.close(file)
        return None
    return Store(file, key, n, size, writable)


def opened(path: str) -> tuple[int, bool]:
    """(the open file, whether it can be written)."""
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600), True
    except OSError:  # a directory of which one may only read, perhaps
        return os.open(path, os.O_RDONLY | flags), False


def make_room(directory: str, length: int, most: int) -> bool:
    """Removes the least recently used files until another of so many bytes is within `most` megabytes; whether it is,
    and leaves half of the disk's free space."""
    bound, kept = most * 2**20, []
    if length > bound:
        return False
    for entry in os.scandir(directory):
        with contextlib.suppress(OSError):  # others remove files, too
            about = entry.stat(follow_symlinks=False)
            if entry.name.endswith(ENDING):
                kept.append((about.st_mtime_ns, about.st_size, entry.path))
    total = sum(size for _, size, _ in kept)
    for _, size, path in sorted(kept):
        if total + length <= bound:
            break
        with contextlib.suppress(OSError):
            os.remove(path)
        total -= size
    return length <= shutil.disk_usage(directory).free // 2
