"""Embeddings of class labels that are no table: a linear map of one-hot vectors, and one-hot vectors themselves."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import variance_scaling

Array = jax.Array


class OneHotLinear(nn.Module):
    """A linear map of one-hot vectors times sqrt(classes), as in score_sde's and EDM's networks: int32 [n] to
    [n, features]. A label outside [0, classes) is no class: its vector is zeros."""

    classes: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, label: Array) -> Array:
        one_hot = jax.nn.one_hot(label, self.classes, dtype=self.dtype) * math.sqrt(self.classes)
        kernel = self.param('kernel', variance_scaling(), (self.classes, self.features))
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        return one_hot @ kernel.astype(self.dtype) + bias.astype(self.dtype)


class OneHot(nn.Module):
    """One-hot vectors of classes, int32 [n] to float32 [n, classes]."""

    classes: int

    def __call__(self, label: Array) -> Array:
        return jax.nn.one_hot(label, self.classes)
