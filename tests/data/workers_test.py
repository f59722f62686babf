"""Processes that decode images: the same batches, whoever decodes them and whatever befalls the processes."""

from __future__ import annotations

import contextlib
import gc
import itertools
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from data_sets import encoded, make, random_image, take
from support import assert_same

from jaxgen import data
from jaxgen.data import folder, loader, workers
from jaxgen.errors import RunError, UserError

CODE = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from jaxgen import data
from jaxgen.data import loader
batches = data.batches({'source': 'folder:%s', 'dir': '%s', 'size': 12, 'channels': 3, 'direct': 0, 'cache_mb': 0,
    'batch': 16, 'crop': 'random', 'processes': 2, 'max_corrupt': 0.2}, 'train', seed=0)
for _ in range(3):
    next(batches)
print(*[worker.process.pid for worker in batches.examples.workers.pool.workers], flush=True)
"""


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """A folder of 64 files: JPEG and PNG of several sizes, two of which are damaged."""
    path = tmp_path_factory.mktemp('images')
    for i in range(64):
        image = random_image(i, 12 + i % 3, 20 - i % 5)
        form = 'JPEG' if i % 2 else 'PNG'
        content = encoded(image, form)
        content = content[: len(content) // 2] if i in (5, 40) else content
        (path / f'{i}.{form.lower()}').write_bytes(content)
    return path


@pytest.fixture
def section(images, tmp_path):
    fields = {'size': 12, 'channels': 3, 'batch': 16, 'flip': True, 'cache_mb': 0, 'direct': 0, 'max_corrupt': 0.2}
    return make(tmp_path, source=f'folder:{images}', threads=1, test_fraction=0.01, **fields)


def pids(batches) -> list[int]:
    return [worker.process.pid for worker in batches.examples.workers.pool.workers]


def is_running(pid: int) -> bool:
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError:
        return False


def wait(condition, seconds: float = 20) -> bool:
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize(
    'fields',
    [
        {},
        {'crop': 'random', 'jitter': 3, 'size': (10, 8), 'batch': 40},
        {'crop': 'resized', 'crop_rate': 0.5, 'channels': 1, 'batch': 9},
        {'pad': 2, 'shift': 0.2, 'fill': 'edge', 'white': 200, 'binarise': 'dynamic'},
        {'size': 4, 'draft': 1, 'low_resolution': 2, 'features': ('image', 'low_resolution'), 'binarise': 'fixed'},
        {'box': (1, 2, 8, 9), 'cache_mb': 512},
    ],
)
def test_the_same_batches_by_processes(section, fields):
    config = {**section, **fields}
    expected = take({**config, 'processes': 0}, 7, start=2)
    assert_same(expected, take({**config, 'processes': 2, 'threads': 3}, 7, start=2))


def test_damaged_examples_are_the_same(section, capsys):
    seen = {}
    for processes in (0, 1):
        folder.announced.clear()
        examples = data.dataset({**section, 'processes': processes}, 'train')
        batch = examples.take(np.arange(len(examples)))
        seen[processes] = batch['image'].tobytes(), sorted(examples.corrupt.items())
        lines = sorted(line for line in capsys.readouterr().err.splitlines() if 'cannot be decoded' in line)
        seen[processes] += (lines,)
        examples.close()
    assert seen[0] == seen[1] and len(seen[0][1]) == 2 == len(seen[0][2])
    config = {**section, 'max_corrupt': 0.01, 'processes': 1}
    with pytest.raises(RunError, match=r'more than config\.data\.max_corrupt'):
        take(config, 8)
    with pytest.raises(UserError, match=r'config.data.box = \(0, 0, 13, 5\)'):  # some of the images have 12 rows
        take({**section, 'box': (0, 0, 13, 5), 'processes': 1}, 8)


def test_a_killed_process_is_replaced(section, monkeypatch):
    monkeypatch.setattr(workers, 'TRIES', 100)  # of one task, all of which may be killed here
    config = {**section, 'crop': 'random'}
    expected = take({**config, 'processes': 0}, 12)
    with contextlib.closing(data.batches({**config, 'processes': 2}, seed=0)) as batches:
        found = [next(batches)]
        for _ in range(11):
            with contextlib.suppress(ProcessLookupError):  # the last one has ended, and another is being started
                os.kill(pids(batches)[0], signal.SIGKILL)
            found.append(next(batches))
        running = pids(batches)
    assert_same(expected, found)
    assert not any(map(is_running, running))


def test_a_stopped_process_is_replaced(section, monkeypatch):
    """One that is at work is not, however long that takes."""
    monkeypatch.setattr(workers, 'TRIES', 100)
    monkeypatch.setattr(workers, 'WATCH', 0.2)
    config = {**section, 'crop': 'random'}
    expected = take({**config, 'processes': 0}, 8)
    with contextlib.closing(data.batches({**config, 'processes': 1}, seed=0)) as batches:
        found = [next(batches)]
        (stopped,) = pids(batches)
        monkeypatch.setattr(workers, 'PATIENCE', 0.6)
        os.kill(stopped, signal.SIGSTOP)
        found += [next(batches) for _ in range(7)]
        assert pids(batches) != [stopped]
    assert_same(expected, found)
    line = workers.Line.__new__(workers.Line)  # of a process that is at work on one image
    ours, its = socket.socketpair()
    with ours, its, contextlib.closing(mmap.mmap(-1, 16)) as memory:
        ours.settimeout(0.05)
        line.used, line.pid, line.map, line.places, line.task = ours, os.getpid(), memory, ([], 0), None
        line.worker = types.SimpleNamespace(lines=[line])
        monkeypatch.setattr(workers, 'PATIENCE', 0.4)
        timer = threading.Timer(1.5, its.sendall, [b'.'])
        timer.start()
        work = threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(lambda: timer.is_alive(), False)])
        work.start()
        assert line.answered()
        work.join()


def test_processes_that_keep_ending_end_the_run_in_a_line(section, monkeypatch):
    """As where the system has no memory for them."""
    with contextlib.closing(data.batches({**section, 'crop': 'random', 'processes': 1}, seed=0)) as batches:
        next(batches)
        monkeypatch.setattr(workers, 'START', 'import os; os.kill(os.getpid(), 9)  # {path} {lines} {parent}')
        os.kill(pids(batches)[0], signal.SIGKILL)
        with pytest.raises(RunError, match=r'processes .* have ended.*SIGKILL.*config\.data\.processes') as caught:
            list(itertools.islice(batches, 50))
        assert '\n' not in str(caught.value)


def open_files() -> set[tuple[int, int]]:
    """Device and inode of the pipes, sockets and memory that this process has open."""
    identities = set()
    for number in os.listdir('/proc/self/fd'):
        path = f'/proc/self/fd/{number}'
        with contextlib.suppress(OSError):  # the listing's own, and what another thread has closed
            if os.readlink(path).startswith(('pipe:', 'socket:', '/dev/shm/', '/memfd:')):
                identities.add((os.stat(path).st_dev, os.stat(path).st_ino))
    return identities


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc')
def test_closing_leaves_no_file_open(section):
    """Nor memory, at once."""
    taken = data.dataset({**section, 'processes': 2}, 'train')
    before = open_files()  # some of earlier tests may be closed meanwhile
    gc.disable()
    try:
        taken.take(np.arange(16))
        assert open_files() - before
        taken.close()
        assert not open_files() - before
    finally:
        gc.enable()


def test_files_are_left_for_the_rest(section, monkeypatch):
    """Where the system allows few: those of images, checkpoints and compiled programs."""
    limits = {resource.RLIMIT_NOFILE: (27, 4096)}
    monkeypatch.setattr(resource, 'getrlimit', limits.__getitem__)
    with contextlib.closing(data.batches({**section, 'processes': 6}, seed=0)) as batches:
        next(batches)
        assert len(pids(batches)) == 2
    limits[resource.RLIMIT_NOFILE] = (resource.RLIM_INFINITY,) * 2
    assert workers.most_workers() > 1000


@pytest.mark.parametrize('executable', ['', '/nowhere/python', sys.executable])
def test_threads_decode_where_no_process_can_be_started(section, monkeypatch, capsys, executable):
    expected = take({**section, 'processes': 0}, 5)
    folder.announced.clear()
    monkeypatch.setattr(sys, 'executable', executable)
    monkeypatch.setattr(workers, 'START', 'raise SystemExit(3)  # {path} {lines} {parent}')
    assert_same(expected, take({**section, 'processes': 3}, 5))
    lines = [line for line in capsys.readouterr().err.splitlines() if 'no processes that decode' in line]
    assert len(lines) == 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='there is no fork')
def test_a_forked_process_decodes_by_itself(section):
    """In a program of its own: here jax has threads."""
    code = FORK.format(section={**section, 'processes': 1})
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ['forked', 'True', 'parent', 'True'], done.stderr


FORK = """
import os, warnings
import numpy as np
from jaxgen import data
warnings.simplefilter('ignore')
examples = data.dataset({section}, 'train')
first = examples.take(np.arange(16))['image']
process = examples.workers.pool.workers[0].process
if not (child := os.fork()):
    print('forked', np.array_equal(examples.take(np.arange(16))['image'], first), flush=True)
    raise SystemExit
os.waitpid(child, 0)
print('parent', process.poll() is None and np.array_equal(examples.take(np.arange(16))['image'], first), flush=True)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc')
@pytest.mark.parametrize(
    'how', ['SIGKILL', 'SIGINT', *(pytest.param(how, marks=pytest.mark.slow) for how in ('SIGTERM', 'end'))]
)
def test_no_process_outlives_its_parent(images, tmp_path, how):
    """Of a program that is no file, so that no process could import it; Ctrl-C reaches all of a terminal's."""
    before = set(os.listdir('/dev/shm'))
    code = CODE % (images, tmp_path) + ('time.sleep(60)' if how != 'end' else '')
    with subprocess.Popen(
        [sys.executable, '-c', code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        running = list(map(int, parent.stdout.readline().split()))
        assert len(running) == 2, parent.stderr.read()
        if how == 'SIGINT':
            os.killpg(parent.pid, signal.SIGINT)
        elif how != 'end':
            os.kill(parent.pid, getattr(signal, how))
        errors = parent.communicate(timeout=30)[1]
    assert wait(lambda: not any(map(is_running, running)))
    assert set(os.listdir('/dev/shm')) <= before
    assert errors.count('Traceback') == (how == 'SIGINT'), errors


def test_processes_import_neither_jax_nor_data_sets():
    code = 'import sys; from jaxgen.data import workers; print(*sys.modules)'
    modules = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert not {'jax', 'grain', 'flax', 'tensorflow_datasets', 'sklearn'} & set(modules)


def test_how_many_processes():
    cores = workers.cores()
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    assert loader.number_of_processes(None, 10) == 0 and loader.number_of_processes(3, 10) == 3
    assert loader.number_of_processes(None, 10**6) == (0 if cores < 2 else min(cores, loader.MOST_PROCESSES))
    assert loader.number_of_threads(0) == cores and loader.number_of_threads(7) == 7


@pytest.mark.parametrize(
    'files, groups, expected',
    [
        ({}, '0::/\n', float('inf')),
        ({'cpu.max': 'max 100000\n'}, '0::/\n', float('inf')),
        ({'cpu.max': '150000 100000\n'}, '0::/\n', 1.5),
        ({'a/cpu.max': '300000 100000\n', 'a/b/cpu.max': '800000 100000\n'}, '0::/a/b\n', 3),
        ({'a/cpu.max': '300000 100000\n', 'a/b/cpu.max': 'max 100000\n'}, '0::/a\n', 3),
        ({'cpu/x/cpu.cfs_quota_us': '50000\n', 'cpu/x/cpu.cfs_period_us': '100000\n'}, '4:cpu,cpuacct:/x\n', 0.5),
        ({'cpu/x/cpu.cfs_quota_us': '-1\n', 'cpu/x/cpu.cfs_period_us': '100000\n'}, '4:cpu:/x\n', float('inf')),
        ({'cpu.max': 'nonsense\n'}, 'nonsense\n', float('inf')),
    ],
)
def test_the_quota_of_control_groups(tmp_path, files, groups, expected):
    for name, text in files.items():
        os.makedirs((tmp_path / name).parent, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / 'own').write_text(groups)
    assert workers.quota(str(tmp_path), str(tmp_path / 'own')) == expected
