"""Checkpoints: the only file that imports orbax.

A checkpoint holds the fields of State as separate items, so that sampling reads only what it needs, and `about` (JSON):
step, number of training examples, the tree's names, shapes and dtypes, the meter, versions. Saving goes on in the
background. When it has ended, a digest of the files is written to `digests/<step>.json`, because Orbax restores a
flipped bit without an error.

Mistakes and faults are distinguished: a tree that does not fit the config is the person's mistake, and the message
names the weights; a checkpoint that cannot be read is a fault, and the one before it is used, with a warning. If there
are checkpoints and none can be read, no new training is started beside them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgen import files, log, memory, origin, sharding
from jaxgen.contract import State
from jaxgen.errors import RunError, UserError


class OrbaxWarnings(logging.Filter):
    """A filter that keeps Orbax's log off the screen (lines about every save, and a traceback of every exception)
    and stores its warnings, some of which are of checkpoints that cannot be read. `take` returns and removes them."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if 'orbax' not in record.pathname:
            return True
        if record.levelno >= logging.WARNING:
            self.lines = [*self.lines[-9:], ' '.join(record.getMessage().split())[:300]]
        return False

    def take(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


ORBAX_WARNINGS = OrbaxWarnings()
logging.getLogger('absl').addFilter(ORBAX_WARNINGS)
# When one write fails, the concurrent ones are dropped with their exceptions: that of the save is reported.
logging.getLogger('asyncio').addFilter(lambda record: 'was never retrieved' not in record.getMessage())


def print_unraisable(what, default=sys.__unraisablehook__) -> None:
    """sys.unraisablehook of a process that saves. When one write fails, the concurrent ones report to a closed event
    loop, one traceback each; the failure itself is raised where the save is waited for."""
    closed = str(what.exc_value) == 'Event loop is closed'
    again = isinstance(what.exc_value, OSError) and no_space(what.exc_value)  # of files that are closed unwritten
    if not (closed or again):
        default(what)


ITEMS = ('params', 'opt', 'ema', 'extra')
PIECE = 2**25  # bytes of a piece of an array of published weights, in which it is written and read
# Of two saves at once in one process, by trainings in two threads, Orbax loses files of one.
ONE_AT_A_TIME = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Deferred:
    """An array that is read when it is written to a checkpoint, and released afterwards."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    order: tuple = ()  # in which arrays are read: their places in a file

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class DeferredHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Deferred` arrays one after another, small ones together, so that few are in memory at a time."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _background_serialize(self, values, infos, args=None):
        rows = sorted(zip(values, infos, args, strict=True), key=lambda row: row[0].order)
        while rows:
            sizes = itertools.accumulate(value.nbytes for value, _, _ in rows)
            n = max(sum(size <= 2 * PIECE for size in sizes), 1)
            together, rows = rows[:n], rows[n:]
            arrays = [await asyncio.to_thread(value.read) for value, _, _ in together]
            await super()._background_serialize(arrays, [row[1] for row in together], [row[2] for row in together])
            del arrays


def deferred_handlers() -> dict[str, Any]:
    """Handlers of the items of a checkpoint whose trees are of `Deferred` arrays. Weights can hardly be compressed, so
    their numbers are not."""
    registry = ocp.type_handlers.create_type_handler_registry((Deferred, DeferredHandler()))
    handlers = {
        item: ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry) for item in ITEMS
    }
    return {**handlers, 'about': ocp.JsonCheckpointHandler()}


def save_args(tree):
    """Orbax's arguments of saving a tree, of arrays or of `Deferred` ones."""
    if not any(isinstance(leaf, Deferred) for leaf in jax.tree.leaves(tree)):
        return ocp.args.StandardSave(tree)
    pieces = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=PIECE), tree)
    return ocp.args.PyTreeSave(tree, save_args=pieces, ocdbt_target_data_file_size=4 * PIECE)


def describe_tree(tree) -> dict[str, list]:
    """{path: [shape, dtype]} of every leaf, as JSON holds it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): [list(leaf.shape), str(np.dtype(leaf.dtype))] for path, leaf in leaves}


# Published weights have no optimiser's state: what is averaged in training is in `ema` alone, and `params` holds those
# of the other networks (a discriminator) that were published.
IMPORTED_ITEMS = ('params', 'ema', 'extra')


def with_dtypes(tree, saved: dict[str, list]):
    """Shapes with the dtypes that a checkpoint of published weights says, where both are real numbers: a file's dtype
    is kept."""

    def one(path, leaf):
        dtype = saved.get(jax.tree_util.keystr(path), [None, ''])[1]
        real = dtype in ('float16', 'bfloat16', 'float32') and jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        return jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype)) if real else leaf

    return jax.tree_util.tree_map_with_path(one, tree)


def saved_networks(params, saved: dict[str, list]) -> dict:
    """Those of `params` {network: weights} that a tree of names as of `describe_tree` has."""

    def is_saved(name: str) -> bool:
        return any(key.startswith(f"['params']['{name}']") for key in saved)

    return {name: tree for name, tree in (params or {}).items() if is_saved(name)}


def has_arrays(tree) -> bool:
    """Whether a tree has leaves."""
    return bool(jax.tree.leaves(tree))


def digest(folder: str) -> dict[str, str]:
    """{relative path: SHA-256} of every file in a folder.

    Raises:
      ValueError: it holds a link, a pipe or a device, through which other data than the run's would be read.
    """
    sums = {}
    for root, folders, names in os.walk(folder, onerror=reraise):
        for name in folders + names:
            path = os.path.join(root, name)
            kind = os.lstat(path).st_mode
            if stat.S_ISREG(kind):
                with open(path, 'rb') as file:
                    sums[os.path.relpath(path, folder)] = hashlib.file_digest(file, 'sha256').hexdigest()
            elif not stat.S_ISDIR(kind):
                raise ValueError(f'{path} is a link or no file: a run holds its own files only')
    return sums


def reraise(e: OSError) -> None:
    raise e


# Paths that Orbax, etils and TensorStore read literally. Brackets are a pattern for them, a backslash is a slash, gs:/
# and /gs/ are a bucket, and bytes that are not UTF-8 an error.
PLAIN = re.compile(r'(?!/(gs|s3|az|hf)/)[\w/.,+=@#%~ -]+', re.ASCII)


@contextlib.contextmanager
def plain_path(folder: str):
    """A path of an existing folder that the checkpoint library reads literally, whatever the folder's name: its own
    where it is plain, else that of a descriptor, which is closed with the block.

    Raises:
      UserError: the system has no such paths.
    """
    if PLAIN.fullmatch(folder) and len(folder) < 3000:
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        path = f'/proc/self/fd/{descriptor}'
        if not os.path.isdir(path):
            raise UserError(
                f'--workdir: checkpoints cannot be kept in {folder!r} on this system: use a path of letters, digits, '
                'spaces and -_.,+=@#%~'
            )
        yield path
    finally:
        os.close(descriptor)


def count_arrays(folder: str) -> int:
    """Number of arrays in a saved tree, by the index of its key-value store."""
    spec = {'driver': 'ocdbt', 'base': {'driver': 'file', 'path': folder + '/'}}
    store = tensorstore.KvStore.open(spec).result()
    return sum(key.endswith(b'.zarray') for key in store.list().result())


def no_space(e: BaseException) -> str:
    """The reason of a failed write where it is a lack of space, else ''."""
    reasons = {
        errno.ENOSPC: 'the disk is full',
        errno.EFBIG: 'the file is too large',
        errno.EDQUOT: 'the quota is used up',
    }
    is_it = (m for n, m in reasons.items() if getattr(e, 'errno', None) == n or os.strerror(n) in str(e))
    return next(is_it, '')


def stopped(workdir: str, e: OSError) -> RunError:
    """The error about a file of a run that could not be written or read, with the newest intact checkpoint."""
    reason = no_space(e) or e.strerror or ' '.join(str(e).split())[:300]
    where = f' ({e.filename})' if e.filename else ''
    good = []
    with contextlib.suppress(OSError):
        saved = os.listdir(os.path.join(workdir, 'digests'))
        good = [s for s in os.listdir(os.path.join(workdir, 'checkpoints')) if s.isdigit() and f'{s}.json' in saved]
    last = f'the checkpoint of step {max(good, key=int)} is intact' if good else 'there is no checkpoint yet'
    return RunError(
        f'{reason}{where}; {last}: {"free space" if no_space(e) else "see to it"} and run the same command again'
    )


class Kept:
    """Orbax's policy of which checkpoints stay: the newest, those at multiples of an interval, and the best."""

    def __init__(self, keep: int, keep_every: int):
        self.keep, self.keep_every = keep, keep_every
        self.best = -1  # its step; -1: there is none

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        newest = len(checkpoints) - self.keep
        periodic = [self.keep_every and info.step % self.keep_every == 0 for info in checkpoints]
        return [
            i >= newest or bool(at) or info.step == self.best
            for i, (info, at) in enumerate(zip(checkpoints, periodic, strict=True))
        ]


def restored_part(where: str, target, biggest: int, total: int, partial: bool):
    """The arrays of a saved tree that are in `target`: all of them, or with `partial` some."""
    in_flight = max(2 * PIECE, biggest + 1, total // 16) / 1e9
    if partial:
        handler: Any = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=in_flight)
        how = ocp.checkpoint_utils.construct_restore_args(target)
        args: Any = ocp.args.PyTreeRestore(item=target, restore_args=how, partial_restore=True)
    else:
        handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=in_flight)
        args = ocp.args.StandardRestore(target)
    with memory.returned(), ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(where, args=args)


class Checkpoints:
    """The checkpoints of one run. With `keep` = 0 it only reads; with `deferred` it saves `Deferred` arrays."""

    def __init__(self, workdir: str, keep: int = 0, keep_every: int = 0, deferred: bool = False):
        self.folder = os.path.abspath(os.path.join(workdir, 'checkpoints'))
        self.digests = os.path.abspath(os.path.join(workdir, 'digests'))
        self.writes = keep > 0
        origin.check_layout(workdir, deep=False)
        if self.writes:
            os.makedirs(self.folder, exist_ok=True)
            os.makedirs(self.digests, exist_ok=True)
        self.kept = Kept(keep, keep_every)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self.kept if self.writes else None,
            create=self.writes,
            read_only=not self.writes,
            cleanup_tmp_directories=self.writes,
        )
        self.closing = contextlib.ExitStack()
        self.manager: Any = None  # of Orbax; None where there is no folder
        if os.path.isdir(self.folder):
            self.path = self.closing.enter_context(plain_path(self.folder))
            handlers = deferred_handlers() if deferred else None
            self.manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)
        self.thread: threading.Thread | None = None
        self.fault: BaseException | None = None
        self.lock = threading.RLock()  # the watcher of signals saves too

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        return sorted(self.manager.all_steps()) if self.manager else []

    def check_space(self, step: int, state: State) -> None:
        """Raises RunError before anything is written, where the disk is clearly too full."""
        need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if shutil.disk_usage(self.folder).free < need:
            raise self.failed(step, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def save(self, state: State, about: dict) -> None:
        """Starts saving; returns when the arrays have been copied and `state` may be donated.

        Raises:
          RunError: this or the save before it failed, with the reason.
        """
        with self.lock:
            self.wait()
            step = int(state.step)
            if step in self.steps():
                return
            self.check_space(step, state)
            tree = {item: getattr(state, item) for item in ITEMS if has_arrays(getattr(state, item))}
            about = {'step': step, 'tree': describe_tree(tree), **about}
            arrays = {item: len(jax.tree.leaves(value)) for item, value in tree.items()}
            items = {item: save_args(value) for item, value in tree.items()}
            ONE_AT_A_TIME.acquire()  # `finish` releases it
            try:
                ORBAX_WARNINGS.take()
                self.manager.save(step, args=ocp.args.Composite(**items, about=ocp.args.JsonSave(about)), force=True)
                self.thread = threading.Thread(target=self.finish, args=(step, arrays), name=f'checkpoint-{step}')
                self.thread.start()
            except BaseException as e:
                ONE_AT_A_TIME.release()
                if isinstance(e, Exception):
                    raise self.failed(step, e) from e
                raise

    def finish(self, step: int, arrays: dict[str, int]) -> None:
        """Waits for the files of a save, checks that they can be read and writes their digest.

        Args:
          arrays: number of arrays of each item.
        """
        try:
            try:
                self.manager.wait_until_finished()
                warnings = ORBAX_WARNINGS.take()
            finally:
                ONE_AT_A_TIME.release()
            if jax.process_index() == 0:
                for item, n in arrays.items():
                    readable = count_arrays(os.path.join(self.path, str(step), item))
                    if readable != n:
                        raise OSError(f'of {n} arrays of {item!r} {readable} can be read back; {"; ".join(warnings)}')
                for line in dict.fromkeys(warnings):
                    log.say(f'WARNING: the checkpoint of step {step} is saved, with a warning: {line}')
                files.save_json(
                    os.path.join(self.digests, f'{step}.json'), digest(os.path.join(self.folder, str(step)))
                )
                self.remove_stale_digests()
        except UserError as e:  # of what is read while it is saved
            self.fault = e
        except BaseException as e:
            self.fault = self.failed(step, e)

    def remove_stale_digests(self) -> None:
        """Removes the digests of checkpoints that are no longer there, and nothing else."""
        for name in os.listdir(self.digests):
            path, step = os.path.join(self.digests, name), re.fullmatch(r'([0-9]+)\.json', name)
            if step and os.path.isfile(path) and not os.path.isdir(os.path.join(self.folder, step[1])):
                os.remove(path)

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
          RunError: it failed.
        """
        with self.lock:
            if self.thread is not None:
                self.thread.join()
                self.thread = None
            if self.fault is not None:
                fault, self.fault = self.fault, None
                raise fault

    def failed(self, step: int, e: BaseException) -> RunError:
        """The error about a checkpoint that could not be saved."""
        text = ' '.join(str(e).split())
        reason = no_space(e)
        good = [s for s in self.steps() if s != step]
        again = 'free space and run' if reason else 'run'
        last = f'step {good[-1]} is intact: {again} the same command again' if good else 'none was saved before'
        return RunError(f'checkpoint of step {step} could not be saved: {reason or text[:300]}; {last}')

    def trouble(self, step: int) -> str:
        """Why the files of a checkpoint are not those that were saved, or ''."""
        name = f'{step}.json'
        path = os.path.join(self.digests, name)
        try:
            sums = digest(os.path.join(self.folder, str(step)))
            if not os.path.exists(path):  # killed between the save and its digest: restoring will show it
                return ''
            with open(path, encoding='utf-8') as file:
                saved = json.load(file)
            if not isinstance(saved, dict) or not saved:
                raise ValueError('no table of sums')
        except PermissionError as e:
            raise RunError(f'checkpoint of step {step}: {e.filename} may not be read: make it readable') from e
        except FileNotFoundError:
            return 'files of it are gone'
        except OSError as e:
            return f'{e.filename or path} cannot be read ({e.strerror})'
        except (ValueError, RecursionError) as e:
            return f'it or its digest cannot be read ({" ".join(str(e).split())[:200]})'
        changed = sorted(k for k in saved if saved[k] != sums.get(k))  # a stray file beside them does no harm
        return f'{len(changed)} of its files changed since it was saved, {changed[0]} first' if changed else ''

    def restore_step(self, step: int, abstract: State, mesh, items: tuple[str, ...] = ITEMS) -> tuple[State, dict]:
        """The checkpoint of a step, as (state, about); the arguments are those of `restore`.

        Raises:
          UserError: there is none of this step, or it is of another model.
          RunError: it is damaged.
        """
        steps = self.steps()
        if step not in steps:
            there = f'there are those of {", ".join(map(str, steps))}' if steps else 'there is none yet'
            raise UserError(f'--step={step}: no such checkpoint in {self.folder}; {there}')
        problem = self.trouble(step)
        try:
            if not problem:
                return self.read(step, abstract, mesh, items)
        except (UserError, RunError, MemoryError):
            raise
        except Exception as e:
            problem = f'it cannot be read ({" ".join(str(e).split())[:200]})'
        raise RunError(f'checkpoint of step {step} is damaged: {problem}; leave --step out for the newest that is not')

    def restore(self, abstract: State, mesh, items: tuple[str, ...] = ITEMS) -> tuple[State, dict] | None:
        """The newest checkpoint that can be read, as (state, about); None if there is none at all.

        Args:
          abstract: State of ShapeDtypeStruct, what the config makes.
          mesh: where the arrays go, by sharding.over_weights.
          items: fields of State to read; the others are None.

        Raises:
          UserError: the checkpoint is of another model.
          RunError: there are checkpoints and none can be read.
        """
        steps = self.steps()
        damaged: list[int] = []
        for step in reversed(steps):
            problem, restored, fault = self.trouble(step), None, None
            if not problem:
                try:
                    restored = self.read(step, abstract, mesh, items)
                except (UserError, RunError, MemoryError):
                    raise
                except Exception as e:
                    fault, problem = e, f'it cannot be read ({" ".join(str(e).split())[:200]})'
            if restored:
                self.move_damaged(damaged)
                return restored
            if self.reloaded() != steps:  # a concurrent training has removed the checkpoint that was being read
                return self.restore(abstract, mesh, items)
            if fault and self.is_intact(step):  # the fault is not the files'
                raise RunError(
                    f'checkpoint of step {step} cannot be restored, though its files are as they were saved: '
                    f'{type(fault).__name__}: {" ".join(str(fault).split())[:300]}; nothing was changed'
                ) from fault
            log.say(f'WARNING: checkpoint of step {step} is damaged: {problem}')
            damaged.append(step)
        if steps:
            raise RunError(f'none of the checkpoints in {self.folder} can be read; nothing was started afresh')
        return None

    def reloaded(self) -> list[int]:
        """`steps`, read from the disk again."""
        self.manager.reload()
        return self.steps()

    def is_intact(self, step: int) -> bool:
        """Whether there is a digest of a checkpoint, and its files have it."""
        return os.path.exists(os.path.join(self.digests, f'{step}.json')) and not self.trouble(step)

    def move_damaged(self, damaged: list[int]) -> None:
        """Moves damaged checkpoints to `damaged/`: others will be saved at the same steps."""
        if not self.writes or not damaged:
            return
        if jax.process_index() == 0:
            aside = os.path.join(os.path.dirname(self.folder), 'damaged')
            os.makedirs(aside, exist_ok=True)
            for step in damaged:
                to = os.path.join(aside, f'{step}-{time.time_ns()}')
                os.rename(os.path.join(self.folder, str(step)), to)
                with contextlib.suppress(FileNotFoundError):
                    os.rename(os.path.join(self.digests, f'{step}.json'), f'{to}.json')
        sharding.barrier('move_damaged')
        self.manager.reload()

    def read(self, step: int, abstract: State, mesh, items: tuple[str, ...]) -> tuple[State, dict]:
        """(state, about) of the checkpoint of a step; see `restore`."""
        about = self.manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))['about']
        if about.get('step') != step or not isinstance(about.get('tree'), dict):
            raise ValueError('its description is not that of this step')
        weights_only = 'imported' in about and step == 0  # training saves none before its first update
        if weights_only:
            items = tuple(item for item in items if item in IMPORTED_ITEMS)
            abstract = abstract.replace(params=saved_networks(abstract.params, about['tree']))
        expected = {item: getattr(abstract, item) for item in items if has_arrays(getattr(abstract, item))}
        names = [f"['{item}']" for item in items]
        saved = {k: v for k, v in about['tree'].items() if any(k.startswith(n) for n in names)}
        if weights_only:
            expected = with_dtypes(expected, saved)
        here = describe_tree(expected)
        for key in sorted(saved.keys() | here.keys()):
            if saved.get(key) != here.get(key):
                raise UserError(
                    f'the checkpoint of step {step} is of another model: {key} is {saved.get(key, "absent")} there '
                    f'and {here.get(key, "absent")} by this config'
                )
        absent = [item for item in expected if not os.path.isdir(os.path.join(self.folder, str(step), item))]
        if absent and self.is_intact(step):  # left out by pack.py
            raise UserError(
                f'the checkpoint of step {step} was packed without {", ".join(absent)}: it is there to be used, and '
                'cannot be trained on'
            )
        shardings = sharding.over_weights(mesh, expected)
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), expected, shardings)
        restored = {item: self.restored(step, item, value) for item, value in target.items()}
        # Items without arrays are not saved: they are {} or None, as in `abstract`.
        rest = {item: getattr(abstract, item) if item in items else None for item in ITEMS}
        rest |= {item: restored[item] for item in expected}
        counter = jax.device_put(np.int32(about['step']), sharding.replicated(mesh))
        return State(step=counter, **rest), about

    def restored(self, step: int, item: str, target):
        """The arrays of an item, few of which are in flight at a time: what is restored is in memory once, and not a
        second time as it was read. Those that are an eighth of all or more come first, the largest before the others,
        while there is room for them twice."""
        sizes = {path: leaf.size * leaf.dtype.itemsize for path, leaf in jax.tree_util.tree_leaves_with_path(target)}
        total, where = sum(sizes.values()), os.path.join(self.path, str(step), item)
        large = sorted((path for path, size in sizes.items() if size > total / 8), key=lambda path: -sizes[path])
        in_dicts = all(isinstance(key, jax.tree_util.DictKey) for path in sizes for key in path)
        if not large or not in_dicts or total < PIECE:
            return restored_part(where, target, max(sizes.values()), total, False)
        flat = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(target)}
        names = [tuple(key.key for key in path) for path in large]
        done: dict[tuple, Any] = {}
        for part in (*([name] for name in names), [name for name in flat if name not in names]):
            tree = unflatten_dict({name: flat[name] for name in part})
            biggest = max((flat[name].size * flat[name].dtype.itemsize for name in part), default=0)
            done |= flatten_dict(restored_part(where, tree, biggest, total, True)) if part else {}
        whole = flatten_dict(target, keep_empty_nodes=True)
        return unflatten_dict({name: done.get(name, leaf) for name, leaf in whole.items()})

    def close(self) -> None:
        """Waits for the last save, and frees all resources."""
        self.wait()
        if self.manager:
            self.manager.close()
        self.closing.close()
