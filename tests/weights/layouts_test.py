"""How models lie in files and folders of the hub: further copies, shards, pickles of tensors, whole pipelines in one
file, names of older versions. Whatever the layout, the run is that of the plain folder."""

from __future__ import annotations

import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from references import randomise
from support import run_main
from text_pipelines import (
    PIPELINES,
    SHIFTED,
    autoencoder,
    by_bfl,
    saved,
    stable_diffusion,
    t5,
    text,
    unet,
)

import jaxgen
from jaxgen.text import tokenizers
from jaxgen.weights import exporting, files

LENGTH = 11
SIDE = '--config.data.size=32'


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    """The folder of a tokenizer of CLIP's kind."""
    folder = str(tmp_path_factory.mktemp('tokenizer'))
    tokenizers.train(['a red heart on a mat', 'a blue star on a mat'], 550, LENGTH).save(folder)
    return folder


def imported(capsys, source, run, *options: str):
    """(the run, what the command said)."""
    code = run_main(['jaxgen', '--mode=import', f'--from={source}', f'--workdir={run}', *options])
    said = capsys.readouterr().err
    assert code == 0, said
    return jaxgen.load(str(run)), said


def refused(capsys, source, run, *options: str) -> str:
    """The line with which the command ends."""
    capsys.readouterr()  # what was written before
    assert run_main(['jaxgen', '--mode=import', f'--from={source}', f'--workdir={run}', *options]) == 2
    assert not os.path.exists(run)
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith('jaxgen: config:')]
    assert len(said) == 1, said
    return said[0]


def weights_of(run) -> dict:
    return {'network': run.state.ema, **{name: one[0].ema for name, one in run.assembled.frozen.items()}}


def check_same(a, b, equal=np.testing.assert_array_equal) -> None:
    """Weights of the network and of all stages."""
    jax.tree.map(equal, weights_of(a), weights_of(b))


def check_same_config(a, b, *but: str) -> None:
    """What a run computes with its weights."""
    for section in {'network', 'conditioning', 'training', 'process', 'sampler', 'guidance'} - {*but}:
        assert a.config.model[section] == b.config.model[section], section
    for field in ('latent_scale', 'latent_shift'):
        assert a.config.model[field] == pytest.approx(b.config.model[field])
    for stage, (_, path) in {name: (0, path) for name, path in b.config.stages.items()}.items():
        ours = jaxgen.load(a.config.stages[stage]).config.model
        theirs = jaxgen.load(path).config.model
        assert ours.to_dict() == theirs.to_dict()


def numpy_of(module) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in module.state_dict().items()}


def under(prefix: str, tensors: dict) -> dict:
    return {f'{prefix}{name}': np.ascontiguousarray(x) for name, x in tensors.items()}


def exported(run_folder, tmp_path, names: str) -> dict:
    """The tensors of a run by the names of a source."""
    file = tmp_path / 'exported.safetensors'
    exporting.export_weights(jaxgen.load(str(run_folder)), str(file), names)
    tensors = safetensors.numpy.load_file(file)
    os.remove(file)
    return tensors


# --- folders


@pytest.mark.slow
def test_further_copies_shards_and_pickles_of_tensors(tokenizer, tmp_path, capsys):
    """As diffusers and transformers write them; what is no model is named and left out."""
    theirs = saved(stable_diffusion, tokenizer, tmp_path / 'hub')
    plain, _ = imported(capsys, tmp_path / 'hub', tmp_path / 'plain')
    shards = dict(max_shard_size='60KB')
    layouts = {
        'fp16': dict(variant='fp16'),
        'fp16_shards': dict(variant='fp16', **shards),
        'bin': dict(safe_serialization=False),
        'bin_shards': dict(safe_serialization=False, **shards),
        'fp16_bin': dict(safe_serialization=False, variant='fp16'),
    }
    for name, options in layouts.items():
        folder = tmp_path / name
        theirs.save_pretrained(folder, **options)
        for part in ('text_encoder',):  # transformers writes no pickles any more
            if 'bin' in name:
                as_pickles(theirs.text_encoder, folder / part, 'shards' in name, options.get('variant', ''))
        index = json.loads((folder / 'model_index.json').read_text())
        index |= {'safety_checker': ['stable_diffusion', 'StableDiffusionSafetyChecker']}
        index |= {'feature_extractor': ['transformers', 'CLIPImageProcessor']}
        (folder / 'model_index.json').write_text(json.dumps(index))
        for part in ('safety_checker', 'feature_extractor'):
            os.makedirs(folder / part)
        (folder / 'safety_checker' / 'pytorch_model.bin').write_bytes(b'\x80\x04.')
        for part in (folder / 'unet', folder / 'text_encoder'):
            there = sorted(os.listdir(part))
            if 'shards' in name:
                assert any('index' in one for one in there) and len(there) > 3, there
            assert not [one for one in files.IN_FOLDER if one in there] or 'fp16' not in name, there
        run, said = imported(capsys, folder, tmp_path / f'run_{name}')
        line = next((line for line in said.splitlines() if 'left out of the pipeline' in line), said)
        assert 'safety_checker' in line and 'feature_extractor' in line, line
        check_same(run, plain)
        shutil.rmtree(folder)


def as_pickles(module, folder, shards: bool, variant: str) -> None:
    """A model of transformers as its older versions wrote it."""
    torch = pytest.importorskip('torch')
    for name in os.listdir(folder):
        if 'safetensors' in name:
            os.remove(folder / name)
    word = f'.{variant}' if variant else ''
    state = dict(module.state_dict())
    if not shards:
        torch.save(state, folder / f'pytorch_model{word}.bin')
        return
    named = {name: f'pytorch_model-0000{1 + i % 2}-of-00002.bin' for i, name in enumerate(state)}
    for file in {*named.values()}:
        torch.save({name: x for name, x in state.items() if named[name] == file}, folder / file)
    (folder / 'pytorch_model.bin.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': named}))


@pytest.mark.slow
def test_an_autoencoder_by_older_names_and_alone(tokenizer, tmp_path, capsys):
    """Attention as diffusers named it before 0.17, linear maps as convolutions; the names of CompVis without a
    config."""
    diffusers = pytest.importorskip('diffusers')
    theirs = autoencoder(diffusers)
    theirs.save_pretrained(tmp_path / 'vae')
    plain, _ = imported(capsys, tmp_path / 'vae', tmp_path / 'plain')
    older = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
    state = {}
    for name, x in numpy_of(theirs).items():
        for new, old in older.items():
            name = name.replace(f'.{new}.', f'.{old}.')
        state[name] = np.ascontiguousarray(x[..., None, None]) if 'query.weight' in name else x
    assert any('.query.' in name for name in state)
    shutil.copytree(tmp_path / 'vae', tmp_path / 'older')
    safetensors.numpy.save_file(state, tmp_path / 'older' / 'diffusion_pytorch_model.safetensors')
    older_run, _ = imported(capsys, tmp_path / 'older', tmp_path / 'run_older')
    check_same(older_run, plain)
    safetensors.numpy.save_file(exported(tmp_path / 'plain', tmp_path, 'compvis'), tmp_path / 'ae.safetensors')
    alone, _ = imported(capsys, tmp_path / 'ae.safetensors', tmp_path / 'alone', SIDE)
    check_same(alone, plain)


@pytest.mark.slow
def test_a_text_encoder_with_a_tokenizer_of_one_file(tokenizer, tmp_path, capsys):
    """And its names without a prefix, with a buffer of older versions."""
    transformers = pytest.importorskip('transformers')
    theirs = text(transformers)
    theirs.save_pretrained(tmp_path / 'text_encoder')
    shutil.copytree(tokenizer, tmp_path / 'tokenizer')
    plain, _ = imported(capsys, tmp_path / 'text_encoder', tmp_path / 'plain')
    folder = tmp_path / 'one'
    fast = transformers.CLIPTokenizerFast.from_pretrained(tokenizer)
    shutil.copytree(tmp_path / 'text_encoder', folder)
    fast.backend_tokenizer.save(str(folder / 'tokenizer.json'))
    for prefix in ('text_model.', ''):
        state = {prefix + name.removeprefix('text_model.'): x for name, x in numpy_of(theirs).items()}
        state[f'{prefix}embeddings.position_ids'] = np.arange(LENGTH)[None]
        safetensors.numpy.save_file(state, folder / 'model.safetensors')
        run, _ = imported(capsys, folder, tmp_path / f'run{prefix}')
        check_same(run, plain)
        for words in ('a red star', 'mat'):
            ours, other = (one.assembled.tokenizers['tokens']([words])[0] for one in (run, plain))
            np.testing.assert_array_equal(ours, other)


# --- whole pipelines in one file


def stable_diffusion_3(diffusers, transformers, tokenizer):
    """Heads and positions as published."""
    torch = pytest.importorskip('torch')
    network = randomise(torch, diffusers.SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=64, num_attention_heads=1,
        joint_attention_dim=192, caption_projection_dim=64, pooled_projection_dim=44, out_channels=4,
        pos_embed_max_size=96, qk_norm='rms_norm', dual_attention_layers=(0,),
    ))  # fmt: skip
    projected = 'CLIPTextModelWithProjection'
    return diffusers.StableDiffusion3Pipeline(
        vae=autoencoder(diffusers, scaling_factor=1.5305, **SHIFTED),
        text_encoder=text(transformers, projected, 64, heads=1),
        text_encoder_2=text(transformers, projected, 128, 24, heads=2, hidden_act='gelu'),
        text_encoder_3=t5(transformers, 192), tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=tokenizer,
        transformer=network, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


@pytest.mark.slow
def test_stable_diffusion_3_in_one_file(tokenizer, tmp_path, capsys):
    """With all, and without its T5, which a run may stand for; T5 in numbers of eight bits."""
    torch = pytest.importorskip('torch')
    safetensors_torch = pytest.importorskip('safetensors.torch')
    theirs = saved(stable_diffusion_3, tokenizer, tmp_path / 'hub')
    plain, _ = imported(capsys, tmp_path / 'hub', tmp_path / 'plain')
    state = under('model.diffusion_model.', exported(tmp_path / 'plain', tmp_path, 'stability'))
    state['model.diffusion_model.pos_embed'] = numpy_of(theirs.transformer)['pos_embed.pos_embed']
    state |= under('first_stage_model.', exported(plain.config.stages.first, tmp_path, 'compvis'))
    file, options = tmp_path / 'sd3.safetensors', (SIDE, f'--tokenizer={tokenizer}')
    safetensors.numpy.save_file(state, file)
    line = refused(capsys, file, tmp_path / 'none', *options)
    assert all(f'--config.stages.{stage}=RUN' in line for stage in ('text', 'text_2', 'text_3')), line
    for part, name in {'clip_l': 'text_encoder', 'clip_g': 'text_encoder_2'}.items():
        tensors = numpy_of(getattr(theirs, name))
        tensors = {f'text_model.{k.removeprefix("text_model.")}' if 'projection' not in k else k: x
                   for k, x in tensors.items()}  # fmt: skip
        state |= under(f'text_encoders.{part}.transformer.', tensors)
        state[f'text_encoders.{part}.logit_scale'] = np.ones(())
    safetensors.numpy.save_file(state, file)
    line = refused(capsys, file, tmp_path / 'none', *options)
    assert '--config.stages.text_3=RUN' in line and 'stages.text=' not in line
    run, _ = imported(
        capsys, file, tmp_path / 'named', *options, f'--config.stages.text_3={plain.config.stages.text_3}'
    )
    check_same(run, plain)
    t5_state = {name: x for name, x in theirs.text_encoder_3.state_dict().items() if 'embed_tokens' not in name}
    in_eight = {name: x.to(torch.float8_e4m3fn) for name, x in t5_state.items()}
    whole = {name: torch.from_numpy(np.array(x)) for name, x in state.items()}
    whole |= {f'text_encoders.t5xxl.transformer.{name}': x.contiguous() for name, x in in_eight.items()}
    safetensors_torch.save_file(whole, file)
    run, _ = imported(capsys, file, tmp_path / 'whole', *options)
    check_same_config(run, plain)
    ours, other = weights_of(run), weights_of(plain)
    jax.tree.map(
        np.testing.assert_array_equal, ours.pop('text_3'),
        jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.float8_e4m3fn).astype(np.float32), other.pop('text_3')),
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, ours, other)


def flux(diffusers, transformers, tokenizer):
    """Heads as published."""
    torch = pytest.importorskip('torch')
    network = randomise(torch, diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=128, num_attention_heads=1,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True,
    ))  # fmt: skip
    return diffusers.FluxPipeline(
        vae=autoencoder(diffusers, scaling_factor=0.3611, **{**SHIFTED, 'shift_factor': 0.1159}),
        text_encoder=text(transformers, width=64, heads=1), text_encoder_2=t5(transformers, 64), tokenizer=tokenizer,
        tokenizer_2=tokenizer, transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip


@pytest.mark.slow
def test_flux_in_one_file(tokenizer, tmp_path, capsys):
    """Its authors' names, written and read: the network alone with runs of the rest, and all in one file."""
    theirs = saved(flux, tokenizer, tmp_path / 'hub')
    plain, _ = imported(capsys, tmp_path / 'hub', tmp_path / 'plain', SIDE)
    state = exported(tmp_path / 'plain', tmp_path, 'bfl')
    reference = by_bfl(numpy_of(theirs.transformer))
    assert state.keys() == reference.keys()
    for name, x in reference.items():
        np.testing.assert_array_equal(state[name], x)
    file, options = tmp_path / 'flux1-dev.safetensors', (SIDE,)
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in reference.items()}, file)
    line = refused(capsys, file, tmp_path / 'none', *options)
    assert all(f'--config.stages.{stage}=RUN' in line for stage in ('first', 'text', 'text_2')), line
    stages = [f'--config.stages.{name}={path}' for name, path in plain.config.stages.items()]
    run, _ = imported(capsys, file, tmp_path / 'alone', *options, *stages)
    check_same(run, plain)
    check_same_config(run, plain)
    state = under('model.diffusion_model.', reference)
    state |= under('vae.', exported(plain.config.stages.first, tmp_path, 'compvis'))
    tensors = {f'text_model.{name.removeprefix("text_model.")}': x for name, x in numpy_of(theirs.text_encoder).items()}
    state |= under('text_encoders.clip_l.transformer.', tensors)
    tensors = {name: x for name, x in numpy_of(theirs.text_encoder_2).items() if 'embed_tokens' not in name}
    state |= under('text_encoders.t5xxl.transformer.', tensors)
    safetensors.numpy.save_file(state, file)
    run, _ = imported(capsys, file, tmp_path / 'whole', *options, f'--tokenizer={tokenizer}')
    check_same(run, plain)
    check_same_config(run, plain)


def inpainting(diffusers, transformers, tokenizer):
    """Stable Diffusion's model of nine channels, with heads as published."""
    network = unet(diffusers, True, cross_attention_dim=64, attention_head_dim=8, in_channels=9)
    return diffusers.StableDiffusionInpaintPipeline(
        vae=autoencoder(diffusers), text_encoder=text(transformers, width=64, heads=1), tokenizer=tokenizer,
        unet=network, scheduler=diffusers.DDIMScheduler(
            beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012, clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(diffusers, transformers, tokenizer):
    """Heads as published."""
    made = PIPELINES['sdxl'][0]
    theirs = made(diffusers, transformers, tokenizer)
    theirs.register_modules(
        text_encoder=text(transformers, width=64, heads=1),
        text_encoder_2=text(transformers, 'CLIPTextModelWithProjection', 128, 20, heads=2, hidden_act='gelu'),
        unet=unet(
            diffusers, False, cross_attention_dim=192, attention_head_dim=(1, 1), transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=20 + 48, use_linear_projection=True,
            addition_embed_type='text_time', addition_time_embed_dim=8,
        ),
    )  # fmt: skip
    return theirs


@pytest.mark.slow
@pytest.mark.parametrize('case', ['inpainting', 'sdxl'])
def test_stable_diffusion_in_one_file(case, tokenizer, tmp_path, capsys):
    """The text encoders by names with and without a prefix, OpenCLIP's of SDXL by its own."""
    made = {'inpainting': inpainting, 'sdxl': stable_diffusion_xl}[case]
    theirs = saved(made, tokenizer, tmp_path / 'hub')
    plain, _ = imported(capsys, tmp_path / 'hub', tmp_path / 'plain')
    state = under('model.diffusion_model.', exported(tmp_path / 'plain', tmp_path, 'compvis'))
    state |= under('first_stage_model.', exported(plain.config.stages.first, tmp_path, 'compvis'))
    tensors = {name.removeprefix('text_model.'): x for name, x in numpy_of(theirs.text_encoder).items()}
    tensors['embeddings.position_ids'] = np.arange(LENGTH)[None]
    root = 'cond_stage_model.transformer.' if case == 'inpainting' else 'conditioner.embedders.0.transformer.'
    more = {'alphas_cumprod': np.ones(4), 'model_ema.decay': np.ones(())}
    options = [SIDE, f'--tokenizer={tokenizer}']
    if case == 'sdxl':
        own = exported(plain.config.stages.text_2, tmp_path, 'openclip')
        more |= under('conditioner.embedders.1.model.', own) | {
            'conditioner.embedders.1.model.logit_scale': np.ones(())
        }
        options.append('--config.model.network.head_channels=32')
        options.append('--config.model.network.middle_depth=2')
    for prefix in ('', 'text_model.'):
        file = tmp_path / 'all.safetensors'
        safetensors.numpy.save_file(state | more | under(root + prefix, tensors), file)
        run, _ = imported(capsys, file, tmp_path / f'run{prefix}', *options)
        check_same(run, plain)
        assert run.config.model.conditioning.keys() == plain.config.model.conditioning.keys()
    assert ('inpainting' in run.config.model.conditioning) == (case == 'inpainting')
