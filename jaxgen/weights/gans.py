"""Names of StyleGAN2-ADA and of BigGAN-PyTorch: the averaged generators, which draw samples, and discriminators."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxgen.sections import sides
from jaxgen.weights.files import Tensor, Weights
from jaxgen.weights.mapping import LEAVES, Layout, Substitution, Table
from jaxgen.weights.source import Shapes, Source, known, numbers, of_shape


def size_field(config: ConfigDict, size: int) -> dict[str, Any]:
    """{'data.size': size} where it is another."""
    return {'data.size': size} if size and sides(config.data.size) != (size, size) else {}


def stylegan2_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Size, latents, layers, architecture and widths, as the names and shapes tell them."""
    if weights is None or not (sizes := numbers(weights, r'synthesis\.b(\d+)\.')):
        return {}
    top, model = sizes[-1], config.model
    residual, images = (any(re.match(rf'synthesis\.b\d+\.{n}\.', name) for name in weights) for n in ('skip', 'torgb'))
    skips = len(numbers(weights, r'synthesis\.b(\d+)\.torgb\.')) == len(sizes)
    architecture = 'resnet' if residual else 'skip' if skips else 'orig'
    fields = known(
        {
            'model.latent': of_shape(weights, f'synthesis.b{top}.conv1.affine.weight', 1),
            'model.mapping_layers': len(numbers(weights, r'mapping\.fc(\d+)\.weight')),
            'data.channels': of_shape(weights, f'synthesis.b{top}.torgb.weight', 0),
        }
    )
    if images and top > 4:
        fields['model.generator_architecture'] = architecture
    widths = {size: of_shape(weights, f'synthesis.b{size}.conv1.weight', 0) for size in sizes}
    if any(min(model.channel_base // size, model.channel_max) != width for size, width in widths.items()):
        fields |= {'model.channel_max': max(widths.values()), 'model.channel_base': top * widths[top]}
    conditional = 'mapping.embed.weight' in weights
    return {**size_field(config, top), 'model.conditional': conditional, **fields}


def stylegan2_discriminator_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Architecture and layers of the classes' mapping."""
    if weights is None or len(numbers(weights, r'b(\d+)\.')) < 2:
        return {}
    residual = any(re.match(r'b\d+\.skip\.', name) for name in weights)
    skips = 'b4.fromrgb.weight' in weights
    fields = {'model.discriminator_architecture': 'resnet' if residual else 'skip' if skips else 'orig'}
    layers = len(numbers(weights, r'mapping\.fc(\d+)\.weight'))
    if layers and layers != (config.model.discriminator_mapping_layers or config.model.mapping_layers):
        fields['model.discriminator_mapping_layers'] = layers
    return fields


def biggan_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Size, widths, latents and attention, as the names and shapes tell them."""
    if weights is None or not (blocks := numbers(weights, r'blocks\.(\d+)\.')):
        return {}
    width = config.model.network.width
    channels = [of_shape(weights, f'blocks.{i}.0.conv2.weight', 0) for i in blocks]
    channels = [of_shape(weights, 'blocks.0.0.conv1.weight', 1), *channels]
    multipliers = tuple(c // width for c in channels)
    fields: dict[str, Any] = {}
    if [width * m for m in multipliers] != channels:
        fields['model.network.width'] = width = min(channels)
        multipliers = tuple(c // width for c in channels)
    attention = tuple(4 * 2 ** (i + 1) for i in numbers(weights, r'blocks\.(\d+)\.1\.gamma'))
    fields['model.network.multipliers'] = multipliers
    if {*attention} != {*config.model.network.attention}:
        fields['model.network.attention'] = attention
    latent = of_shape(weights, 'linear.weight', 1) * len(channels)
    known_ones = known({'model.latent': latent, 'model.network.embedding': of_shape(weights, 'shared.weight', 1)})
    return {**size_field(config, 4 * 2 ** len(blocks)), **fields, **known_ones}


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


# Blocks and attention of BigGAN, of both networks.
BIGGAN_BLOCKS: list[Substitution] = [
    (r'^block(\d+)/', r'blocks.\1.0/'),
    (r'^attention(\d+)/gain$', r'blocks.\1.1.gamma'),
    (r'^attention(\d+)/query/', r'blocks.\1.1/theta/'),
    (r'^attention(\d+)/key/', r'blocks.\1.1/phi/'),
    (r'^attention(\d+)/value/', r'blocks.\1.1/g/'),
    (r'^attention(\d+)/out/', r'blocks.\1.1/o/'),
    ('/shortcut/', '/conv_sc/'),
]


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
        *BIGGAN_BLOCKS,
        (r'/norm(\d)_gain/', r'/bn\1/gain/'),
        (r'/norm(\d)_shift/', r'/bn\1/bias/'),
        (r'/norm(\d)/', r'/bn\1/'),
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
        *BIGGAN_BLOCKS,
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
        initial=r'extra/(?!w$).*', discriminator=stylegan2_discriminator, fields=stylegan2_fields,
        discriminator_fields=stylegan2_discriminator_fields, classes=('mapping.embed.weight', 1, 0),
        licence='NVIDIA Source Code License, non-commercial',
    ),
    Source(
        'biggan', 'BigGAN-PyTorch (G_ema)', is_biggan, biggan, skip=r'(.*\.)?(sv\d+|embed\.u0)',
        initial='extra/(?!average/).*', fields=biggan_fields, classes=('shared.weight', 0, 0),
        discriminator=biggan_discriminator, prepare=with_right_vectors,
        same=(('extra/generator/vectors/', 'extra/average/vectors/'),), licence='MIT',
    ),
)  # fmt: skip
