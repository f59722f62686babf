"""Editing of a person's images: a plain loop in numpy, diffusers' pipelines around a toy network, and what runs keep of
an image."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assemble, context, first_batch, tiny

from jaxgen import conditions, options, run, train
from jaxgen.contract import Family, Latents
from jaxgen.diffusion import conditioning, editing, latents, levels, processes, samplers
from jaxgen.diffusion.editing import Editing
from jaxgen.diffusion.schedules import Schedule
from jaxgen.errors import UserError
from jaxgen.families import diffusion
from jaxgen.networks import denoisers
from jaxgen.weights import schedulers

LEVELS = Schedule(np.array([0.1, 0.4, 0.9]), np.array([0.99, 0.8, 0.3]), np.array([0.1, 0.6, 0.95]))
RNG = np.random.default_rng(0)
IMAGE, NOISE = RNG.normal(size=(2, 2, 4, 4, 3)).astype(np.float32)
HOLE = np.zeros((1, 4, 4, 1), bool)
HOLE[:, 1:3, :2] = True


def toy(x, t):
    """An estimate of x_0 that mixes neighbours, so that what is known reaches the hole."""
    lib = jnp if isinstance(x, jax.Array) else np
    return lib.tanh(x + 0.5 * lib.roll(x, 1, 1) - 0.3 * lib.roll(x, 1, 2)) * (1 - 0.2 * t)


def level_at(t):
    """The process of LEVELS."""
    i = jnp.argmin(jnp.abs(jnp.asarray(LEVELS.t) - t))
    return Schedule(t, jnp.asarray(LEVELS.alpha)[i], jnp.asarray(LEVELS.sigma)[i])


class Toy:
    at = staticmethod(level_at)


@pytest.mark.parametrize('stated', [False, True])
@pytest.mark.parametrize('name', ['ddim', 'heun'])
def test_what_is_known_stays_at_its_level(name, stated):
    """DDIM and Heun's method as loops that put the known part into x whenever x has come to another level."""
    table = samplers.with_levels(getattr(samplers, name).table, LEVELS, stated)
    keep = editing.keeping(Toy, jnp.asarray(IMAGE), jnp.asarray(NOISE), jnp.asarray(HOLE))

    def denoise(x, t):
        return toy(x, t.t if stated else t)

    found = samplers.run(denoise, jnp.asarray(NOISE), table, None, keep=keep)

    alphas, sigmas = np.append(1, LEVELS.alpha), np.append(0, LEVELS.sigma)

    def known(x, i):
        return np.where(HOLE, x, alphas[i] * IMAGE + sigmas[i] * NOISE)

    x = NOISE.astype(np.float64)
    for i in (3, 2, 1):
        here = toy(x, LEVELS.t[i - 1])
        slope = (x - alphas[i] * here) / sigmas[i]  # of x / alpha by sigma / alpha
        step = sigmas[i - 1] / alphas[i - 1] - sigmas[i] / alphas[i]
        moved = known(alphas[i - 1] * (x / alphas[i] + step * slope), i - 1)
        if name == 'heun' and i > 1:
            there = (moved - alphas[i - 1] * toy(moved, LEVELS.t[i - 2])) / sigmas[i - 1]
            moved = known(alphas[i - 1] * (x / alphas[i] + step * (slope + there) / 2), i - 1)
        x = moved
    np.testing.assert_allclose(found, x, atol=1e-5)
    np.testing.assert_array_equal(found[:, ~HOLE[0, ..., 0]], IMAGE[:, ~HOLE[0, ..., 0]])


@pytest.mark.parametrize(('name', 'stated'), [('ddim', True), ('heun', False)])
def test_two_networks_one_after_the_other(name, stated):
    """Of one network twice it is that network alone, where a step uses no earlier ones; of two it is neither."""
    table = samplers.with_levels(getattr(samplers, name).table, LEVELS, stated)
    keep = editing.keeping(Toy, jnp.asarray(IMAGE), jnp.asarray(NOISE), jnp.asarray(HOLE))

    def denoise(x, t):
        return toy(x, t.t if stated else t)

    first = levels.ended(table, LEVELS.t[1])
    below = Schedule(*(values[:1] for values in LEVELS))
    second = samplers.with_levels(getattr(samplers, name).table, below, stated)
    assert len(first['t']) + len(second['t']) == len(table['t']) - (name == 'heun')  # Euler's step between them
    draw = functools.partial(samplers.run_both, x=jnp.asarray(NOISE), tables=(first, second), keys=(None, None))
    found, passed = draw((denoise, denoise), keep=keep, trajectory=True)
    if name == 'ddim':
        np.testing.assert_allclose(found, samplers.run(denoise, jnp.asarray(NOISE), table, None, keep=keep), atol=1e-6)
    assert passed['x'].shape == (len(first['t']) + len(second['t']), *NOISE.shape)
    known = ~HOLE[0, ..., 0]
    level = LEVELS.alpha[0] * IMAGE + LEVELS.sigma[0] * NOISE
    np.testing.assert_allclose(passed['x'][len(first['t']) - 1][:, known], level[:, known], atol=1e-6)
    other = draw((denoise, lambda x, t: -denoise(x, t)), keep=keep)
    assert np.abs(other - found)[:, HOLE[0, ..., 0]].max() > 0.1


def test_a_refiner_that_there_is_not(no_compile):
    with pytest.raises(UserError, match=r'config\.model\.refiner needs config\.stages\.refiner'):
        assemble(tiny('ddpm_digits', model=dict(refiner=dict(start=0.5))))


def test_masks_at_the_size_of_latents():
    """As torch's interpolation by the nearest value: the first pixel of each block."""
    mask = np.arange(48, dtype=np.float32).reshape(1, 8, 6, 1)
    np.testing.assert_array_equal(editing.at_size(mask, (4, 2, 5)), mask[:, ::2, ::3])
    np.testing.assert_array_equal(editing.at_size(mask, (8, 6, 3)), mask)


# --- diffusers' pipelines, with a toy network and a toy autoencoder

SCHEDULERS = {
    'DDIMScheduler': dict(steps_offset=1, set_alpha_to_one=False, clip_sample=False),
    'PNDMScheduler': dict(skip_prk_steps=True, steps_offset=1),
    'DPMSolverMultistepScheduler': dict(),
    'EulerDiscreteScheduler': dict(),
    'UniPCMultistepScheduler': dict(),
    'HeunDiscreteScheduler': dict(),
}  # fmt: skip
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', num_train_timesteps=1000)


def toy_eps(lib, x, t, axes):
    """The noise that the toy network predicts."""
    return lib.tanh(0.7 * x + 0.3 * lib.roll(x, 1, axes[0]) - 0.2 * lib.roll(x, 1, axes[1])) * (0.5 + t / 2000)


def with_planes(eps, mask, known):
    """The same of a network that reads a mask and what is known."""
    return eps * (1 - 0.4 * mask) + 0.2 * known


def stand_ins(channels):
    """(autoencoder, network) as diffusers' pipelines read them."""
    import torch
    from diffusers.configuration_utils import FrozenDict

    class Network(torch.nn.Module):
        config = FrozenDict(in_channels=channels, sample_size=8, time_cond_proj_dim=None)
        dtype = torch.float32

        def forward(self, x, t, **_):
            eps = toy_eps(torch, x[:, :4], t, (2, 3))
            return (with_planes(eps, x[:, 4:5], x[:, 5:]) if channels == 9 else eps,)

    class Distribution:
        def __init__(self, x):
            self.x = x

        def sample(self, _=None):
            return self.x

        mode = sample

    class Encoded:
        def __init__(self, x):
            self.latent_dist = Distribution(x)

    class Autoencoder(torch.nn.Module):
        config = FrozenDict(block_out_channels=(1, 1), latent_channels=4, scaling_factor=0.5, force_upcast=False)
        dtype = torch.float32

        def encode(self, x):
            small = torch.nn.functional.avg_pool2d(x, 2)
            return Encoded(torch.cat([small, small[:, :1]], 1))

        def decode(self, z, **_):
            return (torch.nn.functional.interpolate(z[:, :3], scale_factor=2),)

    return Autoencoder(), Network()


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')  # torch and numpy, schedulers
@pytest.mark.parametrize('given', ['image', 'mask', 'planes'])
@pytest.mark.parametrize('strength', [1.0, 0.6, 0.35])
@pytest.mark.parametrize('name', SCHEDULERS)
def test_equals_diffusers(name, strength, given, monkeypatch):
    """StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline of 7 steps, from the same image and noise;
    the latter also with a network of nine channels."""
    masked = given != 'image'
    torch, diffusers = pytest.importorskip('torch'), pytest.importorskip('diffusers')
    if strength == 1 and not masked:
        pytest.skip('of strength 1 diffusers begins with the image at the last level')
    vae, network = stand_ins(9 if given == 'planes' else 4)
    scheduler = getattr(diffusers, name)(**BETAS, **SCHEDULERS[name])
    image = np.random.default_rng(1).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    mask = np.zeros((1, 16, 16, 1), np.float32)
    mask[:, 3:12, 4:13] = 1
    eps = np.random.default_rng(2).normal(size=(1, 8, 8, 4)).astype(np.float32)
    kind = 'Inpaint' if masked else 'Img2Img'
    module = f'diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_{kind.lower()}'
    pipeline = getattr(diffusers, f'StableDiffusion{kind}Pipeline')
    monkeypatch.setattr(pipeline, 'register_modules', lambda self, **parts: self.__dict__.update(parts))
    monkeypatch.setattr(pipeline, 'maybe_free_model_hooks', lambda self: None)
    monkeypatch.setattr(pipeline, '_execution_device', torch.device('cpu'))
    pipe = pipeline(vae, None, None, network, scheduler, None, None, requires_safety_checker=False)
    monkeypatch.setattr(f'{module}.randn_tensor', lambda *_, **__: torch.from_numpy(eps.transpose(0, 3, 1, 2)))
    pipe.set_progress_bar_config(disable=True)
    images = torch.from_numpy((image.transpose(0, 3, 1, 2) + 1) / 2)
    fields = dict(image=images, strength=strength, num_inference_steps=7, guidance_scale=1.0, output_type='latent')
    fields |= dict(prompt_embeds=torch.zeros(1, 2, 3))
    if masked:
        fields |= dict(mask_image=torch.from_numpy(mask.transpose(0, 3, 1, 2)), height=16, width=16)
    wanted = pipe(**fields).images.numpy().transpose(0, 2, 3, 1)

    # Ours, of the same scheduler_config.json.
    said = dict(scheduler.config) | {'_class_name': name}
    fields = options.fields(diffusion.build)
    learned = {k: v for k, v in schedulers.process_fields(said).items() if k.startswith('model.process.')}
    own = {k.removeprefix('model.process.'): v for k, v in learned.items()}
    known = options.fields(processes.PROCESSES[own['name']])
    process = processes.make({'name': own['name'], **{k: own.get(k, field.default) for k, field in known.items()}})
    sampler = {**schedulers.sampler_fields(said), 'steps': 7}
    section = options.value_of(fields['sampler'], sampler, 'sampler')

    def make(skip):
        return levels.make(section, process, skip=skip)

    edits = editing.bind(Editing(strength=strength), context((16, 16, 3)), (), make, whole=True)

    def denoise(x, t):
        alpha, sigma = processes.coefficients(process, t, x)
        predicted = toy_eps(jnp, x, processes.time_of(t), (1, 2))
        if given == 'planes':
            predicted = with_planes(predicted, planes[..., :1], planes[..., 1:])
        return (x - sigma * predicted) / alpha

    small = image.reshape(1, 8, 2, 8, 2, 3).mean((2, 4))
    x_0 = 0.5 * jnp.asarray(np.concatenate([small, small[..., :1]], -1))
    space = latents.bind(context((16, 16, 3), stages={'first': stage_of(16)}), 0.5)
    planes = editing.known_planes(space, {'first': ((), {})}, {'image': image, 'mask': 2 * mask - 1}, False)
    x = editing.start(editing.settings_of(edits), jnp.asarray(eps), x_0, strength < 1)
    hole = editing.at_size(editing.missing(2 * mask - 1), (8, 8))
    keep = editing.keeping(process, x_0, jnp.asarray(eps), hole) if given == 'mask' else None
    found = samplers.run(denoise, x, edits.sampler.table, None, keep=keep)
    assert np.abs(wanted - np.asarray(x_0)).max() > 0.05
    np.testing.assert_allclose(found, wanted, atol=2e-4)


# --- runs


@functools.cache
def fresh(name: str) -> run.Run:
    """A run of a tiny config, with random weights in all of its layers."""
    config = tiny(name)
    a = assemble(config)
    rng = np.random.default_rng(0)
    state = jax.eval_shape(a.family.init, jax.random.key(0), first_batch(config), a.frozen)
    state = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), state)
    return run.Run('nowhere', config, a, state, 'ema')


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ddpm_digits', 'dit_digits', 'flow_digits', 'flow_shapes'])
def test_a_run_edits_images(name):
    """What is known stays to the grey level, a hole of everything is no condition, and strength is how far it goes."""
    r = fresh(name)
    x, hole = pixels(2, *r.image), np.zeros(r.image[:2], bool)
    hole[: len(hole) // 2] = True
    y = r.sample(seed=1, condition={'image': x, 'mask': hole})
    np.testing.assert_array_equal(y[:, ~hole], x[:, ~hole])
    free = r.sample(2, seed=1)
    np.testing.assert_array_equal(r.sample(seed=1, condition={'image': x, 'mask': np.ones_like(hole)}), free)
    assert (y[:, hole] != free[:, hole]).any() and (y[:, hole] != x[:, hole]).any()
    np.testing.assert_array_equal(r.sample(seed=1, condition={'image': x, 'mask': ~hole})[:, hole], x[:, hole])
    # By strength: another program each, of fewer levels.
    changed = {s: r.sample(seed=1, condition={'image': x}, editing={'strength': s}) for s in (0.26, 0.8)}
    distance = {s: np.abs(y.astype(int) - x).mean() for s, y in changed.items()}
    assert distance[0.26] < distance[0.8]
    masked = r.sample(seed=1, condition={'image': x, 'mask': hole}, editing={'strength': 0.5})
    np.testing.assert_array_equal(masked[:, ~hole], x[:, ~hole])
    np.testing.assert_array_equal(r.film(2, 2, condition={'image': x, 'mask': hole}).shape[0], 2)


@pytest.mark.slow
def test_the_known_part_of_latents_is_decoded_without_paste():
    """It is the reconstruction by the first stage, where the hole is far."""
    r = fresh('flow_shapes')
    x, none = pixels(1, *r.image), np.zeros(r.image[:2], bool)
    y = r.sample(condition={'image': x, 'mask': none}, editing={'paste': False})
    first, (state, frozen) = r.assembled.context.stages['first'], r.assembled.frozen['first']
    z = first.encode(state, frozen, {'image': jnp.asarray(x) / 127.5 - 1}, jax.random.key(0))
    wanted = (np.asarray(first.decode(state, frozen, {}, z, jax.random.key(0))) + 1) * 127.5
    np.testing.assert_allclose(y, np.clip(wanted, 0, 255), atol=1)


def test_what_an_image_needs_beside_it(no_compile):
    r = fresh_shapes('ddpm_digits')
    image, hole = pixels(8, 8), np.ones((8, 8), bool)
    assert r({'image': image}).reconstructs
    assert not r({'image': image, 'mask': hole}).reconstructs
    assert not r({'image': image}, strength=0.5).reconstructs
    with pytest.raises(UserError, match='mask is read beside image: set that too'):
        r({'mask': hole})
    with pytest.raises(UserError, match=r'strength = 0\.01 leaves none of'):
        r({'image': image}, strength=0.01)
    with pytest.raises(UserError, match='strength'):
        r({'image': image}, strength=0.0)
    with pytest.raises(UserError, match='a condition of this model itself'):
        fresh_shapes('upsampler_shapes')({}, strength=0.5)


def fresh_shapes(name: str):
    """(condition, fields of editing) -> the conditions as a run of this tiny config reads them."""
    config = tiny(name)
    a = assemble(config)

    def read(condition, **fields):
        return conditions.read(a.with_options({'editing': fields}) if fields else a, config, condition)

    return read


def test_strength_begins_with_an_image(no_compile):
    config = tiny('ddpm_digits', model=dict(editing=dict(strength=0.5)))
    with pytest.raises(UserError, match='set the condition image'):
        conditions.provider(assemble(config), config, {})


# --- networks that read a mask and what is known


PLANES = dict(
    network=dict(name='unet', channels=8, multipliers=(1,), blocks=1, attention=()),
    process=dict(name='linear', timesteps=20),
    conditioning=dict(inpainting={}),
    sampler=dict(name='ddim', steps=3, clip=False),
)


def stage_of(size):
    """A first stage whose latents are means of 2 x 2 pixels, with one channel more."""

    def encode(state, frozen, batch, rng):
        small = batch['image'].reshape(-1, size // 2, 2, size // 2, 2, 3).mean((2, 4))
        return jnp.concatenate([small, small[..., :1]], -1)

    def decode(state, frozen, batch, latents, rng):
        return jnp.repeat(jnp.repeat(latents[..., :3], 2, 1), 2, 2)

    never = functools.partial(pytest.fail, 'not to be called')
    shape = (size // 2, size // 2, 4)
    return Family(never, never, None, never, encode, decode, latents=Latents(shape), image=(size, size, 3))


@pytest.mark.slow
def test_the_network_reads_the_mask_and_what_is_known(monkeypatch):
    """x, the mask, and latents of the image with grey in its hole, in this order, as StableDiffusionInpaintPipeline
    concatenates them; in training under drawn masks, in sampling under the person's."""
    read = []

    class Reader(nn.Module):
        takes = ('planes',)
        vector_features: int = 0

        @nn.compact
        def __call__(self, x, t, train=False):
            jax.debug.callback(lambda x: read.append(np.asarray(x)), x)
            return x[..., :4] * self.param('scale', nn.initializers.ones, ())

    monkeypatch.setattr(denoisers, 'make_module', lambda *_, **__: Reader())
    given = options.complete(diffusion.build, {**PLANES, 'latent_scale': 0.5}, 'model')
    family = diffusion.build(context((8, 8, 3), stages={'first': stage_of(8)}), **given)
    frozen = {'first': ((), {})}
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)), jnp.float32)
    state = family.init(jax.random.key(0), {'image': image}, frozen)
    assert family.prepare is None and [one.name for one in family.inputs] == ['image', 'mask']

    def latents_of(x):
        small = np.asarray(x).reshape(-1, 4, 2, 4, 2, 3).mean((2, 4))
        return 0.5 * np.concatenate([small, small[..., :1]], -1)

    mask = np.full((3, 8, 8, 1), -1, np.float32)
    mask[:, :4, 2:6] = 1
    batch = {'index': jnp.arange(3), 'image': image, 'mask': jnp.asarray(mask)}
    read.clear()
    y = family.sample(state, frozen, batch, jax.random.key(1))
    jax.effects_barrier()
    assert len(read) == 3
    for x in read:
        np.testing.assert_array_equal(x[..., 4:5], mask[:, ::2, ::2] > 0)
        np.testing.assert_allclose(x[..., 5:], latents_of(np.where(mask > 0, 0, image)), atol=1e-6)
    np.testing.assert_array_equal(np.where(mask > 0, 0, y), np.where(mask > 0, 0, image))
    read.clear()
    family.sample(state, frozen, {'index': jnp.arange(3)}, jax.random.key(1))
    jax.effects_barrier()
    assert (read[0][..., 4] == 1).all() and (read[0][..., 5:] == 0).all()
    # In training masks are drawn, others in each update; of the known part the latents are the image's.
    read.clear()
    for seed in range(8):
        family.update(state, frozen, {'image': image}, jax.random.key(seed))
    jax.effects_barrier()
    masks = np.concatenate([x[..., 4] for x in read])
    assert set(np.unique(masks)) == {0, 1} and 0 < (masks == 1).all((1, 2)).mean() < 1
    known = np.concatenate([x[..., 5:] for x in read])
    whole = (masks == 1).all((1, 2))
    assert (known[whole] == 0).all() and (known[~whole] != 0).any()


def test_planes_of_what_is_known_in_pixels():
    """Without a first stage they are the mask and the image itself."""
    space = latents.bind(context((4, 4, 3)), 1.0)
    image, hole = jnp.asarray(IMAGE), jnp.broadcast_to(jnp.asarray(HOLE), (2, 4, 4, 1))
    planes = editing.known_planes(space, {}, {'image': image, 'mask': 2.0 * hole - 1}, False)
    np.testing.assert_array_equal(planes, np.concatenate([hole, np.where(hole, 0, image)], -1))
    nothing = editing.known_planes(space, {}, {'index': jnp.arange(2)}, False)
    np.testing.assert_array_equal(nothing, np.broadcast_to([1, 0, 0, 0], (2, 4, 4, 4)))


@pytest.mark.slow
def test_drawn_masks():
    """Of their kind, size and rate; those of the data are taken."""
    kinds = {name: dict(masks=name, whole=0.0, hole=0.25) for name in ('square', 'strokes', 'both')}
    kinds['whole'] = dict(whole=1.0)
    keys = jax.random.split(jax.random.key(0), 20)
    drawn = {}
    for name, own in kinds.items():
        made = (conditioning.inpainting('inpainting', context((16, 16, 1)), None, **own),)
        drawn[name] = np.asarray(conditioning.drawn(made, lambda: keys, {})['mask'])
        assert drawn[name].shape == (20, 16, 16, 1)
    assert ((drawn['square'] == 1).sum((1, 2, 3)) == 16).all()
    assert len(np.unique(drawn['square'], axis=0)) > 10
    np.testing.assert_array_equal(drawn['both'], np.maximum(drawn['square'], drawn['strokes']))
    assert (drawn['whole'] == 1).all()
    own = {'mask': np.zeros((20, 16, 16, 1))}
    assert conditioning.drawn(made, lambda: keys, own)['mask'] is own['mask']


# --- beyond the edges


def test_a_canvas_and_its_mask(no_compile):
    """The image in its place on the canvas, its border the hole, both at the model's size."""
    read, image = fresh_shapes('ddpm_digits'), pixels(8, 4)
    given = read({'image': image, 'outpaint': (1, 0, 3, 0)})
    numbers = np.arange(1)
    np.testing.assert_array_equal(given.values['image'].take(numbers)[0, :, 1:5, 0], image)
    hole = np.ones((8, 8), np.uint8)
    hole[:, 1:5] = 0
    np.testing.assert_array_equal(given.values['mask'].take(numbers)[0, ..., 0], 255 * hole)
    # Larger ones are reduced with their canvas; a text of the command line.
    given = read({'image': np.kron(image, np.ones((4, 4), np.uint8)), 'outpaint': '4,0,12,0'})
    np.testing.assert_array_equal(given.values['mask'].take(numbers)[0, ..., 0], 255 * hole)
    for condition, message in [
        ({'outpaint': '1,2'}, 'four numbers of pixels'),
        ({'outpaint': (0, 0, 0, 0)}, 'not all of them 0'),
        ({'outpaint': (1, 0, 2, 0)}, '7 x 8 pixels, and the model draws 8 x 8'),
        ({'outpaint': (1, 0, 3, 0), 'mask': hole}, 'set image, and no mask'),
        ({'outpaint': (10**6, 0, 10**6, 2 * 10**6)}, 'pixels'),
    ]:
        with pytest.raises(UserError, match=message):
            read({'image': image, **condition})
    with pytest.raises(UserError, match='set image, and no mask'):
        read({'outpaint': (1, 0, 3, 0)})


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ddpm_digits', 'completing_digits'])
def test_a_run_draws_beyond_the_edges(name):
    image = pixels(8, 4)
    y = fresh(name).sample(2, condition={'image': image, 'outpaint': (1, 0, 3, 0)})
    np.testing.assert_array_equal(y[:, :, 1:5, 0], np.stack([image, image]))


# --- variations


@pytest.mark.slow
@pytest.mark.parametrize('part', ['tokens', 'pooled'])
def test_variations_of_an_image(part):
    """The network reads the embedding that the CLIP stage encodes: of the image itself, prepared or not, in training,
    and of a person's in sampling."""
    config = tiny(
        'ldm_text_shapes',
        stages=dict(clip='runs/clip_shapes'),
        model=dict(conditioning=dict(image=dict(kind='image_embedding', part=part, dropout=0.5))),
    )
    a = assemble(config)
    batch = first_batch(config)
    made = {c.name: c for c in conditioning_of(a)}['image']
    clip, (state, frozen) = a.context.stages['clip'], a.frozen['clip']
    value = made.compute(a.frozen, batch, True)
    small = jax.image.resize(batch['image'], (len(batch['image']), *clip.image), 'cubic').clip(-1, 1)
    wanted = clip.encode(state, frozen, {'image': small}, jax.random.key(0))
    np.testing.assert_allclose(value, wanted, atol=1e-5)
    assert made.embed(value, None).shape == ((8, 1, value.shape[-1]) if part == 'tokens' else value.shape)
    prepared = a.family.prepare(a.frozen, batch, jax.random.key(0))
    np.testing.assert_array_equal(prepared['clip/image'], value)
    rng = np.random.default_rng(0)
    state = jax.eval_shape(a.family.init, jax.random.key(0), batch, a.frozen)
    state = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), state)
    update = jax.jit(a.family.update)
    _, logs = update(state, a.frozen, batch, jax.random.key(1))
    without = {name: x for name, x in batch.items() if name != 'image'}
    _, others = update(state, a.frozen, without | prepared, jax.random.key(1))
    np.testing.assert_allclose(logs['loss'], others['loss'], rtol=1e-5)
    r = run.Run('nowhere', config, a, state, 'ema')
    x = pixels(2, *r.image)
    one, other = (r.sample(1, condition={'image': image, 'caption': 'a red heart'}) for image in x)
    assert (one != other).any()


def conditioning_of(assembled):
    """The conditions of an assembled diffusion model."""
    return assembled.family.init.args[0].conditioning


@pytest.mark.slow
def test_a_run_becomes_one_of_inpainting(tmp_path, capfd):
    """The convolution that reads the mask and what is known begins with the weights of the other run, and zeros."""
    sections = dict(data=dict(batch=8), train=dict(steps=1, sample_every=0, samples=1))
    base = str(tmp_path / 'base')
    train.train(tiny('ddpm_digits', **sections), base)
    sections['model'] = dict(conditioning=dict(inpainting=dict(kind='inpainting')))
    sections['train'] |= dict(initial=base)
    begun = train.Training(tiny('ddpm_digits', **sections), str(tmp_path / 'filling'))
    before, own = run.load(base).state.ema['denoiser'], begun.state.params['denoiser']
    assert "['denoiser']['first']['kernel'] reads 3 channels, and 1 in" in capfd.readouterr().err
    kernel = np.asarray(own['first']['kernel'])
    np.testing.assert_array_equal(kernel[:, :, :1], before['first']['kernel'])
    assert kernel.shape[2] == 3 and not kernel[:, :, 1:].any()
    np.testing.assert_array_equal(begun.state.ema['denoiser']['first']['kernel'], kernel)
    np.testing.assert_array_equal(own['last']['kernel'], before['last']['kernel'])
    begun.checkpoints.close()
    begun.close()
    sections['model']['network'] = dict(channels=16)
    with pytest.raises(UserError, match='has other weights'):
        train.Training(tiny('ddpm_digits', **sections), str(tmp_path / 'other'))
