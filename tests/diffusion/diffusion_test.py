"""Schedules, samplers and the bound: fingerprints, diffusers' schedulers, and Gaussian data, where
the best denoiser, every distribution and every term of the bound are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.diffusion import samplers, schedules
from jaxgen.diffusion.likelihood import variational_bound
from jaxgen.diffusion.parameterisations import PREDICTIONS, target, to_x_0
from jaxgen.losses.likelihoods import discretised_gaussian
from jaxgen.randomness import example_keys, normal

BETAS = schedules.linear_betas(1000, 1e-4, 0.02)
LINEAR = schedules.variance_preserving(BETAS)


def keys_of(seed: int, n: int):
    return example_keys(jax.random.key(seed), {'index': jnp.arange(n)})


# Schedules


def test_linear_schedule_fingerprint():
    np.testing.assert_allclose(
        LINEAR.alpha[[0, 249, 499, 749, 999]] ** 2,
        [0.9999, 0.52408537, 0.078587243, 0.0033505504, 4.0358298e-05],
        rtol=1e-6,
    )
    np.testing.assert_allclose(LINEAR.alpha**2 + LINEAR.sigma**2, 1, rtol=1e-12)
    moves = schedules.posterior(LINEAR)
    np.testing.assert_allclose(
        moves.variance[[0, 1, 2, 999]], [0.0, 5.4531877e-05, 8.5489115e-05, 0.019999984], rtol=1e-6
    )
    np.testing.assert_allclose([moves.x_0_weight[1], moves.x_t_weight[1]], [0.5452915, 0.4547085], rtol=1e-6)
    np.testing.assert_allclose([moves.x_0_weight[0], moves.x_t_weight[0]], [1, 0], atol=1e-12)
    np.testing.assert_allclose(moves.forward, BETAS, rtol=1e-9)
    np.testing.assert_allclose(
        schedules.model_log_variance(LINEAR, 'fixed_large')[[0, 1, 999]], [-9.8167251, -9.0286864, -3.912023], rtol=1e-6
    )
    np.testing.assert_allclose(
        schedules.model_log_variance(LINEAR, 'fixed_small')[[0, 1, 999]],
        np.log([5.4531877e-05, 5.4531877e-05, 0.019999984]),
        rtol=1e-6,
    )


def test_posterior_of_a_subset_is_gaussian_conditioning():
    """q(x_s | x_t, x_0) from the joint normal of x_s and x_t, for neighbours that lie far apart."""
    steps = np.array([0, 7, 300, 999])
    moves = schedules.posterior(schedules.subset(LINEAR, steps))
    for i in range(1, len(steps)):
        s, t = steps[i - 1], steps[i]
        ratio = np.prod(np.sqrt(1 - BETAS[s + 1 : t + 1]))
        var_s = 1 - np.prod(1 - BETAS[: s + 1])
        cov = np.array([[var_s, ratio * var_s], [ratio * var_s, 1 - np.prod(1 - BETAS[: t + 1])]])
        gain = cov[0, 1] / cov[1, 1]
        a_s, a_t = np.sqrt(1 - cov[0, 0]), np.sqrt(1 - cov[1, 1])
        np.testing.assert_allclose(moves.x_t_weight[i], gain, rtol=1e-9)
        np.testing.assert_allclose(moves.x_0_weight[i], a_s - gain * a_t, rtol=1e-9)
        np.testing.assert_allclose(moves.variance[i], cov[0, 0] - gain * cov[0, 1], rtol=1e-9)
        np.testing.assert_allclose(moves.forward[i], 1 - ratio**2, rtol=1e-9)


def test_steps_of_a_subset():
    assert schedules.uniform_steps(1000, 50).tolist() == list(range(0, 1000, 20))
    assert schedules.uniform_steps(1000, 1000).tolist() == list(range(1000))
    assert schedules.uniform_steps(10, 4).tolist() == [0, 2, 5, 7]
    quadratic = schedules.quadratic_steps(1000, 20)
    assert quadratic[:4].tolist() == [0, 2, 8, 19] and quadratic[-1] in (799, 800)
    for timesteps, n in ((1000, 1), (1000, 100), (1000, 1000), (10, 10), (2, 2)):
        for spaced in (schedules.uniform_steps, schedules.quadratic_steps):
            steps = spaced(timesteps, n)
            assert len(steps) == n and steps[0] == 0 and (np.diff(steps) > 0).all() and steps[-1] < timesteps


# What a network predicts


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_a_perfect_output_gives_back_x_0(prediction):
    x_0, eps = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    alpha, sigma = (values[[1, 10, 300, 600, 900]].astype(np.float32)[:, None] for values in LINEAR[1:])
    output = target(prediction, x_0, eps, alpha, sigma)
    x_t = alpha * x_0 + sigma * eps
    ratio = sigma / alpha
    c_skip, c_out = 0.25 / (ratio**2 + 0.25), 0.5 * ratio / np.sqrt(ratio**2 + 0.25)
    by_hand = {
        'eps': eps,
        'x0': x_0,
        'v': alpha * eps - sigma * x_0,
        'score': -eps,
        'flow': eps - x_0,
        'edm': (x_0 - c_skip * x_t / alpha) / c_out,
    }[prediction]
    np.testing.assert_allclose(output, by_hand, rtol=1e-5, atol=1e-4 if prediction == 'edm' else 0)
    np.testing.assert_allclose(to_x_0(prediction, output, x_t, alpha, sigma), x_0, atol=2e-5)


# Samplers against diffusers


def toy_eps(np_like, x, t):
    """A network of sorts, in numpy, jax or torch: nearly the noise of N(0, 1) data, never quite."""
    return 0.97 * x * (t / 1000) ** 0.5 + 0.05 * np_like.sin(3 * x + t / 50)


def toy_denoise(x, t):
    alpha, sigma = (jnp.asarray(values, jnp.float32)[t] for values in LINEAR[1:])
    return jnp.clip(to_x_0('eps', toy_eps(jnp, x, t), x, alpha, sigma), -1, 1)


def with_noise_of_ours(keys, shape, steps):
    """{t: the noise that our samplers add on leaving step t}."""
    return {
        int(t): np.asarray(normal(jax.vmap(jax.random.fold_in, (0, None))(keys, i), shape), np.float64)
        for i, t in enumerate(steps)
    }


def exact(torch, scheduler):
    """Their constants in float64: what is compared is the arithmetic of ours."""
    scheduler.betas = torch.from_numpy(BETAS)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    return scheduler


@pytest.mark.parametrize('n', [1000, 50])
@pytest.mark.parametrize('variance', ['fixed_large', 'fixed_small'])
def test_ancestral_equals_diffusers(variance, n, monkeypatch):
    torch, diffusers = pytest.importorskip('torch'), pytest.importorskip('diffusers')
    from diffusers.schedulers import scheduling_ddpm

    steps = schedules.uniform_steps(1000, n)
    keys, shape = keys_of(0, 3), (4, 4)
    x = normal(keys_of(1, 3), shape)
    schedule = schedules.subset(LINEAR, steps)
    ours = jax.jit(lambda x: samplers.ancestral(toy_denoise, x, schedule, keys, variance=variance))(x)

    scheduler = exact(torch, diffusers.DDPMScheduler(1000, 1e-4, 0.02, variance_type=variance, clip_sample=True))
    scheduler.set_timesteps(n)
    noise, now = with_noise_of_ours(keys, shape, steps), {}
    monkeypatch.setattr(scheduling_ddpm, 'randn_tensor', lambda *_, **__: torch.from_numpy(noise[now['t']]))
    y = torch.from_numpy(np.asarray(x, np.float64))
    assert scheduler.timesteps.tolist() == steps[::-1].tolist()
    for t in scheduler.timesteps:
        now['t'] = int(t)
        y = scheduler.step(toy_eps(torch, y, t), t, y).prev_sample
    assert 0.05 < y.std() < 1.5
    np.testing.assert_allclose(ours, y.numpy(), atol=1e-5)


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(eta):
    torch, diffusers = pytest.importorskip('torch'), pytest.importorskip('diffusers')
    steps = schedules.uniform_steps(1000, 50)
    keys, shape = keys_of(0, 3), (4, 4)
    x = normal(keys_of(1, 3), shape)
    schedule = schedules.subset(LINEAR, steps)
    ours = jax.jit(lambda x: samplers.ddim(toy_denoise, x, schedule, keys, eta=eta))(x)

    scheduler = exact(torch, diffusers.DDIMScheduler(1000, 1e-4, 0.02, clip_sample=True, timestep_spacing='leading'))
    scheduler.set_timesteps(50)
    noise = with_noise_of_ours(keys, shape, steps)
    y = torch.from_numpy(np.asarray(x, np.float64))
    assert scheduler.timesteps.tolist() == steps[::-1].tolist()
    for t in scheduler.timesteps:
        z = torch.from_numpy(noise[int(t)])
        y = scheduler.step(
            toy_eps(torch, y, t), t, y, eta=eta, use_clipped_model_output=True, variance_noise=z
        ).prev_sample
    assert 0.05 < y.std() < 1.5
    np.testing.assert_allclose(ours, y.numpy(), atol=1e-5)


# Samplers on Gaussian data


MEAN, STD = 0.4, 0.3


def gaussian_denoise(schedule=LINEAR, mean=MEAN, std=STD):
    """E[x_0 | x_t] for data from N(mean, std^2)."""

    def denoise(x, t):
        alpha, sigma = (jnp.asarray(values, jnp.float32)[t] for values in schedule[1:])
        if jnp.ndim(t):
            alpha, sigma = (values.reshape(-1, *[1] * (x.ndim - 1)) for values in (alpha, sigma))
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    return denoise


@pytest.mark.parametrize(
    ('sampler', 'options'),
    [
        (samplers.ancestral, {'variance': 'fixed_large'}),
        (samplers.ancestral, {'variance': 'fixed_small'}),
        (samplers.ddim, {'eta': 0.0}),
        (samplers.ddim, {'eta': 0.5}),
    ],
)
def test_samplers_give_the_gaussian(sampler, options):
    """All steps give the data's mean and deviation; 50 of them nearly, and 10 less so."""

    def moments(steps):
        schedule = schedules.subset(LINEAR, steps)
        draw = jax.jit(lambda x: sampler(gaussian_denoise(), x, schedule, keys_of(0, 256), **options))
        y = draw(normal(keys_of(1, 256), (64,)))
        return float(y.mean()), float(y.std())

    # 16384 draws: a standard error of 0.0023 in the mean and 0.0017 in the deviation.
    mean, std = moments(np.arange(1000))
    np.testing.assert_allclose(mean, MEAN, atol=0.009)
    np.testing.assert_allclose(std, STD, rtol=0.025)
    errors = [abs(moments(schedules.uniform_steps(1000, n))[1] / STD - 1) for n in (50, 10)]
    assert 0.02 < errors[0] < errors[1]


def test_eta_one_is_ancestral_with_small_variance_and_zero_is_a_function():
    x, keys = normal(keys_of(1, 4), (8,)), keys_of(0, 4)
    schedule = schedules.subset(LINEAR, schedules.uniform_steps(1000, 20))
    one = samplers.ddim(toy_denoise, x, schedule, keys, eta=1.0)
    small = samplers.ancestral(toy_denoise, x, schedule, keys, variance='fixed_small')
    np.testing.assert_allclose(one, small, atol=1e-5)
    zero = samplers.ddim(toy_denoise, x, schedule, keys)
    np.testing.assert_array_equal(zero, samplers.ddim(toy_denoise, x, schedule, keys_of(9, 4)))
    assert jnp.abs(one - zero).max() > 0.01


def test_the_last_step_is_the_estimate_itself():
    """Whatever comes before, x_0 is what the model says at the first level: no noise, no blend."""
    for draw in (
        lambda *args: samplers.ancestral(*args, variance='fixed_large'),
        lambda *args: samplers.ddim(*args, eta=1.0),
    ):
        for steps in (np.array([0]), np.array([3, 500])):
            schedule = schedules.subset(LINEAR, steps)
            y = draw(
                lambda x, t, first=steps[0]: jnp.where(t == first, 0.125, x), jnp.ones((2, 3)), schedule, keys_of(0, 2)
            )
            np.testing.assert_array_equal(y, np.full((2, 3), 0.125, np.float32))


def test_the_network_is_told_the_original_steps_from_the_last_down():
    seen = []

    def denoise(x, t):
        jax.debug.callback(lambda t: seen.append(int(t)), t, ordered=True)
        return 0 * x

    schedule = schedules.subset(LINEAR, schedules.uniform_steps(1000, 4))
    jax.block_until_ready(samplers.ddim(denoise, jnp.ones((1, 1)), schedule, keys_of(0, 1)))
    jax.effects_barrier()
    assert seen == [750, 500, 250, 0]


# The bound


def test_discretised_gaussian_sums_to_one():
    levels = jnp.linspace(-1, 1, 256)[:, None]
    for mean, scale in ((0.0, 0.3), (0.98, 0.01), (-1.4, 0.2), (0.1, 0.002), (0.0, 5.0)):
        total = jnp.exp(discretised_gaussian(jnp.full_like(levels, mean), np.log(scale), levels)).sum()
        np.testing.assert_allclose(total, 1, atol=1e-4)


def levels_of(x):
    """The nearest of 256 levels."""
    return np.clip(np.round((np.asarray(x) + 1) * 127.5), 0, 255).astype(np.float32) / 127.5 - 1


def expected_terms(x_0, schedule, variance, mean, std):
    """Expected nats per dimension of L_T and each middle term [T - 1], at x_0 [n, D], by a slow loop in float64.

    For the best denoiser of Gaussian data E |x_0 - x_0_hat|^2 over x_t is a bias and a variance.
    """
    x_0 = np.asarray(x_0, np.float64)
    alpha_bar = schedule.alpha**2
    a, v = schedule.alpha[-1], 1 - alpha_bar[-1]
    prior = 0.5 * ((a * x_0) ** 2 + v - 1 - np.log(v)).mean()
    terms = []
    for t in range(1, len(alpha_bar)):
        beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
        posterior = beta * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        model = {'fixed_large': beta, 'fixed_small': posterior}[variance]
        gain = np.sqrt(alpha_bar[t]) * std**2 / (alpha_bar[t] * std**2 + 1 - alpha_bar[t])
        error = ((1 - gain * np.sqrt(alpha_bar[t])) * (x_0 - mean)) ** 2 + gain**2 * (1 - alpha_bar[t])
        weight = np.sqrt(alpha_bar[t - 1]) * beta / (1 - alpha_bar[t])
        kl = 0.5 * (np.log(model / posterior) - 1 + (posterior + weight**2 * error) / model)
        terms.append(kl.mean())
    return prior, np.array(terms)


@pytest.mark.parametrize('variance', ['fixed_large', 'fixed_small'])
def test_bound_equals_the_closed_form(variance):
    schedule = schedules.variance_preserving(schedules.linear_betas(60, 1e-3, 0.2))
    x_0 = levels_of(MEAN + STD * np.random.default_rng(0).normal(size=(64, 512)).clip(-1.9, 1.9))
    prior, terms = expected_terms(x_0, schedule, variance, MEAN, STD)
    found = jax.jit(lambda x, keys: variational_bound(gaussian_denoise(schedule), x, schedule, variance, keys))(
        x_0, keys_of(0, 64)
    )
    nats = {name: float(values.mean()) * np.log(2) for name, values in found.items()}
    np.testing.assert_allclose(nats['bits_prior'], prior, rtol=1e-4)
    middle = nats['bits_per_dim'] - nats['bits_prior'] - nats['bits_decoder']
    error = float(found['bits_per_dim'].std()) * np.log(2) / 8
    assert error < 0.01 * middle
    assert abs(middle - terms.sum()) < 3 * error

    # The decoder: the same draws, each pixel's bin by the difference of two distribution functions.
    from scipy.stats import norm

    alpha, sigma = schedule.alpha[0], schedule.sigma[0]
    noise = normal(jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 0))[1])(keys_of(0, 64)), (512,))
    mean = np.asarray(gaussian_denoise(schedule)(alpha * x_0 + sigma * np.asarray(noise), 0), np.float64)
    scale = np.exp(0.5 * schedules.model_log_variance(schedule, variance)[0])
    mass = norm.cdf((x_0 + 1 / 255 - mean) / scale) - norm.cdf((x_0 - 1 / 255 - mean) / scale)
    edge = (x_0 > 0.999) | (x_0 < -0.999)
    per_example = -np.log2(np.maximum(mass, 1e-30))
    inside = ~edge.any(1)
    assert inside.sum() > 10
    np.testing.assert_allclose(found['bits_decoder'][inside], per_example[inside].mean(1), rtol=2e-3)


def test_best_bound_is_the_entropy():
    """With the reverse steps' true means and variances nothing is lost: what is left is -log2 p(x_0)."""
    std = 0.2
    x_0 = levels_of(std * np.random.default_rng(0).normal(size=(16, 1024)))
    moves = schedules.posterior(LINEAR)
    var_of_x_0 = 1 / (1 / std**2 + (LINEAR.alpha / LINEAR.sigma) ** 2)  # given x_t
    log_variance = np.log(moves.variance + moves.x_0_weight**2 * var_of_x_0)
    # The best variance as a network that learns it says it: where it lies between the smallest and the largest.
    small = schedules.model_log_variance(LINEAR, 'fixed_small')
    fraction = jnp.asarray((log_variance - small) / (np.log(moves.forward) - small), jnp.float32)
    assert fraction[1:].min() >= 0 and fraction[1:].max() <= 1
    exact_x_0 = gaussian_denoise(mean=0.0, std=std)

    def denoise(x, t):
        return exact_x_0(x, t), fraction[t][:, None] * jnp.ones_like(x)

    bound = jax.jit(lambda x, keys: variational_bound(denoise, x, LINEAR, 'learned', keys))(x_0, keys_of(0, 16))[
        'bits_per_dim'
    ]
    density = np.exp(-0.5 * (x_0 / std) ** 2) / (std * np.sqrt(2 * np.pi))
    exact = -np.log2(density * 2 / 255).mean()
    np.testing.assert_allclose(bound.mean(), exact, atol=0.02)


def test_fewer_terms_have_the_right_mean():
    schedule = schedules.variance_preserving(schedules.linear_betas(30, 1e-3, 0.2))

    def bound(steps, n=4096):
        # Off by a constant: the middle terms are then known numbers, and what is random is which are taken.
        def denoise(x, t):
            return jnp.full_like(x, 0.3)

        run = jax.jit(lambda x, keys: variational_bound(denoise, x, schedule, 'fixed_large', keys, steps))
        return run(jnp.full((n, 2), levels_of(0.1)), keys_of(0, n))

    full = bound(0)
    np.testing.assert_allclose(full['bits_per_dim'], bound(29)['bits_per_dim'], rtol=1e-5)
    middle = full['bits_per_dim'] - full['bits_decoder']
    assert middle.std() < 1e-5
    for steps in (1, 4, 7):
        few = bound(steps)
        np.testing.assert_array_equal(few['bits_decoder'], full['bits_decoder'])
        np.testing.assert_array_equal(few['bits_prior'], full['bits_prior'])
        estimate = few['bits_per_dim'] - few['bits_decoder']
        error = float(estimate.std()) / 64
        assert error > 0
        assert abs(float(estimate.mean() - middle.mean())) < 4 * error
    assert bound(7)['bits_per_dim'].std() < bound(1)['bits_per_dim'].std()


def test_bound_of_an_example_is_its_own():
    schedule = schedules.subset(LINEAR, schedules.uniform_steps(1000, 20))
    schedule = schedule._replace(t=np.arange(20))
    x_0 = levels_of(np.random.default_rng(0).uniform(-1, 1, (6, 4)))
    run = jax.jit(lambda x, keys: variational_bound(gaussian_denoise(schedule), x, schedule, 'fixed_large', keys, 5))
    together = run(x_0, keys_of(0, 6))
    apart = run(x_0[4:], keys_of(0, 6)[4:])
    for name, values in together.items():
        np.testing.assert_allclose(values[4:], apart[name], rtol=1e-5)
