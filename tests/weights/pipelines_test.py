"""Pipelines of diffusers, imported from the folders that they save: the same images from the same noise."""

from __future__ import annotations

import inspect
import itertools
import json
import os

import jax.numpy as jnp
import make_references as references
import numpy as np
import pytest
from drawing import drawn
from support import config_of

import jaxgen
from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.weights import diffusers as names
from jaxgen.weights import exporting, schedulers, sources
from jaxgen.weights.files import Weights
from jaxgen.weights.importing import import_weights, other_fields

SMALL = ['data.size=16', 'data.source=shapes', 'train.dtype=float32']
UNET = [*SMALL, *(f'model.network.{field}' for field in ('channels=32', 'multipliers=(1,2)', 'blocks=1'))]
ATTENTION = 'model.network.attention=(8,)'
STAGE = [*SMALL, 'model.channels=32', 'model.multipliers=(1,2)', 'model.blocks=1', 'model.discriminator_layers=1']
DDPM = {
    'norm_eps': 1e-6,
    'downsample_padding': 0,
    'flip_sin_to_cos': False,
    'freq_shift': 1,
    'attention_head_dim': None,
}


def filled(model):
    """The model with weights by the rule of `make_references`."""
    import torch

    state = {name: references.weight(name, tuple(x.shape)) for name, x in model.state_dict().items()}
    for name in state:  # blocks of DiT have copies of one embedding
        if '.norm1.emb.' in name:
            state[name] = references.weight(name.partition('.norm1.emb.')[2], state[name].shape)
    model.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()})
    return model.eval()


def unet(**options):
    diffusers = pytest.importorskip('diffusers')
    sizes = dict(sample_size=16, block_out_channels=(32, 64), layers_per_block=1)
    kinds = dict(down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D'))
    return filled(diffusers.UNet2DModel(**{**sizes, **kinds, **DDPM, **options}))


def reference(pipeline, monkeypatch, channels: int, side: int, *arguments, **options) -> np.ndarray:
    """Images of a pipeline of diffusers, [n, H, W, C] in [-1, 1], from the noise of the rule."""
    calls = itertools.count(-1)

    def noise(shape, **_):
        step = next(calls)
        return references.nchw(references.start(channels, side) if step < 0 else references.added(step, channels, side))

    modules = [type(pipeline).__module__, type(pipeline.scheduler).__module__]
    for module in modules:
        monkeypatch.setattr(f'{module}.randn_tensor', noise)
    pipeline.set_progress_bar_config(disable=True)
    options |= dict(num_inference_steps=references.STEPS, output_type='np')
    return 2 * pipeline(*arguments, **options).images - 1


def scheduler_fields(folder) -> list[str]:
    """Fields by which the run of a pipeline in a folder samples as its scheduler does."""
    with open(os.path.join(folder, 'scheduler', 'scheduler_config.json'), encoding='utf-8') as file:
        said = json.load(file)
    fields = {f'model.sampler.{name}': value for name, value in schedulers.sampler_fields(said).items()}
    fields |= {'model.sampler.steps': references.STEPS}
    return [f'{field}={value}' for field, value in (schedulers.process_fields(said) | fields).items()]


def has(config_fields: list[str], name: str, config: str) -> bool:
    return configs.contains(config_of(config, config_fields).to_dict(), name)


def imported(pipeline, part: str, config: str, fields: list[str], tmp_path):
    """The run of a model of a pipeline, imported from the folder that the pipeline saves, and that folder."""
    folder = tmp_path / 'pipeline'
    pipeline.save_pretrained(folder)
    lines = scheduler_fields(folder)
    process = next(line for line in lines if line.startswith('model.process.name='))
    sampler = next(line for line in lines if line.startswith('model.sampler.name='))
    base = [*fields, process, sampler]
    lines = [line for line in lines if has(base, line.partition('=')[0], config)]
    import_weights(config_of(config, [*base, *lines]), str(folder / part), str(tmp_path / 'run'))
    return jaxgen.load(str(tmp_path / 'run')), folder


def exported(run, tmp_path, cls):
    """The network of a run in the class of diffusers, by its export."""
    exporting.export_weights(run, str(tmp_path / 'out'), 'diffusers')
    part = '' if not run.config.stages else 'transformer' if run.config.model.network.name == 'dit' else 'unet'
    return cls.from_pretrained(tmp_path / 'out' / part)


BATCH = {'index': jnp.arange(references.IMAGES), 'label': jnp.array(references.LABELS)}
ADM = dict(attention_head_dim=16, flip_sin_to_cos=True, freq_shift=0, downsample_padding=1, norm_eps=1e-5)
ADM_FIELDS = ['model.network=adm', *UNET, ATTENTION, 'model.network.group_size=0']
PLAIN = ['model.network.scale_shift=False', 'model.network.resample_in_blocks=False']
# {case: (class of the scheduler, its options, options of the network, config's fields)}
PIPELINES = {
    'fixed_small': ('DDPM', {}, {}, [*UNET, ATTENTION]),
    'fixed_large, scaled_linear, x0': (
        'DDPM', dict(variance_type='fixed_large', beta_schedule='scaled_linear', prediction_type='sample',
                     clip_sample=False),
        ADM, [*ADM_FIELDS, *PLAIN, 'model.network.head_channels=16'],
    ),
    'cosine to zero, v, trailing': (
        'DDPM', dict(variance_type='fixed_small_log', beta_schedule='squaredcos_cap_v2', prediction_type='v_prediction',
                     rescale_betas_zero_snr=True, timestep_spacing='trailing'),
        {**ADM, 'flip_sin_to_cos': False, 'downsample_padding': 0},
        [*ADM_FIELDS, *PLAIN, 'model.network.head_channels=16', 'model.network.sines_first=True',
         'model.network.padding=end'],
    ),
    'learned_range, linspace': (
        'DDPM', dict(variance_type='learned_range', timestep_spacing='linspace'),
        {**ADM, 'out_channels': 6, 'resnet_time_scale_shift': 'scale_shift', 'attn_norm_num_groups': 32,
         'downsample_type': 'resnet', 'upsample_type': 'resnet', 'freq_shift': 1, 'attention_head_dim': None,
         'down_block_types': ('ResnetDownsampleBlock2D', 'AttnDownBlock2D'),
         'up_block_types': ('AttnUpBlock2D', 'ResnetUpsampleBlock2D')},
        [*ADM_FIELDS, 'model.training.variance=learned', 'model.network.freq_shift=1', 'model.network.head_channels=0'],
    ),
    'sigmoid of 500': ('DDPM', dict(beta_schedule='sigmoid', num_train_timesteps=500), {}, [*UNET, ATTENTION]),
    'any betas': (
        'DDPM', dict(trained_betas=[float(b) for b in np.linspace(0.001, 0.3, 40)], num_train_timesteps=40), {},
        [*UNET, ATTENTION],
    ),
    'DDIM': ('DDIM', {}, {}, [*UNET, ATTENTION]),
    'DDIM, offset': (
        'DDIM', dict(steps_offset=1, set_alpha_to_one=False, beta_schedule='scaled_linear', clip_sample=False), {},
        [*UNET, ATTENTION],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('case', PIPELINES)
def test_images_are_those_of_the_pipeline(tmp_path, monkeypatch, case):
    diffusers = pytest.importorskip('diffusers')
    kind, options, network, fields = PIPELINES[case]
    scheduler = getattr(diffusers, f'{kind}Scheduler')(**options)
    make = getattr(diffusers, f'{kind}Pipeline')
    pipeline = make(unet(**network), scheduler)
    run, folder = imported(pipeline, 'unet', 'ddpm_cifar10', fields, tmp_path)
    theirs = reference(make.from_pretrained(folder), monkeypatch, 3, 16, batch_size=references.IMAGES)
    assert 0.3 < theirs.std() < 1
    np.testing.assert_allclose(drawn(run, BATCH, monkeypatch, (16, 16, 3)), theirs, atol=1e-3)
    again = make(exported(run, tmp_path, diffusers.UNet2DModel), scheduler)
    np.testing.assert_array_equal(reference(again, monkeypatch, 3, 16, batch_size=references.IMAGES), theirs)


def first_stage(cls, **options):
    kinds = dict(down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2)
    return filled(cls(block_out_channels=(32, 64), layers_per_block=1, sample_size=16, **kinds, **options))


@pytest.mark.slow
@pytest.mark.parametrize('guidance', [1.0, 3.0])
def test_images_are_those_of_dit_and_its_first_stage(tmp_path, monkeypatch, guidance):
    torch, diffusers = pytest.importorskip('torch'), pytest.importorskip('diffusers')
    stage = first_stage(diffusers.AutoencoderKL, latent_channels=4)
    network = filled(diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=1000,
    ))  # fmt: skip
    pipeline = diffusers.DiTPipeline(network, stage, diffusers.DDIMScheduler(clip_sample=False))
    stage.save_pretrained(tmp_path / 'vae')
    import_weights(config_of('kl_f8_imagenet256', [*STAGE, 'model.latent=4']), str(tmp_path / 'vae'), f'{tmp_path}/kl')
    fields = ['data.size=16', 'train.dtype=float32', f'stages.first={tmp_path}/kl', 'model.guidance.channels=0']
    fields += [f'model.network.{field}' for field in ('channels=64', 'heads=4', 'blocks=2')]
    fields += [f'model.guidance.scale={guidance}', 'model.network.freq_shift=1', 'model.network.mlp_eps=1e-5']
    run, folder = imported(pipeline, 'transformer', 'dit_imagenet256', fields, tmp_path)
    again = diffusers.DiTPipeline.from_pretrained(folder)
    theirs = reference(again, monkeypatch, 4, 8, references.LABELS, guidance_scale=guidance)
    assert 0.3 < theirs.std() < 1
    np.testing.assert_allclose(drawn(run, BATCH, monkeypatch, (8, 8, 4)), theirs, atol=1e-3)
    back = exported(run, tmp_path, diffusers.DiTTransformer2DModel)
    own = {key: value for key, value in network.config.items() if not key.startswith('_')}
    assert own == {key: back.config[key] for key in own}
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.slow
def test_images_are_those_of_latent_diffusion_on_a_vq_model(tmp_path, monkeypatch):
    diffusers = pytest.importorskip('diffusers')
    stage = first_stage(diffusers.VQModel, latent_channels=3, num_vq_embeddings=16, scaling_factor=0.5)
    network = unet(sample_size=8, **{**ADM, 'attention_head_dim': 16})
    scheduler = diffusers.DDIMScheduler(beta_schedule='scaled_linear', beta_start=0.0015, beta_end=0.0195,
                                        clip_sample=False)  # fmt: skip
    pipeline = diffusers.LDMPipeline(stage, network, scheduler)
    stage.save_pretrained(tmp_path / 'vqvae')
    vq = [*STAGE, 'model.latent=3', 'model.vocabulary=16']
    import_weights(config_of('vq_f4_celebahq256', vq), str(tmp_path / 'vqvae'), f'{tmp_path}/vq')
    fields = [*UNET, 'model.network.attention=(4,)', 'model.network.head_channels=16', f'stages.first={tmp_path}/vq']
    with pytest.raises(UserError, match=r'set --config\.model\.latent_scale=0\.5'):
        imported(pipeline, 'unet', 'ldm_celebahq256', fields, tmp_path)
    run, folder = imported(pipeline, 'unet', 'ldm_celebahq256', [*fields, 'model.latent_scale=0.5'], tmp_path)
    theirs = reference(diffusers.LDMPipeline.from_pretrained(folder), monkeypatch, 3, 8, batch_size=references.IMAGES)
    assert 0.3 < theirs.std() < 1
    np.testing.assert_allclose(drawn(run, BATCH, monkeypatch, (8, 8, 3)), theirs, atol=1e-3)


# --- what config.json says


@pytest.mark.slow
@pytest.mark.parametrize('cls', ['UNet2DModel', 'AutoencoderKL', 'VQModel', 'DiTTransformer2DModel'])
def test_every_key_of_a_class_is_known(cls):
    diffusers = pytest.importorskip('diffusers')
    signature = inspect.signature(getattr(diffusers, cls).__init__)
    assert [key for key in signature.parameters if key not in ('self', *names.KEYS[cls])] == []
    defaults = {key: one.default for key, one in signature.parameters.items() if key != 'self'}
    names.check_kinds({key: list(x) if isinstance(x, tuple) else x for key, x in defaults.items()}, cls)


CONFIGS = {
    'UNet2DModel': 'adm_imagenet64',
    'AutoencoderKL': 'kl_f8_imagenet256',
    'VQModel': 'vq_f4_celebahq256',
    'DiTTransformer2DModel': 'dit_imagenet256',
}


def fields_by(cls: str, said: dict, config: str = ''):
    """The fields that a config.json says."""
    weights = Weights('hub', {'x': None}, {'_class_name': cls, '_diffusers_version': '0.36.0', **said})
    config = configs.load(config or CONFIGS[cls])
    return sources.for_config(config, 'diffusers')[0].fields(config, weights)


@pytest.mark.parametrize('cls', CONFIGS)
def test_a_key_says_what_the_networks_have_or_is_refused(cls):
    fields_by(cls, {'a_key_of_tomorrow': None, 'another': False})
    fields_by(cls, dict.fromkeys(('num_train_timesteps', 'num_class_embeds', 'attn_norm_num_groups')))
    with pytest.raises(UserError, match=r"a_key_of_tomorrow is 'on' .* what it changes is not known"):
        fields_by(cls, {'a_key_of_tomorrow': 'on'})
    for key, values in names.KEYS[cls].items():
        fields_by(cls, {key: values[0]} if values else {})
        if values:
            with pytest.raises(UserError, match=f"{key} is 'other' in the config.json"):
                fields_by(cls, {key: 'other'})
    with pytest.raises(UserError, match=r'config\.json of the weights is of a UNet2DConditionModel: this config takes'):
        fields_by('UNet2DConditionModel', {}, CONFIGS[cls])


@pytest.mark.parametrize(('cls', 'said', 'field', 'value'), [
    ('UNet2DModel', {'norm_num_groups': 16}, 'groups', 16),
    ('UNet2DModel', {'norm_eps': 1e-3}, 'eps', 1e-3),
    ('UNet2DModel', {'flip_sin_to_cos': False}, 'sines_first', True),
    ('UNet2DModel', {'freq_shift': 1}, 'freq_shift', 1),
    ('UNet2DModel', {'downsample_padding': 0}, 'padding', 'end'),
    ('UNet2DModel', {'attention_head_dim': 4}, 'head_channels', 4),
    ('UNet2DModel', {'downsample_type': 'resnet', 'upsample_type': 'resnet'}, 'resample_in_blocks', True),
    ('UNet2DModel', {'resnet_time_scale_shift': 'scale_shift', 'attn_norm_num_groups': 32}, 'scale_shift', True),
    ('DiTTransformer2DModel', {}, 'freq_shift', 1),
    ('DiTTransformer2DModel', {}, 'mlp_eps', 1e-5),
    ('DiTTransformer2DModel', {'norm_eps': 1e-3}, 'mlp_eps', 1e-3),
    ('DiTTransformer2DModel', {'num_attention_heads': 12}, 'heads', 12),
])  # fmt: skip
def test_a_key_that_is_a_field(cls, said, field, value):
    assert fields_by(cls, said)[f'model.network.{field}'] == value


@pytest.mark.parametrize(('said', 'line'), [
    ({'downsample_type': 'resnet'}, "must both be 'conv' or 'resnet'"),
    ({'freq_shift': 2}, 'must be 0 or 1'),
    ({'resnet_time_scale_shift': 'scale_shift'}, 'attn_norm_num_groups is None'),
])  # fmt: skip
def test_a_unet_that_there_is_not(said, line):
    with pytest.raises(UserError, match=line):
        fields_by('UNet2DModel', {'attn_norm_num_groups': None, **said})


def test_the_middle_has_heads_where_no_other_attention_is():
    with pytest.raises(UserError, match=r"attention_head_dim of the file's config\.json are not those .* 'adm'"):
        fields_by('UNet2DModel', {**DDPM, 'attention_head_dim': 8, 'down_block_types': ['DownBlock2D']}, 'ddpm_cifar10')
    fields_by('UNet2DModel', {**DDPM, 'down_block_types': ['DownBlock2D']}, 'ddpm_cifar10')


@pytest.mark.parametrize(('said', 'line'), [
    ({'norm_num_groups': 16}, 'norm_num_groups: the network here has'),
    ({'norm_num_groups': None, 'attention_head_dim': 8}, 'attention_head_dim of the file is 8'),
    ({'norm_num_groups': None, 'down_block_types': ['AttnSkipDownBlock2D'], 'block_out_channels': [64]}, '32 in att'),
    ({'time_embedding_type': 'positional'}, "time_embedding_type is 'positional'"),
])  # fmt: skip
def test_a_unet_of_skip_blocks_that_there_is_not(said, line):
    plain = {'time_embedding_type': 'fourier', 'mid_block_scale_factor': 1.4142, 'block_out_channels': [128, 256]}
    plain |= {'down_block_types': ['SkipDownBlock2D', 'AttnSkipDownBlock2D'], 'attention_head_dim': None}
    fields_by('UNet2DModel', {**plain, 'norm_num_groups': None}, 'ncsnpp_cifar10')
    with pytest.raises(UserError, match=line):
        fields_by('UNet2DModel', {**plain, **said}, 'ncsnpp_cifar10')


def test_betas_and_predictions_that_are_not_here():
    plain = {'num_train_timesteps': 10, 'beta_schedule': 'linear'}
    with pytest.raises(UserError, match=r"beta_schedule 'laplace' and prediction_type 'epsilon'; here are linear"):
        schedulers.process_fields({**plain, 'beta_schedule': 'laplace'})
    with pytest.raises(UserError, match="prediction_type 'flow'"):
        schedulers.process_fields({**plain, 'prediction_type': 'flow'})


@pytest.mark.parametrize(('cls', 'said', 'key'), [
    ('DDPM', {'thresholding': True}, 'thresholding True'),
    ('DDPM', {'clip_sample_range': 2.0}, r'clip_sample_range 2\.0'),
    ('DDPM', {'variance_type': 'learned'}, "variance_type 'learned'"),
    ('DDPM', {'variance_type': 'fixed_large', 'timestep_spacing': 'trailing'}, "variance_type 'fixed_large'"),
    ('DDIM', {'timestep_spacing': 'even'}, "timestep_spacing 'even'"),
])  # fmt: skip
def test_a_scheduler_that_samples_as_nothing_here(cls, said, key):
    with pytest.raises(UserError, match=f'samplers here have no {key}, which a {cls}Scheduler'):
        schedulers.sampler_fields({'_class_name': f'{cls}Scheduler', **said})
    assert schedulers.sampler_fields({'_class_name': 'KDPM2DiscreteScheduler', **said}) == {}


def test_a_pipeline_says_how_it_samples(tmp_path):
    (tmp_path / 'scheduler').mkdir()
    (tmp_path / 'unet').mkdir()
    (tmp_path / 'model_index.json').write_text('{}')
    said = {'_class_name': 'DDIMScheduler', 'num_train_timesteps': 1000, 'beta_schedule': 'squaredcos_cap_v2'}
    (tmp_path / 'scheduler' / 'scheduler_config.json').write_text(json.dumps(said))
    weights, config = Weights(str(tmp_path / 'unet'), {}, DDPM), configs.load('ddpm_cifar10')
    source = sources.for_config(config, 'diffusers')[0]
    assert other_fields(config, source, weights, {})['model.process.name'] == ('cosine', 'linear')
    (line,) = source.remarks(config, weights)
    assert line.startswith('the DDIMScheduler of the pipeline samples as --config.model.sampler.name=ddim ')
    alone = Weights(str(tmp_path / 'other' / 'folder' / 'x.safetensors'), {}, DDPM)
    assert source.remarks(config, alone) == [] and 'model.process.name' not in source.fields(config, alone)
    (line,) = source.remarks(config, Weights(alone.path, {}, {}))
    assert line.startswith('there is no config.json beside the weights: heads, eps')
