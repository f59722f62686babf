"""A diffusion network with embeddings of class labels and of augmentation labels, as published networks have them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxgen.diffusion import conditioning as conditions
from jaxgen.diffusion.conditioning import Condition
from jaxgen.networks import denoisers
from jaxgen.networks.layers import Dense


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A module whose `init` and `apply` take label int32 [n] and augment float32 [n, augment] after x and t."""

    module: Any
    classes: int = 0
    augment: int = 0

    def __getattr__(self, name):
        return getattr(self.module, name)

    def conditioning(self) -> conditions.Conditioning:
        out = []
        if self.classes:
            embedding = self.module.class_embedding(self.classes)
            out.append(Condition('label', 'vector', embedding, conditions.same, jnp.zeros_like, 0.0))
        if self.augment:
            dense = Dense(self.module.vector_features, bias=False, dtype=self.module.dtype)
            out.append(Condition('augment', 'vector', dense, conditions.same, jnp.zeros_like, 0.0))
        return tuple(out)

    def values(self, x, label, augment):
        augment = jnp.zeros((len(x), self.augment)) if augment is None else augment
        given = {'label': label, 'augment': augment}
        return {condition.name: given[condition.name] for condition in self.conditioning()}

    def init(self, rng, x, t, label=None, augment=None, *, train=False):
        network = denoisers.bind(self.module, self.conditioning())
        return {'params': network.init(rng, jnp.asarray(x), self.values(x, label, augment))}

    def apply(self, variables, x, t, label=None, augment=None, *, train=False, rngs=None):
        conditioning, params = self.conditioning(), variables['params']
        embeddings = conditions.embed(conditioning, params, self.values(x, label, augment), x)
        return denoisers.bind(self.module, conditioning).apply(params, x, t, embeddings, train=train, rngs=rngs)


def labelled(network, *args, classes: int = 0, augment: int = 0, **attributes) -> Labelled:
    """The network of these attributes, conditioned on so many classes and augmentation labels."""
    return Labelled(network(*args, **attributes), classes, augment)
