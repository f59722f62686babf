"""Published weights as a run at step 0, and a run's weights as a published file."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from ml_collections import ConfigDict

import jaxgen
from jaxgen import assembly, directory, files, log, memory, randomness, sharding
from jaxgen import config as configs
from jaxgen.checkpoint import Checkpoints, Deferred
from jaxgen.contract import State, Texts
from jaxgen.diffusion.adapters import INVERSION, is_adapter
from jaxgen.errors import UserError
from jaxgen.networks.layers import group_count
from jaxgen.text.tokenizers import Tokenizer
from jaxgen.weights import mapping, pipelines, sources, text_encoders, whole
from jaxgen.weights.files import PIPELINE, Weights, open_weights
from jaxgen.weights.source import Shapes, Source

RECORD = 'weights.json'  # in a run's directory: where its weights are from


def flat_shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the leaves of {'network': ..., 'extra': ...}."""
    return {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree, sep='/').items() if leaf is not None}


def published_part(state: State) -> dict[str, Any]:
    """What a file of weights holds of a state: its averaged networks by name, and 'extra'."""
    networks = {name: tree for name, tree in state.ema.items() if '@' not in name}
    return {**networks, **({'extra': state.extra} if isinstance(state.extra, dict) else {})}


def other_networks(state: State) -> dict[str, Any]:
    """The networks of a state, or of what a checkpoint holds of them, that are not averaged: discriminators."""
    return {name: tree for name, tree in (state.params or {}).items() if name not in state.ema}


def groups_of(width: int, groups: int, group_size: int) -> int:
    """The number of groups of a norm, 0 where they do not divide its channels."""
    return group_count(width, groups, group_size) if group_size or width % groups == 0 else 0


def other_fields(
    config: ConfigDict, source: Source, weights: Weights | None, shapes: Shapes
) -> dict[str, tuple[Any, Any]]:
    """{field: (value of the source, value here)} of `Source.fields` that differ; groups of norms only where a norm of
    this width has another number of them."""
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


def check_fields(config: ConfigDict, fit: sources.Fit, discriminator: bool = False) -> None:
    """Says what is taken from the config of what names cannot tell.

    Raises:
      UserError: the config has other values of some fields than the source, or these weights.
    """
    source = fit.source
    if discriminator:
        source = dataclasses.replace(source, fields=source.discriminator_fields)
    wrong = other_fields(config, source, fit.weights, {entry.path: entry.shape for entry in fit.entries})
    if wrong:
        flags = ' '.join(f'--config.{field}={value}' for field, (value, _) in wrong.items())
        present = ', '.join(f'{field} = {ours}' for field, (_, ours) in wrong.items())
        raise UserError(
            f'{fit.weights.path}: the weights would load and compute something else, since {present} here: set {flags}'
            if not discriminator
            else f'{fit.weights.path} (the discriminator): {present} here: set {flags}'
        )
    if fit.present == 1 and not discriminator:
        for line in fit.source.remarks(config, fit.weights):
            log.say(f'NOTE: {line}')


def check_classes(fit: sources.Fit, classes: int) -> None:
    """Raises UserError where the weights are of another number of classes than the data."""
    name, axis, more = fit.source.classes
    tensor = fit.weights.tensors.get(name)
    if tensor is not None and len(tensor.shape) > axis and classes and tensor.shape[axis] - more != classes:
        raise UserError(
            f'{fit.weights.path}: the weights are of {tensor.shape[axis] - more} classes, and config.data has '
            f'{classes}: name data with as many as --config.data.source, or set --config.data.classes where they do '
            'not tell it'
        )


def deferred(fit: sources.Fit, shapes: Shapes, report: Callable[[], Any]) -> dict[str, Deferred]:
    """{path: array that is read from the file when it is written}; `report` is called after each."""

    def read(entry: mapping.Entry, dtype: np.dtype) -> np.ndarray:
        try:
            x = entry.read(fit.weights)
            if x.dtype != dtype:
                with np.errstate(over='ignore'):
                    x = mapping.finite(entry.names[0], x.astype(dtype))
        except UserError as e:
            raise UserError(f'{fit.weights.path}: {e}') from e
        report()
        return x

    arrays = {}
    for entry in fit.entries:
        own = entry.dtype(fit.weights)
        dtype = np.dtype(np.float32) if own == np.float64 else own
        read_it = functools.partial(read, entry, dtype)
        order = min(fit.weights[name].place for name in entry.names)
        arrays[entry.path] = Deferred(shapes[entry.path], dtype, read_it, order)
    return arrays


def initial(assembled: assembly.Assembled, paths: set[str]) -> dict[str, Deferred]:
    """{path: array} of those arrays that no file holds, as before the first update."""
    if not paths:
        return {}
    spec = assembled.features
    n = assembled.config.data.batch

    def init(rng, frozen):
        batch = {name: jnp.zeros((n, *feature.shape), feature.dtype) for name, feature in spec.items()}
        state = assembly.init_state(assembled.family, rng, batch, frozen)
        leaves = flatten_dict(published_part(state), sep='/')
        return {path: leaves[path] for path in paths}

    key = randomness.stream(jax.random.key(assembled.config.seed), 'init')
    made = sharding.jit(init, out_shardings=sharding.replicated(assembled.mesh))(key, assembled.frozen)
    arrays = {path: np.asarray(x) for path, x in made.items()}
    return {path: Deferred(x.shape, x.dtype, functools.partial(np.asarray, x)) for path, x in arrays.items()}


def stated_licence(path: str) -> str:
    """The licence in the front matter of the README.md beside the weights, or of their pipeline; '' where none is."""
    folder = os.path.abspath(path) if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
    above = os.path.dirname(folder)
    folders = [folder, *([above] if os.path.isfile(os.path.join(above, PIPELINE)) else [])]
    for readme in (os.path.join(one, 'README.md') for one in folders):
        if os.path.isfile(readme):
            with open(readme, encoding='utf-8', errors='replace') as file:
                front = file.read(2**14).partition('---')[2].partition('---')[0]
            if stated := re.search(r'^license(?:_name)?:[ \t]*([\w.+ -]{1,80})$', front, re.MULTILINE):
                return stated[1].strip()
    return ''


def find_discriminator(
    config: ConfigDict, fit: sources.Fit, shapes: Shapes, weights: Weights, path: str
) -> sources.Fit | None:
    """The published discriminator, from the file of the generator or its own; None: there is none to be had.

    Args:
      shapes: of our arrays, those of networks that are not averaged among them.
      weights: of the generator's file.
      path: the file of its own; ''.

    Raises:
      UserError: it does not fit, or has no place here.
    """
    apart = open_weights(path, '--discriminator') if path else None
    discriminator = sources.fit_discriminator(fit.source, config, shapes, weights, apart)
    if discriminator:
        check_fields(config, discriminator, True)
        skip = f'{fit.source.skip}|.*num_batches_tracked'
        what = f'{path or weights.path} (the discriminator, names of {fit.source.name})'
        mapping.check(discriminator.entries, discriminator.weights, skip, what)
    elif path:
        there = any(name.startswith('discriminator/') for name in shapes)
        why = f'{fit.source.title} has no names for one' if there else 'the networks of this config have none'
        raise UserError(f'--discriminator={path}: {why}: leave it out')
    return discriminator


def import_weights(
    config: ConfigDict,
    path: str,
    workdir: str,
    names: str = '',
    licence: str = '',
    discriminator: str = '',
    named: Set[str] = frozenset(),
    tokenizer: str = '',
) -> None:
    """Writes the run `workdir`, at step 0, with the weights of a published file or folder.

    Of a pipeline, or of a file that holds earlier stages too, these become runs in WORKDIR/stages.

    Args:
      config: of the network that the weights are of.
      names: of the source, one of `sources.SOURCES`; '': by the names in the file.
      licence: of the weights; '': that which a README.md beside them or else the source states.
      discriminator: file of the discriminator, where that of the generator does not have it.
      named: fields that the person set, {'stages.first', ...}: what a pipeline says of others is taken over.
      tokenizer: folder of the tokenizer, where it does not lie with the weights of a text encoder.

    Raises:
      UserError: there is a run in `workdir`, the file cannot be read safely, or it does not fit the config.
    """
    workdir = os.path.expanduser(workdir)
    whole.check_free(workdir, '--workdir')
    if is_adapter(config):
        from jaxgen.weights import lora, words  # which write runs as this module does

        read_adapter = words.import_word if config.model.adapter.name == INVERSION else lora.import_lora
        read_adapter(config, path, workdir, licence)
        return
    parts = pipelines.parts_for(config, path, named)
    config, lines = pipelines.with_scheduler(config, parts.scheduler, named)
    config, more = pipelines.with_scale(config, parts, named)
    config, sized = pipelines.with_sizes(config, named)
    lines += [*more, *sized]
    if parts.others:
        lines.append(f'left out of the pipeline: {", ".join(parts.others)}')
    reads: list[str] = []

    def of_texts(stage: str, weights: Weights) -> Callable[[Texts, str], Tokenizer]:
        def read(texts: Texts, source: str) -> Tokenizer:
            reads.append(stage)
            pad = 0 if source == 'openclip' else None  # as its own code fills texts up
            return text_encoders.read_tokenizer(texts, weights.path, tokenizer, stage.removeprefix('text'), pad)

        return read

    with whole.new_directory(workdir, 'import', '--workdir') as new:
        stages = {}
        for name, weights in parts.stages.items():
            stages[name] = os.path.join(new, 'stages', name)
            os.makedirs(stages[name])
            stage = pipelines.stage_config(config, name, weights, parts.said(weights))
            written = write_run(stages[name], stage, weights, of_texts(name, weights), '', licence)
            lines += [f'stages.{name}: {line}' for line in written]
        here = configs.complete(configs.update_sections(config.to_dict(), {'stages': stages}))
        there = {name: os.path.join(workdir, 'stages', name) for name in stages}
        own = of_texts('', parts.weights)
        lines += write_run(new, here, parts.weights, own, names, licence, discriminator, there)
        if tokenizer and not reads:
            raise UserError(f'--tokenizer={tokenizer}: nothing that is imported here reads texts: leave it out')
    for line in lines:
        log.say(line)
    log.say(f'{workdir} is a run at step 0')


def write_run(
    folder: str,
    config: ConfigDict,
    weights: Weights,
    read_tokenizer: Callable[[Texts, str], Tokenizer],
    names: str,
    licence: str,
    discriminator: str = '',
    stages: dict[str, str] | None = None,
) -> list[str]:
    """Writes a run at step 0 into an empty directory: the weights are read, checked and written array by array. Returns
    lines on what was written.

    Args:
      read_tokenizer: (texts of the family, name of the source) -> their tokenizer.
      stages: paths that its earlier stages will have, where they will be moved.

    Raises:
      UserError: as `import_weights`.
    """
    assembled = assembly.assemble(config)
    part = published_part(assembled.abstract)
    shapes = flat_shapes(part)
    fit = sources.choose(config, shapes, weights, names)
    check_fields(config, fit)
    check_classes(fit, assembled.context.classes if assembled.context else 0)
    others = other_networks(assembled.abstract)
    skip = f'{fit.source.skip}|{sources.TRAINING}'
    skip = f'{skip}|{sources.DISCRIMINATOR.pattern}.*' if others else skip
    mapping.check(fit.entries, fit.weights, skip, f'{weights.path} (names of {fit.source.name})')
    critic = find_discriminator(config, fit, flat_shapes({**part, **others}), weights, discriminator)
    part |= others if critic else {}
    shapes, fits = flat_shapes(part), [fit, *([critic] if critic else [])]
    texts = assembled.family.texts
    tokenizer = read_tokenizer(texts, fit.source.name) if texts.vocabulary else None
    bar = log.bar(sum(len(one.entries) for one in fits), 'importing', unit='array')
    arrays = {path: x for one in fits for path, x in deferred(one, shapes, bar.update).items()}
    arrays |= initial(assembled, {path for path in shapes if path not in arrays})
    for to, of in fit.source.same:
        arrays |= {f'{to}{path.removeprefix(of)}': x for path, x in arrays.items() if path.startswith(of)}
    empty = {path: x for path, x in flatten_dict(part, sep='/', keep_empty_nodes=True).items() if x is empty_node}
    tree = unflatten_dict({**arrays, **empty}, sep='/')
    extra, params = tree.pop('extra', None), {name: tree.pop(name) for name in others if name in tree}
    averages = {f'{name}@{std}': tree[name] for name in list(tree) for std in config.optim.ema_std}
    step = jax.device_put(np.int32(0), sharding.replicated(assembled.mesh))
    state = State(step=step, params=params, opt={}, ema={**tree, **averages}, extra=extra)
    record = {
        'source': fit.source.name,
        'title': fit.source.title,
        'file': pipelines.name_of(weights.path),
        'licence': licence or stated_licence(weights.path) or fit.source.licence,
        'jaxgen': jaxgen.__version__,
    }
    about = {
        'jax': jax.__version__,
        'stages': assembled.stage_digests,
        'imported': record,
        'meter': log.Meter().state(),
        'examples': 0,
    }
    opened = [weights, *([critic.weights] if critic and discriminator else [])]
    for one in opened:
        assert one.states is not None  # from here on the files must not change
    with (
        bar,
        memory.returned(),
        concurrent.futures.ThreadPoolExecutor(1) as beside,
    ):  # the file is read once, from the disk
        digest = beside.submit(lambda: weights.sha256)
        checkpoints = Checkpoints(folder, keep=1, deferred=True)
        try:
            checkpoints.save(state, about)
        finally:  # it may be writing still, when the import is stopped
            checkpoints.close()
        record['sha256'] = digest.result()
    if discriminator:
        record['discriminator'] = f'{os.path.basename(os.path.abspath(discriminator))} (SHA-256 {opened[-1].sha256})'
    for one in opened:
        one.check_unchanged()
    files.save_json(os.path.join(folder, RECORD), record)
    if tokenizer is not None:
        tokenizer.save(os.path.join(folder, directory.TOKENIZER))
    saved = configs.complete(configs.update_sections(config.to_dict(), {'stages': stages or {}}))
    directory.save_config(folder, saved, assembled.spec)
    lines = [f'imported {sum(x.size for x in arrays.values()):,} numbers of {fit.source.title}']
    if len(fit.roots) > 1:
        taken, *rest = (repr(root) for root in fit.roots)
        lines.append(f'NOTE: the file has such weights several times: those of {taken}, not of {", ".join(rest[:5])}')
    if re.search(r'non-?commercial|\bnc\b', record['licence'], re.IGNORECASE):
        lines.append(f'NOTE: these weights are under {record["licence"]}: not for commercial use')
    if others and not critic:
        lines.append(f'NOTE: {weights.path} has no {" or ".join(others)}: training starts it anew')
    return lines
