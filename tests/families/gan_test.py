"""GANs: networks against torch, the update against a plain loop, spectral normalisation, batch statistics."""

from __future__ import annotations

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import options
from jaxgen.config import DEFAULTS
from jaxgen.contract import Aux, Context, gradient_step, new_state, repeat, split_batch, store
from jaxgen.errors import UserError
from jaxgen.families import gan
from jaxgen.networks import gan as networks
from jaxgen.networks import spectral
from jaxgen.optim import make_optim, steps_within_update
from jaxgen.randomness import example_keys, normal

slow = pytest.mark.slow  # compiles networks or trains

WGAN_GP = dict(
    adversarial='wasserstein',
    network=dict(name='resnet', width=4, multipliers=(1, 1)),
    latent=6,
    discriminator_steps=3,
    penalty=10.0,
    generator_batch=2,
    dequantise=True,
)
DCGAN = dict(network=dict(name='dcgan', width=3, multipliers=(2, 1)), latent=5)
MLP = dict(network=dict(name='mlp', hidden=(8,)), latent=3)


def adam(**fields):
    return make_optim(8, **{**DEFAULTS['optim'], 'lr': 1e-2, 'b1': 0.0, 'b2': 0.9, 'ema': 0.5, **fields})


def family(image=(8, 8, 1), optim=None, classes=0, base=WGAN_GP, **model):
    return gan.build(Context(image, classes, optim or adam()), **options.update(gan.build, base, model))


def images(n: int, image=(8, 8, 1), classes: int = 0) -> dict:
    batch = {'image': jax.random.uniform(jax.random.key(3), (n, *image), minval=-1, maxval=1)}
    return batch | ({'label': jnp.arange(n, dtype=jnp.int32) % classes} if classes else {})


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_published_size_for_larger_images():
    # One level more than published: another block of two 3x3 and one 1x1 convolution, in the generator two norms.
    f = family((64, 64, 3), network=dict(width=128, multipliers=(1,) * 5), latent=128)
    state = jax.eval_shape(f.init, jax.random.key(0), images(3, (64, 64, 3)), {})
    sizes = (count(state.params['generator']), count(state.params['discriminator']))
    assert sizes == (1_204_483 + 312_192, 1_053_825 + 311_680)
    assert set(state.ema) == {'generator'}


def randomised(tree, seed: int):
    """Weights of about one size, none zero: a wrong axis or a missing bias shows."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten(
        [0.3 * jax.random.normal(k, leaf.shape) + (leaf.ndim == 1) * 0.5 for k, leaf in zip(keys, leaves, strict=True)]
    )


class Torch:
    """The layers of the authors' networks in torch, NCHW, from weights in our layout."""

    def __init__(self):
        self.torch = pytest.importorskip('torch')
        self.F = self.torch.nn.functional

    def tensor(self, a):
        return self.torch.tensor(np.asarray(a))

    def dense(self, x, w):
        w = w if isinstance(w, dict) else {'kernel': w}  # an embedding
        x = x @ self.tensor(w['kernel'])
        return x + self.tensor(w['bias']) if 'bias' in w else x

    def conv(self, x, w, stride=1):
        kernel = np.asarray(w['kernel'])
        kernel = kernel[None, None] if kernel.ndim == 2 else kernel
        padding = 1 if stride == 2 else kernel.shape[0] // 2
        bias = self.tensor(w['bias']) if 'bias' in w else None
        return self.F.conv2d(x, self.tensor(kernel.transpose(3, 2, 0, 1)), bias, stride, padding)

    def conv_transpose(self, x, w):
        kernel = np.asarray(w['kernel'])[::-1, ::-1]  # torch holds it turned by half a turn, as [in, out, h, w]
        return self.F.conv_transpose2d(x, self.tensor(kernel.transpose(2, 3, 0, 1).copy()), stride=2, padding=1)

    def norm(self, x, scale=None, bias=None):
        scale, bias = (None if a is None else self.tensor(a) for a in (scale, bias))
        return self.F.batch_norm(x, None, None, scale, bias, training=True, eps=1e-5)

    def up(self, x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def block(self, x, w, how, first=False, c=None):
        def activate(h, name):
            if c is not None:
                gain, shift = (self.dense(c, w[f'{name}_{what}'])[:, :, None, None] for what in ('gain', 'shift'))
                h = self.norm(h) * (1 + gain) + shift
            elif name in w:
                h = self.norm(h, w[name]['scale'], w[name]['bias'])
            return self.F.relu(h)

        h = x if first else activate(x, 'norm1')
        h = self.conv(self.up(h) if how == 'up' else h, w['conv1'])
        h = self.conv(activate(h, 'norm2'), w['conv2'])
        h = self.F.avg_pool2d(h, 2) if how == 'down' else h
        # Where the authors have them: resample, then 1x1, but pool after the 1x1 past the first block.
        if how == 'up':
            x = self.conv(self.up(x), w['shortcut'])
        elif first:
            x = self.conv(self.F.avg_pool2d(x, 2), w['shortcut'])
        elif how == 'down':
            x = self.F.avg_pool2d(self.conv(x, w['shortcut']), 2)
        return x + h

    def attention(self, x, w):
        n, _, height, width = x.shape
        query = self.conv(x, w['query']).reshape(n, -1, height * width)
        key, value = (self.F.max_pool2d(self.conv(x, w[name]), 2).flatten(2) for name in ('key', 'value'))
        weights = self.torch.softmax(self.torch.bmm(query.transpose(1, 2), key), -1)
        out = self.torch.bmm(value, weights.transpose(1, 2)).reshape(n, -1, height, width)
        return x + float(w['gain']) * self.conv(out, w['out'])

    def generate(self, z, w, base, levels):
        x = self.dense(self.tensor(z), w['first'])
        x = x.reshape(len(z), *base, -1).permute(0, 3, 1, 2)
        for i in range(levels):
            x = self.block(x, w[f'block{i}'], 'up')
        x = self.F.relu(self.norm(x, w['norm']['scale'], w['norm']['bias']))
        return self.torch.tanh(self.conv(x, w['last'])).permute(0, 2, 3, 1).numpy()

    def criticise(self, x, w, hows):
        x = self.tensor(x).permute(0, 3, 1, 2)
        for i, how in enumerate(hows):
            x = self.block(x, w[f'block{i}'], how, first=i == 0)
        return self.dense(self.F.relu(x).mean((2, 3)), w['verdict']['value'])[:, 0].numpy()


def made(network: nn.Module, seed: int, *inputs, train: bool = False):
    """Random weights of a network, and what it makes of the inputs."""
    weights = randomised(jax.jit(network.init)(jax.random.key(seed), *inputs)['params'], seed)
    out, _ = jax.jit(lambda w: network.apply({'params': w}, *inputs, train=train, mutable=['batch_stats']))(weights)
    return weights, out


@slow
def test_residual_networks_equal_torch():
    torch = Torch()
    z = jax.random.normal(jax.random.key(0), (6, 7))
    weights, got = made(networks.ResidualGenerator((16, 8, 3), 5), 1, z, train=True)
    assert got.shape == (6, 16, 8, 3) and np.abs(got).mean() < 0.95
    np.testing.assert_allclose(got, torch.generate(np.asarray(z), weights, (2, 1), 3), atol=2e-4)

    x = jax.random.normal(jax.random.key(3), (4, 16, 8, 3))
    weights, got = made(networks.ResidualDiscriminator(5), 4, x)
    want = torch.criticise(np.asarray(x), weights, ('down', 'down', '', ''))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@slow
def test_dcgan_equals_torch():
    torch = Torch()
    z = jax.random.normal(jax.random.key(0), (6, 7))
    weights, got = made(networks.DcganGenerator((8, 16, 3), 4, (2, 1)), 1, z, train=True)
    x = torch.dense(torch.tensor(z), weights['first']).reshape(6, 2, 4, 8).permute(0, 3, 1, 2)
    for i in range(2):
        norm = weights[f'norm{i}']
        x = torch.conv_transpose(torch.F.relu(torch.norm(x, norm['scale'], norm['bias'])), weights[f'up{i}'])
    np.testing.assert_allclose(got, torch.torch.tanh(x).permute(0, 2, 3, 1), atol=1e-5)

    x = jax.random.normal(jax.random.key(3), (5, 8, 16, 3))
    for norm in (True, False):
        weights, got = made(networks.DcganDiscriminator(4, (2, 1), norm), 4, x, train=True)
        assert ('norm1' in weights) == norm and 'norm0' not in weights
        h = torch.F.leaky_relu(torch.conv(torch.tensor(x).permute(0, 3, 1, 2), weights['conv0'], 2), 0.2)
        h = torch.conv(h, weights['conv1'], 2)
        h = torch.norm(h, weights['norm1']['scale'], weights['norm1']['bias']) if norm else h
        h = torch.F.leaky_relu(h, 0.2).permute(0, 2, 3, 1).flatten(1)
        np.testing.assert_allclose(got, torch.dense(h, weights['verdict']['value'])[:, 0], rtol=1e-4, atol=1e-5)


@slow
def test_biggan_equals_torch():
    """Pieces of z and the shared embedding go to every norm, attention, sums over positions, projection."""
    torch = Torch()
    z, c = jax.random.normal(jax.random.key(0), (6, 9)), jax.nn.one_hot(jnp.arange(6) % 4, 4)
    common = dict(attention=(4,), projection=True)
    network = networks.ResidualGenerator((8, 8, 3), 4, (4, 2, 1), embedding=5, skip=True, **common)
    weights, got = made(network, 1, z, c, train=True)
    embedded, (first, *pieces) = np.asarray(c @ weights['embedding']), np.split(np.asarray(z), 3, -1)
    x = torch.dense(torch.tensor(first), weights['first']).reshape(6, 2, 2, 16).permute(0, 3, 1, 2)
    for i, piece in enumerate(pieces):
        x = torch.block(x, weights[f'block{i}'], 'up', c=torch.tensor(np.concatenate([piece, embedded], 1)))
        x = torch.attention(x, weights['attention0']) if i == 0 else x
    x = torch.F.relu(torch.norm(x, weights['norm']['scale'], weights['norm']['bias']))
    x = torch.torch.tanh(torch.conv(x, weights['last'])).permute(0, 2, 3, 1)
    np.testing.assert_allclose(got, x, atol=2e-4)

    x = jax.random.normal(jax.random.key(3), (6, 8, 8, 3))
    weights, got = made(networks.ResidualDiscriminator(4, (4, 2, 1), 2, pooling='sum', **common), 4, x, c)
    h = torch.block(torch.tensor(x).permute(0, 3, 1, 2), weights['block0'], 'down', first=True)
    h = torch.attention(h, weights['attention0'])
    for i, how in ((1, 'down'), (2, '')):
        w = weights[f'block{i}']
        h = torch.block(h, w, how) if 'shortcut' not in w or how else torch.conv(h, w['shortcut']) + plain(torch, h, w)
    h = torch.F.relu(h).sum((2, 3))
    want = torch.dense(h, weights['verdict']['value'])[:, 0]
    want = want + (torch.dense(torch.tensor(c), weights['verdict']['embedding']) * h).sum(1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def plain(torch: Torch, x, w):
    """The branch of a block that keeps the size and has no norm."""
    return torch.conv(torch.F.relu(torch.conv(torch.F.relu(x), w['conv1'])), w['conv2'])


def test_condition_by_concatenation_is_more_channels():
    z, x, c = jnp.ones((2, 3)), jnp.ones((2, 4, 4, 1)), jnp.eye(2)
    assert networks.concat_condition(z, c).tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]
    maps = networks.concat_condition(x, c)
    assert maps.shape == (2, 4, 4, 3) and (maps[0, ..., 1] == 1).all() and (maps[0, ..., 2] == 0).all()
    assert networks.concat_condition(x, None) is x


# --- spectral normalisation, see also tests/networks/spectral_test.py


@pytest.mark.parametrize('accumulate', [1, 2])
@slow
def test_vectors_take_one_iteration_with_each_step_of_their_network(accumulate):
    optim = adam(accumulate=accumulate, ema=0.9)
    f = family(optim=optim, base=MLP, spectral=('generator', 'discriminator'), discriminator_steps=3)
    batch = images(12)
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    after, _ = jax.jit(f.update)(state, {}, batch, jax.random.key(1))
    # The generator's step reads its weights before the step, and so does the iteration; its average is made after.
    _, want = spectral.normalise(state.params['generator'], state.extra['generator']['vectors'])
    chex.assert_trees_all_close(after.extra['generator']['vectors'], want, atol=1e-5)
    _, want = spectral.normalise(after.ema['generator'], state.extra['average']['vectors'])
    chex.assert_trees_all_close(after.extra['average']['vectors'], want, atol=1e-5)
    # Three steps of the discriminator with a rate of 0: three iterations at one place.
    still = family(optim=adam(name='sgd', lr=0.0), base=MLP, spectral=('discriminator',), discriminator_steps=3)
    state = jax.jit(still.init)(jax.random.key(0), batch, {})
    after, _ = jax.jit(still.update)(state, {}, batch, jax.random.key(1))
    want = state.extra['discriminator']['vectors']
    for _ in range(3):
        _, want = spectral.normalise(state.params['discriminator'], want)
    chex.assert_trees_all_close(after.extra['discriminator']['vectors'], want, atol=1e-5)
    assert state.extra['generator']['vectors'] == {}


@slow
def test_what_starts_at_zero_has_no_norm():
    """SAGAN: residual networks conditioned by projection, both with spectral normalisation."""
    f = family(
        classes=3, conditional='projection', network=dict(attention=(8,)), spectral=('generator', 'discriminator')
    )
    batch = images(6, classes=3)
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    after, logs = jax.jit(f.update)(state, {}, batch, jax.random.key(1))
    chex.assert_tree_all_finite((after.params, logs))
    gains = after.params['generator']['block0']['norm1_gain']
    assert gains.shape[0] == 3 and np.abs(gains).max() > 0


def test_samples_are_of_normalised_weights():
    f = family(base=MLP, spectral=('generator',))
    state = jax.jit(f.init)(jax.random.key(0), images(4), {})
    for _ in range(100):
        _, vectors = spectral.normalise(state.ema['generator'], state.extra['average']['vectors'])
        state = state.replace(extra={**state.extra, 'average': {'vectors': vectors, 'batch_stats': {}}})
    z = jax.random.normal(jax.random.key(1), (4, 3))
    weights = {
        name: {**w, 'kernel': w['kernel'] / np.linalg.norm(w['kernel'], 2)}
        for name, w in state.ema['generator'].items()
    }
    want = networks.PerceptronGenerator((8, 8, 1), (8,)).apply({'params': weights}, z)
    np.testing.assert_allclose(f.decode(state, {}, {}, z, jax.random.key(2)), want, atol=1e-5)


@slow
def test_an_empty_state_beside_the_weights_comes_back(tmp_path):
    """Perceptrons without normalisation have no statistics and no vectors; their run goes on and draws all the same."""
    from jaxgen import checkpoint, sharding

    f = family(base=MLP)
    state = jax.jit(f.init)(jax.random.key(0), images(3), {})
    assert not jax.tree.leaves(state.extra)
    checkpoints = checkpoint.Checkpoints(str(tmp_path), 1)
    checkpoints.save(state.replace(step=jnp.int32(2)), {'examples': 6, 'meter': {}, 'jax': jax.__version__})
    checkpoints.wait()
    mesh = sharding.make_mesh(1)
    for items in (checkpoint.ITEMS, ('ema', 'extra')):
        again, _ = checkpoints.restore(jax.eval_shape(lambda: state), mesh, items)
        assert again.extra == state.extra
    checkpoints.close()


# --- the update


@slow
def test_several_steps_equal_a_loop_and_schedules_go_by_updates():
    optim = adam(schedule='linear', warmup=2, b1=0.9)
    batch = {'x': jax.random.normal(jax.random.key(0), (12, 3))}

    def loss(params, state, frozen, batch, rng):
        noise = jax.random.normal(rng, ())
        value = jnp.square(batch['x'] @ params['critic'] - noise * params['generator']).mean()
        return value, Aux({'loss': value})

    params = {'critic': jnp.array([1.0, -2.0, 0.5]), 'generator': jnp.float32(1.0)}
    state = new_state(params, optim)
    steps = jax.jit(gradient_step(loss, optim, 'critic', times=4))
    plain, opt = params['critic'], optim.tx('critic').init(params['critic'])
    # Linear rise over 2 updates, then linear fall to 0 at update 8.
    rates = [0.5e-2, 1e-2, 1e-2, 1e-2 * 5 / 6]
    for update, rate in enumerate(rates):
        key = jax.random.key(update)
        state, aux = steps(state, {}, batch, key)
        adam_alone = optax.scale_by_adam(0.9, 0.9, 1e-8)
        if update == 0:
            opt = adam_alone.init(plain)
        parts, losses = split_batch(batch, 4), []
        for i, k in enumerate(jax.random.split(key, 4)):
            part = {'x': parts['x'][i]}
            assert np.array_equal(part['x'], batch['x'][i::4])
            (value, _), gradient = jax.value_and_grad(
                lambda w, part=part, k=k: loss({**params, 'critic': w}, None, {}, part, k), has_aux=True
            )(plain)
            direction, opt = adam_alone.update(gradient, opt)
            plain = plain - rate * direction
            losses.append(value)
        np.testing.assert_allclose(state.params['critic'], plain, rtol=1e-5)
        np.testing.assert_allclose(aux.logs['loss'], np.mean(losses), rtol=1e-5)
    assert float(state.params['generator']) == 1.0, 'the other network is not touched'


def test_a_loss_reads_the_state_and_kept_arrays_are_stored_step_by_step():
    optim = adam(name='sgd', lr=1.0, accumulate=2)

    def loss(params, state, frozen, batch, rng):
        value = params['w'] * batch['x'].mean()
        return value, Aux({'loss': value}, {'sum': state.extra['sum'] + batch['x'].mean()})

    state = new_state({'w': jnp.float32(0)}, optim, extra={'sum': jnp.float32(0), 'other': jnp.float32(7)})
    batch = {'x': jnp.arange(12.0)}
    steps = repeat(store(gradient_step(loss, steps_within_update(optim, 3), 'w')), 3)
    after, aux = steps(state, {}, batch, jax.random.key(0))
    # Step i sees the mean of i, i + 3, ...: 4.5, 5.5, 6.5.
    assert float(after.extra['sum']) == 4.5 + 5.5 + 6.5 and float(after.extra['other']) == 7
    assert set(aux.logs) == {'loss', 'grad_norm/w'} and aux.kept is None
    np.testing.assert_allclose(after.params['w'], -16.5)
    # Not stored, it is left to the family: a mean over the parts of the accumulated gradient, and over the steps.
    after, aux = gradient_step(loss, optim, 'w', times=3)(state, {}, batch, jax.random.key(0))
    assert float(after.extra['sum']) == 0 and float(aux.kept['sum']) == (4.5 + 5.5 + 6.5) / 3


@slow
def test_update_equals_the_papers_algorithm_written_out():
    # Plain gradient descent: Adam would blow the rounding of a bias in front of a norm up to whole steps.
    f = family(dequantise=False, optim=adam(name='sgd'))
    batch, key = images(3 * 4), jax.random.key(11)
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    got, logs = jax.jit(f.update)(state, {}, batch, key)

    generator = networks.ResidualGenerator((8, 8, 1), 4, (1, 1))
    critic = networks.ResidualDiscriminator(4, (1, 1), 1)
    tx = optax.sgd(1e-2)

    def images_of(weights, z):
        return generator.apply({'params': weights}, z, train=True, mutable=['batch_stats'])

    @jax.jit
    def critic_step(weights, opt, g, real, key):
        z_key, _, share_key, _ = jax.random.split(key, 4)
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
    weights, g = state.params['discriminator'], state.params['generator']
    opt, values = tx.init(weights), []
    for i, k in enumerate(jax.random.split(critic_key, 3)):
        weights, opt, value = critic_step(weights, opt, g, batch['image'][i::3], k)
        values.append(value)

    z = jax.random.normal(z_key, (8, 6))

    def generator_loss(g):
        return -critic.apply({'params': weights}, images_of(g, z)[0]).mean()

    value, gradient = jax.jit(jax.value_and_grad(generator_loss))(g)
    g = optax.apply_updates(g, tx.update(gradient, tx.init(g))[0])

    np.testing.assert_allclose(logs['discriminator_loss'], np.mean(values), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(logs['generator_loss'], value, rtol=1e-3, atol=1e-4)
    for network, want in (('discriminator', weights), ('generator', g)):
        chex.assert_trees_all_close(got.params[network], want, atol=2e-5)
    average = jax.tree.map(lambda a, b: (a + b) / 2, state.params['generator'], got.params['generator'])
    chex.assert_trees_all_close(got.ema['generator'], average, atol=1e-6)
    _, first = images_of(got.ema['generator'], z)
    chex.assert_trees_all_close(got.extra['average']['batch_stats'], first['batch_stats'], atol=1e-4)


@slow
def test_neither_step_touches_the_other_network():
    batch = images(6)
    start = jax.jit(family(base=MLP).init)(jax.random.key(0), batch, {})
    for moving, still in (('generator', 'discriminator'), ('discriminator', 'generator')):
        f = family(base=MLP, discriminator_steps=3, optim=adam(networks={still: dict(name='sgd', lr=0.0)}))
        state = jax.jit(f.init)(jax.random.key(0), batch, {})
        after, _ = jax.jit(f.update)(state, {}, batch, jax.random.key(1))
        chex.assert_trees_all_equal(after.params[still], start.params[still])
        changed = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params[moving], start.params[moving])
        assert min(jax.tree.leaves(changed)) > 1e-3
        # Each optimiser counts the steps of its own network only.
        counts = {int(leaf) for leaf in jax.tree.leaves(after.opt[moving]) if jnp.issubdtype(leaf.dtype, jnp.integer)}
        assert counts == {3 if moving == 'discriminator' else 1}


@slow
def test_clipped_weights_are_the_discriminators():
    f = family(base=MLP, adversarial='wasserstein', weight_clip=0.03, discriminator_steps=2, optim=adam(lr=0.02))
    batch = images(4)
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    after, _ = jax.jit(f.update)(state, {}, batch, jax.random.key(1))
    free = family(base=MLP, adversarial='wasserstein', discriminator_steps=2, optim=adam(lr=0.02))
    free = jax.jit(free.update)(free.init(jax.random.key(0), batch, {}), {}, batch, jax.random.key(1))[0]
    sizes = {n: max(float(np.abs(w).max()) for w in jax.tree.leaves(after.params[n])) for n in after.params}
    assert sizes['discriminator'] == pytest.approx(0.03) and sizes['generator'] > 0.1
    # The first step of both is from the same weights: the clipped ones are the others, cut off.
    within = [np.abs(b) < 0.02 for b in jax.tree.leaves(free.params['discriminator'])]
    assert any(w.any() for w in within)


@slow
def test_lazy_penalty_is_the_eager_one_in_the_mean():
    batch = images(4)
    penalties = {}
    for every in (1, 3):
        optim = adam(name='sgd', lr=0.0)
        f = family(base=MLP, r1=5.0, r1_every=every, optim=optim)
        state, update, logs = jax.jit(f.init)(jax.random.key(0), batch, {}), jax.jit(f.update), []
        for i in range(6):
            state, line = update(state, {}, batch, jax.random.key(i))
            logs.append(line)
        penalties[every] = np.array([float(line['r1']) for line in logs])
        losses = np.array([float(line['discriminator_loss']) for line in logs])
        plain = family(base=MLP, optim=optim)
        _, line = jax.jit(plain.update)(plain.init(jax.random.key(0), batch, {}), {}, batch, jax.random.key(0))
        np.testing.assert_allclose(losses[0] - line['discriminator_loss'], 5 * penalties[every][0], rtol=1e-3)
    assert penalties[1].min() > 0 and (penalties[3] > 0).tolist() == [True, False, False] * 2
    np.testing.assert_allclose(penalties[3].mean(), penalties[1].mean(), rtol=1e-5)


@slow
def test_samples_are_normalised_as_a_large_batch_of_them():
    f = family(base=DCGAN, optim=adam(networks={'generator': dict(lr=0.0)}), generator_batch=64)
    batch = images(2)
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    state = state.replace(ema={'generator': randomised(state.params['generator'], 1)})
    state = state.replace(params={**state.params, 'generator': state.ema['generator']})
    update = jax.jit(f.update)
    for i in range(12):
        state, _ = update(state, {}, batch, jax.random.key(i))
    batch = {'index': jnp.arange(2000, dtype=jnp.int32)}
    drawn = jax.jit(f.sample)(state, {}, batch, jax.random.key(5))
    z = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(5), i), (5,)))(batch['index'])
    generator = networks.DcganGenerator((8, 8, 1), 3, (2, 1))
    by_batch, _ = generator.apply({'params': state.ema['generator']}, z, train=True, mutable=['batch_stats'])
    assert np.abs(drawn - by_batch).mean() < 0.05 < np.abs(drawn).std()
    few = f.sample(state, {}, {'index': jnp.array([7])}, jax.random.key(5))
    np.testing.assert_allclose(few[0], drawn[7], atol=1e-5)


@pytest.mark.parametrize('truncation', [0.2, 0.5])
@slow
def test_truncated_samples_have_the_statistics_of_truncated_latents(truncation):
    """Against one large batch of other truncated latents, normalised by itself."""
    base = dict(base=DCGAN, classes=3, conditional='concat', generator_batch=32)
    f = family(**base, truncation=truncation)
    state = jax.jit(f.init)(jax.random.key(0), images(4, classes=3), {})
    state = state.replace(ema={'generator': randomised(state.params['generator'], 1)})
    generator, c = networks.DcganGenerator((8, 8, 1), 3, (2, 1)), jax.nn.one_hot(jnp.arange(3000) % 3, 3)

    def normalised_by_itself(z):
        return generator.apply({'params': state.ema['generator']}, z, c, train=True, mutable=['batch_stats'])

    # What training gathered: of all of N(0, I).
    _, gathered = normalised_by_itself(jax.random.normal(jax.random.key(1), (3000, 5)))
    average = {**state.extra['average'], **gathered}
    state = state.replace(extra={**state.extra, 'average': average})

    batch = {'index': jnp.arange(3000, dtype=jnp.int32), 'label': jnp.arange(3000, dtype=jnp.int32) % 3}
    drawn = jax.jit(f.sample)(state, {}, batch, jax.random.key(5))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(batch['index'])
    z = jax.vmap(lambda key: jax.random.truncated_normal(key, -truncation, truncation, (5,)))(keys)
    matching, _ = normalised_by_itself(z)
    variables = {'params': state.ema['generator'], **gathered}
    by_training = generator.apply(variables, z, c)
    error = np.abs(drawn - matching).mean()
    assert error < 0.03 and error < 0.3 * np.abs(by_training - matching).mean()
    np.testing.assert_allclose(drawn.std(), matching.std(), rtol=0.05)

    few = jax.jit(f.sample)(state, {}, {k: v[7:8] for k, v in batch.items()}, jax.random.key(5))
    np.testing.assert_allclose(few[0], drawn[7], atol=1e-5)
    other = f.decode(state, {}, {'label': jnp.arange(3)}, z[:3], jax.random.key(0))  # latents of no truncation
    np.testing.assert_allclose(other, by_training[:3], atol=1e-5)


def test_truncated_samples_are_of_z_within_the_bound():
    f = family(base=MLP, truncation=0.5)
    state = jax.jit(f.init)(jax.random.key(0), images(4), {})
    index = jnp.arange(50, dtype=jnp.int32)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(index)
    z = jax.vmap(lambda k: jax.random.truncated_normal(k, -0.5, 0.5, (3,)))(keys)
    assert np.abs(z).max() < 0.5 and np.ptp(z) > 0.9
    got = f.sample(state, {}, {'index': index}, jax.random.key(3))
    np.testing.assert_allclose(got, f.decode(state, {}, {}, z, jax.random.key(0)), atol=1e-6)


@slow
def test_both_penalties_and_dequantisation_are_in_the_loss():
    batch = images(3)

    def logs(**model):
        f = family(base=MLP, adversarial='wasserstein', penalty=10.0, dequantise=True, **model)
        state = jax.jit(f.init)(jax.random.key(0), batch, {})
        # A critic as good as flat: slopes are far below 1.
        flat = jax.tree.map(lambda w: 1e-3 * w, state.params['discriminator'])
        state = state.replace(params={**state.params, 'discriminator': flat})
        return jax.jit(f.update)(state, {}, batch, jax.random.key(1))[1]

    two, one = logs(), logs(one_sided=True)
    assert abs(float(two['penalty']) - 1) < 0.01 and float(one['penalty']) == 0
    np.testing.assert_allclose(two['discriminator_loss'] - one['discriminator_loss'], 10 * two['penalty'], rtol=1e-4)


@pytest.mark.parametrize('base, conditional', [(MLP, 'concat'), (DCGAN, 'projection')])
@slow
def test_both_networks_are_conditioned_on_the_class(base, conditional):
    f = family(base=base, conditional=conditional, classes=3)
    batch = images(6, classes=3)
    state, _ = jax.jit(f.update)(f.init(jax.random.key(0), batch, {}), {}, batch, jax.random.key(1))
    assert f.conditions == ('label',)
    index = jnp.array([5, 5, 6])
    given = {'index': index, 'label': jnp.array([0, 1, 0])}
    drawn = f.sample(state, {}, given, jax.random.key(2))
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-4 and np.abs(drawn[0] - drawn[2]).max() > 1e-4
    z = normal(example_keys(jax.random.key(2), given), f.latents.shape)
    np.testing.assert_allclose(f.decode(state, {}, given, z, None), drawn, atol=1e-6)
    x = {'image': jnp.broadcast_to(batch['image'][:1], (3, 8, 8, 1)), 'label': jnp.arange(3)}
    values = f.evaluate(state, {}, x, jax.random.key(3))['discriminator']
    assert np.ptp(values) > 1e-6, 'the discriminator does not look at the class'


@slow
def test_evaluate_scores_with_the_discriminator():
    f = family()
    state = jax.jit(f.init)(jax.random.key(0), images(3), {})
    scores = f.evaluate(state, {}, images(5), jax.random.key(1))
    assert set(scores) == {'discriminator'} and scores['discriminator'].shape == (5,)
    assert np.ptp(scores['discriminator']) > 0


WRONG = [
    *(({name: 0}, f'{name} must be 1 or more') for name in ('discriminator_steps', 'latent', 'r1_every')),
    *(({name: -1.0}, f'{name} must be 0 or more') for name in ('penalty', 'weight_clip', 'r1', 'truncation')),
    *(({name: 'none'}, f'{name} must be one of') for name in ('adversarial', 'conditional')),
    *(({name: ('none',)}, f'{name} must be one of') for name in ('spectral', 'augmentation')),
    ({'network': 'none'}, 'network.name must be one of'),
    ({'network': {'width': 0}}, 'network.width must be 1 or more'),
    ({'network': {'pooling': 'none'}}, 'network.pooling must be one of'),
    ({'network': {'multipliers': (1,) * 5}}, 'multiple of 16 for config.model.network.multipliers'),
    ({'network': {'multipliers': (1,)}}, 'network.multipliers must be two numbers or more'),
    ({'network': {'attention': (16,)}}, 'network.attention: heights must be even'),
    ({'network': {'halvings': 9}}, 'too few for halvings = 9'),
    ({'network': {'hidden': (3,)}}, 'network.hidden: no such field'),
    ({'network': {'name': 'biggan'}, 'latent': 7}, 'config.model.latent = 7 must be a multiple'),
    ({'network': {'name': 'dcgan', 'multipliers': (1,)}}, 'set config.model.network.discriminator_norm = False'),
    ({'network': {'name': 'dcgan', 'multipliers': ()}}, 'network.multipliers must be one number or more'),
    ({'conditional': 'concat'}, 'config.model.conditional needs labels'),
]


@pytest.mark.parametrize('model, message', WRONG, ids=[str(model) for model, _ in WRONG])
def test_mistakes_are_one_line(model, message, no_compile):
    with pytest.raises(UserError) as error:
        family(**model)
    assert message in str(error.value) and '\n' not in str(error.value)


@slow
def test_says_that_the_batch_does_not_fit(no_compile):
    def start(n, **optim):
        return jax.eval_shape(lambda: family(optim=adam(**optim)).init(jax.random.key(0), images(n), {}))

    with pytest.raises(UserError, match=r'multiple of 3: config\.model\.discriminator_steps'):
        start(4)
    with pytest.raises(UserError, match='multiple of 6'):
        start(3, accumulate=2)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((4, 2), ('data', 'fsdp'))):
        with pytest.raises(UserError, match=r'multiple of 24: .* makes 3 parts, each for 8 devices'):
            start(12)
        start(24)
