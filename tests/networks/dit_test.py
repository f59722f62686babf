"""DiT against diffusers' on the same weights, its table of positions and its sizes, and how it starts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from labelled import labelled
from support import from_source

from jaxgen.networks.dit import DiT, position_embedding
from jaxgen.weights import diffusers as diffusers_names

pytestmark = pytest.mark.slow  # compiles networks, trains or starts processes

SMALL = {'channels': 16, 'blocks': 3, 'heads': 2, 'classes': 4, 'out_channels': 2}
X = np.random.default_rng(1).normal(size=(3, 8, 8, 1)).astype(np.float32)
T = np.array([0.0, 10.5, 999.0])
LABEL = np.array([0, 1, 3])


def small(**options):
    """A small network and the shapes of its variables."""
    network = labelled(DiT, **{**SMALL, **options})
    return network, jax.eval_shape(lambda: network.init(jax.random.key(0), X, T, LABEL, train=False))


def randomised(shapes):
    """Weights of these shapes, none of them special: layers that start at zero are not zero."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        return (rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 20)).astype(np.float32)

    return jax.tree.map(draw, shapes)


@pytest.fixture(scope='module')
def params():
    return randomised(small()[1])


@functools.cache
def compiled(network, train=False):
    """(params, x, t, label, seed of dropout = 0) -> output."""

    def apply(params, x, t, label, seed=0):
        return network.apply(params, x, t, label, train=train, rngs={'dropout': jax.random.key(seed)})

    apply = jax.jit(apply)
    return lambda *args: np.asarray(apply(*args))  # numpy: what follows compiles nothing


def test_equals_diffusers():
    torch = pytest.importorskip('torch')
    diffusers = pytest.importorskip('diffusers')
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=3,
        out_channels=6,
        num_layers=3,
        sample_size=12,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,  # its default is not the published one
    ).eval()
    # Every block has embedders of its own, of which the published ones, shared, are a special case; and the
    # frequencies of their times are not the published ones.
    shared = theirs.transformer_blocks[0].norm1.emb
    shared.time_proj.downscale_freq_shift = 0
    for block in theirs.transformer_blocks:
        block.norm1.emb = shared

    network = labelled(DiT, channels=32, blocks=3, heads=4, classes=11, out_channels=6)
    x = np.random.default_rng(0).normal(size=(4, 12, 12, 3)).astype(np.float32)
    t, label = np.array([0, 3, 500, 977]), np.array([0, 9, 10, 4])
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, t, label, train=False))['params']
    params = from_source(diffusers_names.dit, shapes, theirs.state_dict(), patch=2, blocks=3)
    ours = compiled(network)({'params': params}, x, t, label)
    with torch.no_grad():
        reference = theirs(*map(torch.from_numpy, (x.transpose(0, 3, 1, 2), t, label))).sample
    reference = reference.numpy().transpose(0, 2, 3, 1)
    assert reference.std() > 0.05
    np.testing.assert_allclose(ours, reference, atol=1e-4 * reference.std())


@pytest.mark.parametrize(
    ('count', 'channels', 'blocks', 'heads'),
    [
        (32_865_056, 384, 12, 6),
        (130_315_808, 768, 12, 12),
        (457_840_672, 1024, 24, 16),
    ],
)
def test_published_sizes(count, channels, blocks, heads):
    """With patches of 2. The published counts have the table of 256 positions in them."""
    network = labelled(DiT, channels, blocks, heads, classes=1001, out_channels=8)
    x, label = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, jnp.zeros(1), label, train=False))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_position_embedding():
    table = position_embedding(16, 16, 1152)
    assert table.shape == (256, 1152) and table.dtype == np.float32
    np.testing.assert_allclose(table.sum(dtype=np.float64), 134598.94780388544, rtol=1e-7)
    for row, start, values in [
        (1, 0, [0.84147098, 0.82405135, 0.80640167]),
        (1, 576, [0, 0, 0]),
        (16, 0, [0, 0, 0]),
        (16, 576, [0.84147098, 0.82405135, 0.80640167]),
    ]:
        np.testing.assert_allclose(table[row, start : start + 3], values, rtol=1e-6)
    # Row 1, column 2 of a grid that is not square.
    wanted = [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02), np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)]
    np.testing.assert_allclose(position_embedding(2, 3, 8)[1 * 3 + 2], wanted, rtol=1e-6)


def test_starts_as_published():
    """Section 3.2: zero output, blocks that do nothing; else Xavier's kernels and normal embeddings."""
    network = labelled(DiT, channels=64, blocks=2, heads=4, patch=4, classes=50)
    x = np.zeros((1, 8, 8, 3), np.float32)
    init = jax.jit(lambda key: network.init(key, x, T[:1], LABEL[:1], train=False)['params'])
    params = jax.tree.map(np.asarray, init(jax.random.key(0)))
    for layer in (params['last'], params['modulation'], params['blocks']['modulation']):
        assert not any(leaf.any() for leaf in layer.values())
    for kernel, fans in (
        (params['first']['kernel'], 4 * 4 * 3 + 64),
        (params['blocks']['qkv']['kernel'], 64 + 3 * 64),
        (params['blocks']['out']['kernel'], 64 + 64),
        (params['blocks']['mlp1']['kernel'], 64 + 4 * 64),
    ):
        limit = np.sqrt(6 / fans)
        assert 0.98 * limit < np.abs(kernel).max() <= limit
    for kernel in (params['time1']['kernel'], params['time2']['kernel'], params['label']['embedding']):
        np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.05)
    first, second = params['blocks']['qkv']['kernel']
    assert np.abs(first - second).max() > 0.1


def test_patches_of_any_grid():
    """Through blocks that do nothing, a pixel reaches its own patch and no other. Without classes."""
    network, shapes = small(patch=4, classes=0, out_channels=0, blocks=1)
    params = randomised(shapes)
    params['params']['blocks']['modulation'] = jax.tree.map(np.zeros_like, params['params']['blocks']['modulation'])
    apply = compiled(network)
    x = np.random.default_rng(0).normal(size=(1, 8, 12, 1)).astype(np.float32)
    other = x.copy()
    other[0, 5, 9] += 1  # row 1, column 2 of the patches
    y, moved = (apply(params, z, T[:1], None) for z in (x, other))
    assert y.shape == x.shape
    changed = np.abs(moved - y)[0, ..., 0] > 1e-6
    assert changed[4:, 8:].all() and changed.sum() == 16


def test_remat_keeps_less_and_changes_no_gradient(params):
    def loss(network):
        def of(params):
            y = network.apply(params, X, T, LABEL, train=True, rngs={'dropout': jax.random.key(3)})
            return jnp.square(y).mean()

        return of

    plain, lean = (loss(small(dropout=0.1, remat=remat)[0]) for remat in (False, True))

    def kept(of):
        """Numbers kept for the backward pass."""
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(of, p)[1], params)))

    # Of each of 3 blocks: the products modulation (6), qkv (3), out (1), mlp1 (4) and mlp2 (1).
    assert kept(plain) - kept(lean) == 3 * (3 * 6 * 16 + 3 * 16 * (3 + 1 + 4 + 1) * 16)
    a, b = (jax.device_get(jax.tree.leaves(jax.jit(jax.grad(of))(params))) for of in (plain, lean))
    for u, v in zip(a, b, strict=True):
        assert np.abs(u).max() > 0
        np.testing.assert_allclose(u, v, atol=1e-5 * (1 + np.abs(u).max()))


def test_bfloat16_is_close(params):
    exact = compiled(small()[0])(params, X, T, LABEL)
    half = compiled(small(dtype=jnp.bfloat16)[0])(params, X, T, LABEL)
    assert half.dtype == jnp.float32
    difference = np.abs(half - exact).max()
    assert 0 < difference < 0.1 * exact.std()


def test_dropout_in_training_only(params):
    network = small(dropout=0.5)[0]

    def output(network, train, seed):
        return compiled(network, train)(params, X, T, LABEL, seed)

    np.testing.assert_allclose(output(network, False, 0), output(small()[0], False, 0), atol=1e-5)
    assert np.abs(output(network, True, 0) - output(network, True, 1)).max() > 1e-3


def test_time_and_class_are_heard_per_example(params):
    apply = compiled(small()[0])
    y = apply(params, X, T, LABEL)
    assert y.shape == (3, 8, 8, 2)
    for other in (
        apply(params, X, np.array([0.0, 11.0, 999.0]), LABEL),
        apply(params, X, T, np.array([0, 2, 3])),
    ):
        assert np.abs(other[1] - y[1]).max() > 1e-3
        np.testing.assert_allclose(other[::2], y[::2], atol=1e-5)
