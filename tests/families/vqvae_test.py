"""VQ-VAE: networks against torch, codebooks and their counts, two levels, sizes."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import entropy
from support import sgd

from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import vqvae
from jaxgen.networks import quantise
from jaxgen.networks.resnet_autoencoder import Pyramid, PyramidDecoder

SMALL = dict(width=4, blocks=1, hidden=2, halvings=1, vocabulary=6, latent=3)
KEY = jax.random.key(0)


def family(image=(8, 8, 1), optim=None, **model):
    f = vqvae.build(Context(image, 0, optim or sgd(0.01, newest=0.5)), **{**SMALL, **model})
    names = ('init', 'update', 'evaluate', 'encode', 'decode')
    return f._replace(**{name: jax.jit(getattr(f, name)) for name in names})


def start(network, *args):
    """Weights of a network, with biases that are not 0."""
    leaves, tree = jax.tree.flatten(jax.jit(lambda key: network.init(key, *args)['params'])(KEY))
    rng = np.random.default_rng(3)
    return tree.unflatten([p + 0.1 * rng.normal(size=p.shape).astype(np.float32) for p in leaves])


def apply(network, params, *args):
    return jax.jit(lambda params: network.apply({'params': params}, *args))(params)


def images(n: int = 8, image=(8, 8, 1), seed: int = 0) -> dict:
    return {'image': jax.random.uniform(jax.random.key(seed), (n, *image), minval=-1, maxval=1)}


class Torch:
    """The networks with torch's functions, NCHW, on the same weights."""

    def __init__(self, params, blocks: int, halvings: int, rectified: bool):
        import torch

        self.torch, self.f = torch, torch.nn.functional
        self.blocks, self.halvings, self.rectified = blocks, halvings, rectified
        self.params = jax.tree.map(lambda a: torch.from_numpy(np.array(a)), params)

    def conv(self, x, p, stride: int = 1):
        kernel = p['kernel'] if p['kernel'].ndim == 4 else p['kernel'][None, None]
        kernel = kernel.permute(3, 2, 0, 1)
        return self.f.conv2d(x, kernel, p['bias'], stride, padding=(kernel.shape[-1] - 1) // 2)

    def transposed(self, x, p):
        kernel = p['kernel'].flip(0, 1).permute(2, 3, 0, 1)
        return self.f.conv_transpose2d(x, kernel, p['bias'], stride=2, padding=1)

    def stack(self, x, p):
        for i in range(self.blocks):
            block = p[f'block{i}']
            x = x + self.conv(self.conv(x.relu(), block['conv1']).relu(), block['conv2'])
        return x.relu()

    def encoder(self, x, p, halvings: int):
        for i in range(halvings):
            x = self.conv(x, p[f'down{i}'], 2).relu()
        x = self.conv(x, p['conv'])
        return self.stack(x.relu() if self.rectified else x, p['stack'])

    def decoder(self, z, p, halvings: int):
        x = self.stack(self.conv(z, p['conv']), p['stack'])
        for i in range(halvings - 1):
            x = self.transposed(x, p[f'up{i}']).relu()
        return self.transposed(x, p['last'])


def to_torch(t: Torch, x):
    return t.torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def back(x) -> np.ndarray:
    return x.permute(0, 2, 3, 1).numpy()


@pytest.mark.slow
def test_one_level_is_torchs():
    pytest.importorskip('torch')
    sizes = dict(width=6, blocks=2, hidden=5, halvings=3)
    encoder, decoder = Pyramid(levels=1, latent=4, **sizes), PyramidDecoder(**sizes)
    x = images(2, (16, 8, 3))['image']
    params = start(encoder, x, lambda level, z: z)
    t = Torch(params, 2, 3, True)
    (z,) = apply(encoder, params, x, lambda level, z: z)
    slow = t.conv(t.encoder(to_torch(t, x), t.params['encoder0'], 3), t.params['latent0'])
    assert z.shape == (2, 2, 1, 4)
    np.testing.assert_allclose(z, back(slow), rtol=1e-4, atol=1e-5)
    params = start(decoder, (z,))
    t = Torch(params, 2, 3, True)
    slow = t.decoder(to_torch(t, z), t.params['decoder'], 3)
    np.testing.assert_allclose(apply(decoder, params, (z,)), back(slow), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_levels_are_torchs():
    pytest.importorskip('torch')
    sizes = dict(width=4, blocks=1, hidden=3, halvings=2)
    encoder, decoder = Pyramid(levels=2, latent=3, rectified=False, **sizes), PyramidDecoder(**sizes)
    x = images(2, (8, 16, 3))['image']
    params = start(encoder, x, lambda level, z: z)
    t = Torch(params, 1, 2, False)
    p = t.params
    top, bottom = apply(encoder, params, x, lambda level, z: jnp.round(z))
    fine = t.encoder(to_torch(t, x), p['encoder0'], 2)
    slow_top = t.conv(t.encoder(fine, p['encoder1'], 1), p['latent0'])
    above = t.decoder(slow_top.round(), p['decoder0'], 1)
    slow_bottom = t.conv(t.torch.cat([above, fine], 1), p['latent1'])
    assert top.shape == (2, 1, 2, 3) and bottom.shape == (2, 2, 4, 3)
    np.testing.assert_allclose(top, back(slow_top), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bottom, back(slow_bottom), rtol=1e-4, atol=1e-5)
    params = start(decoder, (top, bottom))
    t = Torch(params, 1, 2, False)
    both = t.torch.cat([t.transposed(to_torch(t, top), t.params['double0']), to_torch(t, bottom)], 1)
    out = apply(decoder, params, (top, bottom))
    np.testing.assert_allclose(out, back(t.decoder(both, t.params['decoder'], 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('model, counts', [
    # Sonnet's example: encoder 364,160, 1x1 convolution before the codes 8,256, decoder, codebook.
    (dict(codebook='loss'), dict(encoder=364_160 + 8_256, decoder=290_307, codebook=32_768)),
    (dict(codebook='ema'), dict(encoder=364_160 + 8_256, decoder=290_307)),
    (dict(levels=2), dict(encoder=959_232, decoder=1_388_867 - 959_232)),
])  # fmt: skip
def test_published_sizes(model, counts):
    f = vqvae.build(Context((32, 32, 3), 0, sgd(0.01, newest=0.5)), **model)
    state = jax.eval_shape(f.init, KEY, images(1, (32, 32, 3)), {})
    sizes = {k: sum(math.prod(a.shape) for a in jax.tree.leaves(v)) for k, v in state.params.items()}
    assert sizes == counts
    levels = model.get('levels', 1)
    assert f.latents.grids == (((8, 8),) if levels == 1 else ((4, 4), (8, 8)))
    assert f.latents.vocabulary == 512 and not f.latents.shape
    if 'codebook' not in sizes:
        assert sum(math.prod(s['sum'].shape) for s in state.extra.values()) == 32_768 * levels


@pytest.fixture(scope='module')
def two():
    """A family of two levels, its state before and after an update, and the logs of that."""
    f, batch = family(levels=2), images()
    before = jax.jit(f.init)(KEY, batch, {})
    return f, batch, before, *f.update(before, {}, batch, KEY)


@pytest.mark.slow
def test_an_update_counts_the_codes_of_its_batch(two):
    f, batch, before, state, logs = two
    codes = f.encode(before, {}, batch, KEY)  # ema and params are the same at the start
    for i, code in enumerate(codes):
        name = f'level{i}'
        count = np.bincount(np.ravel(code), minlength=6)
        np.testing.assert_allclose(state.extra[name]['count'], 0.99 + 0.01 * count, rtol=1e-5)
        assert logs[f'perplexity/{name}'] == pytest.approx(np.exp(entropy(count / count.sum())), rel=1e-5)
        assert logs[f'usage/{name}'] == pytest.approx((count > 0).mean())
    assert all(v.shape == () for v in logs.values())


@pytest.mark.slow
def test_encode_decode_and_evaluate_agree(two):
    f, batch, _, state, _ = two
    codes = f.encode(state, {}, batch, KEY)
    assert [c.shape[1:] for c in codes] == list(f.latents.grids) == [(2, 2), (4, 4)]
    metrics = f.evaluate(state, {}, {**batch, 'index': jnp.arange(8)}, KEY)
    decoded = f.decode(state, {}, {}, codes, KEY)
    squared_error = jnp.square(decoded - batch['image']).mean((1, 2, 3))
    np.testing.assert_allclose(metrics['squared_error'], squared_error, rtol=1e-5)
    bits = 0.0
    for i, code in enumerate(codes):
        count = np.asarray(state.extra[f'level{i}']['count'])
        bits += -np.log2((count / count.sum())[np.asarray(code)]).sum((1, 2))
    np.testing.assert_allclose(metrics['bits_per_code'], bits / 20, rtol=1e-4)


@pytest.mark.slow
def test_fine_codes_are_conditioned_on_coarse_ones(two):
    """With another coarse codebook the fine latents of the same image are others, and the decoder depends on both."""
    f, batch, _, state, _ = two
    moved = {**state.extra['level0'], 'sum': state.extra['level0']['sum'] + 3.0}
    other = state.replace(extra={**state.extra, 'level0': moved})
    a, b = (f.evaluate(s, {}, {**batch, 'index': jnp.arange(8)}, KEY)['commitment'] for s in (state, other))
    assert np.abs(a - b).min() > 1e-3
    top, bottom = f.encode(state, {}, batch, KEY)
    plain = f.decode(state, {}, {}, (top, bottom), KEY)
    assert np.abs(plain - f.decode(state, {}, {}, ((top + 1) % 6, bottom), KEY)).max() > 1e-3
    assert np.abs(plain - f.decode(state, {}, {}, (top, (bottom + 1) % 6), KEY)).max() > 1e-3


@pytest.mark.slow
def test_samples_have_the_frequencies_of_codes_in_training(two):
    f, _, _, state, _ = two
    probability = np.array([0.5, 0.25, 0.25, 0, 0, 0])
    extra = {k: {**s, 'count': jnp.asarray(probability * 100)} for k, s in state.extra.items()}
    drawn = {}

    def spy(codes, codebook, embed=quantise.embed):
        drawn.setdefault('codes', []).append(np.asarray(codes))
        return embed(codes, codebook)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantise, 'embed', spy)
        f.sample(state.replace(extra=extra), {}, {'index': jnp.arange(300)}, KEY)
    top, bottom = drawn['codes']
    assert top.shape == (300, 2, 2) and bottom.shape == (300, 4, 4)
    for codes in (top, bottom):
        frequency = np.bincount(codes.ravel(), minlength=6) / codes.size
        np.testing.assert_allclose(frequency, probability, atol=0.05)
    assert (top[0] != top[1]).any() and not np.array_equal(top, bottom[:, :2, :2])


@pytest.mark.slow
@pytest.mark.parametrize('codebook', ['ema', 'loss'])
def test_parts_of_a_batch_give_the_same_update(codebook):
    results = []
    for accumulate in (1, 4):
        f = family(optim=sgd(0.1, accumulate, newest=0.5), codebook=codebook, restart=0.9999)
        state = jax.jit(f.init)(KEY, images(), {})
        for i in range(2):
            state, logs = f.update(state, {}, images(seed=i), jax.random.key(i))
        # Norms and logs are of the same gradient; a state holds the codes that were restarted too.
        results.append((state, logs))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('codebook', ['ema', 'loss'])
def test_dead_codes_are_replaced(codebook):
    f, batch = family(codebook=codebook, restart=0.995), images()
    state = jax.jit(f.init)(KEY, batch, {})
    used = np.zeros(6, int)
    np.add.at(used, np.ravel(f.encode(state, {}, batch, KEY)[0]), 1)
    assert (used == 0).any() and (used > 0).any()
    after, _ = f.update(state, {}, batch, KEY)
    still, _ = family(codebook=codebook).update(state, {}, batch, KEY)

    def book(s):
        return s.params['codebook']['level0'] if codebook == 'loss' else quantise.ema_codebook(s.extra['level0'])

    count = np.asarray(after.extra['level0']['count'])
    np.testing.assert_allclose(count[used == 0], 1)
    encoder = Pyramid(levels=1, latent=3, width=4, blocks=1, hidden=2, halvings=1)
    (z,) = apply(encoder, after.params['encoder'], batch['image'], lambda level, z: z)
    for k in range(6):
        if used[k]:
            np.testing.assert_allclose(book(after)[k], book(still)[k], rtol=1e-4)
        else:
            assert np.abs(np.reshape(z, (-1, 3)) - book(after)[k]).max(-1).min() < 1e-4
    if codebook == 'loss':
        dead = used == 0
        np.testing.assert_array_equal(after.ema['codebook']['level0'][dead], book(after)[dead])


@pytest.mark.slow
@pytest.mark.parametrize('codebook', ['ema', 'loss'])
def test_the_update_descends_the_papers_loss(codebook):
    """One SGD step against a gradient put together from parts."""
    f, batch = family(codebook=codebook, variance=0.5, commitment=0.3, optim=sgd(1.0, newest=0.5)), images()
    state = jax.jit(f.init)(KEY, batch, {})
    after, logs = f.update(state, {}, batch, KEY)
    sizes = dict(width=4, blocks=1, hidden=2, halvings=1)
    encoder, decoder = Pyramid(levels=1, latent=3, **sizes), PyramidDecoder(features=1, **sizes)
    book = state.params['codebook']['level0'] if codebook == 'loss' else quantise.ema_codebook(state.extra['level0'])
    x = batch['image']

    @jax.jit
    def slow(params, book):
        z, to_encoder = jax.vjp(lambda p: encoder.apply({'params': p}, x, lambda level, z: z)[0], params['encoder'])
        codes = jnp.square(z[..., None, :] - book).sum(-1).argmin(-1)
        q = book[codes]
        value, (of_decoder, of_q) = jax.value_and_grad(
            lambda p, q: jnp.square(decoder.apply({'params': p}, (q,)) - x).mean() / 0.5, (0, 1)
        )(params['decoder'], q)
        distance, of_book = jax.value_and_grad(lambda b: jnp.square(b[codes] - z).mean())(book)
        (of_encoder,) = to_encoder(of_q + 0.3 * 2 * (z - q) / z.size)  # straight through, and the commitment
        return value, distance, of_encoder, of_decoder, of_book

    value, distance, of_encoder, of_decoder, of_book = slow(state.params, book)
    assert logs['loss'] == pytest.approx(float(value + (0.3 + (codebook == 'loss')) * distance), rel=1e-5)
    for name, gradient in (('encoder', of_encoder), ('decoder', of_decoder)):
        moved = jax.tree.map(jnp.subtract, state.params[name], after.params[name])
        chex.assert_trees_all_close(moved, gradient, rtol=1e-3, atol=1e-5)
    if codebook == 'loss':
        np.testing.assert_allclose(book - after.params['codebook']['level0'], of_book, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('model', [
    dict(levels=0), dict(halvings=0), dict(width=1), dict(vocabulary=1), dict(codebook='kmeans'), dict(decay=1.0),
    dict(codebook='loss', debiased=True), dict(variance=0.0), dict(restart=-1.0), dict(halvings=3), dict(levels=3),
])  # fmt: skip
def test_mistakes(model):
    with pytest.raises(UserError, match=r'config\.') as error:
        family((12, 12, 1), **model)
    assert '\n' not in str(error.value)
