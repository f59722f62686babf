"""Checkpoints: the only file that imports orbax.

A checkpoint holds the fields of State as separate items, so that sampling reads only what it
needs, and `about` (JSON): step, examples seen, the tree's names, shapes and dtypes, the meter,
versions. Saving goes on in the background. When it has ended, a digest of the files is written
to `digests/<step>.json`, because Orbax restores a flipped bit without noticing.

What is wrong is told apart: a tree that does not fit the config is the person's error and names
the weights; a checkpoint that cannot be read is a fault, and the one before it is used, loudly.
If there are checkpoints and none can be read, nothing is started afresh beside them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxgen import log, sharding
from jaxgen.contract import State
from jaxgen.errors import RunError, UserError

# Orbax narrates every save, and prints the traceback of what it raises too.
logging.getLogger('absl').addFilter(lambda record: 'orbax' not in record.pathname)
# When one write fails, those beside it are dropped with their exceptions: the save's own says it all.
logging.getLogger('asyncio').addFilter(lambda record: 'was never retrieved' not in record.getMessage())


def print_unraisable(what, default=sys.__unraisablehook__) -> None:
    """sys.unraisablehook of a process that saves. When one write fails, the writes beside it report to an event
    loop that is gone, one traceback each; the failure itself is raised where the save is waited for."""
    if str(what.exc_value) != 'Event loop is closed':
        default(what)


ITEMS = ('params', 'opt', 'ema', 'extra')


def describe_tree(tree) -> dict[str, list]:
    """{path: [shape, dtype]} of every leaf, as JSON holds it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): [list(leaf.shape), str(np.dtype(leaf.dtype))] for path, leaf in leaves}


def has_leaves(tree) -> bool:
    return bool(jax.tree.leaves(tree))


def digest(folder: str) -> dict[str, str]:
    """{relative path: SHA-256} of every file in a folder."""
    found = {}
    for root, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(root, name)
            with open(path, 'rb') as file:
                found[os.path.relpath(path, folder)] = hashlib.file_digest(file, 'sha256').hexdigest()
    return found


class Checkpoints:
    """The checkpoints of one run. With `keep` = 0 it only reads."""

    def __init__(self, workdir: str, keep: int = 0, keep_every: int = 0):
        self.folder = os.path.abspath(os.path.join(workdir, 'checkpoints'))
        self.digests = os.path.abspath(os.path.join(workdir, 'digests'))
        self.writes = keep > 0
        if self.writes:
            os.makedirs(self.folder, exist_ok=True)
            os.makedirs(self.digests, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None,
            keep_period=keep_every or None,
            create=self.writes,
            read_only=not self.writes,
            cleanup_tmp_directories=self.writes,
        )
        exists = os.path.isdir(self.folder)
        self.manager = ocp.CheckpointManager(self.folder, options=options) if exists else None
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
            tree = {item: getattr(state, item) for item in ITEMS if has_leaves(getattr(state, item))}
            about = {'step': step, 'tree': describe_tree(tree), **about}
            items = {item: ocp.args.StandardSave(value) for item, value in tree.items()}
            try:
                self.manager.save(step, args=ocp.args.Composite(**items, about=ocp.args.JsonSave(about)), force=True)
            except Exception as e:
                raise self.failed(step, e) from e
            self.thread = threading.Thread(target=self.finish, args=(step,), name=f'checkpoint-{step}')
            self.thread.start()

    def finish(self, step: int) -> None:
        """Waits for the files of a save and writes their digest."""
        try:
            self.manager.wait_until_finished()
            if jax.process_index() == 0:
                log.save_json(os.path.join(self.digests, f'{step}.json'), digest(os.path.join(self.folder, str(step))))
                for name in os.listdir(self.digests):
                    if not os.path.isdir(os.path.join(self.folder, name.removesuffix('.json'))):
                        os.remove(os.path.join(self.digests, name))
        except BaseException as e:
            self.fault = self.failed(step, e)

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
        numbers = {
            errno.ENOSPC: 'the disk is full',
            errno.EFBIG: 'the file is too large',
            errno.EDQUOT: 'the quota is used up',
        }
        text = ' '.join(str(e).split())
        reason = next((m for n, m in numbers.items() if getattr(e, 'errno', None) == n or os.strerror(n) in text), '')
        good = [s for s in self.steps() if s != step]
        return RunError(
            f'checkpoint of step {step} could not be saved: {reason or text[:300]}; '
            + (
                f'step {good[-1]} is intact: free space and run the same command again'
                if good
                else 'none was saved before'
            )
        )

    def trouble(self, step: int) -> str:
        """Why the files of a checkpoint are not those that were saved, or ''."""
        path = os.path.join(self.digests, f'{step}.json')
        if not os.path.exists(path):  # killed between the save and its digest: reading it will tell
            return ''
        try:
            with open(path, encoding='utf-8') as file:
                saved = json.load(file)
        except (OSError, ValueError) as e:
            return f'its digest cannot be read ({e})'
        found = digest(os.path.join(self.folder, str(step)))
        changed = sorted(k for k in saved if saved[k] != found.get(k))  # a stray file beside them does no harm
        return f'{len(changed)} of its files changed since it was saved, {changed[0]} first' if changed else ''

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
        steps, damaged = self.steps(), []
        for step in reversed(steps):
            problem = self.trouble(step)
            if not problem:
                try:
                    found = self.read(step, abstract, mesh, items)
                    self.put_aside(damaged)
                    return found
                except UserError:
                    raise
                except Exception as e:
                    if os.path.exists(os.path.join(self.digests, f'{step}.json')):
                        raise  # the files are as they were saved: the fault is ours
                    problem = f'it cannot be read ({" ".join(str(e).split())[:200]})'
            if not os.path.isdir(os.path.join(self.folder, str(step))):  # a training beside us went on meanwhile
                self.manager.reload()
                return self.restore(abstract, mesh, items)
            log.say(f'WARNING: checkpoint of step {step} is damaged: {problem}')
            damaged.append(step)
        if steps:
            raise RunError(f'none of the checkpoints in {self.folder} can be read; nothing was started afresh')
        return None

    def put_aside(self, damaged: list[int]) -> None:
        """Moves damaged checkpoints out of the way of those that will be saved at the same steps."""
        if not self.writes or not damaged:
            return
        if jax.process_index() == 0:
            aside = os.path.join(os.path.dirname(self.folder), 'damaged')
            os.makedirs(aside, exist_ok=True)
            for step in damaged:
                os.rename(os.path.join(self.folder, str(step)), os.path.join(aside, f'{step}-{time.time_ns()}'))
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(self.digests, f'{step}.json'))
        sharding.barrier('put_aside')
        self.manager.reload()

    def read(self, step: int, abstract: State, mesh, items: tuple[str, ...]) -> tuple[State, dict]:
        about = self.manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))['about']
        wanted = {item: getattr(abstract, item) for item in items if has_leaves(getattr(abstract, item))}
        names = [f"['{item}']" for item in items]
        saved = {k: v for k, v in about['tree'].items() if any(k.startswith(n) for n in names)}
        here = describe_tree(wanted)
        for key in sorted(saved.keys() | here.keys()):
            if saved.get(key) != here.get(key):
                raise UserError(
                    f'the checkpoint of step {step} is of another model: {key} is {saved.get(key, "absent")} there '
                    f'and {here.get(key, "absent")} by this config'
                )
        places = sharding.over_weights(mesh, wanted)
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), wanted, places)
        args = {item: ocp.args.StandardRestore(value) for item, value in target.items()}
        found = self.manager.restore(step, args=ocp.args.Composite(**args))
        # What has no arrays is not saved, and is what it is: {} or None.
        rest = {item: getattr(abstract, item) if item in items else None for item in ITEMS}
        rest |= {item: found[item] for item in wanted}
        counter = jax.device_put(np.int32(about['step']), sharding.replicated(mesh))
        return State(step=counter, **rest), about

    def close(self) -> None:
        self.wait()
        if self.manager:
            self.manager.close()
