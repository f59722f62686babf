"""VQGAN and KL autoencoder: updates against plain gradients, both adversarial losses, codes, options."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import fresh_stage, sgd

from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import vqgan
from jaxgen.losses import adversarial
from jaxgen.losses.divergences import normal_kl
from jaxgen.networks import quantise
from jaxgen.networks.first_stage import Decoder, Encoder
from jaxgen.networks.multiscale import MultiScale
from jaxgen.networks.patchgan import PatchGAN

SIZES = dict(channels=4, multipliers=(1, 1), blocks=1)
SMALL = dict(
    **SIZES, latent=3, vocabulary=7, perceptual=0.0, adversarial=0.8, discriminator_channels=3, discriminator_layers=1
)
RATE = 1e-2
KINDS = {
    # The commitment counts in full and the codebook loss by a quarter, as in the released code.
    'vq': dict(regulariser='vq', codebook_weight=0.25, beta=4.0, discriminator_start=1),
    'kl': dict(
        regulariser='kl',
        kl_weight=0.1,
        learn_scale=True,
        pixels='l2',
        adversarial_loss='non_saturating',
        discriminator_norm='none',
    ),
}


def build(optim=None, stages=None, **model):
    return vqgan.build(Context((8, 8, 1), 0, optim or sgd(RATE), stages or {}), **{**SMALL, **model})


def images(n: int = 4, seed: int = 0) -> dict:
    return {'image': jax.random.uniform(jax.random.key(seed), (n, 8, 8, 1), minval=-1, maxval=1)}


@functools.cache
def family(kind: str):
    f = build(**KINDS[kind])
    return f, jax.jit(f.update)


@functools.cache
def start(kind: str):
    f, _ = family(kind)
    state = jax.jit(f.init)(jax.random.key(0), images(), {})
    params = dict(state.params)
    # A new discriminator's values hardly depend on the image, and the weight would be clipped.
    params['discriminator'] = jax.tree.map(lambda a: 10 * a if a.ndim > 1 else a, params['discriminator'])
    state = state.replace(params=params)
    if kind == 'vq':  # codes among the latents, so that more than one of them is used
        z = latents(state.params, images()['image'])
        book = z.reshape(-1, 3)[:: z[..., 0].size // 7][:7] * 1.1
        codebook = {'codebook': {'embedding': book}}
        state = state.replace(params=state.params | codebook, ema=state.ema | codebook)
    return state


@functools.cache
def networks(outputs: int):
    return Encoder(outputs=outputs, **SIZES), Decoder(image_channels=1, **SIZES)


@jax.jit
def latents(params, x):
    return networks(3)[0].apply({'params': params['encoder']}, x)


def discriminate(params, x, norm):
    weights = {'params': params['discriminator']}
    return PatchGAN(3, 1, norm).apply(weights, x, train=True, mutable=['batch_stats'])[0]


def parts(kind: str, params, x, rng):
    """(nll, regulariser, the generator's adversarial loss, images), as plainly as can be."""
    encoder, decoder = networks(3 if kind == 'vq' else 6)
    h = encoder.apply({'params': params['encoder']}, x)
    if kind == 'vq':
        book = params['codebook']['embedding']
        distances = jnp.square(h[..., None, :] - book).sum(-1)
        vectors = book[distances.argmin(-1)]
        to_latents = jnp.square(jax.lax.stop_gradient(h) - vectors).mean()
        to_codes = jnp.square(h - jax.lax.stop_gradient(vectors)).mean()
        regular = 0.25 * to_latents + to_codes
        y, _ = decoder.apply({'params': params['decoder']}, h + jax.lax.stop_gradient(vectors - h))
        nll = jnp.abs(x - y).mean()
        return nll, regular, -discriminate(params, y, 'batch').mean(), y
    mean, log_var = h[..., :3], jnp.clip(h[..., 3:], -30, 20)
    y, _ = decoder.apply(
        {'params': params['decoder']}, mean + jnp.exp(log_var / 2) * jax.random.normal(rng, mean.shape)
    )
    log_scale = params['scale']['log_scale']
    nll = (jnp.square(x - y) / jnp.exp(log_scale) + log_scale).sum((1, 2, 3)).mean()
    adversarial = -jnp.log(jax.nn.sigmoid(discriminate(params, y, 'none'))).mean()
    return nll, 0.1 * normal_kl(mean, log_var).mean(), adversarial, y


@functools.partial(jax.jit, static_argnums=0)
def plain_gradients(kind: str, params, x, rng):
    """Adaptive weight, and gradients by all weights without and with the adversarial loss."""

    by_part = jax.jacrev(lambda params: jnp.stack(parts(kind, params, x, rng)[:3]))(params)
    nll, regular, adversarial_gradient = (jax.tree.map(lambda g, i=i: g[i], by_part) for i in range(3))
    a, b = (jnp.linalg.norm(g['decoder']['last']['kernel'].ravel()) for g in (nll, adversarial_gradient))
    weight = jnp.clip(a / (b + 1e-4), 0, 1e4)
    alone = jax.tree.map(jnp.add, nll, regular)
    return weight, alone, jax.tree.map(lambda u, v: u + 0.8 * weight * v, alone, adversarial_gradient)


def assert_step(before, after, gradient):
    """One step of gradient descent. The change is compared: weights would hide it."""
    largest = max(jnp.abs(g).max() for g in jax.tree.leaves(gradient))
    change = jax.tree.map(lambda old, new: (old - new) / RATE, before, after)
    chex.assert_trees_all_close(change, gradient, rtol=2e-3, atol=1e-3 * largest)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['vq', 'kl'])
def test_updates_are_plain_gradient_steps(kind):
    (_, update), before, x = family(kind), start(kind), images(seed=1)
    before = before.replace(step=jnp.ones((), jnp.int32))
    if kind == 'kl':
        before = before.replace(params=before.params | {'scale': {'log_scale': jnp.float32(0.3)}})
    key = jax.random.key(5)
    generator_rng, discriminator_rng, _ = jax.random.split(key, 3)
    weight, alone, gradient = plain_gradients(kind, before.params, x['image'], generator_rng)
    after, logs = update(before, {}, x, key)
    assert 0.01 < weight < 1e4
    np.testing.assert_allclose(logs['adaptive_weight'], weight, rtol=1e-3)
    names = [name for name in before.params if name != 'discriminator']
    assert ('scale' in names) == (kind == 'kl')
    for name in names:
        assert_step(before.params[name], after.params[name], gradient[name])
    far = optax.tree.norm(jax.tree.map(jnp.subtract, gradient['decoder'], alone['decoder']))
    assert far > 0.1 * optax.tree.norm(alone['decoder']), 'the adversarial loss is no small part of it'

    # The discriminator's step comes after: its inputs are the new decoder's images.
    norm, loss = {'vq': ('batch', adversarial.hinge_discriminator), 'kl': ('none', adversarial.vanilla_discriminator)}[
        kind
    ]

    @jax.jit
    def plain(weights):
        params = after.params | {'discriminator': weights}
        y = parts(kind, params, x['image'], discriminator_rng)[3]
        return loss(discriminate(params, x['image'], norm), discriminate(params, jax.lax.stop_gradient(y), norm))

    old = before.params['discriminator']
    assert_step(old, after.params['discriminator'], jax.grad(plain)(old))


@pytest.mark.slow
def test_no_adversarial_loss_before_its_start():
    (_, update), before, x = family('vq'), start('vq'), images(seed=1)
    after, _ = update(before, {}, x, jax.random.key(5))
    chex.assert_trees_all_equal(after.params['discriminator'], before.params['discriminator'])
    _, alone, _ = plain_gradients('vq', before.params, x['image'], jax.random.key(0))
    assert_step(before.params['decoder'], after.params['decoder'], alone['decoder'])
    assert 'discriminator' not in after.ema
    later, _ = update(after, {}, x, jax.random.key(6))
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), later.params, after.params)['discriminator']))


def test_gradient_is_computed_once_and_right():
    def f(y):
        return jnp.sin(y).sum() * 3, {'half': y.sum() / 2}

    def outer(x):
        value, aux, of_y = vqgan.with_gradient(f, x**2)
        return value * 2 + of_y.sum() * 100, (value, aux, of_y)  # the gradient is a constant

    x = jnp.array([0.3, -1.2])
    gradient, (value, aux, of_y) = jax.grad(outer, has_aux=True)(x)
    np.testing.assert_allclose(value, 3 * np.sin(x**2).sum(), rtol=1e-6)
    np.testing.assert_allclose(of_y, 3 * np.cos(x**2), rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * 3 * np.cos(x**2) * 2 * x, rtol=1e-5)
    np.testing.assert_allclose(aux['half'], (x**2).sum() / 2)


def test_metrics_of_code_counts():
    """Of all grids together, and with scales of each."""
    networks = vqgan.Networks(*[None] * 5, grids=((1, 1), (2, 2)), latent=3, vocabulary=4, scales=True)
    logs = vqgan.codebook_logs(networks, jnp.array([[2.0, 0, 0, 0], [2.0, 4, 0, 0]]))
    expected = {'perplexity': 2, 'usage': 0.5, 'perplexity/scale0': 1, 'usage/scale0': 0.25}
    expected |= {'perplexity/scale1': 27 ** (1 / 3) / 4 ** (1 / 3), 'usage/scale1': 0.5}  # entropy of (1/3, 2/3)
    assert logs == pytest.approx(expected, rel=1e-5)
    one = vqgan.codebook_logs(networks._replace(grids=((2, 2),), scales=False), jnp.array([2.0, 2, 2, 2]))
    assert one == pytest.approx({'perplexity': 4, 'usage': 1})


def test_adaptive_weight():
    a, b = {'w': jnp.array([3.0, 4.0])}, {'w': jnp.array([0.0, 0.5])}
    np.testing.assert_allclose(adversarial.adaptive_weight(a, b), 5 / 0.5001, rtol=1e-5)
    assert adversarial.adaptive_weight(a, {'w': jnp.zeros(2)}) == 1e4, 'clipped'


def test_adversarial_losses():
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([[-3.0], [0.25]])
    np.testing.assert_allclose(adversarial.hinge_discriminator(real, fake), (0 + 0.5 + 2) / 3 + (0 + 1.25) / 2)
    sigmoid = lambda a: 1 / (1 + np.exp(-np.float64(a)))  # noqa: E731
    expected = -np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(fake)).mean()
    np.testing.assert_allclose(adversarial.vanilla_discriminator(real, fake), expected, rtol=1e-5)
    np.testing.assert_allclose(adversarial.non_saturating_generator(fake), -np.log(sigmoid(fake)).mean(), rtol=1e-5)
    assert np.isfinite(adversarial.vanilla_discriminator(jnp.array([-1e4]), jnp.array([1e4])))


@pytest.mark.slow
def test_later_stages_may_take_latents_before_they_are_quantised():
    (f, _), state, x = family('vq'), start('vq'), images(seed=2)
    other = build(**KINDS['vq'], interface='latents')
    assert other.latents.shape == (4, 4, 3) and not other.latents.grids and not other.latents.vocabulary
    z = jax.jit(other.encode)(state, {}, x, jax.random.key(0))
    np.testing.assert_allclose(z, latents(state.ema, x['image']), atol=1e-5)
    y = jax.jit(other.decode)(state, {}, {}, z, jax.random.key(0))
    codes = f.encode(state, {}, x, jax.random.key(0))
    np.testing.assert_allclose(y, jax.jit(f.decode)(state, {}, {}, codes, jax.random.key(0)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_encode_decode_evaluate_and_sample_agree(kind):
    (f, update), state, x = family(kind), start(kind), images(seed=2)
    state, _ = update(state, {}, x, jax.random.key(1))
    state = state.replace(ema={name: state.params[name] for name in state.ema})
    z = jax.jit(f.encode)(state, {}, x, jax.random.key(0))
    decode = jax.jit(f.decode)
    y = decode(state, {}, {}, z, jax.random.key(0))
    assert np.abs(y).max() <= 1
    metrics = jax.jit(f.evaluate)(state, {}, x | {'index': jnp.arange(4)}, jax.random.key(0))
    np.testing.assert_allclose(metrics['squared_error'], jnp.square(y - x['image']).mean((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(metrics['absolute_error'], jnp.abs(y - x['image']).mean((1, 2, 3)), rtol=1e-4)
    assert {'discriminator_real', 'discriminator_fake'} < set(metrics)
    if kind == 'kl':
        assert f.latents.shape == z.shape[1:] == (4, 4, 3) and not f.latents.grids
        encoder, _ = networks(6)
        h = encoder.apply({'params': state.ema['encoder']}, x['image'])
        np.testing.assert_allclose(z, h[..., :3], atol=1e-5)
        np.testing.assert_allclose(metrics['kl'], normal_kl(h[..., :3], h[..., 3:]), rtol=1e-4)
        return
    assert f.latents.grids == ((4, 4),) and f.latents.vocabulary == 7 and not f.latents.shape
    (codes,) = z
    assert codes.shape == (4, 4, 4) and codes.dtype == jnp.int32 and len(np.unique(codes)) > 2
    # Where training used one code alone, samples are made of it alone.
    count = jnp.zeros(7).at[3].set(64.0)
    only = jax.jit(f.sample)(
        state.replace(extra={**state.extra, 'count': count}), {}, {'index': jnp.arange(2)}, jax.random.key(0)
    )
    np.testing.assert_allclose(only, decode(state, {}, {}, (jnp.full((2, 4, 4), 3),), jax.random.key(0)), atol=1e-5)


@pytest.mark.slow
def test_larger_grids_of_codes_make_larger_images():
    """As a transformer over a larger grid needs it: the codes' own vectors, and attention where training had it."""
    f = build(**KINDS['vq'], attention=(8,))
    state = jax.eval_shape(f.init, jax.random.key(0), images(), {})
    assert any('attention' in name and 'up0' in name for name in state.ema['decoder'])
    y = jax.eval_shape(f.decode, state, {}, {}, (jax.ShapeDtypeStruct((2, 8, 12), jnp.int32),), jax.random.key(0))
    assert y.shape == (2, 16, 24, 1)
    codes = jnp.arange(24).reshape(1, 4, 6) % 7
    book = jax.random.normal(jax.random.key(0), (7, 3))
    made = MultiScale(((2, 3),), 3, phis=0).apply({}, codes, book, 0, method='added')
    np.testing.assert_array_equal(made, book[codes])


@pytest.mark.slow
def test_statistics_of_latents():
    """State.extra has the mean and the square of the decoder's inputs, and samples are drawn by them."""
    (f, update), before, x = family('kl'), start('kl'), images(seed=3)
    key = jax.random.key(4)
    after, _ = update(before, {}, x, key)
    h = networks(6)[0].apply({'params': before.params['encoder']}, x['image'])
    z = h[..., :3] + jnp.exp(h[..., 3:] / 2) * jax.random.normal(jax.random.split(key, 3)[0], (4, 4, 4, 3))
    np.testing.assert_allclose(after.extra['latents']['mean'], z.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(after.extra['latents']['square'], jnp.square(z).mean((0, 1, 2)), rtol=1e-4)
    again, _ = update(after, {}, x, jax.random.key(9))
    both = [s.extra['latents']['mean'] for s in (after, again)]
    assert np.abs(both[0] - both[1]).max() > 0
    still = after.replace(extra={**after.extra, 'latents': {'mean': jnp.arange(3.0), 'square': jnp.arange(3.0) ** 2}})
    drawn = jax.jit(f.sample)(still, {}, {'index': jnp.arange(2)}, key)
    expected = f.decode(still, {}, {}, jnp.broadcast_to(jnp.arange(3.0), (2, 4, 4, 3)), key)
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


@pytest.mark.slow
def test_kl_weight_is_beside_sums_over_an_image():
    """As released: nll is the sum of an image's errors, the KL term the sum over its latents, both in nats."""
    f, x = build(sgd(RATE), **{**KINDS['kl'], 'adversarial': 0.0, 'kl_weight': 0.25}), images(seed=3)
    before = start('kl')
    params, opt = ({k: v for k, v in tree.items() if k != 'discriminator'} for tree in (before.params, before.opt))
    extra = {'latents': before.extra['latents']}
    _, logs = jax.jit(f.update)(before.replace(params=params, opt=opt, extra=extra), {}, x, jax.random.key(4))
    h = np.asarray(networks(6)[0].apply({'params': params['encoder']}, x['image']), np.float64)
    mean, log_var = h[..., :3], h[..., 3:]
    kl = 0.5 * (mean**2 + np.exp(log_var) - 1 - log_var).sum((1, 2, 3)).mean()
    expected = x['image'][0].size * logs['reconstruction'] + 0.25 * kl
    assert 0.25 * kl > 1e-4 * expected
    np.testing.assert_allclose(logs['loss'], expected, rtol=1e-5)


@functools.cache
def without_adversarial_loss(accumulate: int):
    """Without norms of a batch's part, that is. Codes without latents are replaced."""
    f = build(sgd(RATE, accumulate), **{**KINDS['vq'], 'adversarial': 0.0, 'restart': 0.5})
    state = start('vq')
    params, opt = ({k: v for k, v in tree.items() if k != 'discriminator'} for tree in (state.params, state.opt))
    return jax.jit(f.update), state.replace(params=params, opt=opt, extra={'count': state.extra['count']})


@pytest.mark.slow
def test_parts_of_a_batch_count_as_the_batch():
    """With accumulation: same step, same counts."""
    results = []
    for accumulate in (1, 2):
        update, before = without_adversarial_loss(accumulate)
        after, logs = update(before, {}, images(), jax.random.key(0))
        results.append((after.params, after.extra, logs['perplexity'], logs['usage'], logs['reconstruction']))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-6)
    codes = quantise.nearest(latents(before.params, images()['image']), before.params['codebook']['embedding'])
    count = np.bincount(np.asarray(codes).ravel(), minlength=7)
    # A code without latents is replaced, as if it had had one.
    np.testing.assert_allclose(results[0][1]['count'], np.maximum(count, 1), atol=1e-4)
    np.testing.assert_allclose(results[0][3], (count > 0).mean(), rtol=1e-6)


@pytest.mark.slow
def test_dead_codes_are_replaced():
    update, state = without_adversarial_loss(1)
    far = jnp.full((7, 3), 1e3).at[2].set(jnp.array([0.5, -0.5, 0.2]))  # all latents are nearest to code 2
    state = state.replace(params=state.params | {'codebook': {'embedding': far}})
    state, logs = update(state, {}, images(), jax.random.key(0))
    np.testing.assert_allclose(logs['usage'], 1 / 7, rtol=1e-6)
    np.testing.assert_allclose(logs['perplexity'], 1, rtol=1e-5)
    book = np.asarray(state.params['codebook']['embedding'])
    z = np.asarray(latents(state.params, images()['image'])).reshape(-1, 3)
    distances = np.abs(book[:, None] - z).max(-1).min(1)
    assert (np.delete(distances, 2) < 1e-4).all() and len(np.unique(book, axis=0)) == 7
    np.testing.assert_array_equal(np.delete(state.ema['codebook']['embedding'], 2, 0), np.delete(book, 2, 0))


@pytest.mark.slow
def test_perceptual_distance_is_part_of_the_loss():
    stage, stage_state, stage_frozen = fresh_stage('runs/classifier_shapes', None)
    frozen = {'perceptual': (stage_state, stage_frozen)}
    context = Context((8, 8, 3), 0, sgd(RATE), {'perceptual': stage})
    f = vqgan.build(context, **{**SMALL, 'multipliers': (1,), 'perceptual': 2.0, 'adversarial': 0.0})
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1, maxval=1)
    state = jax.jit(f.init)(jax.random.key(0), {'image': x}, frozen)
    after, logs = jax.jit(f.update)(state, frozen, {'image': x}, jax.random.key(1))
    np.testing.assert_allclose(logs['reconstruction'], logs['absolute_error'] + 2 * logs['perceptual'], rtol=1e-5)
    np.testing.assert_allclose(logs['loss'], 192 * logs['reconstruction'] + 1e-6 * logs['kl'], rtol=1e-5)
    assert logs['perceptual'] > 0
    metrics = jax.jit(f.evaluate)(after, frozen, {'image': x, 'index': jnp.arange(2)}, jax.random.key(0))
    assert metrics['perceptual'].shape == (2,) and (metrics['perceptual'] > 0).all()


def test_mistakes(tmp_path):
    for model, message in [
        (dict(regulariser='none'), 'regulariser'),
        (dict(interface='none'), 'interface'),
        (dict(latent=0), 'latent'),
        (dict(groups=32, group_size=0), 'config.model.groups = 32'),
        (dict(multipliers=()), 'multipliers'),
        (dict(multipliers=(1, 1, 1, 1, 1)), 'multiple of 16'),
        (dict(kl_weight=-1.0), 'kl_weight'),
        (dict(regulariser='vq', learn_scale=True), 'learn_scale'),
        (dict(adversarial_loss='none'), 'adversarial_loss'),
        (dict(pixels='huber'), 'pixels'),
        (dict(discriminator_layers=3), 'discriminator_layers'),
        (dict(discriminator_norm='layer'), 'discriminator_norm'),
        (dict(perceptual=1.0), 'stages.perceptual'),
        (dict(perceptual=1.0, lpips=(str(tmp_path / 'none.pth'),)), '16 x 16'),
    ]:
        with pytest.raises(UserError, match=message):
            build(**model)
    build(discriminator_layers=3, adversarial=0.0)
