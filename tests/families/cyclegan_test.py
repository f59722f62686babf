"""CycleGAN: its generator against torch, the pool against a list, all four networks' steps against plain gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import sgd

from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import cyclegan
from jaxgen.networks.cyclegan import Generator
from jaxgen.networks.patchgan import PatchGAN

slow = pytest.mark.slow  # compiles networks or trains

SMALL = dict(width=2, halvings=1, blocks=1, cycle=3.0, identity=0.5, pool=6)
SMALL |= dict(discriminator_channels=2, discriminator_layers=1)
RATE = 0.1


def build(image=(8, 12, 3), accumulate=1, **model):
    return cyclegan.build(Context(image, 0, sgd(RATE, accumulate, newest=0.5)), **{**SMALL, **model})


@functools.cache
def family(**model):
    f = build(**model)
    names = ('init', 'update', 'sample', 'evaluate', 'trajectory')
    return f._replace(**{name: jax.jit(getattr(f, name)) for name in names})


def batch(n: int = 4, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    images = {k: jnp.asarray(rng.uniform(-1, 1, (n, 8, 12, 3)), jnp.float32) for k in ('image', 'other')}
    return {**images, 'index': jnp.arange(n, dtype=jnp.int32)}


@functools.cache
def start():
    return jax.jit(family().init)(jax.random.key(0), batch(), {})


@jax.jit
def translate(weights, x):
    return Generator(2, 1, 1).apply({'params': weights}, x)


@jax.jit
def discriminate(weights, x):
    return PatchGAN(2, 1, 'instance').apply({'params': weights}, x)


def oracle(weights: dict, x: np.ndarray, halvings: int, blocks: int) -> np.ndarray:
    """The generator in torch's functions."""
    torch = pytest.importorskip('torch')
    F = torch.nn.functional

    def tensor(a):
        return torch.tensor(np.asarray(a))

    def conv(h, w, pad, **kwargs):
        h = F.pad(h, (pad,) * 4, mode='reflect')
        return F.conv2d(h, tensor(w['kernel']).permute(3, 2, 0, 1), tensor(w['bias']), **kwargs)

    def normed(h, weights, name):
        if name not in weights:
            return F.instance_norm(h)
        w = weights[name]['group']
        return F.group_norm(h, max(1, h.shape[1] // 4), tensor(w['scale']), tensor(w['bias']), eps=1e-5)

    h = F.relu(normed(conv(tensor(x).permute(0, 3, 1, 2), weights['first'], 3), weights, 'first_norm'))
    for i in range(1, halvings + 1):
        h = F.relu(normed(conv(h, weights[f'down{i}'], 0, stride=2, padding=1), weights, f'down_norm{i}'))
    for i in range(blocks):
        w = weights[f'block{i}']
        inner = F.relu(normed(conv(h, w['conv1'], 1), w, 'norm1'))
        h = h + normed(conv(inner, w['conv2'], 1), w, 'norm2')
    for i in range(halvings, 0, -1):
        w = weights[f'up{i}']  # the kernel turned by half a turn, as torch's [in, out, H, W]
        kernel = tensor(np.asarray(w['kernel'])[::-1, ::-1].copy()).permute(2, 3, 0, 1)
        up = F.conv_transpose2d(h, kernel, tensor(w['bias']), stride=2, padding=1, output_padding=1)
        h = F.relu(normed(up, weights, f'up_norm{i}'))
    return torch.tanh(conv(h, weights['last'], 3)).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize('norm', ['instance', 'group'])
def test_generator_equals_torch(norm):
    x = np.random.default_rng(0).normal(size=(2, 16, 8, 3)).astype(np.float32)
    net, rng = Generator(4, 2, 2, norm), np.random.default_rng(1)
    like = jax.eval_shape(net.init, jax.random.key(0), x)['params']
    weights = jax.tree.map(lambda a: (0.3 * rng.normal(size=a.shape)).astype(np.float32), like)
    assert ('first_norm' in weights) == ('norm1' in weights['block0']) == (norm == 'group')
    y = jax.jit(net.apply)({'params': weights}, x)
    np.testing.assert_allclose(y, oracle(weights, x, 2, 2), atol=2e-5)


@pytest.mark.parametrize('blocks, count', [(9, 11_378_179), (6, 7_837_699)])
def test_published_sizes(blocks, count):
    x = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(Generator(blocks=blocks).init, jax.random.key(0), x)['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@slow
def test_pool_is_a_list_of_older_translations():
    """Every input and every image kept is that of a slow list, with the same coins and indices."""
    size, n, rng, number = 5, 3, jax.random.key(2), 0
    query = jax.jit(cyclegan.query_pool)
    pool, filled, slow, swaps = jnp.zeros((size, 1, 1, 1)), jnp.zeros((), jnp.int32), [], 0
    for step in range(40):
        images = jnp.arange(number, number + n, dtype=jnp.float32).reshape(n, 1, 1, 1)
        key = jax.random.fold_in(rng, step)
        inputs, pool, filled = query(pool, filled, images, key)
        expected = []
        for k, own in enumerate(jax.random.split(key, n)):
            coin, index = jax.random.split(own)
            if len(slow) < size:
                slow.append(number + k)
                expected.append(number + k)
            elif jax.random.bernoulli(coin):
                i = int(jax.random.randint(index, (), 0, size))
                expected.append(slow[i])
                slow[i] = number + k
                swaps += 1
            else:
                expected.append(number + k)
        np.testing.assert_array_equal(inputs.ravel(), expected)
        assert int(filled) == len(slow)
        np.testing.assert_array_equal(pool.ravel()[: len(slow)], slow)
        number += n
    assert 35 < swaps < 80 and len(set(slow)) == size


@jax.jit
def losses(params, b, fake):
    """(the generators' loss, the discriminators' loss of translations `fake`) as the paper has them."""
    x, y = b['other'], b['image']
    g, f = (lambda a, w=params[name]: translate(w, a) for name in ('forward', 'backward'))
    d = {name: lambda a, w=params[f'discriminator_{name}']: discriminate(w, a) for name in ('image', 'other')}
    adversarial = jnp.square(d['image'](g(x)) - 1).mean() + jnp.square(d['other'](f(y)) - 1).mean()
    cycle = jnp.abs(f(g(x)) - x).mean() + jnp.abs(g(f(y)) - y).mean()
    same = jnp.abs(g(y) - y).mean() + jnp.abs(f(x) - x).mean()
    discriminators = 0.0
    for name in ('image', 'other'):
        discriminators += (jnp.square(d[name](b[name]) - 1).mean() + jnp.square(d[name](fake[name])).mean()) / 2
    return adversarial + 3 * (cycle + 0.5 * same), discriminators


@slow
def test_update_is_a_step_of_all_four():
    """Of the generators first; the discriminators' inputs are translations from before that step."""
    f, before, b = family(), start(), batch()
    after, logs = f.update(before, {}, b, jax.random.key(3))

    fake = {
        'image': translate(before.params['forward'], b['other']),
        'other': translate(before.params['backward'], b['image']),
    }
    of_generators, of_discriminators = (
        jax.grad(lambda params, i=i: losses(params, b, fake)[i])(before.params) for i in (0, 1)
    )

    def stepped(gradient, names):
        return {k: jax.tree.map(lambda w, g: w - RATE * g, before.params[k], gradient[k]) for k in names}

    generators = stepped(of_generators, ('forward', 'backward'))
    discriminators = stepped(of_discriminators, ('discriminator_image', 'discriminator_other'))
    for a, expected in zip(*map(jax.tree.leaves, (after.params, generators | discriminators)), strict=True):
        np.testing.assert_allclose(a, expected, rtol=1e-3, atol=1e-5)
    assert set(after.ema) == {'forward', 'backward'}
    # The pool was empty: everything is an input and kept.
    assert int(after.extra['filled']) == 4
    for name in ('image', 'other'):
        np.testing.assert_allclose(after.extra[name][:4], fake[name], atol=1e-5)
    total, wrong = losses(before.params, b, fake)
    np.testing.assert_allclose([logs['generator_loss'], logs['discriminator_loss']], [total, wrong], rtol=1e-3)


@slow
def test_older_translations_are_inputs():
    """With a full pool the discriminators' loss is that of a mixture of old and new translations."""
    f, b, key = family(), batch(seed=5), jax.random.key(4)
    old = {name: jnp.full((6, 8, 12, 3), 0.3 * i - 0.2) for i, name in enumerate(('image', 'other'))}
    state = start().replace(extra={**old, 'filled': jnp.asarray(6, jnp.int32)})
    after, logs = f.update(state, {}, b, key)
    newest = {
        'image': translate(state.params['forward'], b['other']),
        'other': translate(state.params['backward'], b['image']),
    }
    inputs = {}
    for name, own in zip(('image', 'other'), jax.random.split(key, 4)[2:], strict=True):
        inputs[name], pool, _ = cyclegan.query_pool(old[name], jnp.asarray(6), newest[name], own)
        np.testing.assert_allclose(after.extra[name], pool, atol=1e-5)
    _, expected = losses(state.params, b, inputs)
    assert float(logs['discriminator_loss']) == pytest.approx(float(expected), rel=1e-3)
    assert abs(float(losses(state.params, b, newest)[1] - expected)) > 1e-4
    # Without a pool there is none.
    f = build(pool=0)
    state = jax.eval_shape(f.init, jax.random.key(0), b, {})
    assert state.extra is None
    jax.eval_shape(f.update, state, {}, b, key)


@slow
def test_samples_are_of_one_direction_and_trajectories_of_both():
    f, state, b, key = family(), start(), batch(), jax.random.key(0)
    assert f.conditions == ('other',) and f.divisor == 2
    g, back = state.ema['forward'], state.ema['backward']
    y = f.sample(state, {}, b, key)
    np.testing.assert_allclose(y, translate(g, b['other']), atol=1e-5)
    cycles = f.trajectory(state, {}, b, key)
    assert list(cycles) == ['image', 'other'] or list(cycles) == ['other', 'image']
    np.testing.assert_allclose(cycles['other'], [b['other'], y, translate(back, y)], atol=1e-5)
    x = translate(back, b['image'])
    np.testing.assert_allclose(cycles['image'], [b['image'], x, translate(g, x)], atol=1e-5)
    metrics = f.evaluate(state, {}, b, key)
    np.testing.assert_allclose(
        metrics['cycle/other'], jnp.abs(translate(back, y) - b['other']).mean((1, 2, 3)), rtol=1e-4
    )
    same = jnp.abs(translate(g, b['image']) - b['image']).mean((1, 2, 3))
    np.testing.assert_allclose(metrics['identity/image'], same, rtol=1e-4)


@pytest.mark.parametrize('model, message', [
    (dict(halvings=-1), 'halvings'), (dict(halvings=3), 'multiple of 8'), (dict(image=(4, 4, 3), halvings=2), '8 or'),
    (dict(blocks=0), 'blocks'), (dict(norm='layer'), 'norm'), (dict(pool=-1), 'pool'), (dict(cycle=-1.0), 'cycle'),
    (dict(discriminator_layers=3), 'discriminator_layers'),
])  # fmt: skip
def test_says_what_is_wrong(model, message):
    with pytest.raises(UserError, match=message) as error:
        build(**model)
    assert 'config.' in str(error.value) and '\n' not in str(error.value)
