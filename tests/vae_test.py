"""VAE: bounds against a model whose likelihood is known, and the family's options."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import vae
from jaxgen.losses import likelihoods
from jaxgen.losses.divergences import normal_kl
from jaxgen.optim import Optim

SMALL = dict(network='mlp', hidden=(12,), latent=3, iwae_samples=4)


def sgd(rate: float = 1.0) -> Optim:
    return Optim(lambda name, times=1: optax.sgd(rate), 1, lambda step: 0.0)


def family(image=(4, 4, 1), optim=None, **model):
    return vae.build(Context(image, 0, optim or sgd(0.01)), **{**SMALL, **model})


def images(n: int = 6, image=(4, 4, 1), seed: int = 0) -> dict:
    return {'image': jax.random.uniform(jax.random.key(seed), (n, *image), minval=-1, maxval=1)}


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


def log_weights(log_likelihood, mean, log_var, k: int) -> np.ndarray:
    """[k, 4]"""
    noise = jax.random.normal(jax.random.key(1), (k, *mean.shape))
    return jax.jit(jax.vmap(lambda noise: vae.weigh(log_likelihood, mean, log_var, noise)[0]))(noise)


def test_bounds_order_and_reach_the_likelihood():
    log_likelihood, log_p, mean, covariance = linear_gaussian(orthogonal=False)
    mean, log_var = mean + 0.2, jnp.broadcast_to(jnp.log(1.5 * np.diag(covariance)), (4, 3))  # not quite the posterior
    weights = log_weights(log_likelihood, mean, log_var, 40_000)
    bounds = {k: np.mean([vae.importance_bound(w) for w in weights[: 4000 * k // k].reshape(-1, k, 4)], 0)
              for k in (1, 10, 100)}  # fmt: skip
    assert (bounds[1] < bounds[10] - 0.1).all() and (bounds[10] < bounds[100]).all()
    assert (bounds[100] < log_p + 0.05).all(), 'no bound is above the likelihood, up to the noise of 40 of them'
    np.testing.assert_allclose(vae.importance_bound(weights), log_p, atol=0.05)


def test_bounds_are_tight_at_the_exact_posterior():
    log_likelihood, log_p, mean, covariance = linear_gaussian(orthogonal=True)
    assert np.allclose(covariance, np.diag(np.diag(covariance)))
    log_var = jnp.broadcast_to(jnp.log(np.diag(covariance)), (4, 3))
    weights = log_weights(log_likelihood, mean, log_var, 8)
    np.testing.assert_allclose(weights, np.broadcast_to(log_p, (8, 4)), rtol=1e-4)


def test_closed_form_kl_is_the_weights_mean():
    log_likelihood, _, mean, covariance = linear_gaussian(orthogonal=False)
    mean, log_var = mean + 0.2, jnp.broadcast_to(jnp.log(np.diag(covariance)), (4, 3))
    noise = jax.random.normal(jax.random.key(2), (50_000, *mean.shape))
    log_w, log_x = jax.jit(jax.vmap(lambda noise: vae.weigh(log_likelihood, mean, log_var, noise)))(noise)
    np.testing.assert_allclose(log_w.mean(0), log_x.mean(0) - normal_kl(mean, log_var), atol=0.05)


@pytest.mark.parametrize('model', [
    dict(network='conv', width=4, levels=1),
    dict(network='conv', width=4, levels=2, likelihood='discretised_gaussian', samples=3),
    dict(likelihood='gaussian', hidden=(9, 7)),
])  # fmt: skip
def test_fulfils_the_contract(model):
    f, batch = family((8, 4, 3), **model), images(5, (8, 4, 3))
    state = jax.jit(f.init)(jax.random.key(0), batch, {})
    update = jax.jit(f.update)
    for i in range(2):
        state, logs = update(state, {}, batch, jax.random.key(i))
    assert int(state.step) == 2 and all(np.isfinite(v) for v in logs.values())
    drawn = f.sample(state, {}, {'index': jnp.arange(3)}, jax.random.key(1))
    assert drawn.shape == (3, 8, 4, 3) and np.isfinite(drawn).all() and np.abs(drawn).max() <= 1
    figures = f.evaluate(state, {}, {**batch, 'index': jnp.arange(5)}, jax.random.key(2))
    assert all(v.shape == (5,) and np.isfinite(v).all() for v in figures.values())
    z = f.encode(state, {}, batch, jax.random.key(3))
    assert z.shape == (5, SMALL['latent'])
    again = f.decode(state, {}, z, jax.random.key(4))
    np.testing.assert_allclose(((again - batch['image']) ** 2).mean((1, 2, 3)), figures['squared_error'], rtol=1e-4)
    np.testing.assert_allclose(figures['nll_elbo'], figures['reconstruction'] + figures['kl'], rtol=1e-5)
    assert figures['nll_iwae'].mean() < figures['nll_elbo'].mean() + 0.1, 'the tighter bound, up to noise'
    if 'bits_per_dim' in figures:
        np.testing.assert_allclose(figures['bits_per_dim'], figures['nll_iwae'] / (96 * math.log(2)), rtol=1e-5)


def test_log_scale_is_learned_only_if_asked():
    for learn_scale, likelihood in ((True, 'gaussian'), (False, 'gaussian'), (True, 'bernoulli')):
        f = family(likelihood=likelihood, learn_scale=learn_scale, scale=0.5)
        state = f.init(jax.random.key(0), images(), {})
        assert ('log_scale' in state.params['decoder']) == (learn_scale and likelihood == 'gaussian')
        if 'log_scale' in state.params['decoder']:
            after, _ = f.update(state, {}, images(), jax.random.key(1))
            start = float(state.params['decoder']['log_scale'])
            assert abs(start - math.log(0.5)) < 1e-6 and float(after.params['decoder']['log_scale']) != start


def test_beta_scales_the_gradient_of_the_kl():
    def weights_after(beta):
        f = family(beta=beta, optim=sgd(1.0))
        state = f.init(jax.random.key(0), images(), {})
        return f.update(state, {}, images(), jax.random.key(1))[0].params['encoder']

    zero, one, three = (weights_after(beta) for beta in (0.0, 1.0, 3.0))
    kl = jax.tree.map(lambda a, b: a - b, one, zero)
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(kl)) > 1e-3
    jax.tree.map(lambda got, a, d: np.testing.assert_allclose(got, a + 3 * d, rtol=1e-3, atol=1e-5), three, zero, kl)


def test_binarised_pixels_are_bits_drawn_anew():
    plain, bits = family(), family(binarise=True)
    state = plain.init(jax.random.key(0), images(), {})
    black_and_white = {'image': jnp.sign(images()['image'])}

    def loss(f, batch, key):
        return float(f.update(state, {}, batch, jax.random.key(key))[1]['reconstruction'])

    assert loss(plain, black_and_white, 1) == loss(bits, black_and_white, 1), 'black and white stay what they are'
    assert loss(plain, images(), 1) != loss(bits, images(), 1) != loss(bits, images(), 2)
    # Decoded by weights of zero every bit costs ln 2; a grey pixel too, so bits cannot be told here, but
    # the error to the bits can: 1 for a black or white pixel against the mean grey 0.
    nothing = state.replace(ema=jax.tree.map(jnp.zeros_like, state.ema))
    grey = {'image': jnp.zeros((3, 4, 4, 1)), 'index': jnp.arange(3)}
    figures = bits.evaluate(nothing, {}, grey, jax.random.key(0))
    np.testing.assert_allclose(figures['nll_elbo'], 16 * math.log(2), rtol=1e-5)
    np.testing.assert_allclose(figures['squared_error'], 1, rtol=1e-5)
    np.testing.assert_allclose(plain.evaluate(nothing, {}, grey, jax.random.key(0))['squared_error'], 0, atol=1e-6)


def test_a_sample_is_the_decoders_mean():
    f = family(likelihood='gaussian')
    state = f.init(jax.random.key(0), images(), {})
    batch = {'index': jnp.array([7, 3])}
    z = jnp.stack([jax.random.normal(jax.random.fold_in(jax.random.key(5), i), (SMALL['latent'],)) for i in (7, 3)])
    drawn = f.sample(state, {}, batch, jax.random.key(5))
    np.testing.assert_allclose(drawn, f.decode(state, {}, z, jax.random.key(9)), atol=1e-6)


def test_size_of_the_published_layers():
    f = vae.build(Context((28, 28, 1), 0, sgd()), network='mlp', hidden=(400,), latent=20)
    state = jax.eval_shape(f.init, jax.random.key(0), images(1, (28, 28, 1)), {})
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)) == 652_824


@pytest.mark.parametrize('model', [
    dict(network='cnn'), dict(likelihood='poisson'), dict(likelihood='gaussian', binarise=True), dict(samples=0),
    dict(samples=2, beta=4.0), dict(scale=0.0), dict(network='conv', levels=3), dict(latent=0),
])  # fmt: skip
def test_says_what_is_wrong(model):
    with pytest.raises(UserError, match=r'config\.') as error:
        family((12, 12, 1), **model)
    assert '\n' not in str(error.value)
