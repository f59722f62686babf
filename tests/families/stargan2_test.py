"""StarGAN v2: its networks against torch, the four steps of an update against plain gradients, samples by domain."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assemble, path

from jaxgen import conditions
from jaxgen import config as configs
from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import stargan2
from jaxgen.networks import stargan2 as networks
from jaxgen.networks.layers import Norm
from jaxgen.optim import Optim

slow = pytest.mark.slow  # compiles networks or trains

DOMAINS = 3
SMALL = dict(width=4, max_width=6, halvings=1, blocks=0, latent=3, style=2, hidden=5, mapping_layers=1)
SMALL |= dict(r1=0.3, style_weight=0.5, diversity=0.7, diversity_steps=4, cycle=2.0)
RATES = dict(generator=0.1, mapping=0.2, encoder=0.3, discriminator=0.4)


def build(image=(4, 6, 3), classes=DOMAINS, **model):
    optim = Optim(lambda name, times=1: optax.sgd(RATES[name]), 1, lambda step: 0.5)
    return stargan2.build(Context(image, classes, optim), **{**SMALL, **model})


@functools.cache
def family():
    f = build()
    names = ('init', 'update', 'sample', 'evaluate', 'trajectory')
    return f._replace(**{name: jax.jit(getattr(f, name)) for name in names})


def batch(n: int = 4) -> dict:
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(-1, 1, (n, 4, 6, 3)), jnp.float32)
    y = jnp.arange(n, dtype=jnp.int32) % 2
    return {'image': images, 'label': (y + 1) % DOMAINS, 'domain': y, 'index': jnp.arange(n, dtype=jnp.int32)}


@functools.cache
def start():
    """With running averages that are not the weights."""
    state = jax.jit(family().init)(jax.random.key(0), batch(), {})
    return state.replace(ema=jax.tree.map(lambda a: 0.9 * a, state.ema))


def applied(name: str, *args):
    wide = dict(width=4, max_width=6)
    net = {
        'generator': networks.Generator(halvings=1, blocks=0, **wide),
        'mapping': networks.Mapping(DOMAINS, 2, 5, 1),
        'encoder': networks.StyleEncoder(DOMAINS, 2, **wide),
        'discriminator': networks.Discriminator(DOMAINS, **wide),
    }[name]
    return lambda weights, *args: net.apply({'params': weights[name]}, *args)


translate, mapped, encoded, discriminate = map(applied, ('generator', 'mapping', 'encoder', 'discriminator'))


# --- networks


class Oracle:
    """The networks in torch's functions, on our weights."""

    def __init__(self):
        self.torch = pytest.importorskip('torch')
        self.F = self.torch.nn.functional

    def tensor(self, a):
        return self.torch.tensor(np.asarray(a))

    def conv(self, x, w):
        kernel = np.asarray(w['kernel'])
        kernel = kernel if kernel.ndim == 4 else kernel[None, None]
        bias = self.tensor(w['bias']) if 'bias' in w else None
        return self.F.conv2d(x, self.tensor(kernel).permute(3, 2, 0, 1), bias, padding=len(kernel) // 2)

    def linear(self, x, w):
        return self.F.linear(x, self.tensor(w['kernel']).T, self.tensor(w['bias']))

    def leaky(self, x):
        return self.F.leaky_relu(x, 0.2)

    def normed(self, x, w, s=None):
        """With weights of its own, or with those of a style: AdaIN."""
        if s is None:
            return self.F.instance_norm(x, weight=self.tensor(w['scale']), bias=self.tensor(w['bias']))
        gain, shift = self.linear(s, w['style'])[:, :, None, None].chunk(2, 1)
        return (1 + gain) * self.F.instance_norm(x) + shift

    def block(self, x, w, half=False, double=False, s=None, norms=(), residual=True):
        """Order of things as in the published code: shortcuts at full size are resized after their convolution."""

        def step(h, i):
            return self.conv(self.leaky(self.normed(h, w[norms[i]], s) if norms else h), w[f'conv{i + 1}'])

        def up(h):
            return self.F.interpolate(h, scale_factor=2, mode='nearest')

        if double:
            h = up(self.leaky(self.normed(x, w[norms[0]], s)))
            h = step(self.conv(h, w['conv1']), 1)
        else:
            h = step(x, 0)
            h = step(self.F.avg_pool2d(h, 2) if half else h, 1)
        if not residual:
            return h
        x = self.conv(up(x) if double else x, w['shortcut']) if 'shortcut' in w else up(x) if double else x
        return ((self.F.avg_pool2d(x, 2) if half else x) + h) / math.sqrt(2)

    def generator(self, w, x, s, halvings, blocks, high_pass=0.0, skips=(), mask=None):
        x, s = self.tensor(x).permute(0, 3, 1, 2), self.tensor(s)
        own, styled = ('GroupNorm_0', 'GroupNorm_1'), dict(norms=('norm1', 'norm2'), s=s, residual=not high_pass)
        x, maps = self.conv(x, w['first']), {}
        for i in range(halvings):
            maps[x.shape[2]] = x
            x = self.block(x, w[f'down{i}'], half=True, norms=own)
        for i in range(blocks):
            x = self.block(x, w[f'inner{i}'], norms=own)
        for i in range(blocks):
            x = self.block(x, w[f'outer{i}'], **styled)
        for i in reversed(range(halvings)):
            x = self.block(x, w[f'up{i}'], double=True, **styled)
            if x.shape[2] in skips:
                small = self.F.interpolate(self.tensor(mask).permute(0, 3, 1, 2), size=x.shape[2:], mode='bilinear')
                kernel = -self.torch.ones(x.shape[1], 1, 3, 3)
                kernel[:, :, 1, 1] = 8
                x = x + self.F.conv2d(small * maps[x.shape[2]], kernel / high_pass, padding=1, groups=x.shape[1])
        x = self.conv(self.leaky(self.normed(x, w['GroupNorm_0'])), w['last'])
        return x.permute(0, 2, 3, 1).numpy()

    def trunk(self, w, x, times):
        x = self.conv(self.tensor(x).permute(0, 3, 1, 2), w['first'])
        for i in range(times):
            x = self.block(x, w[f'down{i}'], half=True)
        kernel = np.asarray(w['whole']['kernel']).reshape(*x.shape[2:], x.shape[1], -1)
        x = self.F.conv2d(self.leaky(x), self.tensor(kernel).permute(3, 2, 0, 1), self.tensor(w['whole']['bias']))
        assert x.shape[2:] == (1, 1)
        return self.leaky(x)[:, :, 0, 0]

    def heads(self, w, x, label, layers):
        """Each example by the layers of its domain, one after another."""
        out = []
        for h, y in zip(x, label, strict=True):
            for i in range(layers):
                one = jax.tree.map(lambda a, y=y: np.asarray(a)[y], w['heads'][f'layer{i}'])
                h = self.linear(self.F.relu(h) if i else h, one)
            out.append(h)
        return self.torch.stack(out).numpy()


def random_weights(net, *args):
    rng = np.random.default_rng(1)
    like = jax.eval_shape(net.init, jax.random.key(0), *args)['params']
    return jax.tree.map(lambda a: (0.4 * rng.normal(size=a.shape)).astype(np.float32), like)


@pytest.mark.parametrize('faces', [False, True])
def test_generator_equals_torch(faces):
    oracle, rng = Oracle(), np.random.default_rng(0)
    x = rng.normal(size=(2, 16, 24, 3)).astype(np.float32)
    s = rng.normal(size=(2, 3)).astype(np.float32)
    mask = rng.uniform(size=(2, 16, 24, 1)).astype(np.float32)
    more = dict(high_pass=1.5, skips=(8, 16)) if faces else {}
    net = networks.Generator(width=4, max_width=6, halvings=2, blocks=1, **more)
    weights = random_weights(net, x, s)
    assert ('shortcut' in weights['up0']) == (not faces) and 'shortcut' in weights['down0']
    y = jax.jit(net.apply)({'params': weights}, x, s, mask)
    expected = oracle.generator(weights, x, s, 2, 1, **more, mask=mask)
    np.testing.assert_allclose(y, expected, atol=1e-4 * np.abs(expected).max())


def test_networks_of_vectors_equal_torch():
    oracle, rng = Oracle(), np.random.default_rng(2)
    x = rng.normal(size=(4, 16, 24, 1)).astype(np.float32)
    z, y = rng.normal(size=(4, 3)).astype(np.float32), np.array([2, 0, 1, 2])

    net = networks.Mapping(DOMAINS, 2, 5, 2)
    w = random_weights(net, z, y)
    h = oracle.linear(oracle.F.relu(oracle.linear(oracle.tensor(z), w['shared']['layer0'])), w['shared']['layer1'])
    expected = oracle.heads(w['own'], oracle.F.relu(h), y, 2)
    np.testing.assert_allclose(jax.jit(net.apply)({'params': w}, z, y), expected, atol=1e-5)

    net = networks.StyleEncoder(DOMAINS, 2, width=4, max_width=6)
    w = random_weights(net, x, y)
    expected = oracle.heads(w['own'], oracle.trunk(w['trunk'], x, 2), y, 1)
    np.testing.assert_allclose(jax.jit(net.apply)({'params': w}, x, y), expected, rtol=1e-4, atol=1e-4)

    net = networks.Discriminator(DOMAINS, width=4, max_width=6)
    w = random_weights(net, x, y)
    expected = oracle.linear(oracle.trunk(w['trunk'], x, 2), w['values']).numpy()[np.arange(4), y]
    np.testing.assert_allclose(jax.jit(net.apply)({'params': w}, x, y), expected, rtol=1e-4, atol=1e-4)


def test_norms_of_groups_leave_plain_colours():
    """An instance norm makes a constant map 0, a group norm does not."""
    x = jnp.broadcast_to(jnp.arange(8.0), (1, 4, 4, 8))
    one, groups = (Norm(n, 8, affine=False).apply({}, x) for n in ('instance', 'group'))
    np.testing.assert_allclose(one, 0, atol=1e-6)
    np.testing.assert_allclose(groups[0, 0, 0], np.tile((np.arange(4) - 1.5) / math.sqrt(1.25), 2), rtol=1e-4)


# --- the family


def test_partners_are_of_the_same_domain():
    label = jnp.array([0, 1, 0, 2, 1, 0])
    index = np.stack([stargan2.partners(label, jax.random.key(i)) for i in range(40)])
    assert (label[index] == label).all()
    assert (index[:, 3] == 3).all(), 'nothing else is of its domain'
    assert set(index[:, 0]) == {2, 5} and set(index[:, 1]) == {4}


@functools.partial(jax.jit, static_argnums=3)
def generators_loss(params, b, step, source):
    """As the paper has it, of the batch of an update."""
    x, y, target = b['image'], b['domain'], b['target']
    style = mapped if source == 'latent' else encoded
    s, s2 = (style(params, b[source][:, i], target) for i in range(2))
    made = translate(params, x, s)
    other = jax.lax.stop_gradient(translate(params, x, s2))
    value = -jnp.log(jax.nn.sigmoid(discriminate(params, made, target))).mean()
    value += 0.5 * jnp.abs(encoded(params, made, target) - s).mean()
    value -= 0.7 * (1 - step / 4) * jnp.abs(made - other).mean()
    return value + 2 * jnp.abs(translate(params, made, encoded(params, x, y)) - x).mean()


@jax.jit
def discriminators_loss(params, b, made):
    x, y = b['image'], b['domain']
    real, fake = discriminate(params, x, y), discriminate(params, made, b['target'])
    slope = jax.grad(lambda x: discriminate(params, x, y).sum())(x)
    value = -(jnp.log(jax.nn.sigmoid(real)) + jnp.log(jax.nn.sigmoid(-fake))).mean()
    return value + 0.3 * 0.5 * jnp.square(slope).sum((1, 2, 3)).mean()


@slow
def test_update_is_four_steps():
    """D's on both kinds of translations, G's on both, and F and E learn from styles of noise only."""
    before, b, key = start().replace(step=jnp.asarray(1)), batch(), jax.random.key(3)
    after, logs = family().update(before, {}, b, key)

    z_rng, order_rng, partner_rng, *_ = jax.random.split(key, 6)
    order = jax.random.permutation(order_rng, 4)
    second = stargan2.partners(b['domain'], partner_rng)[order]
    b = b | {
        'target': b['domain'][order],
        'latent': jax.random.normal(z_rng, (4, 2, 3)),
        'reference': jnp.stack([b['image'][order], b['image'][second]], 1),
    }
    params = before.params

    def stepped(params, gradient, names):
        new = {k: jax.tree.map(lambda w, g, k=k: w - RATES[k] * g, params[k], gradient[k]) for k in names}
        return params | new

    for source, style in (('latent', mapped), ('reference', encoded)):
        made = translate(before.params, b['image'], style(before.params, b[source][:, 0], b['target']))
        params = stepped(params, jax.grad(discriminators_loss)(params, b, made), ['discriminator'])
    for source, names in (('latent', ['generator', 'mapping', 'encoder']), ('reference', ['generator'])):
        expected, slope = jax.value_and_grad(generators_loss)(params, b, 1, source)
        assert float(logs[f'{source}/generator_loss']) == pytest.approx(float(expected), rel=1e-3)
        params = stepped(params, slope, names)
    for a, expected in zip(*map(jax.tree.leaves, (after.params, params)), strict=True):
        np.testing.assert_allclose(a, expected, rtol=2e-3, atol=2e-5)
    assert set(after.ema) == {'generator', 'mapping', 'encoder'} and after.extra is None


@slow
def test_samples_are_of_the_target_domain():
    f, state, b, key = family(), start(), batch(), jax.random.key(5)
    ema, x, y = state.ema, b['image'], b['domain']
    assert f.conditions == ('label', 'image') and f.divisor == 2
    z = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), (3,)) for i in range(4)])
    images = f.sample(state, {}, b, key)
    made = translate(ema, x, mapped(ema, z, b['label']))
    np.testing.assert_allclose(images, jnp.clip(made, -1, 1), atol=1e-5)
    np.testing.assert_array_equal(images, f.decode(state, {}, b, z, None))
    assert np.abs(images - f.sample(state, {}, b | {'label': y}, key)).max() > 1e-3

    rows = f.trajectory(state, {}, b, key)
    assert set(rows) == {'latent', 'references', 'results'}
    assert all(row.shape == (1 + DOMAINS, *x.shape) for row in rows.values())
    for i in range(DOMAINS):
        every = translate(ema, x, mapped(ema, z, jnp.full(4, i)))
        np.testing.assert_allclose(rows['latent'][1 + i], jnp.clip(every, -1, 1), atol=1e-5)
        j = (jnp.arange(4) + 1 + i) % 4
        np.testing.assert_allclose(rows['references'][1 + i], x[j])
        result = translate(ema, x, encoded(ema, x[j], y[j]))
        np.testing.assert_allclose(rows['results'][1 + i], jnp.clip(result, -1, 1), atol=1e-5)


@slow
def test_metrics_are_of_other_domains():
    f, state, b, key = family(), start(), batch(), jax.random.key(6)
    ema, x, y = state.ema, b['image'], b['domain']
    metrics = f.evaluate(state, {}, b, key)
    keys = [jax.random.split(jax.random.fold_in(key, i)) for i in range(4)]
    z = jnp.stack([jax.random.normal(k[0], (2, 3)) for k in keys])
    target = jnp.stack([(y[i] + jax.random.randint(k[1], (), 1, DOMAINS)) % DOMAINS for i, k in enumerate(keys)])
    assert (target != y).all()
    s = mapped(ema, z[:, 0], target)
    made, other = translate(ema, x, s), translate(ema, x, mapped(ema, z[:, 1], target))
    expected = {
        'cycle_error': jnp.abs(translate(ema, made, encoded(ema, x, y)) - x).mean((1, 2, 3)),
        'style_error': jnp.abs(encoded(ema, made, target) - s).mean(1),
        'diversity': jnp.abs(made - other).mean((1, 2, 3)),
    }
    assert set(metrics) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name], values, rtol=1e-3, atol=1e-5, err_msg=name)


@slow
def test_masks_are_features():
    f = build((4, 4, 3), mask='mask', high_pass=1.0, skips=(4,))
    assert f.conditions == ('label', 'image', 'mask')
    b = {k: v[:, :, :4] if v.ndim == 4 else v for k, v in batch().items()}
    key = jax.random.key(0)
    b['mask'] = jnp.ones((4, 4, 4, 1))
    state = jax.eval_shape(f.init, key, b, {})
    assert jax.eval_shape(f.update, state, {}, b, key)[0] == state
    with pytest.raises(UserError, match='one channel'):
        jax.eval_shape(f.init, key, b | {'mask': b['image']}, {})


@slow
def test_rates_go_by_updates():
    """Generator and discriminator take two steps an update; a schedule ends with the updates all the same."""
    steps = {}

    def tx(name, times=1):
        steps.setdefault(name, set()).add(times)
        return optax.sgd(0.1)

    f = stargan2.build(Context((4, 4, 3), DOMAINS, Optim(tx, 1, lambda step: 0.5)), **SMALL)
    b = {k: v[:, :, :4] if v.ndim == 4 else v for k, v in batch().items()}
    state = jax.eval_shape(f.init, jax.random.key(0), b, {})
    steps.clear()
    jax.eval_shape(f.update, state, {}, b, jax.random.key(0))
    assert steps == {'generator': {2}, 'discriminator': {2}, 'mapping': {1}, 'encoder': {1}}


@pytest.mark.parametrize('model, message', [
    (dict(classes=0), 'needs domains'), (dict(halvings=3), 'multiple of 8'), (dict(width=0), 'width'),
    (dict(max_width=2), 'max_width'), (dict(norm='batch'), 'norm'), (dict(cycle=-1.0), 'cycle'),
    (dict(skips=(4,)), 'skips'), (dict(high_pass=1.0), 'skips'), (dict(high_pass=1.0, skips=(2,)), 'skips'),
    (dict(mask='mask'), 'mask'), (dict(image=(4, 4, 3), halvings=2), '2 pixels of the smallest'),
])  # fmt: skip
def test_says_what_is_wrong(model, message):
    with pytest.raises(UserError, match=message) as error:
        build(**model)
    assert 'config.' in str(error.value) and '\n' not in str(error.value)


@slow
def test_the_domain_of_the_source_image_is_no_condition():
    config = configs.load(path('stargan2_digits'))
    with pytest.raises(UserError, match='set label'):
        conditions.provider(assemble(config), config, {'domain': 3})
