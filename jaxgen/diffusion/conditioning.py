"""Conditions of a network: arrays of the batch, each embedded, dropped in training and left out in guidance alike.

A section of `config.model.conditioning` names an array of the batch and says of what kind it is:

    conditioning=dict(label=dict(dropout=0.1), low_resolution={}, clip=dict(kind='embedding', dropout=0.1))

A kind says what the array is embedded as, and what stands for its absence:

    kind       array                     embedded as                          absent
    class      int32 [n]                 'vector' [n, D], a table's entry     the class after the last
    embedding  float32 [n, d]            'vector' [n, D], a linear map        zeros
    tokens     int32 [n, T] or           'tokens' [n, T, D], a table's        zeros
               float32 [n, T, d]         entries or a linear map
    image      float32 [n, h, w, c]      'planes' [n, H, W, c], enlarged      zeros
    mask       float32 [n, h, w, c]      'planes' [n, H, W, c], nearest       zeros
    text       what frozen stages make   'tokens' [n, T, D] and               what they make of
               of the caption            'pooled' [n, d]                      no text
    numbers    float32 [n, k]            'pooled' [n, k d], cosines, sines    themselves
    inpainting 'image' and 'mask'        'planes' [n, H, W, 1 + C]            all is missing
    image_     what a frozen stage       'tokens' [n, 1, D] or                zeros
    embedding  encodes of the image      'pooled' [n, d]
    guidance_  float32 [n]               'vector' [n, D], cosines and         themselves
    scale                                sines by two layers

A vector is added to the network's embedding of time; tokens join its attention; planes are concatenated to x_t; pooled
vectors are joined, and the network embeds them. So a class label, an image embedding, a caption, a low-resolution,
masked or control image and a mask are one mechanism. Parameters of an embedding lie among the network's, under the
condition's name.

A caption is read by text encoders, which are stages: `config.stages.text` (and any further name) is the run of a `clip`
or `t5`. A batch holds its tokens as 'text/tokens', and those of the text that stands for no caption, '' or a negative
prompt, as 'text/negative' (`contract.Captions`). What the encoders make of them is computed once for a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.augmentation import corruptions
from jaxgen.contract import NEGATIVE, Context, Frozen
from jaxgen.diffusion.processes import expanded
from jaxgen.errors import UserError
from jaxgen.networks.clip import TextOutput
from jaxgen.networks.conditions import ScaleEmbedding, TextMaps
from jaxgen.networks.latent_unet import embedded_numbers
from jaxgen.networks.layers import Dense, Embed
from jaxgen.options import Component, Named, OneOf, Rate, Rule, own_fields
from jaxgen.randomness import stream

Array = jax.Array
DISTILLED = 'distilled_guidance'  # in a batch, [n]: the scale of guidance that a distilled network reads
Values = dict[str, Any]  # {condition: array of the batch, or a tree of arrays that frozen stages make of it}
Embeddings = dict[
    str, Any
]  # 'vector' [n, D], 'tokens' [n, T, D], 'pooled' [n, d], 'planes' [n, H, W, C], and 'control',
# see diffusion/control.py: those that there are


class Condition(NamedTuple):
    """One condition of a network."""

    name: str  # of its array in the batch
    part: str  # 'vector' | 'tokens' | 'pooled' | 'planes' | 'guidance'; '': several, `embed` gives a dict of them
    module: Any  # a linen module with parameters, (array) -> embedding; None: `embed` alone
    embed: Callable  # (array or the module's output, x) -> embedding of that part
    null: Callable  # array -> the array of its shape that stands for its absence
    dropout: float  # probability that an example's is absent in training
    absent: Callable | None = None  # n -> the array of n examples without it, where its shape is known before
    optional: bool = False  # a batch without the array is one in which it is absent
    kind: str = ''  # of KINDS
    compute: Callable | None = None  # (frozen, batch, train) -> value; None: the array of its name in the batch
    prepare: Callable | None = None  # (frozen, batch) -> {name: array} of the stages, that a batch may hold before
    draw: Callable | None = None  # (keys [n]) -> {name: array} that training reads where the batch does not hold them
    left_out: bool = False  # guidance leaves it out although training never does
    divisible: bool = False  # sequences of texts that may be read in parts, see contract.Captions.chunks


Conditioning = tuple[Condition, ...]


def same(value: Array, x: Array) -> Array:
    """The value itself: an embedding that does not depend on x."""
    return value


def same_value(value: Any) -> Any:
    """The value itself, of which there is no absence."""
    return value


def classes(name: str, context: Context, network: Any, *, dropout: Rate = 0.0) -> Condition:
    """A class label, by the network's own embedding of classes.

    Args:
      dropout: probability that the label is left out in training; above 0 guidance can be used, and the network has one
        class more, which stands for no label.
    """
    if not context.classes:
        raise UserError(
            f'config.model.conditioning.{name} needs labels: take a data set with classes, with {name!r} in '
            'config.data.features'
        )
    module = network.class_embedding(context.classes + bool(dropout))

    def null(label: Array) -> Array:
        return jnp.full_like(label, context.classes)

    def absent(n: int) -> Array:
        return jnp.full(n, context.classes, jnp.int32)

    return Condition(name, 'vector', module, same, null, dropout, absent if dropout else None)


def embedding(name: str, context: Context, network: Any, *, dropout: Rate = 0.0) -> Condition:
    """A vector [n, d], such as a pooled text or image embedding, by a linear map.

    Args:
      dropout: probability that the vector is left out in training, zeros in its place.
    """
    module = Dense(network.vector_features, bias=False, dtype=context.dtype)
    return Condition(name, 'vector', module, same, jnp.zeros_like, dropout)


def tokens(
    name: str,
    context: Context,
    network: Any,
    *,
    vocabulary: Annotated[int, '[0, inf)'] = 0,
    features: Annotated[int, '[0, inf)'] = 0,
    dropout: Rate = 0.0,
) -> Condition:
    """A sequence, of integers [n, T] by a table or of vectors [n, T, d] by a linear map.

    Args:
      vocabulary: number of the integers; 0: the sequence is of vectors.
      features: width of a token, for networks that read tokens of any; 0: the width that the network has, or that of
        the vectors.
      dropout: probability that the sequence is left out in training, zeros in its place.
    """
    width = getattr(network, 'token_features', 0) or features
    if vocabulary and not width:
        raise UserError(
            f'config.model.conditioning.{name}.features: {type(network).__name__} reads tokens of any width: name one'
        )
    if vocabulary:
        module = Embed(vocabulary, width, dtype=context.dtype)
    else:
        module = Dense(width, dtype=context.dtype) if width else None
    return Condition(name, 'tokens', module, same, jnp.zeros_like, dropout)


def image(name: str, context: Context, network: Any, *, dropout: Rate = 0.0) -> Condition:
    """An image [n, h, w, c] of any smaller size, enlarged by linear interpolation and concatenated to x_t: the
    low-resolution image of ADM's upsamplers (Dhariwal & Nichol 2021, section 5.3) and of cascades, a masked image.

    Args:
      dropout: probability that the image is left out in training, zeros in its place.
    """
    return Condition(name, 'planes', None, enlarged_linearly, jnp.zeros_like, dropout)


def mask(name: str, context: Context, network: Any, *, dropout: Rate = 0.0) -> Condition:
    """A mask [n, h, w, c], brought to the size of x_t by the nearest value and concatenated to it.

    Args:
      dropout: probability that the mask is left out in training, zeros in its place.
    """
    return Condition(name, 'planes', None, enlarged_to_nearest, jnp.zeros_like, dropout)


def at_size(values: tuple[float, ...], context: Context) -> tuple[float, ...]:
    """Numbers of `numbers` with the height and width of the samples in place of those of the training images."""
    trained, made = list(context.trained[:2]), list(values)
    for i in (0, 4):
        if trained and made[i : i + 2] == trained:
            made[i : i + 2] = map(float, context.image[:2])
    return tuple(made)


def numbers(
    name: str,
    context: Context,
    network: Any,
    *,
    values: tuple[float, ...] = (1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0),
    absent: tuple[float, ...] = (),
    features: Annotated[int, '[2, inf)', Rule(lambda n: n % 2 == 0, 'an even number')] = 256,
    dropout: Rate = 0.0,
) -> Condition:
    """Numbers [n, k] by cosines and sines: SDXL's sizes and crop (Podell et al. 2023, section 2.2).

    Args:
      values: where the batch holds none: original height and width, top and left of the crop, target height and width.
        Sizes that are those of the training images are those of the samples where these are larger or smaller.
      absent: that stand for their absence in guidance; (): themselves.
      features: of the embedding of each number.
      dropout: probability that `absent` is taken in training.
    """
    if absent and len(absent) != len(values):
        raise UserError(
            f'config.model.conditioning.{name}.absent must have the {len(values)} numbers of values; it has '
            f'{len(absent)}'
        )
    values, absent = (at_size(given, context) for given in (values, absent))

    def null(value: Array) -> Array:
        return jnp.broadcast_to(jnp.asarray(absent, value.dtype), value.shape) if absent else value

    def usual(n: int) -> Array:
        return jnp.broadcast_to(jnp.asarray(values, jnp.float32), (n, len(values)))

    def embed(value: Array, x: Array) -> Array:
        return embedded_numbers(value, features)

    return Condition(name, 'pooled', None, embed, null, dropout, usual, optional=True)


def guidance_scale(name: str, context: Context, network: Any) -> Condition:
    """The scale of guidance [n] that a distilled network reads (Meng et al. 2022, arXiv 2210.03142): in training drawn,
    see diffusion/distillation.py, or 1; in sampling `guidance.distilled`."""
    module = ScaleEmbedding(network.vector_features, dtype=context.dtype)
    return Condition(name, 'vector', module, same, same_value, 0.0, jnp.ones, optional=True)


def inpainting(
    name: str,
    context: Context,
    network: Any,
    *,
    masks: Annotated[str, OneOf('strokes', 'square', 'both')] = 'both',
    brush: Annotated[tuple[float, float], '(0, 1]', Rule(lambda b: b[0] <= b[1], 'the least and the largest width')] = (
        0.05,
        0.16,
    ),
    hole: Annotated[float, '(0, 1]'] = 0.5,
    whole: Rate = 0.25,
) -> Condition:
    """What is known of an image under a mask: the mask, 1 where something is missing, and x_0 of the image with grey in
    its hole (Stable Diffusion's inpainting model; Rombach et al. 2021, section 4.5). Masks are 'mask' of the batch, in
    sampling a person's; without one all is missing. See diffusion/editing.py.

    Args:
      masks: that training draws where the data have none: 'strokes' of a brush, a 'square' or 'both'.
      brush: least and largest width of the brush, of the shorter side of the image.
      hole: side of the square, of the shorter side of the image.
      whole: probability that all is missing.
    """
    size = context.image[:2]
    least = min(size)

    def draw(keys: Array) -> dict[str, Array]:
        names = ('strokes', 'square', 'whole')
        k = dict(zip(names, jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0), strict=True))
        mask = jnp.zeros((len(keys), *size, 1), bool)
        if masks != 'square':
            mask |= corruptions.strokes(k['strokes'], size, (brush[0] * least, brush[1] * least))
        if masks != 'strokes':
            mask |= corruptions.holes(k['square'], size, max(round(hole * least), 1))
        everything = jax.vmap(lambda key: jax.random.bernoulli(key, whole))(k['whole'])
        return {'mask': jnp.where(expanded(everything, mask) | mask, 1.0, -1.0)}

    return Condition(name, 'planes', None, same, same_value, 0.0, optional=True, draw=draw)


def image_embedding(
    name: str,
    context: Context,
    network: Any,
    *,
    encoder: str = 'clip',
    part: Annotated[str, OneOf('tokens', 'pooled')] = 'tokens',
    scale: Annotated[float, '(0, inf)'] = 1.0,
    dropout: Rate = 0.0,
) -> Condition:
    """What a frozen stage encodes of an image, such as CLIP's embedding, of length 1: training is on the embedding of
    the training image itself, and samples are variations of a person's (unCLIP, Ramesh et al. 2022, arXiv 2204.06125).

    Args:
      encoder: stage that encodes images of its own size, to which these are brought.
      part: it is one of the 'tokens', or joins the 'pooled' vectors.
      scale: that it is multiplied with; the square root of its width brings its entries to the size of those of tokens.
      dropout: probability that it is left out in training, zeros in its place.
    """
    stage, where = context.stages.get(encoder), f'config.model.conditioning.{name}'
    if stage is None or stage.encode is None or stage.latents.grids:
        raise UserError(f'{where} needs config.stages.{encoder}, a run that encodes images as vectors, such as a clip')
    key, encode = f'{encoder}/{name}', stage.encode

    def prepare(frozen: Frozen, batch: dict[str, Array]) -> dict[str, Array]:
        z = encode(*frozen[encoder], {'image': fitted(batch[name], stage.image)}, jax.random.key(0))
        return {key: z.reshape(len(z), -1)}

    def compute(frozen: Frozen, batch: dict[str, Array], train: bool) -> Array:
        return batch[key] if key in batch else prepare(frozen, batch)[key]

    def embed(value: Array, x: Array) -> Array:
        value = value if scale == 1 else scale * value
        return value[:, None] if part == 'tokens' else value

    to = part if part == 'tokens' or 'pooled' in network.takes else 'vector'
    width = {'tokens': getattr(network, 'token_features', 0), 'vector': network.vector_features}.get(to, 0)
    module = Dense(width, dtype=context.dtype) if width else None
    return Condition(name, to, module, embed, jnp.zeros_like, dropout, compute=compute, prepare=prepare)


def fitted(image: Array, shape: tuple[int, ...]) -> Array:
    """Images [n, H, W, C] in [-1, 1] as [n, *shape], by bicubic interpolation; grey ones in all channels."""
    height, width, channels = shape
    if image.shape[1:3] != (height, width):
        image = jnp.clip(jax.image.resize(image, (len(image), height, width, image.shape[-1]), 'cubic'), -1, 1)
    return jnp.broadcast_to(image, (*image.shape[:3], channels))


def drawn(conditioning: Conditioning, keys: Callable, batch: dict[str, Array]) -> dict[str, Array]:
    """A batch with the arrays that training draws and that it does not hold.

    Args:
      keys: () -> keys [n].
    """
    made = {name: x for c in conditioning if c.draw for name, x in c.draw(keys()).items()}
    return {**made, **batch}


def outputs_of(text: str) -> list[tuple[str, str]]:
    """[(stage, output)] of 'STAGE/OUTPUT+STAGE/OUTPUT'.

    Raises:
      ValueError: it has another form.
    """
    pairs = [tuple(one.split('/')) for one in text.split('+')]
    if not all(len(pair) == 2 and pair[0] and pair[1] in TextOutput._fields for pair in pairs):
        raise ValueError(text)
    return pairs


def check_outputs(where: str, texts: tuple[str, ...], context: Context) -> list[list[tuple[str, str]]]:
    """The outputs of text encoders that the fields of a text name.

    Raises:
      UserError: none of this form, or of no stage that reads texts.
    """
    try:
        every = [outputs_of(text) for text in texts]
    except ValueError as e:
        raise UserError(
            f"{where}: write STAGE/OUTPUT, like 'text/last', or two of them with '+', OUTPUT one of "
            f'{", ".join(TextOutput._fields)}; it is {str(e)!r}'
        ) from None
    for stage in dict.fromkeys(stage for row in every for stage, _ in row):
        family = context.stages.get(stage)
        if family is None or family.encode_text is None:
            raise UserError(f'{where} needs config.stages.{stage}, the run of a text encoder: clip or t5')
    return every


def weighted(outputs: dict[str, Array], batch: dict[str, Array], name: str) -> dict[str, Array]:
    """Outputs {'STAGE/OUTPUT': [n, ...]} of text encoders, of which sequences [n, T, D] are multiplied by the weights
    of their tokens, 'STAGE/NAME' of the batch, where it holds them, and brought back to their mean."""

    def one(path: str, z: Array) -> Array:
        weights = batch.get(f'{path.partition("/")[0]}/{name}')
        if weights is None or z.ndim != 3:
            return z
        changed = z * weights[..., None].astype(z.dtype)
        return changed * (z.mean((1, 2), keepdims=True) / changed.mean((1, 2), keepdims=True))

    return {path: one(path, z) if '/' in path else z for path, z in outputs.items()}


def in_parts(family: Any, frozen: tuple, tokens: Array) -> TextOutput:
    """What a text encoder makes of texts [n, k * length]: of each of the k parts by itself, sequences one behind the
    other, and of vectors those of the first part."""
    n, length = len(tokens), family.texts.length
    parts = tokens.shape[1] // length if length else 1
    if parts <= 1:
        return family.encode_text(*frozen, tokens)
    made = family.encode_text(*frozen, tokens.reshape(n * parts, length))

    def joined(x: Array | None) -> Array | None:
        if x is None:
            return None
        x = x.reshape(n, parts, *x.shape[1:])
        return x.reshape(n, -1, x.shape[-1]) if x.ndim == 4 else x[:, 0]

    return TextOutput(*map(joined, made))


def in_a_row(arrays: list[Array]) -> Array:
    """Sequences [n, T, D] one behind the other, the narrower ones filled up with zeros."""
    widest = max(x.shape[-1] for x in arrays)
    return jnp.concatenate([jnp.pad(x, ((0, 0), (0, 0), (0, widest - x.shape[-1]))) for x in arrays], 1)


def text(
    name: str,
    context: Context,
    network: Any,
    *,
    tokens: tuple[str, ...] = ('text/last',),
    pooled: tuple[str, ...] = (),
    empty: Annotated[str, OneOf('encoded', 'zeros')] = 'encoded',
    dropout: Rate = 0.0,
) -> Condition:
    """A caption, as the text encoders of `config.stages` read it: outputs of `networks.clip.TextOutput`.

    Stable Diffusion 1 reads 'text/last', 2 'text/before_normalised', SDXL 'text/before+text_2/before' with the pooled
    'text_2/embedding', SD 3 'text/before+text_2/before' and behind them 'text_3/last' with the pooled 'text/embedding',
    'text_2/embedding', FLUX 'text_2/last' with the pooled 'text/pooled'.

    Args:
      tokens: sequences 'STAGE/OUTPUT', one behind the other; 'A+B': those of two encoders side by side, with a narrower
        one filled up with zeros.
      pooled: vectors 'STAGE/OUTPUT', side by side.
      empty: what stands for no caption where there is no negative prompt: '' 'encoded', or 'zeros' (SDXL).
      dropout: probability that the caption is left out in training.
    """
    where = f'config.model.conditioning.{name}'
    rows = check_outputs(f'{where}.tokens', tokens, context)
    vectors = check_outputs(f'{where}.pooled', pooled, context)
    parts = {'tokens': rows, 'pooled': vectors}
    if not (rows or vectors):
        raise UserError(f'{where}: tokens and pooled are both empty: name an output of a text encoder')
    read = sorted({pair for part in parts.values() for row in part for pair in row})
    stages = sorted({stage for stage, _ in read})

    def encode(frozen: Frozen, tokens: dict[str, Array]) -> dict[str, Array]:
        made = {stage: in_parts(context.stages[stage], frozen[stage], tokens[stage]) for stage in stages}
        return {f'{stage}/{output}': getattr(made[stage], output) for stage, output in read}

    def prepare(frozen: Frozen, batch: dict[str, Array]) -> dict[str, Array]:
        return encode(frozen, {stage: batch[f'{stage}/tokens'] for stage in stages})

    def joined(outputs: dict[str, Array]) -> dict[str, Array]:
        made = {
            part: [side_by_side([outputs['/'.join(pair)] for pair in row]) for row in parts[part]] for part in parts
        }
        return {part: JOINED[part](arrays) for part, arrays in made.items() if arrays}

    def compute(frozen: Frozen, batch: dict[str, Array], train: bool) -> dict[str, Any]:
        there = all('/'.join(pair) in batch for pair in read)
        outputs = batch if there else prepare(frozen, batch)
        value = joined(weighted(outputs, batch, 'weights'))
        # In training no text has a negative prompt, so that one example's is that of all.
        negative = {stage: batch[f'{stage}/negative'] for stage in stages}
        without = encode(frozen, {stage: x[:1] if train else x for stage, x in negative.items()})
        absent = joined(weighted(without, batch, 'negative_weights'))
        if empty == 'zeros':
            given = batch[NEGATIVE][: 1 if train else None]
            absent = {part: jnp.where(expanded(given, x), x, 0) for part, x in absent.items()}
        absent = {part: jnp.broadcast_to(absent[part], x.shape) for part, x in value.items()}
        return value | {'absent': absent}

    def null(value: dict[str, Any]) -> dict[str, Any]:
        return value['absent'] | {'absent': value['absent']}

    has_pooled = 'pooled' in network.takes
    widths = {'tokens': getattr(network, 'token_features', 0), 'pooled': 0 if has_pooled else network.vector_features}
    module = TextMaps(widths, context.dtype) if any(widths[part] for part in parts if parts[part]) else None

    def embed(value: dict[str, Any], x: Array) -> dict[str, Array]:
        names = {'tokens': 'tokens', 'pooled': 'pooled' if has_pooled else 'vector'}
        return {names[part]: array for part, array in value.items() if part != 'absent'}

    divisible = any(context.stages[stage].texts.divisible for row in rows for stage, _ in row)
    return Condition(name, '', module, embed, null, dropout, compute=compute, prepare=prepare, divisible=divisible)


KINDS = {
    'class': classes,
    'embedding': embedding,
    'tokens': tokens,
    'image': image,
    'mask': mask,
    'text': text,
    'numbers': numbers,
    'inpainting': inpainting,
    'image_embedding': image_embedding,
    'guidance_scale': guidance_scale,
}
# What an array of each kind is embedded as; for texts see `parts_of`.
PARTS = {
    'class': 'vector',
    'embedding': 'vector',
    'tokens': 'tokens',
    'image': 'planes',
    'mask': 'planes',
    'numbers': 'pooled',
    'inpainting': 'planes',
    'guidance_scale': 'vector',
}
USUAL = {
    'label': 'class',
    'low_resolution': 'image',
    'mask': 'mask',
    'edges': 'image',
    'masked': 'image',
    'caption': 'text',
    'sizes': 'numbers',
    'inpainting': 'inpainting',
    DISTILLED: 'guidance_scale',
}
NAMED = Named(Component(KINDS, key='kind'), USUAL)


def make(section: dict[str, dict], context: Context, network: Any) -> Conditioning:
    """The conditions of a complete section {name: {'kind': ..., its fields}}.

    Args:
      network: a module of `networks.denoisers`, whose `takes` are the parts that it reads.

    Raises:
      UserError: no labels, or a part that the network does not read.
    """
    conditions = []
    for name, own in section.items():
        kind = own['kind']
        for part in parts_of(own, network):
            if part not in network.takes or (kind in ('embedding', 'guidance_scale') and not network.vector_features):
                raise UserError(
                    f'config.model.conditioning.{name} of kind {kind!r} is embedded as {part}, and the network '
                    f'{type(network).__name__} reads {", ".join(network.takes) or "no conditions"}'
                )
        made = KINDS[kind](name, context, network, **own_fields(own, 'kind'))
        conditions.append(made._replace(kind='words' if own.get('vocabulary') else kind))
    return tuple(conditions)


def parts_of(own: dict, network: Any) -> tuple[str, ...]:
    """The parts of a network that a condition's complete section is embedded as."""
    if own['kind'] == 'image_embedding':
        return (own['part'] if own['part'] == 'tokens' or 'pooled' in network.takes else 'vector',)
    if own['kind'] != 'text':
        return (PARTS[own['kind']],)
    pooled = 'pooled' if 'pooled' in network.takes else 'vector'
    return ('tokens',) * bool(own['tokens']) + (pooled,) * bool(own['pooled'])


def reads_text(conditioning: Conditioning) -> bool:
    """Whether text encoders read the captions."""
    return any(condition.kind == 'text' for condition in conditioning)


def prepare(conditioning: Conditioning) -> Callable | None:
    """(frozen, batch) -> {name: [n, ...]}, what frozen stages make of the conditions; None: nothing."""
    every = [condition.prepare for condition in conditioning if condition.prepare]

    def prepared(frozen: Frozen, batch: dict[str, Array]) -> dict[str, Array]:
        return {name: x for one in every for name, x in one(frozen, batch).items()}

    return prepared if every else None


def names(conditioning: Conditioning) -> tuple[str, ...]:
    """Names of the arrays that a batch must have."""
    return tuple(condition.name for condition in conditioning)


def droppable(conditioning: Conditioning) -> tuple[str, ...]:
    """Names of the conditions that the network was trained to do without, or does without untrained."""
    return tuple(condition.name for condition in conditioning if condition.dropout or condition.left_out)


def values_of(
    conditioning: Conditioning, batch: dict[str, Array], frozen: Frozen | None = None, train: bool = False
) -> Values:
    """The conditions' values: arrays of a batch, or what frozen stages make of them.

    Args:
      frozen: the stages' weights, where a condition reads some.
      train: the batch is of training: no negative prompts.

    Raises:
      UserError: the batch lacks one.
    """
    for condition in conditioning:
        if condition.name not in batch and not condition.optional and condition.compute is None:
            raise UserError(
                f'config.model.conditioning.{condition.name} needs {condition.name!r} in config.data.features'
                + ', and its side in pixels as config.data.low_resolution' * (condition.name == 'low_resolution')
            )
    n = len(next(iter(batch.values()))) if batch else 0

    def value(c: Condition) -> Any:
        if c.compute is not None:
            return c.compute(frozen, batch, train)
        return batch[c.name] if c.name in batch else c.absent(n)

    return {c.name: value(c) for c in conditioning}


# {kind: (whether integers, least and most axes)} of an array; 'words' are tokens with a vocabulary.
ARRAYS = {
    'class': (True, 1, 1),
    'embedding': (False, 2, 2),
    'words': (True, 2, 2),
    'tokens': (False, 3, 3),
    'image': (False, 3, 9),
    'mask': (False, 3, 9),
    'numbers': (False, 2, 2),
    'guidance_scale': (False, 1, 1),
}


def check_arrays(conditioning: Conditioning, values: Values) -> None:
    """Raises UserError where an array of the batch is none of its condition's kind."""
    for c in conditioning:
        integers, least, most = ARRAYS.get(c.kind, (None, 0, 0))
        value = values[c.name]
        if (
            integers is not None
            and c.compute is None
            and (jnp.issubdtype(value.dtype, jnp.integer) != integers or not least <= value.ndim <= most)
        ):
            kind = "tokens' with a vocabulary" if c.kind == 'words' else f"{c.kind}'"
            raise UserError(
                f"config.model.conditioning.{c.name} of kind '{kind} is no {value.dtype} array of {value.ndim} axes, "
                'which the batch has'
            )


def init(conditioning: Conditioning, rng: Array, values: Values) -> dict[str, Any]:
    """{condition: parameters of its embedding}, of those that have some."""
    check_arrays(conditioning, values)
    return {
        c.name: c.module.init(stream(rng, c.name), values[c.name])['params']
        for c in conditioning
        if c.module is not None and jax.tree.leaves(jax.eval_shape(c.module.init, rng, values[c.name]))
    }


def embed(conditioning: Conditioning, params: dict[str, Any], values: Values, x: Array) -> Embeddings:
    """The embeddings of all conditions: the sum of the vectors, the tokens in a row, pooled vectors and planes side by
    side.

    Args:
      params: those of the network, the embeddings' under their names.
      x: [n, ...], what the network reads beside them.
    """
    parts: dict[str, list[Array]] = {}
    for condition in conditioning:
        value = values[condition.name]
        if condition.module is not None:
            value = condition.module.apply({'params': params.get(condition.name, {})}, value)
        embedded = condition.embed(value, x)
        for part, one in ({condition.part: embedded} if condition.part else embedded).items():
            parts.setdefault(part, []).append(one)
    return {part: JOINED[part](embedded) for part, embedded in parts.items()}


def side_by_side(arrays: list[Array]) -> Array:
    """Arrays [n, ..., D] as one [n, ..., sum of D]."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, -1)


# How the embeddings of several conditions are one.
JOINED: dict[str, Callable] = {
    'vector': sum,
    'tokens': in_a_row,
    'pooled': side_by_side,
    'planes': side_by_side,
    'guidance': sum,
    'control': lambda nets: {name: value for net in nets for name, value in net.items()},
}


def without(conditioning: Conditioning, values: Values, *absent: str) -> Values:
    """The values with the `absent` conditions replaced by what stands for their absence."""
    null = {condition.name: condition.null for condition in conditioning}
    return {name: null[name](value) if name in absent else value for name, value in values.items()}


def drop(conditioning: Conditioning, rng: Array, values: Values) -> Values:
    """The values with each condition absent in some examples, by its own probability, independently."""
    dropped = dict(values)
    for condition in conditioning:
        if condition.dropout:
            value = values[condition.name]
            n = jax.tree.leaves(value)[0].shape[:1]
            absent = jax.random.bernoulli(stream(rng, condition.name), condition.dropout, n)
            dropped[condition.name] = jax.tree.map(
                lambda null, x, absent=absent: jnp.where(expanded(absent, x), null, x), condition.null(value), value
            )
    return dropped


def enlarged_linearly(image: Array, x: Array) -> Array:
    """An image [n, h, w, c] at the height and width (or other axes) of x, by linear interpolation."""
    return jax.image.resize(image, (*x.shape[:-1], image.shape[-1]), 'linear')


def enlarged_to_nearest(image: Array, x: Array) -> Array:
    """An image [n, h, w, c] at the height and width (or other axes) of x, by the nearest value."""
    return jax.image.resize(image, (*x.shape[:-1], image.shape[-1]), 'nearest')
