"""One program for one device and for a pod: the mesh, and the sharding of every array on it.

Batches are sharded over all devices. Weights, optimiser states, averages and frozen stages are sharded over the `fsdp`
axis by one rule and replicated over the `data` axis. XLA adds the communication; no family mentions devices.
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

# Smaller arrays are replicated: gathering them would cost more than their memory.
SMALLEST_SHARDED = 2**12


def overlaps(eqn) -> bool:
    """Whether an equation may write several numbers to one index at once: gradients of look-ups and of maxima over
    windows do, and histograms."""
    name = eqn.primitive.name
    if name.startswith('scatter'):
        return math.prod(eqn.invars[1].aval.shape[:-1]) > 1 and not eqn.params['unique_indices']
    return name.startswith('select_and_scatter')


def overlapping_writes(jaxpr) -> bool:
    """Whether an equation of a jaxpr `overlaps`, in loops and calls too."""
    return any(overlaps(eqn) or any(map(overlapping_writes, core.jaxprs_in_params(eqn.params))) for eqn in jaxpr.eqns)


def jit(function, **options):
    """jax.jit with results that are the same, bit for bit, in every process, also on GPUs.

    XLA for GPUs by default chooses the fastest of several kernels by their measured times, and some of them add in no
    fixed order: two starts of one training diverged (by 0.008 in a weight after 100 updates of ddpm_digits on an H100,
    by nothing with the option that is set here). Under that option XLA makes slow loops of writes that may overlap, so
    a program with any is compiled without it, and differs by rounding from start to start.
    """
    plain = jax.jit(function, **options)
    if jax.default_backend() != 'gpu':
        return plain
    options['compiler_options'] = {'xla_gpu_deterministic_ops': True, **(options.get('compiler_options') or {})}
    deterministic = jax.jit(function, **options)
    chosen: list[Callable] = []

    def call(*args):
        if not chosen:
            chosen.append(plain if overlapping_writes(plain.trace(*args).jaxpr.jaxpr) else deterministic)
        return chosen[0](*args)

    return call


def make_mesh(fsdp: int, devices: list | None = None) -> Mesh:
    """Mesh of all devices with axes data x fsdp."""
    n = len(devices or jax.devices())
    if n % fsdp:
        raise UserError(f'config.mesh.fsdp = {fsdp} must divide the number of devices, {n}')
    auto = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((n // fsdp, fsdp), ('data', 'fsdp'), axis_types=auto, devices=devices)


def devices() -> str:
    """Number and kind of the devices: '8 x NVIDIA H100'."""
    return f'{jax.device_count()} x {jax.devices()[0].device_kind}'


def check_devices() -> None:
    """Raises UserError where JAX has no device to compute on."""
    try:
        jax.devices()
    except RuntimeError as e:
        raise UserError(f'JAX has no device to compute on: {" ".join(str(e).split())[:300]}') from e


def check_batch(mesh: Mesh, name: str, batch: int) -> None:
    """Raises UserError unless the batch can be cut into equal parts, one per device."""
    if batch % mesh.size:
        raise UserError(
            f'{name} = {batch} must be a multiple of the number of devices, {mesh.size}: '
            f'try {max(batch // mesh.size, 1) * mesh.size}'
        )


def over_batch(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of a batch whose batch axis follows `leading` other axes."""
    return NamedSharding(mesh, P(*[None] * leading, ('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array of which every device has a copy."""
    return NamedSharding(mesh, P())


def over_weights(mesh: Mesh, tree):
    """Sharding of every leaf: its largest axis that divides is cut over fsdp; small leaves are replicated."""
    size = mesh.shape['fsdp']

    def sharding_of(leaf) -> NamedSharding:
        fits = [d for d in range(leaf.ndim) if leaf.shape[d] % size == 0]
        if size == 1 or not fits or np.prod(leaf.shape) < SMALLEST_SHARDED:
            return replicated(mesh)
        axis = max(fits, key=lambda d: leaf.shape[d])
        return NamedSharding(mesh, P(*[None] * axis, 'fsdp'))

    return jax.tree.map(sharding_of, tree)


def put_batch(mesh: Mesh, batch: dict, leading: int = 0) -> dict:
    """Arrays over the whole mesh of host arrays, of which each process has its own block of the batch."""
    sharding = over_batch(mesh, leading)
    return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()}


def round_up(mesh: Mesh, n: int) -> int:
    """The next multiple of the number of devices."""
    return -(-n // mesh.size) * mesh.size


def put_padded(mesh: Mesh, batch: dict, size: int) -> tuple[dict, int]:
    """(arrays over the mesh, number of real examples) of a batch that every process holds whole, padded to `size` with
    copies of its last example: one size means one compile."""
    real = len(next(iter(batch.values())))
    each = size // jax.process_count()
    mine = slice(jax.process_index() * each, (jax.process_index() + 1) * each)
    padded = {k: np.concatenate([v, np.repeat(v[-1:], size - real, 0)])[mine] for k, v in batch.items()}
    return put_batch(mesh, padded), real


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array, on every host, of one that may be sharded over several hosts."""
    if array.is_fully_addressable:
        # By an Array of its own, which keeps the copy on the host only as long as it lives.
        own = [shard.data for shard in array.addressable_shards]
        return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, own))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def barrier(name: str) -> None:
    """Waits for all hosts."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_host(flag: bool) -> bool:
    """Whether the flag is set on any host. All hosts must call it at the same point."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())
