"""One program for one device and for a pod: the mesh, and the sharding of every array on it.

Batches are sharded over all devices. Weights, optimiser states, averages and frozen stages are cut over the `fsdp` axis
by one rule and replicated over the `data` axis; fsdp.py has them gathered where they are used. XLA adds the
communication; no family mentions devices.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
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


def jit(function, deterministic: bool = True, **options):
    """jax.jit with results that are the same, bit for bit, in every process, also on GPUs, where `deterministic`.

    XLA for GPUs by default chooses the fastest of several kernels by their measured times, and some of them add in no
    fixed order: two starts of one training diverged (by 0.008 in a weight after 100 updates of ddpm_digits on an H100,
    by nothing with the option that is set here). Under that option XLA makes slow loops of writes that may overlap, so
    a program with any is compiled without it, and differs by rounding from start to start.
    """
    plain = jax.jit(function, **options)
    if jax.default_backend() != 'gpu' or not deterministic:
        return plain
    options['compiler_options'] = {'xla_gpu_deterministic_ops': True, **(options.get('compiler_options') or {})}
    fixed = jax.jit(function, **options)
    chosen: list[Callable] = []

    def call(*args):
        if not chosen:
            chosen.append(plain if overlapping_writes(plain.trace(*args).jaxpr.jaxpr) else fixed)
        return chosen[0](*args)

    return call


def slice_of(device) -> int:
    """The slice of a device; 0 where devices have none."""
    return getattr(device, 'slice_index', None) or 0


def arranged(devices: Sequence, fsdp: int) -> np.ndarray:
    """The devices as an array [data, fsdp].

    Of several slices, which are joined by a slower network, each holds whole copies of the weights, so that gradients
    alone go between them. Every host has one block of rows, in the order of the hosts: so the order of a batch is the
    same whatever their number.

    Raises:
      UserError: weights cannot be cut over so many devices of one slice.
    """
    slices = Counter(map(slice_of, devices))
    n, each = len(devices), min(slices.values())
    if n % fsdp:
        raise UserError(f'config.mesh.fsdp = {fsdp} must divide the number of devices, {n}: try {math.gcd(fsdp, n)}')
    if len(slices) == 1:
        grid = mesh_utils.create_device_mesh((n // fsdp, fsdp), devices, allow_split_physical_axes=True)
    elif each * len(slices) != n or each % fsdp:
        sizes = ', '.join(map(str, slices.values()))
        raise UserError(
            f'config.mesh.fsdp = {fsdp} must divide the number of devices of each slice, all equal: {sizes}'
        )
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (each // fsdp, fsdp), (len(slices), 1), devices, allow_split_physical_axes=True
        )
    hosts = [device.process_index for device in grid.flat]
    if hosts != sorted(hosts):
        first: dict[int, int] = {}  # host of each slice
        for device in sorted(devices, key=lambda d: d.process_index):
            first.setdefault(slice_of(device), device.process_index)
        by_host = sorted(devices, key=lambda d: (first[slice_of(d)], d.process_index, d.id))
        grid = np.array(by_host, object).reshape(n // fsdp, fsdp)
    return grid


def make_mesh(fsdp: int, devices: list | None = None) -> Mesh:
    """Mesh of all devices with axes data x fsdp."""
    auto = (AxisType.Auto, AxisType.Auto)
    return Mesh(arranged(devices or jax.devices(), fsdp), ('data', 'fsdp'), axis_types=auto)


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


def cut_axis(shape: Sequence[int], parts: int) -> int | None:
    """The axis along which an array is cut into equal parts: the largest that divides; None where it is left whole."""
    fits = [d for d, length in enumerate(shape) if length % parts == 0]
    if parts == 1 or not fits or math.prod(shape) < SMALLEST_SHARDED:
        return None
    return max(fits, key=lambda d: shape[d])


def cut_axes(tree, parts: int) -> list[int | None]:
    """The axis along which each leaf of states or weights is cut, None where it is left whole. `State.extra` is whole:
    buffers of images are no weights, and statistics are small."""

    def axis_of(path, leaf) -> int | None:
        names = [getattr(key, 'name', None) for key in path]
        first = getattr(path[0], 'key', None) if path else None  # of {item: tree}, as checkpoints have them
        return None if 'extra' in names or first == 'extra' else cut_axis(leaf.shape, parts)

    return [axis_of(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def over_weights(mesh: Mesh, tree):
    """Sharding of every leaf of states or weights: cut over fsdp by `cut_axes`, else replicated."""
    axes = cut_axes(tree, mesh.shape['fsdp'])
    places = [replicated(mesh) if axis is None else NamedSharding(mesh, P(*[None] * axis, 'fsdp')) for axis in axes]
    return jax.tree.unflatten(jax.tree.structure(tree), places)


def use(mesh: Mesh):
    """The context in which programs over several devices are called: what lays out arrays (contract.shard_batch,
    fsdp.py) reads the mesh while they are traced."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh.size > 1 else contextlib.nullcontext()


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
