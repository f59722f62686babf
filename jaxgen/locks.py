"""File locks: held by one process at a time, and gone with it, however it ends. Imports no jax."""

from __future__ import annotations

import sys
from types import ModuleType

from jaxgen.errors import UserError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


def check_platform() -> None:
    """Raises UserError on systems without file locks, which have no SIGHUP and no O_NOFOLLOW either."""
    if fcntl is None:
        raise UserError(
            f'{sys.platform} is not supported: use Linux or macOS, or on Windows the subsystem for Linux (WSL)'
        )


def hold(file: int, wait: bool = False, shared: bool = False) -> None:
    """Takes the lock of an open file, until it is closed.

    Args:
      file: its descriptor.
      wait: until another process has closed it.
      shared: several processes may have it, while none has it for itself.

    Raises:
      BlockingIOError: another process has it.
      OSError: the file system has no locks.
      UserError: the system has none.
    """
    check_platform()
    if fcntl is not None:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
