"""VQ-VAE, VQ-VAE-2: autoencoders whose latents are codes out of a codebook.

Van den Oord et al. 2017, Neural Discrete Representation Learning (arXiv 1711.00937); Razavi et al. 2019, Generating
Diverse High-Fidelity Images with VQ-VAE-2 (arXiv 1906.00446), whose codes lie on several grids, the fine ones told
what the coarse ones hold. The loss is (eq. 3, all norms as means over pixels or numbers)

    |x - decode(codes)|^2 / variance + [codebook loss] + commitment |z - codes|^2

with the middle term only where the codebook is learned by the loss; else it follows moving averages
(`jaxgen/networks/quantise.py`). Gradients go from the decoder's input straight to the encoder's output.

This is the first of two stages: it says what a picture's codes are, not how likely they are. `sample` draws every code
on its own, by how often training met it. That gives rubbish, the baseline that a prior over `encode`'s codes is
needed for.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, Latents, advance, gradient_step, new_state
from jaxgen.errors import UserError
from jaxgen.networks import quantise
from jaxgen.networks.resnet_autoencoder import Pyramid, PyramidDecoder
from jaxgen.randomness import example_keys, stream

Array = jax.Array


def build(
    context: Context,
    *,
    levels: int = 1,
    width: int = 128,
    blocks: int = 2,
    hidden: int = 32,
    halvings: int = 2,
    vocabulary: int = 512,
    latent: int = 64,
    codebook: str = 'ema',
    decay: float = 0.99,
    debiased: bool = False,
    commitment: float = 0.25,
    variance: float = 1.0,
    restart: float = 0.0,
) -> Family:
    """VQ-VAE.

    Args:
      levels: grids of codes, each half as fine as the next: 1 is VQ-VAE, 2 VQ-VAE-2.
      width, blocks, hidden: channels of encoders and decoders, residual blocks, channels inside these.
      halvings: how often the finest grid halves the image, 1 or more.
      vocabulary: codes of each level's codebook.
      latent: numbers of one code.
      codebook: 'ema' | 'loss': learned by moving averages, or by the loss as one more network, `codebook`.
      decay: of the averages, per update; with 'loss' of the counts alone.
      debiased: averages forget where codes began, see quantise.ema_start; with 'ema'.
      commitment: weight of the commitment term.
      variance: of the data's pixels, in [-1, 1], which the error of the picture is divided by.
      restart: codes that fewer latents per update came to, on average, start anew at one of the batch's; 0: never.

    update logs, for each level if there are several, 'perplexity', the exp of the entropy of the batch's codes, and
    'usage', the share of codes met in the batch. evaluate gives per image 'squared_error' of the reconstruction, mean
    over pixels in [-1, 1]; 'commitment', the squared distance of latents to codes, mean over numbers and levels;
    'bits_per_code', -log2 of the shares that codes have in training, mean over all codes.

    Raises:
      UserError: a value that cannot work.
    """
    height, columns, channels = context.image
    divisor = 2 ** (halvings + levels - 1)
    if min(levels, blocks, hidden, halvings, latent) < 1 or width < 2:
        raise UserError('config.model: levels, blocks, hidden, halvings, latent must be 1 or more, width 2 or more')
    if vocabulary < 2:
        raise UserError(f'config.model.vocabulary must be 2 or more; it is {vocabulary}')
    if codebook not in ('ema', 'loss'):
        raise UserError(f"config.model.codebook must be 'ema' or 'loss'; it is {codebook!r}")
    if not 0 <= decay < 1:
        raise UserError(f'config.model.decay must be 0 or more and less than 1; it is {decay}')
    if debiased and codebook != 'ema':
        raise UserError("config.model.debiased is about averages: it needs config.model.codebook = 'ema'")
    if commitment < 0 or variance <= 0 or restart < 0:
        raise UserError('config.model: variance must be more than 0, commitment and restart 0 or more')
    check_size(context.image, divisor, f'config.model.halvings = {halvings} and levels = {levels}')

    sizes = dict(width=width, blocks=blocks, hidden=hidden, halvings=halvings)
    rest = dict(remat=context.remat, dtype=context.dtype)
    # The two published networks differ in one ReLU.
    encoder = Pyramid(levels=levels, latent=latent, rectified=levels == 1, **sizes, **rest)
    decoder = PyramidDecoder(features=channels, **sizes, **rest)
    steps = [2 ** (halvings + i) for i in reversed(range(levels))]  # pixels to a code, coarse first
    grids = tuple((height // step, columns // step) for step in steps)
    names = [f'level{i}' for i in range(levels)]
    learned = codebook == 'loss'

    def codebooks(params, extra) -> list[Array]:
        """[vocabulary, latent] of each level."""
        return [params['codebook'][k] if learned else quantise.ema_codebook(extra[k]) for k in names]

    def find(params, extra, x: Array) -> tuple[tuple[Array, ...], list[Array], list[Array]]:
        """Of each level latents and vectors of their codes, [n, h, w, latent], and the codes, [n, h, w]."""
        books = codebooks(params, extra)
        codes: dict[int, Array] = {}
        vectors: dict[int, Array] = {}

        def quantised(level: int, z: Array) -> Array:
            codes[level] = quantise.nearest(z, books[level])
            vectors[level] = quantise.embed(codes[level], books[level])
            return quantise.straight_through(z, vectors[level])

        latents = encoder.apply({'params': params['encoder']}, x, quantised)
        quantised(levels - 1, latents[-1])  # the finest, which no other level looks at
        return latents, [vectors[i] for i in range(levels)], [codes[i] for i in range(levels)]

    def picture(params, vectors) -> Array:
        """[n, H, W, C], not bounded."""
        return decoder.apply({'params': params['decoder']}, tuple(vectors))

    def error(out: Array, x: Array) -> Array:
        """[n]"""
        return jnp.square(out - x).mean((1, 2, 3))

    def loss(params, state, frozen, batch, rng):
        x = batch['image']
        latents, vectors, codes = find(params, state.extra, x)
        passed = [quantise.straight_through(z, v) for z, v in zip(latents, vectors, strict=True)]
        squared_error = error(picture(params, passed), x).mean()
        terms = [quantise.losses(z, v) for z, v in zip(latents, vectors, strict=True)]
        to_latents, to_codes = (sum(t) for t in zip(*terms, strict=True))
        value = squared_error / variance + commitment * to_codes + (to_latents if learned else 0.0)
        counts = {name: quantise.statistics(z, c, vocabulary) for name, z, c in zip(names, latents, codes, strict=True)}
        return value, Aux({'loss': value, 'squared_error': squared_error, 'commitment': to_codes}, counts)

    networks = ('encoder', 'decoder', 'codebook') if learned else ('encoder', 'decoder')
    step = gradient_step(loss, context.optim, *networks)

    def init(rng, batch, frozen):
        encoder_rng, decoder_rng, codebook_rng = jax.random.split(rng, 3)
        empty = tuple(jnp.zeros((1, *grid, latent)) for grid in grids)
        params = {
            'encoder': encoder.init(encoder_rng, batch['image'], lambda level, z: z)['params'],
            'decoder': decoder.init(decoder_rng, empty)['params'],
        }
        keys = jax.random.split(codebook_rng, levels)
        books = {k: quantise.start(key, vocabulary, latent) for k, key in zip(names, keys, strict=True)}
        if learned:
            params['codebook'] = books
            extra = {k: {'count': jnp.ones(vocabulary)} for k in names}
        else:
            extra = {k: quantise.ema_start(book, debiased) for k, book in books.items()}
        return new_state(params, context.optim, extra)

    def restarted(state, x: Array, rng: Array):
        """The state with its dead codes replaced."""
        latents, _, _ = find(state.params, state.extra, x)
        extra = dict(state.extra)
        for name, z, key in zip(names, latents, jax.random.split(rng, levels), strict=True):
            if not learned:
                extra[name] = quantise.ema_restart(extra[name], z, key, restart)
                continue
            book, count, dead = quantise.restart(state.params['codebook'][name], extra[name]['count'], z, key, restart)
            extra[name] = {'count': count}
            state = quantise.with_restarted(state, name, book, dead)
        return state.replace(extra=extra)

    def update(state, frozen, batch, rng):
        state, (logs, counts) = step(state, frozen, batch, rng)
        # Means over the parts of an accumulated gradient; counts are of the whole batch.
        counts = jax.tree.map(lambda a: a * context.optim.accumulate, counts)
        extra = {}
        for name in names:
            tail = f'/{name}' if levels > 1 else ''
            logs[f'perplexity{tail}'] = quantise.perplexity_of_counts(counts[name]['count'])
            logs[f'usage{tail}'] = (counts[name]['count'] > 0).mean()
            if learned:
                mixed = decay * state.extra[name]['count'] + (1 - decay) * counts[name]['count']
                extra[name] = {'count': mixed}
            else:
                extra[name] = quantise.ema_absorb(state.extra[name], counts[name], decay)
        state = advance(state.replace(extra=extra), context.optim)
        if restart:
            scales = [quantise.ema_scale(extra[name]) for name in names]
            dead = [(extra[name]['count'] / s < restart).any() for name, s in zip(names, scales, strict=True)]
            # The batch's latents are wanted only where a code is dead: most updates go without.
            state = jax.lax.cond(
                jnp.stack(dead).any(),
                lambda s: restarted(s, batch['image'], stream(rng, 'restart')),
                lambda s: s,
                state,
            )
        return state, logs

    def shares(state, name: str) -> Array:
        """How often training met each code, [vocabulary], none 0, sum 1."""
        count = quantise.smoothed(state.extra[name]['count'])
        return count / count.sum()

    def evaluate(state, frozen, batch, rng):
        x = batch['image']
        latents, vectors, codes = find(state.ema, state.extra, x)
        distances = [jnp.square(z - v).mean((1, 2, 3)) for z, v in zip(latents, vectors, strict=True)]
        bits = sum(-jnp.log2(shares(state, name))[c].sum((1, 2)) for name, c in zip(names, codes, strict=True))
        return {
            'squared_error': error(jnp.clip(picture(state.ema, vectors), -1, 1), x),
            'commitment': sum(distances) / levels,
            'bits_per_code': bits / sum(math.prod(grid) for grid in grids),
        }

    def encode(state, frozen, batch, rng):
        """Codes of each level, int32 [n, h, w], coarse first."""
        return tuple(find(state.ema, state.extra, batch['image'])[2])

    def decode(state, frozen, batch, latents, rng):
        """Codes as `encode` gives them -> images [n, H, W, C] in [-1, 1]."""
        books = codebooks(state.ema, state.extra)
        vectors = [quantise.embed(c, book) for c, book in zip(latents, books, strict=True)]
        return jnp.clip(picture(state.ema, vectors), -1, 1)

    def sample(state, frozen, batch, rng):
        keys = jax.vmap(lambda key: jax.random.split(key, levels))(example_keys(rng, batch))  # [n, levels]
        codes = []
        for i, (name, grid) in enumerate(zip(names, grids, strict=True)):
            log_share = jnp.log(shares(state, name))
            draw = jax.vmap(lambda key, p=log_share, grid=grid: jax.random.categorical(key, p, shape=grid))
            codes.append(draw(keys[:, i]).astype(jnp.int32))
        return decode(state, frozen, batch, tuple(codes), rng)

    return Family(
        init,
        update,
        sample,
        evaluate,
        encode,
        decode,
        divisor=divisor,
        latents=Latents(grids=grids, vocabulary=vocabulary),
    )
