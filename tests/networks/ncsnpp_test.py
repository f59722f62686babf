"""NCSN++ and DDPM++ against diffusers and a reference in torch, their sizes, and their own options."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from labelled import labelled
from support import from_source

from jaxgen.networks.layers import smooth, upsample_smooth
from jaxgen.networks.ncsnpp import NCSNpp
from jaxgen.weights import diffusers as diffusers_names

pytestmark = pytest.mark.slow  # compiles networks, trains or starts processes

NCSNPP = {'embedding': 'fourier', 'resampling': 'fir', 'pyramid': 'residual'}
SMALL = {'channels': 16, 'multipliers': (1, 2), 'blocks': 1, 'attention': (4,)}
SINGLE = {'channels': 16, 'multipliers': (1,), 'blocks': 0}  # three residual blocks: compiles soon

RNG = np.random.default_rng(1)
X = RNG.normal(size=(3, 8, 8, 3)).astype(np.float32)
AUGMENT = RNG.normal(size=(3, 9)).astype(np.float32)
T = np.array([0, 10.5, 999], np.float32)
LABEL = np.array([0, 1, 2])


def variables(network, x=X):
    """Shapes of its parameters."""
    return jax.eval_shape(lambda: network.init(jax.random.key(0), x, T, LABEL, train=False))['params']


def randomised(network):
    """Parameters, none of them special: layers that start at zero are not zero."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        fan = math.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 20
        values = rng.normal(size=leaf.shape) / math.sqrt(fan)
        return (values + (path[-1].key == 'scale')).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, variables(network))


@functools.cache
def compiled(network, train):
    def run(params, key, *args):
        return network.apply({'params': params}, *args, train=train, rngs={'dropout': key})

    return jax.jit(run)


def apply(network, params, t=T, label=LABEL, augment=None, train=False, seed=0):
    return compiled(network, train)(params, jax.random.key(seed), X, t, label, augment)


def assert_close(ours, theirs):
    """ours [n, H, W, C], theirs [n, C, H, W]."""
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    assert theirs.std() > 0.05
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * theirs.std())


@pytest.mark.parametrize(
    ('size', 'count', 'options'),
    [
        (32, 35_218_947, {'resampling': 'conv', 'blocks': 2}),
        (256, 65_574_549, {**NCSNPP, 'pyramid': 'skip', 'blocks': 2, 'multipliers': (1, 1, 2, 2, 2, 2, 2)}),
        (
            *(1024, 105_785_896),
            {**NCSNPP, 'pyramid': 'skip', 'channels': 16, 'blocks': 1, 'multipliers': (1, 2, 4, 8, 16, 32, 32, 32)},
        ),
    ],
)
def test_published_sizes(size, count, options):
    shapes = variables(labelled(NCSNpp, **options), np.zeros((3, size, size, 3), np.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
    'options',
    [
        {'classes': 3, 'augment': 9, 'multipliers': (2, 2)},
        {**NCSNPP, 'multipliers': (1, 1, 2), 'out_channels': 6},
        {'resampling': 'conv'},
        {'resampling': 'conv', 'groups': 8, 'group_size': 0, 'eps': 1e-2},
    ],
    ids=['ddpmpp', 'ncsnpp', 'ddpm', 'groups'],
)
def test_equals_the_reference_in_torch(options):
    pytest.importorskip('torch')
    network = labelled(NCSNpp, **{**SMALL, **options})
    params = randomised(network)
    assert {name for name in params if name.endswith('_attention')} == (
        {'middle_0_attention', 'down1_0_attention', 'up1_1_attention'}
    )
    t = np.array([-2.3, 0, 3.9], np.float32) if network.embedding == 'fourier' else T
    assert_close(apply(network, params, t=t, augment=AUGMENT), references.ncsnpp(network, params, X, t, LABEL, AUGMENT))


def test_equals_diffusers():
    """The form of google/ncsnpp-celebahq-256 and its kin, every weight random."""
    torch = pytest.importorskip('torch')
    diffusers = pytest.importorskip('diffusers')
    torch.manual_seed(0)
    options = {'channels': 32, 'multipliers': (1, 4), 'blocks': 1, 'attention': (4,)}
    theirs = diffusers.UNet2DModel(
        time_embedding_type='fourier',
        block_out_channels=(32, 128),
        layers_per_block=1,
        down_block_types=('SkipDownBlock2D', 'AttnSkipDownBlock2D'),
        up_block_types=('AttnSkipUpBlock2D', 'SkipUpBlock2D'),
        norm_num_groups=None,
        norm_eps=1e-6,
        attention_head_dim=None,
        mid_block_scale_factor=math.sqrt(2),
    ).eval()
    for name, weight in theirs.named_parameters():
        if 'norm' in name:  # the only ones that torch does not start at random
            weight.data += 0.2 * torch.randn_like(weight)
    network = labelled(NCSNpp, **options, embedding='fourier', resampling='fir', pyramid='skip')
    params = from_source(diffusers_names.skip_unet, variables(network), theirs.state_dict(), **options)

    sigma = np.array([0.02, 1.0, 45.0], np.float32)
    with torch.no_grad():
        reference = theirs(torch.from_numpy(X).permute(0, 3, 1, 2), torch.from_numpy(sigma)).sample
    # Theirs is divided by sigma, which is the caller's part in ours.
    assert_close(apply(network, params, t=np.log(sigma)), reference * torch.from_numpy(sigma)[:, None, None, None])


def test_filter_of_a_single_pixel():
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1])
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 1, 2] = 1
    large, full = np.zeros((8, 8)), np.zeros((5, 5))
    large[1:5, 3:7] = taps / 16
    full[0:4, 1:5] = taps / 64
    ours = jax.jit(lambda x: (upsample_smooth(x), smooth(x, 2, 1), smooth(x, 1, 2)))(x)
    for result, expected in zip(ours, (large, full, full[1::2, 1::2]), strict=True):
        np.testing.assert_array_equal(result[0, :, :, 0], expected)


def test_gradients_with_and_without_remat_and_none_of_the_frequencies():
    options = {**SINGLE, 'embedding': 'fourier', 'dropout': 0.1}
    params = randomised(labelled(NCSNpp, **options))

    def gradient(remat):
        network = labelled(NCSNpp, **options, remat=remat)

        def loss(params):
            y = network.apply({'params': params}, X, T / 1000, train=True, rngs={'dropout': jax.random.key(3)})
            return jnp.square(y).mean()

        return jax.jit(jax.grad(loss))

    assert 'remat' in str(gradient(True).trace(params).jaxpr)
    full, lean = gradient(False)(params), gradient(True)(params)
    for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(lean), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(a).max()))
    still = [path[0].key for path, leaf in jax.tree_util.tree_leaves_with_path(full) if not np.any(leaf)]
    assert still == ['frequencies']


def test_frequencies_are_drawn_wide():
    network = labelled(NCSNpp, **{**SINGLE, 'channels': 1024}, embedding='fourier')
    drawn = jax.jit(lambda: network.init(jax.random.key(0), X, T, train=False)['params']['frequencies'])()
    assert 15 < drawn.std() < 17


def test_starts_as_zero_and_attends_softly():
    network = labelled(NCSNpp, **SINGLE)
    params = jax.jit(lambda: network.init(jax.random.key(0), X, T, train=False)['params'])()
    assert 0 < jnp.abs(apply(network, params)).max() < 1e-3
    limit = math.sqrt(3 * 0.1 / 16)  # of q, k and v: uniform with variance 0.1 / channels
    assert 0.95 * limit < jnp.abs(params['middle_0_attention']['qkv']['kernel']).max() <= limit


def test_no_class_and_no_augmentation():
    network = labelled(NCSNpp, **SINGLE, classes=3, augment=9)
    params = randomised(network)
    y = apply(network, params, label=np.array([0, 3, 2]))
    np.testing.assert_allclose(y, apply(network, params, label=np.array([0, -1, 2]), augment=0 * AUGMENT), atol=1e-5)
    other = apply(network, params)
    np.testing.assert_array_equal(y[::2], other[::2])
    assert jnp.abs(y[1] - other[1]).max() > 1e-3


def test_bfloat16_is_close():
    options = {**SMALL, 'blocks': 0, 'embedding': 'fourier', 'resampling': 'fir', 'pyramid': 'skip'}
    params = randomised(labelled(NCSNpp, **options))
    networks = [labelled(NCSNpp, **options, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    exact, half = (apply(network, params, t=T / 1000) for network in networks)
    assert half.dtype == jnp.float32
    assert 0 < jnp.abs(half - exact).max() < 0.1 * exact.std()


def test_dropout_in_training_only():
    network = labelled(NCSNpp, **SINGLE, dropout=0.5)
    params = randomised(network)
    still = apply(network, params)
    np.testing.assert_array_equal(still, apply(network, params, seed=1))
    assert jnp.abs(apply(network, params, train=True) - still).max() > 1e-3
    np.testing.assert_allclose(still, apply(labelled(NCSNpp, **SINGLE), params, train=True), atol=1e-5)
