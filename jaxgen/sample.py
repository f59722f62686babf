"""Draws images from a state, in batches of one fixed shape, over all devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import data, origin, randomness, sharding
from jaxgen.data import captions
from jaxgen.errors import RunError, UserError


def to_inside(batch: dict) -> dict:
    """A batch as families see it: pictures, uint8 [n, H, W, C], as float32 in [-1, 1]."""
    return {k: data.to_float(v) if v.dtype == jnp.uint8 and v.ndim == 4 else v for k, v in batch.items()}


@functools.cache
def program(family):
    """The jitted sampler of a family: -> uint8 [n, H, W, C], and bool [n], whether all its pixels are finite."""

    def draw(state, frozen, batch, seed):
        images = family.sample(state, frozen, to_inside(batch), randomness.stream(jax.random.key(seed), 'sample'))
        return data.to_uint8(images), jnp.isfinite(images).all((1, 2, 3))

    return sharding.jit(draw)


def classes(spec, config) -> np.ndarray:
    """The classes that training saw."""
    return np.unique(np.array(config.data.keep_classes or range(spec.classes), np.int32))


def one_condition(assembled, config, name: str, value: int | str) -> np.ndarray:
    """What a person gives for all samples, as one example has it.

    Raises:
      UserError: the family has no such condition, or the value is not one for it.
    """
    family, spec = assembled.family, assembled.spec
    try:
        number = 0 if name == 'caption' else spec.class_number(value) if name == 'label' else int(value)
    except ValueError as e:
        raise UserError(f'write --condition={name}=NUMBER; it is {value!r}') from e
    if name not in family.conditions:
        has = f'its conditions: {", ".join(family.conditions)}' if family.conditions else 'it has none'
        raise UserError(f'this run takes no condition {name!r}; {has}')
    feature = spec.features[name]
    if name == 'domain':
        raise UserError("condition 'domain' is what a given picture is, as the data say: give label, what it becomes")
    if name == 'caption':
        origin.check_named(assembled.unnamed, 'data.source', 'data.other')  # whose words are read
        return captions.check(str(value), feature.shape[0], family.captions.words, config.data)
    if feature.shape:
        raise UserError(f'condition {name!r} is not one number; only labels and captions can be given')
    if name == 'label' and number not in (kept := classes(spec, config)):
        all_of = f'between 0 and {spec.classes - 1}'
        allowed = f'one of those that training saw, {kept.tolist()}' if len(kept) < spec.classes else all_of
        raise UserError(f'condition label={number} must be {allowed}')
    return np.array(number, feature.dtype)


def condition_provider(
    assembled, config, condition: dict[str, int | str]
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """What samples get, by their numbers [n]: 'index' [n] and the conditions that the family reads, [n, ...] each.

    A condition that is not given: labels count up through the classes that training saw; anything else (a mask, a
    low-resolution image, a caption) comes from the test split, in order, again and again. Pictures are read when their
    samples' turn comes.

    Raises:
      UserError: the family draws nothing, has no such condition, or a value is out of range.
    """
    family, spec = assembled.family, assembled.spec
    if not isinstance(condition, dict):
        raise UserError(f"condition must be a dict, like {{'label': 3}}; it is {condition!r}")
    if family.sample is None:
        raise UserError(f'a {config.family} draws no pictures: there is nothing to sample')
    given = {name: one_condition(assembled, config, name, value) for name, value in condition.items()}
    rest = [name for name in family.conditions if name != 'label' and name not in given]
    source = assembled.dataset('test') if rest else None
    kept = classes(spec, config)

    def give(numbers: np.ndarray) -> dict[str, np.ndarray]:
        out = {'index': numbers.astype(np.int32)}
        if 'label' in family.conditions:
            out['label'] = kept[numbers % len(kept)]
        out |= {name: np.repeat(value[None], len(numbers), 0) for name, value in given.items()}
        examples = source.take_cyclic(numbers) if rest else {}
        return out | {name: examples[name] for name in rest}

    return give


def batches(assembled, config, n: int, condition: dict[str, int | str]) -> dict[str, np.ndarray]:
    """What the first n samples get, all at once; see `condition_provider`."""
    return condition_provider(assembled, config, condition)(np.arange(n))


def draw(family, state, frozen, mesh, give: Callable, n: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """The first n images in pieces of at most `size`, uint8, of what `give` gives them (see `condition_provider`).

    Raises:
      RunError: an image is not finite; uint8 would hide it.
    """
    size = sharding.round_up(mesh, max(min(size, n), 1))
    for start in range(0, n, size):
        numbers = np.arange(start, min(start + size, n))
        yield draw_batch(family, state, frozen, mesh, give(numbers), size, seed)


def draw_batch(family, state, frozen, mesh, batch: dict, size: int, seed: int) -> np.ndarray:
    """Images of `batch` (host arrays [n, ...], n <= size), uint8; the program runs on `size` of them."""
    placed, real = sharding.put_padded(mesh, batch, size)
    images, finite = map(sharding.to_host, program(family)(state, frozen, placed, seed))
    if not finite[:real].all():
        raise RunError(f'sample {batch["index"][np.argmin(finite[:real])]} is not finite: stopped')
    return images[:real]


def film(family, state, frozen, mesh, batch: dict, seed: int, frames: int) -> np.ndarray:
    """How the images of `batch` came to be, uint8 [n, rows, frames, H, W, C]: frames evenly in steps, the last one
    last. Rows: what the sampler held, and where there is one its estimate of the end.

    Noise is shown as grey as images are: what is wider than they are is scaled down.

    Raises:
      UserError: the family draws in one step.
    """
    if family.trajectory is None:
        raise UserError('--film shows the steps of a sampler, and this family draws in one step')
    n = len(batch['index'])
    placed, _ = sharding.put_padded(mesh, batch, sharding.round_up(mesh, n))
    seen = sharding.jit(family.trajectory)(
        state, frozen, to_inside(placed), randomness.stream(jax.random.key(seed), 'sample')
    )
    rows = []
    for x in seen.values():
        # From the last one back, so that one frame is the last one.
        picked = np.round(np.linspace(len(x) - 1, 0, min(frames, len(x)))).astype(int)[::-1]
        x = sharding.to_host(x[picked])[:, :n]
        spread = x.std(axis=(2, 3, 4), keepdims=True)
        rows.append(np.asarray(data.to_uint8(jnp.asarray(x / np.maximum(1, 1.3 * spread)))))
    return np.stack(rows).transpose(2, 0, 1, 3, 4, 5)
