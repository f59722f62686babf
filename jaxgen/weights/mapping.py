"""From our names of weights to those of a published file, and back: one table for both directions.

A table is a list of substitutions on the path of one of our arrays, 'denoiser/down0_0_attention/qkv/kernel', in order,
up to its name in the file, and a list of layouts. In a name

    to_{q,k,v}      stands for several tensors that are one array here, joined along the output axis
    blocks.*        for as many tensors as the first axis of our array has, which is the depth of a scan
    blocks.*+13     the same, numbered from 13 on
    blocks.@        for copies of one tensor, `Table.copies` of them

A layout is an einops pattern, from the file's axes to ours, in which the tensors of several names have one axis more in
front, l for the depth and j for what is joined: 'l o i -> l i o'. It is added where the pattern does not name it. The
inverse is the same pattern with its sides exchanged.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import einops
import jax
import ml_dtypes
import numpy as np

from jaxgen.errors import UserError
from jaxgen.weights.files import Tensor

PIECE = 2**20  # numbers that are looked at together
EIGHT_BITS = ('float8_e4m3fn', 'float8_e5m2')  # whose numbers are numbers of bfloat16
DTYPES = ('float16', 'bfloat16', 'float32', 'float64', *EIGHT_BITS)  # of weights
Substitution = tuple[str, str | Callable[[re.Match], str]]  # as of re.sub
# The last substitutions of files of torch.
LEAVES: tuple[Substitution, ...] = ((r'/(kernel|scale|embedding)$', '.weight'), (r'/bias$', '.bias'), ('/', '.'))


def substituted(name: str, substitutions: Iterable[Substitution]) -> str:
    """A name after substitutions in their order."""
    for pattern, replacement in substitutions:
        name = re.sub(pattern, replacement, name)
    return name


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the tensors of a file become one array.

    Attributes:
      where: regular expression that the whole path of our array matches; a layout whose pattern has another rank is
        passed over.
      pattern: einops pattern, theirs -> ours; '': that of its rank, see `default_pattern`.
      sizes: lengths of axes that the pattern cannot tell, or a function of our array's shape.
      forward, backward: functions of the array in our layout, to ours and back.
    """

    where: str
    pattern: str = ''
    sizes: Mapping[str, int] | Callable[[tuple[int, ...]], Mapping[str, int]] = dataclasses.field(default_factory=dict)
    forward: Callable[[np.ndarray], np.ndarray] | None = None
    backward: Callable[[np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """The names and layouts of one kind of file."""

    names: Sequence[Substitution]
    layouts: Sequence[Layout] = ()
    copies: int = 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our arrays and the tensors that it is made of."""

    path: str  # 'denoiser/first/kernel'
    names: tuple[str, ...]  # in the file
    stacked: bool  # the tensors have one more axis in front
    pattern: str  # theirs -> ours
    sizes: dict[str, int]
    layout: Layout
    shape: tuple[int, ...]  # ours
    copies: tuple[str, ...] = ()  # names of tensors that equal the (only) one

    @property
    def all_names(self) -> tuple[str, ...]:
        return self.names + self.copies

    @property
    def inverse(self) -> str:
        theirs, ours = self.pattern.split('->')
        return f'{ours.strip()} -> {theirs.strip()}'

    def their_shape(self) -> tuple[int, ...]:
        """The shape of each of the tensors."""

        def backward(x):
            return einops.rearrange(x, self.inverse, **self.sizes)

        ours = self.shape
        if self.layout.backward:
            ours = self.layout.backward(np.broadcast_to(np.float32(0), ours)).shape
        shape = jax.eval_shape(backward, jax.ShapeDtypeStruct(ours, np.float32)).shape
        return shape[1:] if self.stacked else shape

    def dtype(self, tensors: Mapping[str, Tensor]) -> np.dtype:
        """That of our array: the file's, bfloat16 for those of eight bits, and float32 for tensors of several dtypes in
        one array."""
        read = (tensors[name].dtype for name in self.names)
        dtypes = {np.dtype(ml_dtypes.bfloat16) if one.name in EIGHT_BITS else one for one in read}
        return np.dtype(np.float32) if len(dtypes) > 1 else dtypes.pop()

    def read(self, tensors: Mapping[str, Tensor]) -> np.ndarray:
        """Our array, see `dtype`.

        Raises:
          UserError: a tensor holds infinities or no numbers, or is not equal to one that it should equal.
        """
        shape = self.their_shape()
        parts = np.empty((len(self.names), *shape), self.dtype(tensors))
        for i, name in enumerate(self.names):
            parts[i] = finite(name, tensors[name].read()).reshape(shape)
        for name in self.copies:
            if not np.array_equal(tensors[name].read().reshape(shape), parts[0]):
                raise UserError(f'{name} is not equal to {self.names[0]}: such weights have no place in this network')
        x = einops.rearrange(parts if self.stacked else parts[0, ...], self.pattern, **self.sizes)  # of a scalar too
        return np.asarray(self.layout.forward(x) if self.layout.forward else x, order='C')

    def pieces(self, x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(name, tensor) of our array, one after another."""
        x = self.layout.backward(x) if self.layout.backward else x
        y = einops.rearrange(x, self.inverse, **self.sizes)
        for i, name in enumerate(self.all_names):
            yield name, np.asarray(y[i if name in self.names else 0] if self.stacked else y, order='C')

    def write(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """{name: tensor} of our array."""
        return dict(self.pieces(x))


def finite(name: str, x: np.ndarray) -> np.ndarray:
    """The tensor itself.

    Raises:
      UserError: a number of it is infinite or none; such weights draw nothing.
    """
    flat = x.reshape(-1)
    for start in range(0, flat.size, PIECE):
        piece = flat[start : start + PIECE]
        if piece.dtype.itemsize == 2:  # numpy is slow on these: all bits of the exponent are set
            bits = piece.view(np.uint16)
            mask = 0x7C00 if piece.dtype == np.float16 else 0x7F80
            bad = bool(((bits & mask) == mask).any())
        else:
            bad = not np.isfinite(piece).all()
        if bad:
            raise UserError(f'{name} has numbers that are infinite or no numbers (NaN): the file is damaged')
    return x


def default_pattern(leaf: str, rank: int) -> str:
    """The pattern of a leaf of flax from one of torch: kernels of convolutions OIHW to HWIO, of dense layers OI to IO,
    all else as it is."""
    if leaf.endswith('kernel') and rank in (2, 4):
        return {2: 'o i -> i o', 4: 'o i h w -> h w i o'}[rank]
    axes = ' '.join('abcdef'[:rank])
    return f'{axes} -> {axes}'


def rank(side: str) -> int:
    """Number of axes of one side of a pattern."""
    return len(re.findall(r'\([^)]*\)|\S+', side))


def with_axes(pattern: str, joined: int, depth: int) -> tuple[str, dict[str, int]]:
    """A pattern of one tensor as that of several, and sizes: `depth` ones in front of ours, `joined` along our last
    axis; and the sizes alone where the pattern names these axes itself."""
    sizes = {axis: size for axis, size in (('l', depth), ('j', joined)) if size}
    theirs, ours = (side.strip() for side in pattern.split('->'))
    if sizes and not re.search(r'\b[lj]\b', theirs):
        if joined:
            *front, last = re.findall(r'\([^)]*\)|\S+', ours)
            ours = ' '.join([*front, f'(j {last.strip("()")})'])
        if depth:
            ours = f'l {ours}'
        theirs = f'({" ".join(sizes)}) {theirs}' if len(sizes) > 1 else f'{next(iter(sizes))} {theirs}'
    return f'{theirs} -> {ours}', sizes


def expand(name: str, depth: int) -> list[str]:
    """The names that a name with a star and braces stands for, depth first."""
    alternatives: list[Iterable[str]] = []
    for part in re.split(r'(\{[^}]*\}|\*(?:\+\d+)?)', name):
        if part.startswith('*'):
            first = int(part[1:] or 0)
            alternatives.append(map(str, range(first, first + depth)))
        else:
            alternatives.append(part[1:-1].split(',') if part.startswith('{') else [part])
    return [''.join(parts) for parts in itertools.product(*alternatives)]


def entry(table: Table, path: str, shape: tuple[int, ...]) -> Entry:
    """The tensors of one of our arrays, by a table."""
    name = substituted(path, table.names)
    depth = shape[0] if '*' in name else 0
    copies = [name.replace('@', str(i)) for i in range(table.copies)] if '@' in name else [name]
    names = expand(copies[0], depth)
    joined = len(names) // max(depth, 1) if '{' in name else 0
    layout = Layout('.*')
    for candidate in table.layouts:
        if re.fullmatch(candidate.where, path):
            full = re.search(r'\bl\b', candidate.pattern) or not depth
            if not candidate.pattern or rank(candidate.pattern.split('->')[1]) == len(shape) - (not full):
                layout = candidate
                break
    pattern = layout.pattern or default_pattern(path.rpartition('/')[2], len(shape) - bool(depth))
    sizes = dict(layout.sizes(shape) if callable(layout.sizes) else layout.sizes)
    pattern, more = with_axes(pattern, joined, depth)
    return Entry(
        path, tuple(names), bool(joined or depth), pattern, {**sizes, **more}, layout, tuple(shape), tuple(copies[1:])
    )


def entries(table: Table, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
    """An entry for each of our arrays, {path: shape}."""
    return [entry(table, path, shape) for path, shape in shapes.items()]


def same_numbers(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes are equal but for axes of length 1 at their ends: a 1x1 convolution is a dense layer."""

    def trimmed(shape):
        shape = list(shape)
        while shape and shape[-1] == 1:
            shape.pop()
        return shape

    return trimmed(a) == trimmed(b)


def check(
    entries: Iterable[Entry], tensors: Mapping[str, Tensor], skip: str, where: str, what: str = 'the config'
) -> None:
    """Raises UserError where a file lacks a tensor, or has one of another shape or type or of no use here.

    Args:
      skip: regular expression of names that a file may hold beside its weights.
      where, what: the file, and what its weights should fit, for the message.
    """
    expected = {name: e.their_shape() for e in entries for name in e.all_names}
    missing = [f'{name} {list(shape)}' for name, shape in expected.items() if name not in tensors]
    other = [
        f'{name} is {list(tensors[name].shape)} and {list(shape)} by {what}'
        for name, shape in expected.items()
        if name in tensors and not same_numbers(tensors[name].shape, shape)
    ]
    kinds = [
        f'{name} is {"of numbers that are not read" if tensors[name].dtype == object else tensors[name].dtype.name}'
        for name in expected
        if name in tensors and tensors[name].dtype.name not in DTYPES
    ]
    rest = [
        f'{name} {list(t.shape)}'
        for name, t in tensors.items()
        if name not in expected and not re.fullmatch(skip, name)
    ]
    problems = [
        f'{what}: {"; ".join(some[:3])}{f" and {len(some) - 3} more" if len(some) > 3 else ""}'
        for what, some in (
            ('of another shape', other),
            (f'not of {", ".join(DTYPES)}', kinds),
            ('missing', missing),
            ('left over', rest),
        )
        if some
    ]
    if problems:
        raise UserError(f'{where} does not fit {what}: {"; ".join(problems)}')


def count_present(entries: Iterable[Entry], tensors: Mapping[str, Tensor]) -> float:
    """The fraction of the expected names that a file has."""
    names = [name for e in entries for name in e.all_names]
    return sum(name in tensors for name in names) / max(len(names), 1)
