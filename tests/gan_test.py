"""WGAN-GP: networks against torch, the update against a plain loop, the running statistics."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.contract import Context, gradient_step, new_state, split_batch
from jaxgen.errors import UserError
from jaxgen.families import wgan_gp
from jaxgen.optim import make_optim

SMALL = dict(latent=6, width=4, levels=2, n_critic=3)


def adam(**fields):
    common = dict(name='adam', lr=1e-2, schedule='constant', warmup=0, b1=0.0, b2=0.9, eps=1e-8)
    common |= dict(weight_decay=0.0, clip=0.0, accumulate=1, ema=0.5, ema_warmup=False, networks={})
    return make_optim(8, **{**common, **fields})


def family(image=(8, 8, 1), optim=None, **model):
    return wgan_gp.build(Context(image, 0, optim or adam()), **{**SMALL, **model})


def images(n: int, image=(8, 8, 1)) -> dict:
    return {'image': jax.random.uniform(jax.random.key(3), (n, *image), minval=-1, maxval=1)}


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('size, levels, generator, critic', [
    (32, 3, 1_204_483, 1_053_825),
    # One level more: another block of two 3x3 and one 1x1 convolution, and in the generator two norms.
    (64, 4, 1_204_483 + 312_192, 1_053_825 + 311_680),
])  # fmt: skip
def test_published_sizes(size, levels, generator, critic):
    f = family((size, size, 3), width=128, latent=128, levels=levels)
    state = jax.eval_shape(f.init, jax.random.key(0), images(3, (size, size, 3)), {})
    assert (count(state.params['generator']), count(state.params['critic'])) == (generator, critic)
    assert set(state.ema) == {'generator'}


def randomised(tree, seed: int):
    """Weights of about one size, none zero: a wrong axis or a missing bias shows."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten(
        [0.3 * jax.random.normal(k, leaf.shape) + (leaf.ndim == 1) * 0.5 for k, leaf in zip(keys, leaves, strict=True)]
    )


def torch_functions():
    """The layers of the authors' networks in torch, NCHW, from weights in our layout."""
    torch = pytest.importorskip('torch')
    F = torch.nn.functional

    def tensor(a):
        return torch.tensor(np.asarray(a))

    def conv(x, w):
        kernel = np.asarray(w['kernel'])
        kernel = kernel[None, None] if kernel.ndim == 2 else kernel
        return F.conv2d(x, tensor(kernel.transpose(3, 2, 0, 1)), tensor(w['bias']), padding=kernel.shape[0] // 2)

    def norm(x, w):
        return F.batch_norm(x, None, None, tensor(w['scale']), tensor(w['bias']), training=True, eps=1e-5)

    def up(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def block(x, w, how, first=False):
        h = x
        if not first:
            h = F.relu(norm(h, w['norm1']) if 'norm1' in w else h)
        h = conv(up(h) if how == 'up' else h, w['conv1'])
        h = conv(F.relu(norm(h, w['norm2']) if 'norm2' in w else h), w['conv2'])
        h = F.avg_pool2d(h, 2) if how == 'down' else h
        # Where the authors have them: resample, then 1x1, but pool after the 1x1 past the first block.
        if how == 'up':
            x = conv(up(x), w['shortcut'])
        elif first:
            x = conv(F.avg_pool2d(x, 2), w['shortcut'])
        elif how == 'down':
            x = F.avg_pool2d(conv(x, w['shortcut']), 2)
        return x + h

    def generate(z, w, base, levels):
        x = tensor(z) @ tensor(w['Dense_0']['kernel']) + tensor(w['Dense_0']['bias'])
        x = x.reshape(len(z), *base, -1).permute(0, 3, 1, 2)
        for i in range(levels):
            x = block(x, w[f'block{i}'], 'up')
        return torch.tanh(conv(F.relu(norm(x, w['norm'])), w['Conv_0'])).permute(0, 2, 3, 1).numpy()

    def criticise(x, w, hows):
        x = tensor(x).permute(0, 3, 1, 2)
        for i, how in enumerate(hows):
            x = block(x, w[f'block{i}'], how, first=i == 0)
        x = F.relu(x).mean((2, 3))
        return (x @ tensor(w['Dense_0']['kernel']) + tensor(w['Dense_0']['bias']))[:, 0].numpy()

    return generate, criticise


def test_networks_equal_torch():
    generate, criticise = torch_functions()
    generator = wgan_gp.Generator((16, 8, 3), 5, 3, jnp.float32, False)
    z = jax.random.normal(jax.random.key(0), (6, 7))
    weights = randomised(generator.init(jax.random.key(1), z)['params'], 2)
    got, _ = generator.apply({'params': weights}, z, train=True, mutable=['batch_stats'])
    assert got.shape == (6, 16, 8, 3) and np.abs(got).mean() < 0.95
    np.testing.assert_allclose(got, generate(np.asarray(z), weights, (2, 1), 3), atol=2e-4)

    critic = wgan_gp.Critic(5, 3, jnp.float32, False)
    x = jax.random.normal(jax.random.key(3), (4, 16, 8, 3))
    weights = randomised(critic.init(jax.random.key(4), x)['params'], 5)
    want = criticise(np.asarray(x), weights, ('down', 'down', '', ''))
    np.testing.assert_allclose(critic.apply({'params': weights}, x), want, rtol=1e-4, atol=1e-4)


def test_several_steps_equal_a_loop_and_schedules_go_by_updates():
    optim = adam(schedule='linear', warmup=2, b1=0.9)
    batch = {'x': jax.random.normal(jax.random.key(0), (12, 3))}

    def loss(params, frozen, batch, rng):
        noise = jax.random.normal(rng, ())
        value = jnp.square(batch['x'] @ params['critic'] - noise * params['generator']).mean()
        return value, {'loss': value}

    params = {'critic': jnp.array([1.0, -2.0, 0.5]), 'generator': jnp.float32(1.0)}
    state = new_state(params, optim)
    steps = jax.jit(gradient_step(loss, optim, 'critic', times=4))
    plain, opt = params['critic'], optim.tx('critic').init(params['critic'])
    # Linear rise over 2 updates, then linear fall to 0 at update 8.
    rates = [0.5e-2, 1e-2, 1e-2, 1e-2 * 5 / 6]
    for update, rate in enumerate(rates):
        key = jax.random.key(update)
        state, logs = steps(state, {}, batch, key)
        adam_alone = optax.scale_by_adam(0.9, 0.9, 1e-8)
        if update == 0:
            opt = adam_alone.init(plain)
        parts, losses = split_batch(batch, 4), []
        for i, k in enumerate(jax.random.split(key, 4)):
            part = {'x': parts['x'][i]}
            assert np.array_equal(part['x'], batch['x'][i::4])
            (value, _), gradient = jax.value_and_grad(
                lambda w, part=part, k=k: loss({**params, 'critic': w}, {}, part, k), has_aux=True
            )(plain)
            direction, opt = adam_alone.update(gradient, opt)
            plain = plain - rate * direction
            losses.append(value)
        np.testing.assert_allclose(state.params['critic'], plain, rtol=1e-5)
        np.testing.assert_allclose(logs['loss'], np.mean(losses), rtol=1e-5)
    assert float(state.params['generator']) == 1.0, 'the other network is not touched'


def test_update_equals_the_papers_algorithm_written_out():
    # Plain gradient descent: Adam would blow the rounding of a bias in front of a norm up to whole steps.
    f = family(dequantise=False, generator_batch=2, optim=adam(name='sgd'))
    batch, key = images(3 * 4), jax.random.key(11)
    state = f.init(jax.random.key(0), batch, {})
    got, logs = jax.jit(f.update)(state, {}, batch, key)

    generator = wgan_gp.Generator((8, 8, 1), 4, 2, jnp.float32, False)
    critic = wgan_gp.Critic(4, 2, jnp.float32, False)
    tx = optax.sgd(1e-2)

    def images_of(weights, z):
        return generator.apply({'params': weights}, z, train=True, mutable=['batch_stats'])

    @jax.jit
    def critic_step(weights, opt, g, real, key):
        z_key, _, share_key = jax.random.split(key, 3)
        fake = images_of(g, jax.random.normal(z_key, (4, 6)))[0]
        share = jax.random.uniform(share_key, (4, 1, 1, 1))

        def loss(w):
            def one(x):  # one image alone
                return critic.apply({'params': w}, x[None])[0]

            total = 0.0
            for i in range(4):
                slope = jax.grad(one)(share[i] * fake[i] + (1 - share[i]) * real[i])
                total += one(fake[i]) - one(real[i]) + 10 * (jnp.sqrt((slope**2).sum()) - 1) ** 2
            return total / 4

        value, gradient = jax.value_and_grad(loss)(weights)
        change, opt = tx.update(gradient, opt)
        return optax.apply_updates(weights, change), opt, value

    critic_key, z_key, _ = jax.random.split(key, 3)
    weights, g = state.params['critic'], state.params['generator']
    opt, values = tx.init(weights), []
    for i, k in enumerate(jax.random.split(critic_key, 3)):
        weights, opt, value = critic_step(weights, opt, g, batch['image'][i::3], k)
        values.append(value)

    z = jax.random.normal(z_key, (8, 6))

    def generator_loss(g):
        return -critic.apply({'params': weights}, images_of(g, z)[0]).mean()

    value, gradient = jax.jit(jax.value_and_grad(generator_loss))(g)
    g = optax.apply_updates(g, tx.update(gradient, tx.init(g))[0])

    np.testing.assert_allclose(logs['critic_loss'], np.mean(values), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(logs['generator_loss'], value, rtol=1e-3, atol=1e-4)
    for network, want in (('critic', weights), ('generator', g)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got.params[network], want)
    average = jax.tree.map(lambda a, b: (a + b) / 2, state.params['generator'], got.params['generator'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got.ema['generator'], average)
    _, first = images_of(got.ema['generator'], z)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got.extra, first['batch_stats'])


def test_samples_are_normalised_as_a_large_batch_of_them():
    f = family(optim=adam(networks={'generator': dict(lr=0.0)}), n_critic=1, generator_batch=64)
    batch = images(2)
    state = f.init(jax.random.key(0), batch, {})
    state = state.replace(ema={'generator': randomised(state.params['generator'], 1)})
    state = state.replace(params={**state.params, 'generator': state.ema['generator']})
    update = jax.jit(f.update)
    for i in range(12):
        state, _ = update(state, {}, batch, jax.random.key(i))
    wanted = {'index': jnp.arange(2000, dtype=jnp.int32)}
    drawn = jax.jit(f.sample)(state, {}, wanted, jax.random.key(5))
    z = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(5), i), (6,)))(wanted['index'])
    generator = wgan_gp.Generator((8, 8, 1), 4, 2, jnp.float32, False)
    by_batch, _ = generator.apply({'params': state.ema['generator']}, z, train=True, mutable=['batch_stats'])
    assert np.abs(drawn - by_batch).mean() < 0.05 < np.abs(drawn).std()
    few = f.sample(state, {}, {'index': jnp.array([7])}, jax.random.key(5))
    np.testing.assert_allclose(few[0], drawn[7], atol=1e-5)


def test_both_penalties_and_dequantisation_reach_the_loss():
    batch = images(3)

    def logs(**model):
        f = family(n_critic=1, **model)
        state = f.init(jax.random.key(0), batch, {})
        # A critic as good as flat: slopes are far below 1.
        flat = jax.tree.map(lambda w: 1e-3 * w, state.params['critic'])
        state = state.replace(params={**state.params, 'critic': flat})
        return jax.jit(f.update)(state, {}, batch, jax.random.key(1))[1]

    two, one = logs(), logs(one_sided=True)
    assert abs(float(two['penalty']) - 1) < 0.01 and float(one['penalty']) == 0
    np.testing.assert_allclose(two['critic_loss'] - one['critic_loss'], 10 * two['penalty'], rtol=1e-4)


def test_evaluate_scores_with_the_critic():
    f = family()
    state = f.init(jax.random.key(0), images(3), {})
    scores = f.evaluate(state, {}, images(5), jax.random.key(1))
    assert set(scores) == {'critic'} and scores['critic'].shape == (5,) and np.ptp(scores['critic']) > 0


def test_says_what_is_wrong():
    for model in (dict(n_critic=0), dict(levels=0), dict(penalty=-1.0), dict(latent=0), dict(levels=4)):
        with pytest.raises(UserError, match=r'config\.') as error:
            family(**model)
        assert '\n' not in str(error.value)
    with pytest.raises(UserError, match=r'multiple of config\.model\.n_critic = 3'):
        family().init(jax.random.key(0), images(4), {})
