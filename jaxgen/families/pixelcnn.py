"""PixelCNNs: an image, or a grid of codes, one value after another (van den Oord et al. 2016, arXiv 1601.06759).

    p(x) = prod_i p(x_i | x_1, ..., x_{i-1}),

row by row, and within a pixel colour by colour. A network whose every output sees earlier values alone gives all
these distributions, softmaxes over the values, in one pass, and training maximises log p(x), which is exact.
`networks/pixelcnn.py` says which networks there are.

Drawing takes a step for each pixel. What layers have computed for earlier pixels is kept ('cached', see
`networks/masked.py`), so that a step costs one pixel's work; 'plain' computes the whole image for each pixel. Both draw
the same images from the same seed, up to rounding.

With `config.stages.first`, a run that turns images into grids of codes (a VQ-VAE), the model is its prior: one network
for each grid, params 'level0', 'level1', ..., coarse ones first, and each sees all coarser codes (VQ-VAE-2, Razavi et
al. 2019, arXiv 1906.00446). Then figures are of codes: they say nothing about the images' likelihood.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp

from jaxgen.checks import check_labels
from jaxgen.contract import Aux, Context, Family, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.losses import likelihoods
from jaxgen.networks.masked import draw_cached, draw_plainly
from jaxgen.networks.pixelcnn import NETWORKS, Coarser, Level
from jaxgen.randomness import example_keys

Array = jax.Array

# Attributes of the networks that others decide: the data and the shared machinery.
GIVEN = ('colours', 'levels', 'classes', 'dtype', 'remat', 'parent', 'name')
FIELDS = {
    name: {f.name: f.default for f in dataclasses.fields(network) if f.name not in GIVEN}
    for name, network in NETWORKS.items()
}


def check_network(network: str, section: dict, colours: int) -> None:
    """Raises UserError for fields of a network that cannot work."""
    where = f'config.model.{network}'
    for name in ('channels', 'head', 'layers'):
        if section.get(name, colours) < colours:
            raise UserError(f'{where}.{name} must be {colours} or more; it is {section[name]}')
    if section['blocks'] < 1:
        raise UserError(f'{where}.blocks must be 1 or more; it is {section["blocks"]}')
    for name in ('kernel', 'hidden_kernel'):
        if section.get(name, 1) % 2 == 0 or section.get(name, 1) < 1:
            raise UserError(f'{where}.{name} must be odd, and 1 or more; it is {section[name]}')
    if section['kernel'] < 3:
        raise UserError(f'{where}.kernel must be 3 or more; it is {section["kernel"]}')
    if not 0 <= section['dropout'] < 1:
        raise UserError(f'{where}.dropout must be in [0, 1); it is {section["dropout"]}')
    if network == 'snail':
        if colours > 1:
            raise UserError(
                "config.model.network = 'snail' is for one value per pixel, grey images or codes: take 'gated', or the "
                'family pixelcnn_pp, for colours'
            )
        if section['heads'] < 0 or (section['heads'] and section['channels'] % section['heads']):
            raise UserError(f'{where}.channels must be a multiple of heads; they are {section}')


def build(
    context: Context,
    *,
    network: str = 'gated',
    pixelcnn: dict = FIELDS['pixelcnn'],
    gated: dict = FIELDS['gated'],
    snail: dict = FIELDS['snail'],
    levels: int = 256,
    conditional: bool = False,
    embedding: int = 64,
    coarser_blocks: int = 2,
    temperature: float = 1.0,
    sampler: str = 'cached',
) -> Family:
    """PixelCNN.

    Args:
      network: 'pixelcnn' | 'gated' | 'snail'; the section of that name says how it looks. With several grids of codes
        'snail' has attention for the coarsest alone: the others are long, and are told what lies far away.
      levels: of grey (or of a colour) that the 256 are cut down to. With 256 the likelihood is of the data as they
        are, and can be compared.
      conditional: tell the network the class, `batch['label']`.
      embedding: numbers that stand for a code; coarser_blocks: residual blocks that read the coarser codes. Of codes.
      temperature: of the distributions that are drawn from; 1: as learned, less: the likelier values.
      sampler: 'cached' | 'plain', see above.

    evaluate gives per image 'nll', in nats, exact; 'bits_per_dim' with 256 levels. Of codes: 'nll', 'nll/level0', ...
    of each grid, and 'bits_per_code'.

    Raises:
      UserError: a value out of range, no labels, a first stage without codes.
    """
    sections = {'pixelcnn': pixelcnn, 'gated': gated, 'snail': snail}
    if network not in NETWORKS:
        raise UserError(f'config.model.network must be one of {tuple(NETWORKS)}; it is {network!r}')
    if sampler not in ('cached', 'plain'):
        raise UserError(f"config.model.sampler must be 'cached' or 'plain'; it is {sampler!r}")
    check_labels(context, conditional)
    if not 2 <= levels <= 256 or temperature <= 0 or embedding < 1 or coarser_blocks < 0:
        raise UserError(
            'config.model: levels must be from 2 to 256, temperature more than 0, embedding 1 or more, coarser_blocks '
            '0 or more'
        )
    first = context.stages.get('first')
    if first is not None and not (first.latents.grids and first.latents.vocabulary):
        raise UserError('config.stages.first must be a run that makes codes, of a VQ-VAE say: this one makes none')
    colours = 1 if first else context.image[2]
    section = {**FIELDS[network], **sections[network]}
    check_network(network, section, colours)
    vocabulary = first.latents.vocabulary if first else 0
    grids = first.latents.grids if first else (context.image[:2],)
    for i, (coarse, fine) in enumerate(itertools.pairwise(grids)):
        if any(b % a for a, b in zip(coarse, fine, strict=True)):
            raise UserError(f'config.stages.first: grid {i + 1} of codes, {fine}, is no multiple of grid {i}, {coarse}')

    def make(i: int, grid: tuple[int, int]) -> Level:
        own = {**section, 'heads': 0} if network == 'snail' and i else section
        net = NETWORKS[network](
            **own,
            colours=colours,
            levels=vocabulary or levels,
            classes=context.classes if conditional else 0,
            dtype=context.dtype,
            remat=context.remat,
        )
        coarser = Coarser(grid, vocabulary, section['channels'], coarser_blocks, context.dtype) if i else None
        return Level(net, vocabulary, embedding, coarser)

    names = [f'level{i}' for i in range(len(grids))] if first else ['pixelcnn']
    nets = [make(i, grid) for i, grid in enumerate(grids)]
    values_per_image = colours * sum(math.prod(grid) for grid in grids)

    def to_values(frozen, batch, rng) -> tuple[Array, ...]:
        """What is modelled, a tuple of grids: int32 [n, h, w, colours]."""
        if first is not None:
            return tuple(codes[..., None] for codes in first.encode(*frozen['first'], batch, rng))
        bytes_ = jnp.round((batch['image'] + 1) * 127.5).astype(jnp.int32)
        return (bytes_ * levels // 256,)

    def score(params, values, label, train, rng) -> list[Array]:
        """-log p of each grid given the coarser ones, [n] nats each."""
        out = []
        for i, (name, net) in enumerate(zip(names, nets, strict=True)):
            rngs = {'dropout': jax.random.fold_in(rng, i)} if train else None
            coarser = tuple(v[..., 0] for v in values[:i])
            logits = net.apply({'params': params[name]}, values[i], label, coarser, train, rngs=rngs)
            out.append(-likelihoods.categorical(logits, values[i]))
        return out

    def loss(params, state, frozen, batch, rng):
        rng_first, rng_dropout = jax.random.split(rng)
        values = to_values(frozen, batch, rng_first)
        each = score(params, values, batch.get('label'), True, rng_dropout)
        bits = [nll.mean() / math.log(2) for nll in each]
        total = sum(bits) / values_per_image
        logs = {f'bits/{name}': b / math.prod(grid) for name, b, grid in zip(names, bits, grids, strict=True)}
        return total, Aux({'loss': total, **(logs if len(names) > 1 else {})})

    update = make_update(loss, context.optim, *names)

    def init(rng, batch, frozen):
        found = jax.eval_shape(to_values, frozen, batch, rng)
        shapes = tuple(v.shape[1:3] for v in found)
        if shapes != tuple(map(tuple, grids)):
            raise UserError(
                f'config.stages.first was trained on other images: its codes would be {shapes}, not {grids}'
            )
        label = jnp.zeros(1, jnp.int32) if conditional else None
        blank = [jnp.zeros((1, *v.shape[1:]), jnp.int32) for v in found]
        params = {}
        for i, (name, net, key) in enumerate(zip(names, nets, jax.random.split(rng, len(nets)), strict=True)):
            params[name] = net.init(key, blank[i], label, tuple(v[..., 0] for v in blank[:i]))['params']
        return new_state(params, context.optim)

    def draw_grid(weights, net: Level, shape: tuple[int, ...], label, coarser, keys) -> Array:
        """One grid, int32 [n, h, w, colours]; keys [n]."""
        params = {'params': weights}
        condition = net.apply(params, label, coarser, method=Level.told)

        def run(x, place, cache):
            if place is None:
                return net.apply(params, x, condition, None, method=Level.at), cache
            output, changed = net.apply(
                {**params, 'cache': cache}, x, condition, place, method=Level.at, mutable=['cache']
            )
            return output, changed['cache']

        def draw(logits, pixel, colour, old):
            """logits [n, colours, levels]: the value of this colour, by a key of its own."""
            here = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, pixel), colour))(keys)
            values = jax.vmap(jax.random.categorical)(here, logits[:, colour] / temperature)
            new = old.at[:, colour].set(values.astype(jnp.int32))
            looks = net.apply(params, new, method=Level.look)
            if not vocabulary:  # colours not drawn yet; no output sees them, but let them be zeros in both samplers
                looks = jnp.where(jnp.arange(colours) <= colour, looks, 0)
            return new, looks

        way = functools.partial(draw_cached, margin=net.network.margin, rows=net.network.rows)
        seen = embedding if vocabulary else colours
        return (way if sampler == 'cached' else draw_plainly)(run, draw, (*shape[:3], seen), colours, colours)

    def sample(state, frozen, batch, rng):
        rng_codes, rng_decode = jax.random.split(rng)
        keys, drawn = example_keys(rng_codes, batch), ()
        for i, (name, net, grid) in enumerate(zip(names, nets, grids, strict=True)):
            own = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)  # noqa: B023
            coarser = tuple(v[..., 0] for v in drawn)
            shape = (len(keys), *grid)
            drawn += (draw_grid(state.ema[name], net, shape, batch.get('label'), coarser, own),)
        if first is not None:
            images = first.decode(*frozen['first'], batch, tuple(v[..., 0] for v in drawn), rng_decode)
            return jnp.clip(images, -1, 1)
        return 2 * drawn[0].astype(jnp.float32) / (levels - 1) - 1

    def evaluate(state, frozen, batch, rng):
        values = to_values(frozen, batch, rng)
        each = score(state.ema, values, batch.get('label'), False, rng)
        total = sum(each)
        bits = total / (values_per_image * math.log(2))
        if first is None:
            return {'nll': total, **({'bits_per_dim': bits} if levels == 256 else {})}
        return {'nll': total, **{f'nll/{n}': v for n, v in zip(names, each, strict=True)}, 'bits_per_code': bits}

    return Family(
        init,
        update,
        sample,
        evaluate,
        conditions=('label',) if conditional else (),
        free=('temperature', 'sampler'),
    )
