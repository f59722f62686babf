"""What frozen stages make of the training images, computed once instead of in every update, and kept on disk.

`Family.prepare` says what that is: latents of an autoencoder (the moments where they are drawn from a posterior), codes
of a quantiser. It is computed for each training image in each view that the augmentation may make of it
(data/views.py), and kept as a set (data/prepared.py) whose name is a digest of all that the values depend on: the
program, the weights that it reads, the examples, their preprocessing and the views. So runs share sets, and none reads
one of other weights or images.
"""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.interpreters import partial_eval

from jaxgen import files, log, sample, sharding
from jaxgen.assembly import Assembled, assemble
from jaxgen.data import loader, views
from jaxgen.data.prepared import (
    ABOUT,
    Feature,
    Layout,
    PreparedSet,
    file_path,
    make_room,
    missing,
    remove_leftovers,
    set_lock,
    write,
)
from jaxgen.data.records import stamp_beyond_identity
from jaxgen.directory import check_cycle
from jaxgen.errors import UserError
from jaxgen.metrics import features

FORMAT = 1  # of the files; another one, other sets
MOST_AT_ONCE = 64  # images that a device encodes at once
REMEDY = 'name another directory by config.data.prepared_dir, or set config.data.prepared=off'
ELSEWHERE = 'another host has no place for them'
AHEAD = 4  # batches of images that are decoded while others are encoded


class Program(NamedTuple):
    """`Family.prepare` as a program, by abstract evaluation."""

    features: dict[str, Feature]
    reads: tuple[str, ...]  # names of the batch
    stages: tuple[int, ...]  # which leaves of `frozen` it reads
    random: bool  # whether it draws random numbers
    text: str  # the same for the same program


class Plan(NamedTuple):
    """A set that a training can read."""

    program: Program
    layout: Layout
    examples: Any  # loader.Examples
    name: str  # of the set

    def line(self) -> str:
        """What is computed, in words."""
        layout = self.layout
        each = f', {layout.views} views of each' if layout.views > 1 else ''
        names = ', '.join(layout.features)
        return f'{names} of {layout.examples:,} images{each}, {layout.nbytes / 1e6:,.0f} MB'


def function(assembled: Assembled) -> Callable:
    """(frozen, batch as the loader gives it) -> {name: [n, ...]}."""
    prepare = assembled.family.prepare
    assert prepare is not None

    def call(frozen, batch):
        return prepare(frozen, sample.to_inside(batch), jax.random.key(0))

    return call


def analyse(assembled: Assembled) -> Program:
    """The program of a family that has one."""
    batch = {name: jax.ShapeDtypeStruct((2, *f.shape), f.dtype) for name, f in assembled.features.items()}
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), assembled.frozen)
    prepare = assembled.family.prepare
    assert prepare is not None

    def call(frozen, batch, rng):
        return prepare(frozen, sample.to_inside(batch), rng)

    closed, out = jax.make_jaxpr(call, return_shape=True)(frozen, batch, jax.eval_shape(lambda: jax.random.key(0)))
    names, stages = sorted(batch), len(jax.tree.leaves(frozen))
    images = [name in pictured(assembled) for name in names]
    made, read = {}, np.zeros(len(closed.jaxpr.invars), bool)
    for i, name in enumerate(sorted(out)):
        _, used = partial_eval.dce_jaxpr(closed.jaxpr, [j == i for j in range(len(out))])
        read |= np.array(used)
        by_view = any(u and image for u, image in zip(used[stages : stages + len(names)], images, strict=True))
        made[name] = Feature(out[name].shape[1:], np.dtype(out[name].dtype), by_view)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(out))
    return Program(
        made,
        tuple(name for name, used in zip(names, read[stages : stages + len(names)], strict=True) if used),
        tuple(int(i) for i in np.flatnonzero(read[:stages])),
        bool(read[stages + len(names) :].any()),
        program_text(jaxpr, closed.consts),
    )


def program_text(jaxpr, constants) -> str:
    """A text that is the same for the same program, whose constants are these."""
    digest = hashlib.sha256()
    for x in (*constants, *constants_within(jaxpr)):
        x = jax.random.key_data(x) if jax.dtypes.issubdtype(getattr(x, 'dtype', None), jax.dtypes.prng_key) else x
        digest.update(np.ascontiguousarray(x).tobytes())
    return re.sub(r'0x[0-9a-f]+', '', str(jaxpr)) + digest.hexdigest()  # without addresses of functions


def constants_within(jaxpr) -> Iterator[Any]:
    """Constants of the programs that a program calls, of which its text says only the shape, as of arrays within it."""
    for eqn in jaxpr.eqns:
        yield from (x.val for x in eqn.invars if hasattr(x, 'val'))
        for value in eqn.params.values():
            for called in value if isinstance(value, tuple | list) else (value,):
                if hasattr(called, 'eqns'):
                    yield from getattr(called, 'consts', ())
                    yield from constants_within(called)


def pictured(assembled: Assembled) -> set[str]:
    """Names of the batch's images, which the augmentation changes."""
    return {name for name, f in assembled.features.items() if len(f.shape) == 3}


def why_not(assembled: Assembled, program: Program | None = None) -> str:
    """Why nothing can be prepared for a config, whatever its data hold, '' where it can."""
    section = assembled.config.data
    if assembled.family.prepare is None:
        return f'{assembled.config.family} computes nothing of the images by frozen stages alone'
    if loader.OTHER in section.features:
        return f'config.data.features: images of a second source, {loader.OTHER!r}, come unpaired'
    if reason := views.why_none(section):
        return f'the views of an image are not few: {reason}'
    if program is not None and program.random:
        return 'its stages draw random numbers in encoding'
    return ''


def batch_features(assembled: Assembled) -> dict[str, jax.ShapeDtypeStruct]:
    """What an example of a training batch holds, where all that can be prepared is, unless config.data.prepared is
    'off'. Abstract weights will do."""
    spec = assembled.features
    if assembled.config.data.prepared == 'off' or why_not(assembled):
        return spec
    program = analyse(assembled)
    if why_not(assembled, program):
        return spec
    made = {name: jax.ShapeDtypeStruct(f.shape, f.dtype) for name, f in program.features.items()}
    return {name: f for name, f in spec.items() if name != 'image'} | made


def make_plan(assembled: Assembled, examples, program: Program) -> Plan:
    """The set for a config that `why_not` has nothing against."""
    section = assembled.config.data
    layout = Layout(len(examples), views.count(section), program.features)
    weights = jax.tree.leaves(assembled.frozen)
    about = {
        'format': FORMAT,
        'program': hashlib.sha256(program.text.encode()).hexdigest(),
        'weights': features.digest([weights[i] for i in program.stages]),
        'examples': [examples.identity, stamp_beyond_identity(examples.records), section.max_pixels],
        'reads': program.reads,
        'views': [views.choices(section), section.fill],
    }
    if texts := sorted(set(program.reads) & set(assembled.texts)):
        about['tokenizers'] = {name: assembled.tokenizers[name].digest() for name in texts}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return Plan(program, layout, examples, digest[:32])


def is_worth_it(assembled: Assembled, plan: Plan) -> bool:
    """Whether a training encodes more images than there are, in all their views."""
    c = assembled.config
    return plan.layout.examples * plan.layout.views < c.train.steps * c.data.batch


def too_large(assembled: Assembled, plan: Plan) -> str:
    """Why a set is larger than the person allows, or ''."""
    size, most = plan.layout.nbytes, assembled.config.data.prepared_gb
    if size > most * 1e9:
        return (
            f'they would take {size / 1e9:.3g} GB, more than config.data.prepared_gb = {most}: raise it, and name a '
            'directory with so much space by config.data.prepared_dir'
        )
    return ''


# --- the directory


def default_directory() -> str:
    """The directory of all sets in the person's cache directory."""
    return files.cache_directory('prepared')


def open_directory(section) -> str:
    """The directory of all sets, which is made where it is not there yet.

    Raises:
      UserError: it cannot be made, or others may write to it.
    """
    root = files.absolute(section.prepared_dir or default_directory())
    try:
        files.make_private(root)
        root = os.path.realpath(root)  # a link may be replaced
        problem = files.distrusted(root)
        if not problem and not os.access(root, os.W_OK):
            problem = f'{root} cannot be written to'
    except OSError as e:
        problem = f'{e.filename or root}: {e.strerror}'
    if problem:
        raise UserError(f'{problem}: {REMEDY}')
    return root


# --- computing


def prepared(assembled: Assembled, plan: Plan) -> PreparedSet | str:
    """The set of a plan, computed as far as it is not there yet, or why there is no place for it. All hosts must call
    it; those that see one file system share the work."""
    first, layout, opened = jax.process_index() == 0, plan.layout, None
    try:
        opened, reason = open_set(assembled.config.data, plan), ''
    except UserError as e:
        reason = str(e)
    if sharding.any_host(opened is None):
        return reason or ELSEWHERE
    assert opened is not None
    directory, lock, absent = opened
    if not sharding.any_host(bool(absent)):
        if first:
            log.say(f'read from {directory}: {plan.line()}')
        return PreparedSet(directory, layout, lock)
    if first:
        log.say(f'computed once, where each update would compute it: {plan.line()}')
    began = time.monotonic()
    mesh, frozen = assembled.mesh, assembled.frozen
    if jax.process_count() > 1:  # each host by itself: they may have different files to make
        mesh = sharding.make_mesh(1, jax.local_devices())
        frozen = jax.device_put(jax.tree.map(sharding.to_host, frozen), sharding.replicated(mesh))
    try:
        compute(assembled, plan, directory, absent, mesh, frozen)
    except OSError as e:
        reason = f'they cannot be written to {directory} ({e.strerror}): {REMEDY}'
    if sharding.any_host(bool(reason)):
        return reason or ELSEWHERE
    if first:
        log.say(f'computed in {time.monotonic() - began:.0f} s, and kept in {directory}')
    return PreparedSet(directory, layout, lock)


def open_set(section, plan: Plan) -> tuple[str, int, list[int]]:
    """(directory of a set, its lock, the files that are missing).

    Raises:
      UserError: there is no directory for it, or no space in it.
    """
    root, size = open_directory(section), plan.layout.nbytes
    directory = os.path.join(root, plan.name)
    try:
        lock = set_lock(directory)
        remove_leftovers(directory)
        absent = missing(directory, plan.layout)
        needed = sum(map(plan.layout.size, absent))
        others = make_room(root, plan.name, int(section.prepared_gb * 1e9) - size) if absent else 0
        free = shutil.disk_usage(root).free
    except OSError as e:
        raise UserError(f'{e.filename or directory}: {e.strerror}: {REMEDY}') from e
    if absent and others + size > section.prepared_gb * 1e9:
        raise UserError(
            f'trainings that run now read {others / 1e9:.3g} GB in {root}, and {size / 1e9:.3g} GB more are beyond '
            f'config.data.prepared_gb = {section.prepared_gb}: raise it, or {REMEDY}'
        )
    if free < needed:
        raise UserError(f'{root} has {free / 1e9:.3g} GB of space, and they take {needed / 1e9:.3g} more: {REMEDY}')
    return directory, lock, absent


def compute(assembled: Assembled, plan: Plan, directory: str, absent: list[int], mesh, frozen) -> None:
    """Computes the missing files of a set that no other process has written meanwhile.

    Raises:
      OSError: they cannot be written.
    """
    if absent and jax.process_index() == 0:
        about = {'features': plan.line(), 'config': assembled.config.to_dict()}
        files.save_json(os.path.join(directory, ABOUT), about)
    c, hosts = assembled.config, jax.process_count()
    each = max(min(c.data.batch // c.optim.accumulate // assembled.mesh.size, MOST_AT_ONCE), 1)
    call = sharding.jit(function(assembled), out_shardings=sharding.over_batch(mesh))
    # Processes that make one set begin at different files.
    start = int(len(absent) * (jax.process_index() / hosts if hosts > 1 else random.random()))
    rows = sum(len(plan.layout.examples_of(file)) for file in absent) * plan.layout.views
    with (
        log.bar(rows, 'prepared', quiet=jax.process_index() > 0 or not sys.stderr.isatty(), unit='view') as bar,
        concurrent.futures.ThreadPoolExecutor(loader.number_of_threads(c.data.threads)) as pool,
    ):
        for file in absent[start:] + absent[:start]:
            path, done = file_path(directory, file), len(plan.layout.examples_of(file)) * plan.layout.views
            if os.path.isfile(path) and os.path.getsize(path) == plan.layout.size(file):
                bar.update(done)
                continue
            write(directory, plan.layout, file, pieces(plan, file, each * mesh.size, mesh, frozen, call, pool, bar))


def pieces(
    plan: Plan, file: int, size: int, mesh, frozen, call: Callable, pool: concurrent.futures.Executor, bar
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(first row, {name: [rows, ...]}) of a file, see `data.prepared.write`, computed `size` rows at a time."""
    own, n = plan.layout.examples_of(file), plan.layout.views
    rows = len(own) * n

    def images(start: int) -> dict[str, np.ndarray]:
        number = np.minimum(np.arange(start, start + size), rows - 1)  # the last batch is filled up with copies
        batch = views.take(plan.examples, own.start + number // n, number % n)
        return {name: batch[name] for name in plan.program.reads}

    def result(start: int, made: dict) -> tuple[int, dict[str, np.ndarray]]:
        real = min(size, rows - start)
        arrays = {name: np.asarray(x)[:real] for name, x in made.items()}
        bar.update(real)
        return start, arrays

    running = None
    for start, batch in ahead(images, range(0, rows, size), pool):
        made = call(frozen, jax.device_put(batch, sharding.over_batch(mesh)))
        if running:
            yield result(*running)
        running = start, made
    if running:
        yield result(*running)


def ahead(make: Callable, items, pool: concurrent.futures.Executor) -> Iterator[tuple]:
    """(item, make(item)) in order, a few of them made in threads before they are needed."""
    waiting: collections.deque = collections.deque()
    for item in items:
        waiting.append((item, pool.submit(make, item)))
        if len(waiting) > AHEAD:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


# --- for training


def for_training(assembled: Assembled, examples) -> PreparedSet | None:
    """What a training reads in place of images, as config.data.prepared says; None: the images themselves.

    'auto' is for what is worth it, fits and can be written; a line says what stands against it. All hosts must call it.

    Raises:
      UserError: it is 'on', and nothing can be prepared.
    """
    wanted = assembled.config.data.prepared
    if wanted == 'off' or (wanted == 'auto' and assembled.family.prepare is None):
        return None
    chosen = plan_or_reason(assembled, examples, wanted)
    if isinstance(chosen, Plan):
        made = prepared(assembled, chosen)
        if isinstance(made, PreparedSet):
            return made
        chosen = made
    if wanted == 'on':
        raise UserError(f'config.data.prepared = on: {chosen}')
    if chosen and jax.process_index() == 0:
        log.say(f'frozen stages compute in every update: {chosen}')
    return None


def plan_or_reason(assembled: Assembled, examples, wanted: str) -> Plan | str:
    """The set for a config, or why there is none; '' where it would save nothing."""
    if reason := why_not(assembled):
        return reason
    program = analyse(assembled)
    if reason := why_not(assembled, program):
        return reason
    plan = make_plan(assembled, examples, program)
    if wanted == 'auto' and not is_worth_it(assembled, plan):
        return ''
    return too_large(assembled, plan) or plan


def prepare_mode(config, workdir: str) -> None:
    """Computes the set of a config's training.

    Raises:
      UserError: there is none, or no place for it.
    """
    config.data.prepared = 'on'
    check_cycle(workdir, config)
    assembled = assemble(config)
    sharding.check_batch(assembled.mesh, 'config.data.batch', config.data.batch)
    examples = assembled.dataset('train')
    for_training(assembled, examples)
    examples.close()
