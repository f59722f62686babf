"""Embeddings of conditions: class labels by no table (a linear map of one-hot vectors, these themselves), texts, the
scale of guidance."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.embeddings import VectorEmbedding, cosines_first
from jaxgen.networks.layers import Dense, variance_scaling

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


class TextMaps(nn.Module):
    """Linear maps of a text's arrays to the widths that a network reads, for networks that have none of their own.

    Attributes:
      features: {'tokens' or 'pooled': width}, 0: as it is.
    """

    features: dict[str, int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, value: dict[str, Any]) -> dict[str, Any]:
        maps = {part: Dense(width, dtype=self.dtype, name=part) for part, width in self.features.items() if width}
        return {part: maps[part](x) if part in maps else x for part, x in value.items()}


class ScaleEmbedding(nn.Module):
    """A scale of guidance [n], embedded as time is: [n, features], zeros at first, so that a network that learns to
    read it begins as the one without it."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, scale: Array) -> Array:
        return VectorEmbedding(self.features, self.dtype, zeros=True, name='layers')(cosines_first(1000 * scale, 256))
