"""scheduler_config.json of diffusers for the process and the sampler of a run, both ways.

DEFAULTS lists every key that the constructors take, by class: `process_fields` and `sampler_fields` make config fields
of them, or refuse a value that nothing here samples as. Keys of other classes are ignored, as diffusers does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxgen.diffusion import processes
from jaxgen.diffusion.levels import Visits
from jaxgen.errors import UserError

Said = Mapping[str, Any]

PROCESSES = {'linear': 'linear', 'scaled_linear': 'scaled_linear', 'squaredcos_cap_v2': 'cosine', 'sigmoid': 'sigmoid'}
PREDICTIONS = {'epsilon': 'eps', 'sample': 'x0', 'v_prediction': 'v', 'flow_prediction': 'flow'}
VARIANCES = {'fixed_small': 'fixed_small', 'fixed_small_log': 'fixed_small', 'fixed_large': 'fixed_large'}
SPACINGS = {'leading': 'leading', 'trailing': 'trailing', 'linspace': 'respaced'}
ALGORITHMS = {
    'dpmsolver': 'dpm_solver',
    'sde-dpmsolver': 'dpm_solver_sde',
    'dpmsolver++': 'dpm_solver_pp',
    'sde-dpmsolver++': 'dpm_solver_pp_sde',
    'deis': 'dpm_solver_pp',  # what DPMSolverMultistepScheduler makes of it
}

BETAS = {
    'num_train_timesteps': 1000,
    'beta_start': 0.0001,
    'beta_end': 0.02,
    'beta_schedule': 'linear',
    'trained_betas': None,
    'prediction_type': 'epsilon',
    'timestep_spacing': 'linspace',
    'steps_offset': 0,
}
LEADING = {'timestep_spacing': 'leading'}
SD_BETAS = {'beta_start': 0.00085, 'beta_end': 0.012}
RAMPS = {'use_karras_sigmas': False, 'use_exponential_sigmas': False, 'use_beta_sigmas': False}
CLIP = {'clip_sample': True, 'clip_sample_range': 1.0}
THRESHOLD = {'thresholding': False, 'dynamic_thresholding_ratio': 0.995, 'sample_max_value': 1.0}
ZERO_SNR = {'rescale_betas_zero_snr': False}
FLOW = {
    'use_flow_sigmas': False,
    'flow_shift': 1.0,
    'use_dynamic_shifting': False,
    'time_shift_type': 'exponential',
}
SOLVER = {'solver_order': 2, 'lower_order_final': True, **RAMPS, **THRESHOLD, **FLOW}
DPM_SOLVER = {
    **SOLVER,
    'algorithm_type': 'dpmsolver++',
    'solver_type': 'midpoint',
    'final_sigmas_type': 'zero',
    'lambda_min_clipped': -math.inf,
    'variance_type': None,
}
# {class: {argument of its constructor: default}}
DEFAULTS: dict[str, dict[str, Any]] = {
    'DDPMScheduler': {**BETAS, **LEADING, **CLIP, **THRESHOLD, **ZERO_SNR, 'variance_type': 'fixed_small'},
    'DDIMScheduler': {**BETAS, **LEADING, **CLIP, **THRESHOLD, **ZERO_SNR, 'set_alpha_to_one': True},
    'PNDMScheduler': {**BETAS, **LEADING, 'skip_prk_steps': False, 'set_alpha_to_one': False},
    'EulerDiscreteScheduler': {
        **BETAS,
        **RAMPS,
        **ZERO_SNR,
        'interpolation_type': 'linear',
        'sigma_min': None,
        'sigma_max': None,
        'timestep_type': 'discrete',
        'final_sigmas_type': 'zero',
    },
    'EulerAncestralDiscreteScheduler': {**BETAS, **ZERO_SNR},
    'HeunDiscreteScheduler': {**BETAS, **SD_BETAS, **RAMPS, **CLIP, 'clip_sample': False},
    'LMSDiscreteScheduler': {**BETAS, **RAMPS},
    'DPMSolverMultistepScheduler': {
        **BETAS,
        **DPM_SOLVER,
        **ZERO_SNR,
        'euler_at_final': False,
        'use_lu_lambdas': False,
    },
    'DPMSolverSinglestepScheduler': {
        **{key: value for key, value in BETAS.items() if key not in ('timestep_spacing', 'steps_offset')},
        **DPM_SOLVER,
        'lower_order_final': False,
    },
    'UniPCMultistepScheduler': {
        **BETAS,
        **SOLVER,
        **ZERO_SNR,
        'predict_x0': True,
        'solver_type': 'bh2',
        'disable_corrector': [],
        'solver_p': None,
        'final_sigmas_type': 'zero',
        'sigma_min': None,
        'sigma_max': None,
        'shift_terminal': None,
    },
    'DEISMultistepScheduler': {**BETAS, **SOLVER, 'algorithm_type': 'deis', 'solver_type': 'logrho'},
    'LCMScheduler': {
        **BETAS,
        **SD_BETAS,
        **LEADING,
        **CLIP,
        **THRESHOLD,
        **ZERO_SNR,
        'beta_schedule': 'scaled_linear',
        'clip_sample': False,
        'set_alpha_to_one': True,
        'original_inference_steps': 50,
        'timestep_scaling': 10.0,
    },
    'FlowMatchEulerDiscreteScheduler': {
        'num_train_timesteps': 1000,
        'shift': 1.0,
        'use_dynamic_shifting': False,
        'base_shift': 0.5,
        'max_shift': 1.15,
        'base_image_seq_len': 256,
        'max_image_seq_len': 4096,
        'invert_sigmas': False,
        'shift_terminal': None,
        **RAMPS,
        'time_shift_type': 'exponential',
        'stochastic_sampling': False,
    },
    'FlowMatchHeunDiscreteScheduler': {'num_train_timesteps': 1000, 'shift': 1.0},
}
FLOWS = ('FlowMatchEulerDiscreteScheduler', 'FlowMatchHeunDiscreteScheduler')
MULTISTEP = (
    'DPMSolverMultistepScheduler',
    'DPMSolverSinglestepScheduler',
    'UniPCMultistepScheduler',
    'DEISMultistepScheduler',
)
STEPS = {**dict.fromkeys(FLOWS, 28), 'LCMScheduler': 4}  # of the pipelines that draw by them; of others 50


def full(said: Said) -> dict[str, Any]:
    """All keys of a scheduler_config.json, those that it lacks at their defaults."""
    return DEFAULTS.get(str(said.get('_class_name')), {}) | dict(said)


def is_flow(said: Said) -> bool:
    """Whether the process is a flow."""
    return said.get('_class_name') in FLOWS or bool(said.get('use_flow_sigmas'))


def process_fields(said: Said) -> dict[str, Any]:
    """Fields of what was learned, by the scheduler_config.json of a scheduler with betas or of a flow; {} of others.

    Raises:
      UserError: betas or a prediction that there are not here.
    """
    flow = is_flow(said) and 'num_train_timesteps' in said
    if not flow and ('num_train_timesteps' not in said or not {'beta_schedule', 'trained_betas'} & said.keys()):
        return {}
    if said['num_train_timesteps'] is None:  # as a network's may be
        raise UserError('the scheduler of the pipeline is damaged: num_train_timesteps is null, and should be a count')
    said = full(said)
    schedule, prediction = said.get('beta_schedule', 'linear'), said.get('prediction_type', 'epsilon')
    if said.get('_class_name') in FLOWS:
        prediction = 'flow_prediction'
    elif schedule not in PROCESSES or prediction not in PREDICTIONS or (prediction == 'flow_prediction' and not flow):
        raise UserError(
            f'the scheduler of the pipeline has beta_schedule {schedule!r} and prediction_type {prediction!r}; here '
            f'are {", ".join(PROCESSES)}, and {", ".join(PREDICTIONS)}, the last one of flows'
        )
    learned = {
        'model.training.prediction.name': PREDICTIONS[prediction],
        'model.training.time_scale': said['num_train_timesteps'] / 1000 if flow else 1.0,
        'model.training.time_shift': 0.0,
    }
    if flow:
        return {'model.process.name': 'flow', **learned}
    fields = {
        'model.process.name': PROCESSES[schedule],
        'model.process.timesteps': said['num_train_timesteps'],
        'model.process.beta_start': said.get('beta_start', 0.0001),
        'model.process.beta_end': said.get('beta_end', 0.02),
        'model.process.zero_terminal': said.get('rescale_betas_zero_snr', False),
        **learned,
    }
    if betas := said.get('trained_betas'):
        fields |= {'model.process.name': 'listed', 'model.process.betas': tuple(betas)}
    return fields


def sampler_fields(said: Said, even: bool = False) -> dict[str, Any]:
    """Fields of config.model.sampler with which samples are those of a scheduler, by its scheduler_config.json; {} of
    schedulers that are not known here. Of a DDPMScheduler at a number of steps that divides that of the process.

    Args:
      even: its pipeline spaces the levels of a flow evenly from the data, as FLUX's does, in place of the scheduler.

    Raises:
      UserError: it samples as nothing here does.
    """
    kind = str(said.get('_class_name'))
    if kind not in DEFAULTS:
        return {}
    said = full(said)
    if wrong := next((key for key, there in problems(kind, said).items() if there), None):
        raise UserError(f'samplers here have no {wrong} {said.get(wrong)!r}, which a {kind} of the pipeline has')
    visits = {f.name: f.default for f in dataclasses.fields(Visits) if f.name != 'steps'}
    visits |= {'clip': bool(said.get('clip_sample', False)), 'unit_start': True}
    levels = flow_levels(kind, said, even) if is_flow(said) else chain_levels(kind, said)
    own = method(kind, said)
    return {'name': own['name'], **visits, **levels, **own}


def problems(kind: str, said: Said) -> dict[str, Any]:
    """{key: whether nothing here samples as its value says}."""
    flow, ramps = is_flow(said), [key for key in RAMPS if said.get(key)]
    spacing, variance = said.get('timestep_spacing', 'linspace'), said.get('variance_type')
    sigma_min = said.get('final_sigmas_type') == 'sigma_min'
    refused = {
        'thresholding': said.get('thresholding'),
        'clip_sample_range': said.get('clip_sample') and said.get('clip_sample_range') != 1,
        'timestep_spacing': spacing not in SPACINGS,
        'final_sigmas_type': said.get('final_sigmas_type', 'zero') not in ('zero', 'sigma_min'),
        'interpolation_type': said.get('interpolation_type', 'linear') not in ('linear', 'log_linear'),
        'timestep_type': said.get('timestep_type', 'discrete') != 'discrete'
        and said['prediction_type'] == 'v_prediction',
        'time_shift_type': said.get('time_shift_type', 'exponential') not in ('exponential', 'linear'),
        'use_dynamic_shifting': said.get('use_dynamic_shifting') and kind not in FLOWS,
        'shift_terminal': said.get('shift_terminal'),
        'invert_sigmas': said.get('invert_sigmas'),
        'solver_p': said.get('solver_p'),
    }
    corrector, clipped = said.get('disable_corrector', ()), said.get('lambda_min_clipped', -math.inf)
    refused['disable_corrector'] = not isinstance(corrector, list | tuple) or not all(
        isinstance(one, int) and 0 <= one < 2**31 for one in corrector
    )
    refused['lambda_min_clipped'] = not isinstance(clipped, int | float) or (not flow and clips(said))
    for key in ('base_shift', 'max_shift'):
        refused[key] = said.get('use_dynamic_shifting') and said.get(key) is None
    if len(ramps) + bool(said.get('use_lu_lambdas')) > 1:
        refused[ramps[-1]] = True
    if kind == 'DDPMScheduler':
        # At the end of 'trailing' levels it adds the noise of a whole step, but for small variances.
        refused['variance_type'] = variance not in (*VARIANCES, 'learned_range') or (
            spacing == 'trailing' and VARIANCES.get(variance) != 'fixed_small'
        )
    if kind == 'PNDMScheduler':
        refused['prediction_type'] = said['prediction_type'] not in ('epsilon', 'v_prediction')
    if kind in MULTISTEP:
        order, algorithm = said['solver_order'], said.get('algorithm_type', '')
        sde = algorithm.startswith('sde')
        refused['solver_order'] = not 1 <= order <= (9 if kind.startswith('UniPC') else 2 if sde else 3)
        if kind.startswith('DPM'):
            refused['algorithm_type'] = algorithm not in ALGORITHMS or (sde and kind == 'DPMSolverSinglestepScheduler')
        # Times of flows are rounded by the thousandth.
        refused['num_train_timesteps'] = flow and said['num_train_timesteps'] != 1000
        refused['use_flow_sigmas'] = flow and (kind.startswith('DEIS') or ramps or said.get('use_lu_lambdas'))
        if kind.startswith('UniPC'):
            refused['lower_order_final'] = not said['lower_order_final']
            refused['sigma_min'] = sigma_min and ramps and said['sigma_min'] is not None
        if flow:
            refused['final_sigmas_type'] = sigma_min
    return refused


def clips(said: Said) -> bool:
    """Whether lambda_min_clipped leaves levels out: some have a smaller log(alpha / sigma)."""
    least = said.get('lambda_min_clipped', -math.inf)
    if not math.isfinite(least):
        return False
    fields = {key.removeprefix('model.process.'): value for key, value in process_fields(said).items()}
    own = {k: v for k, v in fields.items() if '.' not in k}
    if own['name'] in ('cosine', 'listed'):
        own = {k: v for k, v in own.items() if not k.startswith('beta_')}
    own = {k: v for k, v in own.items() if k != 'timesteps'} if own['name'] == 'listed' else own
    last = processes.make(own)
    at = last.at(np.array([last.end]))
    return bool(at.alpha[0] <= math.exp(least) * at.sigma[0])


def chain_levels(kind: str, said: Said) -> dict[str, Any]:
    """Fields of the levels of a chain."""
    spacing = said.get('timestep_spacing', 'linspace')
    ramp = next((key.split('_')[1] for key in RAMPS if said.get(key)), '')
    fields: dict[str, Any] = {
        'spacing': SPACINGS[spacing],
        'offset': said.get('steps_offset', 0) if spacing == 'leading' else 0,
        'ramp': ramp,
    }
    ends = said.get('sigma_min'), said.get('sigma_max')
    if ramp and any(end is not None for end in ends):
        fields['ramp_ends'] = tuple(float(end or 0) for end in ends)
    if kind not in ('DDPMScheduler', 'DDIMScheduler', 'LCMScheduler') and said.get('rescale_betas_zero_snr'):
        fields['least_alpha'] = 2.0**-12
    if kind == 'LCMScheduler':
        return fields | {'spacing': 'distilled', 'grid': said['original_inference_steps'], 'offset': 0}
    if kind in MULTISTEP:
        lu = bool(said.get('use_lu_lambdas'))
        if not ramp and not lu:
            return fields | {'skip_first': spacing != 'trailing'}
        # The ramp is from one end of the chain to the other. Times become integers.
        nearest = (lu or ramp == 'karras') and not (
            kind == 'DPMSolverMultistepScheduler' and said['beta_schedule'] == 'squaredcos_cap_v2'
        )
        whole = {'spacing': 'respaced', 'offset': 0, 'rounding': 'nearest' if nearest else 'down'}
        return fields | whole | {'ramp': ramp or 'exponential'}
    if kind in ('DDPMScheduler', 'DDIMScheduler', 'PNDMScheduler'):
        return fields
    # Schedulers of k-diffusion: sigmas, also between the steps of the chain.
    fields |= {'spacing': 'linspace' if spacing == 'linspace' else spacing, 'unit_start': spacing == 'leading'}
    if said.get('interpolation_type') == 'log_linear':
        fields |= {'spacing': 'respaced', 'offset': 0} if ramp else {'ramp': 'log_linear'}
    return fields


def flow_levels(kind: str, said: Said, even: bool) -> dict[str, Any]:
    """Fields of the levels of a flow."""
    least = 1 / said['num_train_timesteps']
    if kind == 'UniPCMultistepScheduler':
        fields = {'ends': (least, 1.0), 'skip_first': True, 'least_alpha': 1e-6, 'rounding': 'down'}
        return fields | {'shift': float(said['flow_shift'])}
    if kind in MULTISTEP:
        return {'ends': (0.0, 1 - least), 'rounding': 'down', 'shift': float(said['flow_shift'])}
    shift, fields = float(said['shift']), {}
    if said.get('use_dynamic_shifting'):
        fields = {
            'dynamic_shift': said['time_shift_type'],
            'shift_range': (said['base_shift'], said['max_shift']),
            'token_range': (said['base_image_seq_len'], said['max_image_seq_len']),
        }
        shift = 1.0
    # The least level is shifted before the levels are, and again with them.
    ends = (0.0, 1.0) if even else (shift * least / (1 + (shift - 1) * least), 1.0)
    ramp = next((key.split('_')[1] for key in RAMPS if said.get(key)), '')
    return {'ends': ends, 'shift': shift, 'ramp': ramp, **fields}


def method(kind: str, said: Said) -> dict[str, Any]:
    """The sampler's name and its own fields."""
    to_first = said.get('final_sigmas_type') == 'sigma_min'
    solver, order = said.get('solver_type', ''), said.get('solver_order', 2)
    if kind == 'DDPMScheduler':
        return {'name': 'ancestral', 'variance': VARIANCES.get(said['variance_type'], 'learned')}
    if kind == 'DDIMScheduler':
        own = {'eta': 0.0, 'clipped_noise': False, 'to_first': not said['set_alpha_to_one'], 'by_stride': True}
        return {'name': 'ddim', **own}
    if kind == 'PNDMScheduler':
        combined = 'v' if said['prediction_type'] == 'v_prediction' else 'eps'
        own = {'runge_kutta': not said['skip_prk_steps'], 'combined': combined}
        return {'name': 'pndm', **own, 'to_first': not said['set_alpha_to_one']}
    if kind == 'EulerDiscreteScheduler':
        log_linear = said['interpolation_type'] == 'log_linear' and not any(said[key] for key in RAMPS)
        return {'name': 'euler', 'to_first': to_first or log_linear}
    if kind == 'DPMSolverMultistepScheduler':
        own = {'order': order, 'correction': 'heun' if solver == 'heun' else 'midpoint', 'to_first': to_first}
        own |= {'lower_order_final': said['lower_order_final'], 'euler_at_final': said['euler_at_final']}
        return {'name': ALGORITHMS[said['algorithm_type']], **own}
    if kind == 'DPMSolverSinglestepScheduler':
        own = {'order': order, 'correction': 'heun' if solver == 'heun' else 'midpoint', 'to_first': to_first}
        own['lower_order_final'] = said['lower_order_final'] or not to_first
        return {'name': f'{ALGORITHMS[said["algorithm_type"]]}_single', **own}
    if kind == 'UniPCMultistepScheduler':
        own = {'order': order, 'b': 'bh1' if solver == 'bh1' else 'bh2', 'noise': not said['predict_x0']}
        return {'name': 'unipc', **own, 'uncorrected': tuple(said['disable_corrector']), 'to_first': to_first}
    if kind == 'DEISMultistepScheduler':
        return {'name': 'deis', 'order': order, 'lower_order_final': said['lower_order_final'], 'to_first': True}
    if kind == 'LCMScheduler':
        return {'name': 'lcm', 'time_scale': float(said['timestep_scaling'])}
    if kind == 'FlowMatchEulerDiscreteScheduler':
        return {'name': 'consistency'} if said['stochastic_sampling'] else {'name': 'euler', 'to_first': False}
    if kind == 'LMSDiscreteScheduler':
        return {'name': 'lms', 'order': 4}
    if kind == 'EulerAncestralDiscreteScheduler':
        return {'name': 'euler_ancestral', 'eta': 1.0}
    return {'name': 'heun', 's_churn': 0.0}


# --- the other way


def scheduler_config(config: ConfigDict) -> dict[str, Any]:
    """scheduler_config.json of a diffusion run: of the scheduler that draws as its sampler does, with DDPM's where it
    draws by `ancestral`; where there is none, of DDIM.

    Raises:
      UserError: diffusers has no scheduler of this process.
    """
    process, sampler = config.model.process, config.model.sampler
    theirs = {ours: name for name, ours in PROCESSES.items()}
    prediction = {ours: name for name, ours in PREDICTIONS.items()}.get(config.model.training.prediction.name)
    flow = process.name == 'flow' and prediction == 'flow_prediction'
    if (process.name not in (*theirs, 'listed') or prediction in (None, 'flow_prediction')) and not flow:
        raise UserError(
            f'diffusers has no pipeline of the process {process.name!r} with the prediction '
            f'{config.model.training.prediction.name!r}: name a file, --to=FILE.safetensors'
        )
    even = tuple(sampler.ends) == (0.0, 1.0)
    learned: dict[str, Any] = {'prediction_type': prediction}
    if flow:
        learned['num_train_timesteps'] = round(1000 * config.model.training.time_scale)
    elif process.name == 'listed':
        learned |= {'trained_betas': list(process.betas), 'num_train_timesteps': len(process.betas)}
    else:
        learned |= {'beta_schedule': theirs[process.name], 'num_train_timesteps': process.timesteps}
    if 'beta_start' in process:
        learned |= {'beta_start': process.beta_start, 'beta_end': process.beta_end}
    section = sampler.to_dict()
    for kind, own in candidates(section, learned, flow).items():
        said = {'_class_name': kind, **DEFAULTS[kind], **{k: v for k, v in own.items() if k in DEFAULTS[kind]}}
        if 'rescale_betas_zero_snr' in said:
            said['rescale_betas_zero_snr'] = process.get('zero_terminal', False)
        try:
            back = sampler_fields(said, even)
        except UserError:
            continue
        if all(same(section.get(name), value) for name, value in back.items()):
            return {key: value for key, value in said.items() if value != -math.inf}
    if flow:
        shift = float(sampler.shift)
        return {'_class_name': FLOWS[0], **DEFAULTS[FLOWS[0]], **learned_only(learned, FLOWS[0]), 'shift': shift}
    said = {
        **learned,
        'rescale_betas_zero_snr': process.zero_terminal,
        'clip_sample': sampler.clip,
        'timestep_spacing': {ours: name for name, ours in SPACINGS.items()}.get(sampler.spacing, 'leading'),
        'steps_offset': sampler.get('offset', 0),
    }
    if sampler.name == 'ancestral':
        learned_variance = config.model.training.variance.name == 'learned'
        variance = sampler.variance or ('learned' if learned_variance else 'fixed_large')
        names = {ours: name for name, ours in VARIANCES.items() if not name.endswith('_log')} | {
            'learned': 'learned_range'
        }
        return {'_class_name': 'DDPMScheduler', **said, 'variance_type': names[variance]}
    return {'_class_name': 'DDIMScheduler', **said, 'set_alpha_to_one': not sampler.get('to_first', False)}


def learned_only(learned: dict[str, Any], kind: str) -> dict[str, Any]:
    """Those of the keys that the class has."""
    return {key: value for key, value in learned.items() if key in DEFAULTS[kind]}


def same(ours: Any, theirs: Any) -> bool:
    """Whether a field of a config has a value, numbers but for rounding errors."""
    if isinstance(theirs, float) or (isinstance(theirs, tuple) and theirs and isinstance(theirs[0], float)):
        return ours is not None and np.shape(ours) == np.shape(theirs) and bool(np.allclose(ours, theirs, rtol=1e-9))
    return (tuple(ours) if isinstance(ours, list) else ours) == theirs


def candidates(section: dict[str, Any], learned: dict[str, Any], flow: bool) -> dict[str, dict[str, Any]]:
    """{class: keys} of schedulers that may sample as a section says: `sampler_fields` has the last word."""
    name, ramp = section['name'], section['ramp']
    kinds = {
        'euler': FLOWS[:1] if flow else ('EulerDiscreteScheduler',),
        'euler_ancestral': ('EulerAncestralDiscreteScheduler',),
        'heun': FLOWS[1:] if flow else ('HeunDiscreteScheduler',),
        'lms': ('LMSDiscreteScheduler',),
        'pndm': ('PNDMScheduler',),
        'unipc': ('UniPCMultistepScheduler',),
        'deis': ('DEISMultistepScheduler',),
        'lcm': ('LCMScheduler',),
        'consistency': FLOWS[:1] if flow else (),
    }
    solvers = {ours: theirs for theirs, ours in ALGORITHMS.items() if theirs != 'deis'}
    chosen = kinds.get(name, ())
    if name in solvers:
        chosen = ('DPMSolverMultistepScheduler',)
    elif name.removesuffix('_single') in solvers and name.endswith('_single'):
        chosen = ('DPMSolverSinglestepScheduler',)
    least, most = section['ramp_ends']
    spacings = {ours: theirs for theirs, ours in SPACINGS.items()} | {'linspace': 'linspace', 'distilled': 'leading'}
    lu = ramp == 'exponential' and section['rounding'] == 'nearest'
    keys = {
        **learned,
        'timestep_spacing': 'linspace' if flow else spacings.get(section['spacing'], ''),
        'steps_offset': section['offset'],
        'clip_sample': section['clip'],
        'use_karras_sigmas': ramp == 'karras',
        'use_exponential_sigmas': ramp == 'exponential' and not lu,
        'use_beta_sigmas': ramp == 'beta',
        'use_lu_lambdas': lu,
        'interpolation_type': 'log_linear' if ramp == 'log_linear' else 'linear',
        'sigma_min': least or None,
        'sigma_max': most or None,
        'final_sigmas_type': 'sigma_min' if section.get('to_first') and ramp != 'log_linear' else 'zero',
        'set_alpha_to_one': not section.get('to_first'),
        'skip_prk_steps': not section.get('runge_kutta'),
        'solver_order': section.get('order'),
        'lower_order_final': section.get('lower_order_final', True),
        'euler_at_final': section.get('euler_at_final'),
        'predict_x0': not section.get('noise'),
        'disable_corrector': list(section.get('uncorrected', ())),
        'original_inference_steps': section['grid'],
        'timestep_scaling': section.get('time_scale'),
        'stochastic_sampling': name == 'consistency',
        'use_flow_sigmas': flow,
        'flow_shift': section['shift'],
        'shift': section['shift'],
        'use_dynamic_shifting': bool(section['dynamic_shift']) and chosen == FLOWS[:1],
        'time_shift_type': section['dynamic_shift'] or 'exponential',
        **dict(zip(('base_shift', 'max_shift'), section['shift_range'], strict=True)),
        **dict(zip(('base_image_seq_len', 'max_image_seq_len'), section['token_range'], strict=True)),
    }
    if name in ('deis', 'unipc'):
        keys['solver_type'] = {'deis': 'logrho'}.get(name) or section['b']
        keys['algorithm_type'] = 'deis'
    else:
        keys |= {'solver_type': section.get('correction'), 'algorithm_type': solvers.get(name.removesuffix('_single'))}
    return dict.fromkeys(chosen, keys)
