"""Encoder and decoder against diffusers' on the same weights, and their published sizes."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import from_source

from jaxgen.networks import quantise
from jaxgen.networks.first_stage import Decoder, Encoder
from jaxgen.weights import diffusers as diffusers_names

pytestmark = pytest.mark.slow  # compiles networks, trains or starts processes

SMALL = dict(channels=8, multipliers=(1, 2, 2), blocks=1, attention=(4,), groups=2)


def randomise(torch, model) -> None:
    """No weight is special: norms have other scales than 1 and biases other values than 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.ndim > 1 else 20
            p.copy_(torch.randn_like(p) / fan**0.5 + (0.5 if p.ndim == 1 else 0.0))


def theirs(kind: str, **options):
    torch = pytest.importorskip('torch')
    diffusers = pytest.importorskip('diffusers')
    model = getattr(diffusers, kind)(
        down_block_types=('DownEncoderBlock2D', 'DownEncoderBlock2D', 'AttnDownEncoderBlock2D'),
        up_block_types=('AttnUpDecoderBlock2D', 'UpDecoderBlock2D', 'UpDecoderBlock2D'),
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=3,
        **{'norm_num_groups': 2, **options},
    ).eval()
    randomise(torch, model)
    return torch, model


def compare(ours, reference):
    reference = reference.numpy().transpose(0, 2, 3, 1)
    assert ours.shape == reference.shape and reference.std() > 0.05
    np.testing.assert_allclose(ours, reference, atol=2e-4 * reference.std())


X = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
Z = np.random.default_rng(1).normal(size=(2, 4, 4, 3)).astype(np.float32)


def nchw(torch, a):
    return torch.from_numpy(a.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize('kind, options, outputs', [
    ('AutoencoderKL', {'sample_size': 16}, 6),
    ('VQModel', {'num_vq_embeddings': 11, 'vq_embed_dim': 3}, 3),
    ('AutoencoderKL', {'sample_size': 16, 'norm_num_groups': 8}, 6),
])  # fmt: skip
def test_equals_diffusers(kind, options, outputs):
    torch, model = theirs(kind, **options)
    # The published networks have one number of groups at all widths.
    small = {**SMALL, 'groups': options.get('norm_num_groups', 2), 'group_size': 0}
    encoder, decoder = Encoder(outputs=outputs, **small), Decoder(**small)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), X)['params']
    weights = from_source(diffusers_names.autoencoder, shapes, model.state_dict(), 'encoder', **small)
    z = jax.jit(encoder.apply)({'params': weights}, X)
    with torch.no_grad():
        compare(z, model.quant_conv(model.encoder(nchw(torch, X))))

    shapes = jax.eval_shape(decoder.init, jax.random.key(0), Z)['params']
    weights = from_source(diffusers_names.autoencoder, shapes, model.state_dict(), 'decoder', **small)
    decode = jax.jit(decoder.apply)
    image, h = decode({'params': weights}, Z)
    with torch.no_grad():
        compare(image, model.decoder(model.post_quant_conv(nchw(torch, Z))))
        if kind == 'VQModel':
            some = np.asarray(z).reshape(-1, 3)[::3]  # so that latents lie between codes
            model.quantize.embedding.weight.copy_(torch.from_numpy(some + 0.01 * np.arange(33).reshape(11, 3)))
            book = model.quantize.embedding.weight.numpy()
            codes = quantise.nearest(z, book)
            reference, _, (_, _, their_codes) = model.quantize(nchw(torch, np.asarray(z)))
            np.testing.assert_array_equal(codes.ravel(), their_codes.numpy())
            assert len(set(np.asarray(codes).ravel())) > 3
            np.testing.assert_allclose(quantise.embed(codes, book), reference.numpy().transpose(0, 2, 3, 1), atol=1e-6)
            compare(
                decode({'params': weights}, quantise.embed(codes, book))[0],
                model.decode(nchw(torch, np.asarray(z))).sample,
            )
    assert h.shape == (2, 16, 16, 8)


def test_remat_and_bfloat16():
    """One changes nothing but memory, the other little."""
    outputs = {}
    sizes = dict(channels=4, multipliers=(1,), blocks=0, outputs=2)
    params = jax.jit(Encoder(**sizes).init)(jax.random.key(0), X)
    for name, options in {'plain': {}, 'remat': {'remat': True}, 'half': {'dtype': jnp.bfloat16}}.items():
        network = Encoder(**sizes, **options)
        value = lambda p, network=network: jnp.square(network.apply(p, X)).mean()  # noqa: E731
        outputs[name] = jax.jit(jax.value_and_grad(value))(params)
        assert jax.eval_shape(network.apply, params, X).dtype == jnp.float32
    chex.assert_trees_all_close(outputs['plain'], outputs['remat'], rtol=1e-4, atol=1e-6)
    difference = abs(outputs['half'][0] - outputs['plain'][0])
    assert 0 < difference < 0.05 * outputs['plain'][0]
