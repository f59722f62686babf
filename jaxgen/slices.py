"""Compiles a training step and a sampler for accelerators that are not here, and says what they would take.

The compiler for TPUs (the package libtpu) knows every slice by its name: it compiles a program for 4 x 4 chips on a
machine that has none, and neither opens a TPU that this machine may have nor asks for one over the network. GPUs are
estimated by arithmetic, with their published numbers: the program as it is compiled for as many TPUs of enough memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxgen
from jaxgen import assembly, chips, costs, describe, prepare, sample, sharding
from jaxgen.chips import GIB, Chip
from jaxgen.contract import condition_names
from jaxgen.errors import RunError, UserError

KNOWN = (
    'v5e:LENGTHS and v6e:LENGTHS with 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 or 16x16, v5p:LENGTHS with 2x2x1, 2x2x2, '
    '2x2x4, 2x4x4, 4x4x4, 4x4x8 and so on, h100:NUMBER, h200:NUMBER'
)
NAME = re.compile(r'([a-z0-9]+):([1-9]\d{0,4}(?:x[1-9]\d{0,4}){0,2})(?:\*([1-9]\d{0,2}))?')
# Without these the library asks Google's metadata server what machine this is, for minutes where there is none, refuses
# to be loaded by two processes at once, and writes its log to the terminal and into /tmp. None opens a TPU.
QUIET = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_STDERR_LOG_LEVEL': '3',
    'TPU_MIN_LOG_LEVEL': '3',
    'TPU_LOG_DIR': 'disabled',
}
STAND_IN = 'v5p'  # the TPU that programs for GPUs are compiled for
SIZE = r'([\d.]+)\s*([KMGT]?)i?B?'
# Of several versions of the compiler. The first names what is beside the arguments alone.
TEMPORARY = re.compile(rf'HLO temporaries \({SIZE}\) exceeds available HBM \({SIZE}\)')
ALL = re.compile(rf'Used {SIZE} of {SIZE} hbm|required for [\w ]*\({SIZE}\) exceeds available HBM \({SIZE}\)')
UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class Slice(NamedTuple):
    """Accelerators that are joined.

    Attributes:
      name: v5e:4x4. chip: its specifications. shape: chips along each axis; of GPUs their number.
      devices: the compiler's, in order. stands_in: the slice of TPUs that GPUs are estimated by, or ''.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: list
    stands_in: str = ''

    @property
    def hosts(self) -> int:
        if self.stands_in:
            return -(-len(self.devices) // chips.IN_ONE_NODE)
        return len({device.process_index for device in self.devices})


def cube(n: int) -> tuple[int, ...]:
    """Three lengths, powers of two as equal as can be, whose product is n.

    Raises:
      UserError: n is no power of two.
    """
    if n & (n - 1) or not n:
        raise UserError(f'--topology: {n} GPUs: name a power of two, 8 or 64')
    lengths = [1, 1, 1]
    for i in range(n.bit_length() - 1):
        lengths[2 - i % 3] *= 2
    return tuple(sorted(lengths))


def chips_of(name: str) -> int:
    """The number of chips of a slice by its name, without a compiler.

    Raises:
      UserError: it is no name of a slice.
    """
    _, shape, slices = parse(name)
    return math.prod(shape) * slices


def check_installed() -> None:
    """Raises UserError where the compiler is missing."""
    if importlib.util.find_spec('libtpu') is None:
        raise UserError("--mode=compile needs the compiler for TPUs, libtpu: pip install 'jaxgen[tpu]'")


@contextlib.contextmanager
def quiet():
    """A block in which the variables of QUIET are set, where they are not yet, and XLA_FLAGS is not: the library ends
    the process over flags of other compilers. A training that is started later by this process has the former ones."""
    with contextlib.suppress(RuntimeError):
        jax.devices('cpu')  # reads the flags, which are for it
    before = {name: os.environ.get(name) for name in (*QUIET, 'XLA_FLAGS')}
    os.environ.update({name: value for name, value in QUIET.items() if before[name] is None})
    os.environ.pop('XLA_FLAGS', None)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def find(name: str) -> Slice:
    """The slice of a name: KIND:LENGTHxLENGTH of TPUs, KIND:NUMBER of GPUs; `*N` behind it is N such slices.

    Raises:
      UserError: there is no such slice, or no compiler.
    """
    kind, shape, slices = parse(name)
    if kind in chips.GPUS:
        stands_in = f'{STAND_IN}:{"x".join(map(str, cube(shape[0])))}'
        return Slice(name, chips.GPUS[kind], shape, topology_devices(stands_in), stands_in)
    return Slice(name, chips.TPUS[kind], shape, topology_devices(name.partition('*')[0], slices))


def parse(name: str) -> tuple[str, tuple[int, ...], int]:
    """(kind of chip, lengths of a slice, number of slices) of a name.

    Raises:
      UserError: there can be no such slice.
    """
    parts = NAME.fullmatch(name)
    if not parts or parts[1] not in chips.CHIPS:
        raise UserError(f'--topology={name}: no such slice: there are {KNOWN}')
    kind, shape, slices = parts[1], tuple(int(n) for n in parts[2].split('x')), int(parts[3] or 1)
    chip = chips.CHIPS[kind]
    if kind in chips.GPUS and (len(shape) > 1 or slices > 1 or shape[0] > chip.most):
        raise UserError(f'--topology={name}: GPUs are named by their number, {kind}:8, at most {chip.most}')
    if len(shape) != chip.axes or math.prod(shape) > chip.most:
        raise UserError(
            f'--topology={name}: no such slice, {kind} have {chip.axes} lengths and at most {chip.most} chips: '
            f'there are {KNOWN}'
        )
    return kind, shape, slices


def topology_devices(name: str, slices: int = 1) -> list:
    """The compiler's devices of a slice of TPUs.

    Raises:
      UserError: it has none of this name, or is not installed.
    """
    check_installed()
    from jax.experimental import topologies

    more: dict[str, Any] = {'num_slices': slices} if slices > 1 else {}
    try:
        with quiet():
            return list(topologies.get_topology_desc(name, 'tpu', **more).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError) as e:
        reason = ' '.join(str(e).split())
        raise UserError(f'--topology={name}: no such slice ({reason[:200]}): there are {KNOWN}') from e


# --- programs


def placed(tree: Any, places: Any) -> Any:
    """Shapes of arrays with where they lie."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)


def batch_of(mesh: jax.sharding.Mesh, features: dict, n: int, leading: tuple[int, ...] = ()) -> dict:
    """The shapes of a batch of n examples over the mesh."""
    place = sharding.over_batch(mesh, len(leading))
    return {
        name: jax.ShapeDtypeStruct((*leading, n, *x.shape), x.dtype, sharding=place) for name, x in features.items()
    }


def update_program(a: assembly.Assembled) -> tuple[Any, tuple]:
    """One update of a config, as training runs it: the jitted function, and the shapes of its arguments."""
    from jaxgen.train import make_call

    shardings = sharding.over_weights(a.mesh, a.abstract)
    frozen = placed(a.frozen, sharding.over_weights(a.mesh, a.frozen))
    batch = batch_of(a.mesh, prepare.batch_features(a), a.config.data.batch, (1,))
    return make_call(a, shardings, 1, a.config.seed), (placed(a.abstract, shardings), frozen, batch)


def sample_program(a: assembly.Assembled) -> tuple[Any, tuple]:
    """The sampler of a config on one batch, as `--mode=sample` runs it."""
    ema = {name: weights for name, weights in a.abstract.ema.items() if '@' not in name}
    state = a.abstract.replace(params=None, opt=None, ema=ema)
    state, frozen = (placed(tree, sharding.over_weights(a.mesh, tree)) for tree in (state, a.frozen))
    features = {name: a.features[name] for name in condition_names(a.family, a.features)}
    features['index'] = jax.ShapeDtypeStruct((), np.int32)
    batch = batch_of(a.mesh, features, sharding.round_up(a.mesh, a.config.sample.batch))
    return sample.program(a.family).call, (state, frozen, batch, 0, sample.settings_of(a.family))


def needed(error: str, arguments: int) -> tuple[float | None, float | None] | None:
    """Bytes that are needed and that there are, by an error of the compiler, each None where it does not say; None
    where the error is not of memory.

    arguments: bytes of them on a chip.
    """
    temporary = TEMPORARY.search(error)
    match = temporary or ALL.search(error)
    if not match:
        return (None, None) if 'RESOURCE_EXHAUSTED' in error else None
    first, unit, second, other = [group for group in match.groups() if group is not None]
    used, limit = float(first) * UNITS[unit], float(second) * UNITS[other]
    return used + (arguments if temporary else 0), limit


def bytes_a_chip(tree: Any) -> int:
    """Of arrays that know where they lie, their part on one chip."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape) * leaf.dtype.itemsize
        for leaf in leaves
    )


def compile_program(program: Any, arguments: tuple, where: Slice, a: assembly.Assembled) -> dict[str, Any]:
    """What a jitted function takes on each chip; see `report`.

    Raises:
      RunError: the compiler fails, for another reason than memory.
    """
    began, n = time.monotonic(), len(where.devices)
    with sharding.use(a.mesh):
        traced = program.trace(*arguments)
    flops, kernels = (describe.flops(traced.jaxpr.jaxpr, within, 'tpu') for within in ('', 'pallas_call'))
    lowered = traced.lower()
    about: dict[str, Any] = {'fits': True, 'flops': flops, 'chips': n}
    try:
        with quiet():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        about['compile_seconds'] = round(time.monotonic() - began, 1)
        memory = needed(str(e), bytes_a_chip(arguments))
        if memory is None:
            raise RunError(f'the compiler failed: {" ".join(str(e).split())[:300]}') from e
        used, there = memory
        limit = where.chip.memory if where.stands_in or there is None else there
        fits = used is not None and used <= limit
        return {**about, 'fits': fits, 'memory': {'used': used, 'limit': limit}}
    about['compile_seconds'] = round(time.monotonic() - began, 1)
    stats = compiled.memory_analysis()
    parts = {
        'arguments': stats.argument_size_in_bytes,
        'results': stats.output_size_in_bytes - stats.alias_size_in_bytes,
        'temporary': stats.temp_size_in_bytes,
        'code': stats.generated_code_size_in_bytes,
    }
    total = sum(parts.values())
    about['memory'] = {'used': total, 'limit': where.chip.memory, **parts}
    about['fits'] = not where.stands_in or total <= where.chip.memory

    def rate(group: list[int]) -> float:
        members = [a.mesh.devices.flat[i] for i in group or range(n)]
        if where.stands_in:
            nodes = {i // chips.IN_ONE_NODE for i in group or range(n)}
            return chips.group_rate(where.chip, [], where.shape, len(nodes) == 1)
        joined = len({getattr(device, 'slice_index', 0) for device in members}) == 1
        return chips.group_rate(where.chip, [device.coords for device in members], where.shape, joined)

    weights = {tuple(leaf.shape) for leaf in jax.tree.leaves((a.abstract.params, a.abstract.ema, a.frozen))}
    cost = costs.costs(compiled.as_text(), where.chip, weights, [a.mesh.shape['fsdp']], rate, kernels / n)
    return {**about, **in_numbers(cost, where.chip, flops, n)}


def in_numbers(cost: costs.Costs, chip: Chip, flops: int, n: int) -> dict[str, Any]:
    """Costs as they are written: seconds and fractions of the peak, sums of collectives by carrier and kind."""
    sent: dict[tuple[str, str], dict[str, Any]] = {}
    for one in cost.collectives:
        row = sent.setdefault((one.carrier, one.kind), {'bytes': 0, 'sent': 0, 'times': 0})
        row['bytes'] += one.bytes
        row['sent'] += one.sent
        row['times'] += one.times
    rows = [
        {'carrier': carrier, 'kind': kind, **row, 'seconds': cost.sending[carrier, kind]}
        for (carrier, kind), row in sorted(sent.items(), key=lambda item: -item[1]['sent'])
    ]
    useful = flops / n / chip.peak
    return {
        'flops_per_chip': cost.flops,
        'hbm_bytes': cost.bytes,
        'collectives': rows,
        'seconds': {
            'least': cost.hidden,
            'in_turn': cost.in_turn,
            'computing': cost.computing,
            'communicating': cost.communicating,
            'by_class': cost.seconds,
            **({'compiler': cost.cycles / chip.clock} if chip.clock and cost.cycles else {}),
        },
        'fraction_of_peak': useful / cost.hidden if cost.hidden else 0.0,
    }


# --- what to change


def advice(about: dict[str, Any], a: assembly.Assembled, update: bool) -> list[str]:
    """Lines that say which fields to change, by what limits the program."""
    config, n, fsdp, lines = a.config, a.mesh.size, a.mesh.shape['fsdp'], []
    dtype = config.train.dtype
    if not about['fits']:
        limit = about['memory']['limit']
        used = about['memory']['used'] or 2 * limit
        cut = describe.size(a.abstract if update else (a.abstract.ema, a.frozen)) / fsdp
        if cut > limit / 4 and fsdp < n:
            enough = [d for d in range(2 * fsdp, n + 1) if n % d == 0 and d >= fsdp * used / limit]
            lines.append(f'raise config.mesh.fsdp to {min(enough, default=n)}')
        if dtype == 'float32':
            lines.append('set config.train.dtype=bfloat16, which halves the activations')
        if update and not config.train.remat:
            lines.append('set config.train.remat=true, which keeps fewer activations')
        part = config.data.batch // config.optim.accumulate
        if update and part % (2 * n) == 0:
            times = config.optim.accumulate * 2
            while used / limit > times / config.optim.accumulate and config.data.batch % (2 * times * n) == 0:
                times *= 2
            lines.append(f'set config.optim.accumulate={times}, which cuts the batch into parts')
        if not update and config.sample.batch > n:
            lines.append(f'set config.sample.batch={max(n, config.sample.batch // 2)}')
        lines.append('take more chips, or chips with more memory')
        return lines
    seconds, by_class = about['seconds'], about['seconds']['by_class']
    moved = {(row['carrier'], row['kind']): row for row in about['collectives']}
    activations = sum(row['seconds'] for (carrier, _), row in moved.items() if carrier == 'activations')
    if activations > 0.1 * seconds['computing'] and n > 1:
        lines.append(
            f'{percent(activations / seconds["in_turn"])} of the time goes on sending activations'
            + (': lower config.mesh.fsdp' if fsdp > 1 else ', which are of operations over the whole batch')
        )
    if seconds['communicating'] > seconds['computing']:
        lower = f'lower config.mesh.fsdp (now {fsdp}), ' if fsdp > 1 else ''
        lines.append(f'sending takes longer than computing: {lower}raise config.data.batch, or take fewer chips')
    if dtype == 'float32':
        lines.append('set config.train.dtype=bfloat16: half the bytes of activations')
    products = about['flops_per_chip'] / a_peak(about)
    if seconds['computing'] > 2 * products and products:
        heaviest = max(by_class, key=by_class.get)
        lines.append(
            f'limited by main memory, mostly of {heaviest}'
            + ('' if config.data.batch // config.optim.accumulate >= 8 * n else ': raise the batch per chip')
        )
    if update and config.train.remat and about['memory']['used'] < 0.5 * about['memory']['limit']:
        lines.append('memory is left: config.train.remat=false would save the recomputation')
    if update and config.optim.accumulate > 1 and about['memory']['used'] < 0.5 * about['memory']['limit']:
        lines.append(f'memory is left: config.optim.accumulate={config.optim.accumulate // 2} makes larger parts')
    return lines


def a_peak(about: dict[str, Any]) -> float:
    return about['peak']


def percent(x: float) -> str:
    return f'{100 * x:.0f} %'


# --- the report


def report(config, topology: str, programs: tuple[str, ...] = ('update', 'sample')) -> dict[str, Any]:
    """One JSON object: the slice, and for each program memory by chip, FLOPs, bytes of HBM by class of instruction,
    collectives by carrier and kind, and the roofline.

    Args:
      config: complete; stages may be untrained, they are taken as shapes.
      topology: see `find`.

    Raises:
      UserError: there is no such slice or compiler, or the config does not go with it.
      RunError: the compiler fails.
    """
    from jaxgen.train import check_fits, check_trains

    if jax.default_backend() == 'gpu':
        raise UserError('slices are compiled for in a process without GPUs: set JAX_PLATFORMS=cpu')
    where = find(topology)
    mesh = sharding.make_mesh(config.mesh.fsdp, where.devices)
    a = assembly.assemble(config, mesh, assembly.abstract_stage)
    check_trains(config, a.family)
    check_fits(config, mesh)
    about: dict[str, Any] = {
        'topology': topology,
        'chip': where.chip.name,
        'source': where.chip.source,
        'chips': mesh.size,
        'hosts': where.hosts,
        'mesh': dict(mesh.shape),
        'batch': config.data.batch,
        'accumulate': config.optim.accumulate,
        'dtype': config.train.dtype,
        'remat': config.train.remat,
        'sample_batch': sharding.round_up(mesh, config.sample.batch),
        'versions': versions(),
    }
    if where.stands_in:
        about['estimated_by'] = where.stands_in
    for program in programs:
        if program == 'sample' and a.family.sample is None:
            continue
        update = program == 'update'
        one = compile_program(*(update_program if update else sample_program)(a), where, a)
        one['advice'] = advice({**one, 'peak': where.chip.peak}, a, update)
        about[program] = one
    return about


def versions() -> dict[str, str]:
    """Of what compiled."""
    from importlib import metadata

    return {'jaxgen': jaxgen.__version__, 'jax': jax.__version__, 'libtpu': metadata.version('libtpu')}


def amount(x: float, unit: str) -> str:
    """A number with a unit's prefix: 1.4 TB."""
    for prefix, size in (('P', 1e15), ('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if x >= size:
            return f'{x / size:.3g} {prefix}{unit}'
    return f'{x:.3g} {unit}'


def duration(x: float) -> str:
    unit, size = next(((u, s) for u, s in (('s', 1), ('ms', 1e-3)) if x >= s), ('µs', 1e-6))
    return f'{x / size:.3g} {unit}'


def text(about: dict[str, Any]) -> str:
    """The report in lines."""
    mesh = ' x '.join(f'{name} {size}' for name, size in about['mesh'].items())
    by = f'; estimated by the program for {about["estimated_by"]}' if 'estimated_by' in about else ''
    hosts = f'{about["hosts"]} host{"s" * (about["hosts"] > 1)}'
    lines = [
        f'{about["topology"]}: {about["chips"]} x {about["chip"]}, {hosts}, mesh {mesh}{by}',
        f'  specifications of the chip: {about["source"]}',
    ]
    names = {'update': f'update of {about["batch"]}', 'sample': f'{about["sample_batch"]} samples'}
    for program, name in names.items():
        if program in about:
            lines += ['', *program_text(about[program], name)]
    return '\n'.join(lines)


def program_text(one: dict[str, Any], name: str) -> list[str]:
    """The lines of one program."""
    used, limit = one['memory']['used'], one['memory']['limit']
    least = '' if 'arguments' in one['memory'] else 'at least '
    amounts = f'{least}{used / GIB:.2f} of {limit / GIB:.2f} GiB a chip' if used else f'more than {limit / GIB:.2f} GiB'
    verdict = f'{"fits" if one["fits"] else "does not fit"}: {amounts}'
    lines = [f'{name}: {verdict}']
    if 'seconds' in one:
        seconds = one['seconds']
        total = sum(one['hbm_bytes'].values())
        lines += [
            f'  FLOPs         {amount(one["flops"], "")}, {amount(one["flops_per_chip"], "")} a chip as compiled',
            f'  time          at least {duration(seconds["least"])}, {duration(seconds["in_turn"])} with what is sent '
            f'in turn; {percent(one["fraction_of_peak"])} of the peak at most',
            f'  computing     {duration(seconds["computing"])}: '
            + ', '.join(f'{which} {duration(s)}' for which, s in seconds['by_class'].items())
            + (f"; {duration(seconds['compiler'])} by the compiler's estimate" if 'compiler' in seconds else ''),
            f'  HBM           {amount(total, "B")} a chip: '
            + ', '.join(f'{which} {amount(b, "B")}' for which, b in one['hbm_bytes'].items()),
        ]
        lines.append(f'  sending       {duration(seconds["communicating"])}')
        lines += [
            f'    {row["carrier"]:<12}{row["kind"]:<20}{amount(row["bytes"], "B"):>10}, {row["times"]} arrays, '
            f'{duration(row["seconds"])}'
            for row in one['collectives']
        ]
    else:
        lines.append(f'  FLOPs         {amount(one["flops"], "")}')
    compiled = one.get('flops_per_chip', one['flops'] / one['chips']) * one['chips'] / (one['flops'] or 1)
    if one['flops'] and compiled < 0.9:
        lines.append(
            f'  WARNING       {percent(compiled)} of the FLOPs are in the compiled program: equal products were merged '
            '(as of a generator in two steps), small ones became sums, or some were not found'
        )
    if one['flops'] and compiled > 1.1:
        lines.append(
            f'  WARNING       {percent(compiled)} of the FLOPs are in the compiled program: chips compute the same, or '
            'the compiler computes again what it has no memory for'
        )
    lines += [f'  to change     {line}' for line in one['advice']]
    lines.append(f'  compiled in   {one["compile_seconds"]:.0f} s')
    return lines
