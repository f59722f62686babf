"""The conditions that samples get: what a person sets, and the data's own for the rest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxgen import config as configs
from jaxgen import origin
from jaxgen.data import captions
from jaxgen.errors import UserError


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
        origin.check_named(assembled.unnamed, *configs.DATA_PATHS)  # whose words are read
        return captions.check(str(value), feature.shape[0], family.captions.words, config.data)
    if feature.shape:
        raise UserError(f'condition {name!r} is not one number; only labels and captions can be set')
    if name == 'label' and number not in (kept := classes(spec, config)):
        all_of = f'between 0 and {spec.classes - 1}'
        allowed = f'one of the training classes, {kept.tolist()}' if len(kept) < spec.classes else all_of
        raise UserError(f'condition label={number} must be {allowed}')
    return np.array(number, feature.dtype)


def provider(assembled, config, condition: dict[str, int | str]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
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


def first(assembled, config, n: int, condition: dict[str, int | str]) -> dict[str, np.ndarray]:
    """The conditions of the first n samples; see `provider`."""
    return provider(assembled, config, condition)(np.arange(n))
