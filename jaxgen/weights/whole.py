"""A directory that is written whole or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import time
from collections.abc import Iterator

from jaxgen import interrupt, locks
from jaxgen.errors import UserError


def check_free(path: str, option: str) -> None:
    """Raises UserError where something is in a directory that is to be written, or in its place."""
    if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise UserError(f'{option}={path} is there already and not empty: name another one')


def abandon(folder: str, what: str) -> None:
    """Removes what was written and ends the process; it runs beside the writing."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            break
        time.sleep(0.05)
    interrupt.leave(f'stopped; nothing is left of the {what}')


def is_at(descriptor: int, path: str) -> bool:
    """Whether an open directory has this path."""
    return os.path.lexists(path) and os.path.samestat(os.fstat(descriptor), os.lstat(path))


def locked(folder: str, option: str, path: str) -> int:
    """The descriptor of a new, empty directory that this process holds until it closes the descriptor. What a process
    that was killed has left under this name is removed.

    Raises:
      UserError: another process writes to it, or it is not this person's.
    """
    busy = f'{option}={path} is being written by another process ({folder}): wait for it, or name another one'
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError as e:  # another process has just finished
        raise UserError(busy) from e
    except OSError as e:
        raise UserError(f'{folder} is in the way and no directory: remove it') from e
    try:
        about = os.fstat(held)
        if about.st_uid != os.geteuid():
            raise UserError(f'{folder} is in the way and belongs to somebody else: remove it, or name another {option}')
        try:
            locks.hold(held)
        except BlockingIOError as e:
            raise UserError(busy) from e
        except OSError as e:  # a file system without locks
            if os.listdir(folder):
                raise UserError(
                    f'{folder} was left by a process that was killed, or is being written: remove it'
                ) from e
        if not is_at(held, folder):  # it has become the run in the meantime
            raise UserError(busy)
        for name in os.listdir(folder):
            inside = os.path.join(folder, name)
            if os.path.isdir(inside) and not os.path.islink(inside):
                shutil.rmtree(inside)
            else:
                os.remove(inside)
    except BaseException:
        os.close(held)
        raise
    return held


@contextlib.contextmanager
def new_directory(path: str, what: str, option: str) -> Iterator[str]:
    """An empty directory that takes the place of `path` at the end of the block, where there is nothing yet, or an
    empty directory. It is called .NAME.WHAT beside it until then. Where the block raises or a signal ends the process
    it is removed, and where the process is killed the next one that writes to `path` removes it.

    Args:
      what: 'import', say, for its name and for messages.
      option: that names the path, for messages.

    Raises:
      UserError: there is something in `path`, or another process is writing it.
    """
    check_free(path, option)
    parent, name = os.path.split(os.path.abspath(path))
    os.makedirs(parent, exist_ok=True)
    new = os.path.join(parent, f'.{name}.{what}')
    held = locked(new, option, path)
    try:
        with interrupt.on_signal(functools.partial(abandon, new, what)):
            yield new
            try:
                if os.path.isdir(path):
                    os.rmdir(path)  # it is empty
                os.rename(new, path)
            except OSError as e:
                if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise UserError(f'{option}={path} was written by another process meanwhile: name another one') from e
    finally:
        if is_at(held, new):
            shutil.rmtree(new, ignore_errors=True)
        os.close(held)
