"""InfoGAN: networks against torch, the bound by hand, whose weights each step changes, codes decoded."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import infogan
from jaxgen.networks.infogan import Discriminator, Generator, Recogniser
from jaxgen.optim import Optim

slow = pytest.mark.slow  # compiles networks or trains

SMALL = dict(noise=3, categories=(3, 2), continuous=2, width=3, levels=2, hidden=6, recogniser_hidden=5)


def family(rates: dict | None = None, image=(8, 8, 1), **model):
    rates = rates or {}
    optim = Optim(lambda name, times=1: optax.sgd(rates.get(name, 0.1)), 1, lambda step: 0.5)
    return infogan.build(Context(image, 0, optim), **{**SMALL, **model})


def started(f):
    batch = {'image': jax.random.uniform(jax.random.key(3), (4, 8, 8, 1), minval=-1, maxval=1)}
    return jax.jit(f.init)(jax.random.key(0), batch, {}), batch


@slow
def test_networks_equal_torch():
    torch = pytest.importorskip('torch')
    F = torch.nn.functional

    def tensor(a):
        return torch.tensor(np.asarray(a))

    def dense(x, w):
        return x @ tensor(w['kernel']) + tensor(w['bias'])

    def norm(x, w):
        return F.batch_norm(x, None, None, tensor(w['scale']), tensor(w['bias']), training=True)

    def weights_of(network, *inputs):
        tree = network.init(jax.random.key(0), *inputs)['params']
        leaves, structure = jax.tree.flatten(tree)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        return structure.unflatten(
            [0.3 * jax.random.normal(k, a.shape) + (a.ndim == 1) * 0.2 for k, a in zip(keys, leaves, strict=True)]
        )

    z = jax.random.normal(jax.random.key(2), (5, 7))
    network = Generator((8, 12, 3), 4, 2, 6)
    w = weights_of(network, z)
    got, _ = network.apply({'params': w}, z, train=True, mutable=['batch_stats'])
    x = F.relu(norm(dense(tensor(z), w['dense0']), w['norm0']))
    x = F.relu(norm(dense(x, w['dense1']), w['norm1'])).reshape(5, 2, 3, 8).permute(0, 3, 1, 2)
    for i in range(2):
        x = F.relu(norm(x, w[f'up_norm{i}'])) if i else x
        kernel = np.asarray(w[f'up{i}']['kernel'])[::-1, ::-1].transpose(2, 3, 0, 1).copy()
        x = F.conv_transpose2d(x, tensor(kernel), tensor(w[f'up{i}']['bias']), stride=2, padding=1)
    np.testing.assert_allclose(got, torch.tanh(x).permute(0, 2, 3, 1), atol=1e-4)

    network = Discriminator(4, 2, 6)
    w = weights_of(network, got)
    (value, features), _ = network.apply({'params': w}, got, train=True, mutable=['batch_stats'])
    x = tensor(got).permute(0, 3, 1, 2)
    for i in range(2):
        kernel = np.asarray(w[f'conv{i}']['kernel']).transpose(3, 2, 0, 1).copy()
        x = F.conv2d(x, tensor(kernel), tensor(w[f'conv{i}']['bias']), stride=2, padding=1)
        x = F.leaky_relu(norm(x, w[f'norm{i}']) if i else x, 0.1)
    x = F.leaky_relu(norm(dense(x.permute(0, 2, 3, 1).flatten(1), w['dense']), w['norm']), 0.1)
    np.testing.assert_allclose(features, x, atol=1e-3)
    np.testing.assert_allclose(value, dense(x, w['value'])[:, 0], atol=1e-3)


@slow
def test_information_is_the_bound():
    """evaluate's 'information' from the pieces: codes drawn, Q's normals and categories by scipy."""
    from scipy import special, stats

    f = family()
    state, batch = started(f)
    index = jnp.arange(4, dtype=jnp.int32)
    got = f.evaluate(state, {}, {**batch, 'index': index}, jax.random.key(5))['information']
    recogniser = Recogniser(5 + 4, 5)
    discriminator, generator = Discriminator(3, 2, 6), Generator((8, 8, 1), 3, 2, 6)

    def fixed(network, name, x):
        return network.apply({'params': state.ema[name], 'batch_stats': state.extra[name]}, x)

    for i in range(4):
        # The codes of a sample are in its number's key alone.
        key = jax.random.fold_in(jax.random.key(5), i)
        noise_key, number_key, *keys = jax.random.split(key, 4)
        chosen = [int(jax.random.randint(k, (1,), 0, n)[0]) for k, n in zip(keys, (3, 2), strict=True)]
        numbers = jax.random.uniform(number_key, (1, 2), minval=-1, maxval=1)
        hot = [jax.nn.one_hot(jnp.array([c]), n) for c, n in zip(chosen, (3, 2), strict=True)]
        noise = jax.random.uniform(noise_key, (1, 3), minval=-1, maxval=1)
        image = fixed(generator, 'generator', jnp.concatenate([noise, *hot, numbers], -1))
        np.testing.assert_allclose(image[0], f.sample(state, {}, {'index': index}, jax.random.key(5))[i], atol=1e-5)
        out = np.asarray(fixed(recogniser, 'recogniser', fixed(discriminator, 'discriminator', image)[1])[0], 'float64')
        total = math.log(3) + math.log(2) + 2 * math.log(2)
        total += special.log_softmax(out[:3])[chosen[0]] + special.log_softmax(out[3:5])[chosen[1]]
        deviation = 0.1 + np.log1p(np.exp(out[7:]))
        total += stats.norm.logpdf(np.asarray(numbers)[0], out[5:7], deviation).sum()
        np.testing.assert_allclose(got[i], total, rtol=1e-4)


@slow
def test_unit_deviations_and_slopes():
    """Q's normals of deviation 1: log Q + H by scipy. And the networks have the leaky ReLUs' slope."""
    from scipy import stats

    f = family(categories=(), continuous=2, unit_deviation=True)
    state, batch = started(f)
    index = jnp.arange(4, dtype=jnp.int32)
    got = f.evaluate(state, {}, {**batch, 'index': index}, jax.random.key(5))['information']
    means = f.encode(state, {}, {'image': f.sample(state, {}, {'index': index}, jax.random.key(5))}, jax.random.key(0))
    for i in range(4):
        _, number_key = jax.random.split(jax.random.fold_in(jax.random.key(5), i), 2)
        numbers = np.asarray(jax.random.uniform(number_key, (1, 2), minval=-1, maxval=1))[0]
        np.testing.assert_allclose(got[i], stats.norm.logpdf(numbers, means[i], 1).sum() + 2 * math.log(2), rtol=1e-4)
    # Of no convolution, the features are the leaky ReLU of one linear layer.
    x, flat = batch['image'], np.asarray(batch['image']).reshape(len(batch['image']), -1)
    for slope in (0.01, 0.5):
        network = Discriminator(3, 0, 6, norm=False, slope=slope)
        w = network.init(jax.random.key(0), x)
        h = flat @ np.asarray(w['params']['dense']['kernel'])
        np.testing.assert_allclose(network.apply(w, x)[1], np.where(h > 0, h, slope * h), atol=1e-5)


@pytest.mark.parametrize('moving', ['generator', 'discriminator'])
@slow
def test_neither_step_touches_the_other_network(moving):
    still = {'generator': ('discriminator', 'recogniser'), 'discriminator': ('generator',)}[moving]
    f = family(dict.fromkeys(still, 0.0))
    state, batch = started(f)
    after, logs = jax.jit(f.update)(state, {}, batch, jax.random.key(1))
    for name in state.params:
        pairs = zip(jax.tree.leaves(after.params[name]), jax.tree.leaves(state.params[name]), strict=True)
        changed = [float(np.abs(a - b).max()) for a, b in pairs]
        assert (max(changed) == 0) == (name in still), name
    assert logs['information/categories'] < math.log(6) + 1e-5


@slow
def test_penalty_of_a_discriminator_without_normalisation():
    f = family(discriminator_norm=False, r1=0.5)
    state, batch = started(f)
    assert state.extra['discriminator'] == {}
    after, logs = jax.jit(f.update)(state, {}, batch, jax.random.key(1))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    network, params = Discriminator(3, 2, 6, norm=False), state.params['discriminator']
    slope = jax.grad(lambda x: network.apply({'params': params}, x, train=True)[0].sum())(batch['image'])
    assert float(logs['r1']) == pytest.approx(float(0.5 * jnp.square(slope).sum((1, 2, 3)).mean()), rel=1e-4)


@slow
def test_codes_are_categories_and_continuous():
    f = family()
    state, batch = started(f)
    # Larger than at the start: the statistics there are not those of any batch, and samples are as good as grey.
    state = state.replace(ema=jax.tree.map(lambda w: 20 * w, state.ema))
    assert f.latents.shape == (4,)
    codes = f.encode(state, {}, batch, jax.random.key(1))
    assert codes.shape == (4, 4) and (codes[:, :2] == np.round(codes[:, :2])).all()
    assert codes[:, 0].max() <= 2 and codes[:, 1].max() <= 1

    def decode(rows, seed=2):
        return f.decode(state, {}, {}, jnp.array(rows), jax.random.key(seed))

    same = decode([[0.4, 0.0, 0.1, 0.2], [-3.0, 0.3, 0.1, 0.2]])
    np.testing.assert_array_equal(same[0], same[1])
    differ = decode([[2.0, 0.0, 0.1, 0.2], [7.0, 0.0, 0.1, 0.2], [1.0, 0.0, 0.1, 0.2], [2.0, 0.0, 0.5, 0.2]])
    np.testing.assert_array_equal(differ[0], differ[1])
    assert np.abs(differ[0] - differ[2]).max() > 1e-6 and np.abs(differ[0] - differ[3]).max() > 1e-6
    assert np.abs(differ - decode([[2.0, 0.0, 0.1, 0.2]] * 4, seed=3)).max() > 1e-6, 'the noise is of the key'


@pytest.mark.parametrize('codes', [dict(categories=()), dict(continuous=0)], ids=str)
@slow
def test_one_kind_of_code_is_enough(codes):
    f = family(**codes)
    state, batch = jax.eval_shape(lambda: started(f))
    after, logs = jax.eval_shape(f.update, state, {}, batch, jax.eval_shape(lambda: jax.random.key(0)))
    assert jax.tree.structure(after) == jax.tree.structure(state) and 'information/categories' in logs
    assert jax.eval_shape(f.encode, state, {}, batch, None).shape == (4, *f.latents.shape)


WRONG = [
    *({name: 0} for name in ('noise', 'width', 'levels', 'hidden')),
    *({'continuous': -1}, {'categories': (1,)}, {'categories': (), 'continuous': 0}),
    *({'category_weight': -1.0}, {'levels': 4}, {'r1': -1.0, 'discriminator_norm': False}, {'r1': 1.0}),
]


@pytest.mark.parametrize('model', WRONG, ids=str)
def test_mistakes_are_one_line(model, no_compile):
    with pytest.raises(UserError, match=r'config\.') as error:
        family(**model)
    assert '\n' not in str(error.value)
