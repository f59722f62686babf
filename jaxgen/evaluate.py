"""Measures a state on the test split: the family's own per-example figures, with standard errors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from jaxgen import sharding
from jaxgen.errors import RunError
from jaxgen.sample import to_inside


@functools.cache
def program(family):
    """The jitted evaluation of a family: -> {name: [n]}."""

    def evaluate(state, frozen, batch, seed):
        return family.evaluate(state, frozen, to_inside(batch), jax.random.key(seed))

    return jax.jit(evaluate)


def measure(
    family, state, frozen, mesh, source, n: int, size: int, seed: int, progress: Callable[[int], None]
) -> dict[str, dict]:
    """{name: {'mean', 'stderr', 'n'}} over the first n examples of `source` (0: all).

    The batch that the family gets holds 'index', the example's number, beside the data, so that
    random estimates depend on the example and the seed only.

    Raises:
      RunError: a figure is not finite; names it and the example.
    """
    n = min(n or len(source), len(source))
    size = sharding.round_up(mesh, min(size, n))
    found: dict[str, list] = {}
    for start in range(0, n, size):
        index = np.arange(start, min(start + size, n), dtype=np.int32)
        batch = {**source.take(index), 'index': index}
        placed, real = sharding.put_padded(mesh, batch, size)
        for name, values in program(family)(state, frozen, placed, seed).items():
            found.setdefault(name, []).append(sharding.to_host(values)[:real].astype(np.float64))
        progress(start + real)
    results = {}
    for name, parts in found.items():
        values = np.concatenate(parts)
        if not np.isfinite(values).all():
            raise RunError(f'{name} is not finite for example {int(np.argmin(np.isfinite(values)))} of the test split')
        stderr = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0
        results[name] = {'mean': float(values.mean()), 'stderr': stderr, 'n': n}
    return results
