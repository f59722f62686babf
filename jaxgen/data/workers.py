"""Processes that decode images for the one that trains, and know nothing of data sets: files' bytes in, arrays out.

    lease = Lease(4)  # at the first images four processes are started
    for start, arrays, damaged in lease.decoded(tasks):
        ...
    lease.close()  # the last one that ends ends the processes

Each is a Python of its own that imports numpy and Pillow alone, in a quarter of a second: neither jax nor the program
that trains, whose main module may be a notebook. It has two lines to its parent, so that it need not wait between two
tasks: a socket that says when, and memory without a name that holds what. So nothing is left in /dev/shm or anywhere
else, however a process ends, and no limit on /dev/shm holds. A process that was killed is replaced and its task given
out again, since decoding is a pure function; those whose parent has ended see the socket close, and end.

Grain's own processes were not taken: each imports all of jax and holds a pickled copy of the set, they cannot be
started from a script without a main guard, and their memory has names, which a killed process leaves behind.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import queue
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxgen.data.decoding import FIELDS, Crops, Target, prepared
from jaxgen.errors import RunError

LINES = 2  # of each process: one is filled while it works on the other
TRIES = 3  # of a task whose process ends
UNKNOWN = 2  # of an image: neither decoded (0) nor damaged (1) yet
WATCH = 5.0  # seconds between two looks at whether the other end is there
PATIENCE = 60.0  # seconds in which a process at work does nothing at all, after which another takes its place
REQUEST = struct.Struct('<QQ')  # bytes of the memory, bytes of the header at its beginning
START = 'import sys; sys.path[:] = {path!r}; from jaxgen.data import workers; workers.serve({lines!r}, {parent})'
# Of libraries that would start threads in every process.
ONE_THREAD = dict.fromkeys(('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'), '1')


class Task(NamedTuple):
    """Images that one process decodes at a time."""

    start: int  # number of the first one in its batch
    stored: list[bytes]  # of each example the file of each target, one after another
    targets: tuple[Target, ...]
    section: dict[str, Any]  # the section `data`
    crops: Crops  # of these examples

    def __len__(self) -> int:
        return len(self.stored) // len(self.targets)


class Unavailable(Exception):
    """No process can be started here, or they have been ended; the text says why."""


def cores() -> int:
    """Processor cores that this process may use: by its affinity, and by the quota of its control groups."""
    if hasattr(os, 'process_cpu_count'):  # Python 3.13
        n = os.process_cpu_count() or 1
    else:
        n = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    bound = quota()
    return max(1, n if math.isinf(bound) else min(n, math.ceil(bound)))


def quota(root: str = '/sys/fs/cgroup', own: str = '/proc/self/cgroup') -> float:
    """The processor time that the control groups of this process have, in cores; infinite where nothing bounds it."""
    groups = {'': '/'}
    with contextlib.suppress(OSError, ValueError), open(own, encoding='utf-8', errors='surrogateescape') as file:
        for line in file:
            _, controllers, path = line.rstrip('\n').split(':', 2)
            groups |= dict.fromkeys(controllers.split(','), path)
    least = math.inf
    for base, group in ((root, groups['']), (os.path.join(root, 'cpu'), groups.get('cpu', '/'))):
        parts = [part for part in group.split('/') if part not in ('', '..')]
        for depth in range(len(parts) + 1):  # a group above may have less; inside of a container it is not seen
            directory = os.path.join(base, *parts[:depth])
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                least = min(least, quota_of(directory))
    return least


def quota_of(directory: str) -> float:
    """The quota of one control group, of version 2 or 1."""

    def read(name: str) -> list[str]:
        with open(os.path.join(directory, name), encoding='ascii') as file:
            return file.read().split()

    with contextlib.suppress(OSError):
        allowed, period = read('cpu.max')
        return math.inf if allowed == 'max' else int(allowed) / int(period)
    allowed, period = read('cpu.cfs_quota_us')[0], read('cpu.cfs_period_us')[0]
    return math.inf if int(allowed) <= 0 else int(allowed) / int(period)


# --- the process that trains


class Line:
    """One of the lines to a process: it has one task at a time."""

    def __init__(self, worker: Worker):
        self.worker, self.memory = worker, memory_file()
        weakref.finalize(self, os.close, self.memory)
        self.map: mmap.mmap | None = None
        self.socket: Any = None
        self.task: Task | None = None
        self.request, self.places = b'', ([], 0)
        # The process that has the task, and the socket that leads to it: another one may be in its place by now.
        self.generation, self.used, self.pid = -1, None, 0

    def give(self, task: Task) -> None:
        """Begins a task."""
        header, pieces, size = self.lay_out(task)
        if self.map is None or len(self.map) < size:
            os.ftruncate(self.memory, size)
            self.map = mmap.mmap(self.memory, size)
        self.map[: len(header)] = header
        for at, piece in pieces:
            self.map[at : at + len(piece)] = piece
        self.map[self.places[1] : size] = bytes([UNKNOWN]) * len(task)
        self.task, self.request = task, REQUEST.pack(len(self.map), len(header))
        self.send()

    def lay_out(self, task: Task) -> tuple[bytes, list[tuple[int, bytes]], int]:
        """(header, [(place, bytes)], size of all) of a task in memory. The results have places of their own, so that
        the task can be given out again."""
        n, places = len(task), {'stored': [], 'crops': [], 'out': [], 'damaged': 0}
        about = {
            'n': n,
            'targets': task.targets,
            'section': {name: task.section[name] for name in FIELDS},
            **places,
        }
        # Numbers in the header are at most this long, so its length is known before they are.
        most = len(json.dumps(about)) + 24 * (len(task.stored) + 1) + 128 * (len(Crops._fields) + len(task.targets))
        pieces, at = [], (most + 4095) // 4096 * 4096
        for name, x in zip(Crops._fields, task.crops, strict=True):
            if x is not None:
                about['crops'].append([name, x.dtype.str, x.shape, at])
                pieces.append((at, np.ascontiguousarray(x).tobytes()))
                at += (x.nbytes + 63) // 64 * 64
        for piece in task.stored:
            about['stored'].append(at)
            pieces.append((at, piece))
            at += len(piece)
        about['stored'].append(at)
        for target in task.targets:
            about['out'].append(at)
            at += n * math.prod(target.shape)
        about['damaged'] = at
        self.places = about['out'], at
        header = json.dumps(about).encode()
        assert len(header) <= most
        return header, pieces, at + n

    def send(self) -> None:
        with self.worker.lock:
            self.generation, self.used = self.worker.generation, self.socket
            self.pid = self.worker.process.pid if self.worker.process else 0
        with contextlib.suppress(OSError):  # it has been closed
            self.used.settimeout(WATCH)
        with contextlib.suppress(OSError):  # that it has ended is seen in receiving
            self.used.sendall(self.request)

    def result(self) -> tuple[Task, list[np.ndarray], np.ndarray]:
        """(task, its images by target, which of them are damaged); views of the line's memory. Waits for the process,
        and gives the task out again where that has ended.

        Raises:
          RunError: it has ended again and again.
          Unavailable: none has answered yet.
        """
        task = self.task
        assert task is not None
        for tried in range(TRIES):
            if self.answered():
                break
            why = self.worker.restart(self.generation)
            if tried + 1 == TRIES:
                self.task = None
                if not self.worker.pool.answered:
                    raise Unavailable(why)
                raise RunError(
                    f'{TRIES} processes that decode images have ended, one after another ({why}): set '
                    'config.data.processes to fewer, or to 0, which decodes in threads'
                )
            self.send()
        self.worker.pool.answered, self.task = True, None
        (places, damaged), n = self.places, len(task)
        arrays = [
            np.ndarray((n, *target.shape), np.uint8, self.map, at)
            for target, at in zip(task.targets, places, strict=True)
        ]
        return task, arrays, np.ndarray(n, np.uint8, self.map, damaged)

    def answered(self) -> bool:
        """Waits for the end of the task; False: the process has ended, or is stopped."""
        before, silent = None, 0.0  # seconds of waiting, not of the clock: this process may be stopped as well
        while silent < PATIENCE:
            try:
                return self.used.recv(1) == b'.'
            except TimeoutError:
                now = self.signs()
                before, silent = now, silent + WATCH if now == before else 0.0
            except OSError:
                return False
        return False

    def signs(self) -> list[bytes]:
        """What changes while the process works: the images that it is done with, and its processor time."""
        done = [line.done() for line in self.worker.lines]  # it may be at work on the other one
        with contextlib.suppress(OSError), open(f'/proc/{self.pid}/stat', 'rb') as file:
            done += file.read().rpartition(b')')[2].split()[11:13]
        return done

    def done(self) -> bytes:
        task, memory, damaged = self.task, self.map, self.places[1]
        return memory[damaged : damaged + len(task)] if task and memory else b''


def most_workers() -> int:
    """How many processes half of the files take that this process may have open; one at least."""
    import resource

    bound, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    each = 3 * LINES  # of each line a socket, memory, and that as it is mapped
    return sys.maxsize if bound == resource.RLIM_INFINITY else max(bound // 2 // each, 1)


def memory_file() -> int:
    """A file in memory that has no name."""
    if hasattr(os, 'memfd_create'):
        return os.memfd_create('jaxgen', os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Worker:
    """A process, or the one that has taken its place."""

    def __init__(self, pool: Pool):
        self.pool, self.generation, self.lock = pool, -1, threading.Lock()
        self.process: subprocess.Popen | None = None
        self.lines = [Line(self) for _ in range(LINES)]
        self.why = 'it cannot be started'
        self.restart(-1)

    def restart(self, generation: int) -> str:
        """Starts a process where that of this generation has ended, which it does now at the latest. Says how."""
        with self.lock:
            if self.pool.closed:
                raise Unavailable('they have been ended')
            if self.generation == generation:
                if self.process is not None:
                    self.why = self.end()
                self.start()
                self.generation += 1
            return self.why

    def start(self) -> None:
        ends: list[tuple[socket.socket, socket.socket]] = []
        try:
            ends += (socket.socketpair() for _ in self.lines)
            lines = [(end.fileno(), line.memory) for (_, end), line in zip(ends, self.lines, strict=True)]
            path = [os.path.abspath(entry) for entry in sys.path]  # '' is the present directory
            self.process = subprocess.Popen(
                [sys.executable, '-W', 'ignore', '-c', START.format(path=path, lines=lines, parent=os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[number for line in lines for number in line],
                process_group=0,  # Ctrl-C is for the parent
                env={**os.environ, **ONE_THREAD},
            )
        except OSError as e:
            for own, _ in ends:
                own.close()
            raise Unavailable(' '.join(str(e).split())) from e
        finally:
            for _, end in ends:
                end.close()
        for line, (own, _) in zip(self.lines, ends, strict=True):
            if line.socket is not None:
                line.socket.close()
            line.socket = own

    def end(self) -> str:
        """Ends the process; how it has ended."""
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # its end of the socket closes a little before
                code = self.process.wait(0.5)
        self.process.kill()
        self.process.wait()
        if code is None:
            return 'it did not answer'
        if code < 0:
            return 'SIGKILL, out of memory perhaps' if code == -9 else signal.Signals(-code).name
        return f'exit code {code}'


class Pool:
    """`n` processes, started at the first task."""

    def __init__(self, n: int):
        self.n, self.users, self.pid = n, 0, os.getpid()
        self.workers: list[Worker] = []
        self.idle: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.closed = self.answered = self.started = False

    def start(self) -> None:
        """Starts the processes where they do not run yet.

        Raises:
          Unavailable: that is not possible, or they are those of the process that this one was forked from.
        """
        if self.pid != os.getpid():
            raise Unavailable('this process was forked from the one that started them')
        if not sys.executable or not hasattr(os, 'posix_spawn'):
            raise Unavailable('there is no Python to start')
        with self.lock:
            if self.closed:
                raise Unavailable('they have been ended')
            if self.started:
                return
            for _ in range(min(self.n, most_workers())):
                try:
                    self.workers.append(Worker(self))
                except (Unavailable, OSError) as e:
                    if not self.workers:
                        raise Unavailable(str(e)) from e
                    break  # as many as there may be
            for k in range(LINES):
                for worker in self.workers:
                    self.idle.put(worker.lines[k])
            self.started = True

    def decoded(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, list[np.ndarray], np.ndarray]]:
        """What `Line.result` says of each task, in their order; the arrays are valid until the next."""
        self.start()
        pending: deque[Line] = deque()
        try:
            for task in tasks:
                while (line := self.free(wait=not pending)) is None:
                    yield from self.first(pending)
                pending.append(line)
                line.give(task)
            while pending:
                yield from self.first(pending)
        finally:
            for line in pending:
                if line.task is not None:
                    with contextlib.suppress(Exception):
                        line.result()
                line.task = None
                self.put_back(line)

    def first(self, pending: deque[Line]) -> Iterator[tuple[Task, list[np.ndarray], np.ndarray]]:
        yield pending[0].result()
        self.put_back(pending.popleft())

    def put_back(self, line: Line) -> None:
        if not self.closed:
            self.idle.put(line)

    def free(self, wait: bool) -> Line | None:
        """A line without a task; None: there is none now. A thread waits for one only while it holds none itself."""
        try:
            line = self.idle.get(block=wait)
        except queue.Empty:
            return None
        if line is None or self.closed:
            self.idle.put(None)  # for the next one that waits
            raise Unavailable('they have been ended')
        return line

    def close(self) -> None:
        if self.pid != os.getpid():
            return
        with self.lock:
            self.closed = True
        for worker in self.workers:
            with worker.lock:
                if worker.process is not None:
                    worker.process.kill()
                    worker.process.wait()
                for line in worker.lines:
                    if line.socket is not None:
                        with contextlib.suppress(OSError):
                            line.socket.shutdown(socket.SHUT_RDWR)
                        line.socket.close()
            worker.lines = []  # no cycle is left: their memory goes with the last that uses it
        self.workers = []
        with contextlib.suppress(queue.Empty):
            while True:
                self.idle.get_nowait()
        self.idle.put(None)


_pools: dict[tuple[int, int], Pool] = {}  # by process and number of workers
_lock = threading.Lock()


class Lease:
    """The use of `n` processes, which all that use as many in this process do together."""

    def __init__(self, n: int):
        key = os.getpid(), n
        with _lock:
            self.pool = _pools.setdefault(key, Pool(n))
            self.pool.users += 1
        self.close = weakref.finalize(self, release, key, self.pool)  # once

    def decoded(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, list[np.ndarray], np.ndarray]]:
        """See `Pool.decoded`."""
        return self.pool.decoded(tasks)


def release(key: tuple[int, int], pool: Pool) -> None:
    with _lock:
        pool.users -= 1
        last = not pool.users
        if last and _pools.get(key) is pool:
            del _pools[key]
    if last:
        pool.close()


# --- a process that decodes


def serve(lines: list[tuple[int, int]], parent: int) -> None:
    """Decodes until the parent has ended.

    Args:
      lines: (socket, memory) of each line, as numbers of open files.
      parent: its process.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent may still be saving
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError), open('/proc/self/oom_score_adj', 'w') as file:
        file.write('500')  # can be replaced, which a training cannot
    maps: dict[int, mmap.mmap] = {}
    with selectors.DefaultSelector() as selector:
        for number, memory in lines:
            selector.register(socket.socket(fileno=number), selectors.EVENT_READ, memory)
        while os.getppid() == parent:
            for key, _ in selector.select(WATCH):
                end: Any = key.fileobj
                try:
                    request = end.recv(REQUEST.size, socket.MSG_WAITALL)
                    if len(request) < REQUEST.size:
                        return
                    size, header = REQUEST.unpack(request)
                    if key.data not in maps or len(maps[key.data]) != size:
                        maps[key.data] = mmap.mmap(key.data, size)
                    work(maps[key.data], header)
                    end.sendall(b'.')
                except OSError:
                    return


def work(memory: mmap.mmap, header: int) -> None:
    """Decodes the images of a task, and says which could not be."""
    about = json.loads(memory[:header])
    n, stored, section = about['n'], about['stored'], about['section']
    targets = [Target(name, tuple(shape), palette) for name, shape, palette in about['targets']]
    crops = Crops(**{name: np.ndarray(shape, dtype, memory, at) for name, dtype, shape, at in about['crops']})
    out = [
        np.ndarray((n, *target.shape), np.uint8, memory, at) for target, at in zip(targets, about['out'], strict=True)
    ]
    damaged = np.ndarray(n, np.uint8, memory, about['damaged'])
    for k in range(n):
        crop = crops.one(k)
        try:
            for j, target in enumerate(targets):
                i = k * len(targets) + j
                out[j][k] = prepared(memory[stored[i] : stored[i + 1]], target, section, crop)
            damaged[k] = 0
        except Exception:  # of any kind; the parent decodes it again, and says which
            damaged[k] = 1
