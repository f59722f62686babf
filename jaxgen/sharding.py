"""One program for one device and for a pod: the mesh, and where every array lies on it.

Batches are cut over all devices. Weights, optimiser states, averages and frozen stages are cut
over the `fsdp` axis by one rule and copied over the `data` axis. XLA adds the communication;
no family mentions devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.extend import core
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgen.errors import UserError

# Smaller arrays cost more to gather than to keep.
SMALLEST_SHARDED = 2**12


def collides(jaxpr) -> bool:
    """Whether a jaxpr writes to several places at once that might be one: gradients of look-ups, of maxima over
    windows, and histograms do."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name.startswith('scatter'):
            rows = math.prod(eqn.invars[1].aval.shape[:-1])
            if rows > 1 and not eqn.params['unique_indices']:
                return True
        if name.startswith('select_and_scatter') or any(map(collides, core.jaxprs_in_params(eqn.params))):
            return True
    return False


def jit(function, **options):
    """jax.jit, on GPUs of a program that gives the same bits in every process.

    XLA for GPUs by default times the kernels that would do and takes the fastest, and some of those add in no fixed
    order: two starts of one training went apart (by 0.008 in a weight after 100 updates of ddpm_digits on an H100,
    by nothing with the option that is set here). Under that option XLA writes to places that might coincide one after
    another in a loop, so a program that does this is left as XLA makes it, and differs by rounding from start to start.
    """
    plain = jax.jit(function, **options)
    if jax.default_backend() != 'gpu':
        return plain
    options['compiler_options'] = {'xla_gpu_deterministic_ops': True, **(options.get('compiler_options') or {})}
    settled = jax.jit(function, **options)
    chosen: list[Callable] = []

    def call(*args):
        if not chosen:
            chosen.append(plain if collides(plain.trace(*args).jaxpr.jaxpr) else settled)
        return chosen[0](*args)

    return call


def make_mesh(fsdp: int, devices: list | None = None) -> Mesh:
    """Mesh of all devices with axes data x fsdp."""
    n = len(devices or jax.devices())
    if n % fsdp:
        raise UserError(f'config.mesh.fsdp = {fsdp} must divide the number of devices, {n}')
    auto = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((n // fsdp, fsdp), ('data', 'fsdp'), axis_types=auto, devices=devices)


def check_devices() -> None:
    """Raises UserError where JAX has no device to compute on."""
    try:
        jax.devices()
    except RuntimeError as e:
        raise UserError(f'JAX has no device to compute on: {" ".join(str(e).split())[:300]}') from e


def check_batch(mesh: Mesh, name: str, batch: int) -> None:
    """UserError unless the batch can be cut into equal parts, one per device."""
    if batch % mesh.size:
        raise UserError(
            f'{name} = {batch} must be a multiple of the number of devices, {mesh.size}: '
            f'try {max(batch // mesh.size, 1) * mesh.size}'
        )


def over_batch(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of a batch whose batch axis follows `leading` other axes."""
    return NamedSharding(mesh, P(*[None] * leading, ('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def over_weights(mesh: Mesh, tree):
    """Sharding of every leaf: the largest dimension that divides goes over fsdp, small leaves are copied."""
    size = mesh.shape['fsdp']

    def place(leaf) -> NamedSharding:
        fits = [d for d in range(leaf.ndim) if leaf.shape[d] % size == 0]
        if size == 1 or not fits or np.prod(leaf.shape) < SMALLEST_SHARDED:
            return replicated(mesh)
        axis = max(fits, key=lambda d: leaf.shape[d])
        return NamedSharding(mesh, P(*[None] * axis, 'fsdp'))

    return jax.tree.map(place, tree)


def put_batch(mesh: Mesh, batch: dict, leading: int = 0) -> dict:
    """Host arrays, this process's block of each batch, as arrays over the whole mesh."""
    sharding = over_batch(mesh, leading)
    return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()}


def round_up(mesh: Mesh, n: int) -> int:
    """The next multiple of the number of devices."""
    return -(-n // mesh.size) * mesh.size


def put_padded(mesh: Mesh, batch: dict, size: int) -> tuple[dict, int]:
    """A batch that every process holds whole, filled up to `size` with copies of its last example.

    Returns the arrays over the mesh and the number of real examples. One size means one compile.
    """
    real = len(next(iter(batch.values())))
    each = size // jax.process_count()
    mine = slice(jax.process_index() * each, (jax.process_index() + 1) * each)
    padded = {k: np.concatenate([v, np.repeat(v[-1:], size - real, 0)])[mine] for k, v in batch.items()}
    return put_batch(mesh, padded), real


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of an array that may lie on several hosts, on every host."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def barrier(name: str) -> None:
    """Waits for all hosts."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_host(flag: bool) -> bool:
    """True on every host if it is on one. All hosts must call it at the same place."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())
