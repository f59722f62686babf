"""Draws images from a state, in batches of one fixed shape, over all devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import data, fsdp, options, randomness, sharding
from jaxgen.contract import Family, PyTree
from jaxgen.errors import RunError, UserError
from jaxgen.evaluation.bound import BoundModel


def to_inside(batch: dict) -> dict:
    """A batch as families read it: images, uint8 [n, H, W, C], as float32 in [-1, 1]."""
    return {k: data.to_float(v) if v.dtype == jnp.uint8 and v.ndim == 4 else v for k, v in batch.items()}


def with_options(build: Callable, model: dict, family: Family, given: dict[str, Any]) -> dict[str, Any]:
    """config.model with options of sampling put in, complete and checked.

    Args:
      build: the family's.
      model: {field: value}, complete.
      given: {field: value} of Python's own types, see `config.plain`; a section as a dict of what differs, or its
        fields with dots, 'guidance.scale'.

    Raises:
      UserError: an option that there is not, one that training depends on, or a value that it cannot have.
    """
    nested: dict[str, Any] = {}
    for path, value in given.items():
        first, *rest = path.split('.')
        if first not in family.sampling:
            raise UserError(f'sampling takes no option {path!r}: {refusal(build, model, family, first)}')
        for name in reversed(rest):
            value = {name: value}
        nested[first] = both(nested[first], value) if first in nested else value
    return options.complete(build, options.update(build, model, nested), 'model')


def refusal(build: Callable, model: dict, family: Family, name: str) -> str:
    """Why a field is no option of sampling."""
    has = f'its options are {", ".join(family.sampling)}' if family.sampling else 'this family has no options of it'
    sections = [s for s in family.sampling if isinstance(model.get(s), dict) and name in model[s]]
    if sections:
        return f'did you mean {" or ".join(f"{s}={{{name!r}: ...}}" for s in sections)}? {has}'
    if name in family.free:
        return f'it does not read config.model.{name}; {has}'
    return f'training depends on config.model.{name}; {has}' if name in options.fields(build) else has


def both(one, other):
    """The fields of two sections; a component's name may stand for its section."""
    one, other = ({'name': section} if isinstance(section, str) else section for section in (one, other))
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return other
    return {**one, **{k: both(one[k], v) if isinstance(v, dict) and k in one else v for k, v in other.items()}}


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function of a family, (state, frozen, batch, seed, settings) -> arrays.

    Attributes:
      sizes: of the batches that it was called on, with the mesh of each: for these it is compiled.
    """

    call: Callable
    sizes: set[tuple[jax.sharding.Mesh, int]] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class Request:
    """A function of a family, equal to another where one compiled program serves both."""

    function: str  # of `Family`, 'sample' or 'trajectory'
    program: Hashable
    structure: Hashable  # of the settings
    family: Family = dataclasses.field(compare=False)


def settings_of(family: Family) -> PyTree:
    """The settings that programs of the family get, () where it has none."""
    return family.settings() if family.settings else ()


def program(family: Family, function: str = 'sample') -> Program:
    """The jitted sampler of a family: -> uint8 [n, H, W, C], and bool [n], whether all its pixels are finite; or its
    'trajectory'. Families that differ in nothing but settings have one."""
    leaves, structure = jax.tree.flatten(settings_of(family))
    kinds = tuple((np.shape(leaf), np.asarray(leaf).dtype, isinstance(leaf, np.ndarray)) for leaf in leaves)
    return requested(Request(function, family.program or family, (structure, kinds), family))


@functools.lru_cache(maxsize=64)
def requested(request: Request) -> Program:
    """The program of a request; the least recently used ones are forgotten."""
    family = request.family
    function: Any = getattr(family, request.function)

    def draw(state, frozen, batch, seed, settings):
        rng = randomness.stream(jax.random.key(seed), 'sample')
        more = (settings,) if family.settings else ()
        outputs = fsdp.of_model(function)(state, frozen, to_inside(batch), rng, *more)
        if request.function == 'trajectory':
            return outputs
        return data.to_uint8(outputs), jnp.isfinite(outputs).all((1, 2, 3))

    return Program(sharding.jit(draw, family.deterministic))


MOST_BATCHES = 8  # that examples are cut into before a larger batch is compiled for them
MOST_PADDING = 16  # times as large as the examples a batch may be before a smaller one is compiled for them


def batch_size(model: BoundModel, compiled: Program, n: int, most: int) -> int:
    """The size of the batches that n examples are cut into: one that is compiled already, if it is about right.

    Of these the one that wastes least; if none is, that of `model.batch_size` with at most `most`. So the first call
    decides, and others with about as many examples compile nothing.
    """
    new = model.batch_size(most, n)
    sizes = {size for mesh, size in compiled.sizes if mesh == model.mesh}
    fit = [size for size in sizes if size <= MOST_PADDING * new and -(-n // size) <= MOST_BATCHES]
    fit += [new] if new in sizes or not fit else []
    return min(fit, key=lambda size: (-(-n // size) * size, -size))


def run_program(model: BoundModel, function: str, size: int) -> Callable:
    """The program of the model's family for batches of this size, its settings put in."""
    compiled, settings = program(model.family, function), settings_of(model.family)

    def run(*arguments):
        with sharding.use(model.mesh):
            outputs = jax.block_until_ready(compiled.call(*arguments, settings))
        compiled.sizes.add((model.mesh, size))  # now that it was not too large for the device
        return outputs

    return run


def draw(model: BoundModel, provide: Callable, n: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """The first n images in pieces of at most `size`, uint8, under the conditions of a `conditions.provider`.

    Args:
      size: of the batches, a multiple of the number of devices.

    Raises:
      RunError: an image is not finite; uint8 would hide it.
    """
    for start in range(0, n, size):
        numbers = np.arange(start, min(start + size, n))
        yield draw_batch(model, provide(numbers), size, seed)


def draw_batch(model: BoundModel, batch: dict[str, np.ndarray], size: int, seed: int) -> np.ndarray:
    """Images of `batch` (host arrays [n, ...], n <= size), uint8; the program runs on `size` of them."""
    images, finite = model.apply(run_program(model, 'sample', size), batch, size, seed)
    if not finite.all():
        raise RunError(f'sample {batch["index"][np.argmin(finite)]} is not finite: stopped')
    return images


def film(model: BoundModel, batch: dict[str, np.ndarray], size: int, seed: int, frames: int) -> np.ndarray:
    """Trajectories of the images of `batch`, uint8 [n, rows, frames, H, W, C]: frames evenly in steps, the last one
    last. Rows: the sampler's states, and where there is one its estimate of the end.

    Noise is displayed as grey as images are: what is wider than they are is scaled down.

    Args:
      size: of the batches, a multiple of the number of devices.

    Raises:
      UserError: the family draws in one step.
    """
    if model.family.trajectory is None:
        raise UserError('--film shows the steps of a sampler, and this family draws in one step')
    pieces = []
    for start in range(0, len(batch['index']), size):
        piece = {name: values[start : start + size] for name, values in batch.items()}
        placed, n = sharding.put_padded(model.mesh, piece, size)
        trajectories = run_program(model, 'trajectory', size)(model.state, model.frozen, placed, seed)
        pieces.append([frames_of(x, n, frames) for x in trajectories.values()])
    rows = [np.concatenate(row, 1) for row in zip(*pieces, strict=True)]
    return einops.rearrange(rows, 'rows frames n h w c -> n rows frames h w c')


def frames_of(x: jax.Array, n: int, frames: int) -> np.ndarray:
    """Frames uint8 [frames, n, H, W, C] of the first n trajectories of x [steps, ..., H, W, C]."""
    # From the last one back, so that one frame is the last one.
    steps = np.round(np.linspace(len(x) - 1, 0, min(frames, len(x)))).astype(int)[::-1]
    shown = sharding.to_host(x[steps])[:, :n]
    std = shown.std(axis=(2, 3, 4), keepdims=True)
    return np.asarray(data.to_uint8(jnp.asarray(shown / np.maximum(1, 1.3 * std))))
