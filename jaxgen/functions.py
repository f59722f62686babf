"""A family's functions on a person's arrays: any number of images or latents, in batches of one compiled shape.

Images are uint8 [n, H, W, C], or floats in [-1, 1]. What comes out is on the host.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import data, fsdp, log, options, randomness, sharding
from jaxgen.contract import Family
from jaxgen.errors import UserError
from jaxgen.evaluation.bound import BoundModel
from jaxgen.losses.matching import unit
from jaxgen.sample import Program, Request, batch_size, settings_of, to_inside

# Functions of a Family that a Run offers, and what they need beside themselves.
OFFERED = ('sample', 'encode', 'encode_text', 'decode', 'classify', 'denoise')
SLACK = 1e-3  # by which rounding may bring a pixel out of [-1, 1]


def program(family: Family, name: str) -> Program:
    """The program of a function of the family: encode, encode_text, decode, classify or denoise. Families of the same
    options have one."""
    leaves, structure = jax.tree.flatten(settings_of(family))  # constants in these functions
    values = tuple((np.shape(x), np.asarray(x).dtype.str, np.asarray(x).tobytes()) for x in leaves)
    return requested(Request(name, family.program or family, (structure, values), family))


@functools.lru_cache(maxsize=64)
def requested(request: Request) -> Program:
    """The program of a request; the least recently used ones are forgotten."""
    family, name = request.family, request.function
    functions: Any = family

    def encode(state, frozen, arrays, rng):
        return functions.encode(state, frozen, to_inside(arrays), rng)

    def decode(state, frozen, arrays, rng):
        z, batch = split_latents(family, arrays)
        return functions.decode(state, frozen, to_inside(batch), z, rng)

    def classify(state, frozen, arrays, rng):
        return functions.classify(state, frozen, to_inside(arrays), rng)

    def denoise(state, frozen, arrays, rng):
        rest = {key: value for key, value in arrays.items() if key not in ('x', 'sigma')}
        x = to_inside({'x': arrays['x']})['x']
        return functions.denoise(state, frozen, to_inside(rest), x, arrays['sigma'])

    def encode_text(state, frozen, arrays, rng):
        return unit(functions.encode_text(state, frozen, arrays['tokens']).embedding)

    made = {'encode': encode, 'encode_text': encode_text, 'decode': decode, 'classify': classify, 'denoise': denoise}
    function = made[name]

    def call(state, frozen, arrays, seed):
        return fsdp.of_model(function)(state, frozen, arrays, randomness.stream(jax.random.key(seed), name))

    return Program(sharding.jit(call, family.deterministic))


def apply(model: BoundModel, name: str, arrays: dict[str, np.ndarray], most: int, seed: int) -> Any:
    """Outputs of a family's function for host arrays {name: [n, ...]}, with any n.

    Args:
      most: examples at a time, at most.
    """
    compiled, n = program(model.family, name), len(next(iter(arrays.values())))
    if not n:
        one = {key: jax.ShapeDtypeStruct((model.mesh.size, *a.shape[1:]), a.dtype) for key, a in arrays.items()}
        outputs = jax.eval_shape(compiled.call, model.state, model.frozen, one, seed)
        return jax.tree.map(lambda x: np.zeros((0, *x.shape[1:]), x.dtype), outputs)
    size = batch_size(model, compiled, n, most)
    pieces = []
    for start in range(0, n, size):
        piece = {key: a[start : start + size] for key, a in arrays.items()}
        pieces.append(model.apply(compiled.call, piece, size, seed))
    compiled.sizes.add((model.mesh, size))  # now that it was not too large for the device
    return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


# --- arrays of a person


def check_offered(family: Family, name: str, kind: str) -> None:
    """Raises UserError where the family lacks a function.

    kind: the family's name.
    """
    if getattr(family, name) is None:
        has = ', '.join(one for one in OFFERED if getattr(family, one) is not None)
        raise UserError(f'a {kind} has no {name}: it has {has}')


def as_array(name: str, value) -> np.ndarray:
    """The value as a host array.

    Raises:
      UserError: it is none.
    """
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f'{name} must be an array ({" ".join(str(e).split())[:200]})') from e


def is_real(array: np.ndarray) -> bool:
    """Whether these are integers or floats."""
    return jnp.issubdtype(array.dtype, np.number) and not jnp.issubdtype(array.dtype, np.complexfloating)


def as_float32(array: np.ndarray) -> np.ndarray:
    """The numbers as float32; what it does not hold is infinite."""
    with np.errstate(over='ignore'):
        return array.astype(np.float32)


def check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raises UserError where an array is not [n, *shape]."""
    if array.shape[1:] != shape or not array.ndim:
        expected = ', '.join(['n', *map(str, shape)])
        one = f': for one of them, {name}[None]' if array.shape == shape else ''
        raise UserError(f'{name} must be [{expected}]; they are {list(array.shape)}{one}')


def as_images(name: str, images, shape: tuple[int, ...], noisy: bool = False) -> np.ndarray:
    """Images [n, *shape] as uint8 or float32.

    Args:
      noisy: floats may lie outside of [-1, 1].

    Raises:
      UserError: they are of another type, shape or range.
    """
    array = as_array(name, images)
    real = jnp.issubdtype(array.dtype, np.floating)
    if array.dtype != np.uint8 and not real:
        raise UserError(f'{name} must be uint8 from 0 to 255, or floats from -1 to 1; they are {array.dtype}')
    check_shape(name, array, shape)
    if not real:
        return array
    array = as_float32(array)
    if not np.isfinite(array).all():
        raise UserError(f'{name} must be finite')
    if not noisy and array.size:
        low, high = float(array.min()), float(array.max())
        if low < -1 - SLACK or high > 1 + SLACK:
            raise UserError(
                f'{name}: floats must lie in [-1, 1]; they are from {low:.3g} to {high:.3g} (0 to 255 is uint8)'
            )
        if low >= 0 and high > 0.5:
            log.say(f'WARNING: {name} lie in [{low:.3g}, {high:.3g}]; floats mean [-1, 1], so 0 is grey')
    return array


def as_levels(name: str, value, n: int) -> np.ndarray:
    """Noise levels float32 [n], of one number or n.

    Raises:
      UserError: they are of another shape, or not positive.
    """
    array = as_array(name, value)
    if not is_real(array) or array.shape not in ((), (n,)):
        raise UserError(f'{name} must be a number or [{n}]; it is {options.shown(value)}')
    array = np.broadcast_to(as_float32(array), (n,))
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise UserError(f'{name} must be finite and more than 0; it is {options.shown(value)}')
    return array


def as_uint8(images: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Images, float32, in the type that `like` has."""
    return np.asarray(data.to_uint8(jnp.asarray(images))) if like.dtype == np.uint8 else images


def latent_shape(model: BoundModel, image: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one example's latents that are real numbers."""
    if model.family.latents.shape or model.family.encode is None:
        return model.family.latents.shape
    like = {'image': jax.ShapeDtypeStruct((1, *image), np.float32)}
    return jax.eval_shape(program(model.family, 'encode').call, model.state, model.frozen, like, 0).shape[1:]


def as_latents(model: BoundModel, name: str, latents, image: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Latents as arrays of a batch; see `split_latents`.

    Raises:
      UserError: they are not what the family decodes.
    """
    grids, vocabulary = model.family.latents.grids, model.family.latents.vocabulary
    if not grids:
        array = as_array(name, latents)
        if not is_real(array):
            raise UserError(f'{name} must be real numbers; they are {array.dtype}')
        check_shape(name, array, latent_shape(model, image))
        array = as_float32(array)
        if not np.isfinite(array).all():
            raise UserError(f'{name} must be finite')
        return {'z': array}
    if not isinstance(latents, list | tuple) or len(latents) != len(grids):
        shapes = ', '.join(f'[n, {h}, {w}]' for h, w in grids)
        raise UserError(f'{name} must be a tuple of integers {shapes}; it is {options.shown(type(latents).__name__)}')
    codes = [as_array(name, one) for one in latents]
    for one, grid in zip(codes, grids, strict=True):
        check_shape(name, one, grid)
        if not jnp.issubdtype(one.dtype, np.integer) or (one.size and not 0 <= one.min() <= one.max() < vocabulary):
            raise UserError(f'{name} must be integers from 0 to {vocabulary - 1}')
    if len({len(one) for one in codes}) > 1:
        raise UserError(f'{name}: each grid must be of as many examples')
    return {f'codes{i}': one.astype(np.int32) for i, one in enumerate(codes)}


def split_latents(family: Family, arrays: dict) -> tuple[Any, dict]:
    """(latents, the rest of the batch)."""
    names = [f'codes{i}' for i in range(len(family.latents.grids))] or ['z']
    rest = {key: value for key, value in arrays.items() if key not in names}
    latents = tuple(arrays[name] for name in names)
    return (latents if family.latents.grids else latents[0]), rest


# --- between two latents


def linear(a: np.ndarray, b: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Points (1 - t) a + t b of the lines from a to b [n, ...] at t [k] in [0, 1]: [n, k, ...]."""
    t = t.reshape(1, -1, *[1] * (a.ndim - 1))
    return (1 - t) * a[:, None] + t * b[:, None]


def spherical(a: np.ndarray, b: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The same on great circles (slerp, Shoemake 1985): between draws of a Gaussian the norm stays usual."""
    axes = tuple(range(1, a.ndim))
    cosine = (a * b).sum(axes) / np.maximum(np.sqrt((a**2).sum(axes) * (b**2).sum(axes)), 1e-12)
    angle = np.arccos(np.clip(cosine, -1, 1)).reshape(-1, 1, *[1] * (a.ndim - 1))
    t = t.reshape(1, -1, *[1] * (a.ndim - 1))
    parallel = np.sin(angle) < 1e-4  # the circle is a line, or there is no one circle
    sine = np.where(parallel, 1, np.sin(angle))
    circle = (np.sin((1 - t) * angle) * a[:, None] + np.sin(t * angle) * b[:, None]) / sine
    return np.where(parallel, (1 - t) * a[:, None] + t * b[:, None], circle)


PATHS = {'linear': linear, 'spherical': spherical}
