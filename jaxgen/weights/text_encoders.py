"""Text encoders and CLIP: names of transformers, OpenAI and OpenCLIP, what their config.json says, tokenizers."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxgen.contract import Texts
from jaxgen.errors import UserError
from jaxgen.networks.clip import NORMALISATIONS
from jaxgen.text import tokenizers
from jaxgen.text.tokenizers import Tokenizer
from jaxgen.weights import files
from jaxgen.weights.diffusers import ANY, check_values, equal, is_of
from jaxgen.weights.files import Weights
from jaxgen.weights.mapping import LEAVES, Layout, Substitution, Table
from jaxgen.weights.source import Shapes, Source, known, numbers, of_shape

# One array for all positions, which has a name like an embedding's.
AS_IT_IS = 'a b -> a b'
PATCHES = 'o c a b -> (a b c) o'


def patch_of(config: ConfigDict) -> int:
    """The side of a patch of a config's vision tower; 1 where it has none."""
    section = config.model.get('vision') or config.model.get('network')
    return section.get('patch', 1) if section else 1


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
    patch = patch_of(config)
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
        Layout('vision/patches/kernel', PATCHES, {'a': patch, 'b': patch}),
    ]
    return Table([*names, *LEAVES], layouts)


def residual_blocks(tower: str, root: str) -> list[Substitution]:
    """The blocks of a tower, under OpenAI's names."""
    own, theirs = f'^{tower}/blocks/', f'{root}transformer.resblocks.*.'
    return [
        (own + r'norm(\d)/', theirs + r'ln_\1/'),
        (own + 'qkv/kernel$', theirs + 'attn.in_proj_weight'),
        (own + 'qkv/bias$', theirs + 'attn.in_proj_bias'),
        (own + 'out/', theirs + 'attn.out_proj/'),
        (own + 'mlp1/', theirs + 'mlp.c_fc/'),
        (own + 'mlp2/', theirs + 'mlp.c_proj/'),
    ]


def openclip(config: ConfigDict, shapes: Shapes) -> Table:
    """CLIP of OpenAI and of OpenCLIP."""
    patch = patch_of(config)
    names = [
        *residual_blocks('text', ''),
        *residual_blocks('vision', 'visual.'),
        ('^text/tokens/', 'token_embedding/'),
        ('^text/positions$', 'positional_embedding'),
        ('^text/norm/', 'ln_final/'),
        ('^text/project/kernel$', 'text_projection'),
        ('^vision/class$', 'visual.class_embedding'),
        ('^vision/patches/', 'visual.conv1/'),
        ('^vision/positions$', 'visual.positional_embedding'),
        ('^vision/norm1/', 'visual.ln_pre/'),
        ('^vision/norm2/', 'visual.ln_post/'),
        ('^vision/project/kernel$', 'visual.proj'),
        ('^scale/value$', 'logit_scale'),
    ]
    layouts = [
        Layout('(text|vision)/(positions|project/kernel)', AS_IT_IS),
        Layout('vision/patches/kernel', PATCHES, {'a': patch, 'b': patch}),
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


# --- names of other versions


def with_prefixes(weights: Weights) -> Weights:
    """The weights under the names of CLIPModel: since transformers 5 a tower alone has no prefix."""
    tops = (
        r'(embeddings\.((token|position|patch|class)_embedding|position_ids)|encoder\.layers'
        r'|(final|post)_layer_?norm|pre_layrnorm)\b'
    )
    if not any(re.match(tops, name) for name in weights):
        return weights
    tower = 'vision_model.' if 'pre_layrnorm.weight' in weights else 'text_model.'
    named = {f'{tower}{name}' if re.match(tops, name) else name: x for name, x in weights.tensors.items()}
    return dataclasses.replace(weights, tensors=named)


def with_shared(weights: Weights) -> Weights:
    """The weights with T5's embedding of tokens under the name that encoder and decoder share."""
    own = 'encoder.embed_tokens.weight'
    named = {
        f'{name.removesuffix(own)}shared.weight' if name.endswith(own) else name: x
        for name, x in weights.tensors.items()
        if not (name.endswith(own) and f'{name.removesuffix(own)}shared.weight' in weights)
    }
    return dataclasses.replace(weights, tensors=named)


# --- what config.json says

# Keys of any config.json of transformers that say nothing of an encoder: of generation, training and files.
OTHERS = (
    '_attn_implementation', 'add_cross_attention', 'architectures', 'attention_dropout', 'bad_words_ids',
    'begin_suppress_tokens', 'bos_token_id', 'chunk_size_feed_forward', 'classifier_dropout',
    'cross_attention_hidden_size', 'decoder_start_token_id', 'diversity_penalty', 'do_sample', 'dropout',
    'dropout_rate', 'dtype', 'early_stopping', 'encoder_no_repeat_ngram_size', 'eos_token_id',
    'exponential_decay_length_penalty', 'finetuning_task', 'forced_bos_token_id', 'forced_eos_token_id',
    'gradient_checkpointing', 'id2label', 'initializer_factor', 'initializer_range', 'is_decoder',
    'is_encoder_decoder', 'label2id', 'length_penalty', 'logit_scale_init_value', 'max_length', 'min_length',
    'model_type', 'n_positions', 'no_repeat_ngram_size', 'num_beam_groups', 'num_beams', 'num_decoder_layers',
    'num_return_sequences', 'output_attentions', 'output_hidden_states', 'output_past', 'output_scores',
    'pad_token_id', 'prefix', 'problem_type', 'pruned_heads', 'remove_invalid_values', 'repetition_penalty',
    'return_dict', 'return_dict_in_generate', 'scale_decoder_outputs', 'sep_token_id', 'suppress_tokens',
    'task_specific_params', 'temperature', 'tf_legacy_loss', 'tie_encoder_decoder', 'tie_word_embeddings',
    'tokenizer_class', 'top_k', 'top_p', 'torch_dtype', 'torchscript', 'transformers_version', 'typical_p',
    'use_bfloat16', 'use_cache',
)  # fmt: skip
SIZES = ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'projection_dim')
# Values of the keys that say something: those of the networks here, or ANY where the tensors or a field have it.
TOWER = {
    **dict.fromkeys((*OTHERS, *SIZES), ANY),
    'hidden_act': ('quick_gelu', 'gelu'),
    'layer_norm_eps': (1e-5,),
}
KEYS: dict[str, dict[str, tuple]] = {
    'clip_text_model': TOWER | dict.fromkeys(('vocab_size', 'max_position_embeddings'), ANY),
    'clip_vision_model': TOWER | dict.fromkeys(('image_size', 'patch_size'), ANY) | {'num_channels': (3,)},
    'clip': dict.fromkeys(
        (*OTHERS, 'projection_dim', 'text_config', 'vision_config', 'text_config_dict', 'vision_config_dict'), ANY
    ),
    't5': {
        **dict.fromkeys((*OTHERS, 'vocab_size', 'd_model', 'd_kv', 'd_ff', 'num_layers', 'num_heads'), ANY),
        **dict.fromkeys(('relative_attention_num_buckets', 'relative_attention_max_distance'), ANY),
        'feed_forward_proj': ('gated-gelu',),
        'dense_act_fn': ('gelu_new',),
        'is_gated_act': (True,),
        'layer_norm_epsilon': (1e-6,),
    },
}
TOWERS = {'text': 'clip_text_model', 'vision': 'clip_vision_model'}
HEADS = {'text': 8, 'vision': 12}  # of transformers, where config.json says none


def count_of(said: Mapping[str, Any], key: str, default: int) -> int:
    """A count that config.json says.

    Raises:
      UserError: it is none.
    """
    value = said.get(key, default)
    if not is_of('a count', value) or not value:
        raise UserError(f'config.json is damaged: {key} is {repr(value)[:80]}, and should be a count')
    return value


def checked(said: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A config.json, or a tower's part of it.

    Raises:
      UserError: it says what no network here has.
    """
    if not isinstance(said, Mapping):
        raise UserError(f'config.json is damaged: {repr(said)[:80]} should be an object')
    check_values(said, KEYS[kind])
    return dict(said)


def kind_of(weights: Weights | None) -> str:
    """What config.json says that the model is, one of KEYS; '' where there is none, or that of a run or of diffusers.

    Raises:
      UserError: a model that there is not here.
    """
    said = weights.config if weights is not None else {}
    kind = str(said.get('model_type', ''))
    if kind and kind not in KEYS:
        raise UserError(f'the config.json of the weights is of a {kind[:80]!r}: here are {", ".join(KEYS)}')
    return kind


def tower_said(weights: Weights | None, tower: str) -> dict[str, Any]:
    """What config.json says of a tower of CLIP; {} where there is none.

    Raises:
      UserError: it is of another model, or says what no network here has.
    """
    kind = kind_of(weights)
    if not kind or weights is None:
        return {}
    if kind == 'clip':
        whole = checked(weights.config, 'clip')
        parts = [whole.get(f'{tower}_config{more}') or {} for more in ('', '_dict')]
        said = {key: value for part in parts for key, value in checked(part, TOWERS[tower]).items()}
        return {'hidden_act': 'quick_gelu', **said}
    if kind != TOWERS[tower]:
        raise UserError(f'the config.json of the weights is of a {kind}: this network is a {TOWERS[tower]}')
    return {'hidden_act': 'quick_gelu', **checked(weights.config, kind)}


# Names of a tower's tensors whose shapes give its sizes, {what: (name, axis)}, and the pattern of its blocks.
NAMES = {
    'transformers': {
        'text': {
            'vocabulary': ('text_model.embeddings.token_embedding.weight', 0),
            'length': ('text_model.embeddings.position_embedding.weight', 0),
            'channels': ('text_model.embeddings.token_embedding.weight', 1),
            'hidden': ('text_model.encoder.layers.0.mlp.fc1.weight', 0),
            'features': ('text_projection.weight', 0),
            'blocks': (r'text_model\.encoder\.layers\.(\d+)\.', 0),
        },
        'vision': {
            'channels': ('vision_model.embeddings.position_embedding.weight', 1),
            'patch': ('vision_model.embeddings.patch_embedding.weight', 2),
            'places': ('vision_model.embeddings.position_embedding.weight', 0),
            'hidden': ('vision_model.encoder.layers.0.mlp.fc1.weight', 0),
            'features': ('visual_projection.weight', 0),
            'blocks': (r'vision_model\.encoder\.layers\.(\d+)\.', 0),
        },
    },
    'openclip': {
        'text': {
            'vocabulary': ('token_embedding.weight', 0),
            'length': ('positional_embedding', 0),
            'channels': ('token_embedding.weight', 1),
            'hidden': ('transformer.resblocks.0.mlp.c_fc.weight', 0),
            'features': ('text_projection', 1),
            'blocks': (r'transformer\.resblocks\.(\d+)\.', 0),
        },
        'vision': {
            'channels': ('visual.positional_embedding', 1),
            'patch': ('visual.conv1.weight', 2),
            'places': ('visual.positional_embedding', 0),
            'hidden': ('visual.transformer.resblocks.0.mlp.c_fc.weight', 0),
            'features': ('visual.proj', 1),
            'blocks': (r'visual\.transformer\.resblocks\.(\d+)\.', 0),
        },
    },
}


def sizes(weights: Weights, source: str, tower: str) -> dict[str, int]:
    """Fields of a tower that its tensors tell, 'places' of the class token and the patches among them."""
    seen = {
        what: len(numbers(weights, name)) if what == 'blocks' else of_shape(weights, name, axis)
        for what, (name, axis) in NAMES[source][tower].items()
    }
    if seen['hidden'] == 4 * seen['channels']:
        seen['hidden'] = 0
    return seen if seen['channels'] else {}


def section(weights: Weights, source: str, tower: str) -> dict[str, Any]:
    """Fields of a tower that tensors and config.json tell: no 'places'."""
    said, seen = tower_said(weights, tower), sizes(weights, source, tower)
    seen.pop('places', None)
    if said:
        seen['heads'] = count_of(said, 'num_attention_heads', HEADS[tower])
        if tower == 'text':
            end = said.get('eos_token_id', 49_407)
            if isinstance(end, bool) or not isinstance(end, int):
                raise UserError(f'config.json is damaged: eos_token_id is {repr(end)[:80]}, and should be a number')
            # Configs of 2022 have a 2 there that is no token: the largest number ends a text.
            seen['end'] = -1 if end in (2, seen.get('vocabulary', 49_408) - 1) else end
    return {**seen, **({'activation': said['hidden_act']} if said else {})}


PREPROCESSOR = 'preprocessor_config.json'


def normalisation(weights: Weights | None) -> str:
    """How preprocessor_config.json beside the weights normalises images; '' where there is none.

    Raises:
      UserError: as nothing here.
    """
    if weights is None:
        return ''
    folder = weights.path if os.path.isdir(weights.path) else os.path.dirname(weights.path)
    said = files.read_part(folder, PREPROCESSOR)
    rows = said.get('image_mean'), said.get('image_std')
    if not all(rows) or said.get('do_normalize') is False:
        return ''
    for name, values in NORMALISATIONS.items():
        if all(
            isinstance(row, list) and len(row) == 3 and all(map(equal, row, own))
            for row, own in zip(rows, values, strict=True)
        ):
            return name
    raise UserError(
        f'preprocessor_config.json of the weights normalises images by {repr(rows)[:120]}; here are '
        f'{", ".join(NORMALISATIONS)}'
    )


def as_fields(own: Mapping[str, Any], here: ConfigDict, where: str) -> dict[str, Any]:
    """{field: value} of a tower, at a section of a config. A width of the MLPs may be written in two ways."""
    fields = dict(own)
    if 'hidden' in fields and (fields['hidden'] or 4 * own['channels']) == (here.hidden or 4 * here.channels):
        del fields['hidden']
    return {f'{where}.{name}': value for name, value in fields.items() if name in here}


def clip_fields(source: str):
    """Source.fields of CLIP, whole or one tower."""

    def fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
        if weights is None:
            return {}
        if config.family == 'encoder':
            tower = tower_of(config)
            fields = as_fields(section(weights, source, tower), config.model.network, 'model.network')
        else:
            fields = {}
            for tower in TOWERS:
                own = section(weights, source, tower)
                fields |= as_fields(own, config.model[tower], f'model.{tower}')
                shared = {f'model.{name}': own[name] for name in ('features', 'activation') if name in own}
                if any(fields.get(name, value) != value for name, value in shared.items()):
                    raise UserError(
                        'the towers of the weights have different activations or embeddings: here they share them'
                    )
                fields |= shared
        name = normalisation(weights)
        return fields | ({'model.normalisation': name} if name and tower_of(config) != 'text' else {})

    return fields


def tower_of(config: ConfigDict) -> str:
    """The tower of CLIP that an encoder is; '' of another, or of the whole."""
    if config.family != 'encoder':
        return ''
    return {'clip': 'text', 'clip_vision': 'vision'}.get(config.model.network.name, '')


def t5_section(weights: Weights) -> dict[str, Any]:
    """Fields of T5's encoder that tensors and config.json tell.

    Raises:
      UserError: it is of another model, or says what no network here has.
    """
    attention = 'encoder.block.0.layer.0.SelfAttention.'
    heads = of_shape(weights, f'{attention}relative_attention_bias.weight', 1)
    seen = {
        'vocabulary': of_shape(weights, 'shared.weight', 0),
        'channels': of_shape(weights, 'shared.weight', 1),
        'blocks': len(numbers(weights, r'encoder\.block\.(\d+)\.')),
        'heads': heads,
        'head_channels': of_shape(weights, f'{attention}q.weight', 0) // max(heads, 1),
        'hidden': of_shape(weights, 'encoder.block.0.layer.1.DenseReluDense.wi_0.weight', 0),
        'buckets': of_shape(weights, f'{attention}relative_attention_bias.weight', 0),
    }
    kind = kind_of(weights)
    if kind not in ('', 't5'):
        raise UserError(f'the config.json of the weights is of a {kind}: this network is a t5')
    if not kind:
        return known(seen)
    said = checked({'feed_forward_proj': 'relu', **weights.config}, 't5')  # as it is where nothing is said
    return known({**seen, 'furthest': count_of(said, 'relative_attention_max_distance', 128)})


def t5_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    if weights is None:
        return {}
    return {f'model.network.{name}': value for name, value in t5_section(weights).items()}


def remarks(config: ConfigDict, weights: Weights) -> list[str]:
    """What is taken from the config."""
    if kind_of(weights):
        return []
    network = config.model.network if config.family == 'encoder' else config.model
    what = (
        'the distance from which on tokens share a bias'
        if 'furthest' in network
        else (f'heads of attention, the activation ({network.get("activation", "")}) and the token that ends a text')
    )
    return [f'there is no config.json beside the weights: {what} are those of the config']


# --- a config by the files


def root_before(weights: Weights, name: str) -> str | None:
    """What stands before a name in that of the first tensor that ends with it; None: none does."""
    ending = (one for one in weights if one == name or one.endswith(f'.{name}'))
    return next((one.removesuffix(name) for one in ending), None)


def tower_model(weights: Weights, source: str, tower: str) -> dict[str, Any]:
    """All fields of a tower; {} where the weights have none.

    Raises:
      UserError: nothing says how many heads it has.
    """
    root = root_before(weights, NAMES[source][tower]['channels'][0])
    if root is None:
        return {}
    own = section(weights.below(root), source, tower)
    if 'heads' not in own:  # those of OpenAI's towers are 64 wide, of OpenCLIP's, too, but for the widest of images
        if own['channels'] % 64 or (tower == 'vision' and own['channels'] > 1024):
            raise UserError(
                f'{weights.path}: no config.json says how many heads a tower of {own["channels"]} channels has: give '
                '--config of its network'
            )
        own['heads'] = own['channels'] // 64
    # OpenAI's files have the side of an image among the weights.
    quick = source == 'transformers' or f'{root}input_resolution' in weights
    own.setdefault('activation', 'quick_gelu' if quick else 'gelu')
    return own


def of_open_clip(weights: Weights) -> dict[str, Any]:
    """What config.json of transformers says of OpenCLIP's text tower with such tensors."""
    channels = of_shape(with_prefixes(weights), NAMES['transformers']['text']['channels'][0], 1)
    said = {'model_type': TOWERS['text'], 'hidden_act': 'gelu', 'eos_token_id': 2}
    return {**said, 'num_attention_heads': max(channels // 64, 1)}


def image_side(weights: Weights, source: str) -> int:
    """The side of the images that a vision tower was trained on, by its positions."""
    inside = weights.below(root_before(weights, NAMES[source]['vision']['channels'][0]) or '')
    seen = sizes(inside, source, 'vision')
    return seen['patch'] * round(max(seen['places'] - 1, 1) ** 0.5)


def model_of(weights: Weights, length: int = 0) -> tuple[str, dict[str, Any], int] | None:
    """(family, config.model, side of an image; 0 where it reads none) of a text encoder or CLIP; None: it is neither.

    Args:
      length: tokens of a text, for an encoder without positions; 0: 512.

    Raises:
      UserError: a model of a kind that there is not here, or nothing says the heads of attention.
    """
    kind_of(weights)
    shared = with_shared(weights)
    if (root := root_before(shared, 'encoder.block.0.layer.0.SelfAttention.q.weight')) is not None:
        return 'encoder', {'network': {'name': 't5', **t5_section(shared.below(root)), 'length': length or 512}}, 0
    for source, named in (('transformers', with_prefixes(weights)), ('openclip', weights)):
        text, vision = (tower_model(named, source, tower) for tower in TOWERS)
        side = image_side(named, source) if vision else 0
        usual = {'normalisation': normalisation(weights) or 'clip'}
        if text and vision:
            own = {name: text.pop(name) for name in ('features', 'activation')}
            if any(vision.pop(name) != value for name, value in own.items()):
                raise UserError(
                    f'{weights.path}: the towers have different activations or embeddings: here they share them'
                )
            return 'clip', {'text': text, 'vision': vision, **own, **usual}, side
        if text:
            return 'encoder', {'network': {'name': 'clip', **text}}, 0
        if vision:
            return 'encoder', {'network': {'name': 'clip_vision', **vision}, **usual}, side
    return None


# --- tokenizers

VOCABULARIES = ('vocab.json', 'tokenizer.json', 'spiece.model')
FILES = (*VOCABULARIES, 'merges.txt', 'tokenizer_config.json', 'special_tokens_map.json')


def tokenizer_folder(path: str, option: str = '', suffix: str = '') -> str:
    """The folder of the tokenizer of a text encoder, as the hub lays them out; '' where there is none.

    Args:
      path: of the encoder's weights, a file or folder.
      option: a folder that the person names: it, or one called tokenizer in it.
      suffix: of an encoder in a file or folder of several, '_2' of the second.

    Raises:
      UserError: a file of it is a link out of it.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
    above, name = os.path.split(os.path.abspath(folder))
    encoder = re.fullmatch(r'text_encoder(_\d+)?', name)
    suffix = (encoder[1] or '') if encoder else suffix
    if option:
        option = os.path.expanduser(option)
        there = [os.path.join(option, f'tokenizer{suffix}'), option, os.path.join(option, 'tokenizer')]
    else:
        beside = [os.path.join(above, f'tokenizer{suffix}')] if encoder else []
        there = [*beside, os.path.join(folder, f'tokenizer{suffix}'), folder]
    for one in there:
        if any(os.path.isfile(os.path.join(one, file)) for file in VOCABULARIES):
            for file in FILES:
                if os.path.lexists(os.path.join(one, file)):
                    files.check_inside(one, file)
            return one
    return ''


def read_tokenizer(texts: Texts, path: str, option: str = '', suffix: str = '', pad: int | None = None) -> Tokenizer:
    """The tokenizer of a text encoder, for texts of its length; arguments as of `tokenizer_folder`.

    Args:
      pad: number behind the end of a text, in place of what the files say.

    Raises:
      UserError: there is none, or one of more tokens than the encoder embeds.
    """
    folder = tokenizer_folder(path, option, suffix)
    if not folder:
        where = f'--tokenizer={option}' if option else path
        raise UserError(
            f'{where} holds no tokenizer, which texts are read by: name the folder of one, --tokenizer=FOLDER with '
            'vocab.json and merges.txt, tokenizer.json, or spiece.model'
        )
    made = tokenizers.from_folder(folder, texts.length)
    if made.vocabulary > texts.vocabulary:
        raise UserError(
            f'{folder}: the tokenizer has {made.vocabulary:,} tokens, and the text encoder {texts.vocabulary:,}: it is '
            'of another'
        )
    return made if pad is None else made.with_pad(pad)


def length_of(path: str, option: str = '', suffix: str = '') -> int:
    """Tokens of a text as the tokenizer of an encoder has them; 0 where it does not say, or there is none."""
    folder = tokenizer_folder(path, option, suffix)
    said = files.read_part(folder, 'tokenizer_config.json').get('model_max_length') if folder else None
    return said if is_of('a count', said) and 2 <= said <= tokenizers.LONGEST else 0


# --- config.json of what is exported


def tower_config(own: Mapping[str, Any], tower: str, features: int, activation: str) -> dict[str, Any]:
    """config.json of a tower by its fields."""
    return {
        'model_type': TOWERS[tower],
        'hidden_size': own['channels'],
        'intermediate_size': own['hidden'] or 4 * own['channels'],
        'num_hidden_layers': own['blocks'],
        'num_attention_heads': own['heads'],
        'projection_dim': features or own['channels'],
        'hidden_act': activation,
        'layer_norm_eps': 1e-5,
    }


def text_config(own: Mapping[str, Any], features: int, activation: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """config.json of a text tower."""
    last = own['vocabulary'] - 1
    # 2 stands for the largest number in a text.
    end = own['end'] if own['end'] >= 0 else 2 if tokenizer and tokenizer.end != last else last
    special = {'eos_token_id': end, 'pad_token_id': tokenizer.pad if tokenizer else end}
    sizes = {'vocab_size': own['vocabulary'], 'max_position_embeddings': own['length']}
    return {**tower_config(own, 'text', features, activation), **sizes, **special, 'bos_token_id': None}


def model_config(config: ConfigDict, size: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """config.json by which transformers builds the network of a run.

    Args:
      size: side of an image.
    """
    model = config.model.to_dict()
    if config.family == 'clip':
        shared = model['features'], model['activation']
        vision = tower_config(model['vision'], 'vision', *shared)
        return {
            'architectures': ['CLIPModel'],
            'model_type': 'clip',
            'projection_dim': model['features'],
            'text_config': text_config(model['text'], *shared, tokenizer),
            'vision_config': {**vision, 'image_size': size, 'patch_size': model['vision']['patch'], 'num_channels': 3},
        }
    own = model['network']
    if own['name'] == 't5':
        return {
            'architectures': ['T5EncoderModel'],
            'model_type': 't5',
            'vocab_size': own['vocabulary'],
            'd_model': own['channels'],
            'd_kv': own['head_channels'],
            'd_ff': own['hidden'],
            'num_layers': own['blocks'],
            'num_heads': own['heads'],
            'relative_attention_num_buckets': own['buckets'],
            'relative_attention_max_distance': own['furthest'],
            'feed_forward_proj': 'gated-gelu',
            'layer_norm_epsilon': 1e-6,
            'is_encoder_decoder': False,
            'use_cache': False,
            'tie_word_embeddings': False,
            'eos_token_id': tokenizer.end if tokenizer else 1,
            'pad_token_id': tokenizer.pad if tokenizer else 0,
        }
    shared = own['features'], own['activation']
    projected = 'WithProjection' if own['features'] else ''
    if own['name'] == 'clip':
        return {'architectures': [f'CLIPTextModel{projected}'], **text_config(own, *shared, tokenizer)}
    sides = {'image_size': size, 'patch_size': own['patch'], 'num_channels': 3}
    return {'architectures': [f'CLIPVisionModel{projected}'], **tower_config(own, 'vision', *shared), **sides}


def preprocessor_config(config: ConfigDict, size: int) -> dict[str, Any]:
    """preprocessor_config.json of a run that reads images."""
    mean, deviation = NORMALISATIONS[config.model.normalisation]
    sides = {'size': {'shortest_edge': size}, 'crop_size': {'height': size, 'width': size}}
    steps = dict.fromkeys(('do_resize', 'do_center_crop', 'do_rescale', 'do_normalize', 'do_convert_rgb'), True)
    means = {'image_mean': list(mean), 'image_std': list(deviation)}
    return {'image_processor_type': 'CLIPImageProcessor', **steps, **sides, **means, 'resample': 3}


# --- sources


def is_clip(config: ConfigDict) -> bool:
    return config.family == 'clip'


def is_text(config: ConfigDict) -> bool:
    return tower_of(config) == 'text'


def is_vision(config: ConfigDict) -> bool:
    return tower_of(config) == 'vision'


def is_t5(config: ConfigDict) -> bool:
    return config.family == 'encoder' and config.model.network.name == 't5'


# What a file has beside the weights: buffers, and in that of the whole model what is not of one tower.
BUFFERS = r'(text|vision)_model\.embeddings\.position_ids|(visual\.)?attn_mask'
BUFFERS += '|input_resolution|context_length|vocab_size'
OF_VISION = r'vision_model\..*|visual_projection\..*|visual\..*|logit_scale|logit_bias'
OF_TEXT = r'text_model\..*|text_projection(\.weight)?|(transformer|token_embedding|ln_final)\..*|positional_embedding'
OF_TEXT += '|logit_scale|logit_bias'
CLIP_NAMES, OPENCLIP_NAMES = 'CLIP of transformers', 'CLIP of OpenAI and OpenCLIP'
SOURCES = (
    *(
    source
    for fits, more in ((is_clip, ''), (is_text, f'|{OF_VISION}'), (is_vision, f'|{OF_TEXT}'))
    for source in (
        Source(
            'transformers', CLIP_NAMES, fits, clip, prepare=with_prefixes, skip=BUFFERS + more,
            fields=clip_fields('transformers'), remarks=remarks,
        ),
        Source(
            'openclip', OPENCLIP_NAMES, fits, openclip, skip=BUFFERS + more, fields=clip_fields('openclip'),
            remarks=remarks,
        ),
    )
    ),
    Source(
        'transformers', 'T5 of transformers', is_t5, t5, prepare=with_shared, skip=r'decoder\..*|lm_head\.weight',
        fields=t5_fields, remarks=remarks,
    ),
)  # fmt: skip
