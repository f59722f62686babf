"""A multilayer perceptron from noise to numbers in one dimension."""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import Dense

Array = jax.Array

STEEPNESS = 8.0  # initial standard deviation of the first layer's weights


class Generator(nn.Module):
    """[n, latent] -> images float32 [n, 1, 1, 1] in (-1, 1)."""

    hidden: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array) -> Array:
        chex.assert_rank(z, 2)
        # Between modes the map is steep, and it is steep where many units are not saturated. With biases of 0 these
        # positions would all be z = 0; here they are all over the normal distribution.
        bends = self.param('bends', nn.initializers.normal(STEEPNESS), (self.hidden[0],))
        x = Dense(self.hidden[0], bias=False, init=nn.initializers.normal(STEEPNESS), dtype=self.dtype)(z)
        x = jnp.tanh(x + bends.astype(self.dtype))
        for features in self.hidden[1:]:
            x = nn.silu(Dense(features, dtype=self.dtype)(x))
        x = Dense(1, dtype=self.dtype)(x).astype(jnp.float32)
        return jnp.tanh(x)[:, :, None, None]
