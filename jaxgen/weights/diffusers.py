"""Names of Hugging Face diffusers: UNet2DModel, AutoencoderKL, VQModel, DiTTransformer2DModel."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from jaxgen import log
from jaxgen.diffusion import levels
from jaxgen.errors import UserError
from jaxgen.networks.layers import group_count
from jaxgen.weights import schedulers
from jaxgen.weights.files import PIPELINE, Weights, read_json
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


# What is known of the keys of each class's config.json: the values that the networks here have, where no field says
# them, or ANY where names and shapes of the weights, a field or nothing depend on it. A key that is in none of these is
# refused where it is on.
ANY: tuple = ()
KEYS: dict[str, dict[str, tuple]] = {
    'UNet2DModel': {
        **dict.fromkeys(
            ('sample_size', 'in_channels', 'out_channels', 'time_embedding_dim', 'freq_shift', 'flip_sin_to_cos'), ANY
        ),
        **dict.fromkeys(('block_out_channels', 'layers_per_block', 'downsample_padding', 'dropout'), ANY),
        **dict.fromkeys(('attention_head_dim', 'norm_num_groups', 'norm_eps', 'num_class_embeds'), ANY),
        **dict.fromkeys(('attn_norm_num_groups', 'num_train_timesteps', 'downsample_type', 'upsample_type'), ANY),
        'center_input_sample': (False,),
        'time_embedding_type': ('positional',),
        'down_block_types': ('DownBlock2D', 'AttnDownBlock2D', 'ResnetDownsampleBlock2D'),
        'mid_block_type': ('UNetMidBlock2D',),
        'up_block_types': ('UpBlock2D', 'AttnUpBlock2D', 'ResnetUpsampleBlock2D'),
        'mid_block_scale_factor': (1,),
        'act_fn': ('silu', 'swish'),
        'resnet_time_scale_shift': ('default', 'scale_shift'),
        'add_attention': (True,),
        'class_embed_type': (None,),
    },
    'AutoencoderKL': {
        **dict.fromkeys(('in_channels', 'out_channels', 'block_out_channels', 'layers_per_block', 'sample_size'), ANY),
        **dict.fromkeys(('latent_channels', 'norm_num_groups', 'mid_block_add_attention', 'force_upcast'), ANY),
        **dict.fromkeys(('use_quant_conv', 'use_post_quant_conv'), ANY),
        # Of the latents as a later model has them, whose config says it; see `of_stage`.
        **dict.fromkeys(('scaling_factor', 'shift_factor', 'latents_mean', 'latents_std'), ANY),
        'down_block_types': ('DownEncoderBlock2D', 'AttnDownEncoderBlock2D'),
        'up_block_types': ('UpDecoderBlock2D', 'AttnUpDecoderBlock2D'),
        'act_fn': ('silu', 'swish'),
    },
    'DiTTransformer2DModel': {
        **dict.fromkeys(
            ('num_attention_heads', 'attention_head_dim', 'in_channels', 'out_channels', 'num_layers'), ANY
        ),
        **dict.fromkeys(('dropout', 'norm_num_groups', 'sample_size', 'patch_size', 'num_embeds_ada_norm'), ANY),
        **dict.fromkeys(('upcast_attention', 'norm_eps'), ANY),
        'attention_bias': (True,),
        'activation_fn': ('gelu-approximate',),
        'norm_type': ('ada_norm_zero',),
        'norm_elementwise_affine': (False,),
        'attention_type': ('default',),
        'interpolation_scale': (None, 1),
    },
}
KEYS['VQModel'] = {
    **{key: values for key, values in KEYS['AutoencoderKL'].items() if key not in ('latents_mean', 'latents_std')},
    **dict.fromkeys(('num_vq_embeddings', 'vq_embed_dim', 'lookup_from_codebook'), ANY),
    'norm_type': ('group',),
}
KEYS['Transformer2DModel'] = KEYS['DiTTransformer2DModel']  # its former name
SKIP_UNET = KEYS['UNet2DModel'] | {
    'time_embedding_type': ('fourier',),
    'down_block_types': ('SkipDownBlock2D', 'AttnSkipDownBlock2D'),
    'up_block_types': ('SkipUpBlock2D', 'AttnSkipUpBlock2D'),
    'mid_block_scale_factor': (2**0.5,),
    'resnet_time_scale_shift': ('default',),
}
# Values of keys that config.json lacks, where those of the networks here are others.
DEFAULTS = {'attention_bias': False, 'norm_type': 'layer_norm', 'norm_elementwise_affine': True}  # Transformer2DModel
SKIP_DEFAULTS = {'time_embedding_type': 'positional', 'mid_block_scale_factor': 1}


# {kind of a value of a JSON file of diffusers: (keys, whether null is one of their values)}
KINDS: dict[str, tuple[tuple[str, ...], bool]] = {
    'a count': (
        (
            *('layers_per_block', 'num_layers', 'patch_size', 'num_attention_heads', 'latent_channels', 'in_channels'),
            *('num_vq_embeddings', 'steps_offset', 'freq_shift', 'downsample_padding', 'solver_order'),
            *('original_inference_steps', 'base_image_seq_len', 'max_image_seq_len'),
        ),
        False,
    ),
    'a count or null': (
        (
            *('norm_num_groups', 'attn_norm_num_groups', 'attention_head_dim', 'num_class_embeds', 'out_channels'),
            *('num_embeds_ada_norm', 'vq_embed_dim', 'num_train_timesteps'),
        ),
        True,
    ),
    'a number': (
        (
            *('norm_eps', 'dropout', 'beta_start', 'beta_end', 'scaling_factor', 'clip_sample_range'),
            *('shift', 'flow_shift', 'timestep_scaling'),
        ),
        False,
    ),
    'a number or null': (('sigma_min', 'sigma_max', 'shift_terminal', 'base_shift', 'max_shift'), True),
    'true or false': (
        (
            *('flip_sin_to_cos', 'use_quant_conv', 'use_post_quant_conv', 'mid_block_add_attention', 'clip_sample'),
            *('set_alpha_to_one', 'thresholding', 'rescale_betas_zero_snr', 'skip_prk_steps', 'use_flow_sigmas'),
            *('lower_order_final', 'euler_at_final', 'use_lu_lambdas', 'predict_x0', 'use_dynamic_shifting'),
            *('invert_sigmas', 'stochastic_sampling'),
        ),
        False,
    ),
    'a word': (
        (
            *('_class_name', 'beta_schedule', 'prediction_type', 'timestep_spacing'),
            *('resnet_time_scale_shift', 'downsample_type', 'upsample_type', 'algorithm_type', 'solver_type'),
            *('final_sigmas_type', 'interpolation_type', 'timestep_type', 'time_shift_type'),
        ),
        False,
    ),
    'true or false or null': (('use_karras_sigmas', 'use_exponential_sigmas', 'use_beta_sigmas'), True),
    'a word or null': (('variance_type',), True),
    'a list of counts': (('block_out_channels',), False),
    'a list of numbers or null': (('trained_betas',), True),
}
MOST_IN_LIST = 100_000


def is_of(kind: str, value: Any) -> bool:
    """Whether a value of a JSON file is of a kind, see KINDS."""
    several = re.match(r'a list of (\w+)s', kind)
    if several:
        there = isinstance(value, list | tuple) and 0 < len(value) <= MOST_IN_LIST
        return there and all(is_of(f'a {several[1]}', one) for one in value)
    if kind == 'true or false':
        return isinstance(value, bool)
    if kind == 'a word':
        return isinstance(value, str) and value.isprintable()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind == 'a number':
        return math.isfinite(value) and abs(value) < 2**31
    return isinstance(value, int) and 0 <= value < 2**31


def check_kinds(said: Mapping[str, Any], where: str) -> None:
    """Raises UserError where a value that is read is of another kind than diffusers writes: the file is damaged.

    Args:
      where: the file, for the message.
    """
    for kind, (keys, null) in KINDS.items():
        for key in keys:
            if key in said and not (null and said[key] is None) and not is_of(kind.removesuffix(' or null'), said[key]):
                shown = repr(said[key])
                shown = f'{shown[:80]}...' if len(shown) > 80 else shown
                raise UserError(f'{where} is damaged: {key} is {shown}, and should be {kind}')


def equal(a: Any, b: Any) -> bool:
    """Whether two values of a config.json say the same, numbers to a thousandth."""
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    return math.isclose(a, b, rel_tol=1e-3) if numbers else type(a) is type(b) and a == b


def check_values(said: Mapping[str, Any], keys: Mapping[str, tuple]) -> None:
    """Raises UserError where config.json has another value than the networks here, or a key that is not known."""
    for key, value in said.items():
        if key.startswith('_') or (key not in keys and value in (None, False)):
            continue
        if key not in keys:
            raise UserError(
                f'{key} is {value!r} in the config.json of the weights, and what it changes is not known here'
            )
        several = value if isinstance(value, list | tuple) else [value]
        if keys[key] and not all(any(equal(one, allowed) for allowed in keys[key]) for one in several):
            raise UserError(
                f'{key} is {value!r} in the config.json of the weights: the networks here have '
                f'{" or ".join(repr(one) for one in keys[key])}, and would compute something else with them'
            )


def said_of(
    weights: Weights | None, classes: tuple[str, ...], keys: Mapping[str, tuple] | None = None
) -> dict[str, Any]:
    """config.json beside the weights, {} where there is none.

    Args:
      classes: that the network may be of, in diffusers.
      keys: in place of those of the class, see KEYS.

    Raises:
      UserError: it is of another class, or says what no network here has.
    """
    said = weights.config if weights is not None else {}
    if not said:
        return {}
    name = said.get('_class_name', classes[0])
    if name not in classes:
        raise UserError(f'the config.json of the weights is of a {name}: this config takes {" or ".join(classes)}')
    check_kinds(said, 'the config.json of the weights')
    check_values(said, keys or KEYS[name])
    return dict(said)


def unet_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Fields of a UNet2DModel by its config.json; without one those that all published ones have."""
    net, where = config.model.network.name, 'model.network.'
    said = said_of(weights, ('UNet2DModel',))
    if not said:
        return {f'{where}group_size': 0, f'{where}groups': 32} | pipeline_fields(config, weights)
    groups, heads = said.get('norm_num_groups', 32), said.get('attention_head_dim', 8)
    scale_shift = said.get('resnet_time_scale_shift', 'default') == 'scale_shift'
    check_values(
        said, {**dict.fromkeys(said, ANY), 'attn_norm_num_groups': (groups, *([None] if not scale_shift else []))}
    )
    fields: dict[str, Any] = {
        f'{where}groups': groups,
        f'{where}group_size': 0,
        f'{where}eps': said.get('norm_eps', 1e-5),
    }
    if 'block_out_channels' in said:
        fields[f'{where}blocks'] = said.get('layers_per_block', 2)
    # DDPM's embedding of time has sines first, and frequencies of its own; ADM's has cosines first.
    embedding = (said.get('flip_sin_to_cos', True), said.get('freq_shift', 0), said.get('downsample_padding', 1))
    resampling = {said.get('downsample_type', 'conv'), said.get('upsample_type', 'conv')}
    if len(resampling) > 1 or not resampling <= {'conv', 'resnet'}:
        raise UserError(f"downsample_type and upsample_type of the file must both be 'conv' or 'resnet': {resampling}")
    if embedding[1] not in (0, 1) or embedding[2] not in (0, 1):
        raise UserError(f'freq_shift and downsample_padding of the file must be 0 or 1; they are {embedding[1:]}')
    if net == 'unet':
        plain = {'attention_head_dim': heads is not None, 'resnet_time_scale_shift': scale_shift}
        plain |= {'flip_sin_to_cos, freq_shift and downsample_padding': embedding != (False, 1, 0)}
        plain |= {'downsample_type': 'resnet' in resampling}
        if other := [key for key, differs in plain.items() if differs]:
            raise UserError(
                f"{', '.join(other)} of the file's config.json are not those of the network 'unet', which has DDPM's "
                "embedding of time and one head: name the network 'adm', which has fields for them"
            )
    else:
        fields |= {
            f'{where}scale_shift': scale_shift,
            f'{where}resample_in_blocks': 'resnet' in resampling,
            f'{where}sines_first': not embedding[0],
            f'{where}freq_shift': embedding[1],
            f'{where}head_channels': heads or 0,
        }
        if 'conv' in resampling:
            fields[f'{where}padding'] = 'all' if embedding[2] else 'end'
        if heads is None:  # one head, as wide as the block
            fields[f'{where}heads'] = 1
    return fields | pipeline_fields(config, weights)


def skip_unet_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Fields of a UNet2DModel of skip blocks by its config.json.

    Raises:
      UserError: numbers of groups or heads that this network has not.
    """
    said = said_of(weights, ('UNet2DModel',), SKIP_UNET)
    if not said:
        return pipeline_fields(config, weights)
    check_values(SKIP_DEFAULTS | said, SKIP_UNET)
    widths = said.get('block_out_channels', ())
    attends = [w for w, kind in zip(widths, said.get('down_block_types', ()), strict=False) if 'Attn' in kind]
    groups, heads = said.get('norm_num_groups', 32), said.get('attention_head_dim', 8)
    if any(groups not in (None, min(w // 4, 32)) for w in (*widths[:1], *widths[-1:])) or any(w < 128 for w in attends):
        raise UserError(
            'norm_num_groups: the network here has min(32, C // 4) groups in all norms, and 32 in attention'
        )
    if heads is not None and any(w // heads != 1 for w in (*attends, *widths[-1:])):
        raise UserError(f'attention_head_dim of the file is {heads}: the network here has one head')
    fields = {
        'model.network.eps': said.get('norm_eps', 1e-5),
        'model.network.group_size': 4,
        'model.network.groups': 32,
    }
    if widths:
        fields['model.network.blocks'] = said.get('layers_per_block', 2)
    return fields | pipeline_fields(config, weights)


def autoencoder_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Fields of an AutoencoderKL or VQModel by its config.json; without one those of the published ones."""
    said = said_of(weights, ('VQModel',) if config.model.regulariser == 'vq' else ('AutoencoderKL',))
    fields = {'model.groups': said.get('norm_num_groups', 32), 'model.group_size': 0, 'model.eps': 1e-6}
    for key, field in {'layers_per_block': 'blocks', 'latent_channels': 'latent'}.items():
        if key in said:
            fields[f'model.{field}'] = said[key]
    return fields


def dit_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Fields of a DiTTransformer2DModel by its config.json. Whatever that says, its embedding of time has other
    frequencies than the original's; its norm before the MLP has an eps of its own."""
    said = said_of(weights, ('DiTTransformer2DModel', 'Transformer2DModel'))
    if said.get('_class_name') == 'Transformer2DModel':
        check_values(DEFAULTS | said, KEYS['Transformer2DModel'])
    fields = {'model.network.freq_shift': 1, 'model.network.mlp_eps': said.get('norm_eps', 1e-5)}
    if 'num_attention_heads' in said:
        fields['model.network.heads'] = said['num_attention_heads']
    return fields | pipeline_fields(config, weights)


# --- what the pipeline says


def pipeline_part(weights: Weights | None, *names: str) -> dict[str, Any]:
    """The JSON of the first of these files in the folder of the pipeline that the weights' folder lies in; {} where
    there is none."""
    if weights is None:
        return {}
    folder = weights.path if os.path.isdir(weights.path) else os.path.dirname(os.path.abspath(weights.path))
    for above in (folder, os.path.dirname(os.path.abspath(folder))):
        if os.path.isfile(os.path.join(above, PIPELINE)):
            for name in names:
                if os.path.isfile(os.path.join(above, name)):
                    said = read_json(os.path.join(above, name))
                    check_kinds(said, os.path.join(above, name))
                    return said
    return {}


SCHEDULER = 'scheduler/scheduler_config.json'
STAGES = ('vae/config.json', 'vqvae/config.json')


def pipeline_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Fields by the scheduler and the first stage of the pipeline that the weights are of, {} where they are of none.

    Raises:
      UserError: latents of a kind that a later stage here does not have.
    """
    stage = pipeline_part(weights, *STAGES)
    fields = schedulers.process_fields(pipeline_part(weights, SCHEDULER))
    if stage and config.stages.get('first'):
        if any(stage.get(key) for key in ('latents_mean', 'latents_std')):
            raise UserError(
                'the latents of the pipeline have a mean and a deviation of each channel (latents_mean); here they are '
                'shifted and scaled by one number'
            )
        fields['model.latent_scale'] = stage.get('scaling_factor', 0.18215)
        fields['model.latent_shift'] = stage.get('shift_factor') or 0.0
    return fields


def remarks(config: ConfigDict, weights: Weights) -> list[str]:
    """What is taken from the config, and how the pipeline samples."""
    lines = []
    if not weights.config:
        lines.append(
            'there is no config.json beside the weights: heads, eps and groups of the norms and the embedding of time '
            'are those of the config'
        )
    if config.family == 'diffusion' and (said := pipeline_part(weights, SCHEDULER)):
        try:
            fields = schedulers.sampler_fields(said)
        except UserError as e:
            return [*lines, str(e)]
        own = config.model.sampler.to_dict()
        there = own
        if fields and own['name'] != fields['name']:
            there = {name: field.default for name, field in levels.COMPONENT.fields(fields['name']).items()}
        fields = {name: value for name, value in fields.items() if there.get(name) != value}
        flags = ' '.join(f'--config.model.sampler.{name}={value}' for name, value in fields.items())
        lines += [f'the {said["_class_name"]} of the pipeline samples as {flags}'] if fields else []
    return lines


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
        'flip_sin_to_cos': adm and not net.sines_first,
        'freq_shift': net.freq_shift if adm else 1,
        'downsample_padding': 1 if adm and net.padding == 'all' else 0,
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
    if not net.freq_shift:
        log.say(f'NOTE: {DIT_NOTE}')
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
        'norm_eps': net.mlp_eps,
        'attention_bias': True,
    }


# Its Timesteps have downscale_freq_shift=1: the i-th of 128 frequencies is 10000^(-i/127) in place of 10000^(-i/128).
DIT_NOTE = (
    "the embedding of time of this network is the original DiT's, config.model.network.freq_shift = 0; "
    'DiTTransformer2DModel of diffusers has other frequencies, so its images from the same noise differ'
)


def is_unet(config: ConfigDict) -> bool:
    return network(config) in ('unet', 'adm')


SOURCES = (
    Source(
        'diffusers', 'UNet2DModel of diffusers', is_unet, unet, renamed=OLD_ATTENTION, fields=unet_fields,
        remarks=remarks,
    ),
    Source(
        'diffusers', 'UNet2DModel of diffusers, with skip blocks', lambda c: network(c) == 'ncsnpp', skip_unet,
        renamed=OLD_ATTENTION, fields=skip_unet_fields, remarks=remarks,
    ),
    Source(
        'diffusers', 'AutoencoderKL and VQModel of diffusers', lambda c: c.family == 'vqgan' and not c.model.scales,
        autoencoder, renamed=OLD_ATTENTION, initial='extra/.*', fields=autoencoder_fields,
        remarks=remarks,
    ),
    Source('diffusers', 'DiTTransformer2DModel of diffusers', lambda c: network(c) == 'dit', dit,
           skip=r'pos_embed\.pos_embed', fields=dit_fields, remarks=remarks),
)  # fmt: skip
