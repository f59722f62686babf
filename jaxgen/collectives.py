"""What a compiled program sends between devices: its collectives by kind, what they carry, and how many bytes.

A compiled program is text (`compiled.as_text()`), computations of one instruction a line. `parse` reads it, `runs`
says how often each computation runs (the body of a loop as often as the loop goes round), `collectives` lists the
collectives among the instructions. It is the program of one device: so is every number here.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')
SMALL = 2**12  # elements; an array of no more is not counted as activations

BITS = {
    'pred': 8, 's2': 2, 'u2': 2, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 's32': 32, 'u32': 32,
    's64': 64, 'u64': 64, 'bf16': 16, 'f16': 16, 'f32': 32, 'f64': 64, 'c64': 64, 'c128': 128,
}  # fmt: skip

ARRAY = re.compile(r'\b([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?')
TILE = re.compile(r'T\(([\d,]+)\)')
SPACE = re.compile(r'S\((\d+)\)')
NAME = re.compile(r'%?([\w.\-]+)')
CALLED = re.compile(
    r'\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations)='
    r'(\{[^}]*\}|%?[\w.\-]+)'
)
TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


class Shape(NamedTuple):
    """An array of the program."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ''  # {order of the axes, the last one first:T(tile)S(memory)}

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    def bytes_of(self, size: int) -> int:
        """Bytes of so many elements of the dtype."""
        return -(-size * BITS.get(self.dtype, 8 if self.dtype.startswith('f8') else 0) // 8)

    @property
    def bytes(self) -> int:
        return self.bytes_of(self.size)

    @property
    def stored(self) -> int:
        """Bytes in memory: on TPUs the last axes are filled up to whole tiles, of 8 x 128 elements most often."""
        tile = TILE.search(self.layout)
        order = re.match(r'\{([\d,]+)', self.layout)
        if not tile or not order:
            return self.bytes
        dims = list(self.dims)
        last_first = (int(axis) for axis in order[1].split(','))
        for axis, length in zip(last_first, reversed([int(n) for n in tile[1].split(',')]), strict=False):
            dims[axis] = -(-dims[axis] // length) * length
        return self.bytes_of(math.prod(dims))

    @property
    def in_main_memory(self) -> bool:
        """Whether it lies in the device's main memory (HBM), and not in one on the chip or in the host's."""
        space = SPACE.search(self.layout)
        return space is None or space[1] == '0'


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of its result: several of a tuple, in order, nested ones too
    operands: tuple[str, ...]  # names
    text: str  # operands and attributes as they stand
    root: bool

    @property
    def op_name(self) -> str:
        """The name that JAX gave the operation: jit(call)/..."""
        match = OP_NAME.search(self.text)
        return match[1] if match else ''

    def calls(self) -> dict[str, list[str]]:
        """{attribute: computations} that it runs."""
        return {
            kind: NAME.findall(names.strip('{}')) for kind, names in CALLED.findall(self.text.split(', metadata=')[0])
        }


class Program(NamedTuple):
    """A compiled program."""

    entry: str
    computations: dict[str, dict[str, Instruction]]  # by name; instructions by name, in order


def closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in '([{') - (text[i] in ')]}')
        if not depth:
            return i
    raise ValueError(f'no closing bracket: {text[start : start + 80]}')


def shapes_of(text: str) -> tuple[Shape, ...]:
    """Arrays of a type: f32[8,16]{1,0} or (f32[2], s32[]). Of a dynamic dimension its bound."""
    return tuple(
        Shape(dtype, tuple(int(d.lstrip('<=')) for d in dims.split(',') if d), layout)
        for dtype, dims, layout in ARRAY.findall(text)
    )


def instruction(line: str) -> Instruction | None:
    """The instruction of a line, or None where it holds none."""
    head, equals, rest = line.strip().partition(' = ')
    if not equals:
        return None
    root, name = head.startswith('ROOT '), head.removeprefix('ROOT ').lstrip('%')
    end = closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
    type_, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index('(')
    opcode, inside = rest[:opening], rest[opening + 1 : closing(rest, opening)]
    # An operand is %name, or its type and %name; without % the last word of each.
    operands = re.findall(r'%([\w.\-]+)', inside) or [p.split()[-1] for p in inside.split(', ') if p.split()]
    return Instruction(name, opcode, shapes_of(type_), tuple(operands), rest[opening:], root)


def joined(lines: Iterable[str]) -> Iterator[str]:
    """Lines of a compiled program, each instruction in one: kernels' descriptions hold line breaks, after which a line
    begins without a space, perhaps with a brace."""
    whole = ''
    for line in lines:
        if whole and line and not line[0].isspace() and line.rstrip() != '}':
            whole += line
            continue
        if whole:
            yield whole
        whole = line if line[:1].isspace() and ' = ' in line else ''
        if not whole:
            yield line
    if whole:
        yield whole


def parse(text: str) -> Program:
    """The computations of a compiled program.

    Raises:
      ValueError: it has no entry.
    """
    entry, computations = '', dict[str, dict[str, Instruction]]()
    body: dict[str, Instruction] | None = None
    for line in joined(text.splitlines()):
        if not line.startswith((' ', '\t')) and line.endswith('{') and '->' in line:
            is_entry = line.startswith('ENTRY ')
            match = NAME.match(line.removeprefix('ENTRY ').strip())
            if match is None:
                continue
            entry = match[1] if is_entry else entry
            body = computations[match[1]] = {}
        elif line.startswith('}'):
            body = None
        elif body is not None and (one := instruction(line)):
            body[one.name] = one
    if not entry:
        raise ValueError('not the text of a compiled program: it has no entry')
    return Program(entry, computations)


def trips(module: Program, loop: Instruction) -> int:
    """How often a while loop goes round: as the compiler knows it, or by what its counter starts from and is compared
    with, in its condition or among what it begins with; 1 where neither is known."""
    if match := TRIPS.search(loop.text):
        return int(match[1])
    (condition,) = loop.calls().get('condition', [''])
    body = module.computations.get(condition, {})
    caller = next((b for b in module.computations.values() if b.get(loop.name) is loop), {})
    first = source(caller, loop.operands[0]) if loop.operands else None
    begins = first.operands if first is not None and first.opcode == 'tuple' else ()

    def value(name: str) -> int | None:
        """The constant that an operand of the condition is when the loop begins."""
        one = source(body, name)
        if one is not None and one.opcode == 'get-tuple-element' and (match := re.search(r'\bindex=(\d+)', one.text)):
            one = source(caller, begins[int(match[1])]) if int(match[1]) < len(begins) else None
        if one is None or one.opcode != 'constant' or not one.shapes[0].dtype.startswith(('s', 'u')):
            return None
        number = re.match(r'\((-?\d+)\)', one.text)
        return int(number[1]) if number else None

    root = next((source(body, one.name) for one in body.values() if one.root), None)
    operands = root.operands if root is not None else ()
    if root is not None and root.opcode == 'fusion':
        inner = module.computations.get(root.calls().get('calls', [''])[0], {})
        root = next((one for one in inner.values() if one.root), None)
        places = [source(inner, name) for name in root.operands] if root is not None else []
        numbers = [
            re.match(r'\((\d+)\)', p.text) if p is not None and p.opcode == 'parameter' else None for p in places
        ]
        operands = tuple(operands[int(number[1])] if number else '' for number in numbers)
    if root is None or root.opcode != 'compare' or len(operands) != 2:
        return 1  # goes on by more than a counter
    start, end = map(value, operands)
    if re.search(r'direction=(GT|GE)', root.text):  # the bound is named first
        start, end = end, start
    if end is not None and re.search(r'direction=[LG][TE]', root.text):
        return max(end - (start or 0) + bool(re.search(r'direction=[LG]E', root.text)), 0)
    constants = [
        int(match[1])
        for one in body.values()
        if one.opcode == 'constant'
        and (match := re.match(r'\((\d+)\)', one.text))
        and one.shapes[0].dtype.startswith(('s', 'u'))
    ]
    return max(constants, default=1)


def source(body: dict[str, Instruction], name: str) -> Instruction | None:
    """The instruction that a value is of, through copies; None where it is not in this computation."""
    one = body.get(name)
    while one is not None and one.opcode in ('copy', 'bitcast', 'convert') and one.operands:
        one = body.get(one.operands[0])
    return one


def runs(module: Program, seconds: Callable[[str], float] | None = None) -> Counter[str]:
    """{computation: how often it runs in one run of the program}. What an instruction applies to each element
    (`to_apply` of a reduction) is not counted.

    Args:
      seconds: time of a computation. Of a conditional only the branch that takes longest runs; without this every
        branch does, the most that can run.
    """
    times: Counter[str] = Counter()

    def visit(name: str, n: int) -> None:
        times[name] += n
        for one in module.computations.get(name, {}).values():
            if one.opcode in ('async-update', 'async-done'):  # of what their start has called
                continue
            each = n * trips(module, one) if one.opcode == 'while' else n
            for kind, names in one.calls().items():
                if kind == 'to_apply' and one.opcode not in ('call', 'async-start'):
                    continue
                if seconds and one.opcode == 'conditional':
                    continue
                for called in names:
                    visit(called, each + n if kind == 'condition' else each)

            if seconds and one.opcode == 'conditional':
                branches = [branch for names in one.calls().values() for branch in names]
                visit(max(branches, key=seconds), n)

    visit(module.entry, 1)
    return times


class Collective(NamedTuple):
    """One array of one collective."""

    kind: str  # one of KINDS
    shape: Shape  # of the whole array: what is gathered, what is reduced, what is sent
    group: int  # devices that exchange it with each other; 0: not known
    times: int  # how often it runs
    carrier: str  # weights | activations | small
    op_name: str
    within: str  # the computation
    name: str = ''  # of the instruction in it

    @property
    def bytes(self) -> int:
        """Bytes of the array, as often as it runs."""
        return self.shape.bytes * self.times

    @property
    def sent(self) -> int:
        """Bytes that each device sends, around a ring: half of an all-reduce's twice."""
        part = (self.group - 1) / self.group if self.group else 1.0
        factor = {'all-reduce': 2 * part, 'collective-permute': 1.0, 'collective-broadcast': 1.0}.get(self.kind, part)
        return round(self.bytes * factor)


def group_size(text: str) -> int:
    """Number of devices of a collective's groups, {{0,1},{2,3}}, [2,4]<=[8] or mesh['a'=2,'b'=4] {'b'}; 0: all of
    them, or not said."""
    if match := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', text):
        lengths = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes_of = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])  # an axis, or a part of one
        return math.prod(int(part or lengths[axis]) for axis, part in axes_of)
    if match := re.search(r'replica_groups=\[(\d+),(\d+)\]', text):
        return int(match[2])
    if match := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
        return len(match[1].split(','))
    if match := re.search(r'_xla_megascale_target="\{([\d,:]+)\}', text):  # slices: numbers, and first:last
        ends = [part.split(':') for part in match[1].split(',')]
        return sum(int(pair[-1]) - int(pair[0]) + 1 for pair in ends)
    return 0


def first_group(text: str) -> list[int]:
    """The partitions of a collective's first group, or those of a permutation's first pair; [] where all exchange with
    each other, or it is not said."""
    if match := re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}', text):
        return [int(n) for n in match[1].split(',')]
    if match := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
        groups, dims = ([int(n) for n in part.split(',')] for part in match.group(1, 2))
        order = [int(n) for n in match[3].split(',')] if match[3] else list(range(len(dims)))
        numbers = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(groups)
        return numbers.reshape(-1, groups[-1])[0].tolist()
    if match := re.search(r'replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}', text):
        lengths = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        numbers = np.arange(math.prod(lengths.values()))
        if given := re.search(r'device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)', match[2]):
            dims = [int(n) for n in given[1].split(',')]
            order = [int(n) for n in given[2].split(',')] if given[2] else list(range(len(dims)))
            numbers = numbers.reshape(dims).transpose(order)
        parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[3])  # an axis, or a part of one
        split, taken = [], []
        for axis, length in lengths.items():
            cut = sorted((int(before), int(size)) for name, before, size in parts if name == axis and size)
            whole = any(name == axis and not size for name, _, size in parts)
            done = 1
            for before, size in cut:
                split += [before // done, size]
                taken += [False, True]
                done = before * size
            split.append(length // done)
            taken.append(whole)
        numbers = numbers.reshape(split)
        return numbers[tuple(slice(None) if yes else 0 for yes in taken)].reshape(-1).tolist()
    return []


def kind_of(module: Program, name: str, one: Instruction) -> str:
    """The kind of collective of an instruction, or ''. On TPUs a reduce-scatter is a fusion of an all-reduce, and what
    goes between slices is sent by way of their hosts."""
    kind = one.opcode.removesuffix('-start')
    if kind == 'send' and (between := BETWEEN_SLICES.search(one.text)):
        kind = {'ONE_TO_ONE': 'collective-permute'}.get(between[1], between[1].lower().replace('_', '-'))
    if kind == 'ragged-all-to-all':
        kind = 'all-to-all'
    if kind not in KINDS:
        return ''
    scattered = any(i.opcode in ('dynamic-slice', 'slice') for i in module.computations[name].values())
    if kind == 'all-reduce' and (name.startswith('all-reduce-scatter') or ('fused' in name and scattered)):
        return 'reduce-scatter'
    return kind


def goes_on(body: dict[str, Instruction], one: Instruction) -> bool:
    """Whether an instruction is a later part of a collective that another computation starts. On TPUs it stands in
    each fusion beside which it runs, and in the one that ends it."""
    return 'chain_id=' in one.text and not any('"AsyncCollectiveStart"' in other.text for other in body.values())


@functools.lru_cache(maxsize=2**16)
def is_made_of(dims: tuple[int, ...], factors: tuple[int, ...]) -> bool:
    """Whether dims are products of groups of the factors, each used once: a transpose, or a reshape that merges axes.
    Both sorted, without 1."""
    if not dims:
        return not factors
    if len(factors) > 8:
        return dims == factors
    target, rest = dims[0], dims[1:]
    for choice in range(1, 2 ** len(factors)):
        taken = [f for i, f in enumerate(factors) if choice >> i & 1]
        if math.prod(taken) == target:
            left = tuple(f for i, f in enumerate(factors) if not choice >> i & 1)
            if is_made_of(rest, left):
                return True
    return False


def axes(dims: Iterable[int]) -> tuple[int, ...]:
    """Lengths of axes in order of size, without those of length 1."""
    return tuple(sorted(d for d in dims if d != 1))


# What moves an array, cuts it or fills it up, and the parts of a collective: its first operand is of what is sent.
MOVES = frozenset((
    'pad', 'slice', 'dynamic-slice', 'bitcast', 'copy', 'copy-start', 'copy-done', 'convert', 'reshape', 'transpose',
    'optimization-barrier', *KINDS, *(f'{kind}-{part}' for kind in KINDS for part in ('start', 'done')),
))  # fmt: skip


def callers(module: Program) -> dict[str, tuple[str, Instruction]]:
    """{computation of a fusion: (the computation that it stands in, the fusion)}."""
    return {
        called: (name, one)
        for name, body in module.computations.items()
        for one in body.values()
        if one.opcode == 'fusion'
        for called in one.calls().get('calls', ())
    }


def history(module: Program, within: dict[str, tuple[str, Instruction]], name: str, operand: str) -> Iterator[Shape]:
    """The shapes that an operand had before it was padded, cut, moved or sent, the latest first. The compiler fills a
    gradient of 1,152 x 6,912 numbers up to 1,152 x 7,040, scatters it, and shifts the parts to where they are wanted.

    Args:
      within: `callers` of the module.
      name: the computation that the operand stands in.
    """
    index = 0  # of a value that is a tuple
    for _ in range(1000):  # a program has no such chains; a text that is none may have a circle
        one = module.computations[name].get(operand)
        if one is None:
            return
        if one.opcode == 'get-tuple-element':
            place = re.search(r'\bindex=(\d+)', one.text)
            operand, index = one.operands[0], int(place[1]) if place else 0
        elif one.opcode == 'tuple':
            if index >= len(one.operands):
                return
            operand, index = one.operands[index], 0
        elif one.opcode == 'fusion':
            name = next(iter(one.calls().get('calls', ())), '')
            root = next((inner for inner in module.computations.get(name, {}).values() if inner.root), None)
            if root is None:
                return
            operand = root.name
        elif one.opcode == 'parameter':
            yield from one.shapes[index : index + 1]
            number = re.match(r'\((\d+)\)', one.text)
            if name not in within or number is None:
                return
            name, fusion = within[name]
            if int(number[1]) >= len(fusion.operands):
                return
            operand = fusion.operands[int(number[1])]
        else:
            yield from one.shapes[index : index + 1]
            if one.opcode not in MOVES or not one.operands:
                return
            several = one.opcode.removesuffix('-start').removesuffix('-done') in KINDS and len(one.operands) > 1
            operand, index = one.operands[index if several and index < len(one.operands) else 0], 0


class Weights:
    """The arrays that count as weights: those of given shapes, one layer of stacked ones, and either cut into equal
    parts along one axis."""

    def __init__(self, shapes: Iterable[tuple[int, ...]], parts: Iterable[int]):
        self.shapes: set[tuple[int, ...]] = set()
        parts = {p for p in parts if p > 1}
        for whole in set(map(tuple, shapes)):
            for dims in {whole, whole[1:]}:
                self.shapes.add(axes(dims))
                for part in parts:
                    for axis, length in enumerate(dims):
                        if length % part == 0:
                            self.shapes.add(axes((*dims[:axis], length // part, *dims[axis + 1 :])))
        self.sizes = {math.prod(s) for s in self.shapes}

    def __contains__(self, dims: tuple[int, ...]) -> bool:
        one = axes(dims)
        if one in self.shapes:
            return True
        size = math.prod(one)
        # Merged axes, or one axis in pieces.
        return size in self.sizes and any(
            math.prod(s) == size and (is_made_of(one, s) or is_made_of(s, one)) for s in self.shapes
        )


def collectives(
    program: str | Program,
    weights: Iterable[tuple[int, ...]] = (),
    parts: Iterable[int] = (),
    small: int = SMALL,
    times: Counter[str] | None = None,
) -> list[Collective]:
    """Every array that a compiled program's collectives exchange.

    What one carries goes by its shape: 'weights' has that of one of them, whole, one layer of a stack, or cut
    (gradients and averages have the same), or had it before the compiler filled it up, cut or moved it; 'small' is of
    at most `small` elements (scalars of the logs, batch statistics); all else is 'activations'.

    Args:
      program: the text of `compiled.as_text()`, or `parse` of it.
      weights: shapes of the weights on all devices together.
      parts: numbers of parts that they may be cut into, mesh.fsdp.
      times: how often each computation runs, see `runs`.
    """
    module = parse(program) if isinstance(program, str) else program
    known, collected = Weights(weights, parts), []
    times = runs(module) if times is None else times
    within = callers(module)
    for name, body in module.computations.items():
        for one in body.values():
            kind = kind_of(module, name, one) if times[name] else ''
            if not kind or goes_on(body, one):
                continue
            group = group_size(one.text) or 0
            sources = one.operands[:1] if one.opcode == 'send' else one.operands  # the second is a token
            of = [(operand, shape) for operand in sources if operand in body for shape in body[operand].shapes]
            given = [shape for _, shape in of]
            gathered = re.search(r'dimensions=\{(\d+)', one.text) if kind == 'all-gather' else None
            if gathered and group:
                axis = int(gathered[1])
                given = [s._replace(dims=(*s.dims[:axis], s.dims[axis] * group, *s.dims[axis + 1 :])) for s in given]
            elif kind == 'all-gather' and one.opcode != 'send':
                given = list(one.shapes)[-len(given) or None :]
            if not given:
                given = list(one.shapes)
            for i, shape in enumerate(given):
                before = history(module, within, name, of[i][0]) if i < len(of) else ()
                if shape.size <= small:
                    carrier = 'small'
                elif shape.dims in known or any(s.dims in known for s in before):
                    carrier = 'weights'
                else:
                    carrier = 'activations'
                collected.append(Collective(kind, shape, group, times[name], carrier, one.op_name, name, one.name))
    return collected


def totals(collected: Iterable[Collective]) -> dict[tuple[str, str], int]:
    """{(carrier, kind): bytes} of one run of the program."""
    sums: Counter[tuple[str, str]] = Counter()
    for one in collected:
        sums[one.carrier, one.kind] += one.bytes
    return dict(sorted(sums.items()))
