"""Names of CompVis' taming-transformers and latent-diffusion, and of VAR's VQ-VAE: first stages and GPT."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from jaxgen.weights.files import Weights
from jaxgen.weights.mapping import LEAVES, Layout, Substitution, Table
from jaxgen.weights.source import Shapes, Source

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


def first_stage_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    return {'model.groups': 32, 'model.group_size': 0, 'model.eps': 1e-6}


SOURCES = (
    Source(
        'compvis', 'first stages of taming-transformers and latent-diffusion',
        lambda c: c.family == 'vqgan' and not c.model.scales,
        first_stage, roots=('', 'state_dict.', 'first_stage_model.', 'state_dict.first_stage_model.'),
        skip=r'.*(loss\.|model_ema\.).*', initial='extra/.*', fields=first_stage_fields, discriminator=patchgan,
        discriminator_root='loss.discriminator.', licence='MIT',
    ),
    Source(
        'var', 'VQ-VAE of VAR', lambda c: c.family == 'vqgan' and bool(c.model.scales), var_first_stage,
        skip='quantize.ema_vocab_hit_SV', initial='extra/.*', fields=first_stage_fields, licence='MIT',
    ),
    Source(
        'taming', 'GPT of taming-transformers', lambda c: c.family == 'transformer', gpt,
        roots=('', 'transformer.', 'state_dict.transformer.'),
        skip=r'.*\.attn\.mask', licence='MIT',
    ),
)  # fmt: skip
