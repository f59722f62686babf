"""evaluation.json: metrics, with all that they depend on."""

from __future__ import annotations

import os

import jax
import numpy as np

import jaxgen
from jaxgen import files, log, outputs


def line(name: str, metric: dict) -> str:
    """A metric as it is printed: 'nll_elbo: 61.3 +- 0.8 (stderr), n = 359'."""
    deviation = next((f' +- {metric[key]:.4g} ({key})' for key in ('stderr', 'std') if key in metric), '')
    reference = f' against {metric["n_reference"]}' if 'n_reference' in metric else ''
    best = f'; latent {metric["latent"]} knows {metric["known"]:.4g}' if 'latent' in metric else ''
    return f'{name}: {metric["value"]:.6g}{deviation}, n = {metric["n"]}{reference}{best}'


def devices() -> str:
    """Number and kind of the devices: '8 x NVIDIA H100'."""
    return f'{jax.device_count()} x {jax.devices()[0].device_kind}'


def save(folder: str, record: dict, metrics: dict[str, dict]) -> None:
    """Writes evaluation.json, and results/NAME.json by what was evaluated and how, and prints the metrics.

    Args:
      record: what they depend on; 'step' and 'weights' where they are of a run.
    """
    if jax.process_index() != 0:
        return
    for name, metric in metrics.items():
        print(line(name, metric))
    versions = {'jax': jax.__version__, 'jaxgen': jaxgen.__version__, 'numpy': np.__version__}
    whole = {**record, 'metrics': metrics, 'versions': versions, 'device': devices()}
    kind = [f'step{record["step"]}', record['weights']] if 'step' in record else ['images']
    name = '_'.join([*kind, outputs.digest(record)])
    for path in (os.path.join('results', f'{name}.json'), 'evaluation.json'):
        files.save_json(os.path.join(folder, path), whole)
    log.say(f'written to {os.path.join(folder, "evaluation.json")} and results/{name}.json')
