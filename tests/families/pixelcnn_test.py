"""PixelCNNs: what each value depends on, likelihoods by enumeration, the cached sampler, the prior of codes."""

from __future__ import annotations

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references import influence, outputs_by_pixel, randomised
from support import context, sgd

from jaxgen import config as configs
from jaxgen.contract import Family, Latents
from jaxgen.errors import UserError
from jaxgen.families import pixelcnn
from jaxgen.networks.masked import kernel_mask
from jaxgen.networks.pixelcnn import Condition, GatedPixelCNN, PixelCNN, Snail

slow = pytest.mark.slow  # compiles networks

CNN = dict(channels=9, blocks=4, kernel=3, head=12)
GATED = dict(channels=9, blocks=3, kernel=3, hidden_kernel=3, head=12)
SNAIL = dict(channels=8, blocks=1, layers=1, heads=2)
NETWORKS = {
    'pixelcnn': PixelCNN(**CNN, levels=3),
    'pixelcnn in colour': PixelCNN(**{**CNN, 'channels': 8}, colours=3, levels=2),  # no multiple of 3
    'gated': GatedPixelCNN(**GATED, levels=3),
    'gated in colour': GatedPixelCNN(**{**GATED, 'channels': 8}, colours=3, levels=2, classes=4),
    'snail': Snail(**SNAIL, levels=3),
    'snail without attention': Snail(**{**SNAIL, 'heads': 0, 'kernel': 5}, levels=3, classes=4),
}
HEIGHT, WIDTH = 4, 5


def inputs(colours: int, n: int = 6, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (n, height, width, colours)).astype(np.float32)


def condition(n: int) -> Condition:
    return Condition(jnp.arange(n) % 4)


def weights(network, x):
    return randomised(jax.eval_shape(lambda: network.init(jax.random.key(0), x, condition(len(x)))))


def order(of: str) -> np.ndarray:
    """[pixels, pixels]: which pixels a pixel should depend on; to the upper right the plain PixelCNN with 3x3 kernels
    has those at 45 degrees or steeper, and a blind spot below."""
    p, q = np.divmod(np.arange(HEIGHT * WIDTH), WIDTH), np.divmod(np.arange(HEIGHT * WIDTH), WIDTH)
    down, right = p[0][:, None] - q[0][None], q[1][None] - p[1][:, None]
    earlier = (down > 0) | ((down == 0) & (right < 0))
    return earlier & (right <= down) if of == 'pixelcnn' else earlier


@pytest.mark.parametrize('name', ['pixelcnn', 'gated', 'snail'])
def test_a_pixel_depends_on_all_earlier_ones_and_no_other(name):
    network, x = NETWORKS[name], inputs(1)
    params = weights(network, x)
    actual = influence(lambda x: network.apply(params, x, condition(len(x))), x, 1)
    np.testing.assert_array_equal(actual != 0, order(name))


@pytest.mark.parametrize('name', ['pixelcnn in colour', 'gated in colour'])
@slow
def test_a_colour_depends_on_earlier_colours_of_its_pixel(name):
    network, x = NETWORKS[name], inputs(3)
    params = weights(network, x)
    actual = influence(lambda x: network.apply(params, x, condition(len(x))), x, 3)
    expected = np.repeat(np.repeat(order(name.split()[0]), 3, 0), 3, 1)
    expected |= np.kron(np.eye(HEIGHT * WIDTH, dtype=bool), np.tri(3, k=-1, dtype=bool))
    np.testing.assert_array_equal(actual != 0, expected)


def test_masks_of_the_centre():
    rgb = (0, 1, 2)
    a, b = (kernel_mask(kind, (3, 3), rgb, rgb) for kind in 'AB')
    np.testing.assert_array_equal(a[1, 1], [[0, 1, 1], [0, 0, 1], [0, 0, 0]])  # [from, to]
    np.testing.assert_array_equal(b[1, 1], [[1, 1, 1], [0, 1, 1], [0, 0, 1]])
    for one in (a, b):
        np.testing.assert_array_equal(one[..., 0, 0][[0, 1, 1, 2], [2, 0, 2, 0]], [1, 1, 0, 0])


@pytest.mark.parametrize('name', ['pixelcnn', 'gated', 'snail', 'snail without attention'])
def test_outputs_by_pixel_equal_those_of_the_whole_image(name):
    network, x = NETWORKS[name], inputs(1, n=3)
    params = weights(network, x)
    whole = jax.jit(network.apply)(params, x, condition(3))
    np.testing.assert_allclose(outputs_by_pixel(network, params, x, condition(3)), whole, atol=1e-5)


@slow
def test_outputs_by_pixel_conditioned_on_a_map():
    network, x = GatedPixelCNN(**{**GATED, 'blocks': 1}, levels=3), inputs(1, n=2)
    with_map = Condition(None, jnp.asarray(inputs(4, n=2)))
    params = randomised(jax.eval_shape(lambda: network.init(jax.random.key(0), x, with_map)))
    apply = jax.jit(network.apply)
    whole = apply(params, x, with_map)
    assert np.abs(whole - apply(params, x, Condition(None, -with_map.map))).max() > 0.01
    np.testing.assert_allclose(outputs_by_pixel(network, params, x, with_map), whole, atol=1e-5)


@slow
def test_gated_network_by_torch():
    """The two stacks once more, in torch, on the same weights."""
    torch = pytest.importorskip('torch')
    from torch.nn import functional as F

    network = GatedPixelCNN(channels=6, blocks=2, kernel=5, hidden_kernel=3, head=9, colours=3, levels=4, classes=4)
    x = inputs(3, n=3)
    variables = weights(network, x)
    label = np.arange(3)

    def conv(x, p, rows_above=0, columns=0, masked=None):
        """A kernel whose last row is the pixel's; masked: (does a colour depend on itself, the outputs' colours)."""
        kernel = np.array(p['kernel'])
        if masked:
            own, outputs = masked
            ins, width = kernel.shape[2], kernel.shape[1]
            kernel[:, width // 2 + 1 :] = 0
            for i in range(ins):
                for o in range(kernel.shape[3]):
                    if not (i % 3 < outputs[o] or (own and i % 3 == outputs[o])):
                        kernel[:, width // 2, i, o] = 0
        kernel = torch.tensor(kernel.transpose(3, 2, 0, 1))
        return F.conv2d(F.pad(x, (columns, columns, rows_above, 0)), kernel, torch.tensor(p['bias']))

    def dense(x, p):
        return torch.einsum('nchw,co->nohw', x, torch.tensor(p['kernel'])) + torch.tensor(p['bias'])[:, None, None]

    def down(x):
        return F.pad(x, (0, 0, 1, 0))[:, :, :-1]

    def gate(x):
        a, b = x.chunk(2, 1)
        return a.tanh() * b.sigmoid()

    def bias(p):
        return torch.tensor(p['label']['embedding'][label])[:, :, None, None]

    single, double = [i % 3 for i in range(6)], [i % 3 for i in range(6)] * 2
    p = variables['params']
    v = h = torch.tensor(x.transpose(0, 3, 1, 2))
    skip = 0
    for b in range(3):
        one, k = p[f'block{b}'], 3 if b else 5
        above = conv(v, one['vertical'], k // 2, k // 2)
        above = above + dense(v, {'kernel': one['vertical_1x1']['kernel'][0, 0], 'bias': one['vertical_1x1']['bias']})
        above = above + bias(one['told']) if b else down(above)
        across = conv(h, one['horizontal'], 0, k // 2, (b > 0, double)) + dense(above, one['vertical_to_horizontal'])
        across = gate(across + bias(one['told'])) if b else gate(across)
        v = v + gate(above) if b else gate(above)
        if b:
            skip = skip + conv(across, one['skip'], masked=(True, single))
        if b < 2:
            out = conv(across, one['residual'], masked=(True, single))
            h = h + out if b else out
    y = F.relu(skip + bias(p['told']))
    y = F.relu(conv(y, p['head'], masked=(True, [i % 3 for i in range(9)])))
    y = conv(y, p['out'], masked=(True, [i % 3 for i in range(12)]))
    expected = y.reshape(3, 4, 3, HEIGHT, WIDTH).permute(0, 3, 4, 2, 1)  # value v of colour c is output 3 v + c
    actual = jax.jit(network.apply)(variables, x, Condition(jnp.asarray(label)))
    np.testing.assert_allclose(actual, expected, atol=2e-5)


# The family.


def family(image, classes: int = 0, stages=None, network: str = 'gated', changes: dict = {}, **model) -> Family:  # noqa: B006
    """changes: of the network's section."""
    sections = {'pixelcnn': {**CNN, 'blocks': 1}, 'gated': {**GATED, 'blocks': 1}, 'snail': SNAIL}
    section = {'name': network, **sections.get(network, {}), **changes}
    return pixelcnn.build(context(image, classes, optim=sgd(), stages=stages or {}), network=section, **model)


def state(f: Family, batch: dict, frozen=None):
    """A state of random weights, in a jiffy."""
    shapes = jax.eval_shape(f.init, jax.random.key(0), batch, frozen or {})
    params = randomised(shapes.params, 3)
    return shapes.replace(params=params, ema=params, step=jnp.zeros((), jnp.int32))


def all_images(image, levels: int) -> np.ndarray:
    """Every image of this shape, float32 [levels ** pixels, H, W, C] in [-1, 1]."""
    values = np.array(list(itertools.product(range(levels), repeat=math.prod(image))), np.float32)
    return (2 * values / (levels - 1) - 1).reshape(-1, *image)


def everything(f: Family, image, levels: int, label: int = 0):
    """A state, and the probabilities of all images."""
    images = all_images(image, levels)
    batch = {'image': jnp.asarray(images), 'index': jnp.arange(len(images)), 'label': jnp.full(len(images), label)}
    s = state(f, batch)
    return s, images, np.exp(-np.asarray(jax.jit(f.evaluate)(s, {}, batch, jax.random.key(0))['nll'], np.float64))


@pytest.mark.parametrize('network, image, levels', [
    ('pixelcnn', (2, 2, 1), 4), ('gated', (1, 2, 3), 2), ('snail', (2, 3, 1), 2),
])  # fmt: skip
def test_probabilities_of_all_images_sum_to_one(network, image, levels):
    f = family(image, 4, network=network, levels=levels, conditional=True)
    _, _, p = everything(f, image, levels)
    assert abs(p.sum() - 1) < 1e-5 and p.max() > 3 * p.min()


@pytest.mark.parametrize('network, image', [('gated', (2, 2, 1)), ('pixelcnn', (1, 2, 3))])
@slow
def test_samples_have_the_distribution_that_is_evaluated(network, image):
    n, levels = 6000, 2
    f = family(image, network=network, levels=levels)
    s, images, p = everything(f, image, levels)
    drawn = np.asarray(jax.jit(f.sample)(s, {}, {'index': jnp.arange(n)}, jax.random.key(1)))
    which = ((drawn.reshape(n, -1) > 0) * 2 ** np.arange(math.prod(image))[::-1]).sum(1)
    np.testing.assert_array_equal(images[which], drawn)
    counts = np.bincount(which, minlength=len(p))
    chi_squared = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi_squared < len(p) + 5 * math.sqrt(2 * len(p))


@pytest.mark.parametrize('network, image', [
    ('pixelcnn', (3, 4, 3)), ('gated', (3, 4, 3)), ('snail', (3, 4, 1)),
])  # fmt: skip
@slow
def test_cached_samples_equal_plain_ones(network, image):
    batch = {'index': jnp.array([7, 3, 11]), 'label': jnp.array([0, 3, 1])}
    drawn = []
    for sampler in ('cached', 'plain'):
        f = family(image, 4, network=network, conditional=True, sampler=sampler)
        s = state(f, {'image': jnp.zeros((2, *image)), 'label': jnp.zeros(2, jnp.int32)})
        drawn.append(np.asarray(jax.jit(f.sample)(s, {}, batch, jax.random.key(4))))
    np.testing.assert_array_equal(*drawn)
    assert len(np.unique(drawn[0])) > 20 and np.abs(drawn[0]).max() <= 1


def test_images_are_quantised_evenly():
    every = jnp.arange(256) / 127.5 - 1
    np.testing.assert_array_equal(pixelcnn.quantised(every, 256), np.arange(256))
    np.testing.assert_array_equal(pixelcnn.quantised(every, 4), np.arange(256) // 64)


@slow
def test_low_temperature_takes_the_likeliest_value():
    f = family((2, 2, 1), levels=4, temperature=1e-4)
    s = state(f, {'image': jnp.zeros((2, 2, 2, 1))})
    drawn = np.asarray(jax.jit(f.sample)(s, {}, {'index': jnp.arange(5)}, jax.random.key(0)))
    assert (drawn == drawn[:1]).all()


@slow
def test_bits_are_of_the_data_as_they_are():
    f = family((2, 3, 1), network='snail')
    batch = {'image': np.random.default_rng(0).integers(0, 256, (4, 2, 3, 1)).astype(np.float32) / 127.5 - 1}
    s = state(f, batch)
    nothing = s.replace(ema=jax.tree.map(jnp.zeros_like, s.ema))
    metrics = jax.jit(f.evaluate)(nothing, {}, {**batch, 'index': jnp.arange(4)}, jax.random.key(0))
    np.testing.assert_allclose(metrics['bits_per_dim'], 8, rtol=1e-5)
    np.testing.assert_allclose(metrics['nll'], 6 * math.log(256), rtol=1e-5)


# As the prior of codes: a first stage whose codes are the signs of an image's pixels.


def signs(grids=((1, 1), (2, 2))) -> Family:
    sizes = [math.prod(grid) for grid in grids]

    def encode(state, frozen, batch, rng):
        bits = (batch['image'].reshape(len(batch['image']), -1) > 0).astype(jnp.int32)
        parts = jnp.split(bits, np.cumsum(sizes)[:-1], 1)
        return tuple(part.reshape(-1, *grid) for part, grid in zip(parts, grids, strict=True))

    def decode(state, frozen, batch, codes, rng):
        bits = jnp.concatenate([code.reshape(len(code), -1) for code in codes], 1)
        return 2.0 * bits.reshape(len(bits), 1, sum(sizes), 1) - 1

    return Family(None, None, None, None, encode, decode, latents=Latents(grids=grids, vocabulary=2))


@slow
def test_prior_of_codes_is_a_distribution_over_all_grids():
    image, n = (1, 5, 1), 4000
    f, frozen = family(image, stages={'first': signs()}, network='snail', embedding=6), {'first': (None, {})}
    images = jnp.asarray(all_images(image, 2))
    batch = {'image': images, 'index': jnp.arange(32)}
    s = state(f, batch, frozen)
    metrics = jax.jit(f.evaluate)(s, frozen, batch, jax.random.key(0))
    assert set(s.params) == {'level0', 'level1'} and 'bits_per_dim' not in metrics
    p, top = np.exp(-np.float64(metrics['nll'])), np.exp(-np.float64(metrics['nll/level0']))
    assert abs(p.sum() - 1) < 1e-5
    np.testing.assert_allclose(top[:16], top[0], rtol=1e-5)
    assert abs(top[0] + top[16] - 1) < 1e-5
    bottom = (p / top).reshape(2, 16)
    np.testing.assert_allclose(bottom.sum(1), 1, rtol=1e-5)
    assert np.abs(bottom[0] - bottom[1]).max() > 1e-3, 'the fine codes do not depend on the coarse one'
    np.testing.assert_allclose(metrics['bits_per_code'], metrics['nll'] / (5 * math.log(2)), rtol=1e-5)
    drawn = np.asarray(jax.jit(f.sample)(s, frozen, {'index': jnp.arange(n)}, jax.random.key(1))).reshape(n, 5)
    counts = np.bincount(((drawn > 0) * 2 ** np.arange(5)[::-1]).sum(1), minlength=32)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 32 + 5 * 8


@slow
def test_prior_learns_codes_in_its_update():
    image, frozen = (1, 5, 1), {'first': (None, {})}
    f = family(image, stages={'first': signs()}, embedding=6)
    batch = {'image': jnp.asarray(all_images(image, 2)[:1])}
    s = state(f, batch, frozen)
    s = s.replace(opt={name: optax.sgd(0.1).init(p) for name, p in s.params.items()})
    update, losses = jax.jit(f.update), []
    for _ in range(10):
        s, logs = update(s, frozen, batch, jax.random.key(0))
        losses.append(float(logs['loss']))
    assert losses[-1] < 0.5 * losses[0] and {'bits/level0', 'bits/level1'} < set(logs)


@pytest.mark.parametrize('model, image', [
    (dict(network='resnet'), (4, 4, 1)), (dict(network='snail'), (4, 4, 3)), (dict(levels=1), (4, 4, 1)),
    (dict(sampler='quick'), (4, 4, 1)), (dict(temperature=0.0), (4, 4, 1)), (dict(conditional=True), (4, 4, 1)),
    (dict(changes={'kernel': 4}), (4, 4, 1)), (dict(changes={'channels': 2}), (4, 4, 3)),
    (dict(network='snail', changes={'heads': 3}), (4, 4, 1)),
    (dict(network='snail', changes={'heads': -1}), (4, 4, 1)),
    (dict(changes={'hidden_kernel': -1}), (4, 4, 1)), (dict(changes={'layers': 2}), (4, 4, 1)),
    (dict(changes={'dropout': 1.0}), (4, 4, 1)), (dict(changes={'blocks': 0}), (4, 4, 1)),
    (dict(stages={'first': Family(None, None, None, None)}), (4, 4, 1)),
    (dict(stages={'first': signs(((2, 2), (3, 3)))}), (1, 13, 1)),
])  # fmt: skip
def test_refuses(model, image):
    with pytest.raises(UserError, match=r'config\.') as error:
        family(image, **model)
    assert '\n' not in str(error.value)


def test_reads_configs_in_which_every_network_had_a_section(tmp_path):
    file = tmp_path / 'config.json'
    sections = {'pixelcnn': CNN, 'gated': GATED, 'snail': {**SNAIL, 'kernel': 5}}
    file.write_text(json.dumps({'family': 'pixelcnn', 'model': {'network': 'snail', **sections, 'levels': 4}}))
    model = configs.read_json(str(file)).model
    expected = {'name': 'snail', **SNAIL, 'kernel': 5, 'dropout': 0.0}
    assert model.network.to_dict() == expected and model.levels == 4 and 'gated' not in model


@slow
def test_refuses_a_first_stage_of_other_images():
    f = family((1, 5, 1), stages={'first': signs()._replace(latents=Latents(grids=((1, 1), (4, 4)), vocabulary=2))})
    with pytest.raises(UserError, match=r'config\.stages\.first'):
        jax.eval_shape(f.init, jax.random.key(0), {'image': jnp.zeros((2, 1, 5, 1))}, {'first': (None, {})})
