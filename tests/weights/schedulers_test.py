"""Schedulers of diffusers: run beside the sampler that their scheduler_config.json becomes, over one network from one
noise, and every argument of their constructors."""

from __future__ import annotations

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import config as configs
from jaxgen import options
from jaxgen.diffusion import levels, processes, samplers
from jaxgen.diffusion.schedules import Schedule
from jaxgen.errors import UserError
from jaxgen.families import diffusion as family
from jaxgen.randomness import example_keys
from jaxgen.weights import diffusers as sources
from jaxgen.weights import pipelines, schedulers

pytestmark = [
    pytest.mark.filterwarnings('ignore:__array:DeprecationWarning'),  # torch and numpy
    pytest.mark.filterwarnings('ignore:.*dpmsolver.*:FutureWarning'),
]
SHAPE = (2, 3, 4)
SD = {'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012}
V = {'prediction_type': 'v_prediction'}
ZERO = {'rescale_betas_zero_snr': True, 'timestep_spacing': 'trailing', **V}
FLOW = {'prediction_type': 'flow_prediction', 'use_flow_sigmas': True}


def network(lib, x, t):
    """A network of sorts, in jax or torch, for any prediction."""
    return 0.6 * x * (t / 1000 + 0.1) ** 0.5 + 0.1 * lib.sin(x + t / 150)


def sections(said, n, even=False):
    """(process, complete section of the sampler) of a scheduler_config.json, at n steps."""
    learned = schedulers.process_fields(said)
    own = {k.removeprefix('model.process.'): v for k, v in learned.items() if k.startswith('model.process.')}
    fields = options.fields(processes.PROCESSES[own['name']])
    section = {'name': own['name'], **{k: f.default for k, f in fields.items()}}
    process = processes.make(section | {k: v for k, v in own.items() if k in fields})
    chosen = {**schedulers.sampler_fields(said, even), 'steps': n}
    sampler = options.value_of(options.fields(family.build)['sampler'], chosen, 'sampler')
    assert {k: sampler[k] for k in chosen} == chosen
    return process, sampler, learned['model.training.prediction.name']


def ours(process, sampler, prediction, noise, image=None):
    """x_0 by a sampler, and the levels that it visited, from noise, or from an image with noise at its last level."""
    seen = []

    def denoise(x, level):
        at = level if isinstance(level, Schedule) else process.at(jnp.asarray(level)[None])
        t = processes.time_of(level)
        output = network(jnp, x, 1000 * t if process.straight else t)
        alpha, sigma = (jnp.float32(jnp.ravel(value)[0]) for value in at[1:])
        seen.append(float(1000 * t if process.straight else t))
        if prediction == 'eps':
            x_0 = (x - sigma * output) / alpha
        elif prediction == 'v':
            x_0 = alpha * x - sigma * output
        else:
            x_0 = x - sigma * output if prediction == 'flow' else output
        return jnp.clip(x_0, -1, 1) if sampler.clip and not sampler.clip_here else x_0

    x = sampler.start * noise
    if image is not None:
        x = sampler.schedule.alpha[-1] * image + sampler.schedule.sigma[-1] * noise
    keys = example_keys(jax.random.key(1), {'index': jnp.arange(2)})
    with jax.disable_jit():
        end = samplers.run(denoise, jnp.asarray(x, jnp.float32), sampler.table, keys)
        total = len(sampler.table['t'])
        drawn = [samplers.noise_of(keys, i, end) for i in range(total)][::-1] if 'std' in sampler.table else []
    return np.asarray(end), seen, [np.asarray(one) for one in drawn]


def theirs(said, n, noise, drawn, monkeypatch, begin=0, image=None, **set_options):
    """The same by diffusers."""
    torch, diffusers = pytest.importorskip('torch'), pytest.importorskip('diffusers')
    scheduler = getattr(diffusers, said['_class_name']).from_config(dict(said))
    scheduler.set_timesteps(**(set_options or {'num_inference_steps': n}))
    module = type(scheduler).__module__
    draws = (torch.from_numpy(np.array(one)) for one in drawn)
    if hasattr(__import__(module, fromlist=['x']), 'randn_tensor'):
        monkeypatch.setattr(f'{module}.randn_tensor', lambda *_, **__: next(draws, torch.zeros(y.shape)))
    times = scheduler.timesteps[begin * scheduler.order :]
    if hasattr(scheduler, 'set_begin_index'):
        scheduler.set_begin_index(begin * scheduler.order)
    y, unit = torch.from_numpy(noise), getattr(scheduler, 'init_noise_sigma', 1.0)
    if image is None:
        y = y * unit
    elif hasattr(scheduler, 'scale_noise') and not hasattr(scheduler, 'add_noise'):
        y = scheduler.scale_noise(torch.from_numpy(image), times[:1].repeat(2), y)
    else:
        y = scheduler.add_noise(torch.from_numpy(image), y, times[:1].repeat(2))
    for t in times:
        scaled = scheduler.scale_model_input(y, t) if hasattr(scheduler, 'scale_model_input') else y
        y = scheduler.step(network(torch, scaled.float(), t.float()).float(), t, y).prev_sample
    return y.numpy(), times.numpy()


def compare(said, n, monkeypatch, strength=None, tokens=0, even=False, **set_options):
    rng = np.random.default_rng(n)
    noise, image = (rng.standard_normal((2, *SHAPE)).astype(np.float32) for _ in range(2))
    process, section, prediction = sections(said, n, even)
    skip, image = (0, None) if strength is None else (levels.skipped_levels(n, strength), image)
    sampler = levels.make(section, process, tokens=tokens, skip=skip)
    found, seen, drawn = ours(process, sampler, prediction, noise, image)
    expected, times = theirs(said, n, noise, drawn, monkeypatch, skip, image, **set_options)
    np.testing.assert_allclose(seen, times, rtol=1e-5, atol=1e-2)
    assert expected.std() > 0.001 and np.isfinite(expected).all()
    # Schedulers of k-diffusion have x / alpha, of which the rounding errors are those of 4096 with zero terminal SNR.
    atol = 1e-3 if section['least_alpha'] and not section['unit_start'] else 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=atol * max(expected.std(), 1))


CASES = [
    ('DDIM', {**SD, 'clip_sample': False, 'set_alpha_to_one': False, 'steps_offset': 1}),
    ('DDIM', {'clip_sample': True}),
    ('DDIM', {**V, 'timestep_spacing': 'trailing', 'clip_sample': False}),
    ('DDIM', {'timestep_spacing': 'linspace', 'clip_sample': False, 'beta_schedule': 'squaredcos_cap_v2'}),
    ('DDIM', {**ZERO, 'clip_sample': False}),
    ('PNDM', {**SD, 'skip_prk_steps': True, 'steps_offset': 1}),
    ('PNDM', {'skip_prk_steps': True, 'set_alpha_to_one': True, **V}),
    ('PNDM', {'skip_prk_steps': True, 'timestep_spacing': 'trailing'}),
    ('PNDM', {'skip_prk_steps': True, 'timestep_spacing': 'linspace', 'beta_schedule': 'squaredcos_cap_v2'}),
    ('EulerDiscrete', {**SD, 'timestep_spacing': 'leading', 'steps_offset': 1}),
    ('EulerDiscrete', {}),
    ('EulerDiscrete', {**SD, **V, 'use_karras_sigmas': True, 'timestep_spacing': 'leading', 'steps_offset': 1}),
    ('EulerDiscrete', {'use_exponential_sigmas': True, 'sigma_min': 0.05, 'sigma_max': 9.0}),
    ('EulerDiscrete', {'use_beta_sigmas': True, 'final_sigmas_type': 'sigma_min'}),
    ('EulerDiscrete', {**ZERO}),
    ('EulerDiscrete', {'interpolation_type': 'log_linear', 'prediction_type': 'sample'}),
    ('EulerDiscrete', {'interpolation_type': 'log_linear', 'use_karras_sigmas': True, 'trained_betas': [0.01] * 400,
                       'num_train_timesteps': 400}),
    ('EulerAncestralDiscrete', {**SD, 'timestep_spacing': 'trailing'}),
    ('EulerAncestralDiscrete', {**V}),
    ('EulerAncestralDiscrete', {**ZERO}),
    ('HeunDiscrete', {**SD}),
    ('HeunDiscrete', {'use_karras_sigmas': True, **V, 'timestep_spacing': 'leading', 'steps_offset': 1}),
    ('HeunDiscrete', {'clip_sample': True, 'timestep_spacing': 'trailing', 'use_beta_sigmas': True}),
    ('LMSDiscrete', {**SD}),
    ('LMSDiscrete', {'use_karras_sigmas': True, **V}),
    ('LMSDiscrete', {'timestep_spacing': 'trailing', 'use_exponential_sigmas': True}),
    ('DPMSolverMultistep', {**SD, 'steps_offset': 1, 'timestep_spacing': 'leading'}),
    ('DPMSolverMultistep', {'solver_order': 3, 'use_karras_sigmas': True}),
    ('DPMSolverMultistep', {'solver_order': 3, 'lower_order_final': False, 'final_sigmas_type': 'sigma_min', **V}),
    ('DPMSolverMultistep', {'solver_type': 'heun', 'euler_at_final': True, 'timestep_spacing': 'trailing'}),
    ('DPMSolverMultistep', {'algorithm_type': 'sde-dpmsolver++', **SD}),
    ('DPMSolverMultistep', {'algorithm_type': 'sde-dpmsolver++', 'solver_type': 'heun', 'use_karras_sigmas': True}),
    ('DPMSolverMultistep', {'algorithm_type': 'dpmsolver', 'final_sigmas_type': 'sigma_min', 'solver_order': 3}),
    ('DPMSolverMultistep', {'algorithm_type': 'dpmsolver', 'final_sigmas_type': 'sigma_min', 'solver_type': 'heun'}),
    ('DPMSolverMultistep', {'algorithm_type': 'sde-dpmsolver', 'final_sigmas_type': 'sigma_min'}),
    ('DPMSolverMultistep', {'use_lu_lambdas': True, **ZERO}),
    ('DPMSolverMultistep', {'use_exponential_sigmas': True}),
    ('DPMSolverMultistep', {'beta_schedule': 'squaredcos_cap_v2'}),
    ('DPMSolverMultistep', {**FLOW, 'flow_shift': 3.0}),
    ('DPMSolverSinglestep', {**SD}),
    ('DPMSolverSinglestep', {'solver_order': 3, 'lower_order_final': True, 'solver_type': 'heun'}),
    ('DPMSolverSinglestep', {'solver_order': 3, 'use_karras_sigmas': True, 'final_sigmas_type': 'sigma_min'}),
    ('DPMSolverSinglestep', {'algorithm_type': 'dpmsolver', 'final_sigmas_type': 'sigma_min', **V}),
    ('UniPCMultistep', {**SD}),
    ('UniPCMultistep', {'solver_order': 3, 'use_karras_sigmas': True, 'sigma_max': 12.0, **V}),
    ('UniPCMultistep', {'solver_type': 'bh1', 'disable_corrector': [0, 3], 'final_sigmas_type': 'sigma_min'}),
    ('UniPCMultistep', {'predict_x0': False, 'final_sigmas_type': 'sigma_min', 'solver_order': 3}),
    ('UniPCMultistep', {**FLOW, 'flow_shift': 3.0}),
    ('UniPCMultistep', {**ZERO}),
    ('DEISMultistep', {**SD}),
    ('DEISMultistep', {'solver_order': 3, 'timestep_spacing': 'trailing', **V}),
    ('DEISMultistep', {'use_karras_sigmas': True, 'lower_order_final': False}),
    ('LCM', {}),
    ('LCM', {'original_inference_steps': 40, **V, 'timestep_scaling': 3.0}),
    ('LCM', {'clip_sample': True, 'prediction_type': 'sample'}),
    ('FlowMatchEulerDiscrete', {'shift': 3.0}),
    ('FlowMatchEulerDiscrete', {'shift': 1.5, 'stochastic_sampling': True}),
    ('FlowMatchEulerDiscrete', {'shift': 2.0, 'use_karras_sigmas': True}),
    ('FlowMatchEulerDiscrete', {'num_train_timesteps': 1000, 'use_beta_sigmas': True}),
    ('FlowMatchHeunDiscrete', {'shift': 3.0}),
]  # fmt: skip


def said_of(name, own):
    cls = f'{name}Scheduler'
    return {'_class_name': cls, **schedulers.DEFAULTS[cls], **own}


def by_design(name, own, n):
    """Where diffusers differs: a single level of 'linspace' is there the one at the data, without noise; and the ramp
    of DEIS then ends where it begins."""
    respaced = own.get('timestep_spacing') == 'linspace' and name in ('DDIM', 'PNDM')
    return n == 1 and (respaced or (name == 'DEISMultistep' and 'use_karras_sigmas' in own))


@pytest.mark.slow
@pytest.mark.parametrize('n', [1, 2, 11])
@pytest.mark.parametrize(('name', 'own'), CASES)
def test_draws_as_diffusers_does(name, own, n, monkeypatch):
    if not by_design(name, own, n):
        compare(said_of(name, own), n, monkeypatch)


@pytest.mark.parametrize(('name', 'own', 'n'), [
    ('PNDM', {**SD, 'skip_prk_steps': True, 'steps_offset': 1}, 7),
    ('EulerDiscrete', {**SD, 'timestep_spacing': 'leading', 'steps_offset': 1}, 6),
    ('DPMSolverMultistep', {'use_karras_sigmas': True, **SD}, 6),
    ('FlowMatchEulerDiscrete', {'shift': 3.0}, 6),
])  # fmt: skip
def test_draws_as_the_published_settings(name, own, n, monkeypatch):
    compare(said_of(name, own), n, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize('n', [4, 5, 10])
@pytest.mark.parametrize(
    'own', [{}, {**V, 'steps_offset': 1}, {'set_alpha_to_one': True, 'timestep_spacing': 'trailing'}]
)
def test_runge_kutta_of_pndm_draws_as_diffusers_does(own, n, monkeypatch):
    compare(said_of('PNDM', own), n, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize('strength', [0.3, 0.75])
@pytest.mark.parametrize(('name', 'own'), [
    ('DDIM', {**SD, 'clip_sample': False, 'set_alpha_to_one': False, 'steps_offset': 1}),
    ('PNDM', {**SD, 'skip_prk_steps': True, 'steps_offset': 1}),
    ('EulerDiscrete', {**SD, 'timestep_spacing': 'leading', 'steps_offset': 1}),
    ('EulerDiscrete', {'use_karras_sigmas': True}),
    ('EulerAncestralDiscrete', {}),
    ('HeunDiscrete', {}),
    ('DPMSolverMultistep', {'solver_order': 3}),
    ('DPMSolverMultistep', {'algorithm_type': 'sde-dpmsolver++', 'use_karras_sigmas': True}),
    ('DPMSolverSinglestep', {'solver_order': 3}),
    ('UniPCMultistep', {'solver_order': 3, 'disable_corrector': [9]}),
    ('DEISMultistep', {'solver_order': 3}),
    ('FlowMatchEulerDiscrete', {'shift': 3.0}),
])  # fmt: skip
def test_starts_in_the_middle_as_diffusers_does(name, own, strength, monkeypatch):
    """Noise is added to an image at the level that img2img starts from."""
    compare(said_of(name, own), 11, monkeypatch, strength)


def test_levels_that_img2img_leaves_out():
    """`get_timesteps` of diffusers' pipelines: of Stable Diffusion, and of Stable Diffusion 3 and FLUX."""
    for steps in (1, 2, 7, 10, 28, 50):
        for strength in (0.0, 0.1, 0.3, 0.75, 0.8, 0.99, 1.0):
            kept = min(int(steps * strength), steps)
            assert levels.skipped_levels(steps, strength) == max(steps - kept, 0)
            kept = min(steps * strength, steps)
            assert levels.skipped_levels(steps, strength, whole=False) == int(max(steps - kept, 0))
    process, section, _ = sections(said_of('EulerDiscrete', {}), 5)
    assert len(levels.make(section, process, skip=4).schedule.t) == 1
    with pytest.raises(UserError, match='of 5 noise levels from 0 to 4 may be left out; it is 5'):
        levels.make(section, process, skip=5)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'own'), [
    ('EulerDiscrete', {**SD, 'timestep_spacing': 'leading', 'steps_offset': 1}),
    ('DPMSolverMultistep', {'use_karras_sigmas': True}),
    ('PNDM', {**SD, 'skip_prk_steps': True}),
    ('HeunDiscrete', {}),
])  # fmt: skip
def test_ends_in_the_middle_as_diffusers_does(name, own, monkeypatch):
    """`denoising_end` of SDXL's pipeline: the evaluations at times from T (1 - 0.6) on."""
    torch, diffusers = pytest.importorskip('torch'), pytest.importorskip('diffusers')
    said = said_of(name, own)
    process, section, prediction = sections(said, 12)
    sampler = levels.make(section, process)
    sampler = sampler._replace(table=levels.ended(sampler.table, 400))
    noise = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    found, _, _ = ours(process, sampler, prediction, noise)
    scheduler = getattr(diffusers, said['_class_name']).from_config(dict(said))
    scheduler.set_timesteps(12)
    y = torch.from_numpy(noise) * scheduler.init_noise_sigma
    times = [t for t in scheduler.timesteps if t >= 400]
    for t in times:
        y = scheduler.step(network(torch, scheduler.scale_model_input(y, t), t.float()), t, y).prev_sample
    # Schedulers of k-diffusion have x / alpha.
    ratio = float(scheduler.sigmas[len(times)]) if name in ('EulerDiscrete', 'HeunDiscrete') else 0.0
    assert len(found) == 2 and len(times) == len(sampler.table['t']) < 12 * scheduler.order
    np.testing.assert_allclose(found, y.numpy() / np.sqrt(1 + ratio**2), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['exponential', 'linear'])
@pytest.mark.parametrize(('tokens', 'n'), [(64, 4), (1024, 7), (4096, 1)])
def test_shift_by_the_number_of_tokens(kind, tokens, n, monkeypatch):
    """FLUX's pipeline gives the scheduler its levels, evenly, and mu by the number of tokens."""
    said = said_of('FlowMatchEulerDiscrete', {'use_dynamic_shifting': True, 'time_shift_type': kind, 'shift': 3.0})
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    levels = np.linspace(1.0, 1 / n, n)
    compare(said, n, monkeypatch, tokens=tokens, even=True, sigmas=levels, mu=mu)
    compare(said, n, monkeypatch, tokens=tokens, num_inference_steps=n, mu=mu)


def test_steps_of_a_compiled_sampler_are_those_of_the_table():
    """One program: kept outputs, levels that are not the process's, a step made twice."""
    for name, own in (('EulerDiscrete', {'use_karras_sigmas': True}), ('PNDM', {'skip_prk_steps': True})):
        process, section, prediction = sections(said_of(name, own), 4)
        sampler = levels.make(section, process)
        noise = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
        expected, _, _ = ours(process, sampler, prediction, noise)

        def denoise(x, level, process=process):
            alpha, sigma = processes.coefficients(process, jax.tree.map(lambda t: jnp.full(2, t), level), x)
            return (x - sigma * network(jnp, x, processes.time_of(level))) / alpha

        found = jax.jit(lambda x, s=sampler, d=denoise: samplers.run(d, x, s.table, None))(sampler.start * noise)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# what the keys become, and back


@pytest.mark.slow
def test_every_argument_of_a_scheduler_has_its_default_here():
    diffusers = pytest.importorskip('diffusers')
    for name, known in schedulers.DEFAULTS.items():
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        defaults = {key: one.default for key, one in parameters.items() if key != 'self'}
        assert known == defaults, name
        sources.check_kinds(defaults, name)


# {key: value that no default has}; values that a scheduler here cannot have are refused in one line.
OTHER = {
    'num_train_timesteps': 400, 'beta_start': 0.001, 'beta_end': 0.03, 'beta_schedule': 'squaredcos_cap_v2',
    'trained_betas': [0.1] * 1000, 'prediction_type': 'v_prediction', 'timestep_spacing': 'trailing', 'steps_offset': 1,
    'use_karras_sigmas': True, 'use_exponential_sigmas': True, 'use_beta_sigmas': True, 'rescale_betas_zero_snr': True,
    'interpolation_type': 'log_linear', 'final_sigmas_type': 'sigma_min', 'solver_order': 1, 'lower_order_final': None,
    'euler_at_final': True, 'use_lu_lambdas': True, 'predict_x0': False, 'disable_corrector': [1], 'shift': 2.0,
    'use_dynamic_shifting': True, 'stochastic_sampling': True, 'original_inference_steps': 60, 'timestep_scaling': 5.0,
    'set_alpha_to_one': None, 'skip_prk_steps': True, 'clip_sample': None, 'thresholding': True, 'solver_p': 'x',
    'invert_sigmas': True, 'shift_terminal': 0.1, 'lambda_min_clipped': -4.5, 'variance_type': 'fixed_large',
    'use_flow_sigmas': True, 'algorithm_type': 'dpmsolver',
}  # fmt: skip
# Keys that matter beside another one alone.
BESIDE = {
    'clip_sample_range': {'clip_sample': True, 'clip_sample_range': 2.0},
    'timestep_type': {'timestep_type': 'continuous', 'prediction_type': 'v_prediction'},
    'sigma_min': {'use_karras_sigmas': True, 'sigma_min': 0.1},
    'sigma_max': {'use_karras_sigmas': True, 'sigma_max': 9.0},
    'flow_shift': {'use_flow_sigmas': True, 'flow_shift': 2.0, 'prediction_type': 'flow_prediction'},
    'steps_offset': {'timestep_spacing': 'leading', 'steps_offset': 1},
    'solver_type': {'solver_type': {'UniPCMultistepScheduler': 'bh1'}},
    'time_shift_type': {'use_dynamic_shifting': True, 'time_shift_type': 'linear'},
    'base_shift': {'use_dynamic_shifting': True, 'base_shift': 0.4},
    'max_shift': {'use_dynamic_shifting': True, 'max_shift': 1.4},
    'base_image_seq_len': {'use_dynamic_shifting': True, 'base_image_seq_len': 200},
    'max_image_seq_len': {'use_dynamic_shifting': True, 'max_image_seq_len': 5000},
}
# Without `thresholding` they change nothing, and LCM has levels of its own; DEIS has one method.
IDLE = {'dynamic_thresholding_ratio', 'sample_max_value'}
WITHOUT = {
    'LCMScheduler': {'timestep_spacing', 'steps_offset', 'set_alpha_to_one'},
    'DEISMultistepScheduler': {'solver_type', 'algorithm_type', 'time_shift_type', 'flow_shift'},
    'DPMSolverMultistepScheduler': {'variance_type', 'time_shift_type'},
    'DPMSolverSinglestepScheduler': {'variance_type', 'time_shift_type', 'lower_order_final'},
    'UniPCMultistepScheduler': {'time_shift_type'},
    'FlowMatchEulerDiscreteScheduler': set(),
    'FlowMatchHeunDiscreteScheduler': set(),
}


def outcome(said):
    try:
        return schedulers.process_fields(said), schedulers.sampler_fields(said)
    except UserError as e:
        return str(e)


@pytest.mark.parametrize('kind', schedulers.DEFAULTS)
def test_no_key_is_ignored(kind):
    """Another value of each key of each class changes fields of the run, or is refused in one line."""
    plain = {'_class_name': kind, **schedulers.DEFAULTS[kind]}
    for key in schedulers.DEFAULTS[kind].keys() - IDLE - WITHOUT.get(kind, set()):
        value = OTHER.get(key)
        beside = BESIDE.get(key, {key: (not plain[key]) if value is None else value})
        own = {k: v.get(kind, 'heun') if isinstance(v, dict) else v for k, v in beside.items() if k in plain}
        before = {k: v for k, v in own.items() if k != key}
        result = outcome({**plain, **own})
        assert result != outcome({**plain, **before}), (kind, key)
        assert not isinstance(result, str) or (len(result.splitlines()) == 1 and key in result), (kind, key, result)


@pytest.mark.parametrize(('name', 'own', 'key'), [
    ('DPMSolverMultistep', {'thresholding': True}, 'thresholding True'),
    ('DPMSolverMultistep', {'solver_order': 3, 'algorithm_type': 'sde-dpmsolver++'}, 'solver_order 3'),
    ('DPMSolverMultistep', {'beta_schedule': 'squaredcos_cap_v2', 'lambda_min_clipped': -5.1}, 'lambda_min_clipped'),
    ('DPMSolverMultistep', {'lambda_min_clipped': None}, 'lambda_min_clipped'),
    ('DPMSolverSinglestep', {'algorithm_type': 'sde-dpmsolver++'}, "algorithm_type 'sde-dpmsolver"),
    ('UniPCMultistep', {'lower_order_final': False}, 'lower_order_final'),
    ('UniPCMultistep', {'disable_corrector': 3}, 'disable_corrector 3'),
    ('EulerDiscrete', {'use_karras_sigmas': True, 'use_beta_sigmas': True}, 'use_beta_sigmas'),
    ('EulerDiscrete', {'timestep_type': 'continuous', **V}, "timestep_type 'continuous'"),
    ('PNDM', {'prediction_type': 'sample'}, "prediction_type 'sample'"),
    ('FlowMatchEulerDiscrete', {'shift_terminal': 0.1}, r'shift_terminal 0\.1'),
    ('FlowMatchEulerDiscrete', {'use_dynamic_shifting': True, 'base_shift': None}, 'base_shift None'),
])  # fmt: skip
def test_what_nothing_here_samples_as(name, own, key):
    with pytest.raises(UserError, match=f'samplers here have no {key}.*, which a {name}Scheduler'):
        schedulers.sampler_fields(said_of(name, own))


def test_limits_of_lambda_that_no_level_reaches_do_not_matter():
    """log(alpha / sigma) of the last level of DDPM's betas is -5.0 (Ho et al. 2020: alpha-bar 4e-5), of SD's -2.7."""
    plain = schedulers.sampler_fields(said_of('DPMSolverMultistep', SD))
    assert schedulers.sampler_fields(said_of('DPMSolverMultistep', {**SD, 'lambda_min_clipped': -5.1})) == plain


@pytest.mark.parametrize(('name', 'own'), [
    (name, own) for name, own in CASES if name not in ('DDIM',) and 'trained_betas' not in own
])  # fmt: skip
def test_export_is_the_way_back(name, own):
    said = said_of(name, own)
    flow = schedulers.is_flow(said)
    config = configs.load('sit_imagenet256' if flow else 'ddpm_cifar10')
    config, _ = pipelines.with_scheduler(config, said, set())
    back = schedulers.scheduler_config(config)
    assert back['_class_name'] == said['_class_name']
    again, lines = pipelines.with_scheduler(config, back, set())
    assert again == config and lines == []


def test_lambda_is_no_number_of_json():
    """Minus infinity, the default, is not written."""
    config, _ = pipelines.with_scheduler(configs.load('ddpm_cifar10'), said_of('DPMSolverMultistep', {}), set())
    back = schedulers.scheduler_config(config)
    assert all(not isinstance(value, float) or math.isfinite(value) for value in back.values())


@pytest.mark.parametrize(('process', 'fields', 'line'), [
    ('flow', {'name': 'pndm'}, r"'pndm' with its steps is of chains"),
    ('flow', {'name': 'lms'}, r'divides by alpha, which is 0 at the last level here: least_alpha'),
    ('linear', {'name': 'pndm', 'ramp': 'karras'}, r'visits whole steps of a chain'),
    ('linear', {'name': 'ddim', 'by_stride': True, 'rounding': 'down'}, r'visits whole steps of a chain'),
    ('linear', {'name': 'lcm', 'spacing': 'distilled', 'steps': 51}, r'chooses steps of grid 50'),
    ('linear', {'name': 'euler', 'ends': (0.1, 1.0)}, r"ends and dynamic_shift are of process 'flow'"),
    ('linear', {'name': 'euler', 'ramp_ends': (9.0, 1.0)}, r'are the least and the largest'),
    ('flow', {'name': 'euler', 'dynamic_shift': 'linear'}, r'number of tokens, and this network has none'),
    ('linear', {'name': 'pndm', 'runge_kutta': True, 'steps': 3}, r'steps >= 4'),
    ('linear', {'name': 'dpm_solver_pp_sde', 'order': 3}, r'order = 3 is of the ODE'),
])  # fmt: skip
def test_fields_that_do_not_go_together(process, fields, line):
    section = options.value_of(options.fields(family.build)['sampler'], fields, 'sampler')
    with pytest.raises(UserError, match=line):
        levels.make(section, processes.PROCESSES[process]())
