"""Samples of a run from given noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import make_references as references
import numpy as np

from jaxgen import conditions, sample
from jaxgen.diffusion import samplers
from jaxgen.families import diffusion


def drawn(run, batch, monkeypatch, shape: tuple[int, ...], evaluations: int = 1) -> np.ndarray:
    """Images of a diffusion model from the noise of `make_references`, float32 [n, H, W, C].

    Args:
      shape: of what is diffused.
      evaluations: of the network in a step.
    """
    steps = jnp.stack([references.added(i, shape[-1], shape[0]) for i in range(references.STEPS + 1)])

    def added(keys, number, x):  # numbers fall to 0, or of two evaluations to 1
        return steps[references.STEPS - 1 - (number - evaluations + 1) // evaluations]

    monkeypatch.setattr(samplers, 'noise_of', added)
    monkeypatch.setattr(diffusion, 'normal', lambda keys, shape: jnp.asarray(references.start(shape[-1], shape[0])))
    family, settings = run.assembled.family, run.assembled.family.settings()
    draw = jax.jit(lambda state, frozen: family.sample(state, frozen, batch, jax.random.key(0), settings))
    return np.asarray(draw(run.state, run.assembled.frozen))


def edited(run, given, noise: np.ndarray, monkeypatch) -> np.ndarray:
    """Images of a run under conditions that a person gives, from this noise [n, ...], float32 [n, H, W, C]."""
    arrays = conditions.first(run.assembled, run.config, len(noise), given)
    batch = sample.to_inside({name: jnp.asarray(x) for name, x in arrays.items()})
    monkeypatch.setattr(diffusion, 'normal', lambda keys, shape: jnp.asarray(noise))
    family = run.assembled.family
    draw = jax.jit(lambda state, frozen: family.sample(state, frozen, batch, jax.random.key(0), family.settings()))
    return np.asarray(draw(run.state, run.assembled.frozen))
