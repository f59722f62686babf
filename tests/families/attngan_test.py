"""AttnGAN: networks against torch on the same weights, the losses of an update written out, its samples."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import config as configs
from jaxgen import randomness
from jaxgen.contract import Context
from jaxgen.data import shapes
from jaxgen.errors import UserError
from jaxgen.families import attngan
from jaxgen.losses.matching import matching_loss, sentence_similarity, word_similarity
from jaxgen.networks import attngan as networks
from jaxgen.networks.layers import upsample_nearest
from jaxgen.networks.text import TextEncoder, word_numbers
from jaxgen.optim import make_optim

slow = pytest.mark.slow  # compiles networks or trains

N, T, D = 3, 5, 4  # examples, words, features
MASK = np.arange(T) < np.array([[T], [3], [1]])


def randomised(tree, seed: int = 1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape) + 0.6 * (a.ndim == 1), jnp.float32), tree)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def encoded(*texts: str) -> np.ndarray:
    return np.stack([shapes.encode_caption(text) for text in texts])


# --- networks


class Torch:
    """The networks' parts in torch's functions, NCHW, by the weights' names."""

    def __init__(self, weights: dict):
        self.torch = pytest.importorskip('torch')
        self.F, self.weights = self.torch.nn.functional, weights

    def __getitem__(self, name: str) -> Torch:
        return Torch(self.weights[name])

    def get(self, name: str):
        return self.torch.tensor(np.asarray(self.weights[name])) if name in self.weights else None

    def conv(self, x, **options):
        return self.F.conv2d(x, self.get('kernel').permute(3, 2, 0, 1), self.get('bias'), **options)

    def linear(self, x):
        return self.F.linear(x, self.get('kernel').T, self.get('bias'))

    def norm(self, x):
        return self.F.batch_norm(x, None, None, self.get('scale'), self.get('bias'), training=True, eps=1e-5)

    def block(self, x, gated=True, double=False):
        x = self.F.interpolate(x, scale_factor=2, mode='nearest') if double else x
        x = self['norm'].norm(self['conv'].conv(x, padding=1))
        return self.F.glu(x, 1) if gated else x


@pytest.mark.parametrize('attention', [True, False])
@slow
def test_generator_equals_torch(attention):
    torch = pytest.importorskip('torch')
    network = networks.Generator((16, 8, 1), 2, 2, 4, D, 1, attention)
    z, noise, sentence, words = normal(N, 6), normal(N, D, seed=1), normal(N, D, seed=2), normal(N, T, D, seed=3)
    arguments = (z, noise, sentence, words, MASK)
    params = randomised(jax.eval_shape(functools.partial(network.init, train=True), jax.random.key(0), *arguments))
    (images, mean, log_variance), _ = network.apply(
        {'params': params['params']}, *arguments, train=True, mutable=['batch_stats']
    )

    t = Torch(params['params'])
    gaussian = torch.nn.functional.glu(t['condition']['gaussian'].linear(torch.tensor(sentence)), -1)
    np.testing.assert_allclose(jnp.concatenate([mean, log_variance], -1), gaussian, atol=1e-5)
    c = gaussian[:, :D] + torch.exp(0.5 * gaussian[:, D:]) * torch.tensor(noise)
    x = t['first_norm'].norm(t['first'].linear(torch.cat([c, torch.tensor(z)], 1)))
    x = torch.nn.functional.glu(x.reshape(N, 2, 1, 32).permute(0, 3, 1, 2), 1)
    for i in range(2):
        x = t[f'up{i}'].block(x, double=True)
    reference_images = [torch.tanh(t['image0'].conv(x, padding=1))]
    if attention:
        e = t['attention1']['words'].linear(torch.tensor(words))
        context = torch.zeros_like(x)
        for n in range(N):  # every pixel by itself, over the words that there are
            for i in range(x.shape[2]):
                for j in range(x.shape[3]):
                    present = e[n][torch.tensor(MASK[n])]
                    context[n, :, i, j] = torch.softmax(present @ x[n, :, i, j], 0) @ present
    else:
        context = t['told1'].linear(c)[:, :, None, None].expand(-1, -1, *x.shape[2:])
    x = torch.cat([x, context], 1)
    r = t['stage1_residual0']
    x = x + r['block2'].block(r['block1'].block(x), gated=False)
    reference_images.append(torch.tanh(t['image1'].conv(t['stage1_up'].block(x, double=True), padding=1)))
    assert [image.shape for image in images] == [(N, 8, 4, 1), (N, 16, 8, 1)]
    for image, reference in zip(images, reference_images, strict=True):
        np.testing.assert_allclose(image, reference.permute(0, 2, 3, 1), atol=2e-5)


@pytest.mark.parametrize('norm', [True, False])
@slow
def test_discriminator_equals_torch(norm):
    torch = pytest.importorskip('torch')
    network = networks.Discriminator(4, 3, 2, norm)
    x, sentences = normal(N, 16, 16, 3), [normal(N, D), normal(N, D, seed=1)]
    params = randomised(jax.eval_shape(network.init, jax.random.key(0), x, sentences))['params']
    (alone, conditional), _ = network.apply({'params': params}, x, sentences, mutable=['batch_stats'])
    t, F = Torch(params), torch.nn.functional

    def normed(x, name):
        return t[name].norm(x) if norm else x

    h = torch.tensor(x).permute(0, 3, 1, 2)
    for i in range(3):
        h = t[f'down{i}'].conv(h, stride=2, padding=1)
        h = F.leaky_relu(normed(h, f'down{i}_norm') if i else h, 0.2)
    assert h.shape[1] == 16
    h = F.leaky_relu(normed(t['narrow1'].conv(h, padding=1), 'narrow1_norm'), 0.2)
    assert h.shape[1:] == (8, 2, 2), 'as many channels as the smallest stage has'

    def value(h, name):
        return t[name]['value'].linear(h.permute(0, 2, 3, 1).reshape(N, -1))[:, 0]

    np.testing.assert_allclose(alone, value(h, 'value'), rtol=1e-3, atol=1e-4)
    for got, s in zip(conditional, sentences, strict=True):
        joint = torch.cat([h, torch.tensor(s)[:, :, None, None].expand(-1, -1, 2, 2)], 1)
        joint = F.leaky_relu(normed(t['joint'].conv(joint, padding=1), 'joint_norm'), 0.2)
        np.testing.assert_allclose(got, value(joint, 'told_value'), rtol=1e-3, atol=1e-4)


# --- the family

SMALL = dict(
    stages=2, doublings=1, width=2, latent=3, condition=3, blocks=1, discriminator_width=2, words=50, length=8,
    embedding=3, features=4, encoder_width=4, discriminator_norm=False, r1=0.5, swap=True, dropout=0.0,
)  # fmt: skip


def build(image=(8, 8, 3), **model):
    optim = make_optim(10, **configs.DEFAULTS['optim'] | {'name': 'sgd', 'lr': 0.01, 'ema': 0.0})
    return attngan.build(Context(image, 0, optim), **{**SMALL, **model})


def batch(n: int = 4) -> dict:
    texts = ('a small red heart', 'a large blue star on a white background', 'ring', 'a small red heart')
    caption = jnp.asarray(encoded(*texts[:n]))
    return {'image': jnp.tanh(normal(n, 8, 8, 3)), 'caption': caption, 'index': jnp.arange(n, dtype=jnp.int32)}


@functools.cache
def updated(swap: bool = True):
    """The family, its state, and the state and logs after an update by the key 5."""
    f, b = build(swap=swap), batch()
    state = jax.jit(f.init)(jax.random.key(0), b, {})
    return f, state, *jax.jit(f.update)(state, {}, b, jax.random.key(5))


def features(weights, numbers):
    """Of words and of the sentence, with a mean square of 1 where there is a word."""
    pair = TextEncoder(50, 3, 4).apply({'params': weights}, numbers)
    return tuple(x / np.maximum(np.sqrt(np.square(x).mean(-1, keepdims=True)), 1e-9) for x in pair)


@pytest.mark.parametrize('swap', [True, False])
@slow
def test_the_losses_of_an_update(swap):
    _, state, _, logs = updated(swap)
    b, n, p = batch(), 4, state.params
    _, wrong_rng, z_rng, noise_rng, _, _ = jax.random.split(jax.random.key(5), 6)
    numbers = word_numbers(b['caption'], 8, 50)
    text = functools.partial(features, state.ema['text'])
    words, sentence = text(numbers)
    order = np.asarray(jax.random.uniform(wrong_rng, numbers.shape))
    changed = np.array(numbers)
    for i in range(n):  # at one of the positions where the caption before has another word, that word
        own, other = numbers[i], numbers[i - 1]
        positions = [k for k in range(8) if own[k] != other[k] and min(own[k], other[k]) > 0]
        position = max(positions, key=lambda k, i=i: order[i, k], default=0)
        changed[i, position] = other[position]
    changed = changed if swap else np.roll(numbers, 1, 0)
    # Of 50 numbers, two words have the same one.
    assert (changed != numbers).sum(1).tolist() == ([0, 1, 1, 1] if swap else [0, 6, 8, 4])
    _, other = text(jnp.asarray(changed))
    z, noise = jax.random.normal(z_rng, (n, 3)), jax.random.normal(noise_rng, (n, 3))
    generator = networks.Generator((8, 8, 3), 2, 1, 2, 3, 1)
    apply = jax.jit(functools.partial(generator.apply, train=True, mutable=['batch_stats']))
    (samples, *_), _ = apply({'params': p['generator']}, z, noise, sentence, words, numbers > 0)
    real = {4: b['image'].reshape(n, 4, 2, 4, 2, 3).mean((2, 4)), 8: b['image']}
    for i, (side, x) in enumerate(real.items()):
        discriminate = jax.jit(networks.Discriminator(2, 1 + i, 1, False).apply)
        variables = {'params': p[f'discriminator{side}']}

        def f(x, discriminate=discriminate, variables=variables):
            alone, (conditional,) = discriminate(variables, x, [sentence])
            return alone, conditional

        _, (wrong,) = discriminate(variables, x, [other])
        a, bad = (lambda v: -jax.nn.log_sigmoid(v).mean(), lambda v: -jax.nn.log_sigmoid(-v).sum() / n)
        expected = sum(map(a, f(x))) / 2 + (sum(map(bad, f(samples[i]))) + bad(wrong[1:])) / 3  # the first is right
        slope = jax.grad(lambda x, f=f: sum(v.sum() for v in f(x)))(x)
        expected += 0.5 * 0.5 * jnp.square(slope).sum((1, 2, 3)).mean()
        np.testing.assert_allclose(logs[f'discriminator{side}_loss'], expected, rtol=1e-4)
    assert float(logs['generator_loss']) == pytest.approx(
        float(logs['adversarial'] + logs['kl'] + 5 * logs['damsm']), rel=1e-4
    )
    # DAMSM of the data: each image has its caption among all four and, with swap, four wrong ones.
    regions, whole = networks.ImageEncoder(4, 2, 4).apply({'params': p['encoder']}, b['image'])
    text = functools.partial(features, p['text'])
    all_numbers = np.concatenate([numbers, changed])[: 8 if swap else 4]
    words, sentence = text(jnp.asarray(all_numbers))
    own = np.arange(4)[:, None] == np.arange(len(all_numbers))
    same = (np.asarray(numbers)[:, None] == all_numbers).all(-1)
    similarities = (
        word_similarity(regions, words, jnp.asarray(all_numbers > 0)), sentence_similarity(whole, sentence)
    )  # fmt: skip
    expected = sum(matching_loss(x, own, same) for x in similarities)
    np.testing.assert_allclose(logs['matching_loss'], expected, rtol=1e-4)


@slow
def test_samples_are_the_last_stage_and_evaluate_matches_them():
    f, _, state, _ = updated()
    b, key = batch(), jax.random.key(1)
    x, stages = jax.jit(f.sample)(state, {}, b, key), jax.jit(f.trajectory)(state, {}, b, key)['stages']
    np.testing.assert_allclose(stages[-1], x, atol=1e-6)
    small = stages[0, :, ::2, ::2]
    assert small.shape == (4, 4, 4, 3)
    np.testing.assert_array_equal(stages[0], upsample_nearest(small))
    assert np.abs(x[0] - x[3]).max() > 1e-3, 'one caption, two samples'
    z = randomness.normal(randomness.example_keys(jax.random.split(key)[0], b), f.latents.shape)
    for family, same in ((f, False), (build(kl=0.0), True)):  # with kl = 0 the condition is not drawn
        decode, other = jax.jit(family.decode), jax.random.key(2)
        decoded = decode(state, {}, b, z, key)
        assert (np.abs(decoded - decode(state, {}, b, z, other)).max() < 1e-6) == same
        assert (np.abs(decoded - x).max() < 1e-5) != same
    metrics = f.evaluate(state, {}, b, key)
    again = f.evaluate(state, {}, {**b, 'image': x}, key)
    np.testing.assert_allclose(again['match/image'], metrics['match/sample'], atol=1e-5)


@pytest.mark.parametrize('model, said', [
    (dict(doublings=3), 'multiple of 16'), (dict(stages=0), 'stages'), (dict(features=3), 'even'),
    (dict(matching=-1.0), 'matching'), (dict(dropout=1.0), 'dropout'), (dict(discriminator_norm=True), 'r1'),
])  # fmt: skip
def test_mistakes_are_one_line(model, said, no_compile):
    with pytest.raises(UserError, match=said) as error:
        build(**model)
    assert 'config.' in str(error.value) and '\n' not in str(error.value)


def test_a_batch_of_one_has_nothing_to_compare():
    with pytest.raises(UserError, match=r'config.data.batch'):
        jax.eval_shape(build().init, jax.random.key(0), batch(1), {})
