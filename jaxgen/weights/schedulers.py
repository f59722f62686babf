"""scheduler_config.json of diffusers for the process and the sampler of a run."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from jaxgen.errors import UserError
from jaxgen.weights.diffusers import PREDICTIONS, PROCESSES, SPACINGS, VARIANCES


def scheduler_config(config: ConfigDict) -> dict[str, Any]:
    """scheduler_config.json of a diffusion run: of DDPM where it draws by `ancestral`, else of DDIM.

    Raises:
      UserError: diffusers has no scheduler of this process.
    """
    process, sampler = config.model.process, config.model.sampler
    theirs = {ours: name for name, ours in PROCESSES.items()}
    prediction = {ours: name for name, ours in PREDICTIONS.items()}.get(config.model.training.prediction.name)
    if process.name not in (*theirs, 'listed') or prediction is None:
        raise UserError(
            f'diffusers has no pipeline of the process {process.name!r} with the prediction '
            f'{config.model.training.prediction.name!r}: name a file, --to=FILE.safetensors'
        )
    said: dict[str, Any] = {
        'prediction_type': prediction,
        'rescale_betas_zero_snr': process.zero_terminal,
        'clip_sample': sampler.clip,
        'timestep_spacing': {ours: name for name, ours in SPACINGS.items()}.get(sampler.spacing, 'leading'),
        'steps_offset': sampler.get('offset', 0),
    }
    if process.name == 'listed':
        said |= {'trained_betas': list(process.betas), 'num_train_timesteps': len(process.betas)}
    else:
        said |= {'beta_schedule': theirs[process.name], 'num_train_timesteps': process.timesteps}
    if 'beta_start' in process:
        said |= {'beta_start': process.beta_start, 'beta_end': process.beta_end}
    if sampler.name == 'ancestral':
        learned = config.model.training.variance.name == 'learned'
        variance = sampler.variance or ('learned' if learned else 'fixed_large')
        names = {ours: name for name, ours in VARIANCES.items() if not name.endswith('_log')} | {
            'learned': 'learned_range'
        }
        return {'_class_name': 'DDPMScheduler', **said, 'variance_type': names[variance]}
    return {'_class_name': 'DDIMScheduler', **said, 'set_alpha_to_one': not sampler.get('to_first', False)}
