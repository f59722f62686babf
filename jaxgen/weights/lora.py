"""LoRA files: those of diffusers (peft's names and the older ones) and of kohya's scripts, in and out.

The names of layers are those of the tables of the whole network. What a file says of a layer is a pair of tensors, down
[rank, in, ...] and up [out, rank, ...], and perhaps alpha: what is added is alpha / rank up down, or up down. Layers of
a file may have ranks of their own; here all have the largest, with zeros, and alpha is multiplied into `up`. Where no
tensor is alpha it is that of peft's config, in the metadata of diffusers' files or in adapter_config.json.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import einops
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxgen
from jaxgen import assembly, directory, files, log, merging
from jaxgen import config as configs
from jaxgen.diffusion import adapters
from jaxgen.diffusion.adapters import BASE, LORA, Layer
from jaxgen.errors import UserError
from jaxgen.run import Run
from jaxgen.weights import mapping, sources, text_to_image
from jaxgen.weights.diffusers import is_of
from jaxgen.weights.files import Tensor, Weights, open_weights, read_part
from jaxgen.weights.source import network as network_name

TABLES = {'latent_unet': text_to_image.latent_unet, 'mmdit': text_to_image.mmdit, 'flux': text_to_image.flux}
NAMES = ('diffusers', 'kohya')  # of an export
ROOTS = re.compile(r'(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|unet\.|transformer\.)*')
KOHYA = re.compile(r'lora_(unet|transformer)_')
TEXTS = re.compile(r'(text_encoder|text_model|lora_te|te\d?_|text_encoders?_)')
METADATA = 'lora_adapter_metadata'  # of a .safetensors file of diffusers: peft's config, as JSON
DOWN, UP, ALPHA = 'down', 'up', 'alpha'
# The end of a tensor's name, and what it is.
ENDINGS = (
    (r'\.lora_A(\.[a-z_]+)?\.weight', DOWN),
    (r'\.lora_B(\.[a-z_]+)?\.weight', UP),
    (r'[._]lora(_linear_layer)?[._]down\.weight', DOWN),
    (r'[._]lora(_linear_layer)?[._]up\.weight', UP),
    (r'\.alpha', ALPHA),
)
OLDER = ((r'\.processor\.', '.'), (r'\.to_out$', '.to_out.0'))  # of attention in diffusers' first LoRA files


class Place(NamedTuple):
    """Where a layer of a file is in one of our kernels."""

    entry: mapping.Entry
    layer: Layer
    number: int  # among the tensors that the kernel is made of


def tables(config) -> list[mapping.Table]:
    """The tables of names of a config's network, that of diffusers first.

    Raises:
      UserError: there is none.
    """
    own = TABLES.get(network_name(config))
    tables = [own(config, {})] if own else []
    fitting = [source for source in sources.SOURCES if source.fits(config)]
    tables += [source.table(config, {}) for source in fitting]
    if not tables:
        raise UserError(f'no LoRA files are known for the network {network_name(config)!r}')
    return tables


def places(config, table: mapping.Table, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """{name of a layer in files: its place}, of all kernels.

    shapes: {'denoiser/.../kernel': shape} of the base.
    """
    places = {}
    kernels = {path: shape for path, shape in shapes.items() if path.endswith('/kernel')}
    for entry in mapping.entries(table, kernels):
        layer = adapters.layer_of(entry.path.removeprefix('denoiser/').removesuffix('/kernel'), entry.shape)
        if len(entry.names) != np.prod((*layer.stack, *layer.matrices)):
            continue  # tensors that lie otherwise in ours
        for number, name in enumerate(entry.names):
            places[ROOTS.sub('', name.removesuffix('.weight'), 1)] = Place(entry, layer, number)
    return places


def pattern_of(entry: mapping.Entry) -> str:
    """The einops pattern of one of the tensors of a kernel."""
    return entry.layout.pattern or mapping.default_pattern('kernel', len(entry.their_shape()))


def split_name(name: str) -> tuple[str, str] | None:
    """(layer, DOWN, UP or ALPHA) of the name of a tensor; None: it is none of these."""
    for ending, kind in ENDINGS:
        if match := re.search(f'{ending}$', name):
            return mapping.substituted(name[: match.start()], OLDER), kind
    return None


def pairs_of(weights: Weights, known: Mapping[str, Place]) -> tuple[dict[str, dict[str, Tensor]], int]:
    """({layer: {DOWN, UP, ALPHA: tensor}}, number of tensors of text encoders).

    Raises:
      UserError: the file is of another kind, or of another network.
    """
    flat = {name.replace('.', '_'): name for name in known}
    pairs: dict[str, dict[str, Tensor]] = {}
    texts, wrong, unknown = 0, [], []
    for name, tensor in weights.tensors.items():
        if TEXTS.match(name):
            texts += 1
            continue
        if (parts := split_name(name)) is None:
            unknown.append(name)
            continue
        layer, kind = parts
        kohya = KOHYA.match(layer)
        there = flat.get(layer[kohya.end() :], '') if kohya else ROOTS.sub('', layer, 1)
        if there not in known:
            wrong.append(name)
            continue
        if kind in pairs.setdefault(there, {}):
            raise UserError(
                f'{weights.path} has the {kind} of {there} twice, once as {name}: which is meant is not known'
            )
        pairs[there][kind] = tensor
    if unknown:
        raise UserError(
            f'{weights.path} is no LoRA file: {unknown[0]} is none of its tensors (LoHa and DoRA are not read)'
        )
    if wrong or not pairs:
        what = f'{wrong[0]} and {len(wrong) - 1} more have no layer there' if wrong else 'it has no layer of it'
        raise UserError(f'{weights.path} is a LoRA of another network: {what}')
    return pairs, texts


def stated(weights: Weights) -> dict[str, Any]:
    """peft's config of the adapter of a network, {} where a file has none.

    Raises:
      UserError: it is none.
    """
    path = weights.files[0] if weights.files else weights.path
    said: Any = weights.metadata.get(METADATA)
    if said is not None:
        try:
            said = json.loads(said)
        except (ValueError, RecursionError) as e:
            raise UserError(f'{weights.path} is damaged: its {METADATA} is no JSON') from e
    elif os.path.basename(path).startswith('adapter_model.'):
        said = read_part(os.path.dirname(path), 'adapter_config.json')
    if not isinstance(said or {}, dict):
        raise UserError(f'{weights.path} is damaged: its {METADATA} is no JSON object')
    return {ROOTS.sub('', key, 1): value for key, value in (said or {}).items() if not TEXTS.match(key)}


def stated_alpha(said: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha of a layer by peft's config, the rank where it says none; with rsLoRA (Kalajdzievski 2023, arXiv
    2312.03732) times the root of the rank, over which it has alpha.

    Raises:
      UserError: it is no number.
    """
    own = said.get('alpha_pattern')
    patterns = own.items() if isinstance(own, dict) else ()
    fitting = (alpha for key, alpha in patterns if f'.{name}'.endswith(f'.{key.removeprefix("^")}'))
    alpha = next(fitting, said.get('lora_alpha'))
    if alpha is None:
        return rank
    if not is_of('a number', alpha):
        raise UserError(f'the config of the LoRA is damaged: alpha of {name} is {repr(alpha)[:80]}')
    return alpha * math.sqrt(rank) if said.get('use_rslora') is True else alpha


def read_pair(
    path: str, name: str, pair: Mapping[str, Tensor], place: Place, said: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """(down [*inputs, rank], up [rank, out]) of one matrix, as `adapters` has them, with alpha in `up`.

    Args:
      said: peft's config, see `stated`.

    Raises:
      UserError: one of both is missing, or they are of another shape.
    """
    if DOWN not in pair or UP not in pair:
        raise UserError(f'{path}: {name} has {"no down (lora_A)" if UP in pair else "no up (lora_B)"}')
    out, *inputs = place.entry.their_shape()
    first, second = pair[DOWN].shape, pair[UP].shape
    rank = first[0] if first else 0
    if (
        not rank
        or np.prod(first[1:]) != np.prod(inputs)
        or tuple(second[:2]) != (out, rank)
        or np.prod(second[2:]) != 1
    ):
        raise UserError(
            f'{path} is a LoRA of another network: {name} is {list(first)} and {list(second)} there, and the layer is '
            f'{[out, *inputs]}'
        )
    if ALPHA in pair and np.prod(pair[ALPHA].shape) != 1:
        raise UserError(f'{path}: alpha of {name} is {list(pair[ALPHA].shape)}, and should be one number')
    for one in (pair[DOWN], pair[UP]):
        if one.dtype.name not in mapping.DTYPES:
            raise UserError(f'{path}: {name} is not of {", ".join(mapping.DTYPES)}')
    down, up = (mapping.finite(name, pair[kind].read()).astype(np.float32) for kind in (DOWN, UP))
    sizes = {} if callable(place.entry.layout.sizes) else dict(place.entry.layout.sizes)
    down = einops.rearrange(down.reshape(rank, *inputs), pattern_of(place.entry), **sizes)
    up = up.reshape(out, rank).T
    up = place.entry.layout.forward(up) if place.entry.layout.forward else up
    one_number = float(mapping.finite(name, pair[ALPHA].read()).reshape(-1)[0]) if ALPHA in pair else None
    alpha = stated_alpha(said, name, rank) if one_number is None else one_number
    return down.reshape(*place.layer.inputs, rank), up * np.float32(alpha / rank)


def read(weights: Weights, config, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, np.ndarray], int, int]:
    """({'LAYER/down' and 'LAYER/up': array}, rank, number of tensors of text encoders) of a file.

    Raises:
      UserError: it is of another network, or no LoRA file.
    """
    known: dict[str, Place] = {}
    for table in reversed(tables(config)):
        known |= places(config, table, shapes)
    pairs, texts = pairs_of(weights, known)
    said = stated(weights)
    made = {name: read_pair(weights.path, name, pair, known[name], said) for name, pair in pairs.items()}
    rank = max(up.shape[0] for _, up in made.values())
    arrays: dict[str, np.ndarray] = {}
    for name, (down, up) in made.items():
        layer, own = known[name].layer, up.shape[0]
        for kind, shape in layer.shapes(rank).items():
            arrays.setdefault(f'{layer.path}/{kind}', np.zeros(shape, np.float32))
        front = int(np.prod((*layer.stack, *layer.matrices)))
        # Views of the arrays above.
        arrays[f'{layer.path}/down'].reshape(front, *layer.inputs, rank)[known[name].number, ..., :own] = down
        arrays[f'{layer.path}/up'].reshape(front, rank, -1)[known[name].number, :own] = up
    return arrays, rank, texts


def import_lora(config, path: str, workdir: str, licence: str = '') -> None:
    """Writes the run `workdir`, at step 0, of a LoRA file.

    Args:
      config: as of `tuning.derived`, BASE:lora; rank and layers are the file's.

    Raises:
      UserError: the file cannot be read safely, or is of another network.
    """
    weights = open_weights(path)
    base, spec, _ = directory.read(config.stages[BASE])
    part = assembly.assemble(base, stage=assembly.abstract_stage, spec=spec).abstract.ema
    shapes = {path: tuple(x.shape) for path, x in flatten_dict({'denoiser': part['denoiser']}, sep='/').items()}
    arrays, rank, texts = read(weights, config, shapes)
    layers = tuple(sorted({path.rpartition('/')[0] for path in arrays}))
    adapter = {'adapter': {'name': 'lora', 'rank': rank, 'alpha': 0.0, 'layers': layers}}
    config = configs.complete(configs.update_sections(config.to_dict(), {'model': adapter}))
    assembled = assembly.assemble(config, stage=assembly.abstract_stage, spec=spec)
    expected = flatten_dict(assembled.abstract.ema[LORA], sep='/')
    tree = {path: jnp.asarray(arrays.get(path, np.zeros(x.shape, np.float32))) for path, x in expected.items()}
    record = {
        'source': LORA,
        'title': 'LoRA',
        'file': os.path.basename(os.path.abspath(weights.path)),
        'licence': licence,
        'sha256': weights.sha256,
        'jaxgen': jaxgen.__version__,
    }
    merging.write(workdir, '--workdir', 'import', config, spec, {LORA: unflatten_dict(tree, sep='/')}, None, record)
    if texts:
        log.say(f'NOTE: {texts} tensors are of text encoders, of which no LoRA is read: they are left out')
    log.say(f'imported a LoRA of rank {rank} of {len(layers)} layers: {workdir} is a run at step 0')


def tensors(run: Run, names: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of a run's LoRA under the names of a kind of file."""
    base, spec, _ = directory.read(run.config.stages[BASE])
    part = assembly.assemble(base, stage=assembly.abstract_stage, spec=spec).abstract.ema
    shapes = {path: tuple(x.shape) for path, x in flatten_dict({'denoiser': part['denoiser']}, sep='/').items()}
    arrays = {path: np.asarray(x) for path, x in flatten_dict(run.state.ema[LORA], sep='/').items()}
    root = 'unet' if network_name(run.config) == 'latent_unet' else 'transformer'
    factor = np.float32(adapters.factor_of(run.config.model.adapter))
    for name, place in places(run.config, tables(run.config)[0], shapes).items():
        layer, entry = place.layer, place.entry
        if f'{layer.path}/down' not in arrays:
            continue
        rank = arrays[f'{layer.path}/up'].shape[-2]
        down = arrays[f'{layer.path}/down'].reshape(-1, *layer.inputs, rank)[place.number]
        up = arrays[f'{layer.path}/up'].reshape(-1, rank, layer.outputs)[place.number] * factor
        up = entry.layout.backward(up) if entry.layout.backward else up
        theirs, ours = pattern_of(entry).split('->')
        sizes = {} if callable(entry.layout.sizes) else dict(entry.layout.sizes)
        out, *inputs = entry.their_shape()
        down = einops.rearrange(down, f'{ours.strip()} -> {theirs.strip()}', **sizes).reshape(rank, *inputs)
        up = up.T.reshape(out, rank, *(1 for _ in inputs[1:]))
        if names == 'kohya':
            flat = 'lora_unet_' + name.replace('.', '_')
            yield f'{flat}.lora_down.weight', down
            yield f'{flat}.lora_up.weight', up
            yield f'{flat}.alpha', np.float32(rank)
        else:
            yield f'{root}.{name}.lora_A.weight', down
            yield f'{root}.{name}.lora_B.weight', up


def export_lora(run: Run, to: str, names: str = '') -> None:
    """Writes the LoRA of a run as a .safetensors file; what multiplies it stands in its `up`.

    Args:
      names: one of NAMES; '': those of diffusers.

    Raises:
      UserError: another kind of file, or names that there are not.
    """
    if names not in ('', *NAMES):
        raise UserError(f'--names={names}: the names of a LoRA are {" or ".join(NAMES)}')
    if not to.endswith('.safetensors'):
        raise UserError(f'--to={to}: a LoRA is written as FILE.safetensors')
    made = {name: np.asarray(x, order='C') for name, x in tensors(run, names)}
    metadata = {'format': 'pt', 'jaxgen': jaxgen.__version__, 'step': str(run.step)}
    with files.replacing(to) as file:
        file.write(safetensors.numpy.save(made, metadata))
    log.say(f'exported {len(made)} tensors of LoRA: {to}')
