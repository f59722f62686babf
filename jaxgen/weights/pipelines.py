"""Several models in one folder or file: pipelines of diffusers (model_index.json), checkpoints of latent-diffusion.

A pipeline is a network with its earlier stages, each in a folder of its own, and a scheduler. What is in which folder
is a table here; names of the weights are the sources' affair.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.sections import sides
from jaxgen.weights import compvis, diffusers, files, schedulers, text_encoders, text_to_image
from jaxgen.weights.files import Weights, open_weights
from jaxgen.weights.mapping import DTYPES
from jaxgen.weights.source import network as network_name

NETWORKS = ('unet', 'transformer')  # folders of the network that a run is of
# {stage: its folders}
STAGES = {
    'first': ('vae', 'vqvae', 'movq'),
    'text': ('text_encoder',),
    'text_2': ('text_encoder_2',),
    'text_3': ('text_encoder_3',),
}
TEXTS = ('text', 'text_2', 'text_3')  # stages that read texts
SCHEDULER, SCHEDULER_CONFIG = 'scheduler', 'scheduler_config.json'
# {stage: prefixes, one of which stands before its names in one file with others}
INSIDE = {
    'first': ('first_stage_model.', 'vae.'),
    'text': (
        'cond_stage_model.transformer.', 'cond_stage_model.model.', 'conditioner.embedders.0.transformer.',
        'text_encoders.clip_l.transformer.',
    ),
    'text_2': (
        'conditioner.embedders.1.model.', 'conditioner.embedders.0.model.', 'text_encoders.clip_g.transformer.',
    ),
    'text_3': ('text_encoders.t5xxl.transformer.',),
}  # fmt: skip
INSIDE_FLUX = {**INSIDE, 'text_2': INSIDE['text_3'], 'text_3': ()}
FLUX_BLOCK = 'double_blocks.0.img_attn.qkv.weight'  # which only files of FLUX have
STEPS = 50  # of most pipelines, see `schedulers.STEPS`
EVEN = ('flux',)  # networks whose pipelines space the levels themselves, evenly
SCALING_XL = 0.13025  # of SDXL's
POOLED_XL = 1280  # width of the pooled text of SDXL
BASE_2 = 875_000  # global_step of the file of Stable Diffusion 2 at 512 pixels
SCALING = 0.18215  # scaling_factor of first stages of diffusers whose config.json does not say it


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is read of a file or folder: the weights of a run's network, and of its stages beside them."""

    weights: Weights
    stages: dict[str, Weights] = dataclasses.field(default_factory=dict)
    scheduler: dict[str, Any] = dataclasses.field(default_factory=dict)  # scheduler_config.json
    lacking: str = ''  # folder of the first stage that a pipeline names and does not have
    index: dict[str, Any] = dataclasses.field(default_factory=dict)  # model_index.json
    others: tuple[str, ...] = ()  # folders of a pipeline that nothing here reads

    @property
    def files(self) -> tuple[str, ...]:
        return self.weights.files

    def said(self, stage: Weights) -> dict[str, Any]:
        """config.json of an earlier stage, {} where there is none: beside a file of several models it is of another."""
        return {} if stage is self.weights else stage.config


def open_parts(path: str, option: str = '--from') -> Parts:
    """The models in a file or folder.

    Raises:
      UserError: see `open_weights`; a pipeline without a network that is known here.
    """
    folder = files.of_hub(path, option) if path.startswith(files.HUB) else os.path.expanduser(path)
    if not os.path.isfile(os.path.join(folder, files.PIPELINE)):
        return Parts(open_weights(path, option))
    said = files.read_part(folder, files.PIPELINE)
    there = [name for name in said if os.path.basename(name) == name and os.path.isdir(os.path.join(folder, name))]
    network = next((name for name in NETWORKS if name in there), '')
    if not network:
        raise UserError(
            f'{option}={path} is a pipeline ({said.get("_class_name", "of no class")}) with none of '
            f'{", ".join(NETWORKS)}: name one of its models, of {", ".join(there) or "none"}'
        )
    stages = {}
    for stage, names in STAGES.items():
        for name in names:
            if name in there:
                stages[stage] = open_weights(os.path.join(folder, name), option)
    for name in there:
        files.check_inside(os.path.dirname(os.path.join(folder, name)), name)
    scheduler = files.read_part(os.path.join(folder, SCHEDULER), SCHEDULER_CONFIG)
    weights = open_weights(os.path.join(folder, network), option)
    lacking = [name for name in STAGES['first'] if any(said.get(name) or [None]) and name not in there]
    read = (network, SCHEDULER, *(name for names in STAGES.values() for name in names))
    others = tuple(name for name in there if name not in read and not name.startswith('tokenizer'))
    return Parts(weights, stages, scheduler, next(iter(lacking), ''), said, others)


def name_of(path: str) -> str:
    """The name of a file or folder, and of the pipeline that it is of."""
    above, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.basename(above), name) if os.path.isfile(os.path.join(above, files.PIPELINE)) else name


def parts_for(config: ConfigDict, path: str, named: Set[str]) -> Parts:
    """The models in a file or folder that a config's run is made of: of the stages those that the config has, unless
    the person named their runs.

    Raises:
      UserError: as `open_parts`.
    """
    parts = open_parts(path)
    stages = {**in_one_file(parts.weights), **parts.stages}
    chosen = {name: w for name, w in stages.items() if name in config.stages and f'stages.{name}' not in named}
    return dataclasses.replace(parts, stages=chosen)


def in_one_file(weights: Weights) -> dict[str, Weights]:
    """{stage: its weights} of the earlier stages in a file of several models."""
    parts: dict[str, Weights] = {}
    flux = text_encoders.root_before(weights, FLUX_BLOCK) is not None
    for stage, prefixes in (INSIDE_FLUX if flux else INSIDE).items():
        for prefix in prefixes:
            before = (name.partition(prefix)[0] for name in weights if prefix in name)
            root = next((one for one in before if not one or one.endswith('.')), None)
            if root is None or stage in parts:
                continue
            if stage == 'first':
                parts[stage] = weights
                continue
            inside = weights.below(root + prefix)
            # config.json beside the file is of another model. By the names of transformers nothing tells OpenCLIP's.
            said = text_encoders.of_open_clip(inside) if 'clip_g' in prefix else {}
            parts[stage] = dataclasses.replace(inside, config=said)
    return parts


def agreed(
    config: ConfigDict, fields: dict[str, Any], named: Set[str], said_by: str, free: bool = False
) -> tuple[ConfigDict, list[str]]:
    """A config with other values of some fields, and a line on those that were others.

    Args:
      named: fields that the person set. They stay where they are `free`; else they must agree.
      said_by: the file that says so.

    Raises:
      UserError: the person said otherwise.
    """
    sections, over = config.to_dict(), {}
    for path, value in fields.items():
        if {path, path.removesuffix('.name')} & named:
            if not free and configs.contains(sections, path) and configs.get(sections, path) != value:
                raise UserError(f'--config.{path}: {said_by} says {value!r}: leave it out')
            continue
        over = configs.joined(over, configs.nested(path, value))
    changed = configs.complete(configs.update_sections(sections, over))
    new = [f'{k} = {after!r}' for k, (_, after) in configs.changed(config, changed).items() if after is not None]
    return changed, [f'{said_by} says {", ".join(new)}'] if new else []


def with_scheduler(config: ConfigDict, scheduler: Mapping[str, Any], named: Set[str]) -> tuple[ConfigDict, list[str]]:
    """A diffusion config with the process and the sampler of a scheduler_config.json, and lines on what that changed.

    Raises:
      UserError: it is of a process that is not here, or the person named another one.
    """
    if not scheduler or config.family != 'diffusion':
        return config, []
    name = os.path.join(SCHEDULER, SCHEDULER_CONFIG)
    diffusers.check_kinds(scheduler, name)
    fields = schedulers.process_fields(scheduler)
    unknown = [f'{name} has no betas: the process is that of the config, {config.model.process.name!r}']
    if fields.get('model.process.name') == 'cosine':  # which has no betas to set
        fields = {field: value for field, value in fields.items() if '.beta_' not in field}
    config, lines = agreed(config, fields, named, name)
    lines = lines if fields else unknown
    if {'model.sampler', 'model.sampler.name'} & named:
        return config, lines
    try:
        sampler = schedulers.sampler_fields(scheduler, even=config.model.network.name in EVEN)
    except UserError as e:
        return config, [*lines, f'{e}: {config.model.sampler.name!r} draws']
    if not sampler:
        kind = scheduler.get('_class_name')
        return config, [*lines, f'no sampler here is known to draw as {kind}: {config.model.sampler.name!r} draws']
    if sampler['name'] != 'ancestral':
        steps = schedulers.STEPS.get(scheduler.get('_class_name', ''), STEPS)
        sampler['steps'] = min(steps, scheduler.get('num_train_timesteps', STEPS))
    fields = {f'model.sampler.{field}': value for field, value in sampler.items()}
    config, more = agreed(config, fields, named, name, free=True)
    return config, [*lines, *more]


def with_scale(config: ConfigDict, parts: Parts, named: Set[str]) -> tuple[ConfigDict, list[str]]:
    """A config with the scale of its first stage's latents: of that model's config.json, or `scale_factor` in a file
    of latent-diffusion."""
    stage = parts.stages.get('first')
    if stage is None or 'latent_scale' not in config.model:
        return config, []
    said_by, said = 'config.json of the first stage', parts.said(stage)
    if not said:
        name = next((n for n in parts.weights if n in ('scale_factor', 'state_dict.scale_factor')), '')
        if not name:
            return config, []
        tensor = parts.weights[name]
        value = np.asarray(tensor.read(), np.float32).reshape(-1) if tensor.dtype.name in DTYPES else np.zeros(0)
        if value.size != 1 or not np.isfinite(value[0]):
            raise UserError(f'{parts.weights.path}: {name} is no number: the file is damaged')
        return agreed(config, {'model.latent_scale': float(value[0])}, named, name)
    diffusers.check_kinds(said, said_by)
    return agreed(config, latent_fields(said), named, said_by)


def with_sizes(config: ConfigDict, named: Set[str]) -> tuple[ConfigDict, list[str]]:
    """A config whose network reads the size of an image as numbers (SDXL's, see `text_to_image.conditioning_of`) with
    the size that the person named, as pipelines take that of the image."""
    if config.family != 'diffusion' or 'data.size' not in named:
        return config, []
    size, fields = tuple(map(float, sides(config.data.size))), {}
    for name, own in config.model.conditioning.items():
        if own.kind == 'numbers' and len(own['values']) in (5, 6):
            for field in ('values', 'absent') if own.absent else ('values',):
                last = size if len(own[field]) == 6 else tuple(own[field][4:])
                fields[f'model.conditioning.{name}.{field}'] = (*size, *own[field][2:4], *last)
    return agreed(config, fields, named, 'config.data.size', free=True)


def latent_fields(said: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of how latents are scaled, by the config.json of a first stage."""
    shift = said.get('shift_factor') or 0.0
    if not diffusers.is_of('a number', shift):
        raise UserError(f'config.json of the first stage is damaged: shift_factor is {repr(shift)[:80]}')
    return {'model.latent_scale': float(said.get('scaling_factor', SCALING)), 'model.latent_shift': float(shift)}


def stage_config(config: ConfigDict, stage: str, weights: Weights, said: Mapping[str, Any]) -> ConfigDict:
    """The config of an earlier stage: that of the name of the run that the config stands on, with its data and the
    sizes that the model's config.json says.

    Args:
      said: that config.json, {} where there is none.

    Raises:
      UserError: there is no config of that name.
    """
    if stage in TEXTS:
        length = text_to_image.LENGTHS.get(text_to_image.CLASSES.get(network_name(config), ''), 0)
        made = reading_texts(weights, data=config.data, length=length)
        if made is None:
            raise UserError(f'{weights.path} holds no text encoder that is known here')
        return made
    sizes = {}
    if not said and network_name(config) in text_to_image.CLASSES:
        sizes = compvis.sizes(weights)
    name = configs.named(config.stages[stage])
    if not name:
        raise UserError(
            f'config.stages.{stage} = {config.stages[stage]}: no config of that name, so the {stage} stage in '
            f'{weights.path} is of an unknown network: import it first and name its run'
        )
    own = configs.load(name).to_dict()
    sections = {**own, 'data': config.data.to_dict(), 'mesh': config.mesh.to_dict()}
    _, model = fields_of(said, sides(config.data.size)[0]) if said else (None, sizes)
    return configs.complete(configs.update_sections(sections, {'model': model}))


def attention_sizes(kinds: list, size: int) -> tuple[int, ...]:
    """Heights of the levels whose blocks have attention."""
    return tuple(size >> level for level, kind in enumerate(kinds) if 'Attn' in str(kind))


def multiples(widths: Sequence[int], fractions: bool = False) -> tuple[float, ...]:
    """Widths over the first of them.

    Args:
      fractions: they need not be whole numbers.

    Raises:
      UserError: they are none.
    """
    if not any(width % widths[0] for width in widths):
        return tuple(width // widths[0] for width in widths)
    if not fractions:
        raise UserError(f'block_out_channels {list(widths)}: widths of the networks here are multiples of the first')
    # `int(channels * multiplier)` is the width again.
    quotients = [(width, width / widths[0]) for width in widths]
    return tuple(q if int(widths[0] * q) == width else math.nextafter(q, math.inf) for width, q in quotients)


def autoencoder_model(said: Mapping[str, Any]) -> dict[str, Any]:
    """config.model of an AutoencoderKL or VQModel."""
    widths = said['block_out_channels']
    model = {
        'channels': widths[0],
        'multipliers': multiples(widths),
        'blocks': said.get('layers_per_block', 1),
        'latent': said.get('latent_channels', 4 if said['_class_name'] == 'AutoencoderKL' else 3),
        'groups': said.get('norm_num_groups', 32),
        'group_size': 0,
    }
    if said['_class_name'] == 'VQModel':
        code = said.get('vq_embed_dim') or model['latent']
        vocabulary = said.get('num_vq_embeddings', 256)
        return {**model, 'regulariser': 'vq', 'latent': code, 'vocabulary': vocabulary, 'interface': 'latents'}
    quant = said.get('use_quant_conv', True)
    middle = said.get('mid_block_add_attention', True)
    return {**model, 'regulariser': 'kl', 'latent_kernel': int(quant), 'middle_attention': middle}


def unet_model(said: Mapping[str, Any]) -> dict[str, Any]:
    """config.model of a UNet2DModel with DDPM's blocks or ADM's."""
    widths = said['block_out_channels']
    network: dict[str, Any] = {
        'name': 'unet',
        'channels': widths[0],
        'multipliers': multiples(widths, fractions=True),
        'blocks': said.get('layers_per_block', 2),
        'groups': said.get('norm_num_groups', 32),
        'group_size': 0,
        'eps': said.get('norm_eps', 1e-5),
        'dropout': said.get('dropout', 0.0),
    }
    published = (said.get('flip_sin_to_cos', True), said.get('freq_shift', 0), said.get('downsample_padding', 1))
    heads = said.get('attention_head_dim', 8)
    fractions = any(width % widths[0] for width in widths)
    if published != (False, 1, 0) or heads is not None or fractions:
        network |= {'name': 'adm', 'head_channels': heads or 0, **({} if heads else {'heads': 1})}
        network['scale_shift'] = said.get('resnet_time_scale_shift', 'default') == 'scale_shift'
        network['resample_in_blocks'] = said.get('downsample_type', 'conv') == 'resnet'
        network |= {'sines_first': not published[0], 'freq_shift': published[1]}
        network['padding'] = 'all' if published[2] else 'end'
    variance = 'learned' if said.get('out_channels', 3) == 2 * said.get('in_channels', 3) else 'fixed'
    return {'network': network, 'training': {'variance': {'name': variance}}}


def dit_model(said: Mapping[str, Any]) -> dict[str, Any]:
    """config.model of a DiTTransformer2DModel."""
    heads = said.get('num_attention_heads', 16)
    network = {
        'name': 'dit',
        'channels': heads * said.get('attention_head_dim', 72),
        'blocks': said.get('num_layers', 28),
        'heads': heads,
        'patch': said.get('patch_size', 2),
        'freq_shift': 1,
        'mlp_eps': said.get('norm_eps', 1e-5),
    }
    variance = 'learned' if said.get('out_channels') == 2 * said.get('in_channels', 4) else 'fixed'
    return {'network': network, 'training': {'variance': {'name': variance}}}


# {class: (config that is nearest, config.model of its config.json)}
CLASSES = {
    'AutoencoderKL': ('kl_f8_imagenet256', autoencoder_model),
    'VQModel': ('vq_f4_celebahq256', autoencoder_model),
    'UNet2DModel': ('ddpm_cifar10', unet_model),
    'DiTTransformer2DModel': ('dit_imagenet256', dit_model),
}


def size_of(said: Mapping[str, Any]) -> tuple[int, ...]:
    """Height and width that config.json says, () where it says none."""
    size = said.get('sample_size')
    several = size if isinstance(size, list | tuple) else [size, size]
    return tuple(several) if len(several) == 2 and all(diffusers.is_of('a count', one) for one in several) else ()


def fields_of(said: Mapping[str, Any], height: int | None = None) -> tuple[tuple[int, ...], dict[str, Any]]:
    """(height and width that config.json says, () for none; config.model).

    Args:
      height: of what the network reads, which its attention depends on; None: that of config.json.

    Raises:
      UserError: it is of no class that is known here, or damaged.
    """
    diffusers.check_kinds(said, 'config.json')
    kind = said.get('_class_name')
    if kind not in CLASSES:
        raise UserError(f'config.json: {kind!r} is none of {", ".join(CLASSES)}: give the --config of its network')
    try:
        size, model = size_of(said), CLASSES[kind][1](said)
        if 'down_block_types' in said and (height or size):
            section = model.get('network', model)
            section['attention'] = attention_sizes(said['down_block_types'], height or size[0])
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError) as e:
        raise UserError(f'config.json of a {kind} is damaged ({type(e).__name__}: {e})') from e
    return size, model


def reading_texts(
    weights: Weights, tokenizer: str = '', data: ConfigDict | None = None, length: int = 0
) -> ConfigDict | None:
    """The config of a text encoder or of CLIP, by its tensors and config.json; None: it is another model.

    Args:
      tokenizer: folder of its tokenizer, where it lies elsewhere.
      data: of the run that it is a stage of; None: drawn scenes, of the size of its images.
      length: tokens of a text, of an encoder without positions; 0: that of the tokenizer.
    """
    made = text_encoders.model_of(weights, length or text_encoders.length_of(weights.path, tokenizer))
    if made is None:
        return None
    family, model, side = made
    own: dict[str, Any] = {'source': 'shapes', 'size': side or 32, 'channels': 3, 'batch': 32}
    reads = 'network' not in model or model['network']['name'] != 'clip_vision'
    features = ('image', 'caption') if reads else ('image',)
    sections = {'data': {**(data.to_dict() if data else own), 'features': features}, 'train': {'sample_every': 0}}
    return configs.make(family=family, model=model, **sections)


# What the pipelines of published files without a scheduler_config.json draw with.
FLOW = {'_class_name': 'FlowMatchEulerDiscreteScheduler', 'num_train_timesteps': 1000}
SHIFTED = {**FLOW, 'shift': 3.0}
BY_TOKENS = {
    **SHIFTED, 'use_dynamic_shifting': True, 'base_shift': 0.5, 'max_shift': 1.15, 'base_image_seq_len': 256,
    'max_image_seq_len': 4096,
}  # fmt: skip
SCALES = {'mmdit': (1.5305, 0.0609), 'flux': (0.3611, 0.1159)}  # and shift of the latents


def from_checkpoint(weights: Weights, named: Set[str] = frozenset()) -> tuple[str, ConfigDict] | None:
    """(name, config) of a checkpoint of Stable Diffusion 1, 2, XL or 3 or of FLUX by their authors' names, by its
    tensors; None: it is something else.

    Args:
      named: as of `derived`.

    Raises:
      UserError: its first stage or a text encoder is neither in the file nor named.
    """
    stages = in_one_file(weights)
    for block, made in (('joint_blocks.0.x_block.attn.qkv.weight', of_stability), (FLUX_BLOCK, of_bfl)):
        if (root := text_encoders.root_before(weights, block)) is not None:
            own, said, scheduler = made(weights.below(root))
            encoders = with_all(weights.path, said, stages, named)
            conditioning = text_to_image.conditioning_of(said, {}, encoders, (1024, 1024))
            scale, shift = SCALES[own['name']]
            few = own['name'] == 'flux' and not own['distilled']  # FLUX.1-schnell
            fixed = frozenset({'model.sampler.steps'} if few else ())
            model = {
                'process': 'flow',
                'network': own,
                'training': {'prediction': 'flow', 'times': 'logit_normal'},
                'sampler': {'name': 'euler', 'steps': 4 if few else STEPS, 'clip': False, 'unit_start': True},
                'latent_scale': scale,
                'latent_shift': shift,
                **conditioning,
            }
            return own['name'], with_scheduler(latent_config(model, 1024, encoders), scheduler, fixed)[0]
    return of_compvis(weights, stages, named)


def with_all(path: str, said: Mapping[str, Any], stages: Set[str] | Mapping[str, Any], named: Set[str]) -> list[str]:
    """The stages of a network that are text encoders, in the file or named.

    Raises:
      UserError: one of them, or the first stage, is neither.
    """
    there = {*stages, *(name.removeprefix('stages.') for name in named)}
    missing = [stage for stage in ('first', *text_to_image.encoders_of(said)) if stage not in there]
    if missing:
        lines = {stage: f'its {text_to_image.TITLES[stage]}, --config.stages.{stage}=RUN' for stage in missing}
        raise UserError(
            f'{path} holds no more than a part of its pipeline: import the rest by itself and name it, '
            f'{"; ".join(lines.values())}; or name a folder or file that has all'
        )
    return [stage for stage in TEXTS if stage in there]


def of_stability(weights: Weights) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(config.model.network, config.json, scheduler) of an MMDiT by the names of Stability AI."""
    own = text_to_image.stability_section(weights)
    return own, {'_class_name': 'SD3Transformer2DModel'}, SHIFTED


def of_bfl(weights: Weights) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(config.model.network, config.json, scheduler) of FLUX by the names of Black Forest Labs."""
    own = text_to_image.bfl_section(weights)
    said = {'_class_name': 'FluxTransformer2DModel', 'guidance_embeds': own['distilled']}
    return own, said, BY_TOKENS if own['distilled'] else {**FLOW, 'shift': 1.0}


def of_compvis(weights: Weights, stages: Mapping[str, Weights], named: Set[str]) -> tuple[str, ConfigDict] | None:
    """`from_checkpoint` of Stable Diffusion 1, 2 and XL."""
    root = text_encoders.root_before(weights, f'{text_to_image.DIFFUSION}input_blocks.0.0.weight')
    if root is None:
        return None
    inside = weights.below(f'{root}{text_to_image.DIFFUSION}')
    own = text_to_image.compvis_section(inside)
    if not own:
        return None
    embedded = text_to_image.of_shape(inside, 'label_emb.0.0.weight', 1)
    context = text_to_image.context_of(inside)
    refines = bool(embedded) and 'text' not in stages and 'stages.text' not in named
    said: dict[str, Any] = {
        '_class_name': 'UNet2DConditionModel',
        'in_channels': text_to_image.of_shape(inside, 'input_blocks.0.0.weight', 1),
        'out_channels': text_to_image.of_shape(inside, 'out.2.weight', 0),
    }
    index = {'force_zeros_for_empty_prompt': not refines, 'requires_aesthetics_score': refines}
    if embedded:
        said['addition_embed_type'] = 'text_time'
    encoders = with_all(weights.path, said, stages, named)
    if said['in_channels'] not in (said['out_channels'], text_to_image.inpainting_channels(said['out_channels'])):
        raise UserError(
            f'the network of {weights.path} reads {said["in_channels"]} channels, and its latents have '
            f'{said["out_channels"]}: what else it reads is not known, so give --config with its model.conditioning'
        )
    open_clip = 'text' in stages and text_encoders.root_before(stages['text'], 'ln_final.weight') is not None
    second = not embedded and (open_clip or context == 1024)
    if embedded:
        pooled = POOLED_XL
        if 'text_2' in stages and (read := text_encoders.model_of(stages['text_2'])):
            pooled = read[1]['network']['features']
        said['addition_time_embed_dim'] = (embedded - pooled) // (text_to_image.NUMBERS - refines)
    # Of Stable Diffusion 2 that at 512 pixels predicts the noise, and was published at this step.
    steps = weights.get(f'{root}global_step')
    base = steps is not None and steps.dtype.kind in 'iu' and int(np.asarray(steps.read()).reshape(-1)[0]) == BASE_2
    base = base or 'inpainting' in text_to_image.conditioning_of(said, index, encoders, (512, 512))['conditioning']
    side = 1024 if embedded else 768 if second and not base else 512
    conditioning = text_to_image.conditioning_of(said, index, encoders, (side, side))
    if open_clip and not embedded:
        conditioning['conditioning']['caption']['tokens'] = ('text/before_normalised',)
    model = {
        'process': 'scaled_linear',
        'network': own,
        'training': {'prediction': 'v' if second and not base else 'eps'},
        'sampler': {'name': 'ddim', 'steps': STEPS, 'spacing': 'leading', 'offset': 1, 'to_first': True, 'clip': False,
                    'unit_start': True},
        'latent_scale': SCALING_XL if embedded else SCALING,
        **conditioning,
    }  # fmt: skip
    return 'latent_unet', latent_config(model, side, encoders)


def latent_config(model: dict[str, Any], size: Any, encoders: Sequence[str]) -> ConfigDict:
    """The config of a diffusion model of a KL autoencoder's latents, with these text encoders."""
    first = os.path.join('runs', CLASSES['AutoencoderKL'][0])
    data = {'source': 'shapes', 'size': size, 'channels': 3, 'batch': 8, 'features': ('image', 'caption')}
    return configs.make(
        family='diffusion',
        data=data,
        model=model,
        stages={'first': first, **{name: os.path.join('runs', name) for name in encoders}},
        train={'sample_every': 0},
        evaluate={'features': 'none'},
    )


VAE_LEVELS = (0,) * 4  # of the first stages of most pipelines
MOST_LATENTS = 128  # rows of the maps of pipelines whose config.json says no sample_size


def text_to_images(path: str, parts: Parts, named: Set[str] = frozenset()) -> tuple[str, ConfigDict]:
    """(name, config) of a pipeline whose network reads texts.

    Args:
      named: as of `derived`.

    Raises:
      UserError: it lacks a model, or is none that is known here.
    """
    said, stage = parts.weights.config, parts.stages.get('first')
    encoders = [name for name in TEXTS if name in parts.stages or f'stages.{name}' in named]
    if 'stages.first' not in named and (stage is None or stage.config.get('_class_name') != 'AutoencoderKL'):
        raise UserError(
            f'{path} is a {said["_class_name"]}, which needs the rest of its pipeline (vae, text_encoder, tokenizer, '
            'scheduler beside it): name the folder of the pipeline, or the runs of its parts with '
            '--config.stages.first=RUN --config.stages.text=RUN and so on'
        )
    own = text_to_image.section_of(said)
    about = stage.config if stage is not None else {}
    diffusers.check_kinds(about, 'config.json of the first stage')
    channels = said.get('in_channels', 64) // 4 if own['name'] == 'flux' else said.get('in_channels', 4)
    latent = about.get('latent_channels', 4) if about else said.get('out_channels') or channels
    latent = latent // 4 if not about and own['name'] == 'flux' and said.get('out_channels') else latent
    if channels not in (latent, text_to_image.inpainting_channels(latent)):
        raise UserError(
            f'the network of {path} reads {channels} channels, and its latents have {latent}: what else it reads is '
            'not known, so give --config with its model.conditioning'
        )
    size = size_of(said) or (MOST_LATENTS, MOST_LATENTS)
    factor = 2 ** min(len(about.get('block_out_channels', VAE_LEVELS)) - 1, 8)
    size = tuple(min(side * factor, 2**31) for side in size)
    if max(size) > 2**16:
        raise UserError(f'config.json of {path}: sample_size {said.get("sample_size")!r} is of no image')
    flow = own['name'] != 'latent_unet'
    if not about:  # as published
        scale, shift = SCALES.get(own['name'], (SCALING, 0.0))
        latents = {'latent_scale': SCALING_XL if 'addition_embed_type' in said else scale, 'latent_shift': shift}
    model = {
        **({} if about else latents),
        'process': 'flow' if flow else 'scaled_linear',
        'network': own,
        'training': {'prediction': 'flow' if flow else 'eps', 'times': 'logit_normal' if flow else 'uniform'},
        'sampler': {'name': 'euler' if flow else 'ddim', 'steps': STEPS, 'clip': False, 'unit_start': True},
        **text_to_image.conditioning_of(said, parts.index, encoders, size),
    }
    return own['name'], latent_config(model, size if size[0] != size[1] else size[0], encoders)


def derived(path: str, tokenizer: str = '', named: Set[str] = frozenset()) -> tuple[str, ConfigDict]:
    """(name of the nearest config, config) of a model or pipeline of diffusers or transformers, by its config.json and
    its tensors.

    Args:
      tokenizer: folder of the tokenizer, where it does not lie with the weights of a text encoder.
      named: fields that the person will set, {'stages.first', ...}: such stages need not be there.

    Raises:
      UserError: there is none, or it does not say what a config needs.
    """
    parts = open_parts(path)
    if '_class_name' not in parts.weights.config and (made := from_checkpoint(parts.weights, named)) is not None:
        return made
    if '_class_name' not in parts.weights.config and (config := reading_texts(parts.weights, tokenizer)) is not None:
        return config.family, config
    if parts.lacking and 'first' not in parts.stages and 'stages.first' not in named:
        raise UserError(
            f'{path} lacks its first stage, the folder {parts.lacking}: fetch that too, or give --config and '
            '--config.stages.first'
        )
    said = parts.weights.config
    if str(said.get('_class_name')) in text_to_image.KEYS:
        return text_to_images(path, parts, named)
    diffuses = any(text_to_image.DIFFUSION in name for name in parts.weights)
    if not said and not diffuses and (sizes := compvis.sizes(parts.weights)):
        base = CLASSES['AutoencoderKL'][0]
        return base, configs.complete(configs.update_sections(configs.load(base).to_dict(), {'model': sizes}))
    if not said:
        raise UserError(f'--mode=import --from={path} needs --config: no config.json beside the weights says the sizes')
    size, model = fields_of(said)
    stage = parts.stages.get('first')
    base = CLASSES[said['_class_name']][0]
    if stage is not None and base == 'ddpm_cifar10':
        base = 'ldm_celebahq256'
    if not size:
        raise UserError(
            f'config.json of {path}: sample_size is {said.get("sample_size")!r}; give --config with config.data.size'
        )
    sections = configs.load(base).to_dict()
    # In float32, whatever the nearest config trains in: images are those of the pipeline.
    over: dict[str, Any] = {'model': model, 'data': {'channels': said.get('in_channels', 3)}}
    over['train'] = {'dtype': 'float32'}
    if stage is not None:
        diffusers.check_kinds(stage.config, 'config.json of the first stage')
        kind, widths = stage.config.get('_class_name'), stage.config.get('block_out_channels', [0])
        if kind not in CLASSES:
            raise UserError(f'the first stage of {path} is a {kind!r}: give the --config of the networks')
        over['stages'] = {'first': os.path.join('runs', CLASSES[kind][0])}
        over['data']['channels'] = stage.config.get('in_channels', 3)
        size = tuple(min(side << min(len(widths) - 1, 31), 2**31) for side in size)
    elif sections.get('stages'):
        raise UserError(f'{path} is a model of latents: name the folder of its pipeline, or give --config')
    over['data']['size'] = size if size[0] != size[1] else size[0]
    classes = said.get('num_class_embeds') or said.get('num_embeds_ada_norm')
    if said['_class_name'] == 'UNet2DModel' and classes:
        raise UserError(f'{path} has {classes} classes: give --config, with the data that have them')
    if classes and classes != 1000:
        raise UserError(f'{path} has {classes} classes: give --config, with the data that have them')
    return base, configs.complete(configs.update_sections(sections, over))
