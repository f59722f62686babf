"""Names of NVlabs' EDM: SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM), blocks by the size of their maps."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from jaxgen.weights.files import Weights
from jaxgen.weights.guided import heads_of
from jaxgen.weights.mapping import LEAVES, Layout, Substitution, Table
from jaxgen.weights.source import COSINES_FIRST, COUNTED_AS_HERE, Shapes, Source, network

INSIDE: list[Substitution] = [
    ('(?<!attention)/norm1/', '/norm0/'),
    ('(?<!attention)/norm2/', '/norm1/'),
    ('_attention/norm/', '_attention/norm2/'),
    ('_attention/out/', '_attention/proj/'),
    ('/conv1/', '/conv0/'),
    ('/conv2/', '/conv1/'),
    (r'(?<=\d)/embedding/', '/affine/'),
    ('/shortcut/', '/skip/'),
]


def table(config: ConfigDict, shapes: Shapes) -> Table:
    """SongUNet and DhariwalUNet; the attention of a block is part of it."""
    size, net = config.data.size, config.model.network
    top = len(net.multipliers) - 1

    def at(level: int | str, name: str) -> str:
        side = size >> int(level)
        return f'{side}x{side}_{name}/'

    names: list[Substitution] = [
        ('^denoiser/', ''),
        *INSIDE,
        (r'^time1/', 'map_layer0/'),
        (r'^time2/', 'map_layer1/'),
        (r'^frequencies$', 'map_noise.freqs'),
        ('^label/embedding$', 'map_label/kernel'),
        ('^label/', 'map_label/'),
        (r'^augment/', 'map_augment/'),
        (r'^first/', f'enc/{at(0, "conv")}'),
        (
            r'^input(\d+)/',
            lambda m: f'enc/{at(int(m[1]) + 1, "aux_residual" if net.pyramid == "residual" else "aux_skip")}',
        ),
        (r'^down(\d+)_(\d+)(?:_attention)?/', lambda m: f'enc/{at(m[1], f"block{m[2]}")}'),
        (r'^down(\d+)/', lambda m: f'enc/{at(int(m[1]) + 1, "down")}'),
        (r'^middle_0_attention/', f'dec/{at(top, "in0")}'),
        (r'^middle_(\d)/', rf'dec/{at(top, "in")[:-1]}\1/'),
        (r'^up(\d+)_(\d+)(?:_attention)?/', lambda m: f'dec/{at(m[1], f"block{m[2]}")}'),
        (r'^up(\d+)/', lambda m: f'dec/{at(int(m[1]) - 1, "up")}'),
    ]
    if net.name == 'adm':
        names += [(r'^norm/', 'out_norm/'), (r'^last/', 'out_conv/')]
    else:
        names += [
            (r'^norm(\d+)/', lambda m: f'dec/{at(m[1], "aux_norm")}'),
            (r'^last(\d+)/', lambda m: f'dec/{at(m[1], "aux_conv")}'),
        ]
    heads = heads_of(config) if net.name == 'adm' else {'h': 1, 'j': 3}
    layouts = [
        Layout('.*_attention/qkv/kernel', '(h c j) i 1 1 -> i (j h c)', heads),
        Layout('.*_attention/qkv/bias', '(h c j) -> (j h c)', heads),
        Layout('.*(_attention/out|shortcut)/kernel', 'o i 1 1 -> i o'),
        Layout(r'.*/input\d+/kernel', 'o i 1 1 -> i o'),
        Layout('.*/label/kernel', 'o i -> i o'),
        Layout('.*/label/embedding', 'o i -> i o'),
    ]
    return Table([*names, *LEAVES], layouts)


def fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """min(32, C // 4) groups; EDM's preconditioning, or that of VE SDEs, with which the network's output is the score.
    The filter between levels is read off its buffers, if there are any."""
    adm, where = network(config) == 'adm', 'model.network.'
    prediction = config.model.training.prediction.name
    fields = {
        f'{where}groups': 32,
        f'{where}group_size': 4,
        f'{where}eps': 1e-5 if adm else 1e-6,
        'model.training.prediction.name': prediction if prediction == 'score' else 'edm',
        'model.training.prediction.data_std': 0.5,
        **COUNTED_AS_HERE,
    }
    if weights is not None and ('map_augment.weight' in weights) != bool(config.model.training.augmentation):
        # Labels of the augmentation, which samples have as 0: without the rate there is no place for these weights.
        fields['model.training.augmentation'] = 0.12 if 'map_augment.weight' in weights else 0.0
    if adm:
        return fields | {f'{where}head_channels': 64, **COSINES_FIRST}
    taps = [t.shape[-1] for name, t in (weights or {}).items() if name.endswith('resample_filter')]
    return fields | ({f'{where}resampling': 'box' if taps[0] == 2 else 'fir'} if taps else {})


SOURCES = (
    Source(
        'edm', 'EDM of NVlabs', lambda c: network(c) in ('ncsnpp', 'adm') and c.model.process.name == 've', table,
        roots=('', 'model.', 'ema.model.'), skip=r'(.*\.)?resample_filter', fields=fields, licence='CC BY-NC-SA 4.0',
    ),
)  # fmt: skip
