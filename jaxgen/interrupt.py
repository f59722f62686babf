"""SIGTERM and Ctrl-C: lose nothing, and leave soon. Imports no jax: it is installed before jax.

A Python signal handler runs only between two bytecodes of the main thread, so it would wait for
a compile or a long sampling program to end. `signal.set_wakeup_fd` is written to by the C-level
handler at once, and a watcher thread reads it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

EXIT_CODE = 75  # EX_TEMPFAIL: the same command goes on from where it stopped

_requested = threading.Event()
_lock = threading.RLock()
_action: Callable[[], None] | None = None


def _leave_at_once() -> None:
    leave('stopped; there was nothing to save')


def leave(message: str) -> None:
    """Ends the process now, from any thread, with the exit code that says 'go on later'."""
    print(f'\njaxgen: {message}', file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(EXIT_CODE)


def install() -> None:
    """Handles SIGTERM and SIGINT from here on. Until told otherwise they end the process."""
    global _action
    _action = _leave_at_once
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(reader, 1):
            with _lock:
                _requested.set()
                if _action is not None:
                    _action()

    threading.Thread(target=watch, daemon=True, name='interrupt').start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # the watcher does the work


def requested() -> bool:
    """True once a signal has come."""
    return _requested.is_set()


@contextlib.contextmanager
def on_signal(action: Callable[[], None] | None):
    """Within the block a signal runs `action` on the watcher thread, or with None only sets `requested`."""
    global _action
    with _lock:
        before, _action = _action, action
        if action is not None and requested() and before is None:
            action()
    try:
        yield
    finally:
        with _lock:  # waits for an action under way: it ends the process
            _action = before
