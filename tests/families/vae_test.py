"""VAE: bounds against a model whose likelihood is known, and the family's options."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from support import optimiser, sgd

from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import vae
from jaxgen.losses import likelihoods
from jaxgen.losses.divergences import normal_kl

SMALL = dict(network='mlp', hidden=(12,), latent=3, iwae_samples=4)


def family(image=(4, 4, 1), optim=None, **model):
    return vae.build(Context(image, 0, optim or sgd(0.01)), **{**SMALL, **model})


def images(n: int = 6, image=(4, 4, 1), seed: int = 0) -> dict:
    return {'image': jax.random.uniform(jax.random.key(seed), (n, *image), minval=-1, maxval=1)}


def begin(f, batch: dict, seed: int = 0):
    return jax.jit(f.init)(jax.random.key(seed), batch, {})


def updated(f, state, batch: dict, key: int = 1):
    """The state after an update, and its logs."""
    return jax.jit(f.update)(state, {}, batch, jax.random.key(key))


def linear_gaussian(orthogonal: bool):
    """x = W z + b + 0.4 eps with z ~ N(0, I) of 3 dimensions: log p(x) has a closed form.

    Returns x [4, 5], log p(x | z), the exact log p(x), and the exact posterior's mean and covariance.
    """
    rng = np.random.default_rng(0)
    w = rng.normal(size=(5, 3))
    if orthogonal:  # then the exact posterior has no correlations
        w = np.linalg.qr(w)[0] * [0.5, 1.0, 2.0]
    b, sigma = rng.normal(size=5), 0.4
    x = rng.normal(size=(4, 3)) @ w.T + b + sigma * rng.normal(size=(4, 5))
    log_p = stats.multivariate_normal(b, w @ w.T + sigma**2 * np.eye(5)).logpdf(x)
    covariance = np.linalg.inv(np.eye(3) + w.T @ w / sigma**2)
    mean = (x - b) @ w / sigma**2 @ covariance
    x, w, b = jnp.float32(x), jnp.float32(w), jnp.float32(b)

    def log_likelihood(z):
        return likelihoods.gaussian(z @ w.T + b, math.log(sigma), x)

    return log_likelihood, log_p, jnp.float32(mean), covariance


STANDARD = (jnp.zeros((1, 3)), jnp.zeros((1, 3)))  # N(0, I), as a mixture of one


def log_weights(log_likelihood, mean, log_var, k: int) -> np.ndarray:
    """[k, 4]"""
    noise = jax.random.normal(jax.random.key(1), (k, *mean.shape))
    inference = vae.infer((mean, log_var), STANDARD)
    return jax.jit(jax.vmap(lambda noise: vae.importance_weight(log_likelihood, inference, noise)[0]))(noise)


@pytest.mark.slow
def test_bounds_order_and_approach_the_likelihood():
    log_likelihood, log_p, mean, covariance = linear_gaussian(orthogonal=False)
    mean, log_var = mean + 0.2, jnp.broadcast_to(jnp.log(1.5 * np.diag(covariance)), (4, 3))  # not quite the posterior
    weights = log_weights(log_likelihood, mean, log_var, 40_000)
    bounds = {k: np.mean([vae.log_mean_exp(w) for w in weights[: 4000 * k // k].reshape(-1, k, 4)], 0)
              for k in (1, 10, 100)}  # fmt: skip
    assert (bounds[1] < bounds[10] - 0.1).all() and (bounds[10] < bounds[100]).all()
    assert (bounds[100] < log_p + 0.05).all(), 'no bound is above the likelihood, up to the noise of 40 of them'
    np.testing.assert_allclose(vae.log_mean_exp(weights), log_p, atol=0.05)


@pytest.mark.slow
def test_bounds_are_tight_at_the_exact_posterior():
    log_likelihood, log_p, mean, covariance = linear_gaussian(orthogonal=True)
    assert np.allclose(covariance, np.diag(np.diag(covariance)))
    log_var = jnp.broadcast_to(jnp.log(np.diag(covariance)), (4, 3))
    weights = log_weights(log_likelihood, mean, log_var, 8)
    np.testing.assert_allclose(weights, np.broadcast_to(log_p, (8, 4)), rtol=1e-4)


@pytest.mark.slow
def test_closed_form_kl_is_the_weights_mean():
    log_likelihood, _, mean, covariance = linear_gaussian(orthogonal=False)
    mean, log_var = mean + 0.2, jnp.broadcast_to(jnp.log(np.diag(covariance)), (4, 3))
    noise = jax.random.normal(jax.random.key(2), (50_000, *mean.shape))
    inference = vae.infer((mean, log_var), STANDARD)
    log_w, log_x = jax.jit(jax.vmap(lambda noise: vae.importance_weight(log_likelihood, inference, noise)))(noise)
    np.testing.assert_allclose(inference.kl, normal_kl(mean, log_var), rtol=1e-5)
    np.testing.assert_allclose(log_w.mean(0), log_x.mean(0) - inference.kl, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize('model', [
    dict(network='conv', width=4, levels=1),
    dict(network='conv', width=4, levels=2, likelihood='discretised_gaussian', samples=3),
    dict(likelihood='gaussian', hidden=(9, 7)),
    dict(network='conv', width=4, levels=1, likelihood='discretised_logistic', scales='pixel', bounded_mean=True),
    dict(hidden=(), likelihood='discretised_gaussian', scales='pixel', scale_range=(0.5, 2.0), scale=1.0),
    dict(network='gated', hidden=(9, 7), latent2=2, prior='vamp', pseudo_inputs=4, beta_warmup=3),
    dict(network='mlp', hidden=(9, 7), latent2=2, samples=3),
])  # fmt: skip
def test_fulfils_the_contract(model):
    f, batch = family((8, 4, 3), **model), images(5, (8, 4, 3))
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    update = jax.jit(f.update)
    for i in range(2):
        state, logs = update(state, {}, batch, jax.random.key(i))
    assert int(state.step) == 2 and all(np.isfinite(v) for v in logs.values())
    drawn = jax.jit(f.sample)(state, {}, {'index': jnp.arange(3)}, jax.random.key(1))
    assert drawn.shape == (3, 8, 4, 3) and np.isfinite(drawn).all() and np.abs(drawn).max() <= 1
    metrics = jax.jit(f.evaluate)(state, {}, {**batch, 'index': jnp.arange(5)}, jax.random.key(2))
    assert all(v.shape == (5,) and np.isfinite(v).all() for v in metrics.values())
    z = jax.jit(f.encode)(state, {}, batch, jax.random.key(3))
    assert z.shape == (5, SMALL['latent'] + model.get('latent2', 0)) == (5, *f.latents.shape)
    again = jax.jit(f.decode)(state, {}, {}, z, jax.random.key(4))
    np.testing.assert_allclose(((again - batch['image']) ** 2).mean((1, 2, 3)), metrics['squared_error'], rtol=1e-4)
    np.testing.assert_allclose(metrics['nll_elbo'], metrics['reconstruction'] + metrics['kl'], rtol=1e-5)
    assert metrics['nll_iwae'].mean() < metrics['nll_elbo'].mean() + 0.1, 'the tighter bound, up to noise'
    chex.assert_tree_all_finite(state.params)
    if 'bits_per_dim' in metrics:
        np.testing.assert_allclose(metrics['bits_per_dim'], metrics['nll_iwae'] / (96 * math.log(2)), rtol=1e-5)


@pytest.mark.slow
def test_log_scale_is_learned_where_configured():
    for learn_scale, likelihood in ((True, 'gaussian'), (False, 'gaussian'), (True, 'bernoulli')):
        f = family(likelihood=likelihood, learn_scale=learn_scale, scale=0.5)
        state = begin(f, images())
        assert ('log_scale' in state.params['decoder']) == (learn_scale and likelihood == 'gaussian')
        if 'log_scale' in state.params['decoder']:
            after, _ = updated(f, state, images(), 1)
            start = float(state.params['decoder']['log_scale'])
            assert abs(start - math.log(0.5)) < 1e-6 and float(after.params['decoder']['log_scale']) != start


@pytest.mark.slow
def test_beta_scales_the_gradient_of_the_kl():
    def weights_after(beta):
        f = family(beta=beta, optim=sgd(1.0))
        state = begin(f, images())
        return updated(f, state, images(), 1)[0].params['encoder']

    zero, one, three = (weights_after(beta) for beta in (0.0, 1.0, 3.0))
    kl = jax.tree.map(lambda a, b: a - b, one, zero)
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(kl)) > 1e-3
    expected = jax.tree.map(lambda a, d: a + 3 * d, zero, kl)
    chex.assert_trees_all_close(three, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_binarised_pixels_are_bits_drawn_anew():
    plain, bits = family(), family(binarise=True)
    state = begin(plain, images())
    black_and_white = {'image': jnp.sign(images()['image'])}

    def loss(f, batch, key):
        return float(updated(f, state, batch, key)[1]['reconstruction'])

    assert loss(plain, black_and_white, 1) == loss(bits, black_and_white, 1), 'black and white are bits already'
    assert loss(plain, images(), 1) != loss(bits, images(), 1) != loss(bits, images(), 2)
    # With weights of zero every bit costs ln 2, and so does a grey pixel; but a bit has the squared error 1, that of a
    # black or white pixel against the mean grey 0.
    nothing = state.replace(ema=jax.tree.map(jnp.zeros_like, state.ema))
    grey = {'image': jnp.zeros((3, 4, 4, 1)), 'index': jnp.arange(3)}
    metrics = bits.evaluate(nothing, {}, grey, jax.random.key(0))
    np.testing.assert_allclose(metrics['nll_elbo'], 16 * math.log(2), rtol=1e-5)
    np.testing.assert_allclose(metrics['squared_error'], 1, rtol=1e-5)
    np.testing.assert_allclose(plain.evaluate(nothing, {}, grey, jax.random.key(0))['squared_error'], 0, atol=1e-6)


@pytest.mark.slow
def test_a_sample_is_the_decoders_mean():
    f = family(likelihood='gaussian')
    state = begin(f, images())
    batch = {'index': jnp.array([7, 3])}
    z = jnp.stack([jax.random.normal(jax.random.fold_in(jax.random.key(5), i), (SMALL['latent'],)) for i in (7, 3)])
    drawn = f.sample(state, {}, batch, jax.random.key(5))
    np.testing.assert_allclose(drawn, f.decode(state, {}, {}, z, jax.random.key(9)), atol=1e-6)


def test_pixels():
    """Ranges of targets, encoder inputs and mean images, by hand."""
    x, keys = jnp.array([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1), jax.random.split(jax.random.key(0), 1)
    grey = vae.Pixels('bernoulli', binarise=False, white=255, encoder_range='signed')
    target = grey.target(x, keys)
    np.testing.assert_allclose(target.ravel(), [0, 0.5, 1])
    np.testing.assert_allclose(grey.encoder_input(target), x)
    np.testing.assert_allclose(grey._replace(encoder_range='unit').encoder_input(target), target)
    np.testing.assert_allclose(grey._replace(white=51).target(x, keys).ravel(), [0, 1, 1])  # 127.5 / 51 is clipped
    bits = grey._replace(binarise=True).target(x, keys).ravel()
    assert bits[0] == 0 and bits[1] in (0, 1) and bits[2] == 1
    np.testing.assert_allclose(grey.mean_image(jnp.log(jnp.array([1.0, 3.0]))), [0, 0.5], atol=1e-6)
    real = vae.Pixels('gaussian', binarise=False, white=255, encoder_range='signed')
    assert real.target(x, keys) is x and real.encoder_input(x) is x
    np.testing.assert_allclose(real.mean_image(jnp.array([-2.0, 0.3])), [-1, 0.3])


# --- a linear model, whose likelihood is known, through the family itself


LINEAR = dict(network='mlp', hidden=(), latent=2, likelihood='gaussian', scale=0.6, learn_scale=False)


def linear_family(k: int, seed: int = 0):
    """A linear encoder and decoder with random weights, an image, its exact -log p(x), and KL(q(z | x) || p(z | x))."""
    f = family((2, 2, 1), **{**LINEAR, 'iwae_samples': k})
    one = images(1, (2, 2, 1))
    state = begin(f, one)
    rng = np.random.default_rng(seed)
    state = state.replace(ema=jax.tree.map(lambda a: jnp.float32(0.5 * rng.normal(size=a.shape)), state.ema))
    w, b = (np.asarray(state.ema['decoder']['decoder']['Dense_0'][k], np.float64) for k in ('kernel', 'bias'))
    x = np.asarray(one['image'], np.float64).reshape(4)
    exact = -stats.multivariate_normal(b, w.T @ w + 0.36 * np.eye(4)).logpdf(x)
    # The exact posterior, and its distance from q = N(mean, diag(var)).
    precision = np.eye(2) + w @ w.T / 0.36
    where = np.linalg.solve(precision, w @ (x - b) / 0.36)
    p = state.ema['encoder']['Dense_0']
    mean, log_var = np.split(x @ np.asarray(p['kernel'], np.float64) + np.asarray(p['bias']), 2)
    away = mean - where
    kl = 0.5 * (np.trace(precision * np.exp(log_var)) + away @ precision @ away - 2)
    kl -= 0.5 * (log_var.sum() + np.linalg.slogdet(precision)[1])
    return f, state, one, exact, kl


def repeated(one, n: int) -> dict:
    return {'image': jnp.repeat(one['image'], n, 0)}


def test_bounds_of_a_linear_model_are_the_exact_ones():
    """-ELBO = -log p(x) + KL(q(z | x) || p(z | x)); with 5,000 importance samples -log p(x) itself."""
    f, state, one, exact, kl = linear_family(5000)
    assert kl > 0.3, 'q is not the posterior'
    metrics = evaluate(f, state, repeated(one, 8))
    np.testing.assert_allclose(metrics['nll_elbo'].mean(), exact + kl, atol=0.05)
    np.testing.assert_allclose(metrics['nll_iwae'].mean(), exact, atol=0.03)


def test_one_importance_sample_is_the_elbo_and_more_are_tighter():
    means, errors = {}, {}
    for k in (1, 5):
        f, state, one, exact, kl = linear_family(k)
        nll = evaluate(f, state, repeated(one, 4000))['nll_iwae']
        means[k], errors[k] = float(nll.mean()), 4 * float(nll.std()) / math.sqrt(4000)
    assert abs(means[1] - exact - kl) < errors[1], 'S = 1 is the ELBO in expectation'
    assert exact - errors[5] < means[5] < means[1] - errors[1]


@pytest.mark.slow
def test_memory_does_not_grow_with_importance_samples():
    sizes = set()
    for k in (8, 4000):
        f, state, one, *_ = linear_family(k)
        batch = {**repeated(one, 8), 'index': jnp.arange(8)}
        program = jax.jit(f.evaluate).lower(state, {}, batch, jax.random.key(0)).compile()
        sizes.add(program.memory_analysis().temp_size_in_bytes)
    assert len(sizes) == 1


def test_sums_of_importance_weights_are_stable():
    """Log weights a thousand nats apart, as far as minus infinity: the sums are those of numpy in float64."""
    log_w = np.array([[-1000.0, 3.0, -np.inf, 80.0], [-2000.0, -500.0, -np.inf, 80.0], [-1001.0, 2.0, -3.0, 81.0]])
    at = iter(range(3))
    with jax.disable_jit():  # so that the scan is a loop, and the weights come one after another
        bound, mean_w, mean_x = vae.importance_sampled(
            lambda z: jnp.float32(log_w[next(at)]),
            vae.Inference(None, lambda noise: (noise, jnp.zeros(4)), None),
            *(jax.random.split(jax.random.key(0), 4), 1, 3),
        )
    np.testing.assert_allclose(bound, np.logaddexp.reduce(log_w, 0) - math.log(3), rtol=1e-5)
    finite = np.isfinite(log_w).all(0)
    np.testing.assert_allclose(mean_w[finite], log_w.mean(0)[finite], rtol=1e-5)
    np.testing.assert_allclose(mean_x[finite], log_w.mean(0)[finite], rtol=1e-5)


def test_means_of_elbos_are_looser_than_the_bound_of_as_many_samples():
    """On the same draws, by Jensen; the mean of ELBOs is of the KL and so may weigh it, the bound is not."""
    state = begin(family(), images())
    tight, loose, weighed = (
        updated(family(samples=4, **model), state, images())[1]
        for model in ({}, dict(bound='elbo'), dict(bound='elbo', beta=3.0, beta_warmup=2))
    )
    np.testing.assert_allclose(loose['loss'], loose['reconstruction'] + loose['kl'], rtol=1e-5)
    np.testing.assert_allclose(weighed['loss'], loose['reconstruction'] + 1.5 * loose['kl'], rtol=1e-5)
    assert tight['loss'] < loose['loss'] and tight['reconstruction'] == loose['reconstruction']


def test_free_bits_are_a_floor_of_each_latents_kl():
    plain, batch = family(), images()
    state = begin(plain, batch)
    model = plain.evaluate.args[0]
    target = model.pixels.target(batch['image'], jax.random.split(jax.random.key(0), 6))
    mean, log_var = model.apply(state.params, 'encoder', model.pixels.encoder_input(target))
    each = np.asarray(0.5 * (mean**2 + jnp.exp(log_var) - log_var - 1)).mean(0)
    assert each.shape == (3,)
    low, middle, high = np.sort(each)
    for free, expected in (
        (low / 2, each.sum()),
        ((low + middle) / 2, (low + middle) / 2 + middle + high),
        (2 * high, 6 * high),
    ):
        after, logs = updated(family(free_bits=float(free)), state, batch)
        np.testing.assert_allclose(logs['loss'] - logs['reconstruction'], expected, rtol=1e-3)
        np.testing.assert_allclose(logs['kl'], each.sum(), rtol=1e-4)
    nothing, _ = updated(family(beta=0.0), state, batch)  # all are below it: no gradient of the KL
    chex.assert_trees_all_close(after.params, nothing.params, atol=1e-6)


@pytest.mark.parametrize('likelihood', [pytest.param('gaussian', marks=pytest.mark.slow), 'discretised_logistic'])
def test_scales_of_each_pixel_by_the_decoder(likelihood):
    model = {**LINEAR, 'likelihood': likelihood, 'learn_scale': True, 'scales': 'pixel', 'iwae_samples': 1}
    f, batch = family((2, 3, 1), **model, scale_range=(0.4, 0.8), bounded_mean=True), images(5, (2, 3, 1))
    batch = {'image': jnp.round((batch['image'] + 1) * 127.5) / 127.5 - 1}
    state = begin(f, batch)
    rng = np.random.default_rng(0)
    state = state.replace(ema=jax.tree.map(lambda a: jnp.float32(0.3 * rng.normal(size=a.shape)), state.ema))
    assert set(state.ema['decoder']) == {'decoder'}, 'no scale that is shared'
    metrics, x = evaluate(f, state, batch), np.asarray(batch['image'], np.float64)

    def linear(p, inputs):
        return inputs @ np.asarray(p['kernel'], np.float64) + np.asarray(p['bias'])

    mean, log_var = np.split(linear(state.ema['encoder']['Dense_0'], x.reshape(5, 6)), 2, -1)
    z = mean + np.exp(log_var / 2) * noises(0, 5, 2)
    outputs = linear(state.ema['decoder']['decoder']['Dense_0'], z).reshape(5, 2, 3, 2)
    where, scale = 2 / (1 + np.exp(-outputs[..., :1])) - 1, np.clip(0.6 * np.exp(outputs[..., 1:]), 0.4, 0.8)
    assert scale.min() < 0.5 < 0.7 < scale.max()
    if likelihood == 'gaussian':
        log_p = stats.norm.logpdf(x, where, scale)
    else:
        above = np.where(x > 1 - 1 / 255, 1, stats.logistic.cdf(x + 1 / 255, where, scale))
        log_p = np.log(above - np.where(x < -1 + 1 / 255, 0, stats.logistic.cdf(x - 1 / 255, where, scale)))
    np.testing.assert_allclose(metrics['reconstruction'], -log_p.sum((1, 2, 3)), rtol=1e-3)
    drawn = f.decode(state, {}, {}, jnp.float32(z), jax.random.key(0))
    np.testing.assert_allclose(drawn, where, atol=1e-5)


@pytest.mark.parametrize('model, message', [
    (dict(scales='pixel'), 'need a config.model.likelihood with a scale'),
    (dict(bounded_mean=True), 'need a config.model.likelihood with a scale'),
    (dict(likelihood='gaussian', scales='pixel', learn_scale=False), 'learn_scale'),
    (dict(likelihood='gaussian', scale_range=(2.0, 1.0)), 'scale_range'),
    (dict(likelihood='gaussian', scale_range=(0.0, 1.0)), 'scale_range'),
    (dict(free_bits=0.1, samples=2), 'free_bits needs a KL of each latent'),
    (dict(free_bits=0.1, prior='vamp'), 'free_bits needs a KL of each latent'),
])  # fmt: skip
def test_options_of_likelihoods_that_do_not_go_together(model, message):
    with pytest.raises(UserError, match=message) as caught:
        family(**model)
    assert '\n' not in str(caught.value)


# --- the mixture of posteriors as a prior, and two levels of latents


GATED = dict(network='gated', hidden=(6, 5), latent=1, prior='vamp', pseudo_inputs=3, pseudo_std=0.3, pseudo_mean=0.5,
             likelihood='gaussian', scale=0.7)  # fmt: skip


class Oracle:
    """The gated model of Tomczak & Welling in NumPy, float64, one layer after another, with a family's weights."""

    def __init__(self, weights, hidden=(6, 5), latent=1, two=False):
        self.w = jax.tree.map(lambda a: np.asarray(a, np.float64), weights)
        self.depth, self.latent, self.two = len(hidden), latent, two
        self.u = np.clip(self.w['prior']['pseudo_inputs'], 0, 1).reshape(3, -1) * 2 - 1

    def linear(self, x, net, i):
        p = net[f'Dense_{i}']
        return x @ p['kernel'] + p['bias']

    def gated(self, x, net, i):
        a, b = np.split(self.linear(x, net, i), 2, -1)
        return a / (1 + np.exp(-b))

    def stack(self, x, net):
        for i in range(self.depth):
            x = self.gated(x, net, i)
        return x

    def join(self, a, b, net):
        """One layer for each of two inputs and one for both, as for hidden = (., .)."""
        return self.gated(np.concatenate([self.gated(a, net, 0), self.gated(b, net, 1)], -1), net, 2)

    def moments(self, h, net, i):
        mean, log_var = np.split(self.linear(h, net, i), 2, -1)
        return mean, np.minimum(np.maximum(log_var, -6), 2)

    def above(self, x):
        """q(z | x), or of two levels q(z2 | x)."""
        net = self.w['encoder2' if self.two else 'encoder']
        return self.moments(self.stack(x, net), net, self.depth)

    def below(self, x, z2):
        return self.moments(self.join(x, z2, self.w['encoder']), self.w['encoder'], 3)

    def prior_below(self, z2):
        return self.moments(self.stack(z2, self.w['decoder2']), self.w['decoder2'], self.depth)

    def log_x(self, x, z):
        net = self.w['decoder']['decoder']
        h = self.join(z[:, : self.latent], z[:, self.latent :], net) if self.two else self.stack(z, net)
        mean = self.linear(h, net, 3 if self.two else self.depth)
        return stats.norm.logpdf(x, mean, math.exp(self.w['decoder']['log_scale'])).sum(-1)

    def log_prior(self, z):
        """Of the highest level, by a plain sum over the pseudo-inputs."""
        mean, log_var = self.above(self.u)
        return np.log(sum(np.exp(self.log_normal(z, m, v)) for m, v in zip(mean, log_var, strict=True)) / len(self.u))

    @staticmethod
    def log_normal(z, mean, log_var):
        return stats.norm.logpdf(z, mean, np.exp(log_var / 2)).sum(-1)

    def log_likelihood(self, x):
        """log p(x) of one image, by quadrature over one latent or two."""
        grid = np.linspace(-14, 14, 701)
        step = grid[1] - grid[0]
        if not self.two:
            z = grid[:, None]
            return np.log(np.exp(self.log_x(x, z) + self.log_prior(z)).sum() * step)
        z2, z = (g.reshape(-1, 1) for g in np.meshgrid(grid, grid, indexing='ij'))
        log_p = self.log_normal(z, *self.prior_below(z2)) + np.repeat(self.log_prior(grid[:, None]), len(grid))
        return np.log(np.exp(self.log_x(x, np.concatenate([z, z2], 1)) + log_p).sum() * step**2)


def evaluate(f, state, batch, seed: int = 0):
    n = len(batch['image'])
    return jax.jit(f.evaluate)(state, {}, {**batch, 'index': jnp.arange(n)}, jax.random.key(seed))


def noises(seed: int, n: int, size: int):
    """The noise of evaluate with one importance sample, [n, size]."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.split(jax.random.key(seed))[1], i))(jnp.arange(n))
    return np.stack([jax.random.normal(jax.random.split(key, 1)[0], (size,)) for key in keys])


@pytest.mark.slow
@pytest.mark.parametrize('latent2', [0, 1])
def test_metrics_are_those_of_the_formulas(latent2):
    f = family((2, 2, 1), **GATED, latent2=latent2, iwae_samples=1)
    batch = images(5, (2, 2, 1))
    state = begin(f, batch)
    metrics, noise = evaluate(f, state, batch), noises(0, 5, 1 + latent2)
    oracle, x = Oracle(state.params, two=bool(latent2)), np.asarray(batch['image'], np.float64).reshape(5, -1)

    def draw(mean, log_var, noise):
        return mean + np.exp(log_var / 2) * noise

    q = oracle.above(x)
    z = draw(*q, noise[:, latent2:])
    kl = oracle.log_normal(z, *q) - oracle.log_prior(z)
    if latent2:
        z2, q = z, oracle.below(x, z)
        z = draw(*q, noise[:, :1])
        kl += oracle.log_normal(z, *q) - oracle.log_normal(z, *oracle.prior_below(z2))
        z = np.concatenate([z, z2], 1)
    reconstruction = -oracle.log_x(x, z)
    np.testing.assert_allclose(metrics['kl'], kl, atol=1e-4)
    np.testing.assert_allclose(metrics['reconstruction'], reconstruction, rtol=1e-4)
    np.testing.assert_allclose(metrics['nll_elbo'], reconstruction + kl, rtol=1e-4)
    np.testing.assert_allclose(metrics['nll_iwae'], metrics['nll_elbo'], rtol=1e-4)  # of one sample
    # Latents are the means, level by level.
    mean = oracle.above(x)[0]
    mean = np.concatenate([oracle.below(x, mean)[0], mean], 1) if latent2 else mean
    np.testing.assert_allclose(f.encode(state, {}, batch, jax.random.key(3)), mean, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('latent2', [0, 1])
def test_bounds_of_a_mixture_prior_order_and_approach_the_likelihood(latent2):
    f = {k: family((2, 2, 1), **GATED, latent2=latent2, iwae_samples=k) for k in (6, 4000)}
    one = images(1, (2, 2, 1))
    state = begin(f[6], one)
    exact = -Oracle(state.params, two=bool(latent2)).log_likelihood(np.asarray(one['image']).reshape(1, -1))
    many = evaluate(f[6], state, {'image': jnp.repeat(one['image'], 800, 0)})
    elbo, six = float(many['nll_elbo'].mean()), float(many['nll_iwae'].mean())
    error = 4 * float(many['nll_elbo'].std()) / math.sqrt(800)
    assert elbo > six + error and six > exact - error and elbo > exact + error
    tightest = evaluate(f[4000], state, {'image': jnp.repeat(one['image'], 6, 0)})['nll_iwae']
    np.testing.assert_allclose(tightest, exact, atol=0.05)


@pytest.mark.slow
def test_posteriors_of_the_data_are_the_best_prior():
    """With the data as pseudo-inputs the prior is the mean posterior: no prior has a smaller KL over the data, and
    that KL, the information of latents about which image it is, is not above the log of their number."""
    batch = images(6)
    kls = {}
    model = dict(network='gated', hidden=(12,), latent=3, likelihood='gaussian', iwae_samples=400)
    for name, more in (('data', dict(prior='vamp')), ('elsewhere', dict(prior='vamp')), ('normal', {})):
        f = family(**{**model, 'pseudo_inputs': 6, 'pseudo_data': True, 'pseudo_std': 0.0, **more})
        state = begin(f, batch if name == 'data' else images(6, seed=1))
        metrics = evaluate(f, state, batch)
        kls[name] = float(metrics['kl'].mean())
        np.testing.assert_allclose(
            metrics['reconstruction'].mean(), kls.setdefault('r', metrics['reconstruction'].mean())
        )
    assert 0 < kls['data'] < math.log(6) + 0.05
    assert kls['data'] < kls['elsewhere'] - 0.1 and kls['data'] < kls['normal'] - 0.1


@pytest.mark.slow
def test_kl_by_draws_is_the_closed_form_of_one_component():
    key = jax.random.split(jax.random.key(3), 4)
    q = jax.random.normal(key[0], (4, 3)), 0.5 * jax.random.normal(key[1], (4, 3))
    p = jax.random.normal(key[2], (1, 3)), 0.5 * jax.random.normal(key[3], (1, 3))
    inference = vae.infer(q, p)
    noise = jax.random.normal(jax.random.key(1), (40_000, 4, 3))
    drawn = -jax.jit(jax.vmap(lambda noise: inference.draw(noise)[1]))(noise).mean(0)
    np.testing.assert_allclose(inference.kl, normal_kl(*q, *p), rtol=1e-5)
    np.testing.assert_allclose(drawn, inference.kl, rtol=0.02)
    twice = vae.infer(q, jax.tree.map(lambda a: jnp.repeat(a, 2, 0), p))  # the same prior, and no closed form
    assert twice.kl is None
    np.testing.assert_allclose(twice.draw(noise[0])[1], inference.draw(noise[0])[1], rtol=1e-4, atol=1e-5)


def test_mixture_far_out_is_finite():
    means, log_vars = jnp.array([[0.0], [300.0]]), jnp.array([[-6.0], [2.0]])
    actual = vae.log_mixture(jnp.array([[1e3], [0.0]]), means, log_vars)
    expected = [stats.norm.logpdf(1e3, 300, math.e) - math.log(2), stats.norm.logpdf(0, 0, math.exp(-3)) - math.log(2)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('latent2', [0, 1])
def test_samples_are_drawn_from_a_component(latent2):
    f = family((2, 2, 1), **GATED, latent2=latent2)
    state = begin(f, images(1, (2, 2, 1)))
    oracle, key, n = Oracle(state.params, two=bool(latent2)), jax.random.key(5), 60
    mean, log_var = oracle.above(oracle.u)
    z, chosen = [], []
    for i in range(n):
        noise_key, which = jax.random.split(jax.random.fold_in(key, i))
        k = int(jax.random.randint(which, (), 0, 3))
        noise = np.asarray(jax.random.normal(noise_key, (1 + latent2,)))
        one = mean[k] + np.exp(log_var[k] / 2) * noise[latent2:]
        if latent2:
            below = oracle.prior_below(one[None])
            one = np.concatenate([below[0][0] + np.exp(below[1][0] / 2) * noise[:1], one])
        z.append(one)
        chosen.append(k)
    assert np.bincount(chosen, minlength=3).min() > 10
    drawn = f.sample(state, {}, {'index': jnp.arange(n)}, key)
    np.testing.assert_allclose(drawn, f.decode(state, {}, {}, jnp.float32(z), key), atol=1e-5)


@pytest.mark.slow
def test_pseudo_inputs_learn_and_start_as_configured():
    f = family(**{**GATED, 'pseudo_data': True, 'pseudo_std': 0.0, 'pseudo_inputs': 8})
    state = begin(f, images(6))
    start = np.asarray(state.params['prior']['pseudo_inputs'])
    np.testing.assert_allclose(start, (np.asarray(images(6)['image'])[[0, 1, 2, 3, 4, 5, 0, 1]] + 1) / 2, atol=1e-6)
    after, _ = updated(f, state, images(6), 1)
    assert np.abs(after.params['prior']['pseudo_inputs'] - start).max() > 1e-5
    noise = begin(family(**{**GATED, 'pseudo_inputs': 400}), images(6)).params['prior']['pseudo_inputs']
    assert abs(noise.mean() - 0.5) < 0.02 and abs(noise.std() - 0.3) < 0.02
    # Outside of [0, 1] a pixel is held at the bound.
    moved = jax.tree.map(lambda a: jnp.where(a > 0.5, a + 7, a - 7), state.ema['prior'])
    bound = jax.tree.map(lambda a: jnp.where(a > 0.5, 1.0, 0.0), state.ema['prior'])
    a, b = (evaluate(f, state.replace(ema={**state.ema, 'prior': p}), images(6)) for p in (moved, bound))
    np.testing.assert_array_equal(a['kl'], b['kl'])


@pytest.mark.slow
def test_beta_rises_over_the_warm_up():
    def weights_after(f, step=0):
        state = begin(f, images()).replace(step=jnp.int32(step))
        return updated(f, state, images())[0].params['encoder']

    rising = family(beta=2.0, beta_warmup=4, optim=sgd(1.0))
    zero, one = (weights_after(family(beta=beta, optim=sgd(1.0))) for beta in (0.0, 1.0))
    for step, beta in ((0, 0.5), (2, 1.5), (3, 2.0), (50, 2.0)):
        expected = jax.tree.map(lambda a, b, beta=beta: a + beta * (b - a), zero, one)
        chex.assert_trees_all_close(weights_after(rising, step), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_bits_that_are_stored_as_ones():
    """With white = 1 an image of 0 and 1 is what one of 0 and 255 is otherwise."""
    bits = np.random.default_rng(0).integers(0, 2, (4, 4, 4, 1))
    plain, stored = family(), family(white=1)
    state = begin(plain, images())
    a = evaluate(plain, state, {'image': jnp.float32(2 * bits - 1)})
    b = evaluate(stored, state, {'image': jnp.float32(bits / 127.5 - 1)})
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_ranges_of_the_encoders_input():
    """'unit' of an encoder's first layer W, b is 'signed' of W / 2, b + W 1 / 2: its pseudo-inputs too."""
    plain, unit = (
        family(encoder_range=r, network='gated', hidden=(9,), prior='vamp', pseudo_inputs=3) for r in ('signed', 'unit')
    )
    state = begin(plain, images())

    def moved(params):
        first = params['encoder']['Dense_0']
        kernel = 2 * first['kernel']
        first = {'kernel': kernel, 'bias': first['bias'] - 0.5 * kernel.sum(0)}
        return {**params, 'encoder': {**params['encoder'], 'Dense_0': first}}

    a = evaluate(plain, state, images())
    b = evaluate(unit, state.replace(ema=moved(state.ema)), images())
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_perceptrons_of_tanh():
    """The latents' mean by hand: a layer of tanh and a linear one."""
    f = family(network='mlp', hidden=(9,), activation='tanh')
    state, batch = begin(f, images()), images()
    w = jax.tree.map(np.asarray, state.ema['encoder'])
    h = np.tanh(
        np.asarray(batch['image']).reshape(len(batch['image']), -1) @ w['Dense_0']['kernel'] + w['Dense_0']['bias']
    )
    mean = (h @ w['Dense_1']['kernel'] + w['Dense_1']['bias'])[:, : f.latents.shape[0]]
    np.testing.assert_allclose(f.encode(state, {}, batch, jax.random.key(0)), mean, atol=1e-5)


# --- classes


@pytest.mark.slow
def test_conditional_samples_are_of_the_requested_class():
    """Two classes of images: a bright square somewhere in the left half, or in the right half."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 64)
    image = -np.ones((64, 4, 8, 1), np.float32)
    for i in range(64):
        left = 4 * label[i] + rng.integers(0, 3)
        image[i, 1:3, left : left + 2] = 1
    batch = {'image': jnp.asarray(image), 'label': jnp.asarray(label, jnp.int32)}
    optim = optimiser(optax.adam(5e-3))
    model = dict(SMALL, hidden=(24,), conditional=True)
    f = vae.build(Context((4, 8, 1), 2, optim), **model)
    assert f.encode is None and f.conditions == ('label',)
    state = begin(f, batch)

    @jax.jit
    def train(state):
        return jax.lax.scan(lambda s, k: f.update(s, {}, batch, k), state, jax.random.split(jax.random.key(1), 300))[0]

    state = train(state)
    requested = jnp.arange(40) % 2
    drawn = f.sample(state, {}, {'index': jnp.arange(40), 'label': requested}, jax.random.key(2))
    right = drawn[:, :, 4:].mean((1, 2, 3)) > drawn[:, :, :4].mean((1, 2, 3))
    assert (right == requested).mean() > 0.97
    z = jax.random.normal(jax.random.key(3), (20, *f.latents.shape))
    each = [f.decode(state, {}, {'label': jnp.full(20, y)}, z, None) for y in (0, 1)]
    assert all((x[:, :, 4:].mean() > x[:, :, :4].mean()) == y for y, x in enumerate(each))
    # Latents carry nothing that the label does: conditioned on the wrong class, the bound is far worse.
    right, wrong = (evaluate(f, state, {**batch, 'label': y}) for y in (batch['label'], 1 - batch['label']))
    assert wrong['nll_elbo'].mean() > right['nll_elbo'].mean() + 10


@pytest.mark.slow
@pytest.mark.parametrize('network', ['mlp', 'gated', 'conv'])
def test_encoder_and_decoder_are_conditioned_on_the_class(network):
    f = vae.build(Context((4, 4, 1), 3, sgd(0.01)), **{**SMALL, 'network': network, 'levels': 1, 'width': 4,
                                                        'conditional': True})  # fmt: skip
    batch = {**images(3), 'label': jnp.array([0, 1, 2])}
    state = begin(f, batch)
    for part in ('encoder', 'decoder'):
        # With weights of 0 the other part ignores the label: changes come from this one.
        other = 'decoder' if part == 'encoder' else 'encoder'
        quiet = state.replace(ema={**state.ema, other: jax.tree.map(jnp.zeros_like, state.ema[other])})
        a = evaluate(f, quiet, batch)
        b = evaluate(f, quiet, {**batch, 'label': jnp.array([1, 2, 0])})
        metric = 'kl' if part == 'encoder' else 'reconstruction'
        assert np.abs(a[metric] - b[metric]).min() > 1e-6, part


@pytest.mark.parametrize(('model', 'count'), [
    ({}, 1_116_864), (dict(latent2=40), 2_431_024),
    (dict(latent2=40, prior='vamp'), 2_823_024),
])  # fmt: skip
def test_size_of_the_published_mixture_models(model, count):
    f = vae.build(Context((28, 28, 1), 0, sgd(1.0)), network='gated', hidden=(300, 300), latent=40, **model)
    state = jax.eval_shape(f.init, jax.random.key(0), images(1, (28, 28, 1)), {})
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)) == count


@pytest.mark.parametrize('model', [
    dict(network='cnn'), dict(likelihood='poisson'), dict(likelihood='gaussian', binarise=True), dict(samples=0),
    dict(samples=2, beta=4.0), dict(scale=0.0), dict(network='conv', levels=3), dict(latent=0),
    dict(prior='vampire'), dict(prior='vamp', pseudo_inputs=0), dict(network='conv', levels=0, latent2=2),
    dict(hidden=(), latent2=2), dict(conditional=True), dict(beta_warmup=-1), dict(samples=2, beta_warmup=5),
    dict(white=0), dict(hidden=(-5,)), dict(white=1, likelihood='gaussian'),
])  # fmt: skip
def test_mistakes(model):
    with pytest.raises(UserError, match=r'config\.') as error:
        family((12, 12, 1), **model)
    assert '\n' not in str(error.value)
