"""pix2pix: its generator against torch, the steps of both networks against plain gradients, inputs of both kinds."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import sgd

from jaxgen.augmentation.corruptions import blurred
from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import pix2pix
from jaxgen.networks.patchgan import PatchGAN
from jaxgen.networks.pix2pix import UNet, dropout

slow = pytest.mark.slow  # compiles networks or trains

SMALL = dict(width=2, halvings=3, dropouts=1, l1=10.0, discriminator_channels=2, discriminator_layers=1)
RATE = 0.1


def build(image=(8, 16, 3), accumulate=1, **model):
    return pix2pix.build(Context(image, 0, sgd(RATE, accumulate, newest=0.5)), **{**SMALL, **model})


@functools.cache
def family(**model):
    f = build(**model)
    names = ('init', 'update', 'sample', 'evaluate', 'trajectory')
    return f._replace(**{name: jax.jit(getattr(f, name)) for name in names})


def batch(n: int = 4) -> dict:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (n, 8, 16, 3)).astype(np.float32)
    edges = rng.uniform(-1, 1, (n, 8, 16, 1)).astype(np.float32)
    return {'image': jnp.asarray(x), 'edges': jnp.asarray(edges), 'index': jnp.arange(n, dtype=jnp.int32)}


@functools.cache
def start():
    return jax.jit(family().init)(jax.random.key(0), batch(), {})


def network(halvings=3, dropouts=1, rate=0.5, full=0, norm='instance'):
    return UNet(3, 2, full, halvings, dropouts, rate, norm)


def randomised(tree):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape) + (leaf.ndim == 1) * 0.6).astype(np.float32), tree
    )


def oracle(weights: dict, x: np.ndarray, full: int, levels: int, norm: str, masks: dict) -> np.ndarray:
    """The network in torch's functions; masks {layer: what its result is multiplied by, [n, H, W, C]}."""
    torch = pytest.importorskip('torch')
    F = torch.nn.functional

    def tensor(a):
        return torch.tensor(np.asarray(a))

    def normal(h, w):
        scale, bias = tensor(w['scale']), tensor(w['bias'])
        groups = len(scale) // 4 if norm == 'group' and len(scale) > 4 else 1
        groups = len(scale) if norm == 'instance' else groups
        return F.group_norm(h, groups, scale, bias, eps=1e-5)

    def flat(h, w):
        return F.conv2d(h, tensor(w['kernel']).permute(3, 2, 0, 1), tensor(w['bias']) if 'bias' in w else None, 1, 1)

    def up(h, w):  # the kernel turned by half a turn, as torch's [in, out, H, W]
        kernel = tensor(np.asarray(w['kernel'])[::-1, ::-1].copy()).permute(2, 3, 0, 1)
        return F.conv_transpose2d(h, kernel, tensor(w['bias']) if 'bias' in w else None, stride=2, padding=1)

    h, maps = tensor(x).permute(0, 3, 1, 2), []
    for i in range(levels):
        w = weights[f'down{i}']
        assert set(w['conv']) == {'kernel'} and ('norm' in w) == (0 < i < levels - 1)
        h = F.leaky_relu(h, 0.2) if i else h
        h = flat(h, w['conv']) if i < full else F.conv2d(h, tensor(w['conv']['kernel']).permute(3, 2, 0, 1), None, 2, 1)
        h = normal(h, w['norm']) if 'norm' in w else h
        maps.append(h)
    for i in range(levels - 1, 0, -1):
        w = weights[f'up{i}']
        assert set(w['conv']) == {'kernel'}
        h = normal((flat if i < full else up)(F.relu(h), w['conv']), w['norm'])
        h = h * tensor(masks[i]).permute(0, 3, 1, 2) if i in masks else h
        h = torch.cat([maps[i - 1], h], 1)
    return torch.tanh((flat if full else up)(F.relu(h), weights['last'])).permute(0, 2, 3, 1).numpy()


@slow
@pytest.mark.parametrize(
    'full, halvings, dropouts, norm', [(0, 4, 1, 'instance'), (2, 2, 3, 'group'), (0, 1, 3, 'group')]
)
def test_generator_equals_torch(full, halvings, dropouts, norm):
    """With the same weights and the same dropout: after the transposed convolutions that follow the innermost one."""
    x = np.random.default_rng(0).normal(size=(2, 16, 32, 4)).astype(np.float32)
    keys, levels = jax.random.split(jax.random.key(0), 2), full + halvings
    net = network(halvings, dropouts, full=full, norm=norm)
    weights = randomised(jax.eval_shape(net.init, jax.random.key(0), x, keys))['params']
    masks = {}
    for i in range(max(levels - 1 - dropouts, 1), levels - 1):
        ones = jnp.ones((2, 16 >> max(i - full, 0), 32 >> max(i - full, 0), 2 * min(2 ** (i - 1), 8)))
        masks[i] = dropout(ones, jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys), 0.5)
    assert len(masks) == min(dropouts, max(levels - 2, 0))
    y = jax.jit(net.apply)({'params': weights}, x, keys)
    np.testing.assert_allclose(y, oracle(weights, x, full, levels, norm, masks), atol=5e-5)


def test_dropout_is_each_examples_own():
    keys = jax.random.split(jax.random.key(0), 3)
    y = np.asarray(jax.jit(dropout, static_argnums=2)(jnp.ones((3, 50, 40)), keys, 0.2))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1.25)}
    np.testing.assert_allclose(y.mean((1, 2)), 1, atol=0.06)
    assert (y[0] != y[1]).any()
    np.testing.assert_array_equal(dropout(jnp.ones((1, 50, 40)), keys[2:], 0.2), y[2:])


def parts(params, c, x, key):
    """(D's loss, G's loss) as the paper has them, of one forward pass."""
    y = network().apply({'params': params['generator']}, c, jax.random.split(key, len(x)))

    def p(image):
        pair = jnp.concatenate([c, image], -1)
        weights = {'params': params['discriminator']}
        return jax.nn.sigmoid(PatchGAN(2, 1).apply(weights, pair, train=True, mutable=['batch_stats'])[0])

    discriminator = 0.5 * (-jnp.log(p(x)).mean() - jnp.log(1 - p(y)).mean())
    return discriminator, -jnp.log(p(y)).mean() + 10 * jnp.abs(x - y).mean()


@slow
def test_update_is_a_step_of_each_network():
    """On its own loss and its own weights; the generator's comes second."""
    before, b, key = start(), batch(), jax.random.key(3)
    after, logs = family().update(before, {}, b, key)
    _, discriminator_key, generator_key = jax.random.split(key, 3)

    @jax.jit
    def plain(params, key, which):
        losses = lambda w, name: parts({**params, name: w}, b['edges'], b['image'], key)  # noqa: E731
        of_discriminator = jax.grad(lambda w: losses(w, 'discriminator')[0])(params['discriminator'])
        of_generator = jax.grad(lambda w: losses(w, 'generator')[1])(params['generator'])
        return of_discriminator, of_generator, losses(params['generator'], 'generator')

    def stepped(old, gradient):
        return jax.tree.map(lambda w, g: w - RATE * g, old, gradient)

    slope, _, losses = plain(before.params, discriminator_key, 0)
    middle = before.params | {'discriminator': stepped(before.params['discriminator'], slope)}
    _, slope, (_, adversarial) = plain(middle, generator_key, 1)
    expected = middle | {'generator': stepped(before.params['generator'], slope)}
    for a, b_ in zip(*map(jax.tree.leaves, (after.params, expected)), strict=True):
        np.testing.assert_allclose(a, b_, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        [logs['discriminator_loss'], logs['generator_loss']], [losses[0], adversarial], rtol=1e-4
    )
    assert set(after.ema) == {'generator'} and after.extra is None
    average = jax.tree.map(lambda a, b: (a + b) / 2, before.params['generator'], after.params['generator'])
    for a, b_ in zip(*map(jax.tree.leaves, (after.ema['generator'], average)), strict=True):
        np.testing.assert_allclose(a, b_, rtol=1e-4, atol=1e-6)


@slow
def test_samples_are_of_inputs_of_the_data():
    f, state, b = family(), start(), batch()
    assert f.conditions == ('edges',) and f.divisor == 8
    key = jax.random.key(5)
    y = f.sample(state, {}, b, key)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(b['index'])
    np.testing.assert_allclose(y, network().apply({'params': state.ema['generator']}, b['edges'], keys), atol=1e-5)
    other = f.sample(state, {}, {**b, 'index': b['index'] + 4}, key)
    assert np.abs(y - other).max() > 1e-4, 'dropout stays on'
    unseen = f.sample(state, {}, {**b, 'image': 0 * b['image']}, key)
    np.testing.assert_array_equal(y, unseen)  # the ground truth is only displayed
    images = f.trajectory(state, {}, b, key)['image']
    np.testing.assert_allclose(images, [jnp.broadcast_to(b['edges'], y.shape), y, b['image']], atol=1e-5)
    metrics = f.evaluate(state, {}, b, key)
    assert set(metrics) == {'squared_error', 'absolute_error'}
    np.testing.assert_allclose(metrics['squared_error'], jnp.square(y - b['image']).mean((1, 2, 3)), rtol=1e-4)


@slow
def test_recovery_degrades_by_each_examples_key():
    f, b, key = family(condition='image', blur=0.8, noise=0.3, dropout=0.0), batch(), jax.random.key(7)
    assert f.conditions == ('image',)
    state = jax.jit(f.init)(jax.random.key(0), b, {})
    c, y, x = f.trajectory(state, {}, b, key)['image']
    np.testing.assert_array_equal(x, b['image'])
    keys = jax.random.split(key, 4)  # without dropout they change nothing
    noise = (c - blurred(x, 0.8)) / 0.3
    assert abs(float(noise.mean())) < 0.15 and abs(float(noise.std()) - 1) < 0.1
    np.testing.assert_allclose(y, network(rate=0.0).apply({'params': state.ema['generator']}, c, keys), atol=1e-5)
    reversed_ = f.trajectory(state, {}, {k: v[::-1] for k, v in b.items()}, key)['image']
    np.testing.assert_allclose(reversed_[0], c[::-1], atol=1e-5)
    metrics = f.evaluate(state, {}, b, key)
    np.testing.assert_allclose(metrics['squared_error/input'], jnp.square(c - x).mean((1, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize('model, message', [
    (dict(halvings=0), 'halvings'), (dict(full=-1), 'full'), (dict(norm='layer'), 'norm'),
    (dict(halvings=4), 'multiple of 16'), (dict(dropout=1.0), 'dropout'),
    (dict(blur=-1.0), 'blur'), (dict(l1=-1.0), 'l1'), (dict(condition='image'), 'nothing to do'),
    (dict(discriminator_layers=3), 'discriminator_layers'), (dict(discriminator_norm='layer'), 'discriminator_norm'),
])  # fmt: skip
def test_says_what_is_wrong(model, message):
    with pytest.raises(UserError, match=message) as error:
        build(**model)
    assert 'config.' in str(error.value) and '\n' not in str(error.value)


def test_what_is_no_image_is_no_input():
    for given in (jnp.zeros(4, jnp.int32), batch()['image'][:, ::2, ::2]):
        with pytest.raises(UserError, match=r"'given' is no image of config\.data\.size"):
            jax.eval_shape(build(condition='given').init, jax.random.key(0), batch() | {'given': given}, {})
