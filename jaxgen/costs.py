"""What a compiled program costs on a chip: operations, bytes of main memory by class of instruction, bytes between
chips, and the least time that the chip's published specifications allow (the roofline).

Counted on the text of the compiled program, instruction by instruction; bodies of loops as often as they run, of
conditionals the branch that takes longest. Arrays that the compiler keeps on the chip cost no main memory.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxgen import collectives, describe
from jaxgen.chips import Chip
from jaxgen.collectives import Collective, Instruction, Program, Shape

CLASSES = ('convolution', 'matmul', 'kernel', 'fusion', 'copy', 'collective', 'other')
# They compute nothing, and move nothing: names of what is there.
FREE = {
    *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'add-dependency', 'domain'),
    *('partition-id', 'replica-id', 'opt-barrier', 'while', 'conditional', 'call', 'async-update', 'async-done'),
    *('get-dimension-size', 'infeed', 'outfeed', 'send', 'recv'),
}
READS_PARTS = ('dynamic-slice', 'slice', 'gather')  # of their first operand
MOVES = {
    *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'copy', 'transpose', 'reshape', 'slice', 'pad'),
    *('dynamic-slice', 'dynamic-update-slice', 'concatenate', 'broadcast', 'reverse', 'gather', 'convert', 'fusion'),
}
KERNEL = '"tpu_custom_call"'  # the target of a kernel of one's own
ESTIMATE = re.compile(r'"cost_estimate":\s*\{"flops":\s*"?(\d+)')  # by who wrote the kernel
CYCLES = re.compile(r'"estimated_cycles":\s*"(\d+)')
PASSES = {'default': 1, 'high': 3, 'highest': 6}  # of bfloat16 in one product of float32
WINDOW = re.compile(r'\bwindow=\{([^}]*)\}')
LABELS = re.compile(r'\bdim_labels=(\w+)_(\w+)->(\w+)')


class Product(NamedTuple):
    """A matrix product, a convolution, or those of a kernel."""

    flops: int
    kind: str  # convolution | matmul | kernel
    dtype: str
    passes: int


class Costs(NamedTuple):
    """Of one run of a program on one chip.

    Attributes:
      flops: of matrix products and convolutions.
      bytes: {class of instruction: bytes of main memory read and written}.
      seconds: {class of instruction: the least time of its instructions one after another}; what is sent is not in it.
      collectives: arrays sent. sending: {(carrier, kind): seconds}.
      cycles: of the computation by the compiler's own estimate, where it writes one beside its instructions.
    """

    flops: int
    bytes: dict[str, int]
    seconds: dict[str, float]
    collectives: list[Collective]
    sending: dict[tuple[str, str], float]
    cycles: int = 0

    @property
    def computing(self) -> float:
        """Seconds without what is sent."""
        return sum(self.seconds.values())

    @property
    def communicating(self) -> float:
        return sum(self.sending.values())

    @property
    def hidden(self) -> float:
        """Seconds where everything is sent beside the computation: the least that can be."""
        return max(self.computing, self.communicating)

    @property
    def in_turn(self) -> float:
        """Seconds where nothing is."""
        return self.computing + self.communicating


def window_of(text: str, axes: int) -> dict[str, list]:
    """{field: numbers by spatial axis} of the window of a convolution: size, stride, pad, lhs_dilate, rhs_dilate."""
    match = WINDOW.search(text)
    fields = dict(part.split('=', 1) for part in match[1].split()) if match else {}

    def numbers(name: str, default: str) -> list[str]:
        return fields.get(name, 'x'.join([default] * axes)).split('x') if axes else []

    window = {name: [int(n) for n in numbers(name, '1')] for name in ('size', 'stride', 'lhs_dilate', 'rhs_dilate')}
    window['pad'] = [int(pair.split('_')[0]) for pair in numbers('pad', '0_0')]
    return window


def product(body: dict[str, Instruction], one: Instruction) -> Product | None:
    """The operations of a matrix product or a convolution; None of other instructions. Two for each pair of elements
    that meet: padding, and zeros put in by dilation, are no work."""
    if one.opcode == 'custom-call' and KERNEL in one.text and (estimate := ESTIMATE.search(one.text)):
        given = [body[name].shapes[0].dtype for name in one.operands if name in body and body[name].shapes]
        return Product(int(estimate[1]), 'kernel', given[0] if given else 'bf16', 1)
    if one.opcode not in ('dot', 'convolution') or any(name not in body for name in one.operands[:2]):
        return None
    left, right = (body[name].shapes[0] for name in one.operands[:2])
    (out,) = one.shapes[:1]
    precision = re.search(r'operand_precision=\{(\w+),(\w+)\}', one.text)
    passes = max(PASSES.get(p, 1) for p in precision.groups()) if precision else 1
    passes = passes if left.dtype == 'f32' else 1
    if one.opcode == 'dot':
        contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', one.text)
        k = math.prod(left.dims[int(d)] for d in contracted[1].split(',') if d) if contracted else 1
        return Product(2 * k * out.size, 'matmul', left.dtype, passes)
    labels = LABELS.search(one.text)
    assert labels, f'a convolution without dim_labels: {one.name}'
    of_left, of_right, of_out = labels.groups()
    spatial = sorted(c for c in of_out if c.isdigit())
    window = window_of(one.text, len(spatial))
    met = [
        describe.taps(
            left.dims[of_left.index(c)],
            out.dims[of_out.index(c)],
            window['size'][i],
            window['stride'][i],
            window['pad'][i],
            window['lhs_dilate'][i],
            window['rhs_dilate'][i],
        )
        for i, c in enumerate(spatial)
    ]
    rest = out.dims[of_out.index('b')] * out.dims[of_out.index('f')] * right.dims[of_right.index('i')]
    return Product(2 * rest * math.prod(met), kind_of_product(one, met, window, out, of_out), left.dtype, passes)


def kind_of_product(one: Instruction, met: list[int], window: dict, out: Shape, of_out: str) -> str:
    """convolution | matmul. TPUs run both as convolutions: by the name that JAX gave it, and where there is none by
    whether more than one tap meets each output (a batch of products has as many windows as taps)."""
    if 'conv_general_dilated' in one.op_name:
        return 'convolution'
    if 'dot_general' in one.op_name:
        return 'matmul'
    positions = [out.dims[of_out.index(c)] for c in sorted(c for c in of_out if c.isdigit())]
    return 'convolution' if any(m > p for m, p in zip(met, positions, strict=True)) else 'matmul'


class Accounts:
    """The costs of a program's instructions and computations on a chip.

    A program compiled for TPUs that stands in for one of a GPU (`chip.wraps` is 0) is counted without tiles and without
    memory on the chip: what lies there is read from main memory, and copies to it are none.
    """

    def __init__(self, program: Program, chip: Chip):
        self.program, self.chip, self.tiles = program, chip, bool(chip.wraps)
        self.users_of: dict[str, dict[str, list[tuple[Instruction, int]]]] = {}
        self.seconds_of = functools.cache(self.computation_seconds)
        self.products_of = functools.cache(self.products)

    # --- operations

    def products(self, name: str) -> tuple[Product, ...]:
        """Those of a fused computation, and of the fusions in it."""
        body, products = self.program.computations.get(name, {}), []
        for one in body.values():
            if made := product(body, one):
                products.append(made)
            for called in self.called(one):
                products += self.products_of(called)
        return tuple(products)

    def called(self, one: Instruction) -> list[str]:
        """The computations that a fusion, or an asynchronous start, stands for."""
        return one.calls().get('calls', []) if one.opcode == 'fusion' or one.opcode.endswith('-start') else []

    def products_in(self, body: dict[str, Instruction], one: Instruction) -> list[Product]:
        """Matrix products and convolutions of an instruction."""
        own = product(body, one)
        return [own] if own else [p for name in self.called(one) for p in self.products_of(name)]

    # --- bytes

    def size(self, shape: Shape) -> int:
        """Bytes of an array."""
        return shape.stored if self.tiles else shape.bytes

    def counts(self, shape: Shape) -> bool:
        """Whether reading or writing an array costs main memory."""
        return not self.tiles or shape.in_main_memory

    def stored(self, shape: Shape) -> int:
        """Bytes in main memory."""
        return self.size(shape) if self.counts(shape) else 0

    def is_prefetch(self, given: list[Shape], results: tuple[Shape, ...]) -> bool:
        """Whether a copy is one between memories, in a program that stands in for one of a GPU."""
        return not self.tiles and len({shape.in_main_memory for shape in (*given, *results) if shape.dims}) > 1

    def users(self, name: str) -> dict[str, list[tuple[Instruction, int]]]:
        """{instruction: those that read it, and as which operand} of a computation."""
        if name not in self.users_of:
            users: dict[str, list[tuple[Instruction, int]]] = {}
            for one in self.program.computations.get(name, {}).values():
                for place, operand in enumerate(one.operands):
                    users.setdefault(operand, []).append((one, place))
            self.users_of[name] = users
        return self.users_of[name]

    def read(self, computation: str, name: str, whole: int) -> int:
        """Bytes that a fused computation reads of an array of `whole` bytes: of slices their own, of what is updated
        in place or only handed on none."""
        total = 0
        for user, place in self.users(computation).get(name, []):
            if user.opcode == 'bitcast':
                total += self.read(computation, user.name, whole)
            elif user.opcode in READS_PARTS and place == 0:
                total += sum(map(self.size, user.shapes))
            elif user.opcode == 'fusion':
                (inner,) = self.called(user)
                total += self.read(inner, parameters(self.program.computations[inner])[place], whole)
            elif not ((user.opcode == 'dynamic-update-slice' and place == 0) or hands_on(user)):
                return whole
        return min(total, whole)

    def written(self, computation: str, shapes: tuple[Shape, ...]) -> int:
        """Bytes that a fused computation writes into its results of these shapes."""
        body = self.program.computations[computation]
        root = next(one for one in body.values() if one.root)
        results = [body[name] for name in root.operands] if root.opcode == 'tuple' else [root]
        if len(results) != len(shapes):  # nested tuples
            return sum(map(self.stored, shapes))
        return sum(
            self.written_one(computation, result, shape)
            for result, shape in zip(results, shapes, strict=True)
            if self.counts(shape)
        )

    def written_one(self, computation: str, result: Instruction, shape: Shape) -> int:
        body = self.program.computations[computation]
        while result.opcode == 'bitcast' and result.operands[0] in body:
            result = body[result.operands[0]]
        if result.opcode == 'dynamic-update-slice':
            return min(self.size(body[result.operands[1]].shapes[0]), self.size(shape))
        if result.opcode == 'scatter':
            return min(2 * self.size(body[result.operands[-1]].shapes[0]), self.size(shape))
        if result.opcode == 'fusion':
            (inner,) = self.called(result)
            return min(self.written(inner, (shape,)), self.size(shape))
        return 0 if result.opcode == 'parameter' or hands_on(result) else self.size(shape)

    def bytes(self, body: dict[str, Instruction], one: Instruction) -> int:
        """Bytes of main memory that an instruction reads and writes."""
        if is_free(one):
            return 0
        given = [shape for name in one.operands if name in body for shape in body[name].shapes]
        results, opcode = one.shapes, one.opcode
        if opcode.removesuffix('-start') == 'copy' and self.is_prefetch(given, results):
            return 0
        if opcode.endswith('-start'):
            opcode = opcode.removesuffix('-start')
            if opcode in ('copy', *collectives.KINDS):  # their result holds the operand
                return sum(map(self.stored, one.shapes))
            results = results[len(given) :]
            wrapped = [self.program.computations[name] for name in self.called(one)]
            opcode = next((i.opcode for body_ in wrapped for i in body_.values() if i.root), opcode)
        if opcode == 'fusion' and (called := self.called(one)):
            if starts_collective(self.program.computations[called[0]]):
                return sum(map(self.stored, results))  # the operand is one of these
            names = parameters(self.program.computations[called[0]])
            read = sum(
                self.read(called[0], name, self.size(body[operand].shapes[0]))
                for name, operand in zip(names, one.operands, strict=False)
                if operand in body and body[operand].shapes and self.counts(body[operand].shapes[0])
            )
            return read + self.written(called[0], results)
        if opcode in READS_PARTS:
            parts = sum(map(self.size, results))
            read = min(parts, sum(map(self.stored, given[:1])))
            return read + sum(map(self.stored, given[1:])) + sum(map(self.stored, results))
        if opcode == 'dynamic-update-slice':
            update = given[1:2]
            return sum(map(self.stored, update)) + (sum(map(self.size, update)) if self.counts(results[0]) else 0)
        if opcode == 'scatter':
            return sum(map(self.stored, given[len(given) // 3 :])) + 2 * sum(map(self.stored, given[-1:]))
        return sum(map(self.stored, given)) + sum(map(self.stored, results))

    # --- time

    def class_of(self, body: dict[str, Instruction], one: Instruction) -> str:
        """One of CLASSES."""
        if made := self.products_in(body, one):
            return max(made, key=lambda p: p.flops).kind
        opcode = one.opcode.removesuffix('-start')
        if opcode == 'custom-call' and KERNEL in one.text:
            return 'kernel'
        if opcode in collectives.KINDS:
            return 'collective'
        inside = [i for name in self.called(one) for i in self.program.computations.get(name, {}).values()]
        if any(i.opcode.removesuffix('-start') in collectives.KINDS for i in inside):
            return 'collective'
        if opcode in MOVES - {'fusion'} or (inside and all(i.opcode in MOVES for i in inside) and not nested(inside)):
            return 'copy'
        return 'fusion' if opcode == 'fusion' else 'other'

    def seconds(self, body: dict[str, Instruction], one: Instruction) -> float:
        """The least time of an instruction, by its operations and its bytes; what it sends costs nothing here."""
        made = self.products_in(body, one)
        operations = sum(p.flops / self.chip.rate(p.dtype, p.passes) for p in made)
        return max(operations, self.bytes(body, one) / self.chip.bandwidth)

    def computation_seconds(self, name: str) -> float:
        """The least time of a computation, loops and branches in it too."""
        body, total = self.program.computations.get(name, {}), 0.0
        for one in body.values():
            called = one.calls()
            if one.opcode == 'while':
                inner = sum(self.seconds_of(n) for kind in ('body', 'condition') for n in called.get(kind, []))
                total += collectives.trips(self.program, one) * inner
            elif one.opcode == 'conditional':
                total += max((self.seconds_of(n) for names in called.values() for n in names), default=0.0)
            elif one.opcode == 'call':
                total += sum(self.seconds_of(n) for n in called.get('to_apply', []))
            else:
                total += self.seconds(body, one)
        return total


def is_free(one: Instruction) -> bool:
    return one.opcode in FREE or one.opcode.endswith('-done') or '"AllocateBuffer"' in one.text


def hands_on(one: Instruction) -> bool:
    """Whether an instruction of a fused computation reads nothing of what it gets: results as they are, and later parts
    of a collective that runs beside the fusion."""
    return one.opcode == 'tuple' or 'chain_id=' in one.text or 'custom_call_target="AsyncCollective' in one.text


def starts_collective(body: dict[str, Instruction]) -> bool:
    return any('"AsyncCollectiveStart"' in one.text for one in body.values())


def nested(inside: Iterable[Instruction]) -> bool:
    return any(one.opcode == 'fusion' for one in inside)


def parameters(body: dict[str, Instruction]) -> list[str]:
    """Names of a computation's parameters, in their order."""
    parameters = {}
    for one in body.values():
        if one.opcode == 'parameter' and (number := re.match(r'\((\d+)\)', one.text)):
            parameters[int(number[1])] = one.name
    return [parameters[i] for i in sorted(parameters)]


def costs(
    program: str | Program,
    chip: Chip,
    weights: Iterable[tuple[int, ...]] = (),
    parts: Iterable[int] = (),
    rate: Callable[[list[int]], float] | None = None,
    kernels: float = 0,
) -> Costs:
    """The costs of one run of a compiled program on each chip.

    Args:
      program: the text of `compiled.as_text()`, or `collectives.parse` of it.
      weights, parts: by which carriers are known, see `collectives.collectives`.
      rate: bytes a second that each chip of a group sends in a ring, by the numbers of its partitions, [] for all of
        them; by default that of one link.
      kernels: FLOPs of all kernels, by `describe.flops`, for those without an estimate of their author.
    """
    module = collectives.parse(program) if isinstance(program, str) else program
    accounts = Accounts(module, chip)
    times = collectives.runs(module, accounts.seconds_of)
    fused = {name for body in module.computations.values() for one in body.values() for name in accounts.called(one)}
    flops, cycles, estimated, moved, seconds = 0, 0, 0, Counter[str](), dict.fromkeys(CLASSES, 0.0)
    for name, body in module.computations.items():
        if not times[name] or name in fused:
            continue
        for one in body.values():
            if is_free(one):
                continue
            which = accounts.class_of(body, one)
            if estimate := CYCLES.search(one.text):
                cycles += times[name] * int(estimate[1])
            made = times[name] * sum(p.flops for p in accounts.products_in(body, one))
            flops += made
            estimated += made if which == 'kernel' else 0
            moved[which] += times[name] * accounts.bytes(body, one)
            seconds[which] += times[name] * accounts.seconds(body, one)
    if moved['kernel'] and kernels > estimated:
        flops += round(kernels - estimated)
        seconds['kernel'] = max(seconds['kernel'], kernels / chip.peak)
    sent_by = collectives.collectives(module, weights, parts, times=times)
    sending: dict[tuple[str, str], float] = {}
    for sent in sent_by:
        text = next(o.text for o in module.computations[sent.within].values() if o.name == sent.name)
        each = rate(collectives.first_group(text)) if rate else chip.link
        key = (sent.carrier, sent.kind)
        sending[key] = sending.get(key, 0.0) + sent.sent / each
    order = {name: moved[name] for name in CLASSES if seconds[name]}
    return Costs(flops, order, {name: seconds[name] for name in order}, sent_by, sending, cycles)
