"""Fields of runs that were saved before `config.model` had sections, as the sections that hold them now."""

from __future__ import annotations

from typing import Any

from jaxgen.diffusion.processes import CHAINS

MODULES = ('unet', 'adm', 'ncsnpp', 'dit', 'refinenet')
# {section: {former field: its name in the section now}}; of each section only those that its component has are kept.
PROCESS = {
    **dict.fromkeys(
        ('linear', 'cosine'), ('timesteps', 'beta_start', 'beta_end', 'zero_terminal', 'rescale_timesteps')
    ),
    'geometric': ('timesteps', 'sigma_min', 'sigma_max'),
    **dict.fromkeys(('vp', 'sub_vp'), ('beta_start', 'beta_end')),
    've': ('sigma_min', 'sigma_max'),
    'flow': (),
}
SAMPLER = {
    'ancestral': {'variance': 'variance'},
    'ddim': {'eta': 'eta'},
    'euler_ancestral': {'eta': 'eta'},
    'heun': {name: name for name in ('s_churn', 's_min', 's_max', 's_noise')},
    'euler_maruyama': {'strength': 'strength', 'last_step': 'last_step'},
    'predictor_corrector': {name: name for name in ('predictor', 'corrector_steps', 'snr')},
    'annealed_langevin': {name: name for name in ('langevin_steps', 'langevin_size', 'final_denoising')},
}
VISITS = {'sample_steps': 'steps', 'spacing': 'spacing', 'shift': 'shift', 'clip': 'clip'}
GUIDANCE = {
    'guidance': 'scale',
    'guidance_from': 'low',
    'guidance_to': 'high',
    'guidance_rescale': 'rescale',
    'guidance_channels': 'channels',
    'classifier_scale': 'classifier_scale',
}

VDM_NETWORK = ('channels', 'blocks', 'fourier', 'attention', 'dropout', 'groups', 'group_size', 'eps')
DDGAN = {
    'process': {name: name for name in ('timesteps', 'beta_min', 'beta_max')},
    'generator': {
        name: name
        for name in (
            *('latent', 'style', 'mapping_layers', 'channels', 'multipliers', 'blocks', 'attention'),
            *('resampling', 'pyramid', 'dropout'),
        )
    },
    'discriminator': {f'discriminator_{name}': name for name in ('channels', 'multipliers', 'full', 'embedding')},
}

# {family: {former field of config.model: where its meaning is now}}, for the message that refuses the former name.
OF_PROCESS = {
    name: f'process.{name}'
    for name in ('timesteps', 'beta_start', 'beta_end', 'sigma_min', 'sigma_max', 'zero_terminal', 'rescale_timesteps')
}
MOVED = {
    'diffusion': {
        **OF_PROCESS,
        'time_mean': 'training.times.mean',
        'time_std': 'training.times.std',
        **dict.fromkeys(MODULES, 'network'),
        **{name: f'training.{name}' for name in ('prediction', 'times', 'weighting', 'variance', 'augmentation')},
        'data_std': 'training.prediction.data_std',
        'gamma': 'training.weighting.gamma',
        'bound_weight': 'training.variance.bound_weight',
        'conditional': 'conditioning.label',
        'label_dropout': 'conditioning.label.dropout',
        'upsampling': 'conditioning.low_resolution',
        **{old: f'sampler.{new}' for names in (VISITS, *SAMPLER.values()) for old, new in names.items()},
        'variance': 'training.variance, config.model.sampler.variance',
        **{old: f'guidance.{new}' for old, new in GUIDANCE.items() if old != 'guidance'},
        'bound_steps': 'likelihood.steps',
        'ode_steps': 'likelihood.steps',
    },
    'consistency': {
        **dict.fromkeys(MODULES, 'network'),
        'conditional': 'conditioning.label',
        **{name: f'discretisation.{name}' for name in ('start_scales', 'end_scales', 'total_steps')},
        'time_mean': 'times.mean',
        'time_std': 'times.std',
        'huber': 'distance.huber',
        'lpips': 'distance.lpips',
        'target_decay': 'target.decay',
        'adapt_decay': 'target.adaptive',
        'solver': 'teacher.solver',
        'init_from_teacher': 'teacher.initialise',
        'sample_steps': 'sampler.steps',
        'levels': 'sampler.levels',
        'clip': 'sampler.clip',
    },
    'noisy_classifier': {**OF_PROCESS, 'adm': 'network'},
    'vdm': {
        **{name: f'network.{name}' for name in VDM_NETWORK},
        'conditional': 'conditioning.label',
        'gamma_min': 'schedule.gamma_min',
        'gamma_max': 'schedule.gamma_max',
        'schedule_loss': 'schedule.loss',
        'sample_steps': 'sampler.steps',
        'bound_times': 'likelihood.times',
    },
    'ddgan': {old: f'{section}.{new}' for section, names in DDGAN.items() for old, new in names.items()},
}


def is_flat(model: dict) -> bool:
    """Whether the fields are those of a run without sections."""
    return isinstance(model.get('network', ''), str) and any(name in model for name in (*MODULES, 'timesteps'))


def network(model: dict) -> dict[str, Any]:
    """The section of the network."""
    name = model.get('network', 'unet')
    own = dict(model.get(name, {}))
    own.pop('levels', None)  # RefineNet's are the process's
    return {'name': name, **own}


def process(model: dict) -> dict[str, Any]:
    """The section of the process."""
    name = model.get('process', 'linear')
    return {'name': name, **{k: model[k] for k in PROCESS[name] if k in model and (name, k[:5]) != ('cosine', 'beta_')}}


def renamed(model: dict, names: dict[str, str]) -> dict[str, Any]:
    """{new name: value} of the former fields that are there."""
    return {new: model[old] for old, new in names.items() if old in model}


def diffusion(model: dict) -> dict[str, Any]:
    """Sections of a diffusion run from its former fields; what has sections already is returned as it is."""
    return diffusion_sections(model) if is_flat(model) else model


def diffusion_sections(model: dict) -> dict[str, Any]:
    """Sections of a diffusion model from its former fields."""
    times, weighting, prediction = (
        model.get('times', 'uniform'),
        model.get('weighting', 'none'),
        model.get('prediction'),
    )
    learned, sampler = model.get('variance') == 'learned', model.get('sampler', 'ancestral')
    if model.get('variance') in ('learned', 'fixed_large'):  # '' is the one of them that fits the network's output
        model = {**model, 'variance': ''}
    chain = model.get('process', 'linear') in CHAINS
    training: dict[str, Any] = {
        'prediction': {'name': prediction or 'eps'},
        'times': {'name': times},
        'weighting': {'name': weighting},
        'variance': {'name': 'learned' if learned else 'fixed'},
        **renamed(model, {'augmentation': 'augmentation'}),
    }
    if prediction == 'edm':
        training['prediction'] |= renamed(model, {'data_std': 'data_std'})
    if times in ('lognormal', 'logit_normal'):
        given = {k: v for k, v in model.items() if v is not None}
        training['times'] |= renamed(given, {'time_mean': 'mean', 'time_std': 'std'})
    if weighting == 'min_snr':
        training['weighting'] |= renamed(model, {'gamma': 'gamma'})
    if learned:
        training['variance'] |= renamed(model, {'bound_weight': 'bound_weight'})
    conditioning: dict[str, Any] = {}
    if model.get('conditional'):
        conditioning['label'] = {'kind': 'class', **renamed(model, {'label_dropout': 'dropout'})}
    if model.get('upsampling'):
        conditioning['low_resolution'] = {'kind': 'image'}
    likelihood = renamed(model, {'bound_steps': 'steps', 'variance': 'variance'} if chain else {'ode_steps': 'steps'})
    return {
        'process': process(model),
        'network': network(model),
        'training': training,
        'conditioning': conditioning,
        'sampler': {'name': sampler, **renamed(model, VISITS), **renamed(model, SAMPLER.get(sampler, {}))},
        'guidance': renamed(model, GUIDANCE),
        'likelihood': likelihood,
        **renamed(model, {'latent_scale': 'latent_scale'}),
    }


def conditional(model: dict) -> dict[str, Any]:
    """The section of conditions of a model with the field `conditional`."""
    return {'label': {'kind': 'class'}} if model.get('conditional') else {}


# {discretisation: (start_scales, end_scales) of its paper}, where a run had None.
SCALES = {'doubling': (10, 1280), 'sqrt': (2, 150), 'constant': (17, 17)}


def consistency(model: dict) -> dict[str, Any]:
    """Sections of a consistency model from its former fields; what has sections is returned as it is."""
    if 'sample_steps' not in model:
        return model
    discretisation, distance, times = (
        model.get('discretisation', 'doubling'),
        model.get('distance', 'pseudo_huber'),
        model.get('times', 'lognormal'),
    )
    start, end = SCALES[discretisation]
    end = end if model.get('end_scales') is None else model['end_scales']
    start = min(start, end) if model.get('start_scales') is None else model['start_scales']
    decay, adaptive, scales = model.get('target_decay', 0.0), model.get('adapt_decay', False), {'end_scales': end}
    if discretisation == 'constant':
        decay, adaptive = decay ** (start / end) if adaptive else decay, False
    else:
        scales |= {'start_scales': start, **renamed(model, {'total_steps': 'total_steps'})}
    average = {'name': 'average', 'decay': decay, 'adaptive': adaptive}
    own = {'pseudo_huber': {'huber': 'huber'}, 'perceptual': {'lpips': 'lpips'}}.get(distance, {})
    drawn = {'time_mean': 'mean', 'time_std': 'std'} if times == 'lognormal' else {}
    return {
        'network': network(model),
        'conditioning': conditional(model),
        **{name: model[name] for name in ('sigma_min', 'sigma_max', 'data_std', 'weighting') if name in model},
        'discretisation': {'name': discretisation, **scales},
        'times': {'name': times, **renamed(model, drawn)},
        'distance': {'name': distance, **renamed(model, own)},
        'target': average if decay else {'name': 'weights'},
        'teacher': renamed(model, {'solver': 'solver', 'init_from_teacher': 'initialise'}),
        'sampler': renamed(model, {'sample_steps': 'steps', 'levels': 'levels', 'clip': 'clip'}),
    }


def noisy_classifier(model: dict) -> dict[str, Any]:
    """Sections of a noisy classifier from its former fields; what has sections is returned as it is."""
    if 'adm' not in model:
        return model
    # `heads` was never read: head_channels was 1 or more.
    return {'process': process(model), 'network': {k: v for k, v in model['adm'].items() if k != 'heads'}}


def vdm(model: dict) -> dict[str, Any]:
    """Sections of a variational diffusion model from its former fields; what has sections is returned as it is."""
    if 'channels' not in model:
        return model
    kind = model.get('schedule', 'scalar')
    own = {'schedule_loss': 'loss'} if kind == 'network' else {}
    return {
        'network': {name: model[name] for name in VDM_NETWORK if name in model},
        'conditioning': conditional(model),
        'schedule': {
            'name': kind,
            **renamed(model, {'gamma_min': 'gamma_min', 'gamma_max': 'gamma_max', **own}),
        },
        **renamed(model, {'timesteps': 'timesteps'}),
        'sampler': renamed(model, {'sample_steps': 'steps'}),
        'likelihood': renamed(model, {'bound_times': 'times'}),
    }


def ddgan(model: dict) -> dict[str, Any]:
    """Sections of a denoising diffusion GAN from its former fields; what has sections is returned as it is."""
    if 'channels' not in model:
        return model
    return {
        **{section: renamed(model, names) for section, names in DDGAN.items()},
        **renamed(model, {'r1': 'r1', 'r1_every': 'r1_every'}),
    }
