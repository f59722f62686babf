"""VDM: its network against plain torch, its schedule, its bound against slow and closed forms, its samples."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import config as configs
from jaxgen.config import DEFAULTS
from jaxgen.contract import Context
from jaxgen.diffusion.processes import expanded
from jaxgen.errors import UserError
from jaxgen.families import vdm
from jaxgen.networks.denoisers import bind
from jaxgen.networks.vdm import Schedule, VDMNet
from jaxgen.optim import decay_mask, make_optim

pytestmark = pytest.mark.slow  # compiles networks, trains or starts processes

X = np.random.default_rng(1).normal(size=(3, 4, 6, 2)).astype(np.float32)
T = np.array([0, 312.25, 1000], np.float32)
CLASSES = np.eye(3, dtype=np.float32)  # one-hot


def randomised(shapes):
    """Weights of these shapes, none of them special: layers that start at zero are not zero."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        fan = math.prod(leaf.shape[-4:-1]) if path[-1].key == 'kernel' else 20
        values = rng.normal(size=leaf.shape) / math.sqrt(fan)
        return (values + (path[-1].key == 'scale')).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def network(conditional=False, **options):
    """A small network and random weights of it."""
    vector = CLASSES if conditional else None
    net = VDMNet(**{'channels': 8, 'blocks': 2, **options})
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), X, T, vector, train=False))['params']
    return net, randomised(shapes)


@functools.cache
def compiled(net, train=False):
    def run(params, key, *args):
        return net.apply({'params': params}, *args, train=train, rngs={'dropout': key})

    return jax.jit(run)


def plain(net, params, x, t, vector):
    """The network by torch's plain functions: NHWC arrays to [n, C, H, W]."""
    import torch
    from torch.nn import functional as F

    params = jax.tree.map(torch.from_numpy, params)

    def of_layer(name, i):
        return jax.tree.map(lambda a: a[i], params[name])

    def dense(p, x):
        return F.linear(x, p['kernel'].T, p.get('bias'))

    def conv(p, x, pad=1):
        kernel = p['kernel'] if p['kernel'].ndim == 4 else p['kernel'][None, None]
        return F.conv2d(x, kernel.permute(3, 2, 0, 1), p['bias'], padding=pad)

    def norm(p, x):
        groups = min(net.groups, x.shape[1] // net.group_size) if net.group_size else net.groups
        return F.group_norm(x, groups, p['scale'], p['bias'], eps=net.eps)

    def block(p, x):
        h = conv(p['conv1'], F.silu(norm(p['norm1'], x))) + dense(p['condition'], condition)[..., None, None]
        h = conv(p['conv2'], F.silu(norm(p['norm2'], h)))
        return h + (conv(p['shortcut'], x, pad=0) if 'shortcut' in p else x)

    def attend(p, x):
        q, k, v = conv(p['qkv'], norm(p['norm'], x), pad=0).flatten(2).chunk(3, 1)  # [n, C, HW]
        weights = torch.softmax(torch.einsum('ncq,nck->nqk', q, k) / q.shape[1] ** 0.5, -1)
        return x + conv(p['out'], torch.einsum('nqk,nck->ncq', weights, v).reshape(x.shape), pad=0)

    def layer(p, x):
        x = block(p['block'], x)
        return attend(p['attention'], x) if 'attention' in p else x

    x, t = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t)[:, None]
    half = net.channels // 2
    angles = t * 10_000.0 ** (-torch.arange(half) / (half - 1))
    vector = torch.zeros(len(t), 1) if vector is None else torch.from_numpy(vector)
    condition = torch.cat([angles.sin(), angles.cos(), vector], 1)
    for name in ('time1', 'time2'):
        condition = F.silu(dense(params[name], condition))

    angles = [x[:, c] * (2 * np.float32(np.pi) * 2.0**k) for c in range(x.shape[1]) for k in net.fourier]
    features = [torch.sin(a) for a in angles] + [torch.cos(a) for a in angles]
    h = conv(params['first'], torch.cat([x, torch.stack(features, 1)], 1) if features else x)
    skips = [h]
    for i in range(net.blocks):
        h = layer(of_layer('down', i), h)
        skips.append(h)
    h = block(params['middle_0'], h)
    h = block(params['middle_1'], attend(params['middle_attention'], h))
    for i in range(net.blocks + 1):
        h = layer(of_layer('up', i), torch.cat([h, skips.pop()], 1))
    assert not skips
    return conv(params['last'], F.silu(norm(params['norm'], h)))


@pytest.mark.parametrize('options', [
    {},
    {'attention': True, 'conditional': True, 'fourier': (3, 5, 6)},
    {'fourier': ()},
    {'attention': True, 'groups': 8, 'group_size': 0, 'eps': 0.1},
])  # fmt: skip
def test_equals_plain_torch(options):
    pytest.importorskip('torch')
    net, params = network(**options)
    vector = CLASSES if options.get('conditional') else None
    ours = compiled(net)(params, jax.random.key(0), X, T, vector)
    theirs = plain(net, params, X, T, vector).numpy().transpose(0, 2, 3, 1)
    assert theirs.std() > 0.05
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_remat_keeps_a_block_s_inputs_alone():
    """Counted without computing: what the backward pass is left by the forward one."""

    def kept(blocks, remat):
        params = network(blocks=blocks)[1]
        net = VDMNet(8, blocks, remat=remat)

        def of(params):
            return net.apply({'params': params}, X, T, train=True, rngs={'dropout': jax.random.key(0)})

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(of, p)[1], params)))

    def of_one_more_block(remat):
        weights = [sum(leaf.size for leaf in jax.tree.leaves(network(blocks=b)[1])) for b in (2, 3)]
        return kept(3, remat) - kept(2, remat) - (weights[1] - weights[0])

    area = 3 * 4 * 6
    # On the way down its input, on the way up its input and the other half's output; and its keys.
    assert of_one_more_block(True) <= area * (8 + 8 + 8) + 8
    assert of_one_more_block(False) > area * 8 * 10


def test_dropout_in_training():
    net, params = network(dropout=0.5)
    apply = compiled(net, True)
    a, b, c = (np.asarray(apply(params, jax.random.key(i), X, T, None)) for i in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-2


# ---- The schedule


def schedule(kind, features=7):
    """A schedule with ends -4.5 and 3, steep at first, and weights of both signs; new ones have other ends."""
    module = Schedule(kind, -6.0, 4.0, features)
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda a: jnp.float32(4 * rng.normal(size=a.shape)), shapes_of(module))
    if kind != 'fixed':
        params |= {'start': jnp.float32(-4.5), 'span': jnp.float32(-7.5)}
    if kind == 'network':
        params |= {'l1': jnp.float32(-0.5), 'l2_bias': jnp.abs(params['l2_bias'])}
    return module, params


def shapes_of(module):
    return jax.eval_shape(lambda: module.init(jax.random.key(0))).get('params', {})


@pytest.mark.parametrize('kind', ['fixed', 'scalar', 'network'])
def test_schedule_increases_from_end_to_end(kind):
    module, params = schedule(kind)
    assert (set(params) == set()) == (kind == 'fixed')
    ends = module.apply({'params': params})
    np.testing.assert_allclose(ends, (-6, 4) if kind == 'fixed' else (-4.5, 3))

    t = jnp.linspace(0, 1, 1001)
    values = np.asarray(module.apply({'params': params}, t, method='normalised'))
    assert values[0] == 0 and values[-1] == 1 and (np.diff(values) > 0).all()
    if kind == 'network':
        assert np.abs(values - t).max() > 0.05, 'it is no straight line'
        one, two, three = (np.abs(np.float64(params[name])) for name in ('l1', 'l2', 'l3'))
        slow = []
        for time in np.linspace(-1, 1, 1001):
            inside = one * time
            outputs = [
                c / (1 + np.exp(-(a * inside + b))) for a, b, c in zip(two, params['l2_bias'], three, strict=True)
            ]
            slow.append(inside + np.mean(outputs))
        slow = (np.array(slow) - slow[0]) / (slow[-1] - slow[0])
        np.testing.assert_allclose(values, slow, atol=1e-5)
    else:
        np.testing.assert_allclose(values, t)


def test_a_new_schedule_is_nearly_straight_from_end_to_end():
    module = Schedule('network', -13.3, 5.0)
    params = module.init(jax.random.key(0))
    np.testing.assert_allclose(module.apply(params), (-13.3, 5.0), rtol=1e-6)
    t = jnp.linspace(0, 1, 11)
    np.testing.assert_allclose(module.apply(params, t, method='normalised'), t, atol=0.02)


# ---- The family, with a function of z and gamma in the network's place

LOW, HIGH = -9.0, 9.0


class Stub(nn.Module):
    """Makes eps_hat what the function says; w, a weight, is its third argument."""

    eps_hat: Callable
    low: float
    high: float

    @nn.compact
    def __call__(self, z, t, *, train):
        gamma = self.low + (self.high - self.low) * expanded(t / 1000, z)
        return self.eps_hat(z, gamma, self.param('w', nn.initializers.constant(0.7), ())) - z


def context(**changes):
    return Context((4, 4, 1), 0, make_optim(10, **DEFAULTS['optim']))._replace(**changes)


def sgd(**changes):
    """An optimiser whose steps are the gradients."""
    return make_optim(10, **{**DEFAULTS['optim'], 'name': 'sgd', 'b1': 0.0, 'lr': 1.0, **changes})


@pytest.fixture
def family(monkeypatch):
    """(eps_hat, changes of the context, fields of the schedule, **options) -> the family, its State."""

    def make(eps_hat, changes=(), schedule=(), **options):
        schedule = {'name': 'fixed', 'gamma_min': LOW, 'gamma_max': HIGH, **dict(schedule)}
        stub = Stub(eps_hat, schedule['gamma_min'], schedule['gamma_max'])
        monkeypatch.setattr(vdm.denoisers, 'bind', lambda _, conditioning: bind(stub, conditioning))
        made = vdm.build(context(**dict(changes)), schedule=schedule, **options)
        return made, made.init(jax.random.key(0), {}, {})

    return make


def sigmoid(gamma):
    return 1 / (1 + np.exp(-gamma))


def levels(rng, shape, mean=0.0, std=0.4):
    """Images at 256 levels, of pixels that are as good as normal."""
    level = np.clip(np.rint((rng.normal(mean, std, shape) + 1) * 127.5), 0, 255)
    return (level / 127.5 - 1).astype(np.float32)


def test_times_are_spread_evenly():
    t = np.asarray(vdm.antithetic_times(jax.random.key(0), 10))
    assert (t >= 0).all() and (t < 1).all()
    np.testing.assert_allclose(np.diff(np.sort(t)), 0.1, atol=1e-6)
    np.testing.assert_allclose((t[1:] - t[:-1]) % 1, 0.1, atol=1e-6)
    assert abs(vdm.antithetic_times(jax.random.key(1), 10)[0] - t[0]) > 1e-3


def test_times_are_those_of_the_whole_batch(family):
    """With an eps_hat beside which eps is nothing, the loss is a function of the times alone."""
    x = jnp.zeros((8, 4, 4, 1))
    logs = []
    for parts in (1, 2):
        made, state = family(lambda z, gamma, w: 1e4 * (gamma - LOW) + 0 * z, {'optim': sgd(accumulate=parts)})
        logs.append(jax.jit(made.update)(state, {}, {'image': x}, jax.random.key(1))[1]['loss'])
    np.testing.assert_allclose(*logs, rtol=1e-3)
    t = (np.asarray(vdm.antithetic_times(jax.random.split(jax.random.key(1))[0], 8)) * 18 * 1e4) ** 2
    np.testing.assert_allclose(logs[0], 9 * t.mean() / math.log(2), rtol=1e-3)


def test_reconstruction_is_a_softmax_of_256_levels():
    rng = np.random.default_rng(0)
    x, eps = levels(rng, (5, 4, 4, 1)), rng.normal(size=(5, 4, 4, 1))
    x[:, 0], x[:, 1] = -1, 1  # beside the first and the last there are levels on one side only
    gamma = -8.5
    middles = (2 * np.arange(256) + 1) / 256 - 1
    alpha, sigma = np.sqrt(sigmoid(-gamma)), np.sqrt(sigmoid(gamma))
    expected = np.zeros(5)
    for i in range(5):
        for pixel, noise in zip(x[i].ravel(), eps[i].ravel(), strict=True):
            level = round((float(pixel) + 1) * 127.5)
            z = alpha * middles[level] + sigma * noise
            masses = np.exp(-((z / alpha - middles) ** 2) * alpha**2 / (2 * sigma**2))
            expected[i] -= np.log(masses[level] / masses.sum())
    assert expected.min() > 16 * 0.4
    np.testing.assert_allclose(vdm.reconstruction_loss(x, jnp.float32(eps), jnp.float32(gamma)), expected, rtol=1e-4)


def slow_bound(x, gammas, w):
    """The bound's prior and diffusion terms in nats, eps_hat = w z: KL divergences from their definitions.

    q(z_s | z_t, x) and p(z_s | z_t) = q(z_s | z_t, x_hat) have one variance and means that differ in x (section 3.3,
    appendix A). The mean over eps is taken by hand: z_t and x_hat are linear in it.
    """
    f = np.float64(x) * 255 / 256
    alpha2, sigma2 = sigmoid(-gammas), sigmoid(gammas)
    prior = 0.5 * (alpha2[-1] * f**2 + sigma2[-1] - np.log(sigma2[-1]) - 1).sum()
    total = 0.0
    for s, t in zip(range(len(gammas) - 1), range(1, len(gammas)), strict=True):
        between = sigma2[t] - alpha2[t] / alpha2[s] * sigma2[s]  # variance of z_t given z_s
        variance = between * sigma2[s] / sigma2[t]
        weight = np.sqrt(alpha2[s]) * between / sigma2[t]  # of x in the mean
        sigma, alpha = np.sqrt(sigma2[t]), np.sqrt(alpha2[t])
        of_x, of_eps = sigma * w, -(1 - sigma * w) * sigma / alpha  # x - x_hat = of_x x + of_eps eps
        total += weight**2 * ((of_x * f) ** 2 + of_eps**2).sum() / (2 * variance)
    return prior, total


@pytest.mark.parametrize('timesteps', [5, 0])
def test_bound_is_the_sum_over_all_steps(family, timesteps):
    made, state = family(
        lambda z, gamma, w: w * z, schedule={'name': 'network', 'gamma_min': -6.0, 'gamma_max': 4.0},
        timesteps=timesteps, likelihood={'times': timesteps or 20},
    )  # fmt: skip
    params = schedule('network', 1024)[1]
    state = state.replace(params={**state.params, 'schedule': params}, ema={**state.ema, 'schedule': params})
    n = 2048
    x = jnp.asarray(np.broadcast_to(levels(np.random.default_rng(0), (4, 4, 1)), (n, 4, 4, 1)))
    metrics = jax.jit(made.evaluate)(state, {}, {'image': x, 'index': jnp.arange(n)}, jax.random.key(0))

    module = Schedule('network', -6.0, 4.0)
    u = module.apply({'params': params}, jnp.linspace(0, 1, 1 + (timesteps or 4000)), method='normalised')
    prior, diffusion = slow_bound(x[0], -4.5 + 7.5 * np.float64(u), 0.7)
    bits = 1 / (16 * math.log(2))
    np.testing.assert_allclose(metrics['bits_prior'], bits * prior, rtol=1e-4)
    total = metrics['bits_diffusion']
    error = np.std(total) / math.sqrt(n)
    assert error < 0.015 * bits * diffusion
    tolerance = 4 * error + (0 if timesteps else 0.002 * bits * diffusion)
    assert abs(total.mean() - bits * diffusion) < tolerance, (total.mean(), bits * diffusion)
    parts = sum(metrics[f'bits_{part}'] for part in ('prior', 'reconstruction', 'diffusion'))
    np.testing.assert_allclose(metrics['bits_per_dim'], parts, rtol=1e-5)

    # One time for each example, as training has it: another estimate of the same.
    _, logs = jax.jit(made.update)(state, {}, {'image': x}, jax.random.key(5))
    np.testing.assert_allclose(logs['diffusion'], bits * diffusion, rtol=0.05)
    np.testing.assert_allclose(logs['prior'], bits * prior, rtol=1e-4)
    np.testing.assert_allclose(logs['reconstruction'], metrics['bits_reconstruction'].mean(), rtol=0.02)
    np.testing.assert_allclose(logs['loss'], sum(logs[k] for k in ('prior', 'reconstruction', 'diffusion')), rtol=1e-5)
    np.testing.assert_allclose([logs['gamma_0'], logs['gamma_1']], (-4.5, 3))


MEAN, STD = 0.1, 0.2


def exact(z, gamma, w):
    """E[eps | z] where all pixels are N(MEAN, STD^2)."""
    alpha, sigma = jnp.sqrt(jax.nn.sigmoid(-gamma)), jnp.sqrt(jax.nn.sigmoid(gamma))
    return sigma * (z - alpha * MEAN * 255 / 256) / ((alpha * STD * 255 / 256) ** 2 + sigma**2)


def test_bound_of_a_normal_comes_down_to_its_likelihood(family):
    n = 1024
    x = levels(np.random.default_rng(0), (n, 4, 4, 1), MEAN, STD)
    log_mass = -0.5 * ((x - MEAN) / STD) ** 2 - math.log(STD * math.sqrt(2 * math.pi)) + math.log(2 / 255)
    bits = {}
    for steps in (4, 32, 0):
        made, state = family(exact, timesteps=steps, likelihood={'times': steps or 64})
        metrics = jax.jit(made.evaluate)(state, {}, {'image': x, 'index': jnp.arange(n)}, jax.random.key(0))
        bits[steps] = float(metrics['bits_per_dim'].mean())
    truth = -log_mass.mean() / math.log(2)
    # Too high by about 0.002, since each pixel's softmax at z_0 knows nothing of the others' distribution.
    assert abs(bits[0] - truth) < 0.08, (bits, truth)
    assert bits[4] > bits[32] + 4 > bits[0] + 5, bits


def test_samples_of_a_normal(family):
    """Mean and variance follow step by step, as eps_hat is linear; with many steps they are the data's."""

    def moments(steps):
        gammas = LOW + (HIGH - LOW) * np.arange(steps + 1) / steps
        alpha, sigma = np.sqrt(sigmoid(-gammas)), np.sqrt(sigmoid(gammas))
        mean, variance = 0.0, 1.0
        for s, t in reversed(list(zip(range(steps), range(1, steps + 1), strict=True))):
            keep = (alpha[t] / alpha[s]) ** 2  # of the variance of z_s, in z_t
            between = sigma[t] ** 2 - keep * sigma[s] ** 2
            slope = sigma[t] / ((alpha[t] * STD * 255 / 256) ** 2 + sigma[t] ** 2)
            # Mean of q(z_s | z_t, x_hat) with x_hat = (z_t - sigma_t eps_hat) / alpha_t.
            of_z, of_x = np.sqrt(keep) * sigma[s] ** 2 / sigma[t] ** 2, alpha[s] * between / sigma[t] ** 2
            factor = of_z + of_x * (1 - sigma[t] * slope) / alpha[t]
            offset = of_x * sigma[t] * slope * MEAN * 255 / 256
            mean = factor * mean + offset
            variance = factor**2 * variance + between * sigma[s] ** 2 / sigma[t] ** 2
        scale = 255 / 256 * alpha[0]
        return mean / scale, np.sqrt(variance / scale**2 + (2 / 255) ** 2 / 12)

    np.testing.assert_allclose(moments(4000), (MEAN, STD), rtol=0.01)
    made, state = family(exact, sampler={'steps': 40})
    x = jax.jit(made.sample)(state, {}, {'index': jnp.arange(1024)}, jax.random.key(0))
    mean, std = moments(40)
    assert std < 0.97 * STD
    assert abs(x.mean() - mean) < 4 * std / 128
    np.testing.assert_allclose(x.std(), std, rtol=4 / math.sqrt(2 * x.size))
    np.testing.assert_allclose(np.rint((x + 1) * 127.5), (x + 1) * 127.5, atol=1e-4)
    path = jax.jit(made.trajectory)(state, {}, {'index': jnp.arange(4)}, jax.random.key(0))
    assert path['x'].shape == path['x_0'].shape == (40, 4, 4, 4, 1)
    np.testing.assert_allclose(path['x'][0], x[:4], atol=0.02)  # the scan runs down to entry 0


def test_denoise_is_the_posterior_mean(family):
    made, state = family(exact)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 1)), jnp.float32)
    sigma = jnp.array([0.05, 0.5, 20.0])
    variance = np.asarray(sigma**2)[:, None, None, None]
    expected = (STD**2 * x + variance * MEAN) / (STD**2 + variance)
    np.testing.assert_allclose(made.denoise(state, {}, {}, x, sigma), expected, atol=1e-4)


@pytest.mark.parametrize('timesteps', [3, 0])
def test_vectors_are_images_of_another_shape(timesteps, family):
    """With a network of single values: losses, samples and bits are those of images of the same values."""
    x, results = levels(np.random.default_rng(0), (4, 16), MEAN, STD), []
    for shape in ((4, 4, 1), (16,)):
        made, state = family(exact, {'image': shape}, timesteps=timesteps, sampler={'steps': 3})
        batch = {'image': jnp.asarray(x.reshape(4, *shape)), 'index': jnp.arange(4)}
        _, logs = made.update(state, {}, batch, jax.random.key(1))
        sample = made.sample(state, {}, batch, jax.random.key(2))
        assert sample.shape == (4, *shape)
        results.append((logs['loss'], sample.reshape(4, 16), made.evaluate(state, {}, batch, jax.random.key(3))))
    chex.assert_trees_all_close(*results, rtol=1e-5)


def test_a_network_that_knows_the_image(family):
    """With eps_hat = (z - alpha f) / sigma no term is left, and all samples are the image."""
    x = levels(np.random.default_rng(0), (4, 4, 1))

    def known(z, gamma, w):
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(-gamma)), jnp.sqrt(jax.nn.sigmoid(gamma))
        return (z - alpha * x * 255 / 256) / sigma

    made, state = family(known, schedule={'gamma_min': -16.0}, sampler={'steps': 20})
    batch = {'index': jnp.arange(4), 'image': jnp.broadcast_to(x, (4, 4, 4, 1))}
    np.testing.assert_allclose(jax.jit(made.sample)(state, {}, batch, jax.random.key(0)), batch['image'], atol=1e-6)
    # Moved by a 256th, images would cost some bits.
    assert jax.jit(made.evaluate)(state, {}, batch, jax.random.key(0))['bits_diffusion'].max() < 1e-3
    assert jax.jit(made.update)(state, {}, batch, jax.random.key(0))[1]['diffusion'] < 1e-3


# ---- What the schedule learns


def test_gradient_of_the_square_for_the_last_two():
    """One backward pass has two gradients: the means' for the weights, the mean squares' for the schedule."""
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(6, 3)))
    weights, ends = jnp.float32(rng.normal(size=3)), (jnp.float32(-2), jnp.float32(3))
    eta = jnp.float32(rng.normal(size=4))

    def pair(eta):
        return jnp.tanh(x[:, 0] * eta[0] + eta[1]), jnp.exp(x[:, 1] * eta[2] + eta[3])

    def terms(weights, ends, u_t, other):
        gamma = ends[0] + (ends[1] - ends[0]) * u_t
        return other * jnp.square(jnp.sin(gamma[:, None] * x) @ weights)

    def value(function, power=1):
        return lambda weights, ends, eta: (function(weights, ends, *pair(eta)) ** power).mean()

    both = vdm.squared_for_last_two(terms)
    gradients = jax.jit(jax.grad(value(both), (0, 1, 2)))(weights, ends, eta)
    first = jax.jit(jax.grad(value(terms), (0, 1)))(weights, ends, eta)
    second = jax.jit(jax.grad(value(terms, 2), 2))(weights, ends, eta)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves((*first, second)), strict=True):
        assert jnp.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, rtol=1e-4)
    np.testing.assert_array_equal(both(weights, ends, *pair(eta)), terms(weights, ends, *pair(eta)))


def changes_of(family, loss):
    made, state = family(
        lambda z, gamma, w: w * z * jax.nn.sigmoid(gamma), {'optim': sgd(accumulate=2)},
        schedule={'name': 'network', 'gamma_min': -3.0, 'gamma_max': 2.0, 'loss': loss},
    )  # fmt: skip
    state = state.replace(params={**state.params, 'schedule': schedule('network', 1024)[1]})
    x = levels(np.random.default_rng(0), (8, 4, 4, 1))
    after, logs = jax.jit(made.update)(state, {}, {'image': x}, jax.random.key(1))
    return jax.tree.map(lambda a, b: np.asarray(a - b), after.params, state.params), logs


def test_variance_trains_what_is_between_the_ends_and_nothing_else(family):
    bound, logs = changes_of(family, 'bound')
    variance, same = changes_of(family, 'variance')
    np.testing.assert_allclose(logs['loss'], same['loss'], rtol=1e-5)
    for path in (('denoiser', 'w'), ('schedule', 'start'), ('schedule', 'span')):
        a, b = (tree[path[0]][path[1]] for tree in (bound, variance))
        assert abs(a) > 1e-4
        np.testing.assert_allclose(a, b, rtol=1e-3)
    for name in ('l2', 'l2_bias', 'l3'):
        difference = np.abs(bound['schedule'][name] - variance['schedule'][name]).max()
        assert difference > 0.2 * np.abs(bound['schedule'][name]).max()


def test_variance_straightens_a_schedule_where_all_levels_cost_the_same(family):
    """With eps_hat = 0 a term is gamma'(t) / 2 |eps|^2: its variance is least where gamma' is constant."""
    optim = make_optim(10, **{**DEFAULTS['optim'], 'lr': 0.03})
    made, state = family(
        lambda z, gamma, w: 0 * w * z, {'optim': optim, 'image': (2, 2, 1)},
        schedule={'name': 'network', 'loss': 'variance'},
    )  # fmt: skip
    bent = schedule('network', 1024)[1]
    state = state.replace(params={**state.params, 'schedule': bent})
    x = jnp.zeros((64, 2, 2, 1))

    @jax.jit
    def train(state):
        keys = jax.random.split(jax.random.key(0), 200)
        return jax.lax.scan(lambda s, k: (made.update(s, {}, {'image': x}, k)[0], None), state, keys)[0]

    module = Schedule('network', LOW, HIGH)
    t = jnp.linspace(0, 1, 101)

    def steepest(state):
        values = module.apply({'params': state.params['schedule']}, t, method='normalised')
        return float(np.square(100 * np.diff(values)).mean())  # 1 where it is straight, else more

    before, after = steepest(state), steepest(train(state))
    assert before > 1.03 and after - 1 < 0.1 * (before - 1), (before, after)


# ---- The whole


def test_samples_and_bits_follow_the_class():
    made = vdm.build(
        context(classes=10), network={'channels': 8, 'blocks': 1}, conditioning={'label': {}}, sampler={'steps': 5},
        likelihood={'times': 2}, schedule={'gamma_min': -6.0},
    )  # fmt: skip
    assert made.conditions == ('label',)
    state = jax.eval_shape(made.init, jax.random.key(0), {'label': jnp.zeros(1, jnp.int32)}, {})
    ema = {**randomised(state.params), 'schedule': {'start': -6.0, 'span': 11.0}}
    state = state.replace(ema=ema, params={}, opt={})
    label = jnp.array([3, 3, 4, 3])
    index = jnp.arange(4)
    draw = jax.jit(made.sample)
    x, y = (draw(state, {}, {'index': index, 'label': l}, jax.random.key(0)) for l in (label, label.at[1].set(7)))
    assert jnp.abs(x - y)[1].max() > 1e-2
    np.testing.assert_array_equal(x[jnp.array([0, 2, 3])], y[jnp.array([0, 2, 3])])
    image = jnp.zeros((4, 4, 4, 1)) + 1 / 255
    measure = jax.jit(made.evaluate)
    a, b = (
        measure(state, {}, {'index': index, 'image': image, 'label': l}, jax.random.key(0))['bits_diffusion']
        for l in (label, label.at[1].set(7))
    )
    assert a[1] != b[1] and a[0] == b[0]


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        ({'schedule': 'linear'}, ['schedule', 'scalar', "'linear'"]),
        ({'schedule': {'name': 'network', 'loss': 'mse'}}, ['schedule.loss', 'variance']),
        ({'schedule': {'name': 'scalar', 'loss': 'variance'}}, ['schedule.loss', 'no such field']),
        ({'schedule': {'name': 'network', 'loss': 'variance'}, 'timesteps': 10}, ['timesteps', '10']),
        ({'schedule': {'gamma_min': 5.0}}, ['gamma_min', '5']),
        ({'network': {'channels': 7}}, ['network.channels', '7']),
        ({'network': {'blocks': 0}}, ['network.blocks', '0']),
        ({'network': {'channels': 48, 'group_size': 0}}, ['network.groups = 32', '48']),
        ({'network': {'groups': 0}}, ['network.groups', '0']),
        ({'network': {'dropout': 1.0}}, ['network.dropout', '1']),
        ({'timesteps': -1}, ['timesteps', '-1']),
        ({'sampler': {'steps': -1}}, ['sampler.steps', '-1']),
        ({'likelihood': {'times': 0}}, ['likelihood.times', '0']),
        ({'conditioning': {'label': {}}}, ['conditioning.label', 'label']),
        ({'conditioning': {'mask': {}}}, ['conditioning.mask', 'planes']),
    ],
)
def test_refuses_in_one_line(options, says):
    with pytest.raises(UserError) as error:
        vdm.build(context(), **options)
    assert '\n' not in str(error.value)
    for part in says:
        assert re.search(part, str(error.value)), str(error.value)


def test_weight_decay_is_of_all_but_biases_as_in_the_release():
    """Also of the scales of group norms and of the schedule's ends."""
    config = configs.load('configs/vdm_cifar10.py')
    network = dict(channels=8, blocks=1, attention=True, group_size=4)
    context = Context((8, 8, 3), 0, make_optim(1, batch=1, **config.optim.to_dict()))
    family = vdm.build(context, network=network)
    params = jax.eval_shape(family.init, jax.random.key(0), {'image': jnp.zeros((1, 8, 8, 3))}, {}).params
    for name, weights in params.items():
        patterns = {**config.optim, **config.optim.networks.get(name, {})}['no_decay']
        for path, kept in jax.tree.leaves_with_path(decay_mask(weights, tuple(patterns))):
            assert kept == (path[-1].key != 'bias'), path


def test_augmentation_is_a_condition_of_the_network():
    """In training the flag is the network's input; the bound and samples are those of images as they are."""
    import support

    config = support.tiny('vdm_digits', model=dict(augmentation='turns'))
    a, batch = support.assemble(config), support.first_batch(config)
    plain = support.assemble(support.tiny('vdm_digits'))
    state = jax.jit(a.family.init)(jax.random.key(0), batch, {})
    state = state.replace(params=randomised(state.params), ema=randomised(state.ema))
    for family in (a.family, plain.family):  # the same weights serve both, the flag 0 in one of them
        np.testing.assert_array_equal(
            family.evaluate(state, {}, batch | {'index': np.arange(len(batch['image']))}, jax.random.key(1))[
                'bits_per_dim'
            ],
            plain.family.evaluate(state, {}, batch | {'index': np.arange(len(batch['image']))}, jax.random.key(1))[
                'bits_per_dim'
            ],
        )
    logs = a.family.update(state, {}, batch, jax.random.key(2))[1]
    assert logs['loss'] != plain.family.update(state, {}, batch, jax.random.key(2))[1]['loss']
    with pytest.raises(UserError, match='no place for label'):
        support.assemble(support.tiny('vdm_digits', **{'data': dict(features=('image', 'label')), 'model': dict(
            augmentation='turns', conditioning=dict(label={}))}))  # fmt: skip
    with pytest.raises(UserError, match='must be square'):
        support.assemble(support.tiny('vdm_digits', model=dict(augmentation='turns'), data=dict(size=(8, 12))))
