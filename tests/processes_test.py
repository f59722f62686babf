"""Processes, weights, guidance and the likelihood in continuous time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.diffusion import processes, samplers
from jaxgen.diffusion.guidance import guided
from jaxgen.diffusion.likelihood import ode_likelihood
from jaxgen.diffusion.parameterisations import PREDICTIONS, error_scale, input_scale, target, to_x_0, weight

NAMES = processes.PROCESSES


def test_published_values():
    """score_sde's own: VP at t = 0.001, 0.5, 1; VE from 0.01 to 50."""
    vp = processes.make('vp').at(np.array([0.001, 0.5, 1.0]))
    expected = [0.99994503, 0.010485416, 0.28118288, 0.9596542, 0.0065715865, 0.99997841]
    np.testing.assert_allclose(np.stack([vp.alpha, vp.sigma], -1).ravel(), expected, rtol=2e-6)
    ve = processes.make('ve').at(np.array([1e-5, 0.5, 1.0]))
    np.testing.assert_allclose(ve.sigma, [0.010000852, 0.70710678, 50.0], rtol=1e-6)
    sub = processes.make('sub_vp').at(np.array([0.5]))
    np.testing.assert_allclose(sub.sigma, 0.9596542**2, rtol=1e-6)
    np.testing.assert_allclose(sub.alpha, 0.28118288, rtol=1e-6)
    cosine = processes.make('cosine', timesteps=4000).at(np.arange(4000))
    assert 1 - cosine.alpha[0] ** 2 < 1e-4 and cosine.alpha[-1] < 1e-3
    wanted = np.cos((2000 / 4000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine.alpha[1999] ** 2, wanted, rtol=1e-9)


@pytest.mark.parametrize('name', NAMES)
def test_time_is_the_inverse_and_both_modules_agree(name):
    way = processes.make(name, timesteps=50, beta_end=0.2)
    t = np.linspace(max(way.start, 0.01), way.end * 0.999, 9)
    at = way.at(t)
    np.testing.assert_allclose(way.time(at.sigma / at.alpha), t, rtol=1e-6)
    traced = jax.jit(way.at)(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(traced.alpha, at.alpha, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(traced.sigma, at.sigma, rtol=2e-4, atol=1e-6)
    assert traced.alpha.dtype == jnp.float32
    if name in ('linear', 'cosine', 'vp'):
        np.testing.assert_allclose(at.alpha**2 + at.sigma**2, 1, rtol=1e-9)
    if way.steps:  # at whole steps the table itself
        whole, real = way.at(np.arange(50)), way.at(np.arange(50.0))
        np.testing.assert_allclose(whole.alpha, real.alpha, rtol=1e-9)


@pytest.mark.parametrize(('name', 'spacing'), [
    *((name, 'karras') for name in ('linear', 'vp', 've')),
    *((name, 'uniform') for name in NAMES),
    *(('linear', spacing) for spacing in ('trailing', 'respaced', 'quadratic')),
])  # fmt: skip
def test_levels(name, spacing):
    way = processes.make(name, sigma_min=0.002, sigma_max=80.0)
    grid = processes.levels(way, 18, spacing)
    with np.errstate(divide='ignore'):
        ratio = grid.sigma / grid.alpha
    assert len(ratio) == 18 and (np.diff(ratio) > 0).all() and ratio[0] > 0
    if spacing == 'karras' and name == 've':
        i = np.arange(18)
        by_hand = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        np.testing.assert_allclose(grid.sigma[::-1], by_hand, rtol=1e-6)
    if spacing in ('trailing', 'respaced'):
        assert grid.t[-1] == 999
    # One level alone is noise, not the data.
    assert processes.levels(way, 1, spacing).t.tolist() == [way.end]
    if name == 'flow':
        np.testing.assert_allclose(grid.t, np.arange(1, 19) / 18)
        shifted = processes.levels(way, 4, 'uniform', shift=3.0)
        np.testing.assert_allclose(shifted.t, [0.5, 0.75, 0.9, 1.0])  # SD3's


def test_zero_terminal_snr():
    way = processes.make('linear', zero_terminal=True)
    plain = processes.make('linear').at(np.arange(1000))
    at = way.at(np.arange(1000))
    assert at.alpha[-1] == 0 and at.sigma[-1] == 1
    np.testing.assert_allclose(at.alpha[0], plain.alpha[0])
    grid = processes.levels(way, 10, 'trailing')
    assert grid.alpha[-1] == 0

    def denoise(x, t):  # the exact answer for data that are all one picture
        return jnp.full_like(x, 0.3)

    x = jax.random.normal(jax.random.key(0), (4, 5))
    keys = jax.random.split(jax.random.key(1), 4)
    np.testing.assert_allclose(samplers.ddim(denoise, x, grid, keys), 0.3, atol=1e-6)
    np.testing.assert_allclose(samplers.ancestral(denoise, x, grid, keys, variance='fixed_small'), 0.3, atol=1e-6)


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_error_scale_and_weight(prediction):
    alpha, sigma = jnp.array([[0.9], [0.3]]), jnp.array([[0.4], [0.8]])
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 2, 3))
    x_t, right = alpha * x_0 + sigma * eps, target(prediction, x_0, eps, alpha, sigma)
    off = to_x_0(prediction, right + 0.1, x_t, alpha, sigma) - x_0
    scale = error_scale(prediction, alpha, sigma)
    np.testing.assert_allclose(off, 0.1 * jnp.broadcast_to(scale, off.shape), rtol=1e-4)
    # min-SNR-5 is a weight of the error of x_0, whatever is predicted.
    snr = (alpha / sigma) ** 2
    found = weight('min_snr', prediction, alpha, sigma, 0.5, 5.0) * 0.01
    np.testing.assert_allclose(found, jnp.minimum(snr, 5) * jnp.square(off[:, :1]), rtol=1e-4)
    assert (weight('none', prediction, alpha, sigma, 0.5, 5.0) == 1).all()
    # The error of the velocity that the wrong x_0 stands for, with eps = (x_t - alpha x_0) / sigma.
    velocity = (x_t - alpha * (x_0 + off)) / sigma - (x_0 + off) - (eps - x_0)
    found = weight('flow', prediction, alpha, sigma, 0.5, 5.0) * 0.01
    np.testing.assert_allclose(found, jnp.square(velocity[:, :1]), rtol=1e-3)
    assert jnp.isfinite(weight('flow', 'x0', jnp.ones(1), jnp.zeros(1), 0.5, 5.0)).all()


def test_edm_network_sees_and_gives_unit_variance():
    """Facts of the paper's table 1 at sigma 0.5: c_in 1.414, c_out 0.3536; loss weight 1 / c_out^2 = 8."""
    alpha, sigma = jnp.ones(1), jnp.array([0.5])
    np.testing.assert_allclose(input_scale('edm', alpha, sigma), 1.4142136, rtol=1e-6)
    np.testing.assert_allclose(jnp.abs(error_scale('edm', alpha, sigma)), 0.35355339, rtol=1e-6)


def test_guidance():
    def apply(x, t, label):
        return x * (1 + label[:, None]) + t[:, None], label

    x, t, label = jax.random.normal(jax.random.key(0), (3, 7)), jnp.array([0.1, 0.2, 0.3]), jnp.array([1, 2, 3])
    everywhere = jnp.ones(3, bool)
    c, u = apply(x, t, label)[0], apply(x, t, jnp.full(3, 9))[0]
    for scale in (0.0, 1.0, 2.5):
        output, rest = guided(apply, x, t, label, 9, scale, everywhere, 0.0)
        np.testing.assert_allclose(output, u + scale * (c - u), rtol=1e-5)
        np.testing.assert_array_equal(rest, label)
    here = jnp.array([True, False, True])
    output, _ = guided(apply, x, t, label, 9, 2.5, here, 0.0)
    np.testing.assert_allclose(output[1], c[1], rtol=1e-6)
    assert jnp.abs(output[0] - c[0]).max() > 0.1
    part, _ = guided(apply, x, t, label, 9, 2.5, everywhere, 0.0, 1)
    whole, _ = guided(apply, x, t, label, 9, 2.5, everywhere, 0.0)
    plain, _ = apply(x, t, label)
    np.testing.assert_allclose(part[..., :1], whole[..., :1])
    np.testing.assert_allclose(part[..., 1:], plain[..., 1:])
    output, _ = guided(apply, x, t, label, 9, 2.5, everywhere, 1.0)
    np.testing.assert_allclose(output.std(1), c.std(1), rtol=1e-5)


@pytest.mark.parametrize('name', ['vp', 'sub_vp', 've', 'flow'])
def test_ode_likelihood_of_a_gaussian(name):
    """The exact denoiser of N(mean, diag std^2): the likelihood is the Gaussian's own."""
    way = processes.make(name)
    dims = 64
    mean = jnp.linspace(-0.2, 0.2, dims)
    std = jnp.linspace(0.1, 0.4, dims)

    def denoise(x, t):
        at = way.at(t)
        alpha, sigma = at.alpha[:, None], at.sigma[:, None]
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    x_0 = jnp.round((mean + std * jax.random.normal(jax.random.key(0), (256, dims)) + 1) * 127.5) / 127.5 - 1
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(256))
    found = jax.jit(lambda x, keys: ode_likelihood(denoise, x, way, keys, 60))(x_0, keys)['bits_per_dim']
    density = -0.5 * ((x_0 - mean) / std) ** 2 - jnp.log(std) - 0.5 * np.log(2 * np.pi)
    exact = -density.mean(1) / np.log(2) + np.log2(127.5)
    np.testing.assert_allclose(found.mean(), exact.mean(), atol=0.01)
    assert np.corrcoef(found, exact)[0, 1] > 0.99, 'each example has its own'
