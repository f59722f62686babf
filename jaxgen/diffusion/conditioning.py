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

A vector is added to the network's embedding of time; tokens join its attention; planes are concatenated to x_t. So a
class label, a pooled text embedding, an image embedding, text tokens, a low-resolution, masked or control image and a
mask are one mechanism. Parameters of an embedding lie among the network's, under the condition's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.contract import Context
from jaxgen.diffusion.processes import expanded
from jaxgen.errors import UserError
from jaxgen.networks.layers import Dense, Embed
from jaxgen.options import Component, Named, Rate, own_fields
from jaxgen.randomness import stream

Array = jax.Array
Values = dict[str, Array]  # {condition: array of the batch}
Embeddings = dict[str, Array]  # 'vector' [n, D], 'tokens' [n, T, D], 'planes' [n, H, W, C]: those that there are


class Condition(NamedTuple):
    """One condition of a network."""

    name: str  # of its array in the batch
    part: str  # 'vector' | 'tokens' | 'planes'
    module: Any  # a linen module with parameters, (array) -> embedding; None: `embed` alone
    embed: Callable  # (array or the module's output, x) -> embedding of that part
    null: Callable  # array -> the array of its shape that stands for its absence
    dropout: float  # probability that an example's is absent in training
    absent: Callable | None = None  # n -> the array of n examples without it, where its shape is known before
    optional: bool = False  # a batch without the array is one in which it is absent
    kind: str = ''  # of KINDS


Conditioning = tuple[Condition, ...]


def same(value: Array, x: Array) -> Array:
    """The value itself: an embedding that does not depend on x."""
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
    name: str, context: Context, network: Any, *, vocabulary: Annotated[int, '[0, inf)'] = 0, dropout: Rate = 0.0
) -> Condition:
    """A sequence, of integers [n, T] by a table or of vectors [n, T, d] by a linear map.

    Args:
      vocabulary: number of the integers; 0: the sequence is of vectors.
      dropout: probability that the sequence is left out in training, zeros in its place.
    """
    width = network.token_features
    module = Embed(vocabulary, width, dtype=context.dtype) if vocabulary else Dense(width, dtype=context.dtype)
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


KINDS = {'class': classes, 'embedding': embedding, 'tokens': tokens, 'image': image, 'mask': mask}
# What an array of each kind is embedded as.
PARTS = {'class': 'vector', 'embedding': 'vector', 'tokens': 'tokens', 'image': 'planes', 'mask': 'planes'}
USUAL = {'label': 'class', 'low_resolution': 'image', 'mask': 'mask', 'edges': 'image', 'masked': 'image'}
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
        kind, part = own['kind'], PARTS[own['kind']]
        if part not in network.takes or (kind == 'embedding' and not network.vector_features):
            raise UserError(
                f'config.model.conditioning.{name} of kind {kind!r} is embedded as {part}, and the network '
                f'{type(network).__name__} reads {", ".join(network.takes) or "no conditions"}'
            )
        made = KINDS[kind](name, context, network, **own_fields(own, 'kind'))
        conditions.append(made._replace(kind='words' if own.get('vocabulary') else kind))
    return tuple(conditions)


def names(conditioning: Conditioning) -> tuple[str, ...]:
    """Names of the arrays that a batch must have."""
    return tuple(condition.name for condition in conditioning)


def droppable(conditioning: Conditioning) -> tuple[str, ...]:
    """Names of the conditions that the network was trained to do without."""
    return tuple(condition.name for condition in conditioning if condition.dropout)


def values_of(conditioning: Conditioning, batch: dict[str, Array]) -> Values:
    """The conditions' arrays in a batch.

    Raises:
      UserError: the batch lacks one.
    """
    for condition in conditioning:
        if condition.name not in batch and not condition.optional:
            raise UserError(
                f'config.model.conditioning.{condition.name} needs {condition.name!r} in config.data.features'
                + ', and its side in pixels as config.data.low_resolution' * (condition.name == 'low_resolution')
            )
    n = len(next(iter(batch.values()))) if batch else 0
    return {c.name: batch[c.name] if c.name in batch else c.absent(n) for c in conditioning}


# {kind: (whether integers, least and most axes)} of an array; 'words' are tokens with a vocabulary.
ARRAYS = {
    'class': (True, 1, 1),
    'embedding': (False, 2, 2),
    'words': (True, 2, 2),
    'tokens': (False, 3, 3),
    'image': (False, 3, 9),
    'mask': (False, 3, 9),
}


def check_arrays(conditioning: Conditioning, values: Values) -> None:
    """Raises UserError where an array of the batch is none of its condition's kind."""
    for c in conditioning:
        integers, least, most = ARRAYS.get(c.kind, (None, 0, 0))
        value = values[c.name]
        if integers is not None and (
            jnp.issubdtype(value.dtype, jnp.integer) != integers or not least <= value.ndim <= most
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
    """The embeddings of all conditions: the sum of the vectors, the tokens in a row, the planes in a row.

    Args:
      params: those of the network, the embeddings' under their names.
      x: [n, ...], what the network reads beside them.
    """
    parts: dict[str, list[Array]] = {}
    for condition in conditioning:
        value = values[condition.name]
        if condition.module is not None:
            value = condition.module.apply({'params': params.get(condition.name, {})}, value)
        parts.setdefault(condition.part, []).append(condition.embed(value, x))
    joined = {'vector': sum, 'tokens': lambda v: jnp.concatenate(v, 1), 'planes': lambda v: jnp.concatenate(v, -1)}
    return {part: joined[part](embedded) for part, embedded in parts.items()}


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
            absent = jax.random.bernoulli(stream(rng, condition.name), condition.dropout, value.shape[:1])
            dropped[condition.name] = jnp.where(expanded(absent, value), condition.null(value), value)
    return dropped


def enlarged_linearly(image: Array, x: Array) -> Array:
    """An image [n, h, w, c] at the height and width (or other axes) of x, by linear interpolation."""
    return jax.image.resize(image, (*x.shape[:-1], image.shape[-1]), 'linear')


def enlarged_to_nearest(image: Array, x: Array) -> Array:
    """An image [n, h, w, c] at the height and width (or other axes) of x, by the nearest value."""
    return jax.image.resize(image, (*x.shape[:-1], image.shape[-1]), 'nearest')
