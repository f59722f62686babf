"""Draws images from a state, in batches of one fixed shape, over all devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import einops
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import data, randomness, sharding
from jaxgen.errors import RunError, UserError
from jaxgen.evaluation.bound import BoundModel


def to_inside(batch: dict) -> dict:
    """A batch as families read it: images, uint8 [n, H, W, C], as float32 in [-1, 1]."""
    return {k: data.to_float(v) if v.dtype == jnp.uint8 and v.ndim == 4 else v for k, v in batch.items()}


@functools.cache
def program(family):
    """The jitted sampler of a family: -> uint8 [n, H, W, C], and bool [n], whether all its pixels are finite."""

    def draw(state, frozen, batch, seed):
        images = family.sample(state, frozen, to_inside(batch), randomness.stream(jax.random.key(seed), 'sample'))
        return data.to_uint8(images), jnp.isfinite(images).all((1, 2, 3))

    return sharding.jit(draw)


def draw(model: BoundModel, provide: Callable, n: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """The first n images in pieces of at most `batch`, uint8, under the conditions of a `conditions.provider`.

    Raises:
      RunError: an image is not finite; uint8 would hide it.
    """
    size = model.batch_size(batch, n)
    for start in range(0, n, size):
        numbers = np.arange(start, min(start + size, n))
        yield draw_batch(model, provide(numbers), size, seed)


def draw_batch(model: BoundModel, batch: dict[str, np.ndarray], size: int, seed: int) -> np.ndarray:
    """Images of `batch` (host arrays [n, ...], n <= size), uint8; the program runs on `size` of them."""
    images, finite = model.apply(program(model.family), batch, size, seed)
    if not finite.all():
        raise RunError(f'sample {batch["index"][np.argmin(finite)]} is not finite: stopped')
    return images


def film(model: BoundModel, batch: dict[str, np.ndarray], seed: int, frames: int) -> np.ndarray:
    """Trajectories of the images of `batch`, uint8 [n, rows, frames, H, W, C]: frames evenly in steps, the last one
    last. Rows: the sampler's states, and where there is one its estimate of the end.

    Noise is displayed as grey as images are: what is wider than they are is scaled down.

    Raises:
      UserError: the family draws in one step.
    """
    family, n = model.family, len(batch['index'])
    if family.trajectory is None:
        raise UserError('--film shows the steps of a sampler, and this family draws in one step')
    placed, _ = sharding.put_padded(model.mesh, batch, model.batch_size(n, n))
    rng = randomness.stream(jax.random.key(seed), 'sample')
    trajectories = sharding.jit(family.trajectory)(model.state, model.frozen, to_inside(placed), rng)
    rows = []
    for x in trajectories.values():
        # From the last one back, so that one frame is the last one.
        steps = np.round(np.linspace(len(x) - 1, 0, min(frames, len(x)))).astype(int)[::-1]
        x = sharding.to_host(x[steps])[:, :n]
        std = x.std(axis=(2, 3, 4), keepdims=True)
        rows.append(np.asarray(data.to_uint8(jnp.asarray(x / np.maximum(1, 1.3 * std)))))
    return einops.rearrange(rows, 'rows frames n h w c -> n rows frames h w c')
