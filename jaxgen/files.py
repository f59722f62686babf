"""Files of a run directory. A run may come from somebody else: it is data, and nothing outside it is read or written
through what lies in it."""

from __future__ import annotations

import contextlib
import os
import uuid

from jaxgen.errors import UserError


def refuse_links(folder: str, *names: str) -> None:
    """Raises UserError where one of these in a folder is a symbolic link. The folder itself may be reached by one."""
    for name in names:
        path = os.path.join(folder, name)
        if os.path.islink(path):
            raise UserError(
                f'{path} is a symbolic link to {os.readlink(path)}: a run holds its own files; put the files there in '
                'its place, or make the whole run directory a link'
            )


def absolute(path: str) -> str:
    """A path without ~, .., links to itself or a slash at the end: one directory is written in one way."""
    return os.path.abspath(os.path.expanduser(path))


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
