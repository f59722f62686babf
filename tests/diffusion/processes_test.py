"""Processes, weights, guidance and the likelihood in continuous time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import options
from jaxgen.diffusion import levels, processes, samplers
from jaxgen.diffusion.conditioning import Condition, same
from jaxgen.diffusion.guidance import UNLIMITED, Guidance, guided, in_interval
from jaxgen.diffusion.likelihood import ode_likelihood, variational_bound
from jaxgen.diffusion.parameterisations import PREDICTIONS, error_scale, input_scale, target, to_x_0, weight

NAMES = tuple(processes.PROCESSES)


def make(name, **given):
    """A process by its name, with those of the given fields that it has. The listed betas are DDPM's."""
    given = {'betas': tuple(np.linspace(1e-4, 0.02, 1000)), **given}
    known = options.fields(processes.PROCESSES[name])
    return processes.PROCESSES[name](**{k: v for k, v in given.items() if k in known})


def test_published_values():
    """score_sde's own: VP at t = 0.001, 0.5, 1; VE from 0.01 to 50."""
    vp = make('vp').at(np.array([0.001, 0.5, 1.0]))
    expected = [0.99994503, 0.010485416, 0.28118288, 0.9596542, 0.0065715865, 0.99997841]
    np.testing.assert_allclose(np.stack([vp.alpha, vp.sigma], -1).ravel(), expected, rtol=2e-6)
    ve = make('ve', sigma_min=0.01, sigma_max=50.0).at(np.array([1e-5, 0.5, 1.0]))
    np.testing.assert_allclose(ve.sigma, [0.010000852, 0.70710678, 50.0], rtol=1e-6)
    sub = make('sub_vp').at(np.array([0.5]))
    np.testing.assert_allclose(sub.sigma, 0.9596542**2, rtol=1e-6)
    np.testing.assert_allclose(sub.alpha, 0.28118288, rtol=1e-6)
    cosine = make('cosine', timesteps=4000).at(np.arange(4000))
    assert 1 - cosine.alpha[0] ** 2 < 1e-4 and cosine.alpha[-1] < 1e-3
    wanted = np.cos((2000 / 4000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine.alpha[1999] ** 2, wanted, rtol=1e-9)


@pytest.mark.parametrize('name', NAMES)
def test_time_is_the_inverse_and_both_modules_agree(name):
    process = make(name, timesteps=50, beta_end=0.2)
    t = np.linspace(max(process.start, 0.01), process.end * 0.999, 9)
    at = process.at(t)
    np.testing.assert_allclose(process.time(at.sigma / at.alpha), t, rtol=1e-6)
    traced = jax.jit(process.at)(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(traced.alpha, at.alpha, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(traced.sigma, at.sigma, rtol=2e-4, atol=1e-6)
    assert traced.alpha.dtype == jnp.float32
    if name in ('linear', 'cosine', 'vp'):
        np.testing.assert_allclose(at.alpha**2 + at.sigma**2, 1, rtol=1e-9)
    if process.steps:  # at whole steps the table itself
        whole, real = process.at(np.arange(50)), process.at(np.arange(50.0))
        np.testing.assert_allclose(whole.alpha, real.alpha, rtol=1e-9)


@pytest.mark.parametrize(('name', 'spacing'), [
    *((name, 'karras') for name in ('linear', 'vp', 've')),
    *((name, 'uniform') for name in NAMES),
    *(('linear', spacing) for spacing in ('trailing', 'respaced', 'quadratic')),
])  # fmt: skip
def test_levels(name, spacing):
    process = make(name, sigma_min=0.002, sigma_max=80.0)
    grid = levels.visited(process, 18, spacing)
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
    assert levels.visited(process, 1, spacing).t.tolist() == [process.end]
    if name == 'flow':
        np.testing.assert_allclose(grid.t, np.arange(1, 19) / 18)
        shifted = levels.visited(process, 4, 'uniform', shift=3.0)
        np.testing.assert_allclose(shifted.t, [0.5, 0.75, 0.9, 1.0])  # SD3's


def test_zero_terminal_snr():
    process = make('linear', zero_terminal=True)
    plain = make('linear').at(np.arange(1000))
    at = process.at(np.arange(1000))
    assert at.alpha[-1] == 0 and at.sigma[-1] == 1
    np.testing.assert_allclose(at.alpha[0], plain.alpha[0])
    grid = levels.visited(process, 10, 'trailing')
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


def labelled_guidance(apply, x, t, label, active, **fields):
    """`guided` by a label whose absence is class 9."""
    condition = Condition('label', 'vector', None, same, lambda v: jnp.full_like(v, 9), 0.1)

    def by_values(x, t, values):
        return apply(x, t, values['label'])

    return guided(by_values, x, t, (condition,), {'label': label}, Guidance(**fields), active)


def test_guidance():
    def apply(x, t, label):
        return x * (1 + label[:, None]) + t[:, None], label

    x, t, label = jax.random.normal(jax.random.key(0), (3, 7)), jnp.array([0.1, 0.2, 0.3]), jnp.array([1, 2, 3])
    everywhere = jnp.ones(3, bool)
    c, u = apply(x, t, label)[0], apply(x, t, jnp.full(3, 9))[0]
    for scale in (0.0, 1.0, 2.5):
        output, rest = labelled_guidance(apply, x, t, label, everywhere, scale=scale)
        np.testing.assert_allclose(output, u + scale * (c - u), rtol=1e-5)
        np.testing.assert_array_equal(rest, label)
    active = jnp.array([True, False, True])
    output, _ = labelled_guidance(apply, x, t, label, active, scale=2.5)
    np.testing.assert_allclose(output[1], c[1], rtol=1e-6)
    assert jnp.abs(output[0] - c[0]).max() > 0.1
    part, _ = labelled_guidance(apply, x, t, label, everywhere, scale=2.5, channels=1)
    whole, _ = labelled_guidance(apply, x, t, label, everywhere, scale=2.5)
    plain, _ = apply(x, t, label)
    np.testing.assert_allclose(part[..., :1], whole[..., :1])
    np.testing.assert_allclose(part[..., 1:], plain[..., 1:])
    output, _ = labelled_guidance(apply, x, t, label, everywhere, scale=2.5, rescale=1.0)
    np.testing.assert_allclose(output.std(1), c.std(1), rtol=1e-5)


@pytest.mark.parametrize('name', ['vp', 'sub_vp', 've', 'flow'])
def test_ode_likelihood_of_a_gaussian(name):
    """The exact denoiser of N(mean, diag std^2): the likelihood is the Gaussian's own."""
    process = make(name)
    dims = 64
    mean = jnp.linspace(-0.2, 0.2, dims)
    std = jnp.linspace(0.1, 0.4, dims)

    def denoise(x, t):
        at = process.at(t)
        alpha, sigma = at.alpha[:, None], at.sigma[:, None]
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    x_0 = jnp.round((mean + std * jax.random.normal(jax.random.key(0), (256, dims)) + 1) * 127.5) / 127.5 - 1
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(256))
    found = jax.jit(lambda x, keys: ode_likelihood(denoise, x, process, keys, 60))(x_0, keys)['bits_per_dim']
    density = -0.5 * ((x_0 - mean) / std) ** 2 - jnp.log(std) - 0.5 * np.log(2 * np.pi)
    exact = -density.mean(1) / np.log(2) + np.log2(127.5)
    np.testing.assert_allclose(found.mean(), exact.mean(), atol=0.01)
    assert np.corrcoef(found, exact)[0, 1] > 0.99, 'each example has its own'


GREY = 1 / 127.5  # a grey level, of images in [-1, 1]


def gaussian_denoiser(process, std):
    """E[x_0 | x_t] of N(0, std^2)."""

    def denoise(x, t):
        at = process.at(jnp.broadcast_to(t, (len(x),)))
        alpha, sigma = at.alpha[:, None], at.sigma[:, None]
        return alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x

    return denoise


def bits_of_gaussian(std, noise=0.0):
    """Bits per dimension of N(0, std^2 + noise^2) for draws of N(0, std^2) with uniform dequantisation noise."""
    variance = std**2 + noise**2
    moment = std**2 + GREY**2 / 12
    return np.log2(127.5) + 0.5 * np.log2(2 * np.pi * variance) + moment / variance / (2 * np.log(2))


@pytest.mark.parametrize('levels', [0.5, 1, 3, 13])
@pytest.mark.parametrize(('name', 'options'), [
    ('vp', {}), ('sub_vp', {}), ('flow', {}), ('ve', {'sigma_min': 0.002, 'sigma_max': 80.0}), ('ve', {}),
], ids=['vp', 'sub_vp', 'flow', 'edm', 've'])  # fmt: skip
def test_ode_likelihood_of_narrow_gaussians(name, options, levels):
    """Data whose standard deviation is some grey levels: the start of the integral is no wider than they are.

    VE begins at its sigma_min of 2.55 grey levels (0.01 over images in [0, 1]): the density is that of data with it."""
    process, std = make(name, **options), levels * GREY
    x_0 = std * jax.random.normal(jax.random.key(0), (1024, 64))
    keys = jax.random.split(jax.random.key(1), 1024)
    denoise = gaussian_denoiser(process, std)
    found = jax.jit(lambda x: ode_likelihood(denoise, x, process, keys, 50))(x_0)['bits_per_dim']
    start = {'sub_vp': 1e-6, 'vp': 1e-3, 'flow': 1e-5}.get(name, options.get('sigma_min', 0.02))
    np.testing.assert_allclose(found.mean(), bits_of_gaussian(std, start), atol=0.015)
    assert start == 0.02 or abs(found.mean() - bits_of_gaussian(std)) < 0.04


@pytest.mark.parametrize(('name', 'options', 'error'), [
    ('vp', {}, 0.003), ('flow', {}, 0.012), ('ve', {'sigma_min': 0.002, 'sigma_max': 80.0}, 0.002), ('ve', {}, 0.001),
], ids=['vp', 'flow', 'edm', 've'])  # fmt: skip
def test_ode_likelihood_of_separate_peaks(name, options, error):
    """Pixels near -1, 0 or 1 only, as in scans of digits, where the score is far from linear: the default 50 steps are
    enough to two digits, 200 to three. The density of the same dequantised images is known, and so each one's bits."""
    process, std, n, dims = make(name, **options), GREY, 32, 64
    means, shares = jnp.array([-1.0, 0.0, 1.0]), jnp.array([0.5, 0.2, 0.3])

    def denoise(x, t):
        at = process.at(jnp.broadcast_to(t, (len(x),)))
        alpha, sigma = at.alpha[:, None, None], at.sigma[:, None, None]
        variance, apart = alpha**2 * std**2 + sigma**2, x[..., None] - alpha * means
        weights = jax.nn.softmax(jnp.log(shares) - apart**2 / (2 * variance), -1)
        return (weights * (means + alpha * std**2 / variance * apart)).sum(-1)

    x_0 = means[jax.random.choice(jax.random.key(0), 3, (n, dims), p=shares)]
    x_0 += std * jax.random.normal(jax.random.key(1), (n, dims))
    keys = jax.random.split(jax.random.key(2), n)
    noise = [jax.random.uniform(jax.random.split(key)[0], (dims,), minval=-0.5, maxval=0.5) for key in keys]
    y = np.asarray(x_0 + jnp.stack(noise) * GREY, np.float64)[..., None]
    variance = std**2 + {'vp': 1e-3, 'flow': 1e-5, 've': options.get('sigma_min', 0.02)}[name] ** 2
    peaks = np.asarray(shares) * np.exp(-((y - np.asarray(means)) ** 2) / (2 * variance))
    exact = -np.log2(peaks.sum(-1) / np.sqrt(2 * np.pi * variance) / 127.5).mean(-1)
    for steps, most in ((50, error), (200, 2e-4)):
        found = jax.jit(lambda x, steps=steps: ode_likelihood(denoise, x, process, keys, steps))(x_0)['bits_per_dim']
        assert abs(found.mean() - exact.mean()) < most
    np.testing.assert_allclose(found, exact, atol=2e-3)


@pytest.mark.parametrize(('levels', 'tight'), [(0.5, 1.2), (3, 0.3), (13, 0.7)])
def test_bound_of_a_chain_for_narrow_gaussians(levels, tight):
    """The bound of the best model lies above the entropy of the 256 levels, by what fixed variances cost."""
    from scipy.stats import norm

    process, std = make('linear'), levels * GREY
    table = process.at(np.arange(1000))
    grey = np.arange(-127, 128)
    p = np.diff(norm.cdf((np.append(grey, 128) - 0.5) / levels))
    entropy = -(p * np.log2(np.maximum(p, 1e-300))).sum()
    # Levels are the odd multiples of half a grey level away from 0; the mean is put on one.
    x_0 = np.round(np.random.default_rng(0).normal(size=(64, 64)) * levels) * GREY + GREY / 2
    inner = gaussian_denoiser(process, np.sqrt(std**2 + GREY**2 / 12))
    denoise = lambda x, t: GREY / 2 + inner(x - process.at(t).alpha[:, None] * GREY / 2, t)  # noqa: E731
    keys = jax.random.split(jax.random.key(1), 64)
    bound = jax.jit(lambda x: variational_bound(denoise, x, table, 'fixed_small', keys, 100))
    bits = bound(jnp.asarray(x_0, jnp.float32))['bits_per_dim'].mean()
    assert entropy - 0.02 < bits < entropy + tight


def test_guidance_at_alpha_0():
    """Without an upper end every level is guided; with one sigma / alpha is infinite at alpha 0, and above it."""
    alpha, sigma = jnp.array([0.0, 0.5, 1.0, 1.0]), jnp.array([1.0, 0.5, 0.25, 0.0])
    assert in_interval(alpha, sigma, 0.0, UNLIMITED).tolist() == [True] * 4
    assert in_interval(alpha, sigma, 0.5, UNLIMITED).tolist() == [True, True, False, False]
    assert in_interval(alpha, sigma, 0.0, 1e8).tolist() == [False, True, True, True]
    assert in_interval(alpha, sigma, 0.25, 1.0).tolist() == [False, True, True, False]


@pytest.mark.parametrize('composed', [False, True])
def test_outside_its_interval_guidance_costs_one_evaluation(composed):
    """In a sampler's loop, with numbers that are arguments of its program: as many examples are evaluated as the steps
    in and out of the interval need, and the output is that of the two formulas."""
    names = ('a', 'b') if composed else ('a',)
    bound = tuple(Condition(name, 'vector', None, same, lambda v: jnp.full_like(v, 9), 0.1) for name in names)
    x, values = jax.random.normal(jax.random.key(0), (3, 7)), {name: jnp.arange(1.0, 4) for name in names}
    evaluated = []

    def network(x, t, values):
        jax.debug.callback(lambda n: evaluated.append(int(n)), len(x))
        return x * (1 + sum(values.values()))[:, None] + t[:, None], None

    def denoise(x, t, scale, low, high):
        fields = {'conditions': names, 'scales': (scale,) * 2} if composed else {'scale': scale}
        guide = Guidance(**fields, low=low, high=high)
        assert guide.limited
        active = in_interval(1 - t, t, low, high)
        return guided(network, x, jnp.broadcast_to(t, (len(x),)), bound, values, guide, active)[0]

    times, sets = np.array([0.9, 0.7, 0.5, 0.3, 0.1], np.float32), 4 if composed else 2
    ratio = times / (1 - times)
    run = jax.jit(lambda *numbers: jax.lax.map(lambda t: denoise(x, t, *numbers), times))
    for low, high in ((0.5, 3.0), (0.0, UNLIMITED), (100.0, UNLIMITED), (0.0, 0.5)):
        del evaluated[:]
        outputs = jax.block_until_ready(run(2.5, low, high))
        jax.effects_barrier()
        inside = (low <= ratio) & (ratio <= high)
        assert sorted(evaluated) == sorted(np.where(inside, 3 * sets, 3))
        for t, within, output in zip(times, inside, outputs, strict=True):
            with_, without = (x * (1 + s)[:, None] + t for s in (sum(values.values()), jnp.full(3, 9.0 * len(names))))
            singles = [x * (1 + values[name] + 9)[:, None] + t for name in names] if composed else [with_]
            right = without + sum(2.5 * (one - without) for one in singles) if within else with_
            np.testing.assert_allclose(output, right, rtol=1e-5, atol=1e-5)


def test_rescaled_guidance_of_a_constant_output():
    """A new network puts out zeros: their standard deviation is 0, and nothing is rescaled."""
    x, t, label = jnp.ones((2, 3)), jnp.ones(2), jnp.array([0, 1])
    output, _ = labelled_guidance(
        lambda x, t, label: (0 * x, None), x, t, label, jnp.ones(2, bool), scale=2.0, rescale=0.7
    )
    np.testing.assert_array_equal(output, 0)


@pytest.mark.parametrize('prediction', ['v', 'x0', 'flow', 'edm'])
def test_conversions_at_alpha_0(prediction):
    """x_t is noise alone: the output that the target asks for still leads to x_0."""
    alpha, sigma = jnp.zeros(1), jnp.ones(1)
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 5))
    output = target(prediction, x_0, eps, alpha, sigma)
    np.testing.assert_allclose(to_x_0(prediction, output, eps, alpha, sigma), x_0, rtol=1e-5)
    assert jnp.isfinite(error_scale(prediction, alpha, sigma)).all()
    assert jnp.isfinite(input_scale(prediction, alpha, sigma)).all()
    for weighting in ('none', 'min_snr', 'eps', 'v', 'flow'):
        assert jnp.isfinite(weight(weighting, prediction, alpha, sigma, 0.5, 5.0)).all()


@pytest.mark.parametrize(('name', 'options'), [
    ('vp', {}), ('sub_vp', {}), ('flow', {}), ('ve', {}), ('linear', {}), ('cosine', {}), ('geometric', {}),
    ('linear', {'zero_terminal': True}),
])  # fmt: skip
def test_random_fourier_features_receive_a_logarithm(name, options):
    """score_sde's frequencies have a standard deviation of 16: times between neighbours of 1000 are to differ by much
    less than a period of it, and finitely at both ends."""
    process = make(name, **options)
    t = jnp.arange(1000) if process.steps else jnp.linspace(process.start, process.end, 1001)
    logarithm = processes.network_time(process, t, 'eps', logarithmic=True)
    assert jnp.isfinite(logarithm).all() and (jnp.diff(logarithm) > -1e-6).all()
    assert jnp.median(jnp.diff(logarithm)) < 1 / 16
    at = process.at(t)
    inside = (at.alpha > 1e-3) & (at.sigma > 1e-3)
    expected = jnp.log(at.sigma / at.alpha) - (np.log(2) if name == 've' else 0)  # as published, over images in [0, 1]
    np.testing.assert_allclose(logarithm[inside], expected[inside], rtol=1e-4, atol=1e-4)
    c_noise = processes.network_time(process, t, 'eps', logarithmic=False)
    np.testing.assert_array_equal(c_noise, process.c_noise(t))


def test_sigmas_are_those_of_the_choices_own_paper():
    """score_sde's 0.01 and 50 and NCSN's 0.01 and 1 are over images in [0, 1], EDM's over [-1, 1]."""
    assert processes.sigma_range('ve') == (0.02, 100.0)
    assert processes.sigma_range('geometric') == (0.02, 2.0)
    assert processes.sigma_range('edm') == (0.002, 80.0)
    assert processes.sigma_range('edm', 0.01, None) == (0.01, 80.0)
    section = options.complete(processes.ve, {}, 'model.process') | {'name': 've'}
    edm = processes.make(section, 'edm').at(np.array([0.0, 1.0])).sigma
    np.testing.assert_allclose(edm, [0.002, 80.0])
    ends = make('ve').at(np.array([0.0, 1.0])).sigma
    np.testing.assert_allclose(ends, [0.02, 100.0])


@pytest.mark.parametrize('shift', [0.05, 0.08, 0.1, 0.15, 0.18, 1.1, 3.0, 3.1, 7.3])
@pytest.mark.parametrize('n', [1, 2, 7])
def test_a_shifted_flow_still_begins_at_noise(shift, n):
    """alpha is 0 at the last level whatever is rounded (at 0.1 it was -2e-16, whose logarithm is no number), times are
    those of Esser et al. 2024, eq. 23, and samplers that take logarithms sample."""
    process = make('flow')
    grid = levels.visited(process, n, 'uniform', shift)
    assert grid.alpha[-1] == 0 and grid.sigma[-1] == 1 and (grid.alpha[:-1] > 0).all()
    even = np.arange(1, n + 1) / n
    np.testing.assert_allclose(grid.t, shift * even / (1 + (shift - 1) * even), rtol=1e-12)
    x, keys = jnp.full((2, 1, 1, 1), 0.3), jax.random.split(jax.random.key(0), 2)
    for sampler in (samplers.dpm_solver_pp, samplers.unipc, samplers.heun, samplers.euler_ancestral):
        sample = sampler(lambda x, t: 0 * x + 0.25, x, grid, keys)
        np.testing.assert_allclose(sample, 0.25, atol=1e-6)  # an estimate that never changes is the sample


def test_a_last_step_is_shifted_with_the_others():
    grid = levels.visited(make('flow'), 5, 'uniform', 3.0, last_step=0.04)
    even = np.linspace(0.04, 1, 5)
    np.testing.assert_allclose(grid.t, 3 * even / (1 + 2 * even), rtol=1e-12)
