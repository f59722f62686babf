"""Names of diffusers' networks that read texts: UNet2DConditionModel, ControlNetModel, SD3Transformer2DModel,
FluxTransformer2DModel."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from jaxgen.errors import UserError
from jaxgen.weights import guided
from jaxgen.weights.diffusers import ANY, blocks, check_kinds, check_values, is_of, map_shape, pipeline_fields
from jaxgen.weights.files import Tensor, Weights
from jaxgen.weights.mapping import LEAVES, Layout, Substitution, Table
from jaxgen.weights.source import Shapes, Source, known, network, numbers, of_shape


def of_transformer(ours: str, theirs: str) -> Substitution:
    return (f'_transformer/blocks/{ours}/', f'_transformer/transformer_blocks.*.{theirs}/')


# Inside a transformer of the U-Net, whose names are the same in diffusers and in latent-diffusion.
TRANSFORMER: list[Substitution] = [
    (r'_transformer/blocks/norm(\d)/', r'_transformer/transformer_blocks.*.norm\1/'),
    of_transformer('qkv', 'attn1.to_{q,k,v}'),
    of_transformer('out', 'attn1.to_out.0'),
    of_transformer('cross_q', 'attn2.to_q'),
    of_transformer('cross_kv', 'attn2.to_{k,v}'),
    of_transformer('cross_out', 'attn2.to_out.0'),
    of_transformer('mlp1', 'ff.net.0.proj'),
    of_transformer('mlp2', 'ff.net.2'),
    ('_transformer/first/', '_transformer/proj_in/'),
    ('_transformer/last/', '_transformer/proj_out/'),
]


def latent_unet(config: ConfigDict, shapes: Shapes) -> Table:
    """UNet2DConditionModel: the U-Net of Stable Diffusion 1 and 2, of SDXL and of its refiner."""
    top = len(config.model.network.multipliers) - 1
    names = [
        ('^denoiser/', ''),
        ('_transformer/norm/', '_transformer/norm_in/'),  # no norm of `blocks`
        *TRANSFORMER,
        (r'^down(\d+)_(\d+)_transformer/', r'down_blocks.\1.attentions.\2/'),
        (r'^up(\d+)_(\d+)_transformer/', lambda m: f'up_blocks.{top - int(m[1])}.attentions.{m[2]}/'),
        ('^middle_transformer/', 'mid_block.attentions.0/'),
        (r'^time(\d)/', r'time_embedding.linear_\1/'),
        (r'^pooled/linear(\d)/', r'add_embedding.linear_\1/'),
        ('^label/', 'class_embedding/'),
        *blocks(top),
        ('/norm_in/', '/norm/'),
    ]
    one_by_one = [r'.*/shortcut/kernel']
    if not config.model.network.get('linear_projection', True):
        one_by_one.append(r'.*_transformer/(first|last)/kernel')
    return Table([*names, *LEAVES], [Layout(where, 'o i 1 1 -> i o') for where in one_by_one])


def compvis_unet(config: ConfigDict, shapes: Shapes) -> Table:
    """The same network by the names of CompVis and Stability AI, which are those of guided-diffusion but for
    transformers in place of attention."""
    named = dict(shapes)
    for path in shapes:
        if m := re.match(r'(.*up\d+_\d+)_transformer/', path):
            named[f'{m[1]}_attention/qkv/kernel'] = ()
    names = [
        *TRANSFORMER,
        ('_transformer/', '_attention/'),
        (r'^denoiser/pooled/linear(\d)/', lambda m: f'label_emb.0.{2 * int(m[1]) - 2}/'),
        *guided.INSIDE,
        *guided.ENDS,
        ('^middle_attention/', 'middle_block.1/'),
        *guided.numbered(config, named),
    ]
    return Table([*names, *LEAVES], [Layout(r'.*/shortcut/kernel', 'o i 1 1 -> i o')])


def controlnet(config: ConfigDict, shapes: Shapes) -> Table:
    """ControlNetModel of a U-Net as `latent_unet` has it; shapes of 'control/...'."""
    of_unet = latent_unet(config, shapes)
    names = [
        ('^control/', ''),
        ('^hint_first/', 'controlnet_cond_embedding.conv_in/'),
        ('^hint_last/', 'controlnet_cond_embedding.conv_out/'),
        (r'^hint(\d+)/', r'controlnet_cond_embedding.blocks.\1/'),
        ('^zero_middle/', 'controlnet_mid_block/'),
        (r'^zero(\d+)/', r'controlnet_down_blocks.\1/'),
    ]
    zeros = Layout(r'.*/zero\w+/kernel', 'o i 1 1 -> i o')
    return Table([*names, *of_unet.names], [*of_unet.layouts, zeros])


def exchanged(x: np.ndarray) -> np.ndarray:
    """The halves of the last axis in the other order: diffusers' last modulations are a scale, then a shift."""
    return np.concatenate(np.split(x, 2, -1)[::-1], -1)


def joint(ours: str, number: str) -> list[Substitution]:
    """Blocks of two streams."""
    pairs = {
        'image_modulation': 'norm1.linear',
        'text_modulation': 'norm1_context.linear',
        'image_qkv': 'attn.to_{q,k,v}',
        'text_qkv': 'attn.add_{q,k,v}_proj',
        'image_qkv2': 'attn2.to_{q,k,v}',
        'image_out': 'attn.to_out.0',
        'text_out': 'attn.to_add_out',
        'image_out2': 'attn2.to_out.0',
        **{f'image_norm_{part}': f'attn.norm_{part}' for part in 'qk'},
        **{f'text_norm_{part}': f'attn.norm_added_{part}' for part in 'qk'},
        **{f'image_norm_{part}2': f'attn2.norm_{part}' for part in 'qk'},
        'image_mlp1': 'ff.net.0.proj',
        'image_mlp2': 'ff.net.2',
        'text_mlp1': 'ff_context.net.0.proj',
        'text_mlp2': 'ff_context.net.2',
    }
    return [(f'^{ours}/{own}/', f'transformer_blocks.{number}.{name}/') for own, name in pairs.items()]


EMBEDDINGS: list[Substitution] = [
    (r'^time/linear(\d)/', r'time_text_embed.timestep_embedder.linear_\1/'),
    (r'^guidance/linear(\d)/', r'time_text_embed.guidance_embedder.linear_\1/'),
    (r'^pooled/linear(\d)/', r'time_text_embed.text_embedder.linear_\1/'),
    ('^text/', 'context_embedder/'),
    ('^modulation/', 'norm_out.linear/'),
    ('^last/', 'proj_out/'),
]


def mmdit(config: ConfigDict, shapes: Shapes) -> Table:
    """SD3Transformer2DModel: Stable Diffusion 3 and 3.5."""
    network = config.model.network
    names = [
        ('^denoiser/', ''),
        ('^first/', 'pos_embed.proj/'),
        *joint('dual', '*'),
        *joint('blocks', f'*+{network.dual}'),
        *joint('end', str(network.blocks - 1)),
        *EMBEDDINGS,
    ]
    first = Layout('denoiser/first/kernel', 'o c a b -> (a b c) o', {'a': network.patch, 'b': network.patch})
    last = Layout('denoiser/(end/text_modulation|modulation)/.*', forward=exchanged, backward=exchanged)
    return Table([*names, *LEAVES], [first, last])


def flux(config: ConfigDict, shapes: Shapes) -> Table:
    """FluxTransformer2DModel."""
    single = 'single_transformer_blocks.*.'
    names = [
        ('^denoiser/', ''),
        ('^first/', 'x_embedder/'),
        *joint('blocks', '*'),
        ('^single/modulation/', single + 'norm.linear/'),
        ('^single/qkv/', single + 'attn.to_{q,k,v}/'),
        ('^single/norm_(.)/', single + r'attn.norm_\1/'),
        ('^single/mlp1/', single + 'proj_mlp/'),
        ('^single/out/', single + 'proj_out/'),
        *EMBEDDINGS,
    ]
    return Table([*names, *LEAVES], [Layout('denoiser/modulation/.*', forward=exchanged, backward=exchanged)])


def stability_blocks(ours: str, number: str) -> list[Substitution]:
    """Blocks of two streams as Stability AI names them, q, k and v joined."""
    parts = {
        'modulation': 'adaLN_modulation.1',
        'qkv': 'attn.qkv',
        'out': 'attn.proj',
        'norm_q': 'attn.ln_q',
        'norm_k': 'attn.ln_k',
        'mlp1': 'mlp.fc1',
        'mlp2': 'mlp.fc2',
        'qkv2': 'attn2.qkv',
        'out2': 'attn2.proj',
        'norm_q2': 'attn2.ln_q',
        'norm_k2': 'attn2.ln_k',
    }
    streams = {'image': 'x_block', 'text': 'context_block'}
    return [
        (f'^{ours}/{own}_{part}/', f'joint_blocks.{number}.{block}.{name}/')
        for own, block in streams.items()
        for part, name in parts.items()
    ]


def stability_mmdit(config: ConfigDict, shapes: Shapes) -> Table:
    """MMDiT of Stable Diffusion 3 and 3.5 as Stability AI has it."""
    net = config.model.network
    names = [
        ('^denoiser/', ''),
        ('^first/', 'x_embedder.proj/'),
        *stability_blocks('dual', '*'),
        *stability_blocks('blocks', f'*+{net.dual}'),
        *stability_blocks('end', str(net.blocks - 1)),
        (r'^time/linear(\d)/', lambda m: f't_embedder.mlp.{2 * int(m[1]) - 2}/'),
        (r'^pooled/linear(\d)/', lambda m: f'y_embedder.mlp.{2 * int(m[1]) - 2}/'),
        ('^text/', 'context_embedder/'),
        ('^modulation/', 'final_layer.adaLN_modulation.1/'),
        ('^last/', 'final_layer.linear/'),
    ]
    first = Layout('denoiser/first/kernel', 'o c a b -> (a b c) o', {'a': net.patch, 'b': net.patch})
    return Table([*names, *LEAVES], [first])


def bfl_flux(config: ConfigDict, shapes: Shapes) -> Table:
    """FLUX.1 as Black Forest Labs has it, after `with_halves`."""
    names: list[Substitution] = [('^denoiser/', ''), ('^first/', 'img_in/'), ('^text/', 'txt_in/')]
    for own, theirs in {'image': 'img', 'text': 'txt'}.items():
        block = f'double_blocks.*.{theirs}_'
        parts = {'modulation': 'mod.lin', 'qkv': 'attn.qkv', 'out': 'attn.proj', 'mlp1': 'mlp.0', 'mlp2': 'mlp.2'}
        names += [(f'^blocks/{own}_{part}/', f'{block}{name}/') for part, name in parts.items()]
        for part, name in {'q': 'query', 'k': 'key'}.items():
            names.append((f'^blocks/{own}_norm_{part}/scale$', f'{block}attn.norm.{name}_norm.scale'))
    single = 'single_blocks.*.'
    names += [
        ('^single/modulation/', single + 'modulation.lin/'),
        ('^single/qkv/', single + 'linear1.0/'),
        ('^single/mlp1/', single + 'linear1.1/'),
        ('^single/norm_q/scale$', single + 'norm.query_norm.scale'),
        ('^single/norm_k/scale$', single + 'norm.key_norm.scale'),
        ('^single/out/', single + 'linear2/'),
        ('^modulation/', 'final_layer.adaLN_modulation.1/'),
        ('^last/', 'final_layer.linear/'),
    ]
    for own, theirs in {'time': 'time_in', 'guidance': 'guidance_in', 'pooled': 'vector_in'}.items():
        names += [(f'^{own}/linear1/', f'{theirs}.in_layer/'), (f'^{own}/linear2/', f'{theirs}.out_layer/')]
    return Table([*names, *LEAVES])


HALVES = (r'(.*single_blocks\.\d+\.linear1)\.\d\.(weight|bias)', r'\1.\2')  # as `with_halves` names them


def part_of(tensor: Tensor, start: int, end: int) -> Tensor:
    """Rows of a tensor."""
    shape = (end - start, *tensor.shape[1:])
    return dataclasses.replace(tensor, shape=shape, read=lambda: tensor.read()[start:end])


def with_halves(weights: Weights) -> Weights:
    """The weights of FLUX with what a block of one stream computes in one product as two: q, k and v, and the MLP."""
    tensors = {}
    for name, tensor in weights.tensors.items():
        m = re.fullmatch(r'(.*single_blocks\.\d+\.linear1)\.(weight|bias)', name)
        width = of_shape(weights, f'{m[1]}.weight', 1) if m else 0
        if m and tensor.shape and tensor.shape[0] > 3 * width:
            tensors[f'{m[1]}.0.{m[2]}'] = part_of(tensor, 0, 3 * width)
            tensors[f'{m[1]}.1.{m[2]}'] = part_of(tensor, 3 * width, tensor.shape[0])
        else:
            tensors[name] = tensor
    return dataclasses.replace(weights, tensors=tensors)


# --- what config.json says

# Values of the keys of each class's config.json, as `diffusers.KEYS` has them.
COMMON = dict.fromkeys(('sample_size', 'in_channels', 'out_channels', 'patch_size', 'num_layers'), ANY)
HEADS = dict.fromkeys(
    ('attention_head_dim', 'num_attention_heads', 'joint_attention_dim', 'pooled_projection_dim'), ANY
)
KEYS: dict[str, dict[str, tuple]] = {
    'UNet2DConditionModel': {
        **dict.fromkeys(('sample_size', 'in_channels', 'out_channels', 'block_out_channels', 'layers_per_block'), ANY),
        **dict.fromkeys(('flip_sin_to_cos', 'freq_shift', 'downsample_padding', 'dropout', 'norm_num_groups'), ANY),
        **dict.fromkeys(('norm_eps', 'cross_attention_dim', 'transformer_layers_per_block', 'attention_head_dim'), ANY),
        **dict.fromkeys(('num_attention_heads', 'use_linear_projection', 'upcast_attention'), ANY),
        **dict.fromkeys(('addition_time_embed_dim', 'projection_class_embeddings_input_dim'), ANY),
        **dict.fromkeys(('addition_embed_type_num_heads', 'mid_block_only_cross_attention'), ANY),
        'center_input_sample': (False,),
        'down_block_types': ('CrossAttnDownBlock2D', 'DownBlock2D'),
        'mid_block_type': ('UNetMidBlock2DCrossAttn',),
        'up_block_types': ('CrossAttnUpBlock2D', 'UpBlock2D'),
        'only_cross_attention': (False,),
        'mid_block_scale_factor': (1,),
        'act_fn': ('silu', 'swish'),
        'reverse_transformer_layers_per_block': (None,),
        'encoder_hid_dim': (None,),
        'encoder_hid_dim_type': (None,),
        'dual_cross_attention': (False,),
        'class_embed_type': (None,),
        'num_class_embeds': (None,),
        'addition_embed_type': (None, 'text_time'),
        'resnet_time_scale_shift': ('default', 'scale_shift'),
        'resnet_skip_time_act': (False,),
        'resnet_out_scale_factor': (1,),
        'time_embedding_type': ('positional',),
        'time_embedding_dim': (None,),
        'time_embedding_act_fn': (None,),
        'timestep_post_act': (None,),
        'time_cond_proj_dim': (None,),
        'conv_in_kernel': (3,),
        'conv_out_kernel': (3,),
        'attention_type': ('default',),
        'class_embeddings_concat': (False,),
        'cross_attention_norm': (None,),
    },
    'SD3Transformer2DModel': {
        **COMMON,
        **HEADS,
        **dict.fromkeys(('caption_projection_dim', 'pos_embed_max_size', 'dual_attention_layers'), ANY),
        'qk_norm': (None, 'rms_norm'),
    },
    'FluxTransformer2DModel': {
        **COMMON,
        **HEADS,
        **dict.fromkeys(('num_single_layers', 'guidance_embeds', 'axes_dims_rope'), ANY),
    },
}
CLASSES = {'latent_unet': 'UNet2DConditionModel', 'mmdit': 'SD3Transformer2DModel', 'flux': 'FluxTransformer2DModel'}


def by_level(said: Mapping[str, Any], key: str, default: int, levels: int) -> list[int]:
    """A key's count of each level, which may be one for all.

    Raises:
      UserError: it is something else.
    """
    value = said.get(key)
    counts = list(value) if isinstance(value, list | tuple) else [default if value is None else value] * levels
    if len(counts) != levels or not all(is_of('a count', one) for one in counts):
        raise UserError(
            f'{key} is {repr(value)[:80]} in the config.json of the weights: one count, or one of each level'
        )
    return counts


def plain(said: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with one number where a key has one of each level, as `diffusers.check_kinds` knows it."""
    out = {key: value for key, value in said.items() if value is not None}
    for key in ('attention_head_dim', 'layers_per_block', 'num_attention_heads'):
        if is_of('a list of counts', out.get(key)):
            out[key] = out[key][0]
    return out


def checked(said: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of one of CLASSES.

    Raises:
      UserError: it says what no network here has, or is damaged.
    """
    check_kinds(plain(said), 'the config.json of the weights')
    check_values(said, KEYS[said['_class_name']])
    return dict(said)


def unet_section(said: Mapping[str, Any]) -> dict[str, Any]:
    """The network of a UNet2DConditionModel.

    Raises:
      UserError: heads or levels that this network has not.
    """
    widths = list(said.get('block_out_channels', (320, 640, 1280, 1280)))
    levels = len(widths)
    kinds = said.get('down_block_types', (*['CrossAttnDownBlock2D'] * 3, 'DownBlock2D'))
    ups = said.get('up_block_types', ('UpBlock2D', *['CrossAttnUpBlock2D'] * 3))
    crossed = [str(kind).startswith('Cross') for kind in kinds]
    if len(crossed) != levels or [str(kind).startswith('Cross') for kind in ups][::-1] != crossed:
        raise UserError('down_block_types and up_block_types of the file are not those of the same levels')
    depths = by_level(said, 'transformer_layers_per_block', 1, levels)
    residual = {*by_level(said, 'layers_per_block', 2, levels)}
    if len(residual) > 1:
        raise UserError('layers_per_block of the file differ by level: the network here has as many on each')
    # Its attention_head_dim is the number of heads, by an old mistake that files count on.
    key = 'num_attention_heads' if said.get('num_attention_heads') is not None else 'attention_head_dim'
    heads = by_level(said, key, 8, levels)
    if not all(heads):
        raise UserError(f'{key} of the file is 0: the config.json is damaged')
    if len({*heads}) == 1:
        own = {'heads': heads[0], 'head_channels': 0}
    elif len({width / n for width, n in zip(widths, heads, strict=True)}) == 1 and widths[0] % heads[0] == 0:
        own = {'head_channels': widths[0] // heads[0]}
    else:
        raise UserError(f'{key} of the file is {heads}: heads here are as many, or as wide, on each level')
    embedding = (said.get('freq_shift', 0), said.get('downsample_padding', 1))
    if embedding[0] not in (0, 1) or embedding[1] not in (0, 1):
        raise UserError(f'freq_shift and downsample_padding of the file must be 0 or 1; they are {embedding}')
    return {
        'name': 'latent_unet',
        'channels': widths[0],
        'multipliers': fractions(widths),
        'blocks': residual.pop(),
        'depths': tuple(n if there else 0 for n, there in zip(depths, crossed, strict=True)),
        'middle_depth': depths[-1],
        **own,
        'dropout': float(said.get('dropout', 0.0)),
        'groups': said.get('norm_num_groups', 32),
        'group_size': 0,
        'eps': said.get('norm_eps', 1e-5),
        'scale_shift': said.get('resnet_time_scale_shift', 'default') == 'scale_shift',
        'resample_in_blocks': False,
        'sines_first': not said.get('flip_sin_to_cos', True),
        'freq_shift': embedding[0],
        'padding': 'all' if embedding[1] else 'end',
    }


def mmdit_section(said: Mapping[str, Any]) -> dict[str, Any]:
    """The network of a SD3Transformer2DModel.

    Raises:
      UserError: blocks with a second attention behind others.
    """
    heads, dual = said.get('num_attention_heads', 18), list(said.get('dual_attention_layers', ()))
    if dual != list(range(len(dual))):
        raise UserError(f'dual_attention_layers of the file are {dual}: here they are the first blocks')
    channels = heads * said.get('attention_head_dim', 64)
    if said.get('caption_projection_dim', channels) != channels:
        raise UserError(f'caption_projection_dim of the file must be {channels}, the width of a token')
    patch = said.get('patch_size', 2)
    return {
        'name': 'mmdit',
        'channels': channels,
        'blocks': said.get('num_layers', 18),
        'heads': heads,
        'dual': len(dual),
        'qk_norm': said.get('qk_norm') is not None,
        'patch': patch,
        'largest': (largest := said.get('pos_embed_max_size', 96)),
        # Positions count in patches of the maps that the table was made for.
        'unit': largest / ((said.get('sample_size') or 128) // patch),
    }


def flux_section(said: Mapping[str, Any]) -> dict[str, Any]:
    """The network of a FluxTransformer2DModel, whose input is patches of 2 x 2."""
    heads = said.get('num_attention_heads', 24)
    if said.get('patch_size', 1) != 1 or said.get('in_channels', 64) % 4:
        raise UserError('patch_size and in_channels of the file must be 1 and a multiple of 4: tokens are 2 x 2 pixels')
    return {
        'name': 'flux',
        'channels': heads * said.get('attention_head_dim', 128),
        'blocks': said.get('num_layers', 19),
        'single_blocks': said.get('num_single_layers', 38),
        'heads': heads,
        'patch': 2,
        'axes': tuple(said.get('axes_dims_rope', (16, 56, 56))),
        'distilled': bool(said.get('guidance_embeds', False)),
    }


SECTIONS = {
    'UNet2DConditionModel': unet_section,
    'SD3Transformer2DModel': mmdit_section,
    'FluxTransformer2DModel': flux_section,
}


def section_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """The section config.model.network by a config.json of one of CLASSES.

    Raises:
      UserError: it says what no network here has, or is damaged.
    """
    kind = said['_class_name']
    try:
        return SECTIONS[kind](checked(said))
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError, OverflowError) as e:
        raise UserError(f'config.json of a {kind} is damaged ({type(e).__name__}: {e})') from e


def fractions(widths: Sequence[int]) -> tuple[float, ...]:
    """Widths over the first of them; `int(channels * multiplier)` is the width again."""
    quotients = [(width, width / widths[0]) for width in widths]
    return tuple(q if int(widths[0] * q) == width else math.nextafter(q, math.inf) for width, q in quotients)


def fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Fields of a network that reads texts by its config.json, and of the pipeline that it lies in."""
    name, said = network(config), weights.config if weights is not None else {}
    if not said:
        return {}
    kind = said.get('_class_name', '')
    if kind != CLASSES[name]:
        raise UserError(f'the config.json of the weights is of a {kind or "model of no class"}: this config takes '
                        f'{CLASSES[name]}')  # fmt: skip
    own = {f'model.network.{key}': value for key, value in section_of(said).items()}
    return own | pipeline_fields(config, weights)


# --- what the pipeline says

NUMBERS = 6  # of SDXL: original height and width, top and left of the crop, target height and width
AESTHETIC = (
    6.0,
    2.5,
)  # the score that SDXL's refiner reads in place of the last two, of a prompt and of a negative one
# What the pipelines of diffusers draw with where a person says nothing.
SCALES = {'UNet2DConditionModel': 7.5, 'SD3Transformer2DModel': 7.0, 'FluxTransformer2DModel': 3.5}
SCALE_XL = 5.0
LENGTHS = {'SD3Transformer2DModel': 256, 'FluxTransformer2DModel': 512}  # tokens of a prompt of T5


# What is what in a pipeline, for messages.
TITLES = {'first': 'first stage', 'text': 'text encoder', 'text_2': 'second text encoder', 'text_3': 'T5'}


def encoders_of(said: Mapping[str, Any]) -> tuple[str, ...]:
    """The text encoders without which a network has nothing to read, by its config.json."""
    wanted = {'SD3Transformer2DModel': ('text', 'text_2', 'text_3'), 'FluxTransformer2DModel': ('text', 'text_2')}
    sized = said.get('addition_embed_type') == 'text_time'
    return wanted.get(said['_class_name'], ('text_2',) if sized else ('text',))


def conditioning_of(
    said: Mapping[str, Any], index: Mapping[str, Any], encoders: Sequence[str], size: tuple[int, ...]
) -> dict[str, Any]:
    """config.model.conditioning and guidance of a pipeline.

    Args:
      said: config.json of the network; index: model_index.json.
      encoders: stages of its text encoders, of 'text', 'text_2', 'text_3'.
      size: height and width of an image.

    Raises:
      UserError: it lacks a text encoder.
    """
    kind, scale = said['_class_name'], SCALES[said['_class_name']]
    caption: dict[str, Any] = {'kind': 'text', 'dropout': 0.1}
    conditioning: dict[str, Any] = {'caption': caption}
    guidance = {'distilled': scale} if said.get('guidance_embeds') else {'scale': scale}
    sized = said.get('addition_embed_type') == 'text_time'
    if missing := [stage for stage in encoders_of(said) if stage not in encoders]:
        raise UserError(
            f'the pipeline lacks {missing[0].replace("text", "text_encoder")}, which its network was trained with: '
            f'fetch that folder too, or name a run of it, --config.stages.{missing[0]}=RUN'
        )
    if kind == 'SD3Transformer2DModel':
        caption['tokens'] = ('text/before+text_2/before', 'text_3/last')
        caption['pooled'] = ('text/embedding', 'text_2/embedding')
    elif kind == 'FluxTransformer2DModel':
        caption |= {'tokens': ('text_2/last',), 'pooled': ('text/pooled',)}
        if not said.get('guidance_embeds'):
            guidance = {'scale': 1.0}
    elif sized:
        both = [stage for stage in ('text', 'text_2') if stage in encoders]
        caption |= {'tokens': ('+'.join(f'{stage}/before' for stage in both),), 'pooled': ('text_2/embedding',)}
        caption['empty'] = 'zeros' if index.get('force_zeros_for_empty_prompt', True) else 'encoded'
        sides = tuple(map(float, size))
        values, absent = (*sides, 0.0, 0.0, *sides), ()
        if index.get('requires_aesthetics_score'):
            values, absent = ((*sides, 0.0, 0.0, score) for score in AESTHETIC)
        conditioning['sizes'] = {'kind': 'numbers', 'values': values, 'absent': absent}
        conditioning['sizes']['features'] = said.get('addition_time_embed_dim') or 256
        guidance = {'scale': SCALE_XL}
    else:
        caption['tokens'] = ('text/last',)
    read, made = said.get('in_channels') or 4, said.get('out_channels') or 4
    if kind == 'UNet2DConditionModel' and read == inpainting_channels(made):
        conditioning['inpainting'] = {'kind': 'inpainting'}
    return {'conditioning': conditioning, 'guidance': guidance}


def inpainting_channels(latent: int) -> int:
    """Channels that a network of inpainting reads: latents, a mask, latents of what is known."""
    return 2 * latent + 1


# --- config.json of what is exported


def model_config(config: ConfigDict, assembled: Any) -> dict[str, Any]:
    """config.json by which diffusers builds the network of a run."""
    net = config.model.network.to_dict()
    params = assembled.abstract.params['denoiser']
    shape = map_shape(assembled)
    made = {'latent_unet': unet_config, 'mmdit': mmdit_config, 'flux': flux_config}[net['name']]
    own = made(net, params, shape)
    numbers = [one for one in config.model.conditioning.values() if one.kind == 'numbers']
    more = {'addition_time_embed_dim': numbers[0].features} if numbers else {}
    return {'_class_name': CLASSES[net['name']], **own, **more}


def unet_config(net: dict[str, Any], params: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    widths = [int(net['channels'] * m) for m in net['multipliers']]
    crossed = [depth > 0 for depth in net['depths']]
    heads = [width // net['head_channels'] if net['head_channels'] else net['heads'] for width in widths]
    # A level without a transformer has a depth too, the last one's is the middle's.
    depths = [depth or 1 for depth in net['depths'][:-1]] + [net['middle_depth']]
    if crossed[-1] and net['depths'][-1] != net['middle_depth']:
        raise UserError(
            'diffusers has as many blocks in the middle as on the last level: name a file, --to=FILE.safetensors'
        )
    context = next(flat for path, flat in flatten_dict(params, sep='/').items() if path.endswith('cross_kv/kernel'))
    pooled = params.get('pooled')
    extra: dict[str, Any] = {}
    if pooled is not None:
        width = pooled['linear1']['kernel'].shape[0]
        extra = {'addition_embed_type': 'text_time', 'projection_class_embeddings_input_dim': width}
    return {
        'sample_size': shape[0] if shape[0] == shape[1] else list(shape[:2]),
        'in_channels': params['first']['kernel'].shape[2],
        'out_channels': params['last']['kernel'].shape[3],
        'block_out_channels': widths,
        'layers_per_block': net['blocks'],
        'down_block_types': ['CrossAttnDownBlock2D' if one else 'DownBlock2D' for one in crossed],
        'up_block_types': ['CrossAttnUpBlock2D' if one else 'UpBlock2D' for one in crossed[::-1]],
        'transformer_layers_per_block': depths,
        'attention_head_dim': heads[0] if len({*heads}) == 1 else heads,
        'cross_attention_dim': context.shape[-2],
        'use_linear_projection': True,
        'norm_num_groups': net['groups'],
        'norm_eps': net['eps'],
        'dropout': net['dropout'],
        'flip_sin_to_cos': not net['sines_first'],
        'freq_shift': net['freq_shift'],
        'downsample_padding': 1 if net['padding'] == 'all' else 0,
        'resnet_time_scale_shift': 'scale_shift' if net['scale_shift'] else 'default',
        **extra,
    }


def mmdit_config(net: dict[str, Any], params: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        'sample_size': round(net['largest'] / net['unit']) * net['patch'],
        'patch_size': net['patch'],
        'in_channels': params['first']['kernel'].shape[0] // net['patch'] ** 2,
        'num_layers': net['blocks'],
        'attention_head_dim': net['channels'] // net['heads'],
        'num_attention_heads': net['heads'],
        'joint_attention_dim': params['text']['kernel'].shape[0],
        'caption_projection_dim': net['channels'],
        'pooled_projection_dim': params['pooled']['linear1']['kernel'].shape[0],
        'out_channels': params['last']['kernel'].shape[1] // net['patch'] ** 2,
        'pos_embed_max_size': net['largest'],
        'dual_attention_layers': list(range(net['dual'])),
        'qk_norm': 'rms_norm' if net['qk_norm'] else None,
    }


def flux_config(net: dict[str, Any], params: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        'patch_size': 1,
        'in_channels': params['first']['kernel'].shape[0],
        'num_layers': net['blocks'],
        'num_single_layers': net['single_blocks'],
        'attention_head_dim': net['channels'] // net['heads'],
        'num_attention_heads': net['heads'],
        'joint_attention_dim': params['text']['kernel'].shape[0],
        'pooled_projection_dim': params['pooled']['linear1']['kernel'].shape[0],
        'guidance_embeds': net['distilled'],
        'axes_dims_rope': list(net['axes']),
    }


# --- checkpoints of CompVis and Stability AI

DIFFUSION = 'model.diffusion_model.'  # prefix of the network in them


def compvis_section(weights: Weights) -> dict[str, Any]:
    """The network of a checkpoint by its tensors: {} where there is none. Its heads are eight in Stable Diffusion 1,
    and 64 wide in all later ones, which read wider contexts."""
    first, blocks = of_shape(weights, 'input_blocks.0.0.weight', 0), numbers(weights, r'input_blocks\.(\d+)\.')
    crossed = [name for name in weights if name.endswith('.attn2.to_k.weight')]
    if not first or not crossed:
        return {}
    context = context_of(weights)
    widths, depths, own = [], [], []
    for n in blocks[1:]:
        if f'input_blocks.{n}.0.op.weight' in weights:
            own.append(n)
            continue
        width = of_shape(weights, f'input_blocks.{n}.0.out_layers.3.weight', 0)
        depth = len(numbers(weights, rf'input_blocks\.{n}\.1\.transformer_blocks\.(\d+)\.'))
        if not widths or n - 1 in own:
            widths.append(width)
            depths.append(depth)
    per_level = (len(blocks) - 1 - len(own)) // max(len(widths), 1)
    return {
        'name': 'latent_unet',
        'channels': first,
        'multipliers': fractions([first, *widths])[1:],
        'blocks': per_level,
        'depths': tuple(depths),
        'middle_depth': len(numbers(weights, r'middle_block\.1\.transformer_blocks\.(\d+)\.')),
        **({'heads': 8, 'head_channels': 0} if context <= 768 else {'head_channels': 64}),
        **{'groups': 32, 'group_size': 0, 'eps': 1e-5, 'scale_shift': False, 'resample_in_blocks': False},
        **{'sines_first': False, 'freq_shift': 0, 'padding': 'all'},
    }


def context_of(weights: Weights) -> int:
    """Width of the tokens that a network of CompVis' names reads; 0 where it reads none."""
    crossed = (tensor for name, tensor in weights.tensors.items() if name.endswith('.attn2.to_k.weight'))
    return next((tensor.shape[-1] for tensor in crossed if tensor.shape), 0)


def compvis_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """What the tensors tell; the heads are the config's."""
    own = compvis_section(weights) if weights is not None else {}
    sizes = {key: value for key, value in own.items() if key not in ('heads', 'head_channels')}
    return {f'model.network.{key}': value for key, value in sizes.items()}


def compvis_remarks(config: ConfigDict, weights: Weights) -> list[str]:
    net = config.model.network
    heads = f'{net.head_channels} channels a head, head_channels' if net.head_channels else f'{net.heads}, heads'
    return [
        f'the file does not say how many heads its attention has ({heads} of config.model.network), nor what the '
        f'network predicts: {config.model.training.prediction.name!r}, config.model.training.prediction'
    ]


def stability_section(weights: Weights) -> dict[str, Any]:
    """The network of an MMDiT by its tensors: heads are 64 wide, and positions count in units of a 64th of its side."""
    table = weights.get('pos_embed')
    largest = math.isqrt(table.shape[1]) if table is not None and len(table.shape) == 3 else 0
    channels = of_shape(weights, 'x_embedder.proj.weight', 0)
    sizes = {
        'channels': channels,
        'heads': channels // 64,
        'blocks': len(numbers(weights, r'joint_blocks\.(\d+)\.')),
        'patch': of_shape(weights, 'x_embedder.proj.weight', 2),
        'largest': largest,
        'unit': largest / 64,
    }
    return known(sizes) | {
        'name': 'mmdit',
        'dual': len(numbers(weights, r'joint_blocks\.(\d+)\.x_block\.attn2\.')),
        'qk_norm': 'joint_blocks.0.x_block.attn.ln_q.weight' in weights,
    }


def bfl_section(weights: Weights) -> dict[str, Any]:
    """The network of a FLUX by its tensors: heads are 128 wide."""
    channels = of_shape(weights, 'img_in.weight', 0)
    sizes = {
        'channels': channels,
        'heads': channels // 128,
        'blocks': len(numbers(weights, r'double_blocks\.(\d+)\.')),
        'single_blocks': len(numbers(weights, r'single_blocks\.(\d+)\.')),
    }
    return known(sizes) | {'name': 'flux', 'distilled': 'guidance_in.in_layer.weight' in weights}


def by_tensors(section: Callable[[Weights], dict[str, Any]]) -> Callable[[ConfigDict, Weights | None], dict[str, Any]]:
    """`Source.fields` by the tensors; what is not in them is the config's."""

    def fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
        own = section(weights) if weights is not None else {}
        return {f'model.network.{key}': x for key, x in own.items() if key not in ('name', 'heads', 'unit')}

    return fields


def own_remarks(config: ConfigDict, weights: Weights) -> list[str]:
    net = config.model.network
    more = f', axes {net.axes}' if 'axes' in net else f', unit {net.unit} of the positions'
    return [f'the file does not say how many heads its attention has: {net.heads}{more}, config.model.network']


def of_network(name: str) -> Callable[[ConfigDict], bool]:
    """Config -> whether it is of such a network, and not of what is trained beside that of a stage."""
    return lambda config: network(config) == name and config.model.controlnet.name == 'none'


SOURCES = (
    Source('diffusers', 'UNet2DConditionModel of diffusers', of_network('latent_unet'), latent_unet, fields=fields),
    Source(
        'diffusers', 'SD3Transformer2DModel of diffusers', of_network('mmdit'), mmdit, skip=r'pos_embed\.pos_embed',
        fields=fields,
    ),
    Source(
        'compvis', 'checkpoints of Stable Diffusion of CompVis and Stability AI', of_network('latent_unet'),
        compvis_unet, roots=('', 'state_dict.', DIFFUSION, f'state_dict.{DIFFUSION}'), prepare=guided.averages,
        fields=compvis_fields, remarks=compvis_remarks,
    ),
    Source(
        'stability', 'Stable Diffusion 3 and 3.5 of Stability AI', of_network('mmdit'), stability_mmdit,
        roots=('', DIFFUSION), skip='pos_embed', fields=by_tensors(stability_section), remarks=own_remarks,
    ),
    Source(
        'bfl', 'FLUX.1 of Black Forest Labs', of_network('flux'), bfl_flux, roots=('', DIFFUSION), prepare=with_halves,
        fields=by_tensors(bfl_section), rows=HALVES,
        remarks=own_remarks,
    ),
    Source('diffusers', 'FluxTransformer2DModel of diffusers', of_network('flux'), flux, fields=fields),
)  # fmt: skip
