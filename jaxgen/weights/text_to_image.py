"""Names of diffusers' networks that read texts: UNet2DConditionModel, SD3Transformer2DModel, FluxTransformer2DModel."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from jaxgen.weights.diffusers import blocks
from jaxgen.weights.mapping import LEAVES, Layout, Substitution, Table
from jaxgen.weights.source import Shapes


def of_transformer(ours: str, theirs: str) -> Substitution:
    return (f'_transformer/blocks/{ours}/', f'_transformer/transformer_blocks.*.{theirs}/')


def latent_unet(config: ConfigDict, shapes: Shapes) -> Table:
    """UNet2DConditionModel: the U-Net of Stable Diffusion 1 and 2, of SDXL and of its refiner."""
    top = len(config.model.network.multipliers) - 1
    names = [
        ('^denoiser/', ''),
        ('_transformer/norm/', '_transformer/norm_in/'),  # no norm of `blocks`
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
