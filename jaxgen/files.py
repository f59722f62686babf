"""Files, PNG, JSON and NPZ, written whole or not at all.

No file is written through a link: a run may come from somebody else (see `origin.check_layout`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
import sys
import uuid
from collections.abc import Callable

import numpy as np
from PIL import Image

from jaxgen.errors import UserError


def absolute(path: str) -> str:
    """A path without ~, .., links to itself or a slash at the end: one directory is written in one way."""
    return os.path.abspath(os.path.expanduser(path))


def as_path(value, what: str) -> str:
    """A path as a text.

    Raises:
      UserError: the value is none. `what` is its name.
    """
    if not isinstance(value, str | os.PathLike):
        raise UserError(f'{what} must be a path; it is {value!r}')
    return os.fspath(value)


def here() -> str:
    """The present directory; '' where it has been removed."""
    with contextlib.suppress(OSError):
        return os.getcwd()
    return ''


def check_local(path: str, what: str) -> None:
    """Raises UserError for an address with a scheme, gs://bucket/run: only files of this machine are read and written.

    what: the option that names it.
    """
    scheme, separator, _ = path.partition('://')
    if separator and scheme.isascii() and scheme.replace('+', '').replace('-', '').replace('.', '').isalnum():
        raise UserError(f'{what}={path} is an address; name a directory of this machine (a mounted bucket is one)')


def cache_directory(name: str) -> str:
    """A directory for what can be made again, in the person's cache directory: an absolute path."""
    usual = '~/Library/Caches' if sys.platform == 'darwin' else '~/.cache'
    given = os.path.expanduser(os.environ.get('XDG_CACHE_HOME', ''))
    # By the XDG specification a relative one is no valid one: it would be another one in every directory.
    return absolute(os.path.join(given if os.path.isabs(given) else usual, 'jaxgen', name))


def version_of(about: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file does: its size, and when its content and its entry were changed last. The second of
    these times nobody can set: not a copy that keeps times either."""
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns


def distrusted(directory: str) -> str:
    """Why somebody else may have written a file in a directory, which is there, or ''.

    Its owner and those of all directories above it must be this person or root, and no others may write to it, nor
    to one above it, unless there each may rename only their own (as in /tmp).
    """
    path, first = os.path.realpath(directory), True
    owners = (os.geteuid(), 0, os.stat(os.sep).st_uid)  # in some containers root is another user's name
    while True:
        about = os.stat(path)
        if about.st_uid not in owners:
            return f'{path} belongs to another user'
        shared = about.st_mode & stat.S_IWOTH or (about.st_mode & stat.S_IWGRP and not is_private_group(about.st_gid))
        if shared and (first or not about.st_mode & stat.S_ISVTX):
            return f'others may write to {path}'
        if path == os.path.dirname(path):
            return ''
        path, first = os.path.dirname(path), False


def is_private_group(group: int) -> bool:
    """Whether a group is that of this person alone, as many systems make one for each user."""
    import grp
    import pwd

    try:
        person, about = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return person.pw_gid == group and person.pw_name == about.gr_name and not set(about.gr_mem) - {person.pw_name}


def make_private(directory: str) -> None:
    """Makes a directory, and those above it that are missing, for this person alone."""
    missing, directory = [], os.path.abspath(directory)
    while not os.path.isdir(directory):
        missing.append(directory)
        directory = os.path.dirname(directory)
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)


@contextlib.contextmanager
def replacing(path: str):
    """A new binary file that takes the place of `path` at the end of the block: whole or not at all.

    It has a name that nobody can have prepared, so several processes may write one file, and no link is followed.
    """
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    new = f'{path}.{uuid.uuid4().hex}.new'
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(new, flags, 0o666), 'w+b') as file:
            yield file
        os.replace(new, path)
    finally:
        if os.path.exists(new):
            os.remove(new)


def grid(images: np.ndarray, columns: int = 0) -> np.ndarray:
    """An image grid, uint8 [H, W, C], of images uint8 [n, h, w, C], row by row, with gaps; small ones are enlarged to
    48 pixels."""
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = max(1, math.ceil(48 / max(height, width)))
    images = images.repeat(scale, 1).repeat(scale, 2)
    height, width, gap = height * scale, width * scale, max(2, scale // 2)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 96, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_png(path: str, image: np.ndarray) -> None:
    """Writes uint8 [H, W, C] with C = 1 or 3, whole or not at all."""
    with replacing(path) as file:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format='PNG')


def save_json(path: str, value) -> None:
    """Writes JSON, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + '\n').encode())


def save_npz(path: str, arrays: dict[str, np.ndarray], compressed: bool = False) -> None:
    """Writes arrays, whole or not at all."""
    with replacing(path) as file:
        save: Callable = np.savez_compressed if compressed else np.savez
        save(file, **arrays)


def load_npz(path: str) -> dict[str, np.ndarray]:
    """The arrays in a file of `save_npz`, without running any code in it.

    Raises:
      ValueError: it is damaged.
      OSError: it cannot be read.
    """
    try:
        with open(path, 'rb') as stored, np.load(stored, allow_pickle=False) as file:
            return {name: file[name] for name in file}
    except OSError:
        raise
    except Exception as e:  # a changed byte makes zipfile raise nearly anything: another method, a password
        raise ValueError(' '.join(str(e).split())) from e


def check_writable(folder: str, what: str) -> None:
    """Raises UserError where no file can be made in a folder, which need not be there yet.

    what: the option that names it.
    """
    there = os.path.abspath(folder)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    try:
        if not os.path.isdir(there):
            raise NotADirectoryError(
                errno.ENOTDIR, 'it is a file' if there == os.path.abspath(folder) else 'not a directory'
            )
        probe = os.path.join(there, f'.{uuid.uuid4().hex}.new')
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        os.remove(probe)
    except OSError as e:
        raise UserError(f'{what}={folder} cannot be written to: {there}: {e.strerror}') from e
