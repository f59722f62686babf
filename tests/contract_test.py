"""The contract, held against every config. A new config brings these tests along."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from embedded import DISTINCT, EMBEDDED, FAMILIES, IN_QUICK_PART, UNTRAINED, last_of_each
from support import (
    NAMES,
    assemble,
    assert_same,
    first_batch,
    main,
    metrics,
    path,
    python_on,
    saved_state,
    tiny,
    tiny_stage,
    train_stages,
    with_tokenizers,
    with_tokens,
)

from jaxgen import assembly, conditions, data, describe, run, sample, sharding, testing
from jaxgen import config as configs
from jaxgen.checkpoint import Checkpoints
from jaxgen.errors import UserError
from jaxgen.sections import sides
from jaxgen.stopping import larger_is_better
from jaxgen.train import train

# Parameters of the published systems (papers and reference code), by network.
PUBLISHED = {
    'adm_imagenet64': {'denoiser': 295_904_454},
    'adm_imagenet256': {'denoiser': 553_838_086},
    'noisy_classifier_imagenet64': {'classifier': 65_438_568},
    'noisy_classifier_imagenet256': {'classifier': 54_096_360},
    'iddpm_cifar10': {'denoiser': 52_546_438},
    'ddpmpp_cifar10': {'denoiser': 61_804_419},
    'ncsnpp_cifar10': {'denoiser': 62_758_915},
    'edm_cifar10': {'denoiser': 55_733_891},
    'consistency_cifar10': {'denoiser': 56_395_651},
    'ddpm_cifar10': {'denoiser': 35_746_307},
    'ncsn_cifar10': {'denoiser': 30_117_635},
    'ddpm_celeba': {'denoiser': 78_700_803},
    'ddpm_celebahq256': {'denoiser': 113_673_219},
    'vdm_cifar10': {'denoiser': 30_578_179, 'schedule': 2, 'total': 30_578_181},
    'vae_mnist': {'total': 652_824},
    'dit_imagenet256': {'denoiser': 675_129_632 - 256 * 1152},  # of the table of positions, which is fixed
    # Without the same table, and the half of the last layer that its authors throw away.
    'sit_imagenet256': {'denoiser': 675_129_632 - 256 * 1152 - 16 * 1153},
    'real_nvp_cifar10': {'flow': 19_631_640 - 51},  # signs of weight-normalised single numbers, which nothing learns
    'glow_cifar10': {'flow': 44_603_604},
    'pixelcnn_cifar10': {'pixelcnn': 5_340_416},
    'gated_pixelcnn_mnist': {'pixelcnn': 438_526 - 930},  # of a layer whose output nothing reads
    'pixelcnn_pp_cifar10': {'pixelcnn': 53_659_080},
    'vqvae_cifar10': {'encoder': 364_160 + 8_256, 'decoder': 290_307},  # the codebook is no weight, but averages
    'vqvae2_imagenet256': {'total': 1_388_867},
    'kl_f8_imagenet256': {'encoder': 34_163_664, 'decoder': 49_490_199},
    'vqgan_imagenet256': {'total': 72_141_699 + 2_765_633},
    'ldm_celebahq256': {'denoiser': 274_056_163},
    'vq_f4_celebahq256': {'total': 55_322_782 + 2_765_633},
    'vampprior_mnist': {'total': 1_508_864},
    # 784-200-200-(2 x 50) and 50-200-200-784; 560-300-300-(2 x 40), gated, and 40-300-300-(2 x 560), 500 pseudo-inputs.
    'iwae_mnist': {'total': 425_284},
    'vae_frey': {'total': 1_363_600},
    'inpainting_places2': {'generator': 4_052_478},
    'pix2pix_facades': {'generator': 54_413_955, 'discriminator': 2_768_705},
    'cyclegan_horse2zebra': {
        'forward': 11_378_179,
        'backward': 11_378_179,
        'discriminator_image': 2_764_737,
        'discriminator_other': 2_764_737,
    },
    'attngan_cub': {
        'generator': 7_084_592,
        'discriminator64': 6_313_730,
        'discriminator128': 19_424_002,
        'discriminator256': 71_858_946,
        'text': 2_075_320 - 1_024,  # of second biases in torch's LSTM, which add to the first
    },
    'transformer_imagenet256': {'transformer': 1_410_640_896},
    'maskgit_imagenet256': {'transformer': 172_457_193},
    'var_imagenet256': {'transformer': 310_283_520},
    'var_vqvae_imagenet256': {'total': 108_948_355 + 2_765_633},
    'jem_cifar10': {'energy': 36_478_389 - 6_410 - 641},  # of two layers that the published model never calls
    'wgan_gp_cifar10': {'generator': 1_204_483, 'discriminator': 1_053_825},
    'stargan2_celebahq256': {
        'generator': 43_467_395 - 172_032,  # of the decoder's shortcuts, which a high pass leaves out
        'mapping': 2_438_272,
        'encoder': 20_916_928,
        'discriminator': 20_852_290,
    },
    'stylegan2_ffhq1024': {'generator': 30_370_060, 'discriminator': 29_012_513},  # 2,101,248 of them the mapping
    'stylegan2_ffhq256': {'generator': 30_034_338, 'discriminator': 28_864_129},
    'infogan_mnist': {'generator': 6_652_481, 'discriminator': 6_559_169, 'recogniser': 133_262},
    'biggan_imagenet128': {'generator': 70_433_988, 'discriminator': 87_982_370},
    'dcgan_celeba': {'generator': 3_576_704, 'discriminator': 2_765_568},
    'ddgan_cifar10': {'generator': 48_432_515, 'discriminator': 12_741_633},
    'sngan_cifar10': {'generator': 4_276_739, 'discriminator': 1_053_825},
    'stable_diffusion': {'denoiser': 859_520_964},
    'controlnet_sd15': {'control': 361_279_120},
    'stable_diffusion_xl': {'denoiser': 2_567_463_684},
    # 2,084,951,104 in the file, with a table of positions that is computed here.
    'stable_diffusion_3': {'denoiser': 2_084_951_104 - 192**2 * 1536},
    'flux': {'denoiser': 11_901_408_320},
}
# The same of variants.
VARIANTS = {
    'clip_text_l14': {'text': 123_060_480},
    'clip_text_l14:projection': {'text': 123_650_304},
    'clip_text_l14:h14': {'text': 340_387_840},
    'clip_text_l14:bigg14': {'text': 694_659_840},
    't5_xxl': {'text': 4_762_310_656},
    'stable_diffusion:v2': {'denoiser': 865_910_724},
    'stable_diffusion_xl:refiner': {'denoiser': 2_259_526_660},
    'flux:schnell': {'denoiser': 11_891_178_560},
    'kl_f8_imagenet256:sd3': {'total': 83_819_683 + 2_765_633},
    'stargan2_celebahq256:afhq': {
        'generator': 33_892_995,
        'mapping': 3_259_072,
        'encoder': 20_949_760,
        'discriminator': 20_852_803,
    },
    'stylegan2_ffhq256:paper256': {'generator': 24_767_458, 'discriminator': 24_001_089},
    'stylegan2_ffhq256:auto': {'generator': 23_191_522, 'discriminator': 24_001_089},
    'adm_imagenet256:unconditional': {'denoiser': 552_814_086},
    'adm_imagenet256:size128': {'denoiser': 421_529_606},
    'adm_imagenet256:size512': {'denoiser': 558_997_638},
    'adm_imagenet256:upsampler': {'denoiser': 311_795_910},
    'adm_imagenet256:upsampler512': {'denoiser': 308_835_270},
    'noisy_classifier_imagenet256:size128': {'classifier': 42_568_040},
    'noisy_classifier_imagenet256:size512': {'classifier': 54_448_360},
    'iddpm_cifar10:imagenet64': {'denoiser': 121_063_942},
    'iddpm_cifar10:imagenet64,conditional': {'denoiser': 273_049_350},
    'ncsnpp_cifar10:deep': {'denoiser': 107_587_075},
    'ddpmpp_cifar10:deep': {'denoiser': 106_632_579},
    'edm_cifar10:conditional': {'denoiser': 55_735_299},
    'edm_cifar10:ve': {'denoiser': 56_397_827 + 128},  # with the frequencies, which are buffers in the published code
    'edm_cifar10:ffhq64': {'denoiser': 61_805_571},
    'edm_cifar10:ffhq64,ve': {'denoiser': 62_761_091 + 128},
    'edm_cifar10:imagenet64': {'denoiser': 295_899_267},
    'var_imagenet256:d20': {'transformer': 600_917_136},
    'var_imagenet256:d24': {'transformer': 1_033_399_360},
    'var_imagenet256:d30': {'transformer': 2_010_020_356},
    'var_imagenet256:d36': {'transformer': 2_353_893_904},
}
# The log that must fall on a fixed batch. Adversarial families have none: each network's loss rises
# as the other learns.
FALLS = {
    'clip': 'loss',
    'classifier': 'loss',
    'consistency': 'loss',
    'ebm': None,  # the difference of two energies: samples chase the data
    'js_generator': 'loss',
    'maskgit': 'loss',
    'attngan': None,
    'autoencoder': 'loss',
    'cyclegan': None,
    'inpainting': None,
    'pix2pix': None,
    'glow': 'loss',
    'pixelcnn': 'loss',
    'pixelcnn_pp': 'loss',
    'real_nvp': 'loss',
    'vqgan': 'reconstruction',
    'vqvae': 'loss',
    'transformer': 'loss',
    'noisy_classifier': 'loss',
    'diffusion': 'loss',
    'vae': 'loss',
    'var': 'loss',
    'vdm': 'loss',
    'gan': None,
    'ddgan': None,
    'stargan2': None,
    'stylegan2': None,
    'infogan': None,
}


# What the loop does with a state is the same for all of them, so it is held against a few: one with a stage and no more
# than weights, one with batch statistics, one with a buffer of pictures.
WITH_THE_LOOP = ('maskgit_digits', 'dcgan_digits', 'igebm_digits')

# Of which half precision is held against full.
COMPARED = ('conditional_gan_digits', 'ddpm_digits', 'dit_digits')


# An update that is the mean of what each example costs cannot differ by devices: of such families a few stand for all.
MEANS_ALONE = ('consistency', 'inpainting', 'noisy_classifier', 'transformer', 'var', 'vdm')

# Whose first weights depend on the first batch, so that all devices must agree on it before the first update.
BY_THE_BATCH = ('glow_digits', 'pixelcnn_pp_digits', 'real_nvp_digits')


@pytest.fixture(params=sorted(DISTINCT.values()))
def distinct(request):
    return request.param


# An update of full size is traced once for each family and network; of the others of a kind the weights are counted.
TRAINED = [n for n in NAMES if configs.load(path(n)).family not in UNTRAINED]
FULL_SIZE = [n for n in TRAINED if n not in EMBEDDED]
DESCRIBED = sorted(last_of_each(FULL_SIZE, '').values())
COUNTED = {**{n: PUBLISHED.get(n, {}) for n in FULL_SIZE if n not in DESCRIBED}, **VARIANTS}


@pytest.mark.slow
@pytest.mark.parametrize('name', DESCRIBED)
def test_full_size_describes(name):
    """And there is a tiny variant of it."""
    config = configs.load(path(name, ''))
    about = describe.describe(config, assembly.assemble(config, stage=assembly.abstract_stage))
    assert json.loads(json.dumps(about)) == about
    for network, count in PUBLISHED.get(name, {}).items():
        assert about['parameters'][network] == count
    assert about['update_flops'] > 6 * about['parameters']['total'], 'forward and backward touch every weight'
    assert about['state_bytes'] > 8 * about['parameters']['total']
    shape, dtype = about['batch']['image']
    assert shape == [config.data.batch, *sides(config.data.size), config.data.channels] and dtype == 'uint8'
    assert describe.count(assemble(tiny(name)).abstract.params) < about['parameters']['total']


@pytest.mark.slow
@pytest.mark.parametrize('name', COUNTED)
def test_published_sizes(name):
    file, _, variant = name.partition(':')
    state = assembly.assemble(configs.load(path(file, variant)), stage=assembly.abstract_stage).abstract
    sizes = {network: describe.count(weights) for network, weights in state.params.items()}
    sizes['total'] = sum(sizes.values())
    for network, count in COUNTED[name].items():
        assert sizes[network] == count


@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in TRAINED if n not in DESCRIBED and n not in DISTINCT.values()])
def test_traces_at_tiny_size(name):
    """All functions of every config that nothing is computed of: shapes and types are those of the contract."""
    config = tiny(name)
    check_traces(config, assemble(config), complete=name in EMBEDDED)


def check_traces(config, assembled, complete: bool = True) -> None:
    """complete: samplers and figures too."""
    family, state, frozen = assembled.family, assembled.abstract, assembled.frozen
    batch = jax.eval_shape(lambda: first_batch(config))
    key = jax.eval_shape(lambda: jax.random.key(0))
    after, logs = jax.eval_shape(family.update, state, frozen, batch, key)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(leaf.shape == () for leaf in logs.values())
    if family.prepare is not None:  # by shapes; prepare_test.py compares the values
        made = jax.eval_shape(family.prepare, frozen, batch, key)
        rest = {name: x for name, x in batch.items() if name != 'image'}
        assert jax.eval_shape(family.update, state, frozen, {**rest, **made}, key) == (after, logs)
    if not complete:  # samplers and figures are those of a config of embedded data
        return
    if family.sample is not None:
        given = conditions.first(assembled, config, 4, {})
        given = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in given.items()}
        images = jax.eval_shape(family.sample, state, frozen, jax.eval_shape(sample.to_inside, given), key)
        assert images.shape == (4, *batch['image'].shape[1:]) and images.dtype == jnp.float32
    numbered = {**batch, 'index': jax.ShapeDtypeStruct((len(batch['image']),), jnp.int32)}
    figures = jax.eval_shape(family.evaluate, state, frozen, numbered, key)
    assert figures and all(v.shape == (len(batch['image']),) for v in figures.values())
    assert all(any(larger_is_better(name, (one,)) for name in figures) for one in family.larger)
    pictures = {'image': batch['image']}
    z = jax.ShapeDtypeStruct((4, *family.latents.shape), jnp.float32)
    if family.encode is not None:
        z = jax.eval_shape(family.encode, state, frozen, pictures, key)
    if family.decode is not None:
        conditional = family.encode is None and family.conditions
        decoded = jax.eval_shape(
            family.decode, state, frozen, jax.eval_shape(sample.to_inside, given) if conditional else {}, z, key
        )
        assert decoded.shape[1:] == batch['image'].shape[1:]


def wide(config):
    """The config at half as many columns again as rows, or twice as many where only that can be halved so often."""
    rows = config.data.size
    columns = rows + (rows if config.family == 'inpainting' else max(rows // 2, 1))
    return configs.make(**configs.deep_update(config.to_dict(), {'data': {'size': (rows, columns)}}))


def wide_stage(folder: str, mesh, dtype: str = ''):
    """The stage of that name at such a size, as shapes."""
    assembled = assembly.assemble(wide(tiny_stage(folder)), mesh, wide_stage)
    return assembled.family, assembled.abstract.replace(params=None, opt=None), assembled.frozen


# What a family makes alone, in the line that refuses the others.
SQUARE = {'stylegan2': 'StyleGAN2 makes square images: set config.data.size to one number', 'js_generator': 'one pixel'}


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=() if name in ('vae_digits', 'dit_digits', 'gan_digits') else pytest.mark.slow)
        for name in sorted({*DISTINCT.values(), 'vae_digits'})
    ],
)
def test_images_that_are_not_square(name):
    """Every family trains on them, samples and is measured, or says in one line that it does not."""
    config = tiny(name)
    if config.family in SQUARE:
        with pytest.raises(UserError, match=SQUARE[config.family]) as caught:
            assembly.assemble(wide(config), stage=wide_stage)
        assert '\n' not in str(caught.value)
        return
    config = wide(config)
    assembled = with_tokenizers(assembly.assemble(config, stage=wide_stage))
    assert assembled.spec.features['image'].shape[:2] == config.data.size
    check_traces(config, assembled)


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=() if name in IN_QUICK_PART.values() else pytest.mark.slow)
        for name in sorted(DISTINCT.values())
    ],
)
def test_updates_sample_and_evaluate(name, tmp_path):
    """And a checkpoint holds all that the next update reads."""
    config = tiny(name)
    assembled = assemble(config)
    family, frozen, batch = assembled.family, assembled.frozen, first_batch(config)
    wanted = {}
    if family.sample is not None:
        conditional = conditions.first(assembled, config, 4, {})
        wanted = sample.to_inside({k: jnp.asarray(v) for k, v in conditional.items()})
    subject = testing.Subject(family, frozen, batch, wanted)
    start = testing.check_init(subject, assembled.abstract)
    state, update = testing.check_update(subject, start), jax.jit(family.update)
    # A checkpoint holds all that an update reads: from it the next one is the same, bit for bit.
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    checkpoints.save(state, {})
    checkpoints.close()
    restored, _ = Checkpoints(str(tmp_path)).restore(assembled.abstract, assembled.mesh)
    again, once = (update(s, frozen, batch, jax.random.key(2)) for s in (jax.device_get(restored), state))
    assert_same(again, once)
    # On a fixed batch, with the same draws at the start and at the end; a base without training puts out next to
    # nothing, whatever a ControlNet adds to its maps.
    if (figure := FALLS[config.family]) and 'base' not in config.stages:
        learnt, seen = state, []
        for key in jnp.tile(jax.random.split(jax.random.key(1), 40), 4):
            learnt, logs = update(learnt, frozen, batch, key)
            seen.append(logs[figure])
        before, *_, after = np.reshape(seen, (4, 40)).mean(1)
        assert after < 0.9 * before, f'{figure} does not fall'

    if family.sample is not None:
        testing.check_sample(subject, state, fewer=False)
    testing.check_evaluate(subject, state)
    testing.check_latents(subject, state)


@pytest.mark.slow
@pytest.mark.parametrize('name', WITH_THE_LOOP)
def test_stopped_and_resumed_is_the_same(name, tmp_path):
    whole, parts = str(tmp_path / 'whole'), str(tmp_path / 'parts')
    config = tiny(name, train={'steps': 4, 'save_every': 4, 'log_every': 2})
    schedule = {'schedule': 'constant'}  # the others depend on the number of steps
    config = configs.make(**configs.deep_update(config.to_dict(), {'optim': schedule}))
    train_stages(config, tmp_path)
    short = configs.make(**configs.deep_update(config.to_dict(), {'train': {'steps': 1}}))
    train(config, whole)
    train(short, parts)
    assert os.listdir(os.path.join(parts, 'checkpoints')) == ['1']
    train(config, parts)
    assert_same(saved_state(whole, 4), saved_state(parts, 4))
    assert metrics(whole) == metrics(parts)
    assert [line['step'] for line in metrics(whole)] == [2, 4]
    if config.stages:  # what was learned on a stage fits no other weights of it
        a = assembly.assemble(config)
        _, about = Checkpoints(parts).restore(a.abstract, a.mesh)
        assert about['stages'] == a.stage_digests and about['data']
        with pytest.raises(UserError, match=r'config\.stages\.first: the weights in'):
            assembly.check_stages({'stages': {'first': 'others'}}, a, parts)
    if name == 'dcgan_digits':  # its figures are the critic's, whose weights sampling does not load
        loaded = run.load(parts)
        assert np.isfinite(loaded.evaluate()['discriminator']['value'])
        earlier = dataclasses.replace(loaded, state=loaded.state.replace(step=jnp.int32(3)))
        with pytest.raises(UserError, match='gone on to step 4: load it again'):
            earlier.evaluate()
        with pytest.raises(UserError, match='leave --weights out'):  # its batch statistics are of the averaged ones
            run.load(parts, weights='params')


@pytest.mark.slow
def test_half_precision(distinct):
    """Weights stay in full. What is computed is traced for all and compared for some: CPUs compile it slowly."""
    config = tiny(distinct, train={'dtype': 'bfloat16', 'remat': True})
    assembled = assemble(config)
    family, frozen, state = assembled.family, assembled.frozen, assembled.abstract
    key, shapes = jax.eval_shape(lambda: jax.random.key(1)), jax.eval_shape(lambda: first_batch(config))
    jaxpr, (after, _) = jax.make_jaxpr(family.update, return_shape=True)(state, frozen, shapes, key)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((after.params, after.ema)))
    assert not sharding.overlapping_writes(jaxpr.jaxpr), 'GPUs would add up in an order that changes from run to run'
    text = str(jaxpr)
    assert 'bf16' in text, 'nothing is computed in bfloat16'
    if distinct not in COMPARED:
        return
    batch = first_batch(config)
    start = jax.jit(family.init)(jax.random.key(0), batch, frozen)
    _, logs = jax.jit(family.update)(start, frozen, batch, jax.random.key(1))
    full = assemble(tiny(distinct)).family
    _, exact = jax.jit(full.update)(start, frozen, batch, jax.random.key(1))
    for figure in exact:
        np.testing.assert_allclose(logs[figure], exact[figure], rtol=0.25, atol=0.1, err_msg=figure)


def test_families_import_no_family():
    import ast
    import glob

    from support import ROOT

    for file in glob.glob(os.path.join(ROOT, 'jaxgen', '**', '*.py'), recursive=True):
        with open(file, encoding='utf-8') as source:
            tree = ast.parse(source.read())
        modules = [
            *(a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names),
            *(
                f'{node.module}.{a.name}'
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and node.module
                for a in node.names
            ),
        ]
        assert not [m for m in modules if m.startswith('jaxgen.families')], file
        if os.sep + 'checkpoint.py' not in file:
            assert not [m for m in modules if m.startswith('orbax')], f'{file}: checkpoint.py alone imports orbax'


@pytest.mark.slow
@pytest.mark.parametrize('part', range(4))
def test_devices_do_not_matter(part):
    """A family on 8 devices, weights whole or cut over 2, 4 and 8, agrees with one device to rounding."""
    names = sorted(n for family, n in FAMILIES.items() if family not in MEANS_ALONE)[part::4]
    code = 'import sys; sys.path.insert(0, "tests"); from contract_test import on_devices; on_devices(sys.argv[1:])'
    done = python_on(8, code, *names, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


def on_devices(names: list[str], parts_of_weights: tuple[int, ...] = (1, 2, 4, 8)) -> None:
    """Runs in a process of 8 devices; see test_devices_do_not_matter."""
    from jaxgen.train import make_call

    assert jax.device_count() == 8
    sharding.SMALLEST_SHARDED = 64  # so that tiny weights are cut too
    for name in names:
        results = []
        for place, fsdp in ((jax.devices()[:1], 1), *((None, parts) for parts in parts_of_weights)):
            batch = math.lcm(8, tiny(name).data.batch)
            config = tiny(name, mesh={'fsdp': fsdp}, data={'batch': batch})
            # SGD: Adam's first steps are the sign of the gradient, which rounding can turn.
            sgd = {'name': 'sgd', 'networks': {}, 'no_decay': (), 'weight_decay_schedule': 'constant'}
            changed = {'optim': {**sgd, 'weight_decay': 0.0, 'weight_decay_end': 0.0}}
            config = configs.make(**configs.deep_update(config.to_dict(), changed))
            assembled = assemble(config, sharding.make_mesh(fsdp, place))
            places = sharding.over_weights(assembled.mesh, assembled.abstract)
            if fsdp > 1 and not any('fsdp' in str(s.spec) for s in jax.tree.leaves(places)):
                assert fsdp == 8, f'{name}: nothing is cut over {fsdp}'  # no tiny weights of some can be cut so often
                continue
            batch = with_tokens(config, next(iter(data.batches(config.data, 'train', seed=0))))
            placed = sharding.put_batch(assembled.mesh, batch)
            frozen = jax.device_put(assembled.frozen, sharding.over_weights(assembled.mesh, assembled.frozen))
            if not results or name in BY_THE_BATCH:
                init = jax.jit(lambda *args, a=assembled: assembly.init_state(a.family, *args), out_shardings=places)
                start = jax.device_get(init(jax.random.key(0), placed, frozen))
            state = jax.device_put(start, places)
            call = make_call(assembled, places, 1, 0)
            for _ in range(2):
                state, logs = call(state, frozen, jax.tree.map(lambda x: x[None], placed))
                assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, places))
            results.append(jax.device_get((state, logs)))
        for result in results[1:]:
            for a, b in zip(*map(jax.tree.leaves, (results[0], result)), strict=True):
                # Rounding is of the size of an array's largest numbers.
                np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5 * max(1, np.abs(b).max()), err_msg=name)


@pytest.mark.slow
def test_main_trains_samples_and_evaluates(tmp_path):
    """The command from end to end, one family; the others differ by nothing that main sees."""
    workdir = str(tmp_path / 'run')
    done = main(f'--config={path("vae_digits")}', f'--workdir={workdir}')
    assert done.returncode == 0, done.stderr
    done = main('--mode=sample', f'--workdir={workdir}', '--n=3', '--seed=5')
    assert done.returncode == 0, done.stderr
    (folder,) = [
        os.path.join(workdir, 'samples', f) for f in os.listdir(os.path.join(workdir, 'samples')) if 'seed5' in f
    ]
    assert sorted(os.listdir(folder)) == ['grid.png', 'images', 'samples.json', 'samples.npz']
    assert sorted(os.listdir(os.path.join(folder, 'images'))) == ['00000.png', '00001.png', '00002.png']
    images = np.load(os.path.join(folder, 'samples.npz'))['images']
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8
    import jaxgen

    np.testing.assert_array_equal(jaxgen.load(workdir).sample(n=2, seed=5), images[:2])
    done = main('--mode=evaluate', f'--workdir={workdir}')
    assert done.returncode == 0, done.stderr
    with open(os.path.join(workdir, 'evaluation.json'), encoding='utf-8') as file:
        record = json.load(file)
    assert record['weights'] == 'ema' and all(
        np.isfinite(m['value']) and m['n'] > 0 for m in record['metrics'].values()
    )


@pytest.mark.slow
def test_weights_of_any_width_after_the_run(tmp_path, capfd):
    """--weights=0.07 of a run that kept averages; one that kept none says how."""
    from support import mistake

    def trained(name, **optim):
        config = tiny(name, optim=optim, train={'steps': 4, 'save_every': 2, 'keep': 1, 'keep_every': 2})
        train(config, str(tmp_path / name))
        return str(tmp_path / name)

    kept = trained('flow_digits', ema_std=(0.05, 0.1))
    drawn = {w: run.load(kept, weights=w).sample(n=2).astype(int) for w in ('ema', '0.07')}
    tracked = saved_state(kept).ema['denoiser@0.1']
    made = run.load(kept, weights='0.1').state.ema['denoiser']
    for a, b in zip(*map(jax.tree.leaves, (tracked, made)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.abs(drawn['0.07'] - drawn['ema']).max() > 0
    film = run.load(kept).film(2, 3)
    assert film.shape == (2, 2, 3, 8, 8, 1) and film.dtype == np.uint8
    end = film[:, 0, -1].astype(float)
    assert np.corrcoef(end.ravel(), drawn['ema'].ravel())[0, 1] > 0.95  # but for the scale of grey
    plain = trained('vae_digits')
    capfd.readouterr()
    assert 'ema_std' in mistake(capfd, '--mode=sample', f'--workdir={plain}', '--weights=0.07')
