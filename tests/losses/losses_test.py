"""Likelihoods, divergences and adversarial losses against slow oracles."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxgen.losses import adversarial, likelihoods
from jaxgen.losses.divergences import normal_kl

LEVELS = np.linspace(-1, 1, 256, dtype=np.float64)


@pytest.mark.parametrize('mean, log_var', [(0.0, 0.0), (1.5, -2.0), (-0.3, 1.2)])
@pytest.mark.parametrize('prior_mean, prior_log_var', [(0.0, 0.0), (0.7, -0.5)])
def test_normal_kl_is_the_integral(mean, log_var, prior_mean, prior_log_var):
    x = np.linspace(-20, 20, 200_001)
    q = stats.norm(mean, math.exp(log_var / 2))
    p = stats.norm(prior_mean, math.exp(prior_log_var / 2))
    integral = np.trapezoid(q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), x)
    actual = normal_kl(jnp.full((1, 1), mean), jnp.full((1, 1), log_var), prior_mean, prior_log_var)
    np.testing.assert_allclose(actual, [integral], rtol=1e-5, atol=1e-6)


def test_normal_kl_sums_per_example_and_is_exact_for_near_equals():
    rng = np.random.default_rng(0)
    mean, log_var = rng.normal(size=(2, 3, 4, 5)).astype('float32')
    slow = [
        sum(
            0.5 * (float(m) ** 2 + math.exp(float(v)) - 1 - float(v))
            for m, v in zip(mean[i].flat, log_var[i].flat, strict=True)
        )
        for i in range(3)
    ]
    np.testing.assert_allclose(normal_kl(mean, log_var), slow, rtol=1e-5)
    assert (np.asarray(normal_kl(mean, log_var, mean, log_var)) == 0).all()
    # 0.5 (exp(d) - 1 - d) for a difference d of 0.001, which exp(d) - 1 in float32 would lose.
    near = normal_kl(jnp.zeros((1, 1)), jnp.full((1, 1), 1e-3))
    np.testing.assert_allclose(near, [0.5 * (math.expm1(1e-3) - 1e-3)], rtol=1e-3)


def test_bernoulli_against_loops():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(4, 3, 2, 1)).astype('float32') * 4
    x = rng.uniform(size=logits.shape).astype('float32')
    slow = []
    for example in range(4):
        total = 0.0
        for logit, value in zip(logits[example].flat, x[example].flat, strict=True):
            one = 1 / (1 + math.exp(-float(logit)))
            total += float(value) * math.log(one) + (1 - float(value)) * math.log(1 - one)
        slow.append(total)
    np.testing.assert_allclose(likelihoods.bernoulli(logits, x), slow, rtol=1e-4)


def test_bernoulli_of_all_images_sums_to_one():
    images = jnp.array(list(itertools.product([0.0, 1.0], repeat=6)))  # [64, 6]
    logits = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (6,)) * 3, images.shape)
    assert abs(float(jnp.exp(likelihoods.bernoulli(logits, images)).sum()) - 1) < 1e-5


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_bernoulli_at_large_logits(dtype):
    logits = jnp.array([[100.0], [100.0], [-100.0], [-100.0]], dtype)
    x = jnp.array([[0.0], [1.0], [0.0], [1.0]], dtype)
    actual = likelihoods.bernoulli(logits, x)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, [-100, 0, 0, -100], atol=1e-6)
    slope = jax.grad(lambda l: likelihoods.bernoulli(l, x).sum())(logits)
    np.testing.assert_allclose(slope.astype(jnp.float32)[:, 0], [-1, 0, 0, 1], atol=1e-6)


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.7])
def test_cross_entropy_against_numpy(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.normal(size=(2, 3, 5)), rng.integers(0, 5, (2, 3))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = smoothing / 5 + (1 - smoothing) * (np.arange(5) == labels[..., None])
    actual = likelihoods.cross_entropy(jnp.float32(logits), jnp.array(labels), smoothing)
    np.testing.assert_allclose(actual, -(expected * log_p).sum(-1), 1e-5)
    slope = jax.grad(lambda x: likelihoods.cross_entropy(x, jnp.array(labels), smoothing).sum())(jnp.float32(logits))
    np.testing.assert_allclose(slope, np.exp(log_p) - expected, atol=1e-6)


def test_a_label_out_of_range_is_not_a_number():
    assert likelihoods.cross_entropy(jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.array([1])) == pytest.approx(math.log(2))
    actual = likelihoods.cross_entropy(jnp.zeros((3, 3)), jnp.array([0, 3, -1]))
    assert np.isnan(actual).tolist() == [False, True, True]


def test_gaussian_against_scipy():
    rng = np.random.default_rng(2)
    mean, x = rng.normal(size=(2, 5, 3, 2)).astype('float32')
    for log_scale in (np.float32(-1.3), rng.normal(size=(5, 3, 2)).astype('float32')):
        slow = stats.norm.logpdf(x.astype('float64'), mean, np.exp(log_scale)).sum((1, 2))
        np.testing.assert_allclose(likelihoods.gaussian(mean, log_scale, x), slow, rtol=1e-4)


@jax.jit
def every_level(mean, scale):
    """log P of all quantisation levels by the function under test, [256]."""
    x = jnp.linspace(-1, 1, 256)[:, None]
    return likelihoods.discretised_gaussian(jnp.full((256, 1), mean), jnp.log(scale), x)


def test_discretised_gaussian_sums_to_one():
    for scale, tolerance in ((0.001, 2e-4), (0.05, 2e-4), (1.0, 2e-4), (30.0, 2e-4)):
        for mean in (-3.0, -1.0, -0.2, 0.0, 0.999, 1.7):
            total = np.exp(np.asarray(every_level(mean, scale), 'float64')).sum()
            assert abs(total - 1) < tolerance, (mean, scale)


def test_discretised_gaussian_against_scipy():
    inner = (LEVELS[:-1] + LEVELS[1:]) / 2
    lower, upper = np.append(-np.inf, inner), np.append(inner, np.inf)
    for mean, scale in ((-0.4, 0.1), (0.5, 0.3), (1.2, 0.05), (0.0, 0.01)):
        a, b = (lower - mean) / scale, (upper - mean) / scale
        a, b = np.where(a > 0, -b, a), np.where(a > 0, -a, b)  # by the lower tail
        log_b = stats.norm.logcdf(b)
        slow = log_b + np.log1p(-np.exp(stats.norm.logcdf(a) - log_b))
        np.testing.assert_allclose(every_level(mean, scale), slow, rtol=2e-3, atol=2e-3, err_msg=f'{mean} {scale}')


def test_discretised_logistic_against_scipy():
    inner = (LEVELS[:-1] + LEVELS[1:]) / 2
    lower, upper = np.append(-np.inf, inner), np.append(inner, np.inf)
    x = jnp.linspace(-1, 1, 256)[:, None]
    for mean, scale in ((-0.4, 0.1), (0.5, 0.3), (1.2, 0.05), (0.0, 0.01), (0.3, 2.0)):
        a, b = (lower - mean) / scale, (upper - mean) / scale
        a, b = np.where(a > 0, -b, a), np.where(a > 0, -a, b)  # by the lower tail
        log_b = stats.logistic.logcdf(b)
        slow = log_b + np.log1p(-np.exp(stats.logistic.logcdf(a) - log_b))
        actual = likelihoods.discretised_logistic(jnp.full((256, 1), mean), jnp.log(scale), x)
        np.testing.assert_allclose(actual, slow, rtol=2e-3, atol=2e-3, err_msg=f'{mean} {scale}')
        assert abs(np.exp(np.asarray(actual, np.float64)).sum() - 1) < 2e-4


@pytest.mark.parametrize('log_scale', [1, 5, 12, 30, 90, 300])
def test_discretised_gaussian_of_any_width(log_scale):
    """A bin beside a wide normal has the density at its middle times its width."""
    x, mean = 0.0039215, 0.7
    actual = likelihoods.discretised_gaussian(jnp.full((1, 1), mean), float(log_scale), jnp.full((1, 1), x))
    z = (x - mean) * math.exp(-log_scale)
    expected = math.log(2 / 255) - log_scale - 0.5 * math.log(2 * math.pi) - z * z / 2
    np.testing.assert_allclose(actual, [expected], rtol=1e-5)


@pytest.mark.parametrize('log_scale', [-300.0, -90.0, 90.0, 300.0])
def test_likelihoods_of_extreme_scales_are_finite_with_gradients(log_scale):
    x = jnp.array([[-1.0], [0.0039215], [1.0]])
    for density in (likelihoods.gaussian, likelihoods.discretised_gaussian):
        for mean in (x, x + 0.5, x - 3):
            value, slopes = jax.value_and_grad(lambda *a, f=density: f(*a, x).sum(), (0, 1))(mean, log_scale)
            assert np.isfinite(value) and all(np.isfinite(s).all() for s in slopes), (density, mean)
    # The density at its mean is 1 / (scale sqrt(2 pi)), whatever the scale.
    at_mean = likelihoods.gaussian(x[:1], log_scale, x[:1])
    np.testing.assert_allclose(at_mean, [-log_scale - 0.5 * math.log(2 * math.pi)], rtol=1e-6)


def test_normal_kl_of_equal_means_is_finite_for_any_prior():
    expected = 0.5 * (math.expm1(0) - 0)
    np.testing.assert_allclose(normal_kl(jnp.ones((1, 1)), jnp.full((1, 1), -200.0), 1.0, -200.0), [expected])


def test_discretised_gaussian_is_finite_far_out_with_its_gradient():
    x = jnp.array([[-1.0], [-1 + 2 / 255], [1.0], [0.0039215], [-1.0], [1.0]])
    mean = jnp.array([[5.0], [5.0], [-5.0], [-5.0], [-5.0], [5.0]])

    def total(mean, log_scale):
        return likelihoods.discretised_gaussian(mean, log_scale, x).sum()

    for log_scale in (-5.0, 0.0, 5.0):
        value, slopes = jax.value_and_grad(total, (0, 1))(mean, log_scale)
        assert np.isfinite(value) and all(np.isfinite(s).all() for s in slopes), log_scale
    towards = jax.grad(total)(mean, -2.0)[:4, 0]
    assert (np.sign(towards) == [-1, -1, 1, 1]).all(), 'the mean is pulled to the pixel from afar'


def test_shapes_that_would_broadcast_are_refused():
    one, many = jnp.zeros((4, 1)), jnp.zeros((4, 3))
    for call in (
        lambda: likelihoods.bernoulli(one, many),
        lambda: likelihoods.cross_entropy(many, jnp.zeros((4, 1), int)),
        lambda: likelihoods.discretised_logistic_mixture(jnp.zeros((1, 2, 3)), jnp.zeros((4, 2, 1))),
        lambda: normal_kl(many, one),
    ):
        with pytest.raises(AssertionError):
            call()


def test_wasserstein_losses():
    real, fake = jnp.array([1.0, 2.0, 6.0]), jnp.array([0.5, -1.0])
    assert float(adversarial.wasserstein_critic(real, fake)) == -0.25 - 3.0
    assert float(adversarial.wasserstein_generator(fake)) == 0.25


def test_gradient_penalty_of_a_linear_critic():
    w = jax.random.normal(jax.random.key(0), (4, 3, 2))
    real, fake = jax.random.normal(jax.random.key(1), (2, 5, 4, 3, 2))
    for length in (0.25, 1.0, 3.0):
        unit = w / jnp.linalg.norm(w.ravel())

        def critic(x, unit=unit, length=length):
            return (x * unit * length).sum((1, 2, 3))

        for one_sided in (False, True):
            got = adversarial.gradient_penalty(critic, real, fake, jax.random.key(2), one_sided)
            want = max(length - 1, 0) ** 2 if one_sided else (length - 1) ** 2
            np.testing.assert_allclose(got, np.full(5, want), atol=1e-5)


def test_gradient_norm_against_finite_differences():
    a, b = jax.random.normal(jax.random.key(0), (2, 6, 7))

    def critic(x):
        return jnp.tanh(x.reshape(len(x), -1) @ a) @ b[0]

    x = jax.random.normal(jax.random.key(1), (3, 2, 3, 1))
    got = adversarial.input_gradient_norm(critic, x)

    def slow(x):  # float64, one example
        return np.tanh(x.reshape(-1) @ np.asarray(a, 'float64')) @ np.asarray(b[0], 'float64')

    for i in range(3):
        point, square = np.asarray(x[i], 'float64'), 0.0
        for index in np.ndindex(point.shape):
            step = np.zeros_like(point)
            step[index] = 1e-5
            square += ((slow(point + step) - slow(point - step)) / 2e-5) ** 2
        np.testing.assert_allclose(got[i], math.sqrt(square), rtol=1e-4)


def test_gradient_penalty_points_lie_between_each_pair():
    # The slope of |x|^2 / 2 at x is |x|, and so each point's position.
    real = jnp.zeros((256, 2, 2, 1))
    fake = jnp.full((256, 2, 2, 1), 5.0)  # at distance 10

    def critic(x):
        return 0.5 * (x**2).sum((1, 2, 3))

    fraction = np.sqrt(adversarial.gradient_penalty(critic, real, fake, jax.random.key(0), True)) + 1  # |x| above 1
    fraction = fraction[fraction > 1.0] / 10
    assert len(np.unique(fraction)) > 200, 'each pair has its own point'
    assert fraction.max() <= 1 and fraction.max() > 0.95
    assert abs(np.median(fraction) - 0.55) < 0.1, 'uniform on (0.1, 1) once the fractions below 0.1 are left out'


def test_gradient_penalty_of_a_flat_critic_is_finite():
    def penalty(w, one_sided):
        x = jnp.ones((3, 2, 2, 1))
        critic = lambda x: w * x.sum((1, 2, 3))  # noqa: E731
        return adversarial.gradient_penalty(critic, x, x, jax.random.key(0), one_sided).mean()

    for one_sided in (False, True):
        value, slope = jax.value_and_grad(penalty)(0.0, one_sided)
        assert np.isfinite(slope) and abs(float(value) - (not one_sided)) < 1e-5


def test_games_against_their_formulas():
    rng = np.random.default_rng(5)
    real, fake = 2 * rng.normal(size=40) + 1, 2 * rng.normal(size=30) - 1

    def log_sigmoid(x):
        return -np.log1p(np.exp(-x))

    logs = log_sigmoid(real).mean() + log_sigmoid(-fake).mean()  # V(D, G) of Goodfellow et al.
    want = {
        'minimax': (-logs, log_sigmoid(-fake).mean()),
        'non_saturating': (-logs, -log_sigmoid(fake).mean()),
        'wasserstein': (fake.mean() - real.mean(), -fake.mean()),
        'hinge': (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean(), -fake.mean()),
        'least_squares': (((real - 1) ** 2).mean() / 2 + (fake**2).mean() / 2, ((fake - 1) ** 2).mean() / 2),
    }
    assert set(want) == set(adversarial.ADVERSARIAL_LOSSES)
    for name, (discriminator_loss, generator_loss) in adversarial.ADVERSARIAL_LOSSES.items():
        for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
            a, b = jnp.asarray(real, dtype), jnp.asarray(fake, dtype)
            got = discriminator_loss(a, b), generator_loss(b)
            assert all(value.dtype == jnp.float32 and value.shape == () for value in got)
            np.testing.assert_allclose(got, want[name], rtol=tolerance, atol=tolerance, err_msg=name)
        # Of patches it is the mean over all.
        np.testing.assert_allclose(generator_loss(jnp.asarray(fake).reshape(5, 3, 2)), want[name][1], rtol=1e-5)


def test_games_are_finite_with_slopes_at_large_logits():
    for name, (discriminator_loss, generator_loss) in adversarial.ADVERSARIAL_LOSSES.items():
        for size in (-100.0, 100.0):
            x = jnp.full(3, size)
            slopes = (*jax.grad(discriminator_loss, (0, 1))(x, x), jax.grad(generator_loss)(x))
            assert all(np.isfinite(s).all() for s in slopes), name
    # The minimax loss saturates where the discriminator recognises samples; the non-saturating one does not.
    surely_fake = jnp.full(1, -20.0)
    assert abs(float(jax.grad(adversarial.minimax_generator)(surely_fake)[0])) < 1e-6
    assert abs(float(jax.grad(adversarial.non_saturating_generator)(surely_fake)[0]) + 1) < 1e-6


def test_r1_penalty():
    a, b = jax.random.normal(jax.random.key(0), (2, 6, 7))

    def critic(x):
        return jnp.tanh(x.reshape(len(x), -1) @ a) @ b[0]

    x = jax.random.normal(jax.random.key(1), (3, 2, 3, 1))
    norm = adversarial.input_gradient_norm(critic, x)  # held against finite differences above
    np.testing.assert_allclose(adversarial.r1_penalty(critic, x), 0.5 * np.square(norm), rtol=1e-5)
    # Of a linear critic w x the penalty is |w|^2 / 2, and so its slope by w is w: double differentiation works.
    w = jnp.array([0.3, -2.0])
    slope = jax.grad(lambda w: adversarial.r1_penalty(lambda x: x @ w, jnp.ones((4, 2))).mean())(w)
    np.testing.assert_allclose(slope, w, rtol=1e-6)
    assert (np.asarray(adversarial.r1_penalty(lambda x: 0 * x[:, 0], jnp.ones((4, 2)))) == 0).all()
    # A critic of patches: the sum of its values.
    patches = adversarial.r1_penalty(lambda x: jnp.stack([x @ w, x @ w], 1), jnp.ones((4, 2)))
    np.testing.assert_allclose(patches, np.full(4, 0.5 * 4 * float(w @ w)), rtol=1e-5)


@pytest.mark.parametrize('log_scale', [-1000.0, -90.0, -40.0, -20.0, 20.0, 90.0])
def test_likelihoods_of_means_far_from_all_pixels_are_finite_with_gradients(log_scale):
    """At both edges and between them, the mean 10,000 away on either side; a probability is at most 1."""
    x = jnp.array([-1.0, 1 / 255, 253 / 255, 1.0] * 2)[:, None]
    mean = jnp.array([-1e4] * 4 + [1e4] * 4)[:, None]
    scale = jnp.full_like(mean, log_scale)
    for log_p in (likelihoods.gaussian, likelihoods.discretised_gaussian):
        slopes = jax.grad(lambda m, s, f=log_p: f(m, s, x).sum(), (0, 1))(mean, scale)
        assert all(np.isfinite(values).all() for values in (log_p(mean, scale, x), *slopes))
    assert (likelihoods.discretised_gaussian(mean, scale, x) <= 0).all()
