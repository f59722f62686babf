"""Embeddings of numbers that a network is conditioned on."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def sinusoidal(t: Array, features: int, longest: float = 10_000.0) -> Array:
    """Sines, then cosines, of t at frequencies from 1 down to 1 / longest: float32 [n, features].

    The frequencies are longest ** (-i / (features / 2 - 1)), so that the last one is 1 / longest
    exactly (DDPM, score_sde and VDM; others divide by features / 2, or put the cosines first).

    Args:
      t: [n], integer or real; the unit is a step of a schedule with about 1000 of them.
      features: an even number, at least 4.
    """
    half = features // 2
    frequencies = jnp.exp(jnp.arange(half) * (-math.log(longest) / (half - 1)))
    angles = t.astype(jnp.float32)[:, None] * frequencies  # [n, features / 2]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
