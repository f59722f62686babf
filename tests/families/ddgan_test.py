"""Denoising diffusion GAN: its networks against torch, its process and an update written out, and a toy it must fit."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from labelled import labelled
from references import ncsnpp
from support import sgd

from jaxgen.contract import Context
from jaxgen.diffusion.schedules import posterior
from jaxgen.errors import UserError
from jaxgen.families import ddgan
from jaxgen.networks.ddgan import Discriminator, Generator
from jaxgen.networks.ncsnpp import NCSNpp

pytestmark = pytest.mark.slow  # compiles networks, trains or starts processes

RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
Y = RNG.normal(size=(4, 8, 8, 3)).astype(np.float32)
STEP = np.array([0, 1, 2, 3])
UNET = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), resampling='fir', pyramid='residual')
GENERATOR = dict(latent=3, style=5, mapping_layers=1, channels=4, multipliers=(1,), blocks=1, attention=())
DISCRIMINATOR = dict(channels=4, multipliers=(1, 1), embedding=4)
SMALL = dict(
    process={'timesteps': 3}, generator=GENERATOR, discriminator=DISCRIMINATOR, r1=0.3, r1_every=2,
)  # fmt: skip


def random_weights(network, *args, **options):
    like = jax.eval_shape(lambda: network.init(jax.random.key(0), *args, **options))['params']

    def draw(path, leaf):
        fan = math.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 20
        values = RNG.normal(size=leaf.shape) / math.sqrt(fan)
        return (values + (path[-1].key == 'scale')).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, like)


def test_generator_equals_torch():
    torch = pytest.importorskip('torch')
    network, z = Generator(latent=3, style=5, mapping_layers=2, **UNET), RNG.normal(size=(4, 3)).astype(np.float32)
    params = random_weights(network, X, STEP, z, train=False)
    ours = jax.jit(lambda p: network.apply({'params': p}, X, STEP, z, train=False))(params)
    h = torch.from_numpy(z / np.sqrt(np.square(z).mean(1, keepdims=True) + 1e-8))
    for i in range(3):
        p = jax.tree.map(torch.from_numpy, params[f'mapping{i}'])
        h = torch.nn.functional.silu(h @ p['kernel'] + p['bias'])
    theirs = torch.tanh(ncsnpp(labelled(NCSNpp, **UNET), params['unet'], X, STEP.astype(np.float32), style=h))
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_discriminator_equals_torch():
    torch = pytest.importorskip('torch')
    from torch.nn import functional as F

    network = Discriminator(4, (1, 2, 2), embedding=6, group=2)
    params = random_weights(network, X, STEP, Y)
    ours = jax.jit(network.apply)({'params': params}, X, STEP, Y)
    p = jax.tree.map(torch.from_numpy, params)
    taps = torch.tensor([1.0, 3, 3, 1])

    def dense(p, x):
        return F.linear(x, p['kernel'].T, p.get('bias'))

    def pointwise(p, x):
        return dense(p, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def conv(p, x):
        return F.conv2d(x, p['kernel'].permute(3, 2, 0, 1), p['bias'], padding=1)

    def smaller(x):
        kernel = (torch.outer(taps, taps) / 64).repeat(x.shape[1], 1, 1, 1)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])

    angles = torch.from_numpy(STEP)[:, None] * 10_000.0 ** (-torch.arange(3) / 2)
    time = torch.cat([angles.sin(), angles.cos()], 1)
    for i in (1, 2):
        time = F.leaky_relu(dense(p[f'time{i}'], time), 0.2)
    h = pointwise(p['first'], torch.from_numpy(np.concatenate([X, Y], -1)).permute(0, 3, 1, 2))
    for i in range(3):
        q, x = p[f'block{i}'], h
        h = conv(q['conv1'], F.leaky_relu(x, 0.2)) + dense(q['embedding'], time)[..., None, None]
        h = F.leaky_relu(h, 0.2)
        x, h = (smaller(x), smaller(h)) if i else (x, h)
        h = (conv(q['conv2'], h) + pointwise(q['shortcut'], x)) / 2**0.5
    pairs = h.reshape(2, 2, *h.shape[1:])
    deviation = torch.sqrt(pairs.var(1, unbiased=False) + 1e-8).mean((1, 2, 3)).repeat_interleave(2)
    h = torch.cat([h, deviation[:, None, None, None].expand(-1, 1, *h.shape[2:])], 1)
    values = dense(p['value'], F.leaky_relu(conv(p['last'], h), 0.2).sum((2, 3)))[:, 0]
    assert values.std() > 0.1
    np.testing.assert_allclose(ours, values.numpy(), rtol=1e-4, atol=1e-5)


def test_process_is_the_published_one():
    table = ddgan.noise_levels()
    np.testing.assert_allclose(table.alpha, [0.72231897, 0.28049236, 0.05855663, 0.0065719477], rtol=1e-6)
    betas = posterior(table).forward
    np.testing.assert_allclose(betas, [0.4782553, 0.849206, 0.95641771, 0.9874039], rtol=1e-6)
    assert ddgan.noise_levels(timesteps=2).alpha[0] ** 2 == pytest.approx(1 - 0.92132403, rel=1e-6)


def family(**sections):
    return ddgan.build(Context((4, 4, 3), 0, sgd(0.1)), **{**SMALL, **sections})


def test_update_is_the_papers_algorithm_written_out():
    """Both losses by an oracle with the same draws, the penalty in every other update and then twice."""
    f, x = family(), jnp.asarray(X[:, :4, :4])
    batch = {'image': x}
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    discriminator = Discriminator(**DISCRIMINATOR)
    weights = {'discriminator': random_weights(discriminator, x, STEP, x)}
    state = state.replace(params={**state.params, **jax.tree.map(jnp.asarray, weights)})
    generator = Generator(**GENERATOR)
    alpha = np.concatenate([[1.0], ddgan.noise_levels(timesteps=3).alpha])  # of x_0 to x_3

    def pairs(rng):
        step_rng, first_rng, second_rng = jax.random.split(rng, 3)
        step = jax.random.randint(step_rng, (4,), 0, 3)
        a, b = (jnp.asarray(alpha)[step + i][:, None, None, None] for i in (0, 1))
        x_s = a * x + jnp.sqrt(1 - a**2) * jax.random.normal(first_rng, x.shape)
        x_t = b / a * x_s + jnp.sqrt(1 - (b / a) ** 2) * jax.random.normal(second_rng, x.shape)
        return step, a, b, x_s, x_t

    def made(params, step, a, b, x_t, rng):
        z_rng, _, noise_rng = jax.random.split(rng, 3)
        x_0 = generator.apply({'params': params['generator']}, x_t, step, jax.random.normal(z_rng, (4, 3)), train=False)
        beta = 1 - (b / a) ** 2  # Ho et al. 2020, eq. 7
        mean = (a * beta * x_0 + b / a * (1 - a**2) * x_t) / (1 - b**2)
        variance = (1 - a**2) / (1 - b**2) * beta
        return mean + jnp.sqrt(variance) * jax.random.normal(noise_rng, x.shape)

    def value(params, x_s, step, x_t):
        return discriminator.apply({'params': params['discriminator']}, x_s, step, x_t)

    def of_discriminator(params, rng, penalty):
        diffusion_rng, rng = jax.random.split(rng)
        step, a, b, x_s, x_t = pairs(diffusion_rng)
        real, fake = value(params, x_s, step, x_t), value(params, made(params, step, a, b, x_t, rng), step, x_t)
        slope = jax.grad(lambda x: value(params, x, step, x_t).sum())(x_s)
        square = 0.5 * jnp.square(slope).sum((1, 2, 3)).mean()
        return jnp.logaddexp(0, -real).mean() + jnp.logaddexp(0, fake).mean() + penalty * square

    def of_generator(params, rng):
        diffusion_rng, rng = jax.random.split(rng)
        step, a, b, _, x_t = pairs(diffusion_rng)
        return jnp.logaddexp(0, -value(params, made(params, step, a, b, x_t, rng), step, x_t)).mean()

    @jax.jit
    def oracle(params, key, penalty):
        discriminator_rng, generator_rng = jax.random.split(key)
        slopes = jax.grad(of_discriminator)(params, discriminator_rng, penalty)['discriminator']
        moved = jax.tree.map(lambda w, g: w - 0.1 * g, params['discriminator'], slopes)
        params = {**params, 'discriminator': moved}
        slopes = jax.grad(of_generator)(params, generator_rng)['generator']
        return {**params, 'generator': jax.tree.map(lambda w, g: w - 0.1 * g, params['generator'], slopes)}

    update = jax.jit(f.update)
    for i, penalty in enumerate((0.6, 0.0)):
        expected = oracle(state.params, jax.random.key(i), penalty)
        state, logs = update(state, {}, batch, jax.random.key(i))
        assert (logs['r1'] > 0) == (penalty > 0)
        for a, b in zip(*map(jax.tree.leaves, (state.params, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_steps_of_a_sample():
    """From noise down, each x_s between its x_t and its estimate, and the last one the estimate itself."""
    f, batch = family(), {'image': jnp.asarray(X[:, :4, :4]), 'index': jnp.arange(4)}
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    path = jax.jit(f.trajectory)(state, {}, batch, jax.random.key(1))
    assert path['x'].shape == path['x_0'].shape == (3, 4, 4, 4, 3)
    np.testing.assert_array_equal(path['x'][-1], path['x_0'][-1])
    np.testing.assert_array_equal(path['x'][-1], jax.jit(f.sample)(state, {}, batch, jax.random.key(1)))
    metrics = jax.jit(f.evaluate)(state, {}, batch, jax.random.key(2))
    assert sorted(metrics) == ['squared_error', *(f'squared_error/{i}' for i in (1, 2, 3))]


@pytest.mark.parametrize(('field', 'value'), [
    ('process.timesteps', 0), ('generator.latent', 0), ('process.beta_min', 30.0), ('process.beta_max', 0.0),
    ('generator.channels', 5), ('generator.resampling', 'cubic'), ('generator.multipliers', (1,) * 4),
    ('discriminator.multipliers', (1,) * 5), ('discriminator.embedding', 5), ('r1', -1.0), ('r1_every', 0),
    ('generator.dropout', 1.0), ('generator.multipliers', ()), ('generator.embedding', 'fourier'),
])  # fmt: skip
def test_a_mistake_is_refused_by_the_name_of_its_field(field, value):
    section, _, name = field.rpartition('.')
    sections = {section: {**SMALL.get(section, {}), name: value}} if section else {name: value}
    with pytest.raises(UserError, match=rf'config\..*{name}') as error:
        family(**sections)
    assert '\n' not in str(error.value)
