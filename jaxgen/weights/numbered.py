"""Names of score_sde_pytorch and of denoising-diffusion-gan: modules numbered in the order in which they are built."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxgen.weights.files import Weights
from jaxgen.weights.mapping import LEAVES, Layout, Substitution, Table
from jaxgen.weights.source import COUNTED_AS_HERE, Shapes, Source, network

INSIDE: list[Substitution] = [
    ('_attention/qkv/kernel$', '_attention/{NIN_0,NIN_1,NIN_2}/W'),
    ('_attention/qkv/bias$', '_attention/{NIN_0,NIN_1,NIN_2}/b'),
    ('_attention/out/kernel$', '_attention/NIN_3/W'),
    ('_attention/out/bias$', '_attention/NIN_3/b'),
    ('_attention/norm/', '_attention/GroupNorm_0/'),
    ('/norm1_style/', '/GroupNorm_0/style/'),
    ('/norm2_style/', '/GroupNorm_1/style/'),
    ('/norm1/', '/GroupNorm_0/'),
    ('/norm2/', '/GroupNorm_1/'),
    ('/conv1/', '/Conv_0/'),
    ('/conv2/', '/Conv_1/'),
    (r'(?<=\d)/embedding/', '/Dense_0/'),
]


def order(modules: set[str], blocks: int, top: int) -> Iterator[str]:
    """Our modules in the order in which the reference builds its own; those that there are.

    Args:
      modules: names of our modules, 'down0_1', 'down0_1_attention'.
      top: number of the last resolution level.
    """
    sequence = ['frequencies', 'time1', 'time2', 'first']
    for level in range(top + 1):
        for i in range(blocks):
            sequence += [f'down{level}_{i}', f'down{level}_{i}_attention']
        sequence += [f'down{level}', f'input{level}']
    sequence += ['middle_0', 'middle_0_attention', 'middle_1']
    for level in range(top, -1, -1):
        sequence += [f'up{level}_{i}' for i in range(blocks + 1)]
        sequence += [f'up{level}_{blocks}_attention', f'norm{level}', f'last{level}', f'up{level}']
    return (name for name in sequence if name in modules)


def gains(bias: np.ndarray) -> np.ndarray:
    """1 for the gains, the first half, and 0 for the shifts: a gain of g is 1 + g here."""
    return (np.arange(len(bias)) < len(bias) // 2).astype(bias.dtype)


def table(prefix: str, net: ConfigDict, shapes: Shapes) -> Table:
    """The table of an NCSN++ whose arrays lie under `prefix`."""
    modules = {path.removeprefix(prefix).split('/')[0] for path in shapes if path.startswith(prefix)}
    numbers = {name: i for i, name in enumerate(order(modules, net.blocks, len(net.multipliers) - 1))}
    plain = net.resampling == 'conv'  # DDPM's blocks: shortcuts and resampling of their own names
    names: list[Substitution] = [
        (r'^generator/mapping(\d+)/', lambda m: f'z_transform.{2 * int(m[1]) + 1}/'),
        (f'^{prefix}', ''),
        *INSIDE,
        (r'(?<=\d)/shortcut/kernel$', '/NIN_0/W' if plain else '/Conv_2/kernel'),
        (r'(?<=\d)/shortcut/bias$', '/NIN_0/b' if plain else '/Conv_2/bias'),
        (r'^((?:up|down)\d+)/(?=kernel|bias)', r'\1/Conv_0/'),
        (r'^(input\d+)/', r'\1/Conv2d_0/' if net.pyramid == 'residual' else r'\1/Conv_0/'),
        ('^frequencies$', 'frequencies/W'),
        (r'^(\w+)/', lambda m: f'all_modules.{numbers[m[1]]}/' if m[1] in numbers else m[0]),
    ]
    layouts = [
        Layout('.*_attention/(qkv|out)/kernel', 'i o -> i o'),
        Layout('.*/shortcut/kernel', 'i o -> i o' if plain else 'o i 1 1 -> i o'),
        Layout(r'.*/input\d+/kernel', 'o i 1 1 -> i o'),
        Layout(r'.*/norm\d_style/bias', 'a -> a', {}, lambda x: x - gains(x), lambda x: x + gains(x)),
    ]
    return Table([*names, *LEAVES], layouts)


def score_sde(config: ConfigDict, shapes: Shapes) -> Table:
    return table('denoiser/', config.model.network, shapes)


def ddgan(config: ConfigDict, shapes: Shapes) -> Table:
    return table('generator/unet/', config.model.generator, shapes)


def ddgan_discriminator(config: ConfigDict, shapes: Shapes) -> Table:
    names: list[Substitution] = [
        ('^discriminator/', ''),
        (r'^time(\d)/', lambda m: f't_embed/main.{2 * int(m[1]) - 2}/'),
        ('^first/', 'start_conv/'),
        (r'^block(\d+)/', lambda m: f'conv{int(m[1]) + 1}/'),
        ('/embedding/', '/dense_t1/'),
        (r'/(conv1|conv2|shortcut)/', r'/\1.0/'),
        (r'/shortcut\.0/', '/skip.0/'),
        ('^last/', 'final_conv/'),
        ('^value/', 'end_linear/'),
    ]
    return Table([*names, *LEAVES], [Layout('.*/(first|shortcut)/kernel', 'o i 1 1 -> i o')])


def averages_by_name(weights: Weights) -> Weights:
    """The weights under their names: a checkpoint of score_sde holds its averages as a list in the order of the
    trainable parameters."""
    shadow, model = weights.below('ema.shadow_params.'), weights.below('model.')
    if not len(shadow):
        return weights
    names = [name.removeprefix('module.') for name in model]
    fixed = [n for n in names if re.fullmatch(r'sigmas|all_modules\.0\.W', n)]
    trained = [n for n in names if n not in fixed]
    by_name = {n: shadow.tensors[str(i)] for i, n in enumerate(trained) if str(i) in shadow.tensors}
    own = {n.removeprefix('module.'): t for n, t in model.tensors.items()}
    return dataclasses.replace(weights, tensors={**{n: own[n] for n in fixed}, **by_name})


def fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """min(32, C // 4) groups; 32 at every width in DDPM's blocks. The output is the score times sigma, and of VP SDEs
    the noise."""
    net = config.model.network
    where = 'model.network.'
    norms = {f'{where}groups': 32, f'{where}group_size': 0 if net.resampling == 'conv' else 4, f'{where}eps': 1e-6}
    prediction = 'score' if config.model.process.name == 've' else 'eps'
    return {**norms, 'model.training.prediction.name': prediction, **COUNTED_AS_HERE}


SOURCES = (
    Source(
        'score_sde', 'score_sde_pytorch', lambda c: network(c) == 'ncsnpp', score_sde, roots=('', 'module.'),
        prepare=averages_by_name, skip='sigmas', fields=fields, licence='Apache-2.0',
    ),
    Source(
        'ddgan', 'denoising-diffusion-gan', lambda c: c.family == 'ddgan', ddgan,
        roots=('', 'module.', 'netG_dict.module.', 'netG_dict.'), initial='extra/.*', skip='(epoch|.*optimizer).*',
        discriminator=ddgan_discriminator, discriminator_root='netD_dict.',
        licence='NVIDIA Source Code License, non-commercial',
    ),
)  # fmt: skip
