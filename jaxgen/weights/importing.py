"""Published weights as a run at step 0, and a run's weights as a published file."""

from __future__ import annotations

import functools
import os
import re
import shutil
import time
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from ml_collections import ConfigDict

import jaxgen
from jaxgen import assembly, directory, files, interrupt, log, randomness, sharding
from jaxgen import config as configs
from jaxgen.checkpoint import Checkpoints
from jaxgen.contract import State
from jaxgen.errors import UserError
from jaxgen.networks.layers import group_count
from jaxgen.weights import mapping, sources
from jaxgen.weights.files import Weights, open_weights
from jaxgen.weights.source import Shapes, Source

RECORD = 'weights.json'  # in a run's directory: where its weights are from


def flat_shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the leaves of {'network': ..., 'extra': ...}."""
    return {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree, sep='/').items() if leaf is not None}


def published_part(state: State) -> dict[str, Any]:
    """What a file of weights holds of a state: its averaged networks by name, and 'extra'."""
    networks = {name: tree for name, tree in state.ema.items() if '@' not in name}
    return {**networks, **({'extra': state.extra} if isinstance(state.extra, dict) else {})}


def groups_of(width: int, groups: int, group_size: int) -> int:
    """The number of groups of a norm, 0 where they do not divide its channels."""
    return group_count(width, groups, group_size) if group_size or width % groups == 0 else 0


def other_fields(
    config: ConfigDict, source: Source, weights: Weights | None, shapes: Shapes
) -> dict[str, tuple[Any, Any]]:
    """{field: (value of the source, value here)} of fields that names cannot tell and that differ; groups of norms only
    where a norm of this width has another number of them."""
    resolved = config.to_dict()
    wrong = {
        field: (value, configs.get(resolved, field))
        for field, value in source.fields(config, weights).items()
        if configs.contains(resolved, field) and configs.get(resolved, field) != value
    }
    widths = {shape[-1] for path, shape in shapes.items() if path.endswith('/scale')}
    for section in {field.rpartition('.')[0] for field in wrong if field.endswith(('.groups', '.group_size'))}:
        here = {name: configs.get(resolved, f'{section}.{name}') for name in ('groups', 'group_size')}
        there = {name: wrong.get(f'{section}.{name}', (value,))[0] for name, value in here.items()}
        if all(groups_of(width, **here) == groups_of(width, **there) for width in widths):
            wrong = {field: two for field, two in wrong.items() if field.rpartition('.')[2] not in here}
    return wrong


def check_fields(config: ConfigDict, fit: sources.Fit) -> None:
    """Raises UserError where the config has other values than the source of fields that names cannot tell."""
    wrong = other_fields(config, fit.source, fit.weights, {entry.path: entry.shape for entry in fit.entries})
    if wrong:
        flags = ' '.join(f'--config.{field}={value}' for field, (value, _) in wrong.items())
        present = ', '.join(f'{field} = {ours}' for field, (_, ours) in wrong.items())
        raise UserError(
            f'{fit.weights.path}: the weights would load and compute something else, since {present} here: set {flags}'
        )


def placed(fit: sources.Fit, shardings: dict[str, Any]) -> dict[str, jax.Array]:
    """{path: array on the mesh} of a file's weights, read one after another, in the file's dtype."""
    arrays = {}
    with log.bar(len(fit.entries), 'reading', unit='array') as bar:
        for entry in fit.entries:
            arrays[entry.path] = jax.device_put(entry.read(fit.weights), shardings[entry.path])
            bar.update()
    return arrays


def initial(assembled: assembly.Assembled, paths: set[str], shardings: dict[str, Any]) -> dict[str, jax.Array]:
    """{path: array} of those arrays that no file holds, as before the first update."""
    if not paths:
        return {}
    spec = assembled.spec.features
    n = assembled.config.data.batch

    def init(rng, frozen):
        batch = {name: jnp.zeros((n, *feature.shape), feature.dtype) for name, feature in spec.items()}
        state = assembly.init_state(assembled.family, rng, batch, frozen)
        leaves = flatten_dict(published_part(state), sep='/')
        return {path: leaves[path] for path in paths}

    key = randomness.stream(jax.random.key(assembled.config.seed), 'init')
    made = sharding.jit(init, out_shardings={path: shardings[path] for path in paths})
    return made(key, assembled.frozen)


def stated_licence(path: str) -> str:
    """The licence in the front matter of the README.md beside the weights, or of the folder above; '' where none is."""
    folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
    for readme in (os.path.join(folder, 'README.md'), os.path.join(os.path.dirname(folder), 'README.md')):
        if os.path.isfile(readme):
            with open(readme, encoding='utf-8', errors='replace') as file:
                front = file.read(2**14).partition('---')[2].partition('---')[0]
            if stated := re.search(r'^license(?:_name)?:[ \t]*([\w.+ -]{1,80})$', front, re.MULTILINE):
                return stated[1].strip()
    return ''


def import_weights(config: ConfigDict, path: str, workdir: str, names: str = '', licence: str = '') -> None:
    """Writes the run `workdir`, at step 0, with the weights of a published file or folder.

    Args:
      config: of the network that the weights are of.
      names: of the source, one of `sources.SOURCES`; '': by the names in the file.
      licence: of the weights; '': that which a README.md beside them or else the source states.

    Raises:
      UserError: there is a run in `workdir`, the file cannot be read safely, or it does not fit the config.
    """
    workdir = os.path.expanduser(workdir)
    if os.path.exists(workdir) and (not os.path.isdir(workdir) or os.listdir(workdir)):
        raise UserError(f'--workdir={workdir} is there already and not empty: name another directory for the import')
    weights = open_weights(path)
    assembled = assembly.assemble(config)
    part = published_part(assembled.abstract)
    fit = sources.choose(config, flat_shapes(part), weights, names)
    check_fields(config, fit)
    mapping.check(fit.entries, fit.weights, fit.source.skip, f'{path} (names of {fit.source.name})')
    shardings = flatten_dict(sharding.over_weights(assembled.mesh, part), sep='/')
    kept = {path for path in shardings if fit.source.keeps_initial(path)}
    arrays = placed(fit, shardings) | initial(assembled, kept, shardings)
    empty = {path: x for path, x in flatten_dict(part, sep='/', keep_empty_nodes=True).items() if x is empty_node}
    tree = unflatten_dict({**arrays, **empty}, sep='/')
    extra = tree.pop('extra', None)
    averages = {f'{name}@{std}': tree[name] for name in list(tree) for std in config.optim.ema_std}
    licence = licence or stated_licence(weights.path) or fit.source.licence
    step = jax.device_put(np.int32(0), sharding.replicated(assembled.mesh))
    state = State(step=step, params={}, opt={}, ema={**tree, **averages}, extra=extra)
    record = {
        'source': fit.source.name,
        'title': fit.source.title,
        'file': os.path.basename(os.path.abspath(path)),
        'sha256': weights.sha256,
        'licence': licence,
        'jaxgen': jaxgen.__version__,
    }
    write_run(workdir, assembled, state, record)
    if re.search(r'non-?commercial|\bnc\b', licence, re.IGNORECASE):
        log.say(f'NOTE: these weights are under {licence}: not for commercial use')
    if fit.source.note:
        log.say(f'NOTE: {fit.source.note}')
    log.say(f'imported {sum(x.size for x in arrays.values()):,} numbers of {fit.source.title}: {workdir}')


def abandon(folder: str) -> None:
    """Removes what was written of a run and ends the process; it runs beside the writing."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            break
        time.sleep(0.05)
    interrupt.leave('stopped; nothing is left of the import')


def write_run(workdir: str, assembled: assembly.Assembled, state: State, record: dict[str, Any]) -> None:
    """Writes a run at step 0, whole or not at all."""
    parent = os.path.dirname(os.path.abspath(workdir))
    os.makedirs(parent, exist_ok=True)
    new = os.path.join(parent, f'.{uuid.uuid4().hex}.import')
    try:
        with interrupt.on_signal(functools.partial(abandon, new)):
            os.mkdir(new)
            about = {
                'jax': jax.__version__,
                'stages': assembled.stage_digests,
                'imported': record,
                'meter': log.Meter().state(),
                'examples': 0,
            }
            checkpoints = Checkpoints(new, keep=1)
            try:
                checkpoints.save(state, about)
            finally:  # it may be writing still, when the import is stopped
                checkpoints.close()
            files.save_json(os.path.join(new, RECORD), record)
            directory.save_config(new, assembled.config, assembled.spec)
            if os.path.isdir(workdir):
                os.rmdir(workdir)  # it is empty
            os.rename(new, workdir)
    finally:
        shutil.rmtree(new, ignore_errors=True)
