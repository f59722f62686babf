"""Names of Hugging Face diffusers: UNet2DModel, AutoencoderKL, VQModel, DiTTransformer2DModel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from jaxgen.errors import UserError
from jaxgen.networks.layers import group_count
from jaxgen.weights.files import Weights
from jaxgen.weights.mapping import LEAVES, Layout, Substitution, Table
from jaxgen.weights.source import Shapes, Source, network

# Attention of files that were written before diffusers 0.17.
OLD_ATTENTION = tuple(
    (rf'(attentions\.\d+)\.{old}\.', rf'\1.{new}.')
    for old, new in {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}.items()
)
ONE_BY_ONE = Layout(r'.*/(shortcut|to_latent|from_latent|input\d+)/kernel', 'o i 1 1 -> i o')


def blocks(top: int) -> list[Substitution]:
    """Residual blocks, attention and resampling of networks of levels 0 to `top`."""

    def upper(where: str):
        return lambda m: f'up_blocks.{top - int(m[1])}.' + where.format(*m.groups())

    return [
        ('/shortcut/', '/conv_shortcut/'),
        (r'(?<!quantize)/embedding/', '/time_emb_proj/'),
        ('(attention)/norm/', r'\1/group_norm/'),
        ('/qkv/', '/to_{q,k,v}/'),
        ('(attention)/out/', r'\1/to_out.0/'),
        (r'\bmiddle_(\d)_attention/', r'mid_block.attentions.\1/'),
        (r'\bmiddle_attention/', 'mid_block.attentions.0/'),
        (r'\bmiddle_(\d)/', r'mid_block.resnets.\1/'),
        (r'\bdown(\d+)_(\d+)_attention/', r'down_blocks.\1.attentions.\2/'),
        (r'\bdown(\d+)_(\d+)/', r'down_blocks.\1.resnets.\2/'),
        (r'\bdown(\d+)/(?=kernel|bias)', r'down_blocks.\1.downsamplers.0.conv/'),
        (r'\bdown(\d+)/', r'down_blocks.\1.downsamplers.0/'),
        (r'\bup(\d+)_(\d+)_attention/', upper('attentions.{1}/')),
        (r'\bup(\d+)_(\d+)/', upper('resnets.{1}/')),
        (r'\bup(\d+)/(?=kernel|bias)', upper('upsamplers.0.conv/')),
        (r'\bup(\d+)/', upper('upsamplers.0/')),
        (r'\bfirst/', 'conv_in/'),
        (r'\bnorm/', 'conv_norm_out/'),
        (r'\blast/', 'conv_out/'),
    ]


def unet(config: ConfigDict, shapes: Shapes) -> Table:
    """UNet2DModel as DDPM's or ADM's network."""
    top = len(config.model.network.multipliers) - 1
    ends = [('^denoiser/', ''), (r'^time(\d)/', r'time_embedding.linear_\1/'), ('^label/', 'class_embedding/')]
    return Table([*ends, *blocks(top), *LEAVES], [ONE_BY_ONE])


def skip_unet(config: ConfigDict, shapes: Shapes) -> Table:
    """UNet2DModel of skip blocks: NCSN++ (google/ncsnpp-celebahq-256 and its kin)."""
    top = len(config.model.network.multipliers) - 1

    def upper(where: str):
        return lambda m: f'up_blocks.{top - int(m[1])}.{where}/'

    own = [
        ('^denoiser/', ''),
        ('^frequencies$', 'time_proj/kernel'),
        (r'^time(\d)/', r'time_embedding.linear_\1/'),
        ('^(norm|last)0/', r'\1/'),
        (r'^input(\d+)/', r'down_blocks.\1.skip_conv/'),
        (r'^norm(\d+)/', upper('skip_norm')),
        (r'^last(\d+)/', upper('skip_conv')),
        (r'^down(\d+)/', r'down_blocks.\1.resnet_down/'),
        (r'^up(\d+)/', upper('resnet_up')),
        # On the way up only the last block of a level has attention.
        (r'^up(\d+)_\d+_attention/', lambda m: f'up{m[1]}_0_attention/'),
    ]
    return Table([*own, *blocks(top), *LEAVES], [ONE_BY_ONE])


def autoencoder(config: ConfigDict, shapes: Shapes) -> Table:
    """AutoencoderKL and VQModel."""
    top = len(config.model.multipliers) - 1
    ends = [
        ('^encoder/to_latent/', 'quant_conv/'),
        ('^decoder/from_latent/', 'post_quant_conv/'),
        ('^codebook/embedding$', 'quantize/embedding/kernel'),
    ]
    return Table([*ends, *blocks(top), *LEAVES], [ONE_BY_ONE])


def dit(config: ConfigDict, shapes: Shapes) -> Table:
    """DiTTransformer2DModel, whose blocks each have a copy of one embedding of time and class."""
    patch = config.model.network.patch
    embedders = 'transformer_blocks.@.norm1.emb'
    names = [
        ('^denoiser/', ''),
        ('^blocks/qkv/', 'transformer_blocks.*.attn1.to_{q,k,v}/'),
        ('^blocks/out/', 'transformer_blocks.*.attn1.to_out.0/'),
        ('^blocks/mlp1/', 'transformer_blocks.*.ff.net.0.proj/'),
        ('^blocks/mlp2/', 'transformer_blocks.*.ff.net.2/'),
        ('^blocks/modulation/', 'transformer_blocks.*.norm1.linear/'),
        (r'^time(\d)/', rf'{embedders}.timestep_embedder.linear_\1/'),
        ('^label/', f'{embedders}.class_embedder.embedding_table/'),
        ('^first/', 'pos_embed.proj/'),
        ('^modulation/', 'proj_out_1/'),
        ('^last/', 'proj_out_2/'),
    ]
    first = Layout('denoiser/first/kernel', 'o c a b -> (a b c) o', {'a': patch, 'b': patch})
    return Table([*names, *LEAVES], [first], copies=config.model.network.blocks)


# --- what config.json says


# Of keys that change what is computed the values that the networks here have, where no field says them.
UNET_VALUES: dict[str, tuple] = {
    'act_fn': ('silu', 'swish'),
    'center_input_sample': (False,),
    'mid_block_scale_factor': (1,),
    'time_embedding_type': ('positional',),
    'class_embed_type': (None,),
    'add_attention': (True,),
}
SKIP_UNET_VALUES = UNET_VALUES | {'mid_block_scale_factor': (2**0.5,), 'time_embedding_type': ('fourier',)}
AUTOENCODER_VALUES: dict[str, tuple] = {'act_fn': ('silu', 'swish'), 'norm_type': ('group',)}
DIT_VALUES: dict[str, tuple] = {
    'activation_fn': ('gelu-approximate',),
    'norm_type': ('ada_norm_zero',),
    'norm_elementwise_affine': (False,),
    'double_self_attention': (False,),
    'only_cross_attention': (False,),
}


def check_values(said: Mapping[str, Any], allowed: Mapping[str, tuple]) -> None:
    """Raises UserError where config.json has another value than the networks here."""

    def equal(a, b) -> bool:
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
        return math.isclose(a, b, rel_tol=1e-3) if numbers else type(a) is type(b) and a == b

    for key, values in allowed.items():
        if key in said and not any(equal(said[key], value) for value in values):
            raise UserError(
                f'{key} is {said[key]!r} in the config.json of the weights: the networks here have {values[0]!r}, and '
                'would compute something else with them'
            )


def unet_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Fields of a UNet2DModel by its config.json; without one those that all published ones have."""
    net, where = config.model.network.name, 'model.network.'
    said = weights.config if weights is not None else {}
    if not said:
        return {f'{where}group_size': 0, f'{where}groups': 32} if net != 'ncsnpp' else {}
    fields: dict[str, Any] = {}
    widths = said.get('block_out_channels')
    if widths:
        fields[f'{where}blocks'] = said.get('layers_per_block', 2)
    check_values(said, SKIP_UNET_VALUES if net == 'ncsnpp' else UNET_VALUES)
    if net == 'ncsnpp':
        return fields
    check_values(said, {'attn_norm_num_groups': (None, said.get('norm_num_groups', 32))})
    fields |= {
        f'{where}groups': said.get('norm_num_groups', 32),
        f'{where}group_size': 0,
        f'{where}eps': said.get('norm_eps', 1e-5),
    }
    # DDPM's embedding of time has sines first, and frequencies of its own; ADM's has cosines first.
    published = {'unet': (False, 1, 0), 'adm': (True, 0, 1)}[net]
    actual = (said.get('flip_sin_to_cos', True), said.get('freq_shift', 0), said.get('downsample_padding', 1))
    if actual != published:
        raise UserError(
            f'flip_sin_to_cos, freq_shift and downsample_padding of the file are {actual}, and those of the network '
            f'{net!r} are {published}: name the network {"adm" if net == "unet" else "unet"!r}'
        )
    heads = said.get('attention_head_dim', 8)
    if net == 'adm':
        fields[f'{where}scale_shift'] = said.get('resnet_time_scale_shift', 'default') == 'scale_shift'
        fields[f'{where}resample_in_blocks'] = said.get('downsample_type', 'conv') == 'resnet'
        fields[f'{where}head_channels'] = heads or 0
        if heads is None:  # one head, as wide as the block
            fields[f'{where}heads'] = 1
    elif heads is not None and any('Attn' in name for name in said.get('down_block_types', ())):
        raise UserError(f"attention_head_dim of the file is {heads}: the network 'unet' has one head; name 'adm'")
    return fields


def autoencoder_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Fields of an AutoencoderKL or VQModel by its config.json; without one those of the published ones."""
    said = weights.config if weights is not None else {}
    check_values(said, AUTOENCODER_VALUES)
    fields = {'model.groups': said.get('norm_num_groups', 32), 'model.group_size': 0, 'model.eps': 1e-6}
    for key, field in {'layers_per_block': 'blocks', 'latent_channels': 'latent'}.items():
        if key in said:
            fields[f'model.{field}'] = said[key]
    return fields


def dit_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Fields of a DiTTransformer2DModel by its config.json."""
    said = weights.config if weights is not None else {}
    check_values(said, DIT_VALUES)
    return {'model.network.heads': said['num_attention_heads']} if 'num_attention_heads' in said else {}


# --- config.json of what is exported


def model_config(config: ConfigDict, assembled) -> dict[str, Any]:
    """config.json by which diffusers builds the network of a run.

    Raises:
      UserError: diffusers has no such network.
    """
    if config.family == 'vqgan':
        return autoencoder_config(config, assembled)
    if network(config) == 'dit':
        return dit_config(config, assembled)
    return unet_config(config, assembled)


def group_counts(groups: int, group_size: int, shapes: Shapes) -> set[int]:
    """The numbers of groups that the group norms of a network have."""
    widths = {shape[-1] for path, shape in shapes.items() if path.endswith('/scale')}
    return {group_count(width, groups, group_size) for width in widths}


def one_group_count(section: ConfigDict, params: Any) -> int:
    """The number of groups of every norm.

    Raises:
      UserError: they differ.
    """
    shapes = {path: leaf.shape for path, leaf in flatten_dict(params, sep='/').items()}
    counts = group_counts(section.groups, section.group_size, shapes)
    if len(counts) != 1:
        raise UserError(
            f'diffusers has one number of groups in all norms, and this network has {sorted(counts)}: name a file, '
            '--to=FILE.safetensors'
        )
    return counts.pop()


def map_shape(assembled) -> tuple[int, ...]:
    """[h, w, c] of what the denoiser denoises: latents of the first stage, or images."""
    stage = assembled.context.stages.get('first')
    return tuple(stage.latents.shape if stage else assembled.spec.features['image'].shape)


def sample_size(assembled) -> int | list[int]:
    """The side of a square map, or [height, width]."""
    height, width, _ = map_shape(assembled)
    return height if height == width else [height, width]


def unet_config(config: ConfigDict, assembled) -> dict[str, Any]:
    """Of a UNet2DModel; channels and attention are those of its arrays, since its input may have conditions beside it.

    Raises:
      UserError: it has no such network.
    """
    net, params = config.model.network, assembled.abstract.params['denoiser']
    adm = net.name == 'adm'
    if net.name == 'ncsnpp' or net.get('patch', 1) > 1:
        raise UserError(
            f'diffusers has no network like {net.name!r} with such fields: name a file, --to=FILE.safetensors'
        )
    if adm and not net.head_channels and net.heads > 1:
        raise UserError(
            f'heads of diffusers have one width, config.model.network.head_channels, and here are {net.heads} heads at '
            'every width: name a file, --to=FILE.safetensors'
        )
    groups = one_group_count(net, params)
    resampled = adm and net.resample_in_blocks
    kinds = [f'down{level}_0_attention' in params for level in range(len(net.multipliers))]
    plain = {'down': 'ResnetDownsampleBlock2D' if resampled else 'DownBlock2D'}
    plain['up'] = 'ResnetUpsampleBlock2D' if resampled else 'UpBlock2D'
    return {
        '_class_name': 'UNet2DModel',
        'sample_size': sample_size(assembled),
        'in_channels': params['first']['kernel'].shape[2],
        'out_channels': params['last']['kernel'].shape[3],
        'block_out_channels': [int(net.channels * m) for m in net.multipliers],
        'layers_per_block': net.blocks,
        'down_block_types': ['AttnDownBlock2D' if kind else plain['down'] for kind in kinds],
        'up_block_types': ['AttnUpBlock2D' if kind else plain['up'] for kind in kinds[::-1]],
        'norm_num_groups': groups,
        'norm_eps': net.eps,
        'act_fn': 'silu',
        'dropout': net.dropout,
        'flip_sin_to_cos': adm,
        'freq_shift': 0 if adm else 1,
        'downsample_padding': 1 if adm else 0,
        'attention_head_dim': net.head_channels or None if adm else None,
        'resnet_time_scale_shift': 'scale_shift' if adm and net.scale_shift else 'default',
        'downsample_type': 'resnet' if resampled else 'conv',
        'upsample_type': 'resnet' if resampled else 'conv',
        'num_class_embeds': class_rows(config, assembled),
        **({'attn_norm_num_groups': groups} if adm else {}),
    }


def class_rows(config: ConfigDict, assembled) -> int | None:
    """Rows of the embedding of the class, None without one."""
    embedding = assembled.abstract.params['denoiser'].get('label')
    if embedding is not None and 'embedding' not in embedding:
        raise UserError('diffusers has no network like this one with such labels: name a file, --to=FILE.safetensors')
    return None if embedding is None else embedding['embedding'].shape[0]


def autoencoder_config(config: ConfigDict, assembled) -> dict[str, Any]:
    """Of an AutoencoderKL or a VQModel."""
    m, levels = config.model, len(config.model.multipliers)
    height, _, channels = assembled.spec.features['image'].shape
    attention = [f'down{level}_0_attention' in assembled.abstract.params['encoder'] for level in range(levels)]
    down = ['AttnDownEncoderBlock2D' if one else 'DownEncoderBlock2D' for one in attention]
    up = ['AttnUpDecoderBlock2D' if one else 'UpDecoderBlock2D' for one in attention[::-1]]
    common = {
        'in_channels': channels,
        'out_channels': channels,
        'block_out_channels': [m.channels * x for x in m.multipliers],
        'layers_per_block': m.blocks,
        'down_block_types': down,
        'up_block_types': up,
        'norm_num_groups': one_group_count(m, assembled.abstract.params),
        'act_fn': 'silu',
        'sample_size': height,
        'latent_channels': m.latent,
    }
    if m.regulariser == 'vq':
        return {'_class_name': 'VQModel', **common, 'num_vq_embeddings': m.vocabulary, 'vq_embed_dim': m.latent}
    convolved = m.latent_kernel > 0
    return {
        '_class_name': 'AutoencoderKL',
        **common,
        'use_quant_conv': convolved,
        'use_post_quant_conv': convolved,
        'mid_block_add_attention': m.middle_attention,
    }


def dit_config(config: ConfigDict, assembled) -> dict[str, Any]:
    """Of a DiTTransformer2DModel."""
    net = config.model.network
    params = assembled.abstract.params['denoiser']
    channels = params['first']['kernel'].shape[0] // net.patch**2
    rows, columns, _ = map_shape(assembled)
    rows_of_labels = class_rows(config, assembled)
    if rows != columns or rows_of_labels is None:
        raise UserError('diffusers has DiT with classes and square maps alone: name a file, --to=FILE.safetensors')
    return {
        '_class_name': 'DiTTransformer2DModel',
        'num_attention_heads': net.heads,
        'attention_head_dim': net.channels // net.heads,
        'in_channels': channels,
        'out_channels': params['last']['kernel'].shape[1] // net.patch**2,
        'num_layers': net.blocks,
        'sample_size': rows,
        'patch_size': net.patch,
        'num_embeds_ada_norm': rows_of_labels - 1,
        'activation_fn': 'gelu-approximate',
        'norm_type': 'ada_norm_zero',
        'norm_elementwise_affine': False,
        'norm_eps': 1e-6,
        'attention_bias': True,
    }


# Its Timesteps have downscale_freq_shift=1: the i-th of 128 frequencies is 10000^(-i/127) in place of 10000^(-i/128).
DIT_NOTE = (
    'the embedding of time is that of the original DiT here, with which the published weights were trained; '
    'DiTTransformer2DModel of diffusers has other frequencies, so its images from the same noise differ'
)


def is_unet(config: ConfigDict) -> bool:
    return network(config) in ('unet', 'adm')


SOURCES = (
    Source(
        'diffusers', 'UNet2DModel of diffusers', is_unet, unet, renamed=OLD_ATTENTION, fields=unet_fields,
    ),
    Source(
        'diffusers', 'UNet2DModel of diffusers, with skip blocks', lambda c: network(c) == 'ncsnpp', skip_unet,
        renamed=OLD_ATTENTION, fields=unet_fields,
    ),
    Source(
        'diffusers', 'AutoencoderKL and VQModel of diffusers', lambda c: c.family == 'vqgan' and not c.model.scales,
        autoencoder, renamed=OLD_ATTENTION, initial='extra/.*', fields=autoencoder_fields,
    ),
    Source('diffusers', 'DiTTransformer2DModel of diffusers', lambda c: network(c) == 'dit', dit,
           skip=r'pos_embed\.pos_embed', fields=dit_fields, note=DIT_NOTE),
)  # fmt: skip
