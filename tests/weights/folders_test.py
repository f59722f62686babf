"""Folders and files of several models: pipelines of diffusers, checkpoints of latent-diffusion."""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from references import randomise
from support import config_of, run_main

import jaxgen
from jaxgen import assembly
from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.weights import exporting, files, importing, pipelines, schedulers, sources

KINDS = dict(down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D'))
STAGE = dict(down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2)
SIZES = dict(block_out_channels=(32, 64), layers_per_block=1)


def ldm(torch, diffusers, folder: str):
    """A pipeline of latents of 16 x 16 and images of 32 x 32."""
    unet = diffusers.UNet2DModel(sample_size=16, attention_head_dim=16, **KINDS, **SIZES)
    codes = dict(latent_channels=3, num_vq_embeddings=16, vq_embed_dim=3, scaling_factor=0.5)
    stage = diffusers.VQModel(sample_size=32, **STAGE, **SIZES, **codes)
    betas = dict(beta_schedule='scaled_linear', beta_start=0.0015, beta_end=0.0195)
    scheduler = diffusers.DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline = diffusers.LDMPipeline(randomise(torch, stage), randomise(torch, unet), scheduler)
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.mark.slow
def test_a_pipeline_in_one_call_and_back(tmp_path, capsys):
    """Without a config: both networks, the scale of the latents and the scheduler; images of ten steps from the same
    noise are the pipeline's, and the export is a pipeline again."""
    torch = pytest.importorskip('torch')
    diffusers = pytest.importorskip('diffusers')
    theirs = ldm(torch, diffusers, tmp_path / 'ldm')
    run = f'--workdir={tmp_path}/run'
    assert run_main(['jaxgen', '--mode=import', f'--from={tmp_path}/ldm', run]) == 0
    err = capsys.readouterr().err
    assert 'config: ldm_celebahq256' in err and 'model.latent_scale = 0.5' in err
    assert sorted(os.listdir(tmp_path)) == ['ldm', 'run']

    (tmp_path / 'run').rename(tmp_path / 'moved')  # its stage is its own
    ours = jaxgen.load(str(tmp_path / 'moved'), config={'model.sampler.steps': 10})
    noise = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    theirs.scheduler.set_timesteps(10)
    x = torch.from_numpy(np.moveaxis(noise, -1, 1).copy())
    with torch.no_grad():
        for t in theirs.scheduler.timesteps:
            x = theirs.scheduler.step(theirs.unet(x, t).sample, t, x).prev_sample
        reference = np.moveaxis(theirs.vqvae.decode(x / 0.5).sample.numpy(), 1, -1)
    family, frozen = ours.assembled.family, ours.assembled.frozen
    images = family.decode(ours.state, frozen, {}, jnp.asarray(noise), jax.random.key(0))
    np.testing.assert_allclose(np.clip(images, -1, 1), np.clip(reference, -1, 1), atol=1e-3)

    exporting.export_weights(ours, str(tmp_path / 'out'), 'diffusers')
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'out')
    assert type(again) is diffusers.LDMPipeline and again.vqvae.config.scaling_factor == 0.5
    for part in ('unet', 'vqvae'):
        for name, weight in getattr(theirs, part).state_dict().items():
            torch.testing.assert_close(getattr(again, part).state_dict()[name], weight, rtol=0, atol=0)
    for key, value in theirs.scheduler.config.items():
        assert key.startswith('_') or again.scheduler.config[key] == value, key


def names_of(config, source: str) -> dict[str, np.ndarray]:
    """Random weights with the names of a source."""
    part = importing.published_part(assembly.assemble(config, stage=assembly.abstract_stage).abstract)
    found = sources.entries_of(sources.for_config(config, source)[0], config, importing.flat_shapes(part))
    rng = np.random.default_rng(0)
    shapes = {name: entry.their_shape() for entry in found for name in entry.all_names}
    return {name: 0.1 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


SMALL = """
from jaxgen.config import make
def get_config(variant=''):
    model = dict(regulariser='vq', interface='latents', channels=32, multipliers=(1, 2), blocks=1, attention=(),
                 latent=3, vocabulary=16, group_size=0, adversarial=0.0, perceptual=0.0)
    return make(variant, family='vqgan', data=dict(source='shapes', size=16, channels=3), model=model)
"""


@pytest.mark.slow
def test_a_checkpoint_of_latent_diffusion_in_one_call(tmp_path, monkeypatch):
    """Its first stage and its U-Net in one file, and weights of neither."""
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'small.py').write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    stage = configs.load('configs/small.py')
    fields = ['data.source=shapes', 'data.size=16', 'stages.first=runs/small', 'model.network.channels=32']
    fields += ['model.network.multipliers=(1,2)', 'model.network.attention=(4,)', 'model.network.blocks=1']
    config = config_of('ldm_celebahq256', [*fields, 'model.network.head_channels=32'])
    first = {f'first_stage_model.{n}': x for n, x in names_of(stage, 'compvis').items()}
    file = first | {f'model.diffusion_model.{n}': x for n, x in names_of(config, 'guided').items()}
    others = {'scale_factor': np.array(0.25, np.float32), 'cond_stage_model.x': np.ones(3, np.float32)}
    safetensors.numpy.save_file(file | others, 'ldm.safetensors')
    importing.import_weights(config, 'ldm.safetensors', 'run', 'guided')
    run = jaxgen.load('run')
    assert run.config.model.latent_scale == 0.25
    assert run.config.stages.first == str(tmp_path / 'run' / 'stages' / 'first')
    bias = run.assembled.frozen['first'][0].ema['encoder']['first']['bias']
    np.testing.assert_array_equal(bias, first['first_stage_model.encoder.conv_in.bias'])


SAID = {'_class_name': 'DDIMScheduler', 'num_train_timesteps': 500, 'beta_schedule': 'linear', 'beta_end': 0.01}


def test_scheduler_sets_process_and_sampler():
    config, lines = pipelines.with_scheduler(config_of('ddpm_cifar10', []), SAID, set())
    process, sampler = config.model.process, config.model.sampler
    assert (process.name, process.timesteps, process.beta_start, process.beta_end) == ('linear', 500, 1e-4, 0.01)
    assert (sampler.name, sampler.steps, sampler.clip, sampler.clipped_noise) == ('ddim', 50, True, False)
    assert len(lines) == 2 and "model.sampler.name = 'ddim'" in lines[1]
    said = schedulers.scheduler_config(config)
    assert {key: said[key] for key in SAID} == SAID
    assert pipelines.with_scheduler(config, said, set()) == (config, [])


def test_scheduler_against_fields_that_the_person_set():
    """A process must agree; a sampler is the person's choice."""
    config = config_of('ddpm_cifar10', ['model.sampler.name=heun', 'model.sampler.steps=7'])
    kept, _ = pipelines.with_scheduler(config, SAID, {'model.sampler.name', 'model.sampler.steps'})
    assert (kept.model.sampler.name, kept.model.sampler.steps) == ('heun', 7)
    with pytest.raises(UserError, match=r'--config\.model\.process\.beta_end: .*says 0\.01'):
        pipelines.with_scheduler(config, SAID, {'model.process.beta_end'})


@pytest.mark.parametrize(('said', 'line'), [
    ({'beta_schedule': 'laplace'}, "beta_schedule 'laplace'"),
    ({'beta_end': 'x'}, 'beta_end'),
    ({'num_train_timesteps': -1}, 'timesteps'),
])  # fmt: skip
def test_processes_that_are_not_here_get_a_line(said, line):
    with pytest.raises(UserError, match=line):
        pipelines.with_scheduler(config_of('ddpm_cifar10', []), {**SAID, **said}, set())


@pytest.mark.parametrize('said', [{'thresholding': True}, {'_class_name': 'KDPM2DiscreteScheduler'}])
def test_the_config_draws_where_no_sampler_is_like_the_scheduler(said):
    config, lines = pipelines.with_scheduler(config_of('ddpm_cifar10', []), {**SAID, **said}, set())
    assert config.model.sampler.name == 'ancestral' and "'ancestral' draws" in lines[-1]


@pytest.mark.parametrize(('index', 'line'), [
    ({'_class_name': 'X', 'text_encoder': ['a', 'b']}, 'a pipeline .X. with none of unet, transformer'),
    ({'unet': ['diffusers', 'UNet2DModel']}, 'unet holds none of'),
    ([], 'holds no JSON object'),
])  # fmt: skip
def test_pipelines_without_a_network_get_a_line(tmp_path, index, line):
    for name in ('unet', 'text_encoder'):
        (tmp_path / name).mkdir()
    (tmp_path / 'model_index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match=line):
        pipelines.open_parts(str(tmp_path))


def test_links_out_of_a_folder_are_not_followed(tmp_path):
    (tmp_path / 'model').mkdir()
    safetensors.numpy.save_file({'a': np.ones(2)}, tmp_path / 'secret.safetensors')
    (tmp_path / 'model' / 'diffusion_pytorch_model.safetensors').symlink_to(tmp_path / 'secret.safetensors')
    with pytest.raises(UserError, match='is a link out of its folder'):
        files.open_weights(str(tmp_path / 'model'))
    (tmp_path / 'pipeline').mkdir()
    (tmp_path / 'pipeline' / 'unet').symlink_to(tmp_path / 'model')
    (tmp_path / 'pipeline' / 'model_index.json').write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    with pytest.raises(UserError, match='is a link out of its folder'):
        pipelines.open_parts(str(tmp_path / 'pipeline'))


@pytest.mark.parametrize(('said', 'line'), [
    ({}, 'needs --config'),
    ({'_class_name': 'Other'}, "'Other' is none of AutoencoderKL"),
    ({'_class_name': 'UNet2DModel'}, 'config.json of a UNet2DModel is damaged'),
    ({'_class_name': 'UNet2DModel', 'block_out_channels': [32, 'x']}, r'damaged: block_out_channels is \[32, .x'),
    ({'_class_name': 'UNet2DModel', 'block_out_channels': [32, 64]}, 'sample_size is None'),
    ({'_class_name': 'DiTTransformer2DModel', 'sample_size': 32}, 'a model of latents'),
])  # fmt: skip
def test_configs_that_cannot_be_derived_get_a_line(tmp_path, said, line):
    safetensors.numpy.save_file({'a': np.ones(2)}, tmp_path / 'diffusion_pytorch_model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(said))
    with pytest.raises(UserError, match=line):
        pipelines.derived(str(tmp_path))


PARTS = {
    'unet': {
        **{'_class_name': 'UNet2DModel', 'sample_size': 16, 'block_out_channels': [32, 64], 'layers_per_block': 1},
        **KINDS,
    },
    'vqvae': {'_class_name': 'VQModel', 'block_out_channels': [32, 64], 'scaling_factor': 0.5, **STAGE},
    'scheduler': {**SAID, 'trained_betas': None},
}


def pipeline(folder, **parts):
    """A pipeline's JSON files, with other values of some keys of its parts, and weights of one number."""
    for name, said in PARTS.items():
        (folder / name).mkdir(parents=True)
        file = 'scheduler_config.json' if name == 'scheduler' else 'config.json'
        (folder / name / file).write_text(json.dumps({**said, **parts.get(name, {})}))
        safetensors.numpy.save_file({'a': np.ones(1)}, folder / name / 'diffusion_pytorch_model.safetensors')
    (folder / 'model_index.json').write_text(json.dumps({name: ['diffusers', 'X'] for name in PARTS}))
    return str(folder)


def read_pipeline(folder: str):
    """The config of a pipeline, and what its scheduler and its first stage say."""
    _, config = pipelines.derived(folder)
    parts = pipelines.parts_for(config, folder, set())
    config, _ = pipelines.with_scheduler(config, parts.scheduler, set())
    config, _ = pipelines.with_scale(config, parts, set())
    for name, weights in parts.stages.items():
        own = pipelines.stage_config(config, name, weights, parts.said(weights))
        sources.for_config(own, 'diffusers')[0].fields(own, weights)
    source = sources.for_config(config, 'diffusers')[0]
    return source.fields(config, parts.weights)


@pytest.mark.parametrize('value', [None, [], {}, 'a\nb', [[]], [None], -1, 1.5, float('nan'), float('inf'), 2**70])
@pytest.mark.parametrize(('part', 'key'), [
    ('unet', '_class_name'), ('unet', 'block_out_channels'), ('unet', 'layers_per_block'), ('unet', 'downsample_type'),
    ('vqvae', '_class_name'), ('vqvae', 'block_out_channels'),
    ('scheduler', 'beta_schedule'), ('scheduler', 'prediction_type'), ('scheduler', 'timestep_spacing'),
    ('scheduler', 'num_train_timesteps'),
])  # fmt: skip
def test_values_of_another_kind_get_a_line(tmp_path, part, key, value):
    """JSON of a stranger: nothing in it is used before its kind is known."""
    with pytest.raises(UserError) as e:
        read_pipeline(pipeline(tmp_path / 'p', **{part: {key: value}}))
    assert key in str(e.value) and str(e.value).isprintable(), str(e.value)


@pytest.mark.parametrize('value', [None, 'x', [], {}, float('nan')])
def test_scales_that_are_no_numbers_get_a_line(tmp_path, value):
    with pytest.raises(UserError, match=r'first stage is damaged: scaling_factor is .*, and should be a number'):
        read_pipeline(pipeline(tmp_path / 'p', vqvae={'scaling_factor': value}))
    assert read_pipeline(pipeline(tmp_path / 'q'))['model.latent_scale'] == 0.5


@pytest.mark.parametrize(('scale', 'line'), [(np.array(0.25), ''), (np.ones(2), 'is no number'), (np.nan, 'is no num')])
def test_scale_of_a_file_of_several_models(tmp_path, scale, line):
    """What config.json says beside the file is of another model."""
    tensors = {'scale_factor': np.asarray(scale, np.float32), 'first_stage_model.a': np.ones(1, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / 'x.safetensors')
    (tmp_path / 'config.json').write_text('{"_class_name": "Other", "scaling_factor": 7}')
    config = config_of('ldm_celebahq256', [])
    parts = pipelines.parts_for(config, str(tmp_path / 'x.safetensors'), set())
    if line:
        with pytest.raises(UserError, match=line):
            pipelines.with_scale(config, parts, set())
    else:
        assert pipelines.with_scale(config, parts, set())[0].model.latent_scale == 0.25
        weights = parts.stages['first']
        assert pipelines.stage_config(config, 'first', weights, parts.said(weights)).family == 'vqgan'


@pytest.mark.parametrize(('said', 'name', 'widths'), [
    ({'sample_size': [16, 8]}, 'adm', (32, 64)),
    ({'block_out_channels': [64, 96, 224], 'attention_head_dim': None}, 'adm', (64, 96, 224)),
    ({'block_out_channels': [98, 102, 106], 'norm_num_groups': 2}, 'adm', (98, 102, 106)),
    ({'flip_sin_to_cos': False, 'freq_shift': 1, 'downsample_padding': 0}, 'adm', (32, 64)),
    (
        {'flip_sin_to_cos': False, 'freq_shift': 1, 'downsample_padding': 0, 'attention_head_dim': None},
        'unet', (32, 64),
    ),
])  # fmt: skip
def test_derived_configs_have_the_fields_of_their_source(tmp_path, said, name, widths):
    """What config.json says is all there: no line with fields to set follows."""
    kinds = ['DownBlock2D'] * (len(widths) - 1) + ['AttnDownBlock2D']
    said = {**PARTS['unet'], 'down_block_types': kinds, **said}
    safetensors.numpy.save_file({'a': np.ones(2)}, tmp_path / 'diffusion_pytorch_model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(said))
    _, config = pipelines.derived(str(tmp_path))
    network = config.model.network
    assert network.name == name
    assert config.data.size == (16 if said['sample_size'] == 16 else tuple(said['sample_size']))
    assert tuple(int(network.channels * m) for m in network.multipliers) == widths
    assert network.attention == (16 >> len(widths) - 1,)
    source = sources.for_config(config, 'diffusers')[0]
    weights = files.open_weights(str(tmp_path))
    assert importing.other_fields(config, source, weights, {'norm/scale': (widths[0],)}) == {}


def test_derived_config_of_a_dit(tmp_path):
    said = {'_class_name': 'DiTTransformer2DModel', 'num_attention_heads': 2, 'attention_head_dim': 16, 'num_layers': 3}
    said |= {'norm_eps': 1e-3, 'sample_size': 8, 'out_channels': 8}
    folder = pipeline(tmp_path / 'p', vqvae={'_class_name': 'AutoencoderKL', 'latent_channels': 4})
    os.rename(f'{folder}/unet', f'{folder}/transformer')
    (tmp_path / 'p' / 'transformer' / 'config.json').write_text(json.dumps(said))
    os.rename(f'{folder}/vqvae', f'{folder}/vae')
    (tmp_path / 'p' / 'model_index.json').write_text('{"transformer": [], "vae": [], "scheduler": []}')
    _, config = pipelines.derived(folder)
    network = config.model.network
    assert (network.heads, network.channels, network.blocks, network.mlp_eps) == (2, 32, 3, 1e-3)
    assert config.data.size == 16 and config.train.dtype == 'float32'
    parts = pipelines.parts_for(config, folder, set())
    config, _ = pipelines.with_scheduler(config, parts.scheduler, set())
    config, _ = pipelines.with_scale(config, parts, set())
    source = sources.for_config(config, 'diffusers')[0]
    assert importing.other_fields(config, source, parts.weights, {}) == {}
    assert source.remarks(config, parts.weights) == []


def test_widths_of_a_first_stage_are_multiples(tmp_path):
    with pytest.raises(UserError, match=r'block_out_channels \[32, 48\]: widths of the networks here are multiples'):
        read_pipeline(pipeline(tmp_path / 'p', vqvae={'block_out_channels': [32, 48]}))


def test_a_pipeline_without_its_first_stage_is_no_model_of_images(tmp_path):
    """Its network is of latents; null stands for a part that there is none of."""
    folder = pipeline(tmp_path / 'p')
    os.rename(f'{folder}/vqvae', tmp_path / 'elsewhere')
    with pytest.raises(UserError, match='lacks its first stage, the folder vqvae'):
        pipelines.derived(folder)
    for none in (None, [None, None]):
        with open(f'{folder}/model_index.json', 'w', encoding='utf-8') as file:
            json.dump({'unet': ['diffusers', 'UNet2DModel'], 'scheduler': [], 'vqvae': none}, file)
        assert pipelines.derived(folder)[0] == 'ddpm_cifar10'


def test_a_scheduler_without_betas_leaves_the_process(tmp_path):
    said = {'_class_name': 'EDMEulerScheduler', 'num_train_timesteps': 1000, 'sigma_min': 0.002}
    config, lines = pipelines.with_scheduler(config_of('ddpm_cifar10', []), said, set())
    assert config == config_of('ddpm_cifar10', [])
    assert "has no betas: the process is that of the config, 'linear'" in lines[0] and len(lines) == 2


def test_licences_of_other_folders_are_not_those_of_weights(tmp_path):
    """That of the folder above is that of its pipeline alone."""
    (tmp_path / 'unet').mkdir()
    (tmp_path / 'README.md').write_text('---\nlicense: mit\n---')
    assert importing.stated_licence(str(tmp_path / 'unet')) == ''
    (tmp_path / 'model_index.json').write_text('{}')
    assert importing.stated_licence(str(tmp_path / 'unet')) == 'mit'
    (tmp_path / 'unet' / 'README.md').write_text('---\nlicense: apache-2.0\n---')
    assert importing.stated_licence(str(tmp_path / 'unet')) == 'apache-2.0'
