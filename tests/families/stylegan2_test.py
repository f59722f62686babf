"""StyleGAN2: layers and networks against torch and slow oracles, penalties, the update against a plain one."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.config import DEFAULTS
from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import stylegan2
from jaxgen.networks import stylegan2 as networks
from jaxgen.optim import make_optim

slow = pytest.mark.slow  # compiles networks or trains

SMALL = dict(latent=6, mapping_layers=2, channel_base=32, channel_max=6, group=2, augmentation=())


def optim(**fields):
    common = DEFAULTS['optim'] | dict(name='sgd', lr=1e-2, b1=0.0, b2=0.99, clip=0.0, ema=0.5, ema_warmup=False)
    return make_optim(8, **{**common, **fields})


def family(image=(4, 4, 1), classes=0, by=None, **model):
    return stylegan2.build(Context(image, classes, by or optim()), **{**SMALL, **model})


def images(n=4, size=4, channels=1) -> dict:
    return {'image': jax.random.uniform(jax.random.key(3), (n, size, size, channels), minval=-1, maxval=1)}


def randomised(tree, seed: int):
    """Weights of about one size, none zero: a wrong axis or a missing bias shows."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([jax.random.normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)])


# --- oracles in torch, NCHW, from weights in our layout


class Torch:
    """StyleGAN2's layers by their definitions, in double precision."""

    def __init__(self):
        self.torch = pytest.importorskip('torch')
        self.F = self.torch.nn.functional

    def tensor(self, a):
        return self.torch.tensor(np.asarray(a, np.float64))

    def maps(self, a):
        return self.tensor(np.asarray(a).transpose(0, 3, 1, 2))

    def kernel(self, a):
        return self.tensor(np.asarray(a).transpose(3, 2, 0, 1))

    def fir(self, x, gain=1.0):
        taps = self.tensor([1, 3, 3, 1]) / 8
        taps = gain * taps[:, None] * taps[None]
        return self.F.conv2d(x, taps.expand(x.shape[1], 1, 4, 4), groups=x.shape[1])

    def holes(self, x):
        y = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        y[:, :, ::2, ::2] = x
        return y

    def doubled(self, x):
        return self.fir(self.F.pad(self.holes(x), (2, 1, 2, 1)), 4.0)

    def modulated(self, x, kernel, style, demodulate=True, up=False):
        """Kernels of each example's own, and a convolution with as many groups as examples."""
        w = self.kernel(kernel)[None] * style[:, None, :, None, None]  # [n, O, C, k, k]
        if demodulate:
            w = w / (w.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
        if up:  # padded for the filter and the kernel together, before the filter
            x = self.fir(self.F.pad(self.holes(x), (3, 2, 3, 2)), 4.0)
        n, padding = len(x), 0 if up else w.shape[-1] // 2
        y = self.F.conv2d(x.reshape(1, -1, *x.shape[2:]), w.flatten(0, 1), groups=n, padding=padding)
        return y.reshape(n, -1, *y.shape[2:])

    def dense(self, x, w, rate=1.0):
        return x @ self.tensor(w['kernel']) * rate / math.sqrt(x.shape[1]) + rate * self.tensor(w['bias'])

    def leaky(self, x):
        return self.F.leaky_relu(x, 0.2) * math.sqrt(2)

    def conv(self, x, w, down=False):
        kernel = self.kernel(w['kernel'])
        k = kernel.shape[-1]
        kernel = kernel / math.sqrt(kernel.shape[1] * k * k)
        bias = self.tensor(w['bias']) if 'bias' in w else None
        if down:
            x = self.fir(self.F.pad(x, (1 + k // 2,) * 4))
            return self.F.conv2d(x, kernel, bias, stride=2)
        return self.F.conv2d(x, kernel, bias, padding=k // 2)

    def mapping(self, z, label, w, layers):
        def unit(x):
            return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()

        inputs = [] if z is None else [unit(self.tensor(z))]
        if 'embedding' in w:
            one_hot = np.eye(w['embedding']['kernel'].shape[0])[np.asarray(label)]
            inputs.append(unit(self.dense(self.tensor(one_hot), w['embedding'])))
        x = self.torch.cat(inputs, 1)
        for i in range(layers):
            x = self.leaky(self.dense(x, w[f'layer{i}'], 0.01))
        return x

    def synthesis(self, ws, noise, params, sizes):
        ws, noise = self.tensor(ws), [self.maps(one) for one in noise]
        x = self.tensor(params['constant']).permute(2, 0, 1)[None].expand(len(ws), -1, -1, -1)
        image, layer = None, 0
        for size in sizes:
            block = params[f'block{size}']
            for i in range(1 if size == 4 else 2):
                w = block[f'conv{i}']
                style = self.dense(ws[:, layer], w['style'])
                x = self.modulated(x, w['kernel'], style, up=size > 4 and i == 0)
                x = x + float(w['noise_strength']) * noise[layer]
                x = self.leaky(x + self.tensor(w['bias'])[None, :, None, None])
                layer += 1
            w = block['image']
            style = self.dense(ws[:, layer], w['style']) / math.sqrt(x.shape[1])
            part = self.modulated(x, w['kernel'], style, demodulate=False) + self.tensor(w['bias'])[None, :, None, None]
            image = part if image is None else self.doubled(image) + part
        return image.permute(0, 2, 3, 1).numpy()

    def discriminator(self, x, label, w, sizes, layers, group):
        x = self.leaky(self.conv(self.maps(x), w['first']))
        for size in sizes[:0:-1]:
            block = w[f'block{size}']
            h = self.leaky(self.conv(x, block['conv0']))
            h = self.leaky(self.conv(h, block['conv1'], down=True))
            x = (self.conv(x, block['shortcut'], down=True) + h) / math.sqrt(2)
        deviation = []
        for i in range(0, len(x), group):
            part = x[i : i + group]
            deviation += [(part.var(0, unbiased=False) + 1e-8).sqrt().mean()] * group
        deviation = self.torch.stack(deviation)
        x = self.torch.cat([x, deviation[:, None, None, None].expand(-1, 1, 4, 4)], 1)
        x = self.leaky(self.conv(x, w['conv']))
        x = self.leaky(self.dense(x.permute(0, 2, 3, 1).flatten(1), w['dense']))
        x = self.dense(x, w['value'])
        if 'mapping' not in w:
            return x[:, 0].numpy(), deviation.numpy()
        of_class = self.mapping(None, label, w['mapping'], layers)
        return (x * of_class).sum(1).numpy() / math.sqrt(x.shape[1]), deviation.numpy()


@pytest.mark.parametrize('up', [False, True])
@pytest.mark.parametrize('demodulate', [False, True])
@slow
def test_modulated_convolution_is_the_grouped_one(up, demodulate):
    oracle = Torch()
    x, kernel, style = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(3, 5, 4, 6), (3, 3, 6, 7), (3, 6)])
    )

    def ours(x, kernel, style):
        return networks.modulated(x, kernel, style, demodulate=demodulate, up=up)

    got, back = jax.vjp(ours, x, kernel, style)
    torch_x, torch_style = oracle.maps(x).requires_grad_(), oracle.tensor(style).requires_grad_()
    want = oracle.modulated(torch_x, kernel, torch_style, demodulate, up)
    np.testing.assert_allclose(got, want.detach().permute(0, 2, 3, 1), atol=2e-5)
    slope = jax.random.normal(jax.random.key(5), got.shape)
    want.backward(oracle.maps(slope))
    dx, _, dstyle = back(slope)
    np.testing.assert_allclose(dx, torch_x.grad.permute(0, 2, 3, 1), atol=2e-5)
    np.testing.assert_allclose(dstyle, torch_style.grad, atol=2e-4)


@slow
def test_networks_equal_torch():
    oracle = Torch()
    g = networks.Generator(16, 3, 5, 2, 4, channel_base=64, channel_max=7)
    z, label = jax.random.normal(jax.random.key(0), (4, 5)), jnp.array([3, 0, 1, 1])
    weights = randomised(jax.eval_shape(g.init, jax.random.key(1), z, label)['params'], 2)
    w = g.apply({'params': weights}, z, label, method='map')
    want = oracle.mapping(z, label, weights['mapping'], 2)
    np.testing.assert_allclose(w, want, rtol=1e-4, atol=1e-6)

    layers, sizes = networks.styles(16), networks.noise_sizes(16)
    assert (layers, sizes) == (6, [4, 8, 8, 16, 16])
    ws = jax.random.normal(jax.random.key(3), (4, layers, 5))
    noise = [jax.random.normal(jax.random.key(i), (4, s, s, 1)) for i, s in enumerate(sizes)]
    got = jax.jit(lambda ws, noise: g.apply({'params': weights}, ws, noise, method='synthesise'))(ws, noise)
    assert got.shape == (4, 16, 16, 3)
    np.testing.assert_allclose(got, oracle.synthesis(ws, noise, weights['synthesis'], [4, 8, 16]), atol=2e-4)

    x = jax.random.normal(jax.random.key(4), (4, 16, 16, 3))
    for classes in (0, 4):
        d = networks.Discriminator(64, 7, 2, 2, classes)
        weights = randomised(jax.eval_shape(d.init, jax.random.key(1), x, label)['params'], 6)
        got = jax.jit(lambda x, d=d, weights=weights: d.apply({'params': weights}, x, label))(x)
        want = oracle.discriminator(x, label, weights, [4, 8, 16], 2, 2)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_layers_start_with_outputs_of_one_size_and_learn_at_one_rate():
    x = jax.random.normal(jax.random.key(0), (500, 40))
    for rate in (1.0, 0.01):
        layer = networks.Dense(60, rate=rate)
        weights = layer.init(jax.random.key(1), x)
        assert abs(layer.apply(weights, x).std() - 1) < 0.05
        # A step of Adam moves each weight by the learning rate: what the layer computes, by that times `rate`.
        moved = jax.tree.map(lambda w: w + 0.1, weights)
        change = layer.apply(moved, jnp.ones((1, 40))) - layer.apply(weights, jnp.ones((1, 40)))
        np.testing.assert_allclose(change, np.full((1, 60), 0.1 * rate * (math.sqrt(40) + 1)), rtol=1e-2)


@pytest.mark.parametrize('n, group, size', [(8, 4, 4), (6, 4, 3), (7, 4, 1), (3, 4, 3), (2, 1, 1)])
def test_minibatch_deviation_is_the_loops(n, group, size):
    x = np.random.default_rng(0).normal(size=(n, 2, 3, 5)).astype('float32')
    want = []
    for i in range(n):
        first = i // size * size
        deviations = [
            math.sqrt(np.var([x[j, r, c, k] for j in range(first, first + size)]) + 1e-8)
            for r in range(2)
            for c in range(3)
            for k in range(5)
        ]
        want.append(np.mean(deviations))
    np.testing.assert_allclose(networks.minibatch_deviation(jnp.asarray(x), group), want, rtol=1e-4)


@slow
def test_path_lengths_are_those_of_the_jacobian():
    a = jax.random.normal(jax.random.key(0), (3, 4, 2 * 6 * 2))

    def synthesise(w):  # [n, 3, 4] -> [n, 2, 6, 2]
        return jnp.tanh(jnp.einsum('nlk,lkp->np', w, a)).reshape(-1, 2, 6, 2)

    w = jax.random.normal(jax.random.key(1), (5, 3, 4))
    got = stylegan2.path_lengths(synthesise, w, jax.random.key(2))
    y = jax.random.normal(jax.random.key(2), (5, 2, 6, 2)) / math.sqrt(12)
    for i in range(5):
        jacobian = jax.jacrev(lambda one: synthesise(one[None])[0])(w[i])  # [2, 6, 2, 3, 4]
        product = jnp.einsum('hwclk,hwc->lk', jacobian, y[i])
        np.testing.assert_allclose(got[i], jnp.sqrt((product**2).sum(1).mean()), rtol=1e-4)


@slow
def test_mixing_takes_the_second_style_from_a_layer_on():
    n, layers = 6000, 5
    ws = stylegan2.mix(jnp.zeros((n, 2)), jnp.ones((n, 2)), layers, 0.6, jax.random.key(0))
    assert ws.shape == (n, layers, 2) and (ws[..., 0] == ws[..., 1]).all()
    second = np.asarray(ws[..., 0])
    assert (np.diff(second, axis=1) >= 0).all() and (second[:, 0] == 0).all()
    fractions = np.bincount(second.sum(1).astype(int), minlength=layers) / n
    np.testing.assert_allclose(fractions, [0.4, *[0.15] * 4], atol=0.02)


@slow
def test_lazy_penalties_are_the_eager_ones_in_the_mean():
    """The gradient of k updates is that of a penalty in each: k times as large in one, and none in the others."""
    batch, key = images(), jax.random.key(1)
    start = jax.jit(family().init)(jax.random.key(0), batch, {})
    start = start.replace(params=randomised(start.params, 5))

    def change(network, step, **model):
        state = start.replace(step=jnp.int32(step))
        after, _ = update(network, **model)(state, {}, batch, key)
        return jax.tree.map(jnp.subtract, after.params[network], state.params[network])

    programs = {}

    def update(network, **model):
        name = tuple(model.items())
        if name not in programs:
            programs[name] = jax.jit(family(**{'r1': 0.0, 'path': 0.0, **model}).update)
        return programs[name]

    for network, weight, every in (('discriminator', 'r1', 'r1_every'), ('generator', 'path', 'path_every')):
        none = change(network, 0)
        eager = jax.tree.map(jnp.subtract, change(network, 0, **{weight: 1.0, every: 1}), none)
        lazy = [jax.tree.map(jnp.subtract, change(network, step, **{weight: 1.0, every: 3}), none) for step in range(3)]
        assert max(float(jnp.abs(w).max()) for w in jax.tree.leaves(eager)) > 1e-3
        chex.assert_trees_all_close(lazy[0], jax.tree.map(lambda b: 3 * b, eager), rtol=1e-3, atol=2e-5)
        assert all((w == 0).all() for w in jax.tree.leaves(lazy[1:]))


def test_schedules_go_by_updates_where_there_are_more_steps():
    by = stylegan2.counted(optim(schedule='linear'), 4)
    tx = by.tx('generator')
    opt, rates = tx.init(jnp.zeros(())), []
    for update in range(8):
        for _ in range(2 if update % 4 == 0 else 1):
            change, opt = tx.update(jnp.ones(()), opt, jnp.zeros(()))
        rates.append(-float(change))
    np.testing.assert_allclose(rates, 1e-2 * (1 - np.arange(8) / 8), rtol=1e-5)


@slow
def test_update_is_the_algorithm_written_out():
    """Four plain gradient steps, each on one network's loss, and the values kept beside the weights."""
    f = family(r1=0.3, r1_every=1, path=2.0, path_every=1, mixing=0.0, by=optim(accumulate=1))
    batch, n = images(), 4
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    state = state.replace(extra={**state.extra, 'path_length': jnp.float32(0.5)})
    got, logs = jax.jit(f.update)(state, {}, batch, jax.random.key(9))

    g = networks.Generator(4, 1, 6, 2, 0, 32, 6)
    d = networks.Discriminator(32, 6, 2, 2)
    latents, of_g, of_path, of_d, _ = jax.random.split(jax.random.key(9), 5)
    z = jax.random.normal(latents, (n, 2, 2, 6))

    def synthesise(weights, w, noise):
        return g.apply({'params': weights}, jnp.repeat(w[:, None], 2, 1), [noise], method='synthesise')

    def to_w(weights, z):
        return g.apply({'params': weights}, z, method='map')

    def noise(key, n):
        return jax.random.normal(key, (n, 16)).reshape(n, 4, 4, 1)

    def discriminate(weights, x):
        return d.apply({'params': weights}, x)[0]

    def step(weights, loss):
        value, slope = jax.jit(jax.value_and_grad(loss))(weights)
        return jax.tree.map(lambda w, s: w - 1e-2 * s, weights, slope), value

    def fakes(weights, z, key):
        return synthesise(weights, to_w(weights, z), noise(jax.random.split(key)[1], len(z)))

    generator, discriminator = state.params['generator'], state.params['discriminator']
    generator, g_value = step(
        generator,
        lambda p: jax.nn.softplus(-discriminate(discriminator, fakes(p, z[:, 0, 0], jax.random.split(of_g)[0]))).mean(),
    )

    _, noise_key, pixel_key = jax.random.split(of_path, 3)
    y = jax.random.normal(pixel_key, (2, 4, 4, 1)) / 4
    half = z[::2, 0, 0]

    def lengths(p):
        def inner(ws):
            return (g.apply({'params': p}, ws, [noise(noise_key, 2)], method='synthesise') * y).sum()

        slope = jax.grad(inner)(jnp.repeat(to_w(p, half)[:, None], 2, 1))
        return jnp.sqrt((slope**2).sum(2).mean(1))

    mean = 0.99 * 0.5 + 0.01 * lengths(generator).mean()
    generator, path = step(generator, lambda p: 2 * ((lengths(p) - mean) ** 2).mean())
    fake = fakes(generator, z[:, 1, 0], jax.random.split(of_d, 3)[0])

    def d_loss(p):
        return jax.nn.softplus(discriminate(p, fake)).mean() + jax.nn.softplus(-discriminate(p, batch['image'])).mean()

    signs = jnp.sign(discriminate(discriminator, batch['image'])).mean()
    discriminator, d_value = step(discriminator, d_loss)

    def penalty(p):
        slope = jax.grad(lambda x: discriminate(p, x).sum())(batch['image'])
        return 0.3 / 2 * (slope**2).sum() / n

    discriminator, r1 = step(discriminator, penalty)
    for name, want in (('generator', generator), ('discriminator', discriminator)):
        chex.assert_trees_all_close(got.params[name], want, atol=2e-5)
    expected = {'generator_loss': g_value, 'discriminator_loss': d_value, 'path': path / 2, 'r1': r1 / 0.3}
    for name, value in {**expected, 'path_length': mean, 'signs': signs}.items():
        np.testing.assert_allclose(logs[name], value, rtol=1e-3, atol=1e-6, err_msg=name)
    average = jax.tree.map(lambda a, b: (a + b) / 2, state.params['generator'], generator)
    chex.assert_trees_all_close(got.ema['generator'], average, atol=1e-5)
    np.testing.assert_allclose(got.extra['w'], to_w(average, z[:, 0, 0]).mean(0), atol=1e-5)


@slow
def test_augmentation_follows_the_signs_of_the_discriminator():
    model = dict(augmentation=('blit',), augment_every=2, augment_images=160, r1=0.0, path=0.0, augment_p=0.5)
    f, batch = family(**model, by=optim(lr=1e-9)), images()
    update = jax.jit(f.update)
    start = jax.jit(f.init)(jax.random.key(0), batch, {})
    for bias, expected in ((100.0, [0.5, 0.55, 0.55, 0.6]), (-100.0, [0.5, 0.45, 0.45, 0.4])):
        state = start.replace(params=jax.tree.map(jnp.copy, start.params))
        state.params['discriminator']['value']['bias'] = jnp.full(1, bias)
        for i, p in enumerate(expected):
            state, logs = update(state, {}, batch, jax.random.key(i))
            assert logs['signs'] == np.sign(bias)
            np.testing.assert_allclose(state.extra['p'], p, rtol=1e-6)
            assert state.extra['signs'] == (0 if i % 2 else np.sign(bias))
    fixed = jax.jit(family(**{**model, 'augment_target': 0.0}, by=optim(lr=1e-9)).update)
    assert fixed(start, {}, batch, jax.random.key(0))[0].extra['p'] == 0.5


@slow
def test_samples_are_truncated_and_have_their_own_noise():
    batch, index = images(), {'index': jnp.arange(3, dtype=jnp.int32)}
    state = jax.jit(family().init)(jax.random.key(0), batch, {})
    weights = randomised(state.ema['generator'], 4)
    state = state.replace(ema={'generator': weights}, extra={**state.extra, 'w': jnp.arange(6.0)})
    g = networks.Generator(4, 1, 6, 2, 0, 32, 6)
    key = jax.random.key(5)
    pairs = [jax.random.split(jax.random.fold_in(key, i)) for i in range(3)]
    z = jnp.stack([jax.random.normal(a, (6,)) for a, _ in pairs])
    noise = jnp.stack([jax.random.normal(b, (1, 16)).reshape(4, 4, 1) for _, b in pairs])
    w = g.apply({'params': weights}, z, method='map')
    for psi in (1.0, 0.4, 0.0):
        got = family(truncation=psi).sample(state, {}, index, key)
        ws = jnp.repeat((jnp.arange(6.0) + psi * (w - jnp.arange(6.0)))[:, None], 2, 1)
        want = g.apply({'params': weights}, ws, [noise], method='synthesise')
        np.testing.assert_allclose(got, jnp.clip(want, -1, 1), atol=1e-5)


@slow
def test_projection_reconstructs_an_image_of_its_own():
    f, batch = family(projection_steps=150), images(4)
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    key, latents = jax.random.key(2), jax.random.normal(jax.random.key(1), (3, 6))
    x = f.decode(state, {}, {}, latents, key)
    w = jax.jit(f.encode)(state, {}, {'image': x}, key)
    assert w.shape == (3, 6)
    far = jnp.square(f.decode(state, {}, {}, jnp.zeros((3, 6)), key) - x).mean((1, 2, 3))
    near = jnp.square(f.decode(state, {}, {}, w, key) - x).mean((1, 2, 3))
    assert (near < 0.1 * far.mean()).all(), (near, far)  # of one image the middle of W may happen to be near


@slow
def test_white_noise_has_no_autocorrelation_and_stripes_have():
    noise = jax.random.normal(jax.random.key(0), (2, 32, 32, 1))
    stripes = jnp.broadcast_to(jnp.sign(jnp.sin(jnp.arange(32) / 4 + 0.1))[:, None, None], (1, 32, 32, 1))
    slow = 0.0
    one = np.asarray(stripes[0, :, :, 0], np.float64)
    while True:
        slow += np.mean(one * np.roll(one, 1, 0)) ** 2 + np.mean(one * np.roll(one, 1, 1)) ** 2
        if len(one) <= 8:
            break
        one = one.reshape(len(one) // 2, 2, len(one) // 2, 2).mean((1, 3))
    np.testing.assert_allclose(stylegan2.autocorrelation(stripes), [slow], rtol=1e-5)
    assert (stylegan2.autocorrelation(noise) < 0.05 * slow).all()


def test_mistakes_are_one_line(no_compile):
    wrong = dict(r1=-1.0, mixing=1.5, group=0, augmentation=('blur',), channel_base=2, augment_p=2.0, truncation=-0.1)
    wrong |= dict(augment_target=60.0)
    for field, value in wrong.items():
        with pytest.raises(UserError, match=rf'config\.model\.{field} must be') as error:
            family(**{field: value})
        assert '\n' not in str(error.value)
    with pytest.raises(UserError, match=r'config\.data\.size = 12 must be a power of two'):
        family((12, 12, 1))
    with pytest.raises(UserError, match=r'config\.model\.conditional'):
        family(conditional=True)
    with pytest.raises(UserError, match=r'config\.data\.batch = 3 must be a multiple of 2'):
        jax.eval_shape(lambda: family().init(jax.random.key(0), images(3), {}))
