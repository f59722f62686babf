"""Names of CompVis' taming-transformers and latent-diffusion, and of VAR's VQ-VAE: first stages and GPT."""

from __future__ import annotations

import re
from typing import Any

from ml_collections import ConfigDict

from jaxgen.errors import UserError
from jaxgen.sections import sides
from jaxgen.weights.files import Weights
from jaxgen.weights.mapping import LEAVES, Layout, Substitution, Table
from jaxgen.weights.source import Shapes, Source, known, numbers, of_shape

FIRST_STAGE: list[Substitution] = [
    ('^encoder/to_latent/', 'quant_conv/'),
    ('^decoder/from_latent/', 'post_quant_conv/'),
    ('^codebook/', 'quantize/embedding/'),
    (r'^quantize/embedding/embedding$', 'quantize/embedding/kernel'),
    ('/shortcut/', '/nin_shortcut/'),
    ('attention/out/', 'attention/proj_out/'),
    ('/first/', '/conv_in/'),
    (r'^(\w+)/norm/', r'\1/norm_out/'),
    ('/last/', '/conv_out/'),
    ('/middle_0/', '/mid/block_1/'),
    ('/middle_attention/', '/mid/attn_1/'),
    ('/middle_1/', '/mid/block_2/'),
    (r'/(down|up)(\d+)_(\d+)_attention/', r'/\1/\2/attn/\3/'),
    (r'/(down|up)(\d+)_(\d+)/', r'/\1/\2/block/\3/'),
    (r'/down(\d+)/', r'/down/\1/downsample/conv/'),
    (r'/up(\d+)/', r'/up/\1/upsample/conv/'),
]
FIRST_STAGE_LAYOUTS = (
    Layout('.*attention/qkv/kernel', 'o i 1 1 -> i o'),
    Layout('.*(attention/out|shortcut|to_latent|from_latent)/kernel', 'o i 1 1 -> i o'),
)


def first_stage(config: ConfigDict, shapes: Shapes) -> Table:
    """Encoder, decoder and codebook of VQGAN and of the autoencoders of latent diffusion."""
    return Table([('attention/qkv/', 'attention/{q,k,v}/'), *FIRST_STAGE, *LEAVES], FIRST_STAGE_LAYOUTS)


def var_first_stage(config: ConfigDict, shapes: Shapes) -> Table:
    """VAR's VQ-VAE: the same with q, k and v joined, and convolutions after enlarging, one of all scales or a list."""
    several = sum(path.endswith('kernel') for path in shapes if path.startswith('phi/')) > 1
    phi = r'quantize.quant_resi.qresi_ls.\1/' if several else 'quantize.quant_resi.qresi/'
    return Table([(r'^phi/phi_(\d+)/', phi), *FIRST_STAGE, *LEAVES], FIRST_STAGE_LAYOUTS)


def patchgan(config: ConfigDict, shapes: Shapes) -> Table:
    """The discriminator of the loss, with its batch statistics: convolutions, norms and leaky ReLUs by number."""
    layers = config.model.discriminator_layers
    names: list[Substitution] = [
        ('^(extra/)?discriminator/', ''),
        (r'^conv(\d+)/', lambda m: f'main.{max(3 * int(m[1]) - 1, 0)}/'),
        (r'^norm(\d+)/', lambda m: f'main.{3 * int(m[1])}/'),
        ('^last/', f'main.{3 * layers + 2}/'),
        (r'/(mean|var)$', r'.running_\1'),
    ]
    return Table([*names, *LEAVES])


def gpt(config: ConfigDict, shapes: Shapes) -> Table:
    """taming's GPT, which reads a class as the first token, of the same table as the codes."""
    names: list[Substitution] = [
        ('^transformer/', ''),
        ('^tokens/', 'tok_emb/'),
        ('^positions$', 'pos_emb'),
        ('^blocks/norm1/', 'blocks.*.ln1/'),
        ('^blocks/norm2/', 'blocks.*.ln2/'),
        ('^blocks/qkv/', 'blocks.*.attn.{query,key,value}/'),
        ('^blocks/out/', 'blocks.*.attn.proj/'),
        ('^blocks/mlp1/', 'blocks.*.mlp.0/'),
        ('^blocks/mlp2/', 'blocks.*.mlp.2/'),
        ('^norm/', 'ln_f/'),
    ]
    return Table([*names, *LEAVES], [Layout('transformer/positions', '1 p c -> p c')])


def without_gumbel(weights: Weights) -> Weights:
    """The weights themselves.

    Raises:
      UserError: they are a VQGAN's whose codes are those of the largest logits.
    """
    if any(re.fullmatch(r'(.*\.)?quantize\.proj\.weight', name) for name in weights):
        raise UserError(
            f'{weights.path}: a Gumbel VQGAN, whose codes come from a layer quantize.proj: there is no such network '
            'here, take one with a codebook of nearest vectors (quantize.embedding)'
        )
    return weights


def first_stage_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """The norms'; and sizes, as the names and shapes tell them."""
    norms = {'model.groups': 32, 'model.group_size': 0, 'model.eps': 1e-6}
    if weights is None or not (levels := numbers(weights, r'encoder\.down\.(\d+)\.block\.')):
        return norms
    model, height = config.model, sides(config.data.size)[0]
    channels = of_shape(weights, 'encoder.conv_in.weight', 0)
    widths = [of_shape(weights, f'encoder.down.{i}.block.0.conv1.weight', 0) for i in levels]
    codes, kernel = of_shape(weights, 'quantize.embedding.weight', 0), of_shape(weights, 'quant_conv.weight', 2)
    fields = known({'model.channels': channels, 'data.channels': of_shape(weights, 'encoder.conv_in.weight', 1)})
    if channels and not any(width % channels for width in widths):
        fields['model.multipliers'] = tuple(width // channels for width in widths)
    attention = tuple(height >> i for i in levels if f'encoder.down.{i}.attn.0.proj_out.weight' in weights)
    if {*attention} != {height >> i for i in levels} & {*model.attention}:
        fields['model.attention'] = attention
    fields |= {
        'model.blocks': len(numbers(weights, r'encoder\.down\.0\.block\.(\d+)\.')),
        'model.middle_attention': 'encoder.mid.attn_1.proj_out.weight' in weights,
        'model.latent_kernel': kernel,
        'model.regulariser': 'vq' if codes else 'kl',
    }
    return norms | fields | known({'model.vocabulary': codes})


def sizes(weights: Weights) -> dict[str, Any]:
    """config.model of a KL autoencoder by the tensors of a checkpoint that holds one; {} where it holds none."""
    ends = [name for name in weights if name.endswith('encoder.conv_in.weight')]
    inside = weights.below(ends[0].removesuffix('encoder.conv_in.weight')) if ends else weights
    if not ends or 'quantize.embedding.weight' in inside:
        return {}
    levels = numbers(inside, r'encoder\.down\.(\d+)\.block\.')
    widths = [of_shape(inside, f'encoder.down.{i}.block.0.conv1.weight', 0) for i in levels]
    channels = of_shape(inside, 'encoder.conv_in.weight', 0)
    if not all(widths) or not channels or any(width % channels for width in widths):
        return {}
    return {
        'channels': channels,
        'multipliers': tuple(width // channels for width in widths),
        'blocks': len(numbers(inside, r'encoder\.down\.0\.block\.(\d+)\.')),
        'latent': of_shape(inside, 'encoder.conv_out.weight', 0) // 2,
        'latent_kernel': of_shape(inside, 'quant_conv.weight', 2),
        'middle_attention': 'encoder.mid.attn_1.proj_out.weight' in inside,
        'attention': (),
    }


def patchgan_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Layers and channels."""
    convolutions = len([name for name in weights or () if len((weights or {})[name].shape) == 4])
    if weights is None or convolutions < 3:
        return {}
    sizes = known({'model.discriminator_channels': of_shape(weights, 'main.0.weight', 0)})
    return {'model.discriminator_layers': convolutions - 2, **sizes}


def gpt_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    """Depth and width; the number of heads is in no shape."""
    if weights is None or not (blocks := numbers(weights, r'blocks\.(\d+)\.')):
        return {}
    return {'model.blocks': len(blocks), **known({'model.channels': of_shape(weights, 'tok_emb.weight', 1)})}


SOURCES = (
    Source(
        'compvis', 'first stages of taming-transformers and latent-diffusion',
        lambda c: c.family == 'vqgan' and not c.model.scales,
        first_stage, roots=('', 'state_dict.', 'first_stage_model.', 'state_dict.first_stage_model.'),
        prepare=without_gumbel,
        skip=r'.*(loss\.|model_ema\.).*', initial='extra/.*', fields=first_stage_fields, discriminator=patchgan,
        discriminator_root='loss.discriminator.', discriminator_fields=patchgan_fields, licence='MIT',
    ),
    Source(
        'var', 'VQ-VAE of VAR', lambda c: c.family == 'vqgan' and bool(c.model.scales), var_first_stage,
        skip='quantize.ema_vocab_hit_SV', initial='extra/.*', fields=first_stage_fields, licence='MIT',
    ),
    Source(
        'taming', 'GPT of taming-transformers', lambda c: c.family == 'transformer', gpt,
        roots=('', 'transformer.', 'state_dict.transformer.'),
        skip=r'.*\.attn\.mask', fields=gpt_fields, licence='MIT',
    ),
)  # fmt: skip
