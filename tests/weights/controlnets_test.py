"""ControlNets of diffusers and of lllyasviel: as runs and back, and sampling beside diffusers' pipeline."""

from __future__ import annotations

import contextlib
import json
import os

import drawing
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import text_pipelines
from ml_collections import ConfigDict
from references import read, shaken
from support import config_of, context, run_main

import jaxgen
from jaxgen import config as configs
from jaxgen import library, options
from jaxgen.errors import UserError
from jaxgen.families import diffusion
from jaxgen.randomness import example_keys, normal
from jaxgen.weights import controlnets, exporting, mapping, text_to_image
from jaxgen.weights.importing import import_weights

RNG = np.random.default_rng(0)
SIZES = dict(
    in_channels=4, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=4,
    down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
)  # fmt: skip
NETWORK = dict(
    name='latent_unet', channels=32, multipliers=(1.0, 2.0), blocks=1, depths=(1, 0), middle_depth=1, heads=4
)


def networks(torch, diffusers, features: int, **control):
    """A U-Net and a ControlNet of it with random weights."""
    unet = diffusers.UNet2DConditionModel(
        **SIZES | dict(sample_size=8, out_channels=SIZES['in_channels'], cross_attention_dim=features),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
    )
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = diffusers.ControlNetModel(
            **SIZES, cross_attention_dim=features, conditioning_embedding_out_channels=(4, 6), **control
        )
        for module in (net.controlnet_cond_embedding.conv_out, *net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(module.weight, std=0.1)
        nets.append(shaken(net))
    return shaken(unet), nets


CONTROLS = {
    'one': {'a': dict(scale=0.8)},
    'of_some_steps': {'a': dict(scale=1.2, start=0.1, end=0.55)},
    'guess': {'a': dict(scale=1.0, guess=True)},
    'two': {'a': dict(scale=0.7, end=0.8), 'b': dict(scale=0.4, start=0.3)},
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CONTROLS)
def test_pipeline(name):
    """Ten steps of DDIM with guidance 5 from the same noise, latents and then images by the same decoder."""
    torch, diffusers = pytest.importorskip('torch'), pytest.importorskip('diffusers')
    control = CONTROLS[name]
    torch.manual_seed(0)
    unet, nets = networks(torch, diffusers, 12)
    vae = diffusers.AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2,
        block_out_channels=(32, 32), latent_channels=4,
    ).eval()  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        vae, None, None, unet, nets[: len(control)], scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)

    shape, n = (8, 8, 4), 2
    given = dict(
        process=dict(name='scaled_linear', timesteps=1000, beta_start=0.00085, beta_end=0.012),
        network=NETWORK,
        conditioning=dict(text=dict(kind='tokens', dropout=0.1)),
        sampler=dict(
            name='ddim', steps=10, spacing='leading', offset=1, clip=False, clipped_noise=False, to_first=True,
            unit_start=True,
        ),
        guidance=dict(scale=5.0),
    )  # fmt: skip

    def build(stages=None, **more):
        model = options.complete(diffusion.build, given | more, 'model')
        family = diffusion.build(context(shape, stages=stages or {}), **model)
        return family._replace(config=json.dumps({'family': 'diffusion', 'model': model}))

    base = build()
    batch = {
        'image': jnp.zeros((n, *shape)),
        'text': RNG.normal(size=(n, 7, 12)).astype(np.float32),
        'index': jnp.arange(n),
        **{one: RNG.uniform(-1, 1, (n, 16, 16, 3)).astype(np.float32) for one in control},
    }
    config = ConfigDict({'model': {'network': {**NETWORK, 'linear_projection': False}}})
    state = jax.eval_shape(base.init, jax.random.key(0), batch, {})
    params = read(text_to_image.latent_unet(config, {}), state.params['denoiser'], unet)
    state = state.replace(params={}, opt={}, ema={'denoiser': params})
    stages, frozen = {}, {}
    for one, net in zip(control, nets, strict=False):
        section = dict(name='latent_unet', condition=one, hint=(4, 6))
        stages[one] = build({'base': base}, controlnet=section)
        own = jax.eval_shape(stages[one].init, jax.random.key(0), batch, {'base': (state, {})})
        read_in = read(text_to_image.controlnet(config, {}), own.params['control'], net, root='control/')
        frozen[one] = (own.replace(params={}, opt={}, ema={'control': read_in}), {})
    family = build(stages, control=control)
    rng = jax.random.key(5)
    made = jax.jit(family.trajectory)(state, frozen, batch, rng)['x'][-1]

    noise = normal(example_keys(jax.random.split(rng)[0], batch), shape)

    def tensor(x):
        return torch.tensor(np.asarray(x).copy())

    def fields(field, default):
        return [one.get(field, default) for one in control.values()]

    theirs = pipeline(
        prompt_embeds=tensor(batch['text']), negative_prompt_embeds=torch.zeros(n, 7, 12),
        image=[tensor((batch[one].transpose(0, 3, 1, 2) + 1) / 2) for one in control], height=16, width=16,
        num_inference_steps=10, guidance_scale=5.0, latents=tensor(noise.transpose(0, 3, 1, 2)), output_type='latent',
        controlnet_conditioning_scale=fields('scale', 1.0), control_guidance_start=fields('start', 0.0),
        control_guidance_end=fields('end', 1.0), guess_mode=any(fields('guess', False)),
    ).images  # fmt: skip
    made = tensor(made.transpose(0, 3, 1, 2))
    with torch.no_grad():
        images, others = (vae.decode(x / vae.config.scaling_factor).sample.numpy() for x in (made, theirs))
    scale = float(theirs.abs().max())
    np.testing.assert_allclose(made / scale, theirs / scale, atol=1e-4)
    np.testing.assert_allclose(images, others, atol=1e-3)
    with torch.no_grad():
        plain = pipeline(
            prompt_embeds=tensor(batch['text']), negative_prompt_embeds=torch.zeros(n, 7, 12),
            image=[torch.zeros(n, 3, 16, 16)] * len(control), height=16, width=16, num_inference_steps=10,
            guidance_scale=5.0, latents=tensor(noise.transpose(0, 3, 1, 2)), output_type='latent',
            controlnet_conditioning_scale=[0.0] * len(control),
        ).images  # fmt: skip
    assert (plain - theirs).abs().max() > 0.01 * scale  # the ControlNets matter


ORIGINAL = {
    'controlnet_cond_embedding.conv_in': 'input_hint_block.0',
    'controlnet_cond_embedding.conv_out': 'input_hint_block.2',
    **{f'controlnet_down_blocks.{i}': f'zero_convs.{i}.0' for i in range(4)},
    'controlnet_mid_block': 'middle_block_out.0',
    'time_embedding.linear_1': 'time_embed.0',
    'time_embedding.linear_2': 'time_embed.2',
    'conv_in': 'input_blocks.0.0',
    'down_blocks.0.resnets.0': 'input_blocks.1.0',
    'down_blocks.0.attentions.0': 'input_blocks.1.1',
    'down_blocks.0.downsamplers.0.conv': 'input_blocks.2.0.op',
    'down_blocks.1.resnets.0': 'input_blocks.3.0',
    'mid_block.resnets.0': 'middle_block.0',
    'mid_block.attentions.0': 'middle_block.1',
    'mid_block.resnets.1': 'middle_block.2',
}
INSIDE = {
    'norm1': 'in_layers.0', 'conv1': 'in_layers.2', 'time_emb_proj': 'emb_layers.1', 'norm2': 'out_layers.0',
    'conv2': 'out_layers.3', 'conv_shortcut': 'skip_connection',
}  # fmt: skip


def original_name(name: str) -> str:
    """A name of diffusers as lllyasviel's files have it."""
    start = max((one for one in ORIGINAL if name.startswith(f'{one}.')), key=len)
    rest = name.removeprefix(start)
    if '.resnets.' in start or start.startswith('mid_block.resnets'):
        part, _, leaf = rest[1:].partition('.')
        rest = f'.{INSIDE[part]}.{leaf}'
    return f'control_model.{ORIGINAL[start]}{rest}'


@contextlib.contextmanager
def inside(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.slow
def test_import_and_export(tmp_path):
    """Folders of the hub and single files become runs of the same weights, and diffusers reads what is exported."""
    torch, diffusers = pytest.importorskip('torch'), pytest.importorskip('diffusers')
    torch.manual_seed(0)
    three = SIZES | dict(in_channels=3)
    net = diffusers.ControlNetModel(**three, cross_attention_dim=1, conditioning_embedding_out_channels=(4,))
    net.save_pretrained(tmp_path / 'hub')
    state = {name: x.numpy() for name, x in shaken(net).state_dict().items()}
    net.save_pretrained(tmp_path / 'hub')
    safetensors.numpy.save_file({original_name(name): x for name, x in state.items()}, tmp_path / 'one.safetensors')
    fields = [
        'data.source=shapes', 'data.size=16', 'data.batch=4', 'train.steps=1', 'train.sample_every=0',
        'model.network.name=latent_unet', 'model.network.channels=32', 'model.network.multipliers=(1.0,2.0)',
        'model.network.blocks=1', 'model.network.depths=(1,0)', 'model.network.heads=4', 'model.sampler.name=ddim',
        'model.sampler.steps=2', 'train.save_every=1',
    ]  # fmt: skip
    library.train(config_of('ddpm_cifar10', fields), tmp_path / 'base')
    config = configs.load(f'{tmp_path}/base:controlnet')
    more = {'data.source': 'shapes', 'data.features': ('image', 'edges'), 'model.controlnet.hint': (4,)}
    config = library.config(config, **more)
    for name, path in (('hub', 'hub'), ('one', 'one.safetensors')):
        import_weights(config, str(tmp_path / path), str(tmp_path / name / 'run'))
        run = jaxgen.load(tmp_path / name / 'run')
        assert set(run.state.ema) == {'control'}
        samples = run.sample(2)
        assert samples.shape == (2, 16, 16, 3)
        exporting.export_weights(run, str(tmp_path / name / 'out'), 'diffusers')
        again = diffusers.ControlNetModel.from_pretrained(tmp_path / name / 'out')
        for key, x in again.state_dict().items():
            np.testing.assert_array_equal(x.numpy().reshape(state[key].shape), state[key])
        inputs = (torch.randn(1, 3, 16, 16), 7, torch.zeros(1, 1, 1), torch.rand(1, 3, 16, 16))
        with torch.no_grad():
            for one, other in zip(again(*inputs)[0], net(*inputs)[0], strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)
        exporting.export_weights(run, str(tmp_path / name / 'out.safetensors'), 'controlnet')
        file = safetensors.numpy.load_file(tmp_path / name / 'out.safetensors')
        assert set(file) == {original_name(key).removeprefix('control_model.') for key in state}
    with pytest.raises(UserError, match=r'set --config\.model\.controlnet\.hint=\(4,\)'):
        wrong = library.config(config, **{'model.controlnet.hint': (8,)})
        import_weights(wrong, str(tmp_path / 'hub'), str(tmp_path / 'wrong'))


def test_original_names():
    """Numbers of lllyasviel's layers (cldm.py): a SiLU stands between two convolutions of the hint."""
    model = {'network': {'blocks': 2, 'multipliers': (1, 2, 4, 4)}, 'controlnet': {'hint': (16, 32, 96, 256)}}
    table = controlnets.original(ConfigDict({'model': model}), {})
    for ours, theirs in {
        'hint_first/kernel': 'input_hint_block.0.weight',
        'hint5/bias': 'input_hint_block.12.bias',
        'hint_last/kernel': 'input_hint_block.14.weight',
        'zero11/kernel': 'zero_convs.11.0.weight',
        'zero_middle/bias': 'middle_block_out.0.bias',
        'down0/kernel': 'input_blocks.3.0.op.weight',
        'down2_1/norm1/scale': 'input_blocks.8.0.in_layers.0.weight',
        'down2_1_transformer/norm/scale': 'input_blocks.8.1.norm.weight',
        'down2_1_transformer/blocks/norm3/bias': 'input_blocks.8.1.transformer_blocks.*.norm3.bias',
        'middle_transformer/first/kernel': 'middle_block.1.proj_in.weight',
        'middle_1/conv2/kernel': 'middle_block.2.out_layers.3.weight',
        'time2/bias': 'time_embed.2.bias',
    }.items():
        assert mapping.substituted(f'control/{ours}', table.names) == theirs


def test_what_config_json_says():
    """Depths and heads as diffusers counts them: SDXL, one of its small ones, Stable Diffusion 2."""
    said = dict(
        down_block_types=['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'],
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
    )
    assert controlnets.transformers_of(said) == ([0, 2, 10], 10)
    assert controlnets.heads_of(said, [320, 640, 1280]) == [5, 10, 20]
    assert controlnets.transformers_of({}) == ([1, 1, 1, 0], 1)
    assert controlnets.heads_of({}, [320] * 4) == [8] * 4


@pytest.mark.slow
@pytest.mark.parametrize('case', ['sd', 'sdxl'])
def test_images_are_those_of_the_pipeline(case, tmp_path, monkeypatch):
    """From the files of a pipeline and a ControlNet to images: prompts by the imported tokenizers and text encoders,
    latents by the imported decoder, at a size that is no square."""
    torch, diffusers = pytest.importorskip('torch'), pytest.importorskip('diffusers')
    size, steps = (40, 24), 10
    base = text_pipelines.saved(
        text_pipelines.PIPELINES[case][0], text_pipelines.save_tokenizer(str(tmp_path / 'tokenizer')), tmp_path / 'hub'
    )
    net = diffusers.ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 6))
    for module in (net.controlnet_cond_embedding.conv_out, *net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(module.weight, std=0.1)
    shaken(net).save_pretrained(tmp_path / 'net')
    command = ['jaxgen', '--mode=import', f'--from={tmp_path}/hub', f'--workdir={tmp_path}/base']
    assert run_main([*command, f'--config.data.size={size}']) == 0
    command = ['jaxgen', '--mode=import', f'--from={tmp_path}/net', f'--workdir={tmp_path}/run']
    assert run_main([*command, f'--config={tmp_path}/base:controlnet', '--config.model.controlnet.hint=(4,6)']) == 0

    more = {'add_watermarker': False} if case == 'sdxl' else {'requires_safety_checker': False}
    kind = getattr(diffusers, f'StableDiffusion{"XL" if case == "sdxl" else ""}ControlNetPipeline')
    theirs = kind(**base.components, controlnet=net, **more)
    theirs.set_progress_bar_config(disable=True)
    noise = RNG.normal(size=(2, size[0] // 2, size[1] // 2, 4)).astype(np.float32)
    hint = RNG.integers(0, 256, (*size, 3), np.uint8)
    call = dict(negative_prompt=['blurred', 'blue'], num_inference_steps=steps, guidance_scale=3.0, output_type='np')
    call |= dict(controlnet_conditioning_scale=0.8, control_guidance_start=0.1, control_guidance_end=0.7)
    call |= dict(height=size[0], width=size[1], latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()))
    image = torch.from_numpy(hint.transpose(2, 0, 1)[None] / np.float32(255)).repeat(2, 1, 1, 1)
    images = 2 * theirs(text_pipelines.PROMPTS, image=image, **call).images - 1
    plain = 2 * theirs(text_pipelines.PROMPTS, image=image, **call | {'controlnet_conditioning_scale': 0.0}).images - 1

    changes = {'model.sampler.steps': steps, 'model.guidance.scale': 3.0, 'model.control.own.scale': 0.8}
    changes |= {'model.control.own.start': 0.1, 'model.control.own.end': 0.7}
    run = jaxgen.load(str(tmp_path / 'run'), config=changes)
    given = {'caption': text_pipelines.PROMPTS, 'negative_caption': call['negative_prompt'], 'edges': hint}
    made = drawing.edited(run, given, noise, monkeypatch)
    np.testing.assert_allclose(made, np.clip(images, -1, 1), atol=1e-3)
    assert np.abs(images - plain).max() > 0.05
