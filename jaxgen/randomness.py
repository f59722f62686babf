"""Random keys that cannot coincide: named streams, and keys and noise by example.

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


def stream_id(name: str) -> int:
    """The 32-bit integer of a name, 2^31 or more: the same in every process and version."""
    return zlib.crc32(name.encode()) | NAMED


def stream(rng: Array, name: str) -> Array:
    """The key of the stream `name` of `rng`: none of `split(rng, n)`, nor of `fold_in(rng, i)` for i below 2^31."""
    return jax.random.fold_in(rng, np.uint32(stream_id(name)))


def streams(rng: Array, *names: str) -> tuple[Array, ...]:
    """One key per name, in their order.

    Raises:
      ValueError: two of the names have the same key.
    """
    if len({stream_id(name) for name in names}) < len(names):
        raise ValueError(f'two of the streams {names} are one: rename one of them')
    return tuple(stream(rng, name) for name in names)


def example_keys(rng: Array, batch: Any) -> Array:
    """One key per example, [n], by its number `batch['index']`.

    So a sample is a function of the seed and its number, and not of the batch or the number of devices.
    """
    return jax.vmap(lambda i: jax.random.fold_in(rng, i))(batch['index'])


def normal(keys: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal noise [n, *shape], each example by its own key of keys [n]."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
