"""Augmentation that does not leak: the warp of a function known everywhere, and the network's labels."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import context, quantised_images

from jaxgen.augmentation import edm
from jaxgen.augmentation.warp import warp
from jaxgen.errors import UserError
from jaxgen.families import diffusion
from jaxgen.networks import denoisers

H, W = 24, 32


def analytic(x, y):
    """Smooth, and symmetric in nothing; x to the right and y down, in pixels from the middle."""
    return np.cos(0.25 * x + 0.3) + np.sin(0.2 * y + 0.1 * x) + 0.02 * x


X, Y = np.meshgrid(np.arange(W) - (W - 1) / 2, np.arange(H) - (H - 1) / 2)
IMAGE = np.repeat(analytic(X, Y)[None, ..., None], 2, -1).astype(np.float32)
INNER = np.s_[5:-5, 8:-8]


def rotation(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def looked_up(matrix, move):
    """The image at matrix (q - move) for every pixel's position q."""
    x, y = np.einsum('ij,jhw->ihw', matrix, np.stack([X - move[0], Y - move[1]]))
    return analytic(x, y), (np.abs(x) < W / 2 - 1) & (np.abs(y) < H / 2 - 1)


def test_nothing_done_is_the_same_image_and_whole_pixels_are_exact():
    x = np.random.default_rng(0).normal(size=(2, 8, 5, 3)).astype(np.float32)
    matrix, none = jnp.tile(jnp.eye(2), (2, 1, 1)), jnp.zeros((2, 2))
    np.testing.assert_allclose(warp(x, matrix, none), x, atol=1e-5)
    moved = warp(x, matrix, none + jnp.array([3.0, -2.0]))  # up and to the right
    np.testing.assert_allclose(moved[:, :-3, 2:], x[:, 3:, :-2], atol=1e-5)


@pytest.mark.parametrize('matrix', [rotation(0.4), rotation(-2.0) * 0.8, np.diag([1.3, 1 / 1.3])], ids=['a', 'b', 'c'])
def test_warp_looks_up(matrix):
    move = np.array([1.7, -0.6])
    # `looked_up` has x first, `warp` rows first.
    rows_first, offset = matrix[::-1, ::-1].copy(), -(matrix @ move)[::-1]
    warped = warp(IMAGE, jnp.asarray(rows_first, jnp.float32)[None], jnp.asarray(offset, jnp.float32)[None])
    expected, inside = looked_up(matrix, move)
    error = np.abs(warped[0, ..., 1] - expected)
    assert error[inside].max() < 0.05 and inside.mean() > 0.6
    assert np.isfinite(warped).all() and np.abs(warped).max() < 3.5  # mirrors, not holes, lie outside


def test_labels_tell_what_was_done():
    n = 32
    x, labels = jax.jit(lambda key: edm.augment(key, jnp.tile(IMAGE, (n, 1, 1, 1)), 1.0))(jax.random.key(0))
    assert labels.shape == (n, edm.LABELS) and 0.2 < labels[:, 0].mean() < 0.8 and 0.2 < labels[:, 1].mean() < 0.8
    for image, (across, down, scale, c, s, u, v, *moves) in zip(np.asarray(x), np.asarray(labels), strict=True):
        along = np.arctan2(v, u)
        errors = []
        for stretch in (np.hypot(u, v), -np.hypot(u, v)):  # as published, the labels leave both open
            matrix = rotation(np.arctan2(s, c + 1)) / 2 ** (0.2 * scale)
            ratio = 2 ** (0.2 * stretch)
            matrix = matrix @ rotation(-along) @ np.diag([1 / ratio, ratio]) @ rotation(along)
            matrix = np.diag([1 - 2 * across, 1 - 2 * down]) @ matrix
            expected, inside = looked_up(matrix, 0.125 * np.array(moves) * [W, H])
            errors.append(np.abs(image[..., 0] - expected)[inside].max() if inside.any() else 0)
        assert min(errors) < 0.08


def test_without_changes_half_are_mirrored():
    x, labels = edm.augment(jax.random.key(1), jnp.tile(IMAGE, (64, 1, 1, 1)), 0.0)
    across = np.asarray(labels[:, 0]) == 1
    assert 16 < across.sum() < 48 and not labels[:, 1:].any()
    np.testing.assert_array_equal(x[across][0], IMAGE[0, :, ::-1])
    np.testing.assert_array_equal(x[~across][0], IMAGE[0])


def test_the_network_is_conditioned_on_it_in_training_alone(monkeypatch):
    """The labels of a training image, zeros in sampling, by a linear map without bias."""
    inputs = []

    class Net(nn.Module):
        takes = ('vector',)
        vector_features = 5

        @nn.compact
        def __call__(self, x, t, vector=None, *, train):
            jax.debug.callback(lambda v: inputs.append(np.asarray(v)), vector)
            return 0 * x + self.param('w', nn.initializers.zeros, ())

    monkeypatch.setattr(denoisers, 'make_module', lambda *_, **__: Net())
    network = {'name': 'ncsnpp', 'channels': 8, 'multipliers': (1, 2), 'blocks': 1, 'attention': (4,)}
    family = diffusion.build(
        context(), network=network, process={'timesteps': 20}, training={'augmentation': 0.5}, sampler={'steps': 3}
    )
    assert family.conditions == () and family.encode is not None
    state = family.init(jax.random.key(0), {'image': quantised_images(1)}, {})
    assert state.params['denoiser']['augment']['kernel'].shape == (edm.LABELS, 5)
    inputs.clear()
    family.update(state, {}, {'image': quantised_images(64)}, jax.random.key(1))
    (vector,) = inputs
    assert vector.shape == (64, 5) and len(np.unique(vector.round(4), axis=0)) > 32
    inputs.clear()
    with jax.disable_jit():
        family.sample(state, {}, {'index': jnp.arange(2)}, jax.random.key(1))
    assert len(inputs) == 3 and not any(vector.any() for vector in inputs)


def test_refuses_networks_without_a_vector():
    ncsn = {'network': 'refinenet', 'process': {'name': 'geometric', 'timesteps': 10}}
    with pytest.raises(UserError, match=r'augmentation.*RefineNet'):
        diffusion.build(context(), **ncsn, training={'prediction': 'score', 'augmentation': 0.1})
