"""Keys of randomness that cannot coincide: streams by name, and keys and noise by example.

JAX derives a key from another by an integer: `split(rng, n)[i]` and `fold_in(rng, i)` are one key, for every n. So one
key must not be both split and folded by small integers, nor drawn from and derived from. Where a function needs several
independent keys beside those by index (of examples, steps or layers), it takes named streams: their integers have the
highest of 32 bits set, which no index has.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import numpy as np

Array = jax.Array

NAMED = 0x80000000  # the bit that tells names from indices, which are below it


def number(name: str) -> int:
    """The 32-bit integer of a name, 2^31 or more: the same in every process and version."""
    return zlib.crc32(name.encode()) | NAMED


def stream(rng: Array, name: str) -> Array:
    """The key of the stream `name` of `rng`: none of `split(rng, n)`, nor of `fold_in(rng, i)` for i below 2^31."""
    return jax.random.fold_in(rng, np.uint32(number(name)))


def streams(rng: Array, *names: str) -> tuple[Array, ...]:
    """One key per name, in their order.

    Raises:
      ValueError: two of the names share a key.
    """
    if len({number(name) for name in names}) < len(names):
        raise ValueError(f'two of the streams {names} are one: rename one of them')
    return tuple(stream(rng, name) for name in names)


def example_keys(rng: Array, batch: Any) -> Array:
    """One key per sample, [n], by the sample's number `batch['index']`.

    What a sample looks like then depends on the seed and its number only, not on how many are
    drawn at once or on how many devices.
    """
    return jax.vmap(lambda i: jax.random.fold_in(rng, i))(batch['index'])


def normal(keys: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal noise [n, *shape] from keys [n], each example from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
