"""Transformers over codes: parity with torch's, what depends on what, likelihoods that sum to one, sampling."""

from __future__ import annotations

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from support import random_weights

from jaxgen import config as configs
from jaxgen.config import DEFAULTS
from jaxgen.contract import Family, Latents
from jaxgen.errors import UserError
from jaxgen.families import maskgit, transformer
from jaxgen.networks.attention import attend
from jaxgen.networks.transformer import (
    CausalTransformer,
    MaskedTransformer,
    filtered,
    flatten,
    kernels_as,
    unflatten,
)
from jaxgen.optim import decay_mask, make_optim

slow = pytest.mark.slow  # compiles networks

LEVELS = 3


def toy_first(side=2):
    """Codes are the levels of a grey image of side x side pixels: -1, 0, 1 for LEVELS = 3."""
    scale = (LEVELS - 1) / 2

    def encode(state, frozen, batch, rng):
        return (jnp.round((batch['image'][..., 0] + 1) * scale).astype(jnp.int32),)

    def decode(state, frozen, batch, codes, rng):
        return codes[0][..., None] / scale - 1

    return Family(None, None, None, None, encode, decode, latents=Latents(grids=((side, side),), vocabulary=LEVELS))


FROZEN = {'first': (None, {})}


def context(side=2, **changes):
    return support.context((side, side, 1), **{'stages': {'first': toy_first(side)}, **changes})


@functools.cache
def family(module, side=2, classes=0, **options):
    small = dict(channels=8, blocks=2, heads=2)
    build = module.build(context(side, classes=classes), **{**small, **options})
    state = jax.eval_shape(build.init, jax.random.key(0), {}, {})
    state = random_weights(state)
    return build._replace(sample=jax.jit(build.sample), evaluate=jax.jit(build.evaluate)), state


@pytest.mark.parametrize('causal', [True, False])
@slow
def test_blocks_equal_torchs(causal):
    """Of the same weights, torch's encoder layers give the same: before the norm and causal, or after it and not."""
    torch = pytest.importorskip('torch')
    vocabulary, length, channels, heads = 7, 5, 12, 3
    make = CausalTransformer if causal else MaskedTransformer
    net = make(vocabulary=vocabulary, length=length, channels=channels, blocks=2, heads=heads, dropout=0.0)
    tokens = np.random.default_rng(1).integers(0, vocabulary, (2, length))
    params = random_weights(net.init(jax.random.key(0), jnp.asarray(tokens))['params'])

    def tensor(x):
        return torch.tensor(np.array(x))

    def normed(x, weights, eps):
        return torch.nn.functional.layer_norm(x, (channels,), tensor(weights['scale']), tensor(weights['bias']), eps)

    gelu = 'gelu' if causal else functools.partial(torch.nn.functional.gelu, approximate='tanh')
    eps = 1e-5 if causal else 1e-12
    x = tensor(params['tokens']['embedding'])[tensor(tokens)] + tensor(params['positions'])
    x = x if causal else normed(x, params['embedded'], eps)
    for i in range(2):
        own = jax.tree.map(lambda a, i=i: a[i], params['blocks'])
        layer = torch.nn.TransformerEncoderLayer(
            channels, heads, 4 * channels, 0.0, gelu, eps, batch_first=True, norm_first=causal
        )
        names = {
            'self_attn.in_proj_': 'qkv', 'self_attn.out_proj.': 'out', 'linear1.': 'mlp1', 'linear2.': 'mlp2',
            'norm1.': 'norm1', 'norm2.': 'norm2',
        }  # fmt: skip
        weights = {}
        for theirs, ours in names.items():
            kernel = own[ours]['scale'] if 'norm' in ours else own[ours]['kernel'].T
            weights[theirs + 'weight'], weights[theirs + 'bias'] = tensor(kernel), tensor(own[ours]['bias'])
        layer.load_state_dict(weights)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(length) if causal else None
        x = layer(x, src_mask=mask, is_causal=causal)
    if causal:
        logits = normed(x, params['norm'], eps) @ tensor(params['head']['kernel'])
    else:
        x = x @ tensor(params['head']['kernel']) + tensor(params['head']['bias'])
        x = normed(torch.nn.functional.gelu(x, approximate='tanh'), params['norm'], eps)
        logits = x @ tensor(params['tokens']['embedding']).T + tensor(params['bias'])
    actual = jax.jit(net.apply)({'params': params}, jnp.asarray(tokens))
    np.testing.assert_allclose(actual, logits.detach().numpy(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('causal', [True, False])
def test_dropout_of_attention(causal):
    """Nothing dropped, it is JAX's own attention; with a given mask, a slow loop; and its expectation is the former."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 5, 3, 4)), jnp.float32) for _ in range(3))
    plain = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    np.testing.assert_allclose(attend(q, k, v, causal=causal, drop=lambda w: w), plain, atol=1e-5)
    keep = rng.integers(0, 2, (2, 3, 5, 5)) / 0.5
    slow = np.zeros((2, 5, 3, 4))
    for n, h, i in itertools.product(range(2), range(3), range(5)):
        keys = range(i + 1 if causal else 5)
        w = np.exp([float(q[n, i, h] @ k[n, j, h]) / 2 for j in keys])
        slow[n, i, h] = sum(a * keep[n, h, i, j] * v[n, j, h] for j, a in zip(keys, w / w.sum(), strict=True))
    np.testing.assert_allclose(attend(q, k, v, causal=causal, drop=lambda w: w * keep), slow, atol=1e-5)


@pytest.mark.parametrize('make', [CausalTransformer, MaskedTransformer])
@slow
def test_attention_is_dropped_in_training_alone(make):
    tokens = jnp.zeros((1, 6), jnp.int32)
    net = make(vocabulary=5, length=6, channels=8, blocks=1, heads=2, dropout=0.0, attention_dropout=0.5)
    params = random_weights(net.init(jax.random.key(0), tokens)['params'], scale=1.0)
    plain = net.clone(attention_dropout=0.0).apply({'params': params}, tokens, train=True)
    np.testing.assert_array_equal(net.apply({'params': params}, tokens), plain)
    a, b = (net.apply({'params': params}, tokens, train=True, rngs={'dropout': jax.random.key(i)}) for i in range(2))
    assert np.abs(a - b).max() > 0.01 and np.abs(a - plain).max() > 0.01


@slow
def test_published_weight_decay():
    """The release's of the matrices of linear layers alone."""
    net = CausalTransformer(vocabulary=5, length=6, channels=8, blocks=2, heads=2)
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 6), jnp.int32))['params']
    mask = decay_mask(params, tuple(configs.load('configs/transformer_imagenet256.py').optim.no_decay))
    actual = {'/'.join(key.key for key in path) for path, kept in jax.tree.leaves_with_path(mask) if kept}
    assert actual == {'head/kernel', *(f'blocks/{name}/kernel' for name in ('qkv', 'out', 'mlp1', 'mlp2'))}


@slow
def test_logits_depend_on_earlier_codes_alone():
    net = CausalTransformer(vocabulary=5, length=6, channels=8, blocks=2, heads=2)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (1, 6)))
    params = random_weights(net.init(jax.random.key(0), tokens)['params'])
    apply = jax.jit(net.apply)
    before = apply({'params': params}, tokens)
    for i in range(6):
        after = apply({'params': params}, tokens.at[0, i].set((tokens[0, i] + 1) % 5))
        changed = np.abs(after - before).max(-1)[0] > 1e-6
        np.testing.assert_array_equal(changed, np.arange(6) >= i)


@pytest.mark.parametrize('conditional', [False, True])
def test_probabilities_of_all_images_sum_to_one(conditional):
    options = dict(classes=2, conditional=True) if conditional else {}
    model, state = family(transformer, **options)
    values = np.array(list(itertools.product(range(LEVELS), repeat=4))).reshape(-1, 2, 2, 1)
    batch = {'image': jnp.asarray(values - 1.0), 'index': jnp.arange(len(values))}
    for label in range(2 if conditional else 1):
        actual = model.evaluate(state, FROZEN, {**batch, 'label': jnp.full(len(values), label)}, jax.random.key(0))
        np.testing.assert_allclose(np.exp(-np.asarray(actual['code_nats'], np.float64)).sum(), 1, rtol=1e-5)
        np.testing.assert_allclose(actual['bits_per_code'], actual['code_nats'] / 4 / math.log(2), rtol=1e-5)


@slow
def test_cached_samples_equal_those_of_a_loop_over_whole_sequences():
    """With keys and values cached, every code is the one that the whole network samples by the same key."""
    model, state = family(transformer, side=3, classes=2, conditional=True, temperature=1.3, top_k=2)
    n, length = 4, 9
    label = jnp.array([0, 1, 0, 1])
    samples = model.sample(state, FROZEN, {'index': jnp.arange(n), 'label': label}, jax.random.key(5))
    net = CausalTransformer(vocabulary=LEVELS, length=length, channels=8, blocks=2, heads=2)
    apply = jax.jit(net.apply)
    draw_rng, _ = jax.random.split(jax.random.key(5))
    keys = [jax.random.fold_in(draw_rng, i) for i in range(n)]
    sequence = np.concatenate([label[:, None], np.zeros((n, length), int)], 1)
    for i in range(length):
        logits = apply({'params': state.ema['transformer']}, jnp.asarray(sequence[:, :-1]))[:, i] / 1.3
        for j in range(n):
            row = np.array(logits[j])
            row[row < np.sort(row)[-2]] = -np.inf
            sequence[j, i + 1] = jax.random.categorical(jax.random.fold_in(keys[j], i), jnp.asarray(row))
    np.testing.assert_array_equal(np.round(samples[..., 0] + 1).reshape(n, -1), sequence[:, 1:])


@slow
def test_larger_images_from_windows():
    """Every code of a larger grid is the likeliest by the window of the trained size around it."""
    model, state = family(transformer, side=3, enlarge=2, temperature=0.0)
    samples = model.sample(state, FROZEN, {'index': jnp.arange(1)}, jax.random.key(0))
    assert samples.shape == (1, 6, 6, 1)
    net = CausalTransformer(vocabulary=LEVELS, length=9, channels=8, blocks=2, heads=2)
    apply, grid = jax.jit(net.apply), np.zeros((6, 6), int)
    for row, column in np.ndindex(6, 6):
        top, left = min(max(row - 1, 0), 3), min(max(column - 1, 0), 3)
        window = grid[top : top + 3, left : left + 3].ravel()
        tokens = np.concatenate([[0], window[:-1]])[None]
        logits = apply({'params': state.ema['transformer']}, jnp.asarray(tokens))
        grid[row, column] = logits[0, (row - top) * 3 + column - left].argmax()
    np.testing.assert_array_equal(np.round(samples[0, ..., 0] + 1), grid)


@slow
def test_some_codes_are_replaced_in_training():
    """A network that copies its input, on images of one code all over: its loss is of the replaced ones."""
    images = jnp.asarray(np.random.default_rng(0).integers(0, 3, (512, 1, 1, 1)) - 1.0) * jnp.ones((1, 3, 3, 1))
    net = CausalTransformer(vocabulary=LEVELS, length=9, channels=8, blocks=2, heads=2)
    params = jax.tree.map(jnp.zeros_like, net.init(jax.random.key(0), jnp.zeros((1, 9), jnp.int32))['params'])
    params['tokens']['embedding'] = params['tokens']['embedding'].at[:, :3].set(jnp.eye(3))
    params['norm']['scale'] += 1
    params['head']['kernel'] = params['head']['kernel'].at[:3].set(20 * jnp.eye(3))
    for keep in (1.0, 0.4):
        model = transformer.build(context(3), channels=8, blocks=2, heads=2, keep=keep)
        state = model.init(jax.random.key(0), {}, {}).replace(params={'transformer': params})
        _, logs = jax.jit(model.update)(state, FROZEN, {'image': images}, jax.random.key(1))
        wrong = logs['loss'] / (20 * 8 / math.sqrt(7))  # a wrong code costs the distance of the logits
        # The first code's token is 0, right by chance in a third. Of the eight others a fraction of 1 - keep is
        # replaced, by the right one in a third.
        np.testing.assert_allclose(wrong, (2 / 3 + 8 * (1 - keep) * 2 / 3) / 9, rtol=0.25)


def test_a_fraction_of_the_codes_is_replaced_by_uniform_ones():
    codes = jnp.full((200, 100), 3)
    rngs = jax.random.split(jax.random.key(0))
    actual = transformer.corrupted(*rngs, codes, 0.25, 5)
    counts = np.bincount(np.asarray(actual).ravel(), minlength=5) / codes.size
    np.testing.assert_allclose(counts, [0.15, 0.15, 0.15, 0.25 + 0.15, 0.15], atol=0.015)
    np.testing.assert_array_equal(transformer.corrupted(*rngs, codes, 1.0, 5), codes)


def test_filtered_logits():
    logits = jnp.log(jnp.array([[0.5, 0.1, 0.25, 0.15], [0.25, 0.25, 0.25, 0.25]]))

    def probabilities(**options):
        return np.round(jax.nn.softmax(filtered(logits, **options)), 4)

    np.testing.assert_allclose(probabilities(), np.exp(logits), atol=1e-4)
    np.testing.assert_allclose(probabilities(top_k=2)[0], [2 / 3, 0, 1 / 3, 0], atol=1e-4)
    np.testing.assert_allclose(probabilities(top_p=0.75)[0], [2 / 3, 0, 1 / 3, 0], atol=1e-4)
    np.testing.assert_allclose(probabilities(top_p=0.76)[0], [0.5 / 0.9, 0, 0.25 / 0.9, 0.15 / 0.9], atol=1e-4)
    np.testing.assert_allclose(probabilities(top_p=1e-6)[0], [1, 0, 0, 0], atol=1e-4)
    np.testing.assert_allclose(probabilities(temperature=0.0), [[1, 0, 0, 0], [1, 0, 0, 0]], atol=1e-4)
    squared = np.exp(2 * logits[0]) / np.exp(2 * logits[0]).sum()
    np.testing.assert_allclose(probabilities(temperature=0.5)[0], squared, atol=1e-4)


def test_sequences_of_grids_and_back():
    grids = ((1, 2), (3, 2))
    codes = tuple(jnp.asarray(np.random.default_rng(0).integers(0, 9, (4, *g))) for g in grids)
    sequence = flatten(codes)
    assert sequence.shape == (4, 8)
    np.testing.assert_array_equal(sequence[1, 2:4], codes[1][1, 0])
    for a, b in zip(codes, unflatten(sequence, grids), strict=True):
        np.testing.assert_array_equal(a, b)


# --- MaskGIT


def test_masks_have_the_sizes_of_the_cosine_schedule():
    r = jnp.array([0.0, 0.25, 0.5, 0.9, 1.0])
    masked = maskgit.sample_masks(jax.random.split(jax.random.key(0), 5), r, 16)
    np.testing.assert_array_equal(masked.sum(1), [16, 15, 12, 3, 1])  # ceil(16 cos(pi r / 2)), 1 at least
    keys = jax.random.split(jax.random.key(1), 4000)
    where = maskgit.sample_masks(keys, jnp.full(4000, 2 / 3), 4).mean(0)  # two of four, any two
    np.testing.assert_allclose(where, 0.5, atol=0.04)


@pytest.mark.parametrize('length', [1, 4, 256])
def test_expected_number_of_masked_codes(length):
    r = (np.arange(400_000) + 0.5) / 400_000
    mean = np.maximum(np.ceil(length * np.cos(0.5 * np.pi * r)), 1).mean()
    np.testing.assert_allclose(maskgit.expected_masked(length), mean, rtol=1e-4)


@slow
def test_the_mean_over_masked_codes():
    """Of one image, 'image' divides by its own number of masked codes, 1 to 4 of 4, and 'batch' by the mean number."""
    usual = np.maximum(np.ceil(4 * np.cos(0.5 * np.pi * (np.arange(200_000) + 0.5) / 200_000)), 1).mean()
    one = {'image': jnp.asarray([[[[-1.0], [0.0]], [[1.0], [0.0]]]])}
    updates = {}
    for mean in ('batch', 'image'):
        f, state = family(maskgit, steps=2, dropout=0.0, mean=mean)
        updates[mean] = jax.jit(lambda key, f=f, state=state: f.update(state, FROZEN, one, key)[1]['loss'])
    losses = [[updates[mean](jax.random.key(seed)) for mean in ('batch', 'image')] for seed in range(12)]
    ratios = {round(float(batch / image * usual), 2) for batch, image in losses}
    assert ratios <= {1.0, 2.0, 3.0, 4.0} and len(ratios) > 1


@slow
def test_masked_codes_are_predicted_from_the_others_alone():
    """Bits equal those by hand, where the masked codes are no input of the network."""
    model, state = family(maskgit, side=2, dropout=0.0, steps=4)
    net = MaskedTransformer(vocabulary=LEVELS + 1, length=4, channels=8, blocks=2, heads=2)
    apply = jax.jit(lambda tokens: jax.nn.log_softmax(net.apply({'params': state.ema['transformer']}, tokens)))
    images = jnp.asarray(np.array(list(itertools.product([-1.0, 0.0, 1.0], repeat=4))).reshape(-1, 2, 2, 1))
    codes = np.round(images.reshape(-1, 4) + 1).astype(int)
    actual = model.evaluate(state, FROZEN, {'image': images, 'index': jnp.arange(81)}, jax.random.key(0))
    for i in range(0, 81, 16):
        key, bits = jax.random.fold_in(jax.random.key(0), i), []
        for k in range(8):
            order = jax.random.permutation(jax.random.fold_in(key, k), 4)
            masked = np.asarray(order) < math.ceil(4 * math.cos(math.pi / 2 * (k + 0.5) / 8))
            log_p = apply(jnp.asarray(np.where(masked, LEVELS, codes[i]))[None])[0]
            bits.append(-np.mean([log_p[j, codes[i, j]] for j in np.flatnonzero(masked)]) / math.log(2))
        np.testing.assert_allclose(actual['masked_bits'][i], np.mean(bits), rtol=1e-4)


@slow
def test_parallel_decoding_equals_a_slow_loop():
    """Step by step in numpy: the most confident codes are kept, none that is settled changes, all are settled."""
    steps, n, length = 4, 3, 9
    model, state = family(maskgit, side=3, classes=2, conditional=True, steps=steps, choice_temperature=2.0)
    label = jnp.array([0, 1, 1])
    samples = model.sample(state, FROZEN, {'index': jnp.arange(n), 'label': label}, jax.random.key(3))
    net = MaskedTransformer(vocabulary=LEVELS + 3, length=length + 1, channels=8, blocks=2, heads=2)
    apply = jax.jit(net.apply)
    draw_rng, _ = jax.random.split(jax.random.key(3))
    for j in range(n):
        key = jax.random.fold_in(draw_rng, j)
        tokens = np.full(length, LEVELS + 2)
        for t in range(steps):
            draw_key, choice_key = jax.random.split(jax.random.fold_in(key, t))
            inputs = np.concatenate([[LEVELS + int(label[j])], tokens])[None]
            logits = apply({'params': state.ema['transformer']}, jnp.asarray(inputs))[0, 1:, :LEVELS]
            codes = np.array(jax.random.categorical(draw_key, logits))
            log_p = np.asarray(jax.nn.log_softmax(logits))
            unknown = np.flatnonzero(tokens == LEVELS + 2)
            tokens[unknown] = codes[unknown]
            left = math.floor(length * math.cos(math.pi / 2 * (t + 1) / steps)) if t + 1 < steps else 0
            noise = np.asarray(jax.random.gumbel(choice_key, (length,)))
            confidence = log_p[np.arange(length), codes] + 2.0 * (1 - (t + 1) / steps) * noise
            again = sorted(unknown, key=lambda i: confidence[i])[: min(left, len(unknown) - 1)]
            tokens[again] = LEVELS + 2
        assert (tokens < LEVELS).all()
        np.testing.assert_array_equal(np.round(samples[j, ..., 0] + 1).ravel(), tokens)


@pytest.mark.parametrize('module', [transformer, maskgit])
@slow
def test_learns_what_codes_go_together(module):
    """Images of one code all over: after training samples are so too, and of the requested class."""
    first = context(
        side=2, classes=2, optim=make_optim(150, **{**DEFAULTS['optim'], 'lr': 1e-2, 'warmup': 10, 'ema': 0.9})
    )
    options = dict(dropout=0.0) if module is transformer else dict(dropout=0.0, smoothing=0.0, steps=4)
    model = module.build(first, channels=16, blocks=1, heads=2, conditional=True, **options)
    label = jnp.arange(32) % 2
    batch = {'image': jnp.broadcast_to((2.0 * label - 1)[:, None, None, None], (32, 2, 2, 1)), 'label': label}
    state = model.init(jax.random.key(0), batch, FROZEN)

    @jax.jit
    def train(state):
        return jax.lax.scan(
            lambda s, k: model.update(s, FROZEN, batch, k), state, jax.random.split(jax.random.key(1), 150)
        )

    state, logs = train(state)
    assert logs['loss'][-1] < 0.05 < logs['loss'][0]
    samples = model.sample(state, FROZEN, {'index': jnp.arange(8), 'label': label[:8]}, jax.random.key(2))
    np.testing.assert_array_equal(samples, batch['image'][:8])


@pytest.mark.parametrize(
    'module, options, words',
    [
        (transformer, {'heads': 3}, 'heads'),
        (transformer, {'keep': 0.0}, 'keep'),
        (transformer, {'enlarge': 0}, 'enlarge'),
        (transformer, {'conditional': True}, 'labels'),
        (maskgit, {'steps': 5}, 'steps'),
        (maskgit, {'temperature': 0.0}, 'temperature'),
        (maskgit, {'conditional': True}, 'labels'),
    ],
)
def test_refuses(module, options, words):
    with pytest.raises(UserError, match=words):
        module.build(context(), **options)
    with pytest.raises(UserError, match='codes'):
        module.build(context(stages={}))
    with pytest.raises(UserError, match='codes'):
        module.build(context(stages={'first': toy_first()._replace(latents=Latents(grids=()))}))


# --- The cache


def moved_in_loops(compiled, size: int) -> list[str]:
    """Instructions in the loops of a compiled program that write an array of so many numbers anew."""
    moved, inside = [], False
    for line in compiled.as_text().splitlines():
        if line and not line.startswith((' ', '}')):
            inside = not line.startswith('ENTRY')
        match = re.match(r'\s+(?:ROOT )?\S+ = \w+\[([\d,]+)\]\S* (copy|transpose|concatenate|reshape)\(', line)
        if inside and match and math.prod(map(int, match[1].split(','))) == size:
            moved.append(line.strip())
    return moved


def test_the_cache_is_written_in_place():
    """No token copies, transposes or appends to the keys or values, of all blocks or of one."""
    net = CausalTransformer(vocabulary=5, length=11, channels=14, blocks=3, heads=2)
    weights = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 11), jnp.int32))['params']
    n, draw = 5, functools.partial(transformer.draw_code, top_k=0, settings={'temperature': 1.0})
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n))
    function = jax.jit(lambda w, start, keys: transformer.sample_codes(net, w, start, keys, draw))
    compiled = function.lower(weights, jax.ShapeDtypeStruct((n, 1), jnp.int32), keys).compile()
    assert 'while(' in compiled.as_text() and f'f32[3,{n},2,11,7]' in compiled.as_text()
    for size in (3 * n * 11 * 14, n * 11 * 14):
        assert moved_in_loops(compiled, size) == []


def test_kernels_are_cast_once():
    """In half precision no loop makes kernels of the float32 ones, and the codes are those of weights as they were."""
    net = CausalTransformer(vocabulary=5, length=6, channels=12, blocks=2, heads=2, dtype=jnp.bfloat16)
    weights = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 6), jnp.int32))['params']
    weights = random_weights(weights)
    cast = kernels_as(weights, jnp.bfloat16)
    names = {path[-1].key: x.dtype for path, x in jax.tree_util.tree_leaves_with_path(cast)}
    assert names['kernel'] == jnp.bfloat16 and {*names.values()} == {jnp.dtype('bfloat16'), jnp.dtype('float32')}
    tokens = jnp.arange(6)[None] % 5
    np.testing.assert_array_equal(*(jax.jit(net.apply)({'params': w}, tokens) for w in (weights, cast)))
