"""PatchGAN against torch on the same weights, its published sizes, and the receptive field of a patch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.networks.patchgan import PatchGAN, check, patches

X = np.random.default_rng(0).normal(size=(3, 32, 24, 3)).astype(np.float32)


def randomised(tree):
    rng = np.random.default_rng(1)

    def draw(leaf):
        return (0.2 * rng.normal(size=leaf.shape) + (leaf.ndim == 1) * 0.6).astype(np.float32)

    return jax.tree.map(draw, tree)


def oracle(weights: dict, x: np.ndarray, layers: int, norm: str):
    """The network in torch's functions, by the weights' names."""
    torch = pytest.importorskip('torch')
    F = torch.nn.functional
    t = {k: {n: torch.tensor(np.asarray(a)) for n, a in w.items()} for k, w in weights.items()}
    h = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    for i, name in enumerate([f'conv{i}' for i in range(layers + 1)] + ['last']):
        h = F.conv2d(
            h, t[name]['kernel'].permute(3, 2, 0, 1), t[name].get('bias'), stride=2 if i < layers else 1, padding=1
        )
        if 0 < i <= layers:
            if norm == 'batch':
                h = F.batch_norm(h, None, None, t[f'norm{i}']['scale'], t[f'norm{i}']['bias'], training=True, eps=1e-5)
            elif norm == 'instance':
                h = F.instance_norm(h, eps=1e-5)
        if name != 'last':
            h = F.leaky_relu(h, 0.2)
    return h[:, 0].numpy()


@pytest.mark.parametrize('norm, layers', [('batch', 3), ('instance', 2), ('none', 1)])
def test_equals_torch(norm, layers):
    network = PatchGAN(4, layers, norm)
    params = randomised(jax.eval_shape(network.init, jax.random.key(0), X))['params']
    y, new = jax.jit(lambda p: network.apply({'params': p}, X, train=True, mutable=['batch_stats']))(params)
    reference = oracle(params, X, layers, norm)
    assert y.shape == reference.shape == (3, patches(32, layers), patches(24, layers))
    np.testing.assert_allclose(y, reference, atol=1e-4 * reference.std())
    assert bool(new) == (norm == 'batch')
    if norm == 'batch':  # statistics of this batch give this batch the same values
        again = jax.jit(network.apply)({'params': params, **new}, X)
        np.testing.assert_allclose(again, y, atol=1e-4 * reference.std())


@pytest.mark.parametrize('channels, norm, count', [
    (3, 'batch', 2_765_633),  # VQGAN
    (6, 'batch', 2_768_705),  # pix2pix, whose input is the condition too
    (3, 'instance', 2_764_737),  # CycleGAN
])  # fmt: skip
def test_published_sizes(channels, norm, count):
    x = jnp.zeros((1, 70, 70, channels))
    params = jax.eval_shape(PatchGAN(norm=norm).init, jax.random.key(0), x)['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_a_patch_of_three_layers_is_70_pixels():
    network = PatchGAN(2, 3, 'none')
    x = jnp.zeros((1, 128, 128, 1))
    params = jax.tree.map(np.abs, randomised(jax.eval_shape(network.init, jax.random.key(0), x)))  # nothing cancels
    rows, columns = jax.eval_shape(network.apply, params, x).shape[1:]
    slope = jax.jit(jax.grad(lambda x: network.apply(params, x)[0, rows // 2, columns // 2]))(x)
    field = np.argwhere(np.abs(slope[0, ..., 0]) > 0)
    assert (np.ptp(field, 0) + 1).tolist() == [70, 70]


def test_says_what_is_too_small():
    check('model.layers', (24, 24, 3), 3)
    with pytest.raises(UserError, match=r'config\.model\.layers = 3 is too many .* needs 24 pixels'):
        check('model.layers', (23, 24, 3), 3)
