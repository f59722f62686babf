"""Names of ControlNets: ControlNetModel of diffusers, and the files of lllyasviel/ControlNet."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from ml_collections import ConfigDict

from jaxgen.errors import UserError
from jaxgen.options import shown
from jaxgen.weights import guided, text_to_image
from jaxgen.weights.diffusers import ANY, check_values, group_counts, is_of
from jaxgen.weights.files import Tensor, Weights
from jaxgen.weights.mapping import LEAVES, Layout, Substitution, Table
from jaxgen.weights.source import COSINES_FIRST, Shapes, Source, known, numbers, of_shape

KEYS: dict[str, tuple] = {
    **dict.fromkeys(('in_channels', 'block_out_channels', 'layers_per_block', 'cross_attention_dim'), ANY),
    **dict.fromkeys(('attention_head_dim', 'num_attention_heads', 'transformer_layers_per_block'), ANY),
    **dict.fromkeys(('norm_num_groups', 'norm_eps', 'flip_sin_to_cos', 'freq_shift', 'downsample_padding'), ANY),
    **dict.fromkeys(('use_linear_projection', 'addition_time_embed_dim', 'addition_embed_type_num_heads'), ANY),
    **dict.fromkeys(('projection_class_embeddings_input_dim', 'upcast_attention'), ANY),
    **dict.fromkeys(('conditioning_channels', 'conditioning_embedding_out_channels', 'global_pool_conditions'), ANY),
    'controlnet_conditioning_channel_order': ('rgb', 'bgr'),
    'down_block_types': ('CrossAttnDownBlock2D', 'DownBlock2D'),
    'mid_block_type': ('UNetMidBlock2DCrossAttn',),
    'only_cross_attention': (False,),
    'mid_block_scale_factor': (1,),
    'act_fn': ('silu', 'swish'),
    'addition_embed_type': (None, 'text_time'),
    'class_embed_type': (None,),
    'resnet_time_scale_shift': ('default',),
}


# {keys: kind of each of their values, see `diffusers.is_of`}, null aside; a value for all levels, or one for each.
LEVELS = ('attention_head_dim', 'num_attention_heads', 'transformer_layers_per_block')
COUNTS = ('layers_per_block', 'conditioning_channels', 'norm_num_groups', 'freq_shift', 'downsample_padding')
LISTS = ('block_out_channels', 'conditioning_embedding_out_channels')


def checked(said: dict[str, Any]) -> dict[str, Any]:
    """What config.json says, without null.

    Raises:
      UserError: it is of another class, damaged, or says what no network here has.
    """
    name = said.get('_class_name', 'ControlNetModel')
    if name != 'ControlNetModel':
        raise UserError(f'the config.json of the weights is of a {name}: this config takes ControlNetModel')
    said = {key: value for key, value in said.items() if value is not None}
    kinds = {
        **dict.fromkeys(LEVELS, 'a count'),
        **dict.fromkeys(COUNTS, 'a count'),
        **dict.fromkeys(LISTS, 'a list of counts'),
        'norm_eps': 'a number',
        'flip_sin_to_cos': 'true or false',
        'global_pool_conditions': 'true or false',
    }
    for key, kind in kinds.items():
        several = key in LEVELS and isinstance(said.get(key), list | tuple)
        kind = 'a list of counts' if several else kind
        if key in said and not is_of(kind, said[key]):
            raise UserError(
                f'the config.json of the weights is damaged: {key} is {shown(said[key], 80)}, and should be {kind}'
            )
    widths = said.get('block_out_channels', (320, 640, 1280, 1280))
    types = said.get('down_block_types', (0,) * 4)
    lists = [said[key] for key in LEVELS if isinstance(said.get(key), list | tuple)]
    levels = {len(x) if isinstance(x, list | tuple) else 0 for x in (widths, types, *lists)}
    heads = heads_of(said, list(widths))
    if len(levels) > 1 or not all((*widths, *heads)):
        raise UserError(
            'the config.json of the weights is damaged: block_out_channels, down_block_types and what it says of each '
            'level differ in number, or are 0'
        )
    check_values(said, KEYS)
    return said


def is_controlnet(config: ConfigDict) -> bool:
    """Whether the config is of a ControlNet."""
    section = config.model.get('controlnet')
    return config.family == 'diffusion' and section is not None and section.get('name', 'none') != 'none'


def each(value: Any, n: int) -> list:
    """A value for each of n levels, of one for all or a list."""
    return list(value) if isinstance(value, list | tuple) else [value] * n


def transformers_of(said: dict[str, Any]) -> tuple[list[int], int]:
    """Depths of the transformers of each level, and of the middle, by config.json."""
    kinds = said.get('down_block_types', ['CrossAttnDownBlock2D'] * 3 + ['DownBlock2D'])
    layers = each(said.get('transformer_layers_per_block', 1), len(kinds))
    return [n if kind.startswith('Cross') else 0 for n, kind in zip(layers, kinds, strict=True)], layers[-1]


def heads_of(said: dict[str, Any], widths: list[int]) -> list[int]:
    """Numbers of heads at each level: what diffusers calls the width of a head."""
    heads = each(said.get('num_attention_heads') or said.get('attention_head_dim', 8), len(widths))
    return [int(n) for n in heads]


def fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Fields by config.json.

    Raises:
      UserError: a value that the networks here do not have.
    """
    if weights is None or not weights.config:
        return {}
    said = checked(dict(weights.config))
    net, where = config.model.network, 'model.network.'
    widths = list(said.get('block_out_channels', (320, 640, 1280, 1280)))
    depths, middle = transformers_of(said)
    heads = heads_of(said, widths)
    out: dict[str, Any] = {
        f'{where}multipliers': tuple(width / widths[0] for width in widths),
        f'{where}channels': widths[0],
        f'{where}blocks': said.get('layers_per_block', 2),
        f'{where}groups': said.get('norm_num_groups', 32),
        f'{where}group_size': 0,
        f'{where}eps': said.get('norm_eps', 1e-5),
        f'{where}sines_first': not said.get('flip_sin_to_cos', True),
        f'{where}freq_shift': said.get('freq_shift', 0),
        f'{where}padding': 'all' if said.get('downsample_padding', 1) else 'end',
        'model.controlnet.hint': tuple(said.get('conditioning_embedding_out_channels', (16, 32, 96, 256))),
        'model.controlnet.image_channels': said.get('conditioning_channels', 3),
        'model.controlnet.order': said.get('controlnet_conditioning_channel_order', 'rgb'),
        'model.controlnet.global_pool': bool(said.get('global_pool_conditions', False)),
    }
    ours = (tuple(config.model.controlnet.depths) or tuple(net.depths)), config.model.controlnet.middle_depth
    if ours[0] != tuple(depths):
        out['model.controlnet.depths'] = tuple(depths)
    if (ours[1] if ours[1] >= 0 else net.middle_depth) != middle:
        out['model.controlnet.middle_depth'] = middle
    if any(depths) or middle:
        here = [int(net.channels * m) // net.head_channels if net.head_channels else net.heads for m in net.multipliers]
        there = [n for n, depth in zip(heads, depths, strict=True) if depth] + [heads[-1]] * bool(middle)
        own = [n for n, depth in zip(here, depths, strict=False) if depth] + [here[-1]] * bool(middle)
        if there != own:
            if len(set(there)) == 1:
                out |= {f'{where}heads': there[0], f'{where}head_channels': 0}
            else:
                out[f'{where}head_channels'] = widths[-1] // heads[-1]
    return out


def config_json(config: ConfigDict, shapes: Shapes) -> dict[str, Any]:
    """config.json of a ControlNetModel.

    Args:
      shapes: {path: shape} of the ControlNet's arrays.

    Raises:
      UserError: diffusers has no such network.
    """
    net, section = config.model.network, config.model.controlnet
    widths = [int(net.channels * m) for m in net.multipliers]
    depths = list(section.depths or net.depths)
    middle = section.middle_depth if section.middle_depth >= 0 else net.middle_depth
    counts = group_counts(net.groups, net.group_size, shapes)
    if len(counts) != 1 or not middle or (depths[-1] and depths[-1] != middle):
        raise UserError(
            'diffusers has ControlNets with one number of groups, and with a transformer in the middle as deep as that '
            'of the last level: name a file, --to=FILE.safetensors'
        )
    heads = [width // net.head_channels if net.head_channels else net.heads for width in widths]
    tokens = next((x[1] for path, x in shapes.items() if path.endswith('/cross_kv/kernel')), 0)
    pooled = shapes.get('pooled/linear1/kernel')
    more = {}
    if pooled:
        sizes = [one.features for one in config.model.conditioning.values() if one.kind == 'numbers']
        more = {
            'addition_embed_type': 'text_time',
            'addition_time_embed_dim': sizes[0] if sizes else 256,
            'projection_class_embeddings_input_dim': pooled[0],
        }
    return {
        '_class_name': 'ControlNetModel',
        'in_channels': shapes['first/kernel'][2],
        'block_out_channels': widths,
        'layers_per_block': net.blocks,
        'down_block_types': ['CrossAttnDownBlock2D' if depth else 'DownBlock2D' for depth in depths],
        'transformer_layers_per_block': [max(depth, 1) for depth in depths[:-1]] + [middle],
        'attention_head_dim': heads,
        'cross_attention_dim': tokens,
        'norm_num_groups': counts.pop(),
        'norm_eps': net.eps,
        'act_fn': 'silu',
        'flip_sin_to_cos': not net.sines_first,
        'freq_shift': net.freq_shift,
        'downsample_padding': 1 if net.padding == 'all' else 0,
        'use_linear_projection': True,
        'conditioning_channels': section.image_channels,
        'conditioning_embedding_out_channels': list(section.hint),
        'controlnet_conditioning_channel_order': section.order,
        'global_pool_conditions': section.global_pool,
        **more,
    }


def linear_projections(weights: Weights) -> Weights:
    """The weights, with those 1x1 convolutions at both ends of a transformer as the matrices that they are."""

    def squeezed(tensor: Tensor) -> Tensor:
        shape = tensor.shape[:2]
        return dataclasses.replace(tensor, shape=shape, read=lambda: tensor.read().reshape(shape))

    def is_convolution(name: str, tensor: Tensor) -> bool:
        return bool(re.search(r'\.proj_(in|out)\.weight$', name)) and len(tensor.shape) == 4

    tensors = {
        name: squeezed(x) if is_convolution(name, x) and math.prod(x.shape[2:]) == 1 else x
        for name, x in weights.tensors.items()
    }
    return dataclasses.replace(weights, tensors=tensors)


def original(config: ConfigDict, shapes: Shapes) -> Table:
    """The files of lllyasviel/ControlNet, whose blocks are numbered as ADM's."""
    blocks = config.model.network.blocks
    last = 4 * len(config.model.controlnet.hint) - 2

    def down(m: re.Match) -> str:
        return f'input_blocks.{1 + int(m[1]) * (blocks + 1) + int(m[2])}.1/'

    names: list[Substitution] = [
        ('^control/', ''),
        ('^hint_first/', 'input_hint_block.0/'),
        ('^hint_last/', f'input_hint_block.{last}/'),
        (r'^hint(\d+)/', lambda m: f'input_hint_block.{2 * int(m[1]) + 2}/'),
        ('^zero_middle/', 'middle_block_out.0/'),
        (r'^zero(\d+)/', r'zero_convs.\1.0/'),
        ('^pooled/linear1/', 'label_emb.0.0/'),
        ('^pooled/linear2/', 'label_emb.0.2/'),
        *text_to_image.TRANSFORMER,
        (r'^down(\d+)_(\d+)_transformer/', down),
        ('^middle_transformer/', 'middle_block.1/'),
        *guided.INSIDE,
        *guided.ENDS,
        *guided.numbered(config, shapes),
        ('/norm_in/', '/norm/'),
    ]
    one_by_one = Layout(r'.*/(shortcut|zero\w+)/kernel', 'o i 1 1 -> i o')
    return Table([*names, *LEAVES], [one_by_one])


def original_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """The norms'; and sizes, as the names and shapes tell them."""
    where = 'model.network.'
    norms = {f'{where}groups': 32, f'{where}group_size': 0, f'{where}eps': 1e-5, f'{where}padding': 'all'}
    norms |= {**COSINES_FIRST, 'model.controlnet.order': 'rgb', 'model.controlnet.global_pool': False}
    if weights is None:
        return norms
    layers = numbers(weights, r'input_hint_block\.(\d+)\.')
    hint = tuple(of_shape(weights, f'input_hint_block.{i}.weight', 0) for i in layers[:-1:2])
    return norms | known(
        {
            f'{where}channels': of_shape(weights, 'input_blocks.0.0.weight', 0),
            'model.controlnet.hint': hint,
            'model.controlnet.image_channels': of_shape(weights, 'input_hint_block.0.weight', 1),
        }
    )


SOURCES = (
    Source(
        'diffusers', 'ControlNetModel of diffusers', is_controlnet, text_to_image.controlnet,
        prepare=linear_projections, fields=fields,
    ),
    Source(
        'controlnet', 'ControlNet of lllyasviel', is_controlnet, original,
        roots=('control_model.', '', 'state_dict.control_model.'), prepare=linear_projections,
        skip=r'(.*\.)?(model\.diffusion_model|first_stage_model|cond_stage_model|model_ema|betas|alphas|sqrt|log_one|'
             r'posterior|lvlb).*',
        fields=original_fields,
    ),
)  # fmt: skip
