"""SIGTERM, SIGHUP and Ctrl-C: the state is saved and the process ends soon. Imports no jax: it is installed before jax.

A Python signal handler runs only between two bytecodes of the main thread, so it would wait for a compile or a long
sampling program to end. The C-level handler writes to the descriptor of `signal.set_wakeup_fd` at once, and a watcher
thread reads it.

In a program of a person's own, where `install` was not called (a notebook, say), nothing here ends the process: a
training notes signals in the main thread, saves, and lets them take their usual course.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxgen.errors import RunError

EXIT_CODE = 75  # EX_TEMPFAIL: the same command goes on from where it stopped

_requested = threading.Event()
_lock = threading.RLock()
_leaving = threading.Lock()
_action: Callable[[], None] | None = None
_installed = False
_noted = 0  # the signal that came while a training in the main thread of a person's own program notes them
_noting = False
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(BaseException):
    """A training in a person's own program was stopped by a signal, and has saved. `on_signal` catches it."""


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
    global _action, _installed
    _action, _installed = _leave_at_once, True
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
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # the watcher does the work


def stop(message: str) -> None:
    """Ends a training that has saved: the process, or in a person's own program the block of `on_signal`."""
    if _installed:
        leave(message)
    say(f'\njaxgen: {message}')
    raise Interrupted(message)


def requested() -> bool:
    """Whether a signal has been received."""
    return _requested.is_set() or bool(_noted and threading.current_thread() is threading.main_thread())


@contextlib.contextmanager
def noted():
    """Within the block signals that the main thread gets are noted, see `requested`, and the second one takes its usual
    course; after the block the first does (KeyboardInterrupt of Ctrl-C). Other threads get none.

    Raises:
      RunError: the usual course of the signal that stopped the training does not stop the program.
    """
    global _noted, _noting
    if _noting or threading.current_thread() is not threading.main_thread():
        yield
        return
    usual: dict[int, Any] = {n: signal.getsignal(n) for n in SIGNALS}
    usual = {n: handler for n, handler in usual.items() if handler not in (signal.SIG_IGN, None)}

    def note(number, frame) -> None:
        global _noted
        if _noted:
            signal.signal(number, usual[number])
            signal.raise_signal(number)
        _noted = number
        with contextlib.suppress(RuntimeError):  # stderr was being written to
            say('\njaxgen: stopping after this update; once more stops at once')

    stopped: Interrupted | None = None
    _noting = True
    try:
        for number in usual:
            signal.signal(number, note)
        try:
            yield
        except Interrupted as e:
            stopped = e
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        last, _noted, _noting = _noted, 0, False
    if last:
        signal.raise_signal(last)
    if stopped:
        raise RunError(str(stopped))


@contextlib.contextmanager
def on_signal(action: Callable[[], None] | None):
    """Within the block a signal runs `action` on the watcher thread, or with None only sets `requested`. In a person's
    own program it is always the latter."""
    global _action
    if not _installed:
        with noted():
            yield
        return
    with _lock:
        before, _action = _action, action
        if action is not None and requested() and before is None:
            action()
    try:
        yield
    finally:
        with _lock:  # waits for an action under way: it ends the process
            _action = before
