"""Names of StyleGAN2-ADA and of BigGAN-PyTorch: the averaged generators, which draw samples."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from jaxgen.weights.mapping import LEAVES, Layout, Substitution, Table
from jaxgen.weights.source import Shapes, Source


def turned(x: np.ndarray) -> np.ndarray:
    """A kernel [..., h, w, i, o] turned by 180 degrees."""
    return x[::-1, ::-1]


def stylegan2(config: ConfigDict, shapes: Shapes) -> Table:
    """Mapping, synthesis and the average of w. Layers that double the size convolve there and correlate here."""
    names: list[Substitution] = [
        ('^generator/', ''),
        ('^extra/w$', 'mapping.w_avg'),
        (r'^mapping/layer(\d+)/', r'mapping/fc\1/'),
        ('^mapping/embedding/', 'mapping/embed/'),
        (r'^synthesis/constant$', 'synthesis.b4.const'),
        (r'^synthesis/block(\d+)/', r'synthesis/b\1/'),
        ('/image/', '/torgb/'),
        (r'^(synthesis/b4)/conv0/', r'\1/conv1/'),
        ('/style/', '/affine/'),
    ]
    layouts = [
        Layout('generator/synthesis/constant', 'c h w -> h w c'),
        Layout(r'generator/synthesis/block(?!4/)\d+/conv0/kernel', 'o i h w -> h w i o', {}, turned, turned),
    ]
    return Table([*names, *LEAVES], layouts)


def biggan(config: ConfigDict, shapes: Shapes) -> Table:
    """The generator with its batch statistics and the vectors of its spectral norms.

    A block's condition is (class, z) there and (z, class) here; the first layer puts out channels, rows, columns there
    and rows, columns, channels here.
    """
    of_class = shapes['generator/embedding'][1]
    names: list[Substitution] = [
        (r'^extra/average/batch_stats/(.*)/(mean|var)$', r'generator/\1/stored_\2'),
        (r'^extra/average/vectors/(.*)/kernel$', r'generator/\1/u0'),
        ('^generator/', ''),
        ('^embedding$', 'shared/embedding'),
        ('^first/', 'linear/'),
        ('^norm/scale$', 'output_layer.0.gain'),
        ('^norm/bias$', 'output_layer.0.bias'),
        ('^norm/', 'output_layer.0.'),
        ('^last/', 'output_layer.2/'),
        (r'^block(\d+)/', r'blocks.\1.0/'),
        (r'^attention(\d+)/gain$', r'blocks.\1.1.gamma'),
        (r'^attention(\d+)/query/', r'blocks.\1.1/theta/'),
        (r'^attention(\d+)/key/', r'blocks.\1.1/phi/'),
        (r'^attention(\d+)/value/', r'blocks.\1.1/g/'),
        (r'^attention(\d+)/out/', r'blocks.\1.1/o/'),
        (r'/norm(\d)_gain/', r'/bn\1/gain/'),
        (r'/norm(\d)_shift/', r'/bn\1/bias/'),
        (r'/norm(\d)/', r'/bn\1/'),
        ('/shortcut/', '/conv_sc/'),
    ]
    square = {'h': 4, 'w': 4}
    layouts = [
        Layout('generator/first/kernel', '(c h w) i -> i (h w c)', square),
        Layout('generator/first/bias', '(c h w) -> (h w c)', square),
        Layout('extra/average/vectors/first/kernel', '1 (c h w) -> (h w c)', square),
        Layout('extra/average/vectors/.*', '1 o -> o'),
        Layout('generator/(.*/shortcut|attention.*)/kernel', 'o i 1 1 -> i o'),
        Layout(
            r'generator/.*/norm\d_(gain|shift)/kernel', 'o i -> i o', {},
            lambda x: np.roll(x, -of_class, 0), lambda x: np.roll(x, of_class, 0),
        ),
    ]  # fmt: skip
    return Table([*names, *LEAVES], layouts)


def is_biggan(config: ConfigDict) -> bool:
    return config.family == 'gan' and config.model.network.name == 'biggan'


SOURCES = (
    Source(
        'stylegan2', 'StyleGAN2-ADA of NVlabs (G_ema)', lambda c: c.family == 'stylegan2', stylegan2,
        roots=('', 'G_ema.', 'generator.'), skip=r'(.*\.)?(resample_filter|noise_const)|(D|G)\..*',
        initial=r'extra/(?!w$).*', licence='NVIDIA Source Code License, non-commercial',
    ),
    Source(
        'biggan', 'BigGAN-PyTorch (G_ema)', is_biggan, biggan, skip=r'(.*\.)?sv\d+',
        initial='extra/(?!average/).*', licence='MIT',
    ),
)  # fmt: skip
