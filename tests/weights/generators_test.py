"""Images of imported GANs, autoregressive and score models against the source's own code, from the same noise.

The source's results are stored, see tests/reference_weights.py; discriminators, and exports by value, are held too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_weights as weights
import safetensors.numpy
from support import run_main

import jaxgen
from jaxgen import config as configs
from jaxgen.diffusion import samplers
from jaxgen.errors import UserError
from jaxgen.families import ddgan, diffusion, stylegan2, transformer, var
from jaxgen.losses import perceptual
from jaxgen.networks import transformer as networks_transformer
from jaxgen.weights import exporting, importing, sources
from jaxgen.weights.files import Tensor, Weights
from jaxgen.weights.importing import import_weights

slow = pytest.mark.slow  # compiles networks
KEY = jax.random.key(0)


def config_of(name: str, fields: list[str]):
    return configs.override(configs.load(name), [f'--config.{field}' for field in ('data.source=shapes', *fields)])


def imported(folder, tensors: dict[str, np.ndarray], config, name: str = 'run', names: str = '', **more):
    """The run of an import of these tensors, as a person's file."""
    file = str(folder / f'{name}.safetensors')
    safetensors.numpy.save_file(tensors, file)
    import_weights(config, file, str(folder / name), names, **more)
    return jaxgen.load(str(folder / name))


def exported(folder, run, names: str = '') -> dict[str, np.ndarray]:
    """The tensors of an export."""
    exporting.export_weights(run, str(folder / 'out.safetensors'), names)
    return safetensors.numpy.load_file(folder / 'out.safetensors')


def with_params(run):
    """The run's state with the networks that are not averaged."""
    return run.state.replace(params=run.saved_params())


def thin(x, rows: int = 8) -> np.ndarray:
    """The pixels that the stored results have."""
    step = x.shape[1] // rows
    return np.asarray(x)[:2, step // 2 :: step, ::step]


def assert_near(ours, theirs: np.ndarray, tolerance: float = 1e-3) -> None:
    """Within a thousandth of the standard deviation of what the source drew."""
    assert theirs.std() > 0
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * theirs.std())


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float = 0.0) -> None:
    """The same tensors by value, those of `b` with axes of length 1 where they like."""
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name].reshape(-1), b[name].reshape(-1), rtol=0, atol=tolerance, err_msg=name)


def labelled(labels) -> dict:
    return {'label': jnp.asarray(labels), 'index': jnp.arange(len(labels))}


# --- StyleGAN2

STYLEGAN2 = {
    'stylegan2': ['model.mapping_layers=8'],
    'stylegan2_classes': [
        "data.features=('image','label')",
        'model.conditional=True',
        'model.mapping_layers=2',
        'model.discriminator_mapping_layers=8',
        'model.generator_architecture=resnet',
        'model.discriminator_architecture=orig',
        'model.clamp=1.0',
    ],
    'stylegan2_skip': [
        'model.mapping_layers=3',
        'model.generator_architecture=orig',
        'model.discriminator_architecture=skip',
    ],
}


def stylegan2_config(name: str):
    sizes = ['data.size=16', 'model.latent=16', 'model.channel_base=128', 'model.channel_max=24', 'data.batch=8']
    return config_of('stylegan2_ffhq256', [*sizes, *STYLEGAN2[name]])


def noise_of_layers(tensors: dict[str, np.ndarray]) -> list[jax.Array]:
    """The source's constant noise, [1, s, s, 1] for each layer."""
    layers = [(4, 1), (8, 0), (8, 1), (16, 0), (16, 1)]
    return [jnp.asarray(tensors[f'G_ema.synthesis.b{s}.conv{i}.noise_const'])[None, ..., None] for s, i in layers]


@slow
@pytest.mark.parametrize('name', STYLEGAN2)
def test_stylegan2(tmp_path, monkeypatch, name):
    """Constant noise and truncation by `sample`, random noise by the networks; the discriminator; and an export."""
    reference = weights.load(name)
    tensors = reference.state_dict()
    run = imported(tmp_path, tensors, stylegan2_config(name))
    networks, state = run.assembled.family.decode.args[0], with_params(run)
    z, noise = jnp.asarray(weights.noise('z', (4, 16))), noise_of_layers(tensors)
    batch = labelled(reference.about['labels'])

    monkeypatch.setattr(stylegan2, 'normal', lambda keys, shape: z)
    monkeypatch.setattr(stylegan2.Networks, 'noise', lambda self, rng, n: noise)
    for truncation, what in ((0.7, 'constant'), (1.0, 'untruncated')):
        ours = stylegan2.sample(networks, state, {}, batch, KEY, {'truncation': truncation})
        assert_near(thin(ours), np.clip(reference.arrays[what], -1, 1))

    given = [jnp.asarray(weights.noise(f'layer {i}', (4, *x.shape[1:]))) for i, x in enumerate(noise)]
    w, mean = networks.map(state.ema['generator'], z, networks.label(batch)), state.extra['w']
    images = networks.synthesise(state.ema['generator'], mean + 0.5 * (w - mean), given)
    assert_near(thin(images), reference.arrays['random'])

    images = {'image': jnp.tanh(weights.noise('images', (4, 16, 16, 3)))}
    values = run.assembled.family.evaluate(state, {}, batch | images, KEY)['discriminator']
    assert_near(values, reference.arrays['discriminator'], 1e-2)  # they differ by little from one image to another
    kept = {n.removeprefix('G_ema.'): x for n, x in tensors.items() if not n.endswith('noise_const')}
    assert_same(exported(tmp_path, run), kept)


# --- BigGAN

BIGGAN = {
    'biggan_32': ['data.size=32', 'model.network.width=4', 'model.network.multipliers=(4,4,4,4)',
                  'model.network.halvings=2', 'model.network.attention=()', 'model.latent=80'],
    'biggan_128': ['model.network.width=8'],
}  # fmt: skip


def biggan_config(name: str):
    return config_of(
        'biggan_imagenet128', ['model.network.embedding=8', 'data.batch=16', 'train.dtype=float32', *BIGGAN[name]]
    )


@slow
@pytest.mark.parametrize(('name', 'apart'), [('biggan_32', False), ('biggan_128', True)])
def test_biggan(tmp_path, name, apart):
    """Truncated latents by `decode`; a discriminator in the file or in one of its own."""
    reference = weights.load(name)
    tensors, more = reference.state_dict(), {}
    if apart:
        critic = reference.state_dict('D.')
        safetensors.numpy.save_file(critic, tmp_path / 'D.safetensors')
        more, tensors = {'discriminator': str(tmp_path / 'D.safetensors')}, reference.state_dict('G_ema.')
    run = imported(tmp_path, tensors, biggan_config(name), **more)
    family, state, size = run.assembled.family, with_params(run), run.image[0]
    z = np.clip(weights.noise('z', (2, run.config.model.latent)), -0.8, 0.8)
    batch = labelled(reference.about['labels'])
    assert_near(thin(family.decode(state, {}, batch, jnp.asarray(z), KEY)), reference.arrays['images'])
    images = {'image': jnp.tanh(weights.noise('images', (2, size, size, 3)))}
    values = family.evaluate(state, {}, batch | images, KEY)['discriminator']
    assert_near(values, reference.arrays['discriminator'])
    # The generator that is trained on starts with the average's vectors of spectral normalisation.
    average, own = (state.extra[which]['vectors'] for which in ('average', 'generator'))
    jax.tree.map(np.testing.assert_array_equal, average, own)

    ours = exported(tmp_path, run)
    theirs = {n.removeprefix('G_ema.'): x for n, x in reference.state_dict().items() if '.sv' not in n}
    right = ours.pop('D.embed.v0')
    u = theirs.pop('D.embed.u0')[0] @ theirs['D.embed.weight']
    np.testing.assert_allclose(right, u / np.linalg.norm(u), rtol=1e-5)
    assert_same(ours, theirs)


# --- denoising diffusion GANs


@slow
def test_ddgan(tmp_path, monkeypatch):
    reference = weights.load('ddgan')
    fields = [f'generator.{name}' for name in ('channels=32', 'multipliers=(1,2)', 'blocks=1', 'attention=(8,)')]
    fields += ['generator.latent=20', 'generator.mapping_layers=2', 'generator.style=32']
    fields += ['discriminator.channels=16', 'discriminator.embedding=16']
    config = config_of('ddgan_cifar10', ['data.size=16', *(f'model.{field}' for field in fields)])
    run = imported(tmp_path, reference.state_dict(), config)
    state, model = with_params(run), run.assembled.family.sample.args[0]
    x, start = (jnp.asarray(weights.noise(name, (4, 16, 16, 3))) for name in ('x_s', 'start'))
    step = jnp.array([0, 3, 1, 2])
    values = model.discriminator.apply({'params': state.params['discriminator']}, x, step, start)
    assert_near(values, reference.arrays['discriminator'])

    z = jnp.stack([weights.noise(f'z {3 - i}', (2, 20)) for i in range(4)])  # by number of the step: the last is first
    noise = jnp.stack([weights.noise(f'step {3 - i}', (2, 16, 16, 3)) for i in range(4)])

    def denoiser(model, state, keys):
        weights = {'params': state.ema['generator']}
        return lambda x, i: model.generator.apply(weights, x, jnp.full(2, i, jnp.int32), z[i], train=False)

    monkeypatch.setattr(ddgan, 'denoiser', denoiser)
    monkeypatch.setattr(ddgan, 'normal', lambda keys, shape: start[:2])
    monkeypatch.setattr(samplers, 'noise_of', lambda keys, number, x: noise[number])
    images = ddgan.sample(model, state, {}, {'index': jnp.arange(2)}, KEY)
    assert_near(thin(images), reference.arrays['images'])
    theirs = {n.replace('netG_dict.module.', '').replace('netD_dict.module.', 'netD_dict.'): x
              for n, x in reference.state_dict().items()}  # fmt: skip
    assert_same(exported(tmp_path, run), theirs, 1e-6)  # 1 is taken from gains, and added again


# --- score_sde

SCORE = {
    'ncsnpp': ('ncsnpp_cifar10', []),
    'ncsnpp_skip': ('ncsnpp_cifar10', ['network.pyramid=skip']),
    'ddpmpp': ('ddpmpp_cifar10', []),
    'score_ddpm': ('ddpmpp_cifar10', ['network.resampling=conv', 'network.group_size=0']),
}


def score_config(name: str):
    base, fields = SCORE[name]
    sizes = ['network.channels=32', 'network.multipliers=(1,2)', 'network.blocks=1', 'network.attention=(8,)']
    sizes += (
        ['sampler.steps=10']
        if base == 'ncsnpp_cifar10'
        else ['sampler.name=heun', 'sampler.steps=400', 'sampler.spacing=karras']
    )
    return config_of(base, ['data.size=16', *(f'model.{field}' for field in (*sizes, *fields))])


@slow
@pytest.mark.parametrize('name', SCORE)
def test_score_sde(tmp_path, monkeypatch, name):
    """The score at two times, of the VE SDE by images in [0, 1]. Then of the VE SDE ten steps of predictor and
    corrector from the same noise, each as long as the root of its size, which is the length that a corrector here takes
    for granted; of the VP SDE the ODE's solution."""
    reference = weights.load(name)
    config = score_config(name)
    run = imported(tmp_path, reference.state_dict(), config)
    family, state = run.assembled.family, run.state
    model = family.evaluate.args[0]
    process, denoise = model.formulation.process, diffusion.denoiser_of(model, state, {}, {}, diffusion.OFF, False)
    x, t = weights.noise('start', (2, 16, 16, 3)), np.array(reference.about['t'])
    at, vp = process.at(t), config.model.process.name == 'vp'
    for i in range(2):
        one = jnp.asarray(x[i : i + 1]) if vp else 2 * jnp.asarray(x[i : i + 1]) - 1
        x_0 = samplers.estimate(denoise, one, jnp.float32(at.t[i]))[0]
        score = (1 if vp else 2) * (at.alpha[i] * x_0 - one) / at.sigma[i] ** 2
        # What the network adds to x is small beside x where sigma is small: rounding.
        assert_near(thin(score), reference.arrays['score'][i : i + 1], 2e-3)

    start = weights.noise('start 0', (1, 16, 16, 3))
    noise = np.stack([weights.noise(f'noise {19 - i}', (1, 16, 16, 3)) for i in range(20)])
    noise *= np.sqrt(noise[0].size) / np.sqrt(np.square(noise).sum((1, 2, 3, 4), keepdims=True))
    start = start if vp else start - 1 / 100  # around 0 in [0, 1], which is -1 here
    monkeypatch.setattr(diffusion, 'normal', lambda keys, shape: jnp.asarray(start))
    monkeypatch.setattr(samplers, 'noise_of', lambda keys, number, x: jnp.asarray(noise)[number])
    images = diffusion.run_sampler(model, state, {}, {'index': jnp.arange(1)}, KEY, family.settings())
    assert_near(thin(images), reference.arrays['images'])
    assert_same(exported(tmp_path, run), reference.state_dict())


# --- VQGAN and GPT


def draws(monkeypatch, module, key: str) -> None:
    """Draws of `module` are the largest of logits plus the noise 'KEY 0', 'KEY 1', ..., by the number of the call."""
    count = iter(range(10**6))

    def categorical(keys, logits):
        noise = weights.gumbel(f'{key} {next(count)}', (np.prod(logits.shape[:-1]), logits.shape[-1]))
        return (logits + noise.reshape(logits.shape)).argmax(-1).astype(jnp.int32)

    monkeypatch.setattr(module, 'categorical', categorical)


def vqgan_config():
    sizes = ['channels=32', 'multipliers=(1,2)', 'blocks=1', 'attention=(8,)', 'latent=8', 'vocabulary=32']
    sizes += ['discriminator_layers=1', 'discriminator_channels=8', 'perceptual=0.0', 'lpips=()']
    return config_of('vqgan_imagenet256', ['data.size=16', *(f'model.{field}' for field in sizes)])


def gpt_config(stage: str, *fields: str):
    sizes = ['train.dtype=float32', 'model.channels=32', 'model.blocks=2', 'model.heads=4', 'model.top_k=0']
    more = ['data.size=16', "data.features=('image','label')", 'data.crop=center', f'stages.first={stage}']
    return config_of('transformer_imagenet256', [*more, *sizes, *fields])


@slow
def test_vqgan_and_gpt(tmp_path):
    """Greedy draws as a person samples them, uniform ones and truncated ones by the same noise."""
    reference = weights.load('vqgan_gpt')
    first = imported(tmp_path, {f'state_dict.{n}': x for n, x in reference.state_dict('first.').items()},
                     vqgan_config(), 'first')  # fmt: skip
    image = {'image': jnp.tanh(weights.noise('images', (2, 16, 16, 3)))}
    state = with_params(first)
    codes = first.assembled.family.encode(state, {}, image, KEY)[0]
    np.testing.assert_array_equal(codes, reference.arrays['codes'])
    values = first.assembled.family.evaluate(state, {}, image, KEY)['discriminator_real']
    assert_near(values, reference.arrays['discriminator'].mean((1, 2)), 1e-2)
    theirs = reference.state_dict('first.')
    assert_same(exported(tmp_path, first, 'compvis'), theirs)

    gpt = reference.state_dict('gpt.')
    run = imported(tmp_path, gpt, gpt_config(str(tmp_path / 'first')), 'gpt')
    batch = labelled(reference.about['labels'])
    greedy = run.with_sampling(temperature=0.0).assembled.family
    frozen = run.assembled.frozen
    assert_near(thin(greedy.sample(run.state, frozen, batch, KEY)),
                np.clip(reference.arrays['greedy_images'], -1, 1))  # fmt: skip

    net, start = network_of(run), transformer.start_token(batch, 2, True)
    for name, temperature, top_k in (('uniform', 1.0, 0), ('top_k', 0.8, 5)):
        noise = jnp.stack([weights.gumbel(f'{name} {i}', (2, 32)) for i in range(64)])

        def draw(keys, logits, i, noise=noise, temperature=temperature, top_k=top_k):
            return (networks_transformer.filtered(logits, temperature, top_k) + noise[i]).argmax(-1).astype(jnp.int32)

        keys = jax.random.split(KEY, 2)
        codes = transformer.sample_codes(net, run.state.ema['transformer'], start, keys, draw)
        np.testing.assert_array_equal(codes, reference.arrays[f'{name}_codes'])
        stage = run.assembled.context.stages['first']
        images = stage.decode(*frozen['first'], batch, networks_transformer.unflatten(codes, ((8, 8),)), KEY)
        assert_near(thin(images), np.clip(reference.arrays[f'{name}_images'], -1, 1))


def network_of(run):
    """The transformer of a run."""
    model = run.config.model
    return networks_transformer.CausalTransformer(
        vocabulary=32, length=64, channels=model.channels, blocks=model.blocks, heads=model.heads
    )


# --- VAR


def var_stage_config():
    sizes = ['channels=32', 'latent=8', 'vocabulary=32', 'scales=(1,2,3,4)', 'attention=(4,)', 'perceptual=0.0']
    return config_of('var_vqvae_imagenet256', ['data.size=64', *(f'model.{f}' for f in (*sizes, 'lpips=()'))])


def var_config(name: str, stage: str):
    sizes = ['channels=64', 'heads=4', f'blocks={3 if name == "var" else 1}', 'guidance=1.5', 'top_k=0', 'top_p=1.0']
    sizes += ['shared=True', 'unit_queries=False'] if name == 'var_shared' else []
    decay = ["optim.no_decay=('bias','embedding')"]
    more = ['data.size=64', f'stages.first={stage}', 'train.dtype=float32']
    return config_of('var_imagenet256', [*more, *decay, *(f'model.{f}' for f in sizes)])


@slow
@pytest.mark.parametrize('name', ['var', 'var_shared'])
def test_var(tmp_path, monkeypatch, name):
    reference = weights.load(name)
    imported(tmp_path, reference.state_dict('first.'), var_stage_config(), 'first')
    tensors = reference.state_dict('prior.')
    run = imported(tmp_path, tensors, var_config(name, str(tmp_path / 'first')), 'prior')
    batch, frozen = labelled(reference.about['labels']), run.assembled.frozen
    for what, fields in {
        'greedy': dict(temperature=0.0, guidance=1.5),
        'guided': dict(guidance=2.0),
        'truncated': dict(guidance=1.0, top_k=20, top_p=0.9),
    }.items():
        draws(monkeypatch, var, what)
        images = run.with_sampling(**fields).assembled.family.sample(run.state, frozen, batch, KEY)
        assert_near(thin(images, 16), np.clip(reference.arrays[f'{what}_images'], -1, 1))
    unused = ('lvl_1L', 'attn_bias_for_masking', 'zero_k_bias')
    kept = {name: x for name, x in tensors.items() if not name.endswith(unused)}
    assert_same(exported(tmp_path, run), kept)


# --- LPIPS


@slow
def test_lpips(tmp_path):
    """The distance of the pip package, by one file of its state dict. Torchvision's names are those of VGG's layers."""
    reference = weights.load('lpips')
    safetensors.numpy.save_file(reference.state_dict(), tmp_path / 'lpips.safetensors')
    loaded = perceptual.load((str(tmp_path / 'lpips.safetensors'),), (32, 32, 3))
    x, y = (jnp.tanh(weights.noise(name, (2, 32, 32, 3))) for name in ('x', 'y'))
    np.testing.assert_allclose(perceptual.lpips(loaded, x, y), reference.arrays['distance'], rtol=1e-4)


# --- weights of another size, architecture or number of classes


def zeros(shapes: dict[str, list[int]]) -> Weights:
    """Weights of these shapes that take no memory."""
    return Weights('FILE', {
        name: Tensor(tuple(shape), np.dtype(np.float32), lambda shape=shape: np.broadcast_to(np.float32(0), shape))
        for name, shape in shapes.items()
    })  # fmt: skip


def below(shapes: dict[str, list[int]], prefix: str) -> dict[str, list[int]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


FITTING = {
    **dict.fromkeys(STYLEGAN2, ('stylegan2', 'G_ema.', stylegan2_config)),
    'biggan_32': ('biggan', 'G_ema.', biggan_config),
    'biggan_128': ('biggan', 'G_ema.', biggan_config), 'vqgan_gpt': ('compvis', 'first.', lambda name: vqgan_config()),
    'var': ('var', 'first.', lambda name: var_stage_config()),
}  # fmt: skip


@pytest.mark.parametrize('name', FITTING)
@pytest.mark.parametrize('discriminator', [False, True])
def test_no_field_is_wrong_of_weights_that_fit(name, discriminator):
    source, prefix, make = FITTING[name]
    prefix = {'G_ema.': 'D.', 'first.': 'first.loss.discriminator.'}[prefix] if discriminator else prefix
    config, file = make(name), zeros(below(weights.load(name).shapes, prefix))
    source = sources.for_config(config, source)[0]
    fit = sources.Fit(source, [], file, 1.0)
    importing.check_fields(config, fit, discriminator)
    assert discriminator or source.fields(config, file)


WRONG = [
    ('stylegan2', 'G_ema.', 'data.size=32', 'data.size = 32 here: set --config.data.size=16'),
    ('stylegan2', 'G_ema.', 'model.generator_architecture=orig', 'set --config.model.generator_architecture=skip'),
    ('stylegan2_skip', 'G_ema.', 'model.generator_architecture=skip', 'generator_architecture=orig'),
    ('stylegan2_classes', 'G_ema.', 'model.generator_architecture=skip', 'generator_architecture=resnet'),
    ('stylegan2', 'G_ema.', 'model.mapping_layers=2', 'set --config.model.mapping_layers=8'),
    ('stylegan2', 'G_ema.', 'model.channel_max=16', 'set --config.model.channel_max=24'),
    ('stylegan2_classes', 'G_ema.', 'model.conditional=False', 'set --config.model.conditional=True'),
    ('stylegan2', 'D.', 'model.discriminator_architecture=orig', 'discriminator_architecture=resnet'),
    ('stylegan2_skip', 'D.', 'model.discriminator_architecture=resnet', 'discriminator_architecture=skip'),
    ('stylegan2_classes', 'D.', 'model.discriminator_architecture=skip', 'discriminator_architecture=orig'),
    ('stylegan2_classes', 'D.', 'model.discriminator_mapping_layers=0', 'discriminator_mapping_layers=8'),
    ('biggan_32', 'G_ema.', 'data.size=64', 'set --config.data.size=32'),
    ('biggan_128', 'G_ema.', 'model.network.attention=(32,)', r'set --config.model.network.attention=\(64,\)'),
    ('biggan_128', 'G_ema.', 'model.network.width=6', 'set --config.model.network.width=8'),
    ('vqgan_gpt', 'first.', 'model.attention=()', r'set --config.model.attention=\(8,\)'),
    ('vqgan_gpt', 'first.', 'model.vocabulary=64', 'set --config.model.vocabulary=32'),
    ('vqgan_gpt', 'first.', 'model.latent_kernel=3', 'set --config.model.latent_kernel=1'),
    ('vqgan_gpt', 'first.loss.discriminator.', 'model.discriminator_layers=3', 'model.discriminator_layers=1'),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'prefix', 'field', 'line'), WRONG)
def test_a_wrong_field_is_named_with_its_value(name, prefix, field, line):
    source, _, make = FITTING[name]
    config = configs.override(make(name), [f'--config.{field}'])
    discriminator = 'D' in prefix or 'discriminator' in prefix
    fit = sources.Fit(sources.for_config(config, source)[0], [], zeros(below(weights.load(name).shapes, prefix)), 1.0)
    with pytest.raises(UserError, match=line) as error:
        importing.check_fields(config, fit, discriminator)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(('field', 'line'), [
    ('blocks=16', 'set --config.model.blocks=3'), ('shared=True', 'set --config.model.shared=False'),
    ('unit_queries=False', 'set --config.model.unit_queries=True'), ('heads=8', 'set --config.model.heads=4'),
])  # fmt: skip
def test_var_of_another_depth(field, line):
    config = configs.override(var_config('var', 'runs/first'), [f'--config.model.{field}'])
    file = zeros(below(weights.load('var').shapes, 'prior.'))
    with pytest.raises(UserError, match=line):
        importing.check_fields(config, sources.Fit(sources.for_config(config, 'var')[0], [], file, 1.0))


def test_another_number_of_classes():
    for name, prefix, make in (
        ('stylegan2_classes', 'G_ema.', stylegan2_config),
        ('biggan_32', 'G_ema.', biggan_config),
    ):
        file = zeros(below(weights.load(name).shapes, prefix))
        fit = sources.Fit(sources.for_config(make(name))[0], [], file, 1.0)
        importing.check_classes(fit, 8)
        with pytest.raises(UserError, match='the weights are of 8 classes, and config'):
            importing.check_classes(fit, 10)


def test_gumbel_vqgan_is_refused():
    file = zeros({'state_dict.quantize.proj.weight': [32, 8, 1, 1], 'state_dict.quantize.embed.weight': [32, 8]})
    source = sources.for_config(vqgan_config(), 'compvis')[0]
    with pytest.raises(UserError, match='a Gumbel VQGAN, whose codes come from a layer quantize'):
        sources.fit(source, vqgan_config(), {}, file)


def test_labels_of_augmentation_have_a_field():
    """EDM's map_augment is neither dropped nor left over without a word."""
    shapes = {'map_augment.weight': [128, 9]}
    config = configs.override(configs.load('edm_cifar10'), ['--config.model.training.augmentation=0.0'])
    source = sources.for_config(config, 'edm')[0]
    with pytest.raises(UserError, match=r'augmentation=0\.12'):
        importing.check_fields(config, sources.Fit(source, [], zeros(shapes), 1.0))
    with pytest.raises(UserError, match=r'augmentation=0\.0'):
        importing.check_fields(configs.load('edm_cifar10'), sources.Fit(source, [], zeros({'x': [1]}), 1.0))


# --- from the command


@slow
def test_evaluated_and_trained_from_an_import(tmp_path, capsys):
    """The published discriminator gives the metrics before the first update, and is what training starts from; without
    one a line says so."""
    reference = weights.load('stylegan2_classes')
    safetensors.numpy.save_file(reference.state_dict(), tmp_path / 'both.safetensors')
    safetensors.numpy.save_file(reference.state_dict('G_ema.'), tmp_path / 'generator.safetensors')
    fields = ['data.source=shapes', 'data.size=16', 'model.latent=16', 'model.channel_base=128', 'model.channel_max=24']
    fields = [f'--config.{field}' for field in (*fields, *STYLEGAN2['stylegan2_classes'])]
    named = ['jaxgen', '--config=stylegan2_ffhq256', *fields]
    both, alone = f'--workdir={tmp_path}/both', f'--workdir={tmp_path}/alone'
    assert run_main([*named, both, '--mode=import', f'--from={tmp_path}/both.safetensors']) == 0
    assert 'training starts it anew' not in capsys.readouterr().err
    assert run_main([*named, alone, '--mode=import', f'--from={tmp_path}/generator.safetensors']) == 0
    assert 'has no discriminator: training starts it anew' in capsys.readouterr().err
    few = ['--config.evaluate.examples=8', '--config.evaluate.batch=8', '--config.evaluate.samples=4']
    assert run_main(['jaxgen', both, '--mode=evaluate', *few]) == 0
    capsys.readouterr()
    assert run_main(['jaxgen', alone, '--mode=evaluate', *few]) == 2
    assert 'import it with --discriminator=FILE, or train on' in capsys.readouterr().err

    assert run_main(['jaxgen', both, '--mode=pack', f'--out={tmp_path}/packed']) == 0
    packed = [f'--workdir={tmp_path}/packed', f'--to={tmp_path}/packed.safetensors']
    assert run_main(['jaxgen', *packed, '--mode=export']) == 0
    names = safetensors.numpy.load_file(tmp_path / 'packed.safetensors')
    assert {'mapping.w_avg', 'D.b4.out.weight'} <= names.keys()

    published = jaxgen.load(str(tmp_path / 'both')).saved_params()['discriminator']
    train = ['--config.data.batch=8', '--config.train.steps=2', '--config.train.samples=1', '--config.optim.lr=1e-6']
    train += ['--config.train.save_every=2', '--config.train.sample_every=0', '--config.train.log_every=1']
    train += ['--config.optim.networks.discriminator.lr=1e-6', '--config.optim.networks.generator.lr=1e-6']
    assert run_main([*named, both, *train]) == 0
    trained = jaxgen.load(str(tmp_path / 'both'))
    assert trained.step == 2
    for now, before in zip(
        jax.tree.leaves(trained.saved_params()['discriminator']), jax.tree.leaves(published), strict=True
    ):
        np.testing.assert_allclose(now, before, rtol=0, atol=1e-5)  # a few steps of at most 1e-6 or so
