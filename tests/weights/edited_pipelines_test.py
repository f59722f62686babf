"""Pipelines of diffusers that begin with an image, or fill the hole of one, by the networks of text_pipelines.py:
the same images from the same prompts, image, mask and noise, at a size that is no square."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from drawing import edited
from support import run_main
from text_pipelines import BETAS, LENGTHS, NEGATIVES, PIPELINES, PROMPTS, XL, save_tokenizer, saved, unet

import jaxgen

SIZE, STEPS = (40, 24), 12
RNG = np.random.default_rng(0)
IMAGE, MASK = RNG.integers(0, 256, (*SIZE, 3), np.uint8), np.zeros(SIZE, bool)
MASK[7:31, 5:18] = True
CLASSES = {'sd': 'StableDiffusion', 'sdxl': 'StableDiffusionXL', 'sd3': 'StableDiffusion3', 'flux': 'Flux'}


@pytest.fixture(scope='module', params=['sdxl', 'sd3', 'flux'])
def imported(request, tmp_path_factory):
    """(case, pipeline, directory of its run)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = saved(PIPELINES[request.param][0], save_tokenizer(str(folder / 'tokenizer')), folder / 'hub')
    command = ['jaxgen', '--mode=import', f'--from={folder}/hub', f'--workdir={folder}/run']
    assert run_main([*command, f'--config.data.size={SIZE}']) == 0
    return request.param, theirs, str(folder / 'run')


@pytest.mark.slow
@pytest.mark.parametrize(('masked', 'strength'), [(False, 0.75), (True, 0.45)])
def test_images_are_those_of_the_pipeline(imported, masked, strength, monkeypatch):
    """With guidance and negative prompts, latents of an image that are the posterior's mean in both, and without the
    image put over."""
    torch, diffusers = pytest.importorskip('torch'), pytest.importorskip('diffusers')
    case, base, workdir = imported
    pipeline = getattr(diffusers, f'{CLASSES[case]}{"Inpaint" if masked else "Img2Img"}Pipeline')
    theirs = pipeline(**base.components, **({'add_watermarker': False} if case == 'sdxl' else {}))
    theirs.set_progress_bar_config(disable=True)
    draws = 'diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample'
    monkeypatch.setattr(draws, lambda self, generator=None: self.mode())
    shape = (2, SIZE[0] // 2, SIZE[1] // 2, theirs.vae.config.latent_channels)
    noise = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    tensor = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    monkeypatch.setattr(sys.modules[pipeline.__module__], 'randn_tensor', lambda *_, **__: tensor)
    call = dict(image=torch.from_numpy(IMAGE.transpose(2, 0, 1)[None] / np.float32(255)).repeat(2, 1, 1, 1))
    call |= dict(strength=strength, num_inference_steps=STEPS, guidance_scale=3.0, output_type='np')
    given = {'caption': PROMPTS, 'image': IMAGE}
    if masked:
        call['mask_image'] = torch.from_numpy(MASK[None, None].astype(np.float32)).repeat(2, 1, 1, 1)
        given['mask'] = MASK
    if masked or case in LENGTHS:
        call |= dict(height=SIZE[0], width=SIZE[1])
    if case in LENGTHS:
        call['max_sequence_length'] = LENGTHS[case]
    if case != 'flux':
        negatives = ['blurred', 'blue'] if case == 'sdxl' else NEGATIVES
        call['negative_prompt'] = given['negative_caption'] = negatives
    if case == 'sd3' and masked:  # whose pipeline decodes without the shift that it encodes with
        call['output_type'] = 'latent'
        latents = theirs(PROMPTS, **call).images
        with torch.no_grad():
            decoded = theirs.vae.decode(latents / theirs.vae.config.scaling_factor + theirs.vae.config.shift_factor)
        images = decoded.sample.numpy().transpose(0, 2, 3, 1)
    else:
        images = 2 * theirs(PROMPTS, **call).images - 1

    scale = f'model.guidance.{"distilled" if case == "flux" else "scale"}'
    changes = {'model.sampler.steps': STEPS, scale: 3.0, 'model.editing.paste': False}
    run = jaxgen.load(workdir, config=changes | {'model.editing.strength': strength})
    np.testing.assert_allclose(edited(run, given, noise, monkeypatch), np.clip(images, -1, 1), atol=1e-3)
    assert images.std() > 0.2


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # torch and numpy
@pytest.mark.parametrize(('scheduler', 'start'), [('DDIM', 0.8), ('DPMSolverMultistep', 0.55)])
def test_a_refiner_goes_on_as_in_the_pipelines(scheduler, start, tmp_path, monkeypatch):
    """SDXL's two, with denoising_end and denoising_start."""
    torch, diffusers = pytest.importorskip('torch'), pytest.importorskip('diffusers')
    base = saved(PIPELINES['sdxl'][0], save_tokenizer(str(tmp_path / 'tokenizer')), tmp_path / 'base')
    options = {'clip_sample': False} if scheduler == 'DDIM' else {}
    betas = {name: value for name, value in BETAS.items() if name != 'clip_sample'}
    base.scheduler = getattr(diffusers, f'{scheduler}Scheduler')(**betas, **options, steps_offset=1)
    base.save_pretrained(tmp_path / 'base')
    network = unet(
        diffusers, False, cross_attention_dim=48, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=20 + 5 * 8, **XL,
    )  # fmt: skip
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(
        base.vae, None, base.text_encoder_2, None, base.tokenizer_2, network, base.scheduler,
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    refiner.save_pretrained(tmp_path / 'refiner')
    for name in ('base', 'refiner'):
        command = ['jaxgen', '--mode=import', f'--from={tmp_path}/{name}', f'--workdir={tmp_path}/{name}_run']
        assert run_main(command) == 0
    noise = np.random.default_rng(1).normal(size=(2, 16, 16, 4)).astype(np.float32)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    call = dict(num_inference_steps=STEPS, guidance_scale=3.0, negative_prompt=['blurred', 'blue'])
    for one in (base, refiner):
        one.set_progress_bar_config(disable=True)
    middle = base(PROMPTS, latents=latents, height=32, width=32, denoising_end=start, output_type='latent', **call)
    images = refiner(PROMPTS, image=middle.images, denoising_start=start, output_type='np', **call).images

    changes = {'model.sampler.steps': STEPS, 'model.guidance.scale': 3.0, 'model.refiner.start': start}
    run = jaxgen.load(str(tmp_path / 'base_run'), config=changes | {'stages.refiner': str(tmp_path / 'refiner_run')})
    given = {'caption': PROMPTS, 'negative_caption': call['negative_prompt']}
    np.testing.assert_allclose(edited(run, given, noise, monkeypatch), np.clip(2 * images - 1, -1, 1), atol=1e-3)
    alone = base(PROMPTS, latents=latents, height=32, width=32, output_type='np', **call).images
    assert np.abs(alone - images).max() > 0.01
