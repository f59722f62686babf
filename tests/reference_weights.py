"""Weights by a fixed rule from their names, and what a source's own code makes of them.

`tests/weights/make_generators.py` runs that code once on weights of this rule and stores its results, with the names
and shapes of its state dict, in `tests/weights/generators/NAME.npz`: a test makes the same weights without the source.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

FOLDER = os.path.join(os.path.dirname(__file__), 'weights', 'generators')
Rule = tuple[str, float, float]  # (regular expression of names, mean, standard deviation)


def noise(key: str, shape: Sequence[int]) -> np.ndarray:
    """float32 numbers from N(0, 1), a function of `key` and `shape`."""
    return np.asarray(np.random.default_rng(zlib.crc32(key.encode())).standard_normal(tuple(shape), np.float32))


def gumbel(key: str, shape: Sequence[int]) -> np.ndarray:
    """float32 numbers of the Gumbel distribution: the index of the largest of logits plus these is a draw."""
    uniform = np.random.default_rng(zlib.crc32(key.encode())).uniform(1e-6, 1, tuple(shape))
    return -np.log(-np.log(uniform)).astype(np.float32)


def tensor(name: str, shape: Sequence[int], rules: Sequence[Rule] = ()) -> np.ndarray:
    """The weight of this name, float32: by the first rule that the name matches; else matrices and kernels of variance
    1 / fan-in, variances above 0, gains near 1 and the rest near 0, and none of them 0 or 1."""
    z = noise(name, shape)
    for pattern, mean, std in rules:
        if re.fullmatch(pattern, name):
            return np.asarray(np.float32(mean) + np.float32(std) * z)
    if name.endswith('var'):
        return np.asarray(np.float32(0.5) + z * z / 2)
    if sum(size > 1 for size in shape) > 1:
        return z / np.float32(np.sqrt(np.prod(shape[1:])))
    return np.asarray(np.float32(0.2) * z + np.float32(name.endswith(('weight', 'gain'))))


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a source's own code made of the weights of this rule.

    Attributes:
      shapes: of its state dict, by name in its order.
      rules: of its weights, see `tensor`.
      arrays: results by name; images [n, H, W, C].
      about: the source's revision and settings.
    """

    name: str
    shapes: dict[str, list[int]]
    rules: list[Rule]
    arrays: dict[str, np.ndarray]
    about: dict[str, Any]

    def state_dict(self, prefix: str = '') -> dict[str, np.ndarray]:
        """The weights whose names begin with `prefix`, without it."""
        return {
            name.removeprefix(prefix): tensor(name, shape, self.rules)
            for name, shape in self.shapes.items()
            if name.startswith(prefix)
        }


def load(name: str) -> Reference:
    """The stored results of this name."""
    with np.load(os.path.join(FOLDER, f'{name}.npz'), allow_pickle=False) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop('meta')))
    return Reference(name, meta['shapes'], [tuple(rule) for rule in meta['rules']], arrays, meta['about'])


def save(
    name: str, shapes: dict[str, list[int]], rules: Sequence[Rule], arrays: dict[str, np.ndarray], about: dict[str, Any]
) -> None:
    """Stores the results of a source's own code."""
    os.makedirs(FOLDER, exist_ok=True)
    meta = json.dumps({'shapes': shapes, 'rules': rules, 'about': about})
    np.savez_compressed(os.path.join(FOLDER, f'{name}.npz'), meta=np.array(meta), **arrays)
