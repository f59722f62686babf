"""Names of DiT and SiT (timm's transformer blocks), and of VAR."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxgen.errors import UserError
from jaxgen.networks.dit import position_embedding
from jaxgen.weights.files import Weights
from jaxgen.weights.mapping import LEAVES, Layout, Substitution, Table
from jaxgen.weights.source import COUNTED_AS_HERE, Shapes, Source, known, network, numbers, of_shape


def dit(config: ConfigDict, shapes: Shapes) -> Table:
    """DiT and SiT."""
    patch = config.model.network.patch
    names: list[Substitution] = [
        ('^denoiser/', ''),
        ('^first/', 'x_embedder.proj/'),
        ('^time1/', 't_embedder.mlp.0/'),
        ('^time2/', 't_embedder.mlp.2/'),
        ('^label/', 'y_embedder.embedding_table/'),
        ('^blocks/qkv/', 'blocks.*.attn.qkv/'),
        ('^blocks/out/', 'blocks.*.attn.proj/'),
        ('^blocks/mlp1/', 'blocks.*.mlp.fc1/'),
        ('^blocks/mlp2/', 'blocks.*.mlp.fc2/'),
        ('^blocks/modulation/', 'blocks.*.adaLN_modulation.1/'),
        ('^modulation/', 'final_layer.adaLN_modulation.1/'),
        ('^last/', 'final_layer.linear/'),
    ]
    first = Layout('denoiser/first/kernel', 'o c a b -> (a b c) o', {'a': patch, 'b': patch})
    return Table([*names, *LEAVES], [first])


def sit(config: ConfigDict, shapes: Shapes) -> Table:
    """SiT: the velocity points to the data, and the last layer has outputs for a variance, which nothing reads."""
    areas = config.model.network.patch**2

    def forward(x: np.ndarray) -> np.ndarray:
        outputs = x.reshape(*x.shape[:-1], areas, -1)
        return -outputs[..., : outputs.shape[-1] // 2].reshape(*x.shape[:-1], -1)

    def backward(x: np.ndarray) -> np.ndarray:
        outputs = x.reshape(*x.shape[:-1], areas, -1)
        return np.concatenate([-outputs, np.zeros_like(outputs)], -1).reshape(*x.shape[:-1], -1)

    table = dit(config, shapes)
    last = [
        Layout('denoiser/last/kernel', 'o i -> i o', {}, forward, backward),
        Layout('denoiser/last/bias', 'o -> o', {}, forward, backward),
    ]
    return Table(table.names, [*table.layouts, *last])


def var(config: ConfigDict, shapes: Shapes) -> Table:
    """VAR's transformer; queries and values have biases, keys none."""
    names: list[Substitution] = [
        ('^transformer/', ''),
        ('^blocks/bias$', 'blocks.*.attn.{q,v}_bias'),
        ('^blocks/log_scale$', 'blocks.*.attn.scale_mul_1H11'),
        ('^blocks/qkv/', 'blocks.*.attn.mat_qkv/'),
        ('^blocks/out/', 'blocks.*.attn.proj/'),
        ('^blocks/mlp', 'blocks.*.ffn.fc'),
        ('^blocks/modulation$', 'blocks.*.ada_gss'),
        ('^blocks/modulation/', 'blocks.*.ada_lin.1/'),
        ('^modulation/', 'shared_ada_lin.1/'),
        ('^head_modulation/', 'head_nm.ada_lin.1/'),
        ('^label/', 'class_emb/'),
        ('^levels$', 'lvl_embed/kernel'),
        ('^positions$', 'pos_1LC'),
        ('^start$', 'pos_start'),
        ('^words/', 'word_embed/'),
    ]
    layouts = [
        Layout('.*/blocks/bias', '(l j) c -> l j c'),
        Layout('.*/blocks/log_scale', '1 h 1 1 -> h'),
        Layout('.*/blocks/modulation', '1 1 m c -> (m c)', {'m': 6}),
        Layout('.*/(positions|start)', '1 p c -> p c'),
    ]
    return Table([*names, *LEAVES], layouts)


def var_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Depth, width and heads, and the choices of the larger models, as the names and shapes tell them."""
    if weights is None or not (blocks := numbers(weights, r'blocks\.(\d+)\.')):
        return {}
    scale = 'blocks.0.attn.scale_mul_1H11'
    sizes = {
        'model.channels': of_shape(weights, 'blocks.0.attn.mat_qkv.weight', 1),
        'model.heads': of_shape(weights, scale, 1),
    }
    shared = any(name.startswith('shared_ada_lin.') for name in weights)
    choices = {'model.unit_queries': scale in weights, 'model.shared': shared}
    return {'model.blocks': len(blocks), **known(sizes), **choices}


# {(channels, blocks): heads} of the published sizes S, B, L and XL.
HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}


def of_both(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Fields of DiT and SiT.

    Raises:
      UserError: the file's table of positions is not the fixed one.
    """
    net = config.model.network
    fields = {'model.network.freq_shift': 0, 'model.network.mlp_eps': 1e-6}
    if (net.channels, net.blocks) in HEADS:
        fields['model.network.heads'] = HEADS[net.channels, net.blocks]
    table = weights.get('pos_embed') if weights is not None else None
    if table is None:
        return fields
    side = math.isqrt(table.shape[1]) if len(table.shape) == 3 else 0
    if table.shape != (1, side * side, net.channels):
        raise UserError(f'pos_embed of the file is {list(table.shape)}: positions here are those of a square grid')
    values = np.asarray(table.read()[0], np.float32)
    if not np.allclose(values, position_embedding(side, side, net.channels), atol=1e-2):
        raise UserError('pos_embed of the file is not the fixed table of DiT, which is the one that there is here')
    return fields


def dit_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """The noise is predicted, or with an option of DiT's code the image."""
    prediction = config.model.training.prediction.name
    prediction = prediction if prediction == 'x0' else 'eps'
    return {**of_both(config, weights), 'model.training.prediction.name': prediction, **COUNTED_AS_HERE}


def sit_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Time from the noise at 0 to the image at 1."""
    time = {'model.training.time_scale': -0.001, 'model.training.time_shift': 1.0}
    return {**of_both(config, weights), 'model.training.prediction.name': 'flow', **time}


def remarks(config: ConfigDict, weights: Weights) -> list[str]:
    """The heads of a size that is not published."""
    net = config.model.network
    if (net.channels, net.blocks) in HEADS:
        return []
    return [f'the file does not say how many heads its attention has: {net.heads}, config.model.network.heads']


def is_dit(config: ConfigDict, flow: bool) -> bool:
    return network(config) == 'dit' and (config.model.process.name == 'flow') == flow


SOURCES = (
    Source(
        'dit', 'DiT of facebookresearch', lambda c: is_dit(c, False), dit, roots=('', 'ema.', 'model.'),
        skip='pos_embed', fields=dit_fields, remarks=remarks, licence='CC BY-NC 4.0',
    ),
    Source(
        'sit', 'SiT of willisma', lambda c: is_dit(c, True), sit, roots=('', 'ema.', 'model.'), skip='pos_embed',
        fields=sit_fields, remarks=remarks, licence='MIT',
    ),
    Source(
        'var', 'VAR of FoundationVision', lambda c: c.family == 'var', var, roots=('', 'trainer.var_wo_ddp.'),
        skip=r'lvl_1L|attn_bias_for_masking|.*zero_k_bias', fields=var_fields, classes=('class_emb.weight', 0, 1),
        licence='MIT',
    ),
)  # fmt: skip
