"""Energy-based models: chains, the buffer of chains, the loss's gradient and both networks against slow ones."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from support import optimiser, sgd

from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import ebm
from jaxgen.networks import energy as energies
from jaxgen.networks import spectral
from jaxgen.networks.energy import ResidualEnergy
from jaxgen.networks.wide_resnet import WideResNet

slow = pytest.mark.slow  # compiles networks or trains

try:
    import torch
except ImportError:  # it comes with [bench]
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason='without torch')

SMALL = dict(
    network='wide_resnet', width=4, multipliers=(1,), blocks=1, buffer=12, steps=3, step=0.5, noise=0.1, clamp=0.0,
    bounded=False, regulariser=0.1, sample_steps=3,
)  # fmt: skip


def family(image=(4, 4, 1), classes=0, optim=None, **model):
    return ebm.build(Context(image, classes, optim or sgd(0.01)), **{**SMALL, **model})


def images(n: int = 6, image=(4, 4, 1), seed: int = 0) -> dict:
    keys = jax.random.split(jax.random.key(seed))
    return {
        'image': jax.random.uniform(keys[0], (n, *image), minval=-1, maxval=1),
        'label': jax.random.randint(keys[1], (n,), 0, 3),
    }


# --- chains


@pytest.mark.parametrize(('clamp', 'bounded'), [(0.0, False), (0.3, True)])
def test_chains_against_a_loop(clamp, bounded):
    """On E = sum of a x^2 / 2, with the noise that each chain's key gives it."""
    a = np.linspace(0.5, 2, 6).reshape(2, 3, 1)
    x = np.random.default_rng(0).uniform(-1, 1, (4, 2, 3, 1))
    keys = jax.random.split(jax.random.key(1), 4)
    last, images = ebm.langevin(
        lambda x: (jnp.float32(a) * x**2 / 2).sum((1, 2, 3)), jnp.float32(x), keys,
        steps=7, step=0.4, noise=0.2, clamp=clamp, bounded=bounded, trajectory=True,
    )  # fmt: skip
    for k in range(7):
        for i in range(4):
            slope = a * x[i]
            if clamp:
                slope = np.minimum(np.maximum(slope, -clamp), clamp)
            x[i] = x[i] - 0.4 * slope + 0.2 * np.asarray(jax.random.normal(jax.random.fold_in(keys[i], k), (2, 3, 1)))
            if bounded:
                x[i] = np.minimum(np.maximum(x[i], -1), 1)
        np.testing.assert_allclose(images[k], x, atol=1e-5)
    np.testing.assert_array_equal(last, images[-1])


def test_chains_with_langevins_noise_have_the_right_moments():
    """x' = (1 - step / s^2) x + sqrt(2 step) eps: variance s^2 / (1 - step / (2 s^2)), which tends to s^2."""
    s, step, mean = 0.7, 0.1, 0.4
    x, _ = ebm.langevin(
        lambda x: jnp.square(x - mean).sum((1, 2, 3)) / (2 * s**2), jnp.zeros((4000, 2, 2, 1)),
        jax.random.split(jax.random.key(0), 4000), steps=60, step=step, noise=math.sqrt(2 * step), clamp=0.0,
        bounded=False,
    )  # fmt: skip
    np.testing.assert_allclose(x.mean(), mean, atol=0.03)
    np.testing.assert_allclose(x.var(), s**2 / (1 - step / (2 * s**2)), rtol=0.04)


# --- the buffer


@slow
def test_drawn_chains_are_different_ones_and_some_are_new():
    memory = jnp.arange(1, 201, dtype=jnp.float32)[:, None, None, None] * jnp.ones((1, 2, 2, 1)) * 10
    new, drawn = 0, set()
    for seed in range(10):
        indices, x = jax.jit(ebm.draw_chains, static_argnums=(2, 3))(memory, jax.random.key(seed), 150, 0.2)
        assert len(set(indices.tolist())) == 150
        fresh = np.abs(x).max((1, 2, 3)) <= 1
        np.testing.assert_array_equal(x[~fresh], memory[indices[~fresh]])
        new, drawn = new + fresh.sum(), drawn | set(indices.tolist())
    assert len(drawn) == 200 and abs(new / 1500 - 0.2) < 0.04
    indices, x = ebm.draw_chains(memory, jax.random.key(0), 200, 0.0)
    assert sorted(indices.tolist()) == list(range(200)), 'a batch as large as the buffer takes every chain'
    np.testing.assert_array_equal(x, memory[indices])


@slow
def test_buffer_against_a_slow_one():
    """Three updates: the drawn entries are replaced by where their chains went, and no other is touched."""
    f, batch = family(fresh=0.3), images(5)
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    update, slow = jax.jit(f.update), np.array(state.extra['buffer'])
    assert slow.shape == (12, 4, 4, 1) and np.abs(slow).max() <= 1 and abs(slow.std() - 1 / math.sqrt(3)) < 0.1
    net = WideResNet(4, (1,), 1, 1)
    slope = jax.jit(jax.grad(lambda x, w: -net.apply({'params': w}, x).sum()))
    for seed in range(3):
        draw_rng, chain_rng, _ = jax.random.split(jax.random.key(seed), 3)
        indices, x = ebm.draw_chains(jnp.asarray(slow), draw_rng, 5, 0.3)
        for k in range(3):
            eps = [jax.random.normal(jax.random.fold_in(jax.random.fold_in(chain_rng, i), k), (4, 4, 1))
                   for i in range(5)]  # fmt: skip
            x = x - 0.5 * slope(x, state.params['energy']) + 0.1 * jnp.stack(eps)
        for i, image in zip(indices, x, strict=True):
            slow[i] = image
        state, logs = update(state, {}, batch, jax.random.key(seed))
        np.testing.assert_allclose(state.extra['buffer'], slow, atol=1e-5)
    assert logs['moved'] > 0


@slow
def test_accumulation_changes_nothing():
    batch, states = images(6), []
    state = jax.jit(family(classes=3, joint=True).init)(jax.random.key(0), batch, {})
    for m in (1, 3):
        f = family(optim=sgd(0.1, m), classes=3, joint=True)
        states.append(jax.jit(f.update)(state, {}, batch, jax.random.key(1)))
    (one, logs), (three, parts) = states
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.params, three.params)
    np.testing.assert_allclose(one.extra['buffer'], three.extra['buffer'], atol=1e-5)
    np.testing.assert_allclose(logs['loss'], parts['loss'], atol=1e-5)


# --- the loss


@slow
@needs_torch
def test_loss_is_that_of_the_papers():
    """The update's gradient against torch's autograd of logsumexp, on the chains that it ran."""
    f, batch = family(classes=3, joint=True, regulariser=0.2, classification=0.7, optim=sgd(1.0)), images()
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    after, logs = jax.jit(f.update)(state, {}, batch, jax.random.key(1))
    indices, _ = ebm.draw_chains(state.extra['buffer'], jax.random.split(jax.random.key(1), 3)[0], 6, 0.05)
    chains = after.extra['buffer'][indices]

    oracle, weights = torch_wide(state.params['energy'], 1, 1, 3)
    real = oracle(to_torch(batch['image']))
    e_real, e_drawn = -real.logsumexp(1), -oracle(to_torch(chains)).logsumexp(1)
    entropy = torch.nn.functional.cross_entropy(real, torch.tensor(np.asarray(batch['label'], np.int64)))
    value = (e_real - e_drawn).mean() + 0.2 * (e_real**2 + e_drawn**2).mean() + 0.7 * entropy
    value.backward()
    np.testing.assert_allclose(logs['loss'], value.item(), rtol=1e-5)
    np.testing.assert_allclose(logs['cross_entropy'], entropy.item(), rtol=1e-5)
    for path, weight in weights.items():
        ours = get(state.params['energy'], path) - get(after.params['energy'], path)
        np.testing.assert_allclose(ours, ours_like(weight.grad, path), atol=2e-5, err_msg='/'.join(path))


@slow
def test_energies_that_explode_stop_the_training():
    batch = images()
    for limit, stops in ((1e4, False), (1e-3, True)):
        f = family(limit=limit)
        state = jax.jit(f.init)(jax.random.key(0), batch, {})
        _, logs = jax.jit(f.update)(state, {}, batch, jax.random.key(1))
        assert np.isinf(logs['energy/largest']) == stops
    lost = state.replace(extra={**state.extra, 'buffer': jnp.full_like(state.extra['buffer'], jnp.nan)})
    _, logs = jax.jit(f.update)(lost, {}, batch, jax.random.key(1))
    assert np.isinf(logs['energy/largest']) and np.isnan(logs['loss'])


# --- networks


def to_torch(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def get(tree: dict, path: tuple[str, ...]):
    for key in path:
        tree = tree[key]
    return np.asarray(tree)


def ours_like(weight: torch.Tensor, path: tuple[str, ...]) -> np.ndarray:
    """A torch weight laid out as ours; our shortcut is a linear map of every pixel."""
    weight = weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight.mT if weight.ndim == 2 else weight
    return weight[0, 0].numpy() if 'shortcut' in path and weight.ndim == 4 else weight.numpy()


def theirs(params: dict) -> dict[tuple[str, ...], torch.Tensor]:
    """Our weights as torch lays them out, by path."""
    weights = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path, x = tuple(p.key for p in path), torch.tensor(np.asarray(leaf))
        if 'shortcut' in path and x.ndim == 2:
            x = x[None, None]
        weights[path] = (x.permute(3, 2, 0, 1) if x.ndim == 4 else x.mT if x.ndim == 2 else x).contiguous()
        weights[path].requires_grad_()
    return weights


def torch_wide(params: dict, groups: int, blocks: int, outputs: int):
    """The wide network in torch on our weights, and these weights."""
    w, F = theirs(params), torch.nn.functional

    def conv(x, *path, **how):
        return F.conv2d(x, w[(*path, 'kernel')], w[(*path, 'bias')], **how)

    def apply(x):
        x = conv(x, 'first', padding=1)
        for i in range(groups):
            for j in range(blocks):
                name, stride = f'block{i}_{j}', 2 if i and not j else 1
                h = conv(F.leaky_relu(x, 0.2), name, 'conv1', padding=1)
                h = conv(F.leaky_relu(h, 0.2), name, 'conv2', padding=1, stride=stride)
                x = h + (conv(x, name, 'shortcut', stride=stride) if (name, 'shortcut', 'kernel') in w else x)
        x = F.leaky_relu(x, 0.2)
        x = F.avg_pool2d(x, x.shape[-1]).flatten(1)
        return F.linear(x, w[('outputs', 'kernel')], w[('outputs', 'bias')])

    return apply, w


def randomised(params: dict, seed: int = 0) -> dict:
    """Weights none of which is special."""
    rng = np.random.default_rng(seed)

    def one(leaf):
        fan = math.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 5
        return jnp.float32(rng.normal(size=leaf.shape) / math.sqrt(fan))

    return jax.tree.map(one, params)


@slow
@needs_torch
def test_wide_network_is_torchs():
    net, x = WideResNet(6, (1, 2, 3), 2, 5), images(3, (8, 8, 3))['image']
    params = randomised(jax.eval_shape(net.init, jax.random.key(0), x)['params'])
    np.testing.assert_allclose(
        jax.jit(net.apply)({'params': params}, x),
        torch_wide(params, 3, 2, 5)[0](to_torch(x)).detach().numpy(), atol=1e-5,
    )  # fmt: skip


@slow
@needs_torch
def test_residual_network_is_torchs():
    """With kernels normalised by exact singular values in torch, by many power steps here."""
    net, x = ResidualEnergy(6, (1, 2), 2, 1), images(3, (8, 8, 3))['image']
    params = randomised(jax.eval_shape(net.init, jax.random.key(0), x)['params'])
    params['block0_1']['conv2']['kernel'] *= 0.1  # below 1: left as it is
    vectors = jax.jit(energies.start_vectors, static_argnums=1)(params, 300)
    ours = jax.jit(lambda p, x: net.apply({'params': energies.normalise(p, vectors)}, x))(params, x)
    w, F = theirs(params), torch.nn.functional

    def conv(x, *path):
        kernel = w[(*path, 'kernel')]
        sigma = torch.linalg.matrix_norm(kernel.flatten(1), 2)
        return F.conv2d(x, kernel / (sigma.clamp(min=1) if path[-1] == 'conv2' else sigma), padding=1)

    h = F.leaky_relu(conv((to_torch(x) + 1) / 2, 'first'), 0.2)
    for name in ('block0_0', 'block0_1', 'block1_0', 'block1_1'):
        g = conv(h + w[(name, 'bias1')][:, None, None], name, 'conv1')
        g = conv(F.leaky_relu(g, 0.2) + w[(name, 'bias2')][:, None, None], name, 'conv2')
        h = (conv(h, name, 'shortcut') if (name, 'shortcut', 'kernel') in w else h) + g * w[(name, 'scale')][
            :, None, None
        ]
        h = F.leaky_relu(F.avg_pool2d(h, 2) if name.endswith('_0') else h, 0.2)
    e = F.linear(F.relu(h).sum((2, 3)), w[('outputs', 'kernel')], w[('outputs', 'bias')])
    np.testing.assert_allclose(ours, e.detach().numpy(), rtol=1e-3, atol=1e-4)


@slow
def test_gradient_of_a_normalised_kernel_is_that_of_the_exact_one():
    kernel = jnp.float32(np.random.default_rng(0).normal(size=(3, 3, 4, 5)))
    weight = jnp.float32(np.random.default_rng(1).normal(size=(3, 3, 4, 5)))
    params = {'conv1': {'kernel': kernel}}
    vectors = energies.start_vectors(params, 300)

    def exact(k):
        return (weight * k / jnp.linalg.norm(k.reshape(-1, 5), 2)).sum()

    def ours(k):
        return (weight * energies.normalise({'conv1': {'kernel': k}}, vectors)['conv1']['kernel']).sum()

    np.testing.assert_allclose(jax.grad(ours)(kernel), jax.grad(exact)(kernel), rtol=1e-3, atol=1e-4)


def test_singular_values_are_of_float32_on_every_device():
    """Where a product's precision is not given, GPUs and TPUs take shorter floats: the bound on the slope moves."""
    params = {'conv1': {'kernel': jnp.ones((3, 3, 4, 5))}}
    vectors = energies.start_vectors(params)
    programs = (
        jax.make_jaxpr(energies.normalise)(params, vectors),
        jax.make_jaxpr(energies.iterate)(params, vectors),
        jax.make_jaxpr(spectral.normalise)(params, vectors),
        jax.make_jaxpr(spectral.orthogonality)(params),
    )
    for program in programs:
        products = [e for e in program.eqns if e.primitive.name == 'dot_general']
        products += [e for q in program.eqns if q.primitive.name == 'jit' for e in q.params['jaxpr'].eqns
                     if e.primitive.name == 'dot_general']  # fmt: skip
        assert products
        assert all(e.params['precision'] == (jax.lax.Precision.HIGHEST,) * 2 for e in products)


def test_kernels_next_to_nothing_have_their_singular_value():
    """IGEBM's second convolutions start at 1e-10."""
    for size in (1e-10, 1e-13):
        kernel = size * jax.random.normal(jax.random.key(0), (3, 3, 4, 5))
        vectors = energies.start_vectors({'conv1': {'kernel': kernel}}, 300)
        got = energies.normalise({'conv1': {'kernel': kernel}}, vectors)['conv1']['kernel']
        want = np.linalg.svd(np.asarray(got, np.float64).reshape(-1, 5), compute_uv=False)[0]
        np.testing.assert_allclose(want, 1, rtol=1e-4)


@slow
def test_vectors_follow_the_weights():
    """In the state there are vectors of the weights and of their averages, and both are near the exact ones."""
    f, batch = family(network='residual', width=6, step=40.0, clamp=0.005), images(image=(4, 4, 1))
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    update = jax.jit(f.update)
    for i in range(10):
        state, _ = update(state, {}, batch, jax.random.key(i))
    for kind, vectors in state.extra['vectors'].items():
        weights = getattr(state, kind)['energy']
        kernel = energies.normalise(weights, vectors)['block0_0']['conv1']['kernel']
        np.testing.assert_allclose(jnp.linalg.norm(kernel.reshape(-1, 6), 2), 1, atol=0.02)


def test_size_of_the_published_networks():
    def count(net, x):
        params = jax.eval_shape(net.init, jax.random.key(0), x)['params']
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))

    x = jnp.zeros((1, 32, 32, 3))
    # Of JEM's published code, less two layers that take no part: WRN's own head, and that of an energy without classes.
    assert count(WideResNet(), x) == 36_478_389 - 6_410 - 641

    # What takes part in the published code's large network for CIFAR-10: kernels, a bias before each convolution of
    # a block, a scale after its second, and a shortcut of 3x3 where the channels change.
    def block(c, d):
        return 9 * c * d + 9 * d * d + c + 2 * d + (9 * c * d if c != d else 0)

    expected = 27 * 128 + 3 * block(128, 128) + block(128, 256) + 2 * block(256, 256) + block(256, 512)
    assert count(ResidualEnergy(), x) == expected + 2 * block(512, 512) + 512 + 1


# --- the family


@slow
def test_jem_classifies_by_its_logits():
    f, batch = family(classes=3, joint=True), images()
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    logits = f.classify(state, {}, {'image': batch['image']}, jax.random.key(1))
    assert logits.shape == (6, 3)
    metrics = f.evaluate(state, {}, {**batch, 'index': jnp.arange(6)}, jax.random.key(2))
    np.testing.assert_allclose(metrics['energy'], -jax.nn.logsumexp(logits, -1), rtol=1e-5)
    np.testing.assert_allclose(
        metrics['cross_entropy'], -jax.nn.log_softmax(logits)[jnp.arange(6), batch['label']], rtol=1e-5
    )
    np.testing.assert_array_equal(metrics['accuracy'], logits.argmax(-1) == batch['label'])
    assert family().classify is None


@slow
def test_where_samples_start():
    batch = images()
    for start in ('noise', 'buffer'):
        f = family(start=start, step=1e-6, noise=0.0)
        state = jax.jit(f.init)(jax.random.key(0), batch, {})
        state = state.replace(
            extra={**state.extra, 'buffer': jnp.arange(12.0)[:, None, None, None] / 12 + jnp.zeros((12, 4, 4, 1))}
        )
        x = np.asarray(f.sample(state, {}, {'index': jnp.arange(40)}, jax.random.key(3)))
        of_buffer = np.ptp(x.reshape(40, -1), axis=1) < 1e-3
        assert of_buffer.all() if start == 'buffer' else not of_buffer.any()
        if start == 'buffer':
            assert len(set(np.round(x[:, 0, 0, 0], 3).tolist())) > 6, 'entries are chosen by the keys'
        film = f.trajectory(state, {}, {'index': jnp.arange(40)}, jax.random.key(3))['x']
        assert film.shape == (3, 40, 4, 4, 1)
        np.testing.assert_allclose(film[-1], x, atol=1e-6)


def test_shuffled_pixels_keep_their_values_and_channels():
    x = images(4, (4, 4, 3))['image']
    y = ebm.shuffle_pixels(jax.random.split(jax.random.key(0), 4), x)
    for a, b in zip(np.asarray(x), np.asarray(y), strict=True):
        assert sorted(map(tuple, a.reshape(-1, 3))) == sorted(map(tuple, b.reshape(-1, 3))) and (a != b).any()


@slow
@pytest.mark.parametrize('joint', [False, True])
def test_energies_tell_digits_from_shuffled_pixels(joint):
    """A few updates on real digits: the area under the ROC curve, held-out digits against their shuffled pixels."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    x = jnp.float32(digits.images[order, :, :, None] / 8 - 1)
    label = jnp.int32(digits.target[order])
    optim = optimiser(optax.adam(2e-3))
    f = family(
        (8, 8, 1), 10, optim, width=16, multipliers=(1, 2), buffer=200, steps=10, step=2.0, noise=0.02, joint=joint,
        bounded=True, data_noise=0.05,
    )  # fmt: skip
    test = {'image': x[1500:], 'label': label[1500:], 'index': jnp.arange(len(x) - 1500)}
    state = jax.jit(f.init)(jax.random.key(0), {'image': x[:32], 'label': label[:32]}, {})

    def one(state, key):
        chosen = jax.random.choice(key, 1500, (32,))
        return f.update(state, {}, {'image': x[chosen], 'label': label[chosen]}, key)

    evaluate = jax.jit(f.evaluate)
    before = evaluate(state, {}, test, jax.random.key(2))
    keys = jax.random.split(jax.random.key(1), 200 if joint else 80)
    state, logs = jax.jit(lambda s, k: jax.lax.scan(one, s, k))(state, keys)
    metrics = evaluate(state, {}, test, jax.random.key(2))
    n = len(metrics['energy'])
    auc = roc_auc_score([1] * n + [0] * n, -np.concatenate([metrics['energy'], metrics['energy/shuffled']]))
    assert auc > 0.9 and metrics['below/shuffled'].mean() > 0.9, auc
    assert np.isfinite(logs['energy/largest']).all()
    if joint:
        assert metrics['accuracy'].mean() > 0.35, 'of ten classes'
        assert metrics['cross_entropy'].mean() < before['cross_entropy'].mean() - 0.3


@pytest.mark.parametrize('model', [
    dict(network='unet'), dict(start='data'), dict(buffer=0), dict(step=0.0), dict(noise=-0.1), dict(fresh=1.5),
    dict(clamp=-1.0), dict(limit=0.0), dict(joint=True), dict(network='residual', multipliers=(1, 2, 2)),
    dict(multipliers=()),
])  # fmt: skip
def test_says_what_is_wrong(model):
    with pytest.raises(UserError, match=r'config\.') as error:
        family(**model)
    assert '\n' not in str(error.value)


def test_a_batch_must_fit_into_the_buffer():
    f = family(buffer=5)
    with pytest.raises(UserError, match=r'config\.model\.buffer = 5 must hold at least config\.data\.batch = 6'):
        f.init(jax.random.key(0), images(), {})
