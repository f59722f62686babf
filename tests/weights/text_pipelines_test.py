"""Pipelines of diffusers whose networks read texts, imported from the folders that they save: the same images from the
same prompts and noise, and the same weights back."""

from __future__ import annotations

import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from support import run_main
from text_pipelines import (
    BETAS,
    FIRST,
    LENGTH,
    LENGTHS,
    PIPELINES,
    PROMPTS,
    VOCABULARY,
    autoencoder,
    by_bfl,
    save_tokenizer,
    saved,
    stable_diffusion,
    text,
    unet,
)

import jaxgen
from jaxgen import assembly, conditions, sample
from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.families import diffusion
from jaxgen.weights import exporting, importing, pipelines, sources, text_to_image
from jaxgen.weights.files import Tensor, Weights
from jaxgen.weights.importing import import_weights

STEPS = 10


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    """The folder of a tokenizer of CLIP's kind."""
    return save_tokenizer(str(tmp_path_factory.mktemp('tokenizer')))


@pytest.mark.slow
@pytest.mark.parametrize('case', PIPELINES)
def test_images_are_those_of_the_pipeline(case, tokenizer, tmp_path, monkeypatch, capsys):
    """With guidance and a negative prompt, and an empty one; exported again the weights are the same."""
    torch, diffusers = pytest.importorskip('torch'), pytest.importorskip('diffusers')
    make, options = PIPELINES[case]
    theirs = saved(make, tokenizer, tmp_path / 'hub')
    command = ['jaxgen', '--mode=import', f'--from={tmp_path}/hub', f'--workdir={tmp_path}/run']
    assert run_main(command) == 0, capsys.readouterr()
    scale = f'model.guidance.{"distilled" if case == "flux" else "scale"}'
    changes = {'model.sampler.steps': STEPS, scale: options['guidance_scale']}
    run = jaxgen.load(str(tmp_path / 'run'), config=changes)

    shape = (2, 16, 16, theirs.vae.config.latent_channels)
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    if case == 'flux':
        latents = theirs._pack_latents(latents, 2, 4, 16, 16)
    theirs.set_progress_bar_config(disable=True)
    call = dict(height=32, width=32, latents=latents, num_inference_steps=STEPS, output_type='np', **options)
    if case in LENGTHS:
        call['max_sequence_length'] = LENGTHS[case]
    images = 2 * theirs(PROMPTS, **call).images - 1

    unlike = {'negative_caption': options['negative_prompt']} if 'negative_prompt' in options else {}
    given = {'caption': PROMPTS, **unlike}
    arrays = conditions.first(run.assembled, run.config, 2, given)
    batch = sample.to_inside({name: jnp.asarray(x) for name, x in arrays.items()})
    monkeypatch.setattr(diffusion, 'normal', lambda keys, shape: jnp.asarray(noise))
    family = run.assembled.family
    draw = jax.jit(lambda state, frozen: family.sample(state, frozen, batch, jax.random.key(0), family.settings()))
    assert images.std() > 0.2
    np.testing.assert_allclose(draw(run.state, run.assembled.frozen), np.clip(images, -1, 1), atol=1e-3)

    exporting.export_weights(run, str(tmp_path / 'out'), 'diffusers')
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'out')
    assert type(again) is type(theirs)
    for name, part in theirs.components.items():
        if isinstance(part, torch.nn.Module):
            there = getattr(again, name).state_dict()
            for key, weight in part.state_dict().items():
                torch.testing.assert_close(there[key].reshape(weight.shape), weight, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize('case', ['sd', 'sdxl'])
def test_new_words_are_those_of_the_pipeline(case, tokenizer, tmp_path, monkeypatch, capsys):
    """Two words at once, in prompts and negative ones, one of them of two tokens; exported, diffusers reads them."""
    torch = pytest.importorskip('torch')
    make, _ = PIPELINES[case]
    theirs = saved(make, tokenizer, tmp_path / 'hub')
    assert run_main(['jaxgen', '--mode=import', f'--from={tmp_path}/hub', f'--workdir={tmp_path}/run']) == 0
    encoders = {'clip_l': ('text_encoder', 'tokenizer'), 'clip_g': ('text_encoder_2', 'tokenizer_2')}
    encoders = {'': encoders['clip_l']} if case == 'sd' else encoders
    rng, stages = np.random.default_rng(1), {}
    if case == 'sdxl':  # from_pretrained gives each encoder its own tokenizer
        theirs.tokenizer_2 = type(theirs.tokenizer).from_pretrained(tokenizer)
        # With number 2, of older files, it pools a text at its largest number, which a new word has.
        theirs.text_encoder_2.text_model.eos_token_id = theirs.tokenizer.eos_token_id
    for word, n in (('<zig>', 2), ('<Zag>', 1)):
        rows = {}
        for key, (encoder, reader) in encoders.items():
            module, its_tokenizer = getattr(theirs, encoder), getattr(theirs, reader)
            width = module.get_input_embeddings().weight.shape[1]
            rows[key] = rng.normal(size=(n, width)).astype(np.float32)
            given = {'text_encoder': module, 'tokenizer': its_tokenizer}
            theirs.load_textual_inversion(torch.from_numpy(rows[key]), token=word, **given)
        file = tmp_path / f'{word}.safetensors'
        safetensors.numpy.save_file({key or word: x for key, x in rows.items()}, file)
        stages[word] = f'{tmp_path}/{word}'
        command = ['jaxgen', '--mode=import', f'--config={tmp_path}/run:inversion', f'--from={file}']
        assert run_main([*command, f'--workdir={stages[word]}']) == 0, capsys.readouterr()
    fields = {'stages.zig': stages['<zig>'], 'stages.zag': stages['<Zag>']}
    run = jaxgen.load(
        str(tmp_path / 'run'), config={'model.sampler.steps': STEPS, 'model.guidance.scale': 3.0, **fields}
    )
    prompts, negatives = ['a <zig> on a <Zag> mat', 'star <Zag>'], ['blue <zig>', 'blurred']
    noise = np.random.default_rng(0).normal(size=(2, 16, 16, 4)).astype(np.float32)
    theirs.set_progress_bar_config(disable=True)
    call = dict(height=32, width=32, latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()))
    call |= dict(num_inference_steps=STEPS, output_type='np', guidance_scale=3.0, negative_prompt=negatives)
    images = np.clip(2 * theirs(prompts, **call).images - 1, -1, 1)
    arrays = conditions.first(run.assembled, run.config, 2, {'caption': prompts, 'negative_caption': negatives})
    assert (arrays['text/tokens'] >= VOCABULARY).sum(1).tolist() == [3, 1]
    batch = sample.to_inside({name: jnp.asarray(x) for name, x in arrays.items()})
    monkeypatch.setattr(diffusion, 'normal', lambda keys, shape: jnp.asarray(noise))
    family = run.assembled.family
    draw = jax.jit(lambda state, frozen: family.sample(state, frozen, batch, jax.random.key(0), family.settings()))
    np.testing.assert_allclose(draw(run.state, run.assembled.frozen), images, atol=1e-3)
    exporting.export_weights(jaxgen.load(stages['<zig>']), str(tmp_path / 'out.safetensors'))
    back, there = (safetensors.numpy.load_file(tmp_path / name) for name in ('out.safetensors', '<zig>.safetensors'))
    assert back.keys() == there.keys() and all((back[key] == x).all() for key, x in there.items())


def inpainting(diffusers, transformers, tokenizer):
    """Stable Diffusion's model of nine channels."""
    network = unet(diffusers, True, cross_attention_dim=64, attention_head_dim=4, in_channels=9)
    return diffusers.StableDiffusionInpaintPipeline(
        vae=autoencoder(diffusers), text_encoder=text(transformers, width=64, heads=1), tokenizer=tokenizer,
        unet=network, scheduler=diffusers.DDIMScheduler(**BETAS, **FIRST), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


@pytest.mark.slow
def test_holes_are_filled_as_by_the_pipeline(tokenizer, tmp_path, monkeypatch, capsys):
    """With latents of the masked image that are the posterior's mean in both, and without the image put over."""
    torch = pytest.importorskip('torch')
    theirs = saved(inpainting, tokenizer, tmp_path / 'hub')
    command = ['jaxgen', '--mode=import', f'--from={tmp_path}/hub', f'--workdir={tmp_path}/run']
    assert run_main(command) == 0, capsys.readouterr()
    changes = {'model.sampler.steps': STEPS, 'model.guidance.scale': 3.0, 'model.editing.paste': False}
    run = jaxgen.load(str(tmp_path / 'run'), config=changes)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 16, 16, 4)).astype(np.float32)
    image, mask = rng.integers(0, 256, (32, 32, 3), np.uint8), np.zeros((32, 32), bool)
    mask[5:22, 8:27] = True
    draws = 'diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample'
    monkeypatch.setattr(draws, lambda self, generator=None: self.mode())
    theirs.set_progress_bar_config(disable=True)
    images = 2 * theirs(
        PROMPTS, image=torch.from_numpy(image.transpose(2, 0, 1)[None] / np.float32(255)).repeat(2, 1, 1, 1),
        mask_image=torch.from_numpy(mask[None, None].astype(np.float32)).repeat(2, 1, 1, 1), height=32, width=32,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()), num_inference_steps=STEPS, output_type='np',
        guidance_scale=3.0, strength=1.0,
    ).images - 1  # fmt: skip

    arrays = conditions.first(run.assembled, run.config, 2, {'caption': PROMPTS, 'image': image, 'mask': mask})
    batch = sample.to_inside({name: jnp.asarray(x) for name, x in arrays.items()})
    monkeypatch.setattr(diffusion, 'normal', lambda keys, shape: jnp.asarray(noise))
    family = run.assembled.family
    draw = jax.jit(lambda state, frozen: family.sample(state, frozen, batch, jax.random.key(0), family.settings()))
    assert images.std() > 0.2
    np.testing.assert_allclose(draw(run.state, run.assembled.frozen), np.clip(images, -1, 1), atol=1e-3)


@pytest.mark.slow
def test_a_checkpoint_of_one_file(tokenizer, tmp_path, capsys):
    """By the names of CompVis, which diffusers turns into its own: network, first stage and text encoder, a config by
    the tensors, and a tokenizer from elsewhere."""
    torch = pytest.importorskip('torch')
    single_file_utils = pytest.importorskip('diffusers.loaders.single_file_utils')

    theirs = saved(stable_diffusion, tokenizer, tmp_path / 'hub')
    assert run_main(['jaxgen', '--mode=import', f'--from={tmp_path}/hub', f'--workdir={tmp_path}/run']) == 0
    run = jaxgen.load(str(tmp_path / 'run'))
    exporting.export_weights(run, str(tmp_path / 'unet.safetensors'), 'compvis')
    exporting.export_weights(
        jaxgen.load(str(tmp_path / 'run' / 'stages' / 'first')), str(tmp_path / 'vae.safetensors'), 'compvis'
    )
    prefixes = {'unet': 'model.diffusion_model.', 'vae': 'first_stage_model.'}
    state = {
        f'{prefix}{name}': x
        for part, prefix in prefixes.items()
        for name, x in safetensors.numpy.load_file(tmp_path / f'{part}.safetensors').items()
    }
    as_torch = {name: torch.from_numpy(x) for name, x in state.items()}
    for part, convert in (('unet', 'convert_ldm_unet_checkpoint'), ('vae', 'convert_ldm_vae_checkpoint')):
        module = getattr(theirs, part)
        turned = getattr(single_file_utils, convert)(dict(as_torch), config=dict(module.config))
        for name, weight in module.state_dict().items():
            torch.testing.assert_close(turned[name].reshape(weight.shape), weight, rtol=0, atol=0)
    names = {name.removeprefix('text_model.'): x.numpy() for name, x in theirs.text_encoder.state_dict().items()}
    state |= {f'cond_stage_model.transformer.text_model.{name}': x for name, x in names.items()}
    # What the checkpoint has besides.
    state |= {'cond_stage_model.transformer.text_model.embeddings.position_ids': np.arange(LENGTH)[None]}
    state |= {'betas': np.linspace(0.1, 0.2, 10), 'model_ema.decay': np.ones(())}
    safetensors.numpy.save_file({k: np.ascontiguousarray(x) for k, x in state.items()}, tmp_path / 'all.safetensors')
    command = ['jaxgen', '--mode=import', f'--from={tmp_path}/all.safetensors', f'--workdir={tmp_path}/one']
    assert run_main(command) == 2
    assert 'holds no tokenizer, which texts are read by' in capsys.readouterr().err
    assert not os.path.exists(tmp_path / 'one')
    fields = ['--config.data.size=32', '--config.model.network.heads=4']
    assert run_main([*command, f'--tokenizer={tokenizer}', *fields]) == 0, capsys.readouterr()
    one = jaxgen.load(str(tmp_path / 'one'))
    jax.tree.map(np.testing.assert_array_equal, one.state.ema, run.state.ema)
    for stage in ('first', 'text'):
        jax.tree.map(
            np.testing.assert_array_equal, one.assembled.frozen[stage][0].ema, run.assembled.frozen[stage][0].ema
        )
    assert one.config.model.conditioning.to_dict() == run.config.model.conditioning.to_dict()
    assert one.config.model.latent_scale == 0.18215


def names_of(config, source: str, prefix: str) -> dict[str, Tensor]:
    """Tensors that are not there, with the names of a source at a config's size."""
    part = importing.published_part(assembly.assemble(config, stage=assembly.abstract_stage).abstract)
    entries = sources.entries_of(sources.for_config(config, source)[0], config, importing.flat_shapes(part))
    shapes = {f'{prefix}{name}': entry.their_shape() for entry in entries for name in entry.all_names}
    return {name: Tensor(shape, np.dtype(np.float32), lambda: None) for name, shape in shapes.items()}


# {config: {prefix of a text encoder: (its config, source)}}
CHECKPOINTS = {
    'stable_diffusion': {'cond_stage_model.transformer.': ('clip_text_l14', 'transformers')},
    'stable_diffusion:v2': {'cond_stage_model.model.': ('clip_text_l14:h14', 'openclip')},
    'stable_diffusion_xl': {
        'conditioner.embedders.0.transformer.': ('clip_text_l14', 'transformers'),
        'conditioner.embedders.1.model.': ('clip_text_l14:bigg14', 'openclip'),
    },
    'stable_diffusion_xl:refiner': {'conditioner.embedders.0.model.': ('clip_text_l14:bigg14', 'openclip')},
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CHECKPOINTS)
def test_checkpoints_at_published_size(name):
    """Networks, sizes and what is read of the text encoders are those of the configs, by names and shapes alone."""
    config = configs.load(name)
    tensors = names_of(config, 'compvis', 'model.diffusion_model.')
    tensors |= names_of(configs.load('kl_f8_imagenet256'), 'compvis', 'first_stage_model.')
    for prefix, (encoder, source) in CHECKPOINTS[name].items():
        tensors |= names_of(configs.load(encoder), source, prefix)
    weights = Weights('all.safetensors', tensors)
    _, made = pipelines.from_checkpoint(weights)
    assert made.model.network.to_dict() == config.model.network.to_dict()
    assert made.model.latent_scale == config.model.latent_scale
    caption, own = made.model.conditioning.caption, config.model.conditioning.caption
    # The text encoder of 2 has its last block in such a file, which transformers' lacks.
    assert caption.tokens == (('text/before_normalised',) if name.endswith(':v2') else own.tokens)
    assert (caption.pooled, caption.empty) == (own.pooled, own.empty)
    assert made.model.conditioning.get('sizes') == config.model.conditioning.get('sizes')
    for stage, inside in pipelines.in_one_file(weights).items():
        if stage != 'first':
            encoder = next(one for prefix, (one, _) in CHECKPOINTS[name].items() if prefix in pipelines.INSIDE[stage])
            network = pipelines.stage_config(made, stage, inside, {}).model.network.to_dict()
            assert network == configs.load(encoder).model.network.to_dict()


# {config: source of its network by its authors' names}
ALONE = {'stable_diffusion_3': 'stability', 'flux': 'bfl', 'flux:schnell': 'bfl'}


@pytest.mark.slow
@pytest.mark.parametrize('name', ALONE)
def test_networks_alone_at_published_size(name):
    """Stable Diffusion 3 and FLUX by names and shapes alone: what is missing is named, and runs may stand for it."""
    config, source = configs.load(name), ALONE[name]
    rows, tensors = sources.for_config(config, source)[0].rows, {}
    for key, tensor in names_of(config, source, 'model.diffusion_model.').items():
        key = re.sub(*rows, key) if rows[0] else key
        n = tensors[key].shape[0] if key in tensors else 0
        tensors[key] = dataclasses.replace(tensor, shape=(n + tensor.shape[0], *tensor.shape[1:]))
    if source == 'stability':
        tensors['model.diffusion_model.pos_embed'] = Tensor((1, 192**2, 1536), np.dtype(np.float32), lambda: None)
    weights = Weights('one.safetensors', tensors)
    with pytest.raises(UserError) as caught:
        pipelines.from_checkpoint(weights)
    assert all(f'--config.stages.{stage}=RUN' in str(caught.value) for stage in config.stages)
    _, made = pipelines.from_checkpoint(weights, {f'stages.{stage}' for stage in config.stages})
    assert made.model.network.to_dict() == config.model.network.to_dict()
    caption, own = made.model.conditioning.caption, config.model.conditioning.caption
    assert (caption.tokens, caption.pooled) == (own.tokens, own.pooled)
    assert made.model.guidance == config.model.guidance
    for field in ('latent_scale', 'latent_shift'):
        assert made.model[field] == config.model[field]
    assert made.model.sampler.steps == {'flux:schnell': 4}.get(name, 28)


@pytest.mark.slow
@pytest.mark.parametrize('case', ['sd3', 'flux'])
def test_networks_by_the_names_of_their_authors(case, tokenizer, tmp_path, capsys):
    """Into the run of the pipeline, whose stages are there; those of Stable Diffusion 3 as diffusers turns them into
    its own."""
    torch = pytest.importorskip('torch')
    single_file_utils = pytest.importorskip('diffusers.loaders.single_file_utils')
    theirs = saved(PIPELINES[case][0], tokenizer, tmp_path / 'hub').transformer
    assert run_main(['jaxgen', '--mode=import', f'--from={tmp_path}/hub', f'--workdir={tmp_path}/run']) == 0
    run, file = jaxgen.load(str(tmp_path / 'run')), tmp_path / 'own.safetensors'
    state = {name: x.numpy() for name, x in theirs.state_dict().items()}
    if case == 'sd3':
        exporting.export_weights(run, str(tmp_path / 'out.safetensors'), 'stability')
        own = safetensors.numpy.load_file(tmp_path / 'out.safetensors')
        own['pos_embed'] = state['pos_embed.pos_embed']
        convert = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers
        turned = convert({name: torch.from_numpy(x) for name, x in own.items()})
        for name, x in state.items():
            np.testing.assert_array_equal(turned[name].reshape(x.shape), x)
    else:
        own = by_bfl(state)
    own = {f'model.diffusion_model.{name}': np.ascontiguousarray(x) for name, x in own.items()}
    safetensors.numpy.save_file(own, file)
    named = {f'stages.{stage}' for stage in run.config.stages}
    import_weights(run.config, str(file), str(tmp_path / 'again'), named=named)
    again = jaxgen.load(str(tmp_path / 'again'))
    jax.tree.map(np.testing.assert_array_equal, again.state.ema, run.state.ema)


# --- what is wrong


UNET = {'_class_name': 'UNet2DConditionModel'}


@pytest.mark.parametrize(
    ('said', 'line'),
    [
        (UNET | {'class_embed_type': 'timestep'}, "class_embed_type is 'timestep'"),
        (UNET | {'attention_head_dim': [5, 10, 20, 21]}, r'heads here are as many, or as wide'),
        (UNET | {'attention_head_dim': 'eight'}, 'attention_head_dim is .eight.'),
        (UNET | {'layers_per_block': [1, 2, 2, 2]}, 'layers_per_block of the file differ by level'),
        (UNET | {'transformer_layers_per_block': [[1, 2], 1, 1, 1]}, 'transformer_layers_per_block is'),
        (UNET | {'block_out_channels': []}, 'block_out_channels'),
        (UNET | {'time_cond_proj_dim': 256}, 'time_cond_proj_dim is 256'),
        ({'_class_name': 'SD3Transformer2DModel', 'dual_attention_layers': [1]}, 'here they are the first blocks'),
        ({'_class_name': 'SD3Transformer2DModel', 'qk_norm': 'layer_norm'}, "qk_norm is 'layer_norm'"),
        ({'_class_name': 'SD3Transformer2DModel', 'caption_projection_dim': 7}, 'caption_projection_dim of the file'),
        ({'_class_name': 'FluxTransformer2DModel', 'patch_size': 2}, 'tokens are 2 x 2'),
        ({'_class_name': 'FluxTransformer2DModel', 'axes_dims_rope': 3}, 'is damaged'),
    ],
)
def test_a_network_that_there_is_not(said, line):
    with pytest.raises(UserError, match=line) as caught:
        text_to_image.section_of(said)
    assert '\n' not in str(caught.value)


def test_networks_of_published_config_json():
    """Stable Diffusion 2.1, SDXL's refiner and Stable Diffusion 3.5 medium."""
    crossed, plain = 'CrossAttnDownBlock2D', 'DownBlock2D'
    two = text_to_image.section_of(UNET | {'attention_head_dim': [5, 10, 20, 20]})
    assert (two['head_channels'], two['depths'], two['middle_depth']) == (64, (1, 1, 1, 0), 1)
    refiner = text_to_image.section_of(UNET | {
        'block_out_channels': [384, 768, 1536, 1536], 'attention_head_dim': [6, 12, 24, 24],
        'transformer_layers_per_block': 4, 'down_block_types': [plain, crossed, crossed, plain],
        'up_block_types': ['UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
    })  # fmt: skip
    assert (refiner['head_channels'], refiner['depths'], refiner['middle_depth']) == (64, (0, 4, 4, 0), 4)
    three = text_to_image.section_of({
        '_class_name': 'SD3Transformer2DModel', 'sample_size': 128, 'num_layers': 24, 'num_attention_heads': 24,
        'caption_projection_dim': 1536, 'pos_embed_max_size': 384, 'qk_norm': 'rms_norm',
        'dual_attention_layers': list(range(13)),
    })  # fmt: skip
    assert (three['channels'], three['dual'], three['unit'], three['largest']) == (1536, 13, 6.0, 384)


def test_a_pipeline_that_lacks_a_text_encoder():
    said = {'_class_name': 'SD3Transformer2DModel'}
    with pytest.raises(UserError, match='the pipeline lacks text_encoder_3'):
        text_to_image.conditioning_of(said, {}, ['text', 'text_2'], (1024, 1024))
    refiner = UNET | {'addition_embed_type': 'text_time'}
    made = text_to_image.conditioning_of(refiner, {'requires_aesthetics_score': True}, ['text_2'], (1024, 1024))
    assert made['conditioning']['sizes']['values'] == (1024, 1024, 0, 0, 6)
    assert made['conditioning']['sizes']['absent'] == (1024, 1024, 0, 0, 2.5)
    assert made['conditioning']['caption']['tokens'] == ('text_2/before',)
    assert made['conditioning']['caption']['empty'] == 'zeros'  # the default of diffusers' pipelines of XL
