"""The noisy classifier: what it is shown, and images of any process."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.config import DEFAULTS
from jaxgen.contract import Context
from jaxgen.errors import UserError
from jaxgen.families import noisy_classifier
from jaxgen.optim import make_optim

TINY = {'adm': {'channels': 8, 'multipliers': (1, 2), 'blocks': 1, 'attention': (4,), 'head_channels': 4}}


def context(**changes):
    return Context((8, 8, 1), 10, make_optim(10, **DEFAULTS['optim']))._replace(**changes)


class Stub(nn.Module):
    """In the network's place: remembers what it was shown."""

    seen = []

    @nn.compact
    def __call__(self, x, t, *, train=False):
        self.seen.append((x, t))
        return jnp.zeros((len(x), 10)) + self.param('w', nn.initializers.zeros, ())


@pytest.mark.parametrize('process', ['linear', 'cosine', 'vp', 've', 'flow'])
def test_sees_images_of_any_process_as_its_own(process, monkeypatch):
    """x = image + sigma eps becomes alpha x at the step where sigma / alpha is this sigma."""
    monkeypatch.setattr(noisy_classifier, 'ADMClassifier', lambda **_: Stub())
    family = noisy_classifier.build(context(), **TINY, process=process)
    state = family.init(jax.random.key(0), {}, {})
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    sigma = jnp.array([0.05, 0.5, 5.0])
    family.classify(state, {}, {'image': x, 'sigma': sigma}, jax.random.key(0))
    seen, told = Stub.seen[-1]
    alpha = {'ve': jnp.ones(3), 'flow': 1 / (1 + sigma)}.get(process, 1 / jnp.sqrt(1 + sigma**2))
    np.testing.assert_allclose(seen, alpha[:, None, None, None] * x, rtol=1e-3, atol=1e-5)
    assert (np.diff(told) > 0).all()
    if process == 'linear':
        alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        np.testing.assert_allclose(np.interp(told, np.arange(1000), alpha_bar), alpha**2, rtol=1e-2)
    # What is noisier than anything it was shown comes as the last level.
    family.classify(state, {}, {'image': 1e6 * x, 'sigma': jnp.full(3, 1e6)}, jax.random.key(0))
    seen, told = Stub.seen[-1]
    way = noisy_classifier.processes.make(process)
    # A flow's last level is noise alone; sigma = 100, nearly it, stands for all that is noisier.
    end = 100 / 101 if process == 'flow' else way.end
    np.testing.assert_allclose(told, way.told(jnp.full(3, end, jnp.float32)), rtol=1e-3)
    np.testing.assert_allclose(seen, way.at(np.array(float(way.end))).sigma * x, rtol=1e-2)
    # A clean image is the first level's.
    family.classify(state, {}, {'image': x}, jax.random.key(0))
    seen, told = Stub.seen[-1]
    np.testing.assert_allclose(seen, x, rtol=2e-4)
    assert np.isfinite(told).all() and np.ptp(told) == 0


def test_trains_on_all_levels(monkeypatch):
    monkeypatch.setattr(noisy_classifier, 'ADMClassifier', lambda **_: Stub())
    family = noisy_classifier.build(context(), **TINY, timesteps=4, beta_start=0.3, beta_end=0.9)
    state = family.init(jax.random.key(0), {}, {})
    n = 4096
    x_0 = jnp.full((n, 8, 8, 1), 0.5)
    Stub.seen.clear()
    _, logs = family.update(state, {}, {'image': x_0, 'label': jnp.arange(n) % 10}, jax.random.key(1))
    x_t, t = Stub.seen[0]
    assert np.bincount(t).min() > n / 4 - 4 * np.sqrt(n * 3 / 16)
    alpha = np.sqrt(np.cumprod(1 - np.linspace(0.3, 0.9, 4)))
    for step in range(4):
        shown = x_t[t == step]
        assert abs(shown.mean() - 0.5 * alpha[step]) < 0.01 and abs(shown.std() - np.sqrt(1 - alpha[step] ** 2)) < 0.01
    np.testing.assert_allclose(logs['loss'], np.log(10), rtol=1e-5)


def test_refuses_in_one_line():
    with pytest.raises(UserError, match='label'):
        noisy_classifier.build(context(classes=0), **TINY)
    with pytest.raises(UserError, match='process'):
        noisy_classifier.build(context(), **TINY, process='uniform')
    with pytest.raises(UserError, match='head_channels must be 1'):
        noisy_classifier.build(context(), adm={**TINY['adm'], 'head_channels': 0})
    with pytest.raises(UserError, match='multiple of 2'):
        noisy_classifier.build(context(image=(7, 7, 1)), **TINY)
    from jaxgen.families import classifier

    plain = classifier.build(context(), levels=1, width=8, features=8)
    state = jax.eval_shape(plain.init, jax.random.key(0), {'image': jnp.zeros((1, 8, 8, 1)), 'label': jnp.zeros(1)}, {})
    with pytest.raises(UserError, match='noisy_classifier'):
        plain.classify(state, {}, {'image': jnp.zeros((1, 8, 8, 1)), 'sigma': jnp.ones(1)}, None)
