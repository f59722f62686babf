"""Memory that is returned to the system. Imports no jax."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator

# Of glibc's mallopt: what is larger gets pages of its own, and what is free at the end of a heap is returned.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
PAGES_OF_THEIR_OWN = 2**16  # bytes
AFTERWARDS = 2**25  # bytes, to which glibc raises the threshold by itself in a process with large arrays
_lock = threading.Lock()
_depth = 0


def option(name: int, value: int) -> None:
    """Sets an option of glibc's allocator; nothing where there is another one."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(name, value)


@contextlib.contextmanager
def returned() -> Iterator[None]:
    """Within the block arrays that are freed are returned to the system at once.

    The allocator otherwise keeps them for arrays that fit into their places: of weights that are read one after another
    through several threads it kept 0.6 times their size.
    """
    global _depth
    with _lock:
        _depth += 1
        option(MMAP_THRESHOLD, PAGES_OF_THEIR_OWN)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth:
                option(MMAP_THRESHOLD, AFTERWARDS)
                option(TRIM_THRESHOLD, 2 * AFTERWARDS)
