"""VAR: visual autoregressive modelling by next-scale prediction (Tian et al. 2024, arXiv 2404.02905).

`config.stages.first`, VQGAN with `scales`, makes an image grids of codes r_1, ..., r_K, coarse first, whose vectors add
up to the map that is decoded. A transformer learns

    p(r_1, ..., r_K | class) = prod_k p(r_k | r_1, ..., r_{k-1}, class)                                (section 3.2)

with all codes of a scale independent of each other, given the coarser ones: K steps make an image, where a transformer
over a sequence of codes (families/transformer.py) takes one for every code. What it sees of the coarser scales is what
they add up to, shrunk to the size of the next. Some labels are left out in training, so that samples can be guided: at
scale k of K, from 0, logits are (1 + t) those with the class - t those without, with t = guidance k / (K - 1).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxgen.checks import check_labels
from jaxgen.contract import Aux, Context, Family, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import cross_entropy
from jaxgen.networks.multiscale import shrunk
from jaxgen.networks.transformer import categorical, check_prior, filtered, flatten
from jaxgen.networks.var import VARTransformer
from jaxgen.randomness import example_keys

Array = jax.Array


def guided(conditional: Array, unconditional: Array, guidance: float, scale: int, scales: int) -> Array:
    """Logits [n, T, V] that number `scale` of `scales` is drawn from, of those with and without the class."""
    t = guidance * scale / max(scales - 1, 1)
    return (1 + t) * conditional - t * unconditional


def build(
    context: Context,
    *,
    channels: int = 64,
    blocks: int = 4,
    heads: int = 4,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    unit_queries: bool = True,
    shared: bool = False,
    gate: float = 1e-3,
    conditional: bool = False,
    label_dropout: float = 0.1,
    guidance: float = 0.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Family:
    """VAR over the codes of `config.stages.first`.

    Args:
      channels, blocks, heads, dropout, drop_path, unit_queries, shared, gate: see networks/var.py.
      conditional: tell it the class, `batch['label']`.
      label_dropout: share of the examples whose class it is not told in training.
      guidance: see above; 0: none. It needs label_dropout.
      temperature, top_k, top_p: of the draws, after guidance, see `networks.transformer.filtered`.

    evaluate gives per image 'code_nats' = -log p(codes), and 'bits_per_code'. They are of the codes, not of the image:
    comparable between priors of one first stage only.

    Raises:
      UserError: a value that cannot work, or a first stage whose codes are no scales of one map.
    """
    first = context.stages.get('first')
    check_prior(first, channels, blocks, heads)
    check_labels(context, conditional)
    if first.embed is None:
        raise UserError('config.stages.first must be a run whose codes are scales of one map: vqgan with model.scales')
    if not (0 <= dropout < 1 and 0 <= drop_path < 1 and 0 <= label_dropout < 1):
        raise UserError('config.model: dropout, drop_path and label_dropout must be 0 or more and less than 1')
    if min(guidance, temperature, top_k, gate) < 0 or not 0 < top_p <= 1:
        raise UserError('config.model: guidance, temperature, top_k and gate must not be negative, top_p in (0, 1]')
    if guidance and not (conditional and label_dropout):
        raise UserError('config.model.guidance needs config.model.conditional and a label_dropout above 0')
    grids, classes = first.latents.grids, context.classes if conditional else 0
    net = VARTransformer(
        vocabulary=first.latents.vocabulary, grids=grids, channels=channels, blocks=blocks, heads=heads,
        classes=classes,
        dropout=dropout, drop_path=drop_path, unit_queries=unit_queries, shared=shared, gate=gate,
        remat=context.remat, dtype=context.dtype,
    )  # fmt: skip

    def to_words(total: Array, scale: int) -> Array:
        """What the scales before `scale` add up to, as its tokens get it: [n, h, w, D] to [n, T, D]."""
        return shrunk(total, grids[scale]).reshape(len(total), -1, total.shape[-1])

    def read(frozen, batch, rng) -> tuple[Array, Array | None]:
        """Codes [n, T] of images, and what the tokens of all scales but the first get."""
        codes = first.encode(*frozen['first'], batch, rng)
        total, words = 0.0, []
        for k in range(1, len(grids)):
            total = total + first.embed(*frozen['first'], codes[k - 1], k - 1)
            words.append(to_words(total, k))
        return flatten(codes), jnp.concatenate(words, 1) if words else None

    def label_of(batch, n: int) -> Array:
        """int32 [n]"""
        return batch['label'].astype(jnp.int32) if conditional else jnp.zeros(n, jnp.int32)

    def nats(params, codes, words, label, train=False, rngs=None) -> Array:
        """-log p of each code, [n, T]."""
        logits = net.apply({'params': params['transformer']}, words, label, train=train, rngs=rngs)
        return cross_entropy(logits, codes)

    def loss(params, state, frozen, batch, rng):
        code_rng, label_rng, dropout_rng = jax.random.split(rng, 3)
        codes, words = read(frozen, batch, code_rng)
        label = label_of(batch, len(codes))
        if conditional:
            label = jnp.where(jax.random.bernoulli(label_rng, label_dropout, label.shape), classes, label)
        value = nats(params, codes, words, label, True, {'dropout': dropout_rng}).mean()
        return value, Aux({'loss': value, 'bits_per_code': value / math.log(2)})

    update = make_update(loss, context.optim, 'transformer')

    def init(rng, batch, frozen):
        image = {'image': batch['image'][:1]}
        _, words = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(read, frozen, image, rng))
        params = net.init(rng, words, jnp.zeros(1, jnp.int32))['params']
        return new_state({'transformer': params}, context.optim)

    def draw_codes(params, frozen, batch, keys) -> tuple[Array, ...]:
        """Codes of each scale, int32 [n, h, w]: every token goes through the network once."""
        n = len(keys)
        label = label_of(batch, n)
        if guidance:
            label = jnp.concatenate([label, jnp.full(n, classes)])
        total, words, cache, codes = 0.0, None, net.empty_cache(len(label)), []
        for k, grid in enumerate(grids):  # not a scan: no two scales have one shape
            if k:
                total = total + first.embed(*frozen['first'], codes[-1], k - 1)
                words = to_words(total, k)
                words = jnp.concatenate([words, words]) if guidance else words
            logits, cache = net.apply({'params': params}, words, label, cache, k)
            if guidance:
                logits = guided(logits[:n], logits[n:], guidance, k, len(grids))
            at = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
            codes.append(categorical(at, filtered(logits, temperature, top_k, top_p)).reshape(n, *grid))
        return tuple(codes)

    def sample(state, frozen, batch, rng):
        draw_rng, first_rng = jax.random.split(rng)
        codes = draw_codes(state.ema['transformer'], frozen, batch, example_keys(draw_rng, batch))
        return jnp.clip(first.decode(*frozen['first'], batch, codes, first_rng), -1, 1)

    def evaluate(state, frozen, batch, rng):
        codes, words = read(frozen, batch, rng)
        found = nats(state.ema, codes, words, label_of(batch, len(codes)))
        return {'code_nats': found.sum(1), 'bits_per_code': found.mean(1) / math.log(2)}

    return Family(
        init,
        update,
        sample,
        evaluate,
        conditions=('label',) if conditional else (),
        divisor=first.divisor,
        free=('guidance', 'temperature', 'top_k', 'top_p'),
    )
