"""Embeddings of real numbers, times above all, that a network is conditioned on."""

from __future__ import annotations

import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import Dense

Array = jax.Array


def sinusoidal(t: Array, features: int, longest: float = 10_000.0) -> Array:
    """Sines, then cosines, of t at frequencies from 1 down to 1 / longest: float32 [n, features].

    The frequencies are longest ** (-i / (features / 2 - 1)), so that the last one is 1 / longest
    exactly (DDPM, score_sde and VDM; for others see `cosines_first`).

    Args:
      t: [n], integer or real; the unit is a step of a schedule with about 1000 of them.
      features: an even number, at least 4.
    """
    chex.assert_rank(t, 1)
    half = features // 2
    frequencies = jnp.exp(jnp.arange(half) * (-math.log(longest) / (half - 1)))
    angles = t.astype(jnp.float32)[:, None] * frequencies  # [n, features / 2]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def cosines_first(t: Array, features: int, longest: float = 10_000.0, freq_shift: int = 0) -> Array:
    """Cosines, then sines, of t at frequencies longest ** (-i / (features / 2 - freq_shift)): float32 [n, features].

    The form of Improved DDPM, ADM, DiT, Stable Diffusion and FLUX. The last frequency is one step
    above 1 / longest.

    Args:
      t: [n], integer or real; the unit is a step of a schedule with about 1000 of them.
      features: an even number.
      freq_shift: 1: the last frequency is 1 / longest, as in `sinusoidal`; `downscale_freq_shift` of diffusers.
    """
    chex.assert_rank(t, 1)
    half = features // 2
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(jnp.arange(half) * (-math.log(longest) / (half - freq_shift)))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class VectorEmbedding(nn.Module):
    """A vector [n, d] by two layers to [n, features]: of pooled texts, times, sizes.

    Attributes:
      zeros: at first the embedding is zeros.
    """

    features: int
    dtype: Any = jnp.float32
    zeros: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = Dense(self.features, dtype=self.dtype, name='linear1')(x.astype(self.dtype))
        init = nn.initializers.zeros if self.zeros else None
        return Dense(self.features, init=init, dtype=self.dtype, name='linear2')(nn.silu(h))
