"""LoRA files: what they add to diffusers' networks is what is added to ours."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from support import assert_same, path

import jaxgen
from jaxgen import library
from jaxgen.diffusion import adapters
from jaxgen.errors import UserError
from jaxgen.networks.latent_unet import LatentUNet
from jaxgen.networks.mmdit import Flux
from jaxgen.weights import lora, mapping
from jaxgen.weights.files import Tensor, open_weights

RNG = np.random.default_rng(0)
UNET = dict(name='latent_unet', channels=32, multipliers=(1.0, 2.0), blocks=1, depths=(2, 0), middle_depth=1, heads=4)


def drawn(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def unet(linear: bool = False):
    diffusers = pytest.importorskip('diffusers')
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=20, attention_head_dim=4,
        down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
        use_linear_projection=linear, transformer_layers_per_block=(2, 1), mid_block_type='UNetMidBlock2DCrossAttn',
    )  # fmt: skip


def flux():
    diffusers = pytest.importorskip('diffusers')
    return diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=20, pooled_projection_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


# Layers of attention, of MLPs, convolutions; a rank for each.
OF_UNET = {
    'down_blocks.0.attentions.0.transformer_blocks.1.attn1.to_q': 2,
    'down_blocks.0.attentions.0.transformer_blocks.1.attn1.to_v': 3,
    'down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k': 3,
    'mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0': 2,
    'up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj': 2,
    'up_blocks.1.attentions.0.proj_in': 1,
    'down_blocks.0.resnets.0.conv1': 2,
    'up_blocks.0.resnets.0.conv_shortcut': 2,
    'conv_in': 1,
}
OF_FLUX = {
    'transformer_blocks.1.attn.add_k_proj': 2,
    'single_transformer_blocks.1.attn.to_v': 1,
    'norm_out.linear': 2,
    'x_embedder': 3,
}


def named(kind: str, layer: str, which: str) -> str:
    """The name of a tensor in each kind of file."""
    if kind == 'peft':
        return f'unet.{layer}.{dict(down="lora_A", up="lora_B")[which]}.weight'
    if kind == 'linear_layer':
        return f'unet.{layer}.lora.{which}.weight'
    if kind == 'kohya':
        return f'lora_unet_{layer.replace(".", "_")}.lora_{which}.weight'
    front, _, last = layer.removesuffix('.0').rpartition('.')
    return f'{front}.processor.{last}_lora.{which}.weight'


def pairs_of(model, layers):
    """{layer: (down, up, alpha)}, and the state dict of the model with alpha / rank up down added."""
    state = {name: x.numpy().copy() for name, x in model.state_dict().items()}
    pairs = {}
    for layer, rank in layers.items():
        weight = state[f'{layer}.weight']
        one = (1,) * (weight.ndim - 2)
        down, up = drawn(rank, *weight.shape[1:]), drawn(weight.shape[0], rank, *one)
        pairs[layer] = down, up, 0.5 * rank
        product = np.einsum('or,r...->o...', up.reshape(len(up), rank), down)
        state[f'{layer}.weight'] = weight + 0.5 * product
    return pairs, state


def ours(table, shapes, state):
    """Our weights of their state dict."""
    tensors = {name: Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in state.items()}
    flat = {e.path.removeprefix('denoiser/'): e.read(tensors) for e in mapping.entries(table, shapes)}
    return unflatten_dict(flat, sep='/')


def saved(folder, kind, pairs):
    tensors = {}
    for layer, (down, up, alpha) in pairs.items():
        with_alpha = kind == 'kohya'  # other files have none: it stands in `up`
        tensors[named(kind, layer, 'down')] = down
        tensors[named(kind, layer, 'up')] = up if with_alpha else 0.5 * up
        if with_alpha:
            tensors[named(kind, layer, 'down').removesuffix('.lora_down.weight') + '.alpha'] = np.array(
                alpha, np.float32
            )
    safetensors.numpy.save_file(tensors, folder / f'{kind}.safetensors')
    return str(folder / f'{kind}.safetensors')


@functools.cache
def of_unet():
    """(config, shapes of our arrays) of the U-Net."""
    module = LatentUNet(**{k: v for k, v in UNET.items() if k != 'name'})
    network = {**UNET, 'linear_projection': False}
    return abstract(module, jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 3, 20)), network)


def of_flux():
    """The same of FLUX."""
    module = Flux(channels=16, heads=2, blocks=2, single_blocks=2, axes=(2, 2, 4), distilled=False)
    return abstract(module, jnp.zeros((1, 4, 4, 4)), jnp.zeros((1, 3, 20)), {'name': 'flux'}, pooled=jnp.zeros((1, 12)))


def abstract(module, x, tokens, network, **more):
    def init(key):
        return module.init(key, x, jnp.zeros(1), tokens=tokens, **more, train=False)['params']

    flat = flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep='/')
    config = ConfigDict({'family': 'diffusion', 'model': {'controlnet': {'name': 'none'}, 'network': network}})
    return config, {f'denoiser/{k}': x.shape for k, x in flat.items()}


CASES: list = [(unet, of_unet, OF_UNET, 'peft'), (unet, of_unet, OF_UNET, 'kohya')]
ATTENTION = {name: rank for name, rank in OF_UNET.items() if '.attn' in name}
OTHERS = [
    (unet, of_unet, ATTENTION, 'older'),
    (flux, of_flux, OF_FLUX, 'linear_layer'),
    (flux, of_flux, OF_FLUX, 'kohya'),
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS]


@pytest.mark.parametrize(('make', 'about', 'layers', 'kind'), CASES)
def test_what_a_file_adds(make, about, layers, kind, tmp_path):
    model = make()
    config, shapes = about()
    table = lora.tables(config)[0]
    pairs, merged = pairs_of(model, layers)
    before = {name: x.numpy() for name, x in model.state_dict().items()}
    arrays, rank, _ = lora.read(open_weights(saved(tmp_path, kind, pairs)), config, shapes)
    assert rank == 3
    made = adapters.with_lora(ours(table, shapes, before), [(unflatten_dict(arrays, sep='/'), 1.0)])
    right = ours(table, shapes, merged)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), made, right)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda t: {**t, 'unet.mid_block.nothing.lora_A.weight': drawn(2, 3)}, 'is a LoRA of another network'),
        (lambda t: {name: x[:, :1] for name, x in t.items()}, 'is a LoRA of another network: conv_in is'),
        (lambda t: {**t, 'unet.conv_in.hada_w1_a': drawn(2, 3)}, 'is no LoRA file'),
        (lambda t: {name: x for name, x in t.items() if 'lora_B' not in name}, r'no up \(lora_B\)'),
        (lambda t: {name: x * np.nan for name, x in t.items()}, 'infinite or no numbers'),
        (lambda t: {'text_encoder.a.lora_A.weight': drawn(2, 3)}, 'it has no layer of it'),
        (lambda t: {**t, 'unet.conv_in.alpha': drawn(0)}, r'alpha of conv_in is \[0\], and should be one number'),
        (lambda t: {**t, 'lora_unet_conv_in.lora_up.weight': drawn(32, 2, 1, 1)}, 'has the up of conv_in twice'),
    ],
)
def test_files_that_do_not_fit(change, message, tmp_path):
    config, shapes = of_unet()
    tensors = {'unet.conv_in.lora_A.weight': drawn(2, 4, 3, 3), 'unet.conv_in.lora_B.weight': drawn(32, 2, 1, 1)}
    safetensors.numpy.save_file(change(tensors), tmp_path / 'x.safetensors')
    with pytest.raises(UserError, match=message):
        lora.read(open_weights(str(tmp_path / 'x.safetensors')), config, shapes)


@pytest.mark.parametrize(
    ('said', 'factor'),
    [
        ({'unet.r': 2, 'unet.lora_alpha': 6, 'text_encoder.lora_alpha': 1}, 3.0),
        ({'lora_alpha': 6, 'alpha_pattern': {'in': 3, 'conv_in': 5}}, 2.5),
        ({'transformer.lora_alpha': 6, 'transformer.use_rslora': True}, 6 / 2**0.5),
        ({'r': 2}, 1.0),
        ({'lora_alpha': 'six'}, 'alpha of conv_in is .six'),
        ([1], 'is no JSON object'),
    ],
)
def test_alpha_of_pefts_config(said, factor, tmp_path):
    """In the metadata of diffusers' files and beside peft's; alpha / rank, or over the root of the rank."""
    config, shapes = of_unet()
    tensors = {'unet.conv_in.lora_A.weight': drawn(2, 4, 3, 3), 'unet.conv_in.lora_B.weight': drawn(32, 2, 1, 1)}
    one, beside = tmp_path / 'x.safetensors', tmp_path / 'adapter_model.safetensors'
    safetensors.numpy.save_file(tensors, one, {lora.METADATA: json.dumps(said)})
    safetensors.numpy.save_file(tensors, beside)
    (tmp_path / 'adapter_config.json').write_text(json.dumps(said))
    for path_of in (one, beside):
        if isinstance(factor, str):
            with pytest.raises(UserError, match=factor if path_of == one or isinstance(said, dict) else 'JSON object'):
                lora.read(open_weights(str(path_of)), config, shapes)
            continue
        arrays, _, _ = lora.read(open_weights(str(path_of)), config, shapes)
        right = factor * tensors['unet.conv_in.lora_B.weight'][:, :, 0, 0].T
        up = next(x for name, x in arrays.items() if name.endswith('/up'))
        np.testing.assert_allclose(up, right, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('names', lora.NAMES)
def test_a_file_is_a_run_and_back(names, tmp_path):
    changes = {'model.network': UNET, 'train.steps': 1, 'train.save_every': 1}
    library.train(library.config(path('ddpm_digits'), **changes), tmp_path / 'base')
    tensors = {'unet.conv_in.lora_A.weight': drawn(2, 1, 3, 3), 'unet.conv_in.lora_B.weight': drawn(32, 2, 1, 1)}
    to_q = 'unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q'
    tensors |= {f'{to_q}.lora_A.weight': drawn(3, 64), f'{to_q}.lora_B.weight': drawn(64, 3)}
    safetensors.numpy.save_file(tensors, tmp_path / 'x.safetensors')
    run = jaxgen.import_weights(tmp_path / 'x.safetensors', config=f'{tmp_path}/base:lora', workdir=tmp_path / 'lora')
    base = f'{tmp_path}/base:lora'
    lora.export_lora(run, str(tmp_path / 'back.safetensors'), names)
    again = jaxgen.import_weights(tmp_path / 'back.safetensors', config=base, workdir=tmp_path / 'two')
    assert_same(run.state.ema, again.state.ema)
    assert (run.sample(2) != jaxgen.load(tmp_path / 'base').sample(2)).any()
