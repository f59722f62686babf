"""Draws images from a state, in batches of one fixed shape, over all devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import einops
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import data, origin, randomness, sharding
from jaxgen.data import captions
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


def classes(spec, config) -> np.ndarray:
    """The classes of the training data."""
    return np.unique(np.array(config.data.keep_classes or range(spec.classes), np.int32))


def one_condition(assembled, config, name: str, value: int | str) -> np.ndarray:
    """The value of a condition that a person sets for all samples, as one example holds it.

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
        raise UserError("condition 'domain' is that of the input image, as the data say: set label, the target domain")
    if name == 'caption':
        origin.check_named(assembled.unnamed, 'data.source', 'data.other')  # whose words are read
        return captions.check(str(value), feature.shape[0], family.captions.words, config.data)
    if feature.shape:
        raise UserError(f'condition {name!r} is not one number; only labels and captions can be set')
    if name == 'label' and number not in (kept := classes(spec, config)):
        all_of = f'between 0 and {spec.classes - 1}'
        allowed = f'one of the training classes, {kept.tolist()}' if len(kept) < spec.classes else all_of
        raise UserError(f'condition label={number} must be {allowed}')
    return np.array(number, feature.dtype)


def condition_provider(
    assembled, config, condition: dict[str, int | str]
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The function from samples' numbers [n] to 'index' [n] and the conditions that the family reads, [n, ...] each.

    Of a condition that is not set: labels count up through the training classes; anything else (a mask, a
    low-resolution image, a caption) comes from the test split, in order, cyclically. Examples are read when the
    function is called.

    Args:
      condition: {name: value} of those that a person sets for all samples.

    Raises:
      UserError: the family draws nothing, has no such condition, or a value is out of range.
    """
    family, spec = assembled.family, assembled.spec
    if not isinstance(condition, dict):
        raise UserError(f"condition must be a dict, like {{'label': 3}}; it is {condition!r}")
    if family.sample is None:
        raise UserError(f'a {config.family} draws no images: there is nothing to sample')
    fixed = {name: one_condition(assembled, config, name, value) for name, value in condition.items()}
    rest = [name for name in family.conditions if name != 'label' and name not in fixed]
    source = assembled.dataset('test') if rest else None
    kept = classes(spec, config)

    def provide(numbers: np.ndarray) -> dict[str, np.ndarray]:
        out = {'index': numbers.astype(np.int32)}
        if 'label' in family.conditions:
            out['label'] = kept[numbers % len(kept)]
        out |= {name: np.repeat(value[None], len(numbers), 0) for name, value in fixed.items()}
        examples = source.take_cyclic(numbers) if source is not None else {}
        return out | {name: examples[name] for name in rest}

    return provide


def conditions(assembled, config, n: int, condition: dict[str, int | str]) -> dict[str, np.ndarray]:
    """The conditions of the first n samples; see `condition_provider`."""
    return condition_provider(assembled, config, condition)(np.arange(n))


def draw(model: BoundModel, provide: Callable, n: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """The first n images in pieces of at most `batch`, uint8, under the conditions of a `condition_provider`.

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
