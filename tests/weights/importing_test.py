"""Published weights as runs, and back: against the source's own code on the same weights and noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from references import randomise
from support import ROOT, config_of, python_on, run_main

import jaxgen
from jaxgen import assembly
from jaxgen import config as configs
from jaxgen.diffusion import levels, processes
from jaxgen.errors import UserError
from jaxgen.weights import diffusers as diffusers_names
from jaxgen.weights import exporting, importing, mapping, sources, whole
from jaxgen.weights.files import Weights
from jaxgen.weights.importing import import_weights, other_fields

UNET = [
    'data.size=16',
    'data.source=shapes',
    'model.network.channels=32',
    'model.network.multipliers=(1,2)',
    'model.network.blocks=1',
    'model.network.attention=(8,)',
    'model.sampler.name=ddim',
    'model.sampler.steps=10',
    'model.sampler.eta=0.0',
]
KL = ['data.size=16', 'data.source=shapes', 'model.channels=32', 'model.multipliers=(1,2)', 'model.blocks=1']


def nchw(torch, x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def unet(**options):
    diffusers = pytest.importorskip('diffusers')
    sizes = dict(sample_size=16, block_out_channels=(32, 64), layers_per_block=1)
    ddpm = {
        'norm_eps': 1e-6,
        'downsample_padding': 0,
        'flip_sin_to_cos': False,
        'freq_shift': 1,
        'attention_head_dim': None,
    }
    return diffusers.UNet2DModel(
        **sizes,
        down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
        **{**ddpm, **options},
    )


@pytest.mark.slow
def test_ddim_pipeline_and_back(tmp_path):
    """Ten steps of the pipeline of diffusers from the same noise; then an export that diffusers loads."""
    torch = pytest.importorskip('torch')
    diffusers = pytest.importorskip('diffusers')
    theirs = randomise(torch, unet())
    theirs.save_pretrained(tmp_path / 'hub')
    (tmp_path / 'hub' / 'README.md').write_text('---\nlicense: cc-by-nc-4.0\n---\n# A model')
    config = config_of('ddpm_cifar10', UNET)
    import_weights(config, str(tmp_path / 'hub'), str(tmp_path / 'run'))
    run = jaxgen.load(str(tmp_path / 'run'))
    assert run.step == 0

    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    scheduler = diffusers.DDIMScheduler(clip_sample=True, steps_offset=0)
    scheduler.set_timesteps(10)
    schedule = schedule_of(config)
    assert scheduler.timesteps.tolist() == np.asarray(schedule.t)[::-1].tolist()
    x = nchw(torch, noise * np.float32(schedule.sigma[-1]))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(theirs(x, t).sample, t, x, eta=0.0, use_clipped_model_output=True).prev_sample
    reference = nhwc(x)
    assert reference.std() > 0.1
    latents = jnp.asarray(noise)
    family = run.assembled.family
    ours = family.decode(run.state, {}, {}, latents, jax.random.key(0))
    np.testing.assert_allclose(ours, np.clip(reference, -1, 1), atol=1e-3)
    # Of another size: attention stays where it was, at the second level.
    large = jaxgen.load(str(tmp_path / 'run'), config={'data.size': (32, 24)})
    x, t = rng.uniform(-1, 1, (1, 32, 24, 3)).astype(np.float32), int(schedule.t[3])
    with torch.no_grad():
        eps = nhwc(theirs(nchw(torch, x), t).sample)
    alpha, sigma = float(schedule.alpha[3]), float(schedule.sigma[3])
    x_0 = large.denoise(x / alpha, sigma / alpha)
    np.testing.assert_allclose(x_0, np.clip((x - sigma * eps) / alpha, -1, 1), atol=1e-3)

    exporting.export_weights(run, str(tmp_path / 'out'))
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / 'out')
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=0, atol=0)
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert '| imported from | hub (SHA-256' in card and 'The licence of the imported weights is cc-by-nc-4.0.' in card


def schedule_of(config):
    """The noise levels that the config's sampler visits, rising."""
    process = processes.make(config.model.process.to_dict(), 'eps')
    return levels.make(config.model.sampler.to_dict(), process, False).schedule


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['AutoencoderKL', 'VQModel', 'without convolutions at the latents'])
def test_first_stages_and_back(tmp_path, kind):
    torch = pytest.importorskip('torch')
    diffusers = pytest.importorskip('diffusers')
    plain = kind.startswith('without')
    options = dict(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False) if plain else {}
    if kind == 'VQModel':
        options = dict(num_vq_embeddings=16, vq_embed_dim=4)
    kind = 'AutoencoderKL' if plain else kind
    theirs = getattr(diffusers, kind)(
        down_block_types=('DownEncoderBlock2D', 'AttnDownEncoderBlock2D') if kind == 'VQModel' else (
            'DownEncoderBlock2D', 'DownEncoderBlock2D'),
        up_block_types=('AttnUpDecoderBlock2D', 'UpDecoderBlock2D') if kind == 'VQModel' else (
            'UpDecoderBlock2D', 'UpDecoderBlock2D'),
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, sample_size=16, **options,
    )  # fmt: skip
    randomise(torch, theirs).save_pretrained(tmp_path / 'hub')
    fields = [*KL, 'model.latent=4', 'model.adversarial=0.0']
    if kind == 'VQModel':
        fields += ['model.regulariser=vq', 'model.vocabulary=16', 'model.interface=latents', 'model.attention=(8,)']
    if plain:
        fields += ['model.latent_kernel=0', 'model.middle_attention=False']
    import_weights(config_of('kl_f8_imagenet256', fields), str(tmp_path / 'hub'), str(tmp_path / 'run'))
    run = jaxgen.load(str(tmp_path / 'run'))
    family, x = run.assembled.family, np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    z = family.encode(run.state, {}, {'image': jnp.asarray(x)}, jax.random.key(0))
    with torch.no_grad():
        out = theirs.encode(nchw(torch, x))
        reference = nhwc(out.latents if kind == 'VQModel' else out.latent_dist.mode())
        np.testing.assert_allclose(z, reference, atol=1e-3 * reference.std())
        image = nhwc(theirs.decode(nchw(torch, reference)).sample)
    ours = family.decode(run.state, {}, {}, jnp.asarray(reference), jax.random.key(0))
    np.testing.assert_allclose(ours, np.clip(image, -1, 1) if np.abs(ours).max() <= 1 else image, atol=1e-3)
    wide, x = jaxgen.load(str(tmp_path / 'run'), config={'data.size': (24, 32)}), x.repeat(2, 2)[:, np.arange(24) % 16]
    with torch.no_grad():
        out = theirs.encode(nchw(torch, x))
        reference = nhwc(out.latents if kind == 'VQModel' else out.latent_dist.mode())
        image = np.clip(nhwc(theirs.decode(nchw(torch, reference)).sample), -1, 1)
    np.testing.assert_allclose(wide.encode(x), reference, atol=1e-3 * reference.std())
    np.testing.assert_allclose(wide.decode(reference, dtype=np.float32), image, atol=1e-3)
    exporting.export_weights(run, str(tmp_path / 'out'), 'diffusers')
    again = getattr(diffusers, kind).from_pretrained(tmp_path / 'out')
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=0, atol=0)


def small(tmp_path, changes=None, name='x.safetensors') -> str:
    """A file of random weights of the network of UNET, changed by a function."""
    torch = pytest.importorskip('torch')
    state = {n: w.numpy() for n, w in randomise(torch, unet()).state_dict().items()}
    if changes:
        changes(state)
    safetensors.numpy.save_file(state, tmp_path / name)
    return str(tmp_path / name)


@pytest.mark.parametrize(('change', 'line'), [
    (lambda s: s.pop('conv_in.bias'), r'missing: conv_in\.bias \[32\]'),
    (lambda s: s.update(other=np.zeros(3)), r'left over: other \[3\]'),
    (lambda s: s.update({'conv_in.bias': np.zeros(7)}), r'conv_in\.bias is \[7\] and \[32\] by the config'),
])  # fmt: skip
def test_weights_that_do_not_fit_leave_nothing_behind(tmp_path, change, line):
    with pytest.raises(UserError, match=line):
        import_weights(config_of('ddpm_cifar10', UNET), small(tmp_path, change), str(tmp_path / 'run'))
    assert sorted(os.listdir(tmp_path)) == ['x.safetensors']


def test_a_config_that_names_cannot_tell_from_the_file_s(tmp_path):
    pytest.importorskip('torch')
    unet(norm_eps=1e-5).save_pretrained(tmp_path / 'hub')
    with pytest.raises(UserError, match=r'set --config\.model\.network\.eps=1e-05'):
        import_weights(config_of('ddpm_cifar10', UNET), str(tmp_path / 'hub'), str(tmp_path / 'run'))
    unet(flip_sin_to_cos=True, freq_shift=0, downsample_padding=1).save_pretrained(tmp_path / 'adm')
    with pytest.raises(UserError, match="name the network 'adm'"):
        import_weights(config_of('ddpm_cifar10', UNET), str(tmp_path / 'adm'), str(tmp_path / 'run'))


@pytest.mark.parametrize(('name', 'said', 'line'), [
    ('ddpm_cifar10', {'center_input_sample': True}, 'center_input_sample is True'),
    ('ddpm_cifar10', {'act_fn': 'gelu'}, "act_fn is 'gelu'"),
    ('ddpm_cifar10', {'mid_block_scale_factor': 1.414}, 'mid_block_scale_factor is 1.414'),
    ('ncsnpp_cifar10', {'mid_block_scale_factor': 1}, 'mid_block_scale_factor is 1'),
    ('kl_f8_imagenet256', {'act_fn': 'relu'}, "act_fn is 'relu'"),
    ('dit_imagenet256', {'activation_fn': 'gelu'}, "activation_fn is 'gelu'"),
])  # fmt: skip
def test_a_config_json_that_says_another_computation(name, said, line):
    config = config_of(name, [])
    weights = Weights('hub', {'x': None}, {'norm_num_groups': 32, **said})
    with pytest.raises(UserError, match=line):
        sources.for_config(config, 'diffusers')[0].fields(config, weights)


def test_heads_by_config_json():
    """attention_head_dim None is one head of any width; DiT's number of heads is in no shape."""
    plain = {'attention_head_dim': None, 'flip_sin_to_cos': True, 'freq_shift': 0}
    config = configs.load('adm_imagenet64')
    fields = sources.for_config(config, 'diffusers')[0].fields(config, Weights('hub', {'x': None}, plain))
    assert (fields['model.network.head_channels'], fields['model.network.heads']) == (0, 1)
    config = configs.load('dit_imagenet256')
    fields = sources.for_config(config, 'diffusers')[0].fields(
        config, Weights('hub', {'x': None}, {'num_attention_heads': 12})
    )
    assert fields['model.network.heads'] == 12


def test_groups_are_compared_where_a_norm_has_others():
    """min(32, C // 4) and 32 groups are the same from 128 channels on."""
    source = sources.for_config(config_of('ddpm_cifar10', []), 'diffusers')[0]
    config = config_of('ddpm_cifar10', ['model.network.group_size=4'])
    assert other_fields(config, source, None, {'norm/scale': (128,), 'conv/kernel': (3, 3, 6, 6)}) == {}
    assert other_fields(config, source, None, {'norm/scale': (64,)}) == {'model.network.group_size': (0, 4)}


@pytest.mark.parametrize(('name', 'fields', 'line'), [
    ('ddpm_cifar10', ['model.network.group_size=4'], r'this network has \[8, 16, 24, 32\]'),
    ('adm_imagenet64', ['model.network.head_channels=0', 'model.network.heads=2'], 'here are 2 heads at every width'),
])  # fmt: skip
def test_no_config_json_for_what_diffusers_computes_otherwise(name, fields, line):
    config = config_of(name, [*UNET[:6], *fields])
    with pytest.raises(UserError, match=line):
        diffusers_names.model_config(config, assembly.assemble(config))


@pytest.mark.slow
def test_half_precision_is_kept_and_training_goes_on_in_full(tmp_path):
    torch = pytest.importorskip('torch')
    unet().to(torch.bfloat16).save_pretrained(tmp_path / 'hub')
    config = config_of('ddpm_cifar10', UNET)
    import_weights(config, str(tmp_path / 'hub'), str(tmp_path / 'run'))
    run = jaxgen.load(str(tmp_path / 'run'))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(run.state.ema)} == {'bfloat16'}
    with pytest.raises(UserError, match='which are one set'):
        jaxgen.load(str(tmp_path / 'run'), weights='params')
    more = ['train.steps=1', 'data.batch=8', 'train.samples=1', 'model.sampler.steps=2', 'optim.ema=0.5']
    trained = jaxgen.train(config_of('ddpm_cifar10', [*UNET, *more]), str(tmp_path / 'run'))
    assert trained.step == 1
    for leaf, before in zip(jax.tree.leaves(trained.state.ema), jax.tree.leaves(run.state.ema), strict=True):
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, before.astype(jnp.float32), atol=1e-3)  # one update of lr 2e-4


@pytest.mark.slow
def test_command(tmp_path, capsys):
    """Import, sample and export by the command; the file that comes out holds what went in."""
    file, run = small(tmp_path), str(tmp_path / 'run')
    fields = [f'--config.{field}' for field in UNET]
    common = ['jaxgen', f'--workdir={run}']
    assert run_main([*common, '--mode=import', '--config=ddpm_cifar10', f'--from={file}', *fields]) == 0
    with open(os.path.join(run, 'weights.json'), encoding='utf-8') as record:
        assert json.load(record)['source'] == 'diffusers'
    assert run_main([*common, '--mode=sample', '--n=2', '--config.model.sampler.steps=2']) == 0
    assert run_main([*common, '--mode=export', f'--to={tmp_path}/out.safetensors']) == 0
    before, after = (safetensors.numpy.load_file(path) for path in (file, tmp_path / 'out.safetensors'))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    capsys.readouterr()
    assert run_main([*common, '--mode=import', '--config=ddpm_cifar10', f'--from={file}', *fields]) == 2
    assert 'is there already' in capsys.readouterr().err
    assert run_main([*common, '--mode=export', f'--to={tmp_path}/out.safetensors']) == 2
    assert 'is there already' in capsys.readouterr().err
    assert run_main(['jaxgen', '--mode=import', '--config=ddpm_cifar10']) == 2
    assert '--mode=import needs --from' in capsys.readouterr().err


def test_an_import_that_is_stopped_leaves_nothing(tmp_path, monkeypatch):
    """What a signal runs while the checkpoint is written: the folder is removed, then the process ends."""
    ended = []
    monkeypatch.setattr(whole.interrupt, 'leave', ended.append)
    (tmp_path / 'half' / 'checkpoints').mkdir(parents=True)
    whole.abandon(str(tmp_path / 'half'), 'import')
    assert os.listdir(tmp_path) == [] and ended == ['stopped; nothing is left of the import']


def tiny_file(path, change=None) -> list[str]:
    """Writes weights of a small U-Net without torch; the fields of its config."""
    config = config_of('ddpm_cifar10', UNET)
    part = importing.published_part(assembly.assemble(config, stage=assembly.abstract_stage).abstract)
    entries = sources.entries_of(sources.for_config(config)[0], config, importing.flat_shapes(part))
    rng = np.random.default_rng(0)
    shapes = {name: entry.their_shape() for entry in entries for name in entry.all_names}
    arrays = {name: 0.1 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(change(arrays) if change else arrays, path)
    return UNET


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_numbers_that_are_none_are_refused(value, dtype):
    x = np.ones((3, 2**19 + 7), jnp.dtype(dtype))
    assert mapping.finite('conv_in.weight', x) is x
    x[2, -1] = value
    with pytest.raises(UserError, match=r'conv_in\.weight has numbers that are infinite or no numbers'):
        mapping.finite('conv_in.weight', x)
    x[2, -1] = np.finfo(x.dtype).max if dtype != 'bfloat16' else jnp.finfo(jnp.bfloat16).max
    assert mapping.finite('conv_in.weight', x) is x


def test_an_import_of_numbers_that_are_none_leaves_nothing(tmp_path):
    """It is refused while the run is written, after others of its arrays were."""

    def damage(arrays):
        arrays['conv_out.weight'][0, 0, 0, 0] = np.nan
        return arrays

    tiny_file(tmp_path / 'x.safetensors', damage)
    (tmp_path / 'below').mkdir()
    with pytest.raises(
        UserError, match=r'x\.safetensors: conv_out\.weight has numbers that are infinite or no numbers'
    ):
        import_weights(
            config_of('ddpm_cifar10', UNET), str(tmp_path / 'x.safetensors'), str(tmp_path / 'below' / 'run')
        )
    assert os.listdir(tmp_path / 'below') == []


KILLED = """
import os, sys
import numpy as np
from jaxgen.main import run_main
from jaxgen.weights import mapping
read, n = mapping.Entry.read, 0
def kill(entry, tensors):
    global n
    n += 1
    if n == 20:
        os.kill(os.getpid(), 9)
    return read(entry, tensors)
mapping.Entry.read = kill
run_main(['jaxgen', *sys.argv[1:]])
"""


@pytest.mark.slow
def test_what_a_killed_import_left_is_no_run_and_is_removed_by_the_next(tmp_path):
    fields = [f'--config.{field}' for field in tiny_file(tmp_path / 'x.safetensors')]
    run = tmp_path / 'runs' / 'mine'
    given = ['--mode=import', '--config=ddpm_cifar10', f'--from={tmp_path}/x.safetensors', f'--workdir={run}', *fields]
    killed = subprocess.run([sys.executable, '-c', KILLED, *given], cwd=ROOT, capture_output=True)
    assert killed.returncode == -9
    assert os.listdir(tmp_path / 'runs') == ['.mine.import']
    assert not (tmp_path / 'runs' / '.mine.import' / 'config.json').exists()
    assert run_main(['jaxgen', *given]) == 0
    assert os.listdir(tmp_path / 'runs') == ['mine']
    assert jaxgen.load(str(run)).step == 0


def test_a_directory_is_written_by_one_process_at_a_time(tmp_path):
    path, busy = str(tmp_path / 'run'), r'--workdir=.*run is being written by another process \(.*\.run\.import\)'
    with whole.new_directory(path, 'import', '--workdir') as new:
        with pytest.raises(UserError, match=busy), whole.new_directory(path, 'import', '--workdir'):
            pass
        with open(os.path.join(new, 'config.json'), 'w', encoding='utf-8') as file:
            file.write('{}')
    assert os.listdir(path) == ['config.json'] and os.listdir(tmp_path) == ['run']
    with pytest.raises(UserError, match='is there already'), whole.new_directory(path, 'import', '--workdir'):
        pass


def test_what_is_in_the_way_of_a_directory_is_named(tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere' / 'kept').touch()
    (tmp_path / '.run.import').symlink_to(tmp_path / 'elsewhere')
    line = r'\.run\.import is in the way'
    with pytest.raises(UserError, match=line), whole.new_directory(str(tmp_path / 'run'), 'import', '--workdir'):
        pass
    assert os.listdir(tmp_path / 'elsewhere') == ['kept']


ON_DEVICES = """
import sys
import jax, numpy as np
import jaxgen
from jaxgen.main import run_main
assert run_main(['jaxgen', *sys.argv[2:]]) == 0
run = jaxgen.load(sys.argv[1])
kernel = run.state.ema['denoiser']['middle_0']['conv1']['kernel']
parts = {shard.data.shape for shard in kernel.addressable_shards}
assert len(kernel.addressable_shards) == 8 and {8 * np.prod(part) for part in parts} == {kernel.size}, parts
np.save(sys.argv[1] + '/kernel.npy', kernel)
"""


@pytest.mark.slow
def test_weights_lie_on_the_mesh_with_its_sharding(tmp_path):
    fields = [f'--config.{field}' for field in (*tiny_file(tmp_path / 'x.safetensors'), 'mesh.fsdp=8')]
    run = str(tmp_path / 'run')
    given = ['--mode=import', '--config=ddpm_cifar10', f'--from={tmp_path}/x.safetensors', f'--workdir={run}', *fields]
    done = python_on(8, ON_DEVICES, run, *given)
    assert done.returncode == 0, done.stderr
    theirs = safetensors.numpy.load_file(tmp_path / 'x.safetensors')['mid_block.resnets.0.conv1.weight']
    np.testing.assert_array_equal(np.load(f'{run}/kernel.npy'), theirs.transpose(2, 3, 1, 0))
