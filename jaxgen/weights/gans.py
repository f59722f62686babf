"""Names of StyleGAN2-ADA and of BigGAN-PyTorch: the averaged generators, which draw samples, and discriminators."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
from ml_collections import ConfigDict

from jaxgen.weights.files import Tensor, Weights
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
        ('/shortcut/', '/skip/'),
    ]
    layouts = [
        Layout('generator/synthesis/constant', 'c h w -> h w c'),
        Layout(r'generator/synthesis/block(?!4/)\d+/conv0/kernel', 'o i h w -> h w i o', {}, turned, turned),
    ]
    return Table([*names, *LEAVES], layouts)


def stylegan2_discriminator(config: ConfigDict, shapes: Shapes) -> Table:
    """Blocks, mapping and the last layers, which there are of the block of 4 pixels."""
    names: list[Substitution] = [
        ('^discriminator/', ''),
        ('^first/', f'b{config.data.size}/fromrgb/'),
        (r'^first(\d+)/', r'b\1/fromrgb/'),
        (r'^block(\d+)/', r'b\1/'),
        ('/shortcut/', '/skip/'),
        (r'^mapping/layer(\d+)/', r'mapping/fc\1/'),
        ('^mapping/embedding/', 'mapping/embed/'),
        ('^conv/', 'b4/conv/'),
        ('^dense/', 'b4/fc/'),
        ('^value/', 'b4/out/'),
    ]
    return Table([*names, *LEAVES], [Layout('discriminator/dense/kernel', 'o (c h w) -> (h w c) o', {'h': 4, 'w': 4})])


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


def biggan_discriminator(config: ConfigDict, shapes: Shapes) -> Table:
    """The discriminator with the vectors of its spectral norms."""
    names: list[Substitution] = [
        (r'^extra/discriminator/vectors/verdict/embedding/kernel$', 'embed/v0'),
        (r'^extra/discriminator/vectors/(.*)/kernel$', r'discriminator/\1/u0'),
        ('^discriminator/', ''),
        (r'^block(\d+)/', r'blocks.\1.0/'),
        (r'^attention(\d+)/gain$', r'blocks.\1.1.gamma'),
        (r'^attention(\d+)/query/', r'blocks.\1.1/theta/'),
        (r'^attention(\d+)/key/', r'blocks.\1.1/phi/'),
        (r'^attention(\d+)/value/', r'blocks.\1.1/g/'),
        (r'^attention(\d+)/out/', r'blocks.\1.1/o/'),
        ('/shortcut/', '/conv_sc/'),
        ('^verdict/value/', 'linear/'),
        ('^verdict/embedding/', 'embed/'),
    ]
    layouts = [
        Layout('extra/discriminator/vectors/verdict/embedding/kernel', 'o -> o'),
        Layout('extra/discriminator/vectors/.*', '1 o -> o'),
        Layout('discriminator/(.*/shortcut|attention.*)/kernel', 'o i 1 1 -> i o'),
        Layout('discriminator/verdict/embedding/kernel', 'i o -> i o'),
    ]
    return Table([*names, *LEAVES], layouts)


def with_right_vectors(weights: Weights) -> Weights:
    """The weights with a vector v0 beside u0 of the classes' embedding: the singular vector of its features, by one
    iteration from that of its classes, since its table is a kernel here, classes in, features out."""

    def right(root: str) -> np.ndarray:
        u, table = (weights[f'{root}{name}'].read().astype(np.float32) for name in ('u0', 'weight'))
        v = u.reshape(-1) @ table
        return v / max(float(np.linalg.norm(v)), 1e-12)

    added = {}
    for name, tensor in weights.tensors.items():
        root = name.removesuffix('u0')
        table = weights.tensors.get(f'{root}weight')
        fits = table is not None and len(table.shape) == 2 and tensor.shape == (1, table.shape[0])
        if fits and f'{root}v0' not in weights and re.fullmatch(r'(.*\.)?embed\.u0', name):
            added[f'{root}v0'] = Tensor(table.shape[1:], np.dtype(np.float32), functools.partial(right, root))
    return dataclasses.replace(weights, tensors={**weights.tensors, **added})


def is_biggan(config: ConfigDict) -> bool:
    return config.family == 'gan' and config.model.network.name == 'biggan'


SOURCES = (
    Source(
        'stylegan2', 'StyleGAN2-ADA of NVlabs (G_ema)', lambda c: c.family == 'stylegan2', stylegan2,
        roots=('', 'G_ema.', 'generator.'), skip=r'(.*\.)?(resample_filter|noise_const)|(D|G)\..*',
        initial=r'extra/(?!w$).*', discriminator=stylegan2_discriminator,
        licence='NVIDIA Source Code License, non-commercial',
    ),
    Source(
        'biggan', 'BigGAN-PyTorch (G_ema)', is_biggan, biggan, skip=r'(.*\.)?(sv\d+|embed\.u0)',
        initial='extra/(?!average/).*', discriminator=biggan_discriminator, prepare=with_right_vectors,
        same=(('extra/generator/vectors/', 'extra/average/vectors/'),), licence='MIT',
    ),
)  # fmt: skip
