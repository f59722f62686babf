"""Images of imported weights against those that the published code draws from one noise, see make_references.py."""

from __future__ import annotations

import os

import jax.numpy as jnp
import make_references as references
import numpy as np
import pytest
import safetensors.numpy
from drawing import drawn

import jaxgen
from jaxgen import config as configs
from jaxgen.weights.importing import import_weights

ANCESTRAL = ['model.sampler.spacing=respaced', 'model.sampler.unit_start=True']
DDIM = ['model.sampler=ddim', 'model.sampler.spacing=uniform', 'model.sampler.unit_start=True']
GUIDED = ['model.guidance.classifier_scale=20.0']
# {case: fields of the config beside those of NAMES}
FIELDS = {
    'ADM, ancestral': ANCESTRAL,
    'ADM, ddim': DDIM,
    'ADM, classifier': [*ANCESTRAL, *GUIDED],
    'ADM, classifier, ddim': [*DDIM, *GUIDED],
    'upsampler': ANCESTRAL,
    'IDDPM, cosine of 4000': ANCESTRAL,
    'IDDPM, fixed variance': [*ANCESTRAL, 'model.process.timesteps=1000'],
    'EDM, DDPM++': [],
    'EDM, ADM with churn': [
        f'model.sampler.{field}' for field in ('s_churn=4.0', 's_min=0.05', 's_max=50.0', 's_noise=1.003')
    ],
    'DiT': [*ANCESTRAL, 'data.size=16', 'model.guidance.scale=2.5'],
    'SiT, Euler': ['model.sampler=euler', 'model.guidance.scale=2.0', 'model.guidance.channels=3'],
    'SiT, SDE': ['model.guidance.scale=2.0', 'model.guidance.channels=3', 'model.sampler.last_step=0.04'],
}
STAGES = {'ADM classifier': 'classifier', 'KL autoencoder of diffusers': 'first'}


def imported(tmp_path, network: str, fields: list[str], stages: dict[str, str]) -> str:
    """The run of a network with the weights of the rule, imported from a file of its source's names."""
    one = references.NAMES[network]
    config = configs.load(one['config'])
    lines = [*one['overrides'], *fields, *(f'stages.{name}={run}' for name, run in stages.items())]
    config = configs.override(config, [f'--config.{line}' for line in lines])
    file, run = tmp_path / f'{network}.safetensors', str(tmp_path / network.replace(',', '').replace(' ', '_'))
    safetensors.numpy.save_file(references.weights(network), file)
    names = 'guided_new_order' if network in ('ADM', 'ADM upsampler') else one['source']
    import_weights(config, str(file), run, 'guided' if network == 'ADM upsampler' else names)
    return run


@pytest.mark.parametrize(
    'case', [case if 'SiT' in case else pytest.param(case, marks=pytest.mark.slow) for case in references.CASES]
)
def test_images_are_those_of_the_published_code(tmp_path, monkeypatch, case):
    expected = np.load(os.path.join(references.FOLDER, 'references.npz'))[case] / references.SCALE
    network, *others = references.CASES[case]
    others = ['KL autoencoder of diffusers'] if case == 'DiT' else others
    stages = {STAGES[other]: imported(tmp_path, other, [], {}) for other in others}
    fields = [*FIELDS[case], f'model.sampler.steps={references.STEPS}']
    run = jaxgen.load(imported(tmp_path, network, fields, stages))
    shape = (8, 8, 4) if case == 'DiT' else expected.shape[1:]
    batch = {'index': jnp.arange(references.IMAGES), 'label': jnp.array(references.LABELS)}
    if network == 'ADM upsampler':
        batch['low_resolution'] = jnp.asarray(references.low_resolution())
    ours = drawn(run, batch, monkeypatch, shape, evaluations=2 if 'churn' in case else 1)
    assert 0.3 < expected.std() < 1
    np.testing.assert_allclose(ours, expected, atol=1e-3)
