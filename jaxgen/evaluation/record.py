"""How results were made: evaluation.json, and what stands beside samples and sheets."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

import jaxgen
from jaxgen import config as configs
from jaxgen import files, log, outputs, sharding
from jaxgen.metrics import features


def line(name: str, metric: dict) -> str:
    """A metric as it is printed: 'nll_elbo: 61.3 +- 0.8 (stderr), n = 359'."""
    deviation = next((f' +- {metric[key]:.4g} ({key})' for key in ('stderr', 'std') if key in metric), '')
    reference = f' against {metric["n_reference"]}' if 'n_reference' in metric else ''
    best = f'; latent {metric["latent"]} knows {metric["known"]:.4g}' if 'latent' in metric else ''
    return f'{name}: {metric["value"]:.6g}{deviation}, n = {metric["n"]}{reference}{best}'


def made(run, **settings) -> dict[str, Any]:
    """How outputs of a run are made, as JSON: step and weights, with their SHA-256, every field of config.model that
    may differ after training (samplers, guidance, likelihoods), and the `settings` of the call. All hosts must call it.
    """
    weights = features.digest((run.state.ema, run.state.extra, run.assembled.frozen))
    fields = configs.flat({'model': run.config.model.to_dict(), 'train': {'dtype': run.config.train.dtype}})
    free = ['train.dtype', *(f'model.{name}' for name in run.assembled.family.free)]
    used = {key: value for key, value in fields.items() if any(key == f or key.startswith(f'{f}.') for f in free)}
    used |= {key: value for key, value in run.changes().items() if key == 'data.size'}
    return {'step': run.step, 'weights': run.weights, **settings, 'weights_sha256': weights, 'config': used}


def surroundings() -> dict[str, Any]:
    """Versions and devices."""
    versions = {'jax': jax.__version__, 'jaxgen': jaxgen.__version__, 'numpy': np.__version__}
    return {'versions': versions, 'device': sharding.devices()}


def save(folder: str, record: dict, metrics: dict[str, dict]) -> None:
    """Writes evaluation.json, and results/NAME.json by what was evaluated and how, and prints the metrics.

    Args:
      record: what they depend on; 'step' and 'weights' where they are of a run.
    """
    if jax.process_index() != 0:
        return
    for name, metric in metrics.items():
        print(line(name, metric))
    whole = {**record, 'metrics': metrics, **surroundings()}
    kind = [f'step{record["step"]}', record['weights']] if 'step' in record else ['images']
    name = '_'.join([*kind, outputs.digest(record)])
    for path in (os.path.join('results', f'{name}.json'), 'evaluation.json'):
        files.save_json(os.path.join(folder, path), whole)
    log.say(f'written to {os.path.join(folder, "evaluation.json")} and results/{name}.json')
