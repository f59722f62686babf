"""Inpainting: its networks against torch and slow loops, masks, and both networks' steps against plain gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import sgd

from jaxgen.augmentation import corruptions
from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import inpainting
from jaxgen.networks import inpainting as networks
from jaxgen.networks import spectral

slow = pytest.mark.slow  # compiles networks or trains

SMALL = dict(width=2, dilations=(2,), attention=True, brush=(1.0, 3.0), hole=3, l1=3.0)
SMALL |= dict(discriminator_channels=2, discriminator_layers=2)
RATE = 0.1


def build(image=(8, 16, 3), accumulate=1, **model):
    return inpainting.build(Context(image, 0, sgd(RATE, accumulate, newest=0.5)), **{**SMALL, **model})


@functools.cache
def family(**model):
    f = build(**model)
    names = ('init', 'update', 'sample', 'evaluate', 'trajectory')
    return f._replace(**{name: jax.jit(getattr(f, name)) for name in names})


def batch(n: int = 3) -> dict:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(-1, 1, (n, 8, 16, 3)), jnp.float32)
    return {'image': x, 'index': jnp.arange(n, dtype=jnp.int32)}


@functools.cache
def start():
    return jax.jit(family().init)(jax.random.key(0), batch(), {})


@jax.jit
def complete(weights, x, mask):
    return networks.Generator(2, (2,), True).apply({'params': weights}, x, mask)


def masks_of(keys, kind='both'):
    """bool [n, 8, 16, 1], as the family makes them."""
    both = jax.vmap(jax.random.split)(keys)
    masks = []
    if kind != 'square':
        masks.append(corruptions.strokes(both[:, 0], (8, 16), (1.0, 3.0)))
    if kind != 'strokes':
        masks.append(corruptions.holes(both[:, 1], (8, 16), 3))
    return np.any(masks, 0)


def randomised(tree, scale=0.3):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: (scale * rng.normal(size=a.shape)).astype(np.float32), tree)


# --- networks


def attention_oracle(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One image [H, W, C], position by position."""
    height, width, channels = x.shape
    h, w = height // 2, width // 2
    small, holes = np.pad(x[::2, ::2], ((1, 1), (1, 1), (0, 0))), np.pad(mask[::2, ::2], 1)
    positions = [(i, j) for i in range(h) for j in range(w)]
    squares = {p: small[p[0] : p[0] + 3, p[1] : p[1] + 3].ravel() for p in positions}
    known = [not holes[i : i + 3, j : j + 3].any() for i, j in positions]
    scores = np.array(
        [[squares[p] @ squares[q] / max(np.linalg.norm(squares[q]), 1e-4) for q in positions] for p in positions]
    )

    def fused(scores, number):
        """Along the order of positions by which `number` counts them."""
        out, at = np.zeros_like(scores), {number(p): k for k, p in enumerate(positions)}
        for a, p in enumerate(positions):
            for b, q in enumerate(positions):
                for d in (-1, 0, 1):
                    p_, q_ = at.get(number(p) + d), at.get(number(q) + d)
                    if p_ is not None and q_ is not None:
                        out[a, b] += scores[p_, q_]
        return out

    scores = fused(fused(scores, lambda p: p[0] * w + p[1]), lambda p: p[1] * h + p[0])
    scores = np.where(known, scores, 0)
    attention = np.exp(10 * (scores - scores.max(1, keepdims=True)))
    attention = attention / attention.sum(1, keepdims=True) * known
    padded, out = np.pad(x, ((1, 1), (1, 1), (0, 0))), np.zeros((height + 2, width + 2, channels))
    for a, (i, j) in enumerate(positions):
        for b, (k, l) in enumerate(positions):
            out[2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += attention[a, b] * padded[2 * k : 2 * k + 4, 2 * l : 2 * l + 4]
    return out[1:-1, 1:-1] / 4


def test_attention_against_a_slow_one():
    rng = np.random.default_rng(0)
    x = 0.4 * rng.normal(size=(2, 8, 12, 3)).astype(np.float32)
    mask = np.zeros((2, 8, 12, 1), np.float32)
    mask[0, 2:5, 3:8], mask[1, :, 9:] = 1, 1
    y = jax.jit(networks.contextual_attention)(x, mask)
    for i in range(2):
        expected = attention_oracle(x[i].astype(np.float64), mask[i, ..., 0])
        np.testing.assert_allclose(y[i], expected, atol=1e-4 * np.abs(expected).max() + 1e-5)
    nothing = jax.jit(networks.contextual_attention)(x, np.ones_like(mask))
    np.testing.assert_array_equal(nothing, 0)


def oracle(weights: dict, x: np.ndarray, mask: np.ndarray, dilations) -> tuple[np.ndarray, np.ndarray]:
    """The generator with its layers in the order of the authors' code, in torch's functions."""
    torch = pytest.importorskip('torch')
    F = torch.nn.functional

    def tensor(a):
        return torch.tensor(np.asarray(a))

    def conv(h, w, stride=1, dilation=1):
        kernel = tensor(w['kernel']).permute(3, 2, 0, 1)
        extent = dilation * (kernel.shape[-1] - 1)
        total = max(extent + 1 - stride, 0) if stride > 1 else extent  # as TensorFlow pads even sizes
        h = F.pad(h, (total // 2, total - total // 2) * 2)
        return F.conv2d(h, kernel, tensor(w['bias']), stride=stride, dilation=dilation)

    def gated(h, part, strides, last=F.elu):
        assert len(part) == len(strides)
        for i, how in enumerate(strides):
            a, b = conv(h, part[f'conv{i}']['conv'], *how).chunk(2, 1)
            h = (last if i == len(strides) - 1 else F.elu)(a) * torch.sigmoid(b)
        return h

    def upsampled(h, part):
        h = gated(h, part['coarse'], [()] * 2)
        for name in ('middle', 'fine'):
            h = gated(F.interpolate(h, scale_factor=2, mode='nearest'), part[name], [()] * 2)
        return torch.tanh(conv(h, part['last']))

    down, wide = [(), (2,), (), (2,)], [(), (), *((1, d) for d in dilations)]
    x, m = (tensor(a).permute(0, 3, 1, 2) for a in (x, mask))
    given = x * (1 - m)
    h = gated(torch.cat([given, torch.ones_like(m), m], 1), weights['coarse'], down + wide)
    coarse = upsampled(h, weights['coarse_painter'])
    pasted = given + coarse * m
    h = gated(pasted, weights['fine'], down + wide)
    attended = gated(pasted, weights['looking'], down + [()] * 2, F.relu).permute(0, 2, 3, 1).numpy()
    attended = [attention_oracle(a, b) for a, b in zip(attended, mask[:, ::4, ::4, 0], strict=True)]
    attended = gated(tensor(np.float32(attended)).permute(0, 3, 1, 2), weights['looked'], [()] * 2)
    fine = upsampled(torch.cat([h, attended], 1), weights['fine_painter'])
    return coarse.permute(0, 2, 3, 1).numpy(), fine.permute(0, 2, 3, 1).numpy()


@slow
def test_generator_equals_torch():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    mask = np.zeros((2, 16, 24, 1), np.float32)
    mask[0, 3:9, 5:12], mask[1, :5, 14:] = 1, 1
    like = jax.eval_shape(networks.Generator(2, (2,), True).init, jax.random.key(0), x, mask)['params']
    weights = randomised(like)
    for y, expected in zip(complete(weights, x, mask), oracle(weights, x, mask, (2,)), strict=True):
        np.testing.assert_allclose(y, expected, atol=5e-5)
    # Pixels under the mask are no input.
    other = np.where(mask > 0, -x, x)
    for a, b in zip(complete(weights, x, mask), complete(weights, other, mask), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_sizes_of_the_authors_code():
    """Counted by hand from the table of layers: (channels in, channels out with the gates, kernel)."""

    def conv(i, o, k):
        return i * o * k * k + o

    def branch(first, second, third, fourth):  # as far as the first of the layers at a quarter of the size
        return (
            conv(first, 48, 5) + conv(24, second, 3) + conv(second // 2, third, 3) + conv(third // 2, fourth, 3)
            + conv(fourth // 2, 192, 3) + conv(96, 192, 3)
        )  # fmt: skip

    def upsampler(i):
        at = [(i, 192), (96, 192), (96, 96), (48, 96), (48, 48), (24, 24), (12, 3)]
        return sum(conv(*sizes, 3) for sizes in at)

    dilated = 4 * conv(96, 192, 3)
    coarse = branch(5, 96, 96, 192) + dilated + upsampler(96)
    fine = branch(3, 48, 96, 96) + dilated + branch(3, 48, 96, 192) + 2 * conv(96, 192, 3) + upsampler(192)
    x, mask = jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 64, 64, 1))
    params = jax.eval_shape(networks.Generator().init, jax.random.key(0), x, mask)['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == coarse + fine == 4_052_478


# --- the family


@slow
@pytest.mark.parametrize('kind', ['strokes', 'square'])
def test_masks_are_each_images_own(kind):
    f, b, key = family(masks=kind, attention=False), batch(), jax.random.key(2)
    state = jax.jit(f.init)(jax.random.key(0), b, {})
    given, _, y, x = f.trajectory(state, {}, b, key)['image']
    mask = masks_of(jax.vmap(lambda i: jax.random.fold_in(key, i))(b['index']), kind)
    np.testing.assert_allclose(given, np.where(mask, 0, x), atol=1e-6)
    np.testing.assert_allclose(np.where(mask, 0, y), np.where(mask, 0, x), atol=1e-6)
    assert (np.abs(y - x) > 1e-3)[np.broadcast_to(mask, x.shape)].mean() > 0.9


@slow
def test_masks_of_the_data():
    f, b, key = family(masks='mask', attention=False), batch(), jax.random.key(2)
    b |= {'mask': jnp.where(jnp.arange(8)[None, :, None, None] < jnp.array([2, 4, 6])[:, None, None, None], 0.7, -0.7)}
    b['mask'] = jnp.broadcast_to(b['mask'], (3, 8, 16, 1))
    assert f.conditions == ('image', 'mask')
    state = jax.jit(f.init)(jax.random.key(0), b, {})
    np.testing.assert_allclose(f.evaluate(state, {}, b, key)['hole'], [2 / 8, 4 / 8, 6 / 8], rtol=1e-5)
    with pytest.raises(UserError, match="'label' is neither"):
        g = build(masks='label')
        jax.eval_shape(g.init, jax.random.key(0), b | {'label': jnp.zeros(3, jnp.int32)}, {})
    with pytest.raises(UserError, match=r"'mask' is neither .* nor an image of config\.data\.size = \(8, 16\)"):
        jax.eval_shape(f.init, jax.random.key(0), b | {'mask': b['mask'][:, ::2, ::2]}, {})


@slow
def test_update_is_a_step_of_each_network():
    """On its own loss and its own weights, the discriminator's first; its kernels are normalised in both."""
    f, before, b, key = family(), start(), batch(), jax.random.key(3)
    after, logs = f.update(before, {}, b, key)
    mask = jnp.asarray(masks_of(jax.random.split(jax.random.split(key, 3)[0], 3)), jnp.float32)
    x = b['image']

    def normalised(weights, vectors):
        """By the definition: each kernel over v^T W u, with v and u after one iteration from the vectors given."""
        out, iterated = {}, {}
        for name, w in weights.items():
            matrix = w['kernel'].reshape(-1, w['kernel'].shape[-1])
            v = matrix @ vectors[name]['kernel']
            v = jax.lax.stop_gradient(v / jnp.linalg.norm(v))
            u = jax.lax.stop_gradient(matrix.T @ v)
            u = u / jnp.linalg.norm(u)
            out[name], iterated[name] = {**w, 'kernel': w['kernel'] / (v @ matrix @ u)}, u
        return out, iterated

    def discriminate(weights, image):
        for i in range(2):
            w = weights[f'conv{i}']
            image = jax.lax.conv_general_dilated(
                image, w['kernel'], (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
            )
            image = jax.nn.leaky_relu(image + w['bias'], 0.2)
        return image

    def with_mask(image):
        return jnp.concatenate([image, mask], -1)

    @jax.jit
    def plain(params, vectors):
        coarse, fine = complete(params['generator'], x, mask)
        y = mask * fine + (1 - mask) * x
        weights, iterated = normalised(params['discriminator'], vectors)
        real, fake = discriminate(weights, with_mask(x)), discriminate(weights, with_mask(y))
        loss = 0.5 * (jnp.maximum(0, 1 - real).mean() + jnp.maximum(0, 1 + fake).mean())
        return loss, 3 * (jnp.abs(x - coarse).mean() + jnp.abs(x - fine).mean()) - fake.mean(), iterated

    def stepped(i, params, vectors, name):
        gradient = jax.grad(lambda w: plain({**params, name: w}, vectors)[i])(params[name])
        return {**params, name: jax.tree.map(lambda w, g: w - RATE * g, params[name], gradient)}

    middle = stepped(0, before.params, before.extra, 'discriminator')
    expected = stepped(1, middle, after.extra, 'generator')
    for a, c in zip(*map(jax.tree.leaves, (after.params, expected)), strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-3, atol=1e-5)
    loss, _, iterated = plain(before.params, before.extra)
    np.testing.assert_allclose(logs['discriminator_loss'], loss, rtol=1e-4)
    np.testing.assert_allclose(logs['generator_loss'], plain(middle, after.extra)[1], rtol=1e-4)
    for name, u in iterated.items():
        np.testing.assert_allclose(after.extra[name]['kernel'], u, atol=1e-5)
    assert set(after.ema) == {'generator'}


@slow
def test_metrics_are_of_completed_images():
    f, state, b, key = family(), start(), batch(), jax.random.key(5)
    y, metrics = f.sample(state, {}, b, key), f.evaluate(state, {}, b, key)
    mask = masks_of(jax.vmap(lambda i: jax.random.fold_in(key, i))(b['index']))
    error = np.square(np.asarray(y - b['image']))
    np.testing.assert_allclose(metrics['squared_error'], error.mean((1, 2, 3)), rtol=1e-4)
    within = [e[np.broadcast_to(m, e.shape)].mean() for e, m in zip(error, mask, strict=True)]
    np.testing.assert_allclose(metrics['squared_error/hole'], within, rtol=1e-4)
    np.testing.assert_allclose(metrics['hole'], mask.mean((1, 2, 3)), rtol=1e-5)


@slow
def test_spectral_vectors_are_of_the_discriminator():
    state = start()
    assert set(state.extra) == set(state.params['discriminator']) == {'conv0', 'conv1'}
    weights, vectors = state.params['discriminator'], state.extra
    for _ in range(30):
        normal, vectors = spectral.normalise(weights, vectors)
    largest = np.linalg.svd(np.asarray(normal['conv1']['kernel']).reshape(-1, 4), compute_uv=False)[0]
    assert largest == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize('model, message', [
    (dict(width=3), 'width'), (dict(dilations=(0,)), 'dilations'), (dict(l1=-1.0), 'l1'), (dict(hole=9), 'hole'),
    (dict(brush=(3.0, 2.0)), 'brush'), (dict(brush=(3.0,)), 'brush'), (dict(image=(12, 16, 3)), 'multiple of 8'),
    (dict(image=(6, 16, 3), attention=False), 'multiple of 4'), (dict(discriminator_layers=0), 'discriminator_layers'),
])  # fmt: skip
def test_says_what_is_wrong(model, message):
    with pytest.raises(UserError, match=message) as error:
        build(**model)
    assert 'config.' in str(error.value) and '\n' not in str(error.value)
