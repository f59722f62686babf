"""Samplers: diffusers' schedulers over whole trajectories, published algorithms as plain loops, and Gaussian data,
where the best denoiser, the exact solution of the ODE and every distribution are known."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.diffusion import levels, samplers, schedules
from jaxgen.diffusion.schedules import Schedule
from jaxgen.randomness import example_keys, normal

KINDS = ('vp', 've', 'flow')
MEAN, STD = np.array([-0.5, 0.0, 0.8]), np.array([0.3, 0.6, 1.0])


def keys_of(seed: int, n: int):
    return example_keys(jax.random.key(seed), {'index': jnp.arange(n)})


def path(kind, ratio, xp=np):
    """(alpha, sigma) where sigma / alpha is `ratio`."""
    alpha = {'vp': 1 / xp.sqrt(1 + ratio**2), 've': xp.ones_like(ratio), 'flow': 1 / (1 + ratio)}[kind]
    return alpha, ratio * alpha


def grid(kind, n, top=20.0, power=3):
    """n levels up to sigma / alpha = top, denser near the data; t is sigma / alpha."""
    ratio = top * (np.arange(1, n + 1) / n) ** power
    return Schedule(ratio, *path(kind, ratio))


def best(kind, mean=MEAN, std=STD):
    """E[x_0 | x_t] of N(mean, std^2) data."""

    def denoise(x, t):
        alpha, sigma = path(kind, t, jnp)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)

    return denoise


def exact(x, alpha, sigma):
    """The data that the probability flow leads x to."""
    return MEAN + STD / np.sqrt(alpha**2 * STD**2 + sigma**2) * (np.asarray(x, np.float64) - alpha * MEAN)


def noises(keys, shape, total):
    """Noise that our samplers draw, by number: float64 [total, n, ...]."""
    draw = jax.vmap(lambda i: normal(jax.vmap(jax.random.fold_in, (0, None))(keys, i), shape))
    return np.asarray(jax.jit(draw)(jnp.arange(total)), np.float64)


DRAWS = {
    'ancestral': functools.partial(samplers.ancestral, variance='fixed_small'),
    'ancestral_large': functools.partial(samplers.ancestral, variance='fixed_large'),
    'ddim': samplers.ddim,
    'ddim_half': functools.partial(samplers.ddim, eta=0.5),
    'euler': samplers.euler,
    'euler_ancestral': samplers.euler_ancestral,
    'heun': samplers.heun,
    'heun_straight': functools.partial(samplers.heun, straight=True),
    'dpm_solver_pp_1': functools.partial(samplers.dpm_solver_pp, order=1),
    'dpm_solver_pp': samplers.dpm_solver_pp,
    'dpm_solver_pp_sde': functools.partial(samplers.dpm_solver_pp, sde=True),
    'unipc_1': functools.partial(samplers.unipc, order=1),
    'unipc': samplers.unipc,
    'unipc_3': functools.partial(samplers.unipc, order=3),
    'consistency': samplers.consistency,
    'predictor_corrector': samplers.predictor_corrector,
    'euler_maruyama': functools.partial(samplers.predictor_corrector, predictor='euler_maruyama'),
    'sit': samplers.euler_maruyama,
    'annealed_langevin': functools.partial(samplers.annealed_langevin, langevin_steps=3, langevin_size=1e-4),
}


def churned(kind, s_churn):
    return functools.partial(samplers.heun, s_churn=s_churn, level=lambda ratio: Schedule(ratio, *path(kind, ratio)))


# Gaussian data


@pytest.mark.parametrize(
    ('name', 'order'),
    [
        ('euler', 1),
        ('heun', 2),
        ('heun_straight', 2),
        ('dpm_solver_pp', 2),
        ('unipc_1', 2),  # UniC adds one
        ('unipc', 3),
    ],
)
def test_error_of_the_ode_falls_at_the_claimed_order(name, order):
    """And what a grid is made of, but for sigma / alpha, does not matter."""
    noise = normal(keys_of(0, 8), (3,))

    def end(kind, n):
        schedule = grid(kind, n, top=6.0)
        x = schedule.sigma[-1] * noise
        y = jax.jit(lambda x: DRAWS[name](best(kind), x, schedule, keys_of(1, 8)))(x)
        return np.asarray(y), np.abs(y - exact(x, schedule.alpha[-1], schedule.sigma[-1])).max()

    (coarse, error), (_, less) = end('vp', 32), end('vp', 64)
    assert abs(np.log2(error / less) - order) < 0.35, (error, less)
    np.testing.assert_allclose(end('flow', 32)[0], coarse, atol=2e-5)


def moments(draw, denoise, schedule, monkeypatch):
    """Mean and variance of what a sampler linear in x and noise draws, exact, by derivatives: no sample is taken.
    The start has the moments of the data's x at the last level."""
    monkeypatch.setattr(samplers, 'noise_of', lambda table, number, x: table[number])

    def total(x, table):
        y = draw(denoise, x, schedule, table)
        return y.sum(), y

    alpha, sigma = schedule.alpha[-1], schedule.sigma[-1]
    start = jnp.asarray(alpha * MEAN, jnp.float32)[None]
    table = jnp.zeros((2 * len(schedule.t), 1, 3))
    slopes, y = jax.jit(jax.grad(total, (0, 1), has_aux=True))(start, table)
    slopes = [np.asarray(values, np.float64) for values in slopes]
    variance = (slopes[0] ** 2 * (alpha**2 * STD**2 + sigma**2))[0] + (slopes[1] ** 2).sum((0, 1))
    return np.asarray(y[0]), variance


@pytest.mark.parametrize(
    ('name', 'near'),
    [
        ('ancestral', 0.1),
        ('ancestral_large', 0.1),
        ('ddim_half', 0.1),
        ('dpm_solver_pp_sde', 0.01),
        ('heun_churned', 0.01),
        ('reverse_diffusion', 0.2),
        ('euler_maruyama', 0.2),
        ('sit', 0.2),
    ],
)
def test_right_mean_and_variance_at_enough_steps(name, near, monkeypatch):
    def end(kind, n):
        draw = {
            **DRAWS,
            'heun_churned': churned(kind, 10.0),
            'reverse_diffusion': functools.partial(samplers.predictor_corrector, corrector_steps=0),
            'euler_maruyama': functools.partial(
                samplers.predictor_corrector, predictor='euler_maruyama', corrector_steps=0
            ),
        }[name]
        mean, var = moments(draw, best(kind), grid(kind, n), monkeypatch)
        return np.abs(mean - MEAN).max(), var / STD**2 - 1

    coarse, fine = end('vp', 40), end('vp', 160)
    assert fine[0] < 0.01
    assert np.abs(fine[1]).max() < near
    assert np.abs(fine[1]).max() < np.abs(coarse[1]).max() / 2.5
    for kind in ('ve', 'flow'):
        other = end(kind, 40)
        if name in ('ancestral_large', 'reverse_diffusion', 'euler_maruyama', 'sit'):
            assert other[0] < 0.1
            assert np.abs(other[1]).max() < 2 * np.abs(coarse[1]).max()
        else:
            np.testing.assert_allclose(other[1], coarse[1], atol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_ancestral_with_the_true_variance_is_exact_at_few_steps(kind, monkeypatch):
    """The variance of p(x_s | x_t) is the posterior's and what x_t leaves unknown of x_0."""
    schedule = grid(kind, 5)
    moves = schedules.posterior(schedule)
    alpha, sigma = schedule.alpha[1:, None], schedule.sigma[1:, None]
    unknown = moves.x_0_weight[1:, None] ** 2 / (1 / STD**2 + (alpha / sigma) ** 2)
    small, large = np.log(moves.variance[1:, None]), np.log(moves.forward[1:, None])
    fraction = (np.log(moves.variance[1:, None] + unknown) - small) / (large - small)
    assert 0 < fraction.min() < 0.1 and fraction.max() > 0.5
    fraction = np.concatenate([np.zeros((1, 3)), fraction])
    inner = best(kind)

    def denoise(x, t):
        return inner(x, t), jnp.asarray(fraction, jnp.float32)[jnp.searchsorted(jnp.asarray(schedule.t), t)]

    def of(variance):
        draw = functools.partial(samplers.ancestral, variance=variance)
        return moments(draw, denoise, schedule, monkeypatch)

    # But for the last step, whose noise is left out.
    lost = 1 / (1 / STD**2 + (schedule.alpha[0] / schedule.sigma[0]) ** 2)
    mean, var = of('learned')
    np.testing.assert_allclose(mean, MEAN, atol=1e-5)
    np.testing.assert_allclose(var, STD**2 - lost, rtol=1e-5)
    for other in ('fixed_small', 'fixed_large'):
        assert np.abs(of(other)[1] / var - 1).max() > 0.05


@pytest.mark.parametrize('kind', KINDS)
def test_consistency_sampling_is_exact_for_a_consistent_function(kind, monkeypatch):
    def consistent(x, t):
        alpha, sigma = path(kind, t, jnp)
        return MEAN + STD / jnp.sqrt(alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)

    mean, var = moments(samplers.consistency, consistent, grid(kind, 4), monkeypatch)
    np.testing.assert_allclose(mean, MEAN, atol=1e-5)
    np.testing.assert_allclose(var, STD**2, rtol=1e-5)
    # Estimates that have noise left, sigma_min of it: no more is added than what is missing.
    draw = functools.partial(samplers.consistency, sigma_min=0.1)
    noisy = np.sqrt(STD**2 + 0.1**2)
    schedule = grid(kind, 2)

    def to_noisy(x, t):
        alpha, sigma = path(kind, t, jnp)
        return MEAN + noisy / jnp.sqrt(alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)

    np.testing.assert_allclose(moments(draw, to_noisy, schedule, monkeypatch)[1], noisy**2, rtol=1e-5)


@pytest.mark.parametrize(
    ('predictor', 'kind', 'steps', 'snr'),
    [('reverse_diffusion', 've', 1, 0.1), ('euler_maruyama', 'flow', 1, 0.1), ('none', 'vp', 4, 0.15)],
)
def test_predictor_corrector_gives_the_gaussian(predictor, kind, steps, snr):
    """Nothing is linear here: samples. Step sizes are a sample's own, and so it has many dimensions."""
    mean, std = np.tile(MEAN, 32), np.tile(STD, 32)
    schedule = grid(kind, 200, power=2)
    x = schedule.sigma[-1] * normal(keys_of(0, 32), (96,))
    draw = functools.partial(samplers.predictor_corrector, predictor=predictor, corrector_steps=steps, snr=snr)
    y = jax.jit(lambda x: draw(best(kind, mean, std), x, schedule, keys_of(1, 32)))(x)
    y = ((np.asarray(y, np.float64) - mean) / std).reshape(-1, 3)  # of 1024 draws: 0.03 and 0.04 off by chance
    assert np.abs(y.mean(0)).max() < 0.12
    assert np.abs(y.var(0) - 1).max() < 0.2


def test_langevin_steps_settle_at_the_levels_distribution(monkeypatch):
    """At one level, after many steps: y = (1 - a) x + a mean + noise has a known variance at rest."""
    for kind in KINDS:
        schedule = Schedule(np.array([0.5]), *path(kind, np.array([0.5])))
        alpha, sigma = schedule.alpha[0], schedule.sigma[0]
        draw = functools.partial(
            samplers.annealed_langevin, langevin_steps=400, langevin_size=0.025, final_denoising=False
        )
        monkeypatch.setattr(samplers, 'noise_of', lambda table, number, x: table[number])
        table = jnp.zeros((400, 1, 3))
        run = jax.jit(jax.grad(lambda table, x, draw=draw, kind=kind, s=schedule: draw(best(kind), x, s, table).sum()))
        var = (np.asarray(run(table, jnp.zeros((1, 3))), np.float64) ** 2).sum((0, 1))
        rate = 0.05  # step_size / 2 / 0.5^2
        pull = rate * sigma**2 / (alpha**2 * STD**2 + sigma**2)
        rest = 2 * rate * sigma**2 / (1 - (1 - pull) ** 2)
        np.testing.assert_allclose(var, rest * (1 - (1 - pull) ** 800), rtol=1e-4)
        np.testing.assert_allclose(rest, alpha**2 * STD**2 + sigma**2, rtol=0.03)


# diffusers' schedulers, the same grid and the same noise


def toy_eps(lib, x, t):
    """A network of sorts, in numpy, jax or torch: nearly the noise of N(0, 1) data, never quite."""
    return 0.97 * x * (t / 1000) ** 0.5 + 0.05 * lib.sin(3 * x + t / 50)


def toy_velocity(lib, x, t):
    """As the network of a flow."""
    return 0.8 * x * (t / 1000) ** 0.5 + 0.3 * lib.cos(2 * x + t / 300)


def by_number(schedule, times, network):
    """denoise(x, i) of a network that is told times[i]: `t` of the schedule becomes i."""
    flow = network is toy_velocity
    alpha, sigma, told = (jnp.asarray(values, jnp.float32) for values in (schedule.alpha, schedule.sigma, times))

    def denoise(x, i):
        output = network(jnp, x, told[i])
        return x - sigma[i] * output if flow else (x - sigma[i] * output) / alpha[i]

    return denoise


def theirs(module, scheduler, network, y, noise, monkeypatch):
    """Runs a scheduler to the end, with noise [steps, ...] in the order of its steps."""
    import torch

    draws = (torch.from_numpy(np.array(values)) for values in noise)
    if hasattr(module, 'randn_tensor'):
        monkeypatch.setattr(module, 'randn_tensor', lambda *_, **__: next(draws))
    y = torch.from_numpy(np.array(y))
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(y, t) if hasattr(scheduler, 'scale_model_input') else y
        y = scheduler.step(network(torch, seen, t), t, y).prev_sample
    return y.numpy()


FLOW = {'use_flow_sigmas': True, 'prediction_type': 'flow_prediction'}
DPM, UNIPC = 'DPMSolverMultistepScheduler', 'UniPCMultistepScheduler'


by_torch = pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning')  # torch and numpy


@by_torch
@pytest.mark.parametrize(
    ('draw', 'name', 'options'),
    [
        ('euler', 'EulerDiscreteScheduler', {}),
        ('euler_ancestral', 'EulerAncestralDiscreteScheduler', {}),
        ('heun', 'HeunDiscreteScheduler', {}),
        ('dpm_solver_pp', DPM, {}),
        ('dpm_solver_pp_1', DPM, {'solver_order': 1}),
        ('dpm_solver_pp', DPM, FLOW),
        ('dpm_solver_pp_sde', DPM, {'algorithm_type': 'sde-dpmsolver++'}),
        ('unipc', UNIPC, {}),
        ('unipc_1', UNIPC, {'solver_order': 1}),
        ('unipc_3', UNIPC, {'solver_order': 3}),
        ('unipc', UNIPC, FLOW),
        ('euler', 'FlowMatchEulerDiscreteScheduler', {'shift': 3.0}),
        ('heun_straight', 'FlowMatchHeunDiscreteScheduler', {}),
    ],
)
def test_equals_diffusers(draw, name, options, monkeypatch):
    n = 12
    pytest.importorskip('torch')
    diffusers = pytest.importorskip('diffusers')
    scheduler = getattr(diffusers, name)(num_train_timesteps=1000, **options)
    scheduler.set_timesteps(n)
    flow = 'Flow' in name or options is FLOW
    times, sigmas = np.array(scheduler.timesteps, np.float64), np.array(scheduler.sigmas, np.float64)
    if 'Heun' in name:  # they list the levels between twice
        times, sigmas = np.append(times[:1], times[1::2]), np.append(sigmas[0], sigmas[1::2])
    times, sigmas = times[::-1], sigmas[:n][::-1]
    schedule = Schedule(np.arange(n), *((1 - sigmas, sigmas) if flow else path('vp', sigmas)))
    scaled = 'Euler' in name or 'Heun' in name  # what they call x is x / alpha
    unit = np.float32(schedule.alpha[-1]) if scaled and not flow else 1
    network = toy_velocity if flow else toy_eps

    x, keys = schedule.sigma[-1] * normal(keys_of(0, 3), (2, 4, 4)), keys_of(1, 3)
    denoise = by_number(schedule, times, network)
    ours = jax.jit(lambda x: DRAWS[draw](denoise, x, schedule, keys))(x)
    noise = noises(keys, (2, 4, 4), n)[::-1].astype(np.float32)
    module = __import__(type(scheduler).__module__, fromlist=['step'])
    found = theirs(module, scheduler, network, x / unit, noise, monkeypatch)
    assert 0.05 < found.std() < 3
    np.testing.assert_allclose(ours, found, rtol=1e-5, atol=2e-5)


@by_torch
@pytest.mark.parametrize('n', [1000, 20])
def test_learned_variance_equals_diffusers(n, monkeypatch):
    torch, diffusers = pytest.importorskip('torch'), pytest.importorskip('diffusers')
    from diffusers.schedulers import scheduling_ddpm

    steps = schedules.uniform_steps(1000, n)
    betas = schedules.linear_betas(1000, 1e-4, 0.02)
    schedule = schedules.subset(schedules.variance_preserving(betas), steps)
    x, keys = normal(keys_of(0, 3), (2, 4, 4)), keys_of(1, 3)
    alpha, sigma = (jnp.asarray(values, jnp.float32) for values in schedules.variance_preserving(betas)[1:])

    def denoise(x, t):
        return (x - sigma[t] * toy_eps(jnp, x, t)) / alpha[t], (jnp.sin(x + t) + 1) / 2

    ours = jax.jit(lambda x: samplers.ancestral(denoise, x, schedule, keys, variance='learned'))(x)

    scheduler = diffusers.DDPMScheduler(1000, trained_betas=betas, variance_type='learned_range', clip_sample=False)
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.from_numpy(betas), 0)
    scheduler.set_timesteps(n)
    assert scheduler.timesteps.tolist() == steps[::-1].tolist()

    def network(lib, x, t):
        return torch.cat([toy_eps(lib, x, t), torch.sin(x + t)], 1)

    noise = noises(keys, (2, 4, 4), n)[::-1]
    found = theirs(scheduling_ddpm, scheduler, network, np.asarray(x, np.float64), noise, monkeypatch)
    assert 0.05 < found.std() < 2
    np.testing.assert_allclose(ours, found, rtol=1e-5, atol=1e-5)


@by_torch
def test_consistency_equals_diffusers(monkeypatch):
    pytest.importorskip('torch')
    diffusers = pytest.importorskip('diffusers')
    from diffusers.schedulers import scheduling_consistency_models

    scheduler = diffusers.CMStochasticIterativeScheduler()
    scheduler.set_timesteps(timesteps=[39, 31, 22, 7, 0])
    sigmas = np.array(scheduler.sigmas[:-1], np.float64)[::-1]
    schedule = Schedule(np.arange(5), np.ones(5), sigmas)
    told = jnp.asarray(np.array(scheduler.timesteps)[::-1], jnp.float32)
    skip = 0.25 / ((sigmas - 0.002) ** 2 + 0.25)
    out, scale = (sigmas - 0.002) * 0.5 / np.sqrt(sigmas**2 + 0.25), np.sqrt(sigmas**2 + 0.25)
    skip, out, scale = (jnp.asarray(values, jnp.float32) for values in (skip, out, scale))

    def network(lib, x, t):
        return lib.sin(3 * x + t / 100)

    def denoise(x, i):
        return jnp.clip(out[i] * network(jnp, x / scale[i], told[i]) + skip[i] * x, -1, 1)

    x, keys = 80 * normal(keys_of(0, 3), (4,)), keys_of(1, 3)
    ours = jax.jit(lambda x: samplers.consistency(denoise, x, schedule, keys, sigma_min=0.002))(x)
    noise = noises(keys, (4,), 5)[::-1].astype(np.float32)
    found = theirs(scheduling_consistency_models, scheduler, network, x, noise, monkeypatch)
    np.testing.assert_allclose(ours, found, rtol=1e-5, atol=1e-5)


@by_torch
def test_predictor_corrector_equals_diffusers(monkeypatch):
    """One sample: they average norms over the batch. And they have the norm of the noise that is drawn."""
    torch, diffusers = pytest.importorskip('torch'), pytest.importorskip('diffusers')
    from diffusers.schedulers import scheduling_sde_ve

    n, snr = 30, 0.15
    scheduler = diffusers.ScoreSdeVeScheduler(n, sigma_max=20.0)
    scheduler.set_timesteps(n)
    scheduler.set_sigmas(n)
    sigmas = np.array(scheduler.discrete_sigmas, np.float64)
    schedule, keys = Schedule(sigmas, np.ones(n), sigmas), keys_of(1, 1)
    x = 20 * normal(keys_of(0, 1), (3, 4, 4))
    ours = jax.jit(lambda x: samplers.predictor_corrector(toy('ve'), x, schedule, keys, snr=snr))(x)

    noise = noises(keys, (3, 4, 4), 2 * n)[::-1]
    y = torch.from_numpy(np.array(x, np.float64))
    draws = (torch.from_numpy(z) for z in noise)
    monkeypatch.setattr(scheduling_sde_ve, 'randn_tensor', lambda *_, **__: next(draws))
    for i, t in enumerate(scheduler.timesteps):
        sigma = sigmas[n - 1 - i]

        def score(y, sigma=sigma):
            return torch.from_numpy(toy('ve', np)(y.numpy(), sigma) - y.numpy()) / sigma**2

        scheduler.register_to_config(snr=snr * np.sqrt(48) / np.linalg.norm(noise[2 * i]))
        y = scheduler.step_correct(score(y), y).prev_sample
        y, mean = scheduler.step_pred(score(y), t, y, return_dict=False)
    np.testing.assert_allclose(ours, mean.numpy(), rtol=2e-5, atol=2e-5)


# Published algorithms as plain loops, in float64


def toy(kind, xp=jnp):
    """An estimate of x_0 that is not linear in x, in numpy or jax; t is sigma / alpha."""

    def denoise(x, t):
        alpha, sigma = path(kind, t, xp)
        return 0.9 * alpha * x / (alpha**2 + sigma**2) + 0.2 * xp.sin(2 * x + t)

    return denoise


@pytest.mark.parametrize('s_max', [10.0, np.inf])  # the second raises the last level too, x itself
def test_churn_equals_algorithm_2(s_max):
    schedule, keys = grid('ve', 12), keys_of(0, 3)
    noise = noises(keys, (4,), 24)
    draw = functools.partial(churned('ve', 3.0), s_min=0.1, s_max=s_max, s_noise=1.1)
    x = schedule.sigma[-1] * normal(keys_of(1, 3), (4,))
    ours = jax.jit(lambda x: draw(toy('ve'), x, schedule, keys))(x)

    denoise, t = toy('ve', np), np.concatenate([[0.0], schedule.sigma])
    y = np.asarray(x, np.float64)
    raised = 0
    for i in range(12, 0, -1):
        gamma = min(3.0 / 12, np.sqrt(2) - 1) if 0.1 <= t[i] <= s_max else 0.0
        raised += gamma > 0
        t_hat = t[i] * (1 + gamma)
        y_hat = y + np.sqrt(t_hat**2 - t[i] ** 2) * 1.1 * noise[2 * i - 1]
        d = (y_hat - denoise(y_hat, t_hat)) / t_hat
        y = y_hat + (t[i - 1] - t_hat) * d
        if i > 1:
            d_next = (y - denoise(y, t[i - 1])) / t[i - 1]
            y = y_hat + (t[i - 1] - t_hat) * 0.5 * (d + d_next)
    assert 3 < raised < 12
    np.testing.assert_allclose(ours, y, rtol=2e-5, atol=2e-5)


def test_predictor_corrector_equals_algorithms_3_and_5():
    """Predictor and corrector for the VP SDE, in the order of the code that was published with the paper."""
    schedule = schedules.variance_preserving(schedules.linear_betas(20, 0.01, 0.3))
    ratio = schedule.sigma / schedule.alpha
    schedule, keys = schedule._replace(t=ratio), keys_of(0, 2)
    noise = noises(keys, (3, 4), 60)
    x = normal(keys_of(1, 2), (3, 4))
    draw = functools.partial(samplers.predictor_corrector, corrector_steps=2, snr=0.2)
    ours = jax.jit(lambda x: draw(toy('vp'), x, schedule, keys))(x)

    betas, y, number = schedules.linear_betas(20, 0.01, 0.3), np.asarray(x, np.float64), 59
    estimate = toy('vp', np)
    for i in reversed(range(20)):

        def score(y, i=i):
            return (schedule.alpha[i] * estimate(y, ratio[i]) - y) / schedule.sigma[i] ** 2

        for _ in range(2):
            g = score(y)
            eps = 2 * (1 - betas[i]) * (0.2 * np.sqrt(12) / np.linalg.norm(g.reshape(2, -1), axis=1)) ** 2
            eps = eps[:, None, None]
            y, number = y + eps * g + np.sqrt(2 * eps) * noise[number], number - 1
        if i:
            y = (2 - np.sqrt(1 - betas[i])) * y + betas[i] * score(y) + np.sqrt(betas[i]) * noise[number]
        else:
            y = estimate(y, ratio[0])
        number -= 1
    assert number == -1
    np.testing.assert_allclose(ours, y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('final_denoising', [True, False])
def test_annealed_langevin_equals_algorithm_1(final_denoising):
    sigmas = np.geomspace(0.1, 5, 6)
    schedule, keys = Schedule(sigmas, np.ones(6), sigmas), keys_of(0, 2)
    noise = noises(keys, (4,), 19)
    x = normal(keys_of(1, 2), (4,))
    draw = functools.partial(
        samplers.annealed_langevin, langevin_steps=3, langevin_size=2e-3, final_denoising=final_denoising
    )
    ours = jax.jit(lambda x: draw(toy('ve'), x, schedule, keys))(x)

    y, number = np.asarray(x, np.float64), 17 + final_denoising
    estimate = toy('ve', np)
    for sigma in sigmas[::-1]:
        step = 2e-3 * sigma**2 / 0.1**2
        for _ in range(3):
            score = (estimate(y, sigma) - y) / sigma**2
            y, number = y + step / 2 * score + np.sqrt(step) * noise[number], number - 1
    if final_denoising:
        y = estimate(y, sigmas[0])
    np.testing.assert_allclose(ours, y, rtol=2e-5, atol=2e-5)


# From images to noise


def test_inversion_gives_the_image_back_the_better_the_more_steps():
    x_0 = (MEAN + STD * np.random.default_rng(0).normal(size=(8, 3))).astype(np.float32)
    for kind in KINDS:
        back, off = [], []
        for n in (20, 40, 80):
            schedule = grid(kind, n, top=6.0, power=2)

            @jax.jit
            def there_and_back(x_0, schedule=schedule, kind=kind):
                x = samplers.ddim_inversion(best(kind), x_0, schedule)
                return x, samplers.ddim(best(kind), x, schedule, keys_of(0, 8))

            x, y = there_and_back(x_0)
            back.append(np.abs(y - x_0).max())
            off.append(np.abs(exact(x, schedule.alpha[-1], schedule.sigma[-1]) - x_0).max())
        assert back[2] < 0.1 and back[1] < back[0] / 1.6 and back[2] < back[1] / 1.6, (kind, back)
        assert off[2] < 0.1 and off[1] < off[0] / 1.6 and off[2] < off[1] / 1.6, (kind, off)


@pytest.mark.slow
def test_inversion_over_stated_levels():
    """The denoiser gets the levels themselves: nothing else is different."""
    from jaxgen.diffusion.processes import time_of

    schedule, x_0 = grid('vp', 6, top=4.0), normal(keys_of(0, 4), (3,))
    plain = samplers.ddim_inversion(best('vp'), x_0, schedule)

    def denoise(x, level):
        assert isinstance(level, Schedule)
        return best('vp')(x, time_of(level))

    found = samplers.ddim_inversion(denoise, x_0, schedule, stated=True)
    np.testing.assert_allclose(found, plain, rtol=1e-6)
    table = samplers.with_levels(samplers.ddim.table, schedule, True)
    np.testing.assert_allclose(table['alpha_t'][::-1], schedule.alpha, rtol=1e-6)
    np.testing.assert_allclose(table['sigma_t'][::-1], schedule.sigma, rtol=1e-6)


# What all have in common


@pytest.mark.parametrize('name', [*DRAWS, 'heun_churned'])
def test_every_sampler(name):
    """A sample does not depend on its neighbours; the trajectory ends with it; the last step is the estimate
    itself; a fraction that comes with the estimate does not matter."""
    draw = churned('vp', 2.0) if name == 'heun_churned' else DRAWS[name]
    schedule = grid('vp', 6, power=2)
    x, keys = schedule.sigma[-1] * normal(keys_of(0, 4), (2, 3)), keys_of(1, 4)
    inner = toy('vp')

    def denoise(x, t):
        return jnp.where(t < schedule.t[0] + (name != 'heun_churned') * 1e-6, 0.125, inner(x, t)), 0 * x

    run = jax.jit(lambda x, keys: draw(denoise, x, schedule, keys, trajectory=True))
    y, seen = run(x, keys)
    assert seen['x'].shape == seen['x_0'].shape == (len(seen['x']), 4, 2, 3)
    np.testing.assert_array_equal(seen['x'][-1], y)
    np.testing.assert_array_equal(seen['x_0'][-1], y)
    assert np.isfinite(seen['x']).all()
    assert np.ptp(seen['x'][1]) > 0.1
    if name != 'heun_churned':  # its last evaluation is at a level of its own
        np.testing.assert_array_equal(y, np.full((4, 2, 3), 0.125, np.float32))
    _, others = run(jnp.concatenate([x[2:] + 1, x[2:]]), keys.at[:2].set(keys_of(2, 2)))
    np.testing.assert_allclose(others['x'][:, 2:], seen['x'][:, 2:], rtol=1e-5, atol=1e-6)
    assert np.abs(others['x'][0, :2] - seen['x'][0, :2]).max() > 0.1


@pytest.mark.parametrize(
    'name', ['ancestral', 'ddim_half', 'heun', 'heun_straight', 'dpm_solver_pp', 'dpm_solver_pp_sde', 'unipc_3']
)
def test_from_pure_noise(name):
    """A flow starts at alpha 0, where sigma / alpha is infinite."""
    time = np.linspace(0, 1, 65)[1:]
    schedule = Schedule(time, 1 - time, time)

    def denoise(x, t):
        alpha, sigma = 1 - t, t
        return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)

    x = normal(keys_of(0, 512), (3,))
    y = np.asarray(jax.jit(lambda x: DRAWS[name](denoise, x, schedule, keys_of(1, 512)))(x), np.float64)
    if name in ('heun', 'heun_straight', 'dpm_solver_pp', 'unipc_3'):
        np.testing.assert_allclose(y, exact(x, 0, 1), atol=0.05)
    np.testing.assert_allclose(y.mean(0), MEAN, atol=0.15)
    np.testing.assert_allclose(y.std(0), STD, rtol=0.15)


@pytest.mark.parametrize('released', [False, True])
def test_sit_by_hand(released):
    """Its SDE in its own clock, u = 1 - t from noise to data: dx = (v + (1 - u) s) du + sqrt(2 (1 - u)) dw, with
    the diffusion coefficient sigma; Euler-Maruyama from 0 to 1 - h, then a last step of h: the estimate, or the mean of
    the SDE's step. The released sampler: h = 0.04, before it levels evenly from u = 0 to 0.96, both included."""
    from jaxgen.diffusion import processes

    steps = 10
    schedule = levels.visited(processes.flow(), steps, 'uniform', last_step=0.04 if released else 0.0)
    denoise = best('flow')
    keys = keys_of(3, 4)
    x = schedule.sigma[-1] * normal(keys_of(2, 4), (3,))
    found = samplers.euler_maruyama(denoise, x, schedule, keys, last_step=0.04 if released else 0.0)
    h, last = (0.96 / (steps - 1), 0.04) if released else (1 / steps, 1 / steps)
    for i in range(steps - 1, -1, -1):
        t = schedule.t[i]
        x_0 = denoise(x, jnp.float32(t))
        eps = (x - (1 - t) * x_0) / t
        velocity, score = x_0 - eps, -eps / t
        if i == 0:  # from t = last; without the score: the estimate of the image itself
            x = x + last * (velocity + (t * score if released else 0))
            break
        noise = samplers.noise_of(keys, i, x)
        x = x + h * (velocity + t * score) + np.sqrt(2 * t * h) * noise
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)


def made(process, **fields):
    """The sampler of a section of these fields, the others at their defaults."""
    from jaxgen import options
    from jaxgen.families import diffusion

    return levels.make(options.value_of(options.fields(diffusion.build)['sampler'], fields, 'sampler'), process)


@pytest.mark.parametrize('clipped_noise', [True, False])
@pytest.mark.parametrize('to_first', [True, False])
@pytest.mark.parametrize('eta', [0.0, 0.7])
def test_ddim_with_clipped_estimates_by_hand(clipped_noise, to_first, eta):
    """Song et al. 2021, eq. 12: the noise of a step beside a clipped x_0 is what x_t holds beside it, or the network's;
    the last step leads to the data, or to the first level of the chain."""
    from jaxgen.diffusion import processes

    process = processes.linear(timesteps=20, beta_end=0.5)
    sampler = made(
        process, name='ddim', steps=4, offset=1, eta=eta, clipped_noise=clipped_noise, to_first=to_first, clip=True
    )
    levels = sampler.schedule
    assert levels.t.tolist() == [1, 6, 11, 16]

    def eps_of(x, t):
        return 1.5 * jnp.sin(3 * x + t)  # far from the noise: estimates beyond [-1, 1]

    def denoise(x, t):
        at = process.at(t)
        x_0 = (x - at.sigma * eps_of(x, t)) / at.alpha
        return x_0 if sampler.clip_here else jnp.clip(x_0, -1, 1)

    x, keys, outside = normal(keys_of(0, 3), (5,)), keys_of(1, 3), 0
    drawn = samplers.run(denoise, x, sampler.table, keys)
    first = process.at(np.array([0]))
    for i in (3, 2, 1, 0):
        alpha, sigma = levels.alpha[i], levels.sigma[i]
        end = (first.alpha[0], first.sigma[0]) if to_first else (1.0, 0.0)
        alpha_s, sigma_s = (levels.alpha[i - 1], levels.sigma[i - 1]) if i else end
        eps = eps_of(x, jnp.int32(levels.t[i]))
        x_0 = (x - sigma * eps) / alpha
        outside += (jnp.abs(x_0) > 1).sum()
        x_0 = jnp.clip(x_0, -1, 1)
        eps = (x - alpha * x_0) / sigma if clipped_noise else eps
        std = eta * sigma_s / sigma * np.sqrt(1 - alpha**2 / alpha_s**2)
        x = alpha_s * x_0 + np.sqrt(sigma_s**2 - std**2) * eps + std * samplers.noise_of(keys, i, x)
    assert outside > 10
    np.testing.assert_allclose(drawn, x, rtol=1e-3, atol=1e-4)


def test_start_and_levels_of_a_section():
    from jaxgen.diffusion import processes
    from jaxgen.errors import UserError

    process = processes.scaled_linear()
    assert made(process).start == process.at(np.array([999])).sigma[0] < 0.998
    assert made(process, unit_start=True).start == 1
    assert made(process, name='ddim', steps=30, spacing='leading').schedule.t.tolist() == list(range(0, 990, 33))
    with pytest.raises(UserError, match=r'offset 34 moves the last of 30 levels, 966, beyond that of the process, 999'):
        made(process, steps=30, offset=34)
    with pytest.raises(UserError, match=r'unit_start is of processes with alpha\^2'):
        made(processes.ve(), name='heun', unit_start=True)
    with pytest.raises(UserError, match=r'offset is of chains'):
        made(processes.vp(), name='heun', offset=1)
