"""Several hosts of one run: how they join, and how they end when one of them does.

JAX's coordination service ends a process by abort where another is gone, with a page of C++ output, and where process
0 is gone, which runs the service, at once. Collectives raise or hang, as the network beneath them does. So every
process has a thread that writes a sign of life into the service's key-value store and reads those of the others. Where
one has been silent for too long, this thread ends its process with one line. Where the service itself is gone JAX calls
back, which in jaxlib 0.10.2 throws for want of a conversion: C++'s handler for that is ours, and says the same line.
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

BEAT = 2.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which a host is lost; JAX's own limit must be longer
SILENCE_AFTER_FAILURE = 8.0  # the same once a collective or a save has failed here
GRACE = 10.0  # seconds that a host goes on after another has stopped with an error: it may have the same one
KEY = 'jaxgen/alive/'
AGAIN = 'run the same command again on all hosts to go on from the newest checkpoint'

_watch: Watch | None = None
_keep: list[Any] = []  # what C++ holds pointers to
_at_end: list[Callable] = []  # ways to end the process where its usual end would say more than was said


def start() -> None:
    """Joins the other hosts of the run. Addresses come from the cluster or from JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. From here on a lost host ends this one within a minute.

    Raises:
      UserError: there is no such cluster.
      RunError: not all of its hosts came.
    """
    global _watch
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
        _at_end.append(os._exit)  # what JAX does at the end of a process that has not joined is a traceback
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
        log.say(f'WARNING: JAX {jax.__version__} has no way known to watch the other hosts: a lost one is not named')
        return
    state = inside.global_state
    if state.num_processes > 1:
        _watch = Watch(state.client, state.process_id, state.num_processes, state.coordinator_address)
        _watch.start()
        _on_terminate(_watch.without_service)


def _inside_jax():
    """JAX's own module of the cluster, which holds the client of the key-value store; there is no public way to it.
    None where another version of JAX keeps these things elsewhere."""
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
    """Within the block JAX's client is made so that it calls us, in place of aborting, where the service is gone."""
    library = inside._jax
    make = library.get_distributed_runtime_client

    def gone(*_):
        if _watch:
            _watch.without_service()
        os._exit(1)

    library.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=gone)
    try:
        yield
    finally:
        library.get_distributed_runtime_client = make


def _on_terminate(function) -> None:
    """Has C++ run `function` before it ends the process for an exception that nobody caught."""
    with contextlib.suppress(OSError, AttributeError):  # another C++ library: its own lines must do
        handler_type = ctypes.CFUNCTYPE(None)
        setter = ctypes.CDLL('libstdc++.so.6')._ZSt13set_terminatePFvvE
        setter.restype, setter.argtypes = ctypes.c_void_p, [handler_type]

        def handler():
            function()
            ctypes.cast(before, handler_type)()  # for another reason

        ours = handler_type(handler)
        _keep.append(ours)
        before = setter(ours)


class Watch(threading.Thread):
    """The signs of life of all hosts, read and written by a thread of its own."""

    def __init__(self, client, index: int, count: int, coordinator: str):
        super().__init__(name='hosts', daemon=True)
        self.client, self.index, self.count, self.coordinator = client, index, count, coordinator
        self.number = 0
        self.state = 'runs'  # runs | failed | stopped | done
        now = time.monotonic()
        self.seen = dict.fromkeys(range(count), ('', now))  # last sign of life, and when it was new
        self.names = {i: f'host {i}' for i in range(count)}
        self.names[0] = f'host 0 ({coordinator.rpartition(":")[0]})'
        self.states = dict.fromkeys(range(count), 'runs')
        self.lock = threading.Lock()
        self.ending = False
        self.looked = now  # when the newest look at all hosts began

    def beat(self) -> None:
        """Writes this host's sign of life and reads those of the others."""
        with self.lock:
            self.number += 1
            value = f'{self.number} {self.state} {socket.gethostname()}'
            self.client.key_value_set(f'{KEY}{self.index}', value, allow_overwrite=True)
            now = time.monotonic()
            for key, value in self.client.key_value_dir_get(KEY):
                i = int(key.rpartition('/')[2])
                if value != self.seen[i][0]:
                    self.seen[i] = (value, now)
                    _, self.states[i], name = value.split(' ', 2)
                    self.names[i] = f'host {i} ({name})'

    def lost(self) -> list[int]:
        """Hosts that are silent and had not said that they would be."""
        limit = SILENCE if self.state in ('runs', 'done') else SILENCE_AFTER_FAILURE
        now = time.monotonic()
        return [
            i
            for i, (_, since) in self.seen.items()
            if i != self.index and self.states[i] not in ('stopped', 'done') and now - since > limit
        ]

    def stopped(self) -> list[int]:
        """Hosts that have ended with an error of their own, or were told to."""
        now = time.monotonic()
        return [i for i, (_, since) in self.seen.items() if self.states[i] == 'stopped' and now - since > GRACE]

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
                    self.end(f'{self.called(lost)} lost: no sign of life')
                if stopped := self.stopped():
                    self.end(f'{self.called(stopped)} no longer there: stopped with an error of its own')
            self.looked = began
            time.sleep(BEAT)

    def called(self, hosts: list[int]) -> str:
        return ' and '.join(self.names[i] for i in hosts) + (' is' if len(hosts) == 1 else ' are')

    def end(self, why: str) -> None:
        """Ends this process with one line. Process 0 goes last: with it goes the service that tells the others."""
        self.ending = True
        if self.index == 0:
            with contextlib.suppress(Exception):
                end = time.monotonic() + 3 * BEAT
                while time.monotonic() < end:
                    self.beat()
                    time.sleep(BEAT)
        interrupt.leave(f'stopped: {why}; {AGAIN}', 1)

    def without_service(self) -> None:
        """Ends this process where process 0 is gone; returns where it is not, and in the process that is at its end."""
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
            interrupt.leave(f'stopped: {self.called([0])} lost; {AGAIN}', 1)
        interrupt.leave(f'stopped: {self.called([0])} no longer there: stopped with an error of its own; {AGAIN}', 1)

    def part(self) -> None:
        """Says that this host stops, and where it is process 0 waits for the others to say so too."""
        self.state = 'stopped'
        with contextlib.suppress(Exception):
            self.beat()
            end = time.monotonic() + GRACE + 2 * BEAT
            while self.index == 0 and time.monotonic() < end:
                if all(state in ('stopped', 'done') for i, state in self.states.items() if i):
                    break
                time.sleep(BEAT / 4)
                self.beat()


def part() -> None:
    """Called before this process ends by itself, saved or with an error, while the others may not have."""
    if _watch:
        _watch.part()


@contextlib.contextmanager
def joined():
    """Within the block an error that comes of a lost host ends the process with the line about that host; other errors
    are the block's. At its end the others know that this host needs them no more."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        # A collective, or a save that waits for all: silence will tell. What is ours alone has no cause.
        if _watch and not (isinstance(e, RunError) and e.__cause__ is None):
            _watch.state = 'failed'
            failed = time.monotonic()
            # A busy machine may be slow to look.
            while _watch.looked < failed + SILENCE_AFTER_FAILURE + BEAT and time.monotonic() < failed + SILENCE:
                time.sleep(BEAT / 4)
            while _watch.ending:  # the thread ends the process
                time.sleep(BEAT)
        raise
    else:
        if _watch:
            _watch.state = 'done'


def leave(code: int) -> None:
    """Ends a process of several with an exit code that is not 0. By itself it would wait for the others, minutes."""
    if _watch and code:
        part()
        os._exit(code)
    if _at_end and code:
        _at_end[0](code)
