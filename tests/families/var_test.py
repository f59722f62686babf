"""VAR: the multi-scale quantiser and the transformer against torch, causality, sampling, likelihoods, sizes."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from support import random_weights

from jaxgen import config as configs
from jaxgen.contract import Family, Latents
from jaxgen.errors import UserError
from jaxgen.families import var, vqgan
from jaxgen.networks import multiscale
from jaxgen.networks.first_stage import Decoder, Encoder
from jaxgen.networks.multiscale import MultiScale, enlarged, shrunk
from jaxgen.networks.transformer import flatten
from jaxgen.networks.var import Block, VARTransformer
from jaxgen.optim import decay_mask

slow = pytest.mark.slow  # compiles networks


def weights_of(net, *args, **options):
    return random_weights(jax.eval_shape(net.init, jax.random.key(0), *args)['params'], **options)


def nchw(torch, x):
    return torch.tensor(np.array(x)).movedim(-1, 1)


# --- the quantiser


@pytest.mark.parametrize('size, to', [((7, 5), (3, 4)), ((16, 16), (13, 6)), ((4, 6), (4, 6)), ((2, 3), (1, 1))])
@slow
def test_sizes_change_as_in_torch(size, to):
    interpolate = pytest.importorskip('torch').nn.functional.interpolate
    import torch

    for x, expected, resize, mode in [(size, to, shrunk, 'area'), (to, size, enlarged, 'bicubic')]:
        x = np.random.default_rng(0).normal(size=(2, *x, 3)).astype(np.float32)
        reference = interpolate(nchw(torch, x), size=expected, mode=mode).movedim(1, -1)
        np.testing.assert_allclose(resize(jnp.asarray(x), expected), reference, atol=1e-5)


def test_scales_share_convolutions():
    published = [multiscale.phi_of(k, 10, 4) for k in range(10)]
    assert published == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert multiscale.phi_of(0, 1, 4) == 0
    assert multiscale.grids_of((1, 2, 3, 5), (5, 10)) == ((1, 2), (2, 4), (3, 6), (5, 10))


GRIDS = ((1, 1), (2, 3), (3, 5), (5, 6))


@functools.cache
def quantiser():
    net = MultiScale(GRIDS, 3)
    rng = np.random.default_rng(1)
    z, book = (jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in ((2, 5, 6, 3), (9, 3)))
    params = weights_of(net, z, book)
    assert len(params) == 4
    return net, params, z, book


@slow
def test_quantiser_and_its_gradients_equal_torchs():
    torch = pytest.importorskip('torch')
    interpolate = torch.nn.functional.interpolate
    net, params, z, book = quantiser()

    # Algorithm 1, with one codebook and four convolutions.
    vectors = torch.tensor(np.array(book), requires_grad=True)
    convolutions = []
    for k in range(4):
        conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        own = params[f'phi_{k}']
        conv.weight.data = torch.tensor(np.array(own['kernel'])).permute(3, 2, 0, 1)
        conv.bias.data = torch.tensor(np.array(own['bias']))
        convolutions.append(conv)
    x = nchw(torch, z)
    rest, total, sums, codes = x, torch.zeros_like(x), [], []
    for grid, k in zip(GRIDS, range(4), strict=True):
        small = interpolate(rest, size=grid, mode='area').movedim(1, -1)
        codes.append(torch.cdist(small.reshape(-1, 3), vectors.detach()).argmin(-1).reshape(2, *grid))
        large = interpolate(vectors[codes[-1]].movedim(-1, 1), size=(5, 6), mode='bicubic')
        part = 0.5 * large + 0.5 * convolutions[k](large)
        rest, total = rest - part.detach(), total + part
        sums.append(total)
    loss = sum(torch.square(s - x).mean() * (i + 1) for i, s in enumerate(sums))
    loss.backward()

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def gradients(params, book, z):
        looked_up, actual, codes = net.apply({'params': params}, z, book)
        loss = sum(jnp.square(s - jax.lax.stop_gradient(z)).mean() * (i + 1) for i, s in enumerate(actual))
        return loss, (looked_up, actual, codes)

    (of_phi, of_book, of_z), (looked_up, actual, actual_codes) = gradients(params, book, z)
    assert [q.shape for q in looked_up] == [(2, *grid, 3) for grid in GRIDS]
    assert len({int(c) for grid in actual_codes for c in grid.ravel()}) > 4
    for a, b in zip(actual_codes, codes, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(actual, sums, strict=True):
        np.testing.assert_allclose(a, b.detach().movedim(1, -1), atol=2e-5)
    np.testing.assert_allclose(of_book, vectors.grad, atol=2e-5)
    for k in range(4):
        np.testing.assert_allclose(
            of_phi[f'phi_{k}']['kernel'], convolutions[k].weight.grad.permute(2, 3, 1, 0), atol=2e-5
        )
    assert not of_z.any()


@slow
def test_parts_add_up():
    net, params, z, book = quantiser()
    _, sums, codes = net.apply({'params': params}, z, book)
    parts = [net.apply({'params': params}, c, book, k, method='added') for k, c in enumerate(codes)]
    np.testing.assert_allclose(sum(parts), sums[-1], atol=1e-5)
    assert all(p.shape == z.shape for p in parts)
    with pytest.raises(UserError, match='size'):
        net.apply({'params': params}, z[:, :4], book)


# --- the first stage


RATE = 1e-2
SIZES = dict(channels=4, multipliers=(1, 1), blocks=1, latent_kernel=3)
SCALES = (1, 2, 4)


def grids():
    return multiscale.grids_of(SCALES, (4, 4))


@functools.cache
def first_stage():
    f = vqgan.build(
        support.context(optim=support.sgd(RATE)), regulariser='vq', **SIZES, latent=3, vocabulary=7, scales=SCALES,
        perceptual=0.0, adversarial=0.0, beta=0.3, codebook_weight=2.0, restart=0.5,
    )  # fmt: skip
    x = {'image': jax.random.uniform(jax.random.key(0), (4, 8, 8, 1), minval=-1, maxval=1)}
    start = jax.eval_shape(f.init, jax.random.key(1), x, {})
    params, extra = random_weights(start.params), {'count': jnp.ones(start.extra['count'].shape)}
    params['codebook'] = {'embedding': 3 * params['codebook']['embedding']}
    return f, jax.jit(f.update), random_weights(start).replace(params=params, ema=params, extra=extra), x


@slow
def test_first_stage_takes_plain_gradient_steps():
    """Straight through to the encoder, the commitment to its latents, the rest to the codebook and the convolutions."""
    _, update, state, x = first_stage()
    encoder, decoder, net = Encoder(outputs=3, **SIZES), Decoder(image_channels=1, **SIZES), MultiScale(grids(), 3)

    @jax.jit
    @jax.grad
    def plain(params):
        z = encoder.apply({'params': params['encoder']}, x['image'])
        _, sums, _ = net.apply({'params': params['phi']}, z, params['codebook']['embedding'])
        y, _ = decoder.apply({'params': params['decoder']}, z + jax.lax.stop_gradient(sums[-1] - z))
        fixed, loss = jax.lax.stop_gradient((z, sums)), jnp.abs(y - x['image']).mean()
        for of_codes, of_z in zip(sums, fixed[1], strict=True):
            loss += 2 / 3 * (jnp.square(of_codes - fixed[0]).mean() + 0.3 * jnp.square(z - of_z).mean())
        return loss

    gradient = plain(state.params)
    after, logs = update(state, {}, x, jax.random.key(2))
    counts = np.asarray(after.extra['count'])
    met = counts.sum(0) > 1.5  # others start anew, with a count of 1
    assert met.sum() > 3
    largest = max(jnp.abs(g).max() for g in jax.tree.leaves(gradient))
    for name in ('encoder', 'decoder', 'codebook', 'phi'):
        assert any(np.abs(g).max() > 1e-3 * largest for g in jax.tree.leaves(gradient[name])), name
        trees = [tree[name] for tree in (state.params, after.params, gradient)]
        if name == 'codebook':
            trees = [tree['embedding'][met] for tree in trees]
        for old, new, slope in zip(*map(jax.tree.leaves, trees), strict=True):
            np.testing.assert_allclose((old - new) / RATE, slope, rtol=2e-3, atol=1e-3 * largest)
    np.testing.assert_allclose(counts[:, met].sum(1), [4, 16, 64], rtol=1e-5)
    for k in range(3):
        np.testing.assert_allclose(logs[f'usage/scale{k}'], (counts[k, met] > 0.5).sum() / 7, rtol=1e-5)
    np.testing.assert_allclose(logs['usage'], met.mean(), rtol=1e-5)


@slow
def test_first_stage_encodes_decodes_and_samples_by_scale():
    f, _, state, x = first_stage()
    assert f.latents.grids == grids() and f.latents.vocabulary == 7
    # Where training used one code a scale, samples are made of these.
    count = jnp.zeros((3, 7)).at[jnp.arange(3), jnp.array([5, 0, 3])].set(1e9)
    only = tuple(jnp.full((4, *grid), c) for grid, c in zip(grids(), (5, 0, 3), strict=True))

    @jax.jit
    def everything(state, x):
        rng, index = jax.random.key(0), {'index': jnp.arange(4)}
        codes = f.encode(state, {}, x, rng)
        total = sum(f.embed(state, {}, c, k) for k, c in enumerate(codes))
        by_hand = Decoder(image_channels=1, **SIZES).apply({'params': state.ema['decoder']}, total)[0]
        again, metrics = f.decode(state, {}, {}, codes, rng), f.evaluate(state, {}, x | index, rng)
        samples = f.sample(state.replace(extra={'count': count}), {}, index, rng)
        return again, jnp.clip(by_hand, -1, 1), metrics, samples, f.decode(state, {}, {}, only, rng)

    again, by_hand, metrics, samples, expected = everything(state, x)
    np.testing.assert_allclose(again, by_hand, atol=1e-5)
    np.testing.assert_allclose(metrics['absolute_error'], jnp.abs(again - x['image']).mean((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(metrics['bits_per_code'], math.log2(7), rtol=1e-4)  # none was counted yet
    np.testing.assert_allclose(samples, expected, atol=1e-5)
    assert again.std() > 0.05


@slow
def test_codes_that_no_scale_uses_are_restarted():
    _, update, state, x = first_stage()
    far = {'embedding': jnp.full((7, 3), 1e3, jnp.float32).at[2].set(jnp.array([0.5, -0.5, 0.2]))}
    state, logs = update(state.replace(params=state.params | {'codebook': far}), {}, x, jax.random.key(0))
    np.testing.assert_allclose(logs['usage'], 1 / 7, rtol=1e-6)
    book, counts = np.asarray(state.params['codebook']['embedding']), np.asarray(state.extra['count'])
    assert np.abs(np.delete(book, 2, 0)).max() < 100 and len(np.unique(book, axis=0)) == 7
    np.testing.assert_allclose(counts[:, 2], [4, 16, 64], rtol=1e-5)
    np.testing.assert_allclose(np.delete(counts.sum(0), 2), 1, rtol=1e-5)


@pytest.mark.parametrize('options, words', [
    ({'scales': (1, 2)}, 'rise from 1'),
    ({'scales': (2, 1, 4)}, 'rise from 1'),
    ({'scales': (0, 4)}, 'rise from 1'),
    ({'scales': (1, 4), 'regulariser': 'kl'}, 'vq'),
    ({'latent_kernel': -1}, 'latent_kernel'),
])  # fmt: skip
def test_first_stage_refuses(options, words):
    fine = dict(regulariser='vq', multipliers=(1, 1), perceptual=0.0, adversarial=0.0)
    with pytest.raises(UserError, match=words):
        vqgan.build(support.context(), **{**fine, **options})


# --- the transformer

MAPS, LEVELS, D = ((1, 1), (1, 2), (2, 2)), 2, 3  # grids of a toy first stage, its codes, the length of their vectors
TABLE = np.random.default_rng(7).normal(size=(len(MAPS), LEVELS, D)).astype(np.float32)
LENGTHS = [h * w for h, w in MAPS]
SMALL = dict(channels=8, blocks=2, heads=2)


def toy_first():
    """Images [n, 7, 1, 1] of values -1 and 1 are the codes, one after another."""

    def encode(state, frozen, batch, rng):
        flat = jnp.split((batch['image'][:, :, 0, 0] > 0).astype(jnp.int32), np.cumsum(LENGTHS)[:-1], 1)
        return tuple(c.reshape(-1, *grid) for c, grid in zip(flat, MAPS, strict=True))

    def decode(state, frozen, batch, codes, rng):
        return 2.0 * flatten(codes)[..., None, None] - 1

    def embed(state, frozen, codes, k):
        return enlarged(jnp.asarray(TABLE)[k][codes], MAPS[-1])

    return Family(None, None, None, None, encode, decode, embed=embed, latents=Latents(grids=MAPS, vocabulary=LEVELS))


FROZEN = {'first': (None, {})}


def context(**changes):
    return support.context((7, 1, 1), **{'classes': 3, 'stages': {'first': toy_first()}, **changes})


def inputs_of(codes) -> jax.Array:
    """The inputs of the tokens of the second and third scale, [n, 6, D], for codes [n, 7]."""
    first = toy_first()
    codes = first.encode(None, {}, {'image': 2.0 * jnp.asarray(codes)[..., None, None] - 1}, None)
    one = first.embed(None, {}, codes[0], 0)
    two = one + first.embed(None, {}, codes[1], 1)
    return jnp.concatenate([one.mean(1).reshape(-1, 2, D), two.reshape(-1, 4, D)], 1)


@functools.cache
def network(**options):
    net = VARTransformer(vocabulary=LEVELS, grids=MAPS, classes=3, **{**SMALL, **options})
    params = weights_of(net, jnp.zeros((1, 6, D)), jnp.zeros(1, jnp.int32))
    return net, params, jax.jit(net.apply, static_argnums=4)


@pytest.mark.parametrize('shared', [False, True])
@slow
def test_published_weight_decay(shared):
    """The release's: of matrices and the classes' embedding, not of biases, starts, positions, scales of attention, nor
    of the tables that blocks add to a shared modulation."""
    config = configs.load(f'configs/var_imagenet256.py{":d36" if shared else ""}')
    net = VARTransformer(vocabulary=LEVELS, grids=MAPS, classes=3, **SMALL, shared=shared)
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 6, D)), jnp.zeros(1, jnp.int32))['params']
    mask = jax.tree.leaves_with_path(decay_mask(params, tuple(config.optim.no_decay)))
    actual = {'/'.join(key.key for key in path) for path, kept in mask if kept}
    matrices = {f'blocks/{name}/kernel' for name in ('qkv', 'out', 'mlp1', 'mlp2')}
    matrices |= {'modulation/kernel' if shared else 'blocks/modulation/kernel', 'head_modulation/kernel'}
    assert actual == matrices | {'label/embedding', 'words/kernel', 'head/kernel'}


@functools.cache
def family(**options):
    model = var.build(context(), **{**SMALL, 'conditional': True, **options})
    state = jax.eval_shape(model.init, jax.random.key(0), {'image': jnp.zeros((2, 7, 1, 1))}, FROZEN)
    return model, random_weights(state)


@pytest.mark.parametrize('unit_queries, shared', [(True, False), (False, True)])
@slow
def test_transformer_equals_torchs(unit_queries, shared):
    torch = pytest.importorskip('torch')
    F = torch.nn.functional
    _, params, apply = network(unit_queries=unit_queries, shared=shared)
    inputs = np.random.default_rng(3).normal(size=(3, 6, D)).astype(np.float32)
    label = np.array([2, 0, 3])
    p = jax.tree.map(lambda a: torch.tensor(np.array(a)), params)
    if unit_queries:
        params['blocks']['log_scale'] = params['blocks']['log_scale'].at[1, 0].set(9.0)  # above the most there may be
        p['blocks']['log_scale'][1, 0] = 9.0

    def linear(x, weights):
        return x @ weights['kernel'] + weights.get('bias', 0)

    def norm(x, scale, shift):
        return F.layer_norm(x, (8,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def heads(x):
        return x.unflatten(-1, (2, 4)).transpose(1, 2)  # [n, heads, T, 4]

    condition = p['label']['embedding'][label]
    x = torch.cat([condition[:, None] + p['start'], linear(torch.tensor(inputs), p['words'])], 1)
    level = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    x = x + p['positions'] + p['levels'][level]
    attends = level[:, None] >= level[None]
    for i in range(2):
        b = jax.tree.map(lambda a, i=i: a[i], p['blocks'])
        if shared:
            m = linear(F.silu(condition), p['modulation']) + b['modulation']
        else:
            m = linear(F.silu(condition), b['modulation'])
        gate1, gate2, scale1, scale2, shift1, shift2 = m.unflatten(-1, (6, 8)).unbind(1)
        q, k, v = linear(norm(x, scale1, shift1), b['qkv']).chunk(3, -1)
        q, k, v = heads(q + b['bias'][0]), heads(k), heads(v + b['bias'][1])
        if unit_queries:
            factor = b['log_scale'].clamp_max(math.log(100)).exp()[:, None, None]
            scores = factor * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        else:
            scores = 0.25 / 2 * q @ k.mT
        attended = scores.masked_fill(~attends, -math.inf).softmax(-1) @ v
        x = x + gate1[:, None] * linear(attended.transpose(1, 2).flatten(2), b['out'])
        h = F.gelu(linear(norm(x, scale2, shift2), b['mlp1']), approximate='tanh')
        x = x + gate2[:, None] * linear(h, b['mlp2'])
    scale, shift = linear(F.silu(condition), p['head_modulation']).chunk(2, -1)
    logits = linear(norm(x, scale, shift), p['head'])
    assert logits.std() > 0.1
    actual = apply({'params': params}, jnp.asarray(inputs), jnp.asarray(label), None, 0)
    np.testing.assert_allclose(actual, logits, rtol=2e-4, atol=2e-4)


@slow
def test_scale_by_scale_with_a_cache_is_the_whole():
    net, params, apply = network()
    inputs, label = random_weights(jnp.zeros((2, 6, D))), jnp.array([1, 3])
    whole = apply({'params': params}, inputs, label, None, 0)
    cache, parts = net.empty_cache(2), []
    for k, part in enumerate([None, inputs[:, :2], inputs[:, 2:]]):
        logits, cache = apply({'params': params}, part, label, cache, k)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)
    assert cache[0].shape == (2, 2, 7, 2, 4)


@slow
def test_logits_depend_on_coarser_scales_alone():
    """The codes of a scale, by the sum of the scales, change logits of finer scales, and of no others."""
    _, params, apply = network()
    level = np.repeat(np.arange(3), LENGTHS)
    codes = np.random.default_rng(0).integers(0, LEVELS, (1, 7))
    before = apply({'params': params}, inputs_of(codes), jnp.array([0]), None, 0)
    for i in range(7):
        other = codes.copy()
        other[0, i] = 1 - other[0, i]
        after = apply({'params': params}, inputs_of(other), jnp.array([0]), None, 0)
        changed = np.abs(after - before).max(-1)[0] > 1e-6
        np.testing.assert_array_equal(changed, level > level[i])


def test_probabilities_of_all_codes_sum_to_one():
    model, state = family()
    images = 2.0 * np.array(list(itertools.product(range(LEVELS), repeat=7)))[..., None, None] - 1
    batch = {'image': jnp.asarray(images), 'index': jnp.arange(128), 'label': jnp.full(128, 2)}
    actual = jax.jit(model.evaluate)(state, FROZEN, batch, jax.random.key(0))
    np.testing.assert_allclose(np.exp(-np.asarray(actual['code_nats'], np.float64)).sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(actual['bits_per_code'], actual['code_nats'] / 7 / math.log(2), rtol=1e-5)
    assert np.std(actual['code_nats']) > 0.1


def test_guidance_grows_with_the_scale():
    with_class, without = jnp.array([2.0, -1.0]), jnp.array([1.0, 0.5])
    for k, t in enumerate([0.0, 0.5, 1.0, 1.5]):
        actual = var.guided(with_class, without, 1.5, k, 4)
        np.testing.assert_allclose(actual, (1 + t) * with_class - t * without, rtol=1e-6)
    np.testing.assert_array_equal(var.guided(with_class, without, 1.5, 0, 1), with_class)


@slow
def test_cached_samples_equal_those_of_whole_passes():
    """With a cache, every scale is the one that the whole network samples from guided logits, by the same keys."""
    model, state = family(guidance=2.0, temperature=1.3)
    _, _, apply = network()
    label, n = jnp.array([1, 0, 2]), 3
    samples = jax.jit(model.sample)(state, FROZEN, {'index': jnp.arange(n), 'label': label}, jax.random.key(5))
    keys = [jax.random.fold_in(jax.random.split(jax.random.key(5))[0], i) for i in range(n)]
    variables, codes = {'params': state.ema['transformer']}, np.zeros((n, 7), int)
    for k, (begin, length) in enumerate(zip((0, 1, 3), LENGTHS, strict=True)):
        own, none = (apply(variables, inputs_of(codes), of, None, 0) for of in (label, jnp.full(n, 3)))
        logits = ((1 + k) * own - k * none)[:, begin : begin + length] / 1.3  # t = 2 k / 2
        for j in range(n):
            codes[j, begin : begin + length] = jax.random.categorical(jax.random.fold_in(keys[j], k), logits[j])
    np.testing.assert_array_equal(samples[..., 0, 0], 2 * codes - 1)


@slow
def test_labels_are_dropped():
    """With nearly all labels dropped, the loss is that of no class."""
    model, state = family(label_dropout=0.9999)
    images = jnp.asarray(2.0 * np.random.default_rng(0).integers(0, 2, (4, 7, 1, 1)) - 1)
    update = jax.jit(model.update)
    losses = [
        update(state, FROZEN, {'image': images, 'label': jnp.full(4, label)}, jax.random.key(0))[1]['loss']
        for label in (0, 3)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)


@slow
def test_whole_branches_are_dropped():
    """Both branches of a block for p^2 of the examples, and those that are left are as much larger."""
    block = Block(
        heads=2, blocks=1, std=0.5, gate=1.0, unit_queries=True, shared=False, dropout=0.0, drops_path=True,
        train=True, dtype=jnp.float32, lengths=(3,),
    )  # fmt: skip
    n, p = 2000, 0.4
    x, condition = (jnp.broadcast_to(random_weights(jnp.zeros(s), i), (n, *s)) for i, s in enumerate([(3, 8), (8,)]))
    params = weights_of(block, (x[:1], None), None, jnp.float32(p), condition[:1])

    @functools.partial(jax.jit, static_argnums=0)
    def change(train, params):
        return (
            block.clone(train=train).apply(
                {'params': params}, (x, None), None, jnp.float32(p), condition, rngs={'dropout': jax.random.key(1)}
            )[0][0]
            - x
        )

    changed = np.abs(change(True, params)).max((1, 2)) > 0  # by one branch or both
    np.testing.assert_allclose(changed.mean(), 1 - p**2, atol=0.04)
    alone = params | {'mlp2': jax.tree.map(jnp.zeros_like, params['mlp2'])}  # the attention's branch alone
    whole, dropped = change(False, alone)[0], np.asarray(change(True, alone))
    kept = np.abs(dropped).max((1, 2)) > 0
    np.testing.assert_allclose(kept.mean(), 1 - p, atol=0.04)
    np.testing.assert_allclose(
        dropped[kept], np.broadcast_to(whole / (1 - p), dropped[kept].shape), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize('options, words', [
    ({'heads': 3}, 'heads'),
    ({'drop_path': 1.0}, 'drop_path'),
    ({'temperature': -1.0}, 'temperature'),
    ({'guidance': 1.0, 'conditional': False}, 'guidance needs'),
    ({'guidance': 1.0, 'label_dropout': 0.0}, 'guidance needs'),
])  # fmt: skip
def test_refuses(options, words):
    with pytest.raises(UserError, match=words):
        var.build(context(), **{**SMALL, 'conditional': True, **options})
    with pytest.raises(UserError, match='labels'):
        var.build(context(classes=0), conditional=True)
    with pytest.raises(UserError, match='codes'):
        var.build(context(stages={}))
    with pytest.raises(UserError, match='scales of one map'):
        var.build(context(stages={'first': toy_first()._replace(embed=None)}))
