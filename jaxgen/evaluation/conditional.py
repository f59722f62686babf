"""Conditional accuracy: whether samples show the attributes that they are conditioned on, by a classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxgen import data, sharding
from jaxgen.data.loader import OTHER
from jaxgen.data.splits import OWN
from jaxgen.errors import UserError
from jaxgen.metrics import features as networks

PREFIX = 'conditional_accuracy'


class Attributes(NamedTuple):
    """The attributes that samples are requested to show."""

    features: networks.Features  # of a classifier that predicts them
    mesh: Any
    of: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]  # conditions of samples -> {name: [n, ...]}
    captioned: tuple[int, ...] | None = None  # indices of the factors that captions state; None: all are requested

    def correct(self, images: np.ndarray, conditions: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
        """Whether the classifier's prediction for each image is the requested attribute, 0 or 1:
        {'conditional_accuracy': [b]}, for factors their mean and 'conditional_accuracy/0', ... of each.

        Captions state some factors only: then it is 'conditional_accuracy/I' of these, and
        'conditional_accuracy/caption', whether all of them are right.

        Args:
          images: uint8 [b, H, W, C].
          conditions: of these samples, {name: [b, ...]}; see conditions.provider.
          size: images at a time, a multiple of the number of devices.
        """
        correct: dict[str, list] = {}
        batch = {'image': images, **self.of(conditions)}
        for start in range(0, len(images), size):
            part = {name: x[start : start + size] for name, x in batch.items()}
            placed, n = sharding.put_padded(self.mesh, part, size)
            with sharding.use(self.mesh):
                values = networks.program(self.features.correct)(self.features.variables, placed)
            for name, x in values.items():
                correct.setdefault(name.replace('accuracy', PREFIX, 1), []).append(sharding.to_host(x)[:n])
        whole = {name: np.concatenate(parts) for name, parts in correct.items()}
        if self.captioned is None:
            return whole
        named = {name: whole[name] for name in (f'{PREFIX}/{i}' for i in self.captioned)}
        return {**named, f'{PREFIX}/caption': np.prod(list(named.values()), 0)}


def requested(family, section: dict, features: networks.Features, mesh) -> Attributes | None:
    """The attributes that samples of a family are conditioned on and that a classifier predicts: the label, or what is
    known of the test example whose caption, mask, edges, ... the sample gets. None where there are none.

    Args:
      section: the config's section `data`.
    """
    names, conditions = features.attributes, family.conditions
    if not names or not conditions:
        return None
    if 'label' in conditions and (names == ('label',) or 'caption' not in conditions):
        of_label = Attributes(features, mesh, lambda batch: {'label': batch['label']})
        return of_label if names == ('label',) else None
    # Of an image that is translated from another source the attributes are unknown, unless both have the same scenes.
    if OTHER in conditions and not data.same_test_scenes(section):
        return None
    section = section | {'features': ('image', *names), 'other': ''}
    elsewhere = section['test_source']  # it decides what captions state
    own = not elsewhere or elsewhere.startswith(OWN)
    try:
        spec = data.spec(section if own else section | {'source': elsewhere, 'test_source': ''})
    except UserError:  # the data have no such features
        return None
    captioned = spec.captioned if 'caption' in conditions and 'factors' in names else None
    if captioned == ():  # which factors the captions state is unknown
        return None
    source = data.dataset(section, 'test')

    def of_example(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        examples = source.take_cyclic(batch['index'])
        return {name: examples[name] for name in names}

    return Attributes(features, mesh, of_example, captioned)
