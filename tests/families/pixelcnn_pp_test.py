"""PixelCNN++: the mixture's probabilities and samples, the authors' layers in torch, causality, the cached sampler."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references import influence, outputs_by_pixel, randomised
from scipy import special
from support import context, optimiser

from jaxgen.errors import UserError
from jaxgen.families import pixelcnn_pp
from jaxgen.losses import likelihoods
from jaxgen.networks.masked import CausalConvTranspose
from jaxgen.networks.pixelcnn import Condition
from jaxgen.networks.pixelcnn_pp import PixelCNNpp

slow = pytest.mark.slow  # compiles networks

SMALL = dict(outputs=5, filters=6, blocks=1, scales=3, classes=4)


def inputs(height: int, width: int, channels: int = 1, n: int = 4) -> np.ndarray:
    """Images, and ones beside them."""
    x = np.random.default_rng(1).uniform(-1, 1, (n, height, width, channels))
    return np.concatenate([x, np.ones_like(x[..., :1])], -1).astype(np.float32)


def condition(n: int) -> Condition:
    return Condition(jnp.arange(n) % 4)


def weights(network, x, seed: int = 0):
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, condition(len(x))))
    return randomised(shapes, seed)


# The distribution.


def test_mixture_by_hand():
    """Two components, three colours, one pixel: the sums as the paper writes them, in float64."""
    rng = np.random.default_rng(0)
    parameters = rng.normal(size=20)
    x = np.array([-1.0, 2 / 255 * 101 - 1, 1.0])
    logits, rest = parameters[:2], parameters[2:].reshape(3, 6)
    means, log_scales, c = rest[:, :2], rest[:, 2:4], np.tanh(rest[:, 4:])
    means = np.stack([means[0], means[1] + c[0] * x[0], means[2] + c[1] * x[0] + c[2] * x[1]])
    upper = special.expit((x[:, None] + 1 / 255 - means) / np.exp(log_scales))
    lower = special.expit((x[:, None] - 1 / 255 - means) / np.exp(log_scales))
    upper[2], lower[0] = 1, 0  # the last and the first value
    expected = np.log((special.softmax(logits) * (upper - lower).prod(0)).sum())
    actual = likelihoods.discretised_logistic_mixture(jnp.float32(parameters[None]), jnp.float32(x[None]))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize('channels, levels', [(1, 256), (3, 5)])
@slow
def test_mixture_sums_to_one(channels, levels):
    size = likelihoods.logistic_mixture_size(channels, 3)
    assert size == (9 if channels == 1 else 30)
    for std in (0.3, 3.0, 30.0):  # the last: means far outside, scales at their least
        parameters = np.random.default_rng(3).normal(size=size) * std
        values = np.array(list(itertools.product(range(levels), repeat=channels)))
        x = jnp.float32(2 * values / (levels - 1) - 1)
        log_p = likelihoods.discretised_logistic_mixture(jnp.float32(np.tile(parameters, (len(x), 1))), x, levels)
        assert np.isfinite(log_p).all()
        assert abs(np.exp(np.float64(log_p)).sum() - 1) < 1e-4


def test_mixture_has_a_gradient_everywhere():
    x = jnp.linspace(-1, 1, 7)[:, None]
    parameters = jnp.float32([[0.0, 0.0, 50.0, -50.0, -12.0, -12.0]]) * jnp.ones((7, 1))
    gradient = jax.grad(lambda p: likelihoods.discretised_logistic_mixture(p, x).sum())(parameters)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1


@slow
def test_samples_of_the_mixture_have_its_distribution():
    n, levels = 40_000, 3
    parameters = np.random.default_rng(5).normal(size=20).astype(np.float32)
    values = np.array(list(itertools.product(range(levels), repeat=3)))
    log_p = likelihoods.discretised_logistic_mixture(jnp.tile(parameters, (27, 1)), jnp.float32(values - 1), levels)
    p = np.exp(np.float64(log_p))
    keys = jax.random.split(jax.random.key(0), n)
    drawn = likelihoods.draw_logistic_mixture(keys, jnp.tile(parameters, (n, 1)), 3, levels)
    counts = np.bincount(np.asarray(drawn) @ [9, 3, 1], minlength=27)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 27 + 5 * math.sqrt(54)


# The network.


@slow
def test_a_pixel_depends_on_all_earlier_ones_and_no_other():
    network, x = PixelCNNpp(**{**SMALL, 'scales': 2}), inputs(4, 6)
    params = weights(network, x)

    def apply(x):
        return network.apply(params, jnp.concatenate([x, jnp.ones_like(x)], -1), condition(len(x)))[..., None, :]

    actual = influence(apply, x[..., :1], 1)
    np.testing.assert_array_equal(actual != 0, np.tri(24, k=-1, dtype=bool))


@pytest.mark.parametrize('scales, height, width', [(1, 3, 4), (3, 8, 12)])
@slow
def test_outputs_by_pixel_equal_those_of_the_whole_image(scales, height, width):
    network, x = PixelCNNpp(**{**SMALL, 'scales': scales}), inputs(height, width, 3, n=2)
    params = weights(network, x)
    whole = jax.jit(network.apply)(params, x, condition(2))
    np.testing.assert_allclose(outputs_by_pixel(network, params, x, condition(2), scales), whole, atol=2e-5)


@slow
def test_network_by_torch():
    """The authors' model once more, in torch, on the same weights."""
    torch = pytest.importorskip('torch')
    from torch.nn import functional as F

    network, x = PixelCNNpp(**{**SMALL, 'scales': 2}), inputs(4, 8, 3, n=3)
    variables = weights(network, x)
    p = variables['params']
    label = np.arange(3)

    def normed(q):
        v = torch.tensor(q['v'])
        return (v / v.square().sum((0, 1, 2)).sqrt() * torch.tensor(q['scale'])), torch.tensor(q['bias'])

    def conv(x, q, right=0, stride=1):
        """The last row is the pixel's; the last column lies `right` beyond it."""
        w, b = normed(q)
        x = F.pad(x, (w.shape[1] - 1 - right, right, w.shape[0] - 1, 0))
        return F.conv2d(x, w.permute(3, 2, 0, 1), b, stride)

    def up(x, q, cut):
        """Transposed, `cut` columns dropped at the left."""
        w, b = normed(q)
        height, width = x.shape[2:]
        y = F.conv_transpose2d(x, w.permute(2, 3, 0, 1), b, 2)
        return y[:, :, : 2 * height, cut : 2 * width + cut]

    def crelu(x):
        return F.elu(torch.cat([x, -x], 1))

    def block(x, aux, q, right):
        h = conv(crelu(x), q['conv1'], right)
        if aux is not None:
            h = h + conv(crelu(aux), q['beside'])
        h = conv(crelu(h), q['conv2'], right) + torch.tensor(q['label']['embedding'][label])[:, :, None, None]
        a, b = h.chunk(2, 1)
        return x + a * b.sigmoid()

    image = torch.tensor(x.transpose(0, 3, 1, 2))
    u = F.pad(conv(image, p['first_rows'], 1), (0, 0, 1, 0))[:, :, :-1]
    ul = F.pad(conv(image, p['first_above'], 1), (0, 0, 1, 0))[:, :, :-1]
    ul = ul + F.pad(conv(image, p['first_left']), (1, 0))[..., :-1]
    us, uls = [u], [ul]
    for s in range(2):
        us.append(block(us[-1], None, p[f'down{s}_0_rows'], 1))
        uls.append(block(uls[-1], us[-1], p[f'down{s}_0_pixels'], 0))
        if s == 0:
            us.append(conv(us[-1], p['half0_rows'], 1, 2))
            uls.append(conv(uls[-1], p['half0_pixels'], 0, 2))
    u, ul = us.pop(), uls.pop()
    for name in ('up1_0', None, 'up0_0', 'up0_1'):
        if name is None:
            u, ul = up(u, p['twice0_rows'], 1), up(ul, p['twice0_pixels'], 0)
            continue
        u = block(u, us.pop(), p[f'{name}_rows'], 1)
        ul = block(ul, torch.cat([u, uls.pop()], 1), p[f'{name}_pixels'], 0)
    assert not us and not uls
    expected = conv(F.elu(ul), p['out']).permute(0, 2, 3, 1)
    actual = jax.jit(network.apply)(variables, x, Condition(jnp.asarray(label)))
    np.testing.assert_allclose(actual, expected, atol=2e-5)


@slow
def test_the_first_batch_sets_scales_and_biases():
    network, x = (
        CausalConvTranspose(5, 3),
        3 + 2 * np.random.default_rng(0).normal(size=(4, 6, 6, 2)).astype(np.float32),
    )
    y = network.apply(network.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-4)


# The family.


def family(image, classes: int = 0, **model):
    of_images = context(image, classes, optim=optimiser(optax.adam(1e-2)))
    return pixelcnn_pp.build(of_images, **{**dict(filters=4, blocks=1, scales=2, mixtures=2, dropout=0.2), **model})


def state(f, batch):
    shapes = jax.eval_shape(f.init, jax.random.key(0), batch, {})
    params = randomised(shapes.params, 3)
    return shapes.replace(params=params, ema=params, step=jnp.zeros((), jnp.int32))


@slow
def test_cached_samples_equal_plain_ones_and_lie_on_the_levels():
    batch, drawn = {'index': jnp.array([7, 3, 11]), 'label': jnp.array([0, 3, 1])}, []
    for sampler in ('cached', 'plain'):
        f = family((4, 6, 3), 4, conditional=True, sampler=sampler)
        s = state(f, {'image': jnp.zeros((2, 4, 6, 3)), 'label': jnp.zeros(2, jnp.int32)})
        drawn.append(np.asarray(jax.jit(f.sample)(s, {}, batch, jax.random.key(4))))
    np.testing.assert_array_equal(*drawn)
    levels = (drawn[0] + 1) * 127.5
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
    assert len(np.unique(np.round(levels))) > 40


@slow
def test_probabilities_of_an_image_sum_to_one():
    """Of two pixels with 256 values each, one given by the other."""
    f = family((1, 2, 1), scales=1)
    values = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing='ij'), -1).reshape(-1, 1, 2, 1)
    batch = {'image': jnp.float32(values / 127.5 - 1), 'index': jnp.arange(256**2)}
    s = state(f, batch)
    metrics = jax.jit(f.evaluate)(s, {}, batch, jax.random.key(0))
    p = np.exp(-np.float64(metrics['nll'])).reshape(256, 256)
    assert abs(p.sum() - 1) < 1e-3
    np.testing.assert_allclose(metrics['bits_per_dim'], metrics['nll'] / (2 * math.log(2)), rtol=1e-5)
    second = p / p.sum(1, keepdims=True)
    assert np.abs(second[0] - second[255]).max() > 1e-3, 'the second pixel does not depend on the first'


@pytest.mark.parametrize('model', [
    dict(scales=3), dict(filters=0), dict(mixtures=0), dict(dropout=1.0), dict(sampler='quick'),
    dict(conditional=True), dict(temperature=-1.0),
])  # fmt: skip
def test_refuses(model):
    with pytest.raises(UserError, match=r'config\.') as error:
        family((6, 6, 1), **model)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('log_scale', [-6, -1, 2, 6, 20, 87, 90, 300])
@slow
def test_mixture_of_any_width_is_the_mass_of_its_bins(log_scale):
    """At 90 the scale is infinite in float32, and the logarithm of the mass still a small number."""
    x, mean, half = np.array([-1.0, 0.0039215, 0.5019607, 1.0]), 0.3, 1 / 255
    parameters = np.tile(np.float32([0.0, mean, log_scale]), (4, 1))

    def log_p(parameters):
        return likelihoods.discretised_logistic_mixture(parameters, jnp.float32(x[:, None]))

    upper, lower = (np.exp(-log_scale) * (x - mean + side) for side in (half, -half))
    log_sigmoid = [-np.logaddexp(0, -upper), -np.logaddexp(0, lower)]
    want = np.log(-np.expm1(-2 * half * np.exp(-float(log_scale)))) + log_sigmoid[0] + log_sigmoid[1]
    want[0], want[-1] = log_sigmoid[0][0], log_sigmoid[1][-1]
    np.testing.assert_allclose(log_p(parameters), want, rtol=1e-4, atol=1e-5)
    assert np.isfinite(jax.grad(lambda p: log_p(p).sum())(parameters)).all()
    for temperature in (0.0, 1.0):
        keys = jax.random.split(jax.random.key(0), 4)
        drawn = likelihoods.draw_logistic_mixture(keys, jnp.asarray(parameters), 1, temperature=temperature)
        assert ((drawn >= 0) & (drawn <= 255)).all()
        assert temperature or (drawn == round((mean + 1) / 2 * 255)).all()
