"""Names of OpenAI's improved-diffusion and guided-diffusion, and of the U-Nets of CompVis' latent-diffusion.

One network whose blocks are numbered in the order in which they are built.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jaxgen.weights.files import Weights
from jaxgen.weights.mapping import LEAVES, Layout, Substitution, Table
from jaxgen.weights.source import COSINES_FIRST, COUNTED_AS_HERE, Shapes, Source, network

INSIDE: list[Substitution] = [
    (r'(?<=attention)/out/', '/proj_out/'),
    ('/norm1/', '/in_layers.0/'),
    ('/conv1/', '/in_layers.2/'),
    (r'(?<=\d)/embedding/', '/emb_layers.1/'),
    ('/norm2/', '/out_layers.0/'),
    ('/conv2/', '/out_layers.3/'),
    ('/shortcut/', '/skip_connection/'),
]
ENDS: list[Substitution] = [
    ('^(denoiser|classifier)/', ''),
    ('^time1/', 'time_embed.0/'),
    ('^time2/', 'time_embed.2/'),
    ('^label/embedding$', 'label_emb/embedding'),
    ('^first/', 'input_blocks.0.0/'),
    ('^norm/', 'out.0/'),
    ('^pool/positions$', 'out.2.positional_embedding'),
    ('^pool/qkv/', 'out.2.qkv_proj/'),
    ('^pool/out/', 'out.2.c_proj/'),
    ('^last/', 'out.2/'),
    ('^middle_0/', 'middle_block.0/'),
    ('^middle_0_attention/', 'middle_block.1/'),
    ('^middle_1/', 'middle_block.2/'),
]


def numbered(config: ConfigDict, shapes: Shapes) -> list[Substitution]:
    """Substitutions of the blocks on the way down and up."""
    s = config.model.network
    blocks, top = s.blocks, len(s.multipliers) - 1

    def down(m: re.Match) -> str:
        n = 1 + int(m[1]) * (blocks + 1) + (int(m[2]) if m[2] else blocks)
        return f'input_blocks.{n}.{1 if m[3] else 0}/'

    def up(m: re.Match) -> str:
        level, i = int(m[1]), int(m[2]) if m[2] else blocks
        n = (top - level) * (blocks + 1) + i
        attends = any(path.endswith(f'/up{level}_{i}_attention/qkv/kernel') for path in shapes)
        part = 1 if m[3] else 0 if m[2] else 1 + attends  # a block of its own, attention, then what doubles the size
        return f'output_blocks.{n}.{part}/'

    return [
        (r'^down(\d+)/(?=kernel|bias)', lambda m: f'input_blocks.{(int(m[1]) + 1) * (blocks + 1)}.0.op/'),
        (r'^down(\d+)(?:_(\d+)(_attention)?)?/', down),
        (r'^up(\d+)(?=/(?:kernel|bias))', lambda m: f'up{m[1]}/conv'),
        (r'^up(\d+)(?:_(\d+)(_attention)?)?/', up),
    ]


def heads_of(config: ConfigDict) -> Callable[[tuple[int, ...]], dict[str, int]]:
    """Shape of a joined q, k, v -> sizes of its heads."""
    s = config.model.network

    def sizes(shape: tuple[int, ...]) -> dict[str, int]:
        channels = shape[-1] // 3
        return {'h': channels // s.head_channels if s.head_channels else s.heads, 'j': 3}

    return sizes


def table(legacy: bool) -> Callable[[ConfigDict, Shapes], Table]:
    """legacy: q, k and v stand head by head, else whole, each of them head by head."""

    def make(config: ConfigDict, shapes: Shapes) -> Table:
        heads = heads_of(config)
        layouts = [
            Layout('.*/pool/positions', 'c p -> p c'),
            Layout('.*/pool/(qkv|out)/kernel', 'o i 1 -> i o'),
            Layout('.*/shortcut/kernel', 'o i 1 1 -> i o'),
            Layout('.*_attention/out/kernel', 'o i 1 -> i o'),
        ]
        if legacy:
            layouts += [
                Layout('.*_attention/qkv/kernel', '(h j c) i 1 -> i (j h c)', heads),
                Layout('.*_attention/qkv/bias', '(h j c) -> (j h c)', heads),
            ]
        else:
            layouts.append(Layout('.*_attention/qkv/kernel', 'o i 1 -> i o'))
        return Table([*INSIDE, *ENDS, *numbered(config, shapes), *LEAVES], layouts)

    return make


def fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """32 groups at every width, torch's eps. Networks with EDM's preconditioning, those of consistency_models, embed
    a thousand times what EDM's own do."""
    where = 'model.network.'
    norms = {f'{where}groups': 32, f'{where}group_size': 0, f'{where}eps': 1e-5}
    precondition = network(config) and config.model.training.prediction.name == 'edm'
    time = {**COUNTED_AS_HERE, **({'model.training.time_scale': 1000.0} if precondition else {})}
    return {**norms, **COSINES_FIRST, f'{where}padding': 'all', **time}


def remarks(config: ConfigDict, weights: Weights) -> list[str]:
    """The heads, and the time of a chain of other than 1000 steps."""
    s, process = config.model.network, config.model.process
    heads = f'{s.head_channels} channels a head, head_channels' if s.head_channels else f'{s.heads} heads, heads'
    lines = [f'the file does not say how many heads its attention has: {heads} of config.model.network']
    if process.get('timesteps', 1000) != 1000 and 'rescale_timesteps' in process:
        lines.append(
            f'the file does not say whether it embeds steps of {process.timesteps} or of 1000: '
            f'config.model.process.rescale_timesteps is {process.rescale_timesteps}'
        )
    return lines


def fits(config: ConfigDict) -> bool:
    return network(config) == 'adm' or config.family == 'noisy_classifier'


def averages(weights: Weights) -> Weights:
    """The averages in CompVis' checkpoints in place of the trained weights, beside which they stand under names without
    dots, model_ema.diffusion_modelinput_blocks00weight."""
    tensors = dict(weights.tensors)
    for name in weights:
        root, prefixed, path = name.partition('model.diffusion_model.')
        average = f'{root}model_ema.diffusion_model{path.replace(".", "")}'
        if prefixed and average in weights:
            tensors[name] = weights[average]
    return dataclasses.replace(weights, tensors=tensors)


SOURCES = (
    Source(
        'guided', 'improved-diffusion, guided-diffusion and latent-diffusion, q, k, v head by head', fits, table(True),
        roots=('', 'state_dict.', 'model.diffusion_model.', 'state_dict.model.diffusion_model.'), prepare=averages,
        fields=fields, remarks=remarks,
        distinct="q, k and v head by head: all published ones but ADM at 64 pixels", licence='MIT',
    ),
    Source(
        'guided_new_order', 'guided-diffusion with use_new_attention_order (ADM at 64 pixels)', fits, table(False),
        roots=('', 'state_dict.'), fields=fields, remarks=remarks,
        distinct='q, k and v whole: ADM at 64 pixels', licence='MIT',
    ),
)  # fmt: skip
