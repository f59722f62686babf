"""A bound model: the functions of a family, the weights that they read, and the devices that these lie on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgen import sharding
from jaxgen.contract import Family, Frozen, State


class BoundModel(NamedTuple):
    """A family with its weights, those of its stages, and its devices: what sampling and evaluation need."""

    family: Family
    state: State  # `ema` and `extra` suffice for most families
    frozen: Frozen
    mesh: jax.sharding.Mesh

    def batch_size(self, batch: int, n: int) -> int:
        """Size of the batches in which n examples are processed: at most n, rounded up to a multiple of the devices."""
        return sharding.round_up(self.mesh, max(min(batch, n), 1))

    def apply(self, program: Callable, arrays: dict[str, np.ndarray], size: int, *more) -> Any:
        """Outputs of a jitted program, a tree of host arrays [n, ...], for host arrays [n, ...] with n <= size.

        Args:
          program: (state, frozen, batch, *more) -> tree of arrays [size, ...].
          size: what the batch is padded to, a multiple of the number of devices: one size means one compile.
        """
        placed, n = sharding.put_padded(self.mesh, arrays, size)
        with sharding.use(self.mesh):
            outputs = program(self.state, self.frozen, placed, *more)
        return jax.tree.map(lambda x: sharding.to_host(x)[:n], outputs)
