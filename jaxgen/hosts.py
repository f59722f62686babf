"""Several hosts of one run: how they join, and how the others end when one of them does.

JAX's coordination service aborts a process where another is gone, with a page of C++ output, and where process 0 is
gone, which runs the service, at once. Collectives raise or hang, depending on the network. So every process has a
thread that writes heartbeats into the service's key-value store and reads those of the others. After a timeout of one
of them, this thread ends its process with one line. Where the service itself is gone JAX calls back, which in jaxlib
0.10.2 throws for lack of a conversion: our handler of std::terminate writes the same line.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxgen import interrupt, log
from jaxgen.errors import RunError, UserError

HEARTBEAT = 2.0  # seconds between two heartbeats of a host
TIMEOUT = 30.0  # seconds without a heartbeat after which a host is lost; JAX's own limit must be longer
TIMEOUT_AFTER_FAILURE = 8.0  # the same once a collective or a save has failed here
GRACE = 10.0  # seconds that a host goes on after another has stopped with an error: it may have the same one
KEY = 'jaxgen/alive/'
AGAIN = 'run the same command again on all hosts to go on from the newest checkpoint'

_heartbeats: Heartbeats | None = None
_referenced: list[Any] = []  # objects that C++ has pointers to
_exits: list[Callable] = []  # functions that end the process without further output


def start() -> None:
    """Joins the other hosts of the run. Addresses are those of the cluster or of JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. From here on the loss of a host ends this one within a minute.

    Raises:
      UserError: there is no such cluster.
      RunError: not all of its hosts joined.
    """
    global _heartbeats
    # It would take SIGTERM away from interrupt.py, which saves.
    with contextlib.suppress(AttributeError):  # versions without one
        jax.config.update('jax_enable_preemption_service', False)
    inside = _inside_jax()
    given: dict[str, Any] = {}
    try:
        if 'JAX_NUM_PROCESSES' in os.environ:
            given = {
                'coordinator_address': os.environ['JAX_COORDINATOR_ADDRESS'],
                'num_processes': int(os.environ['JAX_NUM_PROCESSES']),
                'process_id': int(os.environ['JAX_PROCESS_ID']),
            }
        if 'heartbeat_timeout_seconds' in inspect.signature(jax.distributed.initialize).parameters:
            given['heartbeat_timeout_seconds'] = 60
        with _called_back(inside) if inside else contextlib.nullcontext():
            jax.distributed.initialize(**given)
    except (KeyError, ValueError, RuntimeError) as e:
        _exits.append(os._exit)  # at the usual end of a process that has not joined JAX prints a traceback
        if 'num_processes' in given and isinstance(e, RuntimeError):
            raise RunError(
                f'the {given["num_processes"]} hosts have not all joined (JAX_PROCESS_ID={given["process_id"]} is this '
                f'one, {given["coordinator_address"]} that of 0): run the same command on all of them within 5 minutes'
            ) from e
        raise UserError(
            '--multihost needs a cluster that JAX knows, or JAX_COORDINATOR_ADDRESS (HOST:PORT), JAX_NUM_PROCESSES and '
            f'JAX_PROCESS_ID: {" ".join(str(e).split())}'
        ) from e
    if inside is None:
        log.say(f'WARNING: heartbeats are not supported with JAX {jax.__version__}: a lost host is not named')
        return
    state = inside.global_state
    if state.num_processes > 1:
        _heartbeats = Heartbeats(state.client, state.process_id, state.num_processes, state.coordinator_address)
        _heartbeats.start()
        _on_terminate(_heartbeats.without_service)


def _inside_jax():
    """JAX's internal module of the cluster, with the client of the key-value store, for which there is no public API.
    None where another version of JAX has none of this name."""
    try:
        from jax._src import distributed as inside

        state = inside.global_state
        _ = inside._jax.get_distributed_runtime_client, state.client, state.process_id, state.num_processes
        _ = state.coordinator_address
    except (ImportError, AttributeError):
        return None
    return inside


@contextlib.contextmanager
def _called_back(inside):
    """Within the block JAX's client is constructed so that it calls us, in place of aborting, where the service is
    gone."""
    library = inside._jax
    make = library.get_distributed_runtime_client

    def gone(*_):
        if _heartbeats:
            _heartbeats.without_service()
        os._exit(1)

    library.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=gone)
    try:
        yield
    finally:
        library.get_distributed_runtime_client = make


def _on_terminate(function) -> None:
    """Has C++ run `function` before it ends the process because of an uncaught exception."""
    with contextlib.suppress(OSError, AttributeError):  # another C++ library, with its own output
        handler_type = ctypes.CFUNCTYPE(None)
        setter = ctypes.CDLL('libstdc++.so.6')._ZSt13set_terminatePFvvE
        setter.restype, setter.argtypes = ctypes.c_void_p, [handler_type]

        def handler():
            function()
            ctypes.cast(before, handler_type)()  # for another reason

        ours = handler_type(handler)
        _referenced.append(ours)
        before = setter(ours)


class Heartbeats(threading.Thread):
    """The heartbeats of all hosts, read and written by a thread of its own."""

    def __init__(self, client, index: int, count: int, coordinator: str):
        super().__init__(name='hosts', daemon=True)
        self.client, self.index, self.count, self.coordinator = client, index, count, coordinator
        self.number = 0
        self.state = 'runs'  # runs | failed | stopped | done
        now = time.monotonic()
        self.last = dict.fromkeys(range(count), ('', now))  # each host's last heartbeat, and when it was new
        self.names = {i: f'host {i}' for i in range(count)}
        self.names[0] = f'host 0 ({coordinator.rpartition(":")[0]})'
        self.states = dict.fromkeys(range(count), 'runs')
        self.lock = threading.Lock()
        self.ending = False
        self.checked = now  # when the newest check of all hosts began

    def beat(self) -> None:
        """Writes this host's heartbeat and reads those of the others."""
        with self.lock:
            self.number += 1
            value = f'{self.number} {self.state} {socket.gethostname()}'
            self.client.key_value_set(f'{KEY}{self.index}', value, allow_overwrite=True)
            now = time.monotonic()
            for key, value in self.client.key_value_dir_get(KEY):
                i = int(key.rpartition('/')[2])
                if value != self.last[i][0]:
                    self.last[i] = (value, now)
                    _, self.states[i], name = value.split(' ', 2)
                    self.names[i] = f'host {i} ({name})'

    def lost(self) -> list[int]:
        """Hosts whose heartbeats have ended without notice."""
        limit = TIMEOUT if self.state in ('runs', 'done') else TIMEOUT_AFTER_FAILURE
        now = time.monotonic()
        return [
            i
            for i, (_, since) in self.last.items()
            if i != self.index and self.states[i] not in ('stopped', 'done') and now - since > limit
        ]

    def stopped(self) -> list[int]:
        """Hosts that have stopped with an error of their own, or by a signal."""
        now = time.monotonic()
        return [i for i, (_, since) in self.last.items() if self.states[i] == 'stopped' and now - since > GRACE]

    def run(self) -> None:
        while True:
            began = time.monotonic()
            try:
                self.beat()
            except Exception:  # the service is gone, with process 0, or this process is at its end
                if self.state in ('done', 'stopped'):
                    return
            if self.state != 'stopped':
                if lost := self.lost():
                    self.end(f'{self.described(lost)} lost: no heartbeat')
                if stopped := self.stopped():
                    self.end(f'{self.described(stopped)} no longer there: stopped with an error of its own')
            self.checked = began
            time.sleep(HEARTBEAT)

    def described(self, hosts: list[int]) -> str:
        return ' and '.join(self.names[i] for i in hosts) + (' is' if len(hosts) == 1 else ' are')

    def end(self, why: str) -> None:
        """Ends this process with one line. Process 0 ends last, since it runs the service of all."""
        self.ending = True
        if self.index == 0:
            with contextlib.suppress(Exception):
                end = time.monotonic() + 3 * HEARTBEAT
                while time.monotonic() < end:
                    self.beat()
                    time.sleep(HEARTBEAT)
        interrupt.leave(f'stopped: {why}; {AGAIN}', 1)

    def without_service(self) -> None:
        """Ends this process where process 0 is gone, else returns."""
        host, _, port = self.coordinator.rpartition(':')
        for _ in range(10):  # a process that has just been killed may still be listening
            try:
                socket.create_connection((host.strip('[]'), int(port)), timeout=2).close()
            except OSError:
                break
            time.sleep(0.3)
        else:
            return
        if self.states[0] == 'runs' or self.states[0] == 'failed':
            interrupt.leave(f'stopped: {self.described([0])} lost; {AGAIN}', 1)
        interrupt.leave(f'stopped: {self.described([0])} no longer there: stopped with an error of its own; {AGAIN}', 1)

    def stop(self) -> None:
        """Announces that this host stops, and in process 0 waits until the others have done so, too."""
        self.state = 'stopped'
        with contextlib.suppress(Exception):
            self.beat()
            end = time.monotonic() + GRACE + 2 * HEARTBEAT
            while self.index == 0 and time.monotonic() < end:
                if all(state in ('stopped', 'done') for i, state in self.states.items() if i):
                    break
                time.sleep(HEARTBEAT / 4)
                self.beat()


def stop() -> None:
    """Announces to the other hosts that this process ends by itself, after saving or with an error."""
    if _heartbeats:
        _heartbeats.stop()


@contextlib.contextmanager
def joined():
    """Within the block an error caused by a lost host ends the process with the line about that host; others are
    raised. At its end this host announces that it no longer depends on the others."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        # A collective or a save of all hosts has failed: heartbeats show whether one is lost. Errors of this host alone
        # have no cause.
        if _heartbeats and not (isinstance(e, RunError) and e.__cause__ is None):
            _heartbeats.state = 'failed'
            failed = time.monotonic()
            # The thread may be slow to check on a busy machine.
            while (
                _heartbeats.checked < failed + TIMEOUT_AFTER_FAILURE + HEARTBEAT and time.monotonic() < failed + TIMEOUT
            ):
                time.sleep(HEARTBEAT / 4)
            while _heartbeats.ending:  # the thread ends the process
                time.sleep(HEARTBEAT)
        raise
    else:
        if _heartbeats:
            _heartbeats.state = 'done'


def leave(code: int) -> None:
    """Ends one of several processes with an exit code other than 0. Its usual end would wait minutes for the others."""
    if _heartbeats and code:
        stop()
        os._exit(code)
    if _exits and code:
        _exits[0](code)
