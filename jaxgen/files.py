"""Files of a run directory. A run may come from somebody else: it is data, and nothing outside it is read or written
through what lies in it."""

from __future__ import annotations

import os

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


def create(path: str, mode: str = 'w', **options):
    """A new file open for writing, in place of whatever has that name; never written through a link.

    Args:
      options: of `open`; text is UTF-8.
    """
    if os.path.lexists(path):
        os.remove(path)
    if 'b' not in mode:
        options.setdefault('encoding', 'utf-8')
    return open(path, mode.replace('w', 'x'), **options)
