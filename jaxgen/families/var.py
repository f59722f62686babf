"""VAR: visual autoregressive modelling by next-scale prediction (Tian et al. 2024, arXiv 2404.02905).

`config.stages.first`, VQGAN with `scales`, encodes an image as grids of codes r_1, ..., r_K, coarse first, whose
vectors add up to the feature map that is decoded. A transformer learns

    p(r_1, ..., r_K | class) = prod_k p(r_k | r_1, ..., r_{k-1}, class)                                (section 3.2)

with all codes of a scale independent of each other, given the coarser ones: K steps make an image, where a transformer
over a sequence of codes (families/transformer.py) takes one for every code. Its input at a scale is the sum of the
coarser ones, shrunk to the scale's size. Some labels are dropped in training, so that samples can be guided: at scale k
of K, from 0, logits are (1 + t) those with the class - t those without, with t = guidance k / (K - 1).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import einops
import jax
import jax.numpy as jnp

from jaxgen import options, stages
from jaxgen.checks import check_labels
from jaxgen.contract import Aux, Context, Family, apart, by_settings, make_update, new_state, together
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import cross_entropy
from jaxgen.networks.multiscale import shrunk
from jaxgen.networks.transformer import categorical, check_prior, flatten, kernels_as, truncated, truncation_settings
from jaxgen.networks.var import VARTransformer
from jaxgen.options import TRACED, Count, NonNegative, Rate
from jaxgen.randomness import example_keys

Array = jax.Array


def guided(conditional: Array, unconditional: Array, guidance: Any, scale: int, scales: int) -> Array:
    """Guided logits [n, T, V] of the scale with this index, of those with and without the class."""
    t = guidance * scale / max(scales - 1, 1)
    return (1 + t) * conditional - t * unconditional


class Scales(NamedTuple):
    """The first stage's scales, with its weights."""

    first: Family
    weights: tuple  # its (state, frozen)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        return self.first.latents.grids

    def inputs(self, total: Array, scale: int) -> Array:
        """The transformer's inputs [n, T, D] at a scale: the sum [n, h, w, D] of all coarser ones at its size."""
        return einops.rearrange(shrunk(total, self.grids[scale]), 'n h w d -> n (h w) d')

    def added(self, total: Array | float, codes: Array, scale: int) -> Array:
        """The sum with the codes [n, h, w] of one more scale, [n, h, w, D]."""
        return total + self.first.embed(*self.weights, codes, scale)

    def teacher_forced(self, codes: tuple[Array, ...]) -> tuple[Array, Array | None]:
        """The codes of all scales as int32 [n, T], and the transformer's inputs at all scales but the first."""
        total, inputs = 0.0, []
        for k in range(1, len(self.grids)):
            total = self.added(total, codes[k - 1], k - 1)
            inputs.append(self.inputs(total, k))
        return flatten(codes), jnp.concatenate(inputs, 1) if inputs else None


def label_of(batch: dict, n: int, conditional: bool) -> Array:
    """int32 [n]; 0 without a condition."""
    return batch['label'].astype(jnp.int32) if conditional else jnp.zeros(n, jnp.int32)


def code_nats(net: VARTransformer, weights, inputs: Array | None, label: Array, codes: Array, rng=None) -> Array:
    """-log p of each code given all coarser scales, [n, T].

    rng: a key of dropout in training; None: not in training.
    """
    rngs = None if rng is None else {'dropout': rng}
    return cross_entropy(net.apply({'params': weights}, inputs, label, train=rng is not None, rngs=rngs), codes)


def sample_codes(
    net: VARTransformer, weights, scales: Scales, label: Array, keys: Array, guidance: Array | None, truncate: Callable
) -> tuple[Array, ...]:
    """Codes of each scale, int32 [n, h, w]: every token goes through the network once.

    Args:
      label: int32 [n].
      keys: [n].
      guidance: None: there is none.
      truncate: of logits, see `networks.transformer.truncated`.
    """
    n, grids = len(keys), scales.grids
    if guidance is not None:
        label = together(label, jnp.full(n, net.classes))
    total, inputs, cache, codes = 0.0, None, net.empty_cache(len(label)), []
    for k, grid in enumerate(grids):  # not a scan: no two scales have one shape
        if k:
            total = scales.added(total, codes[-1], k - 1)
            inputs = scales.inputs(total, k)
            inputs = together(inputs, inputs) if guidance is not None else inputs
        logits, cache = net.apply({'params': weights}, inputs, label, cache, k)
        if guidance is not None:
            logits = guided(*apart(logits, 2), guidance, k, len(grids))
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
        codes.append(categorical(own, truncate(logits)).reshape(n, *grid))
    return tuple(codes)


@options.checked
def build(
    context: Context,
    *,
    channels: Count = 64,
    blocks: Count = 4,
    heads: Count = 4,
    dropout: Rate = 0.0,
    drop_path: Rate = 0.0,
    unit_queries: bool = True,
    shared: bool = False,
    gate: NonNegative = 1e-3,
    conditional: bool = False,
    label_dropout: Rate = 0.1,
    guidance: Annotated[NonNegative, TRACED] = 0.0,
    temperature: Annotated[NonNegative, TRACED] = 1.0,
    top_k: Annotated[int, '[0, inf)'] = 0,
    top_p: Annotated[float, '(0, 1]', TRACED] = 1.0,
) -> Family:
    """VAR over the codes of `config.stages.first`.

    Args:
      channels: features of a token, a multiple of heads.
      blocks, heads: of the transformer; heads of attention in each block.
      dropout: of branches, in training.
      drop_path: probability that a whole branch is dropped in training, of the last block; 0 in the first (stochastic
        depth).
      unit_queries: queries and keys are normalised to length 1.
      shared: one layer makes of the class the adaptive norms' parameters of all blocks.
      gate: how large the gates of the branches start, see networks/var.py.
      conditional: condition on the class, `batch['label']`.
      label_dropout: fraction of the examples whose class is dropped in training.
      guidance: see above; 0: none. It needs label_dropout.
      temperature: that logits are divided by in sampling, after guidance; 0: the likeliest code.
      top_k, top_p: truncation of the distribution in sampling, see `networks.transformer.filtered`.

    evaluate gives per image 'code_nats' = -log p(codes), and 'bits_per_code'. They are of the codes, not of the image:
    comparable between priors of one first stage only.

    Raises:
      UserError: a value out of range, or a first stage whose codes are no scales of one map.
    """
    first = context.stages.get('first')
    check_prior(first, channels, heads)
    check_labels(context, conditional)
    if first.embed is None:
        raise UserError('config.stages.first must be a run whose codes are scales of one map: vqgan with model.scales')
    if guidance and not (conditional and label_dropout):
        raise UserError('config.model.guidance needs config.model.conditional and a label_dropout above 0')
    classes = context.classes if conditional else 0
    net = VARTransformer(
        vocabulary=first.latents.vocabulary, grids=first.latents.grids, channels=channels, blocks=blocks, heads=heads,
        classes=classes, dropout=dropout, drop_path=drop_path, unit_queries=unit_queries, shared=shared, gate=gate,
        remat=context.remat, dtype=context.dtype,
    )  # fmt: skip

    encoder = stages.encoder(first, 'first')

    def encode(frozen, batch, rng) -> tuple[Array, Array | None]:
        """Codes int32 [n, T] of images, and the transformer's inputs at all scales but the first."""
        return Scales(first, frozen['first']).teacher_forced(encoder.encode(frozen, batch, rng))

    def loss(params, state, frozen, batch, rng):
        encode_rng, label_rng, dropout_rng = jax.random.split(rng, 3)
        codes, inputs = encode(frozen, batch, encode_rng)
        label = label_of(batch, len(codes), conditional)
        if conditional:
            label = jnp.where(jax.random.bernoulli(label_rng, label_dropout, label.shape), classes, label)
        value = code_nats(net, params['transformer'], inputs, label, codes, dropout_rng).mean()
        return value, Aux({'loss': value, 'bits_per_code': value / math.log(2)})

    def init(rng, batch, frozen):
        def inputs_of(frozen, image, rng):
            return encode(frozen, {'image': image}, rng)[1]

        shapes = jax.eval_shape(inputs_of, frozen, batch['image'][:1], rng)
        inputs = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        params = net.init(rng, inputs, jnp.zeros(1, jnp.int32))['params']
        return new_state({'transformer': params}, context.optim)

    def settings():
        return truncation_settings(temperature, top_p) | ({'guidance': guidance} if guidance else {})

    def sample(state, frozen, batch, rng, settings):
        truncate = functools.partial(truncated, top_k=top_k, settings=settings)
        draw_rng, first_rng = jax.random.split(rng)
        keys, scales = example_keys(draw_rng, batch), Scales(first, frozen['first'])
        label = label_of(batch, len(keys), conditional)
        weights = kernels_as(state.ema['transformer'], context.dtype)
        codes = sample_codes(net, weights, scales, label, keys, settings.get('guidance'), truncate)
        return jnp.clip(first.decode(*frozen['first'], batch, codes, first_rng), -1, 1)

    def evaluate(state, frozen, batch, rng):
        codes, inputs = encode(frozen, batch, rng)
        nats = code_nats(net, state.ema['transformer'], inputs, label_of(batch, len(codes), conditional), codes)
        return {'code_nats': nats.sum(1), 'bits_per_code': nats.mean(1) / math.log(2)}

    return Family(
        init,
        make_update(loss, context.optim, 'transformer'),
        by_settings(sample, settings),
        evaluate,
        prepare=encoder.prepare,
        conditions=('label',) if conditional else (),
        divisor=first.divisor,
        free=('guidance', 'temperature', 'top_k', 'top_p'),
        sampling=('guidance', 'temperature', 'top_k', 'top_p'),
        settings=settings,
    )
