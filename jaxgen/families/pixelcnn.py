"""PixelCNNs: an image, or a grid of codes, one value after another (van den Oord et al. 2016, arXiv 1601.06759).

    p(x) = prod_i p(x_i | x_1, ..., x_{i-1}),                                                             (eq. 1)

row by row, and within a pixel colour by colour (eq. 2). A causal network computes all these conditional distributions,
softmaxes over the values, in one pass, and training maximises log p(x), which is exact. `networks/pixelcnn.py` has the
networks.

Sampling takes a step for each pixel. What layers computed for earlier pixels is cached ('cached', see
`networks/masked.py`), so that a step costs one pixel's work; 'plain' computes the whole image for each pixel. Both
draw the same samples from the same seed, up to rounding.

With `config.stages.first`, a run that encodes images as grids of codes (a VQ-VAE), the model is the prior of these
codes: one network for each grid, params 'level0', 'level1', ..., coarse ones first, each conditioned on all coarser
grids (VQ-VAE-2, Razavi et al. 2019, arXiv 1906.00446). Then metrics are of codes, and no likelihood of the images.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import options, stages
from jaxgen.checks import check_labels
from jaxgen.contract import Aux, Context, Family, by_settings, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.losses import likelihoods
from jaxgen.networks.masked import SAMPLERS, with_cache
from jaxgen.networks.pixelcnn import NETWORKS, ConditioningStack, GridModel
from jaxgen.options import TRACED, Component, Count, OneOf, Positive, Section, own_fields
from jaxgen.randomness import example_keys

Array = jax.Array
Values = tuple[Array, ...]  # int32 [n, h, w, colours] of each grid, coarse ones first

# Attributes of the networks that the data and the shared machinery decide.
NETWORK = Component(NETWORKS, omit=('colours', 'levels', 'classes', 'dtype', 'remat'))


def former(model: dict) -> dict:
    """config.model of a run saved when every network had a section of its own, `network` naming the one in use."""
    name = model.get('network')
    if not isinstance(name, str):
        return model
    rest = {key: value for key, value in model.items() if key not in NETWORKS}
    return {**rest, 'network': {'name': name, **model.get(name, {})}}


class Grids(NamedTuple):
    """The networks of the grids of integers that are modelled, coarse ones first; each tuple has one entry a grid."""

    names: tuple[str, ...]  # in State.params
    modules: tuple[GridModel, ...]
    sizes: tuple[tuple[int, int], ...]  # (rows, columns)
    colours: int  # integers of one position

    @property
    def dims(self) -> int:
        """Integers of one example."""
        return self.colours * sum(math.prod(size) for size in self.sizes)


def quantised(image: Array, levels: int) -> Array:
    """Images in [-1, 1] as integers from 0 to levels - 1, int32."""
    return jnp.round((image + 1) * 127.5).astype(jnp.int32) * levels // 256


def negative_log_likelihoods(grids: Grids, params, values: Values, label: Array | None, rng=None) -> list[Array]:
    """-log p(grid | coarser grids, label) of each grid, [n] nats each.

    Args:
      params: {name: weights} of the grids' networks.
      label: int32 [n], or None.
      rng: a key of dropout in training; None: not in training.
    """
    out = []
    for i, (name, module) in enumerate(zip(grids.names, grids.modules, strict=True)):
        rngs = None if rng is None else {'dropout': jax.random.fold_in(rng, i)}
        logits = module.apply(
            {'params': params[name]}, values[i], label, codes_of(values[:i]), rng is not None, rngs=rngs
        )
        out.append(-likelihoods.categorical(logits, values[i]))
    return out


def codes_of(values: Values) -> tuple[Array, ...]:
    """Grids of codes, int32 [n, h, w] each."""
    return tuple(v[..., 0] for v in values)


def sample_grid(
    module: GridModel, weights, keys: Array, size: tuple[int, int], label, coarser, temperature: float, sampler: str
) -> Array:
    """Samples of one grid, int32 [n, h, w, colours].

    Args:
      keys: [n], one for each example.
      label, coarser: what it is conditioned on, see `GridModel.condition`.
      temperature: logits are divided by it.
      sampler: one of SAMPLERS.
    """
    colours, params = module.network.colours, {'params': weights}
    condition = module.apply(params, label, coarser, method=GridModel.condition)

    def apply(variables, x, position, **options):
        return module.apply(variables, x, condition, position, method=GridModel.logits, **options)

    def draw(logits, pixel, colour, old):
        """The value of one colour of a pixel, by its own key, from logits [n, colours, levels]."""
        own = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, pixel), colour))(keys)
        values = jax.vmap(jax.random.categorical)(own, logits[:, colour] / temperature)
        new = old.at[:, colour].set(values.astype(jnp.int32))
        embedded = module.apply(params, new, method=GridModel.embedded)
        if not module.vocabulary:  # colours still to come: no output depends on them, but both samplers have zeros
            embedded = jnp.where(jnp.arange(colours) <= colour, embedded, 0)
        return new, embedded

    features = module.embedding if module.vocabulary else colours
    return SAMPLERS[sampler](
        with_cache(apply, params),
        draw,
        (len(keys), *size, features),
        colours,
        passes=colours,
        margin=module.network.margin,
        rows=module.network.rows,
    )


def sample_grids(grids: Grids, params, keys: Array, label: Array | None, temperature: float, sampler: str) -> Values:
    """Samples of all grids, each conditioned on the coarser ones; for the arguments see `sample_grid`."""
    values: Values = ()
    for i, (name, module, size) in enumerate(zip(grids.names, grids.modules, grids.sizes, strict=True)):
        own = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)  # noqa: B023
        values += (sample_grid(module, params[name], own, size, label, codes_of(values), temperature, sampler),)
    return values


def check(network: dict, first: Family | None, colours: int) -> None:
    """Raises UserError for a network that cannot model so many colours, or a first stage without suitable codes."""
    for name in ('channels', 'head'):
        if network.get(name, colours) < colours:
            raise UserError(f'config.model.network.{name} must be {colours} or more; it is {network[name]}')
    if network['name'] == 'snail':
        if colours > 1:
            raise UserError(
                "config.model.network.name = 'snail' is for one value per pixel, grey images or codes: take 'gated', "
                'or the family pixelcnn_pp, for colours'
            )
        if network['heads'] and network['channels'] % network['heads']:
            raise UserError(
                f'config.model.network.channels = {network["channels"]} must be a multiple of '
                f'config.model.network.heads = {network["heads"]}'
            )
    if first is None:
        return
    if not (first.latents.grids and first.latents.vocabulary):
        raise UserError('config.stages.first must be a run that makes codes, of a VQ-VAE say: this one makes none')
    for i, (coarse, fine) in enumerate(itertools.pairwise(first.latents.grids)):
        if any(b % a for a, b in zip(coarse, fine, strict=True)):
            raise UserError(f'config.stages.first: grid {i + 1} of codes, {fine}, is no multiple of grid {i}, {coarse}')


@options.checked
def build(
    context: Context,
    *,
    network: Annotated[Section, NETWORK] = 'gated',
    levels: Annotated[int, '[2, 256]'] = 256,
    conditional: bool = False,
    embedding: Count = 64,
    coarser_blocks: Annotated[int, '[0, inf)'] = 2,
    temperature: Annotated[Positive, TRACED] = 1.0,
    sampler: Annotated[str, OneOf(*SAMPLERS)] = 'cached',
) -> Family:
    """PixelCNN.

    Args:
      network: of networks/pixelcnn.py. With several grids of codes 'snail' has attention for the coarsest alone: the
        finer ones are long, and conditioned on what lies far away.
      levels: quantisation levels of an image's values. With 256 the likelihood is of the data as they are, and can be
        compared.
      conditional: condition on the class, `batch['label']`.
      embedding: length of the vector that a code is embedded as.
      coarser_blocks: residual blocks of the stack through which a grid of codes is conditioned on coarser ones.
      temperature: that logits are divided by in sampling; 1: as learned, less: the likelier values.
      sampler: 'cached' | 'plain', see above.

    evaluate gives per image 'nll', in nats, exact; 'bits_per_dim' with 256 levels. Of codes: 'nll', 'nll/level0', ...
    of each grid, and 'bits_per_code'.

    Raises:
      UserError: a value out of range, no labels, a first stage without codes.
    """
    first = context.stages.get('first')
    colours = 1 if first else context.image[2]
    check_labels(context, conditional)
    check(network, first, colours)
    sizes = first.latents.grids if first else (context.image[:2],)
    vocabulary = first.latents.vocabulary if first else 0

    def grid_model(i: int, size: tuple[int, int]) -> GridModel:
        own = own_fields(network) | ({'heads': 0} if 'heads' in network and i else {})
        module = NETWORKS[network['name']](
            **own,
            colours=colours,
            levels=vocabulary or levels,
            classes=context.classes if conditional else 0,
            dtype=context.dtype,
            remat=context.remat,
        )
        coarser = ConditioningStack(size, vocabulary, own['channels'], coarser_blocks, context.dtype) if i else None
        return GridModel(module, vocabulary, embedding, coarser)

    names = tuple(f'level{i}' for i in range(len(sizes))) if first else ('pixelcnn',)
    grids = Grids(names, tuple(grid_model(i, size) for i, size in enumerate(sizes)), sizes, colours)

    encoder = stages.encoder(first, 'first') if first else None

    def to_values(frozen, batch, rng) -> Values:
        if encoder is None:
            return (quantised(batch['image'], levels),)
        return tuple(codes[..., None] for codes in encoder.encode(frozen, batch, rng))

    def loss(params, state, frozen, batch, rng):
        rng_first, rng_dropout = jax.random.split(rng)
        values = to_values(frozen, batch, rng_first)
        nlls = negative_log_likelihoods(grids, params, values, batch.get('label'), rng_dropout)
        bits = [nll.mean() / math.log(2) for nll in nlls]
        total = sum(bits) / grids.dims
        logs = {f'bits/{name}': b / math.prod(size) for name, b, size in zip(names, bits, sizes, strict=True)}
        return total, Aux({'loss': total, **(logs if len(names) > 1 else {})})

    def init(rng, batch, frozen):
        shapes = [v.shape[1:] for v in jax.eval_shape(to_values, frozen, batch, rng)]
        if tuple(shape[:2] for shape in shapes) != tuple(map(tuple, sizes)):
            made = tuple(shape[:2] for shape in shapes)
            raise UserError(f'config.stages.first was trained on other images: its codes would be {made}, not {sizes}')
        label = jnp.zeros(1, jnp.int32) if conditional else None
        blank = tuple(jnp.zeros((1, *shape), jnp.int32) for shape in shapes)
        keys = jax.random.split(rng, len(names))
        params = {
            name: module.init(keys[i], blank[i], label, codes_of(blank[:i]))['params']
            for i, (name, module) in enumerate(zip(names, grids.modules, strict=True))
        }
        return new_state(params, context.optim)

    def settings():
        return {'temperature': temperature}

    def sample(state, frozen, batch, rng, settings):
        rng_codes, rng_decode = jax.random.split(rng)
        keys = example_keys(rng_codes, batch)
        values = sample_grids(grids, state.ema, keys, batch.get('label'), settings['temperature'], sampler)
        if first is None:
            return 2 * values[0].astype(jnp.float32) / (levels - 1) - 1
        return jnp.clip(first.decode(*frozen['first'], batch, codes_of(values), rng_decode), -1, 1)

    def evaluate(state, frozen, batch, rng):
        nlls = negative_log_likelihoods(grids, state.ema, to_values(frozen, batch, rng), batch.get('label'))
        total = sum(nlls)
        bits = total / (grids.dims * math.log(2))
        if first is None:
            return {'nll': total, **({'bits_per_dim': bits} if levels == 256 else {})}
        return {'nll': total, **{f'nll/{n}': v for n, v in zip(names, nlls, strict=True)}, 'bits_per_code': bits}

    return Family(
        init,
        make_update(loss, context.optim, *names),
        by_settings(sample, settings),
        evaluate,
        prepare=encoder.prepare if encoder else None,
        conditions=('label',) if conditional else (),
        free=('temperature', 'sampler'),
        sampling=('temperature', 'sampler'),
        settings=settings,
    )
