"""A run's weights as a file with the names of a published source, and its model card."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
from flax.traverse_util import flatten_dict

import jaxgen
from jaxgen import assembly, directory, files, log, memory, sharding
from jaxgen.diffusion.adapters import INVERSION, is_adapter
from jaxgen.errors import UserError
from jaxgen.networks import denoisers
from jaxgen.run import Run
from jaxgen.weights import (
    controlnets,
    diffusers,
    lora,
    pipelines,
    schedulers,
    sources,
    text_encoders,
    text_to_image,
    whole,
    words,
)
from jaxgen.weights.files import DTYPES, PIPELINE, read_json
from jaxgen.weights.importing import RECORD, flat_shapes, other_fields, other_networks, published_part
from jaxgen.weights.mapping import Entry
from jaxgen.weights.source import Source
from jaxgen.weights.source import network as network_name

# In a folder of the hub, by the source; that of diffusers for all others.
WEIGHTS = {'diffusers': 'diffusion_pytorch_model.safetensors', 'transformers': 'model.safetensors'}
FOLDER = (WEIGHTS['diffusers'], 'config.json', 'README.md')


def source_of(run: Run, names: str) -> Source:
    """The source whose names the weights get.

    Raises:
      UserError: there are several, and none is named.
    """
    fitting = sources.for_config(run.config, names)
    record = imported_record(run)
    own = [source for source in fitting if source.name == record.get('source')]
    chosen = fitting if names else own or fitting
    if len(chosen) > 1 and len({source.name for source in chosen}) > 1:
        raise UserError(f'name the names that the file gets: --names={" | ".join(source.name for source in chosen)}')
    return chosen[0]


def imported_record(run: Run) -> dict[str, Any]:
    """Where the weights that the run began with are from; {} where it began with random ones."""
    path = os.path.join(run.folder, RECORD)
    try:
        with open(path, encoding='utf-8') as file:
            record = json.loads(file.read(100_000))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


class Export:
    """The tensors of a run's averaged weights and of its discriminator by the names of a source, made one after
    another."""

    def __init__(self, run: Run, source: Source):
        part = published_part(run.state)
        if source.discriminator and other_networks(run.assembled.abstract):
            part |= other_networks(run.state.replace(params=run.saved_params()))
        self.leaves = {path: leaf for path, leaf in flatten_dict(part, sep='/').items() if leaf is not None}
        self.entries = sources.entries_of(source, run.config, flat_shapes(part))
        for entry in sources.discriminator_entries(source, run.config, flat_shapes(part)):
            names, copies = (tuple(f'{source.discriminator_root}{n}' for n in e) for e in (entry.names, entry.copies))
            self.entries.append(dataclasses.replace(entry, names=names, copies=copies))
        self.rows = source.rows
        groups: dict[tuple[str, ...], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault(tuple(map(self.joined, entry.all_names)), []).append(entry)
        # Every tensor is aligned in this order.
        self.groups = sorted(groups.values(), key=lambda group: -self.dtype(group).itemsize)

    def joined(self, name: str) -> str:
        """The tensor in the file that this is, or some rows of which."""
        return re.sub(*self.rows, name) if self.rows[0] else name

    def dtype(self, group: list[Entry]) -> np.dtype:
        return np.result_type(*(self.leaves[entry.path].dtype for entry in group))

    @property
    def numbers(self) -> int:
        return sum(math.prod(entry.their_shape()) * len(entry.all_names) for entry in self.entries)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...], np.dtype]]:
        """(name, shape, dtype) of every tensor, in the order of `tensors`."""
        for group in self.groups:
            shape = group[0].their_shape()
            if len(group) > 1:
                shape = (sum(entry.their_shape()[0] for entry in group), *shape[1:])
            for name in group[0].all_names:
                yield self.joined(name), shape, self.dtype(group)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, tensor) of every tensor."""
        for group in self.groups:
            if len(group) == 1:
                yield from group[0].pieces(sharding.to_host(self.leaves[group[0].path]))
                continue
            pieces = (entry.pieces(sharding.to_host(self.leaves[entry.path])) for entry in group)
            for parts in zip(*pieces, strict=True):
                whole = np.concatenate([x for _, x in sorted(parts, key=lambda part: part[0])])
                yield self.joined(parts[0][0]), whole.astype(self.dtype(group), copy=False)


def write_safetensors(file: BinaryIO, export: Export, metadata: dict[str, str]) -> None:
    """Writes a .safetensors file tensor by tensor."""
    header: dict[str, Any] = {'__metadata__': metadata}
    offset, kinds = 0, {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}
    for name, shape, dtype in export.shapes():
        after = offset + math.prod(shape) * dtype.itemsize
        header[name] = {'dtype': kinds[dtype], 'shape': list(shape), 'data_offsets': [offset, after]}
        offset = after
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    file.write(len(text).to_bytes(8, 'little') + text)
    for _, tensor in export.tensors():
        file.write(memoryview(tensor.reshape(-1).view(np.uint8)))


def export_weights(run: Run, to: str, names: str = '') -> None:
    """Writes the weights of a run: a .safetensors file, a .pt file of torch, or a folder of the hub with a model card.

    Args:
      to: FILE.safetensors, FILE.pt, or a folder that is not there or empty.
      names: of the source, one of `sources.SOURCES`; '': the only one, or the one that the run was imported from.

    Raises:
      UserError: there is something already, or several sources have names for this config.
    """
    to = os.path.expanduser(to)
    adapter = is_adapter(run.config)
    source = None if adapter else source_of(run, names)
    if os.path.exists(to) and not (os.path.isdir(to) and not os.listdir(to)):
        raise UserError(f'--to={to} is there already: name another file or folder')
    if source is None:
        write_adapter = words.export_word if run.config.model.adapter.name == INVERSION else lora.export_lora
        write_adapter(run, to, names)
        return
    folder = not to.endswith(('.safetensors', '.pt', '.pth'))
    wrong = other_fields(run.config, source, None, flat_shapes(published_part(run.state)))
    if wrong and not (folder and source.name == 'diffusers'):  # whose config.json says them
        there = ', '.join(f'{field} = {value} ({ours} here)' for field, (value, ours) in wrong.items())
        raise UserError(
            f'{source.title} would compute something else with these weights, since there {there}: '
            'jaxgen --mode=pack takes the run as it is'
        )
    export = Export(run, source)
    metadata = {'format': 'pt', 'jaxgen': jaxgen.__version__, 'step': str(run.step), 'names': source.name}
    if to.endswith('.safetensors'):
        with memory.returned(), files.replacing(to) as file:
            write_safetensors(file, export, metadata)
    elif to.endswith(('.pt', '.pth')):
        write_torch(to, export.tensors())
    else:
        write_folder(to, run, source, export, metadata)
    log.say(f'exported {export.numbers:,} numbers with the names of {source.title}: {to}')


def write_torch(to: str, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a state dict of torch, which is in memory as a whole.

    Raises:
      UserError: there is no torch.
    """
    try:
        import torch
    except ImportError as e:
        raise UserError(f'writing {to} needs torch: pip install torch, or name a .safetensors file') from e

    def tensor(x: np.ndarray):
        if x.dtype.name == 'bfloat16':
            return torch.from_numpy(np.array(x.view(np.int16))).view(torch.bfloat16)
        return torch.from_numpy(np.array(x))

    with files.replacing(to) as file:
        torch.save({name: tensor(x) for name, x in tensors}, file)


def write_folder(to: str, run: Run, source: Source, export: Export, metadata: dict[str, str]) -> None:
    """Writes weights, config.json and README.md into a new folder, and the earlier stages and the scheduler beside them
    where diffusers has a pipeline of these: all of them or none."""
    alone = not run.config.stages or controlnets.is_controlnet(run.config)
    parts = {} if alone or source.name != 'diffusers' else pipeline_of(run)
    model = run.config.model
    with whole.new_directory(to, 'export', '--to') as new:
        for folder, stage in parts.items():
            texts = folder.startswith('text_encoder')
            own = source_of(stage, 'transformers' if texts else 'diffusers')
            more = {} if texts else {'scaling_factor': model.latent_scale}
            if not texts and model.latent_shift:
                more['shift_factor'] = model.latent_shift
            tokenizer = folder.replace('text_encoder', 'tokenizer') if texts else ''
            inside = {**metadata, 'names': own.name}
            write_model(os.path.join(new, folder), stage, own, Export(stage, own), inside, more, tokenizer)
        if parts:
            network = 'transformer' if network_name(run.config) in denoisers.TRANSFORMERS else 'unet'
            write_model(os.path.join(new, network), run, source, export, metadata)
            scheduler = schedulers.scheduler_config(run.config)
            files.save_json(os.path.join(new, pipelines.SCHEDULER, pipelines.SCHEDULER_CONFIG), scheduler)
            kinds = {name: class_of(os.path.join(new, name)) for name in (*parts, network)}
            for name in parts:
                if name.startswith('text_encoder'):
                    beside = name.replace('text_encoder', 'tokenizer')
                    made = tokenizer_class(os.path.join(new, beside), kinds[name][1])
                    kinds[beside] = ['transformers', made]
            index = {**kinds, 'scheduler': ['diffusers', scheduler['_class_name']]}
            files.save_json(os.path.join(new, PIPELINE), {**pipeline_index(run, set(parts)), **index})
        else:
            write_model(new, run, source, export, metadata)
        with files.replacing(os.path.join(new, 'README.md')) as file:
            file.write(card(run, source).encode())


def pipeline_of(run: Run) -> dict[str, Run]:
    """{folder: stage} of a run's earlier stages, by the pipelines of diffusers.

    Raises:
      UserError: it has none of such stages.
    """
    name, stages = network_name(run.config), set(run.config.stages)
    reading = name in text_to_image.CLASSES
    fits = 'first' in stages and (stages - {'first'} if reading else name in ('dit', 'unet', 'adm'))
    if not fits or not stages <= {'first', *(pipelines.TEXTS if reading else ())}:
        raise UserError('diffusers has no pipeline of such stages: name a file, --to=FILE.safetensors')
    made = {}
    for stage in sorted(stages):
        path = run.config.stages[stage]
        config, spec, _ = directory.read(path)
        assembled = assembly.assemble(config, run.assembled.mesh, assembly.abstract_stage, spec)
        state, _ = run.assembled.frozen[stage]
        folder = pipelines.STAGES[stage][0]
        folder = 'vqvae' if stage == 'first' and name in ('unet', 'adm') else folder
        made[folder] = Run(path, config, assembled, state, 'ema')
    return made


def class_of(folder: str) -> list[str]:
    """[library, class] of a model in a folder, by its config.json."""
    said = read_json(os.path.join(folder, 'config.json'))
    kind = said.get('_class_name', '')
    return ['diffusers', kind] if kind else ['transformers', said['architectures'][0]]


def tokenizer_class(folder: str, encoder: str) -> str:
    """The class of a tokenizer in transformers, as its files say; else that of most such encoders."""
    path = os.path.join(folder, 'tokenizer_config.json')
    said = read_json(path).get('tokenizer_class') if os.path.isfile(path) else None
    usual = 'T5TokenizerFast' if encoder.startswith('T5') else 'CLIPTokenizer'
    return said if isinstance(said, str) and said.isidentifier() else usual


def pipeline_index(run: Run, parts: set[str]) -> dict[str, Any]:
    """The class of a pipeline in model_index.json, and what that says besides its parts."""
    name, none = network_name(run.config), [None, None]
    if name not in text_to_image.CLASSES:
        return {'_class_name': 'DiTPipeline' if name == 'dit' else 'LDMPipeline'}
    image = {'image_encoder': none, 'feature_extractor': none}
    if name != 'latent_unet':
        return {'_class_name': 'FluxPipeline' if name == 'flux' else 'StableDiffusion3Pipeline', **image}
    numbers = [one for one in run.config.model.conditioning.values() if one.kind == 'numbers']
    if 'text_encoder_2' not in parts:
        return {
            '_class_name': 'StableDiffusionPipeline',
            **image,
            'safety_checker': none,
            'requires_safety_checker': False,
        }
    empty = any(one.get('empty') == 'zeros' for one in run.config.model.conditioning.values())
    about = {'force_zeros_for_empty_prompt': empty, **image}
    if numbers and len(numbers[0]['values']) != text_to_image.NUMBERS:  # the refiner
        first = {'text_encoder': none, 'tokenizer': none, 'requires_aesthetics_score': True}
        return {'_class_name': 'StableDiffusionXLImg2ImgPipeline', **about, **first}
    return {'_class_name': 'StableDiffusionXLPipeline', **about}


def write_model(
    folder: str,
    run: Run,
    source: Source,
    export: Export,
    metadata: dict[str, str],
    more: dict[str, Any] | None = None,
    tokenizer_name: str = '',
) -> None:
    """Writes the weights of one network and its config.json into a folder, and its tokenizer.

    Args:
      more: what its config.json says besides.
      tokenizer_name: of the folder beside it for the tokenizer; '': its own.
    """
    tokenizer = directory.saved_tokenizer(run.folder) if run.assembled.family.texts.vocabulary else None
    if source.name == 'diffusers' and controlnets.is_controlnet(run.config):
        params = run.assembled.abstract.params['control']
        config = controlnets.config_json(run.config, flat_shapes(params))
    elif source.name == 'diffusers':
        reading = network_name(run.config) in text_to_image.CLASSES
        config = (text_to_image if reading else diffusers).model_config(run.config, run.assembled)
    elif source.name == 'transformers':
        side = run.image[0]
        config = text_encoders.model_config(run.config, side, tokenizer)
        if 'normalisation' in run.config.model and run.assembled.family.encode is not None:
            said = text_encoders.preprocessor_config(run.config, side)
            files.save_json(os.path.join(folder, text_encoders.PREPROCESSOR), said)
    else:
        config = json.loads(run.config.to_json_best_effort())
    files.save_json(os.path.join(folder, 'config.json'), {**config, **(more or {})})
    if tokenizer is not None:
        tokenizer.save(os.path.join(os.path.dirname(folder), tokenizer_name) if tokenizer_name else folder)
    name = WEIGHTS.get(source.name, WEIGHTS['diffusers'])
    with memory.returned(), files.replacing(os.path.join(folder, name)) as file:
        write_safetensors(file, export, metadata)


def card(run: Run, source: Source) -> str:
    """The model card, Markdown."""
    record, config = imported_record(run), run.config
    count = sum(leaf.size for leaf in flatten_dict(published_part(run.state), sep='/').values() if leaf is not None)
    licence = record.get('licence', '')
    network = config.model.get('network')
    rows = {
        'family': config.family,
        'network': network.get('name', '') if hasattr(network, 'get') else '',
        'parameters': f'{count:,}',
        'images': ' x '.join(map(str, run.assembled.spec.features['image'].shape)),
        'training data': config.data.source,
        'updates': f'{run.step:,}' + (' after the imported weights' if record else ''),
        'weights': run.weights,
        'imported from': f'{record["file"]} (SHA-256 {record["sha256"]})' if record else '',
        'names': source.title,
    }
    front = ['---', 'library_name: jaxgen', f'license: {licence or "unknown"}', '---', '']
    table = ['| | |', '|---|---|', *(f'| {key} | {value} |' for key, value in rows.items() if value), '']
    licence_line = f'The licence of the imported weights is {licence}.' if licence else 'No licence is stated.'
    lines = [
        f'# {os.path.basename(os.path.abspath(run.workdir))}', '', *table, licence_line, '', *metrics_of(run),
        '## Use', '', '```python', 'import jaxgen', '',
        f"run = jaxgen.import_weights(FOLDER, config=..., names='{source.name}', workdir='runs/imported')",
        'images = run.sample(16)', '```', '', '## Config', '', '```json', run.config.to_json_best_effort(indent=2),
        '```', '',
    ]  # fmt: skip
    return '\n'.join([*front, *lines])


def metrics_of(run: Run) -> list[str]:
    """A table of the metrics in evaluation.json; nothing where the run was not evaluated."""
    path = os.path.join(run.folder, 'evaluation.json')
    try:
        with open(path, encoding='utf-8') as file:
            metrics = json.load(file)['metrics']
        rows = [f'| {name} | {one["value"]:.5g} | {one.get("n", "")} |' for name, one in metrics.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return ['## Metrics', '', '| metric | value | n |', '|---|---|---|', *rows, '']
