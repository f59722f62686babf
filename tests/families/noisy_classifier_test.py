"""The noisy classifier: its training images, and images of any process."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.config import DEFAULTS
from jaxgen.contract import Context
from jaxgen.diffusion.processes import PROCESSES
from jaxgen.errors import UserError
from jaxgen.families import noisy_classifier
from jaxgen.families.noisy_classifier import Model
from jaxgen.optim import make_optim

TINY = {'network': {'channels': 8, 'multipliers': (1, 2), 'blocks': 1, 'attention': (4,), 'head_channels': 4}}


def context(**changes):
    return Context((8, 8, 1), 10, make_optim(10, **DEFAULTS['optim']))._replace(**changes)


class Stub(nn.Module):
    """In the network's place: remembers its inputs."""

    inputs = []

    @nn.compact
    def __call__(self, x, t, *, train=False):
        self.inputs.append((x, t))
        return jnp.zeros((len(x), 10)) + self.param('w', nn.initializers.zeros, ())


def stubbed(monkeypatch, process):
    monkeypatch.setattr(noisy_classifier, 'Model', lambda process, _: Model(process, Stub()))
    return noisy_classifier.build(context(), **TINY, process=process)


@pytest.mark.parametrize('process', ['linear', 'cosine', 'vp', 've', 'flow'])
def test_images_of_any_process_are_scaled_to_its_own(process, monkeypatch):
    """x = image + sigma eps becomes alpha x at the step where sigma / alpha is this sigma."""
    family = stubbed(monkeypatch, process)
    state = family.init(jax.random.key(0), {}, {})
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    sigma = jnp.array([0.05, 0.5, 5.0])
    family.classify(state, {}, {'image': x, 'sigma': sigma}, jax.random.key(0))
    inputs, c_noise = Stub.inputs[-1]
    alpha = {'ve': jnp.ones(3), 'flow': 1 / (1 + sigma)}.get(process, 1 / jnp.sqrt(1 + sigma**2))
    np.testing.assert_allclose(inputs, alpha[:, None, None, None] * x, rtol=1e-3, atol=1e-5)
    assert (np.diff(c_noise) > 0).all()
    if process == 'linear':
        alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        np.testing.assert_allclose(np.interp(c_noise, np.arange(1000), alpha_bar), alpha**2, rtol=1e-2)
    # What is noisier than all training images comes as the last level.
    family.classify(state, {}, {'image': 1e6 * x, 'sigma': jnp.full(3, 1e6)}, jax.random.key(0))
    inputs, c_noise = Stub.inputs[-1]
    own = PROCESSES[process]()
    # A flow's last level is noise alone; sigma = 100, nearly it, stands for all that is noisier.
    end = 100 / 101 if process == 'flow' else own.end
    np.testing.assert_allclose(c_noise, own.c_noise(jnp.full(3, end, jnp.float32)), rtol=1e-3)
    np.testing.assert_allclose(inputs, own.at(np.array(float(own.end))).sigma * x, rtol=1e-2)
    # A clean image is the first level's.
    family.classify(state, {}, {'image': x}, jax.random.key(0))
    inputs, c_noise = Stub.inputs[-1]
    np.testing.assert_allclose(inputs, x, rtol=2e-4)
    assert np.isfinite(c_noise).all() and np.ptp(c_noise) == 0


def test_trains_on_all_levels(monkeypatch):
    family = stubbed(monkeypatch, {'name': 'linear', 'timesteps': 4, 'beta_start': 0.3, 'beta_end': 0.9})
    state = family.init(jax.random.key(0), {}, {})
    n = 4096
    x_0 = jnp.full((n, 8, 8, 1), 0.5)
    Stub.inputs.clear()
    _, logs = family.update(state, {}, {'image': x_0, 'label': jnp.arange(n) % 10}, jax.random.key(1))
    x_t, t = Stub.inputs[0]
    assert np.bincount(t).min() > n / 4 - 4 * np.sqrt(n * 3 / 16)
    alpha = np.sqrt(np.cumprod(1 - np.linspace(0.3, 0.9, 4)))
    for step in range(4):
        noisy = x_t[t == step]
        assert abs(noisy.mean() - 0.5 * alpha[step]) < 0.01 and abs(noisy.std() - np.sqrt(1 - alpha[step] ** 2)) < 0.01
    np.testing.assert_allclose(logs['loss'], np.log(10), rtol=1e-5)


def test_refuses_in_one_line():
    with pytest.raises(UserError, match='label'):
        noisy_classifier.build(context(classes=0), **TINY)
    with pytest.raises(UserError, match='process'):
        noisy_classifier.build(context(), **TINY, process='uniform')
    with pytest.raises(UserError, match='head_channels must be 1'):
        noisy_classifier.build(context(), network={**TINY['network'], 'head_channels': 0})
    with pytest.raises(UserError, match='beta_start: no such field'):
        noisy_classifier.build(context(), process={'name': 'cosine', 'beta_start': 0.1})
    with pytest.raises(UserError, match='multiple of 2'):
        noisy_classifier.build(context(image=(7, 7, 1)), **TINY)
    from jaxgen.families import classifier

    plain = classifier.build(context(), levels=1, width=8, features=8)
    state = jax.eval_shape(plain.init, jax.random.key(0), {'image': jnp.zeros((1, 8, 8, 1)), 'label': jnp.zeros(1)}, {})
    with pytest.raises(UserError, match='noisy_classifier'):
        plain.classify(state, {}, {'image': jnp.zeros((1, 8, 8, 1)), 'sigma': jnp.ones(1)}, None)


def test_an_image_of_a_chain_that_ends_in_noise_stands_for_all_noisier_ones(monkeypatch):
    """With zero terminal SNR alpha is 0 at the last level: sigma / alpha = 100 counts as it, as of a flow."""
    family = stubbed(monkeypatch, {'name': 'linear', 'zero_terminal': True})
    state = family.init(jax.random.key(0), {}, {})
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    family.classify(state, {}, {'image': x, 'sigma': jnp.array([1e3, 1e6])}, jax.random.key(0))
    inputs, c_noise = Stub.inputs[-1]
    assert c_noise[0] == c_noise[1]
    root = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    alpha = (root - root[-1]) * root[0] / (root[0] - root[-1])  # Lin et al. 2023, algorithm 1
    np.testing.assert_allclose(np.interp(c_noise[0], np.arange(1000), alpha), 1 / np.sqrt(1 + 100**2), rtol=1e-3)
    # x / sigma, at the standard deviation that the level at 100 has, sqrt(1 - alpha^2)
    np.testing.assert_allclose(inputs[0], x[0] / 1e3 * np.sqrt(1 - 1 / (1 + 100**2)), rtol=1e-2)
