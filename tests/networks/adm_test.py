"""The networks of Improved DDPM and ADM against diffusers' on the same weights."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from labelled import labelled
from support import from_source

from jaxgen.networks.adm import ADMClassifier, ADMUNet
from jaxgen.networks.embeddings import cosines_first
from jaxgen.weights import diffusers as diffusers_names

pytestmark = pytest.mark.slow  # compiles networks, trains or starts processes

IDDPM = {'heads': 4, 'head_channels': 0, 'resample_in_blocks': False}
rng = np.random.default_rng(1)
X = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
T = np.array([3, 977])
LABEL = np.array([2, 0])


def theirs(torch, widths, attention, head_channels, resample_in_blocks, scale_shift=True, **options):
    """A diffusers network with random weights, zero-initialised ones too; `attention` names levels."""
    diffusers = pytest.importorskip('diffusers')
    torch.manual_seed(0)
    plain = 'Resnet{}sampleBlock2D' if resample_in_blocks else '{}Block2D'
    types = ['Attn{}Block2D' if attend else plain for attend in attention]
    network = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=[name.format('Down') for name in types],
        up_block_types=[name.format('Up') for name in types[::-1]],
        downsample_type='resnet' if resample_in_blocks else 'conv',
        upsample_type='resnet' if resample_in_blocks else 'conv',
        resnet_time_scale_shift='scale_shift' if scale_shift else 'default',
        attention_head_dim=head_channels,
        norm_num_groups=32,
        attn_norm_num_groups=32,
        **options,
    ).eval()
    for name, weight in network.named_parameters():
        if 'norm' in name:  # the only ones that torch does not start at random
            weight.data += 0.2 * torch.randn_like(weight)
        elif 'conv_in' in name:  # so small that the eps of the next norm counts
            weight.data *= 0.01
    return network


def assert_close(network, params, reference, *arguments):
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), *arguments, train=False))['params']
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    ours = jax.jit(lambda p, *arguments: network.apply({'params': p}, *arguments, train=False))(params, *arguments)
    assert reference.std() > 0.05
    np.testing.assert_allclose(ours, reference, atol=1e-4 * reference.std())


@pytest.mark.parametrize(
    ('ours', 'reference'),
    [
        (  # Improved DDPM: as many heads wherever attention is
            {**IDDPM, 'attention': (4,), 'out_channels': 6},
            {'attention': (False, True), 'head_channels': 32, 'resample_in_blocks': False},
        ),
        (  # Improved DDPM on LSUN: one head, the embedding is added
            {**IDDPM, 'attention': (8,), 'multipliers': (1, 1), 'heads': 1, 'scale_shift': False},
            {'attention': (True, False), 'head_channels': 64, 'resample_in_blocks': False, 'scale_shift': False},
        ),
        (  # ADM
            {'attention': (8, 4), 'head_channels': 32, 'out_channels': 6, 'classes': 3},
            {'attention': (True, True), 'head_channels': 32, 'resample_in_blocks': True},
        ),
        (  # ADM, narrow: 32 groups all the same
            {'channels': 32, 'group_size': 0, 'attention': (8, 4), 'head_channels': 32, 'out_channels': 6},
            {'attention': (True, True), 'head_channels': 32, 'resample_in_blocks': True},
        ),
    ],
)
def test_equals_diffusers(ours, reference):
    torch = pytest.importorskip('torch')
    ours = {'channels': 64, 'multipliers': (1, 2), 'blocks': 1, 'dropout': 0.5, **ours}
    classes = ours.get('classes')
    network = theirs(
        torch,
        tuple(ours['channels'] * m for m in ours['multipliers']),
        **reference,
        out_channels=ours.get('out_channels', 3),
        num_class_embeds=classes,
    )
    label = torch.from_numpy(LABEL) if classes else None
    with torch.no_grad():
        y = network(torch.from_numpy(X.transpose(0, 3, 1, 2)), torch.from_numpy(T), label).sample.numpy()
    unet = labelled(ADMUNet, **ours)
    shapes = jax.eval_shape(lambda: unet.init(jax.random.key(0), X, T, LABEL, train=False))['params']
    params = from_source(diffusers_names.unet, shapes, network.state_dict(), **ours)
    assert_close(unet, params, y.transpose(0, 2, 3, 1), X, T, LABEL)


def test_classifier_equals_diffusers_and_torch():
    """The way down and the middle of diffusers' network, then torch's attention.

    The first level has fewer channels than the embedding of time, as at 512 pixels.
    """
    torch = pytest.importorskip('torch')
    embeddings = pytest.importorskip('diffusers').models.embeddings
    network = theirs(torch, (64, 128), (False, True), 32, True, time_embedding_dim=512)
    network.time_proj = embeddings.Timesteps(128, True, 0)
    network.time_embedding = embeddings.TimestepEmbedding(128, 512)
    norm = torch.nn.GroupNorm(32, 128)
    torch.nn.init.normal_(norm.weight, 1, 0.2)
    torch.nn.init.normal_(norm.bias, 0, 0.2)
    positions, qkv, qkv_bias, out, out_bias = (
        torch.randn(shape) * scale
        for shape, scale in (((17, 128), 0.5), ((384, 128), 0.1), ((384,), 0.2), ((5, 128), 0.1), ((5,), 0.2))
    )
    with torch.no_grad():
        embedding = network.time_embedding(network.time_proj(torch.from_numpy(T)))
        h = network.conv_in(torch.from_numpy(X.transpose(0, 3, 1, 2)))
        for block in network.down_blocks:
            h, _ = block(h, embedding)
        h = torch.nn.functional.silu(norm(network.mid_block(h, embedding)))
        h = h.flatten(2).permute(2, 0, 1)  # [HW, n, C]
        h = torch.cat([h.mean(0, keepdim=True), h]) + positions[:, None]
        y, _ = torch.nn.functional.multi_head_attention_forward(
            h[:1], h, h, 128, 4, qkv, qkv_bias, None, None, False, 0.0, out, out_bias
        )
    classifier = ADMClassifier(128, (0.5, 1), 1, (4,), head_channels=32, classes=5)
    shapes = jax.eval_shape(lambda: classifier.init(jax.random.key(0), X, T, train=False))['params']
    shapes = {name: shape for name, shape in shapes.items() if name not in ('norm', 'pool')}
    params = from_source(diffusers_names.unet, shapes, network.state_dict(), multipliers=(0.5, 1))
    params['norm'] = {'scale': norm.weight.detach().numpy(), 'bias': norm.bias.detach().numpy()}
    params['pool'] = {
        'positions': positions.numpy(),
        'qkv': {'kernel': qkv.numpy().T, 'bias': qkv_bias.numpy()},
        'out': {'kernel': out.numpy().T, 'bias': out_bias.numpy()},
    }
    assert_close(classifier, params, y[0].numpy(), X, T)


def test_time_embedding():
    np.testing.assert_allclose(
        cosines_first(jnp.array([10]), 8)[0],
        [-0.83907153, 0.54030231, 0.99500417, 0.99995, -0.54402111, 0.84147098, 0.099833417, 0.0099998333],
        rtol=1e-5,
    )


def test_bfloat16_remat_and_dropout():
    """Output and gradient in float32, with recomputed activations, and with bfloat16 between."""

    def network(**options):
        return labelled(ADMUNet, 8, (1,), 0, (), head_channels=4, dropout=0.2, **options)

    def draw(path, leaf):  # nothing special: layers that start at zero are not zero
        fan = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 20
        return jnp.float32(rng.normal(size=leaf.shape) / np.sqrt(fan) + (path[-1].key == 'scale'))

    def loss(x, params, seed, network):
        y = network.apply(params, x, T, train=True, rngs={'dropout': jax.random.key(seed)})
        return jnp.square(y).mean(), y

    shapes = jax.eval_shape(lambda: network().init(jax.random.key(0), X, T, train=False))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=3)
    lean_text = str(jax.make_jaxpr(loss, static_argnums=3)(X, params, 0, network(remat=True)))
    assert lean_text.count('= remat') == 4  # three residual blocks, one attention
    (_, y), plain = gradient(X, params, 0, network())
    _, lean = gradient(X, params, 0, network(remat=True))
    np.testing.assert_allclose(plain, lean, atol=1e-5 * np.abs(plain).max())
    _, half = jax.jit(loss, static_argnums=3)(X, params, 0, network(dtype=jnp.bfloat16))
    assert half.dtype == jnp.float32
    assert 0 < jnp.abs(half - y).max() < 0.2 * y.std()
    assert jnp.abs(gradient(X, params, 1, network())[0][1] - y).max() > 0.5 * y.std()  # other dropout


def test_starts_at_zero_where_published():
    network = labelled(ADMUNet, 16, (1,), 0, (), classes=64, head_channels=8)
    params = jax.jit(lambda: network.init(jax.random.key(0, impl='rbg'), X, T, LABEL, train=False)['params'])()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        most = float(jnp.abs(leaf).max())
        if name.endswith('bias'):
            assert most == 0, name
        elif re.search('(conv2|out|last)/kernel', name):
            assert 0 < most < 1e-4, name
        elif name.endswith('kernel'):  # as torch
            limit = np.prod(leaf.shape[:-1]) ** -0.5
            assert 0.9 * limit < most <= limit, name
    np.testing.assert_allclose(params['label']['embedding'].std(), 1, atol=0.1)
