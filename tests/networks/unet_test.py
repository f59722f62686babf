"""The U-Net against diffusers' on the same weights, and its own options."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from labelled import labelled
from support import from_source

from jaxgen.networks.embeddings import sinusoidal
from jaxgen.networks.unet import UNet
from jaxgen.weights import diffusers as diffusers_names

pytestmark = pytest.mark.slow  # compiles networks, trains or starts processes

SMALL = {'channels': 8, 'multipliers': (1, 2), 'blocks': 1, 'attention': (4,)}
SINGLE = {'multipliers': (1,), 'attention': (8,)}  # one level: compiles in half the time


def randomised(shapes, seed=0):
    """Weights of these shapes, none of them special: layers that start at zero are not zero."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == 'scale':
            return (1 + 0.2 * rng.normal(size=leaf.shape)).astype(np.float32)
        fan = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 20
        return (rng.normal(size=leaf.shape) / np.sqrt(fan)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


X = np.random.default_rng(1).normal(size=(3, 8, 8, 1)).astype(np.float32)
T = np.array([0, 10, 999])
LABEL = np.array([0, 1, 2])


def small(**options):
    """A small network and the shapes of its variables."""
    network = labelled(UNet, **{**SMALL, **options})
    return network, jax.eval_shape(lambda: network.init(jax.random.key(0), X, T, LABEL, train=False))


def compiled(network, train=False):
    """(params, x, t, label, key of dropout) -> output."""
    return jax.jit(
        lambda params, x, t, label, key: network.apply(params, x, t, label, train=train, rngs={'dropout': key})
    )


def test_equals_diffusers_at_full_size():
    """The CIFAR-10 network of google/ddpm-cifar10-32, every weight random."""
    torch = pytest.importorskip('torch')
    diffusers = pytest.importorskip('diffusers')
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
        act_fn='silu',
    ).eval()
    for name, weight in theirs.named_parameters():
        if 'norm' in name:  # the only ones that torch does not start at random
            weight.data += 0.2 * torch.randn_like(weight)
    network = UNet()
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    t = np.array([3, 977])
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, t, train=False))['params']
    params = from_source(diffusers_names.unet, shapes, theirs.state_dict(), multipliers=(1, 2, 2, 2))
    ours = jax.jit(lambda p, x, t: network.apply({'params': p}, x, t, train=False))(params, x, t)
    with torch.no_grad():
        reference = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t)).sample
    reference = reference.numpy().transpose(0, 2, 3, 1)
    assert reference.std() > 0.05
    np.testing.assert_allclose(ours, reference, atol=1e-4 * reference.std())


@pytest.mark.parametrize('eps', [1e-6, 1e-2])
def test_narrow_network_has_the_published_groups(eps):
    """32 groups at 32 and 64 channels too, as in DDPM and diffusers; other groups of the same weights are wrong."""
    torch = pytest.importorskip('torch')
    diffusers = pytest.importorskip('diffusers')
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=eps,
        norm_num_groups=32,
        attention_head_dim=None,
        act_fn='silu',
    ).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.data += 0.2 * torch.randn_like(module.weight)
            module.eps = eps  # that of the attention is fixed there
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    t = np.array([3, 977])
    sizes = dict(channels=32, multipliers=(1, 2), blocks=1, attention=(4,))
    shapes = jax.eval_shape(lambda: labelled(UNet, **sizes).init(jax.random.key(0), x, t, train=False))['params']
    params = from_source(diffusers_names.unet, shapes, theirs.state_dict(), **sizes)
    with torch.no_grad():
        reference = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t)).sample
    reference = reference.numpy().transpose(0, 2, 3, 1)

    def ours(**fields):
        network = labelled(UNet, **sizes, **fields)
        return jax.jit(lambda p: network.apply({'params': p}, x, t, train=False))(params)

    assert reference.std() > 0.05
    np.testing.assert_allclose(ours(group_size=0, eps=eps), reference, atol=1e-4 * reference.std())
    if eps == 1e-6:
        assert np.abs(ours() - reference).max() > 0.1 * reference.std()


def test_time_embedding():
    np.testing.assert_allclose(
        sinusoidal(jnp.array([10]), 8)[0],
        [-0.54402111, 0.44767083, 0.02154268, 0.00099999983, -0.83907153, 0.89419843, 0.99976793, 0.9999995],
        rtol=1e-5,
    )


def test_attention_where_asked_and_in_the_middle():
    def attended(**options):
        return {name for name in small(**options)[1]['params'] if name.endswith('_attention')}

    assert attended(attention=()) == {'middle_0_attention'}
    assert attended(attention=(4,)) == {
        *('middle_0_attention', 'down1_0_attention', 'up1_0_attention', 'up1_1_attention'),
    }
    assert attended(attention=(8,)) == {
        *('middle_0_attention', 'down0_0_attention', 'up0_0_attention', 'up0_1_attention'),
    }


def test_starts_as_zero_and_q_k_v_as_if_alone():
    network, _ = small(**SINGLE)

    @jax.jit
    def start(key):
        params = network.init(key, X, T, train=False)
        return network.apply(params, X, T, train=False), params['params']['middle_0_attention']['qkv']['kernel']

    y, kernel = start(jax.random.key(0))
    assert 0 < jnp.abs(y).max() < 1e-3
    assert kernel.shape == (8, 3 * 8)
    limit = np.sqrt(3 / 8)
    assert 0.95 * limit < jnp.abs(kernel).max() <= limit


def test_remat_changes_no_gradient():
    params = randomised(small(**SINGLE)[1])

    def gradient(network):
        def loss(params):
            y = network.apply(params, X, T, train=True, rngs={'dropout': jax.random.key(3)})
            return jnp.square(y).mean()

        return jax.jit(jax.grad(loss))

    plain, lean = (gradient(small(**SINGLE, dropout=0.1, remat=remat)[0]) for remat in (False, True))
    assert 'remat' in str(jax.make_jaxpr(lean)(params))
    assert 'remat' not in str(jax.make_jaxpr(plain)(params))
    for a, b in zip(jax.tree.leaves(plain(params)), jax.tree.leaves(lean(params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(a).max()))


def test_bfloat16_is_close():
    network, shapes = small()
    params = randomised(shapes)
    exact = compiled(network)(params, X, T, LABEL, jax.random.key(0))
    half = compiled(small(dtype=jnp.bfloat16)[0])(params, X, T, LABEL, jax.random.key(0))
    assert half.dtype == jnp.float32
    difference = jnp.abs(half - exact).max()
    assert 0 < difference < 0.1 * exact.std()


def test_dropout_in_training_only():
    network, shapes = small(**SINGLE, dropout=0.5)
    params = randomised(shapes)

    def output(network, train, seed):
        return compiled(network, train)(params, X, T, LABEL, jax.random.key(seed))

    np.testing.assert_array_equal(output(network, False, 0), output(network, False, 1))
    assert jnp.abs(output(network, True, 0) - output(network, True, 1)).max() > 1e-3
    np.testing.assert_allclose(output(network, False, 0), output(small(**SINGLE)[0], True, 0), atol=1e-5)


def test_time_and_class_are_heard_per_example():
    network, shapes = small(classes=3)
    params, apply, key = randomised(shapes), compiled(network), jax.random.key(0)
    y = apply(params, X, T, LABEL, key)
    for other in (
        apply(params, X, np.array([0, 500, 999]), LABEL, key),
        apply(params, X, T, np.array([0, 2, 2]), key),
    ):
        assert jnp.abs(other[1] - y[1]).max() > 1e-3
        np.testing.assert_allclose(other[::2], y[::2], atol=1e-5)


def test_patches_are_what_the_first_level_sees():
    """With patch 2 it is the network of half the size on four times as many colours."""
    network, shapes = small(**SINGLE, patch=2)
    params = randomised(shapes)
    inner = labelled(UNet, **{**SMALL, **SINGLE}, out_channels=4)
    x = jnp.concatenate([X[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
    y = compiled(inner)(params, x, T, LABEL, jax.random.key(0))
    found = compiled(network)(params, X, T, LABEL, jax.random.key(0))
    for k, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        np.testing.assert_allclose(found[:, i::2, j::2, 0], y[..., k], atol=1e-5)
