"""SIGTERM, SIGHUP and Ctrl-C: the state is saved and the process ends soon. Imports no jax: it is installed before jax.

A Python signal handler runs only between two bytecodes of the main thread, so it would wait for a compile or a long
sampling program to end. The C-level handler writes to the descriptor of `signal.set_wakeup_fd` at once, and a watcher
thread reads it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

EXIT_CODE = 75  # EX_TEMPFAIL: the same command goes on from where it stopped

_requested = threading.Event()
_lock = threading.RLock()
_leaving = threading.Lock()
_action: Callable[[], None] | None = None


def _leave_at_once() -> None:
    leave('stopped; there was nothing to save')


def leave(message: str, code: int = EXIT_CODE) -> None:
    """Ends the process now, from any thread, by default with the exit code for 'run again'. Where two threads call it,
    one message is written."""
    if not _leaving.acquire(blocking=False):
        time.sleep(60)  # the other ends the process long before
    say(f'\njaxgen: {message}')
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def say(text: str) -> None:
    """Writes a line to stderr, whose terminal may be gone."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def install() -> None:
    """Handles SIGTERM, SIGINT and SIGHUP (a closed terminal) from here on: they end the process, except within
    `on_signal`. A SIGHUP that is ignored already, as by nohup, stays so."""
    global _action
    _action = _leave_at_once
    several = any(argument.startswith(('--multihost', '-multihost')) for argument in sys.argv)
    if several and os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':  # jax sets 1, also for processes it starts
        # jaxlib reads this when it is loaded. Errors of its services are reported by hosts.py, in one line.
        os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(reader, 1):
            with _lock:
                _requested.set()
                if _action is not None:
                    try:
                        _action()
                    except Exception as e:  # a full disk, say; this thread must live to see the next signal
                        say(f'\njaxgen: WARNING: {" ".join(str(e).split())}')

    threading.Thread(target=watch, daemon=True, name='interrupt').start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # the watcher does the work


def requested() -> bool:
    """Whether a signal has been received."""
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
