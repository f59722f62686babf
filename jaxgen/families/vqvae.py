"""VQ-VAE, VQ-VAE-2: autoencoders whose latents are codes out of a codebook.

Van den Oord et al. 2017, Neural Discrete Representation Learning (arXiv 1711.00937); Razavi et al. 2019, Generating
Diverse High-Fidelity Images with VQ-VAE-2 (arXiv 1906.00446), whose codes lie on several grids, the fine ones
conditioned on the coarse ones. The loss is (eq. 3, all norms as means over pixels or dimensions)

    |x - decode(codes)|^2 / variance + [codebook loss] + commitment |z - codes|^2

with the middle term only where the codebook is learned by the loss; else it follows moving averages
(`jaxgen/networks/quantise.py`). Gradients go from the decoder's input straight to the encoder's output.

This is the first of two stages: it encodes images as codes, without a likelihood of these. `sample` draws every code
independently, by its frequency in training. Such images are the baseline for a prior over the codes of `encode`.
"""

from __future__ import annotations

import functools
import math
from typing import Annotated, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, Latents, State, advance, gradient_step, new_state
from jaxgen.errors import UserError
from jaxgen.networks import quantise
from jaxgen.networks.resnet_autoencoder import Pyramid, PyramidDecoder
from jaxgen.options import Count, NonNegative, OneOf, Positive, Rate
from jaxgen.randomness import example_keys, stream

Array = jax.Array


class Quantised(NamedTuple):
    """Latents and their codes; an entry for each level, coarse first."""

    latents: tuple[Array, ...]  # the encoder's outputs, [n, h, w, latent]
    vectors: list[Array]  # the nearest codes of the codebook, [n, h, w, latent]
    codes: list[Array]  # their indices, int32 [n, h, w]


class Networks(NamedTuple):
    """The networks and their codebooks, which the methods read of params or State.extra."""

    encoder: Pyramid
    decoder: PyramidDecoder
    grids: tuple[tuple[int, int], ...]  # (rows, columns) of each level's codes, coarse first
    vocabulary: int
    latent: int
    learned: bool  # codebooks are a network, learned by the loss; else moving averages in State.extra

    @property
    def names(self) -> list[str]:
        """Of the codebooks, coarse first."""
        return [f'level{i}' for i in range(len(self.grids))]

    def codebooks(self, params, extra) -> list[Array]:
        """[vocabulary, latent] of each level."""
        return [params['codebook'][k] if self.learned else quantise.ema_codebook(extra[k]) for k in self.names]

    def encode(self, params, extra, x: Array) -> Quantised:
        codebooks = self.codebooks(params, extra)
        codes: dict[int, Array] = {}
        vectors: dict[int, Array] = {}

        def quantised(level: int, z: Array) -> Array:
            codes[level] = quantise.nearest(z, codebooks[level])
            vectors[level] = quantise.embed(codes[level], codebooks[level])
            return quantise.straight_through(z, vectors[level])

        latents = self.encoder.apply({'params': params['encoder']}, x, quantised)
        quantised(len(self.grids) - 1, latents[-1])  # the finest, on which no other level is conditioned
        return Quantised(latents, [vectors[i] for i in sorted(vectors)], [codes[i] for i in sorted(codes)])

    def decode(self, params, vectors) -> Array:
        """Images [n, H, W, C], not clipped."""
        return self.decoder.apply({'params': params['decoder']}, tuple(vectors))


def squared_error(y: Array, x: Array) -> Array:
    """Mean over pixels, [n]."""
    chex.assert_equal_shape([y, x])
    return jnp.square(y - x).mean((1, 2, 3))


def loss(networks: Networks, variance: float, commitment: float, params, state: State, frozen, batch, rng):
    """Eq. 3, summed over levels; keeps the statistics of latents by code, see quantise.statistics."""
    x = batch['image']
    latents, vectors, codes = networks.encode(params, state.extra, x)
    decoder_inputs = [quantise.straight_through(z, v) for z, v in zip(latents, vectors, strict=True)]
    error = squared_error(networks.decode(params, decoder_inputs), x).mean()
    terms = [quantise.losses(z, v) for z, v in zip(latents, vectors, strict=True)]
    codebook_loss, distance = (sum(t) for t in zip(*terms, strict=True))
    value = error / variance + commitment * distance + (codebook_loss if networks.learned else 0.0)
    statistics = {
        name: quantise.statistics(z, c, networks.vocabulary)
        for name, z, c in zip(networks.names, latents, codes, strict=True)
    }
    return value, Aux({'loss': value, 'squared_error': error, 'commitment': distance}, statistics)


def init(networks: Networks, optim, debiased: bool, rng: Array, batch: dict, frozen: dict) -> State:
    encoder_rng, decoder_rng, codebook_rng = jax.random.split(rng, 3)
    empty = tuple(jnp.zeros((1, *grid, networks.latent)) for grid in networks.grids)
    params = {
        'encoder': networks.encoder.init(encoder_rng, batch['image'], lambda level, z: z)['params'],
        'decoder': networks.decoder.init(decoder_rng, empty)['params'],
    }
    keys = jax.random.split(codebook_rng, len(networks.grids))
    codebooks = {
        name: quantise.start(key, networks.vocabulary, networks.latent)
        for name, key in zip(networks.names, keys, strict=True)
    }
    if networks.learned:
        params['codebook'] = codebooks
        extra = {name: {'count': jnp.ones(networks.vocabulary)} for name in codebooks}
    else:
        extra = {name: quantise.ema_start(codebook, debiased) for name, codebook in codebooks.items()}
    return new_state(params, optim, extra)


def restart_dead_codes(networks: Networks, state: State, x: Array, rng: Array, threshold: float) -> State:
    """The state with codes below the threshold replaced by latents of the images x, see quantise.restart."""

    def restarted(state: State) -> State:
        latents = networks.encode(state.params, state.extra, x).latents
        extra = dict(state.extra)
        for name, z, key in zip(networks.names, latents, jax.random.split(rng, len(latents)), strict=True):
            if networks.learned:
                state, count, _ = quantise.restart_learned(state, name, extra[name]['count'], z, key, threshold)
                extra[name] = {'count': count}
            else:
                extra[name] = quantise.ema_restart(extra[name], z, key, threshold)
        return state.replace(extra=extra)

    # The batch's latents are computed only where a code is dead: most updates go without.
    averages = [state.extra[name] for name in networks.names]
    dead = [(average['count'] / quantise.ema_scale(average) < threshold).any() for average in averages]
    return jax.lax.cond(jnp.stack(dead).any(), restarted, lambda s: s, state)


def absorb(networks: Networks, extra: dict, statistics: dict, decay: float) -> dict:
    """State.extra with the statistics of an update's batch."""
    if networks.learned:
        counts = {name: decay * extra[name]['count'] + (1 - decay) * s['count'] for name, s in statistics.items()}
        return {name: {'count': count} for name, count in counts.items()}
    return {name: quantise.ema_absorb(extra[name], s, decay) for name, s in statistics.items()}


def evaluate(networks: Networks, state: State, frozen, batch, rng) -> dict[str, Array]:
    """Metrics per image [n].

    'squared_error' of the reconstruction, mean over pixels in [-1, 1]; 'commitment', the squared distance of latents to
    codes, mean over dimensions and levels; 'bits_per_code', -log2 of the frequencies of codes in training, mean over
    codes.
    """
    latents, vectors, codes = networks.encode(state.ema, state.extra, batch['image'])
    distances = [jnp.square(z - v).mean((1, 2, 3)) for z, v in zip(latents, vectors, strict=True)]
    probabilities = [quantise.probabilities(state.extra[name]['count']) for name in networks.names]
    bits = sum(-jnp.log2(p)[c].sum((1, 2)) for p, c in zip(probabilities, codes, strict=True))
    return {
        'squared_error': squared_error(jnp.clip(networks.decode(state.ema, vectors), -1, 1), batch['image']),
        'commitment': sum(distances) / len(distances),
        'bits_per_code': bits / sum(math.prod(grid) for grid in networks.grids),
    }


def encode(networks: Networks, state: State, frozen, batch, rng) -> tuple[Array, ...]:
    """Codes of each level, int32 [n, h, w], coarse first."""
    return tuple(networks.encode(state.ema, state.extra, batch['image']).codes)


def decode(networks: Networks, state: State, frozen, batch, latents, rng) -> Array:
    """Images [n, H, W, C] in [-1, 1] of codes as `encode` returns them."""
    codebooks = networks.codebooks(state.ema, state.extra)
    vectors = [quantise.embed(c, codebook) for c, codebook in zip(latents, codebooks, strict=True)]
    return jnp.clip(networks.decode(state.ema, vectors), -1, 1)


def sample(networks: Networks, state: State, frozen, batch, rng) -> Array:
    """Images of independent codes."""
    levels = len(networks.grids)
    keys = jax.vmap(lambda key: jax.random.split(key, levels))(example_keys(rng, batch))  # [n, levels]
    codes = []
    for i, (name, grid) in enumerate(zip(networks.names, networks.grids, strict=True)):
        log_p = jnp.log(quantise.probabilities(state.extra[name]['count']))
        draw = functools.partial(jax.random.categorical, logits=log_p, shape=grid)
        codes.append(jax.vmap(draw)(keys[:, i]).astype(jnp.int32))
    return decode(networks, state, frozen, batch, tuple(codes), rng)


@options.checked
def build(
    context: Context,
    *,
    levels: Count = 1,
    width: Annotated[int, '[2, inf)'] = 128,
    blocks: Count = 2,
    hidden: Count = 32,
    halvings: Count = 2,
    vocabulary: Annotated[int, '[2, inf)'] = 512,
    latent: Count = 64,
    codebook: Annotated[str, OneOf('ema', 'loss')] = 'ema',
    decay: Rate = 0.99,
    debiased: bool = False,
    commitment: NonNegative = 0.25,
    variance: Positive = 1.0,
    restart: NonNegative = 0.0,
) -> Family:
    """VQ-VAE.

    Args:
      levels: resolution levels of codes, each half as fine as the next: 1 is VQ-VAE, 2 VQ-VAE-2.
      width, blocks, hidden: channels of encoders and decoders, residual blocks, channels inside these.
      halvings: how often the finest grid of codes halves the image.
      vocabulary: codes of each level's codebook.
      latent: dimensions of a code.
      codebook: learned by moving averages ('ema'), or by the loss ('loss') as one more network, `codebook`.
      decay: of the averages, per update; with 'loss' of the counts alone.
      debiased: averages forget where codes began, see quantise.ema_start; with 'ema'.
      commitment: weight of the commitment term.
      variance: of the data's pixels in [-1, 1], the divisor of the squared error.
      restart: codes that have fewer latents per update, on average, are replaced by latents of the batch; 0: never.

    `update` logs, for each level if there are several, 'perplexity', the exp of the entropy of the batch's codes, and
    'usage', the fraction of codes that the batch uses.

    Raises:
      UserError: a value that cannot work.
    """
    if debiased and codebook != 'ema':
        raise UserError("config.model.debiased is about averages: it needs config.model.codebook = 'ema'")
    divisor = 2 ** (halvings + levels - 1)
    check_size(context.image, divisor, f'config.model.halvings = {halvings} and levels = {levels}')

    height, columns, channels = context.image
    sizes = dict(width=width, blocks=blocks, hidden=hidden, halvings=halvings)
    rest = dict(remat=context.remat, dtype=context.dtype)
    strides = [2 ** (halvings + i) for i in reversed(range(levels))]  # pixels between codes, coarse first
    networks = Networks(
        # The two published networks differ in one ReLU.
        encoder=Pyramid(levels=levels, latent=latent, rectified=levels == 1, **sizes, **rest),
        decoder=PyramidDecoder(features=channels, **sizes, **rest),
        grids=tuple((height // stride, columns // stride) for stride in strides),
        vocabulary=vocabulary,
        latent=latent,
        learned=codebook == 'loss',
    )
    trained = ('encoder', 'decoder', 'codebook') if networks.learned else ('encoder', 'decoder')
    step = gradient_step(functools.partial(loss, networks, variance, commitment), context.optim, *trained)

    def update(state, frozen, batch, rng):
        state, (logs, statistics) = step(state, frozen, batch, rng)
        # Means over the parts of an accumulated gradient; counts are of the whole batch.
        statistics = jax.tree.map(lambda a: a * context.optim.accumulate, statistics)
        for name in networks.names:
            suffix = f'/{name}' if levels > 1 else ''
            logs[f'perplexity{suffix}'] = quantise.perplexity(statistics[name]['count'])
            logs[f'usage{suffix}'] = quantise.usage(statistics[name]['count'])
        state = state.replace(extra=absorb(networks, state.extra, statistics, decay))
        state = advance(state, context.optim)
        if restart:
            state = restart_dead_codes(networks, state, batch['image'], stream(rng, 'restart'), restart)
        return state, logs

    return Family(
        init=functools.partial(init, networks, context.optim, debiased),
        update=update,
        sample=functools.partial(sample, networks),
        evaluate=functools.partial(evaluate, networks),
        encode=functools.partial(encode, networks),
        decode=functools.partial(decode, networks),
        divisor=divisor,
        latents=Latents(grids=networks.grids, vocabulary=vocabulary),
    )
