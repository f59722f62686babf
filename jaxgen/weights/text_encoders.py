"""Names of text encoders: CLIP as transformers and OpenAI have it, T5 as transformers has it."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxgen.weights.mapping import LEAVES, Layout, Substitution, Table
from jaxgen.weights.source import Shapes

# One array for all positions, which has a name like an embedding's.
AS_IT_IS = 'a b -> a b'


def clip_blocks(tower: str) -> list[Substitution]:
    """The blocks of a tower, under transformers' names."""
    own, theirs = f'^{tower}/blocks/', f'{tower}_model.encoder.layers.*.'
    return [
        (own + r'norm(\d)/', theirs + r'layer_norm\1/'),
        (own + 'qkv/', theirs + 'self_attn.{q,k,v}_proj/'),
        (own + 'out/', theirs + 'self_attn.out_proj/'),
        (own + r'mlp(\d)/', theirs + r'mlp.fc\1/'),
    ]


def clip(config: ConfigDict, shapes: Shapes) -> Table:
    """CLIPModel, CLIPTextModel and CLIPTextModelWithProjection of transformers: 'text/...' and 'vision/...'."""
    patch = config.model.vision.patch if 'vision' in config.model else 1
    names = [
        *clip_blocks('text'),
        *clip_blocks('vision'),
        ('^text/tokens/', 'text_model.embeddings.token_embedding/'),
        ('^text/positions$', 'text_model.embeddings.position_embedding/kernel'),
        ('^text/norm/', 'text_model.final_layer_norm/'),
        ('^text/project/', 'text_projection/'),
        ('^vision/class$', 'vision_model.embeddings.class_embedding'),
        ('^vision/patches/', 'vision_model.embeddings.patch_embedding/'),
        ('^vision/positions$', 'vision_model.embeddings.position_embedding/kernel'),
        ('^vision/norm1/', 'vision_model.pre_layrnorm/'),  # as it is spelled there
        ('^vision/norm2/', 'vision_model.post_layernorm/'),
        ('^vision/project/', 'visual_projection/'),
        ('^scale/value$', 'logit_scale'),
    ]
    layouts = [
        Layout('(text|vision)/positions', AS_IT_IS),
        Layout('vision/patches/kernel', 'o c a b -> (a b c) o', {'a': patch, 'b': patch}),
    ]
    return Table([*names, *LEAVES], layouts)


def t5(config: ConfigDict, shapes: Shapes) -> Table:
    """T5EncoderModel of transformers: 'text/...'."""
    attention, mlp = 'encoder.block.*.layer.0.', 'encoder.block.*.layer.1.'
    names = [
        ('^text/blocks/norm1/', attention + 'layer_norm/'),
        ('^text/blocks/qkv/', attention + 'SelfAttention.{q,k,v}/'),
        ('^text/blocks/out/', attention + 'SelfAttention.o/'),
        ('^text/blocks/norm2/', mlp + 'layer_norm/'),
        ('^text/blocks/gate/', mlp + 'DenseReluDense.wi_0/'),
        ('^text/blocks/mlp1/', mlp + 'DenseReluDense.wi_1/'),
        ('^text/blocks/mlp2/', mlp + 'DenseReluDense.wo/'),
        ('^text/norm/', 'encoder.final_layer_norm/'),
        ('^text/tokens/', 'shared/'),
        ('^text/distances$', 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias/kernel'),
    ]
    return Table([*names, *LEAVES], [Layout('text/distances', AS_IT_IS)])
